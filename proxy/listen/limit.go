package listen

import (
	"net"
	"sync/atomic"
)

// bounded is a socket that closes at once each connection over its limit.
type bounded struct {
	*net.TCPListener
	limit   int64 // 0: none
	open    atomic.Int64
	refused func()
}

func (l *bounded) Accept() (net.Conn, error) {
	for {
		c, err := l.AcceptTCP()
		if err != nil {
			return nil, err // net/http waits and tries again when files run out
		}
		if open := l.open.Add(1); l.limit <= 0 || open <= l.limit {
			return &conn{TCPConn: c, open: &l.open, done: make(chan struct{})}, nil
		}
		c.SetLinger(0) // a reset leaves nothing behind, whoever closes first
		c.Close()
		l.open.Add(-1)
		if l.refused != nil {
			l.refused()
		}
	}
}

// Files that are no client's connection and no call's: ledger, store, admin listener,
// key fetches, watches.
const reservedFiles = 64

// ConnectionLimit lowers want, a number of client connections, to what the process's
// limit of open files allows (RLIMIT_NOFILE; 64 files are kept back, and a connection
// counts twice, since its call needs one upstream). Zero or less means as many as
// allowed. The answer holds for all listeners together, is at least 1, and zero, no
// limit, only if want is and the process has none. On systems other than Unix it is
// want.
func ConnectionLimit(want int) int { return connectionLimit(want, openFiles()) }

func connectionLimit(want int, files uint64) int {
	want = max(want, 0)
	if files > 1<<30 {
		return want
	}
	room := max(1, (int(files)-reservedFiles)/2)
	if want == 0 {
		return room
	}
	return min(want, room)
}
