//! The text form of join and link tokens: what an operator carries from one terminal to another.
//!
//! ```text
//!  tombolo-join-1.<base64url, no padding, of:  CRC-32 (4 bytes, big-endian) | protobuf Token>
//! ```
//! The checksum finds a token that was cut or mistyped before anything is dialled; it protects nothing. Parsing is
//! pure: the time is passed in.

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use prost::Message;

use crate::v1::{Token, TokenKind};

/// Starts every token, so that it can be told from other pasted text.
pub const PREFIX: &str = "tombolo-join-1.";
/// A token of a day with a hundred gateways has 10 KB.
pub const MAX_TEXT_BYTES: usize = 64 * 1024;
/// Clocks are off by up to ten minutes: the joiner refuses only what has surely ended; the federator decides.
const CLOCK_SLACK: Duration = Duration::from_secs(600);

/// Why a token is of no use. Never quotes the token: it holds a secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    #[error(
        "this is no tombolo token: it must start with {PREFIX:?}; paste the whole line that `tombolo token`, `tombolo vm token` or `tombolo link token` printed"
    )]
    NotAToken,
    #[error(
        "the token is of a form that this version does not know ({found:?}); use the `tombolo` of the version that made it"
    )]
    Version { found: String },
    #[error("the token has {0} bytes, at most {MAX_TEXT_BYTES}: this is no token")]
    TooLong(usize),
    #[error("the token is cut or mistyped ({reason}); copy the whole line, from {PREFIX:?} to its end")]
    Damaged { reason: &'static str },
    #[error("the token lacks its {field}; make a new one")]
    Incomplete { field: &'static str },
    #[error("this is a {found} token, a {expected} token is needed: make one with `{remedy}`")]
    WrongKind { found: &'static str, expected: &'static str, remedy: &'static str },
    #[error("the token expired {ago_seconds} s ago; make a new one (the default is 15 minutes)")]
    Expired { ago_seconds: u64 },
}

impl TokenError {
    /// A metric label.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::NotAToken => "not_a_token",
            Self::Version { .. } => "version",
            Self::TooLong(_) => "too_long",
            Self::Damaged { .. } => "damaged",
            Self::Incomplete { .. } => "incomplete",
            Self::WrongKind { .. } => "wrong_kind",
            Self::Expired { .. } => "expired",
        }
    }
}

/// CRC-32 (IEEE 802.3, reflected), bit by bit: a token is parsed once in its life.
fn checksum(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg()))
    })
}

/// The text of a token.
pub fn encode(token: &Token) -> String {
    let body = token.encode_to_vec();
    let mut bytes = checksum(&body).to_be_bytes().to_vec();
    bytes.extend_from_slice(&body);
    format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(bytes))
}

/// Reads a token of the wanted kind that has not surely expired at `now` (since the Unix epoch).
pub fn parse(text: &str, wanted: TokenKind, now: Duration) -> Result<Token, TokenError> {
    let token = decode(text)?;
    if token.kind() != wanted {
        return Err(TokenError::WrongKind {
            found: name(token.kind()),
            expected: name(wanted),
            remedy: match wanted {
                TokenKind::Link => "tombolo link token PEER",
                TokenKind::Pod => "tombolo token pods",
                _ => "tombolo token create",
            },
        });
    }
    if wanted == TokenKind::Pod {
        return Ok(token);
    }
    let end = u64::try_from(token.not_after_unix).unwrap_or(0);
    let now = now.as_secs();
    if now > end.saturating_add(CLOCK_SLACK.as_secs()) {
        return Err(TokenError::Expired { ago_seconds: now - end });
    }
    Ok(token)
}

/// Reads a token of any kind and age.
pub fn decode(text: &str) -> Result<Token, TokenError> {
    let text = text.trim();
    if text.len() > MAX_TEXT_BYTES {
        return Err(TokenError::TooLong(text.len()));
    }
    let Some(body) = text.strip_prefix(PREFIX) else {
        if let Some((form, _)) = text.split_once('.')
            && form.starts_with("tombolo-")
        {
            return Err(TokenError::Version { found: form.chars().take(40).collect() });
        }
        return Err(TokenError::NotAToken);
    };
    let damaged = |reason| TokenError::Damaged { reason };
    let bytes = URL_SAFE_NO_PAD.decode(body).map_err(|_| damaged("it is not base64url"))?;
    let (expected, body) = bytes.split_first_chunk::<4>().ok_or(damaged("it is too short"))?;
    if checksum(body) != u32::from_be_bytes(*expected) {
        return Err(damaged("its checksum does not hold"));
    }
    let token = Token::decode(body).map_err(|_| damaged("its contents do not decode"))?;
    check(&token)?;
    Ok(token)
}

fn check(token: &Token) -> Result<(), TokenError> {
    let missing = |field| Err(TokenError::Incomplete { field });
    if token.kind() == TokenKind::Pod {
        return check_for_pods(token);
    }
    if token.token_id.is_empty() || token.token_id.len() > 64 {
        return missing("id");
    }
    if token.secret.len() < 16 || token.secret.len() > 64 {
        return missing("secret");
    }
    if token.cluster.is_empty() || token.tag == 0 {
        return missing("cluster");
    }
    if token.root_fingerprint.is_empty() {
        return missing("root fingerprint");
    }
    if token.join_keys.as_ref().is_none_or(|ring| ring.keys.is_empty()) {
        return missing("keys");
    }
    let direct = token.federators.iter().any(|f| !f.address.is_empty());
    let through_gateways = !token.gateways.is_empty() && token.provisional.is_some();
    if !direct && !through_gateways {
        return missing("addresses");
    }
    Ok(())
}

