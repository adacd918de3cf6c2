package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"
	"github.com/partnerguard/partnerguard/internal/pgtest"
	"github.com/partnerguard/partnerguard/telemetry/ledger"
)

// TestBothDatabasesAnswerAlike has one journal in SQLite and in PostgreSQL, with the
// bounds of sums wide and narrow.
func TestBothDatabasesAnswerAlike(t *testing.T) {
	postgresServer.Server(t)
	for _, bound := range []int{maxDims, 10} {
		t.Run(fmt.Sprint("bounds of ", bound), func(t *testing.T) {
			j := randomJournal(rand.New(rand.NewPCG(7, 1)), 1500)
			j.append(ledger.TypeGap, `"calls":3,"outcomes":4,"since":"2026-06-01T10:00:00.000000Z","until":"2026-06-01T10:00:01.000000Z","cause":"no space"`)
			places := []*shelf{sqliteShelf(t, 100), postgresShelf(t)}
			answers := make([][]string, len(places))
			for i, place := range places {
				s := place.open(t, j, nil)
				if place.url == "" {
					writerOf(s).maxDims, writerOf(s).maxCustomers = bound, bound
				} else {
					s.db.(*postgres).maxDims, s.db.(*postgres).maxCustomers = bound, bound
				}
				catchUp(t, s)
				r := place.reader(t)
				answers[i] = answersOf(t, r)
				var calls int64
				sums := readSums(t, r)
				for _, sum := range sums {
					calls += sum.Calls
				}
				// Four days and a morning, each with two levels of so many and what is widest.
				if ended := len(readCalls(t, r, Filter{EndedOnly: true})); calls != int64(ended) || bound < maxDims && len(sums) > 5*4*bound {
					t.Errorf("%d sums of %d calls, want those of %d", len(sums), calls, ended)
				}
			}
			for i, want := range answers[0] {
				// Which dims come in under a narrow bound may differ; not what the calls are.
				if bound < maxDims && i < sumAnswers {
					continue
				}
				if diff := cmp.Diff(strings.Split(want, "\n"), strings.Split(answers[1][i], "\n")); diff != "" {
					t.Errorf("answer %d (-sqlite +postgres):\n%.3000s", i, diff)
				}
			}
		})
	}
}

// sumAnswers are those of answersOf that are about sums; calls follow.
const sumAnswers = 4 * 5

// answersOf is what a reader says to many questions, in an order of its own where the
// contract has none.
func answersOf(t *testing.T, r Reader) []string {
	t.Helper()
	ctx := t.Context()
	sorted := func(n int, text func(int) string) string {
		lines := make([]string, n)
		for i := range lines {
			lines[i] = text(i)
		}
		slices.Sort(lines)
		return strings.Join(slices.Compact(lines), "\n") // a token may come more than once
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	day := start.Add(26 * time.Hour)
	var answers []string
	for _, span := range [][2]time.Time{{}, {start, day}, {day, day.Add(30 * time.Hour)}, {day, {}}} {
		sums, err := r.Sums(ctx, span[0], span[1])
		must(err)
		customers, err := r.CustomerSums(ctx, span[0], span[1])
		must(err)
		callers, err := r.Callers(ctx, span[0], span[1])
		must(err)
		var tokens []Token
		must(r.Tokens(ctx, span[0], span[1], func(t Token) error { tokens = append(tokens, t); return nil }))
		calls, outcomes, err := r.Gaps(ctx, span[0], span[1])
		must(err)
		answers = append(answers,
			sorted(len(sums), func(i int) string { return sumText(sums[i]) }),
			sorted(len(customers), func(i int) string { return sumText(customers[i]) }),
			sorted(len(callers), func(i int) string { return fmt.Sprintf("%+v", callers[i]) }),
			sorted(len(tokens), func(i int) string { return fmt.Sprintf("%+v", tokens[i]) }),
			fmt.Sprint(calls, outcomes))
	}
	for _, f := range []Filter{
		{}, {Limit: 7}, {Integration: "crm"}, {Integration: "crm", Since: day, Limit: 9}, {Status: "4xx", Until: day}, {User: "ref-kim"}, {User: "ref-7"},
		{App: "app-12"}, {Customer: "c-1"}, {Customer: "7D1F0A52-9B3C-4C1E-8F60-2A5B9C0D1E12", Since: day, Limit: 5}, {Instance: "nobody"},
	} {
		calls := readCalls(t, r, f)
		answers = append(answers, sorted(len(calls), func(i int) string {
			b, err := json.Marshal(calls[i]) // without Finish, whose numbers are the database's own
			must(err)
			return fmt.Sprint(calls[i].Open(), string(b))
		}))
	}
	return answers
}

func TestGuardsSideBySide(t *testing.T) {
	const guards, calls = 3, 300
	first := postgresShelf(t)
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer stop()
	for g := range guards {
		place := first
		if g > 0 {
			place = first.guard(t)
		}
		j := &journal{}
		cfg := place.config(j, nil)
		cfg.Instance = fmt.Sprint("guard-", g)
		s, err := Open(cfg)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.Close() })
		if g == 0 {
			catchUp(t, s)
		}
		wg.Go(func() {
			if err := s.Follow(ctx); err != nil {
				t.Error(err)
			}
		})
		wg.Go(func() {
			for i := range calls {
				r := callAt(i)
				r.Instance, r.Call[13], r.Call[14] = cfg.Instance, byte(g), byte(i>>8)
				j.call(r)
				if i%50 == 0 {
					s.Notify()
				}
			}
		})
	}
	r := first.reader(t)
	seen := map[string]int{}
	var last uint64
	for deadline := time.Now().Add(60 * time.Second); len(seen) < guards*calls && time.Now().Before(deadline); {
		for _, c := range readCalls(t, r, Filter{AfterFinish: last, EndedOnly: true}) {
			if c.Finish <= last {
				t.Fatalf("finish %d comes after %d", c.Finish, last)
			}
			seen[c.ID]++
			last = c.Finish
		}
	}
	if len(seen) != guards*calls {
		t.Fatalf("followed %d calls, want %d", len(seen), guards*calls)
	}
	for id, n := range seen {
		if n != 1 {
			t.Errorf("call %s came %d times", id, n)
		}
	}
	sums := readSums(t, r)
	if len(sums) != 1 || sums[0].Calls != guards*calls {
		t.Errorf("sums %+v, want one of %d calls", sums, guards*calls)
	}
	if got := readCalls(t, r, Filter{Instance: "guard-1"}); len(got) != calls {
		t.Errorf("%d calls of guard-1, want %d", len(got), calls)
	}
	all, err := r.Instances(t.Context())
	if err != nil || len(all) != guards || all[2].Name != "guard-2" || all[2].Version != "test" || all[2].Seq != 2*calls {
		t.Errorf("Instances = %+v, %v", all, err)
	}
}

