package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/partnerguard/partnerguard/internal/config"
	"github.com/partnerguard/partnerguard/telemetry/ledger"
	"github.com/partnerguard/partnerguard/telemetry/store"
	"github.com/spf13/cobra"
)

// storePlace is where the store is that a command reads.
type storePlace struct {
	dir      string        // data directory
	postgres config.Secret // of the fleet's database; empty: SQLite in dir
	env      func(string) string
}

// storeFlag adds --store; storeAt finds its value.
func storeFlag(c *cobra.Command) {
	c.Flags().String("store", "", "`REFERENCE` to the URL of the fleet's PostgreSQL, env:NAME or file:PATH (default: store.postgres of the configuration, else SQLite in the data directory)")
}

// storeAt is the store that c reads: that of --store, else of cfg, which may be nil,
// else the one in dir.
func storeAt(c *cobra.Command, e environment, dir string, cfg *config.Config) (storePlace, error) {
	at := storePlace{dir: dir, env: e.env}
	flag, _ := c.Flags().GetString("store")
	switch {
	case flag != "":
		at.postgres = config.Secret(flag)
		if _, err := at.postgres.Read(e.env); err != nil {
			return at, usage(fmt.Errorf("--store: %w", err), "write env:NAME of an environment variable, or file:PATH of a file, that holds the URL")
		}
	case cfg != nil:
		at.postgres = cfg.Store.Postgres
	}
	return at, nil
}

// storeOf opens the store that c reads.
func storeOf(c *cobra.Command, e environment, dir string) (store.Reader, error) {
	cfg, err := givenConfiguration(c)
	if err != nil {
		return nil, err
	}
	at, err := storeAt(c, e, dir, cfg)
	if err != nil {
		return nil, err
	}
	return openStore(c.Context(), at)
}

// url is that of the fleet's database, empty for SQLite.
func (at storePlace) url() (string, error) {
	url, err := at.postgres.Read(at.env)
	if err != nil {
		return "", usage(fmt.Errorf("store.postgres: %w", err), "it refers to the URL of the fleet's PostgreSQL")
	}
	return url, nil
}

// describe says where the store is, without asking it, and never the password.
func (at storePlace) describe() (string, error) {
	url, err := at.url()
	if err != nil {
		return "", err
	}
	if url == "" {
		return "SQLite in the data directory", nil
	}
	text, err := store.DescribePostgres(url)
	if err != nil {
		return "", usage(fmt.Errorf("store.postgres: %w", err), hintIn(err))
	}
	return text, nil
}

// hintIn is what err says to do next.
func hintIn(err error) string {
	var h interface{ Hint() string }
	if errors.As(err, &h) {
		return h.Hint()
	}
	return ""
}

// openStore opens the store for reading.
func openStore(ctx context.Context, at storePlace) (r store.Reader, err error) {
	hint := "see --data-dir"
	url, err := at.url()
	switch {
	case err != nil:
		return nil, err
	case url != "":
		hint = "the guards go on without it; their own calls are in the ledgers of their data directories"
		r, err = store.OpenPostgresReader(ctx, url)
	default:
		r, err = store.OpenReader(at.dir)
	}
	if err == nil {
		return r, nil
	}
	return nil, failed(err, cmp.Or(hintIn(err), hint))
}

// userRefs gives reconcile and signins the user_refs of users whose names must not be
// kept; nil where they may. cfg says which. It is nil when nobody gave one: then verified
// users of whom none has a name show that the guard in dir keeps none.
func userRefs(ctx context.Context, dir string, cfg *config.Config, records store.Reader) (func(tenantID, objectID string) string, error) {
	if cfg != nil && cfg.Ledger.Identities != config.PseudonymousIdentities {
		return nil, nil
	}
	if cfg == nil {
		named, err := records.Identities(ctx)
		if err != nil || len(named) > 0 {
			return nil, err
		}
		callers, err := records.Callers(ctx, time.Time{}, time.Time{})
		if err != nil || !slices.ContainsFunc(callers, func(c store.Caller) bool { return c.Verified && c.UserRef != "" }) {
			return nil, err
		}
	}
	refs, err := ledger.UserRefs(dir)
	if err != nil {
		return nil, failed(err, "give --data-dir of the guard: without its key, users who have no names cannot be told apart")
	}
	return refs, nil
}

// tellLag says on w when calls are missing in the store that the ledgers have.
func tellLag(ctx context.Context, w io.Writer, r store.Reader) {
	all, err := r.Instances(ctx)
	if err != nil {
		return // it is said besides; what was asked for stands
	}
	for _, i := range all {
		switch {
		case i.Lag <= 5*time.Second:
		case i.Heard.IsZero():
			fmt.Fprintf(w, "partnerguard: the store lies %s behind the ledger; is the guard running?\n", i.Lag.Round(time.Second))
		case time.Since(i.Heard) > i.Lag/2:
			fmt.Fprintf(w, "partnerguard: nothing was heard from guard %s for %s; its latest calls may be missing\n", i.Name, i.Lag.Round(time.Second))
		default:
			fmt.Fprintf(w, "partnerguard: the store lies %s behind the ledger of guard %s\n", i.Lag.Round(time.Second), i.Name)
		}
	}
}

// fleetCheckpoints are what the fleet's database has of the signatures of the ledger in
// dir, if c names such a database.
func fleetCheckpoints(c *cobra.Command, e environment, dir string) ([]ledger.Checkpoint, error) {
	url, err := fleetURL(c, e, dir)
	if err != nil || url == "" {
		return nil, err
	}
	id, err := ledger.ID(dir)
	if err != nil {
		return nil, failed(err, "its identity stands in the header of each of its files")
	}
	r, err := store.OpenPostgresReader(c.Context(), url)
	if err != nil {
		return nil, failed(err, hintIn(err))
	}
	defer r.Close()
	return r.Checkpoints(c.Context(), id)
}
