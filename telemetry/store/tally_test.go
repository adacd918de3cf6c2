package store

import (
	"bytes"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestSumsComeBackAsTheyWereStored(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	customers := []string{"", "x", "7d1f0a52-9b3c-4c1e-8f60-2a5b9c0d1e11", "7D1F0A52-9B3C-4C1E-8F60-2A5B9C0D1E11", strings.Repeat("c", 300), Other}
	for range 200 {
		const start = 494_000 * hourMicros
		m := map[sumKey]sumValue{}
		for range rng.IntN(40) {
			first := start + rng.Int64N(24*hourMicros)
			m[sumKey{customers[rng.IntN(len(customers))], rng.Int64N(1 << 40)}] = sumValue{1 + rng.Int64N(1<<30), first, first + rng.Int64N(hourMicros)}
		}
		want := sortedSums(m)
		var got []sumEntry
		if err := decodeSums(appendSums(nil, want, start), start, func(e sumEntry) bool { got = append(got, e); return true }); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got, cmp.AllowUnexported(sumEntry{}, sumKey{}, sumValue{}), cmp.Transformer("empty", func(e []sumEntry) []sumEntry { return append([]sumEntry{}, e...) })); len(want) > 0 && diff != "" {
			t.Fatalf("sums (-stored +read):\n%s", diff)
		}
		twice := mergeSums(want, want)
		for i, e := range twice {
			if e.calls != 2*want[i].calls || e.first != want[i].first || e.last != want[i].last || len(twice) != len(want) {
				t.Fatalf("merged with itself: %+v of %+v", e, want[i])
			}
		}
	}
}

func TestPostingsComeBackAsTheyWereStored(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	for range 200 {
		const high = 1 << 41
		var list []posting
		for range rng.IntN(300) {
			list = append(list, posting{rng.Int64N(20) << 20, high - rng.Int64N(1<<33)})
		}
		wanted := func(dim int64) bool { return dim>>20%3 != 0 }
		b := appendPostings(nil, list, high)
		want := slices.DeleteFunc(slices.Clone(list), func(p posting) bool { return !wanted(p.dim) })
		var got []posting
		if err := decodePostings(b, high, wanted, func(p posting) { got = append(got, p) }); err != nil || !slices.Equal(want, got) {
			t.Fatalf("%d postings come back as %d, %v", len(want), len(got), err)
		}
	}
}

// FuzzDecodeStored: damage is an error or other numbers, never more.
func FuzzDecodeStored(f *testing.F) {
	f.Add(appendSums(nil, []sumEntry{{sumKey{"", 7}, sumValue{1, 5, 9}}, {sumKey{"x", 7}, sumValue{1, 5, 9}}}, 0))
	f.Add(appendPostings(nil, []posting{{1, 2}, {1, 3}, {9, 1}}, 3))
	f.Add([]byte{1, 2, 3})
	f.Add(append(bytes.Repeat([]byte{1, 'x'}, 13), 0xf, 2, 2, 1, 'y'))
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1})
	f.Fuzz(func(t *testing.T, b []byte) {
		n := 0
		decodeSums(b, 0, func(sumEntry) bool { n++; return true })
		decodePostings(b, 0, func(int64) bool { return true }, func(posting) { n++ })
		decodeDim(b)
		if n > 2*len(b) {
			t.Errorf("%d entries of %d bytes", n, len(b))
		}
	})
}

func TestADimComesBackAsItWasStored(t *testing.T) {
	yes, no := true, false
	for name, c := range map[string]Call{
		"nothing": {},
		"all": {Decided: Decided{Integration: "i", Owner: "o", TenantID: "t", AppID: "a", UserRef: "u", Kind: "k", Verified: true, Route: "r", Mode: "m",
			Effect: "e", Reason: "r\x00\x1f", WouldReject: true, MFA: "p", AMR: []string{"pwd", `m"f\a`, ""}},
			Finished: Finished{Status: 401, Rejection: "j", Code: strings.Repeat("9", 300), MFACompliant: &yes}},
		"judged not compliant": {Decided: Decided{AMR: []string{"pwd"}}, Finished: Finished{Status: -1, MFACompliant: &no}},
	} {
		var d dictionary
		d.appendDim(&c)
		got, err := decodeDim(d.key)
		if diff := cmp.Diff(dimOf(&c), got); err != nil || diff != "" {
			t.Errorf("%s: %v (-stored +read):\n%s", name, err, diff)
		}
		if diff := cmp.Diff(c.AMR, got.Methods()); diff != "" {
			t.Errorf("%s: methods (-stored +read):\n%s", name, diff)
		}
		for n := range d.key {
			if _, err := decodeDim(d.key[:n]); err == nil {
				t.Errorf("%s: the first %d of %d bytes are no error", name, n, len(d.key))
			}
		}
	}
}
