package ledger

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
	"github.com/partnerguard/partnerguard/policy"
	"github.com/partnerguard/partnerguard/proxy"
)

// writerDir makes the test binary a process that writes until it is killed.
const writerDir = "LEDGER_TEST_WRITE_UNTIL_KILLED"

func TestMain(m *testing.M) {
	if dir := os.Getenv(writerDir); dir != "" {
		writeUntilKilled(dir)
	}
	os.Exit(m.Run())
}

func TestDecisionsAndOutcomesAreReadBackInOrder(t *testing.T) {
	dir := t.TempDir()
	l := mustOpen(t, Config{Dir: dir, Instance: "guard-1"})
	a, b := record(), record()
	decide(t, l, a)
	decide(t, l, b)
	finish(t, l, b)
	finish(t, l, a)
	mustClose(t, l)

	want := []string{"header", "decision " + a.Call.String(), "decision " + b.Call.String(),
		"outcome " + b.Call.String() + " 200", "outcome " + a.Call.String() + " 200"}
	if diff := cmp.Diff(want, summary(readAll(t, dir))); diff != "" {
		t.Errorf("ledger (-want +got):\n%s", diff)
	}
	rep := mustVerify(t, dir)
	if rep.Decisions != 2 || rep.Outcomes != 2 || rep.Segments != 1 || rep.Last != 10 {
		t.Errorf("Verify = %+v, want 2 decisions, 2 outcomes, 1 segment, last 10", rep)
	}
	for name, want := range map[string]os.FileMode{"ledger": 0o700, "ledger/000000000001.jsonl": 0o600, "lock": 0o600, "identities.key": 0o600, "identities.jsonl": 0o600} {
		if fi, err := os.Stat(filepath.Join(dir, name)); err != nil || fi.Mode().Perm() != want {
			t.Errorf("%s has mode %v, %v, want %v", name, fi.Mode().Perm(), err, want)
		}
	}
}

func TestConcurrentCallsShareOneChain(t *testing.T) {
	dir := t.TempDir()
	l := mustOpen(t, Config{Dir: dir, SegmentBytes: 64 << 10})
	const workers, calls = 64, 30
	ids := make([][]proxy.CallID, workers)
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for range calls {
				rec := record()
				if err := l.Decide(rec); err != nil {
					t.Errorf("Decide: %v", err)
				}
				ids[w] = append(ids[w], rec.Call)
				if err := l.Finish(rec); err != nil {
					t.Errorf("Finish: %v", err)
				}
			}
		})
	}
	wg.Wait()
	mustClose(t, l)

	decided, ended := count(readAll(t, dir))
	for _, id := range slices.Concat(ids...) {
		if decided[id] != 1 || ended[id] != 1 {
			t.Errorf("call %v has %d decisions and %d outcomes", id, decided[id], ended[id])
		}
	}
	rep := mustVerify(t, dir)
	if rep.Decisions != workers*calls || rep.Outcomes != workers*calls || rep.Segments < 3 {
		t.Errorf("Verify = %+v, want %d of each and several segments", rep, workers*calls)
	}
	if s := l.Status(); s.Seq != rep.Last || s.LostCalls != 0 || len(l.open) != 0 {
		t.Errorf("Status = %+v with %d open calls, want sequence %d and nothing lost", s, len(l.open), rep.Last)
	}
}

// A reader that keeps up with a writer sees every record once, across segments,
// and ends where Tail says.
func TestReaderFollowsALiveWriterAcrossSegments(t *testing.T) {
	dir := t.TempDir()
	l := mustOpen(t, Config{Dir: dir, SegmentBytes: 8 << 10})
	const calls = 600
	var done atomic.Bool
	go func() {
		defer done.Store(true)
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				for range calls / 4 {
					rec := record()
					l.Decide(rec)
					l.Finish(rec)
				}
			})
		}
		wg.Wait()
	}()

	var r *Reader
	var at Position
	var got []Entry
	for opened := 0; ; {
		if r == nil {
			var err error
			if r, err = NewReader(dir, at); err != nil {
				t.Fatal(err)
			}
			opened++
		}
		ended := done.Load()
		e, err := r.Next()
		switch {
		case err == nil:
			e.Line = slices.Clone(e.Line)
			got = append(got, e)
			at = e.Next
			if len(got)%100 == 0 && opened < 12 { // as after a restart
				r.Close()
				r = nil
			}
			continue
		case !errors.Is(err, io.EOF):
			t.Fatal(err)
		case !ended:
			continue
		}
		break
	}
	defer r.Close()
	decided, outcomes := count(got)
	if len(decided) != calls || len(outcomes) != calls {
		t.Errorf("saw %d decisions and %d outcomes, want %d", len(decided), len(outcomes), calls)
	}
	for i := 1; i < len(got); i++ {
		if got[i].Seq <= got[i-1].Seq || got[i].Seq > got[i-1].Seq+2 {
			t.Fatalf("record %d follows %d", got[i].Seq, got[i-1].Seq)
		}
	}
	tail, when, err := Tail(dir)
	if err != nil || tail != at || time.Since(when) > time.Minute {
		t.Errorf("Tail = %+v, %v, %v; the reader stands at %+v", tail, when, err, at)
	}
	mustClose(t, l)
	if rep := mustVerify(t, dir); rep.Segments < 10 {
		t.Errorf("%d segments only", rep.Segments)
	}
}

