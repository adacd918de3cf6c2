package policy_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	. "github.com/partnerguard/partnerguard/policy"
)

// resolution is where a call's mode comes from.
type resolution struct {
	mode Mode
	rule string
}

func resolve(p *Policy, c *Call) resolution {
	d := decide(p, c)
	return resolution{d.Mode, d.Rule}
}

func by(rule string, m Mode) resolution { return resolution{m, rule} }
func byNoRule(m Mode) resolution        { return resolution{m, ""} }

func TestModeIsOfTheRuleElseTheIntegrationElseGlobal(t *testing.T) {
	billingIs := func(m Mode) configOption { return integration("billing", m, apps(billing)) }
	for _, tt := range []struct {
		name string
		p    *Policy
		want resolution
	}{
		{"nothing but the global mode", newPolicy(t, mode(TagMode)), byNoRule(TagMode)},
		{"an integration that says nothing", newPolicy(t, mode(TagMode), billingIs(Inherit)), byNoRule(TagMode)},
		{"an integration stricter than global", newPolicy(t, billingIs(Enforce)), byNoRule(Enforce)},
		{"an integration looser than global", newPolicy(t, mode(Enforce), billingIs(Audit)), byNoRule(Audit)},
		{"a rule stricter than both", newPolicy(t, billingIs(TagMode), rule("r", Enforce)), by("r", Enforce)},
		{"a rule looser than both", newPolicy(t, mode(Enforce), billingIs(Enforce), rule("r", Audit)), by("r", Audit)},
		{"a rule that agrees still has its name in the record", newPolicy(t, rule("r", Audit)), by("r", Audit)},
		{"the first of two rules that match", newPolicy(t, rule("one", TagMode), rule("two", Enforce)), by("one", TagMode)},
		{"a rule that does not match lets the next try", newPolicy(t, rule("one", TagMode, onMethods("POST")), rule("two", Enforce)), by("two", Enforce)},
		{"no rule matches", newPolicy(t, billingIs(TagMode), rule("r", Enforce, onMethods("POST"))), byNoRule(TagMode)},
		{"every key of a rule must hold", newPolicy(t, rule("r", Enforce, onMethods("GET"), onRoutes("/v1/orders"))), byNoRule(Audit)},
		{"every key of a rule holds", newPolicy(t, billingIs(Audit), rule("r", Enforce, onMethods("POST", "GET"), onRoutes("/x", "/v1/invoices"), ofTenants(home), ofIntegrations("billing"), percent(100))), by("r", Enforce)},
	} {
		if got := resolve(tt.p, call(app(billing))); got != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
	}
}

func TestRuleMatches(t *testing.T) {
	for _, tt := range []struct {
		name string
		rule func(*Rule)
		c    *Call
		want bool
	}{
		{"its method", onMethods("GET"), call(), true},
		{"its method, written in lower case", onMethods("get"), call(), true},
		{"another method", onMethods("POST", "PATCH"), call(), false},
		{"HEAD is not GET", onMethods("GET"), call(method("HEAD")), false},

		{"its tenant", ofTenants(home), call(), true},
		{"another tenant", ofTenants(away), call(), false},
		{"a strict rule's tenant, which an unverified token may be of", ofTenants(away), call(unverified(ReasonTokenOpaque)), true},

		{"its integration by app id", ofIntegrations("app-" + stranger), call(), true},
		{"its integration by app id, written in capitals", ofIntegrations("app-" + strings.ToUpper(stranger)), call(), true},
		{"another app id", ofIntegrations("app-" + billing), call(), false},
		{"another app id, merely claimed", ofIntegrations("app-" + stranger), call(unverified(ReasonTokenExpired)), false},
		{"callers that nothing names", ofIntegrations("unknown"), call(unverified(ReasonTokenExpired)), true},
		{"an app id names its caller", ofIntegrations("unknown"), call(), false},

		{"before its first moment", from(noon), call(at(noon.Add(-1))), false},
		{"at its first moment", from(noon), call(at(noon)), true},
		{"before its end", until(noon), call(at(noon.Add(-1))), true},
		{"at its end", until(noon), call(at(noon)), false},
		{"in another time zone", from(noon), call(at(noon.In(time.FixedZone("", 7200)))), true},

		{"nobody", percent(0), call(), false},
		{"everybody", percent(100), call(), true},
	} {
		want := byNoRule(Audit)
		if tt.want {
			want = by("r", Enforce)
		}
		if got := resolve(newPolicy(t, rule("r", Enforce, tt.rule)), tt.c); got != want {
			t.Errorf("%s: %v, want %v", tt.name, got, want)
		}
	}
}

