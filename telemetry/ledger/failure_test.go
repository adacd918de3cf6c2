package ledger

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/partnerguard/partnerguard/proxy"
)

// faulty is the operating system's file system with faults on demand.
type faulty struct {
	osFiles
	mu      sync.Mutex
	onWrite func(p []byte, write func([]byte) (int, error)) (int, error)
	onSync  func() error
	onFree  func() (int64, error)
	removed chan string
	writes  int
	syncs   int
}

type faultyFile struct {
	file
	fs *faulty
}

func (fs *faulty) create(name string) (file, error) { return fs.wrap(fs.osFiles.create(name)) }
func (fs *faulty) extend(name string) (file, error) { return fs.wrap(fs.osFiles.extend(name)) }

func (fs *faulty) wrap(f file, err error) (file, error) {
	if err != nil {
		return nil, err
	}
	return faultyFile{f, fs}, nil
}

func (f faultyFile) Write(p []byte) (int, error) {
	f.fs.mu.Lock()
	hook := f.fs.onWrite
	f.fs.writes++
	f.fs.mu.Unlock()
	if hook == nil {
		return f.file.Write(p)
	}
	return hook(p, f.file.Write)
}

func (f faultyFile) datasync() error {
	f.fs.mu.Lock()
	hook := f.fs.onSync
	f.fs.syncs++
	f.fs.mu.Unlock()
	if hook != nil {
		if err := hook(); err != nil {
			return err
		}
	}
	return f.file.datasync()
}

func (fs *faulty) free(dir string) (int64, error) {
	fs.mu.Lock()
	hook := fs.onFree
	fs.mu.Unlock()
	if hook == nil {
		return 1 << 60, nil
	}
	return hook()
}

func (fs *faulty) onRemove() <-chan string {
	fs.removed = make(chan string, 100)
	return fs.removed
}

func (fs *faulty) remove(name string) error {
	if fs.removed != nil {
		fs.removed <- name
	}
	return fs.osFiles.remove(name)
}

func (fs *faulty) set(change func()) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	change()
}

func (fs *faulty) failWrites(n int, err error) {
	fs.set(func() {
		fs.onWrite = func(p []byte, write func([]byte) (int, error)) (int, error) {
			if n == 0 {
				return 0, err
			}
			done, werr := write(p[:min(n, len(p)-1)])
			return done, errors.Join(err, werr)
		}
	})
}

func (fs *faulty) heal() { fs.set(func() { fs.onWrite, fs.onSync, fs.onFree = nil, nil, nil }) }

// log collects events.
type log struct {
	mu   sync.Mutex
	all  []Event
	more chan struct{}
}

func (g *log) add(e Event) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.all = append(g.all, e)
	if g.more != nil {
		close(g.more)
		g.more = nil
	}
}

func (g *log) find(k EventKind) *Event {
	g.mu.Lock()
	defer g.mu.Unlock()
	if i := slices.IndexFunc(g.all, func(e Event) bool { return e.Kind == k }); i >= 0 {
		return &g.all[i]
	}
	return nil
}

func (g *log) kinds() []EventKind {
	g.mu.Lock()
	defer g.mu.Unlock()
	var ks []EventKind
	for _, e := range g.all {
		ks = append(ks, e.Kind)
	}
	return ks
}

// await returns once an event of kind k has been heard of.
func (g *log) await(t *testing.T, k EventKind) Event {
	t.Helper()
	limit := time.After(20 * time.Second)
	for {
		g.mu.Lock()
		if g.more == nil {
			g.more = make(chan struct{})
		}
		more := g.more
		g.mu.Unlock()
		if e := g.find(k); e != nil {
			return *e
		}
		select {
		case <-more:
		case <-limit:
			t.Fatalf("no event %s, but %v", k, g.kinds())
		}
	}
}

func openFaulty(t *testing.T, cfg Config) (*Ledger, *faulty, *log) {
	t.Helper()
	return openFaultyAt(t, cfg, fast)
}

func openFaultyAt(t *testing.T, cfg Config, p pace) (*Ledger, *faulty, *log) {
	t.Helper()
	fs, events := &faulty{}, &log{}
	cfg.Event = events.add
	if cfg.MinFree == 0 {
		cfg.MinFree = -1
	}
	l, err := open(cfg, fs, p)
	if err != nil {
		t.Fatal(err)
	}
	return l, fs, events
}

