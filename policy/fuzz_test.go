package policy_test

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	. "github.com/partnerguard/partnerguard/policy"
)

// chooser takes choices off a number that a fuzzer varies.
type chooser uint64

func choose[T any](c *chooser, from ...T) T {
	n := chooser(len(from))
	i := *c % n
	*c /= n
	return from[i]
}

// FuzzCall takes a call from the bytes of its path to its decision. Whatever a
// client writes: no panic; /i/{name}/ and the rest are what was written; a call is
// named after a configured integration or its verified app id only; enforce lets
// nothing through without the proof, nor does anything but audit; and neither case
// nor empty segments of the path change what is decided.
func FuzzCall(f *testing.F) {
	f.Fuzz(func(t *testing.T, written, verb, name, agent, pattern, under string, bits uint64) {
		in, rest, ok := CutIntegration(written)
		switch {
		case !ok && (in != "" || rest != written || strings.HasPrefix(written, "/i/")):
			t.Errorf("CutIntegration(%q) = %q, %q, %v", written, in, rest, ok)
		case ok && "/i/"+in+rest != written && ("/i/"+in != written || rest != "/"):
			t.Errorf("CutIntegration(%q) = %q, %q, which make another path", written, in, rest)
		case ok && (strings.Contains(in, "/") || !strings.HasPrefix(rest, "/")):
			t.Errorf("CutIntegration(%q) = %q, %q", written, in, rest)
		}

		b := chooser(bits)
		everywhere := func(next func() Mode) Config {
			return config(mode(next()), unverifiable(choose(&b, AsMode, RejectUnverifiable, ForwardUnverifiable)),
				integration("by-path", next(), Match{PathPrefix: []string{under}}),
				integration("by-app", next(), apps(billing)),
				integration("by-name", next(), Match{}),
				integration("by-words", next(), Match{Application: []string{"Nightly"}, UserAgent: []string{"CIPP/"}}),
				rule("routed", next(), onRoutes(pattern), percent(choose(&b, 0, 50, 100))),
				rule("tenanted", next(), ofTenants(home), onMethods("GET")))
		}
		p, err := New(everywhere(func() Mode { return choose(&b, Audit, TagMode, Enforce) }))
		if err != nil {
			return // no pattern, or no prefix
		}
		strict := newPolicy(t, func(cfg *Config) { *cfg = everywhere(func() Mode { return Enforce }) })
		c := call(app(choose(&b, billing, stranger, azureCLI)), tenant(choose(&b, home, away)), because(choose(&b, tokenReasons...)),
			path(rest), prefix(in), method(verb), host(name), application(name), userAgent(agent))
		c.Evidence.Peer = choose(&b, netip.Addr{}, netip.MustParseAddr("192.0.2.7"))
		c.Refusal = choose(&b, "", "", "", ReasonRequestAmbiguous, ReasonLimitExceeded)

		d := decide(p, c)
		good := c.Refusal == "" && c.TokenReason == "" && c.Token.Verified && (c.Token.Kind == KindAppOnly || c.Token.MFA == MFAPresent)
		switch {
		case d.Effect == Allow && d.Mode != Audit && !good:
			t.Errorf("%+v is allowed as %+v without the proof", c, d)
		case d.Effect == Tag && (d.Mode == Audit || good || c.Refusal != ""):
			t.Errorf("%+v is tagged as %+v", c, d)
		case c.Refusal != "" && d.Effect != Reject, d.Mode == Audit && c.Refusal == "" && d.Effect != Allow, good && d.Effect != Allow:
			t.Errorf("%+v is decided as %+v", c, d)
		case d.WouldReject && good, d.Effect == Reject && d.Mode == Enforce && !d.WouldReject:
			t.Errorf("%+v is decided as %+v, which enforce would not", c, d)
		}
		twin := *c
		if d := decide(strict, &twin); d.Effect == Allow && !good || d.Mode != Enforce {
			t.Errorf("%+v is decided as %+v where all is enforce", c, d)
		}

		a := c.Attribution
		switch a.Name {
		case "by-path", "by-app", "by-name", "by-words", Unknown:
		case "app-" + c.Token.AppID:
			if !c.Token.Verified {
				t.Errorf("named %s by a token that is not verified", a.Name)
			}
		default:
			t.Errorf("named %q by nothing that is configured", a.Name)
		}
		if a.Strong && !c.Token.Verified {
			t.Errorf("%+v is strong without a verified token", a)
		}

		for _, other := range []string{flipCase(rest), strings.ReplaceAll(rest, "/", "//"), rest + "/"} {
			twin.Path = other
			if got := decide(p, &twin); got != d || twin.Attribution.Name != a.Name || twin.Attribution.Evidence != a.Evidence {
				t.Errorf("path %q: %+v by %s; but %q: %+v by %s", rest, d, a.Evidence, other, got, twin.Attribution.Evidence)
			}
		}
	})
}

// FuzzDiagnose: whatever a token says of itself and Microsoft answers, no panic, and
// every refusal has causes that can be shown: with a way out, the best first, none
// twice, none certain that nothing proves.
func FuzzDiagnose(f *testing.F) {
	rejections := []Rejection{"", RejectionMFARequired, RejectionAudienceRefused, RejectionTokenRefused, RejectionClaimsChallenge,
		RejectionConditionalAccess, RejectionAppOnlyUnsupported, RejectionOther}
	f.Fuzz(func(t *testing.T, amr, idp, audience, appID, appAuth, code string, bits uint64) {
		b := chooser(bits)
		token := Token{
			Verified: choose(&b, true, false),
			Kind:     choose(&b, KindAppUser, KindAppOnly, KindUndecided, KindOpaque),
			MFA:      choose(&b, MFAAbsent, MFAPresent, MFAUnknown, MFANotApplicable),
			Version:  "1.0", TenantID: home, AppID: choose(&b, appID, azureCLI), AMR: strings.Fields(amr),
			IdP: idp, Audience: audience, AppAuth: appAuth,
		}
		rejection, reason := choose(&b, rejections...), choose(&b, Reasons()...)
		before := slices.Clone(token.AMR)
		causes := Diagnose(token, reason, rejection, code)
		checkCauses(t, string(reason)+" "+string(rejection)+" "+code, token, reason, rejection, causes)
		if !slices.Equal(before, token.AMR) {
			t.Error("the token was changed")
		}
	})
}
