package emulator

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"io"
	"math/big"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
)

// KeysMode is how the key set endpoints answer.
type KeysMode int

// The modes of the key set endpoints.
const (
	KeysOK    KeysMode = iota
	KeysDown           // the connection is closed without an answer
	Keys500            // 500 with a short text
	KeysHang           // no answer until the client gives up
	KeysEmpty          // 200 {"keys":[]}
	KeysHTML           // 200 with an HTML page, as captive portals do
	KeysHuge           // 200 with 64 MiB of well-formed JSON
)

// consumerTenant is Microsoft's tenant for personal accounts: its keys are
// published beside the others, bound to it by their issuer member.
const consumerTenant = "9188040d-6c67-4c5b-b112-36a304b66dad"

// signingKey is an Entra signing key with the self-signed certificate that
// gives it its name.
type signingKey struct {
	kid         string // base64url SHA-1 of the certificate
	private     *rsa.PrivateKey
	certificate []byte
}

func newSigningKey() *signingKey {
	private, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic("emulator: generate signing key: " + err.Error()) // never: crypto/rand cannot fail
	}
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(now.UnixNano()),
		Subject:      pkix.Name{CommonName: "accounts.accesscontrol.windows.net"},
		NotBefore:    now.Add(-24 * time.Hour),
		NotAfter:     now.Add(5 * 365 * 24 * time.Hour),
	}
	certificate, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		panic("emulator: certify signing key: " + err.Error())
	}
	thumbprint := sha1.Sum(certificate) // x5t is defined so
	return &signingKey{base64.RawURLEncoding.EncodeToString(thumbprint[:]), private, certificate}
}

// keyring holds the keys that sign tokens and says which of them are published.
type keyring struct {
	foreign  func() *signingKey       // never published
	consumer func() *signingKey       // published for consumerTenant only
	elliptic func() *ecdsa.PrivateKey // for ES256 tokens, never published
	fetched  func()                   // called after every fetch of a key set

	mu        sync.Mutex
	keys      []*signingKey // newest first
	published int           // the newest so many are in the key sets
	mode      KeysMode
	fetches   int
}

func newKeyring() *keyring {
	return &keyring{
		foreign:  sync.OnceValue(newSigningKey),
		consumer: sync.OnceValue(newSigningKey),
		elliptic: sync.OnceValue(func() *ecdsa.PrivateKey {
			key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			if err != nil {
				panic("emulator: generate elliptic key: " + err.Error())
			}
			return key
		}),
		keys:      []*signingKey{newSigningKey()},
		published: 1,
	}
}

// Rotate makes a new key the current one. The old ones stay published until
// Withdraw.
func (e *Emulator) Rotate() { e.keys.rotate() }

// Withdraw takes all keys but the current one out of the key sets. Tokens that
// they signed are refused by Partner Center from then on.
func (e *Emulator) Withdraw() { e.keys.withdraw() }

// SetKeysMode sets how the key set endpoints answer from now on.
func (e *Emulator) SetKeysMode(m KeysMode) { e.keys.setMode(m) }

// KeyFetches returns how often a key set was asked for, in whatever mode.
func (e *Emulator) KeyFetches() int {
	e.keys.mu.Lock()
	defer e.keys.mu.Unlock()
	return e.keys.fetches
}

func (k *keyring) rotate() {
	key := newSigningKey()
	k.mu.Lock()
	defer k.mu.Unlock()
	k.keys = slices.Insert(k.keys, 0, key)
	k.published++
}

func (k *keyring) withdraw() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.published = 1
}

func (k *keyring) setMode(m KeysMode) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.mode = m
}

