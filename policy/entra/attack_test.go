package entra

import (
	"context"
	"crypto"
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
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/partnerguard/partnerguard/policy"
)

// attack is a token that must be refused with one Reason. Where it can be, it is
// signed with key A, so that nothing but the check in question refuses it.
type attack struct {
	name string
	raw  string
	want policy.Reason
}

// attacked is the Verifier that the attacks are tried on: of one tenant, with key
// A and, for another tenant only, key B. Every address but its key endpoint's is
// out of reach, and trying it is an error.
func attacked(t *testing.T) (*Verifier, *endpoint) {
	keys := serveKeys(t, published("A", &keyA().PublicKey).with("issuer", "https://login.microsoftonline.com/{tenantid}/v2.0"),
		published("B", &keyB().PublicKey).with("issuer", strings.Replace(issV2, tid, other, 1)))
	v := newVerifier(t, Config{Authority: keys.URL, Tenants: []string{tid}, Client: &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			if address != keys.Listener.Addr().String() {
				t.Errorf("a request to %s", address)
				return nil, fmt.Errorf("dial %s: out of reach", address)
			}
			return (&net.Dialer{}).DialContext(ctx, network, address)
		},
	}}})
	mustRefresh(t, v)
	return v, keys
}

// occupy takes every verification slot: a token that needs a signature verified
// then gets verify_overloaded, so any other reason was found without.
func occupy(v *Verifier) (release func()) {
	for range cap(v.slots) {
		v.slots <- struct{}{}
	}
	return func() {
		for range cap(v.slots) {
			<-v.slots
		}
	}
}

