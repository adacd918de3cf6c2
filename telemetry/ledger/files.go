package ledger

import (
	"io"
	"os"
)

// files is what the ledger asks of the file system when it writes, so that tests
// can make it fail.
type files interface {
	// create makes an empty file, or empties the one that is there.
	create(name string) (file, error)
	// extend opens a file to write at its end.
	extend(name string) (file, error)
	rename(from, to string) error
	remove(name string) error
	// syncDir makes the names in dir durable.
	syncDir(dir string) error
	// free returns how many bytes an unprivileged writer may still take in dir.
	free(dir string) (int64, error)
}

// file is a segment being written. A Write that fails may have written a part.
type file interface {
	io.WriteCloser
	// datasync returns once what was written is on the disk.
	datasync() error
}

// osFiles is the operating system's.
type osFiles struct{}

func (osFiles) create(name string) (file, error) {
	return openFile(name, os.O_CREATE|os.O_TRUNC|os.O_WRONLY)
}

func (osFiles) extend(name string) (file, error) {
	return openFile(name, os.O_APPEND|os.O_WRONLY)
}

func openFile(name string, flag int) (file, error) {
	f, err := os.OpenFile(name, flag, 0o600)
	if err != nil {
		return nil, err
	}
	return osFile{f}, nil
}

func (osFiles) rename(from, to string) error   { return os.Rename(from, to) }
func (osFiles) remove(name string) error       { return os.Remove(name) }
func (osFiles) syncDir(dir string) error       { return syncDir(dir) }
func (osFiles) free(dir string) (int64, error) { return freeBytes(dir) }

type osFile struct{ *os.File }

func (f osFile) datasync() error { return datasync(f.File) }
