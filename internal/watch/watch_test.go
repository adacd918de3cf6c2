package watch

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/google/go-cmp/cmp"
)

// watched is a Watcher whose reports are all kept, one by one.
type watched struct {
	*Watcher
	t        *testing.T
	sentinel string
	reports  chan struct{}
	stop     func()
}

// watchFiles watches files and one more, the sentinel. Events alone find changes
// unless cfg says otherwise.
func watchFiles(t *testing.T, cfg Config) *watched {
	t.Helper()
	return watchWith(t, cfg, fsnotify.NewWatcher)
}

func watchWith(t *testing.T, cfg Config, notifier func() (*fsnotify.Watcher, error)) *watched {
	t.Helper()
	sentinel := filepath.Join(t.TempDir(), "sentinel")
	write(t, sentinel, "before")
	cfg.Files = append(slices.Clone(cfg.Files), sentinel)
	if cfg.Quiet == 0 {
		cfg.Quiet = 100 * time.Millisecond
	}
	if cfg.Poll == 0 {
		cfg.Poll = time.Hour
	}
	if cfg.Error == nil {
		cfg.Error = func(err error) { t.Errorf("events fail: %v", err) }
	}
	w, err := newWatcher(cfg, notifier)
	if err != nil {
		t.Fatal(err)
	}
	reports, end, ended := make(chan struct{}, 1024), make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for {
			select {
			case <-w.Changed():
				reports <- struct{}{}
			case <-end:
				select {
				case <-w.Changed():
					reports <- struct{}{}
				default:
				}
				return
			}
		}
	}()
	r := &watched{Watcher: w, t: t, sentinel: sentinel, reports: reports}
	r.stop = func() { w.Close(); close(end); <-ended; r.stop = func() {} }
	t.Cleanup(func() { r.stop() })
	return r
}

// report waits for a report.
func (w *watched) report(what string) {
	w.t.Helper()
	select {
	case <-w.reports:
	case <-time.After(20 * time.Second):
		w.t.Fatalf("%s: no report", what)
	}
}

