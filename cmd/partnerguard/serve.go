package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"
	"time"

	"github.com/KimMachineGun/automemlimit/memlimit"
	"github.com/partnerguard/partnerguard/internal/config"
	"github.com/partnerguard/partnerguard/policy"
	"github.com/partnerguard/partnerguard/telemetry"
	"github.com/spf13/cobra"
	"golang.org/x/term"
)

func newServe(e environment) *cobra.Command {
	c := &cobra.Command{
		Use:   "serve",
		Short: "Run the guard",
		Long: `Run the guard until it is told to stop (SIGTERM or an interrupt: calls in flight
finish; a second one stops at once). A changed configuration file is taken at once, or
on SIGHUP: whole, or with a clear error not at all.

Without a configuration file it audits: every call is forwarded and accounted for,
nothing is refused. Point a script's base URL at it and read the report.`,
		Example: `  partnerguard serve                                     audit on http://127.0.0.1:8080
  partnerguard serve -c /etc/partnerguard/guard.yaml
  partnerguard serve --mode enforce --tenant 1b2c3d4e-0a1b-4c2d-8e3f-901234567890`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return serve(c, e) },
	}
	configFlag(c)
	dataFlag(c)
	c.Flags().String("listen", "", "`ADDRESS` of the one listener, instead of those of the file (default 127.0.0.1:8080)")
	c.Flags().String("admin", "", "`ADDRESS` of the admin listener (default 127.0.0.1:9090)")
	c.Flags().String("instance", "", "`NAME` of this guard in records, metrics and a fleet's store (default: the host's name)")
	c.Flags().String("mode", "", "global mode: audit, tag or enforce (default audit)")
	c.Flags().StringSlice("tenant", nil, "partner tenant `GUID` whose tokens are accepted; may be repeated")
	c.RegisterFlagCompletionFunc("mode", cobra.FixedCompletions([]string{"audit", "tag", "enforce"}, cobra.ShellCompDirectiveNoFileComp))
	return c
}

func serve(c *cobra.Command, e environment) error {
	if _, err := configuration(c); err != nil {
		return err // before anything is touched
	}
	dir, err := directory(c, e)
	if err != nil {
		return err
	}
	tuneMemory(e.env, memlimit.FromCgroup)
	signal.Ignore(syscall.SIGPIPE) // the guard outlives whoever reads its log
	// From here to the end: unheard, a SIGHUP ends the process, and calls with it.
	hangUp := make(chan os.Signal, 1)
	signal.Notify(hangUp, syscall.SIGHUP)
	defer signal.Stop(hangUp)
	log := telemetry.NewCallLog(e.err, isTerminal(e.err))
	defer func() {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		log.Close(ctx)
	}()
	file, _ := c.Flags().GetString("config")
	load := func() (*config.Config, error) { return configuration(c) }
	d, err := start(c.Context(), daemonConfig{load: load, file: file, dir: dir, log: log, env: e.env, hangUp: hangUp})
	if err != nil {
		return err
	}
	d.announce(dir)
	err = d.wait(c.Context())
	d.log.Info("stopping", "drain", d.live.Load().cfg.Timeouts.Drain.String())
	return errors.Join(err, d.drain())
}

// announce says where the guard listens and what it does there.
func (d *daemon) announce(dir string) {
	g := d.live.Load()
	tenants := "any (audit only)"
	if t := g.policy.Tenants(); len(t) > 0 {
		tenants = strings.Join(t, " ")
	}
	for i, s := range d.servers {
		l := g.cfg.Listeners[i]
		d.log.Info("listening", "url", scheme(s.TLS())+"://"+s.Address().String(), "listener", l.Label(), "upstream", g.cfg.Upstreams[l.Upstream].URL)
	}
	d.log.Info("admin", "url", scheme(g.cfg.Admin.TLS != nil)+"://"+d.adminAt.Addr().String())
	d.log.Info("ready", "version", version(), "mode", g.policy.Mode().String(), "tenants", tenants, "data", dir)
	for _, risk := range g.cfg.Risks(time.Now()) {
		d.log.Warn("risk", "what", risk)
	}
}

func scheme(secure bool) string {
	if secure {
		return "https"
	}
	return "http"
}

// givenConfiguration is the configuration if there is a file, else nil.
func givenConfiguration(c *cobra.Command) (*config.Config, error) {
	if file, _ := c.Flags().GetString("config"); file == "" {
		return nil, nil
	}
	return configuration(c)
}

// configuration is the file's, or the default, changed by the flags.
func configuration(c *cobra.Command) (*config.Config, error) {
	cfg := config.Default()
	if file, _ := c.Flags().GetString("config"); file != "" {
		var err error
		if cfg, err = config.Load(file); err != nil {
			var bad *config.Error
			if errors.As(err, &bad) {
				return nil, err
			}
			return nil, usage(err, "-c names the configuration, a YAML file; without it partnerguard serve audits")
		}
	}
	if c.Flags().Lookup("listen") == nil {
		return cfg, nil
	}
	listen, _ := c.Flags().GetString("listen")
	admin, _ := c.Flags().GetString("admin")
	instance, _ := c.Flags().GetString("instance")
	mode, _ := c.Flags().GetString("mode")
	tenants, _ := c.Flags().GetStringSlice("tenant")
	if listen != "" {
		if len(cfg.Listeners) > 1 {
			return nil, usage(errors.New("--listen stands for one listener, and the configuration has several"), "change listeners in the file")
		}
		if len(cfg.Listeners) == 0 {
			cfg.Listeners = []config.Listener{{}}
		}
		cfg.Listeners[0].Address = listen
	}
	if admin != "" {
		cfg.Admin.Address = admin
	}
	if instance != "" {
		cfg.Instance = instance
	}
	if mode != "" {
		m, err := policy.ParseMode(mode)
		if err != nil {
			return nil, usage(fmt.Errorf("--mode: %w", err), "")
		}
		cfg.Mode = m
	}
	if len(tenants) > 0 {
		cfg.Tenants = tenants
	}
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	return cfg, nil
}

// tuneMemory collects garbage less often than Go's default, for 5 to 10 % less CPU
// at some 10 MiB more memory, and keeps within the memory of the container (container
// tells it, in bytes). What the user set stands.
func tuneMemory(env func(string) string, container memlimit.Provider) {
	if env("GOGC") == "" {
		debug.SetGCPercent(300)
	}
	if env("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(memoryLimit(container))
	}
}

// memoryLimit is how much Go's runtime should take, in bytes: what the container has,
// less 64 MiB (or half) for the program's own file and SQLite, and 1 GiB at most.
func memoryLimit(container memlimit.Provider) int64 {
	const most, beside = 1 << 30, 64 << 20
	has, err := container()
	if err != nil { // it has no limit, or none that can be read
		return most
	}
	return int64(min(most, has-min(beside, has/2)))
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}
