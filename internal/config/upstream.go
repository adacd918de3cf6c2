package config

import (
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strings"
)

// upstreams are the names that Config.Upstreams may have, in the order of
// messages.
func upstreams() []string { return []string{PartnerCenter, PartnerAPI, Graph} }

// api returns the resource URI of the upstream called name, which is its address
// as well, and its application id: v2 tokens, and clients that ask by id, carry
// the latter as audience. The resource is empty where Microsoft documents none
// for cloud. at is the address given for the upstream, or empty: the US
// Government has two Graphs.
func api(name, cloud, at string) (resource, appID string) {
	switch name {
	case PartnerCenter:
		appID = "fa3d9a0c-3fb0-42cc-9193-47c7ecd2edbd"
		switch cloud {
		case "china":
			return "https://partner.partnercenterapi.microsoftonline.cn", appID
		default: // US Government partners use the global one
			return "https://api.partnercenter.microsoft.com", appID
		}
	case PartnerAPI:
		appID = "4990cffe-04e8-4e8b-808a-1175604b879f"
		switch cloud {
		case "usgov", "china":
			return "", appID
		default:
			return "https://api.partner.microsoft.com", appID
		}
	case Graph:
		const dod = "https://dod-graph.microsoft.us"
		appID = "00000003-0000-0000-c000-000000000000"
		switch {
		case cloud == "usgov" && at == dod:
			return dod, appID
		case cloud == "usgov":
			return "https://graph.microsoft.us", appID
		case cloud == "china":
			return "https://microsoftgraph.chinacloudapi.cn", appID
		default:
			return "https://graph.microsoft.com", appID
		}
	}
	return "", ""
}

// Hosts returns which Host headers choose an upstream, and which one: the
// upstreams' hosts, and the host names of their URLs. Keys are in lower case and
// without port. An IP address or localhost in a URL is left out, since it may be
// the guard's own, and so is a name in several URLs, which tells nothing.
func (c *Config) Hosts() map[string]string {
	hosts := map[string]string{}
	shared := map[string]bool{}
	for name, u := range c.Upstreams {
		host := u.hostName()
		if _, again := hosts[host]; again {
			shared[host] = true
		}
		if host != "" {
			hosts[host] = name
		}
	}
	for host := range shared {
		delete(hosts, host)
	}
	for name, u := range c.Upstreams {
		for _, host := range u.Hosts {
			hosts[host] = name
		}
	}
	return hosts
}

// hostName is the host in u's URL if it is a name that only the upstream has.
func (u Upstream) hostName() string {
	parsed, err := url.Parse(u.URL)
	if err != nil {
		return ""
	}
	host := strings.ToLower(parsed.Hostname())
	if isIP(host) || host == "localhost" {
		return ""
	}
	return host
}

func (c *Config) checkUpstreams(bad report) {
	if _, ok := c.Upstreams[PartnerCenter]; !ok {
		bad(join("upstreams", PartnerCenter), "is missing", "")
	}
	for _, name := range slices.Sorted(maps.Keys(c.Upstreams)) {
		path := join("upstreams", name)
		if !slices.Contains(upstreams(), name) {
			hint := "write " + PartnerCenter + ", " + PartnerAPI + " or " + Graph
			if near := nearest(name, upstreams()); near != "" {
				hint = "did you mean " + near + "?"
			}
			bad(path, "is not an upstream", hint)
			continue
		}
		c.checkUpstream(bad, path, name)
	}
}

func (c *Config) checkUpstream(bad report, path, name string) {
	u := c.Upstreams[name]
	resource, _ := api(name, c.Cloud, u.URL)
	if resource == "" && u.URL == "" {
		bad(path+".url", fmt.Sprintf("is required, because no address of it is documented for cloud %s", c.Cloud), "write it as https://host, and the audiences of its tokens")
	} else if target, ok := checkURL(bad, path+".url", u.URL); ok && u.Dial == "" && c.ownAddress(target) {
		bad(path+".url", "is the guard's own address", "write Microsoft's, or leave it out")
	}
	if resource == "" && len(u.Audiences) == 0 {
		bad(path+".audiences", fmt.Sprintf("is required, because none is documented for cloud %s", c.Cloud), "write the aud values of its tokens")
	}
	if u.Dial != "" {
		const hint = "write the host:port to connect to, such as 203.0.113.7:443"
		switch a, err := parseAddress(u.Dial); {
		case err != nil:
			bad(path+".dial", err.Error(), hint)
		case a.host == "" || a.port == 0:
			bad(path+".dial", fmt.Sprintf("%q lacks host or port", u.Dial), hint)
		case c.ownAddress(a):
			bad(path+".dial", "is the guard's own address", "write one of Microsoft's")
		}
	}
	for i, aud := range u.Audiences {
		if strings.TrimSpace(aud) == "" {
			bad(fmt.Sprintf("%s.audiences[%d]", path, i), "is empty", "write a resource URI or an application id")
		}
	}
	for i, host := range u.Hosts {
		at := fmt.Sprintf("%s.hosts[%d]", path, i)
		checkHost(bad, at, host, false)
		if slices.Contains(u.Hosts[:i], host) {
			bad(at, fmt.Sprintf("%q is given twice", host), "remove one")
		}
		for _, other := range upstreams() {
			o := c.Upstreams[other]
			switch {
			case other == name:
			case host != "" && host == o.hostName():
				bad(at, fmt.Sprintf("%q is the host in %s.url", host, join("upstreams", other)), "a host can choose only one upstream")
			case other < name && slices.Contains(o.Hosts, host):
				bad(at, fmt.Sprintf("%q also stands in %s.hosts", host, join("upstreams", other)), "a host can choose only one upstream")
			}
		}
	}
}

// upstreamHint says how a listener can have the upstream it asks for.
func (c *Config) upstreamHint(name string) string {
	if _, ok := c.Upstreams[name]; !ok && slices.Contains(upstreams(), name) {
		return "add it: upstreams: {" + name + ": {}}"
	}
	return "write one of upstreams: " + strings.Join(slices.Sorted(maps.Keys(c.Upstreams)), ", ")
}

// ownAddress reports whether a connection to target ends at one of c's own
// listeners, as far as that can be told without resolving names.
func (c *Config) ownAddress(target address) bool {
	own := []string{c.Admin.Address}
	for _, l := range c.Listeners {
		own = append(own, l.Address)
	}
	return slices.ContainsFunc(own, func(s string) bool {
		a, err := parseAddress(s)
		return err == nil && a.answers(target)
	})
}
