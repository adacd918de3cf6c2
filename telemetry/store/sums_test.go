package store

import (
	"cmp"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/partnerguard/partnerguard/policy"
	"github.com/partnerguard/partnerguard/proxy"
)

// randomJournal has calls over four days that begin in no order, end late or never,
// and share more or less with each other.
func randomJournal(rng *rand.Rand, calls int) *journal {
	j := &journal{}
	pick := func(of ...string) string { return of[rng.IntN(len(of))] }
	var open []proxy.Record
	end := func(i int) {
		r := open[i]
		open = slices.Delete(open, i, i+1)
		if rng.IntN(12) > 0 {
			j.end(r)
		}
	}
	for i := range calls {
		r := callAt(0)
		r.Time = start.Add(time.Duration(i)*96*time.Hour/time.Duration(calls) + time.Duration(rng.Int64N(int64(3*time.Hour)))).Truncate(time.Microsecond)
		r.Call[13], r.Call[14], r.Call[15] = byte(i>>16), byte(i>>8), byte(i)
		r.Integration = pick("nightly-billing", "crm", "crm", "")
		r.Owner = map[string]string{"crm": "crm@contoso.example"}[r.Integration]
		r.Route = pick("/v1/customers/{customer-id}/users/{user-id}", "/v1/invoices", "")
		r.Customer = pick("", "7d1f0a52-9b3c-4c1e-8f60-2a5b9c0d1e11", "7d1f0a52-9b3c-4c1e-8f60-2a5b9c0d1e12", "c-1")
		r.Path = "/v1/customers/" + r.Customer + "/users/" + pick("x", "7d1f0a52-9b3c-4c1e-8f60-2a5b9c0d1e13")
		r.Status = 200 + 201*rng.IntN(2)
		r.Token.UPN, r.Token.UTI = pick("ref-sam", "ref-kim", ""), pick("", "EJwqP017IU6myA1eH3CLAA", fmt.Sprint("uti-", rng.IntN(20)))
		r.Token.TenantID, r.Token.IssuedAt = "tid", int64(rng.IntN(3))
		if rng.IntN(3) == 0 { // claims what it likes
			r.Token.Verified, r.Reason = false, policy.ReasonTokenBadSignature
			r.Token.AppID, r.Token.UPN = fmt.Sprint("app-", rng.IntN(100)), fmt.Sprint("ref-", rng.IntN(100))
			r.Token.AMR = []string{"mfa", fmt.Sprint(rng.IntN(3))}
		}
		if rng.IntN(4) == 0 {
			r.MFACompliant = policy.CompliantTrue
		}
		j.decide(r)
		open = append(open, r)
		for len(open) > 0 && rng.IntN(3) > 0 {
			end(rng.IntN(len(open)))
		}
	}
	for len(open) > 5 {
		end(0)
	}
	return j
}

// summed is what calls come to, by what of says of them.
func summed[K comparable](calls []Call, of func(*Call) K) map[K]sumValue {
	sums := map[K]sumValue{}
	for _, c := range calls {
		at := c.Time.UnixMicro()
		sums[of(&c)] = sums[of(&c)].plus(sumValue{1, at, at})
	}
	return sums
}

// again is what sums come to, by what of says of their Dim.
func again[K comparable](t *testing.T, sums []Sum, distinct bool, of func(*Sum) K) map[K]sumValue {
	t.Helper()
	out := map[K]sumValue{}
	for _, s := range sums {
		key := of(&s)
		if _, ok := out[key]; ok && distinct {
			t.Errorf("two sums of %+v", key)
		}
		out[key] = out[key].plus(sumValue{s.Calls, s.First.UnixMicro(), s.Last.UnixMicro()})
	}
	return out
}

// ofCustomer is what the calls of a sum by customer have in common.
type ofCustomer struct {
	Dim
	Customer string
}

// bounded is what of a Dim no caller can make many of.
func bounded(d Dim) Dim {
	d.Route, d.TenantID, d.AppID, d.UserRef, d.Owner, d.Code, d.AMR = "", "", "", "", "", "", ""
	return d
}

// ended are the calls of r that ended and began in the whole hours between since and
// until.
func ended(t *testing.T, r Reader, since, until time.Time) []Call {
	low, high := hourRange(since, until)
	return slices.DeleteFunc(readCalls(t, r, Filter{EndedOnly: true}), func(c Call) bool { return hourOf(c.Time) < low || hourOf(c.Time) > high })
}

