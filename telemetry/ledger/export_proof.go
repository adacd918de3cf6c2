package ledger

import (
	"bufio"
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// ProofSuffix after the name of an exported file is the name of its proof.
const ProofSuffix = ".proof.json"

// Proof says what an exported file holds, and of which ledger. It is signed with
// that ledger's key.
type Proof struct {
	Format  string    `json:"format"` // exportFormat
	Version int       `json:"version"`
	Ledger  string    `json:"ledger"`
	Time    time.Time `json:"time"` // of the export, UTC, in whole microseconds

	File   ProofFile `json:"file"`
	Filter string    `json:"filter"` // in words
	First  uint64    `json:"first"`  // number of the first record in the file; 0 when there is none
	Last   uint64    `json:"last"`   // and of the last one
	// Open counts calls without outcome: they had none yet, or the ledger lacks it.
	// GivenUp of them may have one, which came too late.
	Open    uint64 `json:"open"`
	GivenUp uint64 `json:"given_up,omitempty"`
	// Removed counts records in the range that retention has removed.
	Removed uint64 `json:"removed,omitempty"`
	// Damage names what did not verify and is not in the file.
	Damage []string `json:"damage,omitempty"`

	// All records behind After and up to Head were read and verified; those that the
	// filter selects are in the file.
	After ProofCommit `json:"after"`
	Head  Checkpoint  `json:"head"`
	// Checkpoints are those of the ledger that cover the range.
	Checkpoints []Checkpoint `json:"checkpoints,omitempty"`

	Key       string `json:"key"`        // KeyID of the key that signed
	PublicKey []byte `json:"public_key"` // its public half: PKIX, DER
}

// ProofFile is the exported file.
type ProofFile struct {
	Name   string `json:"name"`
	Format string `json:"format"`
	Rows   uint64 `json:"rows"` // calls; lines of jsonl
	Bytes  int64  `json:"bytes"`
	SHA256 string `json:"sha256"` // hex, as sha256sum writes it
}

// ProofCommit is a place on the chain.
type ProofCommit struct {
	Commit uint64 `json:"commit"`
	Hash   string `json:"hash"` // base64url
}

const (
	exportFormat  = "partnerguard-export"
	exportVersion = 1

	// proofDomain stands before what is signed, and keeps it apart from whatever else
	// the key signs.
	proofDomain = "partnerguard ledger export 1\n"

	maxProof = 16 << 20
)

// signedProof is the file: the signature is over proofDomain and the statement as
// compact JSON.
type signedProof struct {
	Statement json.RawMessage `json:"statement"`
	Signature []byte          `json:"signature"`
}

// proof sums up.
func (x *export) proof() *Proof {
	pub := x.Key.Public().(ed25519.PublicKey)
	now := x.Now().UTC().Truncate(time.Microsecond)
	return &Proof{
		Format: exportFormat, Version: exportVersion, Ledger: x.ledger, Time: now,
		File: ProofFile{
			Name: filepath.Base(x.Path), Format: x.Format, Rows: x.count, Bytes: x.file.n,
			SHA256: hex.EncodeToString(x.file.sum.Sum(nil)),
		},
		Filter: x.Filter.String(), First: x.first, Last: x.last, Open: x.opened, GivenUp: x.givenUp,
		Removed: x.removed, Damage: x.damage,
		After:       ProofCommit{x.after.seq, encodeHash(x.after.hash)},
		Head:        sign(x.Key, x.ledger, now, x.head.seq, x.head.hash),
		Checkpoints: x.checkpoints,
		Key:         KeyID(pub), PublicKey: publicDER(pub),
	}
}

// sign returns the text of the proof's file.
func (p *Proof) sign(key ed25519.PrivateKey) ([]byte, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false) // so that other programs write the same
	if err := enc.Encode(p); err != nil {
		return nil, fmt.Errorf("export: encode proof: %w", err)
	}
	statement := bytes.TrimSuffix(b.Bytes(), []byte("\n"))
	signature := ed25519.Sign(key, slices.Concat([]byte(proofDomain), statement))
	b2 := bytes.NewBufferString("{\n\"statement\":")
	b2.Write(statement)
	fmt.Fprintf(b2, ",\n\"signature\":%q\n}\n", base64.StdEncoding.EncodeToString(signature))
	return b2.Bytes(), nil
}

// ProofReport is what VerifyProof found.
type ProofReport struct {
	Proof Proof `json:"proof"`
	// Trusted says that the signature was checked with a key that was given, not only
	// with the one that the proof itself brings.
	Trusted bool `json:"trusted"`
	// Problem says what does not hold; empty when all does.
	Problem string `json:"problem,omitempty"`
}

