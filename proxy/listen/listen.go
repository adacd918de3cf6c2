// Package listen opens the sockets that calls come in by, in clear text or with
// TLS, bounds what one connection may cost, and drains them.
package listen

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
)

// Server is one listener and its HTTP server. Its methods are safe for concurrent
// use.
type Server struct {
	name     string
	listener net.Listener
	http     *http.Server  // of handshakes and of HTTP/1.1
	http2    *http.Server  // of connections whose handshake chose HTTP/2
	slow     *rate.Limiter // frames of HTTP/2 floods
	unparsed func()
	failed   chan error
	serving  sync.WaitGroup

	draining atomic.Bool
	closing  atomic.Bool
	inFlight atomic.Int64
	cut      atomic.Bool   // the last call in flight is to say so on idle
	idle     chan struct{} // capacity 1

	current atomic.Pointer[current] // nil serves clear text

	mu    sync.Mutex // guards conns, and writing current
	conns map[*conn]struct{}
}

// current is what a Server takes from its TLS, swapped as one.
type current struct {
	tls *TLS
	// clients is tls.clients, or an older value that says the same: then
	// connections need no new check.
	clients *clients
}

// Config is what Open needs: Handler, and Address or Socket.
type Config struct {
	Name    string
	Address string // host:port; port 0 picks a free one
	Handler http.Handler
	// TLS serves TLS; nil serves clear text.
	TLS *TLS
	// Socket is an open TCP socket to use in place of Address; see Sockets.
	Socket net.Listener
	// MaxConnections bounds the open connections. One more is accepted and closed
	// at once: left waiting, clients that do nothing would keep all others out.
	// Zero means no limit. See ConnectionLimit.
	MaxConnections int
	// MaxHeaderBytes bounds a request's first line and headers, in HTTP/1.1 and in
	// HTTP/2; net/http allows a few KiB more. Zero means 64 KiB.
	MaxHeaderBytes int
	// ReadHeaderTimeout is how long a TLS handshake may take, and in HTTP/1.1 the
	// headers of a request. Zero means 30 s.
	ReadHeaderTimeout time.Duration
	// IdleTimeout is how long a connection may stay without a request. In HTTP/2
	// headers that do not end count as none. Zero means 120 s.
	IdleTimeout time.Duration
	// Unparsed is told of requests that ended before there was a call to account
	// for: net/http or this package refused them, or the client hung up. HTTP/2 lets
	// some of them go unseen while other calls go on. It may be called concurrently
	// and must not block. Nil is allowed.
	Unparsed func()
	// Refused is told of every connection over the limit. It must not block. Nil is
	// allowed.
	Refused func()
	// ErrorLog gets complaints about connections: handshakes, floods, failures to
	// accept. Nil drops them.
	ErrorLog *log.Logger
}

// There is no limit on the time that bodies take: price sheets stream for minutes.
const (
	defaultMaxHeaderBytes    = 64 << 10
	defaultReadHeaderTimeout = 30 * time.Second
	defaultIdleTimeout       = 120 * time.Second
)

// Open binds the address; Serve must follow. An error names the listener.
func Open(cfg Config) (*Server, error) {
	if cfg.Handler == nil {
		return nil, errors.New("listen: Config.Handler is required")
	}
	if cfg.ErrorLog == nil {
		cfg.ErrorLog = log.New(io.Discard, "", 0)
	}
	socket := cfg.Socket
	if socket == nil {
		var err error
		if socket, err = net.Listen("tcp", cfg.Address); err != nil {
			return nil, fmt.Errorf("open listener %s: %w", cfg.Name, err)
		}
	}
	tcp, ok := socket.(*net.TCPListener)
	if !ok {
		return nil, fmt.Errorf("open listener %s: %s is no TCP socket", cfg.Name, socket.Addr())
	}
	s := &Server{
		name: cfg.Name, unparsed: cfg.Unparsed,
		listener: &bounded{TCPListener: tcp, limit: int64(cfg.MaxConnections), refused: cfg.Refused},
		slow:     rate.NewLimiter(slowFrames, paceFrames),
		failed:   make(chan error, 1), idle: make(chan struct{}, 1), conns: map[*conn]struct{}{},
	}
	server := func(protocols http.Protocols) *http.Server {
		return &http.Server{
			Handler:                      s.carry(cfg.Handler),
			Protocols:                    &protocols,
			HTTP2:                        http2Limits(),
			ReadHeaderTimeout:            cmp.Or(cfg.ReadHeaderTimeout, defaultReadHeaderTimeout),
			IdleTimeout:                  cmp.Or(cfg.IdleTimeout, defaultIdleTimeout),
			MaxHeaderBytes:               cmp.Or(cfg.MaxHeaderBytes, defaultMaxHeaderBytes),
			DisableGeneralOptionsHandler: true, // OPTIONS * is a call like any other
			ErrorLog:                     cfg.ErrorLog,
			ConnContext:                  s.connContext,
			ConnState:                    s.connState,
		}
	}
	var offered, framed http.Protocols
	offered.SetHTTP1(true)
	offered.SetHTTP2(true) // with TLS only
	framed.SetUnencryptedHTTP2(true)
	s.http, s.http2 = server(offered), server(framed)
	s.http.TLSNextProto = map[string]func(*http.Server, *tls.Conn, http.Handler){"h2": s.serveHTTP2}
	if cfg.TLS != nil {
		s.current.Store(&current{tls: cfg.TLS, clients: cfg.TLS.clients})
		// The keys of session tickets are this value's, so that sessions survive SetTLS.
		s.http.TLSConfig = &tls.Config{MinVersion: tls.VersionTLS12, GetConfigForClient: s.configForClient}
	}
	return s, nil
}

