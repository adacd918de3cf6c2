package store

import (
	"bytes"
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/partnerguard/partnerguard/telemetry/ledger"
)

// writer is the database as it is written: one connection, its statements, and
// what of its content is kept in memory. After an error it must be closed, since
// its memory may be ahead of the database.
type writer struct {
	db   *sql.DB
	conn *sql.Conn

	position ledger.Position
	seq      uint64
	newest   time.Time            // the latest beginning of a call
	open     map[string]*openCall // by call
	dims     map[Dim]dimKey       // known to be in dims; emptied when it grows too large

	insertCall, insertID, insertOpen, deleteOpen, insertDim, addSum, addHour, insertGap, move *sql.Stmt
	prepared                                                                                  []*sql.Stmt // all of them
}

// openCall is a decision that waits for its outcome.
type openCall struct {
	seq    uint64
	call   Call
	line   []byte // to be stored; nil when it is
	stored bool
}

const (
	maxDims = 20_000
	// abandoned is the age at which a call without outcome counts as interrupted,
	// measured against the newest call. No call of Partner Center's takes hours; the
	// ledger itself ends the calls that a crash left open.
	abandoned = 24 * time.Hour
)

func (w *writer) init() error {
	ctx := context.Background()
	var err error
	if w.conn, err = w.db.Conn(ctx); err != nil {
		return err
	}
	version, err := checkSchema(ctx, w.conn)
	if err != nil {
		return err
	}
	if version == 0 {
		create := fmt.Sprintf("BEGIN IMMEDIATE; PRAGMA application_id = %d; PRAGMA user_version = %d; %s COMMIT", applicationID, schemaVersion, schema)
		if _, err := w.conn.ExecContext(ctx, create); err != nil {
			return err
		}
	}
	for _, p := range []struct {
		to  **sql.Stmt
		sql string
	}{
		{&w.insertCall, "INSERT INTO calls (finish, seq, " + callColumns + ") VALUES (?, ?" + strings.Repeat(", ?", strings.Count(callColumns, ",")+1) + ")"},
		{&w.insertID, "INSERT OR IGNORE INTO ids (hour, hash, finish) VALUES (?, ?, ?)"},
		{&w.insertOpen, "INSERT OR REPLACE INTO open (call, seq, line) VALUES (?, ?, ?)"},
		{&w.deleteOpen, "DELETE FROM open WHERE call = ?"},
		{&w.insertDim, "INSERT OR IGNORE INTO dims (dim, " + dimColumns + ") VALUES (?" + strings.Repeat(", ?", strings.Count(dimColumns, ",")+1) + ")"},
		{&w.addSum, `INSERT INTO sums (hour, dim, calls, first, last) VALUES (?, ?, ?, ?, ?)
			ON CONFLICT DO UPDATE SET calls = calls + excluded.calls, first = min(first, excluded.first), last = max(last, excluded.last)`},
		{&w.addHour, `INSERT INTO hours (hour, low, high) VALUES (?, ?, ?)
			ON CONFLICT DO UPDATE SET low = min(low, excluded.low), high = max(high, excluded.high)`},
		{&w.insertGap, "INSERT OR REPLACE INTO gaps (seq, calls, outcomes, since, until, cause) VALUES (?, ?, ?, ?, ?, ?)"},
		{&w.move, "UPDATE position SET segment = ?, offset = ?, seq = ?, newest = ?"},
	} {
		if *p.to, err = w.conn.PrepareContext(ctx, p.sql); err != nil {
			return err
		}
		w.prepared = append(w.prepared, *p.to)
	}
	return w.load(ctx)
}

// load reads what the writer keeps in memory.
func (w *writer) load(ctx context.Context) error {
	w.dims, w.open = map[Dim]dimKey{}, map[string]*openCall{}
	var newest int64
	err := w.conn.QueryRowContext(ctx, "SELECT segment, offset, seq, newest FROM position").
		Scan(&w.position.Segment, &w.position.Offset, &w.seq, &newest)
	if err != nil {
		return err
	}
	if newest != 0 {
		w.newest = time.UnixMicro(newest).UTC()
	}
	rows, err := w.conn.QueryContext(ctx, "SELECT seq, line FROM open")
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		o := &openCall{stored: true}
		var line []byte
		if err := rows.Scan(&o.seq, &line); err != nil {
			return err
		}
		if err := decode(line, &o.call); err != nil {
			return fmt.Errorf("read open call: %w", err)
		}
		w.open[o.call.ID] = o
	}
	return rows.Err()
}

