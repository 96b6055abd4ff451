//! The cluster's API and DNS addresses, held on the device's loopback (adapter over rtnetlink).
//!
//! Pods always see the cluster's real ClusterIPs. Held as single addresses on `lo`, they reach
//! this device without a packet filter; where kube-proxy runs, its rules see the packets first and
//! win. On the API's address nothing of ours listens yet, so a connection is refused at once
//! instead of hanging (a process of the device that listens on all addresses is reached, as
//! anywhere on the device).
//!
//! Owns no other address. Speaks netlink itself: two messages do not need a library or a program.

use std::io::{self, IoSlice};
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::net::if_::if_nametoindex;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, sendmsg,
    setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;

/// Why an address is not held.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} the address {address} on {interface}")]
pub struct AddressError {
    what: &'static str,
    address: IpAddr,
    interface: String,
    source: io::Error,
}

/// Message types and flags of rtnetlink(7).
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_CREATE: u16 = 0x400;
const NLM_F_EXCL: u16 = 0x200;
const NLMSG_ERROR: u16 = 2;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_F_NODAD: u8 = 0x02;
/// The address means nothing outside the device.
const RT_SCOPE_HOST: u8 = 254;
const HEADER: usize = 16;
/// The kernel answers from memory; a second is far beyond any delay but a bug's.
const ANSWER_SECONDS: i64 = 1;

/// Holds `wanted` on the interface (`lo`) and lets go of those of `before` that are not wanted any
/// more; `before` is what an earlier run held, so that no address of somebody else is taken away.
pub fn hold(interface: &str, wanted: &[IpAddr], before: &[IpAddr]) -> Result<(), AddressError> {
    for address in before.iter().filter(|a| !wanted.contains(a)) {
        change("remove", interface, *address, RTM_DELADDR, 0)?;
    }
    for address in wanted {
        change(
            "add",
            interface,
            *address,
            RTM_NEWADDR,
            NLM_F_CREATE | NLM_F_EXCL,
        )?;
    }
    Ok(())
}

fn change(
    what: &'static str,
    interface: &str,
    address: IpAddr,
    kind: u16,
    flags: u16,
) -> Result<(), AddressError> {
    let done = if_nametoindex(interface)
        .map_err(io::Error::from)
        .and_then(|index| exchange(&message(kind, flags, index, address)));
    match done {
        // It is there already; it is gone already.
        Err(e) if kind == RTM_NEWADDR && e.raw_os_error() == Some(nix::libc::EEXIST) => Ok(()),
        Err(e) if kind == RTM_DELADDR && e.raw_os_error() == Some(nix::libc::EADDRNOTAVAIL) => {
            Ok(())
        }
        done => done.map_err(|source| AddressError {
            what,
            address,
            interface: interface.to_owned(),
            source,
        }),
    }
}

/// nlmsghdr, ifaddrmsg and the address twice, as rtnetlink(7) lays them out, in the machine's own
/// byte order.
fn message(kind: u16, flags: u16, index: u32, address: IpAddr) -> Vec<u8> {
    let (family, octets) = match address {
        IpAddr::V4(a) => (nix::libc::AF_INET, a.octets().to_vec()),
        IpAddr::V6(a) => (nix::libc::AF_INET6, a.octets().to_vec()),
    };
    let bits = u8::try_from(octets.len() * 8).unwrap_or(u8::MAX);
    let mut body = vec![
        u8::try_from(family).unwrap_or_default(),
        bits,
        IFA_F_NODAD,
        RT_SCOPE_HOST,
    ];
    body.extend(index.to_ne_bytes());
    for attribute in [IFA_LOCAL, IFA_ADDRESS] {
        let length = u16::try_from(4 + octets.len()).unwrap_or_default();
        body.extend(length.to_ne_bytes());
        body.extend(attribute.to_ne_bytes());
        body.extend(&octets);
    }
    let mut message = Vec::with_capacity(HEADER + body.len());
    let length = u32::try_from(HEADER + body.len()).unwrap_or_default();
    message.extend(length.to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend((NLM_F_REQUEST | NLM_F_ACK | flags).to_ne_bytes());
    // Sequence and port: one request a socket needs neither.
    message.extend([0; 8]);
    message.extend(body);
    message
}

/// Sends one request and reads its acknowledgement.
fn exchange(message: &[u8]) -> io::Result<()> {
    let socket: OwnedFd = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkRoute,
    )?;
    setsockopt(
        &socket,
        sockopt::ReceiveTimeout,
        &TimeVal::new(ANSWER_SECONDS, 0),
    )?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
    let parts = [IoSlice::new(message)];
    let kernel = NetlinkAddr::new(0, 0);
    sendmsg(
        socket.as_raw_fd(),
        &parts,
        &[],
        MsgFlags::empty(),
        Some(&kernel),
    )?;
    let mut answer = [0; 512];
    let size = recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    verdict(&answer[..size])
}

