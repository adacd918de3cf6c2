package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/partnerguard/partnerguard/internal/config"
	"github.com/partnerguard/partnerguard/policy"
	"github.com/partnerguard/partnerguard/policy/entra"
	"github.com/partnerguard/partnerguard/telemetry"
	"github.com/spf13/cobra"
)

func newExplain(e environment) *cobra.Command {
	c := &cobra.Command{
		Use:   "explain [FILE|-]",
		Short: "Lay a token open: claims, checks, decision, cause and fix",
		Long: `Read one bearer token from a file or standard input and say what is in it, check by
check, what the guard would decide, why, and what to do. The token itself is never
shown, but its claims are, and some of them name a person.

The exit code is 3 when enforce would refuse a call with this token.`,
		Example: `  partnerguard explain token.txt
  az account get-access-token --resource https://api.partnercenter.microsoft.com --query accessToken -o tsv | partnerguard explain -c guard.yaml`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			file := "-"
			if len(args) == 1 {
				file = args[0]
			}
			return explain(c, e, file)
		},
	}
	configFlag(c)
	return c
}

func explain(c *cobra.Command, e environment, file string) error {
	cfg, err := configuration(c)
	if err != nil {
		return err
	}
	raw, err := readToken(e, file)
	if err != nil {
		return err
	}
	p, err := cfg.Policy()
	if err != nil {
		return err
	}
	cloud, err := entra.ParseCloud(cfg.Cloud)
	if err != nil {
		return err
	}
	verifier, err := entra.New(entra.Config{
		Cloud: cloud, Authority: cfg.Entra.Authority, Tenants: p.Tenants(), Leeway: leeway(cfg.Entra.Leeway), MFAValues: cfg.Entra.MFAValues,
	})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(c.Context(), 10*time.Second)
	defer cancel()
	keys := verifier.Refresh(ctx)
	x := verifier.Explain(c.Context(), raw, cfg.Upstreams[config.PartnerCenter].Audiences)
	return writeExplanation(e.out, p, x, keys)
}

// readToken reads a token, with or without "Bearer" in front.
func readToken(e environment, file string) (string, error) {
	in := e.in
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return "", usage(err, "give a file that holds the token, or - for standard input")
		}
		defer f.Close()
		in = f
	}
	b, err := io.ReadAll(io.LimitReader(in, 1<<20))
	if err != nil {
		return "", fmt.Errorf("read the token: %w", err)
	}
	words := strings.Fields(strings.TrimPrefix(string(b), "\ufeff"))
	if len(words) > 0 && strings.EqualFold(words[0], "bearer") {
		words = words[1:]
	}
	if len(words) == 0 {
		return "", usage(errors.New("there is no token in the input"), "give a file that holds the token, or - for standard input")
	}
	return strings.Join(words, " "), nil
}

func writeExplanation(w io.Writer, p *policy.Policy, x entra.Explanation, keys error) error {
	call := policy.Call{Time: time.Now(), Method: "GET", Path: "/v1/customers", Token: x.Token}
	call.Token.Verified = x.Err == nil
	if x.Err != nil {
		call.Token, call.TokenReason = x.Err.Claimed, x.Err.Reason
	}
	call.Attribution = p.Attribute(&call)
	d := p.Decide(&call)

	verdict := "enforce would let a call with this token pass"
	if d.WouldReject {
		verdict = "enforce would refuse a call with this token"
	}
	fmt.Fprintf(w, "%s: %s\n", d.Reason, verdict)
	fmt.Fprintf(w, "  kind %s, MFA %s, integration %s, mode here %s: %s\n", call.Token.Kind, x.MFA, call.Attribution.Name, d.Mode, d.Effect)

	fmt.Fprintln(w, "\nChecks")
	for _, check := range x.Checks {
		line := fmt.Sprintf("  %-8s %-22s %s", check.State, check.Name, shown(check.Detail))
		fmt.Fprintln(w, strings.TrimRight(line, " "))
	}
	if keys != nil && x.Err != nil && x.Err.Reason == policy.ReasonKeysUnavailable {
		fmt.Fprintf(w, "\n  No keys to check the signature with: %s\n", shown(firstLine(keys.Error())))
	}
	if len(x.Claims) > 0 {
		fmt.Fprintln(w, "\nClaims")
		for _, claim := range x.Claims {
			personal := ""
			if claim.PII {
				personal = "   (personal data)"
			}
			fmt.Fprintf(w, "  %-20s %s%s\n", shown(claim.Name), shown(claim.Value), personal)
		}
	}
	causes := policy.Diagnose(call.Token, d.Reason, "", "")
	if len(causes) > 0 {
		fmt.Fprintln(w, "\nWhy, and what to do")
		for _, cause := range causes {
			fmt.Fprintf(w, "  %s (%s): %s\n    Fix: %s\n", cause.Code, cause.Confidence, shown(cause.Text), shown(cause.Fix))
		}
	}
	if d.WouldReject {
		return errFindings
	}
	return nil
}

// shown is s without what could drive a terminal.
func shown(s string) string {
	q := string(telemetry.AppendString(nil, s))
	return strings.ReplaceAll(q[1:len(q)-1], `\"`, `"`)
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(s, "\n")
	return line
}
