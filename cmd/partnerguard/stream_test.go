package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/partnerguard/partnerguard/internal/emulator"
)

// streamBytes is the size of a large body.
const streamBytes = 64 << 20

// memoryGrowth is what the guard may grow by while it carries a large body. One that
// kept the body would grow by all of it, and under the race detector, which keeps
// four bytes of its own for each one in use, by five times as much.
func memoryGrowth() int64 {
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "-race" && s.Value == "true" {
				return 128 << 20
			}
		}
	}
	return 24 << 20
}

// protocols are the ways that a client talks to the guard.
type protocol struct {
	name   string
	client *http.Client
	url    string
}

// startStreams runs a guard that listens in clear text and with a certificate.
func startStreams(t *testing.T, em *emulator.Emulator, dir string) (*guardProcess, []protocol) {
	t.Helper()
	cert := throwAwayCertificate(t)
	g := startGuard(t, dir, strings.Replace(guardYAML(em, "enforce"), listenersYAML(),
		fmt.Sprintf(`listeners: [{address: "127.0.0.1:0"}, {name: tls, address: "127.0.0.1:0", tls: {certificate: %q, key: %q}}]`, cert.certificate, cert.key), 1))
	plain := &http.Transport{DisableCompression: true}
	t.Cleanup(plain.CloseIdleConnections)
	return g, []protocol{{"HTTP/1.1", &http.Client{Transport: plain}, g.urls[0]}, {"HTTP/2.0", cert.client(t, true), g.urls[1]}}
}

// request is a call with an MS-RequestId to find it by.
func (p protocol) request(ctx context.Context, t *testing.T, method, path, token, id string, body io.Reader, emulate string) *http.Request {
	t.Helper()
	r, err := http.NewRequestWithContext(ctx, method, p.url+path, body)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Authorization", "Bearer "+token)
	r.Header.Set("MS-RequestId", id)
	if emulate != "" {
		r.Header.Set("Emulate", emulate)
	}
	return r
}

