//! Statsd and DogStatsD: what was counted since the last flush, what gauges say, and each duration.
//!
//! Invariant: a sink that is away costs a flush at most [`FLUSH_TIMEOUT`] on the task that flushes, and nothing else anything.
//! It is said once, when it goes away, and once when it is back. What could not be sent is lost, as datagrams are: a counter's
//! growth is sent once.
//!
//! Several lines go into one datagram, at most [`DATAGRAM_BYTES_MAX`]; both protocols allow it. Envoy sends each alone.

use std::fmt::Write;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::{TcpStream, UdpSocket, UnixDatagram};
use tokio::time::timeout;

use super::{Stat, Tagger, Value, text};
use crate::config::envoy::{StatAddress, StatDialect, StatSink};

/// Fits an Ethernet frame with IPv6 and tunnels to spare.
const DATAGRAM_BYTES_MAX: usize = 1_432;
/// One flush of one sink, connecting included.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// One duration that was measured, by the name of its stat.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Timing {
    /// Envoy's name.
    pub name: String,
    /// Whose, as in [`Stat::owner`].
    pub owner: usize,
    /// How long.
    pub millis: u64,
}

/// Where stats are sent.
#[derive(Debug)]
pub struct Sink {
    settings: StatSink,
    /// For DogStatsD.
    tagger: Option<Tagger>,
    link: Option<Link>,
    /// That it is away was said.
    told: bool,
}

#[derive(Debug)]
enum Link {
    Udp(UdpSocket),
    Unix(UnixDatagram),
    Tcp(TcpStream),
}

impl Sink {
    /// A sink that is not connected yet. DogStatsD wants a tagger.
    pub fn new(settings: StatSink, tagger: impl FnOnce() -> Tagger) -> Self {
        let tagger = (settings.dialect == StatDialect::DogStatsd).then(tagger);
        Self { settings, tagger, link: None, told: false }
    }

    /// The tagger, to tell it of owners.
    pub fn tagger(&mut self) -> Option<&mut Tagger> {
        self.tagger.as_mut()
    }

    /// Sends everything: of `stats` those that were used, whose counters say what was added since the last flush.
    pub async fn flush(&mut self, stats: &[Stat], timings: &[Timing]) {
        let lines = self.lines(stats, timings);
        if lines.is_empty() {
            return;
        }
        let sent = match timeout(FLUSH_TIMEOUT, self.send(&lines)).await {
            Ok(sent) => sent,
            Err(_) => Err(io::Error::from(io::ErrorKind::TimedOut)),
        };
        match sent {
            Ok(()) if std::mem::take(&mut self.told) => tracing::info!(sink = ?self.settings.address, "stats are sent again"),
            Ok(()) => {}
            Err(error) => {
                self.link = None;
                if !std::mem::replace(&mut self.told, true) {
                    tracing::warn!(
                        sink = ?self.settings.address,
                        %error,
                        remedy = "start what listens there, or correct the sink's address; each flush tries again",
                        "stats cannot be sent"
                    );
                }
            }
        }
    }

    fn lines(&mut self, stats: &[Stat], timings: &[Timing]) -> Vec<String> {
        let folded;
        let stats = if self.tagger.is_some() {
            stats
        } else {
            folded = text::fold(stats.to_vec());
            &folded
        };
        let timings = timings.iter().map(|timing| self.line(&timing.name, timing.owner, timing.millis, "ms")).collect::<Vec<_>>();
        let numbers = stats.iter().filter(|stat| stat.used).filter_map(|stat| match stat.value {
            Value::Counter(number) => Some(self.line(&stat.name, stat.owner, number, "c")),
            Value::Gauge(number) => Some(self.line(&stat.name, stat.owner, number, "g")),
            Value::Text(_) | Value::Histogram(_) => None,
        });
        let numbers: Vec<String> = numbers.collect();
        timings.into_iter().chain(numbers).collect()
    }

    fn line(&mut self, name: &str, owner: usize, number: u64, kind: &str) -> String {
        let prefix = &self.settings.prefix;
        match &mut self.tagger {
            None => {
                let name: String = name.chars().map(super::tags::statsd_letter).collect();
                format!("{prefix}.{name}:{number}|{kind}")
            }
            Some(tagger) => {
                let tagged = tagger.tag(name, owner);
                let mut line = format!("{prefix}.{}:{number}|{kind}", tagged.name);
                if !tagged.labels.is_empty() {
                    // Writing to a String cannot fail.
                    let _ = write!(line, "|#{}", tagged.labels);
                }
                line
            }
        }
    }

    async fn send(&mut self, lines: &[String]) -> io::Result<()> {
        let link = match &mut self.link {
            Some(link) => link,
            unset => unset.insert(Link::open(&self.settings.address).await?),
        };
        match link {
            Link::Tcp(stream) => {
                let mut text = lines.join("\n");
                text.push('\n');
                stream.write_all(text.as_bytes()).await
            }
            Link::Udp(socket) => {
                for datagram in datagrams(lines) {
                    socket.send(datagram.as_bytes()).await?;
                }
                Ok(())
            }
            Link::Unix(socket) => {
                for datagram in datagrams(lines) {
                    socket.send(datagram.as_bytes()).await?;
                }
                Ok(())
            }
        }
    }
}

