package pgtest

import (
	"context"
	"errors"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

var shared Shared

func TestMain(m *testing.M) {
	code := m.Run()
	shared.Close()
	os.Exit(code)
}

func TestServerLosesNothingThatWasCommitted(t *testing.T) {
	s := Start(t)
	database := s.NewDatabase(t)
	s.Exec(t, database, "CREATE TABLE calls (n int, name text); INSERT INTO calls VALUES (1, 'one')")
	for name, end := range map[string]func(testing.TB){"stopped": s.Stop, "killed": s.Kill} {
		end(t)
		if _, err := query(database, "SELECT 1"); err == nil {
			t.Fatalf("a server that was %s takes connections", name)
		}
		s.Restart(t)
		s.Exec(t, database, "INSERT INTO calls VALUES (2, '"+name+"')")
	}
	s.Restart(t) // while it runs
	got := s.Rows(t, database, "SELECT n, name FROM calls ORDER BY n, name")
	if diff := cmp.Diff([]string{"1|one", "2|killed", "2|stopped"}, got); diff != "" {
		t.Errorf("rows (-want +got):\n%s", diff)
	}
}

func TestFrozenServerDoesNotAnswer(t *testing.T) {
	s := Start(t)
	database := s.NewDatabase(t)
	conn, err := pgx.Connect(t.Context(), database)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	thaw := s.Freeze(t)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := conn.Exec(ctx, "SELECT 1"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Exec on a frozen server: %v, want no answer", err)
	}
	thaw()
	s.Exec(t, database, "SELECT 1")
}

func TestDatabasesAreApart(t *testing.T) {
	one, other := shared.NewDatabase(t), shared.NewDatabase(t)
	shared.Server(t).Exec(t, one, "CREATE TABLE calls (n int)")
	if got := shared.Server(t).Rows(t, other, "SELECT count(*) FROM pg_tables WHERE tablename = 'calls'"); got[0] != "0" {
		t.Error("a table of one database is in the other")
	}
}

func TestWrongPasswordIsRefused(t *testing.T) {
	database := shared.NewDatabase(t)
	reader := shared.Server(t).NewRole(t, database, "reader", "it's one")
	if got := shared.Server(t).Rows(t, reader, "SELECT current_user"); got[0] != "reader" {
		t.Errorf("current_user = %s, want reader", got[0])
	}
	u, err := url.Parse(database)
	if err != nil {
		t.Fatal(err)
	}
	u.User = url.UserPassword(owner, "another")
	_, err = query(u.String(), "SELECT 1")
	var refused *pgconn.PgError
	if !errors.As(err, &refused) || refused.Code != "28P01" {
		t.Errorf("the error is %v, want code 28P01", err)
	}
}

func TestTLSIsVerified(t *testing.T) {
	database := shared.NewDatabase(t)
	encrypted := shared.Server(t).TLS(t, database)
	if got := shared.Server(t).Rows(t, encrypted, "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"); got[0] != "t" {
		t.Error("the connection is not encrypted")
	}
	if _, err := query(strings.Replace(database, "sslmode=disable", "sslmode=verify-full", 1), "SELECT 1"); err == nil {
		t.Error("a certificate that nobody vouches for is accepted")
	}
}

func TestStandbyTakesOver(t *testing.T) {
	primary := Start(t)
	standby := primary.Standby(t)
	primary.Exec(t, primary.URL("postgres"), "CREATE TABLE calls (n int); INSERT INTO calls VALUES (1)")
	rows := func(s *Server) []string { return s.Rows(t, s.URL("postgres"), "SELECT n FROM calls") }
	for deadline := time.Now().Add(startTimeout); ; time.Sleep(20 * time.Millisecond) {
		there := standby.Rows(t, standby.URL("postgres"), "SELECT to_regclass('calls') IS NOT NULL")[0] == "t"
		if there && len(rows(standby)) == 1 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the standby does not follow")
		}
	}
	both := URLOfAny(t, "postgres", standby, primary)
	port := func() string { return shared.Server(t).Rows(t, both, "SHOW port")[0] }
	if got := strings.TrimPrefix(primary.Address(), "127.0.0.1:"); port() != got {
		t.Errorf("port %s takes writes, want the primary's, %s", port(), got)
	}
	standby.Detach(t)
	primary.Exec(t, primary.URL("postgres"), "INSERT INTO calls VALUES (2)")
	primary.Kill(t)
	standby.Promote(t)
	standby.Exec(t, both, "INSERT INTO calls VALUES (3)")
	if diff := cmp.Diff([]string{"1", "3"}, rows(standby)); diff != "" {
		t.Errorf("the promoted server's rows (-want +got):\n%s", diff)
	}
	primary.Restart(t)
	if diff := cmp.Diff([]string{"1", "2"}, rows(primary)); diff != "" {
		t.Errorf("the old primary's rows (-want +got):\n%s", diff)
	}
}

func TestServerThatEndsByItself(t *testing.T) {
	dir := t.TempDir()
	for d := dir; d != os.TempDir() && len(d) > 1; d = filepath.Dir(d) {
		os.Chmod(d, 0o777)
	}
	s := StartOn(t, Disks{WAL: dir})
	// One process killed takes the others with it.
	s.Exec(t, s.URL("postgres"), "CREATE TABLE calls (n int)")
	pid := s.process.Process.Pid
	children := childrenOf(pid)
	if len(children) == 0 {
		if runtime.GOOS == "linux" {
			t.Fatal("the server has no processes but one")
		}
		t.Skip("the server's processes are listed on Linux alone")
	}
	p, err := os.FindProcess(children[0])
	if err == nil {
		err = p.Kill()
	}
	if err != nil {
		t.Fatal(err)
	}
	s.AwaitEnd(t)
	s.Restart(t)
	s.Exec(t, s.URL("postgres"), "INSERT INTO calls VALUES (1)")
}
