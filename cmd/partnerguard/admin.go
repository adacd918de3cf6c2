package main

import (
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/partnerguard/partnerguard/internal/config"
	"github.com/partnerguard/partnerguard/policy"
)

// adminHandler is the admin listener: health and metrics. Nothing of it answers on
// a listener that proxies.
func (d *daemon) adminHandler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", d.tel.MetricsHandler())
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) {
		io.WriteString(w, "ok\n")
	})
	mux.HandleFunc("GET /readyz", d.readyz)
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		io.WriteString(w, "partnerguard "+version()+"\n\n/readyz?verbose  what works and what does not\n/livez\n/metrics\n")
	})
	return mux
}

// readyz answers 503 only while starting or draining, or when every call would be
// refused. A degraded guard must not be taken out of a path that works.
func (d *daemon) readyz(w http.ResponseWriter, r *http.Request) {
	parts := d.health()
	why := ""
	switch phase := d.phase.Load(); {
	case phase == starting:
		why = "starting"
	case phase == draining:
		why = "draining"
	case !d.ledger.Status().Healthy && d.cfg.Ledger.OnFailure == config.RejectOnFailure:
		why = "every call is refused: the ledger cannot write and ledger.on_failure is reject"
	case d.policy.Mode() == policy.Enforce && !d.verifier.Ready():
		why = "every call is refused: the mode is enforce and there are no keys of Entra"
	}
	status := http.StatusOK
	if why != "" {
		status = http.StatusServiceUnavailable
	} else {
		why = "ready"
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.WriteHeader(status)
	fmt.Fprintln(w, why)
	if !r.URL.Query().Has("verbose") {
		return
	}
	for _, part := range slices.Sorted(maps.Keys(parts)) {
		state := "ok"
		if parts[part] != "" {
			state = "degraded: " + parts[part]
		}
		fmt.Fprintf(w, "%-10s %s\n", part, state)
	}
	fmt.Fprintf(w, "%-10s %s\n", "breaker", d.upstream.BreakerState())
	fmt.Fprintf(w, "%-10s %s\n", "store lag", d.store.Lag().Round(time.Millisecond))
}

// health looks at every part, sets its gauge, and says what is wrong with it;
// nothing is wrong with a part whose text is empty.
func (d *daemon) health() map[string]string {
	parts := map[string]string{"ledger": "", "store": "", "keys": ""}
	switch s := d.ledger.Status(); {
	case !s.Healthy:
		parts["ledger"] = fmt.Sprintf("it cannot write: %v", s.Err)
	case len(s.SetAside) > 0:
		parts["ledger"] = "damaged segments were set aside: " + strings.Join(s.SetAside, ", ")
	case s.Degraded:
		parts["ledger"] = fmt.Sprintf("the last sync failed: %v", s.SyncErr)
	}
	if s := d.store.Status(); s.Err != nil {
		parts["store"] = s.Err.Error()
	}
	now := time.Now()
	for _, k := range d.verifier.Status() {
		if k.LastError != nil || !k.Usable {
			parts["keys"] = fmt.Sprintf("tenant %s, version %s: %d keys, last fetch: %v", k.Tenant, k.Version, k.Keys, k.LastError)
		}
		if !k.FetchedAt.IsZero() {
			d.tel.KeyAge(k.Tenant, k.Version, now.Sub(k.FetchedAt).Seconds())
		}
	}
	d.tel.StoreLag(d.store.Lag().Seconds())
	for part, wrong := range parts {
		d.tel.Degraded(part, wrong != "")
	}
	return parts
}
