package entra

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
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
	sources [2]source     // v1, v2
	budget  *rate.Limiter // shared with the Verifier that ours replaces, or that replaces ours

	mu    sync.Mutex // also guards flight of the sources
	asked [fetchBurst + 1]asked
	due   time.Time     // when Run fetches next
	pause time.Duration // until then, if the last time failed
}

// source is one key endpoint.
type source struct {
	tenant  string
	version version
	url     string
	set     atomic.Pointer[keySet] // last good; replaced whole
	flight  *flight                // the fetch under way

	mu  sync.Mutex
	err error // of the last fetch

	keeping sync.Mutex // held while the set is written to disk
}

// flight is one fetch of one endpoint, for all who wait for it.
type flight struct {
	done  chan struct{} // closed when the source has new keys, or none could be had
	ended chan struct{} // closed when that was told and the keys are on disk as well
}

// asked is a kid that was not listed and that keys were fetched for. There can be
// no more of them within fetchEvery than the budget has fetches.
type asked struct {
	kid string
	at  time.Time
}

func newTenant(id, authority string) *tenant {
	t := &tenant{id: id, budget: rate.NewLimiter(rate.Every(fetchEvery), fetchBurst), pause: backoffMin}
	for i, path := range [2]string{"/discovery/keys", "/discovery/v2.0/keys"} {
		s := &t.sources[i]
		s.tenant, s.version, s.url = id, version(i+1), authority+"/"+id+path
	}
	return t
}

