//! HTTP/1.1 and, for whoever begins with it, HTTP/2, under bounds.
//!
//! Invariant: at most [`CONNECTIONS_MAX`] connections at once, each with [`HEAD_BYTES_MAX`] of request head, a wait of
//! [`HEAD_TIMEOUT`] for it, and a life of [`CONNECTION_LIFE_MAX`]. Further clients wait in the kernel's backlog. So a slow
//! or hostile client costs a bounded amount of memory, for a bounded time. No body is kept: what is not read stays with its
//! client.
//!
//! Knows routes only as a service. A failed accept is retried after a pause; a failed connection concerns its client alone.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::ConnectInfo;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

/// Connections served at once.
pub(super) const CONNECTIONS_MAX: usize = 64;
/// Bytes of a request's head, and of the buffer for reading.
const HEAD_BYTES_MAX: u32 = 16 << 10;
/// Requests of an HTTP/2 connection at once: as many as over HTTP/1.1, so that connections bound answers.
const STREAMS_MAX: u32 = 1;
/// Bytes of bodies that a client may send over HTTP/2 before they are read, a request and a connection.
const WINDOW_BYTES: u32 = 64 << 10;
/// Wait for a connection's first request, and over HTTP/1.1 for each whole request head and between two requests.
pub(super) const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// After this a connection may finish its request and is closed.
const CONNECTION_LIFE_MAX: Duration = Duration::from_secs(60);
/// How long an open request may go on once its connection must end, or the process.
const FINISH_TIMEOUT: Duration = Duration::from_secs(1);
/// Pause after a failed accept (descriptors ran out).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Accepts and serves whom `admits` lets in, over TLS where that is given, until `shutdown` turns true or its sender is gone, and
/// then until open requests have ended.
pub(super) async fn serve(
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    admits: impl Fn(SocketAddr) -> bool,
    router: Router,
    shutdown: &mut watch::Receiver<bool>,
) {
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let ending = shutdown.clone();
    let mut connections = JoinSet::new();
    let accepting = async {
        loop {
            let (stream, peer, permit) = accept(&listener, &room).await;
            if !admits(peer) {
                continue;
            }
            // Finished tasks are taken off here, so the set holds no more than there are permits.
            while connections.try_join_next().is_some() {}
            let (tls, router, ending) = (tls.clone(), router.clone(), ending.clone());
            connections.spawn(async move {
                let _permit = permit;
                match tls {
                    None => connection(stream, peer, router, ending).await,
                    // A handshake that fails or takes too long concerns its client alone.
                    Some(tls) => {
                        if let Ok(Ok(stream)) = tokio::time::timeout(HEAD_TIMEOUT, tls.accept(stream)).await {
                            connection(stream, peer, router, ending).await;
                        }
                    }
                }
            });
        }
    };
    tokio::select! {
        () = accepting => {}
        _ = shutdown.wait_for(|shutdown| *shutdown) => {}
    }
    drop(listener);
    let finish = async { while connections.join_next().await.is_some() {} };
    // What is not done by then is dropped with the set.
    let _ = tokio::time::timeout(FINISH_TIMEOUT * 2, finish).await;
}

