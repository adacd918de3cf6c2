package ledger

import (
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/google/uuid"
	"github.com/partnerguard/partnerguard/telemetry"
)

// Checkpoint is a signature over the chain: who trusts the key knows that every
// record up to Commit is what the guard wrote. As JSON it has the members of a
// checkpoint line but for n and type.
type Checkpoint struct {
	Ledger    string    // the ledger's identity
	Time      time.Time // of the signature, UTC, whole microseconds
	Commit    uint64    // number of the commit that it signs
	Hash      [32]byte  // of the chain there
	Key       string    // KeyID of the key that signed
	Signature []byte    // Ed25519
}

// checkpointFile is in the data directory and holds the latest checkpoint whose
// line is on the disk. Without it nobody could tell that the end of the ledger was
// cut off.
const checkpointFile = "checkpoint.json"

// sign returns the checkpoint of commit, signed with key.
func sign(key ed25519.PrivateKey, ledger string, at time.Time, commit uint64, hash digest) Checkpoint {
	c := Checkpoint{
		Ledger: ledger,
		Time:   at.UTC().Truncate(time.Microsecond),
		Commit: commit,
		Hash:   hash,
		Key:    KeyID(key.Public().(ed25519.PublicKey)),
	}
	c.Signature = ed25519.Sign(key, c.text())
	return c
}

// text is what is signed. Its first line keeps it apart from whatever else the key
// signs.
func (c *Checkpoint) text() []byte {
	return fmt.Appendf(nil, "partnerguard ledger checkpoint 1\nledger %s\ncommit %d\nhash %s\ntime %s\n",
		c.Ledger, c.Commit, encodeHash(c.Hash), c.Time.UTC().Format(telemetry.TimeLayout))
}

// Verify checks the signature with pub. It says nothing of whether the commit is
// on a chain.
func (c Checkpoint) Verify(pub ed25519.PublicKey) error {
	if id := KeyID(pub); c.Key != id {
		return fmt.Errorf("checkpoint of record %d is signed with another key: %s instead of %s", c.Commit, c.Key, id)
	}
	if !ed25519.Verify(pub, c.text(), c.Signature) {
		return fmt.Errorf("checkpoint of record %d has a false signature", c.Commit)
	}
	return nil
}

type checkpointJSON struct {
	N         uint64 `json:"n,omitempty"`
	Type      string `json:"type,omitempty"`
	Ledger    string `json:"ledger"`
	Time      string `json:"time"`
	Commit    uint64 `json:"commit"`
	Hash      string `json:"hash"`
	Key       string `json:"key"`
	Signature string `json:"signature"`
}

// MarshalJSON writes c as checkpoint.json holds it.
func (c Checkpoint) MarshalJSON() ([]byte, error) {
	return json.Marshal(checkpointJSON{
		Ledger: c.Ledger, Time: c.Time.UTC().Format(telemetry.TimeLayout), Commit: c.Commit, Hash: encodeHash(c.Hash),
		Key: c.Key, Signature: base64.RawURLEncoding.EncodeToString(c.Signature),
	})
}

// UnmarshalJSON is ParseCheckpoint.
func (c *Checkpoint) UnmarshalJSON(b []byte) error {
	parsed, err := ParseCheckpoint(b)
	if err == nil {
		*c = parsed
	}
	return err
}

// ParseCheckpoint reads a checkpoint line, or a checkpoint as JSON. It does not
// check the signature.
func ParseCheckpoint(line []byte) (Checkpoint, error) {
	var (
		j  checkpointJSON
		in = json.NewDecoder(bytes.NewReader(line))
	)
	in.DisallowUnknownFields()
	if err := in.Decode(&j); err != nil {
		return Checkpoint{}, fmt.Errorf("checkpoint is not readable: %w", err)
	}
	if len(bytes.TrimSpace(line[in.InputOffset():])) > 0 {
		return Checkpoint{}, errors.New("checkpoint is not readable: something follows it")
	}
	if j.Type != "" && j.Type != TypeCheckpoint {
		return Checkpoint{}, fmt.Errorf("record of type %q is no checkpoint", j.Type)
	}
	c := Checkpoint{Ledger: j.Ledger, Commit: j.Commit, Key: j.Key}
	var err error
	if c.Time, err = time.Parse(telemetry.TimeLayout, j.Time); err != nil {
		return Checkpoint{}, errors.New("checkpoint has no time")
	}
	if c.Hash, err = decodeHash(j.Hash); err != nil || j.Hash == "" {
		return Checkpoint{}, errors.New("checkpoint has no hash")
	}
	c.Signature, err = base64.RawURLEncoding.Strict().DecodeString(j.Signature)
	if err != nil || len(c.Signature) != ed25519.SignatureSize {
		return Checkpoint{}, errors.New("checkpoint has no signature")
	}
	return c, nil
}

// appendMembers appends c as the members of its line.
func (c *Checkpoint) appendMembers(dst []byte) []byte {
	b, err := json.Marshal(c)
	if err != nil {
		panic(err) // there is nothing in it that JSON could not hold
	}
	return append(dst, b[1:len(b)-1]...)
}

// keepFormerCheckpoint gives the checkpoint of a ledger that is gone from the data
// directory another name: it is of no use to the new one, and may be evidence.
func (l *Ledger) keepFormerCheckpoint() error {
	path := filepath.Join(l.cfg.Dir, checkpointFile)
	name := "unreadable"
	switch c, err := ReadCheckpoint(path); {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err == nil && uuid.Validate(c.Ledger) == nil:
		name = c.Ledger
	}
	if err := os.Rename(path, filepath.Join(l.cfg.Dir, "checkpoint-"+name+".json")); err != nil {
		return fmt.Errorf("keep the checkpoint of the former ledger: %w", err)
	}
	return nil
}

// LatestCheckpoint reads checkpoint.json of the data directory dir. The error wraps
// fs.ErrNotExist when nothing was signed yet.
func LatestCheckpoint(dir string) (Checkpoint, error) {
	c, err := ReadCheckpoint(filepath.Join(dir, checkpointFile))
	if errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("nothing is signed in %s: %w", dir, fs.ErrNotExist)
	}
	return c, err
}

// ReadCheckpoint reads a file that holds one checkpoint.
func ReadCheckpoint(path string) (Checkpoint, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return Checkpoint{}, fmt.Errorf("read checkpoint: %w", err)
	}
	c, err := ParseCheckpoint(b)
	if err != nil {
		return Checkpoint{}, fmt.Errorf("read checkpoint %s: %w", path, err)
	}
	return c, nil
}
