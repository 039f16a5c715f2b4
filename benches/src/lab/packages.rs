//! Packages of Debian, fetched by apt with lists and a cache of its own, and unpacked below the user's cache. Nothing is
//! installed, so no root is needed, and what is there already stays as it is.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::output::say;

/// Names the archive, where this machine's apt knows none of Debian.
const ARCHIVE: &str = "DIRTYLIMIT_LAB_ARCHIVE";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Packages that are unpacked together.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Root {
    /// Debian's release.
    pub(crate) suite: &'static str,
    /// As Debian calls it.
    pub(crate) arch: &'static str,
    /// Which packages.
    pub(crate) choice: Choice,
}

/// Which packages.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Choice {
    /// These and all that they need, the C library included.
    Whole(&'static [&'static str]),
    /// This one alone.
    Alone(&'static str),
    /// The kernel, with its modules, that this package stands for.
    Kernel(&'static str),
}

impl Root {
    /// The directory that it is unpacked in, below the lab's.
    pub(crate) fn directory(&self) -> String {
        let name = match self.choice {
            Choice::Whole(packages) => packages[0],
            Choice::Alone(package) | Choice::Kernel(package) => package,
        };
        format!("{}-{}/{name}", self.suite, self.arch)
    }
}

/// What the lab keeps.
#[derive(Debug)]
pub(crate) struct Store {
    home: PathBuf,
    /// Apt's lists and cache, of this process; gone with it.
    apt: PathBuf,
    updated: BTreeSet<String>,
}

impl Store {
    /// The user's: `$XDG_CACHE_HOME/dirtylimit/lab`, else `~/.cache/dirtylimit/lab`.
    ///
    /// # Errors
    /// There is no home.
    pub(crate) fn open() -> Result<Self> {
        let path = |name| std::env::var_os(name).filter(|path| !path.is_empty()).map(PathBuf::from);
        let cache = path("XDG_CACHE_HOME").or_else(|| path("HOME").map(|home| home.join(".cache")));
        let home = cache.context("neither XDG_CACHE_HOME nor HOME is set: where is the lab to be kept?")?;
        let home = home.join("dirtylimit/lab");
        sweep(&home, 2);
        let apt = home.join(format!("apt-{}", std::process::id()));
        Ok(Self { home, apt, updated: BTreeSet::new() })
    }

    /// Where it is.
    pub(crate) fn home(&self) -> &Path {
        &self.home
    }

    /// Whether `root` is there.
    pub(crate) fn has(&self, root: &Root) -> bool {
        self.home.join(root.directory()).is_dir()
    }

    /// The directory of `root`, which is fetched first if it is not there.
    ///
    /// # Errors
    /// Apt is missing or fails; the message says what it needs.
    pub(crate) fn root(&mut self, root: &Root) -> Result<PathBuf> {
        let path = self.home.join(root.directory());
        if !path.is_dir() {
            let new = path.with_extension(format!("new-{}", std::process::id()));
            let fetched = self.fetch(root, &new).with_context(|| format!("cannot fetch {}", root.directory()));
            if fetched.is_ok() && fs::rename(&new, &path).is_err() {
                // Another process was quicker.
                ensure!(path.is_dir(), "cannot create {}", path.display());
            }
            let _ = fs::remove_dir_all(&new);
            fetched?;
        }
        Ok(path)
    }

    fn fetch(&mut self, root: &Root, new: &Path) -> Result<()> {
        let state = self.state(root)?;
        let apt = Apt { state: &state, arch: root.arch };
        let debs = state.join("cache/archives");
        let (get, packages) = match root.choice {
            Choice::Whole(packages) => {
                (["install", "-y", "--download-only"].as_slice(), packages.iter().map(ToString::to_string).collect())
            }
            Choice::Alone(package) => (["download"].as_slice(), vec![package.to_owned()]),
            Choice::Kernel(meta) => (["download"].as_slice(), apt.kernel(meta)?),
        };
        let get = |last: &str| {
            let mut command = apt.command("apt-get");
            command.args(get).arg("--no-install-recommends").args(&packages).arg(last).current_dir(&debs);
            command
        };
        // One line for each package: 'address' file size hash.
        let listed = output(&mut get("--print-uris"))?;
        let sizes: Vec<u64> = listed.lines().filter_map(|line| line.split_whitespace().nth(2)?.parse().ok()).collect();
        say(format_args!(
            "lab: fetching {} of Debian {} ({}): {} packages, {} MB, into {}",
            packages.join(" "),
            root.suite,
            root.arch,
            sizes.len(),
            sizes.iter().sum::<u64>().div_ceil(1_000_000),
            self.home.join(root.directory()).display(),
        ));
        output(&mut get("-qq"))?;
        fs::create_dir_all(new)?;
        for deb in fs::read_dir(&debs)? {
            let deb = deb?.path();
            if deb.extension().is_some_and(|extension| extension == "deb") {
                output(Command::new("dpkg-deb").arg("-x").args([&deb, new]))?;
                fs::remove_file(&deb)?;
            }
        }
        Ok(())
    }

    /// Apt's state for the suite and architecture of `root`, with its lists brought up to date.
    fn state(&mut self, root: &Root) -> Result<PathBuf> {
        let name = format!("{}-{}", root.suite, root.arch);
        let state = self.apt.join(&name);
        if !self.updated.contains(&name) {
            let archive = archive()?;
            ensure!(
                Path::new(KEYRING).exists(),
                "{KEYRING} is missing, so what is fetched could not be trusted: install debian-archive-keyring"
            );
            for directory in ["lists/partial", "cache/archives/partial"] {
                fs::create_dir_all(state.join(directory))?;
            }
            // No package is installed, as far as this apt knows.
            fs::write(state.join("status"), "")?;
            fs::write(
                state.join("sources.list"),
                format!("deb [signed-by={KEYRING}] {archive} {} main\n", root.suite),
            )?;
            output(Apt { state: &state, arch: root.arch }.command("apt-get").args(["-qq", "update"]))?;
            self.updated.insert(name);
        }
        Ok(state)
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.apt);
    }
}

