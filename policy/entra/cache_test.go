package entra

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/partnerguard/partnerguard/policy"
)

func TestCachedTokenIsCheckedAgain(t *testing.T) {
	keys := serveKeys(t, published("A", &keyA().PublicKey))
	c := &clock{at: noon}
	v := newVerifier(t, Config{Authority: keys.URL, Tenants: []string{tid}, Now: c.now})
	mustRefresh(t, v)
	both := user(userClaims().with("aud", `["`+aud+`","https://graph.microsoft.com"]`))
	raw := user(userClaims())
	expect(t, v, raw, "")
	expect(t, v, both, "")

	for _, list := range [][]string{nil, {""}, {"https://graph.microsoft.com"}} {
		tok, err := v.Verify(context.Background(), raw, list)
		if got := reasonOf(t, tok, err); got != policy.ReasonTokenWrongAudience {
			t.Errorf("for %q: %q, want wrong audience", list, got)
		}
	}
	tok, err := v.Verify(context.Background(), both, []string{"https://graph.microsoft.com"})
	if err != nil || tok.Audience != "https://graph.microsoft.com" {
		t.Errorf("a token of two audiences: %q, %v", tok.Audience, err)
	}

	c.set(time.Unix(expires+299, 0))
	expect(t, v, raw, "")
	c.set(time.Unix(expires+300, 0))
	expect(t, v, raw, policy.ReasonTokenExpired)
	c.set(time.Unix(issued-301, 0)) // the clock was set back
	expect(t, v, raw, policy.ReasonTokenNotYetValid)
	c.set(noon)
	expect(t, v, raw, "")

	later := user(userClaims().with("nbf", fmt.Sprint(noon.Unix())))
	expect(t, v, later, "")
	c.set(noon.Add(-301 * time.Second))
	expect(t, v, later, policy.ReasonTokenNotYetValid)
}

