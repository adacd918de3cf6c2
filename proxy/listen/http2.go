package listen

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
)

// Bounds of one HTTP/2 connection. RFC 9113 §6.5.2 advises not to go below 100
// streams. A frame is read whole into memory, and the window is how much of bodies
// may wait there for the upstream: with 10,000 connections both are kept small.
//
// A client that answers no ping, or takes no byte, for so long is gone: no process
// that still means to read lets its own HTTP/2 library sleep for two minutes.
const (
	http2Streams          = 100
	http2FrameSize        = 16 << 10 // the protocol's smallest and its default
	http2HeaderTable      = 4 << 10  // the protocol's default
	http2StreamWindow     = 256 << 10
	http2ConnectionWindow = 1 << 20
	http2SilenceToPing    = 60 * time.Second
	http2PingTimeout      = 60 * time.Second
	http2WriteTimeout     = 60 * time.Second
)

func http2Limits() *http.HTTP2Config {
	return &http.HTTP2Config{
		MaxConcurrentStreams:          http2Streams,
		MaxDecoderHeaderTableSize:     http2HeaderTable,
		MaxEncoderHeaderTableSize:     http2HeaderTable,
		MaxReadFrameSize:              http2FrameSize,
		MaxReceiveBufferPerConnection: http2ConnectionWindow,
		MaxReceiveBufferPerStream:     http2StreamWindow,
		SendPingTimeout:               http2SilenceToPing,
		PingTimeout:                   http2PingTimeout,
		WriteByteTimeout:              http2WriteTimeout,
	}
}

// http2Conn is a client's connection above TLS: what net/http reads frames from. It
// hides TLS, because net/http speaks HTTP/2 over TLS on a *tls.Conn alone, which shows
// nobody its frames.
type http2Conn struct {
	net.Conn
	below   *conn
	server  *Server
	flood   flood
	in, out frames
	ended   chan struct{} // closed when net/http has done with it
}

// serveHTTP2 serves a connection whose handshake chose HTTP/2, and returns when it has
// ended.
func (s *Server) serveHTTP2(_ *http.Server, t *tls.Conn, _ http.Handler) {
	state, c := t.ConnectionState(), below(t)
	c.tls = &state
	c.http2 = &http2Conn{
		Conn: t, below: c, server: s, ended: make(chan struct{}),
		flood: flood{allowed: make(chan struct{}, 1)}, in: frames{skip: http2Preface},
	}
	l := &single{conn: c.http2}
	s.http2.Serve(l)
	if l.conn == nil {
		<-c.http2.ended
	}
}

// single is a listener of one connection.
type single struct{ conn net.Conn }

func (l *single) Accept() (net.Conn, error) {
	c := l.conn
	if l.conn = nil; c == nil {
		return nil, io.EOF
	}
	return c, nil
}

func (l *single) Close() error   { return nil }
func (l *single) Addr() net.Addr { return nil }

// call notes that r becomes a call.
func (c *http2Conn) call(r *http.Request) {
	r.TLS = c.below.tls
	c.flood.allow(framesOfCall)
	if r.ContentLength != 0 {
		r.Body = &body{ReadCloser: r.Body, flood: &c.flood}
	}
}

func (c *http2Conn) Read(p []byte) (int, error) {
	c.flood.pace(c.server.slow, c.below.done)
	n, err := c.Conn.Read(p)
	for rest := p[:n]; ; {
		kind, length, ok := c.in.next(&rest)
		if !ok {
			break
		}
		c.flood.got(kind, length)
	}
	if err := c.flood.over(freeFrames, freeResets); err != nil {
		c.server.http.ErrorLog.Printf("listen: HTTP/2 connection from %s ended: %v", c.RemoteAddr(), err)
		return 0, err
	}
	return n, err
}

func (c *http2Conn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	for rest := p[:n]; ; {
		kind, length, ok := c.out.next(&rest)
		if !ok {
			return n, err
		}
		if kind == frameData {
			c.flood.allow(framesOfData + length/bytesOfUpdate)
		}
	}
}

// body counts what the handler reads of an HTTP/2 request's body.
type body struct {
	io.ReadCloser
	flood *flood
}

func (b *body) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if n > 0 {
		b.flood.allow(1 + n/bytesOfFrame)
	}
	return n, err
}

// RFC 9113 §3.4, §4.1, §6.1 and §6.4.
const (
	http2Preface = 24
	frameHeader  = 9
	frameData    = 0x0
	frameReset   = 0x3
)

