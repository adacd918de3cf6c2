package listen_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"os"
	"os/exec"
	"runtime/metrics"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/partnerguard/partnerguard/proxy/listen"
)

var besideFor = flag.Duration("beside", 0, "how long each attack of TestOthersBesideFloods takes, with all variants; 0 is a short run of one")

// Of an attack in one process with server and others nobody can tell who made whom
// wait. Here each is a process of its own, and attackers come back as soon as they are
// cut. Times are told and not judged: they all share this machine.
func TestOthersBesideFloods(t *testing.T) {
	if text := os.Getenv(helperVariable); text != "" {
		var h helper
		if err := json.Unmarshal([]byte(text), &h); err != nil {
			t.Fatal(err)
		}
		h.run(t)
		return
	}
	window, numbers, variants := 750*time.Millisecond, []int{4}, []string{"attackers like the rest"}
	attacks, patience := slices.Clone(floods), time.Duration(0)
	if *besideFor > 0 {
		patience = 20 * time.Second
		window, numbers = *besideFor, []int{1, 4}
		variants = append(variants, "attackers of low priority", "attackers with a processor of their own")
		for name := range yardsticks {
			attacks = append(attacks, flood{name: name})
		}
	}
	cert, key, _ := certificate(t)
	for _, variant := range variants {
		t.Run(variant, func(t *testing.T) {
			var ours, theirs []string
			switch variant {
			case "attackers of low priority":
				theirs = []string{"nice", "-n", "19"}
			case "attackers with a processor of their own":
				ours, theirs = []string{"taskset", "-c", "0"}, []string{"taskset", "-c", "1"}
			}
			if len(theirs) > 0 {
				if _, err := exec.LookPath(theirs[0]); err != nil {
					t.Fatal(err)
				}
			}
			server := helper{Role: "server", Certificate: cert, Key: key}.start(t, ours)
			others := helper{Role: "others", Address: server.hello}.start(t, ours)
			for _, flood := range attacks {
				for _, n := range numbers {
					t.Run(fmt.Sprintf("%s by %d", flood.name, n), func(t *testing.T) {
						attackers := helper{Role: "attackers", Address: server.hello, Attack: flood.name, Number: n, Patience: patience}.start(t, theirs)
						var calm, during calls
						var quiet, busy scheduling
						var did attack
						server.ask("", &quiet)
						others.ask(window, &calm)
						server.ask("", &quiet)
						attackers.send(window)
						others.ask(window, &during)
						server.ask("", &busy)
						attackers.read(&did)
						for _, c := range []calls{calm, during} {
							if c.Wrong != "" || c.N == 0 {
								t.Errorf("%d calls of others, and one got %s", c.N, c.Wrong)
							}
						}
						if *besideFor > 0 && did.Cut < did.Connections {
							t.Errorf("only %d of %d attackers were cut", did.Cut, did.Connections)
						}
						t.Logf("p99 %.1f × calm; calm %v; beside it %v; goroutines of the server waited %v, then %v; %v",
							float64(during.P99)/float64(calm.P99), calm, during, quiet, busy, did)
					})
				}
			}
		})
	}
}

// helper is one of these processes: this program, told by a variable to be one.
type helper struct {
	Role             string // server, others, attackers
	Certificate, Key string // the server's
	Address          string // the server's, for the rest
	Attack           string
	Number           int           // of attackers
	Patience         time.Duration // of attackers after the window, to be cut
}

const helperVariable = "PARTNERGUARD_TEST_BESIDE"

func (h helper) run(t *testing.T) {
	answer, hello := h.attack, ""
	switch h.Role {
	case "server":
		answer, hello = h.serve(t)
	case "others":
		answer = h.others(t)
	}
	say := func(v any) {
		text, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Println(string(text))
	}
	say(hello)
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		d, _ := time.ParseDuration(in.Text()) // the server is asked without one
		say(answer(d))
	}
}

func (h helper) serve(t *testing.T) (answer func(time.Duration) any, address string) {
	s := open(t, listen.Config{
		Name: "tls", TLS: load(t, listen.TLSConfig{Certificate: h.Certificate, Key: h.Key}),
		Handler: attacked(t.Context().Done()),
	})
	sample := []metrics.Sample{{Name: "/sched/latencies:seconds"}}
	var old []uint64
	return func(time.Duration) any {
		metrics.Read(sample)
		now := sample[0].Value.Float64Histogram()
		counts := slices.Clone(now.Counts)
		for i, n := range old {
			counts[i] -= n
		}
		old = slices.Clone(now.Counts)
		return schedulingOf(counts, now.Buckets)
	}, s.Address().String()
}

