package store

import (
	"context"
	"database/sql"
	"encoding/binary"
	"errors"
	"math"
	"slices"
)

// foldCalls is how many calls are folded at once. More make sums cheaper, which are
// written once a fold however many calls they count; readers and a start scan as
// many rows.
const foldCalls = 8192

// pending is what the calls come to that are not folded yet.
type pending struct {
	calls    int
	sums     tally
	hours    map[int64]span
	dims     map[*entry]bool // whose day grew
	postings []posting
	ids      idIndex
}

// span is a range of finishes, both ends included.
type span struct{ low, high int64 }

func newPending() *pending {
	return &pending{sums: newTally(), hours: map[int64]span{}, dims: map[*entry]bool{}}
}

// add takes c in, which counts as counted under dim.
func (p *pending) add(c, counted *Call, dim *entry, customer sumKey, customerDim *entry) {
	p.calls++
	hour, finish := hourOf(c.Time), int64(c.Finish)
	at := c.Time.UnixMicro()
	p.sums.count(byRoute, hour, sumKey{dim: dim.id}, at)
	p.sums.count(byCustomer, hour, customer, at)
	h, ok := p.hours[hour]
	if !ok {
		h = span{finish, finish}
	}
	p.hours[hour] = span{min(h.low, finish), max(h.high, finish)}
	for _, e := range [...]*entry{dim, customerDim} {
		if day := hour / 24; day > e.day {
			e.day = day
			p.dims[e] = true
		}
	}
	p.postings = append(p.postings, posting{dim.id, finish})
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
	p.ids.add(c.Customer, finish)
	p.ids.add(c.UserRef, finish)
	// What the dim does not say is found here.
	if c.AppID != counted.AppID {
		p.ids.add(c.AppID, finish)
	}
}

// fold writes what is pending. It belongs to the transaction that the last of the
// calls is written with, or a later one.
func (w *writer) fold(ctx context.Context) error {
	p := w.pending
	if p.calls == 0 {
		return nil
	}
	folded := w.folded
	for _, s := range p.hours {
		folded = max(folded, s.high)
	}
	if err := w.foldSums(ctx); err != nil {
		return err
	}
	for dim := range p.dims {
		w.pace()
		if _, err := w.touchDim.ExecContext(ctx, dim.day, dim.id); err != nil {
			return err
		}
	}
	if err := w.foldPostings(ctx, folded); err != nil {
		return err
	}
	if err := w.foldIDs(ctx, folded); err != nil {
		return err
	}
	if _, err := w.setFolded.ExecContext(ctx, folded); err != nil {
		return err
	}
	w.folded, w.pending = folded, newPending()
	return nil
}

// foldSums writes the sums: of hours always, of days once a later one has begun. Then
// a report over a month reads some thirty rows.
func (w *writer) foldSums(ctx context.Context) error {
	p := w.pending
	for _, by := range [...]int{byRoute, byCustomer} {
		for hour, sums := range p.sums[by] {
			w.pace()
			stored, err := w.readSums(ctx, by+ofHour, hour, hour)
			if err != nil {
				return err
			}
			if err := w.writeSums(ctx, by+ofHour, hour, mergeSums(stored, sortedSums(sums))); err != nil {
				return err
			}
		}
	}
	before := w.lastHour / 24
	ended := map[int64]bool{before: true}
	for hour, s := range p.hours {
		if _, err := w.addHour.ExecContext(ctx, hour, s.low, s.high); err != nil {
			return err
		}
		ended[hour/24] = true
		for tenant, before := range w.stripped { // a call that came late
			w.stripped[tenant] = min(before, hour)
		}
		w.lastHour = max(w.lastHour, hour)
	}
	for day := range ended {
		if day < w.lastHour/24 {
			if err := w.sumDay(ctx, day); err != nil {
				return err
			}
		}
	}
	return nil
}

