//! What a kubelet and a container runtime do for a node, in one program without images: a pod's processes really run, in
//! namespaces of their own on this machine's files, as the pod's spec has it.
//!
//! [`plan`] says what a spec means, without doing anything (with [`images`], [`env`], [`status`] and [`probe`]'s streaks);
//! [`node`] owns a node and has one task a pod ([`pod`]), which has one a container ([`container`]); [`network`],
//! [`volumes`] and [`launch`] are how it is done. Processes end with the node's program, whatever ends that.
//!
//! Not there: images' own files (a container sees this machine's programs, with private `/etc`, `/var`, `/tmp`, `/run`),
//! limits of resources, seccomp, gRPC probes, ephemeral containers. Back-off is shorter than a kubelet's.

pub mod balancers;
pub mod container;
pub mod enter;
pub mod env;
pub mod images;
pub mod launch;
pub mod network;
pub mod node;
pub mod plan;
pub mod pod;
pub mod privileges;
pub mod probe;
pub mod root;
pub mod sources;
pub mod status;
pub mod volumes;

use k8s_openapi::jiff::Timestamp;

/// Now, as the API writes it.
pub fn timestamp() -> String {
    let now = Timestamp::new(tombolo_runtime::clock::unix_seconds().cast_signed(), 0).unwrap_or_default();
    now.to_string()
}
