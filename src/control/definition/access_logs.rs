//! `AccessLogs` of proxy-defaults, as the agent merges it into a registration. Consul before 1.15 has none.

use std::path::PathBuf;

use crate::config::LogTarget;
use crate::config::envoy::{AccessLog, AccessLogFormat};
use crate::control::consul::wire;
use crate::telemetry::log::check_access_log;

/// What Consul would have Envoy write: one log of connections, and one of those that no filter chain wanted.
pub(super) fn access_logs(wire: &wire::AccessLogs) -> Result<Vec<AccessLog>, String> {
    if !wire.enabled {
        return Ok(Vec::new());
    }
    let target = match wire.kind.as_str() {
        "" | "stdout" => LogTarget::Stdout,
        "stderr" => LogTarget::Stderr,
        "file" if wire.path.is_empty() => return Err("AccessLogs of Type `file` has no Path; set it".to_owned()),
        "file" => LogTarget::File(PathBuf::from(&wire.path)),
        other => return Err(format!("AccessLogs.Type `{}` is none of stdout, stderr and file", other.escape_default())),
    };
    let format = match (wire.json_format.as_str(), wire.text_format.as_str()) {
        ("", "") => AccessLogFormat::consul(),
        ("", text) => AccessLogFormat::Text(text.to_owned()),
        (json, _) => {
            let object = serde_json::from_str(json);
            AccessLogFormat::Json(object.map_err(|error| format!("AccessLogs.JSONFormat is no JSON object: {error}"))?)
        }
    };
    check_access_log(&format).map_err(|error| format!("AccessLogs: {error}"))?;
    let log = |unmatched_only| AccessLog { target: target.clone(), format: format.clone(), unmatched_only, only: None };
    let unmatched = (!wire.disable_listener_logs).then(|| log(true));
    Ok(std::iter::once(log(false)).chain(unmatched).collect())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn read(value: Value) -> Result<Vec<AccessLog>, String> {
        access_logs(&serde_json::from_value(value).expect("the shape is right"))
    }

    #[test]
    fn each_setting_becomes_what_consul_would_send_envoy() {
        assert_eq!(read(json!({})), Ok(Vec::new()));
        assert_eq!(read(json!({"Enabled": false, "Type": "nonsense"})), Ok(Vec::new()));
        let logs = read(json!({"Enabled": true, "JSONFormat": null})).expect("read");
        assert_eq!(logs.iter().map(|log| log.unmatched_only).collect::<Vec<_>>(), [false, true]);
        assert_eq!(logs[0].target, LogTarget::Stdout);
        assert_eq!(logs[0].format, AccessLogFormat::consul());
        let logs = read(
            json!({"Enabled": true, "DisableListenerLogs": true, "Type": "file", "Path": "/x", "TextFormat": "%DURATION%\n"}),
        );
        let file = AccessLog {
            target: LogTarget::File("/x".into()),
            format: AccessLogFormat::Text("%DURATION%\n".into()),
            unmatched_only: false,
            only: None,
        };
        assert_eq!(logs, Ok(vec![file]));
        let logs = read(json!({"Enabled": true, "Type": "stderr", "JSONFormat": "{\"a\":\"%UPSTREAM_HOST%\"}"})).expect("read");
        assert_eq!(logs[1].target, LogTarget::Stderr);
        assert!(matches!(&logs[1].format, AccessLogFormat::Json(map) if map["a"] == "%UPSTREAM_HOST%"));
    }

    #[test]
    fn what_cannot_be_honoured_is_named() {
        let refused = |value| read(value).expect_err("refused");
        assert!(refused(json!({"Enabled": true, "Type": "syslog"})).contains("syslog"));
        assert!(refused(json!({"Enabled": true, "Type": "file"})).contains("Path"));
        assert!(refused(json!({"Enabled": true, "JSONFormat": "[]"})).contains("JSONFormat"));
        assert!(refused(json!({"Enabled": true, "TextFormat": "%NOPE%"})).contains("NOPE"));
    }
}
