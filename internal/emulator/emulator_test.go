package emulator

import (
	"context"
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"io"
	"math/big"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"
)

// start starts an emulator for the length of a test.
func start(t *testing.T, cfg Config) *Emulator {
	t.Helper()
	e, err := Start(cfg)
	if err != nil {
		t.Fatalf("Start: %v", err)
	}
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return e
}

// client decodes nothing by itself and trusts the emulator's CA.
func client(t *testing.T, e *Emulator, http2 bool) *http.Client {
	t.Helper()
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(e.CAPEM())
	transport := &http.Transport{
		DisableCompression: true,
		ForceAttemptHTTP2:  http2,
		TLSClientConfig:    &tls.Config{RootCAs: pool},
	}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

type answer struct {
	status int
	header http.Header
	body   string
}

func (a answer) json(t *testing.T) map[string]any {
	t.Helper()
	var v map[string]any
	if err := json.Unmarshal([]byte(strings.TrimPrefix(a.body, byteOrderMark)), &v); err != nil {
		t.Fatalf("body %.200q: %v", a.body, err)
	}
	return v
}

// do makes one request; headers are "Name: value".
func do(t *testing.T, e *Emulator, method, target, body string, headers ...string) answer {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, target, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range headers {
		name, value, _ := strings.Cut(h, ": ")
		req.Header.Add(name, value)
	}
	res, err := client(t, e, false).Do(req)
	if err != nil {
		t.Fatalf("%s %s: %v", method, target, err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatalf("%s %s: read body: %v", method, target, err)
	}
	return answer{res.StatusCode, res.Header, string(b)}
}

func bearer(token string) string { return "Authorization: Bearer " + token }

// form posts pairs of a form.
func form(t *testing.T, e *Emulator, target string, pairs ...string) answer {
	t.Helper()
	values := url.Values{}
	for i := 0; i < len(pairs); i += 2 {
		values.Set(pairs[i], pairs[i+1])
	}
	return do(t, e, "POST", target, values.Encode(), "Content-Type: application/x-www-form-urlencoded")
}

// decode returns header and claims of a token, unverified.
func decode(t *testing.T, token string) (header, claims map[string]any) {
	t.Helper()
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		t.Fatalf("token has %d parts, want 3", len(parts))
	}
	for i, v := range []*map[string]any{&header, &claims} {
		b, err := base64.RawURLEncoding.DecodeString(parts[i])
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(b, v); err != nil {
			t.Fatal(err)
		}
	}
	return header, claims
}

// published fetches a key set and returns the keys by kid.
func published(t *testing.T, e *Emulator, path string) map[string]*rsa.PublicKey {
	t.Helper()
	res := do(t, e, "GET", e.EntraURL()+path, "")
	keys := map[string]*rsa.PublicKey{}
	for _, entry := range res.json(t)["keys"].([]any) {
		k := entry.(map[string]any)
		n, err := base64.RawURLEncoding.DecodeString(k["n"].(string))
		if err != nil {
			t.Fatal(err)
		}
		keys[k["kid"].(string)] = &rsa.PublicKey{N: new(big.Int).SetBytes(n), E: 65537}
	}
	return keys
}

func verifies(key *rsa.PublicKey, token string) bool {
	i := strings.LastIndexByte(token, '.')
	signature, err := base64.RawURLEncoding.DecodeString(token[i+1:])
	digest := sha256.Sum256([]byte(token[:i]))
	return err == nil && key != nil && rsa.VerifyPKCS1v15(key, crypto.SHA256, digest[:], signature) == nil
}

// soon bounds what a test waits for.
func soon(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func TestListenersAnswerOverBothSchemes(t *testing.T) {
	e := start(t, Config{})
	token := bearer(e.Mint(TokenSpec{}))
	for _, base := range []string{e.PartnerURL(), e.PartnerTLSURL()} {
		if res := do(t, e, "GET", base+"/v1/customers", "", token); res.status != 200 {
			t.Errorf("GET %s/v1/customers = %d %s", base, res.status, res.body)
		}
	}
	token = bearer(e.Mint(TokenSpec{Audience: AudiencePartnerAPI}))
	for _, base := range []string{e.PartnerAPIURL(), e.PartnerAPITLSURL()} {
		if res := do(t, e, "GET", base+"/v1.0/engagements/referrals", "", token); res.status != 200 {
			t.Errorf("GET %s/v1.0/engagements/referrals = %d %s", base, res.status, res.body)
		}
	}
	token = bearer(e.Mint(TokenSpec{Audience: AudienceGraph}))
	for _, base := range []string{e.GraphURL(), e.GraphTLSURL()} {
		if res := do(t, e, "GET", base+"/v1.0/tenantRelationships/delegatedAdminRelationships", "", token); res.status != 200 {
			t.Errorf("GET %s/v1.0/tenantRelationships/delegatedAdminRelationships = %d %s", base, res.status, res.body)
		}
	}
	for _, base := range []string{e.EntraURL(), e.EntraTLSURL()} {
		res := do(t, e, "GET", base+"/common/.well-known/openid-configuration", "")
		if got, want := res.json(t)["jwks_uri"], base+"/common/discovery/keys"; got != want {
			t.Errorf("jwks_uri at %s = %v, want %v", base, got, want)
		}
	}
}

func TestCertificateCoversMicrosoftsNames(t *testing.T) {
	e := start(t, Config{})
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(e.CAPEM())
	for _, name := range []string{"localhost", "127.0.0.1", "login.microsoftonline.com", "api.partnercenter.microsoft.com",
		"api.partner.microsoft.com", "graph.microsoft.com"} {
		conn, err := tls.Dial("tcp", strings.TrimPrefix(e.PartnerTLSURL(), "https://"), &tls.Config{RootCAs: pool, ServerName: name})
		if err != nil {
			t.Errorf("handshake as %s: %v", name, err)
			continue
		}
		_ = conn.Close()
	}
}

func TestStartReportsAnAddressInUse(t *testing.T) {
	e := start(t, Config{})
	second, err := Start(Config{PartnerAddress: strings.TrimPrefix(e.PartnerURL(), "http://")})
	if err == nil {
		_ = second.Close()
		t.Fatal("Start on a used address succeeded")
	}
	if !strings.Contains(err.Error(), "listen on "+strings.TrimPrefix(e.PartnerURL(), "http://")) {
		t.Errorf("error = %v, does not name the address", err)
	}
}

func TestHTTP2IsOffered(t *testing.T) {
	e := start(t, Config{})
	req, _ := http.NewRequestWithContext(t.Context(), "GET", e.PartnerTLSURL()+"/v1/customers", nil)
	req.Header.Set("Authorization", "Bearer "+e.Mint(TokenSpec{}))
	res, err := client(t, e, true).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	if res.ProtoMajor != 2 || e.Requests()[0].Proto != "HTTP/2.0" {
		t.Errorf("answered with %s, recorded %s; want HTTP/2", res.Proto, e.Requests()[0].Proto)
	}
}

func TestCloseEndsStalledAnswers(t *testing.T) {
	e, err := Start(Config{})
	if err != nil {
		t.Fatal(err)
	}
	failed := make(chan error, 1)
	go func() {
		req, _ := http.NewRequest("GET", e.PartnerURL()+"/v1/customers", nil)
		req.Header.Set("Emulate", "stall=1h")
		res, err := http.DefaultClient.Do(req)
		if err == nil {
			res.Body.Close()
		}
		failed <- err
	}()
	if err := e.Wait(soon(t), func(r []Request) bool { return len(r) == 1 }); err != nil {
		t.Fatal(err)
	}
	if err := e.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
	if err := <-failed; err == nil {
		t.Error("a stalled call was answered by Close")
	}
}
