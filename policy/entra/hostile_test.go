package entra

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/partnerguard/partnerguard/policy"
)

// keyServer is a real server whose answers can be exchanged.
type keyServer struct {
	*httptest.Server
	handler atomic.Pointer[http.HandlerFunc]
}

func newKeyServer(t testing.TB, h http.HandlerFunc) *keyServer {
	s := &keyServer{}
	s.handler.Store(&h)
	s.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { (*s.handler.Load())(w, r) }))
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.Start()
	t.Cleanup(s.Close)
	return s
}

func writes(body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, body) }
}

// raw answers with bytes that are no HTTP that net/http would write.
func raw(text string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		c, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			panic(err)
		}
		defer c.Close()
		io.WriteString(c, text)
	}
}

// Whatever the key endpoint answers, the last good keys stay, what is read of it is
// bounded, and the event says what was wrong.
func TestHostileKeySets(t *testing.T) {
	a := published("A", &keyA().PublicKey)
	good := keySetJSON(a)
	var trapped atomic.Int32
	trap := newKeyServer(t, func(w http.ResponseWriter, r *http.Request) {
		trapped.Add(1)
		io.WriteString(w, keySetJSON(published("A", &keyB().PublicKey)))
	})
	members := func(n int, member string) string {
		return `{"keys":[` + strings.Repeat(member+",", n-1) + member + `]}`
	}
	var tenThousand []jwk
	for i := range 10_000 {
		tenThousand = append(tenThousand, jwk{"kty": "RSA", "kid": fmt.Sprint(i), "n": "AQAB", "e": "AQAB"})
	}
	odd := new(big.Int).SetBit(big.NewInt(1), 65536, 1)
	redirect := func(to func(r *http.Request) string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, to(r), http.StatusFound) }
	}

	for _, tt := range []struct {
		name  string
		serve http.HandlerFunc
		says  string
	}{
		{"50 MB of spaces after good keys", func(w http.ResponseWriter, _ *http.Request) {
			io.WriteString(w, good)
			for range 50 {
				if _, err := w.Write(bytes.Repeat([]byte(" "), 1<<20)); err != nil {
					return
				}
			}
		}, "more than 1048576 bytes"},
		{"50 MB of keys", func(w http.ResponseWriter, _ *http.Request) {
			io.WriteString(w, `{"keys":[`)
			for {
				if _, err := io.WriteString(w, jsonOf(a)+","); err != nil {
					return
				}
			}
		}, "more than 1048576 bytes"},
		{"10,000 keys", writes(keySetJSON(tenThousand...)), "more than 100 keys"},
		{"half a million keys of one byte", writes(members(500_000, "0")), "more than 100 keys"},
		{"101 good keys", writes(members(101, jsonOf(a))), "more than 100 keys"},
		{"an empty object", writes(`{}`), "no single array of keys"},
		{"no keys", writes(`{"keys":[]}`), "no usable key"},
		{"keys null", writes(`{"keys":null}`), "no single array of keys"},
		{"keys an object", writes(`{"keys":` + jsonOf(a) + `}`), "no single array of keys"},
		{"keys twice", writes(strings.Replace(good, "{", `{"keys":[],`, 1)), "no single array of keys"},
		{"keys twice by case", writes(strings.Replace(good, "{", `{"Keys":[],`, 1)), "no single array of keys"},
		{"a lone Keys", writes(strings.Replace(good, "keys", "Keys", 1)), "no single array of keys"},
		{"null", writes(`null`), "not a JSON Web Key Set"},
		{"an array", writes(`[` + jsonOf(a) + `]`), "not a JSON Web Key Set"},
		{"nothing", writes(``), "not a JSON Web Key Set"},
		{"HTML", writes("<!doctype html><title>Sign in</title>"), "not a JSON Web Key Set"},
		{"JSON cut off", writes(good[:len(good)-3]), "not a JSON Web Key Set"},
		{"text after it", writes(good + good), "not a JSON Web Key Set"},
		{"not UTF-8", writes(strings.Replace(good, `"use"`, "\"\xff\"", 1)), "not a JSON Web Key Set"},
		{"half a million brackets", writes(strings.Repeat("[", 500_000)), "not a JSON Web Key Set"},
		{"a nested array of 100,000", writes(`{"keys":[{"x":` + strings.Repeat("[", 100_000)), "not a JSON Web Key Set"},
		{"10,000 members beside the keys", writes(good[:len(good)-1] + strings.Repeat(`,"x":1`, 10_000) + "}"), "not a JSON Web Key Set"},
		{"RSA of 1024 bits", writes(keySetJSON(published("A", &keyWeak().PublicKey))), "no usable key"},
		{"RSA of 4104 bits", writes(keySetJSON(a.with("n", b64(append(append([]byte{0x80}, make([]byte, 511)...), 1))))), "no usable key"},
		{"RSA of 16384 bits", writes(keySetJSON(a.with("n", b64(append([]byte{0x80}, make([]byte, 2047)...))))), "no usable key"},
		{"an exponent of 65,537 bits", writes(keySetJSON(a.with("e", b64(odd.Bytes())))), "no usable key"},
		{"an exponent of 64 bits", writes(keySetJSON(a.with("e", b64([]byte{255, 255, 255, 255, 255, 255, 255, 255})))), "no usable key"},
		{"an exponent of 32 bits", writes(keySetJSON(a.with("e", b64([]byte{255, 255, 255, 255})))), "no usable key"},
		{"an exponent of 1", writes(keySetJSON(a.with("e", b64([]byte{1})))), "no usable key"},
		{"an even exponent", writes(keySetJSON(a.with("e", b64([]byte{4})))), "no usable key"},
		{"no exponent", writes(keySetJSON(a.with("e", ""))), "no usable key"},
		{"an even modulus", writes(keySetJSON(a.with("n", b64(new(big.Int).Lsh(big.NewInt(3), 2046).Bytes())))), "no usable key"},
		{"two keys of one kid", writes(keySetJSON(a, published("A", &keyB().PublicKey))), "no usable key"},
		{"a kid of 900 KB", writes(keySetJSON(a.with("kid", strings.Repeat("A", 900_000)))), "no usable key"},
		{"a kid of 1 MB", writes(keySetJSON(a.with("kid", strings.Repeat("A", 1<<20)))), "more than 1048576 bytes"},
		{"a kid with a line break", writes(keySetJSON(a.with("kid", "A\n"))), "no usable key"},
		{"a kid that is no string", writes(keySetJSON(a.with("kid", []string{"A"}))), "no usable key"},
		{"no kid", writes(keySetJSON(a.with("kid", ""))), "no usable key"},
		{"a key for encryption", writes(keySetJSON(a.with("use", "enc"))), "no usable key"},
		{"a key for another operation", writes(keySetJSON(a.with("key_ops", []string{"encrypt"}))), "no usable key"},
		{"a modulus not in base64url", writes(keySetJSON(a.with("n", "!!"))), "no usable key"},
		{"a key of another algorithm", writes(keySetJSON(a.with("alg", "PS256"))), "no usable key"},
		{"a symmetric key", writes(keySetJSON(jwk{"kty": "oct", "kid": "A", "k": "c2VjcmV0"})), "no usable key"},
		{"status 500 with good keys", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500); io.WriteString(w, good) }, "status 500"},
		{"status 203 with good keys", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(203); io.WriteString(w, good) }, "status 203"},
		{"status 204", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(204) }, "status 204"},
		{"status http.StatusTooManyRequests", func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "slow down", http.StatusTooManyRequests) }, "status 429"},
		{"a redirect to another host", redirect(func(*http.Request) string { return trap.URL + "/keys" }), "status 302"},
		{"a redirect loop", redirect(func(r *http.Request) string { return r.URL.Path }), "status 302"},
		{"a redirect to a file", redirect(func(*http.Request) string { return "file:///etc/passwd" }), "status 302"},
		{"good keys in gzip that nobody asked for", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Encoding", "gzip")
			z := gzip.NewWriter(w)
			io.WriteString(z, good)
			z.Close()
		}, "not a JSON Web Key Set"},
		{"1 GiB in gzip", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Encoding", "gzip")
			writeBomb(w)
		}, "more than 1048576 bytes"},
		{"a body cut short", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", fmt.Sprint(len(good)+1))
			io.WriteString(w, good)
		}, "unexpected EOF"},
		{"no HTTP", raw(strings.Repeat("x", 3000) + "\r\n\r\n"), "malformed HTTP"},
		{"endless headers", raw("HTTP/1.1 200 OK\r\n" + strings.Repeat("X: "+strings.Repeat("y", 1000)+"\r\n", 1000) + "\r\n"), "header"},
		{"endless 1xx", raw(strings.Repeat("HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n", 10_000)), ""},
		{"a connection that breaks", raw(""), "EOF"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			keys := newKeyServer(t, writes(good))
			var mu sync.Mutex
			var told []Event
			v := newVerifier(t, Config{Authority: keys.URL, Tenants: []string{tid}, Event: func(e Event) {
				mu.Lock()
				defer mu.Unlock()
				told = append(told, e)
			}})
			mustRefresh(t, v)
			expect(t, v, user(userClaims()), "")
			told = nil

			keys.handler.Store(&tt.serve)
			var err error
			// The server runs in the same process; what it writes is not counted with the
			// client's care, so the bound is a generous multiple of the two bodies.
			if n := allocated(func() { err = v.Refresh(context.Background()) }); n > 32<<20 {
				t.Errorf("%d MiB were allocated", n>>20)
			}
			if err == nil || !strings.Contains(err.Error(), tt.says) || !strings.Contains(err.Error(), keys.URL) || len(err.Error()) > 1000 {
				t.Errorf("Refresh = %v; want %q", err, tt.says)
			}
			expect(t, v, user(userClaims()), "")                                                       // remembered
			expect(t, v, user(userClaims().with("uti", `"fresh"`)), "")                                // verified anew
			expect(t, v, sign(keyB(), headerA, userClaims().String()), policy.ReasonTokenBadSignature) // by key A
			mu.Lock()
			defer mu.Unlock()
			for _, e := range told {
				if e.Kind != EventFailed || e.Tenant != tid || e.Keys != 1 || e.Err == nil || !strings.Contains(e.Err.Error(), tt.says) {
					t.Errorf("event = %+v", e)
				}
			}
			if len(told) != 2 {
				t.Errorf("%d events, want 2", len(told))
			}
			for _, s := range v.Status() {
				if s.LastError == nil || s.Keys != 1 || !s.Usable || s.Stale || !s.FetchedAt.Equal(noon) {
					t.Errorf("status = %+v", s)
				}
			}
		})
	}
	if n := trapped.Load(); n != 0 {
		t.Errorf("%d redirects were followed", n)
	}
}

