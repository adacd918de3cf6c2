package config

import (
	"cmp"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/partnerguard/partnerguard/policy"
)

// Change is one difference between two configurations.
type Change struct {
	// Path is the key. Items of lists stand by name, not by number:
	// integrations[nightly-billing].mode.
	Path string

	// Old and New are the values in short, or those that only one list has. Old is
	// empty for what was added, New for what was removed.
	Old, New string

	// Restart reports that a running guard cannot make the change.
	Restart bool
}

// String gives path: old → new, or what was added or removed.
func (c Change) String() string {
	switch {
	case c.Old == "":
		return c.Path + ": added " + c.New
	case c.New == "":
		return c.Path + ": removed " + c.Old
	}
	return c.Path + ": " + c.Old + " → " + c.New
}

// Changes returns what differs between old and new, in the order of Config's
// fields. Both must be valid. Lists of values are compared as sets; of the lists
// of items, integrations and rules also by order, which decides there. What stands
// in the files that they name is not compared.
func Changes(old, new *Config) []Change {
	var d differ
	d.structure("", reflect.ValueOf(old).Elem(), reflect.ValueOf(new).Elem(), false)
	return d.changes
}

// differ walks two configurations side by side by their types and tags, so that a
// new key needs nothing here. The tag restart is "any" where no change can be
// made live, that of anything below included, and "presence" where only adding or
// removing an item or section cannot.
type differ struct{ changes []Change }

func (d *differ) add(path, old, new string, restart bool) {
	d.changes = append(d.changes, Change{Path: path, Old: old, New: new, Restart: restart})
}

func (d *differ) structure(path string, a, b reflect.Value, restart bool) {
	for i := range a.NumField() {
		field := a.Type().Field(i)
		key := field.Tag.Get("yaml")
		if path != "" {
			key = path + "." + key
		}
		tag := field.Tag.Get("restart")
		d.value(key, a.Field(i), b.Field(i), restart || tag == "any", tag == "presence")
	}
}

// value compares a and b, the values of the key at path. presence says that they
// cannot come or go without a restart.
func (d *differ) value(path string, a, b reflect.Value, restart, presence bool) {
	if old, ok := scalarString(a); ok {
		if new, _ := scalarString(b); old != new {
			old, new = excerpts(old, new)
			d.add(path, old, new, restart)
		}
		return
	}
	switch a.Kind() {
	case reflect.Struct:
		d.structure(path, a, b, restart)
	case reflect.Pointer:
		switch {
		case a.IsNil() && b.IsNil():
		case a.IsNil():
			d.add(path, "", summary(b.Elem()), restart || presence)
		case b.IsNil():
			d.add(path, summary(a.Elem()), "", restart || presence)
		default:
			d.value(path, a.Elem(), b.Elem(), restart, false)
		}
	case reflect.Map:
		d.items(path, mapItems(a), mapItems(b), restart, presence)
	case reflect.Slice:
		if _, scalars := newScalar(reflect.New(a.Type().Elem()).Elem()); scalars {
			if old, ok := a.Interface().(Command); ok {
				d.command(path, old, b.Interface().(Command), restart)
				return
			}
			d.set(path, a, b, restart)
			return
		}
		before, after := listItems(path, a), listItems(path, b)
		d.items(path, before, after, restart, presence)
		if _, listeners := a.Interface().([]Listener); !listeners { // these are all served
			d.order(path, before, after, restart)
		}
	}
}

// set compares two lists of values whose order means nothing.
func (d *differ) set(path string, a, b reflect.Value, restart bool) {
	old, new := scalarStrings(a), scalarStrings(b)
	gone := slices.DeleteFunc(slices.Clone(old), func(s string) bool { return slices.Contains(new, s) })
	came := slices.DeleteFunc(slices.Clone(new), func(s string) bool { return slices.Contains(old, s) })
	if len(gone)+len(came) > 0 {
		d.add(path, short(strings.Join(gone, ", ")), short(strings.Join(came, ", ")), restart)
	}
}

// command compares commands, whose order counts. Arguments may be secrets and are not
// shown.
func (d *differ) command(path string, old, new Command, restart bool) {
	if !slices.Equal(old, new) {
		d.add(path, old.String(), new.String(), restart)
	}
}

// item is a part of the configuration that has a name.
type item struct {
	name, path string
	value      reflect.Value
}

// listItems are the items of the list at path, by label if they have one and else
// by name.
func listItems(path string, list reflect.Value) []item {
	var items []item
	count := map[string]int{}
	for i := range list.Len() {
		v := list.Index(i)
		name := v.FieldByName("Name").String()
		if l, ok := v.Interface().(interface{ Label() string }); ok {
			name = l.Label()
		}
		// Listeners on a free port may share their label.
		if count[name]++; count[name] > 1 {
			name += " " + strconv.Itoa(count[name])
		}
		items = append(items, item{name, path + "[" + printable(name) + "]", v})
	}
	return items
}

func mapItems(m reflect.Value) []item {
	var items []item
	for _, key := range slices.SortedFunc(slices.Values(m.MapKeys()), func(a, b reflect.Value) int { return cmp.Compare(a.String(), b.String()) }) {
		items = append(items, item{key.String(), "", m.MapIndex(key)})
	}
	return items
}

