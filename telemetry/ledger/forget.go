package ledger

import (
	"bufio"
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/gofrs/flock"
)

// forgottenFile lists the user_refs that nobody is to be named for again, one a line.
const forgottenFile = "forgotten"

// FindUser returns whom user may be in the data directory dir: a user principal
// name, that someone has or once had, an object id, both without regard to case, or
// a user_ref. There is an Identity for each name of each such user.
func FindUser(dir, user string) ([]Identity, error) {
	refs := map[string]bool{user: true}
	if err := eachIdentity(dir, func(id Identity) {
		if strings.EqualFold(user, id.UPN) || strings.EqualFold(user, id.ObjectID) {
			refs[id.UserRef] = true
		}
	}); err != nil {
		return nil, err
	}
	var found []Identity
	err := eachIdentity(dir, func(id Identity) {
		if refs[id.UserRef] && !slices.Contains(found, id) {
			found = append(found, id)
		}
	})
	return found, err
}

// IsUserRef reports whether s has the form of a user_ref.
func IsUserRef(s string) bool {
	b, err := base64.RawURLEncoding.Strict().DecodeString(s)
	return err == nil && len(b) == userRefBytes
}

// Forget removes the names that stand for the given user_refs from the data
// directory dir, and sees to it that they do not come back: not with the next call,
// not with the next start. The records, and so the chain, stay as they are: they
// hold the user_ref, which is a keyed hash of tenant and object id. A guard may be
// running there. It returns how many lines of identities.jsonl it removed.
//
// What it cannot do: whoever has identities.key and an object id can compute the
// user_ref anew, and copies of the file elsewhere still hold the names.
func Forget(dir string, refs ...string) (lines int, err error) {
	if i := slices.IndexFunc(refs, func(r string) bool { return !IsUserRef(r) }); i >= 0 {
		return 0, fmt.Errorf("forget user: %q is no user_ref", refs[i])
	}
	lock := identitiesLock(dir)
	defer lock.Close()
	if err := lock.Lock(); err != nil {
		return 0, fmt.Errorf("forget user: lock identities: %w", err)
	}
	gone, _, err := readForgotten(dir)
	if err != nil {
		return 0, err
	}
	all := maps.Clone(gone)
	if all == nil {
		all = map[string]bool{}
	}
	for _, r := range refs {
		all[r] = true
	}
	// The list first: from then on readers pass over the names, whatever comes.
	if len(all) > len(gone) {
		list := strings.Join(slices.Sorted(maps.Keys(all)), "\n") + "\n"
		if err := replaceFile(filepath.Join(dir, forgottenFile), []byte(list)); err != nil {
			return 0, fmt.Errorf("forget user: %w", err)
		}
	}
	name := filepath.Join(dir, identitiesFile)
	data, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("forget user: %w", err)
	}
	var keep bytes.Buffer
	for line := range bytes.Lines(data) {
		var id Identity
		switch {
		case json.Unmarshal(line, &id) != nil:
			// Empty, or cut short by a crash: half a name, of anybody.
		case all[id.UserRef]:
			lines++
		default:
			keep.Write(bytes.TrimRight(line, "\n"))
			keep.WriteByte('\n')
		}
	}
	if keep.Len() == len(data) {
		return 0, nil
	}
	if err := replaceFile(name, keep.Bytes()); err != nil {
		return 0, fmt.Errorf("forget user: %w", err)
	}
	return lines, nil
}

// readForgotten returns the user_refs of those who were forgotten, and the file
// they stand in; nil and nil when there is none.
func readForgotten(dir string) (map[string]bool, fs.FileInfo, error) {
	f, err := os.Open(filepath.Join(dir, forgottenFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, fmt.Errorf("read list of forgotten users: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, nil, fmt.Errorf("read list of forgotten users: %w", err)
	}
	gone := map[string]bool{}
	in := bufio.NewScanner(f)
	for in.Scan() {
		if ref := strings.TrimSpace(in.Text()); ref != "" {
			gone[ref] = true
		}
	}
	if err := in.Err(); err != nil {
		return nil, nil, fmt.Errorf("read list of forgotten users: %w", err)
	}
	return gone, info, nil
}

// identitiesLock is held by whoever writes identities.jsonl.
func identitiesLock(dir string) *flock.Flock {
	return flock.New(filepath.Join(dir, "identities.lock"), flock.SetPermissions(0o600))
}