// close closes the database. SQLite folds its log into the database only when no
// statement is left.
func (w *writer) close() error {
	var errs []error
	for _, stmt := range w.prepared {
		errs = append(errs, stmt.Close())
	}
	if w.conn != nil {
		errs = append(errs, w.conn.Close())
	}
	return errors.Join(append(errs, w.db.Close())...)
}

// batch is what one transaction will write.
type batch struct {
	w        *writer
	calls    []*openCall // that ended, with call.Finish set
	gone     []string    // open calls that are no longer
	sums     map[sumKey]*sumValue
	newDims  map[dimKey]Dim
	gaps     []gap
	started  []*openCall
	position ledger.Position
	seq      uint64
	err      error // of the database, met while adding
}

type dimKey [16]byte

type sumKey struct {
	hour int64
	dim  dimKey
}

type sumValue struct{ calls, first, last int64 }

type gap struct {
	seq      uint64
	Calls    int64     `json:"calls"`
	Outcomes int64     `json:"outcomes"`
	Since    time.Time `json:"since"`
	Until    time.Time `json:"until"`
	Cause    string    `json:"cause"`
}

func (w *writer) begin() *batch {
	return &batch{w: w, sums: map[sumKey]*sumValue{}, newDims: map[dimKey]Dim{}, position: w.position, seq: w.seq}
}

// add takes one record in. An error says that it cannot be read; the batch goes on
// without it.
func (b *batch) add(e ledger.Entry) error {
	b.position, b.seq = e.Next, e.Seq
	w := b.w
	switch e.Type {
	case ledger.TypeDecision:
		o := &openCall{seq: e.Seq, line: bytes.Clone(e.Line)}
		if err := decode(e.Line, &o.call); err != nil {
			return err
		}
		if o.call.Time.IsZero() {
			o.call.Time = timeOf(o.call.ID)
		}
		if o.call.Time.After(w.newest) {
			w.newest = o.call.Time
		}
		w.open[o.call.ID] = o
		b.started = append(b.started, o)
	case ledger.TypeOutcome:
		var end Call
		if err := decode(e.Line, &end); err != nil {
			return err
		}
		o := w.open[end.ID]
		if o == nil {
			return b.orphan(e.Seq, end)
		}
		o.call.Finished = end.Finished
		b.finish(o, e.Seq)
	case ledger.TypeGap:
		g := gap{seq: e.Seq}
		if err := json.Unmarshal(e.Line, &g); err != nil {
			return err
		}
		b.gaps = append(b.gaps, g)
	}
	return nil
}

// orphan takes in an outcome whose decision the ledger does not hold, or no longer.
func (b *batch) orphan(seq uint64, end Call) error {
	known := slices.ContainsFunc(b.calls, func(o *openCall) bool { return o.call.ID == end.ID })
	if !known {
		err := b.w.conn.QueryRowContext(context.Background(), "SELECT EXISTS (SELECT 1 FROM calls WHERE call = ?)", end.ID).Scan(&known)
		if err != nil {
			b.err = err
			return nil
		}
	}
	if known {
		return fmt.Errorf("second outcome of call %s", end.ID)
	}
	if end.Time.IsZero() {
		end.Time = timeOf(end.ID)
	}
	b.finish(&openCall{call: end}, seq)
	return nil
}

// timeOf is the time in a call id, a UUIDv7; 1970 for another id.
func timeOf(call string) time.Time {
	id, err := uuid.Parse(call)
	if err != nil || id.Version() != 7 {
		return time.Unix(0, 0).UTC()
	}
	return time.Unix(id.Time().UnixTime()).UTC()
}

