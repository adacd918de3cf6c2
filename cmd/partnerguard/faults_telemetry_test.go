//go:build linux

package main

import (
	"io"
	"os"
	"testing"
	"time"

	"github.com/partnerguard/partnerguard/internal/emulator"
)

// A collector that takes everything and answers nothing, or that is not there, slows
// no call and keeps no memory; what is not sent is dropped.
func TestFaultsOfCollector(t *testing.T) {
	t.Parallel()
	var side sideBySide
	defer side.wait()
	for _, fault := range []struct {
		name string
		net  relayMode
	}{
		{"silent", silent},
		{"refusing", refusing},
	} {
		side.run(t, fault.name, func(t *testing.T) {
			em := startEmulator(t, emulator.Config{})
			// What is behind the relay is never reached.
			collector := startRelay(t, em.EntraURL(), nil)
			collector.set(fault.net)
			s := play(t, em, stage{env: []string{
				"OTEL_EXPORTER_OTLP_ENDPOINT=" + collector.url(), "OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf",
				"OTEL_BSP_SCHEDULE_DELAY=50", "OTEL_BSP_MAX_QUEUE_SIZE=64", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE=16", "OTEL_METRIC_EXPORT_INTERVAL=100",
			}})
			load := s.underLoad(crowdConfig{})
			load.awaitSound(150)
			loaded := s.resources()
			load.await(500)
			calls := load.stop()
			want(t, "without collector", calls, 500, s.as)
			if p99 := percentile(calls, 99); p99 > 2*time.Second {
				t.Errorf("1 call in 100 took more than %v", p99)
			}
			s.invariants(calls, loaded, leave{})
		})
	}
}

// Nobody reads the log for a while: calls go on, and no line is lost as long as the
// queue holds them.
func TestFaultsOfLogReader(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	var g gate
	s := play(t, em, stage{reader: func(r io.Reader) io.Reader { g.Reader = r; return &g }})
	load := s.underLoad(crowdConfig{})
	load.awaitSound(100)
	loaded := s.resources()
	g.shut.Lock()
	before := len(s.said(`"msg":"call"`))
	load.await(500) // several times what a pipe holds
	if n := len(s.said(`"msg":"call"`)) - before; n > 5 {
		t.Errorf("%d lines of the log were read; this test shows nothing", n)
	}
	g.shut.Unlock()
	load.await(100)
	calls := load.stop()
	want(t, "with a log that is not read", calls, 600, s.as)
	if n := metric(t, s.guardProcess, "partnerguard_log_dropped_lines_total"); n != 0 {
		t.Errorf("%v lines were dropped", n)
	}
	s.invariants(calls, loaded, leave{})
}

// Nobody reads the log any more, and the guard is told to stop: it does, and the
// account is whole.
func TestFaultsOfLogReaderAtTheEnd(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	var g gate
	s := play(t, em, stage{reader: func(r io.Reader) io.Reader { g.Reader = r; return &g }})
	load := s.underLoad(crowdConfig{})
	load.awaitSound(60)
	loaded := s.resources()
	g.shut.Lock()
	load.await(400)
	calls := load.stop()
	want(t, "with a log that is not read", calls, 400, s.as)
	s.settled(loaded)
	ended := make(chan error, 1)
	began := time.Now()
	s.cmd.Process.Signal(os.Interrupt)
	go func() { _, err := s.cmd.Process.Wait(); ended <- err }()
	select {
	case err := <-ended:
		t.Logf("the end took %v, %v", time.Since(began), err)
	case <-time.After(20 * time.Second):
		t.Error("the guard does not end while nobody reads its log")
	}
	g.shut.Unlock()
	<-s.done
	s.account(calls, leave{deaf: true})
}
