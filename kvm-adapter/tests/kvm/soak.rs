//! Everything at once, at random, for as long as is asked for: guests, configurations and faults follow from a seed, and
//! after each round no page may be lost. Run longer by `ci/soak.sh`.
//!
//! A child does the work and names each action before it takes it; what it cannot do to itself (being stopped, traced,
//! frozen) it asks the parent for, who also notices when it hangs.

use std::io::BufRead;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use dirtylimit_kvm::{Config, Kick};
use dirtylimit_test_vm::payload::Mode;
use dirtylimit_test_vm::{Load, kvm_or_skip};
use fastrand::Rng;

use crate::changes::{change_a_limit, starve};
use crate::common::here;
use crate::disturbed::storm_everywhere;
use crate::rig::{Copying, Rig};
use crate::stopped::{Freezer, Halt, Halted, alone};

/// How the child is told what to do: the first round's seed, how many seconds, and whether to copy too early.
const ROLE: &str = "DIRTYLIMIT_TEST_SOAK";
/// A child that says nothing for so long hangs: longer than any halt and the rig's own patience.
const SILENCE: Duration = Duration::from_secs(60);

fn say(what: &str) {
    println!("\nsoak: {what}");
}

fn milliseconds(random: &mut Rng, range: std::ops::Range<u64>) -> Duration {
    Duration::from_millis(random.u64(range))
}

/// A guest and its limiter.
fn plan(random: &mut Rng, copying: Copying) -> (Vec<Load>, Config, Copying) {
    let loads = (0..random.usize(1..=4)).map(|_| {
        let mode =
            random.choice([Mode::Write, Mode::Write, Mode::Random, Mode::Read, Mode::Burst, Mode::Idle]).unwrap();
        let delay = random.choice([0, 0, 100, 10_000]).unwrap();
        let half_period = milliseconds(random, 1..30);
        Load { delay, half_period, ..Load::new(mode, 4096 << random.u32(0..14)) }
    });
    let loads = loads.collect();
    let kick = if random.bool() { Kick::Off } else { Kick::Signal(libc::SIGRTMIN() + 7) };
    let config = Config::new().ring_entries(1024 << random.u32(0..5)).max_pause(milliseconds(random, 1..20)).kick(kick);
    let copying = if copying == Copying::Right && random.bool() { Copying::Passes } else { copying };
    (loads, config, copying)
}

/// Changes limits from several threads for a while.
fn churn(rig: &Rig, vcpus: u32, seed: u64, time: Duration) -> Result<()> {
    thread::scope(|scope| {
        let threads: Vec<_> = (0..3)
            .map(|thread| {
                scope.spawn(move || -> Result<()> {
                    let (mut random, end) = (Rng::with_seed(seed ^ thread), Instant::now() + time);
                    while Instant::now() < end {
                        change_a_limit(rig, vcpus, &mut random);
                        thread::sleep(Duration::from_micros(500));
                    }
                    Ok(())
                })
            })
            .collect();
        threads.into_iter().try_for_each(|thread| thread.join().unwrap())
    })
}

/// Calls everything that a control plane may call at any time, as fast as it can.
fn meddle(rig: &mut Rig, time: Duration) -> Result<()> {
    let (limit, over) = (rig.limit.clone(), AtomicBool::new(false));
    thread::scope(|scope| {
        let meddler = scope.spawn(|| -> Result<()> {
            while !over.load(Relaxed) {
                limit.tick();
                limit.meter();
                drop(limit.round()?);
                limit.last_round().map(drop)?;
                // A vCPU that was not born yet has no state.
                let _ = limit.query(0);
                limit.stats();
            }
            Ok(())
        });
        let ran = rig.run_for(time);
        over.store(true, Relaxed);
        ran.and(meddler.join().unwrap())
    })
}

/// One action on the rig; `running` is which vCPUs run.
fn act(rig: &mut Rig, random: &mut Rng, running: &mut [bool]) -> Result<()> {
    let index = random.usize(..running.len());
    let vcpus = u32::try_from(running.len())?;
    let time = milliseconds(random, 20..200);
    match random.u8(..12) {
        0 | 1 => {
            // What it does is said after it is done: it neither fails nor takes long.
            (0..random.u32(1..10)).for_each(|_| say(&change_a_limit(rig, vcpus, random)));
            Ok(())
        }
        2 | 3 if running[index] => {
            say(&format!("stop vCPU {index}"));
            running[index] = false;
            rig.stop(index)
        }
        2..=4 if !running[index] => {
            say(&format!("start vCPU {index}"));
            running[index] = true;
            rig.start(index)
        }
        5 if index > 0 && !running[index] => {
            say(&format!("take slot {index} away for {time:?}"));
            rig.remove_slot(index)?;
            rig.run_for(time)?;
            rig.add_slot(index)
        }
        6 => {
            let on = random.bool();
            say(&format!("throttle thread: {on}"));
            rig.throttle(on)
        }
        7 => {
            say(&format!("signals for {time:?}"));
            storm_everywhere(rig, time, 0)
        }
        8 => {
            say(&format!("no CPU for {time:?}"));
            starve(rig, time)
        }
        9 => {
            let seed = random.u64(..);
            say(&format!("limits change for {time:?}"));
            churn(rig, vcpus, seed, time)
        }
        10 => {
            say(&format!("everything is called for {time:?}"));
            meddle(rig, time)
        }
        _ => {
            // Now and then for seconds.
            let time = if random.u8(..20) == 0 { milliseconds(random, 1000..3000) } else { time };
            say(&format!("halt {} {}", random.u8(..), time.as_millis()));
            Ok(())
        }
    }
}