func TestASecondGuardOnACopyOfTheLedgerIsRefused(t *testing.T) {
	place, j := postgresShelf(t), sample()
	catchUp(t, place.open(t, j, nil))
	s := impatient(place.open(t, j, nil))
	_, err := s.CatchUp(t.Context())
	if err == nil || !strings.Contains(err.Error(), "another session writes the calls of ledger "+place.ledger) || hintOf(err) == "" {
		t.Errorf("CatchUp = %v, hint %q", err, hintOf(err))
	}
}

func hintOf(err error) string {
	var h interface{ Hint() string }
	if errors.As(err, &h) {
		return h.Hint()
	}
	return ""
}

// impatient makes s give up within a second.
func impatient(s *Store) *Store {
	p := s.db.(*postgres)
	p.at.timeout, p.at.lockTimeout = 2*time.Second, 500*time.Millisecond
	return s
}

// follow follows in the background until the test ends or stop is called.
func follow(t *testing.T, s *Store) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := s.Follow(ctx); err != nil {
			t.Error(err)
		}
	}()
	stop = sync.OnceFunc(func() { cancel(); <-done })
	t.Cleanup(stop)
	return stop
}

// eventually waits for a condition that another goroutine brings about.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(60 * time.Second); !is(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

// testTrouble has a store of which the first calls are written when trouble begins, and
// more come. Status must say what is wrong; when it ends all must be there once.
func testTrouble(t *testing.T, place *shelf, trouble func(s *Store) (end func()), says string) {
	t.Helper()
	j := sample()
	var mu sync.Mutex
	var kinds []EventKind
	cfg := place.config(j, nil)
	cfg.Event = func(e Event) {
		mu.Lock()
		defer mu.Unlock()
		if e.Kind != BadRecord {
			kinds = append(kinds, e.Kind)
		}
		if e.Err != nil && strings.Contains(e.Err.Error(), "hunter2") {
			t.Errorf("an event has the password: %v", e.Err)
		}
	}
	s, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	impatient(s)
	catchUp(t, s)
	end := trouble(s)
	stop := follow(t, s)
	for i := 20; i < 40; i++ {
		j.call(callAt(i))
	}
	s.Notify()
	eventually(t, "an error that says "+says, func() bool { err := s.Status().Err; return err != nil && strings.Contains(err.Error(), says) })
	if s.Status().CaughtUp {
		t.Error("the store claims to have caught up")
	}
	end()
	eventually(t, "the store gets on", func() bool { return s.Status().Err == nil && s.Status().CaughtUp })
	stop()
	mu.Lock()
	defer mu.Unlock()
	if diff := cmp.Diff([]EventKind{Failing, Recovered}, kinds); diff != "" {
		t.Errorf("events (-want +got):\n%s", diff)
	}
	whole := sqliteShelf(t, foldCalls)
	whole.fill(t, j)
	want, got := answersOf(t, whole.reader(t)), answersOf(t, place.reader(t))
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("after the trouble (-want +got):\n%s", diff)
	}
}

