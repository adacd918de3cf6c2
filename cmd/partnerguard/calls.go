package main

import (
	"errors"
	"fmt"
	"time"

	"github.com/partnerguard/partnerguard/telemetry/report"
	"github.com/partnerguard/partnerguard/telemetry/store"
	"github.com/spf13/cobra"
)

var callFormats = []string{"table", "json"}

func newCalls(e environment) *cobra.Command {
	c := &cobra.Command{
		Use:   "calls",
		Short: "List single calls, or follow them",
		Long: `List calls, the latest last. Microsoft's refusals come with the integration, its
owner, the cause and the fix. --format json writes one object a line.`,
		Example: `  partnerguard calls --since 1h --status 401
  partnerguard calls --request-id 6c583d8d-46cd-420c-ae3d-000000000001
  partnerguard calls --follow --integration nightly-billing`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return calls(c, e) },
	}
	configFlag(c)
	dataFlag(c)
	storeFlag(c)
	formatFlag(c, callFormats...)
	f := c.Flags()
	f.String("since", "24h", "how far to look back: 30d, 12h, or a time (RFC 3339)")
	f.String("until", "", "up to when: so long ago, or a time")
	f.String("guard", "", "name of the guard (its instance), in a fleet")
	f.String("integration", "", "name of the integration")
	f.String("user", "", "user principal name, object id or user_ref")
	f.String("app", "", "application id")
	f.String("customer", "", "customer tenant id")
	f.String("status", "", "status that the client got: 401, or a class: 4xx")
	f.String("reason", "", "the guard's reason, such as mfa_missing")
	f.String("call", "", "the guard's id of the call (Partnerguard-Call)")
	f.String("request-id", "", "MS-RequestId, the client's or Microsoft's")
	f.String("correlation-id", "", "MS-CorrelationId, the client's or Microsoft's")
	f.Int("limit", 1000, "the latest so many; 0 is all")
	f.BoolP("follow", "f", false, "go on with the calls as they end")
	return c
}

func calls(c *cobra.Command, e environment) error {
	dir, err := directory(c, e)
	if err != nil {
		return err
	}
	form, err := format(c, callFormats...)
	if err != nil {
		return err
	}
	filter, err := callFilter(c)
	if err != nil {
		return err
	}
	follow, _ := c.Flags().GetBool("follow")
	r, err := storeOf(c, e, dir)
	if err != nil {
		return err
	}
	defer r.Close()
	ctx := c.Context()
	identities, err := r.Identities(ctx)
	if err != nil {
		return err
	}
	table := report.NewCallsTable(e.out, identities, report.Style{Width: width(e.out)})
	shown := 0
	show := func(call store.Call) error {
		shown++
		filter.AfterFinish = max(filter.AfterFinish, call.Finish)
		if form == "json" {
			return report.WriteCallJSON(e.out, &call, identities)
		}
		return table.Row(&call)
	}
	if follow {
		// Begin with what comes, unless --since asks for what was.
		filter.EndedOnly = true
		if !c.Flags().Changed("since") {
			if filter.AfterFinish, err = r.LastFinish(ctx); err != nil {
				return err
			}
			filter.Since = time.Time{}
		}
	}
	if err := r.Calls(ctx, filter, show); err != nil {
		return err
	}
	if !follow {
		if shown == 0 {
			since, _ := c.Flags().GetString("since")
			fmt.Fprintf(e.err, "partnerguard: no call since %s matches; see --since\n", since)
		}
		tellLag(ctx, e.err, r)
		return nil
	}
	filter.Limit = 0
	tick := time.NewTicker(300 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if err := r.Calls(ctx, filter, show); err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
	}
}

func callFilter(c *cobra.Command) (store.Filter, error) {
	text := func(name string) string {
		s, _ := c.Flags().GetString(name)
		return s
	}
	f := store.Filter{
		Instance: text("guard"), Integration: text("integration"), User: text("user"), App: text("app"), Customer: text("customer"),
		Status: text("status"), Reason: text("reason"), Call: text("call"),
		RequestID: text("request-id"), CorrelationID: text("correlation-id"),
	}
	f.Limit, _ = c.Flags().GetInt("limit")
	if f.Limit < 0 {
		return f, usage(errors.New("--limit is negative"), "write 0 for all")
	}
	if _, _, err := store.ParseStatus(f.Status); f.Status != "" && err != nil {
		return f, usage(fmt.Errorf("--status: %w", err), "")
	}
	var err error
	if f.Since, err = lookBack(text("since")); err != nil {
		return f, err
	}
	if until := text("until"); until != "" {
		f.Until, err = lookBack(until)
	}
	return f, err
}
