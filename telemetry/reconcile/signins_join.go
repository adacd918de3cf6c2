package reconcile

import (
	"cmp"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

	"github.com/partnerguard/partnerguard/policy"
	"github.com/partnerguard/partnerguard/telemetry/store"
)

// signInJoin is the work of one ReadSignIns.
type signInJoin struct {
	cfg        SignInConfig
	out        SignIns
	identities map[string]store.Identity
	refs       *pseudonyms // nil where users have names
	fleet      bool        // other guards' user_refs are among ours
	causes     map[string]policy.Cause
	texts      map[string]string // one string for equal ones

	callers  map[signer]*signInCaller // who passed the guard
	apps     map[uuid.UUID]bool
	users    map[uuid.UUID]bool
	unnamed  map[string]bool // user_refs that nobody knows any more
	tooMany  bool            // callers, so that a stranger may be none
	groups   []*tokenGroup
	byGroup  map[tokenGroupKey]uint32
	tokens   []seenToken
	byToken  map[tokenKey]uint32 // index in tokens of the first with this key
	of       map[signer][]uint32 // tokens by who signs in and iat
	lookedAt time.Time           // calls before are not looked up
	nearby   map[string]*shown

	partnerCenter [2]uuid.UUID
	strangers     map[signer]*strangerTally
	lost          int64 // strangers that found no room
	appOnly       map[uuid.UUID]bool
	failing       map[signer]bool    // strangers without a success
	words         map[Evidence]int64 // values that are not known
	pages, nexts  int64
	untold        int64 // integrations without MFA of which the export says nothing
	interactive   int64 // rows that say they are, and that they are not
	silent        int64
	rows          int64 // for progress
}

// signInCaller is an application and user that passed the guard.
type signInCaller struct {
	integration string
	owner       string
	seen        time.Time // the latest call
	succeeded   time.Time // the latest sign-in
	failures    []SignInFailure
}

type tokenGroupKey struct{ integration, app, user string }

// tokenGroup is the calls of one integration, application and user that lack MFA.
type tokenGroup struct {
	integration string
	owner       string
	principal   signer // user is zero when it is not known
	latest      lackingCall
	calls       int64
	refused     bool     // some by Microsoft, whatever is in their tokens
	tokens      [4]int64 // by token.how
	shown       []tally
}

// lackingCall is as much of a call as tells why it lacks MFA.
type lackingCall struct {
	time      time.Time
	token     policy.Token
	reason    policy.Reason
	rejection policy.Rejection
	code      string
}

// seenToken is one that calls of a group carried.
type seenToken struct {
	key   tokenKey
	iat   int64  // seconds since 1970
	group uint32 // index in groups
	next  uint32 // index in tokens of the same token in another group; 0 for none
	mfa   bool   // it has the claim
	how   uint8
	gap   int32 // seconds between iat and near
	near  *shown
	id    uuid.UUID // of the sign-in near
	at    int64     // of the sign-in near
}

// How a token was found in the log.
const (
	outside = iota
	notFound
	byTime
	byUTI
)

// shown is what equal sign-ins show.
type shown struct{ proofs []proof }

// tally counts what shows a cause.
type tally struct {
	code       string
	confidence policy.Confidence
	tokens     int64
	calls      int64 // of the groups that it is about
	evidence   []Evidence
	id         uuid.UUID
	at         time.Time
}

type strangerTally struct {
	app, user   string
	signIns     int64
	single      int64
	first, last time.Time
	addresses   []string
	shown       []tally
}

