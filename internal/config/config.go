// Package config reads partnerguard's one YAML file into typed, checked
// configuration.
//
// Reading is strict: an unknown key, a wrong type, a key written twice, a second
// document and every contradiction are errors, all reported at once with file,
// line, column, what is wrong and what to write instead. Keys left out have the
// defaults of Default. Durations are Go's with d for days (30d, 1d12h); sizes
// are a whole number with a unit (1GiB, 500MB); where a list of values is
// expected, one value may stand alone; secrets are references, file:PATH or
// env:NAME. Anchors, aliases and merge keys work.
//
// A key whose field has the tag restart cannot change in a running guard; see
// Changes.
package config

import (
	"bytes"
	"cmp"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/partnerguard/partnerguard/policy"
)

// The upstreams there can be, by name. Every configuration has PartnerCenter, the
// others only where it names them.
const (
	PartnerCenter = "partner-center" // the Partner Center REST API
	PartnerAPI    = "partner-api"    // api.partner.microsoft.com: referrals, price sheets, payouts
	Graph         = "graph"          // Microsoft Graph
)

// Config is one configuration, defaults filled in. A Config that Parse or Load
// returned, or Default, is valid; after changing it, call Validate.
type Config struct {
	// Version is the version of the file's format: 1. Required in a file.
	Version int `yaml:"version"`

	// Instance names this guard in records, metrics and the fleet's store: 1 to 63
	// letters, digits, dots, hyphens and underscores. Empty: the host's name, which
	// guards that share a host cannot be told apart by.
	Instance string `yaml:"instance" restart:"any"`

	// Cloud presets hosts, issuers and audiences: global (the default), usgov or
	// china.
	Cloud string `yaml:"cloud"`

	// Tenants are the partner tenants whose tokens are accepted, as GUIDs in any
	// case. Empty accepts any while every mode is audit; tag and enforce need it.
	Tenants []string `yaml:"tenants"`

	// Mode holds where neither a rule nor an integration says otherwise: audit
	// (the default), tag or enforce.
	Mode policy.Mode `yaml:"mode"`

	// Listeners are the addresses calls come in by; one on 127.0.0.1:8080 by
	// default.
	Listeners []Listener `yaml:"listeners" restart:"presence"`

	// ACME is where listeners with tls.acme get their certificates from. Its
	// defaults are those of Let's Encrypt.
	ACME ACME `yaml:"acme" restart:"any"`

	// Integrations are the calling programs, in order.
	Integrations []Integration `yaml:"integrations"`

	// Rules are tried in order; the first that matches a call gives its mode.
	Rules []Rule `yaml:"rules"`

	// Entra is how tokens are verified.
	Entra Entra `yaml:"entra"`

	// Upstreams are where calls go, by name: partner-center, which is always there,
	// partner-api and graph, which are there when named. Most keys are preset by
	// Cloud.
	Upstreams map[string]Upstream `yaml:"upstreams"`

	// Limits bound what one client or integration can take of the guard.
	Limits Limits `yaml:"limits"`

	// Timeouts bound the single steps of a call. Nothing bounds the whole: price
	// sheets stream for minutes.
	Timeouts Timeouts `yaml:"timeouts"`

	// ValidateMFA says which app+user calls ask Microsoft for its own verdict by
	// ValidateMfa: true. Default reads.
	ValidateMFA ValidateMFA `yaml:"validate_mfa"`

	// Ledger is the account of every call.
	Ledger Ledger `yaml:"ledger" restart:"any"`

	// Store is the view of the ledger that reports search.
	Store Store `yaml:"store" restart:"any"`

	// Reconcile holds Microsoft's own records against the ledger's, on a schedule.
	Reconcile Reconcile `yaml:"reconcile"`

	// Admin is the listener of health, metrics and console.
	Admin Admin `yaml:"admin"`
}

