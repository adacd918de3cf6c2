package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/partnerguard/partnerguard/internal/emulator"
	"github.com/partnerguard/partnerguard/telemetry/reconcile"
	"github.com/partnerguard/partnerguard/telemetry/store"
)

// TestSignInsProveTheCauseOfACall goes the whole way: a call through the guard, the
// sign-in that gave its token, and what report only holds for likely is certain.
func TestSignInsProveTheCauseOfACall(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	g := startGuard(t, t.TempDir(), guardYAML(em, "audit"))
	get(t, g.url+"/v1/invoices", sampleToken(t, em, emulator.AppPassword))
	get(t, g.url+"/v1/customers", sampleToken(t, em, emulator.AppCompliant))
	g.stop()

	r, err := store.OpenReader(g.dir)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	identities, err := r.Identities(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var rows []map[string]any
	if err := r.Calls(t.Context(), store.Filter{Reason: "mfa_missing"}, func(c store.Call) error {
		rows = append(rows, map[string]any{
			"createdDateTime": time.Unix(c.IssuedAt, 0).UTC().Format(time.RFC3339), "appId": c.AppID, "userId": identities[c.UserRef].ObjectID,
			"resourceId": "fa3d9a0c-3fb0-42cc-9193-47c7ecd2edbd", "uniqueTokenIdentifier": c.UTI, "authenticationProtocol": "ropc",
			"authenticationRequirement": "singleFactorAuthentication", "status": map[string]any{"errorCode": 0},
		})
		return nil
	}); err != nil || len(rows) != 1 {
		t.Fatalf("%d calls, %v; want one", len(rows), err)
	}
	for _, tt := range []struct{ uti, want string }{{"", "likely"}, {rows[0]["uniqueTokenIdentifier"].(string), "certain"}} {
		rows[0]["uniqueTokenIdentifier"] = tt.uti
		page, err := json.Marshal(map[string]any{"value": rows})
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(t.TempDir(), "export.json")
		if err := os.WriteFile(file, page, 0o600); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("partnerguard", "signins", "--data-dir", g.dir, "--format", "json", file)
		out, err := cmd.Output()
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != exitFindings {
			t.Fatalf("%v\n%s", err, out)
		}
		var found reconcile.SignIns
		if err := json.Unmarshal(out, &found); err != nil {
			t.Fatal(err)
		}
		if len(found.Integrations) != 1 || len(found.Strangers) != 0 || len(found.Integrations[0].Causes) != 1 {
			t.Fatalf("found is %s", out)
		}
		in := found.Integrations[0]
		c := in.Causes[0]
		got := fmt.Sprintln(in.Name, in.Owner, in.Calls, c.Cause, c.Confidence, c.Principals[0].User)
		if want := fmt.Sprintln("license-sync licensing@contoso.example 1 password_grant", tt.want, "svc-sync@contoso-partner.example"); got != want {
			t.Errorf("it says %s, want %s", got, want)
		}
		kept, err := reconcile.LoadSignIns(g.dir)
		if err != nil || len(kept.Integrations) != 1 || kept.Integrations[0].Causes[0].Confidence != tt.want {
			t.Errorf("kept is %+v, %v", kept, err)
		}
	}
}

func TestSignInProgressIsOneLineOfATerminal(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "export.json")
	if err := os.WriteFile(file, make([]byte, 400), 0o600); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	p := &signInProgress{out: &out}
	show := func(at reconcile.SignInProgress) { p.next = time.Time{}; p.show(at) }
	show(reconcile.SignInProgress{Rows: 3})
	show(reconcile.SignInProgress{File: file, Bytes: 100, Rows: 7})
	p.show(reconcile.SignInProgress{File: file, Bytes: 200, Rows: 8}) // too soon
	show(reconcile.SignInProgress{File: "standard input", Bytes: 5 << 20, Rows: 9})
	p.end()
	want := []string{"", "the guard's own calls: 3 without MFA", "export.json: 25 %, 7 rows", "standard input: 5 MiB, 9 rows", ""}
	if got := strings.Split(out.String(), "\r\x1b[K"); strings.Join(got, "|") != strings.Join(want, "|") {
		t.Errorf("it shows %q, want %q", got, want)
	}
	out.Reset()
	quiet := newSignInProgress(&out)
	quiet.show(reconcile.SignInProgress{})
	quiet.end()
	if out.Len() > 0 {
		t.Errorf("what is no terminal gets %q", &out)
	}
}
