// Package policy decides what the guard does with a call: a pure function from
// what is known of the call (its verified token, how it arrived, what it asks
// for) to a Decision. It does no I/O and reads no clock; everything it needs
// comes in as data, so every decision can be replayed from its record.
//
// The words (mode, effect, reason, integration, rule) are those of the
// configuration, the ledger, the headers and the metrics alike.
package policy

import (
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"time"
)

// Policy is one immutable configuration of modes, integrations and rules. It is
// safe for concurrent use. The zero Policy refuses every call.
type Policy struct {
	mode           Mode
	onUnverifiable OnUnverifiable
	tenants        []string
	integrations   []Integration
	rules          []rule
	byName         map[string]*Integration
	prefixes       map[string]struct{} // names that /i/{name}/ knows
	auditOnly      bool
	routed         bool // some rule looks at the path
}

// Config is what New needs. Mode is required.
type Config struct {
	// Mode holds where neither a rule nor the integration says otherwise.
	Mode Mode
	// Tenants are the partner tenants whose tokens are accepted, as lower-case
	// GUIDs. Empty accepts any while every mode is audit; any other mode needs it.
	Tenants []string
	// Integrations are the calling programs, in the order of the file.
	Integrations []Integration
	// Rules are tried in order; the first that matches gives the mode.
	Rules []Rule
	// OnUnverifiable is what happens to tokens that no key set can verify
	// (opaque, encrypted, hashed nonce). Zero is AsMode.
	OnUnverifiable OnUnverifiable
}

// FieldError is a mistake in a Config, with the place in the words of the
// configuration file ("rules[0].percent") so that a loader can add the line.
type FieldError struct {
	Path    string // where: "integrations[2].match.app_id[0]"
	Problem string // what is wrong, lower case
	Hint    string // what to write instead; may be empty
}

func (e *FieldError) Error() string {
	if e.Hint == "" {
		return e.Path + ": " + e.Problem
	}
	return e.Path + ": " + e.Problem + "; " + e.Hint
}

