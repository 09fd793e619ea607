//! Packets in, packets out (pure): which questions are answered at once, which are forwarded, and how a reply fits.
//!
//! One question per message (RFC 9619). What has no readable header, or is itself a response, gets no answer: answering
//! those is how loops and reflections start. EDNS (RFC 6891): version 0, payloads from 512 to [`UDP_PAYLOAD`]; a reply
//! that does not fit loses its additional section first, then all of its records, with TC set, so that it is asked for
//! again over TCP.

use hickory_proto::op::{Edns, Header, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{DNSClass, RecordType};
use hickory_proto::serialize::binary::{BinDecodable, BinDecoder};

use crate::answer::{Answer, Reply, answer};
use crate::table::NameTable;

/// Largest reply over UDP: whole in one packet on every usual path (DNS flag day 2020).
pub const UDP_PAYLOAD: u16 = 1232;
/// Without EDNS (RFC 1035).
const PLAIN_PAYLOAD: u16 = 512;
const HEADER_BYTES: usize = 12;

/// How a question came.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Transport {
    Udp,
    Tcp,
}

/// What the asker's EDNS says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AskerEdns {
    pub payload: u16,
    pub dnssec_ok: bool,
}

/// A question that is well formed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Question {
    pub id: u16,
    pub query: Query,
    pub recursion_desired: bool,
    pub checking_disabled: bool,
    pub edns: Option<AskerEdns>,
}

/// How a packet was dealt with: a metric label.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    Answered,
    NoData,
    NxDomain,
    Refused,
    Malformed,
}

/// What is to be done about a packet.
#[derive(Debug)]
pub enum Handled {
    /// It gets no answer.
    Drop,
    Reply(Vec<u8>, Outcome),
    Forward(Question),
}

/// Deals with one packet. `forwards`: questions about other names have somebody to go to.
pub fn handle(table: &NameTable, packet: &[u8], transport: Transport, forwards: bool) -> Handled {
    let question = match read(packet) {
        Ok(question) => question,
        Err(None) => return Handled::Drop,
        Err(Some(reply)) => {
            let outcome = match reply.metadata.response_code {
                ResponseCode::FormErr => Outcome::Malformed,
                _ => Outcome::Refused,
            };
            return reply.to_vec().map_or(Handled::Drop, |bytes| Handled::Reply(bytes, outcome));
        }
    };
    let query = &question.query;
    let turn = usize::from(question.id);
    let reply = match answer(table, query.name(), query.query_class(), query.query_type(), turn) {
        Answer::Reply(reply) => reply,
        // Recursion is all that is offered for other names, zone transfers never.
        Answer::Forward if forwards && question.recursion_desired && is_forwarded(query) => {
            return Handled::Forward(question);
        }
        Answer::Forward => Reply::refused(ResponseCode::Refused),
    };
    let outcome = match reply.code {
        ResponseCode::NXDomain => Outcome::NxDomain,
        ResponseCode::NoError if reply.answers.is_empty() => Outcome::NoData,
        ResponseCode::NoError => Outcome::Answered,
        _ => Outcome::Refused,
    };
    let mut message = question.reply(reply.code, forwards);
    message.metadata.authoritative = reply.code != ResponseCode::Refused;
    (message.answers, message.authorities, message.additionals) =
        (reply.answers, reply.authorities, reply.additionals);
    match fitting(message, question.limit(transport)) {
        Some(bytes) => Handled::Reply(bytes, outcome),
        None => Handled::Drop,
    }
}

fn is_forwarded(query: &Query) -> bool {
    query.query_class() == DNSClass::IN && !matches!(query.query_type(), RecordType::AXFR | RecordType::IXFR)
}

impl Question {
    /// The start of a reply to it.
    pub fn reply(&self, code: ResponseCode, recursion_available: bool) -> Message {
        let mut message = Message::response(self.id, OpCode::Query);
        message.metadata.response_code = code;
        message.metadata.recursion_desired = self.recursion_desired;
        message.metadata.checking_disabled = self.checking_disabled;
        message.metadata.recursion_available = recursion_available;
        message.add_query(self.query.clone());
        message.edns = self.edns.map(|asked| own_edns(asked.dnssec_ok));
        message
    }

    /// How many bytes a reply may have.
    pub fn limit(&self, transport: Transport) -> usize {
        match (transport, self.edns) {
            (Transport::Tcp, _) => u16::MAX.into(),
            (Transport::Udp, None) => PLAIN_PAYLOAD.into(),
            (Transport::Udp, Some(edns)) => edns.payload.clamp(PLAIN_PAYLOAD, UDP_PAYLOAD).into(),
        }
    }
}

/// What is said of ourselves.
pub fn own_edns(dnssec_ok: bool) -> Edns {
    let mut edns = Edns::new();
    edns.set_max_payload(UDP_PAYLOAD).set_version(0).set_dnssec_ok(dnssec_ok);
    edns
}

/// Reads a question; the error is what is answered, if anything.
fn read(packet: &[u8]) -> Result<Question, Option<Message>> {
    let header = packet.get(..HEADER_BYTES).and_then(|bytes| Header::read(&mut BinDecoder::new(bytes)).ok());
    let Some(header) = header.filter(|header| header.metadata.message_type == MessageType::Query) else {
        return Err(None);
    };
    let metadata = header.metadata;
    let error = |code| Some(Message::error_msg(metadata.id, metadata.op_code, code));
    if metadata.op_code != OpCode::Query {
        return Err(error(ResponseCode::NotImp));
    }
    // Queries carry nothing but a question and what belongs to EDNS or a signature: no need to look at a flood of records.
    let counts = header.counts;
    if counts.queries != 1 || counts.answers != 0 || counts.authorities != 0 || counts.additionals > 2 {
        return Err(error(ResponseCode::FormErr));
    }
    let message = Message::from_vec(packet).map_err(|_| error(ResponseCode::FormErr))?;
    let Some(query) = message.queries.into_iter().next() else { return Err(error(ResponseCode::FormErr)) };
    let edns = message.edns.as_ref();
    let question = Question {
        id: metadata.id,
        query,
        recursion_desired: metadata.recursion_desired,
        checking_disabled: metadata.checking_disabled,
        edns: edns.map(|edns| AskerEdns { payload: edns.max_payload(), dnssec_ok: edns.flags().dnssec_ok }),
    };
    if edns.is_some_and(|edns| edns.version() != 0) {
        return Err(Some(question.reply(ResponseCode::BADVERS, false)));
    }
    Ok(question)
}

/// A reply as bytes that fit; `None` when not even its question does.
pub fn fitting(mut message: Message, limit: usize) -> Option<Vec<u8>> {
    let whole = message.to_vec().ok()?;
    if whole.len() <= limit {
        return Some(whole);
    }
    if !message.additionals.is_empty() {
        message.additionals.clear();
        let without = message.to_vec().ok()?;
        if without.len() <= limit {
            return Some(without);
        }
    }
    let truncated = message.truncate().to_vec().ok()?;
    (truncated.len() <= limit).then_some(truncated)
}

#[cfg(test)]
mod tests;
