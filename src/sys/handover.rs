//! Listening sockets that go from a process to the one that takes its place, by inheritance: not one is closed on the way, so
//! no connection in a backlog is lost.
//!
//! Invariant: what is inherited is what the parent said, checked: a listening socket at that very address. Anything else is
//! closed and told.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::process::{Child, Command};

use serde::{Deserialize, Serialize};
use socket2::SockRef;

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
}

/// The child that is to take over.
#[derive(Debug)]
pub struct Successor {
    child: Child,
    ready: PipeReader,
    go: PipeWriter,
}

/// What a parent left.
#[derive(Debug, Default)]
pub struct Inherited {
    sockets: VecDeque<(Place, OwnedFd)>,
    ready: Option<PipeWriter>,
    go: Option<PipeReader>,
    /// What was said and does not hold.
    pub wrong: Vec<String>,
}

/// Starts this program's file again, as it is on disk now, with the same arguments and with every listening socket of this
/// process.
pub fn start_successor(arguments: impl Iterator<Item = OsString>) -> io::Result<Successor> {
    let (ready, writer) = io::pipe()?;
    let ready_fd = inheritable(writer.as_raw_fd())?;
    let (reader, go) = io::pipe()?;
    let go_fd = inheritable(reader.as_raw_fd())?;
    let kept: Vec<(OwnedFd, Place)> = listening()?;
    let sockets = kept.iter().map(|(fd, place)| (fd.as_raw_fd(), place.clone())).collect();
    let message = serde_json::to_string(&Message { ready: ready_fd.as_raw_fd(), go: go_fd.as_raw_fd(), sockets })
        .map_err(io::Error::other)?;
    let program = std::env::current_exe()?;
    // A file that was replaced is gone under its old name: the new one has the name.
    let program =
        program.to_str().and_then(|text| text.strip_suffix(" (deleted)")).map_or_else(|| program.clone(), PathBuf::from);
    let child = Command::new(program).args(arguments.skip(1)).env(VARIABLE, message).spawn()?;
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
    /// What this process was left by its parent: nothing, mostly. Call once.
    pub fn take() -> Self {
        let Some(text) = std::env::var_os(VARIABLE) else { return Self::default() };
        match text.to_str().and_then(|text| serde_json::from_str::<Message>(text).ok()) {
            Some(message) => Self::of(message),
            None => Self {
                wrong: vec![format!("{VARIABLE} cannot be read; it is ringfence's own variable, unset it")],
                ..Self::default()
            },
        }
    }

    fn of(message: Message) -> Self {
        let mut inherited = Self::default();
        for (fd, place) in message.sockets {
            // A descriptor that is something else is somebody else's, and left alone.
            let listens = place_of(fd).is_some_and(|found| found == place);
            match listens.then(|| adopt(fd)).flatten() {
                Some(socket) => inherited.sockets.push_back((place, socket)),
                None => inherited.wrong.push(format!("descriptor {fd} does not listen at {place:?}")),
            }
        }
        inherited.ready = adopt(message.ready).map(PipeWriter::from);
        inherited.go = adopt(message.go).filter(|go| sys_nonblocking(go.as_raw_fd()).is_ok()).map(PipeReader::from);
        inherited
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

    /// The rest, for so many workers: each gets its share of each place.
    pub fn deal(&mut self, workers: usize) -> Vec<Vec<(Place, OwnedFd)>> {
        let mut hands: Vec<Vec<(Place, OwnedFd)>> = (0..workers).map(|_| Vec::new()).collect();
        for (place, socket) in self.sockets.drain(..) {
            // More sockets than workers: the rest closes here, and its backlog with it.
            let without = hands.iter_mut().find(|hand| hand.iter().all(|(known, _)| *known != place));
            if let Some(hand) = without {
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
fn place_of(fd: RawFd) -> Option<Place> {
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
    fn a_listening_socket_goes_on_in_other_hands() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
        let place = Place::Tcp(listener.local_addr().expect("its address"));
        let (copy, _) = listening().expect("our sockets").into_iter().find(|(_, found)| *found == place).expect("among them");
        drop(listener);
        let fd = std::os::fd::IntoRawFd::into_raw_fd(copy);
        let mut inherited = Inherited::of(Message { ready: -1, go: -1, sockets: vec![(fd, place.clone())] });
        assert!(inherited.wrong.is_empty() && !inherited.has_predecessor());
        let socket = inherited.take_socket(&place).expect("handed over");
        assert!(inherited.take_socket(&place).is_none());
        let Place::Tcp(address) = place else { panic!("tcp") };
        std::net::TcpStream::connect(address).expect("it still listens");
        drop(socket);
        assert!(std::net::TcpStream::connect(address).is_err());
    }

    #[test]
    fn what_is_no_such_socket_is_refused() {
        let file = std::os::fd::IntoRawFd::into_raw_fd(OwnedFd::from(tempfile::tempfile().expect("a file")));
        let place = Place::Unix("/run/x.sock".into());
        let inherited = Inherited::of(Message { ready: -1, go: -1, sockets: vec![(file, place.clone()), (9_999, place)] });
        assert_eq!(inherited.wrong.len(), 2, "{:?}", inherited.wrong);
        assert!(inherited.sockets.is_empty());
    }

    #[test]
    fn each_worker_gets_one_of_each_place() {
        let socket = || OwnedFd::from(TcpListener::bind("127.0.0.1:0").expect("a listener"));
        let place = |port| Place::Tcp(([127, 0, 0, 1], port).into());
        let sockets = [(place(1), socket()), (place(1), socket()), (place(2), socket()), (place(1), socket())].into();
        let hands = Inherited { sockets, ..Inherited::default() }.deal(2);
        let places: Vec<Vec<&Place>> = hands.iter().map(|hand| hand.iter().map(|(place, _)| place).collect()).collect();
        assert_eq!(places, [vec![&place(1), &place(2)], vec![&place(1)]]);
    }
}
