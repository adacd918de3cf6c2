package proxy

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/netip"
	"net/textproto"
	"net/url"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/sony/gobreaker/v2"
)

// Upstream is one API of Microsoft's that calls go to. It is safe for concurrent
// use; make it with NewUpstream.
type Upstream struct {
	name         string
	title        string
	url          *url.URL
	audiences    []string
	validatesMFA bool
	rewriteLinks bool
	transport    *http.Transport
	bodiless     roundTripper // for requests without a body; with HTTP/2 only for those that it would repeat
	http2        bool
	answerTime   time.Duration // how long it may take no byte of a request and give no answer
	silence      time.Duration // how long it may say nothing in the middle of an answer
	breaker      *gobreaker.TwoStepCircuitBreaker[any]
}

// UpstreamConfig is what NewUpstream needs. Name, URL and Audiences are required.
type UpstreamConfig struct {
	Name string
	// URL is scheme and host. http is for loopback only.
	URL string
	// Audiences are the aud values that tokens for it may have.
	Audiences []string
	// ValidatesMFA says that it knows the request header ValidateMfa.
	ValidatesMFA bool
	// RewriteLinks brings absolute links to URL's host in answers back through the
	// guard, where Microsoft is known to send some (see links.go).
	RewriteLinks bool
	// Dial is where to connect instead of URL's host: host:port. The name in URL
	// still goes into Host, SNI and certificate check, so that a hosts file may
	// point Microsoft's name at this guard. Empty connects to URL's host.
	Dial string
	// RootCAs replaces the system's certificate authorities; nil keeps them.
	RootCAs *x509.CertPool
	// HTTP2 offers HTTP/2. It hides the reason phrase, which one known shape of
	// MFA refusal needs, and costs more CPU. Requests that change something and
	// have no body go by HTTP/1.1 all the same: net/http's HTTP/2 repeats them.
	HTTP2 bool
	// Timeouts; zero means none but for ResponseHeader and Idle.
	DialTimeout    time.Duration
	TLSTimeout     time.Duration
	ResponseHeader time.Duration // zero is 200 s: SDK clients wait for 180 s; also for each part of a body
	Idle           time.Duration // zero is 90 s
	// OwnAddresses are the guard's own listeners, which it refuses to dial: a
	// hosts file could otherwise make it call itself.
	OwnAddresses func() []netip.AddrPort
	// OnBreaker is told of every change of the breaker's state: closed, half-open,
	// open. It must not block. Nil is allowed.
	OnBreaker func(upstream, state string)
}

// ErrOwnListener is the cause when an upstream's address is one of the guard's own.
var ErrOwnListener = errors.New("the upstream's address is the guard's own listener")

// NewUpstream checks cfg and returns an Upstream.
func NewUpstream(cfg UpstreamConfig) (*Upstream, error) {
	u, err := url.Parse(cfg.URL)
	switch {
	case err != nil:
		return nil, fmt.Errorf("upstream %s: %w", cfg.Name, err)
	case cfg.Name == "":
		return nil, errors.New("proxy: UpstreamConfig.Name is required")
	case u.Scheme != "https" && u.Scheme != "http" || u.Host == "":
		return nil, fmt.Errorf("upstream %s: %q is not an http or https URL", cfg.Name, cfg.URL)
	case len(cfg.Audiences) == 0:
		return nil, fmt.Errorf("upstream %s: audiences are required", cfg.Name)
	}
	if cfg.ResponseHeader == 0 {
		cfg.ResponseHeader = 200 * time.Second
	}
	if cfg.Idle == 0 {
		cfg.Idle = 90 * time.Second
	}
	return &Upstream{
		name: cfg.Name, title: title(cfg.Name), url: u, rewriteLinks: cfg.RewriteLinks, audiences: slices.Clone(cfg.Audiences), validatesMFA: cfg.ValidatesMFA,
		transport: cfg.transport(cfg.HTTP2), bodiless: cfg.bodiless(u), http2: cfg.HTTP2, answerTime: cfg.DialTimeout + cfg.TLSTimeout + cfg.ResponseHeader, silence: cfg.ResponseHeader, breaker: newBreaker(cfg.Name, cfg.OnBreaker),
	}, nil
}

