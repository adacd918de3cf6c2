// Package entra verifies bearer tokens of Microsoft Entra: which checks, in which
// order, against which published keys. It turns a token into a policy.Token, or
// into a policy.TokenError with the Reason why not. What may be done with either
// is for package policy to say.
//
// Checks go from cheap to dear: length, form, header and claims before the key is
// looked up, and the key before the signature. Nothing in a token chooses what is
// fetched, which algorithm verifies, or where a key comes from.
package entra

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"runtime"
	"slices"
	"sort"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/partnerguard/partnerguard/policy"
)

// Verifier verifies tokens of one cloud. Its methods are safe for concurrent use.
type Verifier struct {
	cloud        *cloudPreset
	authority    string
	tenants      map[string]*tenant // by id; only common when any tenant is accepted
	leeway       time.Duration
	maxStale     time.Duration
	refreshEvery time.Duration
	mfaValues    []string
	dir          string
	client       *http.Client
	now          func() time.Time
	event        func(Event)

	generation atomic.Uint64 // of key sets
	cache      *cache
	refusals   refusals
	buffers    sync.Pool     // *[]byte, room for any token
	slots      chan struct{} // a signature is verified while holding one

	verifyingMu sync.Mutex
	verifying   map[[sha256.Size]byte]*verification

	running atomic.Bool
	ctx     context.Context // of fetches; ends with Run
	cancel  context.CancelFunc
	mu      sync.Mutex // guards ended, and flights against a late start
	ended   bool
	flights sync.WaitGroup
}

// Config is what New needs. The zero Config is the global cloud and any tenant.
type Config struct {
	Cloud Cloud
	// Authority is where keys are fetched from; empty is the cloud's own login host.
	// Issuers stay the cloud's. http:// is accepted towards loopback only.
	Authority string
	// Tenants are the accepted partner tenants, as GUIDs. Empty accepts any, all
	// verified by the key set of "common".
	Tenants []string
	// Leeway is how far exp, nbf and iat may lie from our clock. Zero is 5 minutes,
	// as in Microsoft.IdentityModel; negative is none.
	Leeway time.Duration
	// MaxStale is how long the last good keys go on working while no new ones can be
	// fetched. Zero is 7 days.
	MaxStale time.Duration
	// Refresh is how often keys are fetched, at most; up to a fifth is taken off at
	// random. Zero is 12 hours, the maximum 24.
	Refresh time.Duration
	// MFAValues are the amr values that prove MFA; nil is policy.DefaultMFAValues.
	MFAValues []string
	// Dir is an existing directory where the last good keys are kept over a restart;
	// empty keeps them in memory only. Kept keys that others could have written are
	// ignored.
	Dir string
	// Client fetches the keys; nil is one of our own, which honours the proxy
	// environment. Redirects are never followed, and a fetch never takes longer than
	// 10 seconds.
	Client *http.Client
	// RootCAs are the certificate authorities that our own client trusts; nil is the
	// system's. It has no bearing on a Client that is given.
	RootCAs *x509.CertPool
	// Previous is the Verifier that this one replaces; nil when there is none. Where
	// cloud, authority and tenant are the same, its last good keys are taken over with
	// their age, with what is left of the budget for fetches, and with the time when
	// they are to be fetched again; so are the verified tokens if no tenant was
	// removed and MFAValues and CacheEntries are the same. Nothing else is: what was
	// configured for the one does not hold for the other. Previous goes on working,
	// and is not kept.
	Previous *Verifier
	// Now is the clock; nil is time.Now.
	Now func() time.Time
	// CacheEntries bounds the verified tokens that are remembered; zero is 100,000,
	// about 25 MB.
	CacheEntries int
	// Event is told what happens to the keys, for log and metrics. It is called from
	// several goroutines and must not block. May be nil.
	Event func(Event)
}

// Event is something that happened to the keys of one endpoint.
type Event struct {
	Kind    EventKind
	Tenant  string // tenant id, or "common"
	Version string // "1.0" or "2.0"
	Keys    int    // usable keys now
	Age     time.Duration
	Err     error // nil when refreshed
}

// EventKind is what happened.
type EventKind uint8

