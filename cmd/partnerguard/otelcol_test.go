package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/partnerguard/partnerguard/internal/emulator"
)

// TestOpenTelemetryCollector runs guards beside the real OpenTelemetry Collector.
func TestOpenTelemetryCollector(t *testing.T) {
	if testing.Short() {
		t.Skip("builds and runs an OpenTelemetry Collector")
	}
	t.Parallel()
	program := filepath.Join(t.TempDir(), "otelcol")
	build := exec.Command("go", "build", "-C", "../../internal/otelcol", "-buildvcs=false", "-ldflags=-s -w", "-o", program, ".")
	build.Env = append(os.Environ(), "GOFLAGS=") // the race detector is for the guard
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the collector: %v\n%s", err, out)
	}
	for name, test := range map[string]func(*testing.T, string){
		"what arrives":                 testCollectorGets,
		"no secret arrives":            testCollectorGetsNoSecret,
		"killed and started again":     testCollectorIsKilled,
		"that refuses what it is sent": testCollectorRefuses,
		"for traces only":              testCollectorForTraces,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, program)
		})
	}
}

// otelcol is an OpenTelemetry Collector. Each start writes to files of its own.
type otelcol struct {
	t          *testing.T
	program    string
	grpc, http string // where it listens
	cfg        otelcolConfig

	dir  string // of the last start
	cmd  *exec.Cmd
	done chan struct{}
}

type otelcolConfig struct {
	token string // bearer token that it asks for; empty means none
	gzip  bool   // by HTTP it takes nothing but gzip
}

func startOtelcol(t *testing.T, program string, cfg otelcolConfig) *otelcol {
	t.Helper()
	c := &otelcol{t: t, program: program, grpc: freePort(t), http: freePort(t), cfg: cfg}
	c.start()
	return c
}

// start runs the collector and waits until it takes what it is sent.
func (c *otelcol) start() {
	t := c.t
	t.Helper()
	c.dir = t.TempDir()
	auth, extensions, compression := "", "", ""
	if c.cfg.token != "" {
		auth, extensions = ", auth: {authenticator: bearertokenauth}", fmt.Sprintf("extensions: {bearertokenauth: {token: %q}}", c.cfg.token)
	}
	if c.cfg.gzip {
		compression = ", compression_algorithms: [gzip]"
	}
	yaml := fmt.Sprintf(`%s
receivers:
  otlp:
    protocols:
      grpc: {endpoint: %q%s}
      http: {endpoint: %q%s%s}
exporters:
  file/traces: {path: %q, flush_interval: 20ms}
  file/metrics: {path: %q, flush_interval: 20ms}
service:
  extensions: [%s]
  pipelines:
    traces: {receivers: [otlp], exporters: [file/traces]}
    metrics: {receivers: [otlp], exporters: [file/metrics]}
`, extensions, c.grpc, auth, c.http, auth, compression, c.file("traces"), c.file("metrics"), strings.Repeat("bearertokenauth", min(1, len(auth))))
	if err := os.WriteFile(c.file("otelcol.yaml"), []byte(yaml), 0o600); err != nil {
		t.Fatal(err)
	}
	awaiting(t, func() (string, bool) { // another test may have got the port
		log, err := os.Create(c.file("log"))
		if err != nil {
			t.Fatal(err)
		}
		defer log.Close()
		c.cmd, c.done = exec.Command(c.program, "--config", c.file("otelcol.yaml")), make(chan struct{})
		c.cmd.Stdout, c.cmd.Stderr = log, log
		if err := c.cmd.Start(); err != nil {
			t.Fatal(err)
		}
		go func(cmd *exec.Cmd, done chan struct{}) {
			cmd.Wait()
			close(done)
		}(c.cmd, c.done)
		t.Cleanup(c.kill)
		return awaitingLog(t, c)
	})
}

// awaitingLog returns what the collector says once it is ready or has ended.
func awaitingLog(t *testing.T, c *otelcol) (text string, ready bool) {
	t.Helper()
	text = awaiting(t, func() (string, bool) {
		b, _ := os.ReadFile(c.file("log"))
		ready = bytes.Contains(b, []byte("Everything is ready."))
		select {
		case <-c.done:
			return string(b), true
		default:
			return string(b), ready
		}
	})
	return text, ready
}

func (c *otelcol) file(name string) string { return filepath.Join(c.dir, name) }

// stop ends the collector; what it got is then in its files.
func (c *otelcol) stop() {
	c.t.Helper()
	c.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-c.done:
	case <-time.After(time.Minute):
		c.t.Fatal("the collector does not stop")
	}
}

