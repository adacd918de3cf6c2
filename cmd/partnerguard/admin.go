package main

import (
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/partnerguard/partnerguard/internal/config"
	"github.com/partnerguard/partnerguard/policy"
	"github.com/partnerguard/partnerguard/proxy/listen"
	"golang.org/x/net/netutil"
	"golang.org/x/time/rate"
)

// admin is the admin listener: health and metrics, read only. Nothing of it answers
// on a listener that proxies.
//
// On loopback it may be open to whoever can connect; then it answers only to names
// that are this machine's, so that a web page cannot read it by pointing its own
// name here (DNS rebinding). Else every page asks for the token or for a client
// certificate, but for /livez and /readyz without its details: probes have neither.
// Requests that a page of another origin makes are refused in any case.
//
// Its pages are called by their exact paths: http.ServeMux would redirect others
// before anybody asked for a credential.
type admin struct {
	pages    map[string]http.Handler // by path
	settings atomic.Pointer[adminSettings]
	http     *http.Server
	log      *slog.Logger
	refused  func()
	wrong    *failureLimit
	warn     rate.Sometimes // at most one line a second, however many fail
	failures atomic.Int64   // all so far
}

// adminConfig is what newAdmin needs. All is required but Refused.
type adminConfig struct {
	Settings *adminSettings
	Pages    map[string]http.Handler
	Log      *slog.Logger
	Refused  func() // is told of every wrong credential
}

// adminSettings is what a reload can change. It is never modified.
type adminSettings struct {
	token   [sha256.Size]byte // the token's hash, if there is one
	byToken bool
	clients *x509.CertPool // nil: no client certificate serves
	hosts   map[string]bool
	tls     *tls.Config // nil: clear text
	leaf    *x509.Certificate
}

// loadAdmin reads what cfg names: the token, certificates.
func loadAdmin(cfg config.Admin, env func(string) string) (*adminSettings, error) {
	s := &adminSettings{hosts: map[string]bool{"localhost": true}}
	for _, host := range cfg.Hosts {
		s.hosts[bareHost(host)] = true
	}
	s.hosts[bareHost(cfg.Address)] = true
	delete(s.hosts, "") // of :9090

	token, err := cfg.Token.Read(env)
	if err != nil {
		return nil, fmt.Errorf("admin.token: %w", err)
	}
	s.token, s.byToken = sha256.Sum256([]byte(token)), token != ""
	if cfg.TLS == nil {
		return s, nil
	}
	certificate, err := tls.LoadX509KeyPair(cfg.TLS.Certificate, cfg.TLS.Key)
	if err != nil {
		return nil, fmt.Errorf("admin.tls: %w", err)
	}
	s.leaf = certificate.Leaf
	s.tls = &tls.Config{
		Certificates: []tls.Certificate{certificate}, MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"},
		SessionTicketsDisabled: true, // a session must not outlive the CA that let it in
	}
	if cfg.ClientCA != "" {
		pem, err := os.ReadFile(cfg.ClientCA)
		if err != nil {
			return nil, fmt.Errorf("admin.client_ca: %w", err)
		}
		s.clients = x509.NewCertPool()
		if !s.clients.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("admin.client_ca: %s holds no PEM certificate", cfg.ClientCA)
		}
		s.tls.ClientCAs, s.tls.ClientAuth = s.clients, tls.VerifyClientCertIfGiven
	}
	return s, nil
}

// open reports whether pages ask for no credential.
func (s *adminSettings) open() bool { return !s.byToken && s.clients == nil }

func newAdmin(cfg adminConfig) *admin {
	a := &admin{
		pages: cfg.Pages, log: cfg.Log, refused: cfg.Refused,
		wrong: newFailureLimit(time.Now), warn: rate.Sometimes{Interval: time.Second},
	}
	a.set(cfg.Settings)
	a.http = &http.Server{
		Handler:                      a,
		DisableGeneralOptionsHandler: true,
		ReadHeaderTimeout:            5 * time.Second,
		ReadTimeout:                  10 * time.Second,
		WriteTimeout:                 60 * time.Second,
		IdleTimeout:                  60 * time.Second,
		MaxHeaderBytes:               16 << 10,
		ErrorLog:                     slog.NewLogLogger(cfg.Log.Handler(), slog.LevelWarn),
	}
	return a
}

// set makes s hold from the next request on. It cannot turn clear text into TLS or
// back.
func (a *admin) set(s *adminSettings) { a.settings.Store(s) }

// maxAdminConnections is how many connections are served at a time; more wait to be
// accepted.
const maxAdminConnections = 256

