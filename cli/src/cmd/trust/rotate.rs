//! `tombolo trust rotate`: exchanges the root of the federation while everything runs.
//!
//! Three updates, each signed by the old and the new root and given to one federator, which passes it on: both roots are
//! trusted; every cluster's CA key is signed by the new root and SVIDs are renewed; the new root alone is trusted. None is
//! given out before every component of every cluster has acknowledged the one before. What is about to be done is on disk
//! before it is done, so that a run that was ended anywhere is continued by the next ([`state`]); who has acknowledged
//! what is decided in [`ledger`].

mod ledger;
mod page;
mod state;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use tombolo_identity::TrustBundle;
use tombolo_identity::authority::{ClusterMaterial, Protection, RootAuthority};
use tombolo_identity::rotation::{Reissued, TrustUpdate, spki_of};
use tombolo_model::names::ClusterName;
use tombolo_proto::v1;
use tombolo_runtime::clock;

use super::keys::{KeyArgs, Pair, SuccessorKey};
use super::{Place, cluster_dir, load, time_text};
use crate::admin_client::Admin;
use crate::args::{Connect, Format, Output};
use crate::cmd::confirm::{self, Consent};
use crate::demo::progress::Progress;
use crate::failure::{Exit, Failure};
use crate::output;
use ledger::Ledger;
pub use state::updates;
use state::{Rotation, Step};

/// Acknowledgements take a second; asking costs the federator a look at its tables.
const ASK_EVERY: Duration = Duration::from_millis(200);
/// A federator that is restarted is back within this, once its socket answers.
const AGAIN: Duration = Duration::from_millis(300);

#[derive(Debug, Args)]
pub struct RotateArgs {
    /// Go through all steps, waiting up to --timeout in each until everybody has acknowledged it
    #[arg(long)]
    wait: bool,
    /// After --timeout go on without those who have not acknowledged: they may be cut off
    #[arg(long, requires = "wait")]
    force: bool,
    /// Don't wait for this cluster, nor sign its key anew: it will need `tombolo trust cluster NAME --renew`
    #[arg(long, value_name = "CLUSTER")]
    without: Vec<ClusterName>,
    /// Show how far a rotation is and who has acknowledged what; change nothing
    #[arg(long, conflicts_with_all = ["wait", "yes", "dry_run"])]
    status: bool,
    #[command(flatten)]
    key: KeyArgs,
    #[command(flatten)]
    successor: SuccessorKey,
    #[command(flatten)]
    consent: Consent,
    #[command(flatten)]
    place: Place,
    #[command(flatten)]
    output: Output,
}

/// Clusters can't be made or renewed meanwhile: what the old root signs would be cut off with it.
pub fn refuse_while_under_way(dir: &Path) -> Result<(), Failure> {
    match Rotation::load(dir)? {
        None => Ok(()),
        Some(rotation) => Err(Failure::new(format_args!(
            "a rotation of the root is under way ({}, since {})",
            rotation.step.word(),
            rotation.started_at
        ))
        .remedy("finish it with `tombolo trust rotate --wait`, then try again")),
    }
}

pub async fn run(args: RotateArgs, connect: Connect) -> Result<Exit, Failure> {
    let RotateArgs { wait, force, without, status, key, successor, consent, place, output } = args;
    let Output { format } = output;
    let dir = place.resolve()?;
    let progress = Progress::new(false);
    let mut run = Run {
        dir,
        connect,
        without: without.into_iter().collect(),
        wait,
        force,
        key,
        successor,
        consent,
        progress,
    };
    if status {
        return run.status(format).await;
    }
    if consent.dry_run {
        return run.dry_run().await;
    }
    let done = run.drive(format).await;
    run.progress.finish();
    done
}

struct Run {
    dir: PathBuf,
    connect: Connect,
    without: BTreeSet<ClusterName>,
    wait: bool,
    force: bool,
    key: KeyArgs,
    successor: SuccessorKey,
    consent: Consent,
    progress: Progress,
}

