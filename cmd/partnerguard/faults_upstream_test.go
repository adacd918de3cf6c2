//go:build linux

package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/partnerguard/partnerguard/internal/emulator"
)

// withoutUpstream reports whether a call got what an upstream that fails asks for:
// 502 or 504, or 503 once the breaker is open. What never was to be forwarded is
// refused as ever.
func (s *scene) withoutUpstream(c sighting) bool {
	switch {
	case c.err != nil:
		return false
	case s.tokens[c.token].reason == "mfa_missing":
		return s.as(c)
	}
	switch c.reason {
	case "upstream_unreachable":
		return c.status == 502
	case "upstream_timeout":
		return c.status == 504
	case "upstream_circuit_open":
		return c.status == 503
	}
	return false
}

// An upstream that cannot be had costs its calls and nothing else; the breaker opens,
// and closes again when the upstream is back.
func TestFaultsOfUpstream(t *testing.T) {
	const patience = 3 * time.Second // on a busy machine a sound call takes more than one
	t.Parallel()
	var side sideBySide
	defer side.wait()
	for _, fault := range []struct {
		name, mode string
		net        relayMode
		reason     string
	}{
		{"refusing", "enforce", refusing, "upstream_unreachable"},
		{"silent", "enforce", silent, "upstream_timeout"},
		{"refusing while only watching", "audit", refusing, "upstream_unreachable"},
	} {
		side.run(t, fault.name, func(t *testing.T) {
			em := startEmulator(t, emulator.Config{})
			partner := startRelay(t, em.PartnerURL(), nil)
			s := play(t, em, stage{mode: fault.mode, upstream: fmt.Sprintf("url: %q", partner.url()), timeouts: fmt.Sprintf("idle: 1s, unready: 0s, response_header: %v", patience)})
			sound, failing := s.as, s.withoutUpstream
			if fault.mode == "audit" {
				sound = func(c sighting) bool { return c.err == nil && c.status == 200 }
				failing = func(c sighting) bool { return c.err == nil && c.status == 502 && c.reason == fault.reason }
			}
			load := s.underLoad(crowdConfig{clients: 80}) // some of which are stuck at a time
			load.await(80)
			loaded := s.resources()
			partner.set(fault.net)
			broken := time.Now().Add(patience + 100*time.Millisecond) // for everybody
			load.awaitSince(broken, 150)
			mended := time.Now()
			partner.set(passing)
			load.awaitAll(60, sound) // the breaker stays open for 5 s
			took := time.Since(mended)
			s.awaitText(`"msg":"breaker changed"`, `"state":"closed"`)
			calls := load.stop()

			during := between(calls, broken, mended)
			want(t, "without upstream", during, 100, failing)
			t.Logf("all is well %v after the upstream is", took)
			kinds := tally(calls)
			status := map[string]int{"upstream_unreachable": 502, "upstream_timeout": 504}[fault.reason]
			opened := kinds["503 upstream_circuit_open"] > 0
			if kinds[fmt.Sprintf("%d %s", status, fault.reason)] == 0 || opened != (fault.mode == "enforce") {
				t.Errorf("without upstream: %v", kinds)
			}
			if len(s.said(`"msg":"breaker changed"`, `"state":"open"`)) == 0 {
				t.Errorf("the log does not tell of the breaker:\n%s", s.said("breaker"))
			}
			s.invariants(calls, loaded, leave{})
		})
	}
}

// A slow upstream is waited for; one that is slower than timeouts.response_header is
// given up, call by call.
func TestFaultsOfSlowUpstream(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	s := play(t, em, stage{timeouts: "idle: 1s, unready: 0s, response_header: 4s"})
	slow := s.underLoad(crowdConfig{clients: 60, rate: 90, emulate: "stall=500ms"})
	slow.await(150)
	loaded := s.resources()
	stuck := s.underLoad(crowdConfig{clients: 20, rate: 20, emulate: "stall=20s"})
	slow.await(250)
	given := stuck.stop()
	calls := slow.stop()
	want(t, "with a slow upstream", calls, 300, s.as)
	want(t, "with one that is too slow", given, 10, s.withoutUpstream)
	if n := tally(given)["504 upstream_timeout"]; n == 0 {
		t.Errorf("no call timed out: %v", tally(given))
	}
	s.invariants(append(calls, given...), loaded, leave{})
}

