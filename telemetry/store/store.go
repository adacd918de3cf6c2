// Package store is a view of the ledger to search and sum: a database that follows
// the ledger at its own pace. Each call becomes one row, decision and outcome joined,
// and is counted into sums by the hour as it is read, so that a report never reads
// the calls.
//
// The database is SQLite, store.db in the data directory, or one in PostgreSQL that
// the guards of a fleet share. Both answer alike. Nothing is lost with either: it can
// be built anew from the ledgers, as far back as these go.
package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/partnerguard/partnerguard/telemetry/ledger"
)

// Store writes the database. There is one per ledger, by a lock; any number of
// Readers stand beside it. Its methods are safe for concurrent use.
type Store struct {
	cfg    Config
	wake   chan struct{}
	status atomic.Pointer[Status] // replaced whole

	mu     sync.Mutex // guards what follows: one batch at a time
	db     backend
	in     *joiner   // nil while db is closed
	source Source    // nil: to be opened at in.position
	pruned time.Time // when retention was last applied
	closed bool
}

// Config is what Open needs. Dir is required.
type Config struct {
	// Dir is the data directory: the database is store.db there, and the ledger
	// that is followed is that of the same directory.
	Dir string
	// Postgres is the fleet's database, as a URL (postgres://user@host/name) or in the
	// form key=value; see docs/fleet.md. Empty: SQLite in Dir.
	Postgres string
	// CurrentPostgres returns what Postgres would be now. It is asked for each connection:
	// a password that changed needs no restart. What is an error, or no URL, leaves the
	// one before. Nil: Postgres stands.
	CurrentPostgres func() (string, error)
	// Instance names this guard to the fleet. With Postgres only.
	Instance string
	// Version is this program's, for the operator of the database. With Postgres only.
	Version string
	// Pseudonymous keeps from the database who the users are. With Postgres only; SQLite
	// never holds it.
	Pseudonymous bool
	// Ledger is the identity of what is followed, a UUID. Empty: that of the ledger in
	// Dir. With Postgres only.
	Ledger string
	// Retention is how long calls and sums are kept, in whole hours, in PostgreSQL in
	// whole days (UTC), by the time of the call; there the guard with the longest one
	// decides when a day is dropped. Zero is 30 days, negative keeps all; it should equal the ledger's.
	Retention time.Duration
	// TenantRetention is how long the calls of single tenants are kept instead, by
	// tenant id in small letters. In PostgreSQL by whole days.
	TenantRetention map[string]time.Duration
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

// Open opens the database for writing, and creates it where there is none.
//
// A damaged SQLite database is set aside as store.db.damaged-<time>, one of an older
// schema or of another ledger removed; both are rebuilt as the Store follows. The error
// says so when the schema is newer than this program's, or another process writes.
//
// With Config.Postgres only the configuration can be an error: the database is
// connected to as the Store follows, and again whenever that fails.
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
	s := &Store{cfg: cfg, wake: make(chan struct{}, 1)}
	if cfg.Postgres != "" {
		db, err := newPostgres(cfg)
		if err != nil {
			return nil, err
		}
		s.db = db
		s.publish(Status{})
		return s, nil
	}
	db, err := newSQLite(cfg)
	if err != nil {
		return nil, err
	}
	s.db = db
	if s.in, err = db.open(context.Background()); err != nil {
		db.release()
		return nil, err
	}
	s.publish(Status{})
	return s, nil
}

// Follow reads the ledger into the database until ctx ends, and returns nil then.
// Failures are told by Event and Status, and tried again: the Store never gives up.
func (s *Store) Follow(ctx context.Context) error {
	retry := retryMin
	for ctx.Err() == nil {
		_, eof, err := s.step(ctx, new(pacer).pause)
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
		n, eof, err := s.step(ctx, atOnce)
		total += n
		if err != nil || eof {
			return total, err
		}
	}
}

var errClosed = errors.New("store is closed")

// step reads one batch of records into the database. eof says that the ledger's
// end was reached. After an error the next step begins where the last good one
// ended. pace is called within.
func (s *Store) step(ctx context.Context, pace func()) (n int, eof bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return 0, false, errClosed
	}
	before := *s.status.Load()
	n, bad, eof, err := s.batch(ctx, pace)
	now := Status{CaughtUp: eof, BadRecords: before.BadRecords + bad}
	if err != nil {
		err = s.recover(ctx, err)
	}
	switch now.Err = err; {
	case err != nil && ctx.Err() != nil: // the caller went away
		now.CaughtUp, now.Err = false, before.Err
	case err != nil:
		now.CaughtUp = false
		if before.Err == nil {
			s.cfg.Event(Event{Failing, s.db.name(), err})
		}
	case before.Err != nil:
		s.cfg.Event(Event{Recovered, s.db.name(), nil})
	}
	s.publish(now)
	return n, eof, err
}

// publish makes st, completed by what the database holds, what Status returns.
func (s *Store) publish(st Status) {
	if s.in != nil {
		st.Position, st.Seq, st.Time, st.Open = s.in.position, s.in.seq, s.in.newest, len(s.in.open)
	} else if before := s.status.Load(); before != nil {
		st.Position, st.Seq, st.Time, st.Open = before.Position, before.Seq, before.Time, before.Open
	}
	s.status.Store(&st)
}

func (s *Store) batch(ctx context.Context, pace func()) (n int, bad int64, eof bool, err error) {
	if s.in == nil {
		if s.in, err = s.db.open(ctx); err != nil {
			return 0, 0, false, err
		}
	}
	s.in.pace = pace
	if s.source == nil {
		source, err := s.cfg.Source(s.in.position)
		if err != nil {
			return 0, 0, false, err
		}
		s.source = source // not before: a nil *ledger.Reader is a Source
	}
	if now := s.cfg.Now(); s.cfg.Retention > 0 && now.Sub(s.pruned) >= pruneInterval {
		done, err := s.db.prune(ctx, now.Add(-s.cfg.Retention))
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
			if err := s.db.begin(ctx); err != nil {
				return 0, bad, false, err
			}
			b = &batch{in: s.in, known: s.db.holds, position: s.in.position, seq: s.in.seq}
		}
		n++
		pace()
		if err := b.add(ctx, e); err != nil {
			bad++
			s.cfg.Event(Event{BadRecord, "", fmt.Errorf("read ledger record %d: %w", e.Seq, err)})
		}
	}
	if b == nil {
		err := s.db.idle(ctx, eof)
		return 0, bad, eof && err == nil, err
	}
	if b.err != nil {
		return 0, bad, false, fmt.Errorf("write store: %w", b.err)
	}
	b.abandon()
	b.caughtUp = eof
	if err := s.db.commit(ctx, b); err != nil {
		return 0, bad, false, err
	}
	s.in.position, s.in.seq = b.position, b.seq
	return n, bad, eof, nil
}

// recover puts the Store back to what the database holds after err, and gets rid
// of a database that is the cause. It returns the error that remains.
func (s *Store) recover(ctx context.Context, err error) error {
	if s.source != nil {
		s.source.Close()
		s.source = nil
	}
	if s.in == nil || errors.Is(err, errBusy) {
		return err
	}
	s.db.close()
	s.in = nil
	if err = s.db.recover(err); err != nil {
		return err // the next batch opens it
	}
	s.in, err = s.db.open(ctx)
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
	return errors.Join(append(errs, s.db.release())...)
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