func TestADatabaseInTroubleCostsNothing(t *testing.T) {
	// ended closes the store's connection, so that it needs another one.
	ended := func(s *Store) { s.db.(*postgres).conn.Close(context.Background()) }
	schemaOf := func(place *shelf) string {
		u, _ := url.Parse(place.url)
		return u.Query().Get("search_path")
	}
	t.Run("killed and started again", func(t *testing.T) {
		server := pgtest.Start(t)
		place := &shelf{dir: t.TempDir(), url: server.NewDatabase(t), ledger: postgresShelf(t).ledger}
		testTrouble(t, place, func(*Store) func() {
			server.Kill(t)
			return func() { server.Restart(t) }
		}, "connect")
	})
	t.Run("silent", func(t *testing.T) {
		server := pgtest.Start(t)
		place := &shelf{dir: t.TempDir(), url: server.NewDatabase(t), ledger: postgresShelf(t).ledger}
		testTrouble(t, place, func(*Store) func() { return server.Freeze(t) }, "timeout")
	})
	t.Run("locked", func(t *testing.T) {
		place := postgresShelf(t)
		testTrouble(t, place, func(*Store) func() {
			conn, err := pgx.Connect(t.Context(), place.url)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := conn.Exec(t.Context(), "BEGIN; LOCK TABLE fleet IN ACCESS EXCLUSIVE MODE"); err != nil {
				t.Fatal(err)
			}
			return func() { conn.Close(context.Background()) }
		}, "lock timeout")
	})
	t.Run("read-only", func(t *testing.T) {
		server := postgresServer.Server(t)
		database := server.NewDatabase(t)
		place := &shelf{dir: t.TempDir(), url: database, ledger: postgresShelf(t).ledger}
		name := server.Rows(t, database, "SELECT current_database()")[0]
		testTrouble(t, place, func(s *Store) func() {
			server.Exec(t, database, "ALTER DATABASE "+name+" SET default_transaction_read_only = on")
			ended(s)
			return func() {
				server.Exec(t, database, "BEGIN READ WRITE; ALTER DATABASE "+name+" RESET default_transaction_read_only; COMMIT")
			}
		}, "read only")
	})
	t.Run("connection limit", func(t *testing.T) {
		server := postgresServer.Server(t)
		database := server.NewDatabase(t)
		role := server.NewRole(t, database, "limited", "hunter2")
		server.Exec(t, database, "CREATE SCHEMA partnerguard AUTHORIZATION limited")
		place := &shelf{dir: t.TempDir(), url: role, ledger: postgresShelf(t).ledger}
		testTrouble(t, place, func(s *Store) func() {
			server.Exec(t, database, "ALTER ROLE limited CONNECTION LIMIT 0")
			ended(s)
			return func() { server.Exec(t, database, "ALTER ROLE limited CONNECTION LIMIT -1") }
		}, "too many connections")
	})
	t.Run("another password", func(t *testing.T) {
		server := postgresServer.Server(t)
		database := server.NewDatabase(t)
		role := server.NewRole(t, database, "renamed", "hunter2")
		server.Exec(t, database, "CREATE SCHEMA partnerguard AUTHORIZATION renamed")
		place := &shelf{dir: t.TempDir(), url: role, ledger: postgresShelf(t).ledger}
		testTrouble(t, place, func(s *Store) func() {
			server.Exec(t, database, "ALTER ROLE renamed PASSWORD 'another'")
			ended(s)
			return func() { server.Exec(t, database, "ALTER ROLE renamed PASSWORD 'hunter2'") }
		}, "password authentication failed")
	})
	t.Run("upgraded beyond this program", func(t *testing.T) {
		place := postgresShelf(t)
		server, schema := postgresServer.Server(t), schemaOf(place)
		testTrouble(t, place, func(*Store) func() {
			server.Exec(t, place.url, "INSERT INTO "+schema+".migrations VALUES (99, 99, 'newer')")
			return func() { server.Exec(t, place.url, "DELETE FROM "+schema+".migrations WHERE version = 99") }
		}, "needs a program that knows 99; this one knows 3")
	})
	t.Run("further than it should be", func(t *testing.T) {
		place := postgresShelf(t)
		testTrouble(t, place, func(s *Store) func() {
			// As if the answer to the last commit had been lost.
			s.mu.Lock()
			defer s.mu.Unlock()
			s.in.seq -= 3
			return func() {}
		}, errOvertaken.Error())
	})
	t.Run("a partition dropped", func(t *testing.T) {
		place := postgresShelf(t)
		server, schema := postgresServer.Server(t), schemaOf(place)
		j := sample()
		s := impatient(place.open(t, j, nil))
		catchUp(t, s)
		for _, table := range partitioned {
			server.Exec(t, place.url, "DROP TABLE "+schema+"."+table+"_20260601")
		}
		j.call(callAt(30))
		if _, err := s.CatchUp(t.Context()); err == nil || !strings.Contains(err.Error(), "no partition") {
			t.Errorf("CatchUp = %v, want that there is no partition", err)
		}
		catchUp(t, s)
		if got := readCalls(t, place.reader(t), Filter{EndedOnly: true}); len(got) != 1 {
			t.Errorf("%d calls, want the one since", len(got))
		}
	})
}

