//! Envoy's messages as JSON: bootstraps in, `/config_dump` out.
//!
//! Invariant: what is rendered holds no secret: fields that Envoy marks as sensitive, and what a stream is opened with, are
//! replaced before anything is written. What is read is read by the very descriptors that the prost types were made from;
//! an unknown field is an error that names where it stands, never dropped. Knows no resource and no meaning of any field.
//! Hostile bytes cost at most their own size: how deep an `Any` may lie in another is bounded by [`ANY_DEPTH_MAX`].

use std::collections::HashSet;

use envoy_types::pb::google::protobuf::Any;
use prost::{Message, Name};
use prost_reflect::{
    DescriptorPool, DynamicMessage, FieldDescriptor, Kind, MessageDescriptor, ReflectMessage, SerializeOptions, Value,
};
use serde_json::Value as Json;
use zeroize::Zeroize;

/// Envoy's API, compiled by `build.rs`.
static DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/envoy.binpb"));
/// How deep an `Any` may lie inside others. Consul nests three.
const ANY_DEPTH_MAX: usize = 16;
/// How much of a wrong value an error repeats, bytes.
const SHOWN_MAX: usize = 64;
/// What Envoy writes in a secret's place.
const REDACTED: &str = "[redacted]";
/// Marked in Envoy's protobufs on each field that holds a secret.
const SENSITIVE: &str = "udpa.annotations.sensitive";
/// Not all of them are marked, and yet they hold tokens, keys or passwords, in whatever message. Consul's token is in the
/// metadata that a stream is opened with.
const SECRET_NAMES: [&str; 7] =
    ["access_token", "generic_secret", "initial_metadata", "json_key", "password", "private_key", "token"];
/// Free-form configuration, where no field can be marked.
const TYPED_STRUCTS: [&str; 2] = ["xds.type.v3.TypedStruct", "udpa.type.v1.TypedStruct"];
const ANY: &str = "google.protobuf.Any";

/// Why JSON is no message, or a message cannot be shown.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProtoJsonError {
    /// A field that the message does not have.
    #[error("no such field: '{field}' (in {message}, at {place})")]
    UnknownField {
        /// The name as written.
        field: String,
        /// The message's full name.
        message: String,
        /// Path of the message, as in `static_resources.clusters[0]`.
        place: String,
    },
    /// A value that its field cannot hold.
    #[error("{place}: {why}{shown}")]
    Value {
        /// Path of the field.
        place: String,
        /// What is wrong.
        why: String,
        /// The value where it is short and no secret, with what leads up to it; else empty.
        shown: String,
    },
    /// A type that this build has no description of.
    #[error("{place}: the type {name} is unknown")]
    UnknownType {
        /// Path of the `Any`; empty for a whole message.
        place: String,
        /// Full name of the message.
        name: String,
    },
    /// Bytes that are no such message.
    #[error("the bytes are no {name}: {why}")]
    Bytes {
        /// Full name of the message.
        name: String,
        /// What is wrong.
        why: String,
    },
}

/// The descriptions of Envoy's messages. They take some megabytes: load them when needed, and drop them.
#[derive(Debug)]
pub struct Protos {
    pool: DescriptorPool,
    /// Full names of fields whose content is not to be shown.
    sensitive: HashSet<String>,
    /// Unknown fields are dropped instead of refused.
    tolerant: bool,
}

impl Protos {
    /// Reads the descriptions that the build compiled in.
    pub fn load() -> Self {
        let pool = DescriptorPool::decode(DESCRIPTORS).expect("build.rs wrote the descriptors");
        let mark = pool.get_extension_by_name(SENSITIVE).expect("Envoy's protobufs import the annotation");
        let fields = pool.all_messages().flat_map(|message| message.fields().collect::<Vec<_>>());
        let marked = fields.filter(|field| {
            let marked = field.field_descriptor_proto().options.is_some()
                && matches!(field.options().get_extension(&mark).as_ref(), Value::Bool(true));
            marked || SECRET_NAMES.contains(&field.name())
        });
        let sensitive = marked.map(|field| field.full_name().to_owned()).collect();
        Self { pool, sensitive, tolerant: false }
    }

