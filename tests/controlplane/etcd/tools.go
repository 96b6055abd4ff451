//go:build tools

// Package etcd names the store of the test control plane, so that go.mod and go.sum hold all that it needs.
package etcd

import (
	_ "go.etcd.io/etcd/server/v3"
)
