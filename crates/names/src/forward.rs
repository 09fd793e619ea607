//! Questions about other names: from the cache, or from an upstream resolver, each asked there once however many wait.
//!
//! Who waits holds a slot: of all of them and of its own address, so that one asker's flood leaves room for the others
//! and none fills the memory; beyond, it is refused at once. Equal questions wait for one exchange. That also bounds a
//! loop of forwarders that was not found yet: a question that comes back joins the one that it comes from.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::{DNSClass, Name, RecordType};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::cache::{Cache, CacheKey};
use crate::exchange::{Asked, FIRST_PATIENCE, SECOND_PATIENCE, exchange};
use crate::message::{Question, Transport, fitting};
use crate::metrics::{Metrics, Sought};
use crate::upstream::Upstreams;

/// Questions that wait for upstreams: each is a task of some 2 KB and, where nobody asked the same, a socket.
const MAX_WAITING: usize = 1024;
/// Of one asker: a machine's applications share its address with its resolver, so it is generous.
const MAX_WAITING_OF_ONE: u32 = 256;
/// glibc asks again after 5 s: by then it has heard.
const DEADLINE: Duration = Duration::from_secs(4);
/// Some thousand replies of usual size.
pub const CACHE_BYTES: usize = 2 * 1024 * 1024;
/// Between looks for loops.
const PROBE_EVERY: Duration = Duration::from_secs(300);

type Answered = Option<Arc<Message>>;
type Exchange = Shared<BoxFuture<'static, Answered>>;

/// Forwards questions; clones share everything.
#[derive(Clone)]
pub struct Forwarder {
    state: Arc<Mutex<State>>,
    slots: Arc<Semaphore>,
    metrics: Metrics,
    origin: Instant,
}

struct State {
    upstreams: Upstreams,
    cache: Cache,
    running: HashMap<CacheKey, Exchange>,
    waiting: HashMap<IpAddr, u32>,
}

/// A place among those that wait.
pub struct Slot {
    state: Arc<Mutex<State>>,
    asker: IpAddr,
    _permit: OwnedSemaphorePermit,
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut state = lock(&self.state);
        let left = state.waiting.get_mut(&self.asker).map_or(0, |count| {
            *count = count.saturating_sub(1);
            *count
        });
        if left == 0 {
            state.waiting.remove(&self.asker);
        }
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What can be said about a question at once.
pub enum Begun {
    Reply(Vec<u8>),
    /// [`Forwarder::finish`] has the reply later.
    Wait(Slot),
}

impl Forwarder {
    pub fn new(upstreams: Upstreams, metrics: Metrics) -> Self {
        let state = State {
            upstreams,
            cache: Cache::new(CACHE_BYTES),
            running: HashMap::new(),
            waiting: HashMap::new(),
        };
        Self {
            state: Arc::new(Mutex::new(state)),
            slots: Arc::new(Semaphore::new(MAX_WAITING)),
            metrics,
            origin: Instant::now(),
        }
    }

    /// Whether there is anybody to ask.
    pub fn forwards(&self) -> bool {
        !lock(&self.state).upstreams.is_empty()
    }

    fn now(&self) -> Duration {
        self.origin.elapsed()
    }

    /// Answers from the cache, or finds a place to wait.
    pub fn begin(&self, question: &Question, asker: IpAddr, transport: Transport) -> Begun {
        let mut state = lock(&self.state);
        if let Some(upstream) = state.upstreams.recognise(question.query.name().iter()) {
            tracing::error!(%upstream,
                "this upstream resolver forwards back to us: it is not asked until that ends; give another --dns-upstream");
            self.metrics.sought(Sought::Loop);
            return Begun::Reply(failure(question, ResponseCode::Refused, transport));
        }
        if let Some(known) = state.cache.get(&key(question), self.now()) {
            self.metrics.sought(Sought::Cached);
            return Begun::Reply(reply(question, &known, transport));
        }
        let waiting = state.waiting.get(&asker).copied().unwrap_or(0);
        let permit = Arc::clone(&self.slots).try_acquire_owned();
        match permit {
            Ok(permit) if waiting < MAX_WAITING_OF_ONE => {
                state.waiting.insert(asker, waiting + 1);
                Begun::Wait(Slot { state: Arc::clone(&self.state), asker, _permit: permit })
            }
            _ => {
                self.metrics.sought(Sought::Shed);
                Begun::Reply(failure(question, ResponseCode::ServFail, transport))
            }
        }
    }

    /// The reply to a question that waits.
    pub async fn finish(&self, question: &Question, transport: Transport, slot: Slot) -> Vec<u8> {
        let exchange = self.exchange(question);
        let answered = exchange.await;
        drop(slot);
        match answered {
            Some(message) => {
                self.metrics.sought(Sought::Upstream);
                reply(question, &message, transport)
            }
            None => {
                self.metrics.sought(Sought::Failed);
                failure(question, ResponseCode::ServFail, transport)
            }
        }
    }

