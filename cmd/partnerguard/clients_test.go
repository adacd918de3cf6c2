package main

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/AzureAD/microsoft-authentication-library-for-go/apps/confidential"
	"github.com/partnerguard/partnerguard/internal/emulator"
)

// Three ways lead a client into the guard: the base URL at the host root, a
// listener of its own, and a prefix for scripts with a literal URL.
type wayIn struct {
	name        string
	base        func(g *guardProcess) string
	integration string // whose the call is
	evidence    string
}

var (
	waysIn = []wayIn{
		{"host root", func(g *guardProcess) string { return g.urls[0] }, emulator.AppCompliant, "app_id"},
		{"own listener", func(g *guardProcess) string { return g.urls[1] }, "invoice-export", "listener"},
		{"prefix", func(g *guardProcess) string { return g.urls[0] + "/i/order-export" }, "order-export", "path_prefix"},
	}
	// strangerID is a client id that the configuration does not know, so that the
	// listener and the prefix have a name to give.
	strangerID = "3f0c6a1e-5b7d-4d29-9c84-6e1f0a2b7d55"
)

// clientsYAML has a plain listener, one that belongs to an integration, and an
// integration that is known by its prefix only.
func clientsYAML(em *emulator.Emulator, mode string) string {
	yaml := guardYAML(em, mode)
	yaml = strings.Replace(yaml, "integrations:\n",
		"integrations:\n  - {name: invoice-export, owner: invoices@contoso.example}\n  - {name: order-export, owner: orders@contoso.example}\n", 1)
	return strings.Replace(yaml, `listeners: [{address: "127.0.0.1:0"}]`,
		`listeners: [{address: "127.0.0.1:0"}, {name: export-port, address: "127.0.0.1:0", integration: invoice-export}]`, 1)
}

// clientCall is one call that a client of others makes, clientAnswer what the
// client tells of the answer.
type clientCall struct {
	Method  string            `json:"method"`
	URL     string            `json:"url"`
	Headers map[string]string `json:"headers"`
	Body    string            `json:"body"`
}

type clientAnswer struct {
	Status  int
	Headers map[string]string // names in lower case
	Body    []byte
}

// foreignClient is an HTTP client that is none of ours.
type foreignClient struct {
	name   string
	agent  string // how its User-Agent begins
	unzips bool   // undoes Content-Encoding by itself
	call   func(t *testing.T, c clientCall) clientAnswer
}

const pythonClient = `
import base64, json, os, ssl, sys, urllib.error, urllib.request

context = ssl.create_default_context(cafile=os.environ.get("CLIENT_CA"))
for line in sys.stdin:
    call = json.loads(line)
    request = urllib.request.Request(call["url"], method=call["method"], headers=call["headers"],
                                     data=call["body"].encode() or None)
    try:
        answer = urllib.request.urlopen(request, timeout=30, context=context)
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        print(json.dumps({
            "status": answer.code,
            "headers": {name.lower(): value for name, value in answer.headers.items()},
            "body": base64.b64encode(answer.read()).decode(),
        }), flush=True)
`

const nodeClient = `
const lines = require("node:readline").createInterface({input: process.stdin});
(async () => {
  for await (const line of lines) {
    const call = JSON.parse(line);
    const answer = await fetch(call.url, {method: call.method, headers: call.headers, body: call.body || undefined});
    const body = Buffer.from(await answer.arrayBuffer());
    console.log(JSON.stringify({status: answer.status, headers: Object.fromEntries(answer.headers), body: body.toString("base64")}));
  }
})();
`

// program finds a program that is none of ours. Where it is missing the test is
// skipped, but not in CI.
func program(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	switch {
	case err == nil:
		return path
	case os.Getenv("CI") == "true":
		t.Fatalf("%s is not installed, and CI must have it", name)
	}
	t.Skipf("%s is not installed", name)
	return ""
}

