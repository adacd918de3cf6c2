//go:build linux

package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/partnerguard/partnerguard/internal/emulator"
	"golang.org/x/sys/unix"
)

// mount runs mount(8) and unmounts when the test ends. Where that is not permitted
// the test is skipped, but not in CI.
func mount(t *testing.T, dir string, args ...string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(program(t, "mount"), append(args, dir)...).CombinedOutput()
	switch {
	case err == nil:
		t.Cleanup(func() { unmount(dir) })
	case os.Getenv("CI") == "true":
		t.Fatalf("mount %v %s: %v: %s; CI must be able to mount (as root, with CAP_SYS_ADMIN and loop devices)", args, dir, err, out)
	default:
		t.Skipf("mount %v %s: %v: %s", args, dir, err, out)
	}
}

func unmount(dir string) error {
	if err := syscall.Unmount(dir, 0); err == nil {
		return nil
	}
	return syscall.Unmount(dir, syscall.MNT_DETACH)
}

// fill takes all the room there is in dir, until the function it returns is called.
func fill(t *testing.T, dir string) (empty func()) {
	t.Helper()
	name := filepath.Join(dir, "filler")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, size := range []int{1 << 20, 4 << 10, 1} {
		for block := make([]byte, size); ; {
			if _, err := f.Write(block); errors.Is(err, syscall.ENOSPC) {
				break
			} else if err != nil {
				t.Fatal(err)
			}
		}
	}
	return func() {
		if err := os.Remove(name); err != nil {
			t.Error(err)
		}
	}
}

// withoutLedger reports whether a call got what ledger.on_failure: reject promises
// while the ledger cannot write.
func (s *scene) withoutLedger(c sighting) bool {
	if s.tokens[c.token].reason == "mfa_missing" {
		return s.as(c)
	}
	return c.err == nil && c.status == 503 && c.reason == "ledger_unavailable"
}

// The disk is full. With on_failure: forward every call goes on and stands in the
// log instead; with reject none goes on. When there is room again the ledger says
// what it lacks, and goes on.
func TestFaultsOfFullDisk(t *testing.T) {
	t.Parallel()
	var side sideBySide
	defer side.wait()
	for _, fault := range []struct{ name, ledger string }{
		{"forward", "min_free: 0"},
		{"reject", "min_free: 4KiB, on_failure: reject"},
		{"forward, synced always", "min_free: 4KiB, fsync: always"},
	} {
		side.run(t, fault.name, func(t *testing.T) {
			rejects := strings.Contains(fault.ledger, "reject")
			em := startEmulator(t, emulator.Config{})
			dir := filepath.Join(t.TempDir(), "data")
			mount(t, dir, "-t", "tmpfs", "-o", "size=24m", "tmpfs")
			s := play(t, em, stage{dir: dir, ledger: fault.ledger})
			load := s.underLoad(crowdConfig{})
			load.awaitSound(100)
			loaded := s.resources()
			empty := fill(t, dir)
			if rejects {
				s.awaitReady(503, "every call is refused: the ledger cannot write", "ledger degraded: it cannot write")
			} else {
				s.awaitReady(200, "ledger degraded: it cannot write")
			}
			full := time.Now()
			arrived := em.Count()
			load.await(300)
			if n := em.Count() - arrived; rejects && n > 12 { // some were under way
				t.Errorf("%d calls reached the upstream while the ledger could not write", n)
			}
			mended := time.Now()
			empty()
			s.awaitReady(200, "ledger ok", "store ok")
			load.awaitSound(60)
			calls := load.stop()

			during := between(calls, full, mended)
			if rejects {
				want(t, "with a full disk", during, 250, s.withoutLedger)
			} else {
				want(t, "with a full disk", calls, 500, s.as)
			}
			for _, event := range []string{"failed", "recovered", "gap"} {
				if len(s.said(`"msg":"ledger"`, `"event":"`+event+`"`)) == 0 {
					t.Errorf("the log does not tell of %q", event)
				}
			}
			if n := len(s.said(`"level":"ERROR","msg":"call"`, `"unrecorded":"ledger unavailable`)); n < len(during) {
				t.Errorf("%d calls stand in the log as unrecorded, %d were made meanwhile", n, len(during))
			}
			s.invariants(calls, loaded, leave{gaps: true})
		})
	}
}

