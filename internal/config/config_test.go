package config

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io/fs"
	"math/big"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/partnerguard/partnerguard/policy"
)

var equatePrefix = cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })

// TestBadFiles loads every testdata/bad/*.yaml and compares the error with the
// .txt beside it. UPDATE=1 rewrites these.
func TestBadFiles(t *testing.T) {
	files := glob(t, "testdata/bad/*.yaml")
	t.Chdir("testdata/bad")
	for _, file := range files {
		name := filepath.Base(file)
		t.Run(name, func(t *testing.T) {
			c, err := Load(name)
			var bad *Error
			if !errors.As(err, &bad) || c != nil {
				t.Fatalf("Load = %v, %v, want only an *Error", c, err)
			}
			golden := strings.TrimSuffix(name, ".yaml") + ".txt"
			got := err.Error() + "\n"
			if os.Getenv("UPDATE") != "" {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), got); diff != "" {
				t.Errorf("error (-want +got):\n%s", diff)
			}
			for i, p := range bad.Problems {
				if p.File != name || p.Line < 1 || p.Column < 1 {
					t.Errorf("problem without a place: %+v", p)
				}
				if i > 0 && p.Line < bad.Problems[i-1].Line {
					t.Errorf("problem %d of line %d stands after line %d", i, p.Line, bad.Problems[i-1].Line)
				}
			}
		})
	}
}

func TestGoodFilesAndExamplesLoad(t *testing.T) {
	files := append(glob(t, "testdata/good/*.yaml"), glob(t, "../../examples/*.yaml")...)
	files = append(files, glob(t, "../../examples/*/*.yaml")...)
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			c, err := Load(withFiles(t, file))
			if err != nil {
				t.Fatal(err)
			}
			if err := c.Validate(); err != nil {
				t.Errorf("Validate after Load: %v", err)
			}
			if _, err := c.Policy(); err != nil {
				t.Errorf("Policy: %v", err)
			}
		})
	}
}

// withFiles copies a configuration into a directory of its own, writes the files
// that it names beside it, and returns its new path.
func withFiles(t *testing.T, file string) string {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	path := filepath.Join(dir, filepath.Base(file))
	c, err := Parse(path, data)
	if err != nil {
		t.Fatal(err)
	}
	certificate, key := selfSigned(t)
	for _, name := range c.Files() {
		content := []byte("c2VjcmV0\n")
		switch filepath.Ext(name) {
		case ".pem":
			content = certificate
		case ".key":
			content = key
		case ".crl":
			content = revocationList(t)
		}
		write(t, dir, filepath.Base(name), content)
	}
	write(t, dir, filepath.Base(file), data)
	return path
}

func TestFullExampleNamesEveryKeyAndStatesTheDefaults(t *testing.T) {
	text, err := os.ReadFile("../../examples/full.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range keys(reflect.TypeFor[Config]()) {
		if !regexp.MustCompile(`(?m)^[ #-]*` + key + `:`).Match(text) {
			t.Errorf("examples/full.yaml does not show the key %s", key)
		}
	}
	c, err := Parse("full.yaml", text)
	if err != nil {
		t.Fatal(err)
	}
	want := Default()
	want.Tenants, want.Listeners, want.Integrations, want.Rules = c.Tenants, c.Listeners, c.Integrations, c.Rules
	if diff := cmp.Diff(want, c, equatePrefix); diff != "" {
		t.Errorf("examples/full.yaml and the defaults differ (-default +file):\n%s", diff)
	}
}

// keys returns the YAML keys of t and of the types in it.
func keys(t reflect.Type) []string {
	var all []string
	switch t.Kind() {
	case reflect.Pointer, reflect.Slice, reflect.Map:
		return keys(t.Elem())
	case reflect.Struct:
		for i := range t.NumField() {
			if key := t.Field(i).Tag.Get("yaml"); key != "" {
				all = append(append(all, key), keys(t.Field(i).Type)...)
			}
		}
	}
	return all
}

func TestDefaultIsValidAndWhatAFileWithOnlyAVersionMeans(t *testing.T) {
	if err := Default().Validate(); err != nil {
		t.Errorf("Default().Validate() = %v", err)
	}
	c, err := Parse("guard.yaml", []byte("version: 1\n"))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(Default(), c); diff != "" {
		t.Errorf("(-Default +Parse):\n%s", diff)
	}
	if c.Mode != policy.Audit || c.Listeners[0].Address != "127.0.0.1:8080" || c.Admin.Address != "127.0.0.1:9090" || len(c.Tenants) != 0 {
		t.Errorf("Default() = %+v", c)
	}
}

