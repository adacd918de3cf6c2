package ledger

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
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

// Types of line. Readers deliver all but commits.
const (
	TypeHeader   = "header"   // first line of a segment
	TypeDecision = "decision" // a call was decided; the members of telemetry.AppendDecision
	TypeOutcome  = "outcome"  // a call ended; the members of telemetry.AppendOutcome
	TypeGap      = "gap"      // calls that could not be recorded
	typeCommit   = "commit"   // closes a group
)

// formatVersion stands in every header. Readers refuse a greater one.
const formatVersion = 1

// digest chains the commits: SHA-256 over the digest of the commit before and the
// bytes of all lines since then.
type digest = [sha256.Size]byte

// header is the first line of a segment, committed together with it: a segment
// appears under its name only once both are in the file.
type header struct {
	N        uint64 `json:"n"`
	Type     string `json:"type"`
	Version  int    `json:"version"`
	Instance string `json:"instance,omitempty"`
	Time     string `json:"time"`
	// Prev names the segment before; empty in the first one.
	Prev string `json:"prev,omitempty"`
	// PrevHash is the hash of the last commit before this segment.
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

// group collects lines and closes them with a commit. Its buffer begins with the
// hash of the commit before, so that one pass hashes all that the chain covers.
type group struct {
	buf []byte
	seq uint64 // of the last line
}

// begin starts a group behind the commit that has seq and hash.
func (g *group) begin(seq uint64, hash digest) {
	g.buf, g.seq = append(g.buf[:0], hash[:]...), seq
}

func (g *group) line(typ string, members []byte) {
	g.seq++
	g.buf = appendHead(g.buf, g.seq, typ)
	g.buf = append(g.buf, ',')
	g.buf = append(g.buf, members...)
	g.buf = append(g.buf, "}\n"...)
}

// header adds the line that h makes; its N is set here.
func (g *group) header(h header) error {
	g.seq++
	h.N, h.Type, h.Version = g.seq, TypeHeader, formatVersion
	line, err := json.Marshal(h)
	if err != nil {
		return fmt.Errorf("encode segment header: %w", err)
	}
	g.buf = append(append(g.buf, line...), '\n')
	return nil
}

// commit closes the group. It returns the bytes to write and the new end of the chain.
func (g *group) commit() (lines []byte, seq uint64, hash digest) {
	hash = sha256.Sum256(g.buf)
	g.seq++
	g.buf = appendHead(g.buf, g.seq, typeCommit)
	g.buf = append(g.buf, commitHash...)
	g.buf = base64.RawURLEncoding.AppendEncode(g.buf, hash[:])
	g.buf = append(g.buf, commitEnd...)
	return g.buf[len(digest{}):], g.seq, hash
}

const (
	commitHash = `,"hash":"`
	commitEnd  = "\"}\n"
)

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
	for _, typ := range [...]string{TypeDecision, TypeOutcome, typeCommit, TypeHeader, TypeGap} {
		if len(s) > len(typ) && s[len(typ)] == '"' && string(s[:len(typ)]) == typ {
			return seq, typ, s[len(typ)+1:], true
		}
	}
	return 0, "", nil, false
}

// parseCommit reads the hash of a commit line; rest is what parseHead left of it.
func parseCommit(rest []byte) (digest, bool) {
	var hash digest
	s, ok := bytes.CutPrefix(rest, []byte(commitHash))
	if !ok {
		return hash, false
	}
	s, ok = bytes.CutSuffix(s, []byte(commitEnd))
	if !ok || len(s) != base64.RawURLEncoding.EncodedLen(len(hash)) {
		return hash, false
	}
	_, err := base64.RawURLEncoding.Strict().Decode(hash[:], s)
	return hash, err == nil
}

func encodeHash(h digest) string { return base64.RawURLEncoding.EncodeToString(h[:]) }

func decodeHash(s string) (digest, error) {
	var h digest
	if s == "" {
		return h, nil
	}
	b, err := base64.RawURLEncoding.Strict().DecodeString(s)
	if err != nil || len(b) != len(h) {
		return h, fmt.Errorf("%q is not a hash", s)
	}
	return digest(b), nil
}

// parseHeader reads the first line of a segment.
func parseHeader(line []byte) (header, error) {
	var h header
	if err := json.Unmarshal(line, &h); err != nil {
		return h, fmt.Errorf("header is not readable: %w", err)
	}
	if h.Type != TypeHeader {
		return h, errors.New("does not begin with a header")
	}
	if h.Version < 1 || h.Version > formatVersion {
		return h, fmt.Errorf("has format version %d; this program reads version %d", h.Version, formatVersion)
	}
	return h, nil
}

// readHeader reads the header of segment num.
func readHeader(dir string, num uint64) (header, error) {
	f, err := os.Open(segmentPath(dir, num))
	if err != nil {
		return header{}, fmt.Errorf("read ledger segment: %w", err)
	}
	defer f.Close()
	line, err := bufio.NewReader(f).ReadBytes('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return header{}, fmt.Errorf("read ledger segment: %w", err)
	}
	h, err := parseHeader(line)
	if err != nil {
		return h, fmt.Errorf("ledger segment %s: %w", segmentName(num), err)
	}
	return h, nil
}

const segmentSuffix = ".jsonl"

// segmentName returns the name of a segment's file: names sort as numbers do.
func segmentName(num uint64) string { return fmt.Sprintf("%012d%s", num, segmentSuffix) }

func segmentDir(dir string) string { return filepath.Join(dir, "ledger") }

func segmentPath(dir string, num uint64) string {
	return filepath.Join(segmentDir(dir), segmentName(num))
}

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
		digits, ok := strings.CutSuffix(e.Name(), segmentSuffix)
		if !ok {
			continue
		}
		if n, err := strconv.ParseUint(digits, 10, 64); err == nil && n > 0 && segmentName(n) == e.Name() {
			nums = append(nums, n)
		}
	}
	slices.Sort(nums)
	return nums, nil
}