func TestReaderPositions(t *testing.T) {
	dir := t.TempDir()
	empty, err := NewReader(dir, Position{})
	if err != nil {
		t.Fatal(err)
	}
	defer empty.Close()
	if _, err := empty.Next(); !errors.Is(err, io.EOF) {
		t.Errorf("Next of no ledger = %v, want EOF", err)
	}
	l := mustOpen(t, Config{Dir: dir})
	decide(t, l, record())
	if e, err := empty.Next(); err != nil || e.Type != TypeHeader {
		t.Errorf("Next once there is a ledger = %v, %v, want the header", e.Type, err)
	}
	tail, _, err := Tail(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, beyond := range []Position{{tail.Segment, tail.Offset + 1}, {tail.Segment + 1, 0}} {
		if _, err := NewReader(dir, beyond); !errors.Is(err, ErrPosition) {
			t.Errorf("NewReader(%+v) = %v, want ErrPosition", beyond, err)
		}
	}
	mustClose(t, l)
}

func TestReaderPassesOverADamagedGroup(t *testing.T) {
	dir := t.TempDir()
	l := mustOpen(t, Config{Dir: dir})
	recs := []*proxy.Record{record(), record(), record()}
	for _, rec := range recs {
		decide(t, l, rec)
	}
	mustClose(t, l)
	edit(t, dir, 1, func(lines []string) []string { // header commit a commit b commit c commit
		lines[4] = strings.Replace(lines[4], `"type"`, `"tXpe"`, 1)
		return lines
	})
	r, err := NewReader(dir, Position{})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	var got []string
	for {
		e, err := r.Next()
		var d *DamageError
		if errors.As(err, &d) {
			got = append(got, "damage")
			continue
		}
		if err != nil {
			break
		}
		got = append(got, summary([]Entry{e})...)
	}
	want := []string{"header", "decision " + recs[0].Call.String(), "damage", "decision " + recs[2].Call.String()}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("read (-want +got):\n%s", diff)
	}
}

func TestASecondWriterIsRefused(t *testing.T) {
	dir := t.TempDir()
	l := mustOpen(t, Config{Dir: dir})
	if _, err := Open(Config{Dir: dir, MinFree: -1}); !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), dir) {
		t.Errorf("second Open = %v, want ErrLocked with the directory", err)
	}
	mustClose(t, l)
	mustClose(t, mustOpen(t, Config{Dir: dir}))
}

func TestACleanSegmentIsGoneOnWith(t *testing.T) {
	dir := t.TempDir()
	for range 3 {
		l := mustOpen(t, Config{Dir: dir})
		rec := record()
		decide(t, l, rec)
		finish(t, l, rec)
		mustClose(t, l)
	}
	if rep := mustVerify(t, dir); rep.Segments != 1 || rep.Decisions != 3 {
		t.Errorf("Verify = %+v, want one segment with 3 decisions", rep)
	}
	l := mustOpen(t, Config{Dir: dir, Instance: "another"})
	mustClose(t, l)
	if rep := mustVerify(t, dir); rep.Segments != 2 {
		t.Errorf("another instance goes on in the same segment: %+v", rep)
	}
}

func TestOpenCallsAreInterruptedByTheNextStart(t *testing.T) {
	dir := t.TempDir()
	l := mustOpen(t, Config{Dir: dir, SegmentBytes: 1}) // each commit in its own segment
	a, b, c := record(), record(), record()
	decide(t, l, a)
	decide(t, l, b)
	decide(t, l, c)
	finish(t, l, b)
	mustClose(t, l)
	l = mustOpen(t, Config{Dir: dir})
	mustClose(t, l)
	mustVerify(t, dir)
	got := summary(readAll(t, dir))
	want := []string{"outcome " + a.Call.String() + " interrupted", "outcome " + c.Call.String() + " interrupted"}
	if diff := cmp.Diff(want, got[len(got)-2:]); diff != "" {
		t.Errorf("last records (-want +got):\n%s", diff)
	}
	before := len(got)
	mustClose(t, mustOpen(t, Config{Dir: dir}))
	if got := summary(readAll(t, dir)); len(got) != before {
		t.Errorf("another start adds %v", got[before:])
	}
}

