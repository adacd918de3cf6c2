package entra

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"weak"

	"github.com/partnerguard/partnerguard/policy"
)

// ofTenant is the user token of a tenant.
func ofTenant(id string) string {
	return user(userClaims().with("tid", `"`+id+`"`).with("iss", `"https://sts.windows.net/`+id+`/"`))
}

const third = "99cc88dd-1111-4222-8333-444455556666"

func TestReplacedVerifierGoesOnWithItsKeys(t *testing.T) {
	keys := serveKeys(t, published("A", &keyA().PublicKey))
	old := newVerifier(t, Config{Authority: keys.URL, Tenants: []string{tid, other}})
	mustRefresh(t, old)
	expect(t, old, ofTenant(tid), "")
	expect(t, old, ofTenant(other), "")
	before := keys.total()

	// One tenant stays, one goes, one comes.
	next := newVerifier(t, Config{Authority: keys.URL + "/", Tenants: []string{third, strings.ToUpper(tid)}, Previous: old})
	expect(t, next, ofTenant(tid), "")
	expect(t, next, ofTenant(other), policy.ReasonTokenWrongTenant)
	if n := keys.total() - before; n != 0 {
		t.Errorf("%d requests for keys that were there", n)
	}
	for _, s := range next.Status() {
		switch {
		case s.Tenant == tid && s.Usable && s.FetchedAt.Equal(noon):
		case s.Tenant == third && !s.Usable && s.Keys == 0:
		default:
			t.Errorf("status of a replacement = %+v", s)
		}
	}
	expect(t, next, ofTenant(third), "")
	settle(next)
	if n := keys.total() - before; n != 2 {
		t.Errorf("%d requests, want 2: for the keys of the tenant that came", n)
	}

	// Calls in flight are answered as they began.
	expect(t, old, ofTenant(other), "")
	expect(t, old, ofTenant(tid), "")

	// What came back after it was removed starts from nothing.
	keys.serve("error")
	again := newVerifier(t, Config{Authority: keys.URL, Tenants: []string{tid, other}, Previous: next})
	expect(t, again, ofTenant(other), policy.ReasonKeysUnavailable)
	expect(t, again, ofTenant(tid), "")
}

func TestReplacementOfAnotherKindTakesNothingOver(t *testing.T) {
	keys := serveKeys(t, published("A", &keyA().PublicKey))
	elsewhere := serveKeys(t, published("A", &keyB().PublicKey))
	old := newVerifier(t, Config{Authority: keys.URL, Tenants: []string{tid}})
	mustRefresh(t, old)
	expect(t, old, user(userClaims()), "")
	for _, tt := range []struct {
		name string
		cfg  Config
		want policy.Reason
	}{
		{"another authority", Config{Authority: elsewhere.URL, Tenants: []string{tid}}, policy.ReasonTokenBadSignature},
		{"another path of the authority", Config{Authority: keys.URL + "/x", Tenants: []string{tid}}, ""},
		{"another cloud", Config{Cloud: USGov, Authority: keys.URL, Tenants: []string{tid}}, ""},
		{"any tenant", Config{Authority: keys.URL}, ""},
	} {
		tt.cfg.Previous = old
		next := newVerifier(t, tt.cfg)
		if next.Ready() {
			t.Errorf("%s: keys were taken over", tt.name)
		}
		if next.cache == old.cache {
			t.Errorf("%s: verified tokens were taken over", tt.name)
		}
		expect(t, next, user(userClaims()), tt.want)
	}
}

// Two key sets of one Verifier must not share a generation: bad signatures are
// remembered by it.
func TestGenerationsGoOnAfterAReplacement(t *testing.T) {
	keys := serveKeys(t, published("A", &keyA().PublicKey))
	v := newVerifier(t, Config{Authority: keys.URL, Tenants: []string{tid}})
	mustRefresh(t, v)
	raw := sign(keyB(), headerA, userClaims().String())
	for range 3 {
		v = newVerifier(t, Config{Authority: keys.URL, Tenants: []string{tid}, Previous: v})
		expect(t, v, raw, policy.ReasonTokenBadSignature)
		keys.serve(keySetJSON(published("A", &keyB().PublicKey)))
		mustRefresh(t, v)
		expect(t, v, raw, "")
		keys.serve(keySetJSON(published("A", &keyA().PublicKey)))
		mustRefresh(t, v)
		expect(t, v, raw, policy.ReasonTokenBadSignature)
	}
}

