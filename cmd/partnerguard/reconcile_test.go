package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/partnerguard/partnerguard/internal/emulator"
	"github.com/partnerguard/partnerguard/telemetry/reconcile"
	"github.com/partnerguard/partnerguard/telemetry/store"
)

// strangerApp is a client id that no sample integration has.
const strangerApp = "e58f16c3-0829-4a1b-ae7d-29c834051a2d"

// mixedTraffic makes calls through the guard and past it.
type mixedTraffic struct {
	t        *testing.T
	em       *emulator.Emulator
	g        *guardProcess
	canaries *canaries
	direct   *http.Client // goes to Microsoft from an address of its own
}

func (m *mixedTraffic) call(client *http.Client, base, method, path, token string, headers ...string) {
	m.t.Helper()
	r, err := http.NewRequest(method, base+path, nil)
	if err != nil {
		m.t.Fatal(err)
	}
	r.Header.Set("Authorization", "Bearer "+token)
	for _, h := range headers {
		name, value, _ := strings.Cut(h, ": ")
		r.Header.Set(name, value)
	}
	res, err := client.Do(r)
	if err != nil {
		m.t.Fatal(err)
	}
	io.Copy(io.Discard, res.Body)
	res.Body.Close()
}

func (m *mixedTraffic) guarded(method, path, token string, headers ...string) {
	m.t.Helper()
	m.call(plainClient, m.g.url, method, path, token, headers...)
}

func (m *mixedTraffic) past(method, path, token string, headers ...string) {
	m.t.Helper()
	m.call(m.direct, m.em.PartnerURL(), method, path, token, headers...)
}

// otherAddress is a client whose calls come from another address of this machine.
func otherAddress(t *testing.T) *http.Client {
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}
	c, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)})
	if err != nil {
		t.Skipf("there is no second loopback address here: %v", err)
	}
	c.Close()
	transport := &http.Transport{DialContext: d.DialContext, DisableCompression: true}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

// makeMixedTraffic makes calls as an estate on its way to the guard does, and returns
// the data directory and the direct callers, as findings name them. more is for the
// guard's configuration.
func makeMixedTraffic(t *testing.T, em *emulator.Emulator, more ...string) (m *mixedTraffic, dir string, want []string) {
	dir = t.TempDir()
	m = &mixedTraffic{t: t, em: em, canaries: &canaries{t, map[string]string{}}, direct: otherAddress(t)}
	m.g = startGuard(t, dir, guardYAML(em, "audit", more...))
	token := func(app string) string { return m.canaries.token("token of "+app, sampleToken(t, em, app)) }
	compliant, password, appOnly, opaque := token(emulator.AppCompliant), token(emulator.AppPassword), token(emulator.AppOnly), token(emulator.AppOpaque)
	foreign := m.canaries.token("token of a stranger", em.Mint(emulator.TokenSpec{AppID: strangerApp, UPN: "old-tool@contoso-partner.example", AMR: []string{"pwd"}}))
	customer := "/v1/customers/" + em.Customers()[0]

	for i := range 10 {
		m.guarded("GET", "/v1/invoices?size=1", compliant) // the guard adds an id
		m.guarded("GET", customer+"/subscriptions", password, fmt.Sprintf("MS-RequestId: 6c583d8d-46cd-420c-ae3d-%012d", i))
		m.guarded("GET", customer, compliant, "MS-RequestId: 11111111-1111-4111-8111-111111111111") // the same again and again
		m.guarded("GET", "/v1/invoices?size=1", appOnly)
		m.guarded("GET", "/v1/customers?size=1", opaque)
	}
	m.guarded("GET", "/v1/invoices", compliant, "Emulate: status=429")
	m.guarded("GET", "/v1/invoices", password, "Emulate: refuse=code-string")
	m.guarded("POST", customer+"/orders", compliant)

	// A copy of an integration that still runs on the old server.
	for range 3 {
		m.past("GET", customer+"/subscriptions", password)
	}
	// One that sends ids that the guard has seen, too.
	m.past("GET", customer+"/subscriptions", password, "MS-RequestId: 6c583d8d-46cd-420c-ae3d-000000000004")
	m.past("GET", customer, compliant, "MS-RequestId: 11111111-1111-4111-8111-111111111111")
	// An application that nobody knows of.
	m.past("GET", "/v1/invoices", foreign)
	// App-only calls are nothing that Microsoft lists.
	m.past("GET", "/v1/invoices", appOnly)
	m.g.stop()

	app := func(name string) string { a, _ := em.App(name); return a.ID }
	return m, dir, []string{
		"high " + app(emulator.AppPassword) + " svc-sync@contoso-partner.example 127.0.0.2 ×4",
		"high " + strangerApp + " old-tool@contoso-partner.example 127.0.0.2 ×1",
		"medium " + app(emulator.AppCompliant) + " sam@contoso-partner.example 127.0.0.2 ×1",
	}
}

