// Package store is a view of the ledger to search and sum: an SQLite database,
// store.db in the data directory, that follows the ledger at its own pace. Each
// call becomes one row, decision and outcome joined, and is counted into sums by
// the hour as it is read, so that a report never reads the calls.
//
// Nothing is lost with the database: it can be rebuilt from the ledger at any time.
package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gofrs/flock"
	"github.com/partnerguard/partnerguard/telemetry/ledger"
)

// Store writes the database. There is one per data directory, by a file lock; any
// number of Readers stand beside it. Its methods are safe for concurrent use.
type Store struct {
	cfg    Config
	lock   *flock.Flock
	wake   chan struct{}
	status atomic.Pointer[Status] // replaced whole

	mu     sync.Mutex  // guards what follows: one batch at a time
	w      *writer     // nil when the database could not be opened again
	file   os.FileInfo // of the database that w has open
	source Source      // nil: to be opened at w.position
	pruned time.Time   // when retention was last applied
	closed bool
}

// Config is what Open needs. Dir is required.
type Config struct {
	// Dir is the data directory: the database is store.db there, and the ledger
	// that is followed is that of the same directory.
	Dir string
	// Retention is how long calls and sums are kept, in whole hours by the time of
	// the call. Zero is 30 days, negative keeps all; it should equal the ledger's.
	Retention time.Duration
	// Now is the clock for Retention and Lag. Nil means time.Now.
	Now func() time.Time
	// Event is told what an operator must know. It must not block, and must not
	// call the Store. Nil ignores it.
	Event func(Event)
	// Source opens what is followed, at a position. Nil means the ledger in Dir.
	Source func(from ledger.Position) (Source, error)
}

// Source delivers the ledger's records in order, as *ledger.Reader does.
type Source interface {
	Next() (ledger.Entry, error) // io.EOF when caught up; may be called again later
	Close() error
}

// EventKind says what happened to a Store.
type EventKind string

const (
	Damaged   EventKind = "store_damaged"   // the database was set aside as Path; it is rebuilt
	Outdated  EventKind = "store_outdated"  // the database was of another ledger, or of an older schema; it is rebuilt
	Failing   EventKind = "store_failing"   // reading the ledger or writing the database fails; it is tried again
	Recovered EventKind = "store_recovered" // and works again
	BadRecord EventKind = "store_bad_record"
)

// Event is something an operator must know.
type Event struct {
	Kind EventKind
	Path string // the file concerned, if one
	Err  error  // the cause, if any; it holds no secrets
}

// Status is how far a Store has come.
type Status struct {
	Position   ledger.Position // behind the last record that is in the database
	Seq        uint64          // its number
	Time       time.Time       // when the newest call that is in the database began; zero when there is none
	CaughtUp   bool            // the end of the ledger was reached
	Open       int             // calls without outcome so far
	BadRecords int64           // since Open: records that could not be read, and damaged groups of them
	Err        error           // why it does not get on; nil when it does
}

const (
	pollInterval  = 100 * time.Millisecond // of the ledger when nobody notifies
	settleTime    = 200 * time.Millisecond // between looks, so that busy times make large batches
	batchSize     = 4000                   // ledger lines a transaction at most: about 2,000 calls
	pruneInterval = time.Hour
	retryMin      = 100 * time.Millisecond
	retryMax      = 5 * time.Second
)

