// Package proxy is the Guard: the one path of a call from the client through
// verification and decision to Microsoft and back, and the account of it.
//
// The path is a single function, (*Guard).serve, in the order in which things
// happen. It buffers no body, repeats no call, and answers every call exactly
// once; what it learned on the way is one Record.
package proxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/partnerguard/partnerguard/policy"
)

// Guard carries calls. It is safe for concurrent use; make it with New. It lives as
// long as the process: Swap gives it other Settings while calls are in flight.
type Guard struct {
	ledger   Ledger
	observer Observer
	instance string
	now      func() time.Time
	onPanic  func(kind string, stack []byte)

	settings atomic.Pointer[settings]
	swapping sync.Mutex // one Swap at a time
	names    autoNames
	inFlight inFlight
}

// Config is what New needs. Ledger, Observer and Settings are required.
type Config struct {
	Ledger   Ledger
	Observer Observer
	Settings Settings
	Instance string           // name of this guard, in every record
	Now      func() time.Time // nil is time.Now
	// OnPanic is told of a panic that the guard caught: a mistake in this program. The
	// call got ReasonInternalError. kind is the type of its value, or the text of a
	// runtime error: any other value could hold what must not be written. It must not
	// block. Nil ignores it.
	OnPanic func(kind string, stack []byte)
}

// Verifier tells what a bearer token says.
type Verifier interface {
	// Verify returns the token if it is valid for one of the audiences. Errors are
	// *policy.TokenError; any other is taken for policy.ReasonInternalError.
	Verify(ctx context.Context, raw string, audiences []string) (policy.Token, error)
}

// Ledger keeps the account of calls. Neither method may keep rec.
type Ledger interface {
	// Decide returns once rec's decision survives the death of this process.
	Decide(rec *Record) error
	// Finish adds the outcome of a call that Decide was asked to keep.
	Finish(rec *Record) error
}

// Observer is told of every finished call: for metrics, the span in ctx, and the
// log. unrecorded is why the ledger lacks the call, wholly or in part, if it does.
// It must not block and must not keep rec.
type Observer interface {
	Observe(ctx context.Context, rec *Record, unrecorded error)
}

// ValidateMFA says which app+user calls get the request header ValidateMfa: true,
// to which Microsoft answers with isMfaCompliant.
type ValidateMFA uint8

const (
	ValidateOff ValidateMFA = iota
	ValidateReads
	ValidateAll
)

// New checks cfg and returns a Guard.
func New(cfg Config) (*Guard, error) {
	switch {
	case cfg.Ledger == nil:
		return nil, errors.New("proxy: Config.Ledger is required")
	case cfg.Observer == nil:
		return nil, errors.New("proxy: Config.Observer is required")
	}
	s, err := newSettings(cfg.Settings)
	if err != nil {
		return nil, err
	}
	g := &Guard{ledger: cfg.Ledger, observer: cfg.Observer, instance: cfg.Instance, now: cfg.Now, onPanic: cfg.OnPanic}
	if g.now == nil {
		g.now = time.Now
	}
	g.settings.Store(s)
	return g, nil
}

// Handler returns the handler of the listener with that name in the Settings; of one
// that they lack, it refuses to serve. It must be the server's whole handler: a mux in
// front would clean and redirect paths.
func (g *Guard) Handler(listener string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s := g.acquire()
		defer s.release()
		l, ok := s.listeners[listener]
		if !ok {
			panic(http.ErrAbortHandler) // a socket that no configuration knows
		}
		up := l.upstream
		if other := s.hosts[hostName(r.Host)]; other != nil {
			up = other
		}
		g.serve(w, r, s, l, up)
	})
}

// serve is the path of a call.
func (g *Guard) serve(w http.ResponseWriter, r *http.Request, s *settings, l listener, up *Upstream) {
	c := g.begin(w, r, s, l, up)
	defer g.finish(c)

	g.judge(c)
	g.admit(c)

	if err := g.ledger.Decide(&c.rec); err != nil {
		c.unrecorded = err
		if s.NeedLedger && c.rec.Effect != policy.Reject {
			c.rec.Effect, c.rec.Reason = policy.Reject, policy.ReasonLedgerUnavailable
			c.rec.Encoded = c.rec.Encoded[:0]
		}
	}
	if c.rec.Effect == policy.Reject {
		g.refuse(c, c.rec.Reason)
		return
	}
	g.forward(c)
}

