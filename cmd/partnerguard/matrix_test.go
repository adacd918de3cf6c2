package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/partnerguard/partnerguard/internal/emulator"
	"github.com/partnerguard/partnerguard/policy"
)

// reasonCase makes calls that get a Reason.
type reasonCase struct {
	reason  policy.Reason
	request func(url string) *http.Request
	status  int  // of the refusal
	always  bool // refused in every mode
	good    bool
}

func bearer(token string) func(string) *http.Request {
	return func(url string) *http.Request {
		r, _ := http.NewRequest(http.MethodGet, url+"/v1/invoices?size=1&sig=secret", nil)
		r.Header.Set("Authorization", "Bearer "+token)
		return r
	}
}

// tokenCases has a token for every Reason that a token can have.
func tokenCases(em *emulator.Emulator) []reasonCase {
	now := time.Now()
	mint := func(spec emulator.TokenSpec) func(string) *http.Request { return bearer(em.Mint(spec)) }
	refused := func(reason policy.Reason, request func(string) *http.Request) reasonCase {
		return reasonCase{reason: reason, request: request, status: 401}
	}
	return []reasonCase{
		{reason: policy.ReasonMFAPresent, request: mint(emulator.TokenSpec{}), good: true},
		{reason: policy.ReasonAppOnly, request: mint(emulator.TokenSpec{AppOnly: true}), good: true},
		refused(policy.ReasonMFAMissing, mint(emulator.TokenSpec{AMR: []string{"pwd"}})),
		refused(policy.ReasonMFAUnknown, mint(emulator.TokenSpec{AMR: "mfa"})),
		refused(policy.ReasonTokenMissing, func(url string) *http.Request {
			r, _ := http.NewRequest(http.MethodGet, url+"/v1/invoices", nil)
			return r
		}),
		refused(policy.ReasonTokenMalformed, mint(emulator.TokenSpec{RawPayload: []byte(`{"aud":`)})),
		refused(policy.ReasonTokenTooLong, bearer(strings.Repeat("a", 17<<10))),
		refused(policy.ReasonTokenMissingKid, mint(emulator.TokenSpec{Header: map[string]any{"kid": nil}})),
		refused(policy.ReasonTokenCriticalHeader, mint(emulator.TokenSpec{Header: map[string]any{"crit": []string{"exp"}}})),
		refused(policy.ReasonTokenDuplicateClaim, mint(emulator.TokenSpec{Extra: map[string]any{"AMR": []string{"mfa"}}})),
		refused(policy.ReasonTokenUnsupportedAlgorithm, mint(emulator.TokenSpec{Alg: "none"})),
		refused(policy.ReasonTokenExpired, mint(emulator.TokenSpec{IssuedAt: now.Add(-3 * time.Hour)})),
		refused(policy.ReasonTokenNotYetValid, mint(emulator.TokenSpec{NotBefore: now.Add(time.Hour), IssuedAt: now, Expires: now.Add(2 * time.Hour)})),
		refused(policy.ReasonTokenWrongAudience, mint(emulator.TokenSpec{Audience: "https://graph.windows.net"})),
		refused(policy.ReasonTokenWrongIssuer, mint(emulator.TokenSpec{Issuer: "https://sts.evil.example/" + emulator.DefaultTenant + "/"})),
		refused(policy.ReasonTokenWrongTenant, mint(emulator.TokenSpec{Tenant: "99999999-0a1b-4c2d-8e3f-901234567890"})),
		refused(policy.ReasonTokenBadSignature, mint(emulator.TokenSpec{BadSignature: true})),
		refused(policy.ReasonTokenUnknownKey, mint(emulator.TokenSpec{Key: emulator.KeyForeign})),
		refused(policy.ReasonTokenOpaque, mint(emulator.TokenSpec{Opaque: true})),
		refused(policy.ReasonTokenEncrypted, mint(emulator.TokenSpec{Encrypted: true})),
		refused(policy.ReasonTokenGraphNonce, mint(emulator.TokenSpec{HashedNonce: true, BadSignature: true})),
	}
}

// requestCases are refused in every mode, whatever the token.
func requestCases(em *emulator.Emulator) []reasonCase {
	token := em.Mint(emulator.TokenSpec{})
	with := func(method, target string, headers ...string) func(string) *http.Request {
		return func(url string) *http.Request {
			r, _ := http.NewRequest(method, url, nil)
			r.URL.Opaque = target
			r.Header.Set("Authorization", "Bearer "+token)
			for _, h := range headers {
				r.Header.Add("Authorization", h)
			}
			return r
		}
	}
	return []reasonCase{
		{policy.ReasonRequestAmbiguous, with("GET", "/v1/customers/../invoices"), 400, true, false},
		{policy.ReasonRequestAmbiguous, with("GET", "/v1/invoices", "Bearer "+token), 400, true, false},
		{policy.ReasonMethodRefused, with("TRACE", "/v1/invoices"), 405, true, false},
		{policy.ReasonIntegrationUnknown, with("GET", "/i/nobody/v1/invoices"), 404, true, false},
	}
}