// foreignClients lists the clients by what makes one; ca is a file of certificates
// to trust, or empty.
var foreignClients = []struct {
	name string
	make func(t *testing.T, ca string) foreignClient
}{
	{"curl", func(t *testing.T, ca string) foreignClient { return curlClient(t, ca) }},
	{"Python urllib", func(t *testing.T, ca string) foreignClient {
		path := program(t, "python3")
		return foreignClient{name: "Python urllib", agent: "Python-urllib/", call: talkTo(t, []string{"CLIENT_CA=" + ca}, path, "-c", pythonClient)}
	}},
	{"Node fetch", func(t *testing.T, ca string) foreignClient {
		path := program(t, "node")
		return foreignClient{name: "Node fetch", agent: "node", unzips: true, call: talkTo(t, []string{"NODE_EXTRA_CA_CERTS=" + ca}, path, "-e", nodeClient)}
	}},
}

// curlClient is curl, run once a call.
func curlClient(t *testing.T, ca string, options ...string) foreignClient {
	path := program(t, "curl")
	return foreignClient{name: "curl", agent: "curl/", call: func(t *testing.T, c clientCall) clientAnswer {
		t.Helper()
		head := filepath.Join(t.TempDir(), "head")
		args := append([]string{"-sS", "--noproxy", "*", "--max-time", "30", "-D", head}, options...)
		if ca != "" {
			args = append(args, "--cacert", ca)
		}
		if c.Method == http.MethodHead {
			args = append(args, "--head")
		} else {
			args = append(args, "-X", c.Method)
		}
		for name, value := range c.Headers {
			args = append(args, "-H", name+": "+value)
		}
		if c.Body != "" {
			args = append(args, "--data-binary", c.Body)
		}
		var out, errs bytes.Buffer
		cmd := exec.CommandContext(t.Context(), path, append(args, c.URL)...)
		cmd.Stdout, cmd.Stderr = &out, &errs
		if err := cmd.Run(); err != nil {
			t.Fatalf("curl %s %s: %v\n%s", c.Method, c.URL, err, errs.String())
		}
		text, err := os.ReadFile(head)
		if err != nil {
			t.Fatal(err)
		}
		a := clientAnswer{Headers: map[string]string{}, Body: out.Bytes()}
		// Informational answers come first; the last head is the answer's.
		heads := strings.Split(strings.TrimSpace(string(text)), "\r\n\r\n")
		lines := strings.Split(heads[len(heads)-1], "\r\n")
		a.Status, _ = strconv.Atoi(strings.Fields(lines[0])[1])
		for _, l := range lines[1:] {
			name, value, _ := strings.Cut(l, ": ")
			a.Headers[strings.ToLower(name)] = value
		}
		if c.Method == http.MethodHead {
			a.Body = nil // --head writes the head to stdout
		}
		return a
	}}
}

// talkTo starts a program that reads a call a line and writes an answer a line.
func talkTo(t *testing.T, env []string, path string, args ...string) func(*testing.T, clientCall) clientAnswer {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = append(os.Environ(), "no_proxy=*", "NO_PROXY=*")
	for _, e := range env {
		if !strings.HasSuffix(e, "=") {
			cmd.Env = append(cmd.Env, e)
		}
	}
	var errs bytes.Buffer
	cmd.Stderr = &errs
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		cmd.Wait()
		cancel()
	})
	lines := bufio.NewReader(out)
	return func(t *testing.T, c clientCall) clientAnswer {
		t.Helper()
		request, err := json.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := in.Write(append(request, '\n')); err != nil {
			t.Fatal(err)
		}
		text, err := lines.ReadBytes('\n')
		if err != nil {
			cancel()
			cmd.Wait() // errs is whole from then on
			t.Fatalf("%s %s: %v\n%s", c.Method, c.URL, err, errs.String())
		}
		var a clientAnswer
		if err := json.Unmarshal(text, &a); err != nil {
			t.Fatalf("%s: %v", text, err)
		}
		return a
	}
}

// goClient is net/http's, for what needs Go: MSAL has no client for the API.
func goClient(hc *http.Client) foreignClient {
	return foreignClient{name: "Go", agent: "Go-http-client/", call: func(t *testing.T, c clientCall) clientAnswer {
		t.Helper()
		r, err := http.NewRequestWithContext(t.Context(), c.Method, c.URL, strings.NewReader(c.Body))
		if err != nil {
			t.Fatal(err)
		}
		for name, value := range c.Headers {
			r.Header.Set(name, value)
		}
		res, err := hc.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		body, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		a := clientAnswer{Status: res.StatusCode, Headers: map[string]string{}, Body: body}
		for name, values := range res.Header {
			a.Headers[strings.ToLower(name)] = strings.Join(values, ", ")
		}
		return a
	}}
}