// sumDay makes the sums of a day of those of its hours.
func (w *writer) sumDay(ctx context.Context, day int64) error {
	for _, by := range [...]int{byRoute, byCustomer} {
		sums, err := w.readSums(ctx, by+ofHour, day*24, day*24+23)
		if err != nil {
			return err
		}
		if err := w.writeSums(ctx, by+ofDay, day, sums); err != nil {
			return err
		}
	}
	return nil
}

// readSums returns what the sums of a kind from low to high come to, in order.
func (w *writer) readSums(ctx context.Context, kind int, low, high int64) ([]sumEntry, error) {
	rows, err := w.selectSums.QueryContext(ctx, kind, low, high)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var all []sumEntry
	for rows.Next() {
		var start int64
		var entries sql.RawBytes
		if err := rows.Scan(&start, &entries); err != nil {
			return nil, err
		}
		var sums []sumEntry
		err := decodeSums(entries, startMicros(kind, start), func(e sumEntry) bool {
			sums = append(sums, e)
			return true
		})
		if err != nil {
			return nil, err
		}
		w.pace()
		all = mergeSums(all, sums)
	}
	return all, rows.Err()
}

func (w *writer) writeSums(ctx context.Context, kind int, start int64, sums []sumEntry) error {
	if len(sums) == 0 {
		_, err := w.exec(ctx, "DELETE FROM sums WHERE kind = ? AND start = ?", kind, start)
		return err
	}
	_, err := w.insertSums.ExecContext(ctx, kind, start, appendSums(nil, sums, startMicros(kind, start)))
	return err
}

// foldOf returns the fold that finish belongs to: the first that ends there or later,
// so that folds lie apart and in order even when a call ends behind the last one.
func (w *writer) foldOf(ctx context.Context, finish, folded int64) (high int64, err error) {
	if finish > w.folded {
		return folded, nil
	}
	err = w.conn.QueryRowContext(ctx, "SELECT coalesce(min(high), ?) FROM folds WHERE high >= ?", folded, finish).Scan(&high)
	return high, err
}

func (w *writer) foldPostings(ctx context.Context, folded int64) error {
	folds := map[int64][]posting{}
	for _, p := range w.pending.postings {
		high, err := w.foldOf(ctx, p.finish, folded)
		if err != nil {
			return err
		}
		folds[high] = append(folds[high], p)
	}
	for high, list := range folds {
		w.pace()
		var stored []byte
		err := w.conn.QueryRowContext(ctx, "SELECT postings FROM folds WHERE high = ?", high).Scan(&stored)
		if err != nil && !errors.Is(err, sql.ErrNoRows) {
			return err
		}
		all := func(int64) bool { return true }
		if err := decodePostings(stored, high, all, func(p posting) { list = append(list, p) }); err != nil {
			return err
		}
		if _, err := w.insertFold.ExecContext(ctx, high, appendPostings(nil, list, high)); err != nil {
			return err
		}
	}
	return nil
}

// idIndex is an index of the ids of calls, by hash: a list of hash and finish in
// each of its buckets. The ids of one fold are a run, a row a bucket; that of a
// bucket is numbered so that its rows stand together, the oldest run first. A search
// reads one bucket of every run, 1/256 of the index.
//
// A B-tree row an id would cost about twenty times as much.
type idIndex [256][]idEntry

type idEntry struct {
	tag    uint32 // 24 bits of the id's hash besides those that chose the bucket
	finish int64
}

// idSize is the size of a stored entry: 3 bytes of tag, and 4 bytes of how far the
// finish lies before the end of the fold, big endian.
const idSize = 3 + 4

func (x *idIndex) add(id string, finish int64) {
	if id == "" {
		return
	}
	bucket, tag := idHash(id)
	x[bucket] = append(x[bucket], idEntry{tag, finish})
}

// runOf numbers the row of a bucket in the run that ends with a finish.
func runOf(bucket int, finish int64) int64 { return int64(bucket)<<48 | finish }

