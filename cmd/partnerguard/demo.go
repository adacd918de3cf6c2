package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/partnerguard/partnerguard/internal/config"
	"github.com/partnerguard/partnerguard/internal/emulator"
	"github.com/partnerguard/partnerguard/telemetry"
	"github.com/spf13/cobra"
)

func newDemo(e environment) *cobra.Command {
	c := &cobra.Command{
		Use:   "demo",
		Short: "Emulator, guard and nine sample integrations in one process; a report at the end",
		Long: `See what the guard does, with nothing to set up: an emulated Microsoft, the guard in
audit mode, and nine integrations that call through it as real ones do: with a
compliant refresh token, a password grant, an old refresh token, a federated user,
app-only, an expired token, a token for another API, an opaque one, and one that
Microsoft refuses by turns. At the end the report says which of them would break,
whose they are, why, and what to do.`,
		Example: "  partnerguard demo --for 20s",
		Args:    cobra.NoArgs,
		RunE:    func(c *cobra.Command, _ []string) error { return demo(c, e) },
	}
	c.Flags().Duration("for", 0, "how long to run; 0 runs until interrupted")
	c.Flags().String("data-dir", "", "`DIR` to keep ledger and store in (default: a temporary directory, removed at the end)")
	return c
}

func demo(c *cobra.Command, e environment) error {
	length, _ := c.Flags().GetDuration("for")
	dir, _ := c.Flags().GetString("data-dir")
	if length < 0 {
		return usage(errors.New("--for is negative"), "write a duration such as 20s")
	}
	if dir == "" {
		var err error
		if dir, err = os.MkdirTemp("", "partnerguard-demo-"); err != nil {
			return failed(fmt.Errorf("create a data directory: %w", err), "give --data-dir")
		}
		defer os.RemoveAll(dir)
	} else if _, err := os.Stat(filepath.Join(dir, "ledger")); err == nil {
		// PARTNERGUARD_DATA_DIR may name the directory of a real guard.
		return usage(fmt.Errorf("there is a ledger in %s already, and sample calls do not belong in it", dir), "name a new directory with --data-dir")
	}
	em, err := emulator.Start(emulator.Config{Shape: emulator.ShapeMixed})
	if err != nil {
		return fmt.Errorf("start the emulator: %w", err)
	}
	defer em.Close()
	apps := em.Apps()[:9]
	for _, app := range apps {
		if app.Name == emulator.AppIntermittent {
			em.SetAppExposure(app.ID, 0.4)
		}
	}
	cfg, err := config.Parse("demo", []byte(emulator.ConfigYAML(em.EntraURL(), em.PartnerURL())))
	if err != nil {
		return err
	}
	cfg.Listeners = []config.Listener{{Address: "127.0.0.1:0", Upstream: config.PartnerCenter}}
	cfg.Admin.Address = "127.0.0.1:0"

	log := telemetry.NewCallLog(io.Discard, true)
	defer log.Close(context.Background())
	d, err := start(c.Context(), daemonConfig{load: func() (*config.Config, error) { return cfg, nil }, dir: dir, log: log, env: e.env})
	if err != nil {
		return err
	}
	guard := "http://" + d.servers[0].Address().String()
	fmt.Fprintf(e.out, "An emulated Microsoft, the guard in audit mode at %s (metrics at http://%s/metrics),\nand nine integrations that call through it:\n\n", guard, d.adminAt.Addr())

	ctx, cancel := c.Context(), context.CancelFunc(func() {})
	if length > 0 {
		ctx, cancel = context.WithTimeout(ctx, length)
	}
	defer cancel()
	var clients sync.WaitGroup
	var screen sync.Mutex
	for _, app := range apps {
		s := &sample{app: app, emulator: em, guard: guard + "/i/" + app.Name}
		clients.Go(func() {
			s.run(ctx, func(line string) {
				screen.Lock()
				defer screen.Unlock()
				fmt.Fprintf(e.out, "  %-19s %-63s %s\n", app.Name, app.Purpose, line)
			})
		})
	}
	<-ctx.Done()
	clients.Wait()
	if err := d.drain(); err != nil {
		return err
	}
	fmt.Fprintf(e.out, "\nThis is what partnerguard report says of them:\n\n")
	return printReport(context.Background(), e.out, reportOptions{store: storePlace{dir: dir}, by: "integration", format: "table", width: width(e.out)})
}

