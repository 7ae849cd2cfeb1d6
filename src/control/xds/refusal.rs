//! Why a resource cannot be used here, in words that lead to the place in Consul's configuration.
//!
//! Invariant: a refusal never shows a key or a certificate: what was found is cut and cleaned of control characters.

use envoy_types::pb::google::protobuf::Any;
use prost::Message;

/// Letters of a found value that are shown.
const FOUND_LETTERS_MAX: usize = 200;
/// What a message's type is prefixed with in an `Any`.
const TYPE_PREFIX: &str = "type.googleapis.com/";

/// A field of a resource that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {found}; {wanted}")]
pub(super) struct Refusal {
    /// Where, with dots and indexes as the protobufs have it.
    field: String,
    /// What is there.
    found: String,
    /// What would be accepted.
    wanted: String,
}

impl Refusal {
    pub(super) fn new(field: impl Into<String>, found: impl std::fmt::Display, wanted: impl Into<String>) -> Self {
        let found: String = found.to_string().chars().filter(|letter| !letter.is_control()).take(FOUND_LETTERS_MAX).collect();
        Self { field: field.into(), found, wanted: wanted.into() }
    }

    /// A field that must be there.
    pub(super) fn missing(field: impl Into<String>, wanted: impl Into<String>) -> Self {
        Self::new(field, "absent", wanted)
    }

    /// The same, told from one level further up.
    pub(super) fn under(mut self, parent: &str) -> Self {
        self.field = format!("{parent}.{}", self.field);
        self
    }
}

/// The name of the message in `any`.
pub(super) fn message_name(any: &Any) -> &str {
    any.type_url.rsplit('/').next().unwrap_or_default()
}

/// The type URL of a message.
pub(super) fn type_url(message: &str) -> String {
    format!("{TYPE_PREFIX}{message}")
}

/// Decodes what must be a `name`.
pub(super) fn unpack<T: Message + Default>(any: &Any, name: &str, field: &str) -> Result<T, Refusal> {
    if message_name(any) != name {
        return Err(Refusal::new(field, message_name(any), format!("expected a {name}")));
    }
    T::decode(&*any.value).map_err(|error| Refusal::new(field, error, format!("expected a well-formed {name}")))
}