func (c *otelcol) kill() {
	c.cmd.Process.Kill()
	<-c.done
}

// environment sends a guard's telemetry to the collector.
func (c *otelcol) environment(protocol string, more ...string) []string {
	address := c.http
	if protocol == "grpc" {
		address = c.grpc
	}
	env := append([]string{"OTEL_EXPORTER_OTLP_ENDPOINT=http://" + address, "OTEL_BSP_SCHEDULE_DELAY=50", "OTEL_METRIC_EXPORT_INTERVAL=100"}, more...)
	if protocol != "" {
		env = append(env, "OTEL_EXPORTER_OTLP_PROTOCOL="+protocol)
	}
	return env
}

// otlpAttributes are written as OTLP's JSON has them and read as texts by name.
type otlpAttributes map[string]string

func (a *otlpAttributes) UnmarshalJSON(b []byte) error {
	var list []struct {
		Key   string
		Value map[string]any
	}
	if err := json.Unmarshal(b, &list); err != nil {
		return err
	}
	*a = otlpAttributes{}
	for _, l := range list {
		for _, v := range l.Value {
			(*a)[l.Key] = fmt.Sprint(v)
		}
		if len(l.Value) == 0 {
			(*a)[l.Key] = "(empty)"
		}
	}
	return nil
}

type otlpResource struct {
	Attributes otlpAttributes
}

type otlpSpan struct {
	TraceID, SpanID, ParentSpanID, TraceState string
	Name                                      string
	Kind                                      int
	StartTimeUnixNano, EndTimeUnixNano        int64 `json:",string"`
	Attributes                                otlpAttributes
	Events                                    []struct{ Name string }
	Status                                    struct {
		Code    int
		Message string
	}
}

// The numbers of OTLP.
const (
	kindServer = 2
	codeError  = 2

	temporalityDelta      = 1
	temporalityCumulative = 2
)

type otlpPoint struct {
	Attributes   otlpAttributes
	AsInt        int64 `json:",string"`
	AsDouble     float64
	Count        int64 `json:",string"`
	Sum          float64
	BucketCounts []json.Number
}

type otlpMetric struct {
	Name, Unit, Description string
	Sum                     *struct {
		DataPoints             []otlpPoint
		AggregationTemporality int
		IsMonotonic            bool
	}
	Gauge     *struct{ DataPoints []otlpPoint }
	Histogram *struct {
		DataPoints             []otlpPoint
		AggregationTemporality int
	}
}

// spans are all that the collector wrote since its last start.
func (c *otelcol) spans() (spans []otlpSpan, resources []otlpAttributes) {
	c.t.Helper()
	eachLine(c, "traces", func(l struct {
		ResourceSpans []struct {
			Resource   otlpResource
			ScopeSpans []struct{ Spans []otlpSpan }
		}
	}) {
		for _, r := range l.ResourceSpans {
			resources = append(resources, r.Resource.Attributes)
			for _, s := range r.ScopeSpans {
				spans = append(spans, s.Spans...)
			}
		}
	})
	return spans, resources
}

// metrics are all that the collector wrote since its last start.
func (c *otelcol) metrics() (metrics []otlpMetric, resources []otlpAttributes) {
	c.t.Helper()
	eachLine(c, "metrics", func(l struct {
		ResourceMetrics []struct {
			Resource     otlpResource
			ScopeMetrics []struct{ Metrics []otlpMetric }
		}
	}) {
		for _, r := range l.ResourceMetrics {
			resources = append(resources, r.Resource.Attributes)
			for _, s := range r.ScopeMetrics {
				metrics = append(metrics, s.Metrics...)
			}
		}
	})
	return metrics, resources
}

// eachLine reads the lines that are whole: the collector may be writing one.
func eachLine[T any](c *otelcol, file string, read func(T)) {
	c.t.Helper()
	b, err := os.ReadFile(c.file(file))
	if err != nil {
		c.t.Fatal(err)
	}
	for line := range bytes.Lines(b) {
		if !bytes.HasSuffix(line, []byte("\n")) {
			return
		}
		var l T
		if err := json.Unmarshal(line, &l); err != nil {
			c.t.Fatalf("the collector wrote %s: %v", line, err)
		}
		read(l)
	}
}

