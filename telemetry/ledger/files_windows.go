package ledger

import (
	"errors"

	"golang.org/x/sys/windows"
)

func freeBytes(dir string) (int64, error) {
	p, err := windows.UTF16PtrFromString(dir)
	if err != nil {
		return 0, err
	}
	var free uint64
	if err := windows.GetDiskFreeSpaceEx(p, &free, nil, nil); err != nil {
		return 0, err
	}
	return int64(free), nil
}

// syncDir does nothing: Windows has no such call, NTFS journals names.
func syncDir(string) error { return nil }

// diskFull reports whether err only says that there is no room now.
func diskFull(err error) bool {
	return errors.Is(err, windows.ERROR_DISK_FULL) || errors.Is(err, windows.ERROR_HANDLE_DISK_FULL)
}
