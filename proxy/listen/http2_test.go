package listen_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/partnerguard/partnerguard/proxy/listen"
)

// framer is an HTTP/2 client that sends what it is told to.
type framer struct {
	*http2.Framer
	t    *testing.T
	conn *tls.Conn
	out  io.Writer
	enc  *hpack.Encoder
	buf  bytes.Buffer
}

func (f *framer) Write(p []byte) (int, error) { return f.out.Write(p) }

func dialHTTP2(t *testing.T, s *listen.Server, roots *x509.CertPool, certs ...*tls.Certificate) *framer {
	t.Helper()
	cfg := &tls.Config{RootCAs: roots, NextProtos: []string{"h2"}}
	for _, c := range certs {
		cfg.Certificates = append(cfg.Certificates, *c)
	}
	conn, err := tls.Dial("tcp", s.Address().String(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.NetConn().Close() })
	conn.SetDeadline(time.Now().Add(30 * time.Second))
	f := newFramer(conn)
	f.t = t
	if err := f.begin(); err != nil {
		t.Fatal(err)
	}
	return f
}

func newFramer(conn *tls.Conn) *framer {
	f := &framer{conn: conn, out: conn}
	f.Framer = http2.NewFramer(f, conn)
	f.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	f.AllowIllegalWrites = true
	f.enc = hpack.NewEncoder(&f.buf)
	return f
}

// begin says that this is HTTP/2.
func (f *framer) begin() error {
	_, err := io.WriteString(f.conn, http2.ClientPreface)
	return errors.Join(err, f.WriteSettings())
}

// block encodes headers, given as names and values.
func (f *framer) block(fields ...string) []byte {
	f.buf.Reset()
	for pair := range slices.Chunk(fields, 2) {
		f.enc.WriteField(hpack.HeaderField{Name: pair[0], Value: pair[1]})
	}
	return slices.Clone(f.buf.Bytes())
}

func (f *framer) headers(stream uint32, end bool, fields ...string) error {
	return f.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: f.block(fields...), EndHeaders: true, EndStream: end})
}

// request is the block of a whole request.
func (f *framer) request() []byte {
	return f.block(":method", "GET", ":scheme", "https", ":authority", "x", ":path", "/")
}

func (f *framer) get(stream uint32) error {
	return f.headers(stream, true, ":method", "GET", ":scheme", "https", ":authority", "x", ":path", "/")
}

func (f *framer) post(stream uint32) error {
	return f.headers(stream, false, ":method", "POST", ":scheme", "https", ":authority", "x", ":path", "/")
}

// await reads until a frame is the one.
func (f *framer) await(is func(http2.Frame) bool) {
	f.t.Helper()
	for {
		fr, err := f.ReadFrame()
		if err != nil {
			f.t.Fatalf("the frame never came: %v", err)
		}
		if is(fr) {
			return
		}
	}
}

func endOf(stream uint32) func(http2.Frame) bool {
	return func(fr http2.Frame) bool {
		return fr.Header().StreamID == stream && fr.Header().Flags.Has(http2.FlagDataEndStream)
	}
}

// awaitEnd reads until the server closes the connection, and gives the code of its
// GOAWAY, or -1.
func (f *framer) awaitEnd() (code int) {
	f.t.Helper()
	code = -1
	for {
		fr, err := f.ReadFrame()
		var timeout interface{ Timeout() bool }
		if errors.As(err, &timeout) && timeout.Timeout() {
			f.t.Fatal("the connection goes on")
		}
		if err != nil {
			return code
		}
		if g, ok := fr.(*http2.GoAwayFrame); ok {
			code = int(g.ErrCode)
		}
	}
}

// flood is an attack by one connection.
type flood struct {
	name   string
	log    string
	start  func(f *framer)
	send   func(f *framer, i uint32) error
	unread bool // the attacker does not read the answers
}

const controlFrames = "it sends little but control frames"

