//! What the deployment says of each DAG: its file, bundle, team, tags, owners, and which roles hold what on it. Written by
//! `airflow mesh catalog`, read whole, looked up by `dag_id`.
//!
//! Invariant: what the file leaves out is not known, which is another thing than empty: `"tags": []` is a DAG without tags,
//! no `tags` is a DAG of which nobody tells. Only `team` may be null, for a DAG of no team; a null elsewhere is not known. So a
//! newer file may hold keys that this version ignores: a fact that it does not understand is never a fact that it assumes.
//! A path that is not plain (absolute, or with `..`) is not known either, for a glob could be led astray by it.
//!
//! Per task a DAG may tell `"tasks": {"load": {"pool": "p", "operator": "PythonOperator"}}`, what `pool` and `operator` of a
//! rule need.
//!
//! Knows no rule. Fails as a [`CatalogError`]; who holds an older catalog keeps it.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::fs;
use std::io::Read as _;
use std::path::Path;
use std::sync::Arc;

use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::rules::quoted;

/// Largest catalog read.
pub(crate) const CATALOG_BYTES_MAX: u64 = 64 << 20;
/// Most DAGs in it.
pub(crate) const DAGS_MAX: usize = 100_000;
/// The format that this version reads.
const VERSION: u64 = 1;

/// Why a catalog cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CatalogError {
    /// The file cannot be read.
    #[error("{path}: cannot be read: {source}; write it with: airflow mesh catalog --out {path}")]
    Read {
        /// The file.
        path: String,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// The file is larger than [`CATALOG_BYTES_MAX`].
    #[error("{path}: is larger than {CATALOG_BYTES_MAX} bytes; `catalog` must name a file of airflow mesh catalog")]
    TooLarge {
        /// The file.
        path: String,
    },
    /// The file has another version.
    #[error("{path}: `version` is {version}, and this ringfence reads {VERSION}; install the Airflow provider that fits it")]
    Version {
        /// The file.
        path: String,
        /// Its version.
        version: u64,
    },
    /// The file is no catalog.
    #[error("{path}:{line}: not a catalog: {what}; write it anew with: airflow mesh catalog --out {path}")]
    Format {
        /// The file.
        path: String,
        /// Where.
        line: usize,
        /// What the parser said.
        what: String,
    },
}

/// Every DAG that the deployment tells of.
#[derive(Debug, Default)]
pub(crate) struct Catalog {
    dags: HashMap<Arc<str>, Dag>,
}

/// What is known of a DAG. None is not known.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(from = "DagText")]
pub(crate) struct Dag {
    /// The DAG's file, relative to its bundle.
    pub(crate) path: Option<Arc<str>>,
    /// Its bundle.
    pub(crate) bundle: Option<Arc<str>>,
    /// Its team, which may be no team.
    pub(crate) team: Option<Option<Arc<str>>>,
    /// Its tags.
    pub(crate) tags: Option<Vec<Arc<str>>>,
    /// Its owners.
    pub(crate) owners: Option<Vec<Arc<str>>>,
    /// The roles that hold a permission on it, by permission. One that is missing here is held by nobody.
    pub(crate) roles: Option<BTreeMap<Arc<str>, Vec<Arc<str>>>>,
    /// Its tasks.
    pub(crate) tasks: Option<BTreeMap<Arc<str>, TaskFacts>>,
}

/// What is known of a task of a DAG.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct TaskFacts {
    /// Its pool.
    pub(crate) pool: Option<Arc<str>>,
    /// The class of its operator.
    pub(crate) operator: Option<Arc<str>>,
}

impl Catalog {
    /// Reads the file whole.
    pub(crate) fn load(path: &Path) -> Result<Self, CatalogError> {
        let mut bytes = Vec::new();
        let read = fs::File::open(path).and_then(|file| file.take(CATALOG_BYTES_MAX + 1).read_to_end(&mut bytes));
        if let Err(source) = read {
            return Err(CatalogError::Read { path: path.display().to_string(), source });
        }
        Self::parse(&bytes, path)
    }

