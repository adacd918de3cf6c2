package store

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// decode reads one decision or outcome line into c. The ledger's lines are flat
// objects, so a scanner of fifty lines does here what encoding/json does in four
// times the time; a test holds the two together. c keeps parts of the line.
// Names that c does not have are skipped: a later version may add some.
func decode[T string | []byte](line T, c *Call) error {
	s := scanner{in: string(line)}
	s.expect('{')
	for s.err == nil && !s.accept('}') {
		key := s.text()
		s.expect(':')
		s.member(key, c)
		if !s.accept(',') {
			s.expect('}')
			break
		}
	}
	if s.space(); s.err == nil && s.at < len(s.in) {
		s.fail("text after the object")
	}
	if s.err == nil && c.ID == "" {
		s.err = errors.New("no call")
	}
	return s.err
}

// decodeDecision reads a decision line into c. Where the client sent no id, the call's
// own went out as such.
func decodeDecision[T string | []byte](line T, c *Call) error {
	err := decode(line, c)
	c.RequestID, c.CorrelationID = cmp.Or(c.RequestID, c.ID), cmp.Or(c.CorrelationID, c.ID)
	return err
}

func (s *scanner) member(key string, c *Call) {
	switch key {
	case "call":
		c.ID = s.text()
	case "time":
		c.Time = s.time()
	case "instance":
		c.Instance = s.text()
	case "generation":
		c.Generation = s.int()
	case "listener":
		c.Listener = s.text()
	case "peer":
		c.Peer = s.text()
	case "method":
		c.Method = s.text()
	case "route":
		c.Route = s.text()
	case "path":
		c.Path = s.text()
	case "query_names":
		c.QueryNames = s.texts()
	case "upstream":
		c.Upstream = s.text()
	case "integration":
		c.Integration = s.text()
	case "evidence":
		c.Evidence = s.text()
	case "owner":
		c.Owner = s.text()
	case "customer":
		c.Customer = s.text()
	case "kind":
		c.Kind = s.text()
	case "verified":
		c.Verified = s.bool()
	case "tid":
		c.TenantID = s.text()
	case "app_id":
		c.AppID = s.text()
	case "user_ref":
		c.UserRef = s.text()
	case "uti":
		c.UTI = s.text()
	case "iat":
		c.IssuedAt = s.seconds()
	case "exp":
		c.ExpiresAt = s.seconds()
	case "amr":
		c.AMR = s.texts()
	case "mfa":
		c.MFA = s.text()
	case "mode":
		c.Mode = s.text()
	case "rule":
		c.Rule = s.text()
	case "effect":
		c.Effect = s.text()
	case "reason":
		c.Reason = s.text()
	case "would_reject":
		c.WouldReject = s.bool()
	case "request_id":
		c.RequestID = s.text()
	case "correlation_id":
		c.CorrelationID = s.text()
	case "application":
		c.Application = s.text()
	case "user_agent":
		c.UserAgent = s.text()
	case "status":
		c.Status = s.int()
	case "rejection":
		c.Rejection = s.text()
	case "code":
		c.Code = s.text()
	case "upstream_status":
		c.UpstreamStatus = s.text()
	case "mfa_compliant":
		b := s.bool()
		c.MFACompliant = &b
	case "upstream_request_id":
		c.UpstreamRequestID = s.text()
	case "upstream_correlation_id":
		c.UpstreamCorrelationID = s.text()
	case "echoed":
		if s.bool() {
			c.UpstreamRequestID = echoed
		}
	case "bytes_in":
		c.BytesIn = s.int()
	case "bytes_out":
		c.BytesOut = s.int()
	case "duration_ms":
		c.DurationMS = s.float()
	case "upstream_ms":
		c.UpstreamMS = s.float()
	case "replays":
		c.Replays = s.int()
	case "error":
		c.Error = s.text()
	default:
		s.skip()
	}
}

// echoed is Microsoft's id of a call where it is the call's own, until the outcome meets
// its decision. The guard keeps no such character of what comes from outside.
const echoed = "\x00"

