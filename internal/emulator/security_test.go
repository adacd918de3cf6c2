package emulator

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"
)

func TestSecurityOddities(t *testing.T) {
	e := start(t, Config{})
	token := bearer(e.Mint(TokenSpec{}))
	at := time.Now().UTC().Add(-time.Hour).Truncate(time.Millisecond)
	for i := range 5 {
		e.AddSecurityCalls(SecurityCall{
			Time: at.Add(time.Duration(i) * time.Minute), RequestID: fmt.Sprint("row-", i), CorrelationID: "relation", Operation: "Get /v{version}/invoices",
			Source: "203.0.113.24", ObjectID: "user", Tenant: DefaultTenant, UPN: "u@contoso-partner.example", AppID: "app",
		})
	}
	e.AddSecurityCalls(SecurityCall{Time: at.Add(-8 * 24 * time.Hour), RequestID: "too-old"})
	ask := func(api string, headers ...string) answer {
		t.Helper()
		return do(t, e, "GET", e.PartnerURL()+"/v1/"+api, "", append(headers, token)...)
	}
	for _, tt := range []struct {
		name string
		how  Security
		api  string
		want []string // what the answer holds
		not  string
	}{
		{"as documented", Security{}, "partnerRequests", []string{`{"totalCount":`, `"items":[{"requestId":"row-0","correlationId":"relation","operationName":"Get /v{version}/invoices","requestDateTime":"` + at.Format("2006-01-02T15:04:05.999") + `","sourceIpAddress":"203.0.113.24"`, `"mfaCompliant":false}`}, "too-old"},
		{"a bare array", Security{Bare: true}, "partnerRequests", []string{`[{"requestId":"row-0"`}, "totalCount"},
		{"adoption in a collection", Security{Wrapped: true}, "applicationmfaadoptionstatus", []string{`"totalCount":`, `"totalRequestCount":5`}, ""},
		{"a byte order mark", Security{BOM: true}, "nonMfaCompliantPartnerPrincipals", []string{byteOrderMark + "{"}, ""},
		{"other names", Security{Alternate: true}, "nonMfaCompliantPartnerPrincipals", []string{`"LastNonMfaCompliantLoginDateTime":`}, "lastNon"},
		{"other names of a request", Security{Alternate: true}, "partnerRequests", []string{`"IpAddress":"203`}, "sourceIp"},
		{"no ids, no total", Security{NoCorrelation: true, NoRequestID: true, NoTotal: true}, "partnerRequests", []string{`"requestId":"","correlationId":""`}, "totalCount"},
		{"times with a zone, and late", Security{TimeLayout: time.RFC3339, Skew: time.Hour}, "partnerRequests", []string{`"requestDateTime":"` + at.Add(time.Hour).Format(time.RFC3339) + `"`}, ""},
		{"calls that are not listed yet", Security{Delay: 59 * time.Minute}, "partnerRequests", []string{"row-0"}, "row-2"},
		{"rows that stand there twice", Security{Duplicates: true}, "partnerRequests", []string{`"row-0"`}, ""},
		{"rows that nobody can read", Security{Broken: true}, "partnerRequests", []string{`{"requestDateTime":17},{"note":`, "row-0"}, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			e.SetSecurity(tt.how)
			body := ask(tt.api).body
			for _, want := range tt.want {
				if !strings.Contains(body, want) {
					t.Errorf("the answer has no %s:\n%.600s", want, body)
				}
			}
			if tt.not != "" && strings.Contains(body, tt.not) {
				t.Errorf("the answer has %s:\n%.600s", tt.not, body)
			}
			if n := strings.Count(body, `"row-0"`); tt.how.Duplicates && n != 2 {
				t.Errorf("row-0 stands there %d times, want 2", n)
			}
		})
	}
	t.Run("refusals pass", func(t *testing.T) {
		e.SetSecurity(Security{Unauthorized: 1, Throttled: 1, RetryAfter: "7", Status: map[string]int{"partnerRequests": 403}})
		for _, want := range []int{401, 429, 403, 403} {
			res := ask("partnerRequests")
			if res.status != want || want == 429 && res.header.Get("Retry-After") != "7" {
				t.Errorf("status %d, Retry-After %q, want %d", res.status, res.header.Get("Retry-After"), want)
			}
		}
		if res := ask("nonMfaCompliantPartnerPrincipals"); res.status != 200 {
			t.Errorf("another API answers %d, want 200", res.status)
		}
	})
	t.Run("pages hold every row once, whatever comes meanwhile", func(t *testing.T) {
		for style, prefix := range map[LinkStyle]string{LinkRelative: "/partner", LinkVersion: "/v1/partner", LinkNoSlash: "partner", LinkAbsolute: e.PartnerURL() + "/v1/", LinkForeign: "https://collector.example/"} {
			e.SetSecurity(Security{PageSize: 2, Links: style, Shuffle: true})
			seen, headers := map[string]int{}, []string{}
			target := "partnerRequests"
			for target != "" {
				res := ask(target, headers...)
				var page struct {
					TotalCount int
					Items      []struct{ RequestID string }
					Links      struct {
						Next *struct {
							URI     string
							Headers []struct{ Key, Value string }
						}
					}
				}
				if err := json.Unmarshal([]byte(res.body), &page); err != nil || res.status != http.StatusOK {
					t.Fatalf("%d, %v: %s", res.status, err, res.body)
				}
				for _, row := range page.Items {
					seen[row.RequestID]++
				}
				target = ""
				if next := page.Links.Next; next != nil {
					if !strings.HasPrefix(next.URI, prefix) {
						t.Errorf("link %q, want it to begin with %q", next.URI, prefix)
					}
					target, headers = "partnerRequests?seekOperation=Next", []string{next.Headers[0].Key + ": " + next.Headers[0].Value}
				}
			}
			for i := range 5 {
				if id := fmt.Sprint("row-", i); seen[id] != 1 {
					t.Errorf("%s came %d times, want once", id, seen[id])
				}
			}
		}
		if res := ask("partnerRequests?seekOperation=Next", "MS-ContinuationToken: x"); res.status != 400 {
			t.Errorf("a bad continuation token: %d, want 400", res.status)
		}
	})
	t.Run("the newest 10,000 rows, and all of them counted", func(t *testing.T) {
		e.SetSecurity(Security{})
		rows := make([]SecurityCall, maxSecurityRows)
		for i := range rows {
			rows[i] = SecurityCall{Time: time.Now(), RequestID: fmt.Sprint("new-", i), AppID: "flood", Compliant: true}
		}
		e.AddSecurityCalls(rows...)
		body := ask("partnerRequests").body
		if n := strings.Count(body, `"requestId":`); n != maxSecurityRows || strings.Contains(body, `"row-`) {
			t.Errorf("%d rows, want %d, none of the old ones", n, maxSecurityRows)
		}
		if day, body := time.Now().UTC().Format(time.DateOnly), ask("applicationmfaadoptionstatus?startDate="+time.Now().UTC().Format(time.DateOnly)).body; !strings.Contains(body, `{"loginDate":"`+day+`","mfaCompliantRequestCount":10000,"totalRequestCount":10000,"applicationId":"flood"`) {
			t.Errorf("adoption = %s", body)
		}
		if body := ask("applicationmfaadoptionstatus?startDate=2100-01-01").body; body != "[]" {
			t.Errorf("adoption of the future = %s", body)
		}
	})
}
