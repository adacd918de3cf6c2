package report

import (
	"bytes"
	"encoding/csv"
	"encoding/json"
	"flag"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
	"github.com/partnerguard/partnerguard/policy"
	"github.com/partnerguard/partnerguard/proxy"
	"github.com/partnerguard/partnerguard/telemetry/ledger"
	"github.com/partnerguard/partnerguard/telemetry/store"
)

var update = flag.Bool("update", false, "write testdata anew")

var start = time.Date(2026, 6, 1, 10, 0, 0, 0, time.UTC)

const (
	tenant = "1b2c3d4e-0a1b-4c2d-8e3f-901234567890"
	app1   = "7d1f0a52-9b3c-4c1e-8f60-2a5b9c0d1e11"
	app2   = "7d1f0a52-9b3c-4c1e-8f60-2a5b9c0d1e22"
)

// sent is a call as the tests say it.
type sent struct {
	proxy.Record
	sameTime bool // as the call before
	open     bool // its outcome is still to come
}

// user is a call of sam's with app1 that Microsoft accepted.
func user(mfa policy.MFA, amr ...string) sent {
	r := sent{Record: proxy.Record{
		Decided: proxy.Decided{
			Method: "GET", Path: "/v1/invoices", Route: "/v1/invoices", Integration: "billing", Owner: "billing@contoso.example",
			Token: policy.Token{Verified: true, Kind: policy.KindAppUser, MFA: mfa, TenantID: tenant, AppID: app1, ObjectID: "oid-sam", UPN: "sam@contoso.example", AMR: amr},
		},
		Finished: proxy.Finished{Status: 200},
	}}
	r.Decision = policy.Decision{Effect: policy.Allow, Mode: policy.Audit, WouldReject: mfa != policy.MFAPresent}
	switch mfa {
	case policy.MFAPresent:
		r.Reason = policy.ReasonMFAPresent
	case policy.MFAAbsent:
		r.Reason = policy.ReasonMFAMissing
	default:
		r.Reason = policy.ReasonMFAUnknown
	}
	return r
}

func withMFA() sent    { return user(policy.MFAPresent, "pwd", "mfa") }
func withoutIt() sent  { return user(policy.MFAAbsent, "pwd") }
func unreadable() sent { return user(policy.MFAUnknown) }

func appOnly() sent {
	r := user(policy.MFANotApplicable, "rsa")
	r.Token.Kind, r.Token.ObjectID, r.Token.UPN = policy.KindAppOnly, "oid-app", ""
	r.Reason, r.WouldReject = policy.ReasonAppOnly, false
	return r
}

// failing is a call whose token did not verify.
func failing(reason policy.Reason) sent {
	r := user(policy.MFAAbsent, "pwd")
	r.Token.Verified, r.Reason = false, reason
	if reason.Unverifiable() || reason == policy.ReasonTokenMissing {
		r.Token = policy.Token{Kind: policy.KindOpaque}
	}
	return r
}

func (s sent) answered(status int) sent { s.Status = status; return s }

// refused is answered with 401 by Microsoft.
func (s sent) refused(k policy.Rejection, code string) sent {
	s.Status, s.Rejection, s.Code = 401, k, code
	return s
}
func (s sent) for900421() sent { return s.refused(policy.RejectionMFARequired, "900421") }

// enforced is refused by the guard.
func (s sent) enforced() sent {
	s.Effect, s.Mode, s.Status = policy.Reject, policy.Enforce, 401
	return s
}
func (s sent) by(upn string) sent   { s.Token.UPN, s.Token.ObjectID = upn, "oid-"+upn; return s }
func (s sent) app(id string) sent   { s.Token.AppID = id; return s }
func (s sent) to(route string) sent { s.Route, s.Path = route, route; return s }
func (s sent) at(t time.Time) sent  { s.Time = t; return s }
func (s sent) together() sent       { s.sameTime = true; return s }
func (s sent) unended() sent        { s.open = true; return s }
func (s sent) compliant(b bool) sent {
	s.MFACompliant = policy.CompliantFalse
	if b {
		s.MFACompliant = policy.CompliantTrue
	}
	return s
}
func (s sent) from(integration, owner string) sent {
	s.Integration, s.Owner = integration, owner
	return s
}

