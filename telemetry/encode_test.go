package telemetry_test

import (
	"encoding/json"
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
	"github.com/partnerguard/partnerguard/policy"
	"github.com/partnerguard/partnerguard/proxy"
	"github.com/partnerguard/partnerguard/telemetry"
)

// fullRecord has every field set.
func fullRecord() *proxy.Record {
	return &proxy.Record{
		Decided: proxy.Decided{
			Call:        uuid.MustParse("01937b6e-7a3c-7c21-9f4e-2b1d5a6c8e90"),
			Time:        time.Date(2026, 12, 1, 9, 30, 5, 123456789, time.FixedZone("", 3600)),
			Instance:    "guard-1",
			Generation:  3,
			Listener:    "main",
			Peer:        "192.0.2.7",
			Method:      "GET",
			Path:        "/v1/invoices/D05001",
			Route:       "/v1/invoices/{invoice-id}",
			QueryNames:  []string{"size", "offset"},
			Upstream:    "partner-center",
			Integration: "nightly-billing",
			Evidence:    "app_id",
			Owner:       "billing@contoso.example",
			Customer:    "5f0f4d5c-0000-4000-8000-000000000001",
			Token: policy.Token{
				Verified: true, Kind: policy.KindAppUser, MFA: policy.MFAPresent,
				TenantID: "1b2c3d4e-0a1b-4c2d-8e3f-901234567890", AppID: "7d1f0a52-9b3c-4c1e-8f60-2a5b9c0d1e11",
				ObjectID: "oid-of-the-user", UPN: "name-of-the-user", UTI: "abc", AMR: []string{"pwd", "mfa"},
				IssuedAt: 1796113805, ExpiresAt: 1796117405,
			},
			Decision:      policy.Decision{Effect: policy.Allow, Reason: policy.ReasonMFAPresent, Mode: policy.Enforce, Rule: "invoices first", WouldReject: true},
			RequestID:     "request",
			CorrelationID: "correlation",
			Application:   "billing",
			UserAgent:     "python-requests/2.32",
		},
		Finished: proxy.Finished{
			Status: 401, Rejection: policy.RejectionMFARequired, Code: "900421", UpstreamStatus: "401 Unauthorized - MFA required",
			MFACompliant: policy.CompliantFalse, UpstreamRequestID: "ur", UpstreamCorrelationID: "uc",
			BytesIn: 12, BytesOut: 345, Duration: 12345678 * time.Nanosecond, UpstreamTime: 9001 * time.Microsecond,
			Replays: 1, Error: "client_canceled",
		},
	}
}

func decision(rec *proxy.Record, ref string) string {
	rec.Encoded = nil
	return "{" + string(telemetry.AppendDecision(nil, rec, ref)) + "}"
}

func outcome(rec *proxy.Record) string {
	return "{" + string(telemetry.AppendOutcome(nil, rec)) + "}"
}

func TestDecisionHasTheDocumentedNamesInOrder(t *testing.T) {
	want := `{"call":"01937b6e-7a3c-7c21-9f4e-2b1d5a6c8e90","time":"2026-12-01T08:30:05.123456Z","instance":"guard-1","generation":3,` +
		`"listener":"main","peer":"192.0.2.7","method":"GET","route":"/v1/invoices/{invoice-id}","path":"/v1/invoices/D05001",` +
		`"query_names":["size","offset"],"upstream":"partner-center","integration":"nightly-billing","evidence":"app_id",` +
		`"owner":"billing@contoso.example","customer":"5f0f4d5c-0000-4000-8000-000000000001","kind":"app_user","verified":true,` +
		`"tid":"1b2c3d4e-0a1b-4c2d-8e3f-901234567890","app_id":"7d1f0a52-9b3c-4c1e-8f60-2a5b9c0d1e11","user_ref":"REF","uti":"abc",` +
		`"iat":1796113805,"exp":1796117405,"amr":["pwd","mfa"],"mfa":"present","mode":"enforce","rule":"invoices first","effect":"allow",` +
		`"reason":"mfa_present","would_reject":true,"request_id":"request","correlation_id":"correlation","application":"billing",` +
		`"user_agent":"python-requests/2.32"}`
	if diff := cmp.Diff(want, decision(fullRecord(), "REF")); diff != "" {
		t.Errorf("AppendDecision (-want +got):\n%s", diff)
	}
}

