package policy

import (
	"fmt"
	"net/netip"
	"net/url"
	"slices"
	"strings"
)

// Labels for callers that no integration names.
const (
	Unknown = "unknown" // nothing names the caller
	Other   = "other"   // named by its app id, but there are too many such names
)

// Integration is a calling program as the partner names it.
type Integration struct {
	Name    string // [a-z0-9-]{1,63}
	Owner   string // whose it is: a mail address, a team
	Contact string // how to reach them, if not by Owner
	Mode    Mode   // Inherit leaves it to the global mode
	Match   Match

	evidence string // the conditions of Match, by name
}

// Match says how to know an integration's calls. Every condition given must
// hold; within a condition any one value is enough. An empty Match matches
// nothing, but /i/{name}/ still claims the integration.
type Match struct {
	// Strong conditions: the caller cannot choose them freely.

	AppID      []string       // verified client application id
	User       []string       // verified oid or upn
	ClientCert []string       // subject name of a verified client certificate
	Listener   []string       // name of the listener
	Source     []netip.Prefix // of the TCP peer

	// Weak conditions: any caller can claim them.

	Host        []string // Host header without port
	PathPrefix  []string // whole leading segments of the path, read as a rule's routes are
	Application []string // MS-PartnerCenter-Application
	UserAgent   []string // leading part of User-Agent
}

func (m Match) normalised(path string, bad func(path, problem, hint string)) Match {
	lower := func(in []string) []string {
		out := make([]string, len(in))
		for i, s := range in {
			out[i] = strings.ToLower(s)
		}
		return out
	}
	for i, id := range m.AppID {
		if !IsGUID(id) {
			bad(fmt.Sprintf("%s.app_id[%d]", path, i), fmt.Sprintf("%q is not an application id", id), "write the GUID of the app registration")
		}
	}
	m.AppID, m.User, m.Host = lower(m.AppID), lower(m.User), lower(m.Host)
	m.PathPrefix = slices.Clone(m.PathPrefix)
	for i, p := range m.PathPrefix {
		if !strings.HasPrefix(p, "/") {
			bad(fmt.Sprintf("%s.path_prefix[%d]", path, i), fmt.Sprintf("%q does not begin with /", p), "write it as the client sends it, such as /i/billing or /v1/invoices")
		}
		m.PathPrefix[i] = strings.TrimRight(p, "/")
		if name, _, ok := CutIntegration(m.PathPrefix[i] + "/"); ok && !nameSyntax.MatchString(name) {
			bad(fmt.Sprintf("%s.path_prefix[%d]", path, i), fmt.Sprintf("%q is not a name", name), "after /i/ comes a name of 1 to 63 of a-z, 0-9 and -")
		}
	}
	empty := func(key string, list []string) {
		for i, s := range list {
			if strings.Trim(s, "/ ") == "" {
				bad(fmt.Sprintf("%s.%s[%d]", path, key, i), "is empty", "an empty value would match every call; remove it")
			}
		}
	}
	empty("user", m.User)
	empty("client_cert", m.ClientCert)
	empty("listener", m.Listener)
	empty("host", m.Host)
	empty("path_prefix", m.PathPrefix)
	empty("application", m.Application)
	empty("user_agent", m.UserAgent)
	return m
}

// Attribution is whose call it is, and on what evidence.
type Attribution struct {
	// Name is the integration's name; app-{app id} for a caller known only by its
	// verified app id; Unknown when nothing names it.
	Name  string
	Owner string
	// Evidence are the kinds of evidence that named it, such as "app_id" or
	// "user_agent", joined by "+". Others that pointed elsewhere follow after a
	// comma, as "application=nightly-billing".
	Evidence string
	// Strong reports whether the evidence cannot be chosen by any caller.
	Strong bool

	// The same with the weak evidence left out: equal to the above when Strong.
	integration, fallback *Integration // nil where none is configured
	// names are Name, the name without what the client claims, and the name
	// without a first-party app id either. Equal where nothing weak counts.
	names [3]string
}

// rank orders the evidence when several integrations match; the lowest wins.
type rank uint8

const (
	byClientCert rank = iota
	byListener
	byAppAndUser
	byApp
	byUser
	bySource
	byWeak
	noMatch
)

// Attribute finds the integration that c belongs to. Strong evidence beats weak,
// then the order client_cert, listener, app_id with user, app_id, user, source,
// weak decides, then the order of the configuration.
func (p *Policy) Attribute(c *Call) Attribution {
	a := Attribution{Name: Unknown, names: [3]string{Unknown, Unknown, Unknown}}
	best := noMatch
	losers := ""
	for i := range p.integrations {
		in := &p.integrations[i]
		r, evidence := in.match(c)
		switch {
		case r == noMatch:
			continue
		case r < best:
			if a.integration != nil {
				losers += "," + a.Evidence + "=" + a.Name
			}
			best, a.integration, a.Name, a.Owner, a.Evidence = r, in, in.Name, in.Owner, evidence
		default:
			losers += "," + evidence + "=" + in.Name
		}
	}
	switch {
	case best < byWeak:
		a.Strong, a.fallback = true, a.integration
		a.names[1], a.names[2] = a.Name, a.Name
	case c.Token.Verified && c.Token.AppID != "":
		own := !FirstParty(c.Token.AppID)
		a.names[1] = "app-" + c.Token.AppID
		if own {
			a.names[2] = a.names[1]
		}
		if a.integration == nil {
			a.Name, a.Evidence, a.Strong = a.names[1], "app_id", own
		}
	}
	a.names[0] = a.Name
	a.Evidence += losers
	return a
}

