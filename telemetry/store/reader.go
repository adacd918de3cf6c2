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
	db, err := openSQLite(path, "ro", "query_only(1)", "cache_size(-16384)")
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

func (r *sqliteReader) Close() error { return r.db.Close() }

// fail says what was being done, and what to do about it.
func (r *sqliteReader) fail(err error) error {
	out := fmt.Errorf("read store in %s: %w", r.dir, err)
	switch {
	case damaged(err):
		return &hintError{out, "the calls are safe in the ledger: stop partnerguard serve, run partnerguard ledger rebuild, start it again"}
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
		err = r.latest(ctx, q, parts, f.Limit)
	}
	if err != nil {
		return r.fail(err)
	}
	left := math.MaxInt
	if f.Limit > 0 {
		left = f.Limit
	}
	for len(parts) > 0 {
		n := min(page, left)
		calls, open, err := r.page(ctx, q, parts[0], n, len(parts) == 1 && n == left, len(parts) == 1 && !f.EndedOnly)
		if err != nil {
			return r.fail(err)
		}
		for _, c := range append(calls, open...) {
			if err := yield(c); err != nil {
				return err
			}
		}
		switch left -= len(calls); {
		case len(calls) < n || left == 0 && len(parts) == 1:
			parts = parts[1:]
		case left == 0: // the open ones are left
			parts = parts[len(parts)-1:]
			parts[0].low = endless
			left = 1
		default:
			parts[0].low = int64(calls[n-1].Finish) + 1
		}
	}
	return nil
}

func (r *sqliteReader) OpenCalls(ctx context.Context) ([]Call, error) {
	q, err := r.query(Filter{})
	if err != nil {
		return nil, err
	}
	_, open, err := r.page(ctx, q, part{span: span{endless, endless}}, 0, true, true)
	if err != nil {
		return nil, r.fail(err)
	}
	return open, nil
}

// part is a part of calls to look through: a span of finishes, and if only is not
// empty, those of them that it holds, a JSON array.
type part struct {
	span
	only string
}

// where is the condition of q on a row in p.
func (p part) where(q *query) (cond string, args []any) {
	cond, args = "finish BETWEEN ? AND ?", []any{p.low, p.high}
	if p.only != "" {
		cond, args = cond+" AND finish IN (SELECT value FROM json_each(?))", append(args, p.only)
	}
	for _, c := range q.conds {
		cond += " AND " + c
	}
	args = append(args, q.args...)
	if len(q.dims) > 0 {
		cond, args = cond+" AND "+dimIn(q.dims), append(args, q.dimArgs...)
	}
	return cond, args
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
	var parts []part
	switch {
	case len(q.ids) > 0:
		found, err := findID(ctx, tx, q.ids[0])
		if err != nil {
			return nil, err
		}
		for some := range slices.Chunk(found, page) {
			parts = append(parts, part{span{some[0], some[len(some)-1]}, jsonNumbers(some)})
		}
	case len(q.dims) > 0 || !f.Since.IsZero() || !f.Until.IsZero():
		low, high := hourRange(f.Since, f.Until)
		spans, err := findSpans(ctx, tx, low, high, q.dims, q.dimArgs)
		if err != nil {
			return nil, err
		}
		for _, s := range spans {
			parts = append(parts, part{span: span{s.low, min(s.high, folded)}})
		}
	default:
		parts = append(parts, part{span: span{0, folded}})
	}
	parts = append(parts, part{span: span{folded + 1, endless}})
	for i := range parts {
		parts[i].low = max(parts[i].low, int64(f.AfterFinish)+1)
	}
	return parts, nil
}

// latest makes parts begin with the latest n calls of theirs.
func (r *sqliteReader) latest(ctx context.Context, q *query, parts []part, n int) error {
	for i := len(parts) - 1; i >= 0; i-- {
		if n == 0 {
			parts[i].low = endless
			continue
		}
		cond, args := parts[i].where(q)
		var first, found int64
		err := r.db.QueryRowContext(ctx, "SELECT coalesce(min(finish), 0), count(*) FROM (SELECT finish FROM calls WHERE "+cond+" ORDER BY finish DESC LIMIT ?)",
			append(args, n)...).Scan(&first, &found)
		if err != nil {
			return err
		}
		parts[i].low = max(parts[i].low, first)
		n -= int(found)
	}
	return nil
}

