//! A flow's own task: its route, its way to an endpoint, and what the access log says of it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use tombolo_model::names::ClusterName;

use super::{UdpPort, Whose};
use crate::capture::metrics::Outcome;
use crate::outbound::OutboundContext;
use crate::udp::flow::LocalSink;
use crate::udp::metrics::Dropped;
use crate::udp::outbound::{self, Carried, HOLD, Outgoing};

/// One flow, from its first datagram to its end.
pub(super) struct Run {
    pub flow: Arc<Outgoing>,
    pub sink: Arc<LocalSink>,
    pub port: Arc<UdpPort>,
    pub whose: Whose,
    pub context: Arc<OutboundContext>,
    pub client: SocketAddr,
}

impl Run {
    pub async fn run(self) {
        let Self { flow, sink, port, whose, context, client } = self;
        let (upstream, started) = (&port.upstream, Instant::now());
        let mut carried = Carried::default();
        let carry = async {
            let held = match &whose {
                Whose::Own => Ok(None),
                Whose::Captured(captured) => {
                    let routed = captured.datagrams_routed(upstream.service(), upstream.port()).await;
                    captured
                        .metrics
                        .count(routed.as_ref().map_or_else(|outcome| *outcome, |_| Outcome::Service));
                    routed.map(Some).map_err(Outcome::name)
                }
                Whose::Application { datagrams, .. } => datagrams.routed(upstream.service()).await.map(Some),
            };
            match held {
                Ok(_held) => outbound::carry(&flow, &sink, upstream, &context, &mut carried).await,
                Err(reason) => {
                    flow.refuse(Dropped::Unknown);
                    tokio::time::sleep(HOLD).await;
                    reason
                }
            }
        };
        let reason = tokio::select! {
            biased;
            () = context.drain.forced() => "cut_by_drain",
            () = flow.over.notified() => "other_caller",
            reason = carry => reason,
        };
        upstream.metrics().ended(reason);
        tracing::info!(
            target: "access",
            direction = "outbound",
            protocol = "udp",
            service = %upstream.service(),
            port = upstream.port(),
            client = %client,
            cluster = carried.cluster.as_ref().map_or("", ClusterName::as_str),
            peer = carried.peer,
            attempts = carried.attempts,
            sent_bytes = flow.meter.bytes_sent(),
            received_bytes = flow.meter.bytes_received(),
            duration_ms = started.elapsed().as_millis() as u64,
            reason,
            "flow"
        );
    }
}
