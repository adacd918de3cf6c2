package entra

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/partnerguard/partnerguard/policy"
)

const (
	tid    = "1b2c3d4e-0a1b-4c2d-8e3f-901234567890"
	other  = "77aa66bb-1111-4222-8333-444455556666"
	appID  = "7d1f0a52-9b3c-4c1e-8f60-2a5b9c0d1e11"
	userID = "5f0e6c7a-2222-4d3b-9a55-0c1d2e3f4a5b"
	aud    = "https://api.partnercenter.microsoft.com"
	issV1  = "https://sts.windows.net/" + tid + "/"
	issV2  = "https://login.microsoftonline.com/" + tid + "/v2.0"

	issued  = 1780996100
	expires = issued + 3900
)

var (
	audiences = []string{aud, aud + "/", "fa3d9a0c-3fb0-42cc-9193-47c7ecd2edbd"}
	noon      = time.Unix(issued+600, 0) // when tokens are verified
)

func rsaKey(bits int) func() *rsa.PrivateKey {
	return sync.OnceValue(func() *rsa.PrivateKey {
		k, err := rsa.GenerateKey(rand.Reader, bits)
		if err != nil {
			panic(err)
		}
		return k
	})
}

var (
	keyA    = rsaKey(2048)
	keyB    = rsaKey(2048)
	keyWeak = rsaKey(1024)
)

func b64(b []byte) string { return base64.RawURLEncoding.EncodeToString(b) }

// sign makes a token of header and payload as they stand.
func sign(k *rsa.PrivateKey, header, payload string) string {
	return signAs(k, b64([]byte(header))+"."+b64([]byte(payload)), b64([]byte(header))+"."+b64([]byte(payload)))
}

// signAs signs one text and appends the signature to another.
func signAs(k *rsa.PrivateKey, signed, shown string) string {
	sum := sha256.Sum256([]byte(signed))
	sig, err := rsa.SignPKCS1v15(nil, k, crypto.SHA256, sum[:])
	if err != nil {
		panic(err)
	}
	return shown + "." + b64(sig)
}

const headerA = `{"typ":"JWT","alg":"RS256","x5t":"A","kid":"A"}`

// object is a JSON object whose members are raw JSON, in order.
type object [][2]string

func userClaims() object {
	return object{
		{"aud", `"` + aud + `"`}, {"iss", `"` + issV1 + `"`}, {"iat", fmt.Sprint(issued)}, {"nbf", fmt.Sprint(issued)}, {"exp", fmt.Sprint(expires)},
		{"acr", `"1"`}, {"aio", `"AVQAq/8TAAAA"`}, {"amr", `["pwd","mfa"]`}, {"appid", `"` + appID + `"`}, {"appidacr", `"1"`},
		{"family_name", `"Agent"`}, {"given_name", `"Sam"`}, {"ipaddr", `"203.0.113.24"`}, {"name", `"Sam Agent"`}, {"oid", `"` + userID + `"`},
		{"puid", `"10032001A2B3C4D5"`}, {"rh", `"0.AXoA"`}, {"scp", `"user_impersonation"`}, {"sub", `"k3y-PairwiseSubjectValue"`},
		{"tenant_region_scope", `"EU"`}, {"tid", `"` + tid + `"`}, {"unique_name", `"sam@contoso-partner.example"`},
		{"upn", `"sam@contoso-partner.example"`}, {"uti", `"EJwqP017IU6myA1eH3CLAA"`}, {"ver", `"1.0"`},
	}
}

func appClaims() object {
	const oid = `"9a8b7c6d-3333-4f5e-8d7c-6b5a4f3e2d1c"`
	return userClaims().without("amr", "family_name", "given_name", "ipaddr", "name", "puid", "scp", "unique_name", "upn", "acr").
		with("oid", oid).with("sub", oid).with("idp", `"`+issV1+`"`)
}

// with replaces a member, or appends it.
func (o object) with(name, raw string) object {
	out := append(object(nil), o...)
	for i := range out {
		if out[i][0] == name {
			out[i][1] = raw
			return out
		}
	}
	return append(out, [2]string{name, raw})
}

// also appends a member whether or not there is one.
func (o object) also(name, raw string) object {
	return append(append(object(nil), o...), [2]string{name, raw})
}

func (o object) without(names ...string) object {
	var out object
	for _, m := range o {
		keep := true
		for _, n := range names {
			keep = keep && m[0] != n
		}
		if keep {
			out = append(out, m)
		}
	}
	return out
}