func TestTwoVersionsSideBySide(t *testing.T) {
	place, j := postgresShelf(t), sample()
	old := place.open(t, j.upTo(5), nil)
	catchUp(t, old)

	// A newer program adds a column that the older one leaves alone.
	at, conn := connectTo(t, place)
	newer := append(slices.Clone(migrations), migration{1, "ALTER TABLE calls ADD COLUMN region text", nil})
	var wg sync.WaitGroup
	for range 3 { // several at a time: one does it
		wg.Go(func() {
			conn, err := pgx.ConnectConfig(t.Context(), at.session("test", false))
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close(context.Background())
			if err := at.migrate(t.Context(), conn, newer, "newer"); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if version, err := at.schemaVersion(t.Context(), conn, newer); version != len(newer) || err != nil {
		t.Fatalf("version %d, %v; want %d", version, err, len(newer))
	}
	old.cfg.Source = j.open
	old.source = nil
	catchUp(t, old)
	if err := old.Close(); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the older one starts again, and reads
		s := place.open(t, j, nil)
		catchUp(t, s)
		s.Close()
	}
	whole := postgresShelf(t)
	whole.fill(t, j)
	if diff := cmp.Diff(whole.content(t), place.content(t)); diff != "" {
		t.Errorf("beside a newer version (-without +with):\n%s", diff)
	}

	// Another one that the older cannot live with.
	if err := at.migrate(t.Context(), conn, append(newer, migration{len(newer) + 1, "ALTER TABLE calls DROP COLUMN path", nil}), "newest"); err != nil {
		t.Fatal(err)
	}
	_, err := OpenPostgresReader(t.Context(), place.url)
	if err == nil || !strings.Contains(err.Error(), "has version 5 and needs a program that knows 5; this one knows 3") || hintOf(err) == "" {
		t.Errorf("OpenPostgresReader = %v, hint %q", err, hintOf(err))
	}

	// A step that fails leaves nothing behind.
	broken := append(slices.Clone(newer), migration{1, "CREATE TABLE half (n int)", nil}, migration{1, "CREATE TABLE half (n int); SELECT 1/0", nil})
	if err := at.migrate(t.Context(), conn, broken, "broken"); err == nil {
		t.Error("a broken migration succeeds")
	}
}

// connectTo is a session in place's schema, as a guard has one.
func connectTo(t *testing.T, place *shelf) (postgresConfig, *pgx.Conn) {
	t.Helper()
	at, err := parsePostgres(place.url)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := pgx.ConnectConfig(t.Context(), at.session("test", false))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(context.Background()) })
	return at, conn
}

