package policy

import (
	"cmp"
	"slices"
	"strings"
)

// Cause is one explanation of a call that lacks the proof or that Microsoft
// refused, in the partner's terms, with the way out. The causes and cures are
// those of Microsoft's guidance for partners and of field reports; which of
// several fits, a token alone often cannot tell.
type Cause struct {
	Code       string // stable: refresh_token_without_mfa, password_grant, …
	Text       string // what happened
	Fix        string // what to do
	Confidence Confidence
}

// Confidence is how sure a Cause is.
type Confidence uint8

const (
	Possible Confidence = iota
	Likely
	Certain // the token itself, or a sign-in record joined by uti, proves it
)

// String returns the word of the report.
func (c Confidence) String() string {
	switch c {
	case Certain:
		return "certain"
	case Likely:
		return "likely"
	}
	return "possible"
}

// Diagnose explains why a call lacks the proof, or why Microsoft refused it:
// candidates in the order of their probability, the best first. reason is the
// guard's own, rejection and code are Microsoft's answer (empty when it did not
// refuse). A call that proved MFA and was not refused has no causes.
func Diagnose(t Token, reason Reason, rejection Rejection, code string) []Cause {
	var causes []Cause
	switch rejection {
	case RejectionMFARequired:
		causes = missingMFA(t, reason)
	case "":
		causes = ownReason(t, reason)
	default:
		causes = refusal(t, reason, rejection, code)
	}
	if len(causes) > 0 && t.AppID != "" && FirstParty(t.AppID) && (reason == ReasonMFAMissing || rejection != "") {
		causes = append(causes, with(Likely, firstPartyClient))
	}
	slices.SortStableFunc(causes, func(a, b Cause) int { return cmp.Compare(b.Confidence, a.Confidence) })
	return causes
}

func with(c Confidence, cause Cause) Cause {
	cause.Confidence = c
	return cause
}

var (
	passwordGrant = Cause{
		Code: "password_grant",
		Text: "The token comes from the password grant (ROPC), which cannot do MFA at all.",
		Fix:  "Move to the Secure Application Model: sign in once interactively with MFA and store the refresh token. Where the API allows app-only calls, use client credentials instead.",
	}
	refreshWithoutMFA = Cause{
		Code: "refresh_token_without_mfa",
		Text: "The stored refresh token was minted in a sign-in without MFA; every access token from it lacks the claim until someone signs in anew.",
		Fix:  "Redo the consent in a private browser window with amr_values=mfa (or a Conditional Access policy that requires MFA) and replace the stored refresh token.",
	}
	federatedWithoutMFA = Cause{
		Code: "federated_idp_without_mfa",
		Text: "The user signs in at a federated identity provider that does not tell Entra about MFA.",
		Fix:  "Let the provider emit the authnmethodsreferences claim with http://schemas.microsoft.com/claims/multipleauthn and set federatedIdpMfaBehavior, or let Entra do the MFA (rejectMfaByFederatedIdp). Look for rules that skip MFA inside the corporate network.",
	}
	trustedLocation = Cause{
		Code: "trusted_location",
		Text: "A Conditional Access policy or a trusted network let this sign-in through without MFA.",
		Fix:  "Require MFA for this user and the Partner Center app with no location exclusion, then sign in again from another network.",
	}
	customControl = Cause{
		Code: "third_party_custom_control",
		Text: "A third-party MFA attached as a Conditional Access custom control was passed, but Entra does not record it in the token.",
		Fix:  "Move the provider to an external authentication method (EAM) or to federation.",
	}
	guestMFANotTrusted = Cause{
		Code: "guest_mfa_not_trusted",
		Text: "The user is a guest, and MFA done in the home tenant is not trusted here.",
		Fix:  "Trust MFA in the inbound cross-tenant access settings, or let the guest register MFA in this tenant.",
	}
	singleFactorStrong = Cause{
		Code: "single_factor_strong_method",
		Text: "The user proved one strong method, which Entra did not count as MFA.",
		Fix:  "Require an MFA authentication strength for this user and sign in again.",
	}
	firstPartyClient = Cause{
		Code: "first_party_client",
		Text: "The token was fetched with one of Microsoft's own client ids, which anyone may use; it tells no integrations apart.",
		Fix:  "Register an application of your own for this integration and consent it with MFA.",
	}
	exchangedToken = Cause{
		Code: "generatetoken_exchange",
		Text: "The token cannot be read: it looks like one that Partner Center issued (/generatetoken), not Entra, so its MFA state is hidden.",
		Fix:  "Look at the token that was sent to /generatetoken, or call with Entra's token directly.",
	}
	cachedToken = Cause{
		Code: "cached_token",
		Text: "The client goes on using a token from before the sign-in was repaired.",
		Fix:  "Restart the client, or purge its token cache; a cached token lives for up to about 90 minutes.",
	}
	claimNotAccepted = Cause{
		Code: "mfa_claim_not_accepted",
		Text: "The token names an MFA method, yet Microsoft does not accept it as MFA. Only the value mfa is documented to count.",
		Fix:  "Sign in again with a second factor that Entra records as mfa, and leave only mfa in entra.mfa_values.",
	}
	appOnlyRefusedForMFA = Cause{
		Code: "app_only_where_user_needed",
		Text: "An app-only token was refused for missing MFA, as Graph's partner security APIs are reported to do.",
		Fix:  "Call this API with a user's token that has MFA.",
	}
)

