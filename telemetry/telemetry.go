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

	"github.com/partnerguard/partnerguard/policy"
	"github.com/partnerguard/partnerguard/proxy"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.opentelemetry.io/contrib/exporters/autoexport"
	"go.opentelemetry.io/contrib/instrumentation/net/http/otelhttp"
	"go.opentelemetry.io/otel/attribute"
	otelprometheus "go.opentelemetry.io/otel/exporters/prometheus"
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
	if t.instruments, err = newInstruments(t.meters.Meter("github.com/partnerguard/partnerguard"), cfg.Log); err != nil {
		return nil, err
	}
	t.build(cfg.Version, runtime.Version())
	if asked(env, "TRACES") {
		exporter, err := autoexport.NewSpanExporter(ctx)
		if err != nil {
			return nil, fmt.Errorf("set up the export of traces: %w", err)
		}
		t.tracers = sdktrace.NewTracerProvider(sdktrace.WithResource(res), sdktrace.WithBatcher(exporter))
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
	err := t.meters.Shutdown(ctx)
	if t.tracers != nil {
		err = errors.Join(err, t.tracers.Shutdown(ctx))
	}
	return err
}

// describe names the span and gives it the record's facts, those that a trace may
// hold: no path, no query, no user.
func describe(span trace.Span, rec *proxy.Record) {
	name := rec.Method
	if rec.Route != "" {
		name += " " + rec.Route
	}
	span.SetName(name)
	span.SetAttributes(
		attribute.String("partnerguard.call", rec.Call.String()),
		attribute.String("partnerguard.integration", rec.Integration),
		attribute.String("partnerguard.mode", rec.Mode.String()),
		attribute.String("partnerguard.effect", rec.Effect.String()),
		attribute.String("partnerguard.reason", string(rec.Reason)),
		attribute.String("partnerguard.mfa", rec.Token.MFA.String()),
		attribute.String("partnerguard.rejection", string(rec.Rejection)),
		attribute.String("partnerguard.error", rec.Error),
		attribute.String("partnerguard.request_id", rec.RequestID),
		attribute.String("http.route", rec.Route),
		// otelhttp put the raw path here, which names customers and users.
		attribute.String("url.path", rec.Route),
		// otelhttp takes X-Forwarded-For for it, which anyone can write.
		attribute.String("client.address", rec.Peer),
	)
}
