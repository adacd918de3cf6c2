package listen

import (
	"context"
	"crypto/tls"
	"errors"
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
	done   chan struct{} // closed with it

	// Written by net/http's goroutine of the connection before its first request and
	// before idle; what reads them is started by it or has seen idle.
	tls   *tls.ConnectionState // nil in clear text
	http2 *http2Conn           // nil in HTTP/1.1

	idle    atomic.Bool
	began   atomic.Int64 // requests that began to arrive; in HTTP/2 times that any did
	calls   atomic.Int64 // requests that became calls
	verdict atomic.Pointer[verdict]
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
	s.mu.Lock()
	s.conns[k] = struct{}{}
	s.mu.Unlock()
	return context.WithValue(ctx, connKey{}, k)
}

// below is the connection under TLS and HTTP/2, if they are there.
func below(c net.Conn) *conn {
	switch over := c.(type) {
	case *tls.Conn:
		c = over.NetConn()
	case *http2Conn:
		return over.below
	}
	return c.(*conn)
}

func (s *Server) connState(nc net.Conn, state http.ConnState) {
	c := below(nc)
	if c.http2 != nil && nc != net.Conn(c.http2) {
		return // the server of HTTP/2 tells
	}
	switch state {
	case http.StateActive:
		c.idle.Store(false)
		if c.began.Add(1) == 1 && c.tls == nil {
			if t, ok := nc.(*tls.Conn); ok {
				state := t.ConnectionState()
				c.tls = &state
			}
		}
	case http.StateIdle:
		c.idle.Store(true)
		// net/http's Shutdown sends no GOAWAY to an HTTP/2 connection that begins just
		// then, and would wait for its idle timeout.
		if c.http2 != nil && c.began.Load() == 1 && s.closing.Load() {
			c.Close()
		}
	case http.StateClosed, http.StateHijacked:
		s.mu.Lock()
		delete(s.conns, c)
		s.mu.Unlock()
		began := c.began.Load()
		if c.http2 != nil {
			began-- // the connection's preface counts as active, too
			defer close(c.http2.ended)
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
	if c.http2 != nil {
		c.http2.call(r)
	}
}

func (c *conn) Close() error {
	err := c.TCPConn.Close()
	if !c.closed.Swap(true) {
		c.open.Add(-1)
		close(c.done)
	}
	return err
}
