package main

import (
	"crypto/ed25519"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"time"

	"github.com/partnerguard/partnerguard/telemetry/ledger"
	"github.com/spf13/cobra"
)

var exportFormats = []string{ledger.ExportLines, ledger.ExportCSV, ledger.ExportParquet}

func newExport(e environment) *cobra.Command {
	c := &cobra.Command{
		Use:   "export -o FILE",
		Short: "Export calls as JSON Lines, CSV or Parquet, with a signed proof",
		Long: `Export calls from the ledger to FILE, and beside it FILE.proof.json: what the file
holds, its SHA-256, and the place on the ledger's chain, signed with the ledger's key.
All that is read is verified on the way. A guard may be writing meanwhile.

  jsonl    the ledger's own lines, byte for byte, whole groups with their commits, so
           that the chain in them can be checked; with a filter, the lines of other
           calls stand there as removed, by their digest
  csv      a row for each call, decision and outcome joined; RFC 4180, and nothing in
           it that a spreadsheet takes for a formula
  parquet  the same with typed columns, compressed

--since and --until go by when the guard decided; a row has its outcome also where
that came later. partnerguard ledger verify --proof FILE.proof.json checks the result.`,
		Example: `  partnerguard ledger export --since 30d --format parquet -o calls.parquet
  partnerguard ledger export --integration nightly-billing --format csv -o billing.csv
  partnerguard ledger verify --proof billing.csv.proof.json`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return exportLedger(c, e) },
	}
	dataFlag(c)
	f := c.Flags()
	formatFlag(c, exportFormats...)
	f.StringP("output", "o", "", "`FILE` to write (required)")
	c.MarkFlagFilename("output")
	f.String("since", "", "from when on: so long ago, such as 30d, or a time (RFC 3339)")
	f.String("until", "", "up to when: so long ago, or a time")
	f.String("integration", "", "name of the integration")
	f.String("user", "", "user principal name, object id or user_ref")
	f.String("app", "", "application id")
	f.String("customer", "", "customer tenant id")
	f.String("tenant", "", "tenant id of the caller")
	f.String("reason", "", "the guard's reason, such as mfa_missing")
	f.String("key", "", "`FILE` of the key that signs, where the configuration has a ledger.key (default: that in the data directory)")
	f.Bool("force", false, "replace FILE and its proof if they are there")
	f.Bool("damaged", false, "pass over what does not verify, and name it in the proof")
	f.Bool("quiet", false, "write nothing when it went well")
	return c
}

func exportLedger(c *cobra.Command, e environment) error {
	form, err := format(c, exportFormats...)
	if err != nil {
		return err
	}
	text := func(name string) string {
		s, _ := c.Flags().GetString(name)
		return s
	}
	if text("output") == "" {
		return usage(errors.New("export needs a file to write"), "write -o FILE; its proof goes to FILE"+ledger.ProofSuffix)
	}
	cfg := ledger.ExportConfig{Path: text("output"), Format: form, Filter: ledger.ExportFilter{
		Integration: text("integration"), App: text("app"), Customer: text("customer"), Tenant: text("tenant"), Reason: text("reason"),
	}}
	for name, at := range map[string]*time.Time{"since": &cfg.Filter.Since, "until": &cfg.Filter.Until} {
		if s := text(name); s != "" {
			if *at, err = lookBack(s); err != nil {
				return err
			}
		}
	}
	if !cfg.Filter.Until.IsZero() && !cfg.Filter.Since.Before(cfg.Filter.Until) {
		return usage(errors.New("--until is not after --since"), "write the earlier point for --since")
	}
	dir, err := ledgerDirectory(c, e)
	if err != nil {
		return err
	}
	if user := text("user"); user != "" {
		found, err := ledger.FindUser(dir, user)
		if err != nil {
			return failed(err, "the files of the data directory belong to the user that runs serve")
		}
		if ledger.IsUserRef(user) {
			found = append(found, ledger.Identity{UserRef: user})
		}
		if len(found) == 0 {
			return failed(fmt.Errorf("nobody in %s is called %q", dir, user), "write the user_ref, as partnerguard calls --format json shows it")
		}
		seen := map[string]bool{}
		for _, id := range found {
			if !seen[id.UserRef] {
				seen[id.UserRef] = true
				cfg.Filter.UserRefs = append(cfg.Filter.UserRefs, id.UserRef)
			}
		}
	}
	if file := text("key"); file != "" {
		if cfg.Key, err = ledger.LoadKey(file); err != nil {
			return usage(err, "it is the file that ledger.key of the configuration names")
		}
	}
	cfg.Overwrite, _ = c.Flags().GetBool("force")
	cfg.Damaged, _ = c.Flags().GetBool("damaged")
	bar := &percentage{out: e.err, quiet: !isTerminal(e.err)}
	cfg.Progress = bar.show
	proof, err := ledger.Export(c.Context(), dir, cfg)
	bar.end()
	if err != nil {
		return failed(err, ledgerHint(err, exportHint(err)))
	}
	if quiet, _ := c.Flags().GetBool("quiet"); quiet {
		return nil
	}
	return printProof(e.out, cfg.Path, proof)
}

// exportHint is the next step after an export that failed.
func exportHint(err error) string {
	var damage *ledger.DamageError
	switch {
	case errors.As(err, &damage):
		return "partnerguard ledger verify says more; --damaged exports the rest and names in the proof what is missing"
	case errors.Is(err, fs.ErrExist):
		return "--force replaces it"
	case errors.Is(err, fs.ErrNotExist):
		return "is this the data directory of a guard? A ledger.key that the configuration names is given by --key"
	case errors.Is(err, fs.ErrPermission):
		return "run it as the user that runs serve, and write to a directory of that user"
	}
	return ""
}

