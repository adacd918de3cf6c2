// Package ledger is the truth about every call: append-only segment files of JSON
// lines, numbered, never changed, committed in groups that are chained by hash.
//
// A segment is Dir/ledger/NNNNNNNNNNNN.jsonl, and .jsonl.zst once it is compressed,
// which zstdcat reads. Each line is one JSON object that begins with its number n
// and its type. A commit line closes each group of lines. The chain's digest there
// is SHA-256 over the one at the commit before and the SHA-256 of each line since;
// the commit holds its beginning, the header of a segment the whole one of the last
// commit before it, and a checkpoint line signs one every few minutes. A group goes
// out in one write, so what follows the last commit of a segment is the rest of a
// write that was cut short, and is no part of the ledger. It is left where it is:
// the next segment's header says how many bytes it has.
//
// Retention removes whole segments, the oldest first; what of a segment goes earlier,
// because its tenant's retention is over, leaves a line with the digest of the one
// that stood there, so that the chain still proves all others.
//
// A line names its user by a keyed hash. Who that is stands in Dir/identities.jsonl,
// outside the chain, so that a user can be forgotten.
package ledger

import (
	"bytes"
	"crypto/ed25519"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/gofrs/flock"
	"github.com/google/uuid"
	"github.com/partnerguard/partnerguard/policy"
	"github.com/partnerguard/partnerguard/proxy"
	"github.com/partnerguard/partnerguard/telemetry"
)

// ErrUnavailable says that a record is not in the ledger. Errors that wrap it also
// wrap the cause.
var ErrUnavailable = errors.New("ledger unavailable")

// ErrLocked says that another process writes the ledger.
var ErrLocked = errors.New("data directory is in use by another partnerguard")

var (
	errClosed     = errors.New("ledger is closed")
	errStalled    = errors.New("a write to the disk does not return")
	errNoDecision = errors.New("the call's decision was not recorded")
)

// Ledger appends records. Its methods are safe for concurrent use; concurrent
// calls share one write.
type Ledger struct {
	cfg        Config
	files      files
	lock       *flock.Flock
	identities identities
	key        ed25519.PrivateKey
	id         string    // of the ledger
	members    sync.Pool // *[]byte, to encode outside the lock

	mu      sync.Mutex
	idle    sync.Cond // on mu: the lead became free, or a stall was seen
	leading bool      // someone commits; only he touches the fields of lead
	pending *batch    // what the next commit takes
	spare   *batch
	writing *batch // what is being committed, nil when nothing is
	waiting bool   // outcomes are pending and carry knows of it
	commits uint64 // begun; tells the watcher one write from another
	stalled bool   // the write being done takes too long
	closed  bool
	down    error // wraps ErrUnavailable; nil while records are taken
	suspect bool  // a sync failed: go on in a new segment

	// open holds the calls with a decision, written or pending, and no outcome yet.
	open map[proxy.CallID]struct{}
	// unfinished are calls of open whose outcome is lost. They get one that says so
	// as soon as something can be written.
	unfinished []unfinished
	gap        Gap // not yet written

	tip     tip         // where the chain ends
	covered uint64      // number of the last commit that needs no further checkpoint
	signed  *Checkpoint // not yet written
	unsaved *Checkpoint // written, and not yet in checkpoint.json

	dirty    file   // has been written since the last sync
	retired  []file // to be synced and closed
	appeared bool   // a segment, since the last sync
	status   Status

	lead lead

	events   chan Event
	delay    time.Duration // pace.carry
	outcomes chan struct{} // wakes carry; holds one
	begun    chan struct{} // wakes carry to sign; holds one
	closing  chan struct{} // wakes tend: a segment is done; holds one
	signs    bool          // pace.sign is not 0
	stripped int64         // day of the last removeTenants; only tend touches it
	stop     chan struct{}
	tasks    sync.WaitGroup
}

