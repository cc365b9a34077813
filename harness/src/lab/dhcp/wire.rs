//! Frames: from bytes to what a DHCP client or an ARP neighbour asks, and from an answer back to bytes.
//!
//! Nothing here panics on what comes from a guest: lengths, checksums and fields are checked by smoltcp's parsers, and what they refuse is named.

use std::net::Ipv4Addr;

use kvm::Mac;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, DHCP_CLIENT_PORT, DHCP_SERVER_PORT, DhcpMessageType, DhcpOption, DhcpPacket,
    DhcpRepr, EthernetAddress, EthernetFrame, EthernetProtocol, EthernetRepr, IpAddress, IpProtocol, Ipv4Packet,
    Ipv4Repr, UdpPacket, UdpRepr,
};

/// Options beyond those smoltcp reads: RFC 2132 (host name, renewal and rebinding time, client identifier), RFC 4039 (rapid commit).
const OPTION_HOST_NAME: u8 = 12;
const OPTION_MESSAGE: u8 = 56;
const OPTION_RENEWAL_S: u8 = 58;
const OPTION_REBINDING_S: u8 = 59;
const OPTION_CLIENT_ID: u8 = 61;
const OPTION_RAPID_COMMIT: u8 = 80;

/// The smallest BOOTP message (RFC 1542, section 2.1); some clients drop shorter ones.
const BOOTP_MIN_BYTES: usize = 300;
const HOP_LIMIT: u8 = 64;

/// Longest host name that is shown; what a guest says of itself goes into logs.
const HOST_NAME_MAX_BYTES: usize = 63;

/// What a frame is to a DHCP server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Incoming {
    /// Somebody else's business.
    NotOurs,
    /// Meant for the server, and no message it can read.
    Malformed(&'static str),
    /// Somebody asks for the server's own hardware address.
    WhoHas { mac: Mac, address: Ipv4Addr },
    /// A client's message.
    Message(Message),
}

/// A client's message, as much of it as a server without relays needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) kind: Kind,
    pub(super) mac: Mac,
    pub(super) transaction: u32,
    pub(super) secs: u16,
    /// `ciaddr`: the address the client already uses.
    pub(super) client_address: Ipv4Addr,
    /// `giaddr`: the relay it came through.
    pub(super) relay: Ipv4Addr,
    pub(super) requested: Option<Ipv4Addr>,
    /// The server it has chosen.
    pub(super) server: Option<Ipv4Addr>,
    /// Whether it was sent to everybody.
    pub(super) to_all: bool,
    /// Whether the client can only hear what is sent to everybody.
    pub(super) broadcast: bool,
    pub(super) rapid_commit: bool,
    /// Sent back as it came (RFC 6842).
    pub(super) client_id: Option<Vec<u8>>,
    pub(super) host_name: Option<String>,
}

/// What a client may say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Discover,
    Request,
    Decline,
    Release,
    Inform,
}

/// The server's own addresses.
#[derive(Debug, Clone, Copy)]
pub(super) struct Own {
    pub(super) mac: Mac,
    pub(super) address: Ipv4Addr,
    pub(super) prefix: u8,
}

impl Own {
    fn mask(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(u32::MAX.checked_shl(32 - u32::from(self.prefix)).unwrap_or(0))
    }

    fn takes(self, to: Ipv4Addr) -> bool {
        to == self.address || to.is_broadcast() || to == self.address | !self.mask()
    }
}

/// Reads a frame.
pub(super) fn read(frame: &[u8], own: Own) -> Incoming {
    let Ok(ethernet) = EthernetFrame::new_checked(frame) else { return Incoming::NotOurs };
    let to = ethernet.dst_addr();
    if !to.is_broadcast() && to != EthernetAddress(own.mac.octets()) {
        return Incoming::NotOurs;
    }
    match ethernet.ethertype() {
        EthernetProtocol::Arp => who_has(ethernet.payload(), own),
        EthernetProtocol::Ipv4 => message(ethernet.payload(), own),
        _ => Incoming::NotOurs,
    }
}

fn who_has(payload: &[u8], own: Own) -> Incoming {
    match ArpPacket::new_checked(payload).and_then(|packet| ArpRepr::parse(&packet)) {
        Ok(ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Request,
            source_hardware_addr,
            source_protocol_addr,
            target_protocol_addr,
            ..
        }) if target_protocol_addr == own.address => {
            Incoming::WhoHas { mac: Mac::new(source_hardware_addr.0), address: source_protocol_addr }
        }
        _ => Incoming::NotOurs,
    }
}

