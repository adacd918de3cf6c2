package ledger

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"
)

// dying is the operating system's file system for a process that dies before its
// n-th change: nothing happens from then on, not even cleaning up.
type dying struct {
	osFiles
	n *int
}

var errDead = errors.New("the process is dead")

func (d dying) alive() error {
	if *d.n--; *d.n < 0 {
		return errDead
	}
	return nil
}

type dyingFile struct {
	file
	d dying
}

func (d dying) create(name string) (file, error) {
	if err := d.alive(); err != nil {
		return nil, err
	}
	f, err := d.osFiles.create(name)
	return dyingFile{f, d}, err
}

func (d dying) rename(from, to string) error {
	return errors.Join(d.alive(), d.do(func() error { return d.osFiles.rename(from, to) }))
}

func (d dying) remove(name string) error {
	if err := d.alive(); err != nil {
		return err
	}
	return d.osFiles.remove(name)
}

func (d dying) syncDir(dir string) error { return d.alive() }

func (d dying) do(what func() error) error {
	if *d.n < 0 {
		return errDead
	}
	return what()
}

func (f dyingFile) Write(p []byte) (int, error) {
	if err := f.d.alive(); err != nil {
		n, _ := f.file.Write(p[:len(p)/2]) // half of it is there
		return n, err
	}
	return f.file.Write(p)
}

func (f dyingFile) datasync() error { return f.d.alive() }

func noRest() error { return nil }

// all returns what a reader delivers from at on, and the places behind each record.
func readFrom(t testing.TB, dir string, at Position) (got []string, next []Position) {
	t.Helper()
	r, err := NewReader(dir, at)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	for {
		e, err := r.Next()
		if errors.Is(err, io.EOF) {
			return got, next
		}
		if err != nil {
			t.Fatal(err)
		}
		got, next = append(got, string(e.Line)), append(next, e.Next)
	}
}

func TestADeathDuringCompressionLosesNothing(t *testing.T) {
	steps := 0
	sound := signedLedger(t, false)
	for n := 0; ; n++ {
		dir := copyLedger(t, sound)
		want, _ := readFrom(t, dir, Position{})
		left := n
		err := compressSegment(dying{n: &left}, dir, 2, noRest)
		if got, _ := readFrom(t, dir, Position{}); !cmp.Equal(want, got) {
			t.Errorf("after %d steps (-want +got):\n%s", n, cmp.Diff(want, got))
		}
		mustVerify(t, dir)
		// The next start finishes the work.
		mustClose(t, quiet(t, Config{Dir: dir, Instance: "2"}))
		if _, serr := os.Stat(segmentPath(dir, 2)); serr == nil {
			if err := compressSegment(osFiles{}, dir, 2, noRest); err != nil {
				t.Errorf("after %d steps, compressed again: %v", n, err)
			}
		}
		if files, _ := filepath.Glob(filepath.Join(segmentDir(dir), "*2.jsonl*")); len(files) != 1 || !strings.HasSuffix(files[0], compressedSuffix) {
			t.Errorf("after %d steps there is %v, want the compressed file", n, files)
		}
		if got, _ := readFrom(t, dir, Position{}); !cmp.Equal(want, got) {
			t.Errorf("after %d steps and a start (-want +got):\n%s", n, cmp.Diff(want, got))
		}
		mustVerify(t, dir)
		if err == nil {
			break
		}
		if !errors.Is(err, errDead) {
			t.Fatal(err)
		}
		steps++
	}
	if steps < 6 {
		t.Errorf("%d steps; the test tests little", steps)
	}
}

func TestWhatCannotBeReadBackStaysAsItIs(t *testing.T) {
	dir := signedLedger(t, false)
	fs := &faulty{}
	fs.onWrite = func(p []byte, write func([]byte) (int, error)) (int, error) {
		b := slices.Clone(p)
		b[len(b)-1]++
		return write(b)
	}
	if err := compressSegment(fs, dir, 1, noRest); err == nil {
		t.Error("a disk that changes bytes is not noticed")
	}
	if files, _ := filepath.Glob(filepath.Join(segmentDir(dir), "*1.jsonl*")); len(files) != 1 || files[0] != segmentPath(dir, 1) {
		t.Errorf("there is %v, want the original alone", files)
	}
}