// call is the state of one call. It is used again once the handler is done; what
// the transport's goroutines may hold on to for longer (body, sends) is not part of
// it.
type call struct {
	http.ResponseWriter // the client's
	in                  *http.Request
	settings            *settings
	upstream            *Upstream
	rec                 Record
	facts               policy.Call

	target     string // request-target for the upstream, byte for byte
	bearer     string
	askedMFA   bool // the client itself asked for isMfaCompliant
	links      *linkRule
	unrecorded error // why the ledger lacks the call

	entered     inFlightKey // counted as in flight; zero is not
	wroteHeader bool
	writes      int
	writing     *stall
	writeErr    error // of a write to the client
	body        *requestBody
	duplex      bool // the body may go on while the answer does
	unread      bool // the answer began before the body ended
	answer      *answerCopy
	sent        time.Time
	sends       *atomic.Int32 // times the request header went out
	report      func(error)   // tells the breaker
	ownListener bool          // the upstream's address turned out to be ours
}

var calls = sync.Pool{New: func() any { return new(call) }}

// begin reads what the request shows before any of it is trusted.
func (g *Guard) begin(w http.ResponseWriter, r *http.Request, s *settings, l listener, up *Upstream) *call {
	c := calls.Get().(*call)
	*c = call{ResponseWriter: w, in: r, settings: s, upstream: up, rec: Record{Encoded: c.rec.Encoded[:0]}}
	rec, facts := &c.rec, &c.facts
	now := g.now().UTC()
	rec.Call, rec.Time, rec.Instance, rec.Generation = newCallID(now), now, g.instance, s.Generation
	rec.Listener, rec.Upstream, rec.Method = l.Name, up.name, clip(r.Method, maxText)
	stripOurs(r.Header)
	// A trailer could repeat any header after the decision; nothing needs them.
	r.Trailer = nil
	r.Header.Del("Upgrade")

	facts.Time, facts.Method = now, r.Method
	e := &facts.Evidence
	e.Listener, e.ListenerIntegration = l.Name, l.Integration
	if peer, err := netip.ParseAddrPort(r.RemoteAddr); err == nil {
		e.Peer = peer.Addr().Unmap()
		rec.Peer = e.Peer.String()
	}
	e.ClientCert = certificateNames(r.TLS)
	e.Host = hostName(r.Host)
	e.Application = headerValue(r.Header, "Ms-Partnercenter-Application")
	e.UserAgent = headerValue(r.Header, "User-Agent")
	rec.Application, rec.UserAgent = clip(e.Application, maxText), clip(e.UserAgent, maxText)

	g.readTarget(c)
	g.readBearer(c)
	c.identify()
	_, c.askedMFA = r.Header["Validatemfa"]
	if r.Body != nil && r.Body != http.NoBody {
		// On a copy: the server knows by its own request's Body that a client still
		// waits for 100 Continue, and must then neither wait for the body nor use
		// the connection again.
		c.body = &requestBody{ReadCloser: r.Body, stall: readStall(w, s.BodyTimeout)}
		c.in = r.WithContext(r.Context())
		c.in.Body = c.body
	}
	return c
}

// judge verifies, attributes and decides. A panic on the way is a Reason of its
// own and lets nothing through that anything but audit would stop.
func (g *Guard) judge(c *call) {
	defer func() {
		if p := recover(); p != nil {
			g.caught(p)
			c.rec.Decision = policy.Decision{Reason: policy.ReasonInternalError, Mode: policy.Enforce, WouldReject: true}
			if c.settings.Policy.AuditOnly() {
				c.rec.Mode, c.rec.Effect = policy.Audit, policy.Allow
			}
		}
		if c.rec.Integration == "" {
			c.rec.Integration = policy.Unknown
		}
	}()
	rec, facts := &c.rec, &c.facts

	if facts.Refusal == "" {
		facts.Token, facts.TokenReason = g.verify(c)
		rec.Token = facts.Token
	}
	facts.Attribution = c.settings.Policy.Attribute(facts)
	rec.Integration = g.names.bound(facts.Attribution.Name)
	rec.Evidence, rec.Owner = facts.Attribution.Evidence, facts.Attribution.Owner
	if facts.Refusal == "" && facts.Evidence.Prefix != "" && !c.settings.Policy.KnowsPrefix(facts.Evidence.Prefix) {
		facts.Refusal = policy.ReasonIntegrationUnknown
	}
	rec.Decision = c.settings.Policy.Decide(facts)
}

// verify reads the bearer token.
func (g *Guard) verify(c *call) (t policy.Token, reason policy.Reason) {
	if c.bearer == "" {
		return policy.Token{}, policy.ReasonTokenMissing
	}
	defer func() {
		if p := recover(); p != nil {
			g.caught(p)
			t, reason = policy.Token{}, policy.ReasonInternalError
		}
	}()
	t, err := c.settings.Verifier.Verify(c.in.Context(), c.bearer, c.upstream.audiences)
	if err == nil {
		t.Verified = true
		return t, ""
	}
	var te *policy.TokenError
	if !errors.As(err, &te) || te.Reason == "" {
		return policy.Token{}, policy.ReasonInternalError
	}
	te.Claimed.Verified = false
	if te.Reason == policy.ReasonTokenOpaque || te.Reason == policy.ReasonTokenEncrypted {
		te.Claimed.Kind = policy.KindOpaque
	}
	return te.Claimed, te.Reason
}

