package main

import (
	"bytes"
	"compress/flate"
	"compress/gzip"
	"compress/zlib"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/partnerguard/partnerguard/internal/emulator"
)

// reportedCall is one line of calls --format json.
type reportedCall struct {
	Call, Integration, Owner, Reason, Rejection, Code, User string
	UpstreamStatus                                          string `json:"upstream_status"`
	Status                                                  int
	Causes                                                  []struct{ Cause, Text, Confidence, Fix string }
}

// listCalls runs partnerguard calls and returns its JSON lines by call id.
func listCalls(t *testing.T, dir string, args ...string) map[string]reportedCall {
	t.Helper()
	stdout, stderr, code := partnerguard(t, append([]string{"calls", "--data-dir", dir, "--format", "json"}, args...)...)
	if code != 0 {
		t.Fatalf("calls: exit %d: %s", code, stderr)
	}
	calls := map[string]reportedCall{}
	for l := range strings.Lines(stdout) {
		var c reportedCall
		if err := json.Unmarshal([]byte(l), &c); err != nil {
			t.Fatalf("calls: %v: %s", err, l)
		}
		calls[c.Call] = c
	}
	return calls
}

// plainText is a table without its line breaks and paddings.
func plainText(table string) string { return strings.Join(strings.Fields(table), " ") }

// endToEnd is what of a header must arrive as it was sent.
func endToEnd(h http.Header) http.Header {
	h = maps.Clone(h)
	for name := range h {
		if strings.HasPrefix(name, "Partnerguard-") {
			delete(h, name)
		}
	}
	// Hop-by-hop, and what differs from call to call.
	for _, name := range []string{"Connection", "Keep-Alive", "Transfer-Encoding", "Date", "Ms-Cv"} {
		delete(h, name)
	}
	return h
}