func TestEveryReasonInEveryMode(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	for _, mode := range []string{"audit", "tag", "enforce"} {
		t.Run(mode, func(t *testing.T) {
			dir := t.TempDir()
			g := startGuard(t, dir, guardYAML(em, mode))
			type expected struct {
				reasonCase
				effect string
				status int
			}
			want := map[string]expected{}
			order := []string{}
			for _, c := range append(tokenCases(em), requestCases(em)...) {
				effect := "allow"
				switch {
				case c.always:
					effect = "reject"
				case c.good || mode == "audit":
				case mode == "tag":
					effect = "tag"
				default:
					effect = "reject"
				}
				em.Reset()
				res, body := do(t, c.request(g.url))
				id := res.Header.Get("Partnerguard-Call")
				want[id] = expected{c, effect, res.StatusCode}
				order = append(order, id)
				name := fmt.Sprintf("%s (%s)", c.reason, effect)
				if got := res.Header.Get("Partnerguard-Reason"); got != string(c.reason) {
					t.Errorf("%s: Partnerguard-Reason %q", name, got)
				}
				if got := res.Header.Get("Partnerguard-Effect"); got != effect {
					t.Errorf("%s: Partnerguard-Effect %q", name, got)
				}
				if res.Header.Get("Partnerguard-Integration") == "" || res.Header.Get("Partnerguard-Mfa") == "" {
					t.Errorf("%s: headers %v", name, res.Header)
				}
				reached := em.Requests()
				if effect == "reject" {
					var refusal struct {
						Code, Description, Source string
						Data                      []string
					}
					if err := json.Unmarshal(body, &refusal); err != nil || refusal.Source != "partnerguard" || refusal.Description == "" ||
						len(refusal.Data) != 3 || refusal.Data[0] != "reason: "+string(c.reason) || refusal.Data[2] != "call: "+id {
						t.Errorf("%s: body %s", name, body)
					}
					if wantCode := map[bool]string{true: "900421", false: string(c.reason)}[c.reason == policy.ReasonMFAMissing]; refusal.Code != wantCode {
						t.Errorf("%s: code %q, want %q", name, refusal.Code, wantCode)
					}
					if res.StatusCode != c.status {
						t.Errorf("%s: status %d, want %d", name, res.StatusCode, c.status)
					}
					if res.Header.Get("MS-RequestId") == "" || res.Header.Get("MS-CorrelationId") == "" {
						t.Errorf("%s: the refusal has no ids", name)
					}
					if len(reached) != 0 {
						t.Errorf("%s: %d calls reached the upstream, want none", name, len(reached))
					}
					continue
				}
				if len(reached) != 1 {
					t.Errorf("%s: %d calls reached the upstream, want one", name, len(reached))
					continue
				}
				marked := reached[0].Header.Get("Partnerguard-Reason")
				if wantMark := map[string]string{"tag": string(c.reason)}[effect]; marked != wantMark {
					t.Errorf("%s: upstream saw Partnerguard-Reason %q, want %q", name, marked, wantMark)
				}
				if reached[0].Header.Get("MS-RequestId") == "" {
					t.Errorf("%s: upstream saw no MS-RequestId", name)
				}
			}
			g.stop()

			decisions, outcomes := map[string]line{}, map[string]line{}
			for _, l := range ledgerLines(t, dir) {
				m := decisions
				if l.Type == "outcome" {
					m = outcomes
				}
				if _, twice := m[l.Call]; twice {
					t.Errorf("two %s lines of call %s", l.Type, l.Call)
				}
				m[l.Call] = l
			}
			stored := storedCalls(t, dir)
			if len(decisions) != len(order) || len(outcomes) != len(order) || len(stored) != len(order) {
				t.Errorf("%d decisions, %d outcomes, %d rows for %d calls", len(decisions), len(outcomes), len(stored), len(order))
			}
			for _, id := range order {
				w, d, o, s := want[id], decisions[id], outcomes[id], stored[id]
				if d.Reason != string(w.reason) || d.Effect != w.effect || d.Mode != mode || d.WouldReject == w.good {
					t.Errorf("%s: decision %+v", w.reason, d)
				}
				if o.Status != w.status {
					t.Errorf("%s: outcome status %d, the client got %d", w.reason, o.Status, w.status)
				}
				if s.Reason != string(w.reason) || s.Effect != w.effect || s.Mode != mode || s.Status != int64(w.status) || s.WouldReject == w.good {
					t.Errorf("%s: row %+v", w.reason, s)
				}
			}
		})
	}
}

