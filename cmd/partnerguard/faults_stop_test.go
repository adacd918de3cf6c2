//go:build linux

package main

import (
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/partnerguard/partnerguard/internal/emulator"
)

// The guard is told to stop in the middle of its load, and nobody takes the load
// away: calls under way are finished, later ones find no listener, and the account is
// whole.
func TestFaultsOfStop(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	s := play(t, em, stage{})
	load := s.underLoad(crowdConfig{clients: 40, emulate: "stall=200ms"})
	load.awaitSound(100)
	stopped := time.Now()
	s.end()
	calls := load.stop()
	want(t, "before", between(calls, time.Time{}, stopped.Add(-300*time.Millisecond)), 30, s.as)
	want(t, "afterwards", between(calls, stopped, time.Now()), 0, func(c sighting) bool { return c.err != nil && c.status == 0 || s.as(c) })
	s.account(calls, leave{silent: true})
}

// A balancer looks at /readyz each second and sends nothing to a guard that is not
// ready. No call fails while the guard stops.
func TestFaultsOfStopBehindABalancer(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	other := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		w.Header().Set("Partnerguard-Reason", "other")
	}))
	defer other.Close()
	s := play(t, em, stage{timeouts: "idle: 1s, unready: 3s"})
	quit, polls := make(chan struct{}), make(chan struct{})
	url := make(chan string, 1)
	url <- s.url
	current := func() string {
		u := <-url
		url <- u
		return u
	}
	go func() {
		defer close(polls)
		client := &http.Client{Timeout: time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
			case <-quit:
				return
			}
			res, err := client.Get(s.admin + "/readyz")
			if err == nil {
				res.Body.Close()
			}
			if err != nil || res.StatusCode != 200 {
				<-url
				url <- other.URL
			}
		}
	}()
	load := s.underLoad(crowdConfig{clients: 40, emulate: "stall=100ms", url: current})
	load.awaitSound(100)
	time.Sleep(2 * time.Second) // some polls
	stopped := time.Now()
	s.cmd.Process.Signal(syscall.SIGTERM)
	s.awaitExit(0)
	load.await(40)
	calls := load.stop()
	close(quit)
	<-polls
	elsewhere := func(c sighting) bool { return c.err == nil && c.status == 200 && c.reason == "other" }
	want(t, "before", between(calls, time.Time{}, stopped), 200, s.as)
	want(t, "while it stops", between(calls, stopped, time.Now()), 100, func(c sighting) bool { return s.as(c) || elsewhere(c) })
	s.account(calls, leave{})
}

// The certificate authority cannot be reached at the start and nothing is stored: what
// needs its certificate says so, and everything else serves. Nobody is hammered.
func TestFaultsOfCertificateAuthority(t *testing.T) {
	t.Parallel()
	var side sideBySide
	defer side.wait()
	for _, fault := range []struct {
		name string
		net  relayMode
	}{
		{"refusing", refusing},
		{"silent", silent},
	} {
		side.run(t, fault.name, func(t *testing.T) {
			em := startEmulator(t, emulator.Config{})
			authority := startRelay(t, em.EntraURL(), nil) // what is behind it is never reached
			authority.set(fault.net)
			_, http01, _ := strings.Cut(freePort(t), ":")
			s := play(t, em, stage{
				listeners: `, {name: public, address: "127.0.0.1:0", tls: {acme: [guard.contoso.example]}}`,
				more:      fmt.Sprintf("acme: {directory: \"https://%s/dir\", challenges: [http-01], http_port: %s}", authority.address, http01),
			})
			load := s.underLoad(crowdConfig{})
			load.awaitSound(100)
			loaded := s.resources()
			for range 20 {
				began := time.Now()
				c, err := tls.Dial("tcp", strings.TrimPrefix(s.urls[1], "https://"), &tls.Config{ServerName: "guard.contoso.example"})
				if err == nil {
					c.Close()
					t.Fatal("the listener has a certificate from nowhere")
				}
				if took := time.Since(began); took > 2*time.Second {
					t.Errorf("a client without hope waited for %v", took)
				}
			}
			s.awaitReady(200, "certificates degraded: ")
			load.await(300)
			calls := load.stop()
			want(t, "without certificate authority", calls, 400, s.as)
			if fault.net == refusing {
				s.awaitText(`"msg":"certificate"`, `"level":"WARN"`, `"name":"guard.contoso.example"`)
			}
			if n := authority.connections(); n > 5 {
				t.Errorf("%d connections to the certificate authority", n)
			}
			s.invariants(calls, loaded, leave{})
		})
	}
}
