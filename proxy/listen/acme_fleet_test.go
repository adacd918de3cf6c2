package listen

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/certmagic"
	"github.com/partnerguard/partnerguard/internal/pgtest"
)

// postgres is the PostgreSQL that the tests share.
var postgres pgtest.Shared

func TestMain(m *testing.M) {
	if cfg := os.Getenv(otherGuardConfig); cfg != "" {
		runOtherGuard(cfg)
		return
	}
	code := m.Run()
	postgres.Close()
	os.Exit(code)
}

// fleetACME is an ACMEConfig of a fleet's guard, whose storage ends with the test.
func fleetACME(t *testing.T, cfg ACMEConfig, storage PostgresConfig) ACMEConfig {
	t.Helper()
	s, err := OpenPostgres(storage)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close) // after the guard's, which is made later
	cfg.Fleet = s
	if cfg.pace.look == 0 {
		cfg.pace.look = 200 * time.Millisecond
	}
	return cfg
}

func testFleet(t *testing.T, pebble func(*testing.T, pebbleConfig) *pebbleCA) {
	ca := pebble(t, pebbleConfig{})
	server := pgtest.Start(t)
	storage := PostgresConfig{URL: server.NewDatabase(t), Key: fleetKey()}
	fleet := func(dir string) *guarded {
		return ca.guard(t, fleetACME(t, ACMEConfig{Dir: dir, TLSALPN01: true}, storage))
	}
	// Both want the name at once, and one of them orders.
	one, other := fleet(""), fleet("")
	front := one.serve(fmt.Sprint("127.0.0.1:", one.cfg.TLSALPNPort))
	one.manage(ca.name)
	other.manage(ca.name)
	back := other.serve("127.0.0.1:0")
	outcomes := map[ACMEOutcome]int{(<-one.events).Outcome: 1}
	outcomes[(<-other.events).Outcome]++
	if outcomes[ACMEObtained] != 1 || outcomes[ACMEShared] != 1 {
		t.Fatalf("outcomes %v, want one obtained and one shared", outcomes)
	}
	first := ca.handshake(t, front, ca.name)
	if got := ca.handshake(t, back, ca.name); got.SerialNumber.Cmp(first.SerialNumber) != 0 {
		t.Errorf("the guards serve certificates %v and %v, want the same", first.SerialNumber, got.SerialNumber)
	}

	// A third one needs no CA.
	requests := ca.requests.Load()
	third := fleet("")
	third.manage(ca.name)
	if got := ca.handshake(t, third.serve("127.0.0.1:0"), ca.name); got.SerialNumber.Cmp(first.SerialNumber) != 0 {
		t.Errorf("a third guard serves %v, want %v", got.SerialNumber, first.SerialNumber)
	}
	if got := ca.requests.Load(); got != requests {
		t.Errorf("a third guard sent %d requests to the CA", got-requests)
	}

	// The database is down: all go on, also one that is started again.
	server.Stop(t)
	for _, g := range []*guarded{one, other} {
		if e := g.event(ACMEFailed); !strings.Contains(e.Err.Error(), "in the fleet's ACME storage") {
			t.Errorf("with the database down the event is %+v", e)
		}
	}
	ca.handshake(t, front, ca.name)
	ca.handshake(t, back, ca.name)
	third.acme.Close()
	again := ca.guard(t, third.cfg)
	start := time.Now()
	again.manage(ca.name)
	if took := time.Since(start); took > storageTimeout+time.Second {
		t.Errorf("Manage took %v with the database down", took)
	}
	ca.handshake(t, again.serve("127.0.0.1:0"), ca.name)
	// A new one, which has no copy, does not go to the CA by itself.
	fourth := fleet("")
	fourth.manage(ca.name, "other."+ca.name)
	fourth.event(ACMEFailed)
	fourth.acme.Close()
	if got := ca.requests.Load(); got != requests {
		t.Errorf("with the database down %d requests went to the CA", got-requests)
	}

	// When it is back, lost even, the guards that have a copy store it again.
	server.Restart(t)
	server.Exec(t, storage.URL, "TRUNCATE partnerguard.acme")
	stored := "SELECT key FROM partnerguard.acme WHERE key LIKE 'certificates/%'"
	for deadline := time.Now().Add(20 * time.Second); len(server.Rows(t, storage.URL, stored)) == 0; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("no guard stores its certificate again")
		}
	}
	fifth := fleet("")
	fifth.manage(ca.name)
	if got := ca.handshake(t, fifth.serve("127.0.0.1:0"), ca.name); got.SerialNumber.Cmp(first.SerialNumber) != 0 {
		t.Errorf("after the database was lost %v is served, want %v", got.SerialNumber, first.SerialNumber)
	}
}

