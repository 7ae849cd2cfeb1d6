//! The ACL token: where it comes from, when it is read again, who is told.
//!
//! Invariant: a token is replaced only by another one that could be read whole; a failed read or login keeps the old one.
//! It never reaches a log or `Debug`. Calls wait while a first login is under way, so none goes out without its token.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use hyper::header::HeaderValue;
use tokio::sync::{Notify, watch};
use zeroize::Zeroizing;

use super::client::Client;
use super::login;
use super::watch::{Context, Key};
use crate::config::TokenSource;
use crate::control::backoff::Backoff;

/// How often a token file's change is looked for.
const FILE_INTERVAL: Duration = Duration::from_secs(2);
/// Longest token file believed.
const FILE_BYTES_MAX: u64 = 64 << 10;
/// A suspected token leads to at most one new read in this time.
const SUSPECT_INTERVAL: Duration = Duration::from_millis(100);

/// A token that prints as nothing.
#[derive(Clone)]
pub(crate) struct Secret(Arc<Inner>);

struct Inner {
    text: Zeroizing<String>,
    header: HeaderValue,
}

/// The token in use, shared by every call.
#[derive(Debug)]
pub(crate) struct Token {
    state: watch::Sender<State>,
    wanted: Notify,
    suspected: AtomicBool,
}

/// What calls may send now.
#[derive(Debug, Clone)]
pub(crate) enum State {
    /// The first read or login has not succeeded yet.
    Pending,
    /// This token, or none at all.
    Ready(Option<Secret>),
}

impl Token {
    pub(crate) fn new(source: &TokenSource) -> Arc<Self> {
        let state = match source {
            TokenSource::None => State::Ready(None),
            TokenSource::Static(text) => State::Ready(Secret::new(text.clone()).ok()),
            TokenSource::File(_) | TokenSource::Login(_) => State::Pending,
        };
        Arc::new(Self { state: watch::Sender::new(state), wanted: Notify::new(), suspected: AtomicBool::new(false) })
    }

    /// The token to send; waits for the first one.
    pub(crate) async fn current(&self) -> Option<Secret> {
        let mut states = self.state.subscribe();
        loop {
            if let State::Ready(secret) = &*states.borrow_and_update() {
                return secret.clone();
            }
            if states.changed().await.is_err() {
                return None;
            }
        }
    }

    /// The token in use, if there is one now.
    pub(crate) fn now(&self) -> Option<Secret> {
        match &*self.state.borrow() {
            State::Ready(secret) => secret.clone(),
            State::Pending => None,
        }
    }

    /// Tells of each replacement.
    pub(crate) fn subscribe(&self) -> watch::Receiver<State> {
        self.state.subscribe()
    }

    /// The agent does not know `used`: read or log in again, unless it has been replaced meanwhile.
    pub(crate) fn suspect(&self, used: Option<&Secret>) {
        let current = self.now();
        if current.as_ref().map(Secret::text) != used.map(Secret::text) {
            return;
        }
        self.suspected.store(true, Ordering::Relaxed);
        self.wanted.notify_one();
    }

    /// The agent accepted it where rights are needed.
    pub(crate) fn accepted(&self) {
        self.suspected.store(false, Ordering::Relaxed);
    }

    /// Whether the agent refused the token in use.
    pub(crate) fn is_suspect(&self) -> bool {
        self.suspected.load(Ordering::Relaxed)
    }

    /// SIGHUP: read again.
    pub(crate) fn reload(&self) {
        self.wanted.notify_one();
    }

    pub(super) async fn wanted(&self) {
        self.wanted.notified().await;
    }

    /// Puts `secret` in force and tells every watch. True when it differs from the one before.
    pub(super) fn replace(&self, secret: Secret) -> bool {
        let changed = self.state.send_if_modified(|state| match state {
            State::Ready(Some(old)) if old.text() == secret.text() => false,
            _ => {
                *state = State::Ready(Some(secret));
                true
            }
        });
        if changed {
            self.suspected.store(false, Ordering::Relaxed);
        }
        changed
    }
}

impl Secret {
    /// Fails when the text cannot be a header's value.
    pub(crate) fn new(text: Zeroizing<String>) -> Result<Self, &'static str> {
        if text.is_empty() {
            return Err("it is empty");
        }
        let mut header = HeaderValue::from_str(&text).map_err(|_| "it holds characters that no token has")?;
        header.set_sensitive(true);
        Ok(Self(Arc::new(Inner { text, header })))
    }

    fn text(&self) -> &str {
        &self.0.text
    }

    pub(super) fn header(&self) -> HeaderValue {
        self.0.header.clone()
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("[redacted]")
    }
}

