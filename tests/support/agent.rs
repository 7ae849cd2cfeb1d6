//! The embedded agent as a child: `ringfence agent`, intentions deny by default.

use std::net::SocketAddr;
use std::process::Command;

use serde_json::Value;

use super::http::Client;
use super::{Mesh, PATIENCE, Process, ports, wait_for};

pub struct Agent {
    address: SocketAddr,
    _process: Process,
}

impl Agent {
    pub fn start() -> Self {
        let address = ports::free_address();
        let mut command = Command::new(env!("CARGO_BIN_EXE_ringfence"));
        command.args(["agent", "-bind", &address.to_string(), "-default-policy", "deny"]);
        let mut process = Process::start("ringfence agent", &command);
        let client = Client::new(address, None);
        wait_for("the embedded agent answers", PATIENCE, || {
            process.assert_running();
            let answer = client.try_get("/v1/agent/connect/ca/roots")?;
            if answer.status == 200 { Ok(()) } else { Err(answer.body) }
        });
        Self { address, _process: process }
    }
}

impl Mesh for Agent {
    fn address(&self) -> SocketAddr {
        self.address
    }

    fn client(&self) -> Client {
        Client::new(self.address, None)
    }

    fn token(&self, _service: &str) -> Option<String> {
        None
    }

    fn rotate_ca(&self) {
        self.client().put("/v1/connect/ca/rotate", &Value::Null).ok("rotation of the CA");
    }
}
