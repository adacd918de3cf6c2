package main

import (
	"errors"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/partnerguard/partnerguard/internal/config"
	"github.com/partnerguard/partnerguard/internal/emulator"
	"github.com/partnerguard/partnerguard/proxy"
	"github.com/partnerguard/partnerguard/telemetry/reconcile"
)

func TestScheduleIsRegularAndSpread(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 6, 10, 12, 0, 0, 0, time.UTC)
	const every = 10 * time.Hour
	for _, tt := range []struct {
		name   string
		last   time.Time
		err    error
		jitter float64
		want   time.Duration // from now
	}{
		{"at once when there was no run", time.Time{}, nil, 0, 0},
		{"soon when there was no run", time.Time{}, nil, 0.5, 5 * time.Minute},
		{"within a sixtieth of the interval", time.Time{}, nil, 1, 10 * time.Minute},
		{"soon when one was missed", now.Add(-30 * time.Hour), nil, 0.5, 5 * time.Minute},
		{"an interval after the last", now.Add(-2 * time.Hour), nil, 0.5, 8 * time.Hour},
		{"a tenth earlier", now.Add(-2 * time.Hour), nil, 0, 7 * time.Hour},
		{"a tenth later", now.Add(-2 * time.Hour), nil, 1, 9 * time.Hour},
		{"sooner after a failure", now.Add(-time.Hour), errors.New("no"), 0.5, 90 * time.Minute},
	} {
		s, cfg := newSchedule(), config.Reconcile{Every: every}
		s.set(cfg, tt.last, 0)
		if s.last = tt.last; tt.err != nil {
			s.ended(tt.last, tt.err)
		}
		if got := s.set(cfg, now, tt.jitter).Sub(now); got != tt.want {
			t.Errorf("%s: due in %s, want %s", tt.name, got, tt.want)
		}
	}
}

func TestScheduleIsAProblemAfterTwoIntervalsWithoutSuccess(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 6, 10, 12, 0, 0, 0, time.UTC)
	s := newSchedule()
	want := func(at time.Duration, is bool) {
		t.Helper()
		if text := s.problem(now.Add(at)); (text != "") != is {
			t.Errorf("after %s the problem is %q", at, text)
		}
	}
	want(0, false)
	s.set(config.Reconcile{Every: time.Hour}, now, 0)
	want(5*time.Hour, false) // it did not fail
	s.ended(now.Add(time.Hour), errors.New("403 Forbidden"))
	want(2*time.Hour, false)
	s.ended(now.Add(2*time.Hour), errors.New("403 Forbidden"))
	want(2*time.Hour+time.Second, true)
	if text := s.problem(now.Add(3 * time.Hour)); !strings.Contains(text, "not read since 2026-06-10T12:00:00Z; the last 2 attempts failed: 403 Forbidden") {
		t.Errorf("the problem is %q", text)
	}
	s.ended(now.Add(3*time.Hour), nil)
	want(3*time.Hour, false)
	s.ended(now.Add(4*time.Hour), errors.New("401 Unauthorized"))
	want(4*time.Hour, false) // counted from the last success
	want(6*time.Hour, true)
	s.set(config.Reconcile{Every: 12 * time.Hour}, now.Add(6*time.Hour), 0) // another interval begins anew
	want(40*time.Hour, false)
	s.set(config.Reconcile{}, now, 0)
	want(100*time.Hour, false)
}

// reconcileYAML is a schedule whose first run is within a second.
func reconcileYAML(source string) string { return "reconcile: {every: 1m, delay: 0s, " + source + "}" }

