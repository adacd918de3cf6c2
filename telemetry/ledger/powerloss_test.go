package ledger

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/partnerguard/partnerguard/proxy"
)

// mortal is a file system that can lose its power. The program sees what it wrote;
// what it did not sync is kept apart, and of that powerLoss lets survive what it
// likes: of a file any of the writes, whole or in part, with zeros where blocks were
// allocated and never filled, also those behind others that are lost; of a
// directory's changes the first so many, since the file systems we know keep those
// in order, but without regard to what the files then hold.
type mortal struct {
	osFiles
	rnd *rand.Rand

	mu    sync.Mutex
	off   bool
	seen  map[string]*inode // by path, as the program sees it
	safe  map[string]*inode // as it is on the disk
	moves []move            // of names, since the last syncDir
}

// inode is a file whatever its name.
type inode struct {
	synced []byte
	writes [][]byte // since then, each at the end
}

// move is a change of names: to now holds ino (nil: nothing), and from is gone.
type move struct {
	from, to string
	ino      *inode
}

type mortalFile struct {
	file
	fs  *mortal
	ino *inode
}

var errOff = errors.New("the power is off")

func newMortal(seed uint64) *mortal {
	return &mortal{rnd: rand.New(rand.NewPCG(seed, 1)), seen: map[string]*inode{}, safe: map[string]*inode{}}
}

func (m *mortal) do(op func() error) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.off {
		return errOff
	}
	return op()
}

func (m *mortal) create(name string) (f file, err error) {
	err = m.do(func() error {
		if f, err = m.osFiles.create(name); err != nil {
			return err
		}
		ino := &inode{}
		f = mortalFile{f, m, ino}
		m.seen[name] = ino
		m.moves = append(m.moves, move{to: name, ino: ino})
		return nil
	})
	return f, err
}

func (m *mortal) extend(name string) (f file, err error) {
	err = m.do(func() error {
		ino := m.seen[name]
		if ino == nil {
			return fmt.Errorf("%s was not made here", name)
		}
		if f, err = m.osFiles.extend(name); err == nil {
			f = mortalFile{f, m, ino}
		}
		return err
	})
	return f, err
}

func (m *mortal) rename(from, to string) error {
	return m.do(func() error {
		if err := m.osFiles.rename(from, to); err != nil {
			return err
		}
		m.seen[to] = m.seen[from]
		delete(m.seen, from)
		m.moves = append(m.moves, move{from, to, m.seen[to]})
		return nil
	})
}

func (m *mortal) remove(name string) error {
	return m.do(func() error {
		if err := m.osFiles.remove(name); err != nil {
			return err
		}
		delete(m.seen, name)
		m.moves = append(m.moves, move{from: name})
		return nil
	})
}

func (m *mortal) syncDir(string) error {
	return m.do(func() error {
		m.safe, m.moves = maps.Clone(m.seen), nil
		return nil
	})
}

func (m *mortal) free(string) (int64, error) { return 1 << 60, nil }

func (f mortalFile) Write(p []byte) (n int, err error) {
	err = f.fs.do(func() error {
		n, err = f.file.Write(p)
		f.ino.writes = append(f.ino.writes, slices.Clone(p[:n]))
		return err
	})
	return n, err
}

func (f mortalFile) datasync() error {
	return f.fs.do(func() error {
		f.ino.synced = slices.Concat(append([][]byte{f.ino.synced}, f.ino.writes...)...)
		f.ino.writes = nil
		return nil
	})
}

// cut switches the power off: from now on nothing is written any more.
func (m *mortal) cut() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.off = true
}

// restore puts on the disk what survived, and switches the power on.
func (m *mortal) restore(t *testing.T) {
	t.Helper()
	m.mu.Lock()
	defer m.mu.Unlock()
	names := maps.Clone(m.safe)
	for _, mv := range m.moves[:m.rnd.IntN(len(m.moves)+1)] {
		delete(names, mv.from)
		if mv.ino != nil {
			names[mv.to] = mv.ino
		}
	}
	for name := range m.seen {
		if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(names)) {
		ino := names[name]
		if len(ino.writes) > 0 {
			ino.synced, ino.writes = m.survivor(ino), nil
		}
		if err := os.WriteFile(name, ino.synced, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	m.seen, m.safe, m.moves, m.off = names, maps.Clone(names), nil, false
}

// survivor is what is left of a file.
func (m *mortal) survivor(ino *inode) []byte {
	var lost []byte
	for _, w := range ino.writes {
		lost = append(lost, w...)
	}
	switch m.rnd.IntN(4) {
	case 0: // nothing more reached the disk, or all of it
		lost = lost[:len(lost)*m.rnd.IntN(2)]
	case 1: // the beginning
		lost = lost[:m.rnd.IntN(len(lost)+1)]
	case 2: // some of the writes; where a later one stands, the file reaches up to there
		at, end := 0, 0
		for _, w := range ino.writes {
			if m.rnd.IntN(3) == 0 {
				clear(lost[at : at+len(w)])
			} else {
				end = at + len(w)
			}
			at += len(w)
		}
		lost = lost[:end]
	case 3: // some of the blocks
		const block = 512
		lost = lost[:m.rnd.IntN(len(lost)+1)]
		for at := 0; at < len(lost); {
			n := min(block-(len(ino.synced)+at)%block, len(lost)-at)
			if m.rnd.IntN(3) == 0 {
				clear(lost[at : at+n])
			}
			at += n
		}
	}
	return append(slices.Clip(ino.synced), lost...)
}

// The power fails at any point of any history. What was on the disk is there
// afterwards: with SyncAlways every decision that Decide took, else what was written
// before the last sync; and the chain holds.
func TestPowerLoss(t *testing.T) {
	histories := 60
	if testing.Short() {
		histories = 25
	}
	for _, always := range []bool{true, false} {
		name := map[bool]string{true: "fsync always", false: "fsync 1s"}[always]
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for seed := range uint64(histories) {
				if !powerLoss(t, seed, always) {
					t.Fatalf("seed %d", seed)
				}
			}
		})
	}
}

