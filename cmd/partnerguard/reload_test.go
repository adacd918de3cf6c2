package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/partnerguard/partnerguard/internal/emulator"
	"github.com/partnerguard/partnerguard/policy"
)

// logLine is one line of the guard's own log.
type logLine struct {
	Msg, Error, File, Key, Old, New, Hint string
	Line, Column, Generation              int
}

// await returns the first line after from that has msg, and where the next begins.
func (g *guardProcess) await(from int, msg ...string) (logLine, int) {
	g.t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for {
		text := g.text()
		at := from
		for line := range strings.Lines(text[from:]) {
			at += len(line)
			var l logLine
			if json.Unmarshal([]byte(line), &l) != nil {
				continue
			}
			for _, m := range msg {
				if l.Msg == m {
					return l, at
				}
			}
		}
		if time.Now().After(deadline) {
			g.t.Fatalf("the guard did not say %q after:\n%s", msg, text[from:])
		}
		<-time.After(5 * time.Millisecond)
	}
}

// metric is the value of the first series whose line has the prefix.
func (g *guardProcess) metric(prefix string) float64 {
	g.t.Helper()
	res, err := http.Get(g.admin + "/metrics")
	if err != nil {
		g.t.Fatal(err)
	}
	defer res.Body.Close()
	body, _ := io.ReadAll(res.Body)
	for line := range strings.Lines(string(body)) {
		if strings.HasPrefix(line, prefix) {
			v, err := strconv.ParseFloat(strings.TrimSpace(line[strings.LastIndexByte(line, ' '):]), 64)
			if err != nil {
				g.t.Fatal(err)
			}
			return v
		}
	}
	g.t.Fatalf("no metric %s in:\n%s", prefix, body)
	return 0
}