// serve answers on l until close, and returns why it ended: http.ErrServerClosed
// after close. What else ends it is logged.
func (a *admin) serve(l net.Listener) error {
	l = netutil.LimitListener(l, maxAdminConnections)
	if a.settings.Load().tls != nil {
		l = tls.NewListener(l, &tls.Config{
			MinVersion:         tls.VersionTLS12,
			GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return a.settings.Load().tls, nil },
		})
	}
	err := a.http.Serve(l)
	if !errors.Is(err, http.ErrServerClosed) {
		a.log.Error("admin listener ended", "error", err.Error())
	}
	return err
}

// close ends serve and cuts what is being answered.
func (a *admin) close() error { return a.http.Close() }

// adminHeaders are on every answer. The policy allows what pages of this listener
// itself serve, and nothing in line.
var adminHeaders = map[string]string{
	"Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; font-src 'self'; connect-src 'self'; " +
		"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
	"X-Content-Type-Options":       "nosniff",
	"X-Frame-Options":              "DENY",
	"Referrer-Policy":              "no-referrer",
	"Cache-Control":                "no-store",
	"Cross-Origin-Opener-Policy":   "same-origin",
	"Cross-Origin-Resource-Policy": "same-origin",
}

func (a *admin) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	for name, value := range adminHeaders {
		w.Header().Set(name, value)
	}
	if d := a.admit(r); d.status != 0 {
		for name, value := range d.header {
			w.Header().Set(name, value)
		}
		http.Error(w, d.why, d.status)
		return
	}
	page, ok := a.pages[r.URL.Path]
	if !ok {
		http.Error(w, "There is no such page.", http.StatusNotFound)
		return
	}
	page.ServeHTTP(w, r)
}

// denial is a refused request's answer. The zero denial refuses nothing.
type denial struct {
	status int
	why    string
	header map[string]string
}

// admit says whether a request may see its page.
func (a *admin) admit(r *http.Request) denial {
	s := a.settings.Load()
	switch {
	case r.Method != http.MethodGet && r.Method != http.MethodHead:
		return denial{http.StatusMethodNotAllowed, "Only GET and HEAD are answered here.", map[string]string{"Allow": "GET, HEAD"}}
	case foreign(r):
		return denial{status: http.StatusForbidden, why: "Pages of another origin may not ask here. Open this page by its own address."}
	case s.open():
		// The configuration allows this on loopback only; should it be elsewhere all
		// the same, nobody gets in.
		if !localLoopback(r) {
			return denial{status: http.StatusForbidden, why: "This listener is open on loopback only; it needs admin.token or admin.client_ca."}
		}
		return s.misdirected(r, false)
	case probe(r):
		return denial{}
	case s.certified(r):
		return s.misdirected(r, true)
	}
	return a.authorize(s, r)
}

// foreign reports whether a browser sent r for a page of another origin.
func foreign(r *http.Request) bool {
	scheme := "http://"
	if r.TLS != nil {
		scheme = "https://"
	}
	other := func(origin string) bool { return !strings.EqualFold(origin, scheme+r.Host) }
	elsewhere := func(site string) bool { return site != "same-origin" && site != "none" }
	return slices.ContainsFunc(r.Header.Values("Origin"), other) ||
		slices.ContainsFunc(r.Header.Values("Sec-Fetch-Site"), elsewhere)
}

// localLoopback reports whether r came over loopback.
func localLoopback(r *http.Request) bool {
	local, ok := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr)
	return ok && local.IP.IsLoopback()
}

// misdirected refuses a request whose Host is not a name of this listener. A bare
// address cannot be pointed elsewhere; with a client certificate any serves.
func (s *adminSettings) misdirected(r *http.Request, certified bool) denial {
	host := bareHost(r.Host)
	ip, err := netip.ParseAddr(host)
	switch {
	case s.hosts[host], err == nil && ip.Unmap().IsLoopback():
		return denial{}
	case certified && (err == nil || s.leaf != nil && s.leaf.VerifyHostname(host) == nil):
		return denial{}
	}
	return denial{status: http.StatusMisdirectedRequest,
		why: fmt.Sprintf("This listener does not answer to the name %.253q. If it is right, add it to admin.hosts.", host)}
}

// bareHost is host, of a Host header or an address, without port and brackets and
// in lower case.
func bareHost(host string) string {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	return strings.ToLower(strings.TrimSuffix(strings.TrimPrefix(host, "["), "]"))
}

// probe reports whether r asks what anyone may know: whether the guard is up.
func probe(r *http.Request) bool {
	return r.URL.Path == "/livez" || r.URL.Path == "/readyz" && !verbose(r)
}

