package policy

import (
	_ "embed"
	"strings"
	"sync"
)

// Route is a documented resource of Partner Center, Partner API or Microsoft
// Graph. The table is of public documentation of mid-2026; what it lacks is
// forwarded all the same and has the zero Route.
type Route struct {
	Template string // as documented: /v1/customers/{customer-tenant-id}/orders
	Area     string // orders, invoices, security, …
	Auth     string // app+user, both (app-only too), or unknown
}

//go:embed routes.tsv
var routesTSV string

// routeNode is one segment position of the table, a tree read from the root.
type routeNode struct {
	literal map[string]*routeNode // by lower-case segment
	param   *routeNode
	name    string           // of the parameter that led here
	route   Route            // of any method: the first of the table, without Auth
	methods map[string]Route // by method
}

var routes = sync.OnceValue(func() *routeNode {
	root := &routeNode{}
	for i, line := range strings.Split(strings.TrimSpace(routesTSV), "\n") {
		f := strings.Split(line, "\t")
		if i == 0 || len(f) != 4 {
			continue
		}
		n := root
		for _, s := range appendSegments(nil, f[1]) {
			n = n.child(s)
		}
		if n.methods == nil {
			n.methods = map[string]Route{}
			n.route = Route{Template: f[1], Area: f[3], Auth: "unknown"}
		}
		n.methods[f[0]] = Route{Template: f[1], Area: f[3], Auth: f[2]}
	}
	return root
})

func (n *routeNode) child(segment string) *routeNode {
	if strings.HasPrefix(segment, "{") && strings.HasSuffix(segment, "}") {
		if n.param == nil {
			n.param = &routeNode{name: segment}
		}
		return n.param
	}
	segment = routeKey(segment)
	if n.literal == nil {
		n.literal = map[string]*routeNode{}
	}
	if n.literal[segment] == nil {
		n.literal[segment] = &routeNode{}
	}
	return n.literal[segment]
}

// routeKey is the key of a literal segment: lower case, and of an OData function
// such as pricesheets(Market='US') only the name, as its arguments vary.
func routeKey(segment string) string {
	if i := strings.IndexByte(segment, '('); i >= 0 {
		segment = segment[:i+1]
	}
	return strings.ToLower(segment)
}

// FindRoute looks up the documented route of a request, without case and with
// empty segments dropped, and the customer tenant it names, if any. path has no
// query. A method that is not documented for a known path has the path's template
// but no Auth. It is safe for concurrent use.
func FindRoute(method, path string) (r Route, customer string) {
	n := routes()
	rest := path
	for rest != "" {
		var s string
		s, rest, _ = strings.Cut(rest, "/")
		if s == "" {
			continue
		}
		// Literal before parameter: /customers/relationshiprequests is not a customer.
		next := n.literal[routeKey(s)]
		if next == nil {
			if next = n.param; next == nil {
				return Route{}, customer
			}
			if next.name == "{customer-tenant-id}" && IsGUID(s) {
				customer = strings.ToLower(s)
			}
		}
		n = next
	}
	if r, ok := n.methods[method]; ok {
		return r, customer
	}
	return n.route, customer
}
