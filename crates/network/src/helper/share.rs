//! Names on overlay networks: the helpers of all hosts of a network tell each other who is there.
//!
//! Each helper dials every peer by TCP, on the port that the tunnel has by UDP, and says which networks it wants to hear of;
//! the peer sends the whole list of its own containers on such a network, and sends it again whenever it changes. Messages
//! are JSON documents, one a line. What was heard of a peer is forgotten when it has been silent for a while.
//!
//! Invariant: only addresses on a network's list of peers are listened to, and dialled; what they say counts for that
//! network alone, and its amount is bounded. A name that containers of several hosts have stands for all of them.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::time::Duration;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{interval, sleep, timeout};

use super::control::Shared;
use super::protocol::{Residence, Resident};

/// How often something is said, if there is no news.
const BEAT: Duration = Duration::from_secs(5);
/// After how long a connection on which nothing is said is given up.
const SILENCE: Duration = Duration::from_secs(20);
/// Between two attempts to reach a peer.
const AGAIN: Duration = Duration::from_secs(2);
/// For how long what a peer has said outlives the connection: its helper may be exchanged.
const REMEMBERED: Duration = Duration::from_secs(30);
/// No message is longer.
const LONGEST: u64 = 8 << 20;
/// Of one peer on one network.
const MOST_ENTRIES: usize = 20_000;
/// Connections of peers at once.
const MOST_CONNECTIONS: usize = 1024;

/// An overlay network, as the helper has to know it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedNetwork {
    /// Its id and name at this engine.
    pub network: String,
    pub network_name: String,
    /// What it is called between hosts: the tunnel's number.
    pub vni: u32,
    /// Where this host listens, and its peers do.
    pub local: IpAddr,
    pub port: u16,
    pub peers: Vec<IpAddr>,
    /// Where containers of it have their addresses.
    pub subnets: Vec<IpNet>,
}

#[derive(Debug, Serialize, Deserialize)]
enum Message {
    /// Tell me of these networks.
    Subscribe(Vec<u32>),
    /// All of the sender's containers on a network.
    Entries {
        vni: u32,
        entries: Vec<Entry>,
    },
    Beat,
}

/// A container on a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    id: String,
    names: Vec<String>,
    ipv4: Option<std::net::Ipv4Addr>,
    ipv6: Option<std::net::Ipv6Addr>,
}

/// Listening and dialling for the networks that the daemon has told of.
#[derive(Debug, Default)]
pub(super) struct Sharing {
    networks: Rc<RefCell<Vec<SharedNetwork>>>,
    listeners: HashMap<SocketAddr, JoinHandle<()>>,
    callers: HashMap<(SocketAddr, IpAddr), JoinHandle<()>>,
}

impl Drop for Sharing {
    fn drop(&mut self) {
        for (_, task) in self.listeners.drain() {
            task.abort();
        }
        for (_, task) in self.callers.drain() {
            task.abort();
        }
    }
}

impl Sharing {
    /// From now on these networks are shared, and no others.
    pub fn set(&mut self, networks: Vec<SharedNetwork>, shared: &Rc<Shared>) {
        let known: HashSet<String> = networks.iter().map(|one| one.network.clone()).collect();
        let gone: Vec<SharedNetwork> =
            self.networks.borrow().iter().filter(|one| !known.contains(&one.network)).cloned().collect();
        for network in gone {
            for peer in &network.peers {
                forget(shared, &network, *peer);
            }
        }
        let own: HashSet<SocketAddr> =
            networks.iter().map(|one| SocketAddr::new(one.local, one.port)).collect();
        let dialled: HashSet<(SocketAddr, IpAddr)> = networks
            .iter()
            .flat_map(|one| one.peers.iter().map(|peer| (SocketAddr::new(*peer, one.port), one.local)))
            .collect();
        *self.networks.borrow_mut() = networks;
        self.listeners.retain(|address, task| {
            own.contains(address) || {
                task.abort();
                false
            }
        });
        self.callers.retain(|key, task| {
            dialled.contains(key) || {
                task.abort();
                false
            }
        });
        for address in own {
            self.listeners.entry(address).or_insert_with(|| {
                tokio::task::spawn_local(listen(address, Rc::clone(&self.networks), Rc::clone(shared)))
            });
        }
        for key in dialled {
            self.callers.entry(key).or_insert_with(|| {
                tokio::task::spawn_local(call(key.0, key.1, Rc::clone(&self.networks), Rc::clone(shared)))
            });
        }
        // Subscriptions follow the networks.
        shared.changed.send_modify(|count| *count += 1);
    }
}

