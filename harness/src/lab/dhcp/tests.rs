//! The server's answers, message by message, to a client that is written out byte by byte here; and a real client's way through a real switch.

use std::net::Ipv4Addr;
use std::time::Duration;

use camino::Utf8Path;
use kvm::{Mac, Port, PortSpec, Supervisor, Switch, SwitchSpec};
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    ArpPacket, ArpRepr, DhcpPacket, DhcpRepr, EthernetAddress, EthernetFrame, EthernetProtocol, IpAddress, Ipv4Packet,
    Ipv4Repr, UdpPacket, UdpRepr,
};

use super::respond::{Answer, Asked, Exchange, Outcome, Responder, Said};
use super::*;
use crate::lab::evidence::testing::Bench;
use crate::plan::ReservationPlan;

const SERVER: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 254);
const FIRST: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 1);
const SECOND: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 2);
const ZERO: Ipv4Addr = Ipv4Addr::UNSPECIFIED;

const SERVER_MAC: Mac = Mac::new([0x52, 0x54, 0, 0, 0, 0xfe]);
const CLIENT: Mac = Mac::new([0x52, 0x54, 0, 0, 0, 1]);
const STRANGER: Mac = Mac::new([0x52, 0x54, 0, 0, 0, 9]);

const LEASE_S: u32 = 8000;

fn plan() -> DhcpPlan {
    let held = |node: &str, last, address| ReservationPlan {
        node: node.to_owned(),
        mac: Mac::new([0x52, 0x54, 0, 0, 0, last]),
        address,
    };
    DhcpPlan {
        network: "cluster".to_owned(),
        switch: "access".to_owned(),
        port: 3,
        mac: SERVER_MAC,
        address: SERVER,
        prefix: 24,
        lease_s: LEASE_S,
        reservations: vec![held("server-1", 1, FIRST), held("server-2", 2, SECOND)],
    }
}

/// A client's message, as its bytes are laid out by RFC 2131 and RFC 951: not by what the server reads it with.
#[derive(Clone)]
struct Client {
    mac: Mac,
    current: Ipv4Addr,
    relay: Ipv4Addr,
    to: Ipv4Addr,
    broadcast: bool,
    options: Vec<u8>,
}

impl Client {
    fn says(kind: u8) -> Self {
        // networkd's client identifier by the MAC: hardware type 1 and the address.
        let mut options = vec![53, 1, kind, 61, 7, 1];
        options.extend(CLIENT.octets());
        Self { mac: CLIENT, current: ZERO, relay: ZERO, to: Ipv4Addr::BROADCAST, broadcast: false, options }
    }

    fn option(mut self, kind: u8, data: &[u8]) -> Self {
        self.options.extend([kind, u8::try_from(data.len()).unwrap()]);
        self.options.extend(data);
        self
    }

    fn requested(self, address: Ipv4Addr) -> Self {
        self.option(50, &address.octets())
    }

    fn chosen(self, server: Ipv4Addr) -> Self {
        self.option(54, &server.octets())
    }

    fn from(mut self, mac: Mac) -> Self {
        self.mac = mac;
        self
    }

    fn unicast_as(mut self, current: Ipv4Addr) -> Self {
        (self.current, self.to) = (current, SERVER);
        self
    }

    fn body(&self) -> Vec<u8> {
        let mut body = vec![1, 1, 6, 0, 0xde, 0xad, 0xbe, 0xef, 0, 7, if self.broadcast { 0x80 } else { 0 }, 0];
        body.extend(self.current.octets());
        body.extend([0; 8]);
        body.extend(self.relay.octets());
        body.extend(self.mac.octets());
        body.resize(236, 0);
        body.extend([0x63, 0x82, 0x53, 0x63]);
        body.extend(&self.options);
        body.push(255);
        body
    }

    fn frame(&self) -> Vec<u8> {
        let body = self.body();
        let mut frame = if self.to == SERVER { SERVER_MAC.octets().to_vec() } else { vec![0xff; 6] };
        frame.extend(self.mac.octets());
        frame.extend([8, 0]);
        let length = u16::try_from(28 + body.len()).unwrap();
        let mut ip = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0];
        ip[2..4].copy_from_slice(&length.to_be_bytes());
        ip.extend(self.current.octets());
        ip.extend(self.to.octets());
        let sum = checksum(&ip);
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
        frame.extend(ip);
        frame.extend([0, 68, 0, 67]);
        frame.extend((length - 20).to_be_bytes());
        // No checksum, which UDP allows over IPv4.
        frame.extend([0, 0]);
        frame.extend(body);
        frame
    }
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let sum: u32 = bytes.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    !u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap()
}

