//! Everything of the rules file besides components and rules, typed and with its defaults.
//!
//! Invariant: every path is absolute and free of `..`; an identity is a name that Consul takes.

use std::net::SocketAddr;
use std::path::{Component as Part, Path, PathBuf};
use std::sync::Arc;

use super::RulesError;
use super::document::{Item, Section};
use super::{name, route};
use crate::mesh::caller::Route;

/// The keys at the top of the file, besides `component` and `rule`.
pub(super) const KEYS: &[&str] =
    &["socket", "socket_mode", "cgroup", "catalog", "queues", "default", "accept_titles", "identities_max"];
/// Where tasks register.
const SOCKET_DEFAULT: &str = "/run/ringfence/airflow.sock";
/// Any user may connect: tasks run as several, and the kernel tells who it is.
const SOCKET_MODE_DEFAULT: u32 = 0o666;
/// What `sockaddr_un` holds, without the zero at the end.
const SOCKET_BYTES_MAX: usize = 107;
/// Leaf certificates kept.
const IDENTITIES_MAX_DEFAULT: usize = 256;
/// Most leaf certificates that can be asked for.
const IDENTITIES_MAX_MAX: usize = 10_000;

/// How to place tasks in cgroups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum CgroupChoice {
    /// Where ringfence finds a place that it may write.
    Auto,
    /// Not at all: attribution by ancestry alone.
    Off,
    /// Below this directory.
    At(PathBuf),
}

/// What a registered task gets that no rule matches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Fallback {
    /// Nothing.
    Deny,
    /// This Consul service name.
    Identity(Arc<str>),
}

/// The settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Settings {
    /// The registration socket.
    pub(crate) socket: PathBuf,
    /// Its mode.
    pub(crate) socket_mode: u32,
    /// Where tasks are placed.
    pub(crate) cgroup: CgroupChoice,
    /// The catalog of DAGs, if there is one.
    pub(crate) catalog: Option<PathBuf>,
    /// The queues that this host serves; empty when the file does not say.
    pub(crate) queues: Vec<Arc<str>>,
    /// For registered tasks that no rule matches.
    pub(crate) fallback: Fallback,
    /// Whether titles of Airflow 2 supervisors are trusted.
    pub(crate) accept_titles: bool,
    /// Leaf certificates kept.
    pub(crate) identities_max: usize,
    /// Where redirected connections come in.
    pub(crate) redirects: Vec<SocketAddr>,
    /// Where they lead.
    pub(crate) routes: Arc<[Route]>,
    /// Where leased addresses are reached.
    pub(crate) lease_port: Option<u16>,
}

impl Settings {
    /// Reads the top of the file. Unknown keys are the caller's to refuse.
    pub(super) fn decode(top: &Section<'_>) -> Result<Self, RulesError> {
        let queues = match top.get("queues") {
            Some(item) => item.values()?.iter().map(|queue| queue.text().map(Arc::from)).collect::<Result<_, _>>()?,
            None => Vec::new(),
        };
        let identities_max = top.get("identities_max").map(|item| item.number(1..=IDENTITIES_MAX_MAX)).transpose()?;
        Ok(Self {
            socket: top.get("socket").map(|item| socket(&item)).transpose()?.unwrap_or_else(|| SOCKET_DEFAULT.into()),
            socket_mode: top.get("socket_mode").map(|item| mode(&item)).transpose()?.unwrap_or(SOCKET_MODE_DEFAULT),
            cgroup: top.get("cgroup").map(|item| cgroup(&item)).transpose()?.unwrap_or(CgroupChoice::Auto),
            catalog: top.get("catalog").map(|item| absolute(&item)).transpose()?,
            queues,
            fallback: top.get("default").map(|item| fallback(&item)).transpose()?.unwrap_or(Fallback::Deny),
            accept_titles: top.boolean("accept_titles")?.unwrap_or(false),
            identities_max: identities_max.unwrap_or(IDENTITIES_MAX_DEFAULT),
            redirects: route::listeners(top)?,
            routes: route::routes(top)?,
            lease_port: route::lease_port(top)?,
        })
    }
}

fn absolute(item: &Item<'_, '_>) -> Result<PathBuf, RulesError> {
    let path = Path::new(item.text()?);
    let clean = path.components().all(|part| matches!(part, Part::RootDir | Part::Normal(_)));
    if !path.is_absolute() || !clean || path.as_os_str().as_encoded_bytes().contains(&0) {
        return Err(item.wrong("is no absolute path", "write it from / on, without `..`"));
    }
    Ok(path.to_owned())
}

