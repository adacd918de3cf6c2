package ledger

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"

	"github.com/google/uuid"
	"github.com/partnerguard/partnerguard/proxy"
)

// Report is what Verify found.
type Report struct {
	Segments  int
	Decisions uint64
	Outcomes  uint64
	Gaps      uint64 // gap lines
	First     uint64 // number of the oldest line that is kept
	Last      uint64 // number of the last commit
	// Torn lists what crashes and full disks left behind the last commit of a
	// segment; also what a running guard is just writing. It is no damage.
	Torn []Torn
	// SetAside names the segments that were found damaged at a start and renamed.
	// What they held is not verified.
	SetAside []string
	// Problem is the first thing wrong; nil when the chain holds from the oldest
	// segment to the end.
	Problem *Problem
}

// Torn is the uncommitted end of a segment.
type Torn struct {
	Segment string
	Bytes   int64
}

// Problem is the first record that is not what was committed.
type Problem struct {
	Segment string
	Line    int    // from 1
	Seq     uint64 // number of the record, as it stands or as it should
	What    string
}

func (p *Problem) String() string {
	return fmt.Sprintf("%s line %d, record %d: %s", p.Segment, p.Line, p.Seq, p.What)
}

// Verify walks the chain of the ledger in the data directory dir, from the oldest
// segment that is kept, and stops at the first problem. Someone may be writing
// meanwhile. progress, if not nil, hears how many of the bytes are done. The error
// says that the ledger could not be read; what is wrong with it stands in the
// Report.
func Verify(dir string, progress func(done, total int64)) (Report, error) {
	var rep Report
	nums, err := segments(dir)
	if err != nil {
		return rep, err
	}
	var total, before int64
	for _, n := range nums {
		if fi, err := os.Stat(segmentPath(dir, n)); err == nil {
			total += fi.Size()
		}
	}
	var prev *walk // the segment before; nil at the oldest
	for _, num := range nums {
		w, err := walkSegment(dir, num, func(done int64) {
			if progress != nil {
				progress(min(before+done, total), total)
			}
		})
		if prev == nil && errors.Is(err, fs.ErrNotExist) {
			continue // retention removed it meanwhile
		}
		if err != nil {
			return rep, err
		}
		before += w.size
		if prev == nil {
			rep.First = w.header.N
		} else if rep.Problem = prev.joins(w, &rep); rep.Problem != nil {
			return rep, nil
		}
		rep.Segments++
		rep.Decisions += w.count[TypeDecision]
		rep.Outcomes += w.count[TypeOutcome]
		rep.Gaps += w.count[TypeGap]
		rep.Last = w.seq
		rep.SetAside = append(rep.SetAside, w.header.SetAside...)
		if w.damaged() {
			rep.Problem = w.problem
			return rep, nil
		}
		prev = w
	}
	if prev != nil && prev.size > prev.end {
		rep.Torn = append(rep.Torn, Torn{prev.name, prev.size - prev.end})
	}
	return rep, nil
}

// joins checks that next goes on where w ends.
func (w *walk) joins(next *walk, rep *Report) *Problem {
	h := &next.header
	torn := w.size - w.end
	if h.Prev != w.name {
		// Only a segment that was set aside may stand between.
		aside := slices.ContainsFunc(h.SetAside, func(s string) bool {
			return h.Prev != "" && strings.HasPrefix(s, h.Prev)
		})
		if !aside || h.N <= w.seq {
			return &Problem{next.name, 1, h.N, fmt.Sprintf("follows segment %q, which is missing; the one before it here is %s", h.Prev, w.name)}
		}
		if torn > 0 {
			rep.Torn = append(rep.Torn, Torn{w.name, torn})
		}
		return nil
	}
	switch hash, err := decodeHash(h.PrevHash); {
	case err != nil:
		return &Problem{next.name, 1, h.N, err.Error()}
	case h.N > w.seq+1 && len(h.SetAside) == 0: // what is set aside takes its numbers along
		return &Problem{w.name, w.lines + 1, w.seq + 1, fmt.Sprintf("the end of the segment is missing: records %d to %d; the next one begins with %d", w.seq+1, h.N-1, h.N)}
	case h.N < w.seq+1:
		return &Problem{next.name, 1, h.N, fmt.Sprintf("record %d follows record %d of %s", h.N, w.seq, w.name)}
	case hash != w.hash:
		return &Problem{next.name, 1, h.N, fmt.Sprintf("does not follow the last commit of %s: the hashes differ", w.name)}
	case h.Torn != torn:
		return &Problem{w.name, w.lines + 1, w.seq + 1, fmt.Sprintf("%d bytes follow the last commit; the next segment says %d", torn, h.Torn)}
	}
	if torn > 0 {
		rep.Torn = append(rep.Torn, Torn{w.name, torn})
	}
	return nil
}

// walk is one segment as it was found.
type walk struct {
	name   string
	num    uint64
	header header

	// Up to the last commit of the valid beginning:
	seq   uint64
	hash  digest
	lines int
	end   int64
	count map[string]uint64
	open  map[proxy.CallID]struct{} // decided, without an outcome

	size    int64
	problem *Problem // the first thing wrong behind end
	// changed says that the problem is not merely the rest of a write that was cut
	// short: a commit stands behind it, or a whole line that was never written so.
	// A line with NUL bytes may be the rest of a write: a power failure can leave
	// blocks that were allocated but not filled.
	changed bool
}

// damaged reports whether more is wrong than a torn end.
func (w *walk) damaged() bool { return w.changed || w.end == 0 }

