package main

import (
	"testing"

	"github.com/KimMachineGun/automemlimit/memlimit"
)

func TestMemoryLimit(t *testing.T) {
	const mib = 1 << 20
	for _, c := range []struct {
		container memlimit.Provider
		want      int64
	}{
		{memlimit.Limit(16 * mib), 8 * mib},
		{memlimit.Limit(128 * mib), 64 * mib},
		{memlimit.Limit(512 * mib), 448 * mib},
		{memlimit.Limit(1 << 40), 1024 * mib},
		{memlimit.Limit(1<<64 - 1), 1024 * mib},
		{func() (uint64, error) { return 0, memlimit.ErrNoLimit }, 1024 * mib},
	} {
		if got := memoryLimit(c.container); got != c.want {
			has, _ := c.container()
			t.Errorf("a container of %d bytes: limit %d, want %d", has, got, c.want)
		}
	}
}
