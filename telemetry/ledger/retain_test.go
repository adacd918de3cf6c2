package ledger

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
	"github.com/partnerguard/partnerguard/policy"
	"github.com/partnerguard/partnerguard/proxy"
)

const (
	briefTenant = "aaaaaaaa-0000-4000-8000-000000000001" // kept for 7 days
	longTenant  = "bbbbbbbb-0000-4000-8000-000000000002" // kept for 90 days
	otherTenant = "cccccccc-0000-4000-8000-000000000003" // kept for 30 days, as all others
)

var tenantRetention = map[string]time.Duration{briefTenant: 7 * 24 * time.Hour, longTenant: 90 * 24 * time.Hour}

var firstDay = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func recordOf(tenant string, verified bool) *proxy.Record {
	return &proxy.Record{
		Decided: proxy.Decided{
			Call: uuid.Must(uuid.NewV7()), Method: "GET", Path: `/v1/","tid":"` + briefTenant,
			Token: policy.Token{Kind: policy.KindAppUser, Verified: verified, TenantID: tenant, AppID: "app"},
		},
		Finished: proxy.Finished{Status: 200},
	}
}

// tenantLedger has a segment for each day, in each a call of each tenant, one that
// only claims to be of the brief one, one without a tenant, and one of the brief one
// that ends a day later. calls says whose each call is, and of which day.
func tenantLedger(t testing.TB, days int, compress bool) (dir string, calls map[proxy.CallID]string) {
	t.Helper()
	dir, calls = t.TempDir(), map[proxy.CallID]string{}
	var now atomic.Int64
	l, err := open(Config{Dir: dir, Retention: -1, MinFree: -1, Now: func() time.Time { return firstDay.Add(time.Duration(now.Load())) }}, osFiles{},
		pace{probe: time.Hour, watch: time.Hour, prune: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	var late *proxy.Record
	for day := range days {
		now.Store(int64(day) * int64(24*time.Hour))
		for _, tt := range []struct {
			tenant   string
			verified bool
			name     string
		}{
			{briefTenant, true, "brief"}, {longTenant, true, "long"}, {otherTenant, true, "other"},
			{briefTenant, false, "claimed"}, {"", true, "none"},
		} {
			rec := recordOf(tt.tenant, tt.verified)
			calls[rec.Call] = fmt.Sprintf("%s %02d", tt.name, day)
			decide(t, l, rec)
			finish(t, l, rec)
		}
		if late != nil {
			finish(t, l, late)
		}
		late = recordOf(strings.ToUpper(briefTenant), true)
		calls[late.Call] = fmt.Sprintf("late %02d", day)
		decide(t, l, late)
		l.checkpoint()
	}
	finish(t, l, late)
	mustClose(t, l)
	if compress {
		for num := range uint64(days - 1) {
			if err := compressSegment(osFiles{}, dir, num+1, noRest); err != nil {
				t.Fatal(err)
			}
		}
	}
	return dir, calls
}

// tendOnce does the upkeep of a ledger at a time, as its background does.
func tendOnce(t testing.TB, dir string, now time.Time, files files, cfg Config) error {
	t.Helper()
	cfg.Dir = dir
	if cfg.Event == nil {
		cfg.Event = func(Event) {}
	}
	id, err := ID(dir)
	if err != nil {
		t.Fatal(err)
	}
	l := &Ledger{cfg: cfg, files: files, id: id, events: make(chan Event, 64), stop: make(chan struct{})}
	l.cfg.Now = func() time.Time { return now }
	p := pace{rest: 0}
	err = errors.Join(l.prune(now), l.removeTenants(now, p), l.compress(p), l.limit())
	close(l.events)
	for e := range l.events {
		l.cfg.Event(e)
	}
	return err
}

// whose says of the calls in entries whose they are, once for each decision (d) and
// outcome (o).
func whose(entries []Entry, calls map[proxy.CallID]string) []string {
	var s []string
	for _, e := range entries {
		_, typ, rest, _ := parseHead(append(slices.Clone(e.Line), '\n'))
		if id, ok := parseCall(rest); ok {
			s = append(s, calls[id]+" "+typ[:1])
		}
	}
	slices.Sort(s)
	return s
}

func TestRecordsOfTenantsGoWhenTheirRetentionIsOver(t *testing.T) {
	for _, compress := range []bool{false, true} {
		t.Run(fmt.Sprintf("compressed %v", compress), func(t *testing.T) {
			const days = 40
			dir, calls := tenantLedger(t, days, compress)
			before := mustVerify(t, dir)
			places := readAll(t, dir)
			cfg := Config{Retention: 30 * 24 * time.Hour, TenantRetention: tenantRetention, Compress: compress}
			now := firstDay.AddDate(0, 0, days-1).Add(time.Hour)
			if err := tendOnce(t, dir, now, osFiles{}, cfg); err != nil {
				t.Fatal(err)
			}
			after := mustVerify(t, dir)
			if after.Removed == 0 || after.Last != before.Last || after.First != before.First || after.Checkpoints != before.Checkpoints {
				t.Errorf("Verify before: %+v\nafter: %+v", before, after)
			}
			// A segment ends when the next begins: the one of day 31 did 7 days and an
			// hour ago, the one of day 8 30 days and an hour ago.
			var want []string
			for _, whose := range calls {
				name, text, _ := strings.Cut(whose, " ")
				day, err := strconv.Atoi(text)
				if err != nil {
					t.Fatal(err)
				}
				keptFrom := map[string]int{"brief": 32, "late": 32, "long": 0, "other": 9, "claimed": 9, "none": 9}[name]
				if day+1 > keptFrom {
					want = append(want, whose+" d", whose+" o")
				}
			}
			slices.Sort(want)
			entries := readAll(t, dir)
			if diff := cmp.Diff(want, whose(entries, calls)); diff != "" {
				t.Errorf("records left (-want +got):\n%s", diff)
			}
			for num := range uint64(days - 1) {
				_, plain := os.Stat(segmentPath(dir, num+1))
				_, packed := os.Stat(compressedPath(dir, num+1))
				if (plain == nil) == compress || (packed == nil) != compress {
					t.Fatalf("segment %d: %v, %v", num+1, plain, packed)
				}
			}
			// Who stood somewhere before reads on with the next record that is left.
			for i, at := range places {
				if i%7 != 0 {
					continue
				}
				r, err := NewReader(dir, at.Next)
				if err != nil {
					t.Fatal(err)
				}
				e, err := r.Next()
				if want := slices.IndexFunc(entries, func(e Entry) bool { return e.Seq > at.Seq }); want < 0 && err == nil || want >= 0 && (err != nil || e.Seq != entries[want].Seq) {
					t.Errorf("from %v: record %d, %v; want that after %d", at.Next, e.Seq, err, at.Seq)
				}
				r.Close()
			}
			// The same day again changes nothing, the same minute of the next day one
			// segment for each tenant.
			stamp := func() map[string]time.Time {
				m := map[string]time.Time{}
				files, _ := filepath.Glob(filepath.Join(segmentDir(dir), "0*"))
				for _, f := range files {
					fi, err := os.Stat(f)
					if err != nil {
						t.Fatal(err)
					}
					m[filepath.Base(f)] = fi.ModTime()
				}
				return m
			}
			first := stamp()
			if err := tendOnce(t, dir, now, osFiles{}, cfg); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(first, stamp()); diff != "" {
				t.Errorf("files changed again:\n%s", diff)
			}
			// All are over: the segments go, but for the last two.
			if err := tendOnce(t, dir, now.AddDate(0, 0, 95), osFiles{}, cfg); err != nil {
				t.Fatal(err)
			}
			if rep := mustVerify(t, dir); rep.Segments > 2 {
				t.Errorf("%d segments are left", rep.Segments)
			}
		})
	}
}

func TestSegmentsWithoutACallLeftGoEarly(t *testing.T) {
	dir, _ := tenantLedger(t, 12, true)
	cfg := Config{
		Retention: 3 * 24 * time.Hour, Compress: true,
		TenantRetention: map[string]time.Duration{longTenant: 5 * 24 * time.Hour, "dddddddd-0000-4000-8000-000000000004": 365 * 24 * time.Hour},
	}
	if err := tendOnce(t, dir, firstDay.AddDate(0, 0, 11).Add(time.Hour), osFiles{}, cfg); err != nil {
		t.Fatal(err)
	}
	if rep := mustVerify(t, dir); rep.Segments != 6 || rep.Removed == 0 {
		t.Errorf("Verify = %+v, want the segments of the last six days", rep)
	}
}

func TestADeathDuringRemovalLosesNothing(t *testing.T) {
	const days = 10
	cfg := Config{Retention: 30 * 24 * time.Hour, TenantRetention: tenantRetention, Compress: true}
	now := firstDay.AddDate(0, 0, days-1).Add(time.Hour)
	steps := 0
	plain, calls := tenantLedger(t, days, false)
	packed, more := tenantLedger(t, days, true)
	maps.Copy(calls, more)
	for n := 0; ; n++ {
		dir := copyLedger(t, []string{packed, plain}[n%2])
		left := n
		err := tendOnce(t, dir, now, dying{n: &left}, cfg)
		mustVerify(t, dir)
		kept := whose(readAll(t, dir), calls)
		if again := tendOnce(t, dir, now, osFiles{}, cfg); again != nil {
			t.Fatal(again)
		}
		mustVerify(t, dir)
		got := whose(readAll(t, dir), calls)
		if slices.ContainsFunc(got, func(s string) bool { return strings.HasPrefix(s, "brief 00") || strings.HasPrefix(s, "late 00") }) {
			t.Errorf("after a death at step %d records of the first day are left", n)
		}
		for _, s := range got {
			if !slices.Contains(kept, s) {
				t.Errorf("after a death at step %d %s was missing", n, s)
			}
		}
		for _, s := range []string{"long 00 d", "other 00 o", "claimed 01 d", "none 02 d", "brief 05 d"} {
			if !slices.Contains(got, s) {
				t.Errorf("after a death at step %d %s is missing", n, s)
			}
		}
		if err == nil {
			break
		}
		steps++
	}
	if steps < 10 {
		t.Errorf("%d steps; the test tests little", steps)
	}
}

// In a segment with removed records, too, every changed byte is noticed.
func TestVerifyNoticesAChangedRemovedRecord(t *testing.T) {
	dir, _ := tenantLedger(t, 10, false)
	if err := tendOnce(t, dir, firstDay.AddDate(0, 0, 9).Add(time.Hour), osFiles{}, Config{Retention: -1, TenantRetention: tenantRetention}); err != nil {
		t.Fatal(err)
	}
	original := content(t, dir, 1)
	ls := lines(original)
	at, found := 0, 0
	for n, l := range ls {
		if strings.Contains(l, `"type":"removed"`) {
			found++
			for i := range l[:len(l)-1] {
				b := slices.Clone(original)
				b[at+i] ^= 1
				put(t, dir, 1, b)
				if p := verify(t, dir).Problem; p == nil || p.Line != n+1 || p.Segment != segmentName(1) {
					t.Errorf("line %d byte %d: Verify names %v", n+1, i, p)
				}
			}
			if found == 2 {
				break
			}
		}
		at += len(l)
	}
	if found == 0 {
		t.Error("nothing was removed; the test tests nothing")
	}
	put(t, dir, 1, original)
	mustVerify(t, dir)
}

func TestADamagedSegmentIsNotRewritten(t *testing.T) {
	dir, _ := tenantLedger(t, 10, false)
	put(t, dir, 1, []byte(strings.Replace(string(content(t, dir, 1)), "GET", "PUT", 1)))
	damaged := content(t, dir, 1)
	err := tendOnce(t, dir, firstDay.AddDate(0, 0, 9).Add(time.Hour), osFiles{}, Config{Retention: -1, TenantRetention: tenantRetention})
	if err == nil || !strings.Contains(err.Error(), "damaged") {
		t.Errorf("upkeep = %v, want an error that says so", err)
	}
	if !slices.Equal(damaged, content(t, dir, 1)) {
		t.Error("the evidence was changed")
	}
}

func TestTheOldestSegmentsGoWhenThereIsTooMuch(t *testing.T) {
	dir, _ := tenantLedger(t, 10, false)
	var events []Event
	total := int64(0)
	for num := range uint64(10) {
		total += fileSize(dir, num+1)
	}
	max := total - fileSize(dir, 1) - fileSize(dir, 2) - fileSize(dir, 3)
	cfg := Config{Retention: -1, MaxBytes: max, Event: func(e Event) { events = append(events, e) }}
	if err := tendOnce(t, dir, firstDay.AddDate(0, 0, 9), osFiles{}, cfg); err != nil {
		t.Fatal(err)
	}
	if rep := mustVerify(t, dir); rep.Segments != 7 {
		t.Errorf("%d segments are left, want 7", rep.Segments)
	}
	var told []string
	for _, e := range events {
		if e.Kind != EventRemovedEarly || e.Err == nil {
			t.Errorf("event %+v", e)
		}
		told = append(told, e.Segment)
	}
	if diff := cmp.Diff([]string{segmentName(1), segmentName(2), segmentName(3)}, told); diff != "" {
		t.Errorf("events (-want +got):\n%s", diff)
	}
	cfg.MaxBytes = 1
	if err := tendOnce(t, dir, firstDay.AddDate(0, 0, 9), osFiles{}, cfg); err != nil {
		t.Fatal(err)
	}
	if nums, err := segments(dir); err != nil || !slices.Equal(nums, []uint64{10}) {
		t.Errorf("segments = %v, %v, want the last one to stay", nums, err)
	}
	mustVerify(t, dir)
}

func TestPruneReadsBothForms(t *testing.T) {
	dir, _ := tenantLedger(t, 6, true)
	before := firstDay.AddDate(0, 0, 3).Add(-12 * time.Hour)
	due, err := WouldPrune(dir, before)
	if err != nil || len(due) != 2 || due[0].Bytes == 0 {
		t.Errorf("WouldPrune = %v, %v, want two segments", due, err)
	}
	gone, err := Prune(dir, before)
	if diff := cmp.Diff([]string{segmentName(1), segmentName(2)}, gone); err != nil || diff != "" {
		t.Errorf("Prune: %v, (-want +got):\n%s", err, diff)
	}
	if rep := mustVerify(t, dir); rep.Segments != 4 || rep.Checkpoints == 0 {
		t.Errorf("Verify = %+v, want 4 segments that are still signed", rep)
	}
}