// writeBomb writes 1 MB of gzip that holds 1 GiB of spaces.
func writeBomb(w io.Writer) {
	var member bytes.Buffer // gzip is any number of these
	z := gzip.NewWriter(&member)
	z.Write(bytes.Repeat([]byte(" "), 1<<20))
	z.Close()
	for range 1 << 10 {
		if _, err := w.Write(member.Bytes()); err != nil {
			return
		}
	}
}

// A client that unpacks by itself does not unpack a bomb.
func TestGzipBombForAGivenClient(t *testing.T) {
	keys := newKeyServer(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Encoding", "gzip")
		writeBomb(w)
	})
	v := newVerifier(t, Config{Authority: keys.URL, Tenants: []string{tid}, Client: &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}})
	if err := v.Refresh(context.Background()); err == nil || !strings.Contains(err.Error(), "more than 1048576 bytes") {
		t.Errorf("Refresh = %v", err)
	}
}

// Key sets that are odd but say the same to every reader are used.
func TestOddKeySetsThatAreUsed(t *testing.T) {
	a := published("A", &keyA().PublicKey)
	weak := published("W", &keyWeak().PublicKey)
	for name, serve := range map[string]http.HandlerFunc{
		"another content type": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "text/html")
			io.WriteString(w, keySetJSON(a))
		},
		"missing issuer":                 writes(keySetJSON(a)),
		"the same key twice":             writes(keySetJSON(a, a)),
		"a weak key beside":              writes(keySetJSON(weak, a)),
		"a kid of 900 KB beside":         writes(keySetJSON(a, a.with("kid", strings.Repeat("B", 900_000)))),
		"keys of other kinds beside":     writes(keySetJSON(jwk{"kty": "EC", "kid": "E", "crv": "P-256", "x": "AA", "y": "AA"}, jwk{"kty": 7}, a)),
		"unread members":                 writes(strings.Replace(keySetJSON(a), "{", `{"next":"https://evil.example/","x":[[],{"keys":[]}],`, 1)),
		"certificates that nobody reads": writes(keySetJSON(a.with("x5c", []string{"AAAA"}).with("x5u", "https://evil.example/"))),
	} {
		keys := newKeyServer(t, serve)
		v := newVerifier(t, Config{Authority: keys.URL, Tenants: []string{tid}})
		if err := v.Refresh(context.Background()); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		expect(t, v, user(userClaims()), "")
	}
	// A key of another issuer is listed, but signs nothing for ours.
	keys := newKeyServer(t, writes(keySetJSON(a.with("issuer", strings.Replace(issV2, tid, other, 1)))))
	v := newVerifier(t, Config{Authority: keys.URL, Tenants: []string{tid}})
	expect(t, v, user(userClaims()), policy.ReasonTokenWrongIssuer)
}

