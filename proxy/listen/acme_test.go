package listen

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"io/fs"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/miekg/dns"
)

const testMACKey = "zWNDZM6eQGHWpSRTPal5eIUYFTu7EajVIoguysqZ9wG44nMEtx3MUAsUDkMTQ12W"

// TestACME runs the real Pebble. What each case needs of it is in its name.
func TestACME(t *testing.T) {
	if testing.Short() {
		t.Skip("builds and runs a certificate authority")
	}
	program := filepath.Join(t.TempDir(), "pebble")
	if out, err := exec.Command("go", "build", "-o", program, "github.com/letsencrypt/pebble/v2/cmd/pebble").CombinedOutput(); err != nil {
		t.Fatalf("build Pebble: %v\n%s", err, out)
	}
	nameserver := serveDNS(t)
	pebble := func(t *testing.T, cfg pebbleConfig) *pebbleCA {
		cfg.program, cfg.nameserver = program, nameserver
		return startPebble(t, cfg)
	}
	t.Run("cases", func(t *testing.T) {
		for name, test := range map[string]func(*testing.T, func(*testing.T, pebbleConfig) *pebbleCA){
			"http-01":                          testHTTP01,
			"tls-alpn-01, own listener":        testTLSALPN01,
			"tls-alpn-01, client certificates": testTLSALPN01ClientCA,
			"tls-alpn-01, no listener":         testTLSALPN01Alone,
			"the challenges take turns":        testChallengesTakeTurns,
			"external account":                 testExternalAccount,
			"renewal under load":               testRenewal,
			"renewal asked for by the CA":      testRenewalInformation,
			"CA down, certificate stored":      testStored,
			"CA down, nothing stored":          testNothingStored,
			"CA that refuses":                  testRefusingCA,
			"CA that is not trusted":           testUntrustedCA,
			"certificate that is due at once":  testDueAtOnce,
			"names given up":                   testNamesGivenUp,
			"fleet":                            testFleet,
			"fleet, renewal":                   testFleetRenewal,
			"fleet, CA that refuses":           testFleetWaits,
			"fleet, answers for others":        testFleetAnswersForOthers,
		} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				test(t, pebble)
			})
		}
	})
	// By now each ACME is closed, and each CA gone.
	var left string
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		stacks := make([]byte, 1<<20)
		stacks = stacks[:runtime.Stack(stacks, true)]
		left = ""
		for stack := range strings.SplitSeq(string(stacks), "\n\n") {
			if strings.Contains(stack, "certmagic") || strings.Contains(stack, "acmez") || strings.Contains(stack, "listen.(*ACME)") {
				left += stack + "\n\n"
			}
		}
		if left == "" {
			return
		}
	}
	t.Errorf("goroutines are left after Close:\n%s", left)
}

