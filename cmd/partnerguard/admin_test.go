package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/partnerguard/partnerguard/internal/config"
	"github.com/partnerguard/partnerguard/internal/emulator"
)

const adminToken = "0RC7nTokenOfTheAdminListener42"

// adminServed is an admin listener on a free port, with pages that say their name.
type adminServed struct {
	*admin
	t       *testing.T
	address string
	log     lockedBuffer
	refused atomic.Int64
}

func serveAdmin(t *testing.T, cfg config.Admin) *adminServed {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &adminServed{t: t, address: l.Addr().String()}
	if cfg.Address == "" {
		cfg.Address = s.address
	}
	settings, err := loadAdmin(cfg, adminEnv)
	if err != nil {
		t.Fatal(err)
	}
	pages := map[string]http.Handler{}
	for _, path := range []string{"/", "/livez", "/readyz", "/metrics"} {
		pages[path] = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprintf(w, "page %s %t", path, verbose(r))
		})
	}
	s.admin = newAdmin(adminConfig{
		Settings: settings, Pages: pages, Log: slog.New(slog.NewTextHandler(&s.log, nil)), Refused: func() { s.refused.Add(1) },
	})
	done := make(chan error)
	go func() { done <- s.serve(l) }()
	t.Cleanup(func() {
		s.close()
		if err := <-done; !errors.Is(err, http.ErrServerClosed) {
			t.Errorf("serve returned %v", err)
		}
		if strings.Contains(s.log.String(), adminToken[:10]) {
			t.Errorf("the log holds the token:\n%s", s.log.String())
		}
	})
	return s
}

func adminEnv(name string) string {
	return map[string]string{"TOKEN": adminToken, "OTHER": "other" + adminToken}[name]
}

// raw sends bytes and returns the answer to them; ok is false if there is none.
func (s *adminServed) raw(request string) (res *http.Response, body string, ok bool) {
	s.t.Helper()
	c, err := net.Dial("tcp", s.address)
	if err != nil {
		s.t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(20 * time.Second))
	go io.WriteString(c, request) // fails where the answer comes early
	method, _, _ := strings.Cut(request, " ")
	res, err = http.ReadResponse(bufio.NewReader(c), &http.Request{Method: method})
	if err != nil {
		return nil, "", false
	}
	text, _ := io.ReadAll(res.Body)
	return res, string(text), true
}

// get sends a GET with header lines.
func (s *adminServed) get(target string, headers ...string) (*http.Response, string) {
	s.t.Helper()
	lines := append([]string{"GET " + target + " HTTP/1.1", "Connection: close"}, headers...)
	if !strings.Contains(strings.Join(headers, "\n"), "Host:") {
		lines = append(lines, "Host: "+s.address)
	}
	res, body, ok := s.raw(strings.Join(lines, "\r\n") + "\r\n\r\n")
	if !ok {
		s.t.Fatalf("GET %s %q: no answer", target, headers)
	}
	return res, body
}

func TestAdminOnLoopbackAnswersToItsOwnNamesOnly(t *testing.T) {
	s := serveAdmin(t, config.Admin{Address: "127.0.0.1:9090", Hosts: []string{"guard.contoso.example", "192.0.2.7"}})
	_, port, _ := net.SplitHostPort(s.address)
	tests := []struct {
		host string
		want int
	}{
		{"127.0.0.1", 200},
		{"127.0.0.1:9090", 200},
		{"127.0.0.1:" + port, 200},
		{"127.9.9.9:9090", 200},
		{"localhost", 200},
		{"LocalHost:9090", 200},
		{"[::1]", 200},
		{"[::1]:9090", 200},
		{"[::ffff:127.0.0.1]:9090", 200},
		{"guard.contoso.example", 200},
		{"GUARD.contoso.example:443", 200},
		{"192.0.2.7:9090", 200},
		{"", 421},
		{"evil.example", 421},
		{"evil.example:9090", 421},
		{"127.0.0.1.evil.example:9090", 421},
		{"localhost.evil.example", 421},
		{"guard.contoso.example.evil.example", 421},
		{"guard.contoso.example.", 421},
		{"192.0.2.8:9090", 421},
		{"0.0.0.0:9090", 421},
		{"[::]:9090", 421},
		{"2130706433", 421}, // 127.0.0.1 as a number
		{"0x7f.1", 421},
		{"localhost:80:80", 421},
		{"evil.example@localhost", 421},
	}
	for _, test := range tests {
		for _, target := range []string{"/metrics", "/livez", "/nothing"} {
			want := test.want
			if want == 200 && target == "/nothing" {
				want = 404
			}
			res, body := s.get(target, "Host: "+test.host)
			if res.StatusCode != want && res.StatusCode != 400 || res.StatusCode == 400 && test.want == 200 {
				t.Errorf("Host %q, %s: %d %q, want %d", test.host, target, res.StatusCode, body, want)
			}
			if res.StatusCode == 421 && (!strings.Contains(body, "admin.hosts") || strings.Contains(body, "page")) {
				t.Errorf("Host %q: the refusal says %q, want the way out", test.host, body)
			}
		}
	}
	// The name may come by the request's target as well.
	if res, _ := s.get("http://evil.example/metrics", "Host: localhost"); res.StatusCode != 421 {
		t.Errorf("GET http://evil.example/metrics: %d, want 421", res.StatusCode)
	}
	if res, _, _ := s.raw("GET /metrics HTTP/1.0\r\n\r\n"); res == nil || res.StatusCode != 421 {
		t.Errorf("HTTP/1.0 without Host: %v, want 421", res)
	}
}

