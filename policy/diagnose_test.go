package policy_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	. "github.com/partnerguard/partnerguard/policy"
)

// userToken is a verified token of the partner's own app and user, with amr as
// given: the sample payload of the documentation.
func userToken(amr ...string) Token {
	mfa := MFAAbsent
	if slices.Contains(amr, "mfa") {
		mfa = MFAPresent
	}
	return Token{
		Verified: true, Kind: KindAppUser, MFA: mfa, AMR: amr, Version: "1.0",
		TenantID: home, AppID: billing, AppAuth: "1", ObjectID: sam, UPN: "sam@contoso-partner.example",
		Issuer: "https://sts.windows.net/" + home + "/", Audience: "https://api.partnercenter.microsoft.com",
	}
}

// but returns t with a change.
func but(t Token, change func(*Token)) Token {
	change(&t)
	return t
}

func publicClient(t *Token)     { t.AppAuth = "0" }
func guest(t *Token)            { t.IdP = "https://sts.windows.net/" + away + "/" }
func onlyClaimed(t *Token)      { t.Verified = false }
func microsoftsClient(t *Token) { t.AppID = azureCLI }
func forGraph(t *Token)         { t.Audience = "https://graph.windows.net" }

var (
	appOnlyToken = but(userToken(), func(t *Token) {
		t.Kind, t.MFA, t.UPN, t.IdP = KindAppOnly, MFANotApplicable, "", t.Issuer
	})
	opaqueToken = Token{Kind: KindOpaque}
)

// said is a cause as "code confidence".
func said(causes []Cause) (s []string) {
	for _, c := range causes {
		s = append(s, c.Code+" "+c.Confidence.String())
	}
	return s
}

func TestDiagnoseTheSampleIntegrations(t *testing.T) {
	for _, tt := range []struct {
		name      string
		token     Token
		reason    Reason
		rejection Rejection
		first     []string // the causes that must lead, in order
	}{
		{"compliant Secure Application Model", userToken("pwd", "mfa"), ReasonMFAPresent, "", nil},
		{"password grant", but(userToken("pwd"), publicClient), ReasonMFAMissing, "", []string{"password_grant likely", "refresh_token_without_mfa likely"}},
		{"refresh token minted before MFA", userToken("pwd"), ReasonMFAMissing, "", []string{"refresh_token_without_mfa likely", "password_grant likely"}},
		{"federated without MFA", userToken("fed"), ReasonMFAMissing, "", []string{"federated_idp_without_mfa likely"}},
		{"Windows integrated without MFA", userToken("wia"), ReasonMFAMissing, "", []string{"federated_idp_without_mfa likely"}},
		{"app-only", appOnlyToken, ReasonAppOnly, "", nil},
		{"expired", but(userToken("pwd", "mfa"), onlyClaimed), ReasonTokenExpired, "", []string{"token_kept_too_long likely"}},
		{"wrong audience", but(but(userToken("pwd", "mfa"), onlyClaimed), forGraph), ReasonTokenWrongAudience, "", []string{"legacy_audience certain"}},
		{"opaque", opaqueToken, ReasonTokenOpaque, "", []string{"generatetoken_exchange likely"}},
		{"intermittent 900421, a call that passed", userToken("pwd"), ReasonMFAMissing, "", []string{"refresh_token_without_mfa likely", "password_grant likely"}},
		{"intermittent 900421, a call that did not", userToken("pwd"), ReasonMFAMissing, RejectionMFARequired, []string{"refresh_token_without_mfa likely", "password_grant likely"}},
	} {
		got := said(Diagnose(tt.token, tt.reason, tt.rejection, ""))
		if len(got) < len(tt.first) || tt.first == nil && got != nil {
			t.Errorf("%s: %q, want %q", tt.name, got, tt.first)
			continue
		}
		if diff := cmp.Diff(tt.first, got[:len(tt.first):len(tt.first)]); tt.first != nil && diff != "" {
			t.Errorf("%s: causes (-want +got):\n%s", tt.name, diff)
		}
	}
}