type Networks = Rc<RefCell<Vec<SharedNetwork>>>;

/// What a peer is known by among containers.
fn resident_id(network: &str, peer: IpAddr, id: &str) -> String {
    format!("peer/{peer}/{network}/{id}")
}

fn forget(shared: &Shared, network: &SharedNetwork, peer: IpAddr) {
    shared.table.borrow_mut().remove_all(&resident_id(&network.network, peer, ""));
}

/// Answers peers that dial this host.
async fn listen(address: SocketAddr, networks: Networks, shared: Rc<Shared>) {
    let connections = Rc::new(tokio::sync::Semaphore::new(MOST_CONNECTIONS));
    let mut was_refused = false;
    loop {
        let listener = match bind(address) {
            Ok(listener) => listener,
            Err(error) => {
                // The address comes later, or another engine of this host has the port.
                if !was_refused {
                    tracing::warn!(%address, %error, "peers of overlay networks get no names from here");
                }
                was_refused = true;
                sleep(AGAIN).await;
                continue;
            }
        };
        loop {
            let Ok((stream, from)) = listener.accept().await else {
                sleep(AGAIN).await;
                break;
            };
            let is_peer = |one: &SharedNetwork| {
                SocketAddr::new(one.local, one.port) == address
                    && one.peers.contains(&from.ip().to_canonical())
            };
            if !networks.borrow().iter().any(is_peer) {
                tracing::debug!(%from, "no peer of an overlay network");
                continue;
            }
            let (networks, shared, connections) =
                (Rc::clone(&networks), Rc::clone(&shared), Rc::clone(&connections));
            tokio::task::spawn_local(async move {
                let Ok(_permit) = connections.try_acquire() else { return };
                if let Err(error) = tell(stream, from.ip().to_canonical(), address, &networks, &shared).await
                {
                    tracing::debug!(%from, %error, "a peer of an overlay network");
                }
            });
        }
    }
}

fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(64)
}

/// Tells one peer of the networks it has subscribed to and is on.
async fn tell(
    stream: TcpStream,
    peer: IpAddr,
    own: SocketAddr,
    networks: &Networks,
    shared: &Rc<Shared>,
) -> std::io::Result<()> {
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::new(reader);
    let (wanted, mut subscribed) = watch::channel(Vec::new());
    // Whatever else it says: it is there as long as it says something.
    let listening = tokio::task::spawn_local(async move {
        while let Ok(Some(message)) = hear(&mut reader).await {
            if let Message::Subscribe(vnis) = message {
                wanted.send_replace(vnis);
            }
        }
    });
    let _ends_with_this = AbortOnDrop(listening);
    let mut changes = shared.changed.subscribe();
    let mut said: HashMap<u32, Vec<Entry>> = HashMap::new();
    loop {
        let vnis = subscribed.borrow_and_update().clone();
        changes.borrow_and_update();
        let of_peer: Vec<SharedNetwork> = networks
            .borrow()
            .iter()
            .filter(|one| vnis.contains(&one.vni) && one.peers.contains(&peer))
            .filter(|one| SocketAddr::new(one.local, one.port) == own)
            .cloned()
            .collect();
        for network in of_peer {
            let entries = entries(shared, &network.network);
            if said.get(&network.vni) != Some(&entries) {
                say(&mut writer, &Message::Entries { vni: network.vni, entries: entries.clone() }).await?;
                said.insert(network.vni, entries);
            }
        }
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return Ok(()) },
            changed = subscribed.changed() => if changed.is_err() { return Ok(()) },
            () = sleep(BEAT) => say(&mut writer, &Message::Beat).await?,
        }
    }
}

