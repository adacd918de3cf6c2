package emulator

import (
	"bufio"
	"bytes"
	"compress/flate"
	"compress/gzip"
	"compress/zlib"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// exchange sends one request on a raw socket and returns all bytes that come back.
func exchange(t *testing.T, e *Emulator, token string, headers ...string) string {
	t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(e.PartnerURL(), "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	request := "GET /v1/customers HTTP/1.1\r\nHost: api.partnercenter.microsoft.com\r\nConnection: close\r\nAuthorization: Bearer " + token + "\r\n"
	for _, h := range headers {
		request += h + "\r\n"
	}
	if _, err := io.WriteString(conn, request+"\r\n"); err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(conn)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// split takes a raw answer apart. The body is unchunked, not decompressed.
func split(t *testing.T, raw string) (statusLine string, header http.Header, body []byte) {
	t.Helper()
	statusLine, _, _ = strings.Cut(raw, "\r\n")
	res, err := http.ReadResponse(bufio.NewReader(strings.NewReader(raw)), nil)
	if err != nil {
		t.Fatalf("%v in %.300q", err, raw)
	}
	body, err = io.ReadAll(res.Body)
	if err != nil {
		t.Fatalf("%v in %.300q", err, raw)
	}
	return statusLine, res.Header, body
}

func TestRefusalShapesOnTheWire(t *testing.T) {
	e := start(t, Config{Exposure: 1})
	token := e.Mint(TokenSpec{AMR: []string{"pwd"}})
	tests := []struct {
		shape      Shape
		statusLine []string
		body       string // prefix
	}{
		{ShapeCodeString, []string{"HTTP/1.1 401 Unauthorized"}, `{"code":"900421","description":"The MFA claim is missing in the app+user token.","data":[],"source":"PartnerApiServiceControllers"}`},
		{ShapeCodeNumber, []string{"HTTP/1.1 401 Unauthorized"}, `{"code":900421,"description":`},
		{ShapeReasonPhrase, []string{"HTTP/1.1 401 Unauthorized - MFA required"}, ""},
		{ShapeSDKText, []string{"HTTP/1.1 401 Unauthorized"}, "Authentication failed. MFA required. (10001)"},
		{ShapeGraphNested, []string{"HTTP/1.1 401 Unauthorized", "HTTP/1.1 403 Forbidden"}, `{"error":{"code":"unauthorized","message":"You are not authorized to access the resource.","innerError":{"code":"unauthorizedMissingMfaTokenClaim"`},
		{ShapeGraphPascal, []string{"HTTP/1.1 403 Forbidden"}, `{"Error":{"Code":"Unauthorized_MissingMFA","Message":"MFA is required for this request.`},
		{ShapeHTML, []string{"HTTP/1.1 401 Unauthorized"}, "<!DOCTYPE html>"},
	}
	if len(tests) != len(Shapes()) {
		t.Errorf("%d shapes are tested, there are %d", len(tests), len(Shapes()))
	}
	decoders := map[string]func(io.Reader) (io.Reader, error){
		"":            func(r io.Reader) (io.Reader, error) { return r, nil },
		"gzip":        func(r io.Reader) (io.Reader, error) { return gzip.NewReader(r) },
		"deflate":     func(r io.Reader) (io.Reader, error) { return zlib.NewReader(r) },
		"raw-deflate": func(r io.Reader) (io.Reader, error) { return flate.NewReader(r), nil },
	}
	for _, tt := range tests {
		for _, bom := range []bool{false, true} {
			for encoding, decode := range decoders {
				t.Run(fmt.Sprintf("%s bom=%v %s", tt.shape, bom, encoding), func(t *testing.T) {
					e.SetShape(tt.shape)
					directives := encoding
					if bom {
						directives += ",bom"
					}
					statusLine, header, body := split(t, exchange(t, e, token, "Emulate: "+directives))
					found := false
					for _, want := range tt.statusLine {
						found = found || statusLine == want
					}
					if !found {
						t.Errorf("status line = %q, want one of %q", statusLine, tt.statusLine)
					}
					if got, want := header.Get("Content-Encoding"), strings.TrimPrefix(encoding, "raw-"); got != want {
						t.Errorf("Content-Encoding = %q, want %q", got, want)
					}
					r, err := decode(bytes.NewReader(body))
					if err != nil {
						t.Fatal(err)
					}
					plain, err := io.ReadAll(r)
					if err != nil {
						t.Fatal(err)
					}
					want := tt.body
					if bom && want != "" {
						want = byteOrderMark + want
					}
					if !strings.HasPrefix(string(plain), want) || want == "" && len(plain) > 0 {
						t.Errorf("body = %q, want prefix %q", plain, want)
					}
				})
			}
		}
	}
}

func TestReasonPhraseRefusalIsTheDocumentedOne(t *testing.T) {
	e := start(t, Config{Exposure: 1, Shape: ShapeReasonPhrase})
	raw := exchange(t, e, e.Mint(TokenSpec{NoAMR: true}))
	head, rest, _ := strings.Cut(raw, "\r\n\r\n")
	if rest != "0\r\n\r\n" {
		t.Errorf("body on the wire = %q, want the last chunk alone", rest)
	}
	for _, line := range []string{
		"HTTP/1.1 401 Unauthorized - MFA required",
		"Transfer-Encoding: chunked",
		`WWW-Authenticate: Bearer error="invalid_token"`,
		"Request-Context: appId=cid-v1:",
		"Date: ",
	} {
		// Header names are spelt as Go spells them.
		if !strings.Contains(strings.ToLower(head), strings.ToLower(line)) {
			t.Errorf("%q is missing in %q", line, head)
		}
	}
}

func TestMixedShapesTakeTurns(t *testing.T) {
	e := start(t, Config{Exposure: 1, Shape: ShapeMixed})
	token := e.Mint(TokenSpec{AMR: []string{"pwd"}})
	seen, marked, zipped := map[string]bool{}, false, false
	for range 3 * len(Shapes()) {
		statusLine, header, body := split(t, exchange(t, e, token, "Accept-Encoding: gzip"))
		if header.Get("Content-Encoding") == "gzip" {
			zipped = true
			continue
		}
		if bytes.HasPrefix(body, []byte(byteOrderMark)) {
			marked = true
			continue
		}
		seen[statusLine+" "+string(body[:min(20, len(body))])] = true
	}
	if len(seen) < len(Shapes()) || !marked || !zipped {
		t.Errorf("%d forms, BOM %v, gzip %v; want at least %d, true, true", len(seen), marked, zipped, len(Shapes()))
	}
}

func TestHTTP2RefusalHasNoReasonPhrase(t *testing.T) {
	e := start(t, Config{Exposure: 1, Shape: ShapeReasonPhrase})
	req, _ := http.NewRequestWithContext(t.Context(), "GET", e.PartnerTLSURL()+"/v1/customers", nil)
	req.Header.Set("Authorization", "Bearer "+e.Mint(TokenSpec{NoAMR: true}))
	res, err := client(t, e, true).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if b, _ := io.ReadAll(res.Body); res.StatusCode != 401 || len(b) != 0 {
		t.Errorf("answer = %d %q, want 401 without a body", res.StatusCode, b)
	}
}

func TestTokensAreChecked(t *testing.T) {
	e := start(t, Config{Exposure: 1})
	guest := TokenSpec{UPN: "kim@fabrikam.example", AMR: []string{"fed", "mfa"}, Audience: AudiencePartnerCenterGUID}
	user := "/v1/customers/" + e.Customers()[0]
	tests := []struct {
		name   string
		token  string
		target string
		status int
		body   string
	}{
		{"MFA", e.Mint(TokenSpec{}), user, 200, ""},
		{"guest with MFA, audience by GUID", e.Mint(guest), user, 200, ""},
		{"audience with a slash", e.Mint(TokenSpec{Audience: AudiencePartnerCenter + "/"}), user, 200, ""},
		{"no MFA", e.Mint(TokenSpec{AMR: []string{"pwd"}}), user, 401, `"900421"`},
		{"amr is a string", e.Mint(TokenSpec{AMR: "mfa"}), user, 401, `"900421"`},
		{"app-only where allowed", e.Mint(TokenSpec{AppOnly: true}), "/v1/customers", 200, ""},
		{"app-only where refused", e.Mint(TokenSpec{AppOnly: true}), user, 403, `"900329"`},
		{"legacy audience", e.Mint(TokenSpec{Audience: AudienceLegacyGraph}), user, 401, `"900420"`},
		{"another API's audience", e.Mint(TokenSpec{Audience: AudienceGraph}), user, 401, `{"statusCode":401`},
		{"expired", e.Mint(TokenSpec{IssuedAt: time.Now().Add(-2 * time.Hour)}), user, 401, "expired"},
		{"within the clock skew", e.Mint(TokenSpec{Expires: time.Now().Add(-time.Minute)}), user, 200, ""},
		{"not yet valid", e.Mint(TokenSpec{NotBefore: time.Now().Add(time.Hour)}), user, 401, "not valid yet"},
		{"another tenant", e.Mint(TokenSpec{Tenant: guid("elsewhere")}), user, 401, `"400"`},
		{"foreign key", e.Mint(TokenSpec{Key: KeyForeign}), user, 401, `"400"`},
		{"bad signature", e.Mint(TokenSpec{BadSignature: true}), user, 401, `"400"`},
		{"unsigned", e.Mint(TokenSpec{Alg: "none"}), user, 401, `"400"`},
		{"signed with the public key", e.Mint(TokenSpec{Alg: "HS256"}), user, 401, `"400"`},
		{"no token", "", user, 401, `"800001"`},
		{"rubbish", "rubbish", user, 401, `"400"`},
		{"not even JSON", "e30.W10.c2ln", user, 401, `"400"`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			res := do(t, e, "GET", e.PartnerURL()+tt.target, "", bearer(tt.token))
			if res.status != tt.status || !strings.Contains(res.body, tt.body) {
				t.Errorf("answer = %d %s, want %d with %s", res.status, res.body, tt.status, tt.body)
			}
			if res.status == 401 && res.header.Get("WWW-Authenticate") == "" {
				t.Error("401 without WWW-Authenticate")
			}
		})
	}
}

func TestValidateMfaIsReported(t *testing.T) {
	e := start(t, Config{})
	tests := []struct {
		name  string
		token string
		ask   string
		want  string
	}{
		{"MFA", e.Mint(TokenSpec{}), "true", "true"},
		{"no MFA", e.Mint(TokenSpec{AMR: []string{"pwd"}}), "True", "false"},
		{"not asked", e.Mint(TokenSpec{}), "false", ""},
		{"app-only", e.Mint(TokenSpec{AppOnly: true}), "true", ""},
	}
	for _, tt := range tests {
		res := do(t, e, "GET", e.PartnerURL()+"/v1/customers", "", bearer(tt.token), "ValidateMfa: "+tt.ask)
		if got := res.header.Get("isMfaCompliant"); got != tt.want {
			t.Errorf("%s: isMfaCompliant = %q, want %q", tt.name, got, tt.want)
		}
	}
}

func TestExposureGrows(t *testing.T) {
	x := newExposure(Config{Exposure: 0.1, ExposureGrowth: 0.2})
	var refused []int
	for range 6 {
		n := 0
		for range 100 {
			if x.refuse("app", "user") {
				n++
			}
		}
		refused = append(refused, n)
	}
	for i, want := range []int{20, 40, 60, 80, 98, 100} {
		if d := refused[i] - want; d < -2 || d > 2 {
			t.Errorf("refusals per hundred = %v, the %d. should be about %d", refused, i+1, want)
		}
	}
}

func TestExposureHoldsForEachClient(t *testing.T) {
	e := start(t, Config{Exposure: 0.5})
	e.SetAppExposure("2f9c4b18-5d7e-4a60-b3c2-7e1d8f5a9b02", 1)
	for _, tt := range []struct {
		app  string
		want int
	}{{AppOldRefresh, 4}, {AppPassword, 8}, {AppCompliant, 0}, {AppOnly, 0}} {
		token, err := e.Token(tt.app)
		if err != nil {
			t.Fatal(err)
		}
		refused := 0
		for range 8 {
			if do(t, e, "GET", e.PartnerURL()+"/v1/customers", "", bearer(token)).status == 401 {
				refused++
			}
		}
		if refused != tt.want {
			t.Errorf("%s: %d of 8 calls refused, want %d", tt.app, refused, tt.want)
		}
	}
	e.SetExposure(0)
	token, _ := e.Token(AppOldRefresh)
	if res := do(t, e, "GET", e.PartnerURL()+"/v1/customers", "", bearer(token)); res.status != 200 {
		t.Errorf("after SetExposure(0): %d, want 200", res.status)
	}
}

func TestThrottling(t *testing.T) {
	e := start(t, Config{ThrottleEvery: 3})
	token := bearer(e.Mint(TokenSpec{}))
	var got []int
	for range 6 {
		res := do(t, e, "GET", e.PartnerURL()+"/v1/customers", "", token)
		got = append(got, res.status)
		if res.status == 429 && res.header.Get("Retry-After") == "" {
			t.Error("429 without Retry-After")
		}
	}
	if diff := cmp.Diff([]int{200, 200, 429, 200, 200, 429}, got); diff != "" {
		t.Errorf("statuses (-want +got):\n%s", diff)
	}
}

func TestCustomersPageToTheEnd(t *testing.T) {
	e := start(t, Config{})
	token := bearer(e.Mint(TokenSpec{}))
	var ids []string
	target, headers := "/customers?size=25", []string{token}
	for pages := 0; target != ""; pages++ {
		if pages > 10 {
			t.Fatal("the pages do not end")
		}
		res := do(t, e, "GET", e.PartnerURL()+"/v1"+target, "", headers...)
		if !strings.HasPrefix(res.body, byteOrderMark) {
			t.Error("the page does not start with a byte order mark")
		}
		page := res.json(t)
		for _, item := range page["items"].([]any) {
			ids = append(ids, item.(map[string]any)["id"].(string))
		}
		target = ""
		if next, ok := page["links"].(map[string]any)["next"].(map[string]any); ok {
			h := next["headers"].([]any)[0].(map[string]any)
			target, headers = next["uri"].(string), []string{token, h["key"].(string) + ": " + h["value"].(string)}
			if h["value"] != page["continuationToken"] {
				t.Error("link and continuationToken differ")
			}
		}
	}
	if diff := cmp.Diff(e.Customers(), ids); diff != "" {
		t.Errorf("customers (-want +got):\n%s", diff)
	}
	if res := do(t, e, "GET", e.PartnerURL()+"/v1/customers?seekOperation=Next", "", token, "MS-ContinuationToken: x"); res.status != 400 {
		t.Errorf("bad continuation token: %d, want 400", res.status)
	}
}

func TestInvoicesPageByOffset(t *testing.T) {
	e := start(t, Config{})
	token := bearer(e.Mint(TokenSpec{}))
	target, count := "/v1//invoices?size=10&offset=0", 0
	for target != "" {
		page := do(t, e, "GET", e.PartnerURL()+target, "", token)
		if strings.HasPrefix(page.body, byteOrderMark) {
			t.Error("invoices start with a byte order mark, want none")
		}
		body := page.json(t)
		count += len(body["items"].([]any))
		target = ""
		if next, ok := body["links"].(map[string]any)["next"].(map[string]any); ok {
			target = "/v1" + next["uri"].(string)
		}
	}
	if count != invoiceCount {
		t.Errorf("%d invoices, want %d", count, invoiceCount)
	}
}

func TestStaleETagIsRefused(t *testing.T) {
	e := start(t, Config{})
	token := bearer(e.Mint(TokenSpec{}))
	target := e.PartnerURL() + "/v1/customers/" + e.Customers()[0] + "/subscriptions/" + guid("s")
	etag := do(t, e, "GET", target, "", token).header.Get("ETag")
	first := do(t, e, "PATCH", target, `{"quantity":11}`, token, "If-Match: "+etag)
	if first.status != 200 || first.json(t)["quantity"] != 11. || first.header.Get("ETag") == etag {
		t.Errorf("PATCH = %d %s, want 200, quantity 11 and a new ETag", first.status, first.body)
	}
	second := do(t, e, "PATCH", target, `{"quantity":12}`, token, "If-Match: "+etag)
	if second.status != 400 || second.json(t)["code"] != "2055" {
		t.Errorf("PATCH with the stale ETag = %d %s, want 400/2055", second.status, second.body)
	}
}

func TestResources(t *testing.T) {
	e := start(t, Config{})
	token := bearer(e.Mint(TokenSpec{}))
	customer := "/v1/customers/" + e.Customers()[3]
	invoiceID := "G010000003"
	body := func(want string) func(answer) bool {
		return func(a answer) bool { return strings.Contains(a.body, want) }
	}
	header := func(name, prefix string) func(answer) bool {
		return func(a answer) bool { return strings.HasPrefix(a.header.Get(name), prefix) }
	}
	tests := []struct {
		method, target, body string
		status               int
		check                func(answer) bool
	}{
		{"GET", customer, "", 200, body(`"companyProfile"`)},
		{"GET", strings.Replace(customer, "customers", "CUSTOMERS", 1), "", 200, body(`"companyProfile"`)},
		{"GET", "/v1/customers/nobody", "", 404, body(`"60003"`)},
		{"GET", "/v1/customers/00000000-0000-0000-0000-000000000000/subscriptions", "", 404, body(`"60003"`)},
		{"GET", customer + "/subscriptions", "", 200, body(`"totalCount":3`)},
		{"POST", customer + "/orders", `{}`, 201, header("Location", "/customers/")},
		{"POST", customer + "/orders", `{`, 400, body("not an order")},
		{"GET", customer + "/orders/nothing", "", 404, body(`"20000"`)},
		{"POST", customer + "/carts", `{}`, 201, header("Location", "/customers/")},
		{"GET", customer + "/carts/nothing", "", 404, body(`"800002"`)},
		{"POST", customer + "/DeviceBatches", `{}`, 202, header("Location", "/customers/")},
		{"POST", "/v1/productupgrades", `{}`, 202, header("Location", "productUpgrades/")},
		{"POST", "/v1/productUpgrades/eligibility", `{}`, 200, body("isEligible")},
		{"GET", customer + "/users", "", 200, body("userPrincipalName")},
		{"GET", customer + "/subscribedskus", "", 200, body("productSku")},
		{"GET", customer + "/profiles/billing", "", 200, body("CustomerBillingProfile")},
		{"GET", "/v1/invoices/" + invoiceID, "", 200, body(invoiceID)},
		{"GET", "/v1/invoices/none", "", 404, body(`"2002"`)},
		{"GET", "/v1/invoices/" + invoiceID + "/documents/statement", "", 200, body("%PDF-1.7")},
		{"GET", "/v1/invoices/" + invoiceID + "/lineitems/OneTime/BillingLineItems?size=100", "", 200, body("continuationToken")},
		{"GET", "/v1/products?country=US&targetView=OnlineServicesNCE", "", 200, body("CFQ7TTC0LCHC")},
		{"GET", "/v1/products/DZH318Z0BPS6:0002", "", 200, body("DZH318Z0BPS6:0002")},
		{"GET", "/v1/margins/download", "", 200, func(a answer) bool {
			return strings.HasPrefix(a.body, "ProductId,") && a.header.Get("Content-Type") == "application/json"
		}},
		{"GET", "/v1/servicerequests", "", 200, body("ServiceRequest")},
		{"GET", "/v1/profiles/mpn", "", 200, body("mpn_profile")},
		{"GET", "/v1/auditrecords?startDate=2026-06-01", "", 200, body("FulfillmentService")},
		{"HEAD", "/v1/domains/contoso", "", 200, body("")},
		{"HEAD", "/v1/domains/free-name", "", 404, body("")},
		{"GET", "/v1/nothing", "", 404, body(`"code":"404"`)},
		{"DELETE", "/v1/invoices", "", 405, body(`"code":"405"`)},
		{"GET", "/v1/_large?bytes=x", "", 400, body("bytes")},
		{"POST", "/generatetoken", "grant_type=other", 400, body("jwt_token")},
	}
	for _, tt := range tests {
		t.Run(tt.method+" "+tt.target, func(t *testing.T) {
			res := do(t, e, tt.method, e.PartnerURL()+tt.target, tt.body, token)
			if res.status != tt.status || !tt.check(res) {
				t.Errorf("answer = %d %v %.300s, want %d", res.status, res.header, res.body, tt.status)
			}
			for _, name := range []string{"MS-RequestId", "MS-CorrelationId", "MS-CV", "MS-ServerId", "Request-Context"} {
				if res.header.Get(name) == "" {
					t.Errorf("%s is missing", name)
				}
			}
		})
	}
}

func TestAsynchronousWorkTakesItsTime(t *testing.T) {
	e := start(t, Config{})
	token := bearer(e.Mint(TokenSpec{}))
	customer := e.PartnerURL() + "/v1/customers/" + e.Customers()[0]
	location := do(t, e, "POST", customer+"/deviceBatches", "{}", token).header.Get("Location")
	var got []any
	for range 3 {
		got = append(got, do(t, e, "GET", e.PartnerURL()+"/v1"+location, "", token).json(t)["batchStatus"])
	}
	if diff := cmp.Diff([]any{"Queued", "Processing", "Finished"}, got); diff != "" {
		t.Errorf("batch status (-want +got):\n%s", diff)
	}
	utilization := customer + "/subscriptions/" + guid("s") + "/utilizations/azure"
	first, second := do(t, e, "GET", utilization, "", token), do(t, e, "GET", utilization, "", token)
	if first.status != 204 || first.header.Get("Retry-After") == "" || second.status != 200 {
		t.Errorf("utilization = %d then %d, want 204 with Retry-After, then 200", first.status, second.status)
	}
	order := do(t, e, "POST", customer+"/orders", "{}", token).header.Get("Location")
	if res := do(t, e, "GET", e.PartnerURL()+"/v1"+order, "", token); res.status != 200 {
		t.Errorf("created order = %d, want 200", res.status)
	}
	cart := do(t, e, "POST", customer+"/carts", "{}", token).header.Get("Location")
	if res := do(t, e, "POST", e.PartnerURL()+"/v1"+cart+"/checkout", "", token); res.status != 201 {
		t.Errorf("checkout = %d, want 201", res.status)
	}
}

func TestPriceSheetIsZippedForDeflate(t *testing.T) {
	e := start(t, Config{})
	token := bearer(e.Mint(TokenSpec{Audience: AudiencePartnerAPI}))
	target := e.PartnerAPIURL() + "/v1.0/sales/pricesheets(Market='US',PricesheetView='updatedlicensebased')/$value"
	if res := do(t, e, "GET", target, "", token); !strings.HasPrefix(res.body, "ProductTitle,") || len(res.body) < 1<<20 {
		t.Errorf("without deflate: %d, %d bytes, %.40q", res.status, len(res.body), res.body)
	}
	if res := do(t, e, "GET", target, "", token, "Accept-Encoding: deflate"); !strings.HasPrefix(res.body, "PK\x03\x04") || res.header.Get("Content-Encoding") != "" {
		t.Errorf("with deflate: %d, %.10q, Content-Encoding %q", res.status, res.body, res.header.Get("Content-Encoding"))
	}
}

func TestGenerateTokenExchangesTokens(t *testing.T) {
	e := start(t, Config{})
	for _, path := range []string{"/generatetoken", "/v3/generatetoken"} {
		exchanged := do(t, e, "POST", e.PartnerURL()+path, "grant_type=jwt_token", bearer(e.Mint(TokenSpec{}))).json(t)["access_token"].(string)
		if strings.Contains(exchanged, ".") {
			t.Errorf("%s gave %q, want an opaque token", path, exchanged)
		}
		res := do(t, e, "GET", e.PartnerURL()+"/v1/customers", "", bearer(exchanged), "ValidateMfa: true")
		if res.status != 200 || res.header.Get("isMfaCompliant") != "true" {
			t.Errorf("call with it = %d, isMfaCompliant %q", res.status, res.header.Get("isMfaCompliant"))
		}
	}
}

func TestSecurityAPIsReportTheTraffic(t *testing.T) {
	e := start(t, Config{})
	weak, strong := bearer(e.Mint(TokenSpec{UPN: "svc-sync@contoso-partner.example", AMR: []string{"pwd"}})), bearer(e.Mint(TokenSpec{}))
	customer := e.Customers()[0]
	do(t, e, "GET", e.PartnerURL()+"/v1/customers/"+customer+"/subscriptions?order_id=1", "", weak, "MS-RequestId: "+guid("request"))
	users := do(t, e, "GET", e.PartnerURL()+"/v1/nonMfaCompliantPartnerPrincipals", "", strong).json(t)
	if users["totalCount"] != 1. || users["items"].([]any)[0].(map[string]any)["upn"] != "svc-sync@contoso-partner.example" {
		t.Errorf("principals = %v", users)
	}
	requests := do(t, e, "GET", e.PartnerURL()+"/v1/partnerRequests", "", strong).json(t)["items"].([]any)
	first := requests[0].(map[string]any)
	want := map[string]any{"requestId": guid("request"), "mfaCompliant": false,
		"operationName": "Get /v{version}/customers/{customer_id}/subscriptions?order_id={order_id_value}"}
	if diff := cmp.Diff(want, map[string]any{"requestId": first["requestId"], "mfaCompliant": first["mfaCompliant"], "operationName": first["operationName"]}); diff != "" {
		t.Errorf("request (-want +got):\n%s", diff)
	}
	adoption := do(t, e, "GET", e.PartnerURL()+"/v1/applicationmfaadoptionstatus", "", strong).body
	if !strings.HasPrefix(adoption, `[{"loginDate":"`) || !strings.Contains(adoption, `"mfaCompliantRequestCount":3,"totalRequestCount":4`) {
		t.Errorf("adoption = %s", adoption)
	}
}

func TestTransfersAreHashed(t *testing.T) {
	e := start(t, Config{Seed: 7})
	token := bearer(e.Mint(TokenSpec{}))
	const size = 3<<20 + 17
	want, _ := io.ReadAll(e.Large(size))
	if res := do(t, e, "GET", fmt.Sprintf("%s/v1/_large?bytes=%d", e.PartnerURL(), size), "", token); res.body != string(want) {
		t.Errorf("download: %d bytes differ from Large", len(res.body))
	}
	sum := sha256.Sum256(want)
	res := do(t, e, "PUT", e.PartnerURL()+"/v1/_upload", string(want), token).json(t)
	if res["bytes"] != float64(size) || res["sha256"] != hex.EncodeToString(sum[:]) {
		t.Errorf("upload = %v", res)
	}
	last := e.Requests()[1]
	if last.BodyBytes != size || last.BodySHA256 != hex.EncodeToString(sum[:]) || last.Status != 200 {
		t.Errorf("recorded %d bytes, %s, status %d", last.BodyBytes, last.BodySHA256, last.Status)
	}
}

func TestRequestsAreKeptAsTheyCame(t *testing.T) {
	e := start(t, Config{})
	token := e.Mint(TokenSpec{})
	conn, err := net.Dial("tcp", strings.TrimPrefix(e.PartnerURL(), "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "POST /v1//_upload?a=%%41&b HTTP/1.1\r\nHost: api.partnercenter.microsoft.com\r\nAuthorization: Bearer %s\r\n"+
		"X-Twice: 1\r\nX-Twice: 2\r\nTrailer: X-End\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-End: yes\r\n\r\n", token)
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	got := e.Requests()[0]
	sum := sha256.Sum256([]byte("abc"))
	want := Request{API: PartnerCenter, Method: "POST", Target: "/v1//_upload?a=%41&b", Host: "api.partnercenter.microsoft.com", Proto: "HTTP/1.1",
		Header:  http.Header{"Authorization": {"Bearer " + token}, "X-Twice": {"1", "2"}},
		Trailer: http.Header{"X-End": {"yes"}}, BodyBytes: 3, BodySHA256: hex.EncodeToString(sum[:]), Status: 200}
	got.Time, got.Finished = time.Time{}, time.Time{}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("request (-want +got):\n%s", diff)
	}
	e.Reset()
	if e.Count() != 0 || len(e.Requests()) != 0 {
		t.Error("Reset keeps requests")
	}
}

func TestClientThatGoesAwayIsSeen(t *testing.T) {
	e := start(t, Config{})
	token := e.Mint(TokenSpec{})
	tests := []struct {
		name   string
		method string
		target string
		script string
		body   io.Reader
	}{
		{"before the headers", "GET", "/v1/customers", "stall=1h", nil},
		{"after a request body", "POST", "/v1/_upload", "stall=1h", strings.NewReader("abc")},
		{"amid the body", "GET", "/v1/customers", "stall-body=1h", nil},
		{"amid a large download", "GET", "/v1/_large?bytes=1000000000", "", nil},
		{"amid an upload", "PUT", "/v1/_upload", "", io.MultiReader(strings.NewReader("abc"), endless{})},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			e.Reset()
			ctx, hangUp := context.WithCancel(t.Context())
			defer hangUp()
			req, err := http.NewRequestWithContext(ctx, tt.method, e.PartnerURL()+tt.target, tt.body)
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set("Authorization", "Bearer "+token)
			req.Header.Set("Emulate", tt.script)
			c := client(t, e, false)
			ended := make(chan struct{})
			go func() {
				defer close(ended)
				if res, err := c.Do(req); err == nil {
					<-ctx.Done()
					res.Body.Close()
				}
			}()
			if err := e.Wait(soon(t), func(r []Request) bool { return len(r) == 1 }); err != nil {
				t.Fatal(err)
			}
			hangUp()
			if err := e.Wait(soon(t), func(r []Request) bool { return r[0].Canceled && !r[0].Finished.IsZero() }); err != nil {
				t.Errorf("the hang-up was not seen: %v; %+v", err, e.Requests())
			}
			<-ended
		})
	}
	e.Reset()
	if do(t, e, "GET", e.PartnerURL()+"/v1/customers", "", bearer(token)); e.Requests()[0].Canceled {
		t.Error("a call that ended well counts as canceled")
	}
}