func TestWhatCouldNotBeRecordedLeavesAGap(t *testing.T) {
	for _, tt := range []struct {
		name  string
		short int
		err   error
	}{
		{"no space left", 0, syscall.ENOSPC},
		{"an I/O error", 0, syscall.EIO},
		{"a short write", 70, io.ErrShortWrite},
		{"a short write with whole lines in it", 900, syscall.ENOSPC},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			p := fast
			p.probe = time.Hour // below, so that one gap holds all
			l, fs, events := openFaultyAt(t, Config{Dir: dir}, p)
			before, lost1, lost2, after := record(), record(), record(), record()
			decide(t, l, before)

			fs.failWrites(tt.short, tt.err)
			err := l.Decide(lost1)
			if !errors.Is(err, ErrUnavailable) || !errors.Is(err, tt.err) {
				t.Errorf("Decide = %v, want ErrUnavailable and %v", err, tt.err)
			}
			if err := l.Decide(lost2); !errors.Is(err, ErrUnavailable) {
				t.Errorf("Decide while down = %v, want ErrUnavailable", err)
			}
			if err := l.Finish(before); !errors.Is(err, ErrUnavailable) {
				t.Errorf("Finish while down = %v, want ErrUnavailable", err)
			}
			if err := l.Finish(lost1); !errors.Is(err, ErrUnavailable) {
				t.Errorf("Finish of a lost call = %v, want ErrUnavailable", err)
			}
			s := l.Status()
			if s.Healthy || !s.Degraded || s.LostCalls != 2 || s.LostOutcomes != 2 || s.Gap.Calls != 2 || !errors.Is(s.Err, tt.err) {
				t.Errorf("Status = %+v, want 2 lost calls and the cause", s)
			}
			events.await(t, EventFailed)
			l.probe()
			fs.heal()
			l.probe()
			events.await(t, EventRecovered)
			if g := events.await(t, EventGap).Gap; g.Calls != 2 || g.Outcomes != 2 || g.Since.After(g.Until) {
				t.Errorf("gap = %+v, want 2 calls and 2 outcomes", g)
			}
			if s := l.Status(); !s.Healthy || s.Degraded || !s.Gap.empty() {
				t.Errorf("Status after recovery = %+v", s)
			}
			decide(t, l, after)
			finish(t, l, after)
			// A lost call that ends late is counted, not recorded.
			if err := l.Finish(lost2); !errors.Is(err, errNoDecision) {
				t.Errorf("Finish of a lost call = %v, want errNoDecision", err)
			}
			mustClose(t, l)

			got := summary(readAll(t, dir))
			want := []string{
				"header", "decision " + before.Call.String(),
				"header", "gap 2 2 " + s.Gap.Cause, "outcome " + before.Call.String() + " ledger_unavailable",
				"decision " + after.Call.String(), "outcome " + after.Call.String() + " 200",
				"gap 0 1 " + unavailable(errNoDecision).Error(),
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("ledger (-want +got):\n%s", diff)
			}
			rep := mustVerify(t, dir)
			if tt.short > 0 != (len(rep.Torn) == 1) {
				t.Errorf("torn = %v after a write of %d bytes", rep.Torn, tt.short)
			}
		})
	}
}

// The file system reports an error although it took every byte: the line stands,
// so its outcome may follow, but nothing more goes into that segment.
func TestAnErrorAfterAWholeWriteLeavesTheLineStanding(t *testing.T) {
	dir := t.TempDir()
	l, fs, events := openFaulty(t, Config{Dir: dir})
	fs.set(func() {
		fs.onWrite = func(p []byte, write func([]byte) (int, error)) (int, error) {
			n, err := write(p)
			return n, errors.Join(syscall.EIO, err)
		}
	})
	rec := record()
	if err := l.Decide(rec); !errors.Is(err, syscall.EIO) {
		t.Errorf("Decide = %v, want EIO", err)
	}
	fs.heal()
	events.await(t, EventRecovered)
	finish(t, l, rec)
	mustClose(t, l)
	want := []string{"header", "decision " + rec.Call.String(), "header", "outcome " + rec.Call.String() + " 200"}
	if diff := cmp.Diff(want, summary(readAll(t, dir))); diff != "" {
		t.Errorf("ledger (-want +got):\n%s", diff)
	}
	if rep := mustVerify(t, dir); rep.Gaps != 0 || len(rep.Torn) != 0 {
		t.Errorf("Verify = %+v, want neither gap nor torn bytes", rep)
	}
}

