package emulator

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"runtime"
	"strings"
	"testing"
	"time"
)

func startHostile(t *testing.T, cfg HostileConfig) *Hostile {
	t.Helper()
	h, err := StartHostile(cfg)
	if err != nil {
		t.Fatalf("StartHostile: %v", err)
	}
	t.Cleanup(func() {
		if err := h.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return h
}

// victimTransport is net/http's client with bounds.
func victimTransport(t *testing.T, h *Hostile) *http.Transport {
	t.Helper()
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(h.CAPEM())
	patience := 10 * time.Second
	switch h.cfg.Attack {
	case SlowHeaders, HTTP2SettingsFlood:
		patience = 500 * time.Millisecond
	}
	transport := &http.Transport{
		DisableCompression:     true,
		ForceAttemptHTTP2:      h.cfg.Attack.HTTP2(),
		TLSClientConfig:        &tls.Config{RootCAs: pool},
		MaxResponseHeaderBytes: 64 << 10,
		ResponseHeaderTimeout:  patience,
	}
	t.Cleanup(transport.CloseIdleConnections)
	return transport
}

// meet makes one request and reads the answer to its end.
func meet(ctx context.Context, transport *http.Transport, h *Hostile) (*http.Response, []byte, error) {
	r, err := http.NewRequestWithContext(ctx, "GET", h.URL()+"/v1/customers", nil)
	if err != nil {
		return nil, nil, err
	}
	res, err := transport.RoundTrip(r)
	if err != nil {
		return nil, nil, err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(io.LimitReader(res.Body, 1<<20))
	return res, b, err
}

func TestAttacksBreakTheTransfer(t *testing.T) {
	for _, attack := range []Attack{
		EndlessHeaders, InterimFlood, SlowHeaders, LengthTooLong, TwoLengths, BadChunk, ResetMidBody,
		HTTP2BadSettings, HTTP2ContinuationFlood, HTTP2GoAway, HTTP2SettingsFlood, HTTP2EndlessDataPadding,
	} {
		for _, secure := range []bool{false, true} {
			if attack.HTTP2() && !secure {
				continue
			}
			t.Run(attack.String()+map[bool]string{true: " over TLS"}[secure], func(t *testing.T) {
				h := startHostile(t, HostileConfig{Attack: attack, TLS: secure, Interval: 10 * time.Millisecond})
				ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
				defer cancel()
				res, body, err := meet(ctx, victimTransport(t, h), h)
				if err == nil {
					t.Errorf("answer = %v %q, want an error", res, body)
				}
				if attack != HTTP2BadSettings { // the client may see that before its request goes out
					if err := h.Wait(soon(t), 1); err != nil {
						t.Errorf("no request was read: %v", err)
					}
				}
				if attack == LengthTooLong && !errors.Is(err, io.ErrUnexpectedEOF) {
					t.Errorf("error = %v, want an unexpected EOF", err)
				}
				if attack == HTTP2GoAway && h.Connections() < 2 {
					t.Errorf("%d connections, want those of further tries", h.Connections())
				}
			})
		}
	}
}

func TestLengthTooShortLeavesAnAnswerBehind(t *testing.T) {
	h := startHostile(t, HostileConfig{Attack: LengthTooShort})
	conn, in := dialHostile(t, h)
	defer conn.Close()
	for _, want := range []string{`{"totalCount":0}`, `{"injected": "true"}`} {
		if want == `{"totalCount":0}` {
			io.WriteString(conn, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
		}
		res, err := http.ReadResponse(in, nil)
		if err != nil {
			t.Fatal(err)
		}
		if b, err := io.ReadAll(res.Body); err != nil || string(b) != want {
			t.Errorf("body = %s, %v; want %s", b, err, want)
		}
	}
	if n := len(h.Requests()); n != 1 {
		t.Errorf("%d requests, want 1", n)
	}
}

func dialHostile(t *testing.T, h *Hostile) (net.Conn, *bufio.Reader) {
	t.Helper()
	conn, err := net.Dial("tcp", h.socket.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	return conn, bufio.NewReader(conn)
}

func TestReusedConnectionEndsUnderTheSecondRequest(t *testing.T) {
	h := startHostile(t, HostileConfig{Attack: CloseReused})
	conn, in := dialHostile(t, h)
	defer conn.Close()
	const request = "POST /v1/orders HTTP/1.1\r\nHost: x\r\nIdempotency-Key: 1\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\nabc"
	io.WriteString(conn, request)
	res, err := http.ReadResponse(in, nil)
	if err != nil || res.StatusCode != 100 {
		t.Fatalf("answer = %v, %v; want 100", res, err)
	}
	if res, err = http.ReadResponse(in, nil); err != nil || res.StatusCode != 200 {
		t.Fatalf("answer = %v, %v; want 200", res, err)
	}
	io.Copy(io.Discard, res.Body)
	io.WriteString(conn, request)
	if rest, err := io.ReadAll(in); err != nil || string(rest) != "HTTP/1.1 100 Continue\r\n\r\n" {
		t.Errorf("then %q, %v; want the end", rest, err)
	}
	requests := h.Requests()
	if len(requests) != 2 {
		t.Fatalf("%d requests, want 2", len(requests))
	}
	for _, r := range requests {
		if r.Connection != 1 || r.Method != "POST" || r.Target != "/v1/orders" || r.BodyBytes != 3 || r.Header.Get("Idempotency-Key") != "1" {
			t.Errorf("request = %+v", r)
		}
	}
	if h.Connections() != 1 {
		t.Errorf("%d connections, want 1", h.Connections())
	}
}

func TestSwitchingProtocolsUnasked(t *testing.T) {
	h := startHostile(t, HostileConfig{Attack: SwitchingProtocols})
	conn, in := dialHostile(t, h)
	defer conn.Close()
	io.WriteString(conn, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	if line, err := in.ReadString('\n'); err != nil || line != "HTTP/1.1 101 Switching Protocols\r\n" {
		t.Errorf("status line = %q, %v", line, err)
	}
}

func TestExpiredCertificateIsRefused(t *testing.T) {
	h := startHostile(t, HostileConfig{Attack: ExpiredCertificate})
	transport := victimTransport(t, h)
	_, _, err := meet(soon(t), transport, h)
	var invalid x509.CertificateInvalidError
	if !errors.As(err, &invalid) || invalid.Reason != x509.Expired {
		t.Errorf("error = %v, want an expired certificate", err)
	}
	if n := len(h.Requests()); n != 0 {
		t.Errorf("%d requests, want none", n)
	}
	transport.TLSClientConfig.InsecureSkipVerify = true
	if res, _, err := meet(soon(t), transport.Clone(), h); err != nil || res.StatusCode != 200 {
		t.Errorf("who does not check gets %v, %v; want 200", res, err)
	}
}

func TestBombUnpacksToJSON(t *testing.T) {
	h := startHostile(t, HostileConfig{Attack: DecompressionBomb})
	r, _ := http.NewRequestWithContext(t.Context(), "GET", h.URL(), nil)
	res, err := victimTransport(t, h).RoundTrip(r)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	n, err := io.Copy(io.Discard, res.Body)
	if err != nil || res.StatusCode != 401 || res.Header.Get("Content-Encoding") != "gzip" || n != res.ContentLength {
		t.Errorf("answer = %d %v, %d bytes, %v", res.StatusCode, res.Header, n, err)
	}
	if n < 9<<20 || n > 12<<20 {
		t.Errorf("%d bytes, want about 10 MB", n)
	}
	if unpacked := int64(bombRepeats) * bombBlocks * bombBlock; unpacked != 10<<30 {
		t.Errorf("unpacks to %d bytes, want 10 GiB", unpacked)
	}
	// The same with the member in the middle once.
	b := newBomb()
	unzip, err := gzip.NewReader(bytes.NewReader(bytes.Join([][]byte{b.first, b.middle, b.last}, nil)))
	if err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(unzip)
	if err != nil {
		t.Fatal(err)
	}
	var body struct{ Description, Code string }
	if err := json.Unmarshal(text, &body); err != nil || body.Code != "900421" || len(body.Description) != bombBlock*bombBlocks {
		t.Errorf("code %q, description of %d bytes, %v", body.Code, len(body.Description), err)
	}
}

// A client that never reads must not keep a Hostile from ending.
func TestCloseEndsEveryAttack(t *testing.T) {
	for _, attack := range Attacks() {
		t.Run(attack.String(), func(t *testing.T) {
			h, err := StartHostile(HostileConfig{Attack: attack})
			if err != nil {
				t.Fatal(err)
			}
			conn, _ := dialHostile(t, h)
			defer conn.Close()
			if h.CAPEM() == nil {
				io.WriteString(conn, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
			} else {
				secure := tls.Client(conn, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
				if attack.HTTP2() {
					io.WriteString(secure, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"+http2Frame(frameSettings, 0, 0, "")+
						http2Frame(frameHeaders, flagEndHeaders|1, 1, "\x82\x84\x86\x41\x01x"))
				} else {
					io.WriteString(secure, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
				}
			}
			if err := h.Wait(soon(t), 1); err != nil && attack != ExpiredCertificate {
				t.Errorf("no request was read: %v", err)
			}
			// The attack begins after that.
			for ctx := soon(t); h.Written() == 0 && attack != ExpiredCertificate && ctx.Err() == nil; {
				runtime.Gosched()
			}
			closed := make(chan error, 1)
			go func() { closed <- h.Close() }()
			select {
			case err := <-closed:
				if err != nil {
					t.Errorf("Close: %v", err)
				}
			case <-soon(t).Done():
				t.Fatal("Close hangs")
			}
			if h.Written() == 0 && attack != ExpiredCertificate {
				t.Error("nothing was counted as written")
			}
		})
	}
}

func TestAttacksAreNamed(t *testing.T) {
	seen := map[string]bool{}
	for _, a := range Attacks() {
		if seen[a.String()] || strings.HasPrefix(a.String(), "Attack(") {
			t.Errorf("%d is named %q", a, a)
		}
		seen[a.String()] = true
	}
	if _, err := StartHostile(HostileConfig{Attack: 99}); err == nil {
		t.Error("an unknown attack was started")
	}
}
