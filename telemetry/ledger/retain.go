package ledger

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/partnerguard/partnerguard/proxy"
)

// prune removes the segments that are too old for every tenant.
func (l *Ledger) prune(now time.Time) error {
	if l.cfg.Retention < 0 {
		return nil
	}
	longest := l.cfg.Retention
	for _, d := range l.cfg.TenantRetention {
		longest = max(longest, d)
	}
	_, err := prune(l.files, l.cfg.Dir, now.Add(-longest))
	return err
}

// Prune removes the segments in the data directory dir that end before the given
// time, and the damaged files that are older; a guard may be writing there. The
// last segment always stays. It returns the names of what it removed.
func Prune(dir string, before time.Time) ([]string, error) { return prune(osFiles{}, dir, before) }

func prune(files files, dir string, before time.Time) ([]string, error) {
	due, err := prunable(dir, before)
	var gone []string
	for _, p := range due {
		for _, path := range p.paths {
			if err := files.remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return gone, fmt.Errorf("remove old ledger segment: %w", err)
			}
		}
		gone = append(gone, p.Name)
	}
	return gone, err
}

// Prunable is a segment, or a file that was set aside, that Prune would remove.
type Prunable struct {
	Name  string
	Bytes int64 // on the disk
	paths []string
}

// WouldPrune returns what Prune with the same arguments would remove.
func WouldPrune(dir string, before time.Time) ([]Prunable, error) { return prunable(dir, before) }

func prunable(dir string, before time.Time) ([]Prunable, error) {
	ends, err := segmentEnds(dir)
	if err != nil {
		return nil, err
	}
	var due []Prunable
	for _, s := range ends {
		if s.open || !s.end.Before(before) {
			break
		}
		due = append(due, segmentFiles(dir, s.num))
	}
	var damaged []string
	for _, form := range []string{segmentSuffix, segmentSuffix + compressedSuffix} {
		names, err := filepath.Glob(filepath.Join(segmentDir(dir), "*"+form+".damaged-*"))
		if err != nil {
			return due, fmt.Errorf("list damaged ledger segments: %w", err)
		}
		damaged = append(damaged, names...)
	}
	for _, path := range damaged {
		if fi, err := os.Stat(path); err == nil && fi.ModTime().Before(before) {
			due = append(due, Prunable{filepath.Base(path), fi.Size(), []string{path}})
		}
	}
	return due, nil
}

// segmentFiles returns the files of a segment; those of a death during compression
// are two.
func segmentFiles(dir string, num uint64) Prunable {
	p := Prunable{Name: segmentName(num)}
	for _, path := range []string{compressedPath(dir, num), segmentPath(dir, num)} {
		if fi, err := os.Stat(path); err == nil {
			p.Bytes += fi.Size()
			p.paths = append(p.paths, path)
		}
	}
	return p
}

// segmentEnd says when a segment ended: when the next one began.
type segmentEnd struct {
	num  uint64
	end  time.Time
	open bool // it is the last
}

func segmentEnds(dir string) ([]segmentEnd, error) {
	nums, err := segments(dir)
	if err != nil {
		return nil, err
	}
	var ends []segmentEnd
	for i, num := range nums {
		if i == len(nums)-1 {
			ends = append(ends, segmentEnd{num: num, open: true})
			break
		}
		h, err := readHeader(dir, nums[i+1])
		if errors.Is(err, fs.ErrNotExist) {
			continue // another process removes old segments
		}
		if err != nil {
			return nil, err
		}
		end, err := time.Parse(time.RFC3339, h.Time)
		if err != nil {
			return nil, fmt.Errorf("ledger segment %s: the header has no time", segmentName(nums[i+1]))
		}
		ends = append(ends, segmentEnd{num: num, end: end})
	}
	return ends, nil
}

// limit removes the oldest segments while the ledger is greater than MaxBytes.
func (l *Ledger) limit() error {
	if l.cfg.MaxBytes <= 0 {
		return nil
	}
	entries, err := os.ReadDir(segmentDir(l.cfg.Dir))
	if err != nil {
		return fmt.Errorf("list ledger segments: %w", err)
	}
	var total int64
	for _, e := range entries {
		if fi, err := e.Info(); err == nil {
			total += fi.Size()
		}
	}
	nums, err := segments(l.cfg.Dir)
	if err != nil {
		return err
	}
	for ; len(nums) > 1 && total > l.cfg.MaxBytes; nums = nums[1:] {
		s := segmentFiles(l.cfg.Dir, nums[0])
		for _, path := range s.paths {
			if err := l.files.remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("remove oldest ledger segment: %w", err)
			}
		}
		l.emit(Event{
			Kind: EventRemovedEarly, Segment: s.Name,
			Err: fmt.Errorf("the ledger has %d bytes, %d are allowed", total, l.cfg.MaxBytes),
		})
		total -= s.Bytes
	}
	return nil
}

