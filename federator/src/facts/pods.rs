//! What Kubernetes says of pods and addresses of services: news, held in memory alone, since what was said before a restart may
//! be anything now. Until all of it was heard once ([`Pods::told`]) nobody is told that something is not there.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use tombolo_model::names::ServiceKey;

/// A port of a service, as one pod has it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct PodPort {
    pub name: String,
    /// The service's.
    pub port: u16,
    /// The pod's.
    pub target: u16,
    pub protocol: String,
    pub app_protocol: String,
}

/// Pods of one service that have the same ports: those of one EndpointSlice.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct PodGroup {
    pub ports: Arc<[PodPort]>,
    /// By uid; whether Kubernetes counts on it.
    pub pods: Vec<(Arc<str>, bool)>,
}

/// A service that is sent to a pod.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SentToPod {
    pub ports: Arc<[PodPort]>,
    pub ready: bool,
}

/// Addresses that Kubernetes gives a service.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct KubernetesAddresses {
    /// ClusterSetIPs: `spec.ips` of its import here; IPv4 first.
    pub set: Vec<IpAddr>,
    /// ClusterIPs of this cluster's own `Service` of that name.
    pub local: Vec<IpAddr>,
}

/// A pod that was not let in, as its token calls it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RefusedPod {
    pub reason: String,
    /// Since it was first refused, and not let in meanwhile.
    pub times: u32,
    /// Unix seconds.
    pub last: u64,
}

/// Of these at most: a mistake is made in a template, and all its pods make it.
const MAX_REFUSED: usize = 100;
/// A container that fails is started anew after five minutes at most (kubelet's back-off): one that says nothing for longer is
/// gone, or mended.
pub const REFUSED_FOR_SECONDS: u64 = 600;
/// What is known is published anew only so often while nothing but the count changes, seconds.
const REFUSED_AGAIN: u64 = 30;

/// Everything of it.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Pods {
    /// Whether all exports and their endpoints have been heard since the start.
    pub told: bool,
    /// By uid.
    pub of: BTreeMap<Arc<str>, Arc<BTreeMap<ServiceKey, SentToPod>>>,
    /// Whose pods are in `of`, by service.
    groups: BTreeMap<ServiceKey, Arc<[PodGroup]>>,
    pub addresses: BTreeMap<ServiceKey, KubernetesAddresses>,
    /// By what their tokens say; nobody vouches for that.
    pub refused: BTreeMap<String, RefusedPod>,
}

impl Pods {
    /// Whether a service's pods are others than these.
    pub fn differ(&self, service: &ServiceKey, groups: &[PodGroup]) -> bool {
        self.groups.get(service).map(Arc::as_ref).unwrap_or_default() != groups
    }

    /// Notes what became of a pod's request to join, at `unix` seconds; true when that is news.
    pub fn asked(&mut self, pod: &str, refused: Option<String>, unix: u64) -> bool {
        let before = self.refused.len();
        self.refused.retain(|_, known| known.last + REFUSED_FOR_SECONDS > unix);
        let gone = before != self.refused.len();
        let Some(reason) = refused else { return self.refused.remove(pod).is_some() || gone };
        if let Some(known) = self.refused.get_mut(pod) {
            let news = known.reason != reason || known.last + REFUSED_AGAIN <= unix;
            known.times = known.times.saturating_add(1);
            if news {
                (known.reason, known.last) = (reason, unix);
            }
            return news || gone;
        }
        if self.refused.len() >= MAX_REFUSED {
            let oldest = self.refused.iter().min_by_key(|(_, known)| known.last);
            if let Some(oldest) = oldest.map(|(pod, _)| pod.clone()) {
                self.refused.remove(&oldest);
            }
        }
        self.refused.insert(pod.to_owned(), RefusedPod { reason, times: 1, last: unix });
        true
    }

