package listen_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/partnerguard/partnerguard/proxy/listen"
)

func load(t *testing.T, cfg listen.TLSConfig) *listen.TLS {
	t.Helper()
	loaded, err := listen.LoadTLS(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return loaded
}

func TestACertificateServesBothVersionsOfHTTP(t *testing.T) {
	cert, key, roots := certificate(t)
	s := open(t, listen.Config{Name: "tls", TLS: load(t, listen.TLSConfig{Certificate: cert, Key: key}), Handler: http.HandlerFunc(proto)})
	if !s.TLS() {
		t.Error("TLS() = false")
	}
	for version, http2 := range map[string]bool{"HTTP/1.1": false, "HTTP/2.0": true} {
		if _, got := call(t, client(t, roots, http2), "https://"+s.Address().String()+"/v1/x"); got != version+" /v1/x" {
			t.Errorf("served %q, want %s", got, version)
		}
	}
	old := &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11}
	if c, err := tls.Dial("tcp", s.Address().String(), old); err == nil {
		c.Close()
		t.Error("TLS 1.1 was accepted")
	}
}

// handshake says what a new connection sees.
func handshake(t *testing.T, s *listen.Server, cfg *tls.Config) (tls.ConnectionState, error) {
	t.Helper()
	c, err := tls.Dial("tcp", s.Address().String(), cfg)
	if err != nil {
		return tls.ConnectionState{}, err
	}
	defer c.Close()
	// In TLS 1.3 the server's verdict on a client's certificate, and its session
	// ticket, come after the client's part.
	if _, err = io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"); err == nil {
		_, err = io.ReadAll(c)
	}
	return c.ConnectionState(), err
}

func TestANewCertificateServesTheNextHandshake(t *testing.T) {
	cert1, key1, roots1 := certificate(t)
	cert2, key2, roots2 := certificate(t)
	s := open(t, listen.Config{Name: "tls", TLS: load(t, listen.TLSConfig{Certificate: cert1, Key: key1}), Handler: http.HandlerFunc(proto)})
	url := "https://" + s.Address().String()
	for _, http2 := range []bool{false, true} {
		s.SetTLS(load(t, listen.TLSConfig{Certificate: cert1, Key: key1}))
		c := client(t, roots1, http2)
		call(t, c, url)
		s.SetTLS(load(t, listen.TLSConfig{Certificate: cert2, Key: key2}))
		reused := false
		trace := &httptrace.ClientTrace{GotConn: func(i httptrace.GotConnInfo) { reused = i.Reused }}
		req, _ := http.NewRequestWithContext(httptrace.WithClientTrace(t.Context(), trace), http.MethodGet, url, nil)
		res, err := c.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		if !reused {
			t.Errorf("http2 %v: the connection did not outlive the change", http2)
		}
		if _, err := handshake(t, s, &tls.Config{RootCAs: roots2}); err != nil {
			t.Errorf("with the new certificate: %v", err)
		}
		if _, err := handshake(t, s, &tls.Config{RootCAs: roots1}); err == nil {
			t.Error("the old certificate is still shown")
		}
	}
	s.SetTLS(nil)
	if _, err := handshake(t, s, &tls.Config{RootCAs: roots2}); err != nil {
		t.Errorf("SetTLS(nil) is no change: %v", err)
	}
}

func TestSessionsOutliveAChangeOfCertificate(t *testing.T) {
	cert, key, roots := certificate(t)
	s := open(t, listen.Config{Name: "tls", TLS: load(t, listen.TLSConfig{Certificate: cert, Key: key}), Handler: http.HandlerFunc(proto)})
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		cfg := &tls.Config{RootCAs: roots, ClientSessionCache: tls.NewLRUClientSessionCache(1), MaxVersion: version}
		for i, want := range []bool{false, true} {
			state, err := handshake(t, s, cfg)
			if err != nil {
				t.Fatal(err)
			}
			if state.DidResume != want {
				t.Errorf("%s, handshake %d: resumed %v, want %v", tls.VersionName(version), i, state.DidResume, want)
			}
			s.SetTLS(load(t, listen.TLSConfig{Certificate: cert, Key: key}))
		}
	}
}

