package main

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/partnerguard/partnerguard/internal/emulator"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// startHostile runs a guard in front of an upstream that listens at url, for clients
// of both versions of HTTP. It audits, so that the breaker stops nothing.
func startHostile(t *testing.T, em *emulator.Emulator, dir, upstream string, more ...string) (*guardProcess, []protocol) {
	t.Helper()
	cert := throwAwayCertificate(t)
	yaml := strings.Replace(guardYAML(em, "audit", more...), `partner-center: {url: "`+em.PartnerURL()+`"}`, "partner-center: {"+upstream+"}", 1)
	yaml = strings.Replace(yaml, `listeners: [{address: "127.0.0.1:0"}]`,
		fmt.Sprintf(`listeners: [{address: "127.0.0.1:0"}, {name: tls, address: "127.0.0.1:0", tls: {certificate: %q, key: %q}}]`, cert.certificate, cert.key), 1)
	g := startGuard(t, dir, yaml)
	// Used once, a connection is no reason for the client to send a call again.
	plain := &http.Transport{DisableCompression: true, DisableKeepAlives: true}
	t.Cleanup(plain.CloseIdleConnections)
	return g, []protocol{{"HTTP/1.1", &http.Client{Transport: plain}, g.urls[0]}, {"HTTP/2.0", cert.client(t, true), g.urls[1]}}
}

// attempt makes a call and says how it ended: the status and the Reason or the body,
// or that the transfer was broken.
func attempt(t *testing.T, p protocol, method, path, token, id string, body io.Reader) (outcome string, res *http.Response, hints int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{Got1xxResponse: func(_ int, h textproto.MIMEHeader) error {
		hints++
		for name := range h {
			if strings.HasPrefix(strings.ToLower(name), "partnerguard") || name == "Ismfacompliant" {
				t.Errorf("%s in a 1xx", name)
			}
		}
		return nil
	}})
	res, err := p.client.Do(p.request(ctx, t, method, path, token, id, body, ""))
	if err != nil {
		if ctx.Err() != nil {
			return "no end", nil, hints
		}
		return "broken", nil, hints
	}
	defer res.Body.Close()
	text, err := io.ReadAll(io.LimitReader(res.Body, 64<<20))
	switch {
	case ctx.Err() != nil:
		return "no end", res, hints
	case err != nil:
		return "broken", res, hints
	case res.Header.Get("Partnerguard-Reason") == "upstream_unreachable", res.Header.Get("Partnerguard-Reason") == "upstream_timeout":
		return fmt.Sprintf("%d %s", res.StatusCode, res.Header.Get("Partnerguard-Reason")), res, hints
	}
	return strings.TrimSpace(fmt.Sprintf("%d %s", res.StatusCode, text)), res, hints
}

const (
	unreachable = "502 upstream_unreachable"
	tooLate     = "504 upstream_timeout"
)

// endless writes the same text until the other side has had enough, but not more than
// 64 MiB.
func endless(c net.Conn, text string) {
	c.SetWriteDeadline(time.Now().Add(20 * time.Second))
	block := strings.Repeat(text, 1+(16<<10)/len(text))
	for n := 0; n < 64<<20; n += len(block) {
		if _, err := io.WriteString(c, block); err != nil {
			return
		}
	}
}

func reset(c net.Conn) bool {
	if tc, ok := c.(*tls.Conn); ok {
		c = tc.NetConn()
	}
	c.(*net.TCPConn).SetLinger(0)
	c.Close()
	return false
}