// frames finds the frames in the bytes of one direction of a connection.
type frames struct {
	header [frameHeader]byte
	have   int // of header
	skip   int // bytes before the next header
}

// next takes bytes off the front of p, up to the end of a frame's header or of p. ok
// tells whether there was one.
func (f *frames) next(p *[]byte) (kind byte, length int, ok bool) {
	n := min(f.skip, len(*p))
	f.skip -= n
	*p = (*p)[n:]
	n = copy(f.header[f.have:], *p)
	*p = (*p)[n:]
	if f.have += n; f.have < frameHeader {
		return 0, 0, false
	}
	h := f.header
	f.have, f.skip = 0, int(h[0])<<16|int(h[1])<<8|int(h[2])
	return h[3], f.skip, true
}

// flood tells a client that floods the server with frames that carry nothing (PING,
// SETTINGS, PRIORITY, empty DATA). net/http bounds their memory, not their number.
// How many a client may send grows with the calls it makes, with the bodies that are
// read from it and with the answers it gets. nginx keeps such an account in bytes
// (ngx_http_v2_check_flood), Envoy by kind (overload.premature_reset_total_stream_count
// for calls cancelled at once, which have an account of their own here, too).
type flood struct {
	frames  atomic.Int64  // that carry nothing, less what is allowed
	resets  atomic.Int64  // calls that the client cancelled soon, less the others
	fresh   int           // frames since the last wait; only the reader's
	allowed chan struct{} // capacity 1: look again
}

// From swiftFrames on, about what the headers of as many calls as a client may have
// open amount to, it is read slowly: net/http hands each frame from one goroutine to
// another and back, and while such pairs keep all processors busy Go looks only every
// 10 ms for what other connections sent. All floods of a listener are read at
// slowFrames a second together, so that many cost no more than one; at freeFrames a
// client is cut.
const (
	freeFrames  = 4096
	swiftFrames = 256
	slowFrames  = 1000 // a second
	paceFrames  = 32   // between two waits
	freeResets  = 500
	swiftResets = 16
	soonReset   = time.Second

	// What a client needs, and more than any is known to send: WINDOW_UPDATEs for the
	// stream and the connection, a PING to measure by (.NET), RST_STREAM.
	framesOfCall  = 8
	framesOfData  = 4
	bytesOfUpdate = 512 // of an answer
	bytesOfFrame  = 16  // of a body that is read
	fullFrame     = 256 // bytes of a DATA frame that is worth its while
)

var (
	errFlood  = errors.New("it sends little but control frames")
	errResets = errors.New("it cancels its calls at once")
)

func (f *flood) got(kind byte, length int) {
	if kind == frameData && length >= fullFrame {
		return
	}
	f.frames.Add(1)
	f.fresh++
	if kind == frameReset {
		f.resets.Add(1)
	}
}

func (f *flood) allow(n int) {
	f.frames.Add(-int64(n))
	f.lookAgain()
}

// ended notes that the handler of a call returned. It makes up for a reset unless it
// was for such a one, soon.
func (f *flood) ended(r *http.Request, began time.Time) {
	if soon := r.Context().Err() != nil && time.Since(began) < soonReset; !soon && f.resets.Load() > 0 {
		f.resets.Add(-1) // below zero by a few at most
		f.lookAgain()
	}
}

func (f *flood) lookAgain() {
	select {
	case f.allowed <- struct{}{}:
	default:
	}
}

// pace waits before a read, if there is a flood, until it is the turn of what was read
// last, or what looked like a flood is none: handlers about to start allow for it.
func (f *flood) pace(slow *rate.Limiter, closed <-chan struct{}) {
	if f.fresh < paceFrames {
		return
	}
	f.fresh = 0
	if f.over(swiftFrames, swiftResets) == nil {
		return
	}
	turn := slow.ReserveN(time.Now(), paceFrames)
	timer := time.NewTimer(turn.Delay())
	defer timer.Stop()
	for f.over(swiftFrames, swiftResets) != nil {
		select {
		case <-f.allowed:
		case <-timer.C:
			return
		case <-closed:
			turn.Cancel()
			return
		}
	}
	turn.Cancel()
}

func (f *flood) over(frames, resets int64) error {
	switch {
	case f.frames.Load() > frames:
		return errFlood
	case f.resets.Load() > resets:
		return errResets
	}
	return nil
}
