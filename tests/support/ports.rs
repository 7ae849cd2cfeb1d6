//! Ports below 32768 (the kernel's own range starts there) that no other test process takes meanwhile.
//!
//! Each port has a lock file; the lock lives as long as this process, so a port is never handed out twice.

use std::fs::File;
use std::net::{SocketAddr, TcpListener};

/// Consul hands out 21000 to 21755 by itself.
const RANGES: [std::ops::Range<u16>; 2] = [12_000..21_000, 21_800..32_000];

/// A free port.
pub fn free() -> u16 {
    use rand::Rng;
    let user = std::env::var("USER").unwrap_or_else(|_| "nobody".to_owned());
    let folder = std::env::temp_dir().join(format!("ringfence-ports-{user}"));
    std::fs::create_dir_all(&folder).expect("folder of port locks");
    for _ in 0..10_000 {
        let port = rand::rng().random_range(RANGES[rand::rng().random_range(0..RANGES.len())].clone());
        let lock = File::create(folder.join(port.to_string())).expect("port lock file");
        if lock.try_lock().is_err() {
            continue;
        }
        if TcpListener::bind(("0.0.0.0", port)).is_ok() && std::net::UdpSocket::bind(("127.0.0.1", port)).is_ok() {
            Box::leak(Box::new(lock)); // held until the process ends
            return port;
        }
    }
    panic!("no free port between 12000 and 32000");
}

/// A free loopback address.
pub fn free_address() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], free()))
}

/// A listener on a free loopback port, for servers inside the test.
pub fn listener() -> TcpListener {
    for _ in 0..20 {
        if let Ok(listener) = TcpListener::bind(free_address()) {
            return listener;
        }
    }
    panic!("20 free ports in a row could not be bound");
}