// A renewal by one guard is taken over by the other, while both serve.
func testFleetRenewal(t *testing.T, pebble func(*testing.T, pebbleConfig) *pebbleCA) {
	ca := pebble(t, pebbleConfig{validity: 9 * time.Second})
	storage := PostgresConfig{URL: postgres.NewDatabase(t), Key: fleetKey()}
	one := ca.guard(t, fleetACME(t, ACMEConfig{TLSALPN01: true}, storage))
	other := ca.guard(t, fleetACME(t, ACMEConfig{TLSALPN01: true}, storage))
	front := one.serve(fmt.Sprint("127.0.0.1:", one.cfg.TLSALPNPort))
	back := other.serve("127.0.0.1:0")
	one.manage(ca.name)
	one.event(ACMEObtained)
	other.manage(ca.name)
	first := ca.handshake(t, back, ca.name)
	var outcomes []ACMEOutcome
	for _, g := range []*guarded{one, other} {
		select {
		case e := <-g.events:
			outcomes = append(outcomes, e.Outcome)
		case <-time.After(25 * time.Second):
			t.Fatal("nothing is renewed")
		}
	}
	if got := fmt.Sprint(outcomes); got != "[renewed shared]" && got != "[shared renewed]" {
		t.Errorf("outcomes %s, want one renewed and one shared", got)
	}
	a, b := ca.handshake(t, front, ca.name), ca.handshake(t, back, ca.name)
	if a.SerialNumber.Cmp(b.SerialNumber) != 0 || a.SerialNumber.Cmp(first.SerialNumber) == 0 {
		t.Errorf("after the renewal of %v the guards serve %v and %v", first.SerialNumber, a.SerialNumber, b.SerialNumber)
	}
}

// The CA refuses one guard, and hears of none of the others until the wait is over.
func testFleetWaits(t *testing.T, pebble func(*testing.T, pebbleConfig) *pebbleCA) {
	ca := pebble(t, pebbleConfig{})
	storage := PostgresConfig{URL: postgres.NewDatabase(t), Key: fleetKey()}
	cfg := ACMEConfig{HTTP01: true, HTTPPort: freePort(t)} // nobody is where the CA validates
	one := ca.guard(t, fleetACME(t, cfg, storage))
	one.manage(ca.name)
	failed := one.event(ACMEFailed)
	requests := ca.requests.Load()
	cfg.HTTPPort = freePort(t)
	other := ca.guard(t, fleetACME(t, cfg, storage))
	other.manage(ca.name)
	var err error
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		if _, err = other.acme.getCertificate(&tls.ClientHelloInfo{ServerName: ca.name}); strings.Contains(err.Error(), "onnection refused") {
			break
		}
	}
	if !strings.Contains(err.Error(), "onnection refused") || !strings.Contains(err.Error(), "next attempt at ") {
		t.Errorf("the other guard says %q, want why the CA refused the first", err)
	}
	if got := ca.requests.Load(); got != requests || time.Until(failed.Next) < 10*time.Minute {
		t.Errorf("%d requests more, next attempt at %s", got-requests, failed.Next)
	}
}