const utf8BOM = "\xef\xbb\xbf"

// drive makes the calls that an integration makes, and says which calls they were.
// good passes, bad is refused: the guard enforces. Nothing else may use em
// meanwhile.
func (c foreignClient) drive(t *testing.T, em *emulator.Emulator, base, integration, good, bad string) (calls []string) {
	t.Helper()
	em.Reset()
	call := func(method, path, token, body string, headers ...string) clientAnswer {
		t.Helper()
		cc := clientCall{method, base + path, map[string]string{}, body}
		if token != "" {
			cc.Headers["Authorization"] = "Bearer " + token
		}
		if body != "" {
			cc.Headers["Content-Type"] = "application/json"
		}
		for _, h := range headers {
			name, value, _ := strings.Cut(h, ": ")
			cc.Headers[name] = value
		}
		a := c.call(t, cc)
		calls = append(calls, a.Headers["partnerguard-call"])
		if got := a.Headers["partnerguard-integration"]; got != integration {
			t.Errorf("%s %s: Partnerguard-Integration %q, want %q", method, path, got, integration)
		}
		return a
	}

	// Pages: the next one is a relative link with a header of its own.
	seen, pages := map[string]bool{}, 0
	for path, token := "/customers?size=40", ""; path != "" && pages < 10; pages++ {
		var page struct {
			Items []struct{ ID string }
			Links struct {
				Next struct {
					URI     string
					Headers []struct{ Key, Value string }
				}
			}
		}
		headers := []string{}
		if token != "" {
			headers = append(headers, "MS-ContinuationToken: "+token)
		}
		a := call("GET", "/v1"+path, good, "", headers...)
		text, ok := bytes.CutPrefix(a.Body, []byte(utf8BOM))
		if !ok {
			t.Errorf("page %d does not begin with the byte order mark that Microsoft sends: %.40q", pages, a.Body)
		}
		if err := json.Unmarshal(text, &page); a.Status != 200 || err != nil {
			t.Fatalf("page %d: %d, %v: %.200s", pages, a.Status, err, a.Body)
		}
		for _, item := range page.Items {
			seen[item.ID] = true
		}
		path, token = page.Links.Next.URI, ""
		if len(page.Links.Next.Headers) > 0 {
			token = page.Links.Next.Headers[0].Value
		}
	}
	if want := em.Customers(); len(seen) != len(want) || pages != 3 {
		t.Errorf("%d customers on %d pages, want %d on 3", len(seen), pages, len(want))
	}

	const order = `{"billingCycle": "monthly", "lineItems": [{"offerId": "CFQ7TTC0LH16:0001", "quantity": 7, "note": "größer"}]}`
	a := call("POST", "/v1/customers/"+em.Customers()[0]+"/orders", good, order)
	if a.Status != 201 || !strings.HasPrefix(a.Headers["location"], "/customers/") {
		t.Errorf("POST: %d, Location %q: %s", a.Status, a.Headers["location"], a.Body)
	}

	a = call("GET", "/v1/invoices?size=3", good, "", "Accept-Encoding: gzip", "Emulate: gzip")
	text := a.Body
	if !c.unzips {
		zr, err := gzip.NewReader(bytes.NewReader(a.Body))
		if err != nil {
			t.Fatalf("the body is not gzip: %v: %.40q", err, a.Body)
		}
		if text, err = io.ReadAll(zr); err != nil {
			t.Error(err)
		}
	}
	if !json.Valid(text) || a.Headers["content-encoding"] != "gzip" {
		t.Errorf("gzip: Content-Encoding %q, body %.200q", a.Headers["content-encoding"], text)
	}

	a = call("HEAD", "/v1/domains/contoso.onmicrosoft.com", good, "")
	if a.Status != 200 || len(a.Body) != 0 || a.Headers["ms-requestid"] == "" {
		t.Errorf("HEAD: %d, MS-RequestId %q, %d bytes", a.Status, a.Headers["ms-requestid"], len(a.Body))
	}

	reached := em.Requests()
	for _, r := range reached {
		if agent := r.Header.Get("User-Agent"); !strings.HasPrefix(agent, c.agent) {
			t.Errorf("%s: User-Agent %q, want %s…", r.Target, agent, c.agent)
		}
		if !strings.HasPrefix(r.Target, "/v1/") {
			t.Errorf("upstream saw %s", r.Target)
		}
		if sum := sha256.Sum256([]byte(order)); r.Method == "POST" && r.BodySHA256 != hex.EncodeToString(sum[:]) {
			t.Errorf("upstream saw another body than the client sent")
		}
	}
	if len(reached) != len(calls) {
		t.Errorf("%d calls reached the upstream, want %d", len(reached), len(calls))
	}

	em.Reset()
	a = call("GET", "/v1/invoices", bad, "")
	var refusal struct{ Code, Description, Source string }
	if err := json.Unmarshal(a.Body, &refusal); err != nil || a.Status != 401 || refusal.Code != "900421" || refusal.Source != "partnerguard" ||
		!strings.HasPrefix(a.Headers["content-type"], "application/json") || a.Headers["partnerguard-reason"] != "mfa_missing" {
		t.Errorf("refusal: %d %v: %s", a.Status, a.Headers, a.Body)
	}
	if a = call("HEAD", "/v1/invoices", bad, ""); a.Status != 401 || len(a.Body) != 0 {
		t.Errorf("refusal of HEAD: %d %q", a.Status, a.Body)
	}
	if a = call("POST", "/v1/invoices", bad, order); a.Status != 401 || a.Headers["partnerguard-effect"] != "reject" {
		t.Errorf("refusal of POST: %d %v", a.Status, a.Headers)
	}
	if n := em.Count(); n != 0 {
		t.Errorf("%d refused calls reached the upstream", n)
	}
	return calls
}

