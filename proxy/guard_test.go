package proxy_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/partnerguard/partnerguard/policy"
	"github.com/partnerguard/partnerguard/proxy"
)

const tenant = "1b2c3d4e-0a1b-4c2d-8e3f-901234567890"

// tokens is a verifier that knows tokens by name; what it does not know is
// malformed.
type tokens map[string]any

func (ts tokens) Verify(_ context.Context, raw string, _ []string) (policy.Token, error) {
	switch t := ts[raw].(type) {
	case policy.Token:
		return t, nil
	case error:
		return policy.Token{}, t
	case func():
		t()
	}
	return policy.Token{}, &policy.TokenError{Reason: policy.ReasonTokenMalformed}
}

var known = tokens{
	"mfa":    policy.Token{Kind: policy.KindAppUser, MFA: policy.MFAPresent, TenantID: tenant, AppID: "7d1f0a52-9b3c-4c1e-8f60-2a5b9c0d1e11"},
	"nomfa":  policy.Token{Kind: policy.KindAppUser, MFA: policy.MFAAbsent, TenantID: tenant, AppID: "7d1f0a52-9b3c-4c1e-8f60-2a5b9c0d1e11", AMR: []string{"pwd"}},
	"app":    policy.Token{Kind: policy.KindAppOnly, MFA: policy.MFANotApplicable, TenantID: tenant, AppID: "7d1f0a52-9b3c-4c1e-8f60-2a5b9c0d1e11"},
	"opaque": &policy.TokenError{Reason: policy.ReasonTokenOpaque},
	"nokeys": &policy.TokenError{Reason: policy.ReasonKeysUnavailable},
	"panic":  func() { panic("verifier broke") },
	"odd":    errors.New("not a TokenError"),
}

// memory is a ledger and an observer that keep what they are told.
type memory struct {
	mu        sync.Mutex
	decisions []proxy.Record
	outcomes  []proxy.Record
	observed  []error
	broken    error
	finished  chan proxy.Record
}

func (m *memory) Decide(rec *proxy.Record) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.broken != nil {
		return m.broken
	}
	m.decisions = append(m.decisions, *rec)
	return nil
}

func (m *memory) Finish(rec *proxy.Record) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.broken != nil {
		return m.broken
	}
	m.outcomes = append(m.outcomes, *rec)
	return nil
}

func (m *memory) Observe(_ context.Context, rec *proxy.Record, unrecorded error) {
	m.mu.Lock()
	m.observed = append(m.observed, unrecorded)
	m.mu.Unlock()
	m.finished <- *rec
}

// next returns the record of the next call that ends.
func (m *memory) next(t *testing.T) proxy.Record {
	t.Helper()
	select {
	case r := <-m.finished:
		return r
	case <-time.After(10 * time.Second):
		t.Fatal("the call did not end")
		return proxy.Record{}
	}
}

// rig is a guard on a real socket in front of an upstream on another.
type rig struct {
	*memory
	guard    *httptest.Server
	upstream *httptest.Server
	settings proxy.Settings
	swap     func(proxy.Settings) (<-chan struct{}, error)
}

type option func(*policy.Config, *proxy.Config, *proxy.UpstreamConfig, *proxy.Listener)

func mode(m policy.Mode) option {
	return func(p *policy.Config, _ *proxy.Config, _ *proxy.UpstreamConfig, _ *proxy.Listener) { p.Mode = m }
}

func newRig(t *testing.T, upstream http.Handler, options ...option) *rig {
	t.Helper()
	r := &rig{memory: &memory{finished: make(chan proxy.Record, 1000)}, upstream: httptest.NewServer(upstream)}
	t.Cleanup(r.upstream.Close)
	pc := policy.Config{Mode: policy.Audit, Tenants: []string{tenant}, Integrations: []policy.Integration{
		{Name: "billing", Owner: "billing@contoso.example"},
	}}
	gc := proxy.Config{Ledger: r.memory, Observer: r.memory, Instance: "test", Settings: proxy.Settings{Generation: 1, Verifier: known, ValidateMFA: proxy.ValidateReads}}
	uc := proxy.UpstreamConfig{Name: "partner-center", URL: r.upstream.URL, Audiences: []string{"https://api.partnercenter.microsoft.com"}, ValidatesMFA: true}
	l := proxy.Listener{Name: "main", Upstream: "partner-center"}
	for _, o := range options {
		o(&pc, &gc, &uc, &l)
	}
	p, err := policy.New(pc)
	if err != nil {
		t.Fatal(err)
	}
	up, err := proxy.NewUpstream(uc)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(up.Close)
	gc.Settings.Policy, gc.Settings.Upstreams, gc.Settings.Listeners = p, []*proxy.Upstream{up}, []proxy.Listener{l}
	g, err := proxy.New(gc)
	if err != nil {
		t.Fatal(err)
	}
	r.settings, r.swap = gc.Settings, g.Swap
	r.guard = httptest.NewServer(g.Handler(l.Name))
	t.Cleanup(r.guard.Close)
	return r
}