fn round(seed: u64, copying: Copying) -> Result<()> {
    let mut random = Rng::with_seed(seed);
    let (loads, config, copying) = plan(&mut random, copying);
    say(&format!("round {seed:#x}: {config:?}, {copying:?}, {loads:?}"));
    let mut rig = Rig::new(&loads, &config, copying)?;
    let mut running = vec![false; loads.len()];
    rig.start(0)?;
    running[0] = true;
    for _ in 0..random.u32(5..25) {
        act(&mut rig, &mut random, &mut running)?;
        rig.run_for(milliseconds(&mut random, 0..50))?;
    }
    let lost = rig.finish()?;
    ensure!(lost == 0, "{lost} pages lost");
    Ok(())
}

fn be_soaked(role: &str) -> Result<()> {
    let mut role = role.split(' ');
    let mut next = || role.next().context(ROLE);
    let (mut seed, seconds) = (next()?.parse()?, Duration::from_secs(next()?.parse()?));
    let copying = if next()? == "right" { Copying::Right } else { Copying::TooEarly };
    let start = Instant::now();
    while start.elapsed() < seconds {
        if let Err(error) = round(seed, copying) {
            say(&format!("failed {error:#}"));
            return Ok(());
        }
        // So that each round can be repeated by itself.
        seed = Rng::with_seed(seed).u64(..);
    }
    say("end");
    Ok(())
}

/// Soaks a child, and returns how many rounds, actions and halts there were; or what went wrong, and how to repeat it.
fn soak(seed: u64, seconds: u64, copying: &str) -> Result<[u32; 3]> {
    let (freezers, silence) = (Freezer::all()?, here(SILENCE));
    let (child, says) = Halted::start((ROLE, &format!("{seed} {seconds} {copying}")))?;
    let halts: Vec<Halt> =
        [Halt::Stop, Halt::Trace].into_iter().chain(freezers.into_iter().map(Halt::Freeze)).collect();
    halts.iter().try_for_each(|halt| child.prepare(halt))?;
    let (said, heard) = mpsc::channel();
    thread::spawn(move || says.lines().map_while(Result::ok).try_for_each(|line| said.send(line)));
    let (mut counts, mut log) = ([0; 3], Vec::new());
    let outcome = loop {
        let line = match heard.recv_timeout(silence) {
            Ok(line) => line,
            Err(RecvTimeoutError::Timeout) => break Err("hangs".to_owned()),
            Err(RecvTimeoutError::Disconnected) => break Err("ended without a word".to_owned()),
        };
        let Some(line) = line.strip_prefix("soak: ") else { continue };
        if line == "end" {
            break Ok(());
        } else if let Some(error) = line.strip_prefix("failed ") {
            break Err(error.to_owned());
        } else if line.starts_with("round ") {
            counts[0] += 1;
            log.clear();
        } else if let Some((which, time)) = line.strip_prefix("halt ").and_then(|halt| halt.split_once(' ')) {
            counts[2] += 1;
            let halt = &halts[which.parse::<usize>()? % halts.len()];
            child.halt(halt, Duration::from_millis(time.parse()?))?;
        } else {
            counts[1] += 1;
        }
        log.push(line.to_owned());
    };
    drop(child);
    for halt in &halts {
        if let Halt::Freeze(freezer) = halt {
            freezer.remove()?;
        }
    }
    if let Err(what) = outcome {
        let again = log.first().and_then(|round| round.split([' ', ':']).nth(1)).unwrap_or("?").to_owned();
        bail!("{what}, in this round; repeat it by: ci/soak.sh --seed {again}\n{}", log.join("\n"));
    }
    Ok(counts)
}

/// The environment's number of this name, decimal or hexadecimal.
fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    let number = text.strip_prefix("0x").map_or_else(|| text.parse(), |hex| u64::from_str_radix(hex, 16));
    Some(number.unwrap_or_else(|_| panic!("{name}={text}: it must be a number, or 0x and a hexadecimal one")))
}

#[test]
fn everything_at_once_loses_nothing() {
    if let Ok(role) = std::env::var(ROLE) {
        return be_soaked(&role).unwrap();
    }
    if !kvm_or_skip() {
        return;
    }
    let _alone = alone();
    let seed = number("DIRTYLIMIT_SOAK_SEED").unwrap_or_else(|| fastrand::u64(..));
    let seconds = number("DIRTYLIMIT_SOAK_SECONDS").unwrap_or(5);
    eprintln!("soak: {seconds} s from seed {seed:#x}");
    match soak(seed, seconds, "right") {
        Ok([rounds, actions, halts]) => {
            eprintln!("soak: {rounds} rounds, {actions} actions, {halts} halts: no page lost");
        }
        Err(error) => panic!("{error:#}"),
    }
}

#[test]
fn a_soak_notices_lost_pages() {
    if let Ok(role) = std::env::var(ROLE) {
        return be_soaked(&role).unwrap();
    }
    if !kvm_or_skip() {
        return;
    }
    let _alone = alone();
    let error = soak(fastrand::u64(..), 600, "wrong").expect_err("a copy that is wrong passes").to_string();
    assert!(error.contains("pages lost") && error.contains("--seed 0x"), "{error}");
}
