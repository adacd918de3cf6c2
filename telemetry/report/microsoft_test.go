package report

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/partnerguard/partnerguard/policy"
)

// asked is what Microsoft says when all is well: ten requests, which all passed the guard.
func asked(change func(*Microsoft)) *Microsoft {
	m := &Microsoft{
		Records: &Records{
			Taken: start.Add(time.Hour), Since: start, Until: start.Add(time.Hour), Complete: true,
			Requests: 10, Compliant: 5, NonCompliant: 5, Here: 10, HerePresent: 5, HereMissing: 5, Findings: map[string]int{},
		},
		SignIns:      &SignIns{Since: start, Until: start.Add(time.Hour), Kept: 4},
		Integrations: map[string]*Seen{},
	}
	if change != nil {
		change(m)
	}
	return m
}

func TestMicrosoftsViewIsSaidWithWhatItLacks(t *testing.T) {
	const (
		clear      = "Nothing went round the guard, and no verdict differs."
		incomplete = "Incomplete: "
		stale      = "Stale: "
	)
	for _, tt := range []struct {
		name       string
		microsoft  *Microsoft
		since, now time.Time
		want, not  []string
	}{
		{"nobody asked yet", &Microsoft{}, start, start.Add(2 * time.Hour),
			[]string{"Microsoft was not asked yet: partnerguard reconcile", "partnerguard signins FILE"}, []string{"Microsoft's view", "Going direct", clear}},
		{"records, no sign-ins", asked(func(m *Microsoft) { m.SignIns = nil }), start, start.Add(2 * time.Hour),
			[]string{"Microsoft's view", clear, "Entra's sign-in logs were not read yet: partnerguard signins"}, []string{"not asked yet", "Sign-in logs:", incomplete, stale}},
		{"sign-ins, no records", asked(func(m *Microsoft) { m.Records = nil }), start, start.Add(2 * time.Hour),
			[]string{"Microsoft's view", "Microsoft's own record of the calls was not read yet: partnerguard reconcile", "Sign-in logs: 4 sign-ins"}, []string{clear}},
		{"both, complete and fresh", asked(nil), start, start.Add(2 * time.Hour), []string{clear}, []string{incomplete, stale, "not read yet"}},
		{"incomplete is never all clear", asked(func(m *Microsoft) {
			m.Records.Complete, m.Records.Incomplete = false, []string{"partnerRequests: Microsoft lists no more than 10000 rows"}
		}), start, start.Add(2 * time.Hour), []string{incomplete + "partnerRequests: Microsoft lists no more than 10000 rows. Who does not show"}, []string{clear}},
		{"an incomplete export", asked(func(m *Microsoft) { m.SignIns.Incomplete = true }), start, start.Add(2 * time.Hour), []string{incomplete + "The export is incomplete"}, nil},
		{"more than a day old", asked(nil), start, start.Add(26 * time.Hour), []string{stale + "these records", stale + "The export"}, []string{clear}},
		{"older than the report", asked(nil), start.Add(3 * time.Hour), start.Add(5 * time.Hour), []string{stale + "these records"}, []string{clear}},
		{"a finding elsewhere", asked(func(m *Microsoft) { m.Records.Findings["verdict_differs"] = 1 }), start, start.Add(2 * time.Hour), nil, []string{clear}},
		{"a problem", &Microsoft{Problems: []string{"Microsoft's records are not shown: it is damaged."}}, start, start.Add(2 * time.Hour),
			[]string{"Note: Microsoft's records are not shown: it is damaged."}, []string{"Microsoft's view", "not asked yet"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			rep := build(t, Options{Since: tt.since, Now: tt.now, Microsoft: tt.microsoft}, withMFA(), withoutIt())
			var table, page bytes.Buffer
			if err := WriteTable(&table, rep, Style{}); err != nil {
				t.Fatal(err)
			}
			if err := WriteHTML(&page, rep); err != nil {
				t.Fatal(err)
			}
			text := strings.Join(strings.Fields(table.String()), " ")
			for _, want := range tt.want {
				if !strings.Contains(text, want) {
					t.Errorf("the table lacks %q:\n%s", want, &table)
				}
			}
			for _, not := range tt.not {
				if strings.Contains(text, not) {
					t.Errorf("the table says %q:\n%s", not, &table)
				}
			}
			for _, mark := range []string{"Stale:", "Incomplete:"} {
				if strings.Contains(text, mark) != strings.Contains(page.String(), "<b>"+mark) {
					t.Errorf("table and page differ in %q:\n%s\n%s", mark, &table, &page)
				}
			}
		})
	}
}