func TestClientsOfOthers(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	dir := t.TempDir()
	g := startGuard(t, dir, clientsYAML(em, "enforce"))
	evidence := map[string]string{}
	note := func(calls []string, want string) {
		for _, id := range calls {
			evidence[id] = want
		}
	}
	for _, fc := range foreignClients {
		t.Run(fc.name, func(t *testing.T) {
			c := fc.make(t, "")
			for _, way := range waysIn {
				t.Run(way.name, func(t *testing.T) {
					spec := emulator.TokenSpec{AppID: strangerID}
					if way.evidence == "app_id" {
						spec.AppID = ""
					}
					good := em.Mint(spec)
					spec.AMR = []string{"pwd"}
					note(c.drive(t, em, way.base(g), way.integration, good, em.Mint(spec)), way.evidence)
				})
			}
		})
	}
	t.Run("MSAL for Go", func(t *testing.T) {
		app, _ := em.App(emulator.AppOnly)
		good := msalToken(t, em, app)
		bad := em.Mint(emulator.TokenSpec{AppID: app.ID, AMR: []string{"pwd"}})
		// The token's own app is the stronger evidence, but for the listener's.
		for i, want := range []struct{ integration, evidence string }{
			{app.Name, "app_id"},
			{"invoice-export", "listener,app_id=" + app.Name},
			{app.Name, "app_id,path_prefix=order-export"},
		} {
			t.Run(waysIn[i].name, func(t *testing.T) {
				note(goClient(plainClient).drive(t, em, waysIn[i].base(g), want.integration, good, bad), want.evidence)
			})
		}
	})
	g.stop()
	stored := storedCalls(t, dir)
	if len(stored) != len(evidence) || len(evidence) == 0 {
		t.Errorf("%d calls in the store, the clients made %d", len(stored), len(evidence))
	}
	for id, want := range evidence {
		if got := stored[id].Evidence; got != want {
			t.Errorf("call %s: evidence %q, want %q", id, got, want)
		}
	}
}

// msalToken gets an app-only token from the emulated Entra as Microsoft's library
// does, over https and with discovery.
func msalToken(t *testing.T, em *emulator.Emulator, app emulator.App) string {
	t.Helper()
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(em.CAPEM())
	entra := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}}
	t.Cleanup(entra.CloseIdleConnections)
	secret, err := confidential.NewCredFromSecret(app.Secret)
	if err != nil {
		t.Fatal(err)
	}
	c, err := confidential.New(em.EntraTLSURL()+"/"+emulator.DefaultTenant, app.ID, secret,
		confidential.WithHTTPClient(entra), confidential.WithInstanceDiscovery(false))
	if err != nil {
		t.Fatal(err)
	}
	result, err := c.AcquireTokenByCredential(t.Context(), []string{emulator.AudiencePartnerCenter + "/.default"})
	if err != nil {
		t.Fatal(err)
	}
	return result.AccessToken
}

