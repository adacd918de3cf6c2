package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/partnerguard/partnerguard/internal/emulator"
)

// A start that cannot be: one line that says what is wrong, one that says what to
// do, and nothing is left running.
func TestFaultsAtStart(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	crooked := t.TempDir()
	if err := os.WriteFile(filepath.Join(crooked, "ledger"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	inUse := t.TempDir()
	other := startGuard(t, inUse, guardYAML(em, "audit"))

	at := func(key string) string {
		return strings.Replace(guardYAML(em, "audit"), key, strings.Replace(key, "127.0.0.1:0", taken.Addr().String(), 1), 1)
	}
	for _, row := range []struct {
		name, dir, yaml string
		code            int
		says, hint      string
	}{
		{"the listener's port is in use", t.TempDir(), at(`listeners: [{address: "127.0.0.1:0"}]`), 1,
			"open listener " + taken.Addr().String() + ":", "another program may listen there; see --listen"},
		{"the admin port is in use", t.TempDir(), at(`admin: {address: "127.0.0.1:0"}`), 1,
			"open the admin listener: listen tcp " + taken.Addr().String(), "another program may listen there; see --listen and --admin"},
		{"the data directory cannot be made", filepath.Join(file, "data"), guardYAML(em, "audit"), 1,
			"create data directory: mkdir " + file, "needs write access to the data directory; see --data-dir"},
		{"the data directory cannot be written", crooked, guardYAML(em, "audit"), 1,
			filepath.Join(crooked, "ledger"), "needs write access to the data directory; see --data-dir"},
		{"another guard writes there", inUse, guardYAML(em, "audit"), 1,
			"in use by another partnerguard", "another partnerguard writes here; stop it, or give this one its own --data-dir"},
		{"the configuration has a mistake", t.TempDir(), "version: 1\nmode: block\n", 2,
			`guard.yaml:2:1: mode: "block" is not a mode`, "nothing was started"},
	} {
		t.Run(row.name, func(t *testing.T) {
			stderr, code := refusedStart(t, row.dir, row.yaml)
			lines := strings.Split(strings.TrimSuffix(stderr, "\n"), "\n")
			// What was found before, the log may tell.
			for len(lines) > 2 && strings.HasPrefix(lines[0], "{") {
				lines = lines[1:]
			}
			if code != row.code || len(lines) != 2 ||
				!strings.HasPrefix(lines[0], "partnerguard: error: ") || !strings.Contains(lines[0], row.says) ||
				!strings.HasPrefix(lines[1], "partnerguard: hint: ") || !strings.Contains(lines[1], row.hint) {
				t.Errorf("exit %d, want %d with an error that says %q and a hint that says %q:\n%s", code, row.code, row.says, row.hint, stderr)
			}
		})
	}
	// The one that was there first goes on.
	if res, body := get(t, other.url+"/v1/invoices", em.Mint(emulator.TokenSpec{})); res.StatusCode != 200 {
		t.Errorf("%d %s", res.StatusCode, body)
	}
	other.stop()
}

// noBalancer: whoever looks at /readyz here waits for nothing.
const noBalancer = "timeouts: {unready: 0s}"

// refusedStart runs partnerguard serve, which must end by itself.
func refusedStart(t *testing.T, dir, yaml string) (stderr string, code int) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "guard.yaml")
	if err := os.WriteFile(file, []byte(yaml), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	var errs bytes.Buffer
	cmd := exec.CommandContext(ctx, "partnerguard", "serve", "-c", file, "--data-dir", dir)
	cmd.Stderr = &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	if ctx.Err() != nil {
		t.Fatalf("the guard started:\n%s", errs.String())
	}
	return errs.String(), cmd.ProcessState.ExitCode()
}

func TestFaultsOfUpstreamAtStart(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	yaml := strings.Replace(guardYAML(em, "audit", noBalancer), em.PartnerURL(), "http://"+freePort(t), 1)
	g := startGuard(t, t.TempDir(), yaml)
	g.awaitText(`"msg":"upstream cannot be reached"`, `"hint":"calls get 502 until it can; check DNS, firewall and HTTPS_PROXY"`)
	res, body := get(t, g.url+"/v1/invoices", em.Mint(emulator.TokenSpec{}))
	if res.StatusCode != 502 || res.Header.Get("Partnerguard-Reason") != "upstream_unreachable" {
		t.Errorf("%d %v %s, want 502 upstream_unreachable", res.StatusCode, res.Header, body)
	}
	g.awaitReady(200) // no reason to take the guard out
	g.stop()
}

func TestFaultsOfKeysOverARestart(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	token := em.Mint(emulator.TokenSpec{})
	call := func(g *guardProcess, want string) {
		t.Helper()
		res, body := get(t, g.url+"/v1/invoices", token)
		if res.StatusCode != 200 || res.Header.Get("Partnerguard-Reason") != want {
			t.Errorf("%d %s, want 200 %s: %s", res.StatusCode, res.Header.Get("Partnerguard-Reason"), want, body)
		}
	}
	degraded := func(g *guardProcess) {
		t.Helper()
		g.awaitReady(200, "keys degraded: tenant "+emulator.DefaultTenant)
	}
	dir := t.TempDir()

	em.SetKeysMode(emulator.KeysDown)
	g := startGuard(t, dir, guardYAML(em, "audit", noBalancer))
	call(g, "keys_unavailable")
	degraded(g)
	g.stop()

	em.SetKeysMode(emulator.KeysOK)
	g = startGuard(t, dir, guardYAML(em, "audit", noBalancer))
	call(g, "mfa_present")
	g.stop()

	// The keys of then are on the disk.
	em.SetKeysMode(emulator.KeysDown)
	g = startGuard(t, dir, guardYAML(em, "enforce", noBalancer))
	call(g, "mfa_present")
	degraded(g)
	g.stop()
}

func TestFaultsOfADamagedSegment(t *testing.T) {
	t.Parallel()
	for name, at := range map[string]float64{"in the header": 0.01, "in the middle": 0.5, "near the end": 0.9} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			faultInSegment(t, at)
		})
	}
}

