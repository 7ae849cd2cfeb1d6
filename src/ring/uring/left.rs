//! Listening sockets that another process left to this worker.
//!
//! Invariant: of several at one place the first is the one to listen at; the others are closed only when nothing waits there.

use std::net::Ipv4Addr;
use std::os::fd::{IntoRawFd, OwnedFd};

use crate::ring::{Local, Socket};
use crate::sys;
use crate::sys::handover::Place;

/// In the order in which they were dealt.
#[derive(Debug, Default)]
pub(super) struct Left(pub(super) Vec<(Place, OwnedFd)>);

impl Left {
    /// The next socket for `local`.
    pub(super) fn take(&mut self, local: &Local) -> Option<OwnedFd> {
        let at = self.at(local)?;
        Some(self.0.remove(at).1)
    }

    /// A connection that waits at a socket for `local`; sockets without one are closed.
    pub(super) fn accept(&mut self, local: &Local) -> Option<Socket> {
        while let Some(at) = self.at(local) {
            if let Some(accepted) = sys::accept_waiting(&self.0[at].1) {
                return Some(Socket(accepted.into_raw_fd()));
            }
            self.0.remove(at);
        }
        None
    }

    fn at(&self, local: &Local) -> Option<usize> {
        let place = match local {
            Local::Tcp { address, .. } => Place::Tcp(*address),
            Local::Loopback { port, .. } => Place::Tcp((Ipv4Addr::UNSPECIFIED, *port).into()),
            Local::Unix { path, .. } => Place::Unix(path.clone()),
        };
        self.0.iter().position(|(known, _)| *known == place)
    }
}

#[cfg(test)]
mod tests {
    use std::net::{SocketAddr, TcpListener, TcpStream};

    use super::*;

    #[test]
    fn the_first_listens_and_the_others_close_when_nothing_waits_there() {
        let listeners: Vec<TcpListener> = (0..2).map(|_| TcpListener::bind("127.0.0.1:0").expect("a listener")).collect();
        let addresses: Vec<SocketAddr> = listeners.iter().map(|listener| listener.local_addr().expect("its address")).collect();
        let place = Place::Tcp(([127, 0, 0, 1], 7).into());
        let mut left = Left(listeners.into_iter().map(|listener| (place.clone(), listener.into())).collect());
        let local = Local::Tcp { address: ([127, 0, 0, 1], 7).into(), exclusive: false };
        let _waits = TcpStream::connect(addresses[1]).expect("it waits");
        let first = TcpListener::from(left.take(&local).expect("one to listen at"));
        assert_eq!(first.local_addr().expect("its address"), addresses[0]);
        let accepted = left.accept(&local).expect("what waited at the other");
        sys::close(accepted.0);
        assert!(left.accept(&local).is_none() && left.0.is_empty());
        assert!(TcpStream::connect(addresses[1]).is_err(), "closed");
    }
}
