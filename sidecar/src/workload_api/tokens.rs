//! JWT-SVIDs that were asked for a moment ago, so that an application that asks for one per request does not make the
//! federator sign as many. Pure: the time is passed in.

use std::collections::BTreeMap;

use tombolo_identity::jwt::TOKEN_LIFE;

/// Sets of audiences that one application uses at a time.
const MAX_KEPT: usize = 64;

#[derive(Debug)]
struct Token {
    text: String,
    not_after: u64,
}

/// By audience.
#[derive(Debug, Default)]
pub(super) struct Tokens(BTreeMap<Vec<String>, Token>);

impl Tokens {
    /// One that has at least half of its life before it at `unix`.
    pub fn get(&self, audience: &[String], unix: u64) -> Option<String> {
        let token = self.0.get(audience)?;
        (unix.saturating_add(TOKEN_LIFE.as_secs() / 2) <= token.not_after).then(|| token.text.clone())
    }

    /// Keeps one, in the place of the one that ends first when there are too many.
    pub fn put(&mut self, audience: Vec<String>, text: String, not_after: u64, unix: u64) {
        self.0.retain(|_, token| token.not_after > unix);
        if self.0.len() >= MAX_KEPT
            && let Some(first) = self.0.iter().min_by_key(|(_, t)| t.not_after).map(|(a, _)| a.clone())
        {
            self.0.remove(&first);
        }
        self.0.insert(audience, Token { text, not_after });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_serves_for_half_its_life_and_its_own_audience_and_few_are_kept() {
        let audience = |name: &str| vec![name.to_owned()];
        let mut tokens = Tokens::default();
        tokens.put(audience("shop"), "t".into(), 1300, 1000);
        assert_eq!(tokens.get(&audience("shop"), 1150).as_deref(), Some("t"));
        assert_eq!(tokens.get(&audience("shop"), 1151), None);
        assert_eq!(tokens.get(&audience("bank"), 1000), None);
        (0..1000).for_each(|n| tokens.put(audience(&n.to_string()), "t".into(), 1400 + n, 1001));
        assert_eq!(tokens.0.len(), MAX_KEPT);
        assert!(
            tokens.get(&audience("999"), 1001).is_some() && tokens.get(&audience("shop"), 1001).is_none()
        );
        tokens.put(audience("late"), "t".into(), 9000, 8000);
        assert_eq!(tokens.0.len(), 1, "what has ended is forgotten");
    }
}
