package config

import (
	"bytes"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestFilesAreAllThatTheConfigurationNames(t *testing.T) {
	path := withFiles(t, "testdata/good/every-key.yaml")
	c, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, file := range c.Files() {
		if filepath.Dir(file) != filepath.Dir(path) {
			t.Errorf("%s is not beside the configuration", file)
		}
		got = append(got, filepath.Base(file))
	}
	want := []string{"acme.pem", "clients.crl", "clients.pem", "eab", "entra.pem", "guard.key", "guard.pem", "ledger.pem", "upstream.pem"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("Files (-want +got):\n%s", diff)
	}
	for _, file := range c.Files() {
		content, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
		if err := c.Validate(); err == nil || !strings.Contains(err.Error(), file+" does not exist") {
			t.Errorf("Validate without %s = %v", file, err)
		}
		write(t, filepath.Dir(file), filepath.Base(file), content)
	}
	if err := c.Validate(); err != nil {
		t.Errorf("Validate = %v", err)
	}
}

func TestRevocationListsMayBeDEROrSeveralInPEM(t *testing.T) {
	one := revocationList(t)
	block, _ := pem.Decode(one)
	broken := pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: block.Bytes[:20]})
	for _, tt := range []struct {
		name string
		data []byte
		ok   bool
	}{
		{"DER", block.Bytes, true},
		{"PEM", one, true},
		{"two in PEM", append(bytes.Clone(one), revocationList(t)...), true},
		{"the second broken", append(bytes.Clone(one), broken...), false},
		{"DER cut off", block.Bytes[:20], false},
		{"a certificate", first(selfSigned(t)), false},
	} {
		if err := parseCRLs(tt.data); (err == nil) != tt.ok {
			t.Errorf("%s: parseCRLs = %v, want no error: %v", tt.name, err, tt.ok)
		}
	}
}

func TestKeysAndSecretsThatOthersMayReadAreARisk(t *testing.T) {
	path := withFiles(t, "testdata/good/every-key.yaml")
	c, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	named := func() (keys []string) {
		for _, risk := range c.Risks(time.Now()) {
			if key, _, ok := strings.Cut(risk, ": the file "); ok {
				keys = append(keys, key)
			}
		}
		return keys
	}
	if got := named(); len(got) > 0 {
		t.Errorf("risks of files of mode 0600: %q", got)
	}
	for _, file := range c.Files() {
		if err := os.Chmod(file, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if diff := cmp.Diff([]string{"listeners[2].tls.key", "acme.eab.mac_key", "ledger.key", "admin.tls.key"}, named()); diff != "" {
		t.Errorf("risks of files of mode 0644 (-want +got):\n%s", diff)
	}
}

func first(a, _ []byte) []byte { return a }

func TestCertificateFilesAreRelativeToTheConfiguration(t *testing.T) {
	dir := t.TempDir()
	certificate, key := selfSigned(t)
	_, otherKey := selfSigned(t)
	write(t, dir, "guard.pem", certificate)
	write(t, dir, "guard.key", key)
	write(t, dir, "other.key", otherKey)
	write(t, dir, "guard.yaml", []byte(`version: 1
listeners:
  - address: 0.0.0.0:8443
    tls: {certificate: guard.pem, key: guard.key}
upstreams:
  partner-center: {ca: guard.pem}
`))
	c, err := Load(filepath.Join(dir, "guard.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	if got, want := c.Listeners[0].TLS.Key, filepath.Join(dir, "guard.key"); got != want {
		t.Errorf("key = %s, want %s", got, want)
	}
	if got, want := c.Upstreams[PartnerCenter].CA, filepath.Join(dir, "guard.pem"); got != want {
		t.Errorf("ca = %s, want %s", got, want)
	}

	c.Listeners[0].TLS.Key = filepath.Join(dir, "other.key")
	c.Upstreams[PartnerCenter] = Upstream{URL: "https://a.example", CA: filepath.Join(dir, "guard.key")}
	err = c.Validate()
	if err == nil {
		t.Fatal("Validate accepted a key of another certificate and a CA file without certificates")
	}
	for _, want := range []string{"listeners[0].tls: certificate ", "private key does not match", "upstreams.partner-center.ca: ", "no certificate in it"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("Validate = %v, want %q in it", err, want)
		}
	}
	if body := bytes.Split(key, []byte("\n"))[1]; strings.Contains(err.Error(), string(body)) {
		t.Error("the error holds key material")
	}
}
