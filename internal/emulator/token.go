package emulator

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
)

// The audiences that the sample clients ask for.
const (
	AudiencePartnerCenter     = "https://api.partnercenter.microsoft.com"
	AudiencePartnerCenterGUID = "fa3d9a0c-3fb0-42cc-9193-47c7ecd2edbd"
	AudiencePartnerAPI        = "https://api.partner.microsoft.com"
	AudiencePartnerAPIGUID    = "4990cffe-04e8-4e8b-808a-1175604b879f"
	AudienceGraph             = "https://graph.microsoft.com"
	AudienceGraphGUID         = "00000003-0000-0000-c000-000000000000"
	AudienceLegacyGraph       = "https://graph.windows.net" // refused with 900420
)

// Key names the key that signs a token.
type Key int

// The keys that can sign a token.
const (
	KeyCurrent     Key = iota
	KeyPrevious        // the one before the current one, published until Withdraw
	KeyForeign         // never published
	KeyOtherTenant     // published in v2 key sets, bound there to the consumer tenant
)

// TokenSpec describes a token. The zero value is a v1 token of a user who
// signed in with MFA, for Partner Center, valid from now for 65 minutes.
type TokenSpec struct {
	Version  string // "1.0" (default) or "2.0"
	Tenant   string // default: the first configured one
	Issuer   string // default: the global cloud's for Version and Tenant
	Audience string // default AudiencePartnerCenter; the app id in a 2.0 token
	AppID    string // default: the first sample app's
	AppOnly  bool
	ObjectID string // default: the sample user's or app's, else derived from the UPN or AppID
	UPN      string // default: the first sample user's

	// AMR is the amr claim, of any JSON type. Nil means ["pwd","mfa"], and no
	// claim in app-only and 2.0 tokens. NoAMR leaves it out.
	AMR   any
	NoAMR bool

	IssuedAt  time.Time // default now
	NotBefore time.Time // default IssuedAt
	Expires   time.Time // default IssuedAt plus 65 minutes, as observed in Partner Center's tokens

	Omit  []string       // claims to leave out
	Extra map[string]any // claims to add or override; a nil value is null

	Header     map[string]any // JOSE header members to add or override; a nil value deletes
	RawHeader  []byte         // the header, verbatim
	RawPayload []byte         // the payload, verbatim

	// Alg is RS256 (default), PS256, ES256, none, or HS256 keyed with the
	// public key's PEM.
	Alg string
	Key Key

	BadSignature bool // one bit of the signature is wrong

	// HashedNonce adds a nonce to the header, unless Header has one, and signs
	// over a header that holds the nonce's hash in its place, as Microsoft does
	// in tokens for some of its own APIs.
	HashedNonce bool

	Opaque    bool // no JWT at all, as /generatetoken issues; the APIs accept it
	Encrypted bool // five parts, as a JWE; the APIs accept it

	// SealedNonce adds a nonce to the header as HashedNonce does, but signs by a rule
	// that only the APIs know: they accept it, and nobody else can verify it.
	SealedNonce bool
}

// TokenFormat is the form of the tokens that Entra issues.
type TokenFormat int

// The forms of a token. Of all but the first only the APIs can tell that it is valid:
// Microsoft reserves such a change, without notice, for tokens of its own APIs.
// See https://learn.microsoft.com/entra/identity-platform/access-tokens.
const (
	FormatJWT TokenFormat = iota
	FormatOpaque
	FormatEncrypted
	FormatSealedNonce
)

// SetTokenFormat sets the form of the tokens that the token endpoints issue and Token
// mints from now on. Tokens issued before stay as they are.
func (e *Emulator) SetTokenFormat(f TokenFormat) { e.format.Store(int64(f)) }

// issueToken mints in the current format.
func (e *Emulator) issueToken(t TokenSpec) string {
	switch TokenFormat(e.format.Load()) {
	case FormatOpaque:
		t.Opaque = true
	case FormatEncrypted:
		t.Encrypted = true
	case FormatSealedNonce:
		t.SealedNonce = true
	}
	return e.Mint(t)
}

