//! Asks each endpoint when it is due, a few at a time, and gives the core what came of it. One task; it ends with the core.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use rustls::ClientConfig;
use std::sync::Arc;
use tokio::time::Instant;
use tombolo_identity::foreign::tls;
use tombolo_identity::{SpiffeId, TrustDomain};
use tombolo_model::resource::trust_domain_federation::EndpointUrl;

use super::client::{FetchError, Patience, WebRoots, fetch};
use super::{Federation, schedule};
use crate::core::CoreHandle;
use crate::facts::Facts;

/// Fetches at a time: one that hangs takes twenty seconds, and a few do not keep the others waiting.
const AT_A_TIME: usize = 4;
/// Facts change 300 times a second; objects are applied by hand.
const PACE: Duration = Duration::from_millis(250);
/// Looked at in any case.
const LOOK: Duration = Duration::from_secs(60);

/// What one trust domain's endpoint is asked with: another object, or another generation of it, is asked at once.
#[derive(Clone, PartialEq, Eq)]
struct Asked {
    uid: String,
    generation: u64,
}

impl Asked {
    fn of(federation: &Federation) -> Self {
        Self { uid: federation.uid.clone(), generation: federation.generation }
    }
}

struct Plan {
    asked: Asked,
    due: Instant,
    failures: u32,
    under_way: bool,
}

/// Federates with whom the facts say. Until the core is gone.
pub struct FederationTask {
    pub core: CoreHandle,
    pub web_roots: WebRoots,
    pub patience: Patience,
}

type Fetched = (TrustDomain, Asked, Result<Bytes, FetchError>);

impl FederationTask {
    pub async fn run(self) {
        let mut facts = self.core.watch();
        let mut plans: BTreeMap<TrustDomain, Plan> = BTreeMap::new();
        let mut fetches: FuturesUnordered<BoxFuture<'static, Fetched>> = FuturesUnordered::new();
        loop {
            let current = facts.borrow_and_update().clone();
            adjust(&mut plans, &current);
            let now = Instant::now();
            let due = plans.iter_mut().filter(|(_, plan)| !plan.under_way && plan.due <= now);
            for (domain, plan) in due.take(AT_A_TIME.saturating_sub(fetches.len())) {
                if let Some(federation) = current.federations.get(domain) {
                    plan.under_way = true;
                    fetches.push(self.begin(federation, &current));
                }
            }
            let next = plans.values().filter(|plan| !plan.under_way).map(|plan| plan.due).min();
            let next = next.filter(|_| fetches.len() < AT_A_TIME).unwrap_or(now + LOOK);
            tokio::select! {
                changed = async {
                    let changed = facts.changed().await;
                    tokio::time::sleep(PACE).await;
                    changed
                } => if changed.is_err() {
                    return;
                },
                Some((domain, asked, fetched)) = fetches.next() => {
                    let failed = self.give(&domain, &asked, fetched).await;
                    let Some(plan) = plans.get_mut(&domain) else { continue };
                    plan.under_way = false;
                    // After a change meanwhile it is due at once.
                    if plan.asked == asked {
                        plan.failures = if failed { plan.failures.saturating_add(1) } else { 0 };
                        if let Some(federation) = self.core.facts().federations.get(&domain) {
                            plan.due = Instant::now() + schedule::next(federation, plan.failures, rand::random());
                        }
                    }
                }
                () = tokio::time::sleep_until(next) => {}
            }
        }
    }

    fn begin(&self, federation: &Federation, facts: &Facts) -> BoxFuture<'static, Fetched> {
        let prepared = prepare(federation, facts, &self.web_roots);
        let (domain, asked, patience) =
            (federation.trust_domain.clone(), Asked::of(federation), self.patience);
        Box::pin(async move {
            let fetched = match prepared {
                Ok((url, tls)) => fetch(&url, tls, patience).await,
                Err(error) => Err(error),
            };
            (domain, asked, fetched)
        })
    }

    /// Whether it failed.
    async fn give(&self, domain: &TrustDomain, asked: &Asked, fetched: Result<Bytes, FetchError>) -> bool {
        let (domain, asked) = (domain.clone(), asked.clone());
        let fetched = fetched.map_err(|error| (error.kind(), error.to_string()));
        let given = self.core.call(move |core, moment| {
            core.bundle_fetched(&domain, (&asked.uid, asked.generation), fetched, moment)
        });
        !given.await.unwrap_or(false)
    }
}

/// Plans for whom the facts know, and for nobody else.
fn adjust(plans: &mut BTreeMap<TrustDomain, Plan>, facts: &Facts) {
    plans.retain(|domain, _| facts.federations.get(domain).is_some_and(|federation| federation.in_force));
    for federation in facts.federations.values().filter(|federation| federation.in_force) {
        let asked = Asked::of(federation);
        let fresh = || Plan { asked: asked.clone(), due: Instant::now(), failures: 0, under_way: false };
        let plan = plans.entry(federation.trust_domain.clone()).or_insert_with(fresh);
        if plan.asked != asked {
            // One that is under way is of no interest any more, but its place is taken until it ends.
            *plan = Plan { under_way: plan.under_way, ..fresh() };
        }
    }
}

/// Where to ask, and whom to believe there.
fn prepare(
    federation: &Federation,
    facts: &Facts,
    web_roots: &WebRoots,
) -> Result<(EndpointUrl, Arc<ClientConfig>), FetchError> {
    let spec = &federation.spec;
    let wrong = |text: String| FetchError::Spec(text);
    let url = EndpointUrl::parse(&spec.bundle_endpoint_url)
        .map_err(|expected| wrong(format!("bundleEndpointURL: give {expected}")))?;
    let no_tls = |error: rustls::Error| FetchError::Tls(error.to_string());
    if !spec.is_https_spiffe() {
        return Ok((url, tls::https_web_client(web_roots.load()?).map_err(no_tls)?));
    }
    let id = spec.bundle_endpoint_profile.endpoint_spiffe_id.as_deref().unwrap_or_default();
    let id: SpiffeId = id.parse().map_err(|e| wrong(format!("endpointSPIFFEID: {e}")))?;
    let of = id.trust_domain();
    let bundle = facts.federations.get(&of).and_then(|federation| federation.bundle.clone());
    let bundle = bundle.ok_or_else(|| FetchError::NoBundle(of.to_string()))?;
    if bundle.roots().is_empty() {
        return Err(FetchError::Revoked(of.to_string()));
    }
    Ok((url, tls::https_spiffe_client(bundle, id).map_err(no_tls)?))
}
