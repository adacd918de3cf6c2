package policy_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	. "github.com/partnerguard/partnerguard/policy"
)

const (
	home     = "1b2c3d4e-0a1b-4c2d-8e3f-901234567890" // the partner's tenant
	away     = "77aa66bb-1111-4222-8333-444455556666" // another one
	billing  = "7d1f0a52-9b3c-4c1e-8f60-2a5b9c0d1e11" // an app registration of the partner
	stranger = "3e8c5b10-7a6d-4f21-9c0b-5d4e3f2a1b00" // one that no integration names
	azureCLI = "04b07795-8ddb-461a-bbee-02f9e1bf7b46" // Microsoft's own
	sam      = "5f0e6c7a-2222-4d3b-9a55-0c1d2e3f4a5b" // a user's object id
)

var noon = time.Date(2026, 6, 10, 12, 0, 0, 0, time.UTC)

// option sets one fact of a call or of a configuration.
type (
	callOption   func(*Call)
	configOption func(*Config)
)

// call is GET /v1/invoices with a verified user token of the home tenant that
// lacks MFA, from an app that no integration names.
func call(options ...callOption) *Call {
	c := &Call{
		Time:   noon,
		Method: "GET",
		Path:   "/v1/invoices",
		Token: Token{
			Verified: true, Kind: KindAppUser, MFA: MFAAbsent, Version: "1.0", AMR: []string{"pwd"},
			TenantID: home, AppID: stranger, ObjectID: sam, UPN: "Sam@contoso-partner.example",
		},
		Evidence: Evidence{Listener: "default", Peer: netip.MustParseAddr("192.0.2.7"), Host: "guard.example"},
	}
	for _, o := range options {
		o(c)
	}
	return c
}

func app(id string) callOption        { return func(c *Call) { c.Token.AppID = id } }
func tenant(id string) callOption     { return func(c *Call) { c.Token.TenantID = id } }
func method(m string) callOption      { return func(c *Call) { c.Method = m } }
func path(p string) callOption        { return func(c *Call) { c.Path = p } }
func at(t time.Time) callOption       { return func(c *Call) { c.Time = t } }
func refused(r Reason) callOption     { return func(c *Call) { c.Refusal = r } }
func listener(n string) callOption    { return func(c *Call) { c.Evidence.Listener = n } }
func listenerOf(n string) callOption  { return func(c *Call) { c.Evidence.ListenerIntegration = n } }
func cert(n ...string) callOption     { return func(c *Call) { c.Evidence.ClientCert = n } }
func peer(a string) callOption        { return func(c *Call) { c.Evidence.Peer = netip.MustParseAddr(a) } }
func host(h string) callOption        { return func(c *Call) { c.Evidence.Host = h } }
func prefix(n string) callOption      { return func(c *Call) { c.Evidence.Prefix = n } }
func application(a string) callOption { return func(c *Call) { c.Evidence.Application = a } }
func userAgent(ua string) callOption  { return func(c *Call) { c.Evidence.UserAgent = ua } }
func withMFA(c *Call)                 { c.Token.MFA, c.Token.AMR = MFAPresent, []string{"pwd", "mfa"} }
func appOnly(c *Call) {
	c.Token.Kind, c.Token.MFA, c.Token.AMR, c.Token.UPN = KindAppOnly, MFANotApplicable, nil, ""
}

// unverified leaves the token's claims as they are, and lets none of them hold.
func unverified(r Reason) callOption {
	return func(c *Call) { c.Token.Verified, c.TokenReason = false, r }
}

// because makes a call that has exactly the reason r.
func because(r Reason) callOption {
	return func(c *Call) {
		switch r {
		case ReasonMFAPresent:
			withMFA(c)
		case ReasonAppOnly:
			appOnly(c)
		case ReasonMFAMissing:
		case ReasonMFAUnknown:
			c.Token.MFA, c.Token.AMR = MFAUnknown, nil
		case ReasonRequestAmbiguous, ReasonMethodRefused, ReasonIntegrationUnknown, ReasonLimitExceeded:
			withMFA(c) // not even a good token helps
			c.Refusal = r
		default:
			unverified(r)(c)
		}
	}
}

