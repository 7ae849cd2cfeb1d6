//! io_uring: what the kernel offers.

/// What the kernel offers.
#[derive(Debug, Clone, Default)]
pub struct Probe {
    /// Kernel release, as `uname -r` prints it.
    pub kernel: String,
    /// Features that the data plane needs and the kernel lacks, each with a remedy.
    pub missing: Vec<String>,
}

/// Why io_uring cannot be used at all.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// Set-up was refused.
    #[error("io_uring is refused: {0}")]
    Refused(#[from] std::io::Error),
}

/// Asks the kernel.
pub fn probe() -> Result<Probe, RingError> {
    let _ring = io_uring::IoUring::new(2)?;
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned();
    Ok(Probe { kernel, missing: Vec::new() })
}
