// Package listen opens the sockets that calls come in by, plain or with a
// certificate from files, and drains them.
package listen

import (
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
)

// Server is one listener and its HTTP server.
type Server struct {
	name     string
	listener net.Listener
	http     *http.Server
	tls      bool
	unparsed func()
	failed   chan error
	serving  sync.WaitGroup
	conns    sync.Map // net.Conn → *conn: net/http's state callback knows no contexts
	inFlight atomic.Int64
}

// Config is what Open needs. Address and Handler are required.
type Config struct {
	Name    string
	Address string // host:port; port 0 picks a free one
	Handler http.Handler
	// Certificate and Key are PEM files; empty serves plain HTTP. TLS 1.2 and up,
	// HTTP/1.1 and HTTP/2.
	Certificate, Key string
	// Unparsed is told of every request that net/http refused, or whose client
	// hung up, before there was a call to account for. It may be called
	// concurrently. Nil is allowed.
	Unparsed func()
	// ErrorLog gets net/http's own complaints (TLS handshakes). Nil drops them.
	ErrorLog *log.Logger
}

// Bounds of a request before it is a call. There is no limit on the time that
// bodies take: price sheets stream for minutes.
const (
	readHeaderTimeout = 30 * time.Second
	idleTimeout       = 120 * time.Second
	maxHeaderBytes    = 64 << 10
)

// Open binds the address; Serve must follow. An error names the address.
func Open(cfg Config) (*Server, error) {
	s := &Server{name: cfg.Name, unparsed: cfg.Unparsed, failed: make(chan error, 1)}
	var config *tls.Config
	if cfg.Certificate != "" {
		cert, err := tls.LoadX509KeyPair(cfg.Certificate, cfg.Key)
		if err != nil {
			return nil, fmt.Errorf("load certificate of listener %s: %w", cfg.Name, err)
		}
		config = &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12, NextProtos: []string{"h2", "http/1.1"}}
	}
	l, err := net.Listen("tcp", cfg.Address)
	if err != nil {
		return nil, fmt.Errorf("open listener %s: %w", cfg.Name, err)
	}
	s.listener, s.tls = l, config != nil
	errorLog := cfg.ErrorLog
	if errorLog == nil {
		errorLog = log.New(io.Discard, "", 0)
	}
	s.http = &http.Server{
		Handler:                      s.counted(cfg.Handler),
		TLSConfig:                    config,
		ReadHeaderTimeout:            readHeaderTimeout,
		IdleTimeout:                  idleTimeout,
		MaxHeaderBytes:               maxHeaderBytes,
		DisableGeneralOptionsHandler: true, // OPTIONS * is a call like any other
		ErrorLog:                     errorLog,
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, connKey{}, s.track(c))
		},
		ConnState: s.connState,
	}
	return s, nil
}

// Address is where the server listens.
func (s *Server) Address() netip.AddrPort {
	return s.listener.Addr().(*net.TCPAddr).AddrPort()
}

// TLS reports whether the listener speaks TLS.
func (s *Server) TLS() bool { return s.tls }

// Serve starts serving and returns at once. What ends it other than Shutdown
// arrives on Failed.
func (s *Server) Serve() {
	s.serving.Go(func() {
		var err error
		if s.tls {
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

// Shutdown stops listening and waits for the calls in flight until ctx ends; then
// it cuts them, and gives their handlers up to two seconds to close the account.
func (s *Server) Shutdown(ctx context.Context) error {
	err := s.http.Shutdown(ctx)
	if err != nil {
		err = errors.Join(err, s.http.Close())
		for cut := time.Now(); s.inFlight.Load() > 0 && time.Since(cut) < 2*time.Second; {
			time.Sleep(5 * time.Millisecond)
		}
	}
	s.listener.Close() // also when Serve never ran
	s.serving.Wait()
	return err
}

// conn counts the requests of one connection: those that began to arrive and
// those that became calls.
type conn struct {
	began, calls atomic.Int64
}

type connKey struct{}

func (s *Server) track(c net.Conn) *conn {
	k := &conn{}
	s.conns.Store(c, k)
	return k
}

func (s *Server) connState(c net.Conn, state http.ConnState) {
	v, ok := s.conns.Load(c)
	if !ok {
		return
	}
	k := v.(*conn)
	switch state {
	case http.StateActive:
		k.began.Add(1)
	case http.StateClosed, http.StateHijacked:
		s.conns.Delete(c)
		if k.began.Load() > k.calls.Load() && s.unparsed != nil {
			s.unparsed()
		}
	}
}

func (s *Server) counted(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if k, ok := r.Context().Value(connKey{}).(*conn); ok {
			k.calls.Add(1)
		}
		s.inFlight.Add(1)
		defer s.inFlight.Add(-1)
		h.ServeHTTP(w, r)
	})
}
