// Package pgtest runs a real PostgreSQL for tests: in a temporary directory, on a
// TCP port of the loopback interface, with passwords (SCRAM), gone with the test.
package pgtest

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// Server is one PostgreSQL. Its superuser is "guard"; NewDatabase makes databases.
// It does not sync to disk: it survives Kill, which is the loss of a process, and
// no loss of power.
//
// NewDatabase, NewRole, Exec and Rows are safe for concurrent use. The others, which
// change what runs, are for one goroutine at a time.
type Server struct {
	home     string // holds certificates, log and, without Disks, data; owned by the server's user
	disks    Disks
	port     int
	user     account
	password string
	ca       []byte // PEM, of the TLS certificate

	databases atomic.Int64

	process *exec.Cmd
	exited  chan struct{}
}

// owner is the database's superuser.
const owner = "guard"

// startTimeout bounds how long a server may take until it takes connections. It
// may have to recover from Kill, on a machine that is busy.
const startTimeout = time.Minute

// Start starts a server, stopped by the test's cleanup. Without PostgreSQL's
// programs the test is skipped, or fails where CI=true.
//
// Tests that stop it need their own; the others better share one, see Shared.
func Start(t testing.TB) *Server {
	t.Helper()
	return StartOn(t, Disks{})
}

// Disks are directories for what a server may run out of room for. They may be the
// roots of file systems, need not be empty, and users other than the test's must be
// able to make files there. Empty: with the rest, in the temporary directory.
type Disks struct {
	Data string // tables, and all that has no place of its own
	WAL  string // the write-ahead log, in segments of 1 MiB
}

// StartOn is Start with some files elsewhere.
func StartOn(t testing.TB, disks Disks) *Server {
	t.Helper()
	bin := programs(t)
	s, err := create(bin, disks)
	if s != nil {
		t.Cleanup(s.remove)
	}
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// NewDatabase makes an empty database and returns its URL. It is dropped with the
// server.
func (s *Server) NewDatabase(t testing.TB) string {
	t.Helper()
	name := fmt.Sprintf("test%d", s.databases.Add(1))
	s.Exec(t, s.URL("postgres"), "CREATE DATABASE "+name)
	return s.URL(name)
}

// NewRole makes a role that may log in, and returns the URL of the same database
// for it. It has no rights yet; give them with Exec. Roles are the server's: one
// that exists only gets the password.
func (s *Server) NewRole(t testing.TB, database, name, password string) string {
	t.Helper()
	role := pgx.Identifier{name}.Sanitize()
	s.Exec(t, database, fmt.Sprintf(`DO $$ BEGIN CREATE ROLE %s LOGIN; EXCEPTION WHEN duplicate_object THEN NULL; END $$;
		ALTER ROLE %s PASSWORD '%s'`, role, role, strings.ReplaceAll(password, "'", "''")))
	u, err := url.Parse(database)
	if err != nil {
		t.Fatal(err)
	}
	u.User = url.UserPassword(name, password)
	return u.String()
}

// URL is that of a database, with user and password.
func (s *Server) URL(database string) string {
	u := url.URL{
		Scheme: "postgres", User: url.UserPassword(owner, s.password), Path: database,
		Host: s.Address(), RawQuery: "sslmode=disable",
	}
	return u.String()
}

// Address is host and port.
func (s *Server) Address() string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(s.port)) }

// Exec runs one statement, or several, in the database of the URL, as its user.
func (s *Server) Exec(t testing.TB, database, sql string) {
	t.Helper()
	s.Rows(t, database, sql)
}

// Rows runs a query in the database of the URL. Each row is its values as text,
// joined by a vertical bar; NULL is empty.
func (s *Server) Rows(t testing.TB, database, sql string) []string {
	t.Helper()
	rows, err := query(database, sql)
	if err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return rows
}

// Stop ends the server as an administrator does in a hurry: open transactions are
// rolled back, connections closed. New ones are refused until Restart.
func (s *Server) Stop(t testing.TB) {
	t.Helper()
	s.signal(t, os.Interrupt)
}

// Kill ends all of the server's processes at once, as losing the machine does.
func (s *Server) Kill(t testing.TB) {
	t.Helper()
	s.signal(t, os.Kill)
}

// AwaitEnd returns when the server has ended by itself, as PostgreSQL does when it
// cannot go on. Restart starts it again.
func (s *Server) AwaitEnd(t testing.TB) {
	t.Helper()
	if s.process == nil {
		t.Fatal("postgres does not run")
	}
	select {
	case <-s.exited:
		s.process = nil
	case <-time.After(startTimeout):
		t.Fatalf("postgres does not end:\n%s", s.log())
	}
}

