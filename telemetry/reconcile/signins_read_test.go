package reconcile

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/csv"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"iter"
	"os"
	"runtime"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"

	"github.com/partnerguard/partnerguard/telemetry/report"
	"github.com/partnerguard/partnerguard/telemetry/store"
)

var errNotAsked = errors.New("not asked for")

// openExport is a reader of what in holds.
func openExport(t testing.TB, in io.Reader) exportReader {
	t.Helper()
	r, _, stop, err := openRows("export", in)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	return r
}

// rowsOf is what a reader says of each row: its date and a few fields, or why it was
// left out, with the line.
func rowsOf(t testing.TB, all exportReader) (got []string) {
	t.Helper()
	for range 10_000 {
		var r exportRow
		var s signIn
		var bad *rowError
		switch err := all.next(&r); {
		case errors.Is(err, io.EOF):
			return got
		case errors.As(err, &bad):
			got = append(got, fmt.Sprintf("line %d: %s", bad.line, bad.reason))
		case err != nil:
			return append(got, err.Error())
		default:
			if err := s.understand(&r); err != nil {
				got = append(got, err.Error())
				continue
			}
			got = append(got, fmt.Sprintf("%s %s %d", s.at.Format("15:04"), r.text(fieldUPN), s.code))
		}
	}
	t.Fatal("it does not end")
	return nil
}

// portalHeader is the header of the portal's CSV, oddities included.
const portalHeader = "Date (UTC),Request ID,User agent,Correlation ID,User ID,User,Username,User type,Cross tenant access type,Incoming token type,Authentication Protocol,Unique token identifier,Original transfer method,Client credential type,Application,Application ID ,Resource,Resource ID ,Resource tenant ID,Home tenant ID,IP address,Location,Status,Sign-in error code,Failure reason,Client app,Incoming token type,Multifactor authentication result,Authentication requirement,Token issuer type,Conditional Access,Autonomous system  number"

// portalRow is a sign-in as a row of it.
func portalRow(m map[string]any) []string {
	text := func(key string) string { s, _ := m[key].(string); return s }
	shown := map[string]string{
		"singleFactorAuthentication": "Single-factor authentication", "multiFactorAuthentication": "Multifactor authentication", "notApplied": "Not Applied", "success": "Success",
		"refreshToken": "Refresh token", "none": "None", "ropc": "ROPC", "oAuth2": "OAuth 2.0", "deviceCode": "Device code", "member": "Member", "guest": "Guest",
	}
	show := func(key string) string { return shown[text(key)] }
	code := m["status"].(map[string]any)["errorCode"]
	status := "Success"
	if code != 0 {
		status = "Failure"
	}
	uti := text("uniqueTokenIdentifier")
	if strings.HasPrefix(uti, "-") {
		uti = "'" + uti
	}
	return []string{
		text("createdDateTime"), text("id"), "agent \"quoted\"", text("correlationId"), text("userId"), "Sam,\nthe agent", text("userPrincipalName"), show("userType"), "None", "", show("authenticationProtocol"),
		uti, "None", "None", text("appDisplayName"), text("appId"), text("resourceDisplayName"), text("resourceId"), text("resourceTenantId"), text("homeTenantId"), text("ipAddress"), "Köln; NRW", status, fmt.Sprint(code),
		"Other.", "Other clients", show("incomingTokenType"), "", show("authenticationRequirement"), text("tokenIssuerType"), show("conditionalAccessStatus"), "64500",
	}
}

func portalCSV(t testing.TB, sep rune, crlf bool, signIns ...map[string]any) string {
	var b strings.Builder
	w := csv.NewWriter(&b)
	w.Comma, w.UseCRLF = sep, crlf
	if err := w.Write(strings.Split(portalHeader, ",")); err != nil {
		t.Fatal(err)
	}
	for _, m := range signIns {
		if err := w.Write(portalRow(m)); err != nil {
			t.Fatal(err)
		}
	}
	w.Flush()
	return b.String()
}

func zipped(text string) string {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	io.WriteString(w, text)
	w.Close()
	return b.String()
}

