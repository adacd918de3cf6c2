package emulator

import (
	"bytes"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"
	"github.com/google/go-cmp/cmp"
)

func TestRecipeWorksInAShell(t *testing.T) {
	for _, tool := range []string{"sh", "curl", "sed"} {
		if _, err := exec.LookPath(tool); err != nil {
			if os.Getenv("CI") != "" {
				t.Fatalf("%s is not installed", tool)
			}
			t.Skipf("%s is not installed", tool)
		}
	}
	e := start(t, Config{})
	var recipe bytes.Buffer
	if err := e.Recipe(&recipe); err != nil {
		t.Fatal(err)
	}
	// After each sample's commands, call the API and print the status.
	var script strings.Builder
	script.WriteString("unset http_proxy https_proxy all_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY\n")
	samples, _, _ := strings.Cut(recipe.String(), "\n# a new sign-in")
	for block := range strings.SplitSeq(samples, "\n\n") {
		script.WriteString(block + "\n")
		if name, ok := strings.CutPrefix(block, "# "); ok {
			name, _, _ = strings.Cut(name, ":")
			script.WriteString(`curl -sS -o /dev/null -w "` + name + ` %{http_code}\n" $API/v1/customers -H "Authorization: Bearer $TOKEN"` + "\n")
		}
	}
	out, err := exec.CommandContext(t.Context(), "sh", "-eu", "-c", script.String()).CombinedOutput()
	if err != nil {
		t.Fatalf("recipe: %v\n%s", err, out)
	}
	got := map[string]string{}
	for line := range strings.Lines(string(out)) {
		name, status, _ := strings.Cut(strings.TrimSpace(line), " ")
		got[name] = status
	}
	want := map[string]string{}
	for _, app := range e.Apps() {
		want[app.Name] = "200"
	}
	want[AppExpired], want[AppWrongAud] = "401", "401"
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("statuses (-want +got):\n%s", diff)
	}
}

func TestFurtherUpstreamsAreThereIfNamed(t *testing.T) {
	config := ConfigYAML("http://entra", "http://partner",
		Upstream{Name: PartnerAPI, URL: "http://partner-api", Hosts: []string{"a.example", "b.example"}, RewriteLinks: true},
		Upstream{Name: Graph, URL: "http://graph"})
	var cfg struct {
		Upstreams map[string]struct {
			URL          string
			Hosts        []string
			RewriteLinks bool `yaml:"rewrite_links"`
		}
	}
	if err := yaml.Unmarshal([]byte(config), &cfg); err != nil {
		t.Fatalf("%v in\n%s", err, config)
	}
	api := cfg.Upstreams[PartnerAPI]
	if len(cfg.Upstreams) != 3 || api.URL != "http://partner-api" || strings.Join(api.Hosts, " ") != "a.example b.example" || !api.RewriteLinks ||
		cfg.Upstreams[Graph].URL != "http://graph" || cfg.Upstreams[Graph].RewriteLinks {
		t.Errorf("upstreams = %+v", cfg.Upstreams)
	}

	var plain, more bytes.Buffer
	e := start(t, Config{})
	e.cfg.PublicPartnerURL = e.PartnerURL()
	if err := e.Recipe(&plain); err != nil {
		t.Fatal(err)
	}
	e.cfg.PublicPartnerAPIURL, e.cfg.PublicGraphURL = e.PartnerAPIURL(), e.GraphURL()
	if err := e.Recipe(&more); err != nil {
		t.Fatal(err)
	}
	added, ok := strings.CutPrefix(more.String(), plain.String())
	if !ok || !strings.Contains(added, "PARTNER_API="+e.PartnerAPIURL()) || !strings.Contains(added, "GRAPH="+e.GraphURL()) {
		t.Fatalf("recipe gained\n%s", added)
	}
	if _, err := exec.LookPath("curl"); err != nil {
		t.Skip("curl is not installed")
	}
	out, err := exec.CommandContext(t.Context(), "sh", "-eu", "-c", "unset http_proxy HTTP_PROXY all_proxy ALL_PROXY\nENTRA="+e.EntraURL()+"\n"+added).CombinedOutput()
	if err != nil || strings.Count(string(out), "HTTP/1.1 200 OK") != 2 {
		t.Errorf("recipe: %v\n%.2000s", err, out)
	}
}

func TestConfigYAMLNamesEverySample(t *testing.T) {
	e := start(t, Config{})
	var cfg struct {
		Version      int
		Tenants      []string
		Mode         string
		Integrations []struct {
			Name, Owner string
			Match       struct {
				AppID []string `yaml:"app_id"`
			}
		}
		Entra     struct{ Authority string }
		Upstreams map[string]struct{ URL string }
	}
	if err := yaml.UnmarshalWithOptions([]byte(ConfigYAML(e.EntraURL(), e.PartnerURL())), &cfg, yaml.Strict()); err != nil {
		t.Fatalf("%v in\n%s", err, ConfigYAML(e.EntraURL(), e.PartnerURL()))
	}
	if cfg.Version != 1 || cfg.Entra.Authority != e.EntraURL() || cfg.Upstreams["partner-center"].URL != e.PartnerURL() {
		t.Errorf("configuration = %+v", cfg)
	}
	if diff := cmp.Diff([]string{DefaultTenant}, cfg.Tenants); diff != "" {
		t.Errorf("tenants (-want +got):\n%s", diff)
	}
	ids := map[string]string{}
	for _, i := range cfg.Integrations {
		ids[i.Name] = strings.Join(i.Match.AppID, " ")
		if !strings.HasSuffix(i.Owner, "@contoso.example") {
			t.Errorf("%s: owner %q", i.Name, i.Owner)
		}
	}
	want := map[string]string{}
	for _, app := range e.Apps() {
		if app.Name != AppFirstParty {
			want[app.Name] = app.ID
		}
	}
	if diff := cmp.Diff(want, ids); diff != "" {
		t.Errorf("integrations (-want +got):\n%s", diff)
	}
}
