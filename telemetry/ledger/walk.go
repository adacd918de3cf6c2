package ledger

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/google/uuid"
	"github.com/partnerguard/partnerguard/proxy"
)

// walk is one segment as it was found.
type walk struct {
	name   string
	file   string // name of the file: that, or compressed
	num    uint64
	header header

	// Up to the last commit of the valid beginning:
	seq    uint64
	hash   digest
	lines  int
	end    int64
	count  map[string]uint64
	open   map[proxy.CallID]struct{} // decided, without an outcome
	sealed uint64                    // the last commit of a checkpoint alone, right behind what it signs

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

// compressed reports whether the segment was read from a compressed file.
func (w *walk) compressed() bool { return w.file != w.name }

// committed is a group of lines that the chain proves, and the commit that closes
// it. It is valid until the walk goes on.
type committed struct {
	file   string // base name of the segment's file
	line   int    // where the first line stands, from 1
	first  uint64 // number of the first line
	lines  [][]byte
	commit []byte // its line
	before digest // of the commit before
	hash   digest // of this one
}

// seq is the number of the commit.
func (c *committed) seq() uint64 { return c.first + uint64(len(c.lines)) }

// maxGroup is more than what one commit covers ever has, in bytes.
const maxGroup = 256 << 20

// walker reads one segment.
type walker struct {
	*walk
	in *bufio.Reader

	text []byte // lines since the last commit, and the line being read
	ends []int  // where each of the lines before that ends in text
	sums []byte // digest of the last commit, then of each of the lines
	crcs []byte // what a check should say of them
	said []byte // the check of a commit
	line int    // read
	next uint64 // number of the next line
	c    committed
}

// walkSegment reads segment num from its first line on, and lets see look at each
// group that holds; a problem that it finds counts as a change. The error says that
// the segment could not be read, wraps a *FormatError, or comes from see; damage
// stands in the walk. see and progress may be nil; progress hears how many bytes of
// the file are read.
func walkSegment(dir string, num uint64, see func(*committed) (*Problem, error), progress func(done int64)) (*walk, error) {
	f, err := openSegment(dir, num)
	if err != nil {
		return nil, fmt.Errorf("read ledger segment: %w", err)
	}
	defer f.Close()
	return walkFile(f, num, see, progress)
}

// walkFile is walkSegment for a file that is open.
func walkFile(f *segmentFile, num uint64, see func(*committed) (*Problem, error), progress func(done int64)) (*walk, error) {
	w := &walker{
		walk: &walk{
			name: segmentName(num), file: f.name, num: num,
			count: map[string]uint64{}, open: map[proxy.CallID]struct{}{},
		},
		in:   bufio.NewReaderSize(f, 1<<20),
		next: 1,
	}
	var shown int64
	for {
		line, err := w.read()
		if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, errUnreadable) {
			return nil, fmt.Errorf("read ledger segment %s: %w", w.file, err)
		}
		if errors.Is(err, errUnreadable) {
			w.line++
			w.bad(w.next, "%v", err)
			w.changed = true
			break
		}
		if len(line) == 0 {
			break
		}
		if err := w.judge(line, see); err != nil {
			return nil, err
		}
		if progress != nil && w.size-shown >= 1<<20 {
			shown = w.size
			progress(f.consumed())
		}
	}
	if w.end == 0 {
		w.line = 1
		w.bad(1, "the segment has no header")
	}
	return w.walk, nil
}

// read returns the next line, with its line feed if it has one.
func (w *walker) read() ([]byte, error) {
	if w.problem != nil { // only commits matter from here on
		w.text, w.ends = w.text[:0], w.ends[:0]
	}
	start := len(w.text)
	for {
		part, err := w.in.ReadSlice('\n')
		w.text = append(w.text, part...)
		if len(w.text) > maxGroup {
			return nil, fmt.Errorf("%w: %d MiB without a commit", errUnreadable, maxGroup>>20)
		}
		if !errors.Is(err, bufio.ErrBufferFull) {
			return w.text[start:], err
		}
	}
}

func (w *walker) bad(seq uint64, format string, args ...any) {
	if w.problem == nil {
		w.problem = &Problem{w.file, w.line, seq, fmt.Sprintf(format, args...)}
	}
}

