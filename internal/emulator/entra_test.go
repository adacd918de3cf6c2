package emulator

import (
	"encoding/base64"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestDiscoveryDocuments(t *testing.T) {
	e := start(t, Config{})
	base := e.EntraURL()
	tests := []struct{ path, issuer, keys, token string }{
		{"/" + DefaultTenant, "https://sts.windows.net/" + DefaultTenant + "/", "/discovery/keys", "/oauth2/token"},
		{"/common", "https://sts.windows.net/{tenantid}/", "/discovery/keys", "/oauth2/token"},
		{"/" + DefaultTenant + "/v2.0", "https://login.microsoftonline.com/" + DefaultTenant + "/v2.0", "/discovery/v2.0/keys", "/oauth2/v2.0/token"},
		{"/common/v2.0", "https://login.microsoftonline.com/{tenantid}/v2.0", "/discovery/v2.0/keys", "/oauth2/v2.0/token"},
		{"/organizations/v2.0", "https://login.microsoftonline.com/{tenantid}/v2.0", "/discovery/v2.0/keys", "/oauth2/v2.0/token"},
	}
	for _, tt := range tests {
		t.Run(tt.path, func(t *testing.T) {
			doc := do(t, e, "GET", base+tt.path+"/.well-known/openid-configuration", "").json(t)
			root := base + strings.TrimSuffix(tt.path, "/v2.0")
			want := map[string]any{"issuer": tt.issuer, "jwks_uri": root + tt.keys, "token_endpoint": root + tt.token}
			got := map[string]any{"issuer": doc["issuer"], "jwks_uri": doc["jwks_uri"], "token_endpoint": doc["token_endpoint"]}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("document (-want +got):\n%s", diff)
			}
			if res := do(t, e, "GET", root+tt.keys, ""); res.status != 200 || !strings.Contains(res.header.Get("Cache-Control"), "max-age=86400") {
				t.Errorf("key set: status %d, Cache-Control %q", res.status, res.header.Get("Cache-Control"))
			}
		})
	}
}

func TestKeySetsNameIssuersInV2Only(t *testing.T) {
	e := start(t, Config{})
	issuers := func(path string) map[string]int {
		found := map[string]int{}
		for _, k := range do(t, e, "GET", e.EntraURL()+path, "").json(t)["keys"].([]any) {
			issuer, _ := k.(map[string]any)["issuer"].(string)
			found[issuer]++
		}
		return found
	}
	const v2 = "https://login.microsoftonline.com/%s/v2.0"
	tests := []struct {
		path string
		want map[string]int
	}{
		{"/common/discovery/keys", map[string]int{"": 1}},
		{"/common/discovery/v2.0/keys", map[string]int{fmt.Sprintf(v2, "{tenantid}"): 1, fmt.Sprintf(v2, consumerTenant): 1}},
		{"/" + DefaultTenant + "/discovery/v2.0/keys", map[string]int{fmt.Sprintf(v2, DefaultTenant): 1, fmt.Sprintf(v2, consumerTenant): 1}},
	}
	for _, tt := range tests {
		if diff := cmp.Diff(tt.want, issuers(tt.path)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.path, diff)
		}
	}
	if got := e.KeyFetches(); got != len(tests) {
		t.Errorf("KeyFetches = %d, want %d", got, len(tests))
	}
}

func TestRotationKeepsOldKeysUntilWithdrawn(t *testing.T) {
	e := start(t, Config{})
	old := e.Mint(TokenSpec{})
	const path = "/" + DefaultTenant + "/discovery/keys"
	call := func(token string) int {
		return do(t, e, "GET", e.PartnerURL()+"/v1/customers", "", bearer(token)).status
	}
	e.Rotate()
	fresh := e.Mint(TokenSpec{})
	if n := len(published(t, e, path)); n != 2 {
		t.Errorf("after Rotate %d keys are published, want 2", n)
	}
	if o, f := call(old), call(fresh); o != 200 || f != 200 {
		t.Errorf("after Rotate: old token %d, new token %d; want 200, 200", o, f)
	}
	e.Withdraw()
	if n := len(published(t, e, path)); n != 1 {
		t.Errorf("after Withdraw %d keys are published, want 1", n)
	}
	if o, f := call(old), call(fresh); o != 401 || f != 200 {
		t.Errorf("after Withdraw: old token %d, new token %d; want 401, 200", o, f)
	}
	if got := call(e.Mint(TokenSpec{Key: KeyPrevious})); got != 401 {
		t.Errorf("token of the withdrawn key: %d, want 401", got)
	}
}