// After a write was cut short the next start leaves the rest where it is, goes on
// in a new segment, and the chain holds.
func TestATornEndIsLeftAndSkipped(t *testing.T) {
	for _, torn := range []string{
		`{"n":7,"type":"deci`,
		`{"n":7,"type":"decision","call":"00000000-0000-4000-8000-000000000000"}` + "\n",
		`{"n":7,"type":"decision","call":"00000000-0000-4000-8000-000000000000"}` + "\n" + `{"n":8,"type":"commit","hash":"xyz`,
		"\x00\x00\x00\x00\x00\x00", // blocks allocated but never filled
		"\x00\x00\x00\n\x00\x00",
	} {
		t.Run(fmt.Sprintf("%.30q", torn), func(t *testing.T) {
			dir := t.TempDir()
			l := mustOpen(t, Config{Dir: dir})
			rec := record()
			decide(t, l, rec)
			finish(t, l, rec)
			mustClose(t, l)
			appendFile(t, dir, 1, torn)
			if rep := mustVerify(t, dir); len(rep.Torn) != 1 || rep.Torn[0].Bytes != int64(len(torn)) {
				t.Errorf("Verify before the start = %+v, want %d torn bytes", rep, len(torn))
			}
			l = mustOpen(t, Config{Dir: dir})
			again := record()
			decide(t, l, again)
			finish(t, l, again)
			if s := l.Status(); s.Degraded {
				t.Errorf("Status = %+v, want no complaint", s)
			}
			mustClose(t, l)
			rep := mustVerify(t, dir)
			if diff := cmp.Diff([]Torn{{"000000000001.jsonl", int64(len(torn))}}, rep.Torn); diff != "" || rep.Segments != 2 {
				t.Errorf("Verify = %+v, torn (-want +got):\n%s", rep, diff)
			}
			decided, _ := count(readAll(t, dir))
			if len(decided) != 2 || decided[rec.Call] != 1 || decided[again.Call] != 1 {
				t.Errorf("decisions = %v, want the two", decided)
			}
			// Verify accepts exactly what the header says.
			appendFile(t, dir, 1, "x")
			if rep := verify(t, dir); rep.Problem == nil || rep.Problem.Segment != "000000000001.jsonl" {
				t.Errorf("Verify with one byte more = %v, want a problem in the first segment", rep.Problem)
			}
		})
	}
}

func TestADamagedSegmentIsSetAside(t *testing.T) {
	for name, damage := range map[string]func([]string) []string{
		"a changed byte": func(l []string) []string {
			l[2] = strings.Replace(l[2], `"GET"`, `"PUT"`, 1)
			return l
		},
		"NUL bytes": func(l []string) []string {
			l[2] = strings.Repeat("\x00", len(l[2]))
			return l
		},
		"a bad header": func(l []string) []string {
			l[0] = "{}"
			return l
		},
		"nothing in it": func(l []string) []string { return nil },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			l := mustOpen(t, Config{Dir: dir})
			first := record()
			decide(t, l, first)
			finish(t, l, first)
			mustClose(t, l)
			l = mustOpen(t, Config{Dir: dir, Instance: "two"}) // in a second segment
			for range 3 {
				decide(t, l, record())
			}
			mustClose(t, l)
			edit(t, dir, 2, damage)

			var events log
			l = mustOpen(t, Config{Dir: dir, Instance: "two", Event: events.add})
			rec := record()
			decide(t, l, rec)
			s := l.Status()
			if !s.Healthy || !s.Degraded || len(s.SetAside) != 1 || !strings.HasPrefix(s.SetAside[0], "000000000002.jsonl.damaged-") {
				t.Errorf("Status = %+v, want the second segment set aside", s)
			}
			mustClose(t, l)
			if e := events.find(EventSetAside); e == nil || len(s.SetAside) == 1 && e.Segment != s.SetAside[0] {
				t.Errorf("events = %v, want %s", events.kinds(), EventSetAside)
			}
			if _, err := os.Stat(filepath.Join(dir, "ledger", s.SetAside[0])); err != nil {
				t.Error(err)
			}
			rep := mustVerify(t, dir)
			if diff := cmp.Diff(s.SetAside, rep.SetAside); diff != "" || rep.Segments != 2 {
				t.Errorf("Verify = %+v; set aside (-want +got):\n%s", rep, diff)
			}
			decided, _ := count(readAll(t, dir))
			if decided[first.Call] != 1 || decided[rec.Call] != 1 {
				t.Errorf("decisions = %v, want those of the first and the third segment", decided)
			}
			// The next start has nothing to complain about.
			l = mustOpen(t, Config{Dir: dir, Instance: "two"})
			if s := l.Status(); s.Degraded {
				t.Errorf("Status = %+v, want no complaint", s)
			}
			mustClose(t, l)
			mustVerify(t, dir)
		})
	}
}