// Open opens the database for writing, and creates it where there is none. A
// damaged one is set aside as store.db.damaged-<time>, one of an older schema or
// of another ledger removed; both are rebuilt as the Store follows. The error says
// so when the schema is newer than this program's, or another process writes.
func Open(cfg Config) (*Store, error) {
	if cfg.Dir == "" {
		return nil, errors.New("store: Config.Dir is required")
	}
	if cfg.Retention == 0 {
		cfg.Retention = 30 * 24 * time.Hour
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Event == nil {
		cfg.Event = func(Event) {}
	}
	if cfg.Source == nil {
		cfg.Source = func(from ledger.Position) (Source, error) { return ledger.NewReader(cfg.Dir, from) }
	}
	lock, err := lockDir(cfg.Dir)
	if err != nil {
		return nil, err
	}
	s := &Store{cfg: cfg, lock: lock, wake: make(chan struct{}, 1)}
	if err := s.open(); err != nil {
		lock.Close()
		return nil, err
	}
	s.publish(Status{})
	return s, nil
}

// lockDir makes sure that one process at a time writes the store of dir.
func lockDir(dir string) (*flock.Flock, error) {
	lock := flock.New(filepath.Join(dir, "store.lock"), flock.SetPermissions(0o600))
	ok, err := lock.TryLock()
	if err != nil {
		return nil, fmt.Errorf("lock store in %s: %w", dir, err)
	}
	if !ok {
		return nil, &hintError{
			fmt.Errorf("store in %s is being written by another process", dir),
			"stop the other partnerguard first, or choose another directory with --data-dir",
		}
	}
	return lock, nil
}

// open opens the database, after setting aside one that cannot be used.
func (s *Store) open() error {
	path := dbPath(s.cfg.Dir)
	w, err := openWriter(path)
	switch {
	case errors.Is(err, errOutdated):
		s.cfg.Event(Event{Outdated, path, err})
		if err := removeDB(path); err != nil {
			return err
		}
		w, err = openWriter(path)
	case damaged(err):
		aside, moveErr := s.setAside(path)
		if moveErr != nil {
			return moveErr
		}
		s.cfg.Event(Event{Damaged, aside, err})
		w, err = openWriter(path)
	}
	if err == nil {
		s.file, err = os.Stat(path)
	}
	if err != nil {
		if w != nil {
			w.close()
		}
		return err
	}
	s.w = w
	return nil
}

// inPlace returns errMoved when the database that is open is no longer the file of
// its name. It must not open that file: to close it again would drop the locks that
// this process holds on it (POSIX), and so SQLite's.
func (s *Store) inPlace() error {
	if s.file == nil {
		return nil // a Rebuild, which nobody knows of
	}
	now, err := os.Stat(dbPath(s.cfg.Dir))
	if errors.Is(err, os.ErrNotExist) || err == nil && !os.SameFile(now, s.file) {
		return errMoved
	}
	return nil
}

// setAside renames the database, its log included, and returns its new name.
func (s *Store) setAside(path string) (string, error) {
	stamp := s.cfg.Now().UTC().Format("20060102T150405.000Z")
	aside := path + ".damaged-" + stamp
	for _, suffix := range []string{"-wal", "-shm", ""} {
		if err := os.Rename(path+suffix, aside+suffix); err != nil && !errors.Is(err, os.ErrNotExist) {
			return "", fmt.Errorf("set damaged store aside: %w", err)
		}
	}
	return aside, nil
}

// Follow reads the ledger into the database until ctx ends, and returns nil then.
// Failures are told by Event and Status, and tried again: the Store never gives up.
func (s *Store) Follow(ctx context.Context) error {
	retry := retryMin
	for ctx.Err() == nil {
		_, eof, err := s.step(new(pacer).pause)
		if errors.Is(err, errClosed) {
			return err
		}
		switch {
		case err != nil:
			pause(ctx, retry, nil)
			retry = min(2*retry, retryMax)
		case eof:
			retry = retryMin
			pause(ctx, settleTime, nil)
			pause(ctx, pollInterval, s.wake)
		default:
			retry = retryMin
		}
	}
	return nil
}

// pacer divides the work of Follow into slices. With one processor a call must wait
// for the slice to end, and Go looks for news from the network only when nothing
// else is to be done: yielding is not enough, sleeping is.
type pacer struct {
	calls int
	since time.Time // when the slice began
}

const (
	sliceWork = 500 * time.Microsecond
	sliceRest = 1500 * time.Microsecond // so that Follow never takes more than a quarter of a processor
)

func (p *pacer) pause() {
	if p.calls++; p.calls%8 != 0 {
		return
	}
	now := time.Now()
	if p.since.IsZero() {
		p.since = now
	}
	if now.Sub(p.since) >= sliceWork {
		time.Sleep(sliceRest)
		p.since = time.Now()
	}
}

// atOnce is no pace.
func atOnce() {}

// pause waits for d, ctx or wake, whatever comes first.
func pause(ctx context.Context, d time.Duration, wake <-chan struct{}) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-wake:
	case <-t.C:
	}
}