func TestClientsThatExpectContinue(t *testing.T) {
	t.Parallel()
	curl := program(t, "curl")
	em := startEmulator(t, emulator.Config{})
	g := startGuard(t, t.TempDir(), clientsYAML(em, "enforce"))
	body := strings.Repeat("0123456789abcdef", 4096)
	file := filepath.Join(t.TempDir(), "body")
	if err := os.WriteFile(file, []byte(body), 0o600); err != nil {
		t.Fatal(err)
	}
	post := func(base, token string, options ...string) (status, uploaded, talk string) {
		t.Helper()
		// A client that waits long shows a guard that waits for the client.
		options = append(options, "-sSv", "--noproxy", "*", "--max-time", "30", "--expect100-timeout", "25", "-o", os.DevNull,
			"-w", "%{http_code} %{size_upload}", "-H", "Expect: 100-continue", "-H", "Authorization: Bearer "+token,
			"--data-binary", "@"+file, base+"/v1/_upload")
		cmd := exec.CommandContext(t.Context(), curl, options...)
		var errs bytes.Buffer
		cmd.Stderr = &errs
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("curl: %v\n%s", err, errs.String())
		}
		status, uploaded, _ = strings.Cut(string(out), " ")
		return status, uploaded, errs.String()
	}
	sum := sha256.Sum256([]byte(body))
	for _, way := range waysIn {
		t.Run(way.name, func(t *testing.T) {
			em.Reset()
			status, uploaded, talk := post(way.base(g), em.Mint(emulator.TokenSpec{}))
			if n := strings.Count(talk, "< HTTP/1.1 100 Continue"); status != "200" || uploaded != strconv.Itoa(len(body)) || n != 1 {
				t.Errorf("allowed: %s, %s bytes sent, %d times 100 Continue", status, uploaded, n)
			}
			if r := em.Requests(); len(r) != 1 || r[0].BodySHA256 != hex.EncodeToString(sum[:]) {
				t.Errorf("upstream saw %+v", r)
			}
			// Refused by the upstream before it asked for the body: none is sent, and
			// a body that came late must not be read as the next call.
			status, uploaded, talk = post(way.base(g), em.Mint(emulator.TokenSpec{}), "-H", "Emulate: no-read, status=403")
			if status != "403" || uploaded != "0" || !strings.Contains(talk, "< Connection: close") {
				t.Errorf("refused upstream: %s, %s bytes sent:\n%s", status, uploaded, talk)
			}
			em.Reset()
			status, uploaded, talk = post(way.base(g), em.Mint(emulator.TokenSpec{AMR: []string{"pwd"}}))
			if status != "401" || uploaded != "0" || strings.Contains(talk, "100 Continue") {
				t.Errorf("refused: %s, %s bytes sent, want none without 100 Continue", status, uploaded)
			}
			if n := em.Count(); n != 0 {
				t.Errorf("%d refused calls reached the upstream", n)
			}
		})
	}
}