func testHTTP01(t *testing.T, pebble func(*testing.T, pebbleConfig) *pebbleCA) {
	ca := pebble(t, pebbleConfig{})
	g := ca.guard(t, ACMEConfig{HTTP01: true, Email: "ops@contoso.example"})
	g.manage(ca.name)
	event := g.event(ACMEObtained)
	s := g.serve("127.0.0.1:0")
	leaf := ca.handshake(t, s, ca.name)
	if key, ok := leaf.PublicKey.(*ecdsa.PublicKey); !ok || key.Curve != elliptic.P256() {
		t.Errorf("the certificate's key is a %T, want ECDSA P-256", leaf.PublicKey)
	}
	want := []CertificateStatus{{Names: []string{ca.name}, NotAfter: leaf.NotAfter}}
	if diff := cmp.Diff(want, g.acme.Certificates()); diff != "" {
		t.Errorf("Certificates (-want +got):\n%s", diff)
	}
	wantEvent := ACMEEvent{Outcome: ACMEObtained, Name: ca.name, NotAfter: leaf.NotAfter, Next: renewAt(leaf)}
	if diff := cmp.Diff(wantEvent, event); diff != "" {
		t.Errorf("event (-want +got):\n%s", diff)
	}
	if c, err := net.Dial("tcp", fmt.Sprint("127.0.0.1:", g.cfg.HTTPPort)); err == nil {
		c.Close()
		t.Error("the port of http-01 is open after the order")
	}
	err := filepath.WalkDir(g.cfg.Dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if info, err := d.Info(); err != nil || info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s is %v, %v, want it for the owner alone", path, info, err)
		}
		if strings.Contains(path, "attempts") && !d.IsDir() {
			t.Errorf("%s is left after a success", path)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

func testTLSALPN01(t *testing.T, pebble func(*testing.T, pebbleConfig) *pebbleCA) {
	ca := pebble(t, pebbleConfig{})
	g := ca.guard(t, ACMEConfig{TLSALPN01: true})
	s := g.serve(fmt.Sprint("127.0.0.1:", g.cfg.TLSALPNPort))
	g.manage(ca.name)
	g.event(ACMEObtained)
	if n := g.calls.Load(); n != 0 {
		t.Errorf("the validation reached the handler %d times", n)
	}
	ca.handshake(t, s, ca.name)
	for name, protocols := range map[string][]string{
		"no challenge is active":         {challengeProtocol},
		"the challenge is not alone":     {challengeProtocol, "http/1.1"},
		"the challenge with an unknown":  {"x", challengeProtocol},
		"the challenge and a second one": {challengeProtocol, challengeProtocol},
	} {
		c, err := tls.Dial("tcp", s.Address().String(), &tls.Config{RootCAs: ca.issued, ServerName: ca.name, NextProtos: protocols})
		if err != nil {
			continue
		}
		io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
		if answer, _ := io.ReadAll(c); len(answer) > 0 || c.ConnectionState().NegotiatedProtocol == challengeProtocol {
			t.Errorf("%s: the handshake succeeded, and the answer was %q", name, answer)
		}
		c.Close()
	}
	if n := g.calls.Load(); n != 0 {
		t.Errorf("%s handshakes reached the handler %d times", challengeProtocol, n)
	}
}

// The CA has no client certificate to show.
func testTLSALPN01ClientCA(t *testing.T, pebble func(*testing.T, pebbleConfig) *pebbleCA) {
	ca := pebble(t, pebbleConfig{})
	g := ca.guard(t, ACMEConfig{TLSALPN01: true})
	g.clientCA = filepath.Join(filepath.Dir(ca.file), "cert.pem")
	s := g.serve(fmt.Sprint("127.0.0.1:", g.cfg.TLSALPNPort))
	g.manage(ca.name)
	g.event(ACMEObtained)
	c, err := tls.Dial("tcp", s.Address().String(), &tls.Config{RootCAs: ca.issued, ServerName: ca.name, MaxVersion: tls.VersionTLS12})
	if err == nil {
		c.Close()
		t.Error("a client without a certificate was let in")
	}
}

func testTLSALPN01Alone(t *testing.T, pebble func(*testing.T, pebbleConfig) *pebbleCA) {
	ca := pebble(t, pebbleConfig{})
	g := ca.guard(t, ACMEConfig{TLSALPN01: true})
	g.manage(ca.name)
	g.event(ACMEObtained)
	ca.handshake(t, g.serve("127.0.0.1:0"), ca.name)
}

// The port of http-01 belongs to somebody else; tls-alpn-01 does it.
func testChallengesTakeTurns(t *testing.T, pebble func(*testing.T, pebbleConfig) *pebbleCA) {
	ca := pebble(t, pebbleConfig{})
	l, err := net.Listen("tcp", fmt.Sprint("127.0.0.1:", ca.cfg.httpPort))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	g := ca.guard(t, ACMEConfig{HTTP01: true})
	g.manage(ca.name)
	if event := g.event(ACMEFailed); !strings.Contains(event.Err.Error(), "listen for the http-01 challenge: ") || !strings.Contains(event.Err.Error(), "address already in use") {
		t.Errorf("the error is %q, want it to name the port that is in use", event.Err)
	}
	if n := ca.requests.Load(); n != 0 {
		t.Errorf("the CA got %d requests for an order that cannot succeed", n)
	}
	both := ca.guard(t, ACMEConfig{HTTP01: true, TLSALPN01: true})
	both.manage(ca.name)
	both.event(ACMEObtained)
}

func testExternalAccount(t *testing.T, pebble func(*testing.T, pebbleConfig) *pebbleCA) {
	ca := pebble(t, pebbleConfig{binding: true})
	g := ca.guard(t, ACMEConfig{HTTP01: true})
	g.manage(ca.name)
	if err := g.event(ACMEFailed).Err; !strings.Contains(err.Error(), "externalAccountRequired") {
		t.Errorf("without a binding the error is %q", err)
	}
	wrong := ca.guard(t, ACMEConfig{HTTP01: true, EABKeyID: "contoso", EABMACKey: strings.Repeat("c2VjcmV0", 6)})
	wrong.manage(ca.name)
	if err := wrong.event(ACMEFailed).Err; strings.Contains(err.Error(), wrong.cfg.EABMACKey) || strings.Contains(err.Error(), "secret") {
		t.Errorf("the error holds the MAC key: %q", err)
	}
	right := ca.guard(t, ACMEConfig{HTTP01: true, EABKeyID: "contoso", EABMACKey: testMACKey + "=="})
	right.manage(ca.name)
	right.event(ACMEObtained)
}

func testRenewal(t *testing.T, pebble func(*testing.T, pebbleConfig) *pebbleCA) {
	ca := pebble(t, pebbleConfig{validity: 9 * time.Second})
	g := ca.guard(t, ACMEConfig{TLSALPN01: true})
	s := g.serve(fmt.Sprint("127.0.0.1:", g.cfg.TLSALPNPort))
	g.manage(ca.name)
	g.event(ACMEObtained)
	first := ca.handshake(t, s, ca.name)

	var load sync.WaitGroup
	renewed := make(chan struct{})
	var handshakes atomic.Int64
	for range 2 {
		load.Go(func() {
			for {
				select {
				case <-renewed:
					return
				case <-time.After(5 * time.Millisecond):
				}
				ca.handshake(t, s, ca.name)
				handshakes.Add(1)
			}
		})
	}
	event := g.event(ACMERenewed)
	second := ca.handshake(t, s, ca.name)
	close(renewed)
	load.Wait()
	if first.SerialNumber.Cmp(second.SerialNumber) == 0 || !second.NotAfter.After(first.NotAfter) {
		t.Errorf("after the renewal the certificate is still the one until %s", first.NotAfter)
	}
	if !event.NotAfter.Equal(second.NotAfter) {
		t.Errorf("the event says %s, the certificate %s", event.NotAfter, second.NotAfter)
	}
	if n := handshakes.Load(); n < 100 {
		t.Errorf("only %d handshakes during the renewal", n)
	}
	if time.Now().Before(renewAt(first)) {
		t.Error("it was renewed before two thirds of its life were over")
	}
}

func testRenewalInformation(t *testing.T, pebble func(*testing.T, pebbleConfig) *pebbleCA) {
	ca := pebble(t, pebbleConfig{})
	g := ca.guard(t, ACMEConfig{HTTP01: true, pace: pace{ask: 300 * time.Millisecond}})
	g.manage(ca.name)
	g.event(ACMEObtained)
	first := ca.handshake(t, g.serve("127.0.0.1:0"), ca.name)
	body, err := json.Marshal(map[string]string{
		"Certificate": string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: first.Raw})),
		"ARIResponse": `{"suggestedWindow":{"start":"2026-01-01T00:00:00Z","end":"2026-01-02T00:00:00Z"}}`,
	})
	if err != nil {
		t.Fatal(err)
	}
	res, err := ca.client.Post(ca.management+"/set-renewal-info/", "application/json", bytes.NewReader(body))
	if err != nil || res.StatusCode != http.StatusOK {
		t.Fatalf("set renewal information: %v, %v", res, err)
	}
	res.Body.Close()
	g.event(ACMERenewed)
}