// collected are metrics as /metrics shows them, by name and labels there.
func collected(t *testing.T, metrics []otlpMetric, temporality int) map[string]float64 {
	t.Helper()
	series := map[string]float64{}
	set := func(temporalityOf int, name string, p otlpPoint, v float64) {
		var labels []string
		for _, k := range slices.Sorted(maps.Keys(p.Attributes)) {
			labels = append(labels, fmt.Sprintf("%s=%q", k, p.Attributes[k]))
		}
		if len(labels) > 0 {
			name += "{" + strings.Join(labels, ",") + "}"
		}
		if temporalityOf == temporalityDelta {
			v += series[name]
		}
		series[name] = v
	}
	for _, m := range metrics {
		name := strings.ReplaceAll(m.Name, ".", "_")
		if m.Unit == "s" {
			name += "_seconds"
		}
		switch {
		case m.Sum != nil:
			if m.Sum.AggregationTemporality != temporality || !m.Sum.IsMonotonic {
				t.Errorf("%s has temporality %d, monotonic %v", m.Name, m.Sum.AggregationTemporality, m.Sum.IsMonotonic)
			}
			for _, p := range m.Sum.DataPoints {
				set(temporality, name+"_total", p, float64(p.AsInt))
			}
		case m.Histogram != nil:
			if m.Histogram.AggregationTemporality != temporality {
				t.Errorf("%s has temporality %d", m.Name, m.Histogram.AggregationTemporality)
			}
			for _, p := range m.Histogram.DataPoints {
				set(temporality, name+"_count", p, float64(p.Count))
				set(temporality, name+"_sum", p, p.Sum)
				inBuckets := int64(0)
				for _, n := range p.BucketCounts {
					i, _ := n.Int64()
					inBuckets += i
				}
				if inBuckets != p.Count || len(p.BucketCounts) != 20 {
					t.Errorf("%s has %d buckets with %d of %d values", m.Name, len(p.BucketCounts), inBuckets, p.Count)
				}
			}
		case m.Gauge != nil:
			for _, p := range m.Gauge.DataPoints {
				set(temporalityCumulative, name, p, float64(p.AsInt)+p.AsDouble)
			}
		default:
			t.Errorf("%s is of a kind that the guard has none of", m.Name)
		}
	}
	return series
}

// comparableSeries are the guard's own metrics without what differs from one moment to
// the next.
func comparableSeries(series map[string]float64) map[string]float64 {
	of := map[string]float64{}
	for name, v := range series {
		base, _, _ := strings.Cut(name, "{")
		switch {
		case !strings.HasPrefix(name, "partnerguard_") || strings.HasSuffix(base, "_bucket"):
			continue
		case slices.Contains([]string{"partnerguard_keys_age_seconds", "partnerguard_store_lag_seconds", "partnerguard_export_errors_total"}, base):
			v = 0
		}
		of[name] = math.Round(v*1e6) / 1e6 // deltas were added up
	}
	return of
}

// awaitCallLines returns once n calls are in the log: by then they are counted.
func awaitCallLines(t *testing.T, g *guardProcess, n int) {
	t.Helper()
	awaiting(t, func() (string, bool) {
		got := strings.Count(g.text(), `"msg":"call"`)
		return fmt.Sprintf("%d calls in the log, want %d", got, n), got == n
	})
}

// logIsJSON checks every line that a guard wrote: OpenTelemetry's SDK by itself writes
// text.
func logIsJSON(t *testing.T, g *guardProcess) {
	t.Helper()
	for s := bufio.NewScanner(strings.NewReader(g.text())); s.Scan(); {
		if !json.Valid(s.Bytes()) {
			t.Errorf("this line is no JSON: %s", s.Bytes())
		}
	}
}

const callersTrace, callersSpan = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"

// collectedCall is a call and what its span says.
type collectedCall struct {
	name         string // also its User-Agent
	app          string // empty: no token
	method       string // empty: GET
	target       string
	headers      []string
	status       int
	breaks       bool // the client gets no whole answer
	hangsUp      bool // the client gives up once the call is upstream
	unsampled    bool // the caller's trace is not recorded
	span         string
	failed       string            // error.type; empty: the span's status is unset
	attributes   map[string]string // besides those of every span
	withoutRoute bool
}