// What the guard itself cannot do is no fault of the caller's: audit and tag let
// the call pass, enforce answers 503.
func TestReasonsOfTheGuardItself(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	token := em.Mint(emulator.TokenSpec{})
	for _, row := range []struct {
		name, mode, more string
		keysDown         bool
		reason, effect   string
		status           int
		recorded         bool
	}{
		{"no keys in audit", "audit", "", true, "keys_unavailable", "allow", 200, true},
		{"no keys in tag", "tag", "", true, "keys_unavailable", "tag", 200, true},
		{"no keys in enforce", "enforce", "", true, "keys_unavailable", "reject", 503, true},
		{"ledger full, forward", "enforce", "ledger: {min_free: 900000000GiB}", false, "mfa_present", "allow", 200, false},
		{"ledger full, reject", "audit", "ledger: {min_free: 900000000GiB, on_failure: reject}", false, "ledger_unavailable", "reject", 503, false},
	} {
		t.Run(row.name, func(t *testing.T) {
			em.Reset()
			if row.keysDown {
				em.SetKeysMode(emulator.KeysDown)
				defer em.SetKeysMode(emulator.KeysOK)
			}
			dir := t.TempDir()
			g := startGuard(t, dir, guardYAML(em, row.mode, row.more))
			res, body := get(t, g.url+"/v1/invoices", token)
			if res.StatusCode != row.status || res.Header.Get("Partnerguard-Reason") != row.reason || res.Header.Get("Partnerguard-Effect") != row.effect {
				t.Errorf("%d %s %s, want %d %s %s: %s", res.StatusCode, res.Header.Get("Partnerguard-Reason"), res.Header.Get("Partnerguard-Effect"),
					row.status, row.reason, row.effect, body)
			}
			if row.status == 503 && res.Header.Get("Retry-After") == "" {
				t.Error("503 without Retry-After")
			}
			ready, why := get(t, g.admin+"/readyz?verbose", "")
			if wantReady := row.status != 503; (ready.StatusCode == 200) != wantReady {
				t.Errorf("/readyz is %d, want ready %v:\n%s", ready.StatusCode, wantReady, why)
			}
			g.stop()
			if n := len(ledgerLines(t, dir)); (n == 2) != row.recorded {
				t.Errorf("%d ledger lines, recorded should be %v", n, row.recorded)
			}
			if !row.recorded && row.status == 200 && !strings.Contains(g.text(), `"level":"ERROR","msg":"call","call":"`+res.Header.Get("Partnerguard-Call")) {
				t.Errorf("the unrecorded call is not in the log as an error:\n%s", g.text())
			}
		})
	}
}

func TestUpstreamFailuresAreAnsweredInMicrosoftsShape(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	token := em.Mint(emulator.TokenSpec{})
	g := startGuard(t, t.TempDir(), guardYAML(em, "enforce", "timeouts: {response_header: 300ms}"))
	check := func(name string, res *http.Response, body []byte, status int, reason string) {
		t.Helper()
		if res.StatusCode != status || res.Header.Get("Partnerguard-Reason") != reason || !strings.Contains(string(body), `"source":"partnerguard"`) {
			t.Errorf("%s: %d %s, want %d %s: %s", name, res.StatusCode, res.Header.Get("Partnerguard-Reason"), status, reason, body)
		}
	}
	res, body := get(t, g.url+"/v1/invoices", token, "Emulate: stall=5s")
	check("slow", res, body, 504, "upstream_timeout")
	res, body = get(t, g.url+"/v1/invoices", token, "Emulate: reset")
	check("reset", res, body, 502, "upstream_unreachable")
	for range 40 {
		res, body = get(t, g.url+"/v1/invoices", token, "Emulate: status=503")
		if res.Header.Get("Partnerguard-Reason") == "upstream_circuit_open" {
			break
		}
	}
	check("open breaker", res, body, 503, "upstream_circuit_open")
}

func TestTheGuardRefusesToCallItself(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	// The upstream's own name, made to point at the guard as a hosts file does.
	l := freePort(t)
	yaml := strings.Replace(guardYAML(em, "audit"), `listeners: [{address: "127.0.0.1:0"}]`, fmt.Sprintf("listeners: [{address: %q}]", l), 1)
	yaml = strings.Replace(yaml, "partner-center: {url:", fmt.Sprintf("partner-center: {dial: %q, url:", l), 1)
	file := filepath.Join(t.TempDir(), "guard.yaml")
	if err := os.WriteFile(file, []byte(yaml), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, stderr, code := partnerguard(t, "check", "-c", file); code == 0 {
		g := startGuard(t, t.TempDir(), yaml)
		res, body := get(t, g.url+"/v1/invoices", em.Mint(emulator.TokenSpec{}))
		if res.StatusCode != 502 || !strings.Contains(string(body), "would call itself") {
			t.Errorf("%d %s, want 502 that says why", res.StatusCode, body)
		}
	} else {
		t.Logf("refused at the start already: %s", stderr)
	}
}
