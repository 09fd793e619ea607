//! What a container is started with: its mounts, variables, command line and resolver, once everything that they come
//! from is there.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context as _, Result};
use k8s_openapi::api::core::v1::Pod;

use super::Task;
use crate::pods::env::{Keyed, Source, expand, field};
use crate::pods::launch::Launch;
use crate::pods::network::Sandbox;
use crate::pods::plan::{ContainerPlan, Dns, PodPlan};
use crate::pods::root::{Mount, Root};
use crate::pods::volumes::{Volumes, keys};

impl Task {
    pub(super) async fn prepare(
        &self,
        pod: &Pod,
        plan: &PodPlan,
        container: &ContainerPlan,
        volumes: &mut Volumes,
    ) -> Result<Launch> {
        let places = volumes.places(pod).await?;
        volumes.refresh(pod).await?;
        let mut mounts = Vec::new();
        if let Some((program, target)) = container.program {
            let source = self.node.program(program)?.clone();
            mounts.push(Mount { source, target: target.into(), read_only: true });
        }
        for mount in &container.mounts {
            let place =
                places.get(&mount.volume).with_context(|| format!("there is no volume {}", mount.volume))?;
            let source = place.join(&mount.sub_path);
            if !source.exists() {
                fs::create_dir_all(&source)?;
            }
            mounts.push(Mount { source, target: (&mount.path).into(), read_only: mount.read_only });
        }
        let env = self.variables(pod, container).await?;
        let known: BTreeMap<String, String> = env.iter().cloned().collect();
        let address = pod.status.as_ref().and_then(|status| status.pod_ip.clone()).unwrap_or_default();
        let hosts =
            format!("127.0.0.1\tlocalhost\n::1\tlocalhost\n{address}\t{}\n{}", plan.hostname, plan.hosts);
        let files = [
            ("/etc/hosts", hosts),
            ("/etc/hostname", format!("{}\n", plan.hostname)),
            ("/etc/resolv.conf", self.resolver(plan)),
        ];
        Ok(Launch {
            network: self.sandbox.as_ref().map_or_else(|| self.node.netns.clone(), Sandbox::path),
            hostname: plan.hostname.clone(),
            root: Root {
                base: self.dir(pod).join("layers").join(&container.name),
                files: files.into_iter().map(|(path, text)| (path.into(), text)).collect(),
                mounts,
                read_only: container.privileges.read_only_root,
                privileged: container.privileges.privileged,
            },
            command_line: container.command_line.iter().map(|word| expand(word, &known)).collect(),
            env,
            directory: container.directory.clone(),
            privileges: container.privileges.clone(),
        })
    }

    fn resolver(&self, plan: &PodPlan) -> String {
        let (server, domain) = &self.node.dns;
        match plan.dns {
            Dns::Cluster => format!(
                "nameserver {server}\nsearch {0}.svc.{domain} svc.{domain} {domain}\noptions ndots:5\n{1}",
                self.namespace, plan.dns_lines
            ),
            // The node knows nobody outside.
            Dns::Default | Dns::None => plan.dns_lines.clone(),
        }
    }

    async fn variables(&self, pod: &Pod, container: &ContainerPlan) -> Result<Vec<(String, String)>> {
        let service = self.node.api_service.to_string();
        let mut found: BTreeMap<String, String> = BTreeMap::from([
            ("KUBERNETES_SERVICE_HOST".into(), service),
            ("KUBERNETES_SERVICE_PORT".into(), "443".into()),
        ]);
        let all =
            pod.spec.iter().flat_map(|spec| spec.init_containers.iter().flatten().chain(&spec.containers));
        let of = all.into_iter().find(|of| of.name == container.name);
        for (name, source) in &container.env {
            let value = match source {
                Source::Value(text) => expand(text, &found),
                Source::Field(path) => field(pod, of, path)?,
                Source::Key { kind, name: object, key, optional } => {
                    let value = self.keyed(*kind, object, *optional).await?.remove(key);
                    match value {
                        Some(value) => value,
                        None if *optional => continue,
                        None => anyhow::bail!("{kind:?} {object} has no key {key}"),
                    }
                }
                Source::All { kind, name: object, prefix, optional } => {
                    let all = self.keyed(*kind, object, *optional).await?;
                    found.extend(all.into_iter().map(|(key, value)| (format!("{prefix}{key}"), value)));
                    continue;
                }
            };
            found.insert(name.clone(), value);
        }
        Ok(found.into_iter().collect())
    }

    async fn keyed(&self, kind: Keyed, name: &str, optional: bool) -> Result<BTreeMap<String, String>> {
        let found = keys(&self.node.client, &self.namespace, kind, name).await?;
        anyhow::ensure!(found.is_some() || optional, "there is no {kind:?} {name}");
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Ok(found.into_iter().flatten().map(|(key, value)| (key, text(value))).collect())
    }
}
