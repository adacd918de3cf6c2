package ledger

import (
	"bufio"
	"bytes"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/partnerguard/partnerguard/policy"
	"github.com/partnerguard/partnerguard/telemetry"
)

// Identity is who a user_ref stands for.
type Identity struct {
	UserRef  string `json:"user_ref"`
	TenantID string `json:"tid"`
	ObjectID string `json:"oid"`
	UPN      string `json:"upn,omitempty"`
}

// Identities reads who the users in the records of the data directory dir are, by
// user_ref; the latest name of each. Forgotten users are not among them: the records
// stay, but no longer say who it was.
func Identities(dir string) (map[string]Identity, error) {
	gone, _, err := readForgotten(dir)
	if err != nil {
		return nil, err
	}
	m := map[string]Identity{}
	err = eachIdentity(dir, func(id Identity) {
		if !gone[id.UserRef] {
			m[id.UserRef] = id
		}
	})
	return m, err
}

func eachIdentity(dir string, visit func(Identity)) error {
	f, err := os.Open(filepath.Join(dir, identitiesFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read identities: %w", err)
	}
	defer f.Close()
	in := bufio.NewReader(f)
	for {
		line, err := in.ReadBytes('\n')
		var id Identity
		// A line that a crash cut short is passed over.
		if json.Unmarshal(line, &id) == nil && id.UserRef != "" {
			visit(id)
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read identities: %w", err)
		}
	}
}

const (
	identitiesFile = "identities.jsonl"
	identitiesKey  = "identities.key"

	userRefBytes = 16 // of the keyed hash

	maxMemo  = 1 << 14 // users whose reference is remembered
	maxKnown = 1 << 18 // users with a name in the file
)

// identities turns users into references.
type identities struct {
	dir          string
	path         string
	key          []byte
	pseudonymous bool // name nobody

	mu    sync.RWMutex
	memo  map[user]string
	known map[[16]byte]struct{} // reference and name, hashed, that are in the file
	retry time.Time             // no write before this, after one failed
	torn  bool                  // the file does not end with a line feed
	gone  map[string]bool       // references of forgotten users, as of stamp
	stamp fs.FileInfo           // of the list they were read from; nil when there was none
}

type user struct {
	tid, oid, upn string
	verified      bool
}

// open reads the key, or makes it at the first start, and what is known.
func (ids *identities) open(dir string) error {
	ids.dir, ids.path = dir, filepath.Join(dir, identitiesFile)
	ids.memo = map[user]string{}
	ids.known = map[[16]byte]struct{}{}
	var err error
	if ids.key, err = identityKey(filepath.Join(dir, identitiesKey)); err != nil {
		return err
	}
	ids.torn = true // an empty line does no harm
	return eachIdentity(dir, func(id Identity) { ids.known[nameHash(id.UserRef, id.UPN)] = struct{}{} })
}

func identityKey(name string) ([]byte, error) {
	key, err := os.ReadFile(name)
	if err == nil && len(key) != sha256.Size {
		err = fmt.Errorf("%s has %d bytes instead of %d", name, len(key), sha256.Size)
	}
	if err == nil || !errors.Is(err, fs.ErrNotExist) {
		if err != nil {
			return nil, fmt.Errorf("read key of identities: %w", err)
		}
		return key, nil
	}
	key = make([]byte, sha256.Size)
	rand.Read(key)
	if err := replaceFile(name, key); err != nil {
		return nil, fmt.Errorf("make key of identities: %w", err)
	}
	return key, nil
}

// replaceFile puts data under name, 0600, so that after a crash there is either
// what was there before or all of data.
func replaceFile(name string, data []byte) error {
	tmp := name + ".tmp"
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		err = os.Rename(tmp, name)
	}
	if err != nil {
		os.Remove(tmp)
		return err
	}
	return syncDir(filepath.Dir(name))
}

// ref returns the reference of t's user. The error says that his name could not be
// written; the reference is good nevertheless, and another call tries again.
func (ids *identities) ref(t *policy.Token, now func() time.Time) (string, error) {
	if t.ObjectID == "" || t.Kind == policy.KindAppOnly {
		return "", nil
	}
	u := user{t.TenantID, t.ObjectID, t.UPN, t.Verified}
	ids.mu.RLock()
	ref, ok := ids.memo[u]
	ids.mu.RUnlock()
	if ok {
		return ref, nil
	}

	mac := hmac.New(sha256.New, ids.key)
	io.WriteString(mac, u.tid)
	mac.Write([]byte{0})
	io.WriteString(mac, u.oid)
	ref = base64.RawURLEncoding.EncodeToString(mac.Sum(nil)[:userRefBytes])

	ids.mu.Lock()
	defer ids.mu.Unlock()
	if u.verified && !ids.pseudonymous {
		hash := nameHash(ref, u.upn)
		if _, ok := ids.known[hash]; !ok && len(ids.known) < maxKnown {
			if at := now(); at.Before(ids.retry) {
				return ref, nil
			} else if err := ids.name(Identity{ref, u.tid, u.oid, u.upn}); err != nil {
				ids.retry = at.Add(time.Second)
				return ref, fmt.Errorf("write identities: %w", err)
			}
			ids.known[hash] = struct{}{}
		}
	}
	if len(ids.memo) >= maxMemo {
		clear(ids.memo)
	}
	// Cloned: a claim may be part of a whole token.
	u.tid, u.oid, u.upn = strings.Clone(u.tid), strings.Clone(u.oid), strings.Clone(u.upn)
	ids.memo[u] = ref
	return ref, nil
}

// name writes who id is, unless he was forgotten. The lock keeps Forget, which may
// run in another process, from replacing the file meanwhile; nobody waits for it here.
func (ids *identities) name(id Identity) error {
	lock := identitiesLock(ids.dir)
	defer lock.Close()
	switch ok, err := lock.TryLock(); {
	case err != nil:
		return err
	case !ok:
		return errors.New("someone is being forgotten just now")
	}
	if err := ids.lookForgotten(); err != nil {
		return err
	}
	if ids.gone[id.UserRef] {
		return nil
	}
	return ids.append(id)
}

// lookForgotten reads the list of forgotten users again if it changed.
func (ids *identities) lookForgotten() error {
	now, err := os.Stat(filepath.Join(ids.dir, forgottenFile))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		ids.gone, ids.stamp = nil, nil
		return nil
	case err != nil:
		return err
	case ids.stamp != nil && os.SameFile(now, ids.stamp) && now.ModTime().Equal(ids.stamp.ModTime()) && now.Size() == ids.stamp.Size():
		return nil
	}
	ids.gone, ids.stamp, err = readForgotten(ids.dir)
	return err
}

// append writes one line. The file is opened each time: Forget may have replaced it.
func (ids *identities) append(id Identity) error {
	f, err := os.OpenFile(ids.path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	var b bytes.Buffer
	if ids.torn {
		b.WriteByte('\n')
	}
	line := telemetry.AppendString([]byte(`{"user_ref":`), id.UserRef)
	line = telemetry.AppendString(append(line, `,"tid":`...), id.TenantID)
	line = telemetry.AppendString(append(line, `,"oid":`...), id.ObjectID)
	line = telemetry.AppendString(append(line, `,"upn":`...), id.UPN)
	b.Write(append(line, "}\n"...))
	_, err = f.Write(b.Bytes())
	ids.torn = err != nil
	return errors.Join(err, f.Close())
}

func nameHash(ref, upn string) [16]byte {
	sum := sha256.Sum256([]byte(ref + "\x00" + upn))
	return [16]byte(sum[:16])
}