// send writes a request as it stands and returns the answer, read whole.
func (r *rig) send(t *testing.T, lines ...string) (*http.Response, string) {
	t.Helper()
	c, err := net.Dial("tcp", r.guard.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	io.WriteString(c, strings.Join(lines, "\r\n")+"\r\nConnection: close\r\n\r\n")
	method, _, _ := strings.Cut(lines[0], " ")
	res, err := http.ReadResponse(bufio.NewReader(c), &http.Request{Method: method})
	if err != nil {
		t.Fatalf("%s: %v", lines[0], err)
	}
	defer res.Body.Close()
	body, _ := io.ReadAll(res.Body)
	return res, string(body)
}

// seen is what reached an upstream.
type seen struct {
	mu   sync.Mutex
	reqs []*http.Request
}

func (s *seen) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	s.reqs = append(s.reqs, r.Clone(context.Background()))
	s.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	io.WriteString(w, `{"ok":true}`)
}

func (s *seen) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.reqs)
}

func (s *seen) last(t *testing.T) *http.Request {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.reqs) == 0 {
		t.Fatal("nothing reached the upstream")
	}
	return s.reqs[len(s.reqs)-1]
}

func TestModesAgainstTokens(t *testing.T) {
	type want struct {
		status int
		effect string
	}
	forwarded, tagged := want{200, "allow"}, want{200, "tag"}
	refused := func(status int) want { return want{status, "reject"} }
	for _, row := range []struct {
		token, reason, mfa  string
		audit, tag, enforce want
	}{
		{"mfa", "mfa_present", "present", forwarded, forwarded, forwarded},
		{"app", "app_only", "not_applicable", forwarded, forwarded, forwarded},
		{"nomfa", "mfa_missing", "absent", forwarded, tagged, refused(401)},
		{"opaque", "token_opaque", "unknown", forwarded, tagged, refused(401)},
		{"rubbish", "token_malformed", "unknown", forwarded, tagged, refused(401)},
		{"nokeys", "keys_unavailable", "unknown", forwarded, tagged, refused(503)},
		{"panic", "internal_error", "unknown", forwarded, tagged, refused(503)},
		{"odd", "internal_error", "unknown", forwarded, tagged, refused(503)},
	} {
		for m, w := range map[policy.Mode]want{policy.Audit: row.audit, policy.TagMode: row.tag, policy.Enforce: row.enforce} {
			t.Run(fmt.Sprintf("%s in %s", row.reason, m), func(t *testing.T) {
				up := &seen{}
				r := newRig(t, up, mode(m))
				res, body := r.send(t, "GET /v1/customers HTTP/1.1", "Host: x", "Authorization: Bearer "+row.token, "MS-RequestId: abc", "Partnerguard-Effect: allow")
				if res.StatusCode != w.status {
					t.Fatalf("status %d, want %d: %s", res.StatusCode, w.status, body)
				}
				rec := r.next(t)
				got := map[string]string{}
				for _, h := range []string{"Call", "Integration", "Effect", "Reason", "Mfa"} {
					got[h] = strings.Join(res.Header.Values("Partnerguard-"+h), "|")
				}
				wantHeaders := map[string]string{"Call": rec.Call.String(), "Integration": rec.Integration, "Effect": w.effect, "Reason": row.reason, "Mfa": row.mfa}
				if d := cmp.Diff(wantHeaders, got); d != "" {
					t.Errorf("response headers (-want +got):\n%s", d)
				}
				if w.effect == "reject" {
					if up.count() != 0 {
						t.Errorf("%d calls reached the upstream, want none", up.count())
					}
					if id := res.Header.Get("MS-RequestId"); id != "abc" {
						t.Errorf("MS-RequestId %q of the refusal, want the client's", id)
					}
				} else {
					marks := up.last(t).Header.Values("Partnerguard-Effect")
					if w.effect == "tag" && (len(marks) != 1 || marks[0] != "tag") || w.effect == "allow" && len(marks) != 0 {
						t.Errorf("upstream saw Partnerguard-Effect %q for effect %s", marks, w.effect)
					}
				}
				if len(r.decisions) != 1 || len(r.outcomes) != 1 || r.outcomes[0].Status != w.status {
					t.Errorf("%d decisions, %d outcomes %+v; want one each with the status", len(r.decisions), len(r.outcomes), r.outcomes)
				}
				wouldReject := w.effect == "reject" || row.enforce.effect == "reject"
				if rec.WouldReject != wouldReject {
					t.Errorf("would_reject %v, want %v", rec.WouldReject, wouldReject)
				}
			})
		}
	}
}