func TestAdminRefusesPagesOfOtherOrigins(t *testing.T) {
	open := serveAdmin(t, config.Admin{Address: "127.0.0.1:9090"})
	closed := serveAdmin(t, config.Admin{Token: "env:TOKEN"})
	tests := []struct {
		name    string
		headers []string
		want    int
	}{
		{"no browser", nil, 200},
		{"typed into the address bar", []string{"Sec-Fetch-Site: none"}, 200},
		{"its own page", []string{"Sec-Fetch-Site: same-origin"}, 200},
		{"its own origin", []string{"Origin: http://localhost:9090"}, 200},
		{"its own origin in other letters", []string{"Origin: HTTP://LocalHost:9090"}, 200},
		{"another site", []string{"Origin: https://evil.example"}, 403},
		{"another scheme", []string{"Origin: https://localhost:9090"}, 403},
		{"another port", []string{"Origin: http://localhost:3000"}, 403},
		{"no port", []string{"Origin: http://localhost"}, 403},
		{"another name of this machine", []string{"Origin: http://127.0.0.1:9090"}, 403},
		{"its own origin as the beginning", []string{"Origin: http://localhost:9090.evil.example"}, 403},
		{"its own origin as a user name", []string{"Origin: http://localhost:9090@evil.example"}, 403},
		{"a path", []string{"Origin: http://localhost:9090/"}, 403},
		{"null", []string{"Origin: null"}, 403},
		{"an empty origin", []string{"Origin:"}, 403},
		{"two origins, the first its own", []string{"Origin: http://localhost:9090", "Origin: https://evil.example"}, 403},
		{"two in one", []string{"Origin: http://localhost:9090 https://evil.example"}, 403},
		{"a page of another site", []string{"Sec-Fetch-Site: cross-site"}, 403},
		{"a page of another port", []string{"Sec-Fetch-Site: same-site"}, 403},
		{"an empty Sec-Fetch-Site", []string{"Sec-Fetch-Site:"}, 403},
		{"both, of which one is foreign", []string{"Sec-Fetch-Site: same-origin", "Origin: null"}, 403},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			for _, path := range []string{"/metrics", "/livez"} {
				host := "Host: localhost:9090"
				if res, body := open.get(path, append(test.headers, host)...); res.StatusCode != test.want {
					t.Errorf("open, %s: %d %q, want %d", path, res.StatusCode, body, test.want)
				}
				if res, body := closed.get(path, append(test.headers, host, "Authorization: Bearer "+adminToken)...); res.StatusCode != test.want {
					t.Errorf("with the token, %s: %d %q, want %d", path, res.StatusCode, body, test.want)
				}
			}
		})
	}
}

func TestAdminOnlyReads(t *testing.T) {
	for name, s := range map[string]*adminServed{"open": serveAdmin(t, config.Admin{}), "token": serveAdmin(t, config.Admin{Token: "env:TOKEN"})} {
		request := func(method, target string) string {
			return method + " " + target + " HTTP/1.1\r\nHost: " + s.address + "\r\nAuthorization: Bearer " + adminToken + "\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
		}
		for _, method := range []string{"POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "TRACK", "PROPFIND", "get", "GETT"} {
			for _, path := range []string{"/", "/metrics", "/livez", "/nothing"} {
				res, body, ok := s.raw(request(method, path))
				if !ok || res.StatusCode != 405 || res.Header.Get("Allow") != "GET, HEAD" || strings.Contains(body, "page") {
					t.Errorf("%s: %s %s: %v %q, want 405", name, method, path, res, body)
				}
			}
		}
		for _, raw := range []string{request("OPTIONS", "*"), request("CONNECT", "127.0.0.1:443"), "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"} {
			if res, body, ok := s.raw(raw); ok && (res.StatusCode < 400 || strings.Contains(body, "page")) {
				t.Errorf("%s: %q: %d %q", name, raw, res.StatusCode, body)
			}
		}
		res, body, ok := s.raw(request("HEAD", "/metrics"))
		if !ok || res.StatusCode != 200 || body != "" || res.ContentLength != int64(len("page /metrics false")) {
			t.Errorf("%s: HEAD: %v %q, want the header of GET", name, res, body)
		}
		res, body, ok = s.raw("HEAD /nothing HTTP/1.1\r\nHost: " + s.address + "\r\nAuthorization: Bearer " + adminToken + "\r\nConnection: close\r\n\r\n")
		if !ok || res.StatusCode != 404 || body != "" {
			t.Errorf("%s: HEAD of an unknown page: %v %q, want 404", name, res, body)
		}
	}
}

