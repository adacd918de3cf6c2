package emulator

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Attack is how a Hostile treats those who call it.
type Attack int

// The attacks over HTTP/1.1. Each answers every request, but for ExpiredCertificate.
const (
	EndlessHeaders     Attack = iota // header fields of 1 KiB until the client gives up
	InterimFlood                     // 103 Early Hints until the client gives up
	SlowHeaders                      // one byte of the header each Interval
	LengthTooLong                    // Content-Length promises more than comes before the connection ends
	LengthTooShort                   // behind the promised bytes lies an answer that nobody asked for
	TwoLengths                       // two Content-Length fields that differ
	BadChunk                         // a chunked body goes on with what is no chunk
	ResetMidBody                     // a TCP reset in the middle of a chunked body
	CloseReused                      // the first request of a connection is answered, the second is read whole, then the connection ends
	SwitchingProtocols               // 101 that nobody asked for, then noise
	DecompressionBomb                // 401 whose 10 MB of gzip unpack to 10 GB of JSON, the code at its end
	ExpiredCertificate               // a TLS certificate that expired an hour ago
)

// The attacks over HTTP/2, which need a client that offers it.
const (
	HTTP2BadSettings        Attack = iota + 100 // SETTINGS that RFC 9113 section 6.5.2 forbids
	HTTP2SettingsFlood                          // SETTINGS and PING, all to be acknowledged, until the client gives up
	HTTP2ContinuationFlood                      // a header block in CONTINUATION frames without end
	HTTP2GoAway                                 // every request meets a GOAWAY that says: not processed, try again
	HTTP2EndlessDataPadding                     // DATA frames of nothing but padding, without end
)

var attackNames = map[Attack]string{
	EndlessHeaders: "endless headers", InterimFlood: "interim flood", SlowHeaders: "slow headers",
	LengthTooLong: "length too long", LengthTooShort: "length too short", TwoLengths: "two lengths", BadChunk: "bad chunk",
	ResetMidBody: "reset mid-body", CloseReused: "close reused", SwitchingProtocols: "switching protocols",
	DecompressionBomb: "decompression bomb", ExpiredCertificate: "expired certificate",
	HTTP2BadSettings: "HTTP/2 bad settings", HTTP2SettingsFlood: "HTTP/2 settings flood",
	HTTP2ContinuationFlood: "HTTP/2 continuation flood", HTTP2GoAway: "HTTP/2 goaway",
	HTTP2EndlessDataPadding: "HTTP/2 endless padding",
}

// String returns the attack's name.
func (a Attack) String() string {
	if name, ok := attackNames[a]; ok {
		return name
	}
	return fmt.Sprintf("Attack(%d)", int(a))
}

// HTTP2 reports whether the attack needs a client that offers HTTP/2.
func (a Attack) HTTP2() bool { return a >= HTTP2BadSettings }

// Attacks returns all attacks.
func Attacks() []Attack {
	var attacks []Attack
	for a := range attackNames {
		attacks = append(attacks, a)
	}
	slices.Sort(attacks)
	return attacks
}

// HostileConfig says what a Hostile does.
type HostileConfig struct {
	Attack Attack
	// Address is where to listen. Empty means 127.0.0.1:0.
	Address string
	// TLS serves https. Attacks that need TLS do so anyway.
	TLS bool
	// Interval is the pause between two bytes of SlowHeaders. Zero means 1 s.
	Interval time.Duration
}

// Hostile is an upstream that attacks those who call it. It writes to raw sockets what
// no HTTP library would. It takes any token. Its methods are safe for concurrent use.
type Hostile struct {
	cfg      HostileConfig
	socket   net.Listener
	tls      *tls.Config // nil: plain
	caPEM    []byte
	url      string
	written  atomic.Int64
	ctx      context.Context
	stop     context.CancelFunc
	handlers sync.WaitGroup

	mu       sync.Mutex
	conns    map[net.Conn]struct{}
	accepted int
	requests []HostileRequest
	changed  chan struct{} // closed and replaced with every request
}

// HostileRequest is one request that a Hostile read whole. Of one over HTTP/2 only
// Connection is known.
type HostileRequest struct {
	Connection     int // from 1, in the order in which they came
	Method, Target string
	Header         http.Header
	BodyBytes      int64
}