func TestRoutesOfARule(t *testing.T) {
	for _, tt := range []struct {
		pattern string
		yes, no []string
	}{
		{
			"/v1/invoices",
			[]string{"/v1/invoices", "/v1/invoices/", "/V1/INVOICES", "//v1///invoices//"},
			[]string{"/v1/invoices/1", "/v1", "/", "/v1/invoice", "/i/v1/invoices"},
		},
		{
			"/V1/Invoices/**",
			[]string{"/v1/invoices", "/v1/invoices/", "/v1/invoices/1/documents/statement", "/v1//invoices//1"},
			[]string{"/v1", "/v1/invoicesx", "/v2/invoices/1"},
		},
		{
			"/v1/customers/*/orders",
			[]string{"/v1/customers/77/orders", "/v1/customers/a b/orders", "/v1/customers//77/orders"},
			[]string{"/v1/customers/orders", "/v1/customers//orders", "/v1/customers/7/8/orders", "/v1/customers/77/orders/9"},
		},
		{
			"/v1/*",
			[]string{"/v1/x", "/v1/x/"},
			[]string{"/v1", "/v1/", "/v1/x/y"},
		},
		{"/*/**", []string{"/v1", "/v1/x/y"}, []string{"/"}},
		{"/**", []string{"/", "//", "/v1/invoices", "/%zz"}, nil},
		{"/", []string{"/", "//"}, []string{"/v1"}},
		{"//v1//invoices/", []string{"/v1/invoices"}, []string{"/v1"}},
		{"/v1/ÉTUDES", []string{"/v1/études", "/v1/%C3%A9tudes", "/v1/%c3%89tudes"}, []string{"/v1/etudes"}},
	} {
		p := newPolicy(t, rule("r", Enforce, onRoutes(tt.pattern)))
		for _, s := range tt.yes {
			if got := resolve(p, call(path(s))); got != by("r", Enforce) {
				t.Errorf("%s should match %s, got %v", tt.pattern, s, got)
			}
		}
		for _, s := range tt.no {
			if got := resolve(p, call(path(s))); got != byNoRule(Audit) {
				t.Errorf("%s should not match %s, got %v", tt.pattern, s, got)
			}
		}
	}
}

// A path that reads differently once decoded gets the stricter of both readings,
// as nobody knows which one the upstream takes.
func TestStricterReadingOfAPathWins(t *testing.T) {
	strictInvoices := newPolicy(t, rule("invoices", Enforce, onRoutes("/v1/invoices/**")))
	looseInvoices := newPolicy(t, mode(Enforce), rule("invoices", Audit, onRoutes("/v1/invoices/**")))
	looseOneSegment := newPolicy(t, mode(Enforce), rule("one", Audit, onRoutes("/v1/*")))
	rivals := newPolicy(t, mode(TagMode), rule("exports", Audit, onRoutes("/v1/*")), rule("invoices", Enforce, onRoutes("/v1/invoices/**")))
	for _, tt := range []struct {
		name string
		p    *Policy
		path string
		want resolution
	}{
		{"an escape does not hide a strict route", strictInvoices, "/v1/%69nvoices", by("invoices", Enforce)},
		{"nor does an escaped slash", strictInvoices, "/v1%2Finvoices%2f7", by("invoices", Enforce)},
		{"nor an escaped capital", strictInvoices, "/v1/%49NVOICES", by("invoices", Enforce)},
		{"decoding happens once", strictInvoices, "/v1/%2569nvoices", byNoRule(Audit)},
		{"an escape does not buy a loose route", looseInvoices, "/v1/%69nvoices", byNoRule(Enforce)},
		{"the plain path has it", looseInvoices, "/v1/invoices", by("invoices", Audit)},
		{"an escape beyond the decisive segments changes nothing", looseInvoices, "/v1/invoices/a%20b", by("invoices", Audit)},
		{"an escaped slash does not make two segments one", looseOneSegment, "/v1/a%2Fb", byNoRule(Enforce)},
		{"two rules, the literal reading's first", rivals, "/v1/invoices%2F7", by("invoices", Enforce)},
		{"a broken escape is read as it stands", strictInvoices, "/v1/invoices/%zz", by("invoices", Enforce)},
	} {
		if got := resolve(tt.p, call(path(tt.path))); got != tt.want {
			t.Errorf("%s: %s = %v, want %v", tt.name, tt.path, got, tt.want)
		}
	}
}

