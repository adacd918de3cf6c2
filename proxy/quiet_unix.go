//go:build unix

package proxy

import (
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// canBeQuiet says that quiet can tell.
const canBeQuiet = true

// quiet returns a function that reports, without waiting, whether the connection is open
// and nothing has come on it that was not read.
func quiet(c net.Conn) func() bool {
	sc, ok := c.(syscall.Conn)
	if !ok {
		return func() bool { return false }
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return func() bool { return false }
	}
	var (
		one   [1]byte
		errno error
	)
	peek := func(fd uintptr) {
		_, _, errno = unix.Recvfrom(int(fd), one[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
	}
	return func() bool { return raw.Control(peek) == nil && errno == unix.EAGAIN }
}