// finish ends the call o at ledger number seq: it becomes a row and counts.
func (b *batch) finish(o *openCall, seq uint64) {
	o.call.Finish = seq
	b.calls = append(b.calls, o)
	delete(b.w.open, o.call.ID)
	if o.stored {
		b.gone = append(b.gone, o.call.ID)
	}
	at := o.call.Time.UnixMicro()
	key := sumKey{hourOf(o.call.Time), b.dim(dimOf(&o.call))}
	v := b.sums[key]
	if v == nil {
		v = &sumValue{first: at, last: at}
		b.sums[key] = v
	}
	v.calls, v.first, v.last = v.calls+1, min(v.first, at), max(v.last, at)
}

// dim returns the key of d, and has it stored if it is new.
func (b *batch) dim(d Dim) dimKey {
	if key, ok := b.w.dims[d]; ok {
		return key
	}
	if len(b.w.dims) >= maxDims {
		clear(b.w.dims)
	}
	key := d.key()
	b.w.dims[d], b.newDims[key] = key, d
	return key
}

// commit writes the batch in one transaction.
func (b *batch) commit() error {
	w := b.w
	if b.err != nil {
		return fmt.Errorf("write store: %w", b.err)
	}
	for _, o := range w.open {
		if w.newest.Sub(o.call.Time) > abandoned {
			o.call.Error = Interrupted
			b.finish(o, o.seq)
		}
	}
	// The context of a caller who goes away must not tear the transaction.
	ctx := context.Background()
	if _, err := w.conn.ExecContext(ctx, "BEGIN IMMEDIATE"); err != nil {
		return fmt.Errorf("write store: %w", err)
	}
	if err := b.write(ctx); err != nil {
		return fmt.Errorf("write store: %w", errors.Join(err, w.rollback(ctx)))
	}
	if _, err := w.conn.ExecContext(ctx, "COMMIT"); err != nil {
		return fmt.Errorf("write store: %w", errors.Join(err, w.rollback(ctx)))
	}
	w.position, w.seq = b.position, b.seq
	return nil
}

// rollback ends a transaction that failed. SQLite has ended it already after some
// errors; that this then fails says nothing.
func (w *writer) rollback(ctx context.Context) error {
	_, err := w.conn.ExecContext(ctx, "ROLLBACK")
	if err != nil && strings.Contains(err.Error(), "no transaction is active") {
		return nil
	}
	return err
}

func (b *batch) write(ctx context.Context) error {
	w := b.w
	args := make([]any, 0, 64)
	hours := map[int64][2]uint64{}
	for _, o := range b.calls {
		c := &o.call
		args = append(args[:0], int64(c.Finish), nullInt(int64(o.seq)))
		if _, err := w.insertCall.ExecContext(ctx, appendColumns(args, c)...); err != nil {
			return err
		}
		hour := hourOf(c.Time)
		for _, id := range c.ids() {
			if _, err := w.insertID.ExecContext(ctx, hour, idHash(id), int64(c.Finish)); err != nil {
				return err
			}
		}
		h, ok := hours[hour]
		if !ok {
			h = [2]uint64{c.Finish, c.Finish}
		}
		hours[hour] = [2]uint64{min(h[0], c.Finish), max(h[1], c.Finish)}
	}
	for hour, h := range hours {
		if _, err := w.addHour.ExecContext(ctx, hour, int64(h[0]), int64(h[1])); err != nil {
			return err
		}
	}
	for _, call := range b.gone {
		if _, err := w.deleteOpen.ExecContext(ctx, call); err != nil {
			return err
		}
	}
	for _, o := range b.started {
		if !o.call.Open() || o.line == nil {
			continue
		}
		if _, err := w.insertOpen.ExecContext(ctx, o.call.ID, int64(o.seq), string(o.line)); err != nil {
			return err
		}
		o.stored, o.line = true, nil
	}
	for key, d := range b.newDims {
		if _, err := w.insertDim.ExecContext(ctx, d.columns(key)...); err != nil {
			return err
		}
	}
	for key, v := range b.sums {
		if _, err := w.addSum.ExecContext(ctx, key.hour, key.dim[:], v.calls, v.first, v.last); err != nil {
			return err
		}
	}
	for _, g := range b.gaps {
		if _, err := w.insertGap.ExecContext(ctx, int64(g.seq), g.Calls, g.Outcomes, g.Since.UnixMicro(), g.Until.UnixMicro(), g.Cause); err != nil {
			return err
		}
	}
	newest := int64(0)
	if !w.newest.IsZero() {
		newest = w.newest.UnixMicro()
	}
	_, err := w.move.ExecContext(ctx, int64(b.position.Segment), b.position.Offset, int64(b.seq), newest)
	return err
}

