//! Series whose measures are computed by hand: pages are 4 KiB, so 256 pages per second are 1 MiB/s.

use super::*;
use crate::plan::PolicyKind;
use crate::record::{GuestKind, Host};
use crate::workload::Workload;

const MS: Duration = Duration::from_millis(1);

/// Samples every `every`, up to `end`, of a counter that grows by `rate(ms)` pages in each ms.
fn sampled(end: u32, every: u32, rate: impl Fn(u32) -> u64) -> Vec<Sample> {
    let mut net = 0;
    let mut samples = vec![Sample::default()];
    for ms in 0..end {
        net += rate(ms);
        if (ms + 1) % every == 0 || ms + 1 == end {
            samples.push(Sample { at: MS * (ms + 1), net, gross: 2 * net, paused: MS * (ms + 1) / 2 });
        }
    }
    samples
}

fn vcpu(limits: &[(u32, u32)], samples: Vec<Sample>) -> VcpuRecording {
    let limit = |mib: u32| (mib > 0).then(|| PageRate::from_pages_per_sec(256 * mib));
    VcpuRecording {
        index: 0,
        workload: Workload::Write(1 << 20),
        limits: limits.iter().map(|&(at, mib)| (MS * at, limit(mib))).collect(),
        samples,
        free_accesses: 3_000,
        free_time: Duration::from_secs(1),
        limited_accesses: 1_200,
        limited_time: Duration::from_secs(4),
        stalls: Stalls::default(),
        full_exits: 0,
        paused: MS * 500,
        net_pages: 0,
        gross_pages: 0,
        held_back_pages: 0,
    }
}

/// A recording that is limited from 1 s on.
fn recording(end: u32, vcpus: Vec<VcpuRecording>) -> Recording {
    Recording {
        guest: GuestKind::Sim,
        policy: PolicyKind::Paced,
        ring: 4096,
        max_pause: MS * 10,
        pass: MS * 10,
        page_size: 4096,
        host: Host::default(),
        vm_limit: None,
        limited_at: MS * 1000,
        end: MS * end,
        interrupted: false,
        lost_pages: None,
        suspect_pages: 0,
        suspect_resets: 0,
        steal_time: false,
        reset_pages: 0,
        reset_calls: 0,
        vcpus,
    }
}

fn measures(end: u32, limits: &[(u32, u32)], every: u32, rate: impl Fn(u32) -> u64) -> Measures {
    let recording = recording(end, vec![vcpu(limits, sampled(end, every, rate))]);
    Measures::of(&recording, &recording.vcpus[0])
}

#[track_caller]
fn near(value: Option<f64>, expected: f64) {
    let value = value.expect("a number");
    assert!((value - expected).abs() < 1e-6, "{value} is not {expected}");
}

#[test]
fn a_limit_that_takes_a_while() {
    // 1,024 pages/ms free; 512 for another 230 ms; then 252 against a limit of 256 (1,000 MiB/s).
    let rate = |ms| match ms {
        0..1000 => 1024,
        1000..1230 => 512,
        _ => 252,
    };
    for every in [1, 2, 10] {
        let measures = measures(5000, &[(1000, 1000)], every, rate);
        near(measures.free_mib_s, 4000.0);
        near(measures.free_gross_mib_s, 8000.0);
        near(measures.last().settled_mib_s, 252.0 * 1000.0 / 256.0);
        near(measures.last().error_pct, -100.0 * 4.0 / 256.0);
        // A window with n ms at 512 pages: (512 n + 252 (100 - n)) / 25600 <= 1.1 for n <= 11. Windows start every 10 ms,
        // so the first good one starts at 1,220 and has n = 10.
        near(measures.last().settle_ms, 220.0);
        near(measures.last().worst_window_error_pct, 100.0 * (512.0 * 10.0 + 252.0 * 90.0) / 25600.0 - 100.0);
        near(measures.work_kept_pct, 10.0);
        near(measures.paused_pct, 12.5);
    }
}

#[test]
fn samples_at_odd_times_are_interpolated() {
    // Readings 33 ms apart of a steady rate tell the same as readings 10 ms apart.
    let measures = measures(5000, &[(1000, 1000)], 33, |_| 256);
    near(measures.free_mib_s, 1000.0);
    near(measures.last().error_pct, 0.0);
    near(measures.last().settle_ms, 0.0);
    near(measures.last().worst_window_error_pct, 0.0);
}

