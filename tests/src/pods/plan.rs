//! What a pod's spec means: its containers in order with command line, environment, mounts, probes and privileges. Pure;
//! what is not done here is refused with the reason, so that nothing looks as if it worked.

use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, Lifecycle, LifecycleHandler, Pod, PodSpec};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::env::{self, Source};
use super::images::{self, Program};
use super::privileges::Privileges;
use super::probe::{Action, Probe};
use super::sources::{self, Content};

/// Why a pod or one of its containers can not run here, as its status says it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}: {message}")]
pub struct Refusal {
    pub reason: &'static str,
    pub message: String,
}

impl Refusal {
    pub fn config(message: String) -> Self {
        Self { reason: "CreateContainerConfigError", message }
    }
}

/// When a container that has ended runs again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Restart {
    Always,
    OnFailure,
    Never,
}

impl Restart {
    pub fn after(self, code: i32) -> bool {
        match self {
            Self::Always => true,
            Self::OnFailure => code != 0,
            Self::Never => false,
        }
    }
}

/// What the pod's resolver asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Dns {
    Cluster,
    Default,
    None,
}

/// A pod.
#[derive(Clone, Debug)]
pub struct PodPlan {
    pub host_network: bool,
    pub dns: Dns,
    /// Lines that `dnsConfig` adds to `resolv.conf`.
    pub dns_lines: String,
    pub hosts: String,
    pub hostname: String,
    pub grace: Duration,
    pub sysctls: Vec<(String, String)>,
    pub init: Vec<ContainerPlan>,
    pub main: Vec<ContainerPlan>,
    pub volumes: Vec<(String, Content)>,
    pub fs_group: Option<u32>,
    pub host_ports: Vec<HostPort>,
}

/// A port of the node's that leads to the pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPort {
    pub udp: bool,
    pub host: u16,
    pub container: u16,
}

/// A container.
#[derive(Clone, Debug)]
pub struct ContainerPlan {
    pub name: String,
    pub image: String,
    /// Before `$(NAME)` is expanded.
    pub command_line: Vec<String>,
    pub program: Option<(Program, &'static str)>,
    pub env: Vec<(String, Source)>,
    pub mounts: Vec<MountPlan>,
    pub directory: String,
    pub privileges: Privileges,
    pub startup: Option<Probe>,
    pub readiness: Option<Probe>,
    pub liveness: Option<Probe>,
    pub post_start: Option<Action>,
    pub pre_stop: Option<Action>,
    pub restart: Restart,
    /// The end of its log is its termination message when it fails (`FallbackToLogsOnError`).
    pub message_from_logs: bool,
    /// An init container that goes on beside the main ones.
    pub sidecar: bool,
}

/// A volume's place in a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountPlan {
    pub volume: String,
    pub sub_path: String,
    pub path: String,
    pub read_only: bool,
}

/// What is to be done for a pod.
pub fn plan(pod: &Pod) -> Result<PodPlan, Refusal> {
    let spec = pod.spec.clone().unwrap_or_default();
    let restart = match spec.restart_policy.as_deref() {
        None | Some("Always") => Restart::Always,
        Some("OnFailure") => Restart::OnFailure,
        Some("Never") => Restart::Never,
        Some(other) => return Err(Refusal::config(format!("restartPolicy {other} is not known here"))),
    };
    let mut init = Vec::new();
    for container in spec.init_containers.iter().flatten() {
        let sidecar = container.restart_policy.as_deref() == Some("Always");
        // Those that are to end run again until they have, unless nothing of the pod does.
        let of_init = if restart == Restart::Never { Restart::Never } else { Restart::OnFailure };
        init.push(self::container(
            &spec,
            container,
            if sidecar { Restart::Always } else { of_init },
            sidecar,
        )?);
    }
    let main = spec.containers.iter().map(|of| self::container(&spec, of, restart, false));
    let host_network = spec.host_network == Some(true);
    let dns = match spec.dns_policy.as_deref() {
        Some("None") => Dns::None,
        Some("Default") => Dns::Default,
        Some("ClusterFirst") | None if host_network => Dns::Default,
        _ => Dns::Cluster,
    };
    let name = pod.metadata.name.clone().unwrap_or_default();
    let grace = spec.termination_grace_period_seconds.unwrap_or(30);
    let security = spec.security_context.clone().unwrap_or_default();
    Ok(PodPlan {
        host_network,
        dns,
        dns_lines: dns_lines(&spec),
        hosts: hosts(&spec),
        hostname: spec.hostname.clone().unwrap_or(name).chars().take(63).collect(),
        grace: Duration::from_secs(u64::try_from(grace).unwrap_or(0)),
        sysctls: security.sysctls.into_iter().flatten().map(|of| (of.name, of.value)).collect(),
        init,
        main: main.collect::<Result<_, _>>()?,
        volumes: spec
            .volumes
            .iter()
            .flatten()
            .map(|volume| Ok((volume.name.clone(), sources::content(volume)?)))
            .collect::<Result<_, Refusal>>()?,
        fs_group: security.fs_group.and_then(|group| u32::try_from(group).ok()),
        host_ports: if host_network { Vec::new() } else { host_ports(&spec) },
    })
}

