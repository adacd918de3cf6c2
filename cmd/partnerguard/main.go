// Command partnerguard guards Microsoft Partner Center API traffic: a reverse proxy
// that sees whether each call's token proves MFA, lets the call pass, tags it or
// refuses it, and keeps the account.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	stdlog "log"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"github.com/partnerguard/partnerguard/internal/config"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

func main() {
	// net/http tells package log what an upstream sent unasked, and its bytes with it.
	stdlog.SetOutput(io.Discard)
	os.Exit(run(os.Args[1:], environment{
		in: os.Stdin, out: os.Stdout, err: os.Stderr, env: os.Getenv,
	}))
}

// environment is what a command may touch of the world around the process.
type environment struct {
	in       io.Reader
	out, err io.Writer
	env      func(string) string
}

// Exit codes.
const (
	exitFailure  = 1
	exitUsage    = 2 // usage or configuration
	exitFindings = 3
)

// failure is an error with its exit code and the next step.
type failure struct {
	code int
	err  error
	hint string
}

func (f *failure) Error() string { return f.err.Error() }
func (f *failure) Unwrap() error { return f.err }

func failed(err error, hint string) error { return &failure{exitFailure, err, hint} }

func usage(err error, hint string) error { return &failure{exitUsage, err, hint} }

// errFindings ends a command that worked and found something: exit code 3.
var errFindings = errors.New("findings")

// run runs one command line and returns its exit code. An interrupt ends the
// command's context; a second one ends the process at once.
func run(args []string, e environment) int {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	defer signal.Stop(signals)
	go func() {
		<-signals
		cancel()
		<-signals
		os.Exit(exitFailure)
	}()

	root := newRoot(e)
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	if errors.Is(err, errFindings) {
		return exitFindings
	}
	var f *failure
	var bad *config.Error
	switch {
	case errors.As(err, &bad):
		for _, p := range bad.Problems {
			fmt.Fprintf(e.err, "partnerguard: error: %s\n", p)
		}
		fmt.Fprintf(e.err, "partnerguard: hint: nothing was started; examples/full.yaml shows every key\n")
		return exitUsage
	case errors.As(err, &f):
		fmt.Fprintf(e.err, "partnerguard: error: %v\n", err)
		if f.hint != "" {
			fmt.Fprintf(e.err, "partnerguard: hint: %s\n", f.hint)
		}
		return f.code
	}
	fmt.Fprintf(e.err, "partnerguard: error: %v\n", err)
	return exitFailure
}

func newRoot(e environment) *cobra.Command {
	root := &cobra.Command{
		Use:   "partnerguard",
		Short: "Guard Microsoft Partner Center API traffic: who lacks MFA, whose it is, why, and the fix",
		Long: `partnerguard stands between your automation and Microsoft's Partner Center API. It
verifies each call's bearer token, sees whether MFA is in it, lets the call pass,
tags it or refuses it, keeps an account of every call, and traces each
401/900421 of Microsoft's back to the integration, its owner, the cause and the fix.

An environment variable stands for each flag that is not given: PARTNERGUARD_DATA_DIR
for --data-dir, PARTNERGUARD_CONFIG for --config. Exit codes: 0 done, 1 failed, 2 wrong
usage or configuration, 3 done and found what the command looks for.`,
		Example: `  partnerguard demo --for 20s                 see what it does, nothing to set up
  partnerguard serve                          audit on http://127.0.0.1:8080
  partnerguard report --since 7d              which integrations would break, and why`,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.NoArgs,
	}
	root.SetIn(e.in)
	root.SetOut(e.out)
	root.SetErr(e.err)
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usage(err, "see "+cmd.CommandPath()+" --help")
	})
	root.AddCommand(
		newDemo(e), newServe(e), newCheck(e), newExplain(e), newReport(e), newCalls(e), newReconcile(e), newSignIns(e),
		newLedger(e), newEmulate(e), newVersion(e),
	)
	root.InitDefaultCompletionCmd() // now, so that strict holds for it, too
	strict(root, e)
	return root
}

