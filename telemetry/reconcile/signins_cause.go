package reconcile

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/google/uuid"

	"github.com/partnerguard/partnerguard/policy"
)

// Evidence is a field of a sign-in record, by Graph's name, and its value there.
type Evidence struct {
	Field string `json:"field"`
	Value string `json:"value"`
}

// proof is a cause that a sign-in shows.
type proof struct {
	code       string
	confidence policy.Confidence // if the sign-in is known to be the token's
	evidence   []Evidence
}

// signer is an application with the user that it signs in, none when it signs in
// as itself.
type signer struct{ app, user uuid.UUID }

// signIn is a row that is understood.
type signIn struct {
	*exportRow
	at        time.Time
	principal signer
	id        uuid.UUID // of the request; zero when the row has none
	tokens    [2]tokenKey
	code      int // 0 for success
}

// tokenKey is a token's uti: the 16 bytes that it encodes, or the beginning of a
// hash of one of another form.
type tokenKey [16]byte

func keyOf(uti []byte) tokenKey {
	var key tokenKey
	if len(uti) == 22 {
		if _, err := base64.RawURLEncoding.Decode(key[:], uti); err == nil {
			return key
		}
	}
	sum := sha256.Sum256(uti)
	return tokenKey(sum[:16])
}

// keyOfRequest is the key of the token that a sign-in request gave: the request's id
// is the uti's bytes read as .NET reads a GUID, the first three groups little-endian.
func keyOfRequest(id uuid.UUID) tokenKey {
	return tokenKey{id[3], id[2], id[1], id[0], id[5], id[4], id[7], id[6], id[8], id[9], id[10], id[11], id[12], id[13], id[14], id[15]}
}

// understand reads what must be there. The error is the reason to leave r out.
func (s *signIn) understand(r *exportRow) error {
	*s = signIn{exportRow: r}
	created := r.text(fieldCreated)
	if len(created) == 0 {
		return fmt.Errorf("it has no createdDateTime")
	}
	var ok bool
	if s.at, ok = signInTime(created); !ok {
		return fmt.Errorf("its date %q is not understood", signInText(created))
	}
	if s.principal.app, ok = guid(r.text(fieldApp)); !ok {
		return fmt.Errorf("its application id is no GUID")
	}
	s.principal.user, _ = guid(r.text(fieldUser))
	s.id, _ = guid(r.text(fieldID))
	if uti := r.text(fieldUTI); len(uti) > 0 {
		s.tokens[0] = keyOf(uti)
	}
	if s.id != uuid.Nil {
		s.tokens[1] = keyOfRequest(s.id)
	}
	code := r.text(fieldError)
	if status := r.text(fieldStatus); r.json {
		eachMember(status, func(k, v []byte) {
			if strings.EqualFold(string(k), "errorCode") {
				code = unquote(v)
			}
		})
	} else if len(code) == 0 && !saysWord(status, "success") {
		code = []byte("-1") // some failure
	}
	if len(code) > 0 {
		n, err := strconv.Atoi(string(code))
		if err != nil {
			return fmt.Errorf("its error code %q is no number", signInText(code))
		}
		s.code = n
	}
	return nil
}

// signInTime reads RFC 3339, which Graph and the portal write, and what spreadsheets
// make of it where day and month cannot be mistaken. Without a zone it is UTC.
func signInTime(b []byte) (time.Time, bool) {
	var t time.Time
	err := t.UnmarshalText(b)
	if err != nil {
		s := string(b)
		for _, layout := range []string{"2006-01-02T15:04:05", "2006-01-02 15:04:05", "2006-01-02 15:04:05Z07:00", "1/2/2006, 3:04:05 PM", "1/2/2006 3:04:05 PM", "2.1.2006 15:04:05", "2.1.2006, 15:04:05"} {
			if t, err = time.Parse(layout, s); err == nil {
				break
			}
		}
	}
	return t.UTC(), err == nil && t.Year() >= 2000 && t.Year() < 2200
}

func guid(b []byte) (uuid.UUID, bool) {
	if len(b) != 36 {
		return uuid.Nil, false
	}
	id, err := uuid.ParseBytes(b)
	return id, err == nil && id != uuid.Nil
}

