package listen

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/caddyserver/certmagic"
	"go.uber.org/zap"
	"golang.org/x/time/rate"
)

// fleet is what a guard needs to obtain certificates together with others. Of a
// guard on its own it is not used.
type fleet struct {
	// answerer answers challenges that others have started. ACME.issuer cannot: it
	// changes from order to order.
	answerer *certmagic.ACMEIssuer
	// lookups bounds what strangers who ask for a challenge cost the database.
	lookups *rate.Limiter
	// stop closes the port of http-01, nil while it is not open. The goroutine's.
	stop func()
	// portErr is why it could not be opened, as it was told. The goroutine's.
	portErr error
}

func (f *fleet) init(magic *certmagic.Config, directory string) {
	f.answerer = certmagic.NewACMEIssuer(magic, certmagic.ACMEIssuer{CA: directory, Logger: zap.NewNop()})
	f.lookups = rate.NewLimiter(20, 20)
}

// takeTurn makes this guard the one that orders for s. Nil: it need not order now,
// because another one does, has done so, or failed lately; or it must not, because
// the storage cannot be reached. Then s says when to look again.
func (a *ACME) takeTurn(ctx context.Context, s *site) *lease {
	held, err := a.cfg.Fleet.acquire(ctx, orderLock(a.issuer.IssuerKey(), s.name))
	if errors.Is(err, errLocked) {
		a.update(func() { s.later = time.Now().Add(jitter(a.cfg.pace.look / 12)) })
		return nil
	}
	if err == nil {
		if err = a.takeOver(ctx, s); err == nil {
			a.update(func() { s.reached() })
			if last, ok := a.lastAttempt(ctx, s.name); ok && last.Failures > s.failures {
				a.update(func() {
					s.failures, s.err = last.Failures, errors.New(last.Error)
					s.due = last.Next
					if most := time.Now().Add(a.cfg.pace.longest); s.due.After(most) { // its clock is ahead
						s.due = most
					}
				})
			}
		}
		if err == nil && !time.Now().Before(s.due) {
			return held
		}
		held.release(ctx)
	}
	if err != nil {
		a.noStorage(ctx, s, err)
	}
	return nil
}

// lookAround brings s up to date with the fleet: takes over what another guard has
// stored, or stores what this one alone has, say after the database was lost.
func (a *ACME) lookAround(ctx context.Context, s *site) {
	a.update(func() { s.look = time.Now().Add(jitter(a.cfg.pace.look)) })
	if a.cfg.HTTP01 {
		if err := a.answerAlways(); err != nil && a.fleet.portErr == nil {
			a.fleet.portErr = fmt.Errorf("listen for the http-01 challenge: %w", err)
			a.update(func() { s.err = a.fleet.portErr })
			a.tell(ACMEFailed, s)
		}
	}
	if err := a.takeOver(ctx, s); err != nil {
		a.noStorage(ctx, s, err)
		return
	}
	a.update(func() { s.reached() })
}

// reached notes that the storage could be used.
func (s *site) reached() {
	if s.unreachable > 0 {
		s.unreachable, s.err, s.later = 0, nil, time.Time{}
	}
}

// noStorage notes that the storage cannot be used, and tells so the first time. An
// order is put off: from one to ten minutes.
func (a *ACME) noStorage(ctx context.Context, s *site, err error) {
	if ctx.Err() != nil {
		return
	}
	a.update(func() {
		s.unreachable++
		s.err = shorten(err)
		s.later = time.Now().Add(min(time.Until(a.cfg.pace.after(s.unreachable, false)), checkInterval))
	})
	if s.unreachable == 1 {
		a.tell(ACMEFailed, s)
	}
}

// takeOver puts the fleet's certificate to use if it lasts longer than that of s,
// and stores that of s in the other case.
func (a *ACME) takeOver(ctx context.Context, s *site) error {
	certificate, bundle, err := a.shared(ctx, s.name)
	switch {
	case err != nil:
		return err
	case newer(certificate, s.certificate):
		err := a.dir.Store(ctx, a.bundleKey(s.name), bundle)
		a.update(func() {
			s.certificate, s.failures, s.err = certificate, 0, err
			s.due, s.ask = renewAt(certificate.Leaf), time.Now().Add(4*a.cfg.pace.ask)
		})
		a.tell(ACMEShared, s)
	case newer(s.certificate, certificate):
		if bundle, err = a.dir.Load(ctx, a.bundleKey(s.name)); err == nil {
			return a.store.Store(ctx, a.bundleKey(s.name), bundle)
		}
	}
	return nil
}

// shared is what the fleet has stored for name; nil if there is nothing, or
// nothing that can be used.
func (a *ACME) shared(ctx context.Context, name string) (*tls.Certificate, []byte, error) {
	bundle, err := a.store.Load(ctx, a.bundleKey(name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, err
	}
	certificate, err := parseBundle(name, bundle)
	if err != nil {
		return nil, nil, nil
	}
	return certificate, bundle, nil
}

// newer reports whether c lasts longer than other; nil lasts not at all.
func newer(c, other *tls.Certificate) bool {
	return c != nil && (other == nil || c.Leaf.NotAfter.After(other.Leaf.NotAfter))
}

// answerOrder is answerHTTP for one order. In a fleet the port stays open: the
// next validation may be another guard's.
func (a *ACME) answerOrder() (stop func(), err error) {
	if a.cfg.Fleet == nil {
		return a.answerHTTP()
	}
	return func() {}, a.answerAlways()
}

func (a *ACME) answerAlways() (err error) {
	if a.fleet.stop == nil {
		if a.fleet.stop, err = a.answerHTTP(); err == nil {
			a.fleet.portErr = nil
		}
	}
	return err
}

func (f *fleet) stopAnswering() {
	if f.stop != nil {
		f.stop()
	}
}

// answerForFleet answers a validation that another guard waits for, if it is one.
func (a *ACME) answerForFleet(w http.ResponseWriter, r *http.Request) bool {
	if a.cfg.Fleet == nil || !certmagic.LooksLikeHTTPChallenge(r) {
		return false
	}
	host := r.Host
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	return a.mayLookUp(r.Context(), host) && a.fleet.answerer.HandleHTTPChallenge(w, r)
}

// mayLookUp reports whether the fleet's storage may be asked for a challenge of
// this name, after waiting for its turn.
func (a *ACME) mayLookUp(ctx context.Context, name string) bool {
	a.mu.RLock()
	wanted := a.sites[strings.ToLower(name)] != nil
	a.mu.RUnlock()
	if !wanted {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, storageTimeout)
	defer cancel()
	return a.fleet.lookups.Wait(ctx) == nil
}

// orderLock is the lock under which one guard orders for name.
func orderLock(issuer, name string) string {
	return "order/" + certmagic.StorageKeys.Safe(issuer) + "/" + name
}

// jitter adds up to a tenth, so that the guards of a fleet do not all come at once.
func jitter(d time.Duration) time.Duration { return d + rand.N(d/10+1) }
