package emulator

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
)

// tokenLifetime is what Partner Center's user tokens were seen to live.
const tokenLifetime = 65 * time.Minute

// partnerDomain is the verified domain by which the first tenant answers, too.
const partnerDomain = "contoso-partner.example"

// serveEntra answers for login.microsoftonline.com.
func (e *Emulator) serveEntra(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("X-Ms-Request-Id", uuid.NewString())
	switch strings.ToLower(r.URL.Path) {
	case "/_emulator/signin":
		e.serveSignIn(w, r)
		return
	case "/_emulator/mint":
		e.serveMint(w, r)
		return
	case "/common/discovery/instance":
		e.serveInstance(w, r)
		return
	}
	name, endpoint, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
	tenant, ok := e.tenant(name)
	if !ok {
		e.entraError(w, entraErr(http.StatusBadRequest, "invalid_tenant", 90002,
			"Tenant '%s' not found. Check to make sure you have the correct tenant ID and are signing into the correct cloud.", name))
		return
	}
	endpoint = strings.ToLower(endpoint)
	v2 := strings.Contains(endpoint, "v2.0")
	method := http.MethodGet
	if strings.HasSuffix(endpoint, "token") {
		method = http.MethodPost
	}
	if r.Method != method && (method != http.MethodGet || r.Method != http.MethodHead) {
		e.entraError(w, entraErr(http.StatusMethodNotAllowed, "invalid_request", 900561,
			"The endpoint only accepts %s requests. Received a %s request.", method, r.Method))
		return
	}
	switch endpoint {
	case ".well-known/openid-configuration", "v2.0/.well-known/openid-configuration":
		e.serveMetadata(w, r, name, tenant, v2)
	case "discovery/keys", "discovery/v2.0/keys":
		e.serveKeys(w, r, tenant, v2)
	case "oauth2/token", "oauth2/v2.0/token":
		e.serveToken(w, r, tenant, v2)
	default:
		http.NotFound(w, r)
	}
}

// tenant resolves the first path segment: a GUID or the domain of a configured
// tenant, or one of the tenant-independent names, for which id is empty.
func (e *Emulator) tenant(name string) (id string, ok bool) {
	switch name = strings.ToLower(name); name {
	case "common", "organizations":
		return "", true
	case partnerDomain:
		return e.cfg.Tenants[0], true
	}
	for _, t := range e.cfg.Tenants {
		if strings.EqualFold(t, name) {
			return t, true
		}
	}
	return "", false
}

// ownURL is the base URL by which the client reached this listener.
func ownURL(r *http.Request) string {
	if r.TLS != nil {
		return "https://" + r.Host
	}
	return "http://" + r.Host
}

// serveMetadata answers a discovery document. Endpoints point at the emulator;
// the issuer is the global cloud's.
func (e *Emulator) serveMetadata(w http.ResponseWriter, r *http.Request, name, tenant string, v2 bool) {
	issuerTenant := tenant
	if tenant == "" {
		issuerTenant = "{tenantid}"
	}
	base, version := ownURL(r)+"/"+name, ""
	if v2 {
		version = "/v2.0"
	}
	doc := object{
		{"token_endpoint", base + "/oauth2" + version + "/token"},
		{"token_endpoint_auth_methods_supported", []string{"client_secret_post", "private_key_jwt", "client_secret_basic"}},
		{"jwks_uri", base + "/discovery" + version + "/keys"},
		{"response_modes_supported", []string{"query", "fragment", "form_post"}},
		{"subject_types_supported", []string{"pairwise"}},
		{"id_token_signing_alg_values_supported", []string{"RS256"}},
		{"response_types_supported", []string{"code", "id_token", "code id_token", "id_token token"}},
		{"scopes_supported", []string{"openid", "profile", "email", "offline_access"}},
		{"issuer", issuer(issuerTenant, !v2)},
		{"authorization_endpoint", base + "/oauth2" + version + "/authorize"},
		{"claims_supported", []string{"sub", "iss", "aud", "exp", "iat", "amr", "nonce", "email", "given_name", "family_name"}},
		{"tenant_region_scope", "EU"},
		{"cloud_instance_name", "microsoftonline.com"},
		{"cloud_graph_host_name", "graph.windows.net"},
		{"msgraph_host", "graph.microsoft.com"},
	}
	if tenant == "" {
		doc.set("tenant_region_scope", nil)
	}
	w.Header().Set("Cache-Control", "private, max-age=86400")
	writeJSON(w, http.StatusOK, doc)
}

