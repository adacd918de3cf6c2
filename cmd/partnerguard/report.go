package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/KimMachineGun/automemlimit/memlimit"
	"github.com/partnerguard/partnerguard/internal/config"
	"github.com/partnerguard/partnerguard/telemetry/reconcile"
	"github.com/partnerguard/partnerguard/telemetry/report"
	"github.com/spf13/cobra"
	"golang.org/x/term"
)

var reportFormats = []string{"table", "json", "csv", "html"}

func newReport(e environment) *cobra.Command {
	c := &cobra.Command{
		Use:   "report",
		Short: "Which integrations would break, whose they are, why, and the fix",
		Long: `Say for every integration whether Microsoft's enforcement of MFA breaks it:

  breaking    Microsoft refused it for missing MFA, and no call with MFA was accepted since
  will-break  its latest verified call had no MFA
  unknown     no call could be verified
  ready       else

A guard may be running meanwhile. With -c, integrations of the configuration that made
no calls are listed, too.

Where partnerguard reconcile or signins left a result in the data directory, Microsoft's
view stands beside ours: its verdicts, who goes round the guard, and causes that a
sign-in proves. It says how old that is and what it lacks. Verdicts and --fail-on go by
the guard's own records.`,
		Example: `  partnerguard report --since 7d
  partnerguard report --by user
  partnerguard report --format json --fail-on not-ready
  partnerguard report --since 30d --format html > report.html`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			dir, err := directory(c, e)
			if err != nil {
				return err
			}
			f := c.Flags()
			o := reportOptions{width: width(e.out), microsoft: reconcile.View(dir)}
			since, _ := f.GetString("since")
			if o.since, err = lookBack(since); err != nil {
				return err
			}
			o.by, _ = f.GetString("by")
			o.failOn, _ = f.GetString("fail-on")
			if o.format, err = format(c, reportFormats...); err != nil {
				return err
			}
			var cfg *config.Config
			if file, _ := f.GetString("config"); file != "" {
				if cfg, err = configuration(c); err != nil {
					return err
				}
				o.integrations = integrationsOf(cfg)
			}
			if o.store, err = storeAt(c, e, dir, cfg); err != nil {
				return err
			}
			tuneMemory(e.env, memlimit.FromCgroup)
			o.notes = e.err
			return printReport(c.Context(), e.out, o)
		},
	}
	configFlag(c)
	dataFlag(c)
	storeFlag(c)
	formatFlag(c, reportFormats...)
	c.Flags().String("since", "7d", "how far to look back: 30d, 12h, or a time (RFC 3339)")
	c.Flags().String("by", "integration", "integration, user, app, customer or route")
	c.Flags().String("fail-on", "", "exit 3 when the estate is not-ready, or breaking")
	c.RegisterFlagCompletionFunc("by", cobra.FixedCompletions([]string{"integration", "user", "app", "customer", "route"}, cobra.ShellCompDirectiveNoFileComp))
	c.RegisterFlagCompletionFunc("fail-on", cobra.FixedCompletions([]string{"not-ready", "breaking"}, cobra.ShellCompDirectiveNoFileComp))
	return c
}

// integrationsOf are the integrations of cfg as reports need them.
func integrationsOf(cfg *config.Config) []report.Integration {
	var all []report.Integration
	for _, in := range cfg.Integrations {
		all = append(all, report.Integration{Name: in.Name, Owner: in.Owner, Apps: in.Match.AppID})
	}
	return all
}

// reportOptions are the flags of report.
type reportOptions struct {
	store        storePlace
	since        time.Time
	by           string
	format       string
	failOn       string
	width        int
	integrations []report.Integration
	microsoft    *report.Microsoft
	notes        io.Writer // what the form has no room for
}

func printReport(ctx context.Context, w io.Writer, o reportOptions) error {
	by, err := report.ParseDimension(o.by)
	if err != nil {
		return usage(fmt.Errorf("--by: %w", err), "")
	}
	switch o.failOn {
	case "", "not-ready", "breaking":
	default:
		return usage(fmt.Errorf("--fail-on %q is not known", o.failOn), "write not-ready or breaking")
	}
	r, err := openStore(ctx, o.store)
	if err != nil {
		return err
	}
	defer r.Close()
	identities, err := r.Identities(ctx)
	if err != nil {
		return err
	}
	rep, err := report.Build(ctx, r, identities, report.Options{Since: o.since, By: by, Now: time.Now(), Integrations: o.integrations, Microsoft: o.microsoft})
	if err != nil {
		return err
	}
	switch o.format {
	case "json":
		err = report.WriteJSON(w, rep)
	case "csv":
		tellLag(ctx, o.notes, r)
		err = report.WriteCSV(w, rep)
	case "html":
		err = report.WriteHTML(w, rep)
	default:
		err = report.WriteTable(w, rep, report.Style{Width: o.width, Color: o.width > 0})
	}
	if err != nil {
		return err
	}
	if o.failOn == "not-ready" && rep.Verdict != report.Ready || o.failOn == "breaking" && rep.Verdict == report.Breaking {
		return errFindings
	}
	return nil
}

// lookBack is a point in the past: so long ago, or a time.
func lookBack(s string) (time.Time, error) {
	for _, layout := range [...]string{time.RFC3339, time.DateOnly} {
		t, err := time.Parse(layout, s)
		switch {
		case err == nil && t.IsZero(): // which would stand for no bound at all
			return t, usage(fmt.Errorf("%q is before any call", s), "write 7d, 12h, 2026-11-01 or 2026-11-01T08:00:00Z")
		case err == nil:
			return t, nil
		}
	}
	d, err := config.ParseDuration(s)
	if err != nil || d < 0 {
		return time.Time{}, usage(fmt.Errorf("%q is neither a duration nor a time", s), "write 7d, 12h, 2026-11-01 or 2026-11-01T08:00:00Z")
	}
	return time.Now().Add(-d), nil
}

// width is the columns of a terminal, 0 for anything else.
func width(w io.Writer) int {
	f, ok := w.(*os.File)
	if !ok {
		return 0
	}
	columns, _, err := term.GetSize(int(f.Fd()))
	if err != nil {
		return 0
	}
	return columns
}
