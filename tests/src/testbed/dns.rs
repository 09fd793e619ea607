//! CoreDNS as the cluster's DNS, as a Deployment behind the Service `kube-dns`.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::Cluster;

/// What answers for `clusterset.local`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Dns {
    /// Nobody.
    Plain,
    /// CoreDNS itself, from ServiceImports and EndpointSlices. Their definitions have to be there.
    Multicluster,
    /// Another server, by stub forwarding.
    Stub(SocketAddr),
}

impl Dns {
    fn corefile(&self) -> String {
        let (zone, option) = match self {
            Self::Multicluster => (" clusterset.local", "        multicluster clusterset.local\n"),
            _ => ("", ""),
        };
        let stub = match self {
            Self::Stub(server) => format!("clusterset.local:53 {{\n    errors\n    forward . {server}\n}}\n"),
            _ => String::new(),
        };
        // Without `cache`: what a test has just changed is asked for at once.
        format!(
            ".:53 {{\n    errors\n    health\n    ready\n    kubernetes cluster.local in-addr.arpa ip6.arpa{zone} {{\n        \
             pods insecure\n        fallthrough in-addr.arpa ip6.arpa\n        ttl 5\n{option}    }}\n    loadbalance\n}}\n{stub}"
        )
    }
}

impl Cluster {
    /// Has the cluster's DNS answer so; [`Cluster::dns_ready`] waits until it does.
    pub fn set_dns(&self, dns: &Dns) -> Result<()> {
        let corefile = dns.corefile();
        for object in objects(&self.addresses.dns().to_string(), &corefile) {
            self.api.apply(&object).context("the cluster's DNS")?;
        }
        Ok(())
    }

    pub fn dns_ready(&self) -> Result<()> {
        self.rolled_out("kube-system", "deployment/coredns")?;
        super::eventually("kube-dns has an endpoint", Duration::from_secs(30), || {
            let slices = self.kubectl(&[
                "get",
                "endpointslices",
                "-n",
                "kube-system",
                "-l",
                "k8s-app=kube-dns",
                "-o",
                "jsonpath={.items[*].endpoints[*].conditions.ready}",
            ])?;
            anyhow::ensure!(slices.contains("true"), "{slices}");
            Ok(())
        })
    }
}

fn objects(address: &str, corefile: &str) -> [Value; 6] {
    let labels = json!({ "k8s-app": "kube-dns" });
    let metadata = |name: &str| json!({ "name": name, "namespace": "kube-system", "labels": labels });
    let watch = |group: &str, resources: &[&str]| json!({ "apiGroups": [group], "resources": resources, "verbs": ["list", "watch"] });
    [
        json!({ "apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata("coredns") }),
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": { "name": "system:coredns" },
            "rules": [
                watch("", &["endpoints", "services", "pods", "namespaces"]),
                watch("discovery.k8s.io", &["endpointslices"]),
                watch("multicluster.x-k8s.io", &["serviceimports"]),
            ],
        }),
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": { "name": "system:coredns" },
            "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "system:coredns" },
            "subjects": [{ "kind": "ServiceAccount", "name": "coredns", "namespace": "kube-system" }],
        }),
        json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata("coredns"), "data": { "Corefile": corefile } }),
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": metadata("kube-dns"),
            "spec": { "clusterIP": address, "selector": labels, "ports": [
                { "name": "dns", "port": 53, "protocol": "UDP" }, { "name": "dns-tcp", "port": 53, "protocol": "TCP" },
            ] },
        }),
        json!({
            "apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata("coredns"),
            "spec": {
                "selector": { "matchLabels": labels },
                "template": {
                    // Another configuration is another pod.
                    "metadata": { "labels": labels, "annotations": { "testbed/corefile": corefile } },
                    "spec": {
                        "serviceAccountName": "coredns", "dnsPolicy": "Default", "terminationGracePeriodSeconds": 6,
                        "priorityClassName": "system-cluster-critical",
                        "containers": [{
                            "name": "coredns", "image": "coredns/coredns:1.15.0", "args": ["-conf", "/etc/coredns/Corefile"],
                            "readinessProbe": { "httpGet": { "port": 8181, "path": "/ready" }, "periodSeconds": 1 },
                            "volumeMounts": [{ "name": "config", "mountPath": "/etc/coredns", "readOnly": true }],
                            "securityContext": { "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true,
                                "capabilities": { "drop": ["ALL"], "add": ["NET_BIND_SERVICE"] } },
                        }],
                        "volumes": [{ "name": "config", "configMap": { "name": "coredns" } }],
                    },
                },
            },
        }),
    ]
}