fn discover() -> Client {
    Client::says(1)
}

fn request() -> Client {
    Client::says(3)
}

fn respond(client: &Client) -> Outcome {
    Responder::new(&plan()).respond(&client.frame())
}

/// What was recorded of a client's message.
#[track_caller]
fn exchange(outcome: &Outcome) -> Exchange {
    match &outcome.said {
        Some(Said::Exchange(exchange)) => exchange.clone(),
        other => panic!("{other:?}"),
    }
}

/// A reply taken apart, with every checksum verified: to whom at which layer, and its options.
struct Reply {
    mac: EthernetAddress,
    ip: Ipv4Addr,
    kind: u8,
    yours: Ipv4Addr,
    transaction: u32,
    options: Vec<(u8, Vec<u8>)>,
}

impl Reply {
    #[track_caller]
    fn of(outcome: &Outcome) -> Self {
        Self::read(outcome.reply.as_ref().expect("no reply"))
    }

    fn read(frame: &[u8]) -> Self {
        let checks = ChecksumCapabilities::default();
        let ethernet = EthernetFrame::new_checked(frame).unwrap();
        assert_eq!(ethernet.ethertype(), EthernetProtocol::Ipv4);
        assert_eq!(ethernet.src_addr(), EthernetAddress(SERVER_MAC.octets()));
        let ip = Ipv4Packet::new_checked(ethernet.payload()).unwrap();
        let header = Ipv4Repr::parse(&ip, &checks).unwrap();
        assert_eq!(header.src_addr, SERVER);
        let udp = UdpPacket::new_checked(ip.payload()).unwrap();
        assert_ne!(udp.checksum(), 0);
        let ports = UdpRepr::parse(&udp, &IpAddress::Ipv4(header.src_addr), &IpAddress::Ipv4(header.dst_addr), &checks)
            .unwrap();
        assert_eq!((ports.src_port, ports.dst_port), (67, 68));
        assert!(udp.payload().len() >= 300, "shorter than BOOTP allows");
        let packet = DhcpPacket::new_checked(udp.payload()).unwrap();
        DhcpRepr::parse(&packet).unwrap();
        let options: Vec<_> = packet.options().map(|option| (option.kind, option.data.to_vec())).collect();
        Self {
            mac: ethernet.dst_addr(),
            ip: header.dst_addr,
            kind: options.iter().find(|(kind, _)| *kind == 53).unwrap().1[0],
            yours: packet.your_ip(),
            transaction: packet.transaction_id(),
            options,
        }
    }

    fn option(&self, kind: u8) -> Option<&[u8]> {
        self.options.iter().find(|(one, _)| *one == kind).map(|(_, data)| data.as_slice())
    }

    fn seconds(&self, kind: u8) -> u32 {
        u32::from_be_bytes(self.option(kind).unwrap().try_into().unwrap())
    }
}

const OFFER: u8 = 2;
const ACK: u8 = 5;
const NAK: u8 = 6;

#[test]
fn a_discover_is_offered_the_reservation_to_the_client_alone() {
    let outcome = respond(&discover().option(12, b"server-1"));
    let reply = Reply::of(&outcome);
    assert_eq!((reply.kind, reply.yours, reply.transaction), (OFFER, FIRST, 0xdead_beef));
    assert_eq!((reply.mac, reply.ip), (EthernetAddress(CLIENT.octets()), FIRST));
    assert_eq!(reply.option(1).unwrap(), [255, 255, 255, 0]);
    assert_eq!(reply.option(54).unwrap(), SERVER.octets());
    assert_eq!([51, 58, 59].map(|kind| reply.seconds(kind)), [LEASE_S, LEASE_S / 2, LEASE_S / 8 * 7]);
    // RFC 6842: the client's identifier comes back as it was.
    assert_eq!(reply.option(61).unwrap(), [1, 0x52, 0x54, 0, 0, 0, 1]);
    // No router, no name server: what is not known here is not made up.
    assert_eq!((reply.option(3), reply.option(6)), (None, None));
    assert_eq!(exchange(&outcome).to_string(), "server-1 (52:54:00:00:00:01): DISCOVER: OFFER of 192.168.1.1");
}

#[test]
fn who_can_only_hear_broadcasts_gets_one() {
    let reply = Reply::of(&respond(&Client { broadcast: true, ..discover() }));
    assert_eq!((reply.mac, reply.ip), (EthernetAddress::BROADCAST, Ipv4Addr::BROADCAST));
    assert_eq!(reply.yours, FIRST);
}

