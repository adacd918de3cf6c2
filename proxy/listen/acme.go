package listen

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/caddyserver/certmagic"
	"go.uber.org/zap"
)

// ACME obtains certificates from a certificate authority (RFC 8555), keeps them
// in a directory and renews them in the background. Certmagic talks to the CA:
// account, external account binding, order, challenges. When to talk to it, what
// is kept and what is served is decided here, for certmagic's own manager does
// more than a guard can answer for:
//
//   - It retries after 1, 2, 2, 5, 10, 10, 10, 20 minutes and so on up to 6 hours,
//     for 30 days, and forgets about it when the process ends. Let's Encrypt
//     allows five failed validations of a name an hour; a restart loop has no
//     limit at all. ACME keeps its schedule on disk: see [pace].
//   - Its jobs run on a manager of the package's own that nobody can wait for.
//     ACME has one goroutine, and one order at a time.
//   - With Let's Encrypt it retries at their staging CA. ACME speaks to the
//     configured CA alone; nor is there a second issuer (ZeroSSL) to fall back to.
//   - It writes certificate, key and metadata one after the other; a crash in
//     between leaves a key that does not fit. ACME writes one file, atomically.
//   - It staples OCSP from a URL that the certificate names, by a client without
//     a time limit. ACME does not staple: Let's Encrypt ended OCSP in 2025, and
//     what a CA withdraws early it announces by ARI (RFC 9773), which is asked.
//   - Without an e-mail address it may ask for one on standard input.
//
// With ACMEConfig.Fleet guards share what they obtain, see there.
//
// All methods are safe for concurrent use.
type ACME struct {
	cfg     ACMEConfig
	dir     storage           // what lies in Dir; for a fleet's guard copies of certificates
	store   certmagic.Storage // dir, or the fleet's
	cache   *certmagic.Cache  // stays empty: certmagic.Config cannot be without
	magic   *certmagic.Config
	issuer  *certmagic.ACMEIssuer // used by the goroutine alone
	fleet   fleet
	changed chan struct{} // capacity 1: Manage has been called
	stop    context.CancelFunc
	stopped chan struct{}

	managing sync.Mutex // held by Manage: one at a time
	mu       sync.RWMutex
	names    []string
	sites    map[string]*site
}

// site is one name that wants a certificate. The map and what is in a site are
// guarded by ACME.mu; only the goroutine changes a site once it is in the map.
type site struct {
	name        string
	certificate *tls.Certificate // nil: none yet; may have expired
	due         time.Time        // of the next order
	ask         time.Time        // of the next look at the CA's renewal information
	look        time.Time        // of the next look into the fleet's storage
	later       time.Time        // no order before: the storage is out of reach, or another guard orders
	unreachable int              // times in a row that the storage could not be used
	failures    int              // orders that failed since the last that did not
	err         error            // of the last order; nil after a success
}

// ACMEConfig is what NewACME needs. Dir and a challenge are required.
type ACMEConfig struct {
	// Dir holds account, certificates and keys, and the times of failed attempts;
	// mode 0700, files 0600. It must survive a restart, or each start is an order;
	// and only one process may use it at a time.
	Dir string
	// Fleet is the storage that guards share which serve the same names, with the
	// same Directory. One of them orders, the others take over what it stored within
	// a minute; failures of one make all wait. A challenge is answered by any of
	// them, wherever the CA's validation arrives: HTTPPort is listened on all the
	// time for it. Dir holds copies of the certificates, which are served as long as
	// the storage cannot be reached: nobody orders then. Nil: this guard has its own
	// certificates. Closing it is the caller's, after Close.
	Fleet *PostgresStorage
	// Directory is the https URL of the CA's directory; empty is Let's Encrypt's.
	// Certificates are kept by CA: with another one, all are obtained anew. The
	// environment's HTTPS_PROXY and NO_PROXY hold.
	Directory string
	// Email is given to the CA as the account's contact; it may be empty.
	Email string
	// RootCAs are trusted for the CA's own endpoints, instead of the system's; nil
	// is the system's.
	RootCAs *x509.CertPool
	// EABKeyID and EABMACKey bind a new account to one that the CA knows (RFC 8555
	// §7.3.4); both or neither. The MAC key is base64url and a secret.
	EABKeyID, EABMACKey string
	// HTTP01 and TLSALPN01 are the challenges that may be used. The first order of
	// a name may use either; after a failure they take turns.
	HTTP01, TLSALPN01 bool
	// HTTPPort and TLSALPNPort are where the CA's validation arrives on this
	// machine: zero is 80 and 443, which is what the CA connects to; others need a
	// port forwarded to them. HTTPPort is listened on while an order runs, on all
	// addresses, and answers nothing but the challenge. On TLSALPNPort a listener
	// of the guard's own answers, if there is one; otherwise certmagic listens
	// while a challenge runs.
	HTTPPort, TLSALPNPort int
	// Event is told what became of each order, by one goroutine; it must not
	// block. Nil is allowed.
	Event func(ACMEEvent)

	host string // what the ports are opened on; empty is every address
	pace pace
}

