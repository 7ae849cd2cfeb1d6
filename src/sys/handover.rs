//! Listening sockets that go from a process to the one that takes its place: by inheritance from one that still runs, or from
//! the service manager's descriptor store when it has ended. Not one is closed on the way, so no connection in a backlog is lost.
//!
//! Invariant: what is inherited is what was said of it, checked: a listening socket at that very address. Anything else is left
//! alone and told.

use std::collections::{BTreeSet, VecDeque};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, OnceLock};

use arc_swap::ArcSwap;
use serde::{Deserialize, Serialize};
use socket2::SockRef;

use super::fdstore;

/// What the parent tells its child.
const VARIABLE: &str = "RINGFENCE_HANDOVER";
/// What the child says when it serves.
const READY: u8 = b'R';

/// Where a socket listens.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Place {
    /// A TCP address.
    Tcp(SocketAddr),
    /// A unix socket's path.
    Unix(PathBuf),
}

#[derive(Debug, Serialize, Deserialize)]
struct Message {
    ready: RawFd,
    go: RawFd,
    sockets: Vec<(RawFd, Place)>,
    /// Those that no worker listens at.
    #[serde(default)]
    apart: Vec<(RawFd, Place)>,
    /// Names of what the parent keeps in the descriptor store.
    #[serde(default)]
    kept: BTreeSet<String>,
}

/// The child that is to take over.
#[derive(Debug)]
pub struct Successor {
    child: Child,
    ready: PipeReader,
    go: PipeWriter,
}

/// What a parent left, or a process before in the descriptor store.
#[derive(Debug, Default)]
pub struct Inherited {
    sockets: VecDeque<(Place, OwnedFd)>,
    /// Names of what is in the descriptor store.
    kept: BTreeSet<String>,
    ready: Option<PipeWriter>,
    go: Option<PipeReader>,
    /// What was said and does not hold.
    pub wrong: Vec<String>,
}

/// What the argument named here gave a single time, in a file of memory.
static KEPT_ARGUMENT: OnceLock<(PathBuf, File)> = OnceLock::new();

