package telemetry

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/partnerguard/partnerguard/policy"
	"github.com/partnerguard/partnerguard/proxy"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
)

// instruments are all metrics of the guard: their names, units and labels stand
// here and nowhere else. Every label has a bounded set of values.
type instruments struct {
	calls      counters[callLabels]
	rejections counters[rejectionLabels]
	compliant  counters[compliantLabels]
	unrecorded counters[integrationLabel]
	replays    atomic.Int64
	unparsed   atomic.Int64
	refused    atomic.Int64 // connections
	intruders  atomic.Int64 // wrong credentials on the admin listener
	reloads    counters[reloadResult]

	droppedSpans atomic.Int64

	reconcileFailures atomic.Int64
	reconciled        atomic.Pointer[Reconciled] // nil before the first success

	// Tokens notices when tokens can no longer be verified.
	Tokens TokenAlarm

	duration     histogram[durationLabels]
	upstreamTime histogram[upstreamLabel]

	degraded  metric.Int64Gauge // part
	buildInfo metric.Int64Gauge // version, go_version
	storeLag  metric.Float64Gauge
	keyAge    metric.Float64Gauge // tenant, version
	breaker   metric.Int64Gauge   // upstream, state

	generation  metric.Int64Gauge
	certificate metric.Float64Gauge // listener, name

	wrong atomic.Pointer[Place] // where the configuration on disk is; nil where it is in use
}

// Reconciled is what the last reconcile that succeeded came to.
type Reconciled struct {
	At       time.Time
	Complete bool
	Findings map[string]int // by kind: all kinds there are, with 0 for none
}

// reloadResult is how a reload ended.
type reloadResult string

// The ways in which a reload ends.
const (
	ReloadDone      reloadResult = "done"
	ReloadUnchanged reloadResult = "unchanged"
	ReloadFailed    reloadResult = "failed"
)

// Place is where a configuration is wrong; the zero Place is unknown.
type Place struct {
	File         string
	Line, Column int
}

type callLabels struct {
	integration string
	mode        policy.Mode
	effect      policy.Effect
	reason      policy.Reason
	hundreds    int
}

type durationLabels struct {
	integration string
	effect      policy.Effect
}

type rejectionLabels struct {
	integration string
	rejection   policy.Rejection
}

type compliantLabels struct {
	integration string
	compliant   bool
}

type (
	integrationLabel string
	upstreamLabel    string
)

// durationBuckets span a refusal from memory (100 µs) to an SDK's patience (180 s).
var durationBuckets = []float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 180}