// retentionFile, beside the segments, says what retention by tenant has done. It only
// saves work: without it every old segment is looked at again.
const retentionFile = "retention.json"

// stripped is what retention by tenant has done in the closed segments.
type stripped struct {
	Ledger string `json:"ledger"`
	// Through is, by tenant, the segment up to which nothing of it is left. The empty
	// name stands for the calls of all that are not in Tenants.
	Through map[string]uint64 `json:"through"`
	Tenants []string          `json:"tenants"`
	// Empty are segments with no call left in them.
	Empty []uint64 `json:"empty,omitempty"`
}

// removeTenants puts a digest in the place of each record whose tenant's retention is
// over, in segments that others still need. A segment is looked at once for each
// tenant, when it comes of age.
func (l *Ledger) removeTenants(now time.Time, p pace) error {
	if len(l.cfg.TenantRetention) == 0 {
		return nil
	}
	if day(now) == l.stripped {
		return nil
	}
	dir := l.cfg.Dir
	ends, err := segmentEnds(dir)
	if err != nil {
		return err
	}
	path := filepath.Join(segmentDir(dir), retentionFile)
	done := readStripped(path, l.id, l.cfg.TenantRetention)
	s := stripper{
		files: l.files, dir: dir, kept: l.cfg.TenantRetention, rest: l.rest(p),
		doomed: map[proxy.CallID]bool{}, spanning: map[proxy.CallID]bool{},
	}
	var found []agedSegment
	for _, seg := range ends {
		if seg.open {
			break
		}
		over, news := map[string]bool{}, len(s.doomed) > 0
		for tenant, kept := range l.retentions() {
			if kept >= 0 && seg.end.Before(now.Add(-kept)) {
				over[tenant] = true
				news = news || done.Through[tenant] < seg.num
			}
		}
		if !news {
			continue
		}
		aged, err := s.look(seg.num, over)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		found = append(found, aged)
	}
	// The youngest first: an outcome goes before its decision, without which nobody
	// could tell whose it is, should this end in the middle.
	for _, aged := range slices.Backward(found) {
		if err := s.strip(aged); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	for _, aged := range found {
		if num := aged.w.num; aged.left == 0 && !slices.Contains(done.Empty, num) {
			done.Empty = append(done.Empty, num)
		}
		for tenant := range aged.over {
			done.Through[tenant] = max(done.Through[tenant], aged.w.num)
		}
	}
	if len(found) > 0 {
		if err := done.write(path); err != nil {
			return err
		}
	}
	if err := l.removeEmpty(ends, &done, path); err != nil {
		return err
	}
	l.stripped = day(now)
	return nil
}

// retentions returns how long the records of each tenant are kept, and under the
// empty name those of all others.
func (l *Ledger) retentions() map[string]time.Duration {
	all := maps.Clone(l.cfg.TenantRetention)
	all[""] = l.cfg.Retention
	return all
}

// removeEmpty removes segments with no call left in them, as far as they are the
// oldest: the chain must not have a hole.
func (l *Ledger) removeEmpty(ends []segmentEnd, done *stripped, path string) error {
	before := len(done.Empty)
	for _, s := range ends {
		i := slices.Index(done.Empty, s.num)
		if i < 0 || s.open {
			break
		}
		for _, path := range segmentFiles(l.cfg.Dir, s.num).paths {
			if err := l.files.remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("remove empty ledger segment: %w", err)
			}
		}
		done.Empty = slices.Delete(done.Empty, i, i+1)
	}
	if len(done.Empty) == before {
		return nil
	}
	return done.write(path)
}

// readStripped reads what was done; nothing when it is of another ledger.
func readStripped(path, ledger string, kept map[string]time.Duration) stripped {
	var s stripped
	if b, err := os.ReadFile(path); err != nil || json.Unmarshal(b, &s) != nil || s.Ledger != ledger {
		s = stripped{Ledger: ledger}
	}
	if s.Through == nil {
		s.Through = map[string]uint64{}
	}
	if tenants := slices.Sorted(maps.Keys(kept)); !slices.Equal(s.Tenants, tenants) {
		s.Tenants = tenants
		delete(s.Through, "") // other calls than before fall under the general retention
	}
	return s
}

func (s *stripped) write(path string) error {
	b, err := json.Marshal(s)
	if err == nil {
		err = replaceFile(path, append(b, '\n'))
	}
	if err != nil {
		return fmt.Errorf("write what retention did: %w", err)
	}
	return nil
}

// stripper removes records from closed segments: it looks at all of them first, the
// oldest before the others, and then strips them the other way round.
type stripper struct {
	files files
	dir   string
	kept  map[string]time.Duration // tenants with a retention of their own
	rest  func() error

	over map[string]bool // tenants, "" for others, whose retention is over in the segment
	// here are calls whose decision goes from the segment, their outcome not yet seen.
	here map[proxy.CallID]bool
	// doomed are those of segments before, while looking; spanning the ones of them
	// whose outcome was found, in a later segment.
	doomed, spanning map[proxy.CallID]bool
}

