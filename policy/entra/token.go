package entra

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/partnerguard/partnerguard/policy"
)

const (
	maxToken = 16 << 10 // bytes

	// What is kept of a token: it goes into records and a cache, so it is bounded.
	maxText      = 256
	maxAMR       = 16
	maxAMRMethod = 32
)

// token is a bearer token that has been read but not judged.
type token struct {
	raw     string
	hash    [sha256.Size]byte // of raw
	signed  string            // header and payload as they stand in raw
	payload string            // the encoded payload within signed
	sig     []byte

	headerText  string
	header      header
	payloadText string
	claims      claims
	duplicate   bool // in the header or the payload

	// What it is checked against, besides the configuration and the keys.

	audiences []string
	now       time.Time

	// Filled in by the checks, in their order.

	kid          string
	issuer       string
	version      version // by the issuer
	issuerTenant string  // as the issuer writes it
	tenantID     string  // lower case
	audience     string  // the one that matched
	set          *keySet
	key          *key // of set
}

type header struct {
	alg, kid, typ value
	critical      bool // crit or b64 is there
	nonce         value
	nonceAt       int // where the nonce stands in headerText
}

type claims struct {
	iss, tid, aud, exp, nbf, iat value

	ver, appid, azp, appidacr, azpacr, oid, sub, idp, uti value
	idtyp, scp, upn, uniqueName, preferredUsername        value
	name, amr                                             value
}

var (
	errHeader     = errors.New("the header is no JSON object in base64url")
	errPayload    = errors.New("the payload is no JSON object in base64url")
	errSignature  = errors.New("the signature is not base64url")
	errBase64     = errors.New("not unpadded base64url")
	errClaimType  = errors.New("a claim that must be a string is something else")
	errNotJWT     = errors.New("not three parts with a JSON header")
	errNoExpiry   = errors.New("exp is missing or no whole number of seconds")
	errNotBefore  = errors.New("nbf is no whole number of seconds")
	errIssuedAt   = errors.New("iat is no whole number of seconds")
	errAudience   = errors.New("aud is neither a string nor an array of strings")
	errVersion    = errors.New("the issuer is not of the version that ver says")
	errKeyIssuer  = errors.New("the key is published for another issuer")
	errIssuedLate = errors.New("iat lies in the future")
)

// read takes a token apart. What it is goes by one rule: three parts whose first
// decodes to text that begins with a brace are a JWT; five parts whose first is a
// JSON object are encrypted; anything else is opaque. A JWT that is not strictly
// well-formed in base64url, JSON and the types of its claims is malformed.
// Duplicates and critical headers are judged later, so that t is filled as far as
// it is readable, whatever the reason.
func (t *token) read(buf []byte) (policy.Reason, error) {
	parts := strings.Count(t.raw, ".") + 1
	first, rest, _ := strings.Cut(t.raw, ".")
	switch {
	case parts == 5:
		if text, err := decodeSegment(buf, first); err == nil {
			if _, err := scanObject(string(text), func(string, int, int) {}); err == nil {
				return policy.ReasonTokenEncrypted, nil
			}
		}
		return policy.ReasonTokenOpaque, errNotJWT
	case parts != 3 || !resemblesHeader(buf, first):
		return policy.ReasonTokenOpaque, errNotJWT
	}
	payload, signature, _ := strings.Cut(rest, ".")
	t.signed = t.raw[:len(first)+1+len(payload)]
	t.payload = payload

	var problem error
	note := func(what, err error) {
		if err != nil && problem == nil {
			problem = fmt.Errorf("%w: %w", what, err)
		}
	}
	note(errHeader, t.readHeader(buf, first))
	note(errPayload, t.readClaims(buf, payload))
	sig, err := decodeSegment(buf, signature)
	note(errSignature, err)
	t.sig = bytes.Clone(sig)
	if problem == nil && !t.claims.typed() {
		problem = errClaimType
	}
	if problem != nil {
		return policy.ReasonTokenMalformed, problem
	}
	return "", nil
}

