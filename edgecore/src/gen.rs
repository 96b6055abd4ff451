//! Generated code, checked in so that a build needs no generator; a test compares it with its source.

/// CRI v1 as `proto/cri.proto` has it.
#[expect(clippy::derive_partial_eq_without_eq, reason = "the generator's taste")]
#[rustfmt::skip]
pub mod cri;
