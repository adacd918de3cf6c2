package entra

import (
	"context"
	"crypto/sha256"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/partnerguard/partnerguard/policy"
)

func TestVerifiedToken(t *testing.T) {
	v := withKeyA(t)
	guest := userClaims().without("upn", "name").with("unique_name", `"kim@fabrikam.example"`).with("appidacr", `"2"`).
		with("idp", `"https://sts.windows.net/`+other+`/"`).with("amr", `["fed","mfa"]`)
	v2User := userClaims().without("appid", "appidacr", "upn", "unique_name", "amr").with("azp", `"`+strings.ToUpper(appID)+`"`).
		with("azpacr", `"2"`).with("iss", `"`+issV2+`"`).with("ver", `"2.0"`).with("preferred_username", `"sam@contoso-partner.example"`)
	base := policy.Token{
		Verified: true, Kind: policy.KindAppUser, MFA: policy.MFAPresent, Version: "1.0", TenantID: tid, AppID: appID, ObjectID: userID,
		UPN: "sam@contoso-partner.example", Issuer: issV1, Audience: aud, AppAuth: "1", UTI: "EJwqP017IU6myA1eH3CLAA",
		AMR: []string{"pwd", "mfa"}, IssuedAt: issued, NotBefore: issued, ExpiresAt: expires,
	}
	tests := []struct {
		name   string
		claims object
		want   func(*policy.Token)
	}{
		{"user with MFA", userClaims(), func(*policy.Token) {}},
		{"user without MFA", userClaims().with("amr", `["pwd"]`), func(p *policy.Token) { p.MFA, p.AMR = policy.MFAAbsent, []string{"pwd"} }},
		{"ngcmfa proves MFA", userClaims().with("amr", `["ngcmfa"]`), func(p *policy.Token) { p.AMR = []string{"ngcmfa"} }},
		{"wiaormfa proves none by default", userClaims().with("amr", `["wiaormfa"]`), func(p *policy.Token) { p.MFA, p.AMR = policy.MFAAbsent, []string{"wiaormfa"} }},
		{"MFA is compared exactly", userClaims().with("amr", `["MFA"]`), func(p *policy.Token) { p.MFA, p.AMR = policy.MFAAbsent, []string{"MFA"} }},
		{"amr missing", userClaims().without("amr"), func(p *policy.Token) { p.MFA, p.AMR = policy.MFAAbsent, nil }},
		{"amr null", userClaims().with("amr", `null`), func(p *policy.Token) { p.MFA, p.AMR = policy.MFAAbsent, nil }},
		{"amr empty", userClaims().with("amr", `[ ]`), func(p *policy.Token) { p.MFA, p.AMR = policy.MFAAbsent, nil }},
		{"amr a string", userClaims().with("amr", `"mfa"`), func(p *policy.Token) { p.MFA, p.AMR = policy.MFAUnknown, nil }},
		{"amr an object", userClaims().with("amr", `{"mfa":true}`), func(p *policy.Token) { p.MFA, p.AMR = policy.MFAUnknown, nil }},
		{"amr nested", userClaims().with("amr", `[["mfa"]]`), func(p *policy.Token) { p.MFA, p.AMR = policy.MFAUnknown, nil }},
		{"amr with a number", userClaims().with("amr", `["mfa",1]`), func(p *policy.Token) { p.MFA, p.AMR = policy.MFAUnknown, []string{"mfa"} }},
		{"amr escaped", userClaims().with("amr", `["\u006dfa"]`), func(p *policy.Token) { p.AMR = []string{"mfa"} }},
		{"a lone AMR is no amr", userClaims().without("amr").with("AMR", `["mfa"]`), func(p *policy.Token) { p.MFA, p.AMR = policy.MFAAbsent, nil }},
		{"mfa beyond what is kept counts", userClaims().with("amr", `["`+strings.Repeat(`x","`, 20)+`mfa"]`),
			func(p *policy.Token) { p.AMR = strings.Split(strings.Repeat("x", 16), "") }},
		{"app-only", appClaims(), func(p *policy.Token) {
			p.Kind, p.MFA, p.UPN, p.AMR, p.ObjectID = policy.KindAppOnly, policy.MFANotApplicable, "", nil, "9a8b7c6d-3333-4f5e-8d7c-6b5a4f3e2d1c"
		}},
		{"app-only by idtyp", userClaims().with("idtyp", `"app"`), func(p *policy.Token) {
			p.Kind, p.MFA, p.UPN = policy.KindAppOnly, policy.MFANotApplicable, ""
		}},
		{"oid is sub but there is a name", appClaims().with("name", `"Sam"`), func(p *policy.Token) {
			p.Kind, p.MFA, p.UPN, p.AMR, p.ObjectID = policy.KindUndecided, policy.MFAAbsent, "", nil, "9a8b7c6d-3333-4f5e-8d7c-6b5a4f3e2d1c"
		}},
		{"neither oid nor sub", appClaims().without("oid", "sub"), func(p *policy.Token) {
			p.Kind, p.MFA, p.UPN, p.AMR, p.ObjectID = policy.KindUndecided, policy.MFAAbsent, "", nil, ""
		}},
		{"guest", guest, func(p *policy.Token) {
			p.UPN, p.AppAuth, p.AMR, p.IdP = "kim@fabrikam.example", "2", []string{"fed", "mfa"}, "https://sts.windows.net/"+other+"/"
		}},
		{"v2 without amr", v2User, func(p *policy.Token) {
			p.Version, p.Issuer, p.AppAuth, p.AMR, p.MFA = "2.0", issV2, "2", nil, policy.MFAUnknown
		}},
		{"no ver", userClaims().without("ver"), func(*policy.Token) {}},
		{"audience with a slash", userClaims().with("aud", `"https:\/\/api.partnercenter.microsoft.com\/"`), func(p *policy.Token) { p.Audience = aud + "/" }},
		{"audience in an array", userClaims().with("aud", `["x","`+aud+`"]`), func(*policy.Token) {}},
		{"exp with an exponent", userClaims().with("exp", `1.781e9`), func(p *policy.Token) { p.ExpiresAt = 1781000000 }},
		{"exp with a zero fraction", userClaims().with("exp", `1781000000.0`), func(p *policy.Token) { p.ExpiresAt = 1781000000 }},
		{"no nbf, no iat", userClaims().without("nbf", "iat"), func(p *policy.Token) { p.NotBefore, p.IssuedAt = 0, 0 }},
		{"expired within the leeway", userClaims().with("exp", fmt.Sprint(noon.Unix()-299)), func(p *policy.Token) { p.ExpiresAt = noon.Unix() - 299 }},
		{"nbf within the leeway", userClaims().with("nbf", fmt.Sprint(noon.Unix()+300)), func(p *policy.Token) { p.NotBefore = noon.Unix() + 300 }},
		{"long text is cut", userClaims().with("upn", `"`+strings.Repeat("é", 200)+`"`), func(p *policy.Token) { p.UPN = strings.Repeat("é", 128) }},
		{"odd object id", userClaims().with("oid", `"ODD"`), func(p *policy.Token) { p.ObjectID = "odd" }},
		{"duplicates in nested objects", userClaims().with("xms", `{"a":1,"a":2,"b":[{},[],{"c":[true,false,null,-1.5e+3]}]}`), func(*policy.Token) {}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			want := base
			tt.want(&want)
			raw := user(tt.claims)
			for _, from := range []string{"verified", "cached"} {
				got, reason := verify(t, v, raw)
				if diff := cmp.Diff(want, got); reason != "" || diff != "" {
					t.Errorf("%s: reason %q, -want +got:\n%s", from, reason, diff)
				}
				hash := sha256.Sum256([]byte(raw))
				if v.cache.get(&hash) == nil {
					t.Fatal("not cached")
				}
			}
		})
	}
}