// noMore fails if there was any report that was not waited for: a change of the
// sentinel must be the only one that comes, up to the end of the Watcher.
func (w *watched) noMore(what string) {
	w.t.Helper()
	if len(w.reports) > 0 {
		w.t.Fatalf("%s: a report too many", what)
	}
	write(w.t, w.sentinel, "after "+what)
	w.report("the sentinel")
	w.stop()
	if n := len(w.reports); n > 0 {
		w.t.Fatalf("%s: %d reports too many", what, n)
	}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	must(t, os.WriteFile(path, []byte(text), 0o600))
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// kubernetes lays dir out as a volume of a ConfigMap or a Secret, generation n.
func kubernetes(t *testing.T, dir, text string, n int) {
	t.Helper()
	data := filepath.Join(dir, fmt.Sprintf("..2026_%d", n))
	must(t, os.Mkdir(data, 0o700))
	write(t, filepath.Join(data, "token"), text)
	tmp := filepath.Join(dir, "..data_tmp")
	must(t, os.Symlink(filepath.Base(data), tmp))
	must(t, os.Rename(tmp, filepath.Join(dir, "..data")))
	if n == 0 {
		must(t, os.Symlink(filepath.Join("..data", "token"), filepath.Join(dir, "token")))
		return
	}
	must(t, os.RemoveAll(filepath.Join(dir, fmt.Sprintf("..2026_%d", n-1))))
}

func TestEachWayToChangeAFileIsOneReport(t *testing.T) {
	plain := func(t *testing.T, dir string) { write(t, filepath.Join(dir, "token"), "old") }
	over := func(t *testing.T, dir, from, to string) {
		must(t, os.Rename(filepath.Join(dir, from), filepath.Join(dir, to)))
	}
	tests := []struct {
		name   string
		before func(t *testing.T, dir string) // makes dir/token
		change func(t *testing.T, dir string)
		want   int
	}{
		{"truncated and written", plain, func(t *testing.T, dir string) { write(t, filepath.Join(dir, "token"), "new") }, 1},
		{"truncated, and written a while later", plain, func(t *testing.T, dir string) {
			f, err := os.OpenFile(filepath.Join(dir, "token"), os.O_WRONLY|os.O_TRUNC, 0)
			must(t, err)
			defer f.Close()
			<-time.After(500 * time.Millisecond) // five times the quiet time
			_, err = f.WriteString("new")
			must(t, err)
		}, 1},
		{"written in three pieces", plain, func(t *testing.T, dir string) {
			f, err := os.OpenFile(filepath.Join(dir, "token"), os.O_WRONLY|os.O_TRUNC, 0)
			must(t, err)
			defer f.Close()
			for range 3 {
				_, err = f.WriteString("new")
				must(t, err)
			}
		}, 1},
		{"another renamed over it", plain, func(t *testing.T, dir string) {
			write(t, filepath.Join(dir, "token~"), "new")
			over(t, dir, "token~", "token")
		}, 1},
		{"renamed away and another put in its place, as vim does", plain, func(t *testing.T, dir string) {
			over(t, dir, "token", "token~")
			write(t, filepath.Join(dir, "token"), "new")
			must(t, os.Remove(filepath.Join(dir, "token~")))
		}, 1},
		{"deleted and created", plain, func(t *testing.T, dir string) {
			must(t, os.Remove(filepath.Join(dir, "token")))
			write(t, filepath.Join(dir, "token"), "new")
		}, 1},
		{"deleted, and created a while later", plain, func(t *testing.T, dir string) {
			must(t, os.Remove(filepath.Join(dir, "token")))
			<-time.After(500 * time.Millisecond)
			write(t, filepath.Join(dir, "token"), "new")
		}, 1},
		{"deleted, and created as it was", plain, func(t *testing.T, dir string) {
			must(t, os.Remove(filepath.Join(dir, "token")))
			<-time.After(500 * time.Millisecond)
			write(t, filepath.Join(dir, "token"), "old")
		}, 0},
		{"a link swapped", func(t *testing.T, dir string) {
			write(t, filepath.Join(dir, "1"), "old")
			write(t, filepath.Join(dir, "2"), "new")
			must(t, os.Symlink("1", filepath.Join(dir, "token")))
		}, func(t *testing.T, dir string) {
			must(t, os.Symlink("2", filepath.Join(dir, "tmp")))
			over(t, dir, "tmp", "token")
		}, 1},
		{"a link swapped to a file with the same content", func(t *testing.T, dir string) {
			write(t, filepath.Join(dir, "1"), "old")
			write(t, filepath.Join(dir, "2"), "old")
			must(t, os.Symlink("1", filepath.Join(dir, "token")))
		}, func(t *testing.T, dir string) {
			must(t, os.Symlink("2", filepath.Join(dir, "tmp")))
			over(t, dir, "tmp", "token")
		}, 0},
		{"a Kubernetes volume", func(t *testing.T, dir string) { kubernetes(t, dir, "old", 0) },
			func(t *testing.T, dir string) { kubernetes(t, dir, "new", 1) }, 1},
		{"a Kubernetes volume with the same content", func(t *testing.T, dir string) { kubernetes(t, dir, "old", 0) },
			func(t *testing.T, dir string) { kubernetes(t, dir, "old", 1) }, 0},
		{"the file at the end of links over three directories, by absolute and relative ones", func(t *testing.T, dir string) {
			must(t, os.MkdirAll(filepath.Join(dir, "a/b"), 0o700))
			must(t, os.MkdirAll(filepath.Join(dir, "c/d"), 0o700))
			write(t, filepath.Join(dir, "c/d/real"), "old")
			must(t, os.Symlink(filepath.Join(dir, "c"), filepath.Join(dir, "a/b/c")))
			must(t, os.Symlink("../a/./b//c/d/real", filepath.Join(dir, "c/second")))
			must(t, os.Symlink("a/../c/second", filepath.Join(dir, "token")))
		}, func(t *testing.T, dir string) { write(t, filepath.Join(dir, "c/d/real"), "new") }, 1},
		{"a link to a directory on the way swapped", func(t *testing.T, dir string) {
			must(t, os.MkdirAll(filepath.Join(dir, "releases/1"), 0o700))
			must(t, os.MkdirAll(filepath.Join(dir, "releases/2"), 0o700))
			write(t, filepath.Join(dir, "releases/1/token"), "old")
			write(t, filepath.Join(dir, "releases/2/token"), "new")
			must(t, os.Symlink("releases/1", filepath.Join(dir, "current")))
			must(t, os.Symlink("current/token", filepath.Join(dir, "token")))
		}, func(t *testing.T, dir string) {
			must(t, os.Symlink("releases/2", filepath.Join(dir, "next")))
			over(t, dir, "next", "current")
		}, 1},
		{"its directory replaced", func(t *testing.T, dir string) {
			must(t, os.MkdirAll(filepath.Join(dir, "old"), 0o700))
			must(t, os.MkdirAll(filepath.Join(dir, "new"), 0o700))
			write(t, filepath.Join(dir, "old/token"), "old")
			write(t, filepath.Join(dir, "new/token"), "new")
			must(t, os.Symlink("old/token", filepath.Join(dir, "token")))
		}, func(t *testing.T, dir string) {
			must(t, os.RemoveAll(filepath.Join(dir, "old")))
			over(t, dir, "new", "old")
		}, 1},
		{"created", func(t *testing.T, dir string) {}, plain, 1},
		{"created with its directories", func(t *testing.T, dir string) {
			must(t, os.Symlink("a/b/token", filepath.Join(dir, "token")))
		}, func(t *testing.T, dir string) {
			must(t, os.MkdirAll(filepath.Join(dir, "a/b"), 0o700))
			write(t, filepath.Join(dir, "a/b/token"), "new")
		}, 1},
		{"touched", plain, func(t *testing.T, dir string) {
			must(t, os.Chtimes(filepath.Join(dir, "token"), time.Time{}, time.Unix(1e9, 0)))
		}, 0},
		{"written again as it was", plain, plain, 0},
		{"another file in its directory written", plain, func(t *testing.T, dir string) { write(t, filepath.Join(dir, "other"), "new") }, 0},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			test.before(t, dir)
			w := watchFiles(t, Config{Files: []string{filepath.Join(dir, "token")}})
			test.change(t, dir)
			for range test.want {
				w.report(test.name)
			}
			w.noMore(test.name)
		})
	}
}

