package ledger

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/partnerguard/partnerguard/proxy"
	"github.com/partnerguard/partnerguard/telemetry"
)

// Types of line. Readers deliver all but commits and removed lines.
const (
	TypeHeader   = "header"   // first line of a segment
	TypeDecision = "decision" // a call was decided; the members of telemetry.AppendDecision
	TypeOutcome  = "outcome"  // a call ended; the members of telemetry.AppendOutcome
	TypeGap      = "gap"      // calls that could not be recorded
	// TypeCheckpoint is a signature over all up to a commit before it: ParseCheckpoint.
	TypeCheckpoint = "checkpoint"

	typeCommit  = "commit"  // closes a group
	typeRemoved = "removed" // stands for a line whose retention is over: its SHA-256
)

// formatVersion stands in every header. No other is read: format 1 was in no release.
const formatVersion = 2

// FormatError says that another version of the program wrote a segment.
type FormatError struct {
	Segment string
	Version int
}

func (e *FormatError) Error() string {
	return fmt.Sprintf("ledger segment %s has format %d, this program reads format %d", e.Segment, e.Version, formatVersion)
}

// Hint says what to do.
func (e *FormatError) Hint() string {
	if e.Newer() {
		return "run the partnerguard that wrote it, or a newer one"
	}
	return "move the directory ledger, which is in the data directory, aside; the next start begins a new one"
}

// Newer reports whether a newer program wrote it.
func (e *FormatError) Newer() bool { return e.Version > formatVersion }

// digest chains the commits: SHA-256 over the digest of the commit before and the
// SHA-256 of each line since, with its line feed. As each line stands there by its
// own digest, a removed line can give that instead of the line.
type digest = [sha256.Size]byte

// header is the first line of a segment, committed together with it: a segment
// appears under its name only once both are in the file.
type header struct {
	N       uint64 `json:"n"`
	Type    string `json:"type"`
	Version int    `json:"version"`
	// Ledger is the same in all segments.
	Ledger   string `json:"ledger"`
	Instance string `json:"instance,omitempty"`
	Time     string `json:"time"`
	// Prev names the segment before; empty in the first one.
	Prev string `json:"prev,omitempty"`
	// PrevHash is the digest of the last commit before this segment.
	PrevHash string `json:"prev_hash,omitempty"`
	// Torn is how many bytes follow the last commit of Prev: a write that a crash
	// or a full disk cut short. They are no part of the ledger.
	Torn int64 `json:"torn,omitempty"`
	// SetAside names the files that were found damaged and renamed just before this
	// segment began.
	SetAside []string `json:"set_aside,omitempty"`
	// Open lists the calls whose outcome was still to come.
	Open []proxy.CallID `json:"open,omitempty"`
}

// Gap is what a gap line says: that records are missing here, and why.
type Gap struct {
	Calls    uint64 // whose decision could not be recorded
	Outcomes uint64 // that could not be recorded, those of such calls included
	Since    time.Time
	Until    time.Time
	Cause    string
}

func (g *Gap) empty() bool { return g.Calls == 0 && g.Outcomes == 0 }

// add counts what another gap counted.
func (g *Gap) add(o Gap) {
	if o.empty() {
		return
	}
	if g.empty() {
		*g = o
		return
	}
	g.Calls += o.Calls
	g.Outcomes += o.Outcomes
	if o.Since.Before(g.Since) {
		g.Since = o.Since
	}
	if o.Until.After(g.Until) {
		g.Until, g.Cause = o.Until, o.Cause
	}
}

func (g *Gap) appendMembers(dst []byte) []byte {
	dst = append(dst, `"calls":`...)
	dst = strconv.AppendUint(dst, g.Calls, 10)
	dst = append(dst, `,"outcomes":`...)
	dst = strconv.AppendUint(dst, g.Outcomes, 10)
	dst = append(dst, `,"since":"`...)
	dst = g.Since.UTC().AppendFormat(dst, telemetry.TimeLayout)
	dst = append(dst, `","until":"`...)
	dst = g.Until.UTC().AppendFormat(dst, telemetry.TimeLayout)
	dst = append(dst, `","cause":`...)
	return telemetry.AppendString(dst, g.Cause)
}

// group collects lines and closes them with a commit.
type group struct {
	buf   []byte // the lines
	sums  []byte // digest of the commit before, then of each line
	check []byte // what the commit line holds
	seq   uint64 // of the last line
}

// begin starts a group behind the commit that has seq and hash.
func (g *group) begin(seq uint64, hash digest) {
	g.buf, g.seq = g.buf[:0], seq
	g.sums = append(g.sums[:0], hash[:]...)
	g.check = append(g.check[:0], hash[:checkHash]...) // room, until commit knows
}

