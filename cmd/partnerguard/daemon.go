package main

import (
	"cmp"
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	systemd "github.com/coreos/go-systemd/v22/daemon"
	"github.com/partnerguard/partnerguard/internal/config"
	"github.com/partnerguard/partnerguard/internal/watch"
	"github.com/partnerguard/partnerguard/proxy"
	"github.com/partnerguard/partnerguard/proxy/listen"
	"github.com/partnerguard/partnerguard/telemetry"
	"github.com/partnerguard/partnerguard/telemetry/ledger"
	"github.com/partnerguard/partnerguard/telemetry/store"
)

// daemon is a running guard: what lasts as long as the process, and the generation
// of the configuration that is in use.
type daemon struct {
	load     func() (*config.Config, error) // the configuration as it stands now
	file     string                         // of the configuration; empty: none
	dir      string
	env      func(string) string
	instance string
	log      *slog.Logger
	hangUp   <-chan os.Signal
	ledger   *ledger.Ledger
	store    *store.Store
	tel      *telemetry.Telemetry
	acme     *listen.ACME            // nil until a listener asks for it
	fleet    *listen.PostgresStorage // of acme; nil where the guard keeps its certificates itself
	guard    *proxy.Guard
	servers  []*listen.Server // in the order of the configuration that was started
	admin    *admin
	adminAt  net.Listener

	schedule   *schedule      // of reconcile
	watcher    *watch.Watcher // nil without a configuration file
	live       atomic.Pointer[generation]
	reloadErr  atomic.Pointer[error] // of the last reload, nil inside when it went well
	phase      atomic.Int32
	readyAsked atomic.Int64           // Unix seconds when somebody last asked whether the guard is ready
	tokens     atomic.Pointer[string] // what is wrong with the tokens of the last minute; empty: nothing
	ctx        context.Context        // of the background work
	stop       context.CancelFunc
	background sync.WaitGroup
}

// Phases of a daemon, for /readyz.
const (
	starting int32 = iota
	serving
	draining
)

// daemonConfig is what start needs.
type daemonConfig struct {
	load func() (*config.Config, error)
	file string // of the configuration; empty: there is none
	dir  string // data directory
	log  *telemetry.CallLog
	env  func(string) string
	// hangUp delivers each SIGHUP. Nil: there is none.
	hangUp <-chan os.Signal
}

// start brings everything up in the order in which it depends on each other and
// opens the listeners last. On an error nothing is left running.
func start(ctx context.Context, dc daemonConfig) (_ *daemon, err error) {
	d := &daemon{load: dc.load, file: dc.file, dir: dc.dir, env: dc.env, log: dc.log.Slog(), hangUp: dc.hangUp, schedule: newSchedule()}
	d.tokens.Store(new(string))
	d.ctx, d.stop = context.WithCancel(context.WithoutCancel(ctx))
	defer func() {
		if err != nil {
			d.close(context.Background())
		}
	}()
	d.openWatcher()
	cfg, err := d.load()
	if err != nil {
		return nil, err
	}
	d.watch(cfg)
	if d.instance = cfg.Instance; d.instance == "" {
		if d.instance, err = os.Hostname(); err != nil || d.instance == "" {
			d.instance = "partnerguard"
		}
	}

	// The ledger first: it takes the lock of the data directory.
	if err = d.openLedger(cfg.Ledger); err != nil {
		return nil, err
	}
	if d.tel, err = telemetry.New(ctx, telemetry.Config{
		Version: version(), Instance: d.instance, Log: dc.log, UserRef: d.ledger.UserRef, Env: dc.env,
	}); err != nil {
		return nil, err
	}
	place := storePlace{postgres: cfg.Store.Postgres, env: dc.env}
	url, err := place.url()
	if err != nil {
		return nil, err
	}
	if d.store, err = store.Open(store.Config{
		Dir: dc.dir, Retention: cfg.Ledger.Retention, TenantRetention: cfg.Ledger.TenantRetention(),
		Postgres: url, CurrentPostgres: place.url, Instance: d.instance, Version: version(), Pseudonymous: cfg.Ledger.Identities == config.PseudonymousIdentities,
		Event: func(e store.Event) {
			d.event("store", e.Kind != store.Recovered, string(e.Kind), e.Err, "file", e.Path)
		},
	}); err != nil {
		return nil, failed(err, cmp.Or(hintIn(err), "the store can be rebuilt from the ledger: partnerguard ledger rebuild"))
	}
	first, err := d.prepare(cfg, nil)
	if err != nil {
		return nil, err
	}
	d.live.Store(first)
	if d.guard, err = proxy.New(proxy.Config{
		Ledger: notifying{d.ledger, d.store}, Observer: d.tel, Settings: first.settings(), Instance: d.instance,
		OnPanic: func(kind string, stack []byte) {
			d.log.Error("panic; please report it", "kind", kind, "stack", string(stack))
		},
	}); err != nil {
		return nil, err
	}
	if err = d.openListeners(first); err != nil {
		return nil, err
	}
	d.run()
	return d, nil
}

