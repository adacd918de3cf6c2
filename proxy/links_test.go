package proxy

import (
	"bytes"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"regexp"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/google/go-cmp/cmp"
	"github.com/partnerguard/partnerguard/internal/emulator"
	"github.com/partnerguard/partnerguard/policy"
)

const testBase = "https://guard.contoso.example/i/nightly"

var partnerAPIHosts = []string{"api.partner.microsoft.com"}

// referralListSample is the documented page, with every kind of thing in it that must
// stay as it is.
const referralListSample = `{
  "@odata.context": "http://api.partner.microsoft.com/v1.0/$metadata#referrals",
  "value": [
    {
      "id": "c5fbb3b6-be74-4795-9fb5-4324c73fed37",
      "name": "https://api.partner.microsoft.com/in-a-name",
      "details": {"notes": "see https://api.partner.microsoft.com/v1.0/engagements/referrals/1", "links": {"self": {"uri": "https://api.partner.microsoft.com/too-deep"}}},
      "links": {
        "relatedReferrals": {"uri": "https://api.partner.microsoft.com/v1.0/engagements/referrals?$filter=engagementId eq '65edc0b5-3485-41b7-a17e-dfa9ef4706e2'", "method": "GET"},
        "self": {"uri": "https://api.partner.microsoft.com/v1.0/engagments/referrals/c5fbb3b6-be74-4795-9fb5-4324c73fed37", "method": "GET"},
        "help": {"uri": "https://api.partner.microsoft.com/not-documented"}
      }
    },
    {"links": {"self": {"uri": "/v1.0/engagements/referrals/relative"}}},
    {"links": {"self": {"uri": "https://other.example/v1.0/engagements/referrals/1"}}}
  ],
  "@odata.nextLink": "http://api.partner.microsoft.com/v1.0/referrals?$skiptoken=k181pEdP0ykypkieJfcxX"
}
`

const referralListWant = `{
  "@odata.context": "https://guard.contoso.example/i/nightly/v1.0/$metadata#referrals",
  "value": [
    {
      "id": "c5fbb3b6-be74-4795-9fb5-4324c73fed37",
      "name": "https://api.partner.microsoft.com/in-a-name",
      "details": {"notes": "see https://api.partner.microsoft.com/v1.0/engagements/referrals/1", "links": {"self": {"uri": "https://api.partner.microsoft.com/too-deep"}}},
      "links": {
        "relatedReferrals": {"uri": "https://guard.contoso.example/i/nightly/v1.0/engagements/referrals?$filter=engagementId eq '65edc0b5-3485-41b7-a17e-dfa9ef4706e2'", "method": "GET"},
        "self": {"uri": "https://guard.contoso.example/i/nightly/v1.0/engagments/referrals/c5fbb3b6-be74-4795-9fb5-4324c73fed37", "method": "GET"},
        "help": {"uri": "https://api.partner.microsoft.com/not-documented"}
      }
    },
    {"links": {"self": {"uri": "/v1.0/engagements/referrals/relative"}}},
    {"links": {"self": {"uri": "https://other.example/v1.0/engagements/referrals/1"}}}
  ],
  "@odata.nextLink": "https://guard.contoso.example/i/nightly/v1.0/referrals?$skiptoken=k181pEdP0ykypkieJfcxX"
}
`

func TestLinksOfKnowsTheDocumentedRoutesOnly(t *testing.T) {
	tests := []struct {
		upstream, method, path string
		want                   *linkRule
	}{
		{"partner-api", "GET", "/v1.0/engagements/referrals", referralListLinks},
		{"partner-api", "GET", "//V1.0/Engagements//Referrals/", referralListLinks},
		{"partner-api", "GET", "/v1.0/referrals", referralListLinks},
		{"partner-api", "GET", "/v1.0/engagments/referrals", referralListLinks},
		{"partner-api", "GET", "/v1.0/engagements/referrals/1", referralLinks},
		{"partner-api", "GET", "/v1.0/engagments/referrals/1", referralLinks},
		{"partner-api", "POST", "/v1.0/engagements/referrals", referralLinks},
		{"partner-api", "PUT", "/v1.0/engagements/referrals/1", referralLinks},
		{"partner-api", "PATCH", "/v1.0/engagements/referrals/1", referralLinks},
		{"partner-api", "DELETE", "/v1.0/engagements/referrals/1", nil},
		{"partner-api", "HEAD", "/v1.0/engagements/referrals", nil},
		{"partner-api", "GET", "/v1.0/engagements/referrals/1/x", nil},
		{"partner-api", "GET", "/v1.0/engagements", nil},
		{"partner-api", "GET", "/v1.0/sales/pricesheets(Market='US',PricesheetView='x')/$value", nil},
		{"partner-api", "POST", "/v1.0/payouts/payments", nil},
		{"partner-api", "GET", "/insights/v1/mpn/ScheduledReport", nil},
		{"partner-center", "GET", "/insights/v1/mpn/ScheduledReport", insightsLinks},
		{"partner-center", "GET", "/insights/v1/cmp/ScheduledReport/execution/1", insightsLinks},
		{"partner-center", "POST", "/insights/v1/cmp/ScheduledReport", nil},
		{"partner-center", "GET", "/insights/v1/other/ScheduledReport", nil},
		{"partner-center", "GET", "/v1/customers", nil},
		{"partner-center", "GET", "/v1.0/engagements/referrals", nil},
		{"graph", "POST", "/v1.0/reports/partners/billing/reconciliation/billed/export", exportLinks},
		{"graph", "POST", "/v1.0/reports/partners/billing/usage/unbilled/EXPORT", exportLinks},
		{"graph", "GET", "/v1.0/reports/partners/billing/usage/unbilled/export", nil},
		{"graph", "GET", "/v1.0/tenantRelationships/delegatedAdminRelationships", nil},
		{"", "GET", "/", nil},
	}
	for _, tt := range tests {
		if got := linksOf(tt.upstream, tt.method, tt.path); got != tt.want {
			t.Errorf("linksOf(%s, %s, %s) = %v, want %v", tt.upstream, tt.method, tt.path, got, tt.want)
		}
	}
}