func newJoin(cfg SignInConfig) *signInJoin {
	if cfg.Since.IsZero() {
		cfg.Since = cfg.Now.Add(-30 * 24 * time.Hour)
	}
	j := &signInJoin{
		cfg: cfg, out: SignIns{Version: signInsVersion, Made: cfg.Now.UTC().Truncate(time.Second), Pseudonymous: cfg.UserRef != nil},
		causes: signInCauses(), texts: map[string]string{},
		callers: map[signer]*signInCaller{}, apps: map[uuid.UUID]bool{}, users: map[uuid.UUID]bool{}, unnamed: map[string]bool{},
		byGroup: map[tokenGroupKey]uint32{}, byToken: map[tokenKey]uint32{}, of: map[signer][]uint32{}, nearby: map[string]*shown{},
		tokens: make([]seenToken, 1), // 0 is none
		// Microsoft Partner Center, and the Partner API with referrals and price sheets.
		partnerCenter: [2]uuid.UUID{uuid.MustParse("fa3d9a0c-3fb0-42cc-9193-47c7ecd2edbd"), uuid.MustParse("4990cffe-04e8-4e8b-808a-1175604b879f")},
		strangers:     map[signer]*strangerTally{}, appOnly: map[uuid.UUID]bool{}, failing: map[signer]bool{}, words: map[Evidence]int64{},
	}
	if cfg.UserRef != nil {
		j.refs = newPseudonyms(cfg.UserRef)
	}
	return j
}

// hide is hide where users are pseudonymous.
func (j *signInJoin) hide(text string) string {
	if j.refs == nil {
		return text
	}
	return hide(text)
}

// userID is how the result names p's user.
func (j *signInJoin) userID(p signer) string {
	switch {
	case p.user == uuid.Nil:
		return ""
	case j.refs == nil:
		return p.user.String()
	}
	return base64.RawURLEncoding.EncodeToString(p.user[:])
}

// principalOf is who made calls with app and ref; known is false when the user is
// nobody the identities know.
func (j *signInJoin) principalOf(app, ref string) (p signer, known bool) {
	p.app, _ = guid([]byte(app))
	switch {
	case ref == "":
		return p, true
	case j.refs != nil:
		p.user = uuid.UUID(keyOf([]byte(ref))) // its 16 bytes stand for the object id
		return p, true
	}
	id, ok := j.identities[ref]
	if ok {
		p.user, ok = guid([]byte(id.ObjectID))
	}
	return p, ok
}

// readCallers finds out who passed the guard, and which of these lack MFA. Sums are by
// route and more, so that those of a month can be many, while the callers in them are
// few: it reads those of an hour first, and of more where they are not too many.
func (j *signInJoin) readCallers(ctx context.Context) error {
	var err error
	if j.identities, err = j.cfg.Records.Identities(ctx); err != nil {
		return err
	}
	if j.refs != nil {
		guards, err := j.cfg.Records.Instances(ctx)
		if err != nil {
			return err
		}
		j.identities, j.fleet = nil, len(guards) > 1
	}
	step := time.Hour
	for since := j.cfg.Since.Truncate(time.Hour); since.Before(j.cfg.Now); {
		sums, err := j.cfg.Records.Sums(ctx, since, since.Add(step))
		if err != nil {
			return err
		}
		for _, s := range sums {
			if s.Integration == "" {
				continue
			}
			if j.refs != nil {
				j.refs.add(s.Dim)
			}
			// What only an unverified token claims says nothing about who called.
			if s.Verified && s.AppID != "" {
				j.addCaller(s)
			}
			j.addLacking(s)
		}
		since = since.Add(step)
		switch n := len(sums); {
		case n <= maxSums/2:
			step *= 2
		case n > maxSums && step > time.Hour:
			step /= 2
		}
		j.progress("", 0)
	}
	return nil
}

func (j *signInJoin) addCaller(s store.Sum) {
	p, known := j.principalOf(s.AppID, s.UserRef)
	if !known {
		if len(j.unnamed) < maxCallers {
			j.unnamed[s.UserRef] = true
		}
	} else {
		c := j.callers[p]
		switch {
		case c != nil:
		case len(j.callers) == maxCallers:
			j.tooMany = true
			return
		default:
			c = &signInCaller{}
			j.callers[p] = c
			j.users[p.user] = true
		}
		if !s.Last.Before(c.seen) {
			c.integration, c.owner, c.seen = s.Integration, s.Owner, s.Last
		}
	}
	if len(j.apps) < maxCallers {
		j.apps[p.app] = true
	}
}

