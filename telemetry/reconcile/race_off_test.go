//go:build !race

package reconcile

// longRows is how many rows of an export are always read.
const longRows = 100_000
