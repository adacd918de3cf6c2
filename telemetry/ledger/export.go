package ledger

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/partnerguard/partnerguard/proxy"
)

// Formats of an export.
const (
	// ExportLines are the ledger's own lines, byte for byte, in whole groups with
	// their commits, so that the chain in them can be checked. Lines that the filter
	// leaves out stand there as removed, by their digest.
	ExportLines = "jsonl"
	// ExportCSV and ExportParquet have a row for each call, decision and outcome
	// joined, those that ended first, then those without outcome.
	ExportCSV     = "csv"
	ExportParquet = "parquet"
)

// ExportConfig is what Export needs. Path and Format are required.
type ExportConfig struct {
	Path   string // of the file; its proof is Path with ProofSuffix
	Format string
	Filter ExportFilter
	// Overwrite replaces files that are there; else they are an error that wraps
	// fs.ErrExist.
	Overwrite bool
	// Damaged passes over what does not verify and names it in the proof; else that is
	// a *DamageError, and nothing is exported.
	Damaged bool
	// Key signs the proof. Nil is the key of the data directory.
	Key ed25519.PrivateKey
	// Now is the clock; nil is time.Now.
	Now func() time.Time
	// Progress, if not nil, hears how many bytes of how many are read.
	Progress func(done, total int64)
}

// ExportFilter selects calls by their decision. Empty fields select all; ids are
// compared without case.
type ExportFilter struct {
	Since, Until time.Time // decided in [Since, Until)
	Integration  string
	App          string
	Customer     string
	Tenant       string
	Reason       string
	UserRefs     []string // any of them
}

// maxOpenBytes bounds the decisions that wait for their outcome while calls are
// joined: some 80,000. Past it the oldest goes out without, and the proof counts it.
const maxOpenBytes = 64 << 20

// openOverhead is what a waiting decision takes besides its line, in bytes.
const openOverhead = 160

// Export writes the calls of the ledger in the data directory dir that the filter
// selects to a file, and beside it the proof: what it holds, and that it is this
// ledger. A guard may be writing there. It verifies all that it reads. Memory is
// bounded whatever the size. Neither file is there under its name before both are
// whole.
func Export(ctx context.Context, dir string, cfg ExportConfig) (*Proof, error) {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Key == nil {
		var err error
		if cfg.Key, err = LoadKey(filepath.Join(dir, keyFile)); err != nil {
			return nil, err
		}
	}
	proofPath := cfg.Path + ProofSuffix
	if !cfg.Overwrite {
		for _, name := range []string{cfg.Path, proofPath} {
			if _, err := os.Lstat(name); !errors.Is(err, fs.ErrNotExist) {
				return nil, fmt.Errorf("export to %s: %w", name, fs.ErrExist)
			}
		}
	}
	out, err := os.CreateTemp(filepath.Dir(cfg.Path), filepath.Base(cfg.Path)+".*.tmp") // 0600
	if err != nil {
		return nil, fmt.Errorf("export: %w", err)
	}
	done := false
	defer func() {
		if !done {
			out.Close()
			os.Remove(out.Name())
		}
	}()
	x := &export{ExportConfig: cfg, ctx: ctx, file: counted{w: out, sum: sha256.New()}, open: map[proxy.CallID]*openCall{}}
	if err := x.start(); err != nil {
		return nil, err
	}
	if err := x.read(dir); err != nil {
		return nil, err
	}
	if err := x.finish(); err != nil {
		return nil, fmt.Errorf("export to %s: %w", cfg.Path, err)
	}
	if err := errors.Join(out.Sync(), out.Close()); err != nil {
		return nil, fmt.Errorf("export to %s: %w", cfg.Path, err)
	}
	proof := x.proof()
	text, err := proof.sign(cfg.Key)
	if err != nil {
		return nil, err
	}
	// The old proof goes first: beside a new file it would say that this was changed.
	if err := os.Remove(proofPath); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("export: %w", err)
	}
	if err := os.Rename(out.Name(), cfg.Path); err != nil {
		return nil, fmt.Errorf("export: %w", err)
	}
	done = true
	if err := replaceFile(proofPath, text); err != nil {
		return nil, fmt.Errorf("export: write proof: %w", err)
	}
	return proof, nil
}