func TestEveryKeyIsRead(t *testing.T) {
	path := withFiles(t, "testdata/good/every-key.yaml")
	got, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	file := func(name string) string { return filepath.Join(filepath.Dir(path), name) }
	zero, twenty := 0, 20
	want := &Config{
		Version:  1,
		Instance: "Guard_1.contoso-fleet",
		Cloud:    "china",
		Tenants:  []string{"1b2c3d4e-0a1b-4c2d-8e3f-901234567890"},
		Mode:     policy.TagMode,
		Listeners: []Listener{
			{Name: "plain", Address: "0.0.0.0:8000", Integration: "one", Upstream: Graph, InsecureClearText: true},
			{Address: "[::1]:8001", Upstream: PartnerCenter},
			{
				Name: "lan", Address: ":8443", Upstream: PartnerCenter,
				TLS: &TLS{Certificate: file("guard.pem"), Key: file("guard.key")}, ClientCA: file("clients.pem"), ClientCRL: file("clients.crl"),
			},
			{Name: "world", Address: ":443", Upstream: PartnerCenter, TLS: &TLS{ACME: []string{"guard.contoso.example"}}},
		},
		ACME: ACME{
			Email: "ops@contoso.example", Directory: "https://localhost:14000/dir", Root: file("acme.pem"),
			EAB: &EAB{KeyID: "kid-1", MACKey: Secret("file:" + file("eab"))}, Challenges: []string{TLSALPN01}, HTTPPort: 8088, TLSALPNPort: 443,
			Storage: StoragePostgres, StorageKey: "env:ACME_STORAGE_KEY",
		},
		Store: Store{Postgres: "env:GUARD_STORE"},
		Integrations: []Integration{
			{
				Name: "one", Owner: "team@contoso.example", Contact: "oncall@contoso.example", Mode: policy.Enforce,
				MaxCalls: &twenty,
				Match: Match{
					AppID:       []string{"7d1f0a52-9b3c-4c1e-8f60-2a5b9c0d1e11"},
					User:        []string{"svc@contoso.example"},
					ClientCert:  []string{"spiffe://contoso/one", "one.contoso.example"},
					Listener:    []string{"plain", "[::1]:8001", "lan"},
					Source:      []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16"), netip.MustParsePrefix("10.2.3.4/32"), netip.MustParsePrefix("2001:db8::/32")},
					Host:        []string{"pc.contoso.example"},
					PathPrefix:  []string{"/v1/invoices"},
					Application: []string{"12"},
					UserAgent:   []string{"on"},
				},
			},
			{Name: "two", MaxCalls: &zero},
		},
		Rules: []Rule{{
			Name: "r", Integrations: []string{"one", "unknown"}, Tenants: []string{"1b2c3d4e-0a1b-4c2d-8e3f-901234567890"},
			Methods: []string{"GET"}, Routes: []string{"/v1/invoices/**"}, Mode: policy.Audit, Percent: &zero,
			From:  time.Date(2026, 12, 1, 0, 0, 0, 0, time.UTC),
			Until: time.Date(2026, 12, 2, 10, 0, 0, 0, time.UTC),
			Owner: "o", Note: "several\nlines\n",
		}},
		Entra: Entra{
			Authority: "https://keys.contoso.example", CA: file("entra.pem"), Leeway: 0, MaxStale: 36 * time.Hour,
			MFAValues: []string{"wiaormfa"}, OnUnverifiable: policy.RejectUnverifiable,
		},
		Upstreams: map[string]Upstream{
			PartnerCenter: {
				URL: "http://localhost:9443", Dial: "127.0.0.1:9444", HTTP2: true, CA: file("upstream.pem"),
				Audiences: []string{"https://a.example"}, Hosts: []string{"pc.contoso.example", "pc"},
			},
			Graph: {
				URL:       "https://microsoftgraph.chinacloudapi.cn",
				Audiences: []string{"https://microsoftgraph.chinacloudapi.cn", "https://microsoftgraph.chinacloudapi.cn/", "00000003-0000-0000-c000-000000000000"},

				RewriteLinks: true,
			},
		},
		Limits: Limits{Connections: 7, Calls: 8, Headers: 32 << 10},
		Timeouts: Timeouts{
			Dial: time.Second, TLS: 2 * time.Second, ResponseHeader: 3 * time.Minute, Idle: 4 * time.Hour, Drain: 0,
			ReadHeader: 5 * time.Second, KeepAlive: 6 * time.Second, Body: 7 * time.Second,
		},
		ValidateMFA: ValidateOff,
		Ledger: Ledger{Retention: 365 * day, OnFailure: RejectOnFailure, FSync: FSyncAlways, Identities: PseudonymousIdentities, MinFree: 500e6,
			Tenants: map[string]time.Duration{"1b2c3d4e-0a1b-4c2d-8e3f-901234567890": 90 * day}, MaxBytes: 20 << 30, Key: file("ledger.pem")},
		Reconcile: Reconcile{Every: 6 * time.Hour, Token: Secret("file:" + file("reconcile.token"))},
		Admin: Admin{
			Address: "localhost:9999", Token: "env:PARTNERGUARD_ADMIN_TOKEN", TLS: &TLS{Certificate: file("guard.pem"), Key: file("guard.key")},
			ClientCA: file("clients.pem"), Hosts: []string{"guard.contoso.example", "2001:db8::1"},
		},
	}
	compareTime := cmp.Comparer(time.Time.Equal)
	if diff := cmp.Diff(want, got, equatePrefix, compareTime); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestAnchorsAndMergeKeysStandForWhatTheyName(t *testing.T) {
	c, err := Load("testdata/good/anchors.yaml")
	if err != nil {
		t.Fatal(err)
	}
	a, b := c.Integrations[0], c.Integrations[1]
	if b.Owner != a.Owner || b.Contact != a.Contact || b.Name != "second" || b.Mode != policy.Audit {
		t.Errorf("merged integration = %+v", b)
	}
	if diff := cmp.Diff(a.Match.AppID, c.Integrations[2].Match.AppID); diff != "" {
		t.Errorf("aliased app_id:\n%s", diff)
	}
}

func TestByteOrderMarkAndCarriageReturnsAreAccepted(t *testing.T) {
	c, err := Parse("guard.yaml", []byte("\ufeffversion: 1\r\nmode: audit\r\nvalidate_mfa: off\r\n"))
	if err != nil {
		t.Fatal(err)
	}
	if c.ValidateMFA != ValidateOff {
		t.Errorf("ValidateMFA = %q, want off", c.ValidateMFA)
	}
}

func TestValidateNamesKeysWithoutAFile(t *testing.T) {
	c, err := Parse("guard.yaml", []byte("version: 1\n"))
	if err != nil {
		t.Fatal(err)
	}
	c.Mode = policy.Enforce
	c.Listeners[0].Address = "127.0.0.1:9090"
	want := `listeners[0].address: 127.0.0.1:9090 is taken by admin.address; write another port for one of them
tenants: is required as soon as any mode is tag or enforce, also in the future; list the partner tenants whose tokens are accepted`
	if err := c.Validate(); err == nil || err.Error() != want {
		t.Errorf("Validate = %v, want\n%s", err, want)
	}
}

func TestTheZeroConfigIsAnErrorNotAPanic(t *testing.T) {
	if err := new(Config).Validate(); err == nil {
		t.Error("Validate of the zero Config succeeded")
	}
}

func TestLoadOfAMissingFile(t *testing.T) {
	_, err := Load(filepath.Join(t.TempDir(), "none.yaml"))
	if !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "none.yaml") {
		t.Errorf("Load = %v", err)
	}
}