func TestWhatSignInsProveReplacesWhatCallsSuggest(t *testing.T) {
	cause := func(code, confidence string, at time.Duration, evidence ...Evidence) Cause {
		return Cause{Cause: code, Confidence: confidence, At: start.Add(at), Evidence: evidence}
	}
	ropc := Evidence{"authenticationProtocol", "ropc"}
	for _, tt := range []struct {
		name   string
		causes []Cause
		tokens Tokens
		want   string // the causes of the report
	}{
		{"nothing", nil, Tokens{}, "refresh_token_without_mfa:likely password_grant:likely trusted_location:possible third_party_custom_control:possible"},
		{"every token", []Cause{cause("password_grant", "certain", 0, ropc)}, Tokens{Tokens: 2, ByUTI: 2}, "password_grant:certain"},
		{"some tokens", []Cause{cause("password_grant", "certain", 0, ropc)}, Tokens{Tokens: 2, ByUTI: 1, NotFound: 1},
			"password_grant:certain refresh_token_without_mfa:likely trusted_location:possible third_party_custom_control:possible"},
		{"by time only", []Cause{cause("trusted_location", "likely", 0, ropc)}, Tokens{Tokens: 2, ByTime: 2},
			"trusted_location:likely refresh_token_without_mfa:likely password_grant:likely third_party_custom_control:possible"},
		{"one that calls do not suggest", []Cause{cause("device_code_without_mfa", "certain", 0, ropc)}, Tokens{Tokens: 2, ByUTI: 2}, "device_code_without_mfa:certain"},
		{"a candidate without evidence", []Cause{cause("password_grant", "certain", 0)}, Tokens{Tokens: 2, Outside: 2},
			"refresh_token_without_mfa:likely password_grant:likely trusted_location:possible third_party_custom_control:possible"},
		{"a sign-in before any token in use", []Cause{cause("password_grant", "certain", -29*time.Hour, ropc)}, Tokens{Tokens: 2, ByUTI: 2},
			"refresh_token_without_mfa:likely password_grant:likely trusted_location:possible third_party_custom_control:possible"},
	} {
		m := asked(func(m *Microsoft) { m.Integrations["billing"] = &Seen{Causes: tt.causes, Tokens: &tt.tokens} })
		rep := build(t, Options{Since: start, Now: start.Add(2 * time.Hour), Microsoft: m}, withoutIt().from("billing", "").for900421())
		var got []string
		for _, c := range rep.Integrations[0].Causes {
			got = append(got, c.Cause+":"+c.Confidence)
		}
		if diff := cmp.Diff(tt.want, strings.Join(got, " ")); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.name, diff)
		}
	}
	// What is mended needs no cause.
	m := asked(func(m *Microsoft) {
		m.Integrations["billing"] = &Seen{Causes: []Cause{cause("password_grant", "certain", 0, ropc)}, Tokens: &Tokens{Tokens: 1, ByUTI: 1}}
	})
	rep := build(t, Options{Since: start, Now: start.Add(2 * time.Hour), Microsoft: m}, withoutIt().from("billing", ""), withMFA().from("billing", ""))
	if g := rep.Integrations[0]; g.Verdict != Ready || len(g.Causes) != 0 {
		t.Errorf("a mended integration is %v with %v", g.Verdict, g.Causes)
	}
}

func TestMicrosoftsViewInJSONHasTheNamesOfTheContract(t *testing.T) {
	m := asked(func(m *Microsoft) {
		m.Records.Daily = &Daily{Applications: 1}
		m.GoingDirect = []Direct{{AppID: "a", Calls: 1, SeenIn: []string{"requests"}}}
		m.Principals = []Finding{{Code: "non_compliant_principal"}}
		m.Integrations["billing"] = &Seen{Direct: 2, DirectCallers: []Direct{}, Findings: []Finding{}, Tokens: &Tokens{}, Failures: []Failure{{Code: 1}}}
	})
	var doc bytes.Buffer
	rep := build(t, Options{Since: start, Now: start.Add(2 * time.Hour), Microsoft: m}, withMFA().from("billing", ""))
	if err := WriteJSON(&doc, rep); err != nil {
		t.Fatal(err)
	}
	var got map[string]any
	if err := json.Unmarshal(doc.Bytes(), &got); err != nil {
		t.Fatal(err)
	}
	has := func(what string, v any, names string) map[string]any {
		t.Helper()
		object, _ := v.(map[string]any)
		for _, name := range strings.Fields(names) {
			if _, ok := object[name]; !ok {
				t.Errorf("%s lacks %s: %s", what, name, &doc)
			}
		}
		return object
	}
	top := has("microsoft", got["microsoft"], "records sign_ins going_direct non_compliant_principals")
	records := has("records", top["records"], "taken since until stale complete requests compliant non_compliant here here_mfa_present here_mfa_missing direct unlisted daily findings")
	has("daily", records["daily"], "applications requests compliant compared here")
	has("sign_ins", top["sign_ins"], "since until stale incomplete sign_ins strangers")
	has("going_direct", top["going_direct"].([]any)[0], "app_id calls non_compliant sign_ins confidence seen_in text fix")
	seen := has("an integration", got["integrations"].([]any)[0].(map[string]any)["microsoft"],
		"compliant non_compliant unlisted direct direct_non_compliant direct_callers findings tokens sign_in_failures")
	has("tokens", seen["tokens"], "tokens by_uti by_time not_found outside")
	var again Report
	if err := json.Unmarshal(doc.Bytes(), &again); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(rep.Microsoft.Records, again.Microsoft.Records); diff != "" {
		t.Errorf("read back (-wrote +read):\n%s", diff)
	}
}