// saysWord reports whether b is word, which is in lower case, as Graph writes it or as the
// portal shows it: singleFactorAuthentication, Single-factor authentication.
func saysWord(b []byte, word string) bool {
	i := 0
	for _, c := range b {
		if 'A' <= c && c <= 'Z' {
			c += 'a' - 'A'
		}
		if ('a' > c || c > 'z') && ('0' > c || c > '9') && c < utf8.RuneSelf {
			continue
		}
		if i == len(word) || word[i] != c {
			return false
		}
		i++
	}
	return i == len(word)
}

// saysOne is saysWord of any of a list, separated by commas, and of several words.
func saysOne(b []byte, words ...string) bool {
	for part := range bytes.SplitSeq(b, []byte{','}) {
		for _, w := range words {
			if saysWord(part, w) {
				return true
			}
		}
	}
	return false
}

func (s *signIn) is(f signInField, words ...string) bool { return saysOne(s.text(f), words...) }

// evidence is the value of a field as the export has it.
func (s *signIn) evidence(f signInField) Evidence {
	return Evidence{graphNames[f], signInText(s.text(f))}
}

// graphNames are the names of the fields that evidence is made of.
var graphNames = [fieldCount]string{
	fieldResource: "resourceId", fieldUserType: "userType", fieldHomeTenant: "homeTenantId", fieldRequirement: "authenticationRequirement",
	fieldProtocol: "authenticationProtocol", fieldTransfer: "originalTransferMethod", fieldIncoming: "incomingTokenType",
	fieldAccess: "conditionalAccessStatus", fieldInteractive: "isInteractive", fieldIssuerType: "tokenIssuerType", fieldMFAResult: "mfaDetail",
}

func (s *signIn) single() bool { return s.is(fieldRequirement, "singlefactorauthentication") }

// multifactor reports whether the log says that MFA was done, now or in the session
// that the sign-in continues.
func (s *signIn) multifactor() bool {
	if s.is(fieldRequirement, "multifactorauthentication") && s.code == 0 {
		return true
	}
	done := mfaDone(s.text(fieldMFAResult))
	s.steps(func(_, result []byte) { done = done || mfaDone(result) })
	return done
}

// mfaDone reports whether the text of a step says so: "MFA requirement satisfied by
// claim in the token", "MFA completed in Azure AD".
func mfaDone(result []byte) bool {
	return bytes.Contains(result, []byte("MFA requirement satisfied")) || bytes.Contains(result, []byte("MFA completed"))
}

// steps visits the steps of the authentication that succeeded.
func (s *signIn) steps(visit func(method, result []byte)) {
	eachElement(s.text(fieldDetails), func(step []byte) {
		var method, result []byte
		succeeded := true
		eachMember(step, func(k, v []byte) {
			switch {
			case saysWord(k, "authenticationmethod"):
				method = unquote(v)
			case saysWord(k, "authenticationstepresultdetail"):
				result = unquote(v)
			case saysWord(k, "succeeded"):
				succeeded = string(v) != "false"
			}
		})
		if succeeded {
			visit(method, result)
		}
	})
}