// newPolicy is global mode audit for the home and away tenants unless options
// say otherwise.
func newPolicy(t testing.TB, options ...configOption) *Policy {
	t.Helper()
	p, err := New(config(options...))
	if err != nil {
		t.Fatalf("New: %v", err)
	}
	return p
}

func config(options ...configOption) Config {
	cfg := Config{Mode: Audit, Tenants: []string{home, away}}
	for _, o := range options {
		o(&cfg)
	}
	return cfg
}

func mode(m Mode) configOption { return func(cfg *Config) { cfg.Mode = m } }
func unverifiable(u OnUnverifiable) configOption {
	return func(cfg *Config) { cfg.OnUnverifiable = u }
}
func integration(name string, m Mode, match Match) configOption {
	return func(cfg *Config) {
		cfg.Integrations = append(cfg.Integrations, Integration{Name: name, Owner: name + "@contoso.example", Mode: m, Match: match})
	}
}

// rule adds a rule that options may narrow.
func rule(name string, m Mode, options ...func(*Rule)) configOption {
	return func(cfg *Config) {
		r := Rule{Name: name, Mode: m}
		for _, o := range options {
			o(&r)
		}
		cfg.Rules = append(cfg.Rules, r)
	}
}

func onRoutes(patterns ...string) func(*Rule) { return func(r *Rule) { r.Routes = patterns } }
func onMethods(m ...string) func(*Rule)       { return func(r *Rule) { r.Methods = m } }
func ofTenants(id ...string) func(*Rule)      { return func(r *Rule) { r.Tenants = id } }
func ofIntegrations(n ...string) func(*Rule)  { return func(r *Rule) { r.Integrations = n } }
func percent(n int) func(*Rule)               { return func(r *Rule) { r.Percent = &n } }
func from(t time.Time) func(*Rule)            { return func(r *Rule) { r.From = t } }
func until(t time.Time) func(*Rule)           { return func(r *Rule) { r.Until = t } }

// decide attributes c and decides it, as the guard does.
func decide(p *Policy, c *Call) Decision {
	c.Attribution = p.Attribute(c)
	return p.Decide(c)
}

// DESIGN's table, one row a group of reasons: what each mode does with them.
func TestMatrix(t *testing.T) {
	type cells [3]Effect // audit, tag, enforce
	var (
		good           = cells{Allow, Allow, Allow}
		lacking        = cells{Allow, Tag, Reject}
		forwarded      = cells{Allow, Tag, Tag}
		turnedAway     = cells{Allow, Reject, Reject}
		refusedForGood = cells{Reject, Reject, Reject}
	)
	expected := func(r Reason, u OnUnverifiable) cells {
		switch r {
		case ReasonMFAPresent, ReasonAppOnly:
			return good
		case ReasonRequestAmbiguous, ReasonMethodRefused, ReasonIntegrationUnknown, ReasonLimitExceeded:
			return refusedForGood
		case ReasonTokenOpaque, ReasonTokenEncrypted, ReasonTokenGraphNonce:
			return map[OnUnverifiable]cells{AsMode: lacking, ForwardUnverifiable: forwarded, RejectUnverifiable: turnedAway}[u]
		}
		return lacking
	}
	for _, r := range Reasons() {
		if strings.HasPrefix(string(r), "upstream_") {
			continue // found after the decision
		}
		for _, u := range []OnUnverifiable{AsMode, ForwardUnverifiable, RejectUnverifiable} {
			want := expected(r, u)
			for i, m := range []Mode{Audit, TagMode, Enforce} {
				got := decide(newPolicy(t, mode(m), unverifiable(u)), call(because(r)))
				wanted := Decision{Effect: want[i], Reason: r, Mode: m, WouldReject: want[2] == Reject}
				if got != wanted {
					t.Errorf("%s in %s with on_unverifiable %s = %+v, want %+v", r, m, u, got, wanted)
				}
			}
		}
	}
}

