//! Listeners of their own for some of the admin port's pages: `/metrics` for Prometheus, `/stats`, `/ready`.
//!
//! Invariant: such a listener may be reached from elsewhere, so it serves what its routes name and nothing else, under the
//! same bounds as the admin port. Those of the command line or a bootstrap are bound before the process starts; those of a
//! registration come and go with it, and one that cannot be bound is told, once a reason, and tried again.
//!
//! Knows no command: a page is the admin port's own answer. A backend that does not answer costs the asker a 503.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, HttpBody as _};
use axum::extract::Request;
use axum::http::uri::{Authority, PathAndQuery};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, Uri, Version, header};
use axum::response::{IntoResponse, Response};
use hyper::client::conn as client;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;
use tower_service::Service;

use super::routes::{self, TEXT};
use super::{Shared, server};
use crate::config::envoy::{PageAnswer, PageListener, PageRoute, PageTls, PathMatch};
use crate::mesh::router::Network;

/// How often a listener that cannot be bound is tried again.
const RETRY: Duration = Duration::from_millis(200);
/// Wait for a backend: connecting, and the head of its answer.
const BACKEND_TIMEOUT: Duration = Duration::from_secs(10);
/// Headers of one connection (RFC 9110, 7.6.1), and the length, which hyper tells of the body itself.
const HOP_BY_HOP: [HeaderName; 9] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    header::CONTENT_LENGTH,
];
/// The value of `TE` that says so.
const TRAILERS: &str = "trailers";
/// Listeners at once.
const LISTENERS_MAX: usize = 64;

/// Why a listener for pages is not there.
#[derive(Debug, thiserror::Error)]
pub enum PageError {
    /// The address is taken or not this host's.
    #[error("{name} cannot listen on {bind}: {source}; choose another address, or free this one")]
    Bind {
        /// The listener's name.
        name: String,
        /// Where.
        bind: SocketAddr,
        /// The system's reason.
        source: io::Error,
    },
    /// A TLS file is missing or holds something else.
    #[error("{name}: {path}: {why}")]
    Tls {
        /// The listener's name.
        name: String,
        /// The file.
        path: String,
        /// What is wrong with it.
        why: String,
    },
}

/// A listener that is bound.
#[derive(Debug)]
pub struct Bound {
    pub(super) page: PageListener,
    listener: std::net::TcpListener,
    tls: Option<Tls>,
}

#[derive(Clone)]
struct Tls(Arc<ServerConfig>);

/// Binds an address for a listener; `app` has one that takes what the process before left.
pub type Bind = fn(SocketAddr) -> io::Result<std::net::TcpListener>;

/// Binds `page` and reads its TLS files.
pub fn bind(page: PageListener, bind: impl FnOnce(SocketAddr) -> io::Result<std::net::TcpListener>) -> Result<Bound, PageError> {
    let tls = page.tls.as_ref().map(|tls| server_config(&page.name, tls)).transpose()?.map(Tls);
    let bound = bind(page.bind).and_then(|listener| listener.set_nonblocking(true).map(|()| listener));
    match bound {
        Ok(listener) => Ok(Bound { page, listener, tls }),
        Err(source) => Err(PageError::Bind { name: page.name, bind: page.bind, source }),
    }
}

/// Serves what is bound, and what registrations ask for as it comes and goes, until `closing` turns true.
pub(super) async fn run(shared: Arc<Shared>, bound: Vec<Bound>, admin: Router, mut closing: watch::Receiver<bool>) {
    let mut running = HashMap::new();
    for one in bound {
        start(&mut running, one, &admin, true);
    }
    let fixed = running.len();
    let mut status = shared.status.clone();
    loop {
        follow(&shared, &mut running, &admin);
        let missing = running.len() < (fixed + shared.wanted_pages().len()).min(LISTENERS_MAX);
        tokio::select! {
            _ = closing.wait_for(|closing| *closing) => break,
            changed = status.changed() => if changed.is_err() { break },
            () = tokio::time::sleep(RETRY), if missing => {}
        }
    }
    // The feeder may be gone before the port closes.
    let _ = closing.wait_for(|closing| *closing).await;
}

/// One listener that is served; dropped, it closes.
struct Running {
    page: PageListener,
    /// Of the command line: it stays.
    fixed: bool,
    /// For the page that may come in its place.
    socket: std::net::TcpListener,
    _close: watch::Sender<bool>,
}

fn start(running: &mut HashMap<SocketAddr, Running>, bound: Bound, admin: &Router, fixed: bool) {
    let Bound { page, listener, tls } = bound;
    let both = listener.try_clone().and_then(|socket| Ok((socket, TcpListener::from_std(listener)?)));
    let (socket, listener) = match both {
        Ok(both) => both,
        Err(error) => {
            tracing::error!(listener = page.name, %error, "a listener for pages cannot be used");
            return;
        }
    };
    tracing::info!(listener = page.name, address = %page.bind, "listener for pages is open");
    let (close, mut closed) = watch::channel(false);
    let router = router(&page, admin.clone());
    let acceptor = tls.map(|Tls(config)| TlsAcceptor::from(config));
    let (everybody, sources) = (page.sources.is_empty(), sources(&page));
    let admits = move |peer: SocketAddr| everybody || sources.iter().any(|network| network.contains(peer.ip()));
    tokio::spawn(async move { server::serve(listener, acceptor, admits, router, &mut closed).await });
    running.insert(page.bind, Running { page, fixed, socket, _close: close });
}

