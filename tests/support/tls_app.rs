//! An app outside of the mesh that speaks TLS itself: Python's `ssl`, which is OpenSSL and not ours. It echoes, asks for a client
//! certificate, and closes without close_notify, as many servers do.
#![allow(dead_code, unreachable_pub, missing_docs, missing_debug_implementations, reason = "a harness of tests")]

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::support::{PATIENCE, ports, scratch, tool_on_path, wait_until};

/// What it is asked for; any other server name is turned away.
pub const NAME: &str = "legacy.example.com";

const PROGRAM: &str = r#"
import socket, ssl, sys, threading
port, version, name, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
context.load_cert_chain(folder + "/server.pem", folder + "/server.key")
context.load_verify_locations(folder + "/ca.pem")
context.verify_mode = ssl.CERT_REQUIRED
context.sni_callback = lambda _, asked, __: None if asked == name else ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME

def serve(plain):
    try:
        with context.wrap_socket(plain, server_side=True) as stream:
            while said := stream.recv(1 << 16):
                stream.sendall(said)
    except OSError as error:
        print(error, file=sys.stderr)

listener = socket.create_server(("127.0.0.1", port))
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"#;

const CLIENT: &str = r#"
import socket, ssl, sys
port, version, ca, size = int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
context = ssl.create_default_context(cafile=ca)
context.check_hostname = False
context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
say = bytes(at * 7 % 251 for at in range(size))
with context.wrap_socket(socket.create_connection(("127.0.0.1", port), timeout=20), server_hostname="gateway.example.com") as stream:
    for at in range(0, size, 1 << 16):
        piece, heard = say[at:at + (1 << 16)], b""
        stream.sendall(piece)
        while len(heard) < len(piece) and (more := stream.recv(1 << 16)):
            heard += more
        assert heard == piece, f"{len(heard)} of {len(piece)} bytes came back after {at}, or others"
    print(stream.version())
"#;

/// A client outside of the mesh, Python's `ssl` too, that trusts `ca`: says so many bytes in this version of TLS and wants them
/// back. What it complained of, if it did.
pub fn call(at: SocketAddr, ca: &Path, version: &str, size: usize) -> Result<String, String> {
    let mut command = Command::new(tool_on_path("python3"));
    let arguments = [at.port().to_string(), version.to_owned(), ca.display().to_string(), size.to_string()];
    let done = command.arg("-c").arg(CLIENT).args(arguments).stdin(Stdio::null()).output().expect("python3 starts");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if done.status.success() { Ok(text(&done.stdout)) } else { Err(text(&done.stderr)) }
}

/// The certificates of both sides, as files.
pub struct Pki {
    folder: tempfile::TempDir,
}

impl Pki {
    /// A CA, a server for every host under `example.com`, and a client.
    pub fn new() -> Self {
        let folder = scratch();
        let key = rcgen::KeyPair::generate().expect("key");
        let mut params = rcgen::CertificateParams::default();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params.distinguished_name.push(rcgen::DnType::CommonName, "a CA of the office");
        let ca = params.self_signed(&key).expect("a CA");
        let issuer = rcgen::Issuer::new(params, key);
        let pki = Self { folder };
        pki.write("ca.pem", &ca.pem());
        for (name, host) in [("server", "*.example.com"), ("client", "gateway.example.com")] {
            let key = rcgen::KeyPair::generate().expect("key");
            let params = rcgen::CertificateParams::new([host.to_owned()]).expect("a host name");
            pki.write(&format!("{name}.pem"), &params.signed_by(&key, &issuer).expect("a certificate").pem());
            pki.write(&format!("{name}.key"), &key.serialize_pem());
        }
        pki
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).expect("a file");
    }

    fn folder(&self) -> &Path {
        self.folder.path()
    }
}

/// The running app; it ends when dropped.
pub struct TlsApp {
    pub address: SocketAddr,
    child: Child,
}

impl TlsApp {
    /// Speaks exactly this version: `TLSv1_2` or `TLSv1_3`.
    pub fn start(pki: &Pki, version: &str) -> Self {
        let address = ports::free_address();
        let mut command = Command::new(tool_on_path("python3"));
        command.arg("-c").arg(PROGRAM).args([&address.port().to_string(), version, NAME]).arg(pki.folder());
        let child = command.stdin(Stdio::null()).spawn().expect("python3 starts");
        wait_until("the app listens", PATIENCE, || std::net::TcpStream::connect(address).is_ok());
        Self { address, child }
    }
}

impl Drop for TlsApp {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