func TestAnotherFormatIsNotTouched(t *testing.T) {
	for version, newer := range map[string]bool{"1": false, "3": true} {
		dir := t.TempDir()
		mustClose(t, mustOpen(t, Config{Dir: dir}))
		edit(t, dir, 1, func(l []string) []string {
			l[0] = strings.Replace(l[0], `"version":2`, `"version":`+version, 1)
			return l
		})
		is := func(what string, err error) {
			t.Helper()
			var format *FormatError
			if !errors.As(err, &format) || format.Newer() != newer || fmt.Sprint(format.Version) != version || format.Segment != "000000000001.jsonl" {
				t.Errorf("%s of format %s = %v, want a FormatError", what, version, err)
			}
		}
		_, err := Open(Config{Dir: dir, MinFree: -1})
		is("Open", err)
		_, err = Verify(dir, VerifyOptions{})
		is("Verify", err)
		_, err = ID(dir)
		is("ID", err)
		r, err := NewReader(dir, Position{})
		if err != nil {
			t.Fatal(err)
		}
		for range 2 {
			_, err = r.Next()
			is("Next", err)
		}
		r.Close()
		if nums, _ := segments(dir); len(nums) != 1 {
			t.Errorf("segments = %v, want the one left alone", nums)
		}
	}
}

func TestVerifyNamesTheFirstBadRecord(t *testing.T) {
	// Three segments; in each: header, commit, then three times decision, commit,
	// outcome, commit.
	build := func(t *testing.T) string {
		dir := t.TempDir()
		for i := range 3 {
			l := mustOpen(t, Config{Dir: dir, Instance: fmt.Sprint(i)})
			for range 3 {
				rec := record()
				decide(t, l, rec)
				finish(t, l, rec)
			}
			mustClose(t, l)
		}
		return dir
	}
	type place struct {
		segment string
		line    int
	}
	swap := func(i, j int) func([]string) []string {
		return func(l []string) []string { l[i], l[j] = l[j], l[i]; return l }
	}
	for _, tt := range []struct {
		name    string
		segment uint64
		edit    func([]string) []string
		want    place
		what    string
	}{
		{"a changed value", 2, func(l []string) []string { l[6] = strings.Replace(l[6], "GET", "PUT", 1); return l }, place{"000000000002.jsonl", 7}, "hash differs"},
		{"broken JSON", 2, func(l []string) []string { l[6] = strings.Replace(l[6], `"GET"`, `"GET`, 1); return l }, place{"000000000002.jsonl", 7}, "not valid JSON"},
		{"no record at all", 2, func(l []string) []string { l[4] = "garbage"; return l }, place{"000000000002.jsonl", 5}, "not a record"},
		{"a deleted line", 2, func(l []string) []string { return slices.Delete(l, 4, 5) }, place{"000000000002.jsonl", 5}, "belongs"},
		{"a deleted group", 2, func(l []string) []string { return slices.Delete(l, 4, 6) }, place{"000000000002.jsonl", 5}, "belongs"},
		{"a repeated line", 2, func(l []string) []string { return slices.Insert(l, 4, l[4]) }, place{"000000000002.jsonl", 6}, "belongs"},
		{"two lines in the wrong order", 2, swap(2, 4), place{"000000000002.jsonl", 3}, "belongs"},
		{"a changed commit", 2, func(l []string) []string { l[5] = strings.Replace(l[5], `"check":"`, `"check":"A`, 1); return l }, place{"000000000002.jsonl", 6}, "commit"},
		{"a cut tail at a commit", 2, func(l []string) []string { return l[:len(l)-2] }, place{"000000000002.jsonl", -1}, "end of the segment is missing"},
		{"a cut tail in a group", 2, func(l []string) []string { return l[:len(l)-1] }, place{"000000000002.jsonl", -1}, "end of the segment is missing"},
		{"a changed header", 3, func(l []string) []string {
			l[0] = strings.Replace(l[0], `"instance":"2"`, `"instance":"x"`, 1)
			return l
		}, place{"000000000003.jsonl", 1}, "hash differs"},
		{"a missing middle segment", 2, nil, place{"000000000003.jsonl", 1}, "missing"},
		{"a change in the last commit", 3, func(l []string) []string {
			l[len(l)-1] = strings.Replace(l[len(l)-1], "commit", "comXit", 1)
			return l
		}, place{"000000000003.jsonl", -1}, "not a record"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := build(t)
			mustVerify(t, dir)
			if tt.edit == nil {
				if err := os.Remove(segmentPath(dir, tt.segment)); err != nil {
					t.Fatal(err)
				}
			} else {
				edit(t, dir, tt.segment, tt.edit)
			}
			p := verify(t, dir).Problem
			if p == nil {
				t.Fatal("Verify finds nothing")
			}
			if p.Segment != tt.want.segment || tt.want.line >= 0 && p.Line != tt.want.line || !strings.Contains(p.What, tt.what) || p.Seq == 0 {
				t.Errorf("Verify names %v, want %v: …%s…", p, tt.want, tt.what)
			}
		})
	}
}