// Whatever an upstream answers in HTTP/1, the client gets a whole answer, a broken
// transfer or the guard's own word, and the next call its own answer.
func TestHostileUpstream(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	wire := startWire(t)
	dir := t.TempDir()
	g, protocols := startHostile(t, em, dir, fmt.Sprintf("url: %q", wire.url), "timeouts: {response_header: 2s}")
	token := em.Mint(emulator.TokenSpec{})

	type answer = func(c net.Conn) bool
	// then ends an answer: by closing, by a reset, or not at all.
	say := func(text string, then answer) answer {
		return func(c net.Conn) bool {
			io.WriteString(c, wireText(text))
			return then(c)
		}
	}
	closes := func(net.Conn) bool { return false }
	goesOn := func(net.Conn) bool { return true }
	holds := func(c net.Conn) bool { io.Copy(io.Discard, c); return false }
	const poison = "HTTP/1.1 200 OK\nContent-Length: 6\n\npoison"
	flood := func(begin, text string) answer {
		return func(c net.Conn) bool {
			io.WriteString(c, wireText(begin))
			endless(c, wireText(text))
			return false
		}
	}
	type test struct {
		name   string
		answer answer
		want   string
		method string // default GET
	}
	tests := []test{
		// Lengths.
		{"a short body", say("HTTP/1.1 200 OK\nContent-Length: 100\n\nshort", closes), "broken", ""},
		{"a short body and a reset", say("HTTP/1.1 200 OK\nContent-Length: 100\n\nshort", reset), "broken", ""},
		{"no body of what there should be", say("HTTP/1.1 200 OK\nContent-Length: 100\n\n", closes), "broken", ""},
		{"a long body", say("HTTP/1.1 200 OK\nContent-Length: 5\n\nhello"+poison, goesOn), "200 hello", ""},
		{"a negative length", say("HTTP/1.1 200 OK\nContent-Length: -5\n\nhello", closes), unreachable, ""},
		{"two lengths", say("HTTP/1.1 200 OK\nContent-Length: 5\nContent-Length: 6\n\nhello!", goesOn), unreachable, ""},
		{"two equal lengths", say("HTTP/1.1 200 OK\nContent-Length: 5\nContent-Length: 5\n\nhello", goesOn), "200 hello", ""},
		{"a length with a sign", say("HTTP/1.1 200 OK\nContent-Length: +5\n\nhello", goesOn), unreachable, ""},
		{"a list of lengths", say("HTTP/1.1 200 OK\nContent-Length: 5, 5\n\nhello", goesOn), unreachable, ""},
		{"a length in a fold", say("HTTP/1.1 200 OK\nContent-Length:\n 5\n\nhello", goesOn), "200 hello", ""},
		{"length and chunks", say("HTTP/1.1 200 OK\nContent-Length: 3\nTransfer-Encoding: chunked\n\n5\nhello\n0\n\n", goesOn), "200 hello", ""},
		{"another transfer encoding", say("HTTP/1.1 200 OK\nTransfer-Encoding: xchunked\n\n5\nhello\n0\n\n", closes), unreachable, ""},
		{"two transfer encodings", say("HTTP/1.1 200 OK\nTransfer-Encoding: gzip, chunked\n\n5\nhello\n0\n\n", closes), unreachable, ""},
		{"no last chunk", say("HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n5\nhello\n", closes), "broken", ""},
		{"half a chunk", say("HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n5\nhel", closes), "broken", ""},
		{"half a chunk and a reset", say("HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n5\nhel", reset), "broken", ""},
		{"a chunk of no size", say("HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n5\nhello\nx\n", goesOn), "broken", ""},
		{"a chunk beyond 64 bits", say("HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n5\nhello\n10000000000000000\n", goesOn), "broken", ""},
		{"an endless chunk extension", flood("HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n5\nhello\n5;", "aaaaaaaa"), "broken", ""},
		{"chunk extensions without end", flood("HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n", "1;"+strings.Repeat("a", 1000)+"\na\n"), "broken", ""},
		{"until it closes", say("HTTP/1.1 200 OK\n\nhello", closes), "200 hello", ""},
		{"HTTP/1.0 until it closes", say("HTTP/1.0 200 OK\n\nhello", closes), "200 hello", ""},
		{"HTTP/1.0 until a reset", func(c net.Conn) bool {
			io.WriteString(c, "HTTP/1.0 200 OK\r\n\r\nhello")
			time.Sleep(100 * time.Millisecond) // a reset overtakes what was not read yet
			return reset(c)
		}, "broken", ""},

		// Bodies where there are none.
		{"204 with a body", say("HTTP/1.1 204 No Content\nContent-Length: 5\n\nhello"+poison, goesOn), "204", ""},
		{"204 with chunks", say("HTTP/1.1 204 No Content\nTransfer-Encoding: chunked\n\n5\nhello\n0\n\n"+poison, goesOn), "204", ""},
		{"304 with a body", say("HTTP/1.1 304 Not Modified\nContent-Length: 5\n\nhello"+poison, goesOn), "304", ""},
		{"304 with the length that 200 would have", say("HTTP/1.1 304 Not Modified\nContent-Length: 5\nETag: \"x\"\n\n", goesOn), "304", ""},
		{"HEAD with a body", say("HTTP/1.1 200 OK\nContent-Length: 5\n\nhello"+poison, goesOn), "200", "HEAD"},
		{"HEAD with a length", say("HTTP/1.1 200 OK\nContent-Length: 5\n\n", goesOn), "200", "HEAD"},

		// Status lines.
		{"nothing", closes, unreachable, ""},
		{"a reset", reset, unreachable, ""},
		{"a body alone", say("hello", closes), unreachable, ""},
		{"status 99", say("HTTP/1.1 099 x\nContent-Length: 0\n\n", goesOn), unreachable, ""},
		{"status 0", say("HTTP/1.1 000 x\nContent-Length: 0\n\n", goesOn), unreachable, ""},
		{"status 1000", say("HTTP/1.1 1000 x\nContent-Length: 0\n\n", goesOn), unreachable, ""},
		{"status 20", say("HTTP/1.1 20 x\nContent-Length: 0\n\n", goesOn), unreachable, ""},
		{"status -20", say("HTTP/1.1 -20 x\nContent-Length: 0\n\n", goesOn), unreachable, ""},
		{"status 999", say("HTTP/1.1 999 x\nContent-Length: 5\n\nhello", goesOn), "999 hello", ""},
		{"another protocol", say("SSH-2.0-OpenSSH\n", closes), unreachable, ""},
		{"no phrase", say("HTTP/1.1 200\nContent-Length: 5\n\nhello", goesOn), "200 hello", ""},
		{"101 unasked", say("HTTP/1.1 101 Switching Protocols\nConnection: Upgrade\nUpgrade: websocket\n\n", goesOn), unreachable, ""},
		{"101 without a protocol", say("HTTP/1.1 101 Switching Protocols\n\n", goesOn), unreachable, ""},
		{"100 before the answer", say("HTTP/1.1 100 Continue\n\nHTTP/1.1 200 OK\nContent-Length: 5\n\nhello", goesOn), "200 hello", ""},
		{"103 before the answer", say("HTTP/1.1 103 Early Hints\nLink: </x>\nPartnerguard-Effect: allow\nisMfaCompliant: True\n\nHTTP/1.1 200 OK\nContent-Length: 5\n\nhello", goesOn), "200 hello", ""},
		{"102 for a while", say(strings.Repeat("HTTP/1.1 102 Processing\n\n", 30)+"HTTP/1.1 200 OK\nContent-Length: 5\n\nhello", goesOn), "200 hello", ""},

		// Headers.
		{"a header without a colon", say("HTTP/1.1 200 OK\nrubbish\nContent-Length: 5\n\nhello", goesOn), unreachable, ""},
		{"a space before the colon", say("HTTP/1.1 200 OK\nContent-Length : 500\n\nhello", closes), "200 hello", ""},
		{"CR in a value", say("HTTP/1.1 200 OK\nX-A: a␍Set-Cookie: evil=1\nContent-Length: 5\n\nhello", goesOn), unreachable, ""},
		{"CRs in a value", say("HTTP/1.1 200 OK\nX-A: a␍␍Set-Cookie: evil=1␍␍evil\nContent-Length: 5\n\nhello", goesOn), unreachable, ""},
		{"NUL in a value", say("HTTP/1.1 200 OK\nX-A: a␀b\nContent-Length: 5\n\nhello", goesOn), unreachable, ""},
		{"a line break in the phrase", say("HTTP/1.1 401 a␍Set-Cookie: evil=1\nContent-Length: 5\n\nhello", goesOn), "401 hello", ""},
		{"ours", say("HTTP/1.1 200 OK\nPartnerguard-Effect: reject\npartnerguard_reason: mfa_missing\nPartnerguard-Call: x\nContent-Length: 5\n\nhello", goesOn), "200 hello", ""},
		{"ours in trailers", say("HTTP/1.1 200 OK\nTrailer: Partnerguard-Effect, X-T\nTransfer-Encoding: chunked\n\n5\nhello\n0\nPartnerguard-Effect: reject\nX-T: x\n\n", goesOn), "200 hello", ""},
		{"ours in trailers that were not announced", say("HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n5\nhello\n0\nPartnerguard-Effect: reject\nPartnerguard_Mfa: x\nX-T: x\n\n", goesOn), "200 hello", ""},
		{"hop by hop", say("HTTP/1.1 200 OK\nConnection: X-Hop, Partnerguard-Call\nX-Hop: 1\nKeep-Alive: x\nUpgrade: h2c\nProxy-Authenticate: x\nContent-Length: 5\n\nhello", goesOn), "200 hello", ""},

		// Floods. Whether the bound or the time is up first is all the same.
		{"headers without end", flood("HTTP/1.1 200 OK\n", "X-A: "+strings.Repeat("a", 1000)+"\n"), "any", ""},
		{"a header without end", flood("HTTP/1.1 200 OK\nX-A: ", "aaaaaaaa"), "any", ""},
		{"a status line without end", flood("HTTP/1.1 200 ", "aaaaaaaa"), "any", ""},
		{"trailers without end", flood("HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n5\nhello\n0\n", "X-A: b\n"), "broken", ""},
		{"100 without end", flood("", "HTTP/1.1 100 Continue\n\n"), "any", ""},
		{"103 without end", flood("", "HTTP/1.1 103 Early Hints\nLink: </x>\n\n"), "any", ""},
		{"102 with headers of 1 MB without end", flood("", "HTTP/1.1 102 Processing\nX-A: "+strings.Repeat("a", 900<<10)+"\n\n"), "any", ""},

		// Silence.
		{"no answer", holds, tooLate, ""},
		{"half a header", say("HTTP/1.1 200 OK\nContent-", holds), tooLate, ""},
		{"a header that drips", func(c net.Conn) bool {
			tick := time.NewTicker(100 * time.Millisecond)
			defer tick.Stop()
			io.WriteString(c, "HTTP/1.1 200 OK\r\nX-A: ")
			for range 300 {
				if _, err := io.WriteString(c, "a"); err != nil {
					break
				}
				<-tick.C
			}
			return false
		}, tooLate, ""},
		{"no body", say("HTTP/1.1 200 OK\nContent-Length: 100\n\n", holds), "broken", ""},
		{"half a body", say("HTTP/1.1 200 OK\nContent-Length: 100\n\nhello", holds), "broken", ""},
		{"half of an answer without a length", say("HTTP/1.1 200 OK\n\nhello", holds), "broken", ""},
	}
	answers := map[string]answer{}
	for i, tt := range tests {
		answers[fmt.Sprintf("/v1/hostile/%d", i)] = tt.answer
	}
	wire.respond(func(c net.Conn, r wireRequest) bool {
		if answer := answers[r.target]; answer != nil {
			return answer(c)
		}
		io.WriteString(c, wireOK+`{"ok":true}`)
		return true
	})

	var sent sync.Map // how often, by MS-RequestId
	before := g.memory()
	t.Run("answers", func(t *testing.T) {
		for i, tt := range tests {
			for _, p := range protocols {
				t.Run(tt.name+", "+p.name, func(t *testing.T) {
					t.Parallel()
					method := tt.method
					if method == "" {
						method = "GET"
					}
					id := fmt.Sprintf("hostile-%d-%s", i, p.name)
					got, res, hints := attempt(t, p, method, fmt.Sprintf("/v1/hostile/%d", i), token, id, nil)
					if got != tt.want && (tt.want != "any" || !strings.HasPrefix(got, "50")) {
						t.Errorf("%s, want %s", got, tt.want)
					}
					sent.Store(id, len(wire.of(id)))
					if hints > 64 {
						t.Errorf("%d 1xx reached the client", hints)
					}
					if res != nil {
						checkAnswerHeader(t, res)
					}
					if got, _, _ := attempt(t, p, "GET", "/v1/after", token, id+"-after", nil); got != `200 {"ok":true}` {
						t.Errorf("the next call got %s", got)
					}
				})
			}
		}
	})
	growth := g.memory() - before
	t.Logf("the guard grew by %d MiB", growth>>20)
	if growth > 6*memoryGrowth() {
		t.Errorf("the guard grew by %d MiB", growth>>20)
	}
	g.stop()
	wire.all(t)
	stored := map[string]string{}
	for _, c := range storedCalls(t, dir) {
		stored[c.RequestID] = fmt.Sprintf("%d %s", c.Status, c.Error)
		// A connection that dies without a word of an answer may have been dead before.
		if n, ok := sent.Load(c.RequestID); ok && (n != int(c.Replays)+1 || n != 1 && c.Error != "upstream_unreachable") {
			t.Errorf("%s: sent %d times, %d replays recorded", c.RequestID, n, c.Replays)
		}
	}
	for i, tt := range tests {
		for _, p := range protocols {
			want := tt.want
			if want == "broken" {
				want = "200 upstream_aborted"
			}
			got := stored[fmt.Sprintf("hostile-%d-%s", i, p.name)]
			if status, _, _ := strings.Cut(want, " "); want != "any" && got != want && (got != status+" " || strings.Contains(want, "upstream")) {
				t.Errorf("%s, %s: recorded %q, want %q", tt.name, p.name, got, want)
			}
		}
	}
	if strings.Contains(g.text(), "panic") {
		t.Errorf("a panic:\n%s", g.text())
	}
}