func (d *daemon) openLedger(l config.Ledger) error {
	if err := os.MkdirAll(d.dir, 0o700); err != nil {
		return failed(fmt.Errorf("create data directory: %w", err), "the service user needs write access to the data directory; see --data-dir")
	}
	key, err := signingKey(l)
	if err != nil {
		return err
	}
	d.ledger, err = ledger.Open(ledger.Config{
		Dir: d.dir, Instance: d.instance, Key: key,
		Retention: l.Retention, TenantRetention: l.TenantRetention(), MaxBytes: int64(l.MaxBytes), Compress: l.Compress,
		SyncEvery: time.Duration(l.FSync), SyncAlways: l.FSync == config.FSyncAlways, MinFree: minFree(l.MinFree),
		Pseudonymous: l.Identities == config.PseudonymousIdentities,
		Event: func(e ledger.Event) {
			d.event("ledger", e.Kind != ledger.EventRecovered, string(e.Kind), e.Err, "segment", e.Segment, "calls", e.Gap.Calls, "outcomes", e.Gap.Outcomes)
		},
	})
	switch {
	case errors.Is(err, ledger.ErrLocked):
		return failed(err, "another partnerguard writes here; stop it, or give this one its own --data-dir")
	case err != nil:
		return failed(err, ledgerHint(err, "the service user needs write access to the data directory; see --data-dir"))
	}
	if l.Identities == config.PseudonymousIdentities {
		if known, err := ledger.Identities(d.dir); err == nil && len(known) > 0 {
			d.log.Warn("names of users from before are still kept", "file", "identities.jsonl", "users", len(known), "hint", "partnerguard ledger forget --all")
		}
	}
	return nil
}

// signingKey is the key that l names for checkpoints, nil for the ledger's own.
func signingKey(l config.Ledger) (ed25519.PrivateKey, error) {
	if l.Key == "" {
		return nil, nil
	}
	key, err := ledger.LoadKey(l.Key)
	if err != nil {
		return nil, failed(err, "ledger.key names it; without that, the guard makes one in its data directory")
	}
	return key, nil
}

// openListeners opens the sockets, or takes those that systemd opened.
func (d *daemon) openListeners(g *generation) error {
	cfg := g.cfg
	given, err := listen.Sockets()
	if err != nil {
		return fmt.Errorf("take the sockets that systemd opened: %w", err)
	}
	// All listeners together may not use up the process's file descriptors.
	connections := cfg.Limits.Connections
	if most := listen.ConnectionLimit(connections * len(cfg.Listeners)); most > 0 {
		connections = max(1, most/len(cfg.Listeners))
	}
	for _, l := range cfg.Listeners {
		s, err := listen.Open(listen.Config{
			Name: l.Label(), Address: l.Address, Socket: takeSocket(&given, l), TLS: g.tls[l.Label()],
			Handler:  d.tel.Trace(d.guard.Handler(l.Label())),
			Unparsed: d.tel.Unparsed, Refused: d.tel.ConnectionRefused,
			MaxConnections: connections, MaxHeaderBytes: int(cfg.Limits.Headers),
			ReadHeaderTimeout: cfg.Timeouts.ReadHeader, IdleTimeout: cfg.Timeouts.KeepAlive,
			ErrorLog: slog.NewLogLogger(d.log.Handler(), slog.LevelWarn),
		})
		if err != nil {
			return portHint(err)
		}
		d.servers = append(d.servers, s)
	}
	if len(given) > 0 {
		for _, s := range given {
			s.Listener.Close()
		}
		return failed(fmt.Errorf("systemd opened %s (%s), which no listener is for", given[0].Listener.Addr(), given[0].Name),
			"give the socket unit the address of a listener, or its name by FileDescriptorName")
	}
	if d.adminAt, err = net.Listen("tcp", cfg.Admin.Address); err != nil {
		return portHint(fmt.Errorf("open the admin listener: %w", err))
	}
	d.admin = newAdmin(adminConfig{Settings: g.admin, Pages: d.adminPages(), Log: d.log, Refused: d.tel.CredentialRefused})
	return nil
}

