package main

import (
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/partnerguard/partnerguard/internal/config"
	"github.com/partnerguard/partnerguard/telemetry/ledger"
	"github.com/partnerguard/partnerguard/telemetry/store"
	"github.com/spf13/cobra"
)

var ledgerFormats = []string{"text", "json"}

func newLedger(e environment) *cobra.Command {
	c := &cobra.Command{
		Use:   "ledger",
		Short: "Verify, prune and rebuild: the truth about every call",
		Long: `Work on the ledger, the truth about every call, and rebuild the store, the view of it
that report and calls read.`,
		Example: `  partnerguard ledger verify
  partnerguard ledger rebuild
  partnerguard ledger prune --older-than 30d --dry-run`,
		Args: cobra.NoArgs,
	}
	verify := &cobra.Command{
		Use:   "verify",
		Short: "Walk the hash chain of the ledger and name the first record that was changed",
		Long: `Walk the ledger from its oldest segment to its end and check that nothing in it was
changed, removed or reordered, that every checkpoint is signed with the ledger's key
and is of this chain, and that nothing is missing behind the latest one. A guard may
be writing meanwhile. The exit code is 3 when something is wrong.

Who can change the ledger can also change ledger.pub and checkpoint.json beside it. An
auditor gives copies of his own, taken earlier and kept elsewhere. With --store, or
store.postgres in the configuration, the checkpoints that the fleet's database has of this
ledger must be on the chain, too.`,
		Example: `  partnerguard ledger verify --data-dir /var/lib/partnerguard
  partnerguard ledger verify --public-key auditor/ledger.pub --checkpoint auditor/checkpoint.json`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return verifyLedger(c, e) },
	}
	verify.Flags().StringArray("public-key", nil, "PEM `FILE` of the key that checkpoints must be signed with; again for each key before it (default: those in the data directory)")
	verify.Flags().StringArray("checkpoint", nil, "`FILE` of a checkpoint, kept elsewhere, that must be on the chain; may be given again")
	verify.Flags().String("proof", "", "`FILE` of an export's proof: check that instead, against the ledger too if it is here")
	configFlag(verify)
	storeFlag(verify)
	formatFlag(verify, ledgerFormats...)

	prune := &cobra.Command{
		Use:   "prune",
		Short: "Remove the segments of the ledger that are older than needed",
		Long: `Remove the segments of the ledger, days or parts of a day, that ended longer ago than
given. What stays can still be proved. The segment being written stays, and the store
keeps the calls until its own retention is over. A guard may be writing meanwhile; it
does the same by itself as ledger.retention says.`,
		Example: "  partnerguard ledger prune --older-than 30d --dry-run",
		Args:    cobra.NoArgs,
		RunE:    func(c *cobra.Command, _ []string) error { return pruneLedger(c, e) },
	}
	prune.Flags().String("older-than", "", "`DURATION` that records are kept, such as 30d (required)")
	prune.Flags().Bool("dry-run", false, "say what would be removed, and remove nothing")
	formatFlag(prune, ledgerFormats...)

	rebuild := &cobra.Command{
		Use:     "rebuild",
		Short:   "Build the store anew from the ledger",
		Long:    `Build the store that report and calls read anew from the ledger. Stop the guard first.`,
		Example: "  partnerguard ledger rebuild --data-dir /var/lib/partnerguard",
		Args:    cobra.NoArgs,
		RunE:    func(c *cobra.Command, _ []string) error { return rebuildStore(c, e) },
	}
	dataFlag(verify)
	dataFlag(prune)
	dataFlag(rebuild)
	c.AddCommand(verify, newExport(e), prune, newForget(e), rebuild)
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

// ledgerHint is the next step after an error of the ledger: after one of its format
// what that says, or otherwise.
func ledgerHint(err error, otherwise string) string {
	var format *ledger.FormatError
	if errors.As(err, &format) {
		return format.Hint()
	}
	return otherwise
}

func verifyLedger(c *cobra.Command, e environment) error {
	form, err := format(c, ledgerFormats...)
	if err != nil {
		return err
	}
	o, err := verifyOptions(c)
	if err != nil {
		return err
	}
	if proof, _ := c.Flags().GetString("proof"); proof != "" {
		return verifyProof(c, e, proof, form, o)
	}
	dir, err := ledgerDirectory(c, e)
	if err != nil {
		return err
	}
	copies, err := fleetCheckpoints(c, e, dir)
	if err != nil {
		return err
	}
	o.Checkpoints = append(o.Checkpoints, copies...)
	bar := &percentage{out: e.err, quiet: !isTerminal(e.err)}
	o.Progress = bar.show
	r, err := ledger.Verify(dir, o)
	bar.end()
	if err != nil {
		return failed(err, ledgerHint(err, "the ledger must be readable; its files belong to the user that runs serve"))
	}
	if form == "json" {
		err = writeLine(e.out, struct {
			OK bool `json:"ok"`
			ledger.Report
		}{r.Problem == nil, r})
	} else {
		printVerified(e.out, &r)
	}
	if err == nil && r.Problem != nil {
		err = errFindings
	}
	return err
}

