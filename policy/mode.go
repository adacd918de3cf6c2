package policy

import "fmt"

// Mode is how strictly calls are treated. Greater is stricter.
type Mode uint8

const (
	Inherit Mode = iota // not said: the next more general mode holds; refuses where nothing says more
	Audit               // forward, and record what would happen
	TagMode             // forward, marked with our headers
	Enforce             // refuse what does not prove MFA
)

// Effect is what the guard does with a call.
type Effect uint8

const (
	Reject Effect = iota // the zero value
	Tag
	Allow
)

// OnUnverifiable is what happens to a token that is not wrong but that no
// published key can verify.
type OnUnverifiable uint8

const (
	AsMode              OnUnverifiable = iota // as any other call that lacks the proof
	ForwardUnverifiable                       // in enforce forward it tagged instead of refusing it
	RejectUnverifiable                        // refuse it in tag mode too
)

// String returns the word of the configuration file and the record.
func (m Mode) String() string {
	switch m {
	case Audit:
		return "audit"
	case TagMode:
		return "tag"
	case Enforce:
		return "enforce"
	}
	return ""
}

func (m Mode) valid() bool { return m <= Enforce }

// ParseMode reads audit, tag or enforce.
func ParseMode(s string) (Mode, error) {
	for _, m := range []Mode{Audit, TagMode, Enforce} {
		if s == m.String() {
			return m, nil
		}
	}
	return Inherit, fmt.Errorf("mode %q is not known; write audit, tag or enforce", s)
}

// String returns the word of the record and of Partnerguard-Effect.
func (e Effect) String() string {
	switch e {
	case Allow:
		return "allow"
	case Tag:
		return "tag"
	}
	return "reject"
}

// String returns the word of the configuration file.
func (u OnUnverifiable) String() string {
	switch u {
	case ForwardUnverifiable:
		return "forward"
	case RejectUnverifiable:
		return "reject"
	}
	return "as_mode"
}

// ParseOnUnverifiable reads as_mode, forward or reject.
func ParseOnUnverifiable(s string) (OnUnverifiable, error) {
	for u := AsMode; u <= RejectUnverifiable; u++ {
		if s == u.String() {
			return u, nil
		}
	}
	return AsMode, fmt.Errorf("%q is not known; write as_mode, forward or reject", s)
}
