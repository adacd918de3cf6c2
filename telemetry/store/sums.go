package store

import (
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/partnerguard/partnerguard/policy"
)

// Other stands in a Dim for what would have made too many of them: see maxDims.
const Other = "(other)"

// Dim is what the calls of one Sum have in common. The empty string and 0 stand
// for what is not known.
type Dim struct {
	// Integration is empty for outcomes whose decision the ledger does not hold.
	Integration string
	Owner       string
	TenantID    string
	AppID       string // claimed only, unless Verified; so are TenantID, UserRef and AMR
	UserRef     string
	Kind        string
	Verified    bool
	Route       string // not of CustomerSums
	Mode        string
	Effect      string
	Reason      string
	WouldReject bool
	Status      int64 // 0 also for interrupted calls
	Rejection   string
	Code        string
	MFA         string
	// MFACompliant is Microsoft's verdict: "true", "false", or empty.
	MFACompliant string
	AMR          string // a JSON array of strings
}

// Sum counts calls that ended and have Dim in common, which it shares with other sums.
type Sum struct {
	*Dim
	Customer    string // of CustomerSums only
	Calls       int64
	First, Last time.Time // when the earliest and the latest of them began, UTC
}

// Methods returns the values of AMR.
func (d *Dim) Methods() []string {
	if d.AMR == "" {
		return nil
	}
	// A report asks for very many, and hardly one holds a character that is escaped.
	if list, ok := strings.CutPrefix(d.AMR, `["`); ok && !strings.Contains(list, `\`) {
		return strings.Split(strings.TrimSuffix(list, `"]`), `","`)
	}
	var methods []string
	if json.Unmarshal([]byte(d.AMR), &methods) != nil {
		return nil
	}
	return methods
}

// Token is as much of the calls' token as the sum holds, for policy.Diagnose.
func (d *Dim) Token() policy.Token {
	return token(d.Verified, d.Kind, d.MFA, d.TenantID, d.AppID, d.Methods())
}

func dimOf(c *Call) Dim {
	d := Dim{
		Integration: c.Integration, Owner: c.Owner, TenantID: c.TenantID, AppID: c.AppID, UserRef: c.UserRef,
		Kind: c.Kind, Verified: c.Verified, Route: c.Route, Mode: c.Mode,
		Effect: c.Effect, Reason: c.Reason, WouldReject: c.WouldReject, Status: c.Status,
		Rejection: c.Rejection, Code: c.Code, MFA: c.MFA, AMR: listText(c.AMR),
	}
	if c.MFACompliant != nil {
		d.MFACompliant = fmt.Sprint(*c.MFACompliant)
	}
	return d
}

// into gives c what d says.
func (d *Dim) into(c *Call) {
	c.Integration, c.Owner, c.TenantID, c.AppID, c.UserRef = d.Integration, d.Owner, d.TenantID, d.AppID, d.UserRef
	c.Kind, c.Verified, c.Route, c.Mode = d.Kind, d.Verified, d.Route, d.Mode
	c.Effect, c.Reason, c.WouldReject, c.Status = d.Effect, d.Reason, d.WouldReject, d.Status
	c.Rejection, c.Code, c.MFA, c.AMR = d.Rejection, d.Code, d.MFA, d.Methods()
	if d.MFACompliant != "" {
		compliant := d.MFACompliant == "true"
		c.MFACompliant = &compliant
	}
}

// narrowColumns are the columns of a Dim in PostgreSQL, in the order of narrow and
// narrowFields.
const narrowColumns = `integration, owner, tid, app_id, user_ref, kind, verified, route, mode,
	effect, reason, would_reject, status, rejection, code, mfa, mfa_compliant, amr`

func (d *Dim) narrow() []any {
	return []any{d.Integration, d.Owner, d.TenantID, d.AppID, d.UserRef, d.Kind, d.Verified, d.Route, d.Mode,
		d.Effect, d.Reason, d.WouldReject, d.Status, d.Rejection, d.Code, d.MFA, d.MFACompliant, d.AMR}
}

