package reconcile

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
)

// signInsFile is where the data directory keeps the latest SignIns.
const signInsFile = "signins.json"

// signInsVersion is that of SignIns as it is kept.
const signInsVersion = 1

// SaveSignIns keeps s in the data directory dir, in place of what was there, whole or
// not at all, and without names where they are pseudonymous. Only the owner may read
// it: it holds names of users and addresses.
func SaveSignIns(dir string, s *SignIns) error {
	if s.Pseudonymous {
		s = s.withoutNames()
	}
	if err := replaceKeptFile(dir, signInsFile, s); err != nil {
		return fmt.Errorf("keep sign-ins: %w", err)
	}
	return nil
}

// LoadSignIns returns what SaveSignIns kept in the data directory dir. The error wraps
// fs.ErrNotExist when there is nothing; else it has a method Hint() string.
func LoadSignIns(dir string) (*SignIns, error) {
	name := filepath.Join(dir, signInsFile)
	data, err := readKeptFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("load sign-ins: %w", err)
	}
	var s SignIns
	if err == nil {
		err = json.Unmarshal(data, &s)
	}
	switch {
	case err != nil || s.Version < 1:
		return nil, &InputError{name, "it does not hold what partnerguard signins kept", "run partnerguard signins again, which replaces it", err}
	case s.Version > signInsVersion:
		return nil, &InputError{name, fmt.Sprintf("it has version %d, this program knows %d", s.Version, signInsVersion), "use the newer partnerguard that wrote it, or run partnerguard signins again, which replaces it", nil}
	}
	return &s, nil
}