struct AbortOnDrop(JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// The engine's own containers on a network.
fn entries(shared: &Shared, network: &str) -> Vec<Entry> {
    let table = shared.table.borrow();
    let mut entries: Vec<Entry> = table
        .on(network)
        .filter(|(id, _)| !id.starts_with("peer/"))
        .map(|(id, place)| Entry {
            id: id.to_owned(),
            names: place.names.clone(),
            ipv4: place.ipv4,
            ipv6: place.ipv6,
        })
        .take(MOST_ENTRIES)
        .collect();
    entries.sort_by(|one, other| one.id.cmp(&other.id));
    entries
}

/// Hears of one peer for as long as it is one.
async fn call(peer: SocketAddr, local: IpAddr, networks: Networks, shared: Rc<Shared>) {
    let mut silent_since: Option<tokio::time::Instant> = None;
    loop {
        match listen_to(peer, local, &networks, &shared, &mut silent_since).await {
            Ok(()) => {}
            Err(error) => tracing::debug!(%peer, %error, "a peer of overlay networks"),
        }
        let since = *silent_since.get_or_insert_with(tokio::time::Instant::now);
        if since.elapsed() > REMEMBERED {
            for network in with_peer(&networks, peer, local) {
                forget(&shared, &network, peer.ip());
            }
        }
        sleep(AGAIN).await;
    }
}

fn with_peer(networks: &Networks, peer: SocketAddr, local: IpAddr) -> Vec<SharedNetwork> {
    let networks = networks.borrow();
    let with = networks
        .iter()
        .filter(|one| one.port == peer.port() && one.local == local && one.peers.contains(&peer.ip()));
    with.cloned().collect()
}

async fn listen_to(
    peer: SocketAddr,
    local: IpAddr,
    networks: &Networks,
    shared: &Rc<Shared>,
    silent_since: &mut Option<tokio::time::Instant>,
) -> std::io::Result<()> {
    let socket = if peer.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // The peer knows this host by that address.
    socket.bind(SocketAddr::new(local, 0))?;
    let (reader, mut writer) = timeout(SILENCE, socket.connect(peer)).await??.into_split();
    // A message that has come in part must not be given up for something else that happens.
    let (heard, mut messages) = mpsc::channel(1);
    let hearing = tokio::task::spawn_local(async move {
        let mut reader = BufReader::new(reader);
        loop {
            let message = hear(&mut reader).await;
            let is_last = !matches!(message, Ok(Some(_)));
            if heard.send(message).await.is_err() || is_last {
                return;
            }
        }
    });
    let _ends_with_this = AbortOnDrop(hearing);
    let mut changes = shared.changed.subscribe();
    let mut beat = interval(BEAT);
    let mut subscribed: Vec<u32> = Vec::new();
    loop {
        changes.borrow_and_update();
        let wanted: Vec<u32> = with_peer(networks, peer, local).iter().map(|one| one.vni).collect();
        if wanted != subscribed {
            say(&mut writer, &Message::Subscribe(wanted.clone())).await?;
            subscribed = wanted;
        }
        tokio::select! {
            message = messages.recv() => {
                let Some(message) = message.transpose()?.flatten() else { return Ok(()) };
                *silent_since = None;
                if let Message::Entries { vni, entries } = message {
                    let network = with_peer(networks, peer, local).into_iter().find(|one| one.vni == vni);
                    if let Some(network) = network {
                        enter(shared, &network, peer.ip(), entries);
                    }
                }
            }
            changed = changes.changed() => if changed.is_err() { return Ok(()) },
            _ = beat.tick() => say(&mut writer, &Message::Beat).await?,
        }
    }
}

/// What a peer has on a network, in place of what it had.
fn enter(shared: &Shared, network: &SharedNetwork, peer: IpAddr, entries: Vec<Entry>) {
    forget(shared, network, peer);
    let is_within = |address: IpAddr| network.subnets.iter().any(|subnet| subnet.contains(&address));
    let mut table = shared.table.borrow_mut();
    for entry in entries.into_iter().take(MOST_ENTRIES) {
        let residence = Residence {
            network: network.network.clone(),
            network_name: network.network_name.clone(),
            names: entry
                .names
                .into_iter()
                .filter(|name| !name.is_empty() && name.len() <= 253)
                .take(64)
                .collect(),
            ipv4: entry.ipv4.filter(|address| is_within((*address).into())),
            ipv6: entry.ipv6.filter(|address| is_within((*address).into())),
        };
        if entry.id.len() > 128 || (residence.ipv4.is_none() && residence.ipv6.is_none()) {
            continue;
        }
        table.put(Resident {
            id: resident_id(&network.network, peer, &entry.id),
            residences: vec![residence],
            ..Resident::default()
        });
    }
}

async fn say(writer: &mut (impl tokio::io::AsyncWrite + Unpin), message: &Message) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    timeout(SILENCE, writer.write_all(&line)).await?
}

