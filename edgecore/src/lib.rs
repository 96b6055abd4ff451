//! EdgeCore: keeps a device's Pods running, with and without the cloud. `app` wires everything.

pub mod admin;
pub mod app;
pub mod cli;
pub mod config;
pub mod cri;
pub mod r#gen;
pub mod hub;
pub mod join;
pub mod node;
pub mod pods;
pub mod store;
pub mod stream;
