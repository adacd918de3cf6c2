package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/partnerguard/partnerguard/telemetry/ledger"
)

// postgresReader is a Reader of the fleet's database. It is safe for concurrent use,
// and takes up to four connections.
type postgresReader struct {
	at   postgresConfig
	pool *pgxpool.Pool
	few  int // the constant; tests have fewer calls
}

// PostgresReader is a Reader of the fleet's database that also has what the guards
// bring there for others than reports.
type PostgresReader interface {
	Reader

	// Checkpoints returns what the guard of a ledger signed, oldest first.
	Checkpoints(ctx context.Context, ledger string) ([]ledger.Checkpoint, error)
}

// OpenPostgresReader opens the fleet's database for reading: a URL, or the form
// key=value, see docs/fleet.md. The error wraps ErrNoStore when no guard wrote there
// yet; where there is a way out, it has a method Hint() string. It holds no password.
func OpenPostgresReader(ctx context.Context, url string) (PostgresReader, error) {
	at, err := parsePostgres(url)
	if err != nil {
		return nil, err
	}
	cfg, err := pgxpool.ParseConfig("")
	if err != nil {
		return nil, at.fail("open store", errors.New("the environment variables of PostgreSQL (PG…) are not valid"))
	}
	cfg.ConnConfig = at.session("partnerguard", true)
	cfg.MaxConns, cfg.MinConns = 4, 0
	cfg.MaxConnIdleTime = time.Minute
	pool, err := pgxpool.NewWithConfig(ctx, cfg)
	if err != nil {
		return nil, at.fail("open store", err)
	}
	r := &postgresReader{at: at, pool: pool, few: few}
	opening, cancel := at.limit(ctx)
	defer cancel()
	err = pool.AcquireFunc(opening, func(c *pgxpool.Conn) error {
		_, err := at.version(opening, c.Conn())
		return err
	})
	if err != nil {
		pool.Close()
		return nil, at.fail("open store", err)
	}
	return r, nil
}

func (r *postgresReader) Close() error {
	r.pool.Close()
	return nil
}

func (r *postgresReader) fail(err error) error { return r.at.fail("read store", err) }

// snapshot runs read in a transaction of its own, all of which sees the database as of
// one moment.
func (r *postgresReader) snapshot(ctx context.Context, read func(ctx context.Context, tx pgx.Tx) error) error {
	ctx, cancel := r.at.limit(ctx)
	defer cancel()
	return pgx.BeginTxFunc(ctx, r.pool, pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly}, func(tx pgx.Tx) error {
		return read(ctx, tx)
	})
}

func (r *postgresReader) LastFinish(ctx context.Context) (uint64, error) {
	ctx, cancel := r.at.limit(ctx)
	defer cancel()
	var n int64
	err := r.pool.QueryRow(ctx, "SELECT finish FROM fleet").Scan(&n)
	return uint64(n), r.fail(err)
}

func (r *postgresReader) Sums(ctx context.Context, since, until time.Time) ([]Sum, error) {
	return r.sums(ctx, byRoute, since, until)
}

func (r *postgresReader) CustomerSums(ctx context.Context, since, until time.Time) ([]Sum, error) {
	return r.sums(ctx, byCustomer, since, until)
}

func (r *postgresReader) sums(ctx context.Context, by int, since, until time.Time) (sums []Sum, err error) {
	low, high := hourRange(since, until)
	err = r.snapshot(ctx, func(ctx context.Context, tx pgx.Tx) error {
		found := map[sumKey]*sumValue{}
		if err := collectTallies(ctx, tx, by, low, high, found); err != nil {
			return err
		}
		rest, err := unfoldedTallies(ctx, tx, by, low, high)
		if err != nil {
			return err
		}
		sums, err = joinSums(by, found, rest, func(dims map[int64]Dim) error { return readPostgresDims(ctx, tx, dims) })
		return err
	})
	return sums, r.fail(err)
}

// collectTallies adds the folded calls that began in the hours from low to high: days as
// a whole as far as they are there, the rest by the hour.
func collectTallies(ctx context.Context, tx pgx.Tx, by int, low, high int64, found map[sumKey]*sumValue) error {
	var days, hours conditions
	days.add("kind = ?", by+ofDay)
	whole := high
	if high < endlessHour {
		whole = high - 23
	}
	days.days((low+23)/24*24, whole)
	hours.add("kind = ?", by+ofHour)
	hours.days(low, high)
	hours.add("start BETWEEN ? AND ?", clampHour(low), clampHour(high))
	hours.sub("(ledger, day) NOT IN (SELECT ledger, day FROM tallies WHERE %s)", &days)
	for _, w := range [...]conditions{days, hours} {
		rows, err := tx.Query(ctx, "SELECT kind, start, entries FROM tallies WHERE "+w.String(), w.args...)
		if err != nil {
			return err
		}
		if err := eachTally(rows, func(_ int, _ int64, e sumEntry) bool { add(found, e.sumKey, e.sumValue); return true }); err != nil {
			return err
		}
	}
	return nil
}

