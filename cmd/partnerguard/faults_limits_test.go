//go:build linux

package main

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/KimMachineGun/automemlimit/memlimit"
	"github.com/partnerguard/partnerguard/internal/emulator"
	"github.com/partnerguard/partnerguard/telemetry/ledger"
)

// More clients come than the process may have files. Those that find no place wait or
// are told so; the guard, its ledger and those that did find a place go on.
func TestFaultsOfFileDescriptors(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	s := play(t, em, stage{wrap: []string{program(t, "prlimit"), "--nofile=256:256", "--"}})
	few := s.underLoad(crowdConfig{})
	few.awaitSound(60)
	loaded := s.resources()
	many := s.underLoad(crowdConfig{clients: 400, rate: 400, limit: 3 * time.Second})
	time.Sleep(5 * time.Second)
	s.awaitReady(200, "ledger ok", "store ok")
	crowded := many.stop()
	few.awaitSound(30)
	calls := few.stop()

	soundOrRefused := func(c sighting) bool { return s.as(c) || c.err != nil && c.call == "" }
	want(t, "400 clients and 256 files", crowded, 400, soundOrRefused)
	// A client whose connection ends is one of the crowd when it comes back.
	want(t, "those that were there", calls, 200, soundOrRefused)
	if n := tally(calls)["no answer"]; n > len(calls)/10 {
		t.Errorf("%d of %d calls of those that were there got no answer", n, len(calls))
	}
	s.invariants(append(calls, crowded...), loaded, leave{silent: true})
}

// releaseBuild builds the program as it is released: without the race detector, which
// multiplies its memory.
func releaseBuild(t *testing.T) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "partnerguard")
	if out, err := exec.Command("go", "build", "-race=false", "-o", file, ".").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	return file
}

// highest is the most resident memory that the guard had so far, in bytes.
func (g *guardProcess) highest() int64 {
	g.t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", g.cmd.Process.Pid))
	if err != nil {
		g.t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(status), "VmHWM:")
	kib, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
	if err != nil {
		g.t.Fatal(err)
	}
	return kib << 10
}

// Memory is bounded, whatever passes through.
func TestFaultsOfMemory(t *testing.T) {
	t.Parallel()
	built := releaseBuild(t)
	t.Run("a hundred thousand tokens within 128 MiB", func(t *testing.T) { floodOfTokens(t, built) })
	t.Run("a GiB down and 256 MiB up within 64 MiB", func(t *testing.T) { largeBodies(t, built) })
}

// withoutCalls is a log without the lines of calls.
type withoutCalls struct {
	lines *bufio.Scanner
	rest  []byte
}

func (w *withoutCalls) Read(p []byte) (int, error) {
	for len(w.rest) == 0 {
		if !w.lines.Scan() {
			return 0, io.EOF
		}
		if l := w.lines.Bytes(); !bytes.Contains(l, []byte(`"msg":"call"`)) {
			w.rest = append(bytes.Clone(l), '\n')
		}
	}
	n := copy(p, w.rest)
	w.rest = w.rest[n:]
	return n, nil
}