// Address is where the server listens.
func (s *Server) Address() netip.AddrPort {
	return s.listener.Addr().(*net.TCPAddr).AddrPort()
}

// TLS reports whether the listener speaks TLS.
func (s *Server) TLS() bool { return s.current.Load() != nil }

// SetTLS makes t serve all handshakes from now on. A connection whose client
// certificate does not pass t's CAs and revocation lists carries no further call:
// it is closed if it is idle, else its next request is refused. The calls in flight
// go on. A listener in clear text stays so.
func (s *Server) SetTLS(t *TLS) {
	s.mu.Lock()
	old := s.current.Load()
	if old == nil || t == nil {
		s.mu.Unlock()
		return
	}
	next := &current{tls: t, clients: t.clients}
	if t.clients.same(old.clients) {
		next.clients = old.clients
	}
	s.current.Store(next)
	var idle []*conn
	for c := range s.conns {
		if c.idle.Load() {
			idle = append(idle, c)
		}
	}
	s.mu.Unlock()
	for _, c := range idle {
		if c.admitted(next.clients) != nil {
			c.Close()
		}
	}
}

// Serve starts serving and returns at once. What ends it other than Shutdown
// arrives on Failed.
func (s *Server) Serve() {
	s.serving.Go(func() {
		var err error
		if s.TLS() {
			err = s.http.ServeTLS(s.listener, "", "")
		} else {
			err = s.http.Serve(s.listener)
		}
		if !errors.Is(err, http.ErrServerClosed) {
			s.failed <- fmt.Errorf("serve listener %s: %w", s.name, err)
		}
	})
}

// Failed delivers the error that ended the server, if one did.
func (s *Server) Failed() <-chan error { return s.failed }

// Drain goes on listening and serving, but from now on the answer to each call ends
// its connection: Connection: close in HTTP/1.1, GOAWAY in HTTP/2. So clients move
// away without a failed call, while a balancer learns that this guard is leaving.
// Idle connections stay open: one closed just as its client writes costs a call.
func (s *Server) Drain() { s.draining.Store(true) }

// Shutdown stops listening and waits for the calls in flight until ctx ends; then
// it cuts them, and gives their handlers up to two seconds to close the account.
func (s *Server) Shutdown(ctx context.Context) error {
	s.closing.Store(true)
	var goodbye sync.WaitGroup
	goodbye.Go(func() { s.http2.Shutdown(ctx) })
	err := s.http.Shutdown(ctx) // waits for connections of either
	goodbye.Wait()
	if err != nil {
		err = errors.Join(err, s.http2.Close(), s.http.Close())
		s.awaitCut()
	}
	s.listener.Close() // also when Serve never ran
	s.serving.Wait()
	return err
}

func (s *Server) awaitCut() {
	s.cut.Store(true)
	patience := time.NewTimer(2 * time.Second)
	defer patience.Stop()
	for s.inFlight.Load() > 0 {
		select {
		case <-s.idle:
		case <-patience.C:
			return
		}
	}
}

// carry wraps the handler of calls in what every request goes through.
func (s *Server) carry(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c := r.Context().Value(connKey{}).(*conn)
		if status, why := s.refuse(c, r); status != 0 {
			c.calls.Add(1) // lest it be told of again
			if s.unparsed != nil {
				s.unparsed()
			}
			w.Header().Set("Connection", "close")
			http.Error(w, why, status)
			return
		}
		c.call(r)
		if c.http2 != nil {
			defer c.http2.flood.ended(r, time.Now())
		}
		if s.draining.Load() {
			w.Header().Set("Connection", "close")
		}
		s.inFlight.Add(1)
		defer s.leave()
		h.ServeHTTP(w, r)
	})
}

// refuse gives the status and reason for a request that must not become a call, or
// zero.
func (s *Server) refuse(c *conn, r *http.Request) (status int, why string) {
	// net/http hands on the preface of HTTP/2 without TLS, for handlers that serve it.
	if r.ProtoMajor == 2 && r.Method == "PRI" {
		return http.StatusHTTPVersionNotSupported, "HTTP/2 needs TLS here"
	}
	if now := s.current.Load(); now != nil {
		if err := c.admitted(now.clients); err != nil {
			return http.StatusMisdirectedRequest, "the client certificate of this connection is no longer accepted; connect again"
		}
	}
	return 0, ""
}

func (s *Server) leave() {
	if s.inFlight.Add(-1) == 0 && s.cut.Load() {
		select {
		case s.idle <- struct{}{}:
		default:
		}
	}
}
