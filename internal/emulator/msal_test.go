package emulator

import (
	"context"
	"net"
	"net/http"
	"strings"
	"testing"

	"github.com/AzureAD/microsoft-authentication-library-for-go/apps/confidential"
)

func TestMSALAcquiresAnAppOnlyToken(t *testing.T) {
	e := start(t, Config{})
	app, _ := e.App(AppOnly)
	redirected := client(t, e, false)
	redirected.Transport.(*http.Transport).DialContext = func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, strings.TrimPrefix(e.EntraTLSURL(), "https://"))
	}
	tests := []struct {
		name      string
		authority string
		options   []confidential.Option
	}{
		{"by address, without instance discovery", e.EntraTLSURL(),
			[]confidential.Option{confidential.WithHTTPClient(client(t, e, false)), confidential.WithInstanceDiscovery(false)}},
		{"by Microsoft's name, with instance discovery", "https://login.microsoftonline.com",
			[]confidential.Option{confidential.WithHTTPClient(redirected)}},
		{"by address, with instance discovery at Microsoft's name", e.EntraTLSURL(),
			[]confidential.Option{confidential.WithHTTPClient(redirected)}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			secret, err := confidential.NewCredFromSecret(app.Secret)
			if err != nil {
				t.Fatal(err)
			}
			c, err := confidential.New(tt.authority+"/"+DefaultTenant, app.ID, secret, tt.options...)
			if err != nil {
				t.Fatal(err)
			}
			result, err := c.AcquireTokenByCredential(t.Context(), []string{AudiencePartnerCenter + "/.default"})
			if err != nil {
				t.Fatal(err)
			}
			if res := do(t, e, "GET", e.PartnerTLSURL()+"/v1/customers", "", bearer(result.AccessToken)); res.status != 200 {
				t.Errorf("call with the token = %d %s", res.status, res.body)
			}
		})
	}
}
