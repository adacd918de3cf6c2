package main

import (
	"bytes"
	"crypto/tls"
	"encoding/pem"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/partnerguard/partnerguard/internal/config"
	"github.com/partnerguard/partnerguard/policy"
	"github.com/partnerguard/partnerguard/proxy/listen"
	"github.com/spf13/cobra"
)

func newCheck(e environment) *cobra.Command {
	c := &cobra.Command{
		Use:   "check",
		Short: "Validate a configuration and say what it means",
		Long: `Read a configuration, report every mistake with its line, and say what it means:
where the guard listens, which mode holds for whom, and what risks it takes. Nothing
is started.

With --running it asks a running guard instead whether it is ready, for a container's
health check.`,
		Example: `  partnerguard check -c guard.yaml
  partnerguard check --running`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			cfg, err := configuration(c)
			if err != nil {
				return err
			}
			if admin, _ := c.Flags().GetString("admin"); admin != "" {
				cfg.Admin.Address = admin
			}
			if running, _ := c.Flags().GetBool("running"); running {
				return askReady(e.out, cfg.Admin, e.env)
			}
			p, err := cfg.Policy()
			if err != nil {
				return err
			}
			if err := checkLoads(cfg, e.env); err != nil {
				return err
			}
			where, err := storePlace{postgres: cfg.Store.Postgres, env: e.env}.describe()
			if err != nil {
				return err
			}
			explainConfig(e.out, cfg, p, where, time.Now())
			return nil
		},
	}
	configFlag(c)
	c.Flags().String("admin", "", "`ADDRESS` of the admin listener to ask, as serve has it (default: that of the configuration)")
	c.Flags().Bool("running", false, "ask the guard that runs with this configuration whether it is ready")
	return c
}

// checkLoads tries what serve does with the files and variables that cfg names.
func checkLoads(cfg *config.Config, env func(string) string) error {
	for i, l := range cfg.Listeners {
		if l.TLS == nil || len(l.TLS.ACME) > 0 {
			continue
		}
		if _, err := listen.LoadTLS(listen.TLSConfig{
			Certificate: l.TLS.Certificate, Key: l.TLS.Key, ClientCA: l.ClientCA, ClientCRL: l.ClientCRL,
		}); err != nil {
			return usage(fmt.Errorf("listeners[%d] (%s): %w", i, l.Label(), err), "serve would not start")
		}
	}
	if _, err := loadAdmin(cfg.Admin, env); err != nil {
		return usage(err, "serve would not start")
	}
	if _, err := signingKey(cfg.Ledger); err != nil {
		return usage(err, "serve would not start")
	}
	if eab := cfg.ACME.EAB; eab != nil {
		if _, err := eab.MACKey.Read(env); err != nil {
			return usage(fmt.Errorf("acme.eab.mac_key: %w", err), "serve would not start")
		}
	}
	if cfg.ACME.Storage == config.StoragePostgres {
		storage, err := certificateStorage(cfg, cfg.Instance, env)
		if err != nil {
			return usage(err, "serve would not start")
		}
		storage.Close()
	}
	return nil
}