// faultInSegment damages a segment at a share of its length.
func faultInSegment(t *testing.T, at float64) {
	em := startEmulator(t, emulator.Config{})
	token := em.Mint(emulator.TokenSpec{})
	dir := t.TempDir()
	g := startGuard(t, dir, guardYAML(em, "audit", noBalancer))
	for range 10 {
		get(t, g.url+"/v1/invoices", token)
	}
	g.stop()
	segment := filepath.Join(dir, "ledger", "000000000001.jsonl")
	b, err := os.ReadFile(segment)
	if err != nil {
		t.Fatal(err)
	}
	b[int(at*float64(len(b)))] ^= 0x20
	if err := os.WriteFile(segment, b, 0o600); err != nil {
		t.Fatal(err)
	}

	g = startGuard(t, dir, guardYAML(em, "audit", noBalancer))
	g.awaitText(`"msg":"ledger"`, `"event":"set_aside"`, `"segment":"000000000001.jsonl`)
	res, _ := get(t, g.url+"/v1/invoices", token)
	if res.StatusCode != 200 {
		t.Errorf("the guard answers %d, want 200", res.StatusCode)
	}
	g.awaitReady(200, "ledger degraded: damaged segments were set aside: 000000000001.jsonl")
	if got := metric(t, g, `partnerguard_degraded{part="ledger"}`); got != 1 {
		t.Errorf(`partnerguard_degraded{part="ledger"} is %v, want 1`, got)
	}
	g.stop()

	stdout, stderr, code := partnerguard(t, "ledger", "verify", "--data-dir", dir)
	if code != 0 || !strings.Contains(stdout, "was set aside as damaged and is not verified") || !strings.Contains(stdout, "the chain holds") {
		t.Errorf("ledger verify: exit %d\n%s%s", code, stdout, stderr)
	}
	aside, err := filepath.Glob(segment + ".damaged-*")
	if err != nil || len(aside) != 1 {
		t.Fatalf("the damaged segment is not there under another name: %v %v", aside, err)
	}
	if kept, err := os.ReadFile(aside[0]); err != nil || !bytes.Equal(kept, b) {
		t.Errorf("the damaged segment was changed: %v", err)
	}
	lines := ledgerLines(t, dir)
	if last := lines[len(lines)-1]; last.Call != res.Header.Get("Partnerguard-Call") || last.Status != 200 {
		t.Errorf("the ledger ends with %+v, want the outcome of the call after the damage", last)
	}
	calls := storedCalls(t, dir)
	if len(calls) != 11 || calls[res.Header.Get("Partnerguard-Call")].Status != 200 {
		t.Errorf("the store has %d calls, want the 10 before the damage and the one after", len(calls))
	}
	for id, c := range calls {
		if c.Status != 200 || c.Error != "" {
			t.Errorf("call %s: %d %s; the store knew its outcome", id, c.Status, c.Error)
		}
	}
}

