package store

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/partnerguard/partnerguard/policy"
)

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
	Customer    string
	Route       string
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

// Sum counts calls that ended and have Dim in common.
type Sum struct {
	Dim
	Calls       int64
	First, Last time.Time // when the earliest and the latest of them began, UTC
}

// Methods returns the values of AMR.
func (d *Dim) Methods() []string {
	if d.AMR == "" {
		return nil
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
		Kind: c.Kind, Verified: c.Verified, Customer: c.Customer, Route: c.Route, Mode: c.Mode,
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
	c.Kind, c.Verified, c.Customer, c.Route, c.Mode = d.Kind, d.Verified, d.Customer, d.Route, d.Mode
	c.Effect, c.Reason, c.WouldReject, c.Status = d.Effect, d.Reason, d.WouldReject, d.Status
	c.Rejection, c.Code, c.MFA, c.AMR = d.Rejection, d.Code, d.MFA, d.Methods()
	if d.MFACompliant != "" {
		compliant := d.MFACompliant == "true"
		c.MFACompliant = &compliant
	}
}

// dimColumns are the columns of dims behind hour, in the order of columns and
// fields.
const dimColumns = `integration, owner, tid, app_id, user_ref, kind, verified, customer, route, mode,
	effect, reason, would_reject, status, rejection, code, mfa, mfa_compliant, amr`

func (d *Dim) columns() []any {
	return []any{d.Integration, d.Owner, d.TenantID, d.AppID, d.UserRef, d.Kind, d.Verified, d.Customer, d.Route, d.Mode,
		d.Effect, d.Reason, d.WouldReject, d.Status, d.Rejection, d.Code, d.MFA, d.MFACompliant, d.AMR}
}

func (d *Dim) fields() []any {
	return []any{&d.Integration, &d.Owner, &d.TenantID, &d.AppID, &d.UserRef, &d.Kind, &d.Verified, &d.Customer, &d.Route, &d.Mode,
		&d.Effect, &d.Reason, &d.WouldReject, &d.Status, &d.Rejection, &d.Code, &d.MFA, &d.MFACompliant, &d.AMR}
}

func (r *sqliteReader) Sums(ctx context.Context, since, until time.Time) ([]Sum, error) {
	low, high := hourRange(since, until)
	rows, err := r.db.QueryContext(ctx, `
		SELECT `+dimColumns+`, n, first, last FROM (
			SELECT dim, sum(calls) AS n, min(first) AS first, max(last) AS last FROM (
				SELECT dim, calls, first, last FROM sums WHERE hour BETWEEN ?1 AND ?2
				UNION ALL
				SELECT dim, 1, time, time FROM calls WHERE finish > (SELECT folded FROM position) AND time / ?3 BETWEEN ?1 AND ?2
			) GROUP BY dim
		) JOIN dims USING (dim)`, low, high, hourMicros)
	if err != nil {
		return nil, r.fail(err)
	}
	defer rows.Close()
	var sums []Sum
	for rows.Next() {
		var s Sum
		var first, last int64
		if err := rows.Scan(append(s.Dim.fields(), &s.Calls, &first, &last)...); err != nil {
			return nil, r.fail(err)
		}
		s.First, s.Last = time.UnixMicro(first).UTC(), time.UnixMicro(last).UTC()
		sums = append(sums, s)
	}
	if err := rows.Err(); err != nil {
		return nil, r.fail(err)
	}
	return sums, nil
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