// estate is a data directory into which calls were written by way of the ledger,
// a minute apart, and its reader.
func estate(t *testing.T, calls ...sent) (store.Reader, map[string]store.Identity) {
	t.Helper()
	dir := t.TempDir()
	l, err := ledger.Open(ledger.Config{Dir: dir, Retention: -1, MinFree: -1})
	if err != nil {
		t.Fatal(err)
	}
	s, err := store.Open(store.Config{Dir: dir, Retention: -1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	last := start.Add(-time.Minute)
	for i, c := range calls {
		switch {
		case !c.Time.IsZero():
		case c.sameTime:
			c.Time = last
		default:
			c.Time = last.Add(time.Minute)
		}
		last = c.Time
		c.Call = uuid.UUID{6: 0x70, 8: 0x80, 14: byte(i >> 8), 15: byte(i)}
		if err := l.Decide(&c.Record); err != nil {
			t.Fatal(err)
		}
		if c.open {
			continue
		}
		if err := l.Finish(&c.Record); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Close(); err != nil { // the last outcome may still wait for company
		t.Fatal(err)
	}
	if _, err := s.CatchUp(t.Context()); err != nil {
		t.Fatal(err)
	}
	r, err := store.OpenReader(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	ids, err := r.Identities(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return r, ids
}

func build(t *testing.T, o Options, calls ...sent) *Report {
	t.Helper()
	r, ids := estate(t, calls...)
	if o.Now.IsZero() {
		o.Now = start.Add(90 * time.Minute)
	}
	rep, err := Build(t.Context(), r, ids, o)
	if err != nil {
		t.Fatal(err)
	}
	return rep
}

func TestVerdict(t *testing.T) {
	type verdictTest struct {
		name  string
		want  Verdict
		calls []sent
	}
	v := func(name string, want Verdict, calls ...sent) verdictTest { return verdictTest{name, want, calls} }
	for _, tt := range []verdictTest{
		v("MFA in every call: ready", Ready, withMFA(), withMFA()),
		v("no MFA, not refused yet: will break", WillBreak, withoutIt()),
		v("no MFA, refused by Microsoft: breaking", Breaking, withoutIt().for900421()),
		v("no MFA, refused now and then: breaking, though the last call went through", Breaking, withoutIt(), withoutIt().for900421(), withoutIt(), withoutIt()),
		v("the script was repaired: its next call turns it ready", Ready, withoutIt().for900421(), withoutIt(), withMFA()),
		v("it was repaired and fell back: will break", WillBreak, withoutIt().for900421(), withMFA(), withoutIt()),
		v("it was repaired, fell back, and is refused: breaking", Breaking, withMFA(), withoutIt().for900421()),
		v("refused although the token has MFA: breaking", Breaking, withMFA().for900421()),
		v("refused with MFA, then accepted with MFA: ready", Ready, withMFA().for900421(), withMFA()),
		v("a server error proves nothing: still breaking", Breaking, withoutIt().for900421(), withMFA().answered(503)),
		v("a call that the guard refused proves nothing: still breaking", Breaking, withoutIt().for900421(), withMFA().enforced()),
		v("the guard refuses it: will break", WillBreak, withoutIt().enforced()),
		v("app-only: ready", Ready, appOnly()),
		v("app-only after calls of a user without MFA: the user's part will break", WillBreak, withoutIt(), appOnly()),
		v("app-only refused for MFA: breaking", Breaking, appOnly().for900421()),
		v("another refusal is no matter of MFA: ready", Ready, withMFA().refused(policy.RejectionAppOnlyUnsupported, "900329")),
		v("only opaque tokens: unknown", Unknown, failing(policy.ReasonTokenOpaque)),
		v("only expired tokens: unknown", Unknown, failing(policy.ReasonTokenExpired)),
		v("opaque tokens that Microsoft refuses: breaking", Breaking, failing(policy.ReasonTokenOpaque).for900421()),
		v("an expired token among good ones of the same user: ready", Ready, withMFA(), failing(policy.ReasonTokenExpired)),
		v("an expired token without MFA does not count after a good one", Ready, withMFA(), failing(policy.ReasonTokenExpired)),
		v("MFA cannot be judged: unknown, although the token verifies", Unknown, unreadable()),
		v("MFA cannot be judged any more: unknown", Unknown, withMFA(), unreadable()),
		v("MFA can be judged again: ready", Ready, unreadable(), withMFA()),
		v("no MFA after one that cannot be judged: will break", WillBreak, unreadable(), withoutIt()),
		v("two users, one without MFA: the worse counts", WillBreak, withMFA(), withoutIt().by("kim@contoso.example"), withMFA()),
		v("two apps of one user: repairing one leaves the other", WillBreak, withoutIt().app(app2), withMFA()),
		v("a good user and a bearer of opaque tokens: unknown", Unknown, withMFA(), failing(policy.ReasonTokenOpaque)),
		v("with and without MFA at the same moment: will break", WillBreak, withMFA(), withoutIt().together()),
		v("refused and accepted with MFA at the same moment: not newer, so not breaking", Ready, withMFA(), withMFA().for900421().together()),
		v("only a call that has not ended: unknown", Unknown, withMFA().unended()),
		v("no calls: unknown", Unknown),
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := build(t, Options{}, tt.calls...).Verdict; got != tt.want {
				t.Errorf("verdict is %v, want %v", got, tt.want)
			}
		})
	}
}

func TestTheEstateIsItsWorstIntegration(t *testing.T) {
	good, bad := withMFA().from("good", ""), withoutIt().from("bad", "")
	for _, tt := range []struct {
		name string
		o    Options
		want Verdict
		all  string
	}{
		{"by integration", Options{}, WillBreak, "bad=will-break good=ready"},
		{"with one that has no calls", Options{Integrations: []Integration{{Name: "silent", Owner: "ops"}}}, WillBreak, "bad=will-break silent=unknown good=ready"},
		{"by route the estate stays what it is", Options{By: ByRoute}, WillBreak, "/v1/invoices=will-break"},
		{"before the bad one called", Options{Until: start.Add(time.Hour)}, Ready, "good=ready"},
		{"since the bad one called", Options{Since: start.Add(time.Hour)}, WillBreak, "bad=will-break"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			rep := build(t, tt.o, good.at(start), bad.at(start.Add(61*time.Minute)))
			var all []string
			for _, g := range rep.All() {
				all = append(all, g.Name+"="+g.Verdict.String())
			}
			if rep.Verdict != tt.want || strings.Join(all, " ") != tt.all {
				t.Errorf("estate %v, groups %q; want %v, %q", rep.Verdict, strings.Join(all, " "), tt.want, tt.all)
			}
		})
	}
}

func TestCauses(t *testing.T) {
	for _, tt := range []struct {
		name  string
		calls []sent
		want  string
	}{
		{"a token cannot tell a password grant from an old refresh token: both, likely", []sent{withoutIt()},
			"refresh_token_without_mfa likely, password_grant likely, trusted_location possible, third_party_custom_control possible"},
		{"federated", []sent{user(policy.MFAAbsent, "fed").for900421()}, "federated_idp_without_mfa likely, trusted_location possible"},
		{"what was repaired is not explained", []sent{withoutIt(), withMFA()}, ""},
		{"only the worst is explained", []sent{failing(policy.ReasonTokenExpired).by("kim"), user(policy.MFAAbsent, "fed")}, "federated_idp_without_mfa likely, trusted_location possible"},
		{"expired", []sent{failing(policy.ReasonTokenExpired)}, "token_kept_too_long likely"},
		{"no token", []sent{failing(policy.ReasonTokenMissing)}, "no_bearer_token certain"},
		{"causes of several pairs are merged, the more frequent first", []sent{
			user(policy.MFAAbsent, "fed"), user(policy.MFAAbsent, "rsa").by("kim"), user(policy.MFAAbsent, "rsa").by("kim"),
		}, "single_factor_strong_method likely, federated_idp_without_mfa likely, trusted_location possible, refresh_token_without_mfa possible"},
		{"ready, and yet Microsoft refuses it for another reason", []sent{appOnly(), appOnly().refused(policy.RejectionAppOnlyUnsupported, "900329")}, "app_only_unsupported likely"},
		{"ready, and the other refusal is over", []sent{appOnly().refused(policy.RejectionAppOnlyUnsupported, "900329"), appOnly()}, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var got []string
			for _, c := range build(t, Options{}, tt.calls...).Integrations[0].Causes {
				if c.Fix == "" || c.Text == "" {
					t.Errorf("cause %s lacks text or fix", c.Cause)
				}
				got = append(got, c.Cause+" "+c.Confidence)
			}
			if s := strings.Join(got, ", "); s != tt.want {
				t.Errorf("causes are\n%s\nwant\n%s", s, tt.want)
			}
		})
	}
}

// sample is an estate with something of everything.
func sample() []sent {
	var calls []sent
	add := func(c sent, integration, owner string, n int) {
		for range n {
			calls = append(calls, c.from(integration, owner))
		}
	}
	add(withMFA().compliant(true), "secure-app-model", "platform@contoso.example", 5)
	add(withoutIt().by("svc@contoso.example").app(app2).to("/v1/customers"), "old-refresh-token", "a-team-with-a-long-name@contoso.example", 3)
	add(withoutIt().by("svc@contoso.example").app(app2).to("/v1/invoices").compliant(false).for900421(), "old-refresh-token", "a-team-with-a-long-name@contoso.example", 2)
	add(user(policy.MFAAbsent, "fed").by("kim@contoso.example"), "federated", "", 1)
	add(appOnly().to("/v1/productupgrades"), "app-only", "ops@contoso.example", 2)
	add(failing(policy.ReasonTokenOpaque).to("/generatetoken"), "opaque", "crm@contoso.example", 2)
	add(failing(policy.ReasonTokenWrongAudience).enforced(), "wrong-audience", "reports@contoso.example", 1)
	add(withMFA().unended(), "secure-app-model", "platform@contoso.example", 1)
	return calls
}

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("%s (-want +got):\n%s", name, diff)
	}
}

