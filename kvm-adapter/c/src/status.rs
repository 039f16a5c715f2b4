//! What is known of a VM and its vCPUs.

use std::ffi::{CString, c_char, c_int};
use std::sync::LazyLock;

use dirtylimit_kvm::{PageRate, Unenforced};

use crate::answer::{done, get};
use crate::sized::{self, Versioned};
use crate::vm::{DIRTYLIMIT_UNLIMITED, Limit};

/// Why a limit is not held.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Why {
    /// It is held, or there is none.
    DIRTYLIMIT_HELD = 0,
    /// No tick has come for 5 s.
    DIRTYLIMIT_LAPSED = 1,
    /// The vCPU's thread does not come to pay.
    DIRTYLIMIT_NOT_ACCEPTED = 2,
    /// A pause longer than the longest would be needed: needs_pause_ns.
    DIRTYLIMIT_NEEDS_PAUSE = 3,
    /// The vCPU exceeds it all the same.
    DIRTYLIMIT_EXCEEDED = 4,
    /// The guest writes to pages that nobody takes, and a page that is not taken is not counted again.
    DIRTYLIMIT_LOG_NOT_TAKEN = 5,
    /// It is held by pauses longer than the longest.
    DIRTYLIMIT_LUMPS = 6,
    /// Something else, which the text tells.
    DIRTYLIMIT_OTHER = 7,
}

impl Why {
    fn of(why: Unenforced) -> Self {
        match why {
            Unenforced::Lapsed => Self::DIRTYLIMIT_LAPSED,
            Unenforced::NotAccepted => Self::DIRTYLIMIT_NOT_ACCEPTED,
            Unenforced::NeedsPause => Self::DIRTYLIMIT_NEEDS_PAUSE,
            Unenforced::Exceeded => Self::DIRTYLIMIT_EXCEEDED,
            Unenforced::LogNotTaken => Self::DIRTYLIMIT_LOG_NOT_TAKEN,
            Unenforced::Lumps => Self::DIRTYLIMIT_LUMPS,
            _ => Self::DIRTYLIMIT_OTHER,
        }
    }
}

/// In words, which live for as long as the process.
fn words(why: Unenforced) -> *const c_char {
    type Known = (Unenforced, CString);
    static KNOWN: LazyLock<[Known; 6]> = LazyLock::new(|| {
        use Unenforced::{Exceeded, Lapsed, LogNotTaken, Lumps, NeedsPause, NotAccepted};
        [Lapsed, NotAccepted, NeedsPause, Exceeded, LogNotTaken, Lumps]
            .map(|why| (why, CString::new(why.to_string()).unwrap_or_default()))
    });
    KNOWN.iter().find(|(known, _)| *known == why).map_or(c"the limit is not held".as_ptr(), |(_, text)| text.as_ptr())
}

/// What is known of one vCPU. Set size to its sizeof. Rates are in bytes a second.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Status {
    /// sizeof(dirtylimit_status_t).
    pub size: usize,
    /// The limit set for it, or DIRTYLIMIT_UNLIMITED.
    pub limit: u64,
    /// The limit in force, or DIRTYLIMIT_UNLIMITED: the lesser of its own and its share of the VM's budget.
    pub effective_limit: u64,
    /// Its dirty page rate, smoothed over 100 ms, as of the last tick.
    pub rate: u64,
    /// The rate that it would have if it did not pause.
    pub demand: u64,
    /// Where the limit cannot be held within the longest pause: the pause that it would need; else 0.
    pub needs_pause_ns: u64,
    /// Pages newly dirty since each was last published, since the vCPU was added: what a migration has to send.
    pub net_pages: u64,
    /// The same, and pages written again before they were published.
    pub gross_pages: u64,
    /// Exits with a full ring.
    pub full_exits: u64,
    /// Microseconds paused.
    pub paused_us: u64,
    /// Pages whose entries wait in the ring: dirty, and not in the log yet.
    pub held_back: u32,
    /// One of dirtylimit_why, as far as seen in the last seconds.
    pub unenforced: u32,
    /// The same in words, valid for ever; NULL where the limit is held, or there is none.
    pub unenforced_text: *const c_char,
}
// SAFETY: the sizes of its fields add up to its own, as the assertion says, and it is only filled.
unsafe impl Versioned for Status {
    const FIRST: usize = 96;
}
const _: () = assert!(size_of::<Status>() == 96);

