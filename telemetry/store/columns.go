package store

import (
	"database/sql"
	"database/sql/driver"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/google/uuid"
)

// callColumns are the columns of calls, in the order of appendRow. A row of them is
// the larger part of what a call costs, and each column of what a row costs.
const callColumns = `finish, call, time, dim, detail, token, customer, path, rest,
	request_id, correlation_id, upstream_request_id, upstream_correlation_id,
	bytes_in, bytes_out, duration_us, upstream_us`

// row is what a row of calls says by reference. detail and token are rows of those
// tables; token is 0 for none.
type row struct {
	dim, detail, token int64
	rest               string
}

func appendRow(args []driver.NamedValue, c *Call, r row) []driver.NamedValue {
	for _, v := range [...]driver.Value{
		int64(c.Finish), packID(c.ID), c.Time.UnixMicro(), r.dim, r.detail, nullInt(r.token), packID(c.Customer), packPath(c.Path, c.Route, c.Customer), nullText(r.rest),
		packID(c.RequestID), packID(c.CorrelationID), packUpstreamID(c.UpstreamRequestID, c.RequestID), packUpstreamID(c.UpstreamCorrelationID, c.CorrelationID),
		nullInt(c.BytesIn), nullInt(c.BytesOut), nullInt(micros(c.DurationMS)), nullInt(micros(c.UpstreamMS)),
	} {
		args = append(args, driver.NamedValue{Ordinal: len(args) + 1, Value: v})
	}
	return args
}

// detailColumns are the columns of details behind detail, in the order of
// detailOf.
const detailColumns = `instance, generation, listener, peer, method, query_names, upstream, evidence,
	rule, application, user_agent, upstream_status, replays, error`

func detailOf(c *Call) []any {
	return []any{nullText(c.Instance), nullInt(c.Generation), nullText(c.Listener), nullText(c.Peer), nullText(c.Method), nullText(listText(c.QueryNames)), nullText(c.Upstream), nullText(c.Evidence),
		nullText(c.Rule), nullText(c.Application), nullText(c.UserAgent), nullText(c.UpstreamStatus), nullInt(c.Replays), nullText(c.Error)}
}

// selectCalls reads whole calls, for scanCall. CROSS JOIN is SQLite's word for a
// join in the order written.
const selectCalls = "SELECT " + callColumns + ", what, " + detailColumns + ", uti, iat, exp" +
	" FROM calls CROSS JOIN dims USING (dim) CROSS JOIN details USING (detail) LEFT JOIN tokens USING (token) "

// scanCall returns a call, and the call as it counts: as its dim says it.
func scanCall(rows *sql.Rows) (c, counted Call, err error) {
	var (
		customer         string
		what             sql.RawBytes
		at, dim, detail  int64
		token            sql.NullInt64
		path             any
		left             sql.NullString
		request          = idText{to: &c.RequestID}
		correlation      = idText{to: &c.CorrelationID}
		upstreamRequest  = idText{to: &c.UpstreamRequestID, client: &c.RequestID}
		upstreamRelation = idText{to: &c.UpstreamCorrelationID, client: &c.CorrelationID}
	)
	into := []any{&c.Finish, idText{to: &c.ID}, &at, &dim, &detail, &token, idText{to: &customer}, &path, &left,
		request, correlation, upstreamRequest, upstreamRelation,
		number(&c.BytesIn), number(&c.BytesOut), (*millis)(&c.DurationMS), (*millis)(&c.UpstreamMS), &what}
	into = append(into, text(&c.Instance), number(&c.Generation), text(&c.Listener), text(&c.Peer), text(&c.Method), (*list)(&c.QueryNames), text(&c.Upstream), text(&c.Evidence),
		text(&c.Rule), text(&c.Application), text(&c.UserAgent), text(&c.UpstreamStatus), number(&c.Replays), text(&c.Error),
		utiText{&c.UTI}, number(&c.IssuedAt), number(&c.ExpiresAt))
	if err := rows.Scan(into...); err != nil {
		return Call{}, Call{}, err
	}
	c.Time = time.UnixMicro(at).UTC()
	d, err := decodeDim(what)
	if err != nil {
		return Call{}, Call{}, err
	}
	c.Customer = customer
	d.into(&c)
	counted = c
	if left.Valid {
		var r rest
		if err := json.Unmarshal([]byte(left.String), &r); err != nil {
			return Call{}, Call{}, fmt.Errorf("read the rest of a call: %w", err)
		}
		r.into(&c)
	}
	c.Path, err = unpackPath(path, c.Route, c.Customer)
	return c, counted, err
}

// packUTI is a token's id as tokens holds it: the 16 bytes of which Entra's are the
// base64url.
func packUTI(uti string) driver.Value {
	if b, err := base64.RawURLEncoding.DecodeString(uti); err == nil && len(b) == 16 && base64.RawURLEncoding.EncodeToString(b) == uti {
		return b
	}
	return nullText(uti)
}

// utiText scans what packUTI made.
type utiText struct{ to *string }

func (t utiText) Scan(v any) error {
	switch v := v.(type) {
	case nil:
	case string:
		*t.to = v
	case []byte:
		*t.to = base64.RawURLEncoding.EncodeToString(v)
	default:
		return fmt.Errorf("%T is no token's id", v)
	}
	return nil
}

// packID is an id as calls holds it: 16 bytes for a GUID in the form that unpacking
// gives back, 36 characters in lower case.
func packID(id string) driver.Value {
	if id == "" {
		return nil
	}
	if guid, ok := parseGUID(id); ok {
		return guid[:]
	}
	return id
}

func parseGUID(id string) (guid uuid.UUID, ok bool) {
	if len(id) != 36 {
		return guid, false
	}
	for i := range len(id) {
		if 'A' <= id[i] && id[i] <= 'F' {
			return guid, false
		}
	}
	guid, err := uuid.Parse(id)
	return guid, err == nil
}

// packUpstreamID is packID of Microsoft's id, which mostly is the client's.
func packUpstreamID(id, client string) driver.Value {
	if id != "" && id == client {
		return int64(0)
	}
	return packID(id)
}

// idText scans what packID, and with client what packUpstreamID made.
type idText struct{ to, client *string }

func (t idText) Scan(v any) error {
	switch v := v.(type) {
	case nil:
	case string:
		*t.to = v
	case []byte:
		guid, err := uuid.FromBytes(v)
		if err != nil {
			return err
		}
		*t.to = guid.String()
	case int64:
		if t.client == nil {
			return fmt.Errorf("%d is no id", v)
		}
		*t.to = *t.client
	default:
		return fmt.Errorf("%T is no id", v)
	}
	return nil
}

// micros is a duration of the ledger's, which has three decimals, as a whole number.
func micros(ms float64) int64 { return int64(math.Round(ms * 1000)) }

// What is not known is NULL in the database and the zero value in a Call.

func nullText(s string) driver.Value {
	if s == "" {
		return nil
	}
	return s
}

func nullInt(n int64) driver.Value {
	if n == 0 {
		return nil
	}
	return n
}

// listText is list as a JSON array.
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

// millis scans whole microseconds.
type millis float64

func (f *millis) Scan(v any) error {
	var n sql.NullInt64
	err := n.Scan(v)
	*f = millis(float64(n.Int64) / 1000)
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

// marks are n parameters of a statement.
func marks(n int) string { return "?" + strings.Repeat(", ?", n-1) }