// StartHostile starts a Hostile. The caller must Close it.
func StartHostile(cfg HostileConfig) (*Hostile, error) {
	if cfg.Address == "" {
		cfg.Address = "127.0.0.1:0"
	}
	if cfg.Interval <= 0 {
		cfg.Interval = time.Second
	}
	if _, ok := attackNames[cfg.Attack]; !ok {
		return nil, fmt.Errorf("start hostile upstream: unknown attack %v", cfg.Attack)
	}
	h := &Hostile{cfg: cfg, conns: map[net.Conn]struct{}{}, changed: make(chan struct{})}
	if cfg.TLS || cfg.Attack.HTTP2() || cfg.Attack == ExpiredCertificate {
		validity := 30 * 24 * time.Hour
		if cfg.Attack == ExpiredCertificate {
			validity = -time.Hour
		}
		ca, err := newAuthority(validity)
		if err != nil {
			return nil, fmt.Errorf("create throw-away CA: %w", err)
		}
		h.caPEM = ca.pem
		h.tls = &tls.Config{Certificates: []tls.Certificate{ca.leaf}, MinVersion: tls.VersionTLS12}
		if cfg.Attack.HTTP2() {
			h.tls.NextProtos = []string{"h2"}
		}
	}
	if cfg.Attack == DecompressionBomb {
		newBomb()
	}
	socket, err := net.Listen("tcp", cfg.Address)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", cfg.Address, err)
	}
	h.socket = socket
	h.url = "http://" + socket.Addr().String()
	if h.tls != nil {
		h.url = "https://" + socket.Addr().String()
	}
	h.ctx, h.stop = context.WithCancel(context.Background())
	h.handlers.Go(h.accept)
	return h, nil
}

// Close ends all connections.
func (h *Hostile) Close() error {
	h.stop()
	err := h.socket.Close()
	h.mu.Lock()
	for conn := range h.conns {
		_ = conn.Close()
	}
	h.mu.Unlock()
	h.handlers.Wait()
	return err
}

// URL is the base URL, without a trailing slash.
func (h *Hostile) URL() string { return h.url }

// CAPEM is the certificate of the CA behind https; nil without TLS.
func (h *Hostile) CAPEM() []byte { return h.caPEM }

// Requests returns the requests read so far.
func (h *Hostile) Requests() []HostileRequest {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.requests)
}

// Connections returns how many connections were made so far.
func (h *Hostile) Connections() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.accepted
}

// Written is how many bytes of answers the kernel took so far, before encryption: some
// of them may never have reached the client.
func (h *Hostile) Written() int64 { return h.written.Load() }

