package reconcile

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode/utf16"

	"github.com/google/go-cmp/cmp"
)

// The documented samples.
const (
	sampleRequests   = `{"totalCount":2,"items":[{"requestId":"6c583d8d-46cd-420c-ae3d-000000000001","correlationId":"","operationName":"Get /v{version}/customers/{customer_id}/subscriptions?order_id={order_id_value}&mpn_id={mpn_id_value}","requestDateTime":"2026-06-09T22:18:35.73","sourceIpAddress":"203.0.113.24","objectId":"5f0e6c7a-2222-4d3b-9a55-0c1d2e3f4a5b","tenantId":"1b2c3d4e-0a1b-4c2d-8e3f-901234567890","upn":"svc-sync@contoso-partner.example","applicationId":"7d1f0a52-9b3c-4c1e-8f60-2a5b9c0d1e11","mfaCompliant":false}],"attributes":{"objectType":"Collection"}}`
	samplePrincipals = `{"totalCount":1,"items":[{"objectId":"5f0e6c7a-2222-4d3b-9a55-0c1d2e3f4a5b","tenantId":"1b2c3d4e-0a1b-4c2d-8e3f-901234567890","upn":"svc-sync@contoso-partner.example","lastNonMfaCompliantRequestDateTime":"2026-06-09T22:09:53.051"}],"attributes":{"objectType":"Collection"}}`
	sampleAdoption   = `[{"loginDate":"2026-06-08","mfaCompliantRequestCount":7,"totalRequestCount":14,"applicationId":"7d1f0a52-9b3c-4c1e-8f60-2a5b9c0d1e11","applicationName":""}]`
)

func utf16LE(s string) string {
	b := []byte{0xff, 0xfe}
	for _, u := range utf16.Encode([]rune(s)) {
		b = binary.LittleEndian.AppendUint16(b, u)
	}
	return string(b)
}

