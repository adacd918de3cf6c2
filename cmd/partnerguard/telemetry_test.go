package main

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/partnerguard/partnerguard/internal/emulator"
	"github.com/partnerguard/partnerguard/telemetry/ledger"
)

// metrics are the samples at /metrics, by name and labels as they stand there.
func metrics(t *testing.T, g *guardProcess) map[string]float64 {
	t.Helper()
	res, body := get(t, g.admin+"/metrics", "")
	if res.StatusCode != 200 {
		t.Fatalf("/metrics is %d", res.StatusCode)
	}
	samples := map[string]float64{}
	for l := range strings.Lines(string(body)) {
		if strings.HasPrefix(l, "#") {
			continue
		}
		i := strings.LastIndexByte(l, ' ')
		v, err := strconv.ParseFloat(strings.TrimSpace(l[i+1:]), 64)
		if err != nil {
			t.Fatalf("/metrics: %q: %v", l, err)
		}
		samples[l[:i]] = v
	}
	return samples
}

// metric is one sample, 0 when there is none.
func metric(t *testing.T, g *guardProcess, series string) float64 {
	t.Helper()
	return metrics(t, g)[series]
}

func TestTelemetryMetricsCountTheCalls(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	// The audit of one integration beside the enforcement for the others.
	yaml := strings.Replace(guardYAML(em, "enforce"), "owner: orders@contoso.example", "owner: orders@contoso.example\n    mode: audit", 1)
	g := startGuard(t, t.TempDir(), yaml)
	began := time.Now()
	want, durations, forwarded := map[string]float64{}, map[string]float64{}, 0.0
	call := func(n int, app, path, effect, mode, reason, class string) {
		t.Helper()
		for range n {
			res, body := get(t, g.url+path, sampleToken(t, em, app))
			if got := fmt.Sprint(res.StatusCode/100, "xx"); got != class {
				t.Fatalf("%s %s: %d, want %s: %s", app, path, res.StatusCode, class, body)
			}
		}
		want[fmt.Sprintf(`partnerguard_calls_total{effect=%q,integration=%q,mode=%q,reason=%q,status_class=%q}`, effect, app, mode, reason, class)] = float64(n)
		durations[fmt.Sprintf(`partnerguard_call_duration_seconds_count{effect=%q,integration=%q}`, effect, app)] += float64(n)
		if effect != "reject" {
			forwarded += float64(n)
		}
	}
	call(3, emulator.AppCompliant, "/v1/invoices", "allow", "enforce", "mfa_present", "2xx")
	call(2, emulator.AppCompliant, "/v1/nothing", "allow", "enforce", "mfa_present", "4xx")
	call(4, emulator.AppOnly, "/v1/invoices", "allow", "enforce", "app_only", "2xx")
	call(2, emulator.AppPassword, "/v1/invoices", "reject", "enforce", "mfa_missing", "4xx")
	call(1, emulator.AppOldRefresh, "/v1/invoices", "allow", "audit", "mfa_missing", "2xx")

	// A call is counted when it is over, which the client may see a little earlier.
	samples := awaiting(t, func() (map[string]float64, bool) {
		m := metrics(t, g)
		return m, cmp.Equal(want, with(m, "partnerguard_calls_total"))
	})
	if diff := cmp.Diff(durations, with(samples, "partnerguard_call_duration_seconds_count")); diff != "" {
		t.Errorf("counts of the durations (-want +got):\n%s", diff)
	}
	upstream := `partnerguard_upstream_duration_seconds_`
	if got := samples[upstream+`count{upstream="partner-center"}`]; got != forwarded {
		t.Errorf("%v upstream durations, want %v", got, forwarded)
	}
	// Seconds: the calls ran one after the other, so they took no longer than the test.
	sum := 0.0
	for _, v := range with(samples, "partnerguard_call_duration_seconds_sum") {
		sum += v
	}
	if up := samples[upstream+`sum{upstream="partner-center"}`]; sum <= 0 || up <= 0 || up > sum || sum > time.Since(began).Seconds() {
		t.Errorf("calls took %v s, the upstream %v s of it, the test %v", sum, up, time.Since(began))
	}
	if got := samples[`partnerguard_call_duration_seconds_bucket{effect="allow",integration="nightly-billing",le="180"}`]; got != 5 {
		t.Errorf("the bucket up to 180 s holds %v calls of nightly-billing, want 5", got)
	}
	if builds := with(samples, "partnerguard_build_info"); len(builds) != 1 || samples[fmt.Sprintf(`partnerguard_build_info{go_version=%q,version=%q}`, goVersion(), version())] != 1 {
		t.Errorf("build info %v", builds)
	}
	degraded := map[string]float64{`partnerguard_degraded{part="certificates"}`: 0, `partnerguard_degraded{part="config"}`: 0, `partnerguard_degraded{part="keys"}`: 0, `partnerguard_degraded{part="ledger"}`: 0, `partnerguard_degraded{part="reconcile"}`: 0, `partnerguard_degraded{part="store"}`: 0, `partnerguard_degraded{part="tokens"}`: 0}
	if diff := cmp.Diff(degraded, with(samples, "partnerguard_degraded")); diff != "" {
		t.Errorf("degraded parts (-want +got):\n%s", diff)
	}
	_, text := get(t, g.admin+"/metrics", "")
	for _, line := range []string{
		"# TYPE partnerguard_calls_total counter", "# TYPE partnerguard_call_duration_seconds histogram",
		"# TYPE partnerguard_upstream_duration_seconds histogram", "# TYPE partnerguard_degraded gauge", "# TYPE partnerguard_build_info gauge",
	} {
		if !strings.Contains(string(text), line+"\n") {
			t.Errorf("/metrics lacks %q", line)
		}
	}
	g.stop()
}