// ACMEEvent is what became of one order.
type ACMEEvent struct {
	Outcome ACMEOutcome
	Name    string
	// NotAfter is the end of the certificate in use now; zero if there is none.
	NotAfter time.Time
	// Err says why an order failed. It holds what the CA said, shortened, and no
	// secret. Nil otherwise.
	Err error
	// Next is when the CA is asked for a certificate again.
	Next time.Time
}

// ACMEOutcome is how an order ended.
type ACMEOutcome string

const (
	ACMEObtained ACMEOutcome = "obtained" // the first certificate of this name
	ACMERenewed  ACMEOutcome = "renewed"
	ACMEShared   ACMEOutcome = "shared" // another guard of the fleet obtained or renewed it
	ACMEFailed   ACMEOutcome = "failed" // the certificate in use, if any, stays
)

// pace is how often the CA hears of a name. Zero fields have the defaults named.
//
// After the n-th failure in a row the next order waits first·2ⁿ⁻¹, at most
// longest, and at least refused when it was the CA that said no (its own
// limits; a validation that failed): then somebody must mend something. Up to a
// tenth is added by chance. The wait is on disk before the order starts, so that
// a crash counts as a failure. A restart, which is what one does after mending,
// shortens the wait to what is left of restart since the last attempt.
//
// One order is bounded, too: certmagic tries a request three times when there is
// no answer or a 5xx, ten times when the CA refuses its nonce.
type pace struct {
	first   time.Duration // 1 minute
	refused time.Duration // 30 minutes
	longest time.Duration // 6 hours
	restart time.Duration // 5 minutes
	ask     time.Duration // 6 hours, see askRenewal
	look    time.Duration // 1 minute, see lookAround
}

const (
	// orderTimeout bounds one order. The CA may take minutes to validate.
	orderTimeout = 10 * time.Minute
	// checkInterval bounds a sleep: timers do not run while a machine is suspended,
	// and clocks are set.
	checkInterval = 10 * time.Minute
	// challengeProtocol is the TLS-ALPN-01 challenge (RFC 8737).
	challengeProtocol = "acme-tls/1"
)

