//! A listener's or a filter's `access_log`, as the access logs of this process.
//!
//! Invariant: what this process would write differently is refused with its name; the formats are checked, so that a log
//! that was acknowledged can be opened. Pure.

use std::path::PathBuf;

use envoy_types::pb::envoy::config::accesslog::v3::access_log::ConfigType;
use envoy_types::pb::envoy::config::accesslog::v3::access_log_filter::FilterSpecifier;
use envoy_types::pb::envoy::config::accesslog::v3::{AccessLog as Wire, AccessLogFilter};
use envoy_types::pb::envoy::config::core::v3::data_source::Specifier;
use envoy_types::pb::envoy::config::core::v3::substitution_format_string::Format;
use envoy_types::pb::envoy::config::core::v3::{DataSource, SubstitutionFormatString};
use envoy_types::pb::envoy::extensions::access_loggers::file::v3::{FileAccessLog, file_access_log};
use envoy_types::pb::envoy::extensions::access_loggers::stream::v3::{
    StderrAccessLog, StdoutAccessLog, stderr_access_log, stdout_access_log,
};
use envoy_types::pb::google::protobuf::value::Kind;
use envoy_types::pb::google::protobuf::{Struct, Value};
use prost::{Message, Name};
use serde_json::{Map, Value as Json};

use crate::config::LogTarget;
use crate::config::envoy::{AccessLog, AccessLogFormat};
use crate::telemetry::log::check_access_log;

/// Access logs of one listener or filter that are believed.
const ACCESS_LOGS_MAX: usize = 16;

/// All of a list, or why it must be refused.
pub fn access_logs(list: &[Wire]) -> Result<Vec<AccessLog>, String> {
    if list.len() > ACCESS_LOGS_MAX {
        return Err(format!("access_log has {} entries, the limit is {ACCESS_LOGS_MAX}", list.len()));
    }
    list.iter()
        .map(|wire| access_log(wire).map_err(|why| format!("access_log `{}`: {why}", wire.name.escape_default())))
        .collect()
}

fn access_log(wire: &Wire) -> Result<AccessLog, String> {
    let unmatched_only = wire.filter.as_ref().map(unmatched_only).transpose()?.unwrap_or(false);
    let Some(ConfigType::TypedConfig(config)) = &wire.config_type else { return Err("it has no typed_config".to_owned()) };
    let malformed = |error: prost::DecodeError| format!("{} does not decode: {error}", config.type_url);
    let bytes = config.value.as_slice();
    let kind = config.type_url.rsplit('/').next().unwrap_or_default();
    let (target, format) = if kind == FileAccessLog::full_name() {
        let file = FileAccessLog::decode(bytes).map_err(malformed)?;
        (file_target(&file.path)?, file.access_log_format.map(file_format).transpose()?)
    } else if kind == StdoutAccessLog::full_name() {
        let stdout = StdoutAccessLog::decode(bytes).map_err(malformed)?;
        let format = stdout.access_log_format.map(|stdout_access_log::AccessLogFormat::LogFormat(format)| format);
        (LogTarget::Stdout, format.map(substitution).transpose()?)
    } else if kind == StderrAccessLog::full_name() {
        let stderr = StderrAccessLog::decode(bytes).map_err(malformed)?;
        let format = stderr.access_log_format.map(|stderr_access_log::AccessLogFormat::LogFormat(format)| format);
        (LogTarget::Stderr, format.map(substitution).transpose()?)
    } else {
        return Err(format!("{kind} is not supported; use a file, stdout or stderr"));
    };
    let format = format.unwrap_or(AccessLogFormat::Default);
    check_access_log(&format).map_err(|error| error.to_string())?;
    Ok(AccessLog { target, format, unmatched_only, only: None })
}

/// Consul's one filter: connections that no filter chain wanted.
fn unmatched_only(filter: &AccessLogFilter) -> Result<bool, String> {
    match &filter.filter_specifier {
        None => Ok(false),
        Some(FilterSpecifier::ResponseFlagFilter(filter)) if filter.flags == ["NR"] => Ok(true),
        Some(FilterSpecifier::ResponseFlagFilter(filter)) => {
            Err(format!("response_flag_filter {:?} is not supported; only [\"NR\"] is", filter.flags))
        }
        Some(_) => Err("its filter is not supported; only a response_flag_filter with NR is".to_owned()),
    }
}