// errVersion says that a segment was written by a newer program.
var errVersion = errors.New("ledger has a newer format")

// walkSegment reads segment num from its first line on. The error says that it
// could not be read, or wraps errVersion; damage stands in the walk.
func walkSegment(dir string, num uint64, progress func(done int64)) (*walk, error) {
	f, err := os.Open(segmentPath(dir, num))
	if err != nil {
		return nil, fmt.Errorf("read ledger segment: %w", err)
	}
	defer f.Close()
	w := &walk{
		name:  segmentName(num),
		num:   num,
		count: map[string]uint64{},
		open:  map[proxy.CallID]struct{}{},
	}
	var (
		in     = bufio.NewReaderSize(f, 1<<20)
		group  []byte // hash of the commit before, then the lines since
		begins []int  // where the lines of group begin
		first  uint64 // number of the first line of group
		line   int    // lines read
		shown  int64
	)
	bad := func(l int, seq uint64, format string, args ...any) {
		if w.problem == nil {
			w.problem = &Problem{w.name, l, seq, fmt.Sprintf(format, args...)}
		}
	}
	for {
		if w.problem != nil {
			group = group[:0] // only commits matter from here on
		}
		at := len(group)
		for {
			part, rerr := in.ReadSlice('\n')
			group = append(group, part...)
			if err = rerr; !errors.Is(err, bufio.ErrBufferFull) {
				break
			}
		}
		if err != nil && !errors.Is(err, io.EOF) {
			return nil, fmt.Errorf("read ledger segment %s: %w", w.name, err)
		}
		text := group[at:]
		if len(text) == 0 {
			break
		}
		line++
		w.size += int64(len(text))
		if progress != nil && w.size-shown >= 1<<20 {
			shown = w.size
			progress(w.size)
		}
		seq, typ, rest, ok := parseHead(text)
		if line == 1 && ok {
			if w.header, err = parseHeader(text); err != nil {
				if w.header.Version > formatVersion {
					return nil, fmt.Errorf("%w: segment %s %w", errVersion, w.name, err)
				}
				bad(1, seq, "%v", err)
			} else if w.hash, err = decodeHash(w.header.PrevHash); err != nil {
				bad(1, seq, "%v", err)
			} else {
				group = append(w.hash[:], text...)
				at, text = len(w.hash), group[len(w.hash):]
				rest = text[len(text)-len(rest):]
				w.seq = w.header.N - 1
				first = w.header.N
			}
		}
		if w.problem == nil {
			want := first + uint64(len(begins))
			switch {
			case !ok && text[len(text)-1] != '\n':
				bad(line, want, "the line is cut short")
			case !ok:
				bad(line, want, "not a record")
			case seq != want:
				bad(line, seq, "record %d stands where %d belongs", seq, want)
			case typ == TypeHeader && line > 1:
				bad(line, seq, "a header in the middle of a segment")
			}
			if w.problem != nil && text[len(text)-1] == '\n' && bytes.IndexByte(text, 0) < 0 {
				w.changed = true
			}
		}
		if typ != typeCommit {
			begins = append(begins, at)
			continue
		}
		hash, ok := parseCommit(rest)
		switch {
		case !ok:
			bad(line, seq, "the commit is not readable")
			w.changed = true
			continue
		case w.problem == nil && sha256.Sum256(group[:at]) != hash:
			w.blame(group[:at], begins, first, line)
		}
		if w.problem != nil {
			w.changed = true
			continue
		}
		for i, b := range begins {
			e := at
			if i+1 < len(begins) {
				e = begins[i+1]
			}
			w.take(group[b:e])
		}
		w.seq, w.hash, w.lines, w.end = seq, hash, line, w.size
		group, begins, first = append(group[:0], hash[:]...), begins[:0], seq+1
	}
	if w.end == 0 {
		bad(1, 1, "the segment has no header")
	}
	return w, nil
}

// take counts a committed line.
func (w *walk) take(line []byte) {
	_, typ, rest, _ := parseHead(line)
	w.count[typ]++
	switch typ {
	case TypeHeader:
		for _, id := range w.header.Open {
			w.open[id] = struct{}{}
		}
	case TypeDecision, TypeOutcome:
		id, ok := parseCall(rest)
		if !ok {
			return
		}
		if typ == TypeDecision {
			w.open[id] = struct{}{}
		} else {
			delete(w.open, id)
		}
	}
}

// blame names the line of a group whose hash does not match, as far as that can be
// told: a line that is no JSON, else the group.
func (w *walk) blame(group []byte, begins []int, first uint64, commit int) {
	line := commit - len(begins)
	for i, b := range begins {
		e := len(group)
		if i+1 < len(begins) {
			e = begins[i+1]
		}
		if !json.Valid(group[b:e]) {
			w.problem = &Problem{w.name, line + i, first + uint64(i), "not valid JSON"}
			return
		}
	}
	what := "changed since it was committed: the hash differs"
	if n := len(begins); n > 1 {
		what = fmt.Sprintf("one of the records %d to %d changed since they were committed: the hash differs", first, first+uint64(n)-1)
	}
	w.problem = &Problem{w.name, line, first, what}
}

// parseCall reads the call id that a decision or outcome begins with.
func parseCall(rest []byte) (proxy.CallID, bool) {
	s, ok := bytes.CutPrefix(rest, []byte(`,"call":"`))
	if !ok || len(s) < 37 || s[36] != '"' {
		return proxy.CallID{}, false
	}
	id, err := uuid.ParseBytes(s[:36])
	return id, err == nil
}