func TestAdminPagesHaveExactPaths(t *testing.T) {
	s := serveAdmin(t, config.Admin{})
	for _, target := range []string{
		"//livez", "/livez/", "/Livez", "/metrics/", "/./metrics", "/x/../metrics", "/%2e/metrics", "/%2fmetrics", "/metrics%00", "/metrics%20",
		"/debug/pprof/", "/debug/vars", "/api/v1/report", "/favicon.ico", "/index.html", "/..", "/v1/invoices", "/i/x/v1/invoices",
	} {
		res, body := s.get(target)
		if res.StatusCode != 404 && res.StatusCode != 400 || res.Header.Get("Location") != "" || strings.Contains(body, "page /") {
			t.Errorf("%s: %d %q to %q, want 404", target, res.StatusCode, body, res.Header.Get("Location"))
		}
	}
	for target, want := range map[string]string{
		"/?x": "page / false", "/%6detrics": "page /metrics false", "/readyz?verbose": "page /readyz true", "http://" + s.address + "/livez": "page /livez false",
	} {
		if res, body := s.get(target); res.StatusCode != 200 || body != want {
			t.Errorf("%s: %d %q, want %q", target, res.StatusCode, body, want)
		}
	}
}

func TestAdminToken(t *testing.T) {
	tests := []struct {
		name    string
		headers []string
		want    int
	}{
		{"the token", []string{"Authorization: Bearer " + adminToken}, 200},
		{"a scheme in small letters", []string{"Authorization: bearer " + adminToken}, 200},
		{"a scheme in capitals", []string{"AUTHORIZATION: BEARER " + adminToken}, 200},
		{"two spaces", []string{"Authorization: Bearer  " + adminToken}, 200},
		{"spaces around", []string{"Authorization:   Bearer " + adminToken + "  "}, 200},
		{"none", nil, 401},
		{"an empty header", []string{"Authorization:"}, 401},
		{"the scheme alone", []string{"Authorization: Bearer"}, 401},
		{"an empty token", []string{"Authorization: Bearer  "}, 401},
		{"the token alone", []string{"Authorization: " + adminToken}, 401},
		{"another scheme", []string{"Authorization: Basic " + adminToken}, 401},
		{"no space", []string{"Authorization: Bearer" + adminToken}, 401},
		{"a tab", []string{"Authorization: Bearer\t" + adminToken}, 401},
		{"another token", []string{"Authorization: Bearer " + strings.ToLower(adminToken)}, 401},
		{"its beginning", []string{"Authorization: Bearer " + adminToken[:len(adminToken)-1]}, 401},
		{"more than it", []string{"Authorization: Bearer " + adminToken + "2"}, 401},
		{"it and another word", []string{"Authorization: Bearer " + adminToken + " x"}, 401},
		{"it among several", []string{"Authorization: Bearer x, Bearer " + adminToken}, 401},
		{"the header twice", []string{"Authorization: Bearer " + adminToken, "Authorization: Bearer " + adminToken}, 401},
		{"first wrong, then right", []string{"Authorization: Bearer x", "Authorization: Bearer " + adminToken}, 401},
		{"in another header", []string{"Proxy-Authorization: Bearer " + adminToken}, 401},
		{"in a cookie", []string{"Cookie: token=" + adminToken}, 401},
		{"16 KiB", []string{"Authorization: Bearer " + strings.Repeat(adminToken, 500)}, 401},
		{"1 MB", []string{"Authorization: Bearer " + strings.Repeat("x", 1<<20)}, 431},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			s := serveAdmin(t, config.Admin{Token: "env:TOKEN"})
			for _, path := range []string{"/metrics", "/", "/readyz?verbose", "/nothing"} {
				res, body := s.get(path, test.headers...)
				want := test.want
				if want == 200 && path == "/nothing" {
					want = 404
				}
				if res.StatusCode != want {
					t.Errorf("%s: %d %.200q, want %d", path, res.StatusCode, body, want)
				}
				if want != 401 {
					continue
				}
				if challenge := res.Header.Get("WWW-Authenticate"); !strings.HasPrefix(challenge, "Bearer") {
					t.Errorf("%s: WWW-Authenticate %q, want Bearer", path, challenge)
				}
				if strings.Contains(body, "page /") || strings.Contains(fmt.Sprint(body, res.Header), adminToken) {
					t.Errorf("%s: the refusal says %q %v", path, body, res.Header)
				}
			}
			// Refusing harms nobody else.
			if res, _ := s.get("/metrics", "Authorization: Bearer "+adminToken); res.StatusCode != 200 {
				t.Errorf("afterwards: %d", res.StatusCode)
			}
		})
	}
}

