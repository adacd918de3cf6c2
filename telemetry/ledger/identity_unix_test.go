//go:build unix

package ledger

import (
	"bufio"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/partnerguard/partnerguard/policy"
)

// The disk stops answering while a name is written: calls go on without it, and it is
// there once the disk answers again.
func TestAStalledNameHoldsUpNobodyForLong(t *testing.T) {
	dir := t.TempDir()
	failed := make(chan Event, 10)
	l := mustOpen(t, Config{Dir: dir, Event: func(e Event) {
		if e.Kind == EventIdentityFailed {
			failed <- e
		}
	}})
	pipe := filepath.Join(dir, identitiesFile)
	if err := syscall.Mkfifo(pipe, 0o600); err != nil { // opening it waits for a reader
		t.Fatal(err)
	}
	refs := map[string]string{}
	for _, user := range []string{"anna", "ben", "anna", "carl"} {
		rec := record()
		rec.Token = policy.Token{Kind: policy.KindAppUser, TenantID: "t1", ObjectID: user, UPN: user + "@contoso.example", Verified: true}
		decide(t, l, rec)
		refs[user] = l.UserRef(&rec.Token)
	}
	if e := <-failed; !errors.Is(e.Err, errStalled) {
		t.Errorf("the event says %v, want that the disk does not answer", e.Err)
	}
	if len(failed) > 0 {
		t.Errorf("%d more events of the same stall", len(failed))
	}

	reading := make(chan string)
	go func() {
		f, err := os.OpenFile(pipe, os.O_RDWR, 0) // does not end between two writers
		if err != nil {
			t.Error(err)
		}
		defer f.Close()
		in := bufio.NewReader(f)
		for n := 0; n < 3; {
			line, err := in.ReadString('\n')
			if err != nil {
				t.Error(err)
				break
			}
			if line != "\n" {
				n++
				reading <- line
			}
		}
		close(reading)
	}()
	for line := range reading {
		for user, ref := range refs {
			if strings.Contains(line, user) && strings.Contains(line, ref) {
				delete(refs, user)
			}
		}
	}
	if len(refs) > 0 {
		t.Errorf("names that were not written: %v", refs)
	}
	mustClose(t, l)
}