// missingMFA ranks why a user token has no MFA claim, or why Microsoft says so.
func missingMFA(t Token, reason Reason) []Cause {
	has := func(v string) bool { return slices.Contains(t.AMR, v) }
	switch {
	case t.Kind == KindOpaque || reason.Unverifiable():
		return []Cause{with(Likely, exchangedToken), with(Possible, refreshWithoutMFA), with(Possible, passwordGrant)}
	case t.Kind == KindAppOnly:
		return []Cause{with(Likely, appOnlyRefusedForMFA)}
	case t.MFA == MFAPresent:
		return []Cause{with(Likely, claimNotAccepted), with(Possible, cachedToken)}
	}
	var causes []Cause
	switch {
	case has("fed") || has("wia"):
		causes = []Cause{with(Likely, federatedWithoutMFA), with(Possible, trustedLocation)}
	case has("pwd") && t.AppAuth == "0":
		// A public client with a password: the grant first, an old sign-in second.
		causes = []Cause{with(Likely, passwordGrant), with(Likely, refreshWithoutMFA), with(Possible, trustedLocation), with(Possible, customControl)}
	case has("rsa") || has("fido") || has("hwk") || has("swk"):
		causes = []Cause{with(Likely, singleFactorStrong), with(Possible, refreshWithoutMFA), with(Possible, trustedLocation)}
	default:
		causes = []Cause{with(Likely, refreshWithoutMFA), with(Likely, passwordGrant), with(Possible, trustedLocation), with(Possible, customControl)}
	}
	if t.guest() {
		causes = append([]Cause{with(Likely, guestMFANotTrusted)}, causes...)
	}
	return causes
}

// guest reports whether the user's home is another tenant or provider.
func (t *Token) guest() bool {
	return t.Kind != KindAppOnly && t.IdP != "" && t.TenantID != "" && !strings.Contains(t.IdP, t.TenantID)
}

const legacyAudienceFix = "Request the token with resource=https://api.partnercenter.microsoft.com. The archived .NET SDK does this only when its defaults are overridden."

// ownReason explains a reason of the guard's.
func ownReason(t Token, r Reason) []Cause {
	one := func(c Confidence, code, text, fix string) []Cause {
		return []Cause{{Code: code, Text: text, Fix: fix, Confidence: c}}
	}
	switch r {
	case ReasonMFAMissing:
		return missingMFA(t, r)
	case ReasonMFAUnknown:
		return one(Likely, "mfa_claim_unreadable",
			"The token's amr claim is absent from a v2 token or has an unknown form, so nobody can tell whether MFA was done.",
			"Request the token from Entra's v1 endpoint with resource=https://api.partnercenter.microsoft.com, and look at its amr with partnerguard explain.")
	case ReasonTokenOpaque, ReasonTokenEncrypted:
		return []Cause{with(Likely, exchangedToken)}
	case ReasonTokenGraphNonce:
		return one(Likely, "token_of_another_api",
			"The token has the nonce header of tokens that only their own API can verify, such as Microsoft Graph's.",
			"Request the token for https://api.partnercenter.microsoft.com.")
	case ReasonTokenMissing:
		return one(Certain, "no_bearer_token",
			"The call carries no bearer token.",
			"Send Authorization: Bearer with an Entra access token. A client that got no token may be hiding an error of the token endpoint.")
	case ReasonTokenExpired:
		return one(Likely, "token_kept_too_long",
			"The client goes on using a token after its end.",
			"Fetch a new token before expires_on, with a margin of some minutes; check the clock of the machine.")
	case ReasonTokenNotYetValid:
		return one(Likely, "clock_wrong",
			"The token is not valid yet by this clock.",
			"Compare the clocks of this machine and the client with a time server.")
	case ReasonTokenWrongAudience:
		if strings.Contains(t.Audience, "graph.windows.net") || strings.Contains(t.Audience, "graph.chinacloudapi.cn") {
			return one(Certain, "legacy_audience",
				"The token is for "+t.Audience+", which Partner Center has refused since 31 August 2025 (900420).",
				legacyAudienceFix)
		}
		return one(Certain, "wrong_audience",
			"The token is for another API"+quoted(t.Audience)+".",
			"Request the token with resource=https://api.partnercenter.microsoft.com.")
	case ReasonTokenWrongTenant:
		return one(Likely, "wrong_tenant",
			"The token is of a tenant that is not accepted here"+quoted(t.TenantID)+".",
			"Sign in at the partner tenant, or add the tenant to tenants.")
	case ReasonTokenWrongIssuer:
		return one(Likely, "wrong_issuer",
			"The token's issuer is not Entra of this cloud"+quoted(t.Issuer)+".",
			"Check cloud in the configuration and the login host of the client.")
	case ReasonTokenUnknownKey, ReasonTokenBadSignature:
		return one(Likely, "not_issued_by_entra",
			"No published key of Entra signed this token: it is altered, cut, or from elsewhere.",
			"Fetch a new token and send it unchanged.")
	case ReasonTokenMalformed, ReasonTokenTooLong, ReasonTokenMissingKid, ReasonTokenCriticalHeader,
		ReasonTokenDuplicateClaim, ReasonTokenUnsupportedAlgorithm:
		return one(Likely, "not_an_entra_token",
			"What stands behind Bearer is no token that Entra issues ("+string(r)+").",
			"Fetch a token from Entra's token endpoint and send access_token unchanged; look at it with partnerguard explain.")
	case ReasonKeysUnavailable:
		return one(Likely, "keys_unavailable",
			"The guard has no keys of Entra to verify with.",
			"Let the guard reach the login host (proxy, firewall), see /readyz?verbose.")
	case ReasonVerifyOverloaded, ReasonInternalError, ReasonLedgerUnavailable:
		return one(Likely, string(r),
			"The guard itself could not do its work ("+string(r)+").",
			"See the guard's log and /readyz?verbose.")
	case ReasonRequestAmbiguous, ReasonMethodRefused, ReasonIntegrationUnknown, ReasonLimitExceeded:
		return one(Likely, string(r), "The guard does not forward such a request in any mode ("+string(r)+").",
			"Send it in one unmistakable form, with a method of Partner Center, to a configured base URL, and not more at once than the guard's limits allow.")
	case ReasonUpstreamUnreachable, ReasonUpstreamTimeout, ReasonUpstreamCircuitOpen:
		return one(Likely, string(r), "Partner Center did not answer the guard ("+string(r)+").",
			"Look at the network between the guard and Partner Center, and at Microsoft's service health; repeat the call only if that is safe.")
	}
	return nil
}