// Probes know no token: they learn whether the guard is up, and no details.
func TestAdminProbesNeedNoToken(t *testing.T) {
	s := serveAdmin(t, config.Admin{Token: "env:TOKEN"})
	for target, want := range map[string]string{
		"/livez": "page /livez false", "/livez?verbose": "page /livez true", "/readyz": "page /readyz false", "/readyz?x=verbose": "page /readyz false",
		"/readyz?Verbose": "page /readyz false", "/readyz?verbose;x": "page /readyz false", "/readyz?ver%ZZbose": "page /readyz false",
		"/readyz?verbose": "", "/readyz?verbose=0": "", "/readyz?a&verbose": "", "/readyz?%76erbose": "", "/%72eadyz?verbose": "", "/readyz/": "", "/": "",
	} {
		for _, host := range []string{s.address, "10.9.8.7:9090", "guard.monitoring.svc:9090"} {
			res, body := s.get(target, "Host: "+host)
			if want == "" && res.StatusCode != 401 || want != "" && (res.StatusCode != 200 || body != want) {
				t.Errorf("%s at %s: %d %q, want %q", target, host, res.StatusCode, body, want)
			}
		}
	}
	if n := s.refused.Load(); n != 0 {
		t.Errorf("%d requests without a credential count as wrong ones", n)
	}
}

func TestAdminSlowsGuessing(t *testing.T) {
	s := serveAdmin(t, config.Admin{Token: "env:TOKEN"})
	now := time.Unix(1e9, 0)
	s.wrong = newFailureLimit(func() time.Time { return now })
	try := func(token string) int {
		res, _ := s.get("/metrics", "Authorization: Bearer "+token)
		return res.StatusCode
	}
	for i := range maxFailures {
		if got := try(fmt.Sprint("guess", i)); got != 401 {
			t.Fatalf("guess %d: %d, want 401", i, got)
		}
	}
	if guess, right := try("guess"), try(adminToken); guess != 429 || right != 429 {
		t.Errorf("after %d guesses the next gets %d and the token %d, want 429 unseen", maxFailures, guess, right)
	}
	if res, _ := s.get("/readyz"); res.StatusCode != 200 {
		t.Errorf("a probe from there gets %d, want 200", res.StatusCode)
	}
	now = now.Add(time.Second / maxFailures)
	if right, guess, next := try(adminToken), try("guess"), try("guess"); right != 200 || guess != 401 || next != 429 {
		t.Errorf("later: the token %d, a guess %d, one more %d; want 200 401 429", right, guess, next)
	}
	if n := s.refused.Load(); n != maxFailures+4 {
		t.Errorf("%d are counted as refused, want %d", n, maxFailures+4)
	}
	if lines := strings.Count(s.log.String(), "admin credential refused"); lines < 1 || lines > 5 {
		t.Errorf("%d lines in the log, want about one a second:\n%s", lines, s.log.String())
	}
	if strings.Contains(s.log.String(), "guess") {
		t.Errorf("the log holds what was tried:\n%s", s.log.String())
	}
}

func TestAdminLimitsEachPeerInBoundedMemory(t *testing.T) {
	now := time.Unix(1e9, 0)
	f := newFailureLimit(func() time.Time { return now })
	peer := func(s string) netip.Prefix { return peerOf(&http.Request{RemoteAddr: s}) }
	for range maxFailures {
		f.add(peer("192.0.2.1:1000"))
		f.add(peer("[2001:db8:1:2::1]:1000"))
	}
	for address, want := range map[string]bool{
		"192.0.2.1:2000": true, "[::ffff:192.0.2.1]:1": true, "[2001:db8:1:2:ffff::9]:1": true,
		"192.0.2.2:1000": false, "[2001:db8:1:3::1]:1": false,
	} {
		// Another peer shares the place once in 1,024 times: try another seed then.
		if got := f.spent(peer(address)); got != want && f.place(peer(address)) != f.place(peer("192.0.2.1:1")) && f.place(peer(address)) != f.place(peer("[2001:db8:1:2::1]:1")) {
			t.Errorf("%s spent: %t, want %t", address, got, want)
		}
	}
	if allocated := testing.AllocsPerRun(1000, func() { f.add(netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 1, 2, 3}), 32)) }); allocated > 0 {
		t.Errorf("a failure allocates %v times", allocated)
	}
}

// Should an open listener be reachable from the network in spite of the
// configuration's checks, it answers nobody.
func TestAdminWithoutCredentialsOffLoopbackAnswersNobody(t *testing.T) {
	s := serveAdmin(t, config.Admin{})
	for name, local := range map[string]net.Addr{
		"the network": &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 9090}, "every interface": &net.TCPAddr{}, "a Unix socket": &net.UnixAddr{}, "nothing known": nil,
	} {
		r := httptest.NewRequest("GET", "http://localhost/metrics", nil)
		if local != nil {
			r = r.WithContext(context.WithValue(r.Context(), http.LocalAddrContextKey, local))
		}
		w := httptest.NewRecorder()
		s.ServeHTTP(w, r)
		if w.Code != 403 {
			t.Errorf("%s: %d %q, want 403", name, w.Code, w.Body)
		}
	}
}

