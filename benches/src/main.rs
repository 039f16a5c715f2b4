//! `dirtylimit-bench`: runs a guest, limits it, reports.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};
use dirtylimit_bench::cli::{Cli, Command, Run};
use dirtylimit_bench::compare::{self, Compare, cases::Case};
use dirtylimit_bench::guest::{self, Progress};
use dirtylimit_bench::plan::Plan;
use dirtylimit_bench::probe;
use dirtylimit_bench::record::{GuestKind, Recording};
use dirtylimit_bench::report::json::Report;
use dirtylimit_bench::report::page::{self, Page};
use dirtylimit_bench::report::progress::{Interrupt, Live};
use dirtylimit_bench::report::{self, svg, table::Table};
use dirtylimit_bench::scenario::verdict::Results;
use dirtylimit_bench::scenario::{self, Scenarios};
use kvm_bindings::{KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL};

/// The run failed, or a figure was missed.
const FAILED: u8 = 1;
/// Pages were lost. Bad usage is 2, which clap returns by itself.
const LOST: u8 = 3;

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Run(run) => match run.plan() {
            Ok(plan) => execute(&run, &plan),
            Err(message) => bad_usage("run", message),
        },
        Command::Scenario(scenarios) => scenario(&scenarios),
        Command::Compare(asked) => match asked.cases() {
            Ok(cases) => side_by_side(&asked, &cases),
            Err(message) => bad_usage("compare", message),
        },
        Command::Lab(lab) => match lab.check() {
            Ok(()) => lab.execute(),
            Err(message) => bad_usage("lab", message),
        },
        Command::Probe => say(&probe::probe().to_string()).map(|()| ExitCode::SUCCESS),
    };
    done.unwrap_or_else(|error| {
        eprintln!("dirtylimit-bench: {error:#}");
        ExitCode::from(FAILED)
    })
}

fn bad_usage(subcommand: &str, message: String) -> ! {
    let mut cli = Cli::command();
    cli.build();
    let subcommand = cli.find_subcommand_mut(subcommand).expect("it was parsed");
    subcommand.error(ErrorKind::ValueValidation, message).exit()
}

fn execute(run: &Run, plan: &Plan) -> Result<ExitCode> {
    for asked in run.workload.iter().filter(|workload| workload.maskable() != **workload) {
        eprintln!("{asked}: the guest masks its page index, so it is {} that runs.", asked.maskable());
    }
    let json = run.json.as_deref();
    let to_stdout = json == Some(Path::new("-"));
    // A report that has nowhere to go is found out before the run, not after it.
    for path in [json.filter(|_| !to_stdout), run.svg.as_deref()].into_iter().flatten() {
        writable(path)?;
    }
    run.report.as_deref().map_or(Ok(()), page::prepare)?;
    let guest = choose(run)?;
    let mut live = Live::new(plan, Interrupt::install()?);
    let recording = start(guest, plan, &mut live);
    live.finish();
    let recording = recording?;

    let table = Table(&recording).to_string();
    if to_stdout {
        eprint!("{table}");
    } else {
        say(&table)?;
    }
    if let Some(path) = json {
        let document = serde_json::to_string(&Report::of(&recording))?;
        if to_stdout {
            say(&document)?;
        } else {
            fs::write(path, document + "\n").with_context(|| format!("cannot write {}", path.display()))?;
        }
    }
    if let Some(path) = &run.svg {
        svg::write(&recording, path)?;
    }
    if let Some(directory) = &run.report {
        report(&report::run::page(&recording)?, directory)?;
    }
    Ok(if recording.lost_pages > Some(0) { ExitCode::from(LOST) } else { ExitCode::SUCCESS })
}