impl Run {
    async fn drive(&mut self, format: Format) -> Result<Exit, Failure> {
        let (mut rotation, roots) = match Rotation::load(&self.dir)? {
            Some(rotation) => {
                let (step, since) = (rotation.step.word(), &rotation.started_at);
                self.progress.done(&format!("going on with the rotation of {since}: {step}"));
                let roots = (rotation.step != Step::Finishing).then(|| self.roots()).transpose()?;
                (rotation, roots)
            }
            None => {
                let (rotation, roots) = self.begin().await?;
                (rotation, Some(roots))
            }
        };
        if let Some(roots) = &roots
            && let Some(ended) = self.steps(&mut rotation, roots, format).await?
        {
            return Ok(ended);
        }
        let root = finish(&self.dir, &rotation)?;
        self.progress.done(&format!("the root is {}", rotation.new_root));
        self.progress.line(&format!(
            "the key of the old root is kept in {}: destroy it when nobody has to be led across any more",
            self.dir.join("retired").display()
        ));
        // What is shown is a courtesy: everything is done.
        if let Ok(answer) = self.ask().await {
            page::show(None, (&root, None), &self.ledger(&root, &answer), format)?;
        }
        Ok(Exit::Done)
    }

    /// Step by step. An exit code where the run ends before the last one is acknowledged.
    async fn steps(
        &mut self,
        rotation: &mut Rotation,
        roots: &Pair,
        format: Format,
    ) -> Result<Option<Exit>, Failure> {
        let mut given_out = false;
        while rotation.step != Step::Finishing {
            let update = match state::update(&self.dir, rotation.sequence())? {
                Some(update) => update,
                None => self.sign(rotation, roots).await?,
            };
            given_out |= self.give_out(&update).await?;
            let (ledger, lacking) = self.wait(rotation, roots).await?;
            if !lacking.is_empty() && !self.go_on_without(rotation, &lacking)? {
                page::show(Some(rotation), (&roots.old, Some(&roots.new)), &ledger, format)?;
                return self.unfinished(rotation, &lacking, given_out).map(Some);
            }
            let (done, all) = ledger.count(rotation);
            let (number, outcome) = (rotation.step.number(), rotation.step.outcome());
            self.progress.done(&format!("step {number} of 3: {done} of {all} {outcome}"));
            rotation.step = rotation.step.next();
            rotation.save(&self.dir)?;
        }
        Ok(None)
    }

    /// Both roots, while a rotation is under way; read once, since a key may cost a passphrase.
    fn roots(&self) -> Result<Pair, Failure> {
        self.key.open_pair(&self.dir, &RootAuthority::next_dir(&self.dir), &self.successor)
    }

