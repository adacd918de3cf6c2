package policy_test

import (
	"errors"
	"slices"
	"testing"

	. "github.com/partnerguard/partnerguard/policy"
)

func TestJudgeMFA(t *testing.T) {
	amr := func(v ...string) []string { return v }
	for _, tt := range []struct {
		name    string
		version string
		form    AMRForm
		amr     []string
		want    MFA
	}{
		{"mfa among others", "1.0", AMRStrings, amr("pwd", "mfa"), MFAPresent},
		{"mfa first", "1.0", AMRStrings, amr("mfa", "rsa"), MFAPresent},
		{"ngcmfa", "1.0", AMRStrings, amr("ngcmfa"), MFAPresent},
		{"federated with mfa", "1.0", AMRStrings, amr("fed", "mfa"), MFAPresent},
		{"a password alone", "1.0", AMRStrings, amr("pwd"), MFAAbsent},
		{"strong single factors", "1.0", AMRStrings, amr("rsa", "fido", "otp"), MFAAbsent},
		{"federated", "1.0", AMRStrings, amr("fed", "wia"), MFAAbsent},
		{"wiaormfa is not accepted by default", "1.0", AMRStrings, amr("wiaormfa"), MFAAbsent},
		{"MFA in capitals is another value", "1.0", AMRStrings, amr("MFA"), MFAAbsent},
		{"a value that only ends in mfa", "1.0", AMRStrings, amr("xmfa", "mfa ", "nomfa"), MFAAbsent},
		{"an empty value", "1.0", AMRStrings, amr(""), MFAAbsent},
		{"an empty array", "1.0", AMRStrings, nil, MFAAbsent},
		{"no amr, or null, in v1", "1.0", AMRMissing, nil, MFAAbsent},
		{"no amr in v2, where none is documented", "2.0", AMRMissing, nil, MFAUnknown},
		{"v2 with mfa", "2.0", AMRStrings, amr("mfa"), MFAPresent},
		{"v2 with a password", "2.0", AMRStrings, amr("pwd"), MFAAbsent},
		{"no array of strings", "1.0", AMRMalformed, nil, MFAUnknown},
		{"mfa beside an element that is no string", "1.0", AMRMalformed, amr("mfa"), MFAUnknown},
		{"no array of strings in v2", "2.0", AMRMalformed, amr("mfa"), MFAUnknown},
	} {
		if got := JudgeMFA(tt.version, tt.form, tt.amr, DefaultMFAValues()); got != tt.want {
			t.Errorf("%s: JudgeMFA(%s, %d, %q) = %s, want %s", tt.name, tt.version, tt.form, tt.amr, got, tt.want)
		}
	}
	if got := JudgeMFA("1.0", AMRStrings, amr("wiaormfa"), amr("mfa", "wiaormfa")); got != MFAPresent {
		t.Errorf("wiaormfa where it is configured = %s, want present", got)
	}
	if got := JudgeMFA("1.0", AMRStrings, amr("ngcmfa"), amr("mfa")); got != MFAAbsent {
		t.Errorf("ngcmfa where only mfa is configured = %s, want absent", got)
	}
	if got := JudgeMFA("1.0", AMRStrings, amr("mfa"), nil); got != MFAAbsent {
		t.Errorf("mfa where nothing is accepted = %s, want absent", got)
	}
}

func TestMFAValues(t *testing.T) {
	if got, want := DefaultMFAValues(), []string{"mfa", "ngcmfa"}; !slices.Equal(got, want) {
		t.Errorf("DefaultMFAValues = %q, want %q", got, want)
	}
	if got, want := AllowedMFAValues(), []string{"mfa", "ngcmfa", "wiaormfa"}; !slices.Equal(got, want) {
		t.Errorf("AllowedMFAValues = %q, want %q", got, want)
	}
	DefaultMFAValues()[0] = "pwd"
	if got := DefaultMFAValues()[0]; got != "mfa" {
		t.Errorf("a caller changed the default to %q", got)
	}
}

func TestWordsOfATokenAreThoseOfTheRecord(t *testing.T) {
	for k, want := range map[Kind]string{KindUndecided: "undecided", KindAppUser: "app_user", KindAppOnly: "app_only", KindOpaque: "opaque"} {
		if got := k.String(); got != want {
			t.Errorf("Kind %d = %q, want %q", k, got, want)
		}
	}
	for m, want := range map[MFA]string{MFAUnknown: "unknown", MFAAbsent: "absent", MFAPresent: "present", MFANotApplicable: "not_applicable"} {
		if got := m.String(); got != want {
			t.Errorf("MFA %d = %q, want %q", m, got, want)
		}
	}
}

func TestTokenErrorSaysReasonAndCause(t *testing.T) {
	cause := errors.New("segment 2 is no base64")
	err := error(&TokenError{Reason: ReasonTokenMalformed, Err: cause})
	if got, want := err.Error(), "token_malformed: segment 2 is no base64"; got != want {
		t.Errorf("Error = %q, want %q", got, want)
	}
	if !errors.Is(err, cause) {
		t.Errorf("%v does not unwrap to its cause", err)
	}
	if got, want := (&TokenError{Reason: ReasonTokenExpired}).Error(), "token_expired"; got != want {
		t.Errorf("Error = %q, want %q", got, want)
	}
}