func TestAPanicIsToldWithoutItsValue(t *testing.T) {
	type told struct{ kind, stack string }
	heard := make(chan told, 1)
	r := newRig(t, &seen{}, func(_ *policy.Config, g *proxy.Config, _ *proxy.UpstreamConfig, _ *proxy.Listener) {
		g.OnPanic = func(kind string, stack []byte) { heard <- told{kind, string(stack)} }
	})
	if res, _ := r.send(t, "GET /v1/x HTTP/1.1", "Host: x", "Authorization: Bearer panic"); res.StatusCode != 200 {
		t.Errorf("%d, want the call forwarded while auditing", res.StatusCode)
	}
	got := <-heard
	if got.kind != "string" || strings.Contains(got.stack, "verifier broke") || !strings.Contains(got.stack, "tokens.Verify") {
		t.Errorf("told of %q:\n%s", got.kind, got.stack)
	}
}

func TestARefusalForMissingMFALooksLikeMicrosofts(t *testing.T) {
	r := newRig(t, &seen{}, mode(policy.Enforce))
	res, body := r.send(t, "GET /i/billing/v1/customers HTTP/1.1", "Host: x", "Authorization: Bearer nomfa")
	var got struct {
		Code, Description, Source string
		Data                      []string
	}
	if err := json.Unmarshal([]byte(body), &got); err != nil {
		t.Fatalf("body %q: %v", body, err)
	}
	if got.Code != "900421" || got.Source != "partnerguard" || !strings.HasPrefix(got.Description, "MFA is required: ") {
		t.Errorf("body %s", body)
	}
	wantData := []string{"reason: mfa_missing", "integration: billing", "call: " + res.Header.Get("Partnerguard-Call")}
	if d := cmp.Diff(wantData, got.Data); d != "" {
		t.Errorf("data (-want +got):\n%s", d)
	}
	const challenge = `Bearer error="insufficient_claims", claims="eyJhY2Nlc3NfdG9rZW4iOnsiYW1yIjp7ImVzc2VudGlhbCI6dHJ1ZSwidmFsdWVzIjpbIm1mYSJdfX19"`
	if h := res.Header.Get("WWW-Authenticate"); h != challenge {
		t.Errorf("WWW-Authenticate %s\nwant %s", h, challenge)
	}
	if res.Header.Get("MS-RequestId") == "" || res.Header.Get("MS-CorrelationId") == "" {
		t.Error("the added ids are not in the refusal")
	}
	if ct := res.Header.Get("Content-Type"); ct != "application/json; charset=utf-8" {
		t.Errorf("Content-Type %q", ct)
	}

	head, body := r.send(t, "HEAD /v1/customers HTTP/1.1", "Host: x", "Authorization: Bearer nomfa")
	if head.StatusCode != 401 || body != "" {
		t.Errorf("HEAD: %d with body %q, want 401 without", head.StatusCode, body)
	}
	missing, _ := r.send(t, "GET /v1/customers HTTP/1.1", "Host: x")
	if h := missing.Header.Get("WWW-Authenticate"); h != "Bearer" {
		t.Errorf("no token: WWW-Authenticate %q, want Bearer alone", h)
	}
	basic, _ := r.send(t, "GET /v1/customers HTTP/1.1", "Host: x", "Authorization: Basic eDp5")
	if reason := basic.Header.Get("Partnerguard-Reason"); reason != "token_missing" {
		t.Errorf("Basic: reason %q, want token_missing", reason)
	}
	malformed, _ := r.send(t, "GET /v1/customers HTTP/1.1", "Host: x", "Authorization: bearer rubbish")
	if h := malformed.Header.Get("WWW-Authenticate"); h != `Bearer error="invalid_token", error_description="token_malformed"` {
		t.Errorf("malformed: WWW-Authenticate %q", h)
	}
}