// refusal explains a 401 or 403 of Microsoft's other than for MFA.
func refusal(t Token, reason Reason, k Rejection, code string) []Cause {
	one := func(c Confidence, code, text, fix string) []Cause {
		return []Cause{{Code: code, Text: text, Fix: fix, Confidence: c}}
	}
	switch k {
	case RejectionAudienceRefused:
		if code == "900420" && t.Audience == "" {
			// The record keeps no audience, but Microsoft has a code of its own for the
			// one that it no longer serves.
			return one(Likely, "legacy_audience",
				"The token is for an audience that Partner Center no longer serves, such as https://graph.windows.net (900420).",
				legacyAudienceFix)
		}
		causes := ownReason(t, ReasonTokenWrongAudience)
		if reason != ReasonTokenWrongAudience && causes[0].Code != "legacy_audience" {
			// Microsoft's word, not the token's.
			causes[0].Confidence, causes[0].Text = Likely, "Microsoft takes the token to be for another API than Partner Center (900420)."
		}
		return causes
	case RejectionTokenRefused:
		if causes := ownReason(t, reason); causes != nil && !reason.Infrastructure() {
			return causes
		}
		return one(Possible, "token_refused",
			"Microsoft refused the token itself: it may be revoked, or its user or application disabled.",
			"Fetch a new token; look at the user, the consent and the application in Entra.")
	case RejectionClaimsChallenge:
		return one(Likely, "claims_challenge",
			"Microsoft asks for a token with more claims (continuous access evaluation or Conditional Access).",
			"Let the client pass the claims of WWW-Authenticate to its next token request.")
	case RejectionConditionalAccess:
		return one(Likely, "conditional_access",
			"A Conditional Access policy blocks the call inside Microsoft's service (900309).",
			"Adapt the policy for this account's path without excluding it from MFA.")
	case RejectionAppOnlyUnsupported:
		return one(Likely, "app_only_unsupported",
			"This resource wants a user's token; app-only is not supported.",
			"Call it with the Secure Application Model (app+user with MFA).")
	}
	switch code {
	case "20002":
		return one(Likely, "no_customer_relationship",
			"The partner has no commerce relationship with this customer.",
			"Check the customer's id and the reseller relationship.")
	case "900308", "900150":
		return one(Likely, "insufficient_role",
			"The user or application lacks the Partner Center role for this call.",
			"Give it the role (AdminAgents, HelpdeskAgents, billing, …).")
	}
	return one(Possible, "refused_by_partner_center",
		"Microsoft refused the call for a reason of its own; this is not the MFA check.",
		"Read the body of the answer; most 403 codes are business rules.")
}

// quoted returns " (s)", or nothing.
func quoted(s string) string {
	if s == "" {
		return ""
	}
	return " (" + s + ")"
}