// askReady asks a guard's admin listener, for details where the configuration says
// how to get them. Whether the guard is ready it tells anyone: a token that this
// process may not read, or that was just changed, makes no guard unready.
func askReady(w io.Writer, admin config.Admin, env func(string) string) error {
	scheme, transport := "http://", &http.Transport{Proxy: nil, DisableKeepAlives: true} // the token is for nobody else
	if admin.TLS != nil {
		pinned, err := pinCertificate(admin.TLS.Certificate)
		if err != nil {
			return failed(fmt.Errorf("admin.tls.certificate: %w", err), "")
		}
		scheme, transport.TLSClientConfig = "https://", pinned
	}
	client := http.Client{Transport: transport, Timeout: 5 * time.Second,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	ask := func(path, token string) (*http.Response, error) {
		r, err := http.NewRequest(http.MethodGet, scheme+dialable(admin.Address)+path, nil)
		if err != nil {
			return nil, err
		}
		if token != "" {
			r.Header.Set("Authorization", "Bearer "+token)
		}
		res, err := client.Do(r)
		if err != nil {
			return nil, failed(fmt.Errorf("ask %s: %w", admin.Address, err), "is the guard running, and is this its admin address? see --admin")
		}
		return res, nil
	}
	token, err := admin.Token.Read(env)
	path := "/readyz?verbose"
	if token == "" && (err != nil || admin.ClientCA != "") {
		path = "/readyz"
	}
	res, err := ask(path, token)
	if err == nil && token != "" && (res.StatusCode == http.StatusUnauthorized || res.StatusCode == http.StatusTooManyRequests) {
		res.Body.Close()
		res, err = ask("/readyz", "")
	}
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if _, err := io.Copy(w, io.LimitReader(res.Body, 64<<10)); err != nil {
		return err
	}
	if res.StatusCode != http.StatusOK {
		return failed(fmt.Errorf("the guard at %s is not ready: %s", admin.Address, res.Status), "")
	}
	return nil
}

// pinCertificate trusts the certificate in a file and no other, whoever issued it
// and whatever the names in it: the guard asked is the one that has its key.
func pinCertificate(file string) (*tls.Config, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var own []byte
	for block, rest := pem.Decode(data); block != nil && own == nil; block, rest = pem.Decode(rest) {
		if block.Type == "CERTIFICATE" {
			own = block.Bytes
		}
	}
	if own == nil {
		return nil, fmt.Errorf("%s holds no PEM certificate", file)
	}
	return &tls.Config{
		MinVersion:         tls.VersionTLS12,
		InsecureSkipVerify: true, // VerifyConnection is stricter
		VerifyConnection: func(cs tls.ConnectionState) error {
			if !bytes.Equal(cs.PeerCertificates[0].Raw, own) {
				return fmt.Errorf("it shows another certificate than %s", file)
			}
			return nil
		},
	}, nil
}

// dialable is address, or loopback where it stands for every interface.
func dialable(address string) string {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return address
	}
	if ip, err := netip.ParseAddr(host); host == "" || err == nil && ip.IsUnspecified() {
		return net.JoinHostPort("localhost", port)
	}
	return address
}

// explainConfig says in words what cfg does. store says where the store is.
func explainConfig(w io.Writer, cfg *config.Config, p *policy.Policy, store string, now time.Time) {
	fmt.Fprintln(w, "The configuration is valid.")
	fmt.Fprintln(w, "\nListeners")
	for _, l := range cfg.Listeners {
		var notes []string
		if l.Integration != "" {
			notes = append(notes, l.Integration)
		} else {
			notes = append(notes, "any integration")
		}
		if l.TLS != nil && len(l.TLS.ACME) > 0 {
			note := "certificates by ACME for " + strings.Join(l.TLS.ACME, ", ")
			if cfg.ACME.Storage == config.StoragePostgres {
				note += ", shared by the fleet"
			}
			notes = append(notes, note)
		}
		if l.ClientCA != "" {
			notes = append(notes, "client certificate required")
		}
		fmt.Fprintf(w, "  %s://%s  →  %s  (%s)\n", scheme(l.TLS != nil), l.Address, cfg.Upstreams[l.Upstream].URL, strings.Join(notes, "; "))
	}
	credential := "no credential"
	switch {
	case cfg.Admin.Token != "" && cfg.Admin.ClientCA != "":
		credential = "token or client certificate"
	case cfg.Admin.Token != "":
		credential = "token"
	case cfg.Admin.ClientCA != "":
		credential = "client certificate"
	}
	fmt.Fprintf(w, "  %s://%s  admin: /readyz, /metrics  (%s)\n", scheme(cfg.Admin.TLS != nil), cfg.Admin.Address, credential)

	if hosts := cfg.Hosts(); len(cfg.Upstreams) > 1 {
		fmt.Fprintln(w, "\nHost headers that choose another upstream than the listener's")
		for _, host := range slices.Sorted(maps.Keys(hosts)) {
			fmt.Fprintf(w, "  %s  →  %s\n", host, cfg.Upstreams[hosts[host]].URL)
		}
	}

	fmt.Fprintln(w, "\nTenants")
	if len(p.Tenants()) == 0 {
		fmt.Fprintln(w, "  any")
	}
	for _, t := range p.Tenants() {
		fmt.Fprintf(w, "  %s\n", t)
	}

	fmt.Fprintln(w, "\nModes")
	fmt.Fprintf(w, "  %-24s %-8s  %s\n", "(everyone else)", p.Mode(), meaning(p.Mode()))
	for _, in := range p.Integrations() {
		mode, from := in.Mode, "its own"
		if mode == policy.Inherit {
			mode, from = p.Mode(), "the global mode"
		}
		limit := ""
		if calls := cfg.CallsOf(in.Name); calls > 0 {
			limit = fmt.Sprintf("; at most %d calls at a time", calls)
		}
		fmt.Fprintf(w, "  %-24s %-8s  %s; owner %s%s\n", in.Name, mode, from, orNone(in.Owner), limit)
	}
	if len(cfg.Rules) > 0 {
		fmt.Fprintln(w, "\nRules, the first that matches holds")
	}
	for i, r := range cfg.Rules {
		fmt.Fprintf(w, "  %d. %s: %s%s\n", i+1, r.Name, r.Mode, ruleScope(r, now))
	}
	explainLedger(w, &cfg.Ledger)
	fmt.Fprintf(w, "\nStore\n  %s\n", store)
	if r := cfg.Reconcile; r.Every > 0 {
		from := string(r.Token)
		if from == "" {
			from = "the command " + r.TokenCommand.String()
		}
		fmt.Fprintf(w, "\nMicrosoft's records\n  asked for every %s with the token of %s, and held against the guard's\n", r.Every, from)
	}
	fmt.Fprintln(w, "\nRisks")
	risks := cfg.Risks(now)
	if len(risks) == 0 {
		fmt.Fprintln(w, "  none that the configuration shows")
	}
	for _, r := range risks {
		fmt.Fprintf(w, "  - %s\n", r)
	}
}