// pruneRows is how many calls one transaction of prune removes.
const pruneRows = 2000

// prune removes a bounded number of the calls that began in hours that ended
// before cutoff, and with the last of them their sums. done says that none is left.
func (w *writer) prune(cutoff time.Time) (done bool, err error) {
	ctx := context.Background()
	before := hourOf(cutoff)
	if _, err := w.conn.ExecContext(ctx, "BEGIN IMMEDIATE"); err != nil {
		return false, fmt.Errorf("prune store: %w", err)
	}
	if done, err = w.pruneBefore(ctx, before); err != nil {
		return false, fmt.Errorf("prune store: %w", errors.Join(err, w.rollback(ctx)))
	}
	if _, err := w.conn.ExecContext(ctx, "COMMIT"); err != nil {
		return false, fmt.Errorf("prune store: %w", errors.Join(err, w.rollback(ctx)))
	}
	return done, nil
}

func (w *writer) pruneBefore(ctx context.Context, hour int64) (done bool, err error) {
	res, err := w.conn.ExecContext(ctx, `DELETE FROM calls WHERE finish IN (
		SELECT finish FROM calls
		WHERE finish BETWEEN (SELECT min(low) FROM hours WHERE hour < ?1) AND (SELECT max(high) FROM hours WHERE hour < ?1) AND time < ?2
		LIMIT ?3)`, hour, hour*hourMicros, pruneRows)
	if err != nil {
		return false, err
	}
	n, err := res.RowsAffected()
	if err != nil || n == pruneRows {
		return false, err
	}
	for _, q := range []string{"DELETE FROM ids WHERE hour < ?", "DELETE FROM sums WHERE hour < ?"} {
		if _, err := w.conn.ExecContext(ctx, q, hour); err != nil {
			return false, err
		}
	}
	res, err = w.conn.ExecContext(ctx, "DELETE FROM hours WHERE hour < ?", hour)
	if err != nil {
		return false, err
	}
	if n, err = res.RowsAffected(); err != nil || n == 0 {
		return true, err
	}
	if _, err := w.conn.ExecContext(ctx, "DELETE FROM gaps WHERE until < ?", hour*hourMicros); err != nil {
		return false, err
	}
	clear(w.dims)
	_, err = w.conn.ExecContext(ctx, "DELETE FROM dims WHERE dim NOT IN (SELECT dim FROM sums)")
	return true, err
}

const hourMicros = int64(time.Hour / time.Microsecond)

// hourOf is the hour since 1970 that t lies in.
func hourOf(t time.Time) int64 { return t.Unix() / 3600 }

// ids are the ids that a call can be found by besides its own, without repetition.
func (c *Call) ids() []string {
	ids := make([]string, 0, 4)
	for _, id := range [...]string{c.RequestID, c.CorrelationID, c.UpstreamRequestID, c.UpstreamCorrelationID} {
		if id != "" && !slices.Contains(ids, id) {
			ids = append(ids, id)
		}
	}
	return ids
}

// idHash is what ids holds of an id. Case does not count; what is found is compared
// with the id itself.
func idHash(id string) int64 {
	h := fnv.New64a()
	h.Write([]byte(strings.ToLower(id)))
	return int64(h.Sum64())
}

// key hashes d: 128 bits, so that the dims that callers can cause (a route, a
// customer) cannot be made to collide.
func (d *Dim) key() dimKey {
	h := sha256.New()
	var size [4]byte
	for _, v := range d.columns(dimKey{})[1:] {
		s := fmt.Sprint(v)
		binary.BigEndian.PutUint32(size[:], uint32(len(s)))
		h.Write(size[:])
		h.Write([]byte(s))
	}
	return dimKey(h.Sum(nil)[:16])
}