func collectedCalls(em *emulator.Emulator) []collectedCall {
	const parent = "Traceparent: 00-" + callersTrace + "-" + callersSpan
	passed := func(more ...string) map[string]string {
		a := map[string]string{
			"partnerguard.integration": emulator.AppCompliant, "partnerguard.effect": "allow", "partnerguard.reason": "mfa_present", "partnerguard.mfa": "present",
		}
		for i := 0; i < len(more); i += 2 {
			a[more[i]] = more[i+1]
		}
		return a
	}
	const invoices = "/v1/invoices"
	return []collectedCall{
		{
			name: "allowed", app: emulator.AppCompliant, target: "/v1/customers/" + em.Customers()[0] + "/subscriptions?sig=secret",
			headers: []string{parent + "-01", "Tracestate: contoso=1", "MS-RequestId: req-1", "X-Forwarded-For: 203.0.113.7"}, status: 200,
			span: "GET /v1/customers/{customer-tenant-id}/subscriptions", attributes: passed("partnerguard.request_id", "req-1"),
		},
		{
			name: "refused", app: emulator.AppPassword, target: invoices, headers: []string{parent + "-01"}, status: 401, span: "GET " + invoices,
			attributes: map[string]string{
				"partnerguard.integration": emulator.AppPassword, "partnerguard.effect": "reject", "partnerguard.reason": "mfa_missing", "partnerguard.mfa": "absent",
			},
		},
		{
			name: "no token", target: invoices, status: 401, span: "GET " + invoices,
			attributes: map[string]string{
				"partnerguard.integration": "unknown", "partnerguard.effect": "reject", "partnerguard.reason": "token_missing", "partnerguard.mfa": "unknown",
			},
		},
		{
			name: "refused by Microsoft", app: emulator.AppCompliant, target: invoices, headers: []string{"Emulate: refuse=code-number"}, status: 401,
			span: "GET " + invoices, attributes: passed("partnerguard.rejection", "mfa_required"),
		},
		{
			name: "throttled", app: emulator.AppCompliant, target: invoices, headers: []string{"Emulate: status=429, retry-after=1"}, status: 429,
			span: "GET " + invoices, attributes: passed(),
		},
		{
			name: "error of the upstream", app: emulator.AppCompliant, target: invoices, headers: []string{"Emulate: status=500"}, status: 500,
			span: "GET " + invoices, failed: "500", attributes: passed(),
		},
		{
			name: "upstream resets", app: emulator.AppCompliant, target: invoices, headers: []string{parent + "-01", "Emulate: reset"}, status: 502,
			span: "GET " + invoices, failed: "upstream_unreachable", attributes: passed("partnerguard.error", "upstream_unreachable"),
		},
		{
			name: "upstream breaks off", app: emulator.AppCompliant, target: invoices, headers: []string{"Emulate: abort-after=100"}, status: 200, breaks: true,
			span: "GET " + invoices, failed: "upstream_aborted", attributes: passed("partnerguard.error", "upstream_aborted"),
		},
		{
			name: "client hangs up", app: emulator.AppCompliant, target: invoices, headers: []string{"Emulate: stall=60s"}, breaks: true, hangsUp: true,
			span: "GET " + invoices, attributes: passed("partnerguard.error", "client_canceled"),
		},
		{
			name: "two ways to read the path", app: emulator.AppCompliant, target: "/v1/customers/../secret", status: 400, span: "GET", withoutRoute: true,
			attributes: map[string]string{
				"partnerguard.integration": "unknown", "partnerguard.effect": "reject", "partnerguard.reason": "request_ambiguous", "partnerguard.mfa": "unknown",
			},
		},
		{
			name: "a route that is not documented", app: emulator.AppCompliant, method: "POST", target: "/v1/_upload", status: 200, span: "POST", withoutRoute: true,
			attributes: passed(),
		},
		{
			name: "a method that nobody knows", app: emulator.AppCompliant, method: "SECRET", target: invoices, status: 405, span: "HTTP " + invoices,
			attributes: passed("http.request.method", "_OTHER", "http.request.method_original", "SECRET"),
		},
		{name: "the caller's trace is not recorded", app: emulator.AppOnly, target: invoices, headers: []string{parent + "-00"}, status: 200, unsampled: true},
	}
}