func TestVerifyShowsProgress(t *testing.T) {
	dir := t.TempDir()
	l := mustOpen(t, Config{Dir: dir})
	rec := record()
	rec.Path = strings.Repeat("x", 64<<10)
	for range 40 {
		rec.Call = uuid.Must(uuid.NewV7())
		decide(t, l, rec)
	}
	mustClose(t, l)
	var shown []int64
	if _, err := Verify(dir, VerifyOptions{Progress: func(done, total int64) { shown = append(shown, done*100/total) }}); err != nil {
		t.Fatal(err)
	}
	if len(shown) < 2 || !slices.IsSorted(shown) {
		t.Errorf("progress = %v, want several steps upwards", shown)
	}
}

func TestKillNineLosesNothingThatWasAcknowledged(t *testing.T) {
	dir := t.TempDir()
	acked := map[string]bool{}
	for round := range 10 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), writerDir+"="+dir)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		in := bufio.NewReader(out)
		for n := 1; ; n++ {
			line, err := in.ReadString('\n')
			if err != nil {
				break // only what is behind a line feed was acknowledged
			}
			acked[strings.TrimSpace(line)] = true
			if n == 40+37*round {
				if err := cmd.Process.Kill(); err != nil {
					t.Fatal(err)
				}
			}
		}
		cmd.Wait()
		mustVerify(t, dir)
	}
	mustClose(t, mustOpen(t, Config{Dir: dir})) // interrupts what the last one left
	rep := mustVerify(t, dir)
	decided, ended := count(readAll(t, dir))
	for id := range acked {
		if n := decided[uuid.MustParse(id)]; n != 1 {
			t.Errorf("call %s was acknowledged and stands %d times", id, n)
		}
	}
	for id, n := range decided {
		if n != 1 || ended[id] != 1 {
			t.Errorf("call %s has %d decisions and %d outcomes", id, n, ended[id])
		}
	}
	for id := range ended {
		if decided[id] != 1 {
			t.Errorf("call %s has an outcome but %d decisions", id, decided[id])
		}
	}
	if len(acked) < 10*40 || rep.Segments < 10 {
		t.Errorf("%d calls in %d segments acknowledged; the test tests little", len(acked), rep.Segments)
	}
	t.Logf("%d acknowledged, %d recorded, %d segments, torn %v", len(acked), len(decided), rep.Segments, rep.Torn)
}

func writeUntilKilled(dir string) {
	l, err := Open(Config{Dir: dir, MinFree: -1, SegmentBytes: 32 << 10})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	for range 8 {
		go func() {
			for {
				rec := record()
				if err := l.Decide(rec); err != nil {
					fmt.Fprintln(os.Stderr, err)
					os.Exit(1)
				}
				fmt.Println(rec.Call)
				l.Finish(rec)
			}
		}()
	}
	select {}
}

