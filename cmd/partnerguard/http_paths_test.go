package main

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/partnerguard/partnerguard/internal/emulator"
)

// pathsYAML is a configuration in which the route decides.
func pathsYAML(em *emulator.Emulator, s *wireServer) string {
	return strings.Replace(wireYAML(em, s, "enforce", `rules:
  - {name: secret, routes: ["/v1/open/secret/**"], mode: enforce}
  - {name: open, routes: ["/v1/open/**"], mode: audit}
  - {name: single, routes: ["/v1/single/*"], mode: audit}`), "integrations:\n",
		"integrations:\n  - {name: billing, owner: billing@contoso.example, mode: audit}\n  - {name: orders, owner: orders@contoso.example}\n  - {name: a, owner: a@contoso.example}\n", 1)
}

// What of a request's target is judged is what the upstream gets, byte for byte, or
// it gets nothing.
func TestHTTPPaths(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	wire := startWire(t)
	dir := t.TempDir()
	g := startGuard(t, dir, pathsYAML(em, wire))
	const stranger = "app-3f0c6a1e-5b7d-4d29-9c84-6e1f0a2b7d55"
	mfa := em.Mint(emulator.TokenSpec{AppID: strings.TrimPrefix(stranger, "app-")})
	noMFA := em.Mint(emulator.TokenSpec{AppID: strings.TrimPrefix(stranger, "app-"), AMR: []string{"pwd"}})

	type test struct {
		target, answer string
		sent           string // request-target upstream; empty is none
		integration    string
		mode, rule     string
		token          string
		method         string
		unparsed       bool
	}
	var tests []test
	passes := func(targets ...string) {
		for _, target := range targets {
			tests = append(tests, test{target: target, answer: "200", sent: target, integration: stranger, mode: "enforce", token: mfa})
		}
	}
	// becomes is a target of which less is sent.
	becomes := func(target, sent, integration string) {
		tests = append(tests, test{target: target, answer: "200", sent: sent, integration: integration, mode: "enforce", token: mfa})
	}
	// In no mode does an ambiguous one pass: not by the rule that audits either.
	ambiguous := func(targets ...string) {
		for _, target := range targets {
			tests = append(tests, test{target: target, answer: "400 request_ambiguous"})
		}
	}
	unknown := func(targets ...string) {
		for _, target := range targets {
			tests = append(tests, test{target: target, answer: "404 integration_unknown"})
		}
	}
	// malformed is what net/http refuses.
	malformed := func(targets ...string) {
		for _, target := range targets {
			tests = append(tests, test{target: target, answer: "400", unparsed: true})
		}
	}
	audited := func(rule string, targets ...string) {
		for _, target := range targets {
			tests = append(tests, test{target: target, answer: "200", sent: target, integration: stranger, mode: "audit", rule: rule, token: noMFA})
		}
	}
	enforced := func(rule string, targets ...string) {
		for _, target := range targets {
			tests = append(tests, test{target: target, answer: "401 mfa_missing", integration: stranger, mode: "enforce", rule: rule, token: noMFA})
		}
	}

	passes("/", "/v1/customers", "/V1/Customers", "/v1/customers/", "/v1//customers", "//v1/customers", "///", "/v1/customers?", "/?",
		// Documented ids and paths.
		"/v1/products/DZH318Z0BQ3Q/skus/0001/availabilities/DZH318Z0BQ3Q%3A0001", "/v1/sales(Market='DE',PricesheetView='updatedlicense')/$value",
		"/v1/a:b=c;d,e@f", "/v1/a%2Fb", "/v1/a%2fb", "/v1/a%5Cb", "/v1/a%5cb", "/v1/a%3Bb", "/v1/a%20b", "/v1/a+b", "/v1/%7Euser", "/v1/a%3Fb", "/v1/a%23b",
		// Names that only look like dot segments.
		"/v1/...", "/v1/..x", "/v1/x..", "/v1/.x", "/v1/x.", "/v1/x%2e", "/v1/%2ex", "/v1/..;/x", "/v1/.%20./x", "/v1/.%09./x",
		// Once more encoded: what a second decoding would make of it is not ours to say.
		"/v1/%252e%252e/x", "/v1/%25%32%65%25%32%65/x", "/v1/a%252fb", "/v1/a%255cb", "/v1/a%2500b", "/v1/%25zz",
		// Overlong UTF-8 and bytes that are none.
		"/v1/%c0%ae%c0%ae/x", "/v1/%c0%af", "/v1/%e0%80%ae%e0%80%ae/x", "/v1/%ff%fe", "/v1/caf\xc3\xa9", "/v1/\xff", "/v1/%EF%BC%8E%EF%BC%8E/x",
		// Line breaks that stay encoded.
		"/v1/a%0d%0aX-Injected:%20b", "/v1/a%0ab", "/v1/a%09b", "/v1/a%7fb",
		// What net/url would have encoded.
		"/v1/a\"<>^`{|}", "/v1/a[b]",
	)
	// The query is never judged.
	passes("/v1/x?../..", "/v1/x?a=%zz&b=%00&c=\\&d=#e", "/v1/x?q=%2e%2e%2f", "/v1/x?a=b;c=d&a=b", "/v1/x??/../", "//v1/x?%zz", "/v1/x?//evil.example/..")

	ambiguous("/..", "/.", "/v1/..", "/v1/.", "/v1/../x", "/v1/./x", "/../v1/x", "/./v1/x", "/v1//../x", "//../x", "/v1/open/../secret",
		"/v1/%2e%2e/x", "/v1/%2E%2E/x", "/v1/%2e./x", "/v1/.%2e/x", "/v1/%2E.", "/v1/%2e", "/%2e%2e",
		"/v1/a%2f..%2fb", "/v1/a%2F%2e%2e%2Fb", "/v1/..%2fx", "/v1/x%2f..", "/v1/x%2F.", "/v1%2f../x", "/%2f..",
		// Windows servers, Microsoft's, take a backslash for a slash.
		"/v1/..%5cx", "/v1/a%5c..%5cb", "/v1/a%5C%2e%2e%5Cb", "/v1/x%5c..", "/v1/a%5c.%2fb",
		"/v1/%00", "/v1/x%00.json", "/v1/x%2500/%00", "/v1/\\x", "/v1/..\\x", "/v1/x#y", "/v1/x#/../y", "/#", "/v1/x#?a=b",
		"/v1/../x?a=b", "*", "//v1/\"x")
	ambiguous("/v1/open/../secret/x", "/v1/open/%2e%2e/x", "/v1/open/x%00")

	// /i/{name}/, compared before it is decoded.
	becomes("/i/billing/v1/customers", "/v1/customers", "billing")
	becomes("/i/billing/v1/customers?a=/i/orders/", "/v1/customers?a=/i/orders/", "billing")
	becomes("/i/billing", "/", "billing")
	becomes("/i/billing/", "/", "billing")
	becomes("/i/billing?x=1", "/?x=1", "billing")
	becomes("/i/billing/?", "/?", "billing")
	becomes("/i/billing//v1/x", "//v1/x", "billing")
	becomes("/i/billing///", "///", "billing")
	becomes("/i/billing/v1%2Fx", "/v1%2Fx", "billing")
	becomes("/i/a/i/orders/v1/x", "/i/orders/v1/x", "a")
	becomes("/i/a/i/a/i/a", "/i/a/i/a", "a")
	becomes("/i/billing/I/orders/v1/x", "/I/orders/v1/x", "billing")
	passes("/I/billing/v1/x", "//i/billing/v1/x", "/%69/billing/v1/x", "/i%2Fbilling/v1/x", "/i%2fbilling%2fv1", "/i", "/i?x", "/v1/i/billing/x", "/ii/billing/x", "/i;x/billing/v1")
	unknown("/i/", "/i//", "/i//x", "/i//billing/v1/x", "/i/x", "/i/x/", "/i/nobody/v1/x", "/i/Billing/v1/x", "/i/BILLING/v1/x", "/i/%62illing/v1/x", "/i/billing%2Fv1/x",
		"/i/billing%20/v1/x", "/i/billing;x/v1/x", "/i/billing:80/v1/x", "/i/bill/v1/x", "/i/billings/v1/x", "/i/billing%252f/x", "/i/*/x", "/i/bill\xc3\xadng/x",
		"/i/"+strings.Repeat("b", 64)+"/v1/x", "/i/"+strings.Repeat("b", 4096)+"/v1/x")
	ambiguous("/i/billing/../orders/v1/x", "/i/billing/%2e%2e/orders/v1/x", "/i/billing%2f..%2forders/v1/x", "/i/billing%2f..%2f", "/i/../billing/v1/x", "/i/./billing/v1/x",
		"/i/%2e%2e/v1/x", "/i/billing%00/v1/x", "/i/billing\\v1\\x", "/i/billing#/v1/x", "/i/billing%5c..%5corders/v1/x", "/i/billing/.", "/i/nobody/../billing/v1/x", "/i/billing//v1/\"x")

	// Absolute-form; scheme and authority choose nothing.
	becomes("http://evil.example/v1/x?y", "/v1/x?y", stranger)
	becomes("https://evil.example:444/v1/x", "/v1/x", stranger)
	becomes("HTTP://evil.example/v1/x", "/v1/x", stranger)
	becomes("http://evil.example", "/", stranger)
	becomes("http://evil.example?x=1", "/?x=1", stranger)
	becomes("http://evil.example?x=/i/billing/", "/?x=/i/billing/", stranger)
	becomes("http://user:password@evil.example/v1/x", "/v1/x", stranger)
	becomes("http://evil.example%2f@x/v1/x", "/v1/x", stranger)
	becomes("http://evil.example/i/billing/v1/x", "/v1/x", "billing")
	becomes("http://evil.example//v1/x", "//v1/x", stranger)
	becomes("http://[::1]:80/v1/x", "/v1/x", stranger)
	becomes("http://evil.example/http://other.example/", "/http://other.example/", stranger)
	ambiguous("http://evil.example/v1/../x", "http://evil.example/%2e%2e/x", "http:/v1/x", "http:v1/x", "http:///v1/x", "ftp://evil.example/v1/x", "file:///etc/passwd",
		"x:y", "x:y?://evil.example/v1/x", "http-x://evil.example/v1/x")
	tests = append(tests,
		test{method: "OPTIONS", target: "*", answer: "400 request_ambiguous"},
		test{method: "OPTIONS", target: "/v1/x", answer: "200", sent: "/v1/x", integration: stranger, mode: "enforce", token: mfa},
		test{method: "CONNECT", target: "evil.example:443", answer: "405 method_refused"},
		test{method: "CONNECT", target: "/i/billing/v1/x", answer: "405 method_refused"},
		test{method: "TRACE", target: "/v1/../x", answer: "405 method_refused"},
	)
	malformed("v1/x", "\\v1\\x", "evil.example/v1/x", "", "/v1/%zz", "/v1/%", "/v1/%2", "/v1/%u002e", "/v1/%%32%65", "/v1/a b", "/v1/a\tb", "/v1/a\x00b", "/v1/a\x01b", "/v1/a\x7fb", "/v1/x?\x01",
		"/v1/a\rb", "http://evil.example\\@good.example/v1/x", "http://evil.example#@good.example/v1/x", "http://[::1/v1/x", "http://a b/v1/x")

	// Rules hold for the literal and for the once-decoded path; the stricter wins.
	audited("open", "/v1/open", "/v1/open/x", "/V1/OPEN/x", "//v1//open//x", "/v1/open/x/secret", "/v1/open/%73ecre", "/v1/open/%2573ecret/x", "/v1/open/secretx", "/v1/open/a%2Fb")
	audited("single", "/v1/single/x", "/v1/single/%78", "/v1/single//x/", "/v1/single/a;b")
	enforced("secret", "/v1/open/secret/x", "/v1/open/secret", "/V1/Open/SECRET/x", "/v1//open///secret//x", "/v1/open/%73ecret/x", "/v1/open/secret%2Fx",
		"/v1/open/%2Fsecret/x", "/v1/open/SECRE%54/x")
	enforced("", "/v1/x", "/v1/%6fpen/secret/x", "/v1/open%2Fsecret/x", "/v1%2Fopen%2Fsecret", "/v1/opens", "/v1/single/a%2Fb", "/v1/single/a/b", "/v1/single%2Fx", "/v1%2Fopen/x", "/v1/%6fpen/x", "/v2/open/x")
	// A prefix names a call, but its mode is not earned by a claim.
	tests = append(tests,
		test{target: "/i/billing/v1/x", answer: "401 mfa_missing", integration: "billing", mode: "enforce", token: noMFA},
		test{target: "/i/billing/v1/open/x", answer: "200", sent: "/v1/open/x", integration: "billing", mode: "audit", rule: "open", token: noMFA},
		test{target: "/i/billing/v1/open/secret/x", answer: "401 mfa_missing", integration: "billing", mode: "enforce", rule: "secret", token: noMFA},
	)

	t.Run("requests", func(t *testing.T) {
		for i, tt := range tests {
			t.Run(tt.method+tt.target[:min(len(tt.target), 60)], func(t *testing.T) {
				t.Parallel()
				id := fmt.Sprintf("path-%d", i)
				method, token := tt.method, tt.token
				if method == "" {
					method = "GET"
				}
				if token == "" {
					token = mfa
				}
				answers := talk(t, g.url, fmt.Sprintf("%s %s HTTP/1.1\r\nHost: guard.example\r\nAuthorization: Bearer %s\r\nMS-RequestId: %s\r\nConnection: close\r\n\r\n", method, tt.target, token, id))
				if got := statuses(answers); got != tt.answer {
					t.Errorf("%s %q: %s, want %s", method, tt.target, got, tt.answer)
				}
				var sent []string
				for _, r := range wire.of(id) {
					sent = append(sent, r.target)
				}
				want := []string{tt.sent}
				if tt.sent == "" {
					want = nil
				}
				if diff := cmp.Diff(want, sent); diff != "" {
					t.Errorf("%s %q: the upstream saw (-want +got):\n%s", method, tt.target, diff)
				}
			})
		}
	})
	unparsed := 0
	for _, tt := range tests {
		if tt.unparsed {
			unparsed++
		}
	}
	awaiting(t, func() (string, bool) {
		n := metric(t, g, "partnerguard_unparsed_requests_total")
		return fmt.Sprintf("%v requests counted as unparsed, want %d", n, unparsed), n == float64(unparsed)
	})
	g.stop()
	recorded := map[string]test{}
	for _, c := range storedCalls(t, dir) {
		var i int
		if _, err := fmt.Sscanf(c.RequestID, "path-%d", &i); err != nil {
			t.Errorf("a call nobody made: %+v", c)
			continue
		}
		tt := tests[i]
		answer := fmt.Sprint(c.Status)
		if c.Effect == "reject" {
			answer += " " + c.Reason
		}
		if answer != tt.answer || tt.token != "" && (c.Integration != tt.integration || c.Mode != tt.mode || c.Rule != tt.rule) {
			t.Errorf("%q: recorded %s, integration %s, mode %s, rule %q; want %s, %s, %s, %q", tt.target, answer, c.Integration, c.Mode, c.Rule, tt.answer, tt.integration, tt.mode, tt.rule)
		}
		if path, _, _ := strings.Cut(tt.sent, "?"); path != "" && c.Path != path && strings.ToValidUTF8(path, "") == path {
			t.Errorf("%q: recorded path %q, sent %q", tt.target, c.Path, path)
		}
		recorded[c.RequestID] = tt
	}
	for i, tt := range tests {
		if _, ok := recorded[fmt.Sprintf("path-%d", i)]; ok == tt.unparsed {
			t.Errorf("%q: recorded %v", tt.target, ok)
		}
	}
	for _, r := range wire.all(t) {
		if host := r.get("Host"); "http://"+host[0] != wire.url {
			t.Errorf("%s: Host %q upstream", r.target, host)
		}
	}
	t.Logf("%d targets", len(tests))
}