// write replaces the file as most editors and deployments do: by a rename.
func write(t *testing.T, file, text string) {
	t.Helper()
	if err := os.WriteFile(file+".new", []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(file+".new", file); err != nil {
		t.Fatal(err)
	}
}

func TestEachWayToChangeTheFileIsOneReload(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	dir := t.TempDir()
	file := filepath.Join(dir, "guard.yaml")
	text := func(mode string) string { return guardYAML(em, mode) }
	change := map[string]func(t *testing.T, file, text string){
		"renamed over": write,
		"truncated and written": func(t *testing.T, file, text string) {
			f, err := os.OpenFile(file, os.O_WRONLY|os.O_TRUNC, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			io.WriteString(f, text[:len(text)/2])
			io.WriteString(f, text[len(text)/2:])
		},
		"a symbolic link swapped": func(t *testing.T, file, text string) {
			target := filepath.Join(t.TempDir(), "guard.yaml")
			if err := os.WriteFile(target, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(target, file+".link"); err != nil {
				t.Fatal(err)
			}
			if err := os.Rename(file+".link", file); err != nil {
				t.Fatal(err)
			}
		},
	}
	write(t, file, text("audit"))
	g := startGuardFile(t, t.TempDir(), file)
	at, generation := len(g.text()), 1
	token := em.Mint(emulator.TokenSpec{AMR: []string{"pwd"}})
	for i, name := range []string{"renamed over", "truncated and written", "a symbolic link swapped", "truncated and written", "renamed over"} {
		mode := []string{"tag", "enforce"}[i%2]
		change[name](t, file, text(mode))
		generation++
		var l logLine
		if l, at = g.await(at, "changed"); l.Key != "mode" || l.New != mode {
			t.Errorf("%s: the guard says that %s changed to %s, want mode to %s", name, l.Key, l.New, mode)
		}
		// A second reload of the same change would make the next number too high.
		if l, at = g.await(at, "reloaded"); l.Generation != generation {
			t.Errorf("%s: generation %d, want %d", name, l.Generation, generation)
		}
		if n := g.metric("partnerguard_config_generation"); int(n) != generation {
			t.Errorf("%s: partnerguard_config_generation %v, want %d", name, n, generation)
		}
		res, _ := get(t, g.url+"/v1/customers", token)
		if mode == "tag" && res.StatusCode != 200 || mode == "enforce" && res.StatusCode != 401 {
			t.Errorf("%s: in mode %s a call without MFA got %d", name, mode, res.StatusCode)
		}
	}
	g.stop()
	for _, c := range storedCalls(t, g.dir) {
		if c.Generation < 2 || c.Generation > 6 {
			t.Errorf("a call is recorded with generation %d", c.Generation)
		}
	}
}

func TestWhatCannotBeTakenLeavesTheOldConfigurationWhole(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	file := filepath.Join(t.TempDir(), "guard.yaml")
	good := guardYAML(em, "enforce")
	write(t, file, good)
	g := startGuardFile(t, t.TempDir(), file)
	token := em.Mint(emulator.TokenSpec{AMR: []string{"pwd"}})
	at := len(g.text())
	for _, row := range []struct {
		name, text string
		want       logLine
	}{
		{"a mistake", strings.Replace(good, "mode: enforce", "mode: audit\nmodes: tag", 1), logLine{File: file, Line: 1 + strings.Count(good[:strings.Index(good, "mode: enforce")], "\n") + 1, Column: 1, Error: "modes"}},
		{"no YAML", "version: [", logLine{File: file, Line: 1, Error: "guard.yaml"}},
		{"another address", strings.Replace(strings.Replace(good, `[{address: "127.0.0.1:0"}]`, `[{address: "127.0.0.1:1"}]`, 1), "enforce", "audit", 1), logLine{Error: "needs a restart: listeners"}},
		{"another ledger", strings.Replace(good, "mode: enforce", "mode: audit\nledger: {retention: 40d}", 1), logLine{Error: "needs a restart: ledger.retention"}},
		{"no file", "", logLine{}},
	} {
		if row.text == "" {
			os.Remove(file)
			g.cmd.Process.Signal(syscall.SIGHUP)
		} else {
			write(t, file, row.text)
		}
		var l logLine
		l, at = g.await(at, "configuration is not taken")
		if l.File != row.want.File || l.Line != row.want.Line || !strings.Contains(l.Error, row.want.Error) || l.Hint == "" {
			t.Errorf("%s: the log says %+v, want %+v", row.name, l, row.want)
		}
		if row.want.Line > 0 {
			g.metric(fmt.Sprintf(`partnerguard_config_error{column="%d",file="%s",line="%d"} 1`, l.Column, file, l.Line))
		}
		if g.metric(`partnerguard_degraded{part="config"}`) != 1 {
			t.Errorf("%s: the guard is not degraded", row.name)
		}
		if res, _ := get(t, g.url+"/v1/customers", token); res.StatusCode != 401 {
			t.Errorf("%s: a call got %d, want the old configuration's 401", row.name, res.StatusCode)
		}
		// Back again, and on.
		write(t, file, good+"# "+row.name+"\n")
		g.cmd.Process.Signal(syscall.SIGHUP)
		_, at = g.await(at, "configuration is unchanged")
		if g.metric(`partnerguard_degraded{part="config"}`) != 0 {
			t.Errorf("%s: the guard stays degraded", row.name)
		}
	}
	if n := g.metric("partnerguard_config_generation"); n != 1 {
		t.Errorf("generation %v, want 1", n)
	}
	if n := g.metric(`partnerguard_reloads_total{result="failed"}`); n != 5 {
		t.Errorf("%v failed reloads, want 5", n)
	}
	g.stop()
}

// A cached token is judged anew by every generation.
func TestWhatAReloadRemovesIsGoneForCachedTokens(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	other := "99999999-0000-4000-8000-000000000001"
	file := filepath.Join(t.TempDir(), "guard.yaml")
	base := guardYAML(em, "enforce")
	if !strings.Contains(base, "tenants:") {
		t.Fatal("the emulator's configuration names no tenants")
	}
	token := em.Mint(emulator.TokenSpec{})
	write(t, file, base)
	g := startGuardFile(t, t.TempDir(), file)
	at := len(g.text())
	want := func(step string, status int, reason policy.Reason) {
		t.Helper()
		res, _ := get(t, g.url+"/v1/customers", token)
		if res.StatusCode != status || res.Header.Get("Partnerguard-Reason") != string(reason) {
			t.Errorf("%s: %d %s, want %d %s", step, res.StatusCode, res.Header.Get("Partnerguard-Reason"), status, reason)
		}
	}
	want("at first", 200, policy.ReasonMFAPresent)
	want("from the cache", 200, policy.ReasonMFAPresent)
	tenants := regexp.MustCompile(`(?m)^tenants:.*(\n  ?- .*)*$`)
	for _, row := range []struct {
		name, text string
		status     int
		reason     policy.Reason
	}{
		{"without its tenant", tenants.ReplaceAllString(base, "tenants: ["+other+"]"), 401, policy.ReasonTokenWrongTenant},
		{"with it again", base, 200, policy.ReasonMFAPresent},
		{"without its audience", strings.Replace(base, "partner-center: {", "partner-center: {audiences: [https://other.example], ", 1), 401, policy.ReasonTokenWrongAudience},
		{"with it once more", base, 200, policy.ReasonMFAPresent},
		{"with a rule for it", base + "rules: [{name: open, routes: [/v1/customers], mode: audit}]\n", 200, policy.ReasonMFAPresent},
	} {
		write(t, file, row.text)
		_, at = g.await(at, "reloaded", "configuration is not taken")
		want(row.name, row.status, row.reason)
	}
	g.stop()
}

func TestFiveHundredReloadsUnderLoadLeaveNothingBehind(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	dir := t.TempDir()
	file := filepath.Join(dir, "guard.yaml")
	certificate := filepath.Join(dir, "guard.pem")
	writeCertificate(t, certificate, "guard-0")
	yaml := func(i int) string {
		text := guardYAML(em, []string{"audit", "tag"}[i%2],
			fmt.Sprintf("timeouts: {idle: %ds}", 60+i%3)) // another upstream each time
		return strings.Replace(text, `[{address: "127.0.0.1:0"}]`,
			fmt.Sprintf(`[{address: "127.0.0.1:0"}, {name: tls, address: "127.0.0.1:0", tls: {certificate: %s, key: %s}}]`, certificate, certificate), 1)
	}
	write(t, file, yaml(0))
	g := startGuardFile(t, t.TempDir(), file)
	token := em.Mint(emulator.TokenSpec{})

	var calls atomic.Int64
	stop := make(chan struct{})
	var load sync.WaitGroup
	for i := range 4 {
		client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
		load.Go(func() {
			defer client.CloseIdleConnections()
			for {
				select {
				case <-stop:
					return
				default:
				}
				r, _ := http.NewRequest(http.MethodGet, g.urls[i%2]+"/v1/customers?size=1", nil)
				r.Header.Set("Authorization", "Bearer "+token)
				res, err := client.Do(r)
				if err != nil {
					t.Errorf("a call failed: %v", err)
					return
				}
				io.Copy(io.Discard, res.Body)
				res.Body.Close()
				if res.StatusCode != 200 {
					t.Errorf("a call got %d", res.StatusCode)
				}
				calls.Add(1)
			}
		})
	}
	reload := func(from, to int) {
		at := len(g.text())
		for i := from; i < to; i++ {
			// The file is seen to change as well: what matters is that it is taken.
			want := "reloaded"
			switch {
			case i%3 == 0:
				want = "configuration is not taken"
				write(t, file, yaml(i)+"unknown: key\n")
			case i%50 == 1:
				writeCertificate(t, certificate, fmt.Sprintf("guard-%d", i))
				fallthrough
			default:
				write(t, file, yaml(i))
			}
			g.cmd.Process.Signal(syscall.SIGHUP)
			_, at = g.await(at, want)
		}
	}
	reload(1, 20) // warm
	goroutines, files := g.metric("go_goroutines"), openFiles(t, g)
	reload(20, 500)
	close(stop)
	load.Wait()
	if n := calls.Load(); n < 500 {
		t.Errorf("only %d calls were made meanwhile", n)
	}
	// What was in flight settles; what leaked does not.
	for wait := time.Now(); ; <-time.After(50 * time.Millisecond) {
		n, f := g.metric("go_goroutines"), openFiles(t, g)
		if n <= goroutines+4 && f <= files+4 {
			break
		}
		if time.Since(wait) > 20*time.Second {
			t.Fatalf("%v goroutines and %d files after 480 more reloads, %v and %d before", n, f, goroutines, files)
		}
	}
	g.stop()
	if strings.Contains(g.text(), "DATA RACE") {
		t.Error("a data race in the guard")
	}
	if stored := len(storedCalls(t, g.dir)); stored != int(calls.Load()) {
		t.Errorf("%d calls in the store, %d were made", stored, calls.Load())
	}
}

func openFiles(t *testing.T, g *guardProcess) int {
	t.Helper()
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", g.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

func TestACertificateThatChangesIsServedByTheNextHandshake(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	dir := t.TempDir()
	file, certificate := filepath.Join(dir, "guard.yaml"), filepath.Join(dir, "guard.pem")
	writeCertificate(t, certificate, "old.contoso.example")
	write(t, file, strings.Replace(guardYAML(em, "audit"), `[{address: "127.0.0.1:0"}]`,
		fmt.Sprintf(`[{address: "127.0.0.1:0", tls: {certificate: %s, key: %s}}]`, certificate, certificate), 1))
	g := startGuardFile(t, t.TempDir(), file)
	served := func() string {
		t.Helper()
		c, err := tls.Dial("tcp", strings.TrimPrefix(g.url, "https://"), &tls.Config{InsecureSkipVerify: true})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		return c.ConnectionState().PeerCertificates[0].Subject.CommonName
	}
	if got := served(); got != "old.contoso.example" {
		t.Fatalf("the guard shows %s", got)
	}
	at := len(g.text())
	if err := os.WriteFile(certificate, []byte("-----BEGIN nothing"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, at = g.await(at, "configuration is not taken"); served() != "old.contoso.example" {
		t.Error("a broken certificate took the place of the good one")
	}
	if err := os.Remove(certificate); err != nil { // and comes again
		t.Fatal(err)
	}
	writeCertificate(t, certificate, "new.contoso.example")
	if g.await(at, "reloaded"); served() != "new.contoso.example" {
		t.Error("the new certificate is not served")
	}
	if days := g.metric("partnerguard_certificate_days_left"); days < 0.9 || days > 1.1 {
		t.Errorf("partnerguard_certificate_days_left %v, want 1", days)
	}
	g.stop()
}

// writeCertificate writes a self-signed certificate and its key into one file.
func writeCertificate(t *testing.T, file, name string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	var text bytes.Buffer
	pem.Encode(&text, &pem.Block{Type: "CERTIFICATE", Bytes: der})
	pem.Encode(&text, &pem.Block{Type: "PRIVATE KEY", Bytes: private})
	write(t, file, text.String())
}
