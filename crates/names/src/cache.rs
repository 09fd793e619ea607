//! What upstream resolvers said, for as long as they said it holds (pure, time passed in).
//!
//! Replies are kept as bytes, so that their memory is known: the oldest go when it is used up. Positive answers live as
//! long as their shortest TTL, negative ones as RFC 2308 has it, both within bounds; failures are not kept
//! ([`crate::upstream`] remembers who fails).

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::{LowerName, RData, RecordType};

/// A name that moves is found again within the hour, whatever its zone says.
const LONGEST: Duration = Duration::from_secs(3600);
/// RFC 2308 section 5 asks for one to three hours at most; names that appear are waited for.
const LONGEST_NEGATIVE: Duration = Duration::from_secs(300);
/// Larger replies are rare and would push out hundreds of others.
const LARGEST_REPLY_BYTES: usize = 8 * 1024;
/// Of a key, an entry and its place in both collections, beside the reply's bytes.
const OVERHEAD_BYTES: usize = 300;

/// What a cached reply answers: replies to askers that verify signatures carry more.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct CacheKey {
    pub name: LowerName,
    pub kind: RecordType,
    pub dnssec_ok: bool,
    pub checking_disabled: bool,
}

#[derive(Debug)]
struct Entry {
    reply: Box<[u8]>,
    stored: Duration,
    until: Duration,
    /// Which of the places in the order is its own.
    number: u64,
}

/// A bounded cache of replies.
#[derive(Debug)]
pub struct Cache {
    entries: HashMap<CacheKey, Entry>,
    /// Oldest first; a place whose number is not the entry's any more is empty.
    order: VecDeque<(u64, CacheKey)>,
    next: u64,
    used_bytes: usize,
    limit_bytes: usize,
}

impl Cache {
    /// Holds `limit_bytes` at most.
    pub fn new(limit_bytes: usize) -> Self {
        Self { entries: HashMap::new(), order: VecDeque::new(), next: 0, used_bytes: 0, limit_bytes }
    }
    pub fn len(&self) -> usize {
        self.entries.len()
    }
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
    pub fn used_bytes(&self) -> usize {
        self.used_bytes
    }

    /// A reply that still holds, its TTLs aged.
    pub fn get(&self, key: &CacheKey, now: Duration) -> Option<Message> {
        let entry = self.entries.get(key).filter(|entry| now < entry.until)?;
        let mut message = Message::from_vec(&entry.reply).ok()?;
        let age = u32::try_from(now.saturating_sub(entry.stored).as_secs()).unwrap_or(u32::MAX);
        let sections = [&mut message.answers, &mut message.authorities, &mut message.additionals];
        for record in sections.into_iter().flatten() {
            record.ttl = record.ttl.saturating_sub(age);
        }
        Some(message)
    }

    /// Keeps a reply, if it may be kept.
    pub fn put(&mut self, key: CacheKey, message: &Message, reply: &[u8], now: Duration) {
        let Some(lifetime) = lifetime(message) else { return };
        if reply.len() > LARGEST_REPLY_BYTES {
            return;
        }
        self.forget(&key);
        let cost = reply.len() + OVERHEAD_BYTES;
        while self.used_bytes + cost > self.limit_bytes {
            let Some((number, oldest)) = self.order.pop_front() else { return };
            if self.entries.get(&oldest).is_some_and(|entry| entry.number == number) {
                self.forget(&oldest);
            }
        }
        let number = self.next;
        self.next += 1;
        self.order.push_back((number, key.clone()));
        let entry = Entry { reply: reply.into(), stored: now, until: now + lifetime, number };
        self.entries.insert(key, entry);
        self.used_bytes += cost;
        // Places that replaced entries have left: never more than there are entries.
        if self.order.len() > 2 * self.entries.len() + 64 {
            let entries = &self.entries;
            self.order.retain(|(number, key)| entries.get(key).is_some_and(|entry| entry.number == *number));
        }
    }

    fn forget(&mut self, key: &CacheKey) {
        if let Some(entry) = self.entries.remove(key) {
            self.used_bytes = self.used_bytes.saturating_sub(entry.reply.len() + OVERHEAD_BYTES);
        }
    }
}

/// How long a reply holds; `None`: it is not kept.
fn lifetime(message: &Message) -> Option<Duration> {
    let seconds = |ttl: u32| Duration::from_secs(ttl.into());
    if message.metadata.truncation {
        return None;
    }
    let lifetime = match message.metadata.response_code {
        ResponseCode::NoError if !message.answers.is_empty() => {
            let shortest = message.answers.iter().map(|record| record.ttl).min()?;
            seconds(shortest).min(LONGEST)
        }
        ResponseCode::NoError | ResponseCode::NXDomain => {
            let negative = |record: &hickory_proto::rr::Record| match &record.data {
                RData::SOA(soa) => Some(record.ttl.min(soa.minimum)),
                _ => None,
            };
            // A chain of CNAMEs that ends nowhere lives no longer than they do.
            let chain = message.answers.iter().map(|record| record.ttl);
            let soa = message.authorities.iter().find_map(negative)?;
            seconds(chain.fold(soa, u32::min)).min(LONGEST_NEGATIVE)
        }
        _ => return None,
    };
    (!lifetime.is_zero()).then_some(lifetime)
}

