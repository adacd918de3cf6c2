package store

import (
	"flag"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/partnerguard/partnerguard/policy"
)

// filterJournal has calls of every kind that a filter tells apart, over three days,
// some of them open.
func filterJournal() *journal {
	j := &journal{}
	apps := []string{"app-1", "7d1f0a52-9b3c-4c1e-8f60-2a5b9c0d1e11", ""}
	statuses := []int{200, 401, 403, 404, 500, 502, 0}
	reasons := []policy.Reason{policy.ReasonMFAMissing, policy.ReasonMFAPresent, policy.ReasonAppOnly}
	for i := range 60 {
		r := callAt(i * 73)
		r.Call[14] = byte(i)
		r.Time = r.Time.Add(time.Duration(i) * time.Microsecond)
		r.Integration = []string{"nightly-billing", "crm", "unknown", ""}[i%4]
		r.Token.AppID = apps[i%3]
		r.Token.UPN = []string{"ref-sam", "ref-kim", ""}[i%3]
		r.Customer = []string{"", "c-1"}[i%2]
		r.Status, r.Reason = statuses[i%7], reasons[i%3]
		r.RequestID = []string{"8a1f0000-0000-4000-8000-00000000000a", "8A1F0000-0000-4000-8000-00000000000B", "", "Job_%k", "x"}[i%5]
		r.UpstreamRequestID = []string{"", "8a1f0000-0000-4000-8000-00000000000b", "X"}[i%3]
		r.CorrelationID = []string{"batch 1", "", "x"}[i%3]
		r.UpstreamCorrelationID = []string{"", "BATCH 1"}[i%2]
		if i%6 == 3 || i == 58 {
			j.decide(r)
		} else {
			j.call(r)
		}
	}
	return j
}

// filterReaders are readers of the same calls: with none folded, all, and some.
func filterReaders(t testing.TB) map[string]Reader {
	const people = `{"user_ref":"ref-sam","tid":"t","oid":"1c3d0000-0000-4000-8000-000000000001","upn":"Sam@contoso.example"}
{"user_ref":"ref-kim","tid":"t","oid":"1c3d0000-0000-4000-8000-000000000002"}
`
	j, readers := filterJournal(), map[string]Reader{}
	for name, foldAt := range map[string]int{"not folded": math.MaxInt, "folded one by one": 1, "folded in part": 25} {
		dir := t.TempDir()
		s, err := Open(Config{Dir: dir, Source: j.open, Now: func() time.Time { return start.Add(4 * 24 * time.Hour) }})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.Close() })
		for n := range j.entries { // a batch a line, so that folds end where foldAt says
			writerOf(s).foldAt = foldAt
			s.source = &cursor{j.upTo(n + 1), int64(n)}
			if _, err := s.CatchUp(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.WriteFile(filepath.Join(dir, "identities.jsonl"), []byte(people), 0o600); err != nil {
			t.Fatal(err)
		}
		r, err := OpenReader(dir)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { r.Close() })
		readers[name] = r
	}
	if flag.Lookup("test.fuzz").Value.String() == "" { // there are many workers then
		place := postgresShelf(t)
		if err := os.WriteFile(filepath.Join(place.dir, "identities.jsonl"), []byte(people), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := place.open(t, j, nil).CatchUp(t.Context()); err != nil {
			t.Fatal(err)
		}
		readers["postgres"] = place.reader(t)
	}
	return readers
}

// selects says in plain Go what Filter promises of one call.
func selects(f Filter, c Call) bool {
	folded := func(have, want string) bool { // letters of ASCII in any case
		fold := func(s string) string {
			b := []byte(s)
			for i, c := range b {
				if 'A' <= c && c <= 'Z' {
					b[i] = c + 'a' - 'A'
				}
			}
			return string(b)
		}
		return fold(have) == fold(want)
	}
	people := map[string][]string{"ref-sam": {"1c3d0000-0000-4000-8000-000000000001", "Sam@contoso.example"}, "ref-kim": {"1c3d0000-0000-4000-8000-000000000002"}}
	isUser := c.UserRef == f.User
	for _, name := range people[c.UserRef] {
		isUser = isUser || strings.EqualFold(name, f.User)
	}
	status := fmt.Sprint(c.Status)
	switch {
	case !f.Since.IsZero() && c.Time.Before(f.Since),
		!f.Until.IsZero() && !c.Time.Before(f.Until),
		f.Integration != "" && c.Integration != f.Integration,
		f.App != "" && c.AppID != strings.ToLower(f.App),
		f.Customer != "" && c.Customer != strings.ToLower(f.Customer),
		f.Reason != "" && c.Reason != f.Reason,
		f.User != "" && !isUser,
		f.Call != "" && c.ID != strings.ToLower(f.Call),
		f.RequestID != "" && !folded(c.RequestID, f.RequestID) && !folded(c.UpstreamRequestID, f.RequestID),
		f.CorrelationID != "" && !folded(c.CorrelationID, f.CorrelationID) && !folded(c.UpstreamCorrelationID, f.CorrelationID),
		f.Status != "" && (c.Open() || status != f.Status && status[:1]+"xx" != strings.ToLower(f.Status)):
		return false
	}
	return c.Finish > f.AfterFinish || c.Open() && !f.EndedOnly
}