func newInstruments(m metric.Meter, log *CallLog, errs *exportErrors) (*instruments, error) {
	in := &instruments{}
	var err error
	must := func(e error) {
		if err == nil {
			err = e
		}
	}
	// Counters are kept here and observed when they are asked for: a call then costs
	// an atomic addition instead of a walk through the SDK.
	observe := func(name, unit, about string, values func(func(int64, metric.ObserveOption))) {
		c, e := m.Int64ObservableCounter(name, metric.WithUnit("{"+unit+"}"), metric.WithDescription(about))
		must(e)
		_, e = m.RegisterCallback(func(_ context.Context, o metric.Observer) error {
			values(func(n int64, set metric.ObserveOption) { o.ObserveInt64(c, n, set) })
			return nil
		}, c)
		must(e)
	}
	one := func(n func() int64) func(func(int64, metric.ObserveOption)) {
		return func(yield func(int64, metric.ObserveOption)) { yield(n(), metric.WithAttributes()) }
	}
	seconds := func(name, about string) metric.Float64Histogram {
		h, e := m.Float64Histogram(name, metric.WithUnit("s"), metric.WithDescription(about), metric.WithExplicitBucketBoundaries(durationBuckets...))
		must(e)
		return h
	}
	gauge := func(name, about string) metric.Int64Gauge {
		g, e := m.Int64Gauge(name, metric.WithDescription(about))
		must(e)
		return g
	}
	secondsGauge := func(name, about string) metric.Float64Gauge {
		g, e := m.Float64Gauge(name, metric.WithUnit("s"), metric.WithDescription(about))
		must(e)
		return g
	}
	observe("partnerguard.calls", "call", "Calls, by integration, mode, effect, reason and class of the status that the client got.", in.calls.all)
	observe("partnerguard.rejections", "call", "Microsoft's 401 and 403, by integration and kind.", in.rejections.all)
	observe("partnerguard.mfa_compliance", "call", "Microsoft's own verdict (isMfaCompliant), by integration.", in.compliant.all)
	observe("partnerguard.unrecorded_calls", "call", "Calls that the ledger lacks, wholly or in part, by integration.", in.unrecorded.all)
	observe("partnerguard.replays", "request", "Times net/http sent a safe request again over a fresh connection.", one(in.replays.Load))
	observe("partnerguard.unparsed_requests", "request", "Requests that were refused as malformed, or given up, before there was a call.", one(in.unparsed.Load))
	observe("partnerguard.refused_connections", "connection", "Connections closed at once because the listener had as many as it takes.", one(in.refused.Load))
	observe("partnerguard.admin.refused_credentials", "request", "Requests to the admin listener with a wrong token.", one(in.intruders.Load))
	observe("partnerguard.reloads", "reload", "Reloads of the configuration, by result.", in.reloads.all)
	observe("partnerguard.reconcile.failures", "run", "Runs of reconcile on schedule that failed.", one(in.reconcileFailures.Load))
	must(in.observeReconciled(m))
	observe("partnerguard.dropped_spans", "span", "Spans that were not sent: the queue was full, or the export failed.", one(in.droppedSpans.Load))
	observe("partnerguard.export_errors", "error", "Errors that OpenTelemetry reported, such as an export that failed.", one(errs.n.Load))
	if log != nil {
		observe("partnerguard.log_dropped_lines", "line", "Log lines dropped because the reader of the log was too slow.", one(log.Dropped))
	}
	in.duration.h = seconds("partnerguard.call.duration", "Time of a call from its header to the end of the answer, by integration and effect.")
	in.upstreamTime.h = seconds("partnerguard.upstream.duration", "Time until the upstream's response header.")
	in.degraded = gauge("partnerguard.degraded", "1 while a part does not do its work, else 0.")
	in.buildInfo = gauge("partnerguard.build_info", "Always 1; the version is in the labels.")
	in.storeLag = secondsGauge("partnerguard.store.lag", "How far the store lies behind the ledger.")
	in.keyAge = secondsGauge("partnerguard.keys.age", "Age of the key set in use.")
	in.breaker = gauge("partnerguard.upstream.breaker", "1 for the breaker's state, else 0.")
	in.generation = gauge("partnerguard.config.generation", "Generation of the configuration in use, from 1.")
	wrong, e := m.Int64ObservableGauge("partnerguard.config.error", metric.WithDescription("1 while the configuration on disk is not taken, with the place of its first mistake; else 0."))
	must(e)
	_, e = m.RegisterCallback(func(_ context.Context, o metric.Observer) error {
		if p := in.wrong.Load(); p != nil {
			o.ObserveInt64(wrong, 1, metric.WithAttributes(
				attribute.String("file", p.File), attribute.Int("line", p.Line), attribute.Int("column", p.Column)))
			return nil
		}
		o.ObserveInt64(wrong, 0)
		return nil
	}, wrong)
	must(e)
	certificate, e := m.Float64Gauge("partnerguard.certificate.days_left", metric.WithDescription("Days until a listener's certificate expires, by listener and name."))
	must(e)
	in.certificate = certificate
	if err != nil {
		return nil, fmt.Errorf("set up metrics: %w", err)
	}
	in.generation.Record(context.Background(), 1)
	return in, nil
}

