//! A token by auth method: log in, again at two thirds of its life, then log the old one out.
//!
//! Invariant: the old token is given back only after the new one is in force; a failed login keeps the old one. The bearer
//! token is read from its file each time, because it rotates too.

use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::client::{Auth, Client, Request};
use super::error::{AgentError, Endpoint};
use super::token::{Secret, read_text};
use super::watch::Context;
use super::wire;
use crate::config::Login;
use crate::control::backoff::Backoff;

/// How long the old token lives on after the switch, so that calls under way end with it.
const LOGOUT_DELAY: Duration = Duration::from_secs(2);
/// A token is renewed no faster than this, however short its life.
const RENEW_MIN: Duration = Duration::from_secs(5);
/// Waits between failed logins.
const RETRY: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));
/// Waits before a login because the agent does not know the token: it may only lag behind, and each login makes a token.
const AGAIN: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

#[derive(Serialize)]
struct Body<'a> {
    #[serde(rename = "AuthMethod")]
    method: &'a str,
    #[serde(rename = "BearerToken")]
    bearer: &'a str,
    #[serde(rename = "Meta")]
    meta: serde_json::Map<String, serde_json::Value>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    #[serde(rename = "SecretID")]
    secret_id: wire::Private,
    #[serde(default)]
    expiration_time: Option<String>,
}

/// Logs in and keeps logging in. Never ends.
pub(super) async fn keep(settings: &Login, client: &Client, cx: &Context) {
    let mut backoff = Backoff::new(RETRY.0, RETRY.1);
    let mut again = Backoff::new(AGAIN.0, AGAIN.1);
    loop {
        match log_in(settings, client).await {
            Ok((secret, expires)) => {
                backoff.reset();
                let suspect = client.token().is_suspect();
                let old = client.token().now();
                client.token().replace(secret);
                cx.recovered().await;
                tracing::info!(method = %settings.method, "logged in with the auth method");
                if let Some(old) = old.filter(|_| !suspect) {
                    tokio::time::sleep(LOGOUT_DELAY).await;
                    log_out_with(client, old).await;
                }
                let renew = expires.map(|at| renew_after(SystemTime::now(), at));
                tokio::select! {
                    () = sleep_or_never(renew) => again.reset(),
                    () = client.token().wanted() => tokio::time::sleep(again.wait()).await,
                }
            }
            Err(text) => {
                cx.trouble(text).await;
                tokio::time::sleep(backoff.wait()).await;
            }
        }
    }
}

/// Gives the token in use back, at the end of the process.
pub(crate) async fn log_out(client: &Client) {
    if let Some(secret) = client.token().now() {
        log_out_with(client, secret).await;
    }
}

async fn log_out_with(client: &Client, secret: Secret) {
    let mut request = Request::post(Endpoint::Logout, &["acl", "logout"], Vec::new());
    request.auth = Auth::With(secret);
    match client.call(&request).await {
        Ok(_) => tracing::info!("logged the old ACL token out"),
        // It is gone already, which is what was wanted.
        Err(AgentError::TokenUnknown { .. }) => {}
        Err(error) => tracing::warn!(%error, "could not log the old ACL token out; it ends by itself if the method limits it"),
    }
}

async fn log_in(settings: &Login, client: &Client) -> Result<(Secret, Option<SystemTime>), String> {
    let bearer = read_text(settings.bearer_token_file.clone(), "-login-bearer-token-file").await?;
    let meta = settings.meta.iter().map(|(name, value)| (name.clone(), value.clone().into())).collect();
    let body = Zeroizing::new(
        serde_json::to_vec(&Body { method: &settings.method, bearer: &bearer, meta }).map_err(|error| error.to_string())?,
    );
    let mut request = Request::post(Endpoint::Login, &["acl", "login"], body.to_vec());
    request.auth = Auth::Anonymous;
    let explain = |error: AgentError| format!("login with auth method `{}` failed: {error}", settings.method);
    let answer: Answer = client.call(&request).await.and_then(|response| response.json(Endpoint::Login)).map_err(explain)?;
    let secret =
        Secret::new(answer.secret_id.0).map_err(|why| format!("the agent answered the login with a token, but {why}"))?;
    Ok((secret, answer.expiration_time.as_deref().and_then(wire::rfc3339)))
}

/// Two thirds of what is left.
fn renew_after(now: SystemTime, expires: SystemTime) -> Duration {
    let left = expires.duration_since(now).unwrap_or_default();
    (left * 2 / 3).max(RENEW_MIN)
}

async fn sleep_or_never(after: Option<Duration>) {
    match after {
        Some(after) => tokio::time::sleep(after).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renewal_is_at_two_thirds_and_never_spins() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000);
        assert_eq!(renew_after(now, now + Duration::from_secs(60)), Duration::from_secs(40));
        assert_eq!(renew_after(now, now - Duration::from_secs(60)), RENEW_MIN);
    }
}
