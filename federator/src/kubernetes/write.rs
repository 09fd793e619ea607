//! Performs what was planned: one request after the other, each answer an event for the tables.

use k8s_openapi::api::core::v1::ObjectReference;
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use kube::core::DynamicObject;
use kube::runtime::events::{Event as Note, EventType, Recorder};
use kube::runtime::watcher::Event;
use kube::{Client, Error};
use tombolo_model::names::ServiceKey;
use tombolo_model::resource::Condition;
use tombolo_model::resource::condition::needs_attention;

use super::client::{LONGEST, Resources};
use super::labels::TOMBOLO;
use super::plan::Write;
use super::tables::Kind;

/// What came of a step.
pub struct Outcome {
    pub service: ServiceKey,
    pub answers: Vec<(Kind, Event<DynamicObject>)>,
    pub failure: Option<Failure>,
}

/// Why a step was not done to its end.
#[derive(Clone, PartialEq, Debug)]
pub enum Failure {
    /// The API server can't be asked now, or has too much to do.
    Away(String),
    /// It does not know us (any more).
    Unauthenticated(String),
    /// Not with these documents.
    Refused(String),
}

/// Writes with the rights that the client has.
#[derive(Clone)]
pub struct Writer {
    pub client: Client,
    pub resources: Resources,
    pub recorder: Recorder,
}

impl Writer {
    /// Performs a step. One write that is refused costs the others nothing; when the API server is away they wait.
    pub async fn perform(self, service: ServiceKey, writes: Vec<Write>) -> Outcome {
        let mut outcome = Outcome { service, answers: Vec::new(), failure: None };
        for write in writes {
            let done = tokio::time::timeout(LONGEST, self.one(&outcome.service, &write)).await;
            match done {
                Ok(Ok(answer)) => outcome.answers.extend(answer),
                Ok(Err(error)) => match failure(&write, &error) {
                    None => {}
                    Some(Failure::Refused(reason)) => outcome.failure = Some(Failure::Refused(reason)),
                    other => {
                        outcome.failure = other;
                        break;
                    }
                },
                Err(_) => {
                    outcome.failure =
                        Some(Failure::Away(format!("no answer within {} s", LONGEST.as_secs())));
                    break;
                }
            }
        }
        outcome
    }

    async fn one(
        &self,
        service: &ServiceKey,
        write: &Write,
    ) -> Result<Option<(Kind, Event<DynamicObject>)>, Error> {
        let api = |kind| self.resources.within(&self.client, kind, service.namespace.as_str());
        let ours = PatchParams::apply(TOMBOLO);
        match write {
            Write::Apply { kind, name, document, force } => {
                let params = if *force { ours.force() } else { ours };
                let object = api(*kind).patch(name, &params, &Patch::Apply(document)).await?;
                Ok(Some((*kind, Event::Apply(object))))
            }
            Write::Status { kind, document, uid, changed } => {
                let name = service.name.as_str();
                let patch = Patch::Apply(document);
                let object = match api(*kind).patch_status(name, &ours.force(), &patch).await {
                    Ok(object) => object,
                    // It has gone: so that nobody takes it for there when the watch has missed that.
                    Err(Error::Api(status)) if status.code == 404 => {
                        return Ok(Some((*kind, Event::Delete(self.gone(service, *kind, name, uid)))));
                    }
                    Err(error) => return Err(error),
                };
                let reference = ObjectReference {
                    api_version: Some(self.resources.api_version.clone()),
                    kind: Some(kind.as_str().to_owned()),
                    name: Some(service.name.to_string()),
                    namespace: Some(service.namespace.to_string()),
                    uid: Some(uid.to_owned()),
                    ..ObjectReference::default()
                };
                tell(&self.recorder, &reference, changed).await;
                Ok(Some((*kind, Event::Apply(object))))
            }
            Write::Delete { kind, name, uid } => {
                let this = Preconditions { uid: Some(uid.clone()), resource_version: None };
                let params = DeleteParams::background().preconditions(this);
                let gone = self.gone(service, *kind, name, uid);
                match api(*kind).delete(name, &params).await {
                    // Left: still there, with a deletion timestamp.
                    Ok(deleted) => {
                        Ok(Some((*kind, deleted.left().map_or(Event::Delete(gone), Event::Apply))))
                    }
                    Err(Error::Api(status)) if matches!(status.code, 404 | 409) => {
                        Ok(Some((*kind, Event::Delete(gone))))
                    }
                    Err(error) => Err(error),
                }
            }
        }
    }

    /// What is known of an object that is no more.
    fn gone(&self, service: &ServiceKey, kind: Kind, name: &str, uid: &str) -> DynamicObject {
        let mut gone = DynamicObject::new(name, &self.resources.resource(kind));
        gone.metadata.namespace = Some(service.namespace.to_string());
        gone.metadata.uid = Some(uid.to_owned());
        gone
    }
}

/// An Event for each condition that has changed; that one is lost costs nothing else.
pub async fn tell(recorder: &Recorder, reference: &ObjectReference, changed: &[Condition]) {
    for condition in changed.iter().filter(|condition| worth_telling(condition)) {
        let attention = needs_attention(&condition.r#type, &condition.status);
        // Reasons of events are words; a Conflict may have several.
        let reason = condition.reason.split(',').next().unwrap_or_default().to_owned();
        let note = Note {
            type_: if attention { EventType::Warning } else { EventType::Normal },
            reason,
            note: Some(condition.message.chars().take(1000).collect()),
            action: condition.r#type.clone(),
            secondary: None,
        };
        if let Err(error) = recorder.publish(&note, reference).await {
            tracing::debug!(%error, name = reference.name, "an Event can't be written");
        }
    }
}

/// That something is being worked on, or that nobody disagrees, is no news.
fn worth_telling(condition: &Condition) -> bool {
    condition.status != "Unknown"
        && !matches!(condition.reason.as_str(), "Pending" | "NoConflicts" | "Valid" | "ResolvedRefs")
}

/// `None`: what failed is of no account, because what it was about has gone.
fn failure(write: &Write, error: &Error) -> Option<Failure> {
    match error {
        Error::Api(status) if status.code == 404 && matches!(write, Write::Status { .. }) => None,
        error => Some(judge(error)),
    }
}

/// What an error means for whoever wrote.
pub fn judge(error: &Error) -> Failure {
    let Error::Api(status) = error else { return Failure::Away(error.to_string()) };
    match status.code {
        401 => Failure::Unauthenticated(status.message.clone()),
        // 500 is how a schema that lacks a field refuses, or a webhook that is broken: waiting alone mends neither.
        429 | 502..=504 => Failure::Away(status.message.clone()),
        _ => Failure::Refused(status.message.clone()),
    }
}
