//! CloudCore: runs beside the Kubernetes API and serves the edge nodes. `app` wires everything.

pub mod upstream;
