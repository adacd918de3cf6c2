package main

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/partnerguard/partnerguard/internal/emulator"
)

// systemd's side of a service that tells of itself, with a socket unit.
func TestUnderSystemd(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	notify := filepath.Join(t.TempDir(), "notify")
	said, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: notify, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer said.Close()
	hear := func(want string) {
		t.Helper()
		said.SetReadDeadline(time.Now().Add(30 * time.Second))
		for buf := make([]byte, 4096); ; {
			n, err := said.Read(buf)
			if err != nil {
				t.Fatalf("systemd did not hear %s: %v", want, err)
			}
			state := string(buf[:n])
			if strings.HasPrefix(state, want) {
				if want == "RELOADING=1" && !strings.Contains(state, "\nMONOTONIC_USEC=") {
					t.Errorf("%q lacks MONOTONIC_USEC", state)
				}
				return
			}
			if state != "WATCHDOG=1" {
				t.Fatalf("systemd heard %q, want %s", state, want)
			}
		}
	}

	// The socket is open, and a client waits in it, before the guard starts.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	file, err := l.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	l.Close() // file keeps it open
	early := make(chan int, 1)
	token := em.Mint(emulator.TokenSpec{})
	go func() {
		res, _ := get(t, "http://"+address+"/v1/customers?size=1", token)
		early <- res.StatusCode
	}()

	config := filepath.Join(t.TempDir(), "guard.yaml")
	text := strings.Replace(guardYAML(em, "enforce"), `[{address: "127.0.0.1:0"}]`, `[{name: main, address: "`+address+`"}]`, 1)
	write(t, config, text)
	// LISTEN_PID is the guard's own, which only a shell in its place can know.
	g := &guardProcess{t: t, dir: t.TempDir(), done: make(chan struct{})}
	g.cmd = exec.Command("sh", "-c", `LISTEN_PID=$$ exec partnerguard serve -c "$0" --data-dir "$1"`, config, g.dir)
	g.cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+notify, "LISTEN_FDS=1", "LISTEN_FDNAMES=main")
	g.cmd.ExtraFiles = []*os.File{file}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	g.cmd.Stdout, g.cmd.Stderr = w, w
	if err := g.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	file.Close()
	ready := make(chan bool, 1)
	go g.read(r, ready)
	t.Cleanup(func() {
		g.cmd.Process.Kill()
		<-g.done
	})
	hear("READY=1")
	if !<-ready {
		t.Fatalf("the guard did not start:\n%s", g.text())
	}
	if status := <-early; status != 200 {
		t.Errorf("the client that waited got %d", status)
	}
	hear("WATCHDOG=1")
	write(t, config, text+"mode: audit\n") // a key written twice
	g.cmd.Process.Signal(syscall.SIGHUP)
	hear("RELOADING=1")
	hear("READY=1")
	g.cmd.Process.Signal(syscall.SIGTERM)
	for deadline := time.Now().Add(30 * time.Second); ; {
		buf := make([]byte, 4096)
		said.SetReadDeadline(deadline)
		n, err := said.Read(buf)
		if err != nil {
			t.Fatalf("systemd did not hear STOPPING=1: %v", err)
		}
		if string(buf[:n]) == "STOPPING=1" {
			break
		}
	}
	<-g.done
	if err := g.cmd.Wait(); err != nil {
		t.Errorf("the guard ended with %v:\n%s", err, g.text())
	}
}

func TestASocketThatNoListenerIsForStopsTheStart(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	file, err := l.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	cmd := exec.Command("sh", "-c", `LISTEN_PID=$$ exec partnerguard serve --listen 127.0.0.1:0 --admin 127.0.0.1:0 --data-dir "$0"`, t.TempDir())
	cmd.Env = append(os.Environ(), "LISTEN_FDS=1", "LISTEN_FDNAMES=stranger.socket")
	cmd.ExtraFiles = []*os.File{file}
	out, err := cmd.CombinedOutput()
	want := fmt.Sprintf("systemd opened %s (stranger.socket), which no listener is for", l.Addr())
	if err == nil || !strings.Contains(string(out), want) || !strings.Contains(string(out), "hint: ") {
		t.Errorf("%v:\n%s\nwant %s", err, out, want)
	}
}

// The shipped units are what systemd takes.
func TestTheUnitsAreValid(t *testing.T) {
	t.Parallel()
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal(err)
		}
		t.Skip("systemd-analyze is not installed")
	}
	dir := t.TempDir()
	for _, name := range []string{"partnerguard.service", "partnerguard.socket"} {
		unit, err := os.ReadFile(filepath.Join("..", "..", "examples", "systemd", name))
		if err != nil {
			t.Fatal(err)
		}
		// The program is not installed here; any other will do.
		text := strings.Replace(string(unit), "/usr/local/bin/partnerguard", "/bin/true", 1)
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"partnerguard.service", "partnerguard.socket"} {
		out, err := exec.Command(analyze, "verify", "--man=no", filepath.Join(dir, name)).CombinedOutput()
		if err != nil || strings.Contains(string(out), name) {
			t.Errorf("systemd-analyze verify %s: %v\n%s", name, err, out)
		}
	}
}