// checkSums compares what r says of some time with what its calls say.
func checkSums(t *testing.T, r Reader, since, until time.Time, whole bool) {
	t.Helper()
	calls := ended(t, r, since, until)
	sums, err := r.Sums(t.Context(), since, until)
	if err != nil {
		t.Fatal(err)
	}
	customers, err := r.CustomerSums(t.Context(), since, until)
	if err != nil {
		t.Fatal(err)
	}
	compare := func(what string, want, got any) {
		t.Helper()
		if diff := gocmp.Diff(want, got, gocmp.AllowUnexported(sumValue{})); diff != "" {
			t.Errorf("%s from %v to %v (-the calls +the sums):\n%s", what, since, until, diff)
		}
	}
	compare("bounded sums", summed(calls, func(c *Call) Dim { return bounded(dimOf(c)) }), again(t, sums, false, func(s *Sum) Dim { return bounded(*s.Dim) }))
	compare("bounded sums by customer", summed(calls, func(c *Call) Dim { return bounded(dimOf(c)) }), again(t, customers, false, func(s *Sum) Dim { return bounded(*s.Dim) }))
	callers, err := r.Callers(t.Context(), since, until)
	if err != nil {
		t.Fatal(err)
	}
	total := int64(0)
	for _, c := range callers {
		total += c.Calls
	}
	compare("calls of callers", int64(len(calls)), total)
	if !whole {
		return
	}
	compare("sums", summed(calls, dimOf), again(t, sums, true, func(s *Sum) Dim { return *s.Dim }))
	compare("sums by customer", summed(calls, func(c *Call) ofCustomer {
		d := dimOf(c)
		d.Route = ""
		return ofCustomer{d, c.Customer}
	}), again(t, customers, true, func(s *Sum) ofCustomer { return ofCustomer{*s.Dim, s.Customer} }))
	want := summed(calls, func(c *Call) Caller {
		return Caller{Integration: c.Integration, Owner: c.Owner, TenantID: c.TenantID, AppID: c.AppID, UserRef: c.UserRef, Kind: c.Kind, Verified: c.Verified}
	})
	got := map[Caller]sumValue{}
	for _, c := range callers {
		v := sumValue{c.Calls, c.First.UnixMicro(), c.Last.UnixMicro()}
		c.Calls, c.First, c.Last = 0, time.Time{}, time.Time{}
		got[c] = got[c].plus(v)
	}
	compare("callers", want, got)
	tokens := map[Token]int{}
	for _, c := range calls {
		if c.UTI != "" {
			tokens[Token{c.UTI, c.AppID, c.UserRef, c.Integration, c.Verified, c.MFA, c.IssuedAt}] = 1
		}
	}
	found := map[Token]int{}
	if err := r.Tokens(t.Context(), since, until, func(tok Token) error { found[tok] = 1; return nil }); err != nil {
		t.Fatal(err)
	}
	compare("tokens", tokens, found)
}

// checkSearches compares what filters find with what they promise.
func checkSearches(t *testing.T, r Reader, rng *rand.Rand) {
	t.Helper()
	all := readCalls(t, r, Filter{})
	for range 30 {
		c := all[rng.IntN(len(all))]
		var f Filter
		switch rng.IntN(6) {
		case 0:
			f.User = c.UserRef
		case 1:
			f.App = c.AppID
		case 2:
			f.Customer = c.Customer
		case 3:
			f.User, f.App, f.Integration = c.UserRef, c.AppID, c.Integration
		case 4:
			f.Integration, f.Reason = c.Integration, c.Reason
		case 5:
			f.Status, f.Customer = "401", c.Customer
		}
		if rng.IntN(2) == 0 {
			f.Since = start.Add(time.Duration(rng.IntN(96)) * time.Hour)
		}
		if rng.IntN(2) == 0 {
			f.Until = start.Add(time.Duration(rng.IntN(96)) * time.Hour)
		}
		if rng.IntN(2) == 0 {
			f.Limit = 1 + rng.IntN(20)
		}
		if rng.IntN(4) == 0 {
			f.AfterFinish = c.Finish
		}
		f.EndedOnly = rng.IntN(2) == 0
		var got []string
		for _, c := range readCalls(t, r, f) {
			got = append(got, c.ID)
		}
		if diff := gocmp.Diff(expected(f, all), got); diff != "" {
			t.Errorf("Calls(%+v) (-want +got):\n%s", f, diff)
		}
	}
}

// TestSumsAreWhatTheCallsComeTo: whatever the order and the time of calls, wherever
// batches and folds end and the store is opened anew, whatever retention takes and
// however few sums a day may have.
func TestSumsAreWhatTheCallsComeTo(t *testing.T) {
	for seed := range uint64(6) {
		t.Run(fmt.Sprint("sqlite, seed ", seed), func(t *testing.T) { testSums(t, seed, sqliteShelf(t, 0)) })
		t.Run(fmt.Sprint("postgres, seed ", seed), func(t *testing.T) {
			postgresServer.Server(t)
			testSums(t, seed, postgresShelf(t))
		})
	}
}