func TestTenantMustBeTheOneOfTheIssuer(t *testing.T) {
	keys := serveKeys(t, published("A", &keyA().PublicKey))
	for name, tenants := range map[string][]string{"two accepted": {tid, other}, "any accepted": nil} {
		v := newVerifier(t, Config{Authority: keys.URL, Tenants: tenants})
		mustRefresh(t, v)
		if _, got := verify(t, v, user(userClaims().with("tid", `"`+other+`"`))); got != policy.ReasonTokenWrongTenant {
			t.Errorf("%s: %q, want wrong tenant", name, got)
		}
		expect(t, v, user(userClaims()), "")
	}
}

func TestClaimedOfRefusedToken(t *testing.T) {
	v := withKeyA(t)
	_, err := v.Verify(context.Background(), sign(keyB(), headerA, userClaims().String()), audiences)
	te := err.(*policy.TokenError)
	want := policy.Token{
		Kind: policy.KindAppUser, Version: "1.0", TenantID: tid, AppID: appID, ObjectID: userID, UPN: "sam@contoso-partner.example",
		Issuer: issV1, Audience: aud, AppAuth: "1", UTI: "EJwqP017IU6myA1eH3CLAA", AMR: []string{"pwd", "mfa"},
		IssuedAt: issued, NotBefore: issued, ExpiresAt: expires,
	}
	if diff := cmp.Diff(want, te.Claimed); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	_, err = v.Verify(context.Background(), "opaque", audiences)
	if te := err.(*policy.TokenError); te.Claimed.Kind != policy.KindOpaque {
		t.Errorf("kind of an opaque token = %v", te.Claimed.Kind)
	}
}