fn scenario(asked: &Scenarios) -> Result<ExitCode> {
    if asked.list {
        return say(&Scenarios::listed()).map(|()| ExitCode::SUCCESS);
    }
    let to_stdout = asked.json.as_deref() == Some(Path::new("-"));
    if let Some(path) = asked.json.as_deref().filter(|_| !to_stdout) {
        writable(path)?;
    }
    asked.report.as_deref().map_or(Ok(()), page::prepare)?;
    kvm().context("a scenario measures the real thing")?;
    let interrupt = Interrupt::install()?;
    let mut all = Vec::new();
    for chosen in asked.chosen() {
        let tried = scenario::run(chosen, asked.runs, &interrupt)?;
        let verdict = &tried.verdict;
        if to_stdout {
            eprintln!("{verdict}");
        } else {
            say(&format!("{verdict}\n"))?;
        }
        all.push(tried);
    }
    let host = probe::host(true, None);
    let verdicts: Vec<_> = all.iter().map(|tried| &tried.verdict).collect();
    let (lost, met) =
        (verdicts.iter().any(|verdict| verdict.lost_pages > 0), verdicts.iter().all(|verdict| verdict.met()));
    if let Some(path) = &asked.json {
        let document = serde_json::to_string(&Results { host: &host, scenarios: verdicts })?;
        if to_stdout {
            say(&document)?;
        } else {
            fs::write(path, document + "\n").with_context(|| format!("cannot write {}", path.display()))?;
        }
    }
    if let Some(directory) = &asked.report {
        report(&report::scenario::page(&all, &host)?, directory)?;
    }
    Ok(ExitCode::from(match (lost, met) {
        (true, _) => LOST,
        (false, false) => FAILED,
        (false, true) => 0,
    }))
}

fn side_by_side(asked: &Compare, cases: &[Case]) -> Result<ExitCode> {
    if let Some(path) = &asked.write_rom {
        let (rom, command) = asked.rom(&cases[0], path)?;
        fs::write(path, rom).with_context(|| format!("cannot write {}", path.display()))?;
        return say(&command).map(|()| ExitCode::SUCCESS);
    }
    let to_stdout = asked.json.as_deref() == Some(Path::new("-"));
    if let Some(path) = asked.json.as_deref().filter(|_| !to_stdout) {
        writable(path)?;
    }
    asked.report.as_deref().map_or(Ok(()), page::prepare)?;
    kvm().context("a comparison needs the real thing")?;
    let peer = asked.find_peer()?;
    let comparison = asked.run(cases, &peer, &Interrupt::install()?)?;
    if to_stdout {
        eprintln!("{comparison}");
    } else {
        say(&comparison.to_string())?;
    }
    if let Some(path) = &asked.json {
        let document = serde_json::to_string(&comparison)?;
        if to_stdout {
            say(&document)?;
        } else {
            fs::write(path, document + "\n").with_context(|| format!("cannot write {}", path.display()))?;
        }
    }
    if let Some(directory) = &asked.report {
        report(&compare::page::page(&comparison)?, directory)?;
    }
    Ok(if comparison.lost_pages > 0 { ExitCode::from(LOST) } else { ExitCode::SUCCESS })
}

fn start(guest: GuestKind, plan: &Plan, progress: &mut dyn Progress) -> Result<Recording> {
    match guest {
        GuestKind::Kvm => guest::kvm::run(plan, progress),
        GuestKind::Sim => guest::sim::run(plan, progress),
    }
}

/// The guest that was asked for; else KVM's where that can be used, and the simulated one, saying why, where not.
fn choose(run: &Run) -> Result<GuestKind> {
    let kind = match run.guest {
        Some(kind) => kind,
        None => match kvm() {
            Ok(()) => GuestKind::Kvm,
            Err(error) => {
                eprintln!("No KVM guest can run here ({error:#}): this is the simulated one, in virtual time.");
                GuestKind::Sim
            }
        },
    };
    ensure!(
        kind == GuestKind::Kvm || run.qmp.is_none(),
        "--qmp needs the KVM guest: the simulated one runs in virtual time"
    );
    ensure!(
        kind == GuestKind::Kvm || run.metrics.is_none(),
        "--metrics needs the KVM guest: the simulated one runs in virtual time"
    );
    ensure!(
        kind == GuestKind::Kvm || run.payload.is_none(),
        "--payload needs the KVM guest: the simulated one runs no code"
    );
    Ok(kind)
}

/// Whether KVM opens and has a dirty ring.
fn kvm() -> Result<()> {
    let kvm = guest::kvm::open()?;
    let rings = [KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING];
    let has = rings.iter().any(|&ring| kvm.check_extension_raw(u64::from(ring)) > 0);
    ensure!(has, "this KVM has no dirty ring");
    Ok(())
}

fn writable(path: &Path) -> Result<File> {
    // Not truncated yet: a run that fails leaves an older report as it is.
    let file = OpenOptions::new().create(true).append(true).open(path);
    file.with_context(|| format!("cannot write {}", path.display()))
}

fn report(page: &Page, directory: &Path) -> Result<()> {
    eprintln!("The report is {}.", page.write(directory)?.display());
    Ok(())
}

/// Writes to stdout; a reader that has gone away is no error.
fn say(text: &str) -> Result<()> {
    match writeln!(io::stdout().lock(), "{}", text.trim_end()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result.context("cannot write to standard output"),
    }
}
