package ledger

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/klauspost/compress/zstd"
)

// tend compresses and removes segments, in its own goroutine: it may take as long as
// it needs. It begins when a segment is done and once an hour.
func (l *Ledger) tend(p pace) {
	defer l.tasks.Done()
	tick := time.NewTicker(p.prune)
	defer tick.Stop()
	for {
		select {
		case <-l.stop:
			return
		case <-tick.C:
		case <-l.closing:
		}
		now := l.cfg.Now()
		for _, work := range []func() error{
			func() error { return l.prune(now) },
			func() error { return l.removeTenants(now, p) },
			func() error { return l.compress(p) },
			l.limit,
		} {
			if err := work(); errors.Is(err, errClosed) {
				return
			} else if err != nil {
				l.upkeepFailed(err)
			}
		}
	}
}

// compress compresses the segments that are done.
func (l *Ledger) compress(p pace) error {
	nums, err := segments(l.cfg.Dir)
	if err != nil || len(nums) == 0 {
		return err
	}
	// The last one is being written, or may be gone on with.
	nums = slices.DeleteFunc(nums[:len(nums)-1], func(num uint64) bool {
		_, err := os.Stat(segmentPath(l.cfg.Dir, num))
		return errors.Is(err, fs.ErrNotExist)
	})
	if len(nums) > 2 {
		p.rest = min(p.rest, 1) // they come faster than this keeps up with
	}
	for _, num := range nums {
		switch _, err := os.Stat(segmentPath(l.cfg.Dir, num)); {
		case errors.Is(err, fs.ErrNotExist):
			continue
		case err != nil:
			return fmt.Errorf("compress ledger segment: %w", err)
		}
		if !l.cfg.Compress {
			// A compressed one beside it is of a death in the middle of the work.
			if err := l.files.remove(compressedPath(l.cfg.Dir, num)); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("remove compressed ledger segment: %w", err)
			}
			continue
		}
		if err := compressSegment(l.files, l.cfg.Dir, num, l.rest(p)); err != nil {
			return fmt.Errorf("compress ledger segment %s: %w", segmentName(num), err)
		}
	}
	return nil
}

// rest returns what paces work in the background: called again and again, it pauses
// a multiple of the time since the last pause, so that calls find a core free. It
// returns errClosed when the ledger is being closed.
func (l *Ledger) rest(p pace) func() error {
	began := time.Now()
	return func() error {
		if worked := time.Since(began); worked > 2*time.Millisecond {
			select {
			case <-l.stop:
				return errClosed
			case <-time.After(time.Duration(p.rest) * worked):
			}
			began = time.Now()
		}
		select {
		case <-l.stop:
			return errClosed
		default:
			return nil
		}
	}
}

// compressSegment puts a compressed file in the place of segment num. The original
// goes once the other is on the disk, under its name, and read back equal. A death
// at any moment leaves the original, or the whole of the other, or both.
func compressSegment(files files, dir string, num uint64, rest func() error) error {
	f, err := os.Open(segmentPath(dir, num))
	if err != nil {
		return err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	path := compressedPath(dir, num)
	sum := sha256.New()
	err = replaceSegment(files, path, fi.Size(), func(w io.Writer) error {
		return paced(w, io.TeeReader(f, sum), rest)
	}, func(written *segmentFile) error {
		again := sha256.New()
		if err := paced(again, written, rest); err != nil {
			return err
		}
		if !bytes.Equal(sum.Sum(nil), again.Sum(nil)) {
			return errors.New("what was written reads differently; the segment stays as it is")
		}
		return nil
	})
	if err != nil {
		return err
	}
	f.Close() // Windows removes no open file
	if err := files.remove(segmentPath(dir, num)); errors.Is(err, fs.ErrNotExist) {
		// Someone pruned it meanwhile: it must not come back.
		return files.remove(path)
	} else if err != nil {
		return err
	}
	return files.syncDir(segmentDir(dir))
}

// replaceSegment makes the compressed file path of what write gives, size bytes, by
// way of another name. It takes its place once it is on the disk and check has read
// it.
func replaceSegment(files files, path string, size int64, write func(io.Writer) error, check func(*segmentFile) error) error {
	return replaceBy(files, path, func(f file) error { return encode(f, size, write) }, openCompressed, check)
}

// replacePlain is replaceSegment for a file that is not compressed.
func replacePlain(files files, path string, write func(io.Writer) error, check func(*segmentFile) error) error {
	return replaceBy(files, path, func(f file) error { return write(f) }, openPlain, check)
}

func encode(f file, size int64, write func(io.Writer) error) error {
	// Of what a call's lines hold little repeats nearby: the better level saves a tenth,
	// and so does a window of 4 MiB instead of 1; the best level, at a third of the
	// speed, and 8 MiB save 2 % more each.
	enc, err := zstd.NewWriter(f, zstd.WithEncoderLevel(zstd.SpeedBetterCompression),
		zstd.WithEncoderConcurrency(1), zstd.WithLowerEncoderMem(true), zstd.WithWindowSize(4<<20))
	if err != nil {
		return err
	}
	enc.ResetContentSize(f, size)
	return errors.Join(write(enc), enc.Close())
}

func replaceBy(files files, path string, write func(file) error, open func(string) (*segmentFile, error), check func(*segmentFile) error) (err error) {
	tmp := path + ".tmp"
	f, err := files.create(tmp)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			files.remove(tmp)
		}
	}()
	if err = write(f); err == nil {
		err = f.datasync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	written, err := open(tmp)
	if err != nil {
		return err
	}
	if err = errors.Join(check(written), written.Close()); err != nil {
		return err
	}
	if err = files.rename(tmp, path); err != nil {
		return err
	}
	return files.syncDir(filepath.Dir(path))
}

// paced copies from to to in small steps, with rests.
func paced(to io.Writer, from io.Reader, rest func() error) error {
	buf := make([]byte, 128<<10)
	for {
		n, err := io.ReadFull(from, buf)
		if n > 0 {
			if _, err := to.Write(buf[:n]); err != nil {
				return err
			}
		}
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, errUnreadable):
			return nil
		case err != nil:
			return err
		}
		if err := rest(); err != nil {
			return err
		}
	}
}
