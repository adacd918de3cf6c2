// Package config reads partnerguard's one YAML file into typed, checked
// configuration.
//
// Reading is strict: an unknown key, a wrong type, a key written twice, a second
// document and every contradiction are errors, all reported at once with file,
// line, column, what is wrong and what to write instead. Keys left out have the
// defaults of Default. Durations are Go's with d for days (30d, 1d12h); sizes
// are a whole number with a unit (1GiB, 500MB); where a list of values is
// expected, one value may stand alone. Anchors, aliases and merge keys work.
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

// PartnerCenter is the name of the upstream that every configuration has.
const PartnerCenter = "partner-center"

// Config is one configuration, defaults filled in. A Config that Parse or Load
// returned, or Default, is valid; after changing it, call Validate.
type Config struct {
	// Version is the version of the file's format: 1. Required in a file.
	Version int `yaml:"version"`

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
	Listeners []Listener `yaml:"listeners"`

	// Integrations are the calling programs, in order.
	Integrations []Integration `yaml:"integrations"`

	// Rules are tried in order; the first that matches a call gives its mode.
	Rules []Rule `yaml:"rules"`

	// Entra is how tokens are verified.
	Entra Entra `yaml:"entra"`

	// Upstreams are where calls go, by name. Only partner-center is known, and it
	// is always there.
	Upstreams map[string]Upstream `yaml:"upstreams"`

	// Timeouts bound the single steps of a call. Nothing bounds the whole: price
	// sheets stream for minutes.
	Timeouts Timeouts `yaml:"timeouts"`

	// ValidateMFA says which app+user calls ask Microsoft for its own verdict by
	// ValidateMfa: true. Default reads.
	ValidateMFA ValidateMFA `yaml:"validate_mfa"`

	// Ledger is the account of every call.
	Ledger Ledger `yaml:"ledger"`

	// Store is the view of the ledger that reports search. It has no keys yet.
	Store Store `yaml:"store"`

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
	Address string `yaml:"address"`

	// Integration claims every call of this listener for one integration.
	Integration string `yaml:"integration"`

	// Upstream is where its calls go. Default partner-center.
	Upstream string `yaml:"upstream"`

	// TLS serves HTTPS; nil serves clear text.
	TLS *TLS `yaml:"tls"`

	// InsecureClearText allows clear text off loopback, where whoever sees the
	// traffic sees the bearer tokens.
	InsecureClearText bool `yaml:"insecure_clear_text"`
}

// Label is what records and match.listener call l: its name, else its address.
func (l Listener) Label() string { return cmp.Or(l.Name, l.Address) }

// TLS is a certificate with its key, both in PEM files. A relative path starts at
// the directory of the configuration file.
type TLS struct {
	Certificate string `yaml:"certificate"` // leaf first, then the chain
	Key         string `yaml:"key"`
}

// Integration is a calling program as the partner names it.
type Integration struct {
	Name    string `yaml:"name"`    // 1 to 63 of a-z, 0-9 and -
	Owner   string `yaml:"owner"`   // whose it is: a mail address, a team
	Contact string `yaml:"contact"` // how to reach them, if not by Owner
	// Mode of its calls where no rule says otherwise; left out, the global one.
	Mode  policy.Mode `yaml:"mode"`
	Match Match       `yaml:"match"`
}

// Match says how to know an integration's calls. Every key given must hold;
// within a key any one value is enough.
type Match struct {
	// Strong evidence, which a caller cannot choose freely.

	AppID    []string       `yaml:"app_id"`   // verified client application id
	User     []string       `yaml:"user"`     // verified object id or user principal name
	Listener []string       `yaml:"listener"` // Listener.Label
	Source   []netip.Prefix `yaml:"source"`   // address or CIDR of the TCP peer

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

	// CA is a PEM file of the certificates to trust in place of the system's. A
	// relative path starts at the directory of the configuration file.
	CA string `yaml:"ca"`

	// Audiences are the aud values accepted for this upstream. Empty is the
	// cloud's resource URI, the same with a slash, and Partner Center's
	// application id.
	Audiences []string `yaml:"audiences"`
}

