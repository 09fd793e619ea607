//! How many flows each caller has, by its identity.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Clones share the counts.
#[derive(Clone, Debug)]
pub struct PeerFlows(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    most: usize,
    /// Only those that have any.
    open: Mutex<HashMap<String, usize>>,
}

/// Held for as long as the flow is open.
#[derive(Debug)]
pub struct PeerFlow {
    flows: PeerFlows,
    peer: String,
}

impl PeerFlows {
    pub fn new(most: usize) -> Self {
        Self(Arc::new(Inner { most, open: Mutex::default() }))
    }

    /// `None`: this caller has as many as it may.
    pub fn open(&self, peer: &str) -> Option<PeerFlow> {
        let mut open = self.0.open.lock().unwrap_or_else(PoisonError::into_inner);
        let count = open.get(peer).copied().unwrap_or_default();
        if count >= self.0.most {
            return None;
        }
        open.insert(peer.to_owned(), count + 1);
        Some(PeerFlow { flows: self.clone(), peer: peer.to_owned() })
    }
}

impl Drop for PeerFlow {
    fn drop(&mut self) {
        let mut open = self.flows.0.open.lock().unwrap_or_else(PoisonError::into_inner);
        match open.get_mut(&self.peer) {
            Some(count) if *count > 1 => *count -= 1,
            _ => {
                open.remove(&self.peer);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_callers_flows_are_bounded_and_forgotten_when_they_end() {
        let flows = PeerFlows::new(2);
        let held = (flows.open("a").unwrap(), flows.open("a").unwrap());
        assert!(flows.open("a").is_none() && flows.open("b").is_some());
        drop(held.0);
        assert!(flows.open("a").is_some());
        drop(held.1);
        assert!(flows.0.open.lock().unwrap().is_empty());
    }
}
