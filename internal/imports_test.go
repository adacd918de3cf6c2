// Package internal_test keeps the rooms of the house apart.
package internal_test

import (
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/partnerguard/partnerguard/"

// allowed says what of ours a room may import; a room that is not listed fails the
// test, so that a new one is thought about.
var allowed = map[string][]string{
	"policy":              {},
	"policy/entra":        {"policy"},
	"proxy":               {"policy"},
	"proxy/listen":        {},
	"telemetry":           {"policy", "proxy"},
	"telemetry/ledger":    {"policy", "proxy", "telemetry"},
	"telemetry/store":     {"policy", "proxy", "telemetry", "telemetry/ledger"},
	"telemetry/report":    {"policy", "proxy", "telemetry", "telemetry/store"},
	"telemetry/reconcile": {"policy", "proxy", "telemetry", "telemetry/store", "telemetry/report"},
	"internal/config":     {"policy"},
	"internal/emulator":   {},
	"internal/watch":      {},
	"internal/pgtest":     {},
	"internal/bench":      {"internal/emulator", "policy", "proxy", "telemetry/ledger", "telemetry/store", "telemetry/report"},
	"cmd/partnerguard":    nil, // everything
	"internal":            {},
}

func TestRoomsImportOnlyWhatTheyMay(t *testing.T) {
	out, err := exec.Command("go", "list", "-f", `{{.ImportPath}} {{join .Imports " "}}`, module+"...").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	for line := range strings.Lines(string(out)) {
		fields := strings.Fields(line)
		room := strings.TrimPrefix(fields[0], module)
		may, known := allowed[room]
		if !known {
			t.Errorf("room %s is not in the list of rooms; say what it may import", room)
			continue
		}
		if room == "cmd/partnerguard" {
			continue
		}
		for _, imported := range fields[1:] {
			ours, is := strings.CutPrefix(imported, module)
			if is && !slices.Contains(may, ours) {
				t.Errorf("%s imports %s; it may import of ours only %v", room, ours, may)
			}
			if room == "policy" && strings.Contains(strings.Split(imported, "/")[0], ".") {
				t.Errorf("policy imports %s; it may import the standard library only", imported)
			}
		}
	}
}