// NewACME checks the configuration and prepares Dir. It contacts nobody: orders
// start with Manage. Close must follow.
func NewACME(cfg ACMEConfig) (*ACME, error) {
	cfg.Directory = cmp.Or(cfg.Directory, certmagic.LetsEncryptProductionCA)
	cfg.HTTPPort, cfg.TLSALPNPort = cmp.Or(cfg.HTTPPort, 80), cmp.Or(cfg.TLSALPNPort, 443)
	cfg.pace.first = cmp.Or(cfg.pace.first, time.Minute)
	cfg.pace.refused = cmp.Or(cfg.pace.refused, 30*time.Minute)
	cfg.pace.longest = cmp.Or(cfg.pace.longest, 6*time.Hour)
	cfg.pace.restart = cmp.Or(cfg.pace.restart, 5*time.Minute)
	cfg.pace.ask = cmp.Or(cfg.pace.ask, 6*time.Hour)
	cfg.pace.look = cmp.Or(cfg.pace.look, time.Minute)
	if cfg.Dir == "" {
		return nil, errors.New("listen: ACMEConfig.Dir is required")
	}
	if u, err := url.Parse(cfg.Directory); err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil {
		return nil, errors.New("the ACME directory must be an https URL without a user")
	}
	if !cfg.HTTP01 && !cfg.TLSALPN01 {
		return nil, errors.New("ACME needs a challenge: http-01 or tls-alpn-01")
	}
	binding, err := externalAccount(cfg.EABKeyID, cfg.EABMACKey)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("create directory for ACME: %w", err)
	}
	if err := os.Chmod(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("restrict directory for ACME: %w", err)
	}

	quiet := zap.NewNop() // errors come back; its log has headers and signatures
	a := &ACME{
		cfg:     cfg,
		dir:     storage{&certmagic.FileStorage{Path: cfg.Dir}},
		changed: make(chan struct{}, 1),
		stopped: make(chan struct{}),
		sites:   map[string]*site{},
	}
	a.store = a.dir
	if cfg.Fleet != nil {
		a.store = cfg.Fleet
	}
	a.cache = certmagic.NewCache(certmagic.CacheOptions{
		GetConfigForCert: func(certmagic.Certificate) (*certmagic.Config, error) { return a.magic, nil },
		Logger:           quiet,
	})
	a.magic = certmagic.New(a.cache, certmagic.Config{
		Issuers: []certmagic.Issuer{}, // not nil, which would be certmagic's defaults
		Storage: a.store,
		OCSP:    certmagic.OCSPConfig{DisableStapling: true},
		Logger:  quiet,
	})
	a.issuer = certmagic.NewACMEIssuer(a.magic, certmagic.ACMEIssuer{
		CA:                        cfg.Directory,
		Email:                     cfg.Email,
		Agreed:                    true,
		ExternalAccount:           binding,
		TrustedRoots:              cfg.RootCAs,
		ListenHost:                cfg.host,
		AltHTTPPort:               cfg.HTTPPort,
		AltTLSALPNPort:            cfg.TLSALPNPort,
		DisableDistributedSolvers: cfg.Fleet == nil, // challenges stay in memory
		Logger:                    quiet,
	})
	if cfg.Fleet != nil {
		a.fleet.init(a.magic, cfg.Directory)
	}
	a.issuer.TestCA = "" // filled in with Let's Encrypt's staging CA
	a.magic.Issuers = []certmagic.Issuer{a.issuer}
	if cfg.Email != "" {
		// Only this puts the address to use. Without one it would look for another
		// account's.
		if err := a.issuer.PreCheck(context.Background(), nil, false); err != nil {
			a.cache.Stop()
			return nil, fmt.Errorf("prepare ACME account: %w", err)
		}
	}
	ctx, stop := context.WithCancel(context.Background())
	a.stop = stop
	go a.run(ctx)
	return a, nil
}

// Manage says which names want a certificate from now on; those of an earlier
// call that are not among them are given up, but stay on disk. What is stored is
// served when Manage returns; what is missing, or due, is obtained in the
// background. ctx bounds the reading of the store only; that of a fleet is given
// five seconds.
//
// Names are host names; neither challenge can prove a wildcard. An error changes
// nothing.
//
// Call it when the listeners are open, and before they serve: on a TLSALPNPort
// that nobody listens on yet certmagic would.
func (a *ACME) Manage(ctx context.Context, domains []string) error {
	a.managing.Lock()
	defer a.managing.Unlock()
	ctx, cancel := context.WithTimeout(ctx, storageTimeout)
	defer cancel()
	var names []string
	sites := map[string]*site{}
	for _, domain := range domains {
		name := strings.ToLower(domain)
		if !isHostName(name) {
			return fmt.Errorf("no certificate can be obtained by ACME for %q: not a host name", domain)
		}
		if sites[name] != nil {
			continue
		}
		a.mu.RLock()
		s := a.sites[name]
		a.mu.RUnlock()
		if s == nil {
			var err error
			if s, err = a.load(ctx, name); err != nil {
				return err
			}
		}
		names, sites[name] = append(names, name), s
	}
	a.mu.Lock()
	a.names, a.sites = names, sites
	a.mu.Unlock()
	select {
	case a.changed <- struct{}{}:
	default:
	}
	return nil
}

