//go:build linux

package main

import (
	"cmp"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/partnerguard/partnerguard/internal/emulator"
)

// The fault suite: the program runs as a process under steady load, one thing around
// it breaks and is mended, and afterwards the invariants must hold:
//
//	go test -race -run TestFaults ./cmd/partnerguard
//
// The files faults_*_test.go hold the faults by topic.

// stage says how the guard of a fault is set up. Zero fields have harmless values.
type stage struct {
	mode      string   // default enforce
	authority string   // default the emulator's
	upstream  string   // the inside of upstreams.partner-center; default the emulator's URL
	timeouts  string   // the inside of timeouts
	ledger    string   // the inside of ledger
	listeners string   // further ones, each after a comma
	more      string   // further lines of the configuration
	dir       string   // data directory; default a fresh one
	program   string   // default partnerguard, built like the tests
	wrap      []string // a command that runs the guard in its own place
	env       []string // NAME=value
	keyless   bool     // it starts without keys, or with old ones
	// reader stands between the guard's stderr and the test. Nil reads at once.
	reader func(io.Reader) io.Reader
}

func (s stage) yaml(em *emulator.Emulator) string {
	return fmt.Sprintf(`version: 1
tenants: [%s]
mode: %s
listeners: [{address: "127.0.0.1:0"}%s]
admin: {address: "127.0.0.1:0"}
entra: {authority: %q}
upstreams: {partner-center: {%s}}
timeouts: {%s}
ledger: {%s}
%s
`, emulator.DefaultTenant, cmp.Or(s.mode, "enforce"), s.listeners, cmp.Or(s.authority, em.EntraURL()),
		cmp.Or(s.upstream, fmt.Sprintf("url: %q", em.PartnerURL())),
		// Idle connections go soon, so that what is left afterwards can be counted, and
		// these tests look at /readyz, but they are no balancer.
		cmp.Or(s.timeouts, "idle: 1s, unready: 0s"), s.ledger, s.more)
}

// scene is a guard, the emulator behind it, and what is known of both.
type scene struct {
	*guardProcess
	em      *emulator.Emulator
	secrets *canaries
	tokens  []loadToken
	rest    resources // of the guard before its first call
	counted int       // unrecorded calls, by the metric; -1 when nobody looked

	database, instance string // of its fleet; empty: its store is SQLite
}

// loadToken is a token of the load, and what a sound guard in enforce mode makes of it.
type loadToken struct{ token, reason string }

// sideBySide runs subtests at the same time. These wait most of their time, and go
// test -parallel counts processors.
type sideBySide struct{ tests sync.WaitGroup }

// slots bounds how many run, so that they do not disturb each other's measurements.
var slots = make(chan struct{}, 4)

func (s *sideBySide) run(t *testing.T, name string, test func(*testing.T)) {
	s.tests.Go(func() {
		slots <- struct{}{}
		defer func() { <-slots }()
		t.Run(name, test)
	})
}

func (s *sideBySide) wait() { s.tests.Wait() }

// play starts the guard of a stage.
func play(t *testing.T, em *emulator.Emulator, st stage) *scene {
	t.Helper()
	dir := cmp.Or(st.dir, filepath.Join(t.TempDir(), "data"))
	s := &scene{guardProcess: startStage(t, em, dir, st), em: em, secrets: &canaries{t, map[string]string{}}, counted: -1}
	for _, b := range []struct {
		reason string
		spec   emulator.TokenSpec
	}{
		{"mfa_present", emulator.TokenSpec{}},
		{"mfa_missing", emulator.TokenSpec{AMR: []string{"pwd"}}},
		{"app_only", emulator.TokenSpec{AppOnly: true}},
		{"mfa_present", emulator.TokenSpec{Version: "2.0", AMR: []string{"mfa"}}},
	} {
		s.tokens = append(s.tokens, loadToken{s.secrets.token("token "+b.reason, em.Mint(b.spec)), b.reason})
	}
	if !st.keyless {
		s.awaitReady(200, "keys ok")
	}
	s.rest = s.resources()
	return s
}