func testSums(t *testing.T, seed uint64, place *shelf) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(seed, 0))
	j := randomJournal(rng, 500)
	whole := seed%2 == 0
	place.foldAt = []int{1, 7, 100, 300}[rng.IntN(4)]
	now := start.Add(96 * time.Hour)
	var s *Store
	open := func() {
		cfg := place.config(j, nil)
		cfg.Retention, cfg.Now = 96*time.Hour, func() time.Time { return now }
		var err error
		if s, err = Open(cfg); err != nil {
			t.Fatal(err)
		}
		if place.url != "" {
			p := s.db.(*postgres)
			if p.foldAt = place.foldAt; !whole {
				p.maxDims, p.maxCustomers = 12, 9
			}
			return
		}
		w := writerOf(s)
		if w.foldAt = place.foldAt; !whole {
			w.maxDims, w.maxCustomers = 12, 9
		}
	}
	open()
	defer func() { s.Close() }()
	for at := 0; at < len(j.entries); {
		n := min(len(j.entries), at+1+rng.IntN(80))
		s.source = &cursor{j.upTo(n), int64(at)}
		catchUp(t, s)
		if at = n; rng.IntN(5) == 0 {
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			open()
		}
	}
	r := place.reader(t)
	if pg, ok := r.(*postgresReader); ok {
		pg.few = rng.IntN(2) * few // without, calls are found by the days that may have them
	}
	check := func() {
		t.Helper()
		for range 5 {
			since := start.Add(time.Duration(rng.Int64N(int64(100 * time.Hour))))
			checkSums(t, r, since, since.Add(time.Duration(rng.Int64N(int64(80*time.Hour)))), whole)
		}
		checkSums(t, r, time.Time{}, time.Time{}, whole)
		checkSearches(t, r, rng)
	}
	check()
	if !whole && place.url == "" {
		checkBound(t, r)
	}
	// Retention ends inside a day, at its end, and in the next one.
	for _, hours := range []int{5, 14, 17} {
		now = start.Add(96*time.Hour + time.Duration(hours)*time.Hour)
		for range 3 {
			s.source = &cursor{j, int64(len(j.entries))}
			s.pruned = time.Time{}
			catchUp(t, s)
		}
		oldest := now.Add(-96 * time.Hour).Truncate(time.Hour)
		if place.url != "" { // goes by the day, and not by the clock of one guard alone
			oldest = start.Truncate(24 * time.Hour)
		}
		for _, c := range readCalls(t, r, Filter{EndedOnly: true}) {
			if c.Time.Before(oldest) {
				t.Fatalf("a call of %v is left; retention begins with %v", c.Time, oldest)
			}
		}
		check()
	}
}

// checkBound looks whether no day has more dims than it may: twice 12 and those
// that are as wide as can be, and 9 customers with one dim each and Other with any.
func checkBound(t *testing.T, r Reader) {
	t.Helper()
	for day := start.Truncate(24 * time.Hour); day.Before(start.Add(100 * time.Hour)); day = day.Add(24 * time.Hour) {
		sums, err := r.Sums(t.Context(), day, day.Add(24*time.Hour))
		if err != nil {
			t.Fatal(err)
		}
		calls := ended(t, r, day, day.Add(24*time.Hour))
		if wide := len(summed(calls, func(c *Call) Dim { return bounded(dimOf(c)) })); len(sums) > 24+4*wide {
			t.Errorf("%v has %d sums, want at most 24 and some for each of the %d that are bounded", day, len(sums), wide)
		}
		if all := len(summed(calls, dimOf)); all < 40 {
			t.Errorf("%v has calls of %d dims only: the test tests nothing", day, all)
		}
	}
}