func TestTheOriginalWinsBesideACompressedOne(t *testing.T) {
	dir := signedLedger(t, true)
	stale, err := os.ReadFile(compressedPath(dir, 1))
	if err != nil {
		t.Fatal(err)
	}
	want, _ := readFrom(t, dir, Position{})
	if err := os.WriteFile(segmentPath(dir, 2), content(t, dir, 2), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(compressedPath(dir, 2), stale, 0o600); err != nil {
		t.Fatal(err)
	}
	if got, _ := readFrom(t, dir, Position{}); !cmp.Equal(want, got) {
		t.Errorf("(-want +got):\n%s", cmp.Diff(want, got))
	}
	mustVerify(t, dir)
	if nums, err := segments(dir); err != nil || len(nums) != 3 {
		t.Errorf("segments = %v, %v", nums, err)
	}
}

// A follower reads on, wherever it stands, when the segment is compressed under it.
func TestReadersGoOnThroughCompression(t *testing.T) {
	dir := signedLedger(t, false)
	want, next := readFrom(t, dir, Position{})
	open, err := NewReader(dir, Position{})
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	if _, err := open.Next(); err != nil {
		t.Fatal(err)
	}
	for num := range uint64(2) {
		if err := compressSegment(osFiles{}, dir, num+1, noRest); err != nil {
			t.Fatal(err)
		}
	}
	for i := 1; ; i++ {
		e, err := open.Next()
		if errors.Is(err, io.EOF) {
			if i != len(want) {
				t.Errorf("the open reader saw %d records, want %d", i, len(want))
			}
			break
		}
		if err != nil || string(e.Line) != want[i] || e.Next != next[i] {
			t.Fatalf("record %d of the open reader = %s at %v, %v; want %s", i, e.Line, e.Next, err, want[i])
		}
	}
	for i, at := range next {
		if got, _ := readFrom(t, dir, at); !slices.Equal(got, want[i+1:]) {
			t.Errorf("from %v (-want +got):\n%s", at, cmp.Diff(want[i+1:], got))
		}
	}
	if _, err := NewReader(dir, Position{Segment: 2, Offset: 1 << 20}); !errors.Is(err, ErrPosition) {
		t.Errorf("NewReader beyond a compressed segment = %v, want ErrPosition", err)
	}
	if at, _, err := Tail(dir); err != nil || at != next[len(next)-1] {
		t.Errorf("Tail = %v, %v, want %v", at, err, next[len(next)-1])
	}
	if err := os.Remove(segmentPath(dir, 3)); err != nil {
		t.Fatal(err)
	}
	got, next := readFrom(t, dir, Position{})
	if at, _, err := Tail(dir); err != nil || at != next[len(got)-1] {
		t.Errorf("Tail of a compressed segment = %v, %v, want %v", at, err, next[len(got)-1])
	}
}

func TestReaderPassesOverWhatIsDamagedInACompressedSegment(t *testing.T) {
	dir := signedLedger(t, true)
	before, _ := readFrom(t, dir, Position{})
	path := compressedPath(dir, 2)
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, b[:len(b)/2], 0o600); err != nil {
		t.Fatal(err)
	}
	r, err := NewReader(dir, Position{})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	damage, last := 0, ""
	for {
		e, err := r.Next()
		var d *DamageError
		if errors.As(err, &d) {
			if damage++; !strings.Contains(d.Problem, "compressed file is damaged") {
				t.Errorf("damage: %v", d)
			}
			continue
		}
		if err != nil {
			break
		}
		last = string(e.Line)
	}
	if damage != 1 || last != before[len(before)-1] {
		t.Errorf("%d damages, the last record is %s; want one, and the end of the ledger", damage, last)
	}
	// From a place that cannot be reached any more, too.
	r, err = NewReader(dir, Position{Segment: 2, Offset: int64(len(content(t, signedLedger(t, false), 2)) - 10)})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	var d *DamageError
	if _, err := r.Next(); !errors.As(err, &d) {
		t.Errorf("Next = %v, want damage", err)
	}
	if e, err := r.Next(); err != nil || e.Type != TypeHeader {
		t.Errorf("Next after the damage = %+v, %v, want the next header", e, err)
	}
}

func TestADamagedCompressedSegmentIsSetAside(t *testing.T) {
	dir := signedLedger(t, true)
	if err := os.Remove(segmentPath(dir, 3)); err != nil {
		t.Fatal(err)
	}
	put(t, dir, 2, []byte(strings.Replace(string(content(t, dir, 2)), "GET", "PUT", 1)))
	l := quiet(t, Config{Dir: dir, Instance: "2"})
	s := l.Status()
	if len(s.SetAside) != 1 || !strings.HasPrefix(s.SetAside[0], "000000000002.jsonl.zst.damaged-") {
		t.Errorf("set aside: %v", s.SetAside)
	}
	decide(t, l, record())
	l.checkpoint()
	mustClose(t, l)
	if rep := mustVerify(t, dir); rep.Segments < 2 || len(rep.SetAside) != 1 || rep.Decisions < 4 {
		t.Errorf("Verify = %+v, want the damaged one set aside, and what is good of it kept", rep)
	}
}

