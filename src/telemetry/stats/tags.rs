//! Tags: what Envoy cuts out of a stat's name and gives as labels instead.
//!
//! Invariant: Envoy's rules. Every extractor looks at the whole name, whatever the others have cut; the first group of its
//! regex is cut out, the second one, or else the first, is the value; a second group that took no part gives the value "".
//! Extractors without a fixed first part of the name go before those with one, and of two tags of one name the first stays.
//!
//! Regexes are compiled once, and what a name came to is remembered, at most [`NAMES_MAX`] names: as text that names share,
//! because the twenty labels of one cluster's stats are the same hundred times. A bad regex is an error that names its tag.

use std::collections::{HashMap, HashSet};
use std::fmt::Write;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;

use regex::bytes::{Regex, RegexBuilder};

use crate::config::envoy::{StatTag, StatTagValue};

/// Names whose tags are remembered: those of a thousand upstreams.
const NAMES_MAX: usize = 131_072;
/// Bytes that one compiled regex may take: Consul's are a tenth of it.
const REGEX_BYTES_MAX: usize = 1 << 20;

/// Envoy's own tags for what a sidecar at layer 4 has, in Envoy's order.
const DEFAULT_TAGS: [(&str, &str); 10] = [
    ("envoy.ssl_version", r"\.ssl\.versions(\.([\w.]+))$"),
    ("envoy.ssl_curve", r"\.ssl\.curves(\.([\w-]+))$"),
    ("envoy.ssl_sigalg", r"\.ssl\.sigalgs(\.([\w-]+))$"),
    ("envoy.tls_certificate", r"\.ssl\.certificate(\.([^.]+))\."),
    ("envoy.worker_id", r"^(?:listener\.(?:[\d.]+|\[[_a-fA-F\d]*\])_\d+|server)\.worker(_(\d+))\."),
    ("envoy.ssl_cipher", r"^listener\..*?\.ssl\.ciphers(\.([\w-]+))$"),
    ("envoy.tcp_prefix", r"^tcp\.(([^.]+)\.)"),
    ("envoy.cluster_name", r"^cluster\.(([^.]+)\.)"),
    ("envoy.listener_address", r"^listener\.(((?:[\d.]+|\[[_a-fA-F\d]*\])_\d+)\.)"),
    ("envoy.connection_limit_prefix", r"^connection_limit\.(([^.]+)\.)"),
];
const RBAC_TAG: (&str, &str) = ("envoy.rbac_prefix", r"^(([^.]+)\.)rbac\.");

/// Consul's tags of where a cluster leads, newest names: tag and the part of the cluster's name in the inner group.
const DESTINATION_TAGS: [(&str, &str); 9] = [
    ("custom_hash", r"((?:([^.]+)~)?(?:[^.]+\.)?[^.]+\.[^.]+\.[^.]+\.[^.]+\.[^.]+\.consul\.)"),
    ("service_subset", r"((?:[^.]+~)?(?:([^.]+)\.)?[^.]+\.[^.]+\.[^.]+\.[^.]+\.[^.]+\.consul\.)"),
    ("service", r"((?:[^.]+~)?(?:[^.]+\.)?([^.]+)\.[^.]+\.[^.]+\.[^.]+\.[^.]+\.consul\.)"),
    ("namespace", r"((?:[^.]+~)?(?:[^.]+\.)?[^.]+\.([^.]+)\.[^.]+\.[^.]+\.[^.]+\.consul\.)"),
    ("datacenter", r"((?:[^.]+~)?(?:[^.]+\.)?[^.]+\.[^.]+\.([^.]+)\.[^.]+\.[^.]+\.consul\.)"),
    ("routing_type", r"((?:[^.]+~)?(?:[^.]+\.)?[^.]+\.[^.]+\.[^.]+\.([^.]+)\.[^.]+\.consul\.)"),
    ("trust_domain", r"((?:[^.]+~)?(?:[^.]+\.)?[^.]+\.[^.]+\.[^.]+\.[^.]+\.([^.]+)\.consul\.)"),
    ("target", r"(((?:[^.]+~)?(?:[^.]+\.)?[^.]+\.[^.]+\.[^.]+)\.[^.]+\.[^.]+\.consul\.)"),
    ("full_target", r"(((?:[^.]+~)?(?:[^.]+\.)?[^.]+\.[^.]+\.[^.]+\.[^.]+\.[^.]+)\.consul\.)"),
];
/// And of what an upstream's listener is for.
const UPSTREAM_TAGS: [(&str, &str); 3] = [
    ("consul.upstream.service", r"^(?:tcp|http)\.upstream\.(([^.]+)(?:\.[^.]+)?\.[^.]+\.)"),
    ("consul.upstream.datacenter", r"^(?:tcp|http)\.upstream\.([^.]+(?:\.[^.]+)?\.([^.]+)\.)"),
    ("consul.upstream.namespace", r"^(?:tcp|http)\.upstream\.([^.]+(?:\.([^.]+))?\.[^.]+\.)"),
];