// floodOfTokens sends 100,000 tokens that were never seen before, one signed and 99
// forged by turns, while large bodies pass, to a guard that keeps its memory as in a
// container that has 128 MiB.
func floodOfTokens(t *testing.T, built string) {
	const tokens, conns, batch = 100_000, 4, 50
	em := startEmulator(t, emulator.Config{})
	dir := filepath.Join(t.TempDir(), "data")
	g := startStage(t, em, dir, stage{
		program: built,
		env:     []string{fmt.Sprint("GOMEMLIMIT=", memoryLimit(memlimit.Limit(128<<20)))},
		reader: func(r io.Reader) io.Reader {
			s := bufio.NewScanner(r)
			s.Buffer(nil, 1<<20)
			return &withoutCalls{lines: s}
		},
	})
	began, before := time.Now(), g.memory()
	quit := make(chan struct{})
	var bodies, flood sync.WaitGroup
	var passed, uploads atomic.Int64
	for range 2 {
		bodies.Go(func() {
			token := em.Mint(emulator.TokenSpec{})
			for {
				select {
				case <-quit:
					return
				case <-time.After(500 * time.Millisecond):
				}
				r, err := http.NewRequest(http.MethodPost, g.url+"/v1/_upload", io.LimitReader(noughts{}, 8<<20))
				if err != nil {
					t.Error(err)
					return
				}
				r.Header.Set("Authorization", "Bearer "+token)
				res, err := plainClient.Do(r)
				if err != nil {
					t.Error(err)
					return
				}
				io.Copy(io.Discard, res.Body)
				res.Body.Close()
				if res.StatusCode != 200 {
					t.Errorf("an upload got %d", res.StatusCode)
				}
				uploads.Add(1)
			}
		})
	}
	for n := range conns {
		flood.Go(func() {
			var forged string
			if err := pipeline(g.url, tokens/conns, batch, func(i int) string {
				if i%100 == 0 {
					forged = em.Mint(emulator.TokenSpec{})
					return forged
				}
				// Other bits in the middle of the signature.
				at := len(forged) - 200
				return forged[:at] + fmt.Sprintf("%06d%02d", i, n) + forged[at+8:]
			}, func(status string) {
				if status == "200" {
					passed.Add(1)
				}
			}); err != nil {
				t.Error(err)
			}
		})
	}
	flood.Wait()
	took := time.Since(began)
	close(quit)
	bodies.Wait()
	if passed.Load() != tokens/100 {
		t.Errorf("%d tokens passed, want the %d that are signed", passed.Load(), tokens/100)
	}
	highest := g.highest()
	t.Logf("%d tokens in %v and %d uploads of 8 MiB; memory %d MiB at first, at most %d MiB", tokens, took.Round(time.Millisecond), uploads.Load(), before>>20, highest>>20)
	if highest > 128<<20 {
		t.Errorf("the guard took %d MiB, more than 128", highest>>20)
	}
	g.awaitReady(200, "ledger ok", "store ok", "store lag 0s")
	g.cmd.Process.Signal(os.Interrupt)
	g.awaitExit(0)
	r, err := ledger.NewReader(dir, ledger.Position{})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	n := map[string]int{}
	for {
		e, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		n[e.Type]++
	}
	if want := tokens + int(uploads.Load()); n["decision"] != want || n["outcome"] != want || n["gap"] != 0 {
		t.Errorf("the ledger has %v, want %d calls", n, want)
	}
}

// noughts is an endless body.
type noughts struct{}

func (noughts) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// pipeline sends n calls over one connection, some at a time, and tells the status of
// each answer.
func pipeline(url string, n, batch int, token func(i int) string, answer func(status string)) error {
	host := strings.TrimPrefix(url, "http://")
	c, err := net.Dial("tcp", host)
	if err != nil {
		return err
	}
	defer c.Close()
	answers := bufio.NewReaderSize(c, 64<<10)
	var out bytes.Buffer
	for i := 0; i < n; {
		out.Reset()
		want := min(batch, n-i)
		for range want {
			fmt.Fprintf(&out, "GET /v1/invoices?size=1 HTTP/1.1\r\nHost: %s\r\nAuthorization: Bearer %s\r\n\r\n", host, token(i))
			i++
		}
		if _, err := c.Write(out.Bytes()); err != nil {
			return err
		}
		for range want {
			status, err := skipAnswer(answers)
			if err != nil {
				return err
			}
			answer(status)
		}
	}
	return nil
}

// skipAnswer reads an answer and returns its status. It does what http.ReadResponse
// does, and takes a tenth of the time.
func skipAnswer(r *bufio.Reader) (status string, err error) {
	length := -1
	for {
		line, err := r.ReadSlice('\n')
		if err != nil {
			return "", err
		}
		if status == "" {
			status = string(line[len("HTTP/1.1 "):][:3])
		}
		if value, ok := bytes.CutPrefix(line, []byte("Content-Length: ")); ok {
			if length, err = strconv.Atoi(string(bytes.TrimSpace(value))); err != nil {
				return "", err
			}
		}
		if len(line) > 2 {
			continue
		}
		if length < 0 {
			return "", errors.New("an answer without Content-Length")
		}
		_, err = r.Discard(length)
		return status, err
	}
}

