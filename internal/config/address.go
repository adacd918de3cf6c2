package config

import (
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"regexp"
	"strconv"
	"strings"
)

// checkURL reports what keeps raw from being a scheme with a host, and returns
// the address it leads to. It never repeats raw, which might hold a password.
func checkURL(bad report, path, raw string) (address, bool) {
	const hint = "write it as https://host"
	a, ok := checkLocation(bad, path, raw, hint)
	if !ok {
		return address{}, false
	}
	u, err := url.Parse(raw)
	if err != nil || u.Path != "" || u.RawQuery != "" || u.ForceQuery || u.Fragment != "" {
		bad(path, "has more than scheme and host", hint)
		return address{}, false
	}
	return a, true
}

// checkLocation is checkURL for a URL that may go on after the host.
func checkLocation(bad report, path, raw, hint string) (address, bool) {
	u, err := url.Parse(raw)
	switch {
	case err != nil, u.Opaque != "", u.Hostname() == "":
		bad(path, "is not a URL", hint)
		return address{}, false
	case u.User != nil:
		bad(path, "holds a user name", hint)
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
		bad(path, "is http: anyone on the way could read and change what is sent", "write https; http is only for this machine (127.0.0.1)")
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

// isIP reports whether host is an IP address, in brackets or not.
func isIP(host string) bool {
	_, err := netip.ParseAddr(strings.Trim(host, "[]"))
	return err == nil
}

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
