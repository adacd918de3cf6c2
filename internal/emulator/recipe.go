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
		api = e.partnerURL
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
	_, err := io.WriteString(w, b.String())
	return err
}

// ConfigYAML returns the configuration that points the guard at an emulator of
// DefaultTenant whose Entra and Partner Center are at these base URLs. The sample
// app under a client id of Microsoft's own is left out: such an id does not tell
// integrations apart.
func ConfigYAML(entraURL, partnerURL string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "version: 1\ntenants: [%s]\nmode: audit\nintegrations:\n", DefaultTenant)
	for _, app := range newDirectory(DefaultTenant, 0).apps {
		if app.Name == AppFirstParty {
			continue
		}
		fmt.Fprintf(&b, "  - name: %s # %s\n    owner: %s\n    match: {app_id: [%s]}\n", app.Name, app.Purpose, app.Owner, app.ID)
	}
	fmt.Fprintf(&b, "entra: {authority: %q}\nupstreams:\n  partner-center: {url: %q}\n", entraURL, partnerURL)
	return b.String()
}