func TestWhatCannotBeLoadedIsNamed(t *testing.T) {
	cert, key, _ := certificate(t)
	_, otherKey, _ := certificate(t)
	ca, other := newCA(t, "client CA", nil), newCA(t, "other CA", nil)
	namesake := newCA(t, "client CA", nil) // another key
	rubbish := file(t, []byte("rubbish"))
	none := filepath.Join(t.TempDir(), "none.pem")
	cas := file(t, ca.pem())
	keyText, err := os.ReadFile(key)
	if err != nil {
		t.Fatal(err)
	}
	delta := ca.listOf(&x509.RevocationList{
		Number: serial(t), ThisUpdate: time.Now(), NextUpdate: time.Now().Add(time.Hour),
		ExtraExtensions: critical(2, 5, 29, 27),
	})
	for _, c := range []struct {
		name string
		cfg  listen.TLSConfig
		file string
		want string
	}{
		{"no certificate file", listen.TLSConfig{Certificate: none, Key: key}, none, "no such file"},
		{"no key file", listen.TLSConfig{Certificate: cert, Key: none}, none, "no such file"},
		{"a certificate that is none", listen.TLSConfig{Certificate: rubbish, Key: key}, rubbish, "failed to find any PEM data in certificate input"},
		{"a key that is none", listen.TLSConfig{Certificate: cert, Key: cert}, cert, "private key"},
		{"a key of another certificate", listen.TLSConfig{Certificate: cert, Key: otherKey}, otherKey, "private key does not match"},
		{"no certificate", listen.TLSConfig{}, "", "Certificate and Key, or ACME"},
		{"no CA file", listen.TLSConfig{ClientCA: none}, none, "no such file"},
		{"an empty CA file", listen.TLSConfig{ClientCA: rubbish}, rubbish, "no PEM certificate"},
		{"a private key among the CAs", listen.TLSConfig{ClientCA: file(t, ca.pem(), keyText)}, "file.pem", "PRIVATE KEY"},
		{"lists without CAs", listen.TLSConfig{ClientCRL: file(t, ca.list())}, "", "needs ClientCA"},
		{"no list file", listen.TLSConfig{ClientCA: cas, ClientCRL: none}, none, "no such file"},
		{"a list that is none", listen.TLSConfig{ClientCA: cas, ClientCRL: rubbish}, rubbish, "list 1"},
		{"a list by a stranger", listen.TLSConfig{ClientCA: cas, ClientCRL: file(t, ca.list(), other.list())}, "file.pem", "list 2, of CN=other CA: not one of the client CAs"},
		{"a list that is forged", listen.TLSConfig{ClientCA: cas, ClientCRL: file(t, namesake.list())}, "file.pem", "verification failure"},
		{"a list of changes only", listen.TLSConfig{ClientCA: cas, ClientCRL: file(t, delta)}, "file.pem", "critical extension 2.5.29.27"},
		{"a CA without a list", listen.TLSConfig{ClientCA: file(t, ca.pem(), other.pem()), ClientCRL: file(t, ca.list())}, "file.pem", "no list of CN=other CA"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.cfg.Certificate == "" && c.cfg.Key == "" && c.name != "no certificate" {
				c.cfg.Certificate, c.cfg.Key = cert, key
			}
			_, err := listen.LoadTLS(c.cfg)
			if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), c.file) {
				t.Errorf("LoadTLS = %v, want %q and %q", err, c.file, c.want)
			}
		})
	}
}

func TestStatusOfCertificates(t *testing.T) {
	cert, key, _ := certificate(t)
	ca, other := newCA(t, "client CA", nil), newCA(t, "another CA", nil)
	until := time.Now().Add(time.Hour).UTC().Truncate(time.Second)
	loaded := load(t, listen.TLSConfig{Certificate: cert, Key: key, ClientCA: file(t, ca.pem(), other.pem()), ClientCRL: file(t,
		ca.listUntil(until, ca.issue("a", nil).Leaf, ca.issue("b", nil).Leaf), other.listUntil(until.Add(time.Hour)))})
	status := loaded.Certificates()
	if len(status) != 1 || !cmp.Equal(status[0].Names, []string{"guard.contoso.example", "127.0.0.1"}) || time.Until(status[0].NotAfter) < 11*time.Hour {
		t.Errorf("Certificates() = %+v", status)
	}
	want := []listen.CRLStatus{{Issuer: "CN=another CA", NextUpdate: until.Add(time.Hour)}, {Issuer: "CN=client CA", NextUpdate: until, Revoked: 2}}
	if diff := cmp.Diff(want, loaded.CRLs()); diff != "" {
		t.Errorf("CRLs() (-want +got):\n%s", diff)
	}
	if none := load(t, listen.TLSConfig{Certificate: cert, Key: key}).CRLs(); none != nil {
		t.Errorf("CRLs() = %v without any", none)
	}
}

