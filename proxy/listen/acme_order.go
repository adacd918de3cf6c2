package listen

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/caddyserver/certmagic"
	"github.com/mholt/acmez/v3/acme"
	"go.uber.org/zap"
	"golang.org/x/net/netutil"
)

// obtain makes a new key and has the CA certify it. The bundle is what save takes.
func (a *ACME) obtain(ctx context.Context, s *site) (_ *tls.Certificate, bundle []byte, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("obtain certificate for %s from %s: %w", s.name, a.cfg.Directory, err)
		}
	}()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, nil, err
	}
	csrDER, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{DNSNames: []string{s.name}}, key)
	if err != nil {
		return nil, nil, err
	}
	csr, err := x509.ParseCertificateRequest(csrDER)
	if err != nil {
		return nil, nil, err
	}

	// A challenge that the machine is not ready for (a port that may not be opened)
	// ends an order without the other being tried, so they take turns.
	http01 := a.cfg.HTTP01 && (!a.cfg.TLSALPN01 || s.failures == 0 || s.failures%2 == 1)
	tlsALPN01 := a.cfg.TLSALPN01 && (!a.cfg.HTTP01 || s.failures == 0 || s.failures%2 == 0)
	if http01 {
		stop, err := a.answerOrder()
		switch {
		case err == nil:
			defer stop()
		case tlsALPN01:
			http01 = false
		default:
			return nil, nil, fmt.Errorf("listen for the http-01 challenge: %w", err)
		}
	}
	a.issuer.DisableHTTPChallenge, a.issuer.DisableTLSALPNChallenge = !http01, !tlsALPN01

	ctx, cancel := context.WithTimeout(ctx, orderTimeout)
	defer cancel()
	// What counts as a retry passes by certmagic's rate limiter, ten orders in ten
	// seconds, whose goroutine nobody can stop; pace is far slower.
	retry := 1
	issued, err := a.issuer.Issue(context.WithValue(ctx, certmagic.AttemptsCtxKey, &retry), csr)
	if err != nil {
		return nil, nil, err
	}
	bundle = append(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), issued.Certificate...)
	certificate, err := parseBundle(s.name, bundle)
	if err != nil {
		return nil, nil, err
	}
	if now := time.Now(); !now.Before(renewAt(certificate.Leaf)) {
		// A clock that is wrong must not become an order after the other.
		return nil, nil, fmt.Errorf("it is valid until %s, but the clock says %s", certificate.Leaf.NotAfter.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	}
	return certificate, bundle, nil
}

// answerHTTP listens for the CA's http-01 validation until stop is called.
// Certmagic would do so, too, but would leave every connection that has been
// opened meanwhile open without a time limit; it takes the port to be answered
// when it finds it in use.
func (a *ACME) answerHTTP() (stop func(), err error) {
	l, err := net.Listen("tcp", net.JoinHostPort(a.cfg.host, strconv.Itoa(a.cfg.HTTPPort)))
	if err != nil {
		return nil, err
	}
	quiet := zap.NewNop()
	server := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			challenge, ok := certmagic.GetACMEChallenge(r.Host)
			if ok && certmagic.SolveHTTPChallenge(quiet, w, r, challenge.Challenge) || !ok && a.answerForFleet(w, r) {
				return
			}
			http.NotFound(w, r)
		}),
		ReadTimeout:    5 * time.Second,
		WriteTimeout:   5*time.Second + 2*storageTimeout, // for a turn, and for the answer
		MaxHeaderBytes: 8 << 10,
		ErrorLog:       log.New(io.Discard, "", 0),
	}
	server.SetKeepAlivesEnabled(false)
	var serving sync.WaitGroup
	serving.Go(func() { server.Serve(netutil.LimitListener(l, 256)) })
	return func() {
		server.Close()
		serving.Wait()
	}, nil
}

// askRenewal asks the CA when it would like s renewed (ARI), and does so if that
// is earlier than planned: it is how a CA announces that it will revoke. It is
// asked every 6 hours, or as the CA says between one hour and a day; and a new
// certificate after a day, so that a CA that always says now gets an order a day.
func (a *ACME) askRenewal(ctx context.Context, s *site) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	info, err := a.issuer.GetRenewalInfo(ctx, certmagic.Certificate{Certificate: *s.certificate})
	now := time.Now()
	due, ask := s.due, now.Add(a.cfg.pace.ask)
	if err == nil { // else it does not matter: s is renewed when it is due
		if info.RetryAfter != nil {
			ask = now.Add(min(max(info.RetryAfter.Sub(now), a.cfg.pace.ask/6), 4*a.cfg.pace.ask))
		}
		if at := info.SelectedTime; !at.IsZero() && at.Before(due) {
			due = at
		}
	}
	a.update(func() { s.due, s.ask = due, ask })
}

func externalAccount(keyID, macKey string) (*acme.EAB, error) {
	if keyID == "" && macKey == "" {
		return nil, nil
	}
	macKey = strings.TrimRight(macKey, "=") // CAs show it padded, certmagic wants it bare
	if _, err := base64.RawURLEncoding.DecodeString(macKey); err != nil || keyID == "" || macKey == "" {
		return nil, errors.New("the ACME external account needs a key id and a MAC key in base64url")
	}
	return &acme.EAB{KeyID: keyID, MACKey: macKey}, nil
}

// refused reports whether it was the CA that said no, rather than being in trouble
// itself. Some problems come without a status.
func refused(err error) bool {
	var problem acme.Problem
	return errors.As(err, &problem) && problem.Status < 500 && problem.Type != acme.ProblemTypeServerInternal
}

// isHostName reports whether a CA can prove name by connecting to it.
func isHostName(name string) bool {
	if len(name) > 253 || net.ParseIP(name) != nil {
		return false
	}
	for label := range strings.SplitSeq(name, ".") {
		bad := func(r rune) bool { return (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '-' }
		if label == "" || len(label) > 63 || strings.ContainsFunc(label, bad) || label[0] == '-' || label[len(label)-1] == '-' {
			return false
		}
	}
	return true
}

// shorten bounds what a CA, or a proxy before it, can put into logs.
func shorten(err error) error {
	const most = 600
	text := strings.Join(strings.Fields(strings.ToValidUTF8(err.Error(), "?")), " ")
	if len(text) > most {
		text = strings.ToValidUTF8(text[:most], "") + " …"
	}
	return errors.New(text)
}
