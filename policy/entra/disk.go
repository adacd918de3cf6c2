package entra

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// keptSet is a key set on disk: what was fetched, from where and when.
type keptSet struct {
	Authority string          `json:"authority"`
	Tenant    string          `json:"tenant"`
	Version   string          `json:"version"`
	FetchedAt time.Time       `json:"fetched_at"`
	KeySet    json.RawMessage `json:"key_set"`
}

func (v *Verifier) keptPath(s *source) string {
	return filepath.Join(v.dir, fmt.Sprintf("keys-%s-v%d.json", s.tenant, s.version))
}

// keep writes the keys just fetched to disk, whole or not at all. Where the disk is
// so slow that newer ones came meanwhile, those are kept instead.
func (v *Verifier) keep(s *source, set *keySet, body []byte) {
	if v.dir == "" {
		return
	}
	s.keeping.Lock()
	defer s.keeping.Unlock()
	if s.set.Load() != set {
		return
	}
	path := v.keptPath(s)
	text, err := json.Marshal(keptSet{v.authority, s.tenant, s.version.String(), set.fetched.UTC(), body})
	if err == nil {
		err = replaceFile(path, text)
	}
	if err != nil {
		v.tell(s, EventNotKept, fmt.Errorf("keep key set %s: %w", path, err))
	}
}

// replaceFile writes text to path with mode 0600, so that a reader finds either
// the old content or the new.
func replaceFile(path string, text []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".keys-*") // 0600
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	if err == nil {
		err = f.Sync()
	}
	err = errors.Join(err, f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		_ = os.Remove(f.Name())
	}
	return err
}

// recall reads the keys that keep wrote. Whoever can write that file can sign
// tokens, so it must be ours alone; it must also be of this authority and tenant,
// and fresh enough. A missing file is no error.
func (v *Verifier) recall(s *source, now time.Time) error {
	if v.dir == "" {
		return nil
	}
	path := v.keptPath(s)
	body, err := readOwn(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = v.adopt(s, body, now)
	}
	if err != nil {
		return fmt.Errorf("recall key set %s: %w", path, err)
	}
	return nil
}

func (v *Verifier) adopt(s *source, text []byte, now time.Time) error {
	var k keptSet
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(&k); err != nil {
		return errors.New("not a kept key set")
	}
	age := now.Sub(k.FetchedAt)
	switch {
	case k.Authority != v.authority || k.Tenant != s.tenant || k.Version != s.version.String():
		return errors.New("it is of another authority or tenant")
	case age < -v.leeway:
		return errors.New("it was fetched in the future")
	case age > v.maxStale:
		return errors.New("it is too old")
	}
	set, err := parseKeySet(k.KeySet, k.FetchedAt, v.generation.Add(1))
	if err != nil {
		return err
	}
	s.set.Store(set)
	return nil
}

// readOwn reads a regular file that belongs to us and that nobody else may write.
func readOwn(path string) ([]byte, error) {
	named, err := os.Lstat(path)
	if err != nil {
		return nil, err
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || !os.SameFile(named, info) {
		return nil, errors.New("not a regular file")
	}
	if !onlyOurs(info) {
		return nil, errors.New("others own it or may write it")
	}
	body, err := io.ReadAll(io.LimitReader(f, 2*maxKeySetBytes+1))
	if err == nil && len(body) > 2*maxKeySetBytes {
		err = errors.New("too large")
	}
	return body, err
}
