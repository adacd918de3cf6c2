package policy_test

import (
	"net/netip"
	"testing"

	. "github.com/partnerguard/partnerguard/policy"
)

func apps(id ...string) Match { return Match{AppID: id} }

func network(cidr ...string) (m Match) {
	for _, s := range cidr {
		m.Source = append(m.Source, netip.MustParsePrefix(s))
	}
	return m
}

// attributed is the part of an Attribution that users see.
type attributed struct {
	name, evidence string
	strong         bool
}

func attribute(p *Policy, c *Call) attributed {
	a := p.Attribute(c)
	return attributed{a.Name, a.Evidence, a.Strong}
}

func strong(name, evidence string) attributed { return attributed{name, evidence, true} }
func weak(name, evidence string) attributed   { return attributed{name, evidence, false} }

var nobody = weak(Unknown, "")

// Every condition by itself: what fulfils it, what does not, and its strength.
func TestAttributeByOneCondition(t *testing.T) {
	both := Match{AppID: []string{billing}, User: []string{sam}}
	mixed := Match{AppID: []string{billing}, Application: []string{"Nightly"}}
	stranger := "app-" + stranger // what a caller without an integration is called
	for _, tt := range []struct {
		name  string
		match Match
		c     *Call
		want  attributed
	}{
		{"its app id", apps(billing), call(app(billing)), strong("in", "app_id")},
		{"one of its app ids", apps(away, billing), call(app(billing)), strong("in", "app_id")},
		{"another app id", apps(billing), call(), strong(stranger, "app_id")},
		{"its app id, merely claimed", apps(billing), call(app(billing), unverified(ReasonTokenBadSignature)), nobody},
		{"a first-party app id is weak", apps(azureCLI), call(app(azureCLI)), weak("in", "app_id")},

		{"its user by oid", Match{User: []string{sam}}, call(), strong("in", "user")},
		{"its user by name, in any case", Match{User: []string{"SAM@contoso-partner.example"}}, call(), strong("in", "user")},
		{"another user", Match{User: []string{"kim@contoso-partner.example"}}, call(), strong(stranger, "app_id")},
		{"its user, merely claimed", Match{User: []string{sam}}, call(unverified(ReasonTokenExpired)), nobody},
		{"a service principal is no user", Match{User: []string{sam}}, call(appOnly), strong(stranger, "app_id")},

		{"its certificate", Match{ClientCert: []string{"billing.contoso.example"}}, call(cert("x", "billing.contoso.example")), strong("in", "client_cert")},
		{"another certificate", Match{ClientCert: []string{"billing.contoso.example"}}, call(cert("Billing.contoso.example")), strong(stranger, "app_id")},
		{"no certificate", Match{ClientCert: []string{"billing.contoso.example"}}, call(), strong(stranger, "app_id")},

		{"its listener", Match{Listener: []string{"legacy"}}, call(listener("legacy")), strong("in", "listener")},
		{"another listener", Match{Listener: []string{"legacy"}}, call(), strong(stranger, "app_id")},

		{"its network", network("192.0.2.0/28"), call(), strong("in", "source")},
		{"its IPv6 network", network("198.51.100.0/24", "2001:db8::/32"), call(peer("2001:db8::7")), strong("in", "source")},
		{"a neighbouring network", network("192.0.2.16/28"), call(), strong(stranger, "app_id")},
		{"an unknown peer", network("0.0.0.0/0"), call(func(c *Call) { c.Evidence.Peer = netip.Addr{} }), strong(stranger, "app_id")},

		{"its host", Match{Host: []string{"Billing.Guard.Example"}}, call(host("billing.guard.example")), weak("in", "host")},
		{"another host", Match{Host: []string{"billing.guard.example"}}, call(), strong(stranger, "app_id")},
		{"its application header", Match{Application: []string{"Nightly"}}, call(application("Nightly")), weak("in", "application")},
		{"a longer application header", Match{Application: []string{"Nightly"}}, call(application("Nightly2")), strong(stranger, "app_id")},
		{"the beginning of its user agent", Match{UserAgent: []string{"CIPP/"}}, call(userAgent("CIPP/7.1 (user:x)")), weak("in", "user_agent")},
		{"its user agent in the middle", Match{UserAgent: []string{"CIPP/"}}, call(userAgent("x CIPP/7.1")), strong(stranger, "app_id")},

		{"its path", Match{PathPrefix: []string{"/v1/invoices"}}, call(), weak("in", "path_prefix")},
		{"below its path, in any case", Match{PathPrefix: []string{"/V1/Invoices/"}}, call(path("/v1/invoices/7")), weak("in", "path_prefix")},
		{"its path with empty segments", Match{PathPrefix: []string{"//v1/invoices"}}, call(path("//v1///invoices//7")), weak("in", "path_prefix")},
		{"its path in percent encoding", Match{PathPrefix: []string{"/v1/invoices"}}, call(path("/v1/%69nvoices/7")), weak("in", "path_prefix")},
		{"its path behind an encoded slash", Match{PathPrefix: []string{"/v1/invoices"}}, call(path("/v1%2Finvoices")), weak("in", "path_prefix")},
		{"half a segment of its path", Match{PathPrefix: []string{"/v1/inv"}}, call(), strong(stranger, "app_id")},
		{"another path", Match{PathPrefix: []string{"/v1/invoices/7"}}, call(), strong(stranger, "app_id")},
		{"its prefix by another name", Match{PathPrefix: []string{"/i/nb"}}, call(prefix("nb")), weak("in", "path_prefix")},
		{"its prefix and path", Match{PathPrefix: []string{"/i/nb/v1"}}, call(prefix("nb")), weak("in", "path_prefix")},
		{"its prefix, another path", Match{PathPrefix: []string{"/i/nb/v2"}}, call(prefix("nb")), strong(stranger, "app_id")},
		{"its path, under somebody's prefix", Match{PathPrefix: []string{"/v1"}}, call(prefix("nb")), strong(stranger, "app_id")},

		{"all of several conditions", both, call(app(billing)), strong("in", "app_id+user")},
		{"the app without the user", both, call(app(billing), func(c *Call) { c.Token.ObjectID, c.Token.UPN = away, "" }), strong("app-"+billing, "app_id")},
		{"the user without the app", both, call(), strong(stranger, "app_id")},
		{"one strong condition makes the match strong", mixed, call(app(billing), application("Nightly")), strong("in", "app_id+application")},
		{"the strong condition without the weak", mixed, call(app(billing)), strong("app-"+billing, "app_id")},
		{"the weak condition without the strong", mixed, call(application("Nightly")), strong(stranger, "app_id")},
		{"a first-party app with a user of one's own", Match{AppID: []string{azureCLI}, User: []string{sam}}, call(app(azureCLI)), strong("in", "app_id+user")},
		{"a first-party app with a header", Match{AppID: []string{azureCLI}, Application: []string{"N"}}, call(app(azureCLI), application("N")), weak("in", "app_id+application")},

		{"no condition", Match{}, call(), strong(stranger, "app_id")},
		{"no condition, but its name in the path", Match{}, call(prefix("in")), weak("in", "path_prefix")},
		{"another name in the path", Match{}, call(prefix("out")), strong(stranger, "app_id")},
		{"conditions that fail, and its name in the path", apps(billing), call(prefix("in")), weak("in", "path_prefix")},
		{"its own listener", Match{}, call(listenerOf("in")), strong("in", "listener")},
		{"its own listener, whatever the conditions", apps(billing), call(listenerOf("in")), strong("in", "listener")},
		{"its own listener and its certificate", Match{ClientCert: []string{"c"}}, call(listenerOf("in"), cert("c")), strong("in", "client_cert")},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := newPolicy(t, integration("in", Inherit, tt.match))
			if got := attribute(p, tt.c); got != tt.want {
				t.Errorf("Attribute = %+v, want %+v", got, tt.want)
			}
			wantOwner := ""
			if tt.want.name == "in" {
				wantOwner = "in@contoso.example"
			}
			if got := p.Attribute(tt.c).Owner; got != wantOwner {
				t.Errorf("owner %q, want %q", got, wantOwner)
			}
		})
	}
}

