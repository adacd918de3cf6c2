package emulator

import (
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"strings"
	"sync"
	"time"
)

// The names of the sample integrations, each with its own app.
const (
	AppCompliant    = "nightly-billing"    // Secure Application Model, MFA at consent
	AppPassword     = "license-sync"       // password grant, cannot do MFA
	AppOldRefresh   = "order-import"       // refresh token minted before MFA was required
	AppFederated    = "helpdesk-portal"    // federated user whose identity provider asserts no MFA
	AppOnly         = "usage-export"       // app-only
	AppExpired      = "stale-cache"        // sends a token that expired hours ago
	AppWrongAud     = "price-watch"        // asks for graph.windows.net
	AppOpaque       = "sdk-reseller"       // exchanges its token at /generatetoken
	AppIntermittent = "subscription-audit" // no MFA, refused by turns
	AppGuest        = "guest-support"      // guest user with MFA at home
	AppCertificate  = "device-rollout"     // app-only with a client assertion
	AppFirstParty   = "admin-scripts"      // one of Microsoft's own client ids, password grant
)

// App is a registered client.
type App struct {
	Name         string // of the sample integration
	Purpose      string // what it stands for, in one line
	Owner        string // mail address
	ID           string // client id
	ObjectID     string // of its service principal
	Secret       string // empty: a public client, or one with a certificate
	Grant        string // the grant that the sample uses
	Resource     string // what it asks a token for
	User         string // UPN; empty when app-only
	MFA          bool   // the sign-in behind RefreshToken had MFA
	RefreshToken string // set when Grant is refresh_token
}

// User is a user of the partner tenant.
type User struct {
	UPN       string
	Password  string
	ObjectID  string
	Name      string
	GivenName string
	// FamilyName, like GivenName, goes into v1 tokens.
	FamilyName string
	IPAddress  string
	AMR        []string // methods of a sign-in without MFA
	MFAAMR     []string // methods of a sign-in with MFA
	IDP        string   // identity provider of a guest; empty for members

	// RequiresMFA makes the password grant fail with AADSTS50076, as
	// Conditional Access does.
	RequiresMFA bool
}

// Apps returns the registered sample clients; the first nine are those of the demo.
func (e *Emulator) Apps() []App { return append([]App(nil), e.dir.apps...) }

// Users returns the sample users.
func (e *Emulator) Users() []User { return append([]User(nil), e.dir.users...) }

// App returns the sample client of that name.
func (e *Emulator) App(name string) (App, bool) {
	for _, a := range e.dir.apps {
		if a.Name == name {
			return a, true
		}
	}
	return App{}, false
}

// Token mints the bearer token that the sample integration of that name sends.
func (e *Emulator) Token(name string) (string, error) {
	app, ok := e.App(name)
	if !ok {
		return "", fmt.Errorf("mint token: no sample integration %q", name)
	}
	spec := TokenSpec{AppID: app.ID, Audience: app.Resource, UPN: app.User, AppOnly: app.User == ""}
	if user, ok := e.dir.user(app.User); ok {
		spec.AMR = user.methods(app.MFA)
	}
	switch name {
	case AppCertificate:
		spec.Extra = map[string]any{"appidacr": "2"}
	case AppExpired:
		spec.IssuedAt = time.Now().Add(-4 * time.Hour)
	case AppOpaque:
		spec.Opaque = true
	}
	return e.issueToken(spec), nil
}

// grant is what a refresh token stands for.
type grant struct {
	appID   string
	upn     string
	amr     []string
	expires time.Time
}

// directory holds the apps, the users and the refresh tokens of a tenant.
type directory struct {
	tenant string
	apps   []App  // never changed
	users  []User // never changed

	mu     sync.Mutex
	grants map[string]grant
}

// refreshLifetime is the default of confidential clients; it slides.
const refreshLifetime = 90 * 24 * time.Hour

