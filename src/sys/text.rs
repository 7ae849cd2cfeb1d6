//! Memory that was needed once: the code of the command line, and what the reading of settings and first answers had allocated.
//!
//! Invariant: of mappings only those of files are let go of that nobody can write to and that have no page of their own (where
//! addresses were put in at the start, they have). What is needed again comes from the page cache, 64 KiB with a fault; of the heap
//! only what is free already goes.

use std::fs;
use std::io;

/// Takes the pages of code and constants out of the process, and gives the bytes of the mappings that it looked at. What is used
/// again comes back as it is used.
pub fn let_go_of_code() -> io::Result<usize> {
    let maps = fs::read_to_string("/proc/self/smaps")?;
    let mut bytes = 0;
    for (start, end) in unchanged(&maps) {
        // SAFETY: the mapping is private, of a file, not writable and without changed pages: MADV_DONTNEED makes the next access
        // read the same bytes from the file again, for every thread and at any moment.
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

/// First and last address of each mapping that is as its file is, from `/proc/self/smaps`.
fn unchanged(maps: &str) -> Vec<(usize, usize)> {
    let mut found = Vec::new();
    let mut current = None;
    for line in maps.lines() {
        // Behind the line of a mapping stand what is counted of it, each with its name.
        match line.split_once(':') {
            Some(("Anonymous" | "Swap", kib)) if kib.trim() != "0 kB" => current = None,
            Some(("VmFlags", _)) => found.extend(current.take()),
            _ => current = mapping(line).or(current),
        }
    }
    found
}

/// First and last address of a mapping of a file that nobody can write to.
fn mapping(line: &str) -> Option<(usize, usize)> {
    let mut fields = line.split_ascii_whitespace();
    let (range, rights) = (fields.next()?, fields.next()?);
    let file = fields.nth(3).is_some_and(|file| file.starts_with('/'));
    let (start, end) = range.split_once('-')?;
    let range = usize::from_str_radix(start, 16).ok().zip(usize::from_str_radix(end, 16).ok())?;
    (matches!(rights, "r-xp" | "r--p") && file).then_some(range)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_as_its_file_is_is_meant() {
        let counted = |line: &str, anonymous: u32, swap: u32| {
            format!("{line}\nSize: 12 kB\nAnonymous: {anonymous} kB\nSwap:      {swap} kB\nVmFlags: rd mr mw me\n")
        };
        let of = |line: &str| unchanged(&counted(line, 0, 0));
        let code = "7f1c3e9d9000-7f1c3eb2e000 r-xp 00026000 fe:00 919                        /usr/lib/libc.so.6";
        let constants = "55d0-55d1 r--p 00000000 fe:00 1 /usr/bin/with: colon";
        assert_eq!((of(code), of(constants)), (vec![(0x7f1c_3e9d_9000, 0x7f1c_3eb2_e000)], vec![(0x55d0, 0x55d1)]));
        for other in [
            "55d0-55d1 rw-p 00000000 fe:00 1 /usr/bin/x",
            "55d0-55d1 r--s 00000000 fe:00 1 /usr/bin/x",
            "7ffe1-7ffe3 r-xp 00000000 00:00 0 [vdso]",
            "7ffe1-7ffe3 r-xp 00000000 00:00 0",
            "",
        ] {
            assert_eq!(of(other), [], "{other}");
        }
        // Addresses were put in, and perhaps are not in memory just now.
        let all = [counted(constants, 572, 0), counted(code, 0, 0), counted(constants, 0, 4)].concat();
        assert_eq!(unchanged(&all), of(code));
    }

    #[test]
    fn the_process_goes_on() {
        let working = std::thread::spawn(|| (0..2_000_000_u64).fold(0, |sum: u64, one| sum.wrapping_mul(31).wrapping_add(one)));
        assert!(let_go_of_code().expect("the mappings") > 0);
        let same = (0..2_000_000_u64).fold(0, |sum: u64, one| sum.wrapping_mul(31).wrapping_add(one));
        assert_eq!(working.join().expect("a thread"), same);
    }
}
