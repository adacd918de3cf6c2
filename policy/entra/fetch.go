package entra

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/partnerguard/partnerguard/policy"
	"golang.org/x/time/rate"
)

const (
	common = "common" // the key set that serves all tenants

	fetchTimeout = 10 * time.Second
	fetchWait    = 250 * time.Millisecond // how long a request waits for a fetch
	fetchBurst   = 3                      // fetches that requests may cause per tenant
	fetchEvery   = 30 * time.Second       // and then one in this time
	fetchRecent  = 5 * time.Minute        // a fetch this long ago speaks for a kid seen now
	staleAfter   = 24 * time.Hour         // Microsoft asks to refresh at least daily

	backoffMin = time.Second
	backoffMax = 5 * time.Minute
)

var (
	errNoKeys     = errors.New("no key set that is fresh enough, and none could be fetched in time")
	errNoKey      = errors.New("key set lacks the kid, and none newer could be fetched in time")
	errUnknownKey = errors.New("no published key has this kid")
)

// tenant holds the keys of one tenant, or the common ones.
type tenant struct {
	id      string
	sources [2]source // v1, v2
	budget  *rate.Limiter

	mu     sync.Mutex
	flight *flight // the fetch under way
}

// source is one key endpoint.
type source struct {
	tenant  string
	version version
	url     string
	set     atomic.Pointer[keySet] // last good; replaced whole

	mu  sync.Mutex
	err error // of the last fetch
}

// flight is one fetch of both endpoints of a tenant, for all who wait for it.
type flight struct {
	done  [2]chan struct{} // closed when the source has new keys, or none could be had
	ended chan struct{}    // closed when the keys are on disk as well
	left  atomic.Int32
}

func newTenant(id, authority string) *tenant {
	t := &tenant{id: id, budget: rate.NewLimiter(rate.Every(fetchEvery), fetchBurst)}
	for i, path := range [2]string{"/discovery/keys", "/discovery/v2.0/keys"} {
		s := &t.sources[i]
		s.tenant, s.version, s.url = id, version(i+1), authority+"/"+id+path
	}
	return t
}

// tenantOf returns whose keys verify tokens of the tenant tid (lower case); nil
// when that tenant is not accepted. Nothing in a token makes a new one.
func (v *Verifier) tenantOf(tid string) *tenant {
	if t := v.tenants[tid]; t != nil {
		return t
	}
	return v.tenants[common]
}

// usable returns the keys of a source unless they are too old to be trusted.
func (v *Verifier) usable(s *source, now time.Time) *keySet {
	set := s.set.Load()
	if set == nil || now.Sub(set.fetched) > v.maxStale {
		return nil
	}
	return set
}

// findKey looks up the key that t names, and fetches within the budget when it is
// not listed. The key counts as unknown only if a fetch that completed after t came,
// or at most five minutes before, did not list it.
func (v *Verifier) findKey(ctx context.Context, t *token) (policy.Reason, error) {
	tenant := v.tenantOf(t.tenantID)
	s := &tenant.sources[t.version-1]
	seen := s.set.Load()
	set := v.usable(s, t.now)
	if t.use(set) {
		return "", nil
	}
	if f := v.fetch(tenant, s, seen); f != nil {
		timer := time.NewTimer(fetchWait)
		defer timer.Stop()
		select {
		case <-f.done[t.version-1]:
		case <-timer.C:
		case <-ctx.Done():
			return policy.ReasonKeysUnavailable, ctx.Err()
		}
	}
	set = v.usable(s, t.now)
	switch {
	case t.use(set):
		return "", nil
	case set == nil:
		return policy.ReasonKeysUnavailable, errNoKeys
	case t.now.Sub(set.fetched) > fetchRecent:
		return policy.ReasonKeysUnavailable, errNoKey
	}
	return policy.ReasonTokenUnknownKey, errUnknownKey
}

// use takes t's key from set, if it is there.
func (t *token) use(set *keySet) bool {
	if set == nil || set.byKid[t.kid] == nil {
		return false
	}
	t.set, t.key = set, set.byKid[t.kid]
	return true
}

// fetch returns the fetch under way for t, having started one if the budget
// allows. It returns nil when there is none to wait for: out of budget, after Run
// has ended, or because s has other keys by now than the caller saw.
func (v *Verifier) fetch(t *tenant, s *source, seen *keySet) *flight {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case s.set.Load() != seen:
		return nil
	case t.flight != nil:
		return t.flight
	case !t.budget.AllowN(v.now(), 1):
		return nil
	}
	return v.start(t)
}

// start begins a fetch of t, whose lock the caller holds. It returns nil after
// Run has ended.
func (v *Verifier) start(t *tenant) *flight {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.ended {
		return nil
	}
	f := &flight{done: [2]chan struct{}{make(chan struct{}), make(chan struct{})}, ended: make(chan struct{})}
	f.left.Store(int32(len(t.sources)))
	t.flight = f
	for i := range t.sources {
		v.flights.Go(func() {
			s := &t.sources[i]
			set, body := v.refresh(v.ctx, s)
			close(f.done[i])
			if set != nil {
				v.keep(s, set, body)
			}
			if f.left.Add(-1) == 0 {
				t.mu.Lock()
				t.flight = nil
				t.mu.Unlock()
				close(f.ended)
			}
		})
	}
	return f
}