func TestAdminHeadersAreOnEveryAnswer(t *testing.T) {
	open, closed := serveAdmin(t, config.Admin{}), serveAdmin(t, config.Admin{Token: "env:TOKEN"})
	answers := map[int]http.Header{}
	add := func(res *http.Response, _ string) { answers[res.StatusCode] = res.Header }
	add(open.get("/metrics"))
	add(open.get("/nothing"))
	add(open.get("/metrics", "Host: evil.example"))
	add(open.get("/metrics", "Origin: null"))
	add(closed.get("/metrics"))
	for range maxFailures + 1 {
		add(closed.get("/metrics", "Authorization: Bearer x"))
	}
	res, body, _ := open.raw("POST /metrics HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n")
	add(res, body)
	want := http.Header{}
	for name, value := range adminHeaders {
		want.Set(name, value)
	}
	if csp := want.Get("Content-Security-Policy"); !strings.Contains(csp, "default-src 'none'") || !strings.Contains(csp, "frame-ancestors 'none'") || strings.Contains(csp, "unsafe") {
		t.Errorf("Content-Security-Policy %q", csp)
	}
	for _, status := range []int{200, 401, 403, 404, 405, 421, 429} {
		got := http.Header{}
		for name := range adminHeaders {
			if v := answers[status].Values(name); len(v) > 0 {
				got[http.CanonicalHeaderKey(name)] = v
			}
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("headers of %d (-want +got):\n%s", status, diff)
		}
	}
}

// adminCA issues client certificates.
type adminCA struct {
	file string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAdminCA(t *testing.T) *adminCA {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ca := &adminCA{key: key, file: filepath.Join(t.TempDir(), "ca.pem"), cert: &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "an authority"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}}
	der, err := x509.CreateCertificate(rand.Reader, ca.cert, ca.cert, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	write(t, ca.file, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})))
	return ca
}

func (ca *adminCA) issue(t *testing.T, usage x509.ExtKeyUsage) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "prometheus"}, ExtKeyUsage: []x509.ExtKeyUsage{usage},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature,
	}
	der, err := x509.CreateCertificate(rand.Reader, leaf, ca.cert, key.Public(), ca.key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// adminClient trusts the server's certificate and shows one of its own, if it has
// one, whatever the server asks for.
func adminClient(t *testing.T, server certificate, own *tls.Certificate) *http.Client {
	t.Helper()
	cfg := &tls.Config{RootCAs: server.pool}
	if own != nil {
		cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return own, nil }
	}
	tr := &http.Transport{TLSClientConfig: cfg}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr}
}

func adminAsk(t *testing.T, c *http.Client, url, host, token string) int {
	t.Helper()
	r, err := http.NewRequest("GET", url, nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Host = host
	if token != "" {
		r.Header.Set("Authorization", "Bearer "+token)
	}
	res, err := c.Do(r)
	if err != nil {
		return 0
	}
	defer res.Body.Close()
	io.Copy(io.Discard, res.Body)
	return res.StatusCode
}

func TestAdminClientCertificate(t *testing.T) {
	server, ca, other := throwAwayCertificate(t), newAdminCA(t), newAdminCA(t)
	own := &config.TLS{Certificate: server.certificate, Key: server.key}
	good := ca.issue(t, x509.ExtKeyUsageClientAuth)
	foreign := other.issue(t, x509.ExtKeyUsageClientAuth)
	serverOnly := ca.issue(t, x509.ExtKeyUsageServerAuth)
	for _, test := range []struct {
		name             string
		shown            *tls.Certificate
		token            string
		alone, withToken int // with client_ca alone; with token, too; 0: no handshake
	}{
		{"a certificate of the CA", &good, "", 200, 200},
		{"none", nil, "", 403, 401},
		{"the token", nil, adminToken, 403, 200},
		{"a wrong token", nil, "x", 403, 401},
		{"a certificate and a wrong token", &good, "x", 200, 200},
		{"a certificate of another CA", &foreign, adminToken, 0, 0},
		{"a certificate that is for servers", &serverOnly, adminToken, 0, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			alone := serveAdmin(t, config.Admin{TLS: own, ClientCA: ca.file})
			both := serveAdmin(t, config.Admin{TLS: own, ClientCA: ca.file, Token: "env:TOKEN"})
			c := adminClient(t, server, test.shown)
			for s, want := range map[*adminServed]int{alone: test.alone, both: test.withToken} {
				url := "https://" + s.address
				if got := adminAsk(t, c, url+"/metrics", "", test.token); got != want {
					t.Errorf("token too: %t: %d, want %d", s == both, got, want)
				}
				probed := 200
				if want == 0 {
					probed = 0
				}
				if got := adminAsk(t, c, url+"/readyz", "", ""); got != probed {
					t.Errorf("token too: %t: a probe gets %d, want %d", s == both, got, probed)
				}
			}
		})
	}
	// A browser shows its certificate to whatever page asks: the name must be right.
	s := serveAdmin(t, config.Admin{TLS: own, ClientCA: ca.file, Hosts: []string{"guard.contoso.example"}})
	c := adminClient(t, server, &good)
	for host, want := range map[string]int{
		"localhost": 200, "guard.contoso.example:9090": 200, "10.1.2.3:9090": 200, "evil.example": 421, "evil.example:9090": 421,
	} {
		if got := adminAsk(t, c, "https://"+s.address+"/metrics", host, ""); got != want {
			t.Errorf("Host %s: %d, want %d", host, got, want)
		}
	}
}