func TestLinkRoutesFitTheScanner(t *testing.T) {
	for _, r := range linkRoutes {
		if len(r.rule.members) > 8 {
			t.Errorf("%s %s: %d members, the scanner has 8 bits", r.method, r.path, len(r.rule.members))
		}
		for _, path := range r.rule.members {
			if len(path) > len(linkScanner{}.frames) {
				t.Errorf("%s %s: %v is deeper than the scanner's frames", r.method, r.path, path)
			}
			for _, name := range path {
				if len(name) >= 32 {
					t.Errorf("%s %s: %s is longer than a name the scanner keeps", r.method, r.path, name)
				}
			}
		}
	}
}

// rewritten is body after the rule, read in chunks of at most n bytes.
func rewritten(rule *linkRule, body, base string, own []string, n int) (string, error) {
	res := jsonAnswer(body)
	res.Body = io.NopCloser(&chunks{[]byte(body), n})
	rule.rewrite(res, own, base)
	out, err := io.ReadAll(res.Body)
	return string(out), err
}

func jsonAnswer(body string) *http.Response {
	return &http.Response{
		StatusCode:    200,
		Header:        http.Header{"Content-Type": {"application/json; charset=utf-8"}},
		Body:          io.NopCloser(strings.NewReader(body)),
		ContentLength: int64(len(body)),
	}
}

// chunks hands out at most n bytes a Read; 0 is a random number.
type chunks struct {
	b []byte
	n int
}

func (c *chunks) Read(p []byte) (int, error) {
	if len(c.b) == 0 {
		return 0, io.EOF
	}
	n := c.n
	if n == 0 {
		n = rand.IntN(40)
	}
	n = copy(p[:min(n, len(p))], c.b)
	c.b = c.b[n:]
	return n, nil
}

func TestReferralListLeadsBackThroughTheGuard(t *testing.T) {
	for _, n := range []int{1, 2, 3, 7, 64, 1 << 20, 0} {
		got, err := rewritten(referralListLinks, referralListSample, testBase, partnerAPIHosts, n)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(referralListWant, got); diff != "" {
			t.Fatalf("in chunks of %d (-want +got):\n%s", n, diff)
		}
	}
}

