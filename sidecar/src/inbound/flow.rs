//! A stream that holds a UDP flow: [`crate::udp`] serves it, and the policies are held against it meanwhile.

use std::net::SocketAddr;
use std::sync::Arc;

use quinn::VarInt;

use super::caller::{Caller, identity};
use super::{Carried, LocalTarget, Shared};
use crate::codes;
use crate::copy::{BiStream, Meter};
use crate::header::Opened;
use crate::metrics;
use crate::udp::inbound::{Served, serve};

/// Serves one UDP flow to its end, and says how it ended.
#[allow(clippy::too_many_arguments)] // the rest of `carry`
pub(super) async fn carry(
    shared: &Shared,
    caller: &mut Caller,
    target: &LocalTarget,
    application: SocketAddr,
    stream: &mut BiStream,
    opened: Opened,
    meter: &Arc<Meter>,
    carried: &mut Carried,
) -> &'static str {
    let peer = identity(&caller.connection);
    let (connection, demux) = (caller.connection.quic().clone(), caller.demux.clone());
    let context = &shared.context;
    let served = Served {
        context: &context.udp,
        connection: &connection,
        demux: &demux,
        application,
        mark: context.dialler.mark(),
        peer: &peer,
        metrics: target.flows.clone(),
        meter,
        drain: &context.drain,
    };
    let code = tokio::select! {
        biased;
        verdict = caller.revoked(&target.service, opened.port) => {
            let policy = verdict.decided_by.policy();
            context.metrics.count_access(&target.service.to_string(), metrics::CUT, policy);
            carried.verdict = Some(verdict);
            codes::CUT_BY_POLICY
        }
        ended = serve(stream, opened.early, served) => match ended {
            Ok(reason) => return reason,
            Err(code) => code,
        },
    };
    stream.abort(code);
    codes::name(VarInt::from_u32(code))
}