    /// Reads a file's bytes. `path` is for messages.
    pub(crate) fn parse(bytes: &[u8], path: &Path) -> Result<Self, CatalogError> {
        let path = path.display().to_string();
        if bytes.len() as u64 > CATALOG_BYTES_MAX {
            return Err(CatalogError::TooLarge { path });
        }
        match serde_json::from_slice(bytes) {
            Ok(CatalogText { version: VERSION, dags: Dags(dags) }) => Ok(Self { dags }),
            Ok(CatalogText { version, .. }) => Err(CatalogError::Version { path, version }),
            // Another version may look otherwise altogether: then that is what is wrong.
            Err(error) => match serde_json::from_slice(bytes) {
                Ok(VersionText { version }) if version != VERSION => Err(CatalogError::Version { path, version }),
                Ok(_) | Err(_) => Err(CatalogError::Format { path, line: error.line(), what: error.to_string() }),
            },
        }
    }

    /// What it says of a DAG.
    pub(crate) fn get(&self, dag: &str) -> Option<&Dag> {
        self.dags.get(dag)
    }

    /// How many DAGs it tells of.
    pub(crate) fn len(&self) -> usize {
        self.dags.len()
    }
}

#[derive(Deserialize)]
struct VersionText {
    version: u64,
}

#[derive(Deserialize)]
struct CatalogText {
    version: u64,
    dags: Dags,
}

#[derive(Deserialize)]
struct DagText {
    path: Option<String>,
    bundle: Option<String>,
    #[serde(default, deserialize_with = "present")]
    team: Option<Option<String>>,
    tags: Option<Vec<String>>,
    owners: Option<Vec<String>>,
    roles: Option<BTreeMap<String, Vec<String>>>,
    tasks: Option<BTreeMap<String, TaskText>>,
}

#[derive(Deserialize)]
struct TaskText {
    pool: Option<String>,
    operator: Option<String>,
}

/// Tells a null from a key that is not there.
fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Option<String>>, D::Error> {
    Option::deserialize(deserializer).map(Some)
}

impl From<DagText> for Dag {
    fn from(text: DagText) -> Self {
        let shared = |text: Option<String>| text.map(Arc::from);
        let list = |texts: Vec<String>| texts.into_iter().map(Arc::from).collect::<Vec<Arc<str>>>();
        let task = |text: TaskText| TaskFacts { pool: shared(text.pool), operator: shared(text.operator) };
        Self {
            path: shared(text.path.filter(|path| is_plain(path))),
            bundle: shared(text.bundle),
            team: text.team.map(shared),
            tags: text.tags.map(list),
            owners: text.owners.map(list),
            roles: text.roles.map(|roles| roles.into_iter().map(|(name, holders)| (name.into(), list(holders))).collect()),
            tasks: text.tasks.map(|tasks| tasks.into_iter().map(|(name, facts)| (name.into(), task(facts))).collect()),
        }
    }
}

/// Whether a path is relative and has names only.
fn is_plain(path: &str) -> bool {
    path.split('/').all(|part| !matches!(part, "" | "." | ".."))
}

/// The DAGs: bounded, none of them twice.
struct Dags(HashMap<Arc<str>, Dag>);

impl<'de> Deserialize<'de> for Dags {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Bounded;