// endless is an upload without an end.
type endless struct{}

func (endless) Read(p []byte) (int, error) { return len(p), nil }

func TestWaitEndsWithItsContext(t *testing.T) {
	e := start(t, Config{})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := e.Wait(ctx, func([]Request) bool { return false }); !errors.Is(err, context.Canceled) {
		t.Errorf("Wait = %v, want context.Canceled", err)
	}
}

func TestScriptedAnswers(t *testing.T) {
	e := start(t, Config{})
	token := bearer(e.Mint(TokenSpec{}))
	tests := []struct {
		script string
		status int
		check  func(answer) bool
	}{
		{"status=429, retry-after=7", 429, func(a answer) bool { return a.header.Get("Retry-After") == "7" }},
		{"status=503", 503, func(a answer) bool { return strings.Contains(a.body, `"code":"503"`) }},
		{"status=204", 204, func(a answer) bool { return a.body == "" }},
		{"refuse=code-string,status=403", 403, func(a answer) bool { return strings.Contains(a.body, "900421") }},
		{"status-line=299 All is odd", 299, func(a answer) bool { return strings.HasPrefix(a.body, byteOrderMark+`{"totalCount"`) }},
		{"challenge", 401, func(a answer) bool {
			return strings.Contains(a.header.Get("WWW-Authenticate"), `error="insufficient_claims", claims="`+defaultChallenge+`"`)
		}},
		{"challenge=abc=,refuse=html", 401, func(a answer) bool { return strings.Contains(a.header.Get("WWW-Authenticate"), `claims="abc="`) }},
		{"body=5000", 200, func(a answer) bool { return len(a.body) == 5000 }},
		{"early-hints", 200, func(a answer) bool { return a.header.Get("Link") == "" }},
		{"no-read", 200, func(answer) bool { return true }},
		{"stall=1ms,stall-body=1ms", 200, func(a answer) bool { return strings.Contains(a.body, "totalCount") }},
		{"code=900309", 403, func(a answer) bool { return strings.Contains(a.body, `"code":"900309"`) }},
		{"code=10001", 401, func(a answer) bool { return strings.Contains(a.body, `"code":"10001"`) }},
		{"code=1", 400, func(a answer) bool { return strings.Contains(a.body, "unknown code") }},
		{"dance", 400, func(a answer) bool { return strings.Contains(a.body, "unknown directive") }},
		{"refuse=politely", 400, func(a answer) bool { return strings.Contains(a.body, "unknown shape") }},
		{"status=99", 400, func(a answer) bool { return strings.Contains(a.body, "out of range") }},
	}
	for _, tt := range tests {
		t.Run(tt.script, func(t *testing.T) {
			res := do(t, e, "GET", e.PartnerURL()+"/v1/customers", "", token, "Emulate: "+tt.script)
			if res.status != tt.status || !tt.check(res) {
				t.Errorf("answer = %d %v %.200s", res.status, res.header, res.body)
			}
		})
	}
}