// Config is what Open needs. Dir is required.
type Config struct {
	// Dir is the data directory; it is created with mode 0700 when missing.
	Dir string
	// Instance names this guard in the headers of segments.
	Instance string
	// Key signs checkpoints. Nil is the one in Dir/ledger.key, made at the first start.
	// Its public half is put in Dir/ledger.pub.
	Key ed25519.PrivateKey
	// Retention is how long records are kept: a segment is removed once the one
	// after it began longer ago. Zero is 30 days, negative keeps all.
	Retention time.Duration
	// TenantRetention is how long the records of single tenants are kept instead, by
	// tenant id in lower case; at least a day. It holds for calls with a verified token
	// of the tenant: a record of any other falls under Retention.
	TenantRetention map[string]time.Duration
	// MaxBytes is how much the segments may take on the disk; with more, the oldest
	// are removed before their retention is over, and EventRemovedEarly tells. The one
	// being written always stays. Zero is no limit.
	MaxBytes int64
	// Compress lets segments that are done be compressed in the background.
	Compress bool
	// SyncEvery is how often what was written is forced to the disk, in the
	// background: what a power failure may cost. Zero is 1 s.
	SyncEvery time.Duration
	// SyncAlways lets Decide return only when the decision is on the disk.
	SyncAlways bool
	// MinFree is how many bytes must stay free on the disk; with less, records are
	// refused as if it were full. It is looked at every few seconds. Zero is 1 GiB,
	// negative does not look.
	MinFree int64
	// SegmentBytes is the size at which a new segment begins; one also begins with
	// the first record of each day (UTC). Zero is 64 MiB.
	SegmentBytes int64
	// Pseudonymous keeps no names: nothing but the user_ref says who a user is. Names
	// that are already in identities.jsonl stay; see Forget.
	Pseudonymous bool
	// Now is the clock; nil is time.Now.
	Now func() time.Time
	// Event hears of failures and recoveries, one at a time and in order, for log
	// and metrics. It must not block. May be nil.
	Event func(Event)
}

// Event is something the operator should hear of.
type Event struct {
	Kind    EventKind
	Time    time.Time
	Segment string // file name, if the event is about one
	Err     error  // the cause of a failure, what is wrong with a segment
	Gap     Gap    // of EventGap
}

// EventKind tells events apart.
type EventKind string

const (
	EventFailed     EventKind = "failed"      // records are refused from now on
	EventRecovered  EventKind = "recovered"   // records are taken again
	EventSyncFailed EventKind = "sync_failed" // a sync failed; a new segment begins
	EventSetAside   EventKind = "set_aside"   // Segment was damaged, and renamed
	EventGap        EventKind = "gap"         // a gap line was written
	// EventRemovedEarly: Segment was removed before its retention was over, because
	// the ledger had more than MaxBytes.
	EventRemovedEarly EventKind = "removed_early"
	// EventUpkeepFailed: a segment could not be compressed, or what is too old not be
	// removed. It is tried again within the hour.
	EventUpkeepFailed EventKind = "upkeep_failed"
	// EventIdentityFailed: the name of a user could not be written.
	EventIdentityFailed EventKind = "identity_failed"
)

// Status is how the ledger does.
type Status struct {
	Healthy bool // records are taken
	// Degraded says that something is wrong: not Healthy, or the last sync failed,
	// or a segment was set aside since Open.
	Degraded bool
	Err      error // the last failure, nil when there was none since Open
	ErrTime  time.Time
	Seq      uint64 // number of the last commit
	Segment  uint64 // being written
	// LostCalls and LostOutcomes count since Open what could not be recorded.
	LostCalls, LostOutcomes uint64
	// Gap is what of that no gap line tells yet.
	Gap      Gap
	SetAside []string // segments found damaged by Open
	SyncErr  error    // of the last sync, nil when it succeeded
	// Checkpoint is the latest one that was written since Open; nil before that.
	Checkpoint *Checkpoint
}

// tip is the last commit.
type tip struct {
	seq  uint64
	hash digest
}

// lead is what belongs to whoever leads.
type lead struct {
	f     file   // nil when there is none to go on with
	num   uint64 // of the segment being written, or of the last one
	next  uint64 // number for the next segment
	end   int64  // behind the last commit
	day   int64  // on which it began, since 1970
	torn  bool   // something uncommitted may follow end
	seq   uint64
	hash  digest
	aside []string // set aside, to be named by the next header
	group group

	compressed bool  // num was found so by Open
	size       int64 // of num then, before compression
}

