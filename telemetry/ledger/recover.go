package ledger

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// setAside renames a segment that cannot be gone on with, for someone to look at.
// What of it is valid stays in its place.
func (l *Ledger) setAside(w *walk, why error) error {
	dir := segmentDir(l.cfg.Dir)
	prefix := ""
	if w.end > 0 && w.lines > 2 { // more than a header and its commit
		// Where there is no room for it, the file that is set aside still has it.
		prefix = segmentPath(l.cfg.Dir, w.num) + ".tmp"
		if l.copyPrefix(w, prefix) != nil {
			l.files.remove(prefix)
			prefix = ""
		}
	}
	name := w.file + ".damaged-" + l.cfg.Now().UTC().Format("20060102T150405Z")
	err := l.files.rename(filepath.Join(dir, w.file), filepath.Join(dir, name))
	if err == nil && prefix != "" {
		err = l.files.rename(prefix, segmentPath(l.cfg.Dir, w.num))
	}
	if err == nil {
		err = l.files.syncDir(dir)
	}
	if err != nil {
		return fmt.Errorf("set damaged ledger segment aside: %w", err)
	}
	l.lead.aside = append(l.lead.aside, name)
	l.status.SetAside = append(l.status.SetAside, name)
	l.status.Err, l.status.ErrTime = why, l.cfg.Now()
	return nil
}

// copyPrefix writes the valid beginning of a segment to a file of its own.
func (l *Ledger) copyPrefix(w *walk, name string) error {
	from, err := openSegment(l.cfg.Dir, w.num)
	if err != nil {
		return err
	}
	defer from.Close()
	to, err := l.files.create(name)
	if err != nil {
		return err
	}
	_, err = io.CopyN(to, from, w.end)
	if err == nil {
		err = to.datasync()
	}
	return errors.Join(err, to.Close())
}

// dropUnsynced finds where a power failure took the end of a segment although one
// that came later reached the disk, and sets the later ones aside: they prove
// nothing without what they follow, and nobody was told that they are on the disk.
// It returns the segments that are left, the last of them if it was read, and how many
// numbers those set aside may have used.
//
// What the latest checkpoint signs was on the disk before it was signed. If that is
// missing it was no power failure, and nothing is touched: Verify tells of it.
func (l *Ledger) dropUnsynced(nums []uint64) (left []uint64, last *walk, skip uint64, err error) {
	var signed uint64
	switch c, err := LatestCheckpoint(l.cfg.Dir); {
	case err == nil:
		signed = c.Commit
	case !errors.Is(err, fs.ErrNotExist):
		return nums, nil, 0, nil
	}
	// Look no further back than need be: what is compressed, or signed, is whole.
	first := max(len(nums)-1, 0)
	for ; first > 0; first-- {
		if _, err := os.Stat(segmentPath(l.cfg.Dir, nums[first-1])); err != nil {
			break
		}
		if h, err := readHeader(l.cfg.Dir, nums[first]); err == nil && h.N <= signed {
			break
		}
	}
	var prev *walk
	for i := first; i < len(nums); i++ {
		w, err := walkSegment(l.cfg.Dir, nums[i], nil, nil)
		if err != nil {
			return nil, nil, 0, err
		}
		if prev == nil && w.end == 0 && i > 0 {
			if prev, err = walkSegment(l.cfg.Dir, nums[i-1], nil, nil); err != nil {
				return nil, nil, 0, err
			}
		}
		if prev == nil || prev.seq < signed || prev.joins(w, &Report{}) == nil {
			prev = w
			continue
		}
		for _, num := range nums[i:] {
			if w, err = walkSegment(l.cfg.Dir, num, nil, nil); err != nil {
				return nil, nil, 0, err
			}
			skip += uint64(w.size) / shortestLine
			w.end = 0 // nothing of it stays
			why := fmt.Errorf("%s line 1, record %d: follows records that a power failure took", w.file, w.header.N)
			if err := l.setAside(w, why); err != nil {
				return nil, nil, 0, err
			}
		}
		return nums[:i], prev, skip, nil
	}
	return nums, prev, 0, nil
}
