package reconcile

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// hintedError is an error with the way out.
type hintedError struct {
	error
	hint string
}

func (e *hintedError) Unwrap() error { return e.error }
func (e *hintedError) Hint() string  { return e.hint }

// readFiles reads answers that were saved: a file, or every *.json of a directory,
// which may be pages. What they are the rows say, and of a list without rows its
// file's name.
func readFiles(from string, now time.Time) (*microsoft, error) {
	names := []string{from}
	info, err := os.Stat(from)
	if err != nil {
		return nil, &hintedError{fmt.Errorf("read Microsoft's answers: %w", err), "--from names a file or a directory with the saved answers"}
	}
	const hint = "save the answers of /v1/partnerRequests, /v1/nonMfaCompliantPartnerPrincipals and /v1/applicationmfaadoptionstatus as they come, as NAME.json"
	if info.IsDir() {
		entries, err := os.ReadDir(from)
		if err != nil {
			return nil, fmt.Errorf("read Microsoft's answers: %w", err)
		}
		names = nil
		for _, e := range entries {
			if strings.EqualFold(filepath.Ext(e.Name()), ".json") && !e.IsDir() {
				names = append(names, filepath.Join(from, e.Name()))
			}
		}
		if len(names) == 0 {
			return nil, &hintedError{fmt.Errorf("read Microsoft's answers: no *.json in %s", from), hint}
		}
	}
	ms := &microsoft{source: from, taken: now}
	found := [apis]bool{}
	totals := [apis]int64{}
	var taken time.Time
	for _, name := range names {
		page, modified, err := readAnswerFile(name)
		if err != nil {
			return nil, &hintedError{fmt.Errorf("read %s: %w", name, err), hint}
		}
		a := apiOfName(filepath.Base(name))
		if len(page.rows) > 0 {
			a = page.rows[0].api()
		}
		if a == unknownAPI {
			return nil, &hintedError{fmt.Errorf("read %s: it has no rows that say which API it is the answer of", name), hint}
		}
		before := len(page.rows)
		page.rows = slices.DeleteFunc(page.rows, func(r apiRow) bool { return r.api() != a })
		d := &ms.apis[a]
		if d.add(page); len(page.rows) < before {
			d.defect(fmt.Sprintf("%s: rows of another API are among those of %s", filepath.Base(name), a))
		}
		found[a] = true
		totals[a] = max(totals[a], page.total)
		if modified.After(taken) {
			taken = modified
		}
	}
	// It was saved when it was taken or later.
	if taken.Before(now) {
		ms.taken = taken.UTC()
	}
	for a := range apis {
		if !found[a] {
			ms.apis[a].absent = "no file has it"
			continue
		}
		ms.apis[a].count(totals[a])
	}
	return ms, nil
}

// apiOfName finds the name of an API in that of a file.
func apiOfName(name string) api {
	for a := range apis {
		if strings.Contains(strings.ToLower(name), strings.ToLower(a.String())) {
			return a
		}
	}
	return unknownAPI
}

func readAnswerFile(name string) (*apiPage, time.Time, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, time.Time{}, errors.Unwrap(err) // the caller names the file
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, time.Time{}, err
	}
	if !info.Mode().IsRegular() {
		return nil, time.Time{}, errors.New("it is no file")
	}
	data, err := io.ReadAll(io.LimitReader(f, maxAnswer+1))
	if err != nil {
		return nil, time.Time{}, err
	}
	if len(data) > maxAnswer {
		return nil, time.Time{}, fmt.Errorf("it is larger than %d MiB", maxAnswer>>20)
	}
	page, err := parseAnswer(data)
	if err != nil {
		return nil, time.Time{}, err
	}
	return page, info.ModTime(), nil
}