func (g *group) line(typ string, members []byte) {
	start := len(g.buf)
	g.seq++
	g.buf = appendHead(g.buf, g.seq, typ)
	g.buf = append(g.buf, ',')
	g.buf = append(g.buf, members...)
	g.buf = append(g.buf, "}\n"...)
	g.seal(start)
}

// header adds the line that h makes; its N is set here.
func (g *group) header(h header) error {
	start := len(g.buf)
	g.seq++
	h.N, h.Type, h.Version = g.seq, TypeHeader, formatVersion
	line, err := json.Marshal(h)
	if err != nil {
		return fmt.Errorf("encode segment header: %w", err)
	}
	g.buf = append(append(g.buf, line...), '\n')
	g.seal(start)
	return nil
}

// seal takes the line from start on into the digest.
func (g *group) seal(start int) {
	line := g.buf[start:]
	sum := sha256.Sum256(line)
	g.sums = append(g.sums, sum[:]...)
	g.check = appendCheck(g.check, line)
}

// commit closes the group. It returns the bytes to write and the new end of the chain.
func (g *group) commit() (lines []byte, seq uint64, hash digest) {
	hash = sha256.Sum256(g.sums)
	copy(g.check, hash[:checkHash])
	g.seq++
	g.buf = appendCommit(g.buf, g.seq, g.check)
	return g.buf, g.seq, hash
}

// A commit line holds a check: the first bytes of the chain's digest there, then of
// each line of its group, as it stands, the lower half of CRC-32C. Verify computes
// the digests itself, and in full; the check is what tells it the place where one
// went wrong. Headers and checkpoints hold whole digests. It is short because it is
// most of what cannot be compressed in the account of a call, and hexadecimal since
// the ids around it are; a change that it does not show, one in 2^32, shows in every
// commit after it.
const (
	checkHash = 4
	checkLine = 2
)

var (
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
	// strictBase64 accepts one spelling only, so that no changed character passes.
	strictBase64 = base64.RawURLEncoding.Strict()
)

func lineCheck(line []byte) uint16 { return uint16(crc32.Checksum(line, castagnoli)) }

func appendCheck(dst, line []byte) []byte { return binary.BigEndian.AppendUint16(dst, lineCheck(line)) }

const (
	commitCheck = `,"check":"`
	commitEnd   = "\"}\n"
)

func appendCommit(dst []byte, seq uint64, check []byte) []byte {
	dst = appendHead(dst, seq, typeCommit)
	dst = append(dst, commitCheck...)
	dst = hex.AppendEncode(dst, check)
	return append(dst, commitEnd...)
}

func appendHead(dst []byte, seq uint64, typ string) []byte {
	dst = append(dst, `{"n":`...)
	dst = strconv.AppendUint(dst, seq, 10)
	dst = append(dst, `,"type":"`...)
	dst = append(dst, typ...)
	return append(dst, '"')
}

// parseHead reads the number and the type that every line begins with; rest is
// what follows. It accepts only what appendHead writes, in a line that ends well.
func parseHead(line []byte) (seq uint64, typ string, rest []byte, ok bool) {
	s, ok := bytes.CutPrefix(line, []byte(`{"n":`))
	if !ok || !bytes.HasSuffix(line, []byte("}\n")) {
		return 0, "", nil, false
	}
	i := 0
	for ; i < len(s) && s[i] >= '0' && s[i] <= '9'; i++ {
		if i == 20 {
			return 0, "", nil, false
		}
		seq = seq*10 + uint64(s[i]-'0')
	}
	s, ok = bytes.CutPrefix(s[i:], []byte(`,"type":"`))
	if !ok || i == 0 {
		return 0, "", nil, false
	}
	for _, typ := range [...]string{TypeDecision, TypeOutcome, typeCommit, TypeHeader, TypeGap, TypeCheckpoint, typeRemoved} {
		if len(s) > len(typ) && s[len(typ)] == '"' && string(s[:len(typ)]) == typ {
			return seq, typ, s[len(typ)+1:], true
		}
	}
	return 0, "", nil, false
}

// parseCommit appends the check of a commit line to dst; rest is what parseHead left
// of the line.
func parseCommit(dst, rest []byte) ([]byte, bool) {
	s, ok := bytes.CutPrefix(rest, []byte(commitCheck))
	if !ok {
		return dst, false
	}
	s, ok = bytes.CutSuffix(s, []byte(commitEnd))
	if !ok || bytes.ContainsAny(s, "ABCDEF") { // one spelling only, so that no changed character passes
		return dst, false
	}
	start := len(dst)
	dst, err := hex.AppendDecode(dst, s)
	n := len(dst) - start - checkHash
	return dst, err == nil && n >= checkLine && n%checkLine == 0
}

const removedHash = `,"hash":"`

