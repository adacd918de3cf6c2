package entra

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"crypto"

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

func TestRefusedTokens(t *testing.T) {
	v := withKeyA(t)
	header := func(members string) string { return sign(keyA(), "{"+members+"}", userClaims().String()) }
	good := user(userClaims())
	parts := strings.Split(good, ".")
	at := func(offset int64) string { return fmt.Sprint(noon.Unix() + offset) }
	payload := func(text string) string { return sign(keyA(), headerA, text) }
	deep := strings.Repeat("[", 64) + strings.Repeat("]", 64)

	tests := []struct {
		name string
		raw  string
		want policy.Reason
	}{
		{"empty", "", policy.ReasonTokenMissing},
		{"longer than 16 KiB", strings.Repeat("a", 16<<10+1), policy.ReasonTokenTooLong},
		{"random text", "aGVsbG8", policy.ReasonTokenOpaque},
		{"only dots", "..", policy.ReasonTokenOpaque},
		{"many dots", strings.Repeat(".", 16<<10), policy.ReasonTokenOpaque},
		{"three parts of no JSON", "aGVs.bG8.aGVs", policy.ReasonTokenOpaque},
		{"three parts not base64url", "a+b.c/d.e=f", policy.ReasonTokenOpaque},
		{"two parts", parts[0] + "." + parts[1], policy.ReasonTokenOpaque},
		{"four parts", good + ".x", policy.ReasonTokenOpaque},
		{"five parts with a JSON header", b64([]byte(`{"alg":"RSA-OAEP","enc":"A256GCM"}`)) + ".a.b.c.d", policy.ReasonTokenEncrypted},
		{"five parts without", "aGVs.a.b.c.d", policy.ReasonTokenOpaque},
		{"header an array", sign(keyA(), `["RS256"]`, userClaims().String()), policy.ReasonTokenOpaque},

		{"header broken", sign(keyA(), `{"alg":"RS256"`, userClaims().String()), policy.ReasonTokenMalformed},
		{"header padded", parts[0] + "=." + parts[1] + "." + parts[2], policy.ReasonTokenMalformed},
		{"header with a line break", parts[0][:8] + "\n" + parts[0][8:] + "." + parts[1] + "." + parts[2], policy.ReasonTokenMalformed},
		{"payload padded", parts[0] + "." + parts[1] + "=." + parts[2], policy.ReasonTokenMalformed},
		{"payload empty", parts[0] + ".." + parts[2], policy.ReasonTokenMalformed},
		{"payload no JSON", payload("foo"), policy.ReasonTokenMalformed},
		{"payload an array", payload("[1]"), policy.ReasonTokenMalformed},
		{"payload null", payload("null"), policy.ReasonTokenMalformed},
		{"payload with a byte order mark", payload("\ufeff" + userClaims().String()), policy.ReasonTokenMalformed},
		{"text after the payload", payload(userClaims().String() + "{}"), policy.ReasonTokenMalformed},
		{"comma before the end", payload(strings.Replace(userClaims().String(), "}", ",}", 1)), policy.ReasonTokenMalformed},
		{"invalid UTF-8", payload(userClaims().with("name", "\"\xff\"").String()), policy.ReasonTokenMalformed},
		{"lone surrogate", user(userClaims().with("name", `"\ud800"`)), policy.ReasonTokenMalformed},
		{"raw control character", payload(userClaims().with("name", "\"a\nb\"").String()), policy.ReasonTokenMalformed},
		{"nested too deeply", user(userClaims().with("x", deep)), policy.ReasonTokenMalformed},
		{"too many members", payload(many(300)), policy.ReasonTokenMalformed},
		{"number with a leading zero", user(userClaims().with("x", "01")), policy.ReasonTokenMalformed},
		{"NaN", user(userClaims().with("exp", "NaN")), policy.ReasonTokenMalformed},
		{"signature padded", good + "=", policy.ReasonTokenMalformed},
		{"signature with stray bits", good[:len(good)-1] + string(good[len(good)-1]+1), policy.ReasonTokenMalformed},
		{"oid a number", user(userClaims().with("oid", "7")), policy.ReasonTokenMalformed},
		{"scp an array", user(userClaims().with("scp", `["a"]`)), policy.ReasonTokenMalformed},

		{"crit", header(`"alg":"RS256","kid":"A","crit":["exp"]`), policy.ReasonTokenCriticalHeader},
		{"b64", header(`"alg":"RS256","kid":"A","b64":false`), policy.ReasonTokenCriticalHeader},

		{"claim twice", user(userClaims().also("amr", `["mfa"]`)), policy.ReasonTokenDuplicateClaim},
		{"claims told apart by case", user(userClaims().also("AMR", `["mfa"]`)), policy.ReasonTokenDuplicateClaim},
		{"claim twice, once escaped", payload(strings.Replace(userClaims().String(), "{", `{"\u0061mr":["mfa"],`, 1)), policy.ReasonTokenDuplicateClaim},
		{"claim twice by a letter that folds to ASCII", user(userClaims().also("\u017fcp", `"x"`)), policy.ReasonTokenDuplicateClaim},
		{"claim twice, first null", payload(strings.Replace(userClaims().String(), "{", `{"amr":null,`, 1)), policy.ReasonTokenDuplicateClaim},
		{"header member twice", header(`"alg":"RS256","kid":"A","kid":"B"`), policy.ReasonTokenDuplicateClaim},
		{"header members told apart by case", header(`"alg":"RS256","kid":"A","Alg":"none"`), policy.ReasonTokenDuplicateClaim},

		{"alg none, unsigned", b64([]byte(`{"alg":"none","kid":"A"}`)) + "." + parts[1] + ".", policy.ReasonTokenUnsupportedAlgorithm},
		{"alg in lower case", header(`"alg":"rs256","kid":"A"`), policy.ReasonTokenUnsupportedAlgorithm},
		{"alg missing", header(`"kid":"A"`), policy.ReasonTokenUnsupportedAlgorithm},
		{"alg an array", header(`"alg":["RS256"],"kid":"A"`), policy.ReasonTokenUnsupportedAlgorithm},
		{"HS256 with the public key as secret", hs256(t), policy.ReasonTokenUnsupportedAlgorithm},
		{"PS256", ps256(t), policy.ReasonTokenUnsupportedAlgorithm},
		{"PS256 that says RS256", strings.Replace(ps256(t), b64([]byte(`{"alg":"PS256","kid":"A"}`)), b64([]byte(`{"alg":"RS256","kid":"A"}`)), 1), policy.ReasonTokenBadSignature},
		{"ES256", es256(t), policy.ReasonTokenUnsupportedAlgorithm},

		{"kid missing", header(`"alg":"RS256","x5t":"A"`), policy.ReasonTokenMissingKid},
		{"kid empty", header(`"alg":"RS256","kid":""`), policy.ReasonTokenMissingKid},
		{"kid a number", header(`"alg":"RS256","kid":1`), policy.ReasonTokenMissingKid},
		{"kid null", header(`"alg":"RS256","kid":null`), policy.ReasonTokenMissingKid},
		{"kid in other case of name", header(`"alg":"RS256","KID":"A"`), policy.ReasonTokenMissingKid},

		{"iss missing", user(userClaims().without("iss")), policy.ReasonTokenWrongIssuer},
		{"iss a number", user(userClaims().with("iss", "1")), policy.ReasonTokenWrongIssuer},
		{"iss without the slash", user(userClaims().with("iss", `"https://sts.windows.net/`+tid+`"`)), policy.ReasonTokenWrongIssuer},
		{"iss of another cloud", user(userClaims().with("iss", `"https://sts.chinacloudapi.cn/`+tid+`/"`)), policy.ReasonTokenWrongIssuer},
		{"iss with something before", user(userClaims().with("iss", `"https://evil.example/`+issV1+`"`)), policy.ReasonTokenWrongIssuer},
		{"iss of no GUID", user(userClaims().with("iss", `"https://sts.windows.net/common/"`)), policy.ReasonTokenWrongIssuer},
		{"iss v2, ver 1.0", user(userClaims().with("iss", `"`+issV2+`"`)), policy.ReasonTokenWrongIssuer},

		{"tid missing", user(userClaims().without("tid")), policy.ReasonTokenWrongTenant},
		{"tid no GUID", user(userClaims().with("tid", `"contoso.example"`)), policy.ReasonTokenWrongTenant},
		{"tid not the one in iss", user(userClaims().with("tid", `"`+other+`"`)), policy.ReasonTokenWrongTenant},
		{"tenant not accepted", user(userClaims().with("tid", `"`+other+`"`).with("iss", `"https://sts.windows.net/`+other+`/"`)), policy.ReasonTokenWrongTenant},

		{"aud missing", user(userClaims().without("aud")), policy.ReasonTokenWrongAudience},
		{"aud of another API", user(userClaims().with("aud", `"https://graph.windows.net"`)), policy.ReasonTokenWrongAudience},
		{"aud in other case", user(userClaims().with("aud", `"`+strings.ToUpper(aud)+`"`)), policy.ReasonTokenWrongAudience},
		{"aud an array of others", user(userClaims().with("aud", `["x","y"]`)), policy.ReasonTokenWrongAudience},
		{"aud empty", user(userClaims().with("aud", `""`)), policy.ReasonTokenWrongAudience},
		{"aud an array with a number", user(userClaims().with("aud", `["`+aud+`",1]`)), policy.ReasonTokenMalformed},
		{"aud a number", user(userClaims().with("aud", `1`)), policy.ReasonTokenMalformed},

		{"exp missing", user(userClaims().without("exp")), policy.ReasonTokenMalformed},
		{"exp a string", user(userClaims().with("exp", `"1781000000"`)), policy.ReasonTokenMalformed},
		{"exp negative", user(userClaims().with("exp", `-1`)), policy.ReasonTokenMalformed},
		{"exp infinite", user(userClaims().with("exp", `1e999`)), policy.ReasonTokenMalformed},
		{"exp huge", user(userClaims().with("exp", `99999999999999999999`)), policy.ReasonTokenMalformed},
		{"exp with a fraction", user(userClaims().with("exp", `1781000000.5`)), policy.ReasonTokenMalformed},
		{"exp at the leeway", user(userClaims().with("exp", at(-300))), policy.ReasonTokenExpired},
		{"exp zero", user(userClaims().with("exp", `0`)), policy.ReasonTokenExpired},
		{"nbf a string", user(userClaims().with("nbf", `"1"`)), policy.ReasonTokenMalformed},
		{"nbf beyond the leeway", user(userClaims().with("nbf", at(301))), policy.ReasonTokenNotYetValid},
		{"iat a string", user(userClaims().with("iat", `"1"`)), policy.ReasonTokenMalformed},
		{"iat in the future", user(userClaims().with("iat", at(301))), policy.ReasonTokenNotYetValid},

		{"unknown kid", header(`"alg":"RS256","kid":"Z"`), policy.ReasonTokenUnknownKey},
		{"kid of 8 KiB", header(`"alg":"RS256","kid":"` + strings.Repeat("A", 8<<10) + `"`), policy.ReasonTokenUnknownKey},
		{"kid with NUL", header(`"alg":"RS256","kid":"A\u0000"`), policy.ReasonTokenUnknownKey},
		{"kid with CRLF", header(`"alg":"RS256","kid":"A\r\nHost: evil.example"`), policy.ReasonTokenUnknownKey},
		{"kid with a path", header(`"alg":"RS256","kid":"../../etc/passwd"`), policy.ReasonTokenUnknownKey},

		{"signed by another key", sign(keyB(), headerA, userClaims().String()), policy.ReasonTokenBadSignature},
		{"no signature", parts[0] + "." + parts[1] + ".", policy.ReasonTokenBadSignature},
		{"payload exchanged", parts[0] + "." + b64([]byte(userClaims().with("amr", `["mfa"]`).String())) + "." + parts[2], policy.ReasonTokenBadSignature},
		{"jwk in the header", sign(keyB(), `{"alg":"RS256","kid":"A","jwk":`+jsonOf(published("A", &keyB().PublicKey))+`}`, userClaims().String()), policy.ReasonTokenBadSignature},
		{"nonce in the header, signed by another key", sign(keyB(), `{"alg":"RS256","kid":"A","nonce":"n"}`, userClaims().String()), policy.ReasonTokenGraphNonce},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			for range 2 { // the second time, what is remembered answers the same
				expect(t, v, tt.raw, tt.want)
			}
			e := v.Explain(context.Background(), tt.raw, audiences)
			if e.Err == nil || e.Err.Reason != tt.want {
				t.Errorf("Explain = %v, want %q", e.Err, tt.want)
			}
			for _, c := range e.Checks {
				if c.State == Failed {
					if !strings.HasPrefix(c.Detail, string(tt.want)) && tt.want != policy.ReasonTokenEncrypted {
						t.Errorf("first failed check is %+v, want %q", c, tt.want)
					}
					return
				}
			}
			t.Error("Explain: no check failed")
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

func many(n int) string {
	o := userClaims()
	for i := range n {
		o = append(o, [2]string{fmt.Sprint("m", i), "1"})
	}
	return o.String()
}

func jsonOf(v any) string {
	text, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return string(text)
}

func hs256(t *testing.T) string {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(&keyA().PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	signed := b64([]byte(`{"alg":"HS256","kid":"A"}`)) + "." + b64([]byte(userClaims().String()))
	mac := hmac.New(sha256.New, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
	mac.Write([]byte(signed))
	return signed + "." + b64(mac.Sum(nil))
}

func ps256(t *testing.T) string {
	t.Helper()
	signed := b64([]byte(`{"alg":"PS256","kid":"A"}`)) + "." + b64([]byte(userClaims().String()))
	sum := sha256.Sum256([]byte(signed))
	sig, err := rsa.SignPSS(rand.Reader, keyA(), crypto.SHA256, sum[:], nil)
	if err != nil {
		t.Fatal(err)
	}
	return signed + "." + b64(sig)
}

func es256(t *testing.T) string {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signed := b64([]byte(`{"alg":"ES256","kid":"A"}`)) + "." + b64([]byte(userClaims().String()))
	sum := sha256.Sum256([]byte(signed))
	sig, err := ecdsa.SignASN1(rand.Reader, k, sum[:])
	if err != nil {
		t.Fatal(err)
	}
	return signed + "." + b64(sig)
}

func TestHeaderMembersCauseNoRequest(t *testing.T) {
	trap := serveKeys(t, published("A", &keyB().PublicKey))
	keys := serveKeys(t, published("A", &keyA().PublicKey))
	v := newVerifier(t, Config{Authority: keys.URL, Tenants: []string{tid}})
	mustRefresh(t, v)
	before := keys.total()
	cert := base64.StdEncoding.EncodeToString([]byte("certificate"))
	for _, member := range []string{
		`"jku":"` + trap.URL + `"`, `"x5u":"` + trap.URL + `"`, `"x5c":["` + cert + `"]`, `"jwk":` + jsonOf(published("A", &keyB().PublicKey)),
	} {
		header := `{"alg":"RS256","kid":"A",` + member + `}`
		expect(t, v, sign(keyB(), header, userClaims().String()), policy.ReasonTokenBadSignature)
		expect(t, v, sign(keyA(), header, userClaims().String()), "")
	}
	if trap.total() != 0 || keys.total() != before {
		t.Errorf("%d requests to the named address, %d further to the authority; want none", trap.total(), keys.total()-before)
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

func TestWycheproof(t *testing.T) {
	wd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	root := wd
	for {
		if _, err := os.Stat(filepath.Join(root, "go.mod")); err == nil {
			break
		}
		if root == filepath.Dir(root) {
			t.Fatal("no go.mod above the test")
		}
		root = filepath.Dir(root)
	}
	text, err := os.ReadFile(filepath.Join(root, "..", "shared", "vectors", "wycheproof-json_web_signature_test.json"))
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip("no vectors beside the module: ", err)
	}
	var doc struct {
		TestGroups []struct {
			Comment         string
			Public, Private jwk
			Tests           []struct {
				TcID                 int
				Comment, JWS, Result string
			}
		}
	}
	if err := json.Unmarshal(text, &doc); err != nil {
		t.Fatal(err)
	}
	whole := withKeyA(t)
	verified, refused := 0, 0
	for _, g := range doc.TestGroups {
		published := g.Public
		if published == nil {
			published = g.Private
		}
		set, _ := parseKeySet([]byte(keySetJSON(published)), noon, 1)
		for _, tc := range g.Tests {
			if _, reason := verify(t, whole, tc.JWS); reason == "" {
				t.Errorf("%s %d %s: verified as a token", g.Comment, tc.TcID, tc.Comment)
			}
			got := verifyOnly(set, tc.JWS)
			if got {
				verified++
			} else {
				refused++
			}
			header, _, _ := strings.Cut(tc.JWS, ".")
			text, _ := base64.RawURLEncoding.DecodeString(header)
			want := tc.Result == "valid" && strings.Contains(string(text), `"RS256"`) && published["kty"] == "RSA"
			if alg, ok := published["alg"]; ok && alg != "RS256" {
				want = false
			}
			if got != want {
				t.Errorf("%s %d %s: signature verified %v, want %v", g.Comment, tc.TcID, tc.Comment, got, want)
			}
		}
	}
	t.Logf("%d verified, %d refused", verified, refused)
	if verified == 0 {
		t.Error("no valid RS256 vector was verified")
	}
}

// verifyOnly makes the checks of the header and the signature, none of the claims.
func verifyOnly(set *keySet, raw string) bool {
	tok := &token{raw: raw}
	if reason, err := tok.read(make([]byte, 0, maxToken)); reason != "" && (err == nil || !strings.Contains(err.Error(), errPayload.Error())) {
		return false
	}
	var v Verifier
	for _, c := range checks[:4] {
		if reason, _ := c.run(&v, context.Background(), tok); reason != "" {
			return false
		}
	}
	return set != nil && set.verify(tok.kid, tok.signed, tok.sig) == nil
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
