package config

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"net/netip"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/partnerguard/partnerguard/policy"
)

// report takes a problem with the key at path.
type report func(path, message, hint string)

// check reports everything that is wrong with c and needs no file to see.
func (c *Config) check(bad report) {
	switch c.Version {
	case 1:
	case 0:
		bad("version", "is required", "write version: 1")
	default:
		bad("version", fmt.Sprintf("%d is not supported", c.Version), "write version: 1")
	}
	oneOf(bad, "cloud", c.Cloud, "global", "usgov", "china")
	oneOf(bad, "validate_mfa", c.ValidateMFA, ValidateOff, ValidateReads, ValidateAll)
	oneOf(bad, "ledger.on_failure", c.Ledger.OnFailure, ForwardOnFailure, RejectOnFailure)
	oneOf(bad, "ledger.identities", c.Ledger.Identities, "plain")

	c.checkListeners(bad)
	c.checkUpstreams(bad)
	c.checkEntra(bad)
	c.checkTimes(bad)
	for i, in := range c.Integrations {
		for j, label := range in.Match.Listener {
			if label != "" && !slices.ContainsFunc(c.Listeners, func(l Listener) bool { return l.Label() == label }) {
				bad(fmt.Sprintf("integrations[%d].match.listener[%d]", i, j), fmt.Sprintf("%q is not a listener", label),
					"write the name of a listener, or its address if it has no name")
			}
		}
	}
	if _, err := c.Policy(); err != nil {
		for _, field := range fieldErrors(err) {
			bad(field.Path, field.Problem, field.Hint)
		}
	}
}

// fieldErrors takes the joined error of policy.New apart.
func fieldErrors(err error) []*policy.FieldError {
	var fields []*policy.FieldError
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		for _, e := range joined.Unwrap() {
			fields = append(fields, fieldErrors(e)...)
		}
		return fields
	}
	var field *policy.FieldError
	if !errors.As(err, &field) {
		field = &policy.FieldError{Problem: err.Error()}
	}
	return append(fields, field)
}

func oneOf[T ~string](bad report, path string, value T, allowed ...T) {
	if slices.Contains(allowed, value) {
		return
	}
	words := make([]string, len(allowed))
	for i, a := range allowed {
		words[i] = string(a)
	}
	hint := "write " + words[0]
	if last := len(words) - 1; last > 0 {
		hint = "write " + strings.Join(words[:last], ", ") + " or " + words[last]
	}
	bad(path, fmt.Sprintf("%q is not known", value), hint)
}

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
			bad(path+".upstream", fmt.Sprintf("%q is not configured", l.Upstream), "write "+PartnerCenter)
		}
		if l.TLS != nil && l.TLS.Certificate == "" {
			bad(path+".tls.certificate", "is required", "write the PEM file of the certificate and its chain")
		}
		if l.TLS != nil && l.TLS.Key == "" {
			bad(path+".tls.key", "is required", "write the PEM file of the certificate's key")
		}
		if l.TLS != nil && l.InsecureClearText {
			bad(path+".insecure_clear_text", "contradicts tls", "remove one of them")
		}
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
	admin, ok := checkAddress(bad, "admin.address", c.Admin.Address)
	if !ok {
		return
	}
	if !admin.loopback() {
		bad("admin.address", fmt.Sprintf("%s is reachable from the network and needs authentication, which this version does not offer", c.Admin.Address),
			"use 127.0.0.1")
	}
	for i, l := range c.Listeners {
		if a, err := parseAddress(l.Address); err == nil && admin.overlaps(a) {
			bad(fmt.Sprintf("listeners[%d].address", i), fmt.Sprintf("%s is taken by admin.address", l.Address), "write another port for one of them")
		}
	}
}

var listenerName = regexp.MustCompile(`^[a-z0-9-]{1,63}$`)