// make makes the call and returns the guard's id of it, empty where it does not come.
func (cc *collectedCall) make(t *testing.T, em *emulator.Emulator, g *guardProcess) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, cmp.Or(cc.method, http.MethodGet), g.url, nil)
	if err != nil {
		t.Fatal(err)
	}
	r.URL.Opaque = cc.target
	r.Close = true // or net/http tries again what breaks
	r.Header.Set("User-Agent", cc.name)
	if cc.app != "" {
		r.Header.Set("Authorization", "Bearer "+sampleToken(t, em, cc.app))
	}
	for _, h := range cc.headers {
		name, value, _ := strings.Cut(h, ": ")
		r.Header.Add(name, value)
	}
	if cc.hangsUp {
		before := em.Count()
		var hangUp sync.WaitGroup
		defer hangUp.Wait()
		hangUp.Go(func() {
			em.Wait(ctx, func([]emulator.Request) bool { return em.Count() > before })
			cancel()
		})
	}
	res, err := plainClient.Do(r)
	if err == nil {
		defer res.Body.Close()
		_, err = io.Copy(io.Discard, res.Body)
	}
	if (err != nil) != cc.breaks || !cc.breaks && res.StatusCode != cc.status {
		t.Fatalf("%s: %v, %v", cc.name, res, err)
	}
	if res == nil {
		return ""
	}
	return res.Header.Get("Partnerguard-Call")
}

// metricUnits are the units of all metrics that a guard with one upstream has.
var metricUnits = map[string]string{
	"partnerguard.calls": "{call}", "partnerguard.rejections": "{call}", "partnerguard.mfa_compliance": "{call}",
	"partnerguard.call.duration": "s", "partnerguard.upstream.duration": "s",
	"partnerguard.replays": "{request}", "partnerguard.unparsed_requests": "{request}", "partnerguard.admin.refused_credentials": "{request}",
	"partnerguard.refused_connections": "{connection}", "partnerguard.reconcile.failures": "{run}", "partnerguard.log_dropped_lines": "{line}",
	"partnerguard.dropped_spans": "{span}", "partnerguard.export_errors": "{error}",
	"partnerguard.store.lag": "s", "partnerguard.keys.age": "s",
	"partnerguard.degraded": "", "partnerguard.build_info": "", "partnerguard.upstream.breaker": "", "partnerguard.config.generation": "", "partnerguard.config.error": "",
}

func testCollectorGets(t *testing.T, program string) {
	const token = "token-of-the-collector-5Gq8"
	authorization := "OTEL_EXPORTER_OTLP_HEADERS=authorization=Bearer%20" + token
	for _, tt := range []struct {
		name        string
		cfg         otelcolConfig
		protocol    string
		env         []string
		temporality int
		service     string
	}{
		{"by default", otelcolConfig{}, "", nil, temporalityCumulative, "partnerguard"},
		{"http protobuf, compressed, with a token", otelcolConfig{token: token, gzip: true}, "http/protobuf",
			[]string{authorization, "OTEL_EXPORTER_OTLP_COMPRESSION=gzip", "OTEL_SERVICE_NAME=guard-of-contoso"}, temporalityCumulative, "guard-of-contoso"},
		{"grpc", otelcolConfig{}, "grpc", nil, temporalityCumulative, "partnerguard"},
		{"grpc, compressed, with a token, deltas", otelcolConfig{token: token}, "grpc",
			[]string{authorization, "OTEL_EXPORTER_OTLP_COMPRESSION=gzip", "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE=delta"}, temporalityDelta, "partnerguard"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			c := startOtelcol(t, program, tt.cfg)
			em := startEmulator(t, emulator.Config{})
			g := startGuard(t, t.TempDir(), guardYAML(em, "enforce", "instance: guard-1"),
				c.environment(tt.protocol, append(tt.env, "OTEL_RESOURCE_ATTRIBUTES=deployment.environment.name=test")...)...)
			began := time.Now()
			calls := collectedCalls(em)
			ids := map[string]string{}
			for _, call := range calls {
				ids[call.name] = call.make(t, em, g)
			}
			awaitCallLines(t, g, len(calls))
			// The gauges of its health are all there once it looked for the first time.
			shown := awaiting(t, func() (map[string]float64, bool) {
				m := metrics(t, g)
				return m, len(with(m, "partnerguard_keys_age_seconds")) == 2 && len(with(m, "partnerguard_degraded")) == 7
			})
			// What is on its way when the guard stops is cut off, and a delta with it.
			awaiting(t, func() (map[string]float64, bool) {
				got, _ := c.metrics()
				calls := with(collected(t, got, tt.temporality), "partnerguard_calls_total")
				return calls, gocmp.Equal(calls, with(shown, "partnerguard_calls_total"))
			})
			g.stop() // sends what is queued
			ended := time.Now()
			c.stop()
			logIsJSON(t, g)

			spans, resources := c.spans()
			byName := map[string]otlpSpan{}
			for _, s := range spans {
				name := s.Attributes["user_agent.original"]
				if _, twice := byName[name]; twice {
					t.Errorf("%s: two spans", name)
				}
				byName[name] = s
			}
			for _, call := range calls {
				s, is := byName[call.name]
				delete(byName, call.name)
				if is == call.unsampled {
					t.Errorf("%s: a span came: %v, want %v", call.name, is, !call.unsampled)
				}
				if is {
					call.check(t, s, ids[call.name], g, [2]time.Time{began, ended})
				}
			}
			for name := range byName {
				t.Errorf("%s: there was no such call", name)
			}

			got, more := c.metrics()
			units := map[string]string{}
			for _, m := range got {
				units[m.Name] = m.Unit
				if m.Description == "" {
					t.Errorf("%s has no description", m.Name)
				}
			}
			if diff := gocmp.Diff(metricUnits, units); diff != "" {
				t.Errorf("metrics and their units (-want +got):\n%s", diff)
			}
			if diff := gocmp.Diff(comparableSeries(shown), comparableSeries(collected(t, got, tt.temporality))); diff != "" {
				t.Errorf("the metrics differ (-/metrics +collector):\n%s", diff)
			}

			want := otlpAttributes{
				"service.name": tt.service, "service.version": version(), "service.instance.id": "guard-1", "deployment.environment.name": "test",
				"telemetry.sdk.language": "go", "telemetry.sdk.name": "opentelemetry",
			}
			for _, r := range append(resources, more...) {
				delete(r, "telemetry.sdk.version")
				if diff := gocmp.Diff(want, r); diff != "" {
					t.Fatalf("resource (-want +got):\n%s", diff)
				}
			}
			// The caller's trace goes on to Microsoft as it came.
			for _, r := range em.Requests() {
				i := slices.IndexFunc(calls, func(call collectedCall) bool { return call.name == r.Header.Get("User-Agent") })
				for _, header := range []string{"Traceparent", "Tracestate"} {
					if got := r.Header.Get(header); got != calls[i].header(header) {
						t.Errorf("%s: %s %q went upstream", calls[i].name, header, got)
					}
				}
			}
			// What a trace may not hold, by any protocol.
			signature := sampleToken(t, em, emulator.AppCompliant)
			signature = signature[len(signature)-40:]
			for _, secret := range []string{"secret", signature, em.Customers()[0], "203.0.113.7", "sam@contoso-partner.example", token} {
				for _, file := range []string{"traces", "metrics"} {
					if b, _ := os.ReadFile(c.file(file)); bytes.Contains(b, []byte(secret)) {
						t.Errorf("the %s hold %q", file, secret)
					}
				}
			}
			if strings.Contains(g.text(), token) {
				t.Error("the log holds the token for the collector")
			}
		})
	}
}