// export is one export under way.
type export struct {
	ExportConfig
	ctx  context.Context
	file counted

	lines *bufio.Writer // of jsonl
	rows  interface {
		write(*exportRow) error
		close() error
	}
	began bool // the range of groups, of jsonl

	open   map[proxy.CallID]*openCall
	oldest *openCall // list of open, by decision
	newest *openCall
	bytes  int // that they take

	ledger      string
	after, head link // what was verified: behind after, up to head
	first, last uint64
	count       uint64 // lines or rows written
	opened      uint64 // calls without outcome
	givenUp     uint64 // of these, because too many were open at once
	removed     uint64 // records that retention has removed
	damage      []string
	checkpoints []Checkpoint // the last one before the range, and the last one seen
}

// openCall is a call whose decision was selected, and whose outcome is to come.
type openCall struct {
	call         proxy.CallID
	seq          uint64
	line         []byte // empty in jsonl
	older, newer *openCall
}

// counted counts and hashes what goes to w.
type counted struct {
	w   io.Writer
	sum hash.Hash
	n   int64
}

func (c *counted) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.sum.Write(p[:n])
	c.n += int64(n)
	return n, err
}

func (x *export) start() (err error) {
	switch x.Format {
	case ExportLines:
		x.lines = bufio.NewWriterSize(&x.file, 256<<10)
	case ExportCSV:
		x.rows, err = newCSVRows(&x.file)
	case ExportParquet:
		x.rows = newParquetRows(&x.file)
	default:
		err = fmt.Errorf("export: format %q is not known", x.Format)
	}
	return err
}

// clockSlack is how much earlier than its record a call may have begun, or the clock
// may have gone back.
const clockSlack = 10 * time.Minute

// read walks the segments that the time range needs.
func (x *export) read(dir string) error {
	nums, err := segments(dir)
	if err != nil {
		return err
	}
	if len(nums) == 0 {
		return fmt.Errorf("export: there is no ledger in %s: %w", dir, fs.ErrNotExist)
	}
	begins := make([]time.Time, len(nums))
	for i, num := range nums {
		h, err := readHeader(dir, num)
		var format *FormatError
		if errors.As(err, &format) {
			return err
		}
		// What has no readable header is looked at, whenever it began.
		if err == nil {
			begins[i], _ = time.Parse(time.RFC3339, h.Time)
		}
	}
	from, to := 0, len(nums)
	for i := range nums {
		if i+1 < len(nums) && !begins[i+1].IsZero() && begins[i+1].Add(clockSlack).Before(x.Filter.Since) {
			from = i + 1
		}
	}
	var total, before int64
	for _, num := range nums[from:] {
		total += fileSize(dir, num)
	}
	var prev *walk
	for i := from; i < to; i++ {
		late := !x.Filter.Until.IsZero() && !begins[i].IsZero() && begins[i].After(x.Filter.Until.Add(clockSlack))
		if late && len(x.open) == 0 && prev != nil {
			break
		}
		size := fileSize(dir, nums[i])
		w, err := walkSegment(dir, nums[i], x.group, func(done int64) {
			if x.Progress != nil {
				x.Progress(min(before+done, total), total)
			}
		})
		if prev == nil && errors.Is(err, fs.ErrNotExist) {
			continue // retention removed it meanwhile
		}
		if errors.Is(err, errEnough) {
			break
		}
		if err != nil {
			return err
		}
		before += size
		problem := w.problem
		if !w.damaged() {
			problem = nil
		}
		if prev != nil && problem == nil && !prev.damaged() {
			problem = prev.joins(w, &Report{})
		}
		if problem != nil {
			if err := x.damaged(problem); err != nil {
				return err
			}
		}
		prev = w
	}
	if x.Progress != nil {
		x.Progress(total, total)
	}
	return nil
}