/// Why tags cannot be worked out.
#[derive(Debug, thiserror::Error)]
pub enum TagError {
    /// A regex that does not compile, or is too large.
    #[error("stats tag {name}: the regex `{regex}` cannot be used: {why}")]
    Regex {
        /// The tag.
        name: String,
        /// The regex.
        regex: String,
        /// What is wrong with it.
        why: String,
    },
    /// A tag that is there twice: Envoy refuses it.
    #[error("stats tag {0} is specified twice; remove one of them")]
    Twice(String),
}

/// How names and labels are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// `envoy_name` and `a_b="c",…`.
    Prometheus,
    /// `name` and `a.b:c,…`.
    DogStatsd,
}

/// A name without its tags, and the tags.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tagged {
    /// What is left of the name.
    pub name: Arc<str>,
    /// The labels as they are written, without brackets; may be empty.
    pub labels: Arc<str>,
}

/// Works tags out.
#[derive(Debug)]
pub struct Tagger {
    dialect: Dialect,
    extractors: Vec<Extractor>,
    /// Fixed tags of each owner of stats.
    owners: Vec<Vec<(String, String)>>,
    known: HashMap<(u64, u64), Tagged>,
    texts: HashSet<Arc<str>>,
    hashers: (RandomState, RandomState),
}

#[derive(Debug)]
struct Extractor {
    name: String,
    /// Names that begin otherwise cannot match.
    prefix: Option<String>,
    source: Source,
}

#[derive(Debug)]
enum Source {
    Fixed(String),
    Regex(Regex),
}

impl Tagger {
    /// With `tags` in their order, after Envoy's own ones if `default_tags`.
    pub fn new(dialect: Dialect, tags: &[StatTag], default_tags: bool) -> Result<Self, TagError> {
        let mut extractors = Vec::new();
        if default_tags {
            for (name, regex) in DEFAULT_TAGS.into_iter().chain([RBAC_TAG]) {
                extractors.push(Extractor::regex(name, regex)?);
            }
        }
        let mut names = HashSet::new();
        for tag in tags {
            if !names.insert(&tag.name) {
                return Err(TagError::Twice(tag.name.clone()));
            }
            extractors.push(match &tag.value {
                StatTagValue::Regex(regex) => Extractor::regex(&tag.name, regex)?,
                StatTagValue::Fixed(value) => {
                    Extractor { name: tag.name.clone(), prefix: None, source: Source::Fixed(value.clone()) }
                }
            });
        }
        extractors.sort_by_key(|extractor| extractor.prefix.is_some());
        let hashers = (RandomState::new(), RandomState::new());
        Ok(Self { dialect, extractors, owners: Vec::new(), known: HashMap::new(), texts: HashSet::new(), hashers })
    }

    /// The fixed tags of each owner of stats from now on.
    pub fn set_owners(&mut self, owners: Vec<Vec<(String, String)>>) {
        if self.owners != owners {
            self.owners = owners;
            self.forget();
        }
    }

    fn forget(&mut self) {
        self.known.clear();
        self.texts.clear();
    }

    /// What becomes of `name`, a stat of `owner`.
    pub fn tag(&mut self, name: &str, owner: usize) -> Tagged {
        // Two keyed hashes instead of the name: nobody finds two names with both the same, and a name is a hundred bytes.
        let key = (self.hashers.0.hash_one((name, owner)), self.hashers.1.hash_one((name, owner)));
        if let Some(known) = self.known.get(&key) {
            return known.clone();
        }
        if self.known.len() >= NAMES_MAX {
            self.forget();
        }
        let (name, labels) = self.work_out(name, owner);
        let tagged = Tagged { name: self.shared(name), labels: self.shared(labels) };
        self.known.insert(key, tagged.clone());
        tagged
    }

    fn shared(&mut self, text: String) -> Arc<str> {
        if let Some(known) = self.texts.get(text.as_str()) {
            return Arc::clone(known);
        }
        let text: Arc<str> = text.into();
        self.texts.insert(Arc::clone(&text));
        text
    }

