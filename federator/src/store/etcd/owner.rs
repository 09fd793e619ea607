//! Who owns the store: a key on a lease. Whoever makes it while there is none is the owner until the lease ends.
//!
//! While etcd can't be reached nobody else can become the owner either, so the owner stays; when it is back and the lease has
//! ended meanwhile, it is taken again unless another has been faster.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Duration;

use etcd_client::{
    Client, Compare, CompareOp, Error, KeyValue, PutOptions, Txn, TxnOp, TxnOpResponse, TxnResponse,
};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::EtcdConfig;
use super::keys::Layout;

/// Who stands by looks this often.
const LOOK: Duration = Duration::from_millis(500);
const SAID: Duration = Duration::from_secs(60);
const LAST_WORD: Duration = Duration::from_secs(1);

/// The owner that a refused transaction found.
pub(super) struct Found {
    pub(super) name: String,
    /// At which it became the owner.
    pub(super) revision: i64,
    lease: i64,
}

/// From the answer to a transaction whose last resort was to read the owner's key.
pub(super) fn found(answer: &TxnResponse) -> Option<Found> {
    answer.op_responses().into_iter().find_map(|response| match response {
        TxnOpResponse::Get(get) => get.kvs().first().map(|kv| Found {
            name: String::from_utf8_lossy(kv.value()).into_owned(),
            revision: kv.create_revision(),
            lease: kv.lease(),
        }),
        _ => None,
    })
}

/// What this process knows of its ownership.
pub(super) struct Ownership {
    name: String,
    lease_time: Duration,
    revision: AtomicI64,
    lease: AtomicI64,
    /// Revision of the last commit.
    sequence: AtomicI64,
    heard: AtomicBool,
    lost: watch::Sender<Option<String>>,
    resigning: Notify,
    resigned: Mutex<Option<tokio::sync::oneshot::Sender<()>>>,
}

impl Ownership {
    fn new(config: &EtcdConfig, held: &Held) -> Self {
        Self {
            name: config.owner.clone(),
            lease_time: config.lease,
            revision: held.revision.into(),
            lease: held.lease.into(),
            sequence: AtomicI64::new(0),
            heard: AtomicBool::new(true),
            lost: watch::Sender::new(None),
            resigning: Notify::new(),
            resigned: Mutex::new(None),
        }
    }
    pub(super) fn name(&self) -> &str {
        &self.name
    }
    pub(super) fn revision(&self) -> i64 {
        self.revision.load(Ordering::Acquire)
    }
    pub(super) fn sequence(&self) -> i64 {
        self.sequence.load(Ordering::Acquire)
    }
    pub(super) fn set_sequence(&self, revision: i64) {
        self.sequence.store(revision, Ordering::Release);
    }
    pub(super) fn is_heard(&self) -> bool {
        self.heard.load(Ordering::Relaxed)
    }
    /// Whether etcd is heard; else the owner that has taken over, if that is why.
    pub(super) fn check(&self) -> Result<(), Option<String>> {
        if self.is_heard() { Ok(()) } else { Err(self.lost.borrow().clone()) }
    }
    pub(super) fn lost(&self) -> watch::Receiver<Option<String>> {
        self.lost.subscribe()
    }
    pub(super) fn lose(&self, to: String) {
        self.heard.store(false, Ordering::Relaxed);
        self.lost.send_replace(Some(to));
    }

    /// Ends the lease, and waits for that.
    pub(super) async fn resign(&self) {
        let (done, resigned) = tokio::sync::oneshot::channel();
        *self.resigned.lock().unwrap_or_else(PoisonError::into_inner) = Some(done);
        self.resigning.notify_one();
        let _ = tokio::time::timeout(LAST_WORD, resigned).await;
    }

    pub(super) async fn release(&self, mut client: Client) {
        let lease = self.lease.load(Ordering::Acquire);
        let _ = tokio::time::timeout(LAST_WORD, client.lease_revoke(lease)).await;
    }
}

struct Held {
    revision: i64,
    lease: i64,
}

/// One attempt; the owner that is there otherwise. `sequence`: only if nobody has written since.
async fn attempt(
    client: &mut Client,
    layout: &Layout,
    name: &str,
    time: Duration,
    sequence: Option<i64>,
) -> Result<Result<Held, Option<Found>>, Error> {
    let seconds = i64::try_from(time.as_secs()).unwrap_or(i64::MAX).max(1);
    let lease = client.lease_grant(seconds, None).await?.id();
    let mut when = vec![Compare::create_revision(layout.owner(), CompareOp::Equal, 0)];
    if let Some(sequence) = sequence {
        when.push(Compare::mod_revision(layout.sequence(), CompareOp::Equal, sequence));
    }
    let put = TxnOp::put(layout.owner(), name, Some(PutOptions::new().with_lease(lease)));
    let get = TxnOp::get(layout.owner(), None);
    let answer = client.txn(Txn::new().when(when).and_then([put]).or_else([get])).await?;
    if answer.succeeded() {
        let revision = answer.header().map_or(0, etcd_client::ResponseHeader::revision);
        return Ok(Ok(Held { revision, lease }));
    }
    let _ = client.lease_revoke(lease).await;
    match found(&answer) {
        // An earlier attempt of this process whose answer was lost.
        Some(owner) if owner.name == name => Ok(Ok(Held { revision: owner.revision, lease: owner.lease })),
        other => Ok(Err(other)),
    }
}