// errEnough ends a walk whose rest is of no interest.
var errEnough = errors.New("nothing more is selected")

func (x *export) damaged(p *Problem) error {
	if !x.Damaged {
		return &DamageError{Segment: p.Segment, Problem: fmt.Sprintf("line %d, record %d: %s", p.Line, p.Seq, p.What)}
	}
	x.damage = append(x.damage, p.String())
	return nil
}

// group takes one group that holds.
func (x *export) group(c *committed) (*Problem, error) {
	if err := x.ctx.Err(); err != nil {
		return nil, err
	}
	if x.head.seq == 0 {
		x.after = link{seq: c.first - 1, hash: c.before}
	}
	_, typ, _, _ := parseHead(c.lines[0])
	if typ == TypeHeader {
		h, err := parseHeader(c.lines[0], c.file)
		if err != nil {
			return nil, err
		}
		x.ledger = h.Ledger
	}
	if x.rows != nil {
		return nil, x.join(c)
	}
	return nil, x.copy(c)
}

// join makes rows of a group.
func (x *export) join(c *committed) error {
	if x.beyond(c) && len(x.open) == 0 {
		return errEnough
	}
	x.head = link{seq: c.seq(), hash: c.hash}
	for i, line := range c.lines {
		seq := c.first + uint64(i)
		_, typ, rest, _ := parseHead(line)
		switch typ {
		case typeRemoved:
			x.removed++
		case TypeCheckpoint:
			x.checkpoint(line)
		case TypeDecision:
			ok, err := x.selects(line)
			if err != nil {
				return fmt.Errorf("read record %d: %w", seq, err)
			}
			if id, known := parseCall(rest); ok && known {
				if err := x.wait(id, seq, line); err != nil {
					return err
				}
			}
		case TypeOutcome:
			id, _ := parseCall(rest)
			call := x.open[id]
			if call == nil {
				continue
			}
			x.forget(call)
			if err := x.row(call, seq, line); err != nil {
				return err
			}
		}
	}
	return nil
}

// wait keeps a decision until its outcome comes.
func (x *export) wait(id proxy.CallID, seq uint64, line []byte) error {
	call := &openCall{call: id, seq: seq, older: x.newest}
	if x.rows != nil {
		call.line = bytes.Clone(line)
	}
	if x.newest != nil {
		x.newest.newer = call
	} else {
		x.oldest = call
	}
	x.newest, x.open[id] = call, call
	x.bytes += len(line) + openOverhead
	for x.bytes > maxOpenBytes {
		first := x.oldest
		x.forget(first)
		x.opened++
		x.givenUp++
		if x.rows == nil {
			continue
		}
		if err := x.row(first, 0, nil); err != nil {
			return err
		}
	}
	return nil
}

// forget takes a call out of those that are open.
func (x *export) forget(call *openCall) {
	delete(x.open, call.call)
	x.bytes -= len(call.line) + openOverhead
	if call.older != nil {
		call.older.newer = call.newer
	} else {
		x.oldest = call.newer
	}
	if call.newer != nil {
		call.newer.older = call.older
	} else {
		x.newest = call.older
	}
}

// row writes one call; outcome is empty when there is none.
func (x *export) row(call *openCall, seq uint64, outcome []byte) error {
	r := exportRow{N: int64(call.seq), OutcomeN: int64(seq)}
	if err := r.take(call.line); err != nil {
		return fmt.Errorf("read record %d: %w", call.seq, err)
	}
	r.RequestID, r.CorrelationID = cmp.Or(r.RequestID, r.Call), cmp.Or(r.CorrelationID, r.Call)
	if len(outcome) > 0 {
		if err := r.take(outcome); err != nil {
			return fmt.Errorf("read record %d: %w", seq, err)
		}
	}
	x.mark(call.seq)
	x.mark(seq)
	x.count++
	return x.rows.write(&r)
}