/// Removes what processes that were killed left below `directory`: its name ends with theirs.
fn sweep(directory: &Path, depth: u32) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let of = name.rsplit_once('-').filter(|(of, _)| ["run", "apt"].contains(of) || of.ends_with(".new"));
        match of.and_then(|(_, process)| process.parse::<u32>().ok()) {
            Some(process) if !Path::new("/proc").join(process.to_string()).exists() => {
                let _ = fs::remove_dir_all(entry.path());
            }
            None if depth > 1 => sweep(&entry.path(), depth - 1),
            _ => {}
        }
    }
}

/// Apt, with a state of its own.
struct Apt<'a> {
    state: &'a Path,
    arch: &'a str,
}

impl Apt<'_> {
    fn command(&self, program: &str) -> Command {
        let state = self.state.display();
        let mut command = Command::new(program);
        for option in [
            format!("Dir::Etc::SourceList={state}/sources.list"),
            "Dir::Etc::SourceParts=-".to_owned(),
            "Dir::Etc::PreferencesParts=-".to_owned(),
            "Dir::Etc::Preferences=-".to_owned(),
            format!("Dir::State={state}"),
            format!("Dir::State::Lists={state}/lists"),
            format!("Dir::State::status={state}/status"),
            format!("Dir::Cache={state}/cache"),
            format!("APT::Architecture={}", self.arch),
            format!("APT::Architectures={}", self.arch),
            "Acquire::Languages=none".to_owned(),
            "APT::Sandbox::User=".to_owned(),
            "Debug::NoLocking=1".to_owned(),
        ] {
            command.args(["-o", &option]);
        }
        command.env("LC_ALL", "C.UTF-8");
        command
    }

    /// The packages that the kernel `meta` stands for is made of: its image, and with newer ones its modules apart.
    fn kernel(&self, meta: &str) -> Result<Vec<String>> {
        let mut command = self.command("apt-cache");
        command.args(["depends", "--recurse", "--important", meta]);
        let names = kernel_packages(&output(&mut command)?);
        ensure!(!names.is_empty(), "{meta} stands for no kernel");
        Ok(names)
    }
}