// The order of evidence where two integrations match; the loser stays visible.
func TestAttributeConflicts(t *testing.T) {
	everything := func(c *Call) {
		c.Token.AppID = billing
		c.Evidence = Evidence{
			Listener: "legacy", ClientCert: []string{"cert"}, Peer: netip.MustParseAddr("192.0.2.7"),
			Host: "h.example", Application: "a", UserAgent: "ua/1",
		}
	}
	order := []struct {
		evidence string
		match    Match
	}{
		{"client_cert", Match{ClientCert: []string{"cert"}}},
		{"listener", Match{Listener: []string{"legacy"}}},
		{"app_id+user", Match{AppID: []string{billing}, User: []string{sam}}},
		{"app_id", apps(billing)},
		{"user", Match{User: []string{sam}}},
		{"source", network("192.0.2.0/24")},
		{"application", Match{Application: []string{"a"}}},
	}
	for i, winner := range order {
		for _, loser := range order[i+1:] {
			want := strong("winner", winner.evidence+","+loser.evidence+"=loser")
			first := newPolicy(t, integration("winner", Inherit, winner.match), integration("loser", Inherit, loser.match))
			last := newPolicy(t, integration("loser", Inherit, loser.match), integration("winner", Inherit, winner.match))
			for where, p := range map[string]*Policy{"first": first, "last": last} {
				if got := attribute(p, call(everything)); got != want {
					t.Errorf("%s %s in the file, against %s: %+v, want %+v", winner.evidence, where, loser.evidence, got, want)
				}
			}
		}
	}

	for _, tt := range []struct {
		name string
		p    *Policy
		c    *Call
		want attributed
	}{
		{
			"ties go by the order in the file",
			newPolicy(t, integration("one", Inherit, apps(billing)), integration("two", Inherit, apps(billing))),
			call(app(billing)), strong("one", "app_id,app_id=two"),
		},
		{
			"ties of weak evidence too, whatever its kind",
			newPolicy(t, integration("one", Inherit, Match{UserAgent: []string{"ua"}}), integration("two", Inherit, Match{Host: []string{"h.example"}})),
			call(everything, unverified(ReasonTokenOpaque)), weak("one", "user_agent,host=two"),
		},
		{
			"the strongest of several conditions gives the rank",
			newPolicy(t, integration("one", Inherit, apps(billing)), integration("two", Inherit, Match{Source: network("192.0.2.0/24").Source, ClientCert: []string{"cert"}})),
			call(everything), strong("two", "client_cert+source,app_id=one"),
		},
		{
			"all losers are kept",
			newPolicy(t, integration("one", Inherit, Match{Application: []string{"a"}}), integration("two", Inherit, network("192.0.2.0/24")), integration("three", Inherit, apps(billing)), integration("four", Inherit, Match{User: []string{sam}})),
			call(everything), strong("three", "app_id,application=one,source=two,user=four"),
		},
		{
			"a name in the path loses to an app id",
			newPolicy(t, integration("claimed", Inherit, Match{}), integration("real", Inherit, apps(billing))),
			call(app(billing), prefix("claimed")), strong("real", "app_id,path_prefix=claimed"),
		},
		{
			"a listener's own integration loses to a certificate",
			newPolicy(t, integration("own", Inherit, Match{}), integration("cert", Inherit, Match{ClientCert: []string{"c"}})),
			call(cert("c"), listenerOf("own")), strong("cert", "client_cert,listener=own"),
		},
		{
			"a listener's own integration ties by its certificate",
			newPolicy(t, integration("own", Inherit, Match{ClientCert: []string{"c"}}), integration("cert", Inherit, Match{ClientCert: []string{"c"}})),
			call(cert("c"), listenerOf("own")), strong("own", "client_cert,client_cert=cert"),
		},
		{
			"a first-party app id ranks with headers",
			newPolicy(t, integration("header", Inherit, Match{Application: []string{"a"}}), integration("cli", Inherit, apps(azureCLI))),
			call(app(azureCLI), application("a")), weak("header", "application,app_id=cli"),
		},
	} {
		if got := attribute(tt.p, tt.c); got != tt.want {
			t.Errorf("%s: %+v, want %+v", tt.name, got, tt.want)
		}
	}
}