func TestReasonOfACall(t *testing.T) {
	for _, tt := range []struct {
		name string
		c    *Call
		want Reason
	}{
		{"a user with MFA", call(withMFA), ReasonMFAPresent},
		{"a user without", call(), ReasonMFAMissing},
		{"a user of whom nobody can tell", call(because(ReasonMFAUnknown)), ReasonMFAUnknown},
		{"an application", call(appOnly), ReasonAppOnly},
		{"an application, whatever its amr", call(withMFA, appOnly), ReasonAppOnly},
		{"an undecided kind is judged as a user: without MFA", call(func(c *Call) { c.Token.Kind = KindUndecided }), ReasonMFAMissing},
		{"an undecided kind is judged as a user: with MFA", call(withMFA, func(c *Call) { c.Token.Kind = KindUndecided }), ReasonMFAPresent},
		{"a user whose MFA does not apply has proved nothing", call(func(c *Call) { c.Token.MFA = MFANotApplicable }), ReasonMFAUnknown},
		{"an unverified token's claims of MFA do not count", call(withMFA, unverified(ReasonTokenBadSignature)), ReasonTokenBadSignature},
		{"a reason against the token beats a verified flag", call(withMFA, func(c *Call) { c.TokenReason = ReasonTokenExpired }), ReasonTokenExpired},
		{"a refused request beats a good token", call(withMFA, refused(ReasonRequestAmbiguous)), ReasonRequestAmbiguous},
		{"a refused request beats a bad token", call(unverified(ReasonTokenExpired), refused(ReasonMethodRefused)), ReasonMethodRefused},
		{"neither verified nor told why not", call(withMFA, unverified("")), ReasonInternalError},
	} {
		if got := decide(newPolicy(t, mode(Enforce)), tt.c).Reason; got != tt.want {
			t.Errorf("%s: reason %s, want %s", tt.name, got, tt.want)
		}
	}
}

func TestWouldRejectIgnoresModePercentAndDates(t *testing.T) {
	everywhere := []struct {
		name string
		p    *Policy
	}{
		{"audit", newPolicy(t)},
		{"tag", newPolicy(t, mode(TagMode))},
		{"enforce", newPolicy(t, mode(Enforce))},
		{"a rule at 0 percent", newPolicy(t, rule("r", Enforce, percent(0)))},
		{"a rule of the past", newPolicy(t, rule("r", Enforce, until(noon.Add(-time.Hour))))},
		{"a rule of the future", newPolicy(t, rule("r", Enforce, from(noon.Add(time.Hour))))},
		{"an integration in audit under enforce", newPolicy(t, mode(Enforce), integration("i", Audit, Match{AppID: []string{stranger}}))},
	}
	for _, tt := range []struct {
		reason Reason
		want   bool
	}{
		{ReasonMFAPresent, false}, {ReasonAppOnly, false},
		{ReasonMFAMissing, true}, {ReasonMFAUnknown, true}, {ReasonTokenExpired, true}, {ReasonTokenMissing, true},
		{ReasonTokenOpaque, true}, {ReasonKeysUnavailable, true}, {ReasonRequestAmbiguous, true},
	} {
		for _, e := range everywhere {
			if got := decide(e.p, call(because(tt.reason))).WouldReject; got != tt.want {
				t.Errorf("WouldReject of %s in %s = %v, want %v", tt.reason, e.name, got, tt.want)
			}
		}
	}
}

func TestZeroValuesRefuse(t *testing.T) {
	if d := (Decision{}); d.Effect != Reject {
		t.Errorf("zero Decision = %s, want reject", d.Effect)
	}
	if got := newPolicy(t, mode(Enforce)).Decide(&Call{}); got.Effect != Reject || got.Reason != ReasonInternalError {
		t.Errorf("Decide(zero Call) in enforce = %+v, want a rejection for internal_error", got)
	}
	var zero Policy
	for _, r := range Reasons() {
		if got := decide(&zero, call(because(r))); got.Effect != Reject || !got.WouldReject || got.Reason.Good() {
			t.Errorf("zero Policy: Decide(%s) = %+v, want a rejection that is not called good", r, got)
		}
	}
	if zero.AuditOnly() {
		t.Error("zero Policy: AuditOnly = true, want false")
	}
}

