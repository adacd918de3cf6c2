package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/partnerguard/partnerguard/telemetry/ledger"
	"github.com/partnerguard/partnerguard/telemetry/report"
	"github.com/partnerguard/partnerguard/telemetry/store"
)

// lookBack is the time over which the calls of a scale are spread. It ends a little
// while ago, so that all of them are in a report over 30 days that is made later.
const (
	lookBack  = 30 * 24 * time.Hour
	lateness  = 2 * time.Hour
	repeats   = 20               // of each search
	patience  = 10 * time.Second // with one search; then it is repeated no more
	pageLimit = 50               // calls that a search asks for
)

// runScale measures ledger, store, report and searches with so many calls each, one
// after the other, and prints one table. dir takes ledgers and stores, a GiB a million calls;
// each is removed before the next is made.
func runScale(ctx context.Context, out io.Writer, sizes, dir, postgres string) error {
	var calls []int
	for _, size := range strings.Split(sizes, ",") {
		n, err := strconv.Atoi(size)
		if err != nil || n < 1000 {
			return fmt.Errorf("-scale %q is no list of numbers of calls, each at least 1000", sizes)
		}
		calls = append(calls, n)
	}
	dir, err := os.MkdirTemp(dir, "partnerguard-scale-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	guard := filepath.Join(dir, "partnerguard")
	build := exec.CommandContext(ctx, "go", "build", "-o", guard, "github.com/partnerguard/partnerguard/cmd/partnerguard")
	build.Stderr = os.Stderr
	if err := build.Run(); err != nil {
		return fmt.Errorf("build the guard: %w", err)
	}
	t := &scaleTable{}
	for _, n := range calls {
		data := filepath.Join(dir, "data")
		if err := t.measure(ctx, guard, data, postgres, n); err != nil {
			return fmt.Errorf("%d calls: %w", n, err)
		}
		if err := os.RemoveAll(data); err != nil {
			return err
		}
	}
	return t.print(out)
}

// scaleTable has a column for each number of calls.
type scaleTable struct {
	sizes []int
	names []string // of the rows, in order
	rows  map[string][]float64
}

func (t *scaleTable) set(name string, v float64) {
	if t.rows == nil {
		t.rows = map[string][]float64{}
	}
	if t.rows[name] == nil {
		t.names = append(t.names, name)
	}
	t.rows[name] = append(t.rows[name], v)
	fmt.Fprintf(os.Stderr, "  %s: %s\n", name, figure(v))
}

func (t *scaleTable) print(w io.Writer) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprint(tw, "\t")
	for _, n := range t.sizes {
		fmt.Fprintf(tw, "%d calls\t", n)
	}
	fmt.Fprintln(tw, "growth\t")
	for _, name := range t.names {
		row := t.rows[name]
		fmt.Fprintf(tw, "%s\t", name)
		for _, v := range row {
			fmt.Fprintf(tw, "%s\t", figure(v))
		}
		fmt.Fprintf(tw, "× %.2f\t\n", row[len(row)-1]/row[0])
	}
	return tw.Flush()
}

// figure has three digits that mean something.
func figure(v float64) string {
	switch {
	case v >= 100:
		return strconv.FormatFloat(v, 'f', 0, 64)
	case v >= 10:
		return strconv.FormatFloat(v, 'f', 1, 64)
	}
	return strconv.FormatFloat(v, 'f', 2, 64)
}