// unfoldedTallies returns what the calls come to that the sums do not count yet. By
// customer, the dims have a route yet.
func unfoldedTallies(ctx context.Context, tx pgx.Tx, by int, low, high int64) (map[sumKey]sumValue, error) {
	w, err := unfolded(ctx, tx)
	if err != nil {
		return nil, err
	}
	w.days(low, high)
	if low > 0 {
		w.add(`"time" >= ?`, time.Unix(clampHour(low)*3600, 0))
	}
	if high < endlessHour {
		w.add(`"time" < ?`, time.Unix(clampHour(high+1)*3600, 0))
	}
	customer := "''"
	if by == byCustomer {
		customer = customerText
	}
	rows, err := tx.Query(ctx, "SELECT dim, "+customer+`, count(*), min("time"), max("time") FROM calls WHERE `+w.String()+" GROUP BY 1, 2", w.args...)
	if err != nil {
		return nil, err
	}
	found := map[sumKey]sumValue{}
	var key sumKey
	var calls int64
	var first, last time.Time
	_, err = pgx.ForEachRow(rows, []any{&key.dim, &key.customer, &calls, &first, &last}, func() error {
		found[key] = sumValue{calls, first.UnixMicro(), last.UnixMicro()}
		return nil
	})
	return found, err
}

// unfolded is the condition on calls that the sums do not count yet. With a value for
// each ledger, so that PostgreSQL sees that they are few.
func unfolded(ctx context.Context, tx pgx.Tx) (conditions, error) {
	rows, err := tx.Query(ctx, "SELECT ledger, folded FROM ledgers WHERE folded < seq")
	if err != nil {
		return conditions{}, err
	}
	behind := []string{"false"}
	var ledger int32
	var folded int64
	_, err = pgx.ForEachRow(rows, []any{&ledger, &folded}, func() error {
		behind = append(behind, fmt.Sprintf("ledger = %d AND seq > %d", ledger, folded))
		return nil
	})
	return conditions{sql: []string{"(" + strings.Join(behind, " OR ") + ")"}}, err
}

// readPostgresDims sets the dims that are keys of dims.
func readPostgresDims(ctx context.Context, tx pgx.Tx, dims map[int64]Dim) error {
	rows, err := tx.Query(ctx, "SELECT dim, "+narrowColumns+" FROM dims WHERE dim = ANY($1)", slices.Collect(maps.Keys(dims)))
	if err != nil {
		return err
	}
	var dim int64
	var d Dim
	_, err = pgx.ForEachRow(rows, append([]any{&dim}, d.narrowFields()...), func() error {
		dims[dim] = d
		return nil
	})
	return err
}

func (r *postgresReader) Callers(ctx context.Context, since, until time.Time) ([]Caller, error) {
	sums, err := r.Sums(ctx, since, until)
	if err != nil {
		return nil, err
	}
	return callersOf(sums), nil
}

func (r *postgresReader) Tokens(ctx context.Context, since, until time.Time, yield func(Token) error) error {
	w := conditions{}
	w.add("uti <> ''")
	w.hours(hourRange(since, until))
	// By a cursor: there may be very many, and yield may take its time.
	tx, err := r.pool.BeginTx(ctx, pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly})
	if err != nil {
		return r.fail(err)
	}
	defer tx.Rollback(context.WithoutCancel(ctx))
	if _, err := tx.Exec(ctx, "SET LOCAL idle_in_transaction_session_timeout = '10min'"); err != nil {
		return r.fail(err)
	}
	if _, err := tx.Exec(ctx, `DECLARE tokens_read NO SCROLL CURSOR FOR SELECT DISTINCT uti, app_id, user_ref, integration, verified, mfa, iat FROM (
		SELECT DISTINCT uti, caller, iat FROM tokens WHERE `+w.String()+`) AS t JOIN dims ON dim = caller`, w.args...); err != nil {
		return r.fail(err)
	}
	for {
		tokens, err := r.fetchTokens(ctx, tx)
		if err != nil || len(tokens) == 0 {
			return r.fail(err)
		}
		for _, t := range tokens {
			if err := yield(t); err != nil {
				return err
			}
		}
	}
}

func (r *postgresReader) fetchTokens(ctx context.Context, tx pgx.Tx) ([]Token, error) {
	ctx, cancel := r.at.limit(ctx)
	defer cancel()
	rows, err := tx.Query(ctx, "FETCH 5000 FROM tokens_read")
	if err != nil {
		return nil, err
	}
	var all []Token
	var t Token
	_, err = pgx.ForEachRow(rows, []any{&t.UTI, &t.AppID, &t.UserRef, &t.Integration, &t.Verified, &t.MFA, &t.IssuedAt}, func() error {
		all = append(all, t)
		return nil
	})
	return all, err
}