// New checks cfg whole and returns the Policy. The error joins a *FieldError for
// every mistake found.
func New(cfg Config) (*Policy, error) {
	var errs []error
	bad := func(path, problem, hint string) {
		errs = append(errs, &FieldError{Path: path, Problem: problem, Hint: hint})
	}
	if cfg.Mode == Inherit || !cfg.Mode.valid() {
		bad("mode", "is required", "write audit, tag or enforce")
	}
	if cfg.OnUnverifiable > RejectUnverifiable {
		bad("entra.on_unverifiable", "is not known", "write as_mode, forward or reject")
	}
	p := &Policy{
		mode:           cfg.Mode,
		onUnverifiable: cfg.OnUnverifiable,
		byName:         make(map[string]*Integration, len(cfg.Integrations)),
		prefixes:       make(map[string]struct{}, len(cfg.Integrations)),
		integrations:   slices.Clone(cfg.Integrations),
		auditOnly:      cfg.Mode == Audit,
	}
	for i, t := range cfg.Tenants {
		if !IsGUID(t) {
			bad(fmt.Sprintf("tenants[%d]", i), fmt.Sprintf("%q is not a tenant id", t), "write the tenant's GUID, such as 1b2c3d4e-0a1b-4c2d-8e3f-901234567890")
			continue
		}
		p.tenants = append(p.tenants, strings.ToLower(t))
	}
	for i := range p.integrations {
		in := &p.integrations[i]
		path := fmt.Sprintf("integrations[%d]", i)
		switch {
		case !nameSyntax.MatchString(in.Name):
			bad(path+".name", fmt.Sprintf("%q is not a name", in.Name), "use 1 to 63 of a-z, 0-9 and -")
		case in.Name == Unknown || in.Name == Other:
			bad(path+".name", fmt.Sprintf("%q is reserved for callers that nothing names", in.Name), "choose another name")
		case p.byName[in.Name] != nil:
			bad(path+".name", fmt.Sprintf("%q is used twice", in.Name), "each integration needs its own name")
		default:
			p.byName[in.Name] = in
			p.prefixes[in.Name] = struct{}{}
		}
		if !in.Mode.valid() {
			bad(path+".mode", "is not known", "write audit, tag or enforce")
		}
		p.auditOnly = p.auditOnly && (in.Mode == Inherit || in.Mode == Audit)
		in.Match = in.Match.normalised(path+".match", bad)
		in.evidence = in.Match.evidence()
		for _, prefix := range in.Match.PathPrefix {
			if name, _, ok := CutIntegration(prefix + "/"); ok {
				p.prefixes[name] = struct{}{}
			}
		}
	}
	for i, r := range cfg.Rules {
		path := fmt.Sprintf("rules[%d]", i)
		p.rules = append(p.rules, compileRule(r, path, p, bad))
		p.routed = p.routed || len(r.Routes) > 0
		p.auditOnly = p.auditOnly && (r.Mode == Audit || r.Mode == Inherit) // Inherit was reported
	}
	if !p.auditOnly && len(p.tenants) == 0 && cfg.Mode != Inherit {
		bad("tenants", "is required as soon as any mode is tag or enforce, also in the future", "list the partner tenants whose tokens are accepted")
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return p, nil
}

// AuditOnly reports whether no call can be tagged or refused for its token: the
// global mode, every integration and every rule, also of the future, is audit.
func (p *Policy) AuditOnly() bool { return p.auditOnly }

// Mode returns the global mode.
func (p *Policy) Mode() Mode { return p.mode }

// Tenants returns the accepted tenants, lower case. The caller must not change it.
func (p *Policy) Tenants() []string { return p.tenants }

// Integrations returns the configured integrations in order. The caller must not
// change them.
func (p *Policy) Integrations() []Integration { return p.integrations }

// KnowsPrefix reports whether /i/{name}/ belongs to a configured integration.
func (p *Policy) KnowsPrefix(name string) bool {
	_, ok := p.prefixes[name]
	return ok
}

// Call is what is known of one call when it is decided.
type Call struct {
	Time   time.Time // when the call began
	Method string
	// Path is the path that goes upstream, byte for byte, without the query and
	// without /i/{name}.
	Path string
	// Token is what the bearer token says. Token.Verified tells whether its
	// signature and claims held; only then is it evidence.
	Token Token
	// TokenReason is why the token did not verify; empty when it did.
	TokenReason Reason
	// Refusal is set when the request itself must be refused whatever the mode:
	// ReasonRequestAmbiguous, ReasonMethodRefused, ReasonIntegrationUnknown or ReasonLimitExceeded.
	Refusal Reason
	// Evidence is how the call arrived.
	Evidence Evidence
	// Attribution is whose call it is: the result of Attribute.
	Attribution Attribution
}

// Evidence is what a call shows of its origin besides its token.
type Evidence struct {
	Listener            string     // name of the listener it came in by
	ListenerIntegration string     // integration that the listener belongs to, if it has its own
	ClientCert          []string   // subject names of a verified client certificate
	Peer                netip.Addr // TCP peer
	Host                string     // Host header without port, lower case
	Prefix              string     // name in /i/{name}/, if any
	Application         string     // MS-PartnerCenter-Application
	UserAgent           string
}

// Decision is what the guard does with a call and why. The zero value refuses.
type Decision struct {
	Effect Effect
	Reason Reason
	Mode   Mode
	// Rule names the rule that gave the mode; empty when the integration or the
	// global mode did.
	Rule string
	// WouldReject is what enforce would do with this call, whatever its mode,
	// percent and dates.
	WouldReject bool
}

// Decide returns what happens to c. It is a pure function of p and c, and safe
// for concurrent use.
func (p *Policy) Decide(c *Call) Decision {
	d := Decision{Reason: p.reason(c)}
	d.Mode, d.Rule = p.resolve(c)
	if d.Reason.refusedInEveryMode() {
		d.WouldReject = true
		return d
	}
	d.WouldReject = p.effect(Enforce, d.Reason) == Reject
	d.Effect = p.effect(d.Mode, d.Reason)
	return d
}

// reason is the single reason that stands for the call.
func (p *Policy) reason(c *Call) Reason {
	switch {
	case c.Refusal != "":
		return c.Refusal
	case p.mode == Inherit:
		return ReasonInternalError // a Policy that New did not make
	case c.TokenReason != "":
		return c.TokenReason
	case !c.Token.Verified:
		// Neither verified nor told why not: someone forgot to say. Refuse.
		return ReasonInternalError
	case c.Token.Kind == KindAppOnly:
		return ReasonAppOnly
	}
	switch c.Token.MFA {
	case MFAPresent:
		return ReasonMFAPresent
	case MFAAbsent:
		return ReasonMFAMissing
	default:
		return ReasonMFAUnknown
	}
}

// effect is the matrix of modes and reasons.
func (p *Policy) effect(m Mode, r Reason) Effect {
	if m == Audit || r.Good() {
		return Allow
	}
	if r.Unverifiable() {
		switch p.onUnverifiable {
		case ForwardUnverifiable:
			return Tag
		case RejectUnverifiable:
			return Reject
		}
	}
	if m == TagMode {
		return Tag
	}
	return Reject
}

// IsGUID reports whether s has the form of a GUID: 8-4-4-4-12 hexadecimal digits.
func IsGUID(s string) bool {
	if len(s) != 36 {
		return false
	}
	for i := range len(s) {
		switch c := s[i]; {
		case i == 8 || i == 13 || i == 18 || i == 23:
			if c != '-' {
				return false
			}
		case c >= '0' && c <= '9', c >= 'a' && c <= 'f', c >= 'A' && c <= 'F':
		default:
			return false
		}
	}
	return true
}

var nameSyntax = regexp.MustCompile(`^[a-z0-9-]{1,63}$`)
