package reconcile

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
	"github.com/partnerguard/partnerguard/policy"
	"github.com/partnerguard/partnerguard/proxy"
	"github.com/partnerguard/partnerguard/telemetry/ledger"
	"github.com/partnerguard/partnerguard/telemetry/report"
	"github.com/partnerguard/partnerguard/telemetry/store"
)

const (
	tenantID = "1b2c3d4e-0a1b-4c2d-8e3f-901234567890"
	billing  = "7d1f0a52-9b3c-4c1e-8f60-2a5b9c0d1e11" // the app of integration billing
	sync     = "7d1f0a52-9b3c-4c1e-8f60-2a5b9c0d1e22" // the app of integration sync
	stranger = "7d1f0a52-9b3c-4c1e-8f60-2a5b9c0d1e33" // an app that never comes by
	sam      = "5f0e6c7a-2222-4d3b-9a55-0c1d2e3f4a5b"
	kim      = "c0ffee00-4444-4a4a-9b9b-121212121212"
	office   = "203.0.113.24" // the guard's address, as Microsoft sees it
	attic    = "198.51.100.7" // another
)

// now is when the tests take place.
var now = time.Date(2026, 6, 10, 12, 0, 0, 0, time.UTC)

// call is a call that the guard recorded, an hour before now, with MFA, of billing.
type guarded struct {
	proxy.Record
	unended bool
}

func guardedCall(id string) guarded {
	r := guarded{Record: proxy.Record{
		Decided: proxy.Decided{
			Time: now.Add(-time.Hour), Method: "GET", Path: "/v1/invoices", Route: "/v1/invoices", Upstream: "partner-center",
			Integration: "billing", Owner: "billing@contoso.example", RequestID: id,
			Token:    policy.Token{Verified: true, Kind: policy.KindAppUser, MFA: policy.MFAPresent, TenantID: tenantID, AppID: billing, ObjectID: sam, UPN: "sam@contoso.example", AMR: []string{"pwd", "mfa"}},
			Decision: policy.Decision{Effect: policy.Allow, Mode: policy.Audit, Reason: policy.ReasonMFAPresent},
		},
		Finished: proxy.Finished{Status: 200, UpstreamTime: 100 * time.Millisecond, Duration: 150 * time.Millisecond, UpstreamRequestID: id},
	}}
	return r
}

func (g guarded) ago(d time.Duration) guarded { g.Time = now.Add(-d); return g }
func (g guarded) weak() guarded {
	g.Token.MFA, g.Token.AMR, g.Reason, g.WouldReject = policy.MFAAbsent, []string{"pwd"}, policy.ReasonMFAMissing, true
	return g
}
func (g guarded) unclear() guarded {
	g.Token.MFA, g.Token.AMR, g.Reason = policy.MFAUnknown, nil, policy.ReasonMFAUnknown
	return g
}
func (g guarded) of(integration, app, object, upn string) guarded {
	g.Integration, g.Owner, g.Token.AppID, g.Token.ObjectID, g.Token.UPN = integration, integration+"@contoso.example", app, object, upn
	return g
}
func (g guarded) to(method, route, path string) guarded {
	g.Method, g.Route, g.Path = method, route, path
	return g
}
func (g guarded) appOnly() guarded {
	g.Token.Kind, g.Token.MFA, g.Token.ObjectID, g.Reason = policy.KindAppOnly, policy.MFANotApplicable, "", policy.ReasonAppOnly
	return g
}
func (g guarded) opaque() guarded {
	g.Token, g.Reason = policy.Token{Kind: policy.KindOpaque}, policy.ReasonTokenOpaque
	return g
}
func (g guarded) refused() guarded {
	g.Effect, g.Mode, g.Status, g.UpstreamTime, g.UpstreamRequestID = policy.Reject, policy.Enforce, 401, 0, ""
	return g
}
func (g guarded) elsewhere(upstream string) guarded { g.Upstream = upstream; return g }
func (g guarded) repeated(n int) guarded            { g.Replays = n; return g }
func (g guarded) answeredAs(id string) guarded      { g.UpstreamRequestID = id; return g }
func (g guarded) failing(reason string) guarded {
	g.Error, g.Status, g.UpstreamTime, g.UpstreamRequestID = reason, 0, 0, ""
	return g
}

// msRow is a row of partnerRequests.
type msRow struct {
	RequestID   string `json:"requestId"`
	Correlation string `json:"correlationId"`
	Operation   string `json:"operationName"`
	Time        string `json:"requestDateTime"`
	Source      string `json:"sourceIpAddress"`
	ObjectID    string `json:"objectId"`
	TenantID    string `json:"tenantId"`
	UPN         string `json:"upn"`
	AppID       string `json:"applicationId"`
	Compliant   bool   `json:"mfaCompliant"`
}

// rowOf is how Microsoft lists a call, by way of the guard's address.
func rowOf(g guarded) msRow {
	return msRow{
		RequestID: g.RequestID, Operation: "Get /v{version}/invoices", Time: zoneless(g.Time.Add(40 * time.Millisecond)), Source: office,
		ObjectID: cmp.Or(g.Token.ObjectID, sam), TenantID: tenantID, UPN: cmp.Or(g.Token.UPN, "sam@contoso.example"), AppID: cmp.Or(g.Token.AppID, billing), Compliant: g.Token.MFA != policy.MFAAbsent,
	}
}

func zoneless(t time.Time) string { return t.Format("2006-01-02T15:04:05.999") }

func (r msRow) ago(d time.Duration) msRow { r.Time = zoneless(now.Add(-d)); return r }
func (r msRow) id(id string) msRow        { r.RequestID = id; return r }
func (r msRow) from(source string) msRow  { r.Source = source; return r }
func (r msRow) weak() msRow               { r.Compliant = false; return r }
func (r msRow) strong() msRow             { r.Compliant = true; return r }
func (r msRow) app(id string) msRow       { r.AppID = id; return r }
func (r msRow) user(id, upn string) msRow { r.ObjectID, r.UPN = id, upn; return r }
func (r msRow) of(tenant string) msRow    { r.TenantID = tenant; return r }
func (r msRow) operation(op string) msRow { r.Operation = op; return r }
func (r msRow) later(d time.Duration) msRow {
	t, _ := time.Parse("2006-01-02T15:04:05", r.Time)
	r.Time = zoneless(t.Add(d))
	return r
}

// before is a call long ago, so that our records begin before Microsoft's window.
var before = guardedCall("long-ago").ago(8 * 24 * time.Hour)