func testStored(t *testing.T, pebble func(*testing.T, pebbleConfig) *pebbleCA) {
	ca := pebble(t, pebbleConfig{})
	g := ca.guard(t, ACMEConfig{HTTP01: true})
	g.manage(ca.name)
	g.event(ACMEObtained)
	g.acme.Close()
	ca.stop()

	again := ca.guard(t, g.cfg)
	start := time.Now()
	again.manage(ca.name)
	if took := time.Since(start); took > time.Second {
		t.Errorf("Manage took %v with the CA down", took)
	}
	ca.handshake(t, again.serve("127.0.0.1:0"), ca.name)
}

func testNothingStored(t *testing.T, pebble func(*testing.T, pebbleConfig) *pebbleCA) {
	ca := pebble(t, pebbleConfig{})
	ca.stop()
	g := ca.guard(t, ACMEConfig{HTTP01: true})
	s := g.serve("127.0.0.1:0")
	g.manage(ca.name)
	g.event(ACMEFailed)
	c, err := tls.Dial("tcp", s.Address().String(), &tls.Config{RootCAs: ca.issued, ServerName: ca.name})
	if err == nil {
		c.Close()
		t.Fatal("a handshake succeeded without a certificate")
	}
	g.logged("no certificate for " + ca.name + " yet, next attempt at ")
	g.logged("connection refused")
	tls.Dial("tcp", s.Address().String(), &tls.Config{ServerName: "other.contoso.example"})
	g.logged(`no certificate for "other.contoso.example": not one of the names that ACME obtains`)

	ca.start()
	g.event(ACMEObtained)
	ca.handshake(t, s, ca.name)
}

