package proxy

import (
	"context"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/partnerguard/partnerguard/policy"
)

// forward sends the call upstream, once, and streams the answer back.
func (g *Guard) forward(c *call) {
	report, err := c.upstream.breaker.Allow()
	switch {
	case err == nil:
		c.report = once(report)
	case c.settings.Policy.AuditOnly():
		// While only watching, the breaker counts but stops nothing.
	default:
		g.refuse(c, policy.ReasonUpstreamCircuitOpen)
		return
	}
	if c.body != nil {
		// Once an answer begins, an HTTP/1 server throws away the first 256 KiB of
		// the body that are still to come, unless told that both go on at a time.
		err := http.NewResponseController(c.ResponseWriter).EnableFullDuplex()
		c.duplex = err == nil && c.in.ProtoMajor == 1 // HTTP/2 does so anyway
	}
	rp := httputil.ReverseProxy{
		Transport:      c.upstream,
		BufferPool:     buffers,
		FlushInterval:  flushInterval,
		ErrorLog:       silent, // every failure is in the record
		Rewrite:        func(pr *httputil.ProxyRequest) { g.rewrite(pr, c) },
		ModifyResponse: func(res *http.Response) error { g.observe(res, c); return nil },
		ErrorHandler:   func(_ http.ResponseWriter, _ *http.Request, err error) { g.fail(c, err) },
	}
	rp.ServeHTTP(c, c.in)
}

// flushInterval is how long the header of a slow answer, or less of its body than
// net/http's buffer holds, may wait on its way to the client.
const flushInterval = 20 * time.Millisecond

// rewrite aims the outgoing request at the upstream. Everything that the client
// sent and that is not ours or hop-by-hop stays as it is.
func (g *Guard) rewrite(pr *httputil.ProxyRequest, c *call) {
	out, rec := pr.Out, &c.rec
	up := c.upstream

	// Opaque goes on the wire as it stands. A leading // would read as an
	// authority there, so that form goes by RawPath (see unambiguous).
	u := &url.URL{Scheme: up.url.Scheme, Host: up.url.Host, Opaque: c.target}
	if strings.HasPrefix(c.target, "//") {
		path, query, hasQuery := strings.Cut(c.target, "?")
		u.Opaque = ""
		u.Path, _ = url.PathUnescape(path)
		u.RawPath, u.RawQuery, u.ForceQuery = path, query, hasQuery && query == ""
	}
	out.URL = u
	out.Host = up.url.Host
	out.Trailer = nil

	h := out.Header
	if up.rewriteLinks {
		c.links = linksOf(up.name, out.Method, c.facts.Path)
		c.links.prepare(h)
	}
	for name := range h {
		if isForwarding(name) {
			delete(h, name)
		}
	}
	if out.Body == nil {
		unsafe := true
		switch out.Method {
		case http.MethodGet, http.MethodHead, http.MethodOptions:
			unsafe = false
		}
		// net/http repeats a bodiless request of any method when it sees an
		// Idempotency-Key and the reused connection turns out dead. It looks for
		// the canonical spelling only; on the wire the name has no case.
		for _, name := range [...]string{"Idempotency-Key", "X-Idempotency-Key"} {
			if v, ok := h[name]; ok && unsafe {
				delete(h, name)
				h[strings.ToLower(name)] = v
			}
		}
	}
	if g.asksMFA(c) {
		h["Validatemfa"] = trueValue
	}
	if rec.Effect == policy.Tag {
		c.mark(h, rec.Effect, rec.Reason)
	}

	// Count how often the request goes out: net/http repeats safe methods when a
	// reused connection turns out dead.
	c.sends = new(atomic.Int32)
	sends := c.sends
	pr.Out = out.WithContext(httptrace.WithClientTrace(out.Context(), &httptrace.ClientTrace{
		WroteHeaders: func() { sends.Add(1) },
	}))
	c.sent = g.now()
}

// asksMFA reports whether the guard asks Microsoft for its verdict on this call.
func (g *Guard) asksMFA(c *call) bool {
	switch {
	case c.askedMFA, !c.upstream.validatesMFA, c.settings.ValidateMFA == ValidateOff:
		return false
	case c.rec.Token.Kind != policy.KindAppUser && (c.rec.Token.Kind != policy.KindUndecided || c.rec.Token.TenantID == ""):
		return false
	}
	return c.settings.ValidateMFA == ValidateAll || c.in.Method == http.MethodGet || c.in.Method == http.MethodHead
}

// observe reads what matters from the upstream's header. It changes nothing of
// the answer but the guard's own headers.
func (g *Guard) observe(res *http.Response, c *call) {
	rec := &c.rec
	rec.UpstreamTime = g.now().Sub(c.sent)
	rec.UpstreamRequestID = printable(headerValue(res.Header, "Ms-Requestid"), maxID)
	rec.UpstreamCorrelationID = printable(headerValue(res.Header, "Ms-Correlationid"), maxID)
	if c.report != nil {
		c.report(breakerVerdict(res.StatusCode))
	}
	switch v := headerValue(res.Header, "Ismfacompliant"); {
	case strings.EqualFold(v, "true"):
		rec.MFACompliant = policy.CompliantTrue
	case strings.EqualFold(v, "false"):
		rec.MFACompliant = policy.CompliantFalse
	}
	if !c.askedMFA {
		delete(res.Header, "Ismfacompliant")
	}
	stripOurs(res.Header)
	if c.links != nil {
		c.links.rewrite(res, []string{linkHost(c.upstream.url)}, linkBase(c.in, c.facts.Evidence.Prefix))
	}
	if res.StatusCode == http.StatusUnauthorized || res.StatusCode == http.StatusForbidden {
		rec.UpstreamStatus = printable(res.Status, maxText)
		res.Header["Partnerguard-Upstream-Status"] = []string{rec.UpstreamStatus}
		// The body streams on untouched; a copy of its beginning is read once the
		// call is over, so that a slow refusal is not made slower.
		c.answer = &answerCopy{ReadCloser: res.Body, header: res.Header.Clone()}
		res.Body = c.answer
	}
}

