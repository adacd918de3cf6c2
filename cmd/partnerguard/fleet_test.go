package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/partnerguard/partnerguard/internal/emulator"
	"github.com/partnerguard/partnerguard/internal/pgtest"
	"github.com/partnerguard/partnerguard/telemetry/store"
)

// Three guards share one PostgreSQL. Under load the database goes away for a while,
// comes back, and then one guard is killed and started again. No call fails because
// of the database; afterwards every call is in it, once, under its guard.
//
// FLEET_OUTAGE is how long the database stays away, 8s by default.
func TestFleet(t *testing.T) {
	outage := 8 * time.Second
	if text := os.Getenv("FLEET_OUTAGE"); text != "" {
		var err error
		if outage, err = time.ParseDuration(text); err != nil {
			t.Fatal(err)
		}
	}
	server := pgtest.Start(t)
	database := server.NewDatabase(t)
	t.Setenv("GUARD_STORE", database)
	em := startEmulator(t, emulator.Config{})
	yaml := guardYAML(em, "audit", "store: {postgres: env:GUARD_STORE}")
	tokens := []string{em.Mint(emulator.TokenSpec{}), em.Mint(emulator.TokenSpec{AMR: []string{"pwd"}, UPN: "anna@contoso.example", ObjectID: "0a0b0c0d-1111-4222-8333-444455556666"}), em.Mint(emulator.TokenSpec{AppOnly: true})}

	var fleet []*fleetGuard
	for n := range 3 {
		g := &fleetGuard{t: t, name: fmt.Sprintf("guard-%d", n+1), dir: t.TempDir(), yaml: yaml, tokens: tokens}
		g.start()
		g.load(2)
		fleet = append(fleet, g)
	}
	all := func(f func(*fleetGuard)) {
		t.Helper()
		for _, g := range fleet {
			f(g)
		}
	}
	all(func(g *fleetGuard) { g.awaitAnswers(50) })

	server.Stop(t)
	down := time.Now()
	all(func(g *fleetGuard) { g.awaitAnswers(50) }) // while nobody can be told of them
	time.Sleep(time.Until(down.Add(outage)))
	server.Restart(t)
	all(func(g *fleetGuard) { g.awaitAnswers(50) })

	victim := fleet[1]
	victim.kill()
	victim.start()
	all(func(g *fleetGuard) { g.awaitAnswers(50) })
	all((*fleetGuard).stopLoad)

	// Each guard's ledger says what must be in the database.
	want := 0
	awaiting(t, func() (string, bool) {
		decisions, outcomes := 0, 0
		for _, g := range fleet {
			for _, l := range ledgerLines(t, g.dir) {
				if l.Type == "decision" {
					decisions++
				} else {
					outcomes++
				}
			}
		}
		want = decisions
		return fmt.Sprintf("%d decisions, %d outcomes", decisions, outcomes), decisions == outcomes
	})
	began := time.Now()
	awaiting(t, func() (string, bool) {
		n := len(fleetCalls(t, database))
		return fmt.Sprintf("%d calls of %d in the database", n, want), n == want
	})
	t.Logf("after the last answer the database took %v to hold all", time.Since(began).Round(time.Millisecond))

	calls := fleetCalls(t, database)
	byRequest := map[string]store.Call{}
	for _, c := range calls {
		if _, twice := byRequest[c.RequestID]; twice {
			t.Errorf("request %s is in the database twice", c.RequestID)
		}
		byRequest[c.RequestID] = c
	}
	interrupted, answered := 0, 0
	for _, g := range fleet {
		for _, l := range ledgerObjects(t, g.dir) {
			id, _ := l["call"].(string)
			c, known := calls[id]
			if l["type"] == "decision" {
				if !known || c.Instance != g.name {
					t.Errorf("call %s of %s is in the database: %v, under %q", id, g.name, known, c.Instance)
				}
				continue
			}
			text, _ := l["error"].(string)
			status, _ := l["status"].(float64)
			if known && (c.Error != text || c.Status != int64(status)) {
				t.Errorf("call %s ended with %v %q, in the database with %d %q", id, status, text, c.Status, c.Error)
			}
			if text == "interrupted" {
				interrupted++
				if g != victim {
					t.Errorf("call %s of %s was interrupted, though only %s was killed", id, g.name, victim.name)
				}
			}
		}
		for request, err := range g.requests {
			c, known := byRequest[request]
			switch {
			case err == nil && g == victim && c.Error == "interrupted":
				answered++ // and the guard killed before it could note that
			case err == nil && (!known || c.Instance != g.name || c.Status != http.StatusOK):
				t.Errorf("request %s, which %s answered, is in the database: %v, of %q with status %d", request, g.name, known, c.Instance, c.Status)
			case err == nil:
				answered++
			case g != victim || !strings.HasPrefix(err.Error(), whileDown):
				t.Errorf("request %s to %s: %v", request, g.name, err)
			}
		}
	}
	for _, r := range em.Requests() {
		if _, known := byRequest[r.Header.Get("MS-RequestId")]; !known {
			t.Errorf("request %s reached Microsoft and is not in the database", r.Header.Get("MS-RequestId"))
		}
	}
	t.Logf("%d calls, %d answered, %d interrupted; the database was away for %v", len(calls), answered, interrupted, outage)

	// The command line reads all guards at one place.
	stdout, stderr, code := partnerguard(t, "report", "--store", "env:GUARD_STORE", "--format", "json")
	var report struct{ Calls, Open int64 }
	if err := json.Unmarshal([]byte(stdout), &report); err != nil || code != 0 {
		t.Fatalf("report: exit %d, %v\n%s%s", code, err, stdout, stderr)
	}
	if report.Calls != int64(len(calls)) || report.Open != 0 {
		t.Errorf("report counts %d calls, %d of them open, want %d, none open", report.Calls, report.Open, len(calls))
	}
	for _, g := range fleet {
		for request, err := range g.requests {
			if err != nil {
				continue
			}
			stdout, stderr, code := partnerguard(t, "calls", "--store", "env:GUARD_STORE", "--request-id", request, "--format", "json")
			var c store.Call
			if err := json.Unmarshal([]byte(stdout), &c); err != nil || code != 0 || c.RequestID != request || c.Instance != g.name {
				t.Errorf("calls --request-id %s: exit %d, %v, of %q, want %q\n%s%s", request, code, err, c.Instance, g.name, stdout, stderr)
			}
			break // one of each guard
		}
	}
	all(func(g *fleetGuard) {
		g.stop()
		if text := g.text(); strings.Contains(text, "pässword") || strings.Contains(text, "p%C3%A4ssword") {
			t.Errorf("the log of %s holds the database's password:\n%s", g.name, text)
		} else if n := strings.Count(text, `"msg":"store"`); n > 20 {
			t.Errorf("%s logged %d lines about the store:\n%s", g.name, n, text)
		} else if g != victim && n == 0 {
			t.Errorf("%s did not say that the database was away:\n%s", g.name, text)
		}
		if stdout, stderr, code := partnerguard(t, "ledger", "verify", "--data-dir", g.dir); code != 0 {
			t.Errorf("ledger verify of %s: exit %d\n%s%s", g.name, code, stdout, stderr)
		}
	})

	// A user is forgotten by the whole fleet, though each guard has its own name for him.
	byAnna := func() string {
		t.Helper()
		stdout, stderr, code := partnerguard(t, "calls", "--store", "env:GUARD_STORE", "--format", "json", "--limit", "0", "--user", "anna@contoso.example")
		if code != 0 {
			t.Fatalf("calls --user: exit %d\n%s", code, stderr)
		}
		return stdout
	}
	before := byAnna()
	for _, g := range fleet {
		if !strings.Contains(before, `"instance":"`+g.name+`"`) {
			t.Errorf("no call by her at %s: this test shows nothing", g.name)
		}
	}
	if stdout, stderr, code := partnerguard(t, "ledger", "forget", "anna@contoso.example", "--data-dir", fleet[0].dir, "--store", "env:GUARD_STORE"); code != 0 {
		t.Fatalf("ledger forget: exit %d\n%s%s", code, stdout, stderr)
	}
	if after := byAnna(); after != "" {
		t.Errorf("after she was forgotten, calls --user finds %.300s", after)
	}
	if n := len(fleetCalls(t, database)); n != len(calls) {
		t.Errorf("after she was forgotten the database has %d calls, want all %d", n, len(calls))
	}
}