// The budget is the tenant's, not the configuration's: a flood of kids gains
// nothing from a reload.
func TestReplacementRefillsNoBudget(t *testing.T) {
	keys := serveKeys(t, published("A", &keyA().PublicKey))
	v := newVerifier(t, Config{Authority: keys.URL, Tenants: []string{tid}})
	mustRefresh(t, v)
	before := keys.total()
	for i := range 20 {
		expect(t, v, sign(keyA(), fmt.Sprintf(`{"alg":"RS256","kid":"Z%d"}`, i), userClaims().String()), policy.ReasonTokenUnknownKey)
		settle(v)
		v = newVerifier(t, Config{Authority: keys.URL, Tenants: []string{tid}, Previous: v})
	}
	if n := keys.total() - before; n != 2*fetchBurst {
		t.Errorf("%d requests, want %d", n, 2*fetchBurst)
	}

	// Nor does a kid that is known to be unknown.
	v = newVerifier(t, Config{Authority: keys.URL, Tenants: []string{third}, Previous: v})
	for range 5 {
		unknown := sign(keyA(), `{"alg":"RS256","kid":"Z"}`, userClaims().with("tid", `"`+third+`"`).with("iss", `"https://sts.windows.net/`+third+`/"`).String())
		expect(t, v, unknown, policy.ReasonTokenUnknownKey)
		settle(v)
		v = newVerifier(t, Config{Authority: keys.URL, Tenants: []string{third}, Previous: v})
	}
	if n := keys.count("/" + third + "/discovery/keys"); n != 1 {
		t.Errorf("%d fetches for one unknown kid, want 1", n)
	}
}

// However often the configuration is replaced, keys are fetched no more often, and
// no less: a key that was withdrawn is gone within the refresh interval.
func TestReplacementsKeepTheSchedule(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var fetches atomic.Int32
		var withdrawn atomic.Bool
		answers := roundTripper(func(*http.Request) (*http.Response, error) {
			fetches.Add(1)
			if withdrawn.Load() {
				return answer(keySetJSON(published("B", &keyB().PublicKey)))
			}
			return answer(keySetJSON(published("A", &keyA().PublicKey)))
		})
		var v *Verifier
		ended, cancel := make(chan error, 1), func() {}
		replace := func(cfg Config) {
			cfg.Previous = v
			next := start(t, cfg, answers)
			ctx, end := context.WithCancel(context.Background())
			nextEnded := make(chan error, 1)
			go func() { nextEnded <- next.Run(ctx) }()
			if v != nil {
				cancel()
				if err := <-ended; err != nil {
					t.Error(err)
				}
			}
			v, ended, cancel = next, nextEnded, end
			synctest.Wait()
		}
		raw := user(longLived())
		replace(Config{})
		expect(t, v, raw, "")
		if n := fetches.Load(); n != 2 {
			t.Fatalf("%d requests at the start, want 2", n)
		}
		withdrawn.Store(true)
		for range 13 {
			time.Sleep(55 * time.Minute)
			replace(Config{})
		}
		time.Sleep(5 * time.Minute)
		synctest.Wait()
		if n := fetches.Load(); n != 4 {
			t.Errorf("%d requests in 12 hours, want 4", n)
		}
		expect(t, v, raw, policy.ReasonTokenUnknownKey)

		// A shorter interval holds from the replacement on.
		synctest.Wait()
		fetches.Store(0)
		replace(Config{Refresh: time.Hour})
		time.Sleep(time.Hour)
		synctest.Wait()
		if n := fetches.Load(); n != 2 {
			t.Errorf("%d requests within the new interval, want 2", n)
		}
		cancel()
		<-ended
	})
}

