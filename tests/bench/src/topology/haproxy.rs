//! Four HAProxy hops with mutual TLS end to end between the first and the last, the two middle ones passing TCP
//! through (spliced): what sidecars and multicluster gateways of other meshes do.

use std::fmt::Write as _;
use std::net::SocketAddr;

use anyhow::Result;
use tombolo_tests::process::{Process, ProcessSpec};

use super::{Running, Topology};
use crate::certificates::PEER_NAME;
use crate::site::{ENTRY_BULK_PORT, ENTRY_HTTP_PORT, Port, Side, Site, program};

/// One thread per core of the two-core reference machine and never more than four: beyond that threads of four
/// processes only compete.
fn threads() -> usize {
    std::thread::available_parallelism().map_or(2, |cores| cores.get().min(4))
}

pub(super) struct HaproxyChain {
    /// TLS session resumption between the first and the last hop.
    pub(super) resumption: bool,
    pub(super) kernel_congestion: &'static str,
}

/// What one hop does with TLS.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Tls {
    /// Plain in, TLS out.
    Client,
    /// Bytes through.
    None,
    /// TLS in, plain out.
    Server,
}

impl Topology for HaproxyChain {
    fn name(&self) -> String {
        let mut name = "haproxy".to_owned();
        if self.resumption {
            name.push_str("-resume");
        }
        if self.kernel_congestion != "cubic" {
            let _ = write!(name, "-{}", self.kernel_congestion);
        }
        name
    }

    fn description(&self) -> String {
        format!(
            "HAProxy x4: client-TLS -> TCP -> TCP -> TLS-server, mTLS 1.3, {} threads each, resumption {}, kernel {}",
            threads(),
            if self.resumption { "on" } else { "off" },
            self.kernel_congestion
        )
    }

    fn kernel_congestion(&self) -> &'static str {
        self.kernel_congestion
    }

    fn start(&self, site: &Site) -> Result<Running> {
        // (role, side, TLS, port of its HTTP listener; its bulk listener is the next port)
        let hops = [
            ("sidecar-out", Side::Near, Tls::Client, ENTRY_HTTP_PORT),
            ("gateway-near", Side::Near, Tls::None, 22010),
            ("gateway-far", Side::Far, Tls::None, 22020),
            ("sidecar-in", Side::Far, Tls::Server, 22030),
        ];
        let mut next = [site.origin_http(), site.origin_bulk()];
        let mut processes: Vec<Process> = Vec::new();
        // From the origin towards the client: each hop is there before the one that sends to it.
        for (role, side, tls, port) in hops.into_iter().rev() {
            let listen = [site.socket(side, port), site.socket(side, port + 1)];
            let config = site.write(&format!("{role}.haproxy"), &self.config(site, tls, listen, next))?;
            let spec = ProcessSpec::new(role, program("haproxy")?).arg("-db").arg("-f").arg(config);
            processes.push(site.start(side, spec, &[Port::Tcp(port), Port::Tcp(port + 1)])?);
            next = listen;
        }
        processes.reverse();
        Ok(Running {
            http: site.socket(Side::Near, ENTRY_HTTP_PORT),
            bulk: site.socket(Side::Near, ENTRY_BULK_PORT),
            hops: processes,
            support: Vec::new(),
        })
    }
}

impl HaproxyChain {
    fn config(&self, site: &Site, tls: Tls, listen: [SocketAddr; 2], next: [SocketAddr; 2]) -> String {
        let (pem, root) = (site.certificates.leaf_and_key.display(), site.certificates.root.display());
        let bind_tls = match tls {
            Tls::Server => format!(
                " ssl crt {pem} ca-file {root} verify required{}",
                if self.resumption { "" } else { " no-tls-tickets" }
            ),
            Tls::Client | Tls::None => String::new(),
        };
        let server_tls = match tls {
            Tls::Client => format!(
                " ssl crt {pem} ca-file {root} verify required sni str({PEER_NAME}) verifyhost {PEER_NAME}{}",
                if self.resumption { "" } else { " no-ssl-reuse" }
            ),
            Tls::Server | Tls::None => String::new(),
        };
        let cache = if self.resumption { "" } else { "  tune.ssl.cachesize 0\n" };
        let mut config = format!(
            "global
  nbthread {threads}
  maxconn 4000
{cache}  ssl-default-bind-options ssl-min-ver TLSv1.3
  ssl-default-server-options ssl-min-ver TLSv1.3
  ssl-default-bind-ciphersuites TLS_AES_128_GCM_SHA256
  ssl-default-server-ciphersuites TLS_AES_128_GCM_SHA256
defaults
  mode tcp
  backlog 8192
  option splice-auto
  timeout connect 10s
  timeout client 120s
  timeout server 120s
",
            threads = threads(),
        );
        for ((name, listen), next) in ["http", "bulk"].into_iter().zip(listen).zip(next) {
            let _ = write!(
                config,
                "frontend {name}_in\n  bind {listen}{bind_tls}\n  default_backend {name}_out\n\
                 backend {name}_out\n  server next {next}{server_tls}\n"
            );
        }
        config
    }
}