fn container(
    spec: &PodSpec,
    of: &Container,
    restart: Restart,
    sidecar: bool,
) -> Result<ContainerPlan, Refusal> {
    let image = of.image.clone().unwrap_or_default();
    let unknown = || Refusal {
        reason: "ErrImagePull",
        message: format!("container {}: no program of this machine stands for the image {image:?}", of.name),
    };
    let found = images::find(&image).ok_or_else(unknown)?;
    let words = |list: &Option<Vec<String>>| list.clone().unwrap_or_default();
    let mount = |mount: &k8s_openapi::api::core::v1::VolumeMount| MountPlan {
        volume: mount.name.clone(),
        sub_path: mount.sub_path.clone().unwrap_or_default(),
        path: mount.mount_path.clone(),
        read_only: mount.read_only == Some(true),
    };
    let probe = |of_probe: &Option<k8s_openapi::api::core::v1::Probe>| {
        of_probe.as_ref().map(|probe| Probe::of(probe, of)).transpose()
    };
    let lifecycle = of.lifecycle.clone().unwrap_or_default();
    let Lifecycle { post_start, pre_stop, .. } = lifecycle;
    let hook = |hook: Option<LifecycleHandler>| hook.map(|hook| Action::of_hook(&hook, of)).transpose();
    Ok(ContainerPlan {
        name: of.name.clone(),
        command_line: images::command_line(&found, &words(&of.command), &words(&of.args)),
        program: found.program,
        env: env::sources(of)?,
        mounts: of.volume_mounts.iter().flatten().map(mount).collect(),
        directory: of.working_dir.clone().unwrap_or_else(|| "/".to_owned()),
        privileges: Privileges::of(spec, of)?,
        startup: probe(&of.startup_probe)?,
        readiness: probe(&of.readiness_probe)?,
        liveness: probe(&of.liveness_probe)?,
        post_start: hook(post_start)?,
        pre_stop: hook(pre_stop)?,
        restart,
        message_from_logs: of.termination_message_policy.as_deref() == Some("FallbackToLogsOnError"),
        sidecar,
        image,
    })
}

/// A port by number or by one of the container's names.
pub fn port(of: &Container, port: &IntOrString) -> Result<u16, Refusal> {
    let number = match port {
        IntOrString::Int(number) => Some(*number),
        IntOrString::String(name) => {
            let named = of.ports.iter().flatten().find(|port| port.name.as_deref() == Some(name));
            named.map(|port| port.container_port).or_else(|| name.parse().ok())
        }
    };
    let fits = number.and_then(|number| u16::try_from(number).ok()).filter(|number| *number > 0);
    fits.ok_or_else(|| Refusal::config(format!("container {} has no port {port:?}", of.name)))
}

fn host_ports(spec: &PodSpec) -> Vec<HostPort> {
    let all = spec.init_containers.iter().flatten().chain(&spec.containers);
    let ports = all.flat_map(|container| container.ports.iter().flatten());
    let port = |port: &k8s_openapi::api::core::v1::ContainerPort| {
        Some(HostPort {
            udp: port.protocol.as_deref() == Some("UDP"),
            host: u16::try_from(port.host_port?).ok().filter(|host| *host > 0)?,
            container: u16::try_from(port.container_port).ok()?,
        })
    };
    ports.filter_map(port).collect()
}

fn dns_lines(spec: &PodSpec) -> String {
    let config = spec.dns_config.clone().unwrap_or_default();
    let mut lines: String =
        config.nameservers.into_iter().flatten().map(|of| format!("nameserver {of}\n")).collect();
    if let Some(searches) = config.searches.filter(|searches| !searches.is_empty()) {
        lines.push_str(&format!("search {}\n", searches.join(" ")));
    }
    for option in config.options.into_iter().flatten() {
        let value = option.value.map(|value| format!(":{value}")).unwrap_or_default();
        lines.push_str(&format!("options {}{value}\n", option.name.unwrap_or_default()));
    }
    lines
}

fn hosts(spec: &PodSpec) -> String {
    let line = |alias: &k8s_openapi::api::core::v1::HostAlias| {
        format!("{}\t{}\n", alias.ip, alias.hostnames.clone().unwrap_or_default().join("\t"))
    };
    spec.host_aliases.iter().flatten().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(spec: serde_json::Value) -> Result<PodPlan, Refusal> {
        plan(
            &serde_json::from_value(serde_json::json!({ "metadata": { "name": "a" }, "spec": spec }))
                .unwrap(),
        )
    }

    #[test]
    fn native_sidecars_run_always_and_other_init_containers_until_they_succeed() {
        let init = serde_json::json!([
            { "name": "one", "image": "busybox" },
            { "name": "two", "image": "tombolo", "restartPolicy": "Always", "args": ["sidecar"] },
        ]);
        let plan = of(
            serde_json::json!({ "initContainers": init, "containers": [{ "name": "c", "image": "nginx" }] }),
        );
        let plan = plan.unwrap();
        let init: Vec<_> = plan.init.iter().map(|of| (of.restart, of.sidecar)).collect();
        assert_eq!(init, [(Restart::OnFailure, false), (Restart::Always, true)]);
        assert_eq!(plan.init[1].command_line, ["tombolo", "sidecar"]);
        assert_eq!(
            (plan.main[0].restart, plan.dns, plan.grace.as_secs()),
            (Restart::Always, Dns::Cluster, 30)
        );
    }

    #[test]
    fn an_image_that_is_not_here_and_a_port_that_is_not_there_are_refused_by_name() {
        let error =
            of(serde_json::json!({ "containers": [{ "name": "c", "image": "envoy:1" }] })).unwrap_err();
        assert_eq!(error.reason, "ErrImagePull");
        assert!(error.message.contains("envoy:1"));
        let probe = serde_json::json!({ "httpGet": { "port": "web" } });
        let container = serde_json::json!({ "name": "c", "image": "nginx", "readinessProbe": probe });
        assert!(of(serde_json::json!({ "containers": [container] })).unwrap_err().message.contains("web"));
    }
}