// allocated is how many bytes f allocates.
func allocated(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

// Every attack gets its Reason, cheaply: without a request to anywhere, but for the
// fetch of the tenant's own keys that a kid of the right form is owed; without
// verifying a signature unless that alone tells, and then once; within memory.
func TestAttacksOnTokens(t *testing.T) {
	v, keys := attacked(t)
	for _, tt := range attacks(t) {
		t.Run(tt.name, func(t *testing.T) {
			requests, signature := 0, tt.want == policy.ReasonTokenBadSignature || tt.want == policy.ReasonTokenGraphNonce
			if kid := kidOf(tt.raw); tt.want == policy.ReasonTokenUnknownKey && canBePublished(kid) {
				requests = 2
			}
			before := keys.total()
			if signature {
				expect(t, v, tt.raw, tt.want)
			}
			release := occupy(v)
			bytes := allocated(func() { expect(t, v, tt.raw, tt.want) })
			expect(t, v, tt.raw, tt.want)
			release()
			if bytes > 512<<10 {
				t.Errorf("%d bytes were allocated", bytes)
			}
			e := v.Explain(context.Background(), tt.raw, audiences)
			if e.Err == nil || e.Err.Reason != tt.want {
				t.Errorf("Explain = %v, want %q", e.Err, tt.want)
			}
			failed := ""
			for _, c := range e.Checks {
				if c.State == Failed {
					failed = c.Detail
					break
				}
			}
			if !strings.HasPrefix(failed, string(tt.want)) {
				t.Errorf("the first check that failed says %q, want %q", failed, tt.want)
			}
			settle(v)
			if n := keys.total() - before; n != requests {
				t.Errorf("%d requests for keys, want %d", n, requests)
			}
		})
	}
	expect(t, v, user(userClaims()), "") // the guard is none the worse for it
}

// kidOf is the kid of a token; empty when it has none that is readable.
func kidOf(raw string) string {
	t := &token{raw: raw}
	t.read(nil)
	kid, _ := t.header.kid.str()
	return kid
}

func attacks(t *testing.T) []attack {
	claims := userClaims()
	good := user(claims)
	parts := strings.Split(good, ".")
	signature, err := base64.RawURLEncoding.DecodeString(parts[2])
	if err != nil {
		t.Fatal(err)
	}
	header := func(members string) string { return sign(keyA(), "{"+members+"}", claims.String()) }
	alg := func(alg string) string { return header(`"alg":` + alg + `,"kid":"A"`) }
	kid := func(kid string) string { return header(`"alg":"RS256","kid":` + kid) }
	payload := func(text string) string { return sign(keyA(), headerA, text) }
	with := func(name, raw string) string { return user(claims.with(name, raw)) }
	without := func(name string) string { return user(claims.without(name)) }
	also := func(member string) string {
		return payload(strings.Replace(claims.String(), "{", "{"+member+",", 1))
	}
	at := func(offset int64) string { return fmt.Sprint(noon.Unix() + offset) }
	signed := func(sig []byte) string { return parts[0] + "." + parts[1] + "." + b64(sig) }
	of := func(issuer, tenant string) string {
		return user(claims.with("iss", `"`+issuer+`"`).with("tid", `"`+tenant+`"`))
	}
	// Of these parts the base64url holds both characters that base64 writes otherwise.
	oddHeader, oddPayload := `{"alg":"RS256","kid":"A","x":"~~~???"}`, claims.with("x", `"~~~???"`).String()
	oddParts := strings.Split(sign(keyA(), oddHeader, oddPayload), ".")
	for i, part := range oddParts {
		if !strings.Contains(part, "_") && !strings.Contains(part, "-") {
			t.Fatalf("part %d is the same in both alphabets", i)
		}
	}
	std := func(part int) string {
		odd := append([]string(nil), oddParts...)
		odd[part] = strings.NewReplacer("-", "+", "_", "/").Replace(odd[part])
		return strings.Join(odd, ".")
	}
	broken := func(part int, breaking string) string {
		odd := append([]string(nil), parts...)
		odd[part] = odd[part][:8] + breaking + odd[part][8:]
		return strings.Join(odd, ".")
	}
	strayBits := func(part int) string { // the last character holds bits that belong to no byte
		odd := strings.Split(sign(keyA(), pad(headerA), pad(claims.String())), ".")
		last := odd[part][len(odd[part])-1]
		odd[part] = odd[part][:len(odd[part])-1] + string(last+1)
		return strings.Join(odd, ".")
	}
	jws := func(s string) string {
		return fmt.Sprintf(`{"payload":%q,"protected":%q,"signature":%q}`, parts[1], parts[0], parts[2])
	}

	list := []attack{
		{"no token", "", policy.ReasonTokenMissing},
		{"one byte over 16 KiB", strings.Repeat("a", 16<<10+1), policy.ReasonTokenTooLong},
		{"a well-signed token over 16 KiB", with("x", `"`+strings.Repeat("x", 12<<10)+`"`), policy.ReasonTokenTooLong},
		{"60,000 dots", strings.Repeat(".", 60_000), policy.ReasonTokenTooLong},
		{"16 KiB of dots", strings.Repeat(".", 16<<10), policy.ReasonTokenOpaque},
		{"16 KiB of braces", strings.Repeat("{", 16<<10), policy.ReasonTokenOpaque},
		{"random text", "aGVsbG8", policy.ReasonTokenOpaque},
		{"only dots", "..", policy.ReasonTokenOpaque},
		{"three parts of no JSON", "aGVs.bG8.aGVs", policy.ReasonTokenOpaque},
		{"three parts not base64url", "a+b.c/d.e=f", policy.ReasonTokenOpaque},
		{"two parts", parts[0] + "." + parts[1], policy.ReasonTokenOpaque},
		{"four parts", good + ".x", policy.ReasonTokenOpaque},
		{"two tokens", good + "," + good, policy.ReasonTokenEncrypted},
		{"the scheme twice", "Bearer " + good, policy.ReasonTokenOpaque},
		{"a space before", " " + good, policy.ReasonTokenOpaque},
		{"dots in percent encoding", strings.ReplaceAll(good, ".", "%2E"), policy.ReasonTokenOpaque},
		{"the JSON serialization", jws(good), policy.ReasonTokenOpaque},
		{"five parts with a JSON header", b64([]byte(`{"alg":"RSA-OAEP","enc":"A256GCM"}`)) + ".a.b.c.d", policy.ReasonTokenEncrypted},
		{"five parts of a signed token", good + "..", policy.ReasonTokenEncrypted},
		{"five parts without a header", "aGVs.a.b.c.d", policy.ReasonTokenOpaque},
		{"header an array", sign(keyA(), `["RS256"]`, claims.String()), policy.ReasonTokenOpaque},
		{"header with a byte order mark", sign(keyA(), "\ufeff"+headerA, claims.String()), policy.ReasonTokenOpaque},

		{"header broken", sign(keyA(), `{"alg":"RS256"`, claims.String()), policy.ReasonTokenMalformed},
		{"text after the header", sign(keyA(), headerA+"{}", claims.String()), policy.ReasonTokenMalformed},
		{"header not UTF-8", header(`"alg":"RS256","kid":"A","x":"` + "\xff" + `"`), policy.ReasonTokenMalformed},
		{"payload empty", parts[0] + ".." + parts[2], policy.ReasonTokenMalformed},
		{"payload no JSON", payload("foo"), policy.ReasonTokenMalformed},
		{"payload an array", payload("[1]"), policy.ReasonTokenMalformed},
		{"payload null", payload("null"), policy.ReasonTokenMalformed},
		{"payload a string that holds claims", payload(fmt.Sprintf("%q", claims.String())), policy.ReasonTokenMalformed},
		{"payload with a byte order mark", payload("\ufeff" + claims.String()), policy.ReasonTokenMalformed},
		{"text after the payload", payload(claims.String() + "{}"), policy.ReasonTokenMalformed},
		{"NUL after the payload", payload(claims.String() + "\x00"), policy.ReasonTokenMalformed},
		{"comma before the end", payload(strings.Replace(claims.String(), "}", ",}", 1)), policy.ReasonTokenMalformed},
		{"a comment", payload(strings.Replace(claims.String(), "{", "{/**/", 1)), policy.ReasonTokenMalformed},
		{"payload not UTF-8", payload(claims.with("name", "\"\xff\"").String()), policy.ReasonTokenMalformed},
		{"payload in overlong UTF-8", payload(claims.with("name", "\"\xc0\xae\"").String()), policy.ReasonTokenMalformed},
		{"lone surrogate", with("name", `"\ud800"`), policy.ReasonTokenMalformed},
		{"surrogates the wrong way round", with("name", `"\udc00\ud800"`), policy.ReasonTokenMalformed},
		{"raw control character", payload(claims.with("name", "\"a\nb\"").String()), policy.ReasonTokenMalformed},
		{"nested 65 deep", with("x", strings.Repeat("[", 64)+strings.Repeat("]", 64)), policy.ReasonTokenMalformed},
		{"nested 6,000 deep", with("x", strings.Repeat("[", 5500)), policy.ReasonTokenMalformed},
		{"objects nested 2,000 deep", with("x", strings.Repeat(`{"x":`, 2000)), policy.ReasonTokenMalformed},
		{"300 further claims", payload(many(300)), policy.ReasonTokenMalformed},
		{"number with a leading zero", with("x", "01"), policy.ReasonTokenMalformed},
		{"NaN", with("exp", "NaN"), policy.ReasonTokenMalformed},
		{"oid a number", with("oid", "7"), policy.ReasonTokenMalformed},
		{"scp an array", with("scp", `["a"]`), policy.ReasonTokenMalformed},
		{"idtyp an array", with("idtyp", `["app"]`), policy.ReasonTokenMalformed},

		{"header padded", parts[0] + "=." + parts[1] + "." + parts[2], policy.ReasonTokenMalformed},
		{"payload padded", parts[0] + "." + parts[1] + "=." + parts[2], policy.ReasonTokenMalformed},
		{"signature padded", good + "=", policy.ReasonTokenMalformed},
		{"signature padded twice", good + "==", policy.ReasonTokenMalformed},
		{"header with a line break", broken(0, "\n"), policy.ReasonTokenMalformed},
		{"payload with a line break", broken(1, "\r\n"), policy.ReasonTokenMalformed},
		{"signature with a line break", broken(2, "\n"), policy.ReasonTokenMalformed},
		{"header with a space", broken(0, " "), policy.ReasonTokenOpaque},
		{"payload with a tab", broken(1, "\t"), policy.ReasonTokenMalformed},
		{"signature with a space", broken(2, " "), policy.ReasonTokenMalformed},
		{"signature with NUL", broken(2, "\x00"), policy.ReasonTokenMalformed},
		{"header in the other alphabet", std(0), policy.ReasonTokenOpaque},
		{"payload in the other alphabet", std(1), policy.ReasonTokenMalformed},
		{"signature in the other alphabet", std(2), policy.ReasonTokenMalformed},
		{"header with stray bits", strayBits(0), policy.ReasonTokenMalformed},
		{"payload with stray bits", strayBits(1), policy.ReasonTokenMalformed},
		{"signature with stray bits", strayBits(2), policy.ReasonTokenMalformed},

		{"crit", header(`"alg":"RS256","kid":"A","crit":["exp"]`), policy.ReasonTokenCriticalHeader},
		{"crit of a name of our own", header(`"alg":"RS256","kid":"A","crit":["kid"]`), policy.ReasonTokenCriticalHeader},
		{"crit empty", header(`"alg":"RS256","kid":"A","crit":[]`), policy.ReasonTokenCriticalHeader},
		{"crit null", header(`"alg":"RS256","kid":"A","crit":null`), policy.ReasonTokenCriticalHeader},
		{"crit escaped", header(`"alg":"RS256","kid":"A","\u0063rit":["exp"]`), policy.ReasonTokenCriticalHeader},
		{"b64 false", header(`"alg":"RS256","kid":"A","b64":false`), policy.ReasonTokenCriticalHeader},
		{"b64 false with crit", header(`"alg":"RS256","kid":"A","b64":false,"crit":["b64"]`), policy.ReasonTokenCriticalHeader},

		{"claim twice", user(claims.also("amr", `["mfa"]`)), policy.ReasonTokenDuplicateClaim},
		{"claim twice, the same", user(claims.also("ver", `"1.0"`)), policy.ReasonTokenDuplicateClaim},
		{"claims told apart by case", user(claims.also("AMR", `["mfa"]`)), policy.ReasonTokenDuplicateClaim},
		{"expiry told apart by case", also(`"Exp":99999999999`), policy.ReasonTokenDuplicateClaim},
		{"claim twice, once escaped", also(`"\u0061mr":["mfa"]`), policy.ReasonTokenDuplicateClaim},
		{"claim twice, once escaped in capitals", also(`"\u0041\u004dR":["mfa"]`), policy.ReasonTokenDuplicateClaim},
		{"claim twice by a letter that folds to ASCII", user(claims.also("\u017fcp", `"x"`)), policy.ReasonTokenDuplicateClaim},
		{"claim twice beyond ASCII", also(`"Ω":1,"\u2126":2`), policy.ReasonTokenDuplicateClaim},
		{"claim twice, first null", also(`"amr":null`), policy.ReasonTokenDuplicateClaim},
		{"an unread claim twice", also(`"x":1,"X":2`), policy.ReasonTokenDuplicateClaim},
		{"header member twice", header(`"alg":"RS256","kid":"A","kid":"B"`), policy.ReasonTokenDuplicateClaim},
		{"header members told apart by case", header(`"alg":"RS256","kid":"A","Alg":"none"`), policy.ReasonTokenDuplicateClaim},
		{"alg twice, once escaped", header(`"\u0061lg":"none","kid":"A","alg":"RS256"`), policy.ReasonTokenDuplicateClaim},
		{"kid twice by the Kelvin sign", header(`"alg":"RS256","kid":"A","` + "\u212a" + `id":"B"`), policy.ReasonTokenDuplicateClaim},

		{"alg none", b64([]byte(`{"alg":"none","kid":"A"}`)) + "." + parts[1] + ".", policy.ReasonTokenUnsupportedAlgorithm},
		{"alg None", b64([]byte(`{"alg":"None","kid":"A"}`)) + "." + parts[1] + ".", policy.ReasonTokenUnsupportedAlgorithm},
		{"alg NONE, signed", alg(`"NONE"`), policy.ReasonTokenUnsupportedAlgorithm},
		{"alg nOnE, signed", alg(`"nOnE"`), policy.ReasonTokenUnsupportedAlgorithm},
		{"alg empty", alg(`""`), policy.ReasonTokenUnsupportedAlgorithm},
		{"alg null", alg(`null`), policy.ReasonTokenUnsupportedAlgorithm},
		{"alg missing", header(`"kid":"A"`), policy.ReasonTokenUnsupportedAlgorithm},
		{"alg in lower case", alg(`"rs256"`), policy.ReasonTokenUnsupportedAlgorithm},
		{"alg with a space", alg(`"RS256 "`), policy.ReasonTokenUnsupportedAlgorithm},
		{"alg with NUL", alg(`"RS256\u0000"`), policy.ReasonTokenUnsupportedAlgorithm},
		{"alg an array", alg(`["RS256"]`), policy.ReasonTokenUnsupportedAlgorithm},
		{"alg an object", alg(`{"RS256":1}`), policy.ReasonTokenUnsupportedAlgorithm},
		{"RS384", alg(`"RS384"`), policy.ReasonTokenUnsupportedAlgorithm},
		{"RS1", alg(`"RS1"`), policy.ReasonTokenUnsupportedAlgorithm},
		{"PS256", ps256(t), policy.ReasonTokenUnsupportedAlgorithm},
		{"PS256 that says RS256", strings.Replace(ps256(t), b64([]byte(`{"alg":"PS256","kid":"A"}`)), b64([]byte(`{"alg":"RS256","kid":"A"}`)), 1), policy.ReasonTokenBadSignature},
		{"ES256 on an RSA key", es256(t, "ES256"), policy.ReasonTokenUnsupportedAlgorithm},
		{"ES256 that says RS256", es256(t, "RS256"), policy.ReasonTokenBadSignature},

		{"kid missing", header(`"alg":"RS256","x5t":"A"`), policy.ReasonTokenMissingKid},
		{"kid empty", kid(`""`), policy.ReasonTokenMissingKid},
		{"kid a number", kid(`1`), policy.ReasonTokenMissingKid},
		{"kid null", kid(`null`), policy.ReasonTokenMissingKid},
		{"kid true", kid(`true`), policy.ReasonTokenMissingKid},
		{"kid an array", kid(`["A"]`), policy.ReasonTokenMissingKid},
		{"kid an object", kid(`{"kid":"A"}`), policy.ReasonTokenMissingKid},
		{"kid in other case of name", header(`"alg":"RS256","KID":"A"`), policy.ReasonTokenMissingKid},

		{"iss missing", without("iss"), policy.ReasonTokenWrongIssuer},
		{"iss a number", with("iss", "1"), policy.ReasonTokenWrongIssuer},
		{"iss an array", with("iss", `["`+issV1+`"]`), policy.ReasonTokenWrongIssuer},
		{"iss without the slash", with("iss", `"https://sts.windows.net/`+tid+`"`), policy.ReasonTokenWrongIssuer},
		{"iss in capitals", with("iss", `"`+strings.ToUpper(issV1)+`"`), policy.ReasonTokenWrongIssuer},
		{"iss by http", with("iss", `"`+strings.Replace(issV1, "https", "http", 1)+`"`), policy.ReasonTokenWrongIssuer},
		{"iss of China", of("https://sts.chinacloudapi.cn/"+tid+"/", tid), policy.ReasonTokenWrongIssuer},
		{"iss of US Government", user(claims.with("iss", `"https://login.microsoftonline.us/`+tid+`/v2.0"`).with("ver", `"2.0"`)), policy.ReasonTokenWrongIssuer},
		{"iss with something before", with("iss", `"https://evil.example/`+issV1+`"`), policy.ReasonTokenWrongIssuer},
		{"iss with something after", with("iss", `"`+issV1+`../`+other+`/"`), policy.ReasonTokenWrongIssuer},
		{"iss with a user", with("iss", `"https://sts.windows.net@evil.example/`+tid+`/"`), policy.ReasonTokenWrongIssuer},
		{"iss of no GUID", with("iss", `"https://sts.windows.net/common/"`), policy.ReasonTokenWrongIssuer},
		{"iss v2, ver 1.0", with("iss", `"`+issV2+`"`), policy.ReasonTokenWrongIssuer},
		{"the key of another issuer", sign(keyB(), `{"alg":"RS256","kid":"B"}`, claims.String()), policy.ReasonTokenWrongIssuer},

		{"tid missing", without("tid"), policy.ReasonTokenWrongTenant},
		{"tid no GUID", with("tid", `"contoso.example"`), policy.ReasonTokenWrongTenant},
		{"tid an array", with("tid", `["`+tid+`"]`), policy.ReasonTokenWrongTenant},
		{"tid not the one in iss", with("tid", `"`+other+`"`), policy.ReasonTokenWrongTenant},
		{"iss of another tenant", with("iss", `"https://sts.windows.net/`+other+`/"`), policy.ReasonTokenWrongTenant},
		{"another tenant", of("https://sts.windows.net/"+other+"/", other), policy.ReasonTokenWrongTenant},
		{"another tenant with its own key", sign(keyB(), `{"alg":"RS256","kid":"B"}`,
			claims.with("iss", `"https://sts.windows.net/`+other+`/"`).with("tid", `"`+other+`"`).String()), policy.ReasonTokenWrongTenant},

		{"aud missing", without("aud"), policy.ReasonTokenWrongAudience},
		{"aud null", with("aud", "null"), policy.ReasonTokenWrongAudience},
		{"aud of another API", with("aud", `"https://graph.windows.net"`), policy.ReasonTokenWrongAudience},
		{"aud in other case", with("aud", `"`+strings.ToUpper(aud)+`"`), policy.ReasonTokenWrongAudience},
		{"aud with something after", with("aud", `"`+aud+`.evil.example"`), policy.ReasonTokenWrongAudience},
		{"aud with two in one", with("aud", `"`+aud+` x"`), policy.ReasonTokenWrongAudience},
		{"aud an array of others", with("aud", `["x","y"]`), policy.ReasonTokenWrongAudience},
		{"aud an empty array", with("aud", `[]`), policy.ReasonTokenWrongAudience},
		{"aud empty", with("aud", `""`), policy.ReasonTokenWrongAudience},
		{"aud an array with a number", with("aud", `["`+aud+`",1]`), policy.ReasonTokenMalformed},
		{"aud a nested array", with("aud", `[["`+aud+`"]]`), policy.ReasonTokenMalformed},
		{"aud a number", with("aud", `1`), policy.ReasonTokenMalformed},
		{"aud an object", with("aud", `{"`+aud+`":1}`), policy.ReasonTokenMalformed},

		{"exp missing", without("exp"), policy.ReasonTokenMalformed},
		{"exp null", with("exp", "null"), policy.ReasonTokenMalformed},
		{"exp a string", with("exp", `"1781000000"`), policy.ReasonTokenMalformed},
		{"exp an array", with("exp", `[1781000000]`), policy.ReasonTokenMalformed},
		{"exp true", with("exp", `true`), policy.ReasonTokenMalformed},
		{"exp negative", with("exp", `-1`), policy.ReasonTokenMalformed},
		{"exp 1e308", with("exp", `1e308`), policy.ReasonTokenMalformed},
		{"exp 1e400", with("exp", `1e400`), policy.ReasonTokenMalformed},
		{"exp with 4,000 digits", with("exp", strings.Repeat("9", 4000)), policy.ReasonTokenMalformed},
		{"exp beyond 64 bits", with("exp", `18446744075490551616`), policy.ReasonTokenMalformed},
		{"exp after the year 9999", with("exp", `253402300800`), policy.ReasonTokenMalformed},
		{"exp with a fraction", with("exp", `1781000000.5`), policy.ReasonTokenMalformed},
		{"exp in milliseconds", with("exp", fmt.Sprint(int64(expires)*1000)), policy.ReasonTokenMalformed},
		{"exp at the leeway", with("exp", at(-300)), policy.ReasonTokenExpired},
		{"exp zero", with("exp", `0`), policy.ReasonTokenExpired},
		{"exp tiny", with("exp", `1e-400`), policy.ReasonTokenExpired},
		{"nbf a string", with("nbf", `"1"`), policy.ReasonTokenMalformed},
		{"nbf negative", with("nbf", `-1`), policy.ReasonTokenMalformed},
		{"nbf 1e400", with("nbf", `1e400`), policy.ReasonTokenMalformed},
		{"nbf with a fraction", with("nbf", `1.5`), policy.ReasonTokenMalformed},
		{"nbf beyond the leeway", with("nbf", at(301)), policy.ReasonTokenNotYetValid},
		{"iat a string", with("iat", `"1"`), policy.ReasonTokenMalformed},
		{"iat negative", with("iat", `-1`), policy.ReasonTokenMalformed},
		{"iat 1e308", with("iat", `1e308`), policy.ReasonTokenMalformed},
		{"iat an object", with("iat", `{}`), policy.ReasonTokenMalformed},
		{"iat in the future", with("iat", at(301)), policy.ReasonTokenNotYetValid},

		// What no key can be listed under is unknown without a look.
		{"kid of 8 KB", kid(`"` + strings.Repeat("A", 8000) + `"`), policy.ReasonTokenUnknownKey},
		{"kid with NUL", kid(`"A\u0000"`), policy.ReasonTokenUnknownKey},
		{"kid with CRLF", kid(`"A\r\nHost: evil.example"`), policy.ReasonTokenUnknownKey},
		{"kid with a space", kid(`"' OR 1=1 --"`), policy.ReasonTokenUnknownKey},
		{"kid beyond ASCII", kid(`"А"`), policy.ReasonTokenUnknownKey},
		// These have the form of a kid: one fetch each.
		{"kid of no key", kid(`"Z"`), policy.ReasonTokenUnknownKey},
		{"kid with a path", kid(`"../../../../etc/passwd"`), policy.ReasonTokenUnknownKey},
		{"kid a URL", kid(`"http://evil.example/keys"`), policy.ReasonTokenUnknownKey},

		{"signed by another key", sign(keyB(), headerA, claims.String()), policy.ReasonTokenBadSignature},
		{"no signature", signed(nil), policy.ReasonTokenBadSignature},
		{"signature of one byte", signed([]byte{1}), policy.ReasonTokenBadSignature},
		{"signature of zeros", signed(make([]byte, 256)), policy.ReasonTokenBadSignature},
		{"signature cut", signed(signature[:255]), policy.ReasonTokenBadSignature},
		{"signature with a zero before", signed(append([]byte{0}, signature...)), policy.ReasonTokenBadSignature},
		{"signature with a byte after", signed(append(signature[:256:256], 0)), policy.ReasonTokenBadSignature},
		{"signature plus the modulus", signed(new(big.Int).Add(new(big.Int).SetBytes(signature), keyA().N).Bytes()), policy.ReasonTokenBadSignature},
		{"signature of 10 KB", signed(make([]byte, 10_000)), policy.ReasonTokenBadSignature},
		{"header exchanged", b64([]byte(`{"alg":"RS256","kid":"A"}`)) + "." + parts[1] + "." + parts[2], policy.ReasonTokenBadSignature},
		{"payload exchanged", parts[0] + "." + b64([]byte(claims.with("amr", `["mfa"]`).String())) + "." + parts[2], policy.ReasonTokenBadSignature},
		{"nonce in the header, signed by another key", sign(keyB(), `{"alg":"RS256","kid":"A","nonce":"n"}`, claims.String()), policy.ReasonTokenGraphNonce},

		// Dear to read, were it not bounded.
		{"250 names alike but for the end", payload("{" + strings.Join(alike(230, "e"), ",") + "}"), policy.ReasonTokenWrongIssuer},
		{"250 names beyond ASCII", payload("{" + strings.Join(alike(230, "é"), ",") + "}"), policy.ReasonTokenWrongIssuer},
		{"3,000 authentication methods", payload(`{"amr":[` + strings.Repeat(`"",`, 3000) + `""]}`), policy.ReasonTokenWrongIssuer},
		{"2,000 escaped audiences", with("aud", `[`+strings.Repeat(`"\n",`, 1900)+`""]`), policy.ReasonTokenWrongAudience},
	}
	for name, secret := range publicKeyForms(t) {
		for _, hs := range []string{"HS256", "hs256", "RS256"} {
			want := policy.ReasonTokenUnsupportedAlgorithm
			if hs == "RS256" {
				want = policy.ReasonTokenBadSignature
			}
			list = append(list, attack{"an HMAC that says " + hs + ", keyed with the public key as " + name, hmacToken(hs, secret), want})
		}
	}
	trap := "https://evil.example/keys"
	for _, member := range []string{
		`"jku":"` + trap + `"`, `"x5u":"` + trap + `"`, `"x5c":["` + certificate(t) + `"]`, `"jwk":` + jsonOf(published("A", &keyB().PublicKey)),
	} {
		name, _, _ := strings.Cut(member, ":")
		list = append(list, attack{"the signer's own key in " + name, sign(keyB(), `{"alg":"RS256","kid":"A",`+member+`}`, claims.String()), policy.ReasonTokenBadSignature})
	}
	return list
}

// pad adds spaces to JSON until its base64url ends with bits that belong to no byte.
func pad(text string) string {
	for len(text)%3 != 1 {
		text += " "
	}
	return text
}

// alike are n members whose names share a long beginning.
func alike(n int, letter string) (members []string) {
	for i := range n {
		members = append(members, fmt.Sprintf(`"%s%03d":1`, strings.Repeat(letter, 36/len(letter)), i))
	}
	return members
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

// publicKeyForms are the bytes that a public key may be taken for a secret by.
func publicKeyForms(t *testing.T) map[string][]byte {
	t.Helper()
	public := &keyA().PublicKey
	spki, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		t.Fatal(err)
	}
	pkcs1 := x509.MarshalPKCS1PublicKey(public)
	encoded := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: spki})
	return map[string][]byte{
		"PEM": encoded, "PEM without the last line break": encoded[:len(encoded)-1],
		"PKCS #1 PEM": pem.EncodeToMemory(&pem.Block{Type: "RSA PUBLIC KEY", Bytes: pkcs1}),
		"DER":         spki, "PKCS #1 DER": pkcs1, "modulus": public.N.Bytes(), "modulus in base64url": []byte(b64(public.N.Bytes())),
		"JWK": []byte(jsonOf(published("A", public))), "nothing": {},
	}
}