// scheduling is how long goroutines waited that could run.
type scheduling struct{ P99, Max time.Duration }

func (s scheduling) String() string { return fmt.Sprintf("p99 %v max %v", s.P99, s.Max) }

func schedulingOf(counts []uint64, bounds []float64) (s scheduling) {
	var all, n uint64
	for _, c := range counts {
		all += c
	}
	for i, c := range counts {
		at := time.Duration(max(0, bounds[i]) * 1e9)
		if c > 0 {
			s.Max = at
		}
		if n += c; n <= all*99/100 {
			s.P99 = at
		}
	}
	return s
}

const otherConnections = 8

// calls are those of others in a window.
type calls struct {
	N             int
	P50, P99, Max time.Duration
	Late          time.Duration // p99 of how late a sleep ended there: not the server's doing
	Connections   int           // made so far; net/http gives one up, too, whose own goroutines are late
	Wrong         string        // an answer
}

func (c calls) String() string {
	return fmt.Sprintf("%d calls by %d connections p50 %v p99 %v max %v (a sleep ended late by p99 %v)", c.N, c.Connections, c.P50, c.P99, c.Max, c.Late)
}

// others make 200 calls a second: 8 connections, every second one with HTTP/2.
func (h helper) others(t *testing.T) func(time.Duration) any {
	const every = 40 * time.Millisecond
	var mu sync.Mutex
	var result calls
	var waits, late []time.Duration
	ctx := httptrace.WithClientTrace(context.Background(), &httptrace.ClientTrace{GotConn: func(c httptrace.GotConnInfo) {
		if !c.Reused {
			mu.Lock()
			result.Connections++
			mu.Unlock()
		}
	}})
	var clients []*http.Client
	get := func(c *http.Client) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+h.Address+"/other", nil)
		if err != nil {
			return err
		}
		res, err := c.Do(req)
		if err != nil {
			return err
		}
		defer res.Body.Close()
		if body, err := io.ReadAll(res.Body); err != nil || res.StatusCode != http.StatusOK || string(body) != "ok" {
			return fmt.Errorf("%s %q %v", res.Status, body, err)
		}
		return nil
	}
	for i := range otherConnections {
		tr := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, ForceAttemptHTTP2: i%2 == 0}
		t.Cleanup(tr.CloseIdleConnections)
		clients = append(clients, &http.Client{Transport: tr, Timeout: 30 * time.Second})
		if err := get(clients[i]); err != nil {
			t.Fatal(err)
		}
	}
	return func(window time.Duration) any {
		waits, late = nil, nil
		begin := time.Now()
		var calling sync.WaitGroup
		for i, c := range clients {
			calling.Go(func() {
				for at := begin.Add(every * time.Duration(i) / otherConnections); at.Before(begin.Add(window)); at = at.Add(every) {
					slept := time.Until(at) > 0
					time.Sleep(time.Until(at))
					start := time.Now()
					err := get(c)
					took := time.Since(start)
					mu.Lock()
					waits = append(waits, took)
					if slept {
						late = append(late, start.Sub(at))
					}
					if err != nil {
						result.Wrong = err.Error()
					}
					mu.Unlock()
				}
			})
		}
		calling.Wait()
		result.N, result.P50, result.P99, result.Max = len(waits), percentile(waits, 50), percentile(waits, 99), slices.Max(waits)
		result.Late = percentile(late, 99)
		return result
	}
}

// yardsticks are no attacks on HTTP/2, for comparison.
var yardsticks = map[string]func(h helper, until time.Time) int{
	"nothing but work of the attackers'": func(_ helper, until time.Time) (n int) {
		for time.Now().Before(until) {
			n++
		}
		return n
	},
	"handshakes": func(h helper, until time.Time) (n int) {
		for ; time.Now().Before(until); n++ {
			if conn, err := tls.Dial("tcp", h.Address, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}}); err == nil {
				conn.NetConn().Close()
			}
		}
		return n
	},
	"calls": func(h helper, until time.Time) (n int) {
		tr := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, ForceAttemptHTTP2: true}
		defer tr.CloseIdleConnections()
		var mu sync.Mutex
		var calling sync.WaitGroup
		for range 50 {
			calling.Go(func() {
				for time.Now().Before(until) {
					if res, err := (&http.Client{Transport: tr}).Get("https://" + h.Address + "/other"); err == nil {
						io.Copy(io.Discard, res.Body)
						res.Body.Close()
					}
					mu.Lock()
					n++
					mu.Unlock()
				}
			})
		}
		calling.Wait()
		return n
	},
}

