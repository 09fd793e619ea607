//! How a machine's resolver is pointed at ours, and back: the texts (pure). The command line reads and writes the files.
//!
//! A `resolv.conf` keeps the resolvers that were there behind ours: when ours does not answer, the machine still has one.
//! systemd-resolved gets a drop-in of its own and keeps everything else.

use std::net::{IpAddr, SocketAddr};

use crate::upstream::MAX_UPSTREAMS;

/// First line of what is ours, so that people and other tools see whose it is.
pub const MARK: &str = "# Set up by `tombolo sidecar dns install`; `tombolo sidecar dns remove` undoes it.";
/// Name servers that glibc asks.
const MAX_NAMESERVERS: usize = MAX_UPSTREAMS;
/// Domains that glibc (since 2.26) and others search.
const MAX_SEARCH: usize = 6;
/// What resolvers are asked for by short names.
pub const ZONES: [&str; 2] = ["clusterset.local", "svc.cluster.local"];

/// A `resolv.conf` by which ours is asked first. Lines that are not about name servers or search domains stay as they are.
pub fn with_resolver(before: &str, address: IpAddr, search: &[String]) -> String {
    let mut text = format!("{MARK}\nnameserver {address}\n");
    let mut kept = 1;
    let mut domains: Vec<&str> = search.iter().map(String::as_str).collect();
    let mut rest = String::new();
    for line in before.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("nameserver") => {
                let ours = words.next().and_then(|word| word.parse::<IpAddr>().ok()) == Some(address);
                if !ours && kept < MAX_NAMESERVERS {
                    text.push_str(line.trim());
                    text.push('\n');
                    kept += 1;
                }
            }
            // `domain` is `search` with one; glibc takes the last of either.
            Some("search" | "domain") if !search.is_empty() => {
                domains.truncate(search.len());
                domains.extend(words.filter(|domain| !search.iter().any(|ours| ours == domain)));
            }
            _ if line == MARK => {}
            _ => {
                rest.push_str(line);
                rest.push('\n');
            }
        }
    }
    if !domains.is_empty() {
        domains.truncate(MAX_SEARCH);
        text.push_str(&format!("search {}\n", domains.join(" ")));
    }
    text + &rest
}

/// A `resolv.conf` that somebody has changed since, without ours; `None`: no name server would be left.
pub fn without_resolver(now: &str, address: IpAddr) -> Option<String> {
    let is_ours = |line: &&str| {
        let mut words = line.split_whitespace();
        words.next() == Some("nameserver")
            && words.next().and_then(|word| word.parse::<IpAddr>().ok()) == Some(address)
    };
    let kept: Vec<&str> = now.lines().filter(|line| *line != MARK && !is_ours(line)).collect();
    let has_server = kept.iter().any(|line| line.split_whitespace().next() == Some("nameserver"));
    has_server.then(|| kept.iter().map(|line| format!("{line}\n")).collect())
}

/// A drop-in for systemd-resolved: our names are asked of us, and of nobody else.
pub fn drop_in(address: SocketAddr) -> String {
    let domains: Vec<String> = ZONES.iter().map(|zone| format!("~{zone}")).collect();
    let server = match address.port() {
        53 => address.ip().to_string(),
        _ => address.to_string(),
    };
    format!("{MARK}\n[Resolve]\nDNS={server}\nDomains={}\n", domains.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(127, 0, 0, 54));
    const BEFORE: &str = "# from dhcp\nsearch corp.example\nnameserver 192.0.2.1\nnameserver 192.0.2.2\n\
        nameserver 192.0.2.3\noptions timeout:2\n";

    #[test]
    fn ours_is_asked_first_and_the_others_stay_behind_it() {
        let text = with_resolver(BEFORE, OURS, &["shop.svc.clusterset.local".into()]);
        assert_eq!(
            text,
            format!(
                "{MARK}\nnameserver 127.0.0.54\nnameserver 192.0.2.1\nnameserver 192.0.2.2\n\
                 search shop.svc.clusterset.local corp.example\n# from dhcp\noptions timeout:2\n"
            )
        );
        assert!(with_resolver(BEFORE, OURS, &[]).contains("\nsearch corp.example\n"));
    }

    #[test]
    fn doing_it_twice_is_doing_it_once() {
        for search in [vec![], vec!["shop.svc.clusterset.local".to_owned()]] {
            let once = with_resolver(BEFORE, OURS, &search);
            assert_eq!(with_resolver(&once, OURS, &search), once);
        }
    }

    #[test]
    fn what_others_have_written_since_is_kept_and_no_machine_is_left_without_a_resolver() {
        let changed = with_resolver(BEFORE, OURS, &[]) + "options edns0\n";
        let without = without_resolver(&changed, OURS).unwrap();
        assert!(!without.contains("127.0.0.54") && !without.contains(MARK));
        assert!(without.contains("nameserver 192.0.2.1") && without.contains("options edns0"));
        assert_eq!(without_resolver("nameserver 127.0.0.54\n", OURS), None);
    }

    #[test]
    fn systemd_resolved_asks_us_for_our_zones() {
        let text = drop_in("127.0.0.1:7453".parse().unwrap());
        assert!(
            text.contains("DNS=127.0.0.1:7453\nDomains=~clusterset.local ~svc.cluster.local\n"),
            "{text}"
        );
        assert!(drop_in("[::1]:53".parse().unwrap()).contains("DNS=::1\n"));
    }
}
