//! JSON as Envoy's admin port prints it, and the few shapes of canonical proto JSON that are made here by hand.
//!
//! Invariant: readers of proto JSON take it: 64-bit numbers are strings, durations end in `s` with 0, 3, 6 or 9 digits after
//! the point, times are RFC 3339 in UTC, enums are names. One space of indentation, and `<` and `>` escaped, as from Envoy.

use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use axum::http::StatusCode;
use axum::response::Response;
use serde::Serialize;
use serde_json::ser::{PrettyFormatter, Serializer};
use serde_json::{Value, json};

use super::Rfc3339;
use super::routes::{self, JSON, TEXT};
use crate::mesh::{Address, Bind};

/// 200 with `value`, or 500 when it cannot be printed.
pub(super) fn answer(value: &Value) -> Response {
    match text(value) {
        Ok(body) => routes::answer(StatusCode::OK, JSON, body),
        Err(error) => routes::answer(StatusCode::INTERNAL_SERVER_ERROR, TEXT, format!("the answer could not be made: {error}\n")),
    }
}

/// `value` with Envoy's spacing and a line break at the end.
pub(super) fn text(value: &Value) -> serde_json::Result<Vec<u8>> {
    let mut plain = Vec::with_capacity(4096);
    value.serialize(&mut Serializer::with_formatter(&mut plain, PrettyFormatter::with_indent(b" ")))?;
    // These two stand in strings only, so each is escaped wherever it is.
    let mut escaped = Vec::with_capacity(plain.len() + 64);
    for byte in plain {
        match byte {
            b'<' => escaped.extend_from_slice(b"\\u003c"),
            b'>' => escaped.extend_from_slice(b"\\u003e"),
            byte => escaped.push(byte),
        }
    }
    escaped.push(b'\n');
    Ok(escaped)
}

/// `google.protobuf.Duration`.
pub(super) fn duration(duration: Duration) -> String {
    let (seconds, nanos) = (duration.as_secs(), duration.subsec_nanos());
    match nanos {
        0 => format!("{seconds}s"),
        _ if nanos % 1_000_000 == 0 => format!("{seconds}.{:03}s", nanos / 1_000_000),
        _ if nanos % 1_000 == 0 => format!("{seconds}.{:06}s", nanos / 1_000),
        _ => format!("{seconds}.{nanos:09}s"),
    }
}

/// `google.protobuf.Timestamp`, to the millisecond.
pub(super) fn time(at: SystemTime) -> String {
    Rfc3339(at).to_string()
}

/// `envoy.config.core.v3.Address` of a socket.
pub(super) fn socket(address: SocketAddr) -> Value {
    json!({"socket_address": {"address": address.ip().to_string(), "port_value": address.port()}})
}

/// `envoy.config.core.v3.Address` of what is dialed.
pub(super) fn address(address: &Address) -> Value {
    match address {
        Address::Tcp(address) => socket(*address),
        Address::Unix(path) => json!({"pipe": {"path": path.to_string_lossy()}}),
    }
}

/// `envoy.config.core.v3.Address` of a listener.
pub(super) fn bind(bind: &Bind) -> Value {
    match bind {
        Bind::Tcp(address) => socket(*address),
        Bind::Unix { path, mode: None } => json!({"pipe": {"path": path.to_string_lossy()}}),
        Bind::Unix { path, mode: Some(mode) } => json!({"pipe": {"path": path.to_string_lossy(), "mode": mode}}),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_canonical() {
        for (millis, wanted) in [(0, "0s"), (5_000, "5s"), (2_500, "2.500s"), (1, "0.001s")] {
            assert_eq!(duration(Duration::from_millis(millis)), wanted);
        }
        assert_eq!(duration(Duration::from_micros(1)), "0.000001s");
        assert_eq!(duration(Duration::from_nanos(7)), "0.000000007s");
    }

    #[test]
    fn the_text_is_envoys() {
        let text = text(&json!({"a": {"path": "<inline>"}, "b": []})).expect("prints");
        let wanted = "{\n \"a\": {\n  \"path\": \"\\u003cinline\\u003e\"\n },\n \"b\": []\n}\n";
        assert_eq!(String::from_utf8_lossy(&text), wanted);
    }
}
