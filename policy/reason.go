package policy

import "net/http"

// Reason says why a call was decided as it was: one stable code, the same in the
// log, the metrics, the headers, the record and the error body.
type Reason string

const (
	ReasonMFAPresent Reason = "mfa_present" // verified, and amr proves MFA
	ReasonAppOnly    Reason = "app_only"    // verified, no user: exempt from MFA

	ReasonMFAMissing Reason = "mfa_missing" // verified user token whose amr has no MFA value
	ReasonMFAUnknown Reason = "mfa_unknown" // verified user token whose amr cannot be judged

	ReasonTokenMissing              Reason = "token_missing" // no Authorization, or another scheme than Bearer
	ReasonTokenMalformed            Reason = "token_malformed"
	ReasonTokenTooLong              Reason = "token_too_long" // more than 16 KiB
	ReasonTokenMissingKid           Reason = "token_missing_kid"
	ReasonTokenCriticalHeader       Reason = "token_critical_header" // RFC 7515 section 4.1.11
	ReasonTokenDuplicateClaim       Reason = "token_duplicate_claim" // also claims told apart only by case
	ReasonTokenUnsupportedAlgorithm Reason = "token_unsupported_algorithm"
	ReasonTokenExpired              Reason = "token_expired"
	ReasonTokenNotYetValid          Reason = "token_not_yet_valid"
	ReasonTokenWrongAudience        Reason = "token_wrong_audience"
	ReasonTokenWrongIssuer          Reason = "token_wrong_issuer"
	ReasonTokenWrongTenant          Reason = "token_wrong_tenant"
	ReasonTokenBadSignature         Reason = "token_bad_signature"
	ReasonTokenUnknownKey           Reason = "token_unknown_key"

	ReasonTokenOpaque     Reason = "token_opaque"      // not a JWT, such as those of /generatetoken
	ReasonTokenEncrypted  Reason = "token_encrypted"   // JWE: five parts
	ReasonTokenGraphNonce Reason = "token_graph_nonce" // nonce header, and the hashed-nonce check failed too

	ReasonKeysUnavailable   Reason = "keys_unavailable"   // no key set, and none could be fetched
	ReasonVerifyOverloaded  Reason = "verify_overloaded"  // no verification slot within 250 ms
	ReasonInternalError     Reason = "internal_error"     // a panic before forwarding
	ReasonLedgerUnavailable Reason = "ledger_unavailable" // ledger.on_failure: reject, and it cannot write

	ReasonRequestAmbiguous   Reason = "request_ambiguous"   // two readers could read it differently
	ReasonMethodRefused      Reason = "method_refused"      // CONNECT, TRACE, TRACK
	ReasonIntegrationUnknown Reason = "integration_unknown" // /i/{name}/ of a name that is not configured
	ReasonLimitExceeded      Reason = "limit_exceeded"

	ReasonUpstreamUnreachable Reason = "upstream_unreachable"
	ReasonUpstreamTimeout     Reason = "upstream_timeout"
	ReasonUpstreamCircuitOpen Reason = "upstream_circuit_open"
)

// Good reports whether the call proved what enforcement asks for.
func (r Reason) Good() bool { return r == ReasonMFAPresent || r == ReasonAppOnly }

// Unverifiable reports whether the token is of a kind that no published key can
// verify, as opposed to one that is wrong.
func (r Reason) Unverifiable() bool {
	return r == ReasonTokenOpaque || r == ReasonTokenEncrypted || r == ReasonTokenGraphNonce
}

// Infrastructure reports whether the guard itself could not do its work, so that
// the reason says nothing about the caller.
func (r Reason) Infrastructure() bool {
	switch r {
	case ReasonKeysUnavailable, ReasonVerifyOverloaded, ReasonInternalError, ReasonLedgerUnavailable:
		return true
	}
	return false
}

// refusedInEveryMode holds for requests that two readers could understand
// differently, or that no mode may forward.
func (r Reason) refusedInEveryMode() bool {
	switch r {
	case ReasonRequestAmbiguous, ReasonMethodRefused, ReasonIntegrationUnknown, ReasonLimitExceeded:
		return true
	}
	return false
}

// Status is the HTTP status of a refusal for this reason; 200 for the good ones,
// which are never refused.
func (r Reason) Status() int {
	switch r {
	case ReasonMFAPresent, ReasonAppOnly:
		return http.StatusOK
	case ReasonKeysUnavailable, ReasonVerifyOverloaded, ReasonInternalError, ReasonLedgerUnavailable, ReasonUpstreamCircuitOpen:
		return http.StatusServiceUnavailable
	case ReasonRequestAmbiguous:
		return http.StatusBadRequest
	case ReasonMethodRefused:
		return http.StatusMethodNotAllowed
	case ReasonIntegrationUnknown:
		return http.StatusNotFound
	case ReasonUpstreamUnreachable:
		return http.StatusBadGateway
	case ReasonUpstreamTimeout:
		return http.StatusGatewayTimeout
	case ReasonLimitExceeded:
		return http.StatusTooManyRequests
	}
	return http.StatusUnauthorized
}

// Reasons lists every reason in the order of the documentation.
func Reasons() []Reason {
	return []Reason{
		ReasonMFAPresent, ReasonAppOnly, ReasonMFAMissing, ReasonMFAUnknown,
		ReasonTokenMissing, ReasonTokenMalformed, ReasonTokenTooLong, ReasonTokenMissingKid, ReasonTokenCriticalHeader,
		ReasonTokenDuplicateClaim, ReasonTokenUnsupportedAlgorithm, ReasonTokenExpired, ReasonTokenNotYetValid,
		ReasonTokenWrongAudience, ReasonTokenWrongIssuer, ReasonTokenWrongTenant, ReasonTokenBadSignature, ReasonTokenUnknownKey,
		ReasonTokenOpaque, ReasonTokenEncrypted, ReasonTokenGraphNonce,
		ReasonKeysUnavailable, ReasonVerifyOverloaded, ReasonInternalError, ReasonLedgerUnavailable,
		ReasonRequestAmbiguous, ReasonMethodRefused, ReasonIntegrationUnknown, ReasonLimitExceeded,
		ReasonUpstreamUnreachable, ReasonUpstreamTimeout, ReasonUpstreamCircuitOpen,
	}
}