func TestAuditOnly(t *testing.T) {
	for _, tt := range []struct {
		name string
		p    *Policy
		want bool
	}{
		{"nothing but the global audit", newPolicy(t), true},
		{"audit everywhere", newPolicy(t, integration("a", Audit, Match{}), integration("b", Inherit, Match{}), rule("r", Audit)), true},
		{"global tag", newPolicy(t, mode(TagMode)), false},
		{"one integration in tag", newPolicy(t, integration("a", TagMode, Match{})), false},
		{"a rule in enforce", newPolicy(t, rule("r", Enforce)), false},
		{"a rule in enforce at 0 percent", newPolicy(t, rule("r", Enforce, percent(0))), false},
		{"a rule in enforce next year", newPolicy(t, rule("r", Enforce, from(noon.AddDate(1, 0, 0)))), false},
	} {
		if got := tt.p.AuditOnly(); got != tt.want {
			t.Errorf("%s: AuditOnly = %v, want %v", tt.name, got, tt.want)
		}
	}
}

func TestNewNamesTheFieldOfEveryMistake(t *testing.T) {
	match := func(m Match) configOption { return integration("a", Inherit, m) }
	ruled := func(options ...func(*Rule)) configOption { return rule("r", Audit, options...) }
	for _, tt := range []struct {
		name string
		bad  configOption
		path string
	}{
		{"no global mode", mode(Inherit), "mode"},
		{"an unknown global mode", mode(Enforce + 1), "mode"},
		{"an unknown on_unverifiable", unverifiable(RejectUnverifiable + 1), "entra.on_unverifiable"},
		{"a tenant that is a domain", func(c *Config) { c.Tenants = []string{home, "contoso.example"} }, "tenants[1]"},
		{"enforce for any tenant", func(c *Config) { c.Mode, c.Tenants = Enforce, nil }, "tenants"},
		{"tag for any tenant", func(c *Config) { c.Mode, c.Tenants = TagMode, nil }, "tenants"},
		{"an integration in tag for any tenant", func(c *Config) { c.Tenants = nil; integration("a", TagMode, Match{})(c) }, "tenants"},
		{"a future rule in enforce for any tenant", func(c *Config) {
			c.Tenants = nil
			rule("r", Enforce, from(noon.AddDate(1, 0, 0)))(c)
		}, "tenants"},

		{"an integration without a name", integration("", Inherit, Match{}), "integrations[0].name"},
		{"an integration in capitals", integration("Billing", Inherit, Match{}), "integrations[0].name"},
		{"a name of 64 letters", integration(strings.Repeat("a", 64), Inherit, Match{}), "integrations[0].name"},
		{"a reserved name: unknown", integration("unknown", Inherit, Match{}), "integrations[0].name"},
		{"a reserved name: other", integration("other", Inherit, Match{}), "integrations[0].name"},
		{"a name used twice", func(c *Config) { integration("a", Inherit, Match{})(c); integration("a", Inherit, Match{})(c) }, "integrations[1].name"},
		{"an unknown mode of an integration", integration("a", Enforce+1, Match{}), "integrations[0].mode"},
		{"an app_id that is no GUID", match(Match{AppID: []string{billing, "billing"}}), "integrations[0].match.app_id[1]"},
		{"an empty user", match(Match{User: []string{""}}), "integrations[0].match.user[0]"},
		{"an empty client_cert", match(Match{ClientCert: []string{" "}}), "integrations[0].match.client_cert[0]"},
		{"an empty listener", match(Match{Listener: []string{""}}), "integrations[0].match.listener[0]"},
		{"an empty host", match(Match{Host: []string{"a.example", ""}}), "integrations[0].match.host[1]"},
		{"an empty application", match(Match{Application: []string{""}}), "integrations[0].match.application[0]"},
		{"an empty user_agent, which would begin every one", match(Match{UserAgent: []string{""}}), "integrations[0].match.user_agent[0]"},
		{"a path_prefix of every path", match(Match{PathPrefix: []string{"/"}}), "integrations[0].match.path_prefix[0]"},
		{"a path_prefix without its slash", match(Match{PathPrefix: []string{"/v1", "v1"}}), "integrations[0].match.path_prefix[1]"},
		{"a path_prefix of /i/ alone", match(Match{PathPrefix: []string{"/i/"}}), "integrations[0].match.path_prefix[0]"},
		{"a path_prefix whose name no path can have", match(Match{PathPrefix: []string{"/i/Billing/v1"}}), "integrations[0].match.path_prefix[0]"},

		{"a rule without a name", rule("", Audit), "rules[0].name"},
		{"a rule's name used twice", func(c *Config) { rule("r", Audit)(c); rule("r", Audit)(c) }, "rules[1].name"},
		{"a rule without a mode", rule("r", Inherit), "rules[0].mode"},
		{"a rule with an unknown mode", rule("r", Enforce+1), "rules[0].mode"},
		{"a rule for an integration that is not there", ruled(ofIntegrations("nobody")), "rules[0].integrations[0]"},
		{"a rule for app- without a GUID", ruled(ofIntegrations("unknown", "app-1")), "rules[0].integrations[1]"},
		{"a rule for a tenant that is not accepted", ruled(ofTenants(home, stranger)), "rules[0].tenants[1]"},
		{"a rule for a tenant that is no GUID", ruled(ofTenants("contoso.example")), "rules[0].tenants[0]"},
		{"an empty method", ruled(onMethods("GET", "")), "rules[0].methods[1]"},
		{"a method with a space", ruled(onMethods("GET POST")), "rules[0].methods[0]"},
		{"a route without its slash", ruled(onRoutes("v1/invoices")), "rules[0].routes[0]"},
		{"a route with * inside a segment", ruled(onRoutes("/v1/**", "/v1/inv*")), "rules[0].routes[1]"},
		{"a route with ** before its end", ruled(onRoutes("/v1/**/orders")), "rules[0].routes[0]"},
		{"a negative percent", ruled(percent(-1)), "rules[0].percent"},
		{"more than all", ruled(percent(101)), "rules[0].percent"},
		{"dates the wrong way round", ruled(from(noon), until(noon.Add(-time.Hour))), "rules[0].until"},
		{"dates that leave no moment", ruled(from(noon), until(noon)), "rules[0].until"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p, err := New(config(tt.bad))
			if err == nil || p != nil {
				t.Fatalf("New = %v, %v; want no Policy and an error at %s", p, err, tt.path)
			}
			fields := fieldErrors(err)
			if !slices.ContainsFunc(fields, func(e *FieldError) bool { return e.Path == tt.path }) {
				t.Errorf("New: %v; want an error at %s", err, tt.path)
			}
			for _, e := range fields {
				if e.Problem == "" || e.Hint == "" || !strings.HasPrefix(e.Error(), e.Path+": ") {
					t.Errorf("error %+v should say where, what and what to write", e)
				}
			}
		})
	}
}

