//! What the operating system must be asked for directly: sockets and their options, affinity, limits, the wake-up descriptor.
//!
//! Invariant: every function is one thing asked of the kernel, and returns its error unchanged. Descriptors are
//! close-on-exec. Sockets are in blocking mode on purpose: io_uring arms its own poll for these and would hand `EAGAIN`
//! back for non-blocking ones.
//!
//! Why unsafe: these calls have no safe wrapper in the libraries this crate already has.
#![allow(unsafe_code, reason = "system calls; one of the three rooms where unsafe may stand")]

mod diag;
mod fdstore;
pub mod handover;
mod text;

use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

pub use diag::{SocketDiag, SocketOwner};
pub use fdstore::DescriptorStore;
use socket2::{Domain, SockAddr, SockRef, Socket, TcpKeepalive, Type};
pub use text::{let_go_of_code, let_go_of_free_heap};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::config::Keepalive;

/// Connections that wait for accept on one listener.
const BACKLOG: i32 = 4_096;

/// How a stream socket is set up. Accepted sockets inherit these from their listener.
#[derive(Debug, Clone, Copy)]
pub struct StreamOptions {
    /// How dead peers are found.
    pub keepalive: Keepalive,
}

/// A listening TCP socket that shares its address with those of the other workers.
///
/// `exclusive` first proves that nobody outside this process listens there: `SO_REUSEPORT` alone would let two
/// sidecars of one user share a port in silence.
pub fn listen_tcp(address: SocketAddr, options: StreamOptions, exclusive: bool) -> io::Result<OwnedFd> {
    if exclusive {
        let probe = tcp_listener(address)?;
        probe.bind(&address.into())?;
        probe.listen(1)?;
    }
    let socket = tcp_listener(address)?;
    socket.set_reuse_port(true)?;
    set_stream_options(&SockRef::from(&socket), address, options)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// A listening TCP socket on every loopback address at once: on all addresses, but of the loopback device only.
pub fn listen_loopback(port: u16, options: StreamOptions, exclusive: bool) -> io::Result<OwnedFd> {
    let address = SocketAddr::from((std::net::Ipv4Addr::UNSPECIFIED, port));
    let listener = || {
        let socket = tcp_listener(address)?;
        socket.bind_device(Some(b"lo"))?;
        io::Result::Ok(socket)
    };
    if exclusive {
        let probe = listener()?;
        probe.bind(&address.into())?;
        probe.listen(1)?;
    }
    let socket = listener()?;
    socket.set_reuse_port(true)?;
    set_stream_options(&SockRef::from(&socket), (std::net::Ipv4Addr::LOCALHOST, port).into(), options)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

fn tcp_listener(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        // `[::]` serves IPv4 too, as Envoy's ipv4_compat listeners of Consul do.
        socket.set_only_v6(!address.ip().is_unspecified())?;
    }
    Ok(socket)
}

/// A listening unix socket. A stale socket file (nobody answers on it) is replaced; a live one is an error.
pub fn listen_unix(path: &Path, mode: Option<u32>) -> io::Result<OwnedFd> {
    let address = SockAddr::unix(path)?;
    if let Ok(file) = std::fs::symlink_metadata(path) {
        if !file.file_type().is_socket() {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "the path is taken by a file that is no socket"));
        }
        // Not blocking: a live listener may have a full backlog.
        let probe = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None)?;
        match probe.connect(&address) {
            Err(error) if error.raw_os_error() == Some(libc::ECONNREFUSED) => std::fs::remove_file(path)?,
            _ => return Err(io::Error::from_raw_os_error(libc::EADDRINUSE)),
        }
    }
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.bind(&address)?;
    if let Some(mode) = mode {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
    }
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// An unconnected TCP socket for `address`.
pub fn stream_tcp(address: SocketAddr, options: StreamOptions) -> io::Result<OwnedFd> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    set_stream_options(&SockRef::from(&socket), address, options)?;
    Ok(socket.into())
}

/// An unconnected unix stream socket.
pub fn stream_unix() -> io::Result<OwnedFd> {
    Ok(Socket::new(Domain::UNIX, Type::STREAM, None)?.into())
}