// pipes are connections without a network, for real HTTP in synthetic time.
type pipes struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.done:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error   { p.once.Do(func() { close(p.done) }); return nil }
func (p *pipes) Addr() net.Addr { return &net.TCPAddr{} }

func (p *pipes) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	ours, theirs := net.Pipe()
	select {
	case p.conns <- theirs:
		return ours, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// slowly runs f with a Verifier in synthetic time whose own client fetches keys by
// HTTP from h.
func slowly(t *testing.T, h http.HandlerFunc, cfg Config, f func(v *Verifier)) {
	synctest.Test(t, func(t *testing.T) {
		p := &pipes{conns: make(chan net.Conn), done: make(chan struct{})}
		server := &http.Server{Handler: h, ErrorLog: log.New(io.Discard, "", 0)}
		served := make(chan struct{})
		go func() { defer close(served); server.Serve(p) }()
		cfg.Authority, cfg.Tenants, cfg.Now = "http://127.0.0.1", []string{tid}, time.Now
		v := newVerifier(t, cfg)
		v.client.Transport.(*http.Transport).DialContext = p.dial
		f(v)
		time.Sleep(time.Minute) // for all that may still be under way
		server.Close()
		<-served
		synctest.Wait()
	})
}

// A key endpoint that is slow in any way costs a caller 250 ms at most, and a fetch
// ten seconds; the last good keys stay.
func TestSlowKeyEndpoints(t *testing.T) {
	good := keySetJSON(published("A", &keyA().PublicKey))
	drip := func(w http.ResponseWriter, text string, every time.Duration) {
		for i := range len(text) {
			if _, err := io.WriteString(w, text[i:i+1]); err != nil {
				return
			}
			http.NewResponseController(w).Flush()
			time.Sleep(every)
		}
	}
	for _, tt := range []struct {
		name string
		slow http.HandlerFunc
		ends time.Duration
	}{
		{"a dripping body", func(w http.ResponseWriter, _ *http.Request) { drip(w, good, time.Second) }, fetchTimeout},
		{"a body that stops", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", fmt.Sprint(len(good)))
			drip(w, good[:10], 0)
			<-r.Context().Done()
		}, fetchTimeout},
		{"headers that never come", func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }, 5 * time.Second},
		{"1xx that never end", func(w http.ResponseWriter, r *http.Request) {
			for range 60 {
				w.WriteHeader(http.StatusEarlyHints)
				time.Sleep(time.Second)
			}
		}, fetchTimeout},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var slow atomic.Bool
			slowly(t, func(w http.ResponseWriter, r *http.Request) {
				if slow.Load() {
					tt.slow(w, r)
					return
				}
				io.WriteString(w, good)
			}, Config{}, func(v *Verifier) {
				mustRefresh(t, v)
				slow.Store(true)
				time.Sleep(10 * time.Minute)
				raw, unknown := user(longLived()), sign(keyB(), `{"alg":"RS256","kid":"B"}`, longLived().String())

				began := time.Now()
				expect(t, v, unknown, policy.ReasonKeysUnavailable)
				if waited := time.Since(began); waited != fetchWait {
					t.Errorf("a caller with an unknown kid waited %v, want %v", waited, fetchWait)
				}
				began = time.Now()
				expect(t, v, raw, "")
				if waited := time.Since(began); waited != 0 {
					t.Errorf("a caller with a known kid waited %v", waited)
				}
				began = time.Now()
				if err := v.Refresh(context.Background()); err == nil {
					t.Error("Refresh: no error")
				}
				if waited := time.Since(began) + fetchWait; waited > tt.ends {
					t.Errorf("the fetch took %v, want %v", waited, tt.ends)
				}
				expect(t, v, raw, "")
			})
		})
	}
	t.Run("a body that drips but ends in time", func(t *testing.T) {
		slowly(t, func(w http.ResponseWriter, _ *http.Request) { drip(w, good, 10*time.Millisecond) }, Config{}, func(v *Verifier) {
			mustRefresh(t, v)
			expect(t, v, user(longLived()), "")
		})
	})
}