func TestKeysModes(t *testing.T) {
	e := start(t, Config{})
	target := e.EntraURL() + "/common/discovery/v2.0/keys"
	tests := []struct {
		name  string
		mode  KeysMode
		check func(answer) bool
	}{
		{"ok", KeysOK, func(a answer) bool { return a.status == 200 && strings.Contains(a.body, `"kid"`) }},
		{"500", Keys500, func(a answer) bool { return a.status == 500 }},
		{"empty", KeysEmpty, func(a answer) bool { return a.status == 200 && a.body == `{"keys":[]}` }},
		{"HTML", KeysHTML, func(a answer) bool { return a.status == 200 && strings.HasPrefix(a.body, "<!DOCTYPE html>") }},
		{"huge", KeysHuge, func(a answer) bool {
			return a.status == 200 && len(a.body) >= 64<<20 && strings.HasSuffix(a.body, "]}")
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			e.SetKeysMode(tt.mode)
			if res := do(t, e, "GET", target, ""); !tt.check(res) {
				t.Errorf("answer = %d %.100q", res.status, res.body)
			}
		})
	}
	t.Run("down", func(t *testing.T) {
		e.SetKeysMode(KeysDown)
		if res, err := client(t, e, false).Get(target); err == nil {
			res.Body.Close()
			t.Errorf("got status %d, want a closed connection", res.StatusCode)
		}
	})
	t.Run("hang", func(t *testing.T) {
		e.SetKeysMode(KeysHang)
		before := e.KeyFetches()
		ended := make(chan error, 1)
		c := client(t, e, false)
		c.Timeout = 200 * time.Millisecond
		go func() {
			res, err := c.Get(target)
			if err == nil {
				res.Body.Close()
			}
			ended <- err
		}()
		if err := e.Wait(soon(t), func([]Request) bool { return e.KeyFetches() == before+1 }); err != nil {
			t.Errorf("the fetch was not seen: %v", err)
		}
		if err := <-ended; err == nil {
			t.Error("got an answer, want none")
		}
	})
}