// VerifyProof checks the proof in the file path, and the exported file that lies
// beside it: that the signature holds with pub, that the file is the one that was
// exported, and of jsonl that its lines are the chain. With a nil pub it takes the
// key in the proof, which says only that all comes from one hand. Whether it is on
// the chain of a ledger says Verify with its Marks. The error says that the files
// could not be read or are no proof.
func VerifyProof(path string, pub ed25519.PublicKey) (ProofReport, error) {
	p, problem, err := readProof(path, pub)
	rep := ProofReport{Proof: p, Trusted: pub != nil, Problem: problem}
	if err != nil || problem != "" {
		return rep, err
	}
	name := strings.TrimSuffix(path, ProofSuffix)
	if name == path { // renamed
		name = filepath.Join(filepath.Dir(path), p.File.Name)
	}
	f, err := os.Open(name)
	if err != nil {
		return rep, fmt.Errorf("read exported file: %w", err)
	}
	defer f.Close()
	file := counted{w: io.Discard, sum: sha256.New()}
	in := io.TeeReader(f, &file)
	var chain string
	if p.File.Format == ExportLines && len(p.Damage) == 0 {
		if chain, err = p.verifyLines(in); err != nil {
			return rep, err
		}
	}
	if _, err := io.Copy(io.Discard, in); err != nil {
		return rep, fmt.Errorf("read exported file: %w", err)
	}
	switch sum := hex.EncodeToString(file.sum.Sum(nil)); {
	case file.n != p.File.Bytes:
		rep.Problem = fmt.Sprintf("%s has %d bytes, the proof is of %d", filepath.Base(name), file.n, p.File.Bytes)
	case sum != p.File.SHA256:
		rep.Problem = fmt.Sprintf("%s was changed since it was exported: its SHA-256 is %s, the proof is of %s", filepath.Base(name), sum, p.File.SHA256)
	default:
		rep.Problem = chain
	}
	return rep, nil
}

func readProof(path string, pub ed25519.PublicKey) (p Proof, problem string, err error) {
	f, err := os.Open(path)
	if err != nil {
		return p, "", fmt.Errorf("read proof: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxProof))
	if err != nil {
		return p, "", fmt.Errorf("read proof: %w", err)
	}
	var file signedProof
	if err := json.Unmarshal(data, &file); err != nil {
		return p, "", fmt.Errorf("read proof: %s is no proof of an export: %w", path, err)
	}
	// It may have been laid out anew on its way.
	var statement bytes.Buffer
	if err := json.Compact(&statement, file.Statement); err != nil || json.Unmarshal(file.Statement, &p) != nil || p.Format != exportFormat {
		return p, "", fmt.Errorf("read proof: %s is no proof of an export", path)
	}
	if p.Version != exportVersion {
		return p, "", fmt.Errorf("read proof: %s has version %d, this program reads version %d", path, p.Version, exportVersion)
	}
	parsed, err := x509.ParsePKIXPublicKey(p.PublicKey)
	own, ok := parsed.(ed25519.PublicKey)
	if err != nil || !ok {
		return p, "the public key in the proof is not readable", nil
	}
	if pub == nil {
		pub = own
	}
	switch {
	case KeyID(pub) != p.Key:
		return p, fmt.Sprintf("the proof is signed with the key %s, not with %s", p.Key, KeyID(pub)), nil
	case !ed25519.Verify(pub, append([]byte(proofDomain), statement.Bytes()...), file.Signature):
		return p, "the signature of the proof is false", nil
	}
	for _, c := range p.Marks() {
		// Older checkpoints may bear a former key.
		if err := c.Verify(pub); err != nil && c.Key == p.Key {
			return p, err.Error(), nil
		}
		if c.Ledger != p.Ledger {
			return p, fmt.Sprintf("the proof has a checkpoint of another ledger, %s", c.Ledger), nil
		}
	}
	return p, "", nil
}

// Marks are the places of the chain that the proof signs, for
// VerifyOptions.Checkpoints.
func (p *Proof) Marks() []Checkpoint { return append(slices.Clone(p.Checkpoints), p.Head) }

// verifyLines checks that the lines of a jsonl file are the chain from After to Head.
func (p *Proof) verifyLines(r io.Reader) (problem string, err error) {
	hash, err := decodeHash(p.After.Hash)
	if err != nil {
		return "the proof does not say where on the chain it begins", nil
	}
	var (
		in   = bufio.NewReaderSize(r, 1<<20)
		sums = append([]byte(nil), hash[:]...)
		next = p.After.Commit + 1
		last = p.After.Commit
	)
	for n := 1; ; n++ {
		line, err := in.ReadBytes('\n')
		if errors.Is(err, io.EOF) && len(line) == 0 {
			break
		}
		if err != nil && !errors.Is(err, io.EOF) {
			return "", fmt.Errorf("read exported file: %w", err)
		}
		seq, typ, rest, ok := parseHead(line)
		if !ok {
			return fmt.Sprintf("line %d of the file is not a record", n), nil
		}
		if typ == TypeHeader {
			h, err := parseHeader(line, p.File.Name)
			if err != nil {
				return fmt.Sprintf("line %d of the file: %v", n, err), nil
			}
			// What was set aside is no part of the chain, and takes its numbers along.
			if before, err := decodeHash(h.PrevHash); err == nil && len(h.SetAside) > 0 {
				hash, next, sums = before, seq, append(sums[:0], before[:]...)
			}
		}
		if seq != next {
			return fmt.Sprintf("line %d of the file is record %d, where %d belongs", n, seq, next), nil
		}
		next++
		if typ != typeCommit {
			sum, ok := lineDigest(line, typ, rest)
			if !ok {
				return fmt.Sprintf("line %d of the file says that a record was removed, but not which", n), nil
			}
			sums = append(sums, sum[:]...)
			continue
		}
		hash = sha256.Sum256(sums)
		check, ok := parseCommit(nil, rest)
		if !ok || !bytes.Equal(check[:checkHash], hash[:checkHash]) {
			return fmt.Sprintf("line %d of the file: the hash of commit %d is not that of the lines before it", n, seq), nil
		}
		last, sums = seq, append(sums[:0], hash[:]...)
	}
	if last != p.Head.Commit || hash != p.Head.Hash {
		return fmt.Sprintf("the chain in the file ends at commit %d, and not as commit %d that the proof signs", last, p.Head.Commit), nil
	}
	return "", nil
}
