package config

import (
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"
	"unicode"
)

// Secret is a reference to a secret, never the secret itself: file:PATH or
// env:NAME. Empty is none. A Secret may be printed.
type Secret string

// maxSecret is more than any token or key needs.
const maxSecret = 64 << 10

// Read returns what s refers to, less the white space around it; for the empty
// Secret nothing. env returns the value of an environment variable, as os.Getenv
// does. What is missing, empty or more than one line is an error, which never
// holds the secret.
func (s Secret) Read(env func(string) string) (string, error) {
	if s == "" {
		return "", nil
	}
	if !s.valid() {
		return "", errors.New("read secret: it is neither file:PATH nor env:NAME")
	}
	value := ""
	if file, ok := s.file(); ok {
		info, err := os.Stat(file)
		if err == nil && info.Size() > maxSecret {
			err = fmt.Errorf("%s is larger than %d bytes", file, maxSecret)
		}
		if err != nil {
			return "", fmt.Errorf("read secret: %w", err)
		}
		data, err := os.ReadFile(file)
		if err != nil {
			return "", fmt.Errorf("read secret: %w", err)
		}
		value = string(data)
	} else {
		value = env(strings.TrimPrefix(string(s), "env:"))
	}
	switch value = strings.TrimSpace(value); {
	case value == "":
		return "", fmt.Errorf("read secret: %s is empty", s)
	case strings.ContainsFunc(value, unicode.IsControl):
		return "", fmt.Errorf("read secret: %s holds more than one line", s)
	}
	return value, nil
}

var variable = regexp.MustCompile(`^env:[A-Za-z_][A-Za-z0-9_]*$`)

// valid reports whether s is a reference, or empty.
func (s Secret) valid() bool {
	_, isFile := s.file()
	return s == "" || isFile || variable.MatchString(string(s))
}

// file returns the path in s if it refers to a file.
func (s Secret) file() (path string, ok bool) {
	path, ok = strings.CutPrefix(string(s), "file:")
	return path, ok && path != ""
}

// check reports an s that is no reference, without repeating it: it may be the
// secret.
func (s Secret) check(bad report, path string) {
	if !s.valid() {
		bad(path, "is no reference to a secret", "put the secret into a file and write file:PATH, or into an environment variable and write env:NAME")
	}
}