func TestWholeSegmentsAreRemovedAfterRetention(t *testing.T) {
	dir := t.TempDir()
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	for day := range 6 { // the days 1 to 6, a segment each
		at := now.AddDate(0, 0, day)
		l := mustOpen(t, Config{Dir: dir, Now: func() time.Time { return at }, Retention: -1})
		rec := record()
		decide(t, l, rec)
		finish(t, l, rec)
		mustClose(t, l)
	}
	if rep := mustVerify(t, dir); rep.Segments != 6 {
		t.Fatalf("%d segments, want one a day", rep.Segments)
	}
	stale, err := NewReader(dir, Position{Segment: 2, Offset: 10})
	if err != nil {
		t.Fatal(err)
	}
	stale.Close()

	// On day 6, what ended before day 4, 00:00, goes: the days 1 and 2. Day 3 ends
	// when day 4 begins at 12:00.
	gone, err := Prune(dir, now.AddDate(0, 0, 3).Add(-12*time.Hour))
	if diff := cmp.Diff([]string{"000000000001.jsonl", "000000000002.jsonl"}, gone); err != nil || diff != "" {
		t.Errorf("Prune: %v, (-want +got):\n%s", err, diff)
	}
	if rep := mustVerify(t, dir); rep.Segments != 4 || rep.First == 1 {
		t.Errorf("Verify = %+v, want 4 segments", rep)
	}
	r, err := NewReader(dir, Position{Segment: 2, Offset: 10})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if e, err := r.Next(); err != nil || e.Type != TypeHeader || e.Next.Segment != 3 {
		t.Errorf("Next of a removed position = %+v, %v, want the header of segment 3", e, err)
	}

	// A running ledger does it by itself; what ended just now stays.
	fs := &faulty{}
	removed := fs.onRemove()
	at := now.AddDate(1, 0, 0)
	l, err := open(Config{Dir: dir, Now: func() time.Time { return at }, SyncEvery: time.Millisecond, MinFree: -1}, fs, fast)
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		<-removed
	}
	mustClose(t, l)
	if rep := mustVerify(t, dir); rep.Segments != 2 {
		t.Errorf("Verify = %+v, want the new segment and the one before, which ended with its beginning", rep)
	}
}

func TestANewDayBeginsANewSegment(t *testing.T) {
	dir := t.TempDir()
	var now atomic.Int64
	now.Store(time.Date(2026, 3, 1, 23, 59, 59, 0, time.UTC).Unix())
	l := mustOpen(t, Config{Dir: dir, Now: func() time.Time { return time.Unix(now.Load(), 0) }, Retention: -1})
	decide(t, l, record())
	decide(t, l, record())
	now.Add(1)
	decide(t, l, record())
	mustClose(t, l)
	if rep := mustVerify(t, dir); rep.Segments != 2 || rep.Decisions != 3 {
		t.Errorf("Verify = %+v, want 2 segments", rep)
	}
}

