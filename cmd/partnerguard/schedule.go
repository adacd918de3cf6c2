package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"reflect"
	"sync"
	"time"

	"github.com/partnerguard/partnerguard/internal/config"
	"github.com/partnerguard/partnerguard/telemetry"
	"github.com/partnerguard/partnerguard/telemetry/reconcile"
)

// reconcileTime bounds a reconcile on schedule, waiting for a throttling Microsoft
// included.
const reconcileTime = 30 * time.Minute

// schedule is when a running guard holds Microsoft's records against its own: one run at
// a time, as far apart as the configuration says, give or take a tenth, so that many
// guards do not ask at once. What is overdue comes within a sixtieth of that.
type schedule struct {
	changed chan struct{} // the configuration may have; holds one

	mu       sync.Mutex
	cfg      config.Reconcile
	last     time.Time // the last run, of this process or before
	good     time.Time // the last that succeeded; else when cfg was taken over
	err      error     // of the last run by cfg
	failures int       // since good
}

func newSchedule() *schedule { return &schedule{changed: make(chan struct{}, 1)} }

// wake has the schedule look at the configuration again.
func (s *schedule) wake() {
	select {
	case s.changed <- struct{}{}:
	default:
	}
}

// set takes over cfg and returns when the next run is due. jitter is from 0 to 1.
func (s *schedule) set(cfg config.Reconcile, now time.Time, jitter float64) time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !reflect.DeepEqual(cfg, s.cfg) {
		if s.err != nil {
			s.last = time.Time{} // what failed may do now
		}
		s.cfg, s.good, s.err, s.failures = cfg, now, nil, 0
	}
	pause, tenth := cfg.Every, float64(cfg.Every)/10
	if s.err != nil {
		pause /= 4 // it may be of a moment
	}
	due := s.last.Add(pause + time.Duration((2*jitter-1)*tenth))
	if due.Before(now) { // or never
		return now.Add(time.Duration(jitter * float64(cfg.Every) / 60))
	}
	return due
}

// ended takes over how a run ended.
func (s *schedule) ended(now time.Time, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last, s.err = now, err
	if s.failures++; err == nil {
		s.good, s.failures = now, 0
	}
}

// problem is why the records were not compared for more than two intervals, empty when
// they were, or need not be.
func (s *schedule) problem(now time.Time) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cfg.Every == 0 || s.err == nil || now.Sub(s.good) <= 2*s.cfg.Every {
		return ""
	}
	return fmt.Sprintf("Microsoft's records were not read since %s; the last %d attempts failed: %v", s.good.UTC().Format(time.RFC3339), s.failures, s.err)
}

// followSchedule runs reconcile when it is due, until the daemon ends.
func (d *daemon) followSchedule() {
	s := d.schedule
	if kept, err := reconcile.LoadResult(d.dir); err == nil {
		s.mu.Lock()
		s.last = kept.Taken
		s.mu.Unlock()
		d.tel.Reconciled(reconciledMetrics(kept))
	}
	for {
		g := d.live.Load()
		due := s.set(g.cfg.Reconcile, time.Now(), rand.Float64())
		var timer <-chan time.Time
		if g.cfg.Reconcile.Every > 0 {
			timer = time.After(time.Until(due))
		}
		select {
		case <-d.ctx.Done():
			return
		case <-s.changed:
		case <-timer:
			err := d.reconcile(g.cfg)
			if d.ctx.Err() != nil {
				return
			}
			s.ended(time.Now(), err)
		}
	}
}

// reconcile holds Microsoft's records against ours once, as cfg says. It asks Microsoft
// directly: what is checked must not depend on the checker.
func (d *daemon) reconcile(cfg *config.Config) error {
	began := time.Now()
	ctx, cancel := context.WithTimeout(d.ctx, min(reconcileTime, cfg.Reconcile.Every))
	defer cancel()
	result, err := d.runReconcile(ctx, cfg)
	if d.ctx.Err() != nil {
		return d.ctx.Err()
	}
	if result != nil {
		high, direct := 0, result.Requests.Direct
		for _, f := range result.Findings {
			if f.Severity == reconcile.High {
				high++
			}
		}
		say := d.log.Info
		if !result.Clear {
			say = d.log.Warn
		}
		say("reconciled", "clear", result.Clear, "complete", result.Complete, "requests", result.Requests.Rows, "listed", result.Requests.Listed, "direct", direct,
			"findings", len(result.Findings), "high", high, "took", time.Since(began).Round(time.Millisecond).String())
		d.tel.Reconciled(reconciledMetrics(result))
	}
	if err != nil {
		d.tel.ReconcileFailed()
		facts := []any{"error", err.Error()}
		if hint := hintOf(err); hint != "" {
			facts = append(facts, "hint", hint)
		}
		d.log.Error("reconcile failed", facts...)
	}
	return err
}

func (d *daemon) runReconcile(ctx context.Context, cfg *config.Config) (*reconcile.Result, error) {
	upstream, err := reconcileUpstream(cfg, d.addresses)
	if err != nil {
		return nil, err
	}
	defer upstream.Close()
	records, err := openStore(ctx, storePlace{d.dir, cfg.Store.Postgres, d.env})
	if err != nil {
		return nil, err
	}
	defer records.Close()
	refs, err := userRefs(ctx, d.dir, cfg, records)
	if err != nil {
		return nil, err
	}
	rc := reconcile.Config{
		Dir: d.dir, Store: records, UserRef: refs, URL: cfg.Upstreams[config.PartnerCenter].URL, Transport: upstream,
		Integrations: integrationsOf(cfg), Delay: noDelay(cfg.Reconcile.Delay),
		Waiting: func(pause time.Duration, why string) {
			d.log.Info("reconcile waits", "why", why, "pause", pause.Round(time.Second).String())
		},
		Token: func(ctx context.Context) (string, error) {
			if command := cfg.Reconcile.TokenCommand; len(command) > 0 {
				return runTokenCommand(ctx, command[0], command[1:]...)
			}
			text, err := cfg.Reconcile.Token.Read(d.env)
			if err != nil {
				return "", failed(fmt.Errorf("reconcile.token: %w", err), tokenHint)
			}
			return tokenIn([]byte(text), "reconcile.token")
		},
	}
	return reconcile.Run(ctx, rc)
}

// noDelay turns 0, which means none, into reconcile's word for it.
func noDelay(delay time.Duration) time.Duration {
	if delay == 0 {
		return -1
	}
	return delay
}

// hintOf is what err says to do.
func hintOf(err error) string {
	var f *failure
	var h interface{ Hint() string }
	switch {
	case errors.As(err, &f) && f.hint == tokenHint:
		return "see reconcile.token and reconcile.token_command in the configuration"
	case errors.As(err, &f):
		return f.hint
	case errors.As(err, &h):
		return h.Hint()
	}
	return ""
}

func reconciledMetrics(r *reconcile.Result) *telemetry.Reconciled {
	m := &telemetry.Reconciled{At: r.Taken, Complete: r.Complete, Findings: map[string]int{}}
	for _, code := range reconcile.Codes() {
		m.Findings[code] = 0
	}
	for _, f := range r.Findings {
		if _, known := m.Findings[f.Code]; known {
			m.Findings[f.Code]++
		}
	}
	return m
}
