package main

import (
	"os/exec"
	"runtime"

	"golang.org/x/sys/unix"
)

// startPinned starts a process on one processor, so that the generator has the
// other. A process inherits this from the thread that starts it.
func startPinned(cmd *exec.Cmd, cpu int) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var before, only unix.CPUSet
	only.Set(cpu)
	if unix.SchedGetaffinity(0, &before) == nil && unix.SchedSetaffinity(0, &only) == nil {
		defer unix.SchedSetaffinity(0, &before)
	}
	return cmd.Start()
}
