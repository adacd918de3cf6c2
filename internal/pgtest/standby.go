package pgtest

import (
	"net/url"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Standby starts a server that follows this one by streaming replication, without
// making it wait: what was committed last may not have arrived. It takes queries, and
// no writes until it is promoted. It is gone with the test.
func (s *Server) Standby(t testing.TB) *Server {
	t.Helper()
	bin := programs(t)
	standby, err := newServer(Disks{})
	if standby != nil {
		t.Cleanup(standby.remove)
	}
	if err != nil {
		t.Fatal(err)
	}
	backup := exec.Command(filepath.Join(bin, "pg_basebackup"), "--pgdata", standby.data(), "--dbname", s.URL("postgres"),
		"--write-recovery-conf", "--checkpoint", "fast", "--wal-method", "stream", "--no-sync")
	standby.user.run(backup)
	backup.Dir = standby.home
	if out, err := backup.CombinedOutput(); err != nil {
		t.Fatalf("pg_basebackup: %v\n%s", err, out)
	}
	if err := standby.startAnywhere(bin); err != nil {
		t.Fatal(err)
	}
	return standby
}

// Detach makes a standby receive nothing from now on, as when its network fails: what
// its primary commits is lost with the primary.
func (s *Server) Detach(t testing.TB) {
	t.Helper()
	s.Exec(t, s.URL("postgres"), "ALTER SYSTEM SET primary_conninfo = ''")
	s.Exec(t, s.URL("postgres"), "SELECT pg_reload_conf()")
	deadline := time.Now().Add(startTimeout)
	for s.Rows(t, s.URL("postgres"), "SELECT count(*) FROM pg_stat_wal_receiver")[0] != "0" {
		if time.Now().After(deadline) {
			t.Fatalf("the standby still receives:\n%s", s.log())
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// Promote makes a standby take writes, and returns when it does.
func (s *Server) Promote(t testing.TB) {
	t.Helper()
	if got := s.Rows(t, s.URL("postgres"), "SELECT pg_promote(true, 60)"); got[0] != "t" {
		t.Fatalf("the standby is not promoted:\n%s", s.log())
	}
}

// URLOfAny is that of a database on whichever of the servers takes writes, looked for
// in their order.
func URLOfAny(t testing.TB, database string, servers ...*Server) string {
	t.Helper()
	u, err := url.Parse(servers[0].URL(database))
	if err != nil {
		t.Fatal(err)
	}
	var hosts []string
	for _, s := range servers {
		hosts = append(hosts, s.Address())
	}
	u.Host = strings.Join(hosts, ",")
	u.RawQuery += "&target_session_attrs=read-write"
	return u.String()
}
