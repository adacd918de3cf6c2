package proxy

import (
	"net/http"
	"sync"
	"time"

	"github.com/partnerguard/partnerguard/policy"
)

// admit refuses the call if too many of its integration are in flight, so that one
// script that runs away does not spend what Microsoft allows the whole tenant.
func (g *Guard) admit(c *call) {
	rec := &c.rec
	if rec.Effect == policy.Reject {
		return
	}
	limit := c.settings.maxCalls(rec.Integration)
	if limit == 0 {
		return
	}
	// Who only claims a name must not use up the calls of those who prove it.
	key := inFlightKey{rec.Integration, c.facts.Attribution.Strong}
	if g.inFlight.enter(key, limit) {
		c.entered = key
		return
	}
	rec.Effect, rec.Reason, rec.WouldReject = policy.Reject, policy.ReasonLimitExceeded, true
}

// inFlight counts the calls in flight of the integrations that have a limit. The zero
// value is ready.
type inFlight struct {
	mu sync.Mutex
	n  map[inFlightKey]int
}

type inFlightKey struct {
	integration string
	strong      bool
}

func (f *inFlight) enter(key inFlightKey, limit int) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.n[key] >= limit {
		return false
	}
	if f.n == nil {
		f.n = map[inFlightKey]int{}
	}
	f.n[key]++
	return true
}

func (f *inFlight) leave(key inFlightKey) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.n[key]--; f.n[key] == 0 {
		delete(f.n, key)
	}
}

// stall ends a transfer in which no byte moves: begin and end stand around each read
// or write. Deadlines of the connection are set only when time is up: HTTP/2 would take
// one that passes between two reads for the end of the stream. A nil stall does nothing.
type stall struct {
	limit time.Duration
	timer *time.Timer

	mu    sync.Mutex
	until time.Time // zero but between begin and end
	up    bool      // time was up
}

// newStall watches one direction of a transfer; cut makes the read or write under way
// fail.
func newStall(limit time.Duration, cut func(time.Time) error) *stall {
	if limit <= 0 {
		return nil
	}
	s := &stall{limit: limit}
	s.timer = time.AfterFunc(limit, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		// The timer may come late, into the next read.
		if !s.until.IsZero() && !time.Now().Before(s.until) {
			s.up = true
			cut(longAgo)
		}
	})
	s.timer.Stop()
	return s
}

func (s *stall) begin() {
	if s == nil {
		return
	}
	s.mu.Lock()
	s.until = time.Now().Add(s.limit)
	s.mu.Unlock()
	s.timer.Reset(s.limit)
}

func (s *stall) end() {
	if s == nil {
		return
	}
	s.timer.Stop()
	s.mu.Lock()
	s.until = time.Time{}
	s.mu.Unlock()
}

// stalled reports whether time was up.
func (s *stall) stalled() bool {
	if s == nil {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.up
}

// readStall watches how the client sends.
func readStall(w http.ResponseWriter, limit time.Duration) *stall {
	return newStall(limit, http.NewResponseController(w).SetReadDeadline)
}

// writeStall watches how the client takes.
func writeStall(w http.ResponseWriter, limit time.Duration) *stall {
	return newStall(limit, http.NewResponseController(w).SetWriteDeadline)
}