// mark notes that a record is in the file.
func (x *export) mark(seq uint64) {
	if seq == 0 {
		return
	}
	if x.first == 0 || seq < x.first {
		x.first = seq
	}
	x.last = max(x.last, seq)
}

// copy takes a group of lines as they stand.
func (x *export) copy(c *committed) error {
	if !x.began && !x.Filter.Since.IsZero() {
		times := groupTimes(c)
		if len(times) > 0 && !slices.ContainsFunc(times, func(t time.Time) bool { return !t.Before(x.Filter.Since) }) {
			x.after = link{seq: c.seq(), hash: c.hash}
			x.head = x.after
			for _, line := range c.lines {
				if _, typ, _, _ := parseHead(line); typ == TypeCheckpoint {
					x.checkpoint(line)
				}
			}
			return nil
		}
	}
	if x.began = true; x.beyond(c) {
		return errEnough
	}
	x.head = link{seq: c.seq(), hash: c.hash}
	changed := false
	check := append([]byte(nil), c.hash[:checkHash]...)
	for i, line := range c.lines {
		out, err := x.line(c.first+uint64(i), line)
		if err != nil {
			return err
		}
		changed = changed || len(out) != len(line)
		check = appendCheck(check, out)
		if _, err := x.lines.Write(out); err != nil {
			return err
		}
	}
	commit := c.commit
	if changed {
		commit = appendCommit(nil, c.seq(), check)
	}
	x.count += uint64(len(c.lines)) + 1
	x.mark(c.first)
	x.mark(c.seq())
	_, err := x.lines.Write(commit)
	return err
}

// line is line as it stands, or as removed when the filter leaves it out.
func (x *export) line(seq uint64, line []byte) ([]byte, error) {
	_, typ, rest, _ := parseHead(line)
	keep := true
	switch typ {
	case TypeCheckpoint:
		x.checkpoint(line)
	case typeRemoved:
		x.removed++
	case TypeDecision:
		if !x.Filter.byField() {
			break
		}
		ok, err := x.selects(line)
		if err != nil {
			return nil, fmt.Errorf("read record %d: %w", seq, err)
		}
		if id, known := parseCall(rest); ok && known {
			if err := x.wait(id, seq, line[:0]); err != nil {
				return nil, err
			}
		}
		keep = ok
	case TypeOutcome:
		if !x.Filter.byField() {
			break
		}
		id, _ := parseCall(rest)
		call := x.open[id]
		if keep = call != nil; keep {
			x.forget(call)
		}
	}
	if keep {
		return line, nil
	}
	sum := sha256.Sum256(line)
	out := append(appendHead(nil, seq, typeRemoved), removedHash...)
	return append(base64.RawURLEncoding.AppendEncode(out, sum[:]), "\"}\n"...), nil
}

// groupTimes are when the records of a group were made, as far as they say so.
func groupTimes(c *committed) []time.Time {
	var times []time.Time
	for _, line := range c.lines {
		_, typ, _, _ := parseHead(line)
		at := "time"
		if typ == TypeGap {
			at = "until"
		}
		eachMember(string(line), func(name string, v value) (bool, error) {
			if name != at {
				return true, nil
			}
			if t, err := v.time(); err == nil {
				times = append(times, t)
			}
			return false, nil
		})
	}
	return times
}

// beyond reports whether a group lies behind the time range.
func (x *export) beyond(c *committed) bool {
	if x.Filter.Until.IsZero() {
		return false
	}
	times := groupTimes(c)
	limit := x.Filter.Until
	if x.rows != nil {
		limit = limit.Add(clockSlack) // a call that began before may be decided late
	}
	return len(times) > 0 && !slices.ContainsFunc(times, func(t time.Time) bool { return t.Before(limit) })
}

