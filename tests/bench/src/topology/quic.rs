//! The mesh's path with gateways that terminate QUIC and pool: each hop decrypts, and every client's stream travels
//! on the one connection that the hop keeps to the next (`tombolo-bench quic-hop`).

use anyhow::Result;
use tombolo_tests::process::{Process, ProcessSpec};

use super::{QuicCongestion, Running, Topology};
use crate::site::{ENTRY_BULK_PORT, ENTRY_HTTP_PORT, Port, Side, Site, own_program};

pub(super) struct TerminatingQuic {
    pub(super) congestion: QuicCongestion,
}

impl TerminatingQuic {
    fn congestion(&self) -> &'static str {
        match self.congestion {
            QuicCongestion::Cubic => "cubic",
            QuicCongestion::Bbr => "bbr",
        }
    }
}

impl Topology for TerminatingQuic {
    fn name(&self) -> String {
        match self.congestion {
            QuicCongestion::Cubic => "quic-terminating".to_owned(),
            QuicCongestion::Bbr => "quic-terminating-bbr".to_owned(),
        }
    }

    fn description(&self) -> String {
        format!(
            "quinn x4: TCP -> QUIC -> gateway -> gateway -> QUIC -> TCP, each hop terminates and pools, one thread \
             each, quinn {}",
            self.congestion()
        )
    }

    fn start(&self, site: &Site) -> Result<Running> {
        let entry = (site.socket(Side::Near, ENTRY_HTTP_PORT), site.socket(Side::Near, ENTRY_BULK_PORT));
        let (near, far, last) =
            (site.socket(Side::Near, 22210), site.socket(Side::Far, 22220), site.socket(Side::Far, 22230));
        let origins = [format!("0={}", site.origin_http()), format!("1={}", site.origin_bulk())];
        let entries = [format!("0={}", entry.0), format!("1={}", entry.1)];
        let [http, bulk] = &origins;
        let [http_in, bulk_in] = &entries;
        let (near_text, far_text, last_text) = (near.to_string(), far.to_string(), last.to_string());

        let start = |role: &str, side, args: &[&str], ports: &[Port]| -> Result<Process> {
            let certificates = &site.certificates;
            let spec = ProcessSpec::new(role, own_program()?)
                .args(["quic-hop", "--congestion", self.congestion(), "--root"])
                .arg(&certificates.root)
                .arg("--leaf")
                .arg(&certificates.leaf)
                .arg("--key")
                .arg(&certificates.key)
                .args(args);
            site.start(side, spec, ports)
        };
        let sidecar_in = start(
            "sidecar-in",
            Side::Far,
            &["--listen-quic", &last_text, "--upstream-tcp", http, "--upstream-tcp", bulk],
            &[Port::Udp(last.port())],
        )?;
        let gateway_far = start(
            "gateway-far",
            Side::Far,
            &["--listen-quic", &far_text, "--upstream-quic", &last_text],
            &[Port::Udp(far.port())],
        )?;
        let gateway_near = start(
            "gateway-near",
            Side::Near,
            &["--listen-quic", &near_text, "--upstream-quic", &far_text],
            &[Port::Udp(near.port())],
        )?;
        let sidecar_out = start(
            "sidecar-out",
            Side::Near,
            &["--listen-tcp", http_in, "--listen-tcp", bulk_in, "--upstream-quic", &near_text],
            &[Port::Tcp(entry.0.port()), Port::Tcp(entry.1.port())],
        )?;
        Ok(Running {
            http: entry.0,
            bulk: entry.1,
            hops: vec![sidecar_out, gateway_near, gateway_far, sidecar_in],
            support: Vec::new(),
        })
    }
}
