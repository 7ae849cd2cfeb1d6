//! Who owns the other end of a local TCP connection: one `sock_diag` question to the kernel, by its exact addresses.
//!
//! Invariant: the answer is the kernel's alone; nothing that the client says takes part. A connection that the kernel does
//! not know (any more) is `None`. The layout is `linux/inet_diag.h` and `linux/netlink.h`.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr};

use socket2::{Domain, Protocol, Socket, Type};

const NETLINK_SOCK_DIAG: i32 = 4;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST: u16 = 1;
/// `struct nlmsghdr`.
const HEADER_BYTES: usize = 16;
/// `struct inet_diag_req_v2` behind it.
const REQUEST_BYTES: usize = HEADER_BYTES + 56;
/// `struct inet_diag_msg`.
const MESSAGE_BYTES: usize = 72;
/// `idiag_state`: what the kernel gives when it finds no connection is whoever listens at the client's address.
const STATE_AT: usize = 1;
const STATE_LISTEN: u8 = 10;
/// `struct inet_diag_sockid` up to the interface: both ports, both addresses. In the answer, and in the request.
const ADDRESSES_AT: usize = 4;
const REQUEST_ADDRESSES_AT: usize = HEADER_BYTES + 8;
const ADDRESSES_BYTES: usize = 36;
const UID_AT: usize = 64;
const INODE_AT: usize = 68;
/// `INET_DIAG_CGROUP_ID`: the cgroup v2 in which the socket was made, since Linux 5.8.
const ATTRIBUTE_CGROUP: u16 = 21;
/// One answer with all its attributes is a few hundred bytes.
const ANSWER_BYTES_MAX: usize = 4_096;

/// The client's end of a local connection, as the kernel sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SocketOwner {
    /// Owner of the socket.
    pub uid: u32,
    /// Inode of the socket; 0 when its process has closed it.
    pub inode: u64,
    /// Id of the cgroup v2 in which it was made; 0 when the kernel does not tell.
    pub cgroup: u64,
    /// The process that connected, known for unix sockets only.
    pub pid: Option<u32>,
}

/// A netlink socket to ask with.
#[derive(Debug)]
pub struct SocketDiag(Socket);

impl SocketDiag {
    /// Opens it. Needs no privilege.
    pub fn open() -> io::Result<Self> {
        Ok(Self(Socket::new(Domain::from(libc::AF_NETLINK), Type::DGRAM, Some(Protocol::from(NETLINK_SOCK_DIAG)))?))
    }

    /// The owner of the socket at `client` that is connected to `server`.
    pub fn owner(&mut self, client: SocketAddr, server: SocketAddr) -> Option<SocketOwner> {
        let request = request(client, server)?;
        let mut answer = [0; ANSWER_BYTES_MAX];
        // Both are answered from memory within the call: netlink has no peer to wait for.
        (&self.0).write_all(&request).ok()?;
        let length = (&self.0).read(&mut answer).ok()?;
        parse(answer.get(..length)?, &request)
    }
}

impl SocketDiag {
    /// The owner of the socket that listens at `address`, or on all addresses at its port.
    pub fn listener(&mut self, address: SocketAddr) -> Option<SocketOwner> {
        let anybody = SocketAddr::new(if address.is_ipv4() { IpAddr::from([0; 4]) } else { IpAddr::from([0_u16; 8]) }, 0);
        let request = request(address, anybody)?;
        let mut answer = [0; ANSWER_BYTES_MAX];
        (&self.0).write_all(&request).ok()?;
        let length = (&self.0).read(&mut answer).ok()?;
        let answer = answer.get(..length)?;
        let listens = *message(answer)?.get(STATE_AT)? == STATE_LISTEN;
        listens.then(|| owner(message(answer)?)).flatten()
    }
}

