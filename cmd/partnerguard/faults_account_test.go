//go:build linux

package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"strings"
	"syscall"
	"time"

	"github.com/partnerguard/partnerguard/telemetry/ledger"
	"github.com/partnerguard/partnerguard/telemetry/store"
)

// leave is what a fault may do to the account. The zero value asks for all of it.
type leave struct {
	// silent calls may end without an answer at their client.
	silent bool
	// gaps: calls may be missing in the ledger, if the log has them whole and a gap
	// line counts them.
	gaps bool
	// unclosed: the guard ended before it could write again, so that there is no gap
	// line, outcomes stand in the log only, and the store stays behind.
	unclosed bool
	// behind: the store need not be complete at the end; the next start goes on.
	behind bool
	// deaf: the log lacks lines.
	deaf bool
}

// resources are what a process must give back.
type resources struct {
	goroutines, files float64
	memory            int64 // resident, in bytes
}

func (r resources) String() string {
	return fmt.Sprintf("%v goroutines, %v files, %d MiB", r.goroutines, r.files, r.memory>>20)
}

func (s *scene) resources() resources {
	m := metrics(s.t, s.guardProcess)
	return resources{m["go_goroutines"], m["process_open_fds"], int64(m["process_resident_memory_bytes"])}
}

// Margins between the guard at rest before its first call and after its last:
// connections to Entra that idle for 30 s, SQLite's files, timers. The load makes
// hundreds of calls over as many connections as it has clients, so that what leaks
// with a call, or with a client's connection, is more.
const (
	goroutineMargin = 10
	fileMargin      = 8
)

// memoryMargin is how much more resident memory it may have at the end than it had
// under load. It is wide, since nothing makes Go give memory back in time, and the
// race detector never does; TestFaultsOfMemory measures closely.
func memoryMargin() int64 { return 2 * memoryGrowth() }