// Notify tells Follow that the ledger has grown. It never blocks. Follow looks by
// itself, too, some three times a second.
func (s *Store) Notify() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// CatchUp reads the ledger to its present end and returns how many records that
// were.
func (s *Store) CatchUp(ctx context.Context) (int, error) {
	total := 0
	for {
		if err := ctx.Err(); err != nil {
			return total, err
		}
		n, eof, err := s.step(atOnce)
		total += n
		if err != nil || eof {
			return total, err
		}
	}
}

var (
	errClosed = errors.New("store is closed")
	errMoved  = errors.New("the database was removed or replaced while it was in use")
)

// step reads one batch of records into the database. eof says that the ledger's
// end was reached. After an error the next step begins where the last good one
// ended. pace is called within.
func (s *Store) step(pace func()) (n int, eof bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return 0, false, errClosed
	}
	before := *s.status.Load()
	n, bad, eof, err := s.batch(pace)
	now := Status{CaughtUp: eof, BadRecords: before.BadRecords + bad}
	if err != nil {
		err = s.recover(err)
	}
	if now.Err = err; err != nil {
		now.CaughtUp = false
		if before.Err == nil {
			s.cfg.Event(Event{Failing, dbPath(s.cfg.Dir), err})
		}
	} else if before.Err != nil {
		s.cfg.Event(Event{Recovered, dbPath(s.cfg.Dir), nil})
	}
	s.publish(now)
	return n, eof, err
}

// publish makes st, completed from the writer, what Status returns.
func (s *Store) publish(st Status) {
	if s.w != nil {
		st.Position, st.Seq, st.Time, st.Open = s.w.position, s.w.seq, s.w.newest, len(s.w.open)
	} else if before := s.status.Load(); before != nil {
		st.Position, st.Seq, st.Time, st.Open = before.Position, before.Seq, before.Time, before.Open
	}
	s.status.Store(&st)
}

func (s *Store) batch(pace func()) (n int, bad int64, eof bool, err error) {
	if s.w == nil {
		if err := s.open(); err != nil {
			return 0, 0, false, err
		}
	}
	if err := s.inPlace(); err != nil {
		return 0, 0, false, err
	}
	s.w.pace = pace
	if s.source == nil {
		if s.source, err = s.cfg.Source(s.w.position); err != nil {
			return 0, 0, false, err
		}
	}
	if now := s.cfg.Now(); s.cfg.Retention > 0 && now.Sub(s.pruned) >= pruneInterval {
		done, err := s.w.prune(now.Add(-s.cfg.Retention))
		if err != nil {
			return 0, 0, false, err
		}
		if done { // otherwise go on after this batch: retention must not hold up the calls
			s.pruned = now
		}
	}
	var b *batch
	for n < batchSize && !eof {
		e, err := s.source.Next()
		var damage *ledger.DamageError
		switch {
		case errors.Is(err, io.EOF):
			eof = true
			continue
		case errors.As(err, &damage):
			bad++
			s.cfg.Event(Event{BadRecord, damage.Segment, err})
			continue
		case err != nil:
			return 0, bad, false, err
		}
		if b == nil {
			if b, err = s.w.begin(); err != nil {
				return 0, bad, false, err
			}
		}
		n++
		pace()
		if err := b.add(e); err != nil {
			bad++
			s.cfg.Event(Event{BadRecord, "", fmt.Errorf("read ledger record %d: %w", e.Seq, err)})
		}
	}
	if b == nil {
		return 0, bad, eof, nil
	}
	if err := b.commit(); err != nil {
		return 0, bad, false, err
	}
	return n, bad, eof, nil
}