// Listener is an address that calls come in by.
type Listener struct {
	// Name identifies the listener in records and in match.listener. Optional; the
	// address stands for it.
	Name string `yaml:"name"`

	// Address is host:port. An empty host is every interface; port 0 takes a free
	// one.
	Address string `yaml:"address" restart:"any"`

	// Integration claims every call of this listener for one integration.
	Integration string `yaml:"integration"`

	// Upstream is where its calls go. Default partner-center. A call whose Host
	// header, less its port, is exactly a name of another configured upstream
	// (Config.Hosts) goes there instead. The Host header only ever chooses among
	// them: it never becomes an address, and one that names none changes nothing.
	Upstream string `yaml:"upstream"`

	// TLS serves HTTPS; nil serves clear text.
	TLS *TLS `yaml:"tls" restart:"presence"`

	// ClientCA is a PEM file of the CAs whose client certificates are accepted.
	// Where it is given every client must have one; match.client_cert tells them
	// apart. Needs TLS. Empty asks for none.
	ClientCA string `yaml:"client_ca"`

	// ClientCRL is a file of the revocation lists of these CAs, several in PEM or
	// one in DER. Needs ClientCA. Empty: a certificate is good until it expires.
	ClientCRL string `yaml:"client_crl"`

	// InsecureClearText allows clear text off loopback, where whoever sees the
	// traffic sees the bearer tokens.
	InsecureClearText bool `yaml:"insecure_clear_text"`
}

// Label is what records and match.listener call l: its name, else its address.
func (l Listener) Label() string { return cmp.Or(l.Name, l.Address) }

// TLS is where a certificate comes from: either two files or ACME. A relative path
// starts at the directory of the configuration file, here and in all keys that
// name a file.
type TLS struct {
	Certificate string `yaml:"certificate"` // PEM file: leaf first, then the chain
	Key         string `yaml:"key"`         // PEM file of the leaf's key

	// ACME are the domain names to get a certificate for from Config.ACME. The
	// names are not wildcards, which the challenges known here cannot prove.
	// Listeners only.
	ACME []string `yaml:"acme"`
}

// ACME is a certificate authority that issues by RFC 8555.
type ACME struct {
	// Email is where the authority writes about trouble. Optional.
	Email string `yaml:"email"`

	// Directory is the authority's directory URL, always https. Default Let's
	// Encrypt's.
	Directory string `yaml:"directory"`

	// Root is a PEM file of the CAs to trust for Directory in place of the
	// system's. Empty: the system's.
	Root string `yaml:"root"`

	// EAB binds the account to one that the authority already knows (RFC 8555,
	// section 7.3.4). Nil: the authority asks for none.
	EAB *EAB `yaml:"eab"`

	// Challenges are the ways to prove that a domain is ours: http-01 and
	// tls-alpn-01. Default both.
	Challenges []string `yaml:"challenges"`

	// HTTPPort answers http-01, on all addresses, while a certificate is ordered.
	// The authority connects to port 80; another one needs something that forwards
	// to it. Default 80.
	HTTPPort int `yaml:"http_port"`

	// TLSALPNPort answers tls-alpn-01, as HTTPPort does http-01; it may be that of
	// a listener with tls.acme. Default 443.
	TLSALPNPort int `yaml:"tls_alpn_port"`

	// Storage is where account, keys and certificates are kept: files (the default),
	// in the data directory, or postgres, where a fleet shares them: in the database
	// of Store.Postgres, encrypted, with copies of the certificates in the data
	// directory. One guard of the fleet orders, and any of them answers the
	// authority's challenges, so that HTTPPort is open all the time.
	Storage string `yaml:"storage"`

	// StorageKey encrypts what Storage postgres keeps; required there. All guards of
	// the fleet have the same.
	StorageKey Secret `yaml:"storage_key"` // refers to 32 bytes in base64
}

// The values of ACME.Storage.
const (
	StorageFiles    = "files"
	StoragePostgres = "postgres"
)

// The values of ACME.Challenges.
const (
	HTTP01    = "http-01"
	TLSALPN01 = "tls-alpn-01"
)

// EAB is what an authority hands out to bind an ACME account; both are required.
type EAB struct {
	KeyID  string `yaml:"key_id"`
	MACKey Secret `yaml:"mac_key"` // refers to base64url
}

// Integration is a calling program as the partner names it.
type Integration struct {
	Name    string `yaml:"name"`    // 1 to 63 of a-z, 0-9 and -
	Owner   string `yaml:"owner"`   // whose it is: a mail address, a team
	Contact string `yaml:"contact"` // how to reach them, if not by Owner
	// Mode of its calls where no rule says otherwise; left out, the global one.
	Mode policy.Mode `yaml:"mode"`
	// MaxCalls is how many of its calls may be in flight at a time, in place of
	// Limits.Calls. Nil: that one holds; 0: no limit.
	MaxCalls *int  `yaml:"max_calls"`
	Match    Match `yaml:"match"`
}

