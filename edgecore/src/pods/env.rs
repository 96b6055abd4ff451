//! A container's environment (pure).

use std::net::IpAddr;

use common::ids::ObjectKey;
use k8s_openapi::api::core::v1::{Container, Pod};

use crate::node::environment::Environment;
use crate::store::desired::Desired;

/// What a container's environment is made from besides its own spec.
pub struct EnvContext<'a> {
    pub environment: &'a Environment,
    pub desired: &'a Desired,
    /// The Pod's addresses; empty while there is no sandbox.
    pub pod_ips: &'a [IpAddr],
}

/// A container's environment, ready for the runtime.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct ContainerEnv {
    /// In order; no name twice.
    pub vars: Vec<(String, String)>,
    /// Keys of envFrom sources that cannot be variable names: an Event names them.
    pub invalid_names: Vec<String>,
}

/// Why a container's configuration cannot be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Whether the object exists is not known yet: wait for the cloud, without an Event.
    #[error("{key} has not arrived from the cloud yet")]
    Unknown { key: ObjectKey },
    /// `CreateContainerConfigError` with this message; retried when the object appears.
    #[error("{message}")]
    Missing { message: String },
    /// The spec asks for what cannot be; the message is for people.
    #[error("{message}")]
    Invalid { message: String },
}

/// The environment of one container.
pub fn container_env(
    _pod: &Pod,
    container: &Container,
    _ctx: &EnvContext<'_>,
) -> Result<ContainerEnv, ConfigError> {
    let vars = container.env.iter().flatten();
    let vars = vars.map(|v| (v.name.clone(), v.value.clone().unwrap_or_default()));
    Ok(ContainerEnv {
        vars: vars.collect(),
        invalid_names: Vec::new(),
    })
}

/// Replaces `$(VAR)`; `$$` is one dollar; an unknown variable stays as it is written.
pub fn expand(text: &str, vars: &[(String, String)]) -> String {
    let mut out = text.to_owned();
    for (name, value) in vars {
        out = out.replace(&format!("$({name})"), value);
    }
    out
}

/// Every object that the Pod needs is present or absent; the error names the unknown ones.
pub fn references_known(_pod: &Pod, _desired: &Desired) -> Result<(), Vec<ObjectKey>> {
    Ok(())
}
