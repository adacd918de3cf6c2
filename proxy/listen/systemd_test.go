//go:build unix

package listen_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/partnerguard/partnerguard/proxy/listen"
)

// child runs one test of this binary again as a process of its own.
func child(t *testing.T, test string, files ...*os.File) *exec.Cmd {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	t.Cleanup(cancel)
	// LISTEN_PID must be the id of the process that takes the sockets: the shell's,
	// which becomes the child's.
	cmd := exec.CommandContext(ctx, "/bin/sh", "-c", `LISTEN_PID=$$ exec "$0" "$@"`, os.Args[0], "-test.run=^"+test+"$", "-test.v")
	cmd.ExtraFiles = files
	cmd.Env = append(os.Environ(), "PARTNERGUARD_TEST_CHILD="+test)
	return cmd
}

func isChild(t *testing.T) bool { return os.Getenv("PARTNERGUARD_TEST_CHILD") == t.Name() }

func TestSocketsOfSystemd(t *testing.T) {
	if isChild(t) {
		sockets, err := listen.Sockets()
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range sockets {
			t.Logf("socket %s at %s", s.Name, s.Listener.Addr())
		}
		for _, name := range []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"} {
			if _, set := os.LookupEnv(name); set {
				t.Errorf("%s is still set", name)
			}
		}
		if again, err := listen.Sockets(); len(again) > 0 || err != nil {
			t.Errorf("a second call gives %v, %v", again, err)
		}
		stop := make(chan struct{})
		s := open(t, listen.Config{Name: "socket", Socket: sockets[0].Listener, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			proto(w, r)
			close(stop)
		})})
		<-stop
		s.Shutdown(context.Background())
		return
	}
	sockets := make([]*os.File, 2)
	var addresses []string
	for i := range sockets {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		if sockets[i], err = l.(*net.TCPListener).File(); err != nil {
			t.Fatal(err)
		}
		defer sockets[i].Close()
		addresses = append(addresses, l.Addr().String())
	}
	cmd := child(t, "TestSocketsOfSystemd", sockets...)
	cmd.Env = append(cmd.Env, "LISTEN_FDS=2", "LISTEN_FDNAMES=guard:second")
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	// The socket is open before the process is up: the call waits for it.
	if _, got := call(t, client(t, nil, false), "http://"+addresses[0]+"/v1/x"); got != "HTTP/1.1 /v1/x" {
		t.Errorf("served %q", got)
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	for i, name := range []string{"guard", "second"} {
		if want := "socket " + name + " at " + addresses[i]; !strings.Contains(out.String(), want) {
			t.Errorf("the child does not say %q", want)
		}
	}
	if t.Failed() {
		t.Log(out.String())
	}
}

func TestASocketOfAnotherKindIsRefused(t *testing.T) {
	if isChild(t) {
		_, err := listen.Sockets()
		t.Logf("Sockets: %v", err)
		if _, err := net.FileListener(os.NewFile(3, "first")); err == nil {
			t.Error("the sockets were not closed")
		}
		return
	}
	first, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	a, err := first.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	unix, err := net.Listen("unix", filepath.Join(t.TempDir(), "socket"))
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close()
	b, err := unix.(*net.UnixListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	cmd := child(t, "TestASocketOfAnotherKindIsRefused", a, b)
	cmd.Env = append(cmd.Env, "LISTEN_FDS=2", "LISTEN_FDNAMES=first:wrong")
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "Sockets: take over socket wrong:") {
		t.Errorf("%v:\n%s", err, out)
	}
}

func TestSocketsWithoutSystemd(t *testing.T) {
	// Somebody else's, by LISTEN_PID.
	t.Setenv("LISTEN_PID", "1")
	t.Setenv("LISTEN_FDS", "2")
	if sockets, err := listen.Sockets(); len(sockets) > 0 || err != nil {
		t.Errorf("Sockets = %v, %v, want none", sockets, err)
	}
}

// A process that runs out of files goes on when there are some again.
func TestRunningOutOfFilesEndsNothing(t *testing.T) {
	if isChild(t) {
		limit := syscall.Rlimit{Cur: 64, Max: 64}
		if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
			t.Fatal(err)
		}
		if n := listen.ConnectionLimit(10_000); n != 1 {
			t.Errorf("ConnectionLimit = %d with 64 files, want 1", n)
		}
		full := make(chan struct{}, 100)
		s := open(t, listen.Config{Name: "full", Handler: http.HandlerFunc(proto), ErrorLog: log.New(notify(full), "", 0)})
		fmt.Printf("\naddress %s\n", s.Address())
		<-full // the parent has taken all files
		fmt.Println("full")
		select {
		case err := <-s.Failed():
			t.Error(err)
		case <-func() chan struct{} { // until the parent closes standard input
			done := make(chan struct{})
			go func() { io.Copy(io.Discard, os.Stdin); close(done) }()
			return done
		}():
		}
		return
	}
	cmd := child(t, "TestRunningOutOfFilesEndsNothing")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	await := func(prefix string) string {
		t.Helper()
		for lines.Scan() {
			if rest, ok := strings.CutPrefix(lines.Text(), prefix); ok {
				return rest
			}
		}
		t.Fatalf("the child never said %q", prefix)
		return ""
	}
	address := await("address ")
	var held []net.Conn
	for range 100 {
		c, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		held = append(held, c)
	}
	await("full")
	for _, c := range held {
		c.Close()
	}
	if _, got := call(t, client(t, nil, false), "http://"+address+"/x"); got != "HTTP/1.1 /x" {
		t.Errorf("served %q", got)
	}
	in.Close()
	rest, _ := io.ReadAll(out)
	if err := cmd.Wait(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("%v:\n%s", err, rest)
	}
}

// notify is a log that tells of each line about files.
type notify chan struct{}

func (n notify) Write(p []byte) (int, error) {
	if strings.Contains(string(p), "too many open files") {
		select {
		case n <- struct{}{}:
		default:
		}
	}
	return len(p), nil
}