// Pebble cannot reach the name, so each validation fails.
func testRefusingCA(t *testing.T, pebble func(*testing.T, pebbleConfig) *pebbleCA) {
	ca := pebble(t, pebbleConfig{})
	cfg := ACMEConfig{HTTP01: true, HTTPPort: freePort(t), pace: pace{refused: 30 * time.Minute, restart: time.Minute}}
	g := ca.guard(t, cfg)
	g.manage(ca.name)
	event := g.event(ACMEFailed)
	if wait := time.Until(event.Next); wait < 29*time.Minute || wait > 34*time.Minute {
		t.Errorf("after a refusal it waits %v, want about 30 minutes", wait)
	}
	requests := ca.requests.Load()
	if requests > 25 {
		t.Errorf("one order that fails took %d requests", requests)
	}
	t.Log("requests of one refused order:", requests)
	for range 20 {
		g.acme.Close()
		g = ca.guard(t, g.cfg)
		g.manage(ca.name)
		if _, err := g.acme.getCertificate(&tls.ClientHelloInfo{ServerName: ca.name}); err == nil || !strings.Contains(err.Error(), "Connection refused") && !strings.Contains(err.Error(), "connection refused") {
			t.Fatalf("after a restart the handshake's error is %v, want the CA's reason", err)
		}
		time.Sleep(10 * time.Millisecond)
	}
	if got := ca.requests.Load(); got != requests {
		t.Errorf("20 restarts sent %d requests", got-requests)
	}
}

func testUntrustedCA(t *testing.T, pebble func(*testing.T, pebbleConfig) *pebbleCA) {
	ca := pebble(t, pebbleConfig{})
	g := ca.guard(t, ACMEConfig{HTTP01: true, RootCAs: x509.NewCertPool()})
	g.manage(ca.name)
	err := g.event(ACMEFailed).Err.Error()
	if !strings.Contains(err, ca.directory) || !strings.Contains(err, "certificate signed by unknown authority") {
		t.Errorf("the error is %q, want the directory and an unknown authority", err)
	}
}

// As with a clock that is far ahead, each new certificate has to be renewed.
func testDueAtOnce(t *testing.T, pebble func(*testing.T, pebbleConfig) *pebbleCA) {
	ca := pebble(t, pebbleConfig{validity: time.Second})
	g := ca.guard(t, ACMEConfig{HTTP01: true, pace: pace{first: time.Hour}})
	g.manage(ca.name)
	event := g.event(ACMEFailed)
	if !strings.Contains(event.Err.Error(), "but the clock says") || time.Until(event.Next) < 59*time.Minute {
		t.Errorf("the event is %+v, want a wait of an hour for the clock", event)
	}
}

func testNamesGivenUp(t *testing.T, pebble func(*testing.T, pebbleConfig) *pebbleCA) {
	ca := pebble(t, pebbleConfig{})
	other := "other." + ca.name
	g := ca.guard(t, ACMEConfig{HTTP01: true})
	g.manage(ca.name)
	g.event(ACMEObtained)
	g.manage(ca.name, other) // as a reload does
	if event := g.event(ACMEObtained); event.Name != other {
		t.Errorf("%s was obtained, want %s", event.Name, other)
	}
	s := g.serve("127.0.0.1:0")
	ca.handshake(t, s, ca.name)
	ca.handshake(t, s, other)

	g.manage(other)
	if c := g.acme.Certificates(); len(c) != 1 || c[0].Names[0] != other {
		t.Errorf("Certificates = %v, want that of %s alone", c, other)
	}
	if c, err := tls.Dial("tcp", s.Address().String(), &tls.Config{RootCAs: ca.issued, ServerName: ca.name}); err == nil {
		c.Close()
		t.Error("a name that was given up is still served")
	}
	requests := ca.requests.Load()
	g.manage(ca.name, other)
	ca.handshake(t, s, ca.name)
	if got := ca.requests.Load(); got != requests {
		t.Errorf("a name that is stored took %d requests", got-requests)
	}
}