#[test]
fn a_burst_is_over_with_the_reading_that_ends_it() {
    // 3,000 pages at once when the limit is set, seen 0.1 ms after the second window would start.
    let mut samples = sampled(5000, 10, |ms| if ms == 1000 { 3256 } else { 256 });
    samples.iter_mut().filter(|sample| sample.at > MS * 1000).for_each(|sample| sample.at += MS / 10);
    let recording = recording(5000, vec![vcpu(&[(1000, 1000)], samples)]);
    let measures = Measures::of(&recording, &recording.vcpus[0]);
    near(measures.last().settle_ms, 10.1);
    near(measures.last().worst_window_error_pct, 0.0);
}

#[test]
fn a_late_excursion_moves_the_settle_time_behind_it() {
    // 30 ms without a page, from 4,000 ms: windows that hold more than 10 of those ms are out.
    let measures = measures(5000, &[(1000, 1000)], 10, |ms| if (4000..4030).contains(&ms) { 0 } else { 256 });
    // The window from 4,010 holds 20 ms of it, the one from 4,020 holds 10 ms: exactly 10 % off, still inside.
    near(measures.last().settle_ms, 3020.0);
    near(measures.last().worst_window_error_pct, 10.0);
}

#[test]
fn a_rate_that_never_settles_has_no_settle_time() {
    // 200 ms at 1.2 times the limit, 200 ms at 0.8 times: the mean is right, no window is for long.
    let measures = measures(5000, &[(1000, 1000)], 10, |ms| if ms / 200 % 2 == 0 { 307 } else { 205 });
    near(measures.last().settled_mib_s, 1000.0);
    assert_eq!(measures.last().settle_ms, None);
    assert_eq!(measures.last().worst_window_error_pct, None);
}

#[test]
fn a_silent_vcpu_is_a_hundred_percent_below_its_limit() {
    let measures = measures(5000, &[(1000, 1000)], 10, |_| 0);
    near(measures.free_mib_s, 0.0);
    near(measures.last().settled_mib_s, 0.0);
    near(measures.last().error_pct, -100.0);
    assert_eq!(measures.last().settle_ms, None);
}

#[test]
fn without_a_limit_there_is_no_error() {
    let measures = measures(5000, &[(1000, 0)], 10, |_| 256);
    near(measures.last().settled_mib_s, 1000.0);
    assert_eq!(measures.last().limit_mib_s, None);
    assert_eq!(measures.last().error_pct, None);
    assert_eq!(measures.last().settle_ms, None);
}

#[test]
fn a_reader_is_not_judged_by_a_limit_that_cannot_concern_it() {
    let mut recording = recording(5000, vec![vcpu(&[(1000, 1000)], sampled(5000, 10, |_| 0))]);
    recording.vcpus[0].workload = Workload::Read(1 << 20);
    let measures = Measures::of(&recording, &recording.vcpus[0]);
    near(measures.last().limit_mib_s, 1000.0);
    assert_eq!(measures.last().error_pct, None);
}

#[test]
fn each_step_is_measured_and_the_last_one_counts() {
    let rate = |ms| match ms {
        0..2000 => 256,
        2000..2050 => 256,
        _ => 64,
    };
    let measures = measures(5000, &[(1000, 1000), (2000, 250), (3000, 0), (4000, 200)], 10, rate);
    assert_eq!(measures.steps.len(), 4);
    assert_eq!((measures.steps[1].from, measures.steps[1].to), (MS * 2000, MS * 3000));
    near(measures.steps[0].settle_ms, 0.0);
    // n ms of 256 in a window of 64: within 10 % for n <= 3, so the window from 2,050.
    near(measures.steps[1].settle_ms, 50.0);
    near(measures.steps[1].error_pct, 0.0);
    assert_eq!(measures.steps[2].error_pct, None);
    near(measures.last().settled_mib_s, 250.0);
    near(measures.last().error_pct, 25.0);
    assert_eq!(measures.last().settle_ms, None);
}