func TestAdminReload(t *testing.T) {
	server, next, ca, other := throwAwayCertificate(t), throwAwayCertificate(t), newAdminCA(t), newAdminCA(t)
	cfg := config.Admin{TLS: &config.TLS{Certificate: server.certificate, Key: server.key}, ClientCA: ca.file, Token: "env:TOKEN"}
	s := serveAdmin(t, cfg)
	url := "https://" + s.address + "/metrics"
	own := ca.issue(t, x509.ExtKeyUsageClientAuth)
	byToken, byCertificate := adminClient(t, server, nil), adminClient(t, server, &own)
	if a, b := adminAsk(t, byToken, url, "", adminToken), adminAsk(t, byCertificate, url, "", ""); a != 200 || b != 200 {
		t.Fatalf("before: token %d, certificate %d", a, b)
	}
	load := func() {
		t.Helper()
		settings, err := loadAdmin(cfg, adminEnv)
		if err != nil {
			t.Fatal(err)
		}
		s.set(settings)
	}

	// Over the connections that are open.
	cfg.Token, cfg.ClientCA = "env:OTHER", other.file
	load()
	if a, b := adminAsk(t, byToken, url, "", adminToken), adminAsk(t, byCertificate, url, "", ""); a != 401 || b != 401 {
		t.Errorf("the old token gets %d and the old certificate %d, want 401", a, b)
	}
	if got := adminAsk(t, byToken, url, "", adminEnv("OTHER")); got != 200 {
		t.Errorf("the new token gets %d", got)
	}
	// With the next handshake.
	cfg.TLS = &config.TLS{Certificate: next.certificate, Key: next.key}
	load()
	byToken.CloseIdleConnections()
	if got := adminAsk(t, byToken, url, "", adminEnv("OTHER")); got != 0 {
		t.Errorf("whoever trusts the old certificate only gets %d, want no answer", got)
	}
	if got := adminAsk(t, adminClient(t, next, nil), url, "", adminEnv("OTHER")); got != 200 {
		t.Errorf("whoever trusts the new certificate gets %d", got)
	}
	if c, err := tls.Dial("tcp", s.address, &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS11}); err == nil {
		c.Close()
		t.Error("TLS 1.1 is spoken")
	}
}

func TestAdminMistakesAreNamed(t *testing.T) {
	dir := t.TempDir()
	blank, text := filepath.Join(dir, "blank"), filepath.Join(dir, "text")
	write(t, blank, "\n")
	write(t, text, adminToken+"\n"+adminToken)
	server := throwAwayCertificate(t)
	own := &config.TLS{Certificate: server.certificate, Key: server.key}
	for name, test := range map[string]struct {
		cfg  config.Admin
		want string
	}{
		"no token file":          {config.Admin{Token: "file:/nowhere"}, "admin.token: "},
		"an empty token file":    {config.Admin{Token: config.Secret("file:" + blank)}, "admin.token: "},
		"two tokens":             {config.Admin{Token: config.Secret("file:" + text)}, "admin.token: "},
		"no such variable":       {config.Admin{Token: "env:NOTHING"}, "admin.token: "},
		"a literal token":        {config.Admin{Token: adminToken}, "admin.token: "},
		"no certificate":         {config.Admin{TLS: &config.TLS{Certificate: text, Key: server.key}}, "admin.tls: "},
		"no client CA file":      {config.Admin{TLS: own, ClientCA: "/nowhere"}, "admin.client_ca: "},
		"no CA in the CA's file": {config.Admin{TLS: own, ClientCA: text}, "admin.client_ca: "},
	} {
		_, err := loadAdmin(test.cfg, adminEnv)
		if err == nil || !strings.HasPrefix(err.Error(), test.want) || strings.Contains(err.Error(), adminToken) {
			t.Errorf("%s: error %v, want %q…", name, err, test.want)
		}
	}
}