// A database that the first version wrote is brought forward, and says what it said.
func TestWhatTheFirstVersionStoredIsReadAsItWas(t *testing.T) {
	place := postgresShelf(t)
	at, conn := connectTo(t, place)
	if err := at.migrate(t.Context(), conn, migrations[:1], "first"); err != nil {
		t.Fatal(err)
	}
	var tables strings.Builder
	for _, table := range []string{"calls", "details", "tokens", "sums", "customer_sums"} {
		fmt.Fprintf(&tables, "CREATE TABLE %[1]s_20260710 PARTITION OF %[1]s FOR VALUES FROM ('2026-07-10') TO ('2026-07-11');", table)
	}
	const first, second, request = "7d1f0a52-9b3c-4c1e-8f60-000000000001", "7d1f0a52-9b3c-4c1e-8f60-000000000002", "7d1f0a52-9b3c-4c1e-8f60-0000000000aa"
	const customer = "7d1f0a52-9b3c-4c1e-8f60-0000000000cc"
	if _, err := conn.Exec(t.Context(), tables.String()+`
		INSERT INTO ledgers (id, instance, version, retention, seq) VALUES (gen_random_uuid(), 'guard-1', 'first', -1, 4);
		INSERT INTO dims (hash, day, integration, owner, tid, app_id, user_ref, kind, verified, route, mode, effect, reason, would_reject, status, rejection, code, mfa, mfa_compliant, amr)
			SELECT gen_random_uuid(), '2026-07-10', 'billing', '', '', '', '', 'app_user', true, route, 'audit', 'forwarded', 'mfa_present', false, 200, '', '', 'present', '', '' FROM unnest(ARRAY['/v1/customers', '/v1/invoices/{invoice-id}', '']) AS route;
		INSERT INTO details SELECT '2026-07-10', 1, 2, 1, 0, 'guard-1', 'main', '', 'GET', '', 'partner-center', '', '', '', '', '', '';
		INSERT INTO calls (finish, "time", seq, dim, detail, day, ledger, call, request_id, correlation_id, same, path) VALUES
			(1, '2026-07-10 01:00Z', 2, 1, 2, '2026-07-10', 1, '`+first+`', '`+request+`', '`+first+`', 3, NULL),
			(2, '2026-07-10 02:00Z', 4, 2, 2, '2026-07-10', 1, '`+second+`', NULL, NULL, 0, '/v1/invoices/G01');
		INSERT INTO hours VALUES (495385, 1, 1, 1), (495386, 1, 2, 2);
		INSERT INTO sums VALUES ('2026-07-10', 1, 495385, 1, 1, '2026-07-10 01:00Z', '2026-07-10 01:00Z'), ('2026-07-10', 2, 495386, 1, 7, '2026-07-10 02:00Z', '2026-07-10 02:59:59.999999Z');
		INSERT INTO customer_sums VALUES ('2026-07-10', 3, 495385, 1, '', 1, '2026-07-10 01:00Z', '2026-07-10 01:00Z'), ('2026-07-10', 3, 495386, 1, '`+customer+`', 5, '2026-07-10 02:00Z', '2026-07-10 02:00Z'),
			('2026-07-10', 3, 495386, 1, 'no GUID', 2, '2026-07-10 02:00Z', '2026-07-10 02:00Z');
		UPDATE fleet SET finish = 2`); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenPostgresReader(t.Context(), place.url); err == nil || !strings.Contains(err.Error(), "has version 1, this program needs 3") {
		t.Errorf("before the upgrade: %v", err)
	}
	if err := at.migrate(t.Context(), conn, migrations, "now"); err != nil {
		t.Fatal(err)
	}
	r, err := OpenPostgresReader(t.Context(), place.url)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	type said struct{ call, path, request, correlation, upstreamRequest, upstreamCorrelation string }
	for name, c := range map[string]struct {
		filter Filter
		want   []said
	}{
		"all":            {Filter{}, []said{{first, "/v1/customers", request, first, request, first}, {call: second, path: "/v1/invoices/G01"}}},
		"request id":     {Filter{RequestID: strings.ToUpper(request)}, []said{{first, "/v1/customers", request, first, request, first}}},
		"correlation id": {Filter{CorrelationID: first}, []said{{first, "/v1/customers", request, first, request, first}}},
		"call":           {Filter{Call: second}, []said{{call: second, path: "/v1/invoices/G01"}}},
	} {
		var got []said
		if err := r.Calls(t.Context(), c.filter, func(c Call) error {
			got = append(got, said{c.ID, c.Path, c.RequestID, c.CorrelationID, c.UpstreamRequestID, c.UpstreamCorrelationID})
			return nil
		}); err != nil || !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, %v; want %v", name, got, err, c.want)
		}
	}
	got := map[string]string{}
	for _, sum := range readSums(t, r) {
		got[sum.Route] = fmt.Sprintln(sum.Calls, sum.First.Format(time.TimeOnly), sum.Last.Format("15:04:05.000000"))
	}
	customers, err := r.CustomerSums(t.Context(), time.Time{}, time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	for _, sum := range customers {
		got["of "+sum.Customer] = fmt.Sprint(sum.Route, sum.Calls)
	}
	want := map[string]string{
		"/v1/customers": "1 01:00:00 01:00:00.000000\n", "/v1/invoices/{invoice-id}": "7 02:00:00 02:59:59.999999\n",
		"of ": "1", "of " + customer: "5", "of no GUID": "2",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("sums (-want +got):\n%s", diff)
	}
}

