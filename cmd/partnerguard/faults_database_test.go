//go:build linux

package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/partnerguard/partnerguard/internal/emulator"
	"github.com/partnerguard/partnerguard/internal/pgtest"
)

// databaseFault is a fleet under load, whose database is in for trouble.
type databaseFault struct {
	t      *testing.T
	name   string // of the database
	secret string // the file that holds the URL
	guards []*scene
	loads  []*crowd
	loaded []resources
}

// onDatabase starts guards that share a database, and their load. The URL is that of
// the fleet.
func onDatabase(t *testing.T, server *pgtest.Server, name, url string, guards ...string) *databaseFault {
	t.Helper()
	f := &databaseFault{t: t, name: name, secret: filepath.Join(t.TempDir(), "store-url")}
	write(t, f.secret, url+"\n")
	for _, guard := range guards {
		s := play(t, startEmulator(t, emulator.Config{}), stage{
			more: fmt.Sprintf("store: {postgres: %q}", "file:"+f.secret),
			env:  []string{"PARTNERGUARD_INSTANCE=" + guard},
		})
		s.database, s.instance = server.URL(name), guard
		s.secrets.secrets["pässword"] = "database's password"
		s.secrets.secrets["p%C3%A4ssword"] = "database's password"
		f.guards = append(f.guards, s)
	}
	for _, s := range f.guards {
		f.loads = append(f.loads, s.underLoad(crowdConfig{clients: 8, rate: 80}))
	}
	for i, s := range f.guards {
		f.loads[i].awaitSound(60)
		f.loaded = append(f.loaded, s.resources())
	}
	f.awaitCalls(server, 60)
	return f
}

// await returns once each guard answered so many calls more.
func (f *databaseFault) await(n int64) {
	f.t.Helper()
	for _, l := range f.loads {
		l.await(n)
	}
}

// calls counts those of each guard that a server has.
func (f *databaseFault) calls(server *pgtest.Server) map[string]int {
	f.t.Helper()
	n := map[string]int{}
	if server.Rows(f.t, server.URL(f.name), "SELECT to_regclass('partnerguard.calls') IS NOT NULL")[0] == "t" {
		for _, row := range server.Rows(f.t, server.URL(f.name), "SELECT instance, count(*) FROM partnerguard.calls JOIN partnerguard.ledgers USING (ledger) GROUP BY 1") {
			instance, count, _ := strings.Cut(row, "|")
			n[instance], _ = strconv.Atoi(count)
		}
	}
	return n
}

// awaitCalls returns once a server has so many calls more of each guard.
func (f *databaseFault) awaitCalls(server *pgtest.Server, more int) {
	f.t.Helper()
	before := f.calls(server)
	awaiting(f.t, func() (string, bool) {
		now := f.calls(server)
		for _, s := range f.guards {
			if now[s.instance] < before[s.instance]+more {
				return fmt.Sprintf("%s has calls of %v, before of %v", server.Address(), now, before), false
			}
		}
		return "", true
	})
}

// sessions counts the guards that are connected to a server.
func (f *databaseFault) sessions(server *pgtest.Server) string {
	f.t.Helper()
	return server.Rows(f.t, server.URL(f.name), "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'partnerguard guard-%'")[0]
}

// disconnect ends the guards' connections to a server.
func (f *databaseFault) disconnect(server *pgtest.Server) {
	f.t.Helper()
	server.Exec(f.t, server.URL(f.name), "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'partnerguard guard-%'")
}

// awaitDegraded returns once every guard says that its store does not get on, and says
// all of parts of it.
func (f *databaseFault) awaitDegraded(parts ...string) {
	f.t.Helper()
	for _, s := range f.guards {
		s.awaitReady(200, append(slices.Clone(parts), "store degraded: ")...)
		if n := metric(f.t, s.guardProcess, `partnerguard_degraded{part="store"}`); n != 1 {
			f.t.Errorf("the metric says that the store of %s is degraded: %v", s.instance, n)
		}
	}
}

// awaitHint returns once every guard's log says what to do about its store.
func (f *databaseFault) awaitHint(hint string) {
	f.t.Helper()
	for _, s := range f.guards {
		s.awaitText(`"msg":"store"`, `"event":"store_failing"`, `"hint":"`+hint)
	}
}

// awaitCaughtUp returns once every guard's store is well and at the end of its ledger.
func (f *databaseFault) awaitCaughtUp() {
	f.t.Helper()
	for _, s := range f.guards {
		s.awaitReady(200, "store ok")
		awaiting(f.t, func() (string, bool) {
			m := metrics(f.t, s.guardProcess)
			degraded, lag := m[`partnerguard_degraded{part="store"}`], m["partnerguard_store_lag_seconds"]
			return fmt.Sprintf("degraded %v, lag %v s", degraded, lag), degraded == 0 && lag < 1
		})
	}
}

