package main

import (
	"strings"
	"testing"
	"time"

	"github.com/partnerguard/partnerguard/internal/emulator"
)

// At noon Microsoft changes the format of all tokens.
func TestAChangeOfTheTokenFormatRaisesAnAlarmAndRefusesNoMoreThanAsked(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	old := em.Mint(emulator.TokenSpec{})
	five := strings.Repeat("eyJhbGciOiJSU0EtT0FFUCIsImVuYyI6IkEyNTZHQ00ifQ.", 4) + "c2VjcmV0" // the form of a JWE
	for _, row := range []struct {
		mode, unverifiable string
		effect             string
	}{
		{"audit", "as_mode", "allow"}, {"tag", "as_mode", "tag"}, {"enforce", "forward", "tag"}, {"enforce", "as_mode", "reject"},
	} {
		t.Run(row.mode+" "+row.unverifiable, func(t *testing.T) {
			t.Parallel()
			g := startGuard(t, t.TempDir(), strings.Replace(guardYAML(em, row.mode), "entra: {", "entra: {on_unverifiable: "+row.unverifiable+", ", 1))
			for range 10 {
				if res, _ := get(t, g.url+"/v1/customers?size=1", old); res.StatusCode != 200 {
					t.Fatalf("before noon a call got %d", res.StatusCode)
				}
			}
			<-time.After(11 * time.Second) // what was before must lie before the span that is looked at
			noon, at := time.Now(), len(g.text())
			for range 25 {
				res, _ := get(t, g.url+"/v1/customers?size=1", five)
				if got := res.Header.Get("Partnerguard-Effect"); got != row.effect || res.Header.Get("Partnerguard-Reason") != "token_encrypted" {
					t.Fatalf("after noon the effect on a call is %s for %s, want %s", got, res.Header.Get("Partnerguard-Reason"), row.effect)
				}
			}
			l, _ := g.await(at, "tokens can no longer be verified")
			if took := time.Since(noon); took > time.Minute || l.Hint == "" {
				t.Errorf("the alarm came after %v: %+v", took, l)
			}
			if g.metric(`partnerguard_degraded{part="tokens"}`) != 1 {
				t.Error("the guard is not degraded")
			}
			if res, body := get(t, g.admin+"/readyz?verbose", ""); res.StatusCode != 200 || !strings.Contains(string(body), "could not be verified") {
				t.Errorf("/readyz?verbose: %d %s", res.StatusCode, body)
			}
			g.stop()
		})
	}
}
