//! The worker's buffers: one mapping with a budget, leased in three sizes.
//!
//! Invariant: two live leases never overlap, and a lease stays where it is until it is given back, so the kernel may hold
//! its address. The budget is fixed at start: an empty pool says no, it never grows.
//!
//! Knows no socket and no record format, only how much room a record needs.
//!
//! Why unsafe: memory whose address the kernel keeps must not move, which no safe container promises.
#![allow(unsafe_code, reason = "memory shared with the kernel; one of the three rooms where unsafe may stand")]

use std::io;
use std::ptr::NonNull;

/// Room for one record of any version and suite with [`HEADROOM_BYTES`] before it: 16 + 13 header and nonce + 16,384 + 17
/// trailer, rounded up to a cache line.
pub const RECORD_ROOM_BYTES: usize = 16_448;
/// What every lease has beyond its records: a record that begins in front of it can always be completed where it lies, so
/// that no partial record ever moves. Mostly address space: its pages become real only when such a record comes.
pub const SLACK_BYTES: usize = RECORD_ROOM_BYTES;
/// The smallest lease: whole pages, so that a small message makes one page real and not two.
pub const SLOT_BYTES: usize = (RECORD_ROOM_BYTES + SLACK_BYTES).next_multiple_of(PAGE_BYTES);
/// Where received bytes start in a slot, so that a header fits before them.
pub const HEADROOM_BYTES: usize = 16;
/// Records in a medium region.
pub const MEDIUM_SLOTS: usize = 8;
/// Records in a large region.
pub const LARGE_SLOTS: usize = 32;
/// Free medium and large regions that keep their memory; above it they are handed back to the system.
const WARM_REGIONS_MAX: usize = 8;
const PAGE_BYTES: usize = 4_096;

/// How much is leased at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// One record.
    Slot,
    /// [`MEDIUM_SLOTS`] records.
    Medium,
    /// [`LARGE_SLOTS`] records.
    Large,
}

impl Class {
    /// Its length.
    pub const fn bytes(self) -> usize {
        match self {
            Self::Slot => SLOT_BYTES,
            Self::Medium => (MEDIUM_SLOTS * RECORD_ROOM_BYTES + SLACK_BYTES).next_multiple_of(PAGE_BYTES),
            Self::Large => (LARGE_SLOTS * RECORD_ROOM_BYTES + SLACK_BYTES).next_multiple_of(PAGE_BYTES),
        }
    }

    /// Records that fit.
    pub const fn slots(self) -> usize {
        match self {
            Self::Slot => 1,
            Self::Medium => MEDIUM_SLOTS,
            Self::Large => LARGE_SLOTS,
        }
    }
}

/// A part of the pool that belongs to one holder until [`Pool::give_back`]. Dropping it instead leaks its room.
#[derive(Debug)]
#[must_use = "a lease that is dropped is lost to the pool"]
pub struct Lease {
    offset: u32,
    class: Class,
}

impl Lease {
    /// Its size class.
    pub fn class(&self) -> Class {
        self.class
    }
}

/// An address range inside a lease, for the ring. Valid as long as the lease it came from is not given back.
#[derive(Debug, Clone, Copy)]
pub struct Span {
    pub(crate) start: NonNull<u8>,
    pub(crate) len: u32,
}

impl Span {
    /// Its length.
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// Whether it is empty.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// One worker's buffers.
#[derive(Debug)]
pub struct Pool {
    base: NonNull<u8>,
    budget_bytes: usize,
    carved_bytes: usize,
    free: [Vec<u32>; 3],
    leased_bytes: usize,
    leases: usize,
}

// SAFETY: the mapping belongs to the pool alone; nothing in it is bound to the thread that made it.
unsafe impl Send for Pool {}

impl Pool {
    /// Maps `budget_bytes` of address space. Pages become real when first touched.
    pub fn new(budget_bytes: usize) -> io::Result<Self> {
        let budget_bytes = budget_bytes.next_multiple_of(PAGE_BYTES).min(u32::MAX as usize & !(PAGE_BYTES - 1));
        // SAFETY: a new anonymous private mapping, placed by the kernel; no existing memory is touched.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                budget_bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the range was just mapped. Plaintext must not reach a core file or a forked child.
        unsafe {
            libc::madvise(base, budget_bytes, libc::MADV_DONTDUMP);
            libc::madvise(base, budget_bytes, libc::MADV_DONTFORK);
        }
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        // As many as can ever be free, so that giving back never allocates.
        let free = [Class::Slot, Class::Medium, Class::Large].map(|class| Vec::with_capacity(budget_bytes / class.bytes()));
        Ok(Self { base, budget_bytes, carved_bytes: 0, free, leased_bytes: 0, leases: 0 })
    }

    /// A lease of `class`, or `None` when the budget is spent.
    pub fn lease(&mut self, class: Class) -> Option<Lease> {
        if class != Class::Slot && self.leased_bytes + class.bytes() > self.budget_bytes / 4 * 3 {
            // Handshakes and last words must find room however much bulk there is; bulk goes on in smaller steps.
            return None;
        }
        let offset = match self.free[class as usize].pop() {
            Some(offset) => offset,
            None => self.carve(class).or_else(|| self.split(class))?,
        };
        self.leased_bytes += class.bytes();
        self.leases += 1;
        Some(Lease { offset, class })
    }

    fn carve(&mut self, class: Class) -> Option<u32> {
        let start = self.carved_bytes;
        if start + class.bytes() > self.budget_bytes {
            return None;
        }
        self.carved_bytes = start + class.bytes();
        u32::try_from(start).ok()
    }