func TestFaultsOfADamagedStore(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	dir := t.TempDir()
	g := startGuard(t, dir, guardYAML(em, "audit", noBalancer))
	for _, app := range []string{emulator.AppCompliant, emulator.AppPassword, emulator.AppPassword} {
		get(t, g.url+"/v1/invoices", sampleToken(t, em, app))
	}
	g.stop()
	before, _, _ := partnerguard(t, "report", "--data-dir", dir, "--format", "csv")
	for _, name := range []string{"store.db", "store.db-journal"} {
		if err := os.WriteFile(filepath.Join(dir, name), bytes.Repeat([]byte("garbage "), 4096), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, stderr, code := partnerguard(t, "report", "--data-dir", dir); code != 1 ||
		!strings.Contains(stderr, "hint: the calls are safe in the ledger: stop partnerguard serve, run partnerguard ledger rebuild, start it again") {
		t.Errorf("report of a damaged store: exit %d\n%s", code, stderr)
	}

	g = startGuard(t, dir, guardYAML(em, "audit", noBalancer))
	g.awaitText(`"msg":"store"`, `"event":"store_damaged"`, `"file":"`+filepath.Join(dir, "store.db.damaged-"))
	g.awaitReady(200)
	awaiting(t, func() (string, bool) {
		after, _, _ := partnerguard(t, "report", "--data-dir", dir, "--format", "csv")
		return after, after == before
	})
	g.stop()
	if len(storedCalls(t, dir)) != 3 {
		t.Errorf("the store has %d calls, want 3", len(storedCalls(t, dir)))
	}
}

// An operator stops the guard while a call is under way: readiness says so first,
// the call finishes, and the exit code is 0.
func TestFaultsOfStopWithACallInFlight(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	dir := t.TempDir()
	g := startGuard(t, dir, guardYAML(em, "audit", noBalancer))
	answer := stalledCall(t, em, g, "1500ms")
	g.cmd.Process.Signal(syscall.SIGTERM)
	awaiting(t, func() (string, bool) {
		res, body := get(t, g.admin+"/readyz", "")
		return string(body), res.StatusCode == 503 && string(body) == "draining\n"
	})
	if res, _ := get(t, g.admin+"/livez", ""); res.StatusCode != 200 {
		t.Errorf("/livez is %d while draining; nobody must kill the guard now", res.StatusCode)
	}
	awaiting(t, func() (error, bool) {
		c, err := net.Dial("tcp", strings.TrimPrefix(g.url, "http://"))
		if err == nil {
			c.Close()
		}
		return err, err != nil
	})
	g.cmd.Process.Signal(syscall.SIGHUP) // a reload that comes too late ends nothing
	if a := <-answer; a.err != nil || a.status != 200 || !json.Valid(a.body) {
		t.Errorf("the call in flight got %d %s %v", a.status, a.body, a.err)
	}
	g.awaitExit(0)
	lines := ledgerLines(t, dir)
	if len(lines) != 2 || lines[1].Status != 200 || lines[1].Error != "" {
		t.Errorf("ledger %+v", lines)
	}
	if len(storedCalls(t, dir)) != 1 {
		t.Error("the store lacks the call")
	}
}

// A reload that comes while the guard starts is no reason to end.
func TestFaultsOfHangUpAtStart(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	dir := filepath.Join(t.TempDir(), "data")
	file := filepath.Join(t.TempDir(), "guard.yaml")
	write(t, file, guardYAML(em, "audit", noBalancer))
	cmd := exec.Command("partnerguard", "serve", "-c", file, "--data-dir", dir)
	log, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill() })
	awaiting(t, func() (error, bool) {
		_, err := os.Stat(filepath.Join(dir, "ledger"))
		return err, err == nil
	})
	ready := false
	for range 3 {
		cmd.Process.Signal(syscall.SIGHUP)
	}
	var text strings.Builder
	for lines := bufio.NewScanner(log); lines.Scan(); {
		text.WriteString(lines.Text() + "\n")
		if strings.Contains(lines.Text(), `"msg":"configuration is unchanged"`) {
			ready = true
			cmd.Process.Signal(os.Interrupt)
		}
	}
	if err := cmd.Wait(); err != nil || !ready {
		t.Errorf("%v:\n%s", err, text.String())
	}
}