// explainLedger says what becomes of the records.
func explainLedger(w io.Writer, l *config.Ledger) {
	fmt.Fprintf(w, "\nLedger\n  records are kept for %s", inDays(l.Retention))
	if l.MaxBytes > 0 {
		fmt.Fprintf(w, ", the oldest shorter if they take more than %d MiB", l.MaxBytes>>20)
	}
	if l.Compress {
		fmt.Fprint(w, "; files that are done are compressed")
	}
	fmt.Fprintln(w)
	for _, tenant := range slices.Sorted(maps.Keys(l.Tenants)) {
		fmt.Fprintf(w, "  those of tenant %s for %s\n", tenant, inDays(l.Tenants[tenant]))
	}
	key := l.Key
	if key == "" {
		key = "ledger.key in the data directory"
	}
	fmt.Fprintf(w, "  checkpoints are signed with %s\n", key)
}

func inDays(d time.Duration) string {
	if days := d / (24 * time.Hour); d == days*24*time.Hour {
		return fmt.Sprintf("%d days", days)
	}
	return d.String()
}

func meaning(m policy.Mode) string {
	switch m {
	case policy.Audit:
		return "every call is forwarded; what enforce would refuse is recorded"
	case policy.TagMode:
		return "every call is forwarded; those without proof of MFA are marked"
	}
	return "calls without proof of MFA are refused"
}

func ruleScope(r config.Rule, now time.Time) string {
	var parts []string
	list := func(name string, values []string) {
		if len(values) > 0 {
			parts = append(parts, name+" "+strings.Join(values, ", "))
		}
	}
	list("integrations", r.Integrations)
	list("tenants", r.Tenants)
	list("methods", r.Methods)
	list("routes", r.Routes)
	if r.Percent != nil {
		parts = append(parts, fmt.Sprintf("%d %% of integrations", *r.Percent))
	}
	switch {
	case !r.From.IsZero() && now.Before(r.From):
		parts = append(parts, "from "+r.From.Format(time.RFC3339)+" (not yet)")
	case !r.Until.IsZero() && !now.Before(r.Until):
		parts = append(parts, "until "+r.Until.Format(time.RFC3339)+" (over)")
	case !r.Until.IsZero():
		parts = append(parts, "until "+r.Until.Format(time.RFC3339))
	}
	if len(parts) == 0 {
		return " for every call"
	}
	return " for " + strings.Join(parts, "; ")
}

func orNone(s string) string {
	if s == "" {
		return "(none)"
	}
	return s
}