func TestLinksInBodies(t *testing.T) {
	const base = testBase
	tests := []struct {
		name     string
		rule     *linkRule
		in, want string // want empty: as it came
	}{
		{"a referral", referralLinks,
			`{"id":"1","eTag":"\"1\"","links":{"self":{"uri":"https://api.partner.microsoft.com/v1.0/engagements/referrals/1","method":"GET"}}}`,
			`{"id":"1","eTag":"\"1\"","links":{"self":{"uri":"` + base + `/v1.0/engagements/referrals/1","method":"GET"}}}`},
		{"a list's links in a referral", referralLinks, `{"@odata.nextLink":"http://api.partner.microsoft.com/x"}`, ""},
		{"Insights, absolute", insightsLinks, `{"value":[{"nextLink":"https://api.partner.microsoft.com/a"}],"nextLink":"https://api.partner.microsoft.com/b?c"}`,
			`{"value":[{"nextLink":"https://api.partner.microsoft.com/a"}],"nextLink":"` + base + `/b?c"}`},
		{"Insights, relative", insightsLinks, `{"nextLink":"/insights/v1/mpn/ScheduledReport?pageToken=1"}`, ""},
		{"Insights, none", insightsLinks, `{"value":[],"nextLink":null,"totalCount":0}`, ""},
		{"escaped slashes", insightsLinks, `{"nextLink":"https:\/\/api.partner.microsoft.com\/b"}`, `{"nextLink":"` + base + `\/b"}`},
		{"escapes by code", insightsLinks, `{"next\u004cink":"\u0068ttps:\u002f\u002Fapi.partner.micr\u006Fsoft.com\u002fb\u0041"}`,
			`{"next\u004cink":"` + base + `\u002fb\u0041"}`},
		{"upper case", insightsLinks, `{"nextLink":"HTTPS://API.Partner.Microsoft.COM/B"}`, `{"nextLink":"` + base + `/B"}`},
		{"default ports", insightsLinks, `{"a":1,"nextLink":"http://api.partner.microsoft.com:80/b"}`, `{"a":1,"nextLink":"` + base + `/b"}`},
		{"default port of https", insightsLinks, `{"nextLink":"https://api.partner.microsoft.com:443/b"}`, `{"nextLink":"` + base + `/b"}`},
		{"another port", insightsLinks, `{"nextLink":"https://api.partner.microsoft.com:8443/b"}`, ""},
		{"the other scheme's port", insightsLinks, `{"nextLink":"https://api.partner.microsoft.com:80/b"}`, ""},
		{"no path", insightsLinks, `{"nextLink":"https://api.partner.microsoft.com"}`, `{"nextLink":"` + base + `"}`},
		{"a query alone", insightsLinks, `{"nextLink":"https://api.partner.microsoft.com?a"}`, `{"nextLink":"` + base + `?a"}`},
		{"a fragment alone", insightsLinks, `{"nextLink":"https://api.partner.microsoft.com#a"}`, `{"nextLink":"` + base + `#a"}`},
		{"a longer host", insightsLinks, `{"nextLink":"https://api.partner.microsoft.com.evil.example/b"}`, ""},
		{"a shorter host", insightsLinks, `{"nextLink":"https://api.partner.microsoft.co/b"}`, ""},
		{"user information before another host", insightsLinks, `{"nextLink":"https://api.partner.microsoft.com@evil.example/b"}`, ""},
		{"user information", insightsLinks, `{"nextLink":"https://a:b@api.partner.microsoft.com/b"}`, ""},
		{"a backslash", insightsLinks, `{"nextLink":"https://api.partner.microsoft.com\\b"}`, ""},
		{"no scheme", insightsLinks, `{"nextLink":"//api.partner.microsoft.com/b"}`, ""},
		{"another scheme", insightsLinks, `{"nextLink":"ftp://api.partner.microsoft.com/b"}`, ""},
		{"a space in front", insightsLinks, `{"nextLink":" https://api.partner.microsoft.com/b"}`, ""},
		{"no authority", insightsLinks, `{"nextLink":"https:///b"}`, ""},
		{"a byte order mark", insightsLinks, "\xEF\xBB\xBF" + `{"nextLink":"https://api.partner.microsoft.com/b"}`,
			"\xEF\xBB\xBF" + `{"nextLink":"` + base + `/b"}`},
		{"half a byte order mark", insightsLinks, "\xEF\xBB" + `{"nextLink":"https://api.partner.microsoft.com/b"}`, ""},
		{"a name in other case", insightsLinks, `{"nextlink":"https://api.partner.microsoft.com/b"}`, ""},
		{"a longer name", insightsLinks, `{"nextLink2":"https://api.partner.microsoft.com/b"}`, ""},
		{"an endless name", insightsLinks, `{"` + strings.Repeat("nextLink", 100) + `":"https://api.partner.microsoft.com/b"}`, ""},
		{"no string", insightsLinks, `{"nextLink":["https://api.partner.microsoft.com/b"]}`, ""},
		{"in an array at the root", insightsLinks, `[{"nextLink":"https://api.partner.microsoft.com/b"}]`, ""},
		{"a string at the root", insightsLinks, `"https://api.partner.microsoft.com/b"`, ""},
		{"a member named []", referralListLinks, `{"value":{"[]":{"links":{"self":{"uri":"https://api.partner.microsoft.com/b"}}}}}`, ""},
		{"behind nested things", insightsLinks, `{"value":[[{"a":"]}\"\\"}],{}],"x":{"y":[1,-2.5e3,true,false,null]},"nextLink":"https://api.partner.microsoft.com/b"}`,
			`{"value":[[{"a":"]}\"\\"}],{}],"x":{"y":[1,-2.5e3,true,false,null]},"nextLink":"` + base + `/b"}`},
		{"twice", insightsLinks, `{"nextLink":"https://api.partner.microsoft.com/a","nextLink":"https://api.partner.microsoft.com/b"}`,
			`{"nextLink":"` + base + `/a","nextLink":"` + base + `/b"}`},
		{"a second document", insightsLinks, `{} {"nextLink":"https://api.partner.microsoft.com/b"}`, ""},
		{"broken before the link", insightsLinks, `{"a" "b","nextLink":"https://api.partner.microsoft.com/b"}`, ""},
		{"closed wrongly", insightsLinks, `{"value":[}],"nextLink":"https://api.partner.microsoft.com/b"}`, ""},
		{"a bad escape in the link", insightsLinks, `{"nextLink":"https:\x//api.partner.microsoft.com/b"}`, ""},
		{"a bad escape in a name", insightsLinks, `{"\u00zz":1,"nextLink":"https://api.partner.microsoft.com/b"}`, ""},
		{"a line break in the link", insightsLinks, "{\"nextLink\":\"https://\napi.partner.microsoft.com/b\"}", ""},
		{"cut off in the link", insightsLinks, `{"nextLink":"https://api.partner.microsoft.com`, ""},
		{"cut off in an escape", insightsLinks, `{"nextLink":"https:\u002`, ""},
		{"CSV under a label that says JSON", insightsLinks, "ProductId,SkuId\r\n\"https://api.partner.microsoft.com/b\",1\r\n", ""},
		{"HTML", insightsLinks, `<a href="https://api.partner.microsoft.com/b">`, ""},
		{"nothing but spaces", insightsLinks, " \r\n\t", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			want := tt.want
			if want == "" {
				want = tt.in
			}
			for n := range 12 {
				got, err := rewritten(tt.rule, tt.in, base, partnerAPIHosts, n)
				if err != nil || got != want {
					t.Fatalf("in chunks of %d: %s, %v\nwant %s", n, got, err, want)
				}
			}
		})
	}
}

