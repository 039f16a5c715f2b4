//! `dirtylimit-bench`: runs a guest, limits it, reports.

#![deny(clippy::print_stdout, clippy::print_stderr)]

use std::fmt::Display;
use std::io::ErrorKind::BrokenPipe;
use std::path::Path;
use std::process::{self, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use clap::FromArgMatches;
use clap::error::ErrorKind;
use dirtylimit_bench::cli::{self, Cli, Command, Run};
use dirtylimit_bench::compare::{self, Case, Compare, Migrating};
use dirtylimit_bench::guest::{self, Progress};
use dirtylimit_bench::late;
use dirtylimit_bench::measure::worst_pct;
use dirtylimit_bench::migrate::{self, cli::Migrate};
use dirtylimit_bench::output::{Output, be_quiet, distinct, print, say, tell};
use dirtylimit_bench::plan::{MetricsTo, Plan};
use dirtylimit_bench::probe;
use dirtylimit_bench::record::{GuestKind, Recording};
use dirtylimit_bench::report::json::Report;
use dirtylimit_bench::report::progress::{Interrupt, Left, Live};
use dirtylimit_bench::report::{self, page, svg, table::Table};
use dirtylimit_bench::scenario::verdict::{Judged, Results};
use dirtylimit_bench::scenario::{self, Scenarios};
use kvm_bindings::{KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL};
use serde::Serialize;

/// The run failed, or a figure was missed.
const FAILED: u8 = 1;
/// Pages were lost. Bad usage is 2, which clap returns by itself.
const LOST: u8 = 3;
/// An error was above `--fail-over`.
const OVER: u8 = 4;
/// No figure was missed, but on this host some could not be judged.
const INVALID: u8 = 4;
/// Sleeps of the thread that only sleeps, beside a run.
const SLEEP: Duration = Duration::from_millis(1);

fn main() -> ExitCode {
    let matches = cli::command().try_get_matches().unwrap_or_else(|error| usage(&error));
    let asked = Cli::from_arg_matches(&matches).unwrap_or_else(|error| usage(&error.format(&mut cli::command())));
    if asked.quiet {
        be_quiet();
    }
    cli::plain_rates(&matches).into_iter().for_each(say);
    let done = match asked.command {
        Command::Run(run) => match run.plan() {
            Ok(plan) => execute(&run, &plan),
            Err(message) => bad_usage("run", message),
        },
        Command::Scenario(scenarios) => scenario(&scenarios),
        Command::Compare(asked) if asked.migration.migrate => match asked.migrating() {
            Ok(migrating) => migrations(&asked, &migrating),
            Err(message) => bad_usage("compare", message),
        },
        Command::Compare(asked) => match asked.cases() {
            Ok(cases) => side_by_side(&asked, &cases),
            Err(message) => bad_usage("compare", message),
        },
        Command::Migrate(asked) => match asked.plan() {
            Ok(plan) => migrate(&asked, &plan),
            Err(message) => bad_usage("migrate", message),
        },
        Command::Lab(lab) => match lab.check() {
            Ok(()) => lab.execute(),
            Err(message) => bad_usage("lab", message),
        },
        Command::Probe { json } => probe(json.as_deref()),
        Command::Completions { shell } => completions(shell),
        Command::Man { command } => man(command.as_deref()),
    };
    done.unwrap_or_else(|error| {
        complain(&error);
        ExitCode::from(FAILED)
    })
}

fn probe(json: Option<&Path>) -> Result<ExitCode> {
    let mut json = json.map(|path| Output::document("--json", path)).transpose()?;
    let found = probe::probe();
    let mut outcome = Outcome(if found.usable() { 0 } else { FAILED });
    match &mut json {
        Some(_) => outcome.document(&found, json.as_mut()),
        None => outcome.note(print(&found)),
    }
    Ok(outcome.status())
}

fn completions(shell: clap_complete::Shell) -> Result<ExitCode> {
    let mut text = Vec::new();
    let mut cli = cli::command();
    let name = cli.get_name().to_owned();
    clap_complete::generate(shell, &mut cli, name, &mut text);
    print(String::from_utf8_lossy(&text)).map(|()| ExitCode::SUCCESS)
}

fn man(command: Option<&str>) -> Result<ExitCode> {
    let mut cli = cli::command();
    cli.build();
    let page = match command {
        None => cli,
        Some(name) => match cli.find_subcommand(name) {
            Some(found) => found.clone(),
            None => bad_usage("man", format!("there is no command {name}; --help lists them")),
        },
    };
    let mut text = Vec::new();
    clap_mangen::Man::new(page).render(&mut text)?;
    print(String::from_utf8_lossy(&text)).map(|()| ExitCode::SUCCESS)
}

fn complain(error: &anyhow::Error) {
    tell(format_args!("dirtylimit-bench: {error:#}"));
}

fn bad_usage(subcommand: &str, message: String) -> ! {
    let mut cli = cli::command();
    cli.build();
    let subcommand = cli.find_subcommand_mut(subcommand).expect("it was parsed");
    usage(&subcommand.error(ErrorKind::ValueValidation, message))
}

/// Says what clap has to say, help or an error, and exits.
fn usage(error: &clap::Error) -> ! {
    match error.print() {
        Err(lost) if !error.use_stderr() && lost.kind() != BrokenPipe => {
            complain(&anyhow::Error::new(lost).context("cannot write to standard output"));
            process::exit(FAILED.into())
        }
        _ => process::exit(error.exit_code()),
    }
}

/// The exit status to come. What cannot be written fails, but keeps nothing else from being written.
struct Outcome(u8);

impl Outcome {
    fn note(&mut self, written: Result<()>) {
        if let Err(error) = written {
            complain(&error);
            self.0 = self.0.max(FAILED);
        }
    }

    /// Shows a person the result: on stdout, unless scripts get their document there.
    fn show(&mut self, text: impl Display, json: Option<&Output>) {
        if json.is_some_and(Output::is_stdout) { say(text) } else { self.note(print(text)) }
    }

    fn document(&mut self, document: &impl Serialize, json: Option<&mut Output>) {
        if let Some(json) = json {
            let text = serde_json::to_string(document).context("--json");
            self.note(text.and_then(|text| json.write(text + "\n")));
        }
    }

    fn page(&mut self, page: impl FnOnce() -> Result<page::Page>, output: Option<&mut Output>) {
        if let Some(output) = output {
            self.note(page().and_then(|page| page.write(output)));
        }
    }

    fn status(self) -> ExitCode {
        ExitCode::from(self.0)
    }
}

fn execute(run: &Run, plan: &Plan) -> Result<ExitCode> {
    for asked in run.workload.iter().filter(|workload| workload.maskable() != **workload) {
        say(format_args!("{asked}: the guest masks its page index, so it is {} that runs.", asked.maskable()));
    }
    // What has nowhere to go is found out before the run, not after it.
    let mut json = run.json.as_deref().map(|path| Output::document("--json", path)).transpose()?;
    let mut csv = run.csv.as_deref().map(|path| Output::document("--csv", path)).transpose()?;
    let mut drawing = run.svg.as_deref().map(|path| Output::prepare("--svg", path)).transpose()?;
    let mut page = run.report.as_deref().map(page::prepare).transpose()?;
    let metrics = match &plan.metrics {
        // A reader of a pipe would take this for its end.
        Some(MetricsTo::File(file)) if file.metadata().map_or(true, |found| found.is_file()) => {
            Some(Output::prepare("--metrics", file)?)
        }
        _ => None,
    };
    distinct(&[json.as_ref(), csv.as_ref(), drawing.as_ref(), page.as_ref(), metrics.as_ref()])?;
    let guest = choose(run)?;
    let mut live = Live::new(plan, Interrupt::install()?);
    let (recording, late) = late::beside(SLEEP, || start(guest, plan, &mut live));
    live.finish();
    let mut recording = recording?;
    if guest == GuestKind::Kvm {
        recording.host.sleep_late_p999_ms = late;
    }

    let mut outcome = Outcome(if recording.lost_pages > Some(0) { LOST } else { 0 });
    outcome.show(Table(&recording), [&json, &csv].into_iter().flatten().find(|output| output.is_stdout()));
    outcome.document(&Report::of(&recording), json.as_mut());
    if let Some(csv) = &mut csv {
        outcome.note(csv.write(report::csv::csv(&recording)));
    }
    if let Some(drawing) = &mut drawing {
        outcome.note(svg::draw(&recording).and_then(|drawn| drawing.write(drawn)));
    }
    outcome.page(|| report::run::page(&recording), page.as_mut());
    let worst = run.fail_over.zip(worst_pct(&recording)).filter(|(most, error)| error.abs() > *most);
    if let Some((most, error)) = worst {
        complain(&anyhow!("--fail-over: an error of {error:+.1} % is above {most} %"));
        outcome.0 = if outcome.0 == 0 { OVER } else { outcome.0 };
    }
    Ok(outcome.status())
}

fn scenario(asked: &Scenarios) -> Result<ExitCode> {
    if asked.list {
        return print(Scenarios::listed()).map(|()| ExitCode::SUCCESS);
    }
    let mut json = asked.json.as_deref().map(|path| Output::document("--json", path)).transpose()?;
    let mut page = asked.report.as_deref().map(page::prepare).transpose()?;
    distinct(&[json.as_ref(), page.as_ref()])?;
    kvm().context("a scenario measures the real thing")?;
    let interrupt = Interrupt::install()?;
    let mut outcome = Outcome(0);
    let mut all = Vec::new();
    let chosen = asked.chosen();
    let mut left = Left(chosen.iter().flat_map(|scenario| &scenario.cases).map(|case| case.trial.time()).sum());
    for chosen in chosen {
        let tried = scenario::run(chosen, asked.rows, &mut left, &interrupt)?;
        let interrupted = tried.verdict.untried > 0;
        if interrupted {
            outcome.note(Err(anyhow!("interrupted")));
        }
        if tried.tries.is_empty() {
            break;
        }
        if !asked.rows {
            outcome.show(format_args!("{}\n", tried.verdict), json.as_ref());
        }
        all.push(tried);
        if interrupted {
            break;
        }
    }
    let host = probe::host(true, None);
    let verdicts: Vec<_> = all.iter().map(|tried| &tried.verdict).collect();
    let any = |judged| verdicts.iter().any(|verdict| verdict.count(judged) > 0);
    outcome.0 = match verdicts.iter().any(|verdict| verdict.lost_pages > 0) {
        _ if asked.rows => outcome.0,
        true => LOST,
        false if any(Judged::Missed) => FAILED,
        false if any(Judged::Invalid) && outcome.0 == 0 => INVALID,
        false => outcome.0,
    };
    outcome.document(&Results { host: &host, scenarios: verdicts, interrupted: interrupt.requested() }, json.as_mut());
    outcome.page(|| report::scenario::page(&all, &host), page.as_mut());
    Ok(outcome.status())
}

fn side_by_side(asked: &Compare, cases: &[Case]) -> Result<ExitCode> {
    if let Some(path) = &asked.write_rom {
        let (rom, command) = asked.rom(&cases[0], path)?;
        Output::prepare("--write-rom", path)?.write(rom)?;
        return print(command).map(|()| ExitCode::SUCCESS);
    }
    let mut json = asked.json.as_deref().map(|path| Output::document("--json", path)).transpose()?;
    let mut page = asked.report.as_deref().map(page::prepare).transpose()?;
    distinct(&[json.as_ref(), page.as_ref()])?;
    kvm().context("a comparison needs the real thing")?;
    let peers = asked.find_peers()?;
    let comparison = asked.run(cases, &peers[0], &Interrupt::install()?)?;
    let mut outcome = Outcome(if comparison.lost_pages > 0 { LOST } else { 0 });
    outcome.show(&comparison, json.as_ref());
    outcome.document(&comparison, json.as_mut());
    outcome.page(|| compare::page(&comparison), page.as_mut());
    Ok(outcome.status())
}

fn migrations(asked: &Compare, migrating: &Migrating) -> Result<ExitCode> {
    let mut json = asked.json.as_deref().map(|path| Output::document("--json", path)).transpose()?;
    let mut page = asked.report.as_deref().map(page::prepare).transpose()?;
    distinct(&[json.as_ref(), page.as_ref()])?;
    kvm().context("a comparison needs the real thing")?;
    let migrations = migrating.run(&asked.find_peers()?, &Interrupt::install()?)?;
    let mut outcome = Outcome(if migrations.lost() { LOST } else { 0 });
    outcome.show(&migrations, json.as_ref());
    outcome.document(&migrations, json.as_mut());
    outcome.page(|| compare::migrations_page(&migrations), page.as_mut());
    Ok(outcome.status())
}

fn migrate(asked: &Migrate, plan: &migrate::cli::Plan) -> Result<ExitCode> {
    if let Some(address) = &asked.listen {
        kvm().context("a guest can come only where KVM has a dirty ring")?;
        return migrate::listen(address, &Interrupt::install()?).map(ExitCode::from);
    }
    let mut json = asked.json.as_deref().map(|path| Output::document("--json", path)).transpose()?;
    let mut drawing = asked.svg.as_deref().map(|path| Output::prepare("--svg", path)).transpose()?;
    distinct(&[json.as_ref(), drawing.as_ref()])?;
    kvm().context("a migration needs the real thing")?;
    let migrated = migrate::migrate(plan, &Interrupt::install()?)?;
    let mut outcome = Outcome(migrated.status());
    outcome.show(&migrated, json.as_ref());
    outcome.document(&migrated, json.as_mut());
    if let Some(drawing) = &mut drawing {
        outcome.note(migrate::picture::draw(&migrated).and_then(|drawn| drawing.write(drawn)));
    }
    Ok(outcome.status())
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
                say(format_args!("No KVM guest can run here ({error:#}): this is the simulated one, in virtual time."));
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
    ensure!(kind == GuestKind::Kvm || !run.steal_time, "--steal-time needs the KVM guest: it is not simulated");
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