// startStage runs partnerguard serve as st says and waits until it is ready.
func startStage(t *testing.T, em *emulator.Emulator, dir string, st stage) *guardProcess {
	t.Helper()
	file := filepath.Join(t.TempDir(), "guard.yaml")
	if err := os.WriteFile(file, []byte(st.yaml(em)), 0o600); err != nil {
		t.Fatal(err)
	}
	g := &guardProcess{t: t, dir: dir, done: make(chan struct{})}
	args := append(slices.Clone(st.wrap), cmp.Or(st.program, "partnerguard"), "serve", "-c", file, "--data-dir", dir)
	g.cmd = exec.Command(args[0], args[1:]...)
	g.cmd.Env = append(os.Environ(), st.env...)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	g.cmd.Stdout, g.cmd.Stderr = w, w
	err = g.cmd.Start()
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	var in io.Reader = r
	if st.reader != nil {
		in = st.reader(r)
	}
	ready := make(chan bool, 1)
	go func() {
		defer r.Close()
		g.read(in, ready)
	}()
	t.Cleanup(func() {
		g.cmd.Process.Kill()
		<-g.done
		g.cmd.Wait()
	})
	select {
	case ok := <-ready:
		if !ok {
			t.Fatalf("the guard did not start:\n%s", g.text())
		}
	case <-time.After(60 * time.Second):
		t.Fatalf("the guard is not ready:\n%s", g.text())
	}
	return g
}

// crowd is the steady load: clients that keep their connections and call at an even
// pace, whatever comes back.
type crowd struct {
	scene   *scene
	quit    chan struct{}
	clients sync.WaitGroup
	limit   time.Duration // of one call
	emulate string        // Emulate header

	answers atomic.Int64 // whole ones
	mu      sync.Mutex
	calls   []sighting
}

// sighting is a call as its client saw it.
type sighting struct {
	request string // MS-RequestId, never used twice
	method  string
	token   int // index in scene.tokens
	began   time.Time
	took    time.Duration

	call, effect, reason string // the guard's headers; empty when it did not answer
	status               int
	err                  error // of the transfer; the answer may have begun
}

// kind says in a word or two what came of the call.
func (c sighting) kind() string {
	switch {
	case c.err != nil && c.call == "":
		return "no answer"
	case c.err != nil:
		return "broken answer"
	}
	return fmt.Sprintf("%d %s", c.status, c.reason)
}

func (c sighting) String() string {
	return fmt.Sprintf("%s %s, call %s, token %d, after %v: %d %s %s %v", c.method, c.request, c.call, c.token, c.took.Round(time.Millisecond), c.status, c.effect, c.reason, c.err)
}

// as reports whether the call got what a sound guard in enforce mode answers.
func (s *scene) as(c sighting) bool {
	want := s.tokens[c.token].reason
	status := http.StatusOK
	if want == "mfa_missing" {
		status = http.StatusUnauthorized
	}
	return c.err == nil && c.status == status && c.reason == want
}

// crowdConfig is what a load is made of.
type crowdConfig struct {
	clients int           // default 12
	rate    int           // calls a second of all clients together; default 120
	limit   time.Duration // of one call; default 20 s
	emulate string        // Emulate header of every call
	url     func() string // where the next call goes; default the guard
}

// underLoad starts the load, and returns once it runs well. It must be stopped.
func (s *scene) underLoad(cfg crowdConfig) *crowd {
	s.t.Helper()
	l := &crowd{scene: s, quit: make(chan struct{}), limit: cmp.Or(cfg.limit, 20*time.Second), emulate: cfg.emulate}
	clients := cmp.Or(cfg.clients, 12)
	pause := time.Duration(clients) * time.Second / time.Duration(cmp.Or(cfg.rate, 120))
	url := cfg.url
	if url == nil {
		url = func() string { return s.url }
	}
	for n := range clients {
		l.clients.Go(func() {
			tr := &http.Transport{DisableCompression: true}
			defer tr.CloseIdleConnections()
			select { // so that they do not all call at once
			case <-time.After(pause * time.Duration(n) / time.Duration(clients)):
			case <-l.quit:
				return
			}
			tick := time.NewTicker(pause)
			defer tick.Stop()
			for i := n; ; i++ {
				l.call(tr, url(), i)
				select {
				case <-tick.C:
				case <-l.quit:
				}
				select {
				case <-l.quit: // even if a tick is due, too
					return
				default:
				}
			}
		})
	}
	s.t.Cleanup(func() { l.stop() })
	return l
}