func (c *Config) checkUpstreams(bad report) {
	if _, ok := c.Upstreams[PartnerCenter]; !ok {
		bad("upstreams."+PartnerCenter, "is missing", "")
	}
	for _, name := range slices.Sorted(maps.Keys(c.Upstreams)) {
		path := join("upstreams", name)
		if name != PartnerCenter {
			bad(path, "is not an upstream of this version", "only "+PartnerCenter+" is known")
			continue
		}
		u := c.Upstreams[name]
		target, ok := checkURL(bad, path+".url", u.URL)
		if ok && u.Dial == "" && c.ownAddress(target) {
			bad(path+".url", "is the guard's own address", "write the address of Partner Center, or leave it out")
		}
		if u.Dial != "" {
			const hint = "write the host:port to connect to, such as 203.0.113.7:443"
			switch a, err := parseAddress(u.Dial); {
			case err != nil:
				bad(path+".dial", err.Error(), hint)
			case a.host == "" || a.port == 0:
				bad(path+".dial", fmt.Sprintf("%q lacks host or port", u.Dial), hint)
			case c.ownAddress(a):
				bad(path+".dial", "is the guard's own address", "write an address of Partner Center")
			}
		}
		for i, aud := range u.Audiences {
			if strings.TrimSpace(aud) == "" {
				bad(fmt.Sprintf("%s.audiences[%d]", path, i), "is empty", "write a resource URI or an application id")
			}
		}
	}
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

func (c *Config) checkEntra(bad report) {
	if c.Entra.Authority != "" {
		if target, ok := checkURL(bad, "entra.authority", c.Entra.Authority); ok && c.ownAddress(target) {
			bad("entra.authority", "is the guard's own address", "leave it out to use the cloud's")
		}
	}
	allowed := policy.AllowedMFAValues()
	if len(c.Entra.MFAValues) == 0 {
		bad("entra.mfa_values", "is empty, so no token could prove MFA", "leave it out, or write some of "+strings.Join(allowed, ", "))
	}
	for i, v := range c.Entra.MFAValues {
		if !slices.Contains(allowed, v) {
			bad(fmt.Sprintf("entra.mfa_values[%d]", i), fmt.Sprintf("%q does not prove MFA", v), "write only "+strings.Join(allowed, ", "))
		}
	}
}

func (c *Config) checkTimes(bad report) {
	for _, d := range []struct {
		path   string
		value  time.Duration
		zeroOK bool
	}{
		{"entra.leeway", c.Entra.Leeway, true},
		{"entra.max_stale", c.Entra.MaxStale, false},
		{"timeouts.dial", c.Timeouts.Dial, false},
		{"timeouts.tls", c.Timeouts.TLS, false},
		{"timeouts.response_header", c.Timeouts.ResponseHeader, false},
		{"timeouts.idle", c.Timeouts.Idle, false},
		{"timeouts.drain", c.Timeouts.Drain, true},
		{"ledger.retention", c.Ledger.Retention, false},
		{"ledger.fsync", time.Duration(c.Ledger.FSync), true},
	} {
		switch {
		case d.value < 0:
			bad(d.path, "is negative", "write a duration such as 30s, 5m or 7d")
		case d.value == 0 && !d.zeroOK:
			bad(d.path, "is zero", "write a duration such as 30s, 5m or 7d")
		}
	}
	if c.Ledger.MinFree < 0 {
		bad("ledger.min_free", "is negative", "write a size such as 1GiB, or 0")
	}
}

// checkFiles reports the files that c names and that cannot be used.
func (c *Config) checkFiles(bad report) {
	read := func(path, file string) []byte {
		if file == "" {
			return nil
		}
		data, err := os.ReadFile(file)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			bad(path, fmt.Sprintf("the file %s does not exist", file), "a relative path starts at the directory of the configuration file")
		case err != nil:
			bad(path, err.Error(), "")
		case len(data) == 0:
			bad(path, fmt.Sprintf("the file %s is empty", file), "")
		}
		return data
	}
	for i, l := range c.Listeners {
		if l.TLS == nil {
			continue
		}
		path := fmt.Sprintf("listeners[%d].tls", i)
		certificate, key := read(path+".certificate", l.TLS.Certificate), read(path+".key", l.TLS.Key)
		if len(certificate) == 0 || len(key) == 0 {
			continue
		}
		if _, err := tls.X509KeyPair(certificate, key); err != nil {
			bad(path, fmt.Sprintf("certificate %s with key %s cannot be used: %v", l.TLS.Certificate, l.TLS.Key, err), "both must be PEM and belong together")
		}
	}
	for _, name := range slices.Sorted(maps.Keys(c.Upstreams)) {
		u := c.Upstreams[name]
		path := join("upstreams", name) + ".ca"
		if data := read(path, u.CA); len(data) > 0 {
			if err := parseCertificates(data); err != nil {
				bad(path, fmt.Sprintf("the file %s cannot be used: %v", u.CA, err), "write a PEM file of CA certificates")
			}
		}
	}
}