// attack is what attackers did.
type attack struct {
	Frames, Connections, Cut, Refused int
	Median, Longest                   time.Duration // until one was cut
}

func (a attack) String() string {
	return fmt.Sprintf("%d frames, %d connections, %d of them cut after a median of %v and at most %v, %d refused", a.Frames, a.Connections, a.Cut, a.Median, a.Longest, a.Refused)
}

func (h helper) attack(window time.Duration) any {
	until := time.Now().Add(window)
	var mu sync.Mutex
	var did attack
	var lives []time.Duration
	var attacking sync.WaitGroup
	for range h.Number {
		attacking.Go(func() {
			if y := yardsticks[h.Attack]; y != nil {
				n := y(h, until)
				mu.Lock()
				did.Frames += n
				mu.Unlock()
				return
			}
			c := floods[slices.IndexFunc(floods, func(c flood) bool { return c.name == h.Attack })]
			for time.Now().Before(until) {
				start := time.Now()
				frames, err := c.once(h.Address, until.Add(h.Patience))
				mu.Lock()
				did.Frames += frames
				switch {
				case frames == 0:
					did.Refused++
				case !errors.Is(err, os.ErrDeadlineExceeded):
					did.Cut++
					lives = append(lives, time.Since(start))
					fallthrough
				default:
					did.Connections++
				}
				mu.Unlock()
			}
		})
	}
	attacking.Wait()
	if len(lives) > 0 {
		did.Median, did.Longest = percentile(lives, 50), slices.Max(lives)
	}
	return did
}

// once attacks with one connection until it is cut.
func (c flood) once(address string, until time.Time) (frames int, err error) {
	conn, err := tls.DialWithDialer(&net.Dialer{Deadline: until}, "tcp", address, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
	if err != nil {
		return 0, err
	}
	defer conn.NetConn().Close()
	conn.SetDeadline(until)
	f := newFramer(conn)
	if err := f.begin(); err != nil {
		return 0, err
	}
	var reading sync.WaitGroup
	if !c.unread {
		reading.Go(func() { io.Copy(io.Discard, conn) })
	}
	if c.start != nil {
		c.start(f)
	}
	f.out = bufio.NewWriterSize(conn, 8<<10)
	for ; err == nil; frames++ {
		err = c.send(f, uint32(frames))
	}
	conn.NetConn().Close()
	reading.Wait()
	return frames, err
}

// process is a helper that runs.
type process struct {
	t     *testing.T
	in    io.WriteCloser
	out   *bufio.Reader
	hello string
}

// start returns when the helper is ready. It ends with the test.
func (h helper) start(t *testing.T, by []string) *process {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(h)
	if err != nil {
		t.Fatal(err)
	}
	args := slices.Concat(by, []string{self, "-test.run=^TestOthersBesideFloods$", "-test.timeout=10m"})
	cmd := exec.Command(args[0], args[1:]...)
	// At its end a program with the race detector else waits for a second.
	cmd.Env = append(os.Environ(), helperVariable+"="+string(text), "GORACE=atexit_sleep_ms=0")
	cmd.Stderr = os.Stderr
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
	p := &process{t: t, in: in, out: bufio.NewReader(out)}
	t.Cleanup(func() {
		in.Close()
		io.Copy(io.Discard, p.out)
		if err := cmd.Wait(); err != nil {
			t.Errorf("%s: %v", h.Role, err)
		}
	})
	p.read(&p.hello)
	return p
}

// send asks for what the helper does in a window.
func (p *process) send(window any) { fmt.Fprintln(p.in, window) }

func (p *process) read(answer any) {
	p.t.Helper()
	line, err := p.out.ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, answer)
	}
	if err != nil {
		p.t.Fatalf("a helper says %q: %v", line, err)
	}
}

func (p *process) ask(window, answer any) {
	p.t.Helper()
	p.send(window)
	p.read(answer)
}