// agedSegment is a segment in which someone's retention is over.
type agedSegment struct {
	w             *walk
	over          map[string]bool
	removed, left int // decisions and outcomes
}

// look counts what is to be removed from segment num.
func (s *stripper) look(num uint64, over map[string]bool) (agedSegment, error) {
	s.over, s.here = over, map[proxy.CallID]bool{}
	aged := agedSegment{over: over}
	var err error
	aged.w, err = walkSegment(s.dir, num, func(c *committed) (*Problem, error) {
		for _, line := range c.lines {
			switch s.judge(line) {
			case removes:
				aged.removed++
			case keepsCall:
				aged.left++
			}
		}
		return nil, s.rest()
	}, nil)
	if err != nil {
		return aged, err
	}
	if aged.w.damaged() {
		return aged, fmt.Errorf("remove records of tenants: the ledger is damaged, %s", aged.w.problem)
	}
	maps.Copy(s.doomed, s.here)
	return aged, nil
}

// strip rewrites a segment if there is anything to remove. It is no longer or shorter
// for that, its chain the same, so that readers and positions in it notice nothing.
func (s *stripper) strip(aged agedSegment) error {
	if aged.removed == 0 {
		return nil
	}
	s.over = aged.over
	if err := s.rewrite(aged.w); err != nil {
		return fmt.Errorf("remove records of tenants from ledger segment %s: %w", aged.w.file, err)
	}
	return nil
}

type verdict int

const (
	keeps     verdict = iota
	keepsCall         // and it is a decision or an outcome
	removes
)

// judge says what becomes of a line.
func (s *stripper) judge(line []byte) verdict {
	_, typ, rest, _ := parseHead(line)
	if typ != TypeDecision && typ != TypeOutcome {
		return keeps
	}
	id, ok := parseCall(rest)
	switch {
	case !ok:
	case typ == TypeDecision && s.over[s.tenant(rest)]:
		s.here[id] = true
		return removes
	case typ == TypeOutcome && s.here[id]:
		delete(s.here, id)
		return removes
	case typ == TypeOutcome && s.doomed[id]:
		delete(s.doomed, id)
		s.spanning[id] = true
		return removes
	case typ == TypeOutcome && s.spanning[id]:
		return removes
	}
	return keepsCall
}

// tenant returns the tenant whose retention holds for a decision, "" for the general
// one: also when a token only claims to be of a tenant.
func (s *stripper) tenant(rest []byte) string {
	// In a JSON string these bytes cannot stand: it would escape the quotes.
	if !bytes.Contains(rest, []byte(`,"verified":true,`)) {
		return ""
	}
	_, after, ok := bytes.Cut(rest, []byte(`,"tid":"`))
	tid, _, ok2 := bytes.Cut(after, []byte{'"'})
	if !ok || !ok2 {
		return ""
	}
	if id := strings.ToLower(string(tid)); s.kept[id] > 0 {
		return id
	}
	return ""
}

// rewrite writes the segment anew, in the form that it has.
func (s *stripper) rewrite(w *walk) error {
	path := filepath.Join(segmentDir(s.dir), w.file)
	write := func(out io.Writer) error {
		done, err := s.copy(out, w.num)
		if err == nil {
			// What follows the last commit may be of records too.
			_, err = out.Write(make([]byte, w.size-done))
		}
		return err
	}
	check := func(f *segmentFile) error {
		again, err := walkFile(f, w.num, func(*committed) (*Problem, error) { return nil, s.rest() }, nil)
		if err != nil {
			return err
		}
		if again.damaged() || again.hash != w.hash || again.end != w.end || again.size != w.size {
			return errors.New("what was written reads differently; the segment stays as it is")
		}
		_, err = os.Stat(path) // someone may have pruned it: it must not come back
		return err
	}
	if w.compressed() {
		return replaceSegment(s.files, path, w.size, write, check)
	}
	return replacePlain(s.files, path, write, check)
}

// copy writes the committed lines of segment num, without the removed ones, and
// returns how many bytes these are.
func (s *stripper) copy(out io.Writer, num uint64) (done int64, err error) {
	var buf, check []byte
	s.here = map[proxy.CallID]bool{}
	_, err = walkSegment(s.dir, num, func(c *committed) (*Problem, error) {
		buf = buf[:0]
		check = append(check[:0], c.hash[:checkHash]...)
		for i, line := range c.lines {
			start := len(buf)
			buf = append(buf, line...)
			if s.judge(line) == removes {
				if b, ok := appendRemoved(buf[:start], c.first+uint64(i), sha256.Sum256(line), len(line)); ok {
					buf = b
				}
			}
			check = appendCheck(check, buf[start:])
		}
		buf = appendCommit(buf, c.seq(), check)
		n, err := out.Write(buf)
		done += int64(n)
		return nil, errors.Join(err, s.rest())
	}, nil)
	return done, err
}
