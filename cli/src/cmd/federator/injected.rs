//! The settings of injected sidecars.

use std::net::SocketAddr;

use tombolo_federator::inject::InjectConfig;
use tombolo_federator::inject::settings::{InjectSettings, Quantities};
use tombolo_federator::kubernetes::KubernetesConfig;

use crate::failure::Failure;

/// A few megabytes at rest; 30 more with 1000 connections.
const REQUESTS: &str = "cpu=10m,memory=32Mi";
/// No limit on CPU: a throttled sidecar delays every call.
const LIMITS: &str = "memory=256Mi";

/// As flags, environment and file have it.
pub struct Injected {
    pub listen: Option<SocketAddr>,
    pub image: Option<String>,
    pub capture_image: Option<String>,
    pub federator: Option<String>,
    pub requests: Option<String>,
    pub limits: Option<String>,
}

impl Injected {
    /// `None`: nothing is injected. `kubernetes`: there is one if `listen` is given.
    pub fn config(self, kubernetes: Option<&KubernetesConfig>) -> Result<Option<InjectConfig>, Failure> {
        let Self { listen, image, capture_image, federator, requests, limits } = self;
        let (Some(listen), Some(kubernetes)) = (listen, kubernetes) else {
            let given = [
                ("--inject-image", image.is_some()),
                ("--inject-capture-image", capture_image.is_some()),
                ("--inject-federator", federator.is_some()),
                ("--inject-requests", requests.is_some()),
                ("--inject-limits", limits.is_some()),
            ];
            return match given.into_iter().find(|(_, given)| *given) {
                Some((flag, _)) => {
                    Err(Failure::usage(format_args!("{flag}: there is no --kubernetes-inject"))
                        .remedy("give --kubernetes-inject, or leave it out"))
                }
                None => Ok(None),
            };
        };
        let federator =
            federator.unwrap_or_else(|| format!("tombolo-federator.{}.svc:7443", kubernetes.namespace));
        let has_port = federator
            .rsplit_once(':')
            .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0));
        if !has_port || federator.len() > 260 {
            return Err(Failure::usage(format_args!("--inject-federator {federator:?} is not HOST:PORT"))
                .remedy("give it as tombolo-federator.tombolo-system.svc:7443"));
        }
        let named =
            |flag: &str, image: String| match image.is_empty() || image.chars().any(char::is_whitespace) {
                true => Err(Failure::usage(format_args!("{flag} {image:?} is no image"))
                    .remedy("give it as registry.example/tombolo:1.0")),
                false => Ok(image),
            };
        let default = || format!("tombolo:{}", env!("CARGO_PKG_VERSION"));
        let image = named("--inject-image", image.unwrap_or_else(default))?;
        let capture_image = named("--inject-capture-image", capture_image.unwrap_or_else(|| image.clone()))?;
        let settings = InjectSettings {
            image,
            capture_image,
            federator,
            requests: amounts("--inject-requests", requests, REQUESTS)?,
            limits: amounts("--inject-limits", limits, LIMITS)?,
        };
        Ok(Some(InjectConfig { listen, kubernetes: kubernetes.clone(), settings }))
    }
}

/// An empty text is none.
fn amounts(flag: &str, given: Option<String>, default: &str) -> Result<Quantities, Failure> {
    let text = given.as_deref().unwrap_or(default);
    text.parse().map_err(|error| Failure::usage(format_args!("{flag}: {error}")))
}