// While the disk comes and goes, every call is either recorded or refused, and the
// gaps add up to the refusals.
func TestGapsAddUpUnderLoad(t *testing.T) {
	dir := t.TempDir()
	l, fs, _ := openFaulty(t, Config{Dir: dir, SegmentBytes: 16 << 10})
	stop := make(chan struct{})
	var mischief sync.WaitGroup
	mischief.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				fs.heal()
				return
			case <-time.After(3 * time.Millisecond):
			}
			if i%2 == 0 {
				fs.failWrites(i*37%1500, syscall.ENOSPC)
			} else {
				fs.heal()
			}
		}
	})
	var (
		mu       sync.Mutex
		recorded = map[proxy.CallID]bool{}
		refused  = map[proxy.CallID]bool{}
		workers  sync.WaitGroup
	)
	for range 16 {
		workers.Go(func() {
			for range 150 {
				rec := record()
				err := l.Decide(rec)
				mu.Lock()
				if err == nil {
					recorded[rec.Call] = true
				} else {
					refused[rec.Call] = true
				}
				mu.Unlock()
				if err != nil {
					time.Sleep(100 * time.Microsecond) // let the disk come back now and then
				}
				l.Finish(rec)
			}
		})
	}
	workers.Wait()
	close(stop)
	mischief.Wait()
	for !l.Status().Healthy {
		time.Sleep(time.Millisecond)
	}
	s := l.Status()
	mustClose(t, l)

	mustVerify(t, dir)
	entries := readAll(t, dir)
	decided, ended := count(entries)
	for id := range recorded {
		if decided[id] != 1 || ended[id] != 1 {
			t.Errorf("recorded call %v has %d decisions and %d outcomes", id, decided[id], ended[id])
		}
	}
	for id := range refused {
		if decided[id] != 0 || ended[id] != 0 {
			t.Errorf("refused call %v has %d decisions and %d outcomes", id, decided[id], ended[id])
		}
	}
	var calls, outcomes uint64
	for _, e := range entries {
		if e.Type == TypeGap {
			var m members
			mustUnmarshal(t, e.Line, &m)
			calls += m.Calls
			outcomes += m.Outcomes
		}
	}
	if calls != uint64(len(refused)) || calls != s.LostCalls || outcomes != s.LostOutcomes {
		t.Errorf("gaps say %d calls and %d outcomes; %d were refused, Status says %d and %d", calls, outcomes, len(refused), s.LostCalls, s.LostOutcomes)
	}
	if len(recorded) == 0 || len(refused) == 0 {
		t.Errorf("%d recorded, %d refused; the test tests little", len(recorded), len(refused))
	}
}

func TestTooLittleSpaceTakesTheLedgerDown(t *testing.T) {
	dir := t.TempDir()
	l, fs, events := openFaulty(t, Config{Dir: dir, MinFree: 1 << 30})
	decide(t, l, record())
	fs.set(func() { fs.onFree = func() (int64, error) { return 1<<30 - 1, nil } })
	events.await(t, EventFailed)
	if err := l.Decide(record()); !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "1023 MiB free") {
		t.Errorf("Decide = %v, want ErrUnavailable and how much is free", err)
	}
	fs.heal()
	events.await(t, EventRecovered)
	decide(t, l, record())
	mustClose(t, l)
	if rep := mustVerify(t, dir); rep.Segments != 1 || rep.Gaps != 1 || rep.Decisions != 2 {
		t.Errorf("Verify = %+v, want one sound segment with a gap", rep)
	}
}