func TestDiagnoseFirstCause(t *testing.T) {
	for _, tt := range []struct {
		name      string
		token     Token
		reason    Reason
		rejection Rejection
		code      string
		want      string
	}{
		{"no amr at all", userToken(), ReasonMFAMissing, "", "", "refresh_token_without_mfa likely"},
		{"a guest", but(userToken("pwd"), guest), ReasonMFAMissing, "", "", "guest_mfa_not_trusted likely"},
		{"a personal account as guest", but(userToken("pwd"), func(t *Token) { t.IdP = "live.com" }), ReasonMFAMissing, "", "", "guest_mfa_not_trusted likely"},
		{"a user of one's own with idp", but(userToken("fed"), func(t *Token) { t.IdP = t.Issuer }), ReasonMFAMissing, "", "", "federated_idp_without_mfa likely"},
		{"one strong method", userToken("rsa"), ReasonMFAMissing, "", "", "single_factor_strong_method likely"},
		{"a passkey that Entra did not count", userToken("fido"), ReasonMFAMissing, "", "", "single_factor_strong_method likely"},
		{"an amr that nobody can judge", but(userToken(), func(t *Token) { t.MFA, t.Version = MFAUnknown, "2.0" }), ReasonMFAUnknown, "", "", "mfa_claim_unreadable likely"},

		{"no token", Token{}, ReasonTokenMissing, "", "", "no_bearer_token certain"},
		{"a Graph token of today", but(userToken("mfa"), func(t *Token) { t.Audience = "https://graph.microsoft.com" }), ReasonTokenWrongAudience, "", "", "wrong_audience certain"},
		{"China's old Graph", but(userToken("mfa"), func(t *Token) { t.Audience = "https://graph.chinacloudapi.cn" }), ReasonTokenWrongAudience, "", "", "legacy_audience certain"},
		{"a hashed nonce", but(userToken("mfa"), onlyClaimed), ReasonTokenGraphNonce, "", "", "token_of_another_api likely"},
		{"a wrong clock", but(userToken("mfa"), onlyClaimed), ReasonTokenNotYetValid, "", "", "clock_wrong likely"},
		{"another tenant", but(userToken("mfa"), onlyClaimed), ReasonTokenWrongTenant, "", "", "wrong_tenant likely"},
		{"no keys", but(userToken("mfa"), onlyClaimed), ReasonKeysUnavailable, "", "", "keys_unavailable likely"},

		{"900421 although the token has MFA", userToken("pwd", "mfa"), ReasonMFAPresent, RejectionMFARequired, "900421", "mfa_claim_not_accepted likely"},
		{"900421 for an opaque token", opaqueToken, ReasonTokenOpaque, RejectionMFARequired, "900421", "generatetoken_exchange likely"},
		{"Graph refuses an app for missing MFA", appOnlyToken, ReasonAppOnly, RejectionMFARequired, "Unauthorized_MissingMFA", "app_only_where_user_needed likely"},
		{"900420 for the old audience", but(userToken("mfa"), forGraph), ReasonTokenWrongAudience, RejectionAudienceRefused, "900420", "legacy_audience certain"},
		{"900420 for the old audience, found expired first", but(userToken("mfa"), forGraph), ReasonTokenExpired, RejectionAudienceRefused, "900420", "legacy_audience certain"},
		{"900420 for a token that nobody can read", opaqueToken, ReasonTokenOpaque, RejectionAudienceRefused, "900420", "legacy_audience likely"},
		{"900420 although the audience is right", userToken("mfa"), ReasonMFAPresent, RejectionAudienceRefused, "900420", "wrong_audience likely"},
		{"a refused token that is expired", but(userToken("mfa"), onlyClaimed), ReasonTokenExpired, RejectionTokenRefused, "", "token_kept_too_long likely"},
		{"a refused token that verifies", userToken("mfa"), ReasonMFAPresent, RejectionTokenRefused, "800001", "token_refused possible"},
		{"a refused token is not the guard's lack of keys", but(userToken("mfa"), onlyClaimed), ReasonKeysUnavailable, RejectionTokenRefused, "", "token_refused possible"},
		{"a call without a token", Token{}, ReasonTokenMissing, RejectionTokenRefused, "", "no_bearer_token certain"},
		{"a claims challenge", userToken("mfa"), ReasonMFAPresent, RejectionClaimsChallenge, "", "claims_challenge likely"},
		{"Conditional Access", userToken("mfa"), ReasonMFAPresent, RejectionConditionalAccess, "900309", "conditional_access likely"},
		{"app-only where a user is needed", appOnlyToken, ReasonAppOnly, RejectionAppOnlyUnsupported, "900329", "app_only_unsupported likely"},
		{"no relationship with the customer", userToken("mfa"), ReasonMFAPresent, RejectionOther, "20002", "no_customer_relationship likely"},
		{"no role", userToken("mfa"), ReasonMFAPresent, RejectionOther, "900308", "insufficient_role likely"},
		{"a business rule", userToken("mfa"), ReasonMFAPresent, RejectionOther, "800066", "refused_by_partner_center possible"},
	} {
		got := said(Diagnose(tt.token, tt.reason, tt.rejection, tt.code))
		if len(got) == 0 || got[0] != tt.want {
			t.Errorf("%s: %q, want %q first", tt.name, got, tt.want)
		}
	}
}

