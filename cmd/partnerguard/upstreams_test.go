package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/partnerguard/partnerguard/internal/emulator"
)

// threeAPIs is a guard in front of Microsoft's three APIs under their real names,
// reached by dial, with the emulator's certificate authority as the extra one.
func threeAPIs(t *testing.T, em *emulator.Emulator, more string) *guardProcess {
	t.Helper()
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, em.CAPEM(), 0o600); err != nil {
		t.Fatal(err)
	}
	address := func(tlsURL string) string { return strings.TrimPrefix(tlsURL, "https://") }
	text := guardYAML(em, "enforce")
	upstreams := text[strings.Index(text, "  partner-center: "):]
	upstreams = upstreams[:strings.IndexByte(upstreams, '\n')+1]
	text = strings.Replace(text, upstreams, fmt.Sprintf(`  partner-center: {dial: %q, ca: %q}
  partner-api: {dial: %q, ca: %q%s}
  graph: {dial: %q, ca: %q, hosts: [graph.guard.contoso.example]}
`, address(em.PartnerTLSURL()), ca, address(em.PartnerAPITLSURL()), ca, more, address(em.GraphTLSURL()), ca), 1)
	text = strings.Replace(text, `[{address: "127.0.0.1:0"}]`,
		`[{address: "127.0.0.1:0"}, {name: referrals, address: "127.0.0.1:0", upstream: partner-api}]`, 1)
	return startGuard(t, t.TempDir(), text)
}

func TestEachUpstreamTakesItsOwnTokensOnly(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	g := threeAPIs(t, em, "")
	tokens := map[string]string{
		"partner-center": em.Mint(emulator.TokenSpec{}),
		"partner-api":    em.Mint(emulator.TokenSpec{Audience: emulator.AudiencePartnerAPI}),
		"graph":          em.Mint(emulator.TokenSpec{Audience: emulator.AudienceGraph}),
	}
	ways := []struct{ url, host, upstream, path string }{
		{g.urls[0], "", "partner-center", "/v1/customers?size=1"},
		{g.urls[1], "", "partner-api", "/v1.0/engagements/referrals"},
		{g.urls[0], "api.partner.microsoft.com", "partner-api", "/v1.0/engagements/referrals"},
		{g.urls[0], "GRAPH.guard.contoso.example:8443", "graph", "/v1.0/tenantRelationships/delegatedAdminRelationships"},
		{g.urls[1], "graph.microsoft.com", "graph", "/v1.0/tenantRelationships/delegatedAdminRelationships"},
		{g.urls[1], "api.partnercenter.microsoft.com", "partner-center", "/v1/customers?size=1"},
		{g.urls[1], "evil.example", "partner-api", "/v1.0/engagements/referrals"},
	}
	for _, way := range ways {
		for of, token := range tokens { // the same tokens again and again: verdicts are per upstream
			r, _ := http.NewRequest(http.MethodGet, way.url+way.path, nil)
			r.Host = way.host
			r.Header.Set("Authorization", "Bearer "+token)
			res, _ := do(t, r)
			want, reason := 200, "mfa_present"
			if of != way.upstream {
				want, reason = 401, "token_wrong_audience"
			}
			if res.StatusCode != want || res.Header.Get("Partnerguard-Reason") != reason {
				t.Errorf("%s %s with a token of %s: %d %s, want %d %s", way.upstream, way.host, of, res.StatusCode, res.Header.Get("Partnerguard-Reason"), want, reason)
			}
		}
	}
	g.stop()
	for _, c := range storedCalls(t, g.dir) {
		if (c.Status == 200) != (c.Reason == "mfa_present") || c.Upstream == "" {
			t.Errorf("recorded %s %s: %d %s", c.Upstream, c.Path, c.Status, c.Reason)
		}
	}
}

