package store

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	sqlite3 "modernc.org/sqlite/lib"
)

// writer is the database as it is written: one connection, its statements, and
// what of its content is kept in memory. After an error it must be closed, since
// its memory may be ahead of the database.
type writer struct {
	joiner
	db   *sql.DB
	conn *sql.Conn

	folded   int64            // the greatest finish that is folded
	lastHour int64            // that has a folded call
	stripped map[string]int64 // by tenant, the hour before which retention of its own is applied
	pending  *pending         // the calls behind the fold
	foldAt   int              // how many of them are folded

	maxDims, maxCustomers int
	days                  map[int64]*admitted // by day
	dims, details, tokens dictionary

	insertOpen, deleteOpen, selectDim, insertDim, touchDim, insertDetail, insertToken  *sql.Stmt
	selectSums, insertSums, addHour, insertFold, insertIDs, insertGap, move, setFolded *sql.Stmt
	prepared                                                                           []*sql.Stmt // all of them

	// Rows of calls go past database/sql, which takes a quarter of their time.
	insertRow, insertRows driver.Stmt
	rows                  []row               // of the calls of a batch
	args                  []driver.NamedValue // of rowsAtOnce rows
}

// rowsAtOnce is how many rows of calls one statement inserts.
const rowsAtOnce = 8

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
		{&w.selectDim, "SELECT dim, day FROM dims WHERE hash = ?"},
		{&w.insertDim, "INSERT INTO dims (hash, day, what, integration, app_id, user_ref, verified, reason, status) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"},
		{&w.touchDim, "UPDATE dims SET day = max(day, ?) WHERE dim = ?"},
		{&w.insertDetail, "INSERT INTO details (detail, " + detailColumns + ") SELECT coalesce(max(detail) + 1, ?), " + marks(columns(detailColumns)) + " FROM details WHERE detail >= ? AND detail < ?"},
		{&w.insertToken, "INSERT INTO tokens (token, caller, uti, iat, exp) SELECT coalesce(max(token) + 1, ?), ?, ?, ?, ? FROM tokens WHERE token >= ? AND token < ?"},
		{&w.selectSums, "SELECT start, entries FROM sums WHERE kind = ? AND start BETWEEN ? AND ?"},
		{&w.insertSums, "INSERT INTO sums (kind, start, entries) VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET entries = excluded.entries"},
		{&w.addHour, `INSERT INTO hours (hour, low, high) VALUES (?, ?, ?)
			ON CONFLICT DO UPDATE SET low = min(low, excluded.low), high = max(high, excluded.high)`},
		{&w.insertFold, "INSERT INTO folds (high, postings) VALUES (?, ?) ON CONFLICT DO UPDATE SET postings = excluded.postings"},
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
	for _, d := range [...]*dictionary{&w.dims, &w.details, &w.tokens} {
		d.known = map[string]*entry{}
	}
	w.days, w.pending = map[int64]*admitted{}, newPending()
	w.open = map[string]*openCall{}
	var newest int64
	err := w.conn.QueryRowContext(ctx, "SELECT segment, offset, seq, newest, folded, (SELECT coalesce(max(hour), 0) FROM hours) FROM position").
		Scan(&w.position.Segment, &w.position.Offset, &w.seq, &newest, &w.folded, &w.lastHour)
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
		if err := decodeDecision(line, &o.call); err != nil {
			return fmt.Errorf("read open call: %w", err)
		}
		w.open[o.call.ID] = o
	}
	return rows.Err()
}

// loadPending reads the calls that are not folded yet.
func (w *writer) loadPending(ctx context.Context) error {
	rows, err := w.conn.QueryContext(ctx, selectCalls+"WHERE finish > ? ORDER BY finish", w.folded)
	if err != nil {
		return err
	}
	defer rows.Close()
	type both struct{ call, counted Call }
	var calls []both
	for rows.Next() {
		c, counted, err := scanCall(rows)
		if err != nil {
			return err
		}
		calls = append(calls, both{c, counted})
	}
	if err := rows.Err(); err != nil {
		return err
	}
	for i := range calls {
		c := &calls[i]
		day, err := w.admittedOn(ctx, dayNumber(c.call.Time))
		if err != nil {
			return err
		}
		dim, err := w.findDim(ctx, &c.counted, false)
		if err != nil {
			return err
		}
		if dim == nil {
			return fmt.Errorf("read calls: that of call %s is not in dims", c.call.ID)
		}
		day.admit(dim, &c.call)
		if err := w.count(ctx, &c.call, &c.counted, dim); err != nil {
			return err
		}
	}
	return nil
}