func TestTextOfMicrosoftsIsShownHarmless(t *testing.T) {
	bad := hostile + "<script>alert(1)</script>"
	m := asked(func(m *Microsoft) {
		d := Direct{AppID: bad, App: bad, ObjectID: bad, User: bad, Source: bad, Calls: 1, NonCompliant: 1, SeenIn: []string{bad}, Text: bad, Fix: bad,
			Causes: []Cause{{Cause: bad, Text: bad, Fix: bad, Evidence: []Evidence{{bad, bad}}}}}
		m.Records.Complete, m.Records.Incomplete, m.Problems = false, []string{bad}, []string{bad}
		m.GoingDirect = []Direct{d}
		m.Principals = []Finding{{User: bad, Text: bad, Fix: bad, Severity: "high"}}
		m.Integrations["billing"] = &Seen{
			Direct: 1, DirectCallers: []Direct{d}, Findings: []Finding{{Text: bad, Fix: bad, Severity: "high"}}, Failures: []Failure{{Text: bad, Fix: bad}},
			Causes: []Cause{{Cause: bad, Text: bad, Fix: bad, Confidence: policy.Certain.String(), At: start, SignIn: bad, Evidence: []Evidence{{bad, bad}}}},
		}
	})
	rep := build(t, Options{Since: start, Now: start.Add(2 * time.Hour), Microsoft: m}, withoutIt().from("billing", bad))
	for format, write := range map[string]func(*bytes.Buffer) error{
		"table": func(b *bytes.Buffer) error { return WriteTable(b, rep, Style{}) },
		"JSON":  func(b *bytes.Buffer) error { return WriteJSON(b, rep) },
		"CSV":   func(b *bytes.Buffer) error { return WriteCSV(b, rep) },
		"HTML":  func(b *bytes.Buffer) error { return WriteHTML(b, rep) },
	} {
		var b bytes.Buffer
		if err := write(&b); err != nil {
			t.Fatal(err)
		}
		for _, act := range []string{"\x1b", "\u202e", "\u009b"} {
			if strings.Contains(b.String(), act) {
				t.Errorf("%s holds %q:\n%q", format, act, b.String())
			}
		}
		if format == "HTML" && strings.Contains(b.String(), "<script") {
			t.Errorf("the page holds a script:\n%s", &b)
		}
		if format == "CSV" && (strings.Contains(b.String(), ",=cmd") || strings.Contains(b.String(), "\n=cmd") || strings.Contains(b.String(), `,"=cmd`)) {
			t.Errorf("a cell is a formula:\n%s", &b)
		}
	}
}

func TestManyDirectCallersAreCut(t *testing.T) {
	m := asked(func(m *Microsoft) {
		for range directShown + 7 {
			m.GoingDirect = append(m.GoingDirect, Direct{User: "a-user@contoso.example", AppID: "7d1f0a52-9b3c-4c1e-8f60-2a5b9c0d1e11", App: "An application", Source: "2001:db8:1234:5678:9abc:def0:1234:5678", Calls: 1})
		}
	})
	rep := build(t, Options{Since: start, Now: start.Add(2 * time.Hour), Microsoft: m}, withMFA())
	var b bytes.Buffer
	if err := WriteTable(&b, rep, Style{Width: 80}); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(b.String(), "and 7 more; --format json lists all") {
		t.Errorf("it does not say how many more there are:\n%s", &b)
	}
	for line := range strings.Lines(b.String()) {
		if n := len([]rune(strings.TrimSuffix(line, "\n"))); n > 80 {
			t.Errorf("a line has %d columns: %s", n, line)
		}
	}
}