const (
	EventRefreshed EventKind = iota // new keys were fetched
	EventFailed                     // a fetch failed; the last good keys stay
	EventStale                      // the last good keys are older than a day, and a fetch failed again
	EventNotKept                    // keys could not be written to Dir, or what stands there is not trusted
)

// String returns a word for log and metrics.
func (k EventKind) String() string {
	switch k {
	case EventRefreshed:
		return "refreshed"
	case EventFailed:
		return "failed"
	case EventStale:
		return "stale"
	}
	return "not_kept"
}

// KeyStatus is the state of the keys of one endpoint.
type KeyStatus struct {
	Tenant    string    // tenant id, or "common"
	Version   string    // "1.0" or "2.0"
	Keys      int       // usable keys
	FetchedAt time.Time // zero when there are none
	LastError error     // of the last fetch; nil when it succeeded or there was none
	Stale     bool      // none, or older than a day
	Usable    bool      // tokens can be verified: there are keys, not older than MaxStale
}

const (
	defaultLeeway   = 5 * time.Minute
	defaultMaxStale = 7 * 24 * time.Hour
	defaultRefresh  = 12 * time.Hour
	maxRefresh      = 24 * time.Hour
	defaultEntries  = 100_000

	slotWait = 250 * time.Millisecond
)

// New checks cfg and returns a Verifier with the keys of Config.Previous or those
// kept in Config.Dir, if any. It fetches nothing: Run does, or the first token that
// needs a key. A Verifier that is not wanted after all may be dropped.
func New(cfg Config) (*Verifier, error) {
	if int(cfg.Cloud) >= len(clouds) {
		return nil, fmt.Errorf("entra: Config.Cloud %v is not known", cfg.Cloud)
	}
	cloud := &clouds[cfg.Cloud]
	authority, err := checkAuthority(orDefault(cfg.Authority, cloud.authority))
	if err != nil {
		return nil, err
	}
	if cfg.Refresh < 0 || cfg.Refresh > maxRefresh {
		return nil, errors.New("entra: Config.Refresh must be at most 24h")
	}
	if cfg.MaxStale < 0 || cfg.CacheEntries < 0 {
		return nil, errors.New("entra: Config.MaxStale and Config.CacheEntries must not be negative")
	}
	for _, value := range cfg.MFAValues {
		if !slices.Contains(policy.AllowedMFAValues(), value) {
			return nil, fmt.Errorf("entra: Config.MFAValues: %q proves no MFA; use %s", value, strings.Join(policy.AllowedMFAValues(), ", "))
		}
	}
	v := &Verifier{
		cloud:        cloud,
		authority:    authority,
		tenants:      map[string]*tenant{},
		leeway:       max(0, orDefault(cfg.Leeway, defaultLeeway)),
		maxStale:     orDefault(cfg.MaxStale, defaultMaxStale),
		refreshEvery: orDefault(cfg.Refresh, defaultRefresh),
		mfaValues:    slices.Clone(cfg.MFAValues),
		dir:          cfg.Dir,
		client:       newClient(cfg.Client, cfg.RootCAs),
		now:          cfg.Now,
		event:        cfg.Event,
		cache:        newCache(orDefault(cfg.CacheEntries, defaultEntries)),
		slots:        make(chan struct{}, 2*runtime.GOMAXPROCS(0)),
		verifying:    map[[sha256.Size]byte]*verification{},
	}
	if len(v.mfaValues) == 0 {
		v.mfaValues = policy.DefaultMFAValues()
	}
	if v.now == nil {
		v.now = time.Now
	}
	v.buffers.New = func() any { b := make([]byte, 0, maxToken); return &b }
	v.ctx, v.cancel = context.WithCancel(context.Background())
	for _, id := range cfg.Tenants {
		if !policy.IsGUID(id) {
			return nil, fmt.Errorf("entra: Config.Tenants: %q is not a tenant id", id)
		}
		id = strings.ToLower(id)
		v.tenants[id] = newTenant(id, authority)
	}
	if len(v.tenants) == 0 {
		v.tenants[common] = newTenant(common, authority)
	}
	if cfg.Previous != nil {
		v.takeOver(cfg.Previous)
	}
	for _, s := range v.sources() {
		if s.set.Load() != nil {
			continue
		}
		if err := v.recall(s, v.now()); err != nil {
			v.tell(s, EventNotKept, err)
		}
	}
	return v, nil
}