// A new configuration may be what mends the fetches, so it does not wait for the
// end of a long pause; but a hundred of them in a row fetch within the budget.
func TestReplacementRetriesWhatFailed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var fetches atomic.Int32
		down := roundTripper(func(*http.Request) (*http.Response, error) {
			fetches.Add(1)
			return nil, errors.New("connection refused")
		})
		run := func(v *Verifier) (end func()) {
			ctx, cancel := context.WithCancel(context.Background())
			ended := make(chan error, 1)
			go func() { ended <- v.Run(ctx) }()
			synctest.Wait()
			return func() { cancel(); <-ended }
		}
		v := start(t, Config{}, down)
		end := run(v)
		time.Sleep(time.Hour) // the pauses have grown to five minutes

		next := start(t, Config{Previous: v}, func(*http.Request) (*http.Response, error) {
			return answer(keySetJSON(published("A", &keyA().PublicKey)))
		})
		end()
		end = run(next)
		if !next.Ready() {
			t.Error("the replacement did not try at once")
		}
		end()

		v = start(t, Config{}, down)
		end = run(v)
		fetches.Store(0)
		for range 100 {
			v = start(t, Config{Previous: v}, down)
			end()
			end = run(v)
		}
		end()
		if n := fetches.Load(); n != 2*fetchBurst {
			t.Errorf("%d requests by a hundred replacements, want %d", n, 2*fetchBurst)
		}
	})
}

// A key endpoint that hangs is not asked anew by each replacement.
func TestReplacementsWhileAFetchHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var fetches atomic.Int32
		hanging := roundTripper(func(r *http.Request) (*http.Response, error) {
			fetches.Add(1)
			return hang(r)
		})
		var v *Verifier
		end := func() {}
		for range 100 {
			v = start(t, Config{Previous: v}, hanging)
			end() // after the next one is there, as when a configuration is read again
			ctx, cancel := context.WithCancel(context.Background())
			ended := make(chan error, 1)
			go func() { ended <- v.Run(ctx) }()
			end = func() { cancel(); <-ended }
			synctest.Wait()
		}
		end()
		if n := fetches.Load(); n > 2*(1+fetchBurst) {
			t.Errorf("%d requests by a hundred replacements within no time", n)
		}
	})
}

func TestCacheOutlivesAReplacementThatCannotChangeIt(t *testing.T) {
	keys := serveKeys(t, published("A", &keyA().PublicKey))
	old := newVerifier(t, Config{Authority: keys.URL, Tenants: []string{tid}})
	mustRefresh(t, old)
	raw := user(userClaims())
	expect(t, old, raw, "")
	for _, tt := range []struct {
		name string
		cfg  Config
		want bool
	}{
		{"as before", Config{Tenants: []string{tid}}, true},
		{"one more tenant", Config{Tenants: []string{other, tid}}, true},
		{"another leeway", Config{Tenants: []string{tid}, Leeway: -1}, true},
		{"the tenant removed", Config{Tenants: []string{other}}, false},
		{"other values that prove MFA", Config{Tenants: []string{tid}, MFAValues: []string{"ngcmfa"}}, false},
		{"another size", Config{Tenants: []string{tid}, CacheEntries: 100}, false},
	} {
		tt.cfg.Authority, tt.cfg.Previous = keys.URL, old
		next := newVerifier(t, tt.cfg)
		release := occupy(next)
		_, reason := verify(t, next, raw)
		release()
		if got := reason == ""; got != tt.want {
			t.Errorf("%s: remembered %v (%q), want %v", tt.name, got, reason, tt.want)
		}
	}
}

