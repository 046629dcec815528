//! A guest that is nothing but what it sends: raw Ethernet frames on its VM's TAP.

use std::{
    fs::File,
    io::{Read, Write},
    net::Ipv4Addr,
    time::Instant,
};

use blixard_vmhost::{hypervisor::Nic, net::Mac};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::SOON;

/// Before each frame: `struct virtio_net_hdr`. All zero: nothing is left to do.
const HEADER: usize = 10;
const BROADCAST: [u8; 6] = [0xff; 6];
const ARP: [u8; 2] = [8, 6];
const IP: [u8; 2] = [8, 0];

/// Whatever a guest may put into a packet.
#[derive(Debug, Clone, Copy)]
pub struct Packet {
    pub from_mac: [u8; 6],
    pub to_mac: [u8; 6],
    pub from: Ipv4Addr,
    pub to: Ipv4Addr,
    pub port: u16,
}

pub struct Guest {
    tap: File,
    pub mac: [u8; 6],
    pub address: Ipv4Addr,
    pub gateway: Ipv4Addr,
}

/// The hardware address of an address of ours.
pub fn mac(address: Ipv4Addr) -> [u8; 6] {
    let [a, b, c, d] = address.octets();
    [0x02, 0x62, a, b, c, d]
}

impl Guest {
    /// Takes the place of the hypervisor at a TAP.
    pub fn attach(tap: &str, address: Ipv4Addr, gateway: Ipv4Addr) -> Self {
        let nic = Nic { tap: tap.to_owned(), mac: Mac(mac(address)) };
        Self { tap: nic.open().expect("the TAP opens").into(), mac: mac(address), address, gateway }
    }

    /// What it would send to somebody outside if it were honest.
    pub fn packet(&self, to: Ipv4Addr, port: u16) -> Packet {
        Packet { from_mac: self.mac, to_mac: mac(self.gateway), from: self.address, to, port }
    }

    /// Sends a UDP datagram.
    pub fn send(&mut self, packet: Packet, payload: &str) {
        self.write(packet.to_mac, packet.from_mac, IP, &udp(packet, payload));
    }

    /// Sends a datagram again and again until an answer to it comes; returns everything else that it got meanwhile. The first one
    /// may be lost while the host asks who has its address.
    pub fn converse(&mut self, packet: Packet, payload: &str) -> Vec<Vec<u8>> {
        let (since, mut others) = (Instant::now(), Vec::new());
        while since.elapsed() < SOON {
            self.send(packet, payload);
            let sent = Instant::now();
            while let Some(frame) = self.read(sent) {
                if frame.ends_with(payload.as_bytes()) && frame[12..14] == IP && frame[26..30] == packet.to.octets() {
                    return others;
                }
                others.push(frame);
            }
        }
        panic!("no answer to {payload} from {}; got {} other frames", packet.to, others.len());
    }

    /// Claims in an ARP request that `from` is at `from_mac`; `sender` is who the frame is from.
    pub fn claim(&mut self, sender: [u8; 6], from_mac: [u8; 6], from: Ipv4Addr) {
        let arp = arp(1, from_mac, from, [0; 6], self.gateway);
        self.write(BROADCAST, sender, ARP, &arp);
    }

    fn write(&mut self, to: [u8; 6], from: [u8; 6], kind: [u8; 2], payload: &[u8]) {
        let frame = [&[0; HEADER][..], &to, &from, &kind, payload].concat();
        assert_eq!(self.tap.write(&frame).expect("the TAP takes it"), frame.len());
    }

    /// The next frame that is not a question who has its address: those it answers. `None` a while after `sent`.
    fn read(&mut self, sent: Instant) -> Option<Vec<u8>> {
        const A_WHILE_MS: u128 = 200;
        loop {
            let left = A_WHILE_MS.saturating_sub(sent.elapsed().as_millis());
            let left = Timespec { tv_sec: 0, tv_nsec: i64::try_from(left).expect("short") * 1_000_000 };
            let mut ready = [PollFd::new(&self.tap, PollFlags::IN)];
            if poll(&mut ready, Some(&left)).expect("polls") == 0 {
                return None;
            }
            let mut frame = vec![0; 2048];
            let length = self.tap.read(&mut frame).expect("the TAP gives it");
            let frame = frame[HEADER..length].to_vec();
            let asks = frame[12..14] == ARP && frame[20..22] == [0, 1] && frame[38..42] == self.address.octets();
            if !asks {
                return Some(frame);
            }
            let (asker, at) =
                (frame[22..28].try_into().expect("six"), Ipv4Addr::new(frame[28], frame[29], frame[30], frame[31]));
            let answer = arp(2, self.mac, self.address, asker, at);
            self.write(asker, self.mac, ARP, &answer);
        }
    }
}

fn arp(operation: u8, from_mac: [u8; 6], from: Ipv4Addr, to_mac: [u8; 6], to: Ipv4Addr) -> Vec<u8> {
    let head = [0, 1, 8, 0, 6, 4, 0, operation];
    [&head[..], &from_mac, &from.octets(), &to_mac, &to.octets()].concat()
}

fn udp(packet: Packet, payload: &str) -> Vec<u8> {
    let length = |bytes: usize| u16::try_from(bytes).expect("short").to_be_bytes();
    let mut head = vec![0x45, 0];
    head.extend(length(28 + payload.len()));
    head.extend([0, 0, 0, 0, 64, 17, 0, 0]);
    head.extend(packet.from.octets());
    head.extend(packet.to.octets());
    let sum: u32 = head.chunks(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]]))).sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    let checksum = !u16::try_from((sum & 0xffff) + (sum >> 16)).expect("folded");
    head[10..12].copy_from_slice(&checksum.to_be_bytes());
    // Without a checksum of its own: 0 says so.
    let ports = [4000_u16.to_be_bytes(), packet.port.to_be_bytes(), length(8 + payload.len()), [0, 0]].concat();
    [head, ports, payload.as_bytes().to_vec()].concat()
}
