package config

import (
	"errors"
	"fmt"
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
	oneOf(bad, "ledger.identities", c.Ledger.Identities, "plain")

	c.checkListeners(bad)
	c.checkACME(bad)
	c.checkAdmin(bad)
	c.checkUpstreams(bad)
	c.checkEntra(bad)
	c.checkLimits(bad)
	c.checkTimes(bad)
	for i, in := range c.Integrations {
		c.checkMatch(bad, fmt.Sprintf("integrations[%d].match", i), in.Match)
	}
	if _, err := c.Policy(); err != nil {
		for _, field := range fieldErrors(err) {
			bad(field.Path, field.Problem, field.Hint)
		}
	}
}

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
}
