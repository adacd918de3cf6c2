package main

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/partnerguard/partnerguard/internal/config"
	"github.com/partnerguard/partnerguard/policy"
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
				return askReady(e.out, cfg.Admin.Address)
			}
			p, err := cfg.Policy()
			if err != nil {
				return err
			}
			explainConfig(e.out, cfg, p, time.Now())
			return nil
		},
	}
	configFlag(c)
	c.Flags().String("admin", "", "`ADDRESS` of the admin listener to ask, as serve has it (default: that of the configuration)")
	c.Flags().Bool("running", false, "ask the guard that runs with this configuration whether it is ready")
	return c
}

// askReady asks a guard's admin listener.
func askReady(w io.Writer, admin string) error {
	client := http.Client{Timeout: 5 * time.Second}
	res, err := client.Get("http://" + admin + "/readyz?verbose")
	if err != nil {
		return failed(fmt.Errorf("ask %s: %w", admin, err), "is the guard running, and is this its admin address? see --admin")
	}
	defer res.Body.Close()
	if _, err := io.Copy(w, io.LimitReader(res.Body, 64<<10)); err != nil {
		return err
	}
	if res.StatusCode != http.StatusOK {
		return failed(fmt.Errorf("the guard at %s is not ready: %s", admin, res.Status), "")
	}
	return nil
}

// explainConfig says in words what cfg does.
func explainConfig(w io.Writer, cfg *config.Config, p *policy.Policy, now time.Time) {
	fmt.Fprintln(w, "The configuration is valid.")
	fmt.Fprintln(w, "\nListeners")
	for _, l := range cfg.Listeners {
		scheme := "http"
		if l.TLS != nil {
			scheme = "https"
		}
		whose := "any integration"
		if l.Integration != "" {
			whose = l.Integration
		}
		fmt.Fprintf(w, "  %s://%s  →  %s  (%s)\n", scheme, l.Address, cfg.Upstreams[config.PartnerCenter].URL, whose)
	}
	fmt.Fprintf(w, "  http://%s  admin: /readyz, /metrics\n", cfg.Admin.Address)

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
		fmt.Fprintf(w, "  %-24s %-8s  %s; owner %s\n", in.Name, mode, from, orNone(in.Owner))
	}
	if len(cfg.Rules) > 0 {
		fmt.Fprintln(w, "\nRules, the first that matches holds")
	}
	for i, r := range cfg.Rules {
		fmt.Fprintf(w, "  %d. %s: %s%s\n", i+1, r.Name, r.Mode, ruleScope(r, now))
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
