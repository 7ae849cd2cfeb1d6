//! Listeners for some of the port's pages: which paths are there, backends, and coming and going with a registration.

use super::*;
use crate::config::envoy::{PageAnswer, PageListener, PageRoute, PageTls, PathMatch};

fn page(bind: SocketAddr, path: PathMatch, answer: PageAnswer) -> PageListener {
    let nothing = PageRoute { path: PathMatch::Prefix("/".to_owned()), answer: PageAnswer::Status(404) };
    PageListener {
        name: "pages".to_owned(),
        bind,
        routes: vec![PageRoute { path, answer }, nothing],
        tls: None,
        sources: Vec::new(),
    }
}

fn service(pages: Vec<PageListener>) -> ServiceStatus {
    ServiceStatus {
        proxy_id: "db-sidecar-proxy".into(),
        service: None,
        spiffe_id: None,
        leaf_serial: None,
        leaf_not_after: None,
        rotations: 0,
        pages,
        problem: None,
    }
}

/// An address that was free a moment ago.
async fn free() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").await.expect("a free port").local_addr().expect("bound")
}

async fn get(address: SocketAddr, path: &str) -> std::io::Result<Answer> {
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").as_bytes()).await?;
    let mut text = String::new();
    stream.read_to_string(&mut text).await?;
    let Some((head, body)) = text.split_once("\r\n\r\n") else { return Err(std::io::ErrorKind::UnexpectedEof.into()) };
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status");
    Ok(Answer { status, head: head.to_owned(), body: body.to_owned() })
}