// addLacking adds the calls of s if they lack MFA: by their tokens, or because
// Microsoft refused them for that or for their audience.
func (j *signInJoin) addLacking(s store.Sum) {
	reason, rejection := policy.Reason(s.Reason), policy.Rejection(s.Rejection)
	refused := rejection == policy.RejectionMFARequired || rejection == policy.RejectionAudienceRefused
	if reason != policy.ReasonMFAMissing && reason != policy.ReasonMFAUnknown && !refused {
		return
	}
	key := tokenGroupKey{s.Integration, s.AppID, s.UserRef}
	at, ok := j.byGroup[key]
	if !ok && len(j.groups) >= maxGroups {
		key = tokenGroupKey{integration: s.Integration} // the rest of it
		at, ok = j.byGroup[key]
	}
	if !ok {
		g := &tokenGroup{integration: s.Integration}
		if p, known := j.principalOf(key.app, key.user); known {
			g.principal = p
		} else {
			g.principal.app = p.app
		}
		at = uint32(len(j.groups))
		j.groups = append(j.groups, g)
		j.byGroup[key] = at
	}
	g := j.groups[at]
	g.calls += s.Calls
	g.refused = g.refused || refused
	if !s.Last.Before(g.latest.time) {
		g.owner = s.Owner
		g.latest = lackingCall{s.Last, s.Token(), reason, rejection, s.Code}
	}
	j.rows += s.Calls
}

// readTokens finds the tokens of the calls that lack MFA, those of the latest days first
// until there are enough.
func (j *signInJoin) readTokens(ctx context.Context) error {
	j.lookedAt = j.cfg.Since
	const day = 24 * time.Hour
	for until := j.cfg.Now; until.After(j.cfg.Since) && len(j.groups) > 0; until = until.Add(-day) {
		since := until.Add(-day)
		if since.Before(j.cfg.Since) {
			since = j.cfg.Since
		}
		err := j.cfg.Records.Tokens(ctx, since, until, func(t store.Token) error {
			j.addToken(&t)
			return nil
		})
		if err != nil {
			return err
		}
		j.progress("", 0)
		if len(j.tokens) > maxTokens {
			j.lookedAt = until
			break
		}
	}
	for i := range j.tokens[1:] {
		t := &j.tokens[i+1]
		if p := j.groups[t.group].principal; t.iat != 0 && p.user != uuid.Nil {
			j.of[p] = append(j.of[p], uint32(i+1))
		}
	}
	for _, list := range j.of {
		slices.SortFunc(list, func(a, b uint32) int { return cmp.Compare(j.tokens[a].iat, j.tokens[b].iat) })
	}
	return nil
}

// addToken adds t if it is of calls that lack MFA, once for each group.
func (j *signInJoin) addToken(t *store.Token) {
	at, ok := j.byGroup[tokenGroupKey{t.Integration, t.AppID, t.UserRef}]
	if !ok {
		if at, ok = j.byGroup[tokenGroupKey{integration: t.Integration}]; !ok {
			return
		}
	}
	mfa := t.MFA == policy.MFAPresent.String()
	if mfa && !j.groups[at].refused || t.MFA == policy.MFANotApplicable.String() || t.UTI == "" || len(j.tokens) > maxTokens {
		return
	}
	key := keyOf([]byte(t.UTI))
	first := j.byToken[key]
	for i := first; i != 0; i = j.tokens[i].next {
		if j.tokens[i].group == at {
			return
		}
	}
	j.tokens = append(j.tokens, seenToken{key: key, iat: t.IssuedAt, group: at, next: first, mfa: mfa})
	j.byToken[key] = uint32(len(j.tokens) - 1)
}

