package ledger

import (
	"errors"
	"fmt"
	"os"
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
// that is down can write again, looks for free space, removes what is too old.
func (l *Ledger) keep(p pace) {
	defer l.tasks.Done()
	sync, probe, prune := time.NewTicker(l.cfg.SyncEvery), time.NewTicker(p.probe), time.NewTicker(p.prune)
	defer sync.Stop()
	defer probe.Stop()
	defer prune.Stop()
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
		case <-prune.C:
			l.prune()
		}
	}
}

// sync forces to the disk what was written, and closes the files that are done.
func (l *Ledger) sync() error {
	l.mu.Lock()
	dirty, retired, appeared := l.dirty, l.retired, l.appeared
	l.dirty, l.retired, l.appeared = nil, nil, false
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
		l.prune()
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

func (l *Ledger) prune() {
	if l.cfg.Retention < 0 {
		return
	}
	if _, err := prune(l.files, l.cfg.Dir, l.cfg.Now().Add(-l.cfg.Retention)); err != nil {
		l.mu.Lock()
		l.status.Err, l.status.ErrTime = err, l.cfg.Now()
		l.mu.Unlock()
	}
}

// Prune removes the segments in the data directory dir that end before the given
// time, and the damaged files that are older; a guard may be writing there. The
// last segment always stays. It returns the names of what it removed.
func Prune(dir string, before time.Time) ([]string, error) { return prune(osFiles{}, dir, before) }

func prune(fs files, dir string, before time.Time) ([]string, error) {
	nums, err := segments(dir)
	if err != nil {
		return nil, err
	}
	var gone []string
	for ; len(nums) > 1; nums = nums[1:] {
		h, err := readHeader(dir, nums[1])
		if err != nil {
			return gone, err
		}
		if began, err := time.Parse(time.RFC3339, h.Time); err != nil || !began.Before(before) {
			break
		}
		if err := fs.remove(segmentPath(dir, nums[0])); err != nil {
			return gone, fmt.Errorf("remove old ledger segment: %w", err)
		}
		gone = append(gone, segmentName(nums[0]))
	}
	damaged, err := filepath.Glob(filepath.Join(segmentDir(dir), "*"+segmentSuffix+".damaged-*"))
	if err != nil {
		return gone, fmt.Errorf("list damaged ledger segments: %w", err)
	}
	for _, name := range damaged {
		if fi, err := os.Stat(name); err != nil || !fi.ModTime().Before(before) {
			continue
		}
		if err := fs.remove(name); err != nil {
			return gone, fmt.Errorf("remove damaged ledger segment: %w", err)
		}
		gone = append(gone, filepath.Base(name))
	}
	return gone, nil
}
