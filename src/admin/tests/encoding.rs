//! Answers as gzip, for whoever takes it.

use super::*;

/// Head and body as they came, with `accept-encoding` as given.
async fn raw(port: &Port, request: &str, accepted: &str) -> (String, Vec<u8>) {
    let mut stream = TcpStream::connect(port.address).await.expect("connects");
    let text = format!("{request} HTTP/1.1\r\nhost: x\r\naccept-encoding: {accepted}\r\nconnection: close\r\n\r\n");
    stream.write_all(text.as_bytes()).await.expect("sends");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.expect("answers");
    let end = answer.windows(4).position(|part| part == b"\r\n\r\n").expect("a head");
    let head = String::from_utf8(answer[..end].to_vec()).expect("a head in ASCII").to_lowercase();
    let mut rest = &answer[end + 4..];
    if !head.contains("transfer-encoding: chunked") {
        return (head, rest.to_vec());
    }
    let mut body = Vec::new();
    while let Some(line) = rest.windows(2).position(|part| part == b"\r\n") {
        let size = std::str::from_utf8(&rest[..line]).expect("a size");
        let size = usize::from_str_radix(size, 16).expect("a size");
        body.extend_from_slice(&rest[line + 2..line + 2 + size]);
        rest = &rest[line + 4 + size..];
    }
    (head, body)
}

#[tokio::test]
async fn only_who_takes_gzip_gets_it_and_the_log_has_what_was_sent() {
    let folder = tempfile::tempdir().expect("folder");
    let access = folder.path().join("a.log");
    let settings = Settings { access_log: Destination::File(access.clone()), ..Settings::default() };
    let mut port = port_with(Destination::None, settings).await;
    let cases = [
        ("gzip", true),
        ("zstd, GZIP;q=0.5", true),
        ("deflate, br", false),
        ("*", false),
        ("identity;q=0", false),
        ("gzip;q=0, identity;q=0", false),
        ("gzip;q=much", false),
    ];
    let mut sent = Vec::new();
    for (accepted, is_gzip) in cases {
        for path in ["/help", "/stats/prometheus"] {
            let (head, body) = raw(&port, &format!("GET {path}"), accepted).await;
            assert!(head.starts_with("http/1.1 200 "), "{accepted}: {head}");
            assert_eq!(head.contains("content-encoding: gzip"), is_gzip, "{accepted}: {head}");
            assert_eq!(body.starts_with(&[0x1f, 0x8b]), is_gzip, "{accepted}");
            sent.push(format!("\"GET {path}\" 200 {} ", body.len()));
        }
        // What is asked for is done and said to be done, whatever is taken.
        assert!(raw(&port, "POST /healthcheck/ok", accepted).await.0.starts_with("http/1.1 200 "), "{accepted}");
    }
    assert!(raw(&port, "HEAD /help", "gzip").await.1.is_empty());
    sent.push("\"HEAD /help\" 200 0 ".to_owned());
    assert!(port.actions.try_recv().is_err());
    port.shutdown.send_replace(true);
    tokio::time::timeout(Duration::from_secs(5), port.running).await.expect("ends in time").expect("ends well");
    let access = std::fs::read_to_string(access).expect("access log");
    let told: Vec<&str> = access.lines().filter(|line| !line.contains("/healthcheck/")).collect();
    assert_eq!(told.len(), sent.len(), "{access}");
    for (line, sent) in told.iter().zip(&sent) {
        assert!(line.contains(sent), "{line} without {sent}");
    }
}
