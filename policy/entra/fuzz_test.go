package entra

import (
	"context"
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/partnerguard/partnerguard/policy"
)

// FuzzVerify: never a panic; always either a verified token or a TokenError; only
// what was signed verifies; and what the scanner takes for a JSON object is one.
func FuzzVerify(f *testing.F) {
	v := withKeyA(f)
	good := user(userClaims())
	parts := strings.Split(good, ".")
	for _, raw := range []string{
		good, user(appClaims()), "", ".", "..", "....", "a.b.c", parts[0] + "." + parts[1] + ".", parts[0] + ".." + parts[2],
		sign(keyB(), `{"alg":"RS256","kid":"A","nonce":"\u0041"}`, userClaims().String()),
		sign(keyA(), headerA, `{"amr":[["mfa"]],"aud":[],"exp":1e999,"\ud83d\ude00":{"a":[null,true,-0.1e-2]}}`),
		sign(keyA(), `{"alg":"none"}`, `{}`), b64([]byte(`{"alg":"dir"}`)) + "....",
	} {
		f.Add(raw, "", "")
	}
	f.Add("", headerA, userClaims().String())
	f.Add("", `{"kid":"A","alg":"RS256","nonce":"x"}`, `{"a":"\"","A":1}`)
	ctx := context.Background()
	f.Fuzz(func(t *testing.T, raw, header, payload string) {
		signed := map[string]bool{good: true, user(appClaims()): true}
		if raw == "" {
			raw = b64([]byte(header)) + "." + b64([]byte(payload)) + "." + parts[2]
		}
		tok, err := v.Verify(ctx, raw, audiences)
		var te *policy.TokenError
		switch {
		case err == nil && !tok.Verified:
			t.Error("neither a verified token nor an error")
		case err == nil && !signed[raw]:
			t.Errorf("verified what was never signed: %q", raw)
		case err != nil && !errors.As(err, &te):
			t.Errorf("error is a %T", err)
		case err != nil && (tok.Verified || te.Reason == "" || te.Claimed.Verified):
			t.Errorf("an error and a token: %+v, %+v", tok, te)
		}
		v.Explain(ctx, raw, audiences)

		members := 0
		duplicate, err := scanObject(payload, func(string, int, int) { members++ })
		var object map[string]json.RawMessage
		switch decoded := json.Unmarshal([]byte(payload), &object); {
		case err == nil && decoded != nil:
			t.Errorf("scanned what is no JSON object: %q: %v", payload, decoded)
		case err == nil && !duplicate && len(object) != members:
			t.Errorf("%d members, not %d: %q", members, len(object), payload)
		case errors.Is(err, errJSON) && decoded == nil && object != nil && !strings.Contains(payload, `\u`):
			t.Errorf("refused a JSON object: %q", payload)
		}
	})
}