/// What was harvested of a VM so far. Set size to its sizeof.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Stats {
    /// sizeof(dirtylimit_stats_t).
    pub size: usize,
    /// Entries given back by resets.
    pub resets: u64,
    /// KVM_RESET_DIRTY_RINGS calls.
    pub reset_calls: u64,
    /// Resets that may have left pages unprotected, because they were short or the thread was stopped on the way: of each at
    /// most 64 pages of a vCPU.
    pub suspect_resets: u64,
    /// Pages that are therefore in every merge, now.
    pub suspect_pages: u64,
    /// Collected entries that named no slot, or a page beyond its end.
    pub dropped: u64,
    /// The soft limit of the rings as far as learned, the lowest of them; 0 before the first vCPU.
    pub soft_limit: u64,
    /// Resets that failed, or gave nothing back: what was collected waits for a later one.
    pub failed_resets: u64,
    /// Full exits that ended in -EIO, since nothing moved in the ring: the pages of that vCPU are unknown.
    pub wedged: u64,
}
// SAFETY: the sizes of its fields add up to its own, as the assertion says, and numbers have any bits.
unsafe impl Versioned for Stats {
    const FIRST: usize = 56;
}
const _: () = assert!(size_of::<Stats>() == 72);

/// Tells what is known of a vCPU, as of the last dirtylimit_meter() or tick. Any thread.
///
/// -ENOENT: no such vCPU.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dirtylimit_query(limit: *mut Limit, id: u32, status: *mut Status) -> c_int {
    done(|| {
        // SAFETY: the header's rule for handles.
        let limit = &unsafe { get(limit, "limit") }?.0;
        let (is, held_back) = (limit.query(id)?, limit.held_back(id)?);
        let bytes = |rate: PageRate| rate.bytes_per_sec(limit.page_size());
        let told = Status {
            size: 0,
            limit: is.limit.map_or(DIRTYLIMIT_UNLIMITED, bytes),
            effective_limit: is.effective_limit.map_or(DIRTYLIMIT_UNLIMITED, bytes),
            rate: bytes(is.rate),
            demand: bytes(is.demand),
            needs_pause_ns: is.needs_pause.unwrap_or(0),
            net_pages: is.totals.net_pages,
            gross_pages: is.totals.gross_pages,
            full_exits: is.totals.full_exits,
            paused_us: is.totals.paused_us,
            held_back,
            unenforced: is.unenforced.map_or(Why::DIRTYLIMIT_HELD, Why::of) as u32,
            unenforced_text: is.unenforced.map_or(std::ptr::null(), words),
        };
        // SAFETY: the header's rule for structs with a size.
        unsafe { sized::fill(status, "status", told) }
    })
}

/// Tells what was harvested so far. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dirtylimit_stats(limit: *mut Limit, stats: *mut Stats) -> c_int {
    done(|| {
        // SAFETY: the header's rule for handles.
        let is = unsafe { get(limit, "limit") }?.0.stats();
        let told = Stats {
            size: 0,
            resets: is.resets,
            reset_calls: is.reset_calls,
            suspect_resets: is.suspect_resets,
            suspect_pages: is.suspect_pages,
            dropped: is.dropped,
            soft_limit: is.soft_limit.into(),
            failed_resets: is.failed_resets,
            wedged: is.wedged,
        };
        // SAFETY: the header's rule for structs with a size.
        unsafe { sized::fill(stats, "stats", told) }
    })
}

/// Brings the counts of dirtylimit_query() up to date. Disturbs no guest. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dirtylimit_meter(limit: *mut Limit) -> c_int {
    done(|| {
        // SAFETY: the header's rule for handles.
        unsafe { get(limit, "limit") }?.0.meter();
        Ok(())
    })
}