// TestServeReconcilesOnSchedule lets a running guard ask for Microsoft's records, and
// then changes the schedule without a restart.
func TestServeReconcilesOnSchedule(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	token := sampleToken(t, em, emulator.AppCompliant)
	dir, work := t.TempDir(), t.TempDir()
	tokenFile, file := filepath.Join(work, "token"), filepath.Join(work, "guard.yaml")
	write := func(path, text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	guard := guardYAML(em, "audit")
	write(file, guard+reconcileYAML("token: file:token")+"\n")
	// The file comes later than the guard: that is no reason not to start.
	g := startGuardFile(t, dir, file)
	if l, _ := g.await(0, "reconcile failed"); !strings.Contains(l.Error, "reconcile.token: read secret") || l.Hint != "see reconcile.token and reconcile.token_command in the configuration" {
		t.Errorf("without a token it says %+v", l)
	}
	if n := g.metric("partnerguard_reconcile_failures_total"); n != 1 {
		t.Errorf("%v failures", n)
	}
	if text := g.text(); !strings.Contains(text, "token cannot be read") {
		t.Errorf("no risk was named:\n%s", text)
	}

	get(t, g.url+"/v1/invoices", token)
	get(t, em.PartnerURL()+"/v1/customers", token) // past the guard
	write(tokenFile, token+"\n")
	// What changes of it is tried soon.
	write(file, guard+strings.Replace(reconcileYAML("token: file:token"), "every: 1m", "every: 61s", 1)+"\n")
	_, at := g.await(0, "reconciled")
	line := lastLine(g.text()[:at])
	for _, want := range []string{`"level":"WARN"`, `"clear":false`, `"complete":true`, `"listed":1`, `"direct":1`, `"findings":1`} {
		if !strings.Contains(line, want) {
			t.Errorf("the log line has no %s: %s", want, line)
		}
	}
	result, err := reconcile.LoadResult(dir)
	if err != nil || result.Requests.Direct != 1 {
		t.Fatalf("kept is %+v, %v", result, err)
	}
	if n := g.metric(`partnerguard_reconcile_findings{kind="direct_calls"`); n != 1 {
		t.Errorf("direct_calls are %v", n)
	}
	if n := g.metric(`partnerguard_reconcile_findings{kind="verdict_differs"`); n != 0 {
		t.Errorf("verdict_differs are %v", n)
	}
	if at := g.metric("partnerguard_reconcile_last_success_timestamp_seconds"); time.Since(time.UnixMilli(int64(at*1000))) > time.Minute {
		t.Errorf("the last success was at %v", at)
	}
	if n := g.metric("partnerguard_reconcile_complete"); n != 1 {
		t.Errorf("complete is %v", n)
	}
	out, _, _ := partnerguard(t, "report", "--data-dir", dir)
	if !strings.Contains(out, "1 of the 2 requests that Microsoft lists went round the guard.") {
		t.Errorf("the report says:\n%s", out)
	}

	// It asks Microsoft directly: the ledger has the one call only.
	calls := 0
	for _, l := range ledgerLines(t, dir) {
		if l.Path != "" {
			calls++
		}
		if strings.Contains(l.Path, "partnerRequests") {
			t.Errorf("reconcile went by way of the guard: %+v", l)
		}
	}
	if calls != 1 {
		t.Errorf("%d calls on record, want 1", calls)
	}

	// Another schedule, then none, without a restart.
	end := at
	write(file, guard+"reconcile: {every: 6h, token_command: [cat, "+tokenFile+"]}\n")
	_, end = g.await(end, "reloaded")
	if text := g.text(); !strings.Contains(text, `"key":"reconcile.every","old":"1m1s","new":"6h"`) || !strings.Contains(text, `"new":"cat …"`) {
		t.Errorf("the reload says:\n%s", text)
	}
	write(file, guard)
	g.await(end, "reloaded")
	if _, body := get(t, g.admin+"/readyz?verbose", ""); !regexp.MustCompile(`(?m)^reconcile +ok$`).Match(body) {
		t.Errorf("/readyz says %s", body)
	}
	g.stop()
}

func lastLine(text string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return lines[len(lines)-1]
}

// TestScheduledReconcileGoesOnAfterARestart looks for the time of the last run.
func TestScheduledReconcileGoesOnAfterARestart(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	token := sampleToken(t, em, emulator.AppCompliant)
	dir := t.TempDir()
	yaml := guardYAML(em, "audit") + "reconcile: {every: 2m, delay: 0s, token: env:RECONCILE_TOKEN}\n"
	g := startGuard(t, dir, yaml, "RECONCILE_TOKEN="+token)
	g.await(0, "reconciled")
	g.stop()
	asked := em.Count()
	g = startGuard(t, dir, yaml, "RECONCILE_TOKEN="+token)
	awaiting(t, func() (float64, bool) {
		at := metrics(t, g)["partnerguard_reconcile_last_success_timestamp_seconds"]
		return at, at > 0 // the last success is not forgotten
	})
	get(t, g.url+"/v1/invoices", token)
	g.stop()
	paths := []string{}
	for _, r := range em.Requests()[asked:] {
		paths = append(paths, r.Target)
	}
	if slices.ContainsFunc(paths, func(p string) bool { return strings.Contains(p, "partnerRequests") }) {
		t.Errorf("it asked again at once: %q", paths)
	}
}

// TestScheduledReconcileNeverGoesToTheGuardItself gives the guard's own address as the
// upstream's, as a hosts file or a forward by port may.
func TestScheduledReconcileNeverGoesToTheGuardItself(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	cfg, err := config.Parse("guard.yaml", []byte(guardYAML(em, "audit")))
	if err != nil {
		t.Fatal(err)
	}
	base, err := url.Parse(cfg.Upstreams[config.PartnerCenter].URL)
	if err != nil {
		t.Fatal(err)
	}
	u, err := reconcileUpstream(cfg, func() []netip.AddrPort { return []netip.AddrPort{netip.MustParseAddrPort(base.Host)} })
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	r, err := http.NewRequest(http.MethodGet, base.JoinPath("v1/partnerRequests").String(), nil)
	if err != nil {
		t.Fatal(err)
	}
	res, err := u.RoundTrip(r)
	if err == nil {
		res.Body.Close()
	}
	if n := em.Count(); !errors.Is(err, proxy.ErrOwnListener) || n > 0 {
		t.Errorf("RoundTrip = %v, want %v, and %d requests arrived", err, proxy.ErrOwnListener, n)
	}
}