func TestNewReportsAllMistakesAtOnce(t *testing.T) {
	_, err := New(config(mode(Inherit), integration("A", Inherit, Match{}), rule("", Audit, percent(200))))
	var got []string
	for _, e := range fieldErrors(err) {
		got = append(got, e.Path)
	}
	want := []string{"mode", "integrations[0].name", "rules[0].name", "rules[0].percent"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("places of the mistakes (-want +got):\n%s", diff)
	}
	var one *FieldError
	if !errors.As(err, &one) {
		t.Errorf("New's error %v holds no *FieldError", err)
	}
}

// fieldErrors are the errors that New joined.
func fieldErrors(err error) (all []*FieldError) {
	joined, ok := err.(interface{ Unwrap() []error })
	if !ok {
		return nil
	}
	for _, e := range joined.Unwrap() {
		var f *FieldError
		if errors.As(e, &f) {
			all = append(all, f)
		}
	}
	return all
}

func TestNewAcceptsWhatTheDocumentationShows(t *testing.T) {
	p := newPolicy(t,
		func(c *Config) { c.Tenants = []string{strings.ToUpper(home)} },
		integration("nightly-billing", Enforce, Match{AppID: []string{strings.ToUpper(billing)}, PathPrefix: []string{"/i/nb/", "/v1/invoices"}}),
		rule("invoices first", Enforce, onRoutes("/v1/invoices/**", "/", "/**"), onMethods("get", "BASELINE-CONTROL"), percent(25), from(noon),
			ofTenants(strings.ToUpper(home)), ofIntegrations("nightly-billing", "unknown", "app-"+strings.ToUpper(stranger))),
	)
	if diff := cmp.Diff([]string{home}, p.Tenants()); diff != "" {
		t.Errorf("Tenants (-want +got):\n%s", diff)
	}
	if got := p.Mode(); got != Audit {
		t.Errorf("Mode = %s, want audit", got)
	}
	if in := p.Integrations(); len(in) != 1 || in[0].Name != "nightly-billing" || in[0].Match.AppID[0] != billing {
		t.Errorf("Integrations = %+v, want nightly-billing with its app id in lower case", in)
	}
	if _, err := New(Config{Mode: Audit, Rules: []Rule{{Name: "r", Mode: Audit, Tenants: []string{home}}}}); err != nil {
		t.Errorf("audit alone for any tenant: New: %v, want no error", err)
	}
}