/// Waits until this federator is the owner.
pub(super) async fn campaign(
    mut client: Client,
    layout: &Layout,
    config: &EtcdConfig,
) -> Result<Ownership, Error> {
    let mut said: Option<(String, Instant)> = None;
    loop {
        let there = client.get(layout.owner(), None).await?;
        let owner = match there.kvs().first() {
            Some(owner) if owner.value() != config.owner.as_bytes() => {
                Some(String::from_utf8_lossy(owner.value()).into_owned())
            }
            _ => match attempt(&mut client, layout, &config.owner, config.lease, None).await? {
                Ok(held) => {
                    if said.is_some() {
                        tracing::info!("this federator takes over");
                    }
                    return Ok(Ownership::new(config, &held));
                }
                Err(other) => other.map(|owner| owner.name),
            },
        };
        if let Some(owner) = owner {
            let again = said.as_ref().is_none_or(|(name, at)| *name != owner || at.elapsed() > SAID);
            if again {
                tracing::info!(%owner, "standing by: another federator of this cluster works");
                said = Some((owner, Instant::now()));
            }
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Keeps the lease while the store is read; why it can't.
pub(super) async fn refresh(mut client: Client, ownership: &Ownership) -> Error {
    loop {
        if let Err(error) = client.lease_keep_alive(ownership.lease.load(Ordering::Acquire)).await {
            return error;
        }
        tokio::time::sleep(ownership.lease_time / 3).await;
    }
}

/// Keeps the lease until it is lost to another or given up.
pub(super) async fn keep(mut client: Client, ownership: std::sync::Arc<Ownership>, layout: &Layout) {
    // Until silence is noticed the core's thread may wait for an answer.
    let turn = (ownership.lease_time / 3).min(super::PATIENCE);
    loop {
        tokio::select! {
            () = tokio::time::sleep(turn) => {}
            () = ownership.resigning.notified() => {
                ownership.release(client).await;
                let done = ownership.resigned.lock().unwrap_or_else(PoisonError::into_inner).take();
                let _ = done.map(|done| done.send(()));
                return;
            }
        }
        let lease = ownership.lease.load(Ordering::Acquire);
        let answer = tokio::time::timeout(turn, async {
            // A stream of its own each time: it says at once when the lease is gone.
            match client.lease_keep_alive(lease).await {
                Ok(_) if !is_there(&mut client, layout).await? => {
                    retake(&mut client, &ownership, layout).await
                }
                Ok(_) => Ok(true),
                Err(Error::LeaseKeepAliveError(_)) => retake(&mut client, &ownership, layout).await,
                Err(error) => Err(error),
            }
        });
        match answer.await {
            Ok(Ok(true)) => {
                if !ownership.heard.swap(true, Ordering::Relaxed) {
                    tracing::info!("etcd is there again");
                }
            }
            Ok(Ok(false)) => return,
            Ok(Err(error)) => silent(&ownership, &error.to_string()),
            Err(_) => silent(&ownership, "no answer"),
        }
    }
}

/// Whether anybody owns the store: the key may have been removed by hand.
async fn is_there(client: &mut Client, layout: &Layout) -> Result<bool, Error> {
    Ok(!client.get(layout.owner(), None).await?.kvs().is_empty())
}

fn silent(ownership: &Ownership, error: &str) {
    if ownership.heard.swap(false, Ordering::Relaxed) {
        tracing::warn!(error, "etcd does not answer: nothing can be written until it does");
    }
}

/// Takes a lease that has ended again; false: somebody else was faster, or has written.
async fn retake(client: &mut Client, ownership: &Ownership, layout: &Layout) -> Result<bool, Error> {
    let again = async |client: &mut Client, sequence| {
        attempt(client, layout, &ownership.name, ownership.lease_time, Some(sequence)).await
    };
    let mut attempted = again(client, ownership.sequence()).await?;
    if let Err(None) = attempted {
        let last = client.get(layout.sequence(), None).await?;
        let own = last.kvs().first().filter(|last| last.value() == ownership.name.as_bytes());
        // A commit of ours that got no answer: the next one undoes it.
        if let Some(own) = own.map(KeyValue::mod_revision).filter(|own| *own != ownership.sequence()) {
            attempted = again(client, own).await?;
        }
    }
    match attempted {
        Ok(held) => {
            ownership.revision.store(held.revision, Ordering::Release);
            ownership.lease.store(held.lease, Ordering::Release);
            tracing::warn!("the lease had ended; nobody had taken over, so this federator goes on");
            Ok(true)
        }
        Err(owner) => {
            ownership.lose(owner.map_or_else(|| "another federator".to_owned(), |owner| owner.name));
            Ok(false)
        }
    }
}