    /// These are a service's pods from now on.
    pub fn set(&mut self, service: &ServiceKey, groups: Vec<PodGroup>) {
        for group in self.groups.remove(service).iter().flat_map(|groups| groups.iter()) {
            for (uid, _) in &group.pods {
                let Some(of) = self.of.get_mut(uid) else { continue };
                let of = Arc::make_mut(of);
                of.remove(service);
                if of.is_empty() {
                    self.of.remove(uid);
                }
            }
        }
        for group in &groups {
            for (uid, ready) in &group.pods {
                let of = Arc::make_mut(self.of.entry(Arc::clone(uid)).or_default());
                let sent = SentToPod { ports: Arc::clone(&group.ports), ready: *ready };
                // A pod with addresses of two families is in two slices.
                of.entry(service.clone()).and_modify(|known| known.ready |= ready).or_insert(sent);
            }
        }
        if !groups.is_empty() {
            self.groups.insert(service.clone(), groups.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(pods: &[(&str, bool)], target: u16) -> PodGroup {
        let port = PodPort {
            name: String::new(),
            port: 80,
            target,
            protocol: "TCP".into(),
            app_protocol: String::new(),
        };
        PodGroup {
            ports: [port].into(),
            pods: pods.iter().map(|(uid, ready)| (Arc::from(*uid), *ready)).collect(),
        }
    }

    fn shown(pods: &Pods, uid: &str) -> Vec<String> {
        let of = pods.of.get(uid).into_iter().flat_map(|of| of.iter());
        of.map(|(service, sent)| format!("{service} {} {}", sent.ports[0].target, sent.ready)).collect()
    }

    #[test]
    fn a_pod_is_sent_what_its_services_say_and_no_more() {
        let [web, admin]: [ServiceKey; 2] = ["shop/web".parse().unwrap(), "shop/admin".parse().unwrap()];
        let mut pods = Pods::default();
        let first = vec![group(&[("a", true), ("b", false)], 8080), group(&[("c", true)], 8081)];
        assert!(pods.differ(&web, &first));
        pods.set(&web, first.clone());
        pods.set(&admin, vec![group(&[("a", true)], 9090), group(&[("a", false)], 9090)]);
        assert!(!pods.differ(&web, &first));
        assert_eq!(shown(&pods, "a"), ["shop/admin 9090 true", "shop/web 8080 true"]);
        assert_eq!(
            (shown(&pods, "b"), shown(&pods, "c")),
            (vec!["shop/web 8080 false".into()], vec!["shop/web 8081 true".into()])
        );
        pods.set(&web, vec![group(&[("b", true)], 8080)]);
        assert_eq!(
            (shown(&pods, "a"), shown(&pods, "b")),
            (vec!["shop/admin 9090 true".into()], vec!["shop/web 8080 true".into()])
        );
        pods.set(&web, Vec::new());
        pods.set(&admin, Vec::new());
        assert_eq!(pods, Pods::default(), "nothing is left of what has gone");
    }

    #[test]
    fn a_refused_pod_is_known_until_it_is_let_in_or_silent_for_long_and_only_some_are() {
        let mut pods = Pods::default();
        let why = |text: &str| Some(text.to_owned());
        assert!(pods.asked("a", why("no"), 100));
        assert!(!pods.asked("a", why("no"), 101), "the same again is no news");
        assert!(pods.asked("a", why("never"), 102) && pods.asked("a", why("never"), 132));
        assert_eq!(pods.refused["a"], RefusedPod { reason: "never".into(), times: 4, last: 132 });
        assert!(pods.asked("a", None, 133) && !pods.asked("a", None, 134));
        for n in 0..200 {
            pods.asked(&format!("p{n}"), why("no"), 200 + n);
        }
        assert_eq!(pods.refused.len(), MAX_REFUSED);
        assert!(!pods.refused.contains_key("p0") && pods.refused.contains_key("p199"));
        assert!(pods.asked("b", None, 399 + REFUSED_FOR_SECONDS) && pods.refused.is_empty());
    }
}
