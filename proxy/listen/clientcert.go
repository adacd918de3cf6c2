package listen

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"
)

// clients judges the certificates of clients. It never changes.
type clients struct {
	pool *x509.CertPool
	crls map[authority]*crl // nil: revocation is not checked
	from [2][sha256.Size]byte
	now  func() time.Time
}

// authority is one CA as the issuer of certificates: two with the same name and
// different keys are two, one with a renewed certificate is one.
type authority struct{ subject, key string }

func authorityOf(ca *x509.Certificate) authority {
	return authority{string(ca.RawSubject), string(ca.RawSubjectPublicKeyInfo)}
}

// crl is the revocation list of one authority.
type crl struct {
	issuer     string
	thisUpdate time.Time
	nextUpdate time.Time
	revoked    map[string]time.Time // by the bytes of the serial number
}

func loadClients(caFile, crlFile string, now func() time.Time) (*clients, error) {
	data, err := os.ReadFile(caFile)
	if err != nil {
		return nil, fmt.Errorf("read client CAs: %w", err)
	}
	cas, err := parseCertificates(data)
	if err != nil {
		return nil, fmt.Errorf("read client CAs from %s: %w", caFile, err)
	}
	c := &clients{pool: x509.NewCertPool(), now: now}
	c.from[0] = sha256.Sum256(data)
	if crlFile != "" {
		if data, err = os.ReadFile(crlFile); err != nil {
			return nil, fmt.Errorf("read client revocation lists: %w", err)
		}
		if c.crls, err = parseCRLs(data, cas, now()); err != nil {
			return nil, fmt.Errorf("read client revocation lists from %s: %w", crlFile, err)
		}
		c.from[1] = sha256.Sum256(data)
	}
	for _, ca := range cas {
		// A CA that is named here is trusted by itself, so that nobody would look
		// whether the CA above it has revoked it.
		if !c.revokedByAnother(ca, cas) {
			c.pool.AddCert(ca)
		}
	}
	return c, nil
}

func parseCertificates(data []byte) ([]*x509.Certificate, error) {
	var all []*x509.Certificate
	for {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("holds a %s, not only certificates", block.Type)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate %d: %w", len(all)+1, err)
		}
		all = append(all, cert)
	}
	if len(all) == 0 {
		return nil, errors.New("holds no PEM certificate")
	}
	return all, nil
}

// parseCRLs reads the revocation lists of cas. Of several by one CA the newest counts.
func parseCRLs(data []byte, cas []*x509.Certificate, now time.Time) (map[authority]*crl, error) {
	var ders [][]byte
	for rest := data; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if block.Type != "X509 CRL" {
			return nil, fmt.Errorf("holds a %s, not only revocation lists", block.Type)
		}
		ders = append(ders, block.Bytes)
	}
	if len(ders) == 0 {
		ders = [][]byte{data}
	}
	crls := map[authority]*crl{}
	for i, der := range ders {
		list, err := x509.ParseRevocationList(der)
		if err != nil {
			return nil, fmt.Errorf("list %d: %w", i+1, err)
		}
		by, err := issuerOf(list, cas)
		if err != nil {
			return nil, fmt.Errorf("list %d, of %s: %w", i+1, list.Issuer, err)
		}
		read, err := newCRL(list)
		if err != nil {
			return nil, fmt.Errorf("list %d, of %s: %w", i+1, list.Issuer, err)
		}
		if old := crls[by]; old == nil || old.thisUpdate.Before(read.thisUpdate) {
			crls[by] = read
		}
	}
	for _, ca := range cas {
		if ca.IsCA && now.Before(ca.NotAfter) && crls[authorityOf(ca)] == nil {
			return nil, fmt.Errorf("no list of %s; every client CA needs one", ca.Subject)
		}
	}
	return crls, nil
}

// issuerOf returns the CA that signed the list.
func issuerOf(list *x509.RevocationList, cas []*x509.Certificate) (authority, error) {
	err := errors.New("not one of the client CAs")
	for _, ca := range cas {
		if !bytes.Equal(ca.RawSubject, list.RawIssuer) {
			continue
		}
		if err = list.CheckSignatureFrom(ca); err == nil {
			return authorityOf(ca), nil
		}
	}
	return authority{}, err
}

