package main

import (
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"time"

	"github.com/partnerguard/partnerguard/telemetry/reconcile"
	"github.com/partnerguard/partnerguard/telemetry/report"
	"github.com/spf13/cobra"
	"golang.org/x/term"
)

var signInFormats = []string{"table", "json"}

func newSignIns(e environment) *cobra.Command {
	c := &cobra.Command{
		Use:   "signins FILE...",
		Short: "Prove from Entra's sign-in logs why MFA is missing, and find who bypasses the guard",
		Long: `Read exports of Entra's sign-in logs and say of each integration whose calls lack MFA
how its tokens were got: password grant, refresh token without MFA, trusted location,
device code, federation. A sign-in with the token's own identifier makes it certain; one
of the same application and user at that time makes it likely. Then list who signs in to
Partner Center without MFA and never passed the guard.

A FILE is JSON of Graph's /auditLogs/signIns (all pages, one behind the other or in files
of their own), or JSON or CSV of the Entra admin center in English, also compressed with
gzip; - is the standard input. Export non-interactive sign-ins as well: refreshes of
stored tokens are among these. Rows that cannot be understood are named and left out.

The result is kept in the data directory, without names where the guard keeps none
(ledger.identities: pseudonymous). The exit code is 3 when there is anything to mend,
and 1 when an incomplete export shows nothing.`,
		Example: `  partnerguard signins InteractiveSignIns.json NonInteractiveSignIns.csv
  zcat signins-*.json.gz | partnerguard signins --since 30d -`,
		RunE: func(c *cobra.Command, files []string) error { return signIns(c, e, files) },
	}
	configFlag(c)
	dataFlag(c)
	storeFlag(c)
	formatFlag(c, signInFormats...)
	c.Flags().String("since", "30d", "how far to look back for calls: 30d, 12h, or a time (RFC 3339)")
	return c
}

func signIns(c *cobra.Command, e environment, files []string) error {
	if len(files) == 0 {
		return usage(errors.New("no export is given"), "name the files of the sign-in logs, or - for the standard input")
	}
	dir, err := directory(c, e)
	if err != nil {
		return err
	}
	form, err := format(c, signInFormats...)
	if err != nil {
		return err
	}
	cfg := reconcile.SignInConfig{Now: time.Now()}
	since, _ := c.Flags().GetString("since")
	if cfg.Since, err = lookBack(since); err != nil {
		return err
	}
	if cfg.Inputs, err = signInInputs(e, files); err != nil {
		return err
	}
	r, err := storeOf(c, e, dir)
	if err != nil {
		return err
	}
	defer r.Close()
	given, err := givenConfiguration(c)
	if err != nil {
		return err
	}
	if cfg.UserRef, err = userRefs(c.Context(), dir, given, r); err != nil {
		return err
	}
	var lag strings.Builder
	tellLag(c.Context(), &lag, r)
	cfg.Records = r
	// The calls are read before the first file is: the store's memory is of use then.
	open := cfg.Inputs[0].Open
	cfg.Inputs[0].Open = func() (io.ReadCloser, error) {
		r.Close()
		return open()
	}
	// Garbage may not double what a long export and many calls need: the machine has
	// other work, such as the guard. GOMEMLIMIT, when set, stands.
	if debug.SetMemoryLimit(-1) == math.MaxInt64 {
		debug.SetMemoryLimit(48 << 20)
	}
	p := newSignInProgress(e.err)
	cfg.Progress = p.show
	found, err := reconcile.ReadSignIns(c.Context(), cfg)
	p.end()
	var bad *reconcile.InputError
	switch {
	case errors.As(err, &bad):
		return failed(err, bad.Hint())
	case err != nil:
		return err
	}
	if err := reconcile.SaveSignIns(dir, found); err != nil {
		return failed(err, "the user that runs signins needs write access to the data directory; see --data-dir")
	}
	if form == "json" {
		err = reconcile.WriteSignInsJSON(e.out, found)
	} else {
		columns := width(e.out)
		err = reconcile.WriteSignIns(e.out, found, report.Style{Width: columns, Color: columns > 0})
	}
	if err != nil {
		return err
	}
	io.WriteString(e.err, lag.String())
	switch {
	case found.Findings():
		return errFindings
	case found.Incomplete:
		return failed(errors.New("nothing was found, but the export is incomplete"), "fetch what is missing and run this again")
	}
	return nil
}

// signInInputs are the files, which must be there.
func signInInputs(e environment, files []string) ([]reconcile.SignInInput, error) {
	var inputs []reconcile.SignInInput
	stdin := false
	for _, file := range files {
		if file == "-" {
			if stdin {
				return nil, usage(errors.New("- is given twice"), "the standard input can be read once")
			}
			stdin = true
			inputs = append(inputs, reconcile.SignInInput{Name: "standard input", Open: func() (io.ReadCloser, error) { return io.NopCloser(e.in), nil }})
			continue
		}
		// Before a million rows of another one are read.
		if info, err := os.Stat(file); err != nil {
			return nil, failed(fmt.Errorf("read sign-ins: %w", err), "name the files of the sign-in logs")
		} else if info.IsDir() {
			return nil, failed(fmt.Errorf("read sign-ins: %s is a directory", file), "name the files in it: "+filepath.Join(file, "*.json"))
		}
		inputs = append(inputs, reconcile.SignInInput{Name: file, Open: func() (io.ReadCloser, error) { return os.Open(file) }})
	}
	return inputs, nil
}

// signInProgress shows on a terminal how far signins is, in one line.
type signInProgress struct {
	out   io.Writer // nil for no terminal
	next  time.Time // not before this again
	shown bool
}

func newSignInProgress(w io.Writer) *signInProgress {
	if f, ok := w.(*os.File); !ok || !term.IsTerminal(int(f.Fd())) {
		w = nil
	}
	return &signInProgress{out: w}
}

func (p *signInProgress) show(at reconcile.SignInProgress) {
	now := time.Now()
	if p.out == nil || now.Before(p.next) {
		return
	}
	p.next, p.shown = now.Add(200*time.Millisecond), true
	const clear = "\r\x1b[K"
	if at.File == "" {
		fmt.Fprintf(p.out, "%sthe guard's own calls: %d without MFA", clear, at.Rows)
		return
	}
	part := fmt.Sprintf("%d MiB", at.Bytes>>20)
	if info, err := os.Stat(at.File); err == nil && info.Mode().IsRegular() && info.Size() > 0 {
		part = fmt.Sprintf("%d %%", min(100, at.Bytes*100/info.Size()))
	}
	fmt.Fprintf(p.out, "%s%s: %s, %d rows", clear, filepath.Base(at.File), part, at.Rows)
}

// end clears the line.
func (p *signInProgress) end() {
	if p.shown {
		fmt.Fprint(p.out, "\r\x1b[K")
	}
}
