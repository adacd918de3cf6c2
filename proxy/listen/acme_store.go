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
	bundle, err := a.store.Load(ctx, a.bundleKey(name))
	switch {
	case err == nil:
		if s.certificate, err = parseBundle(name, bundle); err != nil {
			s.err = fmt.Errorf("read stored certificate: %w", err)
			break
		}
		s.due, s.ask = renewAt(s.certificate.Leaf), s.due.Add(a.cfg.pace.ask)
	case !errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("read stored certificate of %s: %w", name, err)
	}
	var last attempt
	text, err := a.store.Load(ctx, a.attemptKey(name))
	if err == nil && json.Unmarshal(text, &last) == nil { // nothing that cannot be lost
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

// save stores a key with its certificates, and forgets the attempts it took.
func (a *ACME) save(name string, bundle []byte) error {
	if err := a.store.Store(context.Background(), a.bundleKey(name), bundle); err != nil {
		return fmt.Errorf("store certificate of %s: %w", name, err)
	}
	if err := a.store.Delete(context.Background(), a.attemptKey(name)); err != nil {
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

// storage is certmagic's, without its lock files: there is one process and one
// order at a time, and a lock file outlives a process that was killed.
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