// Mint returns the token that t describes.
func (e *Emulator) Mint(t TokenSpec) string {
	claims := e.claims(t)
	payload := t.RawPayload
	if payload == nil {
		payload = mustJSON(claims)
	}
	switch {
	case t.Opaque:
		return e.partner.issue(newOpaqueToken(), payload)
	case t.Encrypted:
		return e.partner.issue(newEncryptedToken(e.keys.pick(t.Key).kid), payload)
	}
	key := e.keys.pick(t.Key)
	alg := t.Alg
	if alg == "" {
		alg = "RS256"
	}
	header := t.RawHeader
	if header == nil {
		header = mustJSON(joseHeader(t, alg, key.kid))
	}
	signed := header
	switch {
	case t.SealedNonce:
		signed = []byte(randomText(32))
	case t.HashedNonce:
		signed = hashNonce(header)
	}
	body := "." + base64.RawURLEncoding.EncodeToString(payload)
	signature := e.keys.sign(alg, key, base64.RawURLEncoding.EncodeToString(signed)+body)
	if t.BadSignature && len(signature) > 0 {
		signature[len(signature)/2] ^= 1
	}
	token := base64.RawURLEncoding.EncodeToString(header) + body + "." + base64.RawURLEncoding.EncodeToString(signature)
	if t.SealedNonce {
		return e.partner.issue(token, payload)
	}
	return token
}

// claims builds the payload; its members are those of Partner Center's tokens.
func (e *Emulator) claims(t TokenSpec) object {
	if t.Version == "" {
		t.Version = "1.0"
	}
	v1 := t.Version != "2.0"
	if t.Tenant == "" {
		t.Tenant = e.cfg.Tenants[0]
	}
	if t.AppID == "" {
		t.AppID = e.dir.apps[0].ID
	}
	if t.UPN == "" {
		t.UPN = e.dir.users[0].UPN
	}
	if t.Audience == "" {
		t.Audience = AudiencePartnerCenter
		if !v1 {
			t.Audience = AudiencePartnerCenterGUID
		}
	}
	if t.Issuer == "" {
		t.Issuer = issuer(t.Tenant, v1)
	}
	if t.IssuedAt.IsZero() {
		t.IssuedAt = time.Now()
	}
	if t.NotBefore.IsZero() {
		t.NotBefore = t.IssuedAt
	}
	if t.Expires.IsZero() {
		t.Expires = t.IssuedAt.Add(65 * time.Minute)
	}
	app, knownApp := e.dir.appByID(t.AppID)
	user, known := e.dir.user(t.UPN)
	if !known {
		user = User{UPN: t.UPN, Name: "Unlisted User", GivenName: "Unlisted", FamilyName: "User", IPAddress: "203.0.113.99"}
	}
	if t.ObjectID == "" {
		switch {
		case t.AppOnly && knownApp:
			t.ObjectID = app.ObjectID
		case t.AppOnly:
			t.ObjectID = guid("service principal", t.AppID)
		case known:
			t.ObjectID = user.ObjectID
		default:
			t.ObjectID = guid("user", t.UPN)
		}
	}
	acr := "1"
	if knownApp && app.Secret == "" {
		acr = "0"
	}
	o := object{
		{"aud", t.Audience},
		{"iss", t.Issuer},
		{"iat", t.IssuedAt.Unix()},
		{"nbf", t.NotBefore.Unix()},
		{"exp", t.Expires.Unix()},
		{"aio", randomText(60)},
	}
	if v1 {
		o.set("appid", t.AppID)
		o.set("appidacr", acr)
	} else {
		o.set("azp", t.AppID)
		o.set("azpacr", acr)
	}
	amr := t.AMR
	if t.AppOnly {
		o.set("idp", t.Issuer)
		o.set("idtyp", "app")
		o.set("sub", t.ObjectID)
	} else {
		if v1 {
			if amr == nil {
				amr = []string{"pwd", "mfa"}
			}
			o.set("acr", "1")
			o.set("family_name", user.FamilyName)
			o.set("given_name", user.GivenName)
			o.set("ipaddr", user.IPAddress)
			o.set("puid", "10032001A2B3C4D5")
			o.set("unique_name", t.UPN)
			if user.IDP == "" {
				o.set("upn", t.UPN)
			} else {
				o.set("email", t.UPN)
				o.set("idp", user.IDP)
			}
		} else {
			o.set("preferred_username", t.UPN)
		}
		o.set("name", user.Name)
		o.set("scp", scopes(t.Audience))
		sub := sha256.Sum256([]byte(t.ObjectID + t.AppID))
		o.set("sub", base64.RawURLEncoding.EncodeToString(sub[:]))
	}
	if amr != nil && !t.NoAMR {
		o.set("amr", amr)
	}
	o.set("oid", t.ObjectID)
	o.set("rh", "0.AXoA"+randomText(18))
	o.set("tenant_region_scope", "EU")
	o.set("tid", t.Tenant)
	o.set("uti", newUTI())
	o.set("ver", t.Version)
	for _, name := range t.Omit {
		o.del(name)
	}
	for name, value := range t.Extra {
		o.set(name, value)
	}
	return o
}

