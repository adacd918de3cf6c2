package main

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/partnerguard/partnerguard/internal/emulator"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// What the guard adds, relies on or records reaches the upstream; what could pass for
// it does not, and what anyone may claim earns nothing.
func TestHTTPHeaders(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	wire := startWire(t)
	dir := t.TempDir()
	const appID = "3f0c6a1e-5b7d-4d29-9c84-6e1f0a2b7d55"
	g := startGuard(t, dir, strings.Replace(wireYAML(em, wire, "tag"), "integrations:\n", `integrations:
  - {name: by-host, owner: a@contoso.example, mode: audit, match: {host: [orders.guard.example]}}
  - {name: by-agent, owner: a@contoso.example, mode: audit, match: {user_agent: [nightly/]}}
  - {name: by-application, owner: a@contoso.example, mode: audit, match: {application: [Nightly]}}
  - {name: by-source, owner: a@contoso.example, mode: audit, match: {source: [192.0.2.0/24]}}
`, 1))
	token := em.Mint(emulator.TokenSpec{AppID: appID, AMR: []string{"pwd"}})

	const tagged = "200"
	type test struct {
		name, lines string // after Host, without the token unless it says so
		target      string // default /v1/x
		host        string // default guard.example
		noToken     bool
		answer      string   // default 200
		upstream    []string // lines that reach the upstream besides the guard's own and Authorization
		integration string   // default by the app id
		agent       string   // recorded
		application string
		requestID   string // recorded and sent; default is the test's own
		chunked     bool
		text        string // after the header
	}
	tests := []test{
		{name: "nothing of note", lines: "X-A: b\n", upstream: []string{"X-A: b"}},
		{name: "ours, in all spellings", lines: "Partnerguard-Effect: allow\npartnerguard-effect: allow\nPARTNERGUARD-REASON: mfa_present\nPartnerguard_Effect: allow\nPARTNERGUARD_MFA: present\n" +
			"Partnerguard-effect_: x\nPartnerguard: x\nPartnerguard-: x\nPartnerguard_: x\nPartnerguard.Effect: allow\nPartnerguard-Anything-Else: x\nPartnerguard-Upstream-Status: 200\n"},
		{name: "ours, repeated", lines: strings.Repeat("Partnerguard-Effect: allow\nPartnerguard-Mfa: present\n", 20)},
		{name: "ours, folded", lines: "Partnerguard-Effect:\n allow\n"},
		{name: "ours, named in Connection", lines: "Connection: Partnerguard-Call, Partnerguard-Effect, partnerguard-reason\nConnection: Partnerguard-Mfa,Partnerguard-Integration\nPartnerguard-Effect: allow\n"},
		{name: "ours, in trailers", chunked: true, lines: "Trailer: Partnerguard-Effect, Partnerguard-Mfa, X-T\nTransfer-Encoding: chunked\n", text: "2\nab\n0\nPartnerguard-Effect: allow\nPartnerguard-Mfa: present\nX-T: x\n\n"},
		{name: "ours, in trailers that were not announced", chunked: true, lines: "Transfer-Encoding: chunked\n", text: "0\nPartnerguard-Effect: allow\nAuthorization: Bearer x\nMS-RequestId: other\n\n"},
		{name: "a name that only begins like ours", lines: "Partnerguardian: x\nX-Partnerguard-Effect: allow\n", upstream: []string{"Partnerguardian: x", "X-Partnerguard-Effect: allow"}},

		{name: "Connection names the token", lines: "Connection: Authorization\n"},
		{name: "Connection names the token, hidden", lines: "Connection: X-Hop ,\t aUTHORIZATION ,,x\nConnection: authorization\nX-Hop: 1\n"},
		{name: "Connection names the id", lines: "Connection: MS-RequestId\n"},
		{name: "Connection names the ids that the guard adds", lines: "Connection: ms-requestid, MS-CorrelationId\nMS-RequestId: \n", requestID: "any"},
		{name: "Connection names ValidateMfa", lines: "Connection: ValidateMfa, Partnerguard-Effect\n"},
		{name: "Connection names the client's ValidateMfa", lines: "Connection: ValidateMfa\nValidateMfa: False\n", upstream: []string{"Validatemfa: False"}},
		{name: "Connection names the application", lines: "Connection: MS-PartnerCenter-Application\nMS-PartnerCenter-Application: Nightly\n", integration: "by-application", application: "Nightly", upstream: []string{"Ms-Partnercenter-Application: Nightly"}},
		{name: "Connection names the user agent", lines: "Connection: User-Agent\nUser-Agent: nightly/1\n", integration: "by-agent", agent: "nightly/1", upstream: []string{"User-Agent: nightly/1"}},
		{name: "Connection names the framing", lines: "Connection: Content-Length, Host, Transfer-Encoding\nContent-Length: 2\n", text: "{}", upstream: []string{"Content-Length: 2"}},
		{name: "hop by hop", lines: "Connection: X-Hop, Keep-Alive\nX-Hop: 1\nKeep-Alive: timeout=5\nProxy-Connection: keep-alive\nProxy-Authorization: Basic eDp5\nProxy-Authenticate: x\nTE: gzip\nUpgrade: x\n"},
		{name: "TE: trailers", lines: "TE: trailers\n", upstream: []string{"Te: trailers"}},

		{name: "forwarding headers", lines: "X-Forwarded-For: 192.0.2.1\nx-forwarded-for: 192.0.2.2\nX_Forwarded_For: 192.0.2.3\nX-Forwarded_For: 192.0.2.4\nX-Forwarded-Host: orders.guard.example\nX-Forwarded-Proto: https\nX-Forwarded-Port: 1\n" +
			"X-Forwarded-Server: x\nX-Forwarded-Prefix: /i/billing\nX-Forwarded-Uri: /v1/y\nX-Forwarded-Client-Cert: By=x\nX-Forwarded: x\nForwarded: for=192.0.2.5;host=orders.guard.example\nFORWARDED: for=192.0.2.6\n"},
		{name: "client certificate headers", lines: "X-Client-Cert: x\nX-SSL-Client-Verify: SUCCESS\nX-SSL-Client-S-DN: CN=billing.contoso.example\nSsl-Client-Cert: x\nClient-Cert: :x:\nX-ARR-ClientCert: x\nX-Real-IP: 192.0.2.1\nTrue-Client-IP: 192.0.2.1\n",
			upstream: []string{"X-Client-Cert: x", "X-Ssl-Client-Verify: SUCCESS", "X-Ssl-Client-S-Dn: CN=billing.contoso.example", "Ssl-Client-Cert: x", "Client-Cert: :x:", "X-Arr-Clientcert: x", "X-Real-Ip: 192.0.2.1", "True-Client-Ip: 192.0.2.1"}},
		{name: "headers that name another target", lines: "X-Original-URL: /v1/y\nX-Rewrite-URL: /v1/y\nX-HTTP-Method-Override: DELETE\nX-Host: orders.guard.example\nX-Original-Host: orders.guard.example\n",
			upstream: []string{"X-Original-Url: /v1/y", "X-Rewrite-Url: /v1/y", "X-Http-Method-Override: DELETE", "X-Host: orders.guard.example", "X-Original-Host: orders.guard.example"}},

		{name: "two tokens", lines: "Authorization: Bearer x\n", answer: "400 request_ambiguous"},
		{name: "two tokens, one in another case", lines: "AUTHORIZATION: Bearer x\n", answer: "400 request_ambiguous"},
		{name: "the same token twice", lines: "Authorization: Bearer " + token + "\n", answer: "400 request_ambiguous"},
		{name: "a token in the wrong place", noToken: true, lines: "Proxy-Authorization: Bearer " + token + "\nX-Authorization: Bearer " + token + "\n", upstream: []string{"X-Authorization: Bearer " + token}, integration: "unknown"},
		{name: "a token in a trailer", noToken: true, chunked: true, lines: "Transfer-Encoding: chunked\nTrailer: Authorization\n", text: "0\nAuthorization: Bearer " + token + "\n\n", integration: "unknown"},
		{name: "an underscore", lines: "Authorization_: x\nContent_Length: 5\nTransfer_Encoding: chunked\n", upstream: []string{"Authorization_: x", "Content_length: 5", "Transfer_encoding: chunked"}},
		{name: "two ids", lines: "MS-RequestId: second\n", upstream: []string{"Ms-Requestid: second"}},
		{name: "ids in another case", noToken: true, lines: "authorization: bearer " + token + "\nms-correlationid: c\n", upstream: []string{"Authorization: bearer " + token, "Ms-Correlationid: c"}},

		{name: "a Host that names an integration", host: "orders.guard.example", integration: "by-host"},
		{name: "a Host with a port, in capitals", host: "Orders.Guard.Example:8443", integration: "by-host"},
		{name: "a target that beats Host", host: "guard.example", target: "http://orders.guard.example/v1/x", integration: "by-host"},
		{name: "a Host that the target beats", host: "orders.guard.example", target: "http://guard.example/v1/x"},
		{name: "a Host elsewhere", host: "evil.example"},
		{name: "a Host with a trailing dot", host: "orders.guard.example."},
	}
	t.Run("requests", func(t *testing.T) {
		for i := range tests {
			tt := &tests[i]
			t.Run(tt.name, func(t *testing.T) {
				t.Parallel()
				id := fmt.Sprintf("headers-%d", i)
				method, target, host := "GET", tt.target, tt.host
				if tt.text != "" {
					method = "POST"
				}
				if target == "" {
					target = "/v1/x"
				}
				if host == "" {
					host = "guard.example"
				}
				if tt.answer == "" {
					tt.answer = tagged
				}
				lines := "Host: " + host + "\n"
				if !tt.noToken {
					lines += "Authorization: Bearer " + token + "\n"
				}
				// The id comes last, so that a test can put another before it.
				if tt.requestID == "" {
					tt.requestID = id
					lines += "MS-RequestId: " + id + "\n"
				}
				answers := talk(t, g.url, wireText(method+" "+target+" HTTP/1.1\n"+lines+"X-Test: "+id+"\n"+tt.lines+"Connection: close\n\n"+tt.text))
				if got := statuses(answers); got != tt.answer {
					t.Fatalf("%s, want %s", got, tt.answer)
				}
				var seen []wireRequest
				for _, r := range wire.all(t) {
					if slices.Contains(r.get("X-Test"), id) {
						seen = append(seen, r)
					}
				}
				if tt.answer != tagged {
					if len(seen) != 0 {
						t.Errorf("the upstream saw %+v", seen)
					}
					return
				}
				if len(seen) != 1 {
					t.Fatalf("the upstream saw %d requests", len(seen))
				}
				r, h := seen[0], answers[0].header
				if tt.integration == "" {
					tt.integration = "app-" + appID
				}
				reason, mfa := "mfa_missing", "absent"
				if tt.integration == "unknown" {
					reason, mfa = "token_missing", "unknown"
				}
				want := append([]string{"X-Test: " + id, "Host: " + strings.TrimPrefix(wire.url, "http://"),
					"Partnerguard-Call: " + h.Get("Partnerguard-Call"), "Partnerguard-Integration: " + tt.integration,
					"Partnerguard-Effect: tag", "Partnerguard-Reason: " + reason, "Partnerguard-Mfa: " + mfa}, tt.upstream...)
				has := func(name string) bool {
					return slices.ContainsFunc(want, func(l string) bool { return strings.HasPrefix(l, name+": ") })
				}
				if tt.requestID == "any" {
					tt.requestID = strings.Join(r.get("MS-RequestId"), ", ")
					if len(tt.requestID) != 36 {
						t.Errorf("MS-RequestId %q upstream, want one that the guard made", tt.requestID)
					}
				}
				want = append(want, "Ms-Requestid: "+tt.requestID)
				if correlation := r.get("MS-CorrelationId"); !has("Ms-Correlationid") && len(correlation) == 1 && len(correlation[0]) == 36 {
					want = append(want, "Ms-Correlationid: "+correlation[0])
				}
				if !tt.noToken {
					want = append(want, "Authorization: Bearer "+token)
				}
				if method == "GET" && tt.integration != "unknown" && !has("Validatemfa") {
					want = append(want, "Validatemfa: true")
				}
				if tt.chunked {
					want = append(want, "Transfer-Encoding: chunked")
				}
				got := slices.Clone(r.header)
				slices.Sort(got)
				slices.Sort(want)
				if diff := cmp.Diff(want, got); diff != "" {
					t.Errorf("headers upstream (-want +got):\n%s", diff)
				}
				for name, value := range map[string]string{"Effect": "tag", "Reason": reason, "Mfa": mfa, "Integration": tt.integration} {
					if got := h.Values("Partnerguard-" + name); len(got) != 1 || got[0] != value {
						t.Errorf("Partnerguard-%s of the answer: %q, want %q", name, got, value)
					}
				}
			})
		}
	})
	g.stop()
	rows := map[string]int{}
	for _, c := range storedCalls(t, dir) {
		rows[c.RequestID]++
		i := slices.IndexFunc(tests, func(tt test) bool { return tt.requestID == c.RequestID })
		if i < 0 {
			t.Errorf("a call nobody made: %+v", c)
			continue
		}
		tt := tests[i]
		if c.UserAgent != tt.agent || c.Application != tt.application || c.Peer != "127.0.0.1" || c.Mode != "tag" {
			t.Errorf("%s: recorded user agent %q, application %q, peer %s, mode %s", tt.name, c.UserAgent, c.Application, c.Peer, c.Mode)
		}
	}
	for _, tt := range tests {
		if rows[tt.requestID] != 1 {
			t.Errorf("%s: %d records of %s", tt.name, rows[tt.requestID], tt.requestID)
		}
	}
}