func TestTokenEndpointGrants(t *testing.T) {
	e := start(t, Config{})
	sam, _ := e.App(AppCompliant)
	ropc, _ := e.App(AppPassword)
	old, _ := e.App(AppOldRefresh)
	daemon, _ := e.App(AppOnly)
	certificate, _ := e.App(AppCertificate)
	azure, _ := e.App(AppFirstParty)
	svc, _ := e.dir.user(ropc.User)
	assertion := "e30." + base64.RawURLEncoding.EncodeToString(mustJSON(object{
		{"iss", certificate.ID}, {"sub", certificate.ID}, {"exp", time.Now().Add(time.Minute).Unix()}})) + ".c2ln"
	tests := []struct {
		name   string
		path   string
		form   []string
		claims map[string]any // nil: must be absent
	}{
		{"v1 client credentials", "/" + DefaultTenant + "/oauth2/token",
			[]string{"grant_type", "client_credentials", "client_id", daemon.ID, "client_secret", daemon.Secret, "resource", AudiencePartnerCenter},
			map[string]any{"appid": daemon.ID, "idtyp": "app", "amr": nil, "scp": nil, "aud": AudiencePartnerCenter, "sub": daemon.ObjectID, "oid": daemon.ObjectID, "appidacr": "1"}},
		{"v1 keeps the slash of the resource", "/" + DefaultTenant + "/oauth2/token",
			[]string{"grant_type", "client_credentials", "client_id", daemon.ID, "client_secret", daemon.Secret, "resource", AudiencePartnerCenter + "/"},
			map[string]any{"aud": AudiencePartnerCenter + "/"}},
		{"v1 by the tenant's domain and the app id as resource", "/contoso-partner.example/oauth2/token",
			[]string{"grant_type", "client_credentials", "client_id", daemon.ID, "client_secret", daemon.Secret, "resource", AudiencePartnerCenterGUID},
			map[string]any{"aud": AudiencePartnerCenterGUID, "tid": DefaultTenant}},
		{"v2 client credentials give a v1 token", "/" + DefaultTenant + "/oauth2/v2.0/token",
			[]string{"grant_type", "client_credentials", "client_id", daemon.ID, "client_secret", daemon.Secret, "scope", AudiencePartnerCenter + "/.default"},
			map[string]any{"aud": AudiencePartnerCenter, "ver": "1.0"}},
		{"client assertion", "/" + DefaultTenant + "/oauth2/v2.0/token",
			[]string{"grant_type", "client_credentials", "client_id", certificate.ID, "client_assertion", assertion,
				"client_assertion_type", "urn:ietf:params:oauth:client-assertion-type:jwt-bearer", "scope", AudiencePartnerCenter + "/.default"},
			map[string]any{"appidacr": "2", "idtyp": "app"}},
		{"password", "/organizations/oauth2/token",
			[]string{"grant_type", "password", "client_id", ropc.ID, "client_secret", ropc.Secret, "username", svc.UPN, "password", svc.Password, "resource", AudiencePartnerCenter},
			map[string]any{"amr": []any{"pwd"}, "upn": svc.UPN, "scp": "user_impersonation", "tid": DefaultTenant}},
		{"password of a public client", "/common/oauth2/token",
			[]string{"grant_type", "password", "client_id", azure.ID, "username", svc.UPN, "password", svc.Password, "resource", AudiencePartnerCenter},
			map[string]any{"amr": []any{"pwd"}, "appid": azure.ID, "appidacr": "0"}},
		{"refresh token minted with MFA", "/" + DefaultTenant + "/oauth2/token",
			[]string{"grant_type", "refresh_token", "client_id", sam.ID, "client_secret", sam.Secret, "refresh_token", sam.RefreshToken, "resource", AudiencePartnerCenter},
			map[string]any{"amr": []any{"pwd", "mfa"}, "upn": sam.User}},
		{"refresh token minted without MFA", "/" + DefaultTenant + "/oauth2/v2.0/token",
			[]string{"grant_type", "refresh_token", "client_id", old.ID, "client_secret", old.Secret, "refresh_token", old.RefreshToken, "scope", "openid " + AudiencePartnerCenter + "/user_impersonation"},
			map[string]any{"amr": []any{"pwd"}, "upn": old.User, "aud": AudiencePartnerCenter}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			res := form(t, e, e.EntraURL()+tt.path, tt.form...)
			if res.status != 200 {
				t.Fatalf("status %d: %s", res.status, res.body)
			}
			body := res.json(t)
			if strings.Contains(tt.path, "v2.0") {
				if body["expires_in"] != 3900. || body["expires_on"] != nil {
					t.Errorf("expires_in, expires_on = %#v, %#v; want 3900 and none", body["expires_in"], body["expires_on"])
				}
			} else if body["expires_in"] != "3900" || body["resource"] == "" {
				t.Errorf("expires_in, resource = %#v, %#v; want strings", body["expires_in"], body["resource"])
			}
			_, claims := decode(t, body["access_token"].(string))
			got := map[string]any{}
			for name := range tt.claims {
				got[name] = claims[name]
			}
			if diff := cmp.Diff(tt.claims, got); diff != "" {
				t.Errorf("claims (-want +got):\n%s", diff)
			}
		})
	}
}