// expected are the ids of the calls that f selects out of all, in their order.
func expected(f Filter, all []Call) []string {
	var ended, open []string
	for _, c := range all {
		switch {
		case !selects(f, c):
		case c.Open():
			open = append(open, c.ID)
		default:
			ended = append(ended, c.ID)
		}
	}
	if n := len(ended) - f.Limit; f.Limit > 0 && n > 0 {
		if f.AfterFinish > 0 {
			ended = ended[:f.Limit]
		} else {
			ended = ended[n:]
		}
	}
	return append(ended, open...)
}

// FuzzFilter: whatever stands in a filter, Calls returns exactly the calls that it
// selects, in order, folded or not; only a status that ParseStatus refuses is an
// error.
func FuzzFilter(f *testing.F) {
	readers := filterReaders(f)
	found := map[string][]Call{}
	for name, r := range readers {
		if err := r.Calls(f.Context(), Filter{}, func(c Call) error { found[name] = append(found[name], c); return nil }); err != nil {
			f.Fatal(err)
		}
	}
	all := found["not folded"]
	if len(all) != 60 || !all[59].Open() {
		f.Fatalf("%d calls, want 60 with the open ones last", len(all))
	}
	minute := func(n int) int64 { return start.Add(time.Duration(n) * time.Minute).Unix() }
	add := func(since, until int64, change func(*Filter)) {
		var q Filter
		if change != nil {
			change(&q)
		}
		f.Add(since, until, int64(0), q.Integration, q.User, q.App, q.Customer, q.Status, q.Reason, q.Call, q.RequestID, q.CorrelationID, q.Limit, uint16(q.AfterFinish), q.EndedOnly)
	}
	add(0, 0, nil)
	add(minute(100), minute(2000), nil)
	add(minute(2000), minute(100), nil)
	add(0, 1, nil)
	add(253402300799, 0, nil)
	add(minute(73), 0, func(q *Filter) { q.Integration, q.Limit = "crm", 2 })
	add(0, 0, func(q *Filter) { q.Integration, q.EndedOnly = "' OR 1=1 --", true })
	add(0, 0, func(q *Filter) { q.Integration = "crm\x00" })
	add(0, 0, func(q *Filter) { q.User = "SAM@contoso.example" })
	add(0, 0, func(q *Filter) { q.User, q.AfterFinish, q.Limit = "1C3D0000-0000-4000-8000-000000000002", 20, 3 })
	add(0, 0, func(q *Filter) { q.App, q.Status = "7D1F0A52-9B3C-4C1E-8F60-2A5B9C0D1E11", "4xx" })
	add(0, 0, func(q *Filter) { q.Customer, q.Reason, q.Status = "C-1", "mfa_missing", "0401" })
	add(0, 0, func(q *Filter) { q.Status = "6xx" })
	add(0, 0, func(q *Filter) { q.Call = strings.ToUpper(all[3].ID) })
	add(0, 0, func(q *Filter) { q.Call, q.RequestID = all[59].ID, all[59].RequestID })
	add(0, 0, func(q *Filter) { q.RequestID = "8a1f0000-0000-4000-8000-00000000000B" })
	add(minute(500), 0, func(q *Filter) { q.RequestID, q.CorrelationID = "jOB_%K", "Batch 1" })
	add(0, 0, func(q *Filter) { q.RequestID = "Job_%\u212a" }) // the sign of Kelvin is a k to Unicode
	add(0, 0, func(q *Filter) { q.CorrelationID = "\xff\xfe" })
	add(0, 0, func(q *Filter) { q.CorrelationID, q.Limit = "X", 1 })

	f.Fuzz(func(t *testing.T, since, until, nanos int64, integration, user, app, customer, status, reason, call, request, correlation string, limit int, after uint16, endedOnly bool) {
		at := func(seconds int64) time.Time { // 0 is none, else in the years that the command line takes
			if seconds == 0 {
				return time.Time{}
			}
			return time.Unix(seconds%253402300799, nanos%1e9)
		}
		q := Filter{
			Since: at(since), Until: at(until), Integration: integration, User: user, App: app, Customer: customer, Status: status, Reason: reason,
			Call: call, RequestID: request, CorrelationID: correlation, Limit: limit, AfterFinish: uint64(after), EndedOnly: endedOnly,
		}
		_, _, bad := ParseStatus(status)
		known := q
		if low, high, err := ParseStatus(status); err == nil { // 0401 and +401 are 401
			known.Status = fmt.Sprint(low)
			if low != high {
				known.Status = fmt.Sprint(low/100) + "xx"
			}
		}
		for name, r := range readers {
			want := expected(known, found[name])
			var got []string
			err := r.Calls(t.Context(), q, func(c Call) error {
				got = append(got, c.ID)
				return nil
			})
			if (err != nil) != (status != "" && bad != nil) || err != nil && len(got) > 0 {
				t.Fatalf("%s: Calls(%+v) returns %d calls and error %v", name, q, len(got), err)
			}
			if diff := cmp.Diff(want, got); err == nil && diff != "" {
				t.Errorf("%s: Calls(%+v) (-want +got):\n%s", name, q, diff)
			}
		}
	})
}
