package proxy

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/partnerguard/partnerguard/policy"
)

// What is not refused goes upstream as it came, but for scheme and authority and for
// /i/{name}, in one request line; and a path that holds, once decoded, a dot segment or
// NUL is refused.
func FuzzTarget(f *testing.F) {
	f.Fuzz(func(t *testing.T, target string, http2 bool) {
		r := requestFor(target, http2)
		if r == nil {
			return // net/http refuses it
		}
		c := &call{in: r, settings: &settings{}, upstream: &Upstream{url: &url.URL{Scheme: "http", Host: "upstream.example"}}}
		(&Guard{}).readTarget(c)
		path, _, _ := strings.Cut(c.target, "?")
		if path != c.facts.Path {
			t.Fatalf("%q: policy sees %q of target %q", target, c.facts.Path, c.target)
		}
		if c.facts.Refusal != "" {
			if c.facts.Refusal != policy.ReasonRequestAmbiguous && c.facts.Refusal != policy.ReasonIntegrationUnknown {
				t.Fatalf("%q: refused as %s", target, c.facts.Refusal)
			}
			return
		}

		// What came, read anew: what follows the authority, and the name.
		want, name := target, ""
		if !strings.HasPrefix(want, "/") {
			if http2 {
				t.Fatalf("%q is no path", target)
			}
			_, want, _ = strings.Cut(want, "://")
			want = want[len(want)-len(strings.TrimLeftFunc(want, func(r rune) bool { return r != '/' && r != '?' })):]
			if !strings.HasPrefix(want, "/") {
				want = "/" + want
			}
		}
		whole, _, _ := strings.Cut(want, "?")
		if after, ok := strings.CutPrefix(want, "/i/"); ok {
			end := strings.IndexAny(after, "/?")
			if end < 0 {
				end = len(after)
			}
			name, want = after[:end], after[end:]
			if !strings.HasPrefix(want, "/") {
				want = "/" + want
			}
		}
		if c.facts.Evidence.Prefix != name {
			t.Errorf("%q: prefix %q, want %q", target, c.facts.Evidence.Prefix, name)
		}

		// What goes out, on the wire.
		pr := &httputil.ProxyRequest{In: r, Out: r.Clone(t.Context())}
		(&Guard{now: time.Now}).rewrite(pr, c)
		var wire bytes.Buffer
		if err := pr.Out.Write(&wire); err != nil {
			t.Fatalf("%q cannot be sent: %v", target, err)
		}
		line, _, _ := strings.Cut(wire.String(), "\r\n")
		if line != "GET "+want+" HTTP/1.1" {
			t.Errorf("%q goes out as %q, want %q in it", target, line, want)
		}

		decoded, err := url.PathUnescape(whole)
		if err != nil {
			t.Fatalf("%q: %v", target, err)
		}
		for _, segment := range strings.Split(strings.ReplaceAll(decoded, `\`, "/"), "/") {
			if segment == "." || segment == ".." {
				t.Errorf("%q holds a dot segment", target)
			}
		}
		if strings.ContainsAny(whole, "\\#\x00\r\n\t ") || strings.Contains(decoded, "\x00") {
			t.Errorf("%q passes", target)
		}
	})
}

// requestFor is how the server hands on a request for target, nil if it does not.
func requestFor(target string, http2 bool) *http.Request {
	if http2 {
		u, err := url.ParseRequestURI(target)
		if err != nil {
			return nil
		}
		return &http.Request{
			Method: "GET", URL: u, RequestURI: target, Host: "guard.example", Header: http.Header{}, TLS: &tls.ConnectionState{},
			Proto: "HTTP/2.0", ProtoMajor: 2,
		}
	}
	if strings.ContainsAny(target, "\r\n") {
		return nil
	}
	r, err := http.ReadRequest(bufio.NewReader(strings.NewReader("GET " + target + " HTTP/1.1\r\nHost: guard.example\r\n\r\n")))
	if err != nil {
		return nil
	}
	return r
}

// A refusal of Microsoft's is told apart whatever it holds: of a known kind, with a
// short printable code, from no more than a bounded part of it.
func FuzzRejection(f *testing.F) {
	kinds := map[policy.Rejection]bool{
		policy.RejectionMFARequired: true, policy.RejectionAudienceRefused: true, policy.RejectionTokenRefused: true, policy.RejectionClaimsChallenge: true,
		policy.RejectionConditionalAccess: true, policy.RejectionAppOnlyUnsupported: true, policy.RejectionOther: true,
	}
	f.Fuzz(func(t *testing.T, status int, statusLine, encoding, challenge string, body []byte) {
		if len(body) > maxAnswer {
			body = body[:maxAnswer]
		}
		given := bytes.Clone(body)
		kind, code := readRejection(status, statusLine, http.Header{"Content-Encoding": {encoding}, "Www-Authenticate": {challenge}}, body)
		if !bytes.Equal(body, given) {
			t.Error("the body was changed")
		}
		if refused := status == http.StatusUnauthorized || status == http.StatusForbidden; refused != kinds[kind] || !refused && (kind != "" || code != "") {
			t.Errorf("status %d: kind %q, code %q", status, kind, code)
		}
		if len(code) > 64 || printable(code, 64) != code {
			t.Errorf("code %q", code)
		}
		if n := len(decodeBody(encoding, body)); n > maxDecoded && n > len(body) {
			t.Errorf("%d bytes unpack to %d", len(body), n)
		}
	})
}
