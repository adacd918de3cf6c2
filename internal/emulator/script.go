package emulator

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// script is what the Emulate header of a request asks for. The header is
// end-to-end: a proxy forwards it. Its directives are separated by commas:
//
//	refuse=SHAPE       refuse for lack of MFA, whatever the token (code-string, …)
//	bom                a byte order mark in front of the body
//	gzip, deflate, raw-deflate
//	                   the body encoded so (zlib and bare), whatever was accepted
//	status=429         a plausible answer of that status
//	code=900309        Partner Center's 401 or 403 with that code: the documented ones
//	                   that say something of the token, not of the business
//	status-line=TEXT   what follows HTTP/1.1 in the status line; closes the connection
//	retry-after=7      that header
//	challenge=VALUE    401 with a claims challenge; VALUE is what stands between the
//	                   quotes, by default a base64 request for authentication context c1
//	stall=10s          wait before the headers
//	stall-body=10s     wait after the headers and the first bytes
//	abort-after=1000   close the connection after so many bytes of the body
//	reset              reset the connection instead of an answer
//	early-hints        send 103 first
//	trailers           send a trailer after the body
//	upgrade            answer 101
//	body=BYTES         200 with so many pseudo-random bytes
//	no-read            answer without reading the request's body
type script struct {
	refuse     Shape // -1: no
	bom        bool
	encoding   string
	code       string
	status     int
	statusLine string
	retryAfter string
	challenge  string
	stall      time.Duration
	stallBody  time.Duration
	abortAfter int64 // -1: no
	reset      bool
	earlyHints bool
	trailers   bool
	upgrade    bool
	body       int64 // -1: no
	noRead     bool
}

// defaultChallenge asks for authentication context c1.
const defaultChallenge = "eyJhY2Nlc3NfdG9rZW4iOnsiYWNycyI6eyJlc3NlbnRpYWwiOnRydWUsInZhbHVlIjoiYzEifX19"

// codeStatus has Partner Center's codes for a refused token or caller. See
// https://learn.microsoft.com/partner-center/developer/error-codes.
var codeStatus = map[string]int{
	"400":    401, // access denied
	"10001":  401, // MFA required, before 2025
	"800001": 401, // no partner token
	"900420": 401, // audience no longer supported
	"900421": 401, // no MFA claim
	"90000":  403, // Entra's error on the way to an inner token
	"900150": 403, // role lacks rights
	"900308": 403, // insufficient privileges
	"900309": 403, // blocked by Conditional Access
	"900329": 403, // app-only not supported
}

func parseScript(values []string) (script, error) {
	s := script{refuse: -1, abortAfter: -1, body: -1}
	for directive := range strings.SplitSeq(strings.Join(values, ","), ",") {
		name, value, _ := strings.Cut(strings.TrimSpace(directive), "=")
		var err error
		switch name {
		case "":
		case "refuse":
			s.refuse, err = ParseShape(value)
		case "bom":
			s.bom = true
		case "gzip", "deflate", "raw-deflate":
			s.encoding = name
		case "code":
			if s.code = value; codeStatus[value] == 0 {
				err = fmt.Errorf("unknown code %q", value)
			}
		case "status":
			s.status, err = strconv.Atoi(value)
			if err == nil && (s.status < 200 || s.status > 599) {
				err = fmt.Errorf("status %d is out of range", s.status)
			}
		case "status-line":
			s.statusLine = value
		case "retry-after":
			s.retryAfter = value
		case "challenge":
			if s.challenge = value; value == "" {
				s.challenge = defaultChallenge
			}
		case "stall":
			s.stall, err = time.ParseDuration(value)
		case "stall-body":
			s.stallBody, err = time.ParseDuration(value)
		case "abort-after":
			s.abortAfter, err = parseSize(value)
		case "reset":
			s.reset = true
		case "early-hints":
			s.earlyHints = true
		case "trailers":
			s.trailers = true
		case "upgrade":
			s.upgrade = true
		case "body":
			s.body, err = parseSize(value)
		case "no-read":
			s.noRead = true
		default:
			err = fmt.Errorf("unknown directive %q", name)
		}
		if err != nil {
			return script{refuse: -1, abortAfter: -1, body: -1}, fmt.Errorf("read Emulate header: %w", err)
		}
	}
	if s.challenge != "" && s.status == 0 && s.refuse < 0 {
		s.status = 401
	}
	return s, nil
}

func parseSize(value string) (int64, error) {
	n, err := strconv.ParseUint(value, 10, 40)
	return int64(n), err
}