// certified reports whether the connection has a client certificate of the CA that
// counts now, which may be another one than at the handshake.
func (s *adminSettings) certified(r *http.Request) bool {
	if s.clients == nil || r.TLS == nil || len(r.TLS.PeerCertificates) == 0 {
		return false
	}
	chain := r.TLS.PeerCertificates
	between := x509.NewCertPool()
	for _, c := range chain[1:] {
		between.AddCert(c)
	}
	_, err := chain[0].Verify(x509.VerifyOptions{Roots: s.clients, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
	return err == nil
}

// authorize looks at the bearer token. Whoever got it wrong too often is refused
// without a look, so that guessing is slow.
func (a *admin) authorize(s *adminSettings, r *http.Request) denial {
	if !s.byToken {
		return denial{status: http.StatusForbidden, why: "This page needs a client certificate of admin.client_ca."}
	}
	none := denial{http.StatusUnauthorized, "This page needs the token of admin.token: Authorization: Bearer <token>.",
		map[string]string{"WWW-Authenticate": "Bearer"}}
	given := r.Header.Values("Authorization")
	if len(given) == 0 {
		return none
	}
	peer := peerOf(r)
	if a.wrong.spent(peer) {
		a.failed(r)
		return denial{http.StatusTooManyRequests, "Too many wrong credentials came from this address. Try again in a second.", map[string]string{"Retry-After": "1"}}
	}
	scheme, token, _ := strings.Cut(given[0], " ")
	hash := sha256.Sum256([]byte(strings.TrimLeft(token, " ")))
	right := subtle.ConstantTimeCompare(hash[:], s.token[:]) == 1
	if right && len(given) == 1 && strings.EqualFold(scheme, "Bearer") {
		return denial{}
	}
	a.wrong.add(peer)
	a.failed(r)
	none.why = "The credential is wrong. This page needs the token of admin.token: Authorization: Bearer <token>."
	none.header = map[string]string{"WWW-Authenticate": `Bearer error="invalid_token"`}
	return none
}

// failed counts a wrong credential and says who sent it, never what it was.
func (a *admin) failed(r *http.Request) {
	n := a.failures.Add(1)
	if a.refused != nil {
		a.refused()
	}
	a.warn.Do(func() { a.log.Warn("admin credential refused", "peer", r.RemoteAddr, "so_far", n) })
}

// peerOf is the address r came from; of an IPv6 one the network, since a host has
// as many addresses there as it likes.
func peerOf(r *http.Request) netip.Prefix {
	at, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return netip.Prefix{}
	}
	ip, bits := at.Addr().Unmap(), 32
	if ip.Is6() {
		bits = 64
	}
	network, _ := ip.Prefix(bits)
	return network
}

// failureLimit says which peers got their credential wrong too often: maxFailures a
// second, and as many at once. Peers share a fixed number of places, by a hash they
// cannot know, so that its size is bounded however many there are.
type failureLimit struct {
	now    func() time.Time
	seed   maphash.Seed
	places [1024]*rate.Limiter
}

const maxFailures = 10

func newFailureLimit(now func() time.Time) *failureLimit {
	f := &failureLimit{now: now, seed: maphash.MakeSeed()}
	for i := range f.places {
		f.places[i] = rate.NewLimiter(maxFailures, maxFailures)
	}
	return f
}

func (f *failureLimit) place(peer netip.Prefix) *rate.Limiter {
	return f.places[maphash.Comparable(f.seed, peer)%uint64(len(f.places))]
}

func (f *failureLimit) spent(peer netip.Prefix) bool { return f.place(peer).TokensAt(f.now()) < 1 }

func (f *failureLimit) add(peer netip.Prefix) { f.place(peer).AllowN(f.now(), 1) }

// adminPages are the pages of the admin listener.
func (d *daemon) adminPages() map[string]http.Handler {
	text := func(s string) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "text/plain; charset=utf-8")
			io.WriteString(w, s)
		})
	}
	return map[string]http.Handler{
		"/":        text("partnerguard " + version() + "\n\n/readyz?verbose  what works and what does not\n/livez\n/metrics\n"),
		"/livez":   text("ok\n"),
		"/readyz":  http.HandlerFunc(d.readyz),
		"/metrics": d.tel.MetricsHandler(),
	}
}

