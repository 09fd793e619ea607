//! What a service's port is called over.

use std::fmt;

use serde::{Deserialize, Serialize};

/// As Kubernetes writes it: `TCP` or `UDP`. Absent is TCP.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    #[default]
    Tcp,
    Udp,
}

impl Protocol {
    /// `None`: nothing that is carried here. The empty text is TCP.
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "" | "TCP" => Some(Self::Tcp),
            "UDP" => Some(Self::Udp),
            _ => None,
        }
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
        }
    }

    /// Takes `/udp` or `/tcp` off the end of a flag's value; without either it is TCP.
    pub fn suffix(text: &str) -> (&str, Self) {
        match text.rsplit_once('/') {
            Some((rest, "udp")) => (rest, Self::Udp),
            Some((rest, "tcp")) => (rest, Self::Tcp),
            _ => (text, Self::Tcp),
        }
    }

    /// The same as [`suffix`](Self::suffix) reads it: `/udp`, and nothing for TCP.
    pub fn as_suffix(self) -> &'static str {
        match self {
            Self::Tcp => "",
            Self::Udp => "/udp",
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_protocol_is_read_as_kubernetes_writes_it_and_as_flags_do() {
        for (text, protocol) in [("", Some(Protocol::Tcp)), ("UDP", Some(Protocol::Udp)), ("SCTP", None)] {
            assert_eq!(Protocol::parse(text), protocol, "{text}");
        }
        assert_eq!(Protocol::suffix("shop/dns:53/udp"), ("shop/dns:53", Protocol::Udp));
        assert_eq!(Protocol::suffix("shop/dns:53/tcp"), ("shop/dns:53", Protocol::Tcp));
        assert_eq!(Protocol::suffix("shop/dns:53"), ("shop/dns:53", Protocol::Tcp));
    }
}
