package emulator

import (
	"context"
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
)

// clockSkew is what Microsoft.IdentityModel allows by default.
const clockSkew = 5 * time.Minute

// maxKeptBody bounds what a resource sees of a request body; all of it is hashed.
const maxKeptBody = 1 << 20

// partner is what the APIs know of the partner and share.
type partner struct {
	e        *Emulator
	exposure *exposure
	state    *state
	security *security
	shape    atomic.Int64
	refusals atomic.Int64 // refusals made so far; ShapeMixed counts on it
	served   atomic.Int64 // calls met so far, for ThrottleEvery

	center, partnerAPI, graph *api

	mu     sync.Mutex
	issued map[string]issuedToken // opaque and encrypted tokens
}

// issuedToken is a bearer token that only the APIs can read.
type issuedToken struct {
	claims  map[string]any
	expires time.Time
}

// call is one request on its way through an API.
type call struct {
	*partner
	api    *api
	r      *http.Request
	params []string // values of the route's braces
	body   []byte   // the first maxKeptBody bytes
	sum    string   // SHA-256 of the whole body
	size   int64
	token  string
	claims map[string]any
}

func newPartner(e *Emulator) *partner {
	p := &partner{
		e:        e,
		exposure: newExposure(e.cfg),
		state:    newState(),
		security: newSecurity(),
		issued:   map[string]issuedToken{},
	}
	p.setShape(e.cfg.Shape)
	p.center = &api{
		partner: p, name: PartnerCenter, host: hostPartnerCenter,
		audiences: []string{AudiencePartnerCenter, AudiencePartnerCenterGUID}, routes: centerRoutes(),
	}
	p.partnerAPI = &api{
		partner: p, name: PartnerAPI, host: hostPartnerAPI,
		audiences: []string{AudiencePartnerAPI, AudiencePartnerAPIGUID}, routes: partnerAPIRoutes(),
	}
	p.graph = &api{
		partner: p, name: Graph, host: hostGraph,
		audiences: []string{AudienceGraph, AudienceGraphGUID}, routes: graphRoutes(),
	}
	return p
}

// ServeHTTP follows one call: it is noted, read, checked, and answered as the
// resource, the enforcement of MFA and the Emulate header say.
func (p *api) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	entry := p.e.calls.add(p.name, r)
	a := &answerer{p: p.partner, w: w, r: r, entry: entry}
	hangUp := func() {
		if !a.complete.Load() {
			p.canceled(entry)
		}
	}
	stop := context.AfterFunc(r.Context(), hangUp)
	defer func() {
		// The server itself cancels the context after this handler only; until
		// then it means the client, even if hangUp has not come to run.
		if stop() && r.Context().Err() != nil {
			hangUp()
		}
		p.e.calls.update(entry, func(q *Request) { q.Finished = time.Now() })
	}()
	script, err := parseScript(r.Header.Values("Emulate"))
	if err != nil {
		a.send(script, jsonResponse(http.StatusBadRequest, object{{"message", err.Error()}}))
		return
	}
	c := &call{partner: p.partner, api: p, r: r}
	if !script.noRead {
		if err := p.read(c, entry); err != nil {
			p.canceled(entry)
			panic(http.ErrAbortHandler)
		}
	}
	if script.earlyHints {
		w.Header().Set("Link", "</v1/customers>; rel=preload")
		w.WriteHeader(http.StatusEarlyHints)
		w.Header().Del("Link")
	}
	a.pause(script.stall)
	res := p.answer(c, script)
	p.common(c, &res)
	a.send(script, res)
}

