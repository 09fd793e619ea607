//! Two nginx stream hops with mutual TLS between them.

use std::fmt::Write as _;

use anyhow::Result;
use tombolo_tests::process::ProcessSpec;

use super::{Running, Topology};
use crate::certificates::PEER_NAME;
use crate::site::{ENTRY_BULK_PORT, ENTRY_HTTP_PORT, Port, Side, Site, program};

const INNER_HTTP_PORT: u16 = 22110;
const INNER_BULK_PORT: u16 = 22111;

pub(super) struct NginxStream;

impl Topology for NginxStream {
    fn name(&self) -> String {
        "nginx".to_owned()
    }

    fn description(&self) -> String {
        "nginx stream x2: client-TLS -> TLS-server, mTLS 1.3, worker per core, resumption off".to_owned()
    }

    fn start(&self, site: &Site) -> Result<Running> {
        let certificates = &site.certificates;
        let (leaf, key, root) =
            (certificates.leaf.display(), certificates.key.display(), certificates.root.display());
        let client_tls = format!(
            "proxy_ssl on; proxy_ssl_protocols TLSv1.3; proxy_ssl_certificate {leaf}; proxy_ssl_certificate_key {key}; \
             proxy_ssl_trusted_certificate {root}; proxy_ssl_verify on; proxy_ssl_name {PEER_NAME}; \
             proxy_ssl_server_name on; proxy_ssl_session_reuse off;"
        );
        let server_tls = format!(
            "ssl_protocols TLSv1.3; ssl_certificate {leaf}; ssl_certificate_key {key}; ssl_client_certificate {root}; \
             ssl_verify_client on; ssl_session_tickets off; ssl_session_cache off;"
        );
        let start = |role: &str,
                     side: Side,
                     tls: &str,
                     ports: [u16; 2],
                     listen_option: &str,
                     next: [_; 2]| {
            let mut servers = String::new();
            for (port, next) in ports.into_iter().zip(next) {
                let listen = site.socket(side, port);
                let _ = writeln!(
                    servers,
                    "server {{ listen {listen} {listen_option} reuseport backlog=8192; proxy_pass {next}; {tls} }}"
                );
            }
            let config = format!(
                "daemon off; worker_processes auto; error_log stderr crit; pid {dir}/{role}.pid; user root;
load_module /usr/lib/nginx/modules/ngx_stream_module.so;
events {{ worker_connections 20000; }}
stream {{ proxy_buffer_size 64k; tcp_nodelay on; {servers} }}
",
                dir = site.dir().display(),
            );
            let config = site.write(&format!("{role}.conf"), &config)?;
            let spec =
                ProcessSpec::new(role, program("nginx")?).arg("-c").arg(config).arg("-p").arg(site.dir());
            site.start(side, spec, &ports.map(Port::Tcp))
        };
        let inner = [INNER_HTTP_PORT, INNER_BULK_PORT];
        let entry = [ENTRY_HTTP_PORT, ENTRY_BULK_PORT];
        let last = start(
            "sidecar-in",
            Side::Far,
            &server_tls,
            inner,
            "ssl",
            [site.origin_http(), site.origin_bulk()],
        )?;
        let between = inner.map(|port| site.socket(Side::Far, port));
        let first = start("sidecar-out", Side::Near, &client_tls, entry, "", between)?;
        Ok(Running {
            http: site.socket(Side::Near, ENTRY_HTTP_PORT),
            bulk: site.socket(Side::Near, ENTRY_BULK_PORT),
            hops: vec![first, last],
            support: Vec::new(),
        })
    }
}
