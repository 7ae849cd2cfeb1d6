//! `connect { sidecar_service {} }`: the sidecar that Consul makes of it, with Consul's defaults.
//!
//! Invariant: a sidecar keeps its port over re-registrations, and no two services share an automatic one. Pure.

use super::{SIDECAR_PORTS, State};
use crate::agent::AgentError;
use crate::agent::definition::{CheckDefinition, Definition, Proxy};

impl State {
    /// Fills `sidecar_service {}` with Consul's defaults.
    pub(super) fn expand_sidecar(&self, parent: &Definition, mut sidecar: Definition) -> Result<Definition, AgentError> {
        sidecar.settle();
        sidecar.id = format!("{}-sidecar-proxy", parent.id);
        if sidecar.name.is_empty() {
            sidecar.name = format!("{}-sidecar-proxy", parent.name);
        }
        sidecar.kind = "connect-proxy".to_owned();
        if sidecar.address.is_empty() {
            sidecar.address.clone_from(&parent.address);
        }
        if sidecar.tags.is_empty() {
            sidecar.tags.clone_from(&parent.tags);
        }
        if sidecar.meta.is_empty() {
            sidecar.meta.clone_from(&parent.meta);
        }
        if sidecar.tagged_addresses.is_empty() {
            sidecar.tagged_addresses = parent.tagged_addresses.clone();
            sidecar.tagged_addresses.values_mut().for_each(|address| address.port = sidecar.port);
        }
        if sidecar.port == 0 {
            sidecar.port = self.sidecar_port(&sidecar.id)?;
        }
        let proxy = sidecar.proxy.get_or_insert_default();
        proxy.destination_service_name.clone_from(&parent.name);
        proxy.destination_service_id.clone_from(&parent.id);
        local_app(proxy, parent);
        if sidecar.checks.is_empty() {
            let host = if sidecar.address.is_empty() { &proxy.local_service_address } else { &sidecar.address };
            let target =
                if host.contains(':') { format!("[{host}]:{}", sidecar.port) } else { format!("{host}:{}", sidecar.port) };
            sidecar.checks = vec![
                CheckDefinition::tcp("Connect Sidecar Listening", target, self.settings.check_interval),
                CheckDefinition::alias(&parent.id),
            ];
        }
        Ok(sidecar)
    }

    /// The port that the sidecar `id` has, or the first free one.
    fn sidecar_port(&self, id: &str) -> Result<u16, AgentError> {
        if let Some(port) =
            self.services.get(id).map(|service| service.definition.port).filter(|port| SIDECAR_PORTS.contains(port))
        {
            return Ok(port);
        }
        SIDECAR_PORTS
            .into_iter()
            .find(|port| self.services.values().all(|service| service.definition.port != *port))
            .ok_or_else(|| AgentError::Full { what: "automatic sidecar ports (21000 to 21255)", most: SIDECAR_PORTS.len() })
    }
}

/// Where the app behind a sidecar listens, unless the sidecar says so itself.
fn local_app(proxy: &mut Proxy, parent: &Definition) {
    if proxy.local_service_address.is_empty() {
        proxy.local_service_address = "127.0.0.1".to_owned();
    }
    if proxy.local_service_socket_path.is_empty() {
        proxy.local_service_socket_path.clone_from(&parent.socket_path);
    }
    if proxy.local_service_port == 0 && proxy.local_service_socket_path.is_empty() {
        proxy.local_service_port = parent.port;
    }
}