// A start after the last segment was lost, with the one before it compressed.
func TestAnUndamagedCompressedSegmentIsGoneOnBehind(t *testing.T) {
	dir := signedLedger(t, true)
	if err := os.Remove(segmentPath(dir, 3)); err != nil {
		t.Fatal(err)
	}
	l := quiet(t, Config{Dir: dir, Instance: "1"})
	decide(t, l, record())
	l.checkpoint()
	mustClose(t, l)
	if rep := mustVerify(t, dir); rep.Segments != 3 {
		t.Errorf("Verify = %+v, want a third segment", rep)
	}
}

func TestSegmentsThatAreDoneAreCompressed(t *testing.T) {
	dir := t.TempDir()
	p := fast
	p.rest = 1
	l, err := open(Config{Dir: dir, MinFree: -1, SyncEvery: time.Millisecond, SegmentBytes: 64 << 10, Compress: true}, osFiles{}, p)
	if err != nil {
		t.Fatal(err)
	}
	for range 400 {
		rec := record()
		decide(t, l, rec)
		finish(t, l, rec)
	}
	last := l.Status().Segment
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(time.Millisecond) {
		plain, _ := filepath.Glob(filepath.Join(segmentDir(dir), "*"+segmentSuffix))
		if len(plain) == 1 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("not compressed: %v; %v", plain, l.Status().Err)
		}
	}
	if _, err := os.Stat(segmentPath(dir, last)); err != nil {
		t.Errorf("the segment being written: %v", err)
	}
	mustClose(t, l)
	rep := mustVerify(t, dir)
	if rep.Decisions != 400 || rep.Outcomes != 400 || rep.Segments < 8 {
		t.Errorf("Verify = %+v, want 400 calls in several segments", rep)
	}
	for _, path := range []string{compressedPath(dir, 1)} {
		if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", path, fi, err)
		}
	}
}

func TestOrdinaryToolsReadACompressedSegment(t *testing.T) {
	zstdcat, err := exec.LookPath("zstdcat")
	if err != nil {
		t.Skip("zstdcat is not installed")
	}
	dir := signedLedger(t, true)
	got, err := exec.Command(zstdcat, compressedPath(dir, 1)).Output()
	if err != nil || string(got) != string(content(t, dir, 1)) {
		t.Errorf("zstdcat: %v, %d bytes", err, len(got))
	}
}

// TestSizeOfACall keeps the account of a call small. What it holds that nobody can
// guess is some 55 bytes: the call's id, Microsoft's two, the times; then the checks
// of its commits.
func TestSizeOfACall(t *testing.T) {
	const calls = 20_000
	dir := t.TempDir()
	raw, packed := trafficLedger(t, dir, calls)
	t.Logf("%d bytes a call, %d compressed", raw/calls, packed/calls)
	if got := packed / calls; got > 155 {
		t.Errorf("%d bytes a call", got)
	}
	mustVerify(t, dir)
}

// trafficLedger writes so many calls of a partner's traffic, an outcome with the
// next decision, and compresses them. It returns the sizes before and after.
func trafficLedger(t testing.TB, dir string, calls int) (raw, packed int64) {
	t.Helper()
	tr := newTraffic()
	l := quiet(t, Config{Dir: dir, Retention: -1, Now: tr.clock})
	for range calls {
		rec := tr.call(10 * time.Millisecond)
		decide(t, l, rec)
		finish(t, l, rec)
	}
	mustClose(t, l)
	nums, err := segments(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, num := range nums {
		raw += fileSize(dir, num)
		if err := compressSegment(osFiles{}, dir, num, noRest); err != nil {
			t.Fatal(err)
		}
		packed += fileSize(dir, num)
	}
	return raw, packed
}

// BenchmarkCompress shows what the levels cost for 64 MiB of traffic.
func BenchmarkCompress(b *testing.B) {
	dir := b.TempDir()
	tr := newTraffic()
	l := quiet(b, Config{Dir: dir, Retention: -1, Now: tr.clock})
	calls := 0
	for l.Status().Segment < 2 {
		rec := tr.call(10 * time.Millisecond)
		decide(b, l, rec)
		finish(b, l, rec)
		calls++
	}
	mustClose(b, l)
	text := content(b, dir, 1)
	for _, level := range []zstd.EncoderLevel{zstd.SpeedDefault, zstd.SpeedBetterCompression} {
		b.Run(fmt.Sprint(level), func(b *testing.B) {
			b.SetBytes(int64(len(text)))
			var n countWriter
			for b.Loop() {
				n = 0
				enc, err := zstd.NewWriter(&n, zstd.WithEncoderLevel(level), zstd.WithEncoderConcurrency(1), zstd.WithLowerEncoderMem(true), zstd.WithWindowSize(8<<20))
				if err != nil {
					b.Fatal(err)
				}
				if _, err := enc.Write(text); err != nil {
					b.Fatal(err)
				}
				if err := enc.Close(); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(n)/float64(calls), "B/call")
		})
	}
}

type countWriter int64

func (n *countWriter) Write(p []byte) (int, error) {
	*n += countWriter(len(p))
	return len(p), nil
}