// page reads up to n calls of a part. With its last page, which last says or a short
// page shows, come the open ones as of the same moment, if wanted.
func (r *sqliteReader) page(ctx context.Context, q *query, p part, n int, last, wantOpen bool) (calls, open []Call, err error) {
	tx, err := r.db.BeginTx(ctx, nil)
	if err != nil {
		return nil, nil, err
	}
	defer tx.Rollback()
	cond, args := p.where(q)
	rows, err := tx.QueryContext(ctx, selectCalls+"WHERE "+cond+" ORDER BY finish LIMIT ?", append(args, n)...)
	if err != nil {
		return nil, nil, err
	}
	defer rows.Close()
	for rows.Next() {
		c, err := scanCall(rows)
		if err != nil {
			return nil, nil, err
		}
		calls = append(calls, c)
	}
	if err := rows.Err(); err != nil || !wantOpen || len(calls) == n && !last {
		return calls, nil, err
	}
	rows, err = tx.QueryContext(ctx, "SELECT line FROM open ORDER BY seq")
	if err != nil {
		return nil, nil, err
	}
	defer rows.Close()
	for rows.Next() {
		var line []byte
		if err := rows.Scan(&line); err != nil {
			return nil, nil, err
		}
		var c Call
		if err := decode(line, &c); err != nil {
			return nil, nil, fmt.Errorf("read open call: %w", err)
		}
		if q.matches(&c) {
			open = append(open, c)
		}
	}
	return calls, open, rows.Err()
}

// query is a Filter as SQL for calls that ended, and as Go for the few that are
// open.
type query struct {
	conds   []string // on calls
	args    []any
	dims    []string // on dims
	dimArgs []any
	ids     []string // that the calls have
	tests   []func(*Call) bool
}

func (q *query) add(test func(*Call) bool, cond string, args ...any) {
	q.conds, q.args, q.tests = append(q.conds, cond), append(q.args, args...), append(q.tests, test)
}

func (q *query) addDim(test func(*Call) bool, cond string, args ...any) {
	q.dims, q.dimArgs, q.tests = append(q.dims, cond), append(q.dimArgs, args...), append(q.tests, test)
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
	equal := func(column, want string, of func(*Call) string) {
		if want != "" {
			q.addDim(func(c *Call) bool { return of(c) == want }, column+" = ?", want)
		}
	}
	equal("integration", f.Integration, func(c *Call) string { return c.Integration })
	equal("app_id", strings.ToLower(f.App), func(c *Call) string { return c.AppID })
	equal("customer", strings.ToLower(f.Customer), func(c *Call) string { return c.Customer })
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
		args := make([]any, len(refs))
		for i, ref := range refs {
			args[i] = ref
		}
		q.addDim(func(c *Call) bool { return slices.Contains(refs, c.UserRef) }, "user_ref IN ("+marks(len(refs))+")", args...)
	}
	if call := strings.ToLower(f.Call); call != "" {
		q.ids = append(q.ids, call)
		q.add(func(c *Call) bool { return c.ID == call }, "call = ?", packID(call))
	}
	byID := func(column, want string, of func(*Call) string) {
		if want != "" {
			q.ids = append(q.ids, want)
			lower := lowerASCII(want)
			packed := packID(lower)
			q.add(func(c *Call) bool { return lowerASCII(of(c)) == lower },
				"("+column+" = ? OR upstream_"+column+" = ? OR "+column+" = ? COLLATE NOCASE OR upstream_"+column+" = ? COLLATE NOCASE)",
				packed, packed, want, want)
		}
	}
	byID("request_id", f.RequestID, func(c *Call) string { return c.RequestID })
	byID("correlation_id", f.CorrelationID, func(c *Call) string { return c.CorrelationID })
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
