//go:build race

package reconcile

// longRows is as much as the race detector reads in a few seconds.
const longRows = 20_000