func TestTokenEndpointErrors(t *testing.T) {
	e := start(t, Config{})
	sam, _ := e.App(AppCompliant)
	ropc, _ := e.App(AppPassword)
	daemon, _ := e.App(AppOnly)
	azure, _ := e.App(AppFirstParty)
	samUser := e.Users()[0]
	signin := do(t, e, "POST", e.EntraURL()+"/_emulator/signin?mfa=true&expired=true&app="+AppCompliant+"&user="+sam.User, "").json(t)
	expired := signin["refresh_token"].(string)
	creds := func(pairs ...string) []string {
		return append([]string{"client_id", daemon.ID, "client_secret", daemon.Secret, "grant_type", "client_credentials", "resource", AudiencePartnerCenter}, pairs...)
	}
	password := func(user, pass string) []string {
		return []string{"client_id", ropc.ID, "client_secret", ropc.Secret, "grant_type", "password", "resource", AudiencePartnerCenter, "username", user, "password", pass}
	}
	refresh := func(app App, token string) []string {
		return []string{"client_id", app.ID, "client_secret", app.Secret, "grant_type", "refresh_token", "resource", AudiencePartnerCenter, "refresh_token", token}
	}
	tests := []struct {
		name   string
		tenant string
		form   []string
		status int
		error  string
		number int
	}{
		{"wrong secret", DefaultTenant, creds("client_secret", "wrong"), 401, "invalid_client", 7000215},
		{"no secret", DefaultTenant, creds("client_secret", ""), 401, "invalid_client", 7000218},
		{"bad assertion", DefaultTenant, creds("client_assertion", "a.b.c"), 401, "invalid_client", 700027},
		{"public client with a secret", DefaultTenant, creds("client_id", azure.ID), 401, "invalid_client", 700025},
		{"unknown app", DefaultTenant, creds("client_id", guid("nobody")), 400, "unauthorized_client", 700016},
		{"unknown resource", DefaultTenant, creds("resource", "https://nowhere.example"), 400, "invalid_resource", 500011},
		{"no resource", DefaultTenant, creds("resource", ""), 400, "invalid_request", 900144},
		{"no grant type", DefaultTenant, creds("grant_type", ""), 400, "invalid_request", 900144},
		{"unknown grant type", DefaultTenant, creds("grant_type", "magic"), 400, "unsupported_grant_type", 70003},
		{"app-only without a tenant", "common", creds(), 400, "invalid_request", 50059},
		{"unknown tenant", guid("nowhere"), creds(), 400, "invalid_tenant", 90002},
		{"wrong password", DefaultTenant, password(ropc.User, "wrong"), 400, "invalid_grant", 50126},
		{"unknown user", DefaultTenant, password("nobody@contoso-partner.example", "x"), 400, "invalid_grant", 50034},
		{"password where MFA is required", DefaultTenant, password(samUser.UPN, samUser.Password), 400, "invalid_grant", 50076},
		{"malformed refresh token", DefaultTenant, refresh(sam, "rubbish"), 400, "invalid_grant", 9002313},
		{"another client's refresh token", DefaultTenant, refresh(ropc, sam.RefreshToken), 400, "invalid_grant", 70000},
		{"expired refresh token", DefaultTenant, refresh(sam, expired), 400, "invalid_grant", 700082},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			res := form(t, e, e.EntraURL()+"/"+tt.tenant+"/oauth2/token", tt.form...)
			body := res.json(t)
			if res.status != tt.status || body["error"] != tt.error {
				t.Errorf("answer = %d %v, want %d %s", res.status, body["error"], tt.status, tt.error)
			}
			if diff := cmp.Diff([]any{float64(tt.number)}, body["error_codes"]); diff != "" {
				t.Errorf("error_codes (-want +got):\n%s", diff)
			}
			if prefix := fmt.Sprintf("AADSTS%d: ", tt.number); !strings.HasPrefix(body["error_description"].(string), prefix) {
				t.Errorf("error_description = %v, want prefix %s", body["error_description"], prefix)
			}
		})
	}
}

func TestRefreshTokensSlide(t *testing.T) {
	e := start(t, Config{})
	app, _ := e.App(AppCompliant)
	redeem := func(token string) map[string]any {
		res := form(t, e, e.EntraURL()+"/"+DefaultTenant+"/oauth2/token", "grant_type", "refresh_token",
			"client_id", app.ID, "client_secret", app.Secret, "refresh_token", token, "resource", AudiencePartnerCenter)
		if res.status != 200 {
			t.Fatalf("redeem: %d %s", res.status, res.body)
		}
		return res.json(t)
	}
	first := redeem(app.RefreshToken)["refresh_token"].(string)
	if first == app.RefreshToken {
		t.Error("the same refresh token came back, want a new one")
	}
	redeem(first)
	redeem(app.RefreshToken) // the old one lives on
}

func TestSignInDecidesMFA(t *testing.T) {
	e := start(t, Config{})
	app, _ := e.App(AppOldRefresh)
	for mfa, want := range map[string][]any{"true": {"rsa", "mfa"}, "false": {"pwd"}} {
		res := do(t, e, "POST", e.EntraURL()+"/_emulator/signin?mfa="+mfa+"&app="+app.ID+"&user="+app.User, "").json(t)
		token := form(t, e, e.EntraURL()+"/common/oauth2/token", "grant_type", "refresh_token", "client_id", app.ID,
			"client_secret", app.Secret, "refresh_token", res["refresh_token"].(string), "resource", AudiencePartnerCenter).json(t)
		_, claims := decode(t, token["access_token"].(string))
		if diff := cmp.Diff(any(want), claims["amr"]); diff != "" {
			t.Errorf("mfa=%s: amr (-want +got):\n%s", mfa, diff)
		}
	}
}

func TestMintEndpointKnowsEverySample(t *testing.T) {
	e := start(t, Config{})
	for _, app := range e.Apps() {
		res := do(t, e, "POST", e.EntraURL()+"/_emulator/mint?app="+app.Name, "")
		if res.status != 200 || res.body == "" {
			t.Errorf("%s: %d %s", app.Name, res.status, res.body)
		}
	}
	res, err := http.Post(e.EntraURL()+"/_emulator/mint?app=none", "", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if b, _ := io.ReadAll(res.Body); res.StatusCode != 404 {
		t.Errorf("unknown sample: %d %s, want 404", res.StatusCode, b)
	}
}