// judge takes one line, which is the end of w.text.
func (w *walker) judge(line []byte, see func(*committed) (*Problem, error)) error {
	w.line++
	w.size += int64(len(line))
	seq, typ, rest, ok := parseHead(line)
	if w.line == 1 && ok {
		if err := w.begin(line, seq); err != nil {
			return err
		}
	}
	if w.problem == nil {
		switch {
		case !ok && line[len(line)-1] != '\n':
			w.bad(w.next, "the line is cut short")
		case !ok:
			w.bad(w.next, "not a record")
		case seq != w.next:
			w.bad(seq, "record %d stands where %d belongs", seq, w.next)
		case typ == TypeHeader && w.line > 1:
			w.bad(seq, "a header in the middle of a segment")
		}
		if w.problem != nil && line[len(line)-1] == '\n' && bytes.IndexByte(line, 0) < 0 {
			w.changed = true
		}
	}
	if typ == typeCommit {
		return w.commit(seq, line, rest, see)
	}
	if w.problem != nil {
		return nil
	}
	sum, ok := lineDigest(line, typ, rest)
	if !ok {
		w.bad(seq, "says that a record was removed, but not which")
		w.changed = true
		return nil
	}
	w.next++
	w.ends = append(w.ends, len(w.text))
	w.sums = append(w.sums, sum[:]...)
	w.crcs = appendCheck(w.crcs, line)
	return nil
}

// begin reads the header.
func (w *walker) begin(line []byte, seq uint64) error {
	var err error
	if w.header, err = parseHeader(line, w.file); err != nil {
		var format *FormatError
		if errors.As(err, &format) {
			return err
		}
		w.bad(seq, "%v", err)
		return nil
	}
	if w.hash, err = decodeHash(w.header.PrevHash); err != nil {
		w.bad(seq, "%v", err)
		return nil
	}
	w.seq, w.next = w.header.N-1, w.header.N
	w.sums = append(w.sums[:0], w.hash[:]...)
	return nil
}

// restart begins a group behind the last commit.
func (w *walker) restart() {
	w.text, w.ends, w.crcs = w.text[:0], w.ends[:0], w.crcs[:0]
	w.sums = append(w.sums[:0], w.hash[:]...)
}

// commit compares the lines with what their commit says of them.
func (w *walker) commit(seq uint64, line, rest []byte, see func(*committed) (*Problem, error)) error {
	said, ok := parseCommit(w.said[:0], rest)
	w.said = said
	if !ok {
		w.bad(seq, "the commit is not readable")
	}
	if w.problem != nil {
		w.changed = true
		return nil
	}
	hash := digest(sha256.Sum256(w.sums))
	if crcs := said[checkHash:]; !bytes.Equal(said[:checkHash], hash[:checkHash]) || !bytes.Equal(crcs, w.crcs) {
		w.blame(seq, bytes.Equal(said[:checkHash], hash[:checkHash]), crcs)
		w.changed = true
		return nil
	}
	c := &w.c
	*c = committed{
		file: w.file, line: w.line - len(w.ends), first: seq - uint64(len(w.ends)),
		lines: c.lines[:0], commit: line, before: w.hash, hash: hash,
	}
	start := 0
	for _, end := range w.ends {
		c.lines = append(c.lines, w.text[start:end])
		start = end
	}
	if see != nil {
		p, err := see(c)
		if err != nil {
			return err
		}
		if p != nil {
			w.problem, w.changed = p, true
			return nil
		}
	}
	for _, l := range c.lines {
		w.take(l)
	}
	if _, typ, _, _ := parseHead(c.lines[0]); typ == TypeCheckpoint && len(c.lines) == 1 {
		if cp, err := ParseCheckpoint(c.lines[0]); err == nil && cp.Commit == c.first-1 {
			w.sealed = seq
		}
	}
	w.seq, w.hash, w.lines, w.end, w.next = seq, hash, w.line, w.size, seq+1
	w.restart()
	return nil
}

// take counts a committed line.
func (w *walker) take(line []byte) {
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

// blame names the line of a group whose check fails: the first one that is not what
// its part of the check says, else the commit itself.
func (w *walker) blame(seq uint64, hashHolds bool, crcs []byte) {
	n := len(w.ends)
	switch {
	case n == 0:
		w.bad(seq, "the commit follows no record")
		return
	case len(crcs) != n*checkLine:
		w.bad(seq, "the commit was changed: it is of %d records, %d stand before it", len(crcs)/checkLine, n)
		return
	case hashHolds:
		w.bad(seq, "the commit was changed: the records are what its hash says")
		return
	}
	start := 0
	for i, end := range w.ends {
		l := w.text[start:end]
		start = end
		if lineCheck(l) == binary.BigEndian.Uint16(crcs[i*checkLine:]) {
			continue
		}
		what := "changed since it was committed: the hash differs"
		if !json.Valid(l) {
			what = "changed since it was committed: not valid JSON"
		}
		w.problem = &Problem{w.file, w.line - n + i, seq - uint64(n-i), what}
		return
	}
	w.bad(seq, "the hash of the commit differs from that of the records %d to %d before it", seq-uint64(n), seq-1)
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