// readInput reads one file.
func (j *signInJoin) readInput(ctx context.Context, in SignInInput) error {
	f, err := in.Open()
	if err != nil {
		return fmt.Errorf("read sign-ins: %w", err)
	}
	defer f.Close()
	name := j.hide(in.Name)
	counted := &countingReader{in: f}
	all, format, stop, err := openRows(in.Name, counted)
	if err != nil {
		return err
	}
	defer stop()
	var (
		r     exportRow
		s     signIn
		n     int64
		good  int64
		first error
	)
	for {
		if n%1024 == 0 {
			if err := ctx.Err(); err != nil {
				return err
			}
			j.rows = j.out.Rows.Read
			j.progress(in.Name, counted.n.Load())
		}
		err := all.next(&r)
		if errors.Is(err, io.EOF) {
			break
		}
		var bad *rowError
		if err != nil && !errors.As(err, &bad) {
			return &InputError{in.Name, fmt.Sprintf("after %d rows: %v", n, err), "the file is damaged or cannot be read; fetch it again", err}
		}
		n++
		j.out.Rows.Read++
		if err == nil {
			if err = s.understand(&r); err == nil {
				good++
				j.add(&s)
				continue
			}
			bad = &rowError{reason: err.Error(), line: lineOf(all)}
		}
		if first == nil {
			first = bad
		}
		bad.reason = j.hide(bad.reason)
		j.skip(name, n, bad)
		if bad.last {
			j.out.Incomplete = true
			j.note(fmt.Sprintf("%s: %s (row %d, line %d). What came before it counts; fetch the file again for the rest.", name, bad.reason, n, bad.line))
		}
		if good == 0 && n == 1000 {
			break
		}
	}
	if n > 0 && good == 0 {
		problem := fmt.Sprintf("none of its first %d rows is a sign-in; of the first one: %v", n, first)
		if js, ok := all.(*jsonRows); ok && js.problem != "" {
			problem = "it is not a sign-in export but an error of Graph's: " + js.problem
		}
		return &InputError{in.Name, problem, exportHint + "; if it is one, a newer partnerguard may know its form", nil}
	}
	if js, ok := all.(*jsonRows); ok {
		j.pages += js.pages
		j.nexts += js.nexts
	}
	j.out.Files = append(j.out.Files, SignInFile{name, format, n})
	return nil
}

// countingReader counts what is read, for another goroutine to see.
type countingReader struct {
	in io.Reader
	n  atomic.Int64
}

func (c *countingReader) Read(b []byte) (int, error) {
	n, err := c.in.Read(b)
	c.n.Add(int64(n))
	return n, err
}

func lineOf(all exportReader) int64 {
	switch r := all.(type) {
	case *jsonRows:
		return r.line()
	case *csvRows:
		return r.line() - 1
	}
	return 0
}

func (j *signInJoin) skip(file string, n int64, bad *rowError) {
	j.out.Rows.Skipped++
	if len(j.out.Skipped) < maxSkipped {
		j.out.Skipped = append(j.out.Skipped, SkippedRow{file, n, bad.line, bad.reason})
	}
}

func (j *signInJoin) progress(file string, n int64) {
	if j.cfg.Progress != nil {
		j.cfg.Progress(SignInProgress{file, n, j.rows})
	}
}

func (j *signInJoin) note(text string) {
	if len(j.out.Notes) < 100 {
		j.out.Notes = append(j.out.Notes, text)
	}
}

// add takes a sign-in into account.
func (j *signInJoin) add(s *signIn) {
	if j.out.Since.IsZero() || s.at.Before(j.out.Since) {
		j.out.Since = s.at
	}
	if s.at.After(j.out.Until) {
		j.out.Until = s.at
	}
	var joined uint32
	for _, key := range s.tokens {
		if joined == 0 && key != (tokenKey{}) {
			joined = j.byToken[key]
		}
	}
	ours := j.toPartnerCenter(s)
	if !ours && joined == 0 {
		j.out.Rows.Dropped++
		return
	}
	j.out.Rows.Kept++
	if !ours {
		j.joinToken(s, joined, false)
		return
	}
	if j.refs != nil && s.principal.user != uuid.Nil {
		s.principal.user = uuid.UUID(keyOf([]byte(j.refs.of(string(s.text(fieldResourceTenant)), s.principal.user.String()))))
	}
	switch {
	case saysWord(s.text(fieldInteractive), "true"):
		j.interactive++
	case len(s.text(fieldInteractive)) > 0 || s.is(fieldIncoming, "refreshtoken"):
		j.silent++
	}
	s.unknownWords(func(e Evidence) {
		if _, ok := j.words[e]; ok || len(j.words) < 20 {
			j.words[e]++
		}
	})
	c := j.callers[s.principal]
	switch {
	case s.code == pendingDeviceCode:
	case s.code != 0 && c != nil:
		c.fail(s)
	case s.code != 0:
		j.failed(s)
	default:
		if c != nil && s.at.After(c.succeeded) {
			c.succeeded = s.at
		}
		if joined != 0 {
			j.joinToken(s, joined, true)
		} else {
			j.joinNear(s)
		}
		if c == nil && joined == 0 {
			j.addStranger(s)
		}
	}
}