#[test]
fn a_run_cut_short_has_gaps_and_no_panic() {
    // Interrupted before the limit was set.
    let mut free = recording(400, vec![vcpu(&[], sampled(400, 10, |_| 256))]);
    free.limited_at = free.end;
    let measures = Measures::of(&free, &free.vcpus[0]);
    near(measures.free_mib_s, 1000.0);
    assert_eq!(measures.last().settled_mib_s, None);
    assert_eq!(measures.paused_pct, None);
    // Interrupted 50 ms after, less than a window; and a recording without any sample.
    for samples in [sampled(1050, 10, |_| 256), Vec::new(), vec![Sample::default(); 3]] {
        let mut short = recording(1050, vec![vcpu(&[(1000, 1000)], samples)]);
        short.vcpus[0].free_accesses = 0;
        let measures = Measures::of(&short, &short.vcpus[0]);
        assert_eq!(measures.last().settle_ms, None);
        assert_eq!(measures.work_kept_pct, None);
        assert_eq!(measures.stall_max_ms, None);
    }
}

#[test]
fn a_recording_that_ends_before_its_last_sample_is_not_stretched() {
    // The counters stop being read at 4 s of 5: the mean is over what was read.
    let recording = recording(5000, vec![vcpu(&[(1000, 1000)], sampled(4000, 10, |_| 256))]);
    near(Measures::of(&recording, &recording.vcpus[0]).last().settled_mib_s, 1000.0);
}

#[test]
fn the_vm_is_measured_over_all_vcpus() {
    let vcpus = (0..2).map(|_| vcpu(&[(1000, 0)], sampled(5000, 10, |_| 96))).collect();
    let mut recording = recording(5000, vcpus);
    assert_eq!(VmMeasures::of(&recording), None);
    recording.vm_limit = Some(PageRate::from_pages_per_sec(256 * 500));
    let vm = VmMeasures::of(&recording).unwrap();
    near(vm.settled_mib_s, 750.0);
    near(vm.error_pct, 50.0);
}

#[test]
fn stalls_are_interpolated_inside_their_bucket() {
    // Ticks of a µs: 98 gaps of 1,024 to 2,047, 2 of 8,192 to 16,383 of which the longest is 10,192.
    let mut stalls = Stalls { tsc_hz: 1_000_000, threshold_ticks: 100, longest_ticks: 10_192, ..Stalls::default() };
    assert_eq!(Stalls::default().percentile_ms(99.0), None);
    (stalls.histogram[10], stalls.histogram[13]) = (98, 2);
    near(stalls.longest_ms(), 10.192);
    // Rank 99 is the first of the two in the upper bucket: half way from 8,192 to 10,192.
    near(stalls.percentile_ms(99.0), 9.192);
    // Rank 99.9 is 0.95 of the way.
    near(stalls.percentile_ms(99.9), 10.092);
    // Rank 49 is half way through the lower bucket.
    near(stalls.percentile_ms(49.0), 1.536);
    near(stalls.percentile_ms(100.0), 10.192);
    // The threshold cuts the lowest bucket.
    stalls.threshold_ticks = 1_536;
    near(stalls.percentile_ms(49.0), 1.792);
}

#[test]
fn absurd_stalls_stay_in_range() {
    // A histogram that contradicts the longest gap, a TSC of 0 Hz, counts near overflow.
    let mut stalls = Stalls { longest_ticks: 5, ..Stalls::default() };
    stalls.histogram = [u64::MAX; 64];
    assert!(stalls.percentile_ms(99.9).unwrap() <= stalls.longest_ms().unwrap());
    stalls.tsc_hz = 0;
    assert_eq!(stalls.percentile_ms(99.0), None);
    assert_eq!(stalls.longest_ms(), None);
}

#[test]
fn the_fine_histogram_is_preferred_and_its_last_step_has_no_end() {
    let mut stalls = Stalls { tsc_hz: 1_000_000, longest_ticks: 100_000, fine_ticks: 100, ..Stalls::default() };
    stalls.histogram[13] = 100;
    assert!(stalls.percentile_ms(50.0) > Some(8.0), "the coarse one, where there is no other");
    stalls.fine = vec![0; 384];
    (stalls.fine[99], stalls.fine[383]) = (99, 1);
    assert_eq!(stalls.percentile_ms(99.0), Some(10.0));
    assert_eq!(stalls.percentile_ms(100.0), Some(100.0));
    let mut sum = Stalls { tsc_hz: 1_000_000, ..Stalls::default() };
    (sum.fine_ticks, sum.threshold_ticks) = (stalls.fine_ticks, stalls.threshold_ticks);
    sum.add(&stalls);
    sum.add(&stalls);
    assert_eq!((sum.longest_ticks, sum.fine[99], sum.fine[383], sum.histogram[13]), (100_000, 198, 2, 200));
}
