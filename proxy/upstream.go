package proxy

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"syscall"
	"time"

	"github.com/sony/gobreaker/v2"
)

// Upstream is one API of Microsoft's that calls go to. It is safe for concurrent
// use; make it with NewUpstream.
type Upstream struct {
	name         string
	url          *url.URL
	audiences    []string
	validatesMFA bool
	transport    *http.Transport
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
	// Dial is where to connect instead of URL's host: host:port. The name in URL
	// still goes into Host, SNI and certificate check, so that a hosts file may
	// point Microsoft's name at this guard. Empty connects to URL's host.
	Dial string
	// RootCAs replaces the system's certificate authorities; nil keeps them.
	RootCAs *x509.CertPool
	// HTTP2 offers HTTP/2. It hides the reason phrase, which one known shape of
	// MFA refusal needs, and costs more CPU.
	HTTP2 bool
	// Timeouts; zero means none but for ResponseHeader and Idle.
	DialTimeout    time.Duration
	TLSTimeout     time.Duration
	ResponseHeader time.Duration // zero is 200 s: SDK clients wait for 180 s
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
	dialer := &net.Dialer{
		Timeout:   cfg.DialTimeout,
		KeepAlive: 30 * time.Second,
		ControlContext: func(_ context.Context, _, address string, _ syscall.RawConn) error {
			return refuseOwn(address, cfg.OwnAddresses)
		},
	}
	t := &http.Transport{
		Proxy: http.ProxyFromEnvironment,
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			if cfg.Dial != "" {
				address = cfg.Dial
			}
			return dialer.DialContext(ctx, network, address)
		},
		TLSClientConfig:       &tls.Config{RootCAs: cfg.RootCAs, MinVersion: tls.VersionTLS12},
		TLSHandshakeTimeout:   cfg.TLSTimeout,
		ResponseHeaderTimeout: cfg.ResponseHeader,
		IdleConnTimeout:       cfg.Idle,
		ExpectContinueTimeout: time.Second,
		MaxIdleConnsPerHost:   512, // the default of 2 halves the throughput
		// Bodies and Accept-Encoding pass as they are: with deflate a price sheet
		// is a ZIP file.
		DisableCompression:     true,
		ForceAttemptHTTP2:      cfg.HTTP2,
		MaxResponseHeaderBytes: 1 << 20,
	}
	if cfg.Dial != "" {
		t.Proxy = nil // a stated address is meant to be dialled
	}
	if !cfg.HTTP2 {
		t.TLSNextProto = map[string]func(string, *tls.Conn) http.RoundTripper{}
	}
	return &Upstream{
		name: cfg.Name, url: u, audiences: slices.Clone(cfg.Audiences), validatesMFA: cfg.ValidatesMFA,
		transport: t, breaker: newBreaker(cfg.Name, cfg.OnBreaker),
	}, nil
}

// Name returns the upstream's name.
func (u *Upstream) Name() string { return u.name }

// RoundTrip sends one request (http.RoundTripper).
func (u *Upstream) RoundTrip(r *http.Request) (*http.Response, error) {
	return u.transport.RoundTrip(r)
}

// BreakerState returns closed, half-open or open.
func (u *Upstream) BreakerState() string { return u.breaker.State().String() }

// Close closes idle connections.
func (u *Upstream) Close() { u.transport.CloseIdleConnections() }

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