// answer decides what c gets.
func (p *api) answer(c *call, s script) response {
	n := p.served.Add(1)
	failure := p.authenticate(c)
	if failure == nil && c.claims != nil && p == p.center {
		p.note(c) // the Security APIs tell of no other
	}
	switch {
	case s.refuse >= 0:
		return p.refusal(c, s.refuse)
	case s.code != "":
		return partnerError(codeStatus[s.code], s.code, "The emulator was asked for code "+s.code+".")
	case s.status != 0:
		return p.statusResponse(s.status)
	case s.body >= 0:
		return streamResponse("application/octet-stream", p.e.Large(s.body), s.body)
	case p.e.cfg.ThrottleEvery > 0 && n%int64(p.e.cfg.ThrottleEvery) == 0:
		res := statusResponse(http.StatusTooManyRequests)
		res.header["Retry-After"] = []string{"2"}
		return res
	case failure != nil:
		return *failure
	}
	route, params, known := p.match(c.r)
	switch {
	case !known:
		return p.errorResponse(http.StatusNotFound, "404", "The requested resource was not found.")
	case route == nil:
		return p.errorResponse(http.StatusMethodNotAllowed, "405", "The requested resource does not support http method '"+c.r.Method+"'.")
	case route.userOnly && appOnly(c.claims):
		return p.errorResponse(http.StatusForbidden, "900329", "The resource does not support application-only authentication.")
	case !appOnly(c.claims) && !mfaCompliant(c.claims) &&
		p.exposure.refuse(clientID(c.claims), claim(c.claims, "oid")):
		return p.refusal(c, p.refusalShape())
	}
	c.params = params
	return route.handle(c)
}

// read takes in the request's body, keeps its beginning and hashes all of it.
func (p *partner) read(c *call, entry *Request) error {
	hash := sha256.New()
	buf := make([]byte, 32<<10)
	for {
		n, err := c.r.Body.Read(buf)
		if n > 0 {
			hash.Write(buf[:n])
			c.size += int64(n)
			if keep := min(n, maxKeptBody-len(c.body)); keep > 0 {
				c.body = append(c.body, buf[:keep]...)
			}
			p.e.calls.update(entry, func(q *Request) { q.BodyBytes = c.size })
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
	}
	c.sum = hex.EncodeToString(hash.Sum(nil))
	trailer := c.r.Trailer.Clone()
	p.e.calls.update(entry, func(q *Request) { q.BodySHA256, q.Trailer = c.sum, trailer })
	return nil
}

func (p *partner) canceled(entry *Request) {
	p.e.calls.update(entry, func(q *Request) {
		if !q.Canceled {
			q.Canceled, q.CanceledAt = true, time.Now()
		}
	})
}

// common adds the headers of every answer. Their spelling is the API's.
func (p *api) common(c *call, res *response) {
	echo := func(name string) string {
		if v := c.r.Header.Get(name); v != "" {
			return v
		}
		return uuid.NewString()
	}
	add := func(name, value string) {
		if res.header[name] == nil {
			res.header[name] = []string{value}
		}
	}
	if p != p.center {
		add("request-id", uuid.NewString())
		add("client-request-id", echo("client-request-id"))
		add("Strict-Transport-Security", "max-age=31536000")
		if p == p.graph {
			add("x-ms-ags-diagnostic", `{"ServerInfo":{"DataCenter":"West Europe","Slice":"E","Ring":"5","ScaleUnit":"001","RoleInstance":"AM4PEPF00000001"}}`)
		}
		return
	}
	add("MS-RequestId", echo("MS-RequestId"))
	add("MS-CorrelationId", echo("MS-CorrelationId"))
	add("MS-CV", randomText(16)+".0")
	add("MS-ServerId", "202010406")
	add("Request-Context", "appId=cid-v1:0d1e2f3a-aaaa-4bbb-8ccc-123456789abc")
	add("X-Locale", "en-US")
	if c.claims != nil && !appOnly(c.claims) && strings.EqualFold(c.r.Header.Get("ValidateMfa"), "true") {
		add("isMfaCompliant", strconv.FormatBool(mfaCompliant(c.claims)))
	}
}

// authenticate fills c.claims, or returns the answer to a token that the API does
// not take.
func (p *api) authenticate(c *call) *response {
	fail := func(code, text string) *response {
		res := p.unauthorized(code, text)
		return &res
	}
	values := c.r.Header.Values("Authorization")
	scheme, token := "", ""
	if len(values) > 0 {
		scheme, token, _ = strings.Cut(values[0], " ")
	}
	if !strings.EqualFold(scheme, "Bearer") || strings.TrimSpace(token) == "" {
		return fail("800001", "The partner token is missing in the request context.")
	}
	c.token = strings.TrimSpace(token)
	claims, err := p.claimsOf(c.token)
	if err != nil {
		return fail("400", "Access denied. "+err.Error())
	}
	now := time.Now()
	exp, _ := claims["exp"].(float64)
	nbf, _ := claims["nbf"].(float64)
	switch {
	case now.Add(-clockSkew).Unix() >= int64(exp):
		return fail("", "Access token is expired.")
	case now.Add(clockSkew).Unix() < int64(nbf):
		return fail("", "Access token is not valid yet.")
	}
	audience := strings.TrimSuffix(claim(claims, "aud"), "/")
	tenant := claim(claims, "tid")
	iss := claim(claims, "iss")
	switch {
	case audience == AudienceLegacyGraph && p == p.center:
		return fail("900420", "The audience '"+claim(claims, "aud")+"' in the token is invalid and is no longer supported in Partner Center API.")
	case !slices.Contains(p.audiences, audience):
		return fail("", "Invalid Authorization header, incorrect audience")
	case !slices.Contains(p.e.cfg.Tenants, tenant) || iss != issuer(tenant, true) && iss != issuer(tenant, false):
		return fail("400", "Access denied. The issuer or tenant is not valid.")
	}
	c.claims = claims
	return nil
}

// claimsOf reads a token that Entra signed or that only the APIs can read.
func (p *partner) claimsOf(token string) (map[string]any, error) {
	p.mu.Lock()
	issued, ok := p.issued[token]
	p.mu.Unlock()
	if ok {
		return issued.claims, nil
	}
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return nil, errors.New("the token is malformed")
	}
	var raw [3][]byte
	for i, part := range parts {
		b, err := base64.RawURLEncoding.DecodeString(part)
		if err != nil {
			return nil, errors.New("the token is malformed")
		}
		raw[i] = b
	}
	var header struct{ Alg, Kid string }
	var claims map[string]any
	if json.Unmarshal(raw[0], &header) != nil || json.Unmarshal(raw[1], &claims) != nil || claims == nil {
		return nil, errors.New("the token is malformed")
	}
	key := p.e.keys.find(header.Kid)
	if header.Alg != "RS256" || key == nil {
		return nil, errors.New("the token's signing key is not known")
	}
	for _, h := range [][]byte{raw[0], hashNonce(raw[0])} {
		digest := sha256.Sum256([]byte(base64.RawURLEncoding.EncodeToString(h) + "." + parts[1]))
		if rsa.VerifyPKCS1v15(key, crypto.SHA256, digest[:], raw[2]) == nil {
			return claims, nil
		}
	}
	return nil, errors.New("the token's signature is not valid")
}

