package ledger

import (
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// exportRow is one call, decision and outcome joined, as CSV and Parquet have it.
// The columns have the names of the ledger's members, before them the numbers of
// the two records. What is not known is null.
type exportRow struct {
	N        int64 `parquet:"n,optional"`
	OutcomeN int64 `parquet:"outcome_n,optional"`

	Call          string    `parquet:"call"`
	Time          time.Time `parquet:"time,timestamp(microsecond),optional"`
	Instance      string    `parquet:"instance,optional,dict"`
	Generation    int64     `parquet:"generation,optional"`
	Listener      string    `parquet:"listener,optional,dict"`
	Peer          string    `parquet:"peer,optional,dict"`
	Method        string    `parquet:"method,optional,dict"`
	Route         string    `parquet:"route,optional,dict"`
	Path          string    `parquet:"path,optional"`
	QueryNames    []string  `parquet:"query_names,optional,list"`
	Upstream      string    `parquet:"upstream,optional,dict"`
	Integration   string    `parquet:"integration,optional,dict"`
	Evidence      string    `parquet:"evidence,optional,dict"`
	Owner         string    `parquet:"owner,optional,dict"`
	Customer      string    `parquet:"customer,optional,dict"`
	Kind          string    `parquet:"kind,optional,dict"`
	Verified      *bool     `parquet:"verified,optional"`
	TenantID      string    `parquet:"tid,optional,dict"`
	AppID         string    `parquet:"app_id,optional,dict"`
	UserRef       string    `parquet:"user_ref,optional,dict"`
	UTI           string    `parquet:"uti,optional"`
	IssuedAt      time.Time `parquet:"iat,timestamp(microsecond),optional"`
	ExpiresAt     time.Time `parquet:"exp,timestamp(microsecond),optional"`
	AMR           []string  `parquet:"amr,optional,list"`
	MFA           string    `parquet:"mfa,optional,dict"`
	Mode          string    `parquet:"mode,optional,dict"`
	Rule          string    `parquet:"rule,optional,dict"`
	Effect        string    `parquet:"effect,optional,dict"`
	Reason        string    `parquet:"reason,optional,dict"`
	WouldReject   *bool     `parquet:"would_reject,optional"`
	RequestID     string    `parquet:"request_id,optional"`
	CorrelationID string    `parquet:"correlation_id,optional"`
	Application   string    `parquet:"application,optional,dict"`
	UserAgent     string    `parquet:"user_agent,optional,dict"`

	Status                int64   `parquet:"status,optional"`
	Rejection             string  `parquet:"rejection,optional,dict"`
	Code                  string  `parquet:"code,optional,dict"`
	UpstreamStatus        string  `parquet:"upstream_status,optional,dict"`
	MFACompliant          *bool   `parquet:"mfa_compliant,optional"`
	UpstreamRequestID     string  `parquet:"upstream_request_id,optional"`
	UpstreamCorrelationID string  `parquet:"upstream_correlation_id,optional"`
	BytesIn               int64   `parquet:"bytes_in,optional"`
	BytesOut              int64   `parquet:"bytes_out,optional"`
	DurationMS            float64 `parquet:"duration_ms,optional"`
	UpstreamMS            float64 `parquet:"upstream_ms,optional"`
	Replays               int64   `parquet:"replays,optional"`
	Error                 string  `parquet:"error,optional,dict"`
}

// take reads a decision or outcome line into r. Members that r does not have are
// passed over: a later version may write more.
func (r *exportRow) take(line []byte) error {
	return eachMember(string(line), func(name string, v value) (bool, error) { return true, r.set(name, v) })
}

func (r *exportRow) set(name string, v value) (err error) {
	switch name {
	case "call":
		r.Call, err = v.text()
	case "time":
		r.Time, err = v.time()
	case "instance":
		r.Instance, err = v.text()
	case "generation":
		r.Generation, err = v.int()
	case "listener":
		r.Listener, err = v.text()
	case "peer":
		r.Peer, err = v.text()
	case "method":
		r.Method, err = v.text()
	case "route":
		r.Route, err = v.text()
	case "path":
		r.Path, err = v.text()
	case "query_names":
		r.QueryNames, err = v.texts()
	case "upstream":
		r.Upstream, err = v.text()
	case "integration":
		r.Integration, err = v.text()
	case "evidence":
		r.Evidence, err = v.text()
	case "owner":
		r.Owner, err = v.text()
	case "customer":
		r.Customer, err = v.text()
	case "kind":
		r.Kind, err = v.text()
	case "verified":
		r.Verified, err = v.bool()
	case "tid":
		r.TenantID, err = v.text()
	case "app_id":
		r.AppID, err = v.text()
	case "user_ref":
		r.UserRef, err = v.text()
	case "uti":
		r.UTI, err = v.text()
	case "iat":
		r.IssuedAt, err = v.seconds()
	case "exp":
		r.ExpiresAt, err = v.seconds()
	case "amr":
		r.AMR, err = v.texts()
	case "mfa":
		r.MFA, err = v.text()
	case "mode":
		r.Mode, err = v.text()
	case "rule":
		r.Rule, err = v.text()
	case "effect":
		r.Effect, err = v.text()
	case "reason":
		r.Reason, err = v.text()
	case "would_reject":
		r.WouldReject, err = v.bool()
	case "request_id":
		r.RequestID, err = v.text()
	case "correlation_id":
		r.CorrelationID, err = v.text()
	case "application":
		r.Application, err = v.text()
	case "user_agent":
		r.UserAgent, err = v.text()
	case "status":
		r.Status, err = v.int()
	case "rejection":
		r.Rejection, err = v.text()
	case "code":
		r.Code, err = v.text()
	case "upstream_status":
		r.UpstreamStatus, err = v.text()
	case "mfa_compliant":
		r.MFACompliant, err = v.bool()
	case "upstream_request_id":
		r.UpstreamRequestID, err = v.text()
	case "upstream_correlation_id":
		r.UpstreamCorrelationID, err = v.text()
	case "echoed":
		r.UpstreamRequestID, r.UpstreamCorrelationID = r.RequestID, r.CorrelationID
	case "bytes_in":
		r.BytesIn, err = v.int()
	case "bytes_out":
		r.BytesOut, err = v.int()
	case "duration_ms":
		r.DurationMS, err = v.float()
	case "upstream_ms":
		r.UpstreamMS, err = v.float()
	case "replays":
		r.Replays, err = v.int()
	case "error":
		r.Error, err = v.text()
	}
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

// value is a JSON value as it stands in a line.
type value string

var errValue = errors.New("value has another type")

func (v value) text() (string, error) {
	if len(v) < 2 || v[0] != '"' {
		return "", errValue
	}
	if s := string(v[1 : len(v)-1]); strings.IndexByte(s, '\\') < 0 {
		return s, nil
	}
	var s string
	err := json.Unmarshal([]byte(v), &s)
	return s, err
}

func (v value) texts() (list []string, err error) {
	err = json.Unmarshal([]byte(v), &list)
	return list, err
}

func (v value) int() (int64, error) { return strconv.ParseInt(string(v), 10, 64) }

func (v value) float() (float64, error) { return strconv.ParseFloat(string(v), 64) }

func (v value) bool() (*bool, error) {
	b := v == "true"
	if !b && v != "false" {
		return nil, errValue
	}
	return &b, nil
}

func (v value) time() (time.Time, error) {
	s, err := v.text()
	if err != nil {
		return time.Time{}, err
	}
	t, err := time.Parse(time.RFC3339Nano, s)
	return t.UTC(), err
}

// seconds reads seconds since 1970.
func (v value) seconds() (time.Time, error) {
	n, err := v.int()
	return time.Unix(n, 0).UTC(), err
}

var errLine = errors.New("not a flat JSON object")

// eachMember calls visit with the members of a line of the ledger, in order, until it
// wants no more. A line is a flat object without white space, whose names need no
// escapes and whose values are strings, numbers, true, false, or lists of strings.
func eachMember(line string, visit func(name string, v value) (more bool, err error)) error {
	s, ok := strings.CutPrefix(strings.TrimRight(line, "\n"), "{")
	for ok {
		if s, ok = strings.CutPrefix(s, `"`); !ok {
			break
		}
		name, rest, found := strings.Cut(s, `":`)
		n := valueEnd(rest)
		if !found || n <= 0 || n >= len(rest) {
			break
		}
		if more, err := visit(name, value(rest[:n])); err != nil || !more {
			return err
		}
		switch s = rest[n+1:]; {
		case rest[n] == ',':
			continue
		case rest[n] == '}' && s == "":
			return nil
		}
		break
	}
	return errLine
}

// valueEnd returns where the value that s begins with ends; -1 when it does not.
func valueEnd(s string) int {
	if s == "" {
		return -1
	}
	if s[0] != '"' && s[0] != '[' {
		return strings.IndexAny(s, ",}")
	}
	list, quoted := s[0] == '[', s[0] == '"'
	for i := 1; i < len(s); i++ {
		switch c := s[i]; {
		case quoted && c == '\\':
			i++
		case c == '"':
			if quoted = !quoted; !quoted && !list {
				return i + 1
			}
		case c == ']' && !quoted:
			return i + 1
		}
	}
	return -1
}
