//go:build linux

package main

import (
	"bytes"
	"database/sql"
	"os"
	"path/filepath"
	"testing"

	"github.com/partnerguard/partnerguard/internal/emulator"
)

// Another program holds the database: no call notices, the store says that it lags
// and why, and catches up.
func TestFaultsOfLockedStore(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	s := play(t, em, stage{})
	load := s.underLoad(crowdConfig{})
	load.awaitSound(100)
	loaded := s.resources()

	db, err := sql.Open("sqlite", "file:"+filepath.Join(s.dir, "store.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	holder, err := db.Conn(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer holder.Close()
	if _, err := holder.ExecContext(t.Context(), "PRAGMA busy_timeout = 5000; BEGIN IMMEDIATE"); err != nil {
		t.Fatal(err)
	}
	s.awaitReady(200, "store degraded: ", "another process holds the database")
	load.await(100)
	if lag := metric(t, s.guardProcess, "partnerguard_store_lag_seconds"); lag < 1 {
		t.Errorf("the store says it lags by %v s", lag)
	}
	if _, err := holder.ExecContext(t.Context(), "ROLLBACK"); err != nil {
		t.Fatal(err)
	}
	s.awaitReady(200, "store ok")
	load.awaitSound(30)
	calls := load.stop()
	want(t, "with a locked store", calls, 500, s.as)
	s.awaitText(`"msg":"store"`, `"event":"store_failing"`)
	s.awaitText(`"msg":"store"`, `"event":"store_recovered"`)
	s.invariants(calls, loaded, leave{})
}

// The database is removed, or another file takes its place, while it is in use: the
// guard notices, and builds it anew from the ledger.
func TestFaultsOfReplacedStore(t *testing.T) {
	t.Parallel()
	var side sideBySide
	defer side.wait()
	for _, fault := range []struct {
		name string
		do   func(path string) error
	}{
		{"removed", os.Remove},
		{"garbage in its place", func(path string) error {
			if err := os.WriteFile(path+".other", bytes.Repeat([]byte("garbage "), 4096), 0o600); err != nil {
				return err
			}
			return os.Rename(path+".other", path)
		}},
	} {
		side.run(t, fault.name, func(t *testing.T) {
			em := startEmulator(t, emulator.Config{})
			s := play(t, em, stage{})
			load := s.underLoad(crowdConfig{})
			load.awaitSound(100)
			loaded := s.resources()
			if err := fault.do(filepath.Join(s.dir, "store.db")); err != nil {
				t.Fatal(err)
			}
			s.awaitText(`"msg":"store"`, `"event":"store_damaged"`, `"file":"`+filepath.Join(s.dir, "store.db.damaged-"))
			s.awaitReady(200, "store ok")
			load.await(100)
			calls := load.stop()
			want(t, "without the store's file", calls, 200, s.as)
			s.invariants(calls, loaded, leave{})
		})
	}
}