// roundTripper is what both http.Transport and synchronous are.
type roundTripper interface {
	http.RoundTripper
	CloseIdleConnections()
}

// bodiless returns what carries requests without a body to u.
func (cfg *UpstreamConfig) bodiless(u *url.URL) roundTripper {
	proxy, err := http.ProxyFromEnvironment(&http.Request{URL: u})
	if !canBeQuiet || cfg.Dial == "" && (proxy != nil || err != nil) {
		return cfg.transport(false) // which knows how to ask a proxy
	}
	port := u.Port()
	s := &synchronous{dial: cfg.dial, tlsTime: cfg.TLSTimeout, silence: cfg.ResponseHeader, idle: cfg.Idle}
	if u.Scheme == "https" {
		port = cmp.Or(port, "443")
		s.tls = cfg.tls()
		s.tls.ServerName = u.Hostname()
	}
	s.address = net.JoinHostPort(u.Hostname(), cmp.Or(port, "80"))
	return s
}

// dial connects to the upstream.
func (cfg *UpstreamConfig) dial(ctx context.Context, network, address string) (net.Conn, error) {
	dialer := net.Dialer{
		Timeout:   cfg.DialTimeout,
		KeepAlive: 30 * time.Second,
		ControlContext: func(_ context.Context, _, address string, _ syscall.RawConn) error {
			return refuseOwn(address, cfg.OwnAddresses)
		},
	}
	return dialer.DialContext(ctx, network, cmp.Or(cfg.Dial, address))
}

func (cfg *UpstreamConfig) tls() *tls.Config {
	return &tls.Config{RootCAs: cfg.RootCAs, MinVersion: tls.VersionTLS12}
}

// transport makes a transport of its own.
func (cfg *UpstreamConfig) transport(http2 bool) *http.Transport {
	t := &http.Transport{
		Proxy: http.ProxyFromEnvironment,
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			c, err := cfg.dial(ctx, network, address)
			if err != nil {
				return nil, err
			}
			return &upstreamConn{Conn: c}, nil
		},
		TLSClientConfig:       cfg.tls(),
		TLSHandshakeTimeout:   cfg.TLSTimeout,
		ResponseHeaderTimeout: cfg.ResponseHeader,
		IdleConnTimeout:       cfg.Idle,
		ExpectContinueTimeout: time.Second,
		MaxIdleConnsPerHost:   512, // the default of 2 halves the throughput
		// Bodies and Accept-Encoding pass as they are: with deflate a price sheet
		// is a ZIP file.
		DisableCompression:     true,
		ForceAttemptHTTP2:      http2,
		MaxResponseHeaderBytes: maxHeader,
	}
	if cfg.Dial != "" {
		t.Proxy = nil // a stated address is meant to be dialled
	}
	if http2 {
		// A connection that died without a word would take call after call with it.
		t.HTTP2 = &http.HTTP2Config{SendPingTimeout: 30 * time.Second, PingTimeout: 15 * time.Second}
	} else {
		t.TLSNextProto = map[string]func(string, *tls.Conn) http.RoundTripper{}
	}
	return t
}

// title is what people call the upstream.
func title(name string) string {
	switch name {
	case "partner-center":
		return "Partner Center"
	case "partner-api":
		return "The Partner API"
	case "graph":
		return "Microsoft Graph"
	}
	return "The upstream " + name
}

// Name returns the upstream's name.
func (u *Upstream) Name() string { return u.name }

