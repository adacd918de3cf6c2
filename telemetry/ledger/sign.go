package ledger

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
)

const (
	keyFile    = "ledger.key" // PKCS#8, PEM
	publicFile = "ledger.pub" // its public half: PKIX, PEM

	privateBlock = "PRIVATE KEY"
	publicBlock  = "PUBLIC KEY"

	maxKeyFile = 16 << 10
)

// LoadKey reads the key that signs checkpoints and exports: Ed25519, PKCS#8, PEM,
// as `openssl genpkey -algorithm ed25519` writes it. A key that others than owner
// and group may read, or that the group may write, is refused; on Windows nobody
// looks. The error wraps fs.ErrNotExist when there is none, and never holds the key.
func LoadKey(path string) (ed25519.PrivateKey, error) {
	key, err := loadKey(path)
	if err != nil {
		return nil, fmt.Errorf("read ledger key: %w", err)
	}
	return key, nil
}

func loadKey(path string) (ed25519.PrivateKey, error) {
	block, info, err := readPEM(path, privateBlock)
	if err != nil {
		return nil, err
	}
	if mode := info.Mode().Perm(); mode&0o027 != 0 && runtime.GOOS != "windows" {
		return nil, fmt.Errorf("others may read or change %s (mode %#o): chmod 600 it, and make a new key if it was so on a shared machine", path, mode)
	}
	parsed, err := x509.ParsePKCS8PrivateKey(block)
	if err != nil {
		return nil, fmt.Errorf("%s is no private key in PKCS#8", path)
	}
	key, ok := parsed.(ed25519.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("%s holds a key of type %T: it must be Ed25519, as openssl genpkey -algorithm ed25519 makes it", path, parsed)
	}
	return key, nil
}

// LoadPublicKey reads the public half of a ledger's key: Ed25519, PKIX, PEM, as it
// stands in the data directory in ledger.pub. The error wraps fs.ErrNotExist when
// there is none.
func LoadPublicKey(path string) (ed25519.PublicKey, error) {
	block, _, err := readPEM(path, publicBlock)
	if err != nil {
		return nil, fmt.Errorf("read public key of ledger: %w", err)
	}
	parsed, err := x509.ParsePKIXPublicKey(block)
	if err != nil {
		return nil, fmt.Errorf("read public key of ledger: %s is no public key in PKIX", path)
	}
	key, ok := parsed.(ed25519.PublicKey)
	if !ok {
		return nil, fmt.Errorf("read public key of ledger: %s holds a key of type %T instead of Ed25519", path, parsed)
	}
	return key, nil
}

// KeyID names a key: the first 16 bytes of SHA-256 of the public half (PKIX, DER),
// base64url.
func KeyID(pub ed25519.PublicKey) string {
	sum := sha256.Sum256(publicDER(pub))
	return base64.RawURLEncoding.EncodeToString(sum[:16])
}

// ownKey reads the key of the data directory dir, or makes it at the first start.
// The caller holds the lock of dir.
func ownKey(dir string) (ed25519.PrivateKey, error) {
	name := filepath.Join(dir, keyFile)
	key, err := loadKey(name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if key, err = makeKey(name); err != nil {
			return nil, fmt.Errorf("make ledger key: %w", err)
		}
	case err != nil:
		return nil, fmt.Errorf("read ledger key: %w", err)
	}
	return key, nil
}

func makeKey(name string) (ed25519.PrivateKey, error) {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return key, replaceFile(name, pem.EncodeToMemory(&pem.Block{Type: privateBlock, Bytes: der}))
}

// publishKey lets ledger.pub in dir hold pub. One that it held before stays as
// ledger-KEYID.pub: older checkpoints are checked with it.
func publishKey(dir string, pub ed25519.PublicKey) error {
	name := filepath.Join(dir, publicFile)
	// One that cannot be read is of use to nobody, and is replaced.
	if before, err := LoadPublicKey(name); err == nil {
		if before.Equal(pub) {
			return nil
		}
		if err := os.Rename(name, filepath.Join(dir, "ledger-"+KeyID(before)+".pub")); err != nil {
			return fmt.Errorf("keep the former public key of the ledger: %w", err)
		}
	}
	if err := replaceFile(name, pem.EncodeToMemory(&pem.Block{Type: publicBlock, Bytes: publicDER(pub)})); err != nil {
		return fmt.Errorf("write public key of ledger: %w", err)
	}
	return nil
}

func publicDER(pub ed25519.PublicKey) []byte {
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		panic(err) // an Ed25519 key always has an encoding
	}
	return der
}

// readPEM reads the one PEM block in the file path, which must have the given type.
func readPEM(path, blockType string) ([]byte, fs.FileInfo, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, nil, fmt.Errorf("%s is no regular file", path)
	}
	data, err := io.ReadAll(io.LimitReader(f, maxKeyFile+1))
	if err != nil {
		return nil, nil, err
	}
	if len(data) == 0 {
		return nil, nil, fmt.Errorf("%s is empty: remove it, then a new one is made, or put the right one there", path)
	}
	block, rest := pem.Decode(data)
	switch {
	case len(data) > maxKeyFile || block == nil:
		return nil, nil, fmt.Errorf("%s is no PEM file", path)
	case block.Type != blockType:
		return nil, nil, fmt.Errorf("%s holds %q instead of %q", path, block.Type, blockType)
	}
	if next, _ := pem.Decode(rest); next != nil {
		return nil, nil, fmt.Errorf("%s holds more than one PEM block", path)
	}
	return block.Bytes, info, nil
}