// takeOver makes v, which nobody uses yet, go on where old stands.
func (v *Verifier) takeOver(old *Verifier) {
	if old.cloud != v.cloud || old.authority != v.authority {
		return
	}
	removed := false
	for id, t := range old.tenants {
		if own := v.tenants[id]; own != nil {
			own.takeOver(t)
		} else {
			removed = true
		}
	}
	// Read after the sets, so that it is not below theirs.
	v.generation.Store(old.generation.Load())
	// What a token says depends on the values that prove MFA, nothing else that may
	// have changed; the rest is checked on every hit.
	if !removed && slices.Equal(old.mfaValues, v.mfaValues) && old.cache.entries == v.cache.entries {
		v.cache = old.cache
	}
}

func orDefault[T comparable](given, otherwise T) T {
	var zero T
	if given == zero {
		return otherwise
	}
	return given
}

// Verify returns what the bearer token raw says if it is valid now for one of
// audiences. Every error is a *policy.TokenError whose Claimed is filled as far as
// the token is readable. It waits at most 250 ms for keys and as long for a free
// verification slot, less when ctx ends.
func (v *Verifier) Verify(ctx context.Context, raw string, audiences []string) (policy.Token, error) {
	switch {
	case raw == "":
		return policy.Token{}, &policy.TokenError{Reason: policy.ReasonTokenMissing}
	case len(raw) > maxToken:
		return policy.Token{}, &policy.TokenError{Reason: policy.ReasonTokenTooLong, Claimed: policy.Token{Kind: policy.KindOpaque}}
	}
	buf := v.buffers.Get().(*[]byte)
	defer v.buffers.Put(buf)
	hash := sha256.Sum256(append((*buf)[:0], raw...))
	now := v.now()
	if known, ok := v.recognise(&hash, audiences, now); ok {
		return known, nil
	}

	t := &token{raw: raw, hash: hash, audiences: audiences, now: now}
	reason, err := t.read(*buf)
	for i := 0; reason == "" && i < len(checks); i++ {
		reason, err = checks[i].run(v, ctx, t)
	}
	if reason != "" {
		return policy.Token{}, &policy.TokenError{Reason: reason, Claimed: t.says(), Err: err}
	}
	verified := t.says()
	verified.Verified = true
	verified.Issuer = v.cloud.issuer(t.version, t.tenantID)
	verified.MFA = t.claims.mfa(verified.Version, v.mfaValues)
	v.remember(t, &verified)
	return verified, nil
}

// check is one step of the verification. It returns no Reason when it holds.
type check struct {
	name string
	run  func(*Verifier, context.Context, *token) (policy.Reason, error)
}

// checks come after the token has been read, in this order. Later ones rely on
// what earlier ones found.
var checks = [...]check{
	{"critical header", (*Verifier).checkCritical},
	{"duplicate members", (*Verifier).checkDuplicates},
	{"algorithm", (*Verifier).checkAlgorithm},
	{"key id", (*Verifier).checkKid},
	{"issuer", (*Verifier).checkIssuer},
	{"tenant", (*Verifier).checkTenant},
	{"audience", (*Verifier).checkAudience},
	{"expiry", (*Verifier).checkExpiry},
	{"not before", (*Verifier).checkNotBefore},
	{"issued at", (*Verifier).checkIssuedAt},
	{"key", (*Verifier).findKey},
	{"key issuer", (*Verifier).checkKeyIssuer},
	{"signature", (*Verifier).checkSignature},
}

// checkCritical refuses extensions that must be understood (RFC 7515 section
// 4.1.11, RFC 7797): golang-jwt would ignore them.
func (v *Verifier) checkCritical(_ context.Context, t *token) (policy.Reason, error) {
	if t.header.critical {
		return policy.ReasonTokenCriticalHeader, nil
	}
	return "", nil
}

func (v *Verifier) checkDuplicates(_ context.Context, t *token) (policy.Reason, error) {
	if t.duplicate {
		return policy.ReasonTokenDuplicateClaim, nil
	}
	return "", nil
}

func (v *Verifier) checkAlgorithm(_ context.Context, t *token) (policy.Reason, error) {
	if alg, _ := t.header.alg.str(); alg != "RS256" {
		return policy.ReasonTokenUnsupportedAlgorithm, nil
	}
	return "", nil
}

