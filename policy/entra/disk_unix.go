//go:build unix

package entra

import (
	"io/fs"
	"os"
	"syscall"
)

// onlyOurs reports whether a file is ours and neither group nor others may write it.
func onlyOurs(info fs.FileInfo) bool {
	stat, ok := info.Sys().(*syscall.Stat_t)
	return ok && int(stat.Uid) == os.Geteuid() && info.Mode().Perm()&0o022 == 0
}