// finish closes the account of the call, however it ended.
func (g *Guard) finish(c *call) {
	panicked := recover()
	rec := &c.rec
	if panicked != nil && panicked != http.ErrAbortHandler {
		g.caught(panicked)
	}
	aborted := panicked != nil && (c.wroteHeader || panicked == http.ErrAbortHandler)
	if panicked != nil && !aborted {
		// A mistake of ours before anything was said: say so in our own words.
		rec.Error = string(policy.ReasonInternalError)
		g.refuse(c, policy.ReasonInternalError)
	}
	rec.Duration = g.now().Sub(rec.Time)
	if c.body != nil {
		rec.BytesIn = c.body.n.Load()
	}
	if c.sends != nil {
		rec.Replays = max(0, int(c.sends.Load())-1)
	}
	if c.answer != nil {
		rec.Rejection, rec.Code = readRejection(rec.Status, rec.UpstreamStatus, c.answer.header, c.answer.bytes())
	}
	stalled := c.writing.stalled() || c.body != nil && c.body.stall.stalled()
	switch {
	case aborted && stalled:
		rec.Error = errorClientStalled
	case aborted && rec.Error == "" && (c.in.Context().Err() != nil || c.writeErr != nil):
		rec.Error = errorClientCanceled
	case aborted && rec.Error == "":
		rec.Error = errorUpstreamAborted
	case c.writing.stalled():
		// Time was up just as the last write went through: free the connection of it.
		http.NewResponseController(c.ResponseWriter).SetWriteDeadline(time.Time{})
	}
	if c.report != nil {
		c.report(errNeutral) // only counts where nothing was reported before
	}
	if c.entered != (inFlightKey{}) {
		g.inFlight.leave(c.entered)
	}
	// A call whose decision was lost is still told, so that the gap counts it.
	if err := g.ledger.Finish(rec); c.unrecorded == nil {
		c.unrecorded = err
	}
	g.observer.Observe(c.in.Context(), rec, c.unrecorded)
	if c.unread && !aborted {
		c.body.stop(c.ResponseWriter)
		if !c.body.ended.Load() {
			// net/http now reads what is left, so that the client gets its answer before
			// the connection ends; it would wait for it for ever.
			http.NewResponseController(c.ResponseWriter).SetReadDeadline(time.Now().Add(lastRead))
			c.linger()
		}
	}
	if aborted {
		c.cut()
	}
	calls.Put(c)
	if aborted {
		// The client must see a broken transfer, never a clean short answer.
		panic(http.ErrAbortHandler)
	}
}

// lastRead is how long the rest of a body may take whose call has been answered.
const lastRead = 5 * time.Second

// linger lets net/http close its half of the connection half a second before the rest:
// it cannot always read what is left, and a reset would take the answer from the client.
// It does so of itself where a body is longer than a limit, and of that it is told here.
func (c *call) linger() {
	w := c.ResponseWriter
	for {
		u, ok := w.(interface{ Unwrap() http.ResponseWriter })
		if !ok {
			break
		}
		w = u.Unwrap()
	}
	http.MaxBytesReader(w, io.NopCloser(strings.NewReader("-")), 0).Read(make([]byte, 1))
}

// caught tells of a panic. The stack is that of the panic: deferred calls run on it.
func (g *Guard) caught(value any) {
	if g.onPanic == nil {
		return
	}
	kind := fmt.Sprintf("%T", value)
	if e, ok := value.(runtime.Error); ok {
		kind = e.Error()
	}
	g.onPanic(kind, debug.Stack())
}

// Words of Record.Error besides the reasons.
const (
	errorClientCanceled  = "client_canceled"  // the client hung up
	errorClientStalled   = "client_stalled"   // no byte of a body moved for Settings.BodyTimeout
	errorUpstreamAborted = "upstream_aborted" // the upstream broke off in the middle of its answer
)

// autoNames bounds the names that callers get from their verified app id.
type autoNames struct {
	mu    sync.RWMutex
	known map[string]struct{}
}

const maxAutoNames = 1000

// bound returns name, or policy.Other once there are too many made-up names.
func (a *autoNames) bound(name string) string {
	if len(name) != len("app-")+36 || name[:4] != "app-" {
		return name
	}
	a.mu.RLock()
	_, ok := a.known[name]
	a.mu.RUnlock()
	if ok {
		return name
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.known) >= maxAutoNames {
		return policy.Other
	}
	if a.known == nil {
		a.known = map[string]struct{}{}
	}
	a.known[name] = struct{}{}
	return name
}
