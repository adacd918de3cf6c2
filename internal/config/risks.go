package config

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/partnerguard/partnerguard/policy"
)

// Risks says in plain sentences what a valid c accepts that a reader may not
// expect, at the time now. It may be empty.
func (c *Config) Risks(now time.Time) []string {
	var risks []string
	risk := func(format string, args ...any) { risks = append(risks, fmt.Sprintf(format, args...)) }

	enforces := c.enforces()
	if enforces && c.Ledger.OnFailure == ForwardOnFailure {
		risk("ledger.on_failure is forward while calls are enforced: when the ledger cannot be written, calls go on with a log line as their only record.")
	}
	if len(c.Tenants) == 0 {
		risk("tenants is empty: tokens of any tenant are accepted, checked against the keys all tenants share. List the partner tenants before using tag or enforce.")
	}
	for i, l := range c.Listeners {
		if a, err := parseAddress(l.Address); err == nil && l.InsecureClearText && !a.loopback() {
			risk("listeners[%d] (%s) takes bearer tokens in clear text: whoever sees the traffic can use them.", i, l.Label())
		}
	}
	if enforces && c.Entra.OnUnverifiable == policy.ForwardUnverifiable {
		risk("entra.on_unverifiable is forward: where calls are enforced, opaque and encrypted tokens pass without any proof, and anyone can send one.")
	}
	if c.Entra.Authority != "" {
		risk("entra.authority is %s: whoever controls it decides which tokens are valid.", c.Entra.Authority)
	}
	risks = append(risks, c.weakRisks()...)
	for _, r := range c.Rules {
		if now.Before(r.From) {
			risk("rule %q begins %s: until then it matches nothing.", r.Name, r.From.Format(time.RFC3339))
		}
		if !r.Until.IsZero() && !now.Before(r.Until) {
			risk("rule %q ended %s: it matches nothing any more.", r.Name, r.Until.Format(time.RFC3339))
		}
	}
	if c.ValidateMFA == ValidateOff {
		risk("validate_mfa is off: Microsoft is not asked whether it counts a call as MFA compliant, so its verdict is missing in reports.")
	}
	if c.Ledger.FSync != FSyncAlways {
		risk("ledger.fsync is %s: a power loss can lose that much of the ledger; a crash of the program loses nothing.", time.Duration(c.Ledger.FSync))
	}
	return risks
}

// enforces reports whether any call is or will be enforced.
func (c *Config) enforces() bool {
	return c.Mode == policy.Enforce ||
		slices.ContainsFunc(c.Integrations, func(in Integration) bool { return in.Mode == policy.Enforce }) ||
		slices.ContainsFunc(c.Rules, func(r Rule) bool { return r.Mode == policy.Enforce })
}

// weakRisks names the integrations whose own mode rests on what a caller merely
// claims.
func (c *Config) weakRisks() []string {
	var risks []string
	for _, in := range c.Integrations {
		if c.strong(in) {
			continue
		}
		strictest := in.Mode
		for _, r := range c.Rules {
			if slices.Contains(r.Integrations, in.Name) {
				strictest = max(strictest, r.Mode)
			}
		}
		switch {
		case strictest > max(c.Mode, policy.Audit):
			risks = append(risks, fmt.Sprintf("integration %q is in mode %s but known only by weak evidence (%s): a caller that leaves it out is in mode %s.",
				in.Name, strictest, strings.Join(in.Match.weak(), ", "), c.Mode))
		case in.Mode != policy.Inherit && in.Mode < c.Mode:
			risks = append(risks, fmt.Sprintf("integration %q asks for mode %s but is known only by weak evidence (%s), which loosens nothing: %s holds.",
				in.Name, in.Mode, strings.Join(in.Match.weak(), ", "), c.Mode))
		}
	}
	return risks
}

// strong reports whether in is known by evidence that a caller cannot choose.
func (c *Config) strong(in Integration) bool {
	if slices.ContainsFunc(c.Listeners, func(l Listener) bool { return l.Integration == in.Name }) {
		return true
	}
	m := in.Match
	// Anyone can sign in with one of Microsoft's own applications.
	microsoft := func(id string) bool { return policy.FirstParty(strings.ToLower(id)) }
	return len(m.User) > 0 || len(m.Listener) > 0 || len(m.Source) > 0 ||
		len(m.AppID) > 0 && !slices.ContainsFunc(m.AppID, microsoft)
}

// weak names the weak evidence in m; /i/{name}/ always is one.
func (m Match) weak() []string {
	var names []string
	for _, k := range []struct {
		name string
		n    int
	}{
		{"app_id of a Microsoft application", len(m.AppID)}, {"host", len(m.Host)}, {"path_prefix", len(m.PathPrefix)},
		{"application", len(m.Application)}, {"user_agent", len(m.UserAgent)},
	} {
		if k.n > 0 {
			names = append(names, k.name)
		}
	}
	if names == nil {
		names = append(names, "the path /i/{name}/")
	}
	return names
}