// match reports how in matches c and on what evidence, or noMatch.
func (in *Integration) match(c *Call) (rank, string) {
	r := in.Match.rank(c)
	switch {
	case r > byListener && c.Evidence.ListenerIntegration == in.Name:
		return byListener, "listener"
	case r == noMatch && c.Evidence.Prefix == in.Name:
		// The weakest match: the caller wrote the name into the path.
		return byWeak, "path_prefix"
	}
	return r, in.evidence
}

// rank is the rank of m's strongest condition, or noMatch unless all of them hold.
func (m *Match) rank(c *Call) rank {
	e, t := &c.Evidence, &c.Token
	r := noMatch
	if len(m.ClientCert) > 0 {
		if !slices.ContainsFunc(m.ClientCert, func(s string) bool { return slices.Contains(e.ClientCert, s) }) {
			return noMatch
		}
		r = min(r, byClientCert)
	}
	if len(m.Listener) > 0 {
		if !slices.Contains(m.Listener, e.Listener) {
			return noMatch
		}
		r = min(r, byListener)
	}
	if len(m.AppID) > 0 {
		if !t.Verified || !slices.Contains(m.AppID, t.AppID) {
			return noMatch
		}
		// Anyone can sign in with one of Microsoft's own clients, so its id tells
		// integrations apart no better than a header does.
		if FirstParty(t.AppID) {
			r = min(r, byWeak)
		} else {
			r = min(r, byApp)
		}
	}
	if len(m.User) > 0 {
		if !t.Verified || t.Kind == KindAppOnly || !slices.ContainsFunc(m.User, t.isUser) {
			return noMatch
		}
		if r == byApp {
			r = byAppAndUser
		}
		r = min(r, byUser)
	}
	if len(m.Source) > 0 {
		if !slices.ContainsFunc(m.Source, func(p netip.Prefix) bool { return p.Contains(e.Peer) }) {
			return noMatch
		}
		r = min(r, bySource)
	}
	if len(m.Host) > 0 {
		if !slices.Contains(m.Host, e.Host) {
			return noMatch
		}
		r = min(r, byWeak)
	}
	if len(m.PathPrefix) > 0 {
		if !slices.ContainsFunc(m.PathPrefix, c.underPrefix) {
			return noMatch
		}
		r = min(r, byWeak)
	}
	if len(m.Application) > 0 {
		if !slices.Contains(m.Application, e.Application) {
			return noMatch
		}
		r = min(r, byWeak)
	}
	if len(m.UserAgent) > 0 {
		if !slices.ContainsFunc(m.UserAgent, func(ua string) bool { return strings.HasPrefix(e.UserAgent, ua) }) {
			return noMatch
		}
		r = min(r, byWeak)
	}
	return r
}

// evidence names m's conditions, joined by "+".
func (m *Match) evidence() string {
	var names []string
	for _, c := range []struct {
		n    int
		name string
	}{
		{len(m.ClientCert), "client_cert"}, {len(m.Listener), "listener"}, {len(m.AppID), "app_id"},
		{len(m.User), "user"}, {len(m.Source), "source"}, {len(m.Host), "host"},
		{len(m.PathPrefix), "path_prefix"}, {len(m.Application), "application"}, {len(m.UserAgent), "user_agent"},
	} {
		if c.n > 0 {
			names = append(names, c.name)
		}
	}
	return strings.Join(names, "+")
}

// isUser reports whether name, an object id or a user principal name in lower
// case, is t's user.
func (t *Token) isUser(name string) bool {
	return name == t.ObjectID || t.UPN != "" && strings.EqualFold(name, t.UPN)
}

// underPrefix reports whether the path that the client sent lies under prefix, as it
// stands or once decoded.
func (c *Call) underPrefix(prefix string) bool {
	name, rest, ok := CutIntegration(prefix + "/")
	if !ok {
		name, rest = "", prefix
	}
	if c.Evidence.Prefix != name {
		return false
	}
	if hasSegmentPrefix(c.Path, rest) {
		return true
	}
	if !strings.Contains(c.Path, "%") {
		return false
	}
	decoded, err := url.PathUnescape(c.Path)
	return err == nil && hasSegmentPrefix(decoded, rest)
}

// hasSegmentPrefix compares whole segments without case, empty ones dropped.
func hasSegmentPrefix(path, prefix string) bool {
	for {
		var want, got string
		if want, prefix = cutSegment(prefix); want == "" {
			return true
		}
		if got, path = cutSegment(path); !strings.EqualFold(got, want) {
			return false
		}
	}
}

// cutSegment returns the first segment of path that is not empty, and what follows.
func cutSegment(path string) (segment, rest string) {
	segment, rest, _ = strings.Cut(strings.TrimLeft(path, "/"), "/")
	return segment, rest
}

// CutIntegration splits /i/{name}/rest into name and /rest. ok is false when path
// is not of this form; the name is compared as it stands, before any decoding.
func CutIntegration(path string) (name, rest string, ok bool) {
	after, found := strings.CutPrefix(path, "/i/")
	if !found {
		return "", path, false
	}
	i := strings.IndexByte(after, '/')
	if i < 0 {
		return after, "/", true
	}
	return after[:i], after[i:], true
}

// firstParty are client applications of Microsoft itself that tokens for Partner
// Center are known to be fetched with: Azure CLI (the PartnerCenter PowerShell
// module's default), Microsoft Office, and the old Exchange client.
var firstParty = [...]string{
	"04b07795-8ddb-461a-bbee-02f9e1bf7b46",
	"d3590ed6-52b3-4102-aeff-aad2292ab01c",
	"a0c73c16-a7e3-4564-9a95-2bdf47383716",
}

// FirstParty reports whether appID (lower case) is one of Microsoft's own client
// applications, which anyone may use.
func FirstParty(appID string) bool { return slices.Contains(firstParty[:], appID) }
