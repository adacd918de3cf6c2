package main

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/tls"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/partnerguard/partnerguard/internal/emulator"
	"github.com/partnerguard/partnerguard/policy"
)

// canaries are secrets, each told apart by name, that must not be written anywhere.
type canaries struct {
	t       *testing.T
	secrets map[string]string // by what must not be found
}

// secret makes one up.
func (c *canaries) secret(name string) string {
	s := "canary" + strings.ReplaceAll(name, " ", "") + "x7Kq29ZtLw"
	c.secrets[s] = name
	return s
}

// token watches over a bearer token: the whole, and parts of its last segment, a
// JWT's signature.
func (c *canaries) token(name, token string) string {
	c.secrets[token] = name
	last := token[strings.LastIndexByte(token, '.')+1:]
	for i := 0; i+32 <= len(last) && i <= 256; i += 32 {
		c.secrets[last[i:i+32]] = fmt.Sprintf("%s, from byte %d of its last part", name, i)
	}
	return token
}

// search fails the test for every canary in what some output holds.
func (c *canaries) search(where string, output []byte) {
	c.t.Helper()
	for secret, name := range c.secrets {
		if i := bytes.Index(output, []byte(secret)); i >= 0 {
			c.t.Errorf("%s holds the %s: …%.300q", where, name, output[max(0, i-150):])
		}
	}
}

// searchTree searches every file of a directory.
func (c *canaries) searchTree(where, dir string) (all []byte) {
	c.t.Helper()
	eachFile(c.t, dir, func(path string, data []byte) {
		c.search(where+", file "+filepath.Base(path), data)
		all = append(all, data...)
	})
	return all
}

// collector is an OTLP receiver that keeps what it gets.
type collector struct {
	url string

	mu      sync.Mutex
	traces  []byte
	metrics []byte
	raw     []byte        // both as they came, header included
	came    chan struct{} // replaced at every arrival
}

func startCollector(t *testing.T) *collector {
	c := &collector{came: make(chan struct{})}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		c.raw = fmt.Appendf(c.raw, "%s %s %v ", r.Method, r.RequestURI, r.Header)
		c.raw = append(c.raw, body...)
		if r.Header.Get("Content-Encoding") == "gzip" {
			zr, err := gzip.NewReader(bytes.NewReader(body))
			if err == nil {
				body, err = io.ReadAll(zr)
			}
			if err != nil {
				t.Errorf("OTLP body: %v", err)
			}
		}
		switch r.URL.Path {
		case "/v1/traces":
			c.traces = append(c.traces, body...)
		case "/v1/metrics":
			c.metrics = append(c.metrics, body...)
		default:
			t.Errorf("OTLP to %s", r.URL.Path)
		}
		close(c.came)
		c.came = make(chan struct{})
		w.Header().Set("Content-Type", "application/x-protobuf")
	}))
	t.Cleanup(s.Close)
	c.url = s.URL
	return c
}

// await returns once done holds for what came.
func (c *collector) await(t *testing.T, what string, done func(traces, metrics []byte) bool) {
	t.Helper()
	timeout := time.After(30 * time.Second)
	for {
		c.mu.Lock()
		ok, came := done(c.traces, c.metrics), c.came
		c.mu.Unlock()
		if ok {
			return
		}
		select {
		case <-came:
		case <-timeout:
			t.Fatalf("no %s reached the collector", what)
		}
	}
}

func (c *collector) environment() []string {
	return []string{
		"OTEL_EXPORTER_OTLP_ENDPOINT=" + c.url, "OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf",
		"OTEL_BSP_SCHEDULE_DELAY=50", "OTEL_METRIC_EXPORT_INTERVAL=100",
	}
}

// canaryRun makes calls that carry secrets.
type canaryRun struct {
	*canaries
	em *emulator.Emulator
	// sentinel is what every call says of itself and what must be found.
	sentinel string
	tokens   map[string]string // bearer tokens, by what they are
}

