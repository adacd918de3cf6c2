package proxy_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/partnerguard/partnerguard/policy"
	"github.com/partnerguard/partnerguard/proxy"
)

// gate is an upstream that holds calls to /hold until it is opened.
type gate struct {
	arrived chan string
	open    chan struct{}
}

func newGate() *gate { return &gate{arrived: make(chan string, 1000), open: make(chan struct{})} }

func (g *gate) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if strings.HasPrefix(r.URL.Path, "/hold") {
		g.arrived <- r.URL.Path
		select {
		case <-g.open:
		case <-r.Context().Done():
		}
	}
	io.WriteString(w, "ok")
}

func get(t *testing.T, url, token string, headers ...string) *http.Response {
	t.Helper()
	r, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Authorization", "Bearer "+token)
	for _, h := range headers {
		name, value, _ := strings.Cut(h, ": ")
		if name == "Host" {
			r.Host = value
		}
		r.Header.Set(name, value)
	}
	res, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	io.Copy(io.Discard, res.Body)
	res.Body.Close()
	return res
}

func TestCallsEndByTheSettingsTheyBeganWith(t *testing.T) {
	up := newGate()
	r := newRig(t, up)
	held := make(chan *http.Response)
	go func() { held <- get(t, r.guard.URL+"/hold", "nomfa") }()
	<-up.arrived

	strict := r.settings
	strict.Generation = 2
	var err error
	if strict.Policy, err = policy.New(policy.Config{Mode: policy.Enforce, Tenants: []string{tenant}}); err != nil {
		t.Fatal(err)
	}
	ended, err := r.swap(strict)
	if err != nil {
		t.Fatal(err)
	}
	if res := get(t, r.guard.URL+"/v1/x", "nomfa"); res.StatusCode != 401 {
		t.Errorf("the call after the swap got %d, want 401", res.StatusCode)
	}
	if rec := r.next(t); rec.Generation != 2 || rec.Mode != policy.Enforce {
		t.Errorf("the call after the swap is recorded with generation %d, mode %v", rec.Generation, rec.Mode)
	}
	select {
	case <-ended:
		t.Error("the old settings ended while a call used them")
	default:
	}
	close(up.open)
	if res := <-held; res.StatusCode != 200 {
		t.Errorf("the call in flight got %d, want 200", res.StatusCode)
	}
	if rec := r.next(t); rec.Generation != 1 || rec.Mode != policy.Audit {
		t.Errorf("the call in flight is recorded with generation %d, mode %v", rec.Generation, rec.Mode)
	}
	select {
	case <-ended:
	case <-time.After(10 * time.Second):
		t.Error("the old settings did not end with their last call")
	}
}

func TestSwapsUnderLoadEndEverySettings(t *testing.T) {
	r := newRig(t, newGate())
	stop := make(chan struct{})
	var load sync.WaitGroup
	for range 4 {
		load.Go(func() {
			for {
				select {
				case <-stop:
					return
				case <-r.finished:
				default:
					if res := get(t, r.guard.URL+"/v1/x", "mfa"); res.StatusCode != 200 {
						t.Errorf("a call got %d", res.StatusCode)
					}
				}
			}
		})
	}
	var all []<-chan struct{}
	for i := range 500 {
		next := r.settings
		next.Generation = uint64(i + 2)
		ended, err := r.swap(next)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, ended)
	}
	close(stop)
	load.Wait()
	for i, ended := range all {
		select {
		case <-ended:
		case <-time.After(10 * time.Second):
			t.Fatalf("generation %d did not end", i+1)
		}
	}
}

func TestBadSettingsChangeNothing(t *testing.T) {
	r := newRig(t, newGate())
	bad := r.settings
	bad.Listeners = []proxy.Listener{{Name: "main", Upstream: "graph"}}
	if _, err := r.swap(bad); err == nil || !strings.Contains(err.Error(), `"graph"`) {
		t.Errorf("Swap = %v, want an error that names the upstream", err)
	}
	if res := get(t, r.guard.URL+"/v1/x", "mfa"); res.StatusCode != 200 {
		t.Errorf("then a call got %d", res.StatusCode)
	}
}