func TestScriptedAccidents(t *testing.T) {
	e := start(t, Config{})
	token := e.Mint(TokenSpec{})
	get := func(script string) (*http.Response, error) {
		req, _ := http.NewRequestWithContext(t.Context(), "GET", e.PartnerURL()+"/v1/_large?bytes=5000", nil)
		req.Header.Set("Authorization", "Bearer "+token)
		req.Header.Set("Emulate", script)
		return client(t, e, false).Do(req)
	}
	t.Run("abort-after", func(t *testing.T) {
		res, err := get("abort-after=1000")
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		if len(b) != 1000 || res.ContentLength != 5000 || !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("read %d of %d bytes, %v; want 1000 of 5000 and an unexpected EOF", len(b), res.ContentLength, err)
		}
	})
	t.Run("reset", func(t *testing.T) {
		if res, err := get("reset"); err == nil {
			res.Body.Close()
			t.Errorf("got %d, want a broken connection", res.StatusCode)
		}
	})
	t.Run("trailers", func(t *testing.T) {
		res, err := get("trailers")
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		if _, err := io.Copy(io.Discard, res.Body); err != nil || res.Trailer.Get("X-Emulator-Trailer") != "complete" {
			t.Errorf("trailer = %v, %v", res.Trailer, err)
		}
	})
	t.Run("upgrade", func(t *testing.T) {
		res, err := get("upgrade")
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		if res.StatusCode != 101 || res.Header.Get("Upgrade") != "emulator" {
			t.Errorf("answer = %d %v", res.StatusCode, res.Header)
		}
	})
	t.Run("early-hints", func(t *testing.T) {
		if raw := exchange(t, e, token, "Emulate: early-hints"); !strings.HasPrefix(raw, "HTTP/1.1 103 Early Hints\r\nLink: ") {
			t.Errorf("answer starts %.100q", raw)
		}
	})
}
