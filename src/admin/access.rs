//! The admin port's access log (`-admin-access-log-path`): one line a request.
//!
//! Invariant: a request cannot forge a line; what it sent is escaped. A log that cannot be opened is an error line, and the
//! port works without it: an operator needs it most when something else is wrong.

use std::fmt::Write;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use axum::body::{Body, HttpBody};
use axum::http::{HeaderMap, Method, Uri, header};
use bytes::Bytes;
use hyper::body::{Frame, SizeHint};

use super::Rfc3339;
use crate::telemetry::log::{Destination, Reopener, Spool};

/// Characters of a path or user agent that are printed.
const TEXT_CHARS_MAX: usize = 512;

/// Where requests are written down.
#[derive(Debug)]
pub(super) struct AccessLog {
    spool: Option<Spool>,
}

/// What is written of one request.
#[derive(Debug)]
pub(super) struct Request {
    method: Method,
    path: String,
    agent: String,
    peer: SocketAddr,
    at: SystemTime,
}

impl Request {
    /// Takes down what is needed later.
    pub(super) fn new(method: &Method, uri: &Uri, headers: &HeaderMap, peer: SocketAddr) -> Self {
        let agent = headers.get(header::USER_AGENT).map_or(&b"-"[..], |value| value.as_bytes());
        Self {
            method: method.clone(),
            path: escape(uri.path_and_query().map_or("/", |path| path.as_str()).as_bytes()),
            agent: escape(agent),
            peer,
            at: SystemTime::now(),
        }
    }
}

impl AccessLog {
    /// Opens it, or goes without.
    pub(super) fn open(destination: &Destination, reopener: &Reopener) -> Self {
        let spool = Spool::open(destination, reopener)
            .inspect_err(|error| tracing::error!(%error, "the admin port has no access log"))
            .ok()
            .filter(Spool::is_on);
        Self { spool }
    }

    /// Whether requests are written down at all.
    pub(super) fn is_on(&self) -> bool {
        self.spool.is_some()
    }

    /// Writes one request down.
    pub(super) fn record(&mut self, request: &Request, status: u16, bytes: u64, took: Duration) {
        let Some(spool) = &mut self.spool else { return };
        let Request { method, path, agent, peer, at } = request;
        let mut line = String::with_capacity(160);
        let took_ms = took.as_millis();
        // Writing to a String cannot fail.
        let _ = write!(line, "[{}] \"{method} {path}\" {status} {bytes} {took_ms} \"{peer}\" \"{agent}\"", Rfc3339(*at));
        spool.push(line.as_bytes());
    }

    /// Hands lines to the writer.
    pub(super) fn flush(&mut self) {
        if let Some(spool) = &mut self.spool {
            spool.flush();
        }
    }
}

/// A body that tells how much of it was taken, at its end or when its client is gone.
pub(super) struct Counted {
    body: Body,
    bytes: u64,
    ended: Option<Box<dyn FnOnce(u64) + Send>>,
}

impl Counted {
    pub(super) fn new(body: Body, ended: impl FnOnce(u64) + Send + 'static) -> Self {
        Self { body, bytes: 0, ended: Some(Box::new(ended)) }
    }
}

impl HttpBody for Counted {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = std::task::ready!(Pin::new(&mut self.body).poll_frame(cx));
        if let Some(Ok(frame)) = &frame {
            self.bytes += frame.data_ref().map_or(0, |data| data.len() as u64);
        }
        Poll::Ready(frame)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        if let Some(ended) = self.ended.take() {
            ended(self.bytes);
        }
    }
}

fn escape(bytes: &[u8]) -> String {
    bytes.iter().take(TEXT_CHARS_MAX).flat_map(|byte| std::ascii::escape_default(*byte)).map(char::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_one_line_that_it_cannot_forge() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("access.log");
        let mut log = AccessLog::open(&Destination::File(path.clone()), &Reopener::default());
        let mut headers = HeaderMap::new();
        headers.insert(header::USER_AGENT, "a\" 200 \t\\x".parse().expect("allowed in a header"));
        let request = Request {
            at: SystemTime::UNIX_EPOCH,
            ..Request::new(&Method::GET, &Uri::from_static("/ready?x=1"), &headers, ([127, 0, 0, 1], 7).into())
        };
        log.record(&request, 503, 13, Duration::from_millis(2));
        log.flush();
        drop(log);
        assert_eq!(
            std::fs::read_to_string(path).expect("written"),
            "[1970-01-01T00:00:00.000Z] \"GET /ready?x=1\" 503 13 2 \"127.0.0.1:7\" \"a\\\" 200 \\t\\\\x\"\n"
        );
    }

    #[test]
    fn a_log_that_cannot_be_opened_is_no_failure() {
        let log = AccessLog::open(&Destination::File("/nonexistent/folder/a.log".into()), &Reopener::default());
        assert!(!log.is_on());
    }
}