func newCanaryRun(t *testing.T, em *emulator.Emulator) *canaryRun {
	c := &canaryRun{&canaries{t, map[string]string{}}, em, "sentinel-5Gq8", map[string]string{}}
	for _, tc := range tokenCases(em) {
		if tc.reason == policy.ReasonTokenMissing || tc.reason == policy.ReasonTokenTooLong {
			continue
		}
		name := string(tc.reason) + " token"
		_, token, _ := strings.Cut(tc.request("http://x").Header.Get("Authorization"), " ")
		c.tokens[name] = c.token(name, token)
	}
	for _, name := range []string{emulator.AppCompliant, emulator.AppPassword, emulator.AppOpaque} {
		token, err := em.Token(name)
		if err != nil {
			t.Fatal(err)
		}
		c.tokens[name] = c.token("token of "+name, token)
	}
	// What is no token at all, yet somebody's secret.
	c.tokens["opaque words"] = c.secret("opaque bearer")
	c.tokens["cut JWT"] = c.tokens["mfa_present token"][:200] + c.secret("tail of a cut JWT")
	c.tokens["three parts of nothing"] = "e30." + c.secret("payload that is none") + "." + c.secret("signature that is none")
	c.tokens["too long"] = strings.Repeat("a", 17<<10) + c.secret("token too long")
	return c
}

