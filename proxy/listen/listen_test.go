package listen_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

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

// certificate writes a throw-away certificate for 127.0.0.1 and its key.
func certificate(t *testing.T) (cert, key string, pool *x509.CertPool) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &k.PublicKey, k)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	write := func(name, kind string, der []byte) string {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	parsed, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool = x509.NewCertPool()
	pool.AddCert(parsed)
	return write("cert.pem", "CERTIFICATE", der), write("key.pem", "PRIVATE KEY", keyDER), pool
}

func TestACertificateServesBothVersionsOfHTTP(t *testing.T) {
	cert, key, pool := certificate(t)
	s := open(t, listen.Config{Name: "tls", Certificate: cert, Key: key, Handler: http.HandlerFunc(proto)})
	for _, http2 := range []bool{false, true} {
		client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}, ForceAttemptHTTP2: http2}}
		res, err := client.Get("https://" + s.Address().String() + "/v1/x")
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(res.Body)
		res.Body.Close()
		want := map[bool]string{false: "HTTP/1.1 /v1/x", true: "HTTP/2.0 /v1/x"}[http2]
		if string(body) != want {
			t.Errorf("served %q, want %q", body, want)
		}
		client.CloseIdleConnections()
	}
	old := &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11}
	if c, err := tls.Dial("tcp", s.Address().String(), old); err == nil {
		c.Close()
		t.Error("TLS 1.1 was accepted")
	}
}

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
	cert, _, _ := certificate(t)
	for name, cfg := range map[string]listen.Config{
		"a port in use":                        {Address: s.Address().String()},
		"a certificate file that is not there": {Address: "127.0.0.1:0", Certificate: "none.pem", Key: "none.key"},
		"a key that is none":                   {Address: "127.0.0.1:0", Certificate: cert, Key: cert},
	} {
		cfg.Name, cfg.Handler = "second", http.HandlerFunc(proto)
		if _, err := listen.Open(cfg); err == nil || !strings.Contains(err.Error(), "second") {
			t.Errorf("%s: %v, want an error that names the listener", name, err)
		}
	}
}