// Freeze stops the server's processes where they are, and returns what lets them
// go on: connections stay open and are still taken by the kernel, but nobody
// answers, as when the network loses every packet.
func (s *Server) Freeze(t testing.TB) (thaw func()) {
	t.Helper()
	if s.process == nil {
		t.Fatal("postgres does not run")
	}
	thaw, err := freeze(s.process.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(thaw)
	return thaw
}

// Restart starts a server that was stopped or killed, on the same port with the
// same data, and returns when it takes connections. A server that runs is
// stopped first.
func (s *Server) Restart(t testing.TB) {
	t.Helper()
	if s.process != nil {
		s.Stop(t)
	}
	if err := s.start(programs(t)); err != nil {
		t.Fatal(err)
	}
}

// query runs statements in the simple protocol, which takes several at once and
// has every value as text.
func query(database, sql string) ([]string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	conn, err := pgx.Connect(ctx, database)
	if err != nil {
		return nil, err
	}
	defer conn.Close(ctx)
	results, err := conn.PgConn().Exec(ctx, sql).ReadAll()
	var rows []string
	for _, result := range results {
		for _, row := range result.Rows {
			rows = append(rows, string(bytes.Join(row, []byte("|"))))
		}
	}
	return rows, err
}

// create makes a cluster and starts it. On an error after the directory was made
// the server is returned, to be removed.
func create(bin string, disks Disks) (s *Server, err error) {
	s, err = newServer(disks)
	if err != nil {
		return s, err
	}
	home := s.home
	secret := filepath.Join(home, "password")
	if err := s.user.write(secret, []byte(s.password)); err != nil {
		return s, err
	}
	args := []string{"--pgdata", s.data(), "--username", owner, "--pwfile", secret,
		"--auth", "scram-sha-256", "--encoding", "UTF8", "--locale", "C", "--no-sync"}
	if disks.WAL != "" {
		args = append(args, "--waldir", s.wal(), "--wal-segsize", "1")
	}
	initdb := exec.Command(filepath.Join(bin, "initdb"), args...)
	s.user.run(initdb)
	initdb.Dir = home
	if out, err := initdb.CombinedOutput(); err != nil {
		return s, fmt.Errorf("initdb: %w\n%s", err, out)
	}
	return s, s.startAnywhere(bin)
}

// newServer is a server without data. On an error after its directory was made it is
// returned, to be removed.
func newServer(disks Disks) (s *Server, err error) {
	home, err := os.MkdirTemp("", "pgtest")
	if err != nil {
		return nil, err
	}
	s = &Server{home: home, disks: disks, password: "s3cret-pässword/@:"}
	if s.user, err = unprivileged(); err != nil {
		return s, err
	}
	if s.ca, err = s.writeCertificate(); err != nil {
		return s, err
	}
	return s, s.user.own(home)
}

// startAnywhere starts the server for the first time, on a free port.
func (s *Server) startAnywhere(bin string) (err error) {
	for range 5 { // somebody else may take the port meanwhile
		if s.port, err = freePort(); err != nil {
			return err
		}
		if err = s.start(bin); err == nil || !strings.Contains(err.Error(), "Address already in use") {
			break
		}
	}
	return err
}

// start runs the server and waits until it takes connections.
func (s *Server) start(bin string) error {
	log, err := os.OpenFile(filepath.Join(s.home, "log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	args := []string{"-D", s.data()}
	for _, setting := range []string{
		"listen_addresses=127.0.0.1", "port=" + strconv.Itoa(s.port), "unix_socket_directories=",
		"ssl=on", "ssl_cert_file=" + filepath.Join(s.home, "server.crt"), "ssl_key_file=" + filepath.Join(s.home, "server.key"),
		"fsync=off", "full_page_writes=off", "max_wal_size=4GB", "shared_buffers=64MB",
		"max_connections=100", "timezone=UTC", "restart_after_crash=off",
	} {
		args = append(args, "-c", setting)
	}
	s.process = exec.Command(filepath.Join(bin, "postgres"), args...)
	s.process.Dir, s.process.Stdout, s.process.Stderr = s.home, log, log
	s.user.run(s.process)
	if err := s.process.Start(); err != nil {
		s.process = nil
		return err
	}
	s.exited = make(chan struct{})
	go func(process *exec.Cmd, exited chan struct{}) {
		process.Wait()
		close(exited)
	}(s.process, s.exited)

	var last error
	for deadline := time.Now().Add(startTimeout); time.Now().Before(deadline); {
		if _, last = query(s.URL("postgres"), "SELECT 1"); last == nil {
			return nil
		}
		select {
		case <-s.exited:
			s.process = nil
			return fmt.Errorf("postgres ended at its start:\n%s", s.log())
		case <-time.After(20 * time.Millisecond):
		}
	}
	return fmt.Errorf("postgres takes no connections after %v: %w\n%s", startTimeout, last, s.log())
}

func (s *Server) signal(t testing.TB, signal os.Signal) {
	t.Helper()
	if s.process == nil {
		t.Fatal("postgres does not run")
	}
	if err := s.end(signal); err != nil {
		t.Fatal(err)
	}
}

// end sends a signal to the server and waits for its end. Its children notice the
// death of their parent by themselves; until then they hold its shared memory,
// and a new server would not start: they are waited for, too.
func (s *Server) end(signal os.Signal) error {
	pid := s.process.Process.Pid
	children := childrenOf(pid)
	if err := s.process.Process.Signal(signal); err != nil {
		return err
	}
	if signal == os.Kill {
		for _, child := range children {
			if p, err := os.FindProcess(child); err == nil {
				p.Kill()
			}
		}
	}
	select {
	case <-s.exited:
	case <-time.After(startTimeout):
		return fmt.Errorf("postgres outlives %v by %v:\n%s", signal, startTimeout, s.log())
	}
	s.process = nil
	for deadline := time.Now().Add(startTimeout); slices.ContainsFunc(children, alive); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			return fmt.Errorf("children of postgres outlive it by %v", startTimeout)
		}
	}
	return nil
}

// remove ends the server, if it runs, and removes everything.
func (s *Server) remove() {
	if s.process != nil {
		s.end(os.Interrupt)
	}
	os.RemoveAll(s.data())
	os.RemoveAll(s.wal())
	os.RemoveAll(s.home)
}

func (s *Server) data() string { return filepath.Join(cmp.Or(s.disks.Data, s.home), "data") }

// wal is where the write-ahead log is, if it has a disk of its own.
func (s *Server) wal() string { return filepath.Join(cmp.Or(s.disks.WAL, s.home), "wal") }

// log is the end of the server's log.
func (s *Server) log() string {
	text, err := os.ReadFile(filepath.Join(s.home, "log"))
	if err != nil {
		return err.Error()
	}
	return string(text[max(0, len(text)-4096):])
}

// Shared is one server for all tests of a package, made when the first asks:
//
//	var postgres pgtest.Shared
//
//	func TestMain(m *testing.M) {
//		code := m.Run()
//		postgres.Close()
//		os.Exit(code)
//	}
//
// It is safe for concurrent use, but for Close.
type Shared struct {
	once   sync.Once
	server *Server
	err    error
}

// NewDatabase is Server.NewDatabase on the shared server.
func (s *Shared) NewDatabase(t testing.TB) string {
	t.Helper()
	return s.Server(t).NewDatabase(t)
}

// Server is the shared server. Tests must not stop it.
func (s *Shared) Server(t testing.TB) *Server {
	t.Helper()
	bin := programs(t)
	s.once.Do(func() { s.server, s.err = create(bin, Disks{}) })
	if s.err != nil {
		t.Fatal(s.err)
	}
	return s.server
}

// Close ends the server, if there is one.
func (s *Shared) Close() {
	if s.server != nil {
		s.server.remove()
	}
}

// programs is the directory of PostgreSQL's programs, the newest version's.
func programs(t testing.TB) string {
	t.Helper()
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/initdb")
	version := func(path string) int {
		n, _ := strconv.Atoi(strings.Split(path, "/")[4])
		return n
	}
	if len(found) > 0 {
		return filepath.Dir(slices.MaxFunc(found, func(a, b string) int { return version(a) - version(b) }))
	}
	if path, err := exec.LookPath("initdb"); err == nil {
		if path, err = filepath.EvalSymlinks(path); err == nil { // postgres lies beside it
			return filepath.Dir(path)
		}
	}
	if os.Getenv("CI") == "true" {
		t.Fatal("PostgreSQL is missing: install the package postgresql")
	}
	t.Skip("needs PostgreSQL: install the package postgresql")
	return ""
}

// freePort is one that nobody listens on now. A server keeps its port when it is
// stopped, so none is taken from the range that connections are given theirs from
// by chance: on a busy loopback another would have it before the restart.
func freePort() (int, error) {
	for range 100 {
		port := 20000 + rand.IntN(10000)
		l, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
		if err != nil {
			continue
		}
		return port, l.Close()
	}
	return 0, fmt.Errorf("no port is free on the loopback interface")
}
