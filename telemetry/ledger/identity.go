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

// identities turns users into references. A goroutine of its own writes the names, so
// that a disk that does not answer holds up nobody.
type identities struct {
	dir          string
	path         string
	key          []byte
	pseudonymous bool // name nobody

	mu    sync.RWMutex
	memo  map[user]string
	known map[nameHash]struct{} // names that are in the file
	asked map[nameHash]*naming  // names that are to be written
	retry time.Time             // no name is asked for before this, after one failed
	late  bool                  // the disk does not answer
	ended bool

	names chan *naming    // to the writer, who alone touches what follows
	torn  bool            // the file does not end with a line feed
	gone  map[string]bool // references of forgotten users, as of stamp
	stamp fs.FileInfo     // of the list they were read from; nil when there was none
}

type user struct {
	tid, oid, upn string
	verified      bool
}

// naming is a name on its way into the file.
type naming struct {
	id   Identity
	done chan struct{} // closed once err says how it went
	err  error
}

// maxNamings is how many names may wait. Where they are more, later calls of the same
// users name them.
const maxNamings = 1024

// open reads the key, or makes it at the first start, and what is known.
func (ids *identities) open(dir string) error {
	ids.dir, ids.path = dir, filepath.Join(dir, identitiesFile)
	ids.memo = map[user]string{}
	ids.known = map[nameHash]struct{}{}
	ids.asked = map[nameHash]*naming{}
	ids.names = make(chan *naming, maxNamings)
	var err error
	if ids.key, err = identityKey(filepath.Join(dir, identitiesKey)); err != nil {
		return err
	}
	ids.torn = true // an empty line does no harm
	return eachIdentity(dir, func(id Identity) { ids.known[hashOf(id)] = struct{}{} })
}

// identityKey reads the key, or makes it.
func identityKey(name string) ([]byte, error) {
	key, err := readIdentityKey(name)
	if !errors.Is(err, fs.ErrNotExist) {
		return key, err
	}
	key = make([]byte, sha256.Size)
	rand.Read(key)
	if err := replaceFile(name, key); err != nil {
		return nil, fmt.Errorf("make key of identities: %w", err)
	}
	return key, nil
}

func readIdentityKey(name string) ([]byte, error) {
	key, err := os.ReadFile(name)
	if err == nil && len(key) != sha256.Size {
		err = fmt.Errorf("%s has %d bytes instead of %d", name, len(key), sha256.Size)
	}
	if err != nil {
		return nil, fmt.Errorf("read key of identities: %w", err)
	}
	return key, nil
}

// UserRefs returns the function that gives the user_ref that the records in the data
// directory dir have of a user, by tenant and object id in any case. The error wraps
// fs.ErrNotExist when there is no identities.key: it is not made.
func UserRefs(dir string) (func(tenantID, objectID string) string, error) {
	key, err := readIdentityKey(filepath.Join(dir, identitiesKey))
	if err != nil {
		return nil, err
	}
	return func(tid, oid string) string {
		return userRef(key, strings.ToLower(tid), strings.ToLower(oid)) // as policy.Token has them
	}, nil
}

func userRef(key []byte, tid, oid string) string {
	mac := hmac.New(sha256.New, key)
	io.WriteString(mac, tid)
	mac.Write([]byte{0})
	io.WriteString(mac, oid)
	return base64.RawURLEncoding.EncodeToString(mac.Sum(nil)[:userRefBytes])
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

// ref returns the reference of t's user. His name, if it is new, stands in the file
// then. The error says that it does not; the reference is good nevertheless, and another
// call tries again. It waits for the disk no longer than patience.
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

	ref = userRef(ids.key, u.tid, u.oid)
	// Cloned: a claim may be part of a whole token.
	u.tid, u.oid, u.upn = strings.Clone(u.tid), strings.Clone(u.oid), strings.Clone(u.upn)
	if u.verified && !ids.pseudonymous {
		if named, err := ids.ask(Identity{ref, u.tid, u.oid, u.upn}, now); !named {
			return ref, err
		}
	}

	ids.mu.Lock()
	defer ids.mu.Unlock()
	if len(ids.memo) >= maxMemo {
		clear(ids.memo)
	}
	ids.memo[u] = ref
	return ref, nil
}

// patience is how long a call waits for the name of its user to be written.
const patience = time.Second

// ask has id written and reports whether it stands in the file, or never will. The error
// is for one of those who wait for the same name.
func (ids *identities) ask(id Identity, now func() time.Time) (named bool, err error) {
	hash := hashOf(id)
	ids.mu.Lock()
	n, asked := ids.asked[hash]
	if _, ok := ids.known[hash]; ok || !asked && len(ids.known) >= maxKnown {
		ids.mu.Unlock()
		return true, nil
	}
	if !asked && !ids.ended && !now().Before(ids.retry) {
		n = &naming{id: id, done: make(chan struct{})}
		select {
		case ids.names <- n:
			ids.asked[hash] = n
		default:
			n = nil
		}
	}
	late := ids.late
	ids.mu.Unlock()
	if n == nil || late {
		return false, nil
	}
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case <-n.done:
		if n.err == nil || asked {
			return n.err == nil, nil
		}
		return false, fmt.Errorf("write identities: %w", n.err)
	case <-timer.C:
	}
	ids.mu.Lock()
	defer ids.mu.Unlock()
	if ids.late {
		return false, nil
	}
	ids.late = true
	return false, fmt.Errorf("write identities: %w", errStalled)
}

// write writes the names that are asked for until stop.
func (ids *identities) write(stop <-chan struct{}, now func() time.Time) {
	for {
		var n *naming
		select {
		case n = <-ids.names:
		case <-stop:
			ids.mu.Lock()
			ids.ended = true
			ids.mu.Unlock()
			select {
			case n = <-ids.names:
			default:
				return
			}
		}
		n.err = ids.name(n.id)
		ids.settle(n, now)
	}
}

// settle tells those who wait for n how it went.
func (ids *identities) settle(n *naming, now func() time.Time) {
	hash := hashOf(n.id)
	ids.mu.Lock()
	delete(ids.asked, hash)
	ids.late = false
	if n.err == nil {
		ids.known[hash] = struct{}{}
	} else {
		ids.retry = now().Add(time.Second)
	}
	ids.mu.Unlock()
	close(n.done)
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

// nameHash stands for a reference and a name.
type nameHash [16]byte

func hashOf(id Identity) nameHash {
	sum := sha256.Sum256([]byte(id.UserRef + "\x00" + id.UPN))
	return nameHash(sum[:16])
}