// http2Peer speaks HTTP/2 frame by frame, without the checks of a client.
type http2Peer struct {
	*http2.Framer
	conn    net.Conn
	encoder *hpack.Encoder
	block   bytes.Buffer
	next    uint32
}

func dialHTTP2(t *testing.T, url string, cert certificate) *http2Peer {
	t.Helper()
	c, err := tls.Dial("tcp", strings.TrimPrefix(url, "https://"), &tls.Config{RootCAs: cert.pool, NextProtos: []string{"h2"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(20 * time.Second))
	p := &http2Peer{Framer: http2.NewFramer(c, c), conn: c, next: 1}
	p.AllowIllegalWrites = true
	p.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	p.encoder = hpack.NewEncoder(&p.block)
	io.WriteString(c, http2.ClientPreface)
	if err := p.WriteSettings(); err != nil {
		t.Fatal(err)
	}
	return p
}

// request writes fields as they stand, name and value by turns, and a body if it is
// not empty. It returns the stream.
func (p *http2Peer) request(body string, fields ...string) uint32 {
	p.block.Reset()
	for i := 0; i+1 < len(fields); i += 2 {
		p.encoder.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
	}
	id := p.next
	p.next += 2
	p.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: p.block.Bytes(), EndHeaders: true, EndStream: body == ""})
	if body != "" {
		p.WriteData(id, true, []byte(body))
	}
	return id
}

