package main

import (
	"encoding/csv"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/partnerguard/partnerguard/internal/emulator"
	"github.com/partnerguard/partnerguard/telemetry/report"
	"github.com/partnerguard/partnerguard/telemetry/store"
)

// TestReportShowsMicrosoftsViewBesideOurs goes the whole way: calls through the guard
// and past it, Microsoft's records, a sign-in log, and the report in every format.
func TestReportShowsMicrosoftsViewBesideOurs(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	m, dir, _ := makeMixedTraffic(t, em)
	reported := func(args ...string) string {
		t.Helper()
		out, errs, code := partnerguard(t, append([]string{"report", "--data-dir", dir}, args...)...)
		m.canaries.search("output of report", []byte(out+errs))
		if code != 0 || errs != "" {
			t.Fatalf("report %v ended with %d:\n%s%s", args, code, out, errs)
		}
		return out
	}
	if out := reported(); strings.Count(out, "Microsoft was not asked yet: partnerguard reconcile") != 1 || strings.Contains(out, "Microsoft's view") {
		t.Errorf("before anybody asked it says:\n%s", out)
	}

	work := t.TempDir()
	file := func(name, text string) string {
		t.Helper()
		path := filepath.Join(work, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	token := m.canaries.token("token of reconcile", sampleToken(t, em, emulator.AppCompliant))
	reconciled(t, m.canaries, exitFindings, "-c", file("guard.yaml", guardYAML(em, "audit")), "--data-dir", dir, "--delay", "0s", "--token-file", file("token", token))
	if out := reported(); strings.Count(out, "Entra's sign-in logs were not read yet: partnerguard signins") != 1 {
		t.Errorf("before a log was read it says:\n%s", out)
	}
	_, errs, code := partnerguard(t, "signins", "--data-dir", dir, file("export.json", m.signInLog(dir)))
	if code != exitFindings {
		t.Fatalf("signins ended with %d: %s", code, errs)
	}

	var rep report.Report
	if err := json.Unmarshal([]byte(reported("--format", "json")), &rep); err != nil {
		t.Fatal(err)
	}
	rec := rep.Microsoft.Records
	if !rec.Complete || rec.Stale || rec.Requests != rec.Here+rec.Direct || rec.Direct != 6 || rec.Requests != rec.Compliant+rec.NonCompliant || rec.HerePresent != 22 || rec.HereMissing != 11 {
		t.Errorf("records are %+v", rec)
	}
	i := slices.IndexFunc(rep.Integrations, func(g report.Group) bool { return g.Name == "license-sync" })
	if i < 0 {
		t.Fatalf("no license-sync among %+v", rep.Integrations)
	}
	in := rep.Integrations[i]
	if c := in.Causes[0]; len(in.Causes) != 1 || c.Cause != "password_grant" || c.Confidence != "certain" || !slices.Equal(c.Evidence, []report.Evidence{{Field: "authenticationProtocol", Value: "ropc"}}) || c.SignIn == "" {
		t.Errorf("the causes of license-sync are %+v, want the one that the log proves", in.Causes)
	}
	seen := in.Microsoft
	if seen == nil || seen.NonCompliant != 11 || seen.Direct != 4 || seen.DirectNonCompliant != 4 || len(seen.DirectCallers) != 1 || seen.Tokens.ByUTI != seen.Tokens.Tokens {
		t.Fatalf("license-sync as Microsoft sees it: %+v", seen)
	}
	var direct []string
	for _, d := range slices.Concat(seen.DirectCallers, rep.Microsoft.GoingDirect) {
		direct = append(direct, strings.Join(append([]string{d.AppID, d.User, d.Source}, d.SeenIn...), " "))
	}
	var password string
	for _, app := range em.Apps() {
		if app.Name == emulator.AppPassword {
			password = app.ID
		}
	}
	if diff := cmp.Diff([]string{
		password + " svc-sync@contoso-partner.example 127.0.0.2 requests",
		strangerApp + " old-tool@contoso-partner.example 127.0.0.2 requests",
		"7d1f0a52-9b3c-4c1e-8f60-2a5b9c0d1e99 kim@contoso.example 203.0.113.24 sign_ins",
	}, direct); diff != "" {
		t.Errorf("direct callers (-want +got):\n%s", diff)
	}

	table := reported()
	for _, want := range []string{
		"Microsoft's view", "Going direct: apps and users that never passed the guard", "certain   The token comes from the password grant", "Sign-in log: authenticationProtocol=ropc; sign-in ",
		"direct    4 requests of its apps went round the guard, 4 without MFA:", "svc-sync@contoso-partner.example from 127.0.0.2 ×4, 4 without MFA", "6 of the 49 requests that Microsoft lists went round the guard.", "old-tool@contoso-partner.example", "kim@contoso.example",
	} {
		if !strings.Contains(table, want) {
			t.Errorf("the table has no %q:\n%s", want, table)
		}
	}
	page := reported("--format", "html")
	for _, want := range []string{"<h2>Going direct</h2>", "authenticationProtocol=ropc", "svc-sync@contoso-partner.example", "kim@contoso.example"} {
		if !strings.Contains(page, want) {
			t.Errorf("the page has no %q:\n%s", want, page)
		}
	}
	rows, err := csv.NewReader(strings.NewReader(reported("--format", "csv"))).ReadAll()
	if err != nil {
		t.Fatal(err)
	}
	cell := func(row []string, name string) string { return row[slices.Index(rows[0], name)] }
	var lines []string
	for _, row := range rows[1:] {
		if name := cell(row, "name"); name == "license-sync" || cell(row, "by") == "direct" {
			lines = append(lines, strings.Join([]string{cell(row, "by"), cell(row, "users"), cell(row, "cause"), cell(row, "confidence"), cell(row, "proof"), cell(row, "direct"), cell(row, "direct_non_compliant"), cell(row, "microsoft_complete")}, " "))
		}
	}
	if diff := cmp.Diff([]string{
		"integration svc-sync@contoso-partner.example password_grant certain authenticationProtocol=ropc 4 4 true",
		"direct old-tool@contoso-partner.example    1 1 true",
		"direct kim@contoso.example password_grant likely authenticationProtocol=ropc 0 0 true",
	}, lines); diff != "" {
		t.Errorf("CSV (-want +got):\n%s", diff)
	}

	// A result that cannot be read is said, and is no reason to refuse the report.
	if err := os.WriteFile(filepath.Join(dir, "reconcile.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if out := reported(); !strings.Contains(out, "Microsoft's records are not shown: ") || strings.Contains(out, "not asked yet") {
		t.Errorf("of a damaged result it says:\n%s", out)
	}
}

// signInLog is a page of Graph's with the sign-ins of the calls without MFA, all by the
// password grant, and one of a stranger.
func (m *mixedTraffic) signInLog(dir string) string {
	m.t.Helper()
	r, err := store.OpenReader(dir)
	if err != nil {
		m.t.Fatal(err)
	}
	defer r.Close()
	identities, err := r.Identities(m.t.Context())
	if err != nil {
		m.t.Fatal(err)
	}
	signIn := func(at time.Time, app, user, name, uti string) map[string]any {
		return map[string]any{
			"id": "3f2a9c10-7b4d-4e21-a6c8-0d5e1f708b00", "createdDateTime": at.UTC().Format(time.RFC3339), "appId": app, "userId": user, "userPrincipalName": name,
			"resourceId": "fa3d9a0c-3fb0-42cc-9193-47c7ecd2edbd", "uniqueTokenIdentifier": uti, "ipAddress": "203.0.113.24", "authenticationProtocol": "ropc",
			"authenticationRequirement": "singleFactorAuthentication", "status": map[string]any{"errorCode": 0},
		}
	}
	rows := []map[string]any{signIn(time.Now(), "7d1f0a52-9b3c-4c1e-8f60-2a5b9c0d1e99", "5f0e6c7a-3333-4d3b-9a55-0c1d2e3f4a5b", "kim@contoso.example", "")}
	if err := r.Calls(m.t.Context(), store.Filter{Reason: "mfa_missing"}, func(c store.Call) error {
		rows = append(rows, signIn(time.Unix(c.IssuedAt, 0), c.AppID, identities[c.UserRef].ObjectID, "", c.UTI))
		return nil
	}); err != nil {
		m.t.Fatal(err)
	}
	page, err := json.Marshal(map[string]any{"value": rows})
	if err != nil {
		m.t.Fatal(err)
	}
	return string(page)
}
