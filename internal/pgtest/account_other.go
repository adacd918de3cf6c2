//go:build !unix

package pgtest

import (
	"errors"
	"os"
	"os/exec"
)

// account is the user that the server runs as: this process's.
type account struct{}

func unprivileged() (account, error) { return account{}, nil }

func (account) run(*exec.Cmd) {}

func (account) own(string) error { return nil }

func (account) write(path string, data []byte) error { return os.WriteFile(path, data, 0o600) }

func childrenOf(int) []int { return nil }

func freeze(int) (thaw func(), err error) { return nil, errors.ErrUnsupported }

func alive(int) bool { return false }
