//! Clients: one echo, a connection that stays, a stream of new connections, latencies.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use socket2::{Domain, Socket, Type};

/// Bound on any read or write of a test client.
const TIMEOUT: Duration = Duration::from_secs(20);

pub fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    // In one call that the kernel bounds: one that polls would also see the reset that may come right behind.
    socket.set_write_timeout(Some(TIMEOUT))?;
    socket.connect(&address.into())?;
    let stream = TcpStream::from(socket);
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    Ok(stream)
}

/// A whole connection: sends, half-closes, reads to the end, compares.
pub fn echo(address: SocketAddr, bytes: &[u8]) -> io::Result<()> {
    let mut stream = connect(address)?;
    let mut writer = stream.try_clone()?;
    let back = std::thread::scope(|scope| {
        let sending = scope.spawn(move || {
            writer.write_all(bytes)?;
            writer.shutdown(Shutdown::Write)
        });
        let mut back = Vec::with_capacity(bytes.len());
        let read = stream.read_to_end(&mut back);
        sending.join().expect("sending thread")?;
        read.map(|_| back)
    })?;
    if back == bytes { Ok(()) } else { Err(io::Error::other(format!("sent {} bytes, got {} back", bytes.len(), back.len()))) }
}

/// Sends and reads as much back, without a half-close (Consul's own proxy has none).
pub fn round_trip(address: SocketAddr, bytes: &[u8]) -> io::Result<()> {
    let mut stream = connect(address)?;
    let mut writer = stream.try_clone()?;
    let back = std::thread::scope(|scope| {
        let sending = scope.spawn(move || writer.write_all(bytes));
        let mut back = vec![0; bytes.len()];
        let read = stream.read_exact(&mut back);
        sending.join().expect("sending thread")?;
        read.map(|()| back)
    })?;
    if back == bytes { Ok(()) } else { Err(io::Error::other("other bytes came back")) }
}

/// How a connection ended for its reader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    Clean,
    Reset,
}

/// Reads to the end; fails on a timeout. Gives what came and how it ended.
pub fn read_to_end(mut stream: &TcpStream) -> (Vec<u8>, End) {
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        Ok(_) => (bytes, End::Clean),
        Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe) => (bytes, End::Reset),
        Err(error) => panic!("neither an end nor a reset after {} bytes: {error}", bytes.len()),
    }
}

/// Connects and reads to the end. A reset that overtakes the connect counts as one that follows it.
pub fn read_all(address: SocketAddr) -> (Vec<u8>, End) {
    match connect(address) {
        Ok(stream) => read_to_end(&stream),
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => (Vec::new(), End::Reset),
        Err(error) => panic!("connecting to {address}: {error}"),
    }
}

/// Closes with RST.
pub fn reset(stream: TcpStream) {
    socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).expect("SO_LINGER");
    drop(stream);
}

/// A connection that stays open, for an app that echoes.
pub struct Live {
    pub stream: TcpStream,
}

impl Live {
    pub fn open(address: SocketAddr) -> Self {
        let mut live = Self { stream: connect(address).expect("a live connection") };
        live.ping().expect("the live connection's first echo");
        live
    }

    /// One message there and back.
    pub fn ping(&mut self) -> io::Result<()> {
        self.stream.write_all(b"ping")?;
        let mut back = [0; 4];
        self.stream.read_exact(&mut back)?;
        if &back == b"ping" { Ok(()) } else { Err(io::Error::other("something else came back")) }
    }

    /// Waits until the far side ends the connection and tells how long that took; fails after `limit`.
    pub fn wait_cut(&mut self, limit: Duration) -> Duration {
        let start = Instant::now();
        self.stream.set_read_timeout(Some(limit)).expect("read timeout");
        match self.stream.read(&mut [0; 16]) {
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                panic!("the live connection was not cut within {limit:?}")
            }
            Ok(0) | Err(_) => start.elapsed(),
            Ok(length) => panic!("{length} bytes where an end was expected"),
        }
    }
}

/// New connections at a steady rate, each with one echo, from a few threads until stopped.
pub struct Load {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Report>>,
}

#[derive(Debug, Default)]
pub struct Report {
    pub ok: u64,
    pub failures: Vec<String>,
    pub latencies: Vec<Duration>,
}

/// Threads that open connections side by side, so that one slow answer does not stop the flow.
const LOAD_THREADS: u32 = 8;

impl Load {
    pub fn start(address: SocketAddr, connections_per_second: u32) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let gap = Duration::from_secs(1) * LOAD_THREADS / connections_per_second;
        let start = Instant::now();
        let run = |stop: Arc<AtomicBool>| {
            move || {
                let (mut report, mut next) = (Report::default(), Instant::now());
                while !stop.load(Ordering::Relaxed) {
                    let begun = Instant::now();
                    match echo(address, b"one of many") {
                        Ok(()) => {
                            report.ok += 1;
                            report.latencies.push(begun.elapsed());
                        }
                        Err(error) => report.failures.push(format!("{:?} after the start: {error}", start.elapsed())),
                    }
                    next += gap;
                    std::thread::sleep(next.saturating_duration_since(Instant::now()));
                }
                report
            }
        };
        let threads = (0..LOAD_THREADS).map(|_| std::thread::spawn(run(Arc::clone(&stop)))).collect();
        Self { stop, threads }
    }

    pub fn stop(mut self) -> Report {
        self.stop.store(true, Ordering::Relaxed);
        let mut total = Report::default();
        for thread in std::mem::take(&mut self.threads) {
            let report = thread.join().expect("load thread");
            total.ok += report.ok;
            total.failures.extend(report.failures);
            total.latencies.extend(report.latencies);
        }
        total.latencies.sort();
        total
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl Report {
    /// Fails unless every connection worked and there were at least `ok_min` of them.
    pub fn assert_flawless(&self, ok_min: u64) {
        let shown = self.failures.iter().take(5).cloned().collect::<Vec<_>>().join("\n  ");
        assert!(self.failures.is_empty(), "{} of {} connections failed:\n  {shown}", self.failures.len(), self.ok);
        assert!(self.ok >= ok_min, "only {} connections were made, at least {ok_min} were to be", self.ok);
        println!("{} connections, none failed, p50 {:?}, p99 {:?}", self.ok, self.percentile(50), self.percentile(99));
    }

    pub fn percentile(&self, percent: usize) -> Duration {
        let last = self.latencies.len().saturating_sub(1);
        self.latencies.get(last * percent / 100).copied().unwrap_or_default()
    }
}