// checkAnswerHeader fails the test for what an upstream must not say to a client.
func checkAnswerHeader(t *testing.T, res *http.Response) {
	t.Helper()
	for _, name := range []string{"Call", "Integration", "Effect", "Reason", "Mfa"} {
		if v := res.Header.Values("Partnerguard-" + name); len(v) != 1 {
			t.Errorf("Partnerguard-%s: %q", name, v)
		}
	}
	if v := res.Header.Get("Partnerguard-Effect"); v != "allow" && res.StatusCode < 500 {
		t.Errorf("Partnerguard-Effect: %s", v)
	}
	for _, name := range []string{"Set-Cookie", "X-Hop", "Keep-Alive", "Upgrade", "Proxy-Authenticate", "Ismfacompliant"} {
		if v := res.Header.Values(name); len(v) != 0 {
			t.Errorf("%s: %q", name, v)
		}
	}
	for name, values := range res.Header {
		for _, v := range values {
			if strings.ContainsAny(v, "\r\n\x00") {
				t.Errorf("%s: %q", name, v)
			}
		}
	}
	if v := res.Header.Values("Content-Length"); len(v) > 1 {
		t.Errorf("Content-Length: %q", v)
	}
	for name := range res.Trailer {
		if strings.HasPrefix(strings.ToLower(name), "partnerguard") {
			t.Errorf("trailer %s", name)
		}
	}
}

