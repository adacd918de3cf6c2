package listen_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/partnerguard/partnerguard/proxy/listen"
)

func open(t *testing.T, cfg listen.Config) *listen.Server {
	t.Helper()
	if cfg.Address == "" {
		cfg.Address = "127.0.0.1:0"
	}
	s, err := listen.Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	s.Serve()
	t.Cleanup(func() { s.Shutdown(context.Background()) })
	return s
}

func proto(w http.ResponseWriter, r *http.Request) { io.WriteString(w, r.Proto+" "+r.RequestURI) }

func TestEveryRequestIsTheHandlers(t *testing.T) {
	s := open(t, listen.Config{Name: "plain", Handler: http.HandlerFunc(proto)})
	for _, target := range []string{"*", "//v1//x", "/v1/../x"} {
		c, err := net.Dial("tcp", s.Address().String())
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(c, "OPTIONS "+target+" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
		answer, _ := io.ReadAll(c)
		c.Close()
		if !strings.HasSuffix(string(answer), "HTTP/1.1 "+target) {
			t.Errorf("OPTIONS %s was answered by somebody else:\n%s", target, answer)
		}
	}
}

func TestRequestsThatNeverBecameCallsAreCounted(t *testing.T) {
	unparsed := make(chan struct{}, 10)
	s := open(t, listen.Config{Name: "plain", Handler: http.HandlerFunc(proto), Unparsed: func() { unparsed <- struct{}{} }})
	say := func(text string) string {
		c, err := net.Dial("tcp", s.Address().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		io.WriteString(c, text)
		answer, _ := io.ReadAll(c)
		return string(answer)
	}
	say("GET /v1/x HTTP/1.1\r\nHost: x\r\n\r\nGET /v1/y HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
	for _, bad := range []string{"rubbish\r\n\r\n", "GET /v1/x HTTP/1.1\r\n\r\n", "GET /v1/%zz HTTP/1.1\r\nHost: x\r\n\r\n"} {
		if answer := say(bad); !strings.HasPrefix(answer, "HTTP/1.1 400") {
			t.Errorf("%q: %s", bad, answer)
		}
		select {
		case <-unparsed:
		case <-time.After(10 * time.Second):
			t.Errorf("%q was not counted", bad)
		}
	}
	if len(unparsed) > 0 {
		t.Errorf("%d more were counted than refused", len(unparsed))
	}
}

func TestShutdownLetsTheCallInFlightFinish(t *testing.T) {
	arrived, finish := make(chan struct{}), make(chan struct{})
	s := open(t, listen.Config{Name: "plain", Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		close(arrived)
		<-finish
		io.WriteString(w, "whole")
	})})
	answer := make(chan string, 1)
	go func() {
		res, err := http.Get("http://" + s.Address().String())
		if err != nil {
			answer <- err.Error()
			return
		}
		defer res.Body.Close()
		body, _ := io.ReadAll(res.Body)
		answer <- string(body)
	}()
	<-arrived
	done := make(chan error, 1)
	go func() { done <- s.Shutdown(context.Background()) }()
	// Shutdown has closed the socket once nobody gets in any more.
	for {
		c, err := net.Dial("tcp", s.Address().String())
		if err != nil {
			break
		}
		c.Close()
	}
	close(finish)
	if got := <-answer; got != "whole" {
		t.Errorf("the call in flight got %q", got)
	}
	if err := <-done; err != nil {
		t.Errorf("Shutdown = %v", err)
	}
}

func TestShutdownCutsWhatTakesLonger(t *testing.T) {
	arrived, ended := make(chan struct{}), make(chan struct{})
	s := open(t, listen.Config{Name: "plain", Handler: http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		close(arrived)
		<-r.Context().Done()
		close(ended)
	})})
	go http.Get("http://" + s.Address().String())
	<-arrived
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := s.Shutdown(ctx); err == nil {
		t.Error("Shutdown does not say that it cut a call")
	}
	select {
	case <-ended:
	default:
		t.Error("Shutdown returned before the handler of the cut call did")
	}
}

func TestWhatCannotBeOpenedIsNamed(t *testing.T) {
	s := open(t, listen.Config{Name: "first", Handler: http.HandlerFunc(proto)})
	unix, err := net.Listen("unix", filepath.Join(t.TempDir(), "socket"))
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close()
	for name, cfg := range map[string]listen.Config{
		"a port in use":       {Address: s.Address().String()},
		"a socket of no peer": {Socket: unix},
	} {
		cfg.Name, cfg.Handler = "second", http.HandlerFunc(proto)
		if _, err := listen.Open(cfg); err == nil || !strings.Contains(err.Error(), "second") {
			t.Errorf("%s: %v, want an error that names the listener", name, err)
		}
	}
}

// client calls over TLS if roots are given. It shows its certificate even where the
// server does not name the issuer.
func client(t *testing.T, roots *x509.CertPool, http2 bool, certs ...*tls.Certificate) *http.Client {
	t.Helper()
	transport := &http.Transport{ForceAttemptHTTP2: http2, TLSClientConfig: &tls.Config{RootCAs: roots}}
	if len(certs) > 0 {
		transport.TLSClientConfig.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return certs[0], nil }
	}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: 20 * time.Second}
}