fn set_stream_options(socket: &SockRef<'_>, address: SocketAddr, options: StreamOptions) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    if address.ip().is_loopback() {
        // Loopback has no queue to probe: BBR, which many hosts have as their default, would pace it by timers. Every
        // kernel has Reno; one that refuses it only serves slower.
        let _ = socket.set_tcp_congestion(b"reno");
    }
    if let Keepalive::On { idle, interval, probes } = options.keepalive {
        let asks = TcpKeepalive::new();
        let asks = idle.into_iter().fold(asks, TcpKeepalive::with_time);
        let asks = interval.into_iter().fold(asks, TcpKeepalive::with_interval);
        socket.set_tcp_keepalive(&probes.into_iter().fold(asks, TcpKeepalive::with_retries))?;
    }
    Ok(())
}

/// The remote address of a connected socket; `None` for unix sockets and sockets that are gone.
pub fn peer_address(fd: RawFd) -> Option<SocketAddr> {
    // SAFETY: the caller owns `fd` and keeps it open during this call; SockRef only borrows it.
    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
    SockRef::from(&fd).peer_addr().ok()?.as_socket()
}

/// Where the client of a connection that nftables redirected here wanted to go; `None` for any other.
pub fn original_destination(fd: RawFd) -> Option<SocketAddr> {
    // SAFETY: the caller owns `fd` and keeps it open during this call; SockRef only borrows it.
    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
    let socket = SockRef::from(&fd);
    let local = socket.local_addr().ok()?.as_socket()?;
    let original = if local.is_ipv4() { socket.original_dst_v4() } else { socket.original_dst_v6() };
    original.ok()?.as_socket().filter(|original| *original != local)
}

/// The owner of the other end of an accepted local connection, which went to `original` if it was redirected. `diag` is opened
/// when first needed.
pub fn socket_owner(fd: RawFd, original: Option<SocketAddr>, diag: &mut Option<SocketDiag>) -> Option<SocketOwner> {
    // SAFETY: the caller owns `fd` and keeps it open during this call; SockRef only borrows it.
    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
    let socket = SockRef::from(&fd);
    let (client, server) = (socket.peer_addr().ok()?, socket.local_addr().ok()?);
    match (client.as_socket(), server.as_socket()) {
        (Some(client), Some(server)) => {
            if diag.is_none() {
                *diag = SocketDiag::open().ok();
            }
            // The client's socket knows nothing of a redirection.
            diag.as_mut()?.owner(client, original.unwrap_or(server))
        }
        _ => peer_credentials(fd.as_raw_fd()),
    }
}

/// Who connected to a unix socket (SO_PEERCRED).
fn peer_credentials(fd: RawFd) -> Option<SocketOwner> {
    let mut credentials = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut length = libc::socklen_t::try_from(size_of::<libc::ucred>()).ok()?;
    // SAFETY: `credentials` is a valid place of `length` bytes; the caller keeps `fd` open.
    let result = unsafe {
        let place = (&raw mut credentials).cast();
        libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_PEERCRED, place, &raw mut length)
    };
    let pid = u32::try_from(credentials.pid).ok().filter(|&pid| pid > 0);
    (result == 0).then_some(SocketOwner { uid: credentials.uid, inode: 0, cgroup: 0, pid })
}

/// Which of this host's addresses a connected socket came in at.
pub fn local_address(fd: RawFd) -> Option<SocketAddr> {
    // SAFETY: the caller owns `fd` and keeps it open during this call; SockRef only borrows it.
    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
    SockRef::from(&fd).local_addr().ok()?.as_socket()
}

/// Bytes that the other end of a TCP connection has acknowledged (`tcpi_bytes_acked`, Linux 4.1).
pub fn acknowledged(fd: RawFd) -> Option<u64> {
    // `struct tcp_info` of linux/tcp.h up to that field, which the libc crate's does not reach.
    const AT: usize = 120;
    let mut info = [0_u64; (AT + 8) / 8];
    let mut length = libc::socklen_t::try_from(size_of_val(&info)).unwrap_or(0);
    // SAFETY: `info` is as long as is said and lives during the call, which writes at most that much.
    let result = unsafe { libc::getsockopt(fd, libc::SOL_TCP, libc::TCP_INFO, info.as_mut_ptr().cast(), &raw mut length) };
    (result == 0 && length as usize >= size_of_val(&info)).then_some(info[AT / 8])
}

/// Ends the sending side (FIN).
pub fn shutdown_write(fd: RawFd) {
    // SAFETY: takes no pointer; a bad descriptor is an error, which means that the peer is gone already.
    unsafe { libc::shutdown(fd, libc::SHUT_WR) };
}