// An HTTP/1.0 client takes the first answer for the only one and the end of the
// connection for the end of the body.
func TestHostileUpstreamAndAnOldClient(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	wire := startWire(t)
	g, _ := startHostile(t, em, t.TempDir(), fmt.Sprintf("url: %q", wire.url))
	wire.respond(func(c net.Conn, r wireRequest) bool {
		switch r.target {
		case "/v1/hints":
			io.WriteString(c, "HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n")
			return true
		case "/v1/switch":
			io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\n\r\n")
			return true
		}
		return false
	})
	call := func(path string) string {
		return fmt.Sprintf("GET %s HTTP/1.0\r\nHost: g\r\nConnection: keep-alive\r\n\r\n", path)
	}
	answers := talk(t, g.url, call("/v1/hints")+call("/v1/hints"))
	if got := statuses(answers); got != "200" || answers[0].body != "hello" {
		t.Errorf("%s %+v, want the one answer", got, answers)
	}
	// After a 101 the client's bytes would go upstream unread.
	answers = talk(t, g.url, strings.Replace(call("/v1/switch"), "1.0", "1.1", 1)+"rubbish\r\n\r\n")
	if got := statuses(answers); got != "502 upstream_unreachable, 400" {
		t.Errorf("%s, want 502 and no tunnel", got)
	}
	wire.all(t)
}

// A compressed refusal that unpacks to 10 GB passes as it is; what is looked at of it
// is bounded, and its meaning is found all the same.
func TestHostileUpstreamWithABomb(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	wire := startWire(t)
	dir := t.TempDir()
	g, protocols := startHostile(t, em, dir, fmt.Sprintf("url: %q", wire.url))
	token := em.Mint(emulator.TokenSpec{})
	member := func(begin string, zeros int) []byte {
		var b bytes.Buffer
		w := gzip.NewWriter(&b)
		io.WriteString(w, begin)
		w.Write(make([]byte, zeros))
		w.Close()
		return b.Bytes()
	}
	// Members one after the other unpack as one.
	bomb := append(member(`{"code":"900421","description":"`, 1<<20), bytes.Repeat(member("", 10<<20), 1000)...)
	wire.respond(func(c net.Conn, r wireRequest) bool {
		fmt.Fprintf(c, "HTTP/1.1 401 Unauthorized\r\nContent-Encoding: gzip\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n", len(bomb))
		c.Write(bomb)
		return true
	})
	attempt(t, protocols[0], "GET", "/v1/x", token, "first", nil) // sets up connections and pools
	before, highest, calls := g.memory(), int64(0), 1
	for _, p := range protocols {
		var wg sync.WaitGroup
		for range 4 {
			calls++
			wg.Go(func() {
				res, err := p.client.Do(p.request(t.Context(), t, "GET", "/v1/x", token, "bomb", nil, ""))
				if err != nil {
					t.Error(err)
					return
				}
				defer res.Body.Close()
				body := &memoryReader{Reader: res.Body, g: g}
				if text, err := io.ReadAll(body); err != nil || !bytes.Equal(text, bomb) {
					t.Errorf("%d of %d bytes, %v", len(text), len(bomb), err)
				}
			})
		}
		wg.Wait()
		highest = max(highest, g.memory())
	}
	growth, bound := highest-before, memoryGrowth()
	t.Logf("%d MiB that unpack to %d GiB, and memory grew by %d MiB", len(bomb)>>20, 10*1000>>10, growth>>20)
	if growth > bound {
		t.Errorf("the guard grew by %d MiB, want at most %d", growth>>20, bound>>20)
	}
	g.stop()
	refused := listCalls(t, dir, "--status", "4xx")
	if len(refused) != calls {
		t.Errorf("%d refusals recorded, want %d", len(refused), calls)
	}
	for id, c := range refused {
		if c.Rejection != "mfa_required" || c.Code != "900421" || len(c.Causes) == 0 || c.Causes[0].Fix == "" {
			t.Errorf("%s: %+v", id, c)
		}
	}
}

// A connection that died while it was idle takes the next call with it. What changes
// something is never sent again; what changes nothing is, and that is on record.
func TestNothingIsSentTwice(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	wire := startWire(t)
	dir := t.TempDir()
	g, protocols := startHostile(t, em, dir, fmt.Sprintf("url: %q", wire.url))
	token := em.Mint(emulator.TokenSpec{})
	var used sync.Map // connections
	wire.respond(func(c net.Conn, r wireRequest) bool {
		if _, again := used.LoadOrStore(c, true); again && r.target == "/v1/x" {
			return false // it was read, perhaps carried out, and never answered
		}
		wireAnswers(c, r)
		return true
	})
	type test struct {
		method string
		body   string
		header string
		sends  int
	}
	var tests []test
	for _, header := range []string{"", "Idempotency-Key", "X-Idempotency-Key", "idempotency-key"} {
		for _, method := range []string{"GET", "HEAD", "OPTIONS"} {
			tests = append(tests, test{method, "", header, 2})
		}
		for _, method := range []string{"POST", "PUT", "PATCH", "DELETE", "get", "QUERY"} {
			tests = append(tests, test{method, "", header, 1}, test{method, "{}", header, 1})
		}
		tests = append(tests, test{"GET", "{}", header, 1})
	}
	want := map[string]test{}
	for i, tt := range tests {
		for _, p := range protocols {
			id := fmt.Sprintf("%s/%d/%s", p.name, i, tt.method)
			t.Run(fmt.Sprintf("%s %q %s, %s", tt.method, tt.body, tt.header, p.name), func(t *testing.T) {
				// A connection is left idle, whichever kind the request will take.
				for _, warm := range []struct {
					method string
					body   io.Reader
				}{{"GET", nil}, {"POST", strings.NewReader("{}")}} {
					if got, _, _ := attempt(t, p, warm.method, "/v1/warm", token, "warm", warm.body); got != `200 {"ok":true}` {
						t.Fatal(got)
					}
				}
				var body io.Reader
				if tt.body != "" {
					body = strings.NewReader(tt.body)
				}
				r := p.request(t.Context(), t, tt.method, "/v1/x", token, id, body, "")
				if tt.header != "" {
					r.Header.Set(tt.header, "k")
				}
				res, err := p.client.Do(r)
				if err != nil {
					t.Fatal(err)
				}
				res.Body.Close()
				if n := len(wire.of(id)); n != tt.sends {
					t.Errorf("sent %d times, want %d", n, tt.sends)
				}
				if status := map[int]int{1: 502, 2: 200}[tt.sends]; res.StatusCode != status {
					t.Errorf("the client got %d, want %d", res.StatusCode, status)
				}
				want[id] = tt
			})
		}
	}
	g.stop()
	wire.all(t)
	for _, c := range storedCalls(t, dir) {
		if tt, ok := want[c.RequestID]; ok && c.Replays != int64(tt.sends-1) {
			t.Errorf("%s: %d replays recorded, want %d", c.RequestID, c.Replays, tt.sends-1)
		}
	}
}