func newDirectory(tenant string, seed uint64) *directory {
	const domain = "@contoso-partner.example"
	d := &directory{
		tenant: tenant,
		grants: map[string]grant{},
		users: []User{
			{UPN: "sam" + domain, ObjectID: "5f0e6c7a-2222-4d3b-9a55-0c1d2e3f4a5b", GivenName: "Sam", FamilyName: "Agent",
				IPAddress: "203.0.113.24", AMR: []string{"pwd"}, MFAAMR: []string{"pwd", "mfa"}, RequiresMFA: true},
			{UPN: "svc-sync" + domain, ObjectID: "a3c1d5e7-1111-4b2c-8d3e-000000000002", GivenName: "Sync", FamilyName: "Service",
				IPAddress: "203.0.113.31", AMR: []string{"pwd"}, MFAAMR: []string{"pwd", "mfa"}},
			{UPN: "svc-orders" + domain, ObjectID: "a3c1d5e7-1111-4b2c-8d3e-000000000003", GivenName: "Orders", FamilyName: "Service",
				IPAddress: "203.0.113.32", AMR: []string{"pwd"}, MFAAMR: []string{"rsa", "mfa"}},
			{UPN: "helpdesk" + domain, ObjectID: "a3c1d5e7-1111-4b2c-8d3e-000000000004", GivenName: "Help", FamilyName: "Desk",
				IPAddress: "203.0.113.33", AMR: []string{"fed"}, MFAAMR: []string{"fed", "mfa"}},
			{UPN: "svc-audit" + domain, ObjectID: "a3c1d5e7-1111-4b2c-8d3e-000000000005", GivenName: "Audit", FamilyName: "Service",
				IPAddress: "203.0.113.34", AMR: []string{"rsa"}, MFAAMR: []string{"rsa", "mfa"}},
			{UPN: "kim@fabrikam.example", ObjectID: "c0ffee00-4444-4a4a-9b9b-121212121212", GivenName: "Kim", FamilyName: "Guest",
				IPAddress: "198.51.100.7", AMR: []string{"fed"}, MFAAMR: []string{"fed", "mfa"},
				IDP: "https://sts.windows.net/77aa66bb-1111-4222-8333-444455556666/"},
		},
		apps: []App{
			{Name: AppCompliant, ID: "7d1f0a52-9b3c-4c1e-8f60-2a5b9c0d1e11", Purpose: "Secure Application Model: refresh token from a consent with MFA",
				Owner: "billing@contoso.example", Grant: "refresh_token", User: "sam" + domain, MFA: true},
			{Name: AppPassword, ID: "2f9c4b18-5d7e-4a60-b3c2-7e1d8f5a9b02", Purpose: "password grant (ROPC), which cannot do MFA",
				Owner: "licensing@contoso.example", Grant: "password", User: "svc-sync" + domain},
			{Name: AppOldRefresh, ID: "3b8d5c29-6e8f-4b71-a4d3-8f2e9a6b0c03", Purpose: "refresh token minted before MFA was required",
				Owner: "orders@contoso.example", Grant: "refresh_token", User: "svc-orders" + domain},
			{Name: AppFederated, ID: "4c7e6d3a-7f90-4c82-95e4-903fab7c1d04", Purpose: "federated user whose identity provider asserts no MFA",
				Owner: "helpdesk@contoso.example", Grant: "refresh_token", User: "helpdesk" + domain},
			{Name: AppOnly, ID: "5d6f7e4b-80a1-4d93-86f5-a140bc8d2e05", Purpose: "app-only, exempt from MFA",
				Owner: "finance@contoso.example", Grant: "client_credentials"},
			{Name: AppExpired, ID: "6e5a8f5c-91b2-4ea4-9706-b251cd9e3f06", Purpose: "a cached token that expired hours ago",
				Owner: "reporting@contoso.example", Grant: "refresh_token", User: "sam" + domain, MFA: true},
			{Name: AppWrongAud, ID: "8f4b906d-a2c3-4fb5-8817-c362deaf4007", Purpose: "asks for graph.windows.net, refused with 900420",
				Owner: "pricing@contoso.example", Grant: "client_credentials", Resource: AudienceLegacyGraph},
			{Name: AppOpaque, ID: "903ca17e-b3d4-40c6-9928-d473efb05108", Purpose: "exchanges its token at /generatetoken",
				Owner: "integration@contoso.example", Grant: "refresh_token", User: "sam" + domain, MFA: true},
			{Name: AppIntermittent, ID: "a14db28f-c4e5-41d7-8a39-e584f0c16209", Purpose: "no MFA, refused with 900421 by turns",
				Owner: "audit@contoso.example", Grant: "refresh_token", User: "svc-audit" + domain},
			{Name: AppGuest, ID: "b25ec390-d5f6-42e8-9b4a-f69501d2730a", Purpose: "guest user with MFA in the home tenant",
				Owner: "support@contoso.example", Grant: "refresh_token", User: "kim@fabrikam.example", MFA: true},
			{Name: AppCertificate, ID: "c36fd4a1-e607-43f9-8c5b-07a612e3840b", Purpose: "app-only with a client assertion instead of a secret",
				Owner: "devices@contoso.example", Grant: "client_credentials"},
			{Name: AppFirstParty, ID: "04b07795-8ddb-461a-bbee-02f9e1bf7b46", Purpose: "scripts under a client id of Microsoft's own (Azure CLI)",
				Owner: "admins@contoso.example", Grant: "password", User: "svc-sync" + domain},
		},
	}
	for i := range d.users {
		u := &d.users[i]
		u.Name = u.GivenName + " " + u.FamilyName
		u.Password = "password-of-" + strings.Split(u.UPN, "@")[0]
	}
	for i := range d.apps {
		a := &d.apps[i]
		if a.Resource == "" {
			a.Resource = AudiencePartnerCenter
		}
		a.ObjectID = guid("service principal", a.ID)
		if a.Name != AppFirstParty && a.Name != AppCertificate {
			a.Secret = "secret-of-" + a.Name
		}
		if a.Grant == "refresh_token" {
			user, _ := d.user(a.User)
			// The same at every start, so that a script can keep it.
			sum := sha256.Sum256(fmt.Appendf(nil, "refresh token %d %s", seed, a.Name))
			a.RefreshToken = "0.AXoA" + base64.RawURLEncoding.EncodeToString(sum[:])
			d.grants[a.RefreshToken] = grant{a.ID, a.User, user.methods(a.MFA), time.Now().Add(refreshLifetime)}
		}
	}
	return d
}

func (u User) methods(mfa bool) []string {
	if mfa {
		return u.MFAAMR
	}
	return u.AMR
}

func (d *directory) appByID(id string) (App, bool) {
	for _, a := range d.apps {
		if strings.EqualFold(a.ID, id) {
			return a, true
		}
	}
	return App{}, false
}

func (d *directory) user(upn string) (User, bool) {
	for _, u := range d.users {
		if strings.EqualFold(u.UPN, upn) {
			return u, true
		}
	}
	return User{}, false
}

// remember stores g and returns its new refresh token.
func (d *directory) remember(g grant) string {
	token := "0.AXoA" + randomText(86)
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.grants) > maxGrants {
		for t := range d.grants { // an emulator that runs for days forgets some
			if !d.sample(t) {
				delete(d.grants, t)
			}
			if len(d.grants) <= maxGrants/2 {
				break
			}
		}
	}
	d.grants[token] = g
	return token
}

// maxGrants bounds the refresh tokens kept.
const maxGrants = 10_000

func (d *directory) sample(token string) bool {
	for _, a := range d.apps {
		if a.RefreshToken == token {
			return true
		}
	}
	return false
}

func (d *directory) grant(token string) (grant, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	g, ok := d.grants[token]
	return g, ok
}
