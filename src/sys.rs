//! System calls that no safe crate wraps: limits and process flags.
#![allow(unsafe_code, reason = "thin wrappers of libc calls")]

use std::io;

/// Raises the soft limit of open files to the hard limit. Returns the soft limit before and after.
pub fn raise_descriptor_limit() -> io::Result<(u64, u64)> {
    let (soft, hard) = get(libc::RLIMIT_NOFILE)?;
    if soft < hard {
        set(libc::RLIMIT_NOFILE, hard, hard)?;
    }
    Ok((soft, hard))
}

/// The limits (soft, hard) on locked memory in bytes.
pub fn memlock_limit() -> io::Result<(u64, u64)> {
    get(libc::RLIMIT_MEMLOCK)
}

/// Keys live in this process's memory: no core file may take them to disk, no other process of the user may attach.
pub fn forbid_core_dumps() -> io::Result<()> {
    set(libc::RLIMIT_CORE, 0, 0)?;
    // SAFETY: PR_SET_DUMPABLE takes plain integers and changes a flag of this process only.
    if unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) } == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn get(resource: libc::__rlimit_resource_t) -> io::Result<(u64, u64)> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a valid rlimit for the call to fill.
    if unsafe { libc::getrlimit(resource, &raw mut limit) } == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok((limit.rlim_cur, limit.rlim_max))
}

fn set(resource: libc::__rlimit_resource_t, soft: u64, hard: u64) -> io::Result<()> {
    let limit = libc::rlimit { rlim_cur: soft, rlim_max: hard };
    // SAFETY: `limit` is a valid rlimit that outlives the call.
    if unsafe { libc::setrlimit(resource, &raw const limit) } == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
