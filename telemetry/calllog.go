package telemetry

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/partnerguard/partnerguard/policy"
	"github.com/partnerguard/partnerguard/proxy"
)

// CallLog is the log: one line a call and what slog writes, to one stream. Lines
// are queued and written behind, so that a reader who is slow, or gone, stops no
// call; past maxQueued bytes lines are dropped and counted. It is safe for
// concurrent use; end it with Close.
type CallLog struct {
	w    io.Writer
	text bool

	mu     sync.Mutex
	queue  []byte
	closed bool
	wake   chan struct{}
	done   chan struct{}

	dropped atomic.Int64
}

// maxQueued bounds the lines that wait for a slow reader, in bytes.
const maxQueued = 4 << 20

// NewCallLog starts a log on w: JSON, one object a line, or text for a terminal.
func NewCallLog(w io.Writer, text bool) *CallLog {
	l := &CallLog{w: w, text: text, wake: make(chan struct{}, 1), done: make(chan struct{})}
	go l.run()
	return l
}

// Slog returns a logger for what is not a call, on the same stream.
func (l *CallLog) Slog() *slog.Logger {
	if l.text {
		return slog.New(slog.NewTextHandler(l, &slog.HandlerOptions{ReplaceAttr: shortTime}))
	}
	return slog.New(slog.NewJSONHandler(l, nil))
}

// shortTime is a time for the eye: a terminal shows today's lines.
func shortTime(groups []string, a slog.Attr) slog.Attr {
	if len(groups) == 0 && a.Key == slog.TimeKey {
		return slog.String(slog.TimeKey, a.Value.Time().Format(time.TimeOnly))
	}
	return a
}

// Dropped returns how many lines were dropped.
func (l *CallLog) Dropped() int64 { return l.dropped.Load() }

// Write queues p, whole lines (io.Writer for slog). It never fails.
func (l *CallLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed || len(l.queue)+len(p) > maxQueued {
		l.dropped.Add(1)
		return len(p), nil
	}
	l.queue = append(l.queue, p...)
	select {
	case l.wake <- struct{}{}:
	default:
	}
	return len(p), nil
}

// Close writes what is queued, for as long as ctx allows.
func (l *CallLog) Close(ctx context.Context) error {
	l.mu.Lock()
	if !l.closed {
		l.closed = true
		close(l.wake)
	}
	l.mu.Unlock()
	select {
	case <-l.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("write the rest of the log: %w", ctx.Err())
	}
}

func (l *CallLog) run() {
	defer close(l.done)
	var spare []byte
	for open := true; open; {
		_, open = <-l.wake
		l.mu.Lock()
		out := l.queue
		l.queue = spare[:0]
		l.mu.Unlock()
		if len(out) > 0 {
			l.w.Write(out) // there is nobody left to tell of an error
		}
		spare = out
		if cap(spare) > maxQueued/4 {
			spare = nil
		}
	}
}

// call writes the line of a finished call. A call that the ledger lacks is logged
// whole as an error: the log is then its only account.
func (l *CallLog) call(rec *proxy.Record, userRef string, unrecorded error) {
	level := slog.LevelInfo
	switch {
	case unrecorded != nil:
		level = slog.LevelError
	case rec.Effect == policy.Reject || rec.Rejection != "" || rec.Error != "":
		level = slog.LevelWarn
	}
	b := lines.Get().(*[]byte)
	defer lines.Put(b)
	if l.text {
		*b = appendTerminalLine((*b)[:0], rec, level, unrecorded)
	} else {
		*b = appendJSONLine((*b)[:0], rec, userRef, level, unrecorded)
	}
	l.Write(*b)
}

var lines = sync.Pool{New: func() any { b := make([]byte, 0, 2048); return &b }}

// appendJSONLine writes the line as slog's JSON handler would, by hand: it costs a
// third of it. The members are those of the ledger.
func appendJSONLine(dst []byte, rec *proxy.Record, userRef string, level slog.Level, unrecorded error) []byte {
	dst = append(dst, `{"level":"`...)
	dst = append(dst, level.String()...)
	dst = append(dst, `","msg":"call",`...)
	dst = AppendDecision(dst, rec, userRef)
	outcome := len(dst)
	dst = AppendOutcome(dst, rec)
	// The outcome begins with the call's id, which already stands there.
	skip := len(`"call":"",`) + len("00000000-0000-0000-0000-000000000000")
	if len(dst)-outcome >= skip {
		dst[outcome] = ','
		dst = append(dst[:outcome+1], dst[outcome+skip:]...)
	} else {
		dst = dst[:outcome]
	}
	if unrecorded != nil {
		dst = append(dst, `,"unrecorded":`...)
		dst = AppendString(dst, unrecorded.Error())
	}
	return append(dst, '}', '\n')
}

// appendTerminalLine writes the line for a person at a terminal.
func appendTerminalLine(dst []byte, rec *proxy.Record, level slog.Level, unrecorded error) []byte {
	dst = fmt.Appendf(dst, "%s %-5s %-6s %s  %d  %s  %s  %s %s", rec.Time.Local().Format(time.TimeOnly), level,
		rec.Method, clean(rec.Path), rec.Status, rec.Duration.Round(100*time.Microsecond), rec.Integration, rec.Effect, rec.Reason)
	if rec.WouldReject && rec.Effect != policy.Reject {
		dst = append(dst, " (enforce would refuse)"...)
	}
	if rec.Rejection != "" {
		dst = fmt.Appendf(dst, "  Microsoft: %s %s", rec.Rejection, clean(rec.Code))
	}
	if rec.Error != "" {
		dst = append(dst, "  "+rec.Error...)
	}
	dst = append(dst, "  "...)
	dst = append(dst, rec.Call.String()...)
	if unrecorded != nil {
		dst = append(dst, "  NOT IN THE LEDGER: "+clean(unrecorded.Error())...)
	}
	return append(dst, '\n')
}

// clean is s without what could drive a terminal.
func clean(s string) string {
	q := AppendString(nil, s)
	return string(q[1 : len(q)-1])
}
