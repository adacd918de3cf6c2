//go:build linux

package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/partnerguard/partnerguard/internal/emulator"
)

// unverified reports whether a call in enforce mode was held back for want of keys.
func unverified(c sighting) bool {
	return c.err == nil && c.status == 503 && c.reason == "keys_unavailable"
}

// No keys at the start: enforce holds calls back, quickly and in words, until the
// keys come; then everything is as if nothing had been.
func TestFaultsOfKeysAtStart(t *testing.T) {
	t.Parallel()
	var side sideBySide
	defer side.wait()
	for _, fault := range []struct {
		name string
		mode emulator.KeysMode
		net  relayMode
	}{
		{"down", emulator.KeysDown, passing},
		{"hanging", emulator.KeysHang, passing},
		{"dripping", emulator.KeysOK, dripping},
		{"refused", emulator.KeysOK, refusing},
	} {
		side.run(t, fault.name, func(t *testing.T) {
			em := startEmulator(t, emulator.Config{})
			entra := startRelay(t, em.EntraURL(), nil)
			em.SetKeysMode(fault.mode)
			entra.set(fault.net)
			s := play(t, em, stage{authority: entra.url(), keyless: true})
			s.awaitReady(503, "every call is refused", "keys degraded")

			load := s.underLoad(crowdConfig{})
			load.await(200)
			loaded := s.resources()
			mended := time.Now()
			em.SetKeysMode(emulator.KeysOK)
			entra.set(refusing) // ends what hangs
			entra.set(passing)
			s.awaitReady(200, "keys ok")
			load.awaitSound(60)
			calls := load.stop()

			want(t, "without keys", between(calls, time.Time{}, mended), 150, unverified)
			if slowest := percentile(between(calls, time.Time{}, mended), 99); slowest > 2*time.Second {
				t.Errorf("calls waited for keys, up to %v; the bound is 250 ms each", slowest)
			}
			if n := em.Count(); n == 0 || len(s.said(`"event":"failed"`, `"msg":"keys"`)) == 0 {
				t.Errorf("%d calls reached the upstream, or the log does not tell of the keys", n)
			}
			s.invariants(calls, loaded, leave{})
		})
	}
}

// Keys that go away while they are in use go on working; only a token of a key that
// nobody has seen yet waits for them. Audit forwards even that.
func TestFaultsOfKeysInUse(t *testing.T) {
	t.Parallel()
	var side sideBySide
	defer side.wait()
	for _, fault := range []struct {
		name string
		mode emulator.KeysMode
		net  relayMode
	}{
		{"down", emulator.KeysDown, passing},
		{"hanging", emulator.KeysHang, passing},
		{"dripping", emulator.KeysOK, dripping},
	} {
		side.run(t, fault.name, func(t *testing.T) {
			em := startEmulator(t, emulator.Config{})
			entra := startRelay(t, em.EntraURL(), nil)
			s := play(t, em, stage{authority: entra.url()})
			old := s.underLoad(crowdConfig{})
			old.awaitSound(100)
			loaded := s.resources()

			em.SetKeysMode(fault.mode)
			entra.set(refusing)
			entra.set(fault.net)
			em.Rotate()
			fresh := *s
			fresh.tokens = []loadToken{{s.secrets.token("token of a new key", em.Mint(emulator.TokenSpec{})), "mfa_present"}}
			// The keys were fetched a moment ago, so that a kid they lack counts as
			// unknown until they are old.
			other := fresh.underLoad(crowdConfig{clients: 4, rate: 30})
			other.await(60)
			mended := time.Now()
			em.SetKeysMode(emulator.KeysOK)
			entra.set(refusing)
			entra.set(passing)
			old.awaitSound(60)
			calls, newcomers := old.stop(), other.stop()

			want(t, "with known keys", calls, 200, s.as)
			want(t, "with a new key", between(newcomers, time.Time{}, mended), 40, func(c sighting) bool {
				return c.err == nil && (c.status == 401 && c.reason == "token_unknown_key" || unverified(c))
			})
			s.invariants(append(calls, newcomers...), loaded, leave{})
		})
	}
}