/// Envoy opens the device paths; here they are the streams that they name.
fn file_target(path: &str) -> Result<LogTarget, String> {
    Ok(match path {
        "" => return Err("it has no path".to_owned()),
        "/dev/null" => LogTarget::None,
        "/dev/stdout" | "/dev/fd/1" => LogTarget::Stdout,
        "/dev/stderr" | "/dev/fd/2" => LogTarget::Stderr,
        path => LogTarget::File(PathBuf::from(path)),
    })
}

fn file_format(format: file_access_log::AccessLogFormat) -> Result<AccessLogFormat, String> {
    #[allow(deprecated, reason = "older Consuls and escape hatches send them")]
    match format {
        file_access_log::AccessLogFormat::Format(text) => Ok(AccessLogFormat::Text(text)),
        file_access_log::AccessLogFormat::JsonFormat(json) | file_access_log::AccessLogFormat::TypedJsonFormat(json) => {
            Ok(AccessLogFormat::Json(object(json)))
        }
        file_access_log::AccessLogFormat::LogFormat(format) => substitution(format),
    }
}

fn substitution(format: SubstitutionFormatString) -> Result<AccessLogFormat, String> {
    if format.omit_empty_values {
        return Err("omit_empty_values is not supported; remove it".to_owned());
    }
    if let Some(formatter) = format.formatters.first() {
        return Err(format!("formatter `{}` is not supported; remove it", formatter.name.escape_default()));
    }
    #[allow(deprecated, reason = "Consul sends text_format")]
    match format.format {
        None => Ok(AccessLogFormat::Default),
        Some(Format::TextFormat(text)) => Ok(AccessLogFormat::Text(text)),
        Some(Format::TextFormatSource(source)) => source_text(source).map(AccessLogFormat::Text),
        Some(Format::JsonFormat(json)) => Ok(AccessLogFormat::Json(object(json))),
    }
}

fn source_text(source: DataSource) -> Result<String, String> {
    match source.specifier {
        Some(Specifier::InlineString(text)) => Ok(text),
        Some(Specifier::InlineBytes(bytes)) => {
            String::from_utf8(bytes).map_err(|_| "text_format_source.inline_bytes is no UTF-8".to_owned())
        }
        _ => Err("text_format_source must be inline".to_owned()),
    }
}

fn object(json: Struct) -> Map<String, Json> {
    json.fields.into_iter().map(|(key, value)| (key, any(value))).collect()
}

fn any(value: Value) -> Json {
    match value.kind {
        None | Some(Kind::NullValue(_)) => Json::Null,
        Some(Kind::BoolValue(value)) => Json::Bool(value),
        Some(Kind::StringValue(text)) => Json::String(text),
        Some(Kind::StructValue(json)) => Json::Object(object(json)),
        Some(Kind::ListValue(list)) => Json::Array(list.values.into_iter().map(any).collect()),
        Some(Kind::NumberValue(number)) => whole(number).map_or_else(|| number.into(), Json::from),
    }
}

/// Protobuf's numbers are all doubles: one that is whole is printed so.
#[allow(clippy::cast_possible_truncation, reason = "within the doubles that hold every integer exactly")]
fn whole(number: f64) -> Option<i64> {
    const EXACT: f64 = (1_i64 << 53) as f64;
    (number.fract() == 0.0 && number.abs() <= EXACT).then_some(number as i64)
}

#[cfg(test)]
mod tests {
    use envoy_types::pb::google::protobuf::Any;
    use serde_json::json;

    use super::*;
    use crate::control::xds::proto_json::Protos;

    const STDOUT: &str = "type.googleapis.com/envoy.extensions.access_loggers.stream.v3.StdoutAccessLog";
    const STDERR: &str = "type.googleapis.com/envoy.extensions.access_loggers.stream.v3.StderrAccessLog";
    const FILE: &str = "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog";