var floods = []flood{
	{name: "rapid reset", log: "it cancels its calls at once", send: func(f *framer, i uint32) error {
		return errors.Join(f.get(2*i+1), f.WriteRSTStream(2*i+1, http2.ErrCodeCancel))
	}},
	{name: "rapid reset, calls go on", log: "it cancels its calls at once", send: func(f *framer, i uint32) error {
		return errors.Join(f.headers(2*i+1, true, ":method", "GET", ":scheme", "https", ":authority", "x", ":path", "/deaf"),
			f.WriteRSTStream(2*i+1, http2.ErrCodeCancel))
	}},
	{name: "streams over the limit", send: func(f *framer, i uint32) error { return f.get(2*i + 1) }},
	{name: "continuation", log: "PROTOCOL_ERROR", start: func(f *framer) {
		f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: f.request()})
	}, send: func(f *framer, _ uint32) error {
		return f.WriteContinuation(1, false, f.block("x", strings.Repeat("y", 8<<10)))
	}},
	{name: "continuation, empty", log: controlFrames, start: func(f *framer) {
		f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: f.request()})
	}, send: func(f *framer, _ uint32) error { return f.WriteContinuation(1, false, nil) }},
	// Where answers are due net/http may be first, and ends it without a word.
	{name: "ping", send: func(f *framer, _ uint32) error { return f.WritePing(false, [8]byte{}) }},
	{name: "ping, answers unread", unread: true, send: func(f *framer, _ uint32) error { return f.WritePing(false, [8]byte{}) }},
	{name: "ping while a call goes on", start: func(f *framer) { f.get(1) },
		send: func(f *framer, _ uint32) error { return f.WritePing(false, [8]byte{}) }},
	{name: "settings", send: func(f *framer, _ uint32) error { return f.WriteSettings() }},
	{name: "settings, answers unread", unread: true, send: func(f *framer, _ uint32) error { return f.WriteSettings() }},
	{name: "priority", log: controlFrames, send: func(f *framer, i uint32) error {
		return f.WritePriority(2*i+1, http2.PriorityParam{Weight: uint8(i)})
	}},
	{name: "data, empty", log: controlFrames, start: func(f *framer) { f.post(1) },
		send: func(f *framer, _ uint32) error { return f.WriteData(1, false, nil) }},
}

// attacked answers others at once, and attackers never: calls to /deaf do not even heed
// that they are cancelled.
func attacked(release <-chan struct{}) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/":
			select {
			case <-r.Context().Done():
			case <-release:
			}
		case "/deaf":
			<-release
		}
		io.WriteString(w, "ok")
	})
}

// A flood ends its own connection, soon, and others are served meanwhile.
func TestFloodsEndTheirConnectionAlone(t *testing.T) {
	const soon = 25 * time.Second
	cert, key, roots := certificate(t)
	for _, c := range floods {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			release := make(chan struct{})
			var running, peak atomic.Int64
			var complained complaints
			handler := attacked(release)
			s := open(t, listen.Config{
				Name: "tls", TLS: load(t, listen.TLSConfig{Certificate: cert, Key: key}), ErrorLog: log.New(&complained, "", 0),
				Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					n := running.Add(1)
					defer running.Add(-1)
					for old := peak.Load(); n > old && !peak.CompareAndSwap(old, n); old = peak.Load() {
					}
					handler.ServeHTTP(w, r)
				}),
			})
			t.Cleanup(func() { close(release) })
			other := client(t, roots, true)
			url := "https://" + s.Address().String() + "/other"
			call(t, other, url)

			f := dialHTTP2(t, s, roots)
			var reading sync.WaitGroup
			if !c.unread {
				reading.Go(func() { io.Copy(io.Discard, f.conn) })
			}
			if c.start != nil {
				c.start(f)
			}
			f.out = bufio.NewWriterSize(f.conn, 8<<10) // as many frames as the attacker can
			f.conn.SetWriteDeadline(time.Now().Add(soon))
			start, ended := time.Now(), make(chan error, 1)
			go func() {
				for i := uint32(0); ; i++ {
					if err := c.send(f, i); err != nil {
						reading.Wait()
						ended <- err
						return
					}
				}
			}()
			calls := 0
			for attacked := true; attacked; calls++ {
				select {
				case err := <-ended:
					if attacked = false; errors.Is(err, os.ErrDeadlineExceeded) {
						t.Errorf("the flood goes on after %v", soon)
					}
				case <-time.After(time.Millisecond):
				}
				if status, body := call(t, other, url); status != 200 || body != "ok" {
					t.Fatalf("another client got %d %q", status, body)
				}
			}
			took := time.Since(start).Round(time.Millisecond)
			if c.log != "" {
				eventually(t, "the log says "+c.log, func() bool { return complained.has(c.log) })
			}
			if n := peak.Load(); n > 100+1 {
				t.Errorf("%d calls at a time, want at most the attacker's 100 and one", n)
			}
			t.Logf("ended after %v and %d calls of others", took, calls)
		})
	}
}