func hmacToken(alg string, secret []byte) string {
	signed := b64([]byte(`{"alg":"`+alg+`","kid":"A"}`)) + "." + b64([]byte(userClaims().String()))
	mac := hmac.New(sha256.New, secret)
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

func es256(t *testing.T, alg string) string {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signed := b64([]byte(`{"alg":"`+alg+`","kid":"A"}`)) + "." + b64([]byte(userClaims().String()))
	sum := sha256.Sum256([]byte(signed))
	sig, err := ecdsa.SignASN1(rand.Reader, k, sum[:])
	if err != nil {
		t.Fatal(err)
	}
	return signed + "." + b64(sig)
}

// certificate is a self-signed one of key B, as x5c has it.
func certificate(t *testing.T) string {
	t.Helper()
	template := &x509.Certificate{SerialNumber: big.NewInt(1)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &keyB().PublicKey, keyB())
	if err != nil {
		t.Fatal(err)
	}
	return base64.StdEncoding.EncodeToString(der)
}

// A key that a token names or carries is ignored: what is signed by the published
// key verifies with it, and nothing else does.
func TestHeaderMembersCauseNoRequest(t *testing.T) {
	trap := serveKeys(t, published("A", &keyB().PublicKey))
	v, keys := attacked(t)
	before := keys.total()
	for _, member := range []string{
		`"jku":"` + trap.URL + `"`, `"x5u":"` + trap.URL + `"`, `"x5c":["` + certificate(t) + `"]`, `"jwk":` + jsonOf(published("A", &keyB().PublicKey)),
		`"x5t#S256":"AA"`, `"jku":7`, `"x5c":null`, `"iss":"` + trap.URL + `"`,
	} {
		header := `{"alg":"RS256","kid":"A",` + member + `}`
		expect(t, v, sign(keyB(), header, userClaims().String()), policy.ReasonTokenBadSignature)
		expect(t, v, sign(keyA(), header, userClaims().String()), "")
	}
	expect(t, v, sign(keyA(), headerA, userClaims().with("jku", `"`+trap.URL+`"`).with("jwks_uri", `"`+trap.URL+`"`).String()), "")
	if trap.total() != 0 || keys.total() != before {
		t.Errorf("%d requests to the named address, %d further to the authority; want none", trap.total(), keys.total()-before)
	}
}

// What is odd but says the same to every reader is no attack.
func TestOddTokensThatVerify(t *testing.T) {
	v, _ := attacked(t)
	for name, raw := range map[string]string{
		"of 16 KiB":                           longest(t),
		"escaped member of header":            sign(keyA(), `{"\u0061lg":"\u0052S256","k\u0069d":"\u0041"}`, userClaims().String()),
		"white space":                         sign(keyA(), " {\r\n\t\"alg\" : \"RS256\" , \"kid\":\"A\" } ", "\n"+userClaims().String()+"\r\n"),
		"unread members nested":               user(userClaims().with("x", strings.Repeat("[", 63)+strings.Repeat("]", 63))),
		"exp in the year 9999":                user(userClaims().with("exp", "253402300799")),
		"nbf and iat null":                    user(userClaims().with("nbf", "null").with("iat", "null")),
		"alg of another case beside no other": sign(keyA(), `{"alg":"RS256","kid":"A","ALGORITHM":"none"}`, userClaims().String()),
	} {
		if _, reason := verify(t, v, raw); reason != "" {
			t.Errorf("%s: %q, want it verified", name, reason)
		}
	}
}

// longest is a well-signed token of exactly 16 KiB.
func longest(t *testing.T) string {
	t.Helper()
	signature := base64.RawURLEncoding.EncodedLen(256)
	for h := range 3 { // base64url has no text of every length
		header := headerA + strings.Repeat(" ", h)
		for n := maxToken * 5 / 8; ; n++ {
			payload := userClaims().with("x", `"`+strings.Repeat("x", n)+`"`).String()
			size := len(b64([]byte(header))) + 1 + len(b64([]byte(payload))) + 1 + signature
			if size == maxToken {
				return sign(keyA(), header, payload)
			}
			if size > maxToken {
				break
			}
		}
	}
	t.Fatal("no token of 16 KiB")
	return ""
}

func TestDotsCostNothing(t *testing.T) {
	v, _ := attacked(t)
	ctx, raw := context.Background(), strings.Repeat(".", 60_000)
	try := func() { v.Verify(ctx, raw, audiences) }
	if n := testing.AllocsPerRun(100, try); n > 1 {
		t.Errorf("%v allocations, want the error alone", n)
	}
	if n := allocated(func() {
		for range 100 {
			try()
		}
	}); n > 100<<10 {
		t.Errorf("%d bytes a token", n/100)
	}
}

// What amr may be in a token that verifies, and what becomes of the call in enforce.
func TestAttacksWithAMR(t *testing.T) {
	v, _ := attacked(t)
	p, err := policy.New(policy.Config{Mode: policy.Enforce, Tenants: []string{tid}})
	if err != nil {
		t.Fatal(err)
	}
	v2 := userClaims().with("iss", `"`+issV2+`"`).with("ver", `"2.0"`)
	for _, tt := range []struct {
		name   string
		claims object
		want   policy.Reason
	}{
		{"a string", userClaims().with("amr", `"mfa"`), policy.ReasonMFAUnknown},
		{"a string of a list", userClaims().with("amr", `"pwd mfa"`), policy.ReasonMFAUnknown},
		{"a string of JSON", userClaims().with("amr", `"[\"mfa\"]"`), policy.ReasonMFAUnknown},
		{"an object", userClaims().with("amr", `{"mfa":true}`), policy.ReasonMFAUnknown},
		{"true", userClaims().with("amr", `true`), policy.ReasonMFAUnknown},
		{"a number", userClaims().with("amr", `1`), policy.ReasonMFAUnknown},
		{"nested", userClaims().with("amr", `[["mfa"]]`), policy.ReasonMFAUnknown},
		{"nested beside a string", userClaims().with("amr", `["pwd",["mfa"]]`), policy.ReasonMFAUnknown},
		{"with a number", userClaims().with("amr", `["mfa",1]`), policy.ReasonMFAUnknown},
		{"with null", userClaims().with("amr", `["mfa",null]`), policy.ReasonMFAUnknown},
		{"with true", userClaims().with("amr", `[true,"mfa"]`), policy.ReasonMFAUnknown},
		{"null", userClaims().with("amr", `null`), policy.ReasonMFAMissing},
		{"missing", userClaims().without("amr"), policy.ReasonMFAMissing},
		{"empty", userClaims().with("amr", `[]`), policy.ReasonMFAMissing},
		{"MFA in capitals", userClaims().with("amr", `["MFA"]`), policy.ReasonMFAMissing},
		{"mfa with a space", userClaims().with("amr", `["mfa "]`), policy.ReasonMFAMissing},
		{"mfa with NUL", userClaims().with("amr", `["mfa\u0000"]`), policy.ReasonMFAMissing},
		{"mfa in full-width letters", userClaims().with("amr", `["ｍｆａ"]`), policy.ReasonMFAMissing},
		{"mfa with a list in it", userClaims().with("amr", `["pwd,mfa"]`), policy.ReasonMFAMissing},
		{"an empty string", userClaims().with("amr", `[""]`), policy.ReasonMFAMissing},
		{"another value of a kind of MFA", userClaims().with("amr", `["wiaormfa","otp"]`), policy.ReasonMFAMissing},
		{"amr in capitals", userClaims().without("amr").with("AMR", `["mfa"]`), policy.ReasonMFAMissing},
		{"amr_values", userClaims().without("amr").with("amr_values", `["mfa"]`), policy.ReasonMFAMissing},
		{"amr inside another claim", userClaims().without("amr").with("x", `{"amr":["mfa"]}`), policy.ReasonMFAMissing},
		{"acr instead", userClaims().without("amr").with("acr", `"mfa"`), policy.ReasonMFAMissing},
		{"missing in a v2 token", v2.without("amr"), policy.ReasonMFAUnknown},
		{"a user who claims to be an app by roles", userClaims().without("amr").with("roles", `["x"]`).with("appidacr", `"2"`), policy.ReasonMFAMissing},
		{"idtyp in capitals", userClaims().without("amr").with("idtyp", `"App"`), policy.ReasonMFAMissing},
	} {
		tok, reason := verify(t, v, user(tt.claims))
		if reason != "" {
			t.Errorf("%s: %s, want the token verified", tt.name, reason)
			continue
		}
		c := &policy.Call{Time: noon, Method: "GET", Path: "/v1/invoices", Token: tok}
		c.Attribution = p.Attribute(c)
		if d := p.Decide(c); d.Reason != tt.want || d.Effect != policy.Reject {
			t.Errorf("%s: %s %s, want reject %s", tt.name, d.Effect, d.Reason, tt.want)
		}
	}
}

// The examples of RFC 7515, appendix A, with the key of A.2, and of RFC 7520,
// section 4.1, with the key of section 3.3.
const (
	rfc7515Payload = "eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ"

	rfc7515A1 = "eyJ0eXAiOiJKV1QiLA0KICJhbGciOiJIUzI1NiJ9." + rfc7515Payload + ".dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk"
	rfc7515A2 = "eyJhbGciOiJSUzI1NiJ9." + rfc7515Payload + ".cC4hiUPoj9Eetdgtv3hF80EGrhuB__dzERat0XF9g2VtQgr9PJbu3XOiZj5RZmh7" +
		"AAuHIm4Bh-0Qc_lF5YKt_O8W2Fp5jujGbds9uJdbF9CUAr7t1dnZcAcQjbKBYNX4BAynRFdiuB--f_nZLgrnbyTyWzO75vRK5h6xBArLIARNPvkSjtQBMHlb1L07" +
		"Qe7K0GarZRmB_eSN9383LcOLn6_dO--xi12jzDwusC-eOkHWEsqtFZESc6BfI7noOPqvhJ1phCnvWh6IeYI2w9QOYEUipUTI8np6LbgGY9Fs98rqVt5AXLIhWkWy" +
		"wlVmtVrBp0igcN_IoypGlUPQGe77Rw"
	rfc7515A2Modulus = "ofgWCuLjybRlzo0tZWJjNiuSfb4p4fAkd_wWJcyQoTbji9k0l8W26mPddxHmfHQp-Vaw-4qPCJrcS2mJPMEzP1Pt0Bm4d4QlL-yRT-SFd2lZ" +
		"S-pCgNMsD1W_YpRPEwOWvG6b32690r2jZ47soMZo9wGzjb_7OMg0LOL-bSf63kpaSHSXndS5z5rexMdbBYUsLA9e-KXBdQOS-UTo7WTBEMa2R2CapHg665xsmtdV" +
		"MTBQY4uDZlxvb3qCo5ZwKh9kG4LT6_I5IhlJH7aGhyxXFvUK-DWNmoudF8NAco9_h9iaGNj8q2ethFkMLs91kzk2PAcDTW9gb54h4FRWyuXpoQ"
	rfc7515A3 = "eyJhbGciOiJFUzI1NiJ9." + rfc7515Payload + ".DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q"
	rfc7515A4 = "eyJhbGciOiJFUzUxMiJ9.UGF5bG9hZA.AdwMgeerwtHoh-l192l60hp9wAHZFVJbLfD_UxMi70cwnZOYaRI1bKPWROc-mZZqwqT2SI-KGDKB34XO0aw_7Xdt" +
		"AG8GaSwFKdCAPZgoXD2YBJZCPEX3xKpRwcdOO8KpEHwJjyqOgzDO7iKvU8vcnwNrmxYbSW9ERBXukOXolLzeO_Jn"
	rfc7515A5 = "eyJhbGciOiJub25lIn0." + rfc7515Payload + "."

	rfc7520 = "eyJhbGciOiJSUzI1NiIsImtpZCI6ImJpbGJvLmJhZ2dpbnNAaG9iYml0b24uZXhhbXBsZSJ9.SXTigJlzIGEgZGFuZ2Vyb3VzIGJ1c2luZXNzLCBGcm9k" +
		"bywgZ29pbmcgb3V0IHlvdXIgZG9vci4gWW91IHN0ZXAgb250byB0aGUgcm9hZCwgYW5kIGlmIHlvdSBkb24ndCBrZWVwIHlvdXIgZmVldCwgdGhlcmXigJlzIG5v" +
		"IGtub3dpbmcgd2hlcmUgeW91IG1pZ2h0IGJlIHN3ZXB0IG9mZiB0by4.MRjdkly7_-oTPTS3AXP41iQIGKa80A0ZmTuV5MEaHoxnW2e5CZ5NlKtainoFmKZopdHM" +
		"1O2U4mwzJdQx996ivp83xuglII7PNDi84wnB-BDkoBwA78185hX-Es4JIwmDLJK3lfWRa-XtL0RnltuYv746iYTh_qHRD68BNt1uSNCrUCTJDt5aAE6x8wW1Kt9e" +
		"Ro4QPocSadnHXFxnt8Is9UzpERV0ePPQdLuW3IS_de3xyIrDaLGdjluPxUAhb6L2aXic1U12podGU0KLUQSE_oI-ZnmKJ3F4uOZDnd6QZWJushZ41Axf_fcIe8u9" +
		"ipH84ogoree7vjbU5y18kDquDg"
	rfc7520Kid     = "bilbo.baggins@hobbiton.example"
	rfc7520Modulus = "n4EPtAOCc9AlkeQHPzHStgAbgs7bTZLwUBZdR8_KuKPEHLd4rHVTeT-O-XV2jRojdNhxJWTDvNd7nqQ0VEiZQHz_AJmSCpMaJMRBSFKrKb2wqVwGU_Ns" +
		"YOYL-QtiWN2lbzcEe6XC0dApr5ydQLrHqkHHig3RBordaZ6Aj-oBHqFEHYpPe7Tpe-OfVfHd1E6cS6M1FZcD1NNLYD5lFHpPI9bTwJlsde3uhGqC0ZCuEHg8lhzw" +
		"OHrtIQbS0FVbb9k3-tVTU4fg_3L_vniUFAKwuCLqKnS2BYwdq_mzSnbLY7h_qixoR7jig3__kRhuaxwUkRz5iaiQkqgc5gHdrNP5zw"
)

func TestExamplesOfTheRFCs(t *testing.T) {
	a2 := jwk{"kty": "RSA", "kid": "A.2", "n": rfc7515A2Modulus, "e": "AQAB"}
	bilbo := jwk{"kty": "RSA", "kid": rfc7520Kid, "use": "sig", "n": rfc7520Modulus, "e": "AQAB"}
	keys := serveKeys(t, a2, bilbo)
	v := newVerifier(t, Config{Authority: keys.URL})
	mustRefresh(t, v)
	for _, tt := range []struct {
		name string
		raw  string
		want policy.Reason
	}{
		{"RFC 7515 A.1, HS256", rfc7515A1, policy.ReasonTokenUnsupportedAlgorithm},
		{"RFC 7515 A.2, RS256 without a kid", rfc7515A2, policy.ReasonTokenMissingKid},
		{"RFC 7515 A.3, ES256", rfc7515A3, policy.ReasonTokenUnsupportedAlgorithm},
		{"RFC 7515 A.4, ES512 over text", rfc7515A4, policy.ReasonTokenMalformed},
		{"RFC 7515 A.5, none", rfc7515A5, policy.ReasonTokenUnsupportedAlgorithm},
		{"RFC 7520 4.1, RS256 over text", rfc7520, policy.ReasonTokenMalformed},
	} {
		release := occupy(v)
		t.Run(tt.name, func(t *testing.T) { expect(t, v, tt.raw, tt.want) })
		release()
	}

	// The signature step by itself, with the published key and with the other one.
	set := v.tenants[common].sources[0].set.Load()
	for _, tt := range []struct{ raw, kid, wrong string }{{rfc7515A2, "A.2", rfc7520Kid}, {rfc7520, rfc7520Kid, "A.2"}} {
		tok := &token{raw: tt.raw}
		tok.read(nil)
		if err := set.verify(tt.kid, tok.signed, tok.sig); err != nil {
			t.Errorf("%s: %v", tt.kid, err)
		}
		if set.verify(tt.wrong, tok.signed, tok.sig) == nil {
			t.Errorf("%s: verified by the key of %s", tt.kid, tt.wrong)
		}
		tok.sig[7] ^= 1
		if set.verify(tt.kid, tok.signed, tok.sig) == nil {
			t.Errorf("%s: verified with a changed signature", tt.kid)
		}
	}
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

// Many callers attack at once, and a good token gets through all the same.
func TestAttacksInParallel(t *testing.T) {
	v, _ := attacked(t)
	list := attacks(t)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for n := range list {
				tt := list[(n+i*37)%len(list)]
				got, err := v.Verify(context.Background(), tt.raw, audiences)
				reason := reasonOf(t, got, err)
				if reason != tt.want {
					t.Errorf("%s: %q, want %q", tt.name, reason, tt.want)
				}
			}
		})
	}
	wg.Go(func() {
		for range 50 {
			expect(t, v, user(userClaims()), "")
		}
	})
	wg.Wait()
}