/// It names cluster, root and federators, and nothing that anybody has to keep to themselves.
fn check_for_pods(token: &Token) -> Result<(), TokenError> {
    let missing = |field| Err(TokenError::Incomplete { field });
    if token.cluster.is_empty() || token.tag == 0 {
        return missing("cluster");
    }
    if token.root_fingerprint.is_empty() {
        return missing("root fingerprint");
    }
    if token.federator_names.is_empty() && token.federators.iter().all(|f| f.address.is_empty()) {
        return missing("addresses");
    }
    Ok(())
}

fn name(kind: TokenKind) -> &'static str {
    match kind {
        TokenKind::Workload => "join",
        TokenKind::Link => "link",
        TokenKind::Pod => "pod",
        TokenKind::Unspecified => "nameless",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::v1::{ControlTarget, KeyRing};

    fn token() -> Token {
        Token {
            kind: TokenKind::Workload.into(),
            cluster: "east".into(),
            tag: 7,
            root_fingerprint: "sha256:00".into(),
            token_id: "abc".into(),
            secret: vec![9; 32],
            not_after_unix: 1_000_900,
            role: "gateway".into(),
            name: "gw-1".into(),
            federators: vec![ControlTarget { endpoint: 16, address: "127.0.0.1:7443".into() }],
            join_keys: Some(KeyRing { first_hour: 1, keys: vec![vec![0; 16]] }),
            ..Token::default()
        }
    }
    const NOW: Duration = Duration::from_secs(1_000_000);

    #[test]
    fn a_token_comes_back_as_it_was_made_even_with_a_newline() {
        let text = encode(&token());
        assert_eq!(parse(&format!("{text}\n"), TokenKind::Workload, NOW), Ok(token()));
    }

    #[test]
    fn a_token_cut_anywhere_or_with_any_letter_changed_is_refused() {
        let text = encode(&token());
        for cut in PREFIX.len()..text.len() {
            assert!(matches!(decode(&text[..cut]), Err(TokenError::Damaged { .. })), "cut at {cut}");
        }
        for at in PREFIX.len()..text.len() - 1 {
            let mut bytes = text.clone().into_bytes();
            bytes[at] = if bytes[at] == b'A' { b'B' } else { b'A' };
            let changed = String::from_utf8(bytes).unwrap();
            assert!(decode(&changed).is_err(), "changed at {at}");
        }
    }

    #[test]
    fn errors_say_what_to_do_and_never_show_the_secret() {
        let text = encode(&token());
        let wrong = parse(&text, TokenKind::Link, NOW).unwrap_err();
        assert!(wrong.to_string().contains("tombolo link token"), "{wrong}");
        let late = parse(&text, TokenKind::Workload, NOW + Duration::from_secs(3600)).unwrap_err();
        assert_eq!(late, TokenError::Expired { ago_seconds: 2700 });
        assert_eq!(decode("eyJhbGciOi").unwrap_err(), TokenError::NotAToken);
        assert!(matches!(decode("tombolo-join-9.abc").unwrap_err(), TokenError::Version { .. }));
        assert!(matches!(decode(&"x".repeat(1 << 20)).unwrap_err(), TokenError::TooLong(_)));
        for error in [wrong, late] {
            assert!(!error.to_string().contains(&text[PREFIX.len()..PREFIX.len() + 20]));
        }
    }

    #[test]
    fn a_token_for_pods_does_not_end_and_is_no_join_token() {
        let pods = Token {
            kind: TokenKind::Pod.into(),
            token_id: String::new(),
            secret: Vec::new(),
            join_keys: None,
            not_after_unix: 0,
            federators: Vec::new(),
            federator_names: vec!["federator.tombolo.svc:7443".into()],
            ..token()
        };
        let text = encode(&pods);
        assert_eq!(parse(&text, TokenKind::Pod, NOW), Ok(pods.clone()));
        let wrong = parse(&text, TokenKind::Workload, NOW).unwrap_err();
        assert!(wrong.to_string().contains("this is a pod token"), "{wrong}");
        let wrong = parse(&encode(&token()), TokenKind::Pod, NOW).unwrap_err();
        assert!(wrong.to_string().contains("tombolo token pods"), "{wrong}");
        let nowhere = Token { federator_names: Vec::new(), ..pods };
        assert_eq!(decode(&encode(&nowhere)).unwrap_err(), TokenError::Incomplete { field: "addresses" });
    }

    #[test]
    fn a_token_that_leads_nowhere_is_incomplete() {
        let nowhere = Token { federators: Vec::new(), ..token() };
        assert_eq!(decode(&encode(&nowhere)).unwrap_err(), TokenError::Incomplete { field: "addresses" });
    }

    proptest::proptest! {
        #[test]
        fn any_token_comes_back_as_it_was_and_any_text_is_read_or_refused(
            secret in proptest::collection::vec(proptest::num::u8::ANY, 16..=64), tag in 1u32..=0xff_ffff,
            name in "[a-z0-9-]{0,63}", text: String, noise: Vec<u8>,
        ) {
            let token = Token { secret, tag, name, ..token() };
            proptest::prop_assert_eq!(decode(&encode(&token)), Ok(token));
            let _ = decode(&text);
            // Behind a right checksum, as one who can compute it would send it.
            let framed = [&checksum(&noise).to_be_bytes()[..], &noise].concat();
            let _ = decode(&format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(framed)));
        }
    }
}
