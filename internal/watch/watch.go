// Package watch tells when the content of files changes.
//
// The system's events (inotify and its like) say when to look, SHA-256 of the
// content says whether anything is different: a file that is touched, or written
// again as it was, is no change. Events are taken from directories, since editors
// and Kubernetes replace files and links instead of writing them: from the
// directory of every symbolic link on the way to a file, and of the file itself.
// A poll finds what no event tells of: changes on network file systems, and a
// directory above these that was replaced.
package watch

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/fsnotify/fsnotify"
)

// Watcher reports, once a change, that the content of some of its files is
// different. Changes that come close together are one. It is safe for concurrent
// use; make it with New and end it with Close.
//
// To miss no change, have a file watched before it is read: New or Set first, then
// read. What changes afterwards is reported.
type Watcher struct {
	quiet   time.Duration
	poll    time.Duration
	onError func(error)

	changed  chan struct{}
	requests chan request
	closing  chan struct{}
	closed   chan struct{}
	close    sync.Once

	names    atomic.Pointer[map[string]bool] // events of these paths matter, in lower case
	events   chan struct{}                   // there was one; at most one pending
	failures chan error

	// All below belongs to run.

	notify  *fsnotify.Watcher // nil: polling alone
	failed  bool              // onError was called
	files   []string          // absolute
	known   map[string]content
	seen    map[string]content   // what a look that was not sure found; nil: nothing
	hollow  map[string]time.Time // since when a known file is empty or gone
	timer   *time.Timer          // to the next look
	waiting time.Time            // since when events put that look off; zero: no event
}

// Config is what New needs.
type Config struct {
	// Files are the files to watch. They need not exist; what is no regular file
	// counts as missing. A relative path starts at the working directory.
	Files []string

	// Quiet is how long no event may come before the files are looked at, so that a
	// change of several steps is one. Zero means 250 ms. Events that never cease
	// delay a look by 20 times as much at most.
	Quiet time.Duration

	// Poll is how often the files are looked at without an event. Zero means 30 s.
	Poll time.Duration

	// Error, if not nil, is called at most once, with the reason why changes, or
	// some of them, are found by polling alone. It must not call the Watcher.
	Error func(error)
}

// A file that was emptied or is gone counts as changed only after it stayed so for
// this long: an editor may be between truncating and writing, a script between
// removing and creating. Nothing is reported meanwhile, since whoever reads the
// files then finds half of a change.
const patience = 2 * time.Second

// New watches cfg.Files. The error is about Config; where events cannot be had,
// Config.Error is called and polling finds the changes.
func New(cfg Config) (*Watcher, error) { return newWatcher(cfg, fsnotify.NewWatcher) }

func newWatcher(cfg Config, notifier func() (*fsnotify.Watcher, error)) (*Watcher, error) {
	if cfg.Quiet < 0 || cfg.Poll < 0 {
		return nil, errors.New("watch: Config.Quiet and Config.Poll must not be negative")
	}
	w := &Watcher{
		quiet: cfg.Quiet, poll: cfg.Poll, onError: cfg.Error,
		changed: make(chan struct{}, 1), requests: make(chan request),
		closing: make(chan struct{}), closed: make(chan struct{}),
		events: make(chan struct{}, 1), failures: make(chan error, 1),
		hollow: map[string]time.Time{}, timer: time.NewTimer(0),
	}
	w.timer.Stop()
	if w.quiet == 0 {
		w.quiet = 250 * time.Millisecond
	}
	if w.poll == 0 {
		w.poll = 30 * time.Second
	}
	var err error
	if w.notify, err = notifier(); err != nil {
		w.notify = nil
		w.fail(fmt.Errorf("watch files: %w", err))
	}
	w.set(cfg.Files)
	go w.run()
	return w, nil
}

// Changed receives a value for a change. One is kept until it is received; changes
// meanwhile add none. The channel is never closed.
func (w *Watcher) Changed() <-chan struct{} { return w.changed }

// Set watches files in place of those before, from its return on. For a file that
// was watched already the change that is not reported yet will be; a new one is
// known as it is now: call Set before reading new files.
func (w *Watcher) Set(files []string) { w.do(request{files: files, set: true}) }

// Sync takes the files as they are now for known, and drops a report that was not
// received. Call it before reading them for a reason of your own (a signal), so
// that the same change is not reported afterwards.
func (w *Watcher) Sync() { w.do(request{}) }