// await reads frames until the stream ends and says how: its status, with the Reason
// where the guard refused, or the code that it was reset with.
func (p *http2Peer) await(stream uint32) string {
	status := ""
	for {
		f, err := p.ReadFrame()
		if err != nil {
			if errors.Is(err, io.EOF) {
				return "closed"
			}
			return err.Error()
		}
		switch f := f.(type) {
		case *http2.MetaHeadersFrame:
			if f.StreamID == stream && f.PseudoValue("status") != "" {
				status = f.PseudoValue("status")
				effect, reason := "", ""
				for _, h := range f.RegularFields() {
					switch h.Name {
					case "partnerguard-effect":
						effect = h.Value
					case "partnerguard-reason":
						reason = h.Value
					}
				}
				if effect == "reject" {
					status += " " + reason
				}
			}
			if f.StreamID == stream && f.StreamEnded() {
				return status
			}
		case *http2.DataFrame:
			if f.StreamID == stream && f.StreamEnded() {
				return status
			}
		case *http2.RSTStreamFrame:
			// After a whole answer NO_ERROR only says that the rest of the request
			// is not wanted.
			if f.StreamID == stream {
				return strings.TrimSpace(status + " " + f.ErrCode.String())
			}
		case *http2.GoAwayFrame:
			if f.ErrCode != http2.ErrCodeNo {
				return "GOAWAY " + f.ErrCode.String()
			}
		}
	}
}

