//! The settings of a store in etcd.

use std::path::PathBuf;
use std::time::Duration;

use tombolo_federator::store::etcd::EtcdConfig;

use crate::failure::Failure;

const DEFAULT_LEASE_SECONDS: u16 = 10;

pub(super) struct Settings {
    pub endpoints: Vec<String>,
    pub prefix: Option<String>,
    pub ca: Option<PathBuf>,
    pub certificate: Option<PathBuf>,
    pub key: Option<PathBuf>,
    pub user: Option<String>,
    pub password_file: Option<PathBuf>,
    pub lease_seconds: Option<u16>,
}

impl Settings {
    /// Where the store is, and whether it begins with the file's; `None`: in a file.
    pub(super) fn config(self, cluster: &str, import: bool) -> Result<(Option<EtcdConfig>, bool), Failure> {
        let Self { endpoints, prefix, ca, certificate, key, user, password_file, lease_seconds } = self;
        if endpoints.is_empty() {
            let others = prefix.is_some()
                || [&ca, &certificate, &key, &password_file].into_iter().any(Option::is_some)
                || user.is_some()
                || lease_seconds.is_some()
                || import;
            if others {
                return Err(Failure::usage("settings of etcd are given, and no --etcd-endpoint")
                    .remedy("give --etcd-endpoint http://10.0.0.5:2379, or leave the others out"));
            }
            return Ok((None, false));
        }
        for endpoint in &endpoints {
            if !endpoint.starts_with("http://") && !endpoint.starts_with("https://") {
                return Err(Failure::usage(format_args!(
                    "--etcd-endpoint {endpoint:?} is no http or https URL"
                ))
                .remedy("give it as https://10.0.0.5:2379"));
            }
            if endpoint.starts_with("http://") && (ca.is_some() || certificate.is_some()) {
                return Err(Failure::usage(format_args!(
                    "--etcd-endpoint {endpoint} has no TLS, but certificates are given"
                ))
                .remedy("give it as https://..., or leave the certificates out"));
            }
        }
        let certificate = together(certificate, key, "--etcd-certificate", "--etcd-key")?;
        let user = together(user, password_file, "--etcd-user", "--etcd-password-file")?;
        let prefix = prefix.unwrap_or_else(|| format!("/tombolo/{cluster}"));
        if !prefix.starts_with('/') || prefix.len() > 200 || prefix.contains('\0') {
            return Err(Failure::usage(format_args!(
                "--etcd-prefix {prefix:?} is not a path of at most 200 bytes"
            ))
            .remedy("give it as /tombolo/east"));
        }
        let lease = lease_seconds.unwrap_or(DEFAULT_LEASE_SECONDS);
        if !(3..=300).contains(&lease) {
            return Err(Failure::usage(format_args!("--etcd-lease-seconds {lease}: not within 3 and 300")));
        }
        let lease = Duration::from_secs(lease.into());
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let (host, process, random) = (host.trim(), std::process::id(), rand::random::<u32>());
        let owner = format!("{host}, process {process} ({random:08x})");
        Ok((Some(EtcdConfig { endpoints, prefix, ca, certificate, user, lease, owner }), import))
    }
}

fn together<A, B>(a: Option<A>, b: Option<B>, flag_a: &str, flag_b: &str) -> Result<Option<(A, B)>, Failure> {
    match (a, b) {
        (Some(a), Some(b)) => Ok(Some((a, b))),
        (None, None) => Ok(None),
        _ => {
            Err(Failure::usage(format_args!("{flag_a} and {flag_b} go together"))
                .remedy("give both, or neither"))
        }
    }
}