// header is what the call has of one.
func (cc *collectedCall) header(name string) string {
	for _, h := range cc.headers {
		if n, value, _ := strings.Cut(h, ": "); n == name {
			return value
		}
	}
	return ""
}

// check holds a span against its call. id is the guard's id of the call, within are
// times before and after it.
func (cc *collectedCall) check(t *testing.T, s otlpSpan, id string, g *guardProcess, within [2]time.Time) {
	t.Helper()
	if s.Name != cc.span || s.Kind != kindServer {
		t.Errorf("%s: span %q of kind %d, want %q of kind %d", cc.name, s.Name, s.Kind, cc.span, kindServer)
	}
	ofCaller := cc.header("Traceparent") != ""
	if ofCaller != (s.TraceID == callersTrace) || ofCaller != (s.ParentSpanID == callersSpan) || !ofCaller && s.ParentSpanID != "" || len(s.SpanID) != 16 {
		t.Errorf("%s: span %s of trace %s has parent %q", cc.name, s.SpanID, s.TraceID, s.ParentSpanID)
	}
	if s.TraceState != cc.header("Tracestate") {
		t.Errorf("%s: trace state %q", cc.name, s.TraceState)
	}
	if code := map[bool]int{true: codeError}[cc.failed != ""]; s.Status.Code != code {
		t.Errorf("%s: status %+v, want %d", cc.name, s.Status, code)
	}
	if s.StartTimeUnixNano < within[0].UnixNano() || s.EndTimeUnixNano < s.StartTimeUnixNano || s.EndTimeUnixNano > within[1].UnixNano() {
		t.Errorf("%s: from %d to %d", cc.name, s.StartTimeUnixNano, s.EndTimeUnixNano)
	}
	if got := s.Attributes["partnerguard.call"]; id != "" && got != id || len(got) != 36 {
		t.Errorf("%s: call %q, the client got %q", cc.name, got, id)
	}
	if _, err := strconv.Atoi(s.Attributes["http.response.body.size"]); err != nil && !cc.breaks {
		t.Errorf("%s: body of %q", cc.name, s.Attributes["http.response.body.size"])
	}
	if s.Attributes["partnerguard.request_id"] == "" {
		t.Errorf("%s: no request id", cc.name)
	}
	_, port, _ := strings.Cut(strings.TrimPrefix(g.url, "http://"), ":")
	want := map[string]string{
		"partnerguard.mode": "enforce", "http.request.method": cmp.Or(cc.method, "GET"), "user_agent.original": cc.name,
		"url.scheme": "http", "network.protocol.version": "1.1",
		"server.address": "127.0.0.1", "server.port": port, "network.peer.address": "127.0.0.1", "client.address": "127.0.0.1",
		// The route, for a path names customers and users.
		"url.path": strings.TrimSpace(strings.TrimLeft(cc.span, "ABCDEFGHIJKLMNOPQRSTUVWXYZ")),
	}
	if !cc.withoutRoute {
		want["http.route"] = want["url.path"]
	}
	if cc.status != 0 {
		want["http.response.status_code"] = strconv.Itoa(cc.status)
	}
	if cc.failed != "" {
		want["error.type"] = cc.failed
	}
	maps.Copy(want, cc.attributes)
	got := maps.Clone(map[string]string(s.Attributes))
	for _, differing := range []string{"partnerguard.call", "network.peer.port", "http.response.body.size", "http.request.body.size"} {
		delete(got, differing)
	}
	if want["partnerguard.request_id"] == "" {
		delete(got, "partnerguard.request_id")
	}
	if diff := gocmp.Diff(want, got); diff != "" {
		t.Errorf("%s: attributes of the span (-want +got):\n%s", cc.name, diff)
	}
}