    /// Makes the new root, and notes that there is a rotation.
    async fn begin(&mut self) -> Result<(Rotation, Pair), Failure> {
        let root = load(&self.dir)?;
        let answer = self.ask().await?;
        let known = answer.roots_der.iter().any(|der| der.as_slice() == root.certificate().as_ref());
        if !known {
            return Err(Failure::new(format_args!(
                "the federator of {} does not trust the root in {} ({})",
                answer.cluster,
                self.dir.display(),
                root.fingerprint()
            ))
            .remedy("name the directory of its root with --dir, or another federator with --context"));
        }
        let next = RootAuthority::next_dir(&self.dir);
        if next.exists() {
            // Of a run that ended before it was noted: nobody has heard of it.
            std::fs::remove_dir_all(&next)
                .map_err(|e| Failure::new(format_args!("can't remove {}: {e}", next.display())))?;
        }
        let now = clock::since_unix_epoch();
        let make = |protection: Protection<'_>| {
            RootAuthority::init_with(&next, root.trust_domain.clone(), protection, now).map_err(Failure::new)
        };
        let roots = self.key.succeed(&self.dir, &self.successor, make)?;
        let new = &roots.new;
        let first = root.bundle().sequence.max(answer.sequence).saturating_add(1);
        let started_at = time_text(clock::unix_seconds());
        let rotation = Rotation::new(root.fingerprint(), new.fingerprint(), first, started_at);
        rotation.save(&self.dir)?;
        self.progress.done(&format!("a new root is made: {}", rotation.new_root));
        Ok((rotation, roots))
    }

    /// Signs the update of a step and keeps it.
    async fn sign(&mut self, rotation: &Rotation, roots: &Pair) -> Result<Vec<u8>, Failure> {
        let Pair { old, new } = roots;
        let now = clock::since_unix_epoch();
        // Of the step before, or of the rotation before: clusters go on with what it brought until there is better.
        let before = state::update(&self.dir, rotation.sequence().saturating_sub(1))?;
        let before = before.map(|bytes| read(&bytes)).transpose()?;
        let mut crosses = before.as_ref().map(|before| before.crosses.clone()).unwrap_or_default();
        if rotation.step == Step::Staging {
            crosses.push(old.cross_sign(new.certificate(), now).map_err(Failure::new)?);
        }
        let intermediates = match (rotation.step, before) {
            (Step::Staging, before) => before.map(|before| before.intermediates).unwrap_or_default(),
            (Step::Reissuing, _) => self.reissue(old, new).await?,
            (_, Some(before)) => before.intermediates,
            (_, None) => {
                return Err(Failure::new(format_args!(
                    "{} lacks the update {}",
                    self.dir.join("updates").display(),
                    rotation.sequence().saturating_sub(1)
                ))
                .remedy("restore the root's directory from your backup, then run the command again"));
            }
        };
        let mut roots = vec![old.certificate().clone(), new.certificate().clone()];
        if rotation.step == Step::Retiring {
            roots.remove(0);
        }
        crosses.retain(|cross| roots.iter().any(|root| spki_of(root) == spki_of(cross)));
        let update = TrustUpdate {
            trust_domain: old.trust_domain.clone(),
            sequence: rotation.sequence(),
            roots,
            crosses,
            intermediates,
        };
        tombolo_identity::rotation::check_contents(&update, now).map_err(Failure::new)?;
        let bytes = RootAuthority::sign_update(&update, &[old, new]).map_err(Failure::new)?.to_bytes();
        state::keep_update(&self.dir, rotation.sequence(), &bytes)?;
        Ok(bytes)
    }

    /// Every cluster's CA key, signed by the new root: the certificate comes with the cluster's word, or, of one that is
    /// not heard, from where it was made.
    async fn reissue(&mut self, old: &RootAuthority, new: &RootAuthority) -> Result<Vec<Reissued>, Failure> {
        let now = clock::since_unix_epoch();
        let ledger = self.ledger(old, &self.ask().await?);
        let heard = ledger.intermediates();
        let mut made = BTreeMap::new();
        for cluster in ledger.clusters() {
            let kept = || ClusterMaterial::certificate_in(&cluster_dir(&self.dir, cluster.as_str())).ok();
            let known = heard.get(cluster).map(|der| der.to_vec());
            let Some(certificate) = known.or_else(|| kept().map(|kept| kept.to_vec())) else {
                self.progress.line(&format!(
                    "{cluster} is left out: it has not been heard of, and its intermediate is not in {}",
                    cluster_dir(&self.dir, cluster.as_str()).display()
                ));
                continue;
            };
            let reissued = new.reissue(&certificate, old.registry(), now).map_err(|e| {
                Failure::new(format_args!("cluster {cluster}: {e}")).remedy(format_args!(
                    "use the directory that {cluster} was made with, or leave it out with --without {cluster}"
                ))
            })?;
            made.insert(cluster.clone(), reissued);
        }
        Ok(made.into_values().collect())
    }

    fn ledger(&self, root: &RootAuthority, answer: &v1::TrustStatusResponse) -> Ledger {
        let next = RootAuthority::next_dir(&self.dir);
        let next = next.exists().then(|| load(&next).ok()).flatten();
        let roots = [Some(root), next.as_ref()].into_iter().flatten();
        let mut roots: Vec<_> = roots.map(|root| root.certificate().clone()).collect();
        if next.is_none() {
            // Nothing is decided by it: who is under a root of before is shown as such.
            roots.extend(RootAuthority::retired(&self.dir));
        }
        Ledger::new((root.registry(), &roots), answer, &self.without, clock::since_unix_epoch())
    }

    /// Gives an update to the federator. False: it had it already.
    async fn give_out(&mut self, update: &[u8]) -> Result<bool, Failure> {
        let request = v1::UpdateTrustRequest { update: update.to_vec() };
        let answer = self.persist(|mut admin| {
            let request = admin.request(request.clone());
            async move {
                admin
                    .client
                    .update_trust(request)
                    .await
                    .map_err(|status| (admin.failed(status.clone()), status))
            }
        });
        Ok(answer.await?.into_inner().changed)
    }

    async fn ask(&self) -> Result<v1::TrustStatusResponse, Failure> {
        let answer = self.persist(|mut admin| {
            let request = admin.request(v1::TrustStatusRequest {});
            async move {
                admin
                    .client
                    .trust_status(request)
                    .await
                    .map_err(|status| (admin.failed(status.clone()), status))
            }
        });
        Ok(answer.await?.into_inner())
    }

    /// Calls until the federator answers: with --wait, one that is being restarted is waited for.
    async fn persist<T, C, F>(&self, call: C) -> Result<T, Failure>
    where
        C: Fn(Admin) -> F,
        F: Future<Output = Result<T, (Failure, tonic::Status)>>,
    {
        let started = Instant::now();
        loop {
            let failure = match Admin::connect(&self.connect).await {
                Ok(admin) => match call(admin).await {
                    Ok(answer) => return Ok(answer),
                    Err((failure, status)) if is_passing(&status) => failure,
                    Err((failure, _)) => return Err(failure),
                },
                Err(failure) => failure,
            };
            if !self.wait || started.elapsed() >= self.connect.timeout {
                return Err(failure);
            }
            self.progress.doing("the federator does not answer; trying again");
            tokio::time::sleep(AGAIN).await;
        }
    }

    /// Until everybody has done what a step is about, or the time is over; at once without --wait. Who has not.
    async fn wait(&mut self, rotation: &Rotation, roots: &Pair) -> Result<(Ledger, Vec<String>), Failure> {
        let started = Instant::now();
        loop {
            let ledger = self.ledger(&roots.old, &self.ask().await?);
            let lacking = ledger.lacking(rotation, roots.new.certificate(), clock::since_unix_epoch());
            if lacking.is_empty() || !self.wait || started.elapsed() >= self.connect.timeout {
                return Ok((ledger, lacking));
            }
            let (done, all) = ledger.count(rotation);
            let (number, outcome) = (rotation.step.number(), rotation.step.outcome());
            let first = lacking.first().map(String::as_str).unwrap_or_default();
            self.progress.doing(&format!("step {number} of 3: {done} of {all} {outcome}; {first}"));
            tokio::time::sleep(ASK_EVERY).await;
        }
    }

    /// Whether the operator wants to go on although somebody lacks something.
    fn go_on_without(&self, rotation: &Rotation, lacking: &[String]) -> Result<bool, Failure> {
        if !self.force {
            return Ok(false);
        }
        let consequence = match rotation.step {
            Step::Staging => {
                "They don't know the new root: from the next step on they refuse whoever shows a chain of it, until they hear of it."
            }
            Step::Reissuing => {
                "They show chains of the old root: after the next step others refuse new connections of theirs, until they have renewed. A cluster that was left out needs `tombolo trust cluster NAME --renew` and `tombolo trust reload`."
            }
            _ => "They trust the old root until they hear of its end.",
        };
        let question = format!(
            "Not acknowledged ({}):\n  {}\n{consequence} Go on?",
            rotation.step.outcome(),
            lacking.join("\n  ")
        );
        if confirm::ask(&question, self.consent)? {
            self.progress.line(&format!("going on without: {}", lacking.join("; ")));
            return Ok(true);
        }
        Ok(false)
    }

    /// How a run ends that may not go on.
    fn unfinished(&self, rotation: &Rotation, lacking: &[String], given_out: bool) -> Result<Exit, Failure> {
        let (number, outcome) = (rotation.step.number(), rotation.step.outcome());
        let what = format!("step {number} of 3 is not over, not all {outcome}: {}", lacking.join("; "));
        if self.wait {
            return Err(Failure::timed_out(what).remedy(
                "run it again to go on, with a longer --timeout; `--force` goes on without those named, and says what becomes of them",
            ));
        }
        if given_out {
            self.progress.line(&format!("{what}\nrun it again to go on, or with --wait"));
            return Ok(Exit::Done);
        }
        Err(Failure::new(what).remedy("run it again when they are back, or with --wait"))
    }

    async fn status(&mut self, format: Format) -> Result<Exit, Failure> {
        let root = load(&self.dir)?;
        let rotation = Rotation::load(&self.dir)?;
        let next = RootAuthority::next_dir(&self.dir);
        let next = (rotation.is_some() && next.exists()).then(|| load(&next)).transpose()?;
        let ledger = self.ledger(&root, &self.ask().await?);
        page::show(rotation.as_ref(), (&root, next.as_ref()), &ledger, format)?;
        Ok(Exit::Done)
    }

    async fn dry_run(&mut self) -> Result<Exit, Failure> {
        let root = load(&self.dir)?;
        let answer = self.ask().await?;
        let ledger = self.ledger(&root, &answer);
        let rotation = Rotation::load(&self.dir)?;
        let clusters: Vec<String> = ledger.clusters().map(ToString::to_string).collect();
        match &rotation {
            Some(rotation) => output::line(format_args!(
                "would go on with step {} of 3 (all {})",
                rotation.step.number(),
                rotation.step.outcome()
            ))?,
            None => output::line(format_args!("would make a new root beside {}", root.fingerprint()))?,
        }
        output::line(format_args!(
            "by the federator of {}, for clusters {}",
            answer.cluster,
            clusters.join(", ")
        ))?;
        for step in [Step::Staging, Step::Reissuing, Step::Retiring] {
            if rotation.as_ref().is_none_or(|rotation| rotation.step <= step) {
                output::line(format_args!("step {}: all {}", step.number(), step.outcome()))?;
            }
        }
        output::line("nothing was changed (dry run)")?;
        Ok(Exit::Done)
    }
}