/// Makes the coming close send RST instead of FIN, and drop what is unsent.
pub fn reset_on_close(fd: RawFd) {
    // SAFETY: the caller owns `fd` and keeps it open during this call; SockRef only borrows it.
    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
    // Unix sockets have no RST; there the plain close is all there is.
    let _ = SockRef::from(&fd).set_linger(Some(Duration::ZERO));
}

/// A connection that waits at a listening socket which is about to close; `None` when none does.
pub fn accept_waiting(listener: &OwnedFd) -> Option<OwnedFd> {
    let socket = SockRef::from(listener);
    // Not by making it non-blocking, which whoever else still has this socket would notice.
    socket.set_read_timeout(Some(Duration::from_millis(1))).ok()?;
    let (accepted, _) = socket.accept().ok()?;
    accepted.set_read_timeout(None).ok()?;
    Some(accepted.into())
}

/// Closes a descriptor that is owned as a bare number.
pub fn close(fd: RawFd) {
    // SAFETY: the caller owns `fd` and gives it up here.
    drop(unsafe { OwnedFd::from_raw_fd(fd) });
}

/// The counter descriptor that rouses a worker from another thread.
#[derive(Debug)]
pub struct EventFd(OwnedFd);

impl EventFd {
    /// A new one at zero.
    pub fn new() -> io::Result<Self> {
        // SAFETY: takes no pointer.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel just gave us this descriptor and nobody else has it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Adds one: a pending or later read returns.
    pub fn signal(&self) {
        let one = 1_u64;
        // SAFETY: eight readable bytes at `one`. The only failure is a full counter, which wakes as well.
        unsafe { libc::write(self.0.as_raw_fd(), (&raw const one).cast(), 8) };
    }

    /// A second handle on the same counter.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self(self.0.try_clone()?))
    }

    /// A second descriptor of it, to read from elsewhere.
    pub fn try_clone_descriptor(&self) -> io::Result<OwnedFd> {
        self.0.try_clone()
    }

    /// Its number, for the ring.
    pub fn raw(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Makes reads and writes return at once. Shared with every descriptor of the same open file.
pub fn set_nonblocking(file: &File) -> io::Result<()> {
    SockRef::from(file).set_nonblocking(true)
}

/// Waits for a descriptor on a tokio runtime. The file is owned by what is returned, and never changed there.
pub fn readiness(file: File, interest: Interest) -> io::Result<AsyncFd<File>> {
    // SAFETY: a `File` owns its descriptor and keeps it open and the same for as long as it lives.
    Ok(unsafe { AsyncFd::register_with_interest(file, interest) }?)
}

/// The cores that this process may run on.
pub fn allowed_cores() -> Vec<usize> {
    // SAFETY: a zeroed cpu_set_t is a valid empty set, and the size passed is its own.
    let set = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        if libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &raw mut set) != 0 {
            return Vec::new();
        }
        set
    };
    // SAFETY: the index is below CPU_SETSIZE.
    (0..libc::CPU_SETSIZE as usize).filter(|&core| unsafe { libc::CPU_ISSET(core, &set) }).collect()
}

