package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strings"
	"time"

	"github.com/partnerguard/partnerguard/internal/config"
	"github.com/partnerguard/partnerguard/proxy"
	"github.com/partnerguard/partnerguard/telemetry/reconcile"
	"github.com/partnerguard/partnerguard/telemetry/report"
	"github.com/spf13/cobra"
)

var reconcileFormats = []string{"table", "json"}

func newReconcile(e environment) *cobra.Command {
	c := &cobra.Command{
		Use:   "reconcile",
		Short: "Hold Microsoft's own records against ours: who goes round the guard",
		Long: `Read Microsoft's record of the partner's API calls (partnerRequests,
nonMfaCompliantPartnerPrincipals, applicationmfaadoptionstatus) and say where it differs
from ours:

  direct_calls              calls that did not pass the guard, by app, user and address
  application_not_seen      an app that Microsoft counts and that never passed the guard
  application_partly_seen   one of which Microsoft counts many more calls
  verdict_differs           Microsoft and the guard do not agree on a call's MFA
  non_compliant_principal   a user without MFA, and the integrations that use it
  non_compliant_principal_not_seen   one that no call here was made as
  unlisted_calls            calls that Microsoft should list and does not
  window_incomplete         there may be more: Microsoft lists 7 days and 10,000 calls

Microsoft is asked directly, not by way of the guard, at the upstream partner-center of
the configuration. This needs an app+user token with MFA: from --token-file, from
--token-command (asked again when the token is refused), or in PARTNERGUARD_TOKEN.
Without network, --from reads answers that were saved.

A guard may be running meanwhile, and can do the same by itself on a schedule (reconcile
in the configuration). Calls through another guard, with a data directory of its own,
count as direct here. The result is kept in the data directory, and partnerguard report
shows it beside the guard's own records; without names where the guard keeps none
(ledger.identities: pseudonymous). The exit code is 3 when there are findings.`,
		Example: `  partnerguard reconcile --token-command 'az account get-access-token --resource https://api.partnercenter.microsoft.com'
  partnerguard reconcile -c guard.yaml --token-file token.txt --format json
  partnerguard reconcile --from downloads/`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return runReconcile(c, e) },
	}
	configFlag(c)
	dataFlag(c)
	storeFlag(c)
	formatFlag(c, reconcileFormats...)
	f := c.Flags()
	f.String("from", "", "`FILE` or directory with Microsoft's answers, saved as JSON")
	f.String("since", "", "leave out what was before: 3d, 12h, or a time (default: all that Microsoft lists)")
	f.String("token-file", "", "`FILE` that holds the token")
	f.String("token-command", "", "shell `COMMAND` that prints the token, alone or in JSON as access_token or accessToken")
	f.String("delay", "1h", "how long Microsoft may take to list a call")
	c.MarkFlagFilename("from", "json")
	c.MarkFlagFilename("token-file")
	return c
}

func runReconcile(c *cobra.Command, e environment) error {
	text := func(name string) string {
		s, _ := c.Flags().GetString(name)
		return s
	}
	dir, err := directory(c, e)
	if err != nil {
		return err
	}
	form, err := format(c, reconcileFormats...)
	if err != nil {
		return err
	}
	cfg, err := configuration(c)
	if err != nil {
		return err
	}
	rc := reconcile.Config{Dir: dir, From: text("from"), Waiting: func(pause time.Duration, why string) {
		fmt.Fprintf(e.err, "partnerguard: %s; trying again in %s\n", why, pause.Round(time.Second))
	}}
	if since := text("since"); since != "" {
		if rc.Since, err = lookBack(since); err != nil {
			return err
		}
	}
	delay, err := config.ParseDuration(text("delay"))
	if err != nil || delay < 0 {
		return usage(fmt.Errorf("--delay %q is no duration", text("delay")), "write 30m or 2h")
	}
	rc.Delay = noDelay(delay)
	rc.Integrations = integrationsOf(cfg)
	if rc.From == "" {
		if rc.Token, err = tokenSource(text("token-file"), text("token-command"), e.env); err != nil {
			return err
		}
		upstream, err := reconcileUpstream(cfg, nil)
		if err != nil {
			return err
		}
		defer upstream.Close()
		rc.URL, rc.Transport = cfg.Upstreams[config.PartnerCenter].URL, upstream
	}
	place, err := storeAt(c, e, dir, cfg)
	if err != nil {
		return err
	}
	if rc.Store, err = openStore(c.Context(), place); err != nil {
		return err
	}
	defer rc.Store.Close()
	given, err := givenConfiguration(c)
	if err != nil {
		return err
	}
	if rc.UserRef, err = userRefs(c.Context(), dir, given, rc.Store); err != nil {
		return err
	}
	result, err := reconcile.Run(c.Context(), rc)
	if err != nil {
		var f *failure
		if !errors.As(err, &f) {
			err = failed(err, hintOf(err))
		}
	}
	if result == nil {
		return err
	}
	if form == "json" {
		err = errors.Join(reconcile.WriteJSON(e.out, result), err)
	} else {
		columns := width(e.out)
		err = errors.Join(reconcile.WriteTable(e.out, result, report.Style{Width: columns, Color: columns > 0}), err)
	}
	if err == nil && !result.Clear {
		return errFindings
	}
	return err
}