/// Asks until somebody listens.
async fn got(address: SocketAddr, path: &str) -> Answer {
    for _ in 0..200 {
        if let Ok(answer) = get(address, path).await {
            return answer;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("nobody listens on {address}");
}

#[tokio::test]
async fn a_registrations_pages_come_and_go_and_show_nothing_else() {
    let port = port().await;
    let address = free().await;
    let answer = PageAnswer::Admin { rewrite: Some("/metrics".to_owned()) };
    let scrape = page(address, PathMatch::Exact("/scrape".to_owned()), answer);
    port.status.send_replace(Status { services: vec![service(vec![scrape])], ..Status::default() });
    let metrics = got(address, "/scrape?x=1").await;
    assert_eq!(metrics.status, 200);
    assert!(metrics.body.contains("ringfence_"), "{}", metrics.body);
    for path in ["/", "/metrics", "/quitquitquit", "/scrape/", "/scrapes", "/../quitquitquit"] {
        assert_eq!(got(address, path).await.status, 404, "{path}");
    }
    assert!(port.ask("GET", "/listeners").await.body.contains(&format!("pages::{address}\n")));
    // Another page in its place: the socket stays.
    let moved = page(address, PathMatch::Exact("/moved".to_owned()), PageAnswer::Admin { rewrite: Some("/ready".to_owned()) });
    port.status.send_replace(Status { services: vec![service(vec![moved])], agent_reachable: true, ..Status::default() });
    while get(address, "/moved").await.expect("it listens all the time").status == 404 {}
    assert_eq!(get(address, "/scrape").await.expect("it listens").status, 404);
    assert_eq!(port.json("/healthz").await["problems"], serde_json::json!([]));
    port.status.send_replace(Status::default());
    for _ in 0..200 {
        if TcpStream::connect(address).await.is_err() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("the listener is still there");
}

#[tokio::test]
async fn an_address_in_use_is_a_problem_until_it_is_free() {
    let port = port().await;
    let held = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = held.local_addr().expect("bound");
    let ready = page(address, PathMatch::Exact("/ready".to_owned()), PageAnswer::Admin { rewrite: None });
    port.status.send_replace(Status { services: vec![service(vec![ready])], agent_reachable: true, ..Status::default() });
    tokio::time::sleep(Duration::from_millis(100)).await;
    let problems = port.json("/healthz").await["problems"].clone();
    assert_eq!(problems[0]["subject"], address.to_string());
    assert!(problems[0]["problem"].as_str().is_some_and(|text| text.contains("free this one")), "{problems}");
    drop(held);
    assert_eq!(got(address, "/ready").await.body, "PRE_INITIALIZING\n");
    assert_eq!(port.json("/healthz").await["problems"], serde_json::json!([]));
}

#[tokio::test]
async fn a_backend_answers_or_costs_a_503() {
    let backend = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let behind = backend.local_addr().expect("bound");
    let serving = tokio::spawn(async move {
        let (mut stream, _) = backend.accept().await.expect("accepts");
        let mut head = vec![0; 4096];
        let length = stream.read(&mut head).await.expect("reads");
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nabc").await.expect("answers");
        String::from_utf8_lossy(&head[..length]).into_owned()
    });
    let address = free().await;
    let answer = PageAnswer::Backend { address: behind, rewrite: Some("/stats/prometheus".to_owned()), http2: false };
    let scrape = page(address, PathMatch::Prefix("/m".to_owned()), answer);
    let port = port().await;
    port.status.send_replace(Status { services: vec![service(vec![scrape])], ..Status::default() });
    let answer = got(address, "/m/x?usedonly").await;
    assert_eq!((answer.status, answer.body.as_str()), (200, "abc"));
    let asked = serving.await.expect("served");
    assert!(asked.starts_with("GET /stats/prometheus/x?usedonly HTTP/1.1\r\n"), "{asked}");
    assert_eq!(got(address, "/m").await.status, 503, "the backend is gone");
}

#[tokio::test]
async fn pages_over_tls_want_a_certificate_of_the_ca() {
    let folder = tempfile::tempdir().expect("folder");
    let path = |name: &str| folder.path().join(name);
    let key = rcgen::KeyPair::generate().expect("a key");
    let certificate =
        rcgen::CertificateParams::new(vec!["localhost".to_owned()]).expect("valid").self_signed(&key).expect("signed");
    std::fs::write(path("cert.pem"), certificate.pem()).expect("written");
    std::fs::write(path("key.pem"), key.serialize_pem()).expect("written");
    std::fs::write(path("empty.pem"), "").expect("written");
    let tls = PageTls { cert_file: path("cert.pem"), key_file: path("key.pem"), ca: Some(path("cert.pem")) };
    let ready = PathMatch::Exact("/ready".to_owned());
    let page = PageListener { tls: Some(tls.clone()), ..page(free().await, ready, PageAnswer::Admin { rewrite: None }) };
    let wrong = PageListener { tls: Some(PageTls { ca: Some(path("empty.pem")), ..tls }), ..page.clone() };
    let bind: pages::Bind = |address| std::net::TcpListener::bind(address);
    let error = pages::bind(wrong, bind).expect_err("no CA");
    assert!(error.to_string().contains("empty.pem") && error.to_string().contains("holds no certificate"), "{error}");

    let address = page.bind;
    let bound = pages::bind(page, bind).expect("bound");
    let settings = Settings { pages: vec![bound], ..Settings::default() };
    let _port = port_with(Destination::None, settings).await;
    let plain = get(address, "/ready").await;
    assert!(plain.is_err() || plain.is_ok_and(|answer| answer.status != 200), "an answer without TLS");
    let with = |client: bool| {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(certificate.der().clone()).expect("a root");
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = rustls::ClientConfig::builder_with_provider(provider);
        let builder = builder.with_safe_default_protocol_versions().expect("versions").with_root_certificates(roots);
        let own = PrivateKeyDer::Pkcs8(key.serialize_der().into());
        let config = match client {
            true => builder.with_client_auth_cert(vec![certificate.der().clone()], own).expect("its key"),
            false => builder.with_no_client_auth(),
        };
        async move {
            let stream = TcpStream::connect(address).await?;
            let name = "localhost".try_into().expect("a name");
            let mut stream = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await?;
            stream.write_all(b"GET /ready HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await?;
            let mut text = String::new();
            stream.read_to_string(&mut text).await?;
            std::io::Result::Ok(text)
        }
    };
    assert!(with(true).await.expect("answered").ends_with("PRE_INITIALIZING\n"));
    assert!(with(false).await.is_err(), "a client without a certificate was served");
}

#[tokio::test]
async fn a_listener_for_some_networks_closes_on_everybody_else() {
    let port = port().await;
    let backend = free().await;
    let (elsewhere, here) = (free().await, free().await);
    let of = |bind, source: [u8; 4]| {
        let answer = PageAnswer::Backend { address: backend, rewrite: None, http2: false };
        PageListener { sources: vec![(source.into(), 8)], ..page(bind, PathMatch::Exact("/health".to_owned()), answer) }
    };
    let pages = vec![of(elsewhere, [10, 0, 0, 0]), of(here, [127, 0, 0, 0])];
    port.status.send_replace(Status { services: vec![service(pages)], ..Status::default() });
    assert_eq!(got(here, "/health").await.status, 503, "let in, and the backend is not there");
    let mut stream = TcpStream::connect(elsewhere).await.expect("it listens");
    let _ = stream.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n").await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    assert!(answer.is_empty(), "somebody of another network is answered");
}

/// A check may have a method, a body and headers of its own; what is of the asker's connection stays there.
#[tokio::test]
async fn a_request_passes_as_it_came() {
    let backend = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let behind = backend.local_addr().expect("bound");
    let serving = tokio::spawn(async move {
        let (mut stream, _) = backend.accept().await.expect("accepts");
        let mut asked = String::new();
        while !asked.ends_with("how are you") {
            let mut part = [0; 4096];
            let length = stream.read(&mut part).await.expect("reads");
            assert!(length > 0, "cut off: {asked}");
            asked.push_str(std::str::from_utf8(&part[..length]).expect("text"));
        }
        stream.write_all(b"HTTP/1.1 202 Accepted\r\ncontent-length: 4\r\n\r\nfine").await.expect("answers");
        asked.to_lowercase()
    });
    let address = free().await;
    let answer = PageAnswer::Backend { address: behind, rewrite: None, http2: false };
    let port = port().await;
    let health = page(address, PathMatch::Exact("/health".to_owned()), answer);
    port.status.send_replace(Status { services: vec![service(vec![health])], ..Status::default() });
    assert_eq!(got(address, "/").await.status, 404);
    let mut stream = TcpStream::connect(address).await.expect("it listens");
    // The target comes before Host, and what Connection names is of this connection.
    let head = "POST http://somebody@app.example/health?deep=1 HTTP/1.1\r\nhost: other.example\r\nx-check: 1\r\nte: trailers\r\n\
                x-hop: 1\r\ncontent-length: 11\r\nconnection: close, X-Hop\r\n\r\n";
    stream.write_all(format!("{head}how are you").as_bytes()).await.expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 202 ") && answer.ends_with("\r\n\r\nfine"), "{answer}");
    let asked = serving.await.expect("served");
    assert!(asked.starts_with("post /health?deep=1 http/1.1\r\n"), "{asked}");
    for kept in ["host: app.example\r\n", "x-check: 1\r\n", "content-length: 11\r\n"] {
        assert!(asked.contains(kept), "{kept}: {asked}");
    }
    for dropped in ["te: ", "connection: ", "x-hop", "somebody", "other.example"] {
        assert!(!asked.contains(dropped), "{dropped}: {asked}");
    }
}
