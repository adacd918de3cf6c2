package entra

import (
	"context"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"time"

	"github.com/MicahParks/jwkset"
	"github.com/MicahParks/keyfunc/v3"
	"github.com/golang-jwt/jwt/v5"
)

const (
	maxKeySetBytes = 1 << 20
	maxKeys        = 100
	minKeyBits     = 2048
	maxKeyBits     = 4096 // beyond, verifying a forgery costs us too much
)

var errBadSignature = errors.New("the signature is not of this key")

// keySet is what one key endpoint published. It is never modified.
type keySet struct {
	fetched    time.Time // when the fetch completed
	generation uint64    // differs for any two sets of a Verifier
	byKid      map[string]*key
	listed     map[keyID]struct{}
	keyfunc    keyfunc.Keyfunc
}

// keyID identifies a key whatever set lists it: by kid, issuers and key material.
type keyID [16]byte

type key struct {
	id      keyID
	public  *rsa.PublicKey
	issuers []string // as published; empty for any
	jwk     jwkset.JWK
}

// verify checks the RS256 signature sig over signed by the key that is listed
// under kid. golang-jwt verifies, with the key that keyfunc finds.
func (s *keySet) verify(kid, signed string, sig []byte) error {
	method := jwt.SigningMethodRS256
	found, err := s.keyfunc.Keyfunc(&jwt.Token{Method: method, Header: map[string]any{"alg": method.Alg(), "kid": kid}})
	if err != nil {
		return err
	}
	if method.Verify(signed, sig, found) != nil {
		return errBadSignature
	}
	return nil
}

// jsonKey holds what is read of a published key. Certificates (x5c, x5u) are not:
// the key itself comes over an authenticated connection.
type jsonKey struct {
	Kty    string   `json:"kty"`
	Use    string   `json:"use"`
	Alg    string   `json:"alg"`
	KeyOps []string `json:"key_ops"`
	Kid    string   `json:"kid"`
	N      string   `json:"n"`
	E      string   `json:"e"`
	Issuer string   `json:"issuer"`
}

// parseKeySet reads a JSON Web Key Set. Keys of other kinds and uses, and RSA keys
// of other than 2048 to 4096 bits, are passed over; a set without any usable key
// is an error. Of different keys under one kid neither is used.
func parseKeySet(body []byte, fetched time.Time, generation uint64) (*keySet, error) {
	var (
		text = string(body)
		keys value
	)
	duplicate, err := scanObject(text, func(name string, start, end int) {
		if name == "keys" {
			keys = value(text[start:end])
		}
	})
	if err != nil {
		return nil, fmt.Errorf("not a JSON Web Key Set: %w", err)
	}
	s := &keySet{fetched: fetched, generation: generation, byKid: map[string]*key{}, listed: map[keyID]struct{}{}}
	count := 0
	isArray := keys.elements(func(v value) bool {
		if count++; count > maxKeys {
			return false
		}
		s.add(v)
		return true
	})
	switch {
	case !isArray || duplicate:
		return nil, errors.New("not a JSON Web Key Set: no single array of keys in it")
	case count > maxKeys:
		return nil, fmt.Errorf("more than %d keys", maxKeys)
	}
	for kid, k := range s.byKid {
		if k == nil {
			delete(s.byKid, kid)
			continue
		}
		if k.jwk, err = jwkset.NewJWKFromKey(k.public, jwkset.JWKOptions{
			Metadata: jwkset.JWKMetadataOptions{ALG: jwkset.AlgRS256, KID: kid, USE: jwkset.UseSig},
		}); err != nil {
			return nil, fmt.Errorf("read key: %w", err)
		}
		slices.Sort(k.issuers)
		sum := sha256.Sum256(fmt.Appendf(nil, "%q %q %x %x", kid, k.issuers, k.public.N, k.public.E))
		k.id = keyID(sum[:])
		s.listed[k.id] = struct{}{}
	}
	if len(s.byKid) == 0 {
		return nil, errors.New("no usable key in it")
	}
	s.keyfunc, err = keyfunc.New(keyfunc.Options{
		Storage:      storage{MemoryJWKSet: jwkset.NewMemoryStorage(), set: s},
		UseWhitelist: []jwkset.USE{jwkset.UseSig},
	})
	return s, err
}

// add lists the key that v describes if it may verify RS256 signatures. Of
// different keys under one kid it leaves a mark in place of both.
func (s *keySet) add(v value) {
	var j jsonKey
	if json.Unmarshal([]byte(v), &j) != nil {
		return
	}
	public := j.rsa()
	if public == nil {
		return
	}
	known, seen := s.byKid[j.Kid]
	switch {
	case !seen:
		s.byKid[j.Kid] = &key{public: public, issuers: []string{j.Issuer}}
	case known != nil && known.public.Equal(public):
		known.issuers = append(known.issuers, j.Issuer)
	default:
		s.byKid[j.Kid] = nil
	}
}

// canBePublished reports whether a key may be listed under kid: 1 to 256 visible
// ASCII characters. Entra's are base64url. A token that names another kid can be
// refused without a look at the keys.
func canBePublished(kid string) bool {
	for i := range len(kid) {
		if kid[i] <= ' ' || kid[i] > '~' {
			return false
		}
	}
	return kid != "" && len(kid) <= maxText
}

// rsa returns the key if it may verify RS256 signatures, else nil.
func (j *jsonKey) rsa() *rsa.PublicKey {
	switch {
	case j.Kty != "RSA", !canBePublished(j.Kid):
		return nil
	case j.Use != "" && j.Use != "sig", j.Alg != "" && j.Alg != "RS256":
		return nil
	case len(j.KeyOps) > 0 && !slices.Contains(j.KeyOps, "verify"):
		return nil
	}
	n, errN := base64.RawURLEncoding.DecodeString(j.N)
	e, errE := base64.RawURLEncoding.DecodeString(j.E)
	if errN != nil || errE != nil || len(n) > maxKeyBits/8+1 || len(e) > 4 {
		return nil
	}
	modulus, exponent := new(big.Int).SetBytes(n), new(big.Int).SetBytes(e).Int64()
	if bits := modulus.BitLen(); bits < minKeyBits || bits > maxKeyBits || modulus.Bit(0) == 0 {
		return nil
	}
	if exponent < 3 || exponent > 1<<31-1 || exponent%2 == 0 {
		return nil
	}
	return &rsa.PublicKey{N: modulus, E: int(exponent)}
}

// storage shows a keySet to keyfunc. It is read-only and refuses to list all keys:
// that is how keyfunc would try every key on a token without a kid.
type storage struct {
	*jwkset.MemoryJWKSet // empty: for the methods that nothing calls
	set                  *keySet
}

var errReadOnly = errors.New("key set is read by kid only")

func (s storage) KeyRead(_ context.Context, kid string) (jwkset.JWK, error) {
	if k := s.set.byKid[kid]; k != nil {
		return k.jwk, nil
	}
	return jwkset.JWK{}, jwkset.ErrKeyNotFound
}

func (storage) KeyReadAll(context.Context) ([]jwkset.JWK, error)  { return nil, errReadOnly }
func (storage) KeyDelete(context.Context, string) (bool, error)   { return false, errReadOnly }
func (storage) KeyReplaceAll(context.Context, []jwkset.JWK) error { return errReadOnly }
func (storage) KeyWrite(context.Context, jwkset.JWK) error        { return errReadOnly }
