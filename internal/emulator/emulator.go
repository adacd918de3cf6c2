// Package emulator is a stand-in for Microsoft's side of a Partner Center
// integration: Entra (discovery documents, key sets, token endpoints), the Partner
// Center REST API, and what of the Partner API and Microsoft Graph belongs to it. It
// serves the demo, the emulate command and the tests.
//
// It shares no code with what it exercises: it signs and checks tokens, matches
// routes and shapes errors by itself, on the standard library. It is made to
// bite: it rotates keys, varies the shape of its refusals, throttles, stalls and
// breaks connections when it is told to.
package emulator

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"
)

// DefaultTenant is the partner tenant that an emulator serves when
// Config.Tenants is empty.
const DefaultTenant = "1b2c3d4e-0a1b-4c2d-8e3f-901234567890"

// Config says how an emulator behaves. The zero value serves one tenant over
// http and https on free loopback ports and refuses no call for lack of MFA.
type Config struct {
	// The addresses to listen on; empty means 127.0.0.1:0, a free port.
	EntraAddress         string
	EntraTLSAddress      string
	PartnerAddress       string
	PartnerTLSAddress    string
	PartnerAPIAddress    string
	PartnerAPITLSAddress string
	GraphAddress         string
	GraphTLSAddress      string

	// Tenants are the partner tenants; the first is the home of the sample
	// users and apps. Empty means DefaultTenant.
	Tenants []string

	// Exposure is the share, 0 to 1, of app+user calls without MFA that
	// Partner Center refuses with 900421. The share holds for each pair of app
	// and user on its own, so one client sees calls work and fail by turns.
	Exposure float64

	// ExposureGrowth is added to the share for every 100 calls without MFA,
	// up to 1: enforcement by growing traffic exposure.
	ExposureGrowth float64

	// Shape is the form of these refusals.
	Shape Shape

	// ThrottleEvery answers every n-th call with 429 and Retry-After.
	// Zero means never.
	ThrottleEvery int

	// PageSize is how many items a page of referrals, of Insights reports or of
	// Graph's relationships has. Zero means 100, as in the Partner API.
	PageSize int

	// OwnLinks makes the absolute links of the APIs lead to the listener that the
	// request came to. By default they have Microsoft's host names, as the originals
	// do: who follows one leaves the emulator.
	OwnLinks bool

	// Seed varies the sample data and everything else that looks random but
	// must repeat: bodies, refresh tokens, the phase of the exposure.
	Seed uint64

	// PublicPartnerURL is the base URL that Recipe tells people to call, for
	// instance a proxy in front. Empty means PartnerURL.
	PublicPartnerURL string

	// PublicPartnerAPIURL and PublicGraphURL are the same for the Partner API and
	// Graph. Empty leaves the API out of the Recipe.
	PublicPartnerAPIURL string
	PublicGraphURL      string
}

// Emulator is a running emulator. Its methods are safe for concurrent use.
type Emulator struct {
	cfg     Config
	keys    *keyring
	dir     *directory
	calls   *callLog
	partner *partner
	format  atomic.Int64 // TokenFormat
	caPEM   []byte

	entraURL, entraTLSURL string

	stop    context.CancelFunc // ends stalls and hanging key fetches
	servers []*http.Server
	serving sync.WaitGroup
}

// Start starts an emulator. The caller must Close it.
func Start(cfg Config) (*Emulator, error) {
	if len(cfg.Tenants) == 0 {
		cfg.Tenants = []string{DefaultTenant}
	}
	if cfg.PageSize <= 0 {
		cfg.PageSize = 100
	}
	ca, err := newAuthority(30 * 24 * time.Hour)
	if err != nil {
		return nil, fmt.Errorf("create throw-away CA: %w", err)
	}
	ctx, stop := context.WithCancel(context.Background())
	e := &Emulator{
		cfg:   cfg,
		keys:  newKeyring(),
		dir:   newDirectory(cfg.Tenants[0], cfg.Seed),
		calls: newCallLog(),
		caPEM: ca.pem,
		stop:  stop,
	}
	e.keys.fetched = e.calls.broadcast
	e.partner = newPartner(e)
	entra := http.HandlerFunc(e.serveEntra)
	center, partnerAPI, graph := e.partner.center, e.partner.partnerAPI, e.partner.graph
	listeners := []struct {
		address string
		tls     bool
		handler http.Handler
		url     *string
	}{
		{cfg.EntraAddress, false, entra, &e.entraURL},
		{cfg.EntraTLSAddress, true, entra, &e.entraTLSURL},
		{cfg.PartnerAddress, false, center, &center.url},
		{cfg.PartnerTLSAddress, true, center, &center.tlsURL},
		{cfg.PartnerAPIAddress, false, partnerAPI, &partnerAPI.url},
		{cfg.PartnerAPITLSAddress, true, partnerAPI, &partnerAPI.tlsURL},
		{cfg.GraphAddress, false, graph, &graph.url},
		{cfg.GraphTLSAddress, true, graph, &graph.tlsURL},
	}
	for _, l := range listeners {
		address := l.address
		if address == "" {
			address = "127.0.0.1:0"
		}
		socket, err := net.Listen("tcp", address)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("listen on %s: %w", address, err), e.Close())
		}
		server := &http.Server{
			Handler:           l.handler,
			ReadHeaderTimeout: 30 * time.Second,
			BaseContext:       func(net.Listener) context.Context { return ctx },
			TLSConfig:         &tls.Config{Certificates: []tls.Certificate{ca.leaf}, MinVersion: tls.VersionTLS12},
			// Handshakes that fail and handlers that abort on purpose are
			// what this server is for.
			ErrorLog: log.New(io.Discard, "", 0),
		}
		e.servers = append(e.servers, server)
		scheme, serve := "http", server.Serve
		if l.tls {
			scheme = "https"
			serve = func(s net.Listener) error { return server.ServeTLS(s, "", "") }
		}
		*l.url = scheme + "://" + socket.Addr().String()
		e.serving.Go(func() { _ = serve(socket) }) // ends with ErrServerClosed
	}
	return e, nil
}