func TestOutputs(t *testing.T) {
	r, ids := estate(t, sample()...)
	o := Options{Now: start.Add(90 * time.Minute), Integrations: []Integration{{Name: "federated", Owner: "idp@contoso.example"}, {Name: "never-seen", Owner: "sales@contoso.example"}}}
	for _, by := range []Dimension{ByIntegration, ByUser, ByApp, ByCustomer, ByRoute} {
		o.By = by
		rep, err := Build(t.Context(), r, ids, o)
		if err != nil {
			t.Fatal(err)
		}
		rep.LagSeconds = 7.5
		var table, narrow, doc, sheet bytes.Buffer
		for _, err := range []error{
			WriteTable(&table, rep, Style{}), WriteTable(&narrow, rep, Style{Width: 100}), WriteJSON(&doc, rep), WriteCSV(&sheet, rep), WriteHTML(io.Discard, rep),
		} {
			if err != nil {
				t.Fatal(err)
			}
		}
		golden(t, string(by)+".txt", table.Bytes())
		for _, line := range strings.Split(narrow.String(), "\n") {
			if n := len([]rune(line)); n > 100 {
				t.Errorf("by %s: a line has %d columns, want at most 100:\n%s", by, n, line)
			}
		}
		var again Report
		if err := json.Unmarshal(doc.Bytes(), &again); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(rep.All(), again.All()); diff != "" {
			t.Errorf("by %s: read back from JSON (-wrote +read):\n%s", by, diff)
		}
		rows, err := csv.NewReader(&sheet).ReadAll()
		if err != nil || len(rows) != len(rep.All())+1 {
			t.Errorf("by %s: CSV has %d lines, %v; want %d", by, len(rows), err, len(rep.All())+1)
		}
		if by == ByIntegration {
			golden(t, "integration.json", doc.Bytes())
			var sheet bytes.Buffer
			WriteCSV(&sheet, rep)
			golden(t, "integration.csv", sheet.Bytes())
		}
	}
}