// batch is what one commit takes.
type batch struct {
	members []byte // of all lines, one after the other
	lines   []line
	wait    *wait // nil until a call waits
}

type line struct {
	call    proxy.CallID
	outcome bool
	end     int // in members
}

// wait is what the calls of a batch wait on, but for the one that leads.
type wait struct {
	done chan struct{} // closed once err is set
	lead chan struct{} // hands the lead to one of them
	err  error
}

type unfinished struct {
	call proxy.CallID
	why  string
}

func (b *batch) add(call proxy.CallID, outcome bool, members []byte) {
	b.members = append(b.members, members...)
	b.lines = append(b.lines, line{call, outcome, len(b.members)})
}

// release ends the waiting with err.
func (b *batch) release(err error) {
	if b != nil && b.wait != nil {
		b.wait.err = err
		close(b.wait.done)
		b.wait = nil
	}
}

// Open takes the lock of the data directory, recovers what the last process left,
// and begins to write. Calls that were open when it died get an outcome with the
// error "interrupted". A segment that is damaged is renamed and named in the
// Status; the ledger goes on in a new one. The error wraps ErrLocked when another
// process writes here. A full disk is no error: the ledger is then unavailable
// until there is room.
func Open(cfg Config) (*Ledger, error) { return open(cfg, osFiles{}, defaultPace) }

// pace is how often the background looks; tests are less patient.
type pace struct {
	probe time.Duration // for recovery
	watch time.Duration // a commit that lasts for more than stalledLooks of them has stalled
	prune time.Duration
	// carry is how long an outcome waits for a decision to share a write with, which
	// saves every other write under load; 0 writes it at once.
	carry time.Duration
	// sign is how often a checkpoint is written while records come; one also follows
	// the beginning of each segment, and Close. 0 writes none.
	sign time.Duration
	// rest is how long compression pauses for each unit of time that it works.
	rest int
}

var defaultPace = pace{
	probe: time.Second, watch: time.Second, prune: time.Hour, carry: 5 * time.Millisecond,
	sign: 10 * time.Minute, rest: 4,
}