func TestOpenPostgresRefusesWithAWayOut(t *testing.T) {
	server := postgresServer.Server(t)
	database := server.NewDatabase(t)
	t.Run("no store yet", func(t *testing.T) {
		if _, err := OpenPostgresReader(t.Context(), database); !errors.Is(err, ErrNoStore) || hintOf(err) == "" {
			t.Errorf("OpenPostgresReader = %v, hint %q", err, hintOf(err))
		}
	})
	t.Run("tables of something else", func(t *testing.T) {
		server.Exec(t, database, "CREATE SCHEMA crm; CREATE TABLE crm.calls (n int); CREATE SCHEMA erp; CREATE TABLE erp.migrations (id text)")
		for schema, table := range map[string]string{"crm": "calls", "erp": "migrations"} {
			place := &shelf{dir: t.TempDir(), url: inSchema(t, database, schema), ledger: postgresShelf(t).ledger}
			_, err := place.open(t, sample(), nil).CatchUp(t.Context())
			if err == nil || !strings.Contains(err.Error(), "schema "+schema+" holds tables of something else: "+table) || hintOf(err) == "" {
				t.Errorf("CatchUp = %v, hint %q", err, hintOf(err))
			}
		}
		if got := server.Rows(t, database, "SELECT schemaname || '.' || tablename FROM pg_tables WHERE schemaname IN ('crm', 'erp') ORDER BY 1"); len(got) != 2 {
			t.Errorf("tables are %v, want those that were there", got)
		}
	})
	t.Run("no rights", func(t *testing.T) {
		role := server.NewRole(t, database, "powerless", "hunter2")
		place := &shelf{dir: t.TempDir(), url: role, ledger: postgresShelf(t).ledger}
		_, err := place.open(t, sample(), nil).CatchUp(t.Context())
		if err == nil || !strings.Contains(err.Error(), "permission denied") || !strings.Contains(hintOf(err), "CREATE SCHEMA") {
			t.Errorf("CatchUp = %v, hint %q", err, hintOf(err))
		}
	})
	for name, bad := range map[string]string{
		"no URL":             "hunter2",
		"a bad port":         "postgres://guard:hunter2@localhost:port/guard",
		"a bad escape":       "postgres://guard:hunter2%zz@localhost/guard",
		"a missing CA":       "postgres://guard:hunter2@localhost/guard?sslmode=verify-full&sslrootcert=/nowhere/ca.pem",
		"an unknown sslmode": "host=localhost password=hunter2 sslmode=maybe",
	} {
		t.Run(name, func(t *testing.T) {
			_, err := OpenPostgresReader(t.Context(), bad)
			if err == nil || strings.Contains(err.Error(), "hunter2") || hintOf(err) == "" {
				t.Errorf("OpenPostgresReader = %v, hint %q", err, hintOf(err))
			}
			if _, err := Open(Config{Dir: t.TempDir(), Postgres: bad}); err == nil || strings.Contains(err.Error(), "hunter2") {
				t.Errorf("Open = %v", err)
			}
		})
	}
	t.Run("a description", func(t *testing.T) {
		for dsn, want := range map[string]string{
			"postgres://guard:hunter2@db.contoso.example/fleet?sslmode=disable":                     "PostgreSQL db.contoso.example:5432/fleet, schema partnerguard, as guard; NOT ENCRYPTED: sslmode=verify-full encrypts and checks the server",
			"postgres://guard:hunter2@db.contoso.example/fleet?sslmode=verify-full&search_path=x,y": "PostgreSQL db.contoso.example:5432/fleet, schema x, as guard; encrypted, the server checked",
			"postgres://guard:hunter2@db.contoso.example/fleet?sslmode=require":                     "PostgreSQL db.contoso.example:5432/fleet, schema partnerguard, as guard; encrypted, the server NOT CHECKED: sslmode=verify-full checks it",
			"postgres://guard:hunter2@db.contoso.example/fleet":                                     "PostgreSQL db.contoso.example:5432/fleet, schema partnerguard, as guard; NOT ENCRYPTED if the server does not offer it: sslmode=verify-full insists, and checks the server",
		} {
			if got, err := DescribePostgres(dsn); got != want || err != nil {
				t.Errorf("DescribePostgres(%s) = %q, %v; want %q", dsn, got, err, want)
			}
		}
	})
}

