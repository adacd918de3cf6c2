package emulator

import (
	"crypto/sha256"
	"encoding/base64"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// The vector is that of Microsoft's nonce rule, with an invented nonce.
func TestHashedNonceMatchesTheCheckVector(t *testing.T) {
	const (
		nonce = "AwABEgEAAAADAOz_BQD0_8Nx"
		want  = "imSVGEhXFwZwDSvilS17QsjEovOTKDKfphMvKXsUKL4"
	)
	before := `{"typ":"JWT","nonce":"` + nonce + `","alg":"RS256","kid":"k"}`
	after := `{"typ":"JWT","nonce":"` + want + `","alg":"RS256","kid":"k"}`
	if got := string(hashNonce([]byte(before))); got != after {
		t.Errorf("hashNonce = %s, want %s", got, after)
	}
}

func TestMintedTokenVerifiesWithPublishedKeys(t *testing.T) {
	e := start(t, Config{})
	e.Rotate()
	tests := []struct {
		name string
		spec TokenSpec
		v1   bool // verifies with the v1 key set
		v2   bool
	}{
		{"current key", TokenSpec{}, true, true},
		{"version 2.0", TokenSpec{Version: "2.0"}, true, true},
		{"previous key", TokenSpec{Key: KeyPrevious}, true, true},
		{"foreign key", TokenSpec{Key: KeyForeign}, false, false},
		{"another tenant's key", TokenSpec{Key: KeyOtherTenant}, false, true},
		{"bad signature", TokenSpec{BadSignature: true}, false, false},
		{"hashed nonce", TokenSpec{HashedNonce: true}, false, false},
		{"plain nonce", TokenSpec{Header: map[string]any{"nonce": "abc"}}, true, true},
		{"none", TokenSpec{Alg: "none"}, false, false},
		{"HS256", TokenSpec{Alg: "HS256"}, false, false},
		{"PS256", TokenSpec{Alg: "PS256"}, false, false},
		{"ES256", TokenSpec{Alg: "ES256"}, false, false},
	}
	v1 := published(t, e, "/common/discovery/keys")
	v2 := published(t, e, "/"+DefaultTenant+"/discovery/v2.0/keys")
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			token := e.Mint(tt.spec)
			header, _ := decode(t, token)
			kid, _ := header["kid"].(string)
			if got := verifies(v1[kid], token); got != tt.v1 {
				t.Errorf("verifies with v1 keys = %v, want %v", got, tt.v1)
			}
			if got := verifies(v2[kid], token); got != tt.v2 {
				t.Errorf("verifies with v2 keys = %v, want %v", got, tt.v2)
			}
		})
	}
}

func TestHashedNonceSignsTheHashedHeader(t *testing.T) {
	e := start(t, Config{})
	token := e.Mint(TokenSpec{HashedNonce: true})
	parts := strings.Split(token, ".")
	raw, _ := base64.RawURLEncoding.DecodeString(parts[0])
	header, _ := decode(t, token)
	nonce := header["nonce"].(string)
	sum := sha256.Sum256([]byte(nonce))
	hashed := strings.Replace(string(raw), nonce, base64.RawURLEncoding.EncodeToString(sum[:]), 1)
	parts[0] = base64.RawURLEncoding.EncodeToString([]byte(hashed))
	if !verifies(published(t, e, "/common/discovery/keys")[header["kid"].(string)], strings.Join(parts, ".")) {
		t.Error("the token does not verify over the header with the hashed nonce")
	}
	if res := do(t, e, "GET", e.PartnerURL()+"/v1/customers", "", bearer(token)); res.status != 200 {
		t.Errorf("Partner Center answered %d %s", res.status, res.body)
	}
}