func (v *Verifier) checkKid(_ context.Context, t *token) (policy.Reason, error) {
	if t.kid, _ = t.header.kid.str(); t.kid == "" {
		return policy.ReasonTokenMissingKid, nil
	}
	return "", nil
}

// checkIssuer tells the version by the form of the issuer. A ver that says
// otherwise would have Microsoft's own libraries look for another issuer.
func (v *Verifier) checkIssuer(_ context.Context, t *token) (policy.Reason, error) {
	t.issuer, _ = t.claims.iss.str()
	found, tenant := v.cloud.parseIssuer(t.issuer)
	if found == 0 {
		return policy.ReasonTokenWrongIssuer, nil
	}
	if ver, _ := t.claims.ver.str(); t.claims.ver != "" && ver != found.String() {
		return policy.ReasonTokenWrongIssuer, errVersion
	}
	t.version, t.issuerTenant = found, tenant
	return "", nil
}

func (v *Verifier) checkTenant(_ context.Context, t *token) (policy.Reason, error) {
	tid, _ := t.claims.tid.str()
	lower := strings.ToLower(tid)
	if !policy.IsGUID(tid) || tid != t.issuerTenant || v.tenantOf(lower) == nil {
		return policy.ReasonTokenWrongTenant, nil
	}
	t.tenantID = lower
	return "", nil
}

// checkAudience accepts aud as a string, as Entra writes it, or as an array that
// holds one of the audiences (RFC 7519 section 4.1.3). They are compared exactly.
func (v *Verifier) checkAudience(_ context.Context, t *token) (policy.Reason, error) {
	found := ""
	accept := func(aud string) {
		if found == "" && len(aud) <= maxText && slices.Contains(t.audiences, aud) {
			found = aud
		}
	}
	if aud, ok := t.claims.aud.str(); ok {
		accept(aud)
	} else if t.claims.aud != "" {
		allStrings := true
		array := t.claims.aud.elements(func(e value) bool {
			aud, ok := e.str()
			accept(aud)
			allStrings = allStrings && ok
			return ok
		})
		if !array || !allStrings {
			return policy.ReasonTokenMalformed, errAudience
		}
	}
	if found == "" {
		return policy.ReasonTokenWrongAudience, nil
	}
	t.audience = found
	return "", nil
}

func (v *Verifier) checkExpiry(_ context.Context, t *token) (policy.Reason, error) {
	exp, ok := t.claims.exp.seconds()
	switch {
	case !ok:
		return policy.ReasonTokenMalformed, errNoExpiry
	case v.expired(exp, t.now):
		return policy.ReasonTokenExpired, nil
	}
	return "", nil
}

func (v *Verifier) checkNotBefore(_ context.Context, t *token) (policy.Reason, error) {
	nbf, ok := t.claims.nbf.seconds()
	switch {
	case t.claims.nbf != "" && !ok:
		return policy.ReasonTokenMalformed, errNotBefore
	case v.future(nbf, t.now):
		return policy.ReasonTokenNotYetValid, nil
	}
	return "", nil
}

func (v *Verifier) checkIssuedAt(_ context.Context, t *token) (policy.Reason, error) {
	iat, ok := t.claims.iat.seconds()
	switch {
	case t.claims.iat != "" && !ok:
		return policy.ReasonTokenMalformed, errIssuedAt
	case v.future(iat, t.now):
		return policy.ReasonTokenNotYetValid, errIssuedLate
	}
	return "", nil
}

// checkKeyIssuer refuses a key that is published for another issuer, such as the
// consumer tenant's, which stands in the common key set.
func (v *Verifier) checkKeyIssuer(_ context.Context, t *token) (policy.Reason, error) {
	if !slices.ContainsFunc(t.key.issuers, func(bound string) bool {
		return v.cloud.mayIssue(bound, t.issuer, t.issuerTenant)
	}) {
		return policy.ReasonTokenWrongIssuer, errKeyIssuer
	}
	return "", nil
}

// expired reports whether now is at or after exp, in seconds, by more than the leeway.
func (v *Verifier) expired(exp int64, now time.Time) bool { return now.Add(-v.leeway).Unix() >= exp }

// future reports whether at, in seconds, lies ahead by more than the leeway.
func (v *Verifier) future(at int64, now time.Time) bool { return now.Add(v.leeway).Unix() < at }

