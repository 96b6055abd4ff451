//go:build tools

// Package containerd names the container runtime of the side-by-side benchmark, so that go.mod and go.sum hold all that it needs.
package containerd

import (
	_ "github.com/containerd/containerd/v2/cmd/containerd"
	_ "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2"
	_ "github.com/containerd/containerd/v2/cmd/ctr"
)
