package proxy

import (
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync/atomic"
	"unicode/utf8"

	"github.com/google/uuid"
	"github.com/partnerguard/partnerguard/policy"
)

// Bounds of what a Record keeps of client text, in bytes.
const (
	maxPath  = 2048
	maxText  = 256
	maxID    = 128
	maxNames = 32 // query parameters
)

// readTarget finds the path and query that go upstream byte for byte, and refuses
// what two readers could read differently.
func (g *Guard) readTarget(c *call) {
	switch strings.ToUpper(c.in.Method) {
	case http.MethodConnect, http.MethodTrace, "TRACK":
		c.facts.Refusal = policy.ReasonMethodRefused
		return
	}
	target := originForm(c.in.RequestURI)
	path, query, hasQuery := strings.Cut(target, "?")
	if name, rest, ok := policy.CutIntegration(path); ok {
		c.facts.Evidence.Prefix, path = name, rest
		if name == "" {
			c.facts.Refusal = policy.ReasonIntegrationUnknown
		}
		target = path
		if hasQuery {
			target += "?" + query
		}
	}
	c.target, c.facts.Path = target, path
	c.rec.Path = clip(path, maxPath)
	c.rec.QueryNames = queryNames(query)
	route, customer := policy.FindRoute(c.in.Method, path)
	c.rec.Route, c.rec.Customer = route.Template, customer
	if !unambiguous(path) {
		c.facts.Refusal = policy.ReasonRequestAmbiguous
	}
}

// originForm cuts scheme and authority off an absolute-form target (RFC 9112
// section 3.2.2); they never choose where a call goes.
func originForm(target string) string {
	if strings.HasPrefix(target, "/") {
		return target
	}
	_, rest, ok := strings.Cut(target, "://")
	if !ok {
		return target
	}
	if i := strings.IndexAny(rest, "/?"); i >= 0 {
		if rest[i] == '?' {
			return "/" + rest[i:]
		}
		return rest[i:]
	}
	return "/"
}

// unambiguous reports whether every reader takes path for the same resource. It
// refuses dot segments, literal or once decoded, bad escapes, %00, and a raw
// backslash, # or control byte. What Partner Center documents in ids and paths
// (%2F, %5C, ;, :, =, //) passes.
func unambiguous(path string) bool {
	if !strings.HasPrefix(path, "/") {
		return false
	}
	escaped, dots := false, false
	for i := 0; i < len(path); i++ {
		switch b := path[i]; {
		case b <= ' ' || b == 0x7f || b == '\\' || b == '#':
			return false
		case b == '.':
			dots = true
		case b == '%':
			escaped = true
		}
	}
	if escaped {
		decoded, err := url.PathUnescape(path)
		if err != nil || strings.IndexByte(decoded, 0) >= 0 {
			return false
		}
		if hasDotSegment(decoded) {
			return false
		}
	} else if dots && hasDotSegment(path) {
		return false
	}
	// The one form that net/url cannot carry unchanged: a leading // with bytes
	// that it would escape.
	if strings.HasPrefix(path, "//") {
		u := url.URL{RawPath: path}
		u.Path, _ = url.PathUnescape(path)
		return u.EscapedPath() == path
	}
	return true
}

func hasDotSegment(path string) bool {
	for s := range strings.SplitSeq(path, "/") {
		if s == "." || s == ".." {
			return true
		}
	}
	return false
}

// readBearer takes the token out of Authorization (RFC 6750 section 2.1; the
// scheme in any case). No header, or another scheme, leaves it empty.
func (g *Guard) readBearer(c *call) {
	values := c.in.Header["Authorization"]
	switch {
	case len(values) == 0:
		return
	case len(values) > 1:
		if c.facts.Refusal == "" {
			c.facts.Refusal = policy.ReasonRequestAmbiguous
		}
		return
	}
	scheme, token, _ := strings.Cut(values[0], " ")
	if strings.EqualFold(scheme, "Bearer") {
		c.bearer = strings.Trim(token, " ")
	}
}

// identify makes sure that the call carries MS-RequestId and MS-CorrelationId:
// the client's, untouched, else new ones. Microsoft lists its records by them.
func (c *call) identify() {
	id := func(name string) string {
		if v := headerValue(c.in.Header, name); v != "" {
			return printable(v, maxID)
		}
		v := uuid.NewString()
		c.in.Header[name] = []string{v}
		return v
	}
	c.rec.RequestID = id("Ms-Requestid")
	c.rec.CorrelationID = id("Ms-Correlationid")
}

// stripOurs removes every header that could pass for one of ours, in any
// spelling: some servers read _ as -.
func stripOurs(h http.Header) {
	for name := range h {
		if isOurs(name) {
			delete(h, name)
		}
	}
}

func isOurs(name string) bool {
	const ours = "partnerguard"
	if len(name) < len(ours) || name[0]|0x20 != 'p' {
		return false
	}
	return strings.EqualFold(name[:len(ours)], ours) && (len(name) == len(ours) || name[len(ours)] == '-' || name[len(ours)] == '_')
}

// isForwarding reports whether name tells of proxies passed: Forwarded and all of
// X-Forwarded-*.
func isForwarding(name string) bool {
	const x = "x-forwarded"
	if len(name) < len("forwarded") || name[0]|0x20 != 'x' && name[0]|0x20 != 'f' {
		return false
	}
	return strings.EqualFold(name, "forwarded") ||
		len(name) >= len(x) && strings.EqualFold(strings.ReplaceAll(name[:len(x)], "_", "-"), x)
}

// queryNames returns the names of the query's parameters, never a value. A part
// without = could be a value itself, so it is not taken for a name.
func queryNames(query string) []string {
	if query == "" {
		return nil
	}
	var names []string
	for part := range strings.SplitSeq(query, "&") {
		name, _, ok := strings.Cut(part, "=")
		if !ok || name == "" {
			continue
		}
		if len(names) == maxNames {
			break
		}
		names = append(names, clip(name, 64))
	}
	return names
}

// hostName is the Host header in lower case, without the port.
func hostName(host string) string {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	return strings.ToLower(host)
}

// headerValue is the first value of a header by its canonical name.
func headerValue(h http.Header, canonical string) string {
	if v := h[canonical]; len(v) > 0 {
		return v[0]
	}
	return ""
}

// clip cuts s to at most n bytes, not within a UTF-8 sequence.
func clip(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n]
}

// printable keeps the printable ASCII of s, at most n bytes.
func printable(s string, n int) string {
	s = clip(s, n)
	for i := range len(s) {
		if s[i] < ' ' || s[i] > '~' {
			return strings.Map(func(r rune) rune {
				if r < ' ' || r > '~' {
					return -1
				}
				return r
			}, s)
		}
	}
	return s
}

// requestBody counts what the client sent, and remembers whether reading it
// failed: then it is not the upstream's fault that the call broke.
type requestBody struct {
	io.ReadCloser
	n      atomic.Int64
	failed atomic.Bool
}

func (b *requestBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.n.Add(int64(n))
	if err != nil && err != io.EOF {
		b.failed.Store(true)
	}
	return n, err
}
