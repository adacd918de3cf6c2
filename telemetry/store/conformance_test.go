package store

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
	"github.com/partnerguard/partnerguard/internal/pgtest"
	"github.com/partnerguard/partnerguard/policy"
	"github.com/partnerguard/partnerguard/proxy"
	"github.com/partnerguard/partnerguard/telemetry/ledger"
)

// What a store promises, it promises whatever its database is: the tests here run over
// all of them.

var postgresServer pgtest.Shared

func TestMain(m *testing.M) {
	code := m.Run()
	postgresServer.Close()
	os.Exit(code)
}

// shelf is a place where a store is written, by one after the other, and read.
type shelf struct {
	dir    string
	url    string // of PostgreSQL; empty: SQLite
	ledger string
	foldAt int // how many calls are folded at once
}

// eachStore runs a test over SQLite and PostgreSQL, with calls that are not folded and
// with calls that are as they come.
func eachStore(t *testing.T, run func(t *testing.T, newShelf func(testing.TB) *shelf)) {
	t.Run("sqlite", func(t *testing.T) { run(t, func(t testing.TB) *shelf { return sqliteShelf(t, foldCalls) }) })
	t.Run("sqlite, folded", func(t *testing.T) { run(t, func(t testing.TB) *shelf { return sqliteShelf(t, 1) }) })
	t.Run("postgres", func(t *testing.T) {
		postgresServer.Server(t) // or skip
		run(t, postgresShelf)
	})
	t.Run("postgres, folded", func(t *testing.T) {
		postgresServer.Server(t)
		run(t, func(t testing.TB) *shelf {
			s := postgresShelf(t)
			s.foldAt = 1
			return s
		})
	})
}

// eachShelf is eachStore for a test that needs one.
func eachShelf(t *testing.T, run func(t *testing.T, s *shelf)) {
	eachStore(t, func(t *testing.T, newShelf func(testing.TB) *shelf) { run(t, newShelf(t)) })
}

func sqliteShelf(t testing.TB, foldAt int) *shelf { return &shelf{dir: t.TempDir(), foldAt: foldAt} }

var (
	schemas  atomic.Int64
	database = sync.OnceValue(func() *string { return new(string) })
)

// postgresShelf is a schema of its own in the tests' database.
func postgresShelf(t testing.TB) *shelf {
	return &shelf{dir: t.TempDir(), url: inSchema(t, sharedDatabase(t), fmt.Sprint("store_", schemas.Add(1))), ledger: uuid.NewString(), foldAt: foldCalls}
}

// wipe makes the shelf empty. It must not be open.
func (s *shelf) wipe(t testing.TB) {
	t.Helper()
	if s.url == "" {
		s.dir = t.TempDir()
		return
	}
	// A schema of its own would take a second.
	s.ledger = uuid.NewString()
	u, err := url.Parse(s.url)
	if err != nil {
		t.Fatal(err)
	}
	schema := u.Query().Get("search_path")
	var all []string
	for _, table := range tables {
		if table != "fleet" {
			all = append(all, "DELETE FROM "+schema+"."+table)
		}
	}
	postgresServer.Server(t).Exec(t, s.url, strings.Join(all, "; ")+"; UPDATE "+schema+".fleet SET finish = 0")
}

// guard is a shelf for another guard of the same fleet.
func (s *shelf) guard(t testing.TB) *shelf {
	return &shelf{dir: t.TempDir(), url: s.url, ledger: uuid.NewString(), foldAt: s.foldAt}
}

var sharedMu sync.Mutex

func sharedDatabase(t testing.TB) string {
	sharedMu.Lock()
	defer sharedMu.Unlock()
	at := database()
	if *at == "" {
		*at = postgresServer.NewDatabase(t)
	}
	return *at
}

func inSchema(t testing.TB, database, schema string) string {
	u, err := url.Parse(database)
	if err != nil {
		t.Fatal(err)
	}
	q := u.Query()
	q.Set("search_path", schema)
	u.RawQuery = q.Encode()
	return u.String()
}

func (s *shelf) config(j *journal, events *[]Event) Config {
	return Config{
		Dir: s.dir, Postgres: s.url, Ledger: s.ledger, Instance: "guard-1", Version: "test", Source: j.open,
		Now: func() time.Time { return start.Add(time.Hour) },
		Event: func(e Event) {
			if events != nil {
				*events = append(*events, e)
			}
		},
	}
}

