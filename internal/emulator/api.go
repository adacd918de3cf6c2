package emulator

import (
	"encoding/base64"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"github.com/google/uuid"
)

// The APIs, as Request.API names them.
const (
	PartnerCenter = "partner-center"
	PartnerAPI    = "partner-api"
	Graph         = "graph"
)

// The hosts of the global cloud. See
// https://learn.microsoft.com/partner-center/developer/.
const (
	hostPartnerCenter = "api.partnercenter.microsoft.com"
	hostPartnerAPI    = "api.partner.microsoft.com"
	hostGraph         = "graph.microsoft.com"
)

// api is one of Microsoft's hosts: what it serves, and to whose tokens. The APIs share
// no audience.
type api struct {
	*partner
	name, host  string
	audiences   []string // without a trailing slash
	routes      []route
	url, tlsURL string // of its listeners
}

// errorResponse is an error in the shape of the API. code is Partner Center's.
func (p *api) errorResponse(status int, code, description string) response {
	if p == p.center {
		return partnerError(status, code, description)
	}
	return odataError(status, description)
}

// unauthorized is the 401 to a token that the API does not take. code is Partner
// Center's; with none, the gateway in front answers in its stead.
func (p *api) unauthorized(code, text string) response {
	var res response
	challenge := `Bearer error="invalid_token"`
	switch {
	case p == p.graph:
		res = odataError(http.StatusUnauthorized, text)
		challenge = `Bearer realm="", authorization_uri="https://login.microsoftonline.com/common/oauth2/authorize", client_id="` + AudienceGraphGUID + `"`
	case p == p.partnerAPI || code == "":
		res = gatewayError(http.StatusUnauthorized, "Unauthorized: "+text)
	default:
		res = partnerError(http.StatusUnauthorized, code, text)
		if code == "800001" {
			challenge = "OAuth realm=urn:cpsvc:cpid:" + guid("cpid")
		}
	}
	res.header["Www-Authenticate"] = []string{challenge}
	return res
}

// statusResponse is a plausible answer of any status.
func (p *api) statusResponse(status int) response {
	if p != p.center && status >= 400 && status != http.StatusTooManyRequests {
		return odataError(status, fmt.Sprintf("The emulator was asked for status %d.", status))
	}
	return statusResponse(status)
}

// refusalShape is the form in which the API refuses for lack of MFA: Graph has its
// own; that of the Partner API is not known and taken to be Partner Center's.
func (p *api) refusalShape() Shape {
	shape := p.currentShape()
	if p == p.graph && shape != ShapeGraphPascal {
		return ShapeGraphNested
	}
	return shape
}

// odataError is the error shape of the Partner API and Graph.
func odataError(status int, message string) response {
	code := "generalException"
	switch status {
	case http.StatusBadRequest, http.StatusMethodNotAllowed:
		code = "invalidRequest"
	case http.StatusUnauthorized:
		code = "unauthenticated"
	case http.StatusForbidden:
		code = "accessDenied"
	case http.StatusNotFound:
		code = "itemNotFound"
	case http.StatusPreconditionFailed:
		code = "preconditionFailed"
	case http.StatusServiceUnavailable:
		code = "serviceNotAvailable"
	}
	return jsonResponse(status, object{{"error", object{
		{"code", code},
		{"message", message},
		{"innerError", object{
			{"date", time.Now().UTC().Format("2006-01-02T15:04:05")},
			{"request-id", uuid.NewString()},
			{"client-request-id", uuid.NewString()},
		}},
	}}})
}

// absolute is an absolute link, as Microsoft writes it there; scheme is not always
// https. With Config.OwnLinks it leads to the listener that c came to.
func (c *call) absolute(scheme, target string) string {
	switch {
	case !c.e.cfg.OwnLinks:
		return scheme + "://" + c.api.host + target
	case c.r.TLS != nil:
		return c.api.tlsURL + target
	}
	return c.api.url + target
}

// page cuts one page out of total items. The query parameter that names it holds
// what token made; next is empty on the last page.
func (c *call) page(parameter string, total int) (from, to int, next string, err error) {
	const prefix = "page:"
	if token := c.r.URL.Query().Get(parameter); token != "" {
		raw, err := base64.RawURLEncoding.DecodeString(token)
		if err != nil || len(raw) <= len(prefix) || string(raw[:len(prefix)]) != prefix {
			return 0, 0, "", fmt.Errorf("%s is not valid", parameter)
		}
		if from, err = strconv.Atoi(string(raw[len(prefix):])); err != nil || from < 0 || from > total {
			return 0, 0, "", fmt.Errorf("%s is not valid", parameter)
		}
	}
	to = min(from+c.e.cfg.PageSize, total)
	if to < total {
		next = base64.RawURLEncoding.EncodeToString(fmt.Appendf(nil, "%s%d", prefix, to))
	}
	return from, to, next, nil
}