    fn work_out(&self, name: &str, owner: usize) -> (String, String) {
        let mut cut = vec![false; name.len()];
        let mut tags: Vec<(&str, &str)> = Vec::new();
        let mut owners = self.owners.get(owner).map(Vec::as_slice).unwrap_or_default();
        for extractor in &self.extractors {
            if extractor.prefix.is_some() {
                tags.extend(std::mem::take(&mut owners).iter().map(|(name, value)| (name.as_str(), value.as_str())));
            }
            if let Some((value, range)) = extractor.look(name)
                && tags.iter().all(|(known, _)| *known != extractor.name)
            {
                cut[range].fill(true);
                tags.push((&extractor.name, value));
            }
        }
        tags.extend(owners.iter().map(|(name, value)| (name.as_str(), value.as_str())));
        let left = name.char_indices().filter(|(at, _)| !cut[*at]).map(|(_, letter)| letter);
        let left: String = if self.dialect == Dialect::Prometheus {
            "envoy_".chars().chain(left.map(|letter| sanitised(letter, letter == ':'))).collect()
        } else {
            left.map(statsd_letter).collect()
        };
        (left, self.written(&tags))
    }

    fn written(&self, tags: &[(&str, &str)]) -> String {
        let mut text = String::new();
        for (name, value) in tags {
            if !text.is_empty() {
                text.push(',');
            }
            match self.dialect {
                Dialect::Prometheus => {
                    text.extend(name.chars().map(|letter| sanitised(letter, false)));
                    let value = value.replace('\\', r"\\").replace('\n', r"\n").replace('"', "\\\"");
                    // Writing to a String cannot fail.
                    let _ = write!(text, "=\"{value}\"");
                }
                Dialect::DogStatsd => {
                    text.push_str(name);
                    text.push(':');
                    text.extend(value.chars().map(statsd_letter));
                }
            }
        }
        text
    }
}

impl Extractor {
    fn regex(name: &str, regex: &str) -> Result<Self, TagError> {
        let compile = |unicode| RegexBuilder::new(regex).unicode(unicode).size_limit(REGEX_BYTES_MAX).build();
        // On bytes, as Envoy has it; by characters `[^.]` alone is a dozen states. What can be said of characters only is.
        let compiled = compile(false).or_else(|_| compile(true)).map_err(|error| TagError::Regex {
            name: name.to_owned(),
            regex: regex.to_owned(),
            why: error.to_string(),
        })?;
        Ok(Self { name: name.to_owned(), prefix: prefix(regex), source: Source::Regex(compiled) })
    }

    /// The value, and what is cut out.
    fn look<'a>(&'a self, name: &'a str) -> Option<(&'a str, std::ops::Range<usize>)> {
        if self.prefix.as_ref().is_some_and(|prefix| !name.starts_with(prefix.as_str())) {
            return None;
        }
        match &self.source {
            Source::Fixed(value) => Some((value, 0..0)),
            Source::Regex(regex) => {
                let found = regex.captures(name.as_bytes())?;
                // A first group that took no part cuts nothing; a regex without groups gives no tag, as in Envoy.
                let outer = found.get(1)?;
                let inner = if found.len() > 2 { found.get(2) } else { Some(outer) };
                // A group may end within a character.
                let value = inner.map_or(Some(""), |inner| name.get(inner.range()))?;
                name.get(outer.range()).map(|_| (value, outer.range()))
            }
        }
    }
}

/// The name's first part with its dot, where a regex begins with one: `^cluster\.`.
fn prefix(regex: &str) -> Option<String> {
    let (first, _) = regex.strip_prefix('^')?.split_once(r"\.")?;
    let plain = !first.is_empty() && first.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    plain.then(|| format!("{first}."))
}

fn sanitised(letter: char, keep: bool) -> char {
    if letter.is_ascii_alphanumeric() || letter == '_' || keep { letter } else { '_' }
}

/// What separates in statsd's lines must not be in a name.
pub(super) fn statsd_letter(letter: char) -> char {
    if matches!(letter, ':' | '|' | '#' | '@' | ',' | '\n') { '_' } else { letter }
}

/// The tags that Consul writes into a bootstrap, without the fixed ones, which [`Tagger::set_owners`] gives.
pub fn of_consul(omit_deprecated: bool) -> Vec<StatTag> {
    let regex = |name: String, regex: String| StatTag { name, value: StatTagValue::Regex(regex) };
    let mut tags: Vec<StatTag> = DESTINATION_TAGS
        .iter()
        .map(|(name, part)| regex(format!("consul.destination.{name}"), format!(r"^cluster\.(?:passthrough~)?{part}")))
        .collect();
    tags.extend(UPSTREAM_TAGS.iter().map(|(name, pattern)| regex((*name).to_owned(), (*pattern).to_owned())));
    if !omit_deprecated {
        tags.extend(DESTINATION_TAGS.iter().map(|(name, part)| regex(format!("consul.{name}"), format!(r"^cluster\.{part}"))));
    }
    tags
}

#[cfg(test)]
mod tests;
