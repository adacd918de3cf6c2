package entra

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/partnerguard/partnerguard/policy"
)

const (
	pathV1 = "/" + tid + "/discovery/keys"
	pathV2 = "/" + tid + "/discovery/v2.0/keys"
)

func signedB() string {
	return sign(keyB(), `{"alg":"RS256","kid":"B"}`, userClaims().String())
}

func TestKeyRotationCausesOneFetch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var rotated atomic.Bool
		var fetches atomic.Int32
		v := start(t, Config{}, func(*http.Request) (*http.Response, error) {
			fetches.Add(1)
			if !rotated.Load() {
				return answer(keySetJSON(published("A", &keyA().PublicKey)))
			}
			time.Sleep(200 * time.Millisecond)
			return answer(keySetJSON(published("A", &keyA().PublicKey), published("B", &keyB().PublicKey)))
		})
		mustRefresh(t, v)
		expect(t, v, user(longLived()), "")
		rotated.Store(true)

		var raws []string
		for i := range 10 {
			raws = append(raws, sign(keyB(), `{"alg":"RS256","kid":"B"}`, longLived().with("uti", fmt.Sprintf(`"%d"`, i)).String()))
		}
		var wg sync.WaitGroup
		for i := range 1000 {
			wg.Go(func() { expect(t, v, raws[i%len(raws)], "") })
		}
		wg.Wait()
		if n := fetches.Load(); n != 4 {
			t.Errorf("%d requests, want 4: one at the start and one more of each endpoint", n)
		}
	})
}

// A caller may look at the keys before a fetch ends and ask for one after it has.
func TestLateCallerCausesNoFetch(t *testing.T) {
	v := withKeyA(t)
	tenant := v.tenants[tid]
	s := &tenant.sources[0]
	before := s.set.Load()
	mustRefresh(t, v)
	if v.fetch(tenant, s, before, "Z") != nil {
		t.Error("fetched although the keys are newer than what the caller saw")
	}
	f := v.fetch(tenant, s, s.set.Load(), "Z")
	if f == nil {
		t.Fatal("no fetch within the budget")
	}
	<-f.ended
}

func TestWithdrawnKeyIsGone(t *testing.T) {
	keys := serveKeys(t, published("A", &keyA().PublicKey), published("B", &keyB().PublicKey))
	v := newVerifier(t, Config{Authority: keys.URL, Tenants: []string{tid}})
	mustRefresh(t, v)
	expect(t, v, user(userClaims()), "")
	keys.serve(keySetJSON(published("B", &keyB().PublicKey)))
	expect(t, v, user(userClaims()), "") // not known yet
	mustRefresh(t, v)
	expect(t, v, user(userClaims()), policy.ReasonTokenUnknownKey)
	expect(t, v, signedB(), "")

	// Another key under the old kid does not revive what the old one signed.
	keys.serve(keySetJSON(published("A", &keyB().PublicKey)))
	mustRefresh(t, v)
	expect(t, v, user(userClaims()), policy.ReasonTokenBadSignature)
}

func TestUsableKeysAmongOthers(t *testing.T) {
	a := published("A", &keyA().PublicKey)
	set, err := parseKeySet([]byte(keySetJSON(
		jwk{"kty": "EC", "kid": "E", "crv": "P-256", "x": "AA", "y": "AA"}, published("W", &keyWeak().PublicKey),
		a, a, published("B", &keyB().PublicKey), published("B", &keyA().PublicKey), jwk{"kty": 7})), noon, 1)
	if err != nil || len(set.byKid) != 1 || set.byKid["A"] == nil {
		t.Errorf("parseKeySet = %v, %v; want key A alone", set, err)
	}
	large, err := rsa.GenerateKey(rand.Reader, 3072)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := parseKeySet([]byte(keySetJSON(published("L", &large.PublicKey))), noon, 1); err != nil {
		t.Error(err)
	}
}

func TestKeyfuncCannotTryEveryKey(t *testing.T) {
	set, err := parseKeySet([]byte(keySetJSON(published("A", &keyA().PublicKey))), noon, 1)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := set.keyfunc.VerificationKeySet(context.Background()); err == nil {
		t.Error("VerificationKeySet: no error")
	}
	if err := set.keyfunc.Storage().KeyReplaceAll(context.Background(), nil); err == nil {
		t.Error("KeyReplaceAll: no error")
	}
}