// Certificates and client CAs change two hundred times while calls go on, by old
// and by new connections.
func TestManyChangesUnderLoadLeaveNothingBehind(t *testing.T) {
	cert, key, _ := certificate(t)
	cert2, key2, _ := certificate(t)
	ca, other := newCA(t, "client CA", nil), newCA(t, "other CA", nil)
	both := []*listen.TLS{
		load(t, listen.TLSConfig{Certificate: cert, Key: key, ClientCA: file(t, ca.pem())}),
		load(t, listen.TLSConfig{Certificate: cert2, Key: key2, ClientCA: file(t, ca.pem(), other.pem()), ClientCRL: file(t, ca.list(), other.list())}),
	}
	before := runtime.NumGoroutine()
	s, err := listen.Open(listen.Config{Name: "tls", Address: "127.0.0.1:0", TLS: both[0], Handler: http.HandlerFunc(proto)})
	if err != nil {
		t.Fatal(err)
	}
	s.Serve()
	var calls atomic.Int64
	ctx, stop := context.WithCancel(t.Context())
	var users sync.WaitGroup
	identity := ca.issue("billing.contoso.example", nil)
	for i := range 4 {
		// Servers' names are not what this test is about, and their CA changes.
		transport := &http.Transport{ForceAttemptHTTP2: i%2 == 0, TLSClientConfig: &tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{*identity}}}
		c := &http.Client{Transport: transport}
		users.Go(func() {
			defer transport.CloseIdleConnections()
			for n := 0; ctx.Err() == nil; n++ {
				res, err := c.Get("https://" + s.Address().String())
				if err != nil {
					t.Errorf("a call failed: %v", err)
					return
				}
				io.Copy(io.Discard, res.Body)
				res.Body.Close()
				if res.StatusCode != http.StatusOK {
					t.Errorf("a call got %s", res.Status)
				}
				if calls.Add(1); n%5 == 0 {
					transport.CloseIdleConnections()
				}
			}
		})
	}
	for i := range 200 {
		last := calls.Load()
		s.SetTLS(both[i%2])
		eventually(t, "calls go on", func() bool { return calls.Load() > last })
	}
	stop()
	users.Wait()
	if err := s.Shutdown(context.Background()); err != nil {
		t.Errorf("Shutdown = %v", err)
	}
	eventually(t, fmt.Sprintf("%d goroutines again", before), func() bool { return runtime.NumGoroutine() <= before })
}

func TestHandshakesAreNoRequests(t *testing.T) {
	cert, key, roots := certificate(t)
	var unparsed atomic.Int64
	s := open(t, listen.Config{
		Name: "tls", TLS: load(t, listen.TLSConfig{Certificate: cert, Key: key}),
		Handler: http.HandlerFunc(proto), Unparsed: func() { unparsed.Add(1) },
	})
	address := s.Address().String()
	// A handshake that fails, one that is none, one that is abandoned.
	if c, err := tls.Dial("tcp", address, &tls.Config{RootCAs: x509.NewCertPool()}); err == nil {
		c.Close()
		t.Error("an unknown CA was accepted")
	}
	for _, text := range []string{"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "", "\x16\x03\x01"} {
		c, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(c, text)
		c.(*net.TCPConn).CloseWrite()
		io.Copy(io.Discard, c)
		c.Close()
	}
	// Connections that never ask.
	for _, proto := range []string{"h2", "http/1.1"} {
		c, err := tls.Dial("tcp", address, &tls.Config{RootCAs: roots, NextProtos: []string{proto}})
		if err != nil {
			t.Fatal(err)
		}
		if proto == "h2" {
			io.WriteString(c, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")
			if _, err := c.Read(make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
		}
		c.Close()
	}
	for _, http2 := range []bool{false, true} {
		call(t, client(t, roots, http2), "https://"+address)
	}
	s.Shutdown(context.Background())
	if n := unparsed.Load(); n != 0 {
		t.Errorf("%d requests were counted as unparsed, want none", n)
	}
}