// A guard needs its fleet's database neither to start nor to serve.
func TestTheGuardStartsWhileTheFleetsDatabaseIsDown(t *testing.T) {
	em := startEmulator(t, emulator.Config{})
	t.Setenv("GUARD_STORE", "postgres://guard:hunter2@"+freePort(t)+"/guard?sslmode=disable")
	t.Setenv("ACME_STORAGE_KEY", "MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE=")
	text := strings.Replace(guardYAML(em, "audit", "store: {postgres: env:GUARD_STORE}"), listenersYAML(), fmt.Sprintf(
		"listeners: [{address: \"127.0.0.1:0\"}, {name: lan, address: \"127.0.0.1:0\", tls: {acme: [guard.contoso.example]}}]\n"+
			"acme: {directory: \"https://%s/dir\", http_port: %s, tls_alpn_port: %s, storage: postgres, storage_key: env:ACME_STORAGE_KEY}",
		freePort(t), port(freePort(t)), port(freePort(t))), 1)
	g := startGuard(t, t.TempDir(), text, "PARTNERGUARD_INSTANCE=guard-1")
	if res, _ := get(t, g.urls[0]+"/v1/customers?size=1", em.Mint(emulator.TokenSpec{})); res.StatusCode != 200 {
		t.Errorf("a call got %d", res.StatusCode)
	}
	if l, _ := g.await(0, "certificate"); !strings.Contains(l.Error, "in the fleet's ACME storage") {
		t.Errorf("the log says %+v", l)
	}
	g.stop()
	if strings.Contains(g.text(), "hunter2") {
		t.Errorf("the log holds the database's password:\n%s", g.text())
	}
	for _, l := range ledgerObjects(t, g.dir) {
		if l["type"] == "decision" && l["instance"] != "guard-1" {
			t.Errorf("the ledger names the guard %v, want guard-1", l["instance"])
		}
	}
}

