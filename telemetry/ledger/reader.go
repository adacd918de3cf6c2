package ledger

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"
)

// Position is a place between two records. The zero Position is the beginning of
// the oldest segment.
//
// It counts bytes of what the segment holds, compressed or not. Retention by tenant
// leaves every place where it is.
type Position struct {
	Segment uint64 `json:"segment"`
	Offset  int64  `json:"offset"`
}

// ErrPosition says that a Position lies beyond the end of the ledger: it belongs
// to another one, or the ledger was removed since. A view built up to there must
// be built anew.
var ErrPosition = errors.New("position is beyond the end of the ledger")

// DamageError is a group of lines that a Reader could not deliver.
type DamageError struct {
	Segment string
	Offset  int64 // of the bad line
	Problem string
}

func (e *DamageError) Error() string {
	return fmt.Sprintf("ledger segment %s is damaged at byte %d: %s", e.Segment, e.Offset, e.Problem)
}

// Entry is one committed record.
type Entry struct {
	Seq  uint64 // of the line; commits and removed records count too
	Type string // one of the Type constants
	// Line is the whole JSON object without the line feed, valid until the next
	// call of Next.
	Line []byte
	// Next is where to go on after this record. Behind the last one it equals what
	// Tail returns.
	Next Position
}

// Reader follows a ledger from a Position on, across segments, while another
// process may be writing it. It takes no lock. It delivers only what a commit
// covers, but does not check the chain: that is Verify's. It is not safe for
// concurrent use.
type Reader struct {
	dir  string
	f    *segmentFile // nil before the first segment was found
	seg  uint64       // that f is
	from uint64       // the first one that may come next

	buf       []byte
	base      int64 // offset in the file of buf[0]
	next      int   // in buf: the line to deliver
	committed int   // in buf: behind the last commit line
	scanned   int   // in buf: behind the last complete line looked at
	seq       uint64
	check     []byte       // room for that of a commit
	damage    *DamageError // in the group being read
	last      bool         // a later segment exists, so that this one grows no more
	broken    bool         // f cannot be read any further; damage says why
}

// readSize is how much a Reader asks for at a time.
const readSize = 256 << 10

// NewReader returns a Reader that begins at from, or with the oldest segment that
// is left if retention removed the one of from. dir is the data directory; the
// ledger in it need not exist yet. The error wraps ErrPosition when from lies
// beyond the end. Close releases the Reader.
func NewReader(dir string, from Position) (*Reader, error) {
	r := &Reader{dir: dir}
	nums, err := segments(dir)
	if err != nil {
		return nil, err
	}
	if from == (Position{}) {
		return r, nil
	}
	if len(nums) == 0 || nums[len(nums)-1] < from.Segment {
		return nil, fmt.Errorf("read ledger from segment %d: %w", from.Segment, ErrPosition)
	}
	r.from = from.Segment
	if !slices.Contains(nums, from.Segment) {
		return r, nil
	}
	switch err := r.open(from.Segment, from.Offset); {
	case err == nil, errors.Is(err, fs.ErrNotExist): // removed just now
		return r, nil
	case errors.Is(err, io.EOF) && cutBack(dir, nums, from.Segment):
		// What was read of it beyond its end was good when it was read.
		r.from = from.Segment + 1
		return r, nil
	case errors.Is(err, io.EOF):
		return nil, fmt.Errorf("read ledger segment %s from byte %d: %w", segmentName(from.Segment), from.Offset, ErrPosition)
	default:
		return nil, err
	}
}

// cutBack reports whether segment num was damaged, so that only its beginning stands
// under its name: the segment that came next says what was set aside.
func cutBack(dir string, nums []uint64, num uint64) bool {
	i := slices.Index(nums, num) + 1
	if i == len(nums) {
		return false
	}
	h, err := readHeader(dir, nums[i])
	return err == nil && slices.ContainsFunc(h.SetAside, func(name string) bool { return strings.HasPrefix(name, segmentName(num)) })
}

