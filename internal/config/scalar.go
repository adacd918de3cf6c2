package config

import (
	"fmt"
	"net/netip"
	"reflect"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/partnerguard/partnerguard/policy"
)

const day = 24 * time.Hour

// scalar reads the text of one value into its place.
type scalar struct {
	hint string // what to write
	// set stores text, or returns what is wrong with it and what to write.
	// quoted tells "25" from 25.
	set func(text string, quoted bool) (problem, hint string)
}

// newScalar returns how text is read into dst; ok is false when dst's type is
// not that of a single value.
func newScalar(dst reflect.Value) (s scalar, ok bool) {
	switch dst := dst.Addr().Interface().(type) {
	case *bool:
		return boolean(dst), true
	case **int:
		var n int
		s := whole(&n)
		set := s.set
		s.set = func(text string, quoted bool) (string, string) {
			problem, hint := set(text, quoted)
			if problem == "" {
				*dst = &n
			}
			return problem, hint
		}
		return s, true
	case *int:
		return whole(dst), true
	case *time.Duration:
		return parsed(dst, ParseDuration, "duration", "write a number with a unit, such as 30s, 5m or 7d"), true
	case *FSync:
		return parsed(dst, parseFSync, "period", "write always or a duration above zero, such as 1s"), true
	case *Size:
		return parsed(dst, parseSize, "size", "write a whole number with a unit, such as 500MB or 1GiB"), true
	case *time.Time:
		return parsed(dst, parseTime, "time", "write it as 2026-12-01T00:00:00Z, or as the date 2026-12-01"), true
	case *netip.Prefix:
		return parsed(dst, parsePrefix, "network", "write an address, or the first one of a network with its length: 10.1.2.3, 10.1.0.0/16"), true
	case *Secret:
		return scalar{hint: "write file:PATH or env:NAME", set: func(text string, _ bool) (string, string) {
			*dst = Secret(text)
			return "", ""
		}}, true
	case *policy.Mode:
		return parsed(dst, policy.ParseMode, "mode", "write audit, tag or enforce"), true
	case *policy.OnUnverifiable:
		return parsed(dst, policy.ParseOnUnverifiable, "choice", "write as_mode, forward or reject"), true
	}
	if dst.Kind() == reflect.String {
		return scalar{hint: "write one text", set: func(text string, _ bool) (string, string) {
			dst.SetString(text)
			return "", ""
		}}, true
	}
	return scalar{}, false
}

// parsed reads dst by parse; what says what it is in messages.
func parsed[T any](dst *T, parse func(string) (T, error), what, hint string) scalar {
	return scalar{hint: hint, set: func(text string, _ bool) (string, string) {
		v, err := parse(text)
		if err != nil {
			return fmt.Sprintf("%q is not a %s", text, what), hint
		}
		*dst = v
		return "", ""
	}}
}

func boolean(dst *bool) scalar {
	const hint = "write true or false"
	return scalar{hint: hint, set: func(text string, quoted bool) (string, string) {
		switch {
		case quoted:
			return fmt.Sprintf("%q is a text", text), hint + ", without quotes"
		case strings.EqualFold(text, "true"):
			*dst = true
		case strings.EqualFold(text, "false"):
			*dst = false
		default: // off, on, yes, no: booleans to some YAML readers, words to others
			return fmt.Sprintf("%q is not a boolean", text), hint
		}
		return "", ""
	}}
}

// YAML 1.1 reads 010 as 8 and 1.2 as 10: neither is a number here.
var wholeSyntax = regexp.MustCompile(`^-?(0|[1-9][0-9]*)$`)

func whole(dst *int) scalar {
	const hint = "write a whole number"
	return scalar{hint: hint, set: func(text string, quoted bool) (string, string) {
		n, err := strconv.Atoi(text)
		if quoted && err == nil {
			return fmt.Sprintf("%q is a text", text), hint + ", without quotes"
		}
		if err != nil || !wholeSyntax.MatchString(text) {
			return fmt.Sprintf("%q is not a whole number", text), "write digits only, such as 25"
		}
		*dst = n
		return "", ""
	}}
}

// ParseDuration reads a Go duration that may begin with days: 30d, 1d12h, 90s.
func ParseDuration(s string) (time.Duration, error) {
	bad := fmt.Errorf("%q is not a duration", s)
	unsigned, negative := strings.CutPrefix(s, "-")
	var total time.Duration
	rest := unsigned
	if days, after, ok := strings.Cut(unsigned, "d"); ok {
		n, err := strconv.ParseUint(days, 10, 16) // 16 bits of days fit a Duration
		if err != nil {
			return 0, bad
		}
		total, rest = time.Duration(n)*day, after
	}
	if rest != "" || unsigned == "" {
		if strings.HasPrefix(rest, "-") || strings.HasPrefix(rest, "+") {
			return 0, bad
		}
		d, err := time.ParseDuration(rest)
		if err != nil || total+d < total {
			return 0, bad
		}
		total += d
	}
	if negative {
		total = -total
	}
	return total, nil
}

func parseFSync(s string) (FSync, error) {
	if s == "always" {
		return FSyncAlways, nil
	}
	d, err := ParseDuration(s)
	if err == nil && d <= 0 {
		err = fmt.Errorf("%q is not above zero", s)
	}
	return FSync(d), err
}

var sizeUnits = map[string]int64{
	"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30,
}

func parseSize(s string) (Size, error) {
	if s == "0" {
		return 0, nil
	}
	i := strings.IndexFunc(s, func(r rune) bool { return r < '0' || r > '9' })
	if i <= 0 {
		return 0, fmt.Errorf("%q is not a number with a unit", s)
	}
	n, err := strconv.ParseInt(s[:i], 10, 64)
	unit := sizeUnits[strings.TrimLeft(s[i:], " ")]
	if err != nil || unit == 0 || n > (1<<62)/unit {
		return 0, fmt.Errorf("%q is not a size", s)
	}
	return Size(n * unit), nil
}

func parseTime(s string) (time.Time, error) {
	if t, err := time.Parse(time.DateOnly, s); err == nil {
		return t, nil
	}
	return time.Parse(time.RFC3339, s)
}

// parsePrefix reads a CIDR or a single address. Bits beyond the length are a
// slip of the pen and refused.
func parsePrefix(s string) (netip.Prefix, error) {
	if a, err := netip.ParseAddr(s); err == nil && a.Zone() == "" {
		a = a.Unmap()
		return netip.PrefixFrom(a, a.BitLen()), nil
	}
	p, err := netip.ParsePrefix(s)
	if err == nil && (p != p.Masked() || p.Addr().Is4In6()) {
		err = fmt.Errorf("%q has bits beyond its length", s)
	}
	return p, err
}