// The nonce and its hash were computed apart from this code.
func TestHashedNonce(t *testing.T) {
	const (
		nonce  = "AwABEgEAAAADAOz_BQD0_8Nx"
		hashed = "imSVGEhXFwZwDSvilS17QsjEovOTKDKfphMvKXsUKL4"
	)
	payload := b64([]byte(userClaims().String()))
	header := func(nonce string) string {
		return b64([]byte(`{"typ":"JWT", "nonce" : "`+nonce+`","alg":"RS256","x5t":"A","kid":"A"}`)) + "." + payload
	}
	v := withKeyA(t)
	expect(t, v, signAs(keyA(), header(hashed), header(nonce)), "")
	expect(t, v, signAs(keyA(), header(nonce), header(nonce)), "")
	expect(t, v, signAs(keyA(), header("x"), header(nonce)), policy.ReasonTokenGraphNonce)
	expect(t, v, signAs(keyB(), header(hashed), header(nonce)), policy.ReasonTokenGraphNonce)
	// An escape in the nonce is decoded before it is hashed.
	expect(t, v, signAs(keyA(), header(hashed), header(`\u0041`+nonce[1:])), "")
}

func TestCloudIssuers(t *testing.T) {
	for cloud, issuers := range map[Cloud][2]string{
		Global: {issV1, issV2},
		USGov:  {issV1, "https://login.microsoftonline.us/" + tid + "/v2.0"},
		China:  {"https://sts.chinacloudapi.cn/" + tid + "/", "https://login.partner.microsoftonline.cn/" + tid + "/v2.0"},
	} {
		for i, iss := range issuers {
			if v, tenant := clouds[cloud].parseIssuer(iss); v != version(i+1) || tenant != tid {
				t.Errorf("%v: parseIssuer(%q) = %v, %q", cloud, iss, v, tenant)
			}
		}
		if c, err := ParseCloud(cloud.String()); c != cloud || err != nil {
			t.Errorf("ParseCloud(%q) = %v, %v", cloud, c, err)
		}
	}
	if _, err := ParseCloud("mars"); err == nil {
		t.Error("ParseCloud(mars): no error")
	}
}

func TestConfigErrors(t *testing.T) {
	for name, cfg := range map[string]Config{
		"clear text authority":       {Authority: "http://login.example"},
		"authority without a scheme": {Authority: "login.microsoftonline.com"},
		"authority with a user":      {Authority: "https://user@login.example"},
		"authority with a query":     {Authority: "https://login.example/?a=b"},
		"tenant by domain":           {Tenants: []string{"contoso.example"}},
		"refresh beyond a day":       {Refresh: 25 * time.Hour},
		"amr value that proves none": {MFAValues: []string{"pwd"}},
		"unknown cloud":              {Cloud: 9},
		"negative max stale":         {MaxStale: -1},
	} {
		if _, err := New(cfg); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	for _, authority := range []string{"http://127.0.0.1:8443", "http://[::1]:1", "http://localhost:1/", "https://login.example/base"} {
		if _, err := New(Config{Authority: authority}); err != nil {
			t.Error(err)
		}
	}
}

func TestExplainNeverShowsTheSignature(t *testing.T) {
	v := withKeyA(t)
	raw := user(userClaims().with("amr", `["pwd"]`).with("exp", "1"))
	e := v.Explain(context.Background(), raw, audiences)
	text := fmt.Sprintf("%+v %v", e, e.Err)
	for _, part := range strings.Split(raw, ".") {
		if strings.Contains(text, part) {
			t.Error("the explanation holds a part of the token")
		}
	}
	if len(e.Claims) != len(userClaims()) || e.Claims[0] != (Claim{Name: "aud", Value: `"` + aud + `"`}) {
		t.Errorf("claims = %+v", e.Claims)
	}
	if e.Header != (Header{Alg: "RS256", Kid: "A", Typ: "JWT"}) || e.MFA != policy.MFAAbsent {
		t.Errorf("header = %+v, MFA = %v", e.Header, e.MFA)
	}
	var failed, names []string
	for _, c := range e.Checks {
		names = append(names, c.Name)
		if c.State != OK {
			failed = append(failed, c.Name)
		}
	}
	if diff := cmp.Diff([]string{"expiry"}, failed); diff != "" {
		t.Errorf("not ok: %s", diff)
	}
	if names[0] != "length" || names[len(names)-1] != "signature" {
		t.Errorf("checks = %v", names)
	}
	pii := 0
	for _, c := range e.Claims {
		if c.PII {
			pii++
		}
	}
	if pii != 9 {
		t.Errorf("%d claims are marked personal, want 9", pii)
	}
	if e := v.Explain(context.Background(), user(userClaims()), audiences); e.Err != nil || !e.Token.Verified {
		t.Errorf("valid token: %+v", e.Err)
	}
}