func (o object) String() string {
	var b strings.Builder
	for i, m := range o {
		if i > 0 {
			b.WriteByte(',')
		}
		fmt.Fprintf(&b, "%q:%s", m[0], m[1])
	}
	return "{" + b.String() + "}"
}

func user(o object) string { return sign(keyA(), headerA, o.String()) }

type jwk map[string]any

func published(kid string, k *rsa.PublicKey) jwk {
	return jwk{"kty": "RSA", "use": "sig", "kid": kid, "x5t": kid, "n": b64(k.N.Bytes()), "e": b64(big.NewInt(int64(k.E)).Bytes())}
}

func (j jwk) with(name string, v any) jwk {
	out := jwk{}
	for k, v := range j {
		out[k] = v
	}
	out[name] = v
	return out
}

func keySetJSON(keys ...jwk) string {
	text, err := json.Marshal(map[string]any{"keys": keys})
	if err != nil {
		panic(err)
	}
	return string(text)
}

// endpoint serves key sets at every path and counts the requests.
type endpoint struct {
	*httptest.Server
	mu   sync.Mutex
	body string
	hits map[string]int
	wait chan struct{} // when set, answers wait until it is closed
}

func serveKeys(t testing.TB, keys ...jwk) *endpoint {
	e := &endpoint{body: keySetJSON(keys...), hits: map[string]int{}}
	e.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		e.mu.Lock()
		e.hits[r.URL.Path]++
		body, wait := e.body, e.wait
		e.mu.Unlock()
		if wait != nil {
			<-wait
		}
		switch {
		case body == "error":
			http.Error(w, "down", http.StatusInternalServerError)
		default:
			io.WriteString(w, body)
		}
	}))
	t.Cleanup(e.Close)
	return e
}

func (e *endpoint) serve(body string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.body = body
}

func (e *endpoint) count(path string) int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.hits[path]
}

func (e *endpoint) total() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	n := 0
	for _, h := range e.hits {
		n += h
	}
	return n
}

// clock is a settable clock.
type clock struct {
	mu sync.Mutex
	at time.Time
}

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.at
}

func (c *clock) set(at time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.at = at
}

func newVerifier(t testing.TB, cfg Config) *Verifier {
	t.Helper()
	if cfg.Now == nil {
		cfg.Now = func() time.Time { return noon }
	}
	v, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// withKeyA is a Verifier of the tenant that has fetched key A.
func withKeyA(t testing.TB) *Verifier {
	t.Helper()
	v := newVerifier(t, Config{Authority: serveKeys(t, published("A", &keyA().PublicKey)).URL, Tenants: []string{tid}})
	mustRefresh(t, v)
	return v
}

func mustRefresh(t testing.TB, v *Verifier) {
	t.Helper()
	if err := v.Refresh(context.Background()); err != nil {
		t.Fatal(err)
	}
}

// settle waits for the fetches under way: a caller waits for one endpoint only.
func settle(v *Verifier) {
	for _, t := range v.tenants {
		for i := range t.sources {
			t.mu.Lock()
			f := t.sources[i].flight
			t.mu.Unlock()
			if f != nil {
				<-f.ended
			}
		}
	}
}

// verify returns the token, or the reason why not.
func verify(t testing.TB, v *Verifier, raw string) (policy.Token, policy.Reason) {
	t.Helper()
	tok, err := v.Verify(context.Background(), raw, audiences)
	return tok, reasonOf(t, tok, err)
}

func reasonOf(t testing.TB, tok policy.Token, err error) policy.Reason {
	t.Helper()
	if err == nil {
		if !tok.Verified {
			t.Error("neither an error nor a verified token")
		}
		return ""
	}
	var te *policy.TokenError
	if !errors.As(err, &te) {
		t.Fatalf("error is a %T, want a *policy.TokenError", err)
	}
	if tok.Verified || te.Claimed.Verified || te.Claimed.MFA != policy.MFAUnknown {
		t.Errorf("%s: what is not verified counts as proof: %+v %+v", te.Reason, tok, te.Claimed)
	}
	return te.Reason
}

func expect(t testing.TB, v *Verifier, raw string, want policy.Reason) {
	t.Helper()
	if _, got := verify(t, v, raw); got != want {
		t.Errorf("Verify = %q, want %q", got, want)
	}
}

// roundTripper answers requests without a network, for tests in synthetic time.
type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

func answer(body string) (*http.Response, error) {
	return &http.Response{StatusCode: http.StatusOK, Body: io.NopCloser(bytes.NewReader([]byte(body)))}, nil
}

func hang(r *http.Request) (*http.Response, error) {
	<-r.Context().Done()
	return nil, r.Context().Err()
}