// provable are the causes that the call itself shows: that it has no token, and
// the audience that stands in the token. For all others a sign-in record is needed.
var provable = []string{"no_bearer_token", "legacy_audience", "wrong_audience"}

// Every refusal, the guard's and Microsoft's, has causes with a way out, the best
// first, whatever token it was.
func TestDiagnoseAlwaysHasAWayOut(t *testing.T) {
	tokens := map[string]Token{
		"none": {}, "opaque": opaqueToken, "app-only": appOnlyToken,
	}
	for _, amr := range []string{"", "pwd", "fed", "wia", "rsa", "fido", "otp", "mfa", "ngcmfa"} {
		plain := userToken(amr)
		for name, change := range map[string]func(*Token){
			"": func(*Token) {}, "public client": publicClient, "guest": guest, "claimed": onlyClaimed,
			"first-party": microsoftsClient, "for graph": forGraph,
			"public first-party guest": func(t *Token) { publicClient(t); microsoftsClient(t); guest(t) },
		} {
			tokens[amr+" "+name] = but(plain, change)
		}
	}
	rejections := []Rejection{""}
	for _, r := range constantsOf(t, "rejection.go", "Rejection") {
		rejections = append(rejections, Rejection(r))
	}
	for name, token := range tokens {
		for _, reason := range Reasons() {
			for _, rejection := range rejections {
				for _, code := range []string{"", "900421", "20002", "900308", "1"} {
					where := fmt.Sprintf("token %q, reason %s, rejection %q %s", name, reason, rejection, code)
					checkCauses(t, where, token, reason, rejection, Diagnose(token, reason, rejection, code))
				}
			}
		}
	}
}

func checkCauses(t *testing.T, where string, token Token, reason Reason, rejection Rejection, causes []Cause) {
	t.Helper()
	if reason.Good() && rejection == "" {
		if causes != nil {
			t.Errorf("%s: %q, want no causes for a good call", where, said(causes))
		}
		return
	}
	if len(causes) == 0 {
		t.Errorf("%s: no cause", where)
		return
	}
	seen := map[string]bool{}
	for i, c := range causes {
		if c.Code == "" || c.Text == "" || c.Fix == "" || strings.Trim(c.Code, "abcdefghijklmnopqrstuvwxyz_") != "" {
			t.Errorf("%s: cause %+v lacks its code, text or fix", where, c)
		}
		if i > 0 && c.Confidence > causes[i-1].Confidence {
			t.Errorf("%s: %q stand in no order of confidence", where, said(causes))
		}
		if c.Confidence == Certain && !slices.Contains(provable, c.Code) {
			t.Errorf("%s: %s is called certain, which no token proves", where, c.Code)
		}
		if c.Confidence == Certain && strings.HasSuffix(c.Code, "_audience") && token.Audience == "" && reason != ReasonTokenWrongAudience {
			t.Errorf("%s: %s is called certain of a token without an audience", where, c.Code)
		}
		if seen[c.Code] {
			t.Errorf("%s: %s stands twice", where, c.Code)
		}
		seen[c.Code] = true
	}
}

func TestDiagnoseMentionsMicrosoftsOwnClient(t *testing.T) {
	token := but(userToken("pwd"), microsoftsClient)
	for _, tt := range []struct {
		name      string
		token     Token
		reason    Reason
		rejection Rejection
		want      bool
	}{
		{"without MFA", token, ReasonMFAMissing, "", true},
		{"refused by Microsoft", token, ReasonMFAMissing, RejectionMFARequired, true},
		{"with MFA and accepted", but(userToken("mfa"), microsoftsClient), ReasonMFAPresent, "", false},
		{"one's own client", userToken("pwd"), ReasonMFAMissing, "", false},
	} {
		got := said(Diagnose(tt.token, tt.reason, tt.rejection, ""))
		if slices.Contains(got, "first_party_client likely") != tt.want {
			t.Errorf("%s: %q, want first_party_client among them: %v", tt.name, got, tt.want)
		}
	}
}

func TestConfidence(t *testing.T) {
	if !(Certain > Likely && Likely > Possible) {
		t.Error("want Certain > Likely > Possible")
	}
	for c, want := range map[Confidence]string{Certain: "certain", Likely: "likely", Possible: "possible"} {
		if got := c.String(); got != want {
			t.Errorf("Confidence %d = %q, want %q", c, got, want)
		}
	}
}