func TestClaimsAreThoseOfRealTokens(t *testing.T) {
	e := start(t, Config{})
	at := time.Unix(1780996100, 0)
	volatile := []string{"aio", "rh", "uti"}
	tests := []struct {
		name string
		spec TokenSpec
		want map[string]any
	}{
		{"app+user v1", TokenSpec{IssuedAt: at}, map[string]any{
			"aud": AudiencePartnerCenter, "iss": "https://sts.windows.net/" + DefaultTenant + "/",
			"iat": 1780996100., "nbf": 1780996100., "exp": 1781000000., "acr": "1", "amr": []any{"pwd", "mfa"},
			"appid": "7d1f0a52-9b3c-4c1e-8f60-2a5b9c0d1e11", "appidacr": "1", "family_name": "Agent", "given_name": "Sam",
			"ipaddr": "203.0.113.24", "name": "Sam Agent", "oid": "5f0e6c7a-2222-4d3b-9a55-0c1d2e3f4a5b", "puid": "10032001A2B3C4D5",
			"scp": "user_impersonation", "sub": "x", "tenant_region_scope": "EU", "tid": DefaultTenant,
			"unique_name": "sam@contoso-partner.example", "upn": "sam@contoso-partner.example", "ver": "1.0",
		}},
		{"app-only v1", TokenSpec{IssuedAt: at, AppOnly: true, ObjectID: "9a8b7c6d-3333-4f5e-8d7c-6b5a4f3e2d1c"}, map[string]any{
			"aud": AudiencePartnerCenter, "iss": "https://sts.windows.net/" + DefaultTenant + "/",
			"iat": 1780996100., "nbf": 1780996100., "exp": 1781000000.,
			"appid": "7d1f0a52-9b3c-4c1e-8f60-2a5b9c0d1e11", "appidacr": "1",
			"idp": "https://sts.windows.net/" + DefaultTenant + "/", "idtyp": "app",
			"oid": "9a8b7c6d-3333-4f5e-8d7c-6b5a4f3e2d1c", "sub": "x",
			"tenant_region_scope": "EU", "tid": DefaultTenant, "ver": "1.0",
		}},
		{"app+user v2", TokenSpec{IssuedAt: at, Version: "2.0"}, map[string]any{
			"aud": AudiencePartnerCenterGUID, "iss": "https://login.microsoftonline.com/" + DefaultTenant + "/v2.0",
			"iat": 1780996100., "nbf": 1780996100., "exp": 1781000000.,
			"azp": "7d1f0a52-9b3c-4c1e-8f60-2a5b9c0d1e11", "azpacr": "1", "name": "Sam Agent",
			"oid": "5f0e6c7a-2222-4d3b-9a55-0c1d2e3f4a5b", "preferred_username": "sam@contoso-partner.example",
			"scp": "user_impersonation", "sub": "x", "tenant_region_scope": "EU", "tid": DefaultTenant, "ver": "2.0",
		}},
		{"everything overridden", TokenSpec{IssuedAt: at, AppOnly: true, AMR: "mfa", NoAMR: true,
			Omit:  []string{"aud", "iss", "iat", "nbf", "exp", "appid", "appidacr", "idp", "idtyp", "oid", "tenant_region_scope", "tid"},
			Extra: map[string]any{"amr": nil, "ver": 1, "wids": []string{"x"}}}, map[string]any{
			"amr": nil, "ver": 1., "wids": []any{"x"}, "sub": "x",
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, got := decode(t, e.Mint(tt.spec))
			if uti, _ := got["uti"].(string); len(uti) != 22 {
				t.Errorf("uti = %q, want 22 characters", uti)
			}
			for _, name := range volatile {
				delete(got, name)
			}
			got["sub"] = "x"
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("claims (-want +got):\n%s", diff)
			}
		})
	}
}

func TestRawHeaderAndPayloadAreSignedVerbatim(t *testing.T) {
	e := start(t, Config{})
	kid, _ := decode(t, e.Mint(TokenSpec{}))
	header := []byte(`{ "alg":"RS256", "kid":"` + kid["kid"].(string) + `" }`)
	payload := []byte(`{"amr":["pwd"],"amr":["mfa"]}`)
	token := e.Mint(TokenSpec{RawHeader: header, RawPayload: payload})
	want := base64.RawURLEncoding.EncodeToString(header) + "." + base64.RawURLEncoding.EncodeToString(payload) + "."
	if !strings.HasPrefix(token, want) {
		t.Errorf("token = %s, want the given bytes", token)
	}
	if !verifies(published(t, e, "/common/discovery/keys")[kid["kid"].(string)], token) {
		t.Error("the token does not verify")
	}
}

func TestPartnerCenterReadsItsOwnTokens(t *testing.T) {
	e := start(t, Config{Exposure: 1})
	tests := []struct {
		name string
		spec TokenSpec
		want int
	}{
		{"opaque with MFA", TokenSpec{Opaque: true}, 200},
		{"opaque without MFA", TokenSpec{Opaque: true, AMR: []string{"pwd"}}, 401},
		{"encrypted", TokenSpec{Encrypted: true}, 200},
		{"opaque but expired", TokenSpec{Opaque: true, IssuedAt: time.Now().Add(-4 * time.Hour)}, 401},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			token := e.Mint(tt.spec)
			if got, want := strings.Count(token, "."), map[bool]int{true: 4}[tt.spec.Encrypted]; got != want {
				t.Errorf("token has %d dots, want %d", got, want)
			}
			if res := do(t, e, "GET", e.PartnerURL()+"/v1/customers", "", bearer(token)); res.status != tt.want {
				t.Errorf("status = %d %s, want %d", res.status, res.body, tt.want)
			}
		})
	}
}