// estate is a data directory with calls, and its reader.
func estate(t testing.TB, calls ...guarded) (dir string, r store.Reader) {
	t.Helper()
	dir = t.TempDir()
	l, err := ledger.Open(ledger.Config{Dir: dir, Retention: -1, MinFree: -1})
	if err != nil {
		t.Fatal(err)
	}
	s, err := store.Open(store.Config{Dir: dir, Retention: -1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	for i, c := range calls {
		c.Call = proxy.CallID(uuid.UUID{6: 0x70, 8: 0x80, 13: byte(i >> 16), 14: byte(i >> 8), 15: byte(i)})
		if err := l.Decide(&c.Record); err != nil {
			t.Fatal(err)
		}
		if c.unended {
			continue
		}
		if err := l.Finish(&c.Record); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.CatchUp(t.Context()); err != nil {
		t.Fatal(err)
	}
	if r, err = store.OpenReader(dir); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return dir, r
}

// says is what Microsoft's three APIs answer: whatever marshals to JSON, or a handler.
type says struct{ requests, principals, adoption any }

// serve answers as s says.
func (s says) serve(t testing.TB) *httptest.Server {
	t.Helper()
	answer := func(v any) http.HandlerFunc {
		if h, ok := v.(http.HandlerFunc); ok {
			return h
		}
		if v == nil {
			v = []int{}
		}
		body, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return func(w http.ResponseWriter, _ *http.Request) { w.Write(body) }
	}
	mux := http.NewServeMux()
	mux.Handle("GET /v1/partnerRequests", answer(s.requests))
	mux.Handle("GET /v1/nonMfaCompliantPartnerPrincipals", answer(s.principals))
	mux.Handle("GET /v1/applicationmfaadoptionstatus", answer(s.adoption))
	server := httptest.NewServer(mux)
	t.Cleanup(server.Close)
	return server
}

func collection[T any](items ...T) any {
	return map[string]any{"totalCount": len(items), "items": items, "attributes": map[string]string{"objectType": "Collection"}}
}

const secret = "eyJhbGciOiJub25lIn0.canary-payload-Zq81.canary-signature-Hn27xw"

func config(dir string, r store.Reader, url string) Config {
	return Config{
		Dir: dir, Store: r, URL: url, Now: func() time.Time { return now },
		Token:        func(context.Context) (string, error) { return secret, nil },
		Integrations: []report.Integration{{Name: "billing", Owner: "billing@contoso.example"}},
	}
}

// reconciled runs over calls of ours and Microsoft's word.
func reconciled(t *testing.T, calls []guarded, ms says, change ...func(*Config)) *Result {
	t.Helper()
	dir, r := estate(t, calls...)
	cfg := config(dir, r, ms.serve(t).URL)
	for _, c := range change {
		c(&cfg)
	}
	_, before := readKept(dir)
	res, err := Run(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	q := res.Requests
	if sum := q.Listed + q.Direct + q.Own + q.Outside + q.Undecided; sum != q.Rows {
		t.Errorf("the parts of %+v come to %d", q, sum)
	}
	if errors.Is(before, ErrNoResult) {
		sameWithoutNames(t, cfg, dir, res)
	}
	return res
}

// sameWithoutNames runs cfg once more, by the user_refs of dir: all is found as it is by
// name, and what is kept names nobody.
func sameWithoutNames(t *testing.T, cfg Config, dir string, want *Result) {
	t.Helper()
	refs, err := ledger.UserRefs(dir)
	if err != nil {
		t.Fatal(err)
	}
	objects := map[string]string{}
	cfg.Dir, cfg.UserRef = t.TempDir(), func(tid, oid string) string {
		ref := refs(tid, oid)
		objects[ref] = strings.ToLower(oid)
		return ref
	}
	got, err := Run(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	// Equals are in the order of what users are known by.
	plain := func(r Result) Result {
		r.Pseudonymous, r.Findings = false, slices.Clone(r.Findings)
		for i := range r.Findings {
			f := &r.Findings[i]
			if object, is := objects[f.ObjectID]; is {
				f.Text, f.ObjectID = strings.ReplaceAll(f.Text, f.ObjectID, object), object
			}
		}
		slices.SortFunc(r.Findings, func(a, b Finding) int { return strings.Compare(fmt.Sprint(a), fmt.Sprint(b)) })
		return r
	}
	if diff := gocmp.Diff(plain(*want), plain(*got)); diff != "" || !got.Pseudonymous {
		t.Errorf("by user_ref (-by name +got):\n%s", diff)
	}
	kept, err := os.ReadFile(filepath.Join(cfg.Dir, resultFile))
	if err != nil {
		t.Fatal(err)
	}
	for _, who := range []string{sam, kim, "sam@", "kim@", `"user":`} {
		if strings.Contains(strings.ToLower(string(kept)), who) {
			t.Errorf("kept is %s: %s", who, kept)
		}
	}
}

// brief is a finding in a line, for comparison.
func brief(f Finding) string {
	s := f.Severity + " " + f.Code
	for _, part := range []string{f.AppID, f.ObjectID, f.Source, f.Microsoft, f.Guard} {
		if part != "" {
			s += " " + map[string]string{billing: "billing", sync: "sync", stranger: "stranger", sam: "sam", kim: "kim", office: "office", attic: "attic"}[part]
			if strings.HasSuffix(s, " ") {
				s += part
			}
		}
	}
	if f.Calls > 0 {
		s += fmt.Sprintf(" ×%d", f.Calls)
	}
	return s
}

func briefs(r *Result) []string {
	all := []string{}
	for _, f := range r.Findings {
		all = append(all, brief(f))
	}
	return all
}

func TestRequestsAgainstCalls(t *testing.T) {
	one := guardedCall("6c583d8d-46cd-420c-ae3d-000000000001")
	two := guardedCall("6c583d8d-46cd-420c-ae3d-000000000002").ago(50 * time.Minute)
	fixed := func(id string, ago time.Duration) guarded { return guardedCall(id).ago(ago) }
	noDelay := func(c *Config) { c.Delay = -1 }
	for _, tt := range []struct {
		name   string
		calls  []guarded
		rows   []msRow
		want   []string
		listed int
		// attributes is how many of these are not found by id.
		attributes int
		change     func(*Config)
	}{
		{name: "the same on both sides: all clear", calls: []guarded{one, two}, rows: []msRow{rowOf(one), rowOf(two)}, listed: 2},
		{name: "in another order", calls: []guarded{one, two}, rows: []msRow{rowOf(two), rowOf(one)}, listed: 2},
		{name: "a row that stands there twice", calls: []guarded{one}, rows: []msRow{rowOf(one), rowOf(one)}, listed: 1},
		{name: "an id in capitals", calls: []guarded{one}, rows: []msRow{rowOf(one).id("6C583D8D-46CD-420C-AE3D-000000000001")}, listed: 1},
		{name: "the id of Microsoft's answer", calls: []guarded{one.answeredAs("other")}, rows: []msRow{rowOf(one).id("other")}, listed: 1},
		{name: "a call that has not ended", calls: []guarded{{Record: one.Record, unended: true}}, rows: []msRow{rowOf(one)}, listed: 1},
		{name: "a call whose client hung up", calls: []guarded{one.failing("client_canceled")}, rows: []msRow{rowOf(one)}, listed: 1},
		{name: "an opaque token, of which Microsoft knows more", calls: []guarded{one.opaque()}, rows: []msRow{rowOf(one)}, listed: 1},
		{name: "clocks that differ by four minutes", calls: []guarded{one}, rows: []msRow{rowOf(one).later(4 * time.Minute)}, listed: 1},
		{name: "a user and tenant in capitals", calls: []guarded{one}, rows: []msRow{rowOf(one).user(strings.ToUpper(sam), "").of(strings.ToUpper(tenantID))}, listed: 1},
		{name: "no tenant", calls: []guarded{one}, rows: []msRow{rowOf(one).of("")}, listed: 1},
		{name: "another tenant, as the user's home", calls: []guarded{one}, rows: []msRow{rowOf(one).of("2c3d4e5f-1b2c-4d3e-9f40-012345678901")}, listed: 1},
		{name: "a request that net/http sent twice", calls: []guarded{one.repeated(1)}, rows: []msRow{rowOf(one), rowOf(one).later(time.Second)}, listed: 2},

		{name: "a direct caller of an app that we know", calls: []guarded{one}, rows: []msRow{rowOf(one), rowOf(one).id("d").from(attic).weak()},
			want: []string{"high direct_calls billing sam attic ×1"}, listed: 1},
		{name: "one with MFA is less urgent", calls: []guarded{one}, rows: []msRow{rowOf(one), rowOf(one).id("d").from(attic)},
			want: []string{"medium direct_calls billing sam attic ×1"}, listed: 1},
		{name: "one from behind the guard's own address", calls: []guarded{one}, rows: []msRow{rowOf(one), rowOf(one).id("d").later(time.Second)},
			want: []string{"medium direct_calls billing sam office ×1"}, listed: 1},
		{name: "one that the guard refused and that went round it with the same id", calls: []guarded{one, fixed("r", 30*time.Minute).refused()}, rows: []msRow{rowOf(one), rowOf(one).id("r").ago(30 * time.Minute).from(attic)},
			want: []string{"medium direct_calls billing sam attic ×1"}, listed: 1},
		{name: "direct callers are told apart by app, user and address", calls: []guarded{one},
			rows: []msRow{rowOf(one), rowOf(one).id("a").app(stranger).weak(), rowOf(one).id("b").app(stranger).weak().from(attic), rowOf(one).id("c").app(stranger).user(kim, "kim").from(attic), rowOf(one).id("d").app(stranger).weak().from(attic)},
			want: []string{"high direct_calls stranger sam attic ×2", "high direct_calls stranger sam office ×1", "medium direct_calls stranger kim attic ×1"}, listed: 1},
		{name: "a direct caller in small letters and in capitals", calls: []guarded{one}, rows: []msRow{rowOf(one), rowOf(one).id("d").from(attic), rowOf(one).id("e").from(attic).user(strings.ToUpper(sam), "")},
			want: []string{"medium direct_calls billing sam attic ×2"}, listed: 1},
		{name: "who reads the Security APIs is told, quietly", calls: []guarded{one}, rows: []msRow{rowOf(one), rowOf(one).id("d").from(attic).operation("Get /v{version}/partnerRequests")},
			want: []string{"low direct_calls billing sam attic ×1"}, listed: 1},

		{name: "an id that a client uses again and again", calls: []guarded{fixed("same", 60*time.Minute), fixed("same", 40*time.Minute), fixed("same", 20*time.Minute)},
			rows: []msRow{rowOf(one).id("same").ago(20 * time.Minute), rowOf(one).id("same").ago(60 * time.Minute), rowOf(one).id("same").ago(40 * time.Minute)}, listed: 3},
		{name: "an id used again within seconds", calls: []guarded{fixed("same", 60*time.Second), fixed("same", 59*time.Second), fixed("same", 58*time.Second)},
			rows: []msRow{rowOf(one).id("same").ago(60 * time.Second), rowOf(one).id("same").ago(59 * time.Second), rowOf(one).id("same").ago(58 * time.Second)}, listed: 3},
		{name: "an id used again: the nearest call is meant", calls: []guarded{fixed("same", 60*time.Second).weak(), fixed("same", 58*time.Second)},
			rows: []msRow{rowOf(one).id("same").ago(58 * time.Second)}, listed: 1},
		{name: "an id used again, once directly", calls: []guarded{one, fixed("same", 60*time.Second), fixed("same", 58*time.Second)},
			rows: []msRow{rowOf(one), rowOf(one).id("same").ago(60 * time.Second), rowOf(one).id("same").ago(59 * time.Second).from(attic), rowOf(one).id("same").ago(58 * time.Second)},
			want: []string{"medium direct_calls billing sam attic ×1"}, listed: 3},
		{name: "an id of ours, used directly hours later", calls: []guarded{one}, rows: []msRow{rowOf(one), rowOf(one).later(45 * time.Minute)},
			want: []string{"medium direct_calls billing sam office ×1"}, listed: 1},
		{name: "an id of ours, used by another app", calls: []guarded{one}, rows: []msRow{rowOf(one), rowOf(one).app(stranger).later(-10 * time.Millisecond)},
			want: []string{"medium direct_calls stranger sam office ×1"}, listed: 1},
		{name: "an id of ours, used by another user", calls: []guarded{one}, rows: []msRow{rowOf(one), rowOf(one).user(kim, "kim").later(-10 * time.Millisecond)},
			want: []string{"medium direct_calls billing kim office ×1"}, listed: 1},

		{name: "rows without ids are found by app, user, operation and time", calls: []guarded{one, two.to("POST", "/v1/customers/{customer-tenant-id}/orders", "/v1/customers/x/orders")},
			rows: []msRow{rowOf(one).id(""), rowOf(two).id("").operation("Post /v{version}/customers/{customer_id}/orders")}, listed: 2, attributes: 2, change: noDelay},
		{name: "rows without ids, and one too many", calls: []guarded{one}, rows: []msRow{rowOf(one).id(""), rowOf(one).id("").later(time.Minute)},
			want: []string{"medium direct_calls billing sam office ×1"}, listed: 1, attributes: 1},
		{name: "rows without ids of another operation", calls: []guarded{one}, rows: []msRow{rowOf(one).id("").operation("Get /v{version}/customers")},
			want: []string{"medium direct_calls billing sam office ×1"}, listed: 0},
		{name: "ids that are none of ours at all", calls: []guarded{one, two}, rows: []msRow{rowOf(one).id("x"), rowOf(two).id("y")}, listed: 2, attributes: 2},
		{name: "a foreign id from the guard's address, of a call that has no row otherwise", calls: []guarded{one, two}, rows: []msRow{rowOf(one), rowOf(two).id("y")}, listed: 2, attributes: 1},
		{name: "a foreign id from elsewhere, of the same kind as a call of ours", calls: []guarded{one, two}, rows: []msRow{rowOf(one), rowOf(two).id("y").from(attic)},
			want: []string{"medium direct_calls billing sam attic ×1"}, listed: 1},

		{name: "times that are eight hours off", calls: []guarded{one, two, fixed("c", 45*time.Minute), fixed("d", 40*time.Minute)},
			rows: []msRow{rowOf(one).later(-8 * time.Hour), rowOf(two).later(-8 * time.Hour), rowOf(fixed("c", 45*time.Minute)).later(-8 * time.Hour), rowOf(fixed("d", 40*time.Minute)).later(-8 * time.Hour), rowOf(one).id("z").later(-8 * time.Hour).from(attic)},
			want: []string{"medium direct_calls billing sam attic ×1"}, listed: 4},

		{name: "app-only calls, other upstreams and refusals are nothing that Microsoft should list", calls: []guarded{fixed("a", 3*time.Hour).appOnly(), fixed("b", 3*time.Hour).elsewhere("graph"), fixed("c", 3*time.Hour).refused(), fixed("d", 3*time.Hour).opaque()}},
		{name: "a call of ours that Microsoft does not list", calls: []guarded{one, fixed("b", 3*time.Hour)}, rows: []msRow{rowOf(one)},
			want: []string{"low unlisted_calls billing sam ×1"}, listed: 1},
		{name: "one that Microsoft may list yet", calls: []guarded{one, fixed("b", 10*time.Minute)}, rows: []msRow{rowOf(one)}, listed: 1},
		{name: "one that it should by now", calls: []guarded{one, fixed("b", 10*time.Minute)}, rows: []msRow{rowOf(one)}, change: noDelay,
			want: []string{"low unlisted_calls billing sam ×1"}, listed: 1},

		{name: "Microsoft says no MFA, the guard saw it", calls: []guarded{one}, rows: []msRow{rowOf(one).weak()},
			want: []string{"high verdict_differs billing sam office non_compliant present ×1"}, listed: 1},
		{name: "Microsoft says MFA, the guard saw none", calls: []guarded{one.weak()}, rows: []msRow{rowOf(one).strong()},
			want: []string{"medium verdict_differs billing sam office compliant absent ×1"}, listed: 1},
		{name: "Microsoft says no MFA, the guard could not tell", calls: []guarded{one.unclear()}, rows: []msRow{rowOf(one).weak()},
			want: []string{"medium verdict_differs billing sam office non_compliant unknown ×1"}, listed: 1},
		{name: "Microsoft says MFA, the guard could not tell", calls: []guarded{one.unclear()}, rows: []msRow{rowOf(one)}, listed: 1},
		{name: "both say no MFA", calls: []guarded{one.weak()}, rows: []msRow{rowOf(one).weak()}, listed: 1},

		{name: "what was before --since is left out", calls: []guarded{one}, rows: []msRow{rowOf(one), rowOf(one).id("d").ago(5 * 24 * time.Hour).from(attic)},
			change: func(c *Config) { c.Since = now.Add(-24 * time.Hour) }, listed: 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			change := tt.change
			if change == nil {
				change = func(*Config) {}
			}
			r := reconciled(t, append([]guarded{before}, tt.calls...), says{requests: collection(tt.rows...)}, change)
			want := tt.want
			if want == nil {
				want = []string{}
			}
			if diff := gocmp.Diff(want, briefs(r)); diff != "" {
				t.Errorf("findings (-want +got):\n%s", diff)
			}
			if r.Requests.Listed != tt.listed || r.Requests.ByAttributes != tt.attributes {
				t.Errorf("found %+v, want %d, %d of them by attributes", r.Requests, tt.listed, tt.attributes)
			}
			if !r.Complete || r.Clear != (len(want) == 0) {
				t.Errorf("complete %v, clear %v; windows %+v", r.Complete, r.Clear, r.Windows)
			}
		})
	}
}

func TestWhatIsOutsideOurRecordsIsNotJudged(t *testing.T) {
	one := guardedCall("a")
	r := reconciled(t, []guarded{one}, says{requests: collection(rowOf(one), rowOf(one).id("b").ago(3*24*time.Hour).from(attic))})
	if got := briefs(r); len(got) > 0 || r.Requests.Outside != 1 || !r.Since.Equal(one.Time) {
		t.Errorf("findings %q, %+v, since %s", got, r.Requests, r.Since)
	}
	r = reconciled(t, nil, says{requests: collection(rowOf(one))})
	if r.Complete || r.Clear || r.Requests.Outside != 1 || !r.Since.IsZero() {
		t.Errorf("without records: complete %v, clear %v, %+v", r.Complete, r.Clear, r.Requests)
	}
}

func TestAConstantIDUnderLoad(t *testing.T) {
	// A client that always sends the same id, 3,000 times within a second; 5 directly.
	var calls []guarded
	var rows []msRow
	for i := range 3000 {
		g := guardedCall("same").ago(time.Hour - time.Duration(i)*300*time.Microsecond)
		calls, rows = append(calls, g), append(rows, rowOf(g).later(time.Duration(i)*time.Millisecond)) // distinct times
	}
	for i := range 5 {
		rows = append(rows, rows[i*500].from(attic))
	}
	r := reconciled(t, append([]guarded{before, guardedCall("own").ago(2 * time.Hour)}, calls...), says{requests: collection(append(rows, rowOf(guardedCall("own").ago(2*time.Hour)))...)})
	if diff := gocmp.Diff([]string{"medium direct_calls billing sam attic ×5"}, briefs(r)); diff != "" {
		t.Errorf("findings (-want +got):\n%s", diff)
	}
}

func TestPrincipals(t *testing.T) {
	type principal struct {
		ObjectID string `json:"objectId"`
		TenantID string `json:"tenantId"`
		UPN      string `json:"upn"`
		Last     string `json:"lastNonMfaCompliantRequestDateTime"`
	}
	p := func(id, upn string, ago time.Duration) principal {
		return principal{id, tenantID, upn, zoneless(now.Add(-ago))}
	}
	bad, good := guardedCall("a").ago(3*time.Hour).weak(), guardedCall("b").ago(time.Hour)
	rows := collection(rowOf(bad), rowOf(good), rowOf(good).id("d").user(kim, "kim").from(attic).weak())
	for _, tt := range []struct {
		name       string
		calls      []guarded
		principals []principal
		want       string
		text       string
	}{
		{"one whose calls here have no MFA", []guarded{bad}, []principal{p(sam, "sam@contoso.example", 3*time.Hour)}, "high non_compliant_principal sam non_compliant", "calls as billing"},
		{"one that has called with MFA since", []guarded{bad, good}, []principal{p(sam, "sam@contoso.example", 3*time.Hour)}, "low non_compliant_principal sam non_compliant", "looks fixed"},
		{"one that called with MFA before", []guarded{good.ago(5 * time.Hour)}, []principal{p(sam, "sam@contoso.example", 3*time.Hour)}, "high non_compliant_principal sam non_compliant", "calls as billing"},
		{"one that was never here", []guarded{good}, []principal{p(kim, "kim", 3*time.Hour)}, "medium non_compliant_principal_not_seen kim non_compliant", "no call of this user passed the guard"},
		{"one that is listed twice counts once", []guarded{good}, []principal{p(kim, "kim", 3*time.Hour), p(kim, "kim", 2*time.Hour)}, "medium non_compliant_principal_not_seen kim non_compliant", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := reconciled(t, append([]guarded{before}, tt.calls...), says{requests: rows, principals: collection(tt.principals...)})
			var got []Finding
			for _, f := range r.Findings {
				if strings.HasPrefix(f.Code, NonCompliantPrincipal) {
					got = append(got, f)
				}
			}
			if len(got) != 1 || brief(got[0]) != tt.want || !strings.Contains(got[0].Text, tt.text) {
				t.Fatalf("findings = %+v, want %s with %q", got, tt.want, tt.text)
			}
			if got[0].ObjectID == kim && (len(got[0].Reasons) != 1 || !strings.Contains(got[0].Reasons[0], attic)) {
				t.Errorf("reasons = %q, want the direct calls of this user", got[0].Reasons)
			}
			if got[0].ObjectID == sam && (len(got[0].Integrations) != 1 || got[0].Integrations[0].Owner != "billing@contoso.example") {
				t.Errorf("integrations = %+v", got[0].Integrations)
			}
		})
	}
}

func TestAdoption(t *testing.T) {
	type day struct {
		Day       string `json:"loginDate"`
		Compliant int    `json:"mfaCompliantRequestCount"`
		Total     int    `json:"totalRequestCount"`
		App       string `json:"applicationId"`
		Name      string `json:"applicationName"`
	}
	yesterday := 20 * time.Hour // ago
	calls := []guarded{before}
	var rows []msRow
	for i := range 20 {
		g := guardedCall(fmt.Sprint("y", i)).ago(yesterday + time.Duration(i)*time.Minute)
		calls, rows = append(calls, g), append(rows, rowOf(g))
	}
	for _, tt := range []struct {
		name string
		days []day
		more []msRow
		want []string
	}{
		{name: "as many as passed here", days: []day{{"2026-06-09", 20, 20, billing, ""}}},
		{name: "a little more than passed here may be how Microsoft counts", days: []day{{"2026-06-09", 25, 25, billing, ""}}},
		{name: "many more", days: []day{{"2026-06-09", 60, 60, billing, ""}}, want: []string{"medium application_partly_seen billing ×40"}},
		{name: "many more, and all of them among the direct calls", days: []day{{"2026-06-09", 50, 50, billing, ""}},
			more: func() (all []msRow) {
				for i := range 30 {
					all = append(all, rowOf(calls[1]).id(fmt.Sprint("d", i)).from(attic))
				}
				return all
			}(), want: []string{"medium direct_calls billing sam attic ×30"}},
		{name: "an app that never came by", days: []day{{"2026-06-09", 0, 1, stranger, "Old tool"}}, want: []string{"medium application_not_seen stranger ×1"}},
		{name: "one that shows among the direct calls is told once", days: []day{{"2026-06-09", 0, 1, stranger, "Old tool"}}, more: []msRow{rowOf(calls[1]).id("d").app(stranger)},
			want: []string{"medium direct_calls stranger sam office ×1"}},
		{name: "a day that is counted twice, by answers of two times", days: []day{{"2026-06-09", 10, 10, billing, ""}, {"2026-06-09", 20, 20, billing, ""}}},
		{name: "a day before our records", days: []day{{"2026-06-01", 0, 99, stranger, ""}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := reconciled(t, calls, says{requests: collection(append(rows, tt.more...)...), adoption: tt.days})
			want := tt.want
			if want == nil {
				want = []string{}
			}
			if diff := gocmp.Diff(want, briefs(r)); diff != "" {
				t.Errorf("findings (-want +got):\n%s\n%+v", diff, r.Applications)
			}
			for _, a := range r.Applications {
				if a.Days != 1 || a.AppID == billing && a.Here != 20 {
					t.Errorf("application %+v, want one day, and 20 calls here of billing", a)
				}
			}
		})
	}
}

func TestWindows(t *testing.T) {
	one := guardedCall("a")
	full := func(from, to time.Duration) []msRow { // 10,000 rows, all of one call long ago but for times
		rows := make([]msRow, listedByMicrosoft)
		for i := range rows {
			rows[i] = rowOf(one).ago(from - time.Duration(i)*(from-to)/listedByMicrosoft)
			rows[i].Operation = "Get /v{version}/partnerRequests"
		}
		return rows
	}
	ranBefore := func(ago time.Duration) func(*Config) {
		return func(c *Config) {
			k := kept{Format: resultFormat, Version: resultVersion, Ended: now.Add(-ago)}
			if err := k.write(c.Dir); err != nil {
				t.Fatal(err)
			}
		}
	}
	since := func(ago time.Duration) func(*Config) { return func(c *Config) { c.Since = now.Add(-ago) } }
	var nothing func(*Config)
	for _, tt := range []struct {
		name   string
		rows   []msRow
		first  time.Duration // of our records, ago
		change func(*Config)
		state  string
		reason string
	}{
		{"seven days, and few rows", []msRow{rowOf(one)}, 8 * 24 * time.Hour, nothing, Complete, ""},
		{"no rows at all", nil, 8 * 24 * time.Hour, nothing, Complete, ""},
		{"10,000 rows that begin two days ago", full(48*time.Hour, time.Minute), 8 * 24 * time.Hour, nothing, Incomplete, "the newest 10000 rows only: of the time from 2026-06-03 12:00 UTC to 2026-06-08 12:00 UTC nothing is known"},
		{"10,000 rows that begin before the last run ended", full(48*time.Hour, time.Minute), 8 * 24 * time.Hour, ranBefore(40 * time.Hour), Complete, ""},
		{"10,000 rows that begin after it", full(30*time.Hour, time.Minute), 8 * 24 * time.Hour, ranBefore(40 * time.Hour), Incomplete, "the last run ended before"},
		{"10,000 rows that begin before the guard did", full(48*time.Hour, time.Minute), 24 * time.Hour, nothing, Complete, ""},
		{"10,000 rows that begin before what is asked for", full(48*time.Hour, time.Minute), 8 * 24 * time.Hour, since(40 * time.Hour), Complete, ""},
		{"a last run more than seven days ago", []msRow{rowOf(one)}, 20 * 24 * time.Hour, ranBefore(9 * 24 * time.Hour), Incomplete, "lists 7 days only: of the time from 2026-06-01 12:00 UTC to 2026-06-03 12:00 UTC"},
		{"more asked for than Microsoft keeps", []msRow{rowOf(one)}, 20 * 24 * time.Hour, since(10 * 24 * time.Hour), Incomplete, "--since asks for more"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			change := tt.change
			if change == nil {
				change = func(*Config) {}
			}
			r := reconciled(t, []guarded{before.ago(tt.first), one}, says{requests: collection(tt.rows...)}, change)
			w := r.Windows[requestsAPI]
			if w.State != tt.state || !strings.Contains(strings.Join(w.Reasons, "\n"), tt.reason) {
				t.Errorf("window = %+v, want %s with %q", w, tt.state, tt.reason)
			}
			if complete := tt.state == Complete; r.Complete != complete || r.Clear && !complete {
				t.Errorf("complete %v, clear %v", r.Complete, r.Clear)
			}
			incomplete := 0
			for _, f := range r.Findings {
				if f.Code == WindowIncomplete {
					incomplete++
				}
			}
			if want := map[bool]int{true: 0, false: 1}[r.Complete]; incomplete != want {
				t.Errorf("%d findings say that a window is incomplete, want %d", incomplete, want)
			}
		})
	}
}

func TestFullPrincipalsAreIncomplete(t *testing.T) {
	type principal struct {
		ObjectID string `json:"objectId"`
		Last     string `json:"lastNonMfaCompliantRequestDateTime"`
	}
	rows := make([]principal, listedByMicrosoft)
	for i := range rows {
		rows[i] = principal{fmt.Sprint("user-", i), zoneless(now.Add(-time.Hour))}
	}
	r := reconciled(t, []guarded{before}, says{principals: collection(rows...)})
	if w := r.Windows[principalsAPI]; w.State != Incomplete || r.Complete {
		t.Errorf("window = %+v", w)
	}
	if len(r.Findings) > maxFindings+1 || len(r.Notes) == 0 {
		t.Errorf("%d findings, notes %q: want no more than %d, and a note", len(r.Findings), r.Notes, maxFindings+1)
	}
}

func TestSavedAnswers(t *testing.T) {
	one, two := guardedCall("a").ago(30*time.Hour), guardedCall("b").ago(27*time.Hour)
	dir, r := estate(t, before.ago(9*24*time.Hour), one, two, guardedCall("c"))
	saved := t.TempDir()
	for name, v := range map[string]any{
		"partnerRequests.json":                  collection(rowOf(one), rowOf(two), rowOf(two).id("d").from(attic).weak()),
		"nonMfaCompliantPartnerPrincipals.json": collection[int](), "applicationmfaadoptionstatus.json": []int{},
	} {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(saved, name)
		if err := errors.Join(os.WriteFile(path, b, 0o600), os.Chtimes(path, now.Add(-26*time.Hour), now.Add(-26*time.Hour))); err != nil {
			t.Fatal(err)
		}
	}
	cfg := config(dir, r, "")
	cfg.From, cfg.Token = saved, nil
	res, err := Run(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	if diff := gocmp.Diff([]string{"high direct_calls billing sam attic ×1"}, briefs(res)); diff != "" {
		t.Errorf("findings (-want +got):\n%s", diff)
	}
	if !res.Complete || !res.Taken.Equal(now.Add(-26*time.Hour)) || !res.Windows[requestsAPI].Until.Equal(two.Time.Add(40*time.Millisecond)) {
		t.Errorf("complete %v, taken %s, windows %+v", res.Complete, res.Taken, res.Windows)
	}

	// A later result stays.
	kept, err := LoadResult(dir)
	if err != nil {
		t.Fatal(err)
	}
	newer := config(dir, r, says{requests: collection[msRow]()}.serve(t).URL)
	if _, err := Run(t.Context(), newer); err != nil {
		t.Fatal(err)
	}
	if res, err = Run(t.Context(), cfg); err != nil || len(res.Notes) == 0 || !strings.Contains(res.Notes[len(res.Notes)-1], "A later result is kept") {
		t.Errorf("older answers: notes %q, %v", res.Notes, err)
	}
	last, err := LoadResult(dir)
	if err != nil || !last.Taken.After(kept.Taken) {
		t.Errorf("the later result was replaced: %v", err)
	}
}

func TestOwnRequestsAreKnown(t *testing.T) {
	one := guardedCall("a")
	dir, r := estate(t, before, one)
	var asked []msRow
	var url string
	list := func(w http.ResponseWriter, req *http.Request) {
		asked = append(asked, rowOf(one).id(req.Header.Get("MS-RequestId")).ago(time.Minute).operation("Get /v{version}"+strings.TrimPrefix(req.URL.Path, "/v1")))
		if strings.HasSuffix(req.URL.Path, "partnerRequests") {
			json.NewEncoder(w).Encode(collection(append([]msRow{rowOf(one)}, asked...)...))
			return
		}
		w.Write([]byte("[]"))
	}
	url = says{http.HandlerFunc(list), http.HandlerFunc(list), http.HandlerFunc(list)}.serve(t).URL
	for run := range 3 {
		res, err := Run(t.Context(), config(dir, r, url))
		if err != nil {
			t.Fatal(err)
		}
		if want := 3*run + 1; res.Requests.Own != want || !res.Clear {
			t.Errorf("run %d: %d own requests, want %d; findings %q", run, res.Requests.Own, want, briefs(res))
		}
	}
}

func TestOwnRequestsByWayOfTheGuardAreNotMissed(t *testing.T) {
	one, own := guardedCall("a"), guardedCall("own").ago(3*time.Hour)
	r := reconciled(t, []guarded{before, one, own}, says{requests: collection(rowOf(one))}, func(c *Config) {
		k := kept{Format: resultFormat, Version: resultVersion, Own: []ownRequest{{"own", own.Time}}}
		if err := k.write(c.Dir); err != nil {
			t.Fatal(err)
		}
	})
	if !r.Clear {
		t.Errorf("findings %q", briefs(r))
	}
}

func TestAsking(t *testing.T) {
	one := guardedCall("a")
	rows := collection(rowOf(one))
	sequence := func(handlers ...http.HandlerFunc) http.HandlerFunc {
		var n atomic.Int32
		return func(w http.ResponseWriter, r *http.Request) {
			i := int(n.Add(1)) - 1
			handlers[min(i, len(handlers)-1)](w, r)
		}
	}
	status := func(code int, body string, header ...string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			for _, h := range header {
				name, value, _ := strings.Cut(h, ": ")
				w.Header().Set(name, value)
			}
			w.WriteHeader(code)
			fmt.Fprint(w, body)
		}
	}
	good := func(w http.ResponseWriter, _ *http.Request) { json.NewEncoder(w).Encode(rows) }
	page := func(token, uri string, row msRow) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			if got := r.Header.Get("MS-ContinuationToken"); got != token {
				t.Errorf("MS-ContinuationToken = %q, want %q", got, token)
			}
			links := map[string]any{}
			if uri != "" {
				links["next"] = map[string]any{"uri": uri, "headers": []map[string]string{{"key": "ms-continuationtoken", "value": token + "+"}, {"key": "Authorization", "value": "Bearer other"}}}
			}
			if !strings.HasPrefix(r.Header.Get("Authorization"), "Bearer eyJ") {
				t.Errorf("Authorization = %q", r.Header.Get("Authorization"))
			}
			json.NewEncoder(w).Encode(map[string]any{"items": []msRow{row}, "links": links})
		}
	}
	const next = "artnerRequests?seekOperation=Next"
	two, three := guardedCall("b"), guardedCall("c")
	for _, tt := range []struct {
		name     string
		requests http.HandlerFunc
		listed   int
		state    string
		reason   string
		err      string
		tokens   int32 // how often a token is asked for, 0 for once
	}{
		{name: "an answer", requests: good, listed: 1, state: Complete},
		{name: "throttled at first", requests: sequence(status(429, `{"statusCode":429,"message":"Rate limit is exceeded."}`, "Retry-After: 0"), good), listed: 1, state: Complete},
		{name: "throttled until a date", requests: sequence(status(429, "", "Retry-After: Tue, 09 Jun 2026 12:00:00 GMT"), good), listed: 1, state: Complete},
		{name: "not ready yet", requests: sequence(status(204, "", "Retry-After: 0"), good), listed: 1, state: Complete},
		{name: "no content", requests: status(204, ""), state: Complete},
		{name: "throttled for too long", requests: status(429, "", "Retry-After: 3600"), state: Absent, reason: "ask partnerRequests: 429"},
		{name: "throttled without end", requests: status(429, `{"message":"Rate limit is exceeded."}`, "Retry-After: 0"), state: Absent, reason: "429 Too Many Requests, Rate limit is exceeded."},
		{name: "failing at first", requests: sequence(status(503, "", "Retry-After: 0"), good), listed: 1, state: Complete},
		{name: "failing", requests: status(500, "<html>", "Retry-After: 0"), state: Absent, reason: "ask partnerRequests: 500"},
		{name: "an old token", requests: sequence(status(401, ""), good), listed: 1, state: Complete, tokens: 2},
		{name: "a token that is no good", requests: status(401, `{"code":900421,"description":"The MFA claim is missing."}`), err: "ask partnerRequests: 401 Unauthorized, code 900421: The MFA claim is missing.", tokens: 2},
		{name: "an answer that repeats the token", requests: status(401, `{"code":"400","description":"bad token `+secret+`"}`), err: "ask partnerRequests: 401 Unauthorized", tokens: 2},
		{name: "the reason phrase of 2019", requests: func(w http.ResponseWriter, _ *http.Request) {
			conn, _, err := http.NewResponseController(w).Hijack()
			if err == nil {
				fmt.Fprint(conn, "HTTP/1.1 401 Unauthorized - MFA required\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
				conn.Close()
			}
		}, err: "MFA required", tokens: 2},
		{name: "no right to read one of them", requests: status(403, `{"code":"900308","description":"insufficient privileges"}`), state: Absent, reason: "code 900308"},
		{name: "a redirection elsewhere", requests: status(302, "", "Location: https://collector.example/"), state: Absent, reason: "302 Found"},
		{name: "a page to sign in", requests: status(200, "<html>"), state: Absent, reason: "it is HTML or XML"},
		{name: "gzip, though nobody asked for it", requests: status(200, "\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03\x8b\x8e\x05\x00\x29\xbb\x4c\x0d\x02\x00\x00\x00", "Content-Encoding: gzip"), state: Complete},
		{name: "rows that cannot be read", requests: status(200, `[1,{"requestDateTime":"x"}]`), state: Incomplete, reason: "skipped row 1: it is no object"},
		{name: "fewer rows than it counts", requests: status(200, `{"totalCount":5,"items":[]}`), state: Incomplete, reason: "Microsoft counts 5 rows and sent 0"},
		{name: "an answer that breaks off", requests: func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "1000")
			fmt.Fprint(w, `{"items":[`)
		}, state: Absent, reason: "unexpected EOF"},
		{name: "pages", requests: sequence(page("", "/p"+next, rowOf(one)), page("+", "/v1/p"+next, rowOf(two)), page("++", "p"+next, rowOf(three)), page("+++", "", rowOf(one))), listed: 3, state: Complete},
		{name: "pages that go round in a circle", requests: sequence(page("", "/p"+next, rowOf(one)), func(w http.ResponseWriter, r *http.Request) {
			page(r.Header.Get("MS-ContinuationToken"), "/p"+next, rowOf(two))(w, r)
		}, sequence(page("++", "", rowOf(three)))), listed: 3, state: Complete},
		{name: "a link to another host", requests: sequence(page("", "https://collector.example/v1/p"+next, rowOf(one))), listed: 1, state: Incomplete, reason: "leads to another host"},
		{name: "a page that fails", requests: sequence(page("", "/p"+next, rowOf(one)), status(404, "")), listed: 1, state: Incomplete, reason: "page 2 is missing"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			dir, r := estate(t, before, one, two, three)
			cfg := config(dir, r, says{requests: tt.requests}.serve(t).URL)
			cfg.Delay = 2 * time.Hour // nothing that is not listed counts
			var tokens atomic.Int32
			cfg.Token = func(context.Context) (string, error) {
				return strings.Replace(secret, "canary-payload", fmt.Sprint("canary-payload", tokens.Add(1)), 1), nil
			}
			res, err := Run(t.Context(), cfg)
			if want := max(tt.tokens, 1); tokens.Load() != want {
				t.Errorf("a token was asked for %d times, want %d", tokens.Load(), want)
			}
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) || holdsSecret(err.Error(), secret) {
					t.Fatalf("Run = %v, want an error with %q", err, tt.err)
				}
				var answer *AnswerError
				if !errors.As(err, &answer) || answer.Hint() == "" {
					t.Errorf("the error has no hint")
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			w := res.Windows[requestsAPI]
			if w.State != tt.state || !strings.Contains(strings.Join(w.Reasons, "\n"), tt.reason) || res.Requests.Listed != tt.listed {
				t.Errorf("window = %+v, %+v, want %s with %q and %d listed", w, res.Requests, tt.state, tt.reason, tt.listed)
			}
			if res.Complete != (tt.state == Complete) {
				t.Errorf("complete = %v", res.Complete)
			}
			out, _ := json.Marshal(res)
			var table bytes.Buffer
			WriteTable(&table, res, report.Style{})
			file, _ := os.ReadFile(filepath.Join(dir, resultFile))
			for where, text := range map[string]string{"JSON": string(out), "table": table.String(), "file": string(file)} {
				if strings.Contains(text, "canary") {
					t.Errorf("the %s holds the token", where)
				}
			}
		})
	}
	t.Run("all three fail", func(t *testing.T) {
		dir, r := estate(t, before)
		no := status(403, `{"code":"900329","description":"app-only"}`)
		_, err := Run(t.Context(), config(dir, r, says{no, no, no}.serve(t).URL))
		var answer *AnswerError
		if !errors.As(err, &answer) || !strings.Contains(answer.Hint(), "app+user") {
			t.Errorf("Run = %v", err)
		}
		if _, err := LoadResult(dir); !errors.Is(err, ErrNoResult) {
			t.Errorf("a result was kept: %v", err)
		}
	})
	t.Run("the same token after a 401 is not tried again", func(t *testing.T) {
		dir, r := estate(t, before)
		var asked atomic.Int32
		count := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { asked.Add(1); w.WriteHeader(401) })
		if _, err := Run(t.Context(), config(dir, r, says{requests: count}.serve(t).URL)); err == nil || asked.Load() != 1 {
			t.Errorf("Run = %v after %d requests, want an error after 1", err, asked.Load())
		}
	})
	t.Run("given up while waiting", func(t *testing.T) {
		dir, r := estate(t, before)
		cfg := config(dir, r, says{requests: status(429, "", "Retry-After: 60")}.serve(t).URL)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		cfg.Waiting = func(d time.Duration, why string) {
			if d != time.Minute || why != "Partner Center throttles" {
				t.Errorf("waits %s: %s", d, why)
			}
			cancel()
		}
		if _, err := Run(ctx, cfg); !errors.Is(err, context.Canceled) {
			t.Errorf("Run = %v, want context.Canceled", err)
		}
	})
}