#[cfg(test)]
mod tests {
    use hickory_proto::op::{OpCode, Query};
    use hickory_proto::rr::rdata::{A, SOA};
    use hickory_proto::rr::{Name, Record};

    use super::*;

    const START: Duration = Duration::from_secs(1000);

    fn key(name: &str) -> CacheKey {
        let name: Name = name.parse().unwrap();
        CacheKey { name: name.into(), kind: RecordType::A, dnssec_ok: false, checking_disabled: false }
    }

    fn reply(name: &str, ttl: u32) -> Message {
        let name: Name = name.parse().unwrap();
        let mut message = Message::response(7, OpCode::Query);
        message.add_query(Query::query(name.clone(), RecordType::A));
        message.add_answer(Record::from_rdata(name, ttl, RData::A(A::new(192, 0, 2, 1))));
        message
    }

    fn negative(name: &str, ttl: u32, minimum: u32) -> Message {
        let mut message = reply(name, 1);
        message.answers.clear();
        message.metadata.response_code = ResponseCode::NXDomain;
        let zone: Name = "example.".parse().unwrap();
        let soa = SOA::new(zone.clone(), zone.clone(), 1, 2, 3, 4, minimum);
        message.add_authority(Record::from_rdata(zone, ttl, RData::SOA(soa)));
        message
    }

    fn put(cache: &mut Cache, name: &str, message: &Message) {
        cache.put(key(name), message, &message.to_vec().unwrap(), START);
    }

    fn at(seconds: u64) -> Duration {
        START + Duration::from_secs(seconds)
    }

    #[test]
    fn a_reply_lives_as_long_as_its_shortest_ttl_and_ages() {
        let mut cache = Cache::new(100_000);
        put(&mut cache, "a.example.", &reply("a.example.", 60));
        assert_eq!(cache.get(&key("A.Example."), at(20)).unwrap().answers[0].ttl, 40, "case does not matter");
        assert!(cache.get(&key("a.example."), at(60)).is_none());
        put(&mut cache, "b.example.", &reply("b.example.", 1_000_000));
        assert!(
            cache.get(&key("b.example."), at(3599)).is_some()
                && cache.get(&key("b.example."), at(3600)).is_none()
        );
        let signed = CacheKey { dnssec_ok: true, ..key("b.example.") };
        assert!(cache.get(&signed, at(1)).is_none(), "another reply");
    }

    #[test]
    fn negative_answers_live_by_their_soa_and_failures_not_at_all() {
        let mut cache = Cache::new(100_000);
        put(&mut cache, "a.example.", &negative("a.example.", 600, 30));
        assert!(
            cache.get(&key("a.example."), at(29)).is_some()
                && cache.get(&key("a.example."), at(30)).is_none()
        );
        put(&mut cache, "b.example.", &negative("b.example.", 9000, 9000));
        assert!(cache.get(&key("b.example."), at(300)).is_none());
        let mut bare = negative("c.example.", 60, 60);
        bare.authorities.clear();
        put(&mut cache, "c.example.", &bare);
        let mut failed = reply("d.example.", 60);
        failed.metadata.response_code = ResponseCode::ServFail;
        put(&mut cache, "d.example.", &failed);
        let mut cut = reply("e.example.", 60);
        cut.metadata.truncation = true;
        put(&mut cache, "e.example.", &cut);
        put(&mut cache, "f.example.", &reply("f.example.", 0));
        for name in ["c.example.", "d.example.", "e.example.", "f.example."] {
            assert!(cache.get(&key(name), at(0)).is_none(), "{name}");
        }
    }

    #[test]
    fn memory_is_bounded_and_the_oldest_go_first() {
        let mut cache = Cache::new(40_000);
        for index in 0..1000 {
            let name = format!("n{index}.example.");
            put(&mut cache, &name, &reply(&name, 60));
            assert!(cache.used_bytes() <= 40_000);
        }
        assert!((50..150).contains(&cache.len()), "{}", cache.len());
        assert!(
            cache.get(&key("n999.example."), at(1)).is_some()
                && cache.get(&key("n0.example."), at(1)).is_none()
        );
        for _ in 0..10_000 {
            put(&mut cache, "n999.example.", &reply("n999.example.", 60));
        }
        assert!(cache.order.len() < 500, "places of replaced entries pile up: {}", cache.order.len());
    }
}
