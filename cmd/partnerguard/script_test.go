package main

import (
	"errors"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/partnerguard/partnerguard/internal/emulator"
	"github.com/rogpeppe/go-internal/testscript"
)

// TestScripts runs the command line as a user types it. Each script finds in its
// directory
//
//	emulator.yaml    the configuration that points at a running emulator
//	guard.yaml       the same with mode enforce
//	admin.yaml       the default with its admin listener at $ADMIN
//	tokens/REASON    a token that gets that Reason; REASON.header has Bearer before it
//	data             a data directory with the calls of sampleCalls
//	ready            one with a call of nightly-billing only
//
// and in its environment LISTEN and ADMIN, free addresses, and CUSTOMER.
func TestScripts(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	samples, ready := t.TempDir(), t.TempDir()
	g := startGuard(t, samples, guardYAML(em, "audit"))
	sampleCalls(t, em, g)
	g.stop()
	g = startGuard(t, ready, guardYAML(em, "audit"))
	get(t, g.url+"/v1/invoices", sampleToken(t, em, emulator.AppCompliant))
	g.stop()

	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(env *testscript.Env) error {
			env.Setenv("GORACE", os.Getenv("GORACE"))
			env.Setenv("XDG_STATE_HOME", filepath.Join(env.WorkDir, "state"))
			admin := freePort(t)
			env.Setenv("LISTEN", freePort(t))
			env.Setenv("ADMIN", admin)
			env.Setenv("CUSTOMER", em.Customers()[0])
			write := func(name, text string) error {
				return os.WriteFile(filepath.Join(env.WorkDir, name), []byte(text), 0o600)
			}
			audit := emulator.ConfigYAML(em.EntraURL(), em.PartnerURL())
			return errors.Join(
				write("emulator.yaml", audit),
				write("guard.yaml", strings.Replace(audit, "mode: audit", "mode: enforce", 1)),
				write("admin.yaml", "version: 1\nadmin: {address: \""+admin+"\"}\n"),
				writeTokens(em, filepath.Join(env.WorkDir, "tokens")),
				copyData(filepath.Join(env.WorkDir, "data"), samples),
				copyData(filepath.Join(env.WorkDir, "ready"), ready),
			)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exits":  scriptExits,
			"edit":   scriptEdit,
			"hidden": scriptHidden,
			"await":  scriptAwait,
		},
	})
}

// copyData copies a data directory. os.CopyFS opens files to all, which a key may not be.
func copyData(to, from string) error {
	return errors.Join(os.CopyFS(to, os.DirFS(from)), os.Chmod(filepath.Join(to, "ledger.key"), 0o600))
}

func sampleToken(t *testing.T, em *emulator.Emulator, app string) string {
	t.Helper()
	token, err := em.Token(app)
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// sampleCalls makes the calls that the scripts of report and calls look for: four
// integrations, one of them refused by Microsoft.
func sampleCalls(t *testing.T, em *emulator.Emulator, g *guardProcess) {
	t.Helper()
	call := func(app, path, request, correlation string, more ...string) {
		t.Helper()
		id := func(s string) string { return "6c583d8d-46cd-420c-ae3d-00000000000" + s }
		res, body := get(t, g.url+path, sampleToken(t, em, app), append(more, "MS-RequestId: "+id(request), "MS-CorrelationId: "+id(correlation))...)
		if want := map[bool]int{true: 401, false: 200}[len(more) > 0]; res.StatusCode != want {
			t.Fatalf("%s of %s: %d %s", path, app, res.StatusCode, body)
		}
	}
	call(emulator.AppCompliant, "/v1/customers?size=1", "1", "a")
	call(emulator.AppPassword, "/v1/invoices?size=1", "2", "a")
	call(emulator.AppOnly, "/v1/invoices?size=1", "3", "b")
	call(emulator.AppIntermittent, "/v1/customers/"+em.Customers()[0]+"/subscriptions", "4", "b", "Emulate: refuse=code-string")
}

// writeTokens writes a file for every Reason that a token can have.
func writeTokens(em *emulator.Emulator, dir string) error {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	tokens := map[string]string{
		"federated": em.Mint(emulator.TokenSpec{AMR: []string{"fed"}}),
		"password":  em.Mint(emulator.TokenSpec{AMR: []string{"pwd"}}),
	}
	for _, c := range tokenCases(em) {
		if token := c.request("http://guard").Header.Get("Authorization"); token != "" {
			tokens[string(c.reason)] = strings.TrimPrefix(token, "Bearer ")
		}
	}
	for name, token := range tokens {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(token+"\n"), 0o600); err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, name+".header"), []byte("Bearer "+token+"\r\n"), 0o600); err != nil {
			return err
		}
	}
	return nil
}

// scriptExits runs a program that must end with an exit code: exits CODE PROGRAM ARG…
func scriptExits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE PROGRAM ARG…")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	got := 0
	if err := ts.Exec(args[1], args[2:]...); err != nil {
		var exit *exec.ExitError
		if !errors.As(err, &exit) {
			ts.Fatalf("run %s: %v", args[1], err)
		}
		got = exit.ExitCode()
	}
	if got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}

// scriptEdit replaces the first OLD in a file: edit FILE OLD NEW
func scriptEdit(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 3 {
		ts.Fatalf("usage: edit FILE OLD NEW")
	}
	text := ts.ReadFile(args[0])
	if !strings.Contains(text, args[1]) {
		ts.Fatalf("%s holds no %q", args[0], args[1])
	}
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), []byte(strings.Replace(text, args[1], args[2], 1)), 0o600))
}

// scriptHidden fails if a token, or a part of it, is in the last output: hidden FILE
func scriptHidden(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: hidden FILE")
	}
	output := ts.ReadFile("stdout") + ts.ReadFile("stderr")
	for _, part := range strings.Split(strings.TrimSpace(ts.ReadFile(args[0])), ".") {
		for ; len(part) >= 16; part = part[16:] {
			if strings.Contains(output, part[:16]) {
				ts.Fatalf("the output shows %q of the token:\n%s", part[:16], output)
			}
		}
	}
}

// scriptAwait waits until a guard is ready: await ADMIN-ADDRESS
func scriptAwait(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: await ADMIN-ADDRESS")
	}
	deadline := time.After(30 * time.Second)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		res, err := http.Get("http://" + args[0] + "/readyz")
		if err == nil {
			res.Body.Close()
			if res.StatusCode == http.StatusOK {
				return
			}
		}
		select {
		case <-tick.C:
		case <-deadline:
			ts.Fatalf("the guard at %s is not ready", args[0])
		}
	}
}
