package proxy

import (
	"encoding/binary"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/partnerguard/partnerguard/policy"
)

// CallID names one call: a UUIDv7, so that ids sort by time.
type CallID = uuid.UUID

// newCallID makes a UUIDv7 (RFC 9562 section 5.7): the time, then a number that goes on
// from a random one (section 6.2). It is unique and in order, not secret; what neighbours
// share costs the compressed ledger nothing.
func newCallID(now time.Time) CallID {
	var id CallID
	binary.BigEndian.PutUint64(id[:8], uint64(now.UnixMilli())<<16|7<<12|process)
	binary.BigEndian.PutUint64(id[8:], 1<<63|lastCall.Add(1)<<2>>2)
	return id
}

// process is 12 random bits more.
var process = rand.Uint64N(1 << 12)

// lastCall begins somewhere in 62 bits, so that no two processes meet.
var lastCall = func() *atomic.Uint64 {
	n := new(atomic.Uint64)
	n.Store(rand.Uint64())
	return n
}()

// Record is the account of one call. The ledger, the log line, the span and the
// metrics are all read from it. It is complete up to Decided when the ledger gets
// the decision, and up to Finished when it gets the outcome; the same Record
// serves both. Strings that came from outside are already bounded in length (2 KiB
// for Path, 128 for ids, 256 for others) and hold no query values, no token and no
// body. A Record must not be kept after the call that was given it returns.
type Record struct {
	Decided
	Finished

	// Encoded is for the Ledger and the Observer, which write the same decision: as
	// the first of them wrote it. The guard empties it when it changes the decision.
	Encoded []byte
}

// Decided is what is known when the call is decided.
type Decided struct {
	Call       CallID
	Time       time.Time // UTC
	Instance   string    // name of this guard
	Generation uint64    // of the configuration that decided, from 1
	Listener   string
	Peer       string // IP address of the TCP peer
	Method     string
	Path       string   // as it goes upstream, without the query
	Route      string   // documented template, empty when the table lacks it
	QueryNames []string // names only, never values
	Upstream   string   // name of the upstream: partner-center

	Integration string // bounded set of values, fit for a metric label
	Evidence    string
	Owner       string
	Customer    string // customer tenant named in the path

	// Token is what the token says; Token.Verified tells whether that is proven or
	// only claimed.
	Token policy.Token

	policy.Decision

	RequestID     string // MS-RequestId as it goes upstream
	CorrelationID string // MS-CorrelationId as it goes upstream
	Application   string // MS-PartnerCenter-Application
	UserAgent     string
}

// Finished is what is known when the call is over.
type Finished struct {
	Status                int // that the client got; 0 when it got none
	Rejection             policy.Rejection
	Code                  string           // error code of Microsoft's refusal, as text
	UpstreamStatus        string           // status line of a refusal, "401 Unauthorized - MFA required"
	MFACompliant          policy.Compliant // isMfaCompliant, as far as Microsoft said
	UpstreamRequestID     string
	UpstreamCorrelationID string
	BytesIn, BytesOut     int64         // body bytes: from the client, to the client
	Duration              time.Duration // begin to end of the call
	UpstreamTime          time.Duration // until Microsoft's response header; 0 when nothing was sent
	Replays               int           // times net/http sent it again over a fresh connection
	// Error says how the call failed, if it did: a Reason such as
	// upstream_unreachable, or client_canceled, upstream_aborted, interrupted.
	Error string
}
