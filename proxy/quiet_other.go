//go:build !unix

package proxy

import "net"

// canBeQuiet says that quiet cannot tell: no connection is used synchronously.
const canBeQuiet = false

func quiet(net.Conn) func() bool { return func() bool { return false } }
