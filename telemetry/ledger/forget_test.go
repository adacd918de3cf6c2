package ledger

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/partnerguard/partnerguard/policy"
)

func person(oid, upn string) *policy.Token {
	return &policy.Token{Verified: true, Kind: policy.KindAppUser, TenantID: "t1", ObjectID: oid, UPN: upn}
}

func namesIn(t *testing.T, dir string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(dir, identitiesFile))
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	return string(data)
}

func TestAForgottenUserStaysForgotten(t *testing.T) {
	dir := t.TempDir()
	l := mustOpen(t, Config{Dir: dir})
	anna, kim := person("o1", "anna@contoso.example"), person("o2", "kim@contoso.example")
	rec := record()
	rec.Token = *anna
	decide(t, l, rec)
	ref, other := l.UserRef(anna), l.UserRef(kim)
	l.UserRef(person("o1", "anna.b@contoso.example")) // married

	found, err := FindUser(dir, "ANNA@contoso.example")
	want := []Identity{{ref, "t1", "o1", "anna@contoso.example"}, {ref, "t1", "o1", "anna.b@contoso.example"}}
	if diff := cmp.Diff(want, found); err != nil || diff != "" {
		t.Errorf("FindUser by a former name: %v (-want +got):\n%s", err, diff)
	}
	for _, by := range []string{"O1", ref} {
		if again, err := FindUser(dir, by); err != nil || !cmp.Equal(again, found) {
			t.Errorf("FindUser(%q) = %v, %v", by, again, err)
		}
	}
	before := mustVerify(t, dir)
	if lines, err := Forget(dir, ref); err != nil || lines != 2 {
		t.Fatalf("Forget = %d, %v, want 2 lines", lines, err)
	}
	if after := mustVerify(t, dir); !cmp.Equal(after, before) {
		t.Errorf("forgetting changed the chain: %+v, before %+v", after, before)
	}
	// The running ledger: with what it remembers, and with a name it never saw.
	if got := l.UserRef(anna); got != ref {
		t.Errorf("UserRef of a forgotten user = %q, want %q as before", got, ref)
	}
	l.UserRef(person("o1", "anna.c@contoso.example"))
	third := l.UserRef(person("o3", "carl@contoso.example"))
	check := func(when string) {
		t.Helper()
		if s := namesIn(t, dir); strings.Contains(s, "anna") || strings.Contains(s, ref) || strings.Contains(s, `"o1"`) {
			t.Errorf("%s the name is there: %s", when, s)
		}
		ids, err := Identities(dir)
		if err != nil || len(ids) != 2 || ids[other].UPN != "kim@contoso.example" || ids[third].UPN != "carl@contoso.example" {
			t.Errorf("%s Identities = %v, %v, want the two others", when, ids, err)
		}
	}
	check("with the ledger still running")
	mustClose(t, l)

	l = mustOpen(t, Config{Dir: dir})
	for _, u := range []*policy.Token{anna, kim, person("o1", "anna.d@contoso.example")} {
		l.UserRef(u)
	}
	check("after a restart")
	mustClose(t, l)

	// A copy that comes back from a backup does not bring the name back either.
	appendText(t, filepath.Join(dir, identitiesFile), fmt.Sprintf(`{"user_ref":%q,"tid":"t1","oid":"o1","upn":"anna@contoso.example"}`+"\n", ref))
	if ids, err := Identities(dir); err != nil || len(ids) != 2 {
		t.Errorf("Identities with the line back = %v, %v, want it passed over", ids, err)
	}
	if lines, err := Forget(dir, ref); err != nil || lines != 1 {
		t.Errorf("Forget again = %d, %v, want 1 line", lines, err)
	}
	if lines, err := Forget(dir, ref); err != nil || lines != 0 {
		t.Errorf("Forget once more = %d, %v, want nothing left to do", lines, err)
	}
	if info, err := os.Stat(filepath.Join(dir, forgottenFile)); err != nil || info.Mode().Perm() != 0o600 && runtime.GOOS != "windows" {
		t.Errorf("the list of forgotten users: %v, %v, want mode 0600", info, err)
	}
}