/// Whether the federator may answer when it is asked again.
fn is_passing(status: &tonic::Status) -> bool {
    matches!(status.code(), tonic::Code::Unavailable | tonic::Code::Cancelled | tonic::Code::Unknown)
}

fn read(bytes: &[u8]) -> Result<TrustUpdate, Failure> {
    let signed = tombolo_identity::rotation::SignedUpdate::from_bytes(bytes).map_err(Failure::new)?;
    signed.read().map_err(Failure::new)
}

/// The new root takes the place of the old one, in the directory and beside the keys of clusters that were made here.
fn finish(dir: &Path, rotation: &Rotation) -> Result<RootAuthority, Failure> {
    RootAuthority::promote(dir, &rotation.old_root).map_err(Failure::new)?;
    let mut root = load(dir)?;
    let update = state::update(dir, rotation.sequence())?.map(|bytes| read(&bytes)).transpose()?;
    if let Some(update) = update {
        root.keep_bundle(&update.bundle()).map_err(Failure::new)?;
        for reissued in &update.intermediates {
            refresh(&cluster_dir(dir, reissued.cluster.as_str()), reissued, &update.bundle())?;
        }
    }
    Rotation::remove(dir)?;
    Ok(root)
}

/// A federator that loses its store starts from this directory: it must not start under the old root.
fn refresh(dir: &Path, reissued: &Reissued, bundle: &TrustBundle) -> Result<(), Failure> {
    let Ok(known) = ClusterMaterial::certificate_in(dir) else { return Ok(()) };
    if spki_of(&known) != spki_of(&reissued.certificate) {
        return Ok(());
    }
    let Reissued { cluster, tag, certificate } = reissued;
    ClusterMaterial::save_certificate(dir, cluster, *tag, certificate, bundle).map_err(Failure::new)
}
