//! The house rules, read from the source as text: which room may import which, how long a file may be, where `unsafe` and
//! locks may stand, how files are named and opened.
//!
//! Every rule is a pure function from files to complaints. Its test runs it on `src/`, and another runs it on a bad snippet,
//! so that no rule passes because it looks at nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use code::{code_of, squeeze, words};

#[path = "architecture/code.rs"]
mod code;

/// Which rooms a room may import. A room may always import itself, and `config`, which imports nothing.
const ARROWS: &[(&str, &[&str])] = &[
    ("config", &[]),
    ("sys", &[]),
    ("ring", &["sys", "buffer"]),
    ("buffer", &["sys"]),
    ("identity", &[]),
    ("policy", &["identity"]),
    ("tls", &["identity"]),
    ("mesh", &["identity", "policy", "tls"]),
    ("store", &["identity", "policy", "tls", "mesh"]),
    ("telemetry", &["identity", "policy", "tls", "mesh"]),
    ("proxy", &["sys", "ring", "buffer", "identity", "policy", "tls", "mesh", "store", "telemetry"]),
    ("control", &["identity", "policy", "tls", "mesh", "store", "telemetry"]),
    ("admin", &["identity", "policy", "tls", "mesh", "store", "telemetry", "control"]),
    ("airflow", &["sys", "identity", "policy", "tls", "mesh", "store", "telemetry"]),
    ("agent", &["identity", "policy", "tls", "mesh", "store", "telemetry"]),
    (
        "app",
        &[
            "sys",
            "ring",
            "buffer",
            "identity",
            "policy",
            "tls",
            "mesh",
            "store",
            "telemetry",
            "proxy",
            "control",
            "admin",
            "airflow",
            "agent",
        ],
    ),
    (
        "cli",
        &[
            "sys",
            "ring",
            "identity",
            "policy",
            "tls",
            "mesh",
            "store",
            "telemetry",
            "control",
            "admin",
            "airflow",
            "agent",
            "app",
        ],
    ),
    ("main", &["cli", "app"]),
];
/// The rooms that talk to the kernel or to raw memory.
const UNSAFE_ROOMS: &[&str] = &["ring", "buffer", "sys"];
/// Rooms that run on worker threads, or that workers share with others.
const LOCK_FREE_ROOMS: &[&str] = &["proxy", "tls", "ring", "buffer", "store", "mesh", "policy"];
const LOCKS: &[&str] = &["Mutex", "RwLock", "Condvar", "ReentrantLock", "Barrier", "mpsc", "parking_lot"];
/// Names that say nothing about what is in a file.
const EMPTY_NAMES: &[&str] =
    &["util", "utils", "common", "manager", "managers", "helper", "helpers", "type", "types", "misc", "mod"];
/// A file of this length should be split soon.
const LINES_ALARM: usize = 500;
/// A file of this length fails.
const LINES_MAX: usize = 700;

/// One source file.
struct Source {
    /// Under `src/`, with forward slashes.
    path: String,
    text: String,
}

impl Source {
    /// The first component of the path.
    fn room(&self) -> &str {
        let first = self.path.split('/').next().unwrap_or_default();
        first.strip_suffix(".rs").unwrap_or(first)
    }

    /// How many modules lie between the crate's root and this file's items.
    fn depth(&self) -> usize {
        self.path.split('/').count()
    }
}

mod rules {
    use super::*;

    /// An arrow that is not in the table, or a room that is not.
    pub(crate) fn arrows(files: &[Source]) -> Vec<String> {
        let table: BTreeMap<&str, &[&str]> = ARROWS.iter().copied().collect();
        let mut bad = Vec::new();
        for file in files.iter().filter(|file| file.room() != "lib") {
            let Some(allowed) = table.get(file.room()) else {
                bad.push(format!("{}: the room `{}` is not in the table of arrows", file.path, file.room()));
                continue;
            };
            for room in imports(file) {
                let fine = room == file.room() || room == "config" || allowed.contains(&room.as_str());
                if !fine {
                    bad.push(format!("{}: `{}` must not import `{room}`", file.path, file.room()));
                }
            }
        }
        bad
    }

    /// Rooms that can reach themselves by imports.
    pub(crate) fn cycles(edges: &BTreeMap<String, BTreeSet<String>>) -> Vec<String> {
        let mut bad = Vec::new();
        for start in edges.keys() {
            let mut seen = BTreeSet::new();
            let mut next: Vec<&String> = edges[start].iter().filter(|room| *room != start).collect();
            while let Some(room) = next.pop() {
                if room == start {
                    bad.push(format!("`{start}` imports itself in a circle, through {seen:?}"));
                    break;
                }
                if seen.insert(room) {
                    next.extend(edges.get(room).into_iter().flatten());
                }
            }
        }
        bad
    }

