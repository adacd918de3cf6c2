package store

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/partnerguard/partnerguard/telemetry/ledger"
	sqlite3 "modernc.org/sqlite/lib"
)

// writer is the database as it is written: one connection, its statements, and
// what of its content is kept in memory. After an error it must be closed, since
// its memory may be ahead of the database.
type writer struct {
	db   *sql.DB
	conn *sql.Conn
	pace func() // called within long work, every few calls

	position ledger.Position
	seq      uint64
	newest   time.Time            // the latest beginning of a call
	open     map[string]*openCall // by call
	folded   int64                // the greatest finish that is folded
	pending  *pending             // the calls behind it
	foldAt   int                  // how many of them are folded
	dims     dictionary
	details  dictionary

	insertOpen, deleteOpen, selectDim, insertDim, touchDim, insertDetail, addSum, addHour, insertIDs, insertGap, move, setFolded *sql.Stmt
	prepared                                                                                                                     []*sql.Stmt // all of them

	// Rows of calls go past database/sql, which takes a quarter of their time.
	insertRow, insertRows driver.Stmt
	args                  []driver.NamedValue // of rowsAtOnce rows
}

// openCall is a decision that waits for its outcome.
type openCall struct {
	seq    uint64
	call   Call
	line   string // to be stored; empty when it is
	stored bool

	dim, detail int64 // once it has ended
}

const (
	// rowsAtOnce is how many rows of calls one statement inserts.
	rowsAtOnce = 8
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
		{&w.insertOpen, "INSERT OR REPLACE INTO open (call, seq, line) VALUES (?, ?, ?)"},
		{&w.deleteOpen, "DELETE FROM open WHERE call = ?"},
		{&w.selectDim, "SELECT dim, hour FROM dims WHERE hash = ?"},
		{&w.insertDim, "INSERT INTO dims (hash, hour, " + dimColumns + ") VALUES (?, ?, " + marks(columns(dimColumns)) + ")"},
		{&w.touchDim, "UPDATE dims SET hour = max(hour, ?) WHERE dim = ?"},
		{&w.insertDetail, "INSERT INTO details (detail, " + detailColumns + ") SELECT coalesce(max(detail) + 1, ?), " + marks(columns(detailColumns)) + " FROM details WHERE detail >= ? AND detail < ?"},
		{&w.addSum, `INSERT INTO sums (hour, dim, calls, first, last) VALUES (?, ?, ?, ?, ?)
			ON CONFLICT DO UPDATE SET calls = calls + excluded.calls, first = min(first, excluded.first), last = max(last, excluded.last)`},
		{&w.addHour, `INSERT INTO hours (hour, low, high) VALUES (?, ?, ?)
			ON CONFLICT DO UPDATE SET low = min(low, excluded.low), high = max(high, excluded.high)`},
		{&w.insertIDs, "INSERT INTO ids (run, entries) VALUES (?, ?) ON CONFLICT DO UPDATE SET entries = CAST(entries || excluded.entries AS BLOB)"},
		{&w.insertGap, "INSERT OR REPLACE INTO gaps (seq, calls, outcomes, since, until, cause) VALUES (?, ?, ?, ?, ?, ?)"},
		{&w.move, "UPDATE position SET segment = ?, offset = ?, seq = ?, newest = ?"},
		{&w.setFolded, "UPDATE position SET folded = ?"},
	} {
		if *p.to, err = w.conn.PrepareContext(ctx, p.sql); err != nil {
			return err
		}
		w.prepared = append(w.prepared, *p.to)
	}
	row := "(" + marks(columns(callColumns)) + ")"
	insert := "INSERT INTO calls (" + callColumns + ") VALUES " + row
	err = w.conn.Raw(func(conn any) error {
		c := conn.(driver.ConnPrepareContext)
		if w.insertRow, err = c.PrepareContext(ctx, insert); err != nil {
			return err
		}
		w.insertRows, err = c.PrepareContext(ctx, insert+strings.Repeat(", "+row, rowsAtOnce-1))
		return err
	})
	if err != nil {
		return err
	}
	return w.load(ctx)
}

// columns is how many columns a list of them names.
func columns(list string) int { return strings.Count(list, ",") + 1 }