fn request(client: SocketAddr, server: SocketAddr) -> Option<[u8; REQUEST_BYTES]> {
    let (source, target) = (client.ip().to_canonical(), server.ip().to_canonical());
    let family = match (source, target) {
        (IpAddr::V4(_), IpAddr::V4(_)) => libc::AF_INET,
        (IpAddr::V6(_), IpAddr::V6(_)) => libc::AF_INET6,
        _ => return None,
    };
    let mut bytes = [0; REQUEST_BYTES];
    let length = u32::try_from(REQUEST_BYTES).ok()?;
    put(&mut bytes, 0, &length.to_ne_bytes());
    put(&mut bytes, 4, &SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    put(&mut bytes, 6, &NLM_F_REQUEST.to_ne_bytes());
    let body = HEADER_BYTES;
    put(&mut bytes, body, &[u8::try_from(family).ok()?, u8::try_from(libc::IPPROTO_TCP).ok()?]);
    put(&mut bytes, body + 4, &u32::MAX.to_ne_bytes());
    put(&mut bytes, body + 8, &client.port().to_be_bytes());
    put(&mut bytes, body + 10, &server.port().to_be_bytes());
    put_ip(&mut bytes, body + 12, source);
    put_ip(&mut bytes, body + 28, target);
    // No cookie: the addresses are exact.
    put(&mut bytes, body + 48, &u64::MAX.to_ne_bytes());
    Some(bytes)
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

fn put_ip(bytes: &mut [u8], at: usize, ip: IpAddr) {
    match ip {
        IpAddr::V4(ip) => put(bytes, at, &ip.octets()),
        IpAddr::V6(ip) => put(bytes, at, &ip.octets()),
    }
}

/// An answer to this very question, or `None` for an error message, another connection, a listener, or anything that is too
/// short.
fn parse(answer: &[u8], request: &[u8; REQUEST_BYTES]) -> Option<SocketOwner> {
    let message = message(answer)?;
    let asked = &request[REQUEST_ADDRESSES_AT..REQUEST_ADDRESSES_AT + ADDRESSES_BYTES];
    if *message.get(STATE_AT)? == STATE_LISTEN || message.get(ADDRESSES_AT..ADDRESSES_AT + ADDRESSES_BYTES)? != asked {
        return None;
    }
    owner(message)
}

/// What follows the header of an answer.
fn message(answer: &[u8]) -> Option<&[u8]> {
    let length = usize::try_from(u32_at(answer, 0)?).ok()?;
    let answer = answer.get(..length)?;
    if u16_at(answer, 4)? != SOCK_DIAG_BY_FAMILY {
        return None;
    }
    answer.get(HEADER_BYTES..)
}

fn owner(message: &[u8]) -> Option<SocketOwner> {
    let owner = SocketOwner { uid: u32_at(message, UID_AT)?, inode: u32_at(message, INODE_AT)?.into(), cgroup: 0, pid: None };
    Some(SocketOwner { cgroup: cgroup(message.get(MESSAGE_BYTES..)?).unwrap_or(0), ..owner })
}

fn cgroup(mut attributes: &[u8]) -> Option<u64> {
    loop {
        let length = usize::from(u16_at(attributes, 0)?);
        if u16_at(attributes, 2)? == ATTRIBUTE_CGROUP {
            return Some(u64::from_ne_bytes(attributes.get(4..12)?.try_into().ok()?));
        }
        attributes = attributes.get(length.max(4).next_multiple_of(4)..)?;
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::MetadataExt;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_kernel_names_uid_inode_and_cgroup_of_a_local_client() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(address).expect("a listener");
            let server = listener.local_addr().expect("its address");
            let client = TcpStream::connect(server).expect("connected");
            let (accepted, peer) = listener.accept().expect("accepted");
            let mut diag = SocketDiag::open().expect("netlink");
            let owner = diag.owner(peer, server).expect("known");
            let link = std::fs::read_link(format!("/proc/self/fd/{}", client.as_raw_fd())).expect("our descriptor");
            assert_eq!(link.to_str(), Some(&*format!("socket:[{}]", owner.inode)), "the client's socket, not ours");
            assert_eq!(owner.uid, std::fs::metadata("/proc/self").expect("proc").uid());
            assert_ne!(owner.cgroup, 0, "Linux 5.8 and later tell the cgroup");

            drop(client);
            let closed = diag.owner(peer, server).expect("in FIN_WAIT2 it is still known");
            assert_eq!((closed.inode, closed.cgroup), (0, owner.cgroup));
            drop(accepted);
        }
    }

    #[test]
    fn a_connection_that_is_not_there_has_no_owner() {
        let mut diag = SocketDiag::open().expect("netlink");
        let address = |text: &str| text.parse().expect("address");
        assert_eq!(diag.owner(address("127.0.0.1:1"), address("127.0.0.1:2")), None);
        assert_eq!(diag.owner(address("127.0.0.1:1"), address("[::1]:2")), None, "of two families");
    }

    #[test]
    fn a_listener_at_the_clients_address_is_not_the_client() {
        for bind in ["127.0.0.1:0", "0.0.0.0:0"] {
            let listener = TcpListener::bind(bind).expect("a listener");
            let client = (std::net::Ipv4Addr::LOCALHOST, listener.local_addr().expect("its address").port()).into();
            let mut diag = SocketDiag::open().expect("netlink");
            assert_eq!(diag.owner(client, "127.0.0.1:9".parse().expect("address")), None, "{bind}");
        }
    }

    proptest! {
        #[test]
        fn no_answer_panics(bytes in proptest::collection::vec(any::<u8>(), 0..256)) {
            let request = request(([127, 0, 0, 1], 1).into(), ([127, 0, 0, 1], 2).into()).expect("one family");
            let _ = parse(&bytes, &request);
            let mut framed = bytes.clone();
            if framed.len() >= 6 {
                put(&mut framed, 0, &u32::try_from(bytes.len()).expect("short").to_ne_bytes());
                put(&mut framed, 4, &SOCK_DIAG_BY_FAMILY.to_ne_bytes());
                let _ = parse(&framed, &request);
            }
        }
    }
}