// sample is one sample integration: a client that fetches its token as such a
// client does and calls Partner Center through the guard.
type sample struct {
	app      emulator.App
	emulator *emulator.Emulator
	guard    string // base URL, /i/{name} included
}

// run calls until ctx ends, and tells say of the first call.
func (s *sample) run(ctx context.Context, say func(string)) {
	token, err := s.token(ctx)
	if err != nil {
		if ctx.Err() == nil {
			say("got no token: " + err.Error())
		}
		return
	}
	customer := s.emulator.Customers()[0]
	paths := []string{"/v1/customers?size=2", "/v1/invoices?size=2", "/v1/customers/" + customer + "/subscriptions", "/v1/products?country=DE&targetView=Azure"}
	tick := time.NewTicker(400 * time.Millisecond)
	defer tick.Stop()
	for n := 0; ; n++ {
		// A call that has begun ends, also when the demo does: the report would tell of a
		// client that went away.
		calling, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		status, err := s.call(calling, http.MethodGet, paths[n%len(paths)], token, nil)
		cancel()
		if n == 0 && err == nil {
			say(status)
		} else if n == 0 {
			say(err.Error())
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// token fetches the sample's bearer token.
func (s *sample) token(ctx context.Context) (string, error) {
	app := s.app
	if app.Name == emulator.AppExpired {
		return s.emulator.Token(app.Name) // nobody hands out expired ones
	}
	form := url.Values{"grant_type": {app.Grant}, "client_id": {app.ID}, "client_secret": {app.Secret}, "resource": {app.Resource}}
	switch app.Grant {
	case "refresh_token":
		form.Set("refresh_token", app.RefreshToken)
	case "password":
		for _, u := range s.emulator.Users() {
			if u.UPN == app.User {
				form.Set("username", u.UPN)
				form.Set("password", u.Password)
			}
		}
	}
	token, err := accessToken(ctx, s.emulator.EntraURL()+"/"+emulator.DefaultTenant+"/oauth2/token", "", form)
	if err == nil && app.Name == emulator.AppOpaque {
		return accessToken(ctx, s.guard+"/v3/generatetoken", token, url.Values{"grant_type": {"jwt_token"}})
	}
	return token, err
}

func accessToken(ctx context.Context, endpoint, bearer string, form url.Values) (string, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, endpoint, strings.NewReader(form.Encode()))
	if err != nil {
		return "", err
	}
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	if bearer != "" {
		r.Header.Set("Authorization", "Bearer "+bearer)
	}
	res, err := http.DefaultClient.Do(r)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		return "", err
	}
	var answer struct {
		AccessToken string `json:"access_token"`
	}
	err = json.Unmarshal([]byte(strings.TrimPrefix(string(body), "\ufeff")), &answer)
	if err != nil || answer.AccessToken == "" {
		return "", fmt.Errorf("no access token in the answer of %s: %s", r.URL.Path, res.Status)
	}
	return answer.AccessToken, nil
}

// call makes one call through the guard and returns the status line.
func (s *sample) call(ctx context.Context, method, path, token string, body io.Reader) (string, error) {
	r, err := http.NewRequestWithContext(ctx, method, s.guard+path, body)
	if err != nil {
		return "", err
	}
	r.Header.Set("Authorization", "Bearer "+token)
	r.Header.Set("MS-PartnerCenter-Application", s.app.Name)
	res, err := http.DefaultClient.Do(r)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	io.Copy(io.Discard, res.Body)
	return res.Status, nil
}
