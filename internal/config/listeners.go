package config

import (
	"fmt"
	"net/mail"
	"regexp"
	"slices"
	"strings"
)

func (c *Config) checkListeners(bad report) {
	if len(c.Listeners) == 0 {
		bad("listeners", "is empty", "remove the key to listen on 127.0.0.1:8080")
	}
	for i, l := range c.Listeners {
		path := fmt.Sprintf("listeners[%d]", i)
		if l.Name != "" && !listenerName.MatchString(l.Name) {
			bad(path+".name", fmt.Sprintf("%q is not a name", l.Name), "use 1 to 63 of a-z, 0-9 and -")
		}
		if l.Integration != "" && !slices.ContainsFunc(c.Integrations, func(in Integration) bool { return in.Name == l.Integration }) {
			bad(path+".integration", fmt.Sprintf("%q is not configured", l.Integration), "write the name of an integration")
		}
		if _, ok := c.Upstreams[l.Upstream]; !ok {
			bad(path+".upstream", fmt.Sprintf("%q is not configured", l.Upstream), c.upstreamHint(l.Upstream))
		}
		l.checkTLS(bad, path)
		for j, other := range c.Listeners[:i] {
			if l.Name != "" && l.Name == other.Name {
				bad(path+".name", fmt.Sprintf("%q is also the name of listeners[%d]", l.Name, j), "each listener needs its own name")
			}
		}
		a, ok := checkAddress(bad, path+".address", l.Address)
		if !ok {
			continue
		}
		if l.TLS == nil && !a.loopback() && !l.InsecureClearText {
			bad(path+".address", fmt.Sprintf("%s takes bearer tokens in clear text from the network", l.Address),
				"listen on 127.0.0.1, add tls, or accept the risk with insecure_clear_text: true")
		}
		for j, other := range c.Listeners[:i] {
			if b, err := parseAddress(other.Address); err == nil && a.overlaps(b) {
				bad(path+".address", fmt.Sprintf("%s is taken by listeners[%d]", l.Address, j), "write another port")
			}
		}
	}
}

var listenerName = regexp.MustCompile(`^[a-z0-9-]{1,63}$`)

// checkTLS reports contradictions in how l, the listener at path, authenticates
// itself and its clients.
func (l Listener) checkTLS(bad report, path string) {
	if l.TLS != nil && len(l.TLS.ACME) == 0 {
		l.TLS.checkPair(bad, path+".tls", "write certificate and key, or acme with domain names")
	}
	if l.TLS != nil && len(l.TLS.ACME) > 0 && (l.TLS.Certificate != "" || l.TLS.Key != "") {
		bad(path+".tls.acme", "contradicts certificate and key", "keep acme alone, or the two files")
	}
	if l.TLS != nil && l.InsecureClearText {
		bad(path+".insecure_clear_text", "contradicts tls", "remove one of them")
	}
	if l.TLS == nil && l.ClientCA != "" {
		bad(path+".client_ca", "needs tls: without it clients have no certificates", "add tls")
	}
	if l.ClientCA == "" && l.ClientCRL != "" {
		bad(path+".client_crl", "needs client_ca: without it clients are asked for no certificate", "add the CAs whose certificates the list revokes")
	}
}

// checkPair reports a certificate without key or a key without certificate; where
// both are missing, hint says what to write.
func (t *TLS) checkPair(bad report, path, hint string) {
	switch {
	case t.Certificate == "" && t.Key == "":
		bad(path, "has no certificate", hint)
	case t.Certificate == "":
		bad(path+".certificate", "is required", "write the PEM file of the certificate and its chain")
	case t.Key == "":
		bad(path+".key", "is required", "write the PEM file of the certificate's key")
	}
}