func TestIdentitiesStandOutsideTheChain(t *testing.T) {
	dir := t.TempDir()
	l := mustOpen(t, Config{Dir: dir})
	anna := policy.Token{Verified: true, Kind: policy.KindAppUser, TenantID: "t1", ObjectID: "o1", UPN: "svc-billing@contoso.example"}
	elsewhere := anna
	elsewhere.TenantID = "t2"
	renamed := anna
	renamed.UPN = "anna.b@contoso.example"
	claimed := policy.Token{Kind: policy.KindAppUser, TenantID: "t1", ObjectID: "o3", UPN: "forged@contoso.example"}
	app := policy.Token{Verified: true, Kind: policy.KindAppOnly, TenantID: "t1", ObjectID: "sp"}

	ref := l.UserRef(&anna)
	if len(ref) != 22 || l.UserRef(&anna) != ref || l.UserRef(&renamed) != ref {
		t.Errorf("UserRef = %q, %q, %q, want the same 22 characters", ref, l.UserRef(&anna), l.UserRef(&renamed))
	}
	if other := l.UserRef(&elsewhere); other == ref || other == "" {
		t.Errorf("UserRef in another tenant = %q, the same", other)
	}
	if l.UserRef(&claimed) == "" {
		t.Error("UserRef of an unverified user is empty")
	}
	if got := l.UserRef(&app) + l.UserRef(&policy.Token{}); got != "" {
		t.Errorf("UserRef of no user = %q", got)
	}
	rec := record()
	rec.Token = anna
	decide(t, l, rec)
	mustClose(t, l)

	appendText(t, filepath.Join(dir, identitiesFile), `{"user_ref":"torn`)
	l = mustOpen(t, Config{Dir: dir})
	if l.UserRef(&anna) != ref {
		t.Error("a restart changes the reference")
	}
	third := anna
	third.ObjectID, third.UPN = "o4", "carl\x1b[2J@contoso.example"
	carl := l.UserRef(&third)
	mustClose(t, l)

	got, err := Identities(dir)
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]Identity{
		ref:                   {ref, "t1", "o1", "anna.b@contoso.example"},
		carl:                  {carl, "t1", "o4", "carl\x1b[2J@contoso.example"},
		l.UserRef(&elsewhere): {l.UserRef(&elsewhere), "t2", "o1", "svc-billing@contoso.example"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("Identities (-want +got):\n%s", diff)
	}
	raw, err := os.ReadFile(filepath.Join(dir, identitiesFile))
	if err != nil || strings.Contains(string(raw), "\x1b") || strings.Count(string(raw), "anna.b@") != 1 {
		t.Errorf("identities file = %q, %v; want each name once, escaped", raw, err)
	}
	for _, e := range readAll(t, dir) {
		if s := string(e.Line); strings.Contains(s, "anna") || strings.Contains(s, `"o1"`) {
			t.Errorf("the ledger names the user: %s", s)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, identitiesKey), []byte("short"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(Config{Dir: dir, MinFree: -1}); err == nil || !strings.Contains(err.Error(), "identities.key has 5 bytes") {
		t.Errorf("Open with half a key = %v, want an error that says so", err)
	}
}

func TestMemoOfUsersIsBounded(t *testing.T) {
	l := mustOpen(t, Config{Dir: t.TempDir()})
	defer mustClose(t, l)
	for i := range maxMemo + 10 {
		l.UserRef(&policy.Token{ObjectID: fmt.Sprint(i)})
	}
	if n := len(l.identities.memo); n > maxMemo {
		t.Errorf("%d users remembered, want %d at most", n, maxMemo)
	}
}

func TestOpenSaysWhatIsWrong(t *testing.T) {
	if _, err := Open(Config{}); err == nil {
		t.Error("Open without a directory succeeds")
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(Config{Dir: file}); err == nil || !strings.Contains(err.Error(), file) {
		t.Errorf("Open(%s) = %v, want an error that names it", file, err)
	}
}

// What follows serves the tests.

func record() *proxy.Record {
	return &proxy.Record{
		Decided: proxy.Decided{
			Call: uuid.Must(uuid.NewV7()), Time: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC),
			Instance: "guard-1", Generation: 1, Listener: "main", Peer: "192.0.2.7", Method: "GET",
			Path: "/v1/customers/5f0f4d5c-0000-4000-8000-000000000001/subscriptions", Route: "/v1/customers/{customer-tenant-id}/subscriptions",
			QueryNames: []string{"size"}, Upstream: "partner-center", Integration: "nightly-billing", Evidence: "app_id", Owner: "billing@contoso.example",
			Customer: "5f0f4d5c-0000-4000-8000-000000000001",
			Token: policy.Token{Verified: true, Kind: policy.KindAppUser, MFA: policy.MFAPresent, TenantID: "1b2c3d4e-0a1b-4c2d-8e3f-901234567890",
				AppID: "7d1f0a52-9b3c-4c1e-8f60-2a5b9c0d1e11", ObjectID: "0f9a6c1e-0000-4000-8000-000000000001", UPN: "svc-billing@contoso.example",
				UTI: "uti", AMR: []string{"pwd", "mfa"}, IssuedAt: 1796113805, ExpiresAt: 1796117405},
			Decision:  policy.Decision{Effect: policy.Allow, Reason: policy.ReasonMFAPresent, Mode: policy.Enforce},
			RequestID: "8b1f8b32-1c7b-4a36-94d8-9f6a2c1d0e55", CorrelationID: "1c7b4a36-94d8-4f6a-8c1d-0e558b1f8b32", UserAgent: "python-requests/2.32",
		},
		Finished: proxy.Finished{Status: 200, MFACompliant: policy.CompliantTrue, BytesOut: 2048, Duration: 12345 * time.Microsecond, UpstreamTime: 12 * time.Millisecond,
			UpstreamRequestID: "8b1f8b32-1c7b-4a36-94d8-9f6a2c1d0e55", UpstreamCorrelationID: "1c7b4a36-94d8-4f6a-8c1d-0e558b1f8b32"},
	}
}

// fast lets the background look often.
var fast = pace{probe: time.Millisecond, watch: 20 * time.Millisecond, prune: time.Hour}

func mustOpen(t testing.TB, cfg Config) *Ledger {
	t.Helper()
	if cfg.MinFree == 0 {
		cfg.MinFree = -1
	}
	p := defaultPace
	p.carry, p.sign = 0, 0 // what is finished can be read, and nothing comes between
	l, err := open(cfg, osFiles{}, p)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func TestAnOutcomeGoesOutByItselfSoonAndWithTheNextDecisionSooner(t *testing.T) {
	dir := t.TempDir()
	p := defaultPace
	p.carry, p.sign = time.Hour, 0 // a checkpoint would take it along
	l, err := open(Config{Dir: dir, MinFree: -1}, osFiles{}, p)
	if err != nil {
		t.Fatal(err)
	}
	first, second := record(), record()
	if err := errors.Join(l.Decide(first), l.Finish(first)); err != nil {
		t.Fatal(err)
	}
	if r, err := Verify(dir, VerifyOptions{}); err != nil || r.Outcomes != 0 {
		t.Errorf("%d outcomes at once, %v; want the one to wait", r.Outcomes, err)
	}
	if err := errors.Join(l.Decide(second), l.Finish(second)); err != nil {
		t.Fatal(err)
	}
	if r, err := Verify(dir, VerifyOptions{}); err != nil || r.Outcomes != 1 {
		t.Errorf("%d outcomes with the next decision, %v; want 1", r.Outcomes, err)
	}
	mustClose(t, l)
	if r, err := Verify(dir, VerifyOptions{}); err != nil || r.Outcomes != 2 {
		t.Errorf("%d outcomes after Close, %v; want 2", r.Outcomes, err)
	}

	p.carry = time.Millisecond
	if l, err = open(Config{Dir: dir, MinFree: -1}, osFiles{}, p); err != nil {
		t.Fatal(err)
	}
	defer mustClose(t, l)
	third := record()
	if err := errors.Join(l.Decide(third), l.Finish(third)); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); ; runtime.Gosched() {
		if r, err := Verify(dir, VerifyOptions{}); err != nil || time.Now().After(deadline) {
			t.Fatalf("%d outcomes, %v; the third does not go out by itself", r.Outcomes, err)
		} else if r.Outcomes == 3 {
			return
		}
	}
}

func mustClose(t testing.TB, l *Ledger) {
	t.Helper()
	if err := l.Close(); err != nil {
		t.Error(err)
	}
}

func decide(t testing.TB, l *Ledger, rec *proxy.Record) {
	t.Helper()
	if err := l.Decide(rec); err != nil {
		t.Fatalf("Decide: %v", err)
	}
}

func finish(t testing.TB, l *Ledger, rec *proxy.Record) {
	t.Helper()
	if err := l.Finish(rec); err != nil {
		t.Fatalf("Finish: %v", err)
	}
}

func verify(t testing.TB, dir string) Report {
	t.Helper()
	rep, err := Verify(dir, VerifyOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return rep
}

func mustVerify(t testing.TB, dir string) Report {
	t.Helper()
	rep := verify(t, dir)
	if rep.Problem != nil {
		t.Fatalf("Verify: %v", rep.Problem)
	}
	return rep
}

// readAll returns every record in dir, each of them checked to be JSON.
func readAll(t testing.TB, dir string) []Entry {
	t.Helper()
	r, err := NewReader(dir, Position{})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	var all []Entry
	for {
		e, err := r.Next()
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		if !json.Valid(e.Line) {
			t.Fatalf("record %d is no JSON: %s", e.Seq, e.Line)
		}
		e.Line = slices.Clone(e.Line)
		all = append(all, e)
	}
}

type members struct {
	Call     proxy.CallID
	Status   int
	Error    string
	Calls    uint64
	Outcomes uint64
	Cause    string
}

// summary says in a line each what entries hold.
func summary(entries []Entry) []string {
	var s []string
	for _, e := range entries {
		var m members
		if err := json.Unmarshal(e.Line, &m); err != nil {
			s = append(s, err.Error())
			continue
		}
		switch e.Type {
		case TypeDecision:
			s = append(s, fmt.Sprint(e.Type, " ", m.Call))
		case TypeOutcome:
			what := m.Error
			if what == "" {
				what = fmt.Sprint(m.Status)
			}
			s = append(s, fmt.Sprint(e.Type, " ", m.Call, " ", what))
		case TypeGap:
			s = append(s, fmt.Sprintf("gap %d %d %s", m.Calls, m.Outcomes, m.Cause))
		default:
			s = append(s, e.Type)
		}
	}
	return s
}

// count returns how often each call was decided and ended.
func count(entries []Entry) (decided, ended map[proxy.CallID]int) {
	decided, ended = map[proxy.CallID]int{}, map[proxy.CallID]int{}
	for _, e := range entries {
		var m members
		if json.Unmarshal(e.Line, &m) != nil {
			continue
		}
		switch e.Type {
		case TypeDecision:
			decided[m.Call]++
		case TypeOutcome:
			ended[m.Call]++
		}
	}
	return decided, ended
}

// edit changes the lines of a segment.
func edit(t testing.TB, dir string, num uint64, change func([]string) []string) {
	t.Helper()
	b, err := os.ReadFile(segmentPath(dir, num))
	if err != nil {
		t.Fatal(err)
	}
	out := ""
	for _, l := range change(strings.Split(strings.TrimSuffix(string(b), "\n"), "\n")) {
		out += l + "\n"
	}
	if out == string(b) {
		t.Fatal("the edit changes nothing")
	}
	if err := os.WriteFile(segmentPath(dir, num), []byte(out), 0o600); err != nil {
		t.Fatal(err)
	}
}

func appendFile(t testing.TB, dir string, num uint64, text string) {
	t.Helper()
	appendText(t, segmentPath(dir, num), text)
}

func appendText(t testing.TB, name, text string) {
	t.Helper()
	f, err := os.OpenFile(name, os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteString(text)
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
}