func TestAURLWithAPasswordIsNotRepeated(t *testing.T) {
	_, err := Parse("guard.yaml", []byte("version: 1\nentra: {authority: 'https://u:hunter2@a.example'}\nupstreams: {partner-center: {url: 'https://u:hunter2@%zz'}}\n"))
	if err == nil || strings.Contains(err.Error(), "hunter2") {
		t.Errorf("Parse = %v", err)
	}
}

func TestParseOpensNoFile(t *testing.T) {
	_, err := Parse("guard.yaml", []byte("version: 1\nupstreams: {partner-center: {ca: /does/not/exist.pem}}\n"))
	if err != nil {
		t.Errorf("Parse = %v", err)
	}
}

func TestListenersThatCollide(t *testing.T) {
	for _, tt := range []struct {
		a, b string
		want bool
	}{
		{"127.0.0.1:80", "127.0.0.1:80", true},
		{"127.0.0.1:80", "127.0.0.1:81", false},
		{"127.0.0.1:0", "127.0.0.1:0", false},
		{"127.0.0.1:80", "127.0.0.2:80", false},
		{"127.0.0.1:80", "localhost:80", true},
		{"[::1]:80", "localhost:80", true},
		{":80", "127.0.0.1:80", true},
		{"0.0.0.0:80", "192.0.2.1:80", true},
		{"Guard.example:80", "guard.example:80", true},
		{"[::ffff:127.0.0.1]:80", "127.0.0.1:80", true},
	} {
		a, errA := parseAddress(tt.a)
		b, errB := parseAddress(tt.b)
		if errA != nil || errB != nil {
			t.Fatal(errA, errB)
		}
		if got := a.overlaps(b); got != tt.want {
			t.Errorf("%s overlaps %s = %v, want %v", tt.a, tt.b, got, tt.want)
		}
		if got := b.overlaps(a); got != tt.want {
			t.Errorf("%s overlaps %s = %v, want %v", tt.b, tt.a, got, tt.want)
		}
	}
}