// items compares two lists of items, first those of old.
func (d *differ) items(path string, old, new []item, restart, presence bool) {
	find := func(items []item, name string) (item, bool) {
		i := slices.IndexFunc(items, func(it item) bool { return it.name == name })
		if i < 0 {
			return item{}, false
		}
		return items[i], true
	}
	for _, a := range old {
		at := cmp.Or(a.path, join(path, a.name))
		if b, ok := find(new, a.name); ok {
			d.value(at, a.value, b.value, restart, false)
		} else {
			d.add(at, summary(a.value), "", restart || presence)
		}
	}
	for _, b := range new {
		if _, ok := find(old, b.name); !ok {
			d.add(cmp.Or(b.path, join(path, b.name)), "", summary(b.value), restart || presence)
		}
	}
}

// order compares the order of those items that old and new both have.
func (d *differ) order(path string, old, new []item, restart bool) {
	common := func(items, others []item) []string {
		var names []string
		for _, it := range items {
			if slices.ContainsFunc(others, func(other item) bool { return other.name == it.name }) {
				names = append(names, printable(it.name))
			}
		}
		return names
	}
	before, after := common(old, new), common(new, old)
	for len(before) > 0 && before[0] == after[0] {
		before, after = before[1:], after[1:]
	}
	for n := len(before) - 1; n >= 0 && before[n] == after[n]; n-- {
		before, after = before[:n], after[:n]
	}
	if len(before) > 0 {
		d.add(path, "in order "+short(strings.Join(before, ", ")), "in order "+short(strings.Join(after, ", ")), restart)
	}
}

// summary gives v, an item or a section, on one line as in a file, less what is
// not set.
func summary(v reflect.Value) string { return short(flow(v)) }

func flow(v reflect.Value) string {
	if s, ok := scalarString(v); ok {
		return s
	}
	switch v.Kind() {
	case reflect.Pointer:
		return flow(v.Elem())
	case reflect.Slice:
		return "[" + strings.Join(scalarStrings(v), ", ") + "]"
	case reflect.Struct:
		var parts []string
		for i := range v.NumField() {
			if f := v.Field(i); !f.IsZero() {
				if s := flow(f); s != "[]" && s != "{}" {
					parts = append(parts, v.Type().Field(i).Tag.Get("yaml")+": "+s)
				}
			}
		}
		return "{" + strings.Join(parts, ", ") + "}"
	}
	return v.Kind().String()
}

func scalarStrings(list reflect.Value) []string {
	var all []string
	for i := range list.Len() {
		s, _ := scalarString(list.Index(i))
		all = append(all, s)
	}
	return all
}

// scalarString gives a single value as it stands in a file; ok is false when v is
// none. Values that mean the same give the same text, others never do.
func scalarString(v reflect.Value) (text string, ok bool) {
	switch x := v.Interface().(type) {
	case bool:
		return strconv.FormatBool(x), true
	case int:
		return strconv.Itoa(x), true
	case *int:
		if x == nil {
			return "unset", true
		}
		return strconv.Itoa(*x), true
	case time.Duration:
		return formatDuration(x), true
	case FSync, Size, policy.OnUnverifiable, netip.Prefix:
		return fmt.Sprint(x), true
	case policy.Mode:
		return cmp.Or(x.String(), "as the rest"), true
	case time.Time:
		if x.IsZero() {
			return "unset", true
		}
		return x.UTC().Format(time.RFC3339Nano), true
	}
	if v.Kind() == reflect.String {
		return printable(v.String()), true
	}
	return "", false
}

// printable quotes s where it is empty or would not stand out as one text.
func printable(s string) string {
	odd := func(r rune) bool { return !unicode.IsPrint(r) || r == '"' || r == ',' }
	if s == "" || strings.TrimSpace(s) != s || strings.ContainsFunc(s, odd) {
		return strconv.Quote(s)
	}
	return s
}

// most is how many characters of a value are shown.
const most = 100

// short cuts s where it would fill a line.
func short(s string) string {
	if utf8.RuneCountInString(s) <= most {
		return s
	}
	return string([]rune(s)[:most]) + "…"
}

// excerpts shortens a and b so that their first difference can still be seen.
func excerpts(a, b string) (string, string) {
	x, y := []rune(a), []rune(b)
	if max(len(x), len(y)) <= most {
		return a, b
	}
	same := 0
	for same < min(len(x), len(y)) && x[same] == y[same] {
		same++
	}
	if from := same - most/2; from > 0 {
		return short("…" + string(x[from:])), short("…" + string(y[from:]))
	}
	return short(a), short(b)
}

// formatDuration writes d as ParseDuration reads it.
func formatDuration(d time.Duration) string {
	if d > 0 && d%day == 0 {
		return strconv.FormatInt(int64(d/day), 10) + "d"
	}
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

// String gives f as it stands in a file.
func (f FSync) String() string {
	if f == FSyncAlways {
		return "always"
	}
	return formatDuration(time.Duration(f))
}

// String gives s as it stands in a file, in the largest unit that fits.
func (s Size) String() string {
	best, unit := int64(0), "B"
	for name, n := range sizeUnits {
		if n > best && s != 0 && int64(s)%n == 0 {
			best, unit = n, name
		}
	}
	if s == 0 {
		return "0"
	}
	return strconv.FormatInt(int64(s)/best, 10) + unit
}