// RoundTrip sends one request (http.RoundTripper) and bounds what comes back: how
// long it may say nothing, how much of it may come before the answer proper, and what
// it may say in the guard's name.
func (u *Upstream) RoundTrip(r *http.Request) (*http.Response, error) {
	transport := roundTripper(u.transport)
	if r.Body == nil && (!u.http2 || !isSafe(r.Method)) {
		transport = u.bodiless
	}
	if trace := httptrace.ContextClientTrace(r.Context()); trace != nil {
		watch(r.Context(), trace)
	}
	var sent *sentBody
	if r.Body != nil {
		var ctx context.Context
		sent, ctx = newSentBody(r, u.answerTime)
		r = r.WithContext(ctx)
		r.Body = sent
	}
	res, err := transport.RoundTrip(r)
	if err = sent.answer(err); err != nil {
		return nil, err
	}
	if res.StatusCode < 200 || res.StatusCode > 999 {
		// Nobody asked for another protocol, and none may go round the guard.
		res.Body.Close()
		return nil, fmt.Errorf("%w: %d", errStatus, res.StatusCode)
	}
	stripOurs(res.Trailer)
	bodiless := res.StatusCode == http.StatusNoContent || res.StatusCode == http.StatusNotModified
	if bodiless || res.ContentLength < 0 {
		// To a client of HTTP/2 it would be a promise; what net/http's HTTP/2 cannot
		// read it leaves in.
		delete(res.Header, "Content-Length")
	}
	if bodiless {
		res.Body.Close()
		res.Body = http.NoBody
		return res, nil
	}
	body := &answerBody{ReadCloser: res.Body, res: res}
	if _, ok := transport.(*synchronous); !ok { // which bounds the silence itself
		body.silence = newStall(u.silence, func(time.Time) error { return body.ReadCloser.Close() })
	}
	res.Body = body
	return res, nil
}

// watch adds to the trace of one call, which ReverseProxy made for it, what bounds the
// upstream before its answer.
func watch(ctx context.Context, trace *httptrace.ClientTrace) {
	gotConn := trace.GotConn
	trace.GotConn = func(info httptrace.GotConnInfo) {
		if info.Reused {
			settle(ctx, info.Conn)
		}
		if gotConn != nil {
			gotConn(info)
		}
	}
	got1xx := trace.Got1xxResponse
	if got1xx == nil {
		return // then net/http passes none on and bounds them itself
	}
	hints := 0
	trace.Got1xxResponse = func(status int, header textproto.MIMEHeader) error {
		if status == http.StatusSwitchingProtocols {
			return fmt.Errorf("%w: %d", errStatus, status)
		}
		if hints++; hints > maxHints {
			return errHints
		}
		stripOurs(http.Header(header))
		delete(header, "Ismfacompliant")
		return got1xx(status, header)
	}
}

// maxHints is how many 1xx may come before an answer. 102 comes every 20 s at most.
const maxHints = 64

var (
	errHints  = errors.New("the upstream sends 1xx without end")
	errStatus = errors.New("the upstream answered with a status that is none")
	errSilent = fmt.Errorf("the upstream fell silent: %w", os.ErrDeadlineExceeded)
)

// isSafe reports whether repeating a request changes nothing (RFC 9110 section
// 9.2.1).
func isSafe(method string) bool {
	return method == http.MethodGet || method == http.MethodHead || method == http.MethodOptions
}

// sentBody is the body of a request on its way to the upstream. net/http bounds the
// wait for an answer only once all of the request is sent: an upstream that takes no
// more of it is bounded here.
type sentBody struct {
	io.ReadCloser
	cause func() error // why the request was ended; nil if it was not

	mu       sync.Mutex
	silence  *stall // runs while the upstream, not the client, is waited for
	answered bool
}

// newSentBody returns r's body, and the context that ends r when time is up.
func newSentBody(r *http.Request, limit time.Duration) (*sentBody, context.Context) {
	ctx, cancel := context.WithCancelCause(r.Context())
	b := &sentBody{ReadCloser: r.Body, cause: func() error { return context.Cause(ctx) }}
	b.silence = newStall(limit, func(time.Time) error {
		cancel(errSilent)
		return nil
	})
	b.silence.begin()
	return b, ctx
}

func (b *sentBody) Read(p []byte) (int, error) {
	b.waiting(false)
	n, err := b.ReadCloser.Read(p)
	b.waiting(true)
	return n, err
}

func (b *sentBody) waiting(upstream bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case b.answered:
	case upstream:
		b.silence.begin()
	default:
		b.silence.end()
	}
}

// answer ends the watch: what is still sent no longer counts. It returns err, or what
// the watch did where that is behind it. A nil sentBody returns err.
func (b *sentBody) answer(err error) error {
	if b == nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.answered = true
	b.silence.end()
	if err != nil && b.cause() == errSilent {
		return errSilent
	}
	return err
}

// answerBody is the body of an upstream's answer.
type answerBody struct {
	io.ReadCloser
	res     *http.Response
	silence *stall
}

func (b *answerBody) Read(p []byte) (int, error) {
	b.silence.begin()
	n, err := b.ReadCloser.Read(p)
	b.silence.end()
	if err != nil {
		stripOurs(b.res.Trailer) // which is complete now
	}
	return n, err
}

