package main

import (
	"fmt"
	"io"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/partnerguard/partnerguard/internal/emulator"
	"github.com/partnerguard/partnerguard/telemetry/ledger"
)

// The guard is killed a hundred times under load, and each time the chain holds.
// Whatever reached Microsoft has its decision in the ledger, once; each decision has
// one outcome; the store tells the same.
func TestKillUnderLoad(t *testing.T) {
	t.Parallel()
	const clients, least = 8, 4
	rounds := 100
	if overHTTP2 {
		rounds = 20
	}
	em := startEmulator(t, emulator.Config{})
	dir := t.TempDir()
	yaml := guardYAML(em, "audit")
	load := startLoad(t, clients, []string{
		em.Mint(emulator.TokenSpec{}), em.Mint(emulator.TokenSpec{AMR: []string{"pwd"}}), em.Mint(emulator.TokenSpec{AppOnly: true}),
	})
	for round := range rounds {
		g := startGuard(t, dir, yaml)
		load.url.Store(&g.url)
		// Each time at another point, but always with calls under way.
		want := load.answers.Load() + int64(least+round%23)
		awaiting(t, func() (int64, bool) {
			n := load.answers.Load()
			return n, n >= want
		})
		g.kill()
		if r, err := ledger.Verify(dir, ledger.VerifyOptions{}); err != nil || r.Problem != nil {
			t.Fatalf("after kill %d the chain does not hold: %v, %v", round+1, r.Problem, err)
		}
	}
	load.stop()

	// The last start settles what the kills left open, and the store catches up.
	g := startGuard(t, dir, yaml)
	awaiting(t, func() (string, bool) {
		lines, stored, ended := len(ledgerLines(t, dir)), storedCalls(t, dir), 0
		for _, c := range stored {
			if !c.Open() {
				ended++
			}
		}
		return fmt.Sprintf("%d ledger lines, %d calls in the store, %d with outcome", lines, len(stored), ended), lines == 2*ended
	})
	g.stop()

	if stdout, stderr, code := partnerguard(t, "ledger", "verify", "--data-dir", dir); code != 0 {
		t.Errorf("ledger verify: exit %d\n%s%s", code, stdout, stderr)
	}
	text := func(l map[string]any, name string) string { s, _ := l[name].(string); return s }
	decided, outcomes, byRequest := map[string]bool{}, map[string]map[string]any{}, map[string]int{}
	for _, l := range ledgerObjects(t, dir) {
		id := text(l, "call")
		switch {
		case l["type"] == "outcome" && outcomes[id] != nil:
			t.Errorf("call %s has two outcomes: %v and %v", id, outcomes[id], l)
		case l["type"] == "outcome":
			outcomes[id] = l
			if !decided[id] {
				t.Errorf("call %s has an outcome before its decision", id)
			}
		case decided[id]:
			t.Errorf("call %s is decided twice", id)
		default:
			decided[id] = true
			byRequest[text(l, "request_id")]++
		}
	}
	for request, n := range byRequest {
		if n != 1 {
			t.Errorf("request %s has %d decisions", request, n)
		}
	}
	reached := map[string]bool{}
	for _, r := range em.Requests() {
		request := r.Header.Get("MS-RequestId")
		if reached[request] {
			t.Errorf("request %s reached Microsoft twice", request)
		}
		reached[request] = true
		if byRequest[request] != 1 {
			t.Errorf("request %s reached Microsoft and has %d decisions", request, byRequest[request])
		}
	}
	interrupted := 0
	for id := range decided {
		o := outcomes[id]
		switch {
		case o == nil:
			t.Errorf("call %s has no outcome", id)
		case text(o, "error") == "interrupted":
			interrupted++
		case o["status"] != 200.0:
			t.Errorf("outcome %v", o)
		}
	}
	if answers := int(load.answers.Load()); len(reached) < answers || len(decided) < len(reached) || answers < rounds*least {
		t.Errorf("%d decisions, %d requests that reached Microsoft, %d answers: want no fewer of what comes before", len(decided), len(reached), answers)
	}
	if interrupted == 0 {
		t.Error("no kill interrupted a call: this test shows nothing")
	}
	stored := storedCalls(t, dir)
	if len(stored) != len(decided) {
		t.Errorf("the store has %d calls, the ledger %d", len(stored), len(decided))
	}
	for id, c := range stored {
		o := outcomes[id]
		if !decided[id] || c.Error != text(o, "error") || c.Error == "" && c.Status != 200 {
			t.Errorf("call %s in the store: %d %q, in the ledger %v", id, c.Status, c.Error, o)
		}
	}
	t.Logf("%d decisions, %d reached Microsoft, %d interrupted", len(decided), len(reached), interrupted)
}

// load is a number of clients that call and call, wherever the guard is just now.
type load struct {
	url     atomic.Pointer[string] // base URL of the guard
	answers atomic.Int64
	quit    chan struct{}
	clients sync.WaitGroup
}

func startLoad(t *testing.T, clients int, tokens []string) *load {
	l := &load{quit: make(chan struct{})}
	// A connection a call: net/http repeats no request of its own accord then.
	transport := &http.Transport{DisableKeepAlives: true}
	if overHTTP2 {
		transport = http2Transport()
		transport.DisableKeepAlives = true
	}
	client := &http.Client{Transport: transport, Timeout: 20 * time.Second}
	for n := range clients {
		l.clients.Go(func() {
			for {
				select {
				case <-l.quit:
					return
				default:
				}
				url := l.url.Load()
				if url == nil || l.call(client, *url, tokens[n%len(tokens)]) != nil {
					// The guard is down; look again in a moment.
					select {
					case <-l.quit:
						return
					case <-time.After(5 * time.Millisecond):
					}
				}
			}
		})
	}
	t.Cleanup(l.stop)
	return l
}

func (l *load) call(client *http.Client, url, token string) error {
	r, err := http.NewRequest(http.MethodGet, url+"/v1/invoices?size=1", nil)
	if err != nil {
		return err
	}
	r.Header.Set("Authorization", "Bearer "+token)
	r.Header.Set("MS-RequestId", uuid.NewString())
	r.Header.Set("Emulate", "stall=2ms")
	res, err := client.Do(r)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if _, err := io.Copy(io.Discard, res.Body); err != nil {
		return err
	}
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("status %s", res.Status)
	}
	l.answers.Add(1)
	return nil
}

// stop ends the clients and waits for them; more than once is fine.
func (l *load) stop() {
	select {
	case <-l.quit:
	default:
		close(l.quit)
	}
	l.clients.Wait()
}
