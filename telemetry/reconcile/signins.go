package reconcile

import (
	"context"
	"io"
	"time"

	"github.com/partnerguard/partnerguard/telemetry/store"
)

// SignIns is what Entra's sign-in logs say about the calls without MFA, and about
// those who sign in to Partner Center and never pass the guard. Its JSON names are a
// contract.
type SignIns struct {
	Version int          `json:"version"`
	Made    time.Time    `json:"made"`
	Files   []SignInFile `json:"files"`
	Since   time.Time    `json:"since,omitzero"` // of the oldest row
	Until   time.Time    `json:"until,omitzero"` // of the latest row
	Rows    SignInRows   `json:"rows"`
	// Pseudonymous says that each UserID is a user_ref; what is kept has no User then.
	Pseudonymous bool         `json:"pseudonymous,omitempty"`
	Skipped      []SkippedRow `json:"skipped,omitempty"` // the first 10
	// Incomplete says that the export lacks a part. Then nothing that is missing here
	// is known not to be.
	Incomplete bool `json:"incomplete"`

	// Integrations are those with calls without MFA in the time of the export, and those
	// whose sign-ins fail by now.
	Integrations []SignInIntegration `json:"integrations"`
	// Strangers signed in to Partner Center without MFA and never passed the guard.
	Strangers     []Stranger `json:"strangers"`                // at most 1,000
	MoreStrangers int64      `json:"more_strangers,omitempty"` // beyond Strangers
	Notes         []string   `json:"notes,omitempty"`          // what the numbers cannot say
}

// SignInFile is a file that was read.
type SignInFile struct {
	Name   string `json:"name"`
	Format string `json:"format"`
	Rows   int64  `json:"rows"`
}

// SignInRows counts the rows of the export. Read is the sum of the others.
type SignInRows struct {
	Read    int64 `json:"read"`
	Kept    int64 `json:"kept"`    // sign-ins to Partner Center, or of tokens that the guard saw
	Dropped int64 `json:"dropped"` // sign-ins to other APIs
	Skipped int64 `json:"skipped"` // not understood
}

// SkippedRow says which row was left out and why.
type SkippedRow struct {
	File   string `json:"file"`
	Row    int64  `json:"row"`  // from 1, without a header
	Line   int64  `json:"line"` // from 1
	Reason string `json:"reason"`
}

// SignInIntegration is what the log says about an integration. Tokens are those of
// calls that lack MFA, or that Microsoft refused for that or for their audience.
type SignInIntegration struct {
	Name     string          `json:"name"`
	Owner    string          `json:"owner,omitempty"`
	Calls    int64           `json:"calls"`
	Tokens   int64           `json:"tokens"`    // with an id (uti); the sum of the next four
	ByUTI    int64           `json:"by_uti"`    // whose sign-in is in the log
	ByTime   int64           `json:"by_time"`   // with a sign-in of the same app and user about then
	NotFound int64           `json:"not_found"` // issued in the time of the log, which has no sign-in for them
	Outside  int64           `json:"outside"`   // issued before the log begins or after it ends
	Causes   []SignInCause   `json:"causes"`    // the best explanation first
	Failures []SignInFailure `json:"failures"`  // sign-ins that fail and did not succeed since
}

// SignInCause explains, with the evidence and the way out.
type SignInCause struct {
	Cause      string      `json:"cause"` // a stable code: policy.Cause's, or one that only the log shows
	Text       string      `json:"text"`
	Confidence string      `json:"confidence"` // certain when a sign-in joined by uti shows it
	Fix        string      `json:"fix"`
	Tokens     int64       `json:"tokens,omitempty"`
	Calls      int64       `json:"calls,omitempty"`    // without MFA, of the apps and users whose tokens show it
	SignIns    int64       `json:"sign_ins,omitempty"` // of a stranger
	Evidence   []Evidence  `json:"evidence"`           // at most 8; empty for a mere candidate
	Principals []Principal `json:"principals,omitempty"`
	// SignIn is the request id of the latest sign-in that shows it, to look it up in
	// the log, and At when it was.
	SignIn string    `json:"sign_in,omitempty"`
	At     time.Time `json:"at,omitzero"`
}

// Principal is who signs in.
type Principal struct {
	AppID  string `json:"app_id"`
	UserID string `json:"user_id,omitempty"`
	User   string `json:"user,omitempty"` // the name, as far as it is known
}