func TestPolicyDoesNotChangeWithItsConfig(t *testing.T) {
	cfg := config(
		integration("a", Enforce, Match{AppID: []string{stranger}, PathPrefix: []string{"/v1/"}}),
		rule("r", TagMode, ofIntegrations("a"), ofTenants(home), onMethods("GET"), onRoutes("/v1/**")),
	)
	p, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	before := decide(p, call())
	cfg.Tenants[0], cfg.Integrations[0].Name, cfg.Integrations[0].Match.AppID[0], cfg.Integrations[0].Match.PathPrefix[0] = away, "b", billing, "/v2"
	r := &cfg.Rules[0]
	r.Mode, r.Integrations[0], r.Tenants[0], r.Methods[0], r.Routes[0] = Audit, "unknown", away, "POST", "/v2"
	if got := decide(p, call()); got != before {
		t.Errorf("Decide = %+v after its Config was changed, want %+v as before", got, before)
	}
	if before.Rule != "r" || before.Effect != Tag {
		t.Errorf("Decide = %+v, want a tag by rule r", before)
	}
}

func TestWordsAreReadAsTheyAreWritten(t *testing.T) {
	for m, word := range map[Mode]string{Audit: "audit", TagMode: "tag", Enforce: "enforce"} {
		if got, err := ParseMode(word); got != m || err != nil || m.String() != word {
			t.Errorf("ParseMode(%q) = %v, %v; want %q", word, got, err, m)
		}
	}
	for u, word := range map[OnUnverifiable]string{AsMode: "as_mode", ForwardUnverifiable: "forward", RejectUnverifiable: "reject"} {
		if got, err := ParseOnUnverifiable(word); got != u || err != nil || u.String() != word {
			t.Errorf("ParseOnUnverifiable(%q) = %v, %v; want %q", word, got, err, u)
		}
	}
	for _, bad := range []string{"", "Audit", "enforced", "inherit", " tag"} {
		if m, err := ParseMode(bad); err == nil || m != Inherit {
			t.Errorf("ParseMode(%q) = %v, %v; want an error", bad, m, err)
		}
		if _, err := ParseOnUnverifiable(bad); err == nil {
			t.Errorf("ParseOnUnverifiable(%q): no error", bad)
		}
	}
	for e, word := range map[Effect]string{Reject: "reject", Tag: "tag", Allow: "allow"} {
		if e.String() != word {
			t.Errorf("Effect %d = %q, want %q", e, e, word)
		}
	}
}

func TestIsGUID(t *testing.T) {
	for s, want := range map[string]bool{
		home: true, strings.ToUpper(home): true,
		"": false, home[:35]: false, home + "0": false, "{" + home[1:35] + "}": false,
		strings.ReplaceAll(home, "-", "0"): false, "g" + home[1:]: false, home[:8] + "0" + home[9:]: false,
	} {
		if got := IsGUID(s); got != want {
			t.Errorf("IsGUID(%q) = %v, want %v", s, got, want)
		}
	}
}

// dealer deals random configurations and calls, the same ones for the same seed.
// Its integrations match on strong or on weak evidence, never on both in one: a
// match with one strong condition is strong, so its weak ones do count.
type dealer struct{ *rand.Rand }