// Keys that were rotated are seen with the first token, by one fetch for a thousand
// callers at the same time. A machine that is busy with other things may be slower now
// and then, not always; the count of fetches is never another.
func TestRotationIsSeenAtOnce(t *testing.T) {
	var raws []string
	for i := range 20 {
		raws = append(raws, sign(keyB(), `{"alg":"RS256","kid":"B"}`, userClaims().with("uti", fmt.Sprintf(`"%d"`, i)).String()))
	}
	var took time.Duration
	var err error
	for range 12 {
		if took, err = rotate(t, raws); err == nil && took <= 300*time.Millisecond {
			return
		}
	}
	t.Errorf("the first token was verified after %v; not verified: %v", took, err)
}

// rotate returns how long it took until the first of many callers had a token
// verified by a key that was just published, and why one had not.
func rotate(t *testing.T, raws []string) (time.Duration, error) {
	var fetches atomic.Int32
	keys := newKeyServer(t, writes(keySetJSON(published("A", &keyA().PublicKey))))
	v := newVerifier(t, Config{Authority: keys.URL, Tenants: []string{tid}})
	mustRefresh(t, v)
	rotated := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		fetches.Add(1)
		time.Sleep(20 * time.Millisecond) // as far as Entra is
		io.WriteString(w, keySetJSON(published("A", &keyA().PublicKey), published("B", &keyB().PublicKey)))
	})
	keys.handler.Store(&rotated)

	var ready, done sync.WaitGroup
	begin := make(chan struct{})
	first, failed := make(chan time.Time, 1), make(chan error, 1)
	ready.Add(1000)
	for i := range 1000 {
		done.Go(func() {
			ready.Done()
			<-begin
			var err error
			for range 40 { // each waits for 250 ms at most
				if _, err = v.Verify(context.Background(), raws[i%len(raws)], audiences); err == nil {
					break
				}
			}
			if err != nil {
				select {
				case failed <- err:
				default:
				}
				return
			}
			select {
			case first <- time.Now():
			default:
			}
		})
	}
	ready.Wait()
	began := time.Now()
	close(begin)
	done.Wait()
	settle(v)
	if n := fetches.Load(); n != 2 {
		t.Errorf("%d requests, want 2: one of each endpoint", n)
	}
	select {
	case err := <-failed: // the fetch itself took too long
		return 0, err
	default:
		return (<-first).Sub(began), nil
	}
}

