package config

import (
	"path/filepath"
	"strings"
	"testing"
)

func TestSecretsAreReadFromFilesAndTheEnvironment(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "token", []byte("  s3cret\r\n"))
	write(t, dir, "empty", nil)
	write(t, dir, "lines", []byte("s3cret\ns3cret\n"))
	write(t, dir, "large", []byte(strings.Repeat("s3cret", maxSecret)))
	env := func(name string) string { return map[string]string{"TOKEN": "s3cret ", "BLANK": " "}[name] }
	for _, tt := range []struct {
		secret Secret
		want   string // empty for an error
	}{
		{Secret("file:" + filepath.Join(dir, "token")), "s3cret"},
		{"env:TOKEN", "s3cret"},
		{"env:BLANK", ""},
		{"env:UNSET", ""},
		{"env:", ""},
		{"file:", ""},
		{"s3cret", ""},
		{Secret("file:" + filepath.Join(dir, "empty")), ""},
		{Secret("file:" + filepath.Join(dir, "lines")), ""},
		{Secret("file:" + filepath.Join(dir, "large")), ""},
		{Secret("file:" + filepath.Join(dir, "none")), ""},
		{Secret("file:" + dir), ""},
	} {
		got, err := tt.secret.Read(env)
		if got != tt.want || (err == nil) != (tt.want != "") {
			t.Errorf("Secret(%q).Read = %q, %v, want %q", tt.secret, got, err, tt.want)
		}
		if err != nil && strings.Contains(err.Error(), "s3cret") {
			t.Errorf("the error holds the secret: %v", err)
		}
	}
	if got, err := Secret("").Read(env); got != "" || err != nil {
		t.Errorf("the empty Secret reads as %q, %v", got, err)
	}
}

func TestALiteralSecretIsNotRepeated(t *testing.T) {
	for _, value := range []string{
		"hunter2hunter2", "'hunter2 x'", "env:hunter2-x", "env:hunter2 x", "File:hunter2", "file hunter2", "[hunter2]", "{hunter2: 1}", "\"hunter2", "hunter2: x", "&hunter2 x", "&x hunter2", "!hunter2 x", "*hunter2", "|\n      hunter2", ">\n      hunter2",
	} {
		for _, key := range []string{"admin:\n  token: ", "acme:\n  eab:\n    key_id: x\n    mac_key: "} {
			_, err := Parse("guard.yaml", []byte("version: 1\n"+key+value+"\n"))
			if err == nil || strings.Contains(err.Error(), "hunter2") {
				t.Errorf("%s%s: Parse = %v", key, value, err)
			}
		}
	}
}