var (
	tokenReasons = []Reason{
		ReasonMFAPresent, ReasonAppOnly, ReasonMFAMissing, ReasonMFAUnknown, ReasonTokenMissing, ReasonTokenMalformed,
		ReasonTokenExpired, ReasonTokenBadSignature, ReasonTokenUnknownKey, ReasonTokenOpaque, ReasonTokenEncrypted,
		ReasonTokenGraphNonce, ReasonKeysUnavailable, ReasonVerifyOverloaded, ReasonInternalError,
	}
	somePaths    = []string{"/v1/invoices", "/V1//Invoices/", "/v1/%69nvoices", "/v1/invoices%2Fx", "/v1/customers/x/orders", "/"}
	somePatterns = []string{"/**", "/v1/**", "/v1/invoices", "/v1/invoices/**", "/v1/*", "/v1/customers/*/orders", "/v1/%69nvoices"}
	someApps     = []string{billing, stranger, azureCLI}
)

func pick[T any](d dealer, from ...T) T { return from[d.IntN(len(from))] }

func (d dealer) config(modes ...Mode) Config {
	cfg := config(mode(pick(d, modes...)), unverifiable(pick(d, AsMode, ForwardUnverifiable, RejectUnverifiable)))
	names := []string{"unknown"}
	for _, id := range someApps {
		names = append(names, "app-"+id)
	}
	for i := range d.IntN(5) {
		name := fmt.Sprintf("i%d", i)
		names = append(names, name)
		match := pick(d, Match{}, Match{AppID: []string{pick(d, someApps...)}}, Match{Listener: []string{"own"}},
			Match{User: []string{sam}}, Match{Source: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}},
			Match{Host: []string{name + ".example"}}, Match{Application: []string{"shared"}},
			Match{UserAgent: []string{"script/"}}, Match{PathPrefix: []string{"/i/" + name}})
		integration(name, pick(d, append(modes, Inherit)...), match)(&cfg)
	}
	maybe := func(o func(*Rule)) func(*Rule) {
		if d.IntN(3) > 0 {
			return func(*Rule) {}
		}
		return o
	}
	for i := range d.IntN(6) {
		rule(fmt.Sprintf("r%d", i), pick(d, modes...),
			maybe(ofIntegrations(pick(d, names...), pick(d, names...))),
			maybe(ofTenants(pick(d, home, away))),
			maybe(onMethods(pick(d, "GET", "POST"))),
			maybe(onRoutes(pick(d, somePatterns...))),
			maybe(percent(d.IntN(101))),
			maybe(from(noon.Add(time.Duration(d.IntN(3)-1)*time.Hour))),
			maybe(until(noon.Add(time.Duration(d.IntN(2)+2)*time.Hour))),
		)(&cfg)
	}
	return cfg
}

// call carries no weak evidence yet.
func (d dealer) call() *Call {
	return call(because(pick(d, tokenReasons...)), app(pick(d, someApps...)), tenant(pick(d, home, away)),
		method(pick(d, "GET", "POST")), path(pick(d, somePaths...)), listener(pick(d, "own", "default")),
		peer(pick(d, "192.0.2.7", "198.51.100.7")), host(""))
}

// claim adds what any caller can write.
func (d dealer) claim(c *Call) {
	c.Evidence.Host = pick(d, "", "i0.example", "i1.example", "i2.example")
	c.Evidence.Application = pick(d, "", "shared", "i3")
	c.Evidence.UserAgent = pick(d, "", "script/1.0")
	c.Evidence.Prefix = pick(d, "", "i0", "i1", "i2", "i3", "i4")
}

// deal runs check for 2,000 random configurations.
func deal(t *testing.T, modes []Mode, check func(t *testing.T, d dealer, cfg Config, p *Policy)) {
	for seed := range uint64(2000) {
		d := dealer{rand.New(rand.NewPCG(seed, 2026))}
		cfg := d.config(modes...)
		p, err := New(cfg)
		if err != nil {
			t.Fatalf("seed %d: New: %v", seed, err)
		}
		check(t, d, cfg, p)
		if t.Failed() {
			t.Fatalf("with seed %d: %+v", seed, cfg)
		}
	}
}

