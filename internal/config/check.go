package config

import (
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/partnerguard/partnerguard/policy"
)

// report takes a problem with the key at path.
type report func(path, message, hint string)

// check reports everything that is wrong with c and needs no file to see.
func (c *Config) check(bad report) {
	switch c.Version {
	case 1:
	case 0:
		bad("version", "is required", "write version: 1")
	default:
		bad("version", fmt.Sprintf("%d is not supported", c.Version), "write version: 1")
	}
	oneOf(bad, "cloud", c.Cloud, "global", "usgov", "china")
	oneOf(bad, "validate_mfa", c.ValidateMFA, ValidateOff, ValidateReads, ValidateAll)
	oneOf(bad, "ledger.on_failure", c.Ledger.OnFailure, ForwardOnFailure, RejectOnFailure)
	oneOf(bad, "ledger.identities", c.Ledger.Identities, PlainIdentities, PseudonymousIdentities)

	if c.Instance != "" && !instanceName.MatchString(c.Instance) {
		bad("instance", fmt.Sprintf("%q is not a name", c.Instance), "use 1 to 63 letters, digits, dots, hyphens and underscores")
	}
	c.Store.Postgres.check(bad, "store.postgres")
	c.checkListeners(bad)
	c.checkACME(bad)
	c.checkAdmin(bad)
	c.checkUpstreams(bad)
	c.checkEntra(bad)
	c.checkLimits(bad)
	c.checkTimes(bad)
	c.checkReconcile(bad)
	for i, in := range c.Integrations {
		c.checkMatch(bad, fmt.Sprintf("integrations[%d].match", i), in.Match)
	}
	if _, err := c.Policy(); err != nil {
		for _, field := range fieldErrors(err) {
			bad(field.Path, field.Problem, field.Hint)
		}
	}
}

var instanceName = regexp.MustCompile(`^[A-Za-z0-9._-]{1,63}$`)

// checkMatch reports what the policy cannot: conditions that none of the listeners
// can meet.
func (c *Config) checkMatch(bad report, path string, m Match) {
	certificates := false // a call that meets m.Listener may carry one
	for _, l := range c.Listeners {
		if l.ClientCA != "" && (len(m.Listener) == 0 || slices.Contains(m.Listener, l.Label())) {
			certificates = true
		}
	}
	for j, label := range m.Listener {
		if label != "" && !slices.ContainsFunc(c.Listeners, func(l Listener) bool { return l.Label() == label }) {
			bad(fmt.Sprintf("%s.listener[%d]", path, j), fmt.Sprintf("%q is not a listener", label),
				"write the name of a listener, or its address if it has no name")
		}
	}
	if len(m.ClientCert) > 0 && !certificates {
		where := "no listener"
		if len(m.Listener) > 0 {
			where = "none of the listeners in match.listener"
		}
		bad(path+".client_cert", "can never hold: "+where+" has client_ca", "add client_ca to the listener its calls come in by")
	}
	for j, name := range m.ClientCert {
		if prefix := "cn="; len(name) >= len(prefix) && strings.EqualFold(name[:len(prefix)], prefix) {
			bad(fmt.Sprintf("%s.client_cert[%d]", path, j), fmt.Sprintf("%q is a distinguished name", name), "write the common name alone, or a subject alternative name")
		}
	}
}

// fieldErrors takes the joined error of policy.New apart.
func fieldErrors(err error) []*policy.FieldError {
	var fields []*policy.FieldError
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		for _, e := range joined.Unwrap() {
			fields = append(fields, fieldErrors(e)...)
		}
		return fields
	}
	var field *policy.FieldError
	if !errors.As(err, &field) {
		field = &policy.FieldError{Problem: err.Error()}
	}
	return append(fields, field)
}

func oneOf[T ~string](bad report, path string, value T, allowed ...T) {
	if slices.Contains(allowed, value) {
		return
	}
	words := make([]string, len(allowed))
	for i, a := range allowed {
		words[i] = string(a)
	}
	hint := "write " + words[0]
	if last := len(words) - 1; last > 0 {
		hint = "write " + strings.Join(words[:last], ", ") + " or " + words[last]
	}
	bad(path, fmt.Sprintf("%q is not known", value), hint)
}

func (c *Config) checkEntra(bad report) {
	if c.Entra.Authority != "" {
		if target, ok := checkURL(bad, "entra.authority", c.Entra.Authority); ok && c.ownAddress(target) {
			bad("entra.authority", "is the guard's own address", "leave it out to use the cloud's")
		}
	}
	allowed := policy.AllowedMFAValues()
	if len(c.Entra.MFAValues) == 0 {
		bad("entra.mfa_values", "is empty, so no token could prove MFA", "leave it out, or write some of "+strings.Join(allowed, ", "))
	}
	for i, v := range c.Entra.MFAValues {
		if !slices.Contains(allowed, v) {
			bad(fmt.Sprintf("entra.mfa_values[%d]", i), fmt.Sprintf("%q does not prove MFA", v), "write only "+strings.Join(allowed, ", "))
		}
	}
}

