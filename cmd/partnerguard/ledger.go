package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/partnerguard/partnerguard/telemetry/ledger"
	"github.com/partnerguard/partnerguard/telemetry/store"
	"github.com/spf13/cobra"
)

func newLedger(e environment) *cobra.Command {
	c := &cobra.Command{
		Use:   "ledger",
		Short: "Verify the ledger, rebuild the store from it",
		Long: `Verify the ledger, the truth about every call, and rebuild the store, the view of it
that report and calls read.`,
		Example: `  partnerguard ledger verify
  partnerguard ledger rebuild`,
		Args: cobra.NoArgs,
	}
	verify := &cobra.Command{
		Use:   "verify",
		Short: "Walk the hash chain of the ledger and name the first record that was changed",
		Long: `Walk the ledger from its oldest segment to its end and check that nothing in it was
changed, removed or reordered. A guard may be writing meanwhile. The exit code is 3
when the chain does not hold.`,
		Example: "  partnerguard ledger verify --data-dir /var/lib/partnerguard",
		Args:    cobra.NoArgs,
		RunE:    func(c *cobra.Command, _ []string) error { return verifyLedger(c, e) },
	}
	rebuild := &cobra.Command{
		Use:     "rebuild",
		Short:   "Build the store anew from the ledger",
		Long:    `Build the store that report and calls read anew from the ledger. Stop the guard first.`,
		Example: "  partnerguard ledger rebuild --data-dir /var/lib/partnerguard",
		Args:    cobra.NoArgs,
		RunE:    func(c *cobra.Command, _ []string) error { return rebuildStore(c, e) },
	}
	dataFlag(verify)
	dataFlag(rebuild)
	c.AddCommand(verify, rebuild)
	return c
}

// ledgerDirectory is the data directory, if it holds a ledger.
func ledgerDirectory(c *cobra.Command, e environment) (string, error) {
	dir, err := directory(c, e)
	if err != nil {
		return "", err
	}
	if _, err := os.Stat(filepath.Join(dir, "ledger")); errors.Is(err, fs.ErrNotExist) {
		return "", failed(fmt.Errorf("there is no ledger in %s", dir), "partnerguard serve writes one; see --data-dir")
	}
	return dir, nil
}

func verifyLedger(c *cobra.Command, e environment) error {
	dir, err := ledgerDirectory(c, e)
	if err != nil {
		return err
	}
	r, err := ledger.Verify(dir, nil)
	if err != nil {
		return failed(err, "the ledger must be readable; its files belong to the user that runs serve")
	}
	fmt.Fprintf(e.out, "%d segments, records %d to %d: %d decisions, %d outcomes, %d gaps\n", r.Segments, r.First, r.Last, r.Decisions, r.Outcomes, r.Gaps)
	for _, t := range r.Torn {
		fmt.Fprintf(e.out, "%s ends with %d bytes of a write that was cut short; they were never acknowledged\n", t.Segment, t.Bytes)
	}
	for _, name := range r.SetAside {
		fmt.Fprintf(e.out, "%s was set aside as damaged and is not verified\n", name)
	}
	if r.Problem != nil {
		fmt.Fprintf(e.out, "the chain is broken: %s\n", r.Problem)
		return errFindings
	}
	fmt.Fprintln(e.out, "the chain holds")
	return nil
}

func rebuildStore(c *cobra.Command, e environment) error {
	dir, err := ledgerDirectory(c, e)
	if err != nil {
		return err
	}
	records := 0
	err = store.Rebuild(c.Context(), dir, func(n int) { records = n })
	if err != nil {
		return failed(err, "stop the guard that writes there first")
	}
	fmt.Fprintf(e.out, "the store is rebuilt from %d records\n", records)
	return nil
}
