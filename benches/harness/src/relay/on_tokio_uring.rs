//! The relay on tokio-uring, with rustls's buffered API where TLS is asked for.
//!
//! Invariant: only the sealing direction writes to the TLS socket after the handshake, so records never interleave; what the
//! opening direction makes rustls want to say goes out with the next record. A stream that ends without close_notify is a
//! truncation and cuts both sides.

use std::cell::RefCell;
use std::future::Future;
use std::io::{self, BufRead, ErrorKind, Write};
use std::net::{Shutdown, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use rustls::{ClientConnection, Connection, ServerConnection};
use tokio_uring::buf::BoundedBuf;
use tokio_uring::net::{TcpListener, TcpStream};

use crate::tls::{Tls, unused_name};

/// Read buffer of each direction.
const BUFFER_BYTES: usize = 64 * 1024;
/// Read buffer of a handshake. At most as much as rustls keeps of early plaintext, which is 16 KiB.
const HANDSHAKE_BYTES: usize = 8 * 1024;
const RING_ENTRIES: u32 = 4_096;
/// How long to wait after a failed accept, which is most often a lack of descriptors.
const ACCEPT_PAUSE_MS: u64 = 10;

/// Relays until the process is ended.
pub(crate) fn run(listener: std::net::TcpListener, to: SocketAddr, tls: Option<Tls>) -> anyhow::Result<()> {
    tokio_uring::builder().entries(RING_ENTRIES).start(async {
        let listener = TcpListener::from_std(listener);
        println!("ready");
        loop {
            match listener.accept().await {
                Ok((near, _)) => drop(tokio_uring::spawn(connection(near, to, tls.clone()))),
                Err(error) => {
                    eprintln!("accept: {error}. If descriptors ran out, raise `ulimit -n`.");
                    tokio::time::sleep(Duration::from_millis(ACCEPT_PAUSE_MS)).await;
                }
            }
        }
    })
}

async fn connection(near: TcpStream, to: SocketAddr, tls: Option<Tls>) {
    if let Err(error) = relay(near, to, tls).await {
        eprintln!("connection to {to} cut: {error}");
    }
}

async fn relay(near: TcpStream, to: SocketAddr, tls: Option<Tls>) -> io::Result<()> {
    near.set_nodelay(true)?;
    match tls {
        None => {
            let far = dial(to).await?;
            both(&near, &far, pump(&near, &far), pump(&far, &near)).await
        }
        Some(Tls::Accept(config)) => {
            let mut tls = Connection::from(ServerConnection::new(config).map_err(io::Error::other)?);
            handshake(&near, &mut tls).await?;
            let far = dial(to).await?;
            relay_tls(&near, &far, tls).await
        }
        Some(Tls::Dial(config)) => {
            let mut tls = Connection::from(ClientConnection::new(Arc::clone(&config), unused_name()).map_err(io::Error::other)?);
            let far = dial(to).await?;
            handshake(&far, &mut tls).await?;
            relay_tls(&far, &near, tls).await
        }
    }
}

async fn dial(to: SocketAddr) -> io::Result<TcpStream> {
    let far = TcpStream::connect(to).await?;
    far.set_nodelay(true)?;
    Ok(far)
}

/// Runs two directions to their ends. The first error ends both sockets, and with them the read that the kernel may hold.
async fn both(
    near: &TcpStream,
    far: &TcpStream,
    one: impl Future<Output = io::Result<()>>,
    other: impl Future<Output = io::Result<()>>,
) -> io::Result<()> {
    let cut_on_error = |result: io::Result<()>| {
        if result.is_err() {
            // Either may be gone already, which is as good.
            let _ = (near.shutdown(Shutdown::Both), far.shutdown(Shutdown::Both));
        }
        result
    };
    let (one, other) = tokio::join!(async { cut_on_error(one.await) }, async { cut_on_error(other.await) });
    one.and(other)
}

async fn pump(from: &TcpStream, to: &TcpStream) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let (result, returned) = from.read(buffer).await;
        let len = result?;
        if len == 0 {
            return to.shutdown(Shutdown::Write);
        }
        let (result, slice) = to.write_all(returned.slice(..len)).await;
        result?;
        buffer = slice.into_inner();
    }
}

