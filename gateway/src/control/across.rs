//! Endpoints of linked clusters that send to this gateway past their own (`egress: remote`): they may ask whether it lives,
//! and are told what is gone. What they prove makes them nobody of ours: nothing leaves for other clusters on their word.

use std::time::Instant;

use tombolo_model::ids::{ClusterTag, EndpointId};
use tombolo_overlay::DRAINING;
use tombolo_overlay::datagram::{Body, DecodeError, ProbeAck, Selector, Unverified};

use super::hints::{Way, gone_datagram};
use super::state::{Answer, Effect, Send, State};
use crate::decide::{self, Now};
use crate::forward::Arrival;
use crate::tables::Tables;
use crate::view::Who;

impl State {
    /// From an endpoint of a linked cluster that sends past its own gateways: it may ask whether we live.
    #[allow(clippy::too_many_arguments)] // one caller, which passes its own arguments on
    pub(super) fn on_across_datagram(
        &mut self,
        tables: &Tables,
        (tag, endpoint): (ClusterTag, EndpointId),
        unverified: &Unverified<'_>,
        arrival: &Arrival,
        now: Instant,
        clocks: Now,
        out: &mut Vec<Effect>,
    ) -> Result<(), DecodeError> {
        let link = tables.peer(tag, clocks.unix).ok_or(DecodeError::Field("selector"))?;
        let (hour, current) = (unverified.phase.hour(clocks.unix), clocks.hour());
        let key = link.across_key(tables.tag, endpoint.block(), &mut self.keys, hour, current);
        let datagram = unverified.verify(&key)?;
        let Body::Probe(probe) = &datagram.body else { return Err(DecodeError::Field("type")) };
        self.learn(arrival.source, Who::Foreign { tag, endpoint }, now);
        // Which clusters we reach is for our own.
        let unreachable_total = if self.draining { DRAINING } else { 0 };
        let ack = ProbeAck { unreachable_total, unreachable: Vec::new(), ..self.ack(probe, arrival) };
        let key = link.across_key(tables.tag, endpoint.block(), &mut self.keys, current, current);
        let selector = datagram.selector;
        let answer = Answer { arrival, selector, sequence: datagram.sequence, key, clocks };
        out.push(answer.with(Body::ProbeAck(ack)));
        Ok(())
    }

    /// A hint for whoever sent to an endpoint that is no more.
    pub(super) fn gone_to_foreign(
        &mut self,
        tables: &Tables,
        (tag, endpoint): (ClusterTag, EndpointId),
        gone: decide::Gone,
        (via, to, from): Way,
        clocks: Now,
    ) -> Option<Effect> {
        let (link, hour) = (tables.peer(tag, clocks.unix)?, clocks.hour());
        let key = link.across_key(tables.tag, endpoint.block(), &mut self.keys, hour, hour);
        let selector = Selector::Across { tag, endpoint };
        let bytes = gone_datagram(selector, tables.tag, gone).encode(hour, &key);
        Some(Effect::Send(Send { via, to, from, bytes, probe: None }))
    }
}