func powerLoss(t *testing.T, seed uint64, always bool) bool {
	dir := quickDir(t)
	defer os.RemoveAll(dir)
	disk := newMortal(seed)
	rnd := rand.New(rand.NewPCG(seed, 2))
	now := newClock(time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC))
	cfg := Config{
		Dir: dir, SyncAlways: always, SyncEvery: time.Hour, Retention: -1, MinFree: -1,
		SegmentBytes: int64(1500 + rnd.IntN(12000)), Now: now.time,
	}
	// The background does nothing by itself: the history says when it does what. But
	// for compression, in every other history: that begins with a sync, and takes its
	// own time.
	still := pace{probe: time.Hour, watch: time.Hour, prune: time.Hour}
	cfg.Compress = seed%2 == 1

	must := map[proxy.CallID]bool{}    // decisions that no power loss may take
	mustEnd := map[proxy.CallID]bool{} // the same of outcomes
	may := map[proxy.CallID]bool{}     // the others that were taken
	ok := true
	fail := func(format string, args ...any) {
		t.Errorf("seed %d: "+format, append([]any{seed}, args...)...)
		ok = false
	}
	for life := range 4 {
		l, err := open(cfg, disk, still)
		if err != nil {
			fail("life %d: Open: %v", life, err)
			return false
		}
		rep, err := Verify(dir, VerifyOptions{})
		if err != nil || rep.Problem != nil {
			fail("life %d: after recovery: %v, %v", life, err, rep.Problem)
		}
		decided, ended := count(readAll(t, dir))
		for id := range must {
			if decided[id] != 1 {
				fail("life %d: call %v, which was on the disk, has %d decisions", life, id, decided[id])
			}
		}
		for id, n := range decided {
			if n != 1 || !must[id] && !may[id] {
				fail("life %d: call %v, of which nobody knows, has %d decisions", life, id, n)
			}
			if ended[id] != 1 {
				fail("life %d: call %v has %d outcomes after recovery", life, id, ended[id])
			}
		}
		for id := range mustEnd {
			if ended[id] != 1 {
				fail("life %d: call %v, whose outcome was on the disk, has %d", life, id, ended[id])
			}
		}
		if !ok || life == 3 {
			l.Close()
			return ok
		}
		must, mustEnd, may = map[proxy.CallID]bool{}, map[proxy.CallID]bool{}, map[proxy.CallID]bool{}
		for id := range decided {
			must[id], mustEnd[id] = always, always
			may[id] = true
		}

		var open []*proxy.Record
		sync := func() {
			if err := l.sync(); err != nil {
				fail("life %d: sync: %v", life, err)
			}
			d, e := count(readAll(t, dir))
			for id := range d {
				must[id] = true
			}
			for id := range e {
				mustEnd[id] = true
			}
		}
		for range 5 + rnd.IntN(60) {
			now.add(time.Second)
			switch n := rnd.IntN(20); {
			case n < 11:
				rec := record()
				may[rec.Call] = true
				if err := l.Decide(rec); err != nil {
					fail("life %d: Decide: %v", life, err)
				}
				must[rec.Call] = always
				open = append(open, rec)
			case n < 17 && len(open) > 0:
				i := rnd.IntN(len(open))
				if err := l.Finish(open[i]); err != nil {
					fail("life %d: Finish: %v", life, err)
				}
				mustEnd[open[i].Call] = always
				open = slices.Delete(open, i, i+1)
			case n == 17:
				l.checkpoint()
			case n == 18:
				now.add(24 * time.Hour) // a new segment
			case n == 19:
				sync()
			}
		}
		for id, held := range must { // false entries say "may"
			if !held {
				delete(must, id)
			}
		}
		for id, held := range mustEnd {
			if !held {
				delete(mustEnd, id)
			}
		}
		rest := others(t, dir)
		disk.cut()
		l.Close()
		disk.restore(t)
		rest.restore(t)
	}
	return ok
}

// clock is one that a test sets, and that the background may read meanwhile.
type clock struct{ ns atomic.Int64 }

func newClock(at time.Time) *clock {
	c := &clock{}
	c.ns.Store(at.UnixNano())
	return c
}

func (c *clock) time() time.Time { return time.Unix(0, c.ns.Load()).UTC() }

func (c *clock) add(d time.Duration) { c.ns.Add(int64(d)) }

// quickDir is a directory in memory, where there is such a thing: what a sync does is
// up to the model.
func quickDir(t *testing.T) string {
	if dir, err := os.MkdirTemp("/dev/shm", "ledger"); err == nil {
		return dir
	}
	return t.TempDir()
}

// kept are the files that the ledger writes without the file system it was given:
// by their nature they are synced at once.
type kept struct {
	dir   string
	files map[string][]byte
}

func others(t *testing.T, dir string) kept {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	k := kept{dir, map[string][]byte{}}
	for _, e := range entries {
		if e.IsDir() {
			continue
		}
		data, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		k.files[e.Name()] = data
	}
	return k
}

func (k kept) restore(t *testing.T) {
	t.Helper()
	for name, data := range k.files {
		if strings.HasSuffix(name, "lock") {
			continue
		}
		if err := os.WriteFile(filepath.Join(k.dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}
