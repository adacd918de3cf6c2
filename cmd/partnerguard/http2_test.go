package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/partnerguard/partnerguard/internal/emulator"
)

// overHTTP2 makes the tests talk HTTP/2 to the guard, and the guard HTTP/2 to the
// emulator.
var overHTTP2 = os.Getenv("TEST_OVER_HTTP2") != ""

// mainSuite are the tests of what the guard does to a call, whatever carries it.
const mainSuite = "^(TestEveryReasonInEveryMode|TestReasonsOfTheGuardItself|TestUpstreamFailuresAreAnsweredInMicrosoftsShape|" +
	"TestRejectionShapes|TestRejectionKinds|TestStreams.*|TestKillUnderLoad|TestCanary)$"

func TestTheMainSuiteOverHTTP2OnBothSides(t *testing.T) {
	t.Parallel()
	if overHTTP2 {
		return // this is that run
	}
	ctx, cancel := context.WithTimeout(context.Background(), 12*time.Minute)
	defer cancel()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(ctx, self, "-test.run", mainSuite, "-test.v")
	cmd.Env = append(os.Environ(), "TEST_OVER_HTTP2=1")
	out, err := cmd.CombinedOutput()
	if err != nil {
		var failures []string
		for line := range strings.Lines(string(out)) {
			if !strings.HasPrefix(strings.TrimSpace(line), "=== ") && !strings.Contains(line, "--- PASS") {
				failures = append(failures, line)
			}
		}
		t.Fatalf("%v\n%s", err, strings.Join(failures, ""))
	}
	if n := strings.Count(string(out), "\n--- PASS: "); n < 12 {
		t.Errorf("only %d tests ran:\n%s", n, out)
	}
}

func http2Transport() *http.Transport {
	return &http.Transport{DisableCompression: true, ForceAttemptHTTP2: true, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}
}

// listenersYAML is the one listener of guardYAML.
func listenersYAML() string {
	if !overHTTP2 {
		return `listeners: [{address: "127.0.0.1:0"}]`
	}
	file := http2Certificate()
	return fmt.Sprintf(`listeners: [{address: "127.0.0.1:0", tls: {certificate: %q, key: %q}}]`, file, file)
}

// http2Certificate is a file with a certificate and its key, one for all tests.
var http2Certificate = sync.OnceValue(func() string {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "guard"}, NotAfter: time.Now().Add(48 * time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		panic(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		panic(err)
	}
	return scratch("guard.pem", append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})...))
})

// caFile is a file with the certificate authority of an emulator.
func caFile(em *emulator.Emulator) string {
	at, err := url.Parse(em.PartnerTLSURL())
	if err != nil {
		panic(err)
	}
	return scratch("ca-"+at.Port()+".pem", em.CAPEM())
}

var scratchDir = sync.OnceValue(func() string {
	dir, err := os.MkdirTemp("", "partnerguard-test")
	if err != nil {
		panic(err)
	}
	return dir
})

func scratch(name string, data []byte) string {
	file := filepath.Join(scratchDir(), name)
	if err := os.WriteFile(file, data, 0o600); err != nil {
		panic(err)
	}
	return file
}