// Close ends all listeners, stalled answers and connections.
func (e *Emulator) Close() error {
	e.stop()
	grace, cancel := context.WithTimeout(context.Background(), 250*time.Millisecond)
	defer cancel()
	var errs []error
	for _, s := range e.servers {
		if s.Shutdown(grace) != nil {
			errs = append(errs, s.Close())
		}
	}
	e.serving.Wait()
	return errors.Join(errs...)
}

// EntraURL is the base URL of Entra over http, without a trailing slash.
func (e *Emulator) EntraURL() string { return e.entraURL }

// EntraTLSURL is the base URL of Entra over https.
func (e *Emulator) EntraTLSURL() string { return e.entraTLSURL }

// PartnerURL is the base URL of Partner Center over http, without a trailing slash.
func (e *Emulator) PartnerURL() string { return e.partner.center.url }

// PartnerTLSURL is the base URL of Partner Center over https; it speaks
// HTTP/1.1 and HTTP/2.
func (e *Emulator) PartnerTLSURL() string { return e.partner.center.tlsURL }

// PartnerAPIURL is the base URL of the Partner API over http, without a trailing
// slash.
func (e *Emulator) PartnerAPIURL() string { return e.partner.partnerAPI.url }

// PartnerAPITLSURL is the base URL of the Partner API over https.
func (e *Emulator) PartnerAPITLSURL() string { return e.partner.partnerAPI.tlsURL }

// GraphURL is the base URL of Graph over http, without a trailing slash.
func (e *Emulator) GraphURL() string { return e.partner.graph.url }

// GraphTLSURL is the base URL of Graph over https.
func (e *Emulator) GraphTLSURL() string { return e.partner.graph.tlsURL }

// CAPEM is the certificate of the throw-away CA behind the https listeners. The
// listeners' certificate is valid for localhost, 127.0.0.1, ::1 and the names of
// Microsoft's global hosts.
func (e *Emulator) CAPEM() []byte { return e.caPEM }

// Requests returns what reached the APIs since the last Reset, in order of
// arrival; of more than 100,000 the oldest are forgotten.
func (e *Emulator) Requests() []Request { return e.calls.snapshot() }

// Count returns how many requests reached the APIs since the last Reset.
func (e *Emulator) Count() int { return e.calls.count() }

// Reset forgets the Requests. Tokens, resources, exposure and what the Security
// APIs report stay.
func (e *Emulator) Reset() { e.calls.reset() }

// Wait returns nil once done holds for the Requests, and ctx's error if that
// does not happen in time. done is called at first and whenever a request
// arrives, is answered or is given up by its client, or a key set is fetched.
func (e *Emulator) Wait(ctx context.Context, done func([]Request) bool) error {
	return e.calls.wait(ctx, done)
}

// SetExposure sets the share of calls without MFA that are refused from now on;
// growth starts again from there.
func (e *Emulator) SetExposure(share float64) { e.partner.exposure.set(share) }

// SetAppExposure sets the share for one app, by client id; it does not grow.
func (e *Emulator) SetAppExposure(appID string, share float64) {
	e.partner.exposure.setApp(appID, share)
}

// SetShape sets the form of refusals from now on.
func (e *Emulator) SetShape(s Shape) { e.partner.setShape(s) }

// authority is a throw-away CA and the one certificate it has issued.
type authority struct {
	pem  []byte
	leaf tls.Certificate
}

// newAuthority returns a CA whose leaf expires after validity; a negative one makes
// it a leaf that expired so long ago.
func newAuthority(validity time.Duration) (*authority, error) {
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	root := &x509.Certificate{
		SerialNumber:          big.NewInt(now.UnixNano()),
		Subject:               pkix.Name{CommonName: "partnerguard emulator CA (throw-away)"},
		NotBefore:             now.Add(min(validity, 0) - time.Hour),
		NotAfter:              now.Add(30 * 24 * time.Hour),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign,
	}
	rootDER, err := x509.CreateCertificate(rand.Reader, root, root, caKey.Public(), caKey)
	if err != nil {
		return nil, err
	}
	leafKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(now.UnixNano() + 1),
		Subject:      pkix.Name{CommonName: "localhost"},
		NotBefore:    now.Add(min(validity, 0) - time.Hour),
		NotAfter:     now.Add(validity),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		DNSNames:     []string{"localhost", "login.microsoftonline.com", hostPartnerCenter, hostPartnerAPI, hostGraph},
		IPAddresses:  []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback},
	}
	leafDER, err := x509.CreateCertificate(rand.Reader, leaf, root, leafKey.Public(), caKey)
	if err != nil {
		return nil, err
	}
	return &authority{
		pem:  pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: rootDER}),
		leaf: tls.Certificate{Certificate: [][]byte{leafDER}, PrivateKey: leafKey},
	}, nil
}
