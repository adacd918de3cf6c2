package telemetry

import (
	"encoding/hex"
	"strconv"
	"time"
	"unicode/utf8"

	"github.com/partnerguard/partnerguard/policy"
	"github.com/partnerguard/partnerguard/proxy"
)

// TimeLayout is how a time stands in every record: RFC 3339, UTC, microseconds.
const TimeLayout = "2006-01-02T15:04:05.000000Z07:00"

// AppendDecision appends what rec says of its decision as the members of a JSON
// object, without the braces: `"call":"…","time":"…",…`. These are the names that
// the ledger, the log and the API share. What is unknown (an empty string, a zero
// number, an empty list) is left out; verified and would_reject always stand.
//
// An id of the request is left out where it is the call's: the client sent none.
//
// userRef stands for the user; the object id and the name of the user never do.
// Nothing is allocated beyond the growth of dst and, once, of rec.Encoded, which
// keeps the result: who comes second copies it.
func AppendDecision(dst []byte, rec *proxy.Record, userRef string) []byte {
	if len(rec.Encoded) > 0 {
		return append(dst, rec.Encoded...)
	}
	start := len(dst)
	dst = appendDecision(dst, rec, userRef)
	rec.Encoded = append(rec.Encoded, dst[start:]...)
	return dst
}

func appendDecision(dst []byte, rec *proxy.Record, userRef string) []byte {
	d, t := &rec.Decided, &rec.Token
	dst = appendCall(dst, rec.Call)
	end := len(dst) - 1 // of the id
	if !d.Time.IsZero() {
		dst = append(dst, `,"time":"`...)
		dst = d.Time.UTC().AppendFormat(dst, TimeLayout)
		dst = append(dst, '"')
	}
	dst = appendText(dst, `,"instance":`, d.Instance)
	if d.Generation != 0 {
		dst = append(dst, `,"generation":`...)
		dst = strconv.AppendUint(dst, d.Generation, 10)
	}
	dst = appendText(dst, `,"listener":`, d.Listener)
	dst = appendText(dst, `,"peer":`, d.Peer)
	dst = appendText(dst, `,"method":`, d.Method)
	dst = appendText(dst, `,"route":`, d.Route)
	dst = appendText(dst, `,"path":`, d.Path)
	dst = appendList(dst, `,"query_names":`, d.QueryNames)
	dst = appendText(dst, `,"upstream":`, d.Upstream)
	dst = appendText(dst, `,"integration":`, d.Integration)
	dst = appendText(dst, `,"evidence":`, d.Evidence)
	dst = appendText(dst, `,"owner":`, d.Owner)
	dst = appendText(dst, `,"customer":`, d.Customer)
	dst = appendText(dst, `,"kind":`, t.Kind.String())
	dst = append(dst, `,"verified":`...)
	dst = strconv.AppendBool(dst, t.Verified)
	dst = appendText(dst, `,"tid":`, t.TenantID)
	dst = appendText(dst, `,"app_id":`, t.AppID)
	dst = appendText(dst, `,"user_ref":`, userRef)
	dst = appendText(dst, `,"uti":`, t.UTI)
	dst = appendInt(dst, `,"iat":`, t.IssuedAt)
	dst = appendInt(dst, `,"exp":`, t.ExpiresAt)
	dst = appendList(dst, `,"amr":`, t.AMR)
	dst = appendText(dst, `,"mfa":`, t.MFA.String())
	dst = appendText(dst, `,"mode":`, d.Mode.String())
	dst = appendText(dst, `,"rule":`, d.Rule)
	dst = appendText(dst, `,"effect":`, d.Effect.String())
	dst = appendText(dst, `,"reason":`, string(d.Reason))
	dst = append(dst, `,"would_reject":`...)
	dst = strconv.AppendBool(dst, d.WouldReject)
	if d.RequestID != string(dst[end-36:end]) {
		dst = appendText(dst, `,"request_id":`, d.RequestID)
	}
	if d.CorrelationID != string(dst[end-36:end]) {
		dst = appendText(dst, `,"correlation_id":`, d.CorrelationID)
	}
	dst = appendText(dst, `,"application":`, d.Application)
	return appendText(dst, `,"user_agent":`, d.UserAgent)
}

// AppendOutcome appends what rec says of its outcome as the members of a JSON
// object, without the braces: `"call":"…","status":…`. What is unknown is left out.
// Durations are milliseconds with three decimals. echoed says that the answer named the
// call's own request_id and correlation_id, as Microsoft's do.
func AppendOutcome(dst []byte, rec *proxy.Record) []byte {
	f := &rec.Finished
	dst = appendCall(dst, rec.Call)
	dst = appendInt(dst, `,"status":`, int64(f.Status))
	dst = appendText(dst, `,"rejection":`, string(f.Rejection))
	dst = appendText(dst, `,"code":`, f.Code)
	dst = appendText(dst, `,"upstream_status":`, f.UpstreamStatus)
	if f.MFACompliant != policy.CompliantUnknown {
		dst = append(dst, `,"mfa_compliant":`...)
		dst = strconv.AppendBool(dst, f.MFACompliant == policy.CompliantTrue)
	}
	if f.UpstreamRequestID != "" && f.UpstreamRequestID == rec.RequestID && f.UpstreamCorrelationID == rec.CorrelationID {
		dst = append(dst, `,"echoed":true`...)
	} else {
		dst = appendText(dst, `,"upstream_request_id":`, f.UpstreamRequestID)
		dst = appendText(dst, `,"upstream_correlation_id":`, f.UpstreamCorrelationID)
	}
	dst = appendInt(dst, `,"bytes_in":`, f.BytesIn)
	dst = appendInt(dst, `,"bytes_out":`, f.BytesOut)
	dst = appendMillis(dst, `,"duration_ms":`, f.Duration)
	dst = appendMillis(dst, `,"upstream_ms":`, f.UpstreamTime)
	dst = appendInt(dst, `,"replays":`, int64(f.Replays))
	return appendText(dst, `,"error":`, f.Error)
}