func TestParseAnswer(t *testing.T) {
	const req = `{"requestId":"a","requestDateTime":"2026-06-09T22:18:35.73"}`
	at := "2026-06-09T22:18:35.73Z"
	for _, tt := range []struct {
		name    string
		data    string
		api     api
		rows    int
		times   []string // of the first rows
		total   int64
		next    string
		skipped int
		cut     string // part of why rows are missing
		err     string // part of the error
	}{
		{name: "the documented sample of requests", data: sampleRequests, api: requestsAPI, rows: 1, times: []string{at}, total: 2},
		{name: "the documented sample of principals", data: samplePrincipals, api: principalsAPI, rows: 1, total: 1},
		{name: "the documented sample of adoption, a bare array", data: sampleAdoption, api: adoptionAPI, rows: 1, total: -1},
		{name: "adoption as the swagger declares it", data: `{"totalCount":1,"items":` + sampleAdoption + `}`, api: adoptionAPI, rows: 1, total: 1},
		{name: "requests as a bare array", data: "[" + req + "]", api: requestsAPI, rows: 1, total: -1},
		{name: "rows under value", data: `{"value":[` + req + `]}`, api: requestsAPI, rows: 1, total: -1},
		{name: "a row by itself", data: req, api: requestsAPI, rows: 1, total: -1},
		{name: "a byte order mark", data: "\ufeff" + sampleRequests, api: requestsAPI, rows: 1, total: 2},
		{name: "UTF-16 from PowerShell", data: utf16LE(sampleRequests), api: requestsAPI, rows: 1, total: 2},
		{name: "no rows", data: `{"totalCount":0,"items":[]}`, rows: 0, total: 0},
		{name: "null for rows", data: `{"items":null}`, rows: 0, total: -1},
		{name: "names in other case", data: `{"TotalCount":"1","Items":[{"RequestId":"a","RequestDateTime":"2026-06-09T22:18:35.73"}]}`, api: requestsAPI, rows: 1, total: 1},
		{name: "the names of the property tables", data: `[{"requestDateTime":"2026-06-09T22:18:35","IpAddress":"203.0.113.24"}]`, api: requestsAPI, rows: 1, total: -1},
		{name: "the other name of a principal's time", data: `[{"objectId":"a","LastNonMfaCompliantLoginDateTime":"2026-06-09T22:18:35"}]`, api: principalsAPI, rows: 1, total: -1},
		{name: "times in every form", data: `[{"requestDateTime":"2026-06-09T22:18:35.73Z"},{"requestDateTime":"2026-06-10T00:18:35.7300000+02:00"},{"requestDateTime":"2026-06-09 22:18:35,73"},{"requestDateTime":"/Date(1781043515730)/"}]`,
			api: requestsAPI, rows: 4, times: []string{at, at, at, at}, total: -1},
		{name: "numbers and booleans as text", data: `[{"loginDate":"2026-06-08T00:00:00","mfaCompliantRequestCount":"7","totalRequestCount":"14","mfaCompliant":"True"}]`, api: adoptionAPI, rows: 1, total: -1},
		{name: "a link to the next page", data: `{"items":[` + req + `],"links":{"next":{"uri":"/partnerRequests?seekOperation=Next","method":"GET","headers":[{"key":"MS-ContinuationToken","value":"x"}]}}}`,
			api: requestsAPI, rows: 1, total: -1, next: "/partnerRequests?seekOperation=Next"},
		{name: "the other link to the next page", data: `{"value":[` + req + `],"@odata.nextLink":"partnerRequests?page=2"}`, api: requestsAPI, rows: 1, total: -1, next: "partnerRequests?page=2"},
		{name: "no link", data: `{"items":[` + req + `],"links":{"next":null}}`, api: requestsAPI, rows: 1, total: -1},
		{name: "rows that cannot be read among others", data: `[7,{"requestDateTime":"soon"},` + req + `,{},{"requestDateTime":"0001-01-01T00:00:00"},null,{"requestDateTime":"2026-06-09","mfaCompliant":"perhaps"}]`,
			api: requestsAPI, rows: 1, skipped: 6, total: -1},
		{name: "an answer that breaks off in a row", data: "[" + req + `,{"requestId":"b`, api: requestsAPI, rows: 1, total: -1, cut: "broken behind row 1"},
		{name: "an answer that breaks off between rows", data: "[" + req, api: requestsAPI, rows: 1, total: -1, cut: "breaks off behind row 1"},
		{name: "a collection that breaks off", data: `{"items":[` + req + `]`, api: requestsAPI, rows: 1, total: -1, cut: "breaks off"},
		{name: "two answers in one file", data: "[" + req + "][" + req + "]", api: requestsAPI, rows: 1, total: -1, cut: "more behind the end"},
		{name: "nothing", data: "", err: "it is empty"},
		{name: "a page to sign in", data: "<!DOCTYPE html><html></html>", err: "it is HTML or XML"},
		{name: "text", data: "Unauthorized", err: "it is no JSON"},
		{name: "a number", data: "42", err: "neither a list nor a collection"},
		{name: "an object without rows", data: `{"a":1}`, err: "it has no items"},
		{name: "items that are no list", data: `{"items":{"a":1}}`, err: "its items is no list"},
		{name: "an error of Partner Center", data: `{"code":900421,"description":"MFA is required","data":[]}`, err: "an error of Partner Center: code 900421: MFA is required"},
		{name: "an error of Graph's shape", data: `{"error":{"code":"unauthenticated","message":"No."}}`, err: "code unauthenticated: No."},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p, err := parseAnswer([]byte(tt.data))
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) || p != nil {
					t.Fatalf("parseAnswer = %v, %v, want an error with %q", p, err, tt.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			next := ""
			if p.next != nil {
				next = string(p.next.URI)
			}
			if len(p.rows) != tt.rows || p.total != tt.total || next != tt.next || p.skipped != tt.skipped {
				t.Errorf("%d rows, total %d, next %q, skipped %d (%v), want %d, %d, %q, %d", len(p.rows), p.total, next, p.skipped, p.reasons, tt.rows, tt.total, tt.next, tt.skipped)
			}
			if (p.cut == nil) != (tt.cut == "") || p.cut != nil && !strings.Contains(p.cut.Error(), tt.cut) {
				t.Errorf("cut = %v, want %q", p.cut, tt.cut)
			}
			for i, want := range tt.times {
				if got := p.rows[i].RequestTime.Format(time.RFC3339Nano); got != want {
					t.Errorf("time of row %d = %s, want %s", i, got, want)
				}
			}
			if len(p.rows) > 0 && p.rows[0].api() != tt.api {
				t.Errorf("api = %v, want %v", p.rows[0].api(), tt.api)
			}
		})
	}
}

