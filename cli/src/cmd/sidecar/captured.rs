//! The sidecar's own settings for captured connections.

use std::net::SocketAddr;

use ipnet::IpNet;
use tombolo_model::virtual_ranges::VirtualRanges;
use tombolo_sidecar::capture::settings::DEFAULT_MARK;
use tombolo_sidecar::capture::{CaptureAddress, CaptureConfig, InboundCapture, InboundMode};

use crate::failure::Failure;

/// As flags, environment and file have it.
pub struct Captured {
    pub listen: Option<Vec<SocketAddr>>,
    pub addresses: Option<Vec<String>>,
    pub virtual_ranges: Option<Vec<String>>,
    pub mark: Option<String>,
    pub inbound: Option<String>,
    pub inbound_listen: Option<Vec<SocketAddr>>,
}

impl Captured {
    /// `None`: nothing is to be taken.
    pub fn config(self) -> Result<Option<CaptureConfig>, Failure> {
        let Self { listen, addresses, virtual_ranges, mark: own_mark, inbound, inbound_listen } = self;
        let listen = listen.unwrap_or_default();
        let addresses = addresses.unwrap_or_default();
        let inbound = match (inbound, inbound_listen) {
            (None, None) => None,
            (Some(mode), Some(listen)) => {
                let mode = mode.parse::<InboundMode>();
                let mode = mode.map_err(|error| Failure::usage(format_args!("--inbound: {error}")))?;
                Some(InboundCapture { mode, listen })
            }
            (Some(_), None) => {
                return Err(Failure::usage("--inbound: nothing listens for connections from outside")
                    .remedy("give --inbound-listen 127.0.0.1:7448"));
            }
            (None, Some(_)) => {
                return Err(Failure::usage("--inbound-listen: what becomes of these connections?")
                    .remedy("give --inbound strict (reset) or --inbound permissive (to the application)"));
            }
        };
        if listen.is_empty() && addresses.is_empty() && inbound.is_none() {
            return Ok(None);
        }
        let addresses = addresses.iter().map(|text| text.parse::<CaptureAddress>().map_err(Failure::usage));
        Ok(Some(CaptureConfig {
            listen,
            addresses: addresses.collect::<Result<_, _>>()?,
            ranges: ranges(virtual_ranges)?,
            inbound,
            mark: own_mark.map_or(Ok(DEFAULT_MARK), |text| mark("--capture-mark", &text))?,
        }))
    }
}

/// Where virtual addresses lie, as the federator reads it.
pub fn ranges(texts: Option<Vec<String>>) -> Result<Vec<IpNet>, Failure> {
    let texts = texts.unwrap_or_default();
    let ranges = VirtualRanges::parse(texts.iter().map(String::as_str));
    let ranges = ranges.map_err(|error| Failure::usage(format_args!("--virtual-range: {error}")))?;
    Ok([IpNet::V4(ranges.v4())].into_iter().chain(ranges.v6().map(IpNet::V6)).collect())
}

/// A mark on packets: `0x7462` or `29794`; 0 is what all others have.
pub fn mark(flag: &str, text: &str) -> Result<u32, Failure> {
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed.ok().filter(|mark| *mark != 0).ok_or_else(|| {
        Failure::usage(format_args!("{flag} {text:?}: is no mark"))
            .remedy("give a number of 32 bits other than 0, such as 0x7462")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn captured() -> Captured {
        let listen = Some(vec!["127.0.0.1:7447".parse().unwrap()]);
        Captured {
            listen,
            addresses: None,
            virtual_ranges: None,
            mark: None,
            inbound: None,
            inbound_listen: None,
        }
    }

    #[test]
    fn nothing_is_taken_unless_it_is_asked_for() {
        assert_eq!(Captured { listen: None, ..captured() }.config().unwrap(), None);
        assert_eq!(captured().config().unwrap().unwrap().mark, 0x7462);
    }

    #[test]
    fn half_of_an_inbound_setting_names_the_other_half() {
        let only_mode = Captured { inbound: Some("strict".into()), ..captured() };
        assert!(only_mode.config().unwrap_err().to_string().contains("--inbound-listen"));
        let only_listen = Captured { inbound_listen: Some(Vec::new()), ..captured() };
        assert!(only_listen.config().unwrap_err().to_string().contains("--inbound strict"));
    }

    #[test]
    fn a_mark_is_a_number_and_not_the_one_of_everybody() {
        assert_eq!(mark("--mark", "0x10").unwrap(), 16);
        assert_eq!(mark("--mark", "16").unwrap(), 16);
        for bad in ["0", "0x0", "x", "0x1ffffffff", ""] {
            assert!(mark("--mark", bad).unwrap_err().to_string().contains("--mark"), "{bad}");
        }
    }
}