func TestJSONHasTheNamesOfTheContract(t *testing.T) {
	var doc bytes.Buffer
	if err := WriteJSON(&doc, build(t, Options{}, sample()...)); err != nil {
		t.Fatal(err)
	}
	var got map[string]any
	if err := json.Unmarshal(doc.Bytes(), &got); err != nil {
		t.Fatal(err)
	}
	for _, name := range strings.Fields("since until verdict lag_seconds integrations") {
		if _, ok := got[name]; !ok {
			t.Errorf("the document lacks %s", name)
		}
	}
	first := got["integrations"].([]any)[0].(map[string]any)
	for _, name := range strings.Fields("name owner verdict calls mfa_present mfa_missing mfa_unknown app_only unverifiable would_reject rejected refusals mfa_compliant amr routes first_seen last_seen causes") {
		if _, ok := first[name]; !ok {
			t.Errorf("an integration lacks %s", name)
		}
	}
	cause := first["causes"].([]any)[0].(map[string]any)
	for _, name := range strings.Fields("cause confidence fix") {
		if _, ok := cause[name]; !ok {
			t.Errorf("a cause lacks %s", name)
		}
	}
}

func TestAnEmptyStoreIsReportedToo(t *testing.T) {
	rep := build(t, Options{})
	var table, doc bytes.Buffer
	if err := WriteTable(&table, rep, Style{}); err != nil {
		t.Fatal(err)
	}
	if err := WriteJSON(&doc, rep); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(table.String(), "No calls yet.") || !strings.Contains(doc.String(), `"integrations": []`) {
		t.Errorf("table:\n%s\nJSON:\n%s", &table, &doc)
	}
}

