package listen

import (
	"errors"
	"net"
	"net/http"
	"sync/atomic"
	"time"
)

// bounded is a socket that closes at once each connection over its limit.
type bounded struct {
	*net.TCPListener
	limit   int64 // 0: none
	open    atomic.Int64
	refused func()
}

func (l *bounded) Accept() (net.Conn, error) {
	for {
		c, err := l.AcceptTCP()
		if err != nil {
			return nil, err // net/http waits and tries again when files run out
		}
		if open := l.open.Add(1); l.limit <= 0 || open <= l.limit {
			return &conn{TCPConn: c, open: &l.open}, nil
		}
		c.SetLinger(0) // a reset leaves nothing behind, whoever closes first
		c.Close()
		l.open.Add(-1)
		if l.refused != nil {
			l.refused()
		}
	}
}

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

// flood tells an HTTP/2 connection that floods the server with frames that carry
// nothing (PING, SETTINGS, PRIORITY, empty DATA). net/http bounds their memory, not
// their number. What a connection may send grows with the calls it makes, with the
// bodies that are read from it and with the answers it gets; nginx keeps the same
// kind of account (ngx_http_v2_check_flood). Calls cancelled at once have an account
// of their own, as Envoy's have (overload.premature_reset_total_stream_count).
type flood struct {
	got     atomic.Int64 // bytes
	allowed atomic.Int64 // beyond freeFlood
	resets  atomic.Int64 // calls that the client soon cancelled, less the others
	last    int          // bytes of the last read; only the reader's
}

// freeFlood is what a connection may send without any call: 6,700 PINGs, each in its
// own TLS record. From swiftFlood on, more than a dozen calls that are yet to start, it
// is read slowly, at slowFlood bytes a second: net/http hands each frame from one
// goroutine to another and back, and while such pairs keep all processors busy Go
// looks only every 10 ms for what other connections sent.
const (
	freeFlood   = 256 << 10
	swiftFlood  = 32 << 10
	slowFlood   = 64 << 10
	freeResets  = 500
	swiftResets = http2Streams // a client may well give up all it waits for
	soonReset   = time.Second
)

var (
	errFlood  = errors.New("it sends little but control frames")
	errResets = errors.New("it cancels its calls at once")
)

// request allows for the frames of a call: its headers, as if they were not
// compressed, twice.
func (f *flood) request(r *http.Request) {
	n := 512 + len(r.RequestURI)
	for name, values := range r.Header {
		for _, v := range values {
			n += 32 + len(name) + len(v)
		}
	}
	f.allowed.Add(int64(2 * n))
}

// ended notes that the handler of a call returned.
func (f *flood) ended(r *http.Request, began time.Time) {
	if r.Context().Err() != nil && time.Since(began) < soonReset {
		f.resets.Add(1)
	} else if f.resets.Load() > 0 {
		f.resets.Add(-1) // below zero by a few at most
	}
}

// pace waits before a read, if there is a flood. It looks again meanwhile: handlers
// about to start allow for what was read already.
func (f *flood) pace() {
	wait := time.Duration(f.last) * time.Second / slowFlood
	for step := 100 * time.Microsecond; wait > 0 && f.over(swiftFlood, swiftResets) != nil; step *= 2 {
		time.Sleep(min(step, wait))
		wait -= step
	}
}

// read counts n bytes read. An error says that it is too much.
func (f *flood) read(n int) error {
	f.last = n
	f.got.Add(int64(n))
	return f.over(freeFlood, freeResets)
}

func (f *flood) over(bytes, resets int64) error {
	switch {
	case f.got.Load() > bytes+f.allowed.Load():
		return errFlood
	case f.resets.Load() > resets:
		return errResets
	}
	return nil
}

// Files that are no client's connection and no call's: ledger, store, admin listener,
// key fetches, watches.
const reservedFiles = 64

// ConnectionLimit lowers want, a number of client connections, to what the process's
// limit of open files allows (RLIMIT_NOFILE; 64 files are kept back, and a connection
// counts twice, since its call needs one upstream). Zero or less means as many as
// allowed. The answer holds for all listeners together, is at least 1, and zero, no
// limit, only if want is and the process has none. On systems other than Unix it is
// want.
func ConnectionLimit(want int) int { return connectionLimit(want, openFiles()) }

func connectionLimit(want int, files uint64) int {
	want = max(want, 0)
	if files > 1<<30 {
		return want
	}
	room := max(1, (int(files)-reservedFiles)/2)
	if want == 0 {
		return room
	}
	return min(want, room)
}
