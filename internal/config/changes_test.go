package config

import (
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/partnerguard/partnerguard/policy"
)

func TestChanges(t *testing.T) {
	const base = `
tenants: [1b2c3d4e-0a1b-4c2d-8e3f-901234567890]
listeners: [{address: '127.0.0.1:8080'}, {name: lan, address: '127.0.0.1:8443', tls: {certificate: a.pem, key: a.key}}]
integrations: [{name: a, mode: audit}, {name: b, match: {user_agent: [x, y]}}, {name: c}]
rules: [{name: r, mode: audit}, {name: s, mode: tag}, {name: t, mode: tag}]
`
	long := strings.Repeat("0123456789 ", 11)
	for _, tt := range []struct {
		name, old, new string // sections that stand after those of base, in place of its own
		want           []string
	}{
		{"nothing", "", "", nil},
		{"what is written another way", "cloud: global\nentra: {max_stale: 168h, mfa_values: [mfa, ngcmfa]}", "entra: {max_stale: 7d, mfa_values: [ngcmfa, mfa]}", nil},
		{"a mode", "", "mode: enforce", []string{"mode: audit → enforce"}},
		{"another order of arguments, which are not shown", "reconcile: {every: 6h, token_command: [get, -k, secret]}", "reconcile: {every: 6h, token_command: [get, secret, -k]}",
			[]string{"reconcile.token_command: get … → get …"}},
		{"a schedule", "", "reconcile: {every: 6h, token_command: [get]}", []string{"reconcile.every: 0s → 6h", "reconcile.token_command: added get"}},
		{"a mode of an integration", "", "integrations: [{name: a, mode: enforce}, {name: b, match: {user_agent: [x, y]}}, {name: c, mode: tag}]",
			[]string{"integrations[a].mode: audit → enforce", "integrations[c].mode: as the rest → tag"}},
		{"integrations that come and go", "", "integrations: [{name: n, owner: Ann, match: {source: 10.0.0.0/8}}, {name: a, mode: audit}, {name: b, match: {user_agent: [y, z, x]}}]",
			[]string{"integrations[b].match.user_agent: added z", "integrations[c]: removed {name: c}", "integrations[n]: added {name: n, owner: Ann, match: {source: [10.0.0.0/8]}}"}},
		{"another order of integrations", "", "integrations: [{name: b, match: {user_agent: [x, y]}}, {name: a, mode: audit}, {name: c}]",
			[]string{"integrations: in order a, b → in order b, a"}},
		{"another order of rules", "", "rules: [{name: t, mode: tag}, {name: new, mode: tag}, {name: s, mode: tag}]",
			[]string{"rules[r]: removed {name: r, mode: audit}", "rules[new]: added {name: new, mode: tag}", "rules: in order s, t → in order t, s"}},
		{"a share", "rules: [{name: r, mode: tag}]", "rules: [{name: r, mode: tag, percent: 25, from: 2026-12-01}]",
			[]string{"rules[r].percent: unset → 25", "rules[r].from: unset → 2026-12-01T00:00:00Z"}},
		{"tenants", "", "tenants: [2b2c3d4e-0a1b-4c2d-8e3f-901234567890, 3b2c3d4e-0a1b-4c2d-8e3f-901234567890]",
			[]string{"tenants: 1b2c3d4e-0a1b-4c2d-8e3f-901234567890 → 2b2c3d4e-0a1b-4c2d-8e3f-901234567890, 3b2c3d4e-0a1b-4c2d-8e3f-901234567890"}},
		{"another order of listeners", "", "listeners: [{name: lan, address: '127.0.0.1:8443', tls: {certificate: a.pem, key: a.key}}, {address: '127.0.0.1:8080'}]", nil},
		{"an address", "", "listeners: [{address: '127.0.0.1:8081'}, {name: lan, address: '127.0.0.1:8444', tls: {certificate: a.pem, key: a.key}}]",
			[]string{
				"! listeners[127.0.0.1:8080]: removed {address: 127.0.0.1:8080, upstream: partner-center}", "! listeners[lan].address: 127.0.0.1:8443 → 127.0.0.1:8444",
				"! listeners[127.0.0.1:8081]: added {address: 127.0.0.1:8081, upstream: partner-center}",
			}},
		{"clear text to TLS and back", "", "listeners: [{address: '127.0.0.1:8080', tls: {acme: a.contoso.example}}, {name: lan, address: '127.0.0.1:8443'}]",
			[]string{"! listeners[127.0.0.1:8080].tls: added {acme: [a.contoso.example]}", "! listeners[lan].tls: removed {certificate: a.pem, key: a.key}"}},
		{"another certificate", "", "listeners: [{address: '127.0.0.1:8080', upstream: graph}, {name: lan, address: '127.0.0.1:8443', tls: {certificate: a.pem, key: b.key}, client_ca: c.pem}]\nupstreams: {graph: {}}",
			[]string{
				"listeners[127.0.0.1:8080].upstream: partner-center → graph", "listeners[lan].tls.key: a.key → b.key", `listeners[lan].client_ca: "" → c.pem`,
				"upstreams.graph: added {url: https://graph.microsoft.com, audiences: [https://graph.microsoft.com, https://graph.microsoft.…",
			}},
		{"two listeners on a free port each", "listeners: [{address: '127.0.0.1:0'}, {address: '127.0.0.1:0'}]", "listeners: [{address: '127.0.0.1:0'}, {address: '127.0.0.1:0', upstream: graph}]\nupstreams: {graph: {url: https://g.example, audiences: a, rewrite_links: false}}",
			[]string{"listeners[127.0.0.1:0 2].upstream: partner-center → graph", "upstreams.graph: added {url: https://g.example, audiences: [a]}"}},
		{"ACME", "", "acme: {http_port: 8088, eab: {key_id: k, mac_key: env:KEY}}",
			[]string{"! acme.eab: added {key_id: k, mac_key: env:KEY}", "! acme.http_port: 80 → 8088"}},
		{"an upstream", "upstreams: {graph: {}}", "upstreams: {graph: {hosts: [g], rewrite_links: false}}", []string{"upstreams.graph.hosts: added g", "upstreams.graph.rewrite_links: true → false"}},
		{"limits", "limits: {headers: 1MiB}", "limits: {connections: 1, calls: 2, headers: 16KB}",
			[]string{"! limits.connections: 10000 → 1", "limits.calls: 0 → 2", "! limits.headers: 1MiB → 16KB"}},
		{"timeouts", "", "timeouts: {dial: 1m30s, read_header: 1h, keep_alive: 1h1m, body: 24h, drain: 0}",
			[]string{"timeouts.dial: 10s → 1m30s", "! timeouts.read_header: 30s → 1h", "! timeouts.keep_alive: 2m → 1h1m", "timeouts.body: 2m → 1d", "timeouts.drain: 30s → 0s"}},
		{"the ledger", "", "ledger: {fsync: always, min_free: 0, retention: 1d12h}", []string{"! ledger.retention: 30d → 36h", "! ledger.fsync: 1s → always", "! ledger.min_free: 1GiB → 0"}},
		{"the size of the ledger", "", "ledger: {max_bytes: 1GiB, compress: false, tenants: {1b2c3d4e-0a1b-4c2d-8e3f-901234567890: 7d}}",
			[]string{"! ledger.tenants.1b2c3d4e-0a1b-4c2d-8e3f-901234567890: added 7d", "! ledger.max_bytes: 0 → 1GiB", "! ledger.compress: true → false"}},
		{"the admin listener", "admin: {token: file:/t}", "admin: {address: '127.0.0.1:9091', token: env:TOKEN, tls: {certificate: a.pem, key: a.key}}",
			[]string{"! admin.address: 127.0.0.1:9090 → 127.0.0.1:9091", "admin.token: file:/t → env:TOKEN", "! admin.tls: added {certificate: a.pem, key: a.key}"}},
		{"a long text", "rules: [{name: r, mode: tag, note: " + long + "old}]", "rules: [{name: r, mode: tag, note: " + long + "new}]",
			[]string{"rules[r].note: …56789 0123456789 0123456789 0123456789 0123456789 old → …56789 0123456789 0123456789 0123456789 0123456789 new"}},
		{"a text of several lines", "rules: [{name: r, mode: tag, note: a}]", "rules: [{name: r, mode: tag, note: \"a\\nb\"}]", []string{`rules[r].note: a → "a\nb"`}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var got []string
			for _, c := range Changes(parseOver(t, base, tt.old), parseOver(t, base, tt.new)) {
				text := c.String()
				if c.Restart {
					text = "! " + text
				}
				got = append(got, text)
				if len(c.Old) > 4*most || len(c.New) > 4*most {
					t.Errorf("%s is %d and %d bytes", c.Path, len(c.Old), len(c.New))
				}
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("Changes (-want +got):\n%s", diff)
			}
		})
	}
}

