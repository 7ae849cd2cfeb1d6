//! One TLS handshake with an endpoint, by the data plane's own TLS over an ordinary socket.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::identity::SpiffeId;
use crate::mesh::Target;
use crate::tls::{Established, Failure, FailureKind, Open, Progress, TlsError, WorkerTls};

/// Room for handshake flights: a chain of several certificates fits.
const BUFFER_BYTES: usize = 64 << 10;
/// Steps of one handshake; a peer that needs more plays games.
const STEPS_MAX: usize = 64;
/// A peer that refuses says so at once after the handshake; one that accepts says nothing.
const REFUSAL_WAIT: Duration = Duration::from_millis(300);

/// A handshake that worked.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) peer: SpiffeId,
    pub(super) version: &'static str,
    pub(super) took: Duration,
    /// The peer ended the connection right after the handshake: its intentions do not let us in.
    pub(super) refused: bool,
}

/// Why there was no handshake.
#[derive(Debug, thiserror::Error)]
pub(super) enum ProbeError {
    #[error("cannot be reached: {0}")]
    Connect(std::io::Error),
    #[error("no handshake within {0:?}")]
    Timeout(Duration),
    #[error("the connection broke in the handshake: {0}")]
    Broken(std::io::Error),
    #[error("the handshake failed: {0}")]
    Handshake(#[from] Failure),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("the handshake does not come to an end")]
    Endless,
}

impl ProbeError {
    pub(super) fn remedy(&self) -> &'static str {
        match self {
            Self::Connect(_) | Self::Timeout(_) => "is its sidecar running, and does a firewall stand between?",
            Self::Broken(_) => "what answers there may be no sidecar: see the service's registered address and port",
            Self::Handshake(failure) => match failure.kind {
                FailureKind::Identity => "another service's sidecar answers there: see the registered address and port",
                FailureKind::Certificate => "its certificate is not of this mesh, or expired: see its sidecar and both clocks",
                FailureKind::Alert(_) => "it does not accept our certificate: see its log and both clocks",
                FailureKind::Protocol => "what answers there is no sidecar: see the registered address and port",
            },
            Self::Tls(_) | Self::Endless => "",
        }
    }
}

pub(super) async fn probe(tls: &WorkerTls, target: &Target, address: SocketAddr, timeout: Duration) -> Result<Found, ProbeError> {
    let started = Instant::now();
    let shaken = tokio::time::timeout(timeout, async {
        let mut stream = TcpStream::connect(address).await.map_err(ProbeError::Connect)?;
        let (established, rest) = shake(tls, target, &mut stream).await?;
        Ok::<_, ProbeError>((stream, established, rest))
    });
    let (stream, established, rest) = shaken.await.unwrap_or(Err(ProbeError::Timeout(timeout)))?;
    let took = started.elapsed();
    let peer =
        established.peer.clone().ok_or_else(|| ProbeError::Broken(std::io::Error::other("nobody of the mesh answered")))?;
    let version = version_name(established.version);
    let refused = is_refused(stream, established, rest).await;
    Ok(Found { peer, version, took, refused })
}

/// The handshake, and the bytes that came after it.
async fn shake(tls: &WorkerTls, target: &Target, stream: &mut TcpStream) -> Result<(Established, Vec<u8>), ProbeError> {
    let mut handshake = tls.dialer(&target.sni, &target.expected).connect()?;
    let mut incoming = Vec::with_capacity(BUFFER_BYTES);
    let mut out = vec![0; BUFFER_BYTES];
    for _ in 0..STEPS_MAX {
        let step = handshake.step(&mut incoming, &mut out);
        incoming.drain(..step.consumed.min(incoming.len()));
        stream.write_all(&out[..step.written]).await.map_err(ProbeError::Broken)?;
        match step.progress {
            Progress::Done => return Ok((handshake.establish()?, incoming)),
            Progress::Failed(failure) => return Err(failure.into()),
            Progress::NeedRoom => {}
            Progress::NeedBytes => {
                let room = BUFFER_BYTES.saturating_sub(incoming.len()) as u64;
                if room == 0 {
                    return Err(ProbeError::Endless);
                }
                let read = (&mut *stream).take(room).read_buf(&mut incoming).await.map_err(ProbeError::Broken)?;
                if read == 0 {
                    return Err(ProbeError::Broken(std::io::ErrorKind::UnexpectedEof.into()));
                }
            }
        }
    }
    Err(ProbeError::Endless)
}

/// Whether the peer ends the connection by itself at once.
async fn is_refused(mut stream: TcpStream, mut established: Established, mut bytes: Vec<u8>) -> bool {
    let refused = tokio::time::timeout(REFUSAL_WAIT, async {
        loop {
            match established.session.open(&mut bytes) {
                Ok(Open::Data { .. }) => return false,
                Ok(Open::Control { record_len }) => {
                    bytes.drain(..record_len.min(bytes.len()));
                }
                Ok(Open::CloseNotify { .. } | Open::Alert { .. }) | Err(_) => return true,
                Ok(Open::Incomplete { .. }) => {
                    if bytes.len() >= BUFFER_BYTES || !matches!(stream.read_buf(&mut bytes).await, Ok(1..)) {
                        return true;
                    }
                }
            }
        }
    });
    // Silence is consent: the peer waits for our first byte.
    refused.await.unwrap_or(false)
}

fn version_name(version: u16) -> &'static str {
    match version {
        0x0303 => "TLSv1.2",
        0x0304 => "TLSv1.3",
        _ => "an unknown TLS version",
    }
}