// memory is the resident memory of the guard in bytes, 0 where it cannot be read.
func (g *guardProcess) memory() int64 {
	if runtime.GOOS != "linux" {
		return 0
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", g.cmd.Process.Pid))
	if err != nil {
		g.t.Error(err)
		return 0
	}
	_, rest, _ := strings.Cut(string(status), "VmRSS:")
	kib, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
	if err != nil {
		g.t.Error(err)
	}
	return kib << 10
}

// memoryReader looks at the guard's memory at every MiB that passes.
type memoryReader struct {
	io.Reader
	g       *guardProcess
	passed  int64
	highest int64
}

func (m *memoryReader) Read(p []byte) (int, error) {
	n, err := m.Reader.Read(p)
	if m.passed>>20 != (m.passed+int64(n))>>20 {
		m.highest = max(m.highest, m.g.memory())
	}
	m.passed += int64(n)
	return n, err
}

// hashOf reads r to its end.
func hashOf(t *testing.T, r io.Reader) (n int64, sum string) {
	t.Helper()
	h := sha256.New()
	n, err := io.Copy(h, r)
	if err != nil {
		t.Errorf("after %d bytes: %v", n, err)
	}
	return n, hex.EncodeToString(h.Sum(nil))
}

func waitFor(t *testing.T, em *emulator.Emulator, id, what string, done func(emulator.Request) bool) emulator.Request {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	var found emulator.Request
	err := em.Wait(ctx, func(requests []emulator.Request) bool {
		for _, r := range requests {
			if r.Header.Get("MS-RequestId") == id && done(r) {
				found = r
				return true
			}
		}
		return false
	})
	if err != nil {
		t.Fatalf("%s: %s: %v", id, what, err)
	}
	return found
}

func TestStreamsPassUnbuffered(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	dir := t.TempDir()
	g, protocols := startStreams(t, em, dir)
	token := em.Mint(emulator.TokenSpec{})
	_, wantSum := hashOf(t, em.Large(streamBytes))

	flat := func(t *testing.T, before, highest int64) {
		t.Helper()
		growth, bound := highest-before, memoryGrowth()
		t.Logf("memory %d MiB, at most %d MiB while it streamed; it may grow by %d MiB", before>>20, highest>>20, bound>>20)
		if growth > bound {
			t.Errorf("the guard grew by %d MiB for a body of %d MiB", growth>>20, streamBytes>>20)
		}
	}
	for _, p := range protocols {
		// The first call of a kind sets up connections and pools.
		res, err := p.client.Do(p.request(t.Context(), t, "GET", "/v1/_large?bytes=1000000", token, "warm-up", nil, ""))
		if err != nil {
			t.Fatal(err)
		}
		hashOf(t, res.Body)
		res.Body.Close()

		t.Run("download, "+p.name, func(t *testing.T) {
			before := g.memory()
			res, err := p.client.Do(p.request(t.Context(), t, "GET", fmt.Sprintf("/v1/_large?bytes=%d", streamBytes), token, "download", nil, ""))
			if err != nil {
				t.Fatal(err)
			}
			defer res.Body.Close()
			body := &memoryReader{Reader: res.Body, g: g}
			n, sum := hashOf(t, body)
			if n != streamBytes || sum != wantSum || res.ContentLength != streamBytes || res.Proto != p.name {
				t.Errorf("%s, Content-Length %d, %d bytes with hash %s, want %d with %s", res.Proto, res.ContentLength, n, sum, streamBytes, wantSum)
			}
			flat(t, before, body.highest)
		})
		for _, chunked := range []bool{false, true} {
			if chunked && p.name == "HTTP/2.0" {
				continue // which knows no chunks
			}
			name := map[bool]string{false: "upload with its length, ", true: "upload in chunks, "}[chunked] + p.name
			t.Run(name, func(t *testing.T) {
				before := g.memory()
				body := &memoryReader{Reader: em.Large(streamBytes), g: g}
				r := p.request(t.Context(), t, "POST", "/v1/_upload", token, name, body, "")
				if !chunked {
					r.ContentLength = streamBytes
				}
				res, err := p.client.Do(r)
				if err != nil {
					t.Fatal(err)
				}
				defer res.Body.Close()
				answer, err := io.ReadAll(res.Body)
				if err != nil || !bytes.Contains(answer, []byte(wantSum)) {
					t.Errorf("%v: %s", err, answer)
				}
				seen := waitFor(t, em, name, "the upload has arrived", func(r emulator.Request) bool { return r.BodySHA256 != "" })
				if seen.BodyBytes != streamBytes || seen.BodySHA256 != wantSum {
					t.Errorf("upstream saw %d bytes with hash %s", seen.BodyBytes, seen.BodySHA256)
				}
				if length := seen.Header.Get("Content-Length"); chunked == (length != "") {
					t.Errorf("upstream saw Content-Length %q", length)
				}
				flat(t, before, body.highest)
			})
		}
		t.Run("slow reader, "+p.name, func(t *testing.T) {
			before, id := g.memory(), "slow reader "+p.name
			res, err := p.client.Do(p.request(t.Context(), t, "GET", fmt.Sprintf("/v1/_large?bytes=%d", streamBytes), token, id, nil, ""))
			if err != nil {
				t.Fatal(err)
			}
			defer res.Body.Close()
			h := sha256.New()
			if _, err := io.CopyN(h, res.Body, 1<<20); err != nil {
				t.Fatal(err)
			}
			// Nobody reads on. The upstream must come to wait, too: sockets hold a
			// few MiB, the guard nothing.
			ctx, cancel := context.WithTimeout(t.Context(), 400*time.Millisecond)
			defer cancel()
			err = em.Wait(ctx, func(requests []emulator.Request) bool {
				for _, r := range requests {
					if r.Header.Get("MS-RequestId") == id {
						return !r.Finished.IsZero()
					}
				}
				return false
			})
			if !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("the upstream got rid of %d MiB while the client had read 1 MiB", streamBytes>>20)
			}
			flat(t, before, g.memory())
			if p.name == "HTTP/2.0" {
				return // the rest is the download above
			}
			if _, err := io.Copy(h, res.Body); err != nil || hex.EncodeToString(h.Sum(nil)) != wantSum {
				t.Errorf("the rest: %v, hash %x", err, h.Sum(nil))
			}
		})
		t.Run("slow writer, "+p.name, func(t *testing.T) {
			id := "slow writer " + p.name
			body, w := io.Pipe()
			done := make(chan error, 1)
			go func() {
				res, err := p.client.Do(p.request(t.Context(), t, "POST", "/v1/_upload", token, id, body, ""))
				if err == nil {
					res.Body.Close()
				}
				done <- err
			}()
			// Each piece arrives before the next is written.
			for i := int64(1); i <= 3; i++ {
				if _, err := w.Write(bytes.Repeat([]byte("x"), 10_000)); err != nil {
					t.Fatal(err)
				}
				waitFor(t, em, id, fmt.Sprintf("piece %d", i), func(r emulator.Request) bool { return r.BodyBytes == i*10_000 })
			}
			w.Close()
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
		t.Run("the beginning of a slow answer, "+p.name, func(t *testing.T) {
			id := "slow answer " + p.name
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			res, err := p.client.Do(p.request(ctx, t, "GET", "/v1/_large?bytes=4096", token, id, nil, "stall-body=60s"))
			if err != nil {
				t.Fatal(err)
			}
			defer res.Body.Close()
			if _, err := io.ReadFull(res.Body, make([]byte, 1024)); err != nil {
				t.Fatal(err)
			}
			cancel()
			waitFor(t, em, id, "canceled", func(r emulator.Request) bool { return r.Canceled })
		})
	}
	g.stop()
	for id, c := range storedCalls(t, dir) {
		wantIn, wantOut := int64(0), int64(0)
		switch {
		case strings.HasPrefix(c.RequestID, "upload"):
			wantIn = streamBytes
		case strings.HasPrefix(c.RequestID, "download"), c.RequestID == "slow reader HTTP/1.1":
			wantOut = streamBytes
		default:
			continue
		}
		if c.Status != 200 || c.Error != "" || c.BytesIn != wantIn || wantOut != 0 && c.BytesOut != wantOut {
			t.Errorf("call %s, %s: status %d, error %q, %d bytes in, %d out", id, c.RequestID, c.Status, c.Error, c.BytesIn, c.BytesOut)
		}
	}
}

// A client that hangs up gives up its call at the upstream, too, at once; the call
// still has its outcome.
func TestStreamsEndWithTheClient(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	dir := t.TempDir()
	g, protocols := startStreams(t, em, dir)
	token := em.Mint(emulator.TokenSpec{})
	statuses := map[string]int64{} // by MS-RequestId
	var slowest time.Duration
	for _, p := range protocols {
		for _, tt := range []struct {
			name   string
			status int64 // that the client got
			// run makes the call and returns when it is in the middle of it.
			run func(t *testing.T, ctx context.Context, id string)
		}{
			{"while it waits for the header", 0, func(t *testing.T, ctx context.Context, id string) {
				go p.client.Do(p.request(ctx, t, "GET", "/v1/invoices", token, id, nil, "stall=60s"))
				waitFor(t, em, id, "arrived", func(emulator.Request) bool { return true })
			}},
			{"while it waits for the header of a POST", 0, func(t *testing.T, ctx context.Context, id string) {
				go p.client.Do(p.request(ctx, t, "POST", "/v1/_upload", token, id, strings.NewReader("{}"), "stall=60s"))
				waitFor(t, em, id, "arrived", func(r emulator.Request) bool { return r.BodySHA256 != "" })
			}},
			{"during a download", 200, func(t *testing.T, ctx context.Context, id string) {
				res, err := p.client.Do(p.request(ctx, t, "GET", fmt.Sprintf("/v1/_large?bytes=%d", 1<<34), token, id, nil, ""))
				if err != nil {
					t.Fatal(err)
				}
				if _, err := io.CopyN(io.Discard, res.Body, 4<<20); err != nil {
					t.Fatal(err)
				}
			}},
			{"during a download that pauses", 200, func(t *testing.T, ctx context.Context, id string) {
				res, err := p.client.Do(p.request(ctx, t, "GET", "/v1/_large?bytes=4096", token, id, nil, "stall-body=60s"))
				if err != nil {
					t.Fatal(err)
				}
				if _, err := io.ReadFull(res.Body, make([]byte, 1000)); err != nil {
					t.Fatal(err)
				}
			}},
			{"during an upload", 0, func(t *testing.T, ctx context.Context, id string) {
				body, w := io.Pipe()
				context.AfterFunc(ctx, func() { w.CloseWithError(ctx.Err()) })
				go p.client.Do(p.request(ctx, t, "POST", "/v1/_upload", token, id, body, ""))
				if _, err := w.Write(make([]byte, 1<<20)); err != nil {
					t.Fatal(err)
				}
				waitFor(t, em, id, "1 MiB arrived", func(r emulator.Request) bool { return r.BodyBytes == 1<<20 })
			}},
			{"during an upload with its length", 0, func(t *testing.T, ctx context.Context, id string) {
				body, w := io.Pipe()
				context.AfterFunc(ctx, func() { w.CloseWithError(ctx.Err()) })
				r := p.request(ctx, t, "POST", "/v1/_upload", token, id, body, "")
				r.ContentLength = 8 << 20
				go p.client.Do(r)
				if _, err := w.Write(make([]byte, 1<<20)); err != nil {
					t.Fatal(err)
				}
				waitFor(t, em, id, "1 MiB arrived", func(r emulator.Request) bool { return r.BodyBytes == 1<<20 })
			}},
		} {
			id := p.name + " " + tt.name
			t.Run(id, func(t *testing.T) {
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				tt.run(t, ctx, id)
				statuses[id] = tt.status
				hungUp := time.Now()
				cancel()
				r := waitFor(t, em, id, "canceled", func(r emulator.Request) bool { return r.Canceled })
				took := r.CanceledAt.Sub(hungUp)
				slowest = max(slowest, took)
				t.Logf("the upstream call ended %s after the client", took.Round(10*time.Microsecond))
				// The bar is 100 ms; a machine that others load may be late.
				if took > time.Second {
					t.Errorf("the upstream call went on for %s", took)
				}
			})
		}
	}
	t.Logf("slowest: %s", slowest.Round(10*time.Microsecond))
	g.stop()

	outcomes := map[string]line{}
	for _, l := range ledgerLines(t, dir) {
		if l.Type == "outcome" {
			outcomes[l.Call] = l
		}
	}
	stored := storedCalls(t, dir)
	if len(stored) != len(statuses) || len(outcomes) != len(statuses) {
		t.Errorf("%d rows and %d outcomes for %d calls", len(stored), len(outcomes), len(statuses))
	}
	for id, c := range stored {
		want, known := statuses[c.RequestID]
		if !known || c.Error != "client_canceled" || c.Status != want || c.DurationMS == 0 {
			t.Errorf("row of %s: error %q, status %d, %v ms; want client_canceled, %d", c.RequestID, c.Error, c.Status, c.DurationMS, want)
		}
		if o := outcomes[id]; o.Error != "client_canceled" || int64(o.Status) != want {
			t.Errorf("outcome of %s: %+v", c.RequestID, o)
		}
	}
}

// An upstream that breaks off gives the client a broken transfer, never a clean
// short answer.
func TestStreamsThatTheUpstreamBreaks(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	dir := t.TempDir()
	g, protocols := startStreams(t, em, dir)
	token := em.Mint(emulator.TokenSpec{})
	calls := 0
	for _, p := range protocols {
		for _, emulate := range []string{"abort-after=1", "abort-after=100000", "abort-after=100000, trailers"} {
			t.Run(p.name+", "+emulate, func(t *testing.T) {
				calls++
				res, err := p.client.Do(p.request(t.Context(), t, "GET", "/v1/_large?bytes=1000000", token, emulate, nil, emulate))
				if err != nil {
					// The header was still in the server's buffer.
					if emulate != "abort-after=1" {
						t.Error(err)
					}
					return
				}
				defer res.Body.Close()
				body, err := io.ReadAll(res.Body)
				want, _ := io.ReadAll(em.Large(int64(len(body))))
				if err == nil || res.StatusCode != 200 || !bytes.Equal(body, want) {
					t.Errorf("%d, %d bytes, error %v; want 200 and a broken body", res.StatusCode, len(body), err)
				}
				if res.Trailer.Get("X-Emulator-Trailer") != "" {
					t.Error("a broken answer has its trailer")
				}
			})
		}
	}
	g.stop()
	stored := storedCalls(t, dir)
	if len(stored) != calls || calls == 0 {
		t.Errorf("%d rows for %d calls", len(stored), calls)
	}
	for _, c := range stored {
		if c.Error != "upstream_aborted" || c.Status != 200 {
			t.Errorf("%s: error %q, status %d", c.RequestID, c.Error, c.Status)
		}
	}
	for _, l := range ledgerLines(t, dir) {
		if l.Type == "outcome" && l.Error != "upstream_aborted" {
			t.Errorf("outcome %+v", l)
		}
	}
}

func TestStreamsCarryEarlyHintsAndTrailers(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	g, protocols := startStreams(t, em, t.TempDir())
	token := em.Mint(emulator.TokenSpec{})
	for _, p := range protocols {
		if overHTTP2 && p.name == "HTTP/1.1" {
			continue // an answer that HTTP/2 sent with a length has no room for trailers in HTTP/1.1
		}
		t.Run(p.name, func(t *testing.T) {
			var hints []textproto.MIMEHeader
			ctx := httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{
				Got1xxResponse: func(code int, header textproto.MIMEHeader) error {
					if code == http.StatusEarlyHints {
						hints = append(hints, header)
					}
					return nil
				},
			})
			r := p.request(ctx, t, "POST", "/v1/_upload", token, "hints", strings.NewReader("{}"), "early-hints, trailers")
			r.Trailer = http.Header{"Partnerguard-Effect": {"allow"}, "X-Client-Trailer": {"from the client"}}
			r.ContentLength = -1 // trailers need chunks
			res, err := p.client.Do(r)
			if err != nil {
				t.Fatal(err)
			}
			defer res.Body.Close()
			if _, announced := res.Trailer["X-Emulator-Trailer"]; !announced {
				t.Errorf("trailers announced: %v", res.Trailer)
			}
			body, err := io.ReadAll(res.Body)
			if err != nil || res.StatusCode != 200 || !bytes.Contains(body, []byte(`"bytes":2`)) {
				t.Errorf("%d, %v: %s", res.StatusCode, err, body)
			}
			if got := res.Trailer.Get("X-Emulator-Trailer"); got != "complete" {
				t.Errorf("trailer %q", got)
			}
			if len(hints) != 1 || hints[0].Get("Link") == "" {
				t.Errorf("early hints %v", hints)
			}
			if res.Header.Get("Partnerguard-Call") == "" || res.Header.Get("Partnerguard-Reason") != "mfa_present" || res.Header.Get("Link") != "" {
				t.Errorf("the header after the hints: %v", res.Header)
			}
			requests := em.Requests()
			if seen := requests[len(requests)-1]; len(seen.Trailer) != 0 {
				t.Errorf("the client's trailers reached the upstream: %v", seen.Trailer)
			}
		})
	}
	g.stop()
}

func TestStreamsSideBySide(t *testing.T) {
	t.Parallel()
	const size = 4 << 20
	em := startEmulator(t, emulator.Config{})
	dir := t.TempDir()
	g, protocols := startStreams(t, em, dir)
	token := em.Mint(emulator.TokenSpec{})
	_, wantSum := hashOf(t, em.Large(size))
	kinds := []struct {
		name, error string
		run         func(p protocol, id string) error
	}{
		{"download", "", func(p protocol, id string) error {
			res, err := p.client.Do(p.request(t.Context(), t, "GET", fmt.Sprintf("/v1/_large?bytes=%d", size), token, id, nil, ""))
			if err != nil {
				return err
			}
			defer res.Body.Close()
			if _, sum := hashOf(t, res.Body); sum != wantSum {
				return fmt.Errorf("hash %s", sum)
			}
			return nil
		}},
		{"upload", "", func(p protocol, id string) error { return upload(t, p, token, id, em.Large(size), size, wantSum) }},
		{"chunked upload", "", func(p protocol, id string) error { return upload(t, p, token, id, em.Large(size), -1, wantSum) }},
		{"hang-up", "client_canceled", func(p protocol, id string) error {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			res, err := p.client.Do(p.request(ctx, t, "GET", fmt.Sprintf("/v1/_large?bytes=%d", 1<<34), token, id, nil, ""))
			if err != nil {
				return err
			}
			defer res.Body.Close()
			_, err = io.CopyN(io.Discard, res.Body, size)
			return err
		}},
		{"break", "upstream_aborted", func(p protocol, id string) error {
			res, err := p.client.Do(p.request(t.Context(), t, "GET", fmt.Sprintf("/v1/_large?bytes=%d", size), token, id, nil, fmt.Sprintf("abort-after=%d", size/2)))
			if err != nil {
				return err
			}
			defer res.Body.Close()
			if n, err := io.Copy(io.Discard, res.Body); err == nil {
				return fmt.Errorf("a clean answer of %d bytes", n)
			}
			return nil
		}},
	}
	const streams = 20
	var wg sync.WaitGroup
	for i := range streams {
		kind, p := kinds[i%len(kinds)], protocols[i/len(kinds)%len(protocols)]
		wg.Go(func() {
			id := fmt.Sprintf("%s/%d", kind.name, i)
			if err := kind.run(p, id); err != nil {
				t.Errorf("%s over %s: %v", id, p.name, err)
			}
		})
	}
	wg.Wait()
	g.stop()
	stored := storedCalls(t, dir)
	if len(stored) != streams {
		t.Errorf("%d rows, want %d", len(stored), streams)
	}
	for _, c := range stored {
		name, _, _ := strings.Cut(c.RequestID, "/")
		for _, kind := range kinds {
			if kind.name == name && (c.Error != kind.error || c.Status != 200) {
				t.Errorf("%s: status %d, error %q, want %q", c.RequestID, c.Status, c.Error, kind.error)
			}
		}
	}
}

// upload sends a body of that length, -1 for chunks, and checks what the upstream
// says it got.
func upload(t *testing.T, p protocol, token, id string, body io.Reader, length int64, wantSum string) error {
	r := p.request(t.Context(), t, "POST", "/v1/_upload", token, id, body, "")
	r.ContentLength = length
	res, err := p.client.Do(r)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	answer, err := io.ReadAll(res.Body)
	if err == nil && !bytes.Contains(answer, []byte(wantSum)) {
		err = fmt.Errorf("upstream got %s", answer)
	}
	return err
}
