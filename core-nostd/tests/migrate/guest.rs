//! Guests of the simulation: which pages they write, free or under a budget.

/// Pages in a MiB.
pub(crate) const MIB: f64 = 256.0;

/// A guest, its dirty log and its limiter. Times in seconds, pages as reals where only their number counts.
pub(crate) trait Guest {
    /// All of its memory, in pages.
    fn memory(&self) -> f64;
    /// Clears the dirty log.
    fn clear(&mut self);
    /// Distinct pages written since the log was cleared.
    fn dirty(&self) -> f64;
    /// Distinct pages that it writes in a while of `time`, about now, when free.
    fn activity(&self, time: f64) -> f64;
    /// Lets it run for `time`, dirtying at most `budget` pages a second. Returns how far it got: the mean of its vCPUs.
    fn run(&mut self, time: f64, budget: Option<f64>) -> f64;
}

type OfTime = Box<dyn Fn(f64) -> f64>;

/// Memory that a vCPU writes to.
pub(crate) struct Region {
    /// Pages, by the vCPU's own time.
    size: OfTime,
    /// Writes per second, each to another page.
    rate: OfTime,
    /// One page after the other, or any.
    in_order: bool,
    dirty: f64,
}

impl Region {
    pub(crate) fn new(size: impl Fn(f64) -> f64 + 'static, rate: impl Fn(f64) -> f64 + 'static) -> Self {
        Self { size: Box::new(size), rate: Box::new(rate), in_order: false, dirty: 0.0 }
    }

    pub(crate) fn in_order(mut self) -> Self {
        self.in_order = true;
        self
    }

    /// Pages that it dirties in `time` when free, beside those that are dirty.
    fn fresh(&self, now: f64, time: f64, dirty: f64) -> f64 {
        let (size, writes) = ((self.size)(now), (self.rate)(now) * time);
        let clean = (size - dirty).max(0.0);
        if self.in_order { writes.min(clean) } else { clean * -(-writes / size).exp_m1() }
    }
}

struct Vcpu {
    regions: Vec<Region>,
    now: f64,
}

impl Vcpu {
    /// Pages that it dirties in `time` when free.
    fn demand(&self, time: f64) -> f64 {
        self.regions.iter().map(|region| region.fresh(self.now, time, region.dirty)).sum()
    }

    /// How long it takes for `pages`, which are fewer than it dirties in `time`.
    fn time_for(&self, pages: f64, time: f64) -> f64 {
        // What is dirtied is concave in the time: each chord comes closer, from above.
        (0..6).fold(time, |time, _| time * pages / self.demand(time))
    }
}

/// vCPUs that write to regions of their own at random, by the expected number of distinct pages.
pub(crate) struct Synthetic {
    memory: f64,
    vcpus: Vec<Vcpu>,
}

impl Synthetic {
    pub(crate) fn new(memory: f64, vcpus: Vec<Vec<Region>>) -> Self {
        Self { memory, vcpus: vcpus.into_iter().map(|regions| Vcpu { regions, now: 0.0 }).collect() }
    }
}

impl Guest for Synthetic {
    fn memory(&self) -> f64 {
        self.memory
    }

    fn clear(&mut self) {
        self.vcpus.iter_mut().flat_map(|vcpu| &mut vcpu.regions).for_each(|region| region.dirty = 0.0);
    }

    fn dirty(&self) -> f64 {
        self.vcpus.iter().flat_map(|vcpu| &vcpu.regions).map(|region| region.dirty).sum()
    }

    fn activity(&self, time: f64) -> f64 {
        let of = |vcpu: &Vcpu| vcpu.regions.iter().map(|region| region.fresh(vcpu.now, time, 0.0)).sum::<f64>();
        self.vcpus.iter().map(of).sum()
    }

