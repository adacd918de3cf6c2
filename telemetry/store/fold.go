package store

import (
	"context"
	"database/sql"
	"encoding/binary"
	"math"
	"slices"
	"strings"
)

// foldCalls is how many calls are folded at once. More make sums cheaper, which are
// written once a fold however many calls they count; readers and a start scan as
// many rows.
const foldCalls = 8192

// pending is what the calls come to that are not folded yet.
type pending struct {
	calls int
	sums  map[sumKey]sumValue
	hours map[int64]span
	dims  map[*entry]bool // whose hour grew
	ids   idIndex
}

type sumKey struct{ hour, dim int64 }

type sumValue struct{ calls, first, last int64 }

// span is a range of finishes, both ends included.
type span struct{ low, high int64 }

func newPending() *pending {
	return &pending{sums: map[sumKey]sumValue{}, hours: map[int64]span{}, dims: map[*entry]bool{}}
}

func (p *pending) add(c *Call, dim *entry) {
	p.calls++
	at, hour, finish := c.Time.UnixMicro(), hourOf(c.Time), int64(c.Finish)
	key := sumKey{hour, dim.id}
	v, ok := p.sums[key]
	if !ok {
		v = sumValue{first: at, last: at}
	}
	p.sums[key] = sumValue{v.calls + 1, min(v.first, at), max(v.last, at)}
	h, ok := p.hours[hour]
	if !ok {
		h = span{finish, finish}
	}
	p.hours[hour] = span{min(h.low, finish), max(h.high, finish)}
	if hour > dim.hour {
		dim.hour = hour
		p.dims[dim] = true
	}
	p.ids.add(c.ID, finish)
	p.ids.add(c.RequestID, finish)
	if c.CorrelationID != c.RequestID {
		p.ids.add(c.CorrelationID, finish)
	}
	if id := c.UpstreamRequestID; id != c.RequestID && id != c.CorrelationID {
		p.ids.add(id, finish)
	}
	if id := c.UpstreamCorrelationID; id != c.RequestID && id != c.CorrelationID && id != c.UpstreamRequestID {
		p.ids.add(id, finish)
	}
}

// before reports whether a call that began before hour waits to be folded.
func (p *pending) before(hour int64) bool {
	for h := range p.hours {
		if h < hour {
			return true
		}
	}
	return false
}

// fold writes what is pending. It belongs to the transaction that the last of the
// calls is written with, or a later one.
func (w *writer) fold(ctx context.Context) error {
	p := w.pending
	if p.calls == 0 {
		return nil
	}
	for key, v := range p.sums {
		w.pace()
		if _, err := w.addSum.ExecContext(ctx, key.hour, key.dim, v.calls, v.first, v.last); err != nil {
			return err
		}
	}
	for hour, s := range p.hours {
		if _, err := w.addHour.ExecContext(ctx, hour, s.low, s.high); err != nil {
			return err
		}
	}
	for dim := range p.dims {
		w.pace()
		if _, err := w.touchDim.ExecContext(ctx, dim.hour, dim.id); err != nil {
			return err
		}
	}
	folded := w.folded
	for _, s := range p.hours {
		folded = max(folded, s.high)
	}
	for bucket, entries := range p.ids {
		if len(entries) == 0 {
			continue
		}
		w.pace()
		if _, err := w.insertIDs.ExecContext(ctx, runOf(bucket, folded), entries); err != nil {
			return err
		}
	}
	if _, err := w.setFolded.ExecContext(ctx, folded); err != nil {
		return err
	}
	w.folded, w.pending = folded, newPending()
	return nil
}

// idIndex is an index of the ids of calls, by hash: a list of hash and finish in
// each of its buckets. The ids of one fold are a run, a row a bucket; that of a
// bucket is numbered so that its rows stand together, the oldest run first. A search
// reads one bucket of every run, 1/64 of the index.
//
// A B-tree row an id would cost about twenty times as much.
type idIndex [64][]byte

// idEntry is the size of an entry: 4 bytes of the id's hash besides those that chose
// the bucket, and 6 bytes of the finish, big endian.
const idEntry = 4 + 6

func (x *idIndex) add(id string, finish int64) {
	if id == "" {
		return
	}
	bucket, tag := idHash(id)
	b := binary.BigEndian.AppendUint32(x[bucket], tag)
	x[bucket] = append(b, byte(finish>>40), byte(finish>>32), byte(finish>>24), byte(finish>>16), byte(finish>>8), byte(finish))
}

// runOf numbers the row of a bucket in the run that ends with a finish.
func runOf(bucket int, finish int64) int64 { return int64(bucket)<<48 | finish }

// idHash is FNV-1a of an id whose case does not count. What it finds is compared
// with the id itself.
func idHash(id string) (bucket int, tag uint32) {
	h := uint64(14695981039346656037)
	for i := range len(id) {
		c := id[i]
		if 'A' <= c && c <= 'Z' {
			c += 'a' - 'A'
		}
		h = (h ^ uint64(c)) * 1099511628211
	}
	h ^= h >> 32 // FNV's upper bits hardly depend on the last characters
	h *= 0xd6e8feb86659fd93
	return int(h >> 58), uint32(h >> 26)
}

// queryer is a connection or a transaction.
type queryer interface {
	QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error)
}

// findID returns the finishes of the folded calls that may have id, in order.
func findID(ctx context.Context, db queryer, id string) ([]int64, error) {
	bucket, tag := idHash(id)
	rows, err := db.QueryContext(ctx, "SELECT entries FROM ids WHERE run BETWEEN ? AND ?", runOf(bucket, 0), runOf(bucket+1, 0)-1)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var found []int64
	for rows.Next() {
		var entries sql.RawBytes
		if err := rows.Scan(&entries); err != nil {
			return nil, err
		}
		for ; len(entries) >= idEntry; entries = entries[idEntry:] {
			if binary.BigEndian.Uint32(entries) == tag {
				found = append(found, int64(binary.BigEndian.Uint64(entries[2:])&(1<<48-1)))
			}
		}
	}
	slices.Sort(found)
	return slices.Compact(found), rows.Err()
}

// findSpans returns where the folded calls lie that began in the hours from low to
// high, in order and apart. With dims, a condition on them, hours without such a
// call are left out.
func findSpans(ctx context.Context, db queryer, low, high int64, dims []string, args []any) ([]span, error) {
	query := "SELECT low, high FROM hours WHERE hour BETWEEN ? AND ?"
	if len(dims) > 0 {
		query += " AND EXISTS (SELECT 1 FROM sums WHERE sums.hour = hours.hour AND " + dimIn(dims) + ")"
	}
	rows, err := db.QueryContext(ctx, query+" ORDER BY low", append([]any{low, high}, args...)...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var spans []span
	for rows.Next() {
		var s span
		if err := rows.Scan(&s.low, &s.high); err != nil {
			return nil, err
		}
		if n := len(spans); n > 0 && s.low <= spans[n-1].high+1 {
			spans[n-1].high = max(spans[n-1].high, s.high)
			continue
		}
		spans = append(spans, s)
	}
	return spans, rows.Err()
}

// dimIn is the condition that a row's dim meets conds.
func dimIn(conds []string) string {
	return "dim IN (SELECT dim FROM dims WHERE " + strings.Join(conds, " AND ") + ")"
}

// endless is behind every finish.
const endless = math.MaxInt64