/// Keeps what was read from the file that an argument names, for the process that takes this one's place: a FIFO gives it once.
/// Further calls change nothing.
pub fn keep_argument(path: &Path, text: &[u8]) -> io::Result<()> {
    // SAFETY: the name is a C string; what comes back is ours alone.
    let fd = unsafe { libc::memfd_create(c"ringfence-bootstrap".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just gave us this descriptor and nobody else has it.
    let mut file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.write_all(text)?;
    let _ = KEPT_ARGUMENT.set((path.to_owned(), file));
    Ok(())
}

/// An argument as the successor must have it: what was kept is read from the descriptor that it inherits.
fn argument(given: OsString, path: &Path, fd: RawFd) -> OsString {
    let prefix = given.as_bytes().strip_suffix(path.as_os_str().as_bytes());
    match prefix {
        Some(prefix) if prefix.is_empty() || prefix.starts_with(b"-") => {
            let mut text = OsStr::from_bytes(prefix).to_owned();
            text.push(format!("/proc/self/fd/{fd}"));
            text
        }
        _ => given,
    }
}

/// Starts this program's file again, as it is on disk now, with the same arguments and with every listening socket of this
/// process; `kept` names what it has in the descriptor store.
pub fn start_successor(arguments: impl Iterator<Item = OsString>, kept: BTreeSet<String>) -> io::Result<Successor> {
    let (ready, writer) = io::pipe()?;
    let ready_fd = inheritable(writer.as_raw_fd())?;
    let (reader, go) = io::pipe()?;
    let go_fd = inheritable(reader.as_raw_fd())?;
    let copies: Vec<(OwnedFd, Place)> = listening()?;
    let sockets = copies.iter().map(|(fd, place)| (fd.as_raw_fd(), place.clone()));
    let (apart, sockets) = sockets.partition(|(fd, _)| is_apart(*fd));
    let message = Message { ready: ready_fd.as_raw_fd(), go: go_fd.as_raw_fd(), sockets, apart, kept };
    let message = serde_json::to_string(&message).map_err(io::Error::other)?;
    let program = std::env::current_exe()?;
    // A file that was replaced is gone under its old name: the new one has the name.
    let program =
        program.to_str().and_then(|text| text.strip_suffix(" (deleted)")).map_or_else(|| program.clone(), PathBuf::from);
    let kept_argument = KEPT_ARGUMENT.get();
    let kept_argument =
        kept_argument.map(|(path, file)| Ok::<_, io::Error>((path, inheritable(file.as_raw_fd())?))).transpose()?;
    let arguments = arguments.skip(1).map(|given| match &kept_argument {
        Some((path, fd)) => argument(given, path, fd.as_raw_fd()),
        None => given,
    });
    let child = Command::new(program).args(arguments).env(VARIABLE, message).spawn()?;
    sys_nonblocking(ready.as_raw_fd())?;
    Ok(Successor { child, ready, go })
}

impl Successor {
    /// Its pid.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it has said that it serves.
    pub fn is_ready(&mut self) -> bool {
        matches!(self.ready.read(&mut [0]), Ok(1))
    }

    /// Tells it that everything is its own now.
    pub fn release(&mut self) {
        // Its end of the pipe is gone only when it is.
        let _ = self.go.write_all(&[READY]);
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<std::process::ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Ends it: it did not become ready.
    pub fn kill(mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Inherited {
    /// What this process was left by its parent, or by a process before: nothing, mostly. Call once, before the first thread.
    pub fn take() -> Self {
        let Some(text) = std::env::var_os(VARIABLE) else {
            return fdstore::returned().map_or_else(
                |error| Self {
                    wrong: vec![format!("LISTEN_FDS and LISTEN_FDNAMES: {error}; the service manager sets them")],
                    ..Self::default()
                },
                Self::of_store,
            );
        };
        match text.to_str().and_then(|text| serde_json::from_str::<Message>(text).ok()) {
            Some(message) => Self::of(message),
            None => Self {
                wrong: vec![format!("{VARIABLE} cannot be read; it is ringfence's own variable, unset it")],
                ..Self::default()
            },
        }
    }

    /// What comes back is named even if it is no listening socket: then it is removed with the next look at the store.
    fn of_store(returned: Vec<fdstore::Returned>) -> Self {
        let mut inherited = Self::default();
        for fdstore::Returned { fd, name } in returned {
            match place_of(fd).and_then(|place| Some((place, adopt(fd)?))) {
                Some(socket) => inherited.sockets.push_back(socket),
                None => inherited.wrong.push(format!("descriptor {fd}, stored as {name}, does not listen")),
            }
            inherited.kept.insert(name);
        }
        inherited
    }

    fn of(message: Message) -> Self {
        let mut inherited = Self { kept: message.kept, ..Self::default() };
        inherited.sockets = inherited.adopt_all(message.sockets).into();
        let apart = inherited.adopt_all(message.apart);
        apart.iter().for_each(|(_, socket)| set_apart(socket));
        LEFT_APART.store(Arc::new(apart.into_iter().map(|(place, socket)| (place, Arc::new(socket))).collect()));
        inherited.ready = adopt(message.ready).map(PipeWriter::from);
        inherited.go = adopt(message.go).filter(|go| sys_nonblocking(go.as_raw_fd()).is_ok()).map(PipeReader::from);
        inherited
    }

    /// A descriptor that is something else is somebody else's, and left alone.
    fn adopt_all(&mut self, told: Vec<(RawFd, Place)>) -> Vec<(Place, OwnedFd)> {
        let mut adopted = Vec::with_capacity(told.len());
        for (fd, place) in told {
            let listens = place_of(fd).is_some_and(|found| found == place);
            match listens.then(|| adopt(fd)).flatten() {
                Some(socket) => adopted.push((place, socket)),
                None => self.wrong.push(format!("descriptor {fd} does not listen at {place:?}")),
            }
        }
        adopted
    }

    /// Whether a parent still has what it will hand over.
    pub fn has_predecessor(&self) -> bool {
        self.go.is_some()
    }

    /// Whether the parent has left everything to this process, by word or by its end: true once.
    pub fn is_released(&mut self) -> bool {
        let released = self.go.as_mut().is_some_and(|go| match go.read(&mut [0]) {
            Ok(_) => true,
            Err(error) => error.kind() != io::ErrorKind::WouldBlock,
        });
        if released {
            self.go = None;
        }
        released
    }

    /// The next socket that listens at `place`.
    pub fn take_socket(&mut self, place: &Place) -> Option<OwnedFd> {
        let at = self.sockets.iter().position(|(known, _)| known == place)?;
        self.sockets.remove(at).map(|(_, socket)| socket)
    }

    /// Whether there are sockets that no living process accepts from.
    pub fn is_orphaned(&self) -> bool {
        !self.has_predecessor() && !self.sockets.is_empty()
    }

    /// Names of what is in the descriptor store.
    pub fn kept(&self) -> &BTreeSet<String> {
        &self.kept
    }

    /// Names of the sockets that so many workers will close, because there are more of a place than workers.
    pub fn surplus(&self, workers: usize) -> Vec<String> {
        let place_before = |at: usize| self.sockets.iter().take(at).filter(|(place, _)| *place == self.sockets[at].0).count();
        let surplus = self.sockets.iter().enumerate().filter(|(at, _)| place_before(*at) >= workers);
        surplus.filter_map(|(_, (_, socket))| fdstore::name_of(socket)).filter(|name| self.kept.contains(name)).collect()
    }

    /// The rest, for so many workers: each gets its share of each place. Where there are more sockets than workers, a worker
    /// gets several of a place: it is to listen at the first, and to take what waits at the others before it closes them.
    pub fn deal(&mut self, workers: usize) -> Vec<Vec<(Place, OwnedFd)>> {
        let mut hands: Vec<Vec<(Place, OwnedFd)>> = (0..workers).map(|_| Vec::new()).collect();
        for (place, socket) in self.sockets.drain(..) {
            let of_place = |hand: &Vec<(Place, OwnedFd)>| hand.iter().filter(|(known, _)| *known == place).count();
            if let Some(hand) = hands.iter_mut().min_by_key(|hand| of_place(hand)) {
                hand.push((place, socket));
            }
        }
        hands
    }

    /// Tells the parent that this process serves.
    pub fn tell_ready(&mut self) {
        if let Some(mut ready) = self.ready.take() {
            // A parent that is gone needs no telling.
            let _ = ready.write_all(&[READY]);
        }
    }
}

/// Cookies of sockets that are no worker's, for the whole process: which sockets it has is no thread's own either. The kernel
/// gives no cookie twice, so one that is closed means nobody any more; the oldest go first.
static APART: LazyLock<ArcSwap<Vec<u64>>> = LazyLock::new(ArcSwap::default);
/// So many are known at once.
const APART_MAX: usize = 1_024;
/// What the process before had apart, and whether it has left that to this one.
static LEFT_APART: LazyLock<ArcSwap<Vec<Left>>> = LazyLock::new(ArcSwap::default);
static APART_IS_OPEN: AtomicBool = AtomicBool::new(false);
type Left = (Place, Arc<OwnedFd>);

/// This socket is no worker's: the process that takes over asks for it with [`take_apart`] once this one has left it everything,
/// and the service manager does not keep it.
pub fn set_apart(socket: &impl AsFd) {
    let Ok(cookie) = SockRef::from(socket).cookie() else { return };
    APART.rcu(|known| {
        let surplus = (known.len() + 1).saturating_sub(APART_MAX);
        known.iter().skip(surplus).copied().filter(|known| *known != cookie).chain([cookie]).collect::<Vec<_>>()
    });
}

pub(super) fn is_apart(fd: RawFd) -> bool {
    // SAFETY: at worst the descriptor was closed meanwhile, and the call on it fails.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    SockRef::from(&fd).cookie().is_ok_and(|cookie| APART.load().contains(&cookie))
}

/// The socket that the process before had apart at `place`; none before that one has left everything: until then it answers
/// there, and two processes would answer in turn. What comes meanwhile waits in the socket's queue.
pub fn take_apart(place: &Place) -> Option<OwnedFd> {
    if !APART_IS_OPEN.load(Ordering::Acquire) {
        return None;
    }
    let left = LEFT_APART.load();
    let (_, socket) = left.iter().find(|(known, _)| known == place)?;
    let copy = socket.try_clone().ok()?;
    LEFT_APART.rcu(|left| left.iter().filter(|(known, _)| known != place).cloned().collect::<Vec<_>>());
    Some(copy)
}

/// From now on [`take_apart`] gives.
pub fn open_apart() {
    APART_IS_OPEN.store(true, Ordering::Release);
}

/// Closes what the process before had apart and nobody has asked for.
pub fn close_apart() {
    LEFT_APART.store(Arc::default());
}

/// Every listening socket of this process, as a copy that a child inherits.
fn listening() -> io::Result<Vec<(OwnedFd, Place)>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fd")?.flatten() {
        let Some(fd) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        if let Some(place) = place_of(fd) {
            found.push((inheritable(fd)?, place));
        }
    }
    Ok(found)
}

/// Where a descriptor listens, if it does.
pub(super) fn place_of(fd: RawFd) -> Option<Place> {
    // SAFETY: at worst the descriptor was closed meanwhile, and each call on it fails.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    let socket = SockRef::from(&fd);
    if !socket.is_listener().ok()? {
        return None;
    }
    let address = socket.local_addr().ok()?;
    address.as_socket().map(Place::Tcp).or_else(|| Some(Place::Unix(address.as_pathname()?.to_owned())))
}

/// A copy without close-on-exec.
fn inheritable(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: takes no pointer.
    let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD, 3) };
    if copy < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just gave us this descriptor and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

/// Makes an inherited descriptor ours, and close-on-exec again.
fn adopt(fd: RawFd) -> Option<OwnedFd> {
    // SAFETY: takes no pointer; a number that is not open is an error.
    if fd < 3 || unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } != 0 {
        return None;
    }
    // SAFETY: it is open, and it was inherited: nothing of this process has it.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn sys_nonblocking(fd: RawFd) -> io::Result<()> {
    // SAFETY: the caller keeps it open during this call; SockRef only borrows it.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    SockRef::from(&fd).set_nonblocking(true)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn an_argument_that_names_what_is_kept_is_told_where_it_is() {
        let of = |given: &str| argument(given.into(), Path::new("/tmp/boot.json"), 7).into_string().expect("text");
        assert_eq!(of("/tmp/boot.json"), "/proc/self/fd/7");
        assert_eq!(of("--config-path=/tmp/boot.json"), "--config-path=/proc/self/fd/7");
        assert_eq!(of("-c/tmp/boot.json"), "-c/proc/self/fd/7");
        for other in ["/etc/tmp/boot.json", "/tmp/boot.json.old", "-c", ""] {
            assert_eq!(of(other), other);
        }
    }

    fn message(sockets: Vec<(RawFd, Place)>) -> Message {
        Message { ready: -1, go: -1, sockets, apart: Vec::new(), kept: BTreeSet::new() }
    }

    #[test]
    fn a_listening_socket_goes_on_in_other_hands() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
        let place = Place::Tcp(listener.local_addr().expect("its address"));
        let (copy, _) = listening().expect("our sockets").into_iter().find(|(_, found)| *found == place).expect("among them");
        drop(listener);
        let fd = std::os::fd::IntoRawFd::into_raw_fd(copy);
        let mut inherited = Inherited::of(message(vec![(fd, place.clone())]));
        assert!(inherited.wrong.is_empty() && !inherited.has_predecessor());
        let socket = inherited.take_socket(&place).expect("handed over");
        assert!(inherited.take_socket(&place).is_none());
        let Place::Tcp(address) = place else { panic!("tcp") };
        std::net::TcpStream::connect(address).expect("it still listens");
        drop(socket);
        assert!(std::net::TcpStream::connect(address).is_err());
    }

    #[test]
    fn a_socket_is_apart_and_not_its_address() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
        let address = listener.local_addr().expect("its address");
        set_apart(&listener);
        let copy = listener.try_clone().expect("a copy");
        assert!(is_apart(listener.as_raw_fd()) && is_apart(copy.as_raw_fd()));
        drop((listener, copy));
        let next = TcpListener::bind(address).expect("free again");
        assert!(!is_apart(next.as_raw_fd()));
    }

    #[test]
    fn what_is_left_apart_waits_for_the_end_of_the_process_before() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
        let place = Place::Tcp(listener.local_addr().expect("its address"));
        let fd = std::os::fd::IntoRawFd::into_raw_fd(OwnedFd::from(listener));
        let inherited = Inherited::of(Message { apart: vec![(fd, place.clone())], ..message(Vec::new()) });
        assert!(inherited.sockets.is_empty(), "no worker gets it");
        assert!(take_apart(&place).is_none());
        open_apart();
        let socket = take_apart(&place).expect("left to us");
        assert!(is_apart(socket.as_raw_fd()), "neither is it a worker's in this process");
        assert!(take_apart(&place).is_none(), "once");
    }

    #[test]
    fn what_is_no_such_socket_is_refused() {
        let file = std::os::fd::IntoRawFd::into_raw_fd(OwnedFd::from(tempfile::tempfile().expect("a file")));
        let place = Place::Unix("/run/x.sock".into());
        let inherited = Inherited::of(message(vec![(file, place.clone()), (9_999, place)]));
        assert_eq!(inherited.wrong.len(), 2, "{:?}", inherited.wrong);
        assert!(inherited.sockets.is_empty());
    }

    #[test]
    fn each_worker_gets_its_share_of_each_place() {
        let socket = || OwnedFd::from(TcpListener::bind("127.0.0.1:0").expect("a listener"));
        let place = |port| Place::Tcp(([127, 0, 0, 1], port).into());
        let sockets: VecDeque<_> =
            [(place(1), socket()), (place(1), socket()), (place(2), socket()), (place(1), socket())].into();
        let kept = sockets.iter().filter_map(|(_, socket)| fdstore::name_of(socket)).collect();
        let third = fdstore::name_of(&sockets[3].1).expect("a name");
        let mut inherited = Inherited { sockets, kept, ..Inherited::default() };
        assert_eq!(inherited.surplus(2), [third]);
        assert!(inherited.surplus(3).is_empty());
        let hands = inherited.deal(2);
        let places: Vec<Vec<&Place>> = hands.iter().map(|hand| hand.iter().map(|(place, _)| place).collect()).collect();
        assert_eq!(places, [vec![&place(1), &place(2), &place(1)], vec![&place(1)]]);
    }

    #[test]
    fn what_the_store_gives_back_is_taken_by_its_place() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
        let place = Place::Tcp(listener.local_addr().expect("its address"));
        let returned =
            |fd: OwnedFd, name: &str| fdstore::Returned { fd: std::os::fd::IntoRawFd::into_raw_fd(fd), name: name.to_owned() };
        let file = OwnedFd::from(tempfile::tempfile().expect("a file"));
        let mut inherited = Inherited::of_store(vec![returned(listener.into(), "ringfence-1"), returned(file, "ringfence-2")]);
        assert!(inherited.is_orphaned() && !inherited.has_predecessor());
        assert_eq!(inherited.wrong.len(), 1, "{:?}", inherited.wrong);
        assert_eq!(inherited.kept().len(), 2, "what is no socket is removed with the next look");
        assert!(inherited.take_socket(&place).is_some());
        assert!(!inherited.is_orphaned());
    }
}