    /// Drops unknown fields instead of refusing them (`--allow-unknown-static-fields`).
    pub fn tolerant(self) -> Self {
        Self { tolerant: true, ..self }
    }

    /// Reads `json` as a `T`: proto JSON, with names in either spelling, and one value where a list is wanted, as Envoy does.
    pub fn decode<T: Message + Name + Default>(&self, json: &Json) -> Result<T, ProtoJsonError> {
        let bytes = self.encode(&T::full_name(), json)?;
        T::decode(bytes.as_slice()).map_err(|error| ProtoJsonError::Bytes { name: T::full_name(), why: error.to_string() })
    }

    /// `json` as the bytes of the message `name` (`envoy.config.cluster.v3.Cluster`).
    pub fn encode(&self, name: &str, json: &Json) -> Result<Vec<u8>, ProtoJsonError> {
        let descriptor = self.descriptor(name, "")?;
        let json = self.orderly(json, &descriptor, "")?;
        let mut track = serde_path_to_error::Track::new();
        let reader = serde_path_to_error::Deserializer::new(&json, &mut track);
        let message =
            DynamicMessage::deserialize(descriptor, reader).map_err(|error| wrong_value(&json, &track.path(), &error))?;
        Ok(message.encode_to_vec())
    }

    /// An encoded message as [`Self::render`] shows it, but with its secrets: for reading, never for showing.
    pub(super) fn canonical(&self, name: &str, bytes: &[u8]) -> Result<Json, ProtoJsonError> {
        to_json(name, &self.dynamic(name, bytes)?)
    }

    /// A message in canonical proto JSON with names as in the protobufs, `Any`s expanded and secrets replaced.
    pub fn render<T: Message + Name>(&self, message: &T) -> Result<Json, ProtoJsonError> {
        self.render_bytes(&T::full_name(), &message.encode_to_vec())
    }

    /// [`Self::render`] for an encoded message: `name` is its full name or its type URL.
    pub fn render_bytes(&self, name: &str, bytes: &[u8]) -> Result<Json, ProtoJsonError> {
        let mut message = self.dynamic(name, bytes)?;
        self.redact(&mut message, false, 0);
        to_json(name, &message)
    }

    fn dynamic(&self, name: &str, bytes: &[u8]) -> Result<DynamicMessage, ProtoJsonError> {
        let descriptor = self.descriptor(name.rsplit('/').next().unwrap_or(name), "")?;
        DynamicMessage::decode(descriptor, bytes)
            .map_err(|error| ProtoJsonError::Bytes { name: name.to_owned(), why: error.to_string() })
    }

    fn descriptor(&self, name: &str, place: &str) -> Result<MessageDescriptor, ProtoJsonError> {
        self.pool
            .get_message_by_name(name)
            .ok_or_else(|| ProtoJsonError::UnknownType { place: place.to_owned(), name: name.to_owned() })
    }

    /// `json` as the strict reader wants it: known names only, lists where lists are wanted, `@type` first.
    fn orderly(&self, json: &Json, message: &MessageDescriptor, place: &str) -> Result<Json, ProtoJsonError> {
        if message.full_name() == ANY {
            return self.orderly_any(json, place);
        }
        let Json::Object(given) = json else { return Ok(json.clone()) };
        // Durations, wrappers, structs: their JSON is not that of their fields.
        if message.full_name().starts_with("google.protobuf.") {
            return Ok(json.clone());
        }
        let mut fields = serde_json::Map::new();
        for (name, value) in given {
            let field = message.get_field_by_name(name).or_else(|| message.get_field_by_json_name(name));
            if field.is_none() && self.tolerant {
                continue;
            }
            let field = field.ok_or_else(|| ProtoJsonError::UnknownField {
                field: name.clone(),
                message: message.full_name().to_owned(),
                place: or_top(place),
            })?;
            fields.insert(name.clone(), self.orderly_field(value, &field, &join(place, name))?);
        }
        Ok(Json::Object(fields))
    }

