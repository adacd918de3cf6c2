package proxy

import (
	"bytes"
	"compress/flate"
	"compress/gzip"
	"compress/zlib"
	"encoding/json"
	"io"
	"net/http"
	"regexp"
	"strings"

	"github.com/partnerguard/partnerguard/policy"
)

// readRejection reads a 401 or 403 of Microsoft's: which kind it is and its error
// code as text, if it has one. body is the beginning of the body as it came. The
// exact form of 900421 is not documented, so every known shape is recognised:
// code as string or number at the top or nested (error.innerError, Error), in any
// case, plain text, HTML, or nothing but the reason phrase; with a byte order
// mark; gzip or deflate. It never fails: what it cannot read is RejectionOther or,
// for 401, RejectionTokenRefused.
func readRejection(status int, statusLine string, header http.Header, body []byte) (policy.Rejection, string) {
	if status != http.StatusUnauthorized && status != http.StatusForbidden {
		return "", ""
	}
	text := decodeBody(header.Get("Content-Encoding"), body)
	codes := errorCodes(text)
	phrase := strings.TrimSpace(strings.TrimLeft(statusLine, "0123456789 "))

	for _, code := range codes {
		if k, ok := rejectionCodes[code]; ok {
			return k, code
		}
		if missingMFA.MatchString(code) {
			return policy.RejectionMFARequired, code
		}
	}
	first := ""
	if len(codes) > 0 {
		first = codes[0]
	}
	challenge := strings.Join(header.Values("Www-Authenticate"), ", ")
	switch {
	case strings.Contains(challenge, "insufficient_claims"):
		return policy.RejectionClaimsChallenge, first
	case mentionsMFA.MatchString(phrase) || mentionsMFA.Match(text):
		return policy.RejectionMFARequired, first
	case bytes.Contains(bytes.ToLower(text), []byte("incorrect audience")):
		return policy.RejectionAudienceRefused, first
	case bytes.Contains(text, []byte("missing user information")):
		return policy.RejectionAppOnlyUnsupported, first
	case status == http.StatusUnauthorized:
		return policy.RejectionTokenRefused, first
	}
	return policy.RejectionOther, first
}

// rejectionCodes are the codes of 401 and 403 that mean more than "refused".
var rejectionCodes = map[string]policy.Rejection{
	"900421": policy.RejectionMFARequired,
	"10001":  policy.RejectionMFARequired, // 2020: "Authentication failed. MFA required. (10001)"
	"900420": policy.RejectionAudienceRefused,
	"800001": policy.RejectionTokenRefused,
	"900309": policy.RejectionConditionalAccess,
	"900329": policy.RejectionAppOnlyUnsupported,
}

var (
	missingMFA  = regexp.MustCompile(`(?i)missing_?mfa`)
	mentionsMFA = regexp.MustCompile(`\bMFA\b`)
	codeMember  = regexp.MustCompile(`(?i)"code"\s*:\s*"?([0-9A-Za-z_]{1,64})`) // of JSON that was cut
	codeInText  = regexp.MustCompile(`\(([0-9]{4,6})\)`)
)

// maxDecoded bounds what a compressed refusal may unpack to.
const maxDecoded = 256 << 10

// decodeBody undoes Content-Encoding and a byte order mark, on the copy. What does
// not decode is taken as it stands; what was cut decodes as far as it goes.
func decodeBody(encoding string, body []byte) []byte {
	var r io.Reader
	var err error
	switch strings.ToLower(strings.TrimSpace(encoding)) {
	case "gzip", "x-gzip":
		r, err = gzip.NewReader(bytes.NewReader(body))
	case "deflate":
		// RFC 9110 means zlib; many send raw deflate.
		if r, err = zlib.NewReader(bytes.NewReader(body)); err != nil {
			r, err = flate.NewReader(bytes.NewReader(body)), nil
		}
	}
	if r != nil && err == nil {
		if plain, _ := io.ReadAll(io.LimitReader(r, maxDecoded)); len(plain) > 0 {
			body = plain
		}
	}
	return bytes.TrimPrefix(body, []byte("\xef\xbb\xbf"))
}

// errorCodes finds the error codes of a body, the most specific first: members
// named code in any case, from the outside in, then one in parentheses in a text.
func errorCodes(text []byte) []string {
	var codes []string
	var v any
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.UseNumber()
	if dec.Decode(&v) == nil {
		codes = appendCodes(codes, v, 0)
		// A nested code says more than the one around it.
		for i, j := 0, len(codes)-1; i < j; i, j = i+1, j-1 {
			codes[i], codes[j] = codes[j], codes[i]
		}
	}
	if len(codes) > 0 {
		return codes
	}
	for _, re := range [...]*regexp.Regexp{codeMember, codeInText} {
		if m := re.FindSubmatch(text); m != nil {
			return []string{string(m[1])}
		}
	}
	return nil
}

// appendCodes walks the objects that known error shapes nest.
func appendCodes(codes []string, v any, depth int) []string {
	obj, ok := v.(map[string]any)
	if !ok || depth > 4 {
		return codes
	}
	for name, member := range obj {
		if strings.EqualFold(name, "code") {
			switch m := member.(type) {
			case string:
				codes = append(codes, printable(m, 64))
			case json.Number:
				codes = append(codes, printable(m.String(), 64))
			}
		}
	}
	for name, member := range obj {
		if strings.EqualFold(name, "error") || strings.EqualFold(name, "innererror") {
			codes = appendCodes(codes, member, depth+1)
		}
	}
	return codes
}