func indented(t testing.TB, text string) string {
	var b bytes.Buffer
	if err := json.Indent(&b, []byte(text), "", "    "); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// TestEveryFormSaysTheSame reads the same sign-ins in every form that they come in.
func TestEveryFormSaysTheSame(t *testing.T) {
	minus := encodeUTI(uuid.MustParse("00000000-0000-4000-8000-0000000000ff"))
	for i := 0; minus[0] != '-'; i++ {
		minus = encodeUTI(uuid.NewSHA1(uuid.Nil, fmt.Append(nil, i)))
	}
	r := guardOf(t, callWithoutMFA, tokenOf(minus), tokenIssued(time.Hour))
	a := logged("authenticationProtocol", "ropc")
	b := loggedAt(7, "uniqueTokenIdentifier", minus, "incomingTokenType", "refreshToken")
	c := loggedAt(8, "userId", signInKim, "userPrincipalName", "kim@contoso.example", "incomingTokenType", "refreshToken")
	d := loggedAt(9, "resourceId", graphAPI)
	all := []map[string]any{a, b, c, d}
	pages := graphPage(t, a, b) + graphPage(t, c) + graphPage(t, d)
	array := jsonOf(t, all)
	var lines []string
	for _, m := range all {
		lines = append(lines, jsonOf(t, m))
	}
	for _, form := range []struct {
		name, format string
		texts        []string
	}{
		{"a page of Graph's", "JSON", []string{graphPage(t, all...)}},
		{"a page laid out over lines", "JSON", []string{indented(t, graphPage(t, all...))}},
		{"pages one behind the other", "JSON", []string{pages}},
		{"pages one a line", "JSON", []string{graphPage(t, a, b) + "\r\n" + graphPage(t, c, d) + "\r\n"}},
		{"pages in an array", "JSON", []string{"[" + graphPage(t, a) + "," + graphPage(t, b, c, d) + "]"}},
		{"pages in files of their own", "JSON", []string{graphPage(t, a), graphPage(t, b, c, d)}},
		{"the portal's JSON", "JSON", []string{array}},
		{"the same with a byte order mark", "JSON", []string{"\ufeff" + array}},
		{"the same over lines", "JSON", []string{indented(t, array)}},
		{"a sign-in a line", "JSON", []string{strings.Join(lines, "\n")}},
		{"sign-ins behind record separators", "JSON", []string{"\x1e" + strings.Join(lines, "\n\x1e") + "\n"}},
		{"compressed", "gzip JSON", []string{zipped(pages)}},
		{"compressed in parts", "gzip JSON", []string{zipped(graphPage(t, a, b)) + zipped(graphPage(t, c, d))}},
		{"the portal's CSV", "CSV", []string{"\ufeff" + portalCSV(t, ',', true, all...)}},
		{"its CSV elsewhere", "CSV", []string{"\ufeff" + portalCSV(t, ';', true, all...)}},
		{"its CSV with tabs", "CSV", []string{portalCSV(t, '\t', false, all...)}},
		{"its CSV that says its separator", "CSV", []string{"sep=;\r\n" + portalCSV(t, ';', true, all...)}},
		{"its CSV without a last line feed", "CSV", []string{strings.TrimSpace(portalCSV(t, ',', false, all...))}},
		{"its CSV with empty lines", "CSV", []string{portalCSV(t, ',', false, all...) + "\n\r\n"}},
		{"its CSV compressed", "gzip CSV", []string{zipped("\ufeff" + portalCSV(t, ',', true, all...))}},
	} {
		t.Run(form.name, func(t *testing.T) {
			s := readSignIns(t, r, form.texts...)
			var got []string
			say := func(a ...any) { got = append(got, strings.TrimSpace(fmt.Sprintln(a...))) }
			for _, in := range s.Integrations {
				say(in.Name, in.ByUTI, in.ByTime, in.NotFound, in.Outside)
				for _, c := range in.Causes {
					say(c.Cause, c.Confidence, c.Tokens, c.Evidence[0].Field, c.SignIn)
				}
			}
			for _, w := range s.Strangers {
				say(w.User, w.SingleFactor, w.Addresses, w.Last.Format(time.RFC3339), w.Causes[0].Cause)
			}
			say(s.Rows, s.Since.Format(time.RFC3339), s.Until.Format(time.RFC3339), s.Incomplete, s.Files[0].Format)
			want := []string{
				"billing 2 0 0 1",
				"password_grant certain 1 authenticationProtocol " + sampleRequest,
				"refresh_token_without_mfa certain 1 incomingTokenType " + b["id"].(string),
				"conditional_access_not_applied certain 1 conditionalAccessStatus " + b["id"].(string),
				"kim@contoso.example 1 [203.0.113.24] 2026-06-10T08:08:00Z refresh_token_without_mfa",
				"{4 3 1 0} 2026-06-10T08:00:00Z 2026-06-10T08:09:00Z false " + form.format,
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// TestBadRowsAreLeftOut: what is wrong in a row costs that row.
func TestBadRowsAreLeftOut(t *testing.T) {
	good := func(n int) string { return jsonOf(t, loggedAt(n)) }
	row := func(changes ...any) string { return jsonOf(t, loggedAt(1, changes...)) }
	header := portalHeader + "\n"
	line := func(n int) string {
		return strings.TrimPrefix(portalCSV(t, ',', false, loggedAt(n)), header)
	}
	long := strings.Repeat("x", maxRecord)
	ok := func(n int) string { return fmt.Sprintf("08:%02d sam@contoso.example 0", n) }
	for _, tt := range []struct {
		name string
		text string
		want []string
	}{
		{"no date", "[" + row("createdDateTime", nil) + "," + good(2) + "]", []string{"it has no createdDateTime", ok(2)}},
		{"a date that is none", row("createdDateTime", "10/06/2026 08:00") + good(2), []string{`its date "10/06/2026 08:00" is not understood`, ok(2)}},
		{"a date out of this world", row("createdDateTime", "0001-01-01T00:00:00Z") + good(2), []string{`its date "0001-01-01T00:00:00Z" is not understood`, ok(2)}},
		{"no application", row("appId", "") + good(2), []string{"its application id is no GUID", ok(2)}},
		{"a code that is none", row("status", map[string]any{"errorCode": "many"}) + good(2), []string{`its error code "many" is no number`, ok(2)}},
		{"elements that are no objects", "[1, null, \"x\", [" + good(1) + "],\n" + good(2) + "]",
			[]string{"line 1: it is no object", "line 1: it is no object", "line 1: it is no object", "line 1: it is no object", ok(2)}},
		{"a row that is no JSON", "[" + good(1) + `,{"id" "x", "a": [1]},` + good(2) + "]", []string{ok(1), "line 1: it is no JSON", ok(2)}},
		{"the same in lines", good(1) + "\n{\"id\": }\nsome text\n" + good(2) + "\n", []string{ok(1), "line 2: it is no JSON", "line 3: it is no JSON", ok(2)}},
		{"a row that never ends, in lines", good(1) + "\n{\"id\": \"" + long + "\n" + good(2) + "\n", []string{ok(1), "line 2: it has more than 1 MiB", ok(2)}},
		{"a row that never ends, in a list", "[\n  " + good(1) + ",\n  {\"id\": \"" + long + "\",\n  \"x\": 1}\n]", []string{ok(1), "line 3: it has more than 1 MiB; what follows cannot be told apart and is not read"}},
		{"pages go on behind a broken one", `{"value":[` + good(1) + `,{"id" "x` + "\n" + graphPage(t, loggedAt(2)), []string{ok(1), "line 1: it is no JSON", ok(2)}},
		{"a list that ends too early", "[" + good(1) + ",\n" + good(2), []string{ok(1), ok(2), "line 2: the file ends inside this row"}},
		{"a row that ends too early", good(1) + "\n" + good(2)[:100], []string{ok(1), "line 2: the file ends inside this row"}},

		{"CSV with a column too few", header + line(1) + "a,b\n" + line(2), []string{ok(1), "line 4: it has 2 columns, the header 32", ok(2)}},
		{"CSV with a column too many", header + "x," + line(1) + line(2), []string{"line 2: it has 33 columns, the header 32", ok(2)}},
		{"CSV with an open quote", header + line(1) + "\"2026-06-10,a\n" + strings.ReplaceAll(line(2), "\"", ""), []string{ok(1), "line 4: a quote in it is not closed", "line 5: it has 7 columns, the header 32", "line 6: it has 27 columns, the header 32"}},
		{"CSV with a row that never ends", header + long + "\n" + line(2), []string{"line 2: it has more than 1 MiB", ok(2)}},
		{"CSV with a quote that never ends", header + "\"" + long + long + "\n" + line(2), []string{"line 2: a quote in it is not closed", ok(2)}},
		{"CSV that ends too early", header + line(1) + line(2)[:60], []string{ok(1), "line 4: the file ends inside this row"}},
		{"CSV that ends too early, in a quote", header + line(1) + "\"2026-06", []string{ok(1), "line 4: the file ends inside this row"}},
		{"CSV with a quote that never ends, and no more lines", header + line(1) + "\"" + long + long, []string{ok(1), "line 4: the file ends inside this row"}},
		{"CSV with text behind a quote", header + strings.Replace(line(1), "\"Köln", "Köln", 1) + line(2), []string{ok(1), ok(2)}},
		{"CSV without its code", "Date (UTC),Application ID,Resource ID,Username,Status\n2026-06-10T08:01:00Z," + signInApp + "," + partnerCenterAPI + ",sam,Failure\n2026-06-10 08:02:00," + signInApp + "," + partnerCenterAPI + ",sam,Success\n", []string{"08:01 sam -1", "08:02 sam 0"}},
		{"CSV with a spreadsheet's dates", "Date (UTC);Application ID;Resource ID;Username\n10.06.2026 08:01:00;" + signInApp + ";x;sam\n6/10/2026, 8:02:00 AM;" + signInApp + ";x;sam\n10/06/2026 08:03:00;" + signInApp + ";x;sam\n",
			[]string{"08:01 sam -1", "08:02 sam -1", `its date "10/06/2026 08:03:00" is not understood`}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for how, in := range map[string]io.Reader{
				"at once": strings.NewReader(tt.text), "compressed": strings.NewReader(zipped(tt.text)), "in halves": iotest.HalfReader(strings.NewReader(tt.text)),
			} {
				if diff := cmp.Diff(tt.want, rowsOf(t, openExport(t, in))); diff != "" {
					t.Errorf("%s: %s", how, diff)
				}
			}
		})
	}
	t.Run("byte by byte", func(t *testing.T) {
		for _, text := range []string{graphPage(t, loggedAt(1), loggedAt(2)), header + line(1) + line(2)} {
			if diff := cmp.Diff([]string{ok(1), ok(2)}, rowsOf(t, openExport(t, iotest.OneByteReader(strings.NewReader(text))))); diff != "" {
				t.Error(diff)
			}
		}
	})
}

func TestSkippedRowsAreCountedAndTheFirstNamed(t *testing.T) {
	var text strings.Builder
	text.WriteString(jsonOf(t, logged()) + "\n")
	for range 25 {
		text.WriteString("{\"createdDateTime\": \"soon\"}\n")
	}
	s := readSignIns(t, fixedTokens(nil), text.String())
	if len(s.Skipped) != 10 || s.Rows != (SignInRows{Read: 26, Kept: 1, Skipped: 25}) {
		t.Errorf("%d are named of %+v", len(s.Skipped), s.Rows)
	}
	if want := (SkippedRow{"export-1", 2, 2, `its date "soon" is not understood`}); s.Skipped[0] != want {
		t.Errorf("the first is %+v, want %+v", s.Skipped[0], want)
	}
}

func TestForeignFilesAreRefused(t *testing.T) {
	page := graphPage(t, logged(), loggedAt(1))
	whole := zipped(page)
	damaged := []byte(whole)
	damaged[len(damaged)-6] ^= 1 // of the checksum
	for _, tt := range []struct {
		name, text, problem, hint string
	}{
		{"an empty file", "", "it is empty", "Graph"},
		{"blanks", " \n\n", "it is empty", "Graph"},
		{"a byte order mark alone", "\ufeff", "it is empty", "Graph"},
		{"a web page", "<!DOCTYPE html><html>Sign in</html>", "it is a web page", "Graph"},
		{"a workbook", "PK\x03\x04\x14\x00", "a workbook of Excel", "save the sheet as CSV"},
		{"what PowerShell 5 writes by default", "\xff\xfe[\x00", "it is in UTF-16", "-Encoding utf8"},
		{"an image", "\x89PNG\r\n\x1a\n\x00\x00", "it is no text", "Graph"},
		{"text of another encoding", "Date (UTC),Größe\xe4\xf6,x\n", "it is no text", "Graph"},
		{"another CSV", "name,size\nx,1\n", `it is no sign-in export: its first line, "name", names no column`, "English"},
		{"the audit log", "Date (UTC),CorrelationId,Service,Category\n", "its header has no column Application ID, Resource ID", "English"},
		{"a header of another language", "Datum (UTC);Anforderungs-ID;Benutzer;Ressourcen-ID \n", "names no column", "download JSON"},
		{"another JSON", `[{"name":"x"},{"name":"y"}]`, "none of its first 2 rows is a sign-in; of the first one: it has no createdDateTime", "newer partnerguard"},
		{"text in JSON's clothes", "[hello", "none of its first 1 rows is a sign-in", "newer partnerguard"},
		{"a list of what is nothing", strings.Repeat("{}\n", 5000), "none of its first 1000 rows is a sign-in", "newer partnerguard"},
		{"an error of Graph's", `{"error":{"code":"Authorization_RequestDenied","message":"Insufficient privileges"}}`, "an error of Graph's: Authorization_RequestDenied", "Graph"},
		{"no gzip but its magic", "\x1f\x8b\x08", "it is no whole gzip file", "fetch it again"},
		{"gzip that ends at once", whole[:12], "the gzip file ends before its first row", "fetch it again"},
		{"gzip with a wrong checksum", string(damaged), "gzip: invalid checksum", "fetch it again"},
		{"gzip twice", zipped(whole), "it is compressed twice", "gunzip"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, err := ReadSignIns(t.Context(), SignInConfig{Records: fixedTokens(nil), Inputs: signInTexts(page, tt.text), Now: tokenTime.Add(time.Hour)})
			var bad *InputError
			if !errors.As(err, &bad) || s != nil {
				t.Fatalf("%+v, %v; want an *InputError and nothing else", s, err)
			}
			if !strings.Contains(err.Error(), "read export-2: ") || !strings.Contains(err.Error(), tt.problem) || !strings.Contains(bad.Hint(), tt.hint) {
				t.Errorf("error %q, hint %q; want %q, %q", err, bad.Hint(), tt.problem, tt.hint)
			}
		})
	}
	t.Run("a file that is not there", func(t *testing.T) {
		_, err := ReadSignIns(t.Context(), SignInConfig{Records: fixedTokens(nil), Now: tokenTime, Inputs: []SignInInput{{"x", func() (io.ReadCloser, error) { return os.Open("nowhere") }}}})
		if !errors.Is(err, os.ErrNotExist) {
			t.Errorf("error %v", err)
		}
	})
	t.Run("a disk that fails", func(t *testing.T) {
		broken := io.MultiReader(strings.NewReader(page[:len(page)-20]), iotest.ErrReader(errNotAsked))
		_, err := ReadSignIns(t.Context(), SignInConfig{Records: fixedTokens(nil), Now: tokenTime, Inputs: []SignInInput{{"x", func() (io.ReadCloser, error) { return io.NopCloser(broken), nil }}}})
		if !errors.Is(err, errNotAsked) || !strings.Contains(err.Error(), "after 1 rows") {
			t.Errorf("error %v", err)
		}
	})
}

func TestAFileThatEndsTooEarlyIsFlagged(t *testing.T) {
	var rows []map[string]any
	for n := range 200 {
		rows = append(rows, loggedAt(n))
	}
	page, table := graphPage(t, rows...), portalCSV(t, ',', false, rows...)
	for name, text := range map[string]string{
		"JSON": page[:len(page)/2], "JSON, compressed": zipped(page)[:len(zipped(page))/2], "CSV, compressed": zipped(table)[:len(zipped(table))/2],
	} {
		t.Run(name, func(t *testing.T) {
			s := readSignIns(t, fixedTokens(nil), text)
			if notes := strings.Join(s.Notes, " "); !s.Incomplete || s.Rows.Kept < 20 || s.Rows.Skipped != 1 || !strings.Contains(notes, "export-1: the file ends inside this row") {
				t.Errorf("%+v, incomplete %v, notes %s", s.Rows, s.Incomplete, notes)
			}
		})
	}
}

// FuzzSignIns: whatever a file holds, it is read to its end or refused, never both;
// each row is accounted for, and little is kept of it.
func FuzzSignIns(f *testing.F) {
	page := graphPage(f, logged("authenticationProtocol", "ropc"), loggedAt(1, "userId", signInKim), loggedAt(2, "resourceId", graphAPI))
	table := portalCSV(f, ';', true, logged(), loggedAt(1, "userId", signInKim))
	for _, seed := range []string{
		page, page + page, "[" + page + "]", indented(f, page), zipped(page), zipped(page)[:200], "\ufeff" + table, table, zipped(table), "sep=;\n" + table, page[:300], table[:500],
		`{"value":[[{"value":[]}]],"@odata.nextLink":"x"}`, `{"value":[{"value":[{}`, "[{},\n{]", `{"a":"\\\"","b":{"c":[1,2,{"d":null}]}}`, "{\"a\":1}\n{\"b\"\n[", `{"error":{"code":"x"}}`,
		"Date (UTC),Application ID,Resource ID\n\"2026\"\"x\",a\n\"", "a,b\n", "sep=;", "\x1f\x8b\x08\x00", "[\n\n]]]}}}", "{\"id\":\"\xff\xfe\"}",
	} {
		f.Add([]byte(seed))
	}
	ours := fixedTokens{{Integration: "billing", AppID: signInApp, Verified: true, MFA: "absent", UTI: sampleUTI, IssuedAt: tokenTime.Unix()}}
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := ReadSignIns(t.Context(), SignInConfig{Records: ours, Inputs: signInTexts(string(data)), Now: tokenTime.Add(time.Hour)})
		if (s == nil) == (err == nil) {
			t.Fatalf("%v and %v", s, err)
		}
		if err != nil {
			var bad *InputError
			if !errors.As(err, &bad) || bad.Hint() == "" {
				t.Fatalf("error %v without a way out", err)
			}
			return
		}
		if s.Rows.Read != s.Rows.Kept+s.Rows.Dropped+s.Rows.Skipped || s.Rows.Read != s.Files[0].Rows {
			t.Errorf("%+v of %d rows", s.Rows, s.Files[0].Rows)
		}
		if int64(len(s.Skipped)) != min(10, s.Rows.Skipped) {
			t.Errorf("%d rows are named of %d", len(s.Skipped), s.Rows.Skipped)
		}
		if kept := jsonOf(t, s); len(kept) > 20_000+20*len(data) {
			t.Errorf("%d bytes are kept of %d", len(kept), len(data))
		} else if strings.ContainsAny(kept, "\x1b\x7f") {
			t.Errorf("what is kept would act on a terminal: %q", kept)
		}
		var out bytes.Buffer
		if err := WriteSignIns(&out, s, report.Style{}); err != nil {
			t.Error(err)
		}
		in := newLookahead(bytes.NewReader(data))
		for in.more() {
			if in.pos = in.end; len(in.buf) > maxRecord {
				t.Fatalf("%d bytes are held", len(in.buf))
			}
		}
	})
}

// To read a million rows, which takes half a minute:
//
//	go test -run TestAnExportIsReadInBoundedMemory -v ./telemetry/reconcile -signin-rows 1000000
var signInRowCount = flag.Int("signin-rows", longRows, "rows of the exports of TestAnExportIsReadInBoundedMemory")

// longExport is a JSON export of n sign-ins, of some 1.7 KiB each as Graph's are, that
// is made as it is read. Every fifth is to Partner Center, by one of 5,000 users.
func longExport(t testing.TB, n int, form string) iter.Seq[[]byte] {
	policies := []any{}
	for i := range 4 {
		policies = append(policies, map[string]any{"id": uuid.NewString(), "displayName": fmt.Sprintf("Policy %d", i), "enforcedGrantControls": []any{"Mfa"}, "enforcedSessionControls": []any{}, "result": "notApplied"})
	}
	row := logged("id", "ID------------------------------ID--", "userId", "USER----------------------------ID--", "userPrincipalName", "NAME@contoso.example", "uniqueTokenIdentifier", "UTI-----------------UT",
		"resourceId", "RESOURCE------------------------ID--", "appliedConditionalAccessPolicies", policies, "incomingTokenType", "refreshToken",
		"deviceDetail", map[string]any{"deviceId": "", "displayName": "", "operatingSystem": "Windows10", "browser": "Edge 126.0.0", "isCompliant": false, "isManaged": false, "trustType": ""},
		"riskDetail", "none", "riskEventTypes", []any{}, "riskLevelAggregated", "none", "clientAppUsed", "Mobile Apps and Desktop clients", "userAgent", "python-requests/2.32")
	template := jsonOf(t, row)
	if form == "CSV" {
		template = strings.TrimPrefix(portalCSV(t, ',', true, row), strings.ReplaceAll(portalHeader, "\n", "")+"\r\n")
	}
	return func(yield func([]byte) bool) {
		head, between, tail := `{"value":[`, ",", "]}"
		if form == "CSV" {
			head, between, tail = "\ufeff"+portalHeader+"\r\n", "", ""
		}
		if !yield([]byte(head)) {
			return
		}
		buf := make([]byte, 0, len(template)+64)
		for i := range n {
			resource := graphAPI
			if i%5 == 0 {
				resource = partnerCenterAPI
			}
			var id uuid.UUID
			id[0], id[1], id[2], id[3], id[15] = byte(i), byte(i>>8), byte(i>>16), byte(i>>24), 1
			text := strings.NewReplacer("ID------------------------------ID--", id.String(), "USER----------------------------ID--", fmt.Sprintf("5f0e6c7a-2222-4d3b-9a55-%012d", i/5%5000),
				"NAME", fmt.Sprint("user-", i/5%5000), "UTI-----------------UT", encodeUTI(id), "RESOURCE------------------------ID--", resource).Replace(template)
			buf = append(buf[:0], text...)
			if i < n-1 {
				buf = append(buf, between...)
			}
			if !yield(buf) {
				return
			}
		}
		yield([]byte(tail))
	}
}

// TestAnExportIsReadInBoundedMemory reads a long export beside many tokens without
// MFA, every second of which is in the log.
func TestAnExportIsReadInBoundedMemory(t *testing.T) {
	const bound = 40 << 20 // bytes in use, with 1,000,000 rows and as many tokens as are looked up
	n := *signInRowCount
	calls := make([]store.Token, 0, n/5)
	for i := range min(n/5, maxTokens) {
		var id uuid.UUID
		k := i * 5
		id[0], id[1], id[2], id[3], id[15] = byte(k), byte(k>>8), byte(k>>16), byte(k>>24), byte(1+i%2)
		calls = append(calls, store.Token{
			Integration: "billing", AppID: signInApp, Verified: true, MFA: "absent", UTI: encodeUTI(id), UserRef: fmt.Sprint("ref-", i%5000), IssuedAt: tokenTime.Unix(),
		})
	}
	for _, form := range []string{"JSON", "CSV"} {
		t.Run(form, func(t *testing.T) {
			from, to := io.Pipe()
			go func() {
				var block []byte
				for b := range longExport(t, n, form) {
					if block = append(block, b...); len(block) > 256<<10 {
						if _, err := to.Write(block); err != nil {
							return
						}
						block = block[:0]
					}
				}
				to.Write(block)
				to.Close()
			}()
			var peak, base runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&base)
			asked := 0
			begin := time.Now()
			s, err := ReadSignIns(t.Context(), SignInConfig{
				Records: fixedTokens(calls), Now: tokenTime.Add(time.Hour),
				Inputs: []SignInInput{{"long", func() (io.ReadCloser, error) { return from, nil }}},
				Progress: func(p SignInProgress) {
					if asked++; asked%32 != 0 || p.File == "" {
						return
					}
					runtime.GC()
					var m runtime.MemStats
					if runtime.ReadMemStats(&m); m.HeapAlloc > peak.HeapAlloc {
						peak = m
					}
				},
			})
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%d rows of %s in %v, with %d KiB in use", n, form, time.Since(begin).Round(time.Millisecond), (int64(peak.HeapAlloc)-int64(base.HeapAlloc))>>10)
			if used := int64(peak.HeapAlloc) - int64(base.HeapAlloc); used > bound {
				t.Errorf("%d bytes are in use, more than %d", used, bound)
			}
			if len(s.Integrations) != 1 || s.Integrations[0].ByUTI != int64(len(calls)+1)/2 || s.Rows.Read != int64(n) || s.Rows.Kept != int64(n+4)/5 {
				t.Errorf("%+v, %+v", s.Rows, s.Integrations)
			}
			if got := int64(len(s.Strangers)) + s.MoreStrangers; got == 0 || len(s.Strangers) > maxKept {
				t.Errorf("%d strangers", got)
			}
		})
	}
}

// BenchmarkSignIns measures how fast an export is read.
func BenchmarkSignIns(b *testing.B) {
	for _, form := range []string{"JSON", "CSV"} {
		b.Run(form, func(b *testing.B) {
			const rows = 20_000
			var text bytes.Buffer
			for part := range longExport(b, rows, form) {
				text.Write(part)
			}
			b.SetBytes(int64(text.Len()))
			for b.Loop() {
				s, err := ReadSignIns(b.Context(), SignInConfig{Records: fixedTokens(nil), Now: tokenTime, Inputs: []SignInInput{{"x", func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(text.Bytes())), nil }}}})
				if err != nil || s.Rows.Read != rows {
					b.Fatal(s, err)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*rows), "ns/row")
		})
	}
}

