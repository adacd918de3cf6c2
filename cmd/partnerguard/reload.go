package main

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	systemd "github.com/coreos/go-systemd/v22/daemon"
	"github.com/partnerguard/partnerguard/internal/config"
	"github.com/partnerguard/partnerguard/internal/watch"
	"github.com/partnerguard/partnerguard/telemetry"
)

// openWatcher begins to watch the configuration, before it is first read.
func (d *daemon) openWatcher() {
	if d.file == "" {
		return
	}
	var err error
	if d.watcher, err = watch.New(watch.Config{
		Files: []string{d.file},
		Error: func(err error) { d.log.Warn("files are looked at now and then only", "error", err.Error()) },
	}); err != nil {
		d.log.Warn("changes of files are not seen; send SIGHUP", "error", err.Error())
	}
}

// watch sees from now on changes of the configuration and of the files that these
// configurations name. It stands before they are read, so that no change is missed.
func (d *daemon) watch(configs ...*config.Config) {
	if d.watcher == nil {
		return
	}
	files := []string{d.file}
	for _, c := range configs {
		files = append(files, c.Files()...)
	}
	d.watcher.Set(files)
}

// followConfiguration reloads on SIGHUP and whenever the configuration, or a file that
// it names, holds something else.
func (d *daemon) followConfiguration() {
	var changed <-chan struct{}
	if d.watcher != nil {
		changed = d.watcher.Changed()
	}
	for {
		select {
		case <-d.ctx.Done():
			return
		case <-d.hangUp:
			if d.watcher != nil {
				d.watcher.Sync()
			}
			d.reload("SIGHUP")
		case <-changed:
			d.reload("a file changed")
		}
	}
}

// reload takes the configuration as it stands now, whole or not at all. Calls in flight
// end by the one they began with.
func (d *daemon) reload(why string) {
	d.notify(reloading())
	defer d.notify(systemd.SdNotifyReady)
	defer d.health()
	old := d.live.Load()
	next, changes, failed := d.next(old)
	d.reloadErr.Store(&failed) // and never changed again: others read it
	if err := failed; err != nil {
		d.tel.Reloaded(telemetry.ReloadFailed, old.number, problemOf(err))
		d.logReloadError(err)
		return
	}
	if next == nil {
		d.tel.Reloaded(telemetry.ReloadUnchanged, old.number, nil)
		d.log.Info("configuration is unchanged", "why", why)
		return
	}
	// From here on nothing can fail.
	ended, err := d.guard.Swap(next.settings())
	if err != nil {
		next.close(old)
		d.reloadErr.Store(&err)
		d.logReloadError(err)
		return
	}
	for i, s := range d.servers {
		if t := next.tls[old.cfg.Listeners[i].Label()]; t != nil {
			s.SetTLS(t)
		}
	}
	d.admin.set(next.admin)
	d.live.Store(next)
	d.watch(next.cfg)
	d.manageCertificates(next)
	d.schedule.wake()
	d.background.Go(func() {
		select {
		case <-ended:
		case <-d.ctx.Done():
		}
		old.close(next)
	})
	for _, c := range changes {
		d.log.Info("changed", "key", c.Path, "old", c.Old, "new", c.New)
	}
	d.tel.Reloaded(telemetry.ReloadDone, next.number, nil)
	d.log.Info("reloaded", "why", why, "generation", next.number, "changes", len(changes))
	known := old.cfg.Risks(time.Now())
	for _, risk := range next.cfg.Risks(time.Now()) {
		if !slices.Contains(known, risk) {
			d.log.Warn("risk", "what", risk)
		}
	}
}

// next is the generation after old, nil if nothing is different, and what differs.
func (d *daemon) next(old *generation) (*generation, []config.Change, error) {
	cfg, err := d.load()
	if err != nil {
		// It may lack no more than a file that it names, which can come.
		if text, e := os.ReadFile(d.file); e == nil {
			if named, e := config.Parse(d.file, text); e == nil {
				d.watch(old.cfg, named)
			}
		}
		return nil, nil, err
	}
	d.watch(old.cfg, cfg)
	changes := config.Changes(old.cfg, cfg)
	var fixed []string
	for _, c := range changes {
		if c.Restart {
			fixed = append(fixed, c.Path)
		}
	}
	if len(fixed) > 0 {
		return nil, nil, fmt.Errorf("%w: %s cannot change while the guard runs", errNeedsRestart, strings.Join(fixed, ", "))
	}
	if _, err := (storePlace{postgres: cfg.Store.Postgres, env: d.env}).describe(); err != nil {
		return nil, nil, err // the store itself keeps the URL that it has, and says nothing
	}
	files, err := hashFiles(cfg.Files())
	if err != nil {
		return nil, nil, err
	}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if was, ok := old.files[name]; ok && was != files[name] {
			changes = append(changes, config.Change{Path: name, Old: "its content", New: "other content"})
		}
	}
	if len(changes) == 0 {
		return nil, nil, nil
	}
	next, err := d.prepare(cfg, old)
	return next, changes, err
}

// logReloadError says why the configuration in use stays.
func (d *daemon) logReloadError(err error) {
	var bad *config.Error
	var f *failure
	switch {
	case errors.As(err, &bad):
		for _, p := range bad.Problems {
			d.log.Error("configuration is not taken", "file", p.File, "line", p.Line, "column", p.Column, "error", p.String(),
				"hint", "the one before stays in use, whole")
		}
	case errors.Is(err, errNeedsRestart):
		d.log.Error("configuration is not taken", "error", err.Error(), "hint", "restart the guard; until then the one before stays in use, whole")
	case errors.As(err, &f):
		d.log.Error("configuration is not taken", "error", err.Error(), "hint", f.hint)
	default:
		d.log.Error("configuration is not taken", "error", err.Error(), "hint", "the one before stays in use, whole")
	}
}

// problemOf is the first mistake with a place, for the metric.
func problemOf(err error) *telemetry.Place {
	var bad *config.Error
	if !errors.As(err, &bad) || len(bad.Problems) == 0 {
		return &telemetry.Place{}
	}
	p := bad.Problems[0]
	return &telemetry.Place{File: p.File, Line: p.Line, Column: p.Column}
}

// manageCertificates tells the ACME client which names are wanted now.
func (d *daemon) manageCertificates(g *generation) {
	if d.acme == nil {
		return
	}
	if err := d.acme.Manage(d.ctx, g.domains()); err != nil {
		d.log.Error("certificates", "error", err.Error())
	}
}
