package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
	"github.com/partnerguard/partnerguard/policy"
	"github.com/partnerguard/partnerguard/proxy"
	"github.com/partnerguard/partnerguard/telemetry"
	"github.com/partnerguard/partnerguard/telemetry/ledger"
)

// journal is a ledger in memory: a Position's Offset counts its lines.
type journal struct {
	mu      sync.Mutex
	entries []ledger.Entry
	failAt  int // the read of this line fails once; 0 never
}

func (j *journal) append(typ, members string) {
	j.mu.Lock()
	defer j.mu.Unlock()
	n := len(j.entries) + 1
	j.entries = append(j.entries, ledger.Entry{
		Seq: uint64(n), Type: typ,
		Line: fmt.Appendf(nil, `{"n":%d,"type":%q,%s}`, n, typ, members),
		Next: ledger.Position{Segment: 1, Offset: int64(n)},
	})
}

func (j *journal) decide(r proxy.Record) {
	j.append(ledger.TypeDecision, string(telemetry.AppendDecision(nil, &r, r.Token.UPN)))
}
func (j *journal) end(r proxy.Record) {
	j.append(ledger.TypeOutcome, string(telemetry.AppendOutcome(nil, &r)))
}
func (j *journal) call(r proxy.Record) { j.decide(r); j.end(r) }

// upTo is the journal as it was when it had n lines.
func (j *journal) upTo(n int) *journal { return &journal{entries: j.entries[:n]} }

func (j *journal) open(from ledger.Position) (Source, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if from.Offset > int64(len(j.entries)) {
		return nil, ledger.ErrPosition
	}
	return &cursor{j, from.Offset}, nil
}

type cursor struct {
	j  *journal
	at int64
}

func (c *cursor) Next() (ledger.Entry, error) {
	c.j.mu.Lock()
	defer c.j.mu.Unlock()
	if c.at >= int64(len(c.j.entries)) {
		return ledger.Entry{}, io.EOF
	}
	if c.j.failAt > 0 && c.at == int64(c.j.failAt) {
		c.j.failAt = 0
		return ledger.Entry{}, errors.New("disk trouble")
	}
	c.at++
	e := c.j.entries[c.at-1]
	e.Line = slices.Clone(e.Line)
	return e, nil
}

func (c *cursor) Close() error { return nil }

var start = time.Date(2026, 6, 1, 10, 0, 0, 123456000, time.UTC)

// callAt is the nth sample call, n minutes after start, not yet ended.
func callAt(n int) proxy.Record {
	at := start.Add(time.Duration(n) * time.Minute)
	var id uuid.UUID
	ms := at.UnixMilli()
	for i := range 6 {
		id[i] = byte(ms >> (40 - 8*i))
	}
	id[6], id[8], id[15] = 0x70, 0x80, byte(n)
	return proxy.Record{Decided: proxy.Decided{
		Call: id, Time: at, Method: "GET", Path: "/v1/invoices", Route: "/v1/invoices",
		Integration: "nightly-billing", Owner: "billing@contoso.example",
		Token:    policy.Token{Verified: true, Kind: policy.KindAppUser, MFA: policy.MFAAbsent, AppID: "app-1", UPN: "ref-sam", AMR: []string{"pwd"}},
		Decision: policy.Decision{Effect: policy.Allow, Reason: policy.ReasonMFAMissing, Mode: policy.Audit, WouldReject: true},
	}, Finished: proxy.Finished{Status: 200, Duration: 5 * time.Millisecond}}
}