func TestPathsGoOutByteForByteOrNotAtAll(t *testing.T) {
	up := &seen{}
	r := newRig(t, up)
	for _, target := range []string{
		"/v1/customers", "/v1//invoices/x", "//v1/invoices", "/v1/a%2Fb", "/v1/a%5Cb", "/v1/a;b=c:d", "/V1/CUSTOMERS", "/",
		"/v1/customers?", "/v1/x?a=b&a=c;d&%zz&q=#frag", "/v1/x?..", "/v1/sales(Market='DE')/$value", "/v1/a{b}|\"^`", "/v1/%7Euser", "/v1/x%2e", "/v1/..x/x..", "/v1/caf\xc3\xa9",
		"//v1/x?q=%00", "/%69/billing/v1/x", "/I/billing/v1/x",
	} {
		res, _ := r.send(t, "GET "+target+" HTTP/1.1", "Host: x")
		if res.StatusCode != 200 {
			t.Errorf("%s: %d, want it forwarded", target, res.StatusCode)
			continue
		}
		if got := up.last(t).RequestURI; got != target {
			t.Errorf("upstream saw %q, want %q", got, target)
		}
	}
	for target, want := range map[string]string{
		"/i/billing/v1/customers?x=1":     "/v1/customers?x=1",
		"/i/billing//v1/x":                "//v1/x",
		"/i/billing":                      "/",
		"/i/billing?x=1":                  "/?x=1",
		"http://elsewhere.example/v1/x?y": "/v1/x?y",
		"http://elsewhere.example":        "/",
	} {
		if res, _ := r.send(t, "GET "+target+" HTTP/1.1", "Host: x"); res.StatusCode != 200 {
			t.Errorf("%s: %d, want it forwarded", target, res.StatusCode)
		} else if got := up.last(t).RequestURI; got != want {
			t.Errorf("%s: upstream saw %q, want %q", target, got, want)
		}
	}
	before := up.count()
	for _, target := range []string{
		"/v1/../admin", "/..", "/v1/.", "/v1/%2e%2e/admin", "/v1/%2E./x", "/v1/a%2F..%2Fb", "/v1/x%00", `/v1/a\b`, "/v1/a#b", "/i/billing/../x",
		"//v1/\"x",
	} {
		res, body := r.send(t, "GET "+target+" HTTP/1.1", "Host: x")
		if res.StatusCode != 400 || res.Header.Get("Partnerguard-Reason") != "request_ambiguous" {
			t.Errorf("%s: %d %s, want 400 request_ambiguous: %s", target, res.StatusCode, res.Header.Get("Partnerguard-Reason"), body)
		}
	}
	for _, target := range []string{"/i/unknown/v1/x", "/i/Billing/v1/x", "/i//v1/x", "/i/b%69lling/v1/x"} {
		res, _ := r.send(t, "GET "+target+" HTTP/1.1", "Host: x")
		if res.StatusCode != 404 || res.Header.Get("Partnerguard-Reason") != "integration_unknown" {
			t.Errorf("%s: %d %s, want 404 integration_unknown", target, res.StatusCode, res.Header.Get("Partnerguard-Reason"))
		}
	}
	for _, line := range []string{"TRACE /v1/x HTTP/1.1", "TRACK /v1/x HTTP/1.1", "CONNECT x:443 HTTP/1.1"} {
		if res, _ := r.send(t, line, "Host: x"); res.StatusCode != 405 {
			t.Errorf("%s: %d, want 405", line, res.StatusCode)
		}
	}
	if res, _ := r.send(t, "GET /v1/x HTTP/1.1", "Host: x", "Authorization: Bearer mfa", "Authorization: Bearer nomfa"); res.StatusCode != 400 {
		t.Errorf("two Authorization headers: %d, want 400", res.StatusCode)
	}
	if n := up.count() - before; n != 0 {
		t.Errorf("%d of the refused calls reached the upstream", n)
	}
}

