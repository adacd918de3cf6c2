package ledger

import (
	"bytes"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/klauspost/compress/zstd"
	"github.com/partnerguard/partnerguard/proxy"
)

// signedLedger writes a ledger of three segments. In each: the header, a checkpoint,
// two groups of one line, one of three (the outcome, decision), the rest of the
// outcomes, a checkpoint; a commit follows each group. It is as a clean stop leaves it.
func signedLedger(t testing.TB, compress bool) (dir string) {
	t.Helper()
	dir = t.TempDir()
	for i := range 3 {
		l := quiet(t, Config{Dir: dir, Instance: fmt.Sprint(i)})
		l.checkpoint()
		for range 3 {
			rec := &proxy.Record{Decided: proxy.Decided{Call: uuid.Must(uuid.NewV7()), Method: "GET", Instance: fmt.Sprint(i)}, Finished: proxy.Finished{Status: 200}}
			decide(t, l, rec)
			finish(t, l, rec) // goes with the next
		}
		l.checkpoint()
		l.checkpoint() // of the outcome that went with the first one
		mustClose(t, l)
	}
	if compress {
		for num := range uint64(2) {
			if err := compressSegment(osFiles{}, dir, num+1, func() error { return nil }); err != nil {
				t.Fatal(err)
			}
		}
	}
	return dir
}

