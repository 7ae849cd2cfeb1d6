//! The sidecar's registration socket, asked as anybody on this host may ask it.

use std::path::Path;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

use crate::app::AppError;

/// Where the rules file puts the socket when it says nothing.
pub(super) const SOCKET: &str = "/run/ringfence/airflow.sock";
/// Bound on one question with its answer, connecting included.
const QUESTION_TIME: Duration = Duration::from_secs(5);
/// The largest answer: an explanation names every rule of a file.
const ANSWER_BYTES_MAX: u64 = 8 << 20;

/// An open connection to it.
pub(super) struct Door {
    path: String,
    stream: BufReader<UnixStream>,
}

impl Door {
    pub(super) async fn open(path: &Path) -> anyhow::Result<Self> {
        let shown = path.display().to_string();
        let connecting = tokio::time::timeout(QUESTION_TIME, UnixStream::connect(path));
        match connecting.await.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into())) {
            Ok(stream) => Ok(Self { path: shown, stream: BufReader::new(stream) }),
            Err(error) => {
                let text = format!(
                    "registration socket {shown}: {error}; is `ringfence connect -airflow FILE` running here? -socket names another path"
                );
                Err(AppError::Unavailable(text).into())
            }
        }
    }

    /// The answer, when it is one: `ok` is true in it.
    pub(super) async fn ask(&mut self, question: &Value) -> anyhow::Result<Value> {
        let broken = |what: String| AppError::Unavailable(format!("registration socket {}: {what}", self.path));
        let line = tokio::time::timeout(QUESTION_TIME, exchange(&mut self.stream, question))
            .await
            .map_err(|_| broken(format!("no answer within {QUESTION_TIME:?}")))?
            .map_err(|error| broken(error.to_string()))?;
        let answer: Value =
            serde_json::from_slice(&line).map_err(|error| broken(format!("what answers there speaks no JSON: {error}")))?;
        if answer["ok"] == true {
            return Ok(answer);
        }
        let of = |key: &str| answer[key].as_str().unwrap_or("no reason given");
        Err(broken(format!("{}; {}", of("error"), of("remedy"))).into())
    }
}

/// One line there and one back.
async fn exchange(stream: &mut BufReader<UnixStream>, question: &Value) -> std::io::Result<Vec<u8>> {
    stream.write_all(format!("{question}\n").as_bytes()).await?;
    let mut line = Vec::new();
    stream.take(ANSWER_BYTES_MAX).read_until(b'\n', &mut line).await?;
    match line.last() {
        Some(b'\n') => Ok(line),
        _ => Err(std::io::Error::other("it hung up without a whole answer: too many connections of this user, or a long line")),
    }
}