// http2Wire is an upstream that speaks HTTP/2 frame by frame, and HTTP/1.1 where the
// guard asks for that.
type http2Wire struct {
	*wireServer
	cert certificate

	mu    sync.Mutex
	conns map[*http2Conn]struct{}
	hello func(c *http2Conn) bool // nil is the usual beginning; false ends it
	sees  func(c *http2Conn, stream uint32, path string)
}

type http2Conn struct {
	net.Conn
	w     *http2Wire
	fr    *http2.Framer
	write sync.Mutex
	enc   *hpack.Encoder
	block bytes.Buffer
}

func startHTTP2Wire(t *testing.T) *http2Wire {
	t.Helper()
	w := &http2Wire{wireServer: &wireServer{}, cert: throwAwayCertificate(t), conns: map[*http2Conn]struct{}{}}
	pair, err := tls.LoadX509KeyPair(w.cert.certificate, w.cert.key)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w.url = "https://" + l.Addr().String()
	serveConns(t, l, func(c net.Conn) {
		tc := tls.Server(c, &tls.Config{Certificates: []tls.Certificate{pair}, NextProtos: []string{"h2", "http/1.1"}})
		if tc.Handshake() != nil {
			return
		}
		if tc.ConnectionState().NegotiatedProtocol != "h2" {
			w.serve(tc)
			return
		}
		hc := &http2Conn{Conn: tc, w: w, fr: http2.NewFramer(tc, tc)}
		hc.fr.AllowIllegalWrites = true
		hc.fr.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
		hc.enc = hpack.NewEncoder(&hc.block)
		hc.serve()
		tc.Close()
	})
	return w
}

var retired = [8]byte{'r', 'e', 't', 'i', 'r', 'e', 'd'}

func (c *http2Conn) serve() {
	preface := make([]byte, len(http2.ClientPreface))
	if _, err := io.ReadFull(c, preface); err != nil || string(preface) != http2.ClientPreface {
		return
	}
	c.w.mu.Lock()
	hello, sees := c.w.hello, c.w.sees
	c.w.conns[c] = struct{}{}
	c.w.mu.Unlock()
	defer func() {
		c.w.mu.Lock()
		delete(c.w.conns, c)
		c.w.mu.Unlock()
	}()
	if hello == nil {
		c.do(func(fr *http2.Framer) { fr.WriteSettings() })
	} else if !hello(c) {
		return
	}
	var running sync.WaitGroup
	defer running.Wait()
	defer c.Close()
	for {
		f, err := c.fr.ReadFrame()
		if err != nil {
			return
		}
		switch f := f.(type) {
		case *http2.SettingsFrame:
			if !f.IsAck() {
				c.do(func(fr *http2.Framer) { fr.WriteSettingsAck() })
			}
		case *http2.PingFrame:
			if f.IsAck() && f.Data == retired {
				return
			}
			if !f.IsAck() {
				c.do(func(fr *http2.Framer) { fr.WritePing(true, f.Data) })
			}
		case *http2.MetaHeadersFrame:
			r := wireRequest{method: f.PseudoValue("method"), target: f.PseudoValue("path"), framing: "none"}
			for _, h := range f.RegularFields() {
				r.header = append(r.header, h.Name+": "+h.Value)
			}
			c.w.wireServer.mu.Lock()
			c.w.requests = append(c.w.requests, r)
			c.w.wireServer.mu.Unlock()
			stream := f.StreamID
			if sees != nil {
				running.Go(func() { sees(c, stream, r.target) })
			} else {
				c.ok(stream)
			}
		}
	}
}

// do writes frames, one goroutine at a time.
func (c *http2Conn) do(write func(fr *http2.Framer)) {
	c.write.Lock()
	defer c.write.Unlock()
	write(c.fr)
}

// headers writes a header block as it stands, name and value by turns.
func (c *http2Conn) headers(stream uint32, end bool, fields ...string) {
	c.do(func(fr *http2.Framer) {
		fr.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: c.encode(fields...), EndHeaders: true, EndStream: end})
	})
}

func (c *http2Conn) encode(fields ...string) []byte {
	c.block.Reset()
	for i := 0; i+1 < len(fields); i += 2 {
		c.enc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
	}
	return bytes.Clone(c.block.Bytes())
}

func (c *http2Conn) data(stream uint32, end bool, text string) {
	c.do(func(fr *http2.Framer) { fr.WriteData(stream, end, []byte(text)) })
}

func (c *http2Conn) ok(stream uint32) {
	c.headers(stream, false, ":status", "200", "content-type", "application/json", "content-length", "11")
	c.data(stream, true, `{"ok":true}`)
}

// retire ends all connections as a server does that stops, and waits until they are
// gone.
func (w *http2Wire) retire(t *testing.T) {
	t.Helper()
	told := map[*http2Conn]bool{}
	awaiting(t, func() (int, bool) {
		w.mu.Lock()
		defer w.mu.Unlock()
		for c := range w.conns { // also one that begins meanwhile
			if !told[c] {
				told[c] = true
				go c.do(func(fr *http2.Framer) {
					fr.WriteGoAway(1<<31-1, http2.ErrCodeNo, nil)
					fr.WritePing(false, retired) // answered once the GOAWAY was read
				})
			}
		}
		return len(w.conns), len(w.conns) == 0
	})
}

// flood writes until the other side has had enough, or ends the test after a while.
func (c *http2Conn) flood(write func(fr *http2.Framer) error) {
	c.SetWriteDeadline(time.Now().Add(20 * time.Second))
	for range 2_000_000 {
		var err error
		c.do(func(fr *http2.Framer) { err = write(fr) })
		if err != nil {
			return
		}
	}
}

