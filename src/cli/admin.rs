//! The admin port of a running sidecar, asked by the commands that look at one.

use std::net::SocketAddr;

use serde_json::Value;

use super::http::{Answer, Http};
use crate::app::AppError;

/// One sidecar's admin port.
pub(super) struct Admin {
    address: SocketAddr,
    http: Http,
}

impl Admin {
    pub(super) fn at(address: SocketAddr) -> anyhow::Result<Self> {
        Ok(Self { address, http: Http::local(address)? })
    }

    /// Whatever it answers.
    pub(super) async fn get(&self, path: &str) -> anyhow::Result<Answer> {
        self.http.get(path).await.map_err(|error| {
            let text = format!(
                "admin port {error}; is `ringfence connect` running, and is {} its -admin-bind? -admin names another",
                self.address
            );
            AppError::Unavailable(text).into()
        })
    }

    /// Has it do something.
    pub(super) async fn post(&self, path: &str) -> anyhow::Result<()> {
        let answer = self.http.post(path, &Value::Null).await;
        let text = match answer {
            Ok(answer) if answer.is_ok() => return Ok(()),
            Ok(answer) => answer.text(),
            Err(error) => error.to_string(),
        };
        Err(AppError::Unavailable(format!("admin port {}: POST {path}: {text}", self.address)).into())
    }

    /// The JSON of an answer that must be there.
    pub(super) async fn json(&self, path: &str) -> anyhow::Result<Value> {
        let answer = self.get(path).await?;
        if answer.is_ok() {
            return Ok(answer.json());
        }
        let text = format!("admin port {}: {path}: {}; is it a ringfence of this version?", self.address, answer.text());
        Err(AppError::Unavailable(text).into())
    }
}