// Match says how to know an integration's calls. Every key given must hold;
// within a key any one value is enough.
type Match struct {
	// Strong evidence, which a caller cannot choose freely.

	AppID      []string       `yaml:"app_id"`      // verified client application id
	User       []string       `yaml:"user"`        // verified object id or user principal name
	ClientCert []string       `yaml:"client_cert"` // exact subject alternative name (DNS, URI, mail or IP) or common name
	Listener   []string       `yaml:"listener"`    // Listener.Label
	Source     []netip.Prefix `yaml:"source"`      // address or CIDR of the TCP peer

	// Weak evidence, which anyone can claim. It names a call but cannot loosen
	// what holds for it.

	Host        []string `yaml:"host"`        // Host header without port
	PathPrefix  []string `yaml:"path_prefix"` // whole leading segments of the path
	Application []string `yaml:"application"` // MS-PartnerCenter-Application
	UserAgent   []string `yaml:"user_agent"`  // leading part of User-Agent
}

// Rule gives a mode to the calls it matches. Every key given must hold; outside
// its dates or its percent a rule does not match and the next is tried.
type Rule struct {
	Name         string      `yaml:"name"`         // unique; shown in every record the rule decides
	Integrations []string    `yaml:"integrations"` // names, app-{application id}, or unknown
	Tenants      []string    `yaml:"tenants"`      // among Config.Tenants
	Methods      []string    `yaml:"methods"`
	Routes       []string    `yaml:"routes"`  // * one segment, ** at the end the rest
	Mode         policy.Mode `yaml:"mode"`    // required
	Percent      *int        `yaml:"percent"` // share of integrations, 0 to 100; nil is 100
	From         time.Time   `yaml:"from"`    // inclusive; RFC 3339, or a date: its midnight UTC
	Until        time.Time   `yaml:"until"`   // exclusive
	Owner        string      `yaml:"owner"`
	Note         string      `yaml:"note"`
}

// Entra is how tokens are verified.
type Entra struct {
	// Authority is where signing keys are fetched from, as a URL without path.
	// Empty is the cloud's. Issuers stay the cloud's in any case.
	Authority string `yaml:"authority"`

	// CA is a PEM file of CAs to trust for Authority besides the system's, for
	// networks whose proxy opens TLS. Empty: only the system's.
	CA string `yaml:"ca"`

	// Leeway is how far exp and nbf may lie from our clock. Default 5m; here 0
	// means none.
	Leeway time.Duration `yaml:"leeway"`

	// MaxStale is how long the last good keys serve while fetching fails. Default
	// 7d.
	MaxStale time.Duration `yaml:"max_stale"`

	// MFAValues are the amr values that prove MFA, of mfa, ngcmfa and wiaormfa.
	// Default the first two.
	MFAValues []string `yaml:"mfa_values"`

	// OnUnverifiable is what happens to tokens that no published key can verify:
	// as_mode (the default), forward or reject.
	OnUnverifiable policy.OnUnverifiable `yaml:"on_unverifiable"`
}

// Upstream is where calls go.
type Upstream struct {
	// URL is scheme and host. Default by cloud. http only towards loopback.
	URL string `yaml:"url"`

	// Dial is the host:port to connect to in place of URL's host, for machines
	// whose hosts file points Microsoft's name at the guard. TLS still asks for
	// the name in URL.
	Dial string `yaml:"dial"`

	// HTTP2 offers HTTP/2. Default false.
	HTTP2 bool `yaml:"http2"`

	// CA is a PEM file of CAs to trust besides the system's, for networks whose proxy
	// opens TLS.
	CA string `yaml:"ca"`

	// Audiences are the aud values accepted for this upstream. Empty is the
	// cloud's resource URI, the same with a slash, and the application id of the
	// API.
	Audiences []string `yaml:"audiences"`

	// Hosts are Host headers, without port, that choose this upstream on any
	// listener. The host of URL does so too; see Config.Hosts.
	Hosts []string `yaml:"hosts"`

	// RewriteLinks leads absolute links to the upstream's own host in its answers
	// back through the guard. Default true in a file.
	RewriteLinks bool `yaml:"rewrite_links"`
}

// preset is what a file's upstream begins with.
func (u *Upstream) preset() { u.RewriteLinks = true }

// Limits bound what one client or integration can take of the guard.
type Limits struct {
	// Connections that a listener serves at a time; one more is closed at once.
	// Default 10000; 0: no limit.
	Connections int `yaml:"connections" restart:"any"`

	// Calls of an integration in flight at a time; one more is refused, in every
	// mode. Default 0: no limit.
	Calls int `yaml:"calls"`

	// Headers is the largest request header, 8KiB to 1MiB. Default 64KiB.
	Headers Size `yaml:"headers" restart:"any"`
}

