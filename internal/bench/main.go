// Command bench measures what the guard costs: CPU time per call of the real
// program, in audit and in enforce, with full record, beside a bare
// httputil.ReverseProxy and, where it is installed, HAProxy doing the same job, all
// in the same run and in turn.
//
//	go run ./internal/bench
//
// The machine's speed moves, so only the ratios mean something. It needs Linux for
// the CPU time of another process (/proc/PID/stat); two processors are enough. The
// load is bounded: -rounds × -calls for each of the proxies.
//
// With -scale it measures the records instead: a ledger of so many calls over 30
// days, the store that is made from it, reports and searches.
//
//	go run ./internal/bench -scale 1000000,3000000,10000000 -dir /var/tmp
//
// With -postgres the store is a fleet's, in a schema of its own that is removed
// afterwards.
//
//	go run ./internal/bench -scale 1000000 -postgres postgres://user@host/database
package main

import (
	"context"
	"database/sql"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/partnerguard/partnerguard/internal/emulator"
	_ "modernc.org/sqlite"
)

func main() {
	var b bench
	role := flag.String("role", "", "internal: the part that a child process plays")
	target := flag.String("target", "", "internal: where a child forwards to")
	flag.IntVar(&b.rounds, "rounds", 7, "rounds; each measures every proxy once")
	flag.IntVar(&b.calls, "calls", 20000, "calls a proxy and round")
	flag.IntVar(&b.conns, "conns", 16, "client connections")
	flag.IntVar(&b.tokens, "tokens", 200, "distinct tokens")
	scale := flag.String("scale", "", "measure ledger and store with these numbers of calls instead, one after the other")
	dir := flag.String("dir", "", "where -scale writes, 1.5 GiB for a million calls; empty is the system's directory for temporary files")
	postgres := flag.String("postgres", "", "URL of a PostgreSQL database that -scale measures in place of SQLite")
	flag.Parse()
	var err error
	switch {
	case *scale != "":
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
		defer stop()
		err = runScale(ctx, os.Stdout, *scale, *dir, *postgres)
	case *role == "bare":
		err = bare(*target)
	case *role == "generator":
		err = b.run()
	default:
		err = pinned(append(os.Args[1:], "-role", "generator"))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// pinned runs this program again on the second processor: the proxies get the first
// to themselves.
func pinned(args []string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := exec.Command(self, args...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := startPinned(cmd, 1); err != nil {
		return err
	}
	return cmd.Wait()
}

// bare is the proxy to compare with: httputil.ReverseProxy with a tuned Transport
// and a BufferPool, and nothing else.
func bare(target string) error {
	u, err := url.Parse(target)
	if err != nil {
		return err
	}
	pool := &sync.Pool{New: func() any { b := make([]byte, 32<<10); return &b }}
	rp := &httputil.ReverseProxy{
		Rewrite: func(pr *httputil.ProxyRequest) { pr.SetURL(u) },
		Transport: &http.Transport{
			MaxIdleConnsPerHost: 512, DisableCompression: true,
			DialContext: (&net.Dialer{}).DialContext,
		},
		BufferPool: buffers{pool},
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	fmt.Println("http://" + l.Addr().String())
	return http.Serve(l, rp)
}

type buffers struct{ pool *sync.Pool }

func (b buffers) Get() []byte  { return *b.pool.Get().(*[]byte) }
func (b buffers) Put(p []byte) { b.pool.Put(&p) }

// bench is one run.
type bench struct {
	rounds, calls, conns, tokens int

	dir      string
	upstream *upstream
	emulator *emulator.Emulator
	children []*exec.Cmd
}

// cell is one thing that is measured.
type cell struct {
	name     string
	address  string
	pid      int
	requests [][]byte // sent in turn
	status   string   // that every answer must have
	before   func()   // each round

	cpu []float64 // µs a call, by round
	lat []time.Duration
}

func (b *bench) run() (err error) {
	if b.dir, err = os.MkdirTemp("", "partnerguard-bench-"); err != nil {
		return err
	}
	defer os.RemoveAll(b.dir)
	defer b.stop()
	if b.upstream, err = newUpstream(); err != nil {
		return err
	}
	if b.emulator, err = emulator.Start(emulator.Config{}); err != nil {
		return err
	}
	defer b.emulator.Close()
	guard := filepath.Join(b.dir, "partnerguard")
	build := exec.Command("go", "build", "-o", guard, "github.com/partnerguard/partnerguard/cmd/partnerguard")
	build.Stderr = os.Stderr
	if err := build.Run(); err != nil {
		return fmt.Errorf("build the guard: %w", err)
	}
	good := b.mint(b.tokens, emulator.TokenSpec{})
	noMFA := b.mint(b.tokens, emulator.TokenSpec{AMR: []string{"pwd"}})

	var cells []*cell
	self, err := os.Executable()
	if err != nil {
		return err
	}
	bareProxy, err := b.child(self, "-role", "bare", "-target", b.upstream.url)
	if err != nil {
		return err
	}
	cells = append(cells, &cell{name: "bare ReverseProxy", address: bareProxy.address, pid: bareProxy.pid, requests: good, status: "200"})
	guards := map[string]*process{}
	for _, name := range []string{"audit", "enforce", "ingesting"} {
		if guards[name], err = b.guard(guard, name); err != nil {
			return err
		}
	}
	audit, enforce, ingesting := guards["audit"], guards["enforce"], guards["ingesting"]
	fresh := &cell{name: "guard, every token new", address: enforce.address, pid: enforce.pid, status: "200"}
	fresh.before = func() { fresh.requests = b.mint(b.calls, emulator.TokenSpec{}) }
	cells = append(cells,
		&cell{name: "guard, audit, store paused", address: audit.address, pid: audit.pid, requests: good, status: "200", before: audit.pause},
		&cell{name: "guard, enforce, store paused", address: enforce.address, pid: enforce.pid, requests: good, status: "200", before: enforce.pause},
		&cell{name: "guard, refused from the cache", address: enforce.address, pid: enforce.pid, requests: noMFA, status: "401"},
		fresh,
		&cell{name: "guard, audit, store ingesting", address: ingesting.address, pid: ingesting.pid, requests: good, status: "200"},
	)
	if h, err := b.haproxy(); err == nil {
		cells = append(cells, &cell{name: "HAProxy jwt_verify + log line", address: h.address, pid: h.pid, requests: good, status: "200"})
	} else {
		fmt.Fprintf(os.Stderr, "without HAProxy: %v\n", err)
	}

	for _, c := range cells { // fill caches and connections
		if c.before != nil {
			c.before()
		}
		if _, err := b.load(c, min(b.calls, 2000)); err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
	}
	for round := range b.rounds {
		fmt.Fprintf(os.Stderr, "round %d of %d\n", round+1, b.rounds)
		for _, c := range cells {
			if c.before != nil {
				c.before()
			}
			start, err := cpuTime(c.pid)
			if err != nil {
				return err
			}
			lat, err := b.load(c, b.calls)
			if err != nil {
				return fmt.Errorf("%s: %w", c.name, err)
			}
			end, err := cpuTime(c.pid)
			if err != nil {
				return err
			}
			c.cpu = append(c.cpu, float64((end-start).Microseconds())/float64(b.calls))
			c.lat = append(c.lat, lat...)
		}
	}
	b.print(os.Stdout, cells)
	return nil
}

// print writes the medians, and each cell's ratio to the first: the median of the
// ratios by round, so that a slow minute counts for both.
func (b *bench) print(w io.Writer, cells []*cell) {
	fmt.Fprintf(w, "%d rounds of %d calls, %d connections, %d tokens; 2 KiB answers\n\n", b.rounds, b.calls, b.conns, b.tokens)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "\tCPU µs a call\t÷ bare\tlowest\thighest\tp50 µs\tp99 µs\tRSS MiB\t")
	for _, c := range cells {
		ratios := make([]float64, len(c.cpu))
		for i := range c.cpu {
			ratios[i] = c.cpu[i] / cells[0].cpu[i]
		}
		slices.Sort(ratios)
		slices.Sort(c.lat)
		fmt.Fprintf(t, "%s\t%.1f\t%.2f\t%.2f\t%.2f\t%d\t%d\t%d\t\n", c.name, median(slices.Clone(c.cpu)), median(ratios), ratios[0], ratios[len(ratios)-1],
			c.lat[len(c.lat)/2].Microseconds(), c.lat[len(c.lat)*99/100].Microseconds(), rss(c.pid))
	}
	t.Flush()
	last := cells[len(cells)-1]
	if strings.HasPrefix(last.name, "HAProxy") {
		for _, c := range cells[1 : len(cells)-1] {
			ratios := make([]float64, len(c.cpu))
			for i := range c.cpu {
				ratios[i] = c.cpu[i] / last.cpu[i]
			}
			fmt.Fprintf(w, "%s ÷ HAProxy: %.2f\n", c.name, median(ratios))
		}
	}
}

func median(v []float64) float64 {
	slices.Sort(v)
	return v[len(v)/2]
}

// mint makes n requests, each with its own token.
func (b *bench) mint(n int, spec emulator.TokenSpec) [][]byte {
	requests := make([][]byte, n)
	var wait sync.WaitGroup
	for part := range 2 {
		wait.Go(func() {
			for i := part; i < n; i += 2 {
				token := b.emulator.Mint(spec)
				requests[i] = fmt.Appendf(nil, "GET /v1/customers/%s/subscriptions?size=20 HTTP/1.1\r\nHost: api.partnercenter.microsoft.com\r\n"+
					"Authorization: Bearer %s\r\nAccept: application/json\r\nUser-Agent: bench/1\r\nMS-RequestId: 6c583d8d-46cd-420c-ae3d-000000000001\r\n"+
					"MS-CorrelationId: 6c583d8d-46cd-420c-ae3d-000000000002\r\nMS-PartnerCenter-Application: nightly-billing\r\n\r\n", b.emulator.Customers()[0], token)
			}
		})
	}
	wait.Wait()
	return requests
}

type process struct {
	address string
	pid     int
	db      *sql.DB
	hold    *sql.Conn
}

// pause keeps the guard's store from writing, by holding SQLite's write lock, so
// that the cost of the calls shows without it.
func (p *process) pause() {
	if p.hold != nil {
		return
	}
	ctx := context.Background()
	for range 100 {
		conn, err := p.db.Conn(ctx)
		if err != nil {
			continue
		}
		if _, err := conn.ExecContext(ctx, "BEGIN IMMEDIATE"); err == nil {
			p.hold = conn
			return
		}
		conn.Close()
	}
}

// guard starts a guard in audit, or in the mode that it is named for.
func (b *bench) guard(binary, name string) (*process, error) {
	dir := filepath.Join(b.dir, name)
	config := filepath.Join(b.dir, name+".yaml")
	mode := "audit"
	if name == "enforce" {
		mode = name
	}
	text := strings.Replace(emulator.ConfigYAML(b.emulator.EntraURL(), b.upstream.url), "mode: audit", "mode: "+mode, 1)
	text += "listeners: [{address: \"127.0.0.1:0\"}]\nadmin: {address: \"127.0.0.1:0\"}\nledger: {min_free: 64MiB}\n"
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		return nil, err
	}
	p, err := b.child(binary, "serve", "-c", config, "--data-dir", dir)
	if err != nil {
		return nil, err
	}
	p.db, err = sql.Open("sqlite", filepath.Join(dir, "store.db")+"?_pragma=busy_timeout(5000)")
	return p, err
}

func (b *bench) haproxy() (*process, error) {
	binary, err := exec.LookPath("haproxy")
	if err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	address := l.Addr().String()
	l.Close()
	key := filepath.Join(b.dir, "key.pem")
	pem, err := publicKey(b.emulator.EntraURL() + "/common/discovery/keys")
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(key, pem, 0o600); err != nil {
		return nil, err
	}
	config := filepath.Join(b.dir, "haproxy.cfg")
	err = os.WriteFile(config, fmt.Appendf(nil, `global
  nbthread 1
  maxconn 2000
  tune.bufsize 32768
  log 127.0.0.1:9 local0
defaults
  mode http
  log global
  timeout connect 10s
  timeout client 60s
  timeout server 200s
frontend f
  bind %s
  http-request set-var(txn.bearer) http_auth_bearer
  http-request set-var(txn.aud) var(txn.bearer),jwt_payload_query('$.aud')
  http-request set-var(txn.alg) var(txn.bearer),jwt_header_query('$.alg')
  http-request set-var(txn.app) var(txn.bearer),jwt_payload_query('$.appid')
  http-request deny deny_status 401 unless { var(txn.alg) -m str RS256 }
  http-request deny deny_status 401 unless { var(txn.bearer),jwt_verify(txn.alg,"%s") 1 }
  http-request deny deny_status 401 unless { var(txn.aud) -m str https://api.partnercenter.microsoft.com }
  log-format "%%ci %%ST %%HM %%HP %%[var(txn.app)] %%[var(txn.aud)] %%Tr %%B"
  default_backend u
backend u
  http-reuse always
  server s %s
`, address, key, strings.TrimPrefix(b.upstream.url, "http://")), 0o600)
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(binary, "-f", config, "-db")
	cmd.Stderr = os.Stderr
	if err := startPinned(cmd, 0); err != nil {
		return nil, err
	}
	b.children = append(b.children, cmd)
	for range 200 {
		if c, err := net.Dial("tcp", address); err == nil {
			c.Close()
			return &process{address: address, pid: cmd.Process.Pid}, nil
		}
		time.Sleep(20 * time.Millisecond)
	}
	return nil, errors.New("HAProxy did not start")
}

// child starts a proxy and waits until it says where it listens: a bare URL, or
// the guard's log line.
func (b *bench) child(name string, args ...string) (*process, error) {
	cmd := exec.Command(name, args...)
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	cmd.Stdout, cmd.Stderr = w, w
	if err := startPinned(cmd, 0); err != nil {
		return nil, err
	}
	w.Close()
	b.children = append(b.children, cmd)
	address := make(chan string, 1)
	go findAddress(r, address)
	select {
	case a := <-address:
		if a == "" {
			return nil, fmt.Errorf("%s did not start", name)
		}
		return &process{address: a, pid: cmd.Process.Pid}, nil
	case <-time.After(30 * time.Second):
		return nil, fmt.Errorf("%s did not say where it listens", name)
	}
}

func (b *bench) stop() {
	for _, c := range b.children {
		c.Process.Kill()
		c.Wait()
	}
}
