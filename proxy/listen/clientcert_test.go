package listen_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log"
	"math/big"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/partnerguard/partnerguard/proxy/listen"
)

// complaints collects what a server complains of.
type complaints struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (c *complaints) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.buf.Write(p)
}

func (c *complaints) has(text string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return strings.Contains(c.buf.String(), text)
}

// mutual is a server that asks for client certificates.
type mutual struct {
	*listen.Server
	t         *testing.T
	cert, key string
	roots     *x509.CertPool
	log       complaints
	unparsed  atomic.Int64
	served    atomic.Int64
	now       atomic.Pointer[time.Time]
}

func newMutual(t *testing.T, handler http.HandlerFunc, ca string, crl string) *mutual {
	t.Helper()
	m := &mutual{t: t}
	m.cert, m.key, m.roots = certificate(t)
	m.Server = open(t, listen.Config{
		Name: "mutual", TLS: m.load(ca, crl), ErrorLog: log.New(&m.log, "", 0), Unparsed: func() { m.unparsed.Add(1) },
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			m.served.Add(1)
			handler(w, r)
		}),
	})
	return m
}

func (m *mutual) load(ca, crl string) *listen.TLS {
	m.t.Helper()
	return load(m.t, listen.TLSConfig{Certificate: m.cert, Key: m.key, ClientCA: ca, ClientCRL: crl, Now: func() time.Time {
		if now := m.now.Load(); now != nil {
			return *now
		}
		return time.Now()
	}})
}

func (m *mutual) clock(now time.Time) { m.now.Store(&now) }

func who(w http.ResponseWriter, r *http.Request) {
	io.WriteString(w, r.TLS.VerifiedChains[0][0].Subject.CommonName)
}

// get is one call by a new connection.
func (m *mutual) get(http2 bool, certs ...*tls.Certificate) (string, error) {
	m.t.Helper()
	res, err := client(m.t, m.roots, http2, certs...).Get("https://" + m.Address().String())
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	return string(body), err
}

func TestOnlyCertificatesOfTheClientCAArePassed(t *testing.T) {
	root, other := newCA(t, "client CA", nil), newCA(t, "other CA", nil)
	revoked := root.issue("left.contoso.example", nil)
	covered := newCA(t, "covered CA", root)
	uncovered := newCA(t, "uncovered CA", root)
	withdrawn := newCA(t, "withdrawn CA", root)
	cas := file(t, root.pem(), covered.pem(), withdrawn.pem())
	m := newMutual(t, who, cas, file(t,
		root.list(revoked.Leaf, withdrawn.cert), covered.list(), withdrawn.list(), root.listOf(older(), root.cert)))
	name := "billing.contoso.example"
	for _, c := range []struct {
		name string
		cert *tls.Certificate
		log  string // empty: passes
	}{
		{"of the CA", root.issue(name, nil), ""},
		{"of a CA below it that has a list", covered.issue(name, nil, covered), ""},
		{"none", nil, "client didn't provide a certificate"},
		{"of another CA", other.issue(name, nil), "unknown authority"},
		{"of another CA, which is sent along", other.issue(name, nil, other), "unknown authority"},
		{"that names the CA as its issuer without its signature", newCA(t, "client CA", nil).issue(name, nil), "unknown authority"},
		{"for servers", root.issue(name, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }), "incompatible key usage"},
		{"expired", root.issue(name, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }), "expired"},
		{"revoked", revoked, "CN=left.contoso.example, serial number"},
		{"of a CA below it without a list", uncovered.issue(name, nil, uncovered), "there is no revocation list of CN=uncovered CA"},
		{"of a revoked CA below it", withdrawn.issue(name, nil, withdrawn), "CN=withdrawn CA, serial number"},
		{"of a revoked CA that is trusted by name", withdrawn.issue(name, nil), "unknown authority"},
	} {
		t.Run("a certificate "+c.name, func(t *testing.T) {
			for _, http2 := range []bool{false, true} {
				var certs []*tls.Certificate
				if c.cert != nil {
					certs = append(certs, c.cert)
				}
				got, err := m.get(http2, certs...)
				switch {
				case c.log == "" && (err != nil || got != name):
					t.Errorf("http2 %v: served %q, %v", http2, got, err)
				case c.log != "" && err == nil:
					t.Errorf("http2 %v: it was served", http2)
				case c.log != "":
					eventually(t, "the log says "+c.log, func() bool { return m.log.has(c.log) })
				}
			}
		})
	}
}

// older is a list that a newer one of the same CA replaces.
func older() *x509.RevocationList {
	return &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: time.Now().Add(-2 * time.Hour), NextUpdate: time.Now().Add(-time.Hour)}
}

