package listen_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/partnerguard/partnerguard/proxy/listen"
)

func dialPlain(s *listen.Server) (net.Conn, error) {
	c, err := net.Dial("tcp", s.Address().String())
	if err == nil {
		c.SetDeadline(time.Now().Add(30 * time.Second))
	}
	return c, err
}

func TestAConnectionOverTheLimitIsClosedAtOnce(t *testing.T) {
	cert, key, roots := certificate(t)
	for _, encrypted := range []bool{false, true} {
		refused := make(chan struct{}, 10)
		cfg := listen.Config{Name: "limited", MaxConnections: 2, Handler: http.HandlerFunc(proto), Refused: func() { refused <- struct{}{} }}
		url := "http://"
		if encrypted {
			cfg.TLS, url = load(t, listen.TLSConfig{Certificate: cert, Key: key}), "https://"
		}
		s := open(t, cfg)
		url += s.Address().String()
		first, second := client(t, roots, false), client(t, roots, false)
		call(t, first, url)
		call(t, second, url)
		for range 3 {
			if c, err := dialPlain(s); err == nil { // else it was reset at once
				if _, err := c.Read(make([]byte, 1)); err == nil {
					t.Error("a third connection is served")
				}
				c.Close()
			}
			<-refused
		}
		call(t, first, url) // those that are in stay in
		first.CloseIdleConnections()
		eventually(t, "there is room again", func() bool {
			res, err := client(t, roots, false).Get(url)
			if err == nil {
				res.Body.Close()
			}
			return err == nil
		})
	}
}

func TestHeadersOfHTTP1AreBounded(t *testing.T) {
	unparsed := make(chan struct{}, 1)
	s := open(t, listen.Config{Name: "plain", MaxHeaderBytes: 8 << 10, Handler: http.HandlerFunc(proto), Unparsed: func() { unparsed <- struct{}{} }})
	for size, want := range map[int]string{6 << 10: "HTTP/1.1 200", 1 << 20: "HTTP/1.1 431"} {
		c, err := dialPlain(s)
		if err != nil {
			t.Fatal(err)
		}
		go io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nA: "+strings.Repeat("a", size)+"\r\n\r\n")
		answer := make([]byte, len(want))
		io.ReadFull(c, answer)
		c.Close()
		if string(answer) != want {
			t.Errorf("%d bytes of headers got %q, want %q", size, answer, want)
		}
	}
	<-unparsed
}

// Thousands of clients send their headers a byte at a time, and never end them.
func TestSlowHeadersKeepNobodyOut(t *testing.T) {
	const deadline = 4 * time.Second
	// Both ends of each connection are this process's.
	n := min(5000, listen.ConnectionLimit(5000))
	if n < 5000 {
		t.Logf("the limit of open files allows %d slow clients only", n)
	}
	var unparsed atomic.Int64
	s := open(t, listen.Config{Name: "plain", ReadHeaderTimeout: deadline, Handler: http.HandlerFunc(proto), Unparsed: func() { unparsed.Add(1) }})
	url := "http://" + s.Address().String()

	other := client(t, nil, false)
	get := func() time.Duration {
		start := time.Now()
		res, err := other.Get(url)
		if err != nil {
			t.Errorf("another client's call failed: %v", err)
			return 0
		}
		res.Body.Close()
		return time.Since(start)
	}
	calm := make([]time.Duration, 0, 5000)
	for range 5000 {
		calm = append(calm, get())
	}
	conns := make([]net.Conn, 0, n)
	for range n {
		c, err := dialPlain(s)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		conns = append(conns, c)
	}
	ctx, stop := context.WithCancel(t.Context())
	var dripping sync.WaitGroup
	dripping.Go(func() {
		text := "GET / HTTP/1.1\r\nHost: x\r\nX: " + strings.Repeat("x", 1000)
		for i := 0; ctx.Err() == nil && i < len(text); i++ {
			for _, c := range conns {
				c.Write([]byte{text[i]})
			}
			select {
			case <-ctx.Done():
			case <-time.After(200 * time.Millisecond):
			}
		}
	})
	// The others go on.
	var waits []time.Duration
	var calling sync.WaitGroup
	calling.Go(func() {
		for ctx.Err() == nil && !t.Failed() {
			waits = append(waits, get())
		}
	})
	start := time.Now()
	for _, c := range conns {
		if _, err := io.Copy(io.Discard, c); err != nil && strings.Contains(err.Error(), "timeout") {
			t.Error("a slow connection is still open")
			break
		}
	}
	took := time.Since(start)
	stop()
	dripping.Wait()
	calling.Wait()
	if took > deadline+10*time.Second {
		t.Errorf("the last slow connection ended after %v, want %v", took, deadline)
	}
	if len(waits) < 100 {
		t.Fatalf("only %d calls of others in %v", len(waits), took)
	}
	if p99 := percentile(waits, 99); p99 > time.Second {
		t.Errorf("others' p99 is %v", p99)
	}
	s.Shutdown(context.Background())
	if got := int(unparsed.Load()); got != n {
		t.Errorf("%d requests counted that never ended, want %d", got, n)
	}
	t.Logf("%d slow clients, closed within %v; others' calls: %s", n, took.Round(time.Millisecond), compare(calm, waits))
}

// percentile returns the p-th percentile of waits.
func percentile(waits []time.Duration, p int) time.Duration {
	return slices.Sorted(slices.Values(waits))[len(waits)*p/100]
}

// compare says how long the calls of others took before an attack and beside it. It is
// told and not judged: attacker, client and server share the processors of this machine.
func compare(calm, attacked []time.Duration) string {
	p50, p99 := percentile(attacked, 50), percentile(attacked, 99)
	return fmt.Sprintf("%d, median %v (%.1f × calm), p99 %v (%.1f × calm)", len(attacked),
		p50, float64(p50)/float64(percentile(calm, 50)), p99, float64(p99)/float64(percentile(calm, 99)))
}

func TestASlowHandshakeEnds(t *testing.T) {
	cert, key, _ := certificate(t)
	s := open(t, listen.Config{Name: "tls", TLS: load(t, listen.TLSConfig{Certificate: cert, Key: key}), ReadHeaderTimeout: time.Second, Handler: http.HandlerFunc(proto)})
	c, err := dialPlain(s)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	io.WriteString(c, "\x16\x03\x01")
	c.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.Copy(io.Discard, c); err != nil && strings.Contains(err.Error(), "timeout") {
		t.Error("the connection goes on")
	}
}
