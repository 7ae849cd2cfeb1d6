//! A database that answers every line with a row: something real behind the sidecar that `nc` can talk to as well.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

/// Connections served at once.
const CONNECTIONS_MAX: usize = 1_024;
/// The longest line it reads; a longer one ends the connection.
const LINE_BYTES_MAX: u64 = 4_096;

/// What every answer starts with.
pub(super) const ANSWER: &str = "row ";

/// Serves on `listener` until the runtime ends.
pub(super) async fn serve(listener: TcpListener) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                tokio::spawn(async move {
                    // A client that leaves in the middle is no concern of the database.
                    let _ = answer(stream).await;
                    drop(slot);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "the demo's database cannot accept");
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            }
        }
    }
}

async fn answer(stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut stream = BufReader::new(stream);
    let mut line = Vec::new();
    loop {
        line.clear();
        line.extend_from_slice(ANSWER.as_bytes());
        let read = (&mut stream).take(LINE_BYTES_MAX).read_until(b'\n', &mut line).await?;
        if read == 0 || line.last() != Some(&b'\n') {
            return Ok(());
        }
        stream.write_all(&line).await?;
    }
}

/// A client's connection to it, through the mesh or not.
#[derive(Debug)]
pub(super) struct Client {
    stream: BufReader<TcpStream>,
    line: Vec<u8>,
}

impl Client {
    pub(super) async fn connect(address: SocketAddr) -> std::io::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Self { stream: BufReader::new(stream), line: Vec::new() })
    }

    /// Asks one question (without a line break) and checks the answer.
    pub(super) async fn ask(&mut self, question: &str) -> std::io::Result<()> {
        self.line.clear();
        self.line.extend_from_slice(question.as_bytes());
        self.line.push(b'\n');
        self.stream.write_all(&self.line).await?;
        self.line.clear();
        (&mut self.stream).take(LINE_BYTES_MAX).read_until(b'\n', &mut self.line).await?;
        if self.line.is_empty() {
            return Err(std::io::Error::new(std::io::ErrorKind::UnexpectedEof, "the connection was closed without an answer"));
        }
        let wanted = self.line.strip_prefix(ANSWER.as_bytes()).and_then(|rest| rest.strip_suffix(b"\n"));
        if wanted != Some(question.as_bytes()) {
            return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, "the answer is not the one to this question"));
        }
        Ok(())
    }

    /// Waits until the other side ends the connection; true if it was a reset. Bytes that arrive are an error.
    pub(super) async fn wait_closed(&mut self) -> std::io::Result<bool> {
        match self.stream.read_u8().await {
            Ok(_) => Err(std::io::Error::new(std::io::ErrorKind::InvalidData, "bytes arrived where an end was expected")),
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Ok(false),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => Ok(true),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn started() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("free port");
        let address = listener.local_addr().expect("bound");
        tokio::spawn(serve(listener));
        address
    }

    #[tokio::test]
    async fn every_question_gets_its_own_answer() {
        let mut client = Client::connect(started().await).await.expect("connect");
        for question in ["select 1", "", "select 2"] {
            client.ask(question).await.expect(question);
        }
    }

    #[tokio::test]
    async fn an_endless_line_ends_the_connection() {
        let mut client = Client::connect(started().await).await.expect("connect");
        let endless = "x".repeat(64 * 1_024);
        assert!(client.ask(&endless).await.is_err());
    }

    #[tokio::test]
    async fn an_end_is_told_from_a_reset() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("free port");
        let address = listener.local_addr().expect("bound");
        let mut client = Client::connect(address).await.expect("connect");
        let (stream, _) = listener.accept().await.expect("accept");
        drop(stream);
        assert!(!client.wait_closed().await.expect("end"));
        let mut client = Client::connect(address).await.expect("connect");
        let (stream, _) = listener.accept().await.expect("accept");
        socket2::SockRef::from(&stream).set_linger(Some(std::time::Duration::ZERO)).expect("linger");
        drop(stream);
        assert!(client.wait_closed().await.expect("reset"));
    }
}