func TestASessionIsNotResumedPastARevocation(t *testing.T) {
	ca := newCA(t, "client CA", nil)
	cas := file(t, ca.pem())
	cert := ca.issue("billing.contoso.example", nil)
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		m := newMutual(t, who, cas, file(t, ca.list()))
		cfg := &tls.Config{RootCAs: m.roots, Certificates: []tls.Certificate{*cert}, ClientSessionCache: tls.NewLRUClientSessionCache(1), MaxVersion: version}
		for _, want := range []bool{false, true} {
			if state, err := handshake(t, m.Server, cfg); err != nil || state.DidResume != want {
				t.Fatalf("%s: resumed %v, %v, want %v", tls.VersionName(version), state.DidResume, err, want)
			}
		}
		m.SetTLS(m.load(cas, file(t, ca.list(cert.Leaf))))
		if _, err := handshake(t, m.Server, cfg); err == nil {
			t.Errorf("%s: the session went on", tls.VersionName(version))
		}
		eventually(t, "the log says why", func() bool { return m.log.has("was revoked on") })
	}
}

func TestAListThatRanOutRefusesAll(t *testing.T) {
	ca := newCA(t, "client CA", nil)
	m := newMutual(t, who, file(t, ca.pem()), file(t, ca.list()))
	cert := ca.issue("billing.contoso.example", nil)
	if _, err := m.get(false, cert); err != nil {
		t.Fatal(err)
	}
	m.clock(time.Now().Add(2 * time.Hour))
	for _, http2 := range []bool{false, true} {
		if _, err := m.get(http2, cert); err == nil {
			t.Error("served without a list that holds")
		}
	}
	eventually(t, "the log says it", func() bool { return m.log.has("the revocation list of CN=client CA ended at") })
	// A new list mends it.
	m.SetTLS(m.load(file(t, ca.pem()), file(t, ca.listUntil(time.Now().Add(5*time.Hour)))))
	if _, err := m.get(false, cert); err != nil {
		t.Errorf("with a new list: %v", err)
	}
}

// withdrawals are what ends a certificate that has a connection open.
func withdrawals(t *testing.T) map[string]func(m *mutual, ca *issuer, cert *tls.Certificate) {
	other := newCA(t, "other CA", nil)
	return map[string]func(m *mutual, ca *issuer, cert *tls.Certificate){
		"it is revoked": func(m *mutual, ca *issuer, cert *tls.Certificate) {
			m.SetTLS(m.load(file(t, ca.pem()), file(t, ca.list(cert.Leaf))))
		},
		"its CA is exchanged": func(m *mutual, ca *issuer, cert *tls.Certificate) {
			m.SetTLS(m.load(file(t, other.pem()), ""))
		},
		"certificates are no longer asked for": func(m *mutual, ca *issuer, cert *tls.Certificate) {
			m.SetTLS(m.load("", ""))
		},
	}
}

func TestAnIdleConnectionEndsWithItsCertificate(t *testing.T) {
	for name, withdraw := range withdrawals(t) {
		t.Run(name, func(t *testing.T) {
			ca := newCA(t, "client CA", nil)
			m := newMutual(t, who, file(t, ca.pem()), "")
			cert := ca.issue("billing.contoso.example", nil)
			c, err := tls.Dial("tcp", m.Address().String(), &tls.Config{RootCAs: m.roots, Certificates: []tls.Certificate{*cert}})
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
			in := bufio.NewReader(c)
			res, err := http.ReadResponse(in, nil)
			if err != nil {
				t.Fatal(err)
			}
			io.Copy(io.Discard, res.Body)
			f := dialHTTP2(t, m.Server, m.roots, cert)
			f.get(1)
			f.await(endOf(1))
			f.WritePing(false, [8]byte{}) // answered after the stream is closed
			f.await(func(fr http2.Frame) bool { return fr.Header().Type == http2.FramePing })

			// A client has its answer a moment before the server calls the connection idle.
			eventually(t, "the idle connection of HTTP/1.1 ends", func() bool {
				withdraw(m, ca, cert)
				c.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
				_, err := in.ReadByte()
				return err != nil && !errors.Is(err, os.ErrDeadlineExceeded)
			})
			withdraw(m, ca, cert)
			f.awaitEnd()
			if n := m.served.Load(); n != 2 {
				t.Errorf("%d calls served, want 2", n)
			}
		})
	}
}