impl Link {
    async fn open(address: &StatAddress) -> io::Result<Self> {
        Ok(match address {
            StatAddress::Udp(to) => {
                let any = if to.is_ipv4() { (Ipv4Addr::UNSPECIFIED, 0).into() } else { (Ipv6Addr::UNSPECIFIED, 0).into() };
                let socket = UdpSocket::bind::<SocketAddr>(any).await?;
                socket.connect(to).await?;
                Self::Udp(socket)
            }
            StatAddress::Unix(path) => {
                let socket = UnixDatagram::unbound()?;
                socket.connect(path)?;
                Self::Unix(socket)
            }
            StatAddress::Tcp(to) => Self::Tcp(TcpStream::connect(to).await?),
        })
    }
}

/// Lines put together; a line that is longer than a datagram should be goes alone.
fn datagrams(lines: &[String]) -> impl Iterator<Item = String> {
    let mut lines = lines.iter().peekable();
    std::iter::from_fn(move || {
        let mut datagram = lines.next()?.clone();
        while let Some(line) = lines.next_if(|line| datagram.len() + 1 + line.len() <= DATAGRAM_BYTES_MAX) {
            datagram.push('\n');
            datagram.push_str(line);
        }
        Some(datagram)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::stats::tags::Dialect;

    fn stat(name: &str, owner: usize, value: Value) -> Stat {
        Stat { name: name.to_owned(), owner, value, used: true }
    }

    fn sink(dialect: StatDialect, address: StatAddress) -> Sink {
        let tagger = || Tagger::new(Dialect::DogStatsd, &[], true).expect("Envoy's own tags");
        Sink::new(StatSink { dialect, address, prefix: "envoy".into() }, tagger)
    }

    fn stats() -> Vec<Stat> {
        let mut stats = vec![
            stat("cluster.local_app.up", 0, Value::Counter(2)),
            stat("cluster.local_app.up", 1, Value::Counter(3)),
            stat("server.live", 0, Value::Gauge(1)),
            stat("server.never", 0, Value::Counter(0)),
        ];
        stats[3].used = false;
        stats
    }

    const TIMING: (&str, u64) = ("listener.0.0.0.0_1.downstream_cx_length_ms", 7);

    fn timings() -> Vec<Timing> {
        vec![Timing { name: TIMING.0.into(), owner: 0, millis: TIMING.1 }]
    }

    async fn received(socket: &UdpSocket) -> String {
        let mut bytes = [0; 65_536];
        let length = timeout(Duration::from_secs(5), socket.recv(&mut bytes)).await.expect("in time").expect("received");
        String::from_utf8(bytes[..length].to_vec()).expect("text")
    }

    #[tokio::test]
    async fn both_dialects_arrive_over_udp_as_envoy_writes_them() {
        let socket = UdpSocket::bind("127.0.0.1:0").await.expect("a free port");
        let address = StatAddress::Udp(socket.local_addr().expect("bound"));
        sink(StatDialect::Statsd, address.clone()).flush(&stats(), &timings()).await;
        let statsd =
            "envoy.listener.0.0.0.0_1.downstream_cx_length_ms:7|ms\nenvoy.cluster.local_app.up:5|c\nenvoy.server.live:1|g";
        assert_eq!(received(&socket).await, statsd);
        sink(StatDialect::DogStatsd, address).flush(&stats(), &timings()).await;
        let lines = [
            "envoy.listener.downstream_cx_length_ms:7|ms|#envoy.listener_address:0.0.0.0_1",
            "envoy.cluster.up:2|c|#envoy.cluster_name:local_app",
            "envoy.cluster.up:3|c|#envoy.cluster_name:local_app",
            "envoy.server.live:1|g",
        ];
        assert_eq!(received(&socket).await, lines.join("\n"));
    }

    #[tokio::test]
    async fn a_sink_that_is_away_is_tried_again_and_found() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("statsd.sock");
        let mut sink = sink(StatDialect::Statsd, StatAddress::Unix(path.clone()));
        sink.flush(&stats(), &[]).await;
        assert!(sink.told && sink.link.is_none());
        let socket = UnixDatagram::bind(&path).expect("binds");
        sink.flush(&stats(), &[]).await;
        assert!(!sink.told);
        let mut bytes = [0; 4_096];
        let length = socket.recv(&mut bytes).await.expect("received");
        assert!(bytes[..length].starts_with(b"envoy.cluster.local_app.up:5|c\n"));
    }

    #[tokio::test]
    async fn a_stream_gets_whole_lines() {
        use tokio::io::AsyncReadExt;
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let mut sink = sink(StatDialect::Statsd, StatAddress::Tcp(listener.local_addr().expect("bound")));
        sink.flush(&stats(), &[]).await;
        drop(sink);
        let mut text = String::new();
        listener.accept().await.expect("connected").0.read_to_string(&mut text).await.expect("text");
        assert_eq!(text, "envoy.cluster.local_app.up:5|c\nenvoy.server.live:1|g\n");
    }

    #[test]
    fn datagrams_hold_many_lines_and_no_more_than_fit() {
        let lines: Vec<String> = (0..200).map(|index| format!("envoy.{index:060}:1|c")).collect();
        let sent: Vec<String> = datagrams(&lines).collect();
        assert!(sent.iter().all(|datagram| datagram.len() <= DATAGRAM_BYTES_MAX) && sent.len() < 12, "{}", sent.len());
        assert_eq!(sent.join("\n"), lines.join("\n"));
        assert_eq!(datagrams(&["x".repeat(5_000)]).next().expect("alone").len(), 5_000);
    }
}
