//! The contents of a container's `/etc/hostname`, `/etc/hosts` and `/etc/resolv.conf`: pure functions from
//! what the host says and what the requester wants to bytes.

use std::fmt::Write;
use std::net::IpAddr;

/// Resolvers used when the host offers none that a container can reach.
pub const FALLBACK_NAMESERVERS: [&str; 2] = ["8.8.8.8", "8.8.4.4"];

/// Where systemd-resolved keeps the real upstream servers behind its stub on 127.0.0.53.
pub const RESOLVED_UPSTREAM: &str = "/run/systemd/resolve/resolv.conf";

/// `/etc/hostname`.
pub fn hostname_file(hostname: &str) -> String {
    format!("{hostname}\n")
}

/// `/etc/hosts`: loopback, extra entries (`--add-host`) in their order, then the container's own addresses.
/// With a domain name the full name comes first, as hosts(5) asks for the canonical name.
pub fn hosts_file(extra: &[(String, String)], own: &[IpAddr], hostname: &str, domainname: &str) -> String {
    let mut text = String::from(
        "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::0\tip6-localnet\nff00::0\tip6-mcastprefix\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n",
    );
    for (name, address) in extra {
        push_entry(&mut text, address, name);
    }
    for address in own {
        text.push_str(&own_entry(*address, hostname, domainname));
    }
    text
}

/// The line of `/etc/hosts` for one of the container's own addresses.
pub fn own_entry(address: IpAddr, hostname: &str, domainname: &str) -> String {
    let mut line = String::new();
    let names = if domainname.is_empty() {
        hostname.to_owned()
    } else {
        format!("{hostname}.{domainname} {hostname}")
    };
    push_entry(&mut line, &address.to_string(), &names);
    line
}

fn push_entry(text: &mut String, address: &str, names: &str) {
    text.push_str(address);
    text.push('\t');
    text.push_str(names);
    text.push('\n');
}

/// What the requester says about name resolution. An empty list means: as the host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DnsChoice {
    pub servers: Vec<String>,
    /// A single `.` means no search domains at all.
    pub search: Vec<String>,
    pub options: Vec<String>,
}

/// `/etc/resolv.conf` of a container with a network of its own. `host` is the host's file, `upstream` that
/// of systemd-resolved if there is one; `ipv6` whether the container can reach IPv6 servers.
pub fn resolv_conf(host: &str, upstream: Option<&str>, choice: &DnsChoice, ipv6: bool) -> String {
    let stub_only = {
        let servers = parse(host).servers;
        !servers.is_empty() && servers.iter().all(|server| server == "127.0.0.53")
    };
    let source = parse(upstream.filter(|_| stub_only).unwrap_or(host));
    let mut servers = if choice.servers.is_empty() {
        source.servers.into_iter().filter(|server| is_reachable(server, ipv6)).collect()
    } else {
        choice.servers.clone()
    };
    if servers.is_empty() {
        servers = FALLBACK_NAMESERVERS.map(str::to_owned).to_vec();
    }
    let search = if choice.search.is_empty() { source.search } else { choice.search.clone() };
    let options = if choice.options.is_empty() { source.options } else { choice.options.clone() };
    write(&servers, &search, &options)
}

/// `/etc/resolv.conf` of a container that shares the host's network: the host's file as it is, except for
/// what the requester overrides.
pub fn resolv_conf_on_host(host: &str, choice: &DnsChoice) -> String {
    if *choice == DnsChoice::default() {
        return host.to_owned();
    }
    let source = parse(host);
    let pick = |chosen: &Vec<String>, own: Vec<String>| if chosen.is_empty() { own } else { chosen.clone() };
    write(
        &pick(&choice.servers, source.servers),
        &pick(&choice.search, source.search),
        &pick(&choice.options, source.options),
    )
}

/// The servers that a `resolv.conf` names, as they stand there.
pub fn nameservers(text: &str) -> Vec<String> {
    parse(text).servers
}

/// `/etc/resolv.conf` of a container whose questions go to the engine's own name server at 127.0.0.11. Names of one
/// label are asked for as they are first.
pub fn resolv_conf_of_names(host: &str, choice: &DnsChoice) -> String {
    let source = parse(host);
    let search = if choice.search.is_empty() { source.search } else { choice.search.clone() };
    let mut options = if choice.options.is_empty() { source.options } else { choice.options.clone() };
    if !options.iter().any(|option| option.starts_with("ndots:")) {
        options.push("ndots:0".to_owned());
    }
    write(&["127.0.0.11".to_owned()], &search, &options)
}

struct ResolvConf {
    servers: Vec<String>,
    search: Vec<String>,
    options: Vec<String>,
}

fn parse(text: &str) -> ResolvConf {
    let mut conf = ResolvConf { servers: Vec::new(), search: Vec::new(), options: Vec::new() };
    for line in text.lines() {
        let line = line.trim();
        if line.starts_with(['#', ';']) {
            continue;
        }
        let mut words = line.split_ascii_whitespace();
        match words.next() {
            Some("nameserver") => conf.servers.extend(words.next().map(str::to_owned)),
            // The last of `search` and `domain` counts (resolv.conf(5)).
            Some("search" | "domain") => conf.search = words.map(str::to_owned).collect(),
            Some("options") => conf.options.extend(words.map(str::to_owned)),
            _ => {}
        }
    }
    conf
}

