//! What the kernel can do, in words that say what to change when it cannot.

use std::io;

use io_uring::{IoUring, opcode};

use super::RingError;
use crate::sys;

/// The oldest kernel with deferred task work, which the data plane is built on.
pub const KERNEL_MIN: (u32, u32) = (6, 1);

/// What was found.
#[derive(Debug, Clone)]
pub struct Probe {
    /// The kernel's release.
    pub kernel: String,
    /// Waiting is not counted as iowait (6.15): without it an idle proxy looks busy to load averages.
    pub no_iowait: bool,
}

/// Asks the kernel, and explains a refusal.
pub fn probe() -> Result<Probe, RingError> {
    let kernel = sys::kernel_release().unwrap_or_else(|_| "unknown".into());
    if parse_release(&kernel).is_some_and(|version| version < KERNEL_MIN) {
        return Err(RingError::Unsupported(format!(
            "kernel {kernel} is older than {}.{}: ringfence needs io_uring's SINGLE_ISSUER and DEFER_TASKRUN; boot a newer kernel, or keep Envoy on this host",
            KERNEL_MIN.0, KERNEL_MIN.1
        )));
    }
    let ring: IoUring = IoUring::builder().setup_single_issuer().setup_defer_taskrun().build(8).map_err(explain_setup)?;
    let mut probe = io_uring::Probe::new();
    ring.submitter().register_probe(&mut probe).map_err(|source| RingError::Call {
        call: "io_uring_register(PROBE)",
        source,
        remedy: "Allow io_uring_register in the seccomp profile of this service.",
    })?;
    let needed = [
        ("ACCEPT", opcode::AcceptMulti::CODE),
        ("CONNECT", opcode::Connect::CODE),
        ("RECV", opcode::Recv::CODE),
        ("RECVMSG", opcode::RecvMsg::CODE),
        ("SEND", opcode::Send::CODE),
        ("SENDMSG", opcode::SendMsg::CODE),
        ("ASYNC_CANCEL", opcode::AsyncCancel2::CODE),
        ("CLOSE", opcode::Close::CODE),
        ("READ", opcode::Read::CODE),
    ];
    let missing: Vec<_> = needed.iter().filter(|(_, code)| !probe.is_supported(*code)).map(|(name, _)| *name).collect();
    if !missing.is_empty() {
        return Err(RingError::Unsupported(format!(
            "kernel {kernel} lacks the io_uring operations {}: boot a stock kernel of {}.{} or later",
            missing.join(", "),
            KERNEL_MIN.0,
            KERNEL_MIN.1
        )));
    }
    Ok(Probe { kernel, no_iowait: ring.params().is_feature_no_iowait() })
}

/// Turns the error of `io_uring_setup` into its cause and remedy.
pub(super) fn explain_setup(source: io::Error) -> RingError {
    let remedy = match source.raw_os_error() {
        Some(libc::ENOSYS) => "This kernel is built without io_uring: boot one with CONFIG_IO_URING.",
        Some(libc::EPERM) => {
            "io_uring is forbidden here: set sysctl kernel.io_uring_disabled=0 (or 1 with this process in kernel.io_uring_group), and allow io_uring_setup, io_uring_enter and io_uring_register in the seccomp profile (systemd: SystemCallFilter)."
        }
        Some(libc::EINVAL) => "The kernel does not know SINGLE_ISSUER or DEFER_TASKRUN: it must be 6.1 or later.",
        Some(libc::ENOMEM) => "Locked memory ran out: raise LimitMEMLOCK of the service (8 MiB a worker is plenty).",
        Some(libc::EMFILE | libc::ENFILE) => "Descriptors ran out: raise LimitNOFILE of the service.",
        _ => "See `ringfence check`.",
    };
    RingError::Call { call: "io_uring_setup", source, remedy }
}

fn parse_release(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_read() {
        assert_eq!(parse_release("6.18.44-fc"), Some((6, 18)));
        assert_eq!(parse_release("5.10.0-28-amd64"), Some((5, 10)));
        assert_eq!(parse_release("weird"), None);
    }

    #[test]
    fn a_refusal_names_its_remedy() {
        for (errno, word) in
            [(libc::EPERM, "io_uring_disabled"), (libc::ENOSYS, "CONFIG_IO_URING"), (libc::ENOMEM, "LimitMEMLOCK")]
        {
            let text = explain_setup(io::Error::from_raw_os_error(errno)).to_string();
            assert!(text.contains(word), "{text}");
        }
    }

    #[test]
    fn this_kernel_is_good_enough() {
        probe().expect("tests need io_uring");
    }
}
