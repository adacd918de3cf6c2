package emulator

import (
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const (
	referrals     = "/v1.0/engagements/referrals"
	relationships = "/v1.0/tenantRelationships/delegatedAdminRelationships"
)

// mint is the Authorization header of a compliant user's token for an audience.
func mint(e *Emulator, audience string) string {
	return bearer(e.Mint(TokenSpec{Audience: audience}))
}

func TestAPIsShareNoAudience(t *testing.T) {
	e := start(t, Config{})
	apis := []struct {
		name, target string
		audiences    []string
		refusal      string
	}{
		{PartnerCenter, e.PartnerURL() + "/v1/customers", []string{AudiencePartnerCenter, AudiencePartnerCenterGUID},
			`{"statusCode":401,"message":"Unauthorized: Invalid Authorization header, incorrect audience"}`},
		{PartnerAPI, e.PartnerAPIURL() + "/v1.0/payouts/payments/1", []string{AudiencePartnerAPI, AudiencePartnerAPIGUID},
			`{"statusCode":401,"message":"Unauthorized: Invalid Authorization header, incorrect audience"}`},
		{Graph, e.GraphURL() + relationships, []string{AudienceGraph, AudienceGraphGUID},
			`{"error":{"code":"unauthenticated","message":"Invalid Authorization header, incorrect audience",`},
	}
	for _, to := range apis {
		for _, of := range apis {
			for _, audience := range of.audiences {
				for _, slash := range []string{"", "/"} {
					e.Reset()
					res := do(t, e, "GET", to.target, "", mint(e, audience+slash))
					want := 401
					if to.name == of.name {
						want = 200
					}
					if res.status != want || want == 401 && !strings.HasPrefix(res.body, to.refusal) {
						t.Errorf("%s with %s = %d %s, want %d", to.target, audience+slash, res.status, res.body, want)
					}
					if want == 401 && res.header.Get("WWW-Authenticate") == "" {
						t.Errorf("%s: 401 without WWW-Authenticate", to.target)
					}
					if got := e.Requests()[0].API; got != to.name {
						t.Errorf("the request is kept under %q, want %q", got, to.name)
					}
				}
			}
		}
	}
}

func TestTokenEndpointsIssueForEveryAPI(t *testing.T) {
	e := start(t, Config{})
	app, _ := e.App(AppCompliant)
	for audience, target := range map[string]string{
		AudiencePartnerCenter: e.PartnerURL() + "/v1/customers",
		AudiencePartnerAPI:    e.PartnerAPIURL() + referrals,
		AudienceGraph:         e.GraphURL() + relationships,
	} {
		for _, version := range []string{"", "/v2.0"} {
			// One refresh token serves all resources.
			res := form(t, e, e.EntraURL()+"/"+DefaultTenant+"/oauth2"+version+"/token", "grant_type", "refresh_token", "client_id", app.ID,
				"client_secret", app.Secret, "refresh_token", app.RefreshToken, "resource", audience, "scope", audience+"/.default offline_access")
			token, _ := res.json(t)["access_token"].(string)
			if got := do(t, e, "GET", target, "", bearer(token)); got.status != 200 {
				t.Errorf("token of oauth2%s/token for %s: %d %s", version, audience, got.status, got.body)
			}
		}
	}
	_, claims := decode(t, e.Mint(TokenSpec{Audience: AudienceGraphGUID}))
	if got := claims["scp"]; !strings.Contains(got.(string), "PartnerBilling.Read.All") {
		t.Errorf("scp for Graph = %v", got)
	}
}

func TestErrorsHaveTheShapeOfTheAPI(t *testing.T) {
	e := start(t, Config{Exposure: 1})
	tests := []struct {
		name, method, target, authorization, script string
		status                                      int
		body                                        string
	}{
		{"no token, Partner API", "GET", e.PartnerAPIURL() + referrals, "", "", 401, `{"statusCode":401,"message":"Unauthorized: `},
		{"no token, Graph", "GET", e.GraphURL() + relationships, "", "", 401, `{"error":{"code":"unauthenticated",`},
		{"app-only, Partner API", "GET", e.PartnerAPIURL() + referrals, bearer(e.Mint(TokenSpec{AppOnly: true, Audience: AudiencePartnerAPI})), "", 403, `{"error":{"code":"accessDenied",`},
		{"app-only, Graph", "GET", e.GraphURL() + relationships, bearer(e.Mint(TokenSpec{AppOnly: true, Audience: AudienceGraph})), "", 200, `{"@odata.context":`},
		{"no MFA, Partner API", "GET", e.PartnerAPIURL() + referrals, bearer(e.Mint(TokenSpec{Audience: AudiencePartnerAPI, AMR: []string{"pwd"}})), "", 401, `{"code":"900421",`},
		{"no MFA, Graph", "GET", e.GraphURL() + relationships, bearer(e.Mint(TokenSpec{Audience: AudienceGraph, AMR: []string{"pwd"}})), "", 0, // 401 and 403 by turns
			`{"error":{"code":"unauthorized","message":"You are not authorized to access the resource.","innerError":{"code":"unauthorizedMissingMfaTokenClaim"`},
		{"unknown, Graph", "GET", e.GraphURL() + "/v1.0/nothing", mint(e, AudienceGraph), "", 404, `{"error":{"code":"itemNotFound",`},
		{"another API's path", "GET", e.GraphURL() + "/v1/customers", mint(e, AudienceGraph), "", 404, `{"error":{"code":"itemNotFound",`},
		{"wrong method, Partner API", "DELETE", e.PartnerAPIURL() + referrals, mint(e, AudiencePartnerAPI), "", 405, `{"error":{"code":"invalidRequest",`},
		{"asked for, Graph", "GET", e.GraphURL() + relationships, mint(e, AudienceGraph), "status=503", 503, `{"error":{"code":"serviceNotAvailable",`},
		{"throttled, Graph", "GET", e.GraphURL() + relationships, mint(e, AudienceGraph), "status=429", 429, `{"statusCode":429,`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			res := do(t, e, tt.method, tt.target, "", "Authorization: "+strings.TrimPrefix(tt.authorization, "Authorization: "), "Emulate: "+tt.script, "client-request-id: mine")
			if res.status != tt.status && tt.status != 0 || !strings.HasPrefix(res.body, tt.body) {
				t.Errorf("answer = %d %s, want %d %s", res.status, res.body, tt.status, tt.body)
			}
			if res.header.Get("request-id") == "" || res.header.Get("client-request-id") != "mine" || res.header.Get("MS-RequestId") != "" {
				t.Errorf("header = %v", res.header)
			}
		})
	}
}