    fn orderly_field(&self, value: &Json, field: &FieldDescriptor, place: &str) -> Result<Json, ProtoJsonError> {
        let one = |kind: &Kind, value: &Json, place: &str| match kind {
            Kind::Message(message) => self.orderly(value, message, place),
            _ => Ok(value.clone()),
        };
        match (value, field.kind()) {
            (Json::Object(entries), Kind::Message(entry)) if field.is_map() => {
                let kind = entry.map_entry_value_field().kind();
                let entries = entries.iter().map(|(key, value)| Ok((key.clone(), one(&kind, value, &join(place, key))?)));
                Ok(Json::Object(entries.collect::<Result<_, _>>()?))
            }
            (Json::Null, _) => Ok(Json::Null),
            (Json::Array(values), kind) if field.is_list() => {
                let values = values.iter().enumerate().map(|(index, value)| one(&kind, value, &format!("{place}[{index}]")));
                Ok(Json::Array(values.collect::<Result<_, _>>()?))
            }
            (value, kind) if field.is_list() => Ok(Json::Array(vec![one(&kind, value, place)?])),
            (value, kind) => one(&kind, value, place),
        }
    }

    fn orderly_any(&self, json: &Json, place: &str) -> Result<Json, ProtoJsonError> {
        let Some(url) = json.get("@type").and_then(Json::as_str) else {
            let why = "an object with \"@type\" is wanted".to_owned();
            return Err(ProtoJsonError::Value { place: or_top(place), why, shown: String::new() });
        };
        let message = self.descriptor(url.rsplit('/').next().unwrap_or(url), &or_top(place))?;
        let mut given = json.as_object().cloned().unwrap_or_default();
        let mut ordered = serde_json::Map::new();
        ordered.extend(given.shift_remove_entry("@type"));
        if message.full_name().starts_with("google.protobuf.") {
            ordered.extend(given);
        } else if let Json::Object(fields) = self.orderly(&Json::Object(given), &message, place)? {
            ordered.extend(fields);
        }
        Ok(Json::Object(ordered))
    }

    /// Replaces what must not be shown; everything in `message` when `secret`.
    fn redact(&self, message: &mut DynamicMessage, secret: bool, depth: usize) {
        if message.descriptor().full_name() == ANY {
            return self.redact_any(message, secret, depth);
        }
        let free_form = TYPED_STRUCTS.contains(&message.descriptor().full_name());
        for (field, value) in message.fields_mut() {
            let secret = secret || (free_form && field.name() == "value") || self.sensitive.contains(field.full_name());
            // Which metadata there is is no secret, only what it says.
            let secret = secret && field.full_name() != "envoy.config.core.v3.HeaderValue.key";
            self.redact_value(value, secret, depth);
        }
    }

    fn redact_value(&self, value: &mut Value, secret: bool, depth: usize) {
        match value {
            // A chain may come in one file with its key.
            Value::String(text) if secret || holds_key(text.as_bytes()) => {
                text.zeroize();
                text.push_str(REDACTED);
            }
            Value::Bytes(bytes) if secret || holds_key(bytes) => *bytes = REDACTED.as_bytes().into(),
            Value::F64(number) if secret => *number = 0.0,
            Value::Message(message) => self.redact(message, secret, depth),
            Value::List(values) => values.iter_mut().for_each(|value| self.redact_value(value, secret, depth)),
            Value::Map(entries) => entries.values_mut().for_each(|value| self.redact_value(value, secret, depth)),
            _ => {}
        }
    }

    fn redact_any(&self, any: &mut DynamicMessage, secret: bool, depth: usize) {
        let inner = any.transcode_to::<Any>().unwrap_or_default();
        let name = inner.type_url.rsplit('/').next().unwrap_or_default();
        let known = self.pool.get_message_by_name(name).filter(|_| depth < ANY_DEPTH_MAX);
        let decoded = known.and_then(|descriptor| DynamicMessage::decode(descriptor, inner.value.as_slice()).ok());
        let shown = match decoded {
            Some(mut message) => {
                self.redact(&mut message, secret, depth + 1);
                Any { type_url: inner.type_url, value: message.encode_to_vec() }
            }
            // What cannot be read cannot be searched for secrets, so it is named only.
            None => Any {
                type_url: "type.googleapis.com/google.protobuf.StringValue".to_owned(),
                value: format!("not shown: {}", inner.type_url).encode_to_vec(),
            },
        };
        any.transcode_from(&shown).expect("an Any is an Any");
    }
}