// with keeps the samples of one metric.
func with(samples map[string]float64, name string) map[string]float64 {
	of := map[string]float64{}
	for series, v := range samples {
		if n, _, _ := strings.Cut(series, "{"); n == name {
			of[series] = v
		}
	}
	return of
}

// goVersion is the release that built the test and so the program.
func goVersion() string {
	out, err := exec.Command("partnerguard", "version").Output()
	if fields := strings.Fields(string(out)); err == nil && len(fields) > 2 {
		return fields[2]
	}
	return ""
}

func TestTelemetryCountsWhatIsNoRequest(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	g := startGuard(t, t.TempDir(), guardYAML(em, "audit"))
	for _, row := range []struct {
		name, bytes string
		status      string // of the answer; empty when the client hangs up
	}{
		{"garbage", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", "HTTP/1.1 400 "},
		{"no version of HTTP", "GET /v1/invoices FTP/1.0\r\n\r\n", "HTTP/1.1 400 "},
		{"two hosts", "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", "HTTP/1.1 400 "},
		{"a header without end", "GET / HTTP/1.1\r\nHost: a\r\nX: ", ""},
	} {
		before := metric(t, g, "partnerguard_unparsed_requests_total")
		c, err := net.Dial("tcp", strings.TrimPrefix(g.url, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(c, row.bytes); err != nil {
			t.Fatal(err)
		}
		if row.status != "" {
			c.SetReadDeadline(time.Now().Add(20 * time.Second))
			if answer, _ := io.ReadAll(c); !strings.HasPrefix(string(answer), row.status) {
				t.Errorf("%s: answer %q, want %q", row.name, answer, row.status)
			}
		}
		c.Close()
		awaiting(t, func() (string, bool) {
			got := metric(t, g, "partnerguard_unparsed_requests_total")
			return fmt.Sprintf("%s: %v after %v", row.name, got, before), got == before+1
		})
	}
	if calls := with(metrics(t, g), "partnerguard_calls_total"); len(calls) != 0 || em.Count() != 0 {
		t.Errorf("these were no calls, but there are %v, and %d reached the upstream", calls, em.Count())
	}
	g.stop()
}

// The names that a line may have, besides level and msg.
const (
	decisionNames = "call time instance generation listener peer method route path query_names upstream integration evidence owner customer kind verified tid app_id user_ref uti iat exp amr mfa mode rule effect reason would_reject request_id correlation_id application user_agent"
	outcomeNames  = "status rejection code upstream_status mfa_compliant echoed upstream_request_id upstream_correlation_id bytes_in bytes_out duration_ms upstream_ms replays error"
)

// Every call is one line of the log, and that line says what the ledger says.
func TestTelemetryLogHasOneLineACall(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	dir := t.TempDir()
	g := startGuard(t, dir, guardYAML(em, "enforce"))
	level := map[string]string{}
	call := func(want, app, path string, headers ...string) {
		res, _ := get(t, g.url+path, sampleToken(t, em, app), headers...)
		level[res.Header.Get("Partnerguard-Call")] = want
	}
	call("INFO", emulator.AppCompliant, "/v1/customers/"+em.Customers()[0]+"/subscriptions?size=1&sig=secret", "MS-PartnerCenter-Application: nightly \u202e\u009b31m")
	call("INFO", emulator.AppOnly, "/v1/invoices")
	call("WARN", emulator.AppPassword, "/v1/invoices")
	call("WARN", emulator.AppCompliant, "/v1/invoices", "Emulate: refuse=code-number")
	call("WARN", emulator.AppCompliant, "/v1/invoices", "Emulate: reset")
	call("WARN", emulator.AppCompliant, "/v1/a/../b")
	g.stop()

	recorded := map[string]map[string]any{}
	for _, l := range ledgerObjects(t, dir) {
		id := l["call"].(string)
		if recorded[id] == nil {
			recorded[id] = map[string]any{}
		}
		delete(l, "n")
		delete(l, "type")
		maps.Copy(recorded[id], l)
	}
	known := strings.Fields(decisionNames + " " + outcomeNames)
	logged := map[string]bool{}
	for text := range strings.Lines(g.text()) {
		var l map[string]any
		if err := json.Unmarshal([]byte(text), &l); err != nil {
			t.Errorf("this line is no JSON object: %s", text)
			continue
		}
		if l["msg"] != "call" {
			continue
		}
		id, _ := l["call"].(string)
		if logged[id] {
			t.Errorf("call %s has two lines", id)
		}
		logged[id] = true
		if l["level"] != level[id] {
			t.Errorf("level %v, want %s: %s", l["level"], level[id], text)
		}
		delete(l, "level")
		delete(l, "msg")
		for name := range l {
			if !slices.Contains(known, name) {
				t.Errorf("%q is no name of a record: %s", name, text)
			}
		}
		if diff := cmp.Diff(recorded[id], l); diff != "" {
			t.Errorf("the ledger and the log differ (-ledger +log):\n%s", diff)
		}
	}
	if !maps.Equal(logged, all(level)) {
		t.Errorf("lines of %v, calls %v", logged, level)
	}
}

func all[V any](m map[string]V) map[string]bool {
	set := map[string]bool{}
	for k := range m {
		set[k] = true
	}
	return set
}

// A collector that takes connections and never answers slows no call, and holds up
// the end no longer than its limit.
func TestTelemetryCollectorIsABlackHole(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	hole, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer hole.Close()
	go func() {
		for {
			c, err := hole.Accept()
			if err != nil {
				return
			}
			defer c.Close()
		}
	}()
	dir := t.TempDir()
	g := startGuard(t, dir, guardYAML(em, "audit"), "OTEL_EXPORTER_OTLP_ENDPOINT=http://"+hole.Addr().String(),
		"OTEL_BSP_SCHEDULE_DELAY=50", "OTEL_BSP_MAX_QUEUE_SIZE=16", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE=8", "OTEL_METRIC_EXPORT_INTERVAL=50")
	token := sampleToken(t, em, emulator.AppCompliant)
	for n := range 200 { // many times what the queue holds
		began := time.Now()
		if res, body := get(t, g.url+"/v1/invoices", token); res.StatusCode != 200 {
			t.Fatalf("%d %s", res.StatusCode, body)
		}
		if took := time.Since(began); took > 5*time.Second {
			t.Fatalf("call %d took %v", n, took)
		}
	}
	// The queue is full, so all others were dropped, and counted.
	if n := metric(t, g, "partnerguard_dropped_spans_total"); n < 200-16 || n > 200 {
		t.Errorf("%v spans were dropped, want 184", n)
	}
	began := time.Now()
	g.stop()
	if took := time.Since(began); took > 20*time.Second {
		t.Errorf("the end took %v, want no more than some 10 s", took)
	}
	if !strings.Contains(g.text(), `"msg":"telemetry was not all sent"`) {
		t.Errorf("the log does not say that telemetry was lost:\n%s", g.text())
	}
	if n := len(ledgerLines(t, dir)); n != 400 {
		t.Errorf("%d ledger lines, want 400", n)
	}
}

// A reader of the log that reads nothing stops no call; what is dropped is counted.
func TestTelemetryLogIsNotRead(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	g := startSilent(t, em, w, "enforce")
	w.Close()

	// Long lines, so that few calls fill the queue of 4 MiB; refused, so that each
	// takes no time.
	path := "/v1/invoices/" + strings.Repeat("x", 2000)
	escaped := strings.Repeat("\u202e", 80)
	const limit = 6000
	calls := 0
	for ; calls < limit && (calls%200 != 0 || metric(t, g, "partnerguard_log_dropped_lines_total") == 0); calls++ {
		if res, body := get(t, g.url+path, "", "User-Agent: "+escaped, "MS-PartnerCenter-Application: "+escaped); res.StatusCode != 401 {
			t.Fatalf("%d %s", res.StatusCode, body)
		}
	}
	if calls == limit {
		t.Errorf("no line of %d calls was dropped", calls)
	}
	g.cmd.Process.Signal(syscall.SIGTERM)
	g.awaitExit(0)
	if n := len(ledgerLines(t, g.dir)); n != 2*calls {
		t.Errorf("%d ledger lines of %d calls", n, calls)
	}
}

// A reader of the log that goes away takes the guard not with it.
func TestTelemetryLogReaderGoesAway(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	g := startSilent(t, em, w, "audit")
	w.Close()
	r.Close()
	for range 20 {
		if res, body := get(t, g.url+"/v1/invoices", sampleToken(t, em, emulator.AppOnly)); res.StatusCode != 200 {
			t.Fatalf("%d %s", res.StatusCode, body)
		}
	}
	g.cmd.Process.Signal(syscall.SIGTERM)
	g.awaitExit(0)
}

// startSilent runs a guard whose log goes to w, which nobody need read: it is found
// by fixed addresses.
func startSilent(t *testing.T, em *emulator.Emulator, w *os.File, mode string) *guardProcess {
	t.Helper()
	listen, admin := freePort(t), freePort(t)
	g := &guardProcess{t: t, dir: t.TempDir(), url: "http://" + listen, admin: "http://" + admin, done: make(chan struct{})}
	file := t.TempDir() + "/guard.yaml"
	if err := os.WriteFile(file, []byte(guardYAML(em, mode)), 0o600); err != nil {
		t.Fatal(err)
	}
	g.cmd = exec.Command("partnerguard", "serve", "-c", file, "--data-dir", g.dir, "--listen", listen, "--admin", admin)
	g.cmd.Stderr = w
	if err := g.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		g.cmd.Wait()
		close(g.done)
	}()
	t.Cleanup(func() {
		g.cmd.Process.Kill()
		<-g.done
	})
	awaiting(t, func() (error, bool) {
		res, err := plainClient.Get(g.admin + "/readyz")
		if err != nil {
			return err, false
		}
		res.Body.Close()
		return nil, res.StatusCode == 200
	})
	return g
}

// ledgerObjects are the decisions and outcomes of a ledger as they stand there.
func ledgerObjects(t *testing.T, dir string) []map[string]any {
	t.Helper()
	r, err := ledger.NewReader(dir, ledger.Position{})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	var all []map[string]any
	for {
		e, err := r.Next()
		if err == io.EOF {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		if e.Type != ledger.TypeDecision && e.Type != ledger.TypeOutcome {
			continue
		}
		var l map[string]any
		if err := json.Unmarshal(e.Line, &l); err != nil {
			t.Fatal(err)
		}
		all = append(all, l)
	}
}
