package ledger

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

func TestTheFirstStartMakesAKeyThatTheNextOneFinds(t *testing.T) {
	dir := t.TempDir()
	key, err := ownKey(dir)
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(filepath.Join(dir, keyFile))
	if err != nil {
		t.Fatal(err)
	}
	if mode := info.Mode().Perm(); mode != 0o600 && runtime.GOOS != "windows" {
		t.Errorf("the key has mode %#o, want 0600", mode)
	}
	again, err := ownKey(dir)
	if err != nil {
		t.Fatal(err)
	}
	if !again.Equal(key) {
		t.Error("the second start made another key")
	}
	other, err := ownKey(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if other.Equal(key) {
		t.Error("two directories got the same key")
	}
}

func TestThePublicKeyIsPublishedAndAFormerOneKept(t *testing.T) {
	dir := t.TempDir()
	pub := func(name string) ed25519.PublicKey {
		t.Helper()
		p, err := LoadPublicKey(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	first, _, _ := ed25519.GenerateKey(rand.Reader)
	second, _, _ := ed25519.GenerateKey(rand.Reader)
	for _, p := range []ed25519.PublicKey{first, first, second} {
		if err := publishKey(dir, p); err != nil {
			t.Fatal(err)
		}
		if !pub(publicFile).Equal(p) {
			t.Errorf("%s does not hold the key that was published", publicFile)
		}
	}
	if !pub("ledger-" + KeyID(first) + ".pub").Equal(first) {
		t.Error("the former public key is lost")
	}
	if len(KeyID(first)) != 22 || KeyID(first) == KeyID(second) {
		t.Errorf("key ids %q and %q: want 22 characters each, and different", KeyID(first), KeyID(second))
	}
	if err := os.WriteFile(filepath.Join(dir, publicFile), []byte("rubbish"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := publishKey(dir, second); err != nil || !pub(publicFile).Equal(second) {
		t.Errorf("a damaged public key is not replaced: %v", err)
	}
}

func TestAKeyThatCannotBeUsedIsRefused(t *testing.T) {
	block := func(typ string, der []byte) []byte {
		return pem.EncodeToMemory(&pem.Block{Type: typ, Bytes: der})
	}
	pkcs8 := func(key any) []byte {
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	pub, key, _ := ed25519.GenerateKey(rand.Reader)
	curve, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	good := block(privateBlock, pkcs8(key))

	for name, c := range map[string]struct {
		data []byte
		mode fs.FileMode
		want string
	}{
		"others may read it":        {good, 0o604, "chmod 600"},
		"all may read it":           {good, 0o644, "chmod 600"},
		"the group may change it":   {good, 0o660, "chmod 600"},
		"it is empty":               {nil, 0o600, "is empty"},
		"it is cut short":           {good[:len(good)/2], 0o600, "no PEM file"},
		"it is no PEM":              {[]byte("secret"), 0o600, "no PEM file"},
		"the block is damaged":      {block(privateBlock, []byte("secret")), 0o600, "no private key in PKCS#8"},
		"it is a public key":        {block(publicBlock, publicDER(pub)), 0o600, `holds "PUBLIC KEY"`},
		"it is for another method":  {block(privateBlock, pkcs8(curve)), 0o600, "must be Ed25519"},
		"there are two of them":     {append(append([]byte{}, good...), good...), 0o600, "more than one"},
		"it is far too long":        {append(append([]byte{}, good...), make([]byte, maxKeyFile)...), 0o600, "no PEM file"},
		"the key before is no text": {make([]byte, 64), 0o600, "no PEM file"},
	} {
		t.Run(name, func(t *testing.T) {
			if c.mode != 0o600 && runtime.GOOS == "windows" {
				t.Skip("no modes here")
			}
			path := filepath.Join(t.TempDir(), "key.pem")
			if err := os.WriteFile(path, c.data, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(path, c.mode); err != nil {
				t.Fatal(err)
			}
			got, err := LoadKey(path)
			if got != nil || err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), path) {
				t.Errorf("LoadKey = %d bytes, error %v; want an error that names the file and says %q", len(got), err, c.want)
			}
			if err != nil && (strings.Contains(err.Error(), "secret") || strings.Contains(err.Error(), "MC4C")) {
				t.Errorf("the error holds what the file holds: %v", err)
			}
		})
	}

	path := filepath.Join(t.TempDir(), "key.pem")
	if _, err := LoadKey(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("LoadKey of a missing file: %v, want fs.ErrNotExist", err)
	}
	if _, err := LoadKey(t.TempDir()); err == nil {
		t.Error("LoadKey took a directory")
	}
	if err := os.WriteFile(path, good, 0o640); err != nil {
		t.Fatal(err)
	}
	if got, err := LoadKey(path); err != nil || !got.Equal(key) {
		t.Errorf("a key that the group may read is refused: %v", err)
	}
	if _, err := LoadPublicKey(path); err == nil {
		t.Error("LoadPublicKey took a private key")
	}
}
