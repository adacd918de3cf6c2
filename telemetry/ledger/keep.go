package ledger

import (
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"time"
)

// watch tells the listener what happened, and notices a write that does not
// return: the calls that wait for it are let go, and no more are taken until it
// does. It touches no disk, so that it cannot stall itself.
func (l *Ledger) watch(p pace) {
	defer l.tasks.Done()
	tick := time.NewTicker(p.watch)
	defer tick.Stop()
	var (
		latest uint64 // commit at the last look
		looks  int    // that saw it
	)
	for {
		select {
		case e := <-l.events:
			l.cfg.Event(e)
		case <-tick.C:
			if now := l.latest(); now != latest {
				latest, looks = now, 0
			}
			if looks++; looks > stalledLooks {
				l.stall(latest)
			}
		case <-l.stop:
			for {
				select {
				case e := <-l.events:
					l.cfg.Event(e)
				default:
					return
				}
			}
		}
	}
}

// stalledLooks is how many looks a commit may last. A disk that is only slow is
// waited for: what is let go counts as not recorded, and in SyncAlways a stall of
// seconds is everyday life.
const stalledLooks = 4

// latest returns which commit is being done or was done last.
func (l *Ledger) latest() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.commits
}

// stall lets go of the calls that wait for commit, if it still goes on.
func (l *Ledger) stall(commit uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.writing == nil || l.commits != commit || l.stalled {
		return
	}
	l.stalled = true
	err := unavailable(errStalled)
	l.status.Err, l.status.ErrTime = err, l.cfg.Now()
	l.emit(Event{Kind: EventFailed, Err: err})
	l.writing.release(err)
	l.pending.release(err)
	l.idle.Broadcast()
}

// keep does in the background what needs the disk: syncs, tries whether a ledger
// that is down can write again, looks for free space.
func (l *Ledger) keep(p pace) {
	defer l.tasks.Done()
	sync, probe := time.NewTicker(l.cfg.SyncEvery), time.NewTicker(p.probe)
	defer sync.Stop()
	defer probe.Stop()
	var (
		pause time.Duration // after a failed sync, so that segments do not multiply
		next  time.Time
	)
	for n := 1; ; {
		select {
		case <-l.stop:
			return
		case now := <-sync.C:
			if now.Before(next) {
				continue
			}
			if err := l.sync(); err != nil {
				pause = min(max(2*pause, time.Second), time.Minute)
				next = now.Add(pause)
			} else {
				pause = 0
			}
		case <-probe.C:
			l.probe()
			if n++; n%5 == 0 {
				l.checkSpace()
			}
		}
	}
}

// sync forces to the disk what was written, and closes the files that are done.
func (l *Ledger) sync() error {
	l.mu.Lock()
	dirty, retired, appeared, unsaved := l.dirty, l.retired, l.appeared, l.unsaved
	l.dirty, l.retired, l.appeared, l.unsaved = nil, nil, false, nil
	l.mu.Unlock()

	var err error
	for _, f := range retired {
		err = errors.Join(err, f.datasync(), f.Close())
	}
	if dirty != nil {
		err = errors.Join(err, dirty.datasync())
	}
	if appeared {
		err = errors.Join(err, l.files.syncDir(segmentDir(l.cfg.Dir)))
		wake(l.closing)
	}
	// Not before its line is on the disk: a power failure must not make a checkpoint
	// look like one whose records were cut off.
	if err == nil && unsaved != nil {
		if serr := l.save(unsaved); serr != nil {
			l.upkeepFailed(serr)
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case err != nil:
		// After a failed sync the kernel may have dropped the pages and call them
		// clean, so a second sync of the same file proves nothing.
		err = fmt.Errorf("sync ledger: %w", err)
		l.suspect = true
		l.status.SyncErr, l.status.Err, l.status.ErrTime = err, err, l.cfg.Now()
		l.emit(Event{Kind: EventSyncFailed, Err: err})
	case dirty != nil || len(retired) > 0:
		l.status.SyncErr = nil
	}
	return err
}

// retire leaves a segment that is done to the next sync.
func (l *Ledger) retire(f file) {
	if f == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.retired = append(l.retired, f)
	if l.dirty == f {
		l.dirty = nil
	}
}

// probe tries to write again when the ledger is down. It does so without a call
// waiting, so that a guard that refuses calls for lack of a ledger comes back even
// if nobody sends it any.
func (l *Ledger) probe() {
	l.mu.Lock()
	down := l.down != nil
	l.mu.Unlock()
	if !down {
		return
	}
	low := l.lowSpace()
	l.mu.Lock()
	switch {
	case l.down == nil || l.leading || l.closed:
		l.mu.Unlock()
	case low != nil:
		l.fail(unavailable(low))
		l.mu.Unlock()
	default:
		l.leading = true
		l.leadOn(true)
	}
}

// checkSpace takes the ledger down when the disk has less than MinFree.
func (l *Ledger) checkSpace() {
	low := l.lowSpace()
	if low == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.down == nil {
		l.fail(unavailable(low))
	}
}

// lowSpace says how much room is missing; nil when there is enough, or when the
// file system does not tell.
func (l *Ledger) lowSpace() error {
	if l.cfg.MinFree < 0 {
		return nil
	}
	free, err := l.files.free(l.cfg.Dir)
	if err != nil || free >= l.cfg.MinFree {
		return nil
	}
	return fmt.Errorf("%d MiB free on the disk, %d MiB must stay", free>>20, l.cfg.MinFree>>20)
}

// checkpoint signs the end of the chain, unless nothing came since the last time.
// The line goes out with the next group, or by itself.
func (l *Ledger) checkpoint() {
	l.mu.Lock()
	at := l.tip
	idle := at.seq == l.covered || l.refusal() != nil
	l.mu.Unlock()
	if idle {
		return
	}
	c := sign(l.key, l.id, l.cfg.Now(), at.seq, at.hash)
	l.mu.Lock()
	if l.refusal() != nil {
		l.mu.Unlock()
		return
	}
	l.signed = &c
	if l.leading {
		l.mu.Unlock() // who leads takes it along
		return
	}
	l.leading = true
	l.leadOn(false)
}

// save puts c in checkpoint.json.
func (l *Ledger) save(c *Checkpoint) error {
	b, err := json.Marshal(c)
	if err == nil {
		err = replaceFile(filepath.Join(l.cfg.Dir, checkpointFile), append(b, '\n'))
	}
	if err != nil {
		return fmt.Errorf("write latest checkpoint: %w", err)
	}
	return nil
}

// upkeepFailed tells that work in the background failed; records are taken all the
// same.
func (l *Ledger) upkeepFailed(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.status.Err, l.status.ErrTime = err, l.cfg.Now()
	l.emit(Event{Kind: EventUpkeepFailed, Err: err})
}
