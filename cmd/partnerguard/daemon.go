package main

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/partnerguard/partnerguard/internal/config"
	"github.com/partnerguard/partnerguard/policy"
	"github.com/partnerguard/partnerguard/policy/entra"
	"github.com/partnerguard/partnerguard/proxy"
	"github.com/partnerguard/partnerguard/proxy/listen"
	"github.com/partnerguard/partnerguard/telemetry"
	"github.com/partnerguard/partnerguard/telemetry/ledger"
	"github.com/partnerguard/partnerguard/telemetry/store"
)

// daemon is a running guard: everything that serve starts, and the order in which
// it ends.
type daemon struct {
	cfg      *config.Config
	policy   *policy.Policy
	log      *slog.Logger
	ledger   *ledger.Ledger
	store    *store.Store
	verifier *entra.Verifier
	tel      *telemetry.Telemetry
	upstream *proxy.Upstream
	servers  []*listen.Server
	admin    *http.Server
	adminAt  net.Listener

	keysTried  chan struct{} // one for each fetch of a key set, up to its capacity
	phase      atomic.Int32
	background sync.WaitGroup
	stop       context.CancelFunc // of the background work
}

// Phases of a daemon, for /readyz.
const (
	starting int32 = iota
	serving
	draining
)

// daemonConfig is what start needs besides the configuration.
type daemonConfig struct {
	config *config.Config
	dir    string // data directory
	log    *telemetry.CallLog
	env    func(string) string
}

// start brings everything up in the order in which it depends on each other and
// opens the listeners last. On an error nothing is left running.
func start(ctx context.Context, dc daemonConfig) (_ *daemon, err error) {
	cfg := dc.config
	d := &daemon{cfg: cfg, log: dc.log.Slog()}
	defer func() {
		if err != nil {
			d.close(context.Background())
		}
	}()
	if d.policy, err = cfg.Policy(); err != nil {
		return nil, err
	}
	instance, err := os.Hostname()
	if err != nil || instance == "" {
		instance = "partnerguard"
	}

	// The ledger first: it takes the lock of the data directory.
	if d.ledger, err = openLedger(dc, instance, d); err != nil {
		return nil, err
	}
	if d.tel, err = telemetry.New(ctx, telemetry.Config{
		Version: version(), Instance: instance, Log: dc.log, UserRef: d.ledger.UserRef, Env: dc.env,
	}); err != nil {
		return nil, err
	}
	if d.store, err = store.Open(store.Config{
		Dir: dc.dir, Retention: cfg.Ledger.Retention,
		Event: func(e store.Event) {
			d.event("store", e.Kind != store.Recovered, string(e.Kind), e.Err, "file", e.Path)
		},
	}); err != nil {
		return nil, failed(err, "the store can be rebuilt from the ledger: partnerguard ledger rebuild")
	}
	cloud, err := entra.ParseCloud(cfg.Cloud)
	if err != nil {
		return nil, err
	}
	d.keysTried = make(chan struct{}, 2*max(1, len(d.policy.Tenants()))) // v1 and v2
	if d.verifier, err = entra.New(entra.Config{
		Cloud: cloud, Authority: cfg.Entra.Authority, Tenants: d.policy.Tenants(),
		Leeway: leeway(cfg.Entra.Leeway), MaxStale: cfg.Entra.MaxStale, MFAValues: cfg.Entra.MFAValues, Dir: dc.dir,
		Event: func(e entra.Event) {
			d.event("keys", e.Kind != entra.EventRefreshed, e.Kind.String(), e.Err, "tenant", e.Tenant, "version", e.Version, "keys", e.Keys)
			select {
			case d.keysTried <- struct{}{}:
			default:
			}
		},
	}); err != nil {
		return nil, err
	}
	if err := d.openUpstream(); err != nil {
		return nil, err
	}
	guard, err := proxy.New(proxy.Config{
		Policy: d.policy, Verifier: d.verifier, Ledger: notifying{d.ledger, d.store}, Observer: d.tel,
		Upstreams: []*proxy.Upstream{d.upstream}, ValidateMFA: validateMFA(cfg.ValidateMFA),
		NeedLedger: cfg.Ledger.OnFailure == config.RejectOnFailure, Instance: instance, Generation: 1,
		OnPanic: func(kind string, stack []byte) {
			d.log.Error("panic; please report it", "kind", kind, "stack", string(stack))
		},
	})
	if err != nil {
		return nil, err
	}
	if err := d.openListeners(guard); err != nil {
		return nil, err
	}
	d.run(ctx)
	return d, nil
}