func (t *scaleTable) measure(ctx context.Context, guard, dir, postgres string, n int) error {
	t.sizes = append(t.sizes, n)
	until := time.Now().UTC().Add(-lateness)
	fmt.Fprintf(os.Stderr, "%d calls: writing the ledger\n", n)
	wrote := time.Now()
	e := newEstate(until.Add(-lookBack+2*lateness), until, n)
	if err := e.write(ctx, dir); err != nil {
		return fmt.Errorf("write ledger: %w", err)
	}
	t.set("ledger: µs to write a call, its checks included", float64(time.Since(wrote).Microseconds())/float64(n))
	size, err := bytesUnder(filepath.Join(dir, "ledger"))
	if err != nil {
		return err
	}
	t.set("ledger: bytes a call", float64(size)/float64(n))
	packed, err := compressed(ctx, dir)
	if err != nil {
		return fmt.Errorf("compress ledger: %w", err)
	}
	t.set("ledger: bytes a call, compressed", packed*float64(size)/float64(n))

	fmt.Fprintf(os.Stderr, "%d calls: reading it into the store\n", n)
	at := []string{"--data-dir", dir}
	open := func() (store.Reader, error) { return store.OpenReader(dir) }
	if postgres != "" {
		f, err := newFleet(ctx, postgres)
		if err != nil {
			return err
		}
		defer f.remove()
		if err := t.fillFleet(ctx, f, dir, n); err != nil {
			return err
		}
		at = append(at, "--store", "env:"+storeVariable)
		os.Setenv(storeVariable, f.url)
		open = func() (store.Reader, error) { return store.OpenPostgresReader(ctx, f.url) }
	} else {
		p, err := runGuard(ctx, guard, "ledger", "rebuild", "--data-dir", dir)
		if err != nil {
			return err
		}
		t.set("ingest: calls/s on one processor", float64(n)/p.wall.Seconds())
		t.set("ingest: CPU µs a call", float64(p.cpu.Microseconds())/float64(n))
		t.set("ingest: RSS MiB", p.rss)
		if size, err = bytesUnder(filepath.Join(dir, "store.db")); err != nil {
			return err
		}
		t.set("store: bytes a call", float64(size)/float64(n))
	}

	fmt.Fprintf(os.Stderr, "%d calls: reports and searches\n", n)
	for _, args := range [][]string{{"--since", "30d"}, {"--since", "30d", "--by", "customer"}, {"--since", "7d", "--by", "user"}} {
		var wall, cpu, rss []float64
		for range 3 {
			p, err := runGuard(ctx, guard, slices.Concat([]string{"report"}, at, args)...)
			if err != nil {
				return err
			}
			wall, cpu, rss = append(wall, float64(p.wall.Microseconds())/1000), append(cpu, float64(p.cpu.Microseconds())/1000), append(rss, p.rss)
		}
		name := "report " + strings.Join(args, " ")
		t.set(name+": ms", median(wall))
		t.set(name+": CPU ms", median(cpu))
		t.set(name+": RSS MiB", slices.Max(rss))
	}
	r, err := open()
	if err != nil {
		return err
	}
	defer r.Close()
	if err := t.build(ctx, r, n); err != nil {
		return err
	}
	for _, s := range searches(e) {
		if err := t.search(ctx, r, s, e.samples); err != nil {
			return fmt.Errorf("search by %s: %w", s.name, err)
		}
	}
	return t.lists(ctx, r, until)
}

// build measures the report without the start of a program, and looks whether it has
// all the calls.
func (t *scaleTable) build(ctx context.Context, r store.Reader, n int) error {
	identities, err := r.Identities(ctx)
	if err != nil {
		return err
	}
	var took []float64
	for range 5 {
		start := time.Now()
		rep, err := report.Build(ctx, r, identities, report.Options{Since: start.Add(-lookBack), Now: start})
		if err != nil {
			return err
		}
		took = append(took, millis(start))
		if rep.Calls != int64(n) {
			return fmt.Errorf("the report has %d calls", rep.Calls)
		}
	}
	t.set("report.Build over 30 days: ms", median(took))
	return nil
}

// search is a question that a person asks about a call.
type search struct {
	name   string
	filter func(sample) store.Filter
}

func searches(e *estate) []search {
	latest := func(f store.Filter) store.Filter { f.Limit = pageLimit; return f }
	return []search{
		{"request id", func(s sample) store.Filter { return latest(store.Filter{RequestID: s.request}) }},
		{"correlation id", func(s sample) store.Filter { return latest(store.Filter{CorrelationID: s.correlation}) }},
		{"call", func(s sample) store.Filter { return latest(store.Filter{Call: s.call}) }},
		{"user", func(s sample) store.Filter { return latest(store.Filter{User: s.user}) }},
		{"user with few calls", func(s sample) store.Filter { return latest(store.Filter{User: e.rareUser(s)}) }},
		{"user with few calls, all of them", func(s sample) store.Filter { return store.Filter{User: e.rareUser(s)} }},
		{"integration and an hour", func(s sample) store.Filter {
			return latest(store.Filter{Integration: s.integration, Since: s.time.Add(-30 * time.Minute), Until: s.time.Add(30 * time.Minute)})
		}},
		{"customer", func(s sample) store.Filter { return latest(store.Filter{Customer: s.customer}) }},
		{"customer with few calls, all of them", func(s sample) store.Filter { return store.Filter{Customer: e.rareCustomer(s)} }},
		{"customer and integration", func(s sample) store.Filter {
			return latest(store.Filter{Customer: s.customer, Integration: s.integration})
		}},
		{"reason mfa_missing", func(sample) store.Filter { return latest(store.Filter{Reason: "mfa_missing"}) }},
		{"status 5xx", func(sample) store.Filter { return latest(store.Filter{Status: "5xx"}) }},
		{"status that no call has", func(sample) store.Filter { return latest(store.Filter{Status: "418"}) }},
	}
}