// The CA validates at a guard that is not the one that orders, and that is another
// process: certmagic shares the challenges of one.
func testFleetAnswersForOthers(t *testing.T, pebble func(*testing.T, pebbleConfig) *pebbleCA) {
	for _, challenge := range []string{"http-01", "tls-alpn-01"} {
		t.Run(challenge, func(t *testing.T) {
			ca := pebble(t, pebbleConfig{})
			storage := PostgresConfig{URL: postgres.NewDatabase(t), Key: fleetKey(), Instance: "orders"}
			cfg := fleetACME(t, ACMEConfig{HTTP01: challenge == "http-01", TLSALPN01: challenge == "tls-alpn-01", HTTPPort: freePort(t)}, storage)
			// While somebody orders the other guard waits its turn, and looks again in minutes.
			held, err := cfg.Fleet.acquire(t.Context(), orderLock((&certmagic.ACMEIssuer{CA: ca.directory}).IssuerKey(), ca.name))
			if err != nil {
				t.Fatal(err)
			}
			startOtherGuard(t, otherGuard{
				URL: storage.URL, Key: storage.Key, Dir: filepath.Join(t.TempDir(), "acme"), Directory: ca.directory, Name: ca.name,
				HTTPPort: ca.cfg.httpPort, TLSPort: ca.cfg.tlsPort,
			})
			held.release(t.Context())
			locks := postgres.Server(t).Rows(t, storage.URL, "SELECT name FROM partnerguard.acme_locks")
			if len(locks) > 0 {
				t.Fatalf("locks are held: %v", locks)
			}
			for _, path := range []string{"/", "/.well-known/acme-challenge/x"} {
				if res, err := ca.client.Get(fmt.Sprintf("http://127.0.0.1:%d%s", ca.cfg.httpPort, path)); err != nil || res.StatusCode != 404 {
					t.Errorf("GET %s from the other guard: %v, %v, want 404", path, res, err)
				}
			}
			g := &guarded{t: t, events: make(chan ACMEEvent, 10)}
			cfg.Dir, cfg.RootCAs, cfg.Directory, cfg.host = filepath.Join(t.TempDir(), "acme"), ca.roots, ca.directory, "127.0.0.1"
			cfg.TLSALPNPort, cfg.pace.first = freePort(t), 200*time.Millisecond
			cfg.Event = func(e ACMEEvent) { g.events <- e }
			if g.acme, err = NewACME(cfg); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(g.acme.Close)
			g.manage(ca.name)
			g.event(ACMEObtained)
			ca.handshake(t, g.serve("127.0.0.1:0"), ca.name)
			if left := postgres.Server(t).Rows(t, storage.URL, "SELECT key FROM partnerguard.acme WHERE key LIKE '%challenge%'"); len(left) > 0 {
				t.Errorf("answers to challenges are left: %v", left)
			}
		})
	}
}

// otherGuard is a guard of the fleet that answers, in a process of its own.
type otherGuard struct {
	URL, Key, Dir, Directory, Name string
	HTTPPort, TLSPort              int
}

// otherGuardConfig holds an otherGuard, JSON, in the environment.
const otherGuardConfig = "PARTNERGUARD_TEST_OTHER_GUARD"

// startOtherGuard returns when it answers, and waits for its turn to order.
func startOtherGuard(t *testing.T, cfg otherGuard) {
	t.Helper()
	text, err := json.Marshal(cfg)
	if err != nil {
		t.Fatal(err)
	}
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program)
	cmd.Env = append(os.Environ(), otherGuardConfig+"="+string(text))
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stdin.Close()
		cmd.Wait()
	})
	if line, err := bufio.NewReader(stdout).ReadString('\n'); line != "ready\n" {
		t.Fatalf("the other guard says %q, %v", line, err)
	}
}

// runOtherGuard is the other process. It ends with its standard input.
func runOtherGuard(text string) {
	var cfg otherGuard
	err := json.Unmarshal([]byte(text), &cfg)
	storage, err2 := OpenPostgres(PostgresConfig{URL: cfg.URL, Key: cfg.Key, Instance: "answers"})
	if err != nil || err2 != nil {
		panic(fmt.Sprint(err, err2))
	}
	a, err := NewACME(ACMEConfig{
		Dir: cfg.Dir, Directory: cfg.Directory, RootCAs: x509.NewCertPool(), Fleet: storage, HTTP01: true, TLSALPN01: true,
		HTTPPort: cfg.HTTPPort, TLSALPNPort: cfg.TLSPort, host: "127.0.0.1", pace: pace{look: time.Hour},
	})
	if err != nil {
		panic(err)
	}
	config, err := LoadTLS(TLSConfig{ACME: a})
	if err != nil {
		panic(err)
	}
	s, err := Open(Config{Name: "lan", Address: fmt.Sprint("127.0.0.1:", cfg.TLSPort), TLS: config, Handler: http.NotFoundHandler()})
	if err != nil {
		panic(err)
	}
	s.Serve()
	if err := a.Manage(context.Background(), []string{cfg.Name}); err != nil {
		panic(err)
	}
	// It opens the port of http-01 after it has found the lock taken.
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if c, err := net.Dial("tcp", fmt.Sprint("127.0.0.1:", cfg.HTTPPort)); err == nil {
			c.Close()
			fmt.Println("ready")
			break
		}
	}
	io.Copy(io.Discard, os.Stdin)
	s.Shutdown(context.Background())
	a.Close()
	storage.Close()
}