// Timeouts bound the single steps of a call; all but Drain and Unready must be
// above zero.
type Timeouts struct {
	Dial           time.Duration `yaml:"dial"`                      // TCP connection to the upstream; default 10s
	TLS            time.Duration `yaml:"tls"`                       // TLS handshake with the upstream; default 10s
	ResponseHeader time.Duration `yaml:"response_header"`           // from the request sent to the response header; default 200s
	Idle           time.Duration `yaml:"idle"`                      // an unused connection to the upstream; default 90s
	ReadHeader     time.Duration `yaml:"read_header" restart:"any"` // a client's request header; default 30s
	KeepAlive      time.Duration `yaml:"keep_alive" restart:"any"`  // an unused connection of a client; default 120s
	Body           time.Duration `yaml:"body"`                      // without a byte of a body moving, either way; default 2m
	Drain          time.Duration `yaml:"drain"`                     // calls in flight at shutdown; default 30s, 0 cuts them off

	// Unready is how long readiness fails at shutdown before the listeners close,
	// so that a balancer that watches it stops sending. Default 5s.
	Unready time.Duration `yaml:"unready"`
}

// ValidateMFA says which app+user calls ask Microsoft for its own verdict.
type ValidateMFA string

// The values of Config.ValidateMFA.
const (
	ValidateOff   ValidateMFA = "off"
	ValidateReads ValidateMFA = "reads" // GET and HEAD
	ValidateAll   ValidateMFA = "all"
)

// Ledger is the account of every call.
type Ledger struct {
	// Retention is how long records are kept. Default 30d.
	Retention time.Duration `yaml:"retention"`

	// OnFailure is what happens to calls while the ledger cannot be written.
	// Default forward.
	OnFailure OnFailure `yaml:"on_failure"`

	// FSync is how often written records are forced to disk. Default 1s.
	FSync FSync `yaml:"fsync"`

	// Identities is whether the side file says who the users are. Default plain.
	Identities Identities `yaml:"identities"`

	// MinFree is the free disk space below which nothing more is written. Default
	// 1GiB; 0 checks nothing.
	MinFree Size `yaml:"min_free"`

	// Tenants is how long the records of single partner tenants are kept instead of
	// Retention, by tenant id, 1d at least: of calls whose token is verified and of the
	// tenant. Shorter or longer.
	Tenants map[string]time.Duration `yaml:"tenants"`

	// MaxBytes is how much disk the ledger may take: with more, the oldest records are
	// removed before their time. 512MiB at least. Default 0: no limit.
	MaxBytes Size `yaml:"max_bytes"`

	// Compress lets files that are done be compressed, with zstd. Default true.
	Compress bool `yaml:"compress"`

	// Key is the file of the private key that signs checkpoints: Ed25519, PKCS#8, PEM. A
	// relative path starts at the directory of the configuration file. Empty: ledger.key
	// in the data directory, made at the first start.
	Key string `yaml:"key"`
}

// TenantRetention is Tenants with the ids as records hold them.
func (l *Ledger) TenantRetention() map[string]time.Duration {
	m := make(map[string]time.Duration, len(l.Tenants))
	for tenant, kept := range l.Tenants {
		m[strings.ToLower(tenant)] = kept
	}
	return m
}

// OnFailure is what happens to calls while the ledger cannot be written.
type OnFailure string

// The values of Ledger.OnFailure.
const (
	ForwardOnFailure OnFailure = "forward" // go on; the record goes to the log
	RejectOnFailure  OnFailure = "reject"  // 503
)

// Identities is whether a side file of the ledger says who the users are.
type Identities string

// The values of Ledger.Identities.
const (
	PlainIdentities Identities = "plain" // tenant, object id and name by user_ref
	// PseudonymousIdentities: users are a user_ref, a keyed hash, and nothing else is
	// kept of them. Nobody can be searched by name, nor joined with Microsoft's records
	// of users.
	PseudonymousIdentities Identities = "pseudonymous"
)

// FSync is how often written records are forced to disk: after at most this
// long. Records survive a crash of the program whatever it says; a power loss
// takes at most this much.
type FSync time.Duration

// FSyncAlways forces every record to disk before its call goes on; the file says
// always.
const FSyncAlways FSync = 0

// Size is a number of bytes.
type Size int64

// Store is the view of the ledger that reports search.
type Store struct {
	// Postgres refers to the URL of the PostgreSQL database that a fleet of guards
	// shares. Empty: each guard has a SQLite database in its data directory.
	Postgres Secret `yaml:"postgres"`
}