// Next returns the next record. io.EOF means that all that is committed has been
// read; call again later. After a *DamageError Next goes on with the next group of
// lines. A *FormatError stays. Other errors come from the file system.
func (r *Reader) Next() (Entry, error) {
	for r.next >= r.committed {
		if r.f == nil {
			if err := r.advance(); err != nil {
				return Entry{}, err
			}
		}
		grew, err := r.fill()
		if err != nil {
			return Entry{}, err
		}
		if err := r.scan(); err != nil {
			return Entry{}, err
		}
		if r.next < r.committed {
			continue
		}
		if r.broken {
			d := r.damage
			r.Close()
			return Entry{}, d
		}
		if grew {
			continue
		}
		if r.last {
			if err := r.advance(); err != nil {
				return Entry{}, err
			}
			continue
		}
		// The writer never returns to a segment once a later one has appeared: look
		// for one, and read what may have come in the meantime before going there.
		nums, err := segments(r.dir)
		if err != nil {
			return Entry{}, err
		}
		if len(nums) == 0 || nums[len(nums)-1] <= r.seg {
			return Entry{}, io.EOF
		}
		r.last = true
	}
	line := r.line(r.next)
	seq, typ, _, _ := parseHead(line)
	r.next += len(line)
	r.skip()
	return Entry{
		Seq:  seq,
		Type: typ,
		Line: line[:len(line)-1],
		Next: Position{Segment: r.seg, Offset: r.base + int64(r.next)},
	}, nil
}

// Close releases the file that the Reader holds.
func (r *Reader) Close() error {
	if r.f == nil {
		return nil
	}
	err := r.f.Close()
	r.f = nil
	return err
}

// open begins with segment num at offset. The error wraps fs.ErrNotExist when it is
// gone, and io.EOF when it has no such place.
func (r *Reader) open(num uint64, offset int64) error {
	f, err := openSegment(r.dir, num)
	if err != nil {
		return fmt.Errorf("read ledger: %w", err)
	}
	r.Close()
	*r = Reader{dir: r.dir, f: f, seg: num, from: num + 1, buf: r.buf[:0], base: offset}
	switch err := f.skip(offset); {
	case errors.Is(err, errUnreadable):
		r.breaks(err)
	case err != nil:
		r.Close()
		return fmt.Errorf("read ledger: %w", err)
	}
	return nil
}

// advance opens the next segment; io.EOF when there is none yet.
func (r *Reader) advance() error {
	nums, err := segments(r.dir)
	if err != nil {
		return err
	}
	for _, n := range nums {
		if n >= r.from {
			err := r.open(n, 0)
			if errors.Is(err, fs.ErrNotExist) {
				continue // retention was quicker
			}
			return err
		}
	}
	return io.EOF
}

// breaks notes that nothing more can be read of the segment.
func (r *Reader) breaks(err error) {
	r.bad(r.base+int64(len(r.buf)), err.Error())
	r.broken = true
}

// fill reads on, and reports whether anything came.
func (r *Reader) fill() (bool, error) {
	if r.broken {
		return false, nil
	}
	if r.next > 0 {
		n := copy(r.buf, r.buf[r.next:])
		r.buf = r.buf[:n]
		r.base += int64(r.next)
		r.committed -= r.next
		r.scanned -= r.next
		r.next = 0
	}
	have := len(r.buf)
	r.buf = slices.Grow(r.buf, readSize)
	n, err := r.f.Read(r.buf[have : have+readSize])
	r.buf = r.buf[:have+n]
	switch {
	case errors.Is(err, errUnreadable):
		r.breaks(err)
	case err != nil && !errors.Is(err, io.EOF):
		return n > 0, fmt.Errorf("read ledger: %w", err)
	}
	return n > 0, nil
}

