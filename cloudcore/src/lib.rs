//! The cloud side as a library: `main` is a thin shell around it, and tests reach its parts.

pub mod downstream;
