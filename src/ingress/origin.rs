//! Where requests may come from: networks that are allowed, and proxies that say for whom they ask.

use std::net::{IpAddr, SocketAddr};

use http::HeaderMap;
use ipnet::{IpNet, Ipv4Net};

/// The header in which each proxy notes whom it has the request from, at the end.
const FORWARDED_FOR: &str = "x-forwarded-for";

/// The networks that may send.
pub(super) struct Origins {
    allowed: Vec<IpNet>,
    proxies: Vec<IpNet>,
}

impl Origins {
    /// Compiles `allow` and `trusted_proxies`.
    ///
    /// # Errors
    ///
    /// What is wrong with them.
    pub(super) fn new(allow: &[String], trusted_proxies: &[String]) -> Result<Self, Vec<String>> {
        let mut problems = Vec::new();
        if allow.is_empty() {
            problems.push("ingress.allow is empty, so that nobody could send; leave it out to let everyone".to_owned());
        }
        let allowed = networks("allow", allow, &mut problems);
        let proxies = networks("trusted_proxies", trusted_proxies, &mut problems);
        if problems.is_empty() { Ok(Self { allowed, proxies }) } else { Err(problems) }
    }

    /// Whether a request on a connection from `peer` comes from where it may.
    pub(super) fn allows(&self, peer: IpAddr, headers: &HeaderMap) -> bool {
        self.client(peer.to_canonical(), headers).is_some_and(|client| contains(&self.allowed, client))
    }

    /// Who sends: the last in the line whom we don't trust to say for whom they ask. None where that can't be read.
    fn client(&self, peer: IpAddr, headers: &HeaderMap) -> Option<IpAddr> {
        let mut client = peer;
        // Every proxy adds to the end, to the last line or as one more.
        let lines = headers.get_all(FORWARDED_FOR).iter().rev();
        for line in lines {
            for hop in line.as_bytes().rsplit(|byte| *byte == b',') {
                if !contains(&self.proxies, client) {
                    return Some(client);
                }
                client = address(std::str::from_utf8(hop).ok()?.trim())?;
            }
        }
        Some(client)
    }
}

fn contains(networks: &[IpNet], address: IpAddr) -> bool {
    networks.iter().any(|network| network.contains(&address))
}

/// An address as proxies write it; some add a port.
fn address(text: &str) -> Option<IpAddr> {
    let address = text.parse().or_else(|_| text.parse().map(|address: SocketAddr| address.ip()));
    address.ok().map(|address: IpAddr| address.to_canonical())
}

/// Addresses of IPv4 that are written as those of IPv6 are looked at as what they are; so are networks of them.
fn canonical(network: IpNet) -> IpNet {
    let mapped = match network {
        IpNet::V6(network) => network.addr().to_ipv4_mapped().zip(network.prefix_len().checked_sub(96)),
        IpNet::V4(_) => None,
    };
    mapped.and_then(|(address, len)| Ipv4Net::new(address, len).ok()).map_or(network, IpNet::V4)
}

/// Those that are some, and a problem for each of the others.
fn networks(setting: &str, texts: &[String], problems: &mut Vec<String>) -> Vec<IpNet> {
    let network = |text: &String| {
        let network = text.parse().map(canonical);
        let network = network.or_else(|_| text.parse().map(|address: IpAddr| address.to_canonical().into()));
        let problem =
            || format!("ingress.{setting}: {text:?} is neither an address nor a network such as \"10.0.0.0/8\"");
        network.map_err(|_| problems.push(problem())).ok()
    };
    texts.iter().filter_map(network).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origins(allow: &[&str], proxies: &[&str]) -> Result<Origins, Vec<String>> {
        let texts = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
        Origins::new(&texts(allow), &texts(proxies))
    }

    #[test]
    fn who_may_send() {
        let allowed = ["203.0.113.0/24", "2001:db8::7", "10.9.9.9", "::ffff:192.0.2.0/120"];
        let origins = origins(&allowed, &["10.0.0.0/8", "::1"]).unwrap();
        let check = |peer: &str, lines: &[&str], expected: bool| {
            let headers =
                lines.iter().map(|line| (http::HeaderName::from_static(FORWARDED_FOR), line.parse().unwrap()));
            assert_eq!(origins.allows(peer.parse().unwrap(), &headers.collect()), expected, "{peer} {lines:?}");
        };
        check("203.0.113.9", &[], true);
        check("::ffff:203.0.113.9", &[], true);
        check("192.0.2.255", &[], true);
        check("192.0.3.0", &[], false);
        check("2001:db8::7", &[], true);
        check("2001:db8::8", &[], false);
        check("198.51.100.1", &[], false);
        // What is not a trusted proxy says nothing of others.
        check("198.51.100.1", &["203.0.113.9"], false);
        check("203.0.113.9", &["198.51.100.1"], true);
        check("203.0.113.9", &["rubbish"], true);
        // A trusted one does, and only the last before it counts.
        check("10.0.0.1", &["203.0.113.9"], true);
        check("::1", &["203.0.113.9:4711"], true);
        check("10.0.0.1", &["[2001:db8::7]:443"], true);
        check("10.0.0.1", &["::ffff:203.0.113.9"], true);
        check("10.0.0.1", &["198.51.100.1"], false);
        check("10.0.0.1", &["203.0.113.9, 198.51.100.1"], false);
        check("10.0.0.1", &["rubbish, 203.0.113.9"], true);
        check("10.0.0.1", &["198.51.100.1,203.0.113.9 , 10.0.0.2"], true);
        check("10.0.0.1", &["198.51.100.1", "203.0.113.9", "10.0.0.2"], true);
        check("10.0.0.1", &["203.0.113.9", "198.51.100.1"], false);
        // A proxy that sends on its own account.
        check("10.9.9.9", &[], true);
        check("10.0.0.1", &[], false);
        check("10.0.0.1", &["10.9.9.9, 10.0.0.2"], true);
        // What can't be read is nobody.
        for line in
            ["", "rubbish", "203.0.113.9,", "203.0.113.9, unknown", "203.0.113.900", "203.0.113.9 10.0.0.2", "é"]
        {
            check("10.0.0.1", &[line], false);
        }
    }

    #[test]
    fn settings_that_do_not_work() {
        let check = |allow: &[&str], proxies: &[&str], expected: &str| {
            let problems = origins(allow, proxies).err().unwrap_or_default();
            assert_eq!(problems.len(), usize::from(!expected.is_empty()), "{problems:?}");
            assert!(problems.concat().starts_with(expected), "{problems:?}");
        };
        check(&[], &[], "ingress.allow is empty");
        check(&["10.0.0.0/33"], &[], "ingress.allow: \"10.0.0.0/33\" is neither");
        check(&["example.com"], &[], "ingress.allow: \"example.com\" is neither");
        check(&["::1", "10.0.0.1"], &["10.0.0"], "ingress.trusted_proxies: \"10.0.0\" is neither");
        check(&["10.0.0.0/8", "::/0"], &[], "");
        assert_eq!(origins(&["a", "::1", "b"], &["c"]).err().map(|problems| problems.len()), Some(3));
    }
}
