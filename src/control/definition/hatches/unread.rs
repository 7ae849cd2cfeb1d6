//! Without Envoy's protobufs no hatch can be read.

use super::{OF_PROXIES, OF_UPSTREAMS};
use crate::config::envoy::AccessLog;
use crate::control::definition::Public;
use crate::control::definition::upstream::Upstream;
use crate::control::opaque::Opaque;

pub(in super::super) fn of_public(config: &Opaque<'_>, _: &mut Public, _: &str, _: &mut Vec<AccessLog>) -> Result<(), String> {
    refuse(config, &OF_PROXIES, "proxy.config")
}

pub(in super::super) fn of_upstream(config: &Opaque<'_>, _: &mut Upstream, (_, place): (&str, &str)) -> Result<bool, String> {
    refuse(config, &OF_UPSTREAMS, place).map(|()| false)
}

fn refuse(config: &Opaque<'_>, keys: &[&str], place: &str) -> Result<(), String> {
    match keys.iter().find(|key| config.get(key).is_some()) {
        Some(key) => Err(format!("{place}.{key} cannot be read by a build without the feature xds; remove the key")),
        None => Ok(()),
    }
}