// Certificates lists the certificates in use, in the order of the names given to
// Manage. A name that has none yet is left out.
func (a *ACME) Certificates() []CertificateStatus {
	a.mu.RLock()
	defer a.mu.RUnlock()
	var list []CertificateStatus
	for _, name := range a.names {
		if c := a.sites[name].certificate; c != nil {
			list = append(list, statusOf(c.Leaf))
		}
	}
	return list
}

// Close ends the background work and waits for it; an order that is under way
// counts as failed. What is in use stays in use. The connection to the CA lasts
// until the CA closes it: certmagic keeps it to itself.
func (a *ACME) Close() {
	a.managing.Lock()
	defer a.managing.Unlock()
	a.stop()
	<-a.stopped
	if a.cache != nil {
		a.cache.Stop()
		a.cache = nil
	}
}

// getCertificate is the one for a handshake with a client. A client that names no
// host gets the certificate of the first name. An error says why there is none.
func (a *ACME) getCertificate(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	name := strings.ToLower(hello.ServerName)
	a.mu.RLock()
	if name == "" && len(a.names) > 0 {
		name = a.names[0]
	}
	var now site
	s := a.sites[name]
	if s != nil {
		now = *s
	}
	a.mu.RUnlock()
	switch {
	case s == nil:
		return nil, fmt.Errorf("no certificate for %q: not one of the names that ACME obtains", name)
	case slices.Contains(hello.SupportedProtos, challengeProtocol):
		// The CA offers this protocol alone. Whoever offers more must not end up with
		// it and a certificate that clients trust.
		if len(hello.SupportedProtos) > 1 || hello.ServerName == "" || !a.cfg.TLSALPN01 {
			return nil, fmt.Errorf("%s handshake for %s is not a validation", challengeProtocol, name)
		}
		if _, own := certmagic.GetACMEChallenge(name); !own && a.cfg.Fleet != nil && !a.mayLookUp(hello.Context(), name) {
			return nil, fmt.Errorf("too many %s handshakes for %s", challengeProtocol, name)
		}
		return a.magic.GetCertificate(hello)
	case now.certificate != nil:
		return now.certificate, nil
	case now.err != nil:
		return nil, fmt.Errorf("no certificate for %s yet, next attempt at %s: %w", name, now.next().UTC().Format(time.RFC3339), now.err)
	}
	return nil, fmt.Errorf("no certificate for %s yet: it is being obtained", name)
}

// protocols are what a TLS listener must agree to (ALPN) for the CA to validate by
// it. net/http knows none of them and closes the connection.
func (a *ACME) protocols() []string {
	if a.cfg.TLSALPN01 {
		return []string{challengeProtocol}
	}
	return nil
}

// run does what is due, one thing at a time, until ctx ends.
func (a *ACME) run(ctx context.Context) {
	defer close(a.stopped)
	defer a.fleet.stopAnswering()
	for ctx.Err() == nil {
		now := time.Now()
		s, at := a.next()
		if wait := min(at.Sub(now), checkInterval); s == nil || wait > 0 {
			timer := time.NewTimer(wait)
			select {
			case <-ctx.Done():
			case <-a.changed:
			case <-timer.C:
			}
			timer.Stop()
			continue
		}
		switch {
		case !now.Before(s.next()):
			a.order(ctx, s)
		case a.cfg.Fleet != nil && !now.Before(s.look):
			a.lookAround(ctx, s)
		default:
			a.askRenewal(ctx, s)
		}
	}
}