// end gives c what its outcome says.
func (c *Call) end(f Finished) {
	if f.UpstreamRequestID == echoed {
		f.UpstreamRequestID, f.UpstreamCorrelationID = c.RequestID, c.CorrelationID
	}
	c.Finished = f
}

// scanner reads JSON values from in. After the first error it reads zero values.
type scanner struct {
	in  string
	at  int
	err error
}

func (s *scanner) fail(what string) {
	if s.err == nil {
		s.err = fmt.Errorf("%s at byte %d", what, s.at)
		s.at = len(s.in)
	}
}

func (s *scanner) space() {
	for s.at < len(s.in) {
		switch s.in[s.at] {
		case ' ', '\t', '\n', '\r':
			s.at++
		default:
			return
		}
	}
}

// accept steps over b and reports whether it was there.
func (s *scanner) accept(b byte) bool {
	if s.at < len(s.in) && s.in[s.at] != b {
		s.space()
	}
	if s.at < len(s.in) && s.in[s.at] == b {
		s.at++
		return true
	}
	return false
}

func (s *scanner) expect(b byte) {
	if !s.accept(b) {
		s.fail("no " + strconv.QuoteRune(rune(b)))
	}
}

func (s *scanner) text() string {
	if !s.accept('"') {
		s.fail("no string")
		return ""
	}
	start, rest := s.at, s.in[s.at:]
	end := strings.IndexByte(rest, '"')
	if end >= 0 && strings.IndexByte(rest[:end], '\\') < 0 {
		s.at += end + 1
		return rest[:end]
	}
	for ; s.at < len(s.in); s.at++ {
		switch s.in[s.at] {
		case '\\':
			s.at++
		case '"':
			s.at++
			var out string
			if err := json.Unmarshal([]byte(s.in[start-1:s.at]), &out); err != nil {
				s.fail("bad string")
			}
			return out
		}
	}
	s.fail("string without end")
	return ""
}

func (s *scanner) texts() []string {
	s.expect('[')
	var out []string
	for s.err == nil && !s.accept(']') {
		out = append(out, s.text())
		if !s.accept(',') {
			s.expect(']')
			break
		}
	}
	return out
}

// word steps over a number, true, false or null.
func (s *scanner) word() string {
	s.space()
	start := s.at
	for ; s.at < len(s.in); s.at++ {
		switch s.in[s.at] {
		case ',', ']', '}', ' ', '\t', '\r', '\n':
			return s.in[start:s.at]
		}
	}
	return s.in[start:]
}

func (s *scanner) bool() bool {
	switch s.word() {
	case "true":
		return true
	case "false":
		return false
	}
	s.fail("no true or false")
	return false
}

func (s *scanner) int() int64 {
	n, err := strconv.ParseInt(s.word(), 10, 64)
	if err != nil {
		s.fail("no whole number")
	}
	return n
}

func (s *scanner) float() float64 {
	f, err := strconv.ParseFloat(s.word(), 64)
	if err != nil {
		s.fail("no number")
	}
	return f
}

func (s *scanner) time() time.Time {
	t, err := time.Parse(time.RFC3339Nano, s.text())
	if err != nil {
		s.fail("no time")
	}
	return t.UTC().Truncate(time.Microsecond)
}

// seconds reads seconds since 1970, as a number or as a time.
func (s *scanner) seconds() int64 {
	if s.space(); s.at < len(s.in) && s.in[s.at] == '"' {
		return s.time().Unix()
	}
	return s.int()
}

// skip steps over any value.
func (s *scanner) skip() {
	s.space()
	if s.at >= len(s.in) {
		s.fail("no value")
		return
	}
	switch s.in[s.at] {
	case '"':
		s.text()
	case '{', '[':
		d := json.NewDecoder(strings.NewReader(s.in[s.at:]))
		var v json.RawMessage
		if err := d.Decode(&v); err != nil {
			s.fail("bad value")
			return
		}
		s.at += int(d.InputOffset())
	default:
		if s.word() == "" {
			s.fail("no value")
		}
	}
}