// Five hundred replacements under load, a third of them dropped before they run:
// afterwards there is one Verifier, as many goroutines as before, and no connection
// of the others.
func TestNothingLeaksAfterFiveHundredReplacements(t *testing.T) {
	var (
		mu   sync.Mutex
		open = map[net.Conn]bool{}
	)
	keys := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, keySetJSON(published("A", &keyA().PublicKey)))
	}))
	keys.Config.ConnState = func(c net.Conn, state http.ConnState) {
		mu.Lock()
		defer mu.Unlock()
		switch state {
		case http.StateNew:
			open[c] = true
		case http.StateClosed, http.StateHijacked:
			delete(open, c)
		}
	}
	keys.Start()
	t.Cleanup(keys.Close)
	var (
		v     atomic.Pointer[Verifier]
		all   []weak.Pointer[Verifier]
		ended = make(chan error, 1)
		end   = func() {}
	)
	replace := func(i int) {
		cfg := Config{Authority: keys.URL, Tenants: []string{tid}, Previous: v.Load()}
		if i%2 == 0 { // a tenant that comes and goes, so that there is something to fetch
			cfg.Tenants = append(cfg.Tenants, other)
		}
		next := newVerifier(t, cfg)
		all = append(all, weak.Make(next))
		if i%3 == 2 {
			return // found wanting
		}
		ctx, cancel := context.WithCancel(context.Background())
		nextEnded := make(chan error, 1)
		go func() { nextEnded <- next.Run(ctx) }()
		if i%2 == 0 {
			if err := next.refreshTenant(ctx, next.tenants[other]); err != nil {
				t.Fatal(err)
			}
			expect(t, next, ofTenant(other), "")
		}
		if v.Swap(next) != nil {
			end()
			if err := <-ended; err != nil {
				t.Error(err)
			}
		}
		ended, end = nextEnded, cancel
	}
	goroutines := runtime.NumGoroutine()
	replace(0)
	expect(t, v.Load(), ofTenant(tid), "")
	stop := make(chan struct{})
	var load sync.WaitGroup
	raw := ofTenant(tid)
	load.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				if _, err := v.Load().Verify(context.Background(), raw, audiences); err != nil {
					t.Errorf("a call during a replacement: %v", err)
					return
				}
			}
		}
	})
	for i := range 500 {
		replace(i + 1)
	}
	close(stop)
	load.Wait()
	last := v.Load()
	expect(t, last, raw, "")
	end()
	<-ended

	alive := func() (verifiers, connections int) {
		runtime.GC()
		for _, p := range all {
			if p.Value() != nil {
				verifiers++
			}
		}
		mu.Lock()
		defer mu.Unlock()
		return verifiers, len(open)
	}
	deadline := time.Now().Add(10 * time.Second)
	for {
		verifiers, connections := alive()
		n := runtime.NumGoroutine()
		if verifiers == 1 && connections == 0 && n <= goroutines {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d verifiers are left, %d connections, %d goroutines where there were %d", verifiers, connections, n, goroutines)
		}
		time.Sleep(10 * time.Millisecond)
	}
	runtime.KeepAlive(last)
}

func TestRootCAs(t *testing.T) {
	keys := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, keySetJSON(published("A", &keyA().PublicKey)))
	}))
	keys.Config.ErrorLog = log.New(io.Discard, "", 0)
	keys.StartTLS()
	t.Cleanup(keys.Close)
	roots := x509.NewCertPool()
	roots.AddCert(keys.Certificate())

	var unknown *tls.CertificateVerificationError
	v := newVerifier(t, Config{Authority: keys.URL, Tenants: []string{tid}})
	if err := v.Refresh(context.Background()); !errors.As(err, &unknown) {
		t.Errorf("Refresh without the CA: %v", err)
	}
	v = newVerifier(t, Config{Authority: keys.URL, Tenants: []string{tid}, RootCAs: roots, Previous: v})
	mustRefresh(t, v)
	expect(t, v, user(userClaims()), "")

	// A client that is given keeps its own.
	v = newVerifier(t, Config{Authority: keys.URL, Tenants: []string{tid}, RootCAs: roots, Client: &http.Client{Transport: &http.Transport{}}})
	if err := v.Refresh(context.Background()); !errors.As(err, &unknown) {
		t.Errorf("Refresh by a client without the CA: %v", err)
	}
	if slices.ContainsFunc(v.Status(), func(s KeyStatus) bool { return s.LastError == nil }) {
		t.Error("status shows no error")
	}
}