// The CA answers everything with an error; time is sped up 600-fold.
func TestACMEDoesNotHammer(t *testing.T) {
	t.Parallel()
	for name, answer := range map[string]http.HandlerFunc{
		"errors": func(w http.ResponseWriter, r *http.Request) {
			http.Error(w, strings.Repeat("<b>all is lost\x00\n", 1000), http.StatusServiceUnavailable)
		},
		"problems": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "application/problem+json")
			w.WriteHeader(http.StatusInternalServerError)
			io.WriteString(w, `{"type":"urn:ietf:params:acme:error:serverInternal","detail":"all is lost"}`)
		},
		"hang-ups": func(w http.ResponseWriter, r *http.Request) { panic(http.ErrAbortHandler) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var requests atomic.Int64
			ca := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				requests.Add(1)
				answer(w, r)
			}))
			ca.Config.ErrorLog = log.New(io.Discard, "", 0)
			ca.StartTLS()
			t.Cleanup(ca.Close)
			roots := x509.NewCertPool()
			roots.AddCert(ca.Certificate())
			events := make(chan ACMEEvent, 100)
			a, err := NewACME(ACMEConfig{
				Dir: t.TempDir(), Directory: ca.URL + "/dir", RootCAs: roots, HTTP01: true, HTTPPort: freePort(t),
				Event: func(e ACMEEvent) { events <- e },
				host:  "127.0.0.1",
				pace:  pace{first: 100 * time.Millisecond, longest: 36 * time.Second},
			})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(a.Close)
			if err := a.Manage(t.Context(), []string{"guard.contoso.example"}); err != nil {
				t.Fatal(err)
			}
			// Failures at 0, 0.1, 0.3, 0.7, 1.5 and 3.1 s, and what each takes.
			time.Sleep(3 * time.Second)
			a.Close()
			orders := len(events)
			if orders < 2 || orders > 6 {
				t.Errorf("%d orders in 3 s, want 2 to 6", orders)
			}
			if n := requests.Load(); n > int64(orders+1)*3 {
				t.Errorf("%d requests for %d orders, want three each at most", n, orders)
			}
			for range orders {
				if text := (<-events).Err.Error(); len(text) > 700 || strings.ContainsAny(text, "\n\r") {
					t.Errorf("the error is %d bytes long: %q", len(text), text)
				}
			}
		})
	}
}

// The CA never answers, and the process is restarted over and over.
func TestACMERemembersWhatWasInterrupted(t *testing.T) {
	t.Parallel()
	connected := make(chan struct{}, 100)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			connected <- struct{}{}
			defer c.Close()
		}
	}()
	dir := t.TempDir()
	for start := 1; start <= 10; start++ {
		a, err := NewACME(ACMEConfig{Dir: dir, Directory: "https://" + l.Addr().String(), HTTP01: true, HTTPPort: freePort(t), host: "127.0.0.1"})
		if err != nil {
			t.Fatal(err)
		}
		if err := a.Manage(t.Context(), []string{"guard.contoso.example"}); err != nil {
			t.Fatal(err)
		}
		wait := 50 * time.Millisecond
		if start == 1 {
			wait = 5 * time.Second
		}
		select {
		case <-connected:
			if start > 1 {
				t.Errorf("start %d went to the CA", start)
			}
		case <-time.After(wait):
			if start == 1 {
				t.Error("the first start did not go to the CA")
			}
		}
		a.Close()
	}
}

// A disk that cannot keep the certificate would cost an order with every start.
func TestACMEOrdersNothingThatCannotBeStored(t *testing.T) {
	t.Parallel()
	var requests atomic.Int64
	ca := httptest.NewTLSServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { requests.Add(1) }))
	defer ca.Close()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "attempts"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	events := make(chan ACMEEvent, 1)
	a, err := NewACME(ACMEConfig{Dir: dir, Directory: ca.URL, HTTP01: true, HTTPPort: freePort(t), host: "127.0.0.1", Event: func(e ACMEEvent) { events <- e }})
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	if err := a.Manage(t.Context(), []string{"guard.contoso.example"}); err != nil {
		t.Fatal(err)
	}
	select {
	case event := <-events:
		if event.Outcome != ACMEFailed || !strings.Contains(event.Err.Error(), "not a directory") {
			t.Errorf("the event is %+v, want the disk's error", event)
		}
	case <-time.After(5 * time.Second):
		t.Error("no event")
	}
	if n := requests.Load(); n != 0 {
		t.Errorf("the CA got %d requests", n)
	}
}