func printProof(w io.Writer, path string, p *ledger.Proof) error {
	unit := "calls"
	if p.File.Format == ledger.ExportLines {
		unit = "lines"
	}
	fmt.Fprintf(w, "%s: %d %s, %d bytes, SHA-256 %s\n", path, p.File.Rows, unit, p.File.Bytes, p.File.SHA256)
	fmt.Fprintf(w, "%s; verified from record %d to %d of the ledger %s\n", p.Filter, p.After.Commit+1, p.Head.Commit, p.Ledger)
	if p.Open > 0 {
		fmt.Fprintf(w, "%d calls have no outcome here\n", p.Open)
	}
	if p.GivenUp > 0 {
		fmt.Fprintf(w, "%d of them may have one in the ledger: too many were open at once\n", p.GivenUp)
	}
	if p.Removed > 0 {
		fmt.Fprintf(w, "%d records in the range were removed by retention\n", p.Removed)
	}
	for _, d := range p.Damage {
		fmt.Fprintf(w, "not exported, because it does not verify: %s\n", d)
	}
	_, err := fmt.Fprintf(w, "proof: %s%s, signed with the key %s\n", path, ledger.ProofSuffix, p.Key)
	return err
}

// provenExport is what verify --proof found.
type provenExport struct {
	OK bool `json:"ok"`
	ledger.ProofReport
	Ledger *ledger.Report `json:"ledger,omitempty"` // nil without a data directory
}

// verifyProof checks an exported file by its proof: against the key, and against the
// ledger where the data directory holds the one it comes from.
func verifyProof(c *cobra.Command, e environment, path, form string, o ledger.VerifyOptions) error {
	dir, err := directory(c, e)
	if err != nil {
		dir = "" // an auditor has none
	}
	pub := o.PublicKey
	id, err := ledger.ID(dir)
	here := dir != "" && err == nil
	if pub == nil && here {
		if pub, err = keyOfProof(dir, path); err != nil {
			return failed(err, "give the ledger's public key with --public-key")
		}
	}
	p, err := ledger.VerifyProof(path, pub)
	if err != nil {
		return failed(err, "the proof is FILE"+ledger.ProofSuffix+", and FILE lies beside it")
	}
	found := provenExport{ProofReport: p}
	if here = here && id == p.Proof.Ledger; here && p.Problem == "" {
		o.Checkpoints = append(o.Checkpoints, p.Proof.Marks()...)
		bar := &percentage{out: e.err, quiet: !isTerminal(e.err)}
		o.Progress = bar.show
		r, err := ledger.Verify(dir, o)
		bar.end()
		if err != nil {
			return failed(err, ledgerHint(err, "the ledger must be readable; its files belong to the user that runs serve"))
		}
		found.Ledger = &r
	}
	found.OK = p.Problem == "" && (found.Ledger == nil || found.Ledger.Problem == nil)
	if form == "json" {
		err = writeLine(e.out, found)
	} else {
		err = found.print(e.out)
	}
	if err == nil && !found.OK {
		err = errFindings
	}
	return err
}

// keyOfProof is the public key in the data directory that the proof was signed with:
// the present one or a former one. Nil when the proof says nothing of its key.
func keyOfProof(dir, path string) (ed25519.PublicKey, error) {
	p, err := ledger.VerifyProof(path, nil)
	if err != nil || p.Proof.Key == "" {
		return nil, nil // said when it is checked
	}
	former := filepath.Join(dir, "ledger-"+filepath.Base(p.Proof.Key)+".pub")
	if pub, err := ledger.LoadPublicKey(former); err == nil && ledger.KeyID(pub) == p.Proof.Key {
		return pub, nil
	}
	pub, err := ledger.LoadPublicKey(filepath.Join(dir, "ledger.pub"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return pub, err
}

func (f *provenExport) print(w io.Writer) error {
	p := &f.Proof
	if f.Problem != "" {
		_, err := fmt.Fprintf(w, "the export does not hold: %s\n", f.Problem)
		return err
	}
	unit := "calls"
	if p.File.Format == ledger.ExportLines {
		unit = "lines"
	}
	fmt.Fprintf(w, "%s is what was exported %s: %d %s, %s\n", p.File.Name, p.Time.Format(time.RFC3339), p.File.Rows, unit, printable(p.Filter))
	for _, d := range p.Damage {
		fmt.Fprintf(w, "not in it, because it did not verify: %s\n", printable(d))
	}
	if f.Trusted {
		fmt.Fprintf(w, "signed with the ledger's key %s\n", p.Key)
	} else {
		fmt.Fprintf(w, "signed with the key %s, which only the proof itself vouches for; give the ledger's with --public-key\n", p.Key)
	}
	switch r := f.Ledger; {
	case r == nil:
		fmt.Fprintf(w, "not compared with the ledger %s, which is not here\n", p.Ledger)
	case r.Problem != nil:
		fmt.Fprintf(w, "it is not on the chain of the ledger here: %s\n", r.Problem)
	case r.TooOld > 0:
		fmt.Fprintln(w, "the chain of the ledger here holds; it no longer reaches back to all of the export")
	default:
		fmt.Fprintf(w, "it is on the chain of the ledger here, records %d to %d\n", p.After.Commit+1, p.Head.Commit)
	}
	return nil
}