// openTest opens a store that follows j, and notes its events.
func openTest(t *testing.T, dir string, j *journal, events *[]Event) *Store {
	t.Helper()
	s, err := Open(Config{Dir: dir, Source: j.open, Now: func() time.Time { return start.Add(time.Hour) }, Event: func(e Event) {
		if events != nil {
			*events = append(*events, e)
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func catchUp(t *testing.T, s *Store) int {
	t.Helper()
	n, err := s.CatchUp(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func openReader(t *testing.T, dir string) Reader {
	t.Helper()
	r, err := OpenReader(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

func readCalls(t *testing.T, r Reader, f Filter) []Call {
	t.Helper()
	var calls []Call
	if err := r.Calls(t.Context(), f, func(c Call) error { calls = append(calls, c); return nil }); err != nil {
		t.Fatal(err)
	}
	return calls
}

func readSums(t *testing.T, r Reader) []Sum {
	t.Helper()
	sums, err := r.Sums(t.Context(), time.Time{}, time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	slices.SortFunc(sums, func(a, b Sum) int { return strings.Compare(sumText(a), sumText(b)) })
	return sums
}

func sumText(s Sum) string {
	return fmt.Sprintf("%q %+v %d %v %v", s.Customer, *s.Dim, s.Calls, s.First, s.Last)
}

// saidBy is all that r says: the calls, and what they come to.
func saidBy(t *testing.T, r Reader) string {
	t.Helper()
	customers, err := r.CustomerSums(t.Context(), time.Time{}, time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	var sums []string
	for _, s := range append(readSums(t, r), customers...) {
		sums = append(sums, sumText(s))
	}
	slices.Sort(sums)
	return fmt.Sprintf("%+v\n%s", readCalls(t, r, Filter{}), strings.Join(sums, "\n"))
}

// content is all that a directory's store says.
func content(t *testing.T, dir string) string {
	t.Helper()
	r := openReader(t, dir)
	defer r.Close()
	return saidBy(t, r)
}

// onBothSidesOfTheFold runs a test with calls that are folded as they come, and with
// calls that are not.
func onBothSidesOfTheFold(t *testing.T, name string, run func(t *testing.T, foldAt int)) {
	t.Run(name, func(t *testing.T) { run(t, foldCalls) })
	t.Run(name+", folded", func(t *testing.T) { run(t, 1) })
}

// sample is a journal in which calls overlap.
func sample() *journal {
	j := &journal{}
	j.append(ledger.TypeHeader, `"version":1`)
	for i := range 6 {
		c := callAt(i)
		c.Customer = []string{"", "7d1f0a52-9b3c-4c1e-8f60-2a5b9c0d1e11", "c-1"}[i%3]
		j.decide(c)
		if i > 0 {
			end := callAt(i - 1)
			if i%2 == 0 {
				end.Status, end.Rejection, end.Code = 401, policy.RejectionMFARequired, "900421"
			}
			j.end(end)
		}
	}
	j.append(ledger.TypeGap, `"calls":3,"outcomes":4,"since":"2026-06-01T10:00:00.000000Z","until":"2026-06-01T10:00:01.000000Z","cause":"no space"`)
	j.end(callAt(4)) // once more
	return j
}

func TestAWriteThatFailsIsTriedAgainWhole(t *testing.T) {
	j, dir := sample(), t.TempDir()
	s := openTest(t, dir, j, nil)
	// Another process holds the write lock for longer than the store waits.
	writerOf(s).conn.ExecContext(t.Context(), "PRAGMA busy_timeout = 1")
	other, err := sql.Open("sqlite", dbPath(dir))
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	conn, err := other.Conn(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.ExecContext(t.Context(), "BEGIN IMMEDIATE"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.CatchUp(t.Context()); err == nil {
		t.Fatal("CatchUp succeeded although the database was locked")
	}
	if _, err := conn.ExecContext(t.Context(), "ROLLBACK"); err != nil {
		t.Fatal(err)
	}
	catchUp(t, s)
	whole := t.TempDir()
	catchUp(t, openTest(t, whole, j, nil))
	if diff := cmp.Diff(content(t, whole), content(t, dir)); diff != "" {
		t.Errorf("after a failed write (-want +got):\n%s", diff)
	}
}

func TestADamagedDatabaseIsSetAsideAndRebuilt(t *testing.T) {
	j := sample()
	for i := 10; i < 700; i++ { // enough for damage to have pages to hit
		j.call(callAt(i))
	}
	whole := t.TempDir()
	catchUp(t, openTest(t, whole, j, nil))
	want := content(t, whole)
	tests := []struct {
		name   string
		damage func(t *testing.T, path string)
	}{
		{"not a database at all", func(t *testing.T, path string) {
			if err := os.WriteFile(path, []byte(strings.Repeat("no database ", 1000)), 0o600); err != nil {
				t.Fatal(err)
			}
		}},
		{"a database of something else", func(t *testing.T, path string) {
			os.Remove(path)
			db, err := sql.Open("sqlite", path)
			if err != nil {
				t.Fatal(err)
			}
			defer db.Close()
			if _, err := db.Exec("CREATE TABLE songs (title)"); err != nil {
				t.Fatal(err)
			}
		}},
		{"pages overwritten", func(t *testing.T, path string) {
			f, err := os.OpenFile(path, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			fi, _ := f.Stat()
			if _, err := f.WriteAt(slices.Repeat([]byte{0xa5}, int(fi.Size())-4096), 4096); err != nil {
				t.Fatal(err)
			}
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var events []Event
			dir := t.TempDir()
			s := openTest(t, dir, j.upTo(500), nil)
			catchUp(t, s)
			s.Close()
			tt.damage(t, dbPath(dir))
			s = openTest(t, dir, j, &events)
			for !s.Status().CaughtUp {
				s.CatchUp(t.Context())
			}
			var aside string
			for _, e := range events {
				if e.Kind == Damaged {
					aside = e.Path
				}
			}
			if !strings.HasPrefix(aside, dbPath(dir)+".damaged-") {
				t.Fatalf("events %+v; want one that names the damaged file", events)
			}
			if _, err := os.Stat(aside); err != nil {
				t.Errorf("the damaged database is not kept: %v", err)
			}
			if got := content(t, dir); got != want {
				t.Error("the rebuilt store differs from one that was never damaged")
			}
		})
	}
}

// SQLite would go on in a file that nobody else finds.
func TestADatabaseThatGoesAwayInUseIsBuiltAnew(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("Windows keeps a file that is open where it is")
	}
	for name, away := range map[string]func(path string) error{
		"removed": os.Remove,
		"replaced": func(path string) error {
			other := path + ".other"
			if err := os.WriteFile(other, []byte(strings.Repeat("no database ", 1000)), 0o600); err != nil {
				return err
			}
			return os.Rename(other, path)
		},
	} {
		t.Run(name, func(t *testing.T) {
			var events []Event
			j, dir := sample(), t.TempDir()
			s := openTest(t, dir, j, &events)
			catchUp(t, s)
			want := content(t, dir)
			if err := away(dbPath(dir)); err != nil {
				t.Fatal(err)
			}
			if n, err := s.CatchUp(t.Context()); err != nil || n != len(j.entries) {
				t.Errorf("CatchUp = %d, %v; want all %d records again", n, err, len(j.entries))
			}
			if diff := cmp.Diff(want, content(t, dir)); diff != "" {
				t.Errorf("the new store (-want +got):\n%s", diff)
			}
			told := slices.DeleteFunc(events, func(e Event) bool { return e.Kind == BadRecord }) // of the sample
			if len(told) != 1 || told[0].Kind != Damaged || !errors.Is(told[0].Err, errMoved) {
				t.Errorf("events %+v, want one that tells of the file", events)
			}
		})
	}
}

func TestAStoreOfAnotherLedgerIsRebuilt(t *testing.T) {
	var events []Event
	j, dir := sample(), t.TempDir()
	s := openTest(t, dir, j, nil)
	catchUp(t, s)
	s.Close()
	j2 := &journal{}
	j2.call(callAt(40))
	s = openTest(t, dir, j2, &events)
	for !s.Status().CaughtUp {
		s.CatchUp(t.Context())
	}
	if len(events) == 0 || events[0].Kind != Outdated {
		t.Errorf("events = %+v, want %s", events, Outdated)
	}
	if calls := readCalls(t, openReader(t, dir), Filter{}); len(calls) != 1 || !calls[0].Time.Equal(callAt(40).Time) {
		t.Errorf("calls = %+v, want those of the new ledger only", calls)
	}
}

// A slow consumer, such as a pager, keeps no writer waiting.
func TestAReaderThatIsNotDoneHoldsUpNobody(t *testing.T) {
	j, dir := sample(), t.TempDir()
	s := openTest(t, dir, j, nil)
	catchUp(t, s)
	seen := 0
	err := openReader(t, dir).Calls(t.Context(), Filter{}, func(Call) error {
		seen++
		j.call(callAt(50 + seen))
		if n := catchUp(t, s); n == 0 {
			t.Error("nothing was written while somebody read")
		}
		return nil
	})
	if err != nil || seen == 0 {
		t.Errorf("%d calls read, %v", seen, err)
	}
}

// A writer that dies while its transaction is half in the file leaves it to whoever
// comes next, reader or writer.
func TestWhatAKilledWriterLeftHalfDoneIsUndone(t *testing.T) {
	j, dir := sample(), t.TempDir()
	s := openTest(t, dir, j, nil)
	for i := range 500 {
		j.call(callAt(100 + i))
	}
	catchUp(t, s)
	s.Close()
	want := content(t, dir)

	db, err := openSQLite(dbPath(dir), "rw", 0, "cache_size(1)")
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	tx, err := db.Begin()
	if err == nil {
		_, err = tx.Exec("UPDATE calls SET rest = zeroblob(300)")
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, next := range []string{"reader", "writer"} {
		killed := t.TempDir()
		for _, suffix := range []string{"", "-journal"} {
			data, err := os.ReadFile(dbPath(dir) + suffix)
			if err == nil {
				err = os.WriteFile(dbPath(killed)+suffix, data, 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
			if len(data) < 8192 {
				t.Fatalf("store.db%s has %d bytes: nothing is half done", suffix, len(data))
			}
		}
		if next == "writer" {
			if n := catchUp(t, openTest(t, killed, j, nil)); n != 0 {
				t.Errorf("%d lines were read again", n)
			}
		}
		if diff := cmp.Diff(want, content(t, killed)); diff != "" {
			t.Errorf("after the %s came (-before the transaction +now):\n%s", next, diff)
		}
	}
	tx.Rollback()
}

func TestRebuildReplacesTheDatabaseUnderAReader(t *testing.T) {
	j, dir := sample(), t.TempDir()
	s := openTest(t, dir, j, nil)
	catchUp(t, s)
	want := content(t, dir)
	s.Close()
	r := openReader(t, dir)
	src, _ := j.open(ledger.Position{})
	told := 0
	if err := rebuild(t.Context(), dir, src, func(n int) { told = n }); err != nil {
		t.Fatal(err)
	}
	if told != len(j.entries) {
		t.Errorf("progress ended at %d, want %d", told, len(j.entries))
	}
	if n := len(readCalls(t, r, Filter{})); n == 0 {
		t.Error("a reader from before the rebuild reads nothing")
	}
	if diff := cmp.Diff(want, content(t, dir)); diff != "" {
		t.Errorf("rebuilt store (-followed +rebuilt):\n%s", diff)
	}
	if left, _ := filepath.Glob(dbPath(dir) + ".new*"); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	if n := catchUp(t, openTest(t, dir, j, nil)); n != 0 {
		t.Errorf("after a rebuild %d lines were read again", n)
	}
}

func TestARebuildThatIsStoppedLeavesTheOldDatabase(t *testing.T) {
	j, dir := sample(), t.TempDir()
	s := openTest(t, dir, j, nil)
	catchUp(t, s)
	want := content(t, dir)
	s.Close()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	src, _ := j.open(ledger.Position{})
	if err := rebuild(ctx, dir, src, nil); !errors.Is(err, context.Canceled) {
		t.Fatalf("rebuild = %v, want context.Canceled", err)
	}
	if diff := cmp.Diff(want, content(t, dir)); diff != "" {
		t.Errorf("store after a stopped rebuild (-before +after):\n%s", diff)
	}
}

func TestOpenRefusesWithAWayOut(t *testing.T) {
	hint := func(err error) string {
		var h interface{ Hint() string }
		if errors.As(err, &h) {
			return h.Hint()
		}
		return ""
	}
	t.Run("a newer schema", func(t *testing.T) {
		dir := t.TempDir()
		openTest(t, dir, &journal{}, nil).Close()
		db, err := sql.Open("sqlite", dbPath(dir))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := db.Exec("PRAGMA user_version = 99"); err != nil {
			t.Fatal(err)
		}
		db.Close()
		_, err = Open(Config{Dir: dir})
		if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("its schema has version 99, this program knows %d", schemaVersion)) || hint(err) == "" {
			t.Errorf("Open = %v, hint %q", err, hint(err))
		}
		if _, err := OpenReader(dir); err == nil || hint(err) == "" {
			t.Errorf("OpenReader = %v, hint %q", err, hint(err))
		}
	})
	t.Run("a second writer", func(t *testing.T) {
		dir := t.TempDir()
		openTest(t, dir, &journal{}, nil)
		if _, err := Open(Config{Dir: dir}); err == nil || hint(err) == "" {
			t.Errorf("Open = %v, hint %q", err, hint(err))
		}
		if err := Rebuild(t.Context(), dir, nil); err == nil || hint(err) == "" {
			t.Errorf("Rebuild = %v, hint %q", err, hint(err))
		}
	})
	t.Run("no store to read", func(t *testing.T) {
		if _, err := OpenReader(t.TempDir()); !errors.Is(err, ErrNoStore) || hint(err) == "" {
			t.Errorf("OpenReader = %v, hint %q", err, hint(err))
		}
	})
	t.Run("no directory given", func(t *testing.T) {
		if _, err := Open(Config{}); err == nil {
			t.Error("Open accepts an empty Config")
		}
	})
}

func TestFilesAreForTheOwnerOnly(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("Windows has no permission bits")
	}
	j, dir := sample(), t.TempDir()
	catchUp(t, openTest(t, dir, j, nil))
	files, err := filepath.Glob(filepath.Join(dir, "store*"))
	if err != nil || len(files) < 3 {
		t.Fatalf("files %v, %v; want database, log and lock", files, err)
	}
	for _, f := range files {
		if fi, err := os.Stat(f); err != nil || fi.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v, want 0600", filepath.Base(f), fi.Mode())
		}
	}
}

func TestLag(t *testing.T) {
	j, dir := &journal{}, t.TempDir()
	j.call(callAt(0))
	s := openTest(t, dir, j, nil)
	catchUp(t, s)
	r := openReader(t, dir)
	r.(*sqliteReader).source = j.open
	if lag, err := r.Lag(t.Context()); err != nil || lag != 0 || s.Lag() != 0 {
		t.Errorf("Lag = %v, %v for the reader and %v for the writer when caught up, want 0", lag, err, s.Lag())
	}
	rec := callAt(1)
	rec.Time = time.Now().Add(-10 * time.Second)
	j.decide(rec)
	if lag, err := r.Lag(t.Context()); err != nil || lag < 10*time.Second || lag > time.Minute {
		t.Errorf("Lag = %v, %v with a call of 10 s ago to come", lag, err)
	}
	j.failAt = len(j.entries) - 1
	if _, err := s.CatchUp(t.Context()); err == nil {
		t.Fatal("CatchUp did not fail")
	}
	if lag := s.Lag(); lag < 50*time.Minute { // the newest call in the database began an hour before Now
		t.Errorf("the writer's lag = %v when it does not get on", lag)
	}
}

func TestRetentionRemovesCallsAndHours(t *testing.T) {
	onBothSidesOfTheFold(t, "retention", testRetention)
}

func testRetention(t *testing.T, foldAt int) {
	j, dir := &journal{}, t.TempDir()
	for i := range 2600 { // one a minute: almost two days
		r := callAt(i)
		r.Call[14] = byte(i >> 8)
		r.RequestID = fmt.Sprint("request-", i)
		if i < 60 {
			r.Route = "/v1/old"
		}
		j.call(r)
	}
	now := start.Add(2600 * time.Minute)
	s, err := Open(Config{Dir: dir, Source: j.open, Retention: 6 * time.Hour, Now: func() time.Time { return now }})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	writerOf(s).foldAt = foldAt
	for range 4 {
		now = now.Add(time.Hour) // the time for the next look
		catchUp(t, s)
	}
	oldest := time.UnixMicro(hourOf(now.Add(-6*time.Hour)) * hourMicros).UTC()
	r := openReader(t, dir)
	calls := readCalls(t, r, Filter{})
	var summed int64
	for _, s := range readSums(t, r) {
		summed += s.Calls
		if s.Route == "/v1/old" {
			t.Error("a sum of long ago is left")
		}
	}
	if len(calls) == 0 || int64(len(calls)) != summed || calls[0].Time.Before(oldest) || calls[0].Time.After(oldest.Add(time.Minute)) {
		t.Errorf("%d calls are left from %v on and %d summed; want those since %v", len(calls), calls[0].Time, summed, oldest)
	}
	// What was folded before the oldest call ended may go only with its whole run.
	for query, want := range map[string]int{
		"SELECT count(*) FROM dims": 2, // with the route, and without
		"SELECT count(*) FROM details WHERE detail NOT IN (SELECT detail FROM calls)":             0,
		"SELECT count(*) FROM ids WHERE (run & 0xffffffffffff) < (SELECT min(finish) FROM calls)": 0,
	} {
		var n int
		if err := r.(*sqliteReader).db.QueryRow(query).Scan(&n); err != nil || n != want {
			t.Errorf("%s = %d, %v; want %d", query, n, err, want)
		}
	}
	if got := readCalls(t, r, Filter{RequestID: "request-2599"}); len(got) != 1 {
		t.Errorf("the newest call is found %d times by its request id", len(got))
	}
	j.call(callAt(2601)) // of a sum that is known
	catchUp(t, s)
	if got := readSums(t, r); got[0].Calls != summed+1 {
		t.Errorf("sum = %d after another call, want %d", got[0].Calls, summed+1)
	}
}

// TestManyCallsWithOneID has more calls with an id than come on a page, in several
// runs and behind the fold, and calls between them that have it not.
func TestManyCallsWithOneID(t *testing.T) {
	const n = 2*page + 10
	j, dir := &journal{}, t.TempDir()
	for i := range 2 * n {
		r := callAt(i)
		r.Call[14] = byte(i >> 8)
		if r.CorrelationID = "rare"; i%2 == 0 {
			r.CorrelationID = "same"
		}
		j.call(r)
	}
	s := openTest(t, dir, nil, nil)
	writerOf(s).foldAt = 300
	for at := 0; at < len(j.entries); at += 400 {
		s.source = &cursor{j.upTo(min(at+400, len(j.entries))), int64(at)}
		catchUp(t, s)
	}
	r := openReader(t, dir)
	if writerOf(s).folded == 0 || writerOf(s).pending.calls == 0 {
		t.Fatalf("folded up to %d, %d calls pending; the test wants both", writerOf(s).folded, writerOf(s).pending.calls)
	}
	for _, limit := range []int{0, 1, page, page + 1, n - 1} {
		want := n
		if limit > 0 {
			want = limit
		}
		calls := readCalls(t, r, Filter{CorrelationID: "same", Limit: limit})
		if len(calls) != want || calls[len(calls)-1].Finish != uint64(4*n-2) {
			t.Errorf("limit %d: %d calls, the last at %d", limit, len(calls), calls[len(calls)-1].Finish)
		}
		for _, c := range calls {
			if c.CorrelationID != "same" {
				t.Fatalf("limit %d: a call with correlation id %q", limit, c.CorrelationID)
			}
		}
	}
}

// TestWhatRepeatsIsFoundAgain has the writer forget what it knows of dims.
func TestWhatRepeatsIsFoundAgain(t *testing.T) {
	j, dir := &journal{}, t.TempDir()
	s := openTest(t, dir, j, nil)
	for i := range 6 {
		j.call(callAt(i))
		clear(writerOf(s).dims.known)
		clear(writerOf(s).details.known)
		catchUp(t, s)
	}
	sums := readSums(t, openReader(t, dir))
	if len(sums) != 1 || sums[0].Calls != 6 {
		t.Errorf("sums = %+v, want one of 6 calls", sums)
	}
}

// TestACallThatEndsBehindTheFold has a call interrupted, by its age, after later
// ones were folded.
func TestACallThatEndsBehindTheFold(t *testing.T) {
	j, dir := &journal{}, t.TempDir()
	old := callAt(0)
	old.RequestID = "long ago"
	j.decide(old)
	j.call(callAt(1))
	s := openTest(t, dir, j, nil)
	writerOf(s).foldAt = 1
	catchUp(t, s)
	writerOf(s).foldAt = foldCalls
	j.call(callAt(25 * 60))
	catchUp(t, s)
	r := openReader(t, dir)
	var summed int64
	for _, sum := range readSums(t, r) {
		summed += sum.Calls
	}
	if found := readCalls(t, r, Filter{RequestID: "long ago"}); len(found) != 1 || found[0].Error != Interrupted || summed != 3 {
		t.Errorf("%d calls summed, want 3; the interrupted one: %+v", summed, found)
	}
}