const hostile = "=cmd|' /C calc'!A0\x1b[31m\u202egpj\u009b\r\n\xff"

func TestTextOfClientsIsShownHarmless(t *testing.T) {
	c := withoutIt().for900421().from("x", "=1+1").by(hostile)
	c.Token.AMR, c.Code, c.Path, c.Route = []string{hostile}, hostile, hostile, ""
	r, ids := estate(t, c)
	rep, err := Build(t.Context(), r, ids, Options{Now: start.Add(time.Hour), By: ByUser})
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	table := NewCallsTable(&out, ids, Style{})
	var calls []store.Call
	if err := r.Calls(t.Context(), store.Filter{}, func(c store.Call) error {
		calls = append(calls, c)
		if err := table.Row(&c); err != nil {
			return err
		}
		return WriteCallJSON(&out, &c, ids)
	}); err != nil || len(calls) != 1 {
		t.Fatal(len(calls), err)
	}
	for _, err := range []error{WriteTable(&out, rep, Style{}), WriteJSON(&out, rep)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	shown := out.String()
	var sheet bytes.Buffer
	if err := WriteCSV(&sheet, rep); err != nil {
		t.Fatal(err)
	}
	for _, bad := range []string{"\x1b", "\u202e", "\u009b", "\r", "\xff"} {
		if strings.Contains(shown, bad) || strings.Contains(strings.ReplaceAll(sheet.String(), "\r\n", "\n"), bad) {
			t.Errorf("%q is shown as it is", bad)
		}
	}
	rows, err := csv.NewReader(&sheet).ReadAll()
	if err != nil {
		t.Fatal(err)
	}
	for i, text := range rows[1] {
		if text != "" && strings.ContainsAny(text[:1], "=+-@\t\r") {
			t.Errorf("cell %s begins a formula: %q", rows[0][i], text)
		}
	}
	if name := rows[1][1]; !strings.HasPrefix(name, `'=cmd|`) {
		t.Errorf("the hostile name reads %q; want it with an apostrophe in front", name)
	}
}

func TestCellsThatBeginFormulas(t *testing.T) {
	for in, want := range map[string]string{
		"": "", "plain": "plain", "a=b": "a=b", "7": "7",
		"=1": "'=1", "+1": "'+1", "-1": "'-1", "@x": "'@x", "  =1": "'  =1", "\t=1": `\t=1`, "|x": "'|x", "＝1": "'＝1",
	} {
		if got := cell(in); got != want {
			t.Errorf("cell(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestCallsTable(t *testing.T) {
	interrupted := withMFA()
	interrupted.Status, interrupted.Error = 0, "interrupted"
	r, ids := estate(t,
		withMFA(),
		withoutIt().by("svc@contoso.example").for900421(),
		failing(policy.ReasonTokenExpired).enforced().to(""),
		appOnly().refused(policy.RejectionOther, "").answered(403),
		interrupted,
		withMFA().unended(),
	)
	var plain, objects bytes.Buffer
	table := NewCallsTable(&plain, ids, Style{Width: 190})
	err := r.Calls(t.Context(), store.Filter{}, func(c store.Call) error {
		if err := table.Row(&c); err != nil {
			return err
		}
		return WriteCallJSON(&objects, &c, ids)
	})
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "calls.txt", plain.Bytes())
	lines := strings.Split(strings.TrimSpace(objects.String()), "\n")
	if len(lines) != 6 {
		t.Fatalf("%d lines of JSON, want 6", len(lines))
	}
	var refused map[string]any
	if err := json.Unmarshal([]byte(lines[1]), &refused); err != nil {
		t.Fatal(err)
	}
	delete(refused, "user_ref")
	want := map[string]any{
		"call": "00000000-0000-7000-8000-000000000001", "time": "2026-06-01T10:01:00Z", "method": "GET", "route": "/v1/invoices", "path": "/v1/invoices",
		"integration": "billing", "owner": "billing@contoso.example", "kind": "app_user", "verified": true, "tid": tenant, "app_id": app1,
		"amr": []any{"pwd"}, "mfa": "absent", "mode": "audit", "effect": "allow", "reason": "mfa_missing", "would_reject": true,
		"status": 401.0, "rejection": "mfa_required", "code": "900421", "user": "svc@contoso.example",
		"request_id": "00000000-0000-7000-8000-000000000001", "correlation_id": "00000000-0000-7000-8000-000000000001",
	}
	causes := refused["causes"].([]any)
	delete(refused, "causes")
	if diff := cmp.Diff(want, refused); diff != "" {
		t.Errorf("call as JSON (-want +got):\n%s", diff)
	}
	if len(causes) < 2 || causes[0].(map[string]any)["cause"] != "refresh_token_without_mfa" {
		t.Errorf("causes = %v", causes)
	}
	if slices.ContainsFunc(lines, func(l string) bool { return !json.Valid([]byte(l)) }) {
		t.Error("a line is no JSON")
	}
}

func TestColorIsOnlyWhereItIsAsked(t *testing.T) {
	rep := build(t, Options{}, sample()...)
	var plain, colored bytes.Buffer
	WriteTable(&plain, rep, Style{})
	WriteTable(&colored, rep, Style{Color: true})
	if strings.Contains(plain.String(), "\x1b") || !strings.Contains(colored.String(), "\x1b[31m") {
		t.Error("color is where it should not be, or is not where it should")
	}
}

func TestParseDimension(t *testing.T) {
	if d, err := ParseDimension("route"); d != ByRoute || err != nil {
		t.Errorf("ParseDimension(route) = %q, %v", d, err)
	}
	if d, err := ParseDimension("planet"); d != "" || err == nil {
		t.Errorf("ParseDimension(planet) = %q, %v; want an error", d, err)
	}
}
