package proxy

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"sync"
	"time"
)

// synchronous carries requests without a body over HTTP/1.1, each by the goroutine of
// its call: net/http's Transport hands every one to two goroutines of the connection
// and back, for the sake of bodies that are sent while the answer comes, and that is a
// fifth of what a call costs. It is safe for concurrent use.
//
// It never repeats a request that may change something. A safe one that met a
// connection which the upstream had closed goes out once more, on a new connection, as
// with net/http.
type synchronous struct {
	dial    func(ctx context.Context, network, address string) (net.Conn, error)
	address string      // host:port to dial
	tls     *tls.Config // nil speaks clear text
	tlsTime time.Duration
	silence time.Duration // for the header of an answer, and between parts of its body
	idle    time.Duration

	mu     sync.Mutex
	free   []*syncConn // the latest used last
	sweep  *time.Timer // runs while there are any
	closed bool
}

const (
	maxFree   = 512
	maxHeader = 1 << 20 // of an answer, in bytes; each 1xx before it may have as much
)

// syncConn is a connection of synchronous. Whoever holds it reads and writes it alone.
type syncConn struct {
	net.Conn          // what the request is written to: TLS or the socket
	socket   net.Conn // below
	quiet    func() bool
	br       *bufio.Reader
	bw       *bufio.Writer
	left     int64     // bytes that the header may still have
	until    time.Time // the deadline that is set
	released time.Time
	heard    bool  // a byte since the request
	failed   error // of the last read
}

// Read is for br.
func (c *syncConn) Read(p []byte) (int, error) {
	if c.left <= 0 {
		return 0, errLongHeader
	}
	n, err := c.Conn.Read(p[:min(int64(len(p)), c.left)])
	c.left -= int64(n)
	c.heard, c.failed = c.heard || n > 0, err
	return n, err
}

var errLongHeader = fmt.Errorf("the upstream's header is longer than %d bytes", maxHeader)

// extend moves the deadline of reads and writes to limit from now, or a little later:
// it is not set again for every read.
func (c *syncConn) extend(limit time.Duration) error {
	now := time.Now()
	if until := now.Add(limit); until.After(c.until) {
		c.until = until.Add(limit / 64)
		return c.SetDeadline(c.until)
	}
	return nil
}

// RoundTrip sends r, which has no body, and returns once the header of its answer is
// there. Errors of the network are net.Errors; those by the end of r's context come
// with it.
func (s *synchronous) RoundTrip(r *http.Request) (*http.Response, error) {
	if c := s.take(); c != nil {
		res, err := s.exchange(c, r)
		if err == nil || c.heard || !isSafe(r.Method) || r.Context().Err() != nil || isTimeout(err) {
			return res, err
		}
		// The upstream closed it while it was free, as servers do. Other free ones may
		// have met the same end.
	}
	c, err := s.connect(r.Context())
	if err != nil {
		return nil, err
	}
	return s.exchange(c, r)
}

// exchange sends r by c and reads the header of the answer. c belongs to the answer's
// body then, and to nobody after an error.
func (s *synchronous) exchange(c *syncConn, r *http.Request) (*http.Response, error) {
	// The client's hanging up closes the socket, which ends whatever waits for it.
	stop := context.AfterFunc(r.Context(), func() { c.socket.Close() })
	res, err := s.ask(c, r)
	if err != nil {
		stop()
		c.Close()
		return nil, err
	}
	body := &syncBody{ReadCloser: res.Body, s: s, c: c, stop: stop, keep: !res.Close && !r.Close && res.StatusCode != http.StatusSwitchingProtocols}
	res.Body = body
	if body.ReadCloser == http.NoBody {
		body.end(io.EOF)
		res.Body = http.NoBody
	}
	return res, nil
}

func (s *synchronous) ask(c *syncConn, r *http.Request) (*http.Response, error) {
	c.heard, c.left = false, maxHeader
	if err := c.extend(s.silence); err != nil {
		return nil, err
	}
	c.bw.Reset(c.Conn)
	err := r.Write(c.bw)
	if err == nil {
		err = c.bw.Flush()
	}
	if err != nil {
		return nil, err
	}
	trace := httptrace.ContextClientTrace(r.Context())
	for {
		res, err := http.ReadResponse(c.br, r)
		switch {
		case err != nil && c.failed != nil:
			return nil, c.failed // net/textproto takes the end of what came for a bad line
		case err != nil:
			return nil, err
		}
		if res.StatusCode < 100 || res.StatusCode > 199 || res.StatusCode == http.StatusSwitchingProtocols {
			c.left = math.MaxInt64
			return res, nil
		}
		if trace != nil && trace.Got1xxResponse != nil {
			if err := trace.Got1xxResponse(res.StatusCode, textproto.MIMEHeader(res.Header)); err != nil {
				return nil, err
			}
			c.left = maxHeader
		}
		// As net/http: what comes before the answer shares its time.
	}
}

