//! The device's Pod network: a CNI configuration where there is none.
