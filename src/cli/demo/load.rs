//! Traffic while certificates rotate: long-lived connections that must all stay, and short ones that must all succeed.
//!
//! Invariant: nothing is retried and nothing reconnects, so a single lost byte or cut connection is a counted failure.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::database::Client;

/// Connections that live as long as the load.
pub(super) const LIVE_CONNECTIONS: usize = 16;
/// Pause between two short connections.
const SHORT_PAUSE: Duration = Duration::from_millis(5);
/// Pause between two questions on one live connection.
const QUESTION_PAUSE: Duration = Duration::from_millis(1);
/// Bound on one question and on one connect.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// Latencies kept; the load lasts seconds, so this is never reached.
const LATENCIES_MAX: usize = 1 << 20;
/// A question of about 100 bytes.
const QUESTION: &str = "select * from warehouse where dag = 'nightly' and task = 'load' and run = 'scheduled__2026-01-01' ;";

/// What the load saw.
#[derive(Debug, Default, Clone)]
pub(super) struct Figures {
    pub(super) live_connections: usize,
    pub(super) short_connections: usize,
    pub(super) requests: usize,
    /// Each with the reason.
    pub(super) failures: Vec<String>,
    latencies: Vec<Duration>,
}

/// Load under way.
#[derive(Debug)]
pub(super) struct Load {
    stop: watch::Sender<bool>,
    tasks: Vec<JoinHandle<Figures>>,
}

impl Load {
    /// Opens the live connections; when it returns, each of them has had an answer.
    pub(super) async fn start(upstream: SocketAddr) -> std::io::Result<Self> {
        let (stop, stopped) = watch::channel(false);
        let question: Arc<str> = QUESTION.into();
        let mut tasks = Vec::with_capacity(LIVE_CONNECTIONS + 1);
        for _ in 0..LIVE_CONNECTIONS {
            let mut client = bounded(Client::connect(upstream)).await?;
            bounded(client.ask(&question)).await?;
            tasks.push(tokio::spawn(live(client, Arc::clone(&question), stopped.clone())));
        }
        tasks.push(tokio::spawn(short(upstream, question, stopped)));
        Ok(Self { stop, tasks })
    }

    /// Ends the load and adds up.
    pub(super) async fn finish(self) -> Figures {
        self.stop.send_replace(true);
        let mut all = Figures::default();
        for task in self.tasks {
            match task.await {
                Ok(figures) => all.add(figures),
                Err(error) => all.failures.push(format!("a load task ended badly: {error}")),
            }
        }
        all.latencies.sort_unstable();
        all
    }
}

impl Figures {
    /// The latency that `per_mille` of all requests stayed within.
    pub(super) fn percentile(&self, per_mille: usize) -> Duration {
        let index = (self.latencies.len() * per_mille).div_ceil(1_000).saturating_sub(1);
        self.latencies.get(index).copied().unwrap_or_default()
    }

    fn add(&mut self, other: Self) {
        self.live_connections += other.live_connections;
        self.short_connections += other.short_connections;
        self.requests += other.requests;
        self.failures.extend(other.failures);
        let room = LATENCIES_MAX - self.latencies.len();
        self.latencies.extend(other.latencies.into_iter().take(room));
    }

    fn count(&mut self, latency: Duration) {
        self.requests += 1;
        if self.latencies.len() < LATENCIES_MAX {
            self.latencies.push(latency);
        }
    }
}

async fn live(mut client: Client, question: Arc<str>, stopped: watch::Receiver<bool>) -> Figures {
    let mut figures = Figures { live_connections: 1, ..Figures::default() };
    while !*stopped.borrow() {
        let asked = Instant::now();
        if let Err(error) = bounded(client.ask(&question)).await {
            figures.failures.push(format!("a live connection ended: {error}"));
            break;
        }
        figures.count(asked.elapsed());
        tokio::time::sleep(QUESTION_PAUSE).await;
    }
    figures
}

async fn short(upstream: SocketAddr, question: Arc<str>, stopped: watch::Receiver<bool>) -> Figures {
    let mut figures = Figures::default();
    while !*stopped.borrow() {
        figures.short_connections += 1;
        let once = async {
            let mut client = Client::connect(upstream).await?;
            client.ask(&question).await
        };
        match bounded(once).await {
            // Its latency holds a handshake and does not belong among those of requests.
            Ok(()) => figures.requests += 1,
            Err(error) => figures.failures.push(format!("a new connection failed: {error}")),
        }
        tokio::time::sleep(SHORT_PAUSE).await;
    }
    figures
}

async fn bounded<T>(work: impl Future<Output = std::io::Result<T>>) -> std::io::Result<T> {
    tokio::time::timeout(ANSWER_TIMEOUT, work)
        .await
        .unwrap_or_else(|_| Err(std::io::Error::new(std::io::ErrorKind::TimedOut, format!("nothing within {ANSWER_TIMEOUT:?}"))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::demo::database;
    use tokio::net::TcpListener;

    #[test]
    fn percentiles_are_of_the_sorted_latencies() {
        let latencies = (1..=1_000).map(Duration::from_micros).collect();
        let figures = Figures { latencies, ..Figures::default() };
        assert_eq!(figures.percentile(500), Duration::from_micros(500));
        assert_eq!(figures.percentile(990), Duration::from_micros(990));
        assert_eq!(figures.percentile(1_000), Duration::from_micros(1_000));
        assert_eq!(Figures::default().percentile(500), Duration::ZERO);
    }

    #[tokio::test]
    async fn load_counts_what_it_did_and_fails_nothing_on_a_good_server() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("free port");
        let address = listener.local_addr().expect("bound");
        tokio::spawn(database::serve(listener));
        let load = Load::start(address).await.expect("start");
        tokio::time::sleep(Duration::from_millis(100)).await;
        let figures = load.finish().await;
        assert_eq!(figures.failures, Vec::<String>::new());
        assert_eq!(figures.live_connections, LIVE_CONNECTIONS);
        assert!(figures.requests > LIVE_CONNECTIONS && figures.short_connections > 1, "{figures:?}");
    }

    #[tokio::test]
    async fn a_cut_connection_is_a_failure() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("free port");
        let address = listener.local_addr().expect("bound");
        let server = tokio::spawn(database::serve(listener));
        let mut client = Client::connect(address).await.expect("connect");
        client.ask("x").await.expect("served");
        let proxy = TcpListener::bind("127.0.0.1:0").await.expect("free port");
        let cut = Client::connect(proxy.local_addr().expect("bound")).await.expect("connect");
        drop(proxy.accept().await.expect("accept"));
        let (_keep, stopped) = watch::channel(false);
        let figures = live(cut, QUESTION.into(), stopped).await;
        assert_eq!((figures.requests, figures.failures.len()), (0, 1), "{figures:?}");
        server.abort();
    }
}
