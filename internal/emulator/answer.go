package emulator

import (
	"bytes"
	"compress/flate"
	"compress/gzip"
	"compress/zlib"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

const byteOrderMark = "\xEF\xBB\xBF"

// answerer writes one answer to the wire, with the accidents that the Emulate
// header asks for.
type answerer struct {
	p     *partner
	w     http.ResponseWriter
	r     *http.Request
	entry *Request

	// complete is set before the last byte goes out: from then on the client
	// may leave without having given up.
	complete atomic.Bool
}

// send writes res. It does not return if the connection has to break.
func (a *answerer) send(s script, res response) {
	switch {
	case s.reset:
		a.reset()
	case s.upgrade:
		a.raw("101 Switching Protocols", http.Header{"Upgrade": {"emulator"}, "Connection": {"Upgrade"}}, nil, false)
		return
	}
	if s.retryAfter != "" {
		res.header["Retry-After"] = []string{s.retryAfter}
	}
	if s.challenge != "" {
		res.header["Www-Authenticate"] = []string{`Bearer realm="", authorization_uri="https://login.microsoftonline.com/common/oauth2/authorize", ` +
			`error="insufficient_claims", claims="` + s.challenge + `"`}
	}
	if s.refuse >= 0 && s.status != 0 {
		res.status = s.status
	}
	if s.bom {
		res.bom = true
	}
	if s.encoding != "" {
		res.encode(s.encoding)
	} else {
		res.mark()
	}
	if s.statusLine != "" {
		res.statusLine = s.statusLine
	}
	if res.statusLine != "" && a.r.ProtoMajor == 1 {
		a.raw(res.statusLine, res.header, res.body, true)
		return
	}

	header := a.w.Header()
	for name, values := range res.header {
		header[name] = values
	}
	length := int64(len(res.body))
	body := io.Reader(bytes.NewReader(res.body))
	if res.stream != nil {
		body, length = res.stream, res.length
	}
	switch {
	case s.trailers:
		header.Set("Trailer", "X-Emulator-Trailer")
	case !res.chunked && res.status != http.StatusNoContent && res.status != http.StatusNotModified:
		header.Set("Content-Length", strconv.FormatInt(length, 10))
	}
	a.status(res.status)
	a.w.WriteHeader(res.status)
	if a.r.Method == http.MethodHead {
		a.complete.Store(true)
		return
	}
	if s.stallBody > 0 {
		head := min(length/2, 1024)
		a.copy(body, head)
		length -= head
		a.flush()
		a.pause(s.stallBody)
	}
	if s.abortAfter >= 0 {
		a.copy(body, min(s.abortAfter, length))
		a.flush()
		a.complete.Store(true) // whatever the client does now, it did not start it
		panic(http.ErrAbortHandler)
	}
	a.copy(body, length-1)
	a.complete.Store(a.r.Context().Err() == nil)
	a.copy(body, min(length, 1))
	if s.trailers {
		header.Set("X-Emulator-Trailer", "complete")
	}
}

func (a *answerer) copy(body io.Reader, n int64) {
	if n <= 0 {
		return
	}
	if _, err := io.CopyN(a.w, body, n); err != nil {
		a.p.canceled(a.entry)
		panic(http.ErrAbortHandler)
	}
}

func (a *answerer) flush() { _ = http.NewResponseController(a.w).Flush() }

// pause waits for d. It does not return if the client goes away meanwhile.
func (a *answerer) pause(d time.Duration) {
	if d <= 0 {
		return
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-a.r.Context().Done():
		panic(http.ErrAbortHandler)
	}
}

func (a *answerer) status(code int) {
	a.p.e.calls.update(a.entry, func(q *Request) { q.Status = code })
}

// reset breaks the connection with a TCP reset, in HTTP/2 only the stream.
func (a *answerer) reset() {
	if conn, _, err := http.NewResponseController(a.w).Hijack(); err == nil {
		under := conn
		if t, ok := conn.(interface{ NetConn() net.Conn }); ok {
			under = t.NetConn()
		}
		if tcp, ok := under.(*net.TCPConn); ok {
			_ = tcp.SetLinger(0)
		}
		_ = under.Close()
	}
	panic(http.ErrAbortHandler)
}

// raw writes an answer with a status line of its own, which net/http cannot, and
// closes the connection. The body, possibly empty, goes out chunked.
func (a *answerer) raw(statusLine string, header http.Header, body []byte, chunked bool) {
	conn, _, err := http.NewResponseController(a.w).Hijack()
	if err != nil {
		panic(http.ErrAbortHandler) // HTTP/2 has no status line
	}
	defer conn.Close()
	code, _, _ := strings.Cut(statusLine, " ")
	status, _ := strconv.Atoi(code)
	a.status(status)
	var b bytes.Buffer
	fmt.Fprintf(&b, "HTTP/1.1 %s\r\n", statusLine)
	header = header.Clone()
	if chunked {
		header.Set("Connection", "close")
		header.Set("Date", time.Now().UTC().Format(http.TimeFormat))
		header.Set("Transfer-Encoding", "chunked")
	}
	_ = header.Write(&b) // a Buffer takes everything
	b.WriteString("\r\n")
	if chunked && a.r.Method != http.MethodHead {
		if len(body) > 0 {
			fmt.Fprintf(&b, "%x\r\n%s\r\n", len(body), body)
		}
		b.WriteString("0\r\n\r\n")
	}
	a.complete.Store(true)
	if _, err := conn.Write(b.Bytes()); err != nil {
		a.p.canceled(a.entry)
	}
}

// mark puts the byte order mark in front of the body.
func (res *response) mark() {
	if res.bom && len(res.body) > 0 {
		res.body = append([]byte(byteOrderMark), res.body...)
	}
	res.bom = false
}

// encode compresses the body, byte order mark included; a stream is read whole.
func (res *response) encode(encoding string) {
	if res.stream != nil {
		res.body, _ = io.ReadAll(io.LimitReader(res.stream, res.length))
		res.stream = nil
	}
	res.mark()
	var b bytes.Buffer
	var w io.WriteCloser
	switch encoding {
	case "gzip":
		w = gzip.NewWriter(&b)
	case "deflate":
		w = zlib.NewWriter(&b)
	default:
		w, _ = flate.NewWriter(&b, flate.DefaultCompression) // fails on a bad level only
	}
	_, _ = w.Write(res.body) // a Buffer takes everything
	_ = w.Close()
	res.body = b.Bytes()
	res.header["Content-Encoding"] = []string{strings.TrimPrefix(encoding, "raw-")}
	res.header["Vary"] = []string{"Accept-Encoding"}
}