fn to_json(name: &str, message: &DynamicMessage) -> Result<Json, ProtoJsonError> {
    let options = SerializeOptions::new().use_proto_field_name(true);
    message
        .serialize_with_options(serde_json::value::Serializer, &options)
        .map_err(|error| ProtoJsonError::Bytes { name: name.to_owned(), why: error.to_string() })
}

/// A field's place inside `place`.
fn join(place: &str, name: &str) -> String {
    if place.is_empty() { name.to_owned() } else { format!("{place}.{name}") }
}

fn or_top(place: &str) -> String {
    if place.is_empty() { "the top".to_owned() } else { place.to_owned() }
}

/// Fields that hold keys, tokens or passwords.
const SECRET_FIELDS: [&str; 11] = [
    "inline_string",
    "inlineString",
    "inline_bytes",
    "inlineBytes",
    "value",
    "private_key",
    "privateKey",
    "initial_metadata",
    "initialMetadata",
    "password",
    "credentials",
];

fn wrong_value(json: &Json, path: &serde_path_to_error::Path, error: &serde_json::Error) -> ProtoJsonError {
    use serde_path_to_error::Segment;
    let mut value = Some(json);
    let mut place = String::new();
    let mut name = "";
    for segment in path {
        match segment {
            Segment::Seq { index } => {
                value = value.and_then(|value| value.get(index));
                place.push_str(&format!("[{index}]"));
            }
            Segment::Map { key } => {
                value = value.and_then(|value| value.get(key));
                place = join(&place, key);
                name = key;
            }
            Segment::Enum { .. } | Segment::Unknown => {}
        }
    }
    // Keys and tokens stand in fields of these names, or by mistake in their place.
    let secret = SECRET_FIELDS.contains(&name) || place.split(['.', '[']).any(|part| SECRET_FIELDS.contains(&part));
    let shown = match value {
        Some(value @ (Json::Bool(_) | Json::Number(_) | Json::String(_))) if !secret => value.to_string(),
        _ => String::new(),
    };
    let shown = if (1..=SHOWN_MAX).contains(&shown.len()) { format!(", not {shown}") } else { String::new() };
    let text = error.to_string();
    // Serde quotes a string that it did not expect, whole.
    let why = match text.rfind(", expected ") {
        Some(at) if text.starts_with("invalid type: string") || secret => format!("invalid value: {}", &text[at + 2..]),
        None if secret => "invalid value".to_owned(),
        _ => text,
    };
    ProtoJsonError::Value { place: or_top(&place), why, shown }
}

/// Whether a private key in PEM is among `bytes`, of whatever kind.
fn holds_key(bytes: &[u8]) -> bool {
    const END: &[u8] = b"PRIVATE KEY-----";
    bytes.windows(END.len()).any(|part| part == END)
}

#[cfg(test)]
mod tests {
    use envoy_types::pb::envoy::config::bootstrap::v3::Bootstrap;
    use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::Secret;
    use serde_json::json;

    use super::*;

    #[test]
    fn names_are_taken_in_both_spellings_and_one_value_for_a_list() {
        let json = json!({
            "node": { "id": "web" },
            "staticResources": { "clusters": [{ "name": "a", "connect_timeout": "0.25s", "loadAssignment": { "clusterName": "a" } }] },
            "dynamic_resources": { "ads_config": { "api_type": "DELTA_GRPC", "grpc_services": {
                "initial_metadata": [{ "key": "x-consul-token", "value": "t" }], "envoy_grpc": { "cluster_name": "local_agent" } } } },
        });
        let bootstrap: Bootstrap = Protos::load().decode(&json).expect("it is a bootstrap");
        assert_eq!(bootstrap.node.expect("it has a node").id, "web");
        assert_eq!(bootstrap.static_resources.expect("it has resources").clusters[0].name, "a");
        let ads = bootstrap.dynamic_resources.and_then(|dynamic| dynamic.ads_config).expect("it has ADS");
        assert_eq!(ads.grpc_services[0].initial_metadata[0].value, "t");
    }