func TestThePagesOfACollectionAllComeThroughTheGuard(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{PageSize: 7})
	g := threeAPIs(t, em, "")
	token := em.Mint(emulator.TokenSpec{Audience: emulator.AudiencePartnerAPI})
	for _, way := range []struct{ name, base, host string }{
		{"by a listener of its own", g.urls[1], ""},
		{"by /i/{name}/", g.urls[1] + "/i/nightly-billing", ""},
		{"by its name", g.urls[0], "api.partner.microsoft.com"},
	} {
		base := way.base
		if way.host != "" {
			base = "http://" + way.host
		}
		seen, pages := map[string]bool{}, 0
		for next := base + "/v1.0/engagements/referrals"; next != ""; pages++ {
			rest, ours := strings.CutPrefix(next, base+"/")
			if !ours {
				t.Fatalf("%s: page %d leads past the guard: %s", way.name, pages+1, next)
			}
			r, _ := http.NewRequest(http.MethodGet, way.base+"/"+rest, nil)
			r.Host = way.host
			r.Header.Set("Authorization", "Bearer "+token)
			r.Header.Set("Accept-Encoding", "gzip, deflate")
			res, body := do(t, r)
			if res.StatusCode != 200 {
				t.Fatalf("%s: page %d: %d %s", way.name, pages+1, res.StatusCode, body)
			}
			var page struct {
				Context string `json:"@odata.context"`
				Next    string `json:"@odata.nextLink"`
				Value   []struct {
					ID      string
					Details struct{ Notes string }
					Links   struct{ Self, RelatedReferrals struct{ URI string } }
				}
			}
			if err := json.Unmarshal(body, &page); err != nil {
				t.Fatal(err)
			}
			for _, v := range page.Value {
				seen[v.ID] = true
				if !strings.HasPrefix(v.Links.Self.URI, base+"/") || !strings.HasPrefix(v.Links.RelatedReferrals.URI, base+"/") {
					t.Errorf("%s: links %s, %s", way.name, v.Links.Self.URI, v.Links.RelatedReferrals.URI)
				}
				if !strings.Contains(v.Details.Notes, "https://api.partner.microsoft.com/") {
					t.Errorf("%s: what a user wrote was changed: %s", way.name, v.Details.Notes)
				}
			}
			next = page.Next
		}
		if pages < 2 || len(seen) < 8 {
			t.Errorf("%s: %d pages with %d referrals", way.name, pages, len(seen))
		}
	}
	// The download that an export leads to is Microsoft's, with its secret: never touched.
	graph := em.Mint(emulator.TokenSpec{Audience: emulator.AudienceGraph})
	r, _ := http.NewRequest(http.MethodPost, g.urls[0]+"/v1.0/reports/partners/billing/usage/unbilled/export", strings.NewReader(`{"currencyCode":"USD","billingPeriod":"current","attributeSet":"full"}`))
	r.Host = "graph.guard.contoso.example"
	r.Header.Set("Authorization", "Bearer "+graph)
	r.Header.Set("Content-Type", "application/json")
	res, body := do(t, r)
	location, ours := strings.CutPrefix(res.Header.Get("Location"), "http://graph.guard.contoso.example/")
	if res.StatusCode != 202 || !ours {
		t.Fatalf("the export: %d, Location %s %s", res.StatusCode, res.Header.Get("Location"), body)
	}
	var manifest string
	for range 20 {
		r, _ := http.NewRequest(http.MethodGet, g.urls[0]+"/"+location, nil)
		r.Host = "graph.guard.contoso.example"
		r.Header.Set("Authorization", "Bearer "+graph)
		if _, body := do(t, r); strings.Contains(string(body), "sasToken") {
			manifest = string(body)
			break
		}
	}
	if !strings.Contains(manifest, ".blob.core.windows.net") {
		t.Errorf("the manifest: %q", manifest)
	}
	g.stop()
}

func TestLinksStayWhereTheConfigurationSaysSo(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{PageSize: 7})
	g := threeAPIs(t, em, ", rewrite_links: false")
	_, body := get(t, g.urls[1]+"/v1.0/engagements/referrals", em.Mint(emulator.TokenSpec{Audience: emulator.AudiencePartnerAPI}))
	if !strings.Contains(string(body), `"@odata.nextLink":"http://api.partner.microsoft.com/v1.0/referrals?`) {
		t.Errorf("the page: %.300s", body)
	}
	g.stop()
}

// A partner's only way out is often a proxy.
func TestCallsGoOutThroughACorporateProxy(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, em.CAPEM(), 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var tunnels, keys atomic.Int64
	to := map[string]string{
		"api.partnercenter.microsoft.com:443": strings.TrimPrefix(em.PartnerTLSURL(), "https://"),
		"login.microsoftonline.com:443":       strings.TrimPrefix(em.EntraTLSURL(), "https://"),
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				r, err := http.ReadRequest(bufio.NewReader(c))
				if err != nil || r.Method != http.MethodConnect {
					return
				}
				target, err := net.Dial("tcp", to[r.Host])
				if err != nil {
					return
				}
				defer target.Close()
				if strings.HasPrefix(r.Host, "login.") {
					keys.Add(1)
				} else {
					tunnels.Add(1)
				}
				io.WriteString(c, "HTTP/1.1 200 Connection established\r\n\r\n")
				go io.Copy(target, c)
				io.Copy(c, target)
			}()
		}
	}()
	proxyURL := url.URL{Scheme: "http", Host: l.Addr().String()}
	text := guardYAML(em, "enforce")
	text = strings.Replace(text, "entra: {authority: "+fmt.Sprintf("%q", em.EntraURL())+"}", fmt.Sprintf("entra: {ca: %q}", ca), 1)
	text = strings.Replace(text, fmt.Sprintf("partner-center: {url: %q}", em.PartnerURL()), fmt.Sprintf("partner-center: {ca: %q}", ca), 1)
	if strings.Contains(text, "127.0.0.1") && strings.Contains(text, em.PartnerURL()) {
		t.Fatalf("the configuration still leads to the emulator:\n%s", text)
	}
	g := startGuard(t, t.TempDir(), text, "HTTPS_PROXY="+proxyURL.String(), "NO_PROXY=")
	for range 3 {
		if res, body := get(t, g.url+"/v1/customers?size=1", em.Mint(emulator.TokenSpec{})); res.StatusCode != 200 {
			t.Fatalf("%d %s", res.StatusCode, body)
		}
	}
	if tunnels.Load() == 0 || keys.Load() == 0 {
		t.Errorf("%d tunnels for calls and %d for keys", tunnels.Load(), keys.Load())
	}
	g.stop()
}