    /// Files over the limit. Those over the alarm are printed.
    pub(crate) fn lengths(files: &[Source]) -> Vec<String> {
        let mut bad = Vec::new();
        for file in files {
            let lines = file.text.lines().count();
            if lines > LINES_MAX {
                bad.push(format!("{}: {lines} lines, the limit is {LINES_MAX}: split it", file.path));
            } else if lines > LINES_ALARM {
                eprintln!("alarm: {} has {lines} lines, more than {LINES_ALARM}", file.path);
            }
        }
        bad
    }

    /// `unsafe` outside its rooms.
    pub(crate) fn unsafe_rooms(files: &[Source]) -> Vec<String> {
        files
            .iter()
            .filter(|file| !UNSAFE_ROOMS.contains(&file.room()) && words(&code_of(&file.text)).contains("unsafe"))
            .map(|file| format!("{}: `unsafe` is only for {UNSAFE_ROOMS:?}", file.path))
            .collect()
    }

    /// Files and folders whose name says nothing, `mod.rs` among them.
    pub(crate) fn names(files: &[Source]) -> Vec<String> {
        let empty = |path: &str| {
            path.split('/').any(|part| {
                let stem = part.strip_suffix(".rs").unwrap_or(part);
                stem.split('_').any(|word| EMPTY_NAMES.contains(&word))
            })
        };
        files
            .iter()
            .filter(|file| empty(&file.path))
            .map(|file| format!("{}: name it after what is in it (`foo.rs` and `foo/`, no mod.rs)", file.path))
            .collect()
    }

    /// Files that do not open with their documentation.
    pub(crate) fn openings(files: &[Source]) -> Vec<String> {
        files
            .iter()
            .filter(|file| !file.text.starts_with("//! "))
            .map(|file| {
                format!("{}: opens without `//!`: say purpose, invariant, what it must not know, how it fails", file.path)
            })
            .collect()
    }

    /// Code that is not written yet.
    pub(crate) fn unfinished(files: &[Source]) -> Vec<String> {
        files
            .iter()
            .filter(|file| {
                let code: String = code_of(&file.text).split_whitespace().collect();
                ["todo!", "unimplemented!"].iter().any(|hole| code.contains(hole))
            })
            .map(|file| format!("{}: has a todo!() or unimplemented!()", file.path))
            .collect()
    }

    /// Locks and blocking channels on data threads. Tests at the end of a file may use them, and so may loom's models.
    pub(crate) fn locks(files: &[Source]) -> Vec<String> {
        let mut bad = Vec::new();
        for file in files.iter().filter(|file| LOCK_FREE_ROOMS.contains(&file.room()) && !is_test(&file.path)) {
            let code = code_of(&file.text).replace("loom::sync::Mutex", "");
            let code = code.split("#[cfg(test)]\nmod ").next().unwrap_or_default();
            for lock in words(code).intersection(&LOCKS.iter().copied().collect()) {
                bad.push(format!("{}: `{lock}` has no place in `{}`: a worker never waits", file.path, file.room()));
            }
        }
        bad
    }
}

fn is_test(path: &str) -> bool {
    path.ends_with("/tests.rs") || path.contains("/tests/")
}

/// The rooms that a file names, by `crate::`, `ringfence::`, or enough `super::` to leave its own room.
fn imports(file: &Source) -> BTreeSet<String> {
    let code: String = squeeze(&code_of(&file.text));
    let mut rooms = BTreeSet::new();
    for root in ["crate::", "ringfence::"] {
        for (at, _) in code.match_indices(root) {
            let inside_a_word = code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_');
            // `$crate::` in a macro names the same root.
            if !inside_a_word {
                rooms.extend(heads(&code[at + root.len()..]));
            }
        }
    }
    for (at, _) in code.match_indices("super::") {
        let before = &code[..at];
        if before.ends_with("super::") || before.ends_with(|c: char| c.is_alphanumeric() || c == '_') {
            continue;
        }
        let mut rest = &code[at..];
        let mut climbed = 0;
        while let Some(shorter) = rest.strip_prefix("super::") {
            (rest, climbed) = (shorter, climbed + 1);
        }
        // Inline modules lie deeper than their file; there one more `super` is needed, and a room of that name is meant
        // only if it is one. Both are settled by asking whether the name is a room.
        if climbed >= file.depth() {
            let is_room = |name: &String| ARROWS.iter().any(|(room, _)| room == name);
            rooms.extend(heads(rest).into_iter().filter(is_room));
        }
    }
    rooms.retain(|room| !room.is_empty() && room != "self");
    // Items of lib.rs itself (a version, a macro) are not rooms.
    rooms.retain(|room| room.chars().next().is_some_and(char::is_lowercase));
    rooms
}