// follow reads a collection to its end and returns the ids and the links to next
// pages. rebase turns a link into the place to send the request to.
func follow(t *testing.T, e *Emulator, token, first, next, id string, rebase func(string) string) (ids, links []string) {
	t.Helper()
	for target := first; target != ""; {
		res := do(t, e, "GET", target, "", token)
		if res.status != 200 {
			t.Fatalf("GET %s = %d %s", target, res.status, res.body)
		}
		body := res.json(t)
		for _, item := range body["value"].([]any) {
			ids = append(ids, item.(map[string]any)[id].(string))
		}
		link, _ := body[next].(string)
		if target = ""; link != "" {
			links = append(links, link)
			target = rebase(link)
		}
	}
	return ids, links
}

func TestPagesOfEveryAPIEnd(t *testing.T) {
	tests := []struct {
		name     string
		first    func(*Emulator) string
		audience string
		next, id string
		link     string // its beginning
		total    int
	}{
		{"referrals", func(e *Emulator) string { return e.PartnerAPIURL() + referrals }, AudiencePartnerAPI, "@odata.nextLink", "id",
			"http://api.partner.microsoft.com/v1.0/referrals?$skiptoken=", referralCount},
		{"relationships", func(e *Emulator) string { return e.GraphURL() + relationships }, AudienceGraph, "@odata.nextLink", "id",
			"https://graph.microsoft.com" + relationships + "?$skiptoken=", relationshipCount},
		{"reports", func(e *Emulator) string { return e.PartnerURL() + "/insights/v1/mpn/ScheduledReport" }, AudiencePartnerCenter, "nextLink", "reportId",
			"https://api.partnercenter.microsoft.com/insights/v1/mpn/ScheduledReport?pageToken=", reportCount},
	}
	for _, tt := range tests {
		for _, size := range []int{0, 1000, 50} {
			t.Run(tt.name, func(t *testing.T) {
				e := start(t, Config{PageSize: size})
				base, _ := url.Parse(tt.first(e))
				ids, links := follow(t, e, mint(e, tt.audience), tt.first(e), tt.next, tt.id, func(link string) string {
					u, err := url.Parse(link)
					if err != nil {
						t.Fatal(err)
					}
					u.Scheme, u.Host = base.Scheme, base.Host
					return u.String()
				})
				if slices.Sort(ids); len(ids) != tt.total || len(slices.Compact(ids)) != tt.total {
					t.Errorf("%d items, want %d different ones", len(ids), tt.total)
				}
				if size == 0 {
					size = 100
				}
				if want := (tt.total - 1) / size; len(links) != want {
					t.Errorf("%d next links, want %d", len(links), want)
				}
				for _, link := range links {
					if !strings.HasPrefix(link, tt.link) {
						t.Errorf("next link %s, want %s…", link, tt.link)
					}
				}
			})
		}
	}
}