func (r *postgresReader) Gaps(ctx context.Context, since, until time.Time) (calls, outcomes int64, err error) {
	ctx, cancel := r.at.limit(ctx)
	defer cancel()
	low, high := hourRange(since, until)
	var w conditions
	if low > 0 {
		w.add("until >= ?", time.Unix(low*3600, 0))
	}
	if high < endlessHour {
		w.add("since < ?", time.Unix((high+1)*3600, 0))
	}
	err = r.pool.QueryRow(ctx, "SELECT coalesce(sum(calls), 0)::bigint, coalesce(sum(outcomes), 0)::bigint FROM gaps WHERE "+w.String(), w.args...).Scan(&calls, &outcomes)
	return calls, outcomes, r.fail(err)
}

func (r *postgresReader) Identities(ctx context.Context) (map[string]Identity, error) {
	people := map[string]Identity{}
	err := r.snapshot(ctx, func(ctx context.Context, tx pgx.Tx) error {
		rows, err := tx.Query(ctx, "SELECT user_ref, tid, oid, upn FROM identities")
		if err != nil {
			return err
		}
		var id Identity
		_, err = pgx.ForEachRow(rows, []any{&id.UserRef, &id.TenantID, &id.ObjectID, &id.UPN}, func() error {
			people[id.UserRef] = id
			return nil
		})
		return err
	})
	return people, r.fail(err)
}

// userRefs are the user_refs that user stands for: a name, an object id, or a
// user_ref, with which those of the same person at the other guards are found.
func userRefs(user string, people map[string]Identity) []string {
	refs := []string{user}
	self, known := people[user]
	for ref, id := range people {
		switch {
		case ref == user:
		case strings.EqualFold(user, id.UPN), strings.EqualFold(user, id.ObjectID),
			known && self.ObjectID != "" && strings.EqualFold(self.TenantID, id.TenantID) && strings.EqualFold(self.ObjectID, id.ObjectID):
			refs = append(refs, ref)
		}
	}
	return refs
}

func (r *postgresReader) Checkpoints(ctx context.Context, id string) ([]ledger.Checkpoint, error) {
	ctx, cancel := r.at.limit(ctx)
	defer cancel()
	rows, err := r.pool.Query(ctx, `SELECT l.id::text, c."time", c."commit", c.hash, c.key, c.signature FROM checkpoints c JOIN ledgers l USING (ledger)
		WHERE l.id::text = lower($1) ORDER BY c."commit", c.seq`, id)
	if err != nil {
		return nil, r.fail(err)
	}
	var all []ledger.Checkpoint
	var at time.Time
	var commit int64
	var hash, signature []byte
	var key string
	_, err = pgx.ForEachRow(rows, []any{&id, &at, &commit, &hash, &key, &signature}, func() error {
		c := ledger.Checkpoint{Ledger: id, Time: at.UTC(), Commit: uint64(commit), Key: key, Signature: slices.Clone(signature)}
		copy(c.Hash[:], hash)
		all = append(all, c)
		return nil
	})
	return all, r.fail(err)
}

// unheard is how long a guard may be silent before that counts as lag: it writes its
// heartbeat more often.
const unheard = 3 * pgHeartbeat

// forgotten is how long a guard that does not come back counts.
const forgottenAfter = 24 * time.Hour

func (r *postgresReader) Instances(ctx context.Context) ([]Instance, error) {
	ctx, cancel := r.at.limit(ctx)
	defer cancel()
	rows, err := r.pool.Query(ctx, `SELECT id::text, instance, version, seq, newest, caught_up, heard, stopped IS NOT NULL, clock_timestamp()
		FROM ledgers ORDER BY instance, id`)
	if err != nil {
		return nil, r.fail(err)
	}
	var all []Instance
	var i Instance
	var seq int64
	var newest *time.Time
	var caughtUp bool
	var heard, now time.Time
	_, err = pgx.ForEachRow(rows, []any{&i.Ledger, &i.Name, &i.Version, &seq, &newest, &caughtUp, &heard, &i.Stopped, &now}, func() error {
		i.Seq, i.Heard, i.Newest, i.Lag = uint64(seq), heard.UTC(), time.Time{}, 0
		if newest != nil {
			i.Newest = newest.UTC()
		}
		switch silent := now.Sub(heard); {
		case i.Stopped:
		case !caughtUp && newest != nil:
			i.Lag = max(0, now.Sub(*newest))
		case silent > unheard:
			i.Lag = silent
		}
		all = append(all, i)
		return nil
	})
	return all, r.fail(err)
}

