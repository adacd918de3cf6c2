package reconcile

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
)

// maxKeptFile is far more than either result takes.
const maxKeptFile = 64 << 20

// readKeptFile reads a result whole. The error wraps fs.ErrNotExist when there is none,
// and errTooLarge when it is larger than maxKeptFile.
func readKeptFile(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxKeptFile+1))
	if err == nil && len(data) > maxKeptFile {
		err = errTooLarge
	}
	return data, err
}

var errTooLarge = fmt.Errorf("it has more than %d MiB", maxKeptFile>>20)

// replaceKeptFile writes v in place of the file dir/name, whole or not at all: a reader
// finds the old one or the new one. Only the owner may read it: results hold names of
// users and addresses.
func replaceKeptFile(dir, name string, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(dir, name+".*.tmp") // 0600
	if err != nil {
		return err
	}
	_, err = f.Write(append(data, '\n'))
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		err = os.Rename(f.Name(), filepath.Join(dir, name))
	}
	if err != nil {
		os.Remove(f.Name())
	}
	return err
}

// Forget removes the users that match selects from the results in the data directory
// dir: findings and strangers that are about one go whole, elsewhere the name goes. It
// returns the names of the files that it changed, also with an error: one file may be
// damaged, which leaves its content as it is, and the other not. Either argument of
// match may be empty; objectID is a user_ref where the result is pseudonymous. What
// Microsoft still lists comes back with the next run.
func Forget(dir string, match func(userPrincipalName, objectID string) bool) (changed []string, err error) {
	var errs []error
	did := func(name string, is bool, err error) {
		switch {
		case err != nil:
			errs = append(errs, fmt.Errorf("forget a user in %s: %w", filepath.Join(dir, name), err))
		case is:
			changed = append(changed, name)
		}
	}
	k, err := readKept(dir)
	switch {
	case errors.Is(err, ErrNoResult):
	case err != nil:
		did(resultFile, false, err)
	case k.Result != nil && k.Result.forget(match):
		did(resultFile, true, k.write(dir))
	}
	s, err := LoadSignIns(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		did(signInsFile, false, err)
	case s.forget(match):
		did(signInsFile, true, SaveSignIns(dir, s))
	}
	return changed, errors.Join(errs...)
}

const forgottenNote = "Users were forgotten since: what was found about them is not shown."

func (r *Result) forget(match func(upn, object string) bool) bool {
	before := len(r.Findings)
	r.Findings = slices.DeleteFunc(r.Findings, func(f Finding) bool {
		return f.User+f.ObjectID != "" && match(f.User, f.ObjectID)
	})
	if len(r.Findings) == before {
		return false
	}
	if !slices.Contains(r.Notes, forgottenNote) {
		r.Notes = append(r.Notes, forgottenNote)
	}
	return true
}

func (s *SignIns) forget(match func(upn, object string) bool) bool {
	gone := false
	drop := func(user, id string) bool {
		is := user+id != "" && match(user, id)
		gone = gone || is
		return is
	}
	s.Strangers = slices.DeleteFunc(s.Strangers, func(w Stranger) bool { return drop(w.User, w.UserID) })
	principal := func(p Principal) bool { return drop(p.User, p.UserID) }
	for i := range s.Integrations {
		in := &s.Integrations[i]
		for k := range in.Causes {
			in.Causes[k].Principals = slices.DeleteFunc(in.Causes[k].Principals, principal)
		}
		for k := range in.Failures {
			in.Failures[k].Principals = slices.DeleteFunc(in.Failures[k].Principals, principal)
		}
	}
	if gone && !slices.Contains(s.Notes, forgottenNote) {
		s.Notes = append(s.Notes, forgottenNote)
	}
	return gone
}