// The same over HTTP/2.
func TestHostileHTTP2Upstream(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	wire := startHTTP2Wire(t)
	dir := t.TempDir()
	g, protocols := startHostile(t, em, dir, fmt.Sprintf("url: %q, ca: %q, http2: true", wire.url, wire.cert.certificate), "timeouts: {response_header: 2s, tls: 2s, dial: 2s}")
	token := em.Mint(emulator.TokenSpec{})

	type script = func(c *http2Conn, stream uint32)
	say := func(fields ...string) script {
		return func(c *http2Conn, stream uint32) { c.headers(stream, true, fields...) }
	}
	body := func(text string, fields ...string) script {
		return func(c *http2Conn, stream uint32) {
			c.headers(stream, false, append([]string{":status", "200"}, fields...)...)
			c.data(stream, true, text)
		}
	}
	// breaks begins an answer and breaks off.
	breaks := func(how func(c *http2Conn, stream uint32)) script {
		return func(c *http2Conn, stream uint32) {
			c.headers(stream, false, ":status", "200")
			c.data(stream, false, "hello")
			how(c, stream)
		}
	}
	resets := func(code http2.ErrCode) script {
		return func(c *http2Conn, stream uint32) {
			c.do(func(fr *http2.Framer) { fr.WriteRSTStream(stream, code) })
		}
	}
	silent := func(*http2Conn, uint32) {}
	type test struct {
		name string
		sees script
		want string
	}
	tests := []test{
		{"a whole answer", body("hello", "content-length", "5"), "200 hello"},
		{"a short body", body("short", "content-length", "100"), "broken"},
		{"no body of what there should be", say(":status", "200", "content-length", "100"), "broken"},
		{"a long body", body("hello, world", "content-length", "5"), "broken"},
		{"a negative length", body("hello", "content-length", "-5"), "200 hello"},
		{"two lengths", body("hello", "content-length", "3", "content-length", "5"), "200 hello"},
		{"two equal lengths", body("hello", "content-length", "5", "content-length", "5"), "200 hello"},
		{"chunks", body("5\r\nhello\r\n0\r\n\r\n", "transfer-encoding", "chunked"), "200 5\r\nhello\r\n0"},
		{"204 with a body", func(c *http2Conn, stream uint32) {
			c.headers(stream, false, ":status", "204")
			c.data(stream, true, "hello")
		}, "204"},

		{"no status", say("x-a", "b"), unreachable},
		{"two statuses", say(":status", "200", ":status", "204"), unreachable},
		{"a status that is no number", say(":status", "abc"), unreachable},
		{"status 99", say(":status", "099"), unreachable},
		{"status 20000", say(":status", "20000"), unreachable},
		{"status 101", say(":status", "101"), unreachable},
		{"status 101 that goes on", func(c *http2Conn, stream uint32) { c.headers(stream, false, ":status", "101") }, unreachable},
		{"a status after a header", say("x-a", "b", ":status", "200"), unreachable},
		{"a pseudo-header of requests", say(":status", "200", ":path", "/"), unreachable},
		{"a name in capitals", say(":status", "200", "X-A", "b"), unreachable},
		{"CRLF in a value", say(":status", "200", "x-a", "b\r\nset-cookie: evil=1"), unreachable},
		{"CRLF in a name", say(":status", "200", "x-a: b\r\nset-cookie", "evil=1"), unreachable},
		{"ours", body("hello", "partnerguard-effect", "reject", "partnerguard_reason", "x", "partnerguard-call", "x"), "200 hello"},
		{"ours in trailers", func(c *http2Conn, stream uint32) {
			c.headers(stream, false, ":status", "200", "trailer", "partnerguard-effect")
			c.data(stream, false, "hello")
			c.headers(stream, true, "partnerguard-effect", "reject", "partnerguard_mfa", "x", "x-t", "x")
		}, "200 hello"},
		{"hop by hop", body("hello", "connection", "x-hop", "x-hop", "1", "keep-alive", "x", "upgrade", "h2c"), "200 hello"},
		{"103 before the answer", func(c *http2Conn, stream uint32) {
			c.headers(stream, false, ":status", "103", "link", "</x>", "partnerguard-effect", "allow", "ismfacompliant", "True")
			c.ok(stream)
		}, `200 {"ok":true}`},

		{"a body before the header", func(c *http2Conn, stream uint32) { c.data(stream, true, "hello") }, unreachable},
		{"trailers that do not end it", breaks(func(c *http2Conn, stream uint32) { c.headers(stream, false, "x-t", "x") }), "broken"},
		{"a status in trailers", breaks(func(c *http2Conn, stream uint32) { c.headers(stream, true, ":status", "200") }), "broken"},
		{"CANCEL in the middle", breaks(resets(http2.ErrCodeCancel)), "broken"},
		{"NO_ERROR in the middle", breaks(resets(http2.ErrCodeNo)), "broken"},
		{"REFUSED_STREAM in the middle", breaks(resets(http2.ErrCodeRefusedStream)), "broken"},
		{"a reset at once", resets(http2.ErrCodeInternal), unreachable},

		{"silence", silent, tooLate},
		{"silence in the middle", breaks(silent), "broken"},
		{"empty data without end", breaks(func(c *http2Conn, stream uint32) {
			c.flood(func(fr *http2.Framer) error { return fr.WriteData(stream, false, nil) })
		}), "broken"},
		{"103 without end", func(c *http2Conn, stream uint32) {
			block := c.encode(":status", "103", "link", "</x>")
			c.flood(func(fr *http2.Framer) error {
				return fr.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: block, EndHeaders: true})
			})
		}, "any"},
	}
	// These take the whole connection with them, so each has one of its own.
	ends := []test{
		{"GOAWAY in the middle", breaks(func(c *http2Conn, stream uint32) {
			c.do(func(fr *http2.Framer) { fr.WriteGoAway(stream, http2.ErrCodeInternal, nil) })
			c.Close()
		}), "broken"},
		{"a close in the middle", breaks(func(c *http2Conn, _ uint32) { c.Close() }), "broken"},
		{"a reset of the connection in the middle", breaks(func(c *http2Conn, _ uint32) {
			time.Sleep(100 * time.Millisecond) // a reset overtakes what was not read yet
			reset(c.Conn)
		}), "broken"},
		{"a close at once", func(c *http2Conn, _ uint32) { c.Close() }, unreachable},
		{"a push", func(c *http2Conn, stream uint32) {
			c.do(func(fr *http2.Framer) {
				fr.WritePushPromise(http2.PushPromiseParam{StreamID: stream, PromiseID: 2, EndHeaders: true, BlockFragment: c.encode(":method", "GET", ":scheme", "https", ":authority", "x", ":path", "/")})
			})
		}, unreachable},
		{"a header of 2 MiB", say(":status", "200", "x-a", strings.Repeat("a", 2<<20)), "any"},
		{"headers without end", func(c *http2Conn, stream uint32) {
			block := c.encode(":status", "200")
			more := c.encode("x-a", strings.Repeat("a", 8<<10))
			c.do(func(fr *http2.Framer) {
				fr.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: block})
			})
			c.flood(func(fr *http2.Framer) error { return fr.WriteContinuation(stream, false, more) })
		}, "any"},
		{"continuations of nothing", func(c *http2Conn, stream uint32) {
			block := c.encode(":status", "200")
			c.do(func(fr *http2.Framer) {
				fr.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: block})
			})
			c.flood(func(fr *http2.Framer) error { return fr.WriteContinuation(stream, false, nil) })
		}, "any"},
		{"a broken header block", func(c *http2Conn, stream uint32) {
			c.do(func(fr *http2.Framer) {
				fr.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, EndHeaders: true, EndStream: true})
			})
		}, unreachable},
		{"a window beyond 31 bits", func(c *http2Conn, stream uint32) {
			c.do(func(fr *http2.Framer) {
				fr.WriteWindowUpdate(0, 1<<31-1)
				fr.WriteWindowUpdate(0, 1<<31-1)
			})
		}, unreachable},
		{"pings without end", func(c *http2Conn, _ uint32) {
			c.flood(func(fr *http2.Framer) error { return fr.WritePing(false, [8]byte{1}) })
		}, "any"},
		{"settings without end", func(c *http2Conn, _ uint32) {
			c.flood(func(fr *http2.Framer) error {
				return fr.WriteSettings(http2.Setting{ID: http2.SettingMaxFrameSize, Val: 1 << 20})
			})
		}, "any"},
		{"a window of a bad size later", func(c *http2Conn, _ uint32) {
			c.do(func(fr *http2.Framer) {
				fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 31})
			})
		}, unreachable},
	}
	hellos := []struct {
		name  string
		hello func(c *http2Conn) bool
		want  string
	}{
		{"a window beyond 31 bits", setting(http2.SettingInitialWindowSize, 1<<31), unreachable},
		{"frames of one byte", setting(http2.SettingMaxFrameSize, 1), unreachable},
		{"frames of 4 GiB", setting(http2.SettingMaxFrameSize, 1<<32-1), unreachable},
		{"push", setting(http2.SettingEnablePush, 1), "any"},
		{"an unknown setting", setting(0xf00, 1<<32-1), `200 {"ok":true}`},
		{"a table of 4 GiB", setting(http2.SettingHeaderTableSize, 1<<32-1), `200 {"ok":true}`},
		{"no header may be sent", setting(http2.SettingMaxHeaderListSize, 1), "any"},
		{"no stream may be opened", setting(http2.SettingMaxConcurrentStreams, 0), "any"},
		{"half a setting", func(c *http2Conn) bool {
			c.Write([]byte{0, 0, 5, 4, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5})
			return true
		}, unreachable},
		{"a ping first", func(c *http2Conn) bool {
			c.do(func(fr *http2.Framer) { fr.WritePing(false, [8]byte{}) })
			return true
		}, unreachable},
		{"HTTP/1.1", func(c *http2Conn) bool { io.WriteString(c, wireOK+`{"ok":true}`); return true }, unreachable},
		{"nothing", func(c *http2Conn) bool { return false }, unreachable},
		{"silence", func(c *http2Conn) bool { io.Copy(io.Discard, c); return false }, tooLate},
		{"a frame of 16 MiB", func(c *http2Conn) bool {
			c.Write([]byte{0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 1})
			return true
		}, unreachable},
	}

	scripts := map[string]script{}
	for i, tt := range append(slices.Clone(tests), ends...) {
		scripts[fmt.Sprintf("/v1/hostile/%d", i)] = tt.sees
	}
	wire.sees = func(c *http2Conn, stream uint32, path string) {
		if s := scripts[path]; s != nil {
			s(c, stream)
			return
		}
		c.ok(stream)
	}
	before := g.memory()
	call := func(t *testing.T, i int, tt test, p protocol) {
		t.Helper()
		id := fmt.Sprintf("hostile-%d-%s", i, p.name)
		began := time.Now()
		got, res, hints := attempt(t, p, "GET", fmt.Sprintf("/v1/hostile/%d", i), token, id, nil)
		if got != tt.want && (tt.want != "any" || got == "no end" || strings.HasPrefix(got, "200")) {
			t.Errorf("%s, want %s", got, tt.want)
		}
		if took := time.Since(began); took > 20*time.Second {
			t.Errorf("it took %s", took)
		}
		if n := len(wire.of(id)); n != 1 {
			t.Errorf("sent %d times", n)
		}
		if hints > 64 {
			t.Errorf("%d 1xx reached the client", hints)
		}
		if res != nil {
			checkAnswerHeader(t, res)
		}
	}
	t.Run("streams", func(t *testing.T) {
		for i, tt := range tests {
			for _, p := range protocols {
				t.Run(tt.name+", "+p.name, func(t *testing.T) {
					call(t, i, tt, p)
				})
			}
		}
	})
	after := func(t *testing.T, p protocol) {
		t.Helper()
		wire.retire(t)
		if got, _, _ := attempt(t, p, "GET", "/v1/after", token, "after", nil); got != `200 {"ok":true}` {
			t.Errorf("the next call got %s", got)
		}
	}
	t.Run("connections", func(t *testing.T) {
		for i, tt := range ends {
			for _, p := range protocols {
				t.Run(tt.name+", "+p.name, func(t *testing.T) {
					wire.retire(t)
					call(t, len(tests)+i, tt, p)
					after(t, p)
				})
			}
		}
	})
	t.Run("beginnings", func(t *testing.T) {
		for _, tt := range hellos {
			for _, p := range protocols {
				t.Run(tt.name+", "+p.name, func(t *testing.T) {
					wire.retire(t)
					wire.begin(tt.hello)
					began := time.Now()
					for range 2 { // by the second the settings are known for sure
						got, _, _ := attempt(t, p, "GET", "/v1/x", token, "hello", nil)
						if got != tt.want && (tt.want != "any" || got == "no end") {
							t.Errorf("%s, want %s", got, tt.want)
						}
						t.Logf("%s after %s", got, time.Since(began).Round(time.Millisecond))
					}
					wire.begin(nil)
					after(t, p)
				})
			}
		}
	})
	growth := g.memory() - before
	t.Logf("the guard grew by %d MiB", growth>>20)
	if growth > 6*memoryGrowth() {
		t.Errorf("the guard grew by %d MiB", growth>>20)
	}
	g.stop()
	if strings.Contains(g.text(), "panic") {
		t.Errorf("a panic:\n%s", g.text())
	}
}

