package proxy_test

import (
	"bufio"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/partnerguard/partnerguard/policy"
	"github.com/partnerguard/partnerguard/proxy"
)

// lines is a log that can be read while it is written.
type lines struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

// The answer comes before the body: the upstream is not there, or said no at once.
func TestABodyThatNobodyWantsAnyMoreHarmsNoConnection(t *testing.T) {
	for _, row := range []struct {
		name     string
		upstream http.Handler // nil: none
	}{
		{"no upstream", nil},
		{"an upstream that answers early", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Connection", "close")
			w.WriteHeader(http.StatusForbidden)
		})},
	} {
		for _, head := range []string{"Content-Length: 1000", "Content-Length: 1000\r\nExpect: 100-continue", "Transfer-Encoding: chunked"} {
			t.Run(row.name+", "+strings.ReplaceAll(head, "\r\n", ", "), func(t *testing.T) {
				t.Parallel()
				upstream := row.upstream
				if upstream == nil {
					upstream = http.NotFoundHandler()
				}
				r := newRig(t, upstream, func(_ *policy.Config, g *proxy.Config, u *proxy.UpstreamConfig, _ *proxy.Listener) {
					if row.upstream == nil {
						u.Dial = "127.0.0.1:1"
					}
				})
				said := &lines{}
				server := httptest.NewUnstartedServer(r.guard.Config.Handler)
				server.Config.ErrorLog = log.New(said, "", 0)
				server.Start()
				defer server.Close()
				for _, late := range []bool{true, false} {
					c, err := net.Dial("tcp", server.Listener.Addr().String())
					if err != nil {
						t.Fatal(err)
					}
					defer c.Close()
					c.SetDeadline(time.Now().Add(20 * time.Second))
					body := strings.Repeat("x", 1000)
					if strings.Contains(head, "chunked") {
						body = "3e8\r\n" + body + "\r\n0\r\n\r\n"
					}
					request := "POST /v1/orders HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer mfa\r\n" + head + "\r\n\r\n"
					if !late {
						request += body
					}
					io.WriteString(c, request)
					br := bufio.NewReader(c)
					res, err := http.ReadResponse(br, nil)
					if err != nil {
						t.Fatal(err)
					}
					if res.StatusCode != 502 && res.StatusCode != 403 {
						t.Errorf("the client got %d", res.StatusCode)
					}
					io.Copy(io.Discard, res.Body)
					if late {
						io.WriteString(c, body)
					}
					// What comes next must not be taken for a part of the body, nor the body
					// for the next request.
					io.WriteString(c, "GET /v1/next HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer mfa\r\nConnection: close\r\n\r\n")
					next, err := http.ReadResponse(br, nil)
					if err == nil && (res.Close || next.StatusCode == http.StatusBadRequest) {
						t.Errorf("then the connection, announced to close %v, answered %d", res.Close, next.StatusCode)
					}
					if err != nil && !res.Close {
						t.Errorf("the connection ended unannounced: %v", err)
					}
				}
				server.Close()
				said.mu.Lock()
				defer said.mu.Unlock()
				if said.text.Len() > 0 {
					t.Errorf("the server's log: %s", said.text.String())
				}
			})
		}
	}
}

// The body ends just as its call does: net/http alone waits for ever then, and with it
// a client that waits for the end of its connection.
func TestABodyThatEndsWithItsCallLeavesNoConnection(t *testing.T) {
	t.Parallel()
	r := newRig(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Connection", "close")
		w.WriteHeader(http.StatusForbidden)
	}))
	var clients sync.WaitGroup
	defer clients.Wait()
	for range 8 {
		clients.Go(func() {
			for range 50 {
				c, err := net.Dial("tcp", r.guard.Listener.Addr().String())
				if err != nil {
					t.Error(err)
					return
				}
				c.SetDeadline(time.Now().Add(20 * time.Second))
				io.WriteString(c, "POST /v1/orders HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer mfa\r\nContent-Length: 1000\r\n\r\n")
				c.Read(make([]byte, 1)) // the answer is on its way
				io.WriteString(c, strings.Repeat("x", 1000))
				clients.Go(func() {
					defer c.Close()
					if _, err := io.Copy(io.Discard, c); errors.Is(err, os.ErrDeadlineExceeded) {
						t.Error("a connection does not end")
					}
				})
			}
		})
	}
}