func TestFaultsOfStopTwice(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	dir := t.TempDir()
	g := startGuard(t, dir, guardYAML(em, "audit"))
	answer := stalledCall(t, em, g, "60s")
	g.cmd.Process.Signal(syscall.SIGTERM)
	awaiting(t, func() (int, bool) {
		res, _ := get(t, g.admin+"/readyz", "")
		return res.StatusCode, res.StatusCode == 503
	})
	g.cmd.Process.Signal(syscall.SIGTERM)
	g.awaitExit(1)
	if a := <-answer; a.err == nil {
		t.Errorf("the call in flight got %d %s, want a broken connection", a.status, a.body)
	}

	// The next start closes the account of what was cut.
	startGuard(t, dir, guardYAML(em, "audit")).stop()
	lines := ledgerLines(t, dir)
	if len(lines) != 2 || lines[1].Error != "interrupted" {
		t.Errorf("ledger %+v, want an outcome that says interrupted", lines)
	}
}

func TestFaultsOfStopWithoutEnd(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	dir := t.TempDir()
	g := startGuard(t, dir, guardYAML(em, "audit", "timeouts: {drain: 100ms}"))
	answer := stalledCall(t, em, g, "60s")
	g.cmd.Process.Signal(syscall.SIGTERM)
	g.awaitExit(0)
	g.awaitText(`"msg":"calls were cut off","hint":"timeouts.drain is how long they may take"`)
	if a := <-answer; a.err == nil {
		t.Errorf("the call that was cut off got %d %s", a.status, a.body)
	}
	lines := ledgerLines(t, dir)
	if len(lines) != 2 || lines[1].Error != "client_canceled" {
		t.Errorf("ledger %+v, want the outcome of the call that was cut off", lines)
	}
}

// Nothing of the admin listener answers where calls come in, nor the other way round.
func TestFaultsOfAdminPaths(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	g := startGuard(t, t.TempDir(), guardYAML(em, "audit"))
	for _, path := range []string{"/", "/metrics", "/livez", "/readyz", "/readyz?verbose", "/api/v1/report", "/debug/pprof/"} {
		em.Reset()
		res, body := get(t, g.url+path, em.Mint(emulator.TokenSpec{}))
		if reached := em.Requests(); len(reached) != 1 || reached[0].Target != path {
			t.Errorf("%s did not reach the upstream", path)
		}
		if res.StatusCode != 404 || res.Header.Get("Partnerguard-Call") == "" {
			t.Errorf("%s: %d %s, want Microsoft's 404", path, res.StatusCode, body)
		}
	}
	em.Reset()
	res, _ := get(t, g.admin+"/v1/invoices", em.Mint(emulator.TokenSpec{}))
	if res.StatusCode != 404 || em.Count() != 0 {
		t.Errorf("the admin listener answers a call with %d, and %d reached the upstream", res.StatusCode, em.Count())
	}
}