func TestHeadersAreTheClientsButForOurs(t *testing.T) {
	up := &seen{}
	r := newRig(t, up, mode(policy.TagMode))
	r.send(t, "GET /v1/customers HTTP/1.1", "Host: guard.example", "Authorization: Bearer nomfa",
		"partnerguard-effect: allow", "PARTNERGUARD_REASON: mfa_present", "Partnerguard-Mfa: present", "Partnerguard: x",
		"Connection: Partnerguard-Call, X-Hop", "X-Hop: 1", "X-Forwarded-For: 1.2.3.4", "X_Forwarded_Host: y", "X-Forwarded-Port: 1", "Forwarded: for=z",
		"Upgrade: websocket", "Accept-Encoding: deflate", "X-Custom: a", "X-Custom: b")
	got := up.last(t)
	want := http.Header{
		"Accept-Encoding": {"deflate"}, "Authorization": {"Bearer nomfa"}, "X-Custom": {"a", "b"}, "Validatemfa": {"true"},
		"Partnerguard-Call": {r.next(t).Call.String()}, "Partnerguard-Effect": {"tag"}, "Partnerguard-Integration": {"app-7d1f0a52-9b3c-4c1e-8f60-2a5b9c0d1e11"},
		"Partnerguard-Mfa": {"absent"}, "Partnerguard-Reason": {"mfa_missing"},
		"Ms-Requestid": got.Header["Ms-Requestid"], "Ms-Correlationid": got.Header["Ms-Correlationid"],
	}
	if d := cmp.Diff(want, got.Header); d != "" {
		t.Errorf("headers upstream (-want +got):\n%s", d)
	}
	if got.Host != r.upstream.Listener.Addr().String() {
		t.Errorf("Host %q upstream, want the upstream's", got.Host)
	}
}

func TestMicrosoftsVerdictIsKeptAndHiddenFromThoseWhoDidNotAsk(t *testing.T) {
	asked := ""
	r := newRig(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked = r.Header.Get("ValidateMfa")
		w.Header().Set("isMfaCompliant", "False")
	}))
	for _, row := range []struct {
		name, line, header string
		asked, shown       string
		kept               policy.Compliant
	}{
		{"a read", "GET /v1/x HTTP/1.1", "X: 1", "true", "", policy.CompliantFalse},
		{"a write", "POST /v1/x HTTP/1.1", "Content-Length: 0", "", "", policy.CompliantFalse},
		{"a client that asks", "GET /v1/x HTTP/1.1", "validatemfa: True", "True", "False", policy.CompliantFalse},
	} {
		t.Run(row.name, func(t *testing.T) {
			res, _ := r.send(t, row.line, "Host: x", "Authorization: Bearer nomfa", row.header)
			rec := r.next(t)
			if asked != row.asked || res.Header.Get("isMfaCompliant") != row.shown || rec.MFACompliant != row.kept {
				t.Errorf("asked %q shown %q kept %v, want %q %q %v", asked, res.Header.Get("isMfaCompliant"), rec.MFACompliant, row.asked, row.shown, row.kept)
			}
		})
	}
	r.send(t, "GET /v1/x HTTP/1.1", "Host: x", "Authorization: Bearer app")
	if asked != "" {
		t.Error("ValidateMfa was added to an app-only call")
	}
}

func TestBodiesStreamUnaltered(t *testing.T) {
	payload := make([]byte, 3<<20)
	rand.Read(payload)
	r := newRig(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.NewResponseController(w).EnableFullDuplex()
		w.Header().Set("Content-Type", "application/octet-stream")
		io.Copy(w, r.Body)
	}))
	for _, chunked := range []bool{false, true} {
		var body io.Reader = bytes.NewReader(payload)
		if chunked {
			body = io.MultiReader(body)
		}
		req, _ := http.NewRequest(http.MethodPost, r.guard.URL+"/v1/x", body)
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(res.Body)
		res.Body.Close()
		if err != nil || !bytes.Equal(got, payload) {
			t.Errorf("chunked %v: %d bytes back, %v; want the %d sent", chunked, len(got), err, len(payload))
		}
		rec := r.next(t)
		if rec.BytesIn != int64(len(payload)) || rec.BytesOut != int64(len(payload)) {
			t.Errorf("recorded %d in, %d out", rec.BytesIn, rec.BytesOut)
		}
	}
}