// The mode is resolved with and without weak evidence, and the stricter holds.
func TestWeakEvidenceNamesACallButEarnsNothing(t *testing.T) {
	named := Match{Application: []string{"Nightly"}}
	nightly := application("Nightly")
	opaque := unverified(ReasonTokenOpaque)
	for _, tt := range []struct {
		name string
		p    *Policy
		c    *Call
		want resolution
	}{
		{"an integration looser than global", newPolicy(t, mode(Enforce), integration("n", Audit, named)), call(nightly), byNoRule(Enforce)},
		{"an integration stricter than global", newPolicy(t, integration("n", Enforce, named)), call(nightly), byNoRule(Enforce)},
		{"an integration that says nothing", newPolicy(t, mode(TagMode), integration("n", Inherit, named)), call(nightly), byNoRule(TagMode)},
		{"the same by path", newPolicy(t, mode(Enforce), integration("n", Audit, Match{})), call(prefix("n")), byNoRule(Enforce)},
		{"by path, stricter", newPolicy(t, integration("n", Enforce, Match{})), call(prefix("n")), byNoRule(Enforce)},
		{"strong evidence earns the looser mode", newPolicy(t, mode(Enforce), integration("n", Audit, apps(stranger))), call(), byNoRule(Audit)},
		{"strong evidence is not shaken by a weak claim", newPolicy(t, mode(TagMode), integration("s", Audit, apps(stranger)), integration("n", Enforce, named)), call(nightly), byNoRule(Audit)},

		{"a looser rule for a weak name", newPolicy(t, mode(Enforce), integration("n", Inherit, named), rule("r", Audit, ofIntegrations("n"))), call(nightly), byNoRule(Enforce)},
		{"a stricter rule for a weak name", newPolicy(t, integration("n", Inherit, named), rule("r", Enforce, ofIntegrations("n"))), call(nightly), by("r", Enforce)},
		{"a looser rule for a strong name", newPolicy(t, mode(Enforce), integration("n", Inherit, apps(stranger)), rule("r", Audit, ofIntegrations("n"))), call(), by("r", Audit)},
		{"a rule for the app id is not evaded by a weak name", newPolicy(t, integration("n", Inherit, named), rule("r", Enforce, ofIntegrations("app-"+stranger))), call(nightly), by("r", Enforce)},
		{"a rule for unknown callers is not evaded by a weak name", newPolicy(t, integration("n", Inherit, named), rule("r", Enforce, ofIntegrations("unknown"))), call(nightly, opaque), by("r", Enforce)},
		{"a rule for both names holds", newPolicy(t, mode(Enforce), integration("n", Inherit, named), rule("r", Audit, ofIntegrations("n", "app-"+stranger))), call(nightly), by("r", Audit)},
		{"the stricter of a rule with and a rule without", newPolicy(t, integration("n", Inherit, named), rule("loose", Audit, ofIntegrations("n")), rule("rest", Enforce)), call(nightly), by("rest", Enforce)},
		{"the stricter of a rule without and a rule with", newPolicy(t, integration("n", Inherit, named), rule("strict", Enforce, ofIntegrations("n")), rule("rest", Audit)), call(nightly), by("strict", Enforce)},

		{"a first-party app id earns nothing by an integration", newPolicy(t, mode(Enforce), integration("cli", Audit, apps(azureCLI))), call(app(azureCLI)), byNoRule(Enforce)},
		{"nor by a rule of its own", newPolicy(t, mode(Enforce), rule("r", Audit, ofIntegrations("app-"+azureCLI))), call(app(azureCLI)), byNoRule(Enforce)},
		{"a stricter rule for it holds", newPolicy(t, rule("r", Enforce, ofIntegrations("app-"+azureCLI))), call(app(azureCLI)), by("r", Enforce)},
		{"and is not evaded by a header", newPolicy(t, integration("n", Inherit, named), rule("r", Enforce, ofIntegrations("app-"+azureCLI))), call(app(azureCLI), nightly), by("r", Enforce)},
		{"without it the caller is unknown", newPolicy(t, rule("r", Enforce, ofIntegrations("unknown"))), call(app(azureCLI)), by("r", Enforce)},

		{"a looser rule for a tenant that nobody verified", newPolicy(t, mode(Enforce), rule("r", Audit, ofTenants(home))), call(opaque), byNoRule(Enforce)},
		{"a looser rule for a verified tenant", newPolicy(t, mode(Enforce), rule("r", Audit, ofTenants(home))), call(), by("r", Audit)},
	} {
		if got := resolve(tt.p, tt.c); got != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
	}
}