// scan looks at the lines that are complete and moves committed behind the last
// commit among them. A group with a bad line is passed over and reported once.
func (r *Reader) scan() error {
	for {
		line := r.line(r.scanned)
		if line == nil {
			return nil
		}
		at := r.base + int64(r.scanned)
		r.scanned += len(line)
		seq, typ, rest, ok := parseHead(line)
		switch {
		case !ok:
			r.bad(at, "not a record")
		case r.seq != 0 && seq != r.seq+1 && r.damage == nil:
			r.bad(at, fmt.Sprintf("record %d follows record %d", seq, r.seq))
		}
		if ok {
			r.seq = seq
		}
		if typ == TypeHeader {
			var format *FormatError
			if _, err := parseHeader(line, r.f.name); errors.As(err, &format) {
				r.scanned -= len(line)
				return format
			}
		}
		if typ != typeCommit {
			continue
		}
		if r.check, ok = parseCommit(r.check[:0], rest); !ok {
			r.bad(at, "not a commit")
			continue
		}
		if d := r.damage; d != nil {
			// Deliver what came before the bad group first.
			if r.next < r.committed {
				r.scanned -= len(line)
				r.seq--
				return nil
			}
			r.damage = nil
			r.next, r.committed = r.scanned, r.scanned
			return d
		}
		r.committed = r.scanned
		r.skip()
	}
}

func (r *Reader) bad(at int64, problem string) {
	if r.damage == nil {
		r.damage = &DamageError{Segment: segmentName(r.seg), Offset: at, Problem: problem}
	}
}

// skip moves next over commits and removed lines, so that a Position never stands
// before one that has been seen.
func (r *Reader) skip() {
	for r.next < r.committed {
		line := r.line(r.next)
		if _, typ, _, _ := parseHead(line); typ != typeCommit && typ != typeRemoved {
			return
		}
		r.next += len(line)
	}
}

// line returns the complete line at buf[at:], with its line feed, or nil.
func (r *Reader) line(at int) []byte {
	n := bytes.IndexByte(r.buf[at:], '\n')
	if n < 0 {
		return nil
	}
	return r.buf[at : at+n+1]
}

// Tail returns the end of the committed ledger in dir and the time of the last
// write there, so that a follower can say how far it lags. A ledger that does not
// exist has the zero Position.
func Tail(dir string) (Position, time.Time, error) {
	nums, err := segments(dir)
	if err != nil || len(nums) == 0 {
		return Position{}, time.Time{}, err
	}
	num := nums[len(nums)-1]
	f, err := os.Open(segmentPath(dir, num))
	if errors.Is(err, fs.ErrNotExist) {
		return compressedTail(dir, num)
	}
	if err != nil {
		return Position{}, time.Time{}, fmt.Errorf("read ledger: %w", err)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return Position{}, time.Time{}, fmt.Errorf("read ledger: %w", err)
	}
	for size := int64(64 << 10); ; size *= 4 {
		size = min(size, fi.Size())
		buf := make([]byte, size)
		if _, err := f.ReadAt(buf, fi.Size()-size); err != nil && !errors.Is(err, io.EOF) {
			return Position{}, time.Time{}, fmt.Errorf("read ledger: %w", err)
		}
		if end := lastCommit(buf); end > 0 {
			return Position{Segment: num, Offset: fi.Size() - size + int64(end)}, fi.ModTime(), nil
		}
		if size == fi.Size() {
			return Position{Segment: num}, fi.ModTime(), nil
		}
	}
}

// compressedTail is Tail of a ledger whose last segment is compressed: one behind it
// was set aside, and the next has not begun.
func compressedTail(dir string, num uint64) (Position, time.Time, error) {
	fi, err := os.Stat(compressedPath(dir, num))
	if err != nil {
		return Position{}, time.Time{}, fmt.Errorf("read ledger: %w", err)
	}
	w, err := walkSegment(dir, num, nil, nil)
	if err != nil {
		return Position{}, time.Time{}, err
	}
	return Position{Segment: num, Offset: w.end}, fi.ModTime(), nil
}

// lastCommit returns where the last commit line in buf ends, 0 if there is none.
func lastCommit(buf []byte) int {
	for end := bytes.LastIndexByte(buf, '\n') + 1; end > 0; {
		start := bytes.LastIndexByte(buf[:end-1], '\n') + 1
		if _, typ, rest, ok := parseHead(buf[start:end]); ok && typ == typeCommit {
			if _, ok := parseCommit(nil, rest); ok {
				return end
			}
		}
		end = start
	}
	return 0
}