// resemblesHeader reports whether an encoded part means to be a JSON object: it
// decodes, padding and stray bits aside, to text that begins with a brace.
func resemblesHeader(buf []byte, part string) bool {
	text, err := base64.RawURLEncoding.AppendDecode(buf[:0], []byte(strings.TrimRight(part, "=")))
	return err == nil && bytes.HasPrefix(bytes.TrimLeft(text, " \t\r\n"), []byte("{"))
}

// decodeSegment decodes unpadded base64url strictly: the standard decoder skips
// line breaks, and would ignore bits that do not belong to the text. The result
// lies in buf when that is large enough.
func decodeSegment(buf []byte, part string) ([]byte, error) {
	if strings.IndexByte(part, '\n') >= 0 || strings.IndexByte(part, '\r') >= 0 {
		return nil, errBase64
	}
	out, err := base64.RawURLEncoding.Strict().AppendDecode(buf[:0], []byte(part))
	if err != nil {
		return nil, errBase64
	}
	return out, nil
}

func (t *token) readHeader(buf []byte, part string) error {
	text, err := decodeSegment(buf, part)
	if err != nil {
		return err
	}
	t.headerText = string(text)
	h := &t.header
	duplicate, err := scanObject(t.headerText, func(name string, start, end int) {
		v := value(t.headerText[start:end])
		switch name {
		case "alg":
			h.alg = v
		case "kid":
			h.kid = v
		case "typ":
			h.typ = v
		case "crit", "b64":
			h.critical = true
		case "nonce":
			h.nonce, h.nonceAt = v, start
		}
	})
	t.duplicate = t.duplicate || duplicate
	return err
}

func (t *token) readClaims(buf []byte, part string) error {
	text, err := decodeSegment(buf, part)
	if err != nil {
		return err
	}
	t.payloadText = string(text)
	duplicate, err := scanObject(t.payloadText, func(name string, start, end int) {
		v := value(t.payloadText[start:end])
		if p := t.claims.field(name); p != nil && *p == "" && v != "null" {
			*p = v
		}
	})
	t.duplicate = t.duplicate || duplicate
	return err
}

// field is where the claim name is kept. Names are exact: a lone AMR is no amr.
func (c *claims) field(name string) *value {
	switch name {
	case "iss":
		return &c.iss
	case "tid":
		return &c.tid
	case "aud":
		return &c.aud
	case "exp":
		return &c.exp
	case "nbf":
		return &c.nbf
	case "iat":
		return &c.iat
	case "ver":
		return &c.ver
	case "appid":
		return &c.appid
	case "azp":
		return &c.azp
	case "appidacr":
		return &c.appidacr
	case "azpacr":
		return &c.azpacr
	case "oid":
		return &c.oid
	case "sub":
		return &c.sub
	case "idp":
		return &c.idp
	case "uti":
		return &c.uti
	case "idtyp":
		return &c.idtyp
	case "scp":
		return &c.scp
	case "upn":
		return &c.upn
	case "unique_name":
		return &c.uniqueName
	case "preferred_username":
		return &c.preferredUsername
	case "name":
		return &c.name
	case "amr":
		return &c.amr
	}
	return nil
}

// typed reports whether every claim that can only be a string is one. The others
// are judged where they are read, with their own reason.
func (c *claims) typed() bool {
	for _, v := range [...]value{c.ver, c.appid, c.azp, c.appidacr, c.azpacr, c.oid, c.sub, c.idp, c.uti,
		c.idtyp, c.scp, c.upn, c.uniqueName, c.preferredUsername} {
		if v != "" && v[0] != '"' {
			return false
		}
	}
	return true
}

// kind classifies by idtyp, else by scp, else by the lack of any user. roles,
// appidacr and idp stand in tokens of both kinds and prove neither.
func (c *claims) kind() policy.Kind {
	if idtyp, _ := c.idtyp.str(); idtyp == "app" {
		return policy.KindAppOnly
	}
	if c.scp != "" {
		return policy.KindAppUser
	}
	oid, _ := c.oid.str()
	sub, _ := c.sub.str()
	if oid != "" && oid == sub && c.upn == "" && c.uniqueName == "" && c.name == "" {
		return policy.KindAppOnly
	}
	return policy.KindUndecided
}