fn message(payload: &[u8], own: Own) -> Incoming {
    let checks = ChecksumCapabilities::default();
    let Ok(ip) = Ipv4Packet::new_checked(payload) else { return Incoming::NotOurs };
    if ip.next_header() != IpProtocol::Udp || !own.takes(ip.dst_addr()) {
        return Incoming::NotOurs;
    }
    let Ok(header) = Ipv4Repr::parse(&ip, &checks) else {
        return Incoming::Malformed("an IPv4 header with a wrong checksum, or a fragment");
    };
    let Ok(udp) = UdpPacket::new_checked(ip.payload()) else {
        return Incoming::Malformed("a UDP datagram that is cut short");
    };
    if udp.dst_port() != DHCP_SERVER_PORT {
        return Incoming::NotOurs;
    }
    let (from, to) = (IpAddress::Ipv4(header.src_addr), IpAddress::Ipv4(header.dst_addr));
    if UdpRepr::parse(&udp, &from, &to, &checks).is_err() {
        return Incoming::Malformed("a UDP datagram with a wrong checksum");
    }
    let Ok(packet) = DhcpPacket::new_checked(udp.payload()) else {
        return Incoming::Malformed("a DHCP message that is cut short");
    };
    let Ok(repr) = DhcpRepr::parse(&packet) else {
        return Incoming::Malformed("a DHCP message that is none: its type, hardware type or magic number");
    };
    let kind = match repr.message_type {
        DhcpMessageType::Discover => Kind::Discover,
        DhcpMessageType::Request => Kind::Request,
        DhcpMessageType::Decline => Kind::Decline,
        DhcpMessageType::Release => Kind::Release,
        DhcpMessageType::Inform => Kind::Inform,
        // Replies go to clients; and what is not known is not answered.
        _ => return Incoming::Malformed("a DHCP message of a type that no client sends"),
    };
    let option = |kind| packet.options().find(|option| option.kind == kind).map(|option| option.data);
    Incoming::Message(Message {
        kind,
        mac: Mac::new(repr.client_hardware_address.0),
        transaction: repr.transaction_id,
        secs: repr.secs,
        client_address: repr.client_ip,
        relay: repr.relay_agent_ip,
        requested: repr.requested_ip,
        server: repr.server_identifier,
        to_all: header.dst_addr != own.address,
        broadcast: repr.broadcast,
        rapid_commit: option(OPTION_RAPID_COMMIT).is_some(),
        client_id: option(OPTION_CLIENT_ID).map(<[u8]>::to_vec),
        host_name: option(OPTION_HOST_NAME).map(host_name),
    })
}

/// A host name fit for a log: what is not part of one becomes `?`.
fn host_name(bytes: &[u8]) -> String {
    let shown = |byte: &u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' => char::from(*byte),
        _ => '?',
    };
    bytes.iter().take(HOST_NAME_MAX_BYTES).map(shown).collect()
}

/// What the server says to a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reply<'a> {
    Offer {
        address: Ipv4Addr,
        lease_s: u32,
    },
    /// `rapid`: to a DISCOVER, without an offer before it.
    Ack {
        address: Ipv4Addr,
        lease_s: u32,
        rapid: bool,
    },
    Nak {
        why: &'a str,
    },
}

