package telemetry

import (
	"context"
	"fmt"
	"maps"
	"sync"
	"sync/atomic"

	"github.com/partnerguard/partnerguard/policy"
	"github.com/partnerguard/partnerguard/proxy"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
)

// instruments are all metrics of the guard: their names, units and labels stand
// here and nowhere else. Every label has a bounded set of values.
type instruments struct {
	calls        metric.Int64Counter     // integration, mode, effect, reason, status_class
	duration     metric.Float64Histogram // integration, effect
	upstreamTime metric.Float64Histogram // upstream
	rejections   metric.Int64Counter     // integration, rejection
	compliant    metric.Int64Counter     // integration, compliant
	replays      metric.Int64Counter
	unrecorded   metric.Int64Counter // integration
	unparsed     metric.Int64Counter
	degraded     metric.Int64Gauge // part
	buildInfo    metric.Int64Gauge // version, go_version
	storeLag     metric.Float64Gauge
	keyAge       metric.Float64Gauge // tenant, version
	breaker      metric.Int64Gauge   // upstream, state

	series      seriesCache[callLabels]
	durations   seriesCache[durationLabels]
	upstreams   seriesCache[string]
	rejected    seriesCache[rejectionLabels]
	compliances seriesCache[compliantLabels]
	names       seriesCache[string]
}

type callLabels struct {
	integration    string
	mode           policy.Mode
	effect         policy.Effect
	reason         policy.Reason
	statusHundreds int
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

// durationBuckets span a refusal from memory (100 µs) to an SDK's patience (180 s).
var durationBuckets = []float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 180}

func newInstruments(m metric.Meter, log *CallLog) (*instruments, error) {
	var in instruments
	var err error
	must := func(e error) {
		if err == nil {
			err = e
		}
	}
	counter := func(name, unit, about string) metric.Int64Counter {
		c, e := m.Int64Counter(name, metric.WithUnit(unit), metric.WithDescription(about))
		must(e)
		return c
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
	in.calls = counter("partnerguard.calls", "", "Calls, by integration, mode, effect, reason and class of the status that the client got.")
	in.duration = seconds("partnerguard.call.duration", "Time of a call from its header to the end of the answer.")
	in.upstreamTime = seconds("partnerguard.upstream.duration", "Time until the upstream's response header.")
	in.rejections = counter("partnerguard.rejections", "", "Microsoft's 401 and 403, by integration and kind.")
	in.compliant = counter("partnerguard.mfa_compliance", "", "Microsoft's own verdict (isMfaCompliant), by integration.")
	in.replays = counter("partnerguard.replays", "", "Times net/http sent a safe request again over a fresh connection.")
	in.unrecorded = counter("partnerguard.unrecorded_calls", "", "Calls that the ledger lacks, wholly or in part.")
	in.unparsed = counter("partnerguard.unparsed_requests", "", "Requests that were refused as malformed, or given up, before there was a call.")
	in.degraded = gauge("partnerguard.degraded", "1 while a part does not do its work, else 0.")
	in.buildInfo = gauge("partnerguard.build_info", "Always 1; the version is in the labels.")
	in.storeLag = secondsGauge("partnerguard.store.lag", "How far the store lies behind the ledger.")
	in.keyAge = secondsGauge("partnerguard.keys.age", "Age of the key set in use.")
	in.breaker = gauge("partnerguard.upstream.breaker", "1 for the breaker's state, else 0.")
	if log != nil {
		dropped, e := m.Int64ObservableCounter("partnerguard.log_dropped_lines", metric.WithDescription("Log lines dropped because the reader of the log was too slow."))
		must(e)
		_, e = m.RegisterCallback(func(_ context.Context, o metric.Observer) error {
			o.ObserveInt64(dropped, log.Dropped())
			return nil
		}, dropped)
		must(e)
	}
	if err != nil {
		return nil, fmt.Errorf("set up metrics: %w", err)
	}
	return &in, nil
}

// count adds a finished call.
func (in *instruments) count(ctx context.Context, rec *proxy.Record, unrecorded error) {
	l := callLabels{rec.Integration, rec.Mode, rec.Effect, rec.Reason, rec.Status / 100}
	in.calls.Add(ctx, 1, in.series.get(l, l.attributes).add...)
	d := durationLabels{rec.Integration, rec.Effect}
	in.duration.Record(ctx, rec.Duration.Seconds(), in.durations.get(d, d.attributes).record...)
	if rec.UpstreamTime > 0 {
		in.upstreamTime.Record(ctx, rec.UpstreamTime.Seconds(), in.upstreams.get(rec.Upstream, label("upstream", rec.Upstream)).record...)
	}
	if rec.Rejection != "" {
		r := rejectionLabels{rec.Integration, rec.Rejection}
		in.rejections.Add(ctx, 1, in.rejected.get(r, r.attributes).add...)
	}
	if rec.MFACompliant != policy.CompliantUnknown {
		c := compliantLabels{rec.Integration, rec.MFACompliant == policy.CompliantTrue}
		in.compliant.Add(ctx, 1, in.compliances.get(c, c.attributes).add...)
	}
	if rec.Replays > 0 {
		in.replays.Add(ctx, int64(rec.Replays))
	}
	if unrecorded != nil {
		in.unrecorded.Add(ctx, 1, in.names.get(rec.Integration, label("integration", rec.Integration)).add...)
	}
}

// Unparsed counts a request that never became a call.
func (in *instruments) Unparsed() { in.unparsed.Add(context.Background(), 1) }

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

func (l callLabels) attributes() []attribute.KeyValue {
	class := "none"
	if l.statusHundreds > 0 {
		class = string(rune('0'+l.statusHundreds)) + "xx"
	}
	return []attribute.KeyValue{
		attribute.String("integration", l.integration), attribute.String("mode", l.mode.String()),
		attribute.String("effect", l.effect.String()), attribute.String("reason", string(l.reason)),
		attribute.String("status_class", class),
	}
}

func (l durationLabels) attributes() []attribute.KeyValue {
	return []attribute.KeyValue{attribute.String("integration", l.integration), attribute.String("effect", l.effect.String())}
}

func (l rejectionLabels) attributes() []attribute.KeyValue {
	return []attribute.KeyValue{attribute.String("integration", l.integration), attribute.String("rejection", string(l.rejection))}
}

func (l compliantLabels) attributes() []attribute.KeyValue {
	return []attribute.KeyValue{attribute.String("integration", l.integration), attribute.Bool("compliant", l.compliant)}
}

func label(name, value string) func() []attribute.KeyValue {
	return func() []attribute.KeyValue { return []attribute.KeyValue{attribute.String(name, value)} }
}

// seriesCache keeps the options of series that were seen, so that a call does not
// build and sort its attributes anew.
type seriesCache[K comparable] struct {
	known atomic.Pointer[map[K]series] // replaced whole, never modified
	mu    sync.Mutex                   // for writers
}

// series are the options of one series, for counters and for histograms.
type series struct {
	add    []metric.AddOption
	record []metric.RecordOption
}

func (c *seriesCache[K]) get(key K, attributes func() []attribute.KeyValue) series {
	if m := c.known.Load(); m != nil {
		if o, ok := (*m)[key]; ok {
			return o
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	next := map[K]series{}
	if m := c.known.Load(); m != nil {
		maps.Copy(next, *m)
	}
	o := metric.WithAttributeSet(attribute.NewSet(attributes()...))
	next[key] = series{[]metric.AddOption{o}, []metric.RecordOption{o}}
	c.known.Store(&next)
	return next[key]
}