// With OwnLinks a client that follows links stays with the emulator.
func TestOwnLinksCanBeFollowed(t *testing.T) {
	e := start(t, Config{OwnLinks: true, PageSize: 60})
	same := func(link string) string { return link }
	for _, base := range []string{e.PartnerAPIURL(), e.PartnerAPITLSURL()} {
		ids, links := follow(t, e, mint(e, AudiencePartnerAPI), base+referrals, "@odata.nextLink", "id", same)
		if len(ids) != referralCount || !strings.HasPrefix(links[0], base+"/v1.0/referrals?") {
			t.Errorf("%d referrals by %v", len(ids), links)
		}
	}
	res := do(t, e, "POST", e.GraphURL()+"/v1.0/reports/partners/billing/usage/unbilled/export", "{}", mint(e, AudienceGraph))
	if got := res.header.Get("Location"); !strings.HasPrefix(got, e.GraphURL()+"/v1.0/") {
		t.Errorf("Location = %s, want one of %s", got, e.GraphURL())
	}
}

func TestReferralLinksAreAbsolute(t *testing.T) {
	e := start(t, Config{})
	token := mint(e, AudiencePartnerAPI)
	created := do(t, e, "POST", e.PartnerAPIURL()+referrals, `{"name":"x"}`, token)
	id, _ := created.json(t)["id"].(string)
	target := e.PartnerAPIURL() + referrals + "/" + id
	type links struct{ self, related string }
	read := func(a answer) links {
		l := a.json(t)["links"].(map[string]any)
		uri := func(name string) string { return l[name].(map[string]any)["uri"].(string) }
		return links{uri("self"), uri("relatedReferrals")}
	}
	res := do(t, e, "GET", target, "", token)
	want := links{"https://api.partner.microsoft.com" + referrals + "/" + id, read(res).related}
	if got := read(res); created.status != 201 || got != want || !strings.HasPrefix(got.related, "https://api.partner.microsoft.com"+referrals+"?$filter=engagementId eq '") {
		t.Errorf("links = %+v, want %+v", got, want)
	}

	etag := res.header.Get("ETag")
	if etag == "" || etag != res.json(t)["eTag"] {
		t.Errorf("ETag %s, eTag %v", etag, res.json(t)["eTag"])
	}
	const change = `[{"op":"replace","path":"/status","value":"Active"}]`
	if res := do(t, e, "PATCH", target, change, token, "If-Match: "+etag); res.status != 204 {
		t.Errorf("PATCH = %d %s, want 204", res.status, res.body)
	}
	if res := do(t, e, "PATCH", target, change, token, "If-Match: "+etag); res.status != 412 || !strings.Contains(res.body, "preconditionFailed") {
		t.Errorf("PATCH with the old ETag = %d %s, want 412", res.status, res.body)
	}
	etag = do(t, e, "GET", target, "", token).header.Get("ETag")
	if res := do(t, e, "PATCH", target, change, token, "If-Match: "+etag, "Prefer: return=representation"); res.status != 200 || read(res) != want {
		t.Errorf("PATCH for a representation = %d %s", res.status, res.body)
	}
	for _, bad := range []answer{
		do(t, e, "GET", e.PartnerAPIURL()+referrals+"/none", "", token),
		do(t, e, "GET", e.PartnerAPIURL()+referrals+"?$skiptoken=x", "", token),
		do(t, e, "PUT", target, "{", token),
	} {
		if bad.status/100 != 4 || !strings.HasPrefix(bad.body, `{"error":`) {
			t.Errorf("answer = %d %s, want an error", bad.status, bad.body)
		}
	}
}

func TestExportEndsWithASignedManifest(t *testing.T) {
	e := start(t, Config{})
	token := mint(e, AudienceGraph)
	for _, kind := range []string{"reconciliation/billed", "reconciliation/unbilled", "usage/billed", "usage/unbilled"} {
		res := do(t, e, "POST", e.GraphURL()+"/v1.0/reports/partners/billing/"+kind+"/export", `{"attributeSet":"full"}`, token)
		operation, ok := strings.CutPrefix(res.header.Get("Location"), "https://graph.microsoft.com")
		if res.status != http.StatusAccepted || !ok || res.body != "" {
			t.Fatalf("export = %d %v %s", res.status, res.header, res.body)
		}
		var statuses []any
		var last map[string]any
		for range 3 {
			last = do(t, e, "GET", e.GraphURL()+operation, "", token).json(t)
			statuses = append(statuses, last["status"])
		}
		if diff := cmp.Diff([]any{"notStarted", "running", "succeeded"}, statuses); diff != "" {
			t.Errorf("statuses (-want +got):\n%s", diff)
		}
		manifest := last["resourceLocation"].(map[string]any)
		if root := manifest["rootDirectory"].(string); !strings.HasPrefix(root, "https://samplestorage.blob.core.windows.net/") || manifest["sasToken"] != storageSignature {
			t.Errorf("manifest = %v", manifest)
		}
		again := do(t, e, "GET", e.GraphURL()+"/v1.0/reports/partners/billing/manifests/"+manifest["id"].(string), "", token)
		if diff := cmp.Diff(manifest, again.json(t)); diff != "" {
			t.Errorf("manifest (-of the operation +by id):\n%s", diff)
		}
	}
}