func TestOwnHostWithAPort(t *testing.T) {
	const in = `{"nextLink":"http://127.0.0.1:8182/b"}`
	got, _ := rewritten(insightsLinks, in, "http://localhost:8080", []string{"api.example", "127.0.0.1:8182"}, 5)
	if want := `{"nextLink":"http://localhost:8080/b"}`; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if got, _ := rewritten(insightsLinks, in, "http://localhost:8080", []string{"127.0.0.1"}, 5); got != in {
		t.Errorf("got %s, want it as it came: the port differs", got)
	}
}

// By a hosts file the guard is reached under the upstream's own name.
func TestClientThatKnowsTheGuardByTheUpstreamsName(t *testing.T) {
	const in = `{"@odata.context":"https://api.partner.microsoft.com/a","@odata.nextLink":"http://api.partner.microsoft.com/b"}`
	got, _ := rewritten(referralListLinks, in, "https://api.partner.microsoft.com", partnerAPIHosts, 0)
	const want = `{"@odata.context":"https://api.partner.microsoft.com/a","@odata.nextLink":"https://api.partner.microsoft.com/b"}`
	if got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestLocationOfAnExport(t *testing.T) {
	own := []string{"graph.microsoft.com"}
	tests := []struct {
		name, in, want string
		status         int
		rule           *linkRule
	}{
		{"documented", "https://graph.microsoft.com/v1.0/reports/partners/billing/operations/1", testBase + "/v1.0/reports/partners/billing/operations/1", 202, exportLinks},
		{"in clear text", "http://graph.microsoft.com/v1.0/x", testBase + "/v1.0/x", 202, exportLinks},
		{"upper case, port, no path", "HTTPS://Graph.Microsoft.com:443?x", testBase + "?x", 202, exportLinks},
		{"relative", "/v1.0/x", "/v1.0/x", 202, exportLinks},
		{"relative, no slash", "productUpgrades/1", "productUpgrades/1", 202, exportLinks},
		{"without scheme", "//graph.microsoft.com/x", "//graph.microsoft.com/x", 202, exportLinks},
		{"another host", "https://graph.microsoft.us/x", "https://graph.microsoft.us/x", 202, exportLinks},
		{"user information", "https://graph.microsoft.com@evil.example/x", "https://graph.microsoft.com@evil.example/x", 202, exportLinks},
		{"a URL in a query", "/x?u=https://graph.microsoft.com/", "/x?u=https://graph.microsoft.com/", 202, exportLinks},
		{"a redirect", "https://graph.microsoft.com/x", "https://graph.microsoft.com/x", 302, exportLinks},
		{"another route", "https://graph.microsoft.com/x", "https://graph.microsoft.com/x", 202, insightsLinks},
		{"no rule", "https://graph.microsoft.com/x", "https://graph.microsoft.com/x", 202, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			res := &http.Response{StatusCode: tt.status, Header: http.Header{"Location": {tt.in}}, Body: http.NoBody}
			tt.rule.rewrite(res, own, testBase)
			if got := res.Header.Get("Location"); got != tt.want {
				t.Errorf("Location = %s, want %s", got, tt.want)
			}
		})
	}
}

func TestWhatCannotBeRewrittenPassesAsItIs(t *testing.T) {
	const body = `{"nextLink":"https://api.partner.microsoft.com/b"}`
	tests := []struct {
		name   string
		change func(*http.Response)
		base   string
	}{
		{"gzip", func(r *http.Response) { r.Header.Set("Content-Encoding", "gzip") }, testBase},
		{"two encodings", func(r *http.Response) { r.Header["Content-Encoding"] = []string{"identity", "gzip"} }, testBase},
		{"text", func(r *http.Response) { r.Header.Set("Content-Type", "text/plain") }, testBase},
		{"no type", func(r *http.Response) { r.Header.Del("Content-Type") }, testBase},
		{"another JSON type", func(r *http.Response) { r.Header.Set("Content-Type", "application/json-seq") }, testBase},
		{"an error", func(r *http.Response) { r.StatusCode = 404 }, testBase},
		{"a part", func(r *http.Response) { r.StatusCode = 206 }, testBase},
		{"no base", func(*http.Response) {}, ""},
		{"a base that would end the string", func(*http.Response) {}, `http://a"b`},
		{"a base with a line break", func(*http.Response) {}, "http://a\r\nb"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			res := jsonAnswer(body)
			res.Header.Set("Content-Length", fmt.Sprint(len(body)))
			res.Header.Set("Content-MD5", "x")
			tt.change(res)
			header := res.Header.Clone()
			insightsLinks.rewrite(res, partnerAPIHosts, tt.base)
			got, _ := io.ReadAll(res.Body)
			if string(got) != body || res.ContentLength != int64(len(body)) {
				t.Errorf("body = %s, length %d", got, res.ContentLength)
			}
			if diff := cmp.Diff(header, res.Header); diff != "" {
				t.Errorf("header (-want +got):\n%s", diff)
			}
		})
	}
}

