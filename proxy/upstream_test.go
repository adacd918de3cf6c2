package proxy_test

import (
	"bufio"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptrace"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/partnerguard/partnerguard/proxy"
)

// An upstream that sends more than it announced has nothing to say to the next call on
// the connection, however soon that comes.
func TestWhatIsLeftOfAnAnswerIsNobodysAnswer(t *testing.T) {
	log.SetOutput(io.Discard) // net/http tells of every connection that it closes for it
	defer log.SetOutput(os.Stderr)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
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
					if err != nil {
						return
					}
					io.Copy(io.Discard, r.Body)
					io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhelloHTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison")
				}
			})
		}
	})
	up, err := proxy.NewUpstream(proxy.UpstreamConfig{Name: "u", URL: "http://" + l.Addr().String(), Audiences: []string{"a"}})
	if err != nil {
		t.Fatal(err)
	}
	defer up.Close()
	var poisoned, failed atomic.Int32
	var callers sync.WaitGroup
	for range 8 {
		callers.Go(func() {
			for range 500 {
				// With a body, as others do not go by net/http.
				r, err := http.NewRequestWithContext(httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{}), http.MethodPost, "http://"+l.Addr().String(), strings.NewReader("{}"))
				if err != nil {
					t.Error(err)
					return
				}
				res, err := up.RoundTrip(r)
				if err != nil {
					failed.Add(1) // the connection was closed under it
					continue
				}
				body, _ := io.ReadAll(res.Body)
				res.Body.Close()
				if string(body) != "hello" {
					poisoned.Add(1)
				}
			}
		})
	}
	callers.Wait()
	t.Logf("%d of 4000 calls failed", failed.Load())
	if n := poisoned.Load(); n > 0 {
		t.Errorf("%d of 4000 calls got what was left of another's answer", n)
	}
}
