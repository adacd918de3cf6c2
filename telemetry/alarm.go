package telemetry

import (
	"sync/atomic"

	"github.com/partnerguard/partnerguard/policy"
	"github.com/partnerguard/partnerguard/proxy"
)

// TokenAlarm notices that tokens which could be verified no longer can: Microsoft
// changed their format or their keys, or something on the way does. It compares the
// last seconds with all that was before, so callers whose tokens never were verifiable
// (opaque ones of the old exchange) raise no alarm while others call as well. The zero value is ready. Its
// methods are safe for concurrent use, Look from one goroutine.
type TokenAlarm struct {
	verified, broken atomic.Int64 // calls since the start

	samples [alarmSamples]tokenSample // one a second
	next    int64
	on      bool
}

const alarmSamples = 64

type tokenSample struct{ verified, broken int64 }

// alarmAfter are the spans that are looked at, and how many tokens must fail within
// them: busy estates know soon, quiet ones within a minute.
var alarmAfter = [...]struct{ seconds, broken int64 }{{10, 20}, {60, 5}}

// alarmVerified is how many tokens must have been verified before: fewer prove nothing.
const alarmVerified = 5

// count adds a finished call.
func (a *TokenAlarm) count(rec *proxy.Record) {
	switch {
	case rec.Token.Verified:
		a.verified.Add(1)
	case formatIsToBlame(rec.Reason):
		a.broken.Add(1)
	}
}

// formatIsToBlame reports whether r says that a token could not be read or verified,
// other than by what its caller did: to let it expire, or to ask for the wrong one.
func formatIsToBlame(r policy.Reason) bool {
	switch r {
	case policy.ReasonTokenOpaque, policy.ReasonTokenEncrypted, policy.ReasonTokenGraphNonce,
		policy.ReasonTokenMalformed, policy.ReasonTokenMissingKid, policy.ReasonTokenCriticalHeader,
		policy.ReasonTokenUnsupportedAlgorithm, policy.ReasonTokenDuplicateClaim,
		policy.ReasonTokenBadSignature, policy.ReasonTokenUnknownKey, policy.ReasonTokenWrongIssuer:
		return true
	}
	return false
}

// Look is to be called once a second. It returns how many tokens of the last minute were
// verified and how many could not be, and whether that is the alarm: of the tokens in
// one of the spans half failed, and twice the share that failed before. It stays until
// most of a minute's are verified again.
func (a *TokenAlarm) Look() (verified, broken int64, on bool) {
	now := tokenSample{a.verified.Load(), a.broken.Load()}
	for _, after := range alarmAfter {
		before := a.samples[(a.next-after.seconds+alarmSamples)%alarmSamples]
		verified, broken = now.verified-before.verified, now.broken-before.broken
		share := float64(broken) / float64(max(1, verified+broken))
		usual := float64(before.broken) / float64(max(1, before.verified+before.broken))
		if before.verified >= alarmVerified && broken >= after.broken && share >= max(.5, 2*usual) {
			a.on = true
		}
	}
	if verified > broken {
		a.on = false // a minute without calls proves nothing
	}
	a.samples[a.next%alarmSamples] = now
	a.next++
	return verified, broken, a.on
}