// pick returns the key to sign with.
func (k *keyring) pick(which Key) *signingKey {
	switch which {
	case KeyForeign:
		return k.foreign()
	case KeyOtherTenant:
		return k.consumer()
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if which == KeyCurrent {
		return k.keys[0]
	}
	if len(k.keys) == 1 {
		// A first previous key is born published, as if there had been a rotation.
		k.keys = append(k.keys, newSigningKey())
		k.published = 2
	}
	return k.keys[1]
}

// find returns the published key of that name, or nil.
func (k *keyring) find(kid string) *rsa.PublicKey {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, key := range k.keys[:k.published] {
		if key.kid == kid {
			return &key.private.PublicKey
		}
	}
	return nil
}

// fetch counts one fetch and returns the mode it meets.
func (k *keyring) fetch() (mode KeysMode, n int) {
	k.mu.Lock()
	k.fetches++
	mode, n = k.mode, k.fetches
	k.mu.Unlock()
	k.fetched()
	return mode, n
}

// serveKeys answers a key set endpoint. tenant is a GUID, or empty for common
// and organizations.
func (e *Emulator) serveKeys(w http.ResponseWriter, r *http.Request, tenant string, v2 bool) {
	mode, n := e.keys.fetch()
	switch mode {
	case KeysDown:
		panic(http.ErrAbortHandler) // closes the connection
	case Keys500:
		http.Error(w, "AADSTS90033: A transient error has occurred. Please try again.", http.StatusInternalServerError)
		return
	case KeysHang:
		<-r.Context().Done()
		panic(http.ErrAbortHandler)
	case KeysHTML:
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		_, _ = w.Write([]byte("<!DOCTYPE html><html><body>Please sign in to the network.</body></html>"))
		return
	}
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.Header().Set("Cache-Control", "private, max-age=86400")
	switch mode {
	case KeysEmpty:
		_, _ = w.Write([]byte(`{"keys":[]}`))
	case KeysHuge:
		writeHugeKeySet(w)
	default:
		_ = json.NewEncoder(w).Encode(e.keys.document(tenant, v2, n))
	}
}

// document is the key set of v1, whose keys carry no issuer, or of v2.
func (k *keyring) document(tenant string, v2 bool, fetch int) any {
	issuerTenant := tenant
	if tenant == "" {
		issuerTenant = "{tenantid}"
	}
	entry := func(key *signingKey, issuerTenant string) object {
		public := key.private.PublicKey
		o := object{
			{"kty", "RSA"},
			{"use", "sig"},
			{"kid", key.kid},
			{"x5t", key.kid},
			{"n", base64.RawURLEncoding.EncodeToString(public.N.Bytes())},
			{"e", base64.RawURLEncoding.EncodeToString(big.NewInt(int64(public.E)).Bytes())},
			{"x5c", []string{base64.StdEncoding.EncodeToString(key.certificate)}},
		}
		if v2 {
			o.set("cloud_instance_name", "microsoftonline.com")
			o.set("issuer", "https://login.microsoftonline.com/"+issuerTenant+"/v2.0")
		}
		return o
	}
	var entries []object
	if v2 {
		// Only v2 can say that a key belongs to one tenant.
		entries = append(entries, entry(k.consumer(), consumerTenant))
	}
	k.mu.Lock()
	for _, key := range k.keys[:k.published] {
		entries = append(entries, entry(key, issuerTenant))
	}
	k.mu.Unlock()
	if fetch%2 == 0 {
		slices.Reverse(entries) // the order means nothing
	}
	return map[string]any{"keys": entries}
}

// writeHugeKeySet writes 64 MiB, or as much as the client takes.
func writeHugeKeySet(w http.ResponseWriter) {
	const size = 64 << 20
	entry := `{"kty":"RSA","use":"sig","kid":"huge","n":"AQAB","e":"AQAB"}`
	block := []byte(strings.Repeat(entry+",", 1000))
	_, err := io.WriteString(w, `{"keys":[`)
	for written := 0; written < size && err == nil; {
		var n int
		n, err = w.Write(block)
		written += n
	}
	_, _ = io.WriteString(w, entry+"]}")
}
