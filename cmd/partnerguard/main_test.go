package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/partnerguard/partnerguard/internal/emulator"
	"github.com/partnerguard/partnerguard/telemetry/ledger"
	"github.com/partnerguard/partnerguard/telemetry/store"
	"github.com/rogpeppe/go-internal/testscript"
)

// TestMain puts the program itself, built like the tests, on the path as
// partnerguard: tests run it as a process of its own.
func TestMain(m *testing.M) {
	// The race detector makes every process sleep for a second when it ends.
	os.Setenv("GORACE", strings.TrimSpace(os.Getenv("GORACE")+" atexit_sleep_ms=0"))
	if overHTTP2 {
		plainClient.Transport = http2Transport()
	}
	testscript.Main(manyAtOnce{m}, map[string]func(){"partnerguard": main})
}

// manyAtOnce runs more tests at a time than there are processors: most of them wait.
type manyAtOnce struct{ *testing.M }

func (m manyAtOnce) Run() int {
	flag.Parse()
	if flag.Lookup("test.parallel").Value.String() == strconv.Itoa(runtime.GOMAXPROCS(0)) {
		flag.Set("test.parallel", strconv.Itoa(runtime.GOMAXPROCS(0)+1))
	}
	return m.M.Run()
}

// guardProcess is partnerguard serve, running.
type guardProcess struct {
	t     *testing.T
	cmd   *exec.Cmd
	dir   string // data directory
	url   string // of the first listener
	urls  []string
	admin string

	mu     sync.Mutex
	output bytes.Buffer // what it wrote to stdout and stderr
	done   chan struct{}
}

// startGuard runs partnerguard serve with a configuration and waits until it is
// ready. extra are environment variables.
func startGuard(t *testing.T, dir, yaml string, extra ...string) *guardProcess {
	t.Helper()
	file := filepath.Join(t.TempDir(), "guard.yaml")
	if err := os.WriteFile(file, []byte(yaml), 0o600); err != nil {
		t.Fatal(err)
	}
	return startGuardFile(t, dir, file, extra...)
}

// startGuardFile does the same with a configuration that stands in a file.
func startGuardFile(t *testing.T, dir, file string, extra ...string) *guardProcess {
	t.Helper()
	g := &guardProcess{t: t, dir: dir, done: make(chan struct{})}
	g.cmd = exec.Command("partnerguard", "serve", "-c", file, "--data-dir", dir)
	g.cmd.Env = append(os.Environ(), extra...)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	g.cmd.Stdout, g.cmd.Stderr = w, w
	if err := g.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	ready := make(chan bool, 1)
	go g.read(r, ready)
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

// read keeps the log and finds in it where the guard listens.
func (g *guardProcess) read(r io.Reader, ready chan<- bool) {
	defer close(g.done)
	s := bufio.NewScanner(r)
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		g.mu.Lock()
		g.output.Write(s.Bytes())
		g.output.WriteByte('\n')
		g.mu.Unlock()
		var line struct{ Msg, URL string }
		if json.Unmarshal(s.Bytes(), &line) != nil {
			continue
		}
		switch line.Msg {
		case "listening":
			g.urls = append(g.urls, line.URL)
			g.url = g.urls[0]
		case "admin":
			g.admin = line.URL
		case "ready":
			ready <- true
		}
	}
	close(ready)
}

func (g *guardProcess) text() string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.output.String()
}

// stop ends the guard as an operator does, and fails the test unless it ends well.
func (g *guardProcess) stop() {
	g.t.Helper()
	g.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-g.done:
	case <-time.After(60 * time.Second):
		g.t.Fatalf("the guard does not stop:\n%s", g.text())
	}
	if err := g.cmd.Wait(); err != nil {
		g.t.Fatalf("the guard ended with %v:\n%s", err, g.text())
	}
}

// kill ends the guard as the kernel does.
func (g *guardProcess) kill() {
	g.cmd.Process.Kill()
	<-g.done
	g.cmd.Wait()
}

// get makes a call through the guard and returns the answer, read whole.
func get(t *testing.T, url, token string, headers ...string) (*http.Response, []byte) {
	t.Helper()
	r, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	if token != "" {
		r.Header.Set("Authorization", "Bearer "+token)
	}
	for _, h := range headers {
		name, value, _ := strings.Cut(h, ": ")
		r.Header.Add(name, value)
	}
	return do(t, r)
}

func do(t *testing.T, r *http.Request) (*http.Response, []byte) {
	t.Helper()
	res, err := plainClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res, body
}

// plainClient neither unpacks bodies nor follows redirects.
var plainClient = &http.Client{
	Transport:     &http.Transport{DisableCompression: true},
	CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
}

// guardYAML is the configuration for an emulator, with free ports.
func guardYAML(em *emulator.Emulator, mode string, more ...string) string {
	text := strings.Replace(emulator.ConfigYAML(em.EntraURL(), em.PartnerURL()), "mode: audit", "mode: "+mode, 1)
	if overHTTP2 {
		text = strings.Replace(text, fmt.Sprintf("{url: %q}", em.PartnerURL()), fmt.Sprintf("{url: %q, ca: %q, http2: true}", em.PartnerTLSURL(), caFile(em)), 1)
	}
	return text + listenersYAML() + "\nadmin: {address: \"127.0.0.1:0\"}\n" + strings.Join(more, "\n") + "\n"
}

// upstreamURL is where guardYAML sends calls.
func upstreamURL(em *emulator.Emulator) string {
	if overHTTP2 {
		return em.PartnerTLSURL()
	}
	return em.PartnerURL()
}

func startEmulator(t *testing.T, cfg emulator.Config) *emulator.Emulator {
	t.Helper()
	em, err := emulator.Start(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { em.Close() })
	return em
}

// partnerguard runs one command line and returns what it printed and its exit code.
func partnerguard(t *testing.T, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	cmd := exec.Command("partnerguard", args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		var exit *exec.ExitError
		if !asExit(err, &exit) {
			t.Fatal(err)
		}
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

func asExit(err error, exit **exec.ExitError) bool {
	e, ok := err.(*exec.ExitError)
	*exit = e
	return ok
}

// line is one line of the ledger, decision or outcome.
type line struct {
	Type, Call, Effect, Reason, Mode, Integration, Error, Path string
	Status                                                     int
	WouldReject                                                bool `json:"would_reject"`
}

// ledgerLines reads the ledger of a guard.
func ledgerLines(t *testing.T, dir string) []line {
	t.Helper()
	r, err := ledger.NewReader(dir, ledger.Position{})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	var lines []line
	for {
		e, err := r.Next()
		if err == io.EOF {
			return lines
		}
		if err != nil {
			t.Fatal(err)
		}
		var l line
		if err := json.Unmarshal(e.Line, &l); err != nil {
			t.Fatalf("ledger line %s: %v", e.Line, err)
		}
		l.Type = e.Type
		if l.Type == ledger.TypeDecision || l.Type == ledger.TypeOutcome {
			lines = append(lines, l)
		}
	}
}

// storedCalls reads the store of a guard that was stopped.
func storedCalls(t *testing.T, dir string) map[string]store.Call {
	t.Helper()
	r, err := store.OpenReader(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	calls := map[string]store.Call{}
	err = r.Calls(context.Background(), store.Filter{}, func(c store.Call) error {
		if _, twice := calls[c.ID]; twice {
			t.Errorf("call %s stands in the store twice", c.ID)
		}
		calls[c.ID] = c
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return calls
}

// freePort is an address that nothing listens on just now.
func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}