// calls makes calls of every kind through a guard and searches the answers that
// the guard itself makes.
func (c *canaryRun) calls(g *guardProcess) {
	t := c.t
	t.Helper()
	call := func(method, target, token, body string, headers ...string) {
		t.Helper()
		// A body that breaks off, or a call that its client gives up, ends in an
		// error; the answer, as far as there is one, is what counts.
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		r, err := http.NewRequestWithContext(ctx, method, g.url, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		r.URL.Opaque = target
		r.Header.Set("User-Agent", c.sentinel)
		if token != "" {
			r.Header.Set("Authorization", "Bearer "+token)
		}
		for _, h := range headers {
			name, value, _ := strings.Cut(h, ": ")
			if value == "hang up" {
				stop := context.AfterFunc(c.arrival(ctx), cancel)
				defer stop()
				continue
			}
			r.Header.Add(name, value)
		}
		res, err := plainClient.Do(r)
		if err != nil {
			return
		}
		defer res.Body.Close()
		answer, _ := io.ReadAll(res.Body)
		if res.Header.Get("Partnerguard-Effect") == "reject" || res.Header.Get("Partnerguard-Call") == "" {
			c.search("the guard's own answer", fmt.Appendf(answer, "%v", res.Header))
		}
	}

	sas := "/v1/invoices?sv=2024-11-04&sr=b&sig=" + c.secret("SAS signature") + "%3D&SIG=" + c.secret("SAS signature in capitals") +
		"&" + c.secret("query without a name") + "&client_secret=" + c.secret("client secret in the query") + "#" + c.secret("fragment")
	secretBody := `grant_type=client_credentials&client_secret=` + c.secret("client secret in the body") + `&assertion=` + c.tokens["mfa_present token"]
	basic := base64.StdEncoding.EncodeToString([]byte("client:" + c.secret("password of Basic")))
	c.secrets[basic] = "Basic credentials"
	extras := []string{
		"Cookie: session=" + c.secret("cookie"), "X-Api-Key: " + c.secret("API key"), "Ocp-Apim-Subscription-Key: " + c.secret("subscription key"),
		"Proxy-Authorization: Basic " + c.secret("proxy password"), "X-Ms-Token-Aad-Access-Token: " + c.tokens[emulator.AppCompliant],
		"Baggage: secret=" + c.secret("baggage"), "Partnerguard-Reason: " + c.secret("header of ours"),
		"Referer: https://portal.contoso.example/?code=" + c.secret("code in a referer"), "X-Forwarded-For: " + c.secret("forwarded"),
		"MS-ContinuationToken: " + c.secret("continuation token"), "If-Match: " + c.secret("etag"),
		"Traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
	}
	for _, token := range c.tokens {
		call("GET", sas, token, "", extras...)
		call("POST", "/v1/_upload?sig="+c.secret("SAS signature"), token, secretBody, append(extras, "Content-Type: application/x-www-form-urlencoded")...)
	}
	good, bad := c.tokens[emulator.AppCompliant], c.tokens[emulator.AppPassword]
	call("POST", "/v1/generatetoken", good, "grant_type=jwt_token&client_secret="+c.secret("client secret in the body"))
	for _, token := range []string{good, bad} {
		for _, emulate := range []string{
			"status=500", "status=503", "status=429, retry-after=1", "status=403", "reset", "stall=1s", "abort-after=100", "stall-body=10ms",
			"challenge=", "early-hints, trailers", "upgrade", "gzip", "bom",
		} {
			call("GET", sas, token, secretBody, append(extras, "Emulate: "+emulate)...)
		}
		for _, shape := range emulator.Shapes() {
			call("GET", sas, token, "", append(extras, "Emulate: refuse="+shape.String())...)
			call("GET", sas, token, "", append(extras, "Emulate: gzip, refuse="+shape.String())...)
		}
		call("GET", "/v1/_large?bytes=100000000&sig="+c.secret("SAS signature"), token, "", append(extras, "Emulate: stall=20s", "-: hang up")...)
		call("POST", sas, token, strings.Repeat(secretBody, 1000), append(extras, "Emulate: stall=20s", "-: hang up")...)
	}
	// Ambiguous or refused whatever the token.
	for _, target := range []string{
		"/v1/customers/../invoices", "/v1/customers/%2e%2e/x", "/v1/%zz", "/v1/a%00b", `/v1/a\b`, "/i/nobody/v1/invoices", "/i/NOBODY/v1", "//",
		"/i/" + emulator.AppPassword + "/v1/invoices", "http://user:" + c.secret("password in the target") + "@host.example/v1/invoices", "*",
	} {
		call("GET", target+"?sig="+c.secret("SAS signature"), good, "", extras...)
	}
	call("TRACE", sas, good, "", extras...)
	call("GET", sas, good, "", append(extras, "Authorization: Bearer "+bad)...)
	call("GET", sas, "", "", append(extras, "Authorization: Basic "+basic)...)
	call("GET", sas, "", "", append(extras, "Authorization: SharedAccessSignature sr=x&sig="+c.secret("SAS in Authorization"))...)
	call("GET", sas, "", "", append(extras, "Authorization: "+c.secret("bare Authorization"))...)
	// What net/http refuses by itself.
	for _, raw := range []string{
		"GET /v1/invoices?sig=" + c.secret("SAS signature") + " HTTP/9.9\r\nHost: x\r\n\r\n",
		"GET " + sas + " HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + good + "\x01\r\n\r\n",
		"GET " + sas + " HTTP/1.1\r\nHost: x\r\nAuthorization Bearer " + good + "\r\n\r\n",
		"GET " + sas + " HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: " + c.secret("transfer encoding") + "\r\n\r\n",
		"POST " + sas + " HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\nAuthorization: Bearer " + good + "\r\n\r\n",
		"GET " + sas + " HTTP/1.1\r\nHost: x\r\nX-Long: " + strings.Repeat(c.secret("header too long"), 4000) + "\r\n\r\n",
		"\x16\x03\x01" + c.secret("not HTTP") + "\r\n\r\n",
	} {
		c.search("net/http's own answer", exchange(t, g.url, raw))
	}
}

// arrival is a context that ends when the next call reaches the upstream, or when
// ctx does.
func (c *canaryRun) arrival(ctx context.Context) context.Context {
	before := c.em.Count()
	arrived, end := context.WithCancel(context.Background())
	go func() {
		defer end()
		c.em.Wait(ctx, func([]emulator.Request) bool { return c.em.Count() > before })
	}()
	return arrived
}

// exchange sends bytes and returns what comes back until the connection ends.
func exchange(t *testing.T, url, raw string) []byte {
	t.Helper()
	_, address, _ := strings.Cut(url, "://")
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if overHTTP2 { // what is no HTTP/2 is no test of it: by HTTP/1.1 over TLS
		conn = tls.Client(conn, &tls.Config{InsecureSkipVerify: true})
	}
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	io.WriteString(conn, raw) // the guard may hang up before it has all
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return nil
	}
	defer res.Body.Close()
	body, _ := io.ReadAll(res.Body)
	return fmt.Appendf(body, "%s %v", res.Status, res.Header)
}