// Reconcile is when the guard asks Microsoft for its records of the partner's calls, as
// partnerguard reconcile does on demand. It needs one of Token and TokenCommand. Guards
// that share a store need it in one of them only.
type Reconcile struct {
	// Every is how often, 1m to 7d; Microsoft keeps its records for 7 days. Default 0:
	// never.
	Every time.Duration `yaml:"every"`

	// Token refers to an app+user token with MFA for Partner Center, alone or in a line
	// of JSON as access_token or accessToken. It is read for each run: who renews it
	// needs no reload.
	Token Secret `yaml:"token"`

	// TokenCommand is a program and its arguments that print such a token within 5
	// minutes. It is run without a shell, as the user that the guard runs as.
	TokenCommand Command `yaml:"token_command"`

	// Delay is how long Microsoft may take to list a call. Default 1h; 0 is none.
	Delay time.Duration `yaml:"delay"`
}

// Command is a program and its arguments.
type Command []string

// String names the program alone: arguments may be secrets.
func (c Command) String() string {
	switch len(c) {
	case 0:
		return ""
	case 1:
		return c[0]
	}
	return c[0] + " …"
}

// Admin is the listener of health, metrics and console. Off loopback it needs TLS
// and one of Token and ClientCA, or InsecureClearText and Token.
type Admin struct {
	// Address is host:port. Default 127.0.0.1:9090.
	Address string `yaml:"address" restart:"any"`

	// Token is the bearer token that opens it. Empty: none does.
	Token Secret `yaml:"token"`

	// TLS serves HTTPS, by certificate files; nil serves clear text.
	TLS *TLS `yaml:"tls" restart:"presence"`

	// ClientCA is a PEM file of CAs any of whose client certificates opens it.
	// Needs TLS. Empty: none does.
	ClientCA string `yaml:"client_ca"`

	// Hosts are the names and IP addresses, without port, that it answers to besides
	// localhost and the host of Address, so that no web page can point a name of its
	// own here. Calls with Token may use any, those with a client certificate also
	// the names of TLS.
	Hosts []string `yaml:"hosts"`

	// InsecureClearText allows clear text off loopback, where whoever sees the
	// traffic sees the token and the records.
	InsecureClearText bool `yaml:"insecure_clear_text"`
}

// Let's Encrypt's directories.
const (
	letsEncrypt        = "https://acme-v02.api.letsencrypt.org/directory"
	letsEncryptStaging = "https://acme-staging-v02.api.letsencrypt.org/directory"
)

// Default returns what runs without a file: audit of any tenant on
// 127.0.0.1:8080, admin on 127.0.0.1:9090.
func Default() *Config {
	c := defaults()
	c.Version = 1
	c.complete()
	return c
}

// Load reads, parses and validates the file at path, the files it names
// included. A file with mistakes gives an *Error.
func Load(path string) (*Config, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	return parse(path, data, true)
}

// Parse reads a configuration from data; name stands for the file in errors, and
// relative paths in data start at its directory. Parse checks all that Validate
// checks, but opens no file. The error is an *Error with every mistake.
func Parse(name string, data []byte) (*Config, error) {
	return parse(name, data, false)
}

func parse(name string, data []byte, files bool) (*Config, error) {
	data = bytes.TrimPrefix(data, []byte("\ufeff")) // as Windows editors write it
	c := defaults()
	d := decoder{file: name}
	if d.document(data, c) {
		c.complete()
		c.resolvePaths(filepath.Dir(name))
		c.check(d.addUnlessFailed)
		if files {
			c.checkFiles(d.addUnlessFailed)
		}
	}
	if err := newError(d.problems); err != nil {
		return nil, err
	}
	return c, nil
}

// Validate checks c whole, the files it names included. It is for configurations
// that were built or changed by other means than a file, so its *Error has the
// paths of the keys but no file and line.
func (c *Config) Validate() error {
	var problems []Problem
	add := func(path, message, hint string) {
		problems = append(problems, Problem{Path: path, Message: message, Hint: hint})
	}
	c.check(add)
	c.checkFiles(add)
	return newError(problems)
}

// CallsOf is how many calls of an integration may be in flight at a time; 0 is no limit.
func (c *Config) CallsOf(integration string) int {
	for _, in := range c.Integrations {
		if in.Name == integration && in.MaxCalls != nil {
			return *in.MaxCalls
		}
	}
	return c.Limits.Calls
}

