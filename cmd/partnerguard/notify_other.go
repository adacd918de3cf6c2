//go:build !linux

package main

import systemd "github.com/coreos/go-systemd/v22/daemon"

func reloading() string { return systemd.SdNotifyReloading }