// An upstream that takes no more of a body is given up, in either version of HTTP.
func TestHostileUpstreamTakesNoMore(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	deaf, err := net.Listen("tcp", "127.0.0.1:0") // connects, and never reads
	if err != nil {
		t.Fatal(err)
	}
	serveConns(t, deaf, func(c net.Conn) { <-t.Context().Done() })
	shut := startHTTP2Wire(t)
	shut.begin(setting(http2.SettingInitialWindowSize, 0))
	shut.sees = func(*http2Conn, uint32, string) {}
	for name, upstream := range map[string]string{
		"HTTP/1.1 upstream": fmt.Sprintf("url: %q", "http://"+deaf.Addr().String()),
		"HTTP/2 upstream":   fmt.Sprintf("url: %q, ca: %q, http2: true", shut.url, shut.cert.certificate),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			g, protocols := startHostile(t, em, dir, upstream, "timeouts: {response_header: 1s, tls: 1s, dial: 1s}")
			token := em.Mint(emulator.TokenSpec{})
			for _, p := range protocols {
				began := time.Now()
				body := io.LimitReader(zeros{}, 64<<20)
				got, _, _ := attempt(t, p, "POST", "/v1/x", token, "upload", body)
				t.Logf("%s: %s after %s", p.name, got, time.Since(began).Round(10*time.Millisecond))
				// A client that is still writing may not read the answer.
				if took := time.Since(began); got != tooLate && got != "broken" || took > 20*time.Second {
					t.Errorf("%s after %s", got, took)
				}
			}
			g.stop()
			calls := storedCalls(t, dir)
			for id, c := range calls {
				if c.Status != 504 || c.Error != "upstream_timeout" || c.Replays != 0 {
					t.Errorf("%s: %d %s", id, c.Status, c.Error)
				}
			}
			if len(calls) != len(protocols) {
				t.Errorf("%d records", len(calls))
			}
		})
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func setting(id http2.SettingID, value uint32) func(*http2Conn) bool {
	return func(c *http2Conn) (ok bool) {
		c.do(func(fr *http2.Framer) { ok = fr.WriteSettings(http2.Setting{ID: id, Val: value}) == nil })
		return ok
	}
}

