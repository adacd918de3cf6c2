package store

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/gofrs/flock"
	"github.com/partnerguard/partnerguard/telemetry/ledger"
	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"
)

// sqliteDB is the database in the data directory, store.db. There is one writer per
// directory, by a file lock; any number of Readers stand beside it.
type sqliteDB struct {
	*writer // nil while closed
	path    string
	now     func() time.Time
	event   func(Event)
	lock    *flock.Flock
	file    os.FileInfo // of the database that the writer has open

	retention time.Duration            // of what kept does not name
	kept      map[string]time.Duration // by tenant
}

// newSQLite takes the lock of cfg.Dir and opens its database.
func newSQLite(cfg Config) (*sqliteDB, error) {
	lock, err := lockDir(cfg.Dir)
	if err != nil {
		return nil, err
	}
	return &sqliteDB{path: dbPath(cfg.Dir), now: cfg.Now, event: cfg.Event, lock: lock, retention: cfg.Retention, kept: cfg.TenantRetention}, nil
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
func (s *sqliteDB) open(context.Context) (*joiner, error) {
	w, err := openWriter(s.path)
	switch {
	case errors.Is(err, errOutdated):
		s.event(Event{Outdated, s.path, err})
		if err := removeDB(s.path); err != nil {
			return nil, err
		}
		w, err = openWriter(s.path)
	case damaged(err):
		aside, moveErr := s.setAside()
		if moveErr != nil {
			return nil, moveErr
		}
		s.event(Event{Damaged, aside, err})
		w, err = openWriter(s.path)
	}
	if err == nil {
		s.file, err = os.Stat(s.path)
	}
	if err != nil {
		if w != nil {
			w.close()
		}
		return nil, err
	}
	s.writer = w
	return &w.joiner, nil
}

var errMoved = errors.New("the database was removed or replaced while it was in use")

// moved reports whether err says so, in SQLite's words too: it looks by itself before it
// writes.
func moved(err error) bool {
	var e *sqlite.Error
	return errors.Is(err, errMoved) || errors.As(err, &e) && e.Code() == sqlite3.SQLITE_READONLY_DBMOVED
}

// begin begins a transaction. It returns errMoved when the database that is open is
// no longer the file of its name. It must not open that file: to close it again would
// drop the locks that this process holds on it (POSIX), and so SQLite's.
func (s *sqliteDB) begin(ctx context.Context) error {
	if err := s.inPlace(); err != nil {
		return err
	}
	return s.writer.begin(ctx)
}

func (s *sqliteDB) inPlace() error {
	if s.file == nil {
		return nil // a Rebuild, which nobody knows of
	}
	now, err := os.Stat(s.path)
	if errors.Is(err, os.ErrNotExist) || err == nil && !os.SameFile(now, s.file) {
		return errMoved
	}
	return nil
}

func (s *sqliteDB) idle(context.Context, bool) error { return s.inPlace() }

// recover gets rid of a database that is the cause of err.
func (s *sqliteDB) recover(err error) error {
	switch {
	case errors.Is(err, ledger.ErrPosition):
		s.event(Event{Outdated, s.path, err})
		return removeDB(s.path)
	case damaged(err), moved(err):
		aside, moveErr := s.setAside()
		if moveErr != nil {
			return moveErr
		}
		s.event(Event{Damaged, aside, err})
		return nil
	}
	return err
}

// setAside renames the database, its journal included, and returns its new name.
func (s *sqliteDB) setAside() (string, error) {
	aside := s.path + ".damaged-" + s.now().UTC().Format("20060102T150405.000Z")
	for _, suffix := range []string{"-journal", ""} {
		if err := os.Rename(s.path+suffix, aside+suffix); err != nil && !errors.Is(err, os.ErrNotExist) {
			return "", fmt.Errorf("set damaged store aside: %w", err)
		}
	}
	return aside, nil
}

func (s *sqliteDB) name() string { return s.path }

func (s *sqliteDB) close() error {
	if s.writer == nil {
		return nil
	}
	err := s.writer.close()
	s.writer = nil
	return err
}

func (s *sqliteDB) release() error { return errors.Join(s.close(), s.lock.Close()) }

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
	s := &Store{
		cfg: Config{Dir: dir, Now: time.Now, Event: func(Event) {}},
		db:  &sqliteDB{writer: w, path: path}, in: &w.joiner, source: source,
	}
	err = s.readAll(ctx, progress)
	err = errors.Join(err, source.Close(), w.close())
	if err != nil {
		removeDB(path)
		return fmt.Errorf("rebuild store: %w", err)
	}
	// An old journal must not meet the new database.
	if err := removeJournal(path); err != nil {
		return err
	}
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
		n, _, eof, err := s.batch(ctx, atOnce)
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

// removeDB removes a database, its journal first.
func removeDB(path string) error {
	if err := removeJournal(path); err != nil {
		return err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove store: %w", err)
	}
	return nil
}

func removeJournal(path string) error {
	if err := os.Remove(path + "-journal"); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove the store's journal: %w", err)
	}
	return nil
}

// Instances of a data directory are one.
func (r *sqliteReader) Instances(ctx context.Context) ([]Instance, error) {
	var i Instance
	var seq, newest int64
	if err := r.db.QueryRowContext(ctx, "SELECT seq, newest FROM position").Scan(&seq, &newest); err != nil {
		return nil, r.fail(err)
	}
	i.Seq = uint64(seq)
	if newest != 0 {
		i.Newest = time.UnixMicro(newest).UTC()
	}
	err := r.Calls(ctx, Filter{Limit: 1, EndedOnly: true}, func(c Call) error {
		i.Name = c.Instance
		return nil
	})
	if err == nil {
		i.Lag, err = r.Lag(ctx)
	}
	return []Instance{i}, err
}