// toPartnerCenter reports whether s gives tokens for Partner Center's APIs. The
// names, which differ by tenant, count only without the id.
func (j *signInJoin) toPartnerCenter(s *signIn) bool {
	if id := s.text(fieldResource); len(id) > 0 {
		resource, ok := guid(id)
		return ok && (resource == j.partnerCenter[0] || resource == j.partnerCenter[1])
	}
	return s.is(fieldResourceName, "microsoftpartnercenter", "microsoftpartner", "microsoftdevcenter", "samplebecapp")
}

// joinToken says what s shows about the tokens that it gave.
func (j *signInJoin) joinToken(s *signIn, first uint32, ours bool) {
	if s.code != 0 {
		return
	}
	var ps []proof
	for i := first; i != 0; i = j.tokens[i].next {
		t := &j.tokens[i]
		if t.how == byUTI {
			continue // the same row, exported twice
		}
		t.how = byUTI
		g := j.groups[t.group]
		switch {
		case g.latest.rejection == policy.RejectionAudienceRefused:
			if !ours {
				g.count(j.wrongAudience(s), false, s.id, s.at)
			}
			continue
		case t.mfa:
			continue // the log has nothing to add: Microsoft takes another claim for MFA
		case ps == nil:
			ps = j.keep(s.proofs()).proofs
		}
		g.count(ps, false, s.id, s.at)
	}
}

// wrongAudience is the proof that a token is for another API.
func (j *signInJoin) wrongAudience(s *signIn) []proof {
	code := "wrong_audience"
	id := string(s.text(fieldResource))
	if strings.EqualFold(id, "00000002-0000-0000-c000-000000000000") { // graph.windows.net
		code = "legacy_audience"
	}
	ev := Evidence{"resourceId", j.text(s.text(fieldResource))}
	if name := s.text(fieldResourceName); len(name) > 0 {
		ev.Value += " (" + j.hide(j.text(name)) + ")"
	}
	return []proof{{code, policy.Certain, []Evidence{ev}}}
}

// joinNear remembers s for the tokens of the same application and user that were
// issued about then: they may be its, if no other sign-in names them.
func (j *signInJoin) joinNear(s *signIn) {
	list := j.of[s.principal]
	if len(list) == 0 || s.principal.user == uuid.Nil || s.multifactor() {
		return
	}
	at := s.at.Unix()
	from, _ := slices.BinarySearchFunc(list, at-int64(signInAfter/time.Second), func(i uint32, iat int64) int { return cmp.Compare(j.tokens[i].iat, iat) })
	var what *shown
	for _, i := range list[from:] {
		t := &j.tokens[i]
		if t.iat > at+int64(signInBefore/time.Second) {
			break
		}
		gap := int32(max(at-t.iat, t.iat-at))
		if t.how == byUTI || t.near != nil && t.gap <= gap {
			continue
		}
		if what == nil {
			what = j.keep(s.proofs())
		}
		t.near, t.gap, t.id, t.at = what, gap, s.id, at
	}
}

// keep returns one copy of what equal sign-ins show. Beyond some thousand different
// ones it forgets the evidence, of which alone there can be so many.
func (j *signInJoin) keep(ps []proof) *shown {
	for _, p := range ps {
		for i := range p.evidence {
			if e := &p.evidence[i]; e.Field != graphNames[fieldHomeTenant] {
				e.Value = j.hide(e.Value)
			}
		}
	}
	key := keyOfProofs(ps)
	what := j.nearby[key]
	if what == nil && len(j.nearby) >= maxShown {
		for i := range ps {
			ps[i].evidence = nil
		}
		key = keyOfProofs(ps)
		what = j.nearby[key]
	}
	if what == nil {
		what = &shown{ps}
		j.nearby[key] = what
	}
	return what
}