/// Opens and closes listeners so that they are those that registrations want now.
fn follow(shared: &Shared, running: &mut HashMap<SocketAddr, Running>, admin: &Router) {
    let wanted = shared.wanted_pages();
    running.retain(|bind, one| one.fixed || wanted.iter().any(|page| page.bind == *bind));
    let mut failures = Vec::new();
    for page in &wanted {
        let known = running.get(&page.bind).is_some_and(|one| one.page == *page);
        if known {
            continue;
        }
        if running.len() >= LISTENERS_MAX && !running.contains_key(&page.bind) {
            failures.push((page.bind, format!("{}: there are {LISTENERS_MAX} listeners for pages; ask for fewer", page.name)));
            continue;
        }
        let taken = |one: &Running| one.fixed || wanted.contains(&one.page);
        if running.get(&page.bind).is_some_and(taken) {
            failures.push((page.bind, format!("{}: another listener for pages has {}", page.name, page.bind)));
            continue;
        }
        let socket = running.remove(&page.bind).map(|one| one.socket);
        match bind(page.clone(), |address| socket.map_or_else(|| (shared.bind_page)(address), Ok)) {
            Ok(bound) => start(running, bound, admin, false),
            Err(error) => failures.push((page.bind, error.to_string())),
        }
    }
    shared.page_failures.send_if_modified(|told| {
        let changed = *told != failures;
        for (_, why) in failures.iter().filter(|failure| changed && !told.contains(failure)) {
            tracing::error!("{why}; it is tried again");
        }
        *told = failures;
        changed
    });
}

/// Who may connect. A network that is none is left out: nobody is in it.
fn sources(page: &PageListener) -> Vec<Network> {
    page.sources.iter().filter_map(|(address, prefix)| Network::new(*address, *prefix).ok()).collect()
}

/// What a listener serves.
fn router(page: &PageListener, admin: Router) -> Router {
    let routes: Arc<[PageRoute]> = page.routes.clone().into();
    Router::new().fallback(move |request: Request| {
        let (routes, admin) = (Arc::clone(&routes), admin.clone());
        async move { serve(&routes, admin, request).await }
    })
}

async fn serve(routes: &[PageRoute], mut admin: Router, mut request: Request) -> Response {
    let path = request.uri().path();
    let found = routes.iter().find_map(|route| Some((route, rest(&route.path, path)?)));
    let Some((route, rest)) = found else { return StatusCode::NOT_FOUND.into_response() };
    match &route.answer {
        PageAnswer::Status(status) => StatusCode::from_u16(*status).unwrap_or(StatusCode::NOT_FOUND).into_response(),
        PageAnswer::Admin { rewrite } => {
            let Some(path) = rewritten(request.uri(), rest, rewrite.as_deref()) else { return bad_path() };
            *request.uri_mut() = path.into();
            // A router answers everything.
            match admin.call(request).await {
                Ok(response) => response,
                Err(never) => match never {},
            }
        }
        PageAnswer::Backend { address, rewrite, http2 } => {
            let Some(path) = rewritten(request.uri(), rest, rewrite.as_deref()) else { return bad_path() };
            backend(*address, *http2, path, request).await
        }
    }
}

/// What follows the matched part of `path`; `None` when it does not match.
fn rest<'a>(matched: &PathMatch, path: &'a str) -> Option<&'a str> {
    match matched {
        PathMatch::Exact(whole) => (path == whole).then_some(""),
        PathMatch::Prefix(prefix) => path.strip_prefix(prefix.as_str()),
    }
}

/// The path to ask for, with the query as it came.
fn rewritten(uri: &Uri, rest: &str, rewrite: Option<&str>) -> Option<PathAndQuery> {
    let path = rewrite.map_or_else(|| uri.path().to_owned(), |rewrite| format!("{rewrite}{rest}"));
    let text = uri.query().map_or_else(|| path.clone(), |query| format!("{path}?{query}"));
    text.parse().ok()
}

fn bad_path() -> Response {
    StatusCode::BAD_REQUEST.into_response()
}

/// Asks another local server in the asker's place.
async fn backend(address: SocketAddr, http2: bool, path: PathAndQuery, request: Request) -> Response {
    let Ok(request) = addressed(address, http2, path, request) else { return bad_path() };
    match tokio::time::timeout(BACKEND_TIMEOUT, forward(address, http2, request)).await {
        Ok(Ok(response)) => response,
        Ok(Err(error)) => unavailable(address, &error),
        Err(_) => unavailable(address, &io::Error::from(io::ErrorKind::TimedOut)),
    }
}