func TestAHangUpCancelsTheUpstreamCallAndKeepsItsOutcome(t *testing.T) {
	arrived, canceled := make(chan struct{}), make(chan time.Time, 1)
	r := newRig(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		close(arrived)
		<-r.Context().Done()
		canceled <- time.Now()
	}))
	c, err := net.Dial("tcp", r.guard.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(c, "GET /v1/x HTTP/1.1\r\nHost: x\r\n\r\n")
	<-arrived
	gone := time.Now()
	c.Close()
	select {
	case at := <-canceled:
		t.Logf("upstream call canceled after %v", at.Sub(gone))
	case <-time.After(10 * time.Second):
		t.Fatal("the upstream call was not canceled")
	}
	if rec := r.next(t); rec.Error != "client_canceled" || rec.Status != 0 {
		t.Errorf("outcome error %q status %d, want client_canceled and none", rec.Error, rec.Status)
	}
}

func TestAnUpstreamThatBreaksOffLeavesABrokenTransfer(t *testing.T) {
	r := newRig(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", "1000")
		io.WriteString(w, "short")
		http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	}))
	res, err := http.Get(r.guard.URL + "/v1/x")
	if err == nil {
		_, err = io.ReadAll(res.Body)
		res.Body.Close()
	}
	if err == nil {
		t.Error("the client saw a clean answer")
	}
	if rec := r.next(t); rec.Error != "upstream_aborted" {
		t.Errorf("outcome error %q, want upstream_aborted", rec.Error)
	}
}

func TestNothingIsSentTwiceButSafeRequestsThatAreCounted(t *testing.T) {
	// An upstream that closes each connection after its first request, without
	// saying so: the guard's reused connection turns out dead.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var mu sync.Mutex
	sent := map[string]int{}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				br := bufio.NewReader(c)
				for n := 0; n < 2; n++ {
					req, err := http.ReadRequest(br)
					if err != nil {
						return
					}
					io.Copy(io.Discard, req.Body)
					mu.Lock()
					sent[req.URL.Path]++
					mu.Unlock()
					if n == 1 {
						return // read, and never answered
					}
					io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
				}
			}()
		}
	}()
	for _, row := range []struct {
		name, line string
		headers    []string
		want       int
	}{
		{"a GET is repeated by net/http, and counted", "GET /v1/get HTTP/1.1", nil, 2},
		{"an empty POST is not", "POST /v1/post HTTP/1.1", []string{"Content-Length: 0"}, 1},
		{"an empty POST with Idempotency-Key is not", "POST /v1/idem HTTP/1.1", []string{"Content-Length: 0", "Idempotency-Key: k"}, 1},
		{"an empty POST with X-Idempotency-Key is not", "POST /v1/xidem HTTP/1.1", []string{"Content-Length: 0", "X-Idempotency-Key: k"}, 1},
		{"a DELETE with Idempotency-Key is not", "DELETE /v1/del HTTP/1.1", []string{"Idempotency-Key: k"}, 1},
	} {
		t.Run(row.name, func(t *testing.T) {
			r := newRig(t, http.NotFoundHandler(), func(_ *policy.Config, _ *proxy.Config, u *proxy.UpstreamConfig, _ *proxy.Listener) {
				u.URL = "http://" + l.Addr().String()
			})
			r.send(t, "GET /warm HTTP/1.1", "Host: x") // a connection to reuse
			r.next(t)
			res, _ := r.send(t, append([]string{row.line, "Host: x"}, row.headers...)...)
			rec := r.next(t)
			_, path, _ := strings.Cut(strings.TrimSuffix(row.line, " HTTP/1.1"), " ")
			mu.Lock()
			defer mu.Unlock()
			if sent[path] != row.want || rec.Replays != row.want-1 {
				t.Errorf("sent %d times with %d replays recorded, want %d (client got %d)", sent[path], rec.Replays, row.want, res.StatusCode)
			}
			if row.want == 1 && res.StatusCode != 502 {
				t.Errorf("client got %d, want 502", res.StatusCode)
			}
		})
	}
}