// quiet opens a ledger that does nothing by itself.
func quiet(t testing.TB, cfg Config) *Ledger {
	t.Helper()
	cfg.MinFree = -1
	l, err := open(cfg, osFiles{}, pace{probe: time.Hour, watch: time.Hour, prune: time.Hour, carry: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// copyLedger copies a data directory, so that a test can spoil it.
func copyLedger(t testing.TB, from string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "copy")
	if err := errors.Join(os.CopyFS(dir, os.DirFS(from)), os.Chmod(filepath.Join(dir, keyFile), 0o600)); err != nil {
		t.Fatal(err)
	}
	return dir
}

// content is what a segment holds, however it is stored.
func content(t testing.TB, dir string, num uint64) []byte {
	t.Helper()
	f, err := openSegment(dir, num)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b, err := io.ReadAll(f)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// put stores what a segment holds in the form that it has.
func put(t testing.TB, dir string, num uint64, b []byte) {
	t.Helper()
	path := segmentPath(dir, num)
	if _, err := os.Stat(path); err != nil {
		path = compressedPath(dir, num)
		enc, err := zstd.NewWriter(nil)
		if err != nil {
			t.Fatal(err)
		}
		b = enc.EncodeAll(b, nil)
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func lines(b []byte) []string { return strings.SplitAfter(string(b), "\n") }

func TestSignedLedgerHolds(t *testing.T) {
	for _, compress := range []bool{false, true} {
		dir := signedLedger(t, compress)
		rep := mustVerify(t, dir)
		id, err := ID(dir)
		if err != nil || rep.Ledger != id || uuid.Validate(id) != nil {
			t.Errorf("ledger %q, ID = %q, %v", rep.Ledger, id, err)
		}
		if rep.Segments != 3 || rep.Decisions != 9 || rep.Outcomes != 9 || rep.Checkpoints < 6 || len(rep.Keys) != 1 || rep.Unsigned != 0 {
			t.Errorf("Verify = %+v, want 3 segments with 9 calls, all of it signed", rep)
		}
		if rep.Signed == nil || rep.Signed.Commit+2 != rep.Last || rep.Signed.Key != rep.Keys[0] {
			t.Errorf("Signed = %+v, want the commit before the last checkpoint, at %d", rep.Signed, rep.Last)
		}
		latest, err := LatestCheckpoint(dir)
		if err != nil || latest.Commit != rep.Signed.Commit {
			t.Errorf("LatestCheckpoint = %+v, %v, want that of record %d", latest, err, rep.Signed.Commit)
		}
		var seen int
		for _, e := range readAll(t, dir) {
			if e.Type == TypeCheckpoint {
				c, err := ParseCheckpoint(e.Line)
				if err != nil || c.Ledger != id {
					t.Errorf("checkpoint %s: %+v, %v", e.Line, c, err)
				}
				seen++
			}
		}
		if seen != int(rep.Checkpoints) {
			t.Errorf("a reader sees %d checkpoints, Verify %d", seen, rep.Checkpoints)
		}
	}
}

func TestVerifyNamesWhatWasDone(t *testing.T) {
	const second, third = "000000000002.jsonl", "000000000003.jsonl"
	find := func(ls []string, what string) int {
		return slices.IndexFunc(ls, func(l string) bool { return strings.Contains(l, what) })
	}
	type result struct {
		segment string // beginning of its name
		line    int    // 0: whichever
		what    string
	}
	segment := func(num uint64, do func([]string) ([]string, result)) func(*testing.T, string) result {
		return func(t *testing.T, dir string) result {
			ls, want := do(lines(content(t, dir, num)))
			put(t, dir, num, []byte(strings.Join(ls, "")))
			return want
		}
	}
	type test struct {
		name string
		do   func(t *testing.T, dir string) result
	}
	tests := []test{
		{"a changed value in a group of one line", segment(2, func(l []string) ([]string, result) {
			i := find(l, `"type":"decision"`)
			l[i] = strings.Replace(l[i], "GET", "PUT", 1)
			return l, result{second, i + 1, "changed since it was committed"}
		})},
		{"a changed value in a group of several lines", segment(2, func(l []string) ([]string, result) {
			i := find(l, `"type":"outcome"`) + 1 // the decision that took it along
			l[i] = strings.Replace(l[i], "GET", "PUT", 1)
			return l, result{second, i + 1, "changed since it was committed"}
		})},
		{"broken JSON", segment(2, func(l []string) ([]string, result) {
			i := find(l, `"type":"decision"`)
			l[i] = strings.Replace(l[i], `"GET"`, `"GET`, 1)
			return l, result{second, i + 1, "not valid JSON"}
		})},
		{"a changed commit", segment(2, func(l []string) ([]string, result) {
			i := find(l, `"type":"decision"`) + 1
			at := strings.Index(l[i], `"check":"`) + len(`"check":"`)
			c := "A"
			if l[i][at] == 'A' {
				c = "B"
			}
			l[i] = l[i][:at] + c + l[i][at+1:]
			return l, result{second, i + 1, "commit"}
		})},
		{"a deleted line", segment(2, func(l []string) ([]string, result) {
			return slices.Delete(l, 4, 5), result{second, 5, "belongs"}
		})},
		{"a deleted group", segment(2, func(l []string) ([]string, result) {
			return slices.Delete(l, 4, 6), result{second, 5, "belongs"}
		})},
		{"lines in another order", segment(2, func(l []string) ([]string, result) {
			l[4], l[6] = l[6], l[4]
			return l, result{second, 5, "belongs"}
		})},
		{"a duplicated line", segment(2, func(l []string) ([]string, result) {
			return slices.Insert(l, 5, l[4]), result{second, 6, "belongs"}
		})},
		{"a forged line with a number that fits", segment(2, func(l []string) ([]string, result) {
			i := find(l, `"type":"commit"`) + 1 // the checkpoint
			seq, _, _, _ := parseHead([]byte(l[i]))
			return slices.Insert(l, i, string(appendHead(nil, seq, TypeOutcome))+"}\n"), result{second, i + 2, "belongs"}
		})},
		{"a cut tail inside a segment", segment(2, func(l []string) ([]string, result) {
			return l[:len(l)-3], result{second, len(l) - 2, "end of the segment is missing"}
		})},
		{"a cut tail of the last segment, records and all", segment(3, func(l []string) ([]string, result) {
			return l[:5], result{third, 5, "end of the ledger is missing"}
		})},
		{"the last commit cut off", segment(3, func(l []string) ([]string, result) {
			return l[:len(l)-2], result{third, 0, "end of the ledger is missing"}
		})},
		{"the last checkpoint cut off", segment(3, func(l []string) ([]string, result) {
			return l[:len(l)-3], result{third, len(l) - 2, "end of the ledger is missing"}
		})},
		{"a missing segment", func(t *testing.T, dir string) result {
			for _, path := range segmentFiles(dir, 2).paths {
				if err := os.Remove(path); err != nil {
					t.Fatal(err)
				}
			}
			return result{third, 1, "which is missing"}
		}},
		{"the last segment missing", func(t *testing.T, dir string) result {
			if err := os.Remove(segmentPath(dir, 3)); err != nil {
				t.Fatal(err)
			}
			return result{second, 0, "end of the ledger is missing"}
		}},
		{"all segments missing", func(t *testing.T, dir string) result {
			if err := os.RemoveAll(segmentDir(dir)); err != nil {
				t.Fatal(err)
			}
			return result{checkpointFile, 1, "there is no segment"}
		}},
		{"two segments swapped", func(t *testing.T, dir string) result {
			a, b := content(t, dir, 1), content(t, dir, 2)
			put(t, dir, 1, b)
			put(t, dir, 2, a)
			return result{second, 1, "belongs to another place"}
		}},
		{"a segment of another ledger", func(t *testing.T, dir string) result {
			put(t, dir, 2, content(t, signedLedger(t, false), 2))
			return result{second, 1, "belongs to the ledger"}
		}},
		{"a forged checkpoint", segment(2, func(l []string) ([]string, result) {
			return reseal(l, func(ls []string) int {
				i := find(ls, `"type":"checkpoint"`)
				at := strings.Index(ls[i], `"signature":"`) + len(`"signature":"`)
				c := "A"
				if ls[i][at] == 'A' {
					c = "B"
				}
				ls[i] = ls[i][:at] + c + ls[i][at+1:]
				return i
			}, second, "false signature")
		})},
		{"a checkpoint signed with another key", segment(2, func(l []string) ([]string, result) {
			return reseal(l, func(ls []string) int {
				i := find(ls, `"type":"checkpoint"`)
				ls[i] = signAgain(t, ls[i], func(c *Checkpoint) {})
				return i
			}, second, "which is not the ledger's")
		})},
		{"checkpoint.json of another ledger", func(t *testing.T, dir string) result {
			c, err := LatestCheckpoint(dir)
			if err != nil {
				t.Fatal(err)
			}
			key, err := ownKey(dir)
			if err != nil {
				t.Fatal(err)
			}
			writeCheckpoint(t, dir, sign(key, uuid.NewString(), c.Time, c.Commit, c.Hash))
			return result{third, 0, "is of the ledger"}
		}},
		{"checkpoint.json of another chain", func(t *testing.T, dir string) result {
			c, err := LatestCheckpoint(dir)
			if err != nil {
				t.Fatal(err)
			}
			key, err := ownKey(dir)
			if err != nil {
				t.Fatal(err)
			}
			writeCheckpoint(t, dir, sign(key, c.Ledger, c.Time, c.Commit, digest{1}))
			return result{third, 0, "signs another chain"}
		}},
		{"checkpoint.json with a false signature", func(t *testing.T, dir string) result {
			c, err := LatestCheckpoint(dir)
			if err != nil {
				t.Fatal(err)
			}
			c.Commit += 2
			writeCheckpoint(t, dir, c)
			return result{checkpointFile, 1, "false signature"}
		}},
	}
	sound := map[bool]string{false: signedLedger(t, false), true: signedLedger(t, true)}
	for _, tt := range tests {
		for _, compress := range []bool{false, true} {
			name := tt.name
			if compress {
				name += ", compressed"
			}
			t.Run(name, func(t *testing.T) {
				dir := copyLedger(t, sound[compress])
				mustVerify(t, dir)
				want := tt.do(t, dir)
				rep := verify(t, dir)
				p := rep.Problem
				if p == nil {
					t.Fatalf("Verify finds nothing: %+v", rep)
				}
				if want.what == "belongs to another place" { // any word for that will do
					want.what = ""
				}
				if !strings.HasPrefix(p.Segment, want.segment) || want.line > 0 && p.Line != want.line || !strings.Contains(p.What, want.what) {
					t.Errorf("Verify names %v, want %s line %d: …%s…", p, want.segment, want.line, want.what)
				}
				if compress && strings.HasSuffix(want.segment, ".jsonl") && want.segment != third && !strings.HasSuffix(p.Segment, compressedSuffix) {
					t.Errorf("Verify names %s, want the compressed file", p.Segment)
				}
			})
		}
	}
}

// reseal lets change alter a line and makes the chain of the segment hold again, as
// someone would who may write the files but has no key.
func reseal(ls []string, change func([]string) int, segment, what string) ([]string, struct {
	segment string
	line    int
	what    string
}) {
	i := change(ls)
	var h header
	if err := json.Unmarshal([]byte(ls[0]), &h); err != nil {
		panic(err)
	}
	hash, err := decodeHash(h.PrevHash)
	if err != nil {
		panic(err)
	}
	var g group
	var out []string
	start := 0
	for j, l := range ls {
		seq, typ, _, ok := parseHead([]byte(l))
		if !ok || typ != typeCommit {
			continue
		}
		g.begin(seq-uint64(j-start)-1, hash)
		for _, line := range ls[start:j] {
			at := len(g.buf)
			g.buf = append(g.buf, line...)
			g.seq++
			g.seal(at)
		}
		text, _, sum := g.commit()
		out = append(out, string(text))
		hash, start = sum, j+1
	}
	return lines([]byte(strings.Join(out, ""))), struct {
		segment string
		line    int
		what    string
	}{segment, i + 1, what}
}

// signAgain signs a checkpoint line with a key of its own.
func signAgain(t testing.TB, line string, change func(*Checkpoint)) string {
	t.Helper()
	c, err := ParseCheckpoint([]byte(line))
	if err != nil {
		t.Fatal(err)
	}
	change(&c)
	_, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	c = sign(key, c.Ledger, c.Time, c.Commit, c.Hash)
	seq, _, _, _ := parseHead([]byte(line))
	return string(c.appendMembers(append(appendHead(nil, seq, TypeCheckpoint), ','))) + "}\n"
}

func writeCheckpoint(t testing.TB, dir string, c Checkpoint) {
	t.Helper()
	b, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, checkpointFile), b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// Whichever byte of the ledger is changed, Verify names the line it stands in, or,
// where lines were joined by it, one beside.
func TestVerifyNoticesEveryByte(t *testing.T) {
	dir := signedLedger(t, false)
	mustVerify(t, dir)
	seed := uint64(time.Now().UnixNano()) // all in the long run, in a few seconds a sixth
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 4))
	for num := uint64(1); num <= 3; num++ {
		original := content(t, dir, num)
		line := 1
		for i, c := range original {
			if rnd.IntN(6) > 0 {
				if c == '\n' {
					line++
				}
				continue
			}
			b := bytes.Clone(original)
			b[i] ^= byte(1 + rnd.IntN(255))
			put(t, dir, num, b)
			rep, err := Verify(dir, VerifyOptions{})
			var format *FormatError
			switch p := rep.Problem; {
			case errors.As(err, &format) && line == 1 && format.Segment == segmentName(num):
			case err != nil:
				t.Errorf("segment %d byte %d: %v", num, i, err)
			case p == nil:
				t.Errorf("segment %d line %d byte %d: %q for %q is not noticed in %s", num, line, i, b[i], c, lines(original)[line-1])
			case line == 1 && p.Line == 2 && p.Segment == segmentName(num):
				// The number of a header can be held only against the next one.
			case p.Line != line && !(c == '\n' && p.Segment == segmentName(num) && (p.Line == line+1 || p.Line == line-1)),
				p.Segment != segmentName(num):
				t.Errorf("segment %d line %d byte %d: %q for %q is named %v", num, line, i, b[i], c, p)
			}
			if c == '\n' {
				line++
			}
		}
		put(t, dir, num, original)
	}
	mustVerify(t, dir)

	path := filepath.Join(dir, checkpointFile)
	original, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	same, err := LatestCheckpoint(dir)
	if err != nil {
		t.Fatal(err)
	}
	for i := range original {
		b := bytes.Clone(original)
		b[i] ^= byte(1 + rnd.IntN(255))
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if c, err := LatestCheckpoint(dir); err == nil && fmt.Sprint(c) == fmt.Sprint(same) {
			continue // a space, or a letter of a name in the other case
		}
		if p := verify(t, dir).Problem; p == nil {
			t.Errorf("checkpoint.json with %q at byte %d is not noticed", b[i], i)
		}
	}
}

func TestVerifyNoticesEveryByteOfACompressedSegment(t *testing.T) {
	dir := signedLedger(t, true)
	path := compressedPath(dir, 2)
	original, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	plain := content(t, dir, 2)
	for n := range original { // cut at each place
		if n%20 != 0 {
			continue
		}
		if err := os.WriteFile(path, original[:n], 0o600); err != nil {
			t.Fatal(err)
		}
		if p := verify(t, dir).Problem; p == nil || p.Segment != filepath.Base(path) {
			t.Errorf("cut to %d bytes: Verify names %v", n, p)
		}
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 6))
	for i := range original {
		if rnd.IntN(4) > 0 {
			continue
		}
		b := bytes.Clone(original)
		b[i] ^= byte(1 + rnd.IntN(255))
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		p := verify(t, dir).Problem
		if p != nil && p.Segment == filepath.Base(path) {
			continue
		}
		f, err := openSegment(dir, 2)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(f)
		f.Close()
		if err != nil || !bytes.Equal(got, plain) { // zstd has bits that mean nothing
			t.Errorf("byte %d changed: Verify names %v", i, p)
		}
	}
}

func TestCheckpointsFromElsewhere(t *testing.T) {
	dir := signedLedger(t, false)
	var all []Checkpoint
	for _, e := range readAll(t, dir) {
		if e.Type == TypeCheckpoint {
			c, err := ParseCheckpoint(e.Line)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, c)
		}
	}
	check := func(o VerifyOptions) Report {
		t.Helper()
		rep, err := Verify(dir, o)
		if err != nil {
			t.Fatal(err)
		}
		return rep
	}
	if rep := check(VerifyOptions{Checkpoints: all}); rep.Problem != nil {
		t.Errorf("its own checkpoints: %v", rep.Problem)
	}
	// The end is cut off, and checkpoint.json replaced by an earlier one: only who
	// kept a later one can tell.
	ls := lines(content(t, dir, 3))
	at := slices.IndexFunc(ls, func(l string) bool { return strings.Contains(l, `"type":"checkpoint"`) }) + 2
	put(t, dir, 3, []byte(strings.Join(ls[:at], "")))
	early, err := ParseCheckpoint([]byte(ls[at-2]))
	if err != nil {
		t.Fatal(err)
	}
	writeCheckpoint(t, dir, early)
	if rep := check(VerifyOptions{}); rep.Problem != nil {
		t.Errorf("Verify = %v; the test does not test what it says", rep.Problem)
	}
	if p := check(VerifyOptions{Checkpoints: all}).Problem; p == nil || !strings.Contains(p.What, "end of the ledger is missing") || p.Line != at+1 {
		t.Errorf("a cut end with a later checkpoint: %v", p)
	}
	// Retention removes the first segment: its checkpoints prove nothing any more.
	if err := os.Remove(segmentPath(dir, 1)); err != nil {
		t.Fatal(err)
	}
	if rep := check(VerifyOptions{Checkpoints: all[:1]}); rep.Problem != nil || rep.TooOld != 1 || rep.Checkpoints == 0 {
		t.Errorf("a checkpoint of a removed segment: %v, %d too old", rep.Problem, rep.TooOld)
	}
}

func TestTheKeyDecidesWhatIsProved(t *testing.T) {
	dir := signedLedger(t, false)
	own, err := LoadPublicKey(filepath.Join(dir, publicFile))
	if err != nil {
		t.Fatal(err)
	}
	other, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	rep, err := Verify(dir, VerifyOptions{PublicKey: other})
	if err != nil || rep.Problem == nil || !strings.Contains(rep.Problem.What, "not the ledger's") {
		t.Errorf("with another key: %v, %v", rep.Problem, err)
	}
	// The key is changed: both are known then.
	l := quiet(t, Config{Dir: dir, Instance: "2", Key: key})
	decide(t, l, record())
	l.checkpoint()
	mustClose(t, l)
	rep = mustVerify(t, dir)
	if len(rep.Keys) != 2 || rep.Signed == nil || rep.Signed.Key != KeyID(other) {
		t.Errorf("after a change of the key: %+v", rep)
	}
	rep, err = Verify(dir, VerifyOptions{PublicKey: other, FormerKeys: []ed25519.PublicKey{own}})
	if err != nil || rep.Problem != nil {
		t.Errorf("with both keys given: %v, %v", rep.Problem, err)
	}
	// Without any, the chain is checked and nothing proved.
	for _, name := range []string{publicFile, "ledger-" + KeyID(own) + ".pub"} {
		if err := os.Remove(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	if rep := mustVerify(t, dir); rep.Signed != nil || rep.Checkpoints != 0 || len(rep.Keys) != 0 || rep.Unsigned == 0 {
		t.Errorf("without a key: %+v", rep)
	}
	// A ledger that nobody signed is not the auditor's.
	bare := t.TempDir()
	mustClose(t, quiet(t, Config{Dir: bare}))
	if rep, err := Verify(bare, VerifyOptions{PublicKey: own}); err != nil || rep.Problem == nil || !strings.Contains(rep.Problem.What, "nothing in the ledger is signed") {
		t.Errorf("a ledger without signatures: %v, %v", rep.Problem, err)
	}
}

// A ledger signs by itself: when a segment begins, every while, and when it stops.
func TestCheckpointsAreWrittenInTheBackground(t *testing.T) {
	dir := t.TempDir()
	p := fast
	p.sign = time.Hour
	l, err := open(Config{Dir: dir, MinFree: -1, SyncEvery: time.Millisecond, SegmentBytes: 16 << 10}, osFiles{}, p)
	if err != nil {
		t.Fatal(err)
	}
	calls := uint64(0)
	for range 5 {
		for segment := l.Status().Segment; l.Status().Segment == segment; calls++ {
			rec := record()
			decide(t, l, rec)
			finish(t, l, rec)
		}
		began := l.Status().Seq - 4 // at the earliest: the header's commit
		for deadline := time.Now().Add(20 * time.Second); ; runtime.Gosched() {
			if c := l.Status().Checkpoint; c != nil && c.Commit >= began {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("no checkpoint follows the beginning of segment %d", l.Status().Segment)
			}
		}
	}
	mustClose(t, l)
	rep := mustVerify(t, dir)
	if rep.Segments < 6 || rep.Checkpoints < 5 || rep.Unsigned != 0 || rep.Decisions != calls {
		t.Errorf("Verify = %+v, want several segments, signed to the end", rep)
	}
	if s := l.Status(); s.Checkpoint == nil || s.Checkpoint.Commit != rep.Signed.Commit {
		t.Errorf("Status has the checkpoint %+v, Verify %+v", s.Checkpoint, rep.Signed)
	}
	// A start and a stop with nothing between add none.
	l, err = open(Config{Dir: dir, MinFree: -1, SyncEvery: time.Millisecond, SegmentBytes: 16 << 20}, osFiles{}, p)
	if err != nil {
		t.Fatal(err)
	}
	mustClose(t, l)
	if again := mustVerify(t, dir); again.Last != rep.Last {
		t.Errorf("a start and a stop write records %d to %d", rep.Last+1, again.Last)
	}
}

func TestANewLedgerInTheSameDirectoryKeepsTheOldCheckpoint(t *testing.T) {
	dir := signedLedger(t, false)
	old, err := LatestCheckpoint(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(segmentDir(dir), segmentDir(dir)+".old"); err != nil {
		t.Fatal(err)
	}
	l := quiet(t, Config{Dir: dir})
	mustClose(t, l)
	if id, err := ID(dir); err != nil || id == old.Ledger {
		t.Errorf("ID = %q, %v, want another than %q", id, err, old.Ledger)
	}
	mustVerify(t, dir)
	if c, err := ReadCheckpoint(filepath.Join(dir, "checkpoint-"+old.Ledger+".json")); err != nil || c.Commit != old.Commit {
		t.Errorf("the old checkpoint: %+v, %v", c, err)
	}
}