func open(cfg Config, fs files, p pace) (*Ledger, error) {
	if cfg.Dir == "" {
		return nil, errors.New("ledger: Config.Dir is required")
	}
	if cfg.Retention == 0 {
		cfg.Retention = 30 * 24 * time.Hour
	}
	if cfg.SyncEvery <= 0 {
		cfg.SyncEvery = time.Second
	}
	if cfg.MinFree == 0 {
		cfg.MinFree = 1 << 30
	}
	if cfg.SegmentBytes <= 0 {
		cfg.SegmentBytes = 64 << 20
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Event == nil {
		cfg.Event = func(Event) {}
	}
	l := &Ledger{
		cfg:      cfg,
		files:    fs,
		pending:  &batch{},
		spare:    &batch{},
		open:     map[proxy.CallID]struct{}{},
		events:   make(chan Event, 64),
		outcomes: make(chan struct{}, 1),
		begun:    make(chan struct{}, 1),
		closing:  make(chan struct{}, 1),
		delay:    p.carry,
		signs:    p.sign > 0,
		stop:     make(chan struct{}),
	}
	l.idle.L = &l.mu
	l.members.New = func() any { return new([]byte) }
	if err := os.MkdirAll(segmentDir(cfg.Dir), 0o700); err != nil {
		return nil, fmt.Errorf("create ledger directory: %w", err)
	}
	l.lock = flock.New(filepath.Join(cfg.Dir, "lock"), flock.SetPermissions(0o600))
	switch ok, err := l.lock.TryLock(); {
	case err != nil:
		return nil, fmt.Errorf("lock data directory %s: %w", cfg.Dir, err)
	case !ok:
		return nil, fmt.Errorf("%w: %s", ErrLocked, cfg.Dir)
	}
	if err := l.start(); err != nil {
		if l.lead.f != nil {
			l.lead.f.Close()
		}
		l.lock.Close()
		return nil, err
	}
	l.tasks.Add(4)
	l.tasks.Go(func() { l.identities.write(l.stop, cfg.Now) })
	go l.watch(p)
	go l.carry(p)
	go l.keep(p)
	go l.tend(p)
	return l, nil
}

// start recovers and gets ready to write. Nobody else knows the ledger yet.
func (l *Ledger) start() error {
	l.identities.pseudonymous = l.cfg.Pseudonymous
	if err := l.identities.open(l.cfg.Dir); err != nil {
		return err
	}
	if l.key = l.cfg.Key; l.key == nil {
		var err error
		if l.key, err = ownKey(l.cfg.Dir); err != nil {
			return err
		}
	}
	if err := publishKey(l.cfg.Dir, l.key.Public().(ed25519.PublicKey)); err != nil {
		return err
	}
	last, err := l.recover()
	if err != nil {
		return err
	}
	if last != nil && l.resumable(last) {
		if l.lead.f, err = l.files.extend(segmentPath(l.cfg.Dir, last.num)); err != nil {
			return fmt.Errorf("open ledger segment: %w", err)
		}
		l.lead.day = day(l.cfg.Now())
	}
	l.tip = tip{l.lead.seq, l.lead.hash}
	if l.id == "" {
		l.id = uuid.NewString()
		if err := l.keepFormerCheckpoint(); err != nil {
			return err
		}
	}
	for _, name := range l.status.SetAside {
		l.emit(Event{Kind: EventSetAside, Segment: name, Err: errors.New("segment is damaged")})
	}
	// Write the header and the outcomes of interrupted calls now, so that a data
	// directory that cannot be written is an error of Open.
	l.mu.Lock()
	l.leading = true
	err = l.commit(true)
	l.leading = false
	l.mu.Unlock()
	if err != nil && !diskFull(err) {
		return err
	}
	l.checkSpace()
	wake(l.begun)
	wake(l.closing)
	return nil
}

// resumable reports whether the last segment ended well and can be gone on with.
func (l *Ledger) resumable(last *walk) bool {
	began, err := time.Parse(time.RFC3339, last.header.Time)
	return err == nil && day(began) == day(l.cfg.Now()) &&
		len(l.lead.aside) == 0 && !last.compressed() && last.size == last.end && last.end < l.cfg.SegmentBytes &&
		last.header.Instance == l.cfg.Instance
}

// recover finds where the chain ends and which calls are open there. Damaged
// segments are set aside on the way. It returns the last segment, nil if there is
// none or it was set aside.
func (l *Ledger) recover() (*walk, error) {
	dir := l.cfg.Dir
	if tmp, err := filepath.Glob(filepath.Join(segmentDir(dir), "*.tmp")); err == nil {
		for _, name := range tmp { // of a death while a segment began
			l.files.remove(name)
		}
	}
	nums, err := segments(dir)
	if err != nil {
		return nil, err
	}
	l.lead.next = 1
	if len(nums) > 0 {
		l.lead.next = nums[len(nums)-1] + 1
	}
	nums, last, skip, err := l.dropUnsynced(nums) // skip: numbers that what was set aside may have used
	if err != nil {
		return nil, err
	}
	for i := len(nums) - 1; i >= 0; i-- {
		w := last
		if last = nil; w == nil {
			if w, err = walkSegment(dir, nums[i], nil, nil); err != nil {
				return nil, err
			}
		}
		damaged := w.damaged()
		if damaged {
			if err := l.setAside(w, errors.New(w.problem.String())); err != nil {
				return nil, err
			}
			// Views know records by their numbers: none may come twice.
			skip += uint64(w.size-w.end) / shortestLine
			if w.end == 0 {
				continue // nothing of it can be trusted: the chain ends before
			}
		}
		l.lead.num, l.lead.end, l.lead.seq, l.lead.hash = w.num, w.end, w.seq+skip, w.hash
		l.lead.compressed, l.lead.size = w.compressed(), w.size
		l.id = w.header.Ledger
		if w.sealed == w.seq {
			l.covered = w.seq
		}
		for id := range w.open {
			l.open[id] = struct{}{}
			l.unfinished = append(l.unfinished, unfinished{id, "interrupted"})
		}
		slices.SortFunc(l.unfinished, func(a, b unfinished) int { return bytes.Compare(a.call[:], b.call[:]) })
		if damaged {
			return nil, nil
		}
		return w, nil
	}
	l.lead.seq = skip
	return nil, nil
}

// shortestLine is fewer bytes than any line has.
const shortestLine = 32

// Decide appends the decision of rec. It returns once that is in the segment file,
// where it survives the death of the process; with Config.SyncAlways once it is on
// the disk. After an error, which wraps ErrUnavailable, the caller must treat rec
// as not recorded. It waits for the disk, but no longer than a few seconds unless
// it is the one call whose write stalls.
func (l *Ledger) Decide(rec *proxy.Record) error {
	p := l.members.Get().(*[]byte)
	defer l.put(p)
	*p = telemetry.AppendDecision((*p)[:0], rec, l.UserRef(&rec.Token))

	l.mu.Lock()
	if err := l.refusal(); err != nil {
		l.lose(1, 0, err)
		l.mu.Unlock()
		return err
	}
	l.open[rec.Call] = struct{}{}
	l.pending.add(rec.Call, false, *p)
	if !l.leading {
		l.leading = true
		return l.leadOn(false)
	}
	if l.pending.wait == nil {
		l.pending.wait = &wait{done: make(chan struct{}), lead: make(chan struct{}, 1)}
	}
	w := l.pending.wait
	l.mu.Unlock()
	select {
	case <-w.done:
		return w.err
	case <-w.lead:
		l.mu.Lock()
		return l.leadOn(false)
	}
}

// Finish appends the outcome of rec, once for each call that Decide was asked for.
// It does not wait: the line goes out with the next decision, or by itself after
// 5 ms; what then happens to it shows in Status and Event. A call whose decision is
// not in the ledger gets no outcome either: it is counted, and the error says so. An
// error wraps ErrUnavailable.
func (l *Ledger) Finish(rec *proxy.Record) error {
	p := l.members.Get().(*[]byte)
	defer l.put(p)
	*p = telemetry.AppendOutcome((*p)[:0], rec)

	l.mu.Lock()
	switch _, ok := l.open[rec.Call]; {
	case l.closed:
		l.mu.Unlock() // the next Open calls it interrupted
		return unavailable(errClosed)
	case !ok:
		cause := l.down
		if cause == nil {
			cause = unavailable(errNoDecision)
		}
		l.lose(0, 1, cause)
		l.mu.Unlock()
		return cause
	case l.down != nil:
		err := l.down
		l.lose(0, 1, err)
		l.unfinished = append(l.unfinished, unfinished{rec.Call, string(policy.ReasonLedgerUnavailable)})
		l.mu.Unlock()
		return err
	}
	l.pending.add(rec.Call, true, *p)
	switch {
	case l.leading:
	case l.delay == 0:
		l.leading = true
		return l.leadOn(false)
	case !l.waiting:
		l.waiting = true
		l.outcomes <- struct{}{} // never blocks: there is one at most
	}
	l.mu.Unlock()
	return nil
}

// carry commits the outcomes that no decision took along in time, and checkpoints.
func (l *Ledger) carry(p pace) {
	defer l.tasks.Done()
	var signing <-chan time.Time
	if l.signs {
		t := time.NewTicker(p.sign)
		defer t.Stop()
		signing = t.C
	}
	for {
		select {
		case <-l.stop:
			return
		case <-signing:
			l.checkpoint()
			continue
		case <-l.begun:
			if l.signs {
				l.checkpoint()
			}
			continue
		case <-l.outcomes:
		}
		select {
		case <-l.stop:
			return
		case <-time.After(l.delay):
		}
		l.mu.Lock()
		l.waiting = false
		if l.leading || l.closed || len(l.pending.lines) == 0 {
			l.mu.Unlock()
			continue
		}
		l.leading = true
		l.leadOn(false)
	}
}

// UserRef returns what stands for the user of t in every record: a keyed hash of
// tenant and object id, 22 characters. Empty when t stands for no user or does not
// say which. The first time a user is seen in a verified token, who that is goes to
// the identities file, unless Config.Pseudonymous; a token that only claims to be
// someone adds nothing there, and neither does a user who was forgotten.
func (l *Ledger) UserRef(t *policy.Token) string {
	ref, err := l.identities.ref(t, l.cfg.Now)
	if err != nil {
		l.mu.Lock()
		l.status.Err, l.status.ErrTime = err, l.cfg.Now()
		l.emit(Event{Kind: EventIdentityFailed, Err: err})
		l.mu.Unlock()
	}
	return ref
}

// Status says how the ledger does.
func (l *Ledger) Status() Status {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.status
	s.Healthy = l.refusal() == nil
	s.Gap = l.gap
	s.SetAside = slices.Clone(s.SetAside)
	s.Degraded = !s.Healthy || s.SyncErr != nil || len(s.SetAside) > 0
	return s
}

// Close writes what is pending, syncs and releases the lock. Calls that are still
// open are called interrupted by the next Open. It gives up on a disk that does not
// answer.
func (l *Ledger) Close() error {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return nil
	}
	l.closed = true
	for l.leading && !l.stalled {
		l.idle.Wait()
	}
	if l.leading {
		l.mu.Unlock()
		return fmt.Errorf("close ledger: %w", errStalled)
	}
	l.leading = true // for good
	var err error
	if l.down == nil && (len(l.pending.lines) > 0 || !l.gap.empty() || len(l.unfinished) > 0) {
		err = l.commit(false)
	}
	if l.signs && l.down == nil && l.tip.seq != l.covered {
		c := sign(l.key, l.id, l.cfg.Now(), l.tip.seq, l.tip.hash)
		l.signed = &c
		err = errors.Join(err, l.commit(false))
	}
	l.mu.Unlock()

	close(l.stop)
	ended := make(chan struct{})
	go func() { l.tasks.Wait(); close(ended) }()
	select {
	case <-ended:
	case <-time.After(10 * time.Second):
		return fmt.Errorf("close ledger: %w", errStalled)
	}
	err = errors.Join(err, l.sync())
	if l.lead.f != nil {
		err = errors.Join(err, l.lead.f.Close())
	}
	err = errors.Join(err, l.lock.Close())
	if err != nil {
		return fmt.Errorf("close ledger: %w", err)
	}
	return nil
}