func TestDurations(t *testing.T) {
	for in, want := range map[string]time.Duration{
		"0": 0, "0s": 0, "90s": 90 * time.Second, "30d": 30 * day, "1d12h": 36 * time.Hour,
		"1d1h1m1s": 25*time.Hour + 61*time.Second, "-5m": -5 * time.Minute, "-1d12h": -36 * time.Hour, "1.5h": 90 * time.Minute,
	} {
		if got, err := ParseDuration(in); err != nil || got != want {
			t.Errorf("ParseDuration(%q) = %v, %v, want %v", in, got, err, want)
		}
	}
	for _, in := range []string{"", "-", "d", "5", "1.5d", "1d-2h", "1d+2h", "12h1d", "1dd", "99999d", "65535d2000000h", "--5m", "5 m", "∞"} {
		if got, err := ParseDuration(in); err == nil {
			t.Errorf("ParseDuration(%q) = %v, want an error", in, got)
		}
	}
}

func TestSizes(t *testing.T) {
	for in, want := range map[string]Size{
		"0": 0, "1B": 1, "2KB": 2000, "2KiB": 2048, "3MB": 3e6, "3MiB": 3 << 20, "4GB": 4e9, "1GiB": 1 << 30, "1 GiB": 1 << 30,
	} {
		if got, err := parseSize(in); err != nil || got != want {
			t.Errorf("parseSize(%q) = %v, %v, want %v", in, got, err, want)
		}
	}
	for _, in := range []string{"", "1", "GiB", "1gib", "1.5GiB", "-1GiB", "1TiB", "9999999999999GiB", "99999999999999999999B"} {
		if got, err := parseSize(in); err == nil {
			t.Errorf("parseSize(%q) = %v, want an error", in, got)
		}
	}
}