func (d *Dim) narrowFields() []any {
	return []any{&d.Integration, &d.Owner, &d.TenantID, &d.AppID, &d.UserRef, &d.Kind, &d.Verified, &d.Route, &d.Mode,
		&d.Effect, &d.Reason, &d.WouldReject, &d.Status, &d.Rejection, &d.Code, &d.MFA, &d.MFACompliant, &d.AMR}
}

func (r *sqliteReader) Sums(ctx context.Context, since, until time.Time) ([]Sum, error) {
	return r.sums(ctx, byRoute, since, until)
}

func (r *sqliteReader) CustomerSums(ctx context.Context, since, until time.Time) ([]Sum, error) {
	return r.sums(ctx, byCustomer, since, until)
}

func (r *sqliteReader) sums(ctx context.Context, by int, since, until time.Time) ([]Sum, error) {
	tx, err := r.db.BeginTx(ctx, nil)
	if err != nil {
		return nil, r.fail(err)
	}
	defer tx.Rollback()
	low, high := hourRange(since, until)
	found := map[sumKey]*sumValue{}
	if err := collectSums(ctx, tx, by, low, high, found); err != nil {
		return nil, r.fail(err)
	}
	unfolded, err := unfoldedSums(ctx, tx, by, low, high)
	if err != nil {
		return nil, r.fail(err)
	}
	sums, err := joinSums(by, found, unfolded, func(dims map[int64]Dim) error { return readDims(ctx, tx, dims) })
	if err != nil {
		return nil, r.fail(err)
	}
	return sums, nil
}

// joinSums adds what is not folded to what is. By customer its dims have a route yet,
// which does not count. read sets the dims that are keys of dims.
func joinSums(by int, found map[sumKey]*sumValue, unfolded map[sumKey]sumValue, read func(dims map[int64]Dim) error) ([]Sum, error) {
	if by == byRoute {
		for key, v := range unfolded {
			add(found, key, v)
		}
		clear(unfolded)
	}
	dims := make(map[int64]Dim, len(found))
	for key := range found {
		dims[key.dim] = Dim{}
	}
	for key := range unfolded {
		dims[key.dim] = Dim{}
	}
	if err := read(dims); err != nil {
		return nil, err
	}
	shared, of := make(map[Dim]*Dim, len(dims)), make(map[int64]*Dim, len(dims))
	for id, d := range dims {
		if by == byCustomer {
			d.Route = ""
		}
		if shared[d] == nil {
			shared[d] = &d
		}
		of[id] = shared[d]
	}
	type what struct {
		dim      *Dim
		customer string
	}
	rest := make(map[what]sumValue, len(unfolded))
	for key, v := range unfolded {
		w := what{of[key.dim], key.customer}
		rest[w] = rest[w].plus(v)
	}
	sums := make([]Sum, 0, len(found)+len(rest))
	put := func(w what, v sumValue) {
		sums = append(sums, Sum{w.dim, w.customer, v.calls, time.UnixMicro(v.first).UTC(), time.UnixMicro(v.last).UTC()})
	}
	for key, v := range found {
		w := what{of[key.dim], key.customer}
		if also, ok := rest[w]; ok {
			*v = v.plus(also)
			delete(rest, w)
		}
		put(w, *v)
	}
	for w, v := range rest {
		put(w, v)
	}
	return sums, nil
}

