package policy_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"slices"
	"strconv"
	"testing"

	. "github.com/partnerguard/partnerguard/policy"
)

func TestStatus(t *testing.T) {
	want := map[Reason]int{
		ReasonMFAPresent: 200, ReasonAppOnly: 200,
		ReasonKeysUnavailable: 503, ReasonVerifyOverloaded: 503, ReasonInternalError: 503, ReasonLedgerUnavailable: 503,
		ReasonRequestAmbiguous: 400, ReasonMethodRefused: 405, ReasonIntegrationUnknown: 404, ReasonLimitExceeded: 429,
		ReasonUpstreamUnreachable: 502, ReasonUpstreamTimeout: 504, ReasonUpstreamCircuitOpen: 503,
	}
	for _, r := range Reasons() {
		status, other := want[r]
		if !other {
			status = 401
		}
		if got := r.Status(); got != status {
			t.Errorf("%s: status %d, want %d", r, got, status)
		}
	}
	if got := Reason("").Status(); got < 400 {
		t.Errorf("no reason: status %d, want a refusal", got)
	}
}

func TestKindsOfReasons(t *testing.T) {
	good := []Reason{ReasonMFAPresent, ReasonAppOnly}
	unverifiable := []Reason{ReasonTokenOpaque, ReasonTokenEncrypted, ReasonTokenGraphNonce}
	infrastructure := []Reason{ReasonKeysUnavailable, ReasonVerifyOverloaded, ReasonInternalError, ReasonLedgerUnavailable}
	for _, r := range Reasons() {
		if got, want := r.Good(), slices.Contains(good, r); got != want {
			t.Errorf("%s: Good = %v, want %v", r, got, want)
		}
		if got, want := r.Unverifiable(), slices.Contains(unverifiable, r); got != want {
			t.Errorf("%s: Unverifiable = %v, want %v", r, got, want)
		}
		if got, want := r.Infrastructure(), slices.Contains(infrastructure, r); got != want {
			t.Errorf("%s: Infrastructure = %v, want %v", r, got, want)
		}
	}
}

// The codes are a contract: logs, metrics, headers and records hold them.
func TestReasonsAreThoseOfTheContract(t *testing.T) {
	want := []Reason{
		"mfa_present", "app_only", "mfa_missing", "mfa_unknown",
		"token_missing", "token_malformed", "token_too_long", "token_missing_kid", "token_critical_header",
		"token_duplicate_claim", "token_unsupported_algorithm", "token_expired", "token_not_yet_valid",
		"token_wrong_audience", "token_wrong_issuer", "token_wrong_tenant", "token_bad_signature", "token_unknown_key",
		"token_opaque", "token_encrypted", "token_graph_nonce",
		"keys_unavailable", "verify_overloaded", "internal_error", "ledger_unavailable",
		"request_ambiguous", "method_refused", "integration_unknown", "limit_exceeded",
		"upstream_unreachable", "upstream_timeout", "upstream_circuit_open",
	}
	if got := Reasons(); !slices.Equal(got, want) {
		t.Errorf("Reasons = %v\nwant %v", got, want)
	}
	for _, r := range constantsOf(t, "reason.go", "Reason") {
		if !slices.Contains(Reasons(), Reason(r)) {
			t.Errorf("Reasons lacks %s", r)
		}
	}
}

// constantsOf are the values of file's string constants of a type, so that a list
// cannot forget one.
func constantsOf(t *testing.T, file, typ string) (values []string) {
	t.Helper()
	f, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	ast.Inspect(f, func(n ast.Node) bool {
		spec, ok := n.(*ast.ValueSpec)
		if !ok {
			return true
		}
		if id, ok := spec.Type.(*ast.Ident); ok && id.Name == typ {
			for _, v := range spec.Values {
				if lit, ok := v.(*ast.BasicLit); ok {
					s, err := strconv.Unquote(lit.Value)
					if err != nil {
						t.Fatal(err)
					}
					values = append(values, s)
				}
			}
		}
		return true
	})
	if len(values) == 0 {
		t.Fatalf("%s has no constants of type %s", file, typ)
	}
	return values
}