/// The frame that carries a reply.
pub(super) fn reply(to: &Message, own: Own, reply: Reply<'_>) -> Vec<u8> {
    let (message_type, address, lease_s) = match reply {
        Reply::Offer { address, lease_s } => (DhcpMessageType::Offer, Some(address), Some(lease_s)),
        Reply::Ack { address, lease_s, .. } => (DhcpMessageType::Ack, Some(address), Some(lease_s)),
        Reply::Nak { .. } => (DhcpMessageType::Nak, None, None),
    };
    // RFC 2131, section 4.4.5: half of the lease, and seven eighths of it.
    let (renew_s, rebind_s) = lease_s.map_or((0, 0), |lease_s| (lease_s / 2, lease_s - lease_s / 8));
    let (renew_s, rebind_s) = (renew_s.to_be_bytes(), rebind_s.to_be_bytes());
    let mut options = Vec::new();
    if lease_s.is_some() {
        options.push(DhcpOption { kind: OPTION_RENEWAL_S, data: &renew_s });
        options.push(DhcpOption { kind: OPTION_REBINDING_S, data: &rebind_s });
    }
    if let Reply::Ack { rapid: true, .. } = reply {
        options.push(DhcpOption { kind: OPTION_RAPID_COMMIT, data: &[] });
    }
    if let Reply::Nak { why } = reply {
        options.push(DhcpOption { kind: OPTION_MESSAGE, data: &why.as_bytes()[..why.len().min(255)] });
    }
    if let Some(id) = &to.client_id {
        options.push(DhcpOption { kind: OPTION_CLIENT_ID, data: id });
    }
    let repr = DhcpRepr {
        message_type,
        transaction_id: to.transaction,
        secs: 0,
        client_hardware_address: EthernetAddress(to.mac.octets()),
        client_ip: if address.is_some() { to.client_address } else { Ipv4Addr::UNSPECIFIED },
        your_ip: address.unwrap_or(Ipv4Addr::UNSPECIFIED),
        server_ip: Ipv4Addr::UNSPECIFIED,
        router: None,
        subnet_mask: address.map(|_| own.mask()),
        relay_agent_ip: Ipv4Addr::UNSPECIFIED,
        broadcast: to.broadcast,
        requested_ip: None,
        client_identifier: None,
        server_identifier: Some(own.address),
        parameter_request_list: None,
        dns_servers: None,
        max_size: None,
        lease_duration: lease_s,
        renew_duration: None,
        rebind_duration: None,
        additional_options: &options,
    };
    let mut body = vec![0; repr.buffer_len().max(BOOTP_MIN_BYTES)];
    // The buffer is as long as the message says it is; a reply that did not fit would be empty, and dropped by the client.
    let _ = repr.emit(&mut DhcpPacket::new_unchecked(body.as_mut_slice()));
    // RFC 2131, section 4.1: to everybody where the client can hear nothing else, and a refusal always.
    let (mac, ip) = match address.filter(|_| !to.broadcast) {
        Some(address) => (EthernetAddress(to.mac.octets()), address),
        None => (EthernetAddress::BROADCAST, Ipv4Addr::BROADCAST),
    };
    udp(own, (mac, ip), &body)
}

fn udp(own: Own, (mac, ip): (EthernetAddress, Ipv4Addr), body: &[u8]) -> Vec<u8> {
    let checks = ChecksumCapabilities::default();
    let udp = UdpRepr { src_port: DHCP_SERVER_PORT, dst_port: DHCP_CLIENT_PORT };
    let header = Ipv4Repr {
        src_addr: own.address,
        dst_addr: ip,
        next_header: IpProtocol::Udp,
        payload_len: udp.header_len() + body.len(),
        hop_limit: HOP_LIMIT,
    };
    let mut frame = framed(own, mac, EthernetProtocol::Ipv4, header.buffer_len() + header.payload_len);
    let payload = &mut frame[EthernetFrame::<&[u8]>::header_len()..];
    header.emit(&mut Ipv4Packet::new_unchecked(&mut *payload), &checks);
    udp.emit(
        &mut UdpPacket::new_unchecked(&mut payload[header.buffer_len()..]),
        &IpAddress::Ipv4(header.src_addr),
        &IpAddress::Ipv4(header.dst_addr),
        body.len(),
        |room| room.copy_from_slice(body),
        &checks,
    );
    frame
}

/// The frame that tells who has the server's address.
pub(super) fn is_at(own: Own, mac: Mac, address: Ipv4Addr) -> Vec<u8> {
    let target = EthernetAddress(mac.octets());
    let repr = ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Reply,
        source_hardware_addr: EthernetAddress(own.mac.octets()),
        source_protocol_addr: own.address,
        target_hardware_addr: target,
        target_protocol_addr: address,
    };
    let mut frame = framed(own, target, EthernetProtocol::Arp, repr.buffer_len());
    repr.emit(&mut ArpPacket::new_unchecked(&mut frame[EthernetFrame::<&[u8]>::header_len()..]));
    frame
}

fn framed(own: Own, to: EthernetAddress, ethertype: EthernetProtocol, payload_bytes: usize) -> Vec<u8> {
    let repr = EthernetRepr { src_addr: EthernetAddress(own.mac.octets()), dst_addr: to, ethertype };
    let mut frame = vec![0; repr.buffer_len() + payload_bytes];
    repr.emit(&mut EthernetFrame::new_unchecked(frame.as_mut_slice()));
    frame
}