/// Pins the calling thread to `core`.
pub fn pin_to_core(core: usize) -> io::Result<()> {
    if core >= libc::CPU_SETSIZE as usize {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    // SAFETY: a zeroed cpu_set_t is a valid empty set, the index is below CPU_SETSIZE, the size passed is the set's own.
    let result = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(core, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Raises the soft descriptor limit to the hard one. Returns (before, after).
pub fn raise_descriptor_limit() -> io::Result<(u64, u64)> {
    let mut limit = read_limit(libc::RLIMIT_NOFILE)?;
    let before = limit.rlim_cur;
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: `limit` is a valid rlimit.
    if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((before, limit.rlim_cur))
}

/// The descriptor limit as (soft, hard).
pub fn descriptor_limit() -> io::Result<(u64, u64)> {
    read_limit(libc::RLIMIT_NOFILE).map(|limit| (limit.rlim_cur, limit.rlim_max))
}

/// The locked-memory limit as (soft, hard), in bytes.
pub fn memlock_limit() -> io::Result<(u64, u64)> {
    read_limit(libc::RLIMIT_MEMLOCK).map(|limit| (limit.rlim_cur, limit.rlim_max))
}

fn read_limit(resource: libc::__rlimit_resource_t) -> io::Result<libc::rlimit> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a valid place for an rlimit.
    if unsafe { libc::getrlimit(resource, &raw mut limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(limit)
}

/// Keeps keys and plaintext out of core files and away from other processes of the same user.
pub fn forbid_core_dumps() -> io::Result<()> {
    let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `none` is a valid rlimit; prctl takes plain numbers here.
    let failed = unsafe {
        libc::setrlimit(libc::RLIMIT_CORE, &raw const none) != 0
            || libc::prctl(libc::PR_SET_DUMPABLE, 0 as libc::c_ulong, 0, 0, 0) != 0
    };
    if failed { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The running kernel's release, such as `6.18.44`.
pub fn kernel_release() -> io::Result<String> {
    // SAFETY: a zeroed utsname is a valid place for the answer.
    let names = unsafe {
        let mut names: libc::utsname = std::mem::zeroed();
        if libc::uname(&raw mut names) != 0 {
            return Err(io::Error::last_os_error());
        }
        names
    };
    let bytes: Vec<u8> = names.release.iter().take_while(|&&c| c != 0).map(|&c| c.cast_unsigned()).collect();
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{Ipv4Addr, TcpListener};

    const OPTIONS: StreamOptions = StreamOptions { keepalive: Keepalive::Off };

    #[test]
    fn a_port_that_somebody_else_has_is_refused() {
        let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        let address = taken.local_addr().expect("its address");
        let error = listen_tcp(address, OPTIONS, true).expect_err("the port is taken");
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
    }

    #[test]
    fn a_socket_asks_as_often_as_it_is_told() {
        let asks = |keepalive| {
            let socket = stream_tcp("127.0.0.1:1".parse().expect("address"), StreamOptions { keepalive }).expect("a socket");
            let socket = SockRef::from(&socket);
            let of = |socket: &SockRef<'_>| {
                let [idle, interval] =
                    [socket.tcp_keepalive_time()?, socket.tcp_keepalive_interval()?].map(|time| time.as_secs());
                Ok::<_, io::Error>((idle, interval, socket.tcp_keepalive_retries()?))
            };
            socket.keepalive().expect("readable").then(|| of(&socket).expect("readable"))
        };
        assert_eq!(asks(Keepalive::Off), None);
        assert_eq!(asks(Duration::from_secs(60).into()), Some((60, 15, 4)));
        let most = Keepalive::On {
            idle: Some(Duration::from_secs(32_767)),
            interval: Some(Duration::from_secs(32_767)),
            probes: Some(127),
        };
        assert_eq!(asks(most), Some((32_767, 32_767, 127)), "the kernel takes the most that is told it");
        let kernels = asks(Keepalive::On { idle: None, interval: None, probes: None }).expect("on");
        assert!(kernels.0 >= 1 && kernels.1 >= 1, "{kernels:?}");
    }

    #[test]
    fn workers_share_an_address_and_a_second_process_would_not() {
        let first = listen_tcp("127.0.0.1:0".parse().expect("address"), OPTIONS, true).expect("first");
        let address = SockRef::from(&first).local_addr().expect("bound").as_socket().expect("tcp");
        let _second = listen_tcp(address, OPTIONS, false).expect("another worker");
        assert!(listen_tcp(address, OPTIONS, true).is_err(), "an outsider must not share it");
    }

    #[test]
    fn a_stale_unix_socket_is_replaced_and_a_live_one_is_not() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("app.sock");
        drop(listen_unix(&path, None).expect("first"));
        let live = listen_unix(&path, Some(0o600)).expect("stale one replaced");
        assert_eq!(std::fs::metadata(&path).expect("file").permissions().mode() & 0o777, 0o600);
        assert_eq!(listen_unix(&path, None).expect_err("live").kind(), io::ErrorKind::AddrInUse);
        drop(live);
        let file = folder.path().join("data");
        std::fs::write(&file, b"precious").expect("a file");
        assert_eq!(listen_unix(&file, None).expect_err("no socket").kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read(&file).expect("still there"), b"precious");
    }

    #[test]
    fn limits_and_kernel_are_readable() {
        assert!(descriptor_limit().expect("limit").0 > 0);
        assert!(kernel_release().expect("uname").contains('.'));
        assert!(!allowed_cores().is_empty());
    }
}
