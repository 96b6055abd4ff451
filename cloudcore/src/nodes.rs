//! The Node objects of enrolled devices: CloudCore makes them, keeps them, lets them go.
//!
//! - Owns: that the Node of each enrolled device exists, whole, and that no other does.
//! - Takes: the enrolment records (what it is made with), one watch of the edge Nodes' metadata.
//! - Gives: a Node to every enrolled device; to the claims, which UID it has.
//! - Never: touches a Node that it did not make; acts on an empty or unfinished list.
//!
//! ```text
//!            enrolled                          enrolment ended
//!   absent ──────────► made            alive ───────────────► deleted
//!   deleted by somebody ─► content kept in the record ─► released ─► made again
//! ```

pub mod birth;
pub mod claim;
pub mod event;
pub mod keeper;
pub mod tolerations;

use k8s_openapi::api::core::v1::Node;
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client, ResourceExt};
use serde_json::json;

use common::ids::NodeName;
use common::pki::ClusterId;

use crate::enroll::record::EnrolmentSpec;
use crate::kube::{FIELD_MANAGER, KubeError, is_absent, is_conflict};

/// The Node of that name, if there is one, as the API server has it now.
pub async fn find(client: &Client, name: &NodeName) -> Result<Option<Node>, KubeError> {
    Api::<Node>::all(client.clone())
        .get_opt(name.as_str())
        .await
        .map_err(KubeError::api(format!("reading Node {name}")))
}

/// Makes the Node if there is none. True when it was made.
pub async fn ensure(
    client: &Client,
    name: &NodeName,
    record: &EnrolmentSpec,
    cluster: &ClusterId,
) -> Result<bool, KubeError> {
    let nodes: Api<Node> = Api::all(client.clone());
    let params = PostParams {
        field_manager: Some(FIELD_MANAGER.into()),
        ..PostParams::default()
    };
    match nodes
        .create(&params, &birth::node(name, record, cluster))
        .await
    {
        Ok(_) => Ok(true),
        Err(e) if is_conflict(&e) => Ok(false),
        Err(e) => Err(KubeError::api(format!("making Node {name}"))(e)),
    }
}

/// Whether the Node waits for CloudCore before it goes.
pub fn carries_finalizer(node: &Node) -> bool {
    node.finalizers().iter().any(|f| f == birth::FINALIZER)
}

/// Takes CloudCore's finalizer from a Node, so that its deletion ends.
pub async fn release(client: &Client, name: &NodeName) -> Result<(), KubeError> {
    loop {
        let Some(node) = find(client, name).await? else {
            return Ok(());
        };
        if !carries_finalizer(&node) {
            return Ok(());
        }
        let left: Vec<_> = node
            .finalizers()
            .iter()
            .filter(|f| *f != birth::FINALIZER)
            .collect();
        let patch = json!({"metadata": {
            "finalizers": left,
            "uid": node.metadata.uid,
            "resourceVersion": node.metadata.resource_version,
        }});
        let nodes: Api<Node> = Api::all(client.clone());
        match nodes
            .patch(
                name.as_str(),
                &PatchParams::default(),
                &Patch::Merge(&patch),
            )
            .await
        {
            Ok(_) => return Ok(()),
            Err(e) if is_absent(&e) => return Ok(()),
            Err(e) if is_conflict(&e) => {}
            Err(e) => return Err(KubeError::api(format!("releasing Node {name}"))(e)),
        }
    }
}