func TestForgetTakesUserRefsOnly(t *testing.T) {
	dir := t.TempDir()
	for _, bad := range []string{"", "anna@contoso.example", "0f9a6c1e-0000-4000-8000-000000000001", strings.Repeat("_", 22), strings.Repeat("A", 23)} {
		if _, err := Forget(dir, bad); err == nil {
			t.Errorf("Forget(%q) succeeds", bad)
		}
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 0 {
		t.Errorf("it left %v", entries)
	}
	if lines, err := Forget(dir, strings.Repeat("A", 22)); err != nil || lines != 0 {
		t.Errorf("Forget before anybody is known = %d, %v", lines, err)
	}
}

func TestForgettingDropsHalfALineAndKeepsTheRest(t *testing.T) {
	dir := t.TempDir()
	ref := strings.Repeat("A", 22)
	whole := `{"user_ref":"` + strings.Repeat("B", 21) + `A","tid":"t","oid":"o","upn":"kim@contoso.example","later":1}`
	text := "\n" + `{"user_ref":"` + ref + `","tid":"t","oid":"x","upn":"anna@contoso.example"}` + "\n" + `{"user_ref":"AAAA` + "\n" + whole
	if err := os.WriteFile(filepath.Join(dir, identitiesFile), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if lines, err := Forget(dir, ref); err != nil || lines != 1 {
		t.Fatalf("Forget = %d, %v, want 1 line", lines, err)
	}
	if got := namesIn(t, dir); got != whole+"\n" {
		t.Errorf("the file holds %q, want %q", got, whole+"\n")
	}
}

// Names come and go at once: none that was forgotten stays, none of the others is lost.
func TestForgettingBesideARunningLedgerLosesNobodyElse(t *testing.T) {
	dir := t.TempDir()
	at := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	var mu sync.Mutex
	clock := func() time.Time { // so that a name that met the lock is soon tried again
		mu.Lock()
		defer mu.Unlock()
		at = at.Add(time.Second)
		return at
	}
	l := mustOpen(t, Config{Dir: dir, Now: clock, Event: func(Event) {}})
	const users = 200
	refs := make([]string, users)
	var wg sync.WaitGroup
	for i := range users {
		refs[i] = l.UserRef(&policy.Token{TenantID: "t1", ObjectID: fmt.Sprint("o", i)}) // only claimed: names nobody
	}
	wg.Go(func() {
		for i := range users {
			l.UserRef(person(fmt.Sprint("o", i), fmt.Sprintf("u%d@contoso.example", i)))
		}
	})
	wg.Go(func() {
		for i := 0; i < users; i += 2 {
			if _, err := Forget(dir, refs[i]); err != nil {
				t.Errorf("Forget: %v", err)
			}
		}
	})
	wg.Wait()
	for i := range users { // whoever met the lock calls again
		l.UserRef(person(fmt.Sprint("o", i), fmt.Sprintf("u%d@contoso.example", i)))
	}
	mustClose(t, l)
	ids, err := Identities(dir)
	if err != nil {
		t.Fatal(err)
	}
	for i, ref := range refs {
		if _, named := ids[ref]; named != (i%2 == 1) {
			t.Errorf("user %d is named: %v", i, named)
		}
	}
	for i := 0; i < users; i += 2 {
		if name := fmt.Sprintf("u%d@", i); strings.Contains(namesIn(t, dir), `"`+name) {
			t.Errorf("%s stands in the file", name)
		}
	}
}

func TestPseudonymousNamesNobody(t *testing.T) {
	dir := t.TempDir()
	l := mustOpen(t, Config{Dir: dir, Pseudonymous: true})
	rec := record()
	rec.Token = *person("0f9a6c1e-0000-4000-8000-000000000001", "anna@contoso.example")
	decide(t, l, rec)
	finish(t, l, rec)
	ref := l.UserRef(&rec.Token)
	mustClose(t, l)
	if len(ref) != 22 {
		t.Errorf("UserRef = %q, want 22 characters", ref)
	}
	found := false
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := os.ReadFile(path)
		for _, who := range []string{"anna", "0f9a6c1e-0000-4000-8000-000000000001"} {
			if strings.Contains(string(data), who) {
				t.Errorf("%s holds %q", path, who)
			}
		}
		found = found || strings.Contains(string(data), ref)
		return err
	})
	if err != nil || !found {
		t.Errorf("no file holds the user_ref: %v", err)
	}
	// The reference does not depend on the mode: switching breaks no series.
	l = mustOpen(t, Config{Dir: dir})
	if got := l.UserRef(&rec.Token); got != ref {
		t.Errorf("plain, the user is %q instead of %q", got, ref)
	}
	mustClose(t, l)
}

func TestUserRefsAreThoseOfTheRecords(t *testing.T) {
	const tid, oid = "1b2c3d4e-0a1b-4c2d-8e3f-901234567890", "5f0e6c7a-2222-4d3b-9a55-0c1d2e3f4a5b"
	dir := t.TempDir()
	if _, err := UserRefs(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without a key: %v", err)
	}
	key := filepath.Join(dir, identitiesKey)
	if _, err := os.Stat(key); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("it made one: %v", err)
	}
	if err := os.WriteFile(key, []byte("short"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := UserRefs(dir); err == nil || errors.Is(err, fs.ErrNotExist) {
		t.Errorf("with half a key: %v", err)
	}
	if err := os.WriteFile(key, []byte("0123456789abcdef0123456789abcdef"), 0o600); err != nil {
		t.Fatal(err)
	}
	refs, err := UserRefs(dir)
	if err != nil {
		t.Fatal(err)
	}
	l := mustOpen(t, Config{Dir: dir, Pseudonymous: true})
	defer mustClose(t, l)
	for _, tt := range []struct{ name, tid, oid, want string }{
		// printf '%s\0%s' TID OID | openssl dgst -sha256 -hmac KEY -binary | head -c 16 | basenc --base64url
		{"as a token says it", tid, oid, "txSADqd8y0qyQTGMJalkXA"},
		{"in capitals", strings.ToUpper(tid), strings.ToUpper(oid), "txSADqd8y0qyQTGMJalkXA"},
		{"of another tenant", oid, oid, ""},
		{"tenant and id exchanged", oid, tid, ""},
		{"no tenant", "", tid + "\x00" + oid, ""},
	} {
		got := refs(tt.tid, tt.oid)
		if !IsUserRef(got) || tt.want != "" && got != tt.want || tt.want == "" && got == refs(tid, oid) {
			t.Errorf("%s: %q, want %q", tt.name, got, tt.want)
		}
		rec := l.UserRef(&policy.Token{TenantID: strings.ToLower(tt.tid), ObjectID: strings.ToLower(tt.oid)})
		if rec != got {
			t.Errorf("%s: records have %q, UserRefs %q", tt.name, rec, got)
		}
	}
}
