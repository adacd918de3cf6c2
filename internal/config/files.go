package config

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"
)

// Files returns every file that c names, each once and sorted: certificates, keys,
// CAs, revocation lists, secrets. A change of any of them is a change of what c
// means. The file of reconcile.token is none of them: it is read when it is needed,
// may change by the hour, and may come later.
func (c *Config) Files() []string {
	var files []string
	c.eachFile(func(key string, file *string) {
		if key != reconcileToken {
			files = append(files, *file)
		}
	})
	slices.Sort(files)
	return slices.Compact(files)
}

const reconcileToken = "reconcile.token"

// eachFile calls visit with the key of every file that c names and its path, which
// visit may change. As long as it does not, c is only read.
func (c *Config) eachFile(visit func(key string, file *string)) {
	file := func(key string, path *string) {
		if *path != "" {
			visit(key, path)
		}
	}
	secret := func(key string, s *Secret) {
		if before, ok := s.file(); ok {
			after := before
			if visit(key, &after); after != before {
				*s = Secret("file:" + after)
			}
		}
	}
	pair := func(key string, t *TLS) {
		if t != nil {
			file(key+".certificate", &t.Certificate)
			file(key+".key", &t.Key)
		}
	}
	for i := range c.Listeners {
		l, key := &c.Listeners[i], fmt.Sprintf("listeners[%d]", i)
		pair(key+".tls", l.TLS)
		file(key+".client_ca", &l.ClientCA)
		file(key+".client_crl", &l.ClientCRL)
	}
	file("acme.root", &c.ACME.Root)
	if c.ACME.EAB != nil {
		secret("acme.eab.mac_key", &c.ACME.EAB.MACKey)
	}
	secret("acme.storage_key", &c.ACME.StorageKey)
	file("entra.ca", &c.Entra.CA)
	for _, name := range slices.Sorted(maps.Keys(c.Upstreams)) {
		u := c.Upstreams[name]
		if file(join("upstreams", name)+".ca", &u.CA); u.CA != c.Upstreams[name].CA {
			c.Upstreams[name] = u
		}
	}
	secret(reconcileToken, &c.Reconcile.Token)
	file("ledger.key", &c.Ledger.Key)
	pair("admin.tls", c.Admin.TLS)
	secret("store.postgres", &c.Store.Postgres)
	secret("admin.token", &c.Admin.Token)
	file("admin.client_ca", &c.Admin.ClientCA)
}

// checkFiles reports the files that c names and that cannot be used.
func (c *Config) checkFiles(bad report) {
	read := func(path, file string) []byte {
		if file == "" {
			return nil
		}
		data, err := os.ReadFile(file)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			bad(path, fmt.Sprintf("the file %s does not exist", file), "a relative path starts at the directory of the configuration file")
		case err != nil:
			bad(path, err.Error(), "")
		case len(data) == 0:
			bad(path, fmt.Sprintf("the file %s is empty", file), "")
		}
		return data
	}
	pair := func(path string, t *TLS) {
		if t == nil {
			return
		}
		certificate, key := read(path+".certificate", t.Certificate), read(path+".key", t.Key)
		if len(certificate) == 0 || len(key) == 0 {
			return
		}
		if _, err := tls.X509KeyPair(certificate, key); err != nil {
			bad(path, fmt.Sprintf("certificate %s with key %s cannot be used: %v", t.Certificate, t.Key, err), "both must be PEM and belong together")
		}
	}
	parsed := func(path, file string, parse func([]byte) error, hint string) {
		if data := read(path, file); len(data) > 0 {
			if err := parse(data); err != nil {
				bad(path, fmt.Sprintf("the file %s cannot be used: %v", file, err), hint)
			}
		}
	}
	authorities := func(path, file string) {
		parsed(path, file, parseCertificates, "write a PEM file of CA certificates")
	}

	for i, l := range c.Listeners {
		path := fmt.Sprintf("listeners[%d]", i)
		pair(path+".tls", l.TLS)
		authorities(path+".client_ca", l.ClientCA)
		parsed(path+".client_crl", l.ClientCRL, parseCRLs, "write a file of revocation lists, PEM or DER")
	}
	authorities("acme.root", c.ACME.Root)
	if c.ACME.EAB != nil {
		if file, ok := c.ACME.EAB.MACKey.file(); ok && len(read("acme.eab.mac_key", file)) > 0 {
			switch key, err := c.ACME.EAB.MACKey.Read(nil); {
			case err != nil:
				bad("acme.eab.mac_key", err.Error(), "")
			case !isBase64URL(key):
				bad("acme.eab.mac_key", fmt.Sprintf("the file %s does not hold base64url", file), "write the key as the authority gave it out")
			}
		}
	}
	if file, ok := c.ACME.StorageKey.file(); ok && len(read("acme.storage_key", file)) > 0 {
		key, err := c.ACME.StorageKey.Read(nil)
		if err != nil {
			bad("acme.storage_key", err.Error(), "")
		} else if raw, err := base64.StdEncoding.DecodeString(key); err != nil || len(raw) != 32 {
			bad("acme.storage_key", fmt.Sprintf("the file %s does not hold 32 bytes in base64", file), "make one for all guards: openssl rand -base64 32")
		}
	}
	authorities("entra.ca", c.Entra.CA)
	for _, name := range slices.Sorted(maps.Keys(c.Upstreams)) {
		authorities(join("upstreams", name)+".ca", c.Upstreams[name].CA)
	}
	read("ledger.key", c.Ledger.Key)
	pair("admin.tls", c.Admin.TLS)
	authorities("admin.client_ca", c.Admin.ClientCA)
	if file, ok := c.Store.Postgres.file(); ok && len(read("store.postgres", file)) > 0 {
		if _, err := c.Store.Postgres.Read(nil); err != nil {
			bad("store.postgres", err.Error(), "")
		}
	}
	if file, ok := c.Admin.Token.file(); ok && len(read("admin.token", file)) > 0 {
		if _, err := c.Admin.Token.Read(nil); err != nil {
			bad("admin.token", err.Error(), "")
		}
	}
}

// isBase64URL takes padding, with which some authorities show a key.
func isBase64URL(s string) bool {
	_, err := base64.RawURLEncoding.DecodeString(strings.TrimRight(s, "="))
	return err == nil
}

// parseCRLs checks that data is certificate revocation lists: one in DER, or
// several in PEM, every one readable.
func parseCRLs(data []byte) error {
	found := false
	for rest := data; ; {
		var block *pem.Block
		block, rest = pem.Decode(rest)
		if block == nil {
			break
		}
		if block.Type != "X509 CRL" {
			continue
		}
		if _, err := x509.ParseRevocationList(block.Bytes); err != nil {
			return err
		}
		found = true
	}
	if found {
		return nil
	}
	if _, err := x509.ParseRevocationList(data); err != nil {
		return errors.New("no revocation list in it")
	}
	return nil
}

// parseCertificates checks that data holds certificates, every one readable.
func parseCertificates(data []byte) error {
	found := false
	for {
		var block *pem.Block
		block, data = pem.Decode(data)
		if block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			continue
		}
		if _, err := x509.ParseCertificate(block.Bytes); err != nil {
			return err
		}
		found = true
	}
	if !found {
		return errors.New("no certificate in it")
	}
	return nil
}