func TestAuditNeverRejectsForTheToken(t *testing.T) {
	seen := map[Effect]int{}
	deal(t, []Mode{Audit, TagMode, Enforce}, func(t *testing.T, d dealer, _ Config, p *Policy) {
		c := d.call()
		d.claim(c)
		got := decide(p, c)
		seen[got.Effect]++
		if (got.Mode == Audit || p.AuditOnly()) && got.Effect != Allow {
			t.Errorf("Decide(%+v) = %+v, want allow in audit", c, got)
		}
	})
	for _, e := range []Effect{Allow, Tag, Reject} {
		if seen[e] < 100 {
			t.Errorf("only %d of the random calls had the effect %s; the table proves little", seen[e], e)
		}
	}
	deal(t, []Mode{Audit}, func(t *testing.T, d dealer, _ Config, p *Policy) {
		c := d.call()
		d.claim(c)
		if got := decide(p, c); got.Effect != Allow || got.Mode != Audit || !p.AuditOnly() {
			t.Errorf("Decide(%+v) = %+v where every mode is audit, want allow", c, got)
		}
	})
}

func TestWeakEvidenceNeverLoosens(t *testing.T) {
	stricter := 0
	deal(t, []Mode{Audit, TagMode, Enforce}, func(t *testing.T, d dealer, _ Config, p *Policy) {
		c := d.call()
		plain := decide(p, c)
		d.claim(c)
		claimed := decide(p, c)
		if claimed.Mode > plain.Mode {
			stricter++
		}
		if claimed.Mode < plain.Mode || claimed.Effect > plain.Effect || claimed.WouldReject != plain.WouldReject {
			t.Errorf("Decide(%+v) = %+v, want nothing looser than %+v, which it is without weak evidence", c, claimed, plain)
		}
	})
	if stricter < 50 {
		t.Errorf("weak evidence made only %d calls stricter; the table proves little", stricter)
	}
}

func TestDecideIsDeterministic(t *testing.T) {
	deal(t, []Mode{Audit, TagMode, Enforce}, func(t *testing.T, d dealer, cfg Config, p *Policy) {
		c := d.call()
		d.claim(c)
		want := decide(p, c)
		before := *c
		if again := p.Decide(c); again != want {
			t.Errorf("Decide(%+v) = %+v, then %+v", c, want, again)
		}
		if !reflect.DeepEqual(*c, before) {
			t.Errorf("Decide changed its call from %+v to %+v", before, *c)
		}
		twin, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		if got := decide(twin, c); got != want {
			t.Errorf("an equal Policy decides %+v, want %+v", got, want)
		}
	})
}

func TestPolicyIsSafeForConcurrentUse(t *testing.T) {
	p := newPolicy(t, mode(TagMode), integration("a", Enforce, Match{Application: []string{"a"}}), rule("r", Audit, onRoutes("/v1/%69nvoices"), percent(50)))
	want := decide(p, call(application("a"), path("/v1/%69nvoices")))
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 100 {
				if got := decide(p, call(application("a"), path("/v1/%69nvoices"))); got != want {
					t.Errorf("Decide = %+v, want %+v", got, want)
				}
				FindRoute("GET", "/v1/invoices")
			}
		})
	}
	wg.Wait()
}

// BenchmarkDecide is what policy costs a call: attribution, decision and route,
// with 20 integrations and 10 rules of which the last one matches.
func BenchmarkDecide(b *testing.B) {
	cfg := config(mode(Enforce))
	for i := range 19 {
		integration(fmt.Sprintf("i%d", i), Inherit, Match{AppID: []string{fmt.Sprintf("00000000-0000-4000-8000-%012d", i)}})(&cfg)
	}
	integration("nightly-billing", Inherit, Match{AppID: []string{billing}})(&cfg)
	for i := range 9 {
		rule(fmt.Sprintf("r%d", i), TagMode, onRoutes(fmt.Sprintf("/v1/customers/*/orders/%d/**", i)), onMethods("GET"))(&cfg)
	}
	rule("last", Audit, onRoutes("/v1/customers/**"), ofIntegrations("nightly-billing"))(&cfg)
	p, err := New(cfg)
	if err != nil {
		b.Fatal(err)
	}
	c := call(app(billing), path("/v1/customers/"+away+"/orders/10"))
	if d := decide(p, c); d.Rule != "last" || d.Effect != Allow {
		b.Fatalf("Decide = %+v, want allow by rule last", d)
	}
	b.ReportAllocs()
	for b.Loop() {
		c.Attribution = p.Attribute(c)
		d := p.Decide(c)
		r, _ := FindRoute(c.Method, c.Path)
		if d.Effect != Allow || r.Template == "" {
			b.Fatal(d, r)
		}
	}
}
