package policy

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"time"
)

// Rule gives a mode to the calls it matches. Every key that is given must hold;
// a rule outside its dates or its percent does not match, and the next is tried.
type Rule struct {
	Name         string   // unique; part of the percent's dice, so renaming it rolls anew
	Integrations []string // names, app-{app id}, or unknown
	Tenants      []string
	Methods      []string
	// Routes are path patterns: * stands for one segment, ** at the end for the
	// rest, also for nothing. They match without case, empty segments dropped.
	Routes []string
	Mode   Mode
	// Percent is the share of integrations, 0 to 100, that the rule holds for:
	// always the same ones. Nil is 100.
	Percent     *int
	From, Until time.Time // From inclusive, Until exclusive; zero is open
	Owner, Note string    // for the reader of the file
}

type rule struct {
	Rule
	routes [][]string // lower-case segments
}

func compileRule(r Rule, path string, p *Policy, bad func(path, problem, hint string)) rule {
	c := rule{Rule: r}
	if r.Name == "" {
		bad(path+".name", "is required", "name the rule; its name appears in every record it decides")
	}
	for _, other := range p.rules {
		if r.Name != "" && other.Name == r.Name {
			bad(path+".name", fmt.Sprintf("%q is used twice", r.Name), "each rule needs its own name")
		}
	}
	if r.Mode == Inherit || !r.Mode.valid() {
		bad(path+".mode", "is required", "write audit, tag or enforce")
	}
	c.Integrations = nil
	for i, name := range r.Integrations {
		c.Integrations = append(c.Integrations, strings.ToLower(name)) // app-{GUID} in any case
		id, auto := strings.CutPrefix(name, "app-")
		if p.byName[name] == nil && name != Unknown && !(auto && IsGUID(id)) {
			bad(fmt.Sprintf("%s.integrations[%d]", path, i), fmt.Sprintf("%q is not configured", name),
				"write the name of an integration, app- with an application id, or unknown")
		}
	}
	c.Tenants = nil
	for i, t := range r.Tenants {
		t = strings.ToLower(t)
		c.Tenants = append(c.Tenants, t)
		if !IsGUID(t) || len(p.tenants) > 0 && !slices.Contains(p.tenants, t) {
			bad(fmt.Sprintf("%s.tenants[%d]", path, i), fmt.Sprintf("%q is not one of the accepted tenants", t), "write a GUID that stands in tenants")
		}
	}
	c.Methods = nil
	for i, m := range r.Methods {
		up := strings.ToUpper(m)
		c.Methods = append(c.Methods, up)
		if m == "" || strings.Trim(up, "ABCDEFGHIJKLMNOPQRSTUVWXYZ-") != "" {
			bad(fmt.Sprintf("%s.methods[%d]", path, i), fmt.Sprintf("%q is not a method", m), "write GET, POST, PATCH, …")
		}
	}
	for i, pattern := range r.Routes {
		segments := appendSegments(nil, strings.ToLower(pattern))
		if !strings.HasPrefix(pattern, "/") {
			bad(fmt.Sprintf("%s.routes[%d]", path, i), fmt.Sprintf("%q does not begin with /", pattern), "write it as in /v1/invoices/**")
		}
		for j, s := range segments {
			if s == "**" && j < len(segments)-1 || s != "*" && s != "**" && strings.Contains(s, "*") {
				bad(fmt.Sprintf("%s.routes[%d]", path, i), fmt.Sprintf("%q has a * that is not a whole segment, or a ** before the end", pattern),
					"* stands for one whole segment, ** at the end for the rest")
				break
			}
		}
		c.routes = append(c.routes, segments)
	}
	if r.Percent != nil && (*r.Percent < 0 || *r.Percent > 100) {
		bad(path+".percent", fmt.Sprintf("%d is not a share", *r.Percent), "write 0 to 100")
	}
	if !r.From.IsZero() && !r.Until.IsZero() && !r.From.Before(r.Until) {
		bad(path+".until", "is not after from", "the rule would never match")
	}
	return c
}

// match is whether a rule holds for a call. Maybe is for what nobody can tell: the
// guard then looks at both answers and takes the stricter.
type match uint8

const (
	no match = iota
	maybe
	yes
)

