//! What a guest is told: any loads, as a parameter block each, and any file as its image. What is accepted lies in the
//! guest's memory, in whole pages, apart from everybody else's; what is not has an error, and nothing panics.
#![no_main]

use std::fs;
use std::ops::Range;
use std::time::Duration;

use libfuzzer_sys::{
    arbitrary::{self, Arbitrary},
    fuzz_target,
};

use dirtylimit_test_vm::layout::Layout;
use dirtylimit_test_vm::payload::{self, IMAGE_MAX, Mode, Parameters, WORKLOAD_ADDRESS};
use dirtylimit_test_vm::{Load, MAX_VCPUS, PAGE_SIZE};

const PAGE: u64 = PAGE_SIZE as u64;

#[derive(Arbitrary, Debug)]
struct Input {
    loads: Vec<AnyLoad>,
    tsc_hz: u64,
    image: Vec<u8>,
    /// Bytes that the image is filled up with.
    filling: u32,
}

#[derive(Arbitrary, Debug)]
struct AnyLoad {
    mode: u8,
    /// Whole pages, or any number of bytes: mostly so many that they fit.
    pages: u16,
    bytes: Option<u64>,
    delay: u64,
    stall_us: u32,
    half_period_us: u32,
}

impl AnyLoad {
    fn load(&self) -> Load {
        let bytes = self.bytes.unwrap_or(u64::from(self.pages) * PAGE);
        let mode = [Mode::Write, Mode::Read, Mode::Random, Mode::Idle, Mode::Burst][usize::from(self.mode % 5)];
        let us = |us: u32| Duration::from_micros(us.into());
        let (stall, half_period) = (us(self.stall_us), us(self.half_period_us));
        Load { mode, bytes, delay: self.delay, stall, half_period }
    }
}

/// Every address that the built-in image would access, as the modes of its loop do.
fn accessed(Parameters { start, end, stride, mode, .. }: &Parameters) -> Range<u64> {
    match mode {
        Mode::Idle => *start..*start,
        Mode::Random => {
            assert!((stride + 1).is_power_of_two(), "a mask");
            *start..start + (stride << 12) + 8
        }
        Mode::Write | Mode::Read | Mode::Burst => {
            assert_eq!(*stride, PAGE);
            *start..end - PAGE + 8
        }
    }
}

fn check(layout: &Layout, loads: &[Load], tsc_hz: u64) {
    let ram = layout.ram();
    assert_eq!(layout.vcpus(), loads.len());
    let mut last = WORKLOAD_ADDRESS;
    for (index, load) in loads.iter().enumerate() {
        let parameters = layout.parameters(index, tsc_hz, ram);
        let Parameters { start, end, stall_ticks, half_period, .. } = parameters;
        assert_eq!(start..end, layout.workload(index));
        assert!(start % PAGE == 0 && end - start == load.bytes, "not what was asked for");
        assert!(last <= start && end <= ram, "another's memory, or nobody's");
        let accessed = accessed(&parameters);
        assert!(
            accessed.is_empty() || start <= accessed.start && accessed.end <= end,
            "{accessed:?} of {start}..{end}"
        );
        for (ticks, time) in [(stall_ticks, load.stall), (half_period, load.half_period)] {
            let exact = u128::from(tsc_hz) * time.as_micros() / 1_000_000;
            assert_eq!(u128::from(ticks), exact.min(u64::MAX.into()), "ticks");
        }
        let words = parameters.words();
        assert_eq!(words[..4], [start, end, parameters.stride, load.delay]);
        assert_eq!(words[4..], [load.mode as u64, stall_ticks, index as u64, half_period, ram]);
        last = end;
    }
}

fuzz_target!(|input: Input| {
    let loads: Vec<Load> = input.loads.iter().take(MAX_VCPUS).map(AnyLoad::load).collect();
    match Layout::new(&loads) {
        Ok(layout) => check(&layout, &loads, input.tsc_hz),
        Err(error) => assert!(error.to_string().contains("vCPU"), "{error:#}"),
    }

    let mut image = input.image;
    image.resize(image.len() + input.filling as usize % (IMAGE_MAX + 2), 0x90);
    let path = std::env::temp_dir().join(format!("dirtylimit-fuzz-{}", std::process::id()));
    fs::write(&path, &image).expect("the temporary directory can be written to");
    match payload::load(&path) {
        Ok(loaded) => assert!(loaded == image && (1..=IMAGE_MAX).contains(&image.len())),
        Err(error) => assert!(image.is_empty() || image.len() > IMAGE_MAX, "{error:#}"),
    }
    fs::remove_file(&path).expect("it was just written");
});