func openLedger(dc daemonConfig, instance string, d *daemon) (*ledger.Ledger, error) {
	if err := os.MkdirAll(dc.dir, 0o700); err != nil {
		return nil, failed(fmt.Errorf("create data directory: %w", err), "the service user needs write access to the data directory; see --data-dir")
	}
	l := dc.config.Ledger
	led, err := ledger.Open(ledger.Config{
		Dir: dc.dir, Instance: instance, Retention: l.Retention,
		SyncEvery: time.Duration(l.FSync), SyncAlways: l.FSync == config.FSyncAlways, MinFree: int64(l.MinFree),
		Event: func(e ledger.Event) {
			d.event("ledger", e.Kind != ledger.EventRecovered, string(e.Kind), e.Err, "segment", e.Segment, "calls", e.Gap.Calls)
		},
	})
	switch {
	case errors.Is(err, ledger.ErrLocked):
		return nil, failed(err, "another partnerguard writes here; stop it, or give this one its own --data-dir")
	case err != nil:
		return nil, failed(err, "the service user needs write access to the data directory; see --data-dir")
	}
	return led, nil
}

func (d *daemon) openUpstream() error {
	u := d.cfg.Upstreams[config.PartnerCenter]
	var roots *x509.CertPool
	if u.CA != "" {
		pem, err := os.ReadFile(u.CA)
		if err != nil {
			return fmt.Errorf("read upstreams.partner-center.ca: %w", err)
		}
		if roots, err = x509.SystemCertPool(); err != nil {
			roots = x509.NewCertPool()
		}
		if !roots.AppendCertsFromPEM(pem) {
			return fmt.Errorf("read upstreams.partner-center.ca: %s holds no PEM certificate", u.CA)
		}
	}
	t := d.cfg.Timeouts
	var err error
	d.upstream, err = proxy.NewUpstream(proxy.UpstreamConfig{
		Name: config.PartnerCenter, URL: u.URL, Audiences: u.Audiences, ValidatesMFA: true,
		Dial: u.Dial, RootCAs: roots, HTTP2: u.HTTP2,
		DialTimeout: t.Dial, TLSTimeout: t.TLS, ResponseHeader: t.ResponseHeader, Idle: t.Idle,
		OwnAddresses: d.addresses,
		OnBreaker: func(upstream, state string) {
			d.tel.Breaker(upstream, state)
			d.log.Warn("breaker changed", "upstream", upstream, "state", state)
		},
	})
	if err == nil {
		d.tel.Breaker(config.PartnerCenter, d.upstream.BreakerState())
	}
	return err
}

func (d *daemon) openListeners(guard *proxy.Guard) error {
	for _, l := range d.cfg.Listeners {
		handler, err := guard.Handler(proxy.Listener{Name: l.Label(), Integration: l.Integration, Upstream: config.PartnerCenter})
		if err != nil {
			return err
		}
		lc := listen.Config{
			Name: l.Label(), Address: l.Address, Handler: d.tel.Trace(handler), Unparsed: d.tel.Unparsed,
			ErrorLog: slog.NewLogLogger(d.log.Handler(), slog.LevelWarn),
		}
		if l.TLS != nil {
			lc.Certificate, lc.Key = l.TLS.Certificate, l.TLS.Key
		}
		s, err := listen.Open(lc)
		if err != nil {
			return portHint(err)
		}
		d.servers = append(d.servers, s)
	}
	var err error
	if d.adminAt, err = net.Listen("tcp", d.cfg.Admin.Address); err != nil {
		return portHint(fmt.Errorf("open the admin listener: %w", err))
	}
	d.admin = &http.Server{Handler: d.adminHandler(), ReadHeaderTimeout: 10 * time.Second, ErrorLog: slog.NewLogLogger(d.log.Handler(), slog.LevelWarn)}
	return nil
}

// event logs what happened to a part.
func (d *daemon) event(part string, bad bool, kind string, err error, facts ...any) {
	level := slog.LevelInfo
	if bad {
		level = slog.LevelWarn
	}
	facts = append([]any{"event", kind}, facts...)
	if err != nil {
		facts = append(facts, "error", err.Error())
	}
	d.log.Log(context.Background(), level, part, facts...)
}

func portHint(err error) error {
	return failed(err, "another program may listen there; see --listen and --admin, or listeners and admin.address in the configuration")
}

// run starts the background work and then the listeners.
func (d *daemon) run(ctx context.Context) {
	ctx, d.stop = context.WithCancel(context.WithoutCancel(ctx))
	d.background.Go(func() { d.verifier.Run(ctx) })
	d.awaitKeys()
	d.background.Go(func() {
		if err := d.store.Follow(ctx); err != nil {
			d.log.Error("store stopped following the ledger", "error", err.Error())
		}
	})
	d.background.Go(func() { d.watch(ctx) })
	d.background.Go(func() { d.probe(ctx) })
	for _, s := range d.servers {
		s.Serve()
	}
	d.background.Go(func() { d.admin.Serve(d.adminAt) })
	d.phase.Store(serving)
}