// A token that was good a moment ago is judged afresh by whatever changed since:
// where it is sent, the configuration, the keys, the time.
func TestRememberedTokenGetsAFreshVerdict(t *testing.T) {
	const graph = "https://graph.microsoft.com"
	type situation struct {
		*Verifier
		cfg       Config
		keys      *endpoint
		clock     *clock
		audiences []string
	}
	replaced := func(change func(cfg *Config)) func(*testing.T, *situation) {
		return func(t *testing.T, s *situation) {
			change(&s.cfg)
			s.cfg.Previous = s.Verifier
			s.Verifier = newVerifier(t, s.cfg)
		}
	}
	publish := func(keys ...jwk) func(*testing.T, *situation) {
		return func(t *testing.T, s *situation) { s.keys.serve(keySetJSON(keys...)); mustRefresh(t, s.Verifier) }
	}
	at := func(seconds int64) func(*testing.T, *situation) {
		return func(_ *testing.T, s *situation) { s.clock.set(time.Unix(seconds, 0)) }
	}
	to := func(audiences ...string) func(*testing.T, *situation) {
		return func(_ *testing.T, s *situation) { s.audiences = audiences }
	}
	a, b := published("A", &keyA().PublicKey), published("B", &keyB().PublicKey)
	nothing := func(*testing.T, *situation) {}

	for _, tt := range []struct {
		name   string
		change func(*testing.T, *situation)
		want   policy.Reason
		after  policy.MFA
	}{
		{"nothing changed", nothing, "", policy.MFAPresent},
		{"sent to another upstream", to(graph), policy.ReasonTokenWrongAudience, 0},
		{"sent to an upstream without audiences", to(), policy.ReasonTokenWrongAudience, 0},
		{"an audience was removed", to(audiences[1:]...), policy.ReasonTokenWrongAudience, 0},
		{"an audience was added", to(graph, aud), "", policy.MFAPresent},

		{"its tenant was removed", replaced(func(cfg *Config) { cfg.Tenants = []string{other} }), policy.ReasonTokenWrongTenant, 0},
		{"a tenant was added", replaced(func(cfg *Config) { cfg.Tenants = []string{tid, other} }), "", policy.MFAPresent},
		{"its proof of MFA was removed", replaced(func(cfg *Config) { cfg.MFAValues = []string{"ngcmfa"} }), "", policy.MFAAbsent},
		{"the cloud was changed", replaced(func(cfg *Config) { cfg.Cloud = China }), policy.ReasonTokenWrongIssuer, 0},
		{"the configuration was read again", replaced(func(*Config) {}), "", policy.MFAPresent},
		{"the leeway was removed, a minute after its end", func(t *testing.T, s *situation) {
			replaced(func(cfg *Config) { cfg.Leeway = -1 })(t, s)
			at(expires+60)(t, s)
		}, policy.ReasonTokenExpired, 0},
		{"keys may be stale for a minute only", func(t *testing.T, s *situation) {
			replaced(func(cfg *Config) { cfg.MaxStale = time.Minute })(t, s)
			s.keys.serve("error")
			s.clock.set(noon.Add(2 * time.Minute))
		}, policy.ReasonKeysUnavailable, 0},

		{"its key was withdrawn", publish(b), policy.ReasonTokenUnknownKey, 0},
		{"keys were rotated, its own is still there", publish(b, a), "", policy.MFAPresent},
		{"another key has its kid now", publish(published("A", &keyB().PublicKey)), policy.ReasonTokenBadSignature, 0},
		{"its key is another issuer's now", publish(a.with("issuer", strings.Replace(issV2, tid, other, 1))), policy.ReasonTokenWrongIssuer, 0},
		{"its key was withdrawn and published again", func(t *testing.T, s *situation) {
			publish(b)(t, s)
			publish(a)(t, s)
		}, "", policy.MFAPresent},
		{"its key was withdrawn, then the configuration read again", func(t *testing.T, s *situation) {
			publish(b)(t, s)
			replaced(func(*Config) {})(t, s)
		}, policy.ReasonTokenUnknownKey, 0},

		{"the last second", at(expires - 1), "", policy.MFAPresent},
		{"expired, within the leeway", at(expires + 299), "", policy.MFAPresent},
		{"expired, at the leeway", at(expires + 300), policy.ReasonTokenExpired, 0},
		{"expired long ago", at(expires + 86400), policy.ReasonTokenExpired, 0},
		{"the clock was set back, within the leeway", at(issued - 300), "", policy.MFAPresent},
		{"the clock was set back", at(issued - 301), policy.ReasonTokenNotYetValid, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := &situation{keys: serveKeys(t, a), clock: &clock{at: noon}, audiences: audiences}
			s.cfg = Config{Authority: s.keys.URL, Tenants: []string{tid}, Now: s.clock.now}
			s.Verifier = newVerifier(t, s.cfg)
			mustRefresh(t, s.Verifier)
			raw := user(userClaims())
			for range 2 {
				expect(t, s.Verifier, raw, "")
			}
			tt.change(t, s)
			for range 2 { // the second time, a new verdict is remembered
				tok, err := s.Verify(context.Background(), raw, s.audiences)
				if got := reasonOf(t, tok, err); got != tt.want || tok.MFA != tt.after {
					t.Errorf("Verify = MFA %s, %q; want %s, %q", tok.MFA, got, tt.after, tt.want)
				}
			}
		})
	}
}

func TestCacheIsBounded(t *testing.T) {
	c := newCache(1600) // 100 a shard
	content := make([]byte, 200)
	put := func(i int, until int64) [sha256.Size]byte {
		var n [8]byte
		binary.LittleEndian.PutUint64(n[:], uint64(i))
		hash := sha256.Sum256(n[:])
		copy(content, hash[:])
		c.put(&hash, content, until, 1000)
		return hash
	}
	var last [sha256.Size]byte
	for i := range 20_000 {
		last = put(i, 2000)
		if got := c.get(&last); string(got) != string(content) {
			t.Fatal("what was just put is not there")
		}
	}
	entries, bytes := 0, 0
	for i := range c.shards {
		s := &c.shards[i]
		entries += len(s.index)
		bytes += len(s.chunks) * chunkSize
		if s.first == 0 {
			t.Error("nothing was evicted")
		}
	}
	if entries > 1600 || entries < 100 || bytes > 4<<20 {
		t.Errorf("%d entries in %d bytes", entries, bytes)
	}
	c.drop(&last)
	if c.get(&last) != nil {
		t.Error("still there after drop")
	}
}

func TestChunkNumbersGoAround(t *testing.T) {
	c := newCache(16)
	for i := range c.shards {
		c.shards[i].first = 65530
	}
	content := make([]byte, chunkSize/5)
	for i := range 2000 {
		hash := sha256.Sum256(fmt.Append(nil, i))
		c.put(&hash, content, 2000, 1000)
		if c.get(&hash) == nil {
			t.Fatalf("entry %d is not there", i)
		}
	}
	if c.shards[0].first > 60000 {
		t.Error("the numbers did not go around")
	}
}