// settled waits until the guard is at rest again, and says so if it never is.
// loaded is what it used while it was well and under load.
func (s *scene) settled(loaded resources) {
	s.t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	bound := loaded.memory + memoryMargin()
	for {
		now := s.resources()
		if now.goroutines <= s.rest.goroutines+goroutineMargin && now.files <= s.rest.files+fileMargin && now.memory <= bound {
			s.t.Logf("at rest before: %v; under load: %v; afterwards: %v", s.rest, loaded, now)
			return
		}
		if time.Now().After(deadline) {
			s.t.Errorf("at rest the guard had %v, and under load before the fault %v; afterwards it has %v", s.rest, loaded, now)
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// invariants ends the guard and checks what must hold after every fault: it is as
// light as before, it neither panicked nor raced, every call has one decision and one
// outcome in the ledger or is counted as missing, the store agrees, nothing reached
// the upstream twice or unaccounted for, and no secret stands anywhere.
func (s *scene) invariants(calls []sighting, loaded resources, may leave) {
	t := s.t
	t.Helper()
	s.settled(loaded)
	s.counted = 0
	for series, n := range metrics(t, s.guardProcess) {
		if strings.HasPrefix(series, "partnerguard_unrecorded_calls_total{") {
			s.counted += int(n)
		}
	}
	for _, path := range []string{"/metrics", "/readyz?verbose"} {
		_, body := get(t, s.admin+path, "")
		s.secrets.search(path, body)
	}
	s.end()
	s.account(calls, may)
}

// end stops the guard as an operator does.
func (s *scene) end() {
	s.t.Helper()
	began := time.Now()
	s.cmd.Process.Signal(syscall.SIGTERM)
	s.awaitExit(0)
	s.t.Logf("the end took %v", time.Since(began).Round(time.Millisecond))
}

// recorded is what the ledger, or the log, holds of a call.
type recorded struct {
	Type          string `json:"-"`
	Msg           string // of the log
	Call, Error   string
	RequestID     string `json:"request_id"`
	Status        int
	Replays       int
	Unrecorded    string
	Reason, Mode  string
	Calls         uint64 // of a gap
	Outcomes      uint64
	Since, Until  time.Time // of a gap
	Time          time.Time // of a decision
	Method, Level string
}

// account checks all that the guard left behind.
func (s *scene) account(calls []sighting, may leave) {
	t := s.t
	t.Helper()
	log := s.text()
	for _, sign := range []string{"WARNING: DATA RACE", "panic", "fatal error:", "goroutine 1 ["} {
		if i := strings.Index(log, sign); i >= 0 {
			t.Errorf("the guard's output has %q: %.2000s", sign, log[i:])
		}
	}
	s.secrets.search("the log", []byte(log))
	s.secrets.searchTree("the data directory", s.dir)
	if stdout, stderr, code := partnerguard(t, "ledger", "verify", "--data-dir", s.dir); code != 0 {
		t.Errorf("ledger verify: exit %d\n%s%s", code, stdout, stderr)
	}

	logged, unrecorded := map[string]recorded{}, 0
	for l := range strings.Lines(log) {
		var r recorded
		if json.Unmarshal([]byte(l), &r) != nil || r.Msg != "call" {
			continue
		}
		if _, twice := logged[r.Call]; twice {
			t.Errorf("call %s has two lines in the log", r.Call)
		}
		logged[r.Call] = r
	}
	decisions, outcomes := map[string]recorded{}, map[string]recorded{}
	var gap recorded
	for _, r := range s.entries() {
		switch r.Type {
		case ledger.TypeGap:
			if gap.Calls += r.Calls; gap.Outcomes == 0 || r.Since.Before(gap.Since) {
				gap.Since = r.Since
			}
			if gap.Outcomes += r.Outcomes; r.Until.After(gap.Until) {
				gap.Until = r.Until
			}
			if r.Since.IsZero() || r.Until.Before(r.Since) {
				t.Errorf("a gap from %v to %v", r.Since, r.Until)
			}
		case ledger.TypeDecision:
			if _, twice := decisions[r.Call]; twice {
				t.Errorf("call %s is decided twice", r.Call)
			}
			decisions[r.Call] = r
		case ledger.TypeOutcome:
			if _, twice := outcomes[r.Call]; twice {
				t.Errorf("call %s has two outcomes", r.Call)
			}
			if _, decided := decisions[r.Call]; !decided {
				t.Errorf("call %s has an outcome and no decision", r.Call)
			}
			outcomes[r.Call] = r
		}
	}

	// Whatever the guard or its clients know of is accounted for.
	known := map[string]bool{}
	for id := range logged {
		known[id] = true
	}
	byRequest := map[string]string{}
	for id, d := range decisions {
		byRequest[d.RequestID] = id
	}
	for _, c := range calls {
		id := cmp.Or(c.call, byRequest[c.request]) // the header may be lost, too
		o, ok := outcomes[id]
		if !ok {
			o = logged[id]
		}
		// Where the upstream broke off, so must the guard.
		if c.err != nil && !may.silent && o.Error != "upstream_aborted" {
			t.Errorf("call %s got no whole answer: %v; the account says %+v", c.request, c.err, o)
		}
		if c.call == "" {
			continue
		}
		known[c.call] = true
		if c.err == nil && o.Status != c.status && o.Error != "ledger_unavailable" {
			t.Errorf("call %s: the client got %d, the account says %+v", c.call, c.status, o)
		}
	}
	missing := uint64(0)
	for id := range known {
		l, inLog := logged[id]
		if !inLog && !may.deaf {
			t.Errorf("call %s is not in the log", id)
		}
		if _, ok := decisions[id]; ok {
			if _, ended := outcomes[id]; !ended && !may.unclosed {
				t.Errorf("call %s has no outcome", id)
			}
			continue
		}
		missing++
		if l.Unrecorded == "" || l.Level != "ERROR" {
			t.Errorf("call %s is neither in the ledger nor, as missing there, in the log", id)
		}
	}
	for id := range decisions {
		if !known[id] && !may.deaf {
			t.Errorf("call %s is in the ledger and nowhere else", id)
		}
	}
	for _, l := range logged {
		if l.Unrecorded != "" {
			unrecorded++
		}
	}
	t.Logf("%d calls, %d in the ledger, %d not there, %d told as such by the log, gaps of %d calls and %d outcomes",
		len(known), len(decisions), missing, unrecorded, gap.Calls, gap.Outcomes)
	if gap.Calls != missing && !may.unclosed {
		t.Errorf("the ledger lacks %d calls, its gaps count %d", missing, gap.Calls)
	}
	if s.counted >= 0 && s.counted != unrecorded && !may.deaf {
		t.Errorf("the metric counts %d unrecorded calls, the log has %d", s.counted, unrecorded)
	}
	// A call is missed just after it began, and once more when it ends.
	for id := range known {
		l, inLog := logged[id]
		if _, decided := decisions[id]; decided || !inLog || may.unclosed {
			continue
		}
		if at := l.Time; at.Before(gap.Since.Add(-20*time.Second)) || at.After(gap.Until) || l.Reason == "" || l.Mode == "" || l.Status == 0 {
			t.Errorf("the ledger lacks call %s, begun %v; its gaps reach from %v to %v, and the log says of it %+v", id, at, gap.Since, gap.Until, l)
		}
	}
	if missing > 0 && !may.gaps {
		t.Errorf("the ledger lacks %d calls", missing)
	}

	s.upstreamSaw(decisions, outcomes, logged)
	if may.behind {
		startStage(t, s.em, s.dir, stage{}).stop()
	}
	if !may.unclosed {
		s.storeAgrees(decisions, outcomes)
	}
}

// upstreamSaw checks that nothing reached the upstream twice, or unaccounted for.
func (s *scene) upstreamSaw(decisions, outcomes, logged map[string]recorded) {
	t := s.t
	t.Helper()
	replays, decided := map[string]int{}, map[string]bool{}
	for id, d := range decisions {
		decided[d.RequestID] = true
		replays[d.RequestID] += outcomes[id].Replays
	}
	for _, l := range logged {
		if l.Unrecorded != "" {
			decided[l.RequestID] = true
		}
		replays[l.RequestID] = max(replays[l.RequestID], l.Replays)
	}
	arrived, methods := map[string]int{}, map[string]string{}
	for _, r := range s.em.Requests() {
		id := r.Header.Get("MS-RequestId")
		arrived[id]++
		methods[id] = r.Method
	}
	for id, n := range arrived {
		// net/http sends a read again when a connection it kept turns out dead; the
		// record counts that.
		if n > 1 && (methods[id] != http.MethodGet || n > 1+replays[id]) {
			t.Errorf("%s %s reached the upstream %d times, %d replays are recorded", methods[id], id, n, replays[id])
		}
		if !decided[id] {
			t.Errorf("%s %s reached the upstream and is not accounted for", methods[id], id)
		}
	}
}

// storeAgrees compares the store with the ledger.
func (s *scene) storeAgrees(decisions, outcomes map[string]recorded) {
	t := s.t
	t.Helper()
	var stored map[string]store.Call
	if s.database == "" {
		stored = storedCalls(t, s.dir)
	} else {
		stored = fleetCalls(t, s.database)
		maps.DeleteFunc(stored, func(_ string, c store.Call) bool { return c.Instance != s.instance })
	}
	if len(stored) != len(decisions) {
		t.Errorf("the store has %d calls, the ledger %d", len(stored), len(decisions))
	}
	for id, c := range stored {
		if o := outcomes[id]; int(c.Status) != o.Status || c.Error != o.Error || c.RequestID != decisions[id].RequestID {
			t.Errorf("call %s in the store: %d %q, in the ledger %+v", id, c.Status, c.Error, o)
		}
	}
}

// entries reads the ledger, gaps included.
func (s *scene) entries() []recorded {
	t := s.t
	t.Helper()
	r, err := ledger.NewReader(s.dir, ledger.Position{})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	var all []recorded
	for {
		e, err := r.Next()
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		var l recorded
		if err := json.Unmarshal(e.Line, &l); err != nil {
			t.Fatalf("ledger line %s: %v", e.Line, err)
		}
		l.Type = e.Type
		all = append(all, l)
	}
}
