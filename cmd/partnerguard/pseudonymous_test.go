package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/partnerguard/partnerguard/internal/emulator"
	"github.com/partnerguard/partnerguard/telemetry/reconcile"
	"github.com/partnerguard/partnerguard/telemetry/report"
	"github.com/partnerguard/partnerguard/telemetry/store"
)

// TestPseudonymousUsersStayUnnamedInMicrosoftsRecords holds Microsoft's records and a
// sign-in log, which name everybody, against those of a guard that names nobody.
func TestPseudonymousUsersStayUnnamedInMicrosoftsRecords(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	const identities = "ledger: {identities: pseudonymous}"
	m, dir, want := makeMixedTraffic(t, em, identities)
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
	yaml := file("guard.yaml", guardYAML(em, "audit", identities))
	// whom Microsoft names: object ids and names, and the object ids by application.
	const kim = "5F0E6C7A-3333-4D3B-9A55-0C1D2E3F4A5B"
	whom, objectOf := []string{strings.ToLower(kim), "kim@contoso.example"}, map[string]string{}
	nobody := func(when, text string) {
		t.Helper()
		eachFile(t, dir, func(path string, data []byte) {
			for _, who := range whom {
				if strings.Contains(strings.ToLower(string(data)), who) {
					t.Errorf("%s, %s stands in %s", when, who, path)
				}
			}
		})
		for _, who := range whom {
			if strings.Contains(strings.ToLower(text), who) {
				t.Errorf("%s, it shows %s:\n%s", when, who, text)
			}
		}
	}
	integrations := func(r *reconcile.Result) (all []string) {
		for _, f := range r.Findings {
			if strings.HasPrefix(f.Code, reconcile.NonCompliantPrincipal) {
				all = append(all, f.Code+" "+f.User)
				for _, in := range f.Integrations {
					all = append(all, "  "+in.Name+" "+in.Owner)
				}
			}
		}
		return all
	}
	principals := []string{
		"non_compliant_principal svc-sync@contoso-partner.example", "  license-sync licensing@contoso.example",
		"non_compliant_principal_not_seen old-tool@contoso-partner.example",
	}

	r := reconciled(t, m.canaries, exitFindings, "-c", yaml, "--data-dir", dir, "--delay", "0s", "--token-file", file("token", token))
	if diff := cmp.Diff(want, directCallers(r)); diff != "" || !r.Complete {
		t.Errorf("direct callers (-want +got), %+v:\n%s", r.Windows, diff)
	}
	if diff := cmp.Diff(principals, integrations(r)); diff != "" {
		t.Errorf("principals (-want +got):\n%s", diff)
	}
	answers := filepath.Join(work, "answers")
	if err := os.Mkdir(answers, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"partnerRequests", "nonMfaCompliantPartnerPrincipals"} {
		_, body := get(t, em.PartnerURL()+"/v1/"+name, token)
		var rows struct {
			Items []struct{ ObjectID, UPN, ApplicationID string }
		}
		if err := json.Unmarshal(body, &rows); err != nil || len(rows.Items) == 0 {
			t.Fatalf("%s says %s, %v", name, body, err)
		}
		for _, row := range rows.Items {
			objectOf[row.ApplicationID] = row.ObjectID
			if !slices.Contains(whom, row.ObjectID) {
				whom = append(whom, row.ObjectID, row.UPN)
			}
		}
		file(filepath.Join("answers", name+".json"), strings.ReplaceAll(string(body), "a3c1d5e7", "A3C1D5E7"))
	}
	if !slices.Contains(whom, "svc-sync@contoso-partner.example") || !slices.Contains(whom, "old-tool@contoso-partner.example") || !slices.Contains(whom, "a3c1d5e7-1111-4b2c-8d3e-000000000002") {
		t.Fatalf("Microsoft names %q: this test shows nothing", whom)
	}
	nobody("after reconcile", "")

	// Without a configuration the records say that users have no names.
	os.Remove(filepath.Join(dir, "reconcile.json"))
	r = reconciled(t, m.canaries, exitFindings, "--data-dir", dir, "--from", answers)
	if diff := cmp.Diff(principals, integrations(r)); diff != "" {
		t.Errorf("principals of saved answers (-want +got):\n%s", diff)
	}
	nobody("after reconcile without configuration", "")

	// The sign-ins of the calls without MFA, once with the tokens' ids and once found by
	// app, user and time, and a stranger's. The export does not name the tenant.
	records, err := store.OpenReader(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer records.Close()
	signIn := func(at time.Time, app, user, name, uti string) map[string]any {
		return map[string]any{
			"createdDateTime": at.UTC().Format(time.RFC3339), "appId": app, "userId": strings.ToUpper(user), "userPrincipalName": name,
			"resourceId": "fa3d9a0c-3fb0-42cc-9193-47c7ecd2edbd", "uniqueTokenIdentifier": uti, "authenticationProtocol": "ropc",
			"authenticationRequirement": "singleFactorAuthentication", "status": map[string]any{"errorCode": 0},
		}
	}
	for _, args := range [][]string{{"-c", yaml}, nil} {
		rows := []map[string]any{signIn(time.Now(), strangerApp, kim, "Kim@contoso.example", "")}
		if err := records.Calls(t.Context(), store.Filter{Reason: "mfa_missing"}, func(c store.Call) error {
			uti := c.UTI
			if args == nil {
				uti = ""
			}
			rows = append(rows, signIn(time.Unix(c.IssuedAt, 0), c.AppID, objectOf[c.AppID], "svc-sync@contoso-partner.example", uti))
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		page, err := json.Marshal(map[string]any{"value": rows})
		if err != nil {
			t.Fatal(err)
		}
		out, errs, code := partnerguard(t, append(args, "signins", "--data-dir", dir, "--format", "json", file("export.json", string(page)))...)
		var s reconcile.SignIns
		if err := json.Unmarshal([]byte(out), &s); err != nil || code != exitFindings || len(s.Integrations) != 1 || len(s.Strangers) != 1 {
			t.Fatalf("signins ended with %d, %v:\n%s%s", code, err, out, errs)
		}
		if in := s.Integrations[0]; in.Name != "license-sync" || in.Tokens == 0 || in.ByUTI+in.ByTime != in.Tokens || args == nil && in.ByTime == 0 || in.Causes[0].Cause != "password_grant" {
			t.Errorf("license-sync is %+v", in)
		}
		if s.Strangers[0].User != "Kim@contoso.example" {
			t.Errorf("a stranger is %+v", s.Strangers[0])
		}
		nobody("after signins", "")
	}

	// The report knows them by their references, as it does those of calls.
	kept, err := reconcile.LoadResult(dir)
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(kept.Findings, func(f reconcile.Finding) bool { return f.Code == reconcile.NonCompliantPrincipal })
	ref := kept.Findings[i].ObjectID
	reported := func(args ...string) string {
		t.Helper()
		out, errs, code := partnerguard(t, append([]string{"report", "--data-dir", dir}, args...)...)
		if code != 0 || errs != "" {
			t.Fatalf("report %v ended with %d:\n%s%s", args, code, out, errs)
		}
		nobody("after report", out)
		return out
	}
	for _, form := range []string{"table", "csv", "html"} {
		if out := reported("--format", form); !strings.Contains(out, ref) {
			t.Errorf("the report as %s has no %s:\n%s", form, ref, out)
		}
	}
	var rep report.Report
	if err := json.Unmarshal([]byte(reported("--format", "json", "--by", "user")), &rep); err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(rep.Groups, func(g report.Group) bool { return g.Name == ref }) {
		t.Errorf("no user is %s among %+v", ref, rep.Groups)
	}

	// The guard itself does the same on its schedule.
	os.Remove(filepath.Join(dir, "reconcile.json")) // so that a run is due
	g := startGuard(t, dir, guardYAML(em, "audit", identities, reconcileYAML("token: env:RECONCILE_TOKEN")), "RECONCILE_TOKEN="+token)
	g.await(0, "reconciled")
	g.stop()
	nobody("after a scheduled run", g.text())
	if kept, err = reconcile.LoadResult(dir); err != nil || !slices.ContainsFunc(kept.Findings, func(f reconcile.Finding) bool { return f.Code == reconcile.NonCompliantPrincipal && f.ObjectID == ref }) {
		t.Errorf("it kept %+v, %v", kept, err)
	}

	// One is forgotten by the reference, then all.
	forget := func(who string) (left string) {
		t.Helper()
		out, errs, code := partnerguard(t, "ledger", "forget", who, "--data-dir", dir)
		if code != 0 || !strings.Contains(out, ".json no longer says who that is") {
			t.Fatalf("forget %s ended with %d:\n%s%s", who, code, out, errs)
		}
		for _, name := range []string{"reconcile.json", "signins.json"} {
			text, err := os.ReadFile(filepath.Join(dir, name))
			if err != nil {
				t.Fatal(err)
			}
			left += string(text)
		}
		return left
	}
	if left := forget(ref); strings.Contains(left, ref) || !strings.Contains(left, `"object_id":"`) || !strings.Contains(left, `"user_id":"`) {
		t.Errorf("after %s was forgotten the files are %s", ref, left)
	}
	// Of one whose name is known from before, that will do.
	signIns, err := reconcile.LoadSignIns(dir)
	if err != nil {
		t.Fatal(err)
	}
	ref = signIns.Strangers[0].UserID
	if err := os.WriteFile(filepath.Join(dir, "identities.jsonl"), []byte(`{"user_ref":"`+ref+`","tid":"t","oid":"o","upn":"kim@contoso.example"}`+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if left := forget("kim@contoso.example"); strings.Contains(left, ref) {
		t.Errorf("after %s was forgotten by name the files are %s", ref, left)
	}
	nobody("after ledger forget", "")
	if left := forget("--all"); strings.Contains(left, `"object_id":"`) || strings.Contains(left, `"user_id":"`) {
		t.Errorf("after all were forgotten the files are %s", left)
	}
	reported()

	// Without the key nobody can be told by a reference, and no other is made.
	key := filepath.Join(dir, "identities.key")
	if err := os.Remove(key); err != nil {
		t.Fatal(err)
	}
	_, errs, code := partnerguard(t, "reconcile", "-c", yaml, "--data-dir", dir, "--from", answers)
	if _, err := os.Stat(key); code != exitFailure || !strings.Contains(errs, "error: read key of identities: ") || !strings.Contains(errs, "hint: give --data-dir of the guard") || err == nil {
		t.Errorf("without the key reconcile ended with %d, %v:\n%s", code, err, errs)
	}
}
