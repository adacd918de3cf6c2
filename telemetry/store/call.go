package store

import (
	"time"

	"github.com/partnerguard/partnerguard/policy"
	"github.com/partnerguard/partnerguard/telemetry/ledger"
)

// Call is one call as the ledger tells it, decision and outcome joined. Its JSON
// names are those of the ledger's lines; what is not known is absent.
type Call struct {
	ID string `json:"call"`
	Decided
	Finished

	// Finish is the ledger number that ended the call: that of its outcome, or of
	// its decision when it was interrupted without one. 0 while the call is open.
	// It grows with every call that ends, so that a reader can go on where it was.
	Finish uint64 `json:"-"`
}

// Decided is what a decision line says.
type Decided struct {
	Time          time.Time `json:"time,omitzero"` // when the call began, UTC, in microseconds
	Instance      string    `json:"instance,omitzero"`
	Generation    int64     `json:"generation,omitzero"`
	Listener      string    `json:"listener,omitzero"`
	Peer          string    `json:"peer,omitzero"`
	Method        string    `json:"method,omitzero"`
	Route         string    `json:"route,omitzero"`
	Path          string    `json:"path,omitzero"`
	QueryNames    []string  `json:"query_names,omitempty"`
	Upstream      string    `json:"upstream,omitzero"`
	Integration   string    `json:"integration,omitzero"`
	Evidence      string    `json:"evidence,omitzero"`
	Owner         string    `json:"owner,omitzero"`
	Customer      string    `json:"customer,omitzero"`
	Kind          string    `json:"kind,omitzero"`
	Verified      bool      `json:"verified"`
	TenantID      string    `json:"tid,omitzero"`
	AppID         string    `json:"app_id,omitzero"`
	UserRef       string    `json:"user_ref,omitzero"`
	UTI           string    `json:"uti,omitzero"`
	IssuedAt      int64     `json:"iat,omitzero"` // seconds since 1970
	ExpiresAt     int64     `json:"exp,omitzero"` // seconds since 1970
	AMR           []string  `json:"amr,omitempty"`
	MFA           string    `json:"mfa,omitzero"`
	Mode          string    `json:"mode,omitzero"`
	Rule          string    `json:"rule,omitzero"`
	Effect        string    `json:"effect,omitzero"`
	Reason        string    `json:"reason,omitzero"`
	WouldReject   bool      `json:"would_reject"`
	RequestID     string    `json:"request_id,omitzero"`
	CorrelationID string    `json:"correlation_id,omitzero"`
	Application   string    `json:"application,omitzero"`
	UserAgent     string    `json:"user_agent,omitzero"`
}

// Finished is what an outcome line says. It is zero while the call is open.
type Finished struct {
	Status                int64   `json:"status,omitzero"`
	Rejection             string  `json:"rejection,omitzero"`
	Code                  string  `json:"code,omitzero"`
	UpstreamStatus        string  `json:"upstream_status,omitzero"`
	MFACompliant          *bool   `json:"mfa_compliant,omitempty"`
	UpstreamRequestID     string  `json:"upstream_request_id,omitzero"`
	UpstreamCorrelationID string  `json:"upstream_correlation_id,omitzero"`
	BytesIn               int64   `json:"bytes_in,omitzero"`
	BytesOut              int64   `json:"bytes_out,omitzero"`
	DurationMS            float64 `json:"duration_ms,omitzero"`
	UpstreamMS            float64 `json:"upstream_ms,omitzero"`
	Replays               int64   `json:"replays,omitzero"`
	Error                 string  `json:"error,omitzero"`
}

// Identity is whom a user_ref stands for.
type Identity = ledger.Identity

// Interrupted is the Error of a call whose outcome nobody saw.
const Interrupted = "interrupted"

// Open reports whether the call has no outcome yet.
func (c *Call) Open() bool { return c.Finish == 0 }

// Token is as much of the call's token as the record holds, for policy.Diagnose.
func (c *Call) Token() policy.Token {
	return token(c.Verified, c.Kind, c.MFA, c.TenantID, c.AppID, c.AMR)
}

func token(verified bool, kind, mfa, tid, app string, amr []string) policy.Token {
	t := policy.Token{Verified: verified, TenantID: tid, AppID: app, AMR: amr}
	for k := policy.KindUndecided; k <= policy.KindOpaque; k++ {
		if k.String() == kind {
			t.Kind = k
		}
	}
	for m := policy.MFAUnknown; m <= policy.MFANotApplicable; m++ {
		if m.String() == mfa {
			t.MFA = m
		}
	}
	return t
}