// awaiting tries until it works, and returns what it then has.
func awaiting[T any](t *testing.T, try func() (T, bool)) T {
	t.Helper()
	deadline := time.After(time.Minute)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		v, ok := try()
		if ok {
			return v
		}
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("it does not come; at last it was %+v", v)
		}
	}
}

// answered is what a call got.
type answered struct {
	status int
	body   []byte
	err    error
}

// stalledCall makes a call that Microsoft lets wait, and returns once it is there.
func stalledCall(t *testing.T, em *emulator.Emulator, g *guardProcess, stall string) <-chan answered {
	t.Helper()
	r, err := http.NewRequest(http.MethodGet, g.url+"/v1/invoices", nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Authorization", "Bearer "+em.Mint(emulator.TokenSpec{}))
	r.Header.Set("Emulate", "stall="+stall)
	done := make(chan answered, 1)
	go func() {
		res, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(r)
		if err != nil {
			done <- answered{err: err}
			return
		}
		defer res.Body.Close()
		body, err := io.ReadAll(res.Body)
		done <- answered{res.StatusCode, body, err}
	}()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := em.Wait(ctx, func(seen []emulator.Request) bool { return len(seen) == 1 }); err != nil {
		t.Fatalf("the call does not arrive: %v", err)
	}
	return done
}

// awaitExit waits until the guard ended by itself with an exit code; -1 is a signal.
func (g *guardProcess) awaitExit(code int) {
	g.t.Helper()
	select {
	case <-g.done:
	case <-time.After(20 * time.Second):
		g.t.Fatalf("the guard does not end:\n%s", g.events())
	}
	g.cmd.Wait()
	if got := g.cmd.ProcessState.ExitCode(); got != code {
		g.t.Errorf("exit code %d, want %d:\n%s", got, code, g.events())
	}
}

// awaitText waits until one line of the guard's log holds all of parts.
func (g *guardProcess) awaitText(parts ...string) {
	g.t.Helper()
	awaiting(g.t, func() (string, bool) {
		text := g.text()
	lines:
		for l := range strings.Lines(text) {
			for _, part := range parts {
				if !strings.Contains(l, part) {
					continue lines
				}
			}
			return text, true
		}
		return fmt.Sprintf("no line with %q in\n%s", parts, g.events()), false
	})
}

// events are the lines of the guard's log that are not about one call.
func (g *guardProcess) events() string {
	var b strings.Builder
	for l := range strings.Lines(g.text()) {
		if !strings.Contains(l, `"msg":"call"`) {
			b.WriteString(l)
		}
	}
	return b.String()
}

// said returns the lines of the guard's log that hold all of parts.
func (g *guardProcess) said(parts ...string) (lines []string) {
	for l := range strings.Lines(g.text()) {
		if !slices.ContainsFunc(parts, func(p string) bool { return !strings.Contains(l, p) }) {
			lines = append(lines, l)
		}
	}
	return lines
}

// awaitReady waits until /readyz has that status, and says that of the parts; how
// many spaces stand between the words does not count.
func (g *guardProcess) awaitReady(status int, parts ...string) {
	g.t.Helper()
	awaiting(g.t, func() (string, bool) {
		res, body := get(g.t, g.admin+"/readyz?verbose", "")
		text, ok := strings.Join(strings.Fields(string(body)), " "), res.StatusCode == status
		for _, p := range parts {
			ok = ok && strings.Contains(text, p)
		}
		return fmt.Sprintf("%d %s, want %d with %q", res.StatusCode, body, status, parts), ok
	})
}