    #[test]
    fn a_key_or_token_in_the_wrong_place_is_not_told() {
        let protos = Protos::load();
        let inline = json!({ "tls_certificates": [{ "private_key": "HIDDEN-KEY" }] });
        let typed = json!({ "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
            "common_tls_context": inline });
        let cluster = json!({ "name": "a", "transport_socket": { "name": "tls", "typed_config": typed } });
        let service = json!({ "envoy_grpc": { "cluster_name": "a" }, "initial_metadata": "HIDDEN-TOKEN" });
        for json in [
            json!({ "static_resources": { "clusters": [cluster] } }),
            json!({ "dynamic_resources": { "ads_config": { "api_type": "DELTA_GRPC", "grpc_services": [service] } } }),
        ] {
            let told = protos.decode::<Bootstrap>(&json).expect_err("refused").to_string();
            assert!(!told.contains("HIDDEN"), "{told}");
        }
    }

    #[test]
    fn unknown_fields_and_wrong_values_are_named_with_their_place() {
        let protos = Protos::load();
        let manager = "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy";
        let filter = |config: Json| json!({ "static_resources": { "listeners": [{ "filter_chains": [{ "filters": [{ "name": "x", "typed_config": config }] }] }] } });
        for (json, wanted) in [
            (
                json!({ "static_resources": { "clusters": [{ "hosts": [] }] } }),
                "no such field: 'hosts' (in envoy.config.cluster.v3.Cluster, at static_resources.clusters[0])",
            ),
            (json!({ "nod": {} }), "no such field: 'nod' (in envoy.config.bootstrap.v3.Bootstrap, at the top)"),
            (
                json!({ "admin": { "address": { "socket_address": { "port_value": "x" } } } }),
                "admin.address.socket_address.port_value: invalid digit found in string, not \"x\"",
            ),
            (json!({ "admin": 3 }), "admin: invalid type: integer `3`"),
            (
                filter(json!({ "stat_prefix": "x", "@type": manager, "clutser": "y" })),
                "at static_resources.listeners[0].filter_chains[0].filters[0].typed_config",
            ),
            (filter(json!({ "@type": "type.googleapis.com/envoy.Nope" })), "the type envoy.Nope is unknown"),
            (filter(json!({ "name": "no type" })), "\"@type\" is wanted"),
        ] {
            let error = protos.decode::<Bootstrap>(&json).expect_err("it is wrong").to_string();
            assert!(error.contains(wanted), "{error}");
        }
    }

    #[test]
    fn a_secret_is_not_repeated_by_an_error() {
        let json = json!({ "dynamic_resources": { "ads_config": { "grpc_services": [{ "initial_metadata": [{ "key": "k", "value": 4711 }] }] } } });
        let error = Protos::load().decode::<Bootstrap>(&json).expect_err("a number is no text");
        assert!(!error.to_string().contains(", not 4711"), "{error}");
    }

    #[test]
    fn what_is_rendered_reads_as_protobuf_json_and_holds_no_secret() {
        let protos = Protos::load();
        let tls = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext";
        let json = json!({
            "static_resources": { "clusters": [{ "name": "db", "type": "EDS", "connect_timeout": "5s", "transport_socket": { "name": "tls", "typed_config": {
                "@type": tls, "sni": "db", "common_tls_context": { "tls_certificates": [{
                    "certificate_chain": { "inline_string": "PUBLIC" }, "private_key": { "inline_string": "TOP-KEY" } }] } } } }] },
            "dynamic_resources": { "ads_config": { "grpc_services": [{ "initial_metadata": [{ "key": "x-consul-token", "value": "TOP-TOKEN" }] }] } },
        });
        let bootstrap: Bootstrap = protos.decode(&json).expect("it is a bootstrap");
        let shown = protos.render(&bootstrap).expect("it can be shown");
        let cluster = &shown["static_resources"]["clusters"][0];
        assert_eq!(cluster["type"], "EDS");
        assert_eq!(cluster["connect_timeout"], "5s");
        let config = &cluster["transport_socket"]["typed_config"];
        assert_eq!(config["@type"], tls);
        let pair = &config["common_tls_context"]["tls_certificates"][0];
        assert_eq!(pair["certificate_chain"]["inline_string"], "PUBLIC");
        assert_eq!(pair["private_key"]["inline_string"], "[redacted]");
        let metadata = &shown["dynamic_resources"]["ads_config"]["grpc_services"][0]["initial_metadata"][0];
        assert_eq!(*metadata, json!({ "key": "x-consul-token", "value": "[redacted]" }));
        assert!(!shown.to_string().contains("TOP-"), "{shown}");
    }