// fixedTokens are tokens that lack MFA, of users whom nobody knows.
type fixedTokens []store.Token

func (f fixedTokens) Tokens(_ context.Context, since, until time.Time, yield func(store.Token) error) error {
	for _, t := range f {
		if at := time.Unix(t.IssuedAt, 0); !at.Before(since) && at.Before(until) {
			if err := yield(t); err != nil {
				return err
			}
		}
	}
	return nil
}

func (f fixedTokens) Sums(_ context.Context, since, until time.Time) (sums []store.Sum, err error) {
	users := map[string]bool{}
	for _, t := range f {
		if at := time.Unix(t.IssuedAt, 0).UTC(); !users[t.UserRef] && !at.Before(since) && at.Before(until) {
			users[t.UserRef] = true
			sums = append(sums, store.Sum{
				Dim:   &store.Dim{Integration: t.Integration, AppID: t.AppID, UserRef: t.UserRef, Verified: true, Kind: "app_user", MFA: t.MFA, Reason: "mfa_missing"},
				Calls: 1, First: at, Last: at,
			})
		}
	}
	return sums, nil
}

func (fixedTokens) Identities(context.Context) (map[string]store.Identity, error) { return nil, nil }
func (fixedTokens) Instances(context.Context) ([]store.Instance, error)           { return nil, nil }