// Honest clients send control frames, too, and bodies that nobody reads.
func TestHonestTrafficIsNoFlood(t *testing.T) {
	cert, key, roots := certificate(t)
	s := open(t, listen.Config{
		Name: "tls", TLS: load(t, listen.TLSConfig{Certificate: cert, Key: key}),
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			switch r.URL.Path {
			case "/refuse":
				w.WriteHeader(http.StatusUnauthorized)
			case "/upload":
				io.Copy(io.Discard, r.Body)
			case "/wait":
				<-r.Context().Done()
				return
			case "/download":
				part := make([]byte, 4<<10)
				for range 64 << 20 / len(part) {
					w.Write(part)
				}
			case "/stream":
				for range 10_000 {
					io.WriteString(w, "part")
					w.(http.Flusher).Flush()
				}
			}
			io.WriteString(w, r.RemoteAddr)
		}),
	})
	url := "https://" + s.Address().String()
	c := client(t, roots, true)
	_, first := call(t, c, url)
	from := func(path string, body io.Reader) string {
		t.Helper()
		res, err := c.Post(url+path, "application/octet-stream", body)
		if err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		defer res.Body.Close()
		got, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		return string(got[max(0, len(got)-len(first)):])
	}
	for i := range 100 {
		if got := from("/refuse", bytes.NewReader(make([]byte, 1<<20))); got != first {
			t.Fatalf("refusal %d came by another connection", i)
		}
	}
	if got := from("/upload", &dribble{rest: 64 << 10, part: 16}); got != first {
		t.Error("an upload in small parts ended the connection")
	}
	if got := from("/upload", &dribble{rest: 64 << 20, part: 32 << 10}); got != first {
		t.Error("an upload ended the connection")
	}
	if got := from("/download", http.NoBody); got != first {
		t.Error("a download ended the connection")
	}
	// A client that answers each part at once with all that it may.
	f := dialHTTP2(t, s, roots)
	f.headers(1, true, ":method", "GET", ":scheme", "https", ":authority", "x", ":path", "/stream")
	f.await(func(fr http2.Frame) bool {
		if n := fr.Header().Length; fr.Header().Type == http2.FrameData && n > 0 {
			f.WriteWindowUpdate(0, n)
			f.WriteWindowUpdate(1, n)
			f.WritePing(false, [8]byte{})
		}
		return endOf(1)(fr)
	})
	// One that says of each KiB that it has it.
	f = dialHTTP2(t, s, roots)
	f.headers(1, true, ":method", "GET", ":scheme", "https", ":authority", "x", ":path", "/download")
	f.await(func(fr http2.Frame) bool {
		for n := fr.Header().Length; fr.Header().Type == http2.FrameData && n > 0; n -= min(n, 1<<10) {
			f.WriteWindowUpdate(0, min(n, 1<<10))
			f.WriteWindowUpdate(1, min(n, 1<<10))
		}
		return endOf(1)(fr)
	})
	for range 600 {
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		req, _ := http.NewRequestWithContext(ctx, http.MethodGet, url+"/wait", nil)
		if res, err := c.Do(req); err == nil {
			res.Body.Close()
			t.Error("a call that nobody answers got an answer")
		}
		cancel()
		if got := from("/", http.NoBody); got != first {
			t.Fatal("a client that gives up every second call lost its connection")
		}
	}
}

// dribble is a body that comes in parts, each a frame of its own.
type dribble struct{ rest, part int }

func (d *dribble) Read(p []byte) (int, error) {
	if d.rest <= 0 {
		return 0, io.EOF
	}
	n := min(d.part, len(p), d.rest)
	d.rest -= n
	return n, nil
}

