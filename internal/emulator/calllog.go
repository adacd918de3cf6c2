package emulator

import (
	"context"
	"net/http"
	"sync"
	"time"
)

// maxRequests bounds the memory of an emulator that runs for days.
const maxRequests = 100_000

// Request is one request that reached one of the APIs.
type Request struct {
	Time       time.Time
	API        string // PartnerCenter, PartnerAPI or Graph
	Method     string
	Target     string // the raw request-target
	Host       string
	Proto      string
	Header     http.Header // as received, Authorization included
	Trailer    http.Header // complete once the body has been read
	BodyBytes  int64       // read so far
	BodySHA256 string      // lower-case hex; empty until the whole body has been read

	Status     int       // of the final answer; 0 before its headers, or if there were none
	Finished   time.Time // when the emulator was through with it; zero before
	Canceled   bool      // the client went away before the answer was complete
	CanceledAt time.Time
}

// callLog keeps the requests and tells waiters about every change.
type callLog struct {
	mu      sync.Mutex
	entries []*Request
	total   int
	changed chan struct{} // closed and replaced at every change
}

func newCallLog() *callLog {
	return &callLog{changed: make(chan struct{})}
}

// add records r's arrival. The entry may be changed through update only.
func (l *callLog) add(api string, r *http.Request) *Request {
	entry := &Request{
		Time:   time.Now(),
		API:    api,
		Method: r.Method,
		Target: r.RequestURI,
		Host:   r.Host,
		Proto:  r.Proto,
		Header: r.Header.Clone(),
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.entries = append(l.entries, entry)
	if len(l.entries) > maxRequests {
		l.entries[0] = nil
		l.entries = l.entries[1:]
	}
	l.total++
	l.signal()
	return entry
}

func (l *callLog) update(entry *Request, change func(*Request)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	change(entry)
	l.signal()
}

func (l *callLog) snapshot() []Request {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.copies()
}

func (l *callLog) count() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.total
}

func (l *callLog) reset() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.entries, l.total = nil, 0
	l.signal()
}

func (l *callLog) broadcast() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.signal()
}

func (l *callLog) wait(ctx context.Context, done func([]Request) bool) error {
	for {
		l.mu.Lock()
		changed, requests := l.changed, l.copies()
		l.mu.Unlock()
		if done(requests) {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// copies is called with the lock held. Headers are never changed after they
// have been stored and are therefore shared.
func (l *callLog) copies() []Request {
	copies := make([]Request, len(l.entries))
	for i, entry := range l.entries {
		copies[i] = *entry
	}
	return copies
}

// signal is called with the lock held.
func (l *callLog) signal() {
	close(l.changed)
	l.changed = make(chan struct{})
}