func TestTwoHundredChangesAreTwoHundredReports(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := filepath.Join(dir, "token")
	kubernetes(t, dir, "0", 0)
	w := watchFiles(t, Config{Files: []string{file}, Quiet: 5 * time.Millisecond})
	for i := 1; i <= 200; i++ {
		what, text := fmt.Sprintf("change %d", i), fmt.Sprint(i)
		if len(w.reports) > 0 {
			t.Fatalf("%s: a report too many before it", what)
		}
		// The volume, the file in it, and the link in the volume, replaced in turn.
		switch data := filepath.Join(dir, "..data", "token"); i % 4 {
		case 0:
			write(t, data, text)
		case 1:
			kubernetes(t, dir, text, (i+3)/4)
		case 2:
			must(t, os.Remove(data))
			write(t, data, text)
		case 3:
			write(t, data+"~", text)
			must(t, os.Rename(data+"~", data))
		}
		w.report(what)
	}
	w.noMore("200 changes")
}

func TestAFileThatStaysEmptyOrAwayCountsAfterAWhile(t *testing.T) {
	for name, change := range map[string]func(string) error{
		"emptied":                    func(file string) error { return os.Truncate(file, 0) },
		"removed":                    os.Remove,
		"replaced by a directory":    func(file string) error { return errors.Join(os.Remove(file), os.Mkdir(file, 0o700)) },
		"its directory renamed away": func(file string) error { return os.Rename(filepath.Dir(file), filepath.Dir(file)+"~") },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := filepath.Join(t.TempDir(), "dir")
			must(t, os.Mkdir(dir, 0o700))
			file := filepath.Join(dir, "token")
			write(t, file, "old")
			w := watchFiles(t, Config{Files: []string{file}})
			start := time.Now()
			must(t, change(file))
			w.report(name)
			if took := time.Since(start); took < patience {
				t.Errorf("reported after %v, want it no earlier than after %v", took, patience)
			}
			must(t, os.RemoveAll(file))
			must(t, os.MkdirAll(dir, 0o700))
			write(t, file, "old")
			w.report("the file is back")
			w.noMore(name)
		})
	}
}

// While one file is half changed, the others' changes wait for it: they are one.
func TestAChangeIsNotReportedWhileAnotherFileIsEmpty(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	certificate, key := filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")
	write(t, certificate, "old")
	write(t, key, "old")
	w := watchFiles(t, Config{Files: []string{certificate, key}})
	must(t, os.Truncate(key, 0))
	write(t, certificate, "new")
	select {
	case <-w.reports:
		t.Fatal("reported while the key is empty")
	case <-time.After(500 * time.Millisecond):
	}
	write(t, key, "new")
	w.report("both")
	w.noMore("both")
}

func TestEventsThatNeverCeaseDelayAReportOnly(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "token")
	write(t, file, "old")
	w := watchFiles(t, Config{Files: []string{file}, Quiet: 50 * time.Millisecond})
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_APPEND, 0)
	must(t, err)
	defer f.Close()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(20 * time.Second)
	for {
		select {
		case <-w.reports:
			return
		case <-tick.C:
			_, err := f.WriteString("more")
			must(t, err)
		case <-deadline:
			t.Fatal("no report while the file is being written")
		}
	}
}

