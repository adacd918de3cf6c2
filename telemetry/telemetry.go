// Package telemetry tells what the guard did: OpenTelemetry metrics and traces,
// and one log line a call, all read from the proxy.Record.
//
// Nothing in it stands in the way of a call: exporters and the log have bounded
// queues, and what they drop is counted.
package telemetry

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/partnerguard/partnerguard/policy"
	"github.com/partnerguard/partnerguard/proxy"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.opentelemetry.io/contrib/exporters/autoexport"
	"go.opentelemetry.io/contrib/instrumentation/net/http/otelhttp"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	otelprometheus "go.opentelemetry.io/otel/exporters/prometheus"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/metric/noop"
	"go.opentelemetry.io/otel/propagation"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
)

// Telemetry observes calls (proxy.Observer). It is safe for concurrent use; make it
// with New and end it with Shutdown.
type Telemetry struct {
	*instruments
	log      *CallLog
	userRef  func(*policy.Token) string
	registry *prometheus.Registry
	meters   *sdkmetric.MeterProvider
	tracers  *sdktrace.TracerProvider // nil when traces go nowhere
}

// Config is what New needs. Version is required.
type Config struct {
	Version  string
	Instance string
	// Log gets one line a call; nil writes none.
	Log *CallLog
	// UserRef is the pseudonym of a token's user; nil leaves it out.
	UserRef func(*policy.Token) string
	// Env looks up an environment variable. Traces and metrics are sent by OTLP
	// when one of OpenTelemetry's standard variables asks for it
	// (OTEL_EXPORTER_OTLP_ENDPOINT, …); without one nothing is sent.
	Env func(string) string
}