// Entra is away for more than a day: the keys on the disk work, and an alarm says how
// old they are.
func TestFaultsOfKeysForADay(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	dir := filepath.Join(t.TempDir(), "data")
	g := startStage(t, em, dir, stage{})
	files := awaiting(t, func() ([]string, bool) {
		files, _ := filepath.Glob(filepath.Join(dir, "keys-*.json"))
		return files, len(files) == 2
	})
	g.stop()
	for _, file := range files {
		var kept map[string]any
		text, err := os.ReadFile(file)
		if err == nil {
			err = json.Unmarshal(text, &kept)
		}
		if err != nil {
			t.Fatal(err)
		}
		kept["fetched_at"] = time.Now().Add(-25 * time.Hour).UTC()
		if text, err = json.Marshal(kept); err == nil {
			err = os.WriteFile(file, text, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}

	em.SetKeysMode(emulator.KeysDown)
	s := play(t, em, stage{dir: dir, keyless: true})
	s.awaitText(`"level":"WARN"`, `"msg":"keys"`, `"event":"stale"`, `"tenant":"`+emulator.DefaultTenant+`"`)
	s.awaitReady(200, "keys degraded: tenant "+emulator.DefaultTenant)
	age := metric(t, s.guardProcess, `partnerguard_keys_age_seconds{tenant="`+emulator.DefaultTenant+`",version="1.0"}`)
	if age < 25*3600 || age > 26*3600 {
		t.Errorf("the age of the keys is %v s, want 25 hours", age)
	}
	load := s.underLoad(crowdConfig{})
	load.await(200)
	loaded := s.resources()
	mended := time.Now()
	em.SetKeysMode(emulator.KeysOK)
	s.awaitReady(200, "keys ok")
	load.await(60)
	calls := load.stop()
	want(t, "a day without Entra", between(calls, time.Time{}, mended), 150, s.as)
	want(t, "afterwards", between(calls, mended, time.Now()), 50, s.as)
	s.invariants(calls, loaded, leave{})
}

// A clock that is ten minutes off, here or at Entra, shows as tokens whose times are.
// Five minutes are forgiven, ten are not; the answer names what is wrong.
func TestFaultsOfClocks(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	s := play(t, em, stage{})
	now := time.Now()
	minted := func(reason string, issued, expires time.Duration) loadToken {
		token := em.Mint(emulator.TokenSpec{IssuedAt: now.Add(issued), NotBefore: now.Add(issued), Expires: now.Add(expires)})
		return loadToken{s.secrets.token("token "+reason, token), reason}
	}
	s.tokens = []loadToken{
		minted("mfa_present", -10*time.Minute, 55*time.Minute), // ours is ahead
		minted("token_not_yet_valid", 10*time.Minute, 75*time.Minute),
		minted("mfa_present", 4*time.Minute, 69*time.Minute),
		minted("token_expired", -75*time.Minute, -10*time.Minute),
		minted("mfa_present", -69*time.Minute, -4*time.Minute),
	}
	load := s.underLoad(crowdConfig{})
	load.await(100)
	loaded := s.resources()
	load.await(300)
	calls := load.stop()
	want(t, "with clocks that differ", calls, 300, func(c sighting) bool {
		status := 401
		if s.tokens[c.token].reason == "mfa_present" {
			status = 200
		}
		return c.err == nil && c.status == status && c.reason == s.tokens[c.token].reason
	})
	for _, r := range em.Requests() {
		if _, token, _ := strings.Cut(r.Header.Get("Authorization"), " "); token == s.tokens[1].token || token == s.tokens[3].token {
			t.Errorf("%s reached the upstream with a token out of its time", r.Header.Get("MS-RequestId"))
		}
	}
	s.invariants(calls, loaded, leave{})
}