// Wait returns nil once n requests were read, and ctx's error if that does not happen
// in time.
func (h *Hostile) Wait(ctx context.Context, n int) error {
	for {
		h.mu.Lock()
		got, changed := len(h.requests), h.changed
		h.mu.Unlock()
		if got >= n {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (h *Hostile) accept() {
	for {
		conn, err := h.socket.Accept()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			continue // the client was gone before it was accepted
		}
		h.mu.Lock()
		if h.ctx.Err() != nil {
			h.mu.Unlock()
			_ = conn.Close()
			return
		}
		h.accepted++
		number := h.accepted
		h.conns[conn] = struct{}{}
		h.mu.Unlock()
		h.handlers.Go(func() {
			h.serve(conn, number)
			_ = conn.Close()
			h.mu.Lock()
			delete(h.conns, conn)
			h.mu.Unlock()
		})
	}
}

func (h *Hostile) serve(conn net.Conn, number int) {
	if h.tls == nil {
		h.serveHTTP1(&victim{h: h, Conn: conn, tcp: conn}, number)
		return
	}
	secure := tls.Server(conn, h.tls)
	if secure.HandshakeContext(h.ctx) != nil {
		return
	}
	v := &victim{h: h, Conn: secure, tcp: conn}
	if !h.cfg.Attack.HTTP2() {
		h.serveHTTP1(v, number)
	} else if secure.ConnectionState().NegotiatedProtocol == "h2" {
		h.serveHTTP2(v, number)
	}
	_ = secure.Close()
}

func (h *Hostile) note(r HostileRequest) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.requests = append(h.requests, r)
	close(h.changed)
	h.changed = make(chan struct{})
}

// victim is the connection of a client under attack.
type victim struct {
	h *Hostile
	net.Conn
	tcp net.Conn
}

// send writes s and reports whether the client took it.
func (v *victim) send(s string) bool {
	n, err := io.WriteString(v.Conn, s)
	v.h.written.Add(int64(n))
	return err == nil
}

// flood sends what next makes until the client gives up.
func (v *victim) flood(next func(i int) string) {
	for i := 0; v.h.ctx.Err() == nil && v.send(next(i)); i++ {
	}
}

// linger waits until the client has closed the connection.
func (v *victim) linger() { _, _ = io.Copy(io.Discard, v.Conn) }

// serveHTTP1 reads requests and attacks after each.
func (h *Hostile) serveHTTP1(v *victim, number int) {
	in := bufio.NewReader(v.Conn)
	for i := 0; ; i++ {
		r, err := http.ReadRequest(in)
		if err != nil {
			return
		}
		if strings.EqualFold(r.Header.Get("Expect"), "100-continue") {
			v.send("HTTP/1.1 100 Continue\r\n\r\n")
		}
		n, err := io.Copy(io.Discard, r.Body)
		if err != nil {
			return
		}
		h.note(HostileRequest{Connection: number, Method: r.Method, Target: r.RequestURI, Header: r.Header, BodyBytes: n})
		if !h.attack(v, i) {
			return
		}
	}
}

// plain is an answer with nothing wrong about it.
const plain = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 16\r\n\r\n" + `{"totalCount":0}`

// attack answers the i-th request of a connection, from 0, and reports whether the
// connection goes on.
func (h *Hostile) attack(v *victim, i int) bool {
	const ok, chunked = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n", "Transfer-Encoding: chunked\r\n\r\n"
	switch h.cfg.Attack {
	case EndlessHeaders:
		v.send(ok)
		v.flood(func(i int) string { return fmt.Sprintf("X-Fill-%d: %s\r\n", i, filler) })
	case InterimFlood:
		v.flood(func(i int) string {
			return fmt.Sprintf("HTTP/1.1 103 Early Hints\r\nLink: </%d>; rel=preload\r\n\r\n", i)
		})
	case SlowHeaders:
		tick := time.NewTicker(h.cfg.Interval)
		defer tick.Stop()
		v.send("HTTP/1.1 200 OK\r\nX-Slow: ")
		for v.send("a") {
			select {
			case <-tick.C:
			case <-h.ctx.Done():
				return false
			}
		}
	case LengthTooLong:
		v.send(ok + "Content-Length: 1000\r\n\r\n" + `{"totalCount":1,"items":[`)
	case LengthTooShort:
		v.send(ok + "Content-Length: 16\r\n\r\n" + `{"totalCount":0}` +
			"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 20\r\n\r\n" + `{"injected": "true"}`)
		return true
	case TwoLengths:
		return v.send(ok + "Content-Length: 16\r\nContent-Length: 2\r\n\r\n" + `{"totalCount":0}`)
	case BadChunk:
		v.send(ok + chunked + "10\r\n" + `{"totalCount":0,` + "\r\nno chunk\r\n")
		v.linger()
	case ResetMidBody:
		v.send(ok + chunked + "10\r\n" + `{"totalCount":0,` + "\r\n")
		if tcp, is := v.tcp.(*net.TCPConn); is {
			_ = tcp.SetLinger(0)
		}
		_ = v.tcp.Close()
	case CloseReused:
		return i == 0 && v.send(plain)
	case SwitchingProtocols:
		v.send("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: emulator\r\n\r\n" + filler)
		v.linger()
	case DecompressionBomb:
		bomb := newBomb() // made by StartHostile
		if !v.send(fmt.Sprintf("HTTP/1.1 401 Unauthorized\r\nContent-Type: application/json; charset=utf-8\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n", bomb.size())) {
			return false
		}
		return bomb.writeTo(v.send)
	case ExpiredCertificate:
		return v.send(plain) // to a client that does not care
	}
	return false
}

var filler = strings.Repeat("a", 1000)