// issue registers a token that is no JWT and returns it.
func (p *partner) issue(token string, payload []byte) string {
	var claims map[string]any
	_ = json.Unmarshal(payload, &claims) // a raw payload may be anything; the token then fails
	exp, _ := claims["exp"].(float64)
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.issued) >= maxGrants {
		now := time.Now()
		for t, old := range p.issued {
			if now.After(old.expires) || len(p.issued) > 2*maxGrants {
				delete(p.issued, t)
			}
		}
	}
	p.issued[token] = issuedToken{claims, time.Unix(int64(exp), 0)}
	return token
}

// appOnly tells the kinds of token apart.
func appOnly(claims map[string]any) bool {
	if claim(claims, "idtyp") == "app" {
		return true
	}
	if _, user := claims["scp"]; user {
		return false
	}
	for _, name := range []string{"upn", "unique_name", "name"} {
		if claim(claims, name) != "" {
			return false
		}
	}
	oid := claim(claims, "oid")
	return oid != "" && oid == claim(claims, "sub")
}

// mfaCompliant reports whether a user's token proves MFA.
func mfaCompliant(claims map[string]any) bool {
	methods, _ := claims["amr"].([]any)
	return slices.Contains(methods, any("mfa")) || slices.Contains(methods, any("ngcmfa"))
}

// clientID is the app that asked for the token: appid in v1, azp in v2.
func clientID(claims map[string]any) string {
	if id := claim(claims, "appid"); id != "" {
		return id
	}
	return claim(claims, "azp")
}