func TestMoreResources(t *testing.T) {
	e := start(t, Config{})
	partnerAPI, graph, center := mint(e, AudiencePartnerAPI), mint(e, AudienceGraph), mint(e, AudiencePartnerCenter)
	relationship := guid("a") + "-" + guid("b")
	tests := []struct {
		method, target, authorization string
		status                        int
		want                          string
	}{
		{"GET", e.PartnerAPIURL() + "/v1.0/sales/fxrates(Month='202606')/$value", partnerAPI, 200, "FromCurrency,"},
		{"POST", e.PartnerAPIURL() + "/v1.0/payouts/payments", partnerAPI, 200, `"status":"Submitted"`},
		{"GET", e.PartnerAPIURL() + "/v1.0/payouts/payments/7", partnerAPI, 200, `"status":"InProgress"`},
		{"GET", e.PartnerAPIURL() + "/v1.0/payouts/payments/7", partnerAPI, 200, `"blobLocation":"https://samplestorage.blob.core.windows.net/payouts/7.csv.gz?sv=`},
		{"GET", e.GraphURL() + relationships + "/" + relationship, graph, 200, relationship},
		{"GET", e.GraphURL() + relationships + "/none", graph, 404, "itemNotFound"},
		{"GET", e.GraphURL() + relationships + "?$skiptoken=x", graph, 400, "invalidRequest"},
		{"GET", e.GraphURL() + "/v1.0/reports/partners/billing/operations/none", graph, 404, "itemNotFound"},
		{"GET", e.GraphURL() + "/v1.0/reports/partners/billing/manifests/none", graph, 404, "itemNotFound"},
		{"GET", e.GraphURL() + "/beta/security/partner/securityScore", graph, 200, "currentScore"},
		{"GET", e.GraphURL() + "/beta/tenantRelationships/managedTenants/tenants", graph, 200, "tenantId"},
		{"GET", e.PartnerURL() + "/insights/v1/cmp/ScheduledQueries", center, 200, `"nextLink":"/insights/v1/cmp/ScheduledQueries?`},
		{"GET", e.PartnerURL() + "/insights/v1/cmp/ScheduledReport/execution/1", center, 200, `"reportAccessSecureLink":"https://samplestorage.blob.core.windows.net/`},
		{"GET", e.PartnerURL() + "/insights/v1/cmp/ScheduledReport?pageToken=x", center, 400, "not valid"},
	}
	for _, tt := range tests {
		if res := do(t, e, tt.method, tt.target, "{}", tt.authorization); res.status != tt.status || !strings.Contains(res.body, tt.want) {
			t.Errorf("%s %s = %d %s, want %d with %s", tt.method, tt.target, res.status, res.body, tt.status, tt.want)
		}
	}
}

func TestTokenFormatChangesAtOnce(t *testing.T) {
	e := start(t, Config{})
	keys := published(t, e, "/common/discovery/keys")
	for _, tt := range []struct {
		name     string
		format   TokenFormat
		dots     int
		verifies bool
	}{
		{"opaque", FormatOpaque, 0, false},
		{"encrypted", FormatEncrypted, 4, false},
		{"sealed nonce", FormatSealedNonce, 2, false},
		{"as before", FormatJWT, 2, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			e.SetTokenFormat(tt.format)
			sample, err := e.Token(AppCompliant)
			if err != nil {
				t.Fatal(err)
			}
			app, _ := e.App(AppOnly)
			res := form(t, e, e.EntraURL()+"/"+DefaultTenant+"/oauth2/token", "grant_type", "client_credentials", "client_id", app.ID,
				"client_secret", app.Secret, "resource", AudiencePartnerCenter)
			issued, _ := res.json(t)["access_token"].(string)
			for _, token := range []string{sample, issued} {
				if got := strings.Count(token, "."); got != tt.dots {
					t.Errorf("token has %d dots, want %d", got, tt.dots)
				}
				if tt.dots == 2 {
					header, _ := decode(t, token)
					if got := verifies(keys[header["kid"].(string)], token); got != tt.verifies {
						t.Errorf("verifies = %v, want %v", got, tt.verifies)
					}
					if _, nonce := header["nonce"]; nonce != (tt.format == FormatSealedNonce) {
						t.Errorf("header = %v", header)
					}
				}
				if res := do(t, e, "GET", e.PartnerURL()+"/v1/customers", "", bearer(token)); res.status != 200 {
					t.Errorf("Partner Center answered %d %s", res.status, res.body)
				}
			}
		})
	}
}
