//! The buffer ring: slots that the kernel hands to sockets when bytes arrive, so that an idle connection owns none.
//!
//! Why unsafe: the ring of entries is memory that the kernel reads.
#![allow(unsafe_code, reason = "memory shared with the kernel; one of the three rooms where unsafe may stand")]

use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, Ordering};

use io_uring::{IoUring, types};

use super::{GROUP, call};
use crate::buffer::{Class, HEADROOM_BYTES, Lease, Pool, RECORD_ROOM_BYTES};
use crate::ring::{RingError, SHARED_BUFFERS};

/// The buffers that idle sockets share: the kernel picks one when bytes arrive.
pub(super) struct SharedBuffers {
    entries: NonNull<types::BufRingEntry>,
    pub(super) leases: Vec<Lease>,
    addresses: Vec<u64>,
    /// How many were ever handed to the kernel.
    pub(super) provided: u16,
    tail: u16,
}

// SAFETY: the memory belongs to this struct and its ring alone; neither is bound to the thread that made it until the
// ring is enabled.
unsafe impl Send for SharedBuffers {}

/// So many are handed to the kernel at first, and as many more each time that all of them are out (`benches/NOTES.md` has what
/// other numbers brought). It hands them out in turn, so each of them becomes real memory with the first messages, however few
/// come at once.
const STEP: u16 = 64;
const ENTRIES_BYTES: usize = SHARED_BUFFERS as usize * size_of::<types::BufRingEntry>();

impl SharedBuffers {
    pub(super) fn new(ring: &IoUring, pool: &mut Pool) -> Result<Self, RingError> {
        // SAFETY: a new anonymous mapping, page aligned as the kernel wants it.
        let memory = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                ENTRIES_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        let entries = NonNull::new(memory).filter(|_| memory != libc::MAP_FAILED).ok_or_else(|| RingError::Call {
            call: "mmap",
            source: io::Error::last_os_error(),
            remedy: "Give the service more memory.",
        })?;
        let mut shared = Self { entries: entries.cast(), leases: Vec::new(), addresses: Vec::new(), provided: 0, tail: 0 };
        // SAFETY: the memory holds SHARED_BUFFERS entries and lives until this struct is dropped, after the ring.
        unsafe { ring.submitter().register_buf_ring_with_flags(entries.as_ptr() as u64, SHARED_BUFFERS, GROUP, 0) }
            .map_err(call("io_uring_register(PBUF_RING)", "The kernel must be 5.19 or later, and locked memory must suffice."))?;
        for buffer in 0..SHARED_BUFFERS {
            let lease = pool.lease(Class::Slot).ok_or_else(|| {
                RingError::Unsupported(format!(
                    "a buffer budget of {} bytes is too small for {SHARED_BUFFERS} shared buffers",
                    pool.budget_bytes()
                ))
            })?;
            shared.addresses.push(pool.span(&lease, HEADROOM_BYTES, RECORD_ROOM_BYTES - HEADROOM_BYTES).start.as_ptr() as u64);
            if buffer < STEP {
                // Its first page becomes real now: this is no time of messages.
                pool.bytes(&lease)[HEADROOM_BYTES] = 0;
            }
            shared.leases.push(lease);
        }
        shared.grow();
        Ok(shared)
    }

    /// Hands more of them to the kernel, while there are any that it never had.
    pub(super) fn grow(&mut self) {
        let more = self.provided..self.provided.saturating_add(STEP).min(SHARED_BUFFERS);
        self.provided = more.end;
        more.for_each(|buffer| self.provide(buffer));
    }

    pub(super) fn provide(&mut self, buffer: u16) {
        let index = usize::from(self.tail & (SHARED_BUFFERS - 1));
        // SAFETY: the index is below SHARED_BUFFERS. The kernel reads the entry only after the tail below is stored.
        let entry = unsafe { &mut *self.entries.as_ptr().add(index) };
        entry.set_addr(self.addresses[usize::from(buffer)]);
        entry.set_len(u32::try_from(RECORD_ROOM_BYTES - HEADROOM_BYTES).unwrap_or(0));
        entry.set_bid(buffer);
        self.tail = self.tail.wrapping_add(1);
        // SAFETY: the tail is a field of the first entry, which is ours to write; the kernel only reads it.
        let tail = unsafe { AtomicU16::from_ptr(types::BufRingEntry::tail(self.entries.as_ptr()).cast_mut()) };
        tail.store(self.tail, Ordering::Release);
    }
}

impl Drop for SharedBuffers {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this length; the ring was dropped before (field order of `Uring`).
        unsafe { libc::munmap(self.entries.as_ptr().cast(), ENTRIES_BYTES) };
    }
}