// Whoever holds all connections keeps others waiting, and no longer.
func TestAdminLimitsConnections(t *testing.T) {
	s := serveAdmin(t, config.Admin{})
	var held []net.Conn
	for range maxAdminConnections {
		c, err := net.Dial("tcp", s.address)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		// Answered, so accepted.
		c.SetDeadline(time.Now().Add(20 * time.Second))
		fmt.Fprintf(c, "GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
		if _, err := http.ReadResponse(bufio.NewReader(c), nil); err != nil {
			t.Fatal(err)
		}
		held = append(held, c)
	}
	answered := make(chan int, 1)
	go func() {
		res, _, ok := s.raw("GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
		if !ok {
			answered <- 0
			return
		}
		answered <- res.StatusCode
	}()
	select {
	case status := <-answered:
		t.Errorf("one connection over the limit gets %d at once", status)
	case <-time.After(100 * time.Millisecond):
	}
	held[0].Close()
	if status := <-answered; status != 200 {
		t.Errorf("when a connection is free it gets %d", status)
	}
}

func TestCheckAsksARunningGuard(t *testing.T) {
	server, ca := throwAwayCertificate(t), newAdminCA(t)
	own := &config.TLS{Certificate: server.certificate, Key: server.key}
	another := throwAwayCertificate(t)
	blank := filepath.Join(t.TempDir(), "blank")
	write(t, blank, "\n")
	details, bare := "page /readyz true", "page /readyz false"
	for _, test := range []struct {
		name          string
		runs          config.Admin
		asks          func(*config.Admin)
		want, wantErr string
	}{
		{name: "open", want: details},
		{name: "by token", runs: config.Admin{Token: "env:TOKEN"}, want: details},
		{name: "by token over TLS", runs: config.Admin{Token: "env:TOKEN", TLS: own}, want: details},
		{name: "a token that was changed", runs: config.Admin{Token: "env:TOKEN", TLS: own}, asks: func(a *config.Admin) { a.Token = "env:OTHER" }, want: bare},
		{name: "a token that cannot be read", runs: config.Admin{Token: "env:TOKEN", TLS: own}, asks: func(a *config.Admin) { a.Token = "file:/nowhere" }, want: bare},
		{name: "by client certificate", runs: config.Admin{ClientCA: ca.file, TLS: own}, want: bare},
		{name: "by client certificate or token", runs: config.Admin{ClientCA: ca.file, Token: "env:TOKEN", TLS: own}, want: details},
		{name: "another certificate", runs: config.Admin{Token: "env:TOKEN", TLS: own}, wantErr: "it shows another certificate than ",
			asks: func(a *config.Admin) { a.TLS = &config.TLS{Certificate: another.certificate} }},
		{name: "no certificate", runs: config.Admin{Token: "env:TOKEN", TLS: own}, wantErr: "admin.tls.certificate: ",
			asks: func(a *config.Admin) { a.TLS = &config.TLS{Certificate: blank} }},
		{name: "TLS where there is none", runs: config.Admin{Token: "env:TOKEN"}, wantErr: "ask 127.0.0.1:", asks: func(a *config.Admin) { a.TLS = own }},
		{name: "none where there is TLS", runs: config.Admin{Token: "env:TOKEN", TLS: own}, wantErr: "is not ready: 400", asks: func(a *config.Admin) { a.TLS = nil }},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := serveAdmin(t, test.runs)
			asks := test.runs
			asks.Address = s.address
			if test.asks != nil {
				test.asks(&asks)
			}
			var out bytes.Buffer
			err := askReady(&out, asks, adminEnv)
			switch {
			case test.wantErr == "" && (err != nil || out.String() != test.want):
				t.Errorf("it says %q, error %v; want %q", out.String(), err, test.want)
			case test.wantErr != "" && (err == nil || !strings.Contains(err.Error(), test.wantErr)):
				t.Errorf("error %v, want %q", err, test.wantErr)
			}
			if strings.Contains(fmt.Sprint(err, out.String()), adminToken) {
				t.Errorf("the token is shown: %v %s", err, out.String())
			}
		})
	}
	for address, want := range map[string]string{
		"0.0.0.0:9090": "localhost:9090", ":9090": "localhost:9090", "[::]:9090": "localhost:9090", "127.0.0.1:9090": "127.0.0.1:9090", "guard.example:1": "guard.example:1",
	} {
		if got := dialable(address); got != want {
			t.Errorf("dialable(%q) = %q, want %q", address, got, want)
		}
	}
}

// The program itself, its admin listener with a token and TLS.
func TestAdminOfARunningGuard(t *testing.T) {
	em := startEmulator(t, emulator.Config{})
	server := throwAwayCertificate(t)
	dir := t.TempDir()
	token, file := filepath.Join(dir, "token"), filepath.Join(dir, "guard.yaml")
	write(t, token, adminToken+"\n")
	admin := fmt.Sprintf("admin: {address: %q, token: \"file:%s\", tls: {certificate: %q, key: %q}}", freePort(t), token, server.certificate, server.key)
	yaml := strings.Replace(guardYAML(em, "audit", "timeouts: {unready: 10ms}"), `admin: {address: "127.0.0.1:0"}`, admin, 1)
	write(t, file, yaml)
	g := startGuard(t, t.TempDir(), yaml)
	c := adminClient(t, server, nil)
	for path, want := range map[string][2]int{"/livez": {200, 200}, "/readyz": {200, 200}, "/readyz?verbose": {401, 200}, "/metrics": {401, 200}, "/": {401, 200}, "/x": {401, 404}} {
		if without, with := adminAsk(t, c, g.admin+path, "", ""), adminAsk(t, c, g.admin+path, "", adminToken); without != want[0] || with != want[1] {
			t.Errorf("%s: %d without the token and %d with it, want %d", path, without, with, want)
		}
	}
	if out, errs, code := partnerguard(t, "check", "--running", "-c", file); code != 0 || !strings.Contains(out, "ready\n") || !strings.Contains(out, "ledger") {
		t.Errorf("check --running: exit %d\n%s%s", code, out, errs)
	}
	write(t, token, "x"+adminToken+"\n")
	awaiting(t, func() (int, bool) {
		status := adminAsk(t, c, g.admin+"/metrics", "", "x"+adminToken)
		return status, status == 200
	})
	if got := adminAsk(t, c, g.admin+"/metrics", "", adminToken); got != 401 {
		t.Errorf("the token of before gets %d, want 401", got)
	}
	g.stop()
	if strings.Contains(g.text(), adminToken) {
		t.Errorf("the log holds the token:\n%s", g.text())
	}
}

