//go:build tools

// Package e2e names what the upstream end-to-end suite is built from, so that go.mod and go.sum hold all that it needs.
package e2e

import (
	_ "github.com/onsi/ginkgo/v2/ginkgo"
	_ "k8s.io/kubernetes/test/e2e"
	_ "k8s.io/kubernetes/test/images/agnhost"
)