// The port of http-01 is open to everybody while an order runs.
func TestACMEAnswersNothingButTheChallenge(t *testing.T) {
	a, err := NewACME(ACMEConfig{Dir: t.TempDir(), HTTP01: true, HTTPPort: freePort(t), host: "127.0.0.1"})
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	stop, err := a.answerHTTP()
	if err != nil {
		t.Fatal(err)
	}
	address := fmt.Sprint("127.0.0.1:", a.cfg.HTTPPort)
	for _, path := range []string{"/", "/v1/customers", "/.well-known/acme-challenge/", "/.well-known/acme-challenge/dG9rZW4"} {
		res, err := http.Get("http://" + address + path)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		if res.StatusCode != http.StatusNotFound {
			t.Errorf("GET %s is answered %s, want 404", path, res.Status)
		}
	}
	idle, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer idle.Close()
	time.AfterFunc(50*time.Millisecond, stop) // when it has been accepted
	idle.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := idle.Read(make([]byte, 1)); err == nil || os.IsTimeout(err) {
		t.Errorf("a connection that says nothing outlives the order: %v", err)
	}
}

func TestACMEPaceGrowsAndIsBounded(t *testing.T) {
	p := pace{first: time.Minute, refused: 30 * time.Minute, longest: 6 * time.Hour}
	for _, test := range []struct {
		failures int
		refused  bool
		want     time.Duration
	}{
		{1, false, time.Minute},
		{2, false, 2 * time.Minute},
		{4, false, 8 * time.Minute},
		{9, false, 256 * time.Minute},
		{10, false, 6 * time.Hour},
		{29, false, 6 * time.Hour},
		{64, false, 6 * time.Hour},
		{1 << 40, false, 6 * time.Hour},
		{1, true, 30 * time.Minute},
		{6, true, 32 * time.Minute},
		{20, true, 6 * time.Hour},
	} {
		got := time.Until(p.after(test.failures, test.refused))
		if got < test.want-time.Second || got > test.want+test.want/10+time.Second {
			t.Errorf("after(%d, %v) waits %v, want %v and up to a tenth more", test.failures, test.refused, got, test.want)
		}
	}
}

func TestACMERefusesBadConfiguration(t *testing.T) {
	dir := t.TempDir()
	for name, test := range map[string]struct {
		cfg  ACMEConfig
		want string
	}{
		"no directory":        {ACMEConfig{HTTP01: true}, "Dir is required"},
		"no challenge":        {ACMEConfig{Dir: dir}, "needs a challenge"},
		"clear text":          {ACMEConfig{Dir: dir, HTTP01: true, Directory: "http://ca.example/dir"}, "https URL"},
		"a user":              {ACMEConfig{Dir: dir, HTTP01: true, Directory: "https://u:hunter2@ca.example/"}, "https URL"},
		"a key id alone":      {ACMEConfig{Dir: dir, HTTP01: true, EABKeyID: "x"}, "needs a key id and a MAC key"},
		"a MAC key alone":     {ACMEConfig{Dir: dir, HTTP01: true, EABMACKey: "aHVudGVyMg"}, "needs a key id and a MAC key"},
		"a MAC key of nobody": {ACMEConfig{Dir: dir, HTTP01: true, EABKeyID: "x", EABMACKey: "hunter2!"}, "base64url"},
	} {
		t.Run(name, func(t *testing.T) {
			a, err := NewACME(test.cfg)
			if err == nil {
				a.Close()
				t.Fatal("NewACME accepted it")
			}
			if !strings.Contains(err.Error(), test.want) || strings.Contains(err.Error(), "hunter2") {
				t.Errorf("the error is %q, want %q", err, test.want)
			}
		})
	}
	a, err := NewACME(ACMEConfig{Dir: dir, HTTP01: true, Directory: "https://127.0.0.1:1/"})
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	for _, name := range []string{"", "*.contoso.example", "192.0.2.1", "::1", "a b", "../x", "a..b", ".a", "a.", "-a.b", strings.Repeat("a", 64) + ".b", "grüße.example"} {
		if err := a.Manage(t.Context(), []string{name}); err == nil {
			t.Errorf("Manage accepted %q", name)
		}
	}
}

// guarded is one ACME under test and what it says.
type guarded struct {
	t      *testing.T
	cfg    ACMEConfig
	acme   *ACME
	events chan ACMEEvent
	log    lockedBuffer
	calls  atomic.Int64

	clientCA string // file; empty: no client certificates
}

// guard makes an ACME for this CA; what cfg leaves open is what works.
func (ca *pebbleCA) guard(t *testing.T, cfg ACMEConfig) *guarded {
	t.Helper()
	g := &guarded{t: t, events: make(chan ACMEEvent, 100)}
	if cfg.Dir == "" {
		cfg.Dir = filepath.Join(t.TempDir(), "acme")
	}
	if cfg.RootCAs == nil {
		cfg.RootCAs = ca.roots
	}
	if cfg.HTTPPort == 0 {
		cfg.HTTPPort = ca.cfg.httpPort
	}
	if cfg.pace.first == 0 {
		cfg.pace.first = 200 * time.Millisecond
	}
	cfg.Directory, cfg.TLSALPNPort, cfg.host = ca.directory, ca.cfg.tlsPort, "127.0.0.1"
	cfg.Event = func(e ACMEEvent) { g.events <- e }
	var err error
	if g.acme, err = NewACME(cfg); err != nil {
		t.Fatal(err)
	}
	g.cfg = cfg
	t.Cleanup(g.acme.Close)
	return g
}