// Lag is that of the guard that lags most, of those heard from within a day.
func (r *postgresReader) Lag(ctx context.Context) (time.Duration, error) {
	all, err := r.Instances(ctx)
	if err != nil {
		return 0, err
	}
	var lag time.Duration
	for _, i := range all {
		if time.Since(i.Heard) < forgottenAfter {
			lag = max(lag, i.Lag)
		}
	}
	return lag, nil
}

// conditions are what a row must meet, with the values of their parameters, which are
// written as question marks.
type conditions struct {
	sql  []string
	args []any
}

func (w *conditions) add(cond string, args ...any) {
	for _, arg := range args {
		w.args = append(w.args, arg)
		cond = strings.Replace(cond, "?", fmt.Sprintf("$%d", len(w.args)), 1)
	}
	w.sql = append(w.sql, cond)
}

func (w *conditions) clone() conditions {
	return conditions{slices.Clone(w.sql), slices.Clone(w.args)}
}

func (w *conditions) String() string {
	if len(w.sql) == 0 {
		return "true"
	}
	return strings.Join(w.sql, " AND ")
}

// endlessHour is hourRange's end that is left open.
const endlessHour = 1 << 40

// days bounds the column day, so that the partitions of others are not looked at.
func (w *conditions) days(low, high int64) {
	if low > 0 {
		w.add("day >= ?", time.Unix(clampHour(low)*3600, 0).UTC())
	}
	if high < endlessHour {
		w.add("day <= ?", time.Unix(clampHour(high)*3600, 0).UTC())
	}
}

// hours bounds the columns day and hour.
func (w *conditions) hours(low, high int64) {
	w.days(low, high)
	w.add("hour BETWEEN ? AND ?", int32(clampHour(low)), int32(clampHour(high)))
}

// clampHour is hour as the column takes it.
func clampHour(hour int64) int64 { return min(max(hour, firstHour), math.MaxInt32) }

// firstHour is that of the year 1: PostgreSQL's times begin not much earlier.
const firstHour = -719162 * 24

// bound is t as a parameter, rounded up to microseconds.
func bound(t time.Time) time.Time { return time.UnixMicro(max(ceilMicro(t), firstHour*hourMicros)) }

// selected is a Filter as SQL for the calls that ended, and as Go for the open ones.
type selected struct {
	calls, dims, details conditions
	ids                  bool    // some id is asked for
	few                  bool    // there are few such calls
	listed               []int64 // the dims that meet dims, if they were listed
	customer             string  // empty: any
	low, high            int64
	open                 func(*Call) bool
}

func (r *postgresReader) selected(ctx context.Context, f Filter) (*selected, error) {
	s := &selected{}
	s.low, s.high = hourRange(f.Since, f.Until)
	if !f.Since.IsZero() {
		s.calls.add(`"time" >= ?`, bound(f.Since))
	}
	if !f.Until.IsZero() {
		s.calls.add(`"time" < ?`, bound(f.Until))
	}
	if !f.Since.IsZero() || !f.Until.IsZero() {
		s.calls.days(s.low, s.high)
	}
	for column, want := range map[string]string{"integration": f.Integration, "reason": f.Reason} {
		if want != "" {
			s.dims.add(column+" = ?", pgText(want))
		}
	}
	if f.Status != "" {
		low, high, err := ParseStatus(f.Status)
		if err != nil {
			return nil, err
		}
		s.dims.add("status BETWEEN ? AND ?", low, high)
	}
	if f.App != "" {
		s.widened("app_id", strings.ToLower(f.App))
	}
	var refs []string
	if f.User != "" {
		people, err := r.Identities(ctx)
		if err != nil {
			return nil, err
		}
		refs = userRefs(f.User, people)
		s.widened("user_ref", refs...)
	}
	if customer := strings.ToLower(f.Customer); customer != "" {
		s.customer = pgText(customer)
		if guid, ok := parseGUID(customer); ok {
			s.calls.add("customer = ?", [16]byte(guid))
		} else {
			s.calls.add("odd_folded @> ARRAY[?] AND odd[6] = ?", foldOdd(customer), s.customer)
		}
	}
	if f.Instance != "" {
		s.details.add("instance = ?", pgText(f.Instance))
	}
	if call := strings.ToLower(f.Call); call != "" {
		s.ids = true
		if guid, ok := parseGUID(call); ok {
			s.calls.add("call = ?", [16]byte(guid))
			if guid.Version() == 7 { // which says when the call began
				hour := hourOf(timeOf(call))
				s.calls.days(hour-24, hour+24)
			}
		} else {
			s.calls.add("odd_folded @> ARRAY[?] AND odd[1] = ?", foldOdd(call), pgText(call))
		}
	}
	byID := func(want, column string, odd, upstreamOdd, own int) {
		if want == "" {
			return
		}
		s.ids = true
		lower := lowerASCII(want)
		cond := fmt.Sprintf("odd_folded @> ARRAY[?] AND (%s = ? OR %s = ? OR same & %d <> 0 AND %s = ?)", foldedOdd(odd), foldedOdd(upstreamOdd), own, foldedOdd(1))
		args := []any{foldOdd(want), pgText(lower), pgText(lower), pgText(lower)}
		if guid, ok := parseGUID(lower); ok {
			cond = fmt.Sprintf("(%[1]s = ? OR upstream_%[1]s = ? OR %[2]s", column, cond)
			args = append([]any{[16]byte(guid), [16]byte(guid)}, args...)
			if mayBeOwn(lower) {
				cond += fmt.Sprintf(" OR call = ? AND same & %d <> 0", own)
				args = append(args, [16]byte(guid))
			}
			cond += ")"
		}
		s.calls.add(cond, args...)
	}
	byID(f.RequestID, "request_id", 2, 4, ownRequest)
	byID(f.CorrelationID, "correlation_id", 3, 5, ownCorrelation)
	s.open = f.matchesOpen(refs)
	return s, nil
}