// begin sets how the next connections begin.
func (w *http2Wire) begin(hello func(*http2Conn) bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.hello = hello
}

// HTTP/2 has more ways to hand a request back. What changes something is sent once
// all the same.
func TestNothingIsSentTwiceOverHTTP2(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	wire := startHTTP2Wire(t)
	dir := t.TempDir()
	g, protocols := startHostile(t, em, dir, fmt.Sprintf("url: %q, ca: %q, http2: true", wire.url, wire.cert.certificate))
	token := em.Mint(emulator.TokenSpec{})
	var refusals atomic.Int32 // still to come
	var how atomic.Value
	wire.sees = func(c *http2Conn, stream uint32, path string) {
		if path != "/v1/x" || refusals.Add(-1) < 0 {
			c.ok(stream)
			return
		}
		how.Load().(func(*http2Conn, uint32))(c, stream)
	}
	ways := []struct {
		name   string
		refuse func(c *http2Conn, stream uint32)
	}{
		{"REFUSED_STREAM", func(c *http2Conn, stream uint32) {
			c.do(func(fr *http2.Framer) { fr.WriteRSTStream(stream, http2.ErrCodeRefusedStream) })
		}},
		{"PROTOCOL_ERROR", func(c *http2Conn, stream uint32) {
			c.do(func(fr *http2.Framer) { fr.WriteRSTStream(stream, http2.ErrCodeProtocol) })
		}},
		{"GOAWAY", func(c *http2Conn, stream uint32) {
			c.do(func(fr *http2.Framer) { fr.WriteGoAway(0, http2.ErrCodeNo, nil) })
		}},
		{"a close", func(c *http2Conn, _ uint32) { c.Close() }},
	}
	wire.respond(func(c net.Conn, r wireRequest) bool { // of HTTP/1.1
		if r.target == "/v1/x" && refusals.Add(-1) >= 0 {
			return false
		}
		wireAnswers(c, r)
		return true
	})
	sent := map[string]int{}
	for _, way := range ways {
		for _, tt := range []struct {
			method, body string
			safe         bool
		}{{"GET", "", true}, {"HEAD", "", true}, {"POST", "", false}, {"POST", "{}", false}, {"PATCH", "", false}, {"DELETE", "", false}, {"GET", "{}", false}} {
			for _, p := range protocols {
				id := fmt.Sprintf("%s/%s/%q/%s", way.name, tt.method, tt.body, p.name)
				t.Run(id, func(t *testing.T) {
					attempt(t, p, tt.method, "/v1/warm", token, "warm", nil)
					how.Store(way.refuse)
					refusals.Store(1)
					var body io.Reader
					if tt.body != "" {
						body = strings.NewReader(tt.body)
					}
					outcome, _, _ := attempt(t, p, tt.method, "/v1/x", token, id, body)
					refusals.Store(0)
					n := len(wire.of(id))
					sent[id] = n
					if n != 1 && !tt.safe {
						t.Errorf("sent %d times (%s)", n, outcome)
					}
					if n == 1 && outcome != unreachable {
						t.Errorf("%s, want %s", outcome, unreachable)
					}
				})
			}
		}
	}
	g.stop()
	wire.all(t)
	repeated := 0
	for _, c := range storedCalls(t, dir) {
		if n, ok := sent[c.RequestID]; ok && c.Replays != int64(n-1) {
			t.Errorf("%s: %d replays recorded, sent %d times", c.RequestID, c.Replays, n)
		}
		repeated += int(c.Replays)
	}
	t.Logf("%d replays of %d calls", repeated, len(sent))
	if repeated == 0 {
		t.Error("no read was repeated; the test shows nothing")
	}
}
