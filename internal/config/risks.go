package config

import (
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/partnerguard/partnerguard/policy"
)

// Risks says in plain sentences what a valid c accepts that a reader may not
// expect, at the time now. It looks at the modes of the files that c names, and
// may be empty.
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
		off := offLoopback(l.Address)
		if l.InsecureClearText && off {
			risk("listeners[%d] (%s) takes bearer tokens in clear text: whoever sees the traffic can use them.", i, l.Label())
		}
		if l.ClientCA != "" && l.ClientCRL == "" {
			risk("listeners[%d] (%s) has no client_crl: a revoked client certificate is accepted until it expires.", i, l.Label())
		}
	}
	if c.Limits.Connections == 0 {
		risk("limits.connections is 0: one client can open connections until the guard has no file descriptors left for others.")
	}
	if c.Limits.Calls > 0 {
		risk("limits.calls is %d: calls of an integration over it are refused, in mode audit too.", c.Limits.Calls)
	}
	for _, in := range c.Integrations {
		if in.MaxCalls != nil && *in.MaxCalls > 0 {
			risk("max_calls of integration %q is %d: its calls over it are refused, in mode audit too.", in.Name, *in.MaxCalls)
		}
	}
	if c.ACME.Directory == letsEncryptStaging {
		risk("acme.directory is Let's Encrypt's staging: no client trusts its certificates.")
	}
	if enforces && c.Entra.OnUnverifiable == policy.ForwardUnverifiable {
		risk("entra.on_unverifiable is forward: where calls are enforced, opaque and encrypted tokens pass without any proof, and anyone can send one.")
	}
	if c.Entra.Authority != "" {
		risk("entra.authority is %s: whoever controls it decides which tokens are valid.", c.Entra.Authority)
	}
	if c.Entra.CA != "" {
		risk("entra.ca is trusted for Entra's keys: whoever can sign with it decides which tokens are valid.")
	}
	for _, name := range upstreams()[1:] {
		if u, ok := c.Upstreams[name]; ok && !u.RewriteLinks {
			risk("upstreams.%s.rewrite_links is false: clients that follow links in its answers go past the guard.", name)
		}
	}
	if file, ok := c.Reconcile.Token.file(); ok {
		if _, err := os.Stat(file); err != nil {
			risk("reconcile.token: %s cannot be read; until it can, Microsoft's records are not held against the guard's.", file)
		}
	}
	risks = append(risks, c.adminRisks()...)
	risks = append(risks, c.fileRisks()...)
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
		risk("ledger.fsync is %s: a power loss can lose that much of the ledger; a crash of the program loses nothing.", c.Ledger.FSync)
	}
	return risks
}

// adminRisks says who else may read records.
func (c *Config) adminRisks() []string {
	var risks []string
	if c.Admin.InsecureClearText && offLoopback(c.Admin.Address) {
		risks = append(risks, "admin.insecure_clear_text: whoever sees the traffic of "+c.Admin.Address+" can read its token and the records.")
	}
	if c.Admin.ClientCA != "" {
		risks = append(risks, "admin.client_ca: every client certificate of these CAs opens the console with the records of all integrations, a revoked one until it expires.")
	}
	return risks
}

// fileRisks names the keys and secrets in files that others on this machine may
// read or change.
func (c *Config) fileRisks() []string {
	var risks []string
	c.eachFile(func(key string, file *string) {
		if !strings.HasSuffix(key, ".key") && !strings.HasSuffix(key, "_key") && !strings.HasSuffix(key, ".postgres") && !strings.HasSuffix(key, ".token") {
			return
		}
		const others = 0o027 // group may read, not write
		info, err := os.Stat(*file)
		if err == nil && info.Mode().Perm()&others != 0 && runtime.GOOS != "windows" {
			risks = append(risks, fmt.Sprintf("%s: the file %s (mode %#o) can be used by others on this machine; 0600 keeps it to its owner.", key, *file, info.Mode().Perm()))
		}
	})
	return risks
}

func offLoopback(s string) bool {
	a, err := parseAddress(s)
	return err == nil && !a.loopback()
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
	return len(m.User) > 0 || len(m.ClientCert) > 0 || len(m.Listener) > 0 || len(m.Source) > 0 ||
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
