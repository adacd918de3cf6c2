package policy

import "slices"

// Token is what a bearer token says. Unless Verified, it is only what the token
// claims: shown as claimed, never evidence, never a label.
type Token struct {
	Verified bool
	Kind     Kind
	MFA      MFA

	Version  string // ver: "1.0" or "2.0"
	TenantID string // tid, lower case
	AppID    string // appid (v1) or azp (v2), lower case
	ObjectID string // oid, lower case: the user, or the service principal of an app-only token
	UPN      string // upn, else unique_name, else preferred_username; empty for app-only
	Issuer   string
	Audience string
	IdP      string   // idp: the user's home issuer when a guest
	AppAuth  string   // appidacr or azpacr: "0" public, "1" secret, "2" certificate
	UTI      string   // joins Entra's sign-in log (uniqueTokenIdentifier)
	AMR      []string // amr as it stands, strings only

	IssuedAt  int64 // seconds since 1970; 0 when absent
	NotBefore int64
	ExpiresAt int64
}

// Kind is whom a token stands for.
type Kind uint8

const (
	KindUndecided Kind = iota // judged as KindAppUser
	KindAppUser
	KindAppOnly
	KindOpaque // not readable
)

// String returns the word of the record; "undecided" for the zero value.
func (k Kind) String() string {
	switch k {
	case KindAppUser:
		return "app_user"
	case KindAppOnly:
		return "app_only"
	case KindOpaque:
		return "opaque"
	}
	return "undecided"
}

// MFA is what a token proves about multifactor authentication.
type MFA uint8

const (
	MFAUnknown       MFA = iota // cannot be judged
	MFAAbsent                   // amr was readable and holds no MFA value
	MFAPresent                  // amr holds one of the accepted values
	MFANotApplicable            // app-only
)

// String returns the word of the record and of Partnerguard-Mfa.
func (m MFA) String() string {
	switch m {
	case MFAAbsent:
		return "absent"
	case MFAPresent:
		return "present"
	case MFANotApplicable:
		return "not_applicable"
	}
	return "unknown"
}

// AMRForm is how the amr claim was found.
type AMRForm uint8

const (
	AMRMissing   AMRForm = iota // no such claim, or null
	AMRStrings                  // an array of strings, possibly empty
	AMRMalformed                // anything else: a string, an object, a nested array, a non-string element
)

// DefaultMFAValues are the amr values that prove MFA unless configured otherwise.
// Microsoft documents mfa, and ngcmfa as its equivalent; which others the service
// accepts is unknown.
var defaultMFAValues = [...]string{"mfa", "ngcmfa"}

// DefaultMFAValues returns the amr values that prove MFA unless configured
// otherwise: mfa and ngcmfa. Which others Partner Center accepts is unknown.
func DefaultMFAValues() []string { return slices.Clone(defaultMFAValues[:]) }

// AllowedMFAValues returns the amr values that mfa_values may hold.
func AllowedMFAValues() []string { return []string{"mfa", "ngcmfa", "wiaormfa"} }

// JudgeMFA reads the MFA claim of a user token. version is "1.0" or "2.0": Entra
// documents amr for v1 tokens only, so a v2 token without it says nothing.
func JudgeMFA(version string, form AMRForm, amr, accepted []string) MFA {
	switch form {
	case AMRMalformed:
		return MFAUnknown
	case AMRMissing:
		if version == "2.0" {
			return MFAUnknown
		}
		return MFAAbsent
	}
	for _, v := range amr {
		if slices.Contains(accepted, v) {
			return MFAPresent
		}
	}
	return MFAAbsent
}

// TokenError is why a token did not verify. Every failure of a verifier is one.
type TokenError struct {
	Reason Reason
	// Claimed is what the token says of itself, for the account only.
	Claimed Token
	// Err is the cause, when there is one beyond the Reason. It never holds any
	// part of the token.
	Err error
}

func (e *TokenError) Error() string {
	if e.Err == nil {
		return string(e.Reason)
	}
	return string(e.Reason) + ": " + e.Err.Error()
}

func (e *TokenError) Unwrap() error { return e.Err }
