package ledger

import (
	"crypto/ed25519"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// VerifyOptions is what Verify needs besides the ledger; the zero value takes what
// is in the data directory.
type VerifyOptions struct {
	// Progress, if not nil, hears how many of the bytes are done.
	Progress func(done, total int64)
	// PublicKey is the key whose checkpoints prove the chain. Nil takes ledger.pub of
	// the data directory, and beside it the former ones, ledger-*.pub: who may change
	// the ledger may change these too, so an auditor brings his own copy.
	PublicKey ed25519.PublicKey
	// FormerKeys are further ones that signed before the key was changed.
	FormerKeys []ed25519.PublicKey
	// Checkpoints were kept elsewhere and must be on the chain.
	Checkpoints []Checkpoint
}

// Report is what Verify found.
type Report struct {
	Ledger    string `json:"ledger"` // its identity
	Segments  int    `json:"segments"`
	Decisions uint64 `json:"decisions"`
	Outcomes  uint64 `json:"outcomes"`
	Gaps      uint64 `json:"gaps"`    // gap lines
	Removed   uint64 `json:"removed"` // records that retention removed, one by one
	First     uint64 `json:"first"`   // number of the oldest line that is kept
	Last      uint64 `json:"last"`    // number of the last commit

	// Checkpoints counts the signatures in the ledger that hold. Without a key, when
	// Keys is empty, none can be checked.
	Checkpoints uint64 `json:"checkpoints"`
	// Keys names the keys that checkpoints were checked with.
	Keys []string `json:"keys,omitempty"`
	// Signed is the last checkpoint that holds: all up to its Commit is proved by its
	// key. Nil when there is none.
	Signed *Checkpoint `json:"signed,omitempty"`
	// Unsigned is how many decisions, outcomes and gaps come after that: the chain
	// holds there too, but whoever may write the file may have made it.
	Unsigned uint64 `json:"unsigned"`
	// TooOld are checkpoints of VerifyOptions that sign what retention has removed.
	TooOld int `json:"too_old,omitempty"`

	// Torn lists what crashes and full disks left behind the last commit of a
	// segment; also what a running guard is just writing. It is no damage.
	Torn []Torn `json:"torn,omitempty"`
	// SetAside names the segments that were found damaged at a start and renamed.
	// What they held is not verified.
	SetAside []string `json:"set_aside,omitempty"`
	// Problem is the first thing wrong; nil when the chain holds from the oldest
	// segment to the end.
	Problem *Problem `json:"problem,omitempty"`
}

// Torn is the uncommitted end of a segment.
type Torn struct {
	Segment string `json:"segment"`
	Bytes   int64  `json:"bytes"`
}

// Problem is the first record that is not what was committed.
type Problem struct {
	Segment string `json:"segment"` // the file; checkpoint.json too can be one
	Line    int    `json:"line"`    // from 1, in the file as zstdcat shows it
	Seq     uint64 `json:"record"`  // number of the record, as it stands or as it should
	What    string `json:"what"`
}

func (p *Problem) String() string {
	return fmt.Sprintf("%s line %d, record %d: %s", p.Segment, p.Line, p.Seq, p.What)
}

// Verify walks the chain of the ledger in the data directory dir, from the oldest
// segment that is kept, checks every checkpoint on the way, and stops at the first
// problem. Someone may be writing meanwhile. The error says that the ledger could
// not be read, or is a *FormatError; what is wrong with it stands in the Report.
func Verify(dir string, o VerifyOptions) (Report, error) {
	v := verifier{keys: map[string]ed25519.PublicKey{}}
	if err := v.takeKeys(dir, o); err != nil {
		return Report{}, err
	}
	// Before the walk: it goes at least as far as what was signed by then.
	p, err := v.takeCheckpoints(dir, o.Checkpoints)
	if err != nil || p != nil {
		return Report{Problem: p}, err
	}
	rep, err := walkLedger(dir, v.group, o.Progress)
	if err == nil && rep.Problem == nil {
		rep.Problem = v.end(&rep)
	}
	if at := v.lastAt; err == nil && rep.Problem == nil && o.PublicKey != nil && v.held == 0 && rep.Segments > 0 {
		rep.Problem = &Problem{at.file, at.line, at.seq + 1, "nothing in the ledger is signed with the key " + KeyID(o.PublicKey)}
	}
	rep.Checkpoints, rep.Signed, rep.TooOld = v.held, v.signed, v.tooOld
	rep.Unsigned = v.records - v.proved
	for id := range v.keys {
		rep.Keys = append(rep.Keys, id)
	}
	slices.Sort(rep.Keys)
	return rep, err
}

// walkLedger walks the segments of a ledger and checks that each goes on where the
// one before ends. see looks at every group; it may be nil.
func walkLedger(dir string, see func(*committed) (*Problem, error), progress func(done, total int64)) (Report, error) {
	var rep Report
	nums, err := segments(dir)
	if err != nil {
		return rep, err
	}
	var total, before int64
	sizes := make([]int64, len(nums))
	for i, n := range nums {
		sizes[i] = fileSize(dir, n)
		total += sizes[i]
	}
	var prev *walk // the segment before; nil at the oldest
	for i, num := range nums {
		w, err := walkSegment(dir, num, see, func(done int64) {
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
		before += sizes[i]
		if prev == nil {
			rep.First, rep.Ledger = w.header.N, w.header.Ledger
		} else if rep.Problem = prev.joins(w, &rep); rep.Problem != nil {
			return rep, nil
		}
		rep.Segments++
		rep.Decisions += w.count[TypeDecision]
		rep.Outcomes += w.count[TypeOutcome]
		rep.Gaps += w.count[TypeGap]
		rep.Removed += w.count[typeRemoved]
		rep.Last = w.seq
		rep.SetAside = append(rep.SetAside, w.header.SetAside...)
		if w.damaged() {
			rep.Problem = w.problem
			return rep, nil
		}
		prev = w
	}
	if prev != nil && prev.size > prev.end {
		rep.Torn = append(rep.Torn, Torn{prev.file, prev.size - prev.end})
	}
	return rep, nil
}

// joins checks that next goes on where w ends.
func (w *walk) joins(next *walk, rep *Report) *Problem {
	h := &next.header
	torn := w.size - w.end
	bad := func(format string, args ...any) *Problem {
		return &Problem{next.file, 1, h.N, fmt.Sprintf(format, args...)}
	}
	if next.end == 0 {
		return next.problem // there is no header to go by
	}
	if h.Ledger != w.header.Ledger {
		return bad("belongs to the ledger %s; this one is %s", h.Ledger, w.header.Ledger)
	}
	if h.Prev != w.name {
		// Only a segment that was set aside may stand between.
		aside := slices.ContainsFunc(h.SetAside, func(s string) bool {
			return h.Prev != "" && strings.HasPrefix(s, h.Prev)
		})
		if !aside || h.N <= w.seq {
			return bad("follows segment %q, which is missing; the one before it here is %s", h.Prev, w.name)
		}
		if torn > 0 {
			rep.Torn = append(rep.Torn, Torn{w.file, torn})
		}
		return nil
	}
	switch hash, err := decodeHash(h.PrevHash); {
	case err != nil:
		return bad("%v", err)
	case h.N > w.seq+1 && len(h.SetAside) == 0: // what is set aside takes its numbers along
		return &Problem{w.file, w.lines + 1, w.seq + 1, fmt.Sprintf("the end of the segment is missing: records %d to %d; the next one begins with %d", w.seq+1, h.N-1, h.N)}
	case h.N < w.seq+1:
		return bad("record %d follows record %d of %s", h.N, w.seq, w.name)
	case hash != w.hash:
		return bad("does not follow the last commit of %s: the hashes differ", w.name)
	case h.Torn != torn:
		return &Problem{w.file, w.lines + 1, w.seq + 1, fmt.Sprintf("%d bytes follow the last commit; the next segment says %d", torn, h.Torn)}
	}
	if torn > 0 {
		rep.Torn = append(rep.Torn, Torn{w.file, torn})
	}
	return nil
}

// fileSize is the size of the file that segment num is read from.
func fileSize(dir string, num uint64) int64 {
	for _, path := range []string{segmentPath(dir, num), compressedPath(dir, num)} {
		if fi, err := os.Stat(path); err == nil {
			return fi.Size()
		}
	}
	return 0
}

// verifier checks the checkpoints of a walk.
type verifier struct {
	keys   map[string]ed25519.PublicKey // by KeyID; empty when there is none to check with
	wanted []wanted                     // by commit, those that are still to come
	latest *Checkpoint                  // of checkpoint.json: its line must be there too
	tooOld int

	ledger string
	recent []link // a ring, once full
	n      uint64 // links ever put in

	records uint64 // decisions, outcomes and gaps seen
	held    uint64
	signed  *Checkpoint
	proved  uint64 // records that signed covers
	lastAt  committedAt
}

// wanted is a checkpoint that must be on the chain.
type wanted struct {
	Checkpoint
	from string
}

// link is one commit of the chain.
type link struct {
	seq     uint64
	hash    digest
	records uint64 // up to there
}

type committedAt struct {
	file string
	line int // behind the commit
	seq  uint64
}

// checkpointReach is how many commits may come between one and the line of the
// checkpoint that signs it. A writer that is later than that signs anew.
const checkpointReach = 1 << 16

func (v *verifier) takeKeys(dir string, o VerifyOptions) error {
	add := func(pub ed25519.PublicKey) { v.keys[KeyID(pub)] = pub }
	for _, pub := range o.FormerKeys {
		add(pub)
	}
	if o.PublicKey != nil {
		add(o.PublicKey)
		return nil
	}
	former, err := filepath.Glob(filepath.Join(dir, "ledger-*.pub"))
	if err != nil {
		return fmt.Errorf("list public keys of ledger: %w", err)
	}
	for _, path := range append(former, filepath.Join(dir, publicFile)) {
		switch pub, err := LoadPublicKey(path); {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			return err
		default:
			add(pub)
		}
	}
	return nil
}

// takeCheckpoints notes the checkpoints that must be on the chain, and says which of
// them is false by itself.
func (v *verifier) takeCheckpoints(dir string, given []Checkpoint) (*Problem, error) {
	latest, err := LatestCheckpoint(dir)
	var failed *fs.PathError
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case errors.As(err, &failed):
		return nil, err
	case err != nil:
		return &Problem{checkpointFile, 1, 0, err.Error()}, nil
	default:
		v.latest = &latest
		v.wanted = append(v.wanted, wanted{latest, checkpointFile})
	}
	for _, c := range given {
		v.wanted = append(v.wanted, wanted{c, "a checkpoint that was kept elsewhere"})
	}
	slices.SortFunc(v.wanted, func(a, b wanted) int {
		if a.Commit < b.Commit {
			return -1
		}
		return min(1, int(a.Commit-b.Commit))
	})
	for _, w := range v.wanted {
		if err := v.authentic(&w.Checkpoint); err != nil {
			return &Problem{w.from, 1, w.Commit, err.Error()}, nil
		}
	}
	return nil, nil
}

// authentic checks the signature of c, if there is any key to check with.
func (v *verifier) authentic(c *Checkpoint) error {
	if len(v.keys) == 0 {
		return nil
	}
	pub, ok := v.keys[c.Key]
	if !ok {
		return fmt.Errorf("the checkpoint of record %d is signed with the key %s, which is not the ledger's", c.Commit, c.Key)
	}
	return c.Verify(pub)
}

// group looks at one group of the chain.
func (v *verifier) group(c *committed) (*Problem, error) {
	if v.n == 0 {
		v.put(link{c.first - 1, c.before, 0})
	}
	for i, line := range c.lines {
		_, typ, _, _ := parseHead(line)
		switch typ {
		case TypeDecision, TypeOutcome, TypeGap:
			v.records++
		case TypeHeader:
			if h, err := parseHeader(line, c.file); err == nil {
				v.ledger = h.Ledger
			}
		case TypeCheckpoint:
			if err := v.checkpoint(line); err != nil {
				return &Problem{c.file, c.line + i, c.first + uint64(i), err.Error()}, nil
			}
		}
	}
	v.put(link{c.seq(), c.hash, v.records})
	v.lastAt = committedAt{c.file, c.line + len(c.lines) + 1, c.seq()}
	return v.passed(c), nil
}

// put notes a commit.
func (v *verifier) put(l link) {
	if v.n < checkpointReach {
		v.recent = append(v.recent, l)
	} else {
		v.recent[v.n%checkpointReach] = l
	}
	v.n++
}

// find looks for a commit among the recent ones.
func (v *verifier) find(seq uint64) (link, bool) {
	for i := v.n; i > 0 && v.n-i < checkpointReach; i-- {
		switch l := v.recent[(i-1)%checkpointReach]; {
		case l.seq == seq:
			return l, true
		case l.seq < seq:
			return link{}, false
		}
	}
	return link{}, false
}

// checkpoint checks a checkpoint of the ledger itself.
func (v *verifier) checkpoint(line []byte) error {
	c, err := ParseCheckpoint(line)
	if err != nil {
		return err
	}
	if err := v.authentic(&c); err != nil {
		return err
	}
	if c.Ledger != v.ledger {
		return fmt.Errorf("the checkpoint is of the ledger %s; this one is %s", c.Ledger, v.ledger)
	}
	if v.latest != nil && c.Commit == v.latest.Commit && string(c.Signature) == string(v.latest.Signature) {
		v.latest = nil
	}
	if c.Commit < v.recent[0].seq && v.n <= checkpointReach {
		return nil // it signs what is no longer kept
	}
	l, ok := v.find(c.Commit)
	if !ok {
		return fmt.Errorf("the checkpoint is of record %d, which is no commit before it", c.Commit)
	}
	if l.hash != c.Hash {
		return fmt.Errorf("the checkpoint of record %d signs another chain: the hashes differ", c.Commit)
	}
	if len(v.keys) > 0 {
		v.held++
		v.signed, v.proved = &c, l.records
	}
	return nil
}

// passed checks the wanted checkpoints up to the commit of c.
func (v *verifier) passed(c *committed) *Problem {
	for len(v.wanted) > 0 && v.wanted[0].Commit <= c.seq() {
		w := v.wanted[0]
		v.wanted = v.wanted[1:]
		bad := func(format string, args ...any) *Problem {
			return &Problem{c.file, c.line, c.first, fmt.Sprintf(format, args...)}
		}
		if w.Ledger != v.ledger {
			return bad("%s is of the ledger %s; this one is %s", w.from, w.Ledger, v.ledger)
		}
		if v.n == 2 && w.Commit < c.first-1 { // before the oldest segment
			v.tooOld++
			if w.from == checkpointFile {
				v.latest = nil
			}
			continue
		}
		switch l, ok := v.find(w.Commit); {
		case !ok:
			return bad("%s signs record %d, which is no commit here", w.from, w.Commit)
		case l.hash != w.Hash:
			return bad("%s of %s signs another chain up to record %d: the hashes differ", w.from, w.Time.Format(time.RFC3339), w.Commit)
		case len(v.keys) > 0 && (v.signed == nil || v.signed.Commit < w.Commit):
			signed := w.Checkpoint
			v.signed, v.proved = &signed, l.records
		}
	}
	return nil
}

// end says what is missing behind the last commit.
func (v *verifier) end(rep *Report) *Problem {
	at := v.lastAt
	switch {
	case len(v.wanted) > 0:
		w := v.wanted[len(v.wanted)-1]
		if rep.Segments == 0 {
			return &Problem{w.from, 1, w.Commit, fmt.Sprintf("signs record %d, but there is no segment", w.Commit)}
		}
		return &Problem{at.file, at.line, at.seq + 1, fmt.Sprintf("the end of the ledger is missing: %s of %s signs record %d, the last one here is %d", w.from, w.Time.Format(time.RFC3339), w.Commit, at.seq)}
	case v.latest != nil:
		return &Problem{at.file, at.line, at.seq + 1, fmt.Sprintf("the end of the ledger is missing: the line of the checkpoint of record %d, which is in %s", v.latest.Commit, checkpointFile)}
	}
	return nil
}