// issued is a certificate authority's and a server's certificate.
type issued struct {
	authority string // PEM file
	valid     tls.Certificate
	expired   tls.Certificate
}

func issue(t *testing.T, name string) issued {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-48 * time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	sign := func(template *x509.Certificate) []byte {
		der, err := x509.CreateCertificate(rand.Reader, template, ca, key.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	leaf := func(until time.Time) tls.Certificate {
		der := sign(&x509.Certificate{
			SerialNumber: big.NewInt(2), NotBefore: time.Now().Add(-47 * time.Hour), NotAfter: until,
			KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
			DNSNames: []string{name},
		})
		return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	}
	i := issued{filepath.Join(t.TempDir(), "ca.pem"), leaf(time.Now().Add(time.Hour)), leaf(time.Now().Add(-time.Hour))}
	if err := os.WriteFile(i.authority, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: sign(ca)}), 0o600); err != nil {
		t.Fatal(err)
	}
	return i
}

// An upstream whose certificate has expired gets no call and no token.
func TestFaultsOfExpiredCertificate(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	certificates := issue(t, "partner.test")
	var expired atomic.Bool
	partner := startRelay(t, em.PartnerURL(), func(c net.Conn) net.Conn {
		return tls.Server(c, &tls.Config{GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			if expired.Load() {
				return &certificates.expired, nil
			}
			return &certificates.valid, nil
		}})
	})
	s := play(t, em, stage{upstream: fmt.Sprintf("url: \"https://partner.test\", dial: %q, ca: %q", partner.address, certificates.authority)})
	load := s.underLoad(crowdConfig{})
	load.awaitSound(100)
	loaded := s.resources()
	expired.Store(true)
	partner.set(refusing) // ends the connections that began well
	partner.set(passing)
	broken := time.Now().Add(200 * time.Millisecond)
	load.await(150)
	arrived := em.Count()
	mended := time.Now()
	expired.Store(false)
	load.awaitSound(60)
	calls := load.stop()
	want(t, "with an expired certificate", between(calls, broken, mended), 100, s.withoutUpstream)
	for _, r := range em.Requests()[:arrived] {
		if r.Time.After(broken) {
			t.Errorf("%s went out to an upstream whose certificate had expired", r.Header.Get("MS-RequestId"))
		}
	}
	s.invariants(calls, loaded, leave{})
}

// The upstream's name does not resolve, later it does.
func TestFaultsOfNames(t *testing.T) {
	t.Parallel()
	unshare := program(t, "unshare")
	em := startEmulator(t, emulator.Config{})
	certificates := issue(t, "partner.test")
	partner := startRelay(t, em.PartnerURL(), func(c net.Conn) net.Conn {
		return tls.Server(c, &tls.Config{Certificates: []tls.Certificate{certificates.valid}})
	})
	// The guard sees its own resolv.conf, which leads nowhere, and its own hosts.
	dir := t.TempDir()
	hosts, resolv := filepath.Join(dir, "hosts"), filepath.Join(dir, "resolv.conf")
	write := func(file, text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write(hosts, "127.0.0.1 localhost\n")
	write(resolv, "nameserver 127.98.0.53\noptions timeout:1 attempts:1\n")
	host, port, err := net.SplitHostPort(partner.address)
	if err != nil {
		t.Fatal(err)
	}
	s := play(t, em, stage{
		upstream: fmt.Sprintf("url: \"https://partner.test:%s\", ca: %q", port, certificates.authority),
		wrap: []string{unshare, "--mount", "sh", "-c",
			`mount --bind "$0" /etc/hosts && mount --bind "$1" /etc/resolv.conf && shift && exec "$@"`, hosts, resolv},
	})
	s.awaitText(`"msg":"upstream cannot be reached"`, "partner.test", `"hint":"calls get 502 until it can; check DNS, firewall and HTTPS_PROXY"`)
	load := s.underLoad(crowdConfig{})
	load.await(200)
	loaded := s.resources()
	mended := time.Now()
	write(hosts, "127.0.0.1 localhost\n"+host+" partner.test\n")
	load.awaitSound(60)
	calls := load.stop()
	want(t, "without the name", between(calls, time.Time{}, mended), 150, s.withoutUpstream)
	s.invariants(calls, loaded, leave{})
}