// TestACallThatIsWidenedKeepsWhatItWas: the sums of a day are full, the calls and the
// searches know no bound.
func TestACallThatIsWidenedKeepsWhatItWas(t *testing.T) {
	onBothSidesOfTheFold(t, "widened", func(t *testing.T, foldAt int) {
		j, dir := &journal{}, t.TempDir()
		var want []string
		for i := range 40 {
			r := callAt(i)
			r.Owner, r.Code, r.Token.TenantID = fmt.Sprint("owner-", i), fmt.Sprint("code-", i), "tid"
			r.Token.AppID, r.Token.UPN, r.Token.UTI = fmt.Sprint("app-", i), fmt.Sprint("ref-", i), fmt.Sprint("uti-", i)
			r.Token.AMR, r.Token.Verified = []string{"pwd", fmt.Sprint(i)}, i%2 == 0
			r.Route, r.Path = fmt.Sprintf("/v1/%d/{id}", i), fmt.Sprintf("/v1/%d/x", i)
			j.call(r)
			want = append(want, fmt.Sprintf("owner-%d code-%d tid app-%d ref-%d uti-%d [pwd %d] /v1/%d/{id} /v1/%d/x", i, i, i, i, i, i, i, i))
		}
		s := openTest(t, dir, j, nil)
		writerOf(s).maxDims, writerOf(s).foldAt = 5, foldAt
		catchUp(t, s)
		r := openReader(t, dir)
		var got []string
		for i, c := range readCalls(t, r, Filter{}) {
			got = append(got, strings.Join([]string{c.Owner, c.Code, c.TenantID, c.AppID, c.UserRef, c.UTI, fmt.Sprint(c.AMR), c.Route, c.Path}, " "))
			for _, f := range []Filter{{User: c.UserRef}, {App: c.AppID}, {User: c.UserRef, App: c.AppID, Limit: 3}} {
				if found := readCalls(t, r, f); len(found) != 1 || found[0].ID != c.ID {
					t.Errorf("call %d: %d calls are found by %+v", i, len(found), f)
				}
			}
		}
		if diff := gocmp.Diff(want, got); diff != "" {
			t.Errorf("calls (-want +got):\n%s", diff)
		}
		sums := readSums(t, r)
		byUser := map[string]int64{}
		for _, s := range sums {
			byUser[s.UserRef] += s.Calls
		}
		users := slices.SortedFunc(maps.Keys(byUser), func(a, b string) int { return cmp.Compare(byUser[b], byUser[a]) })
		if len(sums) > 14 || users[0] != Other || byUser[Other] < 26 {
			t.Errorf("%d sums, calls by user %v; want about 12, and most under %s", len(sums), byUser, Other)
		}
	})
}

func FuzzPath(f *testing.F) {
	f.Add("/v1/customers/{customer-id}/users/{id}", "/v1/customers/7d1f0a52-9b3c-4c1e-8f60-2a5b9c0d1e11/users/x", "7d1f0a52-9b3c-4c1e-8f60-2a5b9c0d1e11")
	f.Add("/v1/customers/{customer-id}", "/v1/customers/7D1F0A52-9b3c-4c1e-8f60-2a5b9c0d1e11", "7d1f0a52-9b3c-4c1e-8f60-2a5b9c0d1e11")
	f.Add("/v1/{a}{b}/{c", "/v1/x/{c", "")
	f.Add("", "/x", "")
	f.Add("/v1/{a}", "/v1/", "")
	f.Add("/v1/{a}/b", "/V1/x/b/", "x")
	f.Add("{}{}{}{}{}", ":'\xcc", "")
	f.Fuzz(func(t *testing.T, route, path, customer string) {
		packed := packPath(path, route, customer)
		got, err := unpackPath(packed, route, customer)
		if err != nil || got != path {
			t.Errorf("path %q of route %q and customer %q comes back as %q, %v", path, route, customer, got, err)
		}
		if b, ok := packed.([]byte); ok && len(b) > len(path) {
			t.Errorf("path %q takes %d bytes", path, len(b))
		}
	})
}

func TestAPathIsKeptByItsValues(t *testing.T) {
	const customer = "7d1f0a52-9b3c-4c1e-8f60-2a5b9c0d1e11"
	for _, tt := range []struct {
		name, route, path string
		bytes             int // -1 for the path itself
	}{
		{"the customer is known", "/v1/customers/{customer-id}", "/v1/customers/" + customer, 0},
		{"no value at all", "/v1/invoices", "/v1/invoices", 0},
		{"a GUID besides", "/v1/customers/{customer-id}/orders/{order-id}", "/v1/customers/" + customer + "/orders/7d1f0a52-9b3c-4c1e-8f60-2a5b9c0d1e12", 18},
		{"a short text", "/v1/invoices/{invoice-id}", "/v1/invoices/G000123", 9},
		{"other letters than the route's", "/v1/invoices/{invoice-id}", "/v1/Invoices/G000123", -1},
		{"no documented route", "", "/favicon.ico", -1},
	} {
		packed := packPath(tt.path, tt.route, customer)
		size := -1
		switch p := packed.(type) {
		case nil:
			size = 0
		case []byte:
			size = len(p)
		}
		if size != tt.bytes {
			t.Errorf("%s: %T of %d bytes, want %d", tt.name, packed, size, tt.bytes)
		}
	}
}
