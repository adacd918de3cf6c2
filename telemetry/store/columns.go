package store

import (
	"database/sql"
	"encoding/json"
	"time"
)

// callColumns are the columns of calls behind finish and seq, in the order of
// appendColumns and scanCall.
const callColumns = `call, time, instance, generation, listener, peer, method, route, path,
	query_names, upstream, integration, evidence, owner, customer,
	kind, verified, tid, app_id, user_ref, uti, iat, exp,
	amr, mfa, mode, rule, effect, reason, would_reject,
	request_id, correlation_id, application, user_agent,
	status, rejection, code, upstream_status, mfa_compliant,
	upstream_request_id, upstream_correlation_id, bytes_in, bytes_out,
	duration_ms, upstream_ms, replays, error`

func appendColumns(args []any, c *Call) []any {
	return append(args,
		c.ID, c.Time.UnixMicro(), nullText(c.Instance), nullInt(c.Generation), nullText(c.Listener), nullText(c.Peer), nullText(c.Method), nullText(c.Route), nullText(c.Path),
		nullList(c.QueryNames), nullText(c.Upstream), nullText(c.Integration), nullText(c.Evidence), nullText(c.Owner), nullText(c.Customer),
		nullText(c.Kind), c.Verified, nullText(c.TenantID), nullText(c.AppID), nullText(c.UserRef), nullText(c.UTI), nullInt(c.IssuedAt), nullInt(c.ExpiresAt),
		nullList(c.AMR), nullText(c.MFA), nullText(c.Mode), nullText(c.Rule), nullText(c.Effect), nullText(c.Reason), c.WouldReject,
		nullText(c.RequestID), nullText(c.CorrelationID), nullText(c.Application), nullText(c.UserAgent),
		nullInt(c.Status), nullText(c.Rejection), nullText(c.Code), nullText(c.UpstreamStatus), nullBool(c.MFACompliant),
		nullText(c.UpstreamRequestID), nullText(c.UpstreamCorrelationID), nullInt(c.BytesIn), nullInt(c.BytesOut),
		nullFloat(c.DurationMS), nullFloat(c.UpstreamMS), nullInt(c.Replays), nullText(c.Error),
	)
}

// scanCall reads finish and callColumns.
func scanCall(rows *sql.Rows) (Call, error) {
	var c Call
	var at int64
	var compliant sql.NullBool
	err := rows.Scan(&c.Finish,
		&c.ID, &at, text(&c.Instance), number(&c.Generation), text(&c.Listener), text(&c.Peer), text(&c.Method), text(&c.Route), text(&c.Path),
		(*list)(&c.QueryNames), text(&c.Upstream), text(&c.Integration), text(&c.Evidence), text(&c.Owner), text(&c.Customer),
		text(&c.Kind), &c.Verified, text(&c.TenantID), text(&c.AppID), text(&c.UserRef), text(&c.UTI), number(&c.IssuedAt), number(&c.ExpiresAt),
		(*list)(&c.AMR), text(&c.MFA), text(&c.Mode), text(&c.Rule), text(&c.Effect), text(&c.Reason), &c.WouldReject,
		text(&c.RequestID), text(&c.CorrelationID), text(&c.Application), text(&c.UserAgent),
		number(&c.Status), text(&c.Rejection), text(&c.Code), text(&c.UpstreamStatus), &compliant,
		text(&c.UpstreamRequestID), text(&c.UpstreamCorrelationID), number(&c.BytesIn), number(&c.BytesOut),
		(*zeroFloat)(&c.DurationMS), (*zeroFloat)(&c.UpstreamMS), number(&c.Replays), text(&c.Error),
	)
	c.Time = time.UnixMicro(at).UTC()
	if compliant.Valid {
		c.MFACompliant = &compliant.Bool
	}
	return c, err
}

// What is not known is NULL in the database and the zero value in a Call.

func nullText(s string) any {
	if s == "" {
		return nil
	}
	return s
}

func nullInt(n int64) any {
	if n == 0 {
		return nil
	}
	return n
}

func nullFloat(f float64) any {
	if f == 0 {
		return nil
	}
	return f
}

func nullBool(b *bool) any {
	if b == nil {
		return nil
	}
	return *b
}

// nullList is list as a JSON array.
func nullList(list []string) any {
	if len(list) == 0 {
		return nil
	}
	return listText(list)
}

func listText(list []string) string {
	if len(list) == 0 {
		return ""
	}
	b, err := json.Marshal(list)
	if err != nil {
		return "" // strings always marshal
	}
	return string(b)
}

type zeroText string

func text(s *string) *zeroText { return (*zeroText)(s) }

func (s *zeroText) Scan(v any) error {
	var n sql.NullString
	err := n.Scan(v)
	*s = zeroText(n.String)
	return err
}

type zeroInt int64

func number(n *int64) *zeroInt { return (*zeroInt)(n) }

func (i *zeroInt) Scan(v any) error {
	var n sql.NullInt64
	err := n.Scan(v)
	*i = zeroInt(n.Int64)
	return err
}

type zeroFloat float64

func (f *zeroFloat) Scan(v any) error {
	var n sql.NullFloat64
	err := n.Scan(v)
	*f = zeroFloat(n.Float64)
	return err
}

type list []string

func (l *list) Scan(v any) error {
	var n sql.NullString
	if err := n.Scan(v); err != nil || n.String == "" {
		return err
	}
	return json.Unmarshal([]byte(n.String), (*[]string)(l))
}