func TestHeadersOfARewrittenBody(t *testing.T) {
	res := jsonAnswer(referralListSample)
	res.Header = http.Header{
		"Content-Type": {"Application/JSON;odata.metadata=minimal"}, "Content-Encoding": {"identity"}, "Content-Length": {"1"},
		"Content-Md5": {"x"}, "Digest": {"x"}, "Content-Digest": {"x"}, "Repr-Digest": {"x"}, "Etag": {`"1"`}, "Request-Id": {"1"},
	}
	referralListLinks.rewrite(res, partnerAPIHosts, testBase)
	want := http.Header{
		"Content-Type": {"Application/JSON;odata.metadata=minimal"}, "Content-Encoding": {"identity"}, "Etag": {`"1"`}, "Request-Id": {"1"},
	}
	if diff := cmp.Diff(want, res.Header); diff != "" {
		t.Errorf("header (-want +got):\n%s", diff)
	}
	if res.ContentLength != -1 {
		t.Errorf("ContentLength = %d, want -1", res.ContentLength)
	}
	if got, _ := io.ReadAll(res.Body); string(got) != referralListWant {
		t.Errorf("body was not rewritten: %s", got)
	}
}

func TestOnlyBodiesToReadAreAskedForPlain(t *testing.T) {
	for _, tt := range []struct {
		rule *linkRule
		want string
	}{{nil, "gzip, deflate"}, {exportLinks, "gzip, deflate"}, {referralListLinks, "identity"}, {insightsLinks, "identity"}} {
		h := http.Header{"Accept-Encoding": {"gzip, deflate"}}
		tt.rule.prepare(h)
		if got := h.Get("Accept-Encoding"); got != tt.want {
			t.Errorf("rule %v: Accept-Encoding = %q, want %q", tt.rule, got, tt.want)
		}
	}
}

func TestLinkBaseIsHowTheClientReachedTheGuard(t *testing.T) {
	r := httptest.NewRequest("GET", "http://Guard.contoso.example:8080/i/nightly/v1.0/referrals", nil)
	if got, want := linkBase(r, "nightly"), "http://Guard.contoso.example:8080/i/nightly"; got != want {
		t.Errorf("linkBase = %s, want %s", got, want)
	}
	r.TLS = &tls.ConnectionState{}
	if got, want := linkBase(r, ""), "https://Guard.contoso.example:8080"; got != want {
		t.Errorf("linkBase = %s, want %s", got, want)
	}
	r.Host = ""
	if got := linkBase(r, "nightly"); got != "" {
		t.Errorf("linkBase without Host = %q, want none", got)
	}
}

func TestLinkHost(t *testing.T) {
	for in, want := range map[string]string{
		"https://API.Partner.Microsoft.com":      "api.partner.microsoft.com",
		"https://api.partner.microsoft.com:443/": "api.partner.microsoft.com",
		"http://127.0.0.1:80":                    "127.0.0.1",
		"http://127.0.0.1:443":                   "127.0.0.1:443",
		"https://[::1]:443":                      "[::1]",
		"http://[::1]:8182":                      "[::1]:8182",
	} {
		r := httptest.NewRequest("GET", in, nil)
		if got := linkHost(r.URL); got != want {
			t.Errorf("linkHost(%s) = %s, want %s", in, got, want)
		}
	}
}

// A body that breaks off must not look complete.
func TestTruncationShows(t *testing.T) {
	broken := errors.New("connection reset")
	for cut := range len(referralListSample) {
		res := jsonAnswer("")
		res.ContentLength = -1
		res.Body = io.NopCloser(io.MultiReader(strings.NewReader(referralListSample[:cut]), iotest.ErrReader(broken)))
		referralListLinks.rewrite(res, partnerAPIHosts, testBase)
		got, err := io.ReadAll(res.Body)
		if !errors.Is(err, broken) {
			t.Fatalf("cut at %d: error %v, want that of the upstream", cut, err)
		}
		whole, _ := rewritten(referralListLinks, referralListSample[:cut], testBase, partnerAPIHosts, 0)
		if string(got) != whole {
			t.Fatalf("cut at %d: %d bytes, want %d", cut, len(got), len(whole))
		}
	}
}