// foldIDs writes the ids.
func (w *writer) foldIDs(ctx context.Context, folded int64) error {
	for bucket, ids := range w.pending.ids {
		w.pace()
		folds := map[int64][]byte{}
		for _, id := range ids {
			high, err := w.foldOf(ctx, id.finish, folded)
			if err != nil {
				return err
			}
			back := min(high-id.finish, math.MaxUint32) // no fold is that long
			b := append(folds[high], byte(id.tag>>16), byte(id.tag>>8), byte(id.tag))
			folds[high] = binary.BigEndian.AppendUint32(b, uint32(back))
		}
		for high, entries := range folds {
			if _, err := w.insertIDs.ExecContext(ctx, runOf(bucket, high), entries); err != nil {
				return err
			}
		}
	}
	return nil
}

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
	return int(h >> 56), uint32(h>>32) & (1<<24 - 1)
}

// queryer is a connection or a transaction.
type queryer interface {
	QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error)
}

// findID returns the finishes of the folded calls that may have id, in order.
func findID(ctx context.Context, db queryer, id string) ([]int64, error) {
	bucket, tag := idHash(id)
	rows, err := db.QueryContext(ctx, "SELECT run, entries FROM ids WHERE run BETWEEN ? AND ?", runOf(bucket, 0), runOf(bucket+1, 0)-1)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var found []int64
	for rows.Next() {
		var run int64
		var entries sql.RawBytes
		if err := rows.Scan(&run, &entries); err != nil {
			return nil, err
		}
		high := run & (1<<48 - 1)
		for ; len(entries) >= idSize; entries = entries[idSize:] {
			if binary.BigEndian.Uint32(entries)>>8 == tag {
				found = append(found, high-int64(binary.BigEndian.Uint32(entries[3:])))
			}
		}
	}
	slices.Sort(found)
	return slices.Compact(found), rows.Err()
}

// findIDs returns the finishes of the folded calls that may have one id of each of
// all, in order.
func findIDs(ctx context.Context, db queryer, all [][]string) ([]int64, error) {
	var found []int64
	for i, some := range all {
		var any []int64
		for _, id := range some {
			finishes, err := findID(ctx, db, id)
			if err != nil {
				return nil, err
			}
			any = append(any, finishes...)
		}
		slices.Sort(any)
		any = slices.Compact(any)
		if i == 0 {
			found = any
			continue
		}
		found = slices.DeleteFunc(found, func(finish int64) bool {
			_, ok := slices.BinarySearch(any, finish)
			return !ok
		})
	}
	return found, nil
}

// findSpans returns where the folded calls lie that began in the hours from low to
// high, in order and apart. With dims, days without such a call are left out as far as
// that is known.
func findSpans(ctx context.Context, db queryer, low, high int64, dims map[int64]bool) ([]span, error) {
	without := map[int64]bool{} // days
	if dims != nil {
		rows, err := db.QueryContext(ctx, "SELECT start, entries FROM sums WHERE kind = ? AND start BETWEEN ? AND ?", byRoute+ofDay, low/24, high/24)
		if err != nil {
			return nil, err
		}
		defer rows.Close()
		for rows.Next() {
			var day int64
			var entries sql.RawBytes
			if err := rows.Scan(&day, &entries); err != nil {
				return nil, err
			}
			without[day] = true
			err := decodeSums(entries, 0, func(e sumEntry) bool {
				without[day] = !dims[e.dim]
				return without[day]
			})
			if err != nil {
				return nil, err
			}
		}
		if err := rows.Err(); err != nil {
			return nil, err
		}
	}
	rows, err := db.QueryContext(ctx, "SELECT hour, low, high FROM hours WHERE hour BETWEEN ? AND ? ORDER BY low", low, high)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var spans []span
	for rows.Next() {
		var hour int64
		var s span
		if err := rows.Scan(&hour, &s.low, &s.high); err != nil {
			return nil, err
		}
		if without[hour/24] {
			continue
		}
		if n := len(spans); n > 0 && s.low <= spans[n-1].high+1 {
			spans[n-1].high = max(spans[n-1].high, s.high)
			continue
		}
		spans = append(spans, s)
	}
	return spans, rows.Err()
}

// endless is behind every finish.
const endless = math.MaxInt64