// end stops the load and the guards, and checks that nobody who called noticed, and
// that the database has every call once. away is when the trouble began, back when it
// ended. calls of each guard at least were made in between.
func (f *databaseFault) end(away, back time.Time, calls int) {
	t := f.t
	t.Helper()
	total, reasons := 0, map[string]int{}
	for i, s := range f.guards {
		seen := f.loads[i].stop()
		total += len(seen)
		for _, c := range seen {
			reasons[c.reason]++
		}
		want(t, s.instance, seen, 200, s.as)
		during := between(seen, away, back)
		want(t, s.instance+" without the database", during, calls, s.as)
		if p99 := percentile(during, 99); p99 > time.Second {
			t.Errorf("%s: without the database 1 call in 100 took more than %v", s.instance, p99)
		}
		s.awaitText(`"msg":"store"`, `"event":"store_failing"`)
		s.awaitText(`"msg":"store"`, `"event":"store_recovered"`)
		if lines := s.said(`"msg":"store"`); len(lines) > 20 {
			t.Errorf("%s logged %d lines about the store: %s", s.instance, len(lines), lines)
		}
		s.invariants(seen, f.loaded[i], leave{}) // and that the store agrees with the ledger
		if stdout, stderr, code := partnerguard(t, "ledger", "verify", "--data-dir", s.dir, "--store", "file:"+f.secret); code != 0 {
			t.Errorf("ledger verify of %s against the database: exit %d\n%s%s", s.instance, code, stdout, stderr)
		}
	}
	stdout, stderr, code := partnerguard(t, "report", "--store", "file:"+f.secret, "--format", "json")
	var report struct {
		Calls, Open  int
		Integrations []struct {
			MFAPresent int `json:"mfa_present"`
			MFAMissing int `json:"mfa_missing"`
		}
	}
	if err := json.Unmarshal([]byte(stdout), &report); err != nil || code != 0 {
		t.Fatalf("report: exit %d, %v\n%s%s", code, err, stdout, stderr)
	}
	present, missing := 0, 0
	for _, in := range report.Integrations {
		present, missing = present+in.MFAPresent, missing+in.MFAMissing
	}
	if report.Calls != total || report.Open != 0 || present != reasons["mfa_present"] || missing != reasons["mfa_missing"] {
		t.Errorf("report counts %d calls, %d open, %d with MFA, %d without; want %d, none open, %d and %d",
			report.Calls, report.Open, present, missing, total, reasons["mfa_present"], reasons["mfa_missing"])
	}
}

// The primary goes away, and a standby takes its place. What it lacks the guards bring
// again.
func TestFaultsOfDatabaseFailover(t *testing.T) {
	t.Parallel()
	var side sideBySide
	defer side.wait()
	side.run(t, "the primary is lost, and its last commits", func(t *testing.T) {
		primary := pgtest.Start(t)
		standby := primary.Standby(t)
		const name = "fleet"
		primary.Exec(t, primary.URL("postgres"), "CREATE DATABASE "+name)
		f := onDatabase(t, primary, name, pgtest.URLOfAny(t, name, primary, standby), "guard-1", "guard-2")
		f.awaitCalls(standby, 1) // it follows
		standby.Detach(t)
		f.awaitCalls(primary, 60)
		kept := fleetCalls(t, standby.URL(name))
		primary.Kill(t)
		away := time.Now()
		f.awaitDegraded("read only connection")
		f.awaitHint("no server that the URL names takes writes")
		f.await(100)
		promoted := time.Now()
		standby.Promote(t)
		f.awaitCaughtUp()
		back := time.Now()
		t.Logf("the database was away for %v, and up to date %v after the promotion", promoted.Sub(away).Round(time.Millisecond), back.Sub(promoted).Round(time.Millisecond))

		// The old primary comes back, and takes writes. Nobody goes there.
		primary.Restart(t)
		before := fleetCalls(t, primary.URL(name))
		lost := 0
		for id := range before {
			if _, ok := kept[id]; !ok {
				lost++
			}
		}
		if lost < 100 {
			t.Errorf("the standby lacked %d calls: too few to show anything", lost)
		}
		t.Logf("of %d calls in the primary the standby lacked %d", len(before), lost)
		f.awaitCalls(standby, 50)
		if n := len(fleetCalls(t, primary.URL(name))); n != len(before) || f.sessions(primary) != "0" {
			t.Errorf("the old primary has %d calls, before %d, and %s guards are connected to it", n, len(before), f.sessions(primary))
		}

		// Until a connection breaks: then the first that takes writes gets them. When that
		// one is gone for good, the other misses nothing.
		f.disconnect(standby)
		f.awaitCalls(primary, 30)
		primary.Stop(t)
		f.await(50)
		f.awaitCaughtUp()
		for _, s := range f.guards {
			s.database = standby.URL(name)
		}
		f.end(away, back, 80)
	})
	side.run(t, "a switch-over", func(t *testing.T) {
		primary := pgtest.Start(t)
		standby := primary.Standby(t)
		const name = "fleet"
		primary.Exec(t, primary.URL("postgres"), "CREATE DATABASE "+name)
		f := onDatabase(t, primary, name, pgtest.URLOfAny(t, name, primary, standby), "guard-1", "guard-2")
		f.awaitCalls(standby, 1)
		away := time.Now()
		primary.Stop(t)
		standby.Promote(t)
		f.await(60)
		f.awaitCaughtUp()
		back := time.Now()
		t.Logf("up to date %v after the switch-over began", back.Sub(away).Round(time.Millisecond))
		f.awaitCalls(standby, 50)
		for _, s := range f.guards {
			s.database = standby.URL(name)
		}
		f.end(away, back, 50)
	})
}