// What two readings of a call resolve to is compared, not the rules on the way:
// where each reading has a loose rule of its own, the global mode has no say.
func TestReadingsAreResolvedEachByItself(t *testing.T) {
	for _, tt := range []struct {
		name string
		p    *Policy
		c    *Call
		want resolution
	}{
		{
			"a rule for the literal path and another for the decoded one",
			newPolicy(t, mode(Enforce), rule("one", Audit, onRoutes("/v1/*")), rule("two", TagMode, onRoutes("/v1/a/**"))),
			call(path("/v1/a%2Fb")), by("two", TagMode),
		},
		{
			"a rule for the weak name and another for the app id",
			newPolicy(t, mode(Enforce), integration("n", Inherit, Match{Application: []string{"Nightly"}}),
				rule("one", TagMode, ofIntegrations("n")), rule("two", Audit, ofIntegrations("app-"+stranger))),
			call(application("Nightly")), by("one", TagMode),
		},
		{
			"a weak name's own mode, and a rule for the app id",
			newPolicy(t, mode(Enforce), integration("n", TagMode, Match{Application: []string{"Nightly"}}), rule("r", Audit, ofIntegrations("app-"+stranger))),
			call(application("Nightly")), byNoRule(TagMode),
		},
	} {
		if got := resolve(tt.p, tt.c); got != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
	}
}

// The dice are part of the contract: another program must throw the same. These
// are the first 8 bytes of SHA-256("rule NUL integration"), big-endian, mod 100.
func TestPercentIsPinned(t *testing.T) {
	for _, tt := range []struct {
		rule, integration string
		dice              int
	}{
		{"invoices first", "nightly-billing", 82},
		{"invoices first", "catalogue-sync", 47},
		{"invoices first", "app-" + billing, 5},
		{"invoices second", "nightly-billing", 69}, // another rule throws anew
	} {
		inside := func(n int) bool {
			options := []configOption{rule(tt.rule, Enforce, percent(n))}
			if !strings.HasPrefix(tt.integration, "app-") {
				options = append(options, integration(tt.integration, Inherit, apps(billing)))
			}
			return resolve(newPolicy(t, options...), call(app(billing))) == by(tt.rule, Enforce)
		}
		for n := range 101 {
			if got, want := inside(n), n > tt.dice; got != want {
				t.Errorf("%q holds for %q at %d percent: %v, want %v", tt.rule, tt.integration, n, got, want)
			}
		}
	}
}

func TestPercentIsTheShareOfIntegrations(t *testing.T) {
	const callers = 10_000
	for _, share := range []int{1, 10, 25, 50, 90} {
		narrow := newPolicy(t, rule("rollout", Enforce, percent(share)))
		wide := newPolicy(t, rule("rollout", Enforce, percent(share+5)))
		n := 0
		for i := range callers {
			c := call(app(fmt.Sprintf("00000000-0000-4000-8000-%012d", i)))
			if decide(narrow, c).Mode != Enforce {
				continue
			}
			n++
			if decide(wide, c).Mode != Enforce {
				t.Fatalf("caller %d is inside %d percent but not inside %d", i, share, share+5)
			}
		}
		// Four standard deviations at most: sqrt(10000 × 0.25) = 50.
		if want := callers * share / 100; n < want-200 || n > want+200 {
			t.Errorf("%d percent holds for %d of %d callers, want about %d", share, n, callers, want)
		}
	}
}

