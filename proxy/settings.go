package proxy

import (
	"crypto/tls"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/partnerguard/partnerguard/policy"
)

// Settings are what a reload swaps, whole. Policy, Verifier, at least one Upstream and
// one Listener are required.
type Settings struct {
	Generation uint64 // of the configuration, in every record, from 1
	Policy     *policy.Policy
	Verifier   Verifier
	Upstreams  []*Upstream
	Listeners  []Listener
	// Hosts are the Host headers, in lower case and without port, that choose an
	// upstream by its name on any listener.
	Hosts map[string]string
	// ValidateMFA says which app+user calls ask Microsoft for its own verdict.
	// Zero asks for none.
	ValidateMFA ValidateMFA
	// NeedLedger refuses calls whose decision cannot be recorded
	// (ledger.on_failure: reject). False forwards them and says so.
	NeedLedger bool
	// MaxCalls is how many calls of one integration may be in flight; zero is no
	// limit. MaxCallsOf has the integrations with a limit of their own.
	MaxCalls   int
	MaxCallsOf map[string]int
	// BodyTimeout is how long no byte of a body may move, of a request or of an
	// answer that the client does not take. Zero is no limit.
	BodyTimeout time.Duration
}

// Listener is what a call shows by the socket it came in by.
type Listener struct {
	Name        string
	Integration string // that the listener belongs to; empty if none
	Upstream    string // name of the upstream it leads to, unless Host names another
}

// settings are Settings in use, and how many calls use them.
type settings struct {
	Settings
	listeners map[string]listener
	hosts     map[string]*Upstream // upstreams that a Host header chooses

	calls   atomic.Int64
	retired atomic.Bool
	idle    chan struct{} // closed once retired and without calls
	once    sync.Once
}

type listener struct {
	Listener
	upstream *Upstream
}

func newSettings(cfg Settings) (*settings, error) {
	switch {
	case cfg.Policy == nil:
		return nil, errors.New("proxy: Settings.Policy is required")
	case cfg.Verifier == nil:
		return nil, errors.New("proxy: Settings.Verifier is required")
	case len(cfg.Upstreams) == 0:
		return nil, errors.New("proxy: Settings.Upstreams is required")
	case len(cfg.Listeners) == 0:
		return nil, errors.New("proxy: Settings.Listeners is required")
	}
	s := &settings{
		Settings: cfg, listeners: map[string]listener{}, hosts: map[string]*Upstream{}, idle: make(chan struct{}),
	}
	upstreams := map[string]*Upstream{}
	for _, u := range cfg.Upstreams {
		upstreams[u.name] = u
	}
	for host, name := range cfg.Hosts {
		if s.hosts[host] = upstreams[name]; s.hosts[host] == nil {
			return nil, fmt.Errorf("proxy: host %s leads to upstream %q, which is not configured", host, name)
		}
	}
	for _, l := range cfg.Listeners {
		up := upstreams[l.Upstream]
		if up == nil {
			return nil, fmt.Errorf("proxy: listener %s leads to upstream %q, which is not configured", l.Name, l.Upstream)
		}
		if _, twice := s.listeners[l.Name]; twice {
			return nil, fmt.Errorf("proxy: two listeners are named %s", l.Name)
		}
		s.listeners[l.Name] = listener{Listener: l, upstream: up}
	}
	return s, nil
}

// Swap makes the next calls go by other settings; those in flight end by the ones they
// began with. The channel is closed when the last of these has ended: what only the
// old settings used may be closed then. On an error nothing has changed.
func (g *Guard) Swap(cfg Settings) (ended <-chan struct{}, err error) {
	s, err := newSettings(cfg)
	if err != nil {
		return nil, err
	}
	g.swapping.Lock()
	defer g.swapping.Unlock()
	old := g.settings.Swap(s)
	old.retired.Store(true)
	old.settle()
	return old.idle, nil
}

// acquire returns the current settings, in use until their release.
func (g *Guard) acquire() *settings {
	for {
		s := g.settings.Load()
		s.calls.Add(1)
		// Between the two lines a Swap may have seen no call in s, and closed it.
		if g.settings.Load() == s {
			return s
		}
		s.release()
	}
}

func (s *settings) release() {
	if s.calls.Add(-1) == 0 {
		s.settle()
	}
}

func (s *settings) settle() {
	if s.retired.Load() && s.calls.Load() == 0 {
		s.once.Do(func() { close(s.idle) })
	}
}

// maxCalls is how many calls of integration may be in flight; zero is no limit.
func (s *settings) maxCalls(integration string) int {
	if n, ok := s.MaxCallsOf[integration]; ok {
		return n
	}
	return s.MaxCalls
}

// certificateNames are the names in a verified client certificate: the subject
// alternative names and the common name, as they stand in it.
func certificateNames(state *tls.ConnectionState) []string {
	if state == nil || len(state.VerifiedChains) == 0 || len(state.VerifiedChains[0]) == 0 {
		return nil
	}
	leaf := state.VerifiedChains[0][0]
	names := append(append([]string(nil), leaf.DNSNames...), leaf.EmailAddresses...)
	for _, u := range leaf.URIs {
		names = append(names, u.String())
	}
	for _, ip := range leaf.IPAddresses {
		names = append(names, ip.String())
	}
	if leaf.Subject.CommonName != "" {
		names = append(names, leaf.Subject.CommonName)
	}
	return names
}
