package ledger

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/parquet-go/parquet-go"
	"github.com/partnerguard/partnerguard/policy"
	"github.com/partnerguard/partnerguard/proxy"
)

var exportBegin = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// estate makes a ledger of n calls, a minute apart, over several segments: of three
// integrations, one call in seven still open, all others ended out of order.
func estate(t testing.TB, n int) (dir string, calls []*proxy.Record) {
	t.Helper()
	dir = t.TempDir()
	now := newClock(exportBegin)
	l := mustOpen(t, Config{Dir: dir, SegmentBytes: 16 << 10, Now: now.time, Retention: -1})
	for i := range n {
		now.add(time.Minute)
		rec := record()
		rec.Time, rec.Integration = now.time(), []string{"nightly-billing", "orders", "=cmd|'/c calc'!A1"}[i%3]
		rec.RequestID = fmt.Sprintf("request-%d", i)
		rec.UserAgent = "agent \"x\", \u202ereversed\x1b[2J"
		if i%2 == 1 {
			rec.Token.MFA, rec.Token.AMR, rec.MFACompliant = policy.MFAAbsent, nil, policy.CompliantUnknown
			rec.Decision = policy.Decision{Effect: policy.Reject, Reason: policy.ReasonMFAMissing, Mode: policy.Enforce, WouldReject: true}
		}
		calls = append(calls, rec)
		decide(t, l, rec)
		if i%7 != 3 && i > 0 && (i-1)%7 != 3 {
			finish(t, l, calls[i-1])
		}
	}
	mustClose(t, l)
	return dir, calls
}

