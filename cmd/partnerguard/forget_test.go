package main

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/partnerguard/partnerguard/internal/emulator"
)

// filesWith are the files in dir that hold s.
func filesWith(t *testing.T, dir, s string) []string {
	t.Helper()
	var names []string
	eachFile(t, dir, func(path string, data []byte) {
		if strings.Contains(string(data), s) {
			names = append(names, path)
		}
	})
	return names
}

// eachFile hands what the files of a directory hold to visit. A guard that runs may
// rename one just then: what was read is forgotten, and all is read anew, so that
// nothing is missed under its new name.
func eachFile(t *testing.T, dir string, visit func(path string, data []byte)) {
	t.Helper()
	type file struct {
		path string
		data []byte
	}
	files := awaiting(t, func() (files []file, whole bool) {
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			data, err := os.ReadFile(path)
			files = append(files, file{path, data})
			return err
		})
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil, false
		case err != nil:
			t.Fatal(err)
		}
		return files, true
	})
	for _, f := range files {
		visit(f.path, f.data)
	}
}

// A user is forgotten while the guard runs and he goes on calling. His name does not
// come back, not even after a restart; the others keep theirs, and the chain holds.
func TestForgetBesideARunningGuard(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	dir := t.TempDir()
	anna := em.Mint(emulator.TokenSpec{UPN: "anna@contoso.example", ObjectID: "0a0b0c0d-1111-4222-8333-444455556666"})
	kim := em.Mint(emulator.TokenSpec{UPN: "kim@contoso.example", ObjectID: "0a0b0c0d-1111-4222-8333-777788889999"})
	run := func(args ...string) string {
		t.Helper()
		stdout, stderr, code := partnerguard(t, append(args, "--data-dir", dir)...)
		if code != 0 {
			t.Fatalf("%v: exit %d\n%s%s", args, code, stdout, stderr)
		}
		return stdout
	}
	g := startGuard(t, dir, guardYAML(em, "audit"))
	get(t, g.url+"/v1/invoices", anna)
	get(t, g.url+"/v1/invoices", kim)
	if len(filesWith(t, dir, "anna@contoso.example")) == 0 {
		t.Fatal("her name is nowhere: this test shows nothing")
	}
	run("ledger", "forget", "anna@contoso.example")
	check := func(when string) {
		t.Helper()
		for _, who := range []string{"anna@contoso.example", "0a0b0c0d-1111-4222-8333-444455556666"} {
			if names := filesWith(t, dir, who); len(names) > 0 {
				t.Errorf("%s, %s stands in %v", when, who, names)
			}
		}
		if len(filesWith(t, dir, "kim@contoso.example")) == 0 {
			t.Errorf("%s, the other user has no name any more", when)
		}
		run("ledger", "verify")
	}
	check("at once")
	// The same person by a new token, too.
	for _, token := range []string{anna, em.Mint(emulator.TokenSpec{UPN: "anna@contoso.example", ObjectID: "0a0b0c0d-1111-4222-8333-444455556666"})} {
		get(t, g.url+"/v1/invoices", token)
	}
	check("after further calls")
	g.stop()
	g = startGuard(t, dir, guardYAML(em, "audit"))
	get(t, g.url+"/v1/invoices", anna)
	check("after a restart")
	g.stop()
	if n := len(ledgerLines(t, dir)); n != 2*5 {
		t.Errorf("%d ledger lines, want those of 5 calls", n)
	}
}

// With pseudonymous identities nobody's name or object id is written anywhere.
func TestPseudonymousIdentitiesNameNobody(t *testing.T) {
	t.Parallel()
	em := startEmulator(t, emulator.Config{})
	dir := t.TempDir()
	token := em.Mint(emulator.TokenSpec{UPN: "anna@contoso.example", ObjectID: "0a0b0c0d-1111-4222-8333-444455556666"})
	g := startGuard(t, dir, guardYAML(em, "audit")+"ledger: {identities: pseudonymous}\n")
	get(t, g.url+"/v1/invoices", token)
	for _, path := range []string{"/metrics", "/readyz?verbose"} {
		if _, body := get(t, g.admin+path, ""); strings.Contains(string(body), "anna@") {
			t.Errorf("%s names the user", path)
		}
	}
	g.stop()
	for _, who := range []string{"anna@contoso.example", "0a0b0c0d-1111-4222-8333-444455556666"} {
		if names := filesWith(t, dir, who); len(names) > 0 {
			t.Errorf("%s stands in %v", who, names)
		}
		if strings.Contains(g.text(), who) {
			t.Errorf("%s stands in the log", who)
		}
	}
	stdout, stderr, code := partnerguard(t, "report", "--by", "user", "--data-dir", dir)
	if code != 0 || strings.Contains(stdout, "anna") {
		t.Errorf("report: exit %d\n%s%s", code, stdout, stderr)
	}
}