// serveInstance answers MSAL's instance discovery: the names that stand for one
// cloud. See https://learn.microsoft.com/entra/msal/.
func (e *Emulator) serveInstance(w http.ResponseWriter, r *http.Request) {
	endpoint, err := url.Parse(r.URL.Query().Get("authorization_endpoint"))
	if err != nil || endpoint.Host == "" {
		e.entraError(w, entraErr(http.StatusBadRequest, "invalid_instance", 50049, "Unknown or invalid instance."))
		return
	}
	name, _, _ := strings.Cut(strings.TrimPrefix(endpoint.Path, "/"), "/")
	writeJSON(w, http.StatusOK, object{
		{"tenant_discovery_endpoint", ownURL(r) + "/" + name + "/v2.0/.well-known/openid-configuration"},
		{"api-version", "1.1"},
		{"metadata", []object{
			{
				{"preferred_network", "login.microsoftonline.com"},
				{"preferred_cache", "login.windows.net"},
				{"aliases", []string{"login.microsoftonline.com", "login.windows.net", "login.microsoft.com", "sts.windows.net"}},
			},
			{
				{"preferred_network", endpoint.Host},
				{"preferred_cache", endpoint.Host},
				{"aliases", []string{endpoint.Host}},
			},
		}},
	})
}

// tokenRequest is what a token endpoint was asked, and by whom.
type tokenRequest struct {
	form     url.Values
	tenant   string
	v2       bool
	app      App
	acr      string // how the app proved itself: 0 not at all, 1 secret, 2 assertion
	resource string
}

// serveToken answers the v1 and v2 token endpoints.
func (e *Emulator) serveToken(w http.ResponseWriter, r *http.Request, tenant string, v2 bool) {
	r.Body = http.MaxBytesReader(w, r.Body, 1<<20)
	if err := r.ParseForm(); err != nil {
		e.entraError(w, entraErr(http.StatusBadRequest, "invalid_request", 900144, "The request body could not be read."))
		return
	}
	answer, err := e.token(&tokenRequest{form: r.PostForm, tenant: tenant, v2: v2})
	if err != nil {
		e.entraError(w, err)
		return
	}
	w.Header().Set("Cache-Control", "no-store, no-cache")
	w.Header().Set("Pragma", "no-cache")
	writeJSON(w, http.StatusOK, answer)
}

func (e *Emulator) token(q *tokenRequest) (object, *entraFailure) {
	if err := e.authenticateApp(q); err != nil {
		return nil, err
	}
	grantType := q.form.Get("grant_type")
	if grantType == "" {
		return nil, missingParameter("grant_type")
	}
	resource, err := q.readResource(grantType)
	if err != nil {
		return nil, err
	}
	q.resource = resource
	switch grantType {
	case "client_credentials":
		if q.acr == "0" {
			return nil, entraErr(http.StatusUnauthorized, "invalid_client", 7000218,
				"The request body must contain the following parameter: 'client_assertion' or 'client_secret'.")
		}
		if q.tenant == "" {
			return nil, entraErr(http.StatusBadRequest, "invalid_request", 50059,
				"No tenant-identifying information found in either the request or implied by any provided credentials.")
		}
		return e.tokenAnswer(q, nil, nil), nil
	case "password":
		user, ok := e.dir.user(q.form.Get("username"))
		switch {
		case !ok:
			return nil, entraErr(http.StatusBadRequest, "invalid_grant", 50034,
				"The user account %s does not exist in the %s directory.", q.form.Get("username"), e.cfg.Tenants[0])
		case q.form.Get("password") != user.Password:
			return nil, entraErr(http.StatusBadRequest, "invalid_grant", 50126,
				"Error validating credentials due to invalid username or password.")
		case user.RequiresMFA:
			failure := entraErr(http.StatusBadRequest, "invalid_grant", 50076,
				"Due to a configuration change made by your administrator, or because you moved to a new location, "+
					"you must use multi-factor authentication to access '%s'.", AudiencePartnerCenterGUID)
			failure.suberror = "basic_action"
			return nil, failure
		}
		return e.tokenAnswer(q, &user, user.AMR), nil
	case "refresh_token":
		g, ok := e.dir.grant(q.form.Get("refresh_token"))
		switch {
		case !ok:
			return nil, entraErr(http.StatusBadRequest, "invalid_grant", 9002313,
				"Invalid request. Request is malformed or invalid.")
		case !strings.EqualFold(g.appID, q.app.ID):
			return nil, entraErr(http.StatusBadRequest, "invalid_grant", 70000,
				"Provided grant is invalid or malformed. The refresh token was issued to another client.")
		case time.Now().After(g.expires):
			return nil, entraErr(http.StatusBadRequest, "invalid_grant", 700082,
				"The refresh token has expired due to inactivity. The token was issued on %s and was inactive for 90.00:00:00.",
				g.expires.Add(-refreshLifetime).UTC().Format("2006-01-02T15:04:05.0000000Z"))
		}
		user, _ := e.dir.user(g.upn)
		return e.tokenAnswer(q, &user, g.amr), nil
	}
	return nil, entraErr(http.StatusBadRequest, "unsupported_grant_type", 70003,
		"The app requested an unsupported grant type '%s'.", grantType)
}