// Close ends watching and waits until nothing of it is left. It may be called more
// than once.
func (w *Watcher) Close() error {
	w.close.Do(func() { close(w.closing) })
	<-w.closed
	return nil
}

// request is a Set or a Sync.
type request struct {
	set   bool
	files []string
	done  chan struct{}
}

func (w *Watcher) do(r request) {
	r.done = make(chan struct{})
	select {
	case w.requests <- r:
		<-r.done
	case <-w.closed:
	}
}

func (w *Watcher) run() {
	defer close(w.closed)
	if w.notify != nil {
		var listening sync.WaitGroup
		listening.Go(w.listen)
		defer listening.Wait()
		defer w.notify.Close()
	}
	poll := time.NewTicker(w.poll)
	defer poll.Stop()
	defer w.timer.Stop()
	for {
		select {
		case <-w.closing:
			return
		case r := <-w.requests:
			if r.set {
				w.set(r.files)
			} else {
				w.sync()
			}
			close(r.done)
		case <-w.events:
			w.await()
		case err := <-w.failures:
			w.fail(err)
		case <-w.timer.C:
			w.look(true)
		case <-poll.C:
			w.look(false)
		}
	}
}

// listen takes the events until fsnotify is closed. It does nothing else: fsnotify
// can hold its lock while it hands over an error, so that whoever calls it must not
// be the one who takes the error.
func (w *Watcher) listen() {
	events, failures := w.notify.Events, w.notify.Errors
	for events != nil || failures != nil {
		select {
		case e, ok := <-events:
			if !ok {
				events = nil
				continue
			}
			if !(*w.names.Load())[strings.ToLower(e.Name)] {
				continue
			}
		case err, ok := <-failures:
			if !ok {
				failures = nil
				continue
			}
			// Events were lost in an overflow, but more will come. Any error is a
			// reason to look.
			if !errors.Is(err, fsnotify.ErrEventOverflow) {
				select {
				case w.failures <- fmt.Errorf("watch files: %w", err):
				default:
				}
			}
		}
		select {
		case w.events <- struct{}{}:
		default:
		}
	}
}

// await has the files looked at when events cease.
func (w *Watcher) await() {
	w.seen = nil // events come, so quiet is what they say
	now := time.Now()
	if w.waiting.IsZero() {
		w.waiting = now
	}
	w.timer.Reset(min(w.quiet, w.waiting.Add(20*w.quiet).Sub(now)))
}

// look reports a change if there is one. It is sure of it after a quiet time, else
// only when a second look finds the same: the file may just be being written.
func (w *Watcher) look(quiet bool) {
	w.follow()
	now := w.read()
	if quiet {
		w.waiting = time.Time{}
	}
	if maps.Equal(now, w.known) {
		w.seen = nil
		clear(w.hollow)
		return
	}
	again := w.seen != nil && maps.Equal(now, w.seen)
	if !again && (!quiet || w.seen != nil) {
		w.seen = now
		w.timer.Reset(w.quiet)
		return
	}
	if !quiet {
		return // the timer runs
	}
	if wait := w.empty(now); wait > 0 {
		w.timer.Reset(wait)
		return
	}
	w.known, w.seen = now, nil
	clear(w.hollow)
	select {
	case w.changed <- struct{}{}:
	default:
	}
}

// empty is how long to wait for files that were emptied or are gone.
func (w *Watcher) empty(now map[string]content) (wait time.Duration) {
	for file, c := range now {
		if c.state == filled || c == w.known[file] {
			delete(w.hollow, file)
			continue
		}
		since, ok := w.hollow[file]
		if !ok {
			since = time.Now()
			w.hollow[file] = since
		}
		wait = max(wait, patience-time.Since(since))
	}
	return wait
}

func (w *Watcher) set(files []string) {
	w.files = w.files[:0]
	for _, file := range files {
		if file == "" {
			continue
		}
		if abs, err := filepath.Abs(file); err == nil {
			file = abs
		}
		w.files = append(w.files, file)
	}
	slices.Sort(w.files)
	w.files = slices.Compact(w.files)
	w.follow()
	now := w.read()
	for file, c := range w.known {
		if _, still := now[file]; still {
			now[file] = c
		}
	}
	w.known, w.seen = now, nil
}

func (w *Watcher) sync() {
	w.follow()
	w.known, w.seen = w.read(), nil
	clear(w.hollow)
	w.timer.Stop()
	w.waiting = time.Time{}
	select {
	case <-w.changed:
	default:
	}
}