// A token, a signature, a SAS signature, a client secret: none of them is in any
// output of the guard.
func TestCanary(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name, mode, more string
		dead             bool // there is no upstream
		unrecorded       bool // nothing is in the ledger, all is in the log
	}{
		{"audit", "audit", "timeouts: {response_header: 300ms}", false, false},
		{"enforce", "enforce", "timeouts: {response_header: 300ms}\nentra: {authority: %q, on_unverifiable: forward}", false, false},
		{"tag, the ledger cannot write", "tag", "timeouts: {response_header: 300ms}\nledger: {min_free: 900000000GiB}", false, true},
		{"audit, no upstream", "audit", "", true, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel() // most of the time is the patience of sockets
			em := startEmulator(t, emulator.Config{})
			otlp := startCollector(t)
			c := newCanaryRun(t, em)
			dir := t.TempDir()
			yaml := guardYAML(em, tt.mode)
			if strings.Contains(tt.more, "entra:") {
				yaml = strings.Replace(yaml, fmt.Sprintf("entra: {authority: %q}\n", em.EntraURL()), "", 1)
				tt.more = fmt.Sprintf(tt.more, em.EntraURL())
			}
			if tt.dead {
				yaml = strings.Replace(yaml, fmt.Sprintf("{url: %q", upstreamURL(em)), fmt.Sprintf("{url: %q", "http://"+freePort(t)), 1)
			}
			g := startGuard(t, dir, yaml+tt.more+"\n", otlp.environment()...)
			c.calls(g)
			otlp.await(t, "trace or metric", func(traces, metrics []byte) bool {
				return bytes.Contains(traces, []byte("partnerguard.call")) && bytes.Contains(metrics, []byte("partnerguard.calls"))
			})
			for _, path := range []string{"/metrics", "/readyz?verbose", "/livez", "/"} {
				_, body := get(t, g.admin+path, "")
				c.search(path, body)
			}
			c.searchTree("the data directory of a running guard", dir) // with SQLite's log
			g.stop()

			log := []byte(g.text())
			c.search("the log", log)
			files := c.searchTree("the data directory", dir)
			otlp.mu.Lock()
			defer otlp.mu.Unlock()
			c.search("the exported traces", otlp.traces)
			c.search("the exported metrics", otlp.metrics)
			c.search("OTLP on the wire", otlp.raw)

			printed := map[string]string{}
			run := func(args ...string) {
				t.Helper()
				stdout, stderr, _ := partnerguard(t, append(args, "--data-dir", dir)...)
				c.search("partnerguard "+strings.Join(args, " "), []byte(stdout+stderr))
				printed[strings.Join(args, " ")] = stdout
			}
			run("calls", "--limit", "0", "--format", "json")
			if !tt.dead && !tt.unrecorded { // whose records are like the others', or none
				run("calls", "--limit", "0", "--format", "table")
				for _, by := range []string{"integration", "user", "app", "customer", "route"} {
					run("report", "--by", by, "--format", "json")
				}
				run("report", "--by", "user", "--format", "table")
				run("report", "--by", "user", "--format", "csv")
				run("ledger", "verify")
			}

			// The search can find something: what calls say of themselves stands where
			// it should.
			for where, output := range map[string][]byte{
				"the log": log, "the traces": otlp.traces, "the data directory": files, "calls": []byte(printed["calls --limit 0 --format json"]),
			} {
				found := bytes.Contains(output, []byte(c.sentinel))
				if want := !tt.unrecorded || where == "the log" || where == "the traces"; found != want {
					t.Errorf("the sentinel is in %s: %v, want %v", where, found, want)
				}
			}
			if n := len(c.secrets); n < 200 {
				t.Errorf("only %d things were searched for", n)
			}
		})
	}
}