async fn accept(listener: &TcpListener, room: &Arc<Semaphore>) -> (TcpStream, SocketAddr, OwnedSemaphorePermit) {
    loop {
        let permit = match Arc::clone(room).acquire_owned().await {
            Ok(permit) => permit,
            // The semaphore is never closed; were it ever, accepting would end and nothing else.
            Err(_) => std::future::pending().await,
        };
        match listener.accept().await {
            Ok((stream, peer)) => return (stream, peer, permit),
            Err(error) => {
                tracing::warn!(%error, "the admin port or a listener for pages cannot accept; it tries again");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn connection(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    peer: SocketAddr,
    router: Router,
    mut shutdown: watch::Receiver<bool>,
) {
    let router = router.layer(axum::Extension(ConnectInfo(peer)));
    let (asked, mut begun) = watch::channel(false);
    let router = TowerToHyperService::new(router);
    let service = service_fn(move |request| {
        asked.send_replace(true);
        router.call(request)
    });
    let mut http = auto::Builder::new(TokioExecutor::new());
    http.http1().timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT).max_buf_size(HEAD_BYTES_MAX as usize);
    let mut http2 = http.http2();
    http2.max_concurrent_streams(STREAMS_MAX).max_header_list_size(HEAD_BYTES_MAX);
    http2.initial_stream_window_size(WINDOW_BYTES).initial_connection_window_size(WINDOW_BYTES);
    let mut serving = std::pin::pin!(http.serve_connection(TokioIo::new(stream), service));
    // Until it is known which HTTP it is, no timer of hyper's runs.
    let mut first = begun.clone();
    let silent = async {
        if tokio::time::timeout(HEAD_TIMEOUT, first.wait_for(|begun| *begun)).await.is_ok() {
            std::future::pending().await
        }
    };
    let ending = async {
        // An error means the end as well.
        let _ = shutdown.wait_for(|shutdown| *shutdown).await;
        // The first request may be on its way, and hyper would close a connection that has read nothing yet.
        let first = begun.wait_for(|begun| *begun);
        let _ = tokio::time::timeout(FINISH_TIMEOUT, first).await;
    };
    tokio::select! {
        _ = serving.as_mut() => return,
        () = silent => return,
        () = tokio::time::sleep(CONNECTION_LIFE_MAX) => {}
        () = ending => {}
    }
    serving.as_mut().graceful_shutdown();
    // An error or a timeout here concerns a client that is gone or does not read.
    let _ = tokio::time::timeout(FINISH_TIMEOUT, serving).await;
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// An accepted connection whose client had not got to its request when the end came.
    #[tokio::test]
    async fn a_first_request_that_is_on_its_way_is_answered() {
        let (mut client, server) = tokio::io::duplex(1 << 16);
        let router = Router::new().fallback(|| async { "here" });
        let (close, closed) = watch::channel(false);
        let serving = tokio::spawn(connection(server, ([127, 0, 0, 1], 1).into(), router, closed));
        tokio::task::yield_now().await;
        close.send_replace(true);
        tokio::time::sleep(Duration::from_millis(50)).await;
        client.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.expect("it is open");
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.expect("an answer and the end");
        assert!(answer.starts_with("HTTP/1.1 200 ") && answer.ends_with("here"), "{answer}");
        serving.await.expect("no panic");
    }

    /// Whatever a client begins with: until then nobody knows which HTTP it speaks.
    #[tokio::test]
    async fn who_asks_nothing_is_cut_off_when_its_time_is_over() {
        let (_close, closed) = watch::channel(false);
        let lived = |begin: &'static [u8]| {
            let (mut client, server) = tokio::io::duplex(1 << 16);
            let closed = closed.clone();
            async move {
                let start = Instant::now();
                client.write_all(begin).await.expect("it is open");
                let serving = connection(server, ([127, 0, 0, 1], 1).into(), Router::new(), closed);
                tokio::time::timeout(HEAD_TIMEOUT * 2, serving).await.expect("it is closed");
                start.elapsed() > HEAD_TIMEOUT / 2
            }
        };
        let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
        let had_time = tokio::join!(lived(b""), lived(b"PRI * HT"), lived(preface), lived(b"GET / HTTP/1.1\r\n"));
        assert_eq!(had_time, (true, true, true, true));
    }

    /// One that asks nothing is closed in time.
    #[tokio::test]
    async fn who_asks_nothing_holds_up_no_end() {
        let (client, server) = tokio::io::duplex(1 << 16);
        let (close, closed) = watch::channel(false);
        let serving = tokio::spawn(connection(server, ([127, 0, 0, 1], 1).into(), Router::new(), closed));
        close.send_replace(true);
        tokio::time::timeout(FINISH_TIMEOUT * 10, serving).await.expect("in time").expect("no panic");
        drop(client);
    }
}