func TestExpiredChunksGo(t *testing.T) {
	c := newCache(160_000)
	for i := range 1000 {
		hash := sha256.Sum256(fmt.Append(nil, i))
		c.put(&hash, make([]byte, 300), 100, 50)
	}
	for i := range 1000 {
		hash := sha256.Sum256(fmt.Append(nil, "x", i))
		c.put(&hash, make([]byte, 300), 200, 150)
	}
	entries := 0
	for i := range c.shards {
		entries += len(c.shards[i].index)
	}
	if entries != 1000 {
		t.Errorf("%d entries, want the 1000 that have not expired", entries)
	}
}

// The tokens that the cache gives out are the caller's own.
func TestCachedTokenCannotBeChanged(t *testing.T) {
	v := withKeyA(t)
	raw := user(userClaims())
	first, _ := verify(t, v, raw)
	second, _ := verify(t, v, raw)
	second.AMR[0] = "changed"
	third, _ := verify(t, v, raw)
	if diff := cmp.Diff(first, third); diff != "" {
		t.Errorf("-first +third:\n%s", diff)
	}
}

func TestBadSignatureIsRememberedForAWhile(t *testing.T) {
	keys := serveKeys(t, published("A", &keyA().PublicKey))
	c := &clock{at: noon}
	v := newVerifier(t, Config{Authority: keys.URL, Tenants: []string{tid}, Now: c.now})
	mustRefresh(t, v)
	raw := sign(keyB(), headerA, userClaims().String())
	hash := sha256.Sum256([]byte(raw))
	remembered := func() bool {
		_, ok := v.refusals.get(&hash, v.tenants[tid].sources[0].set.Load().generation, c.now().Unix())
		return ok
	}
	expect(t, v, raw, policy.ReasonTokenBadSignature)
	if !remembered() {
		t.Error("not remembered")
	}
	expect(t, v, raw, policy.ReasonTokenBadSignature)
	c.set(noon.Add(30 * time.Second))
	if remembered() {
		t.Error("remembered for longer than 30 seconds")
	}
	expect(t, v, raw, policy.ReasonTokenBadSignature)
	keys.serve(keySetJSON(published("A", &keyB().PublicKey)))
	mustRefresh(t, v)
	if remembered() {
		t.Error("remembered for other keys")
	}
	expect(t, v, raw, "")

	for i := range 3 * maxRefusals {
		h := sha256.Sum256(fmt.Append(nil, i))
		v.refusals.put(&h, 1, policy.ReasonTokenBadSignature, c.now().Unix())
	}
	if n := len(v.refusals.young) + len(v.refusals.old); n > 2*maxRefusals {
		t.Errorf("%d refusals are kept", n)
	}
}

func TestOverload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := start(t, Config{}, func(*http.Request) (*http.Response, error) {
			return answer(keySetJSON(published("A", &keyA().PublicKey)))
		})
		mustRefresh(t, v)
		known, fresh := user(longLived()), user(longLived().with("uti", `"fresh"`))
		expect(t, v, known, "")
		for range cap(v.slots) {
			v.slots <- struct{}{}
		}

		began := time.Now()
		expect(t, v, known, "") // the cache needs no slot
		if time.Since(began) != 0 {
			t.Error("a cached token waited")
		}
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() { expect(t, v, fresh, policy.ReasonVerifyOverloaded) })
		}
		wg.Wait()
		if waited := time.Since(began); waited != slotWait {
			t.Errorf("callers waited %v, want %v", waited, slotWait)
		}

		// The first caller gives up while it holds the verification that others wait
		// for; they get their token all the same.
		ctx, cancel := context.WithCancel(context.Background())
		wg.Go(func() { v.Verify(ctx, fresh, audiences) })
		synctest.Wait()
		for range 10 {
			wg.Go(func() { expect(t, v, fresh, "") })
		}
		gone, leave := context.WithCancel(context.Background())
		wg.Go(func() {
			if _, err := v.Verify(gone, fresh, audiences); !errors.Is(err, context.Canceled) {
				t.Errorf("a waiting caller that gives up gets %v", err)
			}
		})
		synctest.Wait()
		cancel()
		leave()
		synctest.Wait()
		<-v.slots
		wg.Wait()
		if len(v.verifying) != 0 {
			t.Error("a verification was left behind")
		}
	})
}