// open opens the store to be written, following j.
func (s *shelf) open(t testing.TB, j *journal, events *[]Event) *Store {
	t.Helper()
	st, err := Open(s.config(j, events))
	if err != nil {
		t.Fatal(err)
	}
	switch {
	case s.url == "":
		writerOf(st).foldAt = s.foldAt
	case s.foldAt > 0:
		st.db.(*postgres).foldAt = s.foldAt
	}
	t.Cleanup(func() { st.Close() })
	return st
}

// fill writes all of j.
func (s *shelf) fill(t *testing.T, j *journal) {
	t.Helper()
	st := s.open(t, j, nil)
	catchUp(t, st)
	if err := st.Close(); err != nil {
		t.Fatal(err)
	}
}

func (s *shelf) reader(t testing.TB) Reader {
	t.Helper()
	var r Reader
	var err error
	if s.url == "" {
		r, err = OpenReader(s.dir)
	} else {
		r, err = OpenPostgresReader(t.Context(), s.url)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

// content is all that the store says.
func (s *shelf) content(t *testing.T) string {
	t.Helper()
	r := s.reader(t)
	defer r.Close()
	return saidBy(t, r)
}

func TestARowHoldsEveryFieldOfDecisionAndOutcome(t *testing.T) {
	rec := callAt(0)
	rec.Instance, rec.Generation, rec.Listener, rec.Peer = "guard-1", 7, "main", "192.0.2.7"
	rec.QueryNames, rec.Upstream, rec.Evidence, rec.Customer = []string{"size", "a\"b"}, "partner-center", "app_id", "7d1f0a52-9b3c-4c1e-8f60-2a5b9c0d1e11"
	rec.Token.TenantID, rec.Token.UTI, rec.Token.IssuedAt, rec.Token.ExpiresAt = "tid", "EJwqP017IU6myA1eH3CLAA", 1780996100, 1781000000
	rec.Rule, rec.RequestID, rec.CorrelationID, rec.Application, rec.UserAgent = "invoices first", "rq", "co", "Sched", "curl/8\u202e\x1b[31m"
	rec.Status, rec.Rejection, rec.Code, rec.UpstreamStatus = 401, policy.RejectionMFARequired, "900421", "401 Unauthorized - MFA required"
	rec.MFACompliant, rec.UpstreamRequestID, rec.UpstreamCorrelationID = policy.CompliantFalse, "urq", "uco"
	rec.BytesIn, rec.BytesOut, rec.Duration, rec.UpstreamTime, rec.Replays, rec.Error = 10, 20, 1500*time.Microsecond, time.Millisecond, 1, "client_canceled"
	j := &journal{}
	j.call(rec)
	no := false
	want := []Call{{
		ID: rec.Call.String(),
		Decided: Decided{
			Time: start, Instance: "guard-1", Generation: 7, Listener: "main", Peer: "192.0.2.7", Method: "GET", Route: "/v1/invoices", Path: "/v1/invoices",
			QueryNames: []string{"size", "a\"b"}, Upstream: "partner-center", Integration: "nightly-billing", Evidence: "app_id", Owner: "billing@contoso.example",
			Customer: "7d1f0a52-9b3c-4c1e-8f60-2a5b9c0d1e11", Kind: "app_user", Verified: true, TenantID: "tid", AppID: "app-1", UserRef: "ref-sam",
			UTI: "EJwqP017IU6myA1eH3CLAA", IssuedAt: 1780996100, ExpiresAt: 1781000000, AMR: []string{"pwd"}, MFA: "absent", Mode: "audit", Rule: "invoices first",
			Effect: "allow", Reason: "mfa_missing", WouldReject: true, RequestID: "rq", CorrelationID: "co", Application: "Sched", UserAgent: "curl/8\u202e\x1b[31m",
		},
		Finished: Finished{
			Status: 401, Rejection: "mfa_required", Code: "900421", UpstreamStatus: "401 Unauthorized - MFA required", MFACompliant: &no,
			UpstreamRequestID: "urq", UpstreamCorrelationID: "uco", BytesIn: 10, BytesOut: 20, DurationMS: 1.5, UpstreamMS: 1, Replays: 1, Error: "client_canceled",
		},
	}}
	eachShelf(t, func(t *testing.T, s *shelf) {
		s.fill(t, j)
		got := readCalls(t, s.reader(t), Filter{})
		if len(got) != 1 || got[0].Open() {
			t.Fatalf("got %+v, want one call that ended", got)
		}
		got[0].Finish = 0
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("call read back (-want +got):\n%s", diff)
		}
	})
	want[0].Finish = 1
	for _, part := range []any{want[0], want[0].Decided, want[0].Finished} {
		v := reflect.ValueOf(part)
		for i := range v.NumField() {
			if v.Field(i).IsZero() {
				t.Errorf("the sample leaves %s empty and so does not test it", v.Type().Field(i).Name)
			}
		}
	}
}

func TestEachCallEndsOnce(t *testing.T) {
	a, b := callAt(1), callAt(2)
	cut := b
	cut.Finished = proxy.Finished{Error: Interrupted}
	late := callAt(2 + 25*60)
	tests := []struct {
		name                string
		write               func(*journal)
		ended, open, summed int64
		check               func(calls []Call) string
	}{
		{"decision and outcome are one call", func(j *journal) { j.call(a) }, 1, 0, 1, nil},
		{"a decision without outcome is open, in no sum", func(j *journal) { j.decide(a) }, 0, 1, 0, func(c []Call) string {
			if !c[0].Open() || c[0].Reason != "mfa_missing" {
				return "the open call lacks its decision"
			}
			return ""
		}},
		{"outcomes come in any order", func(j *journal) { j.decide(a); j.decide(b); j.end(b); j.end(a) }, 2, 0, 2, nil},
		{"an interrupted call counts", func(j *journal) { j.decide(b); j.end(cut) }, 1, 0, 1, func(c []Call) string {
			if c[0].Error != Interrupted {
				return "error is " + c[0].Error
			}
			return ""
		}},
		{"a call open for a day is interrupted", func(j *journal) { j.decide(a); j.call(late) }, 2, 0, 2, func(c []Call) string {
			if c[0].Error != Interrupted || c[1].Error != "" {
				return "not the old call is the interrupted one"
			}
			return ""
		}},
		{"an outcome without decision is kept, under no integration", func(j *journal) { j.end(a) }, 1, 0, 1, func(c []Call) string {
			if c[0].Integration != "" || !c[0].Time.Equal(a.Time.Truncate(time.Millisecond)) || c[0].Status != 200 {
				return fmt.Sprintf("got %+v", c[0])
			}
			return ""
		}},
		{"a second outcome in the same batch does not count", func(j *journal) { j.call(a); j.end(a) }, 1, 0, 1, nil},
		{"headers and gaps are no calls", func(j *journal) {
			j.append(ledger.TypeHeader, `"version":1,"time":"2026-06-01T10:00:00.000000Z"`)
			j.append(ledger.TypeGap, `"calls":3,"outcomes":4,"since":"2026-06-01T10:00:00.000000Z","until":"2026-06-01T10:00:01.000000Z","cause":"no space"`)
		}, 0, 0, 0, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			eachShelf(t, func(t *testing.T, place *shelf) {
				j := &journal{}
				tt.write(j)
				s := place.open(t, j, nil)
				catchUp(t, s)
				r := place.reader(t)
				var ended, open, summed int64
				calls := readCalls(t, r, Filter{})
				for _, c := range calls {
					if c.Open() {
						open++
					} else {
						ended++
					}
				}
				for _, s := range readSums(t, r) {
					summed += s.Calls
				}
				if ended != tt.ended || open != tt.open || summed != tt.summed {
					t.Errorf("%d calls ended, %d open, %d in the sums; want %d, %d, %d", ended, open, summed, tt.ended, tt.open, tt.summed)
				}
				if got := s.Status().Open; int64(got) != tt.open {
					t.Errorf("Status().Open = %d, want %d", got, tt.open)
				}
				if tt.check != nil {
					if problem := tt.check(calls); problem != "" {
						t.Error(problem)
					}
				}
			})
		})
	}
}