func claim(claims map[string]any, name string) string {
	s, _ := claims[name].(string)
	return s
}

// guid derives a GUID that is the same at every start.
func guid(parts ...string) string {
	return uuid.NewSHA1(uuid.NameSpaceURL, []byte(strings.Join(parts, " "))).String()
}

// route is one documented operation. Segments are matched without case; a
// segment in braces matches anything, one that ends in * any continuation.
type route struct {
	method   string
	segments []string
	userOnly bool // app-only tokens get 900329
	handle   func(*call) response
}

func newRoute(method, path string, userOnly bool, handle func(*call) response) route {
	return route{method, strings.Split(strings.ToLower(strings.Trim(path, "/")), "/"), userOnly, handle}
}

// match finds the route of a request. known is true when another method of the
// path exists.
func (p *api) match(r *http.Request) (found *route, params []string, known bool) {
	var segments []string
	for s := range strings.SplitSeq(r.URL.EscapedPath(), "/") {
		if s == "" {
			continue // documented samples have //
		}
		if decoded, err := url.PathUnescape(s); err == nil {
			s = decoded
		}
		segments = append(segments, s)
	}
	for i := range p.routes {
		candidate := &p.routes[i]
		values, ok := candidate.params(segments)
		if !ok {
			continue
		}
		known = true
		if candidate.method == r.Method || candidate.method == http.MethodGet && r.Method == http.MethodHead {
			return candidate, values, true
		}
	}
	return nil, nil, known
}

func (t *route) params(segments []string) (values []string, ok bool) {
	if len(segments) != len(t.segments) {
		return nil, false
	}
	for i, pattern := range t.segments {
		switch prefix, open := strings.CutSuffix(pattern, "*"); {
		case strings.HasPrefix(pattern, "{"):
			values = append(values, segments[i])
		case open && strings.HasPrefix(strings.ToLower(segments[i]), prefix):
		case strings.EqualFold(pattern, segments[i]):
		default:
			return nil, false
		}
	}
	return values, true
}

// response is an answer before the Emulate header has had its say.
type response struct {
	status int
	// statusLine replaces what follows HTTP/1.1, for reason phrases of its own.
	statusLine string
	header     http.Header // spelt as it goes out
	body       []byte
	stream     io.Reader // instead of body
	length     int64     // of stream
	bom        bool
	chunked    bool // no Content-Length
}

func newResponse(status int, contentType string, body []byte) response {
	res := response{status: status, header: http.Header{}, body: body}
	if contentType != "" {
		res.header["Content-Type"] = []string{contentType}
	}
	return res
}

const contentJSON = "application/json; charset=utf-8"

func jsonResponse(status int, v any) response {
	return newResponse(status, contentJSON, mustJSON(v))
}

func streamResponse(contentType string, stream io.Reader, length int64) response {
	res := newResponse(http.StatusOK, contentType, nil)
	res.stream, res.length = stream, length
	return res
}

// partnerError is Partner Center's own error shape.
func partnerError(status int, code any, description string) response {
	return jsonResponse(status, object{
		{"code", code}, {"description", description}, {"data", []any{}}, {"source", "PartnerApiServiceControllers"},
	})
}

// gatewayError is the shape of the gateway in front.
func gatewayError(status int, message string) response {
	return jsonResponse(status, object{{"statusCode", status}, {"message", message}})
}

// statusResponse is a plausible answer of any status.
func statusResponse(status int) response {
	switch {
	case status == http.StatusNoContent || status == http.StatusNotModified:
		return newResponse(status, "", nil)
	case status == http.StatusTooManyRequests:
		return gatewayError(status, "Rate limit is exceeded. Try again in 57 seconds.")
	case status == http.StatusUnauthorized:
		return partnerError(status, "400", "Access denied.")
	case status == http.StatusForbidden:
		return partnerError(status, "20002", "There is no commerce relationship between the partner and the customer.")
	case status >= 400:
		return partnerError(status, strconv.Itoa(status), fmt.Sprintf("The emulator was asked for status %d.", status))
	}
	return jsonResponse(status, object{{"status", status}})
}