func TestKeptResult(t *testing.T) {
	dir, r := estate(t, before, guardedCall("a"))
	cfg := config(dir, r, says{requests: collection(rowOf(guardedCall("a")))}.serve(t).URL)
	res, err := Run(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	got, err := LoadResult(dir)
	if err != nil {
		t.Fatal(err)
	}
	if diff := gocmp.Diff(res, got); diff != "" {
		t.Errorf("the kept result (-made +read):\n%s", diff)
	}
	path := filepath.Join(dir, resultFile)
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("stat = %v, %v, want mode 0600", info, err)
	}
	for _, tt := range []struct{ name, text, want, hint string }{
		{"damaged", `{"format":"partnerguard-reconcile","version":1,"res`, "is damaged: it is no JSON", "move the file away"},
		{"empty", "", "is damaged: it is no JSON", "move the file away"},
		{"foreign", `{"openapi":"3.0"}`, "is not reconcile's", "move the file away"},
		{"of another type", `[1]`, "is not reconcile's", "move the file away"},
		{"newer", `{"format":"partnerguard-reconcile","version":2,"result":[]}`, "is of a newer partnerguard: version 2, and this one knows 1", "update partnerguard"},
		{"without version", `{"format":"partnerguard-reconcile"}`, "has no version", "move the file away"},
		{"of other contents", `{"format":"partnerguard-reconcile","version":1,"result":[]}`, "is damaged: json", "move the file away"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if err := os.WriteFile(path, []byte(tt.text), 0o600); err != nil {
				t.Fatal(err)
			}
			for call, f := range map[string]func() error{
				"Run":        func() error { _, err := Run(t.Context(), cfg); return err },
				"LoadResult": func() error { _, err := LoadResult(dir); return err },
			} {
				err := f()
				h, ok := err.(interface{ Hint() string })
				if err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), path) || !ok || !strings.Contains(h.Hint(), tt.hint) {
					t.Errorf("%s = %v, want %q and the hint %q", call, err, tt.want, tt.hint)
				}
			}
			if now, _ := os.ReadFile(path); string(now) != tt.text {
				t.Error("the file was changed")
			}
		})
	}
}

