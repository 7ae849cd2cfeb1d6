//! What both programs of the harness need from the operating system: listeners and descriptors.
//!
//! Invariant: a listener made here has the backlog and the address reuse that the measurements assume. Fails with an error that
//! names the address, because a port that is taken is the usual reason why a benchmark does not start.

use std::net::{SocketAddr, TcpListener};

use anyhow::Context;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use socket2::{Domain, Protocol, Socket, Type};

/// Connections that may wait to be accepted: more than the largest shape opens at once.
const BACKLOG: i32 = 4_096;

/// A listener on `address` with SO_REUSEADDR and a backlog of 4096.
pub fn listen(address: SocketAddr) -> anyhow::Result<TcpListener> {
    let make = || {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        std::io::Result::Ok(socket.into())
    };
    make().with_context(|| format!("cannot listen on {address}: choose a free port of this host"))
}

/// Raises the soft limit of open descriptors to the hard limit. A limit that cannot be raised is left as it is: the shapes
/// that need more count a failed connection for each descriptor that is missing.
pub fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum
        && let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })
    {
        eprintln!("descriptors stay limited to {:?}: {error}. Raise `ulimit -n` before the start.", limit.current);
    }
}