// readyz answers 503 only while starting or draining, or when every call would be
// refused. A degraded guard must not be taken out of a path that works.
func (d *daemon) readyz(w http.ResponseWriter, r *http.Request) {
	parts := d.health()
	why := ""
	d.readyAsked.Store(time.Now().Unix())
	g := d.live.Load()
	switch phase := d.phase.Load(); {
	case phase == starting:
		why = "starting"
	case phase == draining:
		why = "draining"
	case !d.ledger.Status().Healthy && g.cfg.Ledger.OnFailure == config.RejectOnFailure:
		why = "every call is refused: the ledger cannot write and ledger.on_failure is reject"
	case g.policy.Mode() == policy.Enforce && !g.verifier.Ready():
		why = "every call is refused: the mode is enforce and there are no keys of Entra"
	}
	status := http.StatusOK
	if why != "" {
		status = http.StatusServiceUnavailable
	} else {
		why = "ready"
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.WriteHeader(status)
	fmt.Fprintln(w, why)
	if !verbose(r) {
		return
	}
	for _, part := range slices.Sorted(maps.Keys(parts)) {
		state := "ok"
		if parts[part] != "" {
			state = "degraded: " + parts[part]
		}
		fmt.Fprintf(w, "%-12s %s\n", part, state)
	}
	for _, u := range g.upstreams {
		fmt.Fprintf(w, "%-12s %s, breaker %s\n", "upstream", u.Name(), u.BreakerState())
	}
	fmt.Fprintf(w, "%-12s %s\n", "store lag", d.store.Lag().Round(time.Millisecond))
}

// verbose reports whether r asks for the details of /readyz.
func verbose(r *http.Request) bool { return r.URL.Query().Has("verbose") }

// health looks at every part, sets its gauge, and says what is wrong with it;
// nothing is wrong with a part whose text is empty.
func (d *daemon) health() map[string]string {
	g := d.live.Load()
	parts := map[string]string{"ledger": "", "store": "", "keys": "", "config": "", "tokens": *d.tokens.Load(), "certificates": "", "reconcile": d.schedule.problem(time.Now())}
	if err := d.reloadErr.Load(); err != nil && *err != nil {
		parts["config"] = "the file on disk is not in use: " + strings.ReplaceAll((*err).Error(), "\n", "; ")
	}
	switch s := d.ledger.Status(); {
	case !s.Healthy:
		parts["ledger"] = fmt.Sprintf("it cannot write: %v", s.Err)
	case len(s.SetAside) > 0:
		parts["ledger"] = "damaged segments were set aside: " + strings.Join(s.SetAside, ", ")
	case s.Degraded:
		parts["ledger"] = fmt.Sprintf("the last sync failed: %v", s.SyncErr)
	}
	if s := d.store.Status(); s.Err != nil {
		parts["store"] = strings.NewReplacer(":\n\t", ": ", "\n\t", "; ").Replace(s.Err.Error()) // one line, also of several hosts
	}
	now := time.Now()
	for _, k := range g.verifier.Status() {
		if k.LastError != nil || !k.Usable {
			parts["keys"] = fmt.Sprintf("tenant %s, version %s: %d keys, last fetch: %v", k.Tenant, k.Version, k.Keys, k.LastError)
		}
		if !k.FetchedAt.IsZero() {
			d.tel.KeyAge(k.Tenant, k.Version, now.Sub(k.FetchedAt).Seconds())
		}
	}
	for name, t := range g.tls {
		for _, c := range t.Certificates() {
			left := c.NotAfter.Sub(now)
			d.tel.CertificateDaysLeft(name, strings.Join(c.Names, ","), left.Hours()/24)
			if left < 24*time.Hour { // ACME and people renew long before
				parts["certificates"] = fmt.Sprintf("that of listener %s for %s expires %s", name, strings.Join(c.Names, ", "), c.NotAfter.UTC().Format(time.RFC3339))
			}
		}
		for _, crl := range t.CRLs() {
			if now.After(crl.NextUpdate) {
				parts["certificates"] = fmt.Sprintf("the revocation list of %s for listener %s ended %s: no client certificate of that CA is accepted", crl.Issuer, name, crl.NextUpdate.UTC().Format(time.RFC3339))
			}
		}
	}
	for _, l := range g.cfg.Listeners {
		if l.TLS == nil {
			continue
		}
		for _, name := range l.TLS.ACME {
			if !slices.ContainsFunc(g.tls[l.Label()].Certificates(), func(c listen.CertificateStatus) bool {
				return slices.ContainsFunc(c.Names, func(n string) bool { return strings.EqualFold(n, name) })
			}) {
				parts["certificates"] = fmt.Sprintf("listener %s has none for %s yet and can serve nobody under that name", l.Label(), name)
			}
		}
	}
	d.tel.StoreLag(d.store.Lag().Seconds())
	for part, wrong := range parts {
		d.tel.Degraded(part, wrong != "")
	}
	return parts
}