// A directory that is moved and removed at once makes fsnotify report an error
// while it holds the lock that adding a directory needs.
func TestDirectoriesThatVanishDoNotBlock(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	link := filepath.Join(dir, "token")
	w := watchFiles(t, Config{Files: []string{link}, Quiet: time.Millisecond, Error: func(error) {}})
	for i := range 200 {
		release := filepath.Join(dir, fmt.Sprint(i))
		must(t, os.Mkdir(release, 0o700))
		write(t, filepath.Join(release, "token"), fmt.Sprint(i))
		must(t, os.Symlink(filepath.Join(release, "token"), link+"~"))
		must(t, os.Rename(link+"~", link))
		w.report("a release")
		must(t, os.Rename(release, release+"~"))
		must(t, os.RemoveAll(release+"~"))
		w.Sync()
	}
	// What vanished last may or may not count by now.
	write(t, w.sentinel, "after")
	w.report("the sentinel")
}

func TestWithoutEventsAPollFindsChanges(t *testing.T) {
	t.Parallel()
	exhausted := errors.New("too many open files")
	dir := t.TempDir()
	file := filepath.Join(dir, "token")
	write(t, file, "old")
	errs := make(chan error, 10)
	w := watchWith(t, Config{Files: []string{file}, Poll: 10 * time.Millisecond, Error: func(err error) { errs <- err }},
		func() (*fsnotify.Watcher, error) { return nil, exhausted })
	for i := range 5 {
		write(t, file+"~", fmt.Sprint(i))
		must(t, os.Rename(file+"~", file))
		w.report("a change")
	}
	must(t, os.Remove(file))
	w.report("removed")
	w.noMore("polling")
	if err := <-errs; !errors.Is(err, exhausted) || len(errs) > 0 {
		t.Errorf("Config.Error got %v and %d more, want that it fails, once", err, len(errs))
	}
}

// Where the events of a directory cannot be had, the poll finds what changes in it.
func TestADirectoryWithoutEventsIsPolled(t *testing.T) {
	t.Parallel()
	notify, err := fsnotify.NewWatcher()
	must(t, err)
	notify.Close() // refuses every directory
	file := filepath.Join(t.TempDir(), "token")
	errs := make(chan error, 10)
	w := watchWith(t, Config{Files: []string{file}, Poll: 10 * time.Millisecond, Error: func(err error) { errs <- err }},
		func() (*fsnotify.Watcher, error) { return notify, nil })
	write(t, file, "new")
	w.report("created")
	w.noMore("polling")
	if err := <-errs; len(errs) > 0 || !strings.Contains(err.Error(), "watch directory ") {
		t.Errorf("Config.Error got %v and %d more, want one about a directory", err, len(errs))
	}
}

func TestSetWatchesOtherFilesAndLosesNoChange(t *testing.T) {
	t.Parallel()
	one, two, three := t.TempDir(), t.TempDir(), t.TempDir()
	file := func(dir string) string { return filepath.Join(dir, "token") }
	for _, dir := range []string{one, two, three} {
		write(t, file(dir), "old")
	}
	w := watchFiles(t, Config{Files: []string{file(one), file(two)}})

	// A change of a file that stays is reported although Set comes in between.
	write(t, file(two), "new")
	w.Set([]string{file(two), file(three), file(three), "", w.sentinel})
	w.report("the file that stays")
	// One of a new file from Set's return on.
	write(t, file(three), "new")
	w.report("the new file")
	// One of a file that is watched no more is not.
	write(t, file(one), "new")
	w.Set([]string{file(three), w.sentinel})
	want := []string{three, filepath.Dir(w.sentinel)}
	got := w.notify.WatchList()
	slices.Sort(got)
	slices.Sort(want)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("watched directories (-want +got):\n%s", diff)
	}
	w.noMore("Set")
	w.Set([]string{file(one)}) // after Close: nothing, and no panic
	w.Sync()
}

func TestSyncTakesWhatIsThereForKnown(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "token")
	write(t, file, "old")
	w, err := New(Config{Files: []string{file}, Quiet: 20 * time.Millisecond, Poll: time.Hour})
	must(t, err)
	defer w.Close()

	// Not reported yet.
	write(t, file, "new")
	w.Sync()
	// Reported, and not received.
	write(t, file, "newer")
	for len(w.changed) == 0 {
		runtime.Gosched()
	}
	w.Sync()
	if len(w.Changed()) > 0 {
		t.Error("the report is still there after Sync")
	}
	// Half of a change.
	must(t, os.Truncate(file, 0))
	w.Sync()
	write(t, file, "newest")
	select {
	case <-w.Changed():
	case <-time.After(20 * time.Second):
		t.Fatal("what changed after Sync is not reported")
	}
}