/// A server on the host's loopback, or on a link of the host, is not there for a container.
fn is_reachable(server: &str, ipv6: bool) -> bool {
    let (address, scoped) = match server.split_once('%') {
        Some((address, _)) => (address, true),
        None => (server, false),
    };
    match address.parse::<IpAddr>() {
        Ok(IpAddr::V4(ip)) => !ip.is_loopback() && !ip.is_unspecified(),
        Ok(IpAddr::V6(ip)) => ipv6 && !scoped && !ip.is_loopback() && !ip.is_unspecified(),
        Err(_) => false,
    }
}

fn write(servers: &[String], search: &[String], options: &[String]) -> String {
    let mut text = String::new();
    let no_search = search.len() == 1 && search[0] == ".";
    if !search.is_empty() && !no_search {
        push_line(&mut text, "search", &search.join(" "));
    }
    for server in servers {
        push_line(&mut text, "nameserver", server);
    }
    if !options.is_empty() {
        push_line(&mut text, "options", &options.join(" "));
    }
    text
}

fn push_line(text: &mut String, key: &str, value: &str) {
    // Writing to a String cannot fail.
    if writeln!(text, "{key} {value}").is_err() {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_has_loopback_extra_hosts_and_the_container() {
        let extra = [("db".to_owned(), "10.0.0.5".to_owned())];
        let text = hosts_file(&extra, &[[172, 30, 0, 2].into()], "web", "");
        assert!(text.starts_with("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"));
        assert!(text.ends_with("10.0.0.5\tdb\n172.30.0.2\tweb\n"), "{text}");
        let text = hosts_file(&[], &[[172, 30, 0, 2].into()], "web", "example.org");
        assert!(text.ends_with("172.30.0.2\tweb.example.org web\n"), "{text}");
        assert_eq!(hostname_file("web"), "web\n");
    }

    #[test]
    fn loopback_servers_of_the_host_are_left_out() {
        let host = "# made by hand\nnameserver 127.0.0.1\nnameserver 192.0.2.1\nnameserver ::1\nnameserver fe80::1%eth0\nnameserver 2001:db8::1\nsearch a.example b.example\noptions ndots:2\noptions edns0\n";
        assert_eq!(
            resolv_conf(host, None, &DnsChoice::default(), false),
            "search a.example b.example\nnameserver 192.0.2.1\noptions ndots:2 edns0\n"
        );
        assert_eq!(
            resolv_conf(host, None, &DnsChoice::default(), true),
            "search a.example b.example\nnameserver 192.0.2.1\nnameserver 2001:db8::1\noptions ndots:2 edns0\n"
        );
    }

    #[test]
    fn the_stub_of_systemd_resolved_is_looked_behind() {
        let stub = "nameserver 127.0.0.53\noptions edns0 trust-ad\n";
        let upstream = "nameserver 192.0.2.53\nsearch lan\n";
        let none = DnsChoice::default();
        assert_eq!(resolv_conf(stub, Some(upstream), &none, false), "search lan\nnameserver 192.0.2.53\n");
        let fallback = resolv_conf(stub, None, &none, false);
        assert!(fallback.starts_with("nameserver 8.8.8.8\nnameserver 8.8.4.4\n"), "{fallback}");
        let plain = "nameserver 192.0.2.1\n";
        assert_eq!(resolv_conf(plain, Some(upstream), &none, false), plain);
    }

    #[test]
    fn a_container_with_names_asks_the_engine() {
        let host = "nameserver 127.0.0.53\nsearch lan\noptions edns0 trust-ad\n";
        assert_eq!(
            resolv_conf_of_names(host, &DnsChoice::default()),
            "search lan\nnameserver 127.0.0.11\noptions edns0 trust-ad ndots:0\n"
        );
        let choice = DnsChoice {
            servers: vec!["192.0.2.1".to_owned()],
            search: vec![".".to_owned()],
            options: vec!["ndots:3".to_owned()],
        };
        assert_eq!(resolv_conf_of_names(host, &choice), "nameserver 127.0.0.11\noptions ndots:3\n");
    }

    #[test]
    fn what_the_requester_says_wins() {
        let host = "nameserver 192.0.2.1\nsearch lan\noptions rotate\n";
        let choice = DnsChoice {
            servers: vec!["127.0.0.1".to_owned()],
            search: vec![".".to_owned()],
            options: vec!["ndots:5".to_owned()],
        };
        assert_eq!(resolv_conf(host, None, &choice, false), "nameserver 127.0.0.1\noptions ndots:5\n");
        assert_eq!(resolv_conf_on_host(host, &DnsChoice::default()), host);
        let search = DnsChoice { search: vec!["x".to_owned()], ..DnsChoice::default() };
        assert_eq!(resolv_conf_on_host(host, &search), "search x\nnameserver 192.0.2.1\noptions rotate\n");
    }
}