func TestOutcomeHasTheDocumentedNamesInOrder(t *testing.T) {
	want := `{"call":"01937b6e-7a3c-7c21-9f4e-2b1d5a6c8e90","status":401,"rejection":"mfa_required","code":"900421",` +
		`"upstream_status":"401 Unauthorized - MFA required","mfa_compliant":false,"upstream_request_id":"ur","upstream_correlation_id":"uc",` +
		`"bytes_in":12,"bytes_out":345,"duration_ms":12.345,"upstream_ms":9.001,"replays":1,"error":"client_canceled"}`
	if diff := cmp.Diff(want, outcome(fullRecord())); diff != "" {
		t.Errorf("AppendOutcome (-want +got):\n%s", diff)
	}
}

// A client that sends no ids of its own has the call's.
func TestTheCallsOwnIDsAreLeftOut(t *testing.T) {
	rec := fullRecord()
	rec.RequestID = rec.Call.String()
	if got := decision(rec, ""); strings.Contains(got, `"request_id"`) || !strings.Contains(got, `"correlation_id":"correlation"`) {
		t.Errorf("AppendDecision = %s", got)
	}
	rec.CorrelationID = rec.Call.String()
	if got := decision(rec, ""); strings.Contains(got, `"correlation_id"`) {
		t.Errorf("AppendDecision = %s", got)
	}
}

// What Microsoft says of a call is said once.
func TestAnAnswerThatNamesTheCallsOwnIDs(t *testing.T) {
	rec := &proxy.Record{}
	const call = `{"call":"00000000-0000-0000-0000-000000000000"`
	for want, ids := range map[string][4]string{
		`,"echoed":true`: {"r", "c", "r", "c"},
		`,"upstream_request_id":"r","upstream_correlation_id":"other"`: {"r", "c", "r", "other"},
		`,"upstream_request_id":"R","upstream_correlation_id":"c"`:     {"r", "c", "R", "c"},
		`,"upstream_request_id":"r"`:                                   {"r", "c", "r", ""},
		`,"upstream_correlation_id":"c"`:                               {"", "c", "", "c"},
		``:                                                             {"", "", "", ""},
	} {
		rec.RequestID, rec.CorrelationID, rec.UpstreamRequestID, rec.UpstreamCorrelationID = ids[0], ids[1], ids[2], ids[3]
		if got := outcome(rec); got != call+want+"}" {
			t.Errorf("ids %q: %s, want %s}", ids, got, call+want)
		}
	}
}

func TestWhatIsUnknownIsLeftOut(t *testing.T) {
	rec := &proxy.Record{}
	want := `{"call":"00000000-0000-0000-0000-000000000000","kind":"undecided","verified":false,"mfa":"unknown","effect":"reject","would_reject":false}`
	if got := decision(rec, ""); got != want {
		t.Errorf("AppendDecision of nothing = %s, want %s", got, want)
	}
	if got, want := outcome(rec), `{"call":"00000000-0000-0000-0000-000000000000"}`; got != want {
		t.Errorf("AppendOutcome of nothing = %s, want %s", got, want)
	}
}

// Every field of a record must show in what is encoded, but for these, which
// DESIGN keeps out: who the user is (user_ref stands for it), and claims that only
// the checks before the decision need.
var notEncoded = map[string]bool{
	"Token.ObjectID": true, "Token.UPN": true,
	"Token.Version": true, "Token.Issuer": true, "Token.Audience": true,
	"Token.IdP": true, "Token.AppAuth": true, "Token.NotBefore": true,
}

func TestEveryFieldOfARecordIsEncoded(t *testing.T) {
	seen := 0
	var visit func(v reflect.Value, path string, whole *proxy.Record)
	visit = func(v reflect.Value, path string, whole *proxy.Record) {
		for i := range v.NumField() {
			f, sf := v.Field(i), v.Type().Field(i)
			name := sf.Name
			if path != "" {
				name = path + "." + name
			}
			if name == "Encoded" {
				continue // what this test looks at
			}
			if f.Kind() == reflect.Struct && f.Type() != reflect.TypeFor[time.Time]() {
				if sf.Anonymous {
					name = path
				}
				visit(f, name, whole)
				continue
			}
			before := decision(whole, "") + outcome(whole)
			change(t, name, f)
			changed := decision(whole, "")+outcome(whole) != before
			if changed == notEncoded[name] {
				t.Errorf("a change of %s shows = %v, want %v", name, changed, !notEncoded[name])
			}
			seen++
		}
	}
	for _, rec := range []*proxy.Record{{}, fullRecord()} {
		visit(reflect.ValueOf(rec).Elem(), "", rec)
	}
	if seen < 2*50 {
		t.Errorf("looked at %d fields only", seen)
	}
}