// call returns the answer's status and body.
func call(t *testing.T, c *http.Client, url string) (int, string) {
	t.Helper()
	res, err := c.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res.StatusCode, string(body)
}

// eventually waits for what happens by itself and cannot be waited for otherwise.
func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !holds(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
	}
}

// A balancer asks for readiness now and then. Until it knows that the guard leaves
// it goes on sending; POSTs show every failure, since no client repeats them.
func TestNoCallFailsWhileTheGuardDrains(t *testing.T) {
	cert, key, roots := certificate(t)
	for _, version := range []string{"HTTP/1.1", "HTTP/1.1 with TLS", "HTTP/2.0"} {
		t.Run(version, func(t *testing.T) {
			cfg := listen.Config{Name: "drained", Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				io.Copy(io.Discard, r.Body)
				proto(w, r)
			})}
			url := "http://"
			if version != "HTTP/1.1" {
				cfg.TLS, url = load(t, listen.TLSConfig{Certificate: cert, Key: key}), "https://"
			}
			s := open(t, cfg)
			url += s.Address().String()
			var ready, using atomic.Bool
			ready.Store(true)
			using.Store(true)

			var calls, ended atomic.Int64
			var users sync.WaitGroup
			clients := client(t, roots, version == "HTTP/2.0")
			for range 8 {
				users.Go(func() {
					for using.Load() {
						// HTTP/2 gives back what it did not accept, and the client may send it again.
						var body io.Reader = strings.NewReader("{}")
						if version != "HTTP/2.0" {
							body = struct{ io.Reader }{body}
						}
						res, err := clients.Post(url, "application/json", body)
						if err != nil {
							t.Errorf("a call failed: %v", err)
							return
						}
						if got, _ := io.ReadAll(res.Body); !strings.HasPrefix(version, strings.Fields(string(got))[0]) {
							t.Errorf("answered %q, want %s", got, version)
						}
						res.Body.Close()
						calls.Add(1)
						if res.Close {
							ended.Add(1)
						}
					}
				})
			}
			eventually(t, "calls go on", func() bool { return calls.Load() > 100 })
			if ended.Load() > 0 {
				t.Error("answers ended connections before the drain")
			}

			ready.Store(false)
			s.Drain()
			before := calls.Load()
			eventually(t, "calls go on while draining", func() bool { return calls.Load() > before+100 })
			if version != "HTTP/2.0" && ended.Load() < 50 {
				t.Errorf("%d of about 100 answers ended their connection", ended.Load())
			}
			poll := time.NewTicker(20 * time.Millisecond)
			defer poll.Stop()
			for using.Load() {
				<-poll.C
				using.Store(ready.Load())
			}
			users.Wait() // unready is longer than the balancer's interval
			if err := s.Shutdown(t.Context()); err != nil {
				t.Errorf("Shutdown = %v", err)
			}
		})
	}
}

func TestADrainedHTTP2ConnectionIsToldToGoAway(t *testing.T) {
	cert, key, roots := certificate(t)
	s := open(t, listen.Config{Name: "drained", TLS: load(t, listen.TLSConfig{Certificate: cert, Key: key}), Handler: http.HandlerFunc(proto)})
	f := dialHTTP2(t, s, roots)
	f.get(1)
	f.await(func(fr http2.Frame) bool {
		return fr.Header().StreamID == 1 && fr.Header().Flags.Has(http2.FlagDataEndStream)
	})
	s.Drain()
	f.get(3)
	f.await(func(fr http2.Frame) bool {
		g, ok := fr.(*http2.GoAwayFrame)
		return ok && g.ErrCode == http2.ErrCodeNo && g.LastStreamID == 3
	})
}

// A connection that net/http has accepted, but that speaks HTTP/2 only after
// Shutdown began, must not hold it up.
func TestShutdownDoesNotWaitForAConnectionThatComesLate(t *testing.T) {
	cert, key, roots := certificate(t)
	s := open(t, listen.Config{Name: "tls", TLS: load(t, listen.TLSConfig{Certificate: cert, Key: key}), Handler: http.HandlerFunc(proto)})
	late, err := dialPlain(s)
	if err != nil {
		t.Fatal(err)
	}
	defer late.Close()
	call(t, client(t, roots, false), "https://"+s.Address().String()) // so late has been accepted, too
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- s.Shutdown(ctx) }()
	eventually(t, "the socket is closed", func() bool {
		c, err := dialPlain(s)
		if err == nil {
			c.Close()
		}
		return err != nil
	})
	conn := tls.Client(late, &tls.Config{RootCAs: roots, ServerName: "127.0.0.1", NextProtos: []string{"h2"}})
	f := &framer{t: t, conn: conn, out: conn}
	f.Framer = http2.NewFramer(f, conn)
	io.WriteString(conn, http2.ClientPreface)
	f.WriteSettings()
	f.awaitEnd()
	if err := <-done; err != nil {
		t.Errorf("Shutdown = %v", err)
	}
}
