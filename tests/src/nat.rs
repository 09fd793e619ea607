//! A masquerading router that lets nothing in, as in front of a VM at home or in an office.
//!
//! Only packets of flows begun inside pass back; everything else from outside is dropped and counted, both towards
//! the inside and towards the router itself.

use anyhow::Result;

use crate::netns::Namespace;

/// How long conntrack keeps an idle UDP flow. 30 s is the kernel's own value for a flow without an answer and close to
/// the short end of home routers; tests set less to see keep-alives at work.
pub const DEFAULT_UDP_TIMEOUT_SECONDS: u32 = 30;

/// Makes `router` masquerade what comes from `inside` and leaves by `outside` (device names), and admit nothing else.
pub fn masquerade(router: &Namespace, inside: &str, outside: &str) -> Result<()> {
    router.enable_forwarding()?;
    router.nft(&format!(
        "table inet tombolo_nat {{
            chain postrouting {{
                type nat hook postrouting priority srcnat; policy accept;
                oifname \"{outside}\" masquerade
            }}
            chain forward {{
                type filter hook forward priority filter; policy drop;
                ct state established,related accept
                iifname \"{inside}\" oifname \"{outside}\" accept
                counter drop
            }}
            chain input {{
                type filter hook input priority filter; policy drop;
                iifname \"lo\" accept
                iifname \"{inside}\" accept
                ct state established,related accept
                counter drop
            }}
        }}"
    ))?;
    set_udp_timeout(router, DEFAULT_UDP_TIMEOUT_SECONDS)
}

/// Sets how long an idle UDP mapping lives, answered or not.
pub fn set_udp_timeout(router: &Namespace, seconds: u32) -> Result<()> {
    let seconds = seconds.to_string();
    router.sysctl("net.netfilter.nf_conntrack_udp_timeout", &seconds)?;
    router.sysctl("net.netfilter.nf_conntrack_udp_timeout_stream", &seconds)
}