fn socket(item: &Item<'_, '_>) -> Result<PathBuf, RulesError> {
    let path = absolute(item)?;
    if path.as_os_str().len() > SOCKET_BYTES_MAX {
        let why = format!("is longer than the {SOCKET_BYTES_MAX} bytes that the kernel takes for a socket");
        return Err(item.wrong(&why, "choose a shorter path below /run"));
    }
    Ok(path)
}

fn mode(item: &Item<'_, '_>) -> Result<u32, RulesError> {
    let text = item.text()?;
    let digits = text.len() <= 4 && text.bytes().all(|byte| matches!(byte, b'0'..=b'7'));
    match u32::from_str_radix(text, 8) {
        Ok(mode) if digits && mode <= 0o777 => Ok(mode),
        _ => Err(item.wrong("is no file mode", "write it in octal digits and quotes, as in \"0660\"")),
    }
}

fn cgroup(item: &Item<'_, '_>) -> Result<CgroupChoice, RulesError> {
    match item.text()? {
        "auto" => Ok(CgroupChoice::Auto),
        "off" => Ok(CgroupChoice::Off),
        text if text.starts_with('/') => absolute(item).map(CgroupChoice::At),
        _ => Err(item.wrong("is no choice of cgroup", "write \"auto\", \"off\" or the absolute path of a cgroup v2 directory")),
    }
}

fn fallback(item: &Item<'_, '_>) -> Result<Fallback, RulesError> {
    match item.text()? {
        "deny" => Ok(Fallback::Deny),
        text => match name::check_label(text) {
            Ok(()) => Ok(Fallback::Identity(text.into())),
            Err(why) => Err(item.wrong(why, "write \"deny\", or a Consul service name as in \"airflow-other\"")),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::super::document::Document;
    use super::*;

    fn decode(text: &str) -> Result<Settings, String> {
        let document = Document::parse(text, "a.toml").unwrap();
        Settings::decode(&document.top()).map_err(|error| error.to_string())
    }

    #[test]
    fn an_empty_file_has_every_default() {
        let settings = decode("").unwrap();
        assert_eq!(settings.socket, Path::new("/run/ringfence/airflow.sock"));
        assert_eq!(settings.socket_mode, 0o666);
        assert_eq!(settings.cgroup, CgroupChoice::Auto);
        assert_eq!(settings.fallback, Fallback::Deny);
        assert_eq!((settings.catalog, settings.accept_titles, settings.identities_max), (None, false, 256));
        assert!(settings.queues.is_empty());
    }

    #[test]
    fn every_key_is_read() {
        let text = "socket = '/run/x.sock'\nsocket_mode = '0660'\ncgroup = '/sys/fs/cgroup/a'\ncatalog = '/c.json'\n\
                    queues = ['a', 'b']\ndefault = 'airflow-other'\naccept_titles = true\nidentities_max = 9\n";
        let settings = decode(text).unwrap();
        assert_eq!((settings.socket.to_str(), settings.socket_mode), (Some("/run/x.sock"), 0o660));
        assert_eq!(settings.cgroup, CgroupChoice::At("/sys/fs/cgroup/a".into()));
        assert_eq!(settings.catalog, Some("/c.json".into()));
        assert_eq!(settings.queues, ["a".into(), "b".into()]);
        assert_eq!(settings.fallback, Fallback::Identity("airflow-other".into()));
        assert!(settings.accept_titles);
        assert_eq!(settings.identities_max, 9);
        assert_eq!(decode("cgroup = 'off'").unwrap().cgroup, CgroupChoice::Off);
    }

    #[test]
    fn a_wrong_setting_says_what_to_write() {
        for (text, remedy) in [
            ("socket = 'x.sock'", "write it from / on"),
            ("socket = '/run/../x'", "write it from / on"),
            ("socket = \"/a\\u0000b\"", "write it from / on"),
            (&format!("socket = '/{}'", "x".repeat(107)), "choose a shorter path"),
            ("socket_mode = '0888'", "as in \"0660\""),
            ("socket_mode = '+666'", "as in \"0660\""),
            ("socket_mode = '7777'", "as in \"0660\""),
            ("cgroup = 'on'", "write \"auto\", \"off\" or"),
            ("queues = []", "list at least one value"),
            ("default = 'Not A Name'", "write \"deny\", or a Consul service name"),
            ("identities_max = 0", "1 to 10000"),
            ("accept_titles = 'yes'", "without quotes"),
        ] {
            let error = decode(text).unwrap_err();
            assert!(error.starts_with("a.toml:1: `") && error.contains(remedy), "{text}: {error}");
        }
    }
}
