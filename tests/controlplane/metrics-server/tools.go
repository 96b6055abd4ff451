//go:build tools

// Package metricsserver names what serves `kubectl top`, so that go.mod and go.sum hold all that it needs.
package metricsserver

import (
	_ "sigs.k8s.io/metrics-server/cmd/metrics-server"
)
