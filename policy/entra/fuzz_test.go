package entra

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/partnerguard/partnerguard/policy"
)

// FuzzVerify: never a panic; always either a verified token or a TokenError; only
// what was signed verifies; and of JSON the scanner sees what encoding/json sees,
// and every name that is there twice. raw is a token, or empty for one of header
// and payload with a signature of another.
func FuzzVerify(f *testing.F) {
	v := withKeyA(f)
	good := user(userClaims())
	signed := map[string]bool{good: true, user(appClaims()): true}
	for raw := range signed {
		f.Add(raw, "", "")
	}
	f.Add(sign(keyB(), `{"alg":"RS256","kid":"A","nonce":"\u0041"}`, userClaims().String()), "", "")
	f.Add("", headerA, userClaims().String())
	signature := good[strings.LastIndexByte(good, '.')+1:]
	ctx := context.Background()
	f.Fuzz(func(t *testing.T, raw, header, payload string) {
		if raw == "" {
			raw = b64([]byte(header)) + "." + b64([]byte(payload)) + "." + signature
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
		case err != nil && (tok.Verified || te.Reason == "" || te.Claimed.Verified || te.Claimed.MFA != policy.MFAUnknown):
			t.Errorf("an error and a token: %+v, %+v", tok, te)
		}
		v.Explain(ctx, raw, audiences)
		compareJSON(t, payload)
	})
}

// compareJSON compares what scanObject and encoding/json see in text.
func compareJSON(t *testing.T, text string) {
	var names []string
	duplicate, err := scanObject(text, func(name string, start, end int) {
		names = append(names, name)
		v := value(text[start:end])
		got, isString := v.str()
		if !isString {
			return
		}
		var want string
		if err := json.Unmarshal([]byte(v), &want); err == nil && got != want {
			t.Errorf("%s is read as %q, want %q", v, got, want)
		}
	})
	var object map[string]json.RawMessage
	decodes := json.Unmarshal([]byte(text), &object) == nil && object != nil
	if err != nil {
		if decodes && errors.Is(err, errJSON) && !strings.Contains(text, `\u`) { // lone surrogates are refused here only
			t.Errorf("refused a JSON object: %q", text)
		}
		return
	}
	if !decodes {
		t.Errorf("scanned what is no JSON object: %q", text)
	}
	twice := false
	for i, a := range names {
		if _, ok := object[a]; !ok {
			t.Errorf("%q has no member %q", text, a)
		}
		for _, b := range names[:i] {
			twice = twice || strings.EqualFold(a, b)
		}
	}
	if duplicate != twice {
		t.Errorf("duplicate names: %v, want %v: %q", duplicate, twice, text)
	}
}

// FuzzKeySet: never a panic; either a key set or an error; and of a key set every
// key is fit to verify with, listed under a kid that it may have, and verifies no
// signature that it did not make.
func FuzzKeySet(f *testing.F) {
	raw := user(userClaims())
	tok := &token{raw: raw}
	tok.read(nil)
	f.Add(keySetJSON(published("A", &keyB().PublicKey)))
	f.Fuzz(func(t *testing.T, body string) {
		set, err := parseKeySet([]byte(body), noon, 7)
		if err != nil {
			if set != nil && set.keyfunc != nil {
				t.Error("an error and a key set")
			}
			return
		}
		if len(set.byKid) == 0 || len(set.byKid) > maxKeys || len(set.listed) != len(set.byKid) || set.generation != 7 || set.fetched != noon {
			t.Errorf("%d keys, %d listed, of generation %d", len(set.byKid), len(set.listed), set.generation)
		}
		for kid, k := range set.byKid {
			bits := k.public.N.BitLen()
			if !canBePublished(kid) || bits < minKeyBits || bits > maxKeyBits || k.public.E < 3 || k.public.E%2 == 0 || len(k.issuers) == 0 {
				t.Errorf("key %q: %d bits, exponent %d, issuers %q", kid, bits, k.public.E, k.issuers)
			}
			if !k.public.Equal(&keyA().PublicKey) && set.verify(kid, tok.signed, tok.sig) == nil {
				t.Errorf("key %q verifies the signature of another", kid)
			}
		}
		// What is published again in the same words is the same keys.
		again, err := parseKeySet(bytes.Clone([]byte(body)), noon, 8)
		if err != nil {
			t.Fatal(err)
		}
		for id := range set.listed {
			if _, ok := again.listed[id]; !ok {
				t.Error("a key has another identity the second time")
			}
		}
	})
}