// fail answers for an upstream that gave no answer.
func (g *Guard) fail(c *call, err error) {
	rec := &c.rec
	switch {
	case c.in.Context().Err() != nil || c.body != nil && c.body.failed.Load():
		// An answer made up here could pass for Microsoft's; there is none.
		rec.Error = errorClientCanceled
		panic(http.ErrAbortHandler)
	case isTimeout(err):
		rec.Error = string(policy.ReasonUpstreamTimeout)
	default:
		rec.Error = string(policy.ReasonUpstreamUnreachable)
	}
	if c.report != nil {
		c.report(err)
	}
	c.ownListener = errors.Is(err, ErrOwnListener)
	g.refuse(c, policy.Reason(rec.Error))
}

func isTimeout(err error) bool {
	var ne net.Error
	return errors.Is(err, context.DeadlineExceeded) || errors.As(err, &ne) && ne.Timeout()
}

// answerCopy keeps the first bytes of a refusal while it streams to the client.
type answerCopy struct {
	io.ReadCloser
	header http.Header
	head   []byte
}

// maxAnswer is how much of a refusal is looked at.
const maxAnswer = 64 << 10

func (a *answerCopy) Read(p []byte) (int, error) {
	n, err := a.ReadCloser.Read(p)
	if room := maxAnswer - len(a.head); room > 0 {
		a.head = append(a.head, p[:min(n, room)]...)
	}
	return n, err
}

func (a *answerCopy) bytes() []byte { return a.head }

// mark sets the guard's own headers.
func (c *call) mark(h http.Header, effect policy.Effect, reason policy.Reason) {
	values := [...]string{c.rec.Call.String(), c.rec.Integration, effect.String(), string(reason), c.rec.Token.MFA.String()}
	h["Partnerguard-Call"] = values[0:1:1]
	h["Partnerguard-Integration"] = values[1:2:2]
	h["Partnerguard-Effect"] = values[2:3:3]
	h["Partnerguard-Reason"] = values[3:4:4]
	h["Partnerguard-Mfa"] = values[4:5:5]
}

// WriteHeader sets the guard's headers as late as possible: ReverseProxy clears
// what was set before an upstream's 1xx.
func (c *call) WriteHeader(status int) {
	if status == http.StatusContinue {
		return // the server says so itself, once, when the body is first read
	}
	if status >= 200 && !c.wroteHeader {
		c.wroteHeader = true
		c.rec.Status = status
		h := c.ResponseWriter.Header()
		if c.duplex && !c.body.ended.Load() {
			// net/http panics if such a body ends only after the handler, and the
			// connection is then used again.
			h["Connection"] = closeValue
			c.unread = true
		}
		if h["Partnerguard-Call"] == nil {
			c.mark(h, c.rec.Effect, c.rec.Reason)
		}
		if h["Content-Type"] == nil {
			h["Content-Type"] = nil // do not let net/http guess one
		}
	}
	c.ResponseWriter.WriteHeader(status)
}

// Write counts what the client got.
func (c *call) Write(p []byte) (int, error) {
	if !c.wroteHeader {
		c.WriteHeader(http.StatusOK)
	}
	// What fits into one write fits into the socket's buffer, too: only longer answers
	// can hang on a client that does not read.
	if c.writes++; c.writes == 2 {
		c.writing = writeStall(c.ResponseWriter, c.settings.BodyTimeout)
	}
	c.writing.begin()
	n, err := c.ResponseWriter.Write(p)
	c.writing.end()
	c.rec.BytesOut += int64(n)
	if err != nil {
		c.writeErr = err
	}
	return n, err
}

// Unwrap lets http.ResponseController reach the connection.
func (c *call) Unwrap() http.ResponseWriter { return c.ResponseWriter }

// once makes the first verdict on a call the only one.
func once(report func(error)) func(error) {
	done := false
	return func(err error) {
		if !done {
			done = true
			report(err)
		}
	}
}

var (
	trueValue  = []string{"true"}
	closeValue = []string{"close"}
	silent     = log.New(io.Discard, "", 0)
	buffers    = &bufferPool{sync.Pool{New: func() any { return new([32 << 10]byte) }}}
)

// bufferPool lends the buffers that bodies are copied with; without it every call
// allocates 32 KiB.
type bufferPool struct{ pool sync.Pool }

func (b *bufferPool) Get() []byte  { return b.pool.Get().(*[32 << 10]byte)[:] }
func (b *bufferPool) Put(p []byte) { b.pool.Put((*[32 << 10]byte)(p)) }