func TestKeyIssuer(t *testing.T) {
	v2Claims := userClaims().with("iss", `"`+issV2+`"`).with("ver", `"2.0"`)
	for _, tt := range []struct {
		name   string
		issuer any
		claims object
		want   policy.Reason
	}{
		{"v1 token, template of v2", "https://login.microsoftonline.com/{tenantid}/v2.0", userClaims(), ""},
		{"v1 token, template of v1", "https://sts.windows.net/{tenantid}/", userClaims(), ""},
		{"v1 token, fixed to its tenant", issV2, userClaims(), ""},
		{"v1 token, fixed to another tenant", strings.Replace(issV2, tid, other, 1), userClaims(), policy.ReasonTokenWrongIssuer},
		{"v1 token, another cloud", "https://login.microsoftonline.us/{tenantid}/v2.0", userClaims(), policy.ReasonTokenWrongIssuer},
		{"v2 token, template of v2", "https://login.microsoftonline.com/{tenantid}/v2.0", v2Claims, ""},
		{"v2 token, template of v1", "https://sts.windows.net/{tenantid}/", v2Claims, policy.ReasonTokenWrongIssuer},
		{"v2 token, the consumer tenant", "https://login.microsoftonline.com/9188040d-6c67-4c5b-b112-36a304b66dad/v2.0", v2Claims, policy.ReasonTokenWrongIssuer},
	} {
		t.Run(tt.name, func(t *testing.T) {
			keys := serveKeys(t, published("A", &keyA().PublicKey).with("issuer", tt.issuer))
			v := newVerifier(t, Config{Authority: keys.URL})
			mustRefresh(t, v)
			expect(t, v, user(tt.claims), tt.want)
		})
	}
}

func TestVersionsHaveTheirOwnKeys(t *testing.T) {
	v := newVerifier(t, Config{Tenants: []string{strings.ToUpper(tid)}, Client: &http.Client{Transport: roundTripper(func(r *http.Request) (*http.Response, error) {
		switch r.URL.String() {
		case "https://login.microsoftonline.com" + pathV1:
			return answer(keySetJSON(published("A", &keyA().PublicKey)))
		case "https://login.microsoftonline.com" + pathV2:
			return answer(keySetJSON(published("A", &keyB().PublicKey)))
		}
		return nil, errors.New("unexpected " + r.URL.String())
	})}})
	mustRefresh(t, v)
	v2Claims := userClaims().with("iss", `"`+issV2+`"`).with("ver", `"2.0"`).String()
	expect(t, v, sign(keyA(), headerA, v2Claims), policy.ReasonTokenBadSignature)
	expect(t, v, sign(keyB(), headerA, v2Claims), "")
	expect(t, v, user(userClaims()), "")
}

func TestTokensCauseNoFetchesOfTheirTenant(t *testing.T) {
	keys := serveKeys(t, published("A", &keyA().PublicKey))
	v := newVerifier(t, Config{Authority: keys.URL})
	foreign := userClaims().with("tid", `"`+other+`"`).with("iss", `"https://sts.windows.net/`+other+`/"`)
	expect(t, v, user(foreign), "")
	expect(t, v, user(userClaims()), "")
	expect(t, v, sign(keyA(), `{"alg":"RS256","kid":"Z"}`, foreign.String()), policy.ReasonTokenUnknownKey)
	keys.mu.Lock()
	defer keys.mu.Unlock()
	for path := range keys.hits {
		if !strings.HasPrefix(path, "/common/") {
			t.Errorf("fetched %s", path)
		}
	}
}

// The tests below run in synthetic time, without a network.

func start(t *testing.T, cfg Config, transport roundTripper) *Verifier {
	t.Helper()
	cfg.Client = &http.Client{Transport: transport}
	cfg.Now = time.Now
	if cfg.Tenants == nil {
		cfg.Tenants = []string{tid}
	}
	v, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// now lets a token be valid at the start of synthetic time, for 30 days.
func longLived() object {
	at := time.Now().Unix()
	return userClaims().with("iat", fmt.Sprint(at)).with("nbf", fmt.Sprint(at)).with("exp", fmt.Sprint(at+30*86400))
}

func TestKeysDownAtStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := atomic.Bool{}
		fetches := atomic.Int32{}
		v := start(t, Config{}, func(*http.Request) (*http.Response, error) {
			fetches.Add(1)
			if !up.Load() {
				return nil, errors.New("connection refused")
			}
			return answer(keySetJSON(published("A", &keyA().PublicKey)))
		})
		raw := user(longLived())
		for range 10 {
			expect(t, v, raw, policy.ReasonKeysUnavailable)
			synctest.Wait()
		}
		if n := fetches.Load(); n != 6 {
			t.Errorf("%d requests, want 6: three fetches of two endpoints", n)
		}
		if v.Ready() {
			t.Error("ready without keys")
		}
		up.Store(true)
		expect(t, v, raw, policy.ReasonKeysUnavailable) // out of budget
		time.Sleep(30 * time.Second)
		expect(t, v, raw, "")
		if !v.Ready() {
			t.Error("not ready with keys")
		}
	})
}

