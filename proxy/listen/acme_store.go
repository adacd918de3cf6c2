package listen

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"time"

	"github.com/caddyserver/certmagic"
)

// load makes a site of what is stored for name. A certificate that cannot be used
// is as good as none.
func (a *ACME) load(ctx context.Context, name string) (*site, error) {
	s := &site{name: name, due: time.Now()}
	bundle, err := a.dir.Load(ctx, a.bundleKey(name))
	switch {
	case err == nil:
		if s.certificate, err = parseBundle(name, bundle); err != nil {
			s.err = fmt.Errorf("read stored certificate: %w", err)
		}
	case !errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("read stored certificate of %s: %w", name, err)
	}
	if a.cfg.Fleet != nil {
		// The goroutine looks again at once, and reports what is wrong.
		if certificate, bundle, err := a.shared(ctx, name); err == nil && newer(certificate, s.certificate) {
			s.certificate, s.err = certificate, nil
			a.dir.Store(ctx, a.bundleKey(name), bundle)
		}
	}
	if s.certificate != nil {
		s.due, s.ask = renewAt(s.certificate.Leaf), s.due.Add(a.cfg.pace.ask)
	}
	if last, ok := a.lastAttempt(ctx, name); ok {
		s.failures, s.err = last.Failures, errors.New(last.Error)
		again := slices.MinFunc([]time.Time{
			last.Next,
			last.At.Add(a.cfg.pace.restart),
			time.Now().Add(a.cfg.pace.longest), // a clock set back
		}, time.Time.Compare)
		if again.After(s.due) {
			s.due = again
		}
	}
	return s, nil
}

// lastAttempt is the order that failed last, if that can be read: nothing that
// cannot be lost.
func (a *ACME) lastAttempt(ctx context.Context, name string) (last attempt, ok bool) {
	text, err := a.store.Load(ctx, a.attemptKey(name))
	return last, err == nil && json.Unmarshal(text, &last) == nil
}

// save stores a key with its certificates, and forgets the attempts it took. held
// is the guard's turn to order for the fleet; nil without one.
func (a *ACME) save(held *lease, name string, bundle []byte) error {
	err := a.dir.Store(context.Background(), a.bundleKey(name), bundle)
	if held != nil {
		err = errors.Join(err, held.storage.storeHeld(context.Background(), held, a.bundleKey(name), bundle))
	}
	if err == nil {
		err = a.store.Delete(context.Background(), a.attemptKey(name))
	}
	if err != nil {
		return fmt.Errorf("store certificate of %s: %w", name, err)
	}
	return nil
}

// attempt is an order that has not succeeded, as it is stored.
type attempt struct {
	Failures int       `json:"failures"`
	At       time.Time `json:"at"`
	Next     time.Time `json:"next"`
	Error    string    `json:"error"`
}

func (a *ACME) remember(name string, last attempt) error {
	text, err := json.Marshal(last)
	if err == nil {
		err = a.store.Store(context.Background(), a.attemptKey(name), text)
	}
	if err != nil {
		return fmt.Errorf("note attempt to obtain certificate for %s: %w", name, err)
	}
	return nil
}

func (a *ACME) bundleKey(name string) string {
	return path.Join("certificates", certmagic.StorageKeys.Safe(a.issuer.IssuerKey()), name+".pem")
}

func (a *ACME) attemptKey(name string) string {
	return path.Join("attempts", certmagic.StorageKeys.Safe(a.issuer.IssuerKey()), name+".json")
}

// storage is certmagic's in a directory, without its lock files: there is one
// process and one order at a time, and a lock file outlives a process that was
// killed.
type storage struct{ *certmagic.FileStorage }

func (storage) Lock(context.Context, string) error   { return nil }
func (storage) Unlock(context.Context, string) error { return nil }

// parseBundle reads a key with its certificates, PEM.
func parseBundle(name string, bundle []byte) (*tls.Certificate, error) {
	certificate, err := tls.X509KeyPair(bundle, bundle)
	if err != nil {
		return nil, err
	}
	if err := certificate.Leaf.VerifyHostname(name); err != nil {
		return nil, err
	}
	return &certificate, nil
}