func keyOfProofs(ps []proof) string {
	var key []byte
	for _, p := range ps {
		key = append(append(key, p.code...), byte(p.confidence))
		for _, e := range p.evidence {
			key = append(append(append(append(key, '\n'), e.Field...), '='), e.Value...)
		}
	}
	return string(key)
}

// text is text of the export, one string for equal ones.
func (j *signInJoin) text(b []byte) string {
	if s, ok := j.texts[string(b)]; ok {
		return s
	}
	s := signInText(b)
	if len(j.texts) < 10_000 && len(b) <= 256 {
		j.texts[string(b)] = s
	}
	return s
}

// count adds what a token's sign-in shows. guessed says that it may be another's.
func (g *tokenGroup) count(ps []proof, guessed bool, id uuid.UUID, at time.Time) {
	for _, p := range ps {
		if guessed {
			p.confidence = min(p.confidence, policy.Likely)
		}
		g.shown = addProof(g.shown, p, 1, id, at)
	}
}

func addProof(to []tally, p proof, tokens int64, id uuid.UUID, at time.Time) []tally {
	i := slices.IndexFunc(to, func(t tally) bool { return t.code == p.code })
	if i < 0 {
		i = len(to)
		to = append(to, tally{code: p.code})
	}
	t := &to[i]
	t.confidence = max(t.confidence, p.confidence)
	t.tokens += tokens
	for _, e := range p.evidence {
		if len(t.evidence) < maxEvidence && !slices.Contains(t.evidence, e) {
			t.evidence = append(t.evidence, e)
		}
	}
	if !at.Before(t.at) {
		t.id, t.at = id, at
	}
	return to
}

// fail counts a sign-in of c that failed.
func (c *signInCaller) fail(s *signIn) {
	i := slices.IndexFunc(c.failures, func(f SignInFailure) bool { return f.Code == s.code })
	if i < 0 {
		if len(c.failures) == 20 {
			return
		}
		i = len(c.failures)
		f := SignInFailure{Code: s.code, First: s.at, Last: s.at}
		e, ok := explainCode(s.code)
		if f.Text, f.Fix = e.text, e.fix; !ok {
			f.Text = signInText(s.failure())
		}
		c.failures = append(c.failures, f)
	}
	f := &c.failures[i]
	f.Count++
	if s.at.Before(f.First) {
		f.First = s.at
	}
	if s.at.After(f.Last) {
		f.Last = s.at
	}
}

func (j *signInJoin) failed(s *signIn) {
	if j.strangers[s.principal] == nil && len(j.failing) < maxStrangers {
		j.failing[s.principal] = true
	}
}

// addStranger counts a sign-in of someone who never passed the guard.
func (j *signInJoin) addStranger(s *signIn) {
	if s.principal.user == uuid.Nil {
		// An application that signs in as itself is exempt from MFA.
		if len(j.appOnly) < maxStrangers {
			j.appOnly[s.principal.app] = true
		}
		return
	}
	w := j.strangers[s.principal]
	if w == nil {
		if len(j.strangers) == maxStrangers {
			j.lost++
			return
		}
		w = &strangerTally{app: j.hide(j.text(s.text(fieldAppName))), user: j.text(s.text(fieldUPN)), first: s.at, last: s.at}
		j.strangers[s.principal] = w
		delete(j.failing, s.principal)
	}
	w.signIns++
	if s.at.Before(w.first) {
		w.first = s.at
	}
	if s.at.After(w.last) {
		w.last = s.at
	}
	if ip := s.text(fieldIP); len(ip) > 0 && len(w.addresses) < maxAddresses && !slices.ContainsFunc(w.addresses, func(a string) bool { return a == string(ip) }) {
		w.addresses = append(w.addresses, j.hide(j.text(ip)))
	}
	if s.multifactor() || !s.single() && !s.is(fieldProtocol, "ropc") {
		return
	}
	w.single++
	for _, p := range j.keep(s.proofs()).proofs {
		// Without its token, nobody knows what claims it has.
		p.confidence = min(p.confidence, policy.Likely)
		w.shown = addProof(w.shown, p, 1, s.id, s.at)
	}
}