// scopes are the delegated permissions that the sample apps have for an API.
func scopes(audience string) string {
	switch strings.TrimSuffix(audience, "/") {
	case AudienceGraph, AudienceGraphGUID:
		return "DelegatedAdminRelationship.ReadWrite.All PartnerBilling.Read.All PartnerSecurity.Read.All"
	}
	return "user_impersonation"
}

// issuer is the global cloud's issuer, wherever the emulator listens.
func issuer(tenant string, v1 bool) string {
	if v1 {
		return "https://sts.windows.net/" + tenant + "/"
	}
	return "https://login.microsoftonline.com/" + tenant + "/v2.0"
}

func joseHeader(t TokenSpec, alg, kid string) object {
	o := object{{"typ", "JWT"}}
	if t.HashedNonce || t.SealedNonce {
		o.set("nonce", randomText(24))
	}
	o.set("alg", alg)
	if t.Version != "2.0" {
		o.set("x5t", kid) // v1 tokens name the key twice
	}
	o.set("kid", kid)
	for name, value := range t.Header {
		if value == nil {
			o.del(name)
		} else {
			o.set(name, value)
		}
	}
	return o
}

// hashNonce replaces the nonce in a JOSE header by its hash and leaves every
// other byte as it is.
func hashNonce(header []byte) []byte {
	var members struct{ Nonce string }
	if json.Unmarshal(header, &members) != nil || members.Nonce == "" {
		return header
	}
	sum := sha256.Sum256([]byte(members.Nonce))
	hashed := base64.RawURLEncoding.EncodeToString(sum[:])
	return bytes.Replace(header, mustJSON(members.Nonce), mustJSON(hashed), 1)
}

// sign signs as alg says. The elliptic key is used whatever key was asked for.
func (k *keyring) sign(alg string, key *signingKey, input string) []byte {
	digest := sha256.Sum256([]byte(input))
	var signature []byte
	var err error
	switch alg {
	case "RS256":
		signature, err = rsa.SignPKCS1v15(nil, key.private, crypto.SHA256, digest[:])
	case "PS256":
		signature, err = rsa.SignPSS(rand.Reader, key.private, crypto.SHA256, digest[:],
			&rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash})
	case "ES256":
		r, s, signErr := ecdsa.Sign(rand.Reader, k.elliptic(), digest[:])
		signature, err = make([]byte, 64), signErr
		r.FillBytes(signature[:32])
		s.FillBytes(signature[32:])
	case "HS256":
		der, marshalErr := x509.MarshalPKIXPublicKey(&key.private.PublicKey)
		mac := hmac.New(sha256.New, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
		mac.Write([]byte(input))
		signature, err = mac.Sum(nil), marshalErr
	default: // none, and anything that a test makes up
	}
	if err != nil {
		panic("emulator: sign token: " + err.Error())
	}
	return signature
}

// newUTI returns a unique token id: 16 bytes in 22 characters.
func newUTI() string {
	id := uuid.New()
	return base64.RawURLEncoding.EncodeToString(id[:])
}

func newOpaqueToken() string {
	return "PC" + randomText(180)
}

func newEncryptedToken(kid string) string {
	header := base64.RawURLEncoding.EncodeToString(mustJSON(object{
		{"alg", "RSA-OAEP"}, {"enc", "A256GCM"}, {"kid", kid}, {"typ", "JWT"},
	}))
	return strings.Join([]string{header, randomText(342), randomText(16), randomText(800), randomText(22)}, ".")
}

// randomText returns n random characters of the base64url alphabet.
func randomText(n int) string {
	b := make([]byte, (n*3+3)/4)
	_, _ = rand.Read(b) // never fails
	return base64.RawURLEncoding.EncodeToString(b)[:n]
}

// object is a JSON object that keeps the order of its members.
type object []member

type member struct {
	name  string
	value any
}

func (o *object) set(name string, value any) {
	for i := range *o {
		if (*o)[i].name == name {
			(*o)[i].value = value
			return
		}
	}
	*o = append(*o, member{name, value})
}

func (o *object) del(name string) {
	*o = slices.DeleteFunc(*o, func(m member) bool { return m.name == name })
}

// MarshalJSON implements json.Marshaler.
func (o object) MarshalJSON() ([]byte, error) {
	var b bytes.Buffer
	b.WriteByte('{')
	for i, m := range o {
		if i > 0 {
			b.WriteByte(',')
		}
		value, err := json.Marshal(m.value)
		if err != nil {
			return nil, err
		}
		b.Write(mustJSON(m.name))
		b.WriteByte(':')
		b.Write(value)
	}
	b.WriteByte('}')
	return b.Bytes(), nil
}

// mustJSON panics on values that JSON cannot hold: a mistake of the caller.
func mustJSON(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic("emulator: encode JSON: " + err.Error())
	}
	return b
}