func TestHangingKeyEndpoint(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := start(t, Config{}, hang)
		raw := user(longLived())
		began := time.Now()
		var wg sync.WaitGroup
		for range 100 {
			wg.Go(func() { expect(t, v, raw, policy.ReasonKeysUnavailable) })
		}
		wg.Wait()
		if waited := time.Since(began); waited != fetchWait {
			t.Errorf("callers waited %v, want %v", waited, fetchWait)
		}
		// A caller that gives up gets its answer at once, and harms nobody.
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		began = time.Now()
		if _, err := v.Verify(ctx, raw, audiences); !errors.Is(err, context.Canceled) {
			t.Errorf("Verify = %v, want context.Canceled", err)
		}
		if waited := time.Since(began); waited != 0 {
			t.Errorf("the cancelled caller waited %v", waited)
		}
		time.Sleep(fetchTimeout)
		synctest.Wait()
		for _, s := range v.Status() {
			if !errors.Is(s.LastError, context.DeadlineExceeded) {
				t.Errorf("last error = %v", s.LastError)
			}
		}
	})
}

func TestOneHangingEndpointDoesNotHoldUpTheOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := start(t, Config{}, func(r *http.Request) (*http.Response, error) {
			if r.URL.Path == pathV2 {
				return hang(r)
			}
			return answer(keySetJSON(published("A", &keyA().PublicKey)))
		})
		began := time.Now()
		expect(t, v, user(longLived()), "")
		if waited := time.Since(began); waited != 0 {
			t.Errorf("waited %v", waited)
		}
		time.Sleep(fetchTimeout)
	})
}

func TestUnknownKeyNeedsARecentFetch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mode := atomic.Pointer[roundTripper]{}
		serve := func(f roundTripper) { mode.Store(&f) }
		v := start(t, Config{}, func(r *http.Request) (*http.Response, error) { return (*mode.Load())(r) })
		serve(func(*http.Request) (*http.Response, error) {
			return answer(keySetJSON(published("A", &keyA().PublicKey)))
		})
		unknown := sign(keyB(), `{"alg":"RS256","kid":"Z"}`, longLived().String())
		expect(t, v, unknown, policy.ReasonTokenUnknownKey)

		serve(func(*http.Request) (*http.Response, error) { return nil, errors.New("down") })
		time.Sleep(4 * time.Minute)
		expect(t, v, unknown, policy.ReasonTokenUnknownKey)
		time.Sleep(2 * time.Minute)
		expect(t, v, unknown, policy.ReasonKeysUnavailable)
		synctest.Wait() // for the end of that fetch: who comes before it joins it

		serve(func(r *http.Request) (*http.Response, error) {
			time.Sleep(time.Second)
			return answer(keySetJSON(published("A", &keyA().PublicKey)))
		})
		expect(t, v, unknown, policy.ReasonKeysUnavailable) // the fetch takes too long
		time.Sleep(time.Second)
		expect(t, v, unknown, policy.ReasonTokenUnknownKey) // but has completed since
		time.Sleep(time.Minute)
	})
}

func TestLastGoodKeysUntilMaxStale(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var down atomic.Bool
		var stale atomic.Int32
		v := start(t, Config{Event: func(e Event) {
			if e.Kind == EventStale {
				if e.Age < staleAfter {
					t.Errorf("alarm at an age of %v", e.Age)
				}
				stale.Add(1)
			}
		}}, func(*http.Request) (*http.Response, error) {
			if down.Load() {
				return nil, errors.New("down")
			}
			return answer(keySetJSON(published("A", &keyA().PublicKey)))
		})
		ctx, cancel := context.WithCancel(context.Background())
		ended := make(chan error, 1)
		go func() { ended <- v.Run(ctx) }()
		raw, fresh := user(longLived()), user(longLived().with("uti", `"fresh"`))

		time.Sleep(48 * time.Hour) // refreshed every 12 hours
		down.Store(true)
		expect(t, v, raw, "")
		time.Sleep(11 * time.Hour)
		if stale.Load() != 0 || v.Status()[0].Stale {
			t.Error("alarm before a day")
		}
		time.Sleep(25 * time.Hour)
		if stale.Load() == 0 || !v.Status()[0].Stale {
			t.Error("no alarm after a day")
		}
		expect(t, v, raw, "")
		time.Sleep(5 * 24 * time.Hour)
		expect(t, v, fresh, "")
		time.Sleep(24 * time.Hour)
		expect(t, v, raw, policy.ReasonKeysUnavailable) // cached, but the keys are too old
		if v.Ready() {
			t.Error("ready with keys older than max stale")
		}

		down.Store(false)
		time.Sleep(backoffMax)
		expect(t, v, raw, "")

		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run = %v", err)
		}
		if err := v.Run(context.Background()); err == nil {
			t.Error("second Run: no error")
		}
		if err := v.Refresh(context.Background()); err == nil {
			t.Error("Refresh after Run: no error")
		}
	})
}

func TestRunEndsWhileAFetchHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := start(t, Config{}, hang)
		ctx, cancel := context.WithCancel(context.Background())
		ended := make(chan error)
		go func() { ended <- v.Run(ctx) }()
		synctest.Wait()
		began := time.Now()
		cancel()
		<-ended
		if waited := time.Since(began); waited != 0 {
			t.Errorf("Run ended after %v", waited)
		}
	})
}

func TestKeptKeysSurviveARestart(t *testing.T) {
	keys := serveKeys(t, published("A", &keyA().PublicKey))
	setup := func(t *testing.T) (string, Config) {
		dir := t.TempDir()
		cfg := Config{Authority: keys.URL, Tenants: []string{tid}, Dir: dir}
		mustRefresh(t, newVerifier(t, cfg))
		cfg.Client = &http.Client{Transport: roundTripper(func(*http.Request) (*http.Response, error) { return nil, errors.New("no network") })}
		return filepath.Join(dir, "keys-"+tid+"-v1.json"), cfg
	}
	edit := func(path, old, new string) error {
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		changed := strings.Replace(string(text), old, new, 1)
		if changed == string(text) {
			return fmt.Errorf("no %s in it", old)
		}
		return os.WriteFile(path, []byte(changed), 0o600)
	}
	kept := noon.UTC().Format(time.RFC3339)
	for _, tt := range []struct {
		name   string
		change func(path string, cfg *Config) error
		want   policy.Reason
	}{
		{"as it was", func(string, *Config) error { return nil }, ""},
		{"written by the group", func(path string, _ *Config) error { return os.Chmod(path, 0o620) }, policy.ReasonKeysUnavailable},
		{"written by anyone", func(path string, _ *Config) error { return os.Chmod(path, 0o606) }, policy.ReasonKeysUnavailable},
		{"a link", func(path string, _ *Config) error {
			return errors.Join(os.Rename(path, path+"x"), os.Symlink(path+"x", path))
		}, policy.ReasonKeysUnavailable},
		{"of another tenant", func(path string, _ *Config) error { return edit(path, tid, other) }, policy.ReasonKeysUnavailable},
		{"of another version", func(path string, _ *Config) error { return edit(path, `"1.0"`, `"2.0"`) }, policy.ReasonKeysUnavailable},
		{"of another authority", func(_ string, cfg *Config) error { cfg.Authority += "/x"; return nil }, policy.ReasonKeysUnavailable},
		{"too old", func(path string, _ *Config) error {
			return edit(path, kept, noon.Add(-8*24*time.Hour).UTC().Format(time.RFC3339))
		}, policy.ReasonKeysUnavailable},
		{"old but not too old", func(path string, _ *Config) error {
			return edit(path, kept, noon.Add(-6*24*time.Hour).UTC().Format(time.RFC3339))
		}, ""},
		{"of the future", func(path string, _ *Config) error {
			return edit(path, kept, noon.Add(time.Hour).UTC().Format(time.RFC3339))
		}, policy.ReasonKeysUnavailable},
		{"cut off", func(path string, _ *Config) error { return os.Truncate(path, 100) }, policy.ReasonKeysUnavailable},
		{"gone", func(path string, _ *Config) error { return os.Remove(path) }, policy.ReasonKeysUnavailable},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path, cfg := setup(t)
			if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
				t.Fatalf("kept file: %v, %v; want mode 0600", info, err)
			}
			if err := tt.change(path, &cfg); err != nil {
				t.Fatal(err)
			}
			told := 0
			cfg.Event = func(e Event) {
				if e.Kind == EventNotKept {
					told++
				}
			}
			v := newVerifier(t, cfg)
			ignored := tt.want != "" && tt.name != "gone"
			if ignored != (told > 0) {
				t.Errorf("told of %d ignored files", told)
			}
			expect(t, v, user(userClaims()), tt.want)
		})
	}
}

func TestUnwritableDirIsTold(t *testing.T) {
	keys := serveKeys(t, published("A", &keyA().PublicKey))
	var told atomic.Int32
	v := newVerifier(t, Config{Authority: keys.URL, Dir: filepath.Join(t.TempDir(), "missing"), Event: func(e Event) {
		if e.Kind == EventNotKept {
			told.Add(1)
		}
	}})
	mustRefresh(t, v)
	if told.Load() != 2 {
		t.Errorf("told %d times, want 2", told.Load())
	}
	expect(t, v, user(userClaims()), "")
}