func (g *guarded) manage(names ...string) {
	g.t.Helper()
	if err := g.acme.Manage(g.t.Context(), names); err != nil {
		g.t.Fatal(err)
	}
}

// event waits for one with the outcome; an order may fail before it succeeds.
func (g *guarded) event(want ACMEOutcome) ACMEEvent {
	g.t.Helper()
	var failed []error
	timeout := time.After(25 * time.Second)
	for {
		select {
		case e := <-g.events:
			if e.Outcome == want {
				return e
			}
			if e.Outcome != ACMEFailed {
				g.t.Fatalf("the event is %+v, want %s", e, want)
			}
			failed = append(failed, e.Err)
		case <-timeout:
			g.t.Fatalf("no event %q, but failures %v", want, failed)
		}
	}
}

// serve opens a listener whose certificates are the ACME's.
func (g *guarded) serve(address string) *Server {
	g.t.Helper()
	config, err := LoadTLS(TLSConfig{ACME: g.acme, ClientCA: g.clientCA})
	if err != nil {
		g.t.Fatal(err)
	}
	s, err := Open(Config{
		Name: "acme", Address: address, TLS: config, ErrorLog: log.New(&g.log, "", 0),
		Handler: http.HandlerFunc(func(http.ResponseWriter, *http.Request) { g.calls.Add(1) }),
	})
	if err != nil {
		g.t.Fatal(err)
	}
	s.Serve()
	g.t.Cleanup(func() { s.Shutdown(context.Background()) })
	return s
}

// logged waits for text in the listener's log.
func (g *guarded) logged(text string) {
	g.t.Helper()
	for deadline := time.Now().Add(5 * time.Second); !strings.Contains(g.log.String(), text); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			g.t.Fatalf("the log has no %q:\n%s", text, g.log.String())
		}
	}
}

// pebbleConfig is what differs between the CAs of the cases.
type pebbleConfig struct {
	program, nameserver string
	httpPort, tlsPort   int // where it validates
	validity            time.Duration
	binding             bool
}

// pebbleCA is a running Pebble, behind a proxy that counts.
type pebbleCA struct {
	t           *testing.T
	cfg         pebbleConfig
	name        string // to obtain; certmagic keeps the challenges of a process by name
	file        string
	own         string // address of Pebble itself
	directory   string // by the proxy
	management  string
	client      *http.Client
	roots       *x509.CertPool // of its endpoints
	issued      *x509.CertPool // of what it issues
	requests    atomic.Int64
	process     *exec.Cmd
	output      lockedBuffer
	certificate tls.Certificate
	address     string // of the proxy
	proxy       *http.Server
}