        impl<'de> Visitor<'de> for Bounded {
            type Value = Dags;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object with an object for each DAG")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Dags, A::Error> {
                let mut dags = HashMap::new();
                while let Some(dag) = map.next_key::<String>()? {
                    if dags.len() == DAGS_MAX {
                        return Err(A::Error::custom(format_args!("more than {DAGS_MAX} DAGs")));
                    }
                    match dags.entry(Arc::from(dag)) {
                        Entry::Vacant(entry) => {
                            entry.insert(map.next_value()?);
                        }
                        Entry::Occupied(entry) => {
                            return Err(A::Error::custom(format_args!("the DAG {} is told twice", quoted(entry.key()))));
                        }
                    }
                }
                Ok(Dags(dags))
            }
        }

        deserializer.deserialize_map(Bounded)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> Result<Catalog, String> {
        Catalog::parse(text.as_bytes(), Path::new("c.json")).map_err(|error| error.to_string())
    }

    #[test]
    fn every_fact_is_read() {
        let catalog = parse(
            r#"{"version": 1, "dags": {"payroll_daily": {"path": "finance/payroll.py", "bundle": "finance", "team": null,
            "tags": ["x"], "owners": ["fin"], "roles": {"can_edit": ["finance"], "can_read": ["finance", "audit"]},
            "tasks": {"load": {"pool": "p", "operator": "PythonOperator"}, "end": {}}, "later": {"a": [1]}}}}"#,
        )
        .unwrap();
        assert_eq!(catalog.len(), 1);
        assert!(catalog.get("payroll").is_none());
        let dag = catalog.get("payroll_daily").unwrap();
        assert_eq!((dag.path.as_deref(), dag.bundle.as_deref()), (Some("finance/payroll.py"), Some("finance")));
        assert_eq!(dag.team, Some(None));
        assert_eq!(dag.tags.as_deref(), Some(&["x".into()][..]));
        assert_eq!(dag.roles.as_ref().unwrap()["can_read"], ["finance".into(), "audit".into()]);
        let tasks = dag.tasks.as_ref().unwrap();
        assert_eq!((tasks["load"].pool.as_deref(), tasks["load"].operator.as_deref()), (Some("p"), Some("PythonOperator")));
        assert_eq!(tasks["end"], TaskFacts::default());
    }

    #[test]
    fn what_is_left_out_is_not_known() {
        let catalog = parse(r#"{"version": 1, "dags": {"a": {}, "b": {"path": null, "tags": []}}}"#).unwrap();
        assert_eq!(catalog.get("a").unwrap(), &Dag::default());
        let dag = catalog.get("b").unwrap();
        assert_eq!((dag.path.as_ref(), dag.tags.as_deref(), &dag.team), (None, Some(&[][..]), &None));
    }

    #[test]
    fn a_path_that_leaves_its_bundle_is_not_known() {
        for path in ["/etc/x.py", "finance/../hr/x.py", "./x.py", "a//b.py", "a/", ""] {
            let catalog = parse(&format!(r#"{{"version": 1, "dags": {{"a": {{"path": "{path}"}}}}}}"#)).unwrap();
            assert_eq!(catalog.get("a").unwrap().path, None, "{path}");
        }
    }

    #[test]
    fn a_wrong_catalog_says_why_and_what_to_do() {
        for (text, part) in [
            ("", "c.json:1: not a catalog: EOF"),
            ("[]", "not a catalog"),
            ("{\"version\": 1}", "missing field `dags`"),
            ("{\"dags\": {}}", "missing field `version`"),
            ("{\"version\": 2, \"dags\": []}", "`version` is 2, and this ringfence reads 1"),
            ("{\"version\": 1,\n\"dags\": {\"a\": {\"tags\": \"x\"}}}", "c.json:2: not a catalog: invalid type"),
            ("{\"version\": 1, \"dags\": {\"a\": {}, \"a\": {}}}", "the DAG \"a\" is told twice"),
            ("{\"version\": 1, \"dags\": {\"a\": {\"path\": \"x\", \"path\": \"y\"}}}", "duplicate field `path`"),
        ] {
            let error = parse(text).map(drop).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
        let error = Catalog::load(Path::new("/nowhere/c.json")).unwrap_err().to_string();
        assert!(error.ends_with("write it with: airflow mesh catalog --out /nowhere/c.json"), "{error}");
    }

    #[test]
    fn a_catalog_has_bounds() {
        let many: Vec<String> = (0..=DAGS_MAX).map(|dag| format!("\"{dag}\":{{}}")).collect();
        let error = parse(&format!(r#"{{"version":1,"dags":{{{}}}}}"#, many.join(","))).map(drop).unwrap_err();
        assert!(error.contains("more than 100000 DAGs"), "{error}");
        let catalog = parse(&format!(r#"{{"version":1,"dags":{{{}}}}}"#, many[1..].join(","))).unwrap();
        assert_eq!(catalog.len(), DAGS_MAX);
        let large = vec![b' '; usize::try_from(CATALOG_BYTES_MAX).unwrap() + 1];
        assert!(matches!(Catalog::parse(&large, Path::new("c.json")), Err(CatalogError::TooLarge { .. })));
    }

    #[test]
    fn deep_nesting_is_an_error_and_no_overflow() {
        let deep = format!(r#"{{"version":1,"dags":{{"a":{{"later":{}"#, "[".repeat(1_000_000));
        assert!(parse(&deep).is_err());
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), cut in 0_usize..150, at in 0_usize..150) {
            let _ = Catalog::parse(&bytes, Path::new("c.json"));
            let mut text = br#"{"version": 1, "dags": {"p": {"path": "f/p.py", "team": null, "tags": ["x"], "roles": {"e": ["f"]}}}}"#.to_vec();
            text.truncate(cut.max(1));
            let at = at % text.len();
            text[at] = bytes.first().copied().unwrap_or(b'{');
            let _ = Catalog::parse(&text, Path::new("c.json"));
        }
    }
}
