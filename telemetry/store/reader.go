package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/partnerguard/partnerguard/telemetry/ledger"
	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"
)

// sqliteReader is a Reader of a data directory, beside a Store that may be
// writing it in another process. It is safe for concurrent use.
type sqliteReader struct {
	dir    string
	db     *sql.DB
	source func(from ledger.Position) (Source, error)
}

// ErrNoStore says that a data directory holds no store yet.
var ErrNoStore = errors.New("there is no store")

// OpenReader opens the database of the data directory dir for reading. The error
// wraps ErrNoStore when there is none; where there is a way out, it has a method
// Hint() string.
func OpenReader(dir string) (Reader, error) {
	path := dbPath(dir)
	none := &hintError{
		fmt.Errorf("open store in %s: %w", dir, ErrNoStore),
		"partnerguard serve and demo write one as calls come in; name their data directory with --data-dir",
	}
	if _, err := os.Stat(path); errors.Is(err, os.ErrNotExist) {
		return nil, none
	} else if err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	// Only ro: a reader of a database that was replaced takes the new one's journal for
	// its own, and must not act on it.
	db, err := openSQLite(path, "ro", time.Minute, "query_only(1)", "cache_size(-16384)")
	if err != nil {
		return nil, err
	}
	// A database that was rebuilt is another file: find it within a minute.
	db.SetConnMaxLifetime(time.Minute)
	db.SetMaxOpenConns(4)
	r := &sqliteReader{
		dir: dir, db: db,
		source: func(from ledger.Position) (Source, error) { return ledger.NewReader(dir, from) },
	}
	version, err := r.version()
	if halfDone(err) {
		if err = undo(path); err == nil {
			version, err = r.version()
		}
	}
	switch {
	case err != nil:
		db.Close()
		return nil, r.fail(err)
	case version == 0:
		db.Close()
		return nil, none
	}
	return r, nil
}

func (r *sqliteReader) version() (int, error) {
	ctx := context.Background()
	conn, err := r.db.Conn(ctx)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	return checkSchema(ctx, conn)
}

// halfDone reports whether err says that a writer was killed in the middle of a
// transaction. Who may write has to undo it before anybody can read.
func halfDone(err error) bool {
	var e *sqlite.Error
	return errors.As(err, &e) && e.Code() == sqlite3.SQLITE_READONLY_ROLLBACK
}

// undo does that.
func undo(path string) error {
	db, err := openSQLite(path, "rw", time.Minute)
	if err != nil {
		return err
	}
	_, err = db.Exec("SELECT count(*) FROM sqlite_schema")
	return errors.Join(err, db.Close())
}

func (r *sqliteReader) Close() error { return r.db.Close() }

// fail says what was being done, and what to do about it.
func (r *sqliteReader) fail(err error) error {
	out := fmt.Errorf("read store in %s: %w", r.dir, err)
	switch {
	case damaged(err):
		return &hintError{out, "the calls are safe in the ledger: stop partnerguard serve, run partnerguard ledger rebuild, start it again"}
	case halfDone(err):
		return &hintError{out, "who wrote it was killed in the middle: run this again as a user who may write it, or start partnerguard serve"}
	case errors.Is(err, errOutdated):
		return &hintError{out, "run partnerguard ledger rebuild, or start partnerguard serve of this version"}
	}
	return out
}

func (r *sqliteReader) Lag(ctx context.Context) (time.Duration, error) {
	var at ledger.Position
	if err := r.db.QueryRowContext(ctx, "SELECT segment, offset FROM position").Scan(&at.Segment, &at.Offset); err != nil {
		return 0, r.fail(err)
	}
	src, err := r.source(at)
	if errors.Is(err, ledger.ErrPosition) {
		return 0, nil // the ledger was removed: nothing is to come
	}
	if err != nil {
		return 0, err
	}
	defer src.Close()
	for {
		e, err := src.Next()
		var damage *ledger.DamageError
		switch {
		case errors.Is(err, io.EOF):
			return 0, nil
		case errors.As(err, &damage):
			continue
		case err != nil:
			return 0, err
		}
		var c Call
		if e.Type != ledger.TypeDecision && e.Type != ledger.TypeOutcome || decode(e.Line, &c) != nil {
			continue
		}
		if c.Time.IsZero() { // an outcome: it came that long after its call began
			c.Time = timeOf(c.ID).Add(time.Duration(c.DurationMS * float64(time.Millisecond)))
		}
		return max(0, time.Since(c.Time)), nil
	}
}