// mfa is what amr proves. Every value counts, also those beyond what is kept.
func (c *claims) mfa(version string, accepted []string) policy.MFA {
	if c.kind() == policy.KindAppOnly {
		return policy.MFANotApplicable
	}
	form, amr := c.authMethods()
	return policy.JudgeMFA(version, form, amr, accepted)
}

func (c *claims) authMethods() (policy.AMRForm, []string) {
	if c.amr == "" {
		return policy.AMRMissing, nil
	}
	form := policy.AMRStrings
	amr := make([]string, 0, 4)
	isArray := c.amr.elements(func(v value) bool {
		s, ok := v.str()
		if !ok {
			form = policy.AMRMalformed
			return true
		}
		amr = append(amr, s)
		return true
	})
	if !isArray {
		form = policy.AMRMalformed
	}
	return form, amr
}

func keepAMR(amr []string) []string {
	if len(amr) == 0 {
		return nil
	}
	amr = amr[:min(len(amr), maxAMR)]
	for i := range amr {
		amr[i] = clip(amr[i], maxAMRMethod)
	}
	return amr
}

// says returns what t says of itself. It proves nothing: neither Verified nor MFA
// is set.
func (t *token) says() policy.Token {
	c := &t.claims
	_, amr := c.authMethods()
	text := func(v value) string {
		s, _ := v.str()
		return clip(s, maxText)
	}
	first := func(values ...value) string {
		for _, v := range values {
			if s := text(v); s != "" {
				return s
			}
		}
		return ""
	}
	p := policy.Token{
		Kind:     c.kind(),
		Version:  t.versionText(),
		TenantID: strings.ToLower(text(c.tid)),
		ObjectID: strings.ToLower(text(c.oid)),
		Issuer:   text(c.iss),
		Audience: clip(t.audience, maxText),
		IdP:      text(c.idp),
		UTI:      text(c.uti),
		AMR:      keepAMR(amr),
	}
	if t.payloadText == "" {
		p.Kind = policy.KindOpaque
	}
	if p.Audience == "" {
		p.Audience = text(c.aud)
	}
	if p.IdP == p.Issuer {
		p.IdP = "" // the user's home is this tenant
	}
	if p.Version == v2.String() {
		p.AppID, p.AppAuth = strings.ToLower(text(c.azp)), text(c.azpacr)
	} else {
		p.AppID, p.AppAuth = strings.ToLower(text(c.appid)), text(c.appidacr)
	}
	if p.Kind != policy.KindAppOnly {
		p.UPN = first(c.upn, c.uniqueName, c.preferredUsername)
	}
	p.IssuedAt, _ = c.iat.seconds()
	p.NotBefore, _ = c.nbf.seconds()
	p.ExpiresAt, _ = c.exp.seconds()
	return p
}

// versionText is the version by the issuer; what ver claims until that is known.
func (t *token) versionText() string {
	if t.version != 0 {
		return t.version.String()
	}
	switch ver, _ := t.claims.ver.str(); ver {
	case v1.String(), v2.String():
		return ver
	}
	return ""
}

// hashedNonce returns the text that was signed when Microsoft gave one of its own
// APIs a token with a nonce header: the signature then covers the header with the
// nonce replaced by base64url(SHA-256(nonce)), all other bytes as they are. ok is
// false without a nonce. Not documented; read from tokens for Microsoft Graph.
func (t *token) hashedNonce() (signed string, ok bool) {
	nonce, ok := t.header.nonce.str()
	if !ok {
		return "", false
	}
	sum := sha256.Sum256([]byte(nonce))
	h, at := t.headerText, t.header.nonceAt
	h = h[:at] + `"` + base64.RawURLEncoding.EncodeToString(sum[:]) + `"` + h[at+len(t.header.nonce):]
	return base64.RawURLEncoding.EncodeToString([]byte(h)) + "." + t.payload, true
}

// clip cuts s to at most n bytes, between characters.
func clip(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n]
}