async fn relay_tls(cipher: &TcpStream, plain: &TcpStream, mut tls: Connection) -> io::Result<()> {
    tls.set_buffer_limit(None);
    let tls = RefCell::new(tls);
    both(cipher, plain, open(&tls, cipher, plain), seal(&tls, plain, cipher)).await
}

async fn handshake(cipher: &TcpStream, tls: &mut Connection) -> io::Result<()> {
    let mut inbox = vec![0; HANDSHAKE_BYTES];
    let mut outbox = Vec::new();
    loop {
        outbox = flush(tls, cipher, outbox).await?;
        if !tls.is_handshaking() {
            return Ok(());
        }
        let (result, returned) = cipher.read(inbox).await;
        inbox = returned;
        let mut arrived = &inbox[..result?];
        if arrived.is_empty() {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        while !arrived.is_empty() {
            tls.read_tls(&mut arrived)?;
            if let Err(error) = tls.process_new_packets() {
                // The alert. If it cannot be sent the peer learns of the refusal by the end of the stream.
                let _ = flush(tls, cipher, outbox).await;
                return Err(io::Error::other(error));
            }
        }
    }
}

async fn flush(tls: &mut Connection, cipher: &TcpStream, mut outbox: Vec<u8>) -> io::Result<Vec<u8>> {
    take_records(tls, &mut outbox)?;
    let (result, outbox) = cipher.write_all(outbox).await;
    result?;
    Ok(outbox)
}

fn take_records(tls: &mut Connection, outbox: &mut Vec<u8>) -> io::Result<()> {
    outbox.clear();
    while tls.wants_write() {
        tls.write_tls(outbox)?;
    }
    Ok(())
}

/// Plain to TLS.
async fn seal(tls: &RefCell<Connection>, plain: &TcpStream, cipher: &TcpStream) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut outbox = Vec::new();
    loop {
        let (result, returned) = plain.read(buffer).await;
        buffer = returned;
        let len = result?;
        {
            let mut tls = tls.borrow_mut();
            if len == 0 {
                tls.send_close_notify();
            } else {
                tls.writer().write_all(&buffer[..len])?;
            }
            take_records(&mut tls, &mut outbox)?;
        }
        let (result, returned) = cipher.write_all(outbox).await;
        result?;
        outbox = returned;
        if len == 0 {
            return cipher.shutdown(Shutdown::Write);
        }
    }
}

/// TLS to plain.
async fn open(tls: &RefCell<Connection>, cipher: &TcpStream, plain: &TcpStream) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    // Data may have come together with the end of the handshake.
    let mut outbox = Vec::new();
    let mut is_over = take_plaintext(&mut tls.borrow_mut(), &mut outbox)?;
    loop {
        let (result, returned) = plain.write_all(outbox).await;
        result?;
        outbox = returned;
        if is_over {
            return plain.shutdown(Shutdown::Write);
        }
        let (result, returned) = cipher.read(buffer).await;
        buffer = returned;
        let mut arrived = &buffer[..result?];
        if arrived.is_empty() {
            return Err(io::Error::new(ErrorKind::UnexpectedEof, "the TLS stream ended without close_notify"));
        }
        outbox.clear();
        let mut tls = tls.borrow_mut();
        while !arrived.is_empty() && !is_over {
            tls.read_tls(&mut arrived)?;
            tls.process_new_packets().map_err(io::Error::other)?;
            is_over = take_plaintext(&mut tls, &mut outbox)?;
        }
    }
}

/// Appends what rustls has decrypted; true once the peer said that no more will come.
fn take_plaintext(tls: &mut Connection, outbox: &mut Vec<u8>) -> io::Result<bool> {
    let mut reader = tls.reader();
    loop {
        let len = match reader.fill_buf() {
            Ok([]) => return Ok(true),
            Ok(bytes) => {
                outbox.extend_from_slice(bytes);
                bytes.len()
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
            Err(error) => return Err(error),
        };
        reader.consume(len);
    }
}