// A flood of invented kids at one tenant takes nothing from another, and one kid by
// itself, however often it comes, nothing from its own tenant.
func TestFloodsOfKids(t *testing.T) {
	keys := serveKeys(t, published("A", &keyA().PublicKey))
	v := newVerifier(t, Config{Authority: keys.URL, Tenants: []string{tid, other}})
	mustRefresh(t, v)
	claimsOf := func(id string) string {
		return userClaims().with("tid", `"`+id+`"`).with("iss", `"https://sts.windows.net/`+id+`/"`).String()
	}

	// One kid, as of a program that goes on with a token of a key long gone.
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 100 {
				expect(t, v, sign(keyA(), `{"alg":"RS256","kid":"gone"}`, claimsOf(tid)), policy.ReasonTokenUnknownKey)
			}
		})
	}
	wg.Wait()
	if n := keys.count("/"+tid+"/discovery/keys") - 1; n != 1 {
		t.Errorf("%d fetches for one kid, want 1", n)
	}
	keys.serve(keySetJSON(published("A", &keyA().PublicKey), published("B", &keyB().PublicKey)))
	expect(t, v, sign(keyB(), `{"alg":"RS256","kid":"B"}`, claimsOf(tid)), "")

	// A thousand kids.
	keys.serve(keySetJSON(published("A", &keyA().PublicKey)))
	mustRefresh(t, v)
	before := keys.count("/" + other + "/discovery/keys")
	signature := strings.Split(user(userClaims()), ".")[2]
	for i := range 1000 {
		header := b64(fmt.Appendf(nil, `{"alg":"RS256","kid":"Z%d"}`, i))
		expect(t, v, header+"."+b64([]byte(claimsOf(tid)))+"."+signature, policy.ReasonTokenUnknownKey)
	}
	if n := keys.count("/"+tid+"/discovery/keys") - 3; n > fetchBurst {
		t.Errorf("%d fetches by a flood, want at most %d", n, fetchBurst)
	}
	if n := keys.count("/"+other+"/discovery/keys") - before; n != 0 {
		t.Errorf("the flood caused %d fetches of another tenant", n)
	}
	keys.serve(keySetJSON(published("A", &keyA().PublicKey), published("B", &keyB().PublicKey)))
	expect(t, v, sign(keyB(), `{"alg":"RS256","kid":"B"}`, claimsOf(tid)), policy.ReasonTokenUnknownKey) // the budget is spent
	expect(t, v, sign(keyB(), `{"alg":"RS256","kid":"B"}`, claimsOf(other)), "")                         // theirs is not
}