// add adds v to the sum of key.
func add(sums map[sumKey]*sumValue, key sumKey, v sumValue) {
	if sum := sums[key]; sum != nil {
		*sum = sum.plus(v)
		return
	}
	sums[key] = &v
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

// collectSums adds the folded calls that began in the hours from low to high: days as a
// whole as far as they are there, the rest by the hour.
func collectSums(ctx context.Context, tx queryer, by int, low, high int64, found map[sumKey]*sumValue) error {
	visit := func(e sumEntry) { add(found, e.sumKey, e.sumValue) }
	for _, part := range []struct {
		kind  int
		query string
		args  []any
	}{
		{by + ofDay, "SELECT start, entries FROM sums WHERE kind = ? AND start BETWEEN ? AND ?", []any{(low + 23) / 24, (high+1)/24 - 1}},
		{by + ofHour, "SELECT start, entries FROM sums WHERE kind = ? AND start BETWEEN ? AND ? AND start / 24 NOT IN (SELECT start FROM sums WHERE kind = ? AND start BETWEEN ? AND ?)",
			[]any{low, high, by + ofDay, (low + 23) / 24, (high+1)/24 - 1}},
	} {
		rows, err := tx.QueryContext(ctx, part.query, append([]any{part.kind}, part.args...)...)
		if err != nil {
			return err
		}
		if err := eachSum(rows, part.kind, visit); err != nil {
			return err
		}
	}
	return nil
}

// eachSum hands the entries of sums to visit. rows are start and entries.
func eachSum(rows *sql.Rows, kind int, visit func(sumEntry)) error {
	defer rows.Close()
	for rows.Next() {
		var start int64
		var entries sql.RawBytes
		if err := rows.Scan(&start, &entries); err != nil {
			return err
		}
		if err := decodeSums(entries, startMicros(kind, start), func(e sumEntry) bool { visit(e); return true }); err != nil {
			return err
		}
	}
	return rows.Err()
}

// unfoldedSums returns what the calls behind the fold come to. By customer, the dims
// have a route yet.
func unfoldedSums(ctx context.Context, tx queryer, by int, low, high int64) (map[sumKey]sumValue, error) {
	rows, err := tx.QueryContext(ctx, "SELECT dim, customer, time FROM calls WHERE finish > (SELECT folded FROM position) AND time / ? BETWEEN ? AND ?", hourMicros, low, high)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	found := map[sumKey]sumValue{}
	for rows.Next() {
		var key sumKey
		var at int64
		if err := rows.Scan(&key.dim, idText{to: &key.customer}, &at); err != nil {
			return nil, err
		}
		if by == byRoute {
			key.customer = ""
		}
		found[key] = found[key].plus(sumValue{1, at, at})
	}
	return found, rows.Err()
}

// readDims sets the dims that are keys of dims.
func readDims(ctx context.Context, tx queryer, dims map[int64]Dim) error {
	all, err := numbers(ctx, tx, "SELECT count(*) FROM dims")
	if err != nil {
		return err
	}
	query, args := "SELECT dim, what FROM dims", []any(nil)
	if int64(len(dims)) < all[0]/4 {
		query, args = query+" WHERE dim IN (SELECT value FROM json_each(?))", []any{jsonNumbers(slices.Collect(maps.Keys(dims)))}
	}
	rows, err := tx.QueryContext(ctx, query, args...)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		var dim int64
		var what sql.RawBytes
		if err := rows.Scan(&dim, &what); err != nil {
			return err
		}
		if _, ok := dims[dim]; !ok {
			continue
		}
		if dims[dim], err = decodeDim(what); err != nil {
			return err
		}
	}
	return rows.Err()
}

func (r *sqliteReader) Gaps(ctx context.Context, since, until time.Time) (calls, outcomes int64, err error) {
	low, high := hourRange(since, until)
	err = r.db.QueryRowContext(ctx, `SELECT coalesce(sum(calls), 0), coalesce(sum(outcomes), 0) FROM gaps
		WHERE until / ?1 >= ?2 AND since / ?1 <= ?3`, hourMicros, low, high).Scan(&calls, &outcomes)
	if err != nil {
		return 0, 0, r.fail(err)
	}
	return calls, outcomes, nil
}

// hourRange are the first and the last hour between since and until.
func hourRange(since, until time.Time) (low, high int64) {
	high = 1 << 40
	if !since.IsZero() {
		low = hourOf(since)
	}
	if !until.IsZero() {
		high = hourOf(until.Add(-1))
	}
	return low, high
}