// What the emulator makes up anew for each refusal in Graph's shape.
var (
	anyID   = regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}`)
	anyDate = regexp.MustCompile(`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d`)
)

// unpack undoes the encodings that the emulator knows.
func unpack(t *testing.T, encoding string, body []byte) []byte {
	t.Helper()
	var r io.Reader = bytes.NewReader(body)
	var err error
	switch encoding {
	case "gzip":
		r, err = gzip.NewReader(r)
	case "deflate":
		if r, err = zlib.NewReader(r); err != nil {
			r, err = flate.NewReader(bytes.NewReader(body)), nil // without zlib's head, as many send it
		}
	}
	if err != nil {
		t.Fatalf("body %.40q is not %s: %v", body, encoding, err)
	}
	plain, err := io.ReadAll(r)
	if err != nil {
		t.Fatalf("body %.40q is not %s: %v", body, encoding, err)
	}
	return plain
}

// compareWithDirect makes the same call directly and through the guard and
// compares what the client gets. same says that both bodies are equal to the byte;
// else they hold ids and times.
func compareWithDirect(t *testing.T, em *emulator.Emulator, g *guardProcess, path, token string, same bool, headers ...string) *http.Response {
	t.Helper()
	headers = append(headers, "MS-RequestId: 5c9d1f0e-rejection", "MS-CorrelationId: 7b2a-rejection")
	direct, directBody := get(t, em.PartnerURL()+path, token, headers...)
	res, body := get(t, g.url+path, token, headers...)
	if res.StatusCode != direct.StatusCode {
		t.Errorf("status %d, directly %d", res.StatusCode, direct.StatusCode)
	}
	want, got := endToEnd(direct.Header), endToEnd(res.Header)
	if len(direct.TransferEncoding) > 0 {
		got.Del("Content-Length") // another framing of the same body
	}
	if !same {
		encoding := res.Header.Get("Content-Encoding")
		clean := func(b []byte) []byte {
			return anyDate.ReplaceAll(anyID.ReplaceAll(unpack(t, encoding, b), []byte("id")), []byte("date"))
		}
		if encoding != "" {
			want.Del("Content-Length")
			got.Del("Content-Length")
		}
		directBody, body = clean(directBody), clean(body)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("header differs from a direct answer's (-direct +guard):\n%s", diff)
	}
	if !bytes.Equal(directBody, body) {
		t.Errorf("body %q, directly %q", body, directBody)
	}
	if refused := res.StatusCode == 401 || res.StatusCode == 403; refused && res.Header.Get("Partnerguard-Upstream-Status") != direct.Status ||
		!refused && res.Header["Partnerguard-Upstream-Status"] != nil {
		t.Errorf("Partnerguard-Upstream-Status %q, directly %q", res.Header.Values("Partnerguard-Upstream-Status"), direct.Status)
	}
	return res
}

// Microsoft's refusal for lack of MFA, in every known shape and encoding, reaches
// the client as it is, and the records say whose call it was, why, and the fix.
func TestRejectionShapes(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	dir := t.TempDir()
	g := startGuard(t, dir, guardYAML(em, "audit"))
	app, _ := em.App(emulator.AppPassword)
	token, err := em.Token(emulator.AppPassword)
	if err != nil {
		t.Fatal(err)
	}
	codes := map[emulator.Shape]string{
		emulator.ShapeCodeString: "900421", emulator.ShapeCodeNumber: "900421", emulator.ShapeReasonPhrase: "", emulator.ShapeSDKText: "10001",
		emulator.ShapeGraphNested: "unauthorizedMissingMfaTokenClaim", emulator.ShapeGraphPascal: "Unauthorized_MissingMFA", emulator.ShapeHTML: "",
	}
	type expected struct {
		name, code, upstreamStatus string
		status                     int
	}
	want := map[string]expected{}
	refusals := map[string]int64{}
	for _, shape := range emulator.Shapes() {
		if shape == emulator.ShapeReasonPhrase && overHTTP2 {
			continue // HTTP/2 has no reason phrase; this is why it is off by default
		}
		for _, encoding := range []string{"", "gzip", "deflate", "raw-deflate", "bom", "bom, gzip"} {
			statuses := []int{0} // the shape's own
			if shape == emulator.ShapeGraphNested {
				statuses = []int{401, 403}
			}
			for _, status := range statuses {
				name := strings.TrimSuffix(fmt.Sprintf("%s, %s", shape, encoding), ", ")
				directives := "refuse=" + shape.String()
				if encoding != "" {
					directives += ", " + encoding
				}
				if status != 0 {
					name += fmt.Sprintf(", %d", status)
					directives += fmt.Sprintf(", status=%d", status)
				}
				t.Run(name, func(t *testing.T) {
					same := shape != emulator.ShapeGraphNested
					res := compareWithDirect(t, em, g, "/v1/invoices?size=2", token, same, "Emulate: "+directives)
					upstreamStatus := res.Header.Get("Partnerguard-Upstream-Status")
					if shape == emulator.ShapeReasonPhrase && upstreamStatus != "401 Unauthorized - MFA required" {
						t.Errorf("Partnerguard-Upstream-Status %q", upstreamStatus)
					}
					if res.Header.Get("Partnerguard-Integration") != app.Name || res.Header.Get("Partnerguard-Effect") != "allow" {
						t.Errorf("header %v", res.Header)
					}
					want[res.Header.Get("Partnerguard-Call")] = expected{name, codes[shape], upstreamStatus, res.StatusCode}
					code := codes[shape]
					if code == "" {
						code = "mfa_required" // the kind stands for a code
					}
					refusals[code]++
				})
			}
		}
	}
	// Calls that say nothing of MFA must not show among them.
	get(t, g.url+"/v1/invoices", token)
	get(t, g.url+"/v1/invoices", token, "Emulate: status=500")
	g.stop()

	calls := listCalls(t, dir, "--status", "4xx")
	if len(calls) != len(want) || len(want) < 36 {
		t.Errorf("calls --status 4xx lists %d calls, want %d", len(calls), len(want))
	}
	for id, w := range want {
		c := calls[id]
		if c.Rejection != "mfa_required" || c.Code != w.code || c.Status != w.status || c.UpstreamStatus != w.upstreamStatus {
			t.Errorf("%s: %+v, want %+v", w.name, c, w)
		}
		if c.Integration != app.Name || c.Owner != app.Owner || c.User != app.User {
			t.Errorf("%s: integration %s, owner %s, user %s", w.name, c.Integration, c.Owner, c.User)
		}
		if len(c.Causes) == 0 || c.Causes[0].Text == "" || c.Causes[0].Fix == "" || c.Causes[0].Confidence != "likely" ||
			!slices.ContainsFunc(c.Causes, func(x struct{ Cause, Text, Confidence, Fix string }) bool {
				return x.Cause == "password_grant" && x.Confidence == "likely"
			}) {
			t.Errorf("%s: causes %+v", w.name, c.Causes)
		}
	}

	stdout, stderr, code := partnerguard(t, "calls", "--data-dir", dir, "--status", "4xx")
	if code != 0 {
		t.Fatalf("calls: exit %d: %s", code, stderr)
	}
	table := plainText(stdout)
	for code, n := range refusals {
		line := "Microsoft refused " + app.Name + ", owner " + app.Owner + ", code " + code + " (mfa_required). Cause (likely): "
		if code == "mfa_required" {
			line = "Microsoft refused " + app.Name + ", owner " + app.Owner + " (mfa_required). Cause (likely): "
		}
		if got := strings.Count(table, line); int64(got) != n {
			t.Errorf("the table says %d times %q, want %d", got, line, n)
		}
	}
	if n := strings.Count(table, " Fix: "); n != len(want) {
		t.Errorf("the table gives %d fixes for %d refusals", n, len(want))
	}

	stdout, stderr, code = partnerguard(t, "report", "--data-dir", dir, "--format", "json")
	if code != 0 {
		t.Fatalf("report: exit %d: %s", code, stderr)
	}
	var rep struct {
		Verdict      string
		Integrations []struct {
			Name, Owner, Verdict string
			Calls                int64
			Refusals             map[string]int64
			Causes               []struct{ Cause, Confidence, Fix string }
		}
	}
	if err := json.Unmarshal([]byte(stdout), &rep); err != nil {
		t.Fatal(err)
	}
	if rep.Verdict != "breaking" || len(rep.Integrations) != 1 {
		t.Fatalf("report: %s", stdout)
	}
	in := rep.Integrations[0]
	if in.Name != app.Name || in.Owner != app.Owner || in.Verdict != "breaking" || in.Calls != int64(len(want))+2 ||
		len(in.Causes) == 0 || in.Causes[0].Fix == "" {
		t.Errorf("report: %+v", in)
	}
	if diff := cmp.Diff(refusals, in.Refusals); diff != "" {
		t.Errorf("refusals in the report (-want +got):\n%s", diff)
	}
	for _, format := range []string{"table", "csv"} {
		stdout, _, _ := partnerguard(t, "report", "--data-dir", dir, "--format", format)
		for _, part := range []string{app.Name, app.Owner, "breaking", "900421", in.Causes[0].Fix[:40]} {
			if !strings.Contains(plainText(stdout), part) {
				t.Errorf("report --format %s does not say %q:\n%s", format, part, stdout)
			}
		}
	}
	if _, _, code := partnerguard(t, "report", "--data-dir", dir, "--fail-on", "breaking"); code != 3 {
		t.Errorf("report --fail-on breaking: exit %d, want 3", code)
	}
}

// Whatever else Microsoft answers with 401, 403 or 429 reaches the client as it is
// and is told apart.
func TestRejectionKinds(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	dir := t.TempDir()
	g := startGuard(t, dir, guardYAML(em, "audit"))
	mfa := em.Mint(emulator.TokenSpec{})
	appOnly := em.Mint(emulator.TokenSpec{AppOnly: true})
	customer := "/v1/customers/" + em.Customers()[0]
	expired, err := em.Token(emulator.AppExpired)
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name, path, token, emulate string
		status                     int
		rejection, code, cause     string
	}{
		{"an audience no longer served", "/v1/invoices", em.Mint(emulator.TokenSpec{Audience: emulator.AudienceLegacyGraph}), "", 401, "audience_refused", "900420", "legacy_audience"},
		{"the same, gzip with BOM", "/v1/invoices", em.Mint(emulator.TokenSpec{Audience: emulator.AudienceLegacyGraph}), "bom, gzip", 401, "audience_refused", "900420", "legacy_audience"},
		{"the audience of another API", "/v1/invoices", em.Mint(emulator.TokenSpec{Audience: emulator.AudienceGraph}), "", 401, "audience_refused", "", "wrong_audience"},
		{"app-only where a user is needed", customer, appOnly, "", 403, "app_only_unsupported", "900329", "app_only_unsupported"},
		{"a claims challenge", "/v1/invoices", mfa, "challenge=", 401, "claims_challenge", "400", "claims_challenge"},
		{"a claims challenge of its own", "/v1/invoices", mfa, "challenge=eyJhIjoiYiJ9", 401, "claims_challenge", "400", "claims_challenge"},
		{"no token", "/v1/invoices", "", "", 401, "token_refused", "800001", "no_bearer_token"},
		{"an expired token", "/v1/invoices", expired, "", 401, "token_refused", "", "token_kept_too_long"},
		{"a token refused for no known reason", "/v1/invoices", mfa, "status=401", 401, "token_refused", "400", "token_refused"},
		{"a business rule", "/v1/invoices", mfa, "status=403", 403, "other", "20002", "no_customer_relationship"},
		{"MFA refused despite the claim", "/v1/invoices", mfa, "refuse=code-string", 401, "mfa_required", "900421", "mfa_claim_not_accepted"},
		{"app-only refused for MFA", "/v1/invoices", appOnly, "refuse=graph-pascal", 403, "mfa_required", "Unauthorized_MissingMFA", "app_only_where_user_needed"},
		{"throttled", "/v1/invoices", mfa, "status=429, retry-after=57", 429, "", "", ""},
		{"not found", "/v1/no/such/thing", mfa, "", 404, "", "", ""},
		{"broken", "/v1/invoices", mfa, "status=500", 500, "", "", ""},
		{"unavailable", "/v1/invoices", mfa, "status=503, retry-after=3", 503, "", "", ""},
	}
	var ids []string
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			headers := []string{"Accept: application/json"}
			if tt.emulate != "" {
				headers = append(headers, "Emulate: "+tt.emulate)
			}
			res := compareWithDirect(t, em, g, tt.path, tt.token, true, headers...)
			if res.StatusCode != tt.status {
				t.Errorf("status %d, want %d", res.StatusCode, tt.status)
			}
			if value, ok := strings.CutPrefix(tt.emulate, "challenge="); ok &&
				!strings.Contains(res.Header.Get("Www-Authenticate"), `error="insufficient_claims", claims="`+value) {
				t.Errorf("WWW-Authenticate %q", res.Header.Get("Www-Authenticate"))
			}
			if _, after, ok := strings.Cut(tt.emulate, "retry-after="); ok && res.Header.Get("Retry-After") != after {
				t.Errorf("Retry-After %q, want %s", res.Header.Get("Retry-After"), after)
			}
			ids = append(ids, res.Header.Get("Partnerguard-Call"))
		})
	}
	g.stop()
	calls := listCalls(t, dir)
	if len(calls) != len(tests) || len(ids) != len(tests) {
		t.Fatalf("calls lists %d calls, want %d", len(calls), len(tests))
	}
	for i, tt := range tests {
		c, cause := calls[ids[i]], ""
		if len(c.Causes) > 0 {
			cause = c.Causes[0].Cause
			if c.Causes[0].Fix == "" {
				t.Errorf("%s: no fix: %+v", tt.name, c.Causes)
			}
		}
		if c.Status != tt.status || c.Rejection != tt.rejection || c.Code != tt.code || cause != tt.cause {
			t.Errorf("%s: status %d, rejection %q, code %q, cause %q; want %d, %q, %q, %q",
				tt.name, c.Status, c.Rejection, c.Code, cause, tt.status, tt.rejection, tt.code, tt.cause)
		}
	}
}