func startPebble(t *testing.T, cfg pebbleConfig) *pebbleCA {
	t.Helper()
	cfg.httpPort, cfg.tlsPort = freePort(t), freePort(t)
	dir := t.TempDir()
	ca := &pebbleCA{
		t: t, cfg: cfg, file: filepath.Join(dir, "pebble.json"), roots: x509.NewCertPool(),
		name:    fmt.Sprintf("guard%d.contoso.example", cfg.httpPort),
		own:     fmt.Sprint("127.0.0.1:", freePort(t)),
		address: fmt.Sprint("127.0.0.1:", freePort(t)),
	}
	management := fmt.Sprint("127.0.0.1:", freePort(t))
	ca.directory, ca.management = "https://"+ca.address+"/dir", "https://"+management
	ca.certificate = ca.selfSigned(dir)
	ca.client = &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: ca.roots}, DisableKeepAlives: true}}
	text, err := json.Marshal(map[string]any{"pebble": map[string]any{
		"listenAddress":                  ca.own,
		"managementListenAddress":        management,
		"certificate":                    filepath.Join(dir, "cert.pem"),
		"privateKey":                     filepath.Join(dir, "key.pem"),
		"httpPort":                       cfg.httpPort,
		"tlsPort":                        cfg.tlsPort,
		"keyAlgorithm":                   "ecdsa",
		"externalAccountBindingRequired": cfg.binding,
		"externalAccountMACKeys":         map[string]string{"contoso": testMACKey},
		"retryAfter":                     map[string]int{"authz": 1, "order": 1},
		"profiles":                       map[string]any{"default": map[string]any{"description": "x", "validityPeriod": int(cfg.validity.Seconds())}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(ca.file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ca.stop()
		if t.Failed() {
			t.Logf("Pebble says:\n%s", ca.output.String())
		}
	})
	ca.start()
	return ca
}

func (ca *pebbleCA) start() {
	ca.t.Helper()
	ca.process = exec.Command(ca.cfg.program, "-config", ca.file, "-dnsserver", ca.cfg.nameserver)
	ca.process.Env = append(os.Environ(), "PEBBLE_VA_NOSLEEP=1") // and 5 % of all nonces refused
	ca.process.Stdout, ca.process.Stderr = &ca.output, &ca.output
	if err := ca.process.Start(); err != nil {
		ca.t.Fatal(err)
	}
	var root []byte
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		res, err := ca.client.Get(ca.management + "/roots/0")
		if err == nil {
			root, err = io.ReadAll(res.Body)
			res.Body.Close()
		}
		if err == nil {
			break
		}
		if time.Now().After(deadline) {
			ca.t.Fatalf("Pebble does not answer: %v\n%s", err, ca.output.String())
		}
	}
	ca.issued = x509.NewCertPool()
	if !ca.issued.AppendCertsFromPEM(root) {
		ca.t.Fatalf("Pebble's root is %q", root)
	}
	forward := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			ca.requests.Add(1)
			r.SetURL(&url.URL{Scheme: "https", Host: ca.own})
			r.Out.Host = r.In.Host // Pebble makes its URLs of it
		},
		Transport: ca.client.Transport,
		ErrorLog:  log.New(io.Discard, "", 0),
	}
	l, err := net.Listen("tcp", ca.address)
	if err != nil {
		ca.t.Fatal(err)
	}
	ca.proxy = &http.Server{Handler: forward, TLSConfig: &tls.Config{Certificates: []tls.Certificate{ca.certificate}}, ErrorLog: log.New(io.Discard, "", 0)}
	go ca.proxy.ServeTLS(l, "", "")
}

// stop ends Pebble; its address then refuses connections. It may be called twice.
func (ca *pebbleCA) stop() {
	if ca.proxy != nil {
		ca.proxy.Close()
	}
	if ca.process != nil && ca.process.ProcessState == nil {
		ca.process.Process.Kill()
		ca.process.Wait()
	}
}

// handshake returns the server's certificate, verified. It may run concurrently.
func (ca *pebbleCA) handshake(t *testing.T, s *Server, name string) *x509.Certificate {
	t.Helper()
	c, err := tls.Dial("tcp", s.Address().String(), &tls.Config{RootCAs: ca.issued, ServerName: name})
	if err != nil {
		t.Errorf("handshake for %s: %v", name, err)
		return &x509.Certificate{SerialNumber: new(big.Int)}
	}
	defer c.Close()
	return c.ConnectionState().PeerCertificates[0]
}

// selfSigned writes a certificate for 127.0.0.1, which it adds to the roots.
func (ca *pebbleCA) selfSigned(dir string) tls.Certificate {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		ca.t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		ca.t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		ca.t.Fatal(err)
	}
	certPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	keyPEM := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})
	for file, text := range map[string][]byte{"cert.pem": certPEM, "key.pem": keyPEM} {
		if err := os.WriteFile(filepath.Join(dir, file), text, 0o600); err != nil {
			ca.t.Fatal(err)
		}
	}
	ca.roots.AppendCertsFromPEM(certPEM)
	pair, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		ca.t.Fatal(err)
	}
	return pair
}

// serveDNS answers every A question with 127.0.0.1, by TCP, as Pebble asks.
func serveDNS(t *testing.T) (address string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := &dns.Server{Listener: l, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		answer := new(dns.Msg).SetReply(q)
		if q.Question[0].Qtype == dns.TypeA {
			answer.Answer = []dns.RR{&dns.A{
				Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 1},
				A:   net.IPv4(127, 0, 0, 1),
			}}
		}
		w.WriteMsg(answer)
	})}
	go server.ActivateAndServe()
	t.Cleanup(func() { server.Shutdown() })
	return l.Addr().String()
}

// freePort is one that was free just now.
func freePort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return int(netip.MustParseAddrPort(l.Addr().String()).Port())
}

// lockedBuffer is a bytes.Buffer for several goroutines.
type lockedBuffer struct {
	mu     sync.Mutex
	buffer bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buffer.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buffer.String()
}