// authenticateApp fills q.app and q.acr.
func (e *Emulator) authenticateApp(q *tokenRequest) *entraFailure {
	id := q.form.Get("client_id")
	if id == "" {
		return missingParameter("client_id")
	}
	app, ok := e.dir.appByID(id)
	if !ok {
		return entraErr(http.StatusBadRequest, "unauthorized_client", 700016,
			"Application with identifier '%s' was not found in the directory 'Contoso'.", id)
	}
	q.app, q.acr = app, "0"
	secret, assertion := q.form.Get("client_secret"), q.form.Get("client_assertion")
	switch {
	case assertion != "":
		if !validAssertion(assertion, app.ID) {
			return entraErr(http.StatusUnauthorized, "invalid_client", 700027,
				"The certificate with identifier used to sign the client assertion is not registered on application.")
		}
		q.acr = "2"
	case app.Name == AppFirstParty && secret != "":
		return entraErr(http.StatusUnauthorized, "invalid_client", 700025,
			"Client is public so neither 'client_assertion' nor 'client_secret' should be presented.")
	case app.Name == AppFirstParty:
	case secret == "":
		return entraErr(http.StatusUnauthorized, "invalid_client", 7000218,
			"The request body must contain the following parameter: 'client_assertion' or 'client_secret'.")
	case secret != app.Secret:
		return entraErr(http.StatusUnauthorized, "invalid_client", 7000215,
			"Invalid client secret provided. Ensure the secret being sent in the request is the client secret value, "+
				"not the client secret ID, for a secret added to app '%s'.", app.ID)
	default:
		q.acr = "1"
	}
	return nil
}

// validAssertion looks at the claims only: whose certificate signed is not
// something that an emulator needs to know.
func validAssertion(assertion, clientID string) bool {
	parts := strings.Split(assertion, ".")
	if len(parts) != 3 {
		return false
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return false
	}
	var claims struct {
		Iss, Sub string
		Exp      int64
	}
	return json.Unmarshal(payload, &claims) == nil &&
		strings.EqualFold(claims.Iss, clientID) && claims.Iss == claims.Sub && time.Now().Unix() < claims.Exp
}

// readResource returns the audience to issue for, exactly as the client spelt it.
func (q *tokenRequest) readResource(grantType string) (string, *entraFailure) {
	resource := q.form.Get("resource")
	if q.v2 {
		for _, scope := range strings.Fields(q.form.Get("scope")) {
			switch scope {
			case "openid", "profile", "email", "offline_access":
				continue
			}
			if i := strings.LastIndexByte(scope, '/'); i > 0 {
				resource = scope[:i]
			}
			break
		}
		if resource == "" && grantType == "client_credentials" {
			return "", missingParameter("scope")
		}
	} else if resource == "" && grantType == "client_credentials" {
		return "", missingParameter("resource")
	}
	if resource == "" {
		return q.app.Resource, nil // a refresh token remembers what it was minted for
	}
	known := []string{
		AudiencePartnerCenter, AudiencePartnerCenterGUID, AudiencePartnerAPI, AudienceGraph, AudienceLegacyGraph,
		AudienceGraphGUID, AudiencePartnerAPIGUID,
	}
	if !slices.Contains(known, strings.TrimSuffix(resource, "/")) {
		return "", entraErr(http.StatusBadRequest, "invalid_resource", 500011,
			"The resource principal named %s was not found in the tenant named Contoso.", resource)
	}
	return resource, nil
}

// tokenAnswer issues the tokens; user is nil in an app-only grant.
func (e *Emulator) tokenAnswer(q *tokenRequest, user *User, amr []string) object {
	tenant := q.tenant
	if tenant == "" {
		tenant = e.cfg.Tenants[0] // the users' home
	}
	now := time.Now()
	spec := TokenSpec{
		Tenant: tenant, Audience: q.resource, AppID: q.app.ID, AppOnly: user == nil,
		IssuedAt: now, Expires: now.Add(tokenLifetime), Extra: map[string]any{"appidacr": q.acr},
	}
	if user != nil {
		spec.UPN, spec.AMR = user.UPN, amr
	}
	answer := object{{"token_type", "Bearer"}}
	seconds := int64(tokenLifetime / time.Second)
	if q.v2 {
		if user != nil {
			answer.set("scope", q.resource+"/"+strings.ReplaceAll(scopes(q.resource), " ", " "+q.resource+"/")+" "+q.resource+"/.default")
		}
		answer.set("expires_in", seconds)
		answer.set("ext_expires_in", seconds)
	} else {
		if user != nil {
			answer.set("scope", scopes(q.resource))
		}
		answer.set("expires_in", strconv.FormatInt(seconds, 10))
		answer.set("ext_expires_in", strconv.FormatInt(seconds, 10))
		answer.set("expires_on", strconv.FormatInt(now.Unix()+seconds, 10))
		answer.set("not_before", strconv.FormatInt(now.Unix(), 10))
		answer.set("resource", q.resource)
	}
	answer.set("access_token", e.issueToken(spec))
	if user == nil {
		return answer
	}
	// Sliding: every use returns a new refresh token, and the old one lives on.
	answer.set("refresh_token", e.dir.remember(grant{q.app.ID, user.UPN, amr, now.Add(refreshLifetime)}))
	if slices.Contains(strings.Fields(q.form.Get("scope")), "openid") {
		id := spec
		id.Audience = q.app.ID
		if q.v2 {
			id.Version = "2.0"
		}
		id.Omit = []string{"scp"}
		answer.set("id_token", e.Mint(id))
	}
	if q.v2 {
		info := mustJSON(object{{"uid", user.ObjectID}, {"utid", tenant}})
		answer.set("client_info", base64.RawURLEncoding.EncodeToString(info))
	}
	return answer
}