func TestParseAnswerReadsEveryField(t *testing.T) {
	p, err := parseAnswer([]byte(sampleRequests))
	if err != nil {
		t.Fatal(err)
	}
	want := apiRow{
		RequestID: "6c583d8d-46cd-420c-ae3d-000000000001", Operation: "Get /v{version}/customers/{customer_id}/subscriptions?order_id={order_id_value}&mpn_id={mpn_id_value}",
		RequestTime: apiTime{time.Date(2026, 6, 9, 22, 18, 35, 730_000_000, time.UTC)}, SourceAddress: "203.0.113.24",
		ObjectID: "5f0e6c7a-2222-4d3b-9a55-0c1d2e3f4a5b", TenantID: "1b2c3d4e-0a1b-4c2d-8e3f-901234567890", UPN: "svc-sync@contoso-partner.example",
		AppID: "7d1f0a52-9b3c-4c1e-8f60-2a5b9c0d1e11", Compliant: saidFalse,
	}
	if diff := cmp.Diff(want, p.rows[0]); diff != "" {
		t.Errorf("row (-want +got):\n%s", diff)
	}
	l := newListed(&p.rows[0])
	if l.method != "GET" || l.route != "/v1/customers/{customer-tenant-id}/subscriptions" {
		t.Errorf("operation = %s %s", l.method, l.route)
	}
}

func TestTextOfMicrosoftIsFitToBeShown(t *testing.T) {
	p, err := parseAnswer([]byte(`[{"requestDateTime":"2026-06-09","upn":"a\u001b[31m\u202eb","operationName":"` + strings.Repeat("é", 300) + `"}]`))
	if err != nil {
		t.Fatal(err)
	}
	if got, want := string(p.rows[0].UPN), `a\x1b[31m\u202eb`; got != want {
		t.Errorf("upn = %q, want %q", got, want)
	}
	if got := string(p.rows[0].Operation); len(got) > maxCleanText+3 || !strings.HasSuffix(got, "é…") {
		t.Errorf("operation has %d bytes and ends in %q", len(got), got[len(got)-8:])
	}
}