func (t *scaleTable) search(ctx context.Context, r store.Reader, s search, samples []sample) error {
	var took []float64
	begun := time.Now()
	for i := range repeats {
		if time.Since(begun) > patience {
			break
		}
		start := time.Now()
		f, found := s.filter(samples[i%len(samples)]), 0
		if err := r.Calls(ctx, f, func(store.Call) error { found++; return nil }); err != nil {
			return err
		}
		took = append(took, millis(start))
		if (found == 0) != (s.name == "status that no call has") {
			return fmt.Errorf("%d calls found by %+v", found, f)
		}
	}
	t.set("search by "+s.name+", p50: ms", median(took))
	t.set("search by "+s.name+", max: ms", slices.Max(took))
	return nil
}

// lists measures what joins read.
func (t *scaleTable) lists(ctx context.Context, r store.Reader, until time.Time) error {
	start := time.Now()
	callers, err := r.Callers(ctx, until.Add(-lookBack), time.Time{})
	if err != nil {
		return err
	}
	t.set("callers over 30 days: ms", millis(start))
	t.set("callers over 30 days: found", float64(len(callers)))
	start = time.Now()
	tokens := 0
	if err := r.Tokens(ctx, until.Add(-lookBack), time.Time{}, func(store.Token) error { tokens++; return nil }); err != nil {
		return err
	}
	t.set("tokens over 30 days: ms", millis(start))
	t.set("tokens over 30 days: found", float64(tokens))
	return nil
}

func millis(start time.Time) float64 { return float64(time.Since(start).Microseconds()) / 1000 }

// ran is what a run of the guard's program took.
type ran struct {
	wall, cpu time.Duration
	rss       float64 // the most, MiB; 0 where it cannot be read
}

// runGuard runs a command of the guard's on one processor.
func runGuard(ctx context.Context, guard string, args ...string) (ran, error) {
	cmd := exec.CommandContext(ctx, guard, args...)
	cmd.Env = append(os.Environ(), "GOMAXPROCS=1")
	cmd.Stderr = os.Stderr
	start := time.Now()
	if err := cmd.Start(); err != nil {
		return ran{}, err
	}
	peak, stop := make(chan float64), make(chan struct{})
	go func() {
		look := time.NewTicker(5 * time.Millisecond)
		defer look.Stop()
		most := 0.0
		for {
			most = max(most, peakRSS(cmd.Process.Pid))
			select {
			case <-stop:
				peak <- most
				return
			case <-look.C:
			}
		}
	}()
	err := cmd.Wait()
	wall := time.Since(start)
	close(stop)
	rss := <-peak
	if err != nil {
		return ran{}, fmt.Errorf("partnerguard %s: %w", strings.Join(args, " "), err)
	}
	return ran{wall, cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime(), rss}, nil
}

// peakRSS is the most that a process had in memory, in MiB (proc(5), VmHWM).
func peakRSS(pid int) float64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	_, rest, _ := strings.Cut(string(b), "VmHWM:")
	f := strings.Fields(rest)
	if len(f) == 0 {
		return 0
	}
	kib, _ := strconv.ParseFloat(f[0], 64)
	return kib / 1024
}

// compressed is how much of a segment's size is left once the guard has compressed it,
// found with a copy of the first ones of dir.
func compressed(ctx context.Context, dir string) (part float64, err error) {
	tmp, err := os.MkdirTemp(dir, "compressed-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(tmp)
	from, to := filepath.Join(dir, "ledger"), filepath.Join(tmp, "ledger")
	if err := os.Mkdir(to, 0o700); err != nil {
		return 0, err
	}
	var plain int64
	for num := 1; num <= 2; num++ {
		name := fmt.Sprintf("%012d.jsonl", num)
		text, err := os.ReadFile(filepath.Join(from, name))
		if err == nil {
			err = os.WriteFile(filepath.Join(to, name), text, 0o600)
		}
		if err != nil {
			return 0, err
		}
		plain += int64(len(text))
	}
	l, err := ledger.Open(ledger.Config{Dir: tmp, Compress: true, Retention: -1})
	if err != nil {
		return 0, err
	}
	defer l.Close()
	for {
		packed, _ := filepath.Glob(filepath.Join(to, "*.jsonl.zst"))
		left, _ := filepath.Glob(filepath.Join(to, "*.jsonl"))
		if len(packed) == 2 && len(left) == 1 {
			var size int64
			for _, name := range packed {
				n, err := bytesUnder(name)
				if err != nil {
					return 0, err
				}
				size += n
			}
			return float64(size) / float64(plain), nil
		}
		select {
		case <-ctx.Done():
			return 0, ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// bytesUnder is the size of a file, or of all in a directory.
func bytesUnder(path string) (int64, error) {
	var total int64
	err := filepath.WalkDir(path, func(_ string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		fi, err := d.Info()
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		if err == nil {
			total += fi.Size()
		}
		return err
	})
	return total, err
}