func TestWhatIsNoRegularFileIsNotRead(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	loop, pipe := filepath.Join(dir, "loop"), filepath.Join(dir, "pipe")
	must(t, os.Symlink("loop", loop))
	files := []string{dir, loop, pipe, "/dev/zero", "/dev/stdin/x"}
	// Opening a pipe that nobody writes to blocks.
	if out, err := exec.Command("mkfifo", pipe).CombinedOutput(); err != nil {
		t.Logf("without a pipe: %v %s", err, out)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		w := watchFiles(t, Config{Files: files})
		w.noMore("files that are none")
	}()
	select {
	case <-done:
	case <-time.After(20 * time.Second):
		t.Fatal("watching them blocks")
	}
}

func TestAFileOfAnySizeIsReadInPieces(t *testing.T) {
	file := filepath.Join(t.TempDir(), "large")
	f, err := os.Create(file)
	must(t, err)
	defer f.Close()
	must(t, f.Truncate(64<<20))
	w := watchFiles(t, Config{})
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	if c := w.readFile(file); c.state != filled {
		t.Errorf("the large file is %v", c.state)
	}
	runtime.ReadMemStats(&after)
	if used := after.TotalAlloc - before.TotalAlloc; used > 1<<20 {
		t.Errorf("reading 64 MiB allocates %d bytes", used)
	}
	w.stop()
	if c := w.readFile(file); c.state == filled {
		t.Error("the file is read to its end although the Watcher is closed")
	}
}

func TestCloseLeavesNothing(t *testing.T) {
	file := filepath.Join(t.TempDir(), "token")
	write(t, file, "old")
	descriptors := func() (n int) {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Skip("no /proc here")
		}
		for _, e := range entries {
			if target, _ := os.Readlink("/proc/self/fd/" + e.Name()); strings.Contains(target, "inotify") || strings.Contains(target, file) {
				n++
			}
		}
		return n
	}
	goroutines := func() int {
		buf := make([]byte, 1<<20)
		stacks := string(buf[:runtime.Stack(buf, true)])
		return strings.Count(stacks, "watch.(*Watcher)") + strings.Count(stacks, "fsnotify.(*")
	}
	// A goroutine that was waited for may still have to return.
	await := func(what string, done func(descriptors, goroutines int) bool) {
		t.Helper()
		deadline := time.After(10 * time.Second)
		for tick := time.Tick(time.Millisecond); ; {
			d, g := descriptors(), goroutines()
			if done(d, g) {
				return
			}
			select {
			case <-tick:
			case <-deadline:
				t.Fatalf("%s: %d descriptors, %d goroutines", what, d, g)
			}
		}
	}
	none := func(d, g int) bool { return d == 0 && g == 0 }
	await("before", none)
	for i := range 20 {
		w, err := New(Config{Files: []string{file}, Quiet: time.Nanosecond, Poll: time.Millisecond})
		must(t, err)
		write(t, file, fmt.Sprint(i)) // a look may be under way
		if i == 0 {
			await("while it watches", func(d, g int) bool { return d > 0 && g > 1 })
		}
		must(t, w.Close())
		if d := descriptors(); d > 0 {
			t.Errorf("after Close: %d descriptors", d)
		}
		must(t, w.Close())
	}
	await("after Close", none)
}

func TestNewRefusesNegativeTimes(t *testing.T) {
	for _, cfg := range []Config{{Quiet: -1}, {Poll: -1}} {
		if w, err := New(cfg); err == nil {
			w.Close()
			t.Errorf("New(%+v) succeeds", cfg)
		}
	}
}

// The directories watched are those whose entries lead to the file, by their real
// names, and no events of other entries in them matter.
func TestTheWayToAFile(t *testing.T) {
	dir, err := filepath.EvalSymlinks(t.TempDir())
	must(t, err)
	kubernetes(t, dir, "x", 0)
	must(t, os.Symlink(dir, filepath.Join(dir, "self")))
	var got []string
	for name := range newWay([]string{filepath.Join(dir, "self", "token"), filepath.Join(dir, "none", "token")}).names {
		got = append(got, strings.TrimPrefix(name, strings.ToLower(dir)))
	}
	slices.Sort(got)
	want := []string{"", "/..2026_0", "/..2026_0/token", "/..data", "/none", "/self", "/token"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("names (-want +got):\n%s", diff)
	}
}