    /// Cuts a free region into slots when there is no other room for one. Regions do not grow back: after such a peak
    /// bulk may find fewer of them.
    fn split(&mut self, class: Class) -> Option<u32> {
        if class != Class::Slot {
            return None;
        }
        let (region, start) =
            [Class::Medium, Class::Large].into_iter().find_map(|region| Some((region, self.free[region as usize].pop()?)))?;
        for slot in 0..region.bytes() / SLOT_BYTES {
            self.free[Class::Slot as usize].push(start + u32::try_from(slot * SLOT_BYTES).ok()?);
        }
        self.free[Class::Slot as usize].pop()
    }

    /// Ends a lease. No operation of the ring may still use it.
    pub fn give_back(&mut self, lease: Lease) {
        let Lease { offset, class } = lease;
        self.leased_bytes -= class.bytes();
        self.leases -= 1;
        let free = &mut self.free[class as usize];
        if class != Class::Slot && free.len() >= WARM_REGIONS_MAX {
            // SAFETY: the range lies in the mapping, is page aligned for these classes, and nobody holds it any more.
            unsafe {
                libc::madvise(self.base.as_ptr().add(offset as usize).cast(), class.bytes(), libc::MADV_DONTNEED);
            }
        }
        free.push(offset);
    }

    /// The lease's bytes.
    pub fn bytes(&mut self, lease: &Lease) -> &mut [u8] {
        // SAFETY: the range lies in the mapping and leases do not overlap; `&mut self` keeps two slices from existing at
        // once. The kernel writes to a lease only between a receive and its completion, when no caller looks at it.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr().add(lease.offset as usize), lease.class.bytes()) }
    }

    /// The bytes of two leases at once.
    pub fn bytes_of_two(&mut self, first: &Lease, second: &Lease) -> (&mut [u8], &mut [u8]) {
        let base = self.base.as_ptr();
        // SAFETY: both ranges lie in the mapping, and two live leases never overlap; otherwise as in `bytes`.
        unsafe {
            (
                std::slice::from_raw_parts_mut(base.add(first.offset as usize), first.class.bytes()),
                std::slice::from_raw_parts_mut(base.add(second.offset as usize), second.class.bytes()),
            )
        }
    }

    /// The address range `start..start + len` of a lease, for the ring.
    ///
    /// # Panics
    /// When the range is not inside the lease: a broken invariant of the caller.
    pub fn span(&self, lease: &Lease, start: usize, len: usize) -> Span {
        assert!(start <= lease.class.bytes() && len <= lease.class.bytes() - start, "span outside its lease");
        // SAFETY: the assertion above keeps the address inside the mapping, which is never null.
        let start = unsafe { self.base.add(lease.offset as usize + start) };
        Span { start, len: u32::try_from(len).expect("a lease is shorter than 4 GiB") }
    }

    /// Bytes leased now.
    pub fn leased_bytes(&self) -> usize {
        self.leased_bytes
    }

    /// Leases alive now.
    pub fn leases(&self) -> usize {
        self.leases
    }

    /// The budget.
    pub fn budget_bytes(&self) -> usize {
        self.budget_bytes
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` with this length; the owner drops the ring first, so the kernel has no
        // operation on it any more.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.budget_bytes) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_budget_holds_and_room_comes_back() {
        let mut pool = Pool::new(3 * SLOT_BYTES).expect("mapping");
        let leases: Vec<_> = std::iter::from_fn(|| pool.lease(Class::Slot)).collect();
        assert_eq!(leases.len(), 3);
        assert!(pool.lease(Class::Medium).is_none());
        for lease in leases {
            pool.give_back(lease);
        }
        assert_eq!((pool.leased_bytes(), pool.leases()), (0, 0));
        let again = pool.lease(Class::Slot).expect("room came back");
        pool.give_back(again);
    }

    #[test]
    fn bulk_leaves_room_for_slots_and_gives_its_own_back_to_them() {
        let mut pool = Pool::new(4 << 20).expect("mapping");
        let regions: Vec<_> = std::iter::from_fn(|| pool.lease(Class::Large)).collect();
        assert!(pool.leased_bytes() <= 3 << 20);
        let last_word = pool.lease(Class::Slot).expect("bulk must not take everything");
        pool.give_back(last_word);
        regions.into_iter().for_each(|lease| pool.give_back(lease));
        let slots: Vec<_> = std::iter::from_fn(|| pool.lease(Class::Slot)).collect();
        assert!(slots.len() * SLOT_BYTES > (4 << 20) * 9 / 10, "only {} slots", slots.len());
        slots.into_iter().for_each(|lease| pool.give_back(lease));
    }

    proptest! {
        #[test]
        fn leases_never_overlap(steps in proptest::collection::vec((0_u8..4, any::<proptest::sample::Index>()), 1..120)) {
            let mut pool = Pool::new(4 << 20).expect("mapping");
            let mut held: Vec<(Lease, u8)> = Vec::new();
            for (number, (what, pick)) in steps.into_iter().enumerate() {
                let class = [Class::Slot, Class::Medium, Class::Large].get(usize::from(what)).copied();
                let mark = u8::try_from(number % 251).expect("below 256");
                match class {
                    Some(class) => if let Some(lease) = pool.lease(class) {
                        pool.bytes(&lease).fill(mark);
                        held.push((lease, mark));
                    },
                    None => if !held.is_empty() {
                        let (lease, mark) = held.swap_remove(pick.index(held.len()));
                        prop_assert!(pool.bytes(&lease).iter().all(|&byte| byte == mark));
                        pool.give_back(lease);
                    },
                }
            }
            for (lease, mark) in held {
                prop_assert!(pool.bytes(&lease).iter().all(|&byte| byte == mark));
                pool.give_back(lease);
            }
            prop_assert_eq!(pool.leases(), 0);
        }
    }
}
