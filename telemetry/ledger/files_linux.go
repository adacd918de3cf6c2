package ledger

import (
	"os"

	"golang.org/x/sys/unix"
)

// datasync flushes f without the times in its inode, which no reader needs.
func datasync(f *os.File) error {
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	cerr := conn.Control(func(fd uintptr) {
		for {
			if err = unix.Fdatasync(int(fd)); err != unix.EINTR {
				return
			}
		}
	})
	if cerr != nil {
		return cerr
	}
	return os.NewSyscallError("fdatasync", err)
}