    fn run(&mut self, time: f64, budget: Option<f64>) -> f64 {
        let demands: Vec<_> = self.vcpus.iter().map(|vcpu| vcpu.demand(time)).collect();
        // Max-min fair, as the limiter splits its budget.
        let mut order: Vec<_> = demands.clone();
        order.sort_by(f64::total_cmp);
        let (mut rest, mut level) = (budget.map_or(f64::INFINITY, |budget| budget * time), f64::INFINITY);
        for (i, demand) in order.iter().enumerate() {
            let share = rest / (order.len() - i) as f64;
            if *demand > share {
                level = share;
                break;
            }
            rest -= demand;
        }
        let mut progress = 0.0;
        for (vcpu, demand) in self.vcpus.iter_mut().zip(&demands) {
            let step = if *demand > level { vcpu.time_for(level, time) } else { time };
            for region in &mut vcpu.regions {
                region.dirty += region.fresh(vcpu.now, step, region.dirty);
            }
            vcpu.now += step;
            progress += step;
        }
        progress / self.vcpus.len() as f64
    }
}

/// A program that was recorded by `ci/page-traces.sh`, over and over, in a guest whose other memory is idle.
#[derive(Clone)]
pub(crate) struct Traced {
    memory: f64,
    /// The pages written in each window.
    windows: Vec<Vec<u32>>,
    /// Of guest time, in seconds.
    window: f64,
    /// Where it is: the window, and the page in it.
    at: (usize, usize),
    /// In which round each page was dirtied last.
    dirtied: Vec<u32>,
    round: u32,
    dirty: u32,
    /// How far it is ahead of the clock, within a page, and when the limiter admits the next page, in seconds from now.
    ahead: f64,
    admits: f64,
}

impl Traced {
    pub(crate) fn new(trace: &[u8], idle: f64, window: f64) -> Self {
        let mut bytes = trace.iter();
        let mut next = || {
            let (mut value, mut shift) = (0u32, 0);
            loop {
                let byte = u32::from(*bytes.next().expect("the trace is whole"));
                value |= (byte & 127) << shift;
                shift += 7;
                if byte < 128 {
                    return value;
                }
            }
        };
        let (pages, count) = (next(), next());
        let mut pages_of_window = || {
            let (mut window, mut end) = (Vec::new(), 0);
            for _ in 0..next() {
                let start = end + next();
                end = start + next();
                window.extend(start..end);
            }
            window
        };
        let windows: Vec<_> = (0..count).map(|_| pages_of_window()).collect();
        assert!(bytes.next().is_none(), "the trace has no more");
        let dirtied = vec![0; pages as usize];
        let memory = f64::from(pages) * (1.0 + idle);
        Self { memory, windows, window, at: (0, 0), dirtied, round: 1, dirty: 0, ahead: 0.0, admits: 0.0 }
    }

    /// How many pages it ever writes.
    pub(crate) fn written(&self) -> f64 {
        self.dirtied.len() as f64
    }
}

impl Guest for Traced {
    fn memory(&self) -> f64 {
        self.memory
    }

    fn clear(&mut self) {
        self.round += 1;
        self.dirty = 0;
    }

    fn dirty(&self) -> f64 {
        self.dirty.into()
    }

    fn activity(&self, time: f64) -> f64 {
        let count = (time / self.window) as usize;
        let windows = self.windows.iter().cycle().skip(self.at.0).take(count);
        let mut pages: Vec<_> = windows.flatten().collect();
        pages.sort_unstable();
        pages.dedup();
        pages.len() as f64
    }

    fn run(&mut self, time: f64, budget: Option<f64>) -> f64 {
        let (mut now, mut progress) = (self.ahead, 0.0);
        if budget.is_none() {
            self.admits = 0.0;
        }
        while now < time {
            let (window, page) = self.at;
            let pages = &self.windows[window];
            let step = self.window / pages.len().max(1) as f64;
            if let Some(&page) = pages.get(page) {
                let last = &mut self.dirtied[page as usize];
                if *last != self.round {
                    if let Some(budget) = budget {
                        if self.admits > time {
                            now = time;
                            break;
                        }
                        now = now.max(self.admits);
                        self.admits = now + 1.0 / budget;
                    }
                    *last = self.round;
                    self.dirty += 1;
                }
            }
            now += step;
            progress += step;
            self.at = if page + 1 < pages.len() { (window, page + 1) } else { ((window + 1) % self.windows.len(), 0) };
        }
        self.ahead = now - time;
        self.admits = (self.admits - time).max(0.0);
        progress
    }
}
