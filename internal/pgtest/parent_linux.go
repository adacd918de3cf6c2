package pgtest

import "syscall"

// endWithParent makes the server end when the tests do, also when they are killed
// or run into their time limit.
func endWithParent(attr *syscall.SysProcAttr) { attr.Pdeathsig = syscall.SIGINT }