// The file system turns read-only under the guard, as ext4 does when its disk fails.
// The guard goes on, and after the repair the next one does from what there is.
func TestFaultsOfReadOnlyDisk(t *testing.T) {
	t.Parallel()
	var side sideBySide
	defer side.wait()
	for _, fault := range []struct{ name, ledger string }{
		{"forward", "min_free: 4KiB"},
		{"reject", "min_free: 4KiB, on_failure: reject"},
	} {
		side.run(t, fault.name, func(t *testing.T) { readOnlyDisk(t, fault.ledger) })
	}
}

// mountImage makes a file system of 64 MiB in a file in dir and mounts it.
func mountImage(t *testing.T, dir string) (disk string) {
	t.Helper()
	image, disk := filepath.Join(dir, "image"), filepath.Join(dir, "disk")
	f, err := os.Create(image)
	if err == nil {
		err = errors.Join(f.Truncate(64<<20), f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(program(t, "mkfs.ext4"), "-q", "-F", image).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v: %s", err, out)
	}
	mount(t, disk, "-o", "loop", image)
	return disk
}

// syncDisk syncs one file system: sync(2) would wait for a frozen one of another test.
func syncDisk(t *testing.T, disk string) {
	t.Helper()
	f, err := os.Open(disk)
	if err == nil {
		err = errors.Join(unix.Syncfs(int(f.Fd())), f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
}

func readOnlyDisk(t *testing.T, ledgerKeys string) {
	rejects := strings.Contains(ledgerKeys, "reject")
	em := startEmulator(t, emulator.Config{})
	parent := t.TempDir()
	disk := mountImage(t, parent)
	image := filepath.Join(parent, "image")
	st := stage{dir: filepath.Join(disk, "data"), ledger: ledgerKeys}
	s := play(t, em, st)
	load := s.underLoad(crowdConfig{})
	load.awaitSound(100)
	loaded := s.resources()
	// What was not on the disk by then may be gone after the repair.
	syncDisk(t, disk)
	if out, err := exec.Command("mount", "-o", "remount,abort", disk).CombinedOutput(); err != nil {
		t.Fatalf("mount -o remount,abort: %v: %s", err, out)
	}
	if rejects {
		s.awaitReady(503, "every call is refused: the ledger cannot write", "read-only file system")
	} else {
		s.awaitReady(200, "ledger degraded: it cannot write", "read-only file system")
	}
	broken := time.Now()
	load.await(250)
	calls := load.stop()
	if rejects {
		want(t, "with a read-only disk", between(calls, broken, time.Now()), 200, s.withoutLedger)
	} else {
		want(t, "with a read-only disk", calls, 300, s.as)
	}
	s.settled(loaded)
	s.end()
	s.awaitText(`"msg":"store lags behind the ledger"`)
	s.account(calls, leave{gaps: true, unclosed: true})

	if err := unmount(disk); err != nil {
		t.Fatal(err)
	}
	mount(t, disk, "-o", "loop", image)
	em.Reset()
	again := play(t, em, st)
	load = again.underLoad(crowdConfig{})
	load.awaitSound(100)
	load.stop()
	again.end()
	if stdout, stderr, code := partnerguard(t, "ledger", "verify", "--data-dir", st.dir); code != 0 {
		t.Errorf("after the repair, ledger verify: exit %d\n%s%s", code, stdout, stderr)
	}
	decisions, outcomes := map[string]recorded{}, map[string]recorded{}
	for _, r := range again.entries() {
		switch r.Type {
		case "decision":
			decisions[r.Call] = r
		case "outcome":
			outcomes[r.Call] = r
		}
	}
	for id := range decisions {
		if _, ok := outcomes[id]; !ok {
			t.Errorf("after the repair, call %s has no outcome", id)
		}
	}
	again.storeAgrees(decisions, outcomes)
}

// The disk stops answering: every write hangs. One call at most is held up by it; the
// others go on as ledger.on_failure says, and what they were stands in the log. When
// the disk answers again the ledger says what it lacks, and goes on.
func TestFaultsOfStalledDisk(t *testing.T) {
	t.Parallel()
	var side sideBySide
	defer side.wait()
	for _, fault := range []struct{ name, ledger string }{
		{"forward", "min_free: 4KiB"},
		{"reject", "min_free: 4KiB, on_failure: reject"},
	} {
		side.run(t, fault.name, func(t *testing.T) {
			rejects := strings.Contains(fault.ledger, "reject")
			em := startEmulator(t, emulator.Config{})
			disk := mountImage(t, t.TempDir())
			freeze := func(how string) error {
				out, err := exec.Command(program(t, "fsfreeze"), how, disk).CombinedOutput()
				if err != nil {
					err = fmt.Errorf("fsfreeze %s: %w: %s", how, err, out)
				}
				return err
			}
			s := play(t, em, stage{dir: filepath.Join(disk, "data"), ledger: fault.ledger})
			load := s.underLoad(crowdConfig{clients: 40})
			load.awaitSound(100)
			loaded := s.resources()
			// In any case, or nothing can be unmounted, and calls that hang hang for ever.
			thaw := time.AfterFunc(time.Minute, func() { freeze("-u") })
			t.Cleanup(func() { thaw.Stop(); freeze("-u") })
			stalled := time.Now()
			if err := freeze("-f"); err != nil {
				t.Fatal(err)
			}
			if rejects {
				s.awaitReady(503, "every call is refused: the ledger cannot write", "a write to the disk does not return")
			} else {
				s.awaitReady(200, "ledger degraded: it cannot write", "a write to the disk does not return")
			}
			noticed := time.Now()
			load.await(300)
			mended := time.Now()
			if err := freeze("-u"); err != nil {
				t.Fatal(err)
			}
			s.awaitReady(200, "ledger ok", "store ok")
			load.awaitSound(60)
			calls := load.stop()

			if took := noticed.Sub(stalled); took > 12*time.Second {
				t.Errorf("the guard noticed after %v", took)
			}
			held := slices.DeleteFunc(slices.Clone(calls), func(c sighting) bool {
				return c.began.After(noticed) || c.began.Add(c.took).Before(mended)
			})
			if len(held) > 1 {
				t.Errorf("%d calls were held up until the disk answered: %v", len(held), held)
			}
			if rejects {
				want(t, "on a stalled disk", between(calls, noticed, mended), 250, s.withoutLedger)
			} else {
				want(t, "on a stalled disk", calls, 400, s.as)
			}
			s.invariants(calls, loaded, leave{gaps: true})
		})
	}
}

// Every sync takes two seconds. By default no call waits for one; with fsync: always
// each waits for its own, and none is lost.
func TestFaultsOfSlowSyncs(t *testing.T) {
	t.Parallel()
	var side sideBySide
	defer side.wait()
	for _, fault := range []struct {
		name, ledger string
		clients      int
		min          int
		bound        time.Duration // of 99 calls in 100
	}{
		{"fsync: 1s", "fsync: 1s", 12, 500, time.Second},
		{"fsync: always", "fsync: always", 150, 150, 10 * time.Second},
	} {
		side.run(t, fault.name, func(t *testing.T) {
			em := startEmulator(t, emulator.Config{})
			// A first start takes many syncs.
			dir := filepath.Join(t.TempDir(), "data")
			startStage(t, em, dir, stage{}).stop()
			s := play(t, em, stage{dir: dir, ledger: fault.ledger, wrap: []string{
				// The guard stays the child of this test, the tracer is not.
				program(t, "strace"), "-D", "-f", "--seccomp-bpf", "-o", os.DevNull, "-e", "trace=fsync,fdatasync",
				"-e", "inject=fsync,fdatasync:delay_enter=2000000", "--",
			}})
			load := s.underLoad(crowdConfig{clients: fault.clients})
			load.await(int64(fault.min / 2))
			loaded := s.resources()
			load.await(int64(fault.min / 2))
			calls := load.stop()
			want(t, "with syncs of 2 s", calls, fault.min, s.as)
			if p99 := percentile(calls, 99); p99 > fault.bound {
				t.Errorf("1 call in 100 took more than %v, want at most %v", p99, fault.bound)
			}
			if fastest := percentile(calls, 0); fault.ledger == "fsync: always" && fastest < time.Second {
				t.Errorf("a call took %v only: its record cannot be on the disk", fastest)
			}
			s.invariants(calls, loaded, leave{behind: true})
		})
	}
}