// load reads what the writer keeps in memory.
func (w *writer) load(ctx context.Context) error {
	w.dims.known, w.details.known = map[string]*entry{}, map[string]*entry{}
	w.open, w.pending = map[string]*openCall{}, newPending()
	var newest int64
	err := w.conn.QueryRowContext(ctx, "SELECT segment, offset, seq, newest, folded FROM position").
		Scan(&w.position.Segment, &w.position.Offset, &w.seq, &newest, &w.folded)
	if err != nil {
		return err
	}
	if newest != 0 {
		w.newest = time.UnixMicro(newest).UTC()
	}
	if err := w.loadPending(ctx); err != nil {
		return err
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

// loadPending reads the calls that are not folded yet.
func (w *writer) loadPending(ctx context.Context) error {
	rows, err := w.conn.QueryContext(ctx, `SELECT finish, time, dim, call, request_id, correlation_id, upstream_request_id, upstream_correlation_id
		FROM calls WHERE finish > ?`, w.folded)
	if err != nil {
		return err
	}
	defer rows.Close()
	dims := map[int64]*entry{}
	for rows.Next() {
		var c Call
		var at, dim int64
		err := rows.Scan(&c.Finish, &at, &dim, idText{to: &c.ID}, idText{to: &c.RequestID}, idText{to: &c.CorrelationID},
			idText{to: &c.UpstreamRequestID, client: &c.RequestID}, idText{to: &c.UpstreamCorrelationID, client: &c.CorrelationID})
		if err != nil {
			return err
		}
		c.Time = time.UnixMicro(at)
		if dims[dim] == nil {
			dims[dim] = &entry{id: dim}
		}
		w.pending.add(&c, dims[dim])
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
		w.conn.Raw(func(any) error {
			for _, stmt := range []driver.Stmt{w.insertRow, w.insertRows} {
				if stmt != nil {
					errs = append(errs, stmt.Close())
				}
			}
			return nil
		})
		errs = append(errs, w.conn.Close())
	}
	return errors.Join(append(errs, w.db.Close())...)
}

// batch is one transaction.
type batch struct {
	w        *writer
	calls    []*openCall // that ended, with call.Finish set
	gone     []string    // open calls that are no longer
	gaps     []gap
	started  []*openCall
	position ledger.Position
	seq      uint64
	err      error // of the database, met while adding
}

type gap struct {
	seq      uint64
	Calls    int64     `json:"calls"`
	Outcomes int64     `json:"outcomes"`
	Since    time.Time `json:"since"`
	Until    time.Time `json:"until"`
	Cause    string    `json:"cause"`
}

// begin begins a batch. It is errBusy, and the writer as good as before, when another
// process holds the database for longer than SQLite waits.
func (w *writer) begin() (*batch, error) {
	if _, err := w.conn.ExecContext(context.Background(), "BEGIN IMMEDIATE"); err != nil {
		if is(err, sqlite3.SQLITE_BUSY) {
			err = fmt.Errorf("%w: %w", errBusy, err)
		}
		return nil, fmt.Errorf("write store: %w", err)
	}
	return &batch{w: w, position: w.position, seq: w.seq}, nil
}

// add takes one record in. An error says that it cannot be read; the batch goes on
// without it.
func (b *batch) add(e ledger.Entry) error {
	b.position, b.seq = e.Next, e.Seq
	w := b.w
	switch e.Type {
	case ledger.TypeDecision:
		o := &openCall{seq: e.Seq, line: string(e.Line)}
		if err := decode(o.line, &o.call); err != nil {
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
		if err := decode(string(e.Line), &end); err != nil {
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
		if known, b.err = b.w.holds(context.Background(), end.ID); b.err != nil {
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

// holds reports whether the call has ended in the database.
func (w *writer) holds(ctx context.Context, call string) (known bool, err error) {
	found, err := findID(ctx, w.conn, call)
	if err != nil {
		return false, err
	}
	for query, args := range map[string][]any{
		"finish > ?": {w.folded},
		"finish IN (SELECT value FROM json_each(?))": {jsonNumbers(found)},
	} {
		err := w.conn.QueryRowContext(ctx, "SELECT EXISTS (SELECT 1 FROM calls WHERE "+query+" AND call = ?)", append(args, packID(call))...).Scan(&known)
		if known || err != nil {
			return known, err
		}
	}
	return false, nil
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
	fold := false
	for _, o := range b.calls {
		w.pace()
		dim, err := w.dim(ctx, &o.call)
		if err != nil {
			return err
		}
		detail, err := w.detail(ctx, &o.call)
		if err != nil {
			return err
		}
		o.dim, o.detail = dim.id, detail
		w.pending.add(&o.call, dim)
		// Only what is behind the fold is looked for there.
		fold = fold || int64(o.call.Finish) <= w.folded
	}
	if err := w.conn.Raw(func(any) error { return b.insertCalls(ctx) }); err != nil {
		return err
	}
	if fold || w.pending.calls >= w.foldAt {
		if err := w.fold(ctx); err != nil {
			return err
		}
	}
	for _, call := range b.gone {
		if _, err := w.deleteOpen.ExecContext(ctx, call); err != nil {
			return err
		}
	}
	for _, o := range b.started {
		if !o.call.Open() || o.stored {
			continue
		}
		if _, err := w.insertOpen.ExecContext(ctx, o.call.ID, int64(o.seq), o.line); err != nil {
			return err
		}
		o.stored, o.line = true, ""
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

// insertCalls inserts the rows of the calls, past database/sql.
func (b *batch) insertCalls(ctx context.Context) error {
	w := b.w
	for calls := range slices.Chunk(b.calls, rowsAtOnce) {
		w.pace()
		insert, step := w.insertRows, len(calls)
		if len(calls) < rowsAtOnce {
			insert, step = w.insertRow, 1
		}
		for rows := range slices.Chunk(calls, step) {
			w.args = w.args[:0]
			for _, o := range rows {
				w.args = appendRow(w.args, &o.call, o.dim, o.detail)
			}
			if _, err := insert.(driver.StmtExecContext).ExecContext(ctx, w.args); err != nil {
				return err
			}
		}
	}
	return nil
}

// pruneRows is how many calls one transaction of prune removes.
const pruneRows = 1000

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
	if w.pending.before(hour) {
		if err := w.fold(ctx); err != nil {
			return false, err
		}
	}
	n, err := w.exec(ctx, `DELETE FROM calls WHERE finish IN (
		SELECT finish FROM calls
		WHERE finish BETWEEN (SELECT min(low) FROM hours WHERE hour < ?1) AND (SELECT max(high) FROM hours WHERE hour < ?1) AND time < ?2
		LIMIT ?3)`, hour, hour*hourMicros, pruneRows)
	if err != nil || n == pruneRows {
		return false, err
	}
	if n, err = w.exec(ctx, "DELETE FROM hours WHERE hour < ?", hour); err != nil || n == 0 {
		return true, err
	}
	// The hours of dims count with what is pending.
	if err := w.fold(ctx); err != nil {
		return false, err
	}
	for query, before := range map[string]int64{
		"DELETE FROM sums WHERE hour < ?":      hour,
		"DELETE FROM dims WHERE hour < ?":      hour,
		"DELETE FROM details WHERE detail < ?": firstDetail(hour),
		"DELETE FROM gaps WHERE until < ?":     hour * hourMicros,
	} {
		if _, err := w.exec(ctx, query, before); err != nil {
			return false, err
		}
	}
	clear(w.dims.known)
	clear(w.details.known)
	var oldest int64
	if err := w.conn.QueryRowContext(ctx, "SELECT coalesce(min(low), 0) FROM hours").Scan(&oldest); err != nil || oldest == 0 {
		return err == nil, err
	}
	for bucket := range w.pending.ids {
		if _, err := w.exec(ctx, "DELETE FROM ids WHERE run >= ? AND run < ?", runOf(bucket, 0), runOf(bucket, oldest)); err != nil {
			return false, err
		}
	}
	return true, nil
}

// exec returns how many rows a statement changed.
func (w *writer) exec(ctx context.Context, query string, args ...any) (int64, error) {
	res, err := w.conn.ExecContext(ctx, query, args...)
	if err != nil {
		return 0, err
	}
	return res.RowsAffected()
}

const hourMicros = int64(time.Hour / time.Microsecond)

// hourOf is the hour since 1970 that t lies in.
func hourOf(t time.Time) int64 { return t.Unix() / 3600 }

// jsonNumbers is what SQLite's json_each takes apart again.
func jsonNumbers(numbers []int64) string {
	b := []byte{'['}
	for i, n := range numbers {
		if i > 0 {
			b = append(b, ',')
		}
		b = strconv.AppendInt(b, n, 10)
	}
	return string(append(b, ']'))
}