// The token with which a guard asks for Microsoft's records is in none of its outputs,
// wherever it comes from and whatever goes wrong with it.
func TestCanaryInScheduledReconcile(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	spill := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { // a gateway that repeats what it refuses
		w.WriteHeader(http.StatusForbidden)
		fmt.Fprintf(w, `{"code":"1","description":"no access with %s"}`, r.Header.Get("Authorization"))
	}))
	t.Cleanup(spill.Close)
	for _, tt := range []struct {
		name, source, says string
		expired            bool
		upstream           string // instead of the emulator's
	}{
		{"from a file", "token: file:token", `"msg":"reconciled"`, false, ""},
		{"from the environment", "token: env:CANARY_TOKEN", `"msg":"reconciled"`, false, ""},
		{"from a command that has it among its arguments", "token_command: [echo, TOKEN]", `"msg":"reconciled"`, false, ""},
		{"that is expired", "token: file:token", `"msg":"reconcile failed"`, true, ""},
		{"of a command that fails and talks", "token_command: [sh, -c, 'cat %s >&2; exit 3']", `"msg":"reconcile failed"`, false, ""},
		{"of a command that prints more", "token_command: [sh, -c, 'cat %s; echo and more']", `"msg":"reconcile failed"`, false, ""},
		{"of a command that is not there", "token_command: [/nowhere/get-token, TOKEN]", `"msg":"reconcile failed"`, false, ""},
		{"that a gateway repeats", "token: file:token", `"msg":"reconcile failed"`, false, spill.URL},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			otlp := startCollector(t)
			c := &canaries{t, map[string]string{}}
			token := sampleToken(t, em, emulator.AppCompliant)
			if tt.expired {
				token = em.Mint(emulator.TokenSpec{IssuedAt: time.Now().Add(-4 * time.Hour)})
			}
			c.token("token of reconcile", token)
			dir, work := t.TempDir(), t.TempDir()
			file := filepath.Join(work, "guard.yaml")
			source := strings.ReplaceAll(strings.ReplaceAll(tt.source, "%s", filepath.Join(work, "token")), "TOKEN]", token+"]")
			yaml := guardYAML(em, "audit") + reconcileYAML(source) + "\n"
			if tt.upstream != "" {
				yaml = strings.Replace(yaml, fmt.Sprintf("{url: %q", upstreamURL(em)), fmt.Sprintf("{url: %q", tt.upstream), 1)
			}
			for path, text := range map[string]string{file: yaml, filepath.Join(work, "token"): token} {
				if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			g := startGuardFile(t, dir, file, append(otlp.environment(), "CANARY_TOKEN="+token)...)
			g.awaitText(tt.says)
			for _, path := range []string{"/metrics", "/readyz?verbose", "/"} {
				_, body := get(t, g.admin+path, "")
				c.search(path, body)
			}
			otlp.await(t, "metric", func(_, metrics []byte) bool { return bytes.Contains(metrics, []byte("partnerguard.reconcile")) })
			g.stop()
			c.search("the log", []byte(g.text()))
			c.searchTree("the data directory", dir)
			otlp.mu.Lock()
			defer otlp.mu.Unlock()
			c.search("OTLP on the wire", otlp.raw)
			stdout, stderr, _ := partnerguard(t, "report", "--data-dir", dir, "--format", "html")
			c.search("the report", []byte(stdout+stderr))
			stdout, stderr, _ = partnerguard(t, "check", "-c", file)
			c.search("check", []byte(stdout+stderr))
		})
	}
}

// explain shows what is in a token, but neither the token nor its signature.
func TestCanaryInExplain(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	c := newCanaryRun(t, em)
	file := filepath.Join(t.TempDir(), "guard.yaml")
	if err := os.WriteFile(file, []byte(guardYAML(em, "enforce")), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, token := range c.tokens {
		inputs := []string{token, "curl -H 'Authorization: Bearer " + token + "'"}
		if strings.HasPrefix(name, "mfa_") {
			inputs = append(inputs, "Bearer "+token, "\ufeff"+token+"\r\n")
		}
		for i, input := range inputs {
			cmd := exec.Command("partnerguard", "explain", "-c", file)
			cmd.Stdin = strings.NewReader(input)
			out, err := cmd.CombinedOutput()
			c.search("explain of the "+name, out)
			// The search can find something: the claims are there.
			if strings.HasPrefix(name, "mfa_") && i != 1 && !bytes.Contains(out, []byte(emulator.DefaultTenant)) {
				t.Errorf("explain of the %s: %v: %s", name, err, out)
			}
		}
	}
}