// proofs returns what s shows about why its token has no MFA claim: first how the
// token was got, then why nobody asked for MFA.
func (s *signIn) proofs() []proof {
	var ps []proof
	add := func(code string, c policy.Confidence, ev ...Evidence) { ps = append(ps, proof{code, c, ev}) }

	if s.is(fieldProtocol, "ropc") {
		// Nothing about policies is worth saying: this grant cannot do MFA.
		add("password_grant", policy.Certain, s.evidence(fieldProtocol))
		return ps
	}
	if s.multifactor() {
		// The token is known to lack the claim all the same.
		ev := s.evidence(fieldRequirement)
		s.steps(func(_, result []byte) {
			if mfaDone(result) {
				ev = Evidence{"authenticationDetails", signInText(result)}
			}
		})
		add("third_party_custom_control", policy.Likely, ev)
		return ps
	}
	switch {
	case s.is(fieldProtocol, "devicecode"):
		add("device_code_without_mfa", policy.Certain, s.evidence(fieldProtocol))
	case s.is(fieldTransfer, "devicecodeflow"):
		add("device_code_without_mfa", policy.Certain, s.evidence(fieldTransfer))
	}
	if s.is(fieldIncoming, "refreshtoken", "primaryrefreshtoken") {
		ev := []Evidence{s.evidence(fieldIncoming)}
		if s.single() {
			ev = append(ev, s.evidence(fieldRequirement))
		}
		add("refresh_token_without_mfa", policy.Certain, ev...)
	}
	switch {
	case s.is(fieldIncoming, "saml11", "saml20"):
		add("federated_idp_without_mfa", policy.Certain, s.evidence(fieldIncoming))
	case s.is(fieldProtocol, "wsfederation", "saml20"):
		add("federated_idp_without_mfa", policy.Certain, s.evidence(fieldProtocol))
	case s.is(fieldIssuerType, "adfederationservices", "adfederationservicesmfaadapter"):
		add("federated_idp_without_mfa", policy.Certain, s.evidence(fieldIssuerType))
	}
	var previous, password, federated Evidence
	s.steps(func(method, _ []byte) {
		ev := Evidence{"authenticationDetails", signInText(method)}
		switch {
		case saysWord(method, "previouslysatisfied"):
			previous = ev
		case saysWord(method, "federated") || saysWord(method, "federation"):
			federated = ev
		case saysWord(method, "password"):
			password = ev
		}
	})
	if federated.Value != "" && !hasProof(ps, "federated_idp_without_mfa") {
		add("federated_idp_without_mfa", policy.Certain, federated)
	}
	if previous.Value != "" && saysWord(s.text(fieldInteractive), "true") {
		add("browser_session_without_mfa", policy.Certain, previous, s.evidence(fieldInteractive))
	}
	if s.is(fieldUserType, "guest") {
		home, _ := guid(s.text(fieldHomeTenant))
		here, _ := guid(s.text(fieldResourceTenant))
		c, ev := policy.Likely, []Evidence{s.evidence(fieldUserType)}
		if home != uuid.Nil && here != uuid.Nil && home != here {
			c, ev = policy.Certain, append(ev, s.evidence(fieldHomeTenant))
		}
		add("guest_mfa_not_trusted", c, ev...)
	}

	notApplied := s.is(fieldAccess, "notapplied")
	network := s.trustedNetwork()
	switch {
	case network.Value != "" && (notApplied || s.single()):
		ev := []Evidence{network}
		if notApplied {
			ev = append(ev, s.evidence(fieldAccess))
		}
		add("trusted_location", policy.Certain, ev...)
	case notApplied:
		add("conditional_access_not_applied", policy.Certain, s.evidence(fieldAccess))
	case s.is(fieldAccess, "success") && s.single():
		add("conditional_access_without_mfa", policy.Certain, append([]Evidence{s.evidence(fieldAccess), s.evidence(fieldRequirement)}, s.policies()...)...)
	}
	if len(ps) == 0 && s.single() {
		ev := []Evidence{s.evidence(fieldRequirement)}
		if password.Value != "" {
			ev = append(ev, password)
		}
		add("single_factor_sign_in", policy.Certain, ev...)
	}
	return ps
}

func hasProof(ps []proof, code string) bool {
	for _, p := range ps {
		if p.code == code {
			return true
		}
	}
	return false
}

// trustedNetwork is the network that Entra trusts, if the sign-in came from one.
func (s *signIn) trustedNetwork() Evidence {
	ev := Evidence{Field: "networkLocationDetails"}
	eachElement(s.text(fieldNetwork), func(network []byte) {
		var kind, names []byte
		eachMember(network, func(k, v []byte) {
			switch {
			case saysWord(k, "networktype"):
				kind = unquote(v)
			case saysWord(k, "networknames"):
				names = v
			}
		})
		if ev.Value == "" && saysOne(kind, "trustednamedlocation", "trusted", "intranet") {
			ev.Value = signInText(kind)
			eachElement(names, func(name []byte) { ev.Value = signInText([]byte(ev.Value + " " + string(unquote(name)))) })
		}
	})
	return ev
}

