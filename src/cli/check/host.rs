//! This host: kernel, limits, files that the flags name.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::report::Report;
use crate::config::{self, LogTarget, TokenSource};
use crate::{ring, sys};

/// Fewer descriptors than this are too few for a busy service: two a connection.
const DESCRIPTORS_WANTED: u64 = 65_536;
/// Locked memory that one worker's ring may need on kernels that still charge it.
const MEMLOCK_BYTES_A_WORKER: u64 = 1 << 20;

pub(super) fn check(settings: &config::Sidecar, report: &mut Report) {
    io_uring(report);
    limits(settings.plane.workers, report);
    files(settings, report);
}

fn io_uring(report: &mut Report) {
    match ring::probe() {
        Err(error) => report.fail(
            "io_uring",
            error.to_string(),
            "kernel 6.1 or later, sysctl kernel.io_uring_disabled=0, and a seccomp profile that lets io_uring_setup, \
             io_uring_enter and io_uring_register through",
        ),
        Ok(probe) if probe.no_iowait => report.ok("io_uring", format!("kernel {} has all features", probe.kernel)),
        Ok(probe) => report.warn(
            "io_uring",
            format!("kernel {} counts an idle worker's wait as iowait", probe.kernel),
            "kernel 6.15 or later if load averages or autoscalers read iowait; nothing else is missing",
        ),
    }
}

fn limits(workers: usize, report: &mut Report) {
    match sys::raise_descriptor_limit() {
        Ok((_, now)) if now < DESCRIPTORS_WANTED => report.warn(
            "file descriptors",
            format!("{now}, enough for {} connections", now / 2),
            format!("LimitNOFILE={DESCRIPTORS_WANTED} in the unit, or ulimit -Hn {DESCRIPTORS_WANTED}"),
        ),
        Ok((before, now)) => report.ok("file descriptors", format!("{now} (found {before}, raised at start)")),
        Err(error) => report.fail("file descriptors", error.to_string(), "let the process call setrlimit"),
    }
    let wanted = MEMLOCK_BYTES_A_WORKER.saturating_mul(workers as u64);
    match sys::memlock_limit() {
        Ok((soft, _)) if soft < wanted => report.warn(
            "locked memory",
            format!("{} KiB for {workers} workers", soft >> 10),
            format!("LimitMEMLOCK={wanted} in the unit; older kernels charge rings to it"),
        ),
        Ok((u64::MAX, _)) => report.ok("locked memory", "unlimited"),
        Ok((soft, _)) => report.ok("locked memory", format!("{} KiB", soft >> 10)),
        Err(error) => report.fail("locked memory", error.to_string(), "let the process call getrlimit"),
    }
    match sys::forbid_core_dumps() {
        Ok(()) => report.ok("core dumps", "off while it runs: keys stay in memory"),
        Err(error) => report.fail("core dumps", error.to_string(), "let the process call prctl and setrlimit"),
    }
}

fn files(settings: &config::Sidecar, report: &mut Report) {
    let secret = match &settings.consul.token {
        TokenSource::File(path) => Some(("token file", path)),
        TokenSource::Login(login) => Some(("bearer token file", &login.bearer_token_file)),
        TokenSource::None | TokenSource::Static(_) => None,
    };
    if let Some((what, path)) = secret {
        secret_file(what, path, report);
    }
    let logs = [
        match &settings.connection_log {
            LogTarget::File(path) => Some(("connection log", path)),
            LogTarget::None | LogTarget::Stdout | LogTarget::Stderr => None,
        },
        settings.admin.access_log.as_ref().map(|path| ("admin access log", path)),
    ];
    for (what, path) in logs.into_iter().flatten() {
        log_file(what, path, report);
    }
    match std::net::TcpListener::bind(settings.admin.bind) {
        Ok(_) => report.ok("admin port", format!("{} is free", settings.admin.bind)),
        Err(error) => report.warn(
            "admin port",
            format!("{}: {error}", settings.admin.bind),
            "good if the sidecar runs already; else choose another port with -admin-bind",
        ),
    }
}

fn secret_file(what: &str, path: &Path, report: &mut Report) {
    match std::fs::metadata(path).and_then(|metadata| std::fs::read(path).map(|bytes| (metadata, zeroize::Zeroizing::new(bytes))))
    {
        Err(error) => report.fail(what, format!("{}: {error}", path.display()), "make it readable for this user"),
        Ok((_, bytes)) if bytes.trim_ascii().is_empty() => {
            report.fail(what, format!("{} is empty", path.display()), "write the token into it");
        }
        Ok((metadata, _)) if metadata.permissions().mode() & 0o007 != 0 => report.warn(
            what,
            format!("{} can be read by everybody on this host", path.display()),
            format!("chmod o= {}", path.display()),
        ),
        Ok(_) => report.ok(what, path.display().to_string()),
    }
}

/// Opens the file for appending, as the sidecar will; a file that is not there yet is left absent.
fn log_file(what: &str, path: &Path, report: &mut Report) {
    let (target, opened) = if path.exists() {
        (path, std::fs::OpenOptions::new().append(true).open(path).map(drop))
    } else {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."));
        (folder, std::fs::read_dir(folder).map(drop))
    };
    match opened {
        Ok(()) => report.ok(what, path.display().to_string()),
        Err(error) => report.fail(what, format!("{}: {error}", target.display()), "make it writable for this user"),
    }
}