func TestAHostHeaderChoosesAnUpstreamByExactName(t *testing.T) {
	graph := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "graph "+r.Host) }))
	defer graph.Close()
	r := newRig(t, newGate())
	up, err := proxy.NewUpstream(proxy.UpstreamConfig{
		Name: "graph", URL: "http://graph.test", Dial: graph.Listener.Addr().String(),
		Audiences: []string{"https://graph.microsoft.com"},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer up.Close()
	both := r.settings
	both.Upstreams = append([]*proxy.Upstream{up}, both.Upstreams...)
	both.Hosts = map[string]string{"graph.test": "graph", "graph.guard.contoso.example": "graph"}
	if _, err := r.swap(both); err != nil {
		t.Fatal(err)
	}
	for host, want := range map[string]string{
		"graph.test": "graph", "GRAPH.test:8443": "graph", "graph.guard.contoso.example": "graph",
		"127.0.0.1": "partner-center", "evil.graph.test": "partner-center", "graph.test.evil": "partner-center", "unknown.example": "partner-center",
	} {
		get(t, r.guard.URL+"/v1/x", "mfa", "Host: "+host)
		if rec := r.next(t); rec.Upstream != want {
			t.Errorf("Host %s leads to %s, want %s", host, rec.Upstream, want)
		}
	}
}

func TestOneIntegrationCannotTakeMoreThanItsCalls(t *testing.T) {
	up := newGate()
	r := newRig(t, up, func(p *policy.Config, g *proxy.Config, _ *proxy.UpstreamConfig, _ *proxy.Listener) {
		p.Integrations[0].Match.AppID = []string{"7d1f0a52-9b3c-4c1e-8f60-2a5b9c0d1e11"}
		g.Settings.MaxCallsOf = map[string]int{"billing": 2}
	})
	var held sync.WaitGroup
	for i := range 2 {
		held.Go(func() { get(t, fmt.Sprintf("%s/hold/%d", r.guard.URL, i), "mfa") })
		<-up.arrived
	}
	res := get(t, r.guard.URL+"/v1/x", "mfa")
	rec := r.next(t)
	if res.StatusCode != 429 || res.Header.Get("Retry-After") != "1" || rec.Reason != policy.ReasonLimitExceeded || rec.Effect != policy.Reject || !rec.WouldReject {
		t.Errorf("the third call at a time got %d %v, recorded as %s %s", res.StatusCode, res.Header, rec.Effect, rec.Reason)
	}
	// Who only claims to be billing neither uses up its calls nor is stopped by them.
	if res := get(t, r.guard.URL+"/i/billing/v1/x", "opaque"); res.StatusCode != 200 {
		t.Errorf("a caller that only claims the name got %d, want 200", res.StatusCode)
	}
	r.next(t)
	close(up.open)
	held.Wait()
	r.next(t)
	r.next(t)
	if res := get(t, r.guard.URL+"/v1/x", "mfa"); res.StatusCode != 200 {
		t.Errorf("after the others ended a call got %d, want 200", res.StatusCode)
	}
}

func TestATransferInWhichNothingMovesEnds(t *testing.T) {
	quick := func(_ *policy.Config, g *proxy.Config, _ *proxy.UpstreamConfig, _ *proxy.Listener) {
		g.Settings.BodyTimeout = 200 * time.Millisecond
	}
	t.Run("the client stops sending", func(t *testing.T) {
		r := newRig(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if _, err := io.Copy(io.Discard, r.Body); err == nil {
				t.Error("the upstream saw a whole body")
			}
		}), quick)
		c, err := net.Dial("tcp", r.guard.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		io.WriteString(c, "POST /v1/orders HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer mfa\r\nContent-Length: 100\r\n\r\nhalf")
		if rest, _ := io.ReadAll(c); strings.Contains(string(rest), "200 OK") {
			t.Errorf("the client got %q", rest)
		}
		if rec := r.next(t); rec.Error != "client_stalled" || rec.BytesIn != 4 {
			t.Errorf("recorded %q after %d bytes", rec.Error, rec.BytesIn)
		}
	})
	t.Run("the client stops reading", func(t *testing.T) {
		r := newRig(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			for range 1000 {
				if _, err := w.Write(make([]byte, 64<<10)); err != nil {
					return
				}
			}
		}), quick)
		c, err := net.Dial("tcp", r.guard.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.(*net.TCPConn).SetReadBuffer(4096)
		io.WriteString(c, "GET /v1/x HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer mfa\r\n\r\n")
		if rec := r.next(t); rec.Error != "client_stalled" || rec.BytesOut >= 1000*64<<10 {
			t.Errorf("recorded %q after %d bytes", rec.Error, rec.BytesOut)
		}
	})
	t.Run("slow is not stalled, and the connection serves on", func(t *testing.T) {
		r := newRig(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			body, _ := io.ReadAll(r.Body)
			w.Write(make([]byte, 40<<10))
			w.(http.Flusher).Flush()
			w.Write(body)
		}), quick)
		c, err := net.Dial("tcp", r.guard.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		br := bufio.NewReader(c)
		tick := time.NewTicker(60 * time.Millisecond)
		defer tick.Stop()
		for range 2 {
			io.WriteString(c, "POST /v1/orders HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer mfa\r\nContent-Length: 8\r\n\r\n")
			for _, b := range "in drips" {
				<-tick.C
				io.WriteString(c, string(b))
			}
			res, err := http.ReadResponse(br, nil)
			if err != nil {
				t.Fatal(err)
			}
			body, err := io.ReadAll(res.Body)
			if err != nil || !strings.HasSuffix(string(body), "in drips") {
				t.Errorf("the answer ends %q, %v", body[max(0, len(body)-8):], err)
			}
			if rec := r.next(t); rec.Error != "" {
				t.Errorf("recorded %q", rec.Error)
			}
			// Idle for longer than the limit: it is for bodies, not for connections.
			for range 5 {
				<-tick.C
			}
		}
	})
}
