package emulator

import (
	"fmt"
	"io"
	"strings"
)

// Recipe writes how to get a token of each kind with curl, and how to call the
// API with it: commands to paste into a POSIX shell, which need curl and sed only.
func (e *Emulator) Recipe(w io.Writer) error {
	var b strings.Builder
	tenant, api := e.cfg.Tenants[0], e.cfg.PublicPartnerURL
	if api == "" {
		api = e.PartnerURL()
	}
	const pick = ` | sed -n 's/.*"access_token":"\([^"]*\)".*/\1/p')`
	fmt.Fprintf(&b, "ENTRA=%s\nAPI=%s\n", e.entraURL, api)
	for _, app := range e.dir.apps {
		fmt.Fprintf(&b, "\n# %s: %s\n", app.Name, app.Purpose)
		form := []string{"grant_type=" + app.Grant, "client_id=" + app.ID, "resource=" + app.Resource}
		if app.Secret != "" {
			form = append(form, "client_secret="+app.Secret)
		}
		switch app.Grant {
		case "refresh_token":
			form = append(form, "refresh_token="+app.RefreshToken)
		case "password":
			user, _ := e.dir.user(app.User)
			form = append(form, "username="+user.UPN, "password="+user.Password)
		}
		fetch := "TOKEN=$(curl -sS $ENTRA/" + tenant + "/oauth2/token"
		for _, f := range form {
			fetch += " --data-urlencode '" + f + "'"
		}
		switch app.Name {
		case AppExpired, AppCertificate:
			// One cannot be asked for any more, the other needs a signed assertion.
			fmt.Fprintf(&b, "TOKEN=$(curl -sS -X POST \"$ENTRA/_emulator/mint?app=%s\")\n", app.Name)
		case AppOpaque:
			fmt.Fprintf(&b, "%s%s\n", fetch, pick)
			fmt.Fprintf(&b, "TOKEN=$(curl -sS $API/v3/generatetoken -H \"Authorization: Bearer $TOKEN\" -d grant_type=jwt_token%s\n", pick)
		default:
			fmt.Fprintf(&b, "%s%s\n", fetch, pick)
		}
	}
	fmt.Fprintf(&b, `
# a new sign-in, with or without MFA, gives a refresh token
curl -sS -X POST "$ENTRA/_emulator/signin?user=%s&app=%s&mfa=true"

# calls
curl -sS "$API/v1/customers?size=2" -H "Authorization: Bearer $TOKEN" -H "ValidateMfa: true" -i
curl -sS "$API/v1/invoices?size=2" -H "Authorization: Bearer $TOKEN" -H "Emulate: refuse=code-string" -i
`, e.dir.users[0].UPN, AppCompliant)
	app, _ := e.App(AppCompliant)
	for _, further := range []struct{ name, variable, url, audience, path string }{
		{"the Partner API", "PARTNER_API", e.cfg.PublicPartnerAPIURL, AudiencePartnerAPI, "/v1.0/engagements/referrals"},
		{"Graph", "GRAPH", e.cfg.PublicGraphURL, AudienceGraph, "/v1.0/tenantRelationships/delegatedAdminRelationships"},
	} {
		if further.url == "" {
			continue
		}
		fmt.Fprintf(&b, `
# %s takes tokens of its own only; the same refresh token gives them
%s=%s
TOKEN=$(curl -sS $ENTRA/%s/oauth2/token --data-urlencode 'grant_type=refresh_token' --data-urlencode 'client_id=%s' --data-urlencode 'client_secret=%s' --data-urlencode 'refresh_token=%s' --data-urlencode 'resource=%s'%s
curl -sS "$%s%s" -H "Authorization: Bearer $TOKEN" -i
`, further.name, further.variable, further.url, tenant, app.ID, app.Secret, app.RefreshToken, further.audience, pick, further.variable, further.path)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// Upstream is a further API in a configuration.
type Upstream struct {
	Name         string // PartnerAPI or Graph
	URL          string
	Hosts        []string // Host headers that choose it, besides URL's
	RewriteLinks bool     // links of its own host lead back through the guard
}

// ConfigYAML returns the configuration that points the guard at an emulator of
// DefaultTenant whose Entra and Partner Center are at these base URLs. The sample
// app under a client id of Microsoft's own is left out: such an id does not tell
// integrations apart. Further upstreams are in it only if named.
func ConfigYAML(entraURL, partnerURL string, further ...Upstream) string {
	var b strings.Builder
	fmt.Fprintf(&b, "version: 1\ntenants: [%s]\nmode: audit\nintegrations:\n", DefaultTenant)
	for _, app := range newDirectory(DefaultTenant, 0).apps {
		if app.Name == AppFirstParty {
			continue
		}
		fmt.Fprintf(&b, "  - name: %s # %s\n    owner: %s\n    match: {app_id: [%s]}\n", app.Name, app.Purpose, app.Owner, app.ID)
	}
	fmt.Fprintf(&b, "entra: {authority: %q}\nupstreams:\n  partner-center: {url: %q}\n", entraURL, partnerURL)
	for _, u := range further {
		fmt.Fprintf(&b, "  %s: {url: %q", u.Name, u.URL)
		if len(u.Hosts) > 0 {
			fmt.Fprintf(&b, ", hosts: [%s]", strings.Join(u.Hosts, ", "))
		}
		if u.RewriteLinks {
			b.WriteString(", rewrite_links: true")
		}
		b.WriteString("}\n")
	}
	return b.String()
}
