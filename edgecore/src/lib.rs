//! EdgeCore: keeps a device's Pods running, with and without the cloud. `app` wires everything.

pub mod cri;
pub mod r#gen;
pub mod node;
pub mod pods;
pub mod store;