    /// The exchange that this question is asked by: one that runs, or a new one.
    fn exchange(&self, question: &Question) -> Exchange {
        let key = key(question);
        let mut state = lock(&self.state);
        if let Some(running) = state.running.get(&key) {
            return running.clone();
        }
        let asked = Asked {
            query: question.query.clone(),
            dnssec_ok: key.dnssec_ok,
            checking_disabled: key.checking_disabled,
        };
        let (forwarder, cached_as) = (self.clone(), key.clone());
        let exchange = async move {
            // Whoever began it may go away: then it ends with the last that waits, and its place is cleared here.
            let _place = Place { state: Arc::clone(&forwarder.state), key: cached_as.clone() };
            forwarder.ask(asked, cached_as).await
        };
        let exchange = exchange.boxed().shared();
        state.running.insert(key, exchange.clone());
        exchange
    }

    async fn ask(&self, asked: Asked, key: CacheKey) -> Answered {
        let deadline = self.now() + DEADLINE;
        let mut said = None;
        for patience in [FIRST_PATIENCE, SECOND_PATIENCE] {
            let plan = lock(&self.state).upstreams.plan(self.now());
            for upstream in plan {
                let left = deadline.saturating_sub(self.now());
                if left.is_zero() {
                    return None;
                }
                let sent = self.now();
                match exchange(upstream, &asked, patience.min(left)).await {
                    Ok(message) => {
                        if lock(&self.state).upstreams.worked(upstream, self.now()) {
                            tracing::info!(%upstream, "an upstream resolver answers again");
                        }
                        // It has nothing to say about the name; the next one may.
                        let code = message.metadata.response_code;
                        if matches!(code, ResponseCode::ServFail | ResponseCode::Refused) {
                            said = Some(Arc::new(message));
                            continue;
                        }
                        self.keep(key, &message);
                        return Some(Arc::new(message));
                    }
                    Err(error) => {
                        self.metrics.sought(Sought::Unanswered);
                        let failure = error.failure();
                        if lock(&self.state).upstreams.failed(upstream, failure, sent, self.now()) {
                            tracing::warn!(%upstream, %error, "an upstream resolver does not answer");
                        }
                    }
                }
            }
            if said.is_some() {
                return said;
            }
        }
        None
    }

    fn keep(&self, key: CacheKey, message: &Message) {
        if let Ok(bytes) = message.to_vec() {
            let mut state = lock(&self.state);
            state.cache.put(key, message, &bytes, self.now());
            self.metrics.cache(state.cache.len(), state.cache.used_bytes());
        }
    }

    /// Looks for loops at the start and every five minutes: each upstream is asked for a name that only we know.
    pub async fn probe(self) {
        loop {
            let probes = lock(&self.state).upstreams.probe();
            for (upstream, labels) in probes {
                let Ok(name) = Name::from_labels(labels) else { continue };
                let query = hickory_proto::op::Query::query(name, RecordType::TXT);
                let asked = Asked { query, dnssec_ok: false, checking_disabled: false };
                // Only whether it comes back counts.
                let _ = exchange(upstream, &asked, FIRST_PATIENCE).await;
            }
            tokio::time::sleep(PROBE_EVERY).await;
        }
    }

    /// Of upstreams, for the log.
    pub fn upstreams(&self) -> Vec<SocketAddr> {
        lock(&self.state).upstreams.addresses().collect()
    }
}

/// An exchange among those that run.
struct Place {
    state: Arc<Mutex<State>>,
    key: CacheKey,
}

impl Drop for Place {
    fn drop(&mut self) {
        let running = lock(&self.state).running.remove(&self.key);
        // Outside the lock: it may be the last that holds the future.
        drop(running);
    }
}

fn key(question: &Question) -> CacheKey {
    debug_assert_eq!(question.query.query_class(), DNSClass::IN);
    CacheKey {
        name: question.query.name().clone().into(),
        kind: question.query.query_type(),
        dnssec_ok: question.edns.is_some_and(|edns| edns.dnssec_ok),
        checking_disabled: question.checking_disabled,
    }
}

/// An upstream's reply, as one to this question.
fn reply(question: &Question, said: &Message, transport: Transport) -> Vec<u8> {
    let mut message = question.reply(said.metadata.response_code, true);
    message.metadata.authentic_data = said.metadata.authentic_data;
    (message.answers, message.authorities, message.additionals) =
        (said.answers.clone(), said.authorities.clone(), said.additionals.clone());
    fitting(message, question.limit(transport))
        .unwrap_or_else(|| failure(question, ResponseCode::ServFail, transport))
}

/// A failure as a reply; a question that was read can always be written again.
fn failure(question: &Question, code: ResponseCode, transport: Transport) -> Vec<u8> {
    fitting(question.reply(code, true), question.limit(transport)).unwrap_or_default()
}