// call makes the i-th call of a client: reads and writes by turns, with each token.
func (l *crowd) call(tr *http.Transport, url string, i int) {
	c := sighting{request: uuid.NewString(), method: http.MethodGet, token: i / 4 % len(l.scene.tokens), began: time.Now()}
	path, body := "/v1/invoices?size=1", ""
	switch i % 4 {
	case 1:
		path = "/v1/customers?size=2"
	case 2:
		c.method, path, body = http.MethodPost, "/v1/_upload", strings.Repeat("order ", 300)
	case 3:
		c.method, path = http.MethodPost, "/v1/_upload"
	}
	r, err := http.NewRequest(c.method, url+path, nil)
	if err != nil {
		l.scene.t.Error(err)
		return
	}
	// A body without GetBody, so that this client's net/http repeats nothing itself.
	r.Body, r.ContentLength = io.NopCloser(strings.NewReader(body)), int64(len(body))
	if body == "" && c.method == http.MethodGet {
		r.ContentLength = -1 // it looks into the body, finds nothing and sends none
	}
	r.Header.Set("Authorization", "Bearer "+l.scene.tokens[c.token].token)
	r.Header.Set("MS-RequestId", c.request)
	if c.method == http.MethodPost {
		r.Header.Set("Idempotency-Key", c.request)
	}
	if l.emulate != "" {
		r.Header.Set("Emulate", l.emulate)
	}
	res, err := (&http.Client{Transport: tr, Timeout: l.limit}).Do(r)
	c.err = err
	if err == nil {
		c.status, c.call = res.StatusCode, res.Header.Get("Partnerguard-Call")
		c.effect, c.reason = res.Header.Get("Partnerguard-Effect"), res.Header.Get("Partnerguard-Reason")
		_, c.err = io.Copy(io.Discard, res.Body)
		res.Body.Close()
	}
	c.took = time.Since(c.began)
	l.mu.Lock()
	l.calls = append(l.calls, c)
	l.mu.Unlock()
	if c.err == nil {
		l.answers.Add(1)
	}
}

// stop ends the load, waits for the calls under way, and returns what the clients saw.
func (l *crowd) stop() []sighting {
	select {
	case <-l.quit:
	default:
		close(l.quit)
	}
	l.clients.Wait()
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.calls
}

// await returns once so many calls more were answered.
func (l *crowd) await(n int64) {
	l.scene.t.Helper()
	want := l.answers.Load() + n
	awaiting(l.scene.t, func() (string, bool) {
		now := l.answers.Load()
		return fmt.Sprintf("%d answers, want %d", now, want), now >= want
	})
}

// awaitSound returns once the last n calls, which began after it was called, went as
// in a world without faults.
func (l *crowd) awaitSound(n int) {
	l.scene.t.Helper()
	l.awaitAll(n, l.scene.as)
}

// awaitAll returns once ok holds for the last n calls, all of which began after it was
// called.
func (l *crowd) awaitAll(n int, ok func(sighting) bool) {
	l.scene.t.Helper()
	since := time.Now()
	awaiting(l.scene.t, func() (string, bool) {
		l.mu.Lock()
		defer l.mu.Unlock()
		if len(l.calls) < n {
			return "too few calls", false
		}
		last := l.calls[len(l.calls)-n:]
		for _, c := range last {
			if c.began.Before(since) || !ok(c) {
				return fmt.Sprint(tally(last)), false
			}
		}
		return "", true
	})
}

// awaitSince returns once n calls ended that began at from or later.
func (l *crowd) awaitSince(from time.Time, n int) {
	l.scene.t.Helper()
	awaiting(l.scene.t, func() (string, bool) {
		l.mu.Lock()
		defer l.mu.Unlock()
		now := len(between(l.calls, from, time.Now()))
		return fmt.Sprintf("%d calls, want %d", now, n), now >= n
	})
}

// between are the calls that began and ended in a span of time.
func between(calls []sighting, from, to time.Time) []sighting {
	var in []sighting
	for _, c := range calls {
		if !c.began.Before(from) && c.began.Add(c.took).Before(to) {
			in = append(in, c)
		}
	}
	return in
}

// tally counts calls by what came of them.
func tally(calls []sighting) map[string]int {
	n := map[string]int{}
	for _, c := range calls {
		n[c.kind()]++
	}
	return n
}

// percentile of how long calls took; p from 0 to 100.
func percentile(calls []sighting, p int) time.Duration {
	if len(calls) == 0 {
		return 0
	}
	d := make([]time.Duration, len(calls))
	for i, c := range calls {
		d[i] = c.took
	}
	slices.Sort(d)
	return d[(len(d)-1)*p/100]
}

// want fails the test unless there are calls, at least min of them, all of which ok
// holds for.
func want(t *testing.T, when string, calls []sighting, min int, ok func(sighting) bool) {
	t.Helper()
	wrong := slices.DeleteFunc(slices.Clone(calls), ok)
	t.Logf("%s: %d calls, %v; p50 %v, p99 %v, at most %v", when, len(calls), tally(calls),
		percentile(calls, 50).Round(time.Millisecond), percentile(calls, 99).Round(time.Millisecond), percentile(calls, 100).Round(time.Millisecond))
	if len(wrong) > 0 {
		t.Errorf("%s: %d of %d calls went otherwise than they should: %v, for instance %v", when, len(wrong), len(calls), tally(wrong), wrong[0])
	}
	if len(calls) < min {
		t.Errorf("%s: %d calls, too few to show anything", when, len(calls))
	}
}