// AppendString appends s as a JSON string. Invalid UTF-8 becomes U+FFFD. Besides
// what JSON demands it escapes everything that could drive a terminal or turn the
// reading direction of a line: DEL, C1 controls, line separators, bidi controls.
func AppendString(dst []byte, s string) []byte {
	const digits = "0123456789abcdef"
	dst = append(dst, '"')
	start := 0
	for i := plain(s); i < len(s); {
		c := s[i]
		if c >= ' ' && c < 0x7f && c != '"' && c != '\\' {
			i++
			continue
		}
		if c < utf8.RuneSelf {
			dst = append(dst, s[start:i]...)
			if c == '"' || c == '\\' {
				dst = append(dst, '\\', c)
			} else {
				dst = append(dst, '\\', 'u', '0', '0', digits[c>>4], digits[c&15])
			}
			i++
			start = i
			continue
		}
		r, size := utf8.DecodeRuneInString(s[i:])
		switch {
		case r == utf8.RuneError && size == 1:
			dst = append(dst, s[start:i]...)
			dst = append(dst, "\ufffd"...)
			start = i + size
		case drives(r):
			dst = append(dst, s[start:i]...)
			dst = append(dst, '\\', 'u', digits[r>>12&15], digits[r>>8&15], digits[r>>4&15], digits[r&15])
			start = i + size
		}
		i += size
	}
	dst = append(dst, s[start:]...)
	return append(dst, '"')
}

// plain returns how many bytes at the beginning of s need no look, in steps of
// eight. Nearly all text of a record is plain, and most of the cost of a record is
// looking at its text.
func plain(s string) int {
	const ones, highs = 0x0101010101010101, 0x8080808080808080
	rest := s
	for len(rest) >= 8 {
		x := uint64(rest[0]) | uint64(rest[1])<<8 | uint64(rest[2])<<16 | uint64(rest[3])<<24 |
			uint64(rest[4])<<32 | uint64(rest[5])<<40 | uint64(rest[6])<<48 | uint64(rest[7])<<56
		// The high bit of a byte tells: of x, that it is no ASCII; of x-n*ones, that it
		// is below n. A borrow can only make a plain byte look otherwise.
		quote, slash, del := x^'"'*ones, x^'\\'*ones, x^0x7f*ones
		if (x|(x-' '*ones)|(quote-ones)|(slash-ones)|(del-ones))&highs != 0 {
			break
		}
		rest = rest[8:]
	}
	return len(s) - len(rest)
}

// drives reports whether a terminal or a pager acts on r instead of showing it.
// All of these are below U+10000.
func drives(r rune) bool {
	switch {
	case r >= 0x80 && r <= 0x9f, // C1 controls; U+009B opens an escape sequence
		r == 0x061c, r == 0x200e, r == 0x200f, // direction marks
		r >= 0x2028 && r <= 0x202e, // line separators, bidi embeddings and overrides
		r >= 0x2066 && r <= 0x2069: // bidi isolates
		return true
	}
	return false
}

// appendCall appends the member every record begins with.
func appendCall(dst []byte, id proxy.CallID) []byte {
	dst = append(dst, `"call":"`...)
	dst = hex.AppendEncode(dst, id[0:4])
	dst = append(dst, '-')
	dst = hex.AppendEncode(dst, id[4:6])
	dst = append(dst, '-')
	dst = hex.AppendEncode(dst, id[6:8])
	dst = append(dst, '-')
	dst = hex.AppendEncode(dst, id[8:10])
	dst = append(dst, '-')
	dst = hex.AppendEncode(dst, id[10:16])
	return append(dst, '"')
}

func appendText(dst []byte, name, s string) []byte {
	if s == "" {
		return dst
	}
	return AppendString(append(dst, name...), s)
}

func appendInt(dst []byte, name string, n int64) []byte {
	if n == 0 {
		return dst
	}
	return strconv.AppendInt(append(dst, name...), n, 10)
}

func appendList(dst []byte, name string, list []string) []byte {
	if len(list) == 0 {
		return dst
	}
	dst = append(dst, name...)
	for i, s := range list {
		if i == 0 {
			dst = append(dst, '[')
		} else {
			dst = append(dst, ',')
		}
		dst = AppendString(dst, s)
	}
	return append(dst, ']')
}

// appendMillis appends d in milliseconds, cut to whole microseconds. A clock that
// went back counts as nothing.
func appendMillis(dst []byte, name string, d time.Duration) []byte {
	us := d.Microseconds()
	if us <= 0 {
		return dst
	}
	dst = strconv.AppendInt(append(dst, name...), us/1000, 10)
	us %= 1000
	return append(dst, '.', byte('0'+us/100), byte('0'+us/10%10), byte('0'+us%10))
}