// databaseDisk is a small file system that a database server may use.
func databaseDisk(t *testing.T, size string) string {
	t.Helper()
	parent := databaseDir(t)
	disk := filepath.Join(parent, "disk")
	mount(t, disk, "-t", "tmpfs", "-o", "size="+size+",mode=1777", "tmpfs")
	return disk
}

// databaseDir is a directory that a database server may use. Those of t.TempDir are
// for this user alone.
func databaseDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "database")
	if err == nil {
		err = os.Chmod(dir, 0o777)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// The database server's disk is full. It refuses to write, or ends where it cannot even
// write its log.
func TestFaultsOfFullDatabaseDisk(t *testing.T) {
	t.Parallel()
	var side sideBySide
	defer side.wait()
	const name = "fleet"
	side.run(t, "no room for tables", func(t *testing.T) {
		disk := databaseDisk(t, "96m")
		server := pgtest.StartOn(t, pgtest.Disks{Data: disk, WAL: databaseDir(t)})
		server.Exec(t, server.URL("postgres"), "CREATE DATABASE "+name)
		f := onDatabase(t, server, name, server.URL(name), "guard-1")
		empty := fill(t, disk)
		away := time.Now()
		f.awaitDegraded("No space left on device")
		f.awaitHint("give the database server room")
		f.await(200)
		back := time.Now()
		empty()
		f.awaitCaughtUp()
		t.Logf("up to date %v after there was room", time.Since(back).Round(time.Millisecond))
		f.end(away, back, 150)
	})
	side.run(t, "no room for the log", func(t *testing.T) {
		disk := databaseDisk(t, "64m")
		server := pgtest.StartOn(t, pgtest.Disks{WAL: disk})
		server.Exec(t, server.URL("postgres"), "CREATE DATABASE "+name)
		f := onDatabase(t, server, name, server.URL(name), "guard-1")
		empty := fill(t, disk)
		server.AwaitEnd(t) // PANIC
		away := time.Now()
		f.awaitDegraded()
		f.await(150)
		back := time.Now()
		empty()
		server.Restart(t)
		f.awaitCaughtUp()
		t.Logf("up to date %v after there was room", time.Since(back).Round(time.Millisecond))
		f.end(away, back, 100)
	})
}

// The password changes while the guard runs.
func TestFaultsOfDatabasePassword(t *testing.T) {
	t.Parallel()
	server := pgtest.Start(t)
	const name = "fleet"
	server.Exec(t, server.URL("postgres"), "CREATE DATABASE "+name)
	change := func(password string) string { return server.NewRole(t, server.URL(name), "guards", password) }
	url := change("first-pässword")
	server.Exec(t, server.URL(name), "CREATE SCHEMA partnerguard AUTHORIZATION guards")
	f := onDatabase(t, server, name, url, "guard-1")
	away := time.Now()

	// The secret first, as a rotation does that knows its readers.
	write(t, f.secret, change("second-pässword"))
	f.guards[0].await(0, "reloaded")
	f.disconnect(server)
	f.awaitCalls(server, 60)
	f.awaitCaughtUp()

	// The database first: the guard is locked out until it has the secret.
	url = change("third-pässword")
	f.disconnect(server)
	f.awaitDegraded("password authentication failed")
	f.awaitHint("check user and password in the secret")
	f.await(100)
	changed := time.Now()
	write(t, f.secret, url)
	f.awaitCaughtUp()
	t.Logf("up to date %v after the secret changed", time.Since(changed).Round(time.Millisecond))

	// What is no URL does not replace one.
	write(t, f.secret, "no URL at all\n")
	f.disconnect(server)
	f.guards[0].awaitReady(200, "config degraded: ", "the PostgreSQL URL is not valid")
	f.awaitCalls(server, 60)
	f.awaitCaughtUp()
	write(t, f.secret, url)
	f.guards[0].awaitReady(200, "config ok")
	f.end(away, time.Now(), 200)
}