// Never a page and an error; nothing that is kept is unfit to be shown; what a page
// names as read and as skipped was there.
func FuzzParseAnswer(f *testing.F) {
	for _, seed := range []string{
		sampleRequests, samplePrincipals, sampleAdoption, "\ufeff" + sampleAdoption, utf16LE(samplePrincipals), "[]", "{}", "", "null", "<html>",
		`{"items":null,"totalCount":-1}`, `[{"requestDateTime":"/Date(-9e9)/"}]`, `{"items":[[[`, `{"links":{"next":{"uri":7}},"value":[{}]}`,
		`{"code":"900421","description":"MFA"}`, `[{"loginDate":"2026-06-08","totalRequestCount":1e99}]`, "\xff\xfe{", "[1,2,3", `{"error":[]}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := parseAnswer(data)
		if (p == nil) == (err == nil) {
			t.Fatalf("parseAnswer = %v, %v, want one of them", p, err)
		}
		if err != nil {
			return
		}
		if len(p.reasons) > maxSkipReasons || len(p.reasons) > p.skipped {
			t.Errorf("%d reasons for %d skipped rows", len(p.reasons), p.skipped)
		}
		for i := range p.rows {
			r := &p.rows[i]
			for _, s := range []apiText{r.RequestID, r.CorrelationID, r.Operation, r.SourceAddress, r.Address, r.ObjectID, r.TenantID, r.UPN, r.AppID, r.AppName} {
				if cleanText(string(s)) != string(s) && len(s) <= maxCleanText && !strings.Contains(string(s), `\`) {
					t.Errorf("%q is not clean", s)
				}
			}
			if r.api() == unknownAPI || r.TotalCount < 0 || r.CompliantCount < 0 {
				t.Errorf("row %+v", r)
			}
			newListed(r)
		}
	})
}

func TestReadFiles(t *testing.T) {
	write := func(t *testing.T, dir, name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	now := time.Date(2026, 6, 10, 8, 0, 0, 0, time.UTC)
	t.Run("a directory, told apart by rows and by names", func(t *testing.T) {
		dir := t.TempDir()
		write(t, dir, "1.json", sampleRequests)
		write(t, dir, "2.JSON", strings.ReplaceAll(sampleRequests, "000000000001", "000000000002"))
		write(t, dir, "NonMfaCompliantPartnerPrincipals.json", `{"totalCount":0,"items":[]}`)
		write(t, dir, "b.json", sampleAdoption)
		write(t, dir, "readme.txt", "not this")
		ms, err := readFiles(dir, now)
		if err != nil {
			t.Fatal(err)
		}
		if n := len(ms.apis[requestsAPI].rows); n != 2 || len(ms.apis[requestsAPI].defects) > 0 {
			t.Errorf("%d requests, %v", n, ms.apis[requestsAPI].defects)
		}
		if ms.apis[principalsAPI].absent != "" || len(ms.apis[adoptionAPI].rows) != 1 {
			t.Errorf("principals %q, %d rows of adoption", ms.apis[principalsAPI].absent, len(ms.apis[adoptionAPI].rows))
		}
	})
	t.Run("one file leaves the others absent, and totalCount tells what is missing", func(t *testing.T) {
		dir := t.TempDir()
		write(t, dir, "1.json", sampleRequests) // says 2, has 1
		ms, err := readFiles(filepath.Join(dir, "1.json"), now)
		if err != nil {
			t.Fatal(err)
		}
		if d := ms.apis[requestsAPI].defects; len(d) != 1 || d[0] != "Microsoft counts 2 rows and sent 1" {
			t.Errorf("defects = %q", d)
		}
		if ms.apis[principalsAPI].absent == "" || ms.apis[adoptionAPI].absent == "" {
			t.Error("the other two are not absent")
		}
	})
	for _, tt := range []struct{ name, file, text, want string }{
		{"no file", "", "", "no such file"},
		{"no JSON", "a.json", "<html>", "a.json: it is HTML or XML"},
		{"a list that could be any", "a.json", "[]", "no rows that say which API"},
		{"a saved error", "partnerRequests.json", `{"code":"900421","description":"MFA"}`, "an error of Partner Center: code 900421"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "missing")
			if tt.file != "" {
				path = t.TempDir()
				write(t, path, tt.file, tt.text)
			}
			ms, err := readFiles(path, now)
			if err == nil || !strings.Contains(err.Error(), tt.want) || ms != nil {
				t.Fatalf("readFiles = %v, %v, want an error with %q", ms, err, tt.want)
			}
			if h, ok := err.(interface{ Hint() string }); !ok || h.Hint() == "" {
				t.Error("the error has no hint")
			}
		})
	}
	t.Run("an empty directory", func(t *testing.T) {
		if _, err := readFiles(t.TempDir(), now); err == nil || !strings.Contains(err.Error(), "no *.json") {
			t.Errorf("readFiles = %v", err)
		}
	})
}