// recover puts the Store back to what the database holds after err, and gets rid
// of a database that is the cause. It returns the error that remains.
func (s *Store) recover(err error) error {
	if s.source != nil {
		s.source.Close()
		s.source = nil
	}
	if s.w == nil || errors.Is(err, errBusy) {
		return err
	}
	s.w.close()
	s.w = nil
	path := dbPath(s.cfg.Dir)
	switch {
	case errors.Is(err, ledger.ErrPosition):
		s.cfg.Event(Event{Outdated, path, err})
		if err := removeDB(path); err != nil {
			return err
		}
		err = nil
	case damaged(err), errors.Is(err, errMoved):
		aside, moveErr := s.setAside(path)
		if moveErr != nil {
			return moveErr
		}
		s.cfg.Event(Event{Damaged, aside, err})
		err = nil
	}
	if openErr := s.open(); openErr != nil {
		return openErr
	}
	return err
}

// Lag is how far the database is behind the ledger: zero when its end was reached
// at the last look, else the age of the newest call that is in the database.
func (s *Store) Lag() time.Duration {
	st := s.status.Load()
	if st.CaughtUp || st.Time.IsZero() {
		return 0
	}
	return max(0, s.cfg.Now().Sub(st.Time))
}

// Status returns how far the Store has come.
func (s *Store) Status() Status { return *s.status.Load() }

// Close ends the writing. End Follow first.
func (s *Store) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	var errs []error
	if s.source != nil {
		errs = append(errs, s.source.Close())
	}
	if s.w != nil {
		errs = append(errs, s.w.close())
	}
	return errors.Join(append(errs, s.lock.Close())...)
}

// Rebuild makes the database of dir anew from its ledger and puts it in the place
// of the old one, which readers can use until then. Nobody else may write the store
// meanwhile. progress, if not nil, is told the number of records read so far.
func Rebuild(ctx context.Context, dir string, progress func(records int)) error {
	lock, err := lockDir(dir)
	if err != nil {
		return err
	}
	defer lock.Close()
	source, err := ledger.NewReader(dir, ledger.Position{})
	if err != nil {
		return err
	}
	return rebuild(ctx, dir, source, progress)
}

func rebuild(ctx context.Context, dir string, source Source, progress func(int)) error {
	path := dbPath(dir) + ".new"
	if err := removeDB(path); err != nil {
		source.Close()
		return err
	}
	w, err := openWriter(path)
	if err != nil {
		source.Close()
		return err
	}
	s := &Store{cfg: Config{Dir: dir, Now: time.Now, Event: func(Event) {}}, w: w, source: source}
	err = s.readAll(ctx, progress)
	err = errors.Join(err, source.Close(), w.close())
	if err != nil {
		removeDB(path)
		return fmt.Errorf("rebuild store: %w", err)
	}
	// The old log must not meet the new database.
	if err := removeDB(dbPath(dir)); err != nil {
		return err
	}
	if err := os.Rename(path, dbPath(dir)); err != nil {
		return fmt.Errorf("rebuild store: %w", err)
	}
	return nil
}

func (s *Store) readAll(ctx context.Context, progress func(int)) error {
	total := 0
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, _, eof, err := s.batch(atOnce)
		if err != nil {
			return err
		}
		if total += n; progress != nil {
			progress(total)
		}
		if eof {
			return nil
		}
	}
}

func dbPath(dir string) string { return filepath.Join(dir, "store.db") }

// removeDB removes a database, its log first.
func removeDB(path string) error {
	for _, suffix := range []string{"-wal", "-shm", ""} {
		if err := os.Remove(path + suffix); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("remove store: %w", err)
		}
	}
	return nil
}

// hintError is an error with a way out, for the command line to show.
type hintError struct {
	err  error
	hint string
}

func (e *hintError) Error() string { return e.err.Error() }
func (e *hintError) Unwrap() error { return e.err }

// Hint says what to do next.
func (e *hintError) Hint() string { return e.hint }

var _ Source = (*ledger.Reader)(nil)
