package report

import (
	"cmp"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"github.com/partnerguard/partnerguard/policy"
	"github.com/partnerguard/partnerguard/telemetry/store"
)

// Verdict is how ready something is. Smaller is worse.
type Verdict uint8

const (
	Breaking  Verdict = iota + 1 // Microsoft refuses it for missing MFA
	WillBreak                    // its latest token has no MFA
	Unknown                      // nothing that it sent could be verified, or it sent nothing
	Ready
)

// String returns the word of the report.
func (v Verdict) String() string {
	switch v {
	case Breaking:
		return "breaking"
	case WillBreak:
		return "will-break"
	case Ready:
		return "ready"
	}
	return "unknown"
}

// MarshalJSON writes the word.
func (v Verdict) MarshalJSON() ([]byte, error) { return json.Marshal(v.String()) }

// UnmarshalJSON reads the word.
func (v *Verdict) UnmarshalJSON(b []byte) error {
	var s string
	if err := json.Unmarshal(b, &s); err != nil {
		return err
	}
	for *v = Breaking; *v <= Ready; *v++ {
		if s == v.String() {
			return nil
		}
	}
	return fmt.Errorf("verdict %q is not known", s)
}

// pairKey is an app and a user: what has one stored credential, and so one fate.
type pairKey struct{ app, user string }

// pair is the evidence on an app and a user. Times are those of the latest such call.
type pair struct {
	refused  time.Time // Microsoft refused it for missing MFA
	proved   time.Time // it bore MFA, and Microsoft accepted it
	accepted time.Time // Microsoft accepted it
	missing  time.Time // verified, without MFA
	unclear  time.Time // verified, but whether it has MFA cannot be judged
	verified time.Time // verified, otherwise
	sums     []store.Sum
}

func (p *pair) add(s store.Sum) {
	p.sums = append(p.sums, s)
	latest := func(t *time.Time) {
		if s.Last.After(*t) {
			*t = s.Last
		}
	}
	if s.Rejection == string(policy.RejectionMFARequired) {
		latest(&p.refused)
	}
	if accepted(s) {
		latest(&p.accepted)
		if s.Verified && s.MFA == policy.MFAPresent.String() {
			latest(&p.proved)
		}
	}
	switch {
	case withoutMFA(s):
		latest(&p.missing)
	case s.Verified && s.MFA == policy.MFAUnknown.String():
		latest(&p.unclear)
	case s.Verified:
		latest(&p.verified)
	}
}

// accepted reports whether Microsoft let the calls through: it answered, and with
// a success. What the guard refused never came to it.
func accepted(s store.Sum) bool {
	return s.Effect != policy.Reject.String() && s.Rejection == "" && s.Status >= 200 && s.Status < 400
}

// withoutMFA reports whether the calls bore verified tokens without MFA. The
// reason alone would not do: of a call that is refused for its path it names the path.
func withoutMFA(s store.Sum) bool {
	return s.Verified && (s.Reason == string(policy.ReasonMFAMissing) || s.MFA == policy.MFAAbsent.String())
}

// verdict lets the latest evidence count, so that a fixed script turns ready with
// its next call. When calls with and without MFA began in the same microsecond,
// the one without counts as the later. A token whose MFA cannot be judged is no
// proof of readiness: enforce would refuse it.
func (p *pair) verdict() Verdict {
	switch {
	case p.refused.After(p.proved):
		return Breaking
	case !p.missing.IsZero() && !p.missing.Before(p.verified) && !p.missing.Before(p.unclear):
		return WillBreak
	case p.verified.IsZero() || !p.unclear.Before(p.verified):
		return Unknown
	}
	return Ready
}

// evidence are the sums that made the pair's verdict. For a pair that is ready
// these are Microsoft's refusals since it last accepted a call: they are not about
// MFA, and yet worth telling.
func (p *pair) evidence() []store.Sum {
	var is func(store.Sum) bool
	switch p.verdict() {
	case Breaking:
		is = func(s store.Sum) bool {
			return s.Rejection == string(policy.RejectionMFARequired) && s.Last.After(p.proved)
		}
	case WillBreak:
		is = func(s store.Sum) bool {
			return withoutMFA(s) && !s.Last.Before(p.verified) && !s.Last.Before(p.unclear)
		}
	case Unknown:
		is = func(store.Sum) bool { return true }
	default:
		is = func(s store.Sum) bool { return s.Rejection != "" && s.Last.After(p.accepted) }
	}
	return slices.Collect(func(yield func(store.Sum) bool) {
		for _, s := range p.sums {
			if is(s) && !yield(s) {
				return
			}
		}
	})
}

// causes explains the evidence of the pairs that made the verdict: each cause once,
// the surest first, then what explains most calls.
func causes(pairs map[pairKey]*pair, v Verdict) []Cause {
	var evidence []store.Sum
	for _, p := range pairs {
		if p.verdict() == v {
			evidence = append(evidence, p.evidence()...)
		}
	}
	slices.SortFunc(evidence, func(a, b store.Sum) int {
		return cmp.Or(-cmp.Compare(a.Calls, b.Calls), -a.Last.Compare(b.Last), cmp.Compare(a.Reason, b.Reason), cmp.Compare(a.AMR, b.AMR), cmp.Compare(a.Code, b.Code))
	})
	type weighed struct {
		policy.Cause
		calls int64
		place int // among the causes of its best evidence
	}
	var found []weighed
	for _, s := range evidence {
		for place, c := range policy.Diagnose(s.Token(), policy.Reason(s.Reason), policy.Rejection(s.Rejection), s.Code) {
			i := slices.IndexFunc(found, func(w weighed) bool { return w.Code == c.Code })
			if i < 0 {
				found = append(found, weighed{c, s.Calls, place})
				continue
			}
			found[i].calls += s.Calls
			found[i].place = min(found[i].place, place)
			if c.Confidence > found[i].Confidence {
				found[i].Cause = c
			}
		}
	}
	slices.SortStableFunc(found, func(a, b weighed) int {
		return cmp.Or(-cmp.Compare(a.Confidence, b.Confidence), -cmp.Compare(a.calls, b.calls), cmp.Compare(a.place, b.place))
	})
	out := make([]Cause, 0, len(found))
	for _, c := range found {
		out = append(out, causeOf(c.Cause))
	}
	return out
}

func causeOf(c policy.Cause) Cause {
	return Cause{Cause: c.Code, Text: c.Text, Confidence: c.Confidence.String(), Fix: c.Fix}
}
