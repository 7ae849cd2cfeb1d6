//! The bootstrap's text, from where Consul and others put it.
//!
//! Invariant: the path is opened once and read to its end: it may be a FIFO that somebody writes to a single time, and then the
//! text is kept in memory for the process that an upgrade starts. What is read is bounded in bytes ([`BYTES_MAX`]) and, for a writer that never comes, in time ([`READ_TIMEOUT`]).

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value as Json;
use zeroize::Zeroizing;

use crate::sys::handover;

/// Most bytes of a bootstrap. Consul's has 20 kB.
const BYTES_MAX: u64 = 16 << 20;
/// How long a FIFO's writer may take; Consul's gives up after 10 s.
const READ_TIMEOUT: Duration = Duration::from_secs(15);

/// How a text is to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Json,
    Yaml,
    /// A FIFO or a descriptor has no extension to tell.
    Either,
}

/// The bootstrap at `path`.
pub(super) fn file(path: &Path) -> Result<Json, String> {
    let form = match path.extension().and_then(std::ffi::OsStr::to_str) {
        Some("json") => Form::Json,
        Some("yaml" | "yml") => Form::Yaml,
        Some(other @ ("pb" | "pb_text")) => return Err(format!(".{other} is not read: write the bootstrap as JSON or YAML")),
        _ => Form::Either,
    };
    parse(&text(path)?, form)
}

/// The bootstrap in `text` itself (`--config-yaml`).
pub(super) fn yaml(text: &str) -> Result<Json, String> {
    parse(text, Form::Yaml)
}

fn text(path: &Path) -> Result<Zeroizing<String>, String> {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    let owned: PathBuf = path.to_owned();
    // Opening a FIFO waits for its writer, for ever if need be: so another thread does. It ends with the process.
    std::thread::Builder::new()
        .name("bootstrap".to_owned())
        .spawn(move || {
            let read = File::open(owned).and_then(|file| {
                let mut text = Zeroizing::new(String::new());
                let once = file.metadata()?.file_type().is_fifo();
                file.take(BYTES_MAX + 1).read_to_string(&mut text)?;
                Ok((text, once))
            });
            // Nobody listens any more: the time was over.
            let _ = sender.send(read);
        })
        .map_err(|error| format!("no thread to read it: {error}"))?;
    let clock = tokio::runtime::Builder::new_current_thread().enable_time().build();
    let clock = clock.map_err(|error| format!("no clock to wait for it: {error}"))?;
    let read = clock.block_on(async { tokio::time::timeout(READ_TIMEOUT, receiver).await });
    match read.map(|sent| sent.expect("the reader sends before it ends")) {
        Ok(Ok((text, _))) if text.len() as u64 > BYTES_MAX => Err(format!("it is larger than {BYTES_MAX} bytes")),
        Ok(Ok((text, once))) => {
            if once {
                // Without it this process serves all the same, and only an upgrade would not find it.
                let _ = handover::keep_argument(path, text.as_bytes());
            }
            Ok(text)
        }
        Ok(Err(error)) => Err(format!("Invalid path: {} ({error})", path.display())),
        Err(_) => Err(format!("nobody wrote it within {READ_TIMEOUT:?}")),
    }
}

fn parse(text: &str, form: Form) -> Result<Json, String> {
    let json = || serde_json::from_str::<Json>(text).map_err(|error| format!("Unable to parse JSON: {error}"));
    let yaml = || serde_saphyr::from_str::<Json>(text).map_err(|error| format!("Unable to parse YAML: {error}"));
    let parsed = match form {
        Form::Json => json(),
        Form::Yaml => yaml(),
        // What begins as JSON has JSON's errors.
        Form::Either if text.trim_start().starts_with('{') => json(),
        Form::Either => yaml(),
    }?;
    if parsed.is_object() { Ok(parsed) } else { Err("it is no object of fields".to_owned()) }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn json_and_yaml_are_told_apart_by_extension_or_by_look() {
        let folder = tempfile::tempdir().expect("a folder");
        let wanted = json!({ "node": { "id": "web" } });
        for (name, text) in [
            ("a.json", "{\"node\": {\"id\": \"web\"}}"),
            ("a.yaml", "node:\n  id: web\n"),
            ("a.yml", "{node: {id: web}}"),
            ("fifo", "  {\"node\": {\"id\": \"web\"}}"),
            ("fd", "node: {id: web}"),
        ] {
            let path = folder.path().join(name);
            std::fs::write(&path, text).expect("it can be written");
            assert_eq!(file(&path), Ok(wanted.clone()), "{name}");
        }
        for (name, text, why) in [
            ("b.json", "node: {id: web}", "parse JSON"),
            ("b.yaml", "node: {", "parse YAML"),
            ("b.yaml", "- a", "no object"),
            ("b.yaml", "", "no object"),
            ("b", "{\"node\": }", "parse JSON"),
            ("b.pb", "", "JSON or YAML"),
        ] {
            let path = folder.path().join(name);
            std::fs::write(&path, text).expect("it can be written");
            let error = file(&path).expect_err(name);
            assert!(error.contains(why), "{name}: {error}");
        }
        assert!(file(Path::new("/nowhere/x.json")).expect_err("there is none").starts_with("Invalid path: /nowhere/x.json"));
    }

    #[test]
    fn an_anchor_bomb_is_refused() {
        let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
        for level in 1..12 {
            let one = format!("*a{}", level - 1);
            bomb.push_str(&format!("a{level}: &a{level} [{}]\n", vec![one; 10].join(", ")));
        }
        assert!(yaml(&bomb).is_err());
    }
}
