//! The private, non-critical extension that binds an intermediate to its cluster and tag.
//!
//! SPIFFE forbids a path on a signer's ID and X.509 name constraints can't express one, so verifiers read this:
//! ```text
//! OID 1.3.6.1.4.1.58888.7440.1
//! ClusterBinding ::= SEQUENCE { tag INTEGER (1..16777215), cluster UTF8String (SIZE (1..127)) }
//! ```

use tombolo_model::ids::ClusterTag;
use tombolo_model::names::ClusterName;

/// As arcs, for issuing.
pub const OID: &[u64] = &[1, 3, 6, 1, 4, 1, 58888, 7440, 1];
/// As text, for reading.
pub const OID_TEXT: &str = "1.3.6.1.4.1.58888.7440.1";

/// Which cluster an intermediate may issue for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ClusterBinding {
    pub cluster: ClusterName,
    pub tag: ClusterTag,
}

impl ClusterBinding {
    /// DER. Both parts are short enough for one-byte lengths (127 + 2 + 5 + 2 <= 255 needs the long form at most once).
    pub fn to_der(&self) -> Vec<u8> {
        let [_, a, b, c] = self.tag.value().to_be_bytes();
        // Four bytes keep the INTEGER positive whatever its top bit; DER wants the shortest, so trim.
        let mut integer: Vec<u8> = vec![0, a, b, c];
        while integer.len() > 1
            && integer.first() == Some(&0)
            && integer.get(1).is_some_and(|b| b & 0x80 == 0)
        {
            integer.remove(0);
        }
        let name = self.cluster.as_str().as_bytes();
        let mut body = vec![0x02, integer.len() as u8];
        body.extend_from_slice(&integer);
        body.extend_from_slice(&[0x0c, name.len() as u8]);
        body.extend_from_slice(name);
        let mut out = vec![0x30];
        if body.len() >= 0x80 {
            out.push(0x81);
        }
        out.push(body.len() as u8);
        out.extend_from_slice(&body);
        out
    }

    /// `None` for anything but exactly one well-formed binding.
    pub fn from_der(der: &[u8]) -> Option<Self> {
        let (0x30, body, []) = element(der)? else { return None };
        let (0x02, integer, rest) = element(body)? else { return None };
        let (0x0c, name, []) = element(rest)? else { return None };
        if integer.is_empty() || integer.len() > 4 || integer.first()? & 0x80 != 0 {
            return None;
        }
        let tag = integer.iter().fold(0u32, |acc, byte| (acc << 8) | u32::from(*byte));
        Some(Self { cluster: std::str::from_utf8(name).ok()?.parse().ok()?, tag: ClusterTag::new(tag)? })
    }
}

/// Tag, content and the rest of one DER element with a length below 256.
fn element(der: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (tag, rest) = der.split_first()?;
    let (first, rest) = rest.split_first()?;
    let (len, rest) = match first {
        0x81 => rest.split_first().map(|(len, rest)| (*len, rest))?,
        len if *len < 0x80 => (*len, rest),
        _ => return None,
    };
    rest.split_at_checked(usize::from(len)).map(|(content, rest)| (*tag, content, rest))
}