// leadOn commits what is pending and goes on while more comes. The caller has just
// taken the lead and holds mu, which is released. The result is that of the first
// commit, in which the caller's own line is.
func (l *Ledger) leadOn(probe bool) error {
	err := l.commit(probe)
	for len(l.pending.lines) > 0 || l.signed != nil {
		if w := l.pending.wait; w != nil {
			// A call of the next batch leads it: nobody works for others for ever.
			w.lead <- struct{}{}
			l.mu.Unlock()
			return err
		}
		l.commit(false)
	}
	l.leading = false
	l.idle.Broadcast()
	l.mu.Unlock()
	return err
}

// commit writes one batch and tells everyone in it the result. The caller leads and
// holds mu, which is released while writing. While the ledger is down only a probe
// writes; its success ends that.
func (l *Ledger) commit(probe bool) error {
	b := l.pending
	l.pending, l.spare = l.spare, nil
	l.writing = b
	l.commits++
	w := write{now: l.cfg.Now(), batch: b, gap: l.gap, unfinished: l.unfinished, checkpoint: l.signed}
	l.gap, l.unfinished, l.signed = Gap{}, nil, nil
	if ld := &l.lead; ld.f == nil || ld.torn || l.suspect || ld.end >= l.cfg.SegmentBytes || ld.day != day(w.now) {
		w.fresh, w.open = true, l.standing(b)
	}
	err := l.down
	if err == nil || probe {
		l.mu.Unlock()
		if err = l.write(&w); err != nil {
			err = unavailable(err)
		}
		l.mu.Lock()
	}

	l.writing = nil
	l.status.Seq, l.status.Segment = l.lead.seq, l.lead.num
	l.tip = tip{l.lead.seq, l.lead.hash}
	if w.begun {
		l.suspect, l.appeared = false, true
		wake(l.begun)
	}
	if w.begun || w.stands {
		l.dirty = l.lead.f
	}
	if w.stands {
		l.settle(&w)
	} else if err != nil {
		l.unsettle(&w, err)
	}
	switch {
	case err != nil:
		l.fail(err)
		l.suspect = l.suspect || w.stands // written but not synced
	case probe && l.down != nil:
		l.down = nil
		l.emit(Event{Kind: EventRecovered})
	case l.stalled && l.down == nil:
		l.emit(Event{Kind: EventRecovered})
	}
	l.stalled = false
	b.release(err)
	b.members, b.lines = b.members[:0], b.lines[:0]
	l.spare = b
	return err
}