// What cannot be the beginning of an own link goes out with the Read that brought it.
func TestNothingIsHeldBackLongerThanNeeded(t *testing.T) {
	steps := []struct{ in, out string }{
		{`{"value":[{"id":"1`, `{"value":[{"id":"1`},
		{`"}],"nextLink":"`, `"}],"nextLink":"`},
		{`https://api.part`, ``},
		{`y`, `https://api.party`},
		{`.example/`, `.example/`},
		{`","nextLink":"h`, `","nextLink":"`},
		{`ttps://api.partner.microsoft.com`, ``},
		{`/v1`, testBase + `/v1`},
		{`.0"}`, `.0"}`},
	}
	var got, want strings.Builder
	res := jsonAnswer("")
	res.ContentLength = -1
	// The upstream is asked for more only when all that can go out has gone.
	res.Body = io.NopCloser(readerFunc(func(p []byte) (int, error) {
		if got.String() != want.String() {
			t.Fatalf("with %d steps to come: %q went out, want %q", len(steps), &got, &want)
		}
		if len(steps) == 0 {
			return 0, io.EOF
		}
		n := copy(p, steps[0].in)
		want.WriteString(steps[0].out)
		steps = steps[1:]
		return n, nil
	}))
	insightsLinks.rewrite(res, partnerAPIHosts, testBase)
	for buf := make([]byte, 512); ; {
		n, err := res.Body.Read(buf)
		got.Write(buf[:n])
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if got.String() != want.String() {
		t.Errorf("%q went out, want %q", &got, &want)
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

func TestLinkBodiesKeepToABoundedMemory(t *testing.T) {
	link := `"` + strings.Repeat(`\u0068`, 1<<16) + `"`
	body := `{"nextLink":` + link + `,"` + strings.Repeat("n", 1<<16) + `":1,"nextLink":"https://` + strings.Repeat("a", 1<<16) + `"}`
	res := jsonAnswer(body)
	insightsLinks.rewrite(res, partnerAPIHosts, testBase)
	r := res.Body.(*linkBody)
	got, err := io.ReadAll(r)
	if err != nil || string(got) != body {
		t.Fatalf("%d bytes, %v; want %d as they came", len(got), err, len(body))
	}
	if n := cap(r.held) + cap(r.name); n > 1024 {
		t.Errorf("%d bytes are kept, want at most 1024", n)
	}
}

func TestRuleWithNothingToDoAllocatesNothing(t *testing.T) {
	res := jsonAnswer(`{}`)
	n := testing.AllocsPerRun(100, func() {
		rule := linksOf("partner-center", "GET", "/v1/customers/1b2c3d4e-0a1b-4c2d-8e3f-901234567890/subscriptions")
		rule.prepare(res.Header)
		rule.rewrite(res, partnerAPIHosts, testBase)
	})
	if n != 0 {
		t.Errorf("%v allocations, want 0", n)
	}
}

// linkProxy carries calls under /i/nightly to an API of the emulator, whose links have
// Microsoft's host, and rewrites them if asked to.
func linkProxy(t *testing.T, name, target, host string, rewrites bool) string {
	t.Helper()
	to, err := url.Parse(target)
	if err != nil {
		t.Fatal(err)
	}
	front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		integration, path, _ := policy.CutIntegration(r.URL.Path)
		var rule *linkRule
		if rewrites {
			rule = linksOf(name, r.Method, path)
		}
		(&httputil.ReverseProxy{
			ErrorLog: silent,
			Rewrite: func(p *httputil.ProxyRequest) {
				p.Out.URL.Path = path
				p.SetURL(to)
				rule.prepare(p.Out.Header)
			},
			ModifyResponse: func(res *http.Response) error {
				rule.rewrite(res, []string{host}, linkBase(r, integration))
				return nil
			},
		}).ServeHTTP(w, r)
	}))
	t.Cleanup(front.Close)
	return front.URL + "/i/nightly"
}

func get(t *testing.T, method, target, token, script string) (*http.Response, []byte, error) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, target, nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Authorization", "Bearer "+token)
	r.Header.Set("Emulate", script)
	r.Header.Set("Accept-Encoding", "gzip") // explicitly, so that the client decodes nothing
	res, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	return res, body, err
}

func TestClientThatFollowsLinksStaysWithTheGuard(t *testing.T) {
	em, err := emulator.Start(emulator.Config{PageSize: 50})
	if err != nil {
		t.Fatal(err)
	}
	defer em.Close()
	token := em.Mint(emulator.TokenSpec{Audience: emulator.AudiencePartnerAPI})
	base := linkProxy(t, "partner-api", em.PartnerAPIURL(), "api.partner.microsoft.com", true)

	seen := map[string]bool{}
	var last string
	for target := base + "/v1.0/engagements/referrals"; target != ""; {
		if !strings.HasPrefix(target, base+"/") {
			t.Fatalf("the next page is at %s, past the guard", target)
		}
		_, body, err := get(t, "GET", target, token, "bom")
		if err != nil {
			t.Fatal(err)
		}
		var page struct {
			Next  string `json:"@odata.nextLink"`
			Value []struct {
				ID      string
				Details struct{ Notes string }
				Links   map[string]struct{ URI string }
			}
		}
		if err := json.Unmarshal(bytes.TrimPrefix(body, []byte("\xEF\xBB\xBF")), &page); err != nil {
			t.Fatalf("%v in %.300s", err, body)
		}
		for _, r := range page.Value {
			seen[r.ID], last = true, r.Links["self"].URI
			if want := base + "/v1.0/engagements/referrals/" + r.ID; last != want || !strings.HasPrefix(r.Links["relatedReferrals"].URI, base+"/v1.0/") {
				t.Fatalf("links = %v, want %s", r.Links, want)
			}
			if !strings.Contains(r.Details.Notes, "https://api.partner.microsoft.com/") {
				t.Fatalf("what a user wrote became %q", r.Details.Notes)
			}
		}
		target = page.Next
	}
	if len(seen) != 230 {
		t.Errorf("%d referrals on all pages, want 230", len(seen))
	}
	if _, body, err := get(t, "GET", last, token, ""); err != nil || !bytes.Contains(body, []byte(`"uri":"`+last+`"`)) {
		t.Errorf("a referral by its own link: %s, %v", body, err)
	}

	// A body that was encoded although plain was asked for.
	if got := em.Requests()[0].Header.Get("Accept-Encoding"); got != "identity" {
		t.Errorf("the upstream was asked for %q, want identity", got)
	}
	res, zipped, _ := get(t, "GET", last, token, "gzip")
	if res.Header.Get("Content-Encoding") != "gzip" || !bytes.HasPrefix(zipped, []byte("\x1f\x8b")) || int64(len(zipped)) != res.ContentLength {
		t.Errorf("an encoded body came as %v, %.20q", res.Header, zipped)
	}
	// One that breaks off.
	if _, body, err := get(t, "GET", base+"/v1.0/engagements/referrals", token, "abort-after=3000"); err == nil {
		t.Errorf("%d bytes of a broken body without an error", len(body))
	}
}