/// The next message; `None` at the end.
async fn hear(reader: &mut (impl tokio::io::AsyncBufRead + Unpin)) -> std::io::Result<Option<Message>> {
    let mut line = Vec::new();
    let mut bounded = reader.take(LONGEST);
    let length = timeout(SILENCE, bounded.read_until(b'\n', &mut line)).await??;
    if length == 0 {
        return Ok(None);
    }
    if line.last() != Some(&b'\n') {
        return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, "a message without an end"));
    }
    Ok(Some(serde_json::from_slice(&line)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One helper of a host that has an address of the loopback.
    struct Host {
        shared: Rc<Shared>,
        sharing: Sharing,
        network: SharedNetwork,
    }

    fn host(number: u8, others: &[u8], port: u16, vni: u32) -> Host {
        let address = |number: u8| IpAddr::from([127, 0, 9, number]);
        let network = SharedNetwork {
            network: format!("id-at-{number}"),
            network_name: "fleet".to_owned(),
            vni,
            local: address(number),
            port,
            peers: others.iter().map(|other| address(*other)).collect(),
            subnets: vec!["10.9.0.0/16".parse().unwrap()],
        };
        Host { shared: Rc::default(), sharing: Sharing::default(), network }
    }

    impl Host {
        fn begin(&mut self) {
            self.sharing.set(vec![self.network.clone()], &self.shared);
        }

        fn put(&self, id: &str, names: &[&str], address: [u8; 4]) {
            self.shared.table.borrow_mut().put(Resident {
                id: id.to_owned(),
                residences: vec![Residence {
                    network: self.network.network.clone(),
                    network_name: "fleet".to_owned(),
                    names: names.iter().map(|name| (*name).to_owned()).collect(),
                    ipv4: Some(address.into()),
                    ipv6: None,
                }],
                ..Resident::default()
            });
            self.shared.changed.send_modify(|count| *count += 1);
        }

        fn found(&self, client: &str, name: &str) -> usize {
            self.shared.table.borrow().look_up(client, name).map_or(0, |found| found.ipv4.len())
        }
    }

    async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
        for _ in 0..2000 {
            if condition() {
                return;
            }
            sleep(Duration::from_millis(10)).await;
        }
        panic!("{what}");
    }

    fn free_port() -> u16 {
        std::net::TcpListener::bind("127.0.9.1:0").unwrap().local_addr().unwrap().port()
    }

    fn run(test: impl Future<Output = ()>) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        tokio::task::LocalSet::new().block_on(&runtime, test);
    }

    #[test]
    fn names_are_known_on_all_hosts_of_a_network() {
        run(async {
            let port = free_port();
            let mut hosts = [host(1, &[2, 3], port, 7), host(2, &[1, 3], port, 7), host(3, &[1, 2], port, 7)];
            hosts[0].put("a", &["one", "svc"], [10, 9, 1, 5]);
            hosts.iter_mut().for_each(Host::begin);
            hosts[1].put("b", &["two", "svc"], [10, 9, 2, 5]);
            hosts[2].put("c", &["three"], [10, 9, 3, 5]);
            eventually("all know each other", || {
                hosts[2].found("c", "one") == 1
                    && hosts[0].found("a", "two.fleet") == 1
                    && hosts[1].found("b", "three") == 1
            })
            .await;
            eventually("an alias stands for all", || hosts[2].found("c", "svc") == 2).await;
            let called = hosts[2].shared.table.borrow().look_up_address("c", [10, 9, 2, 5].into());
            assert_eq!(called.as_deref(), Some("two.fleet"));
            // Changes and ends follow.
            hosts[1].shared.table.borrow_mut().remove("b");
            hosts[1].put("b2", &["deux"], [10, 9, 2, 6]);
            eventually("changes are heard of", || {
                hosts[2].found("c", "deux") == 1 && hosts[2].found("c", "two") == 0
            })
            .await;
            // A network that is gone takes the names of others along.
            hosts[2].sharing.set(Vec::new(), &hosts[2].shared);
            assert_eq!(hosts[2].found("c", "one"), 0);
            assert_eq!(hosts[2].found("c", "three"), 1, "its own stay");
        });
    }

    #[test]
    fn who_is_no_peer_is_told_nothing_and_believed_nothing() {
        run(async {
            let port = free_port();
            // The third stands on nobody's list, and the second has another network.
            let mut hosts = [host(1, &[2], port, 7), host(2, &[1], port, 8), host(3, &[1, 2], port, 7)];
            hosts[0].put("a", &["one"], [10, 9, 1, 5]);
            hosts[1].put("b", &["two"], [10, 9, 2, 5]);
            hosts[2].put("c", &["three"], [10, 9, 3, 5]);
            hosts.iter_mut().for_each(Host::begin);
            let to = SocketAddr::new([127, 0, 9, 1].into(), port);
            let connect = || async move {
                let stranger = TcpSocket::new_v4().unwrap();
                stranger.bind("127.0.9.3:0".parse().unwrap()).unwrap();
                stranger.connect(to).await
            };
            let mut connected = connect().await;
            while connected.is_err() {
                sleep(Duration::from_millis(10)).await;
                connected = connect().await;
            }
            let mut connection = connected.unwrap();
            connection.write_all(b"{\"Subscribe\":[7]}\n").await.ok();
            let mut said = Vec::new();
            connection.read_to_end(&mut said).await.ok();
            assert!(said.is_empty(), "{}", String::from_utf8_lossy(&said));
            assert_eq!(hosts[2].found("c", "one"), 0);
            assert_eq!(hosts[1].found("b", "one"), 0);
            assert_eq!(hosts[0].found("a", "two"), 0);
        });
    }

    #[test]
    fn what_a_peer_says_is_bounded() {
        let host = host(1, &[2], 1, 7);
        host.put("a", &["own"], [10, 9, 1, 5]);
        let entry = |id: &str, names: &[&str], ipv4: [u8; 4]| Entry {
            id: id.to_owned(),
            names: names.iter().map(|name| (*name).to_owned()).collect(),
            ipv4: Some(ipv4.into()),
            ipv6: None,
        };
        let entries = vec![
            entry("x", &["good", &"n".repeat(300), ""], [10, 9, 2, 5]),
            entry("y", &["elsewhere"], [203, 0, 113, 5]),
            entry(&"z".repeat(500), &["long"], [10, 9, 2, 6]),
        ];
        enter(&host.shared, &host.network, [127, 0, 9, 2].into(), entries);
        assert_eq!(host.found("a", "good"), 1);
        for refused in ["elsewhere", "long", &"n".repeat(300)] {
            assert_eq!(host.found("a", refused), 0, "{refused}");
        }
        enter(&host.shared, &host.network, [127, 0, 9, 2].into(), Vec::new());
        assert_eq!(host.found("a", "good"), 0);
    }
}
