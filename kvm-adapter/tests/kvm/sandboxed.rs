//! A sandbox (seccomp) that refuses the call by which a disturbed reset shows.

use std::ptr::null_mut;
use std::thread;

use anyhow::{Result, ensure};
use dirtylimit_kvm::{Config, Stats};
use dirtylimit_test_vm::payload::Mode;
use dirtylimit_test_vm::{Exit, Load, SLOT, kvm_or_skip};

use crate::common::{Copy, drive, machine, vcpu};
use crate::stopped::alone;

/// From here on `getrusage` fails so in this thread.
fn refuse_getrusage(errno: i32) -> Result<()> {
    let statement = |code: u32, k, jt, jf| libc::sock_filter { code: u16::try_from(code).expect("a code"), jt, jf, k };
    let answer = |k| statement(libc::BPF_RET | libc::BPF_K, k, 0, 0);
    let mut filter = [
        // The call's number is the first word of what a filter sees.
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, u32::try_from(libc::SYS_getrusage)?, 0, 1),
        answer(libc::SECCOMP_RET_ERRNO | errno.unsigned_abs()),
        answer(libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: u16::try_from(filter.len())?, filter: filter.as_mut_ptr() };
    // SAFETY: the first takes numbers; the second reads the program, and holds for this thread alone. `getrusage` is then told
    // not to write at all.
    unsafe {
        ensure!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
        ensure!(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) == 0);
        ensure!(libc::getrusage(libc::RUSAGE_THREAD, null_mut()) == -1, "getrusage is not refused");
    }
    Ok(())
}

/// Runs a guest on a thread of its own, with `getrusage` refused so; what the resets were like.
fn run(refused: Option<i32>) -> Result<Stats> {
    thread::spawn(move || {
        if let Some(errno) = refused {
            refuse_getrusage(errno)?;
        }
        let (machine, limit) = machine(&[Load::new(Mode::Write, 16 << 20)], &Config::new().ring_entries(1024))?;
        let mut vcpu = vcpu(&machine, &limit, 0)?;
        let mut copy = Copy::new(machine.memory());
        for _ in 0..20 {
            drive(&mut vcpu, |exit| exit == Exit::RingFull)?;
            copy.take(&limit.last_round().and_then(|round| round.take(SLOT))?)?;
            ensure!(copy.lost() == 0, "{} pages lost", copy.lost());
        }
        Ok(limit.stats())
    })
    .join()
    .expect("no panic")
}

/// Whether a reset was disturbed cannot be told, so each is taken for one that was.
#[test]
fn where_getrusage_is_refused_every_reset_is_suspect() {
    if !kvm_or_skip() {
        return;
    }
    let _alone = alone();
    for errno in [libc::ENOSYS, libc::EPERM] {
        let stats = run(Some(errno)).unwrap();
        assert!(stats.suspect_resets >= 20 && stats.suspect_pages > 0, "{errno}: {stats:?}");
    }
    let stats = run(None).unwrap();
    assert!(stats.suspect_resets < 10, "{stats:?}");
}