#[test]
fn a_rapid_commit_is_granted_at_once() {
    let outcome = respond(&discover().option(80, &[]));
    let reply = Reply::of(&outcome);
    assert_eq!((reply.kind, reply.yours, reply.option(80)), (ACK, FIRST, Some(&[][..])));
    assert_eq!(exchange(&outcome).answer, Answer::Ack { address: FIRST, lease_s: LEASE_S });
}

#[test]
fn each_state_of_a_client_gets_its_answer() {
    let ack = Answer::Ack { address: FIRST, lease_s: LEASE_S };
    let nak = Answer::Nak("another address is reserved for it");
    let rebind = |address| Client { current: address, ..request() };
    for (client, asked, answer) in [
        (request().requested(FIRST).chosen(SERVER), Asked::Select(Some(FIRST)), ack),
        (request().requested(SECOND).chosen(SERVER), Asked::Select(Some(SECOND)), nak),
        (request().chosen(SERVER), Asked::Select(None), nak),
        (request().requested(FIRST), Asked::Reboot(FIRST), ack),
        (request().requested(SECOND), Asked::Reboot(SECOND), nak),
        (request().unicast_as(FIRST), Asked::Renew(FIRST), ack),
        (request().unicast_as(SECOND), Asked::Renew(SECOND), nak),
        (rebind(FIRST), Asked::Rebind(FIRST), ack),
        (rebind(SECOND), Asked::Rebind(SECOND), nak),
        // Neither an address nor a server: nothing that could be right.
        (request(), Asked::Rebind(ZERO), nak),
    ] {
        let outcome = respond(&client);
        let Exchange { asked: was, answer: said, node, .. } = exchange(&outcome);
        assert_eq!((was, said, node.as_deref()), (asked, answer, Some("server-1")));
        let reply = Reply::of(&outcome);
        if answer == ack {
            assert_eq!((reply.kind, reply.yours, reply.ip), (ACK, FIRST, FIRST), "{asked:?}");
            assert_eq!(reply.seconds(51), LEASE_S, "{asked:?}");
        } else {
            // RFC 2131, section 4.3.2: to everybody, with no address and no lease in it.
            assert_eq!((reply.kind, reply.yours, reply.ip), (NAK, ZERO, Ipv4Addr::BROADCAST), "{asked:?}");
            assert_eq!((reply.option(51), reply.option(1)), (None, None), "{asked:?}");
            assert!(reply.option(54).is_some() && reply.option(56).is_some(), "{asked:?}");
        }
    }
}

#[test]
fn what_is_not_answered_is_recorded_with_the_reason() {
    let elsewhere = Ipv4Addr::new(192, 168, 1, 77);
    for (client, words) in [
        (discover().from(STRANGER), "52:54:00:00:00:09: DISCOVER: not answered, its MAC has no reservation"),
        (
            request().from(STRANGER).option(12, b"evil\x1b[31m\n").requested(FIRST).chosen(SERVER),
            "52:54:00:00:00:09 (calls itself evil??31m?): REQUEST of 192.168.1.1: not answered, its MAC has no reservation",
        ),
        (
            request().requested(FIRST).chosen(elsewhere),
            "server-1 (52:54:00:00:00:01): REQUEST of 192.168.1.1: not answered, it is meant for another DHCP server",
        ),
        (
            Client { relay: elsewhere, ..discover() },
            "server-1 (52:54:00:00:00:01): DISCOVER: not answered, it came through a relay",
        ),
        (
            Client::says(4).requested(FIRST).chosen(SERVER),
            "server-1 (52:54:00:00:00:01): DECLINE of 192.168.1.1: not answered, it says that somebody else has the address",
        ),
        (
            Client::says(7).chosen(SERVER).unicast_as(FIRST),
            "server-1 (52:54:00:00:00:01): RELEASE of 192.168.1.1: not answered, a reservation stays",
        ),
        (
            Client::says(8).unicast_as(FIRST),
            "server-1 (52:54:00:00:00:01): INFORM: not answered, there is nothing to inform of",
        ),
    ] {
        let outcome = respond(&client);
        assert_eq!(outcome.reply, None, "{words}");
        assert_eq!(exchange(&outcome).to_string(), words);
    }
}

#[test]
fn frames_for_others_are_none_of_ours() {
    let responder = Responder::new(&plan());
    let mut to_another = discover().frame();
    to_another[..6].copy_from_slice(&CLIENT.octets());
    let mut another_port = discover().frame();
    another_port[14 + 20 + 3] = 53;
    let mut tagged = discover().frame();
    tagged.splice(12..12, [0x81, 0, 0, 200]);
    let another_host = Client { to: Ipv4Addr::new(192, 168, 1, 7), ..discover() }.frame();
    for frame in [&[][..], &[0xff; 13], &[0xff; 60], &to_another, &another_port, &another_host, &tagged] {
        assert_eq!(responder.respond(frame), Outcome { reply: None, said: None }, "{frame:02x?}");
    }
}