/// Bodies pass as they come, and over HTTP/2 their trailers.
async fn forward(address: SocketAddr, http2: bool, request: Request) -> io::Result<Response> {
    let stream = TokioIo::new(TcpStream::connect(address).await?);
    // Either connection ends with the answer's body, or when the asker goes away.
    let answer = if http2 {
        let connecting = client::http2::handshake(TokioExecutor::new(), stream).await;
        let (mut sender, connection) = connecting.map_err(io::Error::other)?;
        tokio::spawn(connection);
        sender.send_request(request).await
    } else {
        let (mut sender, connection) = client::http1::handshake(stream).await.map_err(io::Error::other)?;
        tokio::spawn(connection);
        sender.send_request(request).await
    };
    Ok(answer.map_err(io::Error::other)?.map(Body::new))
}

/// The request as the backend gets it. A check has its own Host and credentials; what is of the asker's connection stays here.
fn addressed(address: SocketAddr, http2: bool, path: PathAndQuery, mut request: Request) -> Result<Request, axum::http::Error> {
    // The target of a request comes before its Host (RFC 9112, 3.2.2; RFC 9113, 8.3.1), and nobody is named in one.
    let target = request.uri().authority().and_then(|target| target.as_str().rsplit('@').next());
    let host = || request.headers().get(header::HOST).and_then(|host| host.to_str().ok());
    let authority: Authority = target.or_else(host).map_or_else(|| address.to_string(), str::to_owned).parse()?;
    let trailers = request.headers().get(header::TE).is_some_and(|te| te == TRAILERS);
    strip(request.headers_mut());
    if http2 {
        request.headers_mut().remove(header::HOST);
        // The one value that HTTP/2 knows (RFC 9113, 8.2.2), and that gRPC servers insist on.
        if trailers {
            request.headers_mut().insert(header::TE, HeaderValue::from_static(TRAILERS));
        }
        *request.uri_mut() = Uri::builder().scheme("http").authority(authority).path_and_query(path).build()?;
        *request.version_mut() = Version::HTTP_2;
    } else {
        request.headers_mut().insert(header::HOST, HeaderValue::try_from(authority.as_str())?);
        // Otherwise a body of unknown length goes with methods alone that are known to have one.
        if request.body().size_hint().exact().is_none() {
            request.headers_mut().insert(header::TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
        }
        *request.uri_mut() = path.into();
        *request.version_mut() = Version::HTTP_11;
    }
    Ok(request)
}

/// Takes away what is of one connection, also what its `Connection` names.
fn strip(headers: &mut HeaderMap) {
    let named = headers.get_all(header::CONNECTION).iter().filter_map(|value| value.to_str().ok());
    let named: Vec<HeaderName> = named.flat_map(|value| value.split(',')).filter_map(|name| name.trim().parse().ok()).collect();
    for name in HOP_BY_HOP.into_iter().chain(named) {
        headers.remove(name);
    }
}

fn unavailable(address: SocketAddr, error: &io::Error) -> Response {
    let text = format!("{address} does not answer: {error}\n");
    routes::answer(StatusCode::SERVICE_UNAVAILABLE, TEXT, text)
}

fn server_config(name: &str, files: &PageTls) -> Result<Arc<ServerConfig>, PageError> {
    let wrong = |path: &Path, why: String| PageError::Tls { name: name.to_owned(), path: path.display().to_string(), why };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let chain = certificates(&files.cert_file).map_err(|why| wrong(&files.cert_file, why))?;
    let key = PrivateKeyDer::from_pem_file(&files.key_file)
        .map_err(|error| wrong(&files.key_file, format!("no private key can be read: {error}")))?;
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| wrong(&files.cert_file, error.to_string()))?;
    let builder = match &files.ca {
        None => builder.with_no_client_auth(),
        Some(ca) => {
            let mut roots = RootCertStore::empty();
            for certificate in authorities(ca).map_err(|why| wrong(ca, why))? {
                roots.add(certificate).map_err(|error| wrong(ca, error.to_string()))?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
            builder.with_client_cert_verifier(verifier.map_err(|error| wrong(ca, error.to_string()))?)
        }
    };
    let config = builder.with_single_cert(chain, key);
    config.map(Arc::new).map_err(|error| wrong(&files.key_file, format!("not the key of {}: {error}", files.cert_file.display())))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    match read {
        Ok(chain) if chain.is_empty() => Err("holds no certificate in PEM".to_owned()),
        Ok(chain) => Ok(chain),
        Err(error) => Err(format!("cannot be read: {error}")),
    }
}

/// Of a file, or of each file in a folder that holds any.
fn authorities(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    if !path.is_dir() {
        return certificates(path);
    }
    let entries = std::fs::read_dir(path).map_err(|error| format!("cannot be read: {error}"))?;
    let found: Vec<_> = entries.flatten().filter_map(|entry| certificates(&entry.path()).ok()).flatten().collect();
    if found.is_empty() { Err("holds no certificate in PEM".to_owned()) } else { Ok(found) }
}

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Tls")
    }
}