// count adds a finished call.
func (in *instruments) count(ctx context.Context, rec *proxy.Record, unrecorded error) {
	in.calls.add(callLabels{rec.Integration, rec.Mode, rec.Effect, rec.Reason, rec.Status / 100})
	in.duration.record(ctx, rec.Duration, durationLabels{rec.Integration, rec.Effect})
	if rec.UpstreamTime > 0 {
		in.upstreamTime.record(ctx, rec.UpstreamTime, upstreamLabel(rec.Upstream))
	}
	if rec.Rejection != "" {
		in.rejections.add(rejectionLabels{rec.Integration, rec.Rejection})
	}
	if rec.MFACompliant != policy.CompliantUnknown {
		in.compliant.add(compliantLabels{rec.Integration, rec.MFACompliant == policy.CompliantTrue})
	}
	in.replays.Add(int64(rec.Replays))
	in.Tokens.count(rec)
	if unrecorded != nil {
		in.unrecorded.add(integrationLabel(rec.Integration))
	}
}

// Unparsed counts a request that never became a call.
func (in *instruments) Unparsed() { in.unparsed.Add(1) }

// ConnectionRefused counts a connection over a listener's limit.
func (in *instruments) ConnectionRefused() { in.refused.Add(1) }

// CredentialRefused counts a wrong credential on the admin listener.
func (in *instruments) CredentialRefused() { in.intruders.Add(1) }

// Reloaded counts a reload and says which generation is in use now. wrong is the place
// of the first mistake where it failed, nil where it did not.
func (in *instruments) Reloaded(result reloadResult, generation uint64, wrong *Place) {
	in.reloads.add(result)
	in.generation.Record(context.Background(), int64(generation))
	in.wrong.Store(wrong)
}

// observeReconciled registers the gauges of the last reconcile, which are absent before
// the first success.
func (in *instruments) observeReconciled(m metric.Meter) error {
	last, err := m.Float64ObservableGauge("partnerguard.reconcile.last_success.timestamp", metric.WithUnit("s"),
		metric.WithDescription("When Microsoft's records were last held against ours, in seconds since 1970."))
	complete, e := m.Int64ObservableGauge("partnerguard.reconcile.complete", metric.WithDescription("1 when Microsoft's records lacked nothing then, else 0."))
	err = errors.Join(err, e)
	findings, e := m.Int64ObservableGauge("partnerguard.reconcile.findings", metric.WithDescription("What reconcile found then, by kind."))
	if err = errors.Join(err, e); err != nil {
		return err
	}
	_, err = m.RegisterCallback(func(_ context.Context, o metric.Observer) error {
		r := in.reconciled.Load()
		if r == nil {
			return nil
		}
		o.ObserveFloat64(last, float64(r.At.UnixMilli())/1000)
		o.ObserveInt64(complete, oneIf(r.Complete))
		for kind, n := range r.Findings {
			o.ObserveInt64(findings, int64(n), metric.WithAttributes(attribute.String("kind", kind)))
		}
		return nil
	}, last, complete, findings)
	return err
}

// Reconciled says what the last reconcile came to. r is not modified any more.
func (in *instruments) Reconciled(r *Reconciled) { in.reconciled.Store(r) }

// ReconcileFailed counts a reconcile that failed.
func (in *instruments) ReconcileFailed() { in.reconcileFailures.Add(1) }

// CertificateDaysLeft says when the certificate that a listener has for name expires.
func (in *instruments) CertificateDaysLeft(listener, name string, days float64) {
	in.certificate.Record(context.Background(), days,
		metric.WithAttributes(attribute.String("listener", listener), attribute.String("name", name)))
}

// Degraded says whether a part (keys, ledger, store, disk) fails to do its work.
func (in *instruments) Degraded(part string, is bool) {
	in.degraded.Record(context.Background(), oneIf(is), metric.WithAttributes(attribute.String("part", part)))
}

