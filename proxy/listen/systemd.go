package listen

import (
	"fmt"
	"net"

	"github.com/coreos/go-systemd/v22/activation"
)

// Socket is an open socket that systemd handed over.
type Socket struct {
	Name     string // FileDescriptorName= of the socket unit; without it the unit's name
	Listener net.Listener
}

// Sockets returns the sockets of systemd's socket activation, in their order; none
// if the process was not started so. It takes LISTEN_PID, LISTEN_FDS and
// LISTEN_FDNAMES out of the environment, so that neither a second call nor a child
// process uses them again. A socket of another kind than TCP is an error, and then
// all are closed.
func Sockets() ([]Socket, error) {
	var sockets []Socket
	var failed error
	for _, f := range activation.Files(true) {
		l, err := net.FileListener(f)
		f.Close() // l has its own
		if err != nil {
			failed = fmt.Errorf("take over socket %s: %w", f.Name(), err)
			continue
		}
		sockets = append(sockets, Socket{Name: f.Name(), Listener: l})
		if _, ok := l.(*net.TCPListener); !ok {
			failed = fmt.Errorf("take over socket %s: %s is no TCP socket", f.Name(), l.Addr())
		}
	}
	if failed == nil {
		return sockets, nil
	}
	for _, s := range sockets {
		s.Listener.Close()
	}
	return nil, failed
}
