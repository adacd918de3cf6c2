package pgtest

import (
	"context"
	"errors"
	"net/url"
	"os"
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