func TestUnknownCallers(t *testing.T) {
	p := newPolicy(t, integration("nightly-billing", Inherit, apps(billing)))
	for _, tt := range []struct {
		name string
		c    *Call
		want attributed
	}{
		{"a verified app id names its caller", call(), strong("app-"+stranger, "app_id")},
		{"an application's own token too", call(appOnly), strong("app-"+stranger, "app_id")},
		{"a first-party id names, but is weak", call(app(azureCLI)), weak("app-"+azureCLI, "app_id")},
		{"a verified token without an app id", call(app("")), nobody},
		{"no token", call(func(c *Call) { c.Token, c.TokenReason = Token{}, ReasonTokenMissing }), nobody},
		{"an app id that nobody verified is no name", call(unverified(ReasonTokenBadSignature)), nobody},
		{"nor is a configured one", call(app(billing), unverified(ReasonTokenExpired)), nobody},
		{"nor what headers say that no integration lists", call(unverified(ReasonTokenOpaque), application("x"), userAgent("y"), host("z")), nobody},
	} {
		if got := attribute(p, tt.c); got != tt.want {
			t.Errorf("%s: Attribute = %+v, want %+v", tt.name, got, tt.want)
		}
	}
}

func TestFirstParty(t *testing.T) {
	for id, want := range map[string]bool{
		azureCLI:                               true,
		"d3590ed6-52b3-4102-aeff-aad2292ab01c": true,
		"a0c73c16-a7e3-4564-9a95-2bdf47383716": true,
		billing:                                false,
		"":                                     false,
	} {
		if got := FirstParty(id); got != want {
			t.Errorf("FirstParty(%q) = %v, want %v", id, got, want)
		}
	}
}

