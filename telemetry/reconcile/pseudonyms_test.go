package reconcile

import (
	"context"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/partnerguard/partnerguard/telemetry/ledger"
	"github.com/partnerguard/partnerguard/telemetry/store"
)

// pseudonymous has cfg know users by the user_refs of dir.
func pseudonymous(t testing.TB, cfg Config, dir string) Config {
	t.Helper()
	var err error
	if cfg.UserRef, err = ledger.UserRefs(dir); err != nil {
		t.Fatal(err)
	}
	return cfg
}

// namesKim finds what says who kim is.
var namesKim = regexp.MustCompile(`(?i)kim(@|%40)|c0ffee00-?4444-?4a4a-?9b9b-?121212121212`)

// namesNobody looks for kim in a file.
func namesNobody(t *testing.T, file string) {
	t.Helper()
	text, err := os.ReadFile(file)
	if found := namesKim.Find(text); found != nil || err != nil {
		t.Errorf("%s says %q, %v: %s", file, found, err, text)
	}
}

// TestWhatIsKeptOfMicrosoftsRecordsNamesNobody has Microsoft name a user wherever it can.
func TestWhatIsKeptOfMicrosoftsRecordsNamesNobody(t *testing.T) {
	const name = "Kim@fabrikam.example"
	id := strings.ToUpper(kim)
	refuse := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusForbidden)
		w.Write([]byte(`{"code":"900","description":"User '` + name + `' (` + kim + `) has no role"}`))
	})
	day := now.Add(-24 * time.Hour).Format(time.DateOnly)
	said := says{
		requests: map[string]any{"items": []any{
			rowOf(guardedCall("a")), rowOf(guardedCall(name + "-0")).weak(),
			rowOf(guardedCall(name+"-1")).user(kim, name).from(attic).app(stranger).operation("Get /v1/customers/" + id + "/users/kim%40fabrikam.example").weak(),
			rowOf(guardedCall("")).user("", name).from(attic).weak().operation("Get /v1/users/" + name),
			map[string]any{"requestId": "bad", "requestDateTime": name, "objectId": kim},
		}},
		principals: refuse,
		adoption:   []any{map[string]any{"loginDate": day, "totalRequestCount": 500, "applicationId": stranger, "applicationName": "Tool of " + name + " " + id}},
	}
	dir, r := estate(t, before, guardedCall("a"), guardedCall(name+"-0").to("GET", "", "/v1/invoices"))
	cfg := pseudonymous(t, config(dir, r, said.serve(t).URL), dir)
	res, err := Run(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	if res.Requests.Listed != 2 {
		t.Errorf("requests are %+v, want 2 that the guard recorded", res.Requests)
	}
	namesNobody(t, filepath.Join(dir, resultFile))

	ref, named := cfg.UserRef(tenantID, kim), "upn:"+cfg.UserRef("", "kim@fabrikam.example")
	var users []string
	for _, f := range res.Findings {
		if f.Code == DirectCalls {
			users = append(users, f.ObjectID)
			if f.User != name {
				t.Errorf("who asked is told of %q instead of %q", f.User, name)
			}
		}
	}
	slices.Sort(users)
	if want := []string{ref, named}; len(users) != 2 || !slices.Contains(users, ref) || !slices.Contains(users, named) {
		t.Errorf("direct callers are %q, want %q", users, want)
	}

	// Kept, they can be forgotten by what stands there.
	for _, who := range []string{ref, named} {
		if changed, err := Forget(dir, func(_, object string) bool { return object == who }); len(changed) != 1 || err != nil {
			t.Errorf("Forget(%s) = %q, %v", who, changed, err)
		}
	}

	// Of files, what names them is hidden, too.
	from := filepath.Join(t.TempDir(), name)
	if err := os.Mkdir(from, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(from, "partnerRequests-"+name+".json"), []byte(`[]`), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg.From = from
	if _, err = Run(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	namesNobody(t, filepath.Join(dir, resultFile))

	// An error comes into the guard's log.
	cfg.From, cfg.URL = "", says{requests: refuse, principals: refuse, adoption: refuse}.serve(t).URL
	_, err = Run(t.Context(), cfg)
	var answer *AnswerError
	if err == nil || namesKim.MatchString(err.Error()) || !errors.As(err, &answer) || !strings.Contains(err.Error(), "code 900: User {hidden} ({hidden}) has no role") {
		t.Errorf("Run = %v, want Microsoft's answer without the user", err)
	}
}

// TestWhatIsKeptOfSignInsNamesNobody has a log name a user wherever it can.
func TestWhatIsKeptOfSignInsNamesNobody(t *testing.T) {
	const name = "kim@fabrikam.example"
	as := func(n int, changes ...any) map[string]any {
		return loggedAt(n, append([]any{"userId", kim, "userPrincipalName", name}, changes...)...)
	}
	dir, r := estate(t, guardedCall("a").of("sync", signInSyncApp, kim, name).weak())
	ref := pseudonymous(t, Config{}, dir).UserRef
	page := graphPage(t,
		as(1, "appDisplayName", "Tool of "+name, "ipAddress", name, "incomingTokenType", name, "conditionalAccessStatus", "success",
			"appliedConditionalAccessPolicies", []any{map[string]any{"displayName": "All but " + strings.ToUpper(kim), "result": "success"}}),
		as(2, "networkLocationDetails", []any{map[string]any{"networkType": "trustedNamedLocation", "networkNames": []string{"Home of " + name}}}),
		as(3, "appId", signInSyncApp, "status", map[string]any{"errorCode": 123456, "failureReason": "The account " + name + " (" + kim + ") is odd."}),
		as(4, "createdDateTime", name), as(5, "createdDateTime", kim),
	)
	in := signInTexts(page)
	in[0].Name = "/home/" + name + "/signins-" + kim + ".json"
	s, err := ReadSignIns(t.Context(), SignInConfig{Records: r, Inputs: in, Since: now.Add(-24 * time.Hour), Now: now, UserRef: ref})
	if err != nil {
		t.Fatal(err)
	}
	if err := SaveSignIns(dir, s); err != nil {
		t.Fatal(err)
	}
	namesNobody(t, filepath.Join(dir, signInsFile))
	if len(s.Strangers) != 1 || s.Strangers[0].UserID != ref(signInTenant, kim) || s.Strangers[0].User != name || s.Strangers[0].Seen != "user" || len(s.Strangers[0].Causes) < 2 {
		t.Errorf("strangers are %+v", s.Strangers)
	}
	if len(s.Integrations) != 1 || s.Integrations[0].Failures[0].Principals[0].UserID != ref(signInTenant, kim) || len(s.Skipped) != 2 {
		t.Errorf("integrations are %+v, skipped %+v", s.Integrations, s.Skipped)
	}
	if changed, err := Forget(dir, func(_, object string) bool { return object == ref(signInTenant, kim) }); err != nil || len(changed) != 1 {
		t.Errorf("Forget = %q, %v", changed, err)
	}
	if kept, err := LoadSignIns(dir); err != nil || len(kept.Strangers) > 0 {
		t.Errorf("after it strangers are %+v, %v", kept.Strangers, err)
	}
}

// twoGuards are the records of a fleet.
type twoGuards struct{ store.Reader }

func (twoGuards) Instances(context.Context) ([]store.Instance, error) {
	return make([]store.Instance, 2), nil
}

// TestOtherGuardsReferencesSpeakAgainstNothing has calls in the store whose references
// are of another key than that at hand.
func TestOtherGuardsReferencesSpeakAgainstNothing(t *testing.T) {
	_, r := estate(t, before, guardedCall("a"))
	dir, _ := estate(t)
	cfg := pseudonymous(t, config(dir, twoGuards{r}, says{requests: collection(rowOf(guardedCall("a")))}.serve(t).URL), dir)
	res, err := Run(t.Context(), cfg)
	if err != nil || res.Requests.Listed != 1 || !slices.Contains(res.Notes, fleetNote) {
		t.Errorf("requests are %+v, notes %q, %v", res.Requests, res.Notes, err)
	}
	s, err := ReadSignIns(t.Context(), SignInConfig{Records: twoGuards{r}, Inputs: signInTexts(graphPage(t, logged())), Now: now, UserRef: cfg.UserRef})
	if err != nil || !slices.Contains(s.Notes, fleetNote) {
		t.Errorf("notes are %q, %v", s.Notes, err)
	}
}