// syncBody is the body of an answer. Its end frees the connection.
type syncBody struct {
	io.ReadCloser
	s    *synchronous
	c    *syncConn // nil once the answer is over
	stop func() bool
	keep bool  // the connection may serve another call
	err  error // of reads once the answer is over
}

func (b *syncBody) Read(p []byte) (int, error) {
	if b.c == nil {
		return 0, b.err
	}
	if err := b.c.extend(b.s.silence); err != nil {
		return 0, err
	}
	n, err := b.ReadCloser.Read(p)
	if err != nil {
		b.end(err)
	}
	return n, err
}

// Close ends an answer that was not read to its end, and the connection with it.
func (b *syncBody) Close() error {
	b.end(http.ErrBodyReadAfterClose)
	return nil
}

// end frees the connection or closes it. err is what ended the answer: io.EOF if all of
// it was read.
func (b *syncBody) end(err error) {
	c := b.c
	if c == nil {
		return
	}
	b.c, b.err = nil, err
	// Where stop comes too late, somebody is closing the socket.
	if b.stop() && err == io.EOF && b.keep && c.br.Buffered() == 0 {
		b.s.put(c)
		return
	}
	c.Close()
}

// connect makes a connection.
func (s *synchronous) connect(ctx context.Context) (*syncConn, error) {
	socket, err := s.dial(ctx, "tcp", s.address)
	if err != nil {
		return nil, err
	}
	c := &syncConn{Conn: socket, socket: socket, quiet: quiet(socket)}
	if s.tls != nil {
		t := tls.Client(socket, s.tls)
		hctx, cancel := ctx, context.CancelFunc(func() {})
		if s.tlsTime > 0 {
			hctx, cancel = context.WithTimeout(ctx, s.tlsTime)
		}
		err := t.HandshakeContext(hctx)
		cancel()
		if err != nil {
			socket.Close()
			return nil, fmt.Errorf("TLS handshake: %w", err)
		}
		c.Conn = t
	}
	c.br, c.bw = bufio.NewReader(c), bufio.NewWriter(c.Conn)
	return c, nil
}

// take returns the connection that was freed last and still stands; nil if none does.
func (s *synchronous) take() *syncConn {
	for {
		s.mu.Lock()
		n := len(s.free)
		if n == 0 {
			s.mu.Unlock()
			return nil
		}
		c := s.free[n-1]
		s.free[n-1] = nil
		s.free = s.free[:n-1]
		s.mu.Unlock()
		if time.Since(c.released) < s.idle && c.silent() {
			return c
		}
		c.Close()
	}
}

// silent reports whether the connection stands and the upstream has said nothing since
// the last answer: what it says unasked is no answer to the next call.
func (c *syncConn) silent() bool {
	if !c.quiet() {
		return false
	}
	if c.Conn == c.socket {
		return true
	}
	// TLS may hold what it has read already: look without waiting for more.
	c.until = time.Time{}
	if c.SetDeadline(time.Unix(1, 0)) != nil {
		return false
	}
	var one [1]byte
	n, err := c.Conn.Read(one[:])
	return n == 0 && isTimeout(err)
}

// put frees a connection.
func (s *synchronous) put(c *syncConn) {
	c.released = time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || len(s.free) >= maxFree {
		c.Close()
		return
	}
	s.free = append(s.free, c)
	if s.sweep == nil {
		s.sweep = time.AfterFunc(sweepEvery, s.tidy)
	}
}

// sweepEvery is how long a free connection that the upstream has closed may stay.
const sweepEvery = 10 * time.Second

// tidy closes the free connections that are of no more use.
func (s *synchronous) tidy() {
	s.mu.Lock()
	defer s.mu.Unlock()
	kept := s.free[:0]
	for _, c := range s.free {
		if time.Since(c.released) < s.idle && c.quiet() {
			kept = append(kept, c)
		} else {
			c.Close()
		}
	}
	clear(s.free[len(kept):])
	s.free = kept
	s.sweep = nil
	if len(kept) > 0 && !s.closed {
		s.sweep = time.AfterFunc(sweepEvery, s.tidy)
	}
}

// drop closes the free connections.
func (s *synchronous) drop() {
	s.mu.Lock()
	free := s.free
	s.free = nil
	s.mu.Unlock()
	for _, c := range free {
		c.Close()
	}
}

// CloseIdleConnections closes the free connections, and from now on each as it becomes
// free.
func (s *synchronous) CloseIdleConnections() {
	s.mu.Lock()
	s.closed = true
	if s.sweep != nil {
		s.sweep.Stop()
		s.sweep = nil
	}
	s.mu.Unlock()
	s.drop()
}