// serveSignIn stands for the interactive sign-in with consent:
// POST /_emulator/signin?user=UPN&app=ID-or-name&mfa=true. It returns a refresh
// token with the sign-in's methods, and with expired=true one that has expired.
func (e *Emulator) serveSignIn(w http.ResponseWriter, r *http.Request) {
	query := r.URL.Query()
	app, ok := e.App(query.Get("app"))
	if !ok {
		app, ok = e.dir.appByID(query.Get("app"))
	}
	user, known := e.dir.user(query.Get("user"))
	mfa, err := strconv.ParseBool(query.Get("mfa"))
	switch {
	case r.Method != http.MethodPost:
		e.entraError(w, entraErr(http.StatusMethodNotAllowed, "invalid_request", 900561, "The endpoint only accepts POST requests."))
		return
	case !ok:
		e.entraError(w, entraErr(http.StatusBadRequest, "unauthorized_client", 700016,
			"Application with identifier '%s' was not found.", query.Get("app")))
		return
	case !known:
		e.entraError(w, entraErr(http.StatusBadRequest, "invalid_grant", 50034,
			"The user account %s does not exist.", query.Get("user")))
		return
	case err != nil:
		e.entraError(w, entraErr(http.StatusBadRequest, "invalid_request", 900144, "mfa must be true or false."))
		return
	}
	expires := time.Now().Add(refreshLifetime)
	if query.Get("expired") == "true" {
		expires = time.Now().Add(-24 * time.Hour)
	}
	amr := user.methods(mfa)
	writeJSON(w, http.StatusOK, object{
		{"refresh_token", e.dir.remember(grant{app.ID, user.UPN, amr, expires})},
		{"amr", amr},
	})
}

// serveMint hands out the token that a sample integration sends, as plain text:
// POST /_emulator/mint?app=NAME. It is the only way to some of them, such as the
// expired one.
func (e *Emulator) serveMint(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodPost {
		http.Error(w, "use POST", http.StatusMethodNotAllowed)
		return
	}
	token, err := e.Token(r.URL.Query().Get("app"))
	if err != nil {
		http.Error(w, err.Error(), http.StatusNotFound)
		return
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	_, _ = io.WriteString(w, token)
}

// entraFailure is an error of Entra's token endpoint.
type entraFailure struct {
	status      int
	code        string // OAuth error code
	number      int    // AADSTS number
	description string
	suberror    string
}

func entraErr(status int, code string, number int, format string, args ...any) *entraFailure {
	return &entraFailure{status: status, code: code, number: number, description: fmt.Sprintf(format, args...)}
}

func missingParameter(name string) *entraFailure {
	return entraErr(http.StatusBadRequest, "invalid_request", 900144,
		"The request body must contain the following parameter: '%s'.", name)
}

func (e *Emulator) entraError(w http.ResponseWriter, f *entraFailure) {
	trace, correlation := uuid.NewString(), uuid.NewString()
	now := time.Now().UTC().Format("2006-01-02 15:04:05Z")
	body := object{
		{"error", f.code},
		{"error_description", fmt.Sprintf("AADSTS%d: %s Trace ID: %s Correlation ID: %s Timestamp: %s",
			f.number, f.description, trace, correlation, now)},
		{"error_codes", []int{f.number}},
		{"timestamp", now},
		{"trace_id", trace},
		{"correlation_id", correlation},
		{"error_uri", fmt.Sprintf("https://login.microsoftonline.com/error?code=%d", f.number)},
	}
	if f.suberror != "" {
		body.set("suberror", f.suberror)
	}
	writeJSON(w, f.status, body)
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.WriteHeader(status)
	_, _ = w.Write(mustJSON(v))
}