func TestABusyConnectionCarriesNoFurtherCall(t *testing.T) {
	for name, withdraw := range withdrawals(t) {
		t.Run(name, func(t *testing.T) {
			arrived, finish := make(chan struct{}, 2), make(chan struct{})
			ca := newCA(t, "client CA", nil)
			m := newMutual(t, func(w http.ResponseWriter, r *http.Request) {
				arrived <- struct{}{}
				<-finish
				io.WriteString(w, "whole")
			}, file(t, ca.pem()), "")
			cert := ca.issue("billing.contoso.example", nil)
			c, err := tls.Dial("tcp", m.Address().String(), &tls.Config{RootCAs: m.roots, Certificates: []tls.Certificate{*cert}})
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			io.WriteString(c, "GET /1 HTTP/1.1\r\nHost: x\r\n\r\n")
			f := dialHTTP2(t, m.Server, m.roots, cert)
			f.get(1)
			<-arrived
			<-arrived
			withdraw(m, ca, cert)

			// HTTP/2: refused while the first goes on, and the connection ends after it.
			f.get(3)
			f.await(func(fr http2.Frame) bool {
				h, ok := fr.(*http2.MetaHeadersFrame)
				return ok && h.StreamID == 3 && h.PseudoValue("status") == "421"
			})
			close(finish)
			f.await(func(fr http2.Frame) bool {
				d, ok := fr.(*http2.DataFrame)
				return ok && d.StreamID == 1 && string(d.Data()) == "whole"
			})
			f.awaitEnd()

			// HTTP/1.1: the answer comes whole, the next request does not.
			in := bufio.NewReader(c)
			io.WriteString(c, "GET /2 HTTP/1.1\r\nHost: x\r\n\r\n")
			for _, want := range []int{200, 421} {
				res, err := http.ReadResponse(in, nil)
				if err != nil {
					t.Fatal(err)
				}
				body, _ := io.ReadAll(res.Body)
				if res.StatusCode != want || res.Close != (want == 421) {
					t.Errorf("got %s, close %v, want %d:\n%s", res.Status, res.Close, want, body)
				}
			}
			if n := m.served.Load(); n != 2 {
				t.Errorf("%d calls served, want 2", n)
			}
			m.Shutdown(context.Background())
			if n := m.unparsed.Load(); n != 2 {
				t.Errorf("%d requests counted that were no calls, want 2", n)
			}
		})
	}
}

func TestAKeptConnectionEndsWithTime(t *testing.T) {
	ca := newCA(t, "client CA", nil)
	for name, crl := range map[string]string{"the certificate expires": "", "its list runs out": file(t, ca.listUntil(time.Now().Add(13*time.Hour)))} {
		t.Run(name, func(t *testing.T) {
			m := newMutual(t, who, file(t, ca.pem()), crl)
			cert := ca.issue("billing.contoso.example", func(c *x509.Certificate) {
				if crl != "" {
					c.NotAfter = time.Now().Add(20 * time.Hour)
				}
			})
			for _, http2 := range []bool{false, true} {
				c := client(t, m.roots, http2, cert)
				m.clock(time.Now())
				if status, _ := call(t, c, "https://"+m.Address().String()); status != 200 {
					t.Fatalf("status %d", status)
				}
				m.clock(time.Now().Add(14 * time.Hour))
				if status, _ := call(t, c, "https://"+m.Address().String()); status != 421 {
					t.Errorf("http2 %v: status %d, want 421", http2, status)
				}
			}
		})
	}
}

func TestAConnectionWhoseCertificateStillPassesGoesOn(t *testing.T) {
	ca, other := newCA(t, "client CA", nil), newCA(t, "other CA", nil)
	for _, http2 := range []bool{false, true} {
		m := newMutual(t, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, r.RemoteAddr) }, file(t, ca.pem()), "")
		cert := ca.issue("billing.contoso.example", nil)
		c := client(t, m.roots, http2, cert)
		url := "https://" + m.Address().String()
		_, first := call(t, c, url)
		for name, next := range map[string]*listen.TLS{
			"the same":           m.load(file(t, ca.pem()), ""),
			"one more CA":        m.load(file(t, ca.pem(), other.pem()), ""),
			"a list":             m.load(file(t, ca.pem()), file(t, ca.list(ca.issue("another", nil).Leaf))),
			"a list of that too": m.load(file(t, ca.pem(), other.pem()), file(t, ca.list(), other.list())),
		} {
			m.SetTLS(next)
			if _, got := call(t, c, url); got != first {
				t.Errorf("http2 %v: after %s the client came from %s, before from %s", http2, name, got, first)
			}
		}
	}
}

// In HTTP/2 the client says which scheme it uses.
func TestTheSchemeThatAClientClaimsHidesNoCertificate(t *testing.T) {
	ca := newCA(t, "client CA", nil)
	m := newMutual(t, who, file(t, ca.pem()), "")
	f := dialHTTP2(t, m.Server, m.roots, ca.issue("billing.contoso.example", nil))
	f.headers(1, true, ":method", "GET", ":scheme", "http", ":authority", "x", ":path", "/")
	f.await(func(fr http2.Frame) bool {
		d, ok := fr.(*http2.DataFrame)
		return ok && string(d.Data()) == "billing.contoso.example"
	})
}