// widened adds that the calls have one of values in a column of dims that may say
// Other; then rest says what it was.
func (s *selected) widened(column string, values ...string) {
	texts := make([]string, len(values))
	for i, v := range values {
		texts[i] = pgText(v)
	}
	s.dims.add("("+column+" = ANY(?) OR "+column+" = ?)", texts, Other)
	s.calls.add(fmt.Sprintf("(rest->>'%[1]s' = ANY(?) OR rest->>'%[1]s' IS NULL AND dim IN (SELECT dim FROM dims WHERE %[1]s = ANY(?)))", column), texts, texts)
}

// foldedOdd is an id of odd in small letters; those of ASCII only.
func foldedOdd(n int) string { return fmt.Sprintf(`lower(odd[%d] COLLATE "C")`, n) }

// matchesOpen returns what says of a call without outcome whether f selects it. refs are the
// user_refs of f.User.
func (f *Filter) matchesOpen(refs []string) func(*Call) bool {
	app, customer, call := strings.ToLower(f.App), strings.ToLower(f.Customer), strings.ToLower(f.Call)
	request, correlation := lowerASCII(f.RequestID), lowerASCII(f.CorrelationID)
	is := func(want, have string) bool { return want == "" || want == have }
	return func(c *Call) bool {
		return (f.Since.IsZero() || !c.Time.Before(f.Since)) && (f.Until.IsZero() || c.Time.Before(f.Until)) &&
			f.Status == "" && is(f.Integration, c.Integration) && is(app, c.AppID) && is(customer, c.Customer) &&
			is(f.Reason, c.Reason) && is(f.Instance, c.Instance) && is(call, c.ID) &&
			is(request, lowerASCII(c.RequestID)) && is(correlation, lowerASCII(c.CorrelationID)) &&
			(f.User == "" || slices.Contains(refs, c.UserRef))
	}
}

func (r *postgresReader) Calls(ctx context.Context, f Filter, yield func(Call) error) error {
	s, err := r.selected(ctx, f)
	if err != nil {
		return err
	}
	parts, err := r.plan(ctx, s, f)
	if err == nil && f.Limit > 0 && f.AfterFinish == 0 {
		err = r.latest(ctx, s, parts, f.Limit)
	}
	if err != nil {
		return r.fail(err)
	}
	left := math.MaxInt
	if f.Limit > 0 {
		left = f.Limit
	}
	for i, p := range parts {
		last := i == len(parts)-1
		for left > 0 || last {
			n := min(page, left)
			calls, open, err := r.page(ctx, s, p, n, last && !f.EndedOnly, left)
			if err != nil {
				return r.fail(err)
			}
			for _, c := range append(calls, open...) {
				if err := yield(c); err != nil {
					return err
				}
			}
			left -= len(calls)
			if len(calls) < n || left == 0 {
				break
			}
			p.low = int64(calls[n-1].Finish) + 1
		}
	}
	return nil
}

func (r *postgresReader) OpenCalls(ctx context.Context) ([]Call, error) {
	s := &selected{open: func(*Call) bool { return true }}
	_, open, err := r.page(ctx, s, stretch{span: span{endless, endless}}, 0, true, 0)
	return open, r.fail(err)
}

// stretch is where calls lie: their finishes, and the days on which they began, of which
// each has a partition. A query of all partitions takes 20 ms to be planned.
type stretch struct {
	span
	from, to int32 // days; both 0: any
}

func (p stretch) with(q stretch) stretch {
	return stretch{span{min(p.low, q.low), max(p.high, q.high)}, min(p.from, q.from), max(p.to, q.to)}
}

// days is a condition.
func (p stretch) days() string {
	if p.from == 0 && p.to == 0 {
		return "true"
	}
	return fmt.Sprintf("day BETWEEN '%s' AND '%s'", dayTime(p.from).Format(time.DateOnly), dayTime(p.to).Format(time.DateOnly))
}