// reconcileUpstream is the way to Microsoft that the guard takes, too: the same dial,
// CAs, forward proxy and time limits. It has a breaker and connections of its own, and
// refuses to lead to the addresses of own.
func reconcileUpstream(cfg *config.Config, own func() []netip.AddrPort) (*proxy.Upstream, error) {
	u, t := cfg.Upstreams[config.PartnerCenter], cfg.Timeouts
	roots, err := rootsWith(u.CA)
	if err != nil {
		return nil, usage(fmt.Errorf("read upstreams.%s.ca: %w", config.PartnerCenter, err), "")
	}
	return proxy.NewUpstream(proxy.UpstreamConfig{
		Name: config.PartnerCenter, URL: u.URL, Audiences: u.Audiences, Dial: u.Dial, RootCAs: roots, HTTP2: u.HTTP2,
		DialTimeout: t.Dial, TLSTimeout: t.TLS, ResponseHeader: t.ResponseHeader, Idle: t.Idle, OwnAddresses: own,
	})
}

const tokenHint = "give --token-file, --token-command or PARTNERGUARD_TOKEN; or --from with Microsoft's saved answers"

// maxTokenOutput is more than a token and the JSON around it take.
const maxTokenOutput = 1 << 20

// tokenSource is where reconcile gets its token.
func tokenSource(file, command string, env func(string) string) (func(context.Context) (string, error), error) {
	switch {
	case file != "" && command != "":
		return nil, usage(errors.New("--token-file and --token-command are both given"), "give one of them")
	case file != "":
		return func(context.Context) (string, error) {
			f, err := os.Open(file)
			if err != nil {
				return "", usage(fmt.Errorf("read the token: %w", err), tokenHint)
			}
			defer f.Close()
			b, err := io.ReadAll(io.LimitReader(f, maxTokenOutput))
			if err != nil {
				return "", usage(fmt.Errorf("read the token: %w", err), tokenHint)
			}
			return tokenIn(b, file)
		}, nil
	case command != "":
		shell, flag := "/bin/sh", "-c"
		if runtime.GOOS == "windows" {
			shell, flag = "cmd.exe", "/C"
		}
		return func(ctx context.Context) (string, error) { return runTokenCommand(ctx, shell, flag, command) }, nil
	case env("PARTNERGUARD_TOKEN") != "":
		return func(context.Context) (string, error) {
			return tokenIn([]byte(env("PARTNERGUARD_TOKEN")), "PARTNERGUARD_TOKEN")
		}, nil
	}
	return nil, usage(errors.New("there is no token for Microsoft's records"), tokenHint)
}

// tokenIn finds the one token in text, with or without Bearer in front, or in the JSON
// that token endpoints and the Azure CLI print.
func tokenIn(text []byte, where string) (string, error) {
	text = bytes.TrimSpace(bytes.TrimPrefix(text, []byte("\ufeff")))
	words := strings.Fields(string(text))
	if bytes.HasPrefix(text, []byte("{")) {
		var answer struct {
			Access    string `json:"access_token"`
			AzAccess  string `json:"accessToken"`
			PSAccess  string `json:"Token"`
			ErrorCode string `json:"error"`
		}
		words = nil
		if json.Unmarshal(text, &answer) == nil {
			words = strings.Fields(answer.Access + " " + answer.AzAccess + " " + answer.PSAccess)
			if len(words) == 0 && answer.ErrorCode != "" {
				return "", failed(fmt.Errorf("%s holds an error instead of a token: %s", where, shown(answer.ErrorCode)), tokenHint)
			}
		}
	}
	if len(words) > 1 && strings.EqualFold(words[0], "bearer") {
		words = words[1:]
	}
	// What is no header value is no token either.
	if len(words) != 1 || strings.ContainsFunc(words[0], func(r rune) bool { return r <= ' ' || r >= 0x7f }) {
		return "", usage(fmt.Errorf("%s does not hold one token and nothing else", where), tokenHint)
	}
	return words[0], nil
}

// tokenCommandTime bounds a token command: it may ask somebody to sign in.
const tokenCommandTime = 5 * time.Minute

// runTokenCommand runs a program. What it prints is never shown: it is the token, or may
// hold a part of it.
func runTokenCommand(ctx context.Context, program string, arguments ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, tokenCommandTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, arguments...)
	out, errs := &boundedBuffer{}, &boundedBuffer{}
	cmd.Stdout, cmd.Stderr = out, errs
	cmd.WaitDelay = 5 * time.Second // for what it left running
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		if line := firstLine(strings.TrimSpace(string(errs.b))); line != "" {
			err = fmt.Errorf("%w: %s", err, shown(likeSecret.ReplaceAllString(line[:min(len(line), 300)], "[removed]")))
		}
		return "", failed(fmt.Errorf("run the token command: %w", err), "run it by itself: it must print the token and end with 0")
	}
	return tokenIn(out.b, "the output of the token command")
}

// likeSecret matches what may be a token, or a piece of one.
var likeSecret = regexp.MustCompile(`[A-Za-z0-9_\-.~+/=]{20,}`)

// boundedBuffer keeps the beginning of what is written.
type boundedBuffer struct{ b []byte }

func (w *boundedBuffer) Write(p []byte) (int, error) {
	w.b = append(w.b, p[:min(len(p), maxTokenOutput-len(w.b))]...)
	return len(p), nil
}
