package main

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"time"

	"github.com/partnerguard/partnerguard/internal/config"
	"github.com/partnerguard/partnerguard/policy"
	"github.com/partnerguard/partnerguard/policy/entra"
	"github.com/partnerguard/partnerguard/proxy"
	"github.com/partnerguard/partnerguard/proxy/listen"
)

// generation is one configuration and what was made for it. It does not change; a
// reload makes another.
type generation struct {
	number    uint64
	cfg       *config.Config
	files     map[string][sha256.Size]byte // what the files that cfg names held
	policy    *policy.Policy
	verifier  *verifier
	upstreams []*upstream
	tls       map[string]*listen.TLS // by listener; none for clear text
	admin     *adminSettings
}

// verifier is a token verifier at work.
type verifier struct {
	*entra.Verifier
	of   string // what it was made for
	stop context.CancelFunc
	done chan struct{}
}

// upstream is an upstream and what it was made for.
type upstream struct {
	*proxy.Upstream
	of string
}

// prepare makes a generation of cfg aside from what runs. What old has and cfg asks
// for unchanged is used again: connections, breakers, keys and verdicts stay warm.
// On an error nothing is left of it.
func (d *daemon) prepare(cfg *config.Config, old *generation) (_ *generation, err error) {
	g := &generation{number: 1, cfg: cfg, tls: map[string]*listen.TLS{}}
	if old != nil {
		g.number = old.number + 1
	}
	defer func() {
		if err != nil {
			g.close(old)
		}
	}()
	if g.files, err = hashFiles(cfg.Files()); err != nil {
		return nil, err
	}
	if g.policy, err = cfg.Policy(); err != nil {
		return nil, err
	}
	if g.admin, err = loadAdmin(cfg.Admin, d.env); err != nil {
		return nil, err
	}
	if err := d.prepareTLS(g); err != nil {
		return nil, err
	}
	for _, name := range slices.Sorted(maps.Keys(cfg.Upstreams)) {
		u, err := d.prepareUpstream(g, name, old)
		if err != nil {
			return nil, err
		}
		g.upstreams = append(g.upstreams, u)
	}
	if g.verifier, err = d.prepareVerifier(g, old); err != nil {
		return nil, err
	}
	return g, nil
}

// settings are what the guard needs of g.
func (g *generation) settings() proxy.Settings {
	cfg := g.cfg
	s := proxy.Settings{
		Generation: g.number, Policy: g.policy, Verifier: g.verifier,
		ValidateMFA: validateMFA(cfg.ValidateMFA), NeedLedger: cfg.Ledger.OnFailure == config.RejectOnFailure,
		MaxCalls: cfg.Limits.Calls, MaxCallsOf: map[string]int{}, BodyTimeout: cfg.Timeouts.Body,
		Hosts: cfg.Hosts(),
	}
	for _, u := range g.upstreams {
		s.Upstreams = append(s.Upstreams, u.Upstream)
	}
	for _, l := range cfg.Listeners {
		s.Listeners = append(s.Listeners, proxy.Listener{Name: l.Label(), Integration: l.Integration, Upstream: l.Upstream})
	}
	for _, in := range cfg.Integrations {
		s.MaxCallsOf[in.Name] = cfg.CallsOf(in.Name)
	}
	return s
}

// close ends what only g uses; next goes on with the rest, nil with nothing.
func (g *generation) close(next *generation) {
	for _, u := range g.upstreams {
		if next == nil || !slices.Contains(next.upstreams, u) {
			u.Close()
		}
	}
	if v := g.verifier; v != nil && (next == nil || next.verifier != v) {
		v.stop()
		<-v.done
	}
}

func (d *daemon) prepareTLS(g *generation) error {
	for i, l := range g.cfg.Listeners {
		if l.TLS == nil {
			continue
		}
		tc := listen.TLSConfig{Certificate: l.TLS.Certificate, Key: l.TLS.Key, ClientCA: l.ClientCA, ClientCRL: l.ClientCRL}
		if len(l.TLS.ACME) > 0 {
			if d.acme == nil {
				acme, err := d.openACME(g.cfg)
				if err != nil {
					return err
				}
				d.acme = acme
			}
			tc.ACME, tc.Domains = d.acme, l.TLS.ACME
		}
		t, err := listen.LoadTLS(tc)
		if err != nil {
			return fmt.Errorf("listeners[%d] (%s): %w", i, l.Label(), err)
		}
		g.tls[l.Label()] = t
	}
	return nil
}