// largeBodies passes a download and an upload at the same time.
func largeBodies(t *testing.T, built string) {
	const down, up = 1 << 30, 256 << 20
	em := startEmulator(t, emulator.Config{})
	block := make([]byte, 256<<10)
	rand.Read(block)
	arrived := make(chan error, 1)
	partner := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPost {
			arrived <- repeats(r.Body, block, up)
			return
		}
		w.Header().Set("Content-Length", strconv.Itoa(down))
		for range down / len(block) {
			if _, err := w.Write(block); err != nil {
				return
			}
		}
	}))
	defer partner.Close()
	dir := filepath.Join(t.TempDir(), "data")
	g := startStage(t, em, dir, stage{program: built, upstream: fmt.Sprintf("url: %q", partner.URL)})
	began, before := time.Now(), g.memory()
	call := func(method string, body io.Reader, length int64, read func(io.Reader) error) error {
		r, err := http.NewRequest(method, g.url+"/v1/invoices", body)
		if err != nil {
			return err
		}
		r.ContentLength = length
		r.Header.Set("Authorization", "Bearer "+em.Mint(emulator.TokenSpec{}))
		res, err := plainClient.Do(r)
		if err != nil {
			return err
		}
		defer res.Body.Close()
		if res.StatusCode != 200 {
			return fmt.Errorf("status %s", res.Status)
		}
		return read(res.Body)
	}
	var both sync.WaitGroup
	both.Go(func() {
		if err := call(http.MethodGet, nil, 0, func(r io.Reader) error { return repeats(r, block, down) }); err != nil {
			t.Errorf("download: %v", err)
		}
	})
	both.Go(func() {
		body := io.LimitReader(&repeating{block: block}, up)
		if err := call(http.MethodPost, body, up, func(r io.Reader) error { return repeats(r, block, 0) }); err != nil {
			t.Errorf("upload: %v", err)
		}
	})
	both.Wait()
	if err := <-arrived; err != nil {
		t.Errorf("what arrived of the upload: %v", err)
	}
	highest := g.highest()
	t.Logf("1 GiB down and 256 MiB up in %v; memory %d MiB at first, at most %d MiB", time.Since(began).Round(time.Millisecond), before>>20, highest>>20)
	if highest > 64<<20 {
		t.Errorf("the guard took %d MiB, more than 64", highest>>20)
	}
	g.cmd.Process.Signal(os.Interrupt)
	g.awaitExit(0)
	for _, c := range storedCalls(t, dir) {
		if c.Status != 200 || c.Error != "" || c.Method == http.MethodGet && c.BytesOut != down || c.Method == http.MethodPost && c.BytesIn != up {
			t.Errorf("%s: status %d %q, %d bytes in, %d out", c.Method, c.Status, c.Error, c.BytesIn, c.BytesOut)
		}
	}
}

// repeating is a block without end.
type repeating struct {
	block []byte
	at    int
}

func (r *repeating) Read(p []byte) (int, error) {
	n := copy(p, r.block[r.at:])
	r.at = (r.at + n) % len(r.block)
	return n, nil
}

// repeats reads r to its end, which must come after so many bytes of a block that
// repeats.
func repeats(r io.Reader, block []byte, bytesWanted int64) error {
	buf := make([]byte, len(block))
	for n := int64(0); ; {
		m, err := io.ReadFull(r, buf)
		if !bytes.Equal(buf[:m], block[:m]) {
			return fmt.Errorf("other bytes after %d", n)
		}
		switch n += int64(m); {
		case errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF):
			if n != bytesWanted {
				return fmt.Errorf("%d bytes, want %d: %w", n, bytesWanted, err)
			}
			return nil
		case err != nil:
			return fmt.Errorf("after %d bytes: %w", n, err)
		}
	}
}
