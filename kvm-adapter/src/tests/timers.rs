//! CPUs that hand pages over in lumps: timers, and what a vCPU does without.

use std::time::Duration;

use crate::fake::{Fake, PAGES, SLOT};
use crate::{Config, DirtyLimit, Kick, PageRate, Vcpu};

const LUMP: u32 = 512;
/// A page in 50 µs, so that a lump costs 25.6 ms.
const LIMIT: u32 = 20_000;
const MAX_PAUSE: Duration = Duration::from_millis(5);

struct Guest {
    fake: Fake,
    limit: DirtyLimit,
    vcpu: Vcpu,
    next: u64,
}

impl Guest {
    /// On a VM with a ring of 1,024 entries, which has run free for some lumps and is limited since.
    fn limited(fake: Fake, kick: Kick) -> Self {
        let limit = fake.limit(&Config::new().ring_entries(1024).max_pause(MAX_PAUSE).kick(kick)).unwrap();
        limit.add_slot(SLOT, PAGES).unwrap();
        let vcpu = limit.add_vcpu(0, &fake.vcpu(1024)).unwrap();
        let mut guest = Self { fake, limit, vcpu, next: 0 };
        for _ in 0..3 {
            assert_eq!((guest.run(u32::MAX) > 0, guest.paid()), (true, Duration::ZERO));
        }
        assert!(!guest.vcpu.has_made_timers(), "no limit, no timer");
        guest.limit.set_limit(0, PageRate::from_pages_per_sec(LIMIT)).unwrap();
        guest.limit.tick();
        // What was dirtied before the limit is forgiven.
        assert!(guest.run(u32::MAX) > 0);
        guest.paid();
        guest
    }

    /// Writes up to a full exit, interrupted after each `every` pages. Returns the pages that it wrote.
    fn run(&mut self, every: u32) -> u32 {
        let mut wrote = 0;
        while self.fake.write_all(0, [self.next % PAGES]) == 1 {
            (wrote, self.next) = (wrote + 1, self.next + 1);
            if wrote % every == 0 {
                self.fake.interrupt(0);
            }
        }
        wrote
    }

    fn overlong_pauses(&self) -> u32 {
        let vm = self.limit.vm();
        vm.lock().rows[&0].shared.cell(&vm.limiter).counters.overlong_pauses()
    }

    fn paid(&mut self) -> Duration {
        _ = self.vcpu.before_run().unwrap();
        self.limit.round().unwrap().take(SLOT).unwrap();
        self.vcpu.paused()
    }
}

#[test]
fn timers_end_slices_by_default_where_pages_come_in_lumps() {
    let mut guest = Guest::limited(Fake::new().with_lumps(LUMP), Config::new().kick);
    assert!(guest.vcpu.has_made_timers());
    for _ in 0..20 {
        guest.run(10);
        guest.paid();
    }
    for run in 0..20 {
        let wrote = guest.run(10);
        assert!((1..=60).contains(&wrote), "{run}: {wrote}");
        guest.paid();
    }
    // They may all come too early: then a lump is owed, and paid for in bounded pauses.
    assert!(guest.run(u32::MAX) >= LUMP);
    guest.paid();
    assert_eq!(guest.overlong_pauses(), 0);
}

#[test]
fn no_timer_is_ever_made_where_pages_come_one_by_one() {
    let mut guest = Guest::limited(Fake::new(), Config::new().kick);
    for _ in 0..20 {
        guest.run(u32::MAX);
        guest.paid();
        assert!(!guest.vcpu.has_made_timers());
    }
}

/// A pause as long as a lump costs.
fn pays_for_lumps(mut guest: Guest) {
    assert!(!guest.vcpu.has_made_timers());
    let mut longest = Duration::ZERO;
    for _ in 0..30 {
        guest.run(u32::MAX);
        longest = longest.max(guest.paid());
    }
    assert!(longest >= 3 * MAX_PAUSE, "{longest:?}");
    assert!(guest.overlong_pauses() > 10, "{}", guest.overlong_pauses());
}

#[test]
fn without_a_timer_a_pause_is_as_long_as_a_lump_costs() {
    pays_for_lumps(Guest::limited(Fake::new().with_lumps(LUMP), Kick::Off));
}

#[test]
fn where_timers_are_refused_a_pause_is_as_long_as_a_lump_costs() {
    refuse(libc::SYS_timerfd_create);
    pays_for_lumps(Guest::limited(Fake::new().with_lumps(LUMP), Config::new().kick));
}

/// Has a system call of this thread answer EPERM from now on, as a VMM's filter may.
fn refuse(call: libc::c_long) {
    let line = |code: u32, jt, jf, k| libc::sock_filter { code: code.try_into().unwrap(), jt, jf, k };
    let mut filter = [
        line(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0), // the call's number
        line(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, u32::try_from(call).unwrap()),
        line(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ERRNO | libc::EPERM.unsigned_abs()),
        line(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: 4, filter: filter.as_mut_ptr() };
    // SAFETY: the calls take numbers and read the program; the filter is this thread's alone, which ends with the test.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        assert_eq!(libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program), 0);
    }
}

#[test]
fn a_ring_that_others_took_from_proves_no_lumps() {
    let fake = Fake::new();
    let limit = fake.small();
    let mut vcpus = [0, 1].map(|id| limit.add_vcpu(id, &fake.vcpu(1024)).unwrap());
    fake.write_all(0, 0..2000);
    limit.vm().lock().rows.get_mut(&0).unwrap().vcpu.assign(Some(500), true, false);
    assert_eq!(limit.round().unwrap().published(), 500, "between its exit and its thread");
    fake.write_all(1, 2000..4000);
    _ = vcpus[1].before_run().unwrap();
    _ = vcpus[0].before_run().unwrap();
    let harvest = limit.vm().lock();
    assert!(harvest.rows.values().all(|row| !row.ring().has_lumps()));
}

#[test]
fn a_stale_exit_reason_proves_no_lumps() {
    let (fake, limit, _file, mut vcpu) = super::vm();
    fake.write_all(0, 0..500);
    _ = vcpu.before_run().unwrap();
    assert!(!limit.vm().lock().rows[&0].ring().has_lumps());
}

#[test]
fn a_ring_that_was_emptied_before_its_vcpu_went_on_proves_lumps_at_its_next_full_exit() {
    let fake = Fake::new().with_lumps(LUMP);
    let limit = fake.small();
    let mut vcpu = limit.add_vcpu(0, &fake.vcpu(1024)).unwrap();
    let has_lumps = || limit.vm().lock().rows[&0].ring().has_lumps();
    fake.write_all(0, 0..PAGES);
    limit.last_round().map(drop).unwrap();
    _ = vcpu.before_run().unwrap();
    assert!(!has_lumps(), "others took from it");
    fake.write_all(0, 2000..PAGES);
    _ = vcpu.before_run().unwrap();
    assert!(has_lumps());
}