func change(t *testing.T, name string, f reflect.Value) {
	t.Helper()
	switch f.Kind() {
	case reflect.String:
		f.SetString(f.String() + "x")
	case reflect.Bool:
		f.SetBool(!f.Bool())
	case reflect.Int, reflect.Int64:
		f.SetInt(f.Int() + 1e6)
	case reflect.Uint64:
		f.SetUint(f.Uint() + 1)
	case reflect.Uint8:
		f.SetUint((f.Uint() + 1) % 3)
	case reflect.Slice:
		f.Set(reflect.Append(f, reflect.ValueOf("x")))
	case reflect.Array:
		f.Index(0).SetUint(f.Index(0).Uint() + 1)
	case reflect.Struct:
		f.Set(reflect.ValueOf(f.Interface().(time.Time).Add(time.Second)))
	default:
		t.Fatalf("%s has kind %v", name, f.Kind())
	}
}

func TestADecisionIsEncodedOnce(t *testing.T) {
	rec := fullRecord()
	first := string(telemetry.AppendDecision(nil, rec, "ref"))
	rec.Path = "/changed"
	if again := string(telemetry.AppendDecision([]byte("x"), rec, "ref")); again != "x"+first {
		t.Errorf("the second time %s, want %s", again, first)
	}
	rec.Encoded = rec.Encoded[:0]
	if anew := string(telemetry.AppendDecision(nil, rec, "ref")); anew == first {
		t.Error("an emptied Encoded is not encoded anew")
	}
}

// encoding/json reads back what it would itself have made of the same values.
func TestRandomTextDecodesToWhatItWas(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	alphabet := []string{"a", "é", "語", "😀", `"`, `\`, "/", "<", "\x00", "\n", "\t", "\x1b[31m", "\x7f", "\u009b31m", "\u2028", "\u202e",
		"\u2066", "\ufffd", "\xff", "\xc3", "\xed\xa0\x80", "\u200f", "\u061c", "\U0010ffff"}
	for range 5000 {
		var b strings.Builder
		for range rng.IntN(12) {
			b.WriteString(alphabet[rng.IntN(len(alphabet))])
		}
		checkString(t, b.String())
	}
}

func FuzzAppendString(f *testing.F) {
	f.Add("plain")
	f.Add("\x1b]0;title\a\u0085\xc2")
	f.Fuzz(func(t *testing.T, s string) { checkString(t, s) })
}

func checkString(t *testing.T, s string) {
	t.Helper()
	enc := telemetry.AppendString(nil, s)
	var got, want string
	if err := json.Unmarshal(enc, &got); err != nil {
		t.Fatalf("AppendString(%q) = %s: %v", s, enc, err)
	}
	ref, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(ref, &want); err != nil {
		t.Fatal(err)
	}
	if got != want {
		t.Errorf("AppendString(%q) decodes to %q, want %q", s, got, want)
	}
	if !utf8.Valid(enc) {
		t.Errorf("AppendString(%q) = %q is not UTF-8", s, enc)
	}
	for _, r := range string(enc) {
		if r < ' ' || r >= 0x7f && r <= 0x9f || r >= 0x2028 && r <= 0x202e || r >= 0x2066 && r <= 0x2069 {
			t.Errorf("AppendString(%q) lets %U through", s, r)
		}
	}
}

func TestEncodingAllocatesNothing(t *testing.T) {
	rec, buf := fullRecord(), make([]byte, 0, 4096)
	n := testing.AllocsPerRun(100, func() {
		buf = telemetry.AppendDecision(buf[:0], rec, "REF")
		buf = telemetry.AppendOutcome(buf, rec)
	})
	if n != 0 {
		t.Errorf("AppendDecision and AppendOutcome allocate %v times", n)
	}
}

func BenchmarkAppendDecision(b *testing.B) {
	rec, buf := fullRecord(), make([]byte, 0, 4096)
	b.ReportAllocs()
	for b.Loop() {
		buf = telemetry.AppendDecision(buf[:0], rec, "REF")
	}
}