// settle accounts for lines that are in the file.
func (l *Ledger) settle(w *write) {
	for i := range w.batch.lines {
		if ln := &w.batch.lines[i]; ln.outcome {
			delete(l.open, ln.call)
		}
	}
	for _, u := range w.unfinished {
		delete(l.open, u.call)
	}
	if !w.gap.empty() {
		l.emit(Event{Kind: EventGap, Gap: w.gap})
	}
	if c := w.checkpoint; c != nil {
		l.unsaved, l.status.Checkpoint = c, c
		// One that stands alone right behind what it signs leaves nothing to sign.
		if l.covered = c.Commit; l.tip.seq == c.Commit+2 {
			l.covered = l.tip.seq
		}
	}
}

// unsettle accounts for lines that are not.
func (l *Ledger) unsettle(w *write, err error) {
	l.gap.add(w.gap)
	l.unfinished = append(l.unfinished, w.unfinished...)
	for i := range w.batch.lines {
		ln := &w.batch.lines[i]
		if !ln.outcome {
			delete(l.open, ln.call)
			l.lose(1, 0, err)
			continue
		}
		l.lose(0, 1, err)
		if _, ok := l.open[ln.call]; ok {
			l.unfinished = append(l.unfinished, unfinished{ln.call, string(policy.ReasonLedgerUnavailable)})
		}
	}
}