func mustExport(t testing.TB, dir string, cfg ExportConfig) *Proof {
	t.Helper()
	p, err := Export(context.Background(), dir, cfg)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func proves(t testing.TB, path string) ProofReport {
	t.Helper()
	rep, err := VerifyProof(path+ProofSuffix, nil)
	if err != nil || rep.Problem != "" {
		t.Errorf("VerifyProof = %q, %v", rep.Problem, err)
	}
	return rep
}

func TestAnExportHoldsEveryCallOnce(t *testing.T) {
	dir, calls := estate(t, 120)
	out := t.TempDir()
	ended := map[string]bool{}
	for _, e := range readAll(t, dir) {
		if e.Type == TypeOutcome {
			var l struct{ Call string }
			mustUnmarshal(t, e.Line, &l)
			ended[l.Call] = true
		}
	}

	path := filepath.Join(out, "calls.csv")
	proof := mustExport(t, dir, ExportConfig{Path: path, Format: ExportCSV})
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Count(data, []byte("\r\n")) != len(calls)+1 || bytes.Count(data, []byte("\n")) != len(calls)+1 {
		t.Errorf("%d lines end with CRLF, %d with LF, want %d of both", bytes.Count(data, []byte("\r\n")), bytes.Count(data, []byte("\n")), len(calls)+1)
	}
	if bytes.ContainsAny(data, "\x1b") || bytes.Contains(data, []byte("\u202e")) {
		t.Error("the CSV file holds what drives a terminal")
	}
	rows, err := csv.NewReader(bytes.NewReader(data)).ReadAll()
	if err != nil {
		t.Fatal(err)
	}
	column := map[string]int{}
	for i, name := range rows[0] {
		column[name] = i
	}
	byCall := map[string][]string{}
	for _, r := range rows[1:] {
		if byCall[r[column["call"]]] != nil {
			t.Errorf("call %s has two rows", r[column["call"]])
		}
		byCall[r[column["call"]]] = r
	}
	open := uint64(0)
	for _, c := range calls {
		r := byCall[c.Call.String()]
		if r == nil {
			t.Fatalf("call %s has no row", c.Call)
		}
		want := map[string]string{
			"time": c.Time.Format(time.RFC3339), "method": "GET", "verified": "true", "app_id": c.Token.AppID, "iat": "2026-12-01T08:30:05Z",
			"reason": string(c.Reason), "would_reject": fmt.Sprint(c.WouldReject), "request_id": c.RequestID,
			"user_agent": `agent "x", \u202ereversed\u001b[2J`, "integration": c.Integration, "status": "200", "duration_ms": "12.345", "amr": "pwd; mfa",
			"mfa_compliant": "true",
		}
		if strings.HasPrefix(c.Integration, "=") {
			want["integration"] = "'" + c.Integration
		}
		if c.WouldReject {
			want["amr"], want["mfa_compliant"] = "", ""
		}
		if !ended[c.Call.String()] {
			want["status"], want["duration_ms"], want["mfa_compliant"], want["outcome_n"] = "", "", "", ""
			open++
		}
		for name, w := range want {
			if got := r[column[name]]; got != w {
				t.Errorf("call %s: %s is %q, want %q", c.Call, name, got, w)
			}
		}
	}
	if proof.File.Rows != uint64(len(calls)) || proof.Open != open || open == 0 || proof.Filter != "all calls" {
		t.Errorf("proof = %+v, want %d rows, %d open", proof, len(calls), open)
	}
	proves(t, path)

	// Parquet says the same, with types.
	path = filepath.Join(out, "calls.parquet")
	mustExport(t, dir, ExportConfig{Path: path, Format: ExportParquet})
	proves(t, path)
	typed, err := parquet.ReadFile[exportRow](path)
	if err != nil {
		t.Fatal(err)
	}
	if len(typed) != len(calls) {
		t.Fatalf("%d rows in Parquet, want %d", len(typed), len(calls))
	}
	byID := map[string]exportRow{}
	for _, r := range typed {
		byID[r.Call] = r
	}
	for _, c := range calls {
		r := byID[c.Call.String()]
		if !r.Time.Equal(c.Time) || r.Integration != c.Integration || r.UserAgent != c.UserAgent || !slices.Equal(r.AMR, c.Token.AMR) ||
			r.WouldReject == nil || *r.WouldReject != c.WouldReject || r.IssuedAt.Unix() != c.Token.IssuedAt || !slices.Equal(r.QueryNames, c.QueryNames) {
			t.Errorf("call %s in Parquet: %+v", c.Call, r)
		}
		if over := ended[c.Call.String()]; over != (r.Status == 200) || over != (r.OutcomeN > 0) || over && !c.WouldReject != (r.MFACompliant != nil) {
			t.Errorf("call %s, ended %v, in Parquet: %+v", c.Call, over, r)
		}
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	info, _ := f.Stat()
	pf, err := parquet.OpenFile(f, info.Size())
	if err != nil {
		t.Fatal(err)
	}
	schema := pf.Schema().String()
	for _, want := range []string{"optional int64 time (TIMESTAMP(isAdjustedToUTC=true,unit=MICROS))", "optional boolean verified", "optional int64 status", "optional double duration_ms", "optional group amr (LIST)"} {
		if !strings.Contains(schema, want) {
			t.Errorf("the schema lacks %q:\n%s", want, schema)
		}
	}
	if names := exportColumns(); !slices.Equal(names, rows[0]) || len(names) != reflect.TypeFor[exportRow]().NumField() {
		t.Errorf("columns %v, header %v", names, rows[0])
	}
}

func TestExportedLinesAreTheLedgersOwn(t *testing.T) {
	dir, _ := estate(t, 120)
	path := filepath.Join(t.TempDir(), "calls.jsonl")
	proof := mustExport(t, dir, ExportConfig{Path: path, Format: ExportLines})
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var want []byte
	nums, err := segments(dir)
	if err != nil || len(nums) < 3 {
		t.Fatalf("segments %v, %v", nums, err)
	}
	for _, n := range nums {
		f, err := openSegment(dir, n)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		want = append(want, b...)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%d bytes exported, the segments have %d, and they differ", len(got), len(want))
	}
	if n := uint64(bytes.Count(want, []byte("\n"))); proof.File.Rows != n || proof.First != 1 || proof.Last != n {
		t.Errorf("proof = %+v, want %d rows, 1 to that", proof, n)
	}
	proves(t, path)
	if rep, err := Verify(dir, VerifyOptions{Checkpoints: proof.Marks()}); err != nil || rep.Problem != nil {
		t.Errorf("the proof is not on its ledger's chain: %v, %v", rep.Problem, err)
	}
	other, _ := estate(t, 20)
	if rep, err := Verify(other, VerifyOptions{Checkpoints: proof.Marks()}); err != nil || rep.Problem == nil {
		t.Errorf("the proof is on another ledger's chain: %v", err)
	}
}

// What a filter leaves out of the lines is not in the file, and the chain holds.
func TestFilteredLinesKeepTheChain(t *testing.T) {
	dir, calls := estate(t, 120)
	path := filepath.Join(t.TempDir(), "orders.jsonl")
	since, until := exportBegin.Add(31*time.Minute), exportBegin.Add(91*time.Minute)
	filter := ExportFilter{Integration: "orders", Since: since, Until: until}
	mustExport(t, dir, ExportConfig{Path: path, Format: ExportLines, Filter: filter})
	proves(t, path)
	want, got := map[string]bool{}, map[string]int{}
	for _, c := range calls {
		if c.Integration == "orders" && !c.Time.Before(since) && c.Time.Before(until) {
			want[c.Call.String()] = true
		}
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	removed := 0
	for line := range bytes.Lines(data) {
		var l struct{ Type, Call string }
		mustUnmarshal(t, line, &l)
		switch l.Type {
		case TypeDecision, TypeOutcome:
			if !want[l.Call] {
				t.Errorf("a call that was not asked for is in the file: %s", line)
			}
			if l.Type == TypeDecision {
				got[l.Call]++
			}
		case typeRemoved:
			removed++
		}
	}
	if len(got) != len(want) || len(want) != 20 || removed == 0 {
		t.Errorf("%d calls in the file, %d lines left out, want %d calls", len(got), removed, len(want))
	}
	if bytes.Contains(data, []byte("nightly-billing")) {
		t.Error("the file names another integration")
	}

	rows := filepath.Join(t.TempDir(), "orders.csv")
	proof := mustExport(t, dir, ExportConfig{Path: rows, Format: ExportCSV, Filter: filter})
	if proof.File.Rows != uint64(len(want)) {
		t.Errorf("%d rows in CSV, want %d", proof.File.Rows, len(want))
	}
	const words = `calls with: decided at or after 2026-03-01T12:31:00Z; decided before 2026-03-01T13:31:00Z; integration "orders"`
	if proof.Filter != words {
		t.Errorf("filter in words = %s\nwant %s", proof.Filter, words)
	}
	for name, f := range map[string]ExportFilter{
		"nobody":  {UserRefs: []string{}},
		"a user":  {UserRefs: []string{strings.Repeat("A", 22)}},
		"no such": {App: "7d1f0a52-9b3c-4c1e-8f60-2a5b9c0d1e12"},
	} {
		if p := mustExport(t, dir, ExportConfig{Path: filepath.Join(t.TempDir(), "x"), Format: ExportCSV, Filter: f}); p.File.Rows != 0 || p.First != 0 {
			t.Errorf("%s: %d rows, first %d, want none", name, p.File.Rows, p.First)
		}
	}
	for name, f := range map[string]ExportFilter{
		"app":      {App: strings.ToUpper(calls[0].Token.AppID)},
		"customer": {Customer: strings.ToUpper(calls[0].Customer)},
		"tenant":   {Tenant: strings.ToUpper(calls[0].Token.TenantID)},
	} {
		if p := mustExport(t, dir, ExportConfig{Path: filepath.Join(t.TempDir(), "x"), Format: ExportCSV, Filter: f}); p.File.Rows != uint64(len(calls)) {
			t.Errorf("%s: %d rows, want all", name, p.File.Rows)
		}
	}
}

func TestAChangedExportIsFound(t *testing.T) {
	dir, _ := estate(t, 40)
	key, err := LoadPublicKey(filepath.Join(dir, publicFile))
	if err != nil {
		t.Fatal(err)
	}
	stranger, _, _ := ed25519.GenerateKey(rand.Reader)
	replace := func(old, new string) func(string) string {
		return func(s string) string {
			if !strings.Contains(s, old) {
				t.Fatalf("no %q in %.300s", old, s)
			}
			return strings.Replace(s, old, new, 1)
		}
	}
	for _, c := range []struct {
		name   string
		format string
		file   func(string) string
		proof  func(string) string
		key    ed25519.PublicKey
		want   string // empty: it holds
	}{
		{name: "as it was", format: ExportCSV, key: key},
		{name: "proof laid out anew", format: ExportCSV, key: key, proof: func(s string) string {
			var b bytes.Buffer
			if err := json.Indent(&b, []byte(s), "", "\t"); err != nil {
				t.Fatal(err)
			}
			return b.String()
		}},
		{name: "a cell changed", format: ExportCSV, file: replace("orders", "0rders"), want: "was changed"},
		{name: "a row gone", format: ExportCSV, file: func(s string) string { return s[:strings.LastIndex(strings.TrimSpace(s), "\r\n")+2] }, want: "bytes, the proof is of"},
		{name: "rows counted otherwise", format: ExportCSV, proof: replace(`"rows":40`, `"rows":41`), want: "signature of the proof is false"},
		{name: "filter told otherwise", format: ExportCSV, proof: replace(`all calls`, `all cells`), want: "signature of the proof is false"},
		{name: "another key asked for", format: ExportCSV, key: stranger, want: "signed with the key"},
		{name: "a line changed", format: ExportLines, file: replace(`"status":200`, `"status":201`), want: "was changed"},
		{name: "a line cut", format: ExportLines, file: func(s string) string { return s[:len(s)-9] }, want: "bytes, the proof is of"},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "calls."+c.format)
			mustExport(t, dir, ExportConfig{Path: path, Format: c.format})
			for name, change := range map[string]func(string) string{path: c.file, path + ProofSuffix: c.proof} {
				if change == nil {
					continue
				}
				b, err := os.ReadFile(name)
				if err == nil {
					err = os.WriteFile(name, []byte(change(string(b))), 0o600)
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			rep, err := VerifyProof(path+ProofSuffix, c.key)
			if err != nil {
				t.Fatal(err)
			}
			if rep.Trusted != (c.key != nil) || (c.want == "") != (rep.Problem == "") || !strings.Contains(rep.Problem, c.want) {
				t.Errorf("trusted %v, problem %q, want one that says %q", rep.Trusted, rep.Problem, c.want)
			}
		})
	}

	// Who signs a changed file anew with his own key is found by the key, and a chain
	// that was made anew by the ledger.
	path := filepath.Join(t.TempDir(), "calls.csv")
	_, own, _ := ed25519.GenerateKey(rand.Reader)
	proof := mustExport(t, dir, ExportConfig{Path: path, Format: ExportCSV, Key: own})
	proves(t, path)
	if rep, _ := VerifyProof(path+ProofSuffix, key); rep.Problem == "" {
		t.Error("a proof signed with another key holds")
	}
	if rep, err := Verify(dir, VerifyOptions{Checkpoints: []Checkpoint{proof.Head}}); err != nil || rep.Problem == nil {
		t.Errorf("the ledger knows a proof signed with another key: %v", err)
	}
	for _, bad := range []string{"", "{}", `{"statement":{},"signature":""}`, "a,b\r\n"} {
		name := filepath.Join(t.TempDir(), "bad"+ProofSuffix)
		if err := os.WriteFile(name, []byte(bad), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := VerifyProof(name, nil); err == nil || !strings.Contains(err.Error(), "no proof of an export") {
			t.Errorf("VerifyProof of %q = %v", bad, err)
		}
	}
}

func TestADamagedRangeIsNotExportedUnasked(t *testing.T) {
	dir, calls := estate(t, 60)
	edit(t, dir, 1, func(lines []string) []string {
		i := slices.IndexFunc(lines, func(l string) bool { return strings.Contains(l, `"method":"GET"`) })
		lines[i] = strings.Replace(lines[i], `"method":"GET"`, `"method":"PUT"`, 1)
		return lines
	})
	out := t.TempDir()
	path := filepath.Join(out, "calls.csv")
	var damage *DamageError
	if _, err := Export(context.Background(), dir, ExportConfig{Path: path, Format: ExportCSV}); !errors.As(err, &damage) || damage.Segment == "" {
		t.Errorf("Export = %v, want a DamageError", err)
	}
	if left, _ := os.ReadDir(out); len(left) != 0 {
		t.Errorf("it left %v", left)
	}
	proof := mustExport(t, dir, ExportConfig{Path: path, Format: ExportCSV, Damaged: true})
	if len(proof.Damage) != 1 || proof.File.Rows == 0 || proof.File.Rows >= uint64(len(calls)) {
		t.Errorf("proof = %+v, want one damage and fewer rows than %d", proof, len(calls))
	}
	proves(t, path)
}

func TestExportReplacesNothingUnasked(t *testing.T) {
	dir, _ := estate(t, 5)
	path := filepath.Join(t.TempDir(), "calls.csv")
	for _, name := range []string{path, path + ProofSuffix} {
		if err := os.WriteFile(name, []byte("mine"), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Export(context.Background(), dir, ExportConfig{Path: path, Format: ExportCSV}); !errors.Is(err, fs.ErrExist) {
			t.Errorf("Export over %s = %v, want fs.ErrExist", name, err)
		}
		if b, _ := os.ReadFile(name); string(b) != "mine" {
			t.Errorf("%s was replaced", name)
		}
		os.Remove(name)
	}
	if err := os.WriteFile(path, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	mustExport(t, dir, ExportConfig{Path: path, Format: ExportCSV, Overwrite: true})
	proves(t, path)

	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	other := filepath.Join(t.TempDir(), "other.csv")
	if _, err := Export(ctx, dir, ExportConfig{Path: other, Format: ExportCSV}); !errors.Is(err, context.Canceled) {
		t.Errorf("Export when cancelled = %v", err)
	}
	if left, _ := os.ReadDir(filepath.Dir(other)); len(left) != 0 {
		t.Errorf("it left %v", left)
	}
	if _, err := Export(context.Background(), t.TempDir(), ExportConfig{Path: other, Format: ExportCSV}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Export of nothing = %v", err)
	}
	if _, err := Export(context.Background(), dir, ExportConfig{Path: other, Format: "xlsx"}); err == nil {
		t.Error("Export in an unknown format succeeds")
	}
}

// Whatever the ledger writes the export reads as encoding/json does.
func TestExportReadsLinesAsJSONDoes(t *testing.T) {
	rec := record()
	rec.UserAgent = `q"\ ` + "\u2028é\x01]},{"
	rec.QueryNames = []string{`a]"b`, "c\\", "", "d,e"}
	rec.Token.AMR = []string{"pwd"}
	for _, unfit := range []string{"", "{", "{}", `{"a":}`, `{"a":1`, `{"a":"x}`, `{"a":[1,2}`, `["a"]`, `{"a":1}x`, `{"a":1,}`, `{a:1}`} {
		seen := 0
		if err := eachMember(unfit, func(string, value) (bool, error) { seen++; return true, nil }); err == nil {
			t.Errorf("eachMember(%q) gives no error, %d members", unfit, seen)
		}
	}
	dir := t.TempDir()
	l := mustOpen(t, Config{Dir: dir})
	decide(t, l, rec)
	finish(t, l, rec)
	mustClose(t, l)
	for _, e := range readAll(t, dir) {
		if e.Type != TypeDecision && e.Type != TypeOutcome {
			continue
		}
		var want map[string]json.RawMessage
		mustUnmarshal(t, e.Line, &want)
		got := map[string]json.RawMessage{}
		if err := eachMember(string(e.Line)+"\n", func(name string, v value) (bool, error) {
			got[name] = json.RawMessage(v)
			return true, nil
		}); err != nil {
			t.Errorf("eachMember: %v", err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("members (-want +got):\n%s", diff)
		}
		var r exportRow
		if err := r.take(e.Line); err != nil {
			t.Errorf("take: %v", err)
		}
		if e.Type == TypeDecision && (r.UserAgent != rec.UserAgent || !slices.Equal(r.QueryNames, rec.QueryNames)) {
			t.Errorf("user agent %q, query names %q", r.UserAgent, r.QueryNames)
		}
	}
}
