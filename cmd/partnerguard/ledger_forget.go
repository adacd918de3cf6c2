package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/partnerguard/partnerguard/telemetry"
	"github.com/partnerguard/partnerguard/telemetry/ledger"
	"github.com/partnerguard/partnerguard/telemetry/reconcile"
	"github.com/partnerguard/partnerguard/telemetry/store"
	"github.com/spf13/cobra"
)

var forgetFormats = []string{"text", "json"}

func newForget(e environment) *cobra.Command {
	c := &cobra.Command{
		Use:   "forget USER",
		Short: "Forget who a user is: the records stay, the name goes",
		Long: `Forget who a user is, by user principal name, object id or user_ref. The name goes
from identities.jsonl, from the kept results of reconcile and signins and from a fleet's
database (-c or --store), and does not come back with the user's next call. A guard may
be running meanwhile. Each guard of a fleet keeps names of its own: run it on each.

The records stay, and the chain with them: they hold the user_ref, a keyed hash.
Whoever has identities.key and the object id can compute it anew. Backups, logs and
exports made before still say what they said.`,
		Example: `  partnerguard ledger forget anna@contoso.example --dry-run
  partnerguard ledger forget anna@contoso.example
  partnerguard ledger forget --all            before a start with identities: pseudonymous`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error { return forget(c, e, args) },
	}
	configFlag(c)
	dataFlag(c)
	storeFlag(c)
	formatFlag(c, forgetFormats...)
	c.Flags().Bool("all", false, "forget everybody who is known by now")
	c.Flags().Bool("dry-run", false, "say who would be forgotten, and change nothing")
	return c
}

// forgetting is what forget did, or would do.
type forgetting struct {
	User    string          `json:"user,omitempty"` // as asked for; empty for all
	DryRun  bool            `json:"dry_run"`
	Users   []forgottenUser `json:"users"`
	Lines   int             `json:"lines"` // removed from identities.jsonl
	Files   []string        `json:"files"` // other files that were changed
	Fleet   bool            `json:"fleet"` // the fleet's database, too
	Remains []string        `json:"remains"`
}

type forgottenUser struct {
	UserRef  string   `json:"user_ref"`
	TenantID string   `json:"tid,omitempty"`
	ObjectID string   `json:"oid,omitempty"`
	UPNs     []string `json:"upns,omitempty"`
}

func forget(c *cobra.Command, e environment, args []string) error {
	all, _ := c.Flags().GetBool("all")
	if all == (len(args) == 1) || len(args) == 1 && strings.TrimSpace(args[0]) == "" {
		return usage(errors.New("forget takes one USER, or --all"), "write a user principal name, an object id or a user_ref, as partnerguard calls --format json shows them")
	}
	form, err := format(c, forgetFormats...)
	if err != nil {
		return err
	}
	dir, err := ledgerDirectory(c, e)
	if err != nil {
		return err
	}
	did := forgetting{Users: []forgottenUser{}, Files: []string{}}
	did.DryRun, _ = c.Flags().GetBool("dry-run")
	var names []ledger.Identity
	if all {
		known, err := ledger.Identities(dir)
		if err != nil {
			return failed(err, "the files of the data directory belong to the user that runs serve")
		}
		names = slices.Collect(maps.Values(known))
	} else {
		did.User = strings.TrimSpace(args[0])
		if names, err = ledger.FindUser(dir, did.User); err != nil {
			return failed(err, "the files of the data directory belong to the user that runs serve")
		}
		if len(names) == 0 && ledger.IsUserRef(did.User) {
			names = []ledger.Identity{{UserRef: did.User}} // so that no name ever comes
		}
	}
	url, err := fleetURL(c, e, dir)
	if err != nil {
		return err
	}
	var elsewhere []ledger.Identity
	if url != "" && !all {
		if elsewhere, err = namedInFleet(c.Context(), url, did.User, names); err != nil {
			return failed(err, hintIn(err))
		}
	}
	did.add(append(names, elsewhere...))

	if !did.DryRun {
		refs := make([]string, len(did.Users))
		for i, u := range did.Users {
			refs[i] = u.UserRef
		}
		if len(refs) > 0 {
			if did.Lines, err = ledger.Forget(dir, refs...); err != nil {
				return failed(err, "run it as the user that runs serve; nothing is lost if it runs again")
			}
		}
		if did.Files, err = reconcile.Forget(dir, did.about(all)); err != nil {
			return failed(err, "move the file away, or remove it, and run this again")
		}
		// Last, so that this guard does not bring the names again.
		if url != "" && len(refs) > 0 {
			if err := store.Forget(c.Context(), url, refs); err != nil {
				return failed(fmt.Errorf("forgotten here, not in the fleet's database: %w", err), cmp.Or(hintIn(err), "run this again once the database answers"))
			}
			did.Fleet = true
		}
	}
	if len(did.Users) == 0 && len(did.Files) == 0 && !all {
		return failed(fmt.Errorf("nothing in %s names %q", dir, did.User), "a user who never called has no name here; partnerguard report --by user lists those who did")
	}
	did.Remains = []string{
		"the records hold the user_ref, a keyed hash: whoever has identities.key and the object id can compute it anew",
		"backups, logs and exports made before say what they said",
		"what Microsoft lists of the user comes back with the next reconcile or signins",
	}
	if form == "json" {
		out := json.NewEncoder(e.out)
		out.SetEscapeHTML(false)
		return out.Encode(did)
	}
	return did.print(e.out)
}

