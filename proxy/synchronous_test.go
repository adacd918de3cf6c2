package proxy_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/partnerguard/partnerguard/proxy"
)

// answers is an upstream that speaks by hand: each request is answered by say, and the
// connection ends when that returns false.
func answers(t *testing.T, secure bool, say func(c net.Conn, r *http.Request) bool) *proxy.Upstream {
	t.Helper()
	cfg := proxy.UpstreamConfig{Name: "u", Audiences: []string{"a"}, ResponseHeader: 30 * time.Second}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	cfg.URL = "http://" + l.Addr().String()
	if secure {
		s := httptest.NewUnstartedServer(nil)
		s.StartTLS()
		cfg.URL = "https://" + l.Addr().String()
		cfg.RootCAs = x509.NewCertPool()
		cfg.RootCAs.AddCert(s.Certificate())
		l = tls.NewListener(l, &tls.Config{Certificates: s.TLS.Certificates})
		s.Close()
	}
	var serving sync.WaitGroup
	t.Cleanup(func() { l.Close(); serving.Wait() })
	serving.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			serving.Go(func() {
				defer c.Close()
				br := bufio.NewReader(c)
				for {
					r, err := http.ReadRequest(br)
					if err != nil || !say(c, r) {
						return
					}
				}
			})
		}
	})
	up, err := proxy.NewUpstream(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(up.Close)
	return up
}

// ask sends a request without a body and returns what the answer holds.
func ask(ctx context.Context, up *proxy.Upstream, method, target string) (string, error) {
	r, err := http.NewRequestWithContext(ctx, method, "http://ignored"+target, nil)
	if err != nil {
		return "", err
	}
	res, err := up.RoundTrip(r)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	return string(body), err
}

const hello = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"