// strict gives a command and those below it the habits of the house: wrong
// arguments are a usage error, and PARTNERGUARD_{FLAG} stands for a flag that is
// not given.
func strict(c *cobra.Command, e environment) {
	for _, sub := range c.Commands() {
		strict(sub, e)
	}
	c.SuggestionsMinimumDistance = 2
	if !c.Runnable() {
		c.RunE = func(cmd *cobra.Command, _ []string) error { return cmd.Help() }
	}
	if args := c.Args; args != nil {
		c.Args = func(cmd *cobra.Command, a []string) error {
			err := args(cmd, a)
			if err == nil {
				return nil
			}
			hint := "see " + cmd.CommandPath() + " --help"
			if !cmd.HasSubCommands() {
				err = fmt.Errorf("unexpected argument %q", a[len(a)-1])
			} else if like := cmd.SuggestionsFor(a[0]); len(like) > 0 {
				hint = "did you mean " + strings.Join(like, " or ") + "? " + hint
			}
			return usage(err, hint)
		}
	}
	c.PreRunE = func(cmd *cobra.Command, _ []string) error {
		var err error
		cmd.Flags().VisitAll(func(f *pflag.Flag) {
			name := "PARTNERGUARD_" + strings.ToUpper(strings.ReplaceAll(f.Name, "-", "_"))
			if v := e.env(name); v != "" && !f.Changed && err == nil {
				if e := cmd.Flags().Set(f.Name, v); e != nil {
					err = usage(fmt.Errorf("%s: %w", name, e), "correct or unset the environment variable")
				}
			}
		})
		return err
	}
}

// dataFlag adds --data-dir; directory finds its value.
func dataFlag(c *cobra.Command) {
	c.Flags().String("data-dir", "", "`DIR` where ledger, store and keys are kept (default: $PARTNERGUARD_DATA_DIR, $STATE_DIRECTORY, else the user's state directory)")
	c.MarkFlagDirname("data-dir")
}

// directory is the data directory: --data-dir or its environment variable, else
// systemd's, else the XDG state directory.
func directory(c *cobra.Command, e environment) (string, error) {
	if d, _ := c.Flags().GetString("data-dir"); d != "" {
		return d, nil
	}
	if d := e.env("STATE_DIRECTORY"); d != "" {
		// systemd gives several, separated by colons, where the unit names several.
		first, _, _ := strings.Cut(d, ":")
		return first, nil
	}
	if d := e.env("XDG_STATE_HOME"); d != "" {
		return filepath.Join(d, "partnerguard"), nil
	}
	if runtime.GOOS == "windows" {
		if d := e.env("LOCALAPPDATA"); d != "" {
			return filepath.Join(d, "partnerguard"), nil
		}
	}
	home := e.env("HOME")
	if home == "" {
		return "", usage(errors.New("there is no data directory: neither --data-dir nor HOME is set"), "give --data-dir")
	}
	return filepath.Join(home, ".local", "state", "partnerguard"), nil
}

// configFlag adds -c.
func configFlag(c *cobra.Command) {
	c.Flags().StringP("config", "c", "", "configuration `FILE` (YAML)")
	c.MarkFlagFilename("config", "yaml", "yml")
}

// formatFlag adds --format with the formats a command knows, the first by default.
func formatFlag(c *cobra.Command, formats ...string) {
	c.Flags().String("format", formats[0], strings.Join(formats, ", "))
	c.RegisterFlagCompletionFunc("format", cobra.FixedCompletions(formats, cobra.ShellCompDirectiveNoFileComp))
}

func format(c *cobra.Command, formats ...string) (string, error) {
	f, _ := c.Flags().GetString("format")
	for _, known := range formats {
		if f == known {
			return f, nil
		}
	}
	return "", usage(fmt.Errorf("--format %q is not known", f), "write "+strings.Join(formats, " or "))
}