func TestRisks(t *testing.T) {
	now := time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)
	const tenants = "version: 1\ntenants: 1b2c3d4e-0a1b-4c2d-8e3f-901234567890\nledger: {fsync: always, on_failure: reject}\n"
	weak := func(mode, match string) string {
		return tenants + "integrations: [{name: a, mode: " + mode + ", match: {" + match + "}}]\n"
	}
	for _, tt := range []struct {
		name, yaml string
		want       []string // one substring for each sentence
	}{
		{"the default", "version: 1\n", []string{"tenants is empty", "ledger.fsync is 1s"}},
		{"nothing", tenants, nil},
		{"enforce with a ledger that may fail", "version: 1\nmode: enforce\ntenants: 1b2c3d4e-0a1b-4c2d-8e3f-901234567890\nledger: {fsync: always}\n", []string{"ledger.on_failure is forward"}},
		{"clear text on the network", tenants + "listeners: [{address: ':80', insecure_clear_text: true}]\n", []string{"listeners[0] (:80) takes bearer tokens in clear text"}},
		{"clear text on loopback", tenants + "listeners: [{address: '127.0.0.1:80', insecure_clear_text: true}]\n", nil},
		{"unverifiable tokens pass enforcement", tenants + "mode: enforce\nentra: {on_unverifiable: forward}\n", []string{"entra.on_unverifiable is forward"}},
		{"unverifiable tokens pass audit", tenants + "entra: {on_unverifiable: forward}\n", nil},
		{"another authority", tenants + "entra: {authority: 'https://keys.example'}\n", []string{"entra.authority is https://keys.example"}},
		{"rules of the future and the past", tenants + "rules: [{name: f, mode: audit, from: 2026-12-01}, {name: p, mode: audit, until: 2026-10-01}, {name: now, mode: audit, from: 2026-11-01, until: 2026-12-01}]\n",
			[]string{`rule "f" begins 2026-12-01T00:00:00Z`, `rule "p" ended 2026-10-01T00:00:00Z`}},
		{"Microsoft's verdict is not asked for", tenants + "validate_mfa: off\n", []string{"validate_mfa is off"}},
		{"enforced by weak evidence", weak("enforce", "user_agent: x"), []string{`integration "a" is in mode enforce but known only by weak evidence (user_agent)`}},
		{"enforced by the path alone", weak("tag", ""), []string{"(the path /i/{name}/)"}},
		{"enforced by a Microsoft application", weak("tag", "app_id: 04B07795-8ddb-461a-bbee-02f9e1bf7b46"), []string{"(app_id of a Microsoft application)"}},
		{"enforced by strong evidence", weak("enforce", "user_agent: x, source: 10.0.0.1"), nil},
		{"enforced by its own listener", weak("enforce", "") + "listeners: [{address: '127.0.0.1:80', integration: a}]\n", nil},
		{"enforced by a rule, known by weak evidence", weak("audit", "host: x") + "rules: [{name: r, mode: enforce, integrations: a}]\n", []string{"is in mode enforce but known only by weak evidence (host)"}},
		{"audited by weak evidence where all is enforced", weak("audit", "host: x") + "mode: enforce\n", []string{`asks for mode audit but is known only by weak evidence (host), which loosens nothing: enforce holds`}},
		{"enforced by a client certificate", weak("enforce", "user_agent: x, client_cert: a") + "listeners: [{address: '127.0.0.1:443', tls: {acme: a.contoso.example}, client_ca: ca.pem, client_crl: ca.crl}]\n", nil},
		{"client certificates that cannot be revoked", tenants + "listeners: [{name: lan, address: ':443', tls: {acme: a.contoso.example}, client_ca: ca.pem}]\n", []string{"listeners[0] (lan) has no client_crl"}},
		{"no limit of connections", tenants + "limits: {connections: 0}\n", []string{"limits.connections is 0"}},
		{"a limit of calls", tenants + "limits: {calls: 5}\nintegrations: [{name: a, max_calls: 7}, {name: b, max_calls: 0}]\n", []string{"limits.calls is 5", `max_calls of integration "a" is 7`}},
		{"a trial certificate", tenants + "acme: {directory: 'https://acme-staging-v02.api.letsencrypt.org/directory'}\n", []string{"acme.directory is Let's Encrypt's staging"}},
		{"another ACME authority", tenants + "acme: {directory: 'https://ca.contoso.example/acme'}\n", nil},
		{"another CA for keys", tenants + "entra: {ca: proxy.pem}\n", []string{"entra.ca is trusted for Entra's keys"}},
		{"links that lead past the guard", tenants + "upstreams: {partner-center: {rewrite_links: false}, partner-api: {rewrite_links: false}, graph: {}}\n", []string{"upstreams.partner-api.rewrite_links is false"}},
		{"records in clear text", tenants + "admin: {address: ':9090', token: env:TOKEN, insecure_clear_text: true}\n", []string{"admin.insecure_clear_text: whoever sees the traffic of :9090"}},
		{"admin in clear text on loopback", tenants + "admin: {token: env:TOKEN, insecure_clear_text: true}\n", nil},
		{"records for every certificate", tenants + "admin: {tls: {certificate: a.pem, key: a.key}, client_ca: ca.pem}\n", []string{"admin.client_ca: every client certificate of these CAs"}},
		{"weak, but no stricter than all", weak("enforce", "host: x") + "mode: enforce\n", nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, err := Parse("guard.yaml", []byte(tt.yaml))
			if err != nil {
				t.Fatal(err)
			}
			got := c.Risks(now)
			if len(got) != len(tt.want) {
				t.Fatalf("Risks = %q, want %d", got, len(tt.want))
			}
			for i := range got {
				if !strings.Contains(got[i], tt.want[i]) {
					t.Errorf("Risks[%d] = %q, want %q in it", i, got[i], tt.want[i])
				}
			}
		})
	}
}