/// Keeps the token fresh for as long as the process runs. Ends at once when there is nothing to keep.
pub(crate) async fn keep(source: TokenSource, client: Client, cx: Context) {
    match source {
        TokenSource::None | TokenSource::Static(_) => {}
        TokenSource::File(path) => keep_file(&path, client.token(), &cx).await,
        TokenSource::Login(settings) => login::keep(&settings, &client, &cx).await,
    }
}

async fn keep_file(path: &Path, token: &Token, cx: &Context) {
    let mut seen = None;
    let mut backoff = Backoff::agent();
    loop {
        let stamp = stamp(path).await;
        if stamp != seen || stamp.is_none() || token.is_suspect() {
            match read_secret(path, "token file").await {
                Ok(secret) => {
                    if token.replace(secret) {
                        tracing::info!(file = %path.display(), "read the ACL token");
                    }
                    seen = stamp;
                    backoff.reset();
                    cx.recovered().await;
                }
                Err(text) => {
                    cx.trouble(text).await;
                    tokio::time::sleep(backoff.wait()).await;
                    continue;
                }
            }
        }
        tokio::select! {
            () = tokio::time::sleep(FILE_INTERVAL) => {}
            () = token.wanted() => {
                seen = None;
                tokio::time::sleep(SUSPECT_INTERVAL).await;
            }
        }
    }
}

/// What tells one version of a file from the next, through any symbolic link.
async fn stamp(path: &Path) -> Option<(SystemTime, u64, u64)> {
    use std::os::unix::fs::MetadataExt as _;
    let metadata = tokio::fs::metadata(path).await.ok()?;
    Some((metadata.modified().ok()?, metadata.len(), metadata.ino()))
}

/// Reads a file with one secret, trimmed.
pub(super) async fn read_secret(path: &Path, what: &str) -> Result<Secret, String> {
    let text = read_text(path.to_owned(), what).await?;
    Secret::new(text).map_err(|why| format!("{what} {}: {why}", path.display()))
}

pub(super) async fn read_text(path: PathBuf, what: &str) -> Result<Zeroizing<String>, String> {
    use tokio::io::AsyncReadExt as _;
    let fail = |error: std::io::Error| format!("{what} {}: {error}", path.display());
    let file = tokio::fs::File::open(&path).await.map_err(fail)?;
    let mut text = Zeroizing::new(String::with_capacity(4 << 10));
    file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text).await.map_err(fail)?;
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(format!("{what} {}: longer than {FILE_BYTES_MAX} bytes", path.display()));
    }
    Ok(Zeroizing::new(text.trim().to_owned()))
}

/// The key under which the keeper's troubles are shown.
pub(crate) const KEY: Key = Key::Token;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_never_prints() {
        let secret = Secret::new(Zeroizing::new("b1gs33cr3t".to_owned())).expect("valid");
        let token = Token::new(&TokenSource::Static(Zeroizing::new("b1gs33cr3t".to_owned())));
        assert!(!format!("{secret:?} {token:?} {:?}", secret.header()).contains("b1gs33cr3t"));
    }

    #[test]
    fn only_another_token_is_news() {
        let token = Token::new(&TokenSource::Static(Zeroizing::new("one".to_owned())));
        let mut news = token.subscribe();
        let secret = |text: &str| Secret::new(Zeroizing::new(text.to_owned())).expect("valid");
        token.suspect(Some(&secret("before")));
        assert!(!token.is_suspect(), "an answer to the token before says nothing of this one");
        token.suspect(Some(&secret("one")));
        assert!(!token.replace(secret("one")));
        assert!(token.is_suspect(), "the same token is as bad as before");
        assert!(token.replace(secret("two")) && !token.is_suspect());
        token.suspect(Some(&secret("two")));
        token.accepted();
        assert!(!token.is_suspect());
        assert!(news.has_changed().expect("open"));
        assert_eq!(token.now().expect("set").text(), "two");
        news.mark_unchanged();
    }

    #[tokio::test]
    async fn unusable_files_name_the_file() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("token");
        assert!(read_secret(&path, "token file").await.expect_err("missing").contains("token"));
        for (bytes, why) in [(&b" \n"[..], "empty"), (b"a\nb", "characters"), (&[b'a'; 70_000], "longer")] {
            std::fs::write(&path, bytes).expect("written");
            let error = read_secret(&path, "token file").await.expect_err("refused");
            assert!(error.contains(why), "{error}");
        }
        std::fs::write(&path, b"  s3cret\n").expect("written");
        assert_eq!(read_secret(&path, "token file").await.expect("read").text(), "s3cret");
    }
}