// New sets up metrics and traces. Metrics are always served by MetricsHandler.
func New(ctx context.Context, cfg Config) (*Telemetry, error) {
	env := cfg.Env
	if env == nil {
		env = func(string) string { return "" }
	}
	// OpenTelemetry has one handler in a process; its own writes text to stderr, into
	// the midst of our log.
	errs := &exportErrors{}
	if cfg.Log != nil {
		errs.log = cfg.Log.Slog()
	}
	otel.SetErrorHandler(errs)
	res, err := resource.New(ctx, resource.WithFromEnv(), resource.WithTelemetrySDK(),
		resource.WithAttributes(
			attribute.String("service.name", "partnerguard"),
			attribute.String("service.version", cfg.Version),
			attribute.String("service.instance.id", cfg.Instance)),
		resource.WithFromEnv()) // last, so that OTEL_SERVICE_NAME wins
	if err != nil {
		return nil, fmt.Errorf("describe this process for OpenTelemetry: %w", err)
	}
	t := &Telemetry{log: cfg.Log, userRef: cfg.UserRef, registry: prometheus.NewRegistry()}
	t.registry.MustRegister(
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	exporter, err := otelprometheus.New(
		otelprometheus.WithRegisterer(t.registry),
		otelprometheus.WithoutScopeInfo(), otelprometheus.WithoutTargetInfo())
	if err != nil {
		return nil, fmt.Errorf("set up the Prometheus exporter: %w", err)
	}
	options := []sdkmetric.Option{
		sdkmetric.WithResource(res), sdkmetric.WithReader(exporter),
		// The labels are bounded by construction: integrations by the configuration
		// and maxAutoNames, the rest by this package's words.
		sdkmetric.WithCardinalityLimit(50_000),
	}
	if asked(env, "METRICS") {
		reader, err := autoexport.NewMetricReader(ctx)
		if err != nil {
			return nil, fmt.Errorf("set up the export of metrics: %w", err)
		}
		options = append(options, sdkmetric.WithReader(reader))
	}
	t.meters = sdkmetric.NewMeterProvider(options...)
	meter := t.meters.Meter("github.com/partnerguard/partnerguard", metric.WithInstrumentationVersion(cfg.Version))
	if t.instruments, err = newInstruments(meter, cfg.Log, errs); err != nil {
		return nil, err
	}
	t.build(cfg.Version, runtime.Version())
	if asked(env, "TRACES") {
		exporter, err := autoexport.NewSpanExporter(ctx)
		if err != nil {
			return nil, fmt.Errorf("set up the export of traces: %w", err)
		}
		t.tracers = sdktrace.NewTracerProvider(sdktrace.WithResource(res),
			sdktrace.WithSpanProcessor(newSpanQueue(exporter, env, &t.droppedSpans)))
	}
	return t, nil
}

// asked reports whether a standard variable says where this signal goes.
func asked(env func(string) string, signal string) bool {
	if e := env("OTEL_" + signal + "_EXPORTER"); e != "" {
		return e != "none"
	}
	return env("OTEL_EXPORTER_OTLP_ENDPOINT") != "" || env("OTEL_EXPORTER_OTLP_"+signal+"_ENDPOINT") != ""
}

// Trace puts h under a server span a call, if traces go anywhere. The client's
// trace headers are read, not changed, and pass on to Microsoft as they came.
func (t *Telemetry) Trace(h http.Handler) http.Handler {
	if t.tracers == nil {
		return h
	}
	return otelhttp.NewHandler(h, "call",
		otelhttp.WithTracerProvider(t.tracers),
		otelhttp.WithMeterProvider(noop.NewMeterProvider()),
		otelhttp.WithSpanNameFormatter(func(_ string, r *http.Request) string { return r.Method }),
		otelhttp.WithPropagators(propagation.TraceContext{}))
}

// MetricsHandler serves the metrics in Prometheus' format.
func (t *Telemetry) MetricsHandler() http.Handler {
	return promhttp.HandlerFor(t.registry, promhttp.HandlerOpts{})
}

// Observe tells of a finished call (proxy.Observer).
func (t *Telemetry) Observe(ctx context.Context, rec *proxy.Record, unrecorded error) {
	t.count(ctx, rec, unrecorded)
	if span := trace.SpanFromContext(ctx); span.IsRecording() {
		describe(span, rec)
	}
	if t.log != nil {
		user := ""
		if t.userRef != nil {
			user = t.userRef(&rec.Token)
		}
		t.log.call(rec, user, unrecorded)
	}
}

// Shutdown sends what is still queued, until ctx ends.
func (t *Telemetry) Shutdown(ctx context.Context) error {
	var traces error
	var group sync.WaitGroup
	if t.tracers != nil {
		// Side by side: the targets may differ, and one may be away.
		group.Go(func() { traces = t.tracers.Shutdown(ctx) })
	}
	metrics := t.meters.Shutdown(ctx)
	group.Wait()
	return errors.Join(metrics, traces)
}

// describe names the span and gives it the record's facts, those that a trace may
// hold: no path, no query, no user.
func describe(span trace.Span, rec *proxy.Record) {
	name := strings.ToUpper(rec.Method)
	if !slices.Contains(knownMethods, name) {
		name = "HTTP" // as the conventions have it: anyone can make methods up
	}
	if rec.Route != "" {
		name += " " + rec.Route
	}
	span.SetName(name)
	attributes := []attribute.KeyValue{
		// otelhttp put the raw path here, which names customers and users.
		attribute.String("url.path", rec.Route),
		// otelhttp takes X-Forwarded-For for it, which anyone can write.
		attribute.String("client.address", rec.Peer),
	}
	add := func(key, value string) {
		if value != "" {
			attributes = append(attributes, attribute.String(key, value))
		}
	}
	add("partnerguard.call", rec.Call.String())
	add("partnerguard.integration", rec.Integration)
	add("partnerguard.mode", rec.Mode.String())
	add("partnerguard.effect", rec.Effect.String())
	add("partnerguard.reason", string(rec.Reason))
	add("partnerguard.mfa", rec.Token.MFA.String())
	add("partnerguard.rejection", string(rec.Rejection))
	add("partnerguard.error", rec.Error)
	add("partnerguard.request_id", rec.RequestID)
	add("http.route", rec.Route)
	if rec.Status > 0 {
		// otelhttp does not come to say so when the answer breaks off.
		attributes = append(attributes, attribute.Int("http.response.status_code", rec.Status))
	}
	if failure := failureOf(rec); failure != "" {
		add("error.type", failure)
		span.SetStatus(codes.Error, "")
	}
	span.SetAttributes(attributes...)
}

// failureOf is the error.type of a call that failed: how it failed, else the status. It
// is empty for a call that went well, was refused, or that its client gave up.
func failureOf(rec *proxy.Record) string {
	switch {
	case strings.HasPrefix(rec.Error, "client_"): // canceled, stalled
		return ""
	case rec.Error != "":
		return rec.Error
	case rec.Status >= 500:
		return strconv.Itoa(rec.Status)
	}
	return ""
}

// knownMethods are those of RFC 9110 and RFC 5789.
var knownMethods = []string{
	http.MethodGet, http.MethodHead, http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete,
	http.MethodConnect, http.MethodOptions, http.MethodTrace,
}