// parseOver parses base with the sections that more has as well replaced by it.
// Files are named without a directory.
func parseOver(t *testing.T, base, more string) *Config {
	t.Helper()
	text := "version: 1\n"
	for line := range strings.Lines(base) {
		if key, _, ok := strings.Cut(line, ":"); ok && !strings.Contains("\n"+more, "\n"+key+":") {
			text += line
		}
	}
	c, err := Parse("guard.yaml", []byte(text+more+"\n"))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// TestEveryKeyIsSeenByChanges changes one key after the other.
func TestEveryKeyIsSeenByChanges(t *testing.T) {
	paths := leaves(reflect.ValueOf(filled(1)).Elem(), "")
	if len(paths) < 80 {
		t.Fatalf("only %d keys: %q", len(paths), paths)
	}
	var restart []string
	for i, path := range paths {
		changed := filled(1)
		n := 0
		visit(reflect.ValueOf(changed).Elem(), "", func(_ string, v reflect.Value) {
			if n == i {
				fill(v, 2)
			}
			n++
		})
		changes := Changes(filled(1), changed)
		want := strings.ReplaceAll(strings.ReplaceAll(path, "[]", "[text 1]"), "{}", `."text 1"`)
		switch {
		case strings.HasSuffix(path, "[].name"): // another item
			if len(changes) != 2 || changes[0].New != "" || changes[1].Old != "" {
				t.Errorf("%s: Changes = %v", path, changes)
			}
		case len(changes) != 1 || changes[0].Path != want || changes[0].Old == "" || changes[0].New == "" || changes[0].Old == changes[0].New:
			t.Errorf("%s: Changes = %v, want one of %s", path, changes, want)
		}
		if slices.ContainsFunc(changes, func(c Change) bool { return c.Restart }) {
			restart = append(restart, path)
		}
	}
	want := []string{
		"instance", "listeners[].name", "listeners[].address",
		"acme.email", "acme.directory", "acme.root", "acme.eab.key_id", "acme.eab.mac_key", "acme.challenges", "acme.http_port", "acme.tls_alpn_port",
		"acme.storage", "acme.storage_key",
		"limits.connections", "limits.headers", "timeouts.read_header", "timeouts.keep_alive",
		"ledger.retention", "ledger.on_failure", "ledger.fsync", "ledger.identities", "ledger.min_free",
		"ledger.tenants{}", "ledger.max_bytes", "ledger.compress", "ledger.key",
		"store.postgres", "admin.address",
	}
	if diff := cmp.Diff(want, restart); diff != "" {
		t.Errorf("keys that need a restart (-want +got):\n%s", diff)
	}
}

// filled is a configuration with something in every key, lists and mappings with
// one item. It is not valid.
func filled(n int) *Config {
	c := new(Config)
	fill(reflect.ValueOf(c).Elem(), n)
	return c
}

// fill sets v to a value that depends on n; texts are "text n".
func fill(v reflect.Value, n int) {
	switch x := v.Addr().Interface().(type) {
	case *time.Time:
		*x = time.Unix(int64(n), 0)
		return
	case *netip.Prefix:
		*x = netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(n)}), 32)
		return
	case *policy.Mode:
		*x = policy.Mode(n)
		return
	}
	switch v.Kind() {
	case reflect.Bool:
		v.SetBool(n%2 == 0)
	case reflect.Int, reflect.Int64:
		v.SetInt(int64(n))
	case reflect.Uint8:
		v.SetUint(uint64(n))
	case reflect.String:
		v.SetString(fmt.Sprintf("text %d", n))
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fill(v.Elem(), n)
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 1, 1))
		fill(v.Index(0), n)
	case reflect.Map:
		item := reflect.New(v.Type().Elem()).Elem()
		fill(item, n)
		v.Set(reflect.MakeMap(v.Type()))
		v.SetMapIndex(reflect.ValueOf(fmt.Sprintf("text %d", n)), item)
	case reflect.Struct:
		for i := range v.NumField() {
			fill(v.Field(i), n)
		}
	default:
		panic("a kind of value that no key had: " + v.Kind().String())
	}
}