func TestARestartAnywhereCountsEachLineOnce(t *testing.T) {
	j := sample()
	eachStore(t, func(t *testing.T, newShelf func(testing.TB) *shelf) {
		whole := newShelf(t)
		whole.fill(t, j)
		want := whole.content(t)
		place := whole
		folds := []int{place.foldAt}
		if place.foldAt == 1 {
			folds = []int{1, 2, 3}
		}
		for cut := range len(j.entries) + 1 {
			for _, foldAt := range folds {
				place.wipe(t)
				place.foldAt = foldAt
				s := place.open(t, j.upTo(cut), nil)
				first := catchUp(t, s)
				s.Close()
				s = place.open(t, j, nil)
				second := catchUp(t, s)
				s.Close()
				if first+second != len(j.entries) {
					t.Errorf("restart after line %d: %d + %d lines read, want %d in all", cut, first, second, len(j.entries))
				}
				if diff := cmp.Diff(want, place.content(t)); diff != "" {
					t.Errorf("restart after line %d, %d calls a fold (-without +with):\n%s", cut, foldAt, diff)
				}
			}
		}
	})
}

func TestAFailureInABatchCountsNothingTwice(t *testing.T) {
	j := sample()
	eachStore(t, func(t *testing.T, newShelf func(testing.TB) *shelf) {
		whole := newShelf(t)
		whole.fill(t, j)
		want := whole.content(t)
		place := whole
		for cut := 1; cut < len(j.entries); cut++ {
			var events []Event
			failing := &journal{entries: j.entries, failAt: cut}
			place.wipe(t)
			s := place.open(t, failing, &events)
			if _, err := s.CatchUp(t.Context()); err == nil {
				t.Fatalf("CatchUp does not report that line %d could not be read", cut)
			}
			if s.Status().Err == nil || s.Status().CaughtUp {
				t.Errorf("Status after a failure = %+v", s.Status())
			}
			catchUp(t, s)
			s.Close()
			if diff := cmp.Diff(want, place.content(t)); diff != "" {
				t.Errorf("failure at line %d (-without +with):\n%s", cut, diff)
			}
			var kinds []EventKind
			for _, e := range events {
				if e.Kind != BadRecord {
					kinds = append(kinds, e.Kind)
				}
			}
			if diff := cmp.Diff([]EventKind{Failing, Recovered}, kinds); diff != "" {
				t.Errorf("events (-want +got):\n%s", diff)
			}
		}
	})
}

