package report

import (
	"cmp"
	_ "embed"
	"fmt"
	"html/template"
	"io"
	"strconv"
	"strings"
	"time"
)

//go:embed report.html
var page string

// WriteHTML writes r as one page that stands by itself: it runs no scripts and loads
// nothing.
func WriteHTML(w io.Writer, r *Report) error {
	t, err := template.New("report").Funcs(template.FuncMap{
		"clean": clean, "moment": moment, "title": title, "refusals": refusalCount,
		"count":   func(n any, noun string) string { return count(toInt64(n), noun) },
		"number":  func(n any) string { return number(toInt64(n)) },
		"counted": func(counts map[string]int64) string { return counted(counts, " ×", ", ") },
		"list":    func(all []string) string { return clean(strings.Join(all, ", ")) },
		"first":   func(all ...string) string { return clean(cmp.Or(all...)) },
		"by":      func() string { return string(cmp.Or(r.By, ByIntegration)) },
		"lag": func() string {
			if lag := time.Duration(r.LagSeconds * float64(time.Second)); lag > lagShown {
				return lag.Round(time.Second).String()
			}
			return ""
		},
		// share is a part of a bar, in percent.
		"share": func(part, whole int64) template.CSS {
			if whole == 0 {
				return "width:0"
			}
			return template.CSS(fmt.Sprintf("width:%s%%", strconv.FormatFloat(100*float64(part)/float64(whole), 'f', 2, 64)))
		},
		"told": func(g Group) bool { return g.Verdict != Ready || len(g.Causes) > 0 || g.Microsoft.tells() },
		"routes": func(all []Route) string {
			var names []string
			for _, route := range all {
				names = append(names, fmt.Sprintf("%s ×%d", route.Route, route.Calls))
			}
			return clean(strings.Join(names, ", "))
		},
		"caller": (*Direct).name,
	}).Parse(page)
	if err != nil {
		return fmt.Errorf("report: parse the page: %w", err)
	}
	return t.Execute(w, r)
}

func toInt64(n any) int64 {
	if i, ok := n.(int); ok {
		return int64(i)
	}
	return n.(int64)
}
