package store

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

var lineSamples = []string{
	`{"n":1,"type":"decision","call":"c","time":"2026-06-01T10:00:00.123456Z","generation":3,"verified":true,"amr":["pwd","mfa"],"iat":1780996100,"would_reject":false,"query_names":[]}`,
	` { "call" : "c" , "path" : "\/a\u0000\ud83d\ude00\"" , "amr" : [ "x" , "y" ] , "verified" : false } `,
	`{"call":"c","status":401,"mfa_compliant":false,"duration_ms":12.345,"upstream_ms":0.5,"bytes_out":123456789012,"error":"interrupted"}`,
	`{"call":"c","from_later":{"a":[1,{"b":"}"}]},"also":[[],"]"],"and":null,"more":-1.5e3,"status":200}`,
}

func TestDecodeReadsWhatJSONReads(t *testing.T) {
	for _, line := range lineSamples {
		var got, want Call
		if err := decode([]byte(line), &got); err != nil {
			t.Errorf("decode(%s): %v", line, err)
		}
		if err := json.Unmarshal([]byte(line), &want); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got, cmpopts.EquateEmpty()); diff != "" {
			t.Errorf("decode(%s) (-json +decode):\n%s", line, diff)
		}
	}
}

func TestDecodeRefuses(t *testing.T) {
	for _, line := range []string{
		``, `{`, `{}`, `[]`, `null`, `{"call":"c"`, `{"call":"c"}}`, `{"call":"c",}x`, `{"call":c}`, `{"call":"c","status":"200"}`, `{"call":"c","status":2.5}`,
		`{"call":"c","verified":1}`, `{"call":"c","amr":"mfa"}`, `{"call":"c","amr":["a"`, `{"call":"c","amr":[1]}`, `{"call":"c","time":"today"}`, `{"call":"c","path":"\q"}`,
		`{"call":"c","path":"a`, `{"call":"c","path":"a\`, `{"call" "c"}`, `{"call":"c" "path":"p"}`, `{"call":"c","x":}`, `{"call":"c","x":{]}`, `{"status":200}`,
	} {
		var c Call
		if err := decode([]byte(line), &c); err == nil {
			t.Errorf("decode(%s) = %+v, want an error", line, c)
		}
	}
}

func FuzzDecode(f *testing.F) {
	for _, line := range lineSamples {
		f.Add([]byte(line))
	}
	f.Fuzz(func(t *testing.T, line []byte) {
		var got, want Call
		if decode(line, &got) != nil || !json.Valid(line) || bytes.Contains(line, []byte("null")) || bytes.ContainsFunc(line, func(r rune) bool { return r == '\uFFFD' }) {
			return // null and text that is no UTF-8 do not occur in a ledger
		}
		// encoding/json folds the case of names and merges what is there twice.
		seen := map[string]bool{}
		d := json.NewDecoder(bytes.NewReader(line))
		for depth, key := 0, false; ; {
			tok, err := d.Token()
			if err != nil {
				break
			}
			if delim, ok := tok.(json.Delim); ok {
				if delim == '{' || delim == '[' {
					depth++
				} else {
					depth--
				}
				key = depth == 1
				continue
			}
			if depth == 1 && key {
				name := strings.ToLower(tok.(string))
				if seen[name] || name != tok.(string) {
					return
				}
				seen[name] = true
			}
			key = depth == 1 && !key
		}
		if err := json.Unmarshal(line, &want); err != nil {
			return // iat as a time, more than six decimals of a second
		}
		want.Time = want.Time.UTC()
		if diff := cmp.Diff(want, got, cmpopts.EquateEmpty()); diff != "" && !bytes.Contains(line, []byte(`"time"`)) {
			t.Errorf("decode(%s) (-json +decode):\n%s", line, diff)
		}
	})
}