func TestRecordsThatCannotBeReadAreReportedAndPassedOver(t *testing.T) {
	eachShelf(t, func(t *testing.T, place *shelf) {
		var events []Event
		j := &journal{}
		j.append(ledger.TypeDecision, `"call":17`)
		j.append(ledger.TypeDecision, `"status":200`)
		j.call(callAt(1))
		s := place.open(t, j, &events)
		catchUp(t, s)
		if n := len(readCalls(t, place.reader(t), Filter{})); n != 1 {
			t.Errorf("%d calls, want the good one", n)
		}
		if len(events) != 2 || events[0].Kind != BadRecord || s.Status().BadRecords != 2 {
			t.Errorf("events %+v, bad records %d; want two", events, s.Status().BadRecords)
		}
		if msg := events[0].Err.Error(); msg != "read ledger record 1: no string at byte 32" {
			t.Errorf("event says %q", msg)
		}
	})
}

func TestAReaderBesideTheWriterSeesEachCallOnce(t *testing.T) {
	eachShelf(t, func(t *testing.T, place *shelf) {
		const calls = 400
		j := &journal{}
		s := place.open(t, j, nil)
		catchUp(t, s)
		ctx, stop := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() {
			if err := s.Follow(ctx); err != nil {
				t.Error(err)
			}
		})
		defer wg.Wait()
		defer stop()
		wg.Go(func() {
			for i := range calls {
				r := callAt(i)
				r.Call[14] = byte(i >> 8)
				j.call(r)
				s.Notify()
			}
		})
		r := place.reader(t)
		seen := map[string]int{}
		last := uint64(0)
		deadline := time.Now().Add(20 * time.Second)
		for len(seen) < calls && time.Now().Before(deadline) {
			for _, c := range readCalls(t, r, Filter{AfterFinish: last, EndedOnly: true}) {
				seen[c.ID]++
				last = c.Finish
			}
		}
		if len(seen) != calls {
			t.Errorf("followed %d calls, want %d", len(seen), calls)
		}
		for id, n := range seen {
			if n != 1 {
				t.Errorf("call %s came %d times", id, n)
			}
		}
		if n, err := r.LastFinish(ctx); err != nil || n != last {
			t.Errorf("LastFinish = %d, %v; want %d", n, err, last)
		}
	})
}

