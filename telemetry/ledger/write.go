package ledger

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"github.com/partnerguard/partnerguard/proxy"
	"github.com/partnerguard/partnerguard/telemetry"
)

// write is one commit: what goes in, and how far it got.
type write struct {
	now        time.Time
	batch      *batch
	gap        Gap         // goes first
	checkpoint *Checkpoint // goes before the lines of the batch; nil for none
	unfinished []unfinished
	fresh      bool           // in a new segment
	open       []proxy.CallID // for its header

	begun  bool // the new segment has begun
	stands bool // the lines are in the file, though perhaps not on the disk
}

// maxCheckpointLag is how many records may come between what a checkpoint signs and
// its line; well within checkpointReach.
const maxCheckpointLag = checkpointReach / 2

// write appends one group in one write. The caller leads and does not hold mu.
func (l *Ledger) write(w *write) error {
	ld := &l.lead
	if w.fresh {
		if err := l.begin(w); err != nil {
			return err
		}
	}
	if w.checkpoint != nil && ld.seq-w.checkpoint.Commit > maxCheckpointLag {
		w.checkpoint = nil
		wake(l.begun)
	}
	if w.gap.empty() && len(w.unfinished) == 0 && len(w.batch.lines) == 0 && w.checkpoint == nil {
		return nil
	}
	g := &ld.group
	g.begin(ld.seq, ld.hash)
	if !w.gap.empty() {
		g.line(TypeGap, w.gap.appendMembers(nil))
	}
	for _, u := range w.unfinished {
		rec := proxy.Record{Decided: proxy.Decided{Call: u.call}, Finished: proxy.Finished{Error: u.why}}
		g.line(TypeOutcome, telemetry.AppendOutcome(nil, &rec))
	}
	if w.checkpoint != nil {
		g.line(TypeCheckpoint, w.checkpoint.appendMembers(nil))
	}
	start := 0
	for i := range w.batch.lines {
		ln := &w.batch.lines[i]
		typ := TypeDecision
		if ln.outcome {
			typ = TypeOutcome
		}
		g.line(typ, w.batch.members[start:ln.end])
		start = ln.end
	}
	lines, seq, hash := g.commit()
	n, err := ld.f.Write(lines)
	if n == len(lines) {
		ld.seq, ld.hash, ld.end = seq, hash, ld.end+int64(n)
		w.stands = true
	}
	if err != nil {
		// A part of it may be in the file. Never write behind that.
		ld.torn = true
		return fmt.Errorf("write ledger segment %s: %w", segmentName(ld.num), err)
	}
	if l.cfg.SyncAlways {
		if err := ld.f.datasync(); err != nil {
			return fmt.Errorf("sync ledger segment %s: %w", segmentName(ld.num), err)
		}
	}
	return nil
}

// begin starts a new segment. It appears under its name only with its header and
// the header's commit in it, so that no reader ever sees less.
func (l *Ledger) begin(w *write) error {
	ld := &l.lead
	h := header{
		Ledger:   l.id,
		Instance: l.cfg.Instance,
		Time:     w.now.UTC().Format(telemetry.TimeLayout),
		SetAside: ld.aside,
		Open:     w.open,
	}
	if ld.num > 0 {
		h.Prev, h.PrevHash = segmentName(ld.num), encodeHash(ld.hash)
		// One that was set aside is gone from under its name, and nothing is said of
		// what it ends with.
		switch fi, err := os.Stat(segmentPath(l.cfg.Dir, ld.num)); {
		case err == nil:
			h.Torn = fi.Size() - ld.end
		case errors.Is(err, fs.ErrNotExist) && ld.compressed:
			h.Torn = ld.size - ld.end
		case len(ld.aside) == 0:
			return fmt.Errorf("begin ledger segment: %w", err)
		}
	}
	ld.group.begin(ld.seq, ld.hash)
	if err := ld.group.header(h); err != nil {
		return err
	}
	lines, seq, hash := ld.group.commit()

	name := segmentPath(l.cfg.Dir, ld.next)
	if err := l.place(name, lines); err != nil {
		return fmt.Errorf("begin ledger segment %s: %w", segmentName(ld.next), err)
	}
	// From here on the segment is there, whatever happens.
	l.retire(ld.f)
	w.begun = true
	ld.f = nil
	ld.num, ld.next, ld.end = ld.next, ld.next+1, int64(len(lines))
	ld.seq, ld.hash, ld.torn, ld.aside, ld.day = seq, hash, false, nil, day(w.now)
	ld.compressed = false

	if l.cfg.SyncAlways {
		if err := l.files.syncDir(segmentDir(l.cfg.Dir)); err != nil {
			return fmt.Errorf("sync ledger directory: %w", err)
		}
	}
	f, err := l.files.extend(name)
	if err != nil {
		return fmt.Errorf("open ledger segment %s: %w", segmentName(ld.num), err)
	}
	ld.f = f
	return nil
}

// place makes the file name with lines in it. It is closed before it is renamed:
// Windows renames no open file.
func (l *Ledger) place(name string, lines []byte) error {
	tmp := name + ".tmp"
	f, err := l.files.create(tmp)
	if err != nil {
		return err
	}
	_, err = f.Write(lines)
	if err == nil && l.cfg.SyncAlways {
		err = f.datasync()
	}
	err = errors.Join(err, f.Close())
	if err == nil {
		err = l.files.rename(tmp, name)
	}
	if err != nil {
		l.files.remove(tmp)
		return err
	}
	return nil
}
