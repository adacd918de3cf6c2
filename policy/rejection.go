package policy

// Rejection is the kind of a 401 or 403 that Microsoft answered.
type Rejection string

const (
	RejectionMFARequired        Rejection = "mfa_required"         // the MFA claim was missing: 900421 and its older and newer shapes
	RejectionAudienceRefused    Rejection = "audience_refused"     // 900420: the token is for another API
	RejectionTokenRefused       Rejection = "token_refused"        // the token itself: expired, malformed, missing, 800001
	RejectionClaimsChallenge    Rejection = "claims_challenge"     // insufficient_claims: the client must fetch a better token (CAE)
	RejectionConditionalAccess  Rejection = "conditional_access"   // 900309
	RejectionAppOnlyUnsupported Rejection = "app_only_unsupported" // 900329: the resource wants a user
	RejectionOther              Rejection = "other"                // roles, business rules, anything else
)

// Compliant is Microsoft's own verdict on a call, from the isMfaCompliant header.
type Compliant uint8

const (
	CompliantUnknown Compliant = iota // not reported
	CompliantTrue
	CompliantFalse
)