func TestPercentAndTheCallersThatShowNothing(t *testing.T) {
	claimed := integration("n", Inherit, Match{Application: []string{"Nightly"}})
	for _, tt := range []struct {
		name string
		p    *Policy
		c    *Call
		want resolution
	}{
		{"a caller that nothing names is inside", newPolicy(t, rule("r", Enforce, percent(1))), call(unverified(ReasonTokenOpaque)), by("r", Enforce)},
		{"a caller named by a header is inside", newPolicy(t, claimed, rule("r", Enforce, percent(1))), call(application("Nightly"), unverified(ReasonTokenOpaque)), by("r", Enforce)},
		{"a caller with Microsoft's own client is inside", newPolicy(t, rule("r", Enforce, percent(1))), call(app(azureCLI)), by("r", Enforce)},
		{"nobody buys a looser mode by showing nothing", newPolicy(t, mode(Enforce), rule("r", Audit, percent(99))), call(unverified(ReasonTokenOpaque)), byNoRule(Enforce)},
		{"outside the share the next rule is tried", newPolicy(t, rule("invoices first", Enforce, percent(5)), rule("next", TagMode)), call(app(billing)), by("next", TagMode)},
	} {
		if got := resolve(tt.p, tt.c); got != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
	}
}

// FuzzRoutes checks what must hold for any pattern and any path: no panic, /**
// matches, and neither ASCII case nor doubled slashes change what is found.
func FuzzRoutes(f *testing.F) {
	for _, seed := range []struct{ pattern, path string }{
		{"/v1/invoices/**", "/v1//invoices/"},
		{"/v1/customers/*/orders", "/V1/Customers/" + home + "/orders"},
		{"/v1/%69nvoices", "/v1/%69NVOICES%2F7"},
		{"/**", ""},
		{"/", "//"},
		{"/*", "/%zz"},
		{"/v1/é", "/v1/%c3%A9"},
		{"/v1/k", "/v1/\u212a"},
		{"/\xff", "/%ff\xfe%00"},
		{"/v1.0/sales/*/$value", "/v1.0/sales/pricesheets(Market='US',PricesheetView='x')/$value"},
	} {
		f.Add(seed.pattern, seed.path)
	}
	everything := newPolicy(f, rule("everything", Enforce, onRoutes("/**")))
	f.Fuzz(func(t *testing.T, pattern, p string) {
		if got := resolve(everything, call(path(p))); got != by("everything", Enforce) {
			t.Errorf("/** does not match %q: %v", p, got)
		}
		others := []string{flipCase(p), strings.ReplaceAll(p, "/", "//"), p + "/"}
		route, customer := FindRoute("GET", p)
		for _, other := range others {
			if r, c := FindRoute("GET", other); r != route || c != customer {
				t.Errorf("FindRoute(%q) = %v, %q, but FindRoute(%q) = %v, %q", p, route, customer, other, r, c)
			}
		}
		for _, m := range []Mode{Audit, Enforce} { // a strict rule under audit, a loose one under enforce
			config := config(mode(Enforce+Audit-m), rule("r", m, onRoutes(pattern)))
			strict, err := New(config)
			if err != nil {
				return // not a pattern
			}
			want := resolve(strict, call(path(p)))
			for _, other := range others {
				if got := resolve(strict, call(path(other))); got != want {
					t.Errorf("pattern %q: %q = %v, but %q = %v", pattern, p, want, other, got)
				}
			}
		}
	})
}

// flipCase turns ASCII letters into the other case.
func flipCase(s string) string {
	b := []byte(s)
	for i, c := range b {
		if 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' {
			b[i] = c ^ 0x20
		}
	}
	return string(b)
}
