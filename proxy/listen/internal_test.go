package listen

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"io"
	"math"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/net/http2"
)

func TestConnectionLimitFollowsOpenFiles(t *testing.T) {
	for _, c := range []struct {
		want  int
		files uint64
		limit int
	}{
		{10_000, 1 << 20, 10_000},
		{10_000, 20_000, 9_968},
		{10_000, 1024, 480},
		{10_000, 256, 96},
		{10_000, 64, 1},
		{10_000, 10, 1},
		{10_000, math.MaxUint64, 10_000},
		{50, 256, 50},
		{0, 256, 96},
		{0, math.MaxUint64, 0},
		{-1, math.MaxUint64, 0},
	} {
		if got := connectionLimit(c.want, c.files); got != c.limit {
			t.Errorf("connectionLimit(%d, %d) = %d, want %d", c.want, c.files, got, c.limit)
		}
	}
}

// own is a certificate signed by itself, and its PEM file.
func own(t testing.TB) (pair tls.Certificate, file string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), DNSNames: []string{"guard.contoso.example"},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	text := append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})...)
	file = filepath.Join(t.TempDir(), "own.pem")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	if pair, err = tls.X509KeyPair(text, text); err != nil {
		t.Fatal(err)
	}
	return pair, file
}

// A certificate authority that validates has no certificate of ours to show. What
// lets it in must let nobody else.
func TestAValidationNeedsNoClientCertificateAndGetsNoHTTP(t *testing.T) {
	pair, file := own(t)
	loaded, err := LoadTLS(TLSConfig{Certificate: file, Key: file})
	if err != nil {
		t.Fatal(err)
	}
	c, err := loadClientsOf(pair)
	if err != nil {
		t.Fatal(err)
	}
	loaded.clients, loaded.serve.ClientCAs, loaded.serve.ClientAuth = c, c.pool, tls.RequireAndVerifyClientCert
	loaded.challenge = &tls.Config{Certificates: []tls.Certificate{pair}, NextProtos: []string{challengeProtocol}, SessionTicketsDisabled: true}
	s, err := Open(Config{Name: "tls", Address: "127.0.0.1:0", TLS: loaded, Handler: http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		t.Error("a validation was served as a call")
	})})
	if err != nil {
		t.Fatal(err)
	}
	s.Serve()
	defer s.Shutdown(context.Background())
	for _, protocols := range [][]string{{challengeProtocol}, {challengeProtocol, "http/1.1"}, {"http/1.1"}, nil} {
		conn, err := tls.Dial("tcp", s.Address().String(), &tls.Config{InsecureSkipVerify: true, NextProtos: protocols})
		if err == nil {
			io.WriteString(conn, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
			_, err = io.ReadAll(conn)
			conn.Close()
		}
		if validation := len(protocols) == 1 && protocols[0] == challengeProtocol; validation != (err == nil) {
			t.Errorf("offered %q: %v", protocols, err)
		}
	}
}

func loadClientsOf(pair tls.Certificate) (*clients, error) {
	c := &clients{pool: x509.NewCertPool(), now: time.Now}
	c.pool.AddCert(pair.Leaf)
	return c, nil
}

// BenchmarkCarry is what each request costs here, beyond net/http and the handler.
func BenchmarkCarry(b *testing.B) {
	pair, _ := own(b)
	asked, err := loadClientsOf(pair)
	if err != nil {
		b.Fatal(err)
	}
	nothing := http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})
	for name, now := range map[string]*current{"clear text": nil, "TLS": {tls: &TLS{}}, "client certificate": {tls: &TLS{}, clients: asked}} {
		b.Run(name, func(b *testing.B) {
			s := &Server{idle: make(chan struct{}, 1), http: &http.Server{}}
			c := &conn{}
			if now != nil {
				s.current.Store(now)
				c.tls = &tls.ConnectionState{}
				if now.clients != nil {
					c.tls.PeerCertificates = []*x509.Certificate{pair.Leaf}
				}
			}
			h := s.carry(nothing)
			w := httptest.NewRecorder()
			r := httptest.NewRequest(http.MethodGet, "/v1/customers", nil)
			r = r.WithContext(context.WithValue(r.Context(), connKey{}, c))
			b.ReportAllocs()
			for b.Loop() {
				h.ServeHTTP(w, r)
			}
		})
	}
}

// Frames are found however the bytes of a connection are cut.
func TestFramesAreFound(t *testing.T) {
	var sent bytes.Buffer
	sent.WriteString(http2.ClientPreface)
	w := http2.NewFramer(&sent, nil)
	w.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 20})
	w.WriteData(1, false, nil)
	w.WriteData(1, false, make([]byte, 16<<10))
	w.WritePing(false, [8]byte{})
	w.WriteDataPadded(1, true, []byte("x"), make([]byte, 7))
	type frame struct {
		kind   byte
		length int
	}
	want := []frame{{0x4, 6}, {0x0, 0}, {0x0, 16 << 10}, {0x6, 8}, {0x0, 1 + 1 + 7}}
	for size := 1; size <= sent.Len(); size = size*3/2 + 1 {
		f := frames{skip: http2Preface}
		var got []frame
		for part := range slices.Chunk(sent.Bytes(), size) {
			for {
				kind, length, ok := f.next(&part)
				if !ok {
					break
				}
				got = append(got, frame{kind, length})
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("in parts of %d bytes: %v, want %v", size, got, want)
		}
	}
}