/// An acknowledgement is an error message with code 0.
fn verdict(answer: &[u8]) -> io::Result<()> {
    let kind = answer
        .get(4..6)
        .and_then(|b| b.try_into().ok())
        .map(u16::from_ne_bytes);
    let code = answer
        .get(HEADER..HEADER + 4)
        .and_then(|b| b.try_into().ok());
    match (kind, code.map(i32::from_ne_bytes)) {
        (Some(NLMSG_ERROR), Some(0)) => Ok(()),
        (Some(NLMSG_ERROR), Some(code)) => Err(io::Error::from_raw_os_error(-code)),
        _ => Err(io::Error::other("the kernel's answer is malformed")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sched::{CloneFlags, unshare};
    use std::net::{TcpListener, TcpStream};
    use std::time::{Duration, Instant};

    #[test]
    fn answers_of_the_kernel() {
        let answer = |kind: u16, code: i32| {
            let mut bytes = vec![0; 4];
            bytes.extend(kind.to_ne_bytes());
            bytes.extend([0; 10]);
            bytes.extend(code.to_ne_bytes());
            bytes
        };
        assert!(verdict(&answer(NLMSG_ERROR, 0)).is_ok());
        let refused = verdict(&answer(NLMSG_ERROR, -nix::libc::EPERM)).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(nix::libc::EPERM));
        assert!(verdict(&answer(3, 0)).is_err());
        assert!(verdict(&[]).is_err());
    }

    /// The kernel brings IPv6 addresses into its routes in a task of its own.
    fn reach(address: std::net::SocketAddr) {
        let started = Instant::now();
        while let Err(error) = TcpStream::connect(address) {
            assert!(
                started.elapsed() < Duration::from_secs(5),
                "{address}: {error}"
            );
            std::thread::yield_now();
        }
    }

    /// In a network namespace of its own, which ends with the thread.
    #[test]
    fn addresses_are_held_and_let_go_and_the_apis_port_refuses_at_once() {
        assert!(
            nix::unistd::geteuid().is_root(),
            "addresses are the kernel's: run this test as root (in a network namespace of its own)"
        );
        let run = || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            let up = std::process::Command::new("ip")
                .args(["link", "set", "lo", "up"])
                .status();
            assert!(up.unwrap().success());
            let api: IpAddr = "10.96.0.1".parse().unwrap();
            let dns: IpAddr = "10.96.0.10".parse().unwrap();
            let six: IpAddr = "fd00::a".parse().unwrap();
            assert!(
                TcpListener::bind((dns, 0)).is_err(),
                "held before it was asked for"
            );
            hold("lo", &[api, dns, six], &[]).unwrap();
            hold("lo", &[api, dns, six], &[api, dns, six]).unwrap();
            for address in [dns, six] {
                let listener = TcpListener::bind((address, 0)).unwrap();
                reach(listener.local_addr().unwrap());
            }
            let started = Instant::now();
            let refused = TcpStream::connect((api, 443)).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
            assert!(started.elapsed() < Duration::from_secs(1));
            hold("lo", &[api], &[api, dns, six]).unwrap();
            assert!(TcpListener::bind((dns, 0)).is_err(), "still held");
            hold("lo", &[api], &[api, dns]).unwrap();
            let error = hold("none0", &[api], &[]).unwrap_err().to_string();
            assert!(error.contains("10.96.0.1 on none0"), "{error}");
        };
        std::thread::spawn(run).join().unwrap();
    }
}