func TestAResultThatCannotBeKeptIsReturned(t *testing.T) {
	dir, r := estate(t, before)
	cfg := config(filepath.Join(dir, "gone"), r, says{}.serve(t).URL)
	res, err := Run(t.Context(), cfg)
	if res == nil || err == nil || !strings.Contains(err.Error(), "keep the result") {
		t.Errorf("Run = %v, %v, want both", res, err)
	}
}

func TestWriteTable(t *testing.T) {
	one, two := guardedCall("a"), guardedCall("b").ago(90*time.Minute).of("sync", sync, kim, "kim@fabrikam.example").weak()
	r := reconciled(t, []guarded{before, one, two}, says{requests: collection(rowOf(one), rowOf(two), rowOf(one).id("d").app(stranger).from(attic).weak().operation("Get /v{version}/a\u001b[31m"))})
	var b bytes.Buffer
	if err := WriteTable(&b, r, report.Style{Width: 100}); err != nil {
		t.Fatal(err)
	}
	text := b.String()
	for _, want := range []string{
		"Microsoft's records against ours: 1 finding, 1 high\n", "as of 2026-06-10 12:00 UTC\n",
		"Judged from 2026-06-03 12:00 UTC to 2026-06-10 12:00 UTC: 3 requests, 2 that the guard recorded, 1\n  that it did not\n",
		"partnerRequests                   complete     3  2026-06-03 12:00  2026-06-10 12:00\n",
		"high     direct_calls ", attic, "direct_calls: high, likely\n", "  Fix: Point it at the guard", `\x1b[31m`,
		"will-break  sync         sync@contoso.example",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("the table has no %q:\n%s", want, text)
		}
	}
	if strings.ContainsRune(text, '\x1b') {
		t.Errorf("the table drives the terminal:\n%q", text)
	}
	for line := range strings.Lines(text) {
		if n := len([]rune(strings.TrimSuffix(line, "\n"))); n > 100 && !strings.Contains(line, "http://") {
			t.Errorf("a line has %d columns: %s", n, line)
		}
	}
	b.Reset()
	WriteTable(&b, r, report.Style{Color: true})
	if !strings.Contains(b.String(), "\x1b[31mhigh\x1b[0m") {
		t.Errorf("no colour:\n%s", b.String())
	}
}