// checkACME reports what keeps the listeners with tls.acme from their
// certificates.
func (c *Config) checkACME(bad report) {
	a := c.ACME
	const directory = "write the directory URL of the authority, https://host/path"
	if strings.HasPrefix(strings.ToLower(a.Directory), "http:") {
		bad("acme.directory", "is http, which ACME rules out", directory) // RFC 8555, section 6.1
	} else if target, ok := checkLocation(bad, "acme.directory", a.Directory, directory); ok && c.ownAddress(target) {
		bad("acme.directory", "is the guard's own address", "write the authority's, or leave it out for Let's Encrypt's")
	}
	if a.Email != "" {
		if m, err := mail.ParseAddress(a.Email); err != nil || m.Address != a.Email {
			bad("acme.email", fmt.Sprintf("%q is not a mail address", a.Email), "write it as name@host, or leave it out")
		}
	}
	if a.EAB != nil {
		if a.EAB.KeyID == "" {
			bad("acme.eab.key_id", "is required", "write the key id that the authority gave out, or remove eab")
		}
		if a.EAB.MACKey == "" {
			bad("acme.eab.mac_key", "is required", "write file:PATH or env:NAME of the key that belongs to key_id, or remove eab")
		}
		a.EAB.MACKey.check(bad, "acme.eab.mac_key")
	}
	if len(a.Challenges) == 0 {
		bad("acme.challenges", "is empty, so no domain could be proved", "leave it out, or write some of "+HTTP01+", "+TLSALPN01)
	}
	for i, challenge := range a.Challenges {
		if !slices.Contains([]string{HTTP01, TLSALPN01}, challenge) {
			bad(fmt.Sprintf("acme.challenges[%d]", i), fmt.Sprintf("%q is not known", challenge), "write "+HTTP01+" or "+TLSALPN01)
		}
	}
	oneOf(bad, "acme.storage", a.Storage, StorageFiles, StoragePostgres)
	a.StorageKey.check(bad, "acme.storage_key")
	switch {
	case a.Storage == StorageFiles && a.StorageKey != "":
		bad("acme.storage_key", "does nothing without storage: postgres", "add acme.storage: postgres, or remove the key")
	case a.Storage == StoragePostgres && a.StorageKey == "":
		bad("acme.storage_key", "is required", "write file:PATH or env:NAME of 32 bytes in base64, the same for all guards: openssl rand -base64 32")
	}
	if a.Storage == StoragePostgres && c.Store.Postgres == "" {
		bad("acme.storage", "is postgres, but store.postgres is missing", "add store.postgres, the database of the fleet")
	}
	used := false
	for i, l := range c.Listeners {
		if l.TLS == nil {
			continue
		}
		for j, domain := range l.TLS.ACME {
			used = true
			c.checkDomain(bad, fmt.Sprintf("listeners[%d].tls.acme[%d]", i, j), domain)
			if slices.Contains(l.TLS.ACME[:j], domain) {
				bad(fmt.Sprintf("listeners[%d].tls.acme[%d]", i, j), fmt.Sprintf("%q is given twice", domain), "remove one")
			}
		}
	}
	c.checkChallengePorts(bad, used)
}

// checkChallengePorts reports ports that cannot answer the authority; used says
// whether any listener will ask it for a certificate.
func (c *Config) checkChallengePorts(bad report, used bool) {
	for _, p := range []struct {
		key, challenge string
		port           int
	}{
		{"acme.http_port", HTTP01, c.ACME.HTTPPort},
		{"acme.tls_alpn_port", TLSALPN01, c.ACME.TLSALPNPort},
	} {
		if p.port < 1 || p.port > 65535 {
			bad(p.key, fmt.Sprintf("%d is not a port", p.port), "write 1 to 65535")
			continue
		}
		if !used || !slices.Contains(c.ACME.Challenges, p.challenge) {
			continue
		}
		hint := "write another port, or leave " + p.challenge + " out of acme.challenges"
		for i, l := range c.Listeners {
			// A listener whose certificate comes from ACME answers tls-alpn-01 itself.
			itself := p.challenge == TLSALPN01 && l.TLS != nil && len(l.TLS.ACME) > 0
			if a, err := parseAddress(l.Address); err == nil && int(a.port) == p.port && !itself {
				bad(p.key, fmt.Sprintf("%d is taken by listeners[%d]", p.port, i), hint)
			}
		}
		if a, err := parseAddress(c.Admin.Address); err == nil && int(a.port) == p.port {
			bad(p.key, fmt.Sprintf("%d is taken by admin.address", p.port), hint)
		}
	}
	if used && len(c.ACME.Challenges) > 1 && c.ACME.HTTPPort == c.ACME.TLSALPNPort {
		bad("acme.tls_alpn_port", "is http_port", "the challenges need a port each")
	}
}