// takeOver makes a new t go on where old stands: its keys with their age, what is
// left of its budget, and when it is due.
func (t *tenant) takeOver(old *tenant) {
	old.mu.Lock()
	defer old.mu.Unlock()
	t.budget, t.asked, t.due, t.pause = old.budget, old.asked, old.due, old.pause
	for i := range t.sources {
		t.sources[i].set.Store(old.sources[i].set.Load())
		t.sources[i].err = old.sources[i].lastError()
	}
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
	if !canBePublished(t.kid) {
		return policy.ReasonTokenUnknownKey, errUnknownKey
	}
	if f := v.fetch(tenant, s, seen, t.kid); f != nil {
		timer := time.NewTimer(fetchWait)
		defer timer.Stop()
		select {
		case <-f.done:
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

// fetch returns the fetch of s, a source of t, that is under way, having started
// one if the budget allows. It returns nil when there is none to wait for: because
// s has other keys by now than the caller saw, because keys were fetched for the
// same kid just before and lack it, out of budget, or after Run has ended.
func (v *Verifier) fetch(t *tenant, s *source, seen *keySet, kid string) *flight {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := v.now()
	switch {
	case s.set.Load() != seen:
		return nil
	case s.flight != nil:
		return s.flight
	case t.askedInVain(kid, seen, now), !t.budget.AllowN(now, 1):
		return nil
	}
	copy(t.asked[1:], t.asked[:])
	t.asked[0] = asked{kid, now}
	v.start(t)
	return s.flight
}

// askedInVain reports whether keys were fetched for kid within fetchEvery, and set,
// which lacks it, is what came of that: then one caller that goes on with a token of
// an unknown key does not spend the budget that a new key may need.
func (t *tenant) askedInVain(kid string, set *keySet, now time.Time) bool {
	if set == nil || now.Sub(set.fetched) >= fetchEvery {
		return false
	}
	return slices.ContainsFunc(t.asked[:], func(a asked) bool { return a.kid == kid && !set.fetched.Before(a.at) })
}

// start begins a fetch of each source of t that is not being fetched; the caller
// holds t's lock. After Run has ended it starts none.
func (v *Verifier) start(t *tenant) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.ended {
		return
	}
	for i := range t.sources {
		s := &t.sources[i]
		if s.flight != nil {
			continue
		}
		f := &flight{done: make(chan struct{}), ended: make(chan struct{})}
		s.flight = f
		v.flights.Go(func() {
			defer close(f.ended)
			set, body, err := v.download(v.ctx, s)

			// Whoever comes from here on sees the result, or starts anew; nobody joins
			// a fetch that has failed already.
			t.mu.Lock()
			s.settle(set, err)
			s.flight = nil
			t.mu.Unlock()
			close(f.done)

			v.report(s, err)
			if err == nil {
				v.keep(s, set, body)
			}
		})
	}
}

// settle takes the result of a fetch. When it failed the last good keys stay.
func (s *source) settle(set *keySet, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err = err; err == nil {
		s.set.Store(set)
	}
}

// report tells how a fetch of s went.
func (v *Verifier) report(s *source, err error) {
	if err == nil {
		v.tell(s, EventRefreshed, nil)
		return
	}
	v.tell(s, EventFailed, err)
	if old := s.set.Load(); old != nil && v.now().Sub(old.fetched) >= staleAfter {
		v.tell(s, EventStale, err)
	}
}

// download fetches the keys of s and reads them. body is what was published.
func (v *Verifier) download(ctx context.Context, s *source) (set *keySet, body []byte, err error) {
	body, err = v.get(ctx, s.url)
	if err == nil {
		set, err = parseKeySet(body, v.now(), v.generation.Add(1))
	}
	if err != nil {
		return nil, nil, fmt.Errorf("fetch key set %s: %w", s.url, err)
	}
	return set, body, nil
}

func (v *Verifier) get(ctx context.Context, url string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", "application/json")
	res, err := v.client.Do(req)
	if err != nil {
		return nil, brief(err)
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

// brief drops the method and URL that http.Client adds, as the caller says it, and
// cuts what may quote an answer at length.
func brief(err error) error {
	if u, ok := errors.AsType[*url.Error](err); ok {
		err = u.Err
	}
	if text := err.Error(); len(text) > maxText {
		return errors.New(clip(text, maxText) + "…")
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
	v.start(t)
	flights := [...]*flight{t.sources[0].flight, t.sources[1].flight}
	t.mu.Unlock()
	var errs []error
	for i, f := range flights {
		if f == nil {
			return errEnded
		}
		select {
		case <-f.ended:
		case <-ctx.Done():
			return ctx.Err()
		}
		errs = append(errs, t.sources[i].lastError())
	}
	return errors.Join(errs...)
}

func (s *source) lastError() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// Run keeps the keys fresh until ctx ends: it fetches at once what was not taken
// over from Config.Previous, then every Config.Refresh, and after a failure again
// with growing pauses. It then waits for fetches under way and returns nil; after
// that nothing is fetched any more, and tokens are verified with the keys that are
// there. Run may be called once.
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
	timer := time.NewTimer(v.untilDue(t))
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
		case <-ctx.Done():
			return
		}
		// Put off before trying: a fetch that hangs while configurations are replaced
		// is not begun anew by each of them.
		pause := v.putOff(t)
		if v.refreshTenant(ctx, t) == nil {
			pause = v.refreshed(t)
		}
		timer.Reset(pause)
	}
}

// untilDue is how long Run waits before it fetches for the first time: not at all
// but for keys that were taken over. Where the last fetch failed, the new
// configuration may be the cure, so it is tried within the budget.
func (v *Verifier) untilDue(t *tenant) time.Duration {
	now := v.now()
	t.mu.Lock()
	defer t.mu.Unlock()
	if latest := now.Add(v.refreshEvery); t.due.After(latest) {
		t.due = latest
	}
	wait := max(0, t.due.Sub(now))
	failing := t.sources[0].lastError() != nil || t.sources[1].lastError() != nil
	if wait > 0 && failing && t.budget.AllowN(now, 1) {
		return 0
	}
	return wait
}

// putOff makes t due after a pause, which grows from time to time.
func (v *Verifier) putOff(t *tenant) time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	pause := jitter(t.pause)
	t.due = v.now().Add(pause)
	t.pause = min(2*t.pause, backoffMax)
	return pause
}

// refreshed makes t due when its keys, just fetched, are to be fetched again.
func (v *Verifier) refreshed(t *tenant) time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	pause := jitter(v.refreshEvery)
	t.due = v.now().Add(pause)
	t.pause = backoffMin
	return pause
}

// jitter takes up to a fifth off d, so that many guards do not fetch at once.
func jitter(d time.Duration) time.Duration {
	return d - time.Duration(rand.Int64N(int64(d)/5+1))
}

// newClient returns a client for key sets on the base of given; where that is nil,
// one of our own that trusts roots, or the system's when nil. That one keeps no
// connection, which would idle for hours and outlive the Verifier, and unpacks
// nothing. Redirects are answers like others: keys come from the authority itself.
func newClient(given *http.Client, roots *x509.CertPool) *http.Client {
	client := &http.Client{Transport: &http.Transport{
		Proxy:                  http.ProxyFromEnvironment,
		DialContext:            (&net.Dialer{Timeout: 5 * time.Second}).DialContext,
		TLSClientConfig:        &tls.Config{RootCAs: roots},
		TLSHandshakeTimeout:    5 * time.Second,
		ResponseHeaderTimeout:  5 * time.Second,
		MaxResponseHeaderBytes: 64 << 10,
		DisableKeepAlives:      true,
		DisableCompression:     true,
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