// refresh fetches the keys of s and returns them. When that fails the last good
// ones stay, and set is nil.
func (v *Verifier) refresh(ctx context.Context, s *source) (set *keySet, body []byte) {
	body, err := v.download(ctx, s.url)
	if err == nil {
		set, err = parseKeySet(body, v.now(), v.generation.Add(1))
	}
	if err != nil {
		err = fmt.Errorf("fetch key set %s: %w", s.url, err)
	}
	s.mu.Lock()
	s.err = err
	s.mu.Unlock()
	if err != nil {
		v.tell(s, EventFailed, err)
		if old := s.set.Load(); old != nil && v.now().Sub(old.fetched) >= staleAfter {
			v.tell(s, EventStale, err)
		}
		return nil, nil
	}
	s.set.Store(set)
	v.tell(s, EventRefreshed, nil)
	return set, body
}

func (v *Verifier) download(ctx context.Context, url string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", "application/json")
	res, err := v.client.Do(req)
	if err != nil {
		return nil, unwrapURL(err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("status %d", res.StatusCode)
	}
	body, err := io.ReadAll(io.LimitReader(res.Body, maxKeySetBytes+1))
	if err != nil {
		return nil, err
	}
	if len(body) > maxKeySetBytes {
		return nil, fmt.Errorf("more than %d bytes", maxKeySetBytes)
	}
	return body, nil
}

// unwrapURL drops the method and URL that http.Client adds: the caller says it.
func unwrapURL(err error) error {
	if u, ok := errors.AsType[*url.Error](err); ok {
		return u.Err
	}
	return err
}

// Refresh fetches the keys of every tenant now, without regard to the budget, and
// waits for it. The error joins what went wrong with each endpoint.
func (v *Verifier) Refresh(ctx context.Context) error {
	var (
		mu   sync.Mutex
		errs []error
		wg   sync.WaitGroup
	)
	for _, t := range v.tenants {
		wg.Go(func() {
			err := v.refreshTenant(ctx, t)
			mu.Lock()
			errs = append(errs, err)
			mu.Unlock()
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

func (v *Verifier) refreshTenant(ctx context.Context, t *tenant) error {
	t.mu.Lock()
	f := t.flight
	if f == nil {
		f = v.start(t)
	}
	t.mu.Unlock()
	if f == nil {
		return errEnded
	}
	select {
	case <-f.ended:
	case <-ctx.Done():
		return ctx.Err()
	}
	var errs []error
	for i := range t.sources {
		errs = append(errs, t.sources[i].lastError())
	}
	return errors.Join(errs...)
}

func (s *source) lastError() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// Run keeps the keys fresh until ctx ends: it fetches at once, then every
// Config.Refresh, and after a failure again with growing pauses. It then waits for
// fetches under way and returns nil; after that nothing is fetched any more. Run
// may be called once.
func (v *Verifier) Run(ctx context.Context) error {
	if !v.running.CompareAndSwap(false, true) {
		return errors.New("entra: Run was called before")
	}
	var wg sync.WaitGroup
	for _, t := range v.tenants {
		wg.Go(func() { v.keepFresh(ctx, t) })
	}
	wg.Wait()

	v.mu.Lock()
	v.ended = true
	v.mu.Unlock()
	v.cancel()
	v.flights.Wait()
	return nil
}

func (v *Verifier) keepFresh(ctx context.Context, t *tenant) {
	backoff := backoffMin
	for {
		var pause time.Duration
		if err := v.refreshTenant(ctx, t); err == nil {
			backoff = backoffMin
			pause = jitter(v.refreshEvery)
		} else {
			pause = jitter(backoff)
			backoff = min(2*backoff, backoffMax)
		}
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return
		}
	}
}

// jitter takes up to a fifth off d, so that many guards do not fetch at once.
func jitter(d time.Duration) time.Duration {
	return d - time.Duration(rand.Int64N(int64(d)/5+1))
}

// newClient returns a client for key sets on the base of given, which may be nil.
// Redirects are answers like others: keys come from the authority itself.
func newClient(given *http.Client) *http.Client {
	client := &http.Client{Transport: &http.Transport{
		Proxy:                  http.ProxyFromEnvironment,
		DialContext:            (&net.Dialer{Timeout: 5 * time.Second}).DialContext,
		TLSHandshakeTimeout:    5 * time.Second,
		ResponseHeaderTimeout:  5 * time.Second,
		IdleConnTimeout:        30 * time.Second,
		MaxResponseHeaderBytes: 64 << 10,
		ForceAttemptHTTP2:      true,
	}}
	if given != nil {
		client = new(*given)
	}
	client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	return client
}

// checkAuthority returns the base of the key URLs, without a trailing slash.
func checkAuthority(s string) (string, error) {
	u, err := url.Parse(s)
	switch {
	case err != nil || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" || u.Opaque != "":
		return "", errors.New("entra: Config.Authority must be a URL such as https://login.microsoftonline.com")
	case u.Scheme == "https", u.Scheme == "http" && loopback(u.Hostname()):
		return strings.TrimRight(u.String(), "/"), nil
	}
	return "", errors.New("entra: Config.Authority must be https; http only towards loopback")
}

func loopback(host string) bool {
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.IsLoopback()
}
