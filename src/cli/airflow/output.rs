//! Delivers the files: to standard output with headings, or into a folder.
//!
//! Invariant: a file that differs from what would be written is somebody's work. Unless that was asked for by name, none is
//! replaced, and then none at all is written. A file appears whole or not at all.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::file::File;
use crate::app::AppError;

const MODE: u32 = 0o644;
const MODE_PRIVATE: u32 = 0o600;
const MODE_SCRIPT: u32 = 0o755;

/// Where lines go.
#[derive(Debug)]
pub(super) struct Output {
    is_json: bool,
}

/// What became of a file in a folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    New,
    Same,
    Different,
}

impl Output {
    pub(super) fn new(is_json: bool) -> Self {
        Self { is_json }
    }

    /// One event: a line of text, or its JSON.
    pub(super) fn tell(&self, text: &str, event: &Value) {
        self.print(&if self.is_json { format!("{event}\n") } else { format!("{text}\n") });
    }

    /// Every file with its heading.
    pub(super) fn print_all(&self, files: &[File]) {
        for file in files {
            if self.is_json {
                self.print(&format!(
                    "{}\n",
                    json!({"file": file.path, "mode": format!("{:04o}", mode(file)), "text": file.text})
                ));
            } else {
                self.print(&format!("==> {} <==\n{}\n", file.path, file.text));
            }
        }
    }

    /// Writes them below `folder`.
    pub(super) fn write_all(&self, files: &[File], folder: &Path, force: bool) -> Result<(), AppError> {
        let states = files.iter().map(|file| state(file, folder)).collect::<Result<Vec<_>, _>>()?;
        let different =
            files.iter().zip(&states).filter(|(_, state)| **state == State::Different).map(|(file, _)| file.path.as_str());
        let different: Vec<&str> = different.collect();
        if !different.is_empty() && !force {
            return Err(AppError::Config(format!(
                "-out {}: differs from what would be written: {}; nothing was written. Write into an empty folder and compare, or add -force \
                 to replace",
                folder.display(),
                different.join(", ")
            )));
        }
        for (file, state) in files.iter().zip(states) {
            let path = folder.join(&file.path);
            let done = match state {
                State::Same => "unchanged",
                State::New => "written",
                State::Different => "replaced",
            };
            if state != State::Same {
                write(file, &path).map_err(|source| failed(&path, &source))?;
            }
            self.tell(&format!("{done:<9} {}", path.display()), &json!({"file": path.display().to_string(), "done": done}));
        }
        Ok(())
    }

    fn print(&self, text: &str) {
        // A reader that went away (`| head`) is no fault, and -apply still has its work.
        let _ = io::stdout().write_all(text.as_bytes());
    }
}

fn state(file: &File, folder: &Path) -> Result<State, AppError> {
    let path = folder.join(&file.path);
    match fs::read(&path) {
        Ok(bytes) if bytes == file.text.as_bytes() => Ok(State::Same),
        Ok(_) => Ok(State::Different),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(State::New),
        Err(source) => Err(failed(&path, &source)),
    }
}

/// Beside its place first, then into it.
fn write(file: &File, path: &Path) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let beside = PathBuf::from(beside);
    match fs::remove_file(&beside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // `create_new`: nothing that stands there by that name is followed or shared.
    let mut open = fs::OpenOptions::new().write(true).create_new(true).mode(MODE_PRIVATE).open(&beside)?;
    open.write_all(file.text.as_bytes())?;
    open.set_permissions(fs::Permissions::from_mode(mode(file)))?;
    open.sync_all()?;
    fs::rename(&beside, path)
}

fn mode(file: &File) -> u32 {
    if file.is_private {
        MODE_PRIVATE
    } else if file.text.starts_with("#!") {
        MODE_SCRIPT
    } else {
        MODE
    }
}

fn failed(path: &Path, source: &io::Error) -> AppError {
    AppError::Config(format!("-out: {}: {source}; name a folder that you may write, with files in it or none", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(text: &str) -> Vec<File> {
        vec![
            File::new("a/b.txt", text.to_owned()),
            File::new("run.sh", "#!/bin/sh\n".to_owned()),
            File { path: "secret".into(), text: "x=\n".into(), is_private: true },
        ]
    }

    fn mode_of(path: &Path) -> u32 {
        fs::metadata(path).expect("exists").permissions().mode() & 0o777
    }

    #[test]
    fn files_are_written_once_and_somebodys_work_stays() {
        let folder = tempfile::tempdir().expect("a folder");
        let output = Output::new(true);
        output.write_all(&files("one\n"), folder.path(), false).expect("written");
        output.write_all(&files("one\n"), folder.path(), false).expect("the same again is nothing to do");
        fs::remove_file(folder.path().join("run.sh")).expect("removed");
        let error = output.write_all(&files("two\n"), folder.path(), false).expect_err("refused").to_string();
        assert!(error.contains("a/b.txt") && error.contains("-force"), "{error}");
        assert_eq!(fs::read_to_string(folder.path().join("a/b.txt")).expect("read"), "one\n");
        assert!(!folder.path().join("run.sh").exists(), "nothing is written beside a refusal");
        output.write_all(&files("two\n"), folder.path(), true).expect("forced");
        assert_eq!(fs::read_to_string(folder.path().join("a/b.txt")).expect("read"), "two\n");
        assert_eq!(fs::read_dir(folder.path().join("a")).expect("listed").count(), 1, "nothing is left over");
    }

    #[test]
    fn modes_say_who_may_read_and_what_runs() {
        let folder = tempfile::tempdir().expect("a folder");
        Output::new(true).write_all(&files("one\n"), folder.path(), false).expect("written");
        assert_eq!(mode_of(&folder.path().join("a/b.txt")), 0o644);
        assert_eq!(mode_of(&folder.path().join("run.sh")), 0o755);
        assert_eq!(mode_of(&folder.path().join("secret")), 0o600);
    }

    #[test]
    fn a_folder_that_is_none_is_named() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("file");
        fs::write(&file, "x").expect("written");
        let error = Output::new(true).write_all(&files("one\n"), &file, false).expect_err("refused").to_string();
        assert!(error.contains(&file.display().to_string()) && error.contains("name a folder"), "{error}");
    }
}