// A kid asked for in vain may be asked for again after half a minute, or as soon as
// a fetch for it failed.
func TestKidAskedInVain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var fetches atomic.Int32
		var down atomic.Bool
		v := start(t, Config{}, func(*http.Request) (*http.Response, error) {
			fetches.Add(1)
			if down.Load() {
				return nil, errors.New("down")
			}
			return answer(keySetJSON(published("A", &keyA().PublicKey)))
		})
		unknown := sign(keyB(), `{"alg":"RS256","kid":"B"}`, longLived().String())
		count := func(want int32) {
			t.Helper()
			synctest.Wait()
			if n := fetches.Swap(0); n != want {
				t.Errorf("%d requests, want %d", n, want)
			}
		}
		expect(t, v, unknown, policy.ReasonTokenUnknownKey)
		count(2)
		for range 29 {
			time.Sleep(time.Second)
			expect(t, v, unknown, policy.ReasonTokenUnknownKey)
		}
		count(0)
		time.Sleep(time.Second)
		expect(t, v, unknown, policy.ReasonTokenUnknownKey)
		count(2)

		time.Sleep(10 * time.Minute)
		down.Store(true)
		for range 2 {
			expect(t, v, unknown, policy.ReasonKeysUnavailable)
			count(2)
		}
		down.Store(false)
		expect(t, v, unknown, policy.ReasonTokenUnknownKey)
		count(2)
	})
}

// Withdrawn keys, and what is remembered of tokens they signed, go with the next
// refresh by itself; nobody needs to ask.
func TestWithdrawnKeyIsGoneWithinTheInterval(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var withdrawn atomic.Bool
		v := start(t, Config{Refresh: time.Hour}, func(*http.Request) (*http.Response, error) {
			if withdrawn.Load() {
				return answer(keySetJSON(published("B", &keyB().PublicKey)))
			}
			return answer(keySetJSON(published("A", &keyA().PublicKey), published("B", &keyB().PublicKey)))
		})
		ctx, cancel := context.WithCancel(context.Background())
		ended := make(chan error, 1)
		go func() { ended <- v.Run(ctx) }()
		synctest.Wait()
		raw, rawB := user(longLived()), sign(keyB(), `{"alg":"RS256","kid":"B"}`, longLived().String())
		expect(t, v, raw, "")
		expect(t, v, rawB, "")
		withdrawn.Store(true)
		time.Sleep(40 * time.Minute) // the interval is 48 minutes at least
		expect(t, v, raw, "")
		time.Sleep(20 * time.Minute)
		synctest.Wait()
		expect(t, v, raw, policy.ReasonTokenUnknownKey)
		expect(t, v, rawB, "")
		cancel()
		<-ended
	})
}

