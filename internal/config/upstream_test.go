package config

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestCloudPresets(t *testing.T) {
	for _, tt := range []struct{ cloud, name, url, appID string }{
		{"global", PartnerCenter, "https://api.partnercenter.microsoft.com", "fa3d9a0c-3fb0-42cc-9193-47c7ecd2edbd"},
		{"usgov", PartnerCenter, "https://api.partnercenter.microsoft.com", "fa3d9a0c-3fb0-42cc-9193-47c7ecd2edbd"},
		{"china", PartnerCenter, "https://partner.partnercenterapi.microsoftonline.cn", "fa3d9a0c-3fb0-42cc-9193-47c7ecd2edbd"},
		{"global", PartnerAPI, "https://api.partner.microsoft.com", "4990cffe-04e8-4e8b-808a-1175604b879f"},
		{"global", Graph, "https://graph.microsoft.com", "00000003-0000-0000-c000-000000000000"},
		{"usgov", Graph, "https://graph.microsoft.us", "00000003-0000-0000-c000-000000000000"},
		{"china", Graph, "https://microsoftgraph.chinacloudapi.cn", "00000003-0000-0000-c000-000000000000"},
	} {
		c, err := Parse("guard.yaml", []byte("version: 1\ncloud: "+tt.cloud+"\nupstreams: {"+tt.name+": {}}\n"))
		if err != nil {
			t.Fatal(err)
		}
		want := Upstream{URL: tt.url, Audiences: []string{tt.url, tt.url + "/", tt.appID}, RewriteLinks: true}
		if diff := cmp.Diff(want, c.Upstreams[tt.name]); diff != "" {
			t.Errorf("%s in %s (-want +got):\n%s", tt.name, tt.cloud, diff)
		}
	}
}

func TestTheGraphOfTheDepartmentOfDefenseHasItsOwnAudience(t *testing.T) {
	c, err := Parse("guard.yaml", []byte("version: 1\ncloud: usgov\nupstreams: {graph: {url: https://dod-graph.microsoft.us/}}\n"))
	if err != nil {
		t.Fatal(err)
	}
	if u := c.Upstreams[Graph]; u.URL != "https://dod-graph.microsoft.us" || u.Audiences[0] != u.URL {
		t.Errorf("upstream = %+v", u)
	}
}

func TestAudiencesStayMicrosoftsWhenTheURLIsAnother(t *testing.T) {
	c, err := Parse("guard.yaml", []byte("version: 1\nupstreams: {partner-center: {url: 'http://127.0.0.1:7443/'}}\n"))
	if err != nil {
		t.Fatal(err)
	}
	u := c.Upstreams[PartnerCenter]
	if u.URL != "http://127.0.0.1:7443" || u.Audiences[0] != "https://api.partnercenter.microsoft.com" {
		t.Errorf("upstream = %+v", u)
	}
}

func TestAnUpstreamThatLeadsBackToTheGuardIsRefused(t *testing.T) {
	for _, tt := range []struct {
		listen, url, dial string
		own               bool
	}{
		{"127.0.0.1:8080", "http://127.0.0.1:8080", "", true},
		{"127.0.0.1:8080", "http://localhost:8080", "", true},
		{"127.0.0.1:8080", "http://127.0.0.1:9090", "", true}, // admin
		{"127.0.0.1:8080", "http://127.0.0.1:8081", "", false},
		{"127.0.0.1:443", "https://localhost", "", true},
		{"127.0.0.1:443", "https://localhost", "203.0.113.7:443", false},
		{"127.0.0.1:443", "https://api.partnercenter.microsoft.com", "", false},
		{"127.0.0.1:443", "https://api.partnercenter.microsoft.com", "127.0.0.1:443", true},
		{"127.0.0.1:443", "https://api.partnercenter.microsoft.com", "0.0.0.0:443", true},
		{"0.0.0.0:443", "https://api.partnercenter.microsoft.com", "", false},
		{"0.0.0.0:443", "https://127.0.0.1", "", true},
	} {
		c := Default()
		c.Listeners[0].Address, c.Listeners[0].InsecureClearText = tt.listen, true
		c.Upstreams[PartnerCenter] = Upstream{URL: tt.url, Dial: tt.dial}
		if err := c.Validate(); (err != nil) != tt.own {
			t.Errorf("listener %s, url %s, dial %q: Validate = %v, want an error: %v", tt.listen, tt.url, tt.dial, err, tt.own)
		}
	}
}

func TestHostsChooseUpstreamsByNameOnly(t *testing.T) {
	const graph = "graph: {hosts: [Graph.contoso.example]}"
	for _, tt := range []struct {
		name, yaml string
		want       map[string]string
	}{
		{"the default", "partner-center:", map[string]string{"api.partnercenter.microsoft.com": PartnerCenter}},
		{"names of its own, in any case", graph, map[string]string{
			"api.partnercenter.microsoft.com": PartnerCenter, "graph.microsoft.com": Graph, "graph.contoso.example": Graph,
		}},
		{"the guard may have the address of an upstream", "partner-center: {url: 'http://127.0.0.1:7443'}, graph: {url: 'http://localhost:7444'}, partner-api: {url: 'https://[::1]:7445'}",
			map[string]string{}},
		{"several upstreams behind one name", "partner-center: {url: 'https://gateway.example'}, graph: {url: 'https://Gateway.example:8443', hosts: graph}",
			map[string]string{"graph": Graph}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, err := Parse("guard.yaml", []byte("version: 1\nupstreams: {"+tt.yaml+"}\n"))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, c.Hosts()); diff != "" {
				t.Errorf("Hosts (-want +got):\n%s", diff)
			}
		})
	}
}