func TestConnectionsAreUsedAgain(t *testing.T) {
	for name, secure := range map[string]bool{"clear text": false, "TLS": true} {
		t.Run(name, func(t *testing.T) {
			var conns sync.Map
			var n atomic.Int32
			up := answers(t, secure, func(c net.Conn, r *http.Request) bool {
				if _, known := conns.LoadOrStore(c, true); !known {
					n.Add(1)
				}
				switch r.URL.Path {
				case "/chunked":
					io.WriteString(c, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nX-Trailer: 1\r\n\r\n")
				case "/empty":
					io.WriteString(c, "HTTP/1.1 204 No Content\r\n\r\n")
				case "/hints":
					io.WriteString(c, "HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"+hello)
				default:
					io.WriteString(c, hello)
				}
				return true
			})
			for range 5 {
				for _, target := range []string{"/", "/chunked", "/empty", "/hints"} {
					want := "hello"
					if target == "/empty" {
						want = ""
					}
					if got, err := ask(t.Context(), up, "DELETE", target); got != want || err != nil {
						t.Errorf("%s: %q, %v", target, got, err)
					}
				}
			}
			if n.Load() != 1 {
				t.Errorf("20 calls in turn took %d connections, want 1", n.Load())
			}
		})
	}
}

// Servers close connections that are idle. A call that may not be repeated must not be
// lost to that.
func TestAConnectionThatWasClosedIsNotUsed(t *testing.T) {
	for name, secure := range map[string]bool{"clear text": false, "TLS": true} {
		t.Run(name, func(t *testing.T) {
			closed := make(chan struct{}, 1)
			up := answers(t, secure, func(c net.Conn, r *http.Request) bool {
				io.WriteString(c, hello)
				c.Close()
				closed <- struct{}{}
				return false
			})
			for range 20 {
				if got, err := ask(t.Context(), up, "POST", "/"); got != "hello" || err != nil {
					t.Fatalf("%q, %v", got, err)
				}
				<-closed
			}
		})
	}
}

// What an upstream says unasked is no answer, wherever on the way it is: in the socket,
// or in what TLS or the guard have read already.
func TestWhatIsSaidUnaskedIsNoAnswer(t *testing.T) {
	const poison = "HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison"
	for name, secure := range map[string]bool{"clear text": false, "TLS": true} {
		t.Run(name, func(t *testing.T) {
			said := make(chan struct{}, 1)
			up := answers(t, secure, func(c net.Conn, r *http.Request) bool {
				switch r.URL.Path {
				case "/at-once":
					io.WriteString(c, hello+poison)
				case "/in-another-record":
					io.WriteString(c, hello)
					io.WriteString(c, poison)
				case "/much":
					long := make([]byte, 12000) // more than a buffer of the guard's
					io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 12000\r\n\r\n"+string(long)+poison)
				}
				said <- struct{}{}
				return true
			})
			for range 20 {
				for _, target := range []string{"/at-once", "/in-another-record", "/much"} {
					got, err := ask(t.Context(), up, "POST", target)
					if err != nil || got != "hello" && len(got) != 12000 {
						t.Fatalf("%s: %q, %v", target, got, err)
					}
					<-said
				}
			}
		})
	}
}

// A client that hangs up ends its call at the upstream, in whatever state it is, and
// only its own.
func TestTheEndOfAClientEndsItsCallOnly(t *testing.T) {
	for name, secure := range map[string]bool{"clear text": false, "TLS": true} {
		t.Run(name, func(t *testing.T) {
			asked, ended := make(chan struct{}), make(chan struct{})
			up := answers(t, secure, func(c net.Conn, r *http.Request) bool {
				switch r.URL.Path {
				case "/header":
				case "/body":
					io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhe")
				default:
					io.WriteString(c, hello)
					return true
				}
				asked <- struct{}{}
				io.Copy(io.Discard, c) // until the guard closes it
				ended <- struct{}{}
				return false
			})
			for _, target := range []string{"/header", "/body"} {
				ctx, cancel := context.WithCancel(t.Context())
				done := make(chan error, 1)
				go func() {
					_, err := ask(ctx, up, "GET", target)
					done <- err
				}()
				<-asked
				cancel()
				if err := <-done; err == nil {
					t.Errorf("%s: no error after the client's end", target)
				}
				<-ended
				if got, err := ask(t.Context(), up, "POST", "/"); got != "hello" || err != nil {
					t.Errorf("the next call got %q, %v", got, err)
				}
			}
		})
	}
}

func TestAClosedBodyIsNoShortAnswer(t *testing.T) {
	up := answers(t, false, func(c net.Conn, r *http.Request) bool {
		io.WriteString(c, hello)
		return true
	})
	r, _ := http.NewRequestWithContext(t.Context(), "GET", "http://ignored/", nil)
	res, err := up.RoundTrip(r)
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	if n, err := res.Body.Read(make([]byte, 5)); n != 0 || err == nil || errors.Is(err, io.EOF) {
		t.Errorf("Read after Close = %d, %v; want an error that is not the end", n, err)
	}
}

// Many callers, an upstream that closes and breaks off at random, and clients that hang
// up: everyone gets his own answer or an error, never another's.
func TestEveryCallerGetsItsOwnAnswer(t *testing.T) {
	for name, secure := range map[string]bool{"clear text": false, "TLS": true} {
		t.Run(name, func(t *testing.T) {
			up := answers(t, secure, func(c net.Conn, r *http.Request) bool {
				id := r.URL.Path[1:]
				full := "HTTP/1.1 200 OK\r\nContent-Length: " + strconv.Itoa(len(id)) + "\r\n\r\n" + id
				switch rand.N(10) {
				case 0:
					return false
				case 1:
					io.WriteString(c, full[:rand.N(len(full))])
					return false
				case 2:
					io.WriteString(c, full)
					return false
				case 3:
					io.WriteString(c, full+full)
					return true
				}
				io.WriteString(c, full)
				return true
			})
			var callers sync.WaitGroup
			var good atomic.Int32
			for caller := range 8 {
				callers.Go(func() {
					for i := range 60 {
						ctx, cancel := context.WithCancel(t.Context())
						if rand.N(10) == 0 {
							go cancel()
						}
						id := strconv.Itoa(caller) + "-" + strconv.Itoa(i)
						got, err := ask(ctx, up, []string{"GET", "DELETE"}[i%2], "/"+id)
						cancel()
						if err == nil && got != id {
							t.Errorf("asked for %s and got %q", id, got)
						}
						if err == nil {
							good.Add(1)
						}
					}
				})
			}
			callers.Wait()
			if good.Load() < 120 {
				t.Errorf("%d of 480 calls got an answer", good.Load())
			}
		})
	}
}