// StoreLag says how far the store lies behind the ledger, in seconds.
func (in *instruments) StoreLag(seconds float64) {
	in.storeLag.Record(context.Background(), seconds)
}

// KeyAge says how old the key set of a tenant is, in seconds.
func (in *instruments) KeyAge(tenant, version string, seconds float64) {
	in.keyAge.Record(context.Background(), seconds,
		metric.WithAttributes(attribute.String("tenant", tenant), attribute.String("version", version)))
}

// Breaker says which state (closed, half-open, open) an upstream's breaker is in.
func (in *instruments) Breaker(upstream, state string) {
	for _, s := range [...]string{"closed", "half-open", "open"} {
		in.breaker.Record(context.Background(), oneIf(s == state),
			metric.WithAttributes(attribute.String("upstream", upstream), attribute.String("state", s)))
	}
}

func (in *instruments) build(version, goVersion string) {
	in.buildInfo.Record(context.Background(), 1,
		metric.WithAttributes(attribute.String("version", version), attribute.String("go_version", goVersion)))
}

func oneIf(b bool) int64 {
	if b {
		return 1
	}
	return 0
}

// attributesOf are a series' labels.
func attributesOf(key any) []attribute.KeyValue {
	text := attribute.String
	switch k := key.(type) {
	case callLabels:
		class := "none"
		if k.hundreds > 0 {
			class = strconv.Itoa(k.hundreds) + "xx"
		}
		return []attribute.KeyValue{text("integration", k.integration), text("mode", k.mode.String()),
			text("effect", k.effect.String()), text("reason", string(k.reason)), text("status_class", class)}
	case durationLabels:
		return []attribute.KeyValue{text("integration", k.integration), text("effect", k.effect.String())}
	case rejectionLabels:
		return []attribute.KeyValue{text("integration", k.integration), text("rejection", string(k.rejection))}
	case reloadResult:
		return []attribute.KeyValue{text("result", string(k))}
	case integrationLabel:
		return []attribute.KeyValue{text("integration", string(k))}
	case upstreamLabel:
		return []attribute.KeyValue{text("upstream", string(k))}
	case compliantLabels:
		return []attribute.KeyValue{text("integration", k.integration), attribute.Bool("compliant", k.compliant)}
	}
	return nil
}

// series finds what belongs to a key, made at its first use. Reading takes no lock.
type series[K comparable, V any] struct {
	known atomic.Pointer[map[K]V] // replaced whole, never modified
	mu    sync.Mutex              // for writers
}

func (s *series[K, V]) get(key K, make func(metric.MeasurementOption) V) V {
	if m := s.known.Load(); m != nil {
		if v, ok := (*m)[key]; ok {
			return v
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	next := map[K]V{}
	if m := s.known.Load(); m != nil {
		maps.Copy(next, *m)
	}
	v, ok := next[key]
	if !ok {
		v = make(metric.WithAttributeSet(attribute.NewSet(attributesOf(key)...)))
		next[key] = v
		s.known.Store(&next)
	}
	return v
}

// counters count by key.
type counters[K comparable] struct{ series[K, *counter] }

type counter struct {
	n   atomic.Int64
	set metric.ObserveOption
}

func (c *counters[K]) add(key K) {
	c.get(key, func(set metric.MeasurementOption) *counter { return &counter{set: set} }).n.Add(1)
}

func (c *counters[K]) all(yield func(int64, metric.ObserveOption)) {
	if m := c.known.Load(); m != nil {
		for _, v := range *m {
			yield(v.n.Load(), v.set)
		}
	}
}

// histogram records times by key.
type histogram[K comparable] struct {
	h metric.Float64Histogram
	series[K, []metric.RecordOption]
}

func (h *histogram[K]) record(ctx context.Context, d time.Duration, key K) {
	h.h.Record(ctx, d.Seconds(), h.get(key, func(set metric.MeasurementOption) []metric.RecordOption {
		return []metric.RecordOption{set}
	})...)
}
