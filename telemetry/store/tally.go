package store

import (
	"cmp"
	"encoding/binary"
	"errors"
	"slices"
	"strings"

	"github.com/google/uuid"
)

// The kinds of sums: what they are of and for how long.
const (
	byRoute    = 0 // all that a dim has
	byCustomer = 2 // by customer; their dims have no route
	ofHour     = 0
	ofDay      = 1
)

// startMicros is when the hour or day start began, in microseconds since 1970.
func startMicros(kind int, start int64) int64 {
	if kind&ofDay != 0 {
		start *= 24
	}
	return start * hourMicros
}

// sumKey is what the calls of a sum have in common. customer is empty in sums by
// route.
type sumKey struct {
	customer string
	dim      int64
}

// sumValue counts calls, and holds when the first and the last of them began.
type sumValue struct{ calls, first, last int64 }

func (v sumValue) plus(w sumValue) sumValue {
	switch {
	case v.calls == 0:
		return w
	case w.calls == 0:
		return v
	}
	return sumValue{v.calls + w.calls, min(v.first, w.first), max(v.last, w.last)}
}

// tally is what calls come to that no sums were written of yet: by kind and hour.
type tally [byCustomer + 1]map[int64]map[sumKey]sumValue

func newTally() (t tally) {
	for _, by := range [...]int{byRoute, byCustomer} {
		t[by] = map[int64]map[sumKey]sumValue{}
	}
	return t
}

// count counts a call that began at a time, in microseconds since 1970.
func (t *tally) count(by int, hour int64, key sumKey, at int64) {
	sums := t[by][hour]
	if sums == nil {
		sums = map[sumKey]sumValue{}
		t[by][hour] = sums
	}
	sums[key] = sums[key].plus(sumValue{1, at, at})
}

// before reports whether a call is counted that began before hour.
func (t *tally) before(hour int64) bool {
	for h := range t[byRoute] {
		if h < hour {
			return true
		}
	}
	return false
}

type sumEntry struct {
	sumKey
	sumValue
}

func (e sumEntry) compare(f sumEntry) int {
	if e.customer != f.customer {
		return strings.Compare(e.customer, f.customer)
	}
	return cmp.Compare(e.dim, f.dim)
}

// sortedSums are the entries of m in the order in which they are stored.
func sortedSums(m map[sumKey]sumValue) []sumEntry {
	entries := make([]sumEntry, 0, len(m))
	for k, v := range m {
		entries = append(entries, sumEntry{k, v})
	}
	slices.SortFunc(entries, sumEntry.compare)
	return entries
}

// mergeSums adds b to a. Both are in order.
func mergeSums(a, b []sumEntry) []sumEntry {
	if len(a) == 0 {
		return b
	}
	out := make([]sumEntry, 0, len(a)+len(b))
	for len(a) > 0 && len(b) > 0 {
		switch order := a[0].compare(b[0]); {
		case order < 0:
			out, a = append(out, a[0]), a[1:]
		case order > 0:
			out, b = append(out, b[0]), b[1:]
		default:
			out = append(out, sumEntry{a[0].sumKey, a[0].plus(b[0].sumValue)})
			a, b = a[1:], b[1:]
		}
	}
	return append(append(out, a...), b...)
}

// appendSums encodes entries, which are in order: a group for each customer, in it for
// each dim the step from the one before, the calls, when the first began, counted from
// start, and when the last, counted from the first. All are uvarints.
func appendSums(b []byte, entries []sumEntry, start int64) []byte {
	for len(entries) > 0 {
		customer, n := entries[0].customer, 1
		for n < len(entries) && entries[n].customer == customer {
			n++
		}
		b = appendCustomer(b, customer)
		b = binary.AppendUvarint(b, uint64(n))
		dim := int64(0)
		for _, e := range entries[:n] {
			b = binary.AppendUvarint(b, uint64(e.dim-dim))
			b = binary.AppendUvarint(b, uint64(e.calls))
			b = binary.AppendUvarint(b, uint64(e.first-start))
			b = binary.AppendUvarint(b, uint64(e.last-e.first))
			dim = e.dim
		}
		entries = entries[n:]
	}
	return b
}

// appendCustomer writes 0 for none, 1 and 16 bytes for a GUID, else the length plus 1
// and the text.
func appendCustomer(b []byte, customer string) []byte {
	if customer == "" {
		return append(b, 0)
	}
	if guid, ok := parseGUID(customer); ok {
		return append(append(b, 1), guid[:]...)
	}
	return append(binary.AppendUvarint(b, uint64(len(customer)+1)), customer...)
}

var errSums = errors.New("sums are damaged")

// decodeSums hands the entries of b to visit, in order, until it returns false.
func decodeSums(b []byte, start int64, visit func(sumEntry) bool) error {
	var bad bool
	next := func() int64 {
		n, size := binary.Uvarint(b)
		if size <= 0 {
			b, bad = nil, true
			return 0
		}
		b = b[size:]
		return int64(n)
	}
	for len(b) > 0 {
		var e sumEntry
		if n := next(); n > 0 {
			n--
			guid := n == 0
			if guid {
				n = 16
			}
			if n > int64(len(b)) {
				return errSums
			}
			if guid {
				e.customer = uuid.UUID(b[:16]).String()
			} else {
				e.customer = string(b[:n])
			}
			b = b[n:]
		}
		for n := next(); n > 0 && !bad; n-- {
			e.dim += next()
			e.calls = next()
			e.first = start + next()
			e.last = e.first + next()
			if !bad && !visit(e) {
				return nil
			}
		}
	}
	if bad {
		return errSums
	}
	return nil
}

// posting says that the call that ended at finish has dim.
type posting struct{ dim, finish int64 }

// appendPostings encodes list, which it sorts: for each dim the step from the one
// before, the length of what follows, and the finishes, the first counted back from
// high, the others from the one before. All are uvarints.
func appendPostings(b []byte, list []posting, high int64) []byte {
	slices.SortFunc(list, func(a, b posting) int {
		return cmp.Or(cmp.Compare(a.dim, b.dim), cmp.Compare(a.finish, b.finish))
	})
	var finishes []byte
	dim := int64(0)
	for len(list) > 0 {
		this := list[0].dim
		finishes = binary.AppendUvarint(finishes[:0], uint64(high-list[0].finish))
		n := 1
		for ; n < len(list) && list[n].dim == this; n++ {
			finishes = binary.AppendUvarint(finishes, uint64(list[n].finish-list[n-1].finish))
		}
		b = binary.AppendUvarint(b, uint64(this-dim))
		b = binary.AppendUvarint(b, uint64(len(finishes)))
		b = append(b, finishes...)
		dim, list = this, list[n:]
	}
	return b
}

var errPostings = errors.New("postings are damaged")

// decodePostings hands the entries of b whose dim is wanted to visit.
func decodePostings(b []byte, high int64, wanted func(dim int64) bool, visit func(posting)) error {
	var p posting
	for len(b) > 0 {
		step, size := binary.Uvarint(b)
		if size <= 0 {
			return errPostings
		}
		b = b[size:]
		length, size := binary.Uvarint(b)
		if size <= 0 || length > uint64(len(b)-size) {
			return errPostings
		}
		list := b[size : size+int(length)]
		b = b[size+int(length):]
		if p.dim += int64(step); !wanted(p.dim) {
			continue
		}
		for first := true; len(list) > 0; first = false {
			n, size := binary.Uvarint(list)
			if size <= 0 {
				return errPostings
			}
			list = list[size:]
			if first {
				p.finish = high - int64(n)
			} else {
				p.finish += int64(n)
			}
			visit(p)
		}
	}
	return nil
}