func TestManyCallersManyTokens(t *testing.T) {
	v := newVerifier(t, Config{Authority: serveKeys(t, published("A", &keyA().PublicKey)).URL, Tenants: []string{tid}, CacheEntries: 32})
	mustRefresh(t, v)
	var raws []string
	for i := range 60 {
		raws = append(raws, user(userClaims().with("uti", fmt.Sprintf(`"%d"`, i))))
	}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for i := range 300 {
				n := i * 7 % len(raws)
				tok, err := v.Verify(context.Background(), raws[n], audiences)
				if err != nil || tok.UTI != fmt.Sprint(n) || !slices.Equal(tok.AMR, []string{"pwd", "mfa"}) {
					t.Errorf("token %d: %+v, %v", n, tok, err)
				}
			}
		})
	}
	wg.Wait()
}

func TestCachedPathAllocations(t *testing.T) {
	v := withKeyA(t)
	raw := user(userClaims())
	ctx := context.Background()
	run := func() {
		if _, err := v.Verify(ctx, raw, audiences); err != nil {
			t.Fatal(err)
		}
	}
	run()
	if n := testing.AllocsPerRun(200, run); n > 4 {
		t.Errorf("%v allocations, want at most 4", n)
	}
}

func BenchmarkVerifyCached(b *testing.B) {
	v := withKeyA(b)
	raw := user(userClaims().with("wids", `["`+strings.Repeat("x", 300)+`"]`))
	ctx := context.Background()
	b.ReportAllocs()
	for b.Loop() {
		if _, err := v.Verify(ctx, raw, audiences); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkVerifyUncached(b *testing.B) {
	v := withKeyA(b)
	raws := make([]string, 512)
	for i := range raws {
		raws[i] = user(userClaims().with("uti", fmt.Sprintf(`"%d"`, i)).with("wids", `["`+strings.Repeat("x", 300)+`"]`))
	}
	ctx := context.Background()
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		hash := sha256.Sum256([]byte(raws[i%len(raws)]))
		v.cache.drop(&hash)
		if _, err := v.Verify(ctx, raws[i%len(raws)], audiences); err != nil {
			b.Fatal(err)
		}
		i++
	}
}

// BenchmarkParts tells what the parts of a verification cost by themselves.
func BenchmarkParts(b *testing.B) {
	v := withKeyA(b)
	raw := user(userClaims().with("wids", `["`+strings.Repeat("x", 300)+`"]`))
	b.Run("hash", func(b *testing.B) {
		text := []byte(raw)
		for b.Loop() {
			sha256.Sum256(text)
		}
	})
	b.Run("read", func(b *testing.B) {
		buf := make([]byte, 0, maxToken)
		b.ReportAllocs()
		for b.Loop() {
			t := &token{raw: raw}
			if reason, err := t.read(buf); reason != "" {
				b.Fatal(err)
			}
		}
	})
	b.Run("signature", func(b *testing.B) {
		t := &token{raw: raw}
		if reason, err := t.read(nil); reason != "" {
			b.Fatal(err)
		}
		set := v.tenants[tid].sources[0].set.Load()
		b.ReportAllocs()
		for b.Loop() {
			if err := set.verify("A", t.signed, t.sig); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkVerifyRefused(b *testing.B) {
	v := withKeyA(b)
	raw := sign(keyB(), headerA, userClaims().String())
	ctx := context.Background()
	b.ReportAllocs()
	for b.Loop() {
		if _, err := v.Verify(ctx, raw, audiences); err == nil {
			b.Fatal("verified")
		}
	}
}

// BenchmarkCacheMemory reports what an entry costs in memory and a collection
// with 100,000 of them in time.
func BenchmarkCacheMemory(b *testing.B) {
	const entries = 100_000
	for b.Loop() {
		v := &Verifier{cloud: &clouds[Global], cache: newCache(entries)}
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		p := policy.Token{TenantID: tid, AppID: appID, ObjectID: userID, UPN: "sam@contoso-partner.example", Audience: aud, AppAuth: "1",
			UTI: "EJwqP017IU6myA1eH3CLAA", AMR: []string{"pwd", "mfa"}, ExpiresAt: expires}
		t := &token{version: v1, key: &key{}, now: noon}
		for i := range entries {
			t.hash = sha256.Sum256(fmt.Append(nil, i))
			v.remember(t, &p)
		}
		began := time.Now()
		runtime.GC()
		b.ReportMetric(float64(time.Since(began).Microseconds()), "gc-µs")
		runtime.ReadMemStats(&after)
		b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/entries, "B/entry")
		runtime.KeepAlive(v)
	}
}