func (c *Config) checkLimits(bad report) {
	negative := func(path string, n int) {
		if n < 0 {
			bad(path, "is negative", "write a number, or 0 for no limit")
		}
	}
	negative("limits.connections", c.Limits.Connections)
	negative("limits.calls", c.Limits.Calls)
	for i, in := range c.Integrations {
		if in.MaxCalls != nil {
			negative(fmt.Sprintf("integrations[%d].max_calls", i), *in.MaxCalls)
		}
	}
	// Below, tokens of users in many groups do not fit; above, headers of idle
	// connections could fill the memory.
	if h := c.Limits.Headers; h < 8<<10 || h > 1<<20 {
		bad("limits.headers", fmt.Sprintf("%s is out of bounds", h), "write 8KiB to 1MiB")
	}
}

func (c *Config) checkReconcile(bad report) {
	r := c.Reconcile
	r.Token.check(bad, "reconcile.token")
	command := len(r.TokenCommand) > 0
	if command && r.TokenCommand[0] == "" {
		bad("reconcile.token_command[0]", "is empty", "write the program that prints the token, then its arguments")
	}
	const sources = "write token (file:PATH or env:NAME) or token_command ([program, arguments…])"
	switch {
	case r.Every != 0 && (r.Every < time.Minute || r.Every > 7*day):
		bad("reconcile.every", "is out of bounds", "write 1m to 7d, such as 6h, or 0 for never")
	case r.Every != 0 && r.Token == "" && !command:
		bad("reconcile.every", "needs a token for Microsoft's records", sources)
	case r.Token != "" && command:
		bad("reconcile.token", "and token_command are both given", "keep one of them")
	case r.Every == 0 && r.Token != "":
		bad("reconcile.token", "does nothing without every", "add reconcile.every, such as 6h")
	case r.Every == 0 && command:
		bad("reconcile.token_command", "does nothing without every", "add reconcile.every, such as 6h")
	}
}

func (c *Config) checkTimes(bad report) {
	for _, d := range []struct {
		path   string
		value  time.Duration
		zeroOK bool
	}{
		{"entra.leeway", c.Entra.Leeway, true},
		{"entra.max_stale", c.Entra.MaxStale, false},
		{"timeouts.dial", c.Timeouts.Dial, false},
		{"timeouts.tls", c.Timeouts.TLS, false},
		{"timeouts.response_header", c.Timeouts.ResponseHeader, false},
		{"timeouts.idle", c.Timeouts.Idle, false},
		{"timeouts.read_header", c.Timeouts.ReadHeader, false},
		{"timeouts.keep_alive", c.Timeouts.KeepAlive, false},
		{"timeouts.body", c.Timeouts.Body, false},
		{"timeouts.unready", c.Timeouts.Unready, true},
		{"timeouts.drain", c.Timeouts.Drain, true},
		{"ledger.retention", c.Ledger.Retention, false},
		{"ledger.fsync", time.Duration(c.Ledger.FSync), true},
		{"reconcile.delay", c.Reconcile.Delay, true},
	} {
		switch {
		case d.value < 0:
			bad(d.path, "is negative", "write a duration such as 30s, 5m or 7d")
		case d.value == 0 && !d.zeroOK:
			bad(d.path, "is zero", "write a duration such as 30s, 5m or 7d")
		}
	}
	if c.Ledger.MinFree < 0 {
		bad("ledger.min_free", "is negative", "write a size such as 1GiB, or 0")
	}
	if n := c.Ledger.MaxBytes; n != 0 && n < minLedger {
		bad("ledger.max_bytes", "leaves no room for the files being written and compressed", "write 512MiB or more, or 0 for no limit")
	}
	seen := map[string]bool{}
	for _, tenant := range slices.Sorted(maps.Keys(c.Ledger.Tenants)) {
		path := join("ledger.tenants", tenant)
		switch lower := strings.ToLower(tenant); {
		case !guid.MatchString(lower):
			bad(path, "is not a tenant id", "write the GUID of a partner tenant")
		case seen[lower]:
			bad(path, "stands twice, in another case", "write it once")
		case c.Ledger.Tenants[tenant] < day:
			bad(path, "is less than a day", "write a duration such as 7d")
		default:
			seen[lower] = true
		}
	}
}

// minLedger is the least ledger.max_bytes: some segments of 64 MiB.
const minLedger = 512 << 20

var guid = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)