func dayOfHour(hour int64) int32 { return dayOf(time.Unix(hour*3600, 0)) }

// plan returns where the calls lie that s selects, in order. The last part has those
// that end from now on.
func (r *postgresReader) plan(ctx context.Context, s *selected, f Filter) (parts []stretch, err error) {
	err = r.snapshot(ctx, func(ctx context.Context, tx pgx.Tx) error {
		var last int64
		if err := tx.QueryRow(ctx, "SELECT finish FROM fleet").Scan(&last); err != nil {
			return err
		}
		if s.ids || len(s.dims.sql) == 0 && s.customer == "" && f.Since.IsZero() && f.Until.IsZero() {
			parts = []stretch{{span: span{0, last}}}
		} else if parts, err = s.parts(ctx, tx, r.few); err != nil {
			return err
		}
		parts = append(parts, stretch{span: span{last + 1, endless}})
		for i := range parts {
			parts[i].low = max(parts[i].low, int64(f.AfterFinish)+1)
		}
		return nil
	})
	return parts, err
}

// parts returns where the calls lie that s selects. Few are looked for themselves; of
// more, days without such a call are left out.
func (s *selected) parts(ctx context.Context, tx pgx.Tx, few int) ([]stretch, error) {
	if len(s.dims.sql) > 0 {
		rows, err := tx.Query(ctx, fmt.Sprintf("SELECT dim FROM dims WHERE %s LIMIT %d", s.dims.String(), maxListed+1), s.dims.args...)
		if err != nil {
			return nil, err
		}
		if s.listed, err = pgx.CollectRows(rows, pgx.RowTo[int64]); err != nil {
			return nil, err
		}
		if len(s.listed) > maxListed {
			s.listed = nil
		} else if len(s.listed) == 0 {
			return nil, nil
		}
	}
	if s.listed != nil || s.customer != "" {
		w := s.where(stretch{span: span{0, endless}})
		var n int
		var low, high *int64
		var from, to *time.Time
		err := tx.QueryRow(ctx, fmt.Sprintf("SELECT count(*), min(finish), max(finish), min(day), max(day) FROM (SELECT finish, day FROM calls WHERE %s LIMIT %d) AS c",
			w.String(), few+1), w.args...).Scan(&n, &low, &high, &from, &to)
		if err != nil || n == 0 {
			return nil, err
		}
		if n <= few {
			s.few = true
			return []stretch{{span{*low, *high}, dayOf(*from), dayOf(*to)}}, nil
		}
	}
	days, err := s.days(ctx, tx)
	if err != nil {
		return nil, err
	}
	var w conditions
	w.add("hour BETWEEN ? AND ?", int32(clampHour(s.low)), int32(clampHour(s.high)))
	rows, err := tx.Query(ctx, "SELECT hour, min(low), max(high) FROM hours WHERE "+w.String()+" GROUP BY hour ORDER BY 2", w.args...)
	if err != nil {
		return nil, err
	}
	var parts []stretch
	var hour int64
	var one span
	_, err = pgx.ForEachRow(rows, []any{&hour, &one.low, &one.high}, func() error {
		if days != nil && !days[dayOfHour(hour)] {
			return nil
		}
		this := stretch{one, dayOfHour(hour), dayOfHour(hour)}
		if n := len(parts); n > 0 && one.low <= parts[n-1].high+nearby {
			parts[n-1] = parts[n-1].with(this)
		} else {
			parts = append(parts, this)
		}
		return nil
	})
	return parts, err
}

// days returns the days that may have a call that s selects by its dim, nil for all.
func (s *selected) days(ctx context.Context, tx pgx.Tx) (map[int32]bool, error) {
	if len(s.dims.sql) == 0 {
		return nil, nil
	}
	rows, err := tx.Query(ctx, "SELECT dim FROM dims WHERE "+s.dims.String(), s.dims.args...)
	if err != nil {
		return nil, err
	}
	dims := map[int64]bool{}
	var dim int64
	if _, err := pgx.ForEachRow(rows, []any{&dim}, func() error { dims[dim] = true; return nil }); err != nil {
		return nil, err
	}
	days := map[int32]bool{}
	var whole conditions
	whole.add("kind = ?", byRoute+ofDay)
	whole.days(s.low, s.high)
	if rows, err = tx.Query(ctx, "SELECT kind, start, entries FROM tallies WHERE "+whole.String(), whole.args...); err != nil {
		return nil, err
	}
	if err := eachTally(rows, func(_ int, day int64, e sumEntry) bool {
		days[int32(day)] = days[int32(day)] || dims[e.dim]
		return !days[int32(day)]
	}); err != nil {
		return nil, err
	}
	// Of others it is not known.
	var hours conditions
	hours.add("kind = ?", byRoute+ofHour)
	hours.days(s.low, s.high)
	hours.sub("(ledger, day) NOT IN (SELECT ledger, day FROM tallies WHERE %s)", &whole)
	rest, err := unfolded(ctx, tx)
	if err != nil {
		return nil, err
	}
	rest.days(s.low, s.high)
	for table, w := range map[string]*conditions{"tallies": &hours, "calls": &rest} {
		if rows, err = tx.Query(ctx, "SELECT DISTINCT day FROM "+table+" WHERE "+w.String(), w.args...); err != nil {
			return nil, err
		}
		var day time.Time
		if _, err = pgx.ForEachRow(rows, []any{&day}, func() error { days[dayOf(day)] = true; return nil }); err != nil {
			return nil, err
		}
	}
	return days, nil
}