// fleetURL is that of the fleet's database; empty when there is none.
func fleetURL(c *cobra.Command, e environment, dir string) (string, error) {
	cfg, err := givenConfiguration(c)
	if err != nil {
		return "", err
	}
	at, err := storeAt(c, e, dir, cfg)
	if err != nil {
		return "", err
	}
	return at.url()
}

// namedInFleet is whom user, or someone with one of the object ids of names, is to
// the other guards: each has a user_ref of its own for the same user.
func namedInFleet(ctx context.Context, url, user string, names []ledger.Identity) ([]ledger.Identity, error) {
	r, err := store.OpenPostgresReader(ctx, url)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	known, err := r.Identities(ctx)
	if err != nil {
		return nil, err
	}
	var found []ledger.Identity
	for ref, id := range known {
		is := ref == user || strings.EqualFold(id.UPN, user) || strings.EqualFold(id.ObjectID, user) ||
			slices.ContainsFunc(names, func(n ledger.Identity) bool {
				return n.ObjectID != "" && strings.EqualFold(n.ObjectID, id.ObjectID) && strings.EqualFold(n.TenantID, id.TenantID)
			})
		if is {
			found = append(found, id)
		}
	}
	return found, nil
}

// add sorts names by user.
func (f *forgetting) add(names []ledger.Identity) {
	byRef := map[string]*forgottenUser{}
	for _, id := range names {
		u := byRef[id.UserRef]
		if u == nil {
			u = &forgottenUser{UserRef: id.UserRef, TenantID: id.TenantID, ObjectID: id.ObjectID}
			byRef[id.UserRef] = u
		}
		if id.UPN != "" && !slices.Contains(u.UPNs, id.UPN) {
			u.UPNs = append(u.UPNs, id.UPN)
		}
	}
	for _, ref := range slices.Sorted(maps.Keys(byRef)) {
		f.Users = append(f.Users, *byRef[ref])
	}
}

// about reports whether a user that a result names is one of f's: by name, for that
// is all that some of Microsoft's rows have, by object id, or by the user_ref that
// stands in its place.
func (f *forgetting) about(all bool) func(upn, objectID string) bool {
	if all {
		return func(string, string) bool { return true }
	}
	who := map[string]bool{strings.ToLower(f.User): true}
	for _, u := range f.Users {
		who[strings.ToLower(u.ObjectID)], who[strings.ToLower(u.UserRef)] = true, true
		for _, n := range u.UPNs {
			who[strings.ToLower(n)] = true
		}
	}
	delete(who, "")
	return func(upn, objectID string) bool {
		return who[strings.ToLower(upn)] || who[strings.ToLower(objectID)]
	}
}

func (f *forgetting) print(w io.Writer) error {
	var b strings.Builder
	verb := "forgotten:"
	if f.DryRun {
		verb = "would be forgotten:"
	}
	for _, u := range f.Users {
		who := strings.Join(u.UPNs, ", ")
		if who == "" {
			who = "a user without a name"
		}
		fmt.Fprintf(&b, "%s %s", verb, printable(who))
		if u.ObjectID != "" {
			fmt.Fprintf(&b, ", object id %s of tenant %s", printable(u.ObjectID), printable(u.TenantID))
		}
		fmt.Fprintf(&b, ", user_ref %s\n", u.UserRef)
	}
	switch {
	case f.DryRun:
		if len(f.Users) == 0 {
			b.WriteString("nobody is known by name\n")
		}
		b.WriteString("nothing was changed\n")
	default:
		fmt.Fprintf(&b, "%d lines removed from identities.jsonl\n", f.Lines)
		if f.Fleet {
			b.WriteString("the fleet's database no longer says who that is; run this on its other guards too\n")
		}
		for _, name := range f.Files {
			fmt.Fprintf(&b, "%s no longer says who that is\n", name)
		}
		b.WriteString("what remains:\n")
		for _, r := range f.Remains {
			fmt.Fprintf(&b, "  %s\n", r)
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// printable is s without what could drive a terminal.
func printable(s string) string {
	q := telemetry.AppendString(nil, s)
	return string(q[1 : len(q)-1])
}