// Timeouts bound the single steps of a call; all but Drain must be above zero.
type Timeouts struct {
	Dial           time.Duration `yaml:"dial"`            // TCP connection to the upstream; default 10s
	TLS            time.Duration `yaml:"tls"`             // TLS handshake with the upstream; default 10s
	ResponseHeader time.Duration `yaml:"response_header"` // from the request sent to the response header; default 200s
	Idle           time.Duration `yaml:"idle"`            // an unused connection; default 90s
	Drain          time.Duration `yaml:"drain"`           // calls in flight at shutdown; default 30s, 0 cuts them off
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

	// Identities is how users stand in the side file: plain.
	Identities string `yaml:"identities"`

	// MinFree is the free disk space below which nothing more is written. Default
	// 1GiB; 0 checks nothing.
	MinFree Size `yaml:"min_free"`
}

// OnFailure is what happens to calls while the ledger cannot be written.
type OnFailure string

// The values of Ledger.OnFailure.
const (
	ForwardOnFailure OnFailure = "forward" // go on; the record goes to the log
	RejectOnFailure  OnFailure = "reject"  // 503
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
type Store struct{}

// Admin is the listener of health, metrics and console.
type Admin struct {
	// Address is host:port on loopback. Default 127.0.0.1:9090.
	Address string `yaml:"address"`
}

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
		Entra: Entra{
			Leeway:         5 * time.Minute,
			MaxStale:       7 * day,
			MFAValues:      policy.DefaultMFAValues(),
			OnUnverifiable: policy.AsMode,
		},
		Upstreams: map[string]Upstream{PartnerCenter: {}},
		Timeouts: Timeouts{
			Dial:           10 * time.Second,
			TLS:            10 * time.Second,
			ResponseHeader: 200 * time.Second,
			Idle:           90 * time.Second,
			Drain:          30 * time.Second,
		},
		ValidateMFA: ValidateReads,
		Ledger: Ledger{
			Retention:  30 * day,
			OnFailure:  ForwardOnFailure,
			FSync:      FSync(time.Second),
			Identities: "plain",
			MinFree:    1 << 30,
		},
		Admin: Admin{Address: "127.0.0.1:9090"},
	}
}

// complete fills in what was left out and depends on other keys, and drops the
// slash that people end a URL with.
func (c *Config) complete() {
	c.Entra.Authority = strings.TrimSuffix(c.Entra.Authority, "/")
	for i := range c.Listeners {
		l := &c.Listeners[i]
		l.Upstream = cmp.Or(l.Upstream, PartnerCenter)
	}
	for name, u := range c.Upstreams {
		if name == PartnerCenter {
			resource := partnerCenterResource(c.Cloud)
			u.URL = cmp.Or(u.URL, resource)
			if len(u.Audiences) == 0 {
				u.Audiences = []string{resource, resource + "/", partnerCenterAppID}
			}
		}
		u.URL = strings.TrimSuffix(u.URL, "/")
		c.Upstreams[name] = u
	}
}

// partnerCenterAppID is Partner Center's application id, which v2 tokens and
// clients that ask for it by id carry as audience.
const partnerCenterAppID = "fa3d9a0c-3fb0-42cc-9193-47c7ecd2edbd"

// partnerCenterResource is Partner Center's address and resource URI in cloud. US
// Government partners use the global one.
func partnerCenterResource(cloud string) string {
	if cloud == "china" {
		return "https://partner.partnercenterapi.microsoftonline.cn"
	}
	return "https://api.partnercenter.microsoft.com"
}

// resolvePaths makes the relative paths in c start at dir.
func (c *Config) resolvePaths(dir string) {
	resolve := func(path *string) {
		if *path != "" && !filepath.IsAbs(*path) {
			*path = filepath.Join(dir, *path)
		}
	}
	for i := range c.Listeners {
		if t := c.Listeners[i].TLS; t != nil {
			resolve(&t.Certificate)
			resolve(&t.Key)
		}
	}
	for name, u := range c.Upstreams {
		resolve(&u.CA)
		c.Upstreams[name] = u
	}
}