    #[test]
    fn secrets_of_bytes_and_generic_secrets_are_replaced_too() {
        let protos = Protos::load();
        let json = json!({ "name": "s", "generic_secret": { "secret": { "inline_bytes": "c2VjcmV0" } } });
        let secret: Secret = protos.decode(&json).expect("it is a secret");
        let shown = protos.render(&secret).expect("it can be shown");
        assert_eq!(shown["generic_secret"]["secret"]["inline_bytes"], "W3JlZGFjdGVkXQ==");
    }

    #[test]
    fn a_key_beside_a_chain_is_not_shown() {
        let protos = Protos::load();
        for field in ["inline_string", "inline_bytes"] {
            let pem = "-----BEGIN CERTIFICATE-----\n-----BEGIN EC PRIVATE KEY-----\nSECRET";
            let pem = if field == "inline_bytes" {
                base64::Engine::encode(&base64::engine::general_purpose::STANDARD, pem)
            } else {
                pem.to_owned()
            };
            let json = json!({ "name": "s", "tls_certificate": { "certificate_chain": { field: pem } } });
            let secret: Secret = protos.decode(&json).expect("it is a secret");
            let shown = protos.render(&secret).expect("it can be shown");
            let chain = &shown["tls_certificate"]["certificate_chain"];
            assert!(["[redacted]", "W3JlZGFjdGVkXQ=="].contains(&chain[field].as_str().expect("text")), "{chain}");
        }
    }

    #[test]
    fn what_cannot_be_read_is_named_only_however_deep_it_lies() {
        let protos = Protos::load();
        let mut any = Any { type_url: "type.googleapis.com/nope.Nope".into(), value: b"SECRET".to_vec() };
        let shown = protos.render_bytes(ANY, &any.encode_to_vec()).expect("it can be shown");
        assert_eq!(shown["value"], "not shown: type.googleapis.com/nope.Nope");
        for _ in 0..2_000 {
            any = Any { type_url: "type.googleapis.com/google.protobuf.Any".into(), value: any.encode_to_vec() };
        }
        let shown = protos.render_bytes(ANY, &any.encode_to_vec()).expect("it can be shown");
        assert!(shown.to_string().contains("not shown: type.googleapis.com/google.protobuf.Any"), "{shown}");
        assert!(protos.render_bytes("envoy.config.cluster.v3.Cluster", b"\xff\xff\xff").is_err());
    }

    #[test]
    fn every_captured_bootstrap_survives_the_way_in_and_out() {
        let protos = Protos::load();
        let folder = format!("{}/tests/fixtures/consul-1.10/xds", env!("CARGO_MANIFEST_DIR"));
        let files: Vec<_> = std::fs::read_dir(folder).expect("fixtures").map(|entry| entry.expect("entry").path()).collect();
        let bootstraps: Vec<_> = files.iter().filter(|path| path.to_string_lossy().ends_with(".bootstrap.json")).collect();
        assert!(bootstraps.len() >= 6, "{files:?}");
        for path in bootstraps {
            let json: Json = serde_json::from_slice(&std::fs::read(path).expect("fixture")).expect("JSON");
            let read: Bootstrap = protos.decode(&json).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            let shown = protos.render(&read).expect("it can be shown");
            let again: Bootstrap = protos.decode(&shown).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            assert_eq!(again.static_resources, read.static_resources, "{}", path.display());
        }
    }
}