func (r *sqliteReader) Identities(context.Context) (map[string]Identity, error) {
	return ledger.Identities(r.dir)
}

func (r *sqliteReader) LastFinish(ctx context.Context) (uint64, error) {
	var n uint64
	if err := r.db.QueryRowContext(ctx, "SELECT coalesce(max(finish), 0) FROM calls").Scan(&n); err != nil {
		return 0, r.fail(err)
	}
	return n, nil
}

// Filter says which calls. All that is given must hold; the zero Filter is every
// call.
type Filter struct {
	Since time.Time // that began then or later
	Until time.Time // that began before

	Instance      string // of the guard
	Integration   string
	User          string // user principal name, object id or user_ref
	App           string // application id
	Customer      string // customer tenant id
	Status        string // "401", or a class: "4xx"
	Reason        string
	Call          string
	RequestID     string // the client's or Microsoft's
	CorrelationID string // the client's or Microsoft's

	// Limit, if greater than 0, is the number of calls that ended to deliver: the
	// latest, or with AfterFinish the first.
	Limit int
	// AfterFinish leaves out the calls up to this Finish.
	AfterFinish uint64
	// EndedOnly leaves out the calls that have no outcome yet. A follower sets it,
	// and AfterFinish to the last Finish it has seen: so it gets each call once.
	EndedOnly bool
}

// ParseStatus checks a status filter and returns the range it stands for.
func ParseStatus(s string) (low, high int64, err error) {
	if digit, ok := strings.CutSuffix(strings.ToLower(s), "xx"); ok {
		if n, err := strconv.ParseInt(digit, 10, 64); err == nil && n >= 1 && n <= 5 {
			return n * 100, n*100 + 99, nil
		}
	} else if n, err := strconv.ParseInt(s, 10, 64); err == nil && n >= 100 && n <= 599 {
		return n, n, nil
	}
	return 0, 0, fmt.Errorf("status %q is not known; write one such as 401, or a class such as 4xx", s)
}

// page is how many calls are read at once. Between pages no transaction is open,
// so that a slow receiver does not keep SQLite's log from being recycled.
const page = 500