// follow takes events from the directories on the way to the files, as the links
// lead now, and from no others.
func (w *Watcher) follow() {
	if w.notify == nil {
		return
	}
	way := newWay(w.files)
	// A link that changes between being read and being watched gives no event: go
	// on until the way is the same after watching it. The poll finds the rest.
	for range 4 {
		w.names.Store(&way.names)
		for dir := range way.dirs {
			// Again for those that are watched already: another directory may have
			// the name now.
			if err := w.notify.Add(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
				w.fail(fmt.Errorf("watch directory %s: %w", dir, err))
			}
		}
		next := newWay(w.files)
		if maps.Equal(next.names, way.names) {
			break
		}
		way = next
	}
	for _, dir := range w.notify.WatchList() {
		if !way.dirs[dir] {
			w.notify.Remove(dir) // fails if the directory is gone, which is as well
		}
	}
}

func (w *Watcher) fail(err error) {
	if !w.failed && w.onError != nil {
		w.onError(err)
	}
	w.failed = true
}

func (w *Watcher) read() map[string]content {
	all := make(map[string]content, len(w.files))
	for _, file := range w.files {
		all[file] = w.readFile(file)
	}
	return all
}

// content is what a file holds, as far as it matters.
type content struct {
	state state
	sum   [sha256.Size]byte // of a filled one
}

type state uint8

const (
	missing state = iota // or unreadable, or no regular file
	emptied
	filled
)

// readFile reads a file in pieces, of any size, until Close.
func (w *Watcher) readFile(path string) content {
	// Opening a pipe or a device can block or have effects, so look first; and
	// another file may be there by then, so look again and do not block.
	if info, err := os.Stat(path); err != nil || !info.Mode().IsRegular() {
		return content{}
	}
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return content{}
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return content{}
	}
	hash := sha256.New()
	n, err := io.Copy(hash, untilClosed{f, w.closing})
	switch {
	case err != nil:
		return content{}
	case n == 0:
		return content{state: emptied}
	}
	return content{state: filled, sum: [sha256.Size]byte(hash.Sum(nil))}
}

// untilClosed is a file that fails when the Watcher is closed, so that Close does
// not wait for gigabytes.
type untilClosed struct {
	file    *os.File
	closing <-chan struct{}
}

func (u untilClosed) Read(p []byte) (int, error) {
	select {
	case <-u.closing:
		return 0, os.ErrClosed
	default:
		return u.file.Read(p)
	}
}

// way is what is passed on the way to files.
type way struct {
	dirs  map[string]bool // real paths of the directories to take events from
	names map[string]bool // these, and the entries in them that matter, in lower case
}

// newWay walks to every file as the system does, by every symbolic link.
func newWay(files []string) way {
	w := way{map[string]bool{}, map[string]bool{}}
	for _, file := range files {
		w.walk(file)
	}
	return w
}

// walk ends at the file, at the first name that does not exist, whose creation then
// matters, or after as many links as Linux follows.
func (w way) walk(file string) {
	dir, rest := split(file)
	for links := 0; len(rest) > 0; {
		name := rest[0]
		rest = rest[1:]
		switch name {
		case "", ".":
			continue
		case "..":
			dir = filepath.Dir(dir)
			continue
		}
		path := filepath.Join(dir, name)
		info, err := os.Lstat(path)
		switch {
		case err == nil && info.Mode()&os.ModeSymlink != 0:
			w.pass(dir, path)
			target, err := os.Readlink(path)
			if links++; err != nil || links > 40 {
				return
			}
			if filepath.IsAbs(target) {
				var more []string
				dir, more = split(target)
				rest = append(more, rest...)
			} else {
				rest = append(strings.Split(filepath.ToSlash(target), "/"), rest...)
			}
		case err != nil || len(rest) == 0:
			w.pass(dir, path)
			return
		default:
			dir = path
		}
	}
}

func (w way) pass(dir, path string) {
	w.dirs[dir] = true
	// Where case does not matter, events may have another one than the path.
	w.names[strings.ToLower(dir)] = true
	w.names[strings.ToLower(path)] = true
}

// split cuts an absolute path into its root and the names below.
func split(path string) (root string, names []string) {
	volume := filepath.VolumeName(path)
	return volume + string(filepath.Separator), strings.Split(filepath.ToSlash(path[len(volume):]), "/")
}