func TestALedgerThatCannotWrite(t *testing.T) {
	for _, need := range []bool{false, true} {
		up := &seen{}
		r := newRig(t, up, func(_ *policy.Config, g *proxy.Config, _ *proxy.UpstreamConfig, _ *proxy.Listener) {
			g.Settings.NeedLedger = need
		})
		r.broken = errors.New("disk full")
		res, _ := r.send(t, "GET /v1/x HTTP/1.1", "Host: x", "Authorization: Bearer mfa")
		rec := r.next(t)
		if need && (res.StatusCode != 503 || res.Header.Get("Retry-After") == "" || res.Header.Get("Partnerguard-Reason") != "ledger_unavailable" || up.count() != 0) {
			t.Errorf("reject: %d %v, %d forwarded; want 503 ledger_unavailable and none", res.StatusCode, res.Header, up.count())
		}
		if !need && (res.StatusCode != 200 || rec.Status != 200) {
			t.Errorf("forward: %d, want 200", res.StatusCode)
		}
		if r.observed[0] == nil || len(r.outcomes) != 0 {
			t.Errorf("need %v: observer was told %v, %d outcomes written; want the cause and none", need, r.observed[0], len(r.outcomes))
		}
	}
}

func TestTheBreakerHoldsCallsBackOnlyWhereSomethingMayBeRefused(t *testing.T) {
	for _, row := range []struct {
		mode policy.Mode
		want int
	}{{policy.Audit, 503}, {policy.Enforce, 503}} {
		calls := &seen{}
		r := newRig(t, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			calls.ServeHTTP(httptest.NewRecorder(), req)
			w.Header().Set("Retry-After", "77")
			w.WriteHeader(503)
		}), mode(row.mode))
		const n = 30
		for range n {
			r.send(t, "GET /v1/x HTTP/1.1", "Host: x", "Authorization: Bearer mfa")
		}
		switch got := calls.count(); {
		case row.mode == policy.Audit && got != n:
			t.Errorf("audit: %d of %d calls reached the upstream, want all", got, n)
		case row.mode == policy.Enforce && got != 20:
			t.Errorf("enforce: %d calls reached the upstream before the breaker opened, want 20", got)
		}
		if row.mode == policy.Enforce {
			res, _ := r.send(t, "GET /v1/x HTTP/1.1", "Host: x", "Authorization: Bearer mfa")
			if res.Header.Get("Partnerguard-Reason") != "upstream_circuit_open" || res.Header.Get("Retry-After") != "5" {
				t.Errorf("open breaker: %v", res.Header)
			}
		}
	}
}

func TestRefusalsOfOthersDoNotOpenTheBreaker(t *testing.T) {
	for _, status := range []int{401, 403, 429, 500} {
		up := &seen{}
		r := newRig(t, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			up.ServeHTTP(httptest.NewRecorder(), req)
			w.WriteHeader(status)
		}), mode(policy.Enforce))
		for range 30 {
			r.send(t, "GET /v1/x HTTP/1.1", "Host: x", "Authorization: Bearer mfa")
		}
		if up.count() != 30 {
			t.Errorf("%d: %d calls reached the upstream, want 30", status, up.count())
		}
	}
}

func TestAnUpstreamThatDoesNotAnswer(t *testing.T) {
	hold := make(chan struct{})
	slow := newRig(t, http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-hold }),
		func(_ *policy.Config, _ *proxy.Config, u *proxy.UpstreamConfig, _ *proxy.Listener) {
			u.ResponseHeader = 50 * time.Millisecond
		})
	defer close(hold)
	if res, _ := slow.send(t, "GET /v1/x HTTP/1.1", "Host: x"); res.StatusCode != 504 || res.Header.Get("Partnerguard-Reason") != "upstream_timeout" {
		t.Errorf("slow: %d %v, want 504 upstream_timeout", res.StatusCode, res.Header)
	}
	gone := newRig(t, http.NotFoundHandler())
	gone.upstream.Close()
	res, body := gone.send(t, "GET /v1/x HTTP/1.1", "Host: x")
	if res.StatusCode != 502 || res.Header.Get("Partnerguard-Reason") != "upstream_unreachable" || !strings.Contains(body, `"source":"partnerguard"`) {
		t.Errorf("gone: %d %s, want 502 upstream_unreachable", res.StatusCode, body)
	}
	if rec := gone.next(t); rec.Error != "upstream_unreachable" || rec.Status != 502 {
		t.Errorf("gone: recorded %q %d", rec.Error, rec.Status)
	}
}

func TestEarlyHintsDoNotCostTheGuardItsHeaders(t *testing.T) {
	r := newRig(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Link", "</x>")
		w.WriteHeader(103)
		w.WriteHeader(200)
	}))
	req, _ := http.NewRequest("GET", r.guard.URL+"/v1/x", nil)
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	if res.Header.Get("Partnerguard-Call") == "" {
		t.Errorf("headers after 103: %v", res.Header)
	}
}