// few is how many calls are found by what they have in common and then sorted; more are
// met walking along finish.
const few = 20_000

// maxListed is how many dims are asked for by number, for which PostgreSQL plans well.
// More than that have more than a few calls.
const maxListed = 500

// nearby is how many calls between two parts are read rather than asked for apart.
const nearby = 10_000

// addDims adds that a row's dim meets s.dims.
func (s *selected) addDims(w *conditions) {
	switch {
	case s.listed != nil:
		w.add("dim = ANY(?)", s.listed)
	case len(s.dims.sql) > 0:
		w.sub("dim IN (SELECT dim FROM dims WHERE %s)", &s.dims)
	}
}

// sub adds a condition that has others within.
func (w *conditions) sub(format string, d *conditions) {
	within := parameter.ReplaceAllStringFunc(d.String(), func(p string) string {
		n, _ := strconv.Atoi(p[1:])
		return "$" + strconv.Itoa(n+len(w.args))
	})
	w.args = append(w.args, d.args...)
	w.sql = append(w.sql, fmt.Sprintf(format, within))
}

var parameter = regexp.MustCompile(`\$[0-9]+`)

// where is what a row of calls must meet to be one of s, within p.
func (s *selected) where(p stretch) conditions {
	w := s.calls.clone()
	w.add("finish BETWEEN ? AND ?", p.low, p.high)
	w.add(p.days())
	s.addDims(&w)
	if len(s.details.sql) > 0 {
		w.sub("(day, ledger, detail) IN (SELECT day, ledger, detail FROM details WHERE %s)", &s.details)
	}
	return w
}

// set prepares a transaction for where, and reports whether there are calls in p at all.
func (s *selected) set(ctx context.Context, tx pgx.Tx, p stretch) (there bool, err error) {
	var last int64
	if err := tx.QueryRow(ctx, "SELECT finish FROM fleet").Scan(&last); err != nil || last < p.low {
		return false, err
	}
	if s.ids {
		// PostgreSQL believes that a filter of random ids rules nothing out, and would
		// read all rows instead.
		_, err = tx.Exec(ctx, "SET LOCAL enable_seqscan = off; SET LOCAL max_parallel_workers_per_gather = 0")
	}
	return true, err
}

// order is by finish. Few calls have an id: those are to be found by it and then
// sorted, not by walking along finish until some are met.
func (s *selected) order() string {
	if s.ids || s.few {
		return "finish + 0"
	}
	return "finish"
}

