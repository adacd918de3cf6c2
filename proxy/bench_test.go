package proxy_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/partnerguard/partnerguard/policy"
	"github.com/partnerguard/partnerguard/proxy"
)

// nothing is a ledger and an observer that cost nothing.
type nothing struct{}

func (nothing) Decide(*proxy.Record) error                    { return nil }
func (nothing) Finish(*proxy.Record) error                    { return nil }
func (nothing) Observe(context.Context, *proxy.Record, error) {}

// The guard's own path of a call, without verifier, ledger and telemetry, beside a
// bare ReverseProxy. internal/bench measures the whole.
func BenchmarkCall(b *testing.B) {
	upstream := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		h := w.Header()
		h.Set("Content-Type", "application/json; charset=utf-8")
		h.Set("MS-RequestId", "6c583d8d-46cd-420c-ae3d-000000000001")
		h.Set("MS-CorrelationId", "6c583d8d-46cd-420c-ae3d-000000000002")
		io.WriteString(w, strings.Repeat("x", 2000))
	}))
	defer upstream.Close()
	target, err := url.Parse(upstream.URL)
	if err != nil {
		b.Fatal(err)
	}
	bare := &httputil.ReverseProxy{
		Rewrite:   func(pr *httputil.ProxyRequest) { pr.SetURL(target) },
		Transport: &http.Transport{MaxIdleConnsPerHost: 512, DisableCompression: true},
	}
	p, err := policy.New(policy.Config{Mode: policy.Enforce, Tenants: []string{tenant}})
	if err != nil {
		b.Fatal(err)
	}
	up, err := proxy.NewUpstream(proxy.UpstreamConfig{Name: "u", URL: upstream.URL, Audiences: []string{"a"}, ValidatesMFA: true})
	if err != nil {
		b.Fatal(err)
	}
	g, err := proxy.New(proxy.Config{Ledger: nothing{}, Observer: nothing{}, Settings: proxy.Settings{
		Policy: p, Verifier: known, Upstreams: []*proxy.Upstream{up}, ValidateMFA: proxy.ValidateReads,
		Listeners: []proxy.Listener{{Name: "l", Upstream: "u"}}, BodyTimeout: time.Minute,
	}})
	if err != nil {
		b.Fatal(err)
	}
	guard := g.Handler("l")
	for _, row := range []struct {
		name string
		h    http.Handler
	}{{"bare", bare}, {"guard", guard}} {
		b.Run(row.name, func(b *testing.B) {
			s := httptest.NewServer(row.h)
			defer s.Close()
			c, err := net.Dial("tcp", s.Listener.Addr().String())
			if err != nil {
				b.Fatal(err)
			}
			defer c.Close()
			request := fmt.Appendf(nil, "GET /v1/customers/5f0f4d5c-0000-4000-8000-000000000001/subscriptions?size=20 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer mfa\r\n"+
				"Accept: application/json\r\nUser-Agent: bench/1\r\nMS-RequestId: 6c583d8d-46cd-420c-ae3d-000000000001\r\nMS-CorrelationId: 6c583d8d-46cd-420c-ae3d-000000000002\r\n\r\n")
			r := bufio.NewReader(c)
			b.ReportAllocs()
			for b.Loop() {
				if _, err := c.Write(request); err != nil {
					b.Fatal(err)
				}
				res, err := http.ReadResponse(r, nil)
				if err != nil || res.StatusCode != http.StatusOK {
					b.Fatal(res, err)
				}
				io.Copy(io.Discard, res.Body)
			}
		})
	}
}
