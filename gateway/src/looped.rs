//! A PROBE that this gateway sends to its own two sockets and answers itself: whoever is told that it is ready, a balancer
//! or a rollout, may rely on its threads taking packets in and giving answers out with the keys of now.
//!
//! [`watch`] blocks readiness until both sockets have answered, and again when one has been silent for [`SILENT`] rounds. The
//! source is a socket of this machine; the answer is checked as a sibling's would be.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::UdpSocket;
use tokio::sync::watch::Receiver;
use tombolo_overlay::datagram::{self, Body, Datagram, Probe, Selector};
use tombolo_overlay::keys::Hour;
use tombolo_runtime::clock;
use tombolo_runtime::readiness::{BlockReady, Readiness};

use crate::keys::KeyCache;
use crate::tables::Tables;

/// An answer takes microseconds; the control thread may be busy with a new configuration.
const PATIENCE: Duration = Duration::from_millis(500);
/// While there is none yet: it may have been asked a moment before it had its keys.
const FIRST_PATIENCE: Duration = Duration::from_millis(100);
/// While there is no answer yet.
const SOON: Duration = Duration::from_millis(50);
/// Once there is: a kubelet asks as often by default.
const EVERY: Duration = Duration::from_secs(5);
/// A machine may stand still for a moment: 15 s of silence are no such moment.
const SILENT: u32 = 3;
/// The smallest that a PROBE may have.
const BYTES: u16 = 80;

/// Where a socket that listens there is reached from this machine.
pub fn own(address: SocketAddr) -> SocketAddr {
    let ip: IpAddr = match address.ip() {
        IpAddr::V4(v4) if v4.is_unspecified() => std::net::Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(v6) if v6.is_unspecified() => std::net::Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}

/// Probes until it is dropped. `first`: the block that the first round of answers lifts.
pub async fn watch(
    mut tables: Receiver<Option<Arc<Tables>>>,
    sockets: [SocketAddr; 2],
    readiness: Readiness,
    first: BlockReady,
) {
    let mut blocked = Some(first);
    let mut silent = 0;
    let mut sequence = 0;
    let mut keys = KeyCache::default();
    loop {
        let Ok(known) = tables.wait_for(Option::is_some).await.map(|tables| tables.clone()) else { return };
        let Some(known) = known else { return };
        sequence += 1;
        let mut answered = true;
        let patience = if blocked.is_some() { FIRST_PATIENCE } else { PATIENCE };
        for socket in sockets {
            let asked = answers(&known, &mut keys, own(socket), sequence);
            answered &= tokio::time::timeout(patience, asked).await.unwrap_or(false);
        }
        if answered {
            silent = 0;
            if blocked.take().is_some() {
                tracing::info!("both sockets answer a PROBE of our own");
            }
        } else {
            silent += 1;
            if silent >= SILENT && blocked.is_none() {
                tracing::error!(rounds = silent, "our own sockets do not answer a PROBE: not ready any more");
                blocked = Some(readiness.block("looped-back probe"));
            }
        }
        tokio::time::sleep(if blocked.is_some() { SOON } else { EVERY }).await;
    }
}

/// Whether the socket answers one PROBE, with the replicas' key.
async fn answers(tables: &Tables, keys: &mut KeyCache, to: SocketAddr, sequence: u64) -> bool {
    let unix = clock::since_unix_epoch();
    let hour = Hour::at(unix);
    let selector = Selector::Gateway { tag: tables.tag };
    let sent_micros = u64::try_from(unix.as_micros()).unwrap_or(0);
    let probe = Probe { sent_micros, bytes: BYTES };
    let key = tables.replica_key(keys, hour, hour).clone();
    let question = Datagram { selector, sequence, body: Body::Probe(probe) }.encode(hour, &key);
    let asked = async {
        let any: IpAddr = if to.is_ipv4() {
            std::net::Ipv4Addr::UNSPECIFIED.into()
        } else {
            std::net::Ipv6Addr::UNSPECIFIED.into()
        };
        let socket = UdpSocket::bind((any, 0)).await?;
        socket.connect(to).await?;
        socket.send(&question).await?;
        let mut buffer = [0; 2048];
        loop {
            let received = socket.recv(&mut buffer).await?;
            let Some(Ok(answer)) = buffer.get(..received).map(datagram::decode) else { continue };
            let (same, answered_in) = (answer.sequence == sequence, answer.phase.hour(unix));
            let key = tables.replica_key(keys, answered_in, hour);
            match answer.verify(key) {
                Ok(Datagram { body: Body::ProbeAck(ack), .. }) if same && ack.sent_micros == sent_micros => {
                    return Ok::<_, std::io::Error>(());
                }
                _ => {}
            }
        }
    };
    let asked = asked.await;
    if let Err(error) = &asked {
        tracing::debug!(%error, %to, "a PROBE of our own was not answered");
        // Refused at once: not asked again at full speed.
        tokio::time::sleep(PATIENCE).await;
    }
    asked.is_ok()
}

#[cfg(test)]
mod tests {
    use tombolo_runtime::tasks::TaskGroup;

    use std::num::NonZeroUsize;

    use tokio::sync::watch;
    use tombolo_overlay::datagram::StartNumber;

    use super::*;
    use crate::dataplane::{BoundDataPlane, DataPlaneConfig};
    use crate::fixture;

    #[tokio::test]
    async fn a_gateway_is_ready_once_both_of_its_sockets_have_answered_a_probe() {
        let config = DataPlaneConfig {
            border: ([127, 0, 0, 1], 0).into(),
            inner: ([127, 0, 0, 1], 0).into(),
            workers: NonZeroUsize::MIN,
            start: StartNumber(7),
        };
        let plane = BoundDataPlane::bind(config).unwrap().start().unwrap();
        let readiness = Readiness::new();
        let first = readiness.block("looped-back probe");
        let wire = fixture::snapshot();
        let now = clock::since_unix_epoch();
        let tables =
            Arc::new(Tables::parse(&wire, &"east".parse().unwrap(), fixture::east(), None, now).unwrap());
        let (given, received) = watch::channel(None);
        let sockets = [plane.border_addr(), plane.inner_addr()];
        let tasks = TaskGroup::new();
        tasks.spawn("looped-back probe", super::watch(received, sockets, readiness.clone(), first));
        // The tables are known here, and not there: nobody answers.
        given.send_replace(Some(Arc::clone(&tables)));
        let early = tokio::time::timeout(Duration::from_millis(800), readiness.ready()).await;
        assert!(early.is_err(), "ready without an answer");
        plane.set_tables(tables);
        tokio::time::timeout(Duration::from_secs(10), readiness.ready()).await.unwrap();
        tasks.shutdown(Duration::ZERO).await;
        plane.stop();
    }
}