// resolve finds the mode of c: of the first rule that matches, else of the
// integration, else the global one. Where the name rests on weak evidence, or the
// path reads differently once decoded, each reading is resolved by itself and the
// strictest holds, so that nothing a caller merely claims can loosen what holds
// for it.
func (p *Policy) resolve(c *Call) (Mode, string) {
	strictest, by := Inherit, ""
	a := &c.Attribution
	var literal, decoded []string
	if p.routed {
		literal, decoded = pathForms(c.Path)
	}
	for i, name := range a.names {
		in := a.fallback
		if i == 0 {
			in = a.integration
		} else if name == a.names[i-1] && a.integration == a.fallback {
			continue
		}
		m, rule := p.resolveAs(c, name, in, literal)
		if m > strictest {
			strictest, by = m, rule
		}
		if decoded == nil {
			continue
		}
		if m, rule = p.resolveAs(c, name, in, decoded); m > strictest {
			strictest, by = m, rule
		}
	}
	return strictest, by
}

// resolveAs is the mode of c under one name and one reading of its path. Rules
// that may or may not hold, as nobody can tell, count with what follows them.
func (p *Policy) resolveAs(c *Call, name string, in *Integration, path []string) (Mode, string) {
	strictest, by := Inherit, ""
	for i := range p.rules {
		r := &p.rules[i]
		m := r.match(c, name, path)
		if m != no && r.Mode > strictest {
			strictest, by = r.Mode, r.Name
		}
		if m == yes {
			return p.orEnforce(strictest), by
		}
	}
	m := p.mode
	if in != nil && in.Mode != Inherit {
		m = in.Mode
	}
	if m > strictest {
		strictest, by = m, ""
	}
	return p.orEnforce(strictest), by
}

// orEnforce makes a mode that nobody set the strict one.
func (p *Policy) orEnforce(m Mode) Mode {
	if m == Inherit {
		return Enforce
	}
	return m
}

func (r *rule) match(c *Call, name string, path []string) match {
	if !r.From.IsZero() && c.Time.Before(r.From) || !r.Until.IsZero() && !c.Time.Before(r.Until) {
		return no
	}
	// Servers are known to read methods without case.
	if len(r.Methods) > 0 && !slices.ContainsFunc(r.Methods, func(m string) bool { return strings.EqualFold(m, c.Method) }) {
		return no
	}
	if len(r.routes) > 0 && !slices.ContainsFunc(r.routes, func(p []string) bool { return matchRoute(p, path) }) {
		return no
	}
	if len(r.Integrations) > 0 && !slices.Contains(r.Integrations, name) {
		return no
	}
	m := yes
	if len(r.Tenants) > 0 {
		switch {
		case !c.Token.Verified:
			m = maybe
		case !slices.Contains(r.Tenants, c.Token.TenantID):
			return no
		}
	}
	if r.Percent != nil && *r.Percent < 100 {
		switch {
		case *r.Percent == 0: // rolled back, for everyone
			return no
		case !c.Attribution.Strong:
			// A call that cannot show whose it is counts as inside; it cannot buy
			// itself a looser mode with that either.
			m = maybe
		case dice(r.Name, name) >= uint64(*r.Percent):
			return no
		}
	}
	return m
}

// dice throws an integration's number for a rule, 0 to 99: the same every time.
func dice(rule, integration string) uint64 {
	sum := sha256.Sum256([]byte(rule + "\x00" + integration))
	return binary.BigEndian.Uint64(sum[:8]) % 100
}

// matchRoute reports whether segments match the pattern, both lower case.
func matchRoute(pattern, segments []string) bool {
	for i, p := range pattern {
		if p == "**" {
			return true
		}
		if i >= len(segments) || p != "*" && p != segments[i] {
			return false
		}
	}
	return len(pattern) == len(segments)
}

// pathForms are the segments of a path as it stands and once decoded, lower case,
// empty ones dropped. decoded is nil when there is nothing to decode.
func pathForms(path string) (literal, decoded []string) {
	literal = appendSegments(nil, strings.ToLower(path))
	if strings.Contains(path, "%") {
		if d, err := url.PathUnescape(path); err == nil {
			decoded = appendSegments([]string{}, strings.ToLower(d))
		}
	}
	return literal, decoded
}

// appendSegments appends the non-empty segments of path to dst.
func appendSegments(dst []string, path string) []string {
	for s := range strings.SplitSeq(path, "/") {
		if s != "" {
			dst = append(dst, s)
		}
	}
	return dst
}
