package listen

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"
)

// TLS is what a listener shows its clients and asks of them. It never changes; to
// follow its files, load another and hand it to Server.SetTLS. Several servers may
// share one.
type TLS struct {
	serve *tls.Config
	// challenge answers the certificate authority's own connections, and only with
	// the proof it asks for: no client certificate, no HTTP. Nil without TLS-ALPN-01.
	challenge *tls.Config
	clients   *clients // nil asks for no client certificate
	acme      *ACME
	domains   []string
	leaf      *x509.Certificate // nil with ACME
}

// TLSConfig is what LoadTLS needs: Certificate and Key, or ACME.
type TLSConfig struct {
	// Certificate and Key are PEM files: the certificate, then those that lead to a
	// CA its clients know; and its private key.
	Certificate, Key string
	// ACME gets and renews the certificates of Domains.
	ACME    *ACME
	Domains []string
	// ClientCA is a PEM file of certificate authorities. If given, each client must
	// show a certificate for client authentication that one of them issued; the
	// system's own CAs do not count.
	ClientCA string
	// ClientCRL is a file of the revocation lists of these CAs, PEM (several) or DER
	// (one). If given, each CA of ClientCA that is not expired needs a list here, and
	// so does each that is between it and a client: a certificate whose revocation
	// cannot be looked up is refused. So are all that a list covers once its
	// nextUpdate is past; see CRLs.
	ClientCRL string
	// Now is the clock. Nil means time.Now.
	Now func() time.Time
}

// LoadTLS reads and checks all files. An error names the file; whatever was loaded
// before goes on as it was. An expired certificate is no error: see Certificates.
func LoadTLS(cfg TLSConfig) (*TLS, error) {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	t := &TLS{acme: cfg.ACME, domains: slices.Clone(cfg.Domains), serve: &tls.Config{
		MinVersion: tls.VersionTLS12,
		NextProtos: []string{"h2", "http/1.1"},
		Time:       cfg.Now,
	}}
	switch files := cfg.Certificate != "" && cfg.Key != ""; {
	case files && cfg.ACME == nil:
		pair, err := loadPair(cfg.Certificate, cfg.Key)
		if err != nil {
			return nil, err
		}
		t.serve.Certificates, t.leaf = []tls.Certificate{pair}, pair.Leaf
	case !files && cfg.ACME != nil:
		t.serve.GetCertificate = cfg.ACME.getCertificate
		if protocols := cfg.ACME.protocols(); len(protocols) > 0 {
			t.challenge = &tls.Config{
				MinVersion: tls.VersionTLS12, NextProtos: protocols, GetCertificate: cfg.ACME.getCertificate,
				Time: cfg.Now, SessionTicketsDisabled: true,
			}
		}
	default:
		return nil, errors.New("listen: TLSConfig needs either Certificate and Key, or ACME")
	}
	switch {
	case cfg.ClientCA != "":
		var err error
		if t.clients, err = loadClients(cfg.ClientCA, cfg.ClientCRL, cfg.Now); err != nil {
			return nil, err
		}
		t.serve.ClientAuth = tls.RequireAndVerifyClientCert
		t.serve.ClientCAs = t.clients.pool
		t.serve.VerifyConnection = t.clients.verifyConnection
	case cfg.ClientCRL != "":
		return nil, errors.New("listen: TLSConfig.ClientCRL needs ClientCA")
	}
	return t, nil
}

func loadPair(certificate, key string) (tls.Certificate, error) {
	cert, err := os.ReadFile(certificate)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("read certificate: %w", err)
	}
	private, err := os.ReadFile(key)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("read private key: %w", err)
	}
	pair, err := tls.X509KeyPair(cert, private)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("use certificate %s with private key %s: %w", certificate, key, err)
	}
	return pair, nil
}

// CertificateStatus is one certificate that the guard shows.
type CertificateStatus struct {
	Names    []string // DNS names and IP addresses, or the subject if there are none
	NotAfter time.Time
}

// Certificates returns what the listener shows its clients: the certificate of its
// files, or those that ACME holds for its domains by now.
func (t *TLS) Certificates() []CertificateStatus {
	if t.leaf != nil {
		return []CertificateStatus{statusOf(t.leaf)}
	}
	return slices.DeleteFunc(t.acme.Certificates(), func(c CertificateStatus) bool {
		return !slices.ContainsFunc(t.domains, func(d string) bool { return strings.EqualFold(d, c.Names[0]) })
	})
}

// CRLStatus is one revocation list in use.
type CRLStatus struct {
	Issuer     string    // the CA's subject
	NextUpdate time.Time // from here on all certificates of Issuer are refused
	Revoked    int       // how many certificates it lists
}

// CRLs returns the revocation lists of client certificates, by issuer.
func (t *TLS) CRLs() []CRLStatus {
	if t.clients == nil {
		return nil
	}
	return t.clients.status()
}

func statusOf(leaf *x509.Certificate) CertificateStatus {
	names := slices.Clone(leaf.DNSNames)
	for _, ip := range leaf.IPAddresses {
		names = append(names, ip.String())
	}
	if len(names) == 0 {
		names = []string{leaf.Subject.String()}
	}
	return CertificateStatus{Names: names, NotAfter: leaf.NotAfter}
}

// configForClient picks what serves a handshake.
func (s *Server) configForClient(hello *tls.ClientHelloInfo) (*tls.Config, error) {
	t := s.current.Load().tls
	// RFC 8737 §3: the CA offers this protocol alone; net/http closes the connection
	// after the handshake.
	if t.challenge != nil && len(hello.SupportedProtos) == 1 && slices.Contains(t.challenge.NextProtos, hello.SupportedProtos[0]) {
		return t.challenge, nil
	}
	return t.serve, nil
}