// A label has 1 to 63 letters, digits and hyphens (RFC 1123, section 2.1).
var domainSyntax = regexp.MustCompile(`^([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)*[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

// checkDomain reports what keeps domain from a certificate.
func (c *Config) checkDomain(bad report, path, domain string) {
	const hint = "write a domain name, such as guard.contoso.example"
	switch {
	case strings.Contains(domain, "*"):
		bad(path, fmt.Sprintf("%q is a wildcard, which %s and %s cannot prove", domain, HTTP01, TLSALPN01), "write the names one by one")
	case isIP(domain):
		bad(path, fmt.Sprintf("%q is an address", domain), hint)
	case len(domain) > 253 || !domainSyntax.MatchString(domain):
		bad(path, fmt.Sprintf("%q is not a domain name", domain), hint)
	case c.ACME.Directory == letsEncrypt && !publicName(domain):
		bad(path, fmt.Sprintf("%q is no public name, so Let's Encrypt cannot prove it", domain), "write a public one, or the directory of your own authority in acme.directory")
	}
}

// publicName reports whether domain can exist in the public DNS: it has a dot, and
// is not of a domain that is reserved (RFC 6761, RFC 6762, RFC 8375, and ICANN's
// resolution on .internal).
func publicName(domain string) bool {
	private := func(suffix string) bool { return strings.HasSuffix(domain, suffix) }
	return strings.Contains(domain, ".") &&
		!slices.ContainsFunc([]string{".localhost", ".local", ".internal", ".home.arpa"}, private)
}

// checkAdmin reports an admin listener that anyone on the network could read, and
// what contradicts in it.
func (c *Config) checkAdmin(bad report) {
	a := c.Admin
	a.Token.check(bad, "admin.token")
	if a.TLS != nil {
		if len(a.TLS.ACME) > 0 {
			bad("admin.tls.acme", "is only for listeners", "write certificate and key")
		} else {
			a.TLS.checkPair(bad, "admin.tls", "write certificate and key")
		}
	}
	if a.TLS != nil && a.InsecureClearText {
		bad("admin.insecure_clear_text", "contradicts tls", "remove one of them")
	}
	if a.TLS == nil && a.ClientCA != "" {
		bad("admin.client_ca", "needs tls: without it clients have no certificates", "add tls")
	}
	for i, host := range a.Hosts {
		checkHost(bad, fmt.Sprintf("admin.hosts[%d]", i), host, true)
	}

	own, ok := checkAddress(bad, "admin.address", a.Address)
	if !ok {
		return
	}
	if !own.loopback() {
		switch {
		case a.TLS == nil && !a.InsecureClearText:
			hint := "use 127.0.0.1, or add tls and one of token and client_ca"
			if a.Token != "" {
				hint = "use 127.0.0.1, add tls, or accept the risk with insecure_clear_text: true"
			}
			bad("admin.address", fmt.Sprintf("%s shows records to the network in clear text", a.Address), hint)
		case a.TLS == nil && a.Token == "":
			bad("admin.address", fmt.Sprintf("%s shows records to anyone on the network", a.Address), "use 127.0.0.1, or add token")
		case a.Token == "" && a.ClientCA == "":
			bad("admin.address", fmt.Sprintf("%s shows records to anyone on the network", a.Address), "use 127.0.0.1, or add token or client_ca")
		}
	}
	for i, l := range c.Listeners {
		if b, err := parseAddress(l.Address); err == nil && own.overlaps(b) {
			bad(fmt.Sprintf("listeners[%d].address", i), fmt.Sprintf("%s is taken by admin.address", l.Address), "write another port for one of them")
		}
	}
}

// checkHost reports what keeps host from being compared with a Host header less
// its port.
func checkHost(bad report, path, host string, ipAllowed bool) {
	const hint = "write the name alone, such as guard.contoso.example"
	_, err := parseAddress(host)
	switch {
	case strings.TrimSpace(host) == "":
		bad(path, "is empty", hint)
	case isIP(host) && strings.HasPrefix(host, "["):
		bad(path, fmt.Sprintf("%q has brackets", host), "write the address without them")
	case isIP(host) && !ipAllowed:
		bad(path, fmt.Sprintf("%q is an address, which any client may use for the guard itself", host), "write a name")
	case isIP(host):
	case err == nil:
		bad(path, fmt.Sprintf("%q has a port", host), "write the name alone: any port of a Host header will do")
	case len(host) > 253 || !hostSyntax.MatchString(host):
		bad(path, fmt.Sprintf("%q is not a host name", host), hint)
	}
}