// SignInFailure is an error that the sign-ins of an integration end with.
type SignInFailure struct {
	Code       int         `json:"code"` // of AADSTS; -1 when the export does not say
	Text       string      `json:"text"`
	Fix        string      `json:"fix,omitempty"`
	Count      int64       `json:"count"`
	First      time.Time   `json:"first"`
	Last       time.Time   `json:"last"`
	Principals []Principal `json:"principals"` // at most 10
}

// Stranger signs in to Partner Center without MFA, and none of its calls passed the
// guard.
type Stranger struct {
	AppID  string `json:"app_id"`
	App    string `json:"app,omitempty"`
	UserID string `json:"user_id"`
	User   string `json:"user,omitempty"`
	// FirstParty says that the application is Microsoft's own, which anyone may use.
	FirstParty bool `json:"first_party,omitempty"`
	// Seen is "app" when other users of the application passed the guard, "user" when
	// the user did with other applications, "app+user" for both.
	Seen         string        `json:"seen,omitempty"`
	SignIns      int64         `json:"sign_ins"`      // that succeeded
	SingleFactor int64         `json:"single_factor"` // of them without MFA
	First        time.Time     `json:"first"`
	Last         time.Time     `json:"last"`
	Addresses    []string      `json:"addresses,omitempty"` // the first 5 that it signed in from
	Causes       []SignInCause `json:"causes"`
}

// Findings reports whether there is anything to act on.
func (s *SignIns) Findings() bool { return len(s.Integrations)+len(s.Strangers) > 0 }

// CallRecords are the calls that the sign-ins are compared with, in sums and tokens:
// single calls may be many millions. store.Reader reads them.
type CallRecords interface {
	Tokens(ctx context.Context, since, until time.Time, yield func(store.Token) error) error
	Sums(ctx context.Context, since, until time.Time) ([]store.Sum, error)
	Identities(ctx context.Context) (map[string]store.Identity, error)
	Instances(ctx context.Context) ([]store.Instance, error)
}

// SignInConfig says what to compare.
type SignInConfig struct {
	Records CallRecords   // required; read before the first of Inputs is opened
	Inputs  []SignInInput // required
	// Since is how far to look back for calls. Zero is 30 days before Now: Entra keeps
	// sign-ins no longer.
	Since time.Time
	Now   time.Time // required
	// UserRef, if not nil, is the user_ref of a user. By that users are known then, and
	// SaveSignIns keeps nothing else about them.
	UserRef func(tenantID, objectID string) string
	// Progress, if not nil, is told now and then how far the work is, by the goroutine
	// that called ReadSignIns.
	Progress func(SignInProgress)
}

// SignInInput is a file of an export: JSON or CSV, as it is or compressed with gzip.
type SignInInput struct {
	Name string
	Open func() (io.ReadCloser, error)
}

// SignInProgress is how far ReadSignIns is. Before the first file it reads the
// guard's own calls, and File is empty.
type SignInProgress struct {
	File  string
	Bytes int64 // of File
	Rows  int64 // of all files; before the first, calls
}

const (
	maxTokens     = 1 << 16 // tokens that are looked up in the log
	maxCallers    = 50_000  // applications and users that are known to pass the guard
	maxGroups     = 10_000
	maxSums       = 5_000 // to be read at once, about
	maxShown      = 4096
	maxStrangers  = 10_000 // while reading
	maxKept       = 1_000  // strangers in the result
	maxSkipped    = 10
	maxEvidence   = 8
	maxPrincipals = 10
	maxAddresses  = 5

	// A sign-in and a token of the same application and user belong together when the
	// sign-in is at most so much older or newer than the token's iat.
	signInBefore = 5 * time.Minute
	signInAfter  = time.Minute
)

// ReadSignIns compares the sign-ins of an export with the calls that passed the
// guard. It keeps some 40 MiB at most, however long the export is and however many
// calls there are. The error is an *InputError when a file is no sign-in export; with
// an error there is no result.
func ReadSignIns(ctx context.Context, cfg SignInConfig) (*SignIns, error) {
	j := newJoin(cfg)
	if err := j.readCallers(ctx); err != nil {
		return nil, err
	}
	if err := j.readTokens(ctx); err != nil {
		return nil, err
	}
	for _, in := range cfg.Inputs {
		if err := j.readInput(ctx, in); err != nil {
			return nil, err
		}
	}
	return j.result(), nil
}