func TestGapsAreCounted(t *testing.T) {
	eachShelf(t, func(t *testing.T, place *shelf) {
		catchUp(t, place.open(t, sample(), nil))
		r := place.reader(t)
		if calls, outcomes, err := r.Gaps(t.Context(), start, start.Add(time.Hour)); err != nil || calls != 3 || outcomes != 4 {
			t.Errorf("Gaps = %d, %d, %v; want 3, 4", calls, outcomes, err)
		}
		if calls, _, err := r.Gaps(t.Context(), start.Add(2*time.Hour), time.Time{}); err != nil || calls != 0 {
			t.Errorf("Gaps later = %d, %v; want none", calls, err)
		}
	})
}

func TestFilters(t *testing.T) {
	j := &journal{}
	for i := range 4 {
		r := callAt(i)
		r.RequestID, r.CorrelationID = "8a1f0000-0000-4000-8000-00000000000"+fmt.Sprint(i), "same"
		switch i {
		case 1:
			r.Integration, r.Token.AppID, r.Token.UPN, r.Customer = "crm", "app-2", "ref-kim", "c-1"
			r.Reason = policy.ReasonMFAPresent
		case 2:
			r.Status, r.UpstreamRequestID, r.UpstreamCorrelationID = 401, "msft-7", "msft-c"
		case 3:
			r.Status = 404
		}
		j.call(r)
	}
	open := callAt(4)
	open.Integration, open.CorrelationID = "crm", "other"
	j.decide(open)
	first := callAt(0).Call.String()
	const second = 1 << 40 // stands for the Finish of the second call
	tests := []struct {
		name string
		f    Filter
		want string // minutes of the calls
	}{
		{"nothing", Filter{}, "0 1 2 3 4"},
		{"ended only", Filter{EndedOnly: true}, "0 1 2 3"},
		{"since", Filter{Since: callAt(2).Time}, "2 3 4"},
		{"since just after", Filter{Since: callAt(2).Time.Add(1)}, "3 4"},
		{"until", Filter{Until: callAt(2).Time}, "0 1"},
		{"until just after", Filter{Until: callAt(2).Time.Add(1)}, "0 1 2"},
		{"since another hour", Filter{Since: start.Add(3 * time.Hour)}, ""},
		{"until an hour before", Filter{Until: start.Add(-3 * time.Hour)}, ""},
		{"integration", Filter{Integration: "crm"}, "1 4"},
		{"integration and time", Filter{Integration: "nightly-billing", Since: callAt(1).Time, Until: callAt(3).Time}, "2"},
		{"user by reference", Filter{User: "ref-kim"}, "1"},
		{"app, in any case", Filter{App: "APP-2"}, "1"},
		{"customer", Filter{Customer: "C-1"}, "1"},
		{"reason", Filter{Reason: "mfa_present"}, "1"},
		{"status", Filter{Status: "404"}, "3"},
		{"class of status", Filter{Status: "4xx"}, "2 3"},
		{"call", Filter{Call: strings.ToUpper(first)}, "0"},
		{"request id, in any case", Filter{RequestID: "8A1F0000-0000-4000-8000-000000000003"}, "3"},
		{"Microsoft's request id", Filter{RequestID: "msft-7"}, "2"},
		{"correlation id", Filter{CorrelationID: "same"}, "0 1 2 3"},
		{"correlation id of an open call", Filter{CorrelationID: "other"}, "4"},
		{"Microsoft's correlation id", Filter{CorrelationID: "msft-c"}, "2"},
		{"a correlation id is no request id", Filter{RequestID: "same"}, ""},
		{"the latest two", Filter{Limit: 2}, "2 3 4"},
		{"the latest two that ended", Filter{Limit: 2, EndedOnly: true}, "2 3"},
		{"more than there are", Filter{Limit: 9, EndedOnly: true}, "0 1 2 3"},
		{"after a finish", Filter{AfterFinish: second, EndedOnly: true}, "2 3"},
		{"the first after a finish", Filter{AfterFinish: second, Limit: 1, EndedOnly: true}, "2"},
		{"hostile text", Filter{Integration: "' OR 1=1 --"}, ""},
	}
	eachShelf(t, func(t *testing.T, place *shelf) {
		for n := range j.entries { // with SQLite: a fold a call
			place.fill(t, j.upTo(n+1))
		}
		r := place.reader(t)
		afterTwo := readCalls(t, r, Filter{})[1].Finish
		for _, tt := range tests {
			if tt.f.AfterFinish == second {
				tt.f.AfterFinish = afterTwo
			}
			var got []string
			for _, c := range readCalls(t, r, tt.f) {
				got = append(got, fmt.Sprint(int(c.Time.Sub(start).Minutes())))
			}
			if strings.Join(got, " ") != tt.want {
				t.Errorf("%s: got calls %q, want %q", tt.name, strings.Join(got, " "), tt.want)
			}
		}
		if err := r.Calls(t.Context(), Filter{Status: "teapot"}, nil); err == nil || err.Error() != `status "teapot" is not known; write one such as 401, or a class such as 4xx` {
			t.Errorf("bad status: %v", err)
		}
		stop := errors.New("stop")
		if err := r.Calls(t.Context(), Filter{}, func(Call) error { return stop }); err != stop {
			t.Errorf("Calls = %v, want the error of yield", err)
		}
	})
}

