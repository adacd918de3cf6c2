//go:build linux

package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// relay stands between the guard and a server as the network does, and fails as
// networks do. It has an address of its own, so that no other socket takes its port
// while it does not listen.
type relay struct {
	t       *testing.T
	to      string
	address string
	wrap    func(net.Conn) net.Conn // the guard's side; nil leaves it as it is

	mu       sync.Mutex
	mode     relayMode
	listener net.Listener
	conns    map[net.Conn]struct{}
	taken    int // connections so far
}

type relayMode int

const (
	passing  relayMode = iota
	refusing           // nobody listens, and connections that were there are reset
	silent             // connections are taken, and nothing is said on any
	dripping           // what comes back does so a byte in 50 ms
)

var relays atomic.Int32

func startRelay(t *testing.T, url string, wrap func(net.Conn) net.Conn) *relay {
	t.Helper()
	f := &relay{t: t, to: strings.TrimPrefix(url, "http://"), wrap: wrap, conns: map[net.Conn]struct{}{}, mode: refusing}
	f.address = fmt.Sprintf("127.98.%d.%d:0", os.Getpid()%250+1, relays.Add(1))
	f.set(passing)
	t.Cleanup(func() { f.set(refusing) })
	return f
}

func (f *relay) url() string { return "http://" + f.address }

// set changes how it is with connections, the present ones included.
func (f *relay) set(mode relayMode) {
	f.t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.mode == mode {
		return
	}
	if f.mode == refusing {
		l, err := net.Listen("tcp", f.address)
		if err != nil {
			f.t.Fatal(err)
		}
		f.listener, f.address = l, l.Addr().String()
		go f.accept(l)
	}
	if mode == refusing {
		f.listener.Close()
	}
	if mode == refusing || f.mode == silent { // what was silent has lost bytes
		for c := range f.conns {
			if tcp, ok := c.(*net.TCPConn); ok {
				tcp.SetLinger(0)
			}
			c.Close()
		}
	}
	f.mode = mode
}

func (f *relay) now() relayMode {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.mode
}

// connections is how many were taken so far.
func (f *relay) connections() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.taken
}

func (f *relay) accept(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		if f.wrap != nil {
			c = f.wrap(c)
		}
		f.mu.Lock()
		f.taken++
		f.mu.Unlock()
		go f.carry(c)
	}
}

// keep remembers a connection until it is closed by the function it returns.
func (f *relay) keep(c net.Conn) (end func()) {
	f.mu.Lock()
	f.conns[c] = struct{}{}
	if f.mode == refusing { // since it was taken
		c.Close()
	}
	f.mu.Unlock()
	return func() {
		c.Close()
		f.mu.Lock()
		delete(f.conns, c)
		f.mu.Unlock()
	}
}

func (f *relay) carry(in net.Conn) {
	defer f.keep(in)()
	out, err := net.Dial("tcp", f.to)
	if err != nil {
		return
	}
	defer f.keep(out)()
	go func() {
		f.copy(out, in)
		out.Close()
	}()
	f.copy(in, out)
}

func (f *relay) copy(to, from net.Conn) {
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		b := buf[:n]
		for len(b) > 0 {
			some := len(b)
			switch f.now() {
			case silent:
				b = nil
				continue
			case dripping:
				some = 1
				time.Sleep(50 * time.Millisecond)
			}
			if _, err := to.Write(b[:some]); err != nil {
				return
			}
			b = b[some:]
		}
		if err != nil {
			return
		}
	}
}

// gate is a reader that can be closed for a while.
type gate struct {
	io.Reader
	shut sync.Mutex // held while it is closed, and by every read
}

func (g *gate) Read(p []byte) (int, error) {
	g.shut.Lock()
	defer g.shut.Unlock()
	return g.Reader.Read(p)
}
