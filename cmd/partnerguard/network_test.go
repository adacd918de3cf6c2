package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"net/url"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/partnerguard/partnerguard/internal/emulator"
)

// authority is a partner's own CA of client certificates.
type authority struct {
	t    *testing.T
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
	next int64
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "Contoso clients"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(48 * time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &authority{t, key, cert, 100}
}

// issue makes a client that shows a certificate with these names.
func (a *authority) issue(cn string, uris ...string) (*http.Client, *big.Int) {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	a.next++
	template := &x509.Certificate{
		SerialNumber: big.NewInt(a.next), Subject: pkix.Name{CommonName: cn}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
	}
	for _, u := range uris {
		parsed, err := url.Parse(u)
		if err != nil {
			a.t.Fatal(err)
		}
		template.URIs = append(template.URIs, parsed)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, key.Public(), a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	tr := &http.Transport{ForceAttemptHTTP2: true, TLSClientConfig: &tls.Config{
		InsecureSkipVerify: true, Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}},
	}}
	a.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr}, template.SerialNumber
}

// revoke writes a revocation list.
func (a *authority) revoke(file string, number int64, serials ...*big.Int) {
	a.t.Helper()
	list := &x509.RevocationList{Number: big.NewInt(number), ThisUpdate: time.Now().Add(-time.Minute), NextUpdate: time.Now().Add(time.Hour)}
	for _, s := range serials {
		list.RevokedCertificateEntries = append(list.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: s, RevocationTime: time.Now()})
	}
	der, err := x509.CreateRevocationList(rand.Reader, list, a.cert, a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	write(a.t, file, string(pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der})))
}

func TestAClientCertificateIsStrongEvidenceUntilItIsRevoked(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	dir := t.TempDir()
	ca := newAuthority(t)
	write(t, filepath.Join(dir, "ca.pem"), string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.cert.Raw})))
	crl := filepath.Join(dir, "ca.crl")
	ca.revoke(crl, 1)
	writeCertificate(t, filepath.Join(dir, "guard.pem"), "guard.contoso.example")

	text := strings.Replace(guardYAML(em, "enforce"), "integrations:\n",
		"integrations:\n  - name: legacy-export\n    owner: export@contoso.example\n    mode: audit\n    match: {client_cert: [\"spiffe://contoso.example/export\"]}\n", 1)
	text = strings.Replace(text, listenersYAML(), "listeners: [{name: lan, address: \"127.0.0.1:0\", tls: {certificate: guard.pem, key: guard.pem}, client_ca: ca.pem, client_crl: ca.crl}]", 1)
	file := filepath.Join(dir, "guard.yaml")
	write(t, file, text)
	g := startGuardFile(t, t.TempDir(), file)
	noMFA := em.Mint(emulator.TokenSpec{AMR: []string{"pwd"}, AppID: "99999999-9999-4999-8999-999999999999"})
	call := func(client *http.Client) (*http.Response, error) {
		r, _ := http.NewRequest(http.MethodGet, g.url+"/v1/customers?size=1", nil)
		r.Header.Set("Authorization", "Bearer "+noMFA)
		r.Header.Set("X-Client-Cert", "spiffe://contoso.example/export") // no proxy is trusted to say so
		res, err := client.Do(r)
		if err == nil {
			io.Copy(io.Discard, res.Body)
			res.Body.Close()
		}
		return res, err
	}
	export, serial := ca.issue("export", "spiffe://contoso.example/export")
	other, _ := ca.issue("SPIFFE://contoso.example/export", "spiffe://contoso.example/export2")
	if res, err := call(export); err != nil || res.StatusCode != 200 || res.Header.Get("Partnerguard-Integration") != "legacy-export" {
		t.Fatalf("its own certificate: %v %v", err, res)
	}
	if res, err := call(other); err != nil || res.StatusCode != 401 || res.Header.Get("Partnerguard-Integration") == "legacy-export" {
		t.Errorf("another name: %v %v", err, res)
	}
	if _, err := call(&http.Client{Transport: http2Transport()}); err == nil {
		t.Error("a client without a certificate got an answer")
	}
	at := len(g.text())
	ca.revoke(crl, 2, serial)
	g.await(at, "reloaded")
	// Its connection stands; the certificate no longer does.
	for range 2 {
		if res, err := call(export); err == nil && res.StatusCode != http.StatusMisdirectedRequest {
			t.Errorf("after its revocation it got %d", res.StatusCode)
		}
	}
	if res, err := call(other); err != nil || res.StatusCode != 401 {
		t.Errorf("the other one, meanwhile: %v %v", err, res)
	}
	g.stop()
	for _, c := range storedCalls(t, g.dir) {
		if (c.Integration == "legacy-export") != (c.Evidence == "client_cert") {
			t.Errorf("recorded %s by %s", c.Integration, c.Evidence)
		}
	}
}

func TestTheGuardStartsWhileTheCertificateAuthorityIsDown(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	text := strings.Replace(guardYAML(em, "audit"), listenersYAML(), fmt.Sprintf(
		"listeners: [{address: \"127.0.0.1:0\"}, {name: lan, address: \"127.0.0.1:0\", tls: {acme: [guard.contoso.example]}}]\nacme: {directory: \"https://%s/dir\", http_port: %s, tls_alpn_port: %s}",
		freePort(t), port(freePort(t)), port(freePort(t))), 1)
	g := startGuard(t, t.TempDir(), text)
	if res, _ := get(t, g.urls[0]+"/v1/customers?size=1", em.Mint(emulator.TokenSpec{})); res.StatusCode != 200 {
		t.Errorf("by the other listener a call got %d", res.StatusCode)
	}
	_, err := tls.Dial("tcp", strings.TrimPrefix(g.urls[1], "https://"), &tls.Config{ServerName: "guard.contoso.example", InsecureSkipVerify: true})
	if err == nil {
		t.Error("a handshake without a certificate succeeded")
	}
	if l, _ := g.await(0, "certificate"); !strings.Contains(l.Error, "connection refused") {
		t.Errorf("the log says %+v", l)
	}
	if _, body := get(t, g.admin+"/readyz?verbose", ""); !strings.Contains(string(body), "listener lan has none for guard.contoso.example yet") {
		t.Errorf("/readyz?verbose: %s", body)
	}
	g.stop()
}

func port(address string) string { return address[strings.LastIndexByte(address, ':')+1:] }
