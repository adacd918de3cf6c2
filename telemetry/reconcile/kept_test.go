package reconcile

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
)

func TestForgetRemovesAUserFromBothResults(t *testing.T) {
	one, two := guardedCall("a").weak(), guardedCall("b").of("sync", sync, kim, "kim@fabrikam.example").weak()
	dir, r := estate(t, before, one, two)
	ms := says{
		requests: collection(rowOf(one), rowOf(two).strong(), rowOf(two).id("c").from(attic).app(stranger), rowOf(one).id("d").from(attic).app(stranger)),
		principals: collection(map[string]any{"objectId": kim, "upn": "kim@fabrikam.example", "tenantId": tenantID, "lastNonMfaCompliantRequestDateTime": zoneless(now)},
			map[string]any{"objectId": sam, "upn": "sam@contoso.example", "tenantId": tenantID, "lastNonMfaCompliantRequestDateTime": zoneless(now)}),
	}
	res, err := Run(t.Context(), config(dir, r, ms.serve(t).URL))
	if err != nil {
		t.Fatal(err)
	}
	found := len(res.Findings)
	if err := SaveSignIns(dir, &SignIns{
		Version:   signInsVersion,
		Strangers: []Stranger{{AppID: stranger, UserID: kim, User: "kim@fabrikam.example"}, {AppID: stranger, UserID: sam, User: "sam@contoso.example"}},
		Integrations: []SignInIntegration{{
			Name:     "sync",
			Causes:   []SignInCause{{Cause: "password_grant", Principals: []Principal{{AppID: sync, UserID: kim, User: "kim@fabrikam.example"}, {AppID: sync, UserID: sam}}}},
			Failures: []SignInFailure{{Code: 50126, Principals: []Principal{{AppID: sync, UserID: kim}}}},
		}},
	}); err != nil {
		t.Fatal(err)
	}
	all := func() string {
		var text string
		for _, name := range []string{resultFile, signInsFile} {
			b, err := os.ReadFile(filepath.Join(dir, name))
			if err != nil {
				t.Fatal(err)
			}
			text += string(b)
		}
		return text
	}
	was := all()
	if changed, err := Forget(dir, func(_, object string) bool { return object == "5f0e6c7a-0000-4d3b-9a55-0c1d2e3f4a5b" }); changed != nil || err != nil || all() != was {
		t.Errorf("of somebody unknown Forget = %v, %v", changed, err)
	}
	changed, err := Forget(dir, func(upn, object string) bool { return upn == "kim@fabrikam.example" || object == kim })
	if diff := gocmp.Diff([]string{resultFile, signInsFile}, changed); diff != "" || err != nil {
		t.Errorf("Forget (-want +got), %v:\n%s", err, diff)
	}
	text := all()
	if strings.Contains(text, "kim@") || strings.Contains(text, kim) {
		t.Errorf("the user is still there:\n%s", text)
	}
	if !strings.Contains(text, "sam@contoso.example") {
		t.Errorf("another user went, too:\n%s", text)
	}
	kept, err := LoadResult(dir)
	if err != nil || kept.Clear || len(kept.Findings) == 0 || len(kept.Findings) >= found || len(kept.Notes) == 0 {
		t.Errorf("kept are %d of %d findings, clear %v, notes %v, %v", len(kept.Findings), found, kept.Clear, kept.Notes, err)
	}
	if changed, err := Forget(dir, func(upn, object string) bool { return upn == "kim@fabrikam.example" || object == kim }); changed != nil || err != nil {
		t.Errorf("a second time Forget = %v, %v", changed, err)
	}
}

func TestForgetWithoutResultsDoesNothing(t *testing.T) {
	if changed, err := Forget(t.TempDir(), func(_, _ string) bool { return true }); changed != nil || err != nil {
		t.Errorf("Forget = %v, %v", changed, err)
	}
}

func TestForgetTellsOfAResultThatItCannotRead(t *testing.T) {
	dir := t.TempDir()
	if err := SaveSignIns(dir, &SignIns{Version: signInsVersion, Strangers: []Stranger{{UserID: kim}}}); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, resultFile), []byte(`{"format":"partner`), 0o600); err != nil {
		t.Fatal(err)
	}
	changed, err := Forget(dir, func(_, _ string) bool { return true })
	if diff := gocmp.Diff([]string{signInsFile}, changed); diff != "" || err == nil || !strings.Contains(err.Error(), filepath.Join(dir, resultFile)) {
		t.Errorf("Forget, %v (-want +got):\n%s", err, diff)
	}
}