// Policy builds the policy that c describes. For a valid c it does not fail; the
// error joins a *policy.FieldError for every mistake.
func (c *Config) Policy() (*policy.Policy, error) {
	pc := policy.Config{
		Mode:           c.Mode,
		Tenants:        c.Tenants,
		OnUnverifiable: c.Entra.OnUnverifiable,
	}
	for _, in := range c.Integrations {
		pc.Integrations = append(pc.Integrations, policy.Integration{
			Name:    in.Name,
			Owner:   in.Owner,
			Contact: in.Contact,
			Mode:    in.Mode,
			Match: policy.Match{
				AppID:       in.Match.AppID,
				User:        in.Match.User,
				ClientCert:  in.Match.ClientCert,
				Listener:    in.Match.Listener,
				Source:      in.Match.Source,
				Host:        in.Match.Host,
				PathPrefix:  in.Match.PathPrefix,
				Application: in.Match.Application,
				UserAgent:   in.Match.UserAgent,
			},
		})
	}
	for _, r := range c.Rules {
		pc.Rules = append(pc.Rules, policy.Rule(r))
	}
	return policy.New(pc)
}

// defaults returns the defaults of a file: those of Default without the version,
// which a file must give, and without those that hang on the cloud.
func defaults() *Config {
	return &Config{
		Cloud:     "global",
		Mode:      policy.Audit,
		Listeners: []Listener{{Address: "127.0.0.1:8080"}},
		ACME: ACME{
			Directory:   letsEncrypt,
			Challenges:  []string{HTTP01, TLSALPN01},
			HTTPPort:    80,
			TLSALPNPort: 443,
			Storage:     StorageFiles,
		},
		Entra: Entra{
			Leeway:         5 * time.Minute,
			MaxStale:       7 * day,
			MFAValues:      policy.DefaultMFAValues(),
			OnUnverifiable: policy.AsMode,
		},
		Upstreams: map[string]Upstream{PartnerCenter: {RewriteLinks: true}},
		Limits:    Limits{Connections: 10_000, Headers: 64 << 10},
		Timeouts: Timeouts{
			Dial:           10 * time.Second,
			TLS:            10 * time.Second,
			ResponseHeader: 200 * time.Second,
			Idle:           90 * time.Second,
			ReadHeader:     30 * time.Second,
			KeepAlive:      120 * time.Second,
			Body:           2 * time.Minute,
			Drain:          30 * time.Second,
			Unready:        5 * time.Second,
		},
		ValidateMFA: ValidateReads,
		Ledger: Ledger{
			Retention:  30 * day,
			OnFailure:  ForwardOnFailure,
			FSync:      FSync(time.Second),
			Identities: PlainIdentities,
			MinFree:    1 << 30,
			Compress:   true,
		},
		Reconcile: Reconcile{Delay: time.Hour},
		Admin:     Admin{Address: "127.0.0.1:9090"},
	}
}

// complete fills in what was left out and depends on other keys, and writes names
// of hosts and URLs the one way they are compared.
func (c *Config) complete() {
	c.Entra.Authority = strings.TrimSuffix(c.Entra.Authority, "/")
	for i := range c.Listeners {
		l := &c.Listeners[i]
		l.Upstream = cmp.Or(l.Upstream, PartnerCenter)
		if l.TLS != nil {
			l.TLS.ACME = lowered(l.TLS.ACME)
		}
	}
	c.Admin.Hosts = lowered(c.Admin.Hosts)
	if len(c.Reconcile.TokenCommand) == 0 {
		c.Reconcile.TokenCommand = nil
	}
	for name, u := range c.Upstreams {
		u.URL = strings.TrimSuffix(u.URL, "/")
		resource, appID := api(name, c.Cloud, u.URL)
		u.URL = cmp.Or(u.URL, resource)
		if len(u.Audiences) == 0 && resource != "" {
			u.Audiences = []string{resource, resource + "/", appID}
		}
		u.Hosts = lowered(u.Hosts)
		c.Upstreams[name] = u
	}
}

// lowered returns names in lower case, and nil for none of them.
func lowered(names []string) []string {
	var low []string
	for _, name := range names {
		low = append(low, strings.ToLower(name))
	}
	return low
}

// resolvePaths makes the relative paths in c start at dir.
func (c *Config) resolvePaths(dir string) {
	c.eachFile(func(_ string, file *string) {
		if !filepath.IsAbs(*file) {
			*file = filepath.Join(dir, *file)
		}
	})
}