// Whatever is asked of a listener that proxies, however it is written, is a call or
// a refused call, or no request at all. The admin listener never answers there.
func TestAdminNeverAnswersOnAProxiedListener(t *testing.T) {
	em := startEmulator(t, emulator.Config{})
	dir := t.TempDir()
	own := freePort(t)
	yaml := strings.Replace(guardYAML(em, "audit"), `admin: {address: "127.0.0.1:0"}`, fmt.Sprintf("admin: {address: %q, hosts: [guard.contoso.example]}", own), 1)
	g := startGuard(t, dir, yaml)
	token := em.Mint(emulator.TokenSpec{})

	var targets []string
	for _, page := range []string{"/", "/metrics", "/livez", "/readyz", "/readyz?verbose", "/api/v1/report", "/api/v1/calls", "/debug/pprof/", "/debug/vars", "/console", "/favicon.ico"} {
		targets = append(targets, page, "/i/nightly-billing"+page, "/i/nobody"+page, "/i/admin"+page, "/"+page, "//"+own+page,
			"http://"+own+page, "http://localhost:9090"+page, "http://guard.contoso.example"+page, "HTTP://admin"+page,
			page+"/", page+"%20", page+"%2f", page+";x", page+"?token=x", "/."+page, "/x/.."+page, "/%2e"+page, "/%2f"+page, strings.ToUpper(page),
			"/%6"+page[1:], page+"#x", "\\"+page)
		if len(page) > 1 {
			targets = append(targets, fmt.Sprintf("/%%%02x%s", page[1], page[2:]), fmt.Sprintf("/%%25%02x%s", page[1], page[2:]))
		}
	}
	targets = append(targets, "*", own, "localhost:9090")
	var hosts []string
	for _, host := range []string{strings.TrimPrefix(g.url, "http://"), own, "localhost", "guard.contoso.example", "admin", ""} {
		hosts = append(hosts, "Host: "+host)
	}
	agents := []string{"", "kube-probe/1.33", "Prometheus/3.5.0", "partnerguard", "GoogleHC/1.0", "ELB-HealthChecker/2.0"}

	// Only for what it is certainly not: what the admin listener itself says.
	_, metrics := get(t, "http://"+own+"/metrics", "")
	if !bytes.Contains(metrics, []byte("partnerguard_build_info")) {
		t.Fatal("the admin listener does not tell of itself at its own address")
	}
	calls := 0
	for i, target := range targets {
		for _, method := range []string{"GET", "HEAD", "OPTIONS"} {
			em.Reset()
			host, agent := hosts[i%len(hosts)], agents[i%len(agents)]
			raw := fmt.Sprintf("%s %s HTTP/1.1\r\n%s\r\nUser-Agent: %s\r\nAuthorization: Bearer %s\r\nX-Forwarded-Host: %s\r\nX-Original-URL: /metrics\r\nX-Rewrite-URL: /metrics\r\nConnection: close\r\n\r\n",
				method, target, host, agent, token, own)
			c, err := net.Dial("tcp", strings.TrimPrefix(g.url, "http://"))
			if err != nil {
				t.Fatal(err)
			}
			c.SetDeadline(time.Now().Add(20 * time.Second))
			io.WriteString(c, raw)
			res, err := http.ReadResponse(bufio.NewReader(c), &http.Request{Method: method})
			if err != nil {
				t.Fatalf("%s %s: %v", method, target, err)
			}
			body, _ := io.ReadAll(res.Body)
			c.Close()

			what := fmt.Sprintf("%s %s (%s, %s)", method, target, host, agent)
			reached, call := em.Count(), res.Header.Get("Partnerguard-Call") != ""
			if call {
				calls++
			}
			switch {
			case res.Header.Get("Content-Security-Policy") != "" || bytes.Contains(body, []byte("partnerguard_")) || bytes.Contains(body, []byte("/readyz?verbose")) || string(body) == "ok\n" || strings.HasPrefix(string(body), "ready\n"):
				t.Errorf("%s: the admin listener answers: %d %s", what, res.StatusCode, body)
			case call && reached == 0 && res.Header.Get("Partnerguard-Effect") != "reject":
				t.Errorf("%s: %d %s, neither forwarded nor refused", what, res.StatusCode, body)
			case !call && res.StatusCode != http.StatusBadRequest:
				t.Errorf("%s: %d %s is the answer to no call", what, res.StatusCode, body)
			case reached > 1 || reached == 1 && !call:
				t.Errorf("%s: reached the upstream %d times, call %t", what, reached, call)
			}
		}
	}
	g.stop()
	decisions := 0
	for _, l := range ledgerLines(t, dir) {
		if l.Type == "decision" {
			decisions++
		}
	}
	if calls < len(targets) || decisions != calls {
		t.Errorf("%d calls were answered as such, and %d stand in the ledger", calls, decisions)
	}
}