// awaitKeys gives the first keys a moment, so that the first calls are verified.
// Without them the guard serves all the same, each call as its mode says.
func (d *daemon) awaitKeys() {
	patience := time.After(3 * time.Second)
	for range cap(d.keysTried) {
		select {
		case <-d.keysTried:
		case <-patience:
			return
		}
	}
}

// watch keeps the gauges of the guard's own health.
func (d *daemon) watch(ctx context.Context) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		d.health()
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// probe says early, and once, when the upstream cannot be reached.
func (d *daemon) probe(ctx context.Context) {
	u := d.cfg.Upstreams[config.PartnerCenter]
	target, err := url.Parse(u.URL)
	if err != nil {
		return
	}
	address := u.Dial
	if address == "" {
		// A forward proxy may be the only way out; a direct dial says nothing then.
		if p, err := http.ProxyFromEnvironment(&http.Request{URL: target}); err != nil || p != nil {
			return
		}
		port := target.Port()
		if port == "" {
			port = map[string]string{"https": "443", "http": "80"}[target.Scheme]
		}
		address = net.JoinHostPort(target.Hostname(), port)
	}
	dialer := net.Dialer{Timeout: 5 * time.Second}
	c, err := dialer.DialContext(ctx, "tcp", address)
	if err != nil {
		d.log.Warn("upstream cannot be reached", "upstream", config.PartnerCenter, "error", err.Error(),
			"hint", "calls get 502 until it can; check DNS, firewall and HTTPS_PROXY")
		return
	}
	c.Close()
}

// addresses are where this guard listens.
func (d *daemon) addresses() []netip.AddrPort {
	var all []netip.AddrPort
	for _, s := range d.servers {
		all = append(all, s.Address())
	}
	if d.adminAt != nil {
		all = append(all, d.adminAt.Addr().(*net.TCPAddr).AddrPort())
	}
	return all
}

// wait returns when ctx ends or a listener fails.
func (d *daemon) wait(ctx context.Context) error {
	failed := make(chan error, 1)
	for _, s := range d.servers {
		d.background.Go(func() {
			select {
			case err := <-s.Failed():
				select {
				case failed <- err:
				default:
				}
			case <-ctx.Done():
			}
		})
	}
	select {
	case <-ctx.Done():
		return nil
	case err := <-failed:
		return err
	}
}

// drain ends the daemon: readiness first, then the listeners, the calls in flight,
// and last the account of them.
func (d *daemon) drain() error {
	d.phase.Store(draining)
	ctx, cancel := context.WithTimeout(context.Background(), d.cfg.Timeouts.Drain)
	defer cancel()
	var mu sync.Mutex
	var err error
	var group sync.WaitGroup
	for _, s := range d.servers {
		group.Go(func() {
			e := s.Shutdown(ctx)
			mu.Lock()
			defer mu.Unlock()
			err = errors.Join(err, e)
		})
	}
	group.Wait()
	if errors.Is(err, context.DeadlineExceeded) {
		d.log.Warn("calls were cut off", "hint", "timeouts.drain is how long they may take")
		err = nil
	}
	last, cancelLast := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancelLast()
	return errors.Join(err, d.close(last))
}

// close ends what start began, whatever part of it there is.
func (d *daemon) close(ctx context.Context) error {
	var errs []error
	add := func(err error) { errs = append(errs, err) }
	for _, s := range d.servers {
		add(s.Shutdown(ctx))
	}
	if d.admin != nil {
		add(d.admin.Close())
	}
	if d.adminAt != nil {
		d.adminAt.Close()
	}
	if d.stop != nil {
		d.stop()
	}
	d.background.Wait()
	if d.ledger != nil {
		add(d.ledger.Close())
	}
	if d.store != nil {
		if _, err := d.store.CatchUp(ctx); err != nil {
			d.log.Warn("store lags behind the ledger", "error", err.Error())
		}
		add(d.store.Close())
	}
	if d.tel != nil {
		if err := d.tel.Shutdown(ctx); err != nil {
			d.log.Warn("telemetry was not all sent", "error", err.Error())
		}
	}
	if d.upstream != nil {
		d.upstream.Close()
	}
	return errors.Join(errs...)
}

// notifying tells the store's follower of every record.
type notifying struct {
	*ledger.Ledger
	store *store.Store
}

func (n notifying) Finish(rec *proxy.Record) error {
	err := n.Ledger.Finish(rec)
	n.store.Notify()
	return err
}

// leeway turns the file's 0, which means none, into entra's word for it.
func leeway(d time.Duration) time.Duration {
	if d == 0 {
		return -1
	}
	return d
}

func validateMFA(v config.ValidateMFA) proxy.ValidateMFA {
	switch v {
	case config.ValidateReads:
		return proxy.ValidateReads
	case config.ValidateAll:
		return proxy.ValidateAll
	}
	return proxy.ValidateOff
}