func leaves(v reflect.Value, path string) []string {
	var paths []string
	visit(v, path, func(path string, _ reflect.Value) { paths = append(paths, path) })
	return paths
}

// visit calls do for every key without keys of its own below it. Items of lists
// stand as [], of mappings as {}.
func visit(v reflect.Value, path string, do func(path string, v reflect.Value)) {
	_, scalar := newScalar(v)
	switch kind := v.Kind(); {
	case scalar:
		do(path, v)
	case kind == reflect.Pointer:
		visit(v.Elem(), path, do)
	case kind == reflect.Struct:
		for i := range v.NumField() {
			key := v.Type().Field(i).Tag.Get("yaml")
			if path != "" {
				key = path + "." + key
			}
			visit(v.Field(i), key, do)
		}
	case kind == reflect.Map:
		for _, key := range v.MapKeys() {
			item := reflect.New(v.Type().Elem()).Elem()
			item.Set(v.MapIndex(key))
			visit(item, path+"{}", do)
			v.SetMapIndex(key, item)
		}
	case v.Index(0).Kind() == reflect.Struct && v.Type() != reflect.TypeFor[[]netip.Prefix]():
		visit(v.Index(0), path+"[]", do)
	default:
		do(path, v)
	}
}

func TestDurationsAndSizesAreShownAsTheyAreWritten(t *testing.T) {
	for _, s := range []string{"30d", "36h", "1h30m", "90ms", "2m", "1m1s", "0s", "-5m", "10h", "20m"} {
		d, err := ParseDuration(s)
		if got := formatDuration(d); err != nil || got != s {
			t.Errorf("formatDuration(%s) = %s, %v", s, got, err)
		}
	}
	for _, s := range []string{"0", "1B", "1000MiB", "64KiB", "500MB", "1GiB", "2000KiB"} {
		size, err := parseSize(s)
		if got := size.String(); err != nil || got != s {
			t.Errorf("%s is shown as %s (%v)", s, got, err)
		}
	}
}