func TestCallsComePageByPage(t *testing.T) {
	const n = 2*page + 10
	j := &journal{}
	for i := range n {
		r := callAt(i)
		r.Call[14] = byte(i >> 8)
		j.call(r)
	}
	j.decide(callAt(9000))
	eachShelf(t, func(t *testing.T, place *shelf) {
		place.fill(t, j)
		testPages(t, place.reader(t), n)
	})
}

func testPages(t *testing.T, r Reader, n int) {
	last, err := r.LastFinish(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ limit, want int }{{0, n + 1}, {page, page + 1}, {2 * page, 2*page + 1}, {page + 1, page + 2}, {n, n + 1}} {
		got := readCalls(t, r, Filter{Limit: tt.limit})
		if len(got) != tt.want || !got[len(got)-1].Open() {
			t.Errorf("limit %d: %d calls, want %d, the open one last", tt.limit, len(got), tt.want)
		}
		ended := got[:len(got)-1]
		if !slices.IsSortedFunc(ended, func(a, b Call) int { return int(a.Finish) - int(b.Finish) }) || ended[len(ended)-1].Finish != last {
			t.Errorf("limit %d: not the latest, in order", tt.limit)
		}
	}
}

func TestIDsAreKeptAsTheyCame(t *testing.T) {
	j := &journal{}
	type pair struct{ client, microsoft string }
	var sent []pair
	for _, id := range []string{
		"", "x", "8a1f0000-0000-4000-8000-00000000000a", "8B1F0000-0000-4000-8000-00000000000A", "8a1f0000-0000-4000-8000-00000000000g",
		"8a1f0000000040008000000000000000", "{8a1f0000-0000-4000-8000-000000000000}", "8a1f0000-0000-4000-8000-0000000000\u00e9", strings.Repeat("9", 128), strings.Repeat("\u00e9", 3000),
	} {
		for _, client := range []string{"", id, "other"} {
			r := callAt(len(sent))
			r.RequestID, r.UpstreamRequestID = client, id
			r.CorrelationID, r.UpstreamCorrelationID = id, client
			j.call(r)
			sent = append(sent, pair{client, id})
		}
	}
	eachShelf(t, func(t *testing.T, place *shelf) {
		place.fill(t, j)
		r := place.reader(t)
		got := readCalls(t, r, Filter{})
		if len(got) != len(sent) {
			t.Fatalf("%d calls, want %d", len(got), len(sent))
		}
		for i, want := range sent {
			c := got[i]
			// Where the client sends none, the call's goes out.
			if diff := cmp.Diff([]string{orElse(want.client, c.ID), want.microsoft, orElse(want.microsoft, c.ID), want.client}, []string{c.RequestID, c.UpstreamRequestID, c.CorrelationID, c.UpstreamCorrelationID}); diff != "" {
				t.Errorf("ids of call %d (-want +got):\n%s", i, diff)
			}
			if want.microsoft == "" {
				continue
			}
			upper := strings.ReplaceAll(strings.ToUpper(want.microsoft), "\u00c9", "\u00e9") // beyond ASCII, case counts
			for name, f := range map[string]Filter{"request": {RequestID: upper}, "correlation": {CorrelationID: upper}} {
				if found := readCalls(t, r, f); len(found) != 3 {
					t.Errorf("%d calls with %s id %.50q, want 3", len(found), name, upper)
				}
			}
		}
	})
}

func orElse(id, own string) string {
	if id == "" {
		return own
	}
	return id
}