func testCollectorGetsNoSecret(t *testing.T, program string) {
	em := startEmulator(t, emulator.Config{})
	c := startOtelcol(t, program, otelcolConfig{})
	run := newCanaryRun(t, em)
	g := startGuard(t, t.TempDir(), guardYAML(em, "enforce", "timeouts: {response_header: 300ms}"), c.environment("grpc")...)
	run.calls(g)
	g.stop()
	c.stop()
	if all := run.searchTree("what the collector wrote", c.dir); !bytes.Contains(all, []byte(run.sentinel)) {
		t.Error("what every call says of itself is not there: this shows nothing")
	}
	if n := len(run.secrets); n < 200 {
		t.Errorf("only %d things were searched for", n)
	}
}

// No call notices that the collector dies. The spans of that time arrive later, or are
// counted as dropped.
func testCollectorIsKilled(t *testing.T, program string) {
	var side sync.WaitGroup // most of the time the exporters wait before they try again
	defer side.Wait()
	for protocol, retries := range map[string]bool{
		"grpc": true,
		// OpenTelemetry's exporter gives up at once where nobody listens.
		"http/protobuf": false,
	} {
		test := func(t *testing.T) {
			em := startEmulator(t, emulator.Config{})
			c := startOtelcol(t, program, otelcolConfig{})
			g := startGuard(t, t.TempDir(), guardYAML(em, "audit"), c.environment(protocol,
				// So that a slow start of the collector loses nothing.
				"OTEL_BSP_MAX_QUEUE_SIZE=50000", "OTEL_BSP_EXPORT_TIMEOUT=120000", "OTEL_EXPORTER_OTLP_TIMEOUT=120000")...)
			token := sampleToken(t, em, emulator.AppCompliant)

			var mu sync.Mutex
			var ids []string // of the calls that went well
			var failures []string
			end := make(chan struct{})
			var load sync.WaitGroup
			load.Go(func() {
				for {
					select {
					case <-end:
						return
					default:
					}
					id, err := plainCall(g.url+"/v1/invoices", token)
					mu.Lock()
					if ids = append(ids, id); err != nil {
						failures = append(failures, err.Error())
					}
					mu.Unlock()
				}
			})
			made := func() int {
				mu.Lock()
				defer mu.Unlock()
				return len(ids)
			}
			await := func(n int) {
				t.Helper()
				awaiting(t, func() (int, bool) { return made(), made() >= n })
			}
			arrived := func() map[string]bool {
				spans, _ := c.spans()
				of := map[string]bool{}
				for _, s := range spans {
					of[s.Attributes["partnerguard.call"]] = true
				}
				return of
			}
			awaiting(t, func() (int, bool) { n := len(arrived()); return n, n > 20 })
			c.kill()
			killed := made() + 1 // one may be on its way
			await(killed + 100)
			c.start()
			await(made() + 20)
			close(end)
			load.Wait()
			awaiting(t, func() (int, bool) { return len(arrived()), arrived()[ids[len(ids)-1]] })
			awaiting(t, func() (int, bool) {
				metrics, _ := c.metrics()
				return len(metrics), len(metrics) > 0
			})
			dropped := metric(t, g, "partnerguard_dropped_spans_total")
			g.stop()
			c.stop()
			logIsJSON(t, g)

			if len(failures) > 0 {
				t.Errorf("%d of %d calls failed: %s", len(failures), len(ids), failures[0])
			}
			got := arrived()
			missing := 0
			for _, id := range ids[killed:] {
				if !got[id] {
					missing++
				}
			}
			if retries && missing != 0 || float64(missing) > dropped {
				t.Errorf("%d spans of %d calls after the collector died did not arrive, %v were dropped", missing, len(ids)-killed, dropped)
			}
			// Counts go on where they were.
			metrics, _ := c.metrics()
			total := 0.0
			for _, v := range with(collected(t, metrics, temporalityCumulative), "partnerguard_calls_total") {
				total += v
			}
			if total != float64(len(ids)) {
				t.Errorf("the collector counts %v calls of %d", total, len(ids))
			}
		}
		side.Go(func() { t.Run(strings.ReplaceAll(protocol, "/", " "), test) })
	}
}

