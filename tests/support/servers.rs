//! TCP servers that stand in for apps. Each runs on threads of the test and ends with it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// A server whose connections are each handled by a closure on a thread of their own.
pub struct Custom {
    pub address: SocketAddr,
    accepted: Arc<AtomicU64>,
    ended: Arc<AtomicBool>,
}

impl Custom {
    pub fn start(handle: impl Fn(TcpStream) + Send + Sync + 'static) -> Self {
        let listener = super::ports::listener();
        Self::serve(listener, handle)
    }

    /// Serves on an address that was chosen before.
    pub fn start_on(address: SocketAddr, handle: impl Fn(TcpStream) + Send + Sync + 'static) -> Self {
        Self::serve(TcpListener::bind(address).expect("the chosen address is free"), handle)
    }

    fn serve(listener: TcpListener, handle: impl Fn(TcpStream) + Send + Sync + 'static) -> Self {
        let address = listener.local_addr().expect("address of a listener");
        let (accepted, ended) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let handle = Arc::new(handle);
        let (count, stop) = (Arc::clone(&accepted), Arc::clone(&ended));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                let Ok(stream) = stream else { continue };
                count.fetch_add(1, Ordering::Relaxed);
                let handle = Arc::clone(&handle);
                let _ = stream.set_nodelay(true);
                std::thread::spawn(move || handle(stream));
            }
        });
        Self { address, accepted, ended }
    }

    /// Connections taken so far.
    pub fn accepted(&self) -> u64 {
        self.accepted.load(Ordering::Relaxed)
    }
}

impl Drop for Custom {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        // Wakes the accept; a listener that is gone needs no waking.
        let _ = TcpStream::connect(self.address);
    }
}

/// The end of a channel that a server's closure holds.
pub struct Reporter<T>(std::sync::Mutex<std::sync::mpsc::Sender<T>>);

/// What a server has seen, in order.
pub struct Reports<T>(std::sync::mpsc::Receiver<T>);

/// A way for a server's closure to tell the test what it saw.
pub fn reports<T>() -> (Reporter<T>, Reports<T>) {
    let (sender, receiver) = std::sync::mpsc::channel();
    (Reporter(std::sync::Mutex::new(sender)), Reports(receiver))
}

impl<T> Reporter<T> {
    pub fn send(&self, report: T) {
        // A test that has ended listens no more.
        let _ = self.0.lock().expect("no reporting thread panics").send(report);
    }
}

impl<T> Reports<T> {
    /// The next report; fails when none comes.
    pub fn next(&self) -> T {
        self.0.recv_timeout(super::PATIENCE).expect("the app's report")
    }
}

/// Sends everything back, and half-closes when the client has.
pub struct Echo;

impl Echo {
    pub fn start() -> Custom {
        Custom::start(echo)
    }

    pub fn start_on(address: SocketAddr) -> Custom {
        Custom::start_on(address, echo)
    }
}

fn echo(mut stream: TcpStream) {
    let mut buffer = vec![0; 65_536];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => break drop(stream.shutdown(Shutdown::Write)),
            Ok(length) if stream.write_all(&buffer[..length]).is_ok() => {}
            _ => break,
        }
    }
}

/// Says its name at once, then echoes: a protocol in which the server speaks first.
pub struct Banner;

impl Banner {
    pub fn start(name: &str) -> Custom {
        let line = format!("{name}\n");
        Custom::start(move |mut stream| {
            if stream.write_all(line.as_bytes()).is_ok() {
                echo(stream);
            }
        })
    }
}

/// HTTP enough for curl: GET gives `bytes` bytes, PUT takes any and answers with their SHA-256.
pub struct Blob {
    pub server: Custom,
    /// SHA-256 of what GET gives.
    pub sha256: String,
}

impl Blob {
    pub fn start(bytes: u64) -> Self {
        let block = Arc::new(super::bytes(7, 1 << 20));
        let mut hash = ring::digest::Context::new(&ring::digest::SHA256);
        for_each_piece(bytes, &block, |piece| hash.update(piece));
        let server = Custom::start(move |stream| drop(serve_blob(stream, bytes, &block)));
        Self { server, sha256: super::hex(hash.finish().as_ref()) }
    }
}

/// Cuts `bytes` bytes out of the block, each time at another offset so that a lost or doubled piece changes the hash.
fn for_each_piece(bytes: u64, block: &[u8], mut piece: impl FnMut(&[u8])) {
    let (mut left, mut turn) = (bytes, 0_usize);
    while left > 0 {
        let offset = turn * 4_099 % (block.len() / 2);
        let length = (block.len() / 2).min(usize::try_from(left).unwrap_or(usize::MAX));
        piece(&block[offset..offset + length]);
        left -= length as u64;
        turn += 1;
    }
}

fn serve_blob(mut stream: TcpStream, bytes: u64, block: &[u8]) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let (mut request, mut length) = (String::new(), 0);
    reader.read_line(&mut request)?;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? <= 2 {
            break;
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap_or(0);
        }
    }
    if request.starts_with("GET") {
        write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {bytes}\r\nConnection: close\r\n\r\n")?;
        let mut result = Ok(());
        for_each_piece(bytes, block, |piece| {
            if result.is_ok() {
                result = stream.write_all(piece);
            }
        });
        return result;
    }
    let mut hash = ring::digest::Context::new(&ring::digest::SHA256);
    let mut body = reader.take(length);
    let mut buffer = vec![0; 1 << 18];
    loop {
        match body.read(&mut buffer)? {
            0 => break,
            read => hash.update(&buffer[..read]),
        }
    }
    let answer = super::hex(hash.finish().as_ref());
    write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{answer}", answer.len())
}
