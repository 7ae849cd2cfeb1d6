//! Memory that was needed once: the code of the command line, and what the reading of settings and first answers had allocated.
//!
//! Invariant: of mappings only executable ones of files are let go of. They are never written to, so what is needed again comes
//! from the page cache, 64 KiB with a fault; of the heap only what is free already.

use std::fs;
use std::io;

/// Takes the pages of code out of the process, and gives the bytes of the mappings that it looked at. What is used again comes
/// back as it is used.
pub fn let_go_of_code() -> io::Result<usize> {
    let maps = fs::read_to_string("/proc/self/maps")?;
    let mut bytes = 0;
    for (start, end) in maps.lines().filter_map(code) {
        // SAFETY: the mapping is executable, private and of a file, hence without changed pages: MADV_DONTNEED makes the next
        // access read the same bytes from the file again, for every thread and at any moment.
        let result = unsafe { libc::madvise(std::ptr::without_provenance_mut(start), end - start, libc::MADV_DONTNEED) };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        bytes += end - start;
    }
    Ok(bytes)
}

/// Gives free pages of the heap back to the kernel: the descriptors that a bootstrap is checked against take 5 MiB for a moment.
#[cfg(target_env = "gnu")]
pub fn let_go_of_free_heap() {
    // SAFETY: takes the allocator's own locks; no allocation that is in use is touched.
    unsafe { libc::malloc_trim(0) };
}

/// Other C libraries give it back by themselves, or never.
#[cfg(not(target_env = "gnu"))]
pub fn let_go_of_free_heap() {}

/// First and last address of an executable mapping of a file.
fn code(line: &str) -> Option<(usize, usize)> {
    let mut fields = line.split_ascii_whitespace();
    let (range, rights) = (fields.next()?, fields.next()?);
    let file = fields.nth(3).is_some_and(|file| file.starts_with('/'));
    let (start, end) = range.split_once('-')?;
    let range = usize::from_str_radix(start, 16).ok().zip(usize::from_str_radix(end, 16).ok())?;
    (rights == "r-xp" && file).then_some(range)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_code_of_files_is_meant() {
        let line = "7f1c3e9d9000-7f1c3eb2e000 r-xp 00026000 fe:00 919 /usr/lib/libc.so.6";
        assert_eq!(code(line), Some((0x7f1c_3e9d_9000, 0x7f1c_3eb2_e000)));
        for other in [
            "55d0-55d1 rw-p 00000000 fe:00 1 /usr/bin/x",
            "55d0-55d1 r--p 00000000 fe:00 1 /usr/bin/x",
            "7ffe1-7ffe3 r-xp 00000000 00:00 0 [vdso]",
            "7ffe1-7ffe3 r-xp 00000000 00:00 0",
            "",
        ] {
            assert_eq!(code(other), None, "{other}");
        }
    }

    #[test]
    fn the_process_goes_on() {
        let working = std::thread::spawn(|| (0..2_000_000_u64).fold(0, |sum: u64, one| sum.wrapping_mul(31).wrapping_add(one)));
        assert!(let_go_of_code().expect("the mappings") > 0);
        let same = (0..2_000_000_u64).fold(0, |sum: u64, one| sum.wrapping_mul(31).wrapping_add(one));
        assert_eq!(working.join().expect("a thread"), same);
    }
}