#[test]
fn malformed_messages_are_recorded_and_never_answered() {
    let responder = Responder::new(&plan());
    let good = discover().frame();
    assert!(responder.respond(&good).reply.is_some());
    let with = |at: usize, byte: u8| {
        let mut frame = good.clone();
        frame[at] = byte;
        frame
    };
    let (ip, dhcp) = (14, 14 + 28);
    for (frame, words) in [
        (with(ip + 10, 0x12), "ignored an IPv4 header with a wrong checksum, or a fragment"),
        (with(ip + 20 + 7, 0x12), "ignored a UDP datagram with a wrong checksum"),
        (with(ip + 20 + 5, 0xff), "ignored a UDP datagram that is cut short"),
        (with(dhcp, 2), "ignored a DHCP message that is none: its type, hardware type or magic number"),
        (with(dhcp + 1, 32), "ignored a DHCP message that is none: its type, hardware type or magic number"),
        (with(dhcp + 236, 0), "ignored a DHCP message that is none: its type, hardware type or magic number"),
        (with(dhcp + 242, 99), "ignored a DHCP message that is none: its type, hardware type or magic number"),
    ] {
        let outcome = responder.respond(&frame);
        assert_eq!(outcome.reply, None, "{words}");
        assert_eq!(outcome.said.unwrap().to_string(), words);
    }
    // Cut anywhere, or with any byte turned over: never a panic.
    for length in 0..good.len() {
        responder.respond(&good[..length]);
        responder.respond(&with(length, !good[length]));
    }
    // Options that claim to be longer than the message, and a client identifier of a foreign kind.
    for options in [&[53, 1, 1, 50, 200, 1][..], &[53, 1, 1, 61, 7, 9, 1, 2, 3, 4, 5, 6], &[53], &[]] {
        responder.respond(&Client { options: options.to_vec(), ..discover() }.frame());
    }
}

#[test]
fn the_servers_own_address_is_told_to_who_asks() {
    let responder = Responder::new(&plan());
    let who_has = |address: Ipv4Addr| {
        let mut frame = vec![0xff; 6];
        frame.extend(CLIENT.octets());
        frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        frame.extend(CLIENT.octets());
        frame.extend(FIRST.octets());
        frame.extend([0; 6]);
        frame.extend(address.octets());
        frame
    };
    let reply = responder.respond(&who_has(SERVER)).reply.unwrap();
    let ethernet = EthernetFrame::new_checked(reply.as_slice()).unwrap();
    assert_eq!(ethernet.dst_addr(), EthernetAddress(CLIENT.octets()));
    let ArpRepr::EthernetIpv4 { source_hardware_addr, source_protocol_addr, target_protocol_addr, .. } =
        ArpRepr::parse(&ArpPacket::new_checked(ethernet.payload()).unwrap()).unwrap()
    else {
        panic!("no ARP over Ethernet");
    };
    assert_eq!(source_hardware_addr, EthernetAddress(SERVER_MAC.octets()));
    assert_eq!((source_protocol_addr, target_protocol_addr), (SERVER, FIRST));
    assert_eq!(responder.respond(&who_has(SECOND)), Outcome { reply: None, said: None });
}

#[test]
fn why_a_node_has_no_lease_is_told_by_what_was_seen() {
    let plan = plan();
    let (book, leases) = leases::open(&plan);
    let hears = |client: &Client| book.enter(&exchange(&respond(client)));
    assert_eq!(leases.why_not(CLIENT), "its DISCOVER was never seen on switch access port 3");
    hears(&discover());
    hears(&discover());
    assert_eq!(leases.why_not(CLIENT), "192.168.1.1 was offered to its 2 DISCOVERs and never requested");
    hears(&request().requested(SECOND).chosen(SERVER));
    assert_eq!(leases.why_not(CLIENT), "its REQUEST of 192.168.1.2 was refused: another address is reserved for it");
    hears(&Client::says(4).requested(FIRST).chosen(SERVER));
    assert_eq!(leases.why_not(CLIENT), "it declined its address: somebody else has it");
    assert_eq!(leases.strangers(), Vec::<String>::new());
    hears(&discover().from(STRANGER).option(12, b"server-2"));
    hears(&discover().from(STRANGER));
    assert_eq!(
        leases.strangers(),
        ["52:54:00:00:00:09, which calls itself server-2, has no reservation on network cluster and asked 2 times"]
    );
    // However many there are: the book stays small.
    for last in 0..=255 {
        hears(&discover().from(Mac::new([2, 0, 0, 0, 0, last])));
    }
    assert_eq!(leases.strangers().len(), 16);
}