// count adds a call to what is pending.
func (w *writer) count(ctx context.Context, c, counted *Call, dim *entry) error {
	customer, customerDim, err := w.customer(ctx, c, counted, dim)
	if err != nil {
		return err
	}
	w.pending.add(c, counted, dim, customer, customerDim)
	return nil
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

// begin begins a batch. It is errBusy, and the writer as good as before, when another
// process holds the database for longer than SQLite waits.
func (w *writer) begin(context.Context) error {
	if _, err := w.conn.ExecContext(context.Background(), "BEGIN IMMEDIATE"); err != nil {
		if is(err, sqlite3.SQLITE_BUSY) {
			err = fmt.Errorf("%w: %w", errBusy, err)
		}
		return fmt.Errorf("write store: %w", err)
	}
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

// commit writes the batch in one transaction.
// The context of a caller who goes away must not tear it.
func (w *writer) commit(until context.Context, b *batch) error {
	ctx := context.Background()
	if err := w.write(ctx, b); err != nil {
		return fmt.Errorf("write store: %w", errors.Join(err, w.rollback(ctx)))
	}
	for tries := 1; ; tries++ {
		_, err := w.conn.ExecContext(ctx, "COMMIT")
		if err == nil {
			return nil
		}
		// A reader in the middle of a query is waited for; no other begins meanwhile.
		if !is(err, sqlite3.SQLITE_BUSY) || tries == commitTries || until.Err() != nil {
			return fmt.Errorf("write store: %w", errors.Join(err, w.rollback(ctx)))
		}
	}
}

// commitTries is how often a commit waits for SQLite's patience, 5 s.
const commitTries = 12

// rollback ends a transaction that failed. SQLite has ended it already after some
// errors; that this then fails says nothing.
func (w *writer) rollback(ctx context.Context) error {
	_, err := w.conn.ExecContext(ctx, "ROLLBACK")
	if err != nil && strings.Contains(err.Error(), "no transaction is active") {
		return nil
	}
	return err
}

func (w *writer) write(ctx context.Context, b *batch) error {
	fold := false
	w.rows = w.rows[:0]
	for _, o := range b.calls {
		w.pace()
		c := &o.call
		dim, counted, err := w.dim(ctx, c)
		if err != nil {
			return err
		}
		r := row{dim: dim.id}
		if r.rest, err = restOf(c, counted); err != nil {
			return err
		}
		if r.detail, err = w.detail(ctx, c); err != nil {
			return err
		}
		if r.token, err = w.token(ctx, counted, dim); err != nil {
			return err
		}
		w.rows = append(w.rows, r)
		if err := w.count(ctx, c, counted, dim); err != nil {
			return err
		}
		// Only what is behind the fold is looked for there.
		fold = fold || int64(c.Finish) <= w.folded
	}
	if err := w.conn.Raw(func(any) error { return w.insertCalls(ctx, b) }); err != nil {
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
func (w *writer) insertCalls(ctx context.Context, b *batch) error {
	for at := 0; at < len(b.calls); {
		w.pace()
		insert, n := w.insertRows, rowsAtOnce
		if len(b.calls)-at < n {
			insert, n = w.insertRow, 1
		}
		w.args = w.args[:0]
		for i := at; i < at+n; i++ {
			w.args = appendRow(w.args, &b.calls[i].call, w.rows[i])
		}
		if _, err := insert.(driver.StmtExecContext).ExecContext(ctx, w.args); err != nil {
			return err
		}
		at += n
	}
	return nil
}

// pruneRows is how many calls one transaction of prune removes.
const pruneRows = 1000

// prune removes a bounded number of the calls that began in hours that ended
// before cutoff, and with the last of them their sums. done says that none is left.
func (w *writer) prune(_ context.Context, cutoff time.Time) (done bool, err error) {
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
	if w.pending.sums.before(hour) {
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
	// The days of dims count with what is pending.
	if err := w.fold(ctx); err != nil {
		return false, err
	}
	day := hour / 24
	for query, before := range map[string]int64{
		"DELETE FROM sums WHERE kind IN (0, 2) AND start < ?": hour,
		"DELETE FROM sums WHERE kind IN (1, 3) AND start < ?": day,
		"DELETE FROM dims WHERE day < ?":                      day,
		"DELETE FROM details WHERE detail < ?":                firstDetail(day),
		"DELETE FROM tokens WHERE token < ?":                  firstToken(hour),
		"DELETE FROM gaps WHERE until < ?":                    hour * hourMicros,
	} {
		if _, err := w.exec(ctx, query, before); err != nil {
			return false, err
		}
	}
	if day < w.lastHour/24 { // its first hours are gone
		if err := w.sumDay(ctx, day); err != nil {
			return false, err
		}
	}
	for _, d := range [...]*dictionary{&w.dims, &w.details, &w.tokens} {
		clear(d.known)
	}
	clear(w.days)
	var oldest int64
	if err := w.conn.QueryRowContext(ctx, "SELECT coalesce(min(low), ?) FROM hours", w.folded+1).Scan(&oldest); err != nil {
		return false, err
	}
	if _, err := w.exec(ctx, "DELETE FROM folds WHERE high < ?", oldest); err != nil {
		return false, err
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

// dayNumber is the day since 1970 that t lies in, in UTC.
func dayNumber(t time.Time) int64 { return hourOf(t) / 24 }

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