func TestAFullDiskIsNoReasonNotToStart(t *testing.T) {
	dir := t.TempDir()
	mustClose(t, mustOpen(t, Config{Dir: dir, Instance: "one"}))
	fs, events := &faulty{}, &log{}
	fs.failWrites(0, syscall.ENOSPC)
	l, err := open(Config{Dir: dir, Instance: "two", MinFree: -1, Event: events.add}, fs, fast)
	if err != nil {
		t.Fatal(err)
	}
	rec := record()
	if err := l.Decide(rec); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("Decide = %v, want ENOSPC", err)
	}
	fs.heal()
	events.await(t, EventRecovered)
	decide(t, l, record())
	mustClose(t, l)
	mustVerify(t, dir)
	if tmp, _ := filepath.Glob(filepath.Join(dir, "ledger", "*.tmp")); len(tmp) > 0 {
		t.Errorf("left behind: %v", tmp)
	}

	fs = &faulty{}
	fs.failWrites(0, syscall.EROFS)
	if _, err := open(Config{Dir: dir, Instance: "three", MinFree: -1}, fs, fast); !errors.Is(err, syscall.EROFS) {
		t.Errorf("open of a read-only disk = %v, want EROFS", err)
	}
	mustClose(t, mustOpen(t, Config{Dir: dir})) // and the lock is free again
}

func TestSyncAlwaysSyncsBeforeDecideReturns(t *testing.T) {
	dir := t.TempDir()
	l, fs, _ := openFaulty(t, Config{Dir: dir, SyncAlways: true, SyncEvery: time.Hour})
	for range 5 {
		fs.set(func() { fs.writes, fs.syncs = 0, 0 })
		decide(t, l, record())
		fs.set(func() {
			if fs.writes != 1 || fs.syncs != 1 {
				t.Errorf("%d writes and %d syncs before Decide returns, want 1 and 1", fs.writes, fs.syncs)
			}
		})
	}
	mustClose(t, l)
	mustVerify(t, dir)
}

// A decision that is in the file but perhaps not on the disk: the caller hears so,
// the line stands, its outcome follows in a new segment.
func TestAFailedSyncBeginsANewSegment(t *testing.T) {
	dir := t.TempDir()
	l, fs, events := openFaulty(t, Config{Dir: dir, SyncAlways: true, SyncEvery: time.Hour})
	fs.set(func() { fs.onSync = func() error { return syscall.EIO } })
	rec := record()
	if err := l.Decide(rec); !errors.Is(err, ErrUnavailable) || !errors.Is(err, syscall.EIO) {
		t.Errorf("Decide = %v, want ErrUnavailable and EIO", err)
	}
	events.await(t, EventFailed)
	fs.heal()
	events.await(t, EventRecovered)
	finish(t, l, rec)
	mustClose(t, l)
	want := []string{"header", "decision " + rec.Call.String(), "header", "outcome " + rec.Call.String() + " 200"}
	if diff := cmp.Diff(want, summary(readAll(t, dir))); diff != "" {
		t.Errorf("ledger (-want +got):\n%s", diff)
	}
	mustVerify(t, dir)
}

func TestAFailedBackgroundSyncBeginsANewSegmentAndLosesNothing(t *testing.T) {
	dir := t.TempDir()
	l, fs, events := openFaulty(t, Config{Dir: dir, SyncEvery: time.Millisecond})
	fs.set(func() { fs.onSync = func() error { return syscall.EIO } })
	a, b := record(), record()
	decide(t, l, a)
	events.await(t, EventSyncFailed)
	if s := l.Status(); !s.Healthy || !s.Degraded || !errors.Is(s.SyncErr, syscall.EIO) {
		t.Errorf("Status = %+v, want healthy but degraded", s)
	}
	fs.heal()
	decide(t, l, b)
	mustClose(t, l)
	if s := l.Status(); s.SyncErr != nil {
		t.Errorf("SyncErr = %v after a sync that worked", s.SyncErr)
	}
	want := []string{"header", "decision " + a.Call.String(), "header", "decision " + b.Call.String()}
	if diff := cmp.Diff(want, summary(readAll(t, dir))); diff != "" {
		t.Errorf("ledger (-want +got):\n%s", diff)
	}
	mustVerify(t, dir)
}