func TestClientsOverTLS(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	cert := throwAwayCertificate(t)
	upstreamCA := filepath.Join(t.TempDir(), "upstream-ca.pem")
	if err := os.WriteFile(upstreamCA, em.CAPEM(), 0o600); err != nil {
		t.Fatal(err)
	}
	good, bad := em.Mint(emulator.TokenSpec{}), em.Mint(emulator.TokenSpec{AMR: []string{"pwd"}})
	address := strings.TrimPrefix(em.PartnerTLSURL(), "https://")

	for _, up := range []struct {
		name, upstream string
		proto, host    string // as the upstream sees them
	}{
		{"HTTP/1.1 upstream", fmt.Sprintf("{url: %q, ca: %q}", em.PartnerTLSURL(), upstreamCA), "HTTP/1.1", address},
		{"HTTP/2 upstream", fmt.Sprintf("{url: %q, ca: %q, http2: true}", em.PartnerTLSURL(), upstreamCA), "HTTP/2.0", address},
		{"upstream at another address", fmt.Sprintf("{url: https://api.partnercenter.microsoft.com, dial: %q, ca: %q}", address, upstreamCA),
			"HTTP/1.1", "api.partnercenter.microsoft.com"},
	} {
		t.Run(up.name, func(t *testing.T) {
			yaml := strings.Replace(guardYAML(em, "enforce"), fmt.Sprintf("{url: %q}", em.PartnerURL()), up.upstream, 1)
			yaml = strings.Replace(yaml, `listeners: [{address: "127.0.0.1:0"}]`,
				fmt.Sprintf(`listeners: [{address: "127.0.0.1:0", tls: {certificate: %q, key: %q}}]`, cert.certificate, cert.key), 1)
			g := startGuard(t, t.TempDir(), yaml)
			if !strings.HasPrefix(g.url, "https://") {
				t.Fatalf("the guard listens on %s", g.url)
			}
			check := func(t *testing.T, c foreignClient) {
				t.Helper()
				c.drive(t, em, g.url, emulator.AppCompliant, good, bad)
				em.Reset()
				a := c.call(t, clientCall{"GET", g.url + "/v1/invoices", map[string]string{"Authorization": "Bearer " + good}, ""})
				r := em.Requests()
				if a.Status != 200 || len(r) != 1 || r[0].Proto != up.proto || r[0].Host != up.host {
					t.Errorf("%d, upstream saw %+v, want %s %s", a.Status, r, up.proto, up.host)
				}
			}
			for _, proto := range []string{"HTTP/1.1", "HTTP/2.0"} {
				t.Run("Go "+proto, func(t *testing.T) {
					hc := cert.client(t, proto == "HTTP/2.0")
					r, err := http.NewRequest("GET", g.url+"/v1/invoices", nil)
					if err != nil {
						t.Fatal(err)
					}
					res, err := hc.Do(r)
					if err != nil {
						t.Fatal(err)
					}
					res.Body.Close()
					if res.Proto != proto {
						t.Fatalf("the guard speaks %s to the client, want %s", res.Proto, proto)
					}
					check(t, goClient(hc))
				})
			}
			if up.proto == "HTTP/2.0" {
				return // the clients are the same
			}
			for _, fc := range foreignClients {
				t.Run(fc.name, func(t *testing.T) { check(t, fc.make(t, cert.certificate)) })
			}
			t.Run("curl HTTP/2", func(t *testing.T) {
				if out, _ := exec.Command(program(t, "curl"), "--version").Output(); !bytes.Contains(out, []byte("HTTP2")) {
					if os.Getenv("CI") != "" {
						t.Fatal("this curl is built without HTTP/2")
					}
					t.Skip("this curl is built without HTTP/2")
				}
				check(t, curlClient(t, cert.certificate, "--http2"))
			})
		})
	}

	t.Run("an upstream whose CA is not trusted", func(t *testing.T) {
		em.Reset()
		g := startGuard(t, t.TempDir(), strings.Replace(guardYAML(em, "enforce"), em.PartnerURL(), em.PartnerTLSURL(), 1))
		res, body := get(t, g.url+"/v1/invoices", good)
		if res.StatusCode != 502 || res.Header.Get("Partnerguard-Reason") != "upstream_unreachable" || em.Count() != 0 {
			t.Errorf("%d %s, want 502: %s", res.StatusCode, res.Header.Get("Partnerguard-Reason"), body)
		}
	})
}

// certificate is a throw-away certificate for loopback, in files.
type certificate struct {
	certificate, key string
	pool             *x509.CertPool
}

func throwAwayCertificate(t *testing.T) certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "partnerguard test"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, // its own authority
		KeyUsage:    x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		DNSNames:    []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	c := certificate{filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem"), x509.NewCertPool()}
	for file, block := range map[string]*pem.Block{c.certificate: {Type: "CERTIFICATE", Bytes: der}, c.key: {Type: "PRIVATE KEY", Bytes: private}} {
		if err := os.WriteFile(file, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	c.pool.AddCert(leaf)
	return c
}

// client trusts the certificate and speaks HTTP/2, or HTTP/1.1 only.
func (c certificate) client(t *testing.T, http2 bool) *http.Client {
	tr := &http.Transport{DisableCompression: true, ForceAttemptHTTP2: http2, TLSClientConfig: &tls.Config{RootCAs: c.pool}}
	if !http2 {
		tr.TLSNextProto = map[string]func(string, *tls.Conn) http.RoundTripper{}
	}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr}
}
