package proxy

import (
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/partnerguard/partnerguard/policy"
	"golang.org/x/net/http/httpguts"
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
	if !c.in.ProtoAtLeast(1, 1) {
		c.ResponseWriter = &oldClient{c.ResponseWriter}
	}
	switch strings.ToUpper(c.in.Method) {
	case http.MethodConnect, http.MethodTrace, "TRACK":
		c.facts.Refusal = policy.ReasonMethodRefused
		return
	}
	target := c.in.RequestURI
	if c.in.ProtoMajor == 1 {
		target = originForm(target)
	}
	path, query, hasQuery := strings.Cut(target, "?")
	if !unambiguous(path) {
		c.facts.Refusal = policy.ReasonRequestAmbiguous
	}
	if name, rest, ok := policy.CutIntegration(path); ok {
		c.facts.Evidence.Prefix, path = name, rest
		if name == "" && c.facts.Refusal == "" {
			c.facts.Refusal = policy.ReasonIntegrationUnknown
		}
		target = path
		if hasQuery {
			target += "?" + query
		}
	}
	if !sendable(path, query) || !wellFormed(c.in) {
		c.facts.Refusal = policy.ReasonRequestAmbiguous
	}
	c.target, c.facts.Path = target, path
	c.rec.Path = clip(path, maxPath)
	c.rec.QueryNames = queryNames(query)
	route, customer := policy.FindRoute(c.in.Method, path)
	c.rec.Route, c.rec.Customer = route.Template, customer
}

// originForm cuts scheme and authority off an absolute-form target (RFC 9112
// section 3.2.2); they never choose where a call goes. What is in neither form
// comes back as it is, for unambiguous to refuse.
func originForm(target string) string {
	if strings.HasPrefix(target, "/") {
		return target
	}
	scheme, rest, _ := strings.Cut(target, "://")
	authority := strings.IndexAny(rest, "/?")
	if authority < 0 {
		authority = len(rest)
	}
	switch {
	case !strings.EqualFold(scheme, "http") && !strings.EqualFold(scheme, "https"), authority == 0:
		return target
	case strings.HasPrefix(rest[authority:], "/"):
		return rest[authority:]
	}
	return "/" + rest[authority:]
}

// unambiguous reports whether every reader takes path, as the client sent it, for
// the same resource. It refuses dot segments, literal or once decoded, bad escapes,
// %00, and a raw backslash, # or control byte. What Partner Center documents in
// ids and paths (%2F, %5C, ;, :, =, //) passes.
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
	if !escaped {
		return !dots || !hasDotSegment(path)
	}
	decoded, err := url.PathUnescape(path)
	return err == nil && strings.IndexByte(decoded, 0) < 0 && !hasDotSegment(decoded)
}

// sendable reports whether net/http carries path and query unchanged. A space or
// control byte, which HTTP/2 can bring, would end the target in HTTP/1.1, and net/url
// escapes some bytes after a leading //.
func sendable(path, query string) bool {
	if strings.ContainsFunc(query, func(r rune) bool { return r <= ' ' || r == 0x7f }) {
		return false
	}
	if !strings.HasPrefix(path, "//") {
		return true
	}
	u := url.URL{RawPath: path}
	u.Path, _ = url.PathUnescape(path)
	return u.EscapedPath() == path
}

// wellFormed finds what net/http checks in HTTP/1.1 and lets pass in HTTP/2: a method
// that is no token, and a Content-Length that is no number, whose body it would drop.
func wellFormed(r *http.Request) bool {
	if !httpguts.ValidHeaderFieldName(r.Method) { // a token, too (RFC 9110 section 9.1)
		return false
	}
	if r.ProtoMajor == 1 {
		return true
	}
	length := r.Header["Content-Length"]
	return len(length) == 0 || len(length) == 1 && length[0] == strconv.FormatInt(r.ContentLength, 10)
}