// parseCertificates checks that data holds certificates, every one readable.
func parseCertificates(data []byte) error {
	found := false
	for {
		var block *pem.Block
		block, data = pem.Decode(data)
		if block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			continue
		}
		if _, err := x509.ParseCertificate(block.Bytes); err != nil {
			return err
		}
		found = true
	}
	if !found {
		return errors.New("no certificate in it")
	}
	return nil
}

// checkURL reports what keeps raw from being a scheme with a host, and returns
// the address it leads to. It never repeats raw, which might hold a password.
func checkURL(bad report, path, raw string) (address, bool) {
	const hint = "write it as https://host"
	u, err := url.Parse(raw)
	switch {
	case err != nil, u.Opaque != "", u.Hostname() == "":
		bad(path, "is not a URL", hint)
		return address{}, false
	case u.User != nil:
		bad(path, "holds a user name", "write only scheme and host")
		return address{}, false
	case u.Path != "" || u.RawQuery != "" || u.ForceQuery || u.Fragment != "":
		bad(path, "has more than scheme and host", hint)
		return address{}, false
	}
	port := u.Port()
	if port == "" {
		port = "443"
		if u.Scheme == "http" {
			port = "80"
		}
	}
	a, err := parseAddress(net.JoinHostPort(u.Hostname(), port))
	switch {
	case err != nil || a.port == 0:
		bad(path, "has no usable host and port", hint)
		return address{}, false
	case u.Scheme != "https" && u.Scheme != "http":
		bad(path, fmt.Sprintf("has the scheme %q", u.Scheme), hint)
		return address{}, false
	case u.Scheme == "http" && !a.loopback():
		bad(path, "is http: tokens or keys would cross the network in clear text", "write https; http is only for this machine (127.0.0.1)")
		return address{}, false
	}
	return a, true
}

// address is a host and a port.
type address struct {
	host string // lower case; empty is every interface
	ip   netip.Addr
	port uint16
}

func checkAddress(bad report, path, s string) (address, bool) {
	const hint = "write host:port, such as 127.0.0.1:8080"
	if s == "" {
		bad(path, "is required", hint)
		return address{}, false
	}
	a, err := parseAddress(s)
	if err != nil {
		bad(path, err.Error(), hint)
		return address{}, false
	}
	return a, true
}

var hostSyntax = regexp.MustCompile(`^[a-z0-9]([a-z0-9._-]*[a-z0-9])?$`)

func parseAddress(s string) (address, error) {
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		return address{}, fmt.Errorf("%q is not host:port", s)
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return address{}, fmt.Errorf("%q has no port number from 0 to 65535", s)
	}
	a := address{host: strings.ToLower(host), port: uint16(n)}
	if ip, err := netip.ParseAddr(host); err == nil {
		a.ip = ip.Unmap()
	} else if host != "" && !hostSyntax.MatchString(a.host) {
		return address{}, fmt.Errorf("%q has no valid host", s)
	}
	return a, nil
}

func (a address) any() bool { return a.host == "" || a.ip.IsUnspecified() }

func (a address) loopback() bool { return a.host == "localhost" || a.ip.IsLoopback() }

// answers reports whether a listener on a takes connections to target.
func (a address) answers(target address) bool {
	switch {
	case a.port != target.port || a.port == 0:
		return false
	case a.host == target.host || a.ip.IsValid() && a.ip == target.ip:
		return true
	case a.any():
		return target.loopback() || target.any()
	case target.any(): // connects to this machine
		return a.loopback()
	}
	// localhost is 127.0.0.1, ::1 or both.
	return a.loopback() && target.loopback() && (a.host == "localhost" || target.host == "localhost")
}

// overlaps reports whether listeners on a and b collide. Every interface counts
// for IPv4 and IPv6 alike, though some systems keep these apart.
func (a address) overlaps(b address) bool {
	return a.answers(b) || a.port == b.port && a.port != 0 && (a.any() || b.any())
}
