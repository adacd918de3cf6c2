package listen

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"sync/atomic"
	"time"
)

// conn is a client's connection below TLS, and what is known of it.
type conn struct {
	*net.TCPConn
	open   *atomic.Int64 // of the listener, minus this one when it closes
	closed atomic.Bool

	// Written by net/http's goroutine of the connection before its first request and
	// before idle; what reads them is started by it or has seen idle.
	server *Server
	tls    *tls.ConnectionState // nil in clear text

	http2   atomic.Bool
	idle    atomic.Bool
	began   atomic.Int64 // requests that began to arrive; in HTTP/2 times that any did
	calls   atomic.Int64 // requests that became calls
	verdict atomic.Pointer[verdict]
	flood   flood
}

// verdict is what some clients said of a connection's certificate.
type verdict struct {
	by    *clients
	until time.Time // to be asked again from here on
	err   error
}

type connKey struct{}

func (s *Server) connContext(ctx context.Context, c net.Conn) context.Context {
	k := below(c)
	k.server = s
	s.mu.Lock()
	s.conns[k] = struct{}{}
	s.mu.Unlock()
	return context.WithValue(ctx, connKey{}, k)
}

// below is the connection under TLS, if there is TLS.
func below(c net.Conn) *conn {
	if t, ok := c.(*tls.Conn); ok {
		c = t.NetConn()
	}
	return c.(*conn)
}

func (s *Server) connState(nc net.Conn, state http.ConnState) {
	c := below(nc)
	switch state {
	case http.StateActive:
		c.idle.Store(false)
		if c.began.Add(1) == 1 {
			if t, ok := nc.(*tls.Conn); ok {
				state := t.ConnectionState()
				c.tls = &state
				c.http2.Store(state.NegotiatedProtocol == "h2")
			}
		}
	case http.StateIdle:
		c.idle.Store(true)
		// net/http's Shutdown sends no GOAWAY to an HTTP/2 connection whose handshake
		// ends just then, and would wait for its idle timeout.
		if c.http2.Load() && c.began.Load() == 1 && s.closing.Load() {
			c.Close()
		}
	case http.StateClosed, http.StateHijacked:
		s.mu.Lock()
		delete(s.conns, c)
		s.mu.Unlock()
		began := c.began.Load()
		if c.http2.Load() {
			began-- // the connection's preface counts as active, too
		}
		if s.unparsed != nil {
			for range began - c.calls.Load() {
				s.unparsed()
			}
		}
	}
}

// admitted returns an error if the client's certificate does not pass. It asks once
// for each clients and then again when the answer may have changed.
func (c *conn) admitted(by *clients) error {
	certs := c.tls.PeerCertificates
	if by == nil {
		if len(certs) > 0 {
			return errors.New("client certificates are no longer asked for")
		}
		return nil
	}
	v := c.verdict.Load()
	if v == nil || v.by != by || !by.now().Before(v.until) {
		v = &verdict{by: by}
		v.until, v.err = by.check(certs)
		c.verdict.Store(v)
	}
	return v.err
}

// call notes that r becomes a call.
func (c *conn) call(r *http.Request) {
	c.calls.Add(1)
	if !c.http2.Load() {
		return
	}
	c.flood.request(r)
	if r.ContentLength != 0 {
		c.flood.allowed.Add(http2StreamWindow) // a body that is refused unread
		r.Body = &body{ReadCloser: r.Body, flood: &c.flood}
	}
}

func (c *conn) Read(p []byte) (int, error) {
	if c.http2.Load() {
		c.flood.pace()
	}
	n, err := c.TCPConn.Read(p)
	if c.http2.Load() {
		if err := c.flood.read(n); err != nil {
			c.server.http.ErrorLog.Printf("listen: HTTP/2 connection from %s ended: %v", c.RemoteAddr(), err)
			return 0, err
		}
	}
	return n, err
}

func (c *conn) Write(p []byte) (int, error) {
	n, err := c.TCPConn.Write(p)
	if c.http2.Load() {
		c.flood.allowed.Add(int64(n / 8)) // flow control, for what the client takes
	}
	return n, err
}

func (c *conn) Close() error {
	err := c.TCPConn.Close()
	if !c.closed.Swap(true) {
		c.open.Add(-1)
	}
	return err
}

// body counts what the handler reads of an HTTP/2 request's body.
type body struct {
	io.ReadCloser
	flood *flood
}

func (b *body) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.flood.allowed.Add(8 * int64(n))
	return n, err
}