// appendRemoved appends the line that stands for a removed one, with its digest. It
// is as long as that was, so that the places of all others stay: spaces fill it. ok
// is false when the line was too short for that.
func appendRemoved(dst []byte, seq uint64, sum digest, size int) (_ []byte, ok bool) {
	start := len(dst)
	dst = appendHead(dst, seq, typeRemoved)
	dst = append(dst, removedHash...)
	dst = base64.RawURLEncoding.AppendEncode(dst, sum[:])
	dst = append(dst, '"')
	fill := size - (len(dst) - start) - len("}\n")
	if fill < 0 {
		return dst[:start], false
	}
	for range fill {
		dst = append(dst, ' ')
	}
	return append(dst, "}\n"...), true
}

// parseRemoved reads the digest of the line that was removed; rest is what parseHead
// left of the line.
func parseRemoved(rest []byte) (sum digest, ok bool) {
	s, ok := bytes.CutPrefix(rest, []byte(removedHash))
	n := base64.RawURLEncoding.EncodedLen(len(sum))
	if !ok || len(s) < n+1 || s[n] != '"' || string(bytes.TrimLeft(s[n+1:], " ")) != "}\n" {
		return sum, false
	}
	if bytes.ContainsAny(s[:n], "\r\n") {
		return sum, false
	}
	_, err := strictBase64.Decode(sum[:], s[:n])
	return sum, err == nil
}

// lineDigest returns what stands for a line in the chain.
func lineDigest(line []byte, typ string, rest []byte) (digest, bool) {
	if typ == typeRemoved {
		return parseRemoved(rest)
	}
	return sha256.Sum256(line), true
}

func encodeHash(h digest) string { return base64.RawURLEncoding.EncodeToString(h[:]) }

func decodeHash(s string) (digest, error) {
	var h digest
	if s == "" {
		return h, nil
	}
	b, err := strictBase64.DecodeString(s)
	if err != nil || len(b) != len(h) {
		return h, fmt.Errorf("%q is not a hash", s)
	}
	return digest(b), nil
}

// parseHeader reads the first line of the segment that has the given name. The error
// is a *FormatError when another version of the program wrote it.
func parseHeader(line []byte, name string) (header, error) {
	var h header
	if err := json.Unmarshal(line, &h); err != nil {
		return h, fmt.Errorf("the header is not readable: %w", err)
	}
	if h.Type != TypeHeader {
		return h, errors.New("the segment does not begin with a header")
	}
	if h.Version != formatVersion {
		return h, &FormatError{Segment: name, Version: h.Version}
	}
	return h, nil
}

// readHeader reads the header of segment num.
func readHeader(dir string, num uint64) (header, error) {
	f, err := openSegment(dir, num)
	if err != nil {
		return header{}, fmt.Errorf("read ledger segment: %w", err)
	}
	defer f.Close()
	line, err := bufio.NewReader(f).ReadBytes('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return header{}, fmt.Errorf("read ledger segment %s: %w", f.name, err)
	}
	h, err := parseHeader(line, f.name)
	if err != nil {
		var format *FormatError
		if !errors.As(err, &format) {
			err = fmt.Errorf("ledger segment %s: %w", f.name, err)
		}
		return h, err
	}
	return h, nil
}

// ID returns the identity of the ledger in the data directory dir, which all its
// segments bear. The error wraps fs.ErrNotExist when there is none yet.
func ID(dir string) (string, error) {
	nums, err := segments(dir)
	if err != nil {
		return "", err
	}
	if len(nums) == 0 {
		return "", fmt.Errorf("there is no ledger in %s: %w", dir, fs.ErrNotExist)
	}
	h, err := readHeader(dir, nums[len(nums)-1])
	return h.Ledger, err
}

const (
	segmentSuffix    = ".jsonl"
	compressedSuffix = ".zst" // after segmentSuffix
)

// segmentName returns the name of a segment, which is that of its file while it is
// not compressed: names sort as numbers do.
func segmentName(num uint64) string { return fmt.Sprintf("%012d%s", num, segmentSuffix) }

func segmentDir(dir string) string { return filepath.Join(dir, "ledger") }

func segmentPath(dir string, num uint64) string {
	return filepath.Join(segmentDir(dir), segmentName(num))
}

func compressedPath(dir string, num uint64) string { return segmentPath(dir, num) + compressedSuffix }

// segments returns the numbers of the segments in dir, ascending. A ledger that
// does not exist has none.
func segments(dir string) ([]uint64, error) {
	entries, err := os.ReadDir(segmentDir(dir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list ledger segments: %w", err)
	}
	var nums []uint64
	for _, e := range entries {
		name := strings.TrimSuffix(e.Name(), compressedSuffix)
		digits, ok := strings.CutSuffix(name, segmentSuffix)
		if !ok {
			continue
		}
		if n, err := strconv.ParseUint(digits, 10, 64); err == nil && n > 0 && segmentName(n) == name {
			nums = append(nums, n)
		}
	}
	slices.Sort(nums)
	return slices.Compact(nums), nil
}