// hasDotSegment reports whether path has a segment . or ..; between backslashes,
// too, as Windows servers take \ for / once they have decoded it.
func hasDotSegment(path string) bool {
	for s := range strings.FieldsFuncSeq(path, func(r rune) bool { return r == '/' || r == '\\' }) {
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
// the client's, untouched, else the call's own id. Microsoft lists its records by them.
func (c *call) identify() {
	id := func(name string) string {
		if v := headerValue(c.in.Header, name); v != "" {
			return printable(v, maxID)
		}
		v := c.rec.Call.String()
		c.in.Header[name] = []string{v}
		return v
	}
	c.rec.RequestID = id("Ms-Requestid")
	c.rec.CorrelationID = id("Ms-Correlationid")
	keepEndToEnd(c.in.Header)
}

// keepEndToEnd makes sure that what the guard relied on and recorded goes out:
// whatever Connection names is for the next hop only (RFC 9110 section 7.6.1), and
// a client could have its token judged here and taken away before it is sent.
func keepEndToEnd(h http.Header) {
	delete(h, "Http2-Settings") // belongs to an Upgrade, which is never passed on
	values := h["Connection"]
	if len(values) == 0 {
		return
	}
	var kept []string
	for _, v := range values {
		for option := range strings.SplitSeq(v, ",") {
			option = strings.TrimSpace(option)
			switch http.CanonicalHeaderKey(option) {
			case "", "Authorization", "Ms-Requestid", "Ms-Correlationid", "Validatemfa", "Ms-Partnercenter-Application", "User-Agent":
			default:
				kept = append(kept, option)
			}
		}
	}
	h["Connection"] = kept
}

// stripOurs removes every header that could pass for one of ours, in any
// spelling: some servers read _ or . as -.
func stripOurs(h http.Header) {
	for name := range h {
		if isOurs(name) {
			delete(h, name)
		}
	}
}

func isOurs(name string) bool {
	const ours = "partnerguard"
	if len(name) < len(ours) || name[0]|0x20 != 'p' || !strings.EqualFold(name[:len(ours)], ours) {
		return false
	}
	if len(name) == len(ours) {
		return true
	}
	next := name[len(ours)]
	return (next|0x20 < 'a' || next|0x20 > 'z') && (next < '0' || next > '9')
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
	turn   sync.Mutex // held while reading
	over   atomic.Bool
	stall  *stall
	n      atomic.Int64
	ended  atomic.Bool // read to its end
	failed atomic.Bool
}

func (b *requestBody) Read(p []byte) (int, error) {
	b.turn.Lock()
	defer b.turn.Unlock()
	if b.over.Load() {
		return 0, http.ErrBodyReadAfterClose
	}
	b.stall.begin()
	n, err := b.ReadCloser.Read(p)
	b.stall.end()
	b.n.Add(int64(n))
	switch {
	case err == io.EOF:
		b.ended.Store(true)
	case err != nil:
		b.failed.Store(true)
	}
	return n, err
}

// stop ends reading for good: a transport goes on with it after the answer. It returns
// once nobody reads, for net/http waits for ever, with the connection, where the end of
// a body is met just as the handler returns.
func (b *requestBody) stop(w http.ResponseWriter) {
	b.over.Store(true)
	if !b.turn.TryLock() {
		if http.NewResponseController(w).SetReadDeadline(longAgo) != nil {
			return
		}
		b.turn.Lock()
	}
	b.turn.Unlock()
}

var longAgo = time.Unix(1, 0)

// oldClient is the answer to an HTTP/1.0 client. It may not get 1xx (RFC 9110
// section 15.2), which it would take for the answer, and its connection ends with
// the answer: net/http ignores Transfer-Encoding in HTTP/1.0 and would read the
// body as the next request (RFC 9112 section 6.1).
type oldClient struct{ http.ResponseWriter }

func (w *oldClient) WriteHeader(status int) {
	if status < 200 {
		return
	}
	w.Header()["Connection"] = []string{"close"}
	w.ResponseWriter.WriteHeader(status)
}

// Unwrap lets http.ResponseController reach the connection.
func (w *oldClient) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// cut resets the connection of an HTTP/1.0 client whose answer broke off: where the end
// of the connection is the end of the answer, an ordinary one would pass for it.
func (c *call) cut() {
	if c.in.ProtoAtLeast(1, 1) || !c.wroteHeader {
		return
	}
	conn, _, err := http.NewResponseController(c.ResponseWriter).Hijack()
	if err != nil {
		return
	}
	defer conn.Close()
	for {
		switch inner := conn.(type) {
		case interface{ SetLinger(int) error }:
			inner.SetLinger(0)
			return
		case interface{ NetConn() net.Conn }:
			conn = inner.NetConn()
		default:
			return
		}
	}
}