// next is what has to be done first, and when.
func (a *ACME) next() (first *site, at time.Time) {
	a.mu.RLock()
	defer a.mu.RUnlock()
	at = time.Now().Add(checkInterval)
	for _, name := range a.names {
		s := a.sites[name]
		when := s.next()
		if s.certificate != nil && s.failures == 0 && s.ask.Before(when) {
			when = s.ask
		}
		if a.cfg.Fleet != nil && s.look.Before(when) {
			when = s.look
		}
		if first == nil || when.Before(at) {
			first, at = s, when
		}
	}
	return first, at
}

// next is when s may be ordered.
func (s *site) next() time.Time {
	if s.later.After(s.due) {
		return s.later
	}
	return s.due
}

// order obtains a certificate for s and puts it to use.
func (a *ACME) order(ctx context.Context, s *site) {
	end := ctx
	var held *lease
	if a.cfg.Fleet != nil {
		if held = a.takeTurn(ctx, s); held == nil {
			return
		}
		defer held.release(context.Background())
		var cancel context.CancelFunc
		ctx, cancel = context.WithCancel(ctx)
		defer context.AfterFunc(held.held, cancel)()
		defer cancel()
	}
	had := s.certificate != nil
	failures := s.failures + 1
	// First of all, so that a process that dies in the middle does not start over
	// at once, and because what cannot be stored is not worth an order.
	err := a.remember(s.name, attempt{failures, time.Now(), a.cfg.pace.after(failures, false), "the attempt was interrupted"})
	var certificate *tls.Certificate
	var bundle []byte
	if err == nil {
		certificate, bundle, err = a.obtain(ctx, s)
	}
	if err != nil {
		if end.Err() != nil {
			return
		}
		next := a.cfg.pace.after(failures, refused(err))
		err = shorten(err)
		a.remember(s.name, attempt{failures, time.Now(), next, err.Error()}) // else the one from before stands
		a.update(func() { s.failures, s.err, s.due = failures, err, next })
		a.tell(ACMEFailed, s)
		return
	}
	a.update(func() {
		if again := a.sites[s.name]; again != nil {
			s = again // it was given up and wanted again meanwhile
		}
		s.certificate, s.failures, s.err = certificate, 0, nil
		s.due, s.ask = renewAt(certificate.Leaf), time.Now().Add(4*a.cfg.pace.ask)
	})
	if err = a.save(held, s.name, bundle); err != nil {
		// Served all the same. A restart would have to order again, and waits.
		a.update(func() { s.err = err })
		a.tell(ACMEFailed, s)
		return
	}
	if had {
		a.tell(ACMERenewed, s)
	} else {
		a.tell(ACMEObtained, s)
	}
}

// update changes a site under the lock.
func (a *ACME) update(change func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	change()
}

func (a *ACME) tell(outcome ACMEOutcome, s *site) {
	if a.cfg.Event == nil {
		return
	}
	event := ACMEEvent{Outcome: outcome, Name: s.name, Err: s.err, Next: s.next()}
	if s.certificate != nil {
		event.NotAfter = s.certificate.Leaf.NotAfter
	}
	a.cfg.Event(event)
}

// after is when to try again after so many failures in a row.
func (p pace) after(failures int, refused bool) time.Time {
	wait := p.first
	for n := 1; n < failures && wait < p.longest; n++ {
		wait *= 2
	}
	wait = min(wait, p.longest)
	if refused {
		wait = max(wait, p.refused)
	}
	return time.Now().Add(wait + mathrand.N(wait/10+1))
}

// renewAt is when a certificate should be replaced: at certmagic's ratio, when a
// third of its life is left.
func renewAt(leaf *x509.Certificate) time.Time {
	life := float64(leaf.NotAfter.Sub(leaf.NotBefore))
	return leaf.NotAfter.Add(-time.Duration(life * certmagic.DefaultRenewalWindowRatio))
}