// checkpoint keeps the last checkpoint of what comes before the range, and the last
// one that is in it.
func (x *export) checkpoint(line []byte) {
	c, err := ParseCheckpoint(line)
	if err != nil {
		return
	}
	n := len(x.checkpoints)
	switch {
	case c.Commit <= x.after.seq:
		x.checkpoints = append(x.checkpoints[:0], c)
	case n > 0 && x.checkpoints[n-1].Commit > x.after.seq:
		x.checkpoints[n-1] = c
	default:
		x.checkpoints = append(x.checkpoints, c)
	}
}

func (x *export) finish() error {
	if x.rows == nil {
		x.opened += uint64(len(x.open))
		return x.lines.Flush()
	}
	for call := x.oldest; call != nil; call = call.newer {
		x.opened++
		if err := x.row(call, 0, nil); err != nil {
			return err
		}
	}
	return x.rows.close()
}

// selects reports whether the filter takes a decision.
func (x *export) selects(line []byte) (bool, error) {
	f := &x.Filter
	want := 0
	for _, s := range []string{f.Integration, f.App, f.Customer, f.Tenant, f.Reason} {
		if s != "" {
			want++
		}
	}
	if f.UserRefs != nil {
		want++
	}
	timed := !f.Since.IsZero() || !f.Until.IsZero()
	if timed {
		want++
	}
	if want == 0 {
		return true, nil
	}
	no := false
	err := eachMember(string(line), func(name string, v value) (bool, error) {
		var is func(string) bool
		switch {
		case name == "time" && timed:
			t, err := v.time()
			if no = t.Before(f.Since) || !f.Until.IsZero() && !t.Before(f.Until); err != nil || no {
				return false, err
			}
			want--
			return want > 0, nil
		case name == "integration" && f.Integration != "":
			is = func(s string) bool { return s == f.Integration }
		case name == "app_id" && f.App != "":
			is = func(s string) bool { return strings.EqualFold(s, f.App) }
		case name == "customer" && f.Customer != "":
			is = func(s string) bool { return strings.EqualFold(s, f.Customer) }
		case name == "tid" && f.Tenant != "":
			is = func(s string) bool { return strings.EqualFold(s, f.Tenant) }
		case name == "reason" && f.Reason != "":
			is = func(s string) bool { return s == f.Reason }
		case name == "user_ref" && f.UserRefs != nil:
			is = func(s string) bool { return slices.Contains(f.UserRefs, s) }
		default:
			return true, nil
		}
		s, err := v.text()
		no = err != nil || !is(s)
		want--
		return !no && want > 0, err
	})
	return err == nil && !no && want == 0, err
}

// byField reports whether the filter selects by more than time.
func (f *ExportFilter) byField() bool {
	return f.Integration != "" || f.App != "" || f.Customer != "" || f.Tenant != "" || f.Reason != "" || f.UserRefs != nil
}

// String says in words what the filter selects.
func (f *ExportFilter) String() string {
	var words []string
	add := func(name, s string) {
		if s != "" {
			words = append(words, name+" "+strconv.Quote(s))
		}
	}
	if !f.Since.IsZero() {
		words = append(words, "decided at or after "+f.Since.UTC().Format(time.RFC3339Nano))
	}
	if !f.Until.IsZero() {
		words = append(words, "decided before "+f.Until.UTC().Format(time.RFC3339Nano))
	}
	add("integration", f.Integration)
	add("app", f.App)
	add("customer", f.Customer)
	add("tenant", f.Tenant)
	add("reason", f.Reason)
	if f.UserRefs != nil {
		words = append(words, "user_ref "+strings.Join(f.UserRefs, " or "))
	}
	if len(words) == 0 {
		return "all calls"
	}
	return "calls with: " + strings.Join(words, "; ")
}