/// The first names of a use tree: `a::b` gives a, `{a, b::{c, d}}` gives a and b.
fn heads(tree: &str) -> Vec<String> {
    let head = |text: &str| text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let Some(group) = tree.strip_prefix('{') else { return vec![head(tree)] };
    let (mut level, mut names, mut fresh) = (0_usize, Vec::new(), true);
    for (at, c) in group.char_indices() {
        if fresh && level == 0 && (c.is_alphanumeric() || c == '_') {
            names.push(head(&group[at..]));
            fresh = false;
        }
        match c {
            '{' => level += 1,
            '}' if level == 0 => break,
            '}' => level -= 1,
            ',' if level == 0 => fresh = true,
            _ => {}
        }
    }
    names
}

/// All of `src/`.
fn sources() -> Vec<Source> {
    let root = std::env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    let root = root.join("src");
    let mut files = Vec::new();
    walk(&root, &root, &mut files);
    files.sort_by(|a, b| a.path.cmp(&b.path));
    assert!(files.len() >= 10, "only {} files found under src: the rules would look at nothing", files.len());
    files
}

fn walk(root: &Path, folder: &Path, files: &mut Vec<Source>) {
    for entry in fs::read_dir(folder).expect("src can be read") {
        let path = entry.expect("src can be read").path();
        if path.is_dir() {
            walk(root, &path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let relative = path.strip_prefix(root).expect("under src").to_string_lossy().replace('\\', "/");
            files.push(Source { path: relative, text: fs::read_to_string(&path).expect("source is UTF-8") });
        }
    }
}

fn edges(files: &[Source]) -> BTreeMap<String, BTreeSet<String>> {
    let mut edges: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for file in files.iter().filter(|file| file.room() != "lib") {
        edges.entry(file.room().to_owned()).or_default().extend(imports(file));
    }
    edges
}

fn assert_none(complaints: &[String]) {
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
}

#[test]
fn imports_point_downwards_only() {
    assert_none(&rules::arrows(&sources()));
}

#[test]
fn rooms_do_not_import_in_a_circle() {
    assert_none(&rules::cycles(&edges(&sources())));
    let table = ARROWS
        .iter()
        .map(|(room, below)| ((*room).to_owned(), below.iter().map(|below| (*below).to_owned()).collect()))
        .collect();
    assert_none(&rules::cycles(&table));
}

#[test]
fn no_file_is_too_long() {
    assert_none(&rules::lengths(&sources()));
}

#[test]
fn unsafe_stays_in_its_rooms() {
    assert_none(&rules::unsafe_rooms(&sources()));
}

#[test]
fn names_say_what_is_inside() {
    assert_none(&rules::names(&sources()));
}

#[test]
fn every_file_opens_with_its_purpose() {
    assert_none(&rules::openings(&sources()));
}

#[test]
fn nothing_is_left_to_do() {
    assert_none(&rules::unfinished(&sources()));
}

#[test]
fn workers_have_no_locks() {
    assert_none(&rules::locks(&sources()));
}

/// Each rule on snippets that break it, and on look-alikes that do not.
mod checkers {
    use super::*;

    fn file(path: &str, text: &str) -> Vec<Source> {
        vec![Source { path: path.into(), text: text.into() }]
    }

    #[track_caller]
    fn refused(complaints: &[String], wanted: &str) {
        assert_eq!(complaints.len(), 1, "{complaints:?}");
        assert!(complaints[0].contains(wanted), "{complaints:?}");
    }

    #[test]
    fn a_wrong_arrow_is_found_however_it_is_written() {
        for text in [
            "use crate::proxy::worker;",
            "use crate::{config, proxy};",
            "use crate::{\n    mesh::{self, Bind},\n    proxy::x,\n};",
            "fn f() { crate::proxy::x() }",
            "use crate::\n    proxy;",
            "use super::super::proxy::x;",
            "use ringfence::proxy;",
            "#[cfg(test)]\nmod tests { use crate::proxy::x; }",
            "pub(crate) use crate::proxy as p;",
        ] {
            refused(&rules::arrows(&file("control/consul.rs", text)), "`control` must not import `proxy`");
        }
        refused(&rules::arrows(&file("policy.rs", "use super::mesh;")), "must not import `mesh`");
        refused(&rules::arrows(&file("config.rs", "use crate::tls;")), "must not import `tls`");
    }

    #[test]
    fn what_only_looks_like_an_arrow_is_let_through() {
        for text in [
            "// use crate::proxy;",
            "/* crate::proxy /* crate::ring */ crate::proxy */",
            "const A: &str = \"crate::proxy\";",
            "const A: &str = r#\"a \" crate::proxy\"#;",
            "use super::proxy;",
            "use mycrate::proxy;",
            "use crate::{mesh::proxy, store};",
            "use ring::digest; use ::ring::aead;",
            "use crate::control::ring;",
            "const QUOTE: char = '\"'; // crate::proxy \"",
        ] {
            assert_none(&rules::arrows(&file("control/consul.rs", text)));
        }
    }

    #[test]
    fn every_forbidden_pair_of_the_planes_is_refused() {
        for (from, to) in [
            ("control", "proxy"),
            ("control", "ring"),
            ("admin", "proxy"),
            ("admin", "ring"),
            ("proxy", "control"),
            ("proxy", "admin"),
            ("cli", "proxy"),
            ("telemetry", "store"),
            ("sys", "ring"),
        ] {
            let path = format!("{from}/x.rs");
            refused(&rules::arrows(&file(&path, &format!("use crate::{to}::x;"))), &format!("must not import `{to}`"));
        }
    }

    #[test]
    fn an_unknown_room_is_refused() {
        refused(&rules::arrows(&file("cellar.rs", "")), "not in the table");
    }

    #[test]
    fn a_circle_is_found() {
        let files =
            [file("tls.rs", "use crate::mesh;"), file("mesh/a.rs", "use crate::policy;"), file("policy.rs", "use crate::tls;")];
        let found = rules::cycles(&edges(&files.into_iter().flatten().collect::<Vec<_>>()));
        assert_eq!(found.len(), 3, "{found:?}");
        assert_none(&rules::cycles(&edges(&file("tls/a.rs", "use crate::tls::b; use crate::identity;"))));
    }

    #[test]
    fn length_is_counted_exactly() {
        refused(&rules::lengths(&file("a.rs", &"\n".repeat(LINES_MAX + 1))), "701 lines");
        assert_none(&rules::lengths(&file("a.rs", &"\n".repeat(LINES_MAX))));
    }

    #[test]
    fn unsafe_is_found_in_code_only() {
        refused(&rules::unsafe_rooms(&file("tls/a.rs", "fn f() { unsafe { g() } }")), "tls/a.rs");
        refused(&rules::unsafe_rooms(&file("tls/a.rs", "fn f<'a>(x: &'a str) -> &'a str { unsafe { g(x) } }")), "tls/a.rs");
        assert_none(&rules::unsafe_rooms(&file("tls/a.rs", "#![deny(unsafe_code)] // unsafe\nconst A: &str = \"unsafe\";")));
        assert_none(&rules::unsafe_rooms(&file("ring/a.rs", "unsafe fn f() {}")));
    }

    #[test]
    fn empty_names_are_found() {
        for path in ["tls/utils.rs", "common.rs", "proxy/conn_manager.rs", "helper/x.rs", "types.rs", "proxy/mod.rs"] {
            refused(&rules::names(&file(path, "")), path);
        }
        assert_none(&rules::names(&file("proxy/model.rs", "")));
    }

    #[test]
    fn a_file_without_an_opening_is_found() {
        for text in ["use x;", "// comment", "\n//! late", "/// item", "//!"] {
            refused(&rules::openings(&file("a.rs", text)), "a.rs");
        }
        assert_none(&rules::openings(&file("a.rs", "//! Purpose.")));
    }

    #[test]
    fn holes_are_found_in_code_only() {
        for text in ["fn f() { todo!() }", "fn f() { unimplemented ! (\"x\") }", "let c = '\\''; todo!()"] {
            refused(&rules::unfinished(&file("a.rs", text)), "a.rs");
        }
        assert_none(&rules::unfinished(&file("a.rs", "// todo!()\nconst A: &str = \"todo!()\";")));
    }

    #[test]
    fn locks_are_found_before_the_tests_of_a_file() {
        for text in [
            "use std::sync::Mutex;",
            "x: std::sync::RwLock<u8>",
            "use std::sync::{Arc, Condvar};",
            "tokio::sync::mpsc::channel(1)",
        ] {
            assert_eq!(rules::locks(&file("proxy/a.rs", text)).len(), 1, "{text}");
        }
        assert_none(&rules::locks(&file("proxy/a.rs", "// Mutex\n#[cfg(test)]\nmod tests { use std::sync::Mutex; }")));
        assert_none(&rules::locks(&file("store.rs", "struct S(loom::sync::Mutex<u8>);")));
        assert_none(&rules::locks(&file("control.rs", "use tokio::sync::mpsc;")));
        // A test-only item further up does not hide what follows it.
        assert_eq!(rules::locks(&file("tls/a.rs", "#[cfg(test)]\nfn f() {}\nuse std::sync::Mutex;")).len(), 1);
    }
}
