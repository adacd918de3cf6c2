package store

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/partnerguard/partnerguard/telemetry/ledger"
)

// TestWithTheLedger goes the whole way: what the ledger writes, over rotations and
// an end without outcomes, is what the store says, whether followed or rebuilt.
func TestWithTheLedger(t *testing.T) {
	dir := t.TempDir()
	openLedger := func() *ledger.Ledger {
		l, err := ledger.Open(ledger.Config{Dir: dir, Retention: -1, MinFree: -1, SegmentBytes: 4096})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		return l
	}
	s, err := Open(Config{Dir: dir, Retention: -1})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	r := openReader(t, dir)
	l := openLedger()
	for i := range 30 {
		rec := callAt(i)
		rec.Time = time.Now().Add(-time.Minute)
		rec.Token.TenantID, rec.Token.ObjectID, rec.Token.UPN = "tid", "oid-sam", "sam@contoso.example"
		if err := l.Decide(&rec); err != nil {
			t.Fatal(err)
		}
		if i == 17 {
			catchUp(t, s)
		}
		if i == 29 {
			break // and no outcome
		}
		if err := l.Finish(&rec); err != nil {
			t.Fatal(err)
		}
	}
	if lag, err := r.Lag(t.Context()); err != nil || lag < time.Minute {
		t.Errorf("Lag = %v, %v; want a minute and more", lag, err)
	}
	catchUp(t, s)
	if lag, err := r.Lag(t.Context()); err != nil || lag != 0 {
		t.Errorf("Lag = %v, %v after catching up, want 0", lag, err)
	}
	if open, err := r.OpenCalls(t.Context()); err != nil || len(open) != 1 {
		t.Errorf("%d open calls, %v; want 1", len(open), err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	openLedger()
	catchUp(t, s)
	for _, user := range []string{"SAM@contoso.example", "oid-sam"} {
		calls := readCalls(t, r, Filter{User: user})
		if len(calls) != 30 || calls[29].Error != Interrupted || calls[28].Error != "" {
			t.Errorf("%d calls of %s, the last %+v; want 30, the last interrupted", len(calls), user, calls[len(calls)-1].Finished)
		}
	}
	if calls := readCalls(t, r, Filter{User: "kim@contoso.example"}); len(calls) != 0 {
		t.Errorf("%d calls of a user who made none", len(calls))
	}
	followed := content(t, dir)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := Rebuild(t.Context(), dir, nil); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(followed, content(t, dir)); diff != "" {
		t.Errorf("rebuilt (-followed +rebuilt):\n%s", diff)
	}
}