// directCallers are the findings of direct calls, one a line.
func directCallers(r *reconcile.Result) (all []string) {
	for _, f := range r.Findings {
		if f.Code == reconcile.DirectCalls {
			all = append(all, fmt.Sprintf("%s %s %s %s ×%d", f.Severity, f.AppID, f.User, f.Source, f.Calls))
		}
	}
	return all
}

// reconciled runs reconcile, which must end with a result.
func reconciled(t *testing.T, c *canaries, code int, args ...string) *reconcile.Result {
	t.Helper()
	out, errs, got := partnerguard(t, append([]string{"reconcile", "--format", "json"}, args...)...)
	c.search("output of reconcile", []byte(out+errs))
	var r reconcile.Result
	if err := json.Unmarshal([]byte(out), &r); err != nil || got != code {
		t.Fatalf("reconcile ended with %d, want %d: %v\n%s%s", got, code, err, out, errs)
	}
	return &r
}

func TestReconcileFindsWhoGoesRoundTheGuard(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	m, dir, want := makeMixedTraffic(t, em)
	work := t.TempDir()
	file := func(name, text string) string {
		t.Helper()
		path := filepath.Join(work, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	good := m.canaries.token("token of reconcile", sampleToken(t, em, emulator.AppCompliant))
	old := m.canaries.token("old token of reconcile", em.Mint(emulator.TokenSpec{IssuedAt: time.Now().Add(-4 * time.Hour)}))
	tokenFile := file("token", "Bearer "+good+"\n")
	base := []string{"-c", file("guard.yaml", guardYAML(em, "audit")), "--data-dir", dir, "--delay", "0s"}
	args := append(slices.Clone(base), "--token-file", tokenFile)

	t.Run("every direct caller and no other", func(t *testing.T) {
		r := reconciled(t, m.canaries, exitFindings, args...)
		if diff := cmp.Diff(want, directCallers(r)); diff != "" {
			t.Errorf("direct callers (-want +got):\n%s", diff)
		}
		codes := map[string]int{}
		for _, f := range r.Findings {
			codes[f.Code]++
		}
		// The two users without MFA: one known here, one not.
		if diff := cmp.Diff(map[string]int{reconcile.DirectCalls: 3, reconcile.NonCompliantPrincipal: 1, reconcile.NonCompliantPrincipalNotSeen: 1}, codes); diff != "" {
			t.Errorf("findings (-want +got):\n%s", diff)
		}
		if !r.Complete || r.Requests.Undecided+r.Requests.Outside+r.Requests.ByAttributes > 0 {
			t.Errorf("complete %v, %+v", r.Complete, r.Requests)
		}
		if info, err := os.Stat(filepath.Join(dir, "reconcile.json")); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("the kept result: %v, %v", info, err)
		}
		m.canaries.searchTree("the data directory", dir)
	})

	// The APIs' oddities change nothing.
	for _, tt := range []struct {
		name string
		how  emulator.Security
	}{
		{"bare arrays", emulator.Security{Bare: true}},
		{"adoption as the swagger declares it", emulator.Security{Wrapped: true}},
		{"a byte order mark", emulator.Security{BOM: true}},
		{"names of the property tables, empty correlation ids, no totalCount", emulator.Security{Alternate: true, NoCorrelation: true, NoTotal: true}},
		{"times with a zone", emulator.Security{TimeLayout: "2006-01-02T15:04:05.0000000Z07:00"}},
		{"a clock that is three minutes ahead", emulator.Security{Skew: 3 * time.Minute}},
		{"times of a zone that they do not name", emulator.Security{Skew: -7 * time.Hour}},
		{"rows that stand there twice, in no order", emulator.Security{Duplicates: true, Shuffle: true}},
		{"throttled", emulator.Security{Throttled: 2, RetryAfter: "0"}},
		{"pages, linked without version", emulator.Security{PageSize: 7}},
		{"pages, linked with version", emulator.Security{PageSize: 7, Links: emulator.LinkVersion}},
		{"pages, linked without a slash", emulator.Security{PageSize: 7, Links: emulator.LinkNoSlash}},
		{"pages, linked absolutely, each row twice", emulator.Security{PageSize: 7, Links: emulator.LinkAbsolute, Duplicates: true}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			em.SetSecurity(tt.how)
			r := reconciled(t, m.canaries, exitFindings, args...)
			if diff := cmp.Diff(want, directCallers(r)); diff != "" {
				t.Errorf("direct callers (-want +got):\n%s", diff)
			}
			if !r.Complete {
				t.Errorf("windows %+v", r.Windows)
			}
		})
	}

	t.Run("rows without ids are found by what they are", func(t *testing.T) {
		em.SetSecurity(emulator.Security{NoRequestID: true, TimeLayout: "2006-01-02T15:04:05.000000000"})
		r := reconciled(t, m.canaries, exitFindings, args...)
		// Reconcile's own requests are like any other's then, but for what they read.
		got := slices.DeleteFunc(directCallers(r), func(s string) bool { return strings.HasPrefix(s, "low ") })
		if diff := cmp.Diff(want, got); diff != "" || r.Requests.ByAttributes == 0 || r.Requests.ByAttributes != r.Requests.Listed {
			t.Errorf("direct callers (-want +got), %+v:\n%s", r.Requests, diff)
		}
	})
	t.Run("what is missing is never all clear", func(t *testing.T) {
		for name, how := range map[string]emulator.Security{
			"rows that nobody can read":    {Broken: true},
			"a link to another host":       {PageSize: 7, Links: emulator.LinkForeign},
			"an API that fails":            {Status: map[string]int{"nonMfaCompliantPartnerPrincipals": 404}},
			"an API that the role may not": {Status: map[string]int{"partnerRequests": 403}},
		} {
			em.SetSecurity(how)
			r := reconciled(t, m.canaries, exitFindings, args...)
			if r.Complete || r.Clear || !slices.ContainsFunc(r.Findings, func(f reconcile.Finding) bool { return f.Code == reconcile.WindowIncomplete }) {
				t.Errorf("%s: complete %v, clear %v", name, r.Complete, r.Clear)
			}
		}
	})
	t.Run("a command that gives a fresh token after a 401", func(t *testing.T) {
		em.SetSecurity(emulator.Security{})
		used := filepath.Join(work, "used")
		command := fmt.Sprintf("if [ -e '%s' ]; then echo '{\"accessToken\":\"'$(cat '%s')'\"}'; else touch '%s'; cat '%s'; fi",
			used, file("good", good), used, file("old", old))
		r := reconciled(t, m.canaries, exitFindings, append(slices.Clone(base), "--token-command", command)...)
		if diff := cmp.Diff(want, directCallers(r)); diff != "" {
			t.Errorf("direct callers (-want +got):\n%s", diff)
		}
	})
	t.Run("tokens that are no good are refused and not shown", func(t *testing.T) {
		em.SetSecurity(emulator.Security{})
		for name, tt := range map[string]struct {
			args []string
			want string
			code int
		}{
			"expired":                         {[]string{"--token-file", file("expired", old)}, "ask partnerRequests: 401", exitFailure},
			"app-only":                        {[]string{"--token-file", file("app-only", m.canaries.token("app-only", sampleToken(t, em, emulator.AppOnly)))}, "app+user tokens only", exitFailure},
			"two":                             {[]string{"--token-file", file("two", good+" "+good)}, "does not hold one token", exitUsage},
			"none":                            {nil, "there is no token for Microsoft's records", exitUsage},
			"a command that fails and talks":  {[]string{"--token-command", "cat '" + tokenFile + "' >&2; exit 4"}, "run the token command: exit status 4", exitFailure},
			"a command that prints something": {[]string{"--token-command", "cat '" + tokenFile + "'; echo and more"}, "does not hold one token", exitUsage},
		} {
			out, errs, code := partnerguard(t, append(append([]string{"reconcile"}, base...), tt.args...)...)
			m.canaries.search("output of reconcile, "+name, []byte(out+errs))
			if code != tt.code || !strings.Contains(errs, tt.want) || !strings.Contains(errs, "hint: ") {
				t.Errorf("%s: %d, want %d with %q\n%s%s", name, code, tt.code, tt.want, out, errs)
			}
		}
	})
	t.Run("saved answers, without network", func(t *testing.T) {
		saved := filepath.Join(work, "saved")
		if err := os.Mkdir(saved, 0o700); err != nil {
			t.Fatal(err)
		}
		for i, name := range []string{"partnerRequests", "nonMfaCompliantPartnerPrincipals", "applicationmfaadoptionstatus"} {
			_, body := get(t, em.PartnerURL()+"/v1/"+name, good)
			if err := os.WriteFile(filepath.Join(saved, fmt.Sprint(i, ".json")), body, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		r := reconciled(t, m.canaries, exitFindings, "--from", saved, "--data-dir", dir, "--delay", "0s")
		got := slices.DeleteFunc(directCallers(r), func(s string) bool { return strings.HasPrefix(s, "low ") }) // whoever saved them
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("direct callers (-want +got):\n%s", diff)
		}
	})
	t.Run("10,000 rows hide what was before", func(t *testing.T) {
		flood := make([]emulator.SecurityCall, 10_000)
		for i := range flood {
			flood[i] = emulator.SecurityCall{
				Time: time.Now(), RequestID: fmt.Sprintf("22222222-2222-4222-8222-%012d", i), Operation: "Get /v{version}/invoices", Source: "198.51.100.7",
				ObjectID: "a3c1d5e7-1111-4b2c-8d3e-000000000099", Tenant: emulator.DefaultTenant, UPN: "flood@contoso-partner.example", AppID: strangerApp, Compliant: true,
			}
		}
		em.AddSecurityCalls(flood...)
		// As if it were the first run.
		if err := os.Remove(filepath.Join(dir, "reconcile.json")); err != nil {
			t.Fatal(err)
		}
		r := reconciled(t, m.canaries, exitFindings, args...)
		if w := r.Windows[0]; r.Complete || w.State != reconcile.Incomplete || w.Rows != 10_000 {
			t.Errorf("window %+v", w)
		}
	})
}

func TestReconcileIsClearWhenAllPassesTheGuard(t *testing.T) {
	em := startEmulator(t, emulator.Config{})
	dir := t.TempDir()
	g := startGuard(t, dir, guardYAML(em, "audit"))
	token := sampleToken(t, em, emulator.AppCompliant)
	for range 5 {
		get(t, g.url+"/v1/invoices", token)
	}
	c := &canaries{t, map[string]string{}}
	c.token("token", token)
	cfg := filepath.Join(t.TempDir(), "guard.yaml")
	if err := os.WriteFile(cfg, []byte(guardYAML(em, "audit")), 0o600); err != nil {
		t.Fatal(err)
	}
	awaiting(t, func() (bool, bool) { // the store follows
		r, err := store.OpenReader(dir)
		if err != nil {
			return false, false
		}
		defer r.Close()
		n, err := r.LastFinish(t.Context())
		lag, lagErr := r.Lag(t.Context())
		return true, err == nil && lagErr == nil && n >= 10 && lag == 0
	})
	// Beside the running guard, by the environment.
	t.Setenv("PARTNERGUARD_TOKEN", token)
	t.Setenv("PARTNERGUARD_CONFIG", cfg)
	for range 2 { // the second time reconcile's own requests are there, too
		r := reconciled(t, c, 0, "--data-dir", dir, "--delay", "0s")
		if !r.Clear || r.Requests.Listed != 5 || r.Requests.Direct > 0 {
			t.Errorf("clear %v, %+v, %+v", r.Clear, r.Requests, r.Findings)
		}
	}
	out, _, code := partnerguard(t, "reconcile", "--data-dir", dir, "--delay", "0s")
	if code != 0 || !strings.HasPrefix(out, "Microsoft's records against ours: all clear\n") {
		t.Errorf("%d:\n%s", code, out)
	}
	g.stop()
}