func TestWithoutTheRuleAClientGoesPastTheGuard(t *testing.T) {
	em, err := emulator.Start(emulator.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer em.Close()
	token := em.Mint(emulator.TokenSpec{Audience: emulator.AudienceGraph})
	const export = "/v1.0/reports/partners/billing/usage/unbilled/export"
	for _, rewrites := range []bool{false, true} {
		base := linkProxy(t, "graph", em.GraphURL(), "graph.microsoft.com", rewrites)
		want := "https://graph.microsoft.com"
		if rewrites {
			want = base
		}
		res, _, _ := get(t, "POST", base+export, token, "")
		operation := res.Header.Get("Location")
		if res.StatusCode != 202 || !strings.HasPrefix(operation, want+"/v1.0/reports/partners/billing/operations/") {
			t.Fatalf("rewriting %v: %d, Location %s; want one of %s", rewrites, res.StatusCode, operation, want)
		}
		if !rewrites {
			continue
		}
		var body []byte
		for range 3 {
			_, body, _ = get(t, "GET", operation, token, "")
		}
		if !bytes.Contains(body, []byte(`"rootDirectory":"https://samplestorage.blob.core.windows.net/`)) {
			t.Errorf("the manifest's links were touched: %s", body)
		}
	}
}

// ownLink is written independently of the scanner.
var ownLink = regexp.MustCompile(`^(?i:https://api\.partner\.microsoft\.com(:443)?|http://api\.partner\.microsoft\.com(:80)?)([/?#].*)?$`)

// expected is what a rule makes of a decoded document.
func expected(v any, members [][]string) any {
	follow := func(step string) (rest [][]string) {
		for _, path := range members {
			if len(path) > 0 && path[0] == step {
				rest = append(rest, path[1:])
			}
		}
		return rest
	}
	switch v := v.(type) {
	case map[string]any:
		for name := range v {
			if name != "[]" {
				v[name] = expected(v[name], follow(name))
			}
		}
	case []any:
		for i := range v {
			v[i] = expected(v[i], follow("[]"))
		}
	case string:
		for _, path := range members {
			if m := ownLink.FindStringSubmatch(strings.ReplaceAll(v, "\n", "\x00")); len(path) == 0 && m != nil {
				return testBase + strings.ReplaceAll(m[3], "\x00", "\n")
			}
		}
	}
	return v
}

// FuzzLinks: any chunking gives the same; without an own host all bytes pass as they
// are; with one, the document is the same but for the links of the rule.
func FuzzLinks(f *testing.F) {
	f.Add([]byte(referralListSample))
	f.Add([]byte(`{"nextLink":"https:\/\/api.partner.microsoft.com\u002fb","links":{"self":{"uri":"HTTP://api.partner.microsoft.com:80"}}}`))
	f.Add([]byte("\xEF\xBB\xBF" + `{"value":[{"links":{"self":{"uri":"https://api.partner.microsoft.com"},"relatedReferrals":{"uri":"x"}}},[],{},1.5e3,null]}`))
	f.Add([]byte(`{"\u0040odata.nextLink":"http://api.partner.microsoft.com?","@odata.context":["\ud800"]}`))
	f.Add([]byte(`{"value":[{"[]":{"links":1}}]}{"nextLink":"http`))
	f.Add([]byte(`[{"a":"\\\""},"https://api.partner.microsoft.com/"]`))
	rules := []*linkRule{referralLinks, referralListLinks, insightsLinks}
	f.Fuzz(func(t *testing.T, body []byte) {
		for _, rule := range rules {
			var first string
			for i, n := range []int{1 << 20, 1, 2, 5, 0} {
				got, err := rewritten(rule, string(body), testBase, partnerAPIHosts, n)
				if err != nil {
					t.Fatalf("chunks of %d: %v", n, err)
				}
				if i == 0 {
					first = got
				} else if got != first {
					t.Fatalf("chunks of %d: %q, whole: %q", n, got, first)
				}
			}
			if got, err := rewritten(rule, string(body), testBase, []string{"not.in.it.example:1"}, 0); err == nil && got != string(body) && !bytes.Contains(body, []byte("not.in.it")) {
				t.Fatalf("without an own host: %q, want %q", got, body)
			}
			text, marked := bytes.CutPrefix(body, []byte("\xEF\xBB\xBF"))
			var in, out any
			if json.Unmarshal(text, &in) != nil {
				continue
			}
			rest := first
			if marked {
				rest, marked = strings.CutPrefix(first, "\xEF\xBB\xBF")
				if !marked {
					t.Fatal("the byte order mark is gone")
				}
			}
			if err := json.Unmarshal([]byte(rest), &out); err != nil {
				t.Fatalf("%q is no JSON any more: %v", rest, err)
			}
			if diff := cmp.Diff(expected(in, rule.members), out); diff != "" {
				t.Fatalf("%q became %q (-want +got):\n%s", body, first, diff)
			}
		}
	})
}

// document writes a random JSON value of the names and strings that rules look for,
// with random escapes and spaces; more often than not it goes along path.
func document(r *rand.Rand, path []string, depth int) string {
	pick := func(from ...string) string { return from[r.IntN(len(from))] }
	quote := func(text string) string {
		var b strings.Builder
		b.WriteByte('"')
		for _, c := range text {
			switch n := r.IntN(12); {
			case n == 0:
				fmt.Fprintf(&b, `\u%04x`, c)
			case n == 1:
				fmt.Fprintf(&b, `\u%04X`, c)
			case c == '"' || c == '\\' || c == '/' && n < 6:
				b.WriteString(`\` + string(c))
			default:
				b.WriteRune(c)
			}
		}
		return b.String() + `"`
	}
	space := func() string { return pick("", "", "", " ", "\r\n\t") }
	kind := r.IntN(10)
	if depth == 0 {
		kind = 8 + r.IntN(2)
	}
	name, rest := "", path
	if len(path) > 0 {
		name, rest = path[0], path[1:]
	}
	if r.IntN(5) > 0 {
		switch {
		case len(path) == 0:
			kind = 9
		case name == "[]":
			kind = 7
		default:
			kind = 0
		}
	}
	var b strings.Builder
	switch {
	case kind < 6:
		b.WriteString("{" + space())
		for i := range r.IntN(5) {
			if i > 0 {
				b.WriteString("," + space())
			}
			if r.IntN(2) == 0 {
				b.WriteString(quote(name) + space() + ":" + space() + document(r, rest, max(0, depth-1)) + space())
				continue
			}
			b.WriteString(quote(pick("value", "links", "self", "relatedReferrals", "uri", "nextLink", "@odata.nextLink", "@odata.context", "[]", "x", "", "URI")))
			b.WriteString(space() + ":" + space() + document(r, nil, max(0, depth-1)) + space())
		}
		b.WriteString("}")
	case kind < 8:
		b.WriteString("[" + space())
		for i := range r.IntN(4) {
			if i > 0 {
				b.WriteString("," + space())
			}
			b.WriteString(document(r, rest, max(0, depth-1)) + space())
		}
		b.WriteString("]")
	case kind == 8:
		b.WriteString(pick("null", "true", "false", "0", "-1.5e+3", `""`))
	default:
		b.WriteString(quote(pick("http", "https", "HTTP", "https", "ftp", "") + pick("://", "://", "://", "://", ":/", "//") +
			pick("api.partner.microsoft.com", "api.partner.microsoft.com", "api.partner.microsoft.com", "API.partner.Microsoft.com", "api.partner.microsoft.co", "api.partner.microsoft.comx", "é", `a"\`, "") +
			pick("", "", "", ":443", ":80", ":8", "@x") + pick("", "/", "/v1.0", "?a", "#b", "/é")))
	}
	return b.String()
}

func TestRandomDocuments(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	changed := 0
	for range 1000 {
		for _, rule := range []*linkRule{referralLinks, referralListLinks, insightsLinks} {
			body := document(r, rule.members[r.IntN(len(rule.members))], 6)
			var in, out any
			if err := json.Unmarshal([]byte(body), &in); err != nil {
				t.Fatalf("%v in %s", err, body)
			}
			got, err := rewritten(rule, body, testBase, partnerAPIHosts, 1+r.IntN(30))
			if err == nil {
				err = json.Unmarshal([]byte(got), &out)
			}
			if err != nil {
				t.Fatalf("%s became %s: %v", body, got, err)
			}
			if diff := cmp.Diff(expected(in, rule.members), out); diff != "" {
				t.Fatalf("%s became %s (-want +got):\n%s", body, got, diff)
			}
			if got != body {
				changed++
			}
		}
	}
	if changed < 50 {
		t.Errorf("only %d documents had a link; the test has gone blind", changed)
	}
}

func BenchmarkLinkBody(b *testing.B) {
	item := referralListSample[strings.Index(referralListSample, "{\n      \"id\""):strings.Index(referralListSample, "    {\"links\": {\"self\": {\"uri\": \"/v1.0")]
	body := []byte(`{"value":[` + strings.Repeat(item, 500) + `{}],"@odata.nextLink":"http://api.partner.microsoft.com/v1.0/referrals"}`)
	buf := make([]byte, 32<<10)
	b.SetBytes(int64(len(body)))
	b.ReportAllocs()
	for b.Loop() {
		res := jsonAnswer("")
		res.ContentLength, res.Body = -1, io.NopCloser(bytes.NewReader(body))
		referralListLinks.rewrite(res, partnerAPIHosts, testBase)
		if _, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{res.Body}, buf); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkLinksOf(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		linksOf("partner-center", "GET", "/v1/customers/1b2c3d4e-0a1b-4c2d-8e3f-901234567890/subscriptions")
	}
}