func (r *sqliteReader) Calls(ctx context.Context, f Filter, yield func(Call) error) error {
	q, err := r.query(f)
	if err != nil {
		return err
	}
	parts, err := r.plan(ctx, q, f)
	if err == nil && f.Limit > 0 && f.AfterFinish == 0 {
		parts, err = r.latest(ctx, q, parts, f.Limit)
	}
	if err != nil {
		return r.fail(err)
	}
	left := math.MaxInt
	if f.Limit > 0 {
		left = f.Limit
	}
	for i := range parts {
		last := i == len(parts)-1
		for more := left > 0 || last; more; more = more && left > 0 {
			var calls, open []Call
			if calls, open, more, err = r.page(ctx, q, &parts[i], left, last && !f.EndedOnly); err != nil {
				return r.fail(err)
			}
			left -= len(calls)
			for _, c := range append(calls, open...) {
				if err := yield(c); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

func (r *sqliteReader) OpenCalls(ctx context.Context) ([]Call, error) {
	q, err := r.query(Filter{})
	if err != nil {
		return nil, err
	}
	_, open, _, err := r.page(ctx, q, &part{span: span{endless, endless}}, 0, true)
	if err != nil {
		return nil, r.fail(err)
	}
	return open, nil
}

// part is a part of calls to look through: a span of finishes, and if it is listed,
// of these the ones in list.
type part struct {
	span
	listed bool
	list   []int64 // in order
	fold   int64   // the fold that the list is still to be read from; 0 for none
}

// plan returns where the calls can be that q selects, in order. The last part holds
// the calls that are not folded, or were not when plan was called: calls that end
// meanwhile are found there.
func (r *sqliteReader) plan(ctx context.Context, q *query, f Filter) ([]part, error) {
	tx, err := r.db.BeginTx(ctx, nil)
	if err != nil {
		return nil, err
	}
	defer tx.Rollback()
	var folded int64
	if err := tx.QueryRowContext(ctx, "SELECT folded FROM position").Scan(&folded); err != nil {
		return nil, err
	}
	after := int64(f.AfterFinish)
	low, high := hourRange(f.Since, f.Until)
	var parts []part
	switch {
	case after >= folded:
	case len(q.ids) > 0:
		found, err := findIDs(ctx, tx, q.ids)
		if err != nil {
			return nil, err
		}
		parts = []part{{span: span{0, folded}, listed: true, list: found}}
	case len(q.dims) > 0:
		if parts, err = foldsOf(ctx, tx, q, low, high, after); err != nil {
			return nil, err
		}
	case !f.Since.IsZero() || !f.Until.IsZero():
		spans, err := findSpans(ctx, tx, low, high, nil)
		if err != nil {
			return nil, err
		}
		for _, s := range spans {
			parts = append(parts, part{span: span{s.low, min(s.high, folded)}})
		}
	default:
		parts = []part{{span: span{0, folded}}}
	}
	parts = append(parts, part{span: span{folded + 1, endless}})
	for i := range parts {
		p := &parts[i]
		p.low = max(p.low, after+1)
		from, _ := slices.BinarySearch(p.list, p.low)
		p.list = p.list[from:]
	}
	return parts, nil
}

// foldsOf finds the dims that q selects, and returns the folds that can hold calls of
// theirs which began in the hours from low to high.
func foldsOf(ctx context.Context, tx queryer, q *query, low, high, after int64) ([]part, error) {
	dims, err := numbers(ctx, tx, "SELECT dim FROM dims WHERE "+strings.Join(q.dims, " AND "), q.dimArgs...)
	if err != nil {
		return nil, err
	}
	q.found = make(map[int64]bool, len(dims))
	for _, dim := range dims {
		q.found[dim] = true
	}
	q.widened = nil
	for _, value := range q.values {
		finishes, err := findID(ctx, tx, value)
		if err != nil {
			return nil, err
		}
		q.widened = append(q.widened, finishes...)
	}
	slices.Sort(q.widened)
	if len(q.found) == 0 && len(q.widened) == 0 {
		return nil, nil
	}
	spans, err := findSpans(ctx, tx, low, high, q.found)
	if err != nil {
		return nil, err
	}
	highs, err := numbers(ctx, tx, "SELECT high FROM folds ORDER BY high")
	if err != nil {
		return nil, err
	}
	var parts []part
	begin := int64(0)
	for _, end := range highs {
		for len(spans) > 0 && spans[0].high < begin {
			spans = spans[1:]
		}
		if end > after && (len(spans) > 0 && spans[0].low <= end || len(within(q.widened, span{begin, end})) > 0) {
			parts = append(parts, part{span: span{begin, end}, listed: true, fold: end})
		}
		begin = end + 1
	}
	return parts, nil
}

func numbers(ctx context.Context, db queryer, query string, args ...any) ([]int64, error) {
	rows, err := db.QueryContext(ctx, query, args...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var all []int64
	for rows.Next() {
		var n int64
		if err := rows.Scan(&n); err != nil {
			return nil, err
		}
		all = append(all, n)
	}
	return all, rows.Err()
}

// within is the part of a sorted list that lies in s.
func within(list []int64, s span) []int64 {
	from, _ := slices.BinarySearch(list, s.low)
	to, _ := slices.BinarySearch(list[from:], s.high+1)
	return list[from : from+to]
}

// read reads the list of a fold.
func (p *part) read(ctx context.Context, db queryer, q *query) error {
	if p.fold == 0 {
		return nil
	}
	rows, err := db.QueryContext(ctx, "SELECT postings FROM folds WHERE high = ?", p.fold)
	if err != nil {
		return err
	}
	defer rows.Close()
	list := slices.Clone(within(q.widened, p.span))
	for rows.Next() { // none when retention took it meanwhile
		var postings sql.RawBytes
		if err := rows.Scan(&postings); err != nil {
			return err
		}
		wanted := func(dim int64) bool { return q.found[dim] }
		if err := decodePostings(postings, p.fold, wanted, func(f posting) { list = append(list, f.finish) }); err != nil {
			return err
		}
	}
	slices.Sort(list)
	p.list, p.fold = within(slices.Compact(list), p.span), 0
	return rows.Err()
}

// where is the condition of q on a row in s, and in list if that is not nil.
func (q *query) where(s span, list []int64) (cond string, args []any) {
	cond, args = "finish BETWEEN ? AND ?", []any{s.low, s.high}
	if list != nil {
		cond, args = cond+" AND finish IN (SELECT value FROM json_each(?))", append(args, jsonNumbers(list))
	}
	for _, c := range q.conds {
		cond += " AND " + c
	}
	args = append(args, q.args...)
	if len(q.dims) > 0 {
		cond += " AND EXISTS (SELECT 1 FROM dims WHERE dims.dim = calls.dim AND " + strings.Join(q.rowDims, " AND ") + ")"
		args = append(args, q.rowDimArgs...)
	}
	return cond, args
}

// latest returns parts from the latest n calls of theirs on.
func (r *sqliteReader) latest(ctx context.Context, q *query, parts []part, n int) ([]part, error) {
	for i := len(parts) - 1; i >= 0; i-- {
		p := &parts[i]
		if err := p.read(ctx, r.db, q); err != nil {
			return nil, err
		}
		rest := p.list
		for more := true; more; {
			var some []int64
			if p.listed {
				if len(rest) == 0 {
					break
				}
				from := max(0, len(rest)-page)
				rest, some = rest[:from], rest[from:]
			} else {
				more = false
			}
			cond, args := q.where(p.span, some)
			var first, found int64
			err := r.db.QueryRowContext(ctx, "SELECT coalesce(min(finish), 0), count(*) FROM (SELECT finish FROM calls WHERE "+cond+" ORDER BY finish DESC LIMIT ?)",
				append(args, n)...).Scan(&first, &found)
			if err != nil {
				return nil, err
			}
			if n -= int(found); n == 0 {
				p.low = first
				p.list = within(p.list, p.span)
				return parts[i:], nil
			}
		}
	}
	return parts, nil
}

// page reads the next calls of p, up to n, and makes it begin behind them. more says
// that it may have some yet. With the last calls come the open ones as of the same
// moment, if wanted.
func (r *sqliteReader) page(ctx context.Context, q *query, p *part, n int, wantOpen bool) (calls, open []Call, more bool, err error) {
	tx, err := r.db.BeginTx(ctx, nil)
	if err != nil {
		return nil, nil, false, err
	}
	defer tx.Rollback()
	if err := p.read(ctx, tx, q); err != nil {
		return nil, nil, false, err
	}
	var list []int64
	if p.listed {
		if len(p.list) == 0 {
			return nil, nil, false, nil
		}
		list = p.list[:min(page, len(p.list))]
		p.list = p.list[len(list):]
	}
	want := min(page, n)
	cond, args := q.where(p.span, list)
	rows, err := tx.QueryContext(ctx, selectCalls+"WHERE "+cond+" ORDER BY finish LIMIT ?", append(args, want)...)
	if err != nil {
		return nil, nil, false, err
	}
	defer rows.Close()
	for rows.Next() {
		c, _, err := scanCall(rows)
		if err != nil {
			return nil, nil, false, err
		}
		calls = append(calls, c)
	}
	if err := rows.Err(); err != nil {
		return nil, nil, false, err
	}
	if p.listed {
		more = len(p.list) > 0
	} else if more = len(calls) == want && want < n; more {
		p.low = int64(calls[want-1].Finish) + 1
	}
	if !wantOpen || more {
		return calls, nil, more, nil
	}
	rows, err = tx.QueryContext(ctx, "SELECT line FROM open ORDER BY seq")
	if err != nil {
		return nil, nil, false, err
	}
	defer rows.Close()
	for rows.Next() {
		var line []byte
		if err := rows.Scan(&line); err != nil {
			return nil, nil, false, err
		}
		var c Call
		if err := decodeDecision(line, &c); err != nil {
			return nil, nil, false, fmt.Errorf("read open call: %w", err)
		}
		if q.matches(&c) {
			open = append(open, c)
		}
	}
	return calls, open, false, rows.Err()
}

// query is a Filter as SQL for calls that ended, and as Go for the few that are
// open.
type query struct {
	conds  []string // on calls
	args   []any
	ids    [][]string // of each of these the calls have one
	values []string   // of columns of dims, by which the calls are found whose dim says Other
	tests  []func(*Call) bool

	// Conditions on dims: that the dim itself meets, and that it meets with the rest
	// of the call.
	dims, rowDims       []string
	dimArgs, rowDimArgs []any

	found   map[int64]bool // the dims that meet them
	widened []int64        // finishes of calls that may have one of values
}

func (q *query) add(test func(*Call) bool, cond string, args ...any) {
	q.conds, q.args, q.tests = append(q.conds, cond), append(q.args, args...), append(q.tests, test)
}

func (q *query) addDim(test func(*Call) bool, cond string, args ...any) {
	q.dims, q.dimArgs, q.tests = append(q.dims, cond), append(q.dimArgs, args...), append(q.tests, test)
	q.rowDims, q.rowDimArgs = append(q.rowDims, cond), append(q.rowDimArgs, args...)
}

// addValues selects by a column of dims that the rest of a call may hold instead.
func (q *query) addValues(column string, values []string, of func(*Call) string) {
	args := make([]any, len(values))
	for i, v := range values {
		args[i] = v
	}
	in := " IN (" + marks(len(values)) + ")"
	q.dims, q.dimArgs = append(q.dims, column+in), append(q.dimArgs, args...)
	q.rowDims = append(q.rowDims, "("+column+in+" OR json_extract(calls.rest, '$."+column+"')"+in+")")
	q.rowDimArgs = append(append(q.rowDimArgs, args...), args...)
	q.tests = append(q.tests, func(c *Call) bool { return slices.Contains(values, of(c)) })
}

func (q *query) matches(c *Call) bool {
	for _, test := range q.tests {
		if !test(c) {
			return false
		}
	}
	return true
}

func (r *sqliteReader) query(f Filter) (*query, error) {
	q := &query{}
	if !f.Since.IsZero() {
		since := f.Since.UTC()
		q.add(func(c *Call) bool { return !c.Time.Before(since) }, "time >= ?", ceilMicro(since))
	}
	if !f.Until.IsZero() {
		until := f.Until.UTC()
		q.add(func(c *Call) bool { return c.Time.Before(until) }, "time < ?", ceilMicro(until))
	}
	if f.Instance != "" {
		q.add(func(c *Call) bool { return c.Instance == f.Instance }, "detail IN (SELECT detail FROM details WHERE instance = ?)", f.Instance)
	}
	equal := func(column, want string, of func(*Call) string) {
		if want != "" {
			q.addDim(func(c *Call) bool { return of(c) == want }, column+" = ?", want)
		}
	}
	equal("integration", f.Integration, func(c *Call) string { return c.Integration })
	if f.App != "" {
		q.values = []string{strings.ToLower(f.App)}
		q.addValues("app_id", q.values, func(c *Call) string { return c.AppID })
	}
	equal("reason", f.Reason, func(c *Call) string { return c.Reason })
	if f.Status != "" {
		low, high, err := ParseStatus(f.Status)
		if err != nil {
			return nil, err
		}
		q.addDim(func(*Call) bool { return false }, "status BETWEEN ? AND ?", low, high)
	}
	if f.User != "" {
		refs, err := r.userRefs(f.User)
		if err != nil {
			return nil, err
		}
		q.ids = append(q.ids, refs)
		q.addValues("user_ref", refs, func(c *Call) string { return c.UserRef })
	}
	if call := strings.ToLower(f.Call); call != "" {
		q.ids = append(q.ids, []string{call})
		q.add(func(c *Call) bool { return c.ID == call }, "call = ?", packID(call))
	}
	byID := func(column, want string, of func(*Call) string) {
		if want != "" {
			q.ids = append(q.ids, []string{want})
			lower := lowerASCII(want)
			packed := packID(lower)
			q.add(func(c *Call) bool { return lowerASCII(of(c)) == lower },
				"("+column+" = ? OR upstream_"+column+" = ? OR "+column+" = ? COLLATE NOCASE OR upstream_"+column+" = ? COLLATE NOCASE)",
				packed, packed, want, want)
		}
	}
	byID("request_id", f.RequestID, func(c *Call) string { return c.RequestID })
	byID("correlation_id", f.CorrelationID, func(c *Call) string { return c.CorrelationID })
	if customer := strings.ToLower(f.Customer); customer != "" {
		q.ids = append(q.ids, []string{customer})
		q.add(func(c *Call) bool { return c.Customer == customer }, "customer = ?", packID(customer))
	}
	return q, nil
}

// lowerASCII is an id without case as SQLite's NOCASE and idHash know it: only the
// letters of ASCII have one. Unicode knows more, and a call that is found by them
// while it is open would not be found later.
func lowerASCII(id string) string {
	b := []byte(id)
	for i, c := range b {
		if 'A' <= c && c <= 'Z' {
			b[i] = c + 'a' - 'A'
		}
	}
	return string(b)
}

// userRefs are the user_refs that user, a name, an object id or a user_ref itself,
// stands for.
func (r *sqliteReader) userRefs(user string) ([]string, error) {
	ids, err := ledger.Identities(r.dir)
	if err != nil {
		return nil, err
	}
	refs := []string{user}
	for ref, id := range ids {
		if strings.EqualFold(user, id.UPN) || strings.EqualFold(user, id.ObjectID) {
			refs = append(refs, ref)
		}
	}
	return refs, nil
}

// ceilMicro is t in microseconds since 1970, rounded up.
func ceilMicro(t time.Time) int64 {
	us := t.UnixMicro()
	if t.Nanosecond()%1000 != 0 {
		us++
	}
	return us
}
