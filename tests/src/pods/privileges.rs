//! As whom a container runs, and what it may: security contexts of pod and container, as `setpriv` is told them.

use k8s_openapi::api::core::v1::{Container, PodSpec};
use serde::{Deserialize, Serialize};

use super::plan::Refusal;

/// What container runtimes leave to a container that asks for nothing.
const DEFAULT: &[&str] = &[
    "audit_write",
    "chown",
    "dac_override",
    "fowner",
    "fsetid",
    "kill",
    "mknod",
    "net_bind_service",
    "net_raw",
    "setfcap",
    "setgid",
    "setpcap",
    "setuid",
    "sys_chroot",
];

/// User, groups, capabilities.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Privileges {
    pub user: u32,
    pub group: u32,
    pub groups: Vec<u32>,
    pub privileged: bool,
    /// Names as `setpriv` has them; of a privileged container: none, it has all.
    pub capabilities: Vec<String>,
    pub no_new_privileges: bool,
    pub read_only_root: bool,
}

impl Privileges {
    /// Of one container of a pod.
    pub fn of(pod: &PodSpec, container: &Container) -> Result<Self, Refusal> {
        let outer = pod.security_context.clone().unwrap_or_default();
        let inner = container.security_context.clone().unwrap_or_default();
        let id = |field: &str, value: Option<i64>| -> Result<Option<u32>, Refusal> {
            let of = |value: i64| {
                u32::try_from(value)
                    .map_err(|_| Refusal::config(format!("{field} is {value}, expected 0 to 4294967295")))
            };
            value.map(of).transpose()
        };
        let user = id("runAsUser", inner.run_as_user.or(outer.run_as_user))?.unwrap_or(0);
        let group = id("runAsGroup", inner.run_as_group.or(outer.run_as_group))?.unwrap_or(0);
        if inner.run_as_non_root.or(outer.run_as_non_root) == Some(true) && user == 0 {
            let name = &container.name;
            return Err(Refusal::config(format!(
                "container {name} has runAsNonRoot, and images run as root here: set runAsUser"
            )));
        }
        let mut groups = Vec::new();
        for wanted in outer.supplemental_groups.iter().flatten().chain(outer.fs_group.iter()) {
            groups.extend(id("supplementalGroups or fsGroup", Some(*wanted))?);
        }
        let privileged = inner.privileged == Some(true);
        let wanted = inner.capabilities.unwrap_or_default();
        Ok(Self {
            user,
            group,
            groups,
            privileged,
            capabilities: capabilities(&wanted.add.unwrap_or_default(), &wanted.drop.unwrap_or_default()),
            no_new_privileges: inner.allow_privilege_escalation == Some(false),
            read_only_root: inner.read_only_root_filesystem == Some(true),
        })
    }

    /// `setpriv` and its options; what is to be run follows. It ends with whoever started it.
    pub fn setpriv(&self) -> Vec<String> {
        let mut words = vec!["/usr/bin/setpriv".to_owned(), "--pdeathsig".into(), "KILL".into()];
        words.extend([format!("--reuid={}", self.user), format!("--regid={}", self.group)]);
        let groups: Vec<String> = self.groups.iter().map(u32::to_string).collect();
        words.push(if groups.is_empty() {
            "--clear-groups".into()
        } else {
            format!("--groups={}", groups.join(","))
        });
        if !self.privileged {
            let kept = |prefix: &str| {
                self.capabilities
                    .iter()
                    .fold(prefix.to_owned(), |all, capability| format!("{all},+{capability}"))
            };
            words.push(format!("--bounding-set={}", kept("-all")));
            words.push("--inh-caps=-all".into());
        }
        if self.no_new_privileges {
            words.push("--no-new-privs".into());
        }
        words.push("--".into());
        words
    }
}

fn capabilities(add: &[String], drop: &[String]) -> Vec<String> {
    let plain = |name: &String| name.trim_start_matches("CAP_").to_ascii_lowercase();
    let (add, drop): (Vec<_>, Vec<_>) = (add.iter().map(plain).collect(), drop.iter().map(plain).collect());
    let all = |list: &[String]| list.iter().any(|name| name == "all");
    let base = if all(&add) {
        EVERY
    } else if all(&drop) {
        &[]
    } else {
        DEFAULT
    };
    let base = base.iter().map(|&name| name.to_owned()).filter(|name| !drop.contains(name));
    let mut kept: Vec<String> = base.chain(add.iter().filter(|name| *name != "all").cloned()).collect();
    kept.sort_unstable();
    kept.dedup();
    kept
}

/// Those that somebody may ask for with `ALL`.
const EVERY: &[&str] = &[
    "audit_control",
    "audit_read",
    "audit_write",
    "block_suspend",
    "bpf",
    "chown",
    "dac_override",
    "dac_read_search",
    "fowner",
    "fsetid",
    "ipc_lock",
    "ipc_owner",
    "kill",
    "lease",
    "linux_immutable",
    "mknod",
    "net_admin",
    "net_bind_service",
    "net_broadcast",
    "net_raw",
    "perfmon",
    "setfcap",
    "setgid",
    "setpcap",
    "setuid",
    "sys_admin",
    "sys_chroot",
    "sys_nice",
    "sys_pacct",
    "sys_ptrace",
    "sys_resource",
    "sys_time",
    "sys_tty_config",
    "syslog",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_the_usual_ones_without_those_dropped_with_those_added() {
        let words = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect::<Vec<_>>();
        assert_eq!(capabilities(&[], &[]), DEFAULT);
        assert_eq!(capabilities(&words(&["NET_ADMIN"]), &words(&["ALL"])), ["net_admin"]);
        assert!(capabilities(&words(&["CAP_NET_ADMIN"]), &[]).contains(&"net_admin".to_owned()));
        assert!(!capabilities(&[], &words(&["NET_RAW"])).contains(&"net_raw".to_owned()));
    }

    #[test]
    fn a_container_that_must_not_be_root_names_its_user() {
        let pod: PodSpec = serde_json::from_value(serde_json::json!({
            "securityContext": { "runAsNonRoot": true, "fsGroup": 7 },
            "containers": [{ "name": "a" }, { "name": "b", "securityContext": { "runAsUser": 65532 } }],
        }))
        .unwrap();
        assert!(Privileges::of(&pod, &pod.containers[0]).unwrap_err().message.contains("runAsUser"));
        let privileges = Privileges::of(&pod, &pod.containers[1]).unwrap();
        assert_eq!((privileges.user, privileges.groups.as_slice()), (65532, &[7][..]));
        assert!(privileges.setpriv().contains(&"--groups=7".to_owned()));
    }
}