func TestHeadersOfHTTP2AreBounded(t *testing.T) {
	var unparsed, served atomic.Int64
	cert, key, roots := certificate(t)
	s := open(t, listen.Config{
		Name: "tls", TLS: load(t, listen.TLSConfig{Certificate: cert, Key: key}), MaxHeaderBytes: 16 << 10,
		Handler: http.HandlerFunc(func(http.ResponseWriter, *http.Request) { served.Add(1) }), Unparsed: func() { unparsed.Add(1) },
	})
	f := dialHTTP2(t, s, roots)
	request := []string{":method", "GET", ":scheme", "https", ":authority", "x", ":path", "/"}
	large := append(slices.Clone(request), "a", strings.Repeat("a", 8<<10), "b", strings.Repeat("b", 8<<10), "c", strings.Repeat("c", 4<<10))
	f.headers(1, true, large...)
	f.await(func(fr http2.Frame) bool {
		h, ok := fr.(*http2.MetaHeadersFrame)
		return ok && h.StreamID == 1 && h.PseudoValue("status") == "431"
	})
	f.await(endOf(1))
	// Malformed requests.
	f.headers(3, true, ":method", "GET", ":scheme", "ftp", ":authority", "x", ":path", "/")
	f.await(func(fr http2.Frame) bool { _, ok := fr.(*http2.RSTStreamFrame); return ok && fr.Header().StreamID == 3 })
	f.headers(5, true, append(slices.Clone(request), "connection", "keep-alive")...)
	f.await(func(fr http2.Frame) bool {
		h, ok := fr.(*http2.MetaHeadersFrame)
		return ok && h.StreamID == 5 && h.PseudoValue("status") == "400"
	})
	f.await(endOf(5))
	f.headers(7, true, append(slices.Clone(request), "authorization", strings.Repeat("t", 12<<10))...)
	f.await(endOf(7))
	f.conn.Close()
	s.Shutdown(context.Background())
	if served.Load() != 1 || unparsed.Load() != 3 {
		t.Errorf("%d served, %d unparsed, want 1 and 3", served.Load(), unparsed.Load())
	}
}

func TestHeadersOfHTTP2ThatDoNotEnd(t *testing.T) {
	cert, key, roots := certificate(t)
	s := open(t, listen.Config{
		Name: "tls", TLS: load(t, listen.TLSConfig{Certificate: cert, Key: key}), IdleTimeout: time.Second,
		Handler: http.HandlerFunc(proto),
	})
	f := dialHTTP2(t, s, roots)
	f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: f.block(":method", "GET", ":scheme", "https")})
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		io.Copy(io.Discard, f.conn)
	}()
	drip := time.NewTicker(100 * time.Millisecond)
	defer drip.Stop()
	for start := time.Now(); ; {
		select {
		case <-ended:
			return
		case <-drip.C:
			f.WriteContinuation(1, false, f.block("x", "y"))
		}
		if time.Since(start) > 10*time.Second {
			t.Fatal("the connection goes on")
		}
	}
}

// Without TLS there is no HTTP/2, whoever asks and how.
func TestThereIsNoHTTP2WithoutNegotiation(t *testing.T) {
	var served atomic.Int64
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		served.Add(1)
		proto(w, r)
	})
	cert, key, roots := certificate(t)
	plain := open(t, listen.Config{Name: "plain", Handler: handler})
	secure := open(t, listen.Config{Name: "tls", TLS: load(t, listen.TLSConfig{Certificate: cert, Key: key}), Handler: handler})
	for name, dial := range map[string]func() (io.ReadWriteCloser, error){
		"in clear text": func() (io.ReadWriteCloser, error) { return dialPlain(plain) },
		"as HTTP/1.1 over TLS": func() (io.ReadWriteCloser, error) {
			return tls.Dial("tcp", secure.Address().String(), &tls.Config{RootCAs: roots, NextProtos: []string{"http/1.1"}})
		},
	} {
		c, err := dial()
		if err != nil {
			t.Fatal(err)
		}
		f := http2.NewFramer(c, nil)
		io.WriteString(c, http2.ClientPreface)
		f.WriteSettings()
		answer, _ := io.ReadAll(c)
		c.Close()
		if !strings.HasPrefix(string(answer), "HTTP/1.1 505 ") {
			t.Errorf("%s the preface got %q", name, answer)
		}
	}
	if n := served.Load(); n != 0 {
		t.Errorf("%d prefaces were served as calls", n)
	}
	c, err := dialPlain(plain)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	io.WriteString(c, "GET /x HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings, close\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n\r\n")
	answer, _ := io.ReadAll(c)
	if !strings.HasPrefix(string(answer), "HTTP/1.1 200") || !strings.HasSuffix(string(answer), "HTTP/1.1 /x") {
		t.Errorf("an upgrade got %q, want an answer in HTTP/1.1", answer)
	}
}
