package entra

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/partnerguard/partnerguard/policy"
)

// Explanation is a token laid open for a person. It holds neither the token nor
// its signature; claims stand in it as they are, personal data included. Text from
// the token may hold any character: escape it for where it is shown.
type Explanation struct {
	Header Header
	Claims []Claim // in the order of the token; empty when it is not readable
	Checks []Check // in the order of verification

	// Token and Err are what Verify returns for it.
	Token policy.Token
	Err   *policy.TokenError // nil when the token is valid
	// MFA is what amr would prove if the token were valid.
	MFA policy.MFA
}

// Header is what the JOSE header says; at most 256 bytes of each.
type Header struct {
	Alg, Kid, Typ string
	Nonce         bool // has a nonce, as tokens for Microsoft's own APIs may have
}

// Claim is one member of the payload.
type Claim struct {
	Name  string
	Value string // JSON, as it stands
	PII   bool   // names or locates a person
}

// Check is one step of the verification.
type Check struct {
	Name   string
	State  CheckState
	Detail string // what was found, or what is wrong
}

// CheckState is how a check went.
type CheckState uint8

const (
	Skipped CheckState = iota // could not be made, because of an earlier one
	OK
	Failed
)

// String returns the word to show.
func (s CheckState) String() string {
	switch s {
	case OK:
		return "ok"
	case Failed:
		return "failed"
	}
	return "skipped"
}

// Explain verifies raw as Verify does, and goes on after a failure to say what else
// holds and what does not. It may fetch keys, as Verify may.
func (v *Verifier) Explain(ctx context.Context, raw string, audiences []string) Explanation {
	var e Explanation
	add := func(name string, state CheckState, detail string) {
		e.Checks = append(e.Checks, Check{name, state, detail})
	}
	verdict, err := v.Verify(ctx, raw, audiences)
	e.Token = verdict
	errors.As(err, &e.Err)

	if raw == "" || len(raw) > maxToken {
		add("length", Failed, string(e.Err.Reason))
		add("form", Skipped, "")
		for _, c := range checks {
			add(c.name, Skipped, "")
		}
		return e
	}
	add("length", OK, fmt.Sprintf("%d bytes", len(raw)))

	t := &token{raw: raw, hash: sha256.Sum256([]byte(raw)), audiences: audiences, now: v.now()}
	reason, err := t.read(make([]byte, 0, maxToken))
	if reason == "" {
		add("form", OK, "three parts: a JWT")
	} else {
		add("form", Failed, because(reason, err))
	}
	e.Header = t.headerFacts()
	e.Claims = t.claimList()
	readable := t.headerText != "" && t.payloadText != ""
	for _, c := range checks {
		if !readable || !t.canRun(c.name) {
			add(c.name, Skipped, "")
			continue
		}
		if reason, err := c.run(v, ctx, t); reason != "" {
			add(c.name, Failed, because(reason, err))
		} else {
			add(c.name, OK, t.found(c.name))
		}
	}
	if readable {
		e.MFA = t.claims.mfa(t.versionText(), v.mfaValues)
	}
	return e
}

// canRun reports whether earlier checks found what the named one needs.
func (t *token) canRun(name string) bool {
	switch name {
	case "key":
		return t.kid != "" && t.version != 0 && t.tenantID != ""
	case "key issuer", "signature":
		return t.key != nil
	}
	return true
}

// found describes what a check that holds has found.
func (t *token) found(name string) string {
	at := func(claim value) string {
		n, ok := claim.seconds()
		if !ok {
			return "not given"
		}
		return time.Unix(n, 0).UTC().Format(time.RFC3339)
	}
	switch name {
	case "algorithm":
		return "RS256"
	case "key id":
		return clip(t.kid, maxText)
	case "issuer":
		return "version " + t.version.String()
	case "tenant":
		return t.tenantID
	case "audience":
		return t.audience
	case "expiry":
		return at(t.claims.exp)
	case "not before":
		return at(t.claims.nbf)
	case "issued at":
		return at(t.claims.iat)
	case "key":
		return "published " + t.set.fetched.UTC().Format(time.RFC3339)
	case "key issuer":
		return strings.Join(t.key.issuers, " ")
	}
	return ""
}

func (t *token) headerFacts() Header {
	text := func(v value) string {
		s, _ := v.str()
		return clip(s, maxText)
	}
	return Header{Alg: text(t.header.alg), Kid: text(t.header.kid), Typ: text(t.header.typ), Nonce: t.header.nonce != ""}
}

func (t *token) claimList() []Claim {
	var list []Claim
	// Broken text ends the list where it breaks.
	_, _ = scanObject(t.payloadText, func(name string, start, end int) {
		list = append(list, Claim{Name: name, Value: t.payloadText[start:end], PII: isPII(name)})
	})
	return list
}

// isPII names the claims that hold personal data, by Entra's reference of claims.
func isPII(name string) bool {
	switch strings.ToLower(name) {
	case "upn", "unique_name", "preferred_username", "email", "verified_primary_email", "verified_secondary_email",
		"name", "family_name", "given_name", "nickname", "ipaddr", "puid", "oid", "sub", "onprem_sid", "in_corp", "ctry", "deviceid":
		return true
	}
	return false
}

func because(reason policy.Reason, err error) string {
	if err == nil {
		return string(reason)
	}
	return string(reason) + ": " + err.Error()
}