// BreakerState returns closed, half-open or open.
func (u *Upstream) BreakerState() string { return u.breaker.State().String() }

// Close closes idle connections.
func (u *Upstream) Close() {
	u.transport.CloseIdleConnections()
	u.bodiless.CloseIdleConnections()
}

// refuseOwn fails for an address that one of our own listeners serves.
func refuseOwn(address string, own func() []netip.AddrPort) error {
	if own == nil {
		return nil
	}
	to, err := netip.ParseAddrPort(address)
	if err != nil {
		return nil
	}
	for _, l := range own() {
		if l.Port() == to.Port() && (l.Addr().Unmap() == to.Addr().Unmap() || l.Addr().IsUnspecified() && isLocal(to.Addr())) {
			return fmt.Errorf("dial %s: %w", address, ErrOwnListener)
		}
	}
	return nil
}

func isLocal(a netip.Addr) bool {
	if a.IsLoopback() || a.IsUnspecified() {
		return true
	}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return false
	}
	return slices.ContainsFunc(addrs, func(x net.Addr) bool {
		p, err := netip.ParsePrefix(x.String())
		return err == nil && p.Addr().Unmap() == a.Unmap()
	})
}

// newBreaker opens at 20 calls and half of them failed within 10 s, for 5 s. The
// library's default (6 failures in a row, for 60 s) would let one script's errors
// stop all billing.
func newBreaker(name string, onChange func(upstream, state string)) *gobreaker.TwoStepCircuitBreaker[any] {
	return gobreaker.NewTwoStepCircuitBreaker[any](gobreaker.Settings{
		Name:         name,
		Interval:     10 * time.Second,
		BucketPeriod: time.Second,
		Timeout:      5 * time.Second,
		ReadyToTrip: func(c gobreaker.Counts) bool {
			seen := c.TotalSuccesses + c.TotalFailures
			return seen >= 20 && c.TotalFailures*2 >= seen
		},
		IsExcluded: func(err error) bool { return errors.Is(err, errNeutral) },
		OnStateChange: func(name string, _, to gobreaker.State) {
			if onChange != nil {
				onChange(name, to.String())
			}
		},
	})
}

// errNeutral is the verdict on calls that say nothing of the upstream's health.
var errNeutral = errors.New("neither success nor failure")

// errUpstreamStatus is the verdict on 502, 503 and 504.
var errUpstreamStatus = errors.New("the upstream answered 502, 503 or 504")

// breakerVerdict is what an answer says of the upstream's health. 401, 403, 429
// and 500 are answers like any other.
func breakerVerdict(status int) error {
	switch status {
	case http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return errUpstreamStatus
	}
	return nil
}

// upstreamConn is a connection to an upstream that knows whether somebody reads it.
type upstreamConn struct {
	net.Conn

	mu      sync.Mutex
	reading bool
	closed  bool
	settled chan struct{} // closed at the next read, or when closed; nil if nobody waits
}

func (c *upstreamConn) Read(p []byte) (int, error) {
	c.set(true, false)
	n, err := c.Conn.Read(p)
	c.set(false, false)
	return n, err
}

func (c *upstreamConn) Close() error {
	c.set(false, true)
	return c.Conn.Close()
}

func (c *upstreamConn) set(reading, closed bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.reading, c.closed = reading, c.closed || closed
	if c.settled != nil && (c.reading || c.closed) {
		close(c.settled)
		c.settled = nil
	}
}

// settle waits until a connection that is used again is known to hold nothing more of
// the answer before. net/http closes one that does, but only once it looks: a call that
// is quicker would get what is left for its own answer. It has looked when it reads
// from the socket again.
func settle(ctx context.Context, conn net.Conn) {
	if t, ok := conn.(*tls.Conn); ok {
		conn = t.NetConn()
	}
	c, ok := conn.(*upstreamConn)
	if !ok {
		return
	}
	c.mu.Lock()
	if c.reading || c.closed {
		c.mu.Unlock()
		return
	}
	if c.settled == nil {
		c.settled = make(chan struct{})
	}
	settled := c.settled
	c.mu.Unlock()
	select {
	case <-settled:
	case <-ctx.Done():
	}
}