// domains are the names that listeners want certificates for.
func (g *generation) domains() []string {
	var all []string
	for _, l := range g.cfg.Listeners {
		if l.TLS != nil {
			all = append(all, l.TLS.ACME...)
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}

func (d *daemon) prepareUpstream(g *generation, name string, old *generation) (*upstream, error) {
	cfg, t := g.cfg.Upstreams[name], g.cfg.Timeouts
	of := fmt.Sprintf("%s %#v %v %v %v %v %x", name, cfg, t.Dial, t.TLS, t.ResponseHeader, t.Idle, g.files[cfg.CA])
	if old != nil {
		for _, u := range old.upstreams {
			if u.of == of {
				return u, nil
			}
		}
	}
	roots, err := rootsWith(cfg.CA)
	if err != nil {
		return nil, fmt.Errorf("read upstreams.%s.ca: %w", name, err)
	}
	u, err := proxy.NewUpstream(proxy.UpstreamConfig{
		Name: name, URL: cfg.URL, Audiences: cfg.Audiences, ValidatesMFA: name == config.PartnerCenter,
		RewriteLinks: cfg.RewriteLinks, Dial: cfg.Dial, RootCAs: roots, HTTP2: cfg.HTTP2,
		DialTimeout: t.Dial, TLSTimeout: t.TLS, ResponseHeader: t.ResponseHeader, Idle: t.Idle,
		OwnAddresses: d.addresses,
		OnBreaker: func(upstream, state string) {
			d.tel.Breaker(upstream, state)
			d.log.Warn("breaker changed", "upstream", upstream, "state", state)
		},
	})
	if err != nil {
		return nil, err
	}
	d.tel.Breaker(name, u.BreakerState())
	d.background.Go(func() { d.probe(name, cfg) })
	return &upstream{u, of}, nil
}

// probe says early, and once, when an upstream cannot be reached.
func (d *daemon) probe(name string, u config.Upstream) {
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
	c, err := dialer.DialContext(d.ctx, "tcp", address)
	if err != nil {
		if d.ctx.Err() == nil {
			d.log.Warn("upstream cannot be reached", "upstream", name, "error", err.Error(),
				"hint", "calls get 502 until it can; check DNS, firewall and HTTPS_PROXY")
		}
		return
	}
	c.Close()
}

func (d *daemon) prepareVerifier(g *generation, old *generation) (*verifier, error) {
	e := g.cfg.Entra
	of := fmt.Sprintf("%s %v %v %v %v %q %x", g.cfg.Cloud, g.policy.Tenants(), e.Authority, e.Leeway, e.MaxStale, e.MFAValues, g.files[e.CA])
	var previous *entra.Verifier
	if old != nil {
		if old.verifier.of == of {
			return old.verifier, nil
		}
		previous = old.verifier.Verifier
	}
	cloud, err := entra.ParseCloud(g.cfg.Cloud)
	if err != nil {
		return nil, err
	}
	roots, err := rootsWith(e.CA)
	if err != nil {
		return nil, fmt.Errorf("read entra.ca: %w", err)
	}
	tried := make(chan struct{}, 2*max(1, len(g.policy.Tenants()))) // one for each fetch: v1 and v2
	v, err := entra.New(entra.Config{
		Cloud: cloud, Authority: e.Authority, Tenants: g.policy.Tenants(), RootCAs: roots, Previous: previous,
		Leeway: leeway(e.Leeway), MaxStale: e.MaxStale, MFAValues: e.MFAValues, Dir: d.dir,
		Event: func(e entra.Event) {
			d.event("keys", e.Kind != entra.EventRefreshed, e.Kind.String(), e.Err, "tenant", e.Tenant, "version", e.Version, "keys", e.Keys)
			select {
			case tried <- struct{}{}:
			default:
			}
		},
	})
	if err != nil {
		return nil, err
	}
	ctx, stop := context.WithCancel(d.ctx)
	running := &verifier{Verifier: v, of: of, stop: stop, done: make(chan struct{})}
	go func() {
		defer close(running.done)
		v.Run(ctx)
	}()
	awaitKeys(v, tried)
	return running, nil
}

// awaitKeys gives the first keys a moment, so that the first calls are verified.
// Without them the guard serves all the same, each call as its mode says.
func awaitKeys(v *entra.Verifier, tried <-chan struct{}) {
	patience := time.After(3 * time.Second)
	unusable := func(k entra.KeyStatus) bool { return !k.Usable }
	for range v.Status() { // each of them tells at least once
		if !slices.ContainsFunc(v.Status(), unusable) {
			return
		}
		select {
		case <-tried:
		case <-patience:
			return
		}
	}
}

// rootsWith are the system's certificate authorities and those in file; nil stands for
// the system's alone.
func rootsWith(file string) (*x509.CertPool, error) {
	if file == "" {
		return nil, nil
	}
	pem, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	roots, err := x509.SystemCertPool()
	if err != nil {
		roots = x509.NewCertPool()
	}
	if !roots.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s holds no PEM certificate", file)
	}
	return roots, nil
}

// hashFiles tells later whether the files still hold the same.
func hashFiles(names []string) (map[string][sha256.Size]byte, error) {
	hashes := map[string][sha256.Size]byte{}
	for _, name := range names {
		data, err := os.ReadFile(name)
		if err != nil {
			return nil, err
		}
		hashes[name] = sha256.Sum256(data)
	}
	return hashes, nil
}

// openACME makes the client of the certificate authority.
func (d *daemon) openACME(all *config.Config) (*listen.ACME, error) {
	cfg := all.ACME
	ac := listen.ACMEConfig{
		Dir: d.dir + "/acme", Directory: cfg.Directory, Email: cfg.Email,
		HTTP01: slices.Contains(cfg.Challenges, config.HTTP01), HTTPPort: cfg.HTTPPort,
		TLSALPN01: slices.Contains(cfg.Challenges, config.TLSALPN01), TLSALPNPort: cfg.TLSALPNPort,
		Event: func(e listen.ACMEEvent) {
			d.event("certificate", e.Err != nil, string(e.Outcome), e.Err, "name", e.Name, "not_after", e.NotAfter, "next", e.Next)
		},
	}
	if cfg.Root != "" {
		pem, err := os.ReadFile(cfg.Root)
		if err != nil {
			return nil, fmt.Errorf("read acme.root: %w", err)
		}
		ac.RootCAs = x509.NewCertPool()
		if !ac.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("read acme.root: %s holds no PEM certificate", cfg.Root)
		}
	}
	if cfg.EAB != nil {
		key, err := cfg.EAB.MACKey.Read(d.env)
		if err != nil {
			return nil, fmt.Errorf("read acme.eab.mac_key: %w", err)
		}
		ac.EABKeyID, ac.EABMACKey = cfg.EAB.KeyID, key
	}
	if cfg.Storage == config.StoragePostgres {
		storage, err := certificateStorage(all, d.instance, d.env)
		if err != nil {
			return nil, err
		}
		d.fleet, ac.Fleet = storage, storage
	}
	acme, err := listen.NewACME(ac)
	if err != nil {
		return nil, fmt.Errorf("set up ACME: %w", err)
	}
	return acme, nil
}

// certificateStorage is the storage of the fleet's certificates, not yet connected.
func certificateStorage(cfg *config.Config, instance string, env func(string) string) (*listen.PostgresStorage, error) {
	current := func() (string, error) { return cfg.Store.Postgres.Read(env) }
	url, err := current()
	if err != nil {
		return nil, fmt.Errorf("store.postgres: %w", err)
	}
	key, err := cfg.ACME.StorageKey.Read(env)
	if err != nil {
		return nil, fmt.Errorf("acme.storage_key: %w", err)
	}
	s, err := listen.OpenPostgres(listen.PostgresConfig{URL: url, CurrentURL: current, Key: key, Instance: instance})
	if err != nil {
		return nil, fmt.Errorf("acme.storage: %w", err)
	}
	return s, nil
}

// minFree turns the file's 0, which checks nothing, into the ledger's word for it.
func minFree(size config.Size) int64 {
	if size == 0 {
		return -1
	}
	return int64(size)
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

var errNeedsRestart = errors.New("the configuration needs a restart")