    fn read(value: Json) -> Result<AccessLog, String> {
        let wire: Wire = Protos::load().decode(&value).expect("an access log");
        access_logs(&[wire]).map(|mut logs| logs.remove(0))
    }

    #[test]
    fn what_consul_sends_is_understood() {
        // Consul's own: text_format and json_format, with the filter on the listener's log.
        let log = read(json!({
            "name": "Consul Listener Filter Log",
            "filter": {"response_flag_filter": {"flags": ["NR"]}},
            "typed_config": {"@type": STDOUT, "log_format": {"json_format": {"b": "%DURATION%", "n": {"one": 1, "half": 0.5}}}},
        }))
        .expect("read");
        assert!(log.unmatched_only);
        assert_eq!(log.target, LogTarget::Stdout);
        let AccessLogFormat::Json(map) = log.format else { panic!("no JSON: {:?}", log.format) };
        assert_eq!(Json::Object(map), json!({"b": "%DURATION%", "n": {"one": 1, "half": 0.5}}));
        let log = read(json!({
            "name": "x",
            "typed_config": {"@type": FILE, "path": "/var/log/x", "log_format": {"text_format": "%DURATION%\n"}},
        }));
        let target = LogTarget::File("/var/log/x".into());
        assert_eq!(
            log,
            Ok(AccessLog { target, format: AccessLogFormat::Text("%DURATION%\n".into()), unmatched_only: false, only: None })
        );
        let log = read(json!({"name": "x", "typed_config": {"@type": STDERR, "log_format":
            {"text_format_source": {"inline_string": "%BYTES_SENT%"}}}}));
        assert_eq!(log.map(|log| log.format), Ok(AccessLogFormat::Text("%BYTES_SENT%".into())));
        let log = read(json!({"name": "x", "typed_config": {"@type": FILE, "path": "/dev/stdout"}}));
        assert_eq!(log.map(|log| (log.target, log.format)), Ok((LogTarget::Stdout, AccessLogFormat::Default)));
    }

    #[test]
    fn what_would_be_written_differently_is_named() {
        let refused = |value| read(value).expect_err("refused");
        let with = |format: Json| json!({"name": "mine", "typed_config": {"@type": STDOUT, "log_format": format}});
        let error = refused(with(json!({"text_format": "%NOPE%"})));
        assert!(error.contains("mine") && error.contains("NOPE"), "{error}");
        assert!(refused(with(json!({"omit_empty_values": true, "text_format": "x"}))).contains("omit_empty_values"));
        assert!(refused(with(json!({"text_format_source": {"filename": "/x"}}))).contains("inline"));
        assert!(refused(json!({"name": "x"})).contains("typed_config"));
        assert!(refused(json!({"name": "x", "typed_config": {"@type": FILE}})).contains("path"));
        let flags = json!({"response_flag_filter": {"flags": ["UF"]}});
        assert!(refused(json!({"name": "x", "filter": flags, "typed_config": {"@type": STDOUT}})).contains("UF"));
        let filter = json!({"not_health_check_filter": {}});
        assert!(refused(json!({"name": "x", "filter": filter, "typed_config": {"@type": STDOUT}})).contains("filter"));
        let grpc = "type.googleapis.com/envoy.extensions.access_loggers.grpc.v3.TcpGrpcAccessLogConfig";
        let config = ConfigType::TypedConfig(Any { type_url: grpc.to_owned(), value: Vec::new() });
        let wire = Wire { config_type: Some(config), ..Wire::default() };
        assert!(access_logs(&[wire]).is_err_and(|why| why.contains("TcpGrpcAccessLogConfig")));
        let config = ConfigType::TypedConfig(Any { type_url: FILE.to_owned(), value: vec![0xff; 9] });
        let wire = Wire { config_type: Some(config), ..Wire::default() };
        assert!(access_logs(&[wire]).is_err_and(|why| why.contains("does not decode")));
        assert!(access_logs(&vec![Wire::default(); ACCESS_LOGS_MAX + 1]).is_err());
    }
}