/// Of what `apt-cache depends --recurse` says, the packages that have a part of a kernel.
fn kernel_packages(depends: &str) -> Vec<String> {
    let part = |name: &&str| {
        ["linux-image-", "linux-binary-", "linux-modules-"].iter().any(|prefix| {
            name.strip_prefix(prefix).is_some_and(|version| version.starts_with(|first: char| first.is_ascii_digit()))
        })
    };
    let names: BTreeSet<_> = depends.lines().filter(part).map(str::to_owned).collect();
    names.into_iter().filter(|name| !name.ends_with("-unsigned")).collect()
}

/// Debian's archive, as this machine reaches it.
fn archive() -> Result<String> {
    if let Ok(archive) = std::env::var(ARCHIVE) {
        return Ok(archive);
    }
    let mut command = Command::new("apt-get");
    let sites = output(command.args(["indextargets", "--format", "$(SITE)", "Created-By: Packages"])).context(
        "the lab is made of Debian's packages, and takes apt-get and dpkg-deb to fetch them: on another system run it in \
         Debian's container (nothing else is needed there, no KVM either)",
    )?;
    match sites.lines().find(|site| site.ends_with("/debian")) {
        Some(site) => Ok(site.to_owned()),
        None => bail!(
            "this machine's apt has no archive of Debian: name one in {ARCHIVE} (what follows `deb` in sources.list)"
        ),
    }
}

/// What `command` prints.
///
/// # Errors
/// It cannot be started, or fails; the message has what it said.
pub(super) fn output(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("cannot run {name}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{name} failed ({}): {}", output.status, said.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_of_a_kernel_are_found_whether_its_modules_are_apart_or_not() {
        let old = "linux-image-cloud-amd64\n  Depends: linux-image-6.1.0-50-cloud-amd64\nlinux-image-6.1.0-50-cloud-amd64\n\
                   \x20 Depends: kmod\nlinux-image-6.1.0-50-cloud-amd64-unsigned\nkmod\nlinux-base\n";
        assert_eq!(kernel_packages(old), ["linux-image-6.1.0-50-cloud-amd64"]);
        let new = "linux-image-cloud-amd64\nlinux-base-7.3.4\nlinux-image-7.3.4\nlinux-binary-7.3.4\nlinux-modules-7.3.4\n\
                   linux-modules-cloud-amd64\nlinux-binary-7.3.4\n";
        assert_eq!(kernel_packages(new), ["linux-binary-7.3.4", "linux-image-7.3.4", "linux-modules-7.3.4"]);
    }

    #[test]
    fn what_killed_processes_left_is_removed_and_nothing_else() {
        let home = std::env::temp_dir().join(format!("dirtylimit-lab-sweep-{}", std::process::id()));
        let own = std::process::id();
        // Above the largest process number there is.
        let gone = u32::MAX;
        let [kept, left] = [own, gone].map(|process| {
            [format!("run-{process}"), format!("apt-{process}"), format!("trixie-amd64/bochs.new-{process}")]
        });
        let packages = ["trixie-amd64/bochs".to_owned(), format!("trixie-amd64/linux-{gone}")];
        for path in kept.iter().chain(&left).chain(&packages) {
            fs::create_dir_all(home.join(path).join("usr")).unwrap();
        }
        sweep(&home, 2);
        let there = |path: &String| home.join(path).exists();
        let seen = (kept.iter().all(there), left.iter().any(there), packages.iter().all(there));
        fs::remove_dir_all(&home).unwrap();
        assert_eq!(seen, (true, false, true));
    }

    #[test]
    fn a_program_that_fails_is_named_with_what_it_said() {
        let failed = output(Command::new("sh").args(["-c", "echo no space >&2; exit 3"])).unwrap_err();
        assert!(format!("{failed:#}").contains("sh failed (exit status: 3): no space"), "{failed:#}");
    }
}