// standing returns the calls whose decision is written and whose outcome is not.
func (l *Ledger) standing(writing *batch) []proxy.CallID {
	queued := map[proxy.CallID]bool{}
	for _, b := range []*batch{writing, l.pending} {
		for i := range b.lines {
			if ln := &b.lines[i]; !ln.outcome {
				queued[ln.call] = true
			}
		}
	}
	var ids []proxy.CallID
	for id := range l.open {
		if !queued[id] {
			ids = append(ids, id)
		}
	}
	slices.SortFunc(ids, func(a, b proxy.CallID) int { return bytes.Compare(a[:], b[:]) })
	return ids
}

// refusal says why records are not taken; nil when they are. mu is held.
func (l *Ledger) refusal() error {
	switch {
	case l.closed:
		return unavailable(errClosed)
	case l.down != nil:
		return l.down
	case l.stalled:
		return unavailable(errStalled)
	}
	return nil
}

// lose counts what could not be recorded. mu is held.
func (l *Ledger) lose(calls, outcomes uint64, cause error) {
	l.status.LostCalls += calls
	l.status.LostOutcomes += outcomes
	now := l.cfg.Now()
	l.gap.add(Gap{Calls: calls, Outcomes: outcomes, Since: now, Until: now, Cause: cause.Error()})
}

// fail notes that records are refused from now on. mu is held.
func (l *Ledger) fail(err error) {
	l.status.Err, l.status.ErrTime = err, l.cfg.Now()
	if l.down == nil {
		l.emit(Event{Kind: EventFailed, Err: err})
	}
	l.down = err
}

// emit hands e to the watcher. One that nobody takes is dropped: the Status tells.
func (l *Ledger) emit(e Event) {
	e.Time = l.cfg.Now()
	select {
	case l.events <- e:
	default:
	}
}

// put returns an encoding buffer, unless a record blew it up.
func (l *Ledger) put(p *[]byte) {
	if cap(*p) <= 64<<10 {
		l.members.Put(p)
	}
}

// wake sends what a goroutine waits for, unless it is on its way already.
func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

func unavailable(cause error) error { return fmt.Errorf("%w: %w", ErrUnavailable, cause) }

// day counts the days (UTC) from 1970 to t.
func day(t time.Time) int64 { return t.Unix() / (24 * 60 * 60) }
