//! Generated code, checked in so that a build needs no generator; a test compares it with its source.

/// CRI v1 as `proto/cri.proto` has it.
#[expect(
    clippy::large_enum_variant,
    clippy::derive_partial_eq_without_eq,
    clippy::doc_lazy_continuation,
    reason = "the generator's taste"
)]
pub mod cri;