// plainCall makes a call and returns the guard's id of it.
func plainCall(url, token string) (string, error) {
	r, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	r.Header.Set("Authorization", "Bearer "+token)
	res, err := plainClient.Do(r)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode != http.StatusOK {
		err = fmt.Errorf("%d %s", res.StatusCode, body)
	}
	return res.Header.Get("Partnerguard-Call"), err
}

// A collector that wants another token: no call notices, what is lost is counted, and
// the log says so once, without the token.
func testCollectorRefuses(t *testing.T, program string) {
	for _, protocol := range []string{"http/protobuf", "grpc"} {
		t.Run(strings.ReplaceAll(protocol, "/", " "), func(t *testing.T) {
			t.Parallel()
			em := startEmulator(t, emulator.Config{})
			c := startOtelcol(t, program, otelcolConfig{token: "the-right-one"})
			const wrong = "the-wrong-one"
			g := startGuard(t, t.TempDir(), guardYAML(em, "audit"), c.environment(protocol, "OTEL_EXPORTER_OTLP_HEADERS=authorization=Bearer%20"+wrong)...)
			began := time.Now()
			const calls = 5
			for range calls {
				if res, body := get(t, g.url+"/v1/invoices", sampleToken(t, em, emulator.AppCompliant)); res.StatusCode != 200 {
					t.Errorf("%d %s", res.StatusCode, body)
				}
			}
			awaiting(t, func() (map[string]float64, bool) {
				m := metrics(t, g)
				return m, m["partnerguard_dropped_spans_total"] == calls && m["partnerguard_export_errors_total"] >= 2
			})
			g.stop()
			c.stop()
			logIsJSON(t, g)
			if n := strings.Count(g.text(), `"msg":"telemetry error"`); n < 1 || n > 1+int(time.Since(began)/time.Minute) {
				t.Errorf("the log tells of it %d times, want once a minute:\n%s", n, g.text())
			}
			if strings.Contains(g.text(), wrong) {
				t.Error("the log holds the token for the collector")
			}
			if spans, _ := c.spans(); len(spans) != 0 {
				t.Errorf("the collector took %d spans", len(spans))
			}
		})
	}
}

// Metrics go to a target that never answers: that keeps no span from the collector
// when the guard ends.
func testCollectorForTraces(t *testing.T, program string) {
	em := startEmulator(t, emulator.Config{})
	c := startOtelcol(t, program, otelcolConfig{})
	hole, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer hole.Close()
	g := startGuard(t, t.TempDir(), guardYAML(em, "audit"), c.environment("", "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT=http://"+hole.Addr().String()+"/v1/metrics",
		"OTEL_BSP_SCHEDULE_DELAY=3600000")...)
	if res, body := get(t, g.url+"/v1/invoices", sampleToken(t, em, emulator.AppCompliant)); res.StatusCode != 200 {
		t.Fatalf("%d %s", res.StatusCode, body)
	}
	g.stop()
	c.stop()
	if spans, _ := c.spans(); len(spans) != 1 {
		t.Errorf("%d spans arrived, want 1", len(spans))
	}
}