// fleetGuard is one guard of a fleet and its clients.
type fleetGuard struct {
	*guardProcess
	t      *testing.T
	name   string
	dir    string
	yaml   string
	tokens []string

	url     atomic.Pointer[string]
	down    atomic.Bool // it is being killed or started again
	answers atomic.Int64
	quit    chan struct{}
	clients sync.WaitGroup

	mu       sync.Mutex
	requests map[string]error // of the clients, by MS-RequestId; nil: answered
}

// whileDown begins the errors of calls that were made while the guard was down.
const whileDown = "the guard is down: "

func (g *fleetGuard) start() {
	g.t.Helper()
	g.guardProcess = startGuard(g.t, g.dir, g.yaml, "PARTNERGUARD_INSTANCE="+g.name)
	g.url.Store(&g.guardProcess.url)
	g.down.Store(false)
}

func (g *fleetGuard) kill() {
	g.down.Store(true)
	g.guardProcess.kill()
}

func (g *fleetGuard) load(clients int) {
	g.quit, g.requests = make(chan struct{}), map[string]error{}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 20 * time.Second}
	for range clients {
		g.clients.Go(func() {
			for {
				id := uuid.NewString()
				down := g.down.Load()
				err := g.call(client, id)
				if err != nil && (down || g.down.Load()) {
					err = fmt.Errorf("%s%w", whileDown, err)
				}
				g.mu.Lock()
				g.requests[id] = err
				g.mu.Unlock()
				if err == nil {
					g.answers.Add(1)
				}
				select {
				case <-g.quit:
					return
				case <-time.After(5 * time.Millisecond):
				}
			}
		})
	}
	g.t.Cleanup(g.stopLoad)
}

func (g *fleetGuard) call(client *http.Client, id string) error {
	r, err := http.NewRequest(http.MethodGet, *g.url.Load()+"/v1/invoices?size=1", nil)
	if err != nil {
		return err
	}
	r.Header.Set("Authorization", "Bearer "+g.tokens[rand.IntN(len(g.tokens))])
	r.Header.Set("MS-RequestId", id)
	r.Header.Set("Emulate", "stall=5ms")
	res, err := client.Do(r)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if _, err := io.Copy(io.Discard, res.Body); err != nil {
		return err
	}
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("status %s", strconv.Itoa(res.StatusCode))
	}
	return nil
}

// awaitAnswers waits for so many answers more.
func (g *fleetGuard) awaitAnswers(more int64) {
	g.t.Helper()
	want := g.answers.Load() + more
	awaiting(g.t, func() (int64, bool) {
		n := g.answers.Load()
		return n, n >= want
	})
}

func (g *fleetGuard) stopLoad() {
	select {
	case <-g.quit:
	default:
		close(g.quit)
	}
	g.clients.Wait()
}

// fleetCalls are the calls in a fleet's database, by their id.
func fleetCalls(t *testing.T, database string) map[string]store.Call {
	t.Helper()
	r, err := store.OpenPostgresReader(t.Context(), database)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	calls := map[string]store.Call{}
	err = r.Calls(context.Background(), store.Filter{}, func(c store.Call) error {
		if _, twice := calls[c.ID]; twice {
			t.Errorf("call %s is in the database twice", c.ID)
		}
		calls[c.ID] = c
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return calls
}