func TestDaysAreDroppedAtRetention(t *testing.T) {
	now := time.Now().UTC()
	j := &journal{}
	const minutes = 5 * 24 * 60
	for i := 0; i < minutes; i += 20 {
		r := callAt(i)
		r.Time = now.Add(time.Duration(i-minutes) * time.Minute)
		r.Call[14] = byte(i >> 8)
		r.Token.TenantID = []string{"short", "usual", "long"}[i/20%3]
		j.call(r)
	}
	place := postgresShelf(t)
	cfg := place.config(j, nil)
	cfg.Now = func() time.Time { return now }
	cfg.Retention = 2 * 24 * time.Hour
	cfg.TenantRetention = map[string]time.Duration{"short": 24 * time.Hour, "long": 3 * 24 * time.Hour}
	s, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for range 3 {
		now = now.Add(time.Second)
		s.pruned = time.Time{}
		catchUp(t, s)
	}
	r := place.reader(t)
	oldest := map[string]time.Time{}
	calls := readCalls(t, r, Filter{})
	for _, c := range calls {
		if at, ok := oldest[c.TenantID]; !ok || c.Time.Before(at) {
			oldest[c.TenantID] = c.Time
		}
	}
	for tenant, days := range map[string]int32{"short": 1, "usual": 2, "long": 3} {
		first := dayOf(now.Add(-time.Duration(days) * 24 * time.Hour))
		if got := dayOf(oldest[tenant]); got != first {
			t.Errorf("the oldest call of tenant %s is of %s, want one of %s", tenant, oldest[tenant], dayTime(first))
		}
	}
	var summed, byCustomer int64
	for _, sum := range readSums(t, r) {
		summed += sum.Calls
	}
	customers, err := r.CustomerSums(t.Context(), time.Time{}, time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	for _, sum := range customers {
		byCustomer += sum.Calls
	}
	if summed != int64(len(calls)) || byCustomer != summed {
		t.Errorf("%d calls in the sums, %d by customer, want %d", summed, byCustomer, len(calls))
	}
	u, _ := url.Parse(place.url)
	partitions := postgresServer.Server(t).Rows(t, place.url, "SELECT tablename FROM pg_tables WHERE schemaname = '"+u.Query().Get("search_path")+"' AND tablename LIKE 'calls\\_%' ORDER BY 1")
	want := []string{}
	for day := dayOf(now) - 3; day <= dayOf(now)+2; day++ {
		want = append(want, "calls_"+dayTime(day).Format(dayLayout))
	}
	if diff := cmp.Diff(want, partitions); diff != "" {
		t.Errorf("partitions (-want +got):\n%s", diff)
	}

	// A guard that keeps all keeps the others from dropping days.
	other := place.guard(t)
	keeper := other.config(&journal{}, nil)
	keeper.Retention = -1
	k, err := Open(keeper)
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	catchUp(t, k)
	cfg.TenantRetention = nil
	now = now.Add(10 * 24 * time.Hour)
	s.pruned = time.Time{}
	catchUp(t, s)
	if got := readCalls(t, r, Filter{}); len(got) == 0 {
		t.Error("days that another guard keeps are gone")
	}
}

// A filter is not made while rows come in, and is made once its day has ended.
func TestFiltersAreMadeWhenADayEnded(t *testing.T) {
	for now, want := range map[time.Time]int{start: 3, start.AddDate(0, 0, 1): 0} {
		place := postgresShelf(t)
		cfg := place.config(sample(), nil)
		cfg.Now = func() time.Time { return now }
		s, err := Open(cfg)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		catchUp(t, s)
		catchUp(t, s) // idle
		all := readCalls(t, place.reader(t), Filter{EndedOnly: true})
		if got := readCalls(t, place.reader(t), Filter{Call: all[2].ID}); len(got) != 1 {
			t.Errorf("on %v: %d calls found by their id, want 1", now, len(got))
		}
		u, _ := url.Parse(place.url)
		_, conn := connectTo(t, place)
		var filters, missing int // which this makes
		if err := conn.QueryRow(t.Context(), "SELECT count(*), sum(brin_summarize_range(c.oid, 0))"+filtersOf, u.Query().Get("search_path")+".calls_"+dayTime(dayOf(start)).Format(dayLayout)).
			Scan(&filters, &missing); err != nil {
			t.Fatal(err)
		}
		if filters != 3 || missing != want {
			t.Errorf("on %v: of %d filters %d were missing, want %d of 3", now, filters, missing, want)
		}
	}
}

func TestIdentitiesOfAFleet(t *testing.T) {
	one := postgresShelf(t)
	two := one.guard(t)
	const sam, kim = `,"tid":"t","oid":"1c3d0000-0000-4000-8000-000000000001","upn":"Sam@contoso.example"}` + "\n", `,"tid":"t","oid":"1c3d0000-0000-4000-8000-000000000002","upn":"kim@contoso.example"}` + "\n"
	people := func(place *shelf, text string) {
		if err := os.WriteFile(filepath.Join(place.dir, "identities.jsonl"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	people(one, `{"user_ref":"sam-1"`+sam)
	people(two, `{"user_ref":"sam-2"`+sam+`{"user_ref":"kim-2"`+kim)
	stores := map[*shelf]*Store{}
	for i, place := range []*shelf{one, two} {
		j := &journal{}
		for n, ref := range []string{"sam", "kim"} {
			r := callAt(2*i + n)
			r.Token.UPN = fmt.Sprint(ref, "-", i+1)
			j.call(r)
		}
		stores[place] = place.open(t, j, nil)
		catchUp(t, stores[place])
	}
	again := func(place *shelf) {
		t.Helper()
		stores[place].db.(*postgres).people.looked = time.Time{}
		catchUp(t, stores[place])
	}
	r := one.reader(t)
	for user, want := range map[string]int{"sam@CONTOSO.example": 2, "1C3D0000-0000-4000-8000-000000000001": 2, "sam-2": 2, "kim@contoso.example": 1, "kim-1": 1, "nobody": 0} {
		if got := readCalls(t, r, Filter{User: user}); len(got) != want {
			t.Errorf("%d calls of %s, want %d", len(got), user, want)
		}
	}
	known := func() string {
		t.Helper()
		all, err := r.Identities(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		var refs []string
		for ref := range all {
			refs = append(refs, ref)
		}
		slices.Sort(refs)
		return strings.Join(refs, " ")
	}
	if got := known(); got != "kim-2 sam-1 sam-2" {
		t.Errorf("identities of %s", got)
	}
	people(one, `{"user_ref":"sam-1"`+sam+`{"user_ref":"kim-1"`+kim)
	again(one)
	if got := known(); got != "kim-1 kim-2 sam-1 sam-2" {
		t.Errorf("after a new user, identities of %s", got)
	}
	if err := Forget(t.Context(), one.url, []string{"kim-1", "kim-2"}); err != nil {
		t.Fatal(err)
	}
	if got := known(); got != "sam-1 sam-2" {
		t.Errorf("after Forget, identities of %s", got)
	}
	people(two, "") // forgotten while the database was not to be had
	again(two)
	if got := known(); got != "sam-1" {
		t.Errorf("after lines were removed, identities of %s", got)
	}
	stores[one].Close()
	cfg := one.config(&journal{entries: stores[one].sourceEntries()}, nil)
	cfg.Pseudonymous = true
	s, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	catchUp(t, s)
	if got := known(); got != "" {
		t.Errorf("pseudonymous, identities of %s", got)
	}
}

// sourceEntries are as many empty lines as were read, for a journal that goes on there.
func (s *Store) sourceEntries() []ledger.Entry {
	return make([]ledger.Entry, s.Status().Position.Offset)
}

func TestLagOfAFleet(t *testing.T) {
	one := postgresShelf(t)
	two := one.guard(t)
	for _, place := range []*shelf{one, two} {
		s := place.open(t, sample(), nil)
		catchUp(t, s)
		if place == one {
			s.Close()
		}
	}
	r := one.reader(t)
	u, _ := url.Parse(one.url)
	set := func(what string, place *shelf) {
		t.Helper()
		postgresServer.Server(t).Exec(t, one.url, "UPDATE "+u.Query().Get("search_path")+".ledgers SET "+what+" WHERE id = '"+place.ledger+"'")
	}
	lag := func() time.Duration {
		t.Helper()
		d, err := r.Lag(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return d.Truncate(time.Minute)
	}
	if got := lag(); got != 0 {
		t.Errorf("Lag = %v when all is read, want 0", got)
	}
	set("heard = now() - interval '5 minutes'", one)
	if got := lag(); got != 0 {
		t.Errorf("Lag = %v, although the guard said that it stops", got)
	}
	set("heard = now() - interval '7 minutes'", two)
	if got := lag(); got != 7*time.Minute {
		t.Errorf("Lag = %v with a guard that is silent for 7 minutes", got)
	}
	set("heard = now(), caught_up = false, newest = now() - interval '9 minutes'", two)
	if got := lag(); got != 9*time.Minute {
		t.Errorf("Lag = %v with a newest call 9 minutes ago and more to come", got)
	}
	set("heard = now() - interval '25 hours'", two)
	if got := lag(); got != 0 {
		t.Errorf("Lag = %v of guards that were gone a day ago", got)
	}
}

// TestWithTheLedgerInPostgres goes the whole way, and loses the ledger at its end.
func TestWithTheLedgerInPostgres(t *testing.T) {
	place := postgresShelf(t)
	l, err := ledger.Open(ledger.Config{Dir: place.dir, Retention: -1, MinFree: -1})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 30 {
		rec := callAt(i)
		rec.Time = time.Now().Add(-time.Minute)
		rec.Token.TenantID, rec.Token.ObjectID, rec.Token.UPN = "tid", "oid-sam", "sam@contoso.example"
		if err := errors.Join(l.Decide(&rec), l.Finish(&rec)); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	id, err := ledger.ID(place.dir)
	if err != nil {
		t.Fatal(err)
	}
	var events []Event
	s, err := Open(Config{Dir: place.dir, Postgres: place.url, Retention: -1, Event: func(e Event) { events = append(events, e) }})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	catchUp(t, s)
	r := place.reader(t)
	if got := readCalls(t, r, Filter{User: "sam@contoso.example"}); len(got) != 30 {
		t.Errorf("%d calls of the user, want 30", len(got))
	}
	checkpoints, err := r.(PostgresReader).Checkpoints(t.Context(), strings.ToUpper(id))
	if err != nil || len(checkpoints) == 0 {
		t.Fatalf("%d checkpoints, %v", len(checkpoints), err)
	}
	pub, err := ledger.LoadPublicKey(filepath.Join(place.dir, "ledger.pub"))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range checkpoints {
		if err := c.Verify(pub); err != nil {
			t.Errorf("checkpoint %+v: %v", c, err)
		}
	}
	want := answersOf(t, r)

	// The position is not of this ledger: what is there is read anew, once.
	u, _ := url.Parse(place.url)
	postgresServer.Server(t).Exec(t, place.url, "UPDATE "+u.Query().Get("search_path")+".ledgers SET segment = 9")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if s, err = Open(Config{Dir: place.dir, Postgres: place.url, Retention: -1, Event: func(e Event) { events = append(events, e) }}); err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	s.CatchUp(t.Context())
	catchUp(t, s)
	if diff := cmp.Diff(want, answersOf(t, r)); diff != "" {
		t.Errorf("read anew (-before +after):\n%s", diff)
	}
	if len(events) == 0 || events[0].Kind != Outdated {
		t.Errorf("events %+v, want that it was outdated", events)
	}
}