// verification is the verification of one token's signature, for all callers that
// bring the same token meanwhile.
type verification struct {
	generation uint64
	done       chan struct{}
	reason     policy.Reason // valid once done is closed
	err        error
}

// checkSignature verifies t's signature, or waits for the caller that does. That
// caller does not heed its own ctx: others rely on it, and it is soon done.
func (v *Verifier) checkSignature(ctx context.Context, t *token) (policy.Reason, error) {
	if reason, ok := v.refusals.get(&t.hash, t.set.generation, t.now.Unix()); ok {
		return reason, errBadSignature
	}
	v.verifyingMu.Lock()
	if other := v.verifying[t.hash]; other != nil && other.generation == t.set.generation {
		v.verifyingMu.Unlock()
		select {
		case <-other.done:
			return other.reason, other.err
		case <-ctx.Done():
			return policy.ReasonVerifyOverloaded, ctx.Err()
		}
	}
	own := &verification{generation: t.set.generation, done: make(chan struct{}), reason: policy.ReasonInternalError}
	v.verifying[t.hash] = own
	v.verifyingMu.Unlock()

	defer func() {
		v.verifyingMu.Lock()
		if v.verifying[t.hash] == own {
			delete(v.verifying, t.hash)
		}
		v.verifyingMu.Unlock()
		close(own.done)
	}()
	own.reason, own.err = v.verifySignature(t)
	return own.reason, own.err
}

func (v *Verifier) verifySignature(t *token) (policy.Reason, error) {
	if !v.takeSlot() {
		return policy.ReasonVerifyOverloaded, nil
	}
	defer func() { <-v.slots }()

	err := t.set.verify(t.kid, t.signed, t.sig)
	if err == nil {
		return "", nil
	}
	reason := policy.ReasonTokenBadSignature
	if signed, ok := t.hashedNonce(); ok {
		if t.set.verify(t.kid, signed, t.sig) == nil {
			return "", nil
		}
		reason = policy.ReasonTokenGraphNonce
	}
	v.refusals.put(&t.hash, t.set.generation, reason, t.now.Unix())
	return reason, err
}

// takeSlot waits at most 250 ms for leave to verify a signature, so that a flood of
// forgeries cannot take every processor for itself.
func (v *Verifier) takeSlot() bool {
	select {
	case v.slots <- struct{}{}:
		return true
	default:
	}
	timer := time.NewTimer(slotWait)
	defer timer.Stop()
	select {
	case v.slots <- struct{}{}:
		return true
	case <-timer.C:
		return false
	}
}

var errEnded = errors.New("entra: Run has ended; nothing is fetched any more")

// Status returns the state of every key endpoint, by tenant and version.
func (v *Verifier) Status() []KeyStatus {
	now := v.now()
	var list []KeyStatus
	for _, s := range v.sources() {
		st := KeyStatus{Tenant: s.tenant, Version: s.version.String(), LastError: s.lastError(), Stale: true, Usable: v.usable(s, now) != nil}
		if set := s.set.Load(); set != nil {
			st.Keys, st.FetchedAt, st.Stale = len(set.byKid), set.fetched, now.Sub(set.fetched) >= staleAfter
		}
		list = append(list, st)
	}
	return list
}

// Ready reports whether there is at least one key set to verify with.
func (v *Verifier) Ready() bool {
	return slices.ContainsFunc(v.Status(), func(s KeyStatus) bool { return s.Usable })
}

// sources lists every key endpoint, by tenant and version.
func (v *Verifier) sources() []*source {
	ids := make([]string, 0, len(v.tenants))
	for id := range v.tenants {
		ids = append(ids, id)
	}
	sort.Strings(ids)
	var list []*source
	for _, id := range ids {
		for i := range v.tenants[id].sources {
			list = append(list, &v.tenants[id].sources[i])
		}
	}
	return list
}

func (v *Verifier) tell(s *source, kind EventKind, err error) {
	if v.event == nil {
		return
	}
	e := Event{Kind: kind, Tenant: s.tenant, Version: s.version.String(), Err: err}
	if set := s.set.Load(); set != nil {
		e.Keys, e.Age = len(set.byKid), v.now().Sub(set.fetched)
	}
	v.event(e)
}