// newCRL takes over a list whose signature is checked. RFC 5280 §5.2 forbids to use
// one with a critical extension that is not understood: such a list speaks for a
// part of the certificates, for another CA's, or of changes only.
func newCRL(list *x509.RevocationList) (*crl, error) {
	if list.NextUpdate.IsZero() {
		return nil, errors.New("it has no nextUpdate")
	}
	c := &crl{
		issuer: list.Issuer.String(), thisUpdate: list.ThisUpdate, nextUpdate: list.NextUpdate,
		revoked: make(map[string]time.Time, len(list.RevokedCertificateEntries)),
	}
	for _, e := range list.Extensions {
		if e.Critical {
			return nil, fmt.Errorf("critical extension %s is not supported: give a full list of all the CA's certificates", e.Id)
		}
	}
	for _, r := range list.RevokedCertificateEntries {
		for _, e := range r.Extensions {
			if e.Critical {
				return nil, fmt.Errorf("critical extension %s of an entry is not supported", e.Id)
			}
		}
		c.revoked[string(r.SerialNumber.Bytes())] = r.RevocationTime
	}
	return c, nil
}

// revokedByAnother reports whether another of cas issued and revoked ca.
func (c *clients) revokedByAnother(ca *x509.Certificate, cas []*x509.Certificate) bool {
	return slices.ContainsFunc(cas, func(issuer *x509.Certificate) bool {
		list := c.crls[authorityOf(issuer)]
		return list != nil && list.lists(ca) && bytes.Equal(ca.RawIssuer, issuer.RawSubject) && ca.CheckSignatureFrom(issuer) == nil
	})
}

func (l *crl) lists(cert *x509.Certificate) bool {
	_, revoked := l.revoked[string(cert.SerialNumber.Bytes())]
	return revoked
}

// same reports whether two clients pass the same certificates.
func (c *clients) same(d *clients) bool {
	if c == nil || d == nil {
		return c == d
	}
	return c.from == d.from
}

// verifyConnection ends each handshake, resumed ones too.
func (c *clients) verifyConnection(state tls.ConnectionState) error {
	if state.DidResume { // its chains are as old as the session
		_, err := c.check(state.PeerCertificates)
		return err
	}
	_, err := c.revocation(state.VerifiedChains)
	return err
}

// check verifies a client's certificates anew, and says until when that holds.
func (c *clients) check(certs []*x509.Certificate) (until time.Time, err error) {
	if len(certs) == 0 {
		return until, errors.New("client certificate: none was shown")
	}
	between := x509.NewCertPool()
	for _, cert := range certs[1:] {
		between.AddCert(cert)
	}
	chains, err := certs[0].Verify(x509.VerifyOptions{
		Roots: c.pool, Intermediates: between, CurrentTime: c.now(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	if err != nil {
		return until, fmt.Errorf("client certificate of %s: %w", certs[0].Subject, err)
	}
	return c.revocation(chains)
}

// revocation looks the certificates of verified chains up in the lists. A revoked
// one is refused in whichever chain it stands; beyond that one chain that is covered
// from end to end is enough.
func (c *clients) revocation(chains [][]*x509.Certificate) (until time.Time, err error) {
	for _, chain := range chains {
		var end time.Time
		var gap error
		for i, cert := range chain {
			end = sooner(end, cert.NotAfter)
			if c.crls == nil || i == len(chain)-1 {
				continue
			}
			issuer := chain[i+1]
			list := c.crls[authorityOf(issuer)]
			switch {
			case list == nil:
				gap = fmt.Errorf("client certificate of %s: there is no revocation list of %s", cert.Subject, issuer.Subject)
			case list.lists(cert):
				return time.Time{}, fmt.Errorf("client certificate of %s: %s, serial number %x, was revoked on %s",
					chain[0].Subject, cert.Subject, cert.SerialNumber, list.revoked[string(cert.SerialNumber.Bytes())].Format(time.DateOnly))
			case !c.now().Before(list.nextUpdate):
				gap = fmt.Errorf("client certificate of %s: the revocation list of %s ended at %s; load a new one",
					cert.Subject, issuer.Subject, list.nextUpdate.Format(time.RFC3339))
			default:
				end = sooner(end, list.nextUpdate)
			}
		}
		if gap != nil {
			err = gap
			continue
		}
		if until.Before(end) {
			until = end
		}
	}
	if until.IsZero() {
		return until, cmp.Or(err, errors.New("client certificate: not verified"))
	}
	return until, nil
}

// sooner of two times; the zero time is none.
func sooner(a, b time.Time) time.Time {
	if a.IsZero() || b.Before(a) {
		return b
	}
	return a
}

func (c *clients) status() []CRLStatus {
	var all []CRLStatus
	for _, list := range c.crls {
		all = append(all, CRLStatus{Issuer: list.issuer, NextUpdate: list.nextUpdate, Revoked: len(list.revoked)})
	}
	slices.SortFunc(all, func(a, b CRLStatus) int { return cmp.Compare(a.Issuer, b.Issuer) })
	return all
}