// policies names the first three Conditional Access policies that the sign-in met.
func (s *signIn) policies() []Evidence {
	var met []Evidence
	eachElement(s.text(fieldPolicies), func(p []byte) {
		var name, result []byte
		eachMember(p, func(k, v []byte) {
			switch {
			case saysWord(k, "displayname"):
				name = unquote(v)
			case saysWord(k, "result"):
				result = unquote(v)
			}
		})
		if saysWord(result, "success") && len(met) < 3 {
			met = append(met, Evidence{"appliedConditionalAccessPolicies", signInText(name)})
		}
	})
	return met
}

// failure is what the log says about an error.
func (s *signIn) failure() []byte {
	text := s.text(fieldFailure)
	if s.json {
		eachMember(s.text(fieldStatus), func(k, v []byte) {
			if saysWord(k, "failurereason") {
				text = unquote(v)
			}
		})
	}
	return text
}

// unknownWords returns the fields whose values this program does not know, since
// Entra may have more by now.
func (s *signIn) unknownWords(visit func(Evidence)) {
	for _, known := range knownWords {
		if v := s.text(known.field); len(v) > 0 && !saysOne(v, known.words...) {
			visit(s.evidence(known.field))
		}
	}
}

var knownWords = []struct {
	field signInField
	words []string
}{
	{fieldRequirement, []string{"singlefactorauthentication", "multifactorauthentication"}},
	{fieldProtocol, []string{"none", "oauth2", "oauth20", "ropc", "wsfederation", "saml20", "devicecode", "authenticationtransfer", "nativeauth", "unknownfuturevalue"}},
	{fieldIncoming, []string{"none", "primaryrefreshtoken", "saml11", "saml20", "remotedesktoptoken", "refreshtoken", "unknownfuturevalue"}},
	{fieldAccess, []string{"success", "failure", "notapplied", "unknownfuturevalue"}},
}

// signInCauses are the causes that a sign-in can show, by code: policy's own, and those
// that only the log tells.
func signInCauses() map[string]policy.Cause {
	m := map[string]policy.Cause{}
	for _, t := range []policy.Token{
		{Kind: policy.KindAppUser, MFA: policy.MFAAbsent, AMR: []string{"pwd"}, AppAuth: "0"},
		{Kind: policy.KindAppUser, MFA: policy.MFAAbsent, AMR: []string{"fed"}, TenantID: "home", IdP: "away"},
	} {
		for _, c := range policy.Diagnose(t, policy.ReasonMFAMissing, "", "") {
			m[c.Code] = c
		}
	}
	for _, t := range []policy.Token{{}, {Audience: "https://graph.windows.net"}} {
		for _, c := range policy.Diagnose(t, policy.ReasonTokenWrongAudience, "", "") {
			m[c.Code] = c
		}
	}
	for _, c := range []policy.Cause{
		{
			Code: "device_code_without_mfa",
			Text: "The token comes from the device code flow, which was finished in a session without MFA.",
			Fix:  "Require MFA for this user and sign in again, better with the authorization code flow.",
		},
		{
			Code: "browser_session_without_mfa",
			Text: "A browser session that had no MFA answered the sign-in, so that nobody was asked.",
			Fix:  "Redo the consent in a private browser window with amr_values=mfa and replace the stored refresh token.",
		},
		{
			Code: "conditional_access_not_applied",
			Text: "No Conditional Access policy applied to this sign-in, so nobody asked for MFA.",
			Fix:  "Require MFA by a policy for all users and all cloud apps, without leaving out this user or Partner Center; then sign in again.",
		},
		{
			Code: "conditional_access_without_mfa",
			Text: "Conditional Access policies applied to this sign-in, but none of them requires MFA.",
			Fix:  "Let a policy for this user and Partner Center grant access only with multifactor authentication; then sign in again.",
		},
		{
			Code: "single_factor_sign_in",
			Text: "The sign-in that gave the token asked for one factor only.",
			Fix:  "Require MFA for this user and Partner Center by Conditional Access, then sign in again and replace the stored refresh token.",
		},
	} {
		m[c.Code] = c
	}
	return m
}

// signInText is text of an export fit to be kept and shown: see cleanText.
func signInText(b []byte) string { return cleanText(string(b[:min(len(b), 4*maxCleanText)])) }
