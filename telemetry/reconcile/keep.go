package reconcile

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"time"
)

const (
	resultFile    = "reconcile.json"
	resultFormat  = "partnerguard-reconcile"
	resultVersion = 1
)

// ErrNoResult says that a data directory holds no result of an earlier run.
var ErrNoResult = errors.New("there is no result of reconcile")

// LoadResult returns the result that the last run kept in the data directory dir. The
// error wraps ErrNoResult when there is none; where there is a way out, it has a
// method Hint() string.
func LoadResult(dir string) (*Result, error) {
	k, err := readKept(dir)
	if err != nil {
		return nil, err
	}
	if k.Result == nil {
		return nil, fmt.Errorf("read %s: %w", filepath.Join(dir, resultFile), ErrNoResult)
	}
	return k.Result, nil
}

// kept is the file between two runs.
type kept struct {
	Format  string `json:"format"`
	Version int    `json:"version"`
	// Ended is up to when the requests that Microsoft listed were seen.
	Ended time.Time `json:"ended"`
	// Own are the requests of the last runs to the Security APIs.
	Own    []ownRequest `json:"own_requests,omitempty"`
	Result *Result      `json:"result"`
}

// readKept reads the file. The error wraps ErrNoResult when there is none.
func readKept(dir string) (*kept, error) {
	name := filepath.Join(dir, resultFile)
	data, err := readKeptFile(name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("read %s: %w", name, ErrNoResult)
	case err != nil && !errors.Is(err, errTooLarge):
		return nil, fmt.Errorf("read the last result: %w", err)
	}
	const aside = "move the file away: the next run begins anew, and may miss what Microsoft no longer lists"
	bad := func(what string) error {
		return &hintedError{fmt.Errorf("read the last result: %s %s", name, what), aside}
	}
	var head struct {
		Format  string
		Version int
	}
	if err != nil {
		return nil, bad(fmt.Sprintf("is larger than %d MiB: it is not reconcile's", maxKeptFile>>20))
	}
	switch err := json.Unmarshal(data, &head); {
	case err != nil && !json.Valid(data):
		return nil, bad("is damaged: it is no JSON")
	case err != nil || head.Format != resultFormat:
		return nil, bad("is not reconcile's: it has another format")
	case head.Version > resultVersion:
		return nil, &hintedError{
			fmt.Errorf("read the last result: %s is of a newer partnerguard: version %d, and this one knows %d", name, head.Version, resultVersion),
			"update partnerguard, or " + aside,
		}
	case head.Version < 1:
		return nil, bad("is damaged: it has no version")
	}
	var k kept
	if err := json.Unmarshal(data, &k); err != nil {
		return nil, bad("is damaged: " + cleanText(err.Error()))
	}
	return &k, nil
}

// write replaces the file, whole: a reader finds the old one or the new one.
func (k *kept) write(dir string) (err error) {
	defer func() {
		if err != nil {
			err = &hintedError{fmt.Errorf("keep the result: %w", err), "the next run does not know of this one; does the user have write access to the data directory?"}
		}
	}()
	return replaceKeptFile(dir, resultFile, k)
}