// HTTP/2 carries what HTTP/1.1 cannot spell; none of it reaches the upstream.
func TestHTTP2Requests(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	wire := startWire(t)
	dir := t.TempDir()
	cert := throwAwayCertificate(t)
	g := startGuard(t, dir, strings.Replace(wireYAML(em, wire, "enforce"), `listeners: [{address: "127.0.0.1:0"}]`,
		fmt.Sprintf(`listeners: [{name: tls, address: "127.0.0.1:0", tls: {certificate: %q, key: %q}}]`, cert.certificate, cert.key), 1))
	token, bad := em.Mint(emulator.TokenSpec{}), em.Mint(emulator.TokenSpec{AMR: []string{"pwd"}})
	const smuggled = "GET /v1/smuggled HTTP/1.1\r\nHost: x\r\n\r\n"

	pseudo := func(method, scheme, authority, path string) []string {
		return []string{":method", method, ":scheme", scheme, ":authority", authority, ":path", path}
	}
	get, post := pseudo("GET", "https", "g", "/v1/x"), pseudo("POST", "https", "g", "/v1/x")
	const protocolError = "PROTOCOL_ERROR"
	tests := []struct {
		name     string
		pseudo   []string
		fields   []string
		body     string
		answer   string
		early    string   // the answer, if it comes before the body
		upstream []string // summary; nil is none
		noToken  bool
	}{
		{name: "a plain call", pseudo: get, answer: "200", upstream: []string{"GET /v1/x"}},
		{name: "a body", pseudo: post, body: "{}", answer: "200", upstream: []string{`POST /v1/x chunked "{}"`}},
		{name: "a body with its length", pseudo: post, fields: []string{"content-length", "2"}, body: "{}", answer: "200", upstream: []string{`POST /v1/x length "{}"`}},
		{name: "a request as a body", pseudo: post, fields: []string{"content-length", fmt.Sprint(len(smuggled))}, body: smuggled, answer: "200", upstream: []string{fmt.Sprintf("POST /v1/x length %q", smuggled)}},

		// Lengths.
		{name: "a length of 0 with a body", pseudo: post, fields: []string{"content-length", "0"}, body: smuggled, answer: protocolError, early: "200", upstream: []string{`POST /v1/x length ""`}},
		{name: "a length that is too short", pseudo: post, fields: []string{"content-length", "1"}, body: "{}", answer: protocolError},
		{name: "a length that is too long", pseudo: post, fields: []string{"content-length", "100"}, body: "{}", answer: "INTERNAL_ERROR", upstream: []string{`POST /v1/x length "{}" cut`}},
		{name: "a length without a body", pseudo: post, fields: []string{"content-length", "2"}, answer: "400 request_ambiguous"},
		{name: "two equal lengths", pseudo: post, fields: []string{"content-length", "2", "content-length", "2"}, body: "{}", answer: "400 request_ambiguous"},
		{name: "two lengths", pseudo: post, fields: []string{"content-length", "2", "content-length", "20"}, body: "{}", answer: "400 request_ambiguous"},
		{name: "a length with a sign", pseudo: post, fields: []string{"content-length", "+2"}, body: "{}", answer: protocolError, early: "400 request_ambiguous"},
		{name: "a length that is no number", pseudo: post, fields: []string{"content-length", "x"}, body: smuggled, answer: protocolError, early: "400 request_ambiguous"},
		{name: "a length with zeros", pseudo: post, fields: []string{"content-length", "002"}, body: "{}", answer: "400 request_ambiguous"},

		// Headers that HTTP/2 forbids.
		{name: "transfer-encoding", pseudo: post, fields: []string{"transfer-encoding", "chunked"}, body: "0\r\n\r\n" + smuggled, answer: "400"},
		{name: "connection", pseudo: get, fields: []string{"connection", "authorization"}, answer: "400"},
		{name: "keep-alive", pseudo: get, fields: []string{"keep-alive", "1"}, answer: "400"},
		{name: "proxy-connection", pseudo: get, fields: []string{"proxy-connection", "x"}, answer: "400"},
		{name: "upgrade", pseudo: get, fields: []string{"upgrade", "h2c"}, answer: "400"},
		{name: "te", pseudo: get, fields: []string{"te", "gzip"}, answer: "400"},
		{name: "te: trailers", pseudo: get, fields: []string{"te", "trailers"}, answer: "200", upstream: []string{"GET /v1/x"}},
		{name: "a name in capitals", pseudo: get, fields: []string{"X-A", "b"}, answer: protocolError},
		{name: "CRLF in a value", pseudo: get, fields: []string{"x-a", "b\r\nx-b: c\r\n\r\n" + smuggled}, answer: protocolError},
		{name: "LF in a value", pseudo: get, fields: []string{"x-a", "b\nx-b: c"}, answer: protocolError},
		{name: "NUL in a value", pseudo: get, fields: []string{"x-a", "b\x00"}, answer: protocolError},
		{name: "a colon in a name", pseudo: get, fields: []string{"x-a: b", "c"}, answer: protocolError},
		{name: "CRLF in a name", pseudo: get, fields: []string{"x-a: b\r\nx-b", "c"}, answer: protocolError},
		{name: "a space in a name", pseudo: get, fields: []string{"x a", "c"}, answer: protocolError},
		{name: "an empty name", pseudo: get, fields: []string{"", "c"}, answer: protocolError},
		{name: "two tokens", pseudo: get, fields: []string{"authorization", "Bearer x"}, answer: "400 request_ambiguous"},
		{name: "ours", pseudo: get, fields: []string{"partnerguard-effect", "allow", "partnerguard_mfa", "present"}, answer: "200", upstream: []string{"GET /v1/x"}},

		// Pseudo-headers.
		{name: "a path twice", pseudo: append(slices.Clone(get), ":path", "/v1/y"), answer: protocolError},
		{name: "a pseudo-header after a header", pseudo: []string{":method", "GET", ":scheme", "https", ":authority", "g", "x-a", "b", ":path", "/v1/x"}, answer: protocolError},
		{name: "an unknown pseudo-header", pseudo: append(slices.Clone(get), ":evil", "x"), answer: protocolError},
		{name: "a pseudo-header of answers", pseudo: append(slices.Clone(get), ":status", "200"), answer: protocolError},
		{name: "no path", pseudo: get[:6], answer: protocolError},
		{name: "an empty path", pseudo: pseudo("GET", "https", "g", ""), answer: protocolError},
		{name: "no method", pseudo: get[2:], answer: protocolError},
		{name: "another scheme", pseudo: pseudo("GET", "ftp", "g", "/v1/x"), answer: protocolError},
		{name: "the scheme http", pseudo: pseudo("GET", "http", "g", "/v1/x"), answer: "200", upstream: []string{"GET /v1/x"}},
		{name: "a method with a space", pseudo: pseudo("GET /v1/smuggled HTTP/1.1", "https", "g", "/v1/x"), answer: "400 request_ambiguous"},
		{name: "a method with a line break", pseudo: pseudo("GET /v1/smuggled HTTP/1.1\r\nX:", "https", "g", "/v1/x"), answer: protocolError},
		{name: "a path with a space", pseudo: pseudo("GET", "https", "g", "/v1/x HTTP/1.1"), answer: "400 request_ambiguous"},
		{name: "a query with a space", pseudo: pseudo("GET", "https", "g", "/v1/x?y HTTP/1.1"), answer: "400 request_ambiguous"},
		{name: "a path with a line break", pseudo: pseudo("GET", "https", "g", "/v1/x HTTP/1.1\r\nHost: evil.example\r\n\r\n"+smuggled), answer: protocolError},
		{name: "a path with a tab", pseudo: pseudo("GET", "https", "g", "/v1/x\ty"), answer: protocolError},
		{name: "a relative path", pseudo: pseudo("GET", "https", "g", "v1/x"), answer: protocolError},
		{name: "a URL as the path", pseudo: pseudo("GET", "https", "g", "http://evil.example/v1/x"), answer: "400 request_ambiguous"},
		{name: "a path of two slashes", pseudo: pseudo("GET", "https", "g", "//evil.example/v1"), answer: "200", upstream: []string{"GET //evil.example/v1"}},
		{name: "a dot segment", pseudo: pseudo("GET", "https", "g", "/v1/%2e%2e/x"), answer: "400 request_ambiguous"},
		{name: "a fragment", pseudo: pseudo("GET", "https", "g", "/v1/x#y"), answer: "400 request_ambiguous"},
		{name: "a bad escape", pseudo: pseudo("GET", "https", "g", "/v1/%zz"), answer: protocolError},
		{name: "an asterisk", pseudo: pseudo("OPTIONS", "https", "g", "*"), answer: "400 request_ambiguous"},
		{name: "another authority", pseudo: pseudo("GET", "https", "evil.example", "/v1/x"), answer: "200", upstream: []string{"GET /v1/x"}},
		{name: "an authority with a path", pseudo: pseudo("GET", "https", "evil.example/v1/y?", "/v1/x"), answer: "200", upstream: []string{"GET /v1/x"}},
		{name: "no authority and no Host", pseudo: []string{":method", "GET", ":scheme", "https", ":path", "/v1/x"}, answer: "200", upstream: []string{"GET /v1/x"}},
		{name: "an authority and another Host", pseudo: get, fields: []string{"host", "evil.example"}, answer: "200", upstream: []string{"GET /v1/x"}},
		{name: "CONNECT", pseudo: []string{":method", "CONNECT", ":authority", "evil.example:443"}, answer: "405 method_refused"},
		{name: "CONNECT with a protocol", pseudo: []string{":method", "CONNECT", ":protocol", "websocket", ":scheme", "https", ":authority", "g", ":path", "/v1/x"}, answer: protocolError},
		{name: "TRACE", pseudo: pseudo("TRACE", "https", "g", "/v1/x"), answer: "405 method_refused"},

		{name: "refused, with a request as a body", pseudo: post, noToken: true, fields: []string{"authorization", "Bearer " + bad}, body: smuggled, answer: "401 mfa_missing"},
	}
	for i, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			id := fmt.Sprintf("http2-%d", i)
			p := dialHTTP2(t, g.url, cert)
			defer p.conn.Close()
			fields := append(slices.Clone(tt.pseudo), "ms-requestid", id)
			if !tt.noToken {
				fields = append(fields, "authorization", "Bearer "+token)
			}
			got := p.await(p.request(tt.body, append(fields, tt.fields...)...))
			got = strings.TrimPrefix(got, "GOAWAY ")
			if tt.early != "" {
				got = strings.TrimPrefix(got, tt.early+" ")
			}
			if got != tt.answer && (tt.early == "" || got != tt.early) {
				t.Errorf("%s, want %s", got, tt.answer)
			}
			if tt.answer == "200" || strings.Contains(tt.answer, " ") {
				// The connection is as good as before.
				if got := p.await(p.request("", append(slices.Clone(get), "ms-requestid", id+"-after", "authorization", "Bearer "+token)...)); got != "200" {
					t.Errorf("the next call: %s", got)
				}
			}
			upstream := summary(wire.of(id))
			if len(tt.upstream) > 0 && strings.HasSuffix(tt.upstream[0], " cut") {
				upstream = awaiting(t, func() ([]string, bool) { s := summary(wire.of(id)); return s, len(s) > 0 })
			}
			if tt.answer == protocolError {
				// The header may have gone before the body proved wrong.
				upstream = slices.DeleteFunc(upstream, func(s string) bool { return strings.HasSuffix(s, " cut") })
				if len(upstream) == 0 {
					return
				}
			}
			if diff := cmp.Diff(tt.upstream, upstream, cmpopts.EquateEmpty()); diff != "" {
				t.Errorf("the upstream saw (-want +got):\n%s", diff)
			}
		})
	}
	unparsed := 0
	for _, tt := range tests {
		if tt.answer == "400" {
			unparsed++
		}
	}
	// Some of what is reset is counted, too: net/http takes it for a request before it
	// sees what is wrong with it.
	awaiting(t, func() (string, bool) {
		n := metric(t, g, "partnerguard_unparsed_requests_total")
		return fmt.Sprintf("%v requests counted as unparsed, want at least %d", n, unparsed), n >= float64(unparsed)
	})
	g.stop()
	recorded := map[string]string{}
	for _, c := range storedCalls(t, dir) {
		recorded[c.RequestID] = fmt.Sprint(c.Status)
		if c.Effect == "reject" {
			recorded[c.RequestID] += " " + c.Reason
		}
	}
	for i, tt := range tests {
		id := fmt.Sprintf("http2-%d", i)
		if got, want := recorded[id], tt.answer; strings.Contains(want, " ") && got != want || want == "200" && got != want {
			t.Errorf("%s: recorded %q, want %q", tt.name, got, want)
		}
	}
	for _, r := range wire.all(t) {
		if strings.Contains(r.target, "smuggled") {
			t.Errorf("a smuggled request reached the upstream: %+v", r)
		}
		for _, l := range r.header {
			if name := strings.ToLower(l); strings.HasPrefix(name, "partnerguard") || strings.HasPrefix(name, "keep-alive") || strings.HasPrefix(name, "connection") {
				t.Errorf("%s: the upstream saw %s", r.target, l)
			}
		}
	}
}