/// A client on a switch of its own, frames moved by the real thing.
#[tokio::test]
async fn a_lease_comes_over_a_real_switch_and_a_stranger_gets_none() {
    let dir = tempfile::tempdir().unwrap();
    let dir = Utf8Path::from_path(dir.path()).unwrap();
    let supervisor = Supervisor::new().unwrap();
    let port = |port| PortSpec { port, label: format!("port {port}"), native_vlan: Some(0), tagged_vlans: vec![] };
    let spec = SwitchSpec {
        name: "access".to_owned(),
        socket_dir: dir.join("sw"),
        mgmt_socket: dir.join("mgmt"),
        ports: vec![port(1), port(2), port(3)],
    };
    let switch = Switch::start(spec, &supervisor).await.unwrap();
    let plan = plan();
    let own = Port::plug(&switch, plan.port, "dhcp").await.unwrap();
    let bench = Bench::new();
    let (server, leases) = DhcpServer::new(&plan, own, bench.pump.recorder());
    let serving = tokio::spawn(server.serve());

    let client = Port::plug(&switch, 1, "a client").await.unwrap();
    let hears = async || {
        let mut frame = vec![0; FRAME_MAX_BYTES];
        let length = tokio::time::timeout(Duration::from_secs(5), client.receive(&mut frame)).await.unwrap().unwrap();
        Reply::read(&frame[..length])
    };
    let stranger = Port::plug(&switch, 2, "a stranger").await.unwrap();
    stranger.send(&discover().from(STRANGER).option(12, b"server-2").frame()).await.unwrap();
    // The switch floods the stranger's broadcast to the client as well.
    let mut flooded = vec![0; FRAME_MAX_BYTES];
    let length = client.receive(&mut flooded).await.unwrap();
    assert_eq!(flooded[..length], discover().from(STRANGER).option(12, b"server-2").frame());

    client.send(&discover().frame()).await.unwrap();
    assert_eq!(hears().await.kind, OFFER);
    client.send(&request().requested(FIRST).chosen(SERVER).frame()).await.unwrap();
    let granted = hears().await;
    assert_eq!((granted.kind, granted.yours), (ACK, FIRST));
    tokio::time::timeout(Duration::from_secs(5), leases.leased(CLIENT)).await.unwrap();
    client.send(&request().unicast_as(FIRST).frame()).await.unwrap();
    assert_eq!((hears().await.kind, hears_nothing(&stranger).await), (ACK, true));

    let log = std::fs::read_to_string(bench.record.path().join("dhcp.log")).unwrap();
    let lines: Vec<_> = log.lines().map(|line| line.split_once(' ').unwrap().1).collect();
    assert_eq!(
        lines,
        [
            "network cluster: 52:54:00:00:00:09 (calls itself server-2): DISCOVER: not answered, its MAC has no reservation",
            "network cluster: server-1 (52:54:00:00:00:01): DISCOVER: OFFER of 192.168.1.1",
            "network cluster: server-1 (52:54:00:00:00:01): REQUEST of 192.168.1.1: ACK of 192.168.1.1 for 8000 s",
            "network cluster: server-1 (52:54:00:00:00:01): REQUEST to renew 192.168.1.1: ACK of 192.168.1.1 for 8000 s",
        ]
    );
    assert_eq!(leases.strangers().len(), 1);
    assert_eq!(
        leases.why_not(Mac::new([0x52, 0x54, 0, 0, 0, 2])),
        "its DISCOVER was never seen on switch access port 3"
    );

    // The switch's end is the server's end.
    switch.stop(Duration::from_secs(3)).await.unwrap();
    let end = tokio::time::timeout(Duration::from_secs(5), serving).await.unwrap().unwrap();
    assert!(end.to_string().starts_with("switch port access:3 is closed"), "{end}");
    assert!(supervisor.shutdown(Duration::from_secs(3)).await.is_empty());
}

/// Whether nothing but the client's own broadcasts has come to a port so far.
async fn hears_nothing(port: &Port) -> bool {
    let mut frame = vec![0; FRAME_MAX_BYTES];
    while let Ok(Ok(length)) = tokio::time::timeout(Duration::from_millis(50), port.receive(&mut frame)).await {
        if frame[..length].starts_with(&STRANGER.octets()) {
            return false;
        }
    }
    true
}