// takeSocket takes out of given the socket that is for l: by the name of its file
// descriptor, or by its address.
func takeSocket(given *[]listen.Socket, l config.Listener) net.Listener {
	i := slices.IndexFunc(*given, func(s listen.Socket) bool {
		return s.Name == l.Label() || s.Listener.Addr().String() == l.Address
	})
	if i < 0 {
		return nil
	}
	s := (*given)[i]
	*given = slices.Delete(*given, i, i+1)
	return s.Listener
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
func (d *daemon) run() {
	d.background.Go(func() {
		if err := d.store.Follow(d.ctx); err != nil {
			d.log.Error("store stopped following the ledger", "error", err.Error())
		}
	})
	d.background.Go(d.watchHealth)
	d.background.Go(d.followConfiguration)
	d.background.Go(d.followSchedule)
	// The sockets are bound by now: challenges of the CA find them.
	d.manageCertificates(d.live.Load())
	for _, s := range d.servers {
		s.Serve()
	}
	d.background.Go(func() { d.admin.serve(d.adminAt) })
	d.phase.Store(serving)
	d.notify(systemd.SdNotifyReady)
}

// watchHealth keeps the gauges of the guard's own health.
func (d *daemon) watchHealth() {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	told := "" // of the store
	for {
		d.watchTokens()
		told = d.watchStore(told)
		d.health()
		d.notify(systemd.SdNotifyWatchdog)
		select {
		case <-d.ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// watchTokens tells, once, that tokens which could be verified no longer can.
func (d *daemon) watchTokens() {
	verified, broken, alarm := d.tel.Tokens.Look()
	was := *d.tokens.Load() != ""
	text := ""
	switch {
	case alarm:
		text = fmt.Sprintf("of the tokens of the last minute %d could not be verified, %d could", broken, verified)
		if !was {
			d.log.Error("tokens can no longer be verified", "unverifiable", broken, "verified", verified,
				"hint", "their format or keys may have changed; see calls --reason and explain. Where calls are enforced they are refused: entra.on_unverifiable and the modes say which")
		}
	case was:
		d.log.Info("tokens can be verified again", "unverifiable", broken, "verified", verified)
	}
	d.tokens.Store(&text)
}

// watchStore tells, once, what to do about the store, and returns that. What made it
// fail at first, which was told then, is often only the end of a connection.
func (d *daemon) watchStore(told string) string {
	err := d.store.Status().Err
	hint := hintIn(err)
	switch {
	case err == nil:
		return ""
	case hint == "" || hint == told:
		return told
	}
	d.event("store", true, string(store.Failing), err, "hint", hint)
	return hint
}

// notify tells systemd, where it runs this process and asked to be told.
func (d *daemon) notify(state string) {
	if _, err := systemd.SdNotify(false, state); err != nil {
		d.log.Warn("systemd could not be told", "error", err.Error())
	}
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
	d.notify(systemd.SdNotifyStopping)
	timeouts := d.live.Load().cfg.Timeouts
	if asked := time.Unix(d.readyAsked.Load(), 0); time.Since(asked) < time.Minute {
		// Somebody goes by /readyz: a balancer needs time to see that it failed.
		// Until then the guard serves, and lets go of connections as they are used.
		for _, s := range d.servers {
			s.Drain()
		}
		time.Sleep(timeouts.Unready)
	}
	ctx, cancel := context.WithTimeout(context.Background(), timeouts.Drain)
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
		add(d.admin.close())
	}
	if d.adminAt != nil {
		d.adminAt.Close()
	}
	if d.acme != nil {
		d.acme.Close()
	}
	if d.fleet != nil {
		d.fleet.Close()
	}
	d.stop()
	if d.watcher != nil {
		d.watcher.Close()
	}
	if g := d.live.Load(); g != nil {
		g.close(nil)
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
