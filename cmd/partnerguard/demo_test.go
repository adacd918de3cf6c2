package main

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/partnerguard/partnerguard/internal/emulator"
	"github.com/partnerguard/partnerguard/telemetry/report"
)

// The demo ends by itself, and its report gives each of the nine sample
// integrations its verdict and its reason.
func TestDemo(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "demo")
	began := time.Now()
	stdout, stderr, code := partnerguard(t, "demo", "--for", "8s", "--data-dir", dir)
	if code != 0 || stderr != "" {
		t.Fatalf("exit %d\n%s%s", code, stdout, stderr)
	}
	if took := time.Since(began); took < 8*time.Second || took > 40*time.Second {
		t.Errorf("it took %v, want little more than 8 s", took)
	}
	if !strings.Contains(stdout, "This is what partnerguard report says of them:\n\nEstate: breaking\n") {
		t.Errorf("there is no report at the end:\n%s", stdout)
	}

	out, stderr, code := partnerguard(t, "report", "--format", "json", "--data-dir", dir)
	if code != 0 {
		t.Fatalf("report: exit %d: %s", code, stderr)
	}
	var rep report.Report
	if err := json.Unmarshal([]byte(out), &rep); err != nil {
		t.Fatal(err)
	}
	if rep.Verdict != report.Breaking || len(rep.Integrations) != 9 || rep.Open != 0 || rep.Gaps != nil {
		t.Errorf("the estate is %s, with %d integrations, %d open calls, gaps %v", rep.Verdict, len(rep.Integrations), rep.Open, rep.Gaps)
	}
	found := map[string]report.Group{}
	for _, g := range rep.Integrations {
		found[g.Name] = g
	}
	for _, row := range []struct {
		name    string
		verdict report.Verdict
		reason  string
		causes  []string // the first ones, in their order unless they are as likely
		sure    string   // how sure these are
	}{
		{emulator.AppCompliant, report.Ready, "mfa_present", nil, ""},
		{emulator.AppPassword, report.WillBreak, "mfa_missing", []string{"password_grant", "refresh_token_without_mfa"}, "likely"},
		{emulator.AppOldRefresh, report.WillBreak, "mfa_missing", []string{"password_grant", "refresh_token_without_mfa"}, "likely"},
		{emulator.AppFederated, report.WillBreak, "mfa_missing", []string{"federated_idp_without_mfa"}, "likely"},
		{emulator.AppOnly, report.Ready, "app_only", nil, ""},
		{emulator.AppExpired, report.Unknown, "token_expired", []string{"token_kept_too_long"}, ""},
		{emulator.AppWrongAud, report.Unknown, "token_wrong_audience", []string{"legacy_audience"}, ""},
		{emulator.AppOpaque, report.Unknown, "token_opaque", []string{"generatetoken_exchange"}, "likely"},
		{emulator.AppIntermittent, report.Breaking, "mfa_missing", nil, ""},
	} {
		g, ok := found[row.name]
		if !ok {
			t.Errorf("%s is not in the report", row.name)
			continue
		}
		if g.Verdict != row.verdict || g.Reasons[row.reason] < 5 || !strings.HasSuffix(g.Owner, "@contoso.example") {
			t.Errorf("%s: %s with reasons %v, owner %q, want %s with %s", row.name, g.Verdict, g.Reasons, g.Owner, row.verdict, row.reason)
		}
		// One call of sdk-reseller exchanges the token, with MFA.
		if others := g.Calls - g.Reasons[row.reason]; others > 1 || others == 1 && row.name != emulator.AppOpaque {
			t.Errorf("%s: %d calls, reasons %v", row.name, g.Calls, g.Reasons)
		}
		var causes []string
		for _, c := range g.Causes[:min(len(g.Causes), len(row.causes))] {
			causes = append(causes, c.Cause)
			if row.sure != "" && c.Confidence != row.sure || c.Text == "" || c.Fix == "" {
				t.Errorf("%s: cause %+v, want it %s, with text and fix", row.name, c, row.sure)
			}
		}
		slices.Sort(causes)
		if !slices.Equal(causes, row.causes) {
			t.Errorf("%s: causes %+v, want first %v", row.name, g.Causes, row.causes)
		}
	}
	var refusals int64
	for _, n := range found[emulator.AppIntermittent].Refusals {
		refusals += n
	}
	if g := found[emulator.AppIntermittent]; refusals == 0 || refusals == g.Calls || len(g.Causes) == 0 {
		t.Errorf("Microsoft refused %d of %d calls of %s, causes %v; want some", refusals, g.Calls, emulator.AppIntermittent, g.Causes)
	}
	if g := found[emulator.AppWrongAud]; g.Refusals["900420"] != g.Calls {
		t.Errorf("refusals of %s: %v", emulator.AppWrongAud, g.Refusals)
	}
	if !slices.ContainsFunc(rep.Notes, func(note string) bool {
		return strings.Contains(note, "/generatetoken by "+emulator.AppOpaque) && strings.Contains(note, "opaque")
	}) {
		t.Errorf("no note says that %s exchanged its token: %v", emulator.AppOpaque, rep.Notes)
	}
	if verify, _, code := partnerguard(t, "ledger", "verify", "--data-dir", dir); code != 0 {
		t.Errorf("ledger verify: exit %d\n%s", code, verify)
	}
}

// Without --for it runs until an interrupt, and then reports all the same. What it
// kept in a directory of its own is gone.
func TestDemoIsInterrupted(t *testing.T) {
	t.Parallel()
	temp := t.TempDir()
	cmd := exec.Command("partnerguard", "demo")
	cmd.Env = append(os.Environ(), "TMPDIR="+temp)
	var out lockedBuffer
	var errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	t.Cleanup(func() { cmd.Process.Kill() })
	// Each of the nine has made its first call.
	awaiting(t, func() (string, bool) {
		return out.String(), strings.Count(out.String(), "\n  ") == 9
	})
	if kept, _ := filepath.Glob(filepath.Join(temp, "partnerguard-demo-*", "ledger")); len(kept) != 1 {
		t.Errorf("it keeps its ledger in %v, want one directory in %s", kept, temp)
	}
	cmd.Process.Signal(os.Interrupt)
	select {
	case err := <-ended:
		if err != nil || errs.Len() > 0 {
			t.Errorf("it ended with %v\n%s%s", err, out.String(), errs.String())
		}
	case <-time.After(30 * time.Second):
		t.Fatalf("it does not end:\n%s", out.String())
	}
	if !strings.Contains(out.String(), "Estate: ") || !strings.Contains(out.String(), "\nready      nightly-billing ") {
		t.Errorf("there is no report at the end:\n%s", out.String())
	}
	if left, _ := os.ReadDir(temp); len(left) != 0 {
		t.Errorf("it left %v behind", left)
	}
}

// lockedBuffer is a bytes.Buffer that can be read while a process writes to it.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}