// Whoever comes after a fetch has failed starts anew; nobody gets the answer of a
// fetch that was over when they came.
func TestNobodyJoinsAFetchThatIsOver(t *testing.T) {
	var up atomic.Bool
	told, resume := make(chan struct{}), make(chan struct{})
	var once sync.Once
	v := newVerifier(t, Config{
		Tenants: []string{tid},
		Client: &http.Client{Transport: roundTripper(func(r *http.Request) (*http.Response, error) {
			if !up.Load() {
				return nil, errors.New("connection refused")
			}
			return answer(keySetJSON(published("A", &keyA().PublicKey)))
		})},
		Event: func(e Event) {
			if e.Kind == EventFailed && e.Version == "1.0" {
				once.Do(func() { close(told); <-resume })
			}
		},
	})
	expect(t, v, user(userClaims()), policy.ReasonKeysUnavailable)
	<-told // the failed fetch is not quite at its end
	up.Store(true)
	expect(t, v, user(userClaims()), "")
	close(resume)
	mustRefresh(t, v)
}

// An endpoint that hangs does not keep the other one from being tried again.
func TestFailedEndpointIsTriedAgainWhileTheOtherHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var up atomic.Bool
		v := start(t, Config{}, func(r *http.Request) (*http.Response, error) {
			switch {
			case r.URL.Path == pathV2:
				return hang(r)
			case !up.Load():
				return nil, errors.New("connection refused")
			}
			return answer(keySetJSON(published("A", &keyA().PublicKey)))
		})
		expect(t, v, user(longLived()), policy.ReasonKeysUnavailable)
		up.Store(true)
		began := time.Now()
		expect(t, v, user(longLived()), "")
		if waited := time.Since(began); waited != 0 {
			t.Errorf("waited %v", waited)
		}
		time.Sleep(fetchTimeout)
	})
}

// A disk so slow that it comes to the keys of a fetch after those of the next keeps
// the newer ones.
func TestSlowDiskKeepsTheNewestKeys(t *testing.T) {
	old := keySetJSON(published("A", &keyA().PublicKey))
	keys := newKeyServer(t, writes(old))
	dir := t.TempDir()
	v := newVerifier(t, Config{Authority: keys.URL, Tenants: []string{tid}, Dir: dir})
	mustRefresh(t, v)
	s := &v.tenants[tid].sources[0]
	first := s.set.Load()
	next := writes(keySetJSON(published("B", &keyA().PublicKey)))
	keys.handler.Store(&next)
	mustRefresh(t, v)

	v.keep(s, first, []byte(old))
	text, err := os.ReadFile(filepath.Join(dir, "keys-"+tid+"-v1.json"))
	if err != nil || !strings.Contains(string(text), `"kid":"B"`) {
		t.Errorf("kept: %s, %v; want key B", text, err)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, ".keys-*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// With a clock ten minutes off, tokens fail by time only at their ends, and the keys
// are none the older for it.
func TestClockTenMinutesOff(t *testing.T) {
	keys := serveKeys(t, published("A", &keyA().PublicKey))
	const minute = 60
	for _, tt := range []struct {
		name  string
		clock int64 // by the guard, in seconds after the token was issued
		want  policy.Reason
	}{
		{"ten minutes slow, a token just issued", -10 * minute, policy.ReasonTokenNotYetValid},
		{"ten minutes slow, a token six minutes old", -4 * minute, ""},
		{"ten minutes slow, a token at its end", 55 * minute, ""},
		{"ten minutes fast, a token just issued", 10 * minute, ""},
		{"ten minutes fast, a token six minutes before its end", 69 * minute, ""},
		{"ten minutes fast, a token four minutes before its end", 71 * minute, policy.ReasonTokenExpired},
	} {
		c := &clock{at: time.Unix(issued+10*minute, 0)}
		v := newVerifier(t, Config{Authority: keys.URL, Tenants: []string{tid}, Now: c.now})
		mustRefresh(t, v)
		expect(t, v, user(userClaims()), "")
		before := keys.total()
		for _, raw := range []string{user(userClaims()), user(userClaims().with("uti", `"fresh"`))} {
			c.set(time.Unix(issued+tt.clock, 0))
			if _, got := verify(t, v, raw); got != tt.want {
				t.Errorf("%s: %q, want %q", tt.name, got, tt.want)
			}
		}
		if slices.ContainsFunc(v.Status(), func(s KeyStatus) bool { return s.Stale || !s.Usable }) || keys.total() != before {
			t.Errorf("%s: the keys are taken for old", tt.name)
		}
	}
}
