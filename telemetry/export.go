package telemetry

import (
	"context"
	"log/slog"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	sdktrace "go.opentelemetry.io/otel/sdk/trace"
)

// spanQueue batches spans for an exporter, and counts those that never get there. It
// bounds the queue itself: OpenTelemetry's batcher drops without a word.
type spanQueue struct {
	sdktrace.SpanProcessor // the batcher, whose queue never fills up

	waiting atomic.Int64 // in the batcher
	limit   int64
	dropped *atomic.Int64
}

// newSpanQueue holds OTEL_BSP_MAX_QUEUE_SIZE spans at most.
func newSpanQueue(exporter sdktrace.SpanExporter, env func(string) string, dropped *atomic.Int64) *spanQueue {
	limit, err := strconv.Atoi(env("OTEL_BSP_MAX_QUEUE_SIZE"))
	if err != nil || limit <= 0 {
		limit = sdktrace.DefaultMaxQueueSize
	}
	q := &spanQueue{limit: int64(limit), dropped: dropped}
	q.SpanProcessor = sdktrace.NewBatchSpanProcessor(countingExporter{exporter, q}, sdktrace.WithMaxQueueSize(limit))
	return q
}

// OnEnd queues a span; it never waits.
func (q *spanQueue) OnEnd(s sdktrace.ReadOnlySpan) {
	if !s.SpanContext().IsSampled() {
		return // the batcher takes none of these
	}
	if q.waiting.Add(1) > q.limit {
		q.waiting.Add(-1)
		q.dropped.Add(1)
		return
	}
	q.SpanProcessor.OnEnd(s)
}

// countingExporter is the exporter of a spanQueue.
type countingExporter struct {
	sdktrace.SpanExporter
	q *spanQueue
}

func (e countingExporter) ExportSpans(ctx context.Context, spans []sdktrace.ReadOnlySpan) error {
	err := e.SpanExporter.ExportSpans(ctx, spans)
	e.q.waiting.Add(-int64(len(spans)))
	if err != nil {
		e.q.dropped.Add(int64(len(spans)))
	}
	return err
}

// exportErrors hears of what OpenTelemetry cannot do, such as an export that fails
// (otel.ErrorHandler). It counts all of it and logs once a minute: a collector that is
// away is an error every few seconds.
type exportErrors struct {
	log *slog.Logger // nil writes nothing
	n   atomic.Int64

	mu     sync.Mutex // guards the rest
	next   time.Time  // no line before this
	silent int        // errors since the last line
}

func (e *exportErrors) Handle(err error) {
	e.n.Add(1)
	if e.log == nil {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	now := time.Now()
	if now.Before(e.next) {
		e.silent++
		return
	}
	text := err.Error()
	if len(text) > maxErrorText { // it may repeat what a collector answered
		text = text[:maxErrorText] + "…"
	}
	e.log.Warn("telemetry error", "error", text, "unlogged", e.silent)
	e.next, e.silent = now.Add(time.Minute), 0
}

const maxErrorText = 1000