// A write that does not return holds up the one call that does it, and nobody else.
func TestAStalledDiskHoldsUpOneCallOnly(t *testing.T) {
	dir := t.TempDir()
	l, fs, events := openFaulty(t, Config{Dir: dir})
	entered, release := make(chan struct{}), make(chan struct{})
	fs.set(func() {
		fs.onWrite = func(p []byte, write func([]byte) (int, error)) (int, error) {
			close(entered)
			<-release
			fs.heal()
			return write(p)
		}
	})
	held, waiting, refused := record(), record(), record()
	leader, waiter := make(chan error, 1), make(chan error, 1)
	go func() { leader <- l.Decide(held) }()
	<-entered
	go func() { waiter <- l.Decide(waiting) }()
	if err := <-waiter; !errors.Is(err, errStalled) {
		t.Errorf("Decide behind a stalled write = %v, want errStalled", err)
	}
	events.await(t, EventFailed)
	if err := l.Decide(refused); !errors.Is(err, errStalled) {
		t.Errorf("Decide while stalled = %v, want errStalled", err)
	}
	if err := l.Finish(waiting); err != nil && !errors.Is(err, ErrUnavailable) {
		t.Errorf("Finish while stalled = %v", err)
	}
	if s := l.Status(); s.Healthy {
		t.Errorf("Status while stalled = %+v", s)
	}
	close(release)
	if err := <-leader; err != nil {
		t.Errorf("Decide whose write came back = %v", err)
	}
	events.await(t, EventRecovered)
	finish(t, l, held)
	mustClose(t, l)
	mustVerify(t, dir)
	entries := readAll(t, dir)
	decided, ended := count(entries)
	if decided[held.Call] != 1 || ended[held.Call] != 1 || decided[refused.Call] != 0 {
		t.Errorf("decided %v, ended %v; want the held call whole, the refused one not at all", decided, ended)
	}
	if decided[waiting.Call] != ended[waiting.Call] {
		t.Errorf("the waiting call has %d decisions and %d outcomes", decided[waiting.Call], ended[waiting.Call])
	}
	if rep := verify(t, dir); rep.Gaps == 0 {
		t.Error("no gap tells of the refused call")
	}
}

func TestCloseGivesUpOnAStalledDisk(t *testing.T) {
	l, fs, events := openFaulty(t, Config{Dir: t.TempDir()})
	entered, release := make(chan struct{}), make(chan struct{})
	fs.set(func() {
		fs.onWrite = func(p []byte, write func([]byte) (int, error)) (int, error) {
			close(entered)
			<-release
			fs.heal()
			return write(p)
		}
	})
	done := make(chan error, 1)
	go func() { done <- l.Decide(record()) }()
	<-entered
	events.await(t, EventFailed)
	if err := l.Close(); !errors.Is(err, errStalled) {
		t.Errorf("Close = %v, want errStalled", err)
	}
	close(release)
	if err := <-done; err != nil {
		t.Errorf("Decide = %v", err)
	}
}

func TestNothingIsTakenAfterClose(t *testing.T) {
	l := mustOpen(t, Config{Dir: t.TempDir()})
	rec := record()
	decide(t, l, rec)
	mustClose(t, l)
	mustClose(t, l)
	if err := l.Decide(record()); !errors.Is(err, errClosed) {
		t.Errorf("Decide = %v, want errClosed", err)
	}
	if err := l.Finish(rec); !errors.Is(err, errClosed) {
		t.Errorf("Finish = %v, want errClosed", err)
	}
}

func TestAnIdentityThatCannotBeWrittenIsTriedAgain(t *testing.T) {
	dir := t.TempDir()
	var events log
	at := newClock(time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC))
	l := mustOpen(t, Config{Dir: dir, Event: events.add, Now: at.time})
	name := filepath.Join(dir, identitiesFile)
	if err := os.Mkdir(name, 0o700); err != nil {
		t.Fatal(err)
	}
	rec := record()
	ref := l.UserRef(&rec.Token)
	events.await(t, EventIdentityFailed)
	if err := os.Remove(name); err != nil {
		t.Fatal(err)
	}
	if got := l.UserRef(&rec.Token); got != ref || ref == "" {
		t.Errorf("UserRef = %q, then %q", ref, got)
	}
	at.add(2 * time.Second)
	l.UserRef(&rec.Token)
	mustClose(t, l)
	ids, err := Identities(dir)
	if err != nil || ids[ref].UPN != rec.Token.UPN {
		t.Errorf("Identities = %v, %v, want %s", ids, err, rec.Token.UPN)
	}
}
