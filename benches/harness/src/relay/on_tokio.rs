//! The relay as most would write it: tokio on one thread, tokio-rustls, `copy_bidirectional`.
//!
//! Invariant: the TLS handshake is over, and the peer verified, before the other side is dialed. A connection that fails is cut on
//! both sides and named on standard error.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, copy_bidirectional_with_sizes};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::tls::{Tls, unused_name};

/// Buffer of each direction.
const BUFFER_BYTES: usize = 64 * 1024;
/// How long to wait after a failed accept, which is most often a lack of descriptors.
const ACCEPT_PAUSE_MS: u64 = 10;

/// Relays until the process is ended.
pub(crate) fn run(listener: std::net::TcpListener, to: SocketAddr, tls: Option<Tls>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        listener.set_nonblocking(true)?;
        let listener = TcpListener::from_std(listener)?;
        println!("ready");
        loop {
            match listener.accept().await {
                Ok((near, _)) => drop(tokio::spawn(connection(near, to, tls.clone()))),
                Err(error) => {
                    eprintln!("accept: {error}. If descriptors ran out, raise `ulimit -n`.");
                    tokio::time::sleep(Duration::from_millis(ACCEPT_PAUSE_MS)).await;
                }
            }
        }
    })
}

async fn connection(near: TcpStream, to: SocketAddr, tls: Option<Tls>) {
    if let Err(error) = relay(near, to, tls).await {
        eprintln!("connection to {to} cut: {error}");
    }
}

async fn relay(near: TcpStream, to: SocketAddr, tls: Option<Tls>) -> io::Result<()> {
    near.set_nodelay(true)?;
    match tls {
        None => copy(near, dial(to).await?).await,
        Some(Tls::Accept(config)) => {
            let near = TlsAcceptor::from(config).accept(near).await?;
            copy(near, dial(to).await?).await
        }
        Some(Tls::Dial(config)) => {
            let far = TlsConnector::from(config).connect(unused_name(), dial(to).await?).await?;
            copy(near, far).await
        }
    }
}

async fn dial(to: SocketAddr) -> io::Result<TcpStream> {
    let far = TcpStream::connect(to).await?;
    far.set_nodelay(true)?;
    Ok(far)
}

async fn copy(mut near: impl AsyncRead + AsyncWrite + Unpin, mut far: impl AsyncRead + AsyncWrite + Unpin) -> io::Result<()> {
    copy_bidirectional_with_sizes(&mut near, &mut far, BUFFER_BYTES, BUFFER_BYTES).await.map(drop)
}