// latest makes the parts begin with the latest n calls in them, and end with the days of
// these.
func (r *postgresReader) latest(ctx context.Context, s *selected, parts []stretch, n int) error {
	for i := len(parts) - 1; i >= 0; i-- {
		p := &parts[i]
		if n == 0 {
			p.low = endless
			continue
		}
		err := r.snapshot(ctx, func(ctx context.Context, tx pgx.Tx) error {
			if there, err := s.set(ctx, tx, *p); err != nil || !there {
				return err
			}
			w := s.where(*p)
			var first, found int64
			var from, to *time.Time
			err := tx.QueryRow(ctx, fmt.Sprintf("SELECT coalesce(min(finish), 0), count(*), min(day), max(day) FROM (SELECT finish, day FROM calls WHERE %s ORDER BY %s DESC LIMIT %d) AS c",
				w.String(), s.order(), n), w.args...).Scan(&first, &found, &from, &to)
			if err != nil {
				return err
			}
			p.low = max(p.low, first)
			n -= int(found)
			switch {
			case p.high == endless: // there may be more soon
			case found == 0:
				p.low = endless
			default:
				p.from, p.to = dayOf(*from), dayOf(*to)
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// selectPostgres reads whole calls.
var selectPostgres = `SELECT finish, "time", ` + oddOr("call", 1) + `, request, correlation,
	CASE WHEN same & 1 <> 0 THEN request ELSE ` + oddOr("upstream_request_id", 4) + ` END,
	CASE WHEN same & 2 <> 0 THEN correlation ELSE ` + oddOr("upstream_correlation_id", 5) + ` END,
	` + oddOr("customer", 6) + `, path, path_values, rest, coalesce(uti, ''), coalesce(iat, 0), coalesce(exp, 0), coalesce(bytes_in, 0), coalesce(bytes_out, 0),
	coalesce(duration_us, 0), coalesce(upstream_us, 0), ` + narrowColumns + `,
	generation, replays, instance, listener, peer, method, query_names, upstream, evidence, rule, application, user_agent, upstream_status, error
	FROM (SELECT *,
		CASE WHEN same & 4 <> 0 THEN ` + oddOr("call", 1) + ` ELSE ` + oddOr("request_id", 2) + ` END AS request,
		CASE WHEN same & 8 <> 0 THEN ` + oddOr("call", 1) + ` ELSE ` + oddOr("correlation_id", 3) + ` END AS correlation FROM `

func oddOr(column string, n int) string {
	return fmt.Sprintf("coalesce(%s::text, odd[%d], '')", column, n)
}

// page reads up to n calls of a stretch. With its last page, which a short page shows or
// that left calls are all that is wanted, come the open ones as of the same moment.
func (r *postgresReader) page(ctx context.Context, s *selected, p stretch, n int, wantOpen bool, left int) (calls, open []Call, err error) {
	err = r.snapshot(ctx, func(ctx context.Context, tx pgx.Tx) error {
		if n > 0 && p.low < endless {
			if calls, err = s.read(ctx, tx, p, n); err != nil {
				return err
			}
		}
		if wantOpen && (len(calls) < n || len(calls) == left) {
			open, err = s.readOpen(ctx, tx)
		}
		return err
	})
	return calls, open, err
}

func (s *selected) read(ctx context.Context, tx pgx.Tx, p stretch, n int) ([]Call, error) {
	if there, err := s.set(ctx, tx, p); err != nil || !there {
		return nil, err
	}
	w := s.where(p)
	rows, err := tx.Query(ctx, selectPostgres+fmt.Sprintf("(SELECT * FROM calls WHERE %[1]s ORDER BY %[2]s LIMIT %[3]d) AS few) AS c "+
		"JOIN (SELECT * FROM details WHERE %[4]s) AS d USING (day, ledger, detail) LEFT JOIN (SELECT * FROM tokens WHERE %[4]s) AS t USING (day, ledger, token) "+
		"JOIN dims USING (dim) ORDER BY finish",
		w.String(), s.order(), n, p.days()), w.args...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var calls []Call
	for rows.Next() {
		var c Call
		var d Dim
		var finish, duration, upstream int64
		var names string
		var path *string
		var values, left []byte
		into := []any{&finish, &c.Time, &c.ID, &c.RequestID, &c.CorrelationID, &c.UpstreamRequestID, &c.UpstreamCorrelationID,
			&c.Customer, &path, &values, &left, &c.UTI, &c.IssuedAt, &c.ExpiresAt, &c.BytesIn, &c.BytesOut, &duration, &upstream}
		into = append(into, d.narrowFields()...)
		into = append(into, &c.Generation, &c.Replays, &c.Instance, &c.Listener, &c.Peer, &c.Method, &names, &c.Upstream, &c.Evidence,
			&c.Rule, &c.Application, &c.UserAgent, &c.UpstreamStatus, &c.Error)
		if err := rows.Scan(into...); err != nil {
			return nil, err
		}
		if err := (*list)(&c.QueryNames).Scan(names); err != nil {
			return nil, err
		}
		c.Finish, c.Time = uint64(finish), c.Time.UTC()
		c.DurationMS, c.UpstreamMS = float64(duration)/1000, float64(upstream)/1000
		d.into(&c)
		if left != nil {
			var was rest
			if err := json.Unmarshal(left, &was); err != nil {
				return nil, fmt.Errorf("read the rest of a call: %w", err)
			}
			was.into(&c)
		}
		var packed any
		switch {
		case path != nil:
			packed = *path
		case values != nil:
			packed = values
		}
		if c.Path, err = unpackPath(packed, c.Route, c.Customer); err != nil {
			return nil, fmt.Errorf("read call %s: %w", c.ID, err)
		}
		calls = append(calls, c)
	}
	return calls, rows.Err()
}

func (s *selected) readOpen(ctx context.Context, tx pgx.Tx) ([]Call, error) {
	rows, err := tx.Query(ctx, `SELECT line FROM open ORDER BY "time", ledger, seq`)
	if err != nil {
		return nil, err
	}
	var open []Call
	var line []byte
	_, err = pgx.ForEachRow(rows, []any{&line}, func() error {
		var c Call
		if err := decodeDecision(string(line), &c); err != nil {
			return fmt.Errorf("read open call: %w", err)
		}
		if s.open(&c) {
			open = append(open, c)
		}
		return nil
	})
	return open, err
}