func TestCutIntegration(t *testing.T) {
	for _, tt := range []struct {
		path, name, rest string
		ok               bool
	}{
		{"/i/nightly-billing/v1/invoices", "nightly-billing", "/v1/invoices", true},
		{"/i/nb/", "nb", "/", true},
		{"/i/nb", "nb", "/", true},
		{"/i/nb//v1//x/", "nb", "//v1//x/", true},
		{"/i/nb/i/other/v1", "nb", "/i/other/v1", true},
		{"/i/n%62/v1", "n%62", "/v1", true}, // compared before decoding: a name nobody has
		{"/i//v1", "", "/v1", true},
		{"/i/", "", "/", true},
		{"/i", "", "/i", false},
		{"/I/nb/v1", "", "/I/nb/v1", false},
		{"//i/nb/v1", "", "//i/nb/v1", false},
		{"/%69/nb/v1", "", "/%69/nb/v1", false},
		{"/invoices", "", "/invoices", false},
		{"/v1/i/nb/", "", "/v1/i/nb/", false},
		{"", "", "", false},
	} {
		name, rest, ok := CutIntegration(tt.path)
		if name != tt.name || rest != tt.rest || ok != tt.ok {
			t.Errorf("CutIntegration(%q) = %q, %q, %v; want %q, %q, %v", tt.path, name, rest, ok, tt.name, tt.rest, tt.ok)
		}
	}
}

func TestKnowsPrefix(t *testing.T) {
	p := newPolicy(t, integration("nightly-billing", Inherit, Match{PathPrefix: []string{"/i/nb/", "/i/nb2/v1", "/v1/invoices"}}), integration("other-one", Inherit, Match{}))
	for name, want := range map[string]bool{
		"nightly-billing": true, "other-one": true, "nb": true, "nb2": true,
		"": false, "v1": false, "nobody": false, "Nightly-Billing": false, "n%62": false, Unknown: false, Other: false,
	} {
		if got := p.KnowsPrefix(name); got != want {
			t.Errorf("KnowsPrefix(%q) = %v, want %v", name, got, want)
		}
	}
}