func TestHostileFilesAreRefusedQuickly(t *testing.T) {
	for name, text := range map[string]string{
		"brackets":        "version: 1\ntenants: " + strings.Repeat("[", 100_000),
		"braces":          "version: 1\nentra: " + strings.Repeat("{a: ", 100_000),
		"dashes":          strings.Repeat("- ", 100_000),
		"question marks":  strings.Repeat("? ", 100_000),
		"merging itself":  "version: 1\nentra: &e\n  <<: *e\n",
		"merging doubles": "version: 1\nentra: &e\n  <<: [*e, *e]\n",
		"size":            "version: 1\n" + strings.Repeat("# comment\n", 200_000),
	} {
		t.Run(name, func(t *testing.T) {
			if c, err := Parse("guard.yaml", []byte(text)); err == nil {
				t.Errorf("Parse = %+v, want an error", c)
			} else if len(err.Error()) > 10_000 {
				t.Errorf("the error has %d bytes", len(err.Error()))
			}
		})
	}
}

// FuzzParse: never a panic, never both a configuration and an error, and what is
// accepted is valid, does not differ from itself, and gives a secret only by
// reference.
func FuzzParse(f *testing.F) {
	for _, pattern := range []string{"testdata/bad/*.yaml", "testdata/good/*.yaml", "../../examples/*.yaml"} {
		for _, file := range glob(f, pattern) {
			data, err := os.ReadFile(file)
			if err != nil {
				f.Fatal(err)
			}
			f.Add(data)
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := Parse("guard.yaml", data)
		if (c == nil) == (err == nil) {
			t.Fatalf("Parse = %v, %v", c, err)
		}
		if err != nil {
			var bad *Error
			if !errors.As(err, &bad) {
				t.Fatalf("Parse error is a %T", err)
			}
			for _, p := range bad.Problems {
				if p.Line < 1 || p.Column < 1 || p.Message == "" {
					t.Errorf("problem without place or message: %+v", p)
				}
			}
			return
		}
		var again []Problem
		c.check(func(path, message, hint string) { again = append(again, Problem{Path: path, Message: message}) })
		if len(again) > 0 {
			t.Errorf("accepted, but: %v", again)
		}
		if _, err := c.Policy(); err != nil {
			t.Errorf("accepted, but Policy: %v", err)
		}
		if changes := Changes(c, c); len(changes) > 0 {
			t.Errorf("differs from itself: %v", changes)
		}
		Changes(Default(), c)
		for _, s := range secrets(c) {
			if s != "" && !strings.HasPrefix(string(s), "file:") && !strings.HasPrefix(string(s), "env:") {
				t.Errorf("accepted the literal secret %q", s)
			}
		}
		c.Files()
		c.Hosts()
		c.Risks(time.Time{})
	})
}

func secrets(c *Config) []Secret {
	all := []Secret{c.Admin.Token}
	if c.ACME.EAB != nil {
		all = append(all, c.ACME.EAB.MACKey)
	}
	return all
}

func glob(t testing.TB, pattern string) []string {
	t.Helper()
	files, err := filepath.Glob(pattern)
	if err != nil || len(files) == 0 {
		t.Fatalf("no files match %s (%v)", pattern, err)
	}
	return files
}

func write(t *testing.T, dir, name string, data []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
		t.Fatal(err)
	}
}

func selfSigned(t *testing.T) (certificate, key []byte) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), DNSNames: []string{"guard.contoso.example"}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, k.Public(), k)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})
}

// revocationList returns a list in PEM that revokes nothing.
func revocationList(t *testing.T) []byte {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	issuer := &x509.Certificate{SerialNumber: big.NewInt(1), KeyUsage: x509.KeyUsageCRLSign, SubjectKeyId: []byte{1}}
	der, err := x509.CreateRevocationList(rand.Reader, &x509.RevocationList{Number: big.NewInt(1), NextUpdate: time.Now().Add(time.Hour)}, issuer, k)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der})
}