func verifyOptions(c *cobra.Command) (ledger.VerifyOptions, error) {
	var o ledger.VerifyOptions
	keys, _ := c.Flags().GetStringArray("public-key")
	for i, file := range keys {
		pub, err := ledger.LoadPublicKey(file)
		if err != nil {
			return o, usage(err, "it is the copy of ledger.pub that was taken when the ledger began")
		}
		if i == 0 {
			o.PublicKey = pub
		} else {
			o.FormerKeys = append(o.FormerKeys, ed25519.PublicKey(pub))
		}
	}
	files, _ := c.Flags().GetStringArray("checkpoint")
	for _, file := range files {
		p, err := ledger.ReadCheckpoint(file)
		if err != nil {
			return o, usage(err, "it is a copy of checkpoint.json, or one checkpoint line of the ledger")
		}
		o.Checkpoints = append(o.Checkpoints, p)
	}
	return o, nil
}

func printVerified(w io.Writer, r *ledger.Report) {
	fmt.Fprintf(w, "%d segments, records %d to %d: %d decisions, %d outcomes, %d gaps\n", r.Segments, r.First, r.Last, r.Decisions, r.Outcomes, r.Gaps)
	if r.Removed > 0 {
		fmt.Fprintf(w, "%d records were removed, their tenant's retention being over; their digests hold the chain together\n", r.Removed)
	}
	for _, t := range r.Torn {
		fmt.Fprintf(w, "%s ends with %d bytes of a write that was cut short; they were never acknowledged\n", t.Segment, t.Bytes)
	}
	for _, name := range r.SetAside {
		fmt.Fprintf(w, "%s was set aside as damaged and is not verified\n", name)
	}
	switch {
	case len(r.Keys) == 0:
		fmt.Fprintln(w, "no signature is checked: there is no public key; see --public-key")
	case r.Signed == nil:
		fmt.Fprintln(w, "nothing is signed yet")
	default:
		fmt.Fprintf(w, "%d checkpoints hold; the last, of %s, proves all up to record %d with the key %s; %d records came after it\n",
			r.Checkpoints, r.Signed.Time.Format(time.RFC3339), r.Signed.Commit, r.Signed.Key, r.Unsigned)
	}
	if r.TooOld > 0 {
		fmt.Fprintf(w, "%d of the given checkpoints are of records that are no longer kept, and prove nothing here\n", r.TooOld)
	}
	if r.Problem == nil {
		fmt.Fprintln(w, "the chain holds")
		return
	}
	fmt.Fprintf(w, "the chain is broken: %s\n", r.Problem)
	fmt.Fprintln(w, "what to do: copy the data directory as it is, as evidence; what comes before that record holds. Compare with a backup or an export, and find out who could write there")
}

// pruned is what prune removed, or would remove.
type pruned struct {
	DryRun  bool      `json:"dry_run"`
	Before  time.Time `json:"before"`
	Removed []oldFile `json:"removed"`
}

type oldFile struct {
	Name  string `json:"name"`
	Bytes int64  `json:"bytes"`
}

func pruneLedger(c *cobra.Command, e environment) error {
	form, err := format(c, ledgerFormats...)
	if err != nil {
		return err
	}
	text, _ := c.Flags().GetString("older-than")
	age, err := config.ParseDuration(text)
	if err != nil || age <= 0 {
		return usage(fmt.Errorf("--older-than %q is not a duration above zero", text), "write how long records are kept, such as --older-than 30d")
	}
	dir, err := ledgerDirectory(c, e)
	if err != nil {
		return err
	}
	dry, _ := c.Flags().GetBool("dry-run")
	done := pruned{DryRun: dry, Before: time.Now().Add(-age).UTC(), Removed: []oldFile{}}
	due, err := ledger.WouldPrune(dir, done.Before)
	if err == nil && !dry {
		_, err = ledger.Prune(dir, done.Before)
	}
	if err != nil {
		return failed(err, ledgerHint(err, "its files belong to the user that runs serve; partnerguard ledger verify says what is wrong with them"))
	}
	for _, s := range due {
		done.Removed = append(done.Removed, oldFile{s.Name, s.Bytes})
	}
	if form == "json" {
		return writeLine(e.out, done)
	}
	verb, total := "removed", int64(0)
	if dry {
		verb = "would be removed"
	}
	for _, s := range done.Removed {
		fmt.Fprintf(e.out, "%s %s, %d bytes\n", s.Name, verb, s.Bytes)
		total += s.Bytes
	}
	if len(done.Removed) == 0 {
		fmt.Fprintf(e.out, "nothing ended before %s\n", done.Before.Format(time.RFC3339))
		return nil
	}
	fmt.Fprintf(e.out, "%d files, %d bytes %s\n", len(done.Removed), total, verb)
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
		return failed(err, ledgerHint(err, "stop the guard that writes there first"))
	}
	fmt.Fprintf(e.out, "the store is rebuilt from %d records\n", records)
	return nil
}

// writeLine writes v as one line of JSON.
func writeLine(w io.Writer, v any) error {
	out := json.NewEncoder(w)
	out.SetEscapeHTML(false)
	return out.Encode(v)
}

// percentage shows on a terminal how much of something is done.
type percentage struct {
	out   io.Writer
	quiet bool
	next  time.Time // not before this again
	shown bool
}

func (p *percentage) show(done, total int64) {
	now := time.Now()
	if p.quiet || total == 0 || now.Before(p.next) {
		return
	}
	p.next, p.shown = now.Add(200*time.Millisecond), true
	fmt.Fprintf(p.out, "\r\x1b[K%d %% of %d MiB", done*100/total, total>>20)
}

// end clears the line.
func (p *percentage) end() {
	if p.shown {
		fmt.Fprint(p.out, "\r\x1b[K")
	}
}
