//! What a machine boots: a shell, the modules of KVM, the program with its libraries, and the script that runs it.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use super::catalogue::Machine;
use super::cpio::Archive;
use super::elf::Elf;
use super::packages::output;

/// What the console says just before the program runs.
pub(crate) const STARTS: &str = "lab: the program starts";
/// What the port of the program's standard output has behind all of it, before the exit status and a zero byte.
pub(crate) const ENDED: &[u8] = b"\0lab-status ";

/// The program that a machine runs.
#[derive(Debug)]
pub(crate) struct Program {
    name: String,
    binary: Vec<u8>,
    /// What it needs: path in the machine, content.
    files: Vec<(String, Vec<u8>)>,
}

impl Program {
    /// `path`, with the libraries that this host runs it with.
    ///
    /// # Errors
    /// It is not a program for `machine`, or a library is missing.
    pub(crate) fn read(path: &Path, machine: Machine) -> Result<Self> {
        let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        let elf = Elf::new(&bytes).with_context(|| format!("{} cannot run in the lab", path.display()))?;
        ensure!(
            elf.machine() == machine.facts().elf,
            "{} is not a program for {machine}: name one that is with --program",
            path.display()
        );
        let files = match elf.interpreter()? {
            None => Vec::new(),
            Some(interpreter) => {
                let listed = output(Command::new(interpreter).arg("--list").arg(path))
                    .with_context(|| format!("cannot list the libraries of {}", path.display()))?;
                let paths = libraries(&listed)?.into_iter().chain([interpreter.to_owned()]);
                let read = |path: String| {
                    let bytes = fs::read(&path).with_context(|| format!("cannot read {path}"))?;
                    Ok((path, Elf::new(&bytes)?.stripped()?))
                };
                paths.collect::<BTreeSet<_>>().into_iter().map(read).collect::<Result<_>>()?
            }
        };
        let name = path.file_name().and_then(|name| name.to_str()).context("the program's name is not UTF-8")?;
        Ok(Self { name: name.to_owned(), binary: elf.stripped()?, files })
    }

    /// The same, with more files beside it.
    #[must_use]
    pub(crate) fn with(mut self, more: Vec<(String, Vec<u8>)>) -> Self {
        self.files.extend(more);
        self
    }
}

/// The paths that a loader lists as those of a program's libraries.
///
/// # Errors
/// One is not there.
pub(crate) fn libraries(listed: &str) -> Result<Vec<String>> {
    // "name => path (address)", "path (address)" for the loader, and "name (address)" for what the kernel gives.
    let mut paths = Vec::new();
    for line in listed.lines() {
        ensure!(!line.contains("not found"), "a library is missing: {}", line.trim());
        let path = line.split_once(" => ").map_or(line, |(_, path)| path).trim();
        let path = path.rsplit_once(" (0x").map_or(path, |(path, _)| path);
        if path.starts_with('/') {
            paths.push(path.to_owned());
        }
    }
    Ok(paths)
}

/// The archive that makes `machine` run `program` with `arguments`, after its shell has done `prepare`.
///
/// # Errors
/// A module cannot be read, or an argument is not UTF-8.
pub(crate) fn build(
    machine: Machine,
    kernel: &Path,
    busybox: &Path,
    program: &Program,
    arguments: &[OsString],
    prepare: Option<&str>,
) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    archive.console();
    for directory in ["proc", "sys", "tmp", "root"] {
        archive.directory(directory);
    }
    let busybox =
        ["bin/busybox", "usr/bin/busybox"].map(|path| busybox.join(path)).into_iter().find(|path| path.is_file());
    archive.file("bin/busybox", &fs::read(busybox.context("the package busybox-static has no busybox")?)?);
    for (path, content) in &program.files {
        archive.file(path, content);
    }
    archive.file(&program.name, &program.binary);
    let mut loaded = Vec::new();
    for module in machine.facts().modules {
        module_with_needs(kernel, module, &mut loaded)?;
    }
    for (name, content) in &loaded {
        archive.file(&format!("modules/{name}"), content);
    }
    let words = [program.name.as_str()]
        .into_iter()
        .map(Ok)
        .chain(arguments.iter().map(|word| word.to_str().with_context(|| format!("{word:?} is not UTF-8"))));
    let words = words.collect::<Result<Vec<_>>>()?;
    let modules: Vec<_> = loaded.iter().map(|(name, _)| name.as_str()).collect();
    archive.file("init", script(machine, &modules, &words, prepare)?.as_bytes());
    Ok(archive.finish())
}

/// The first process: brings the machine up, runs the program, tells its exit status and turns the machine off.
fn script(machine: Machine, modules: &[&str], words: &[&str], prepare: Option<&str>) -> Result<String> {
    let [_, port] = machine.facts().ports;
    let command = shlex::try_join(words.iter().copied()).context("an argument has a zero byte")?;
    let modules = modules.join(" ");
    // Without it, not a byte is another.
    let prepare = prepare.map(|commands| format!("{commands}\n")).unwrap_or_default();
    Ok(format!(
        r#"#!/bin/busybox sh
b=/bin/busybox
export PATH=/bin HOME=/root TERM=dumb NO_COLOR=1 RUST_BACKTRACE=1
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs devtmpfs /dev
$b mount -t debugfs debugfs /sys/kernel/debug
$b mount -t tmpfs tmpfs /tmp
for module in {modules}; do $b insmod /modules/$module; done
# Not a character more or less than the program writes.
$b stty -F /dev/{port} 115200 raw -echo
$b mkfifo /stdout
$b cat /stdout >/dev/{port} &
cd /
{prepare}echo "{STARTS}"
# Pipes for both: a terminal would be asked for its size.
{{ /{command} 2>&1 >/stdout </dev/null; echo $? >/status; }} | $b cat
wait
$b printf '\0lab-status %d\0' "$($b cat /status)" >/dev/{port}
# What was written reaches the emulator's file.
$b sleep 2
$b poweroff -f
"#
    ))
}

/// Appends the module `name` of `kernel`, after those that it needs. What is not there is in the kernel itself.
fn module_with_needs(kernel: &Path, name: &str, loaded: &mut Vec<(String, Vec<u8>)>) -> Result<()> {
    let file = format!("{}.ko", name.replace('-', "_"));
    if loaded.iter().any(|(known, _)| *known == file) {
        return Ok(());
    }
    let Some(path) = ["lib/modules", "usr/lib/modules"].iter().find_map(|below| find(&kernel.join(below), &file))
    else {
        return Ok(());
    };
    let content = match path.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => decompressed("xz", &path)?,
        Some("zst") => decompressed("zstd", &path)?,
        _ => fs::read(&path)?,
    };
    for needed in needs(&content) {
        module_with_needs(kernel, &needed, loaded)?;
    }
    loaded.push((file, content));
    Ok(())
}

fn decompressed(tool: &str, path: &Path) -> Result<Vec<u8>> {
    let done = Command::new(tool).arg("-dc").arg(path).output();
    let done = done.with_context(|| format!("{tool} is missing: a module of the kernel is packed by it"))?;
    if !done.status.success() {
        bail!("{tool} cannot read {}: {}", path.display(), String::from_utf8_lossy(&done.stderr));
    }
    Ok(done.stdout)
}

/// The names in the field `depends=` of a module.
fn needs(module: &[u8]) -> Vec<String> {
    const FIELD: &[u8] = b"\0depends=";
    let Some(at) = module.windows(FIELD.len()).position(|window| window == FIELD) else { return Vec::new() };
    let rest = &module[at + FIELD.len()..];
    let text = &rest[..rest.iter().position(|&byte| byte == 0).unwrap_or(rest.len())];
    String::from_utf8_lossy(text).split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

/// The file of the module `name` below `directory`; the names of files have both kinds of dashes, and may be compressed.
fn find(directory: &Path, name: &str) -> Option<PathBuf> {
    for entry in fs::read_dir(directory).ok()?.flatten() {
        let path = entry.path();
        let found = if entry.file_type().ok()?.is_dir() {
            find(&path, name)
        } else {
            let file = entry.file_name().to_string_lossy().replace('-', "_");
            [".xz", ".zst", ""].iter().any(|packed| file.strip_suffix(packed) == Some(name)).then_some(path)
        };
        if found.is_some() {
            return found;
        }
    }
    None
}

/// The image of the one kernel below `root`.
///
/// # Errors
/// There is none.
pub(crate) fn image(root: &Path) -> Result<PathBuf> {
    let modules = ["usr/lib/modules", "lib/modules"].map(|path| root.join(path));
    let releases = modules.iter().filter_map(|path| fs::read_dir(path).ok()).flatten().flatten();
    let mut places: Vec<_> = releases.map(|release| release.path().join("vmlinuz")).collect();
    if let Ok(boot) = fs::read_dir(root.join("boot")) {
        places.extend(boot.flatten().map(|entry| entry.path()));
    }
    let is_image = |path: &PathBuf| {
        path.is_file() && path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz"))
    };
    places.into_iter().find(is_image).with_context(|| format!("no kernel below {}", root.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_libraries_of_a_program_are_those_with_a_path() {
        let listed = "\tlinux-vdso.so.1 (0x00007ffc)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f00)\n\
                      \t/lib64/ld-linux-x86-64.so.2 (0x00007f10)\n";
        assert_eq!(libraries(listed).unwrap(), ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"]);
        let missing = libraries("\tlibodd.so => not found\n").unwrap_err();
        assert!(missing.to_string().contains("libodd.so"), "{missing}");
    }

    #[test]
    fn modules_come_after_those_they_need_each_once() {
        let root = std::env::temp_dir().join(format!("dirtylimit-lab-modules-{}", std::process::id()));
        let directory = root.join("usr/lib/modules/1.0/kernel/virt");
        fs::create_dir_all(&directory).unwrap();
        for (file, depends) in [("kvm-amd.ko", "kvm,ccp"), ("kvm.ko", "irqbypass"), ("irqbypass.ko", "")] {
            fs::write(directory.join(file), format!("junk\0license=GPL\0depends={depends}\0name=x\0")).unwrap();
        }
        let mut loaded = Vec::new();
        let result = module_with_needs(&root, "kvm-amd", &mut loaded)
            .and_then(|()| module_with_needs(&root, "kvm", &mut loaded));
        fs::remove_dir_all(&root).unwrap();
        result.unwrap();
        let names: Vec<_> = loaded.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["irqbypass.ko", "kvm.ko", "kvm_amd.ko"]);
    }

    #[test]
    fn arguments_reach_the_program_as_they_are() {
        let words = ["bench", "--limit", "10MiB/s", "it's", "$HOME `x`", ""];
        let text = script(Machine::Svm, &[], &words, Some("export A=1")).unwrap();
        assert!(text.contains("\ncd /\nexport A=1\necho "), "{text}");
        let line = text.lines().find(|line| line.contains("/bench")).unwrap();
        let command = line.split_once("/bench ").unwrap().1.split_once(" 2>&1").unwrap().0;
        let shell = Command::new("sh").args(["-c", &format!("printf '%s|' {command}")]).output().unwrap();
        assert_eq!(String::from_utf8(shell.stdout).unwrap(), "--limit|10MiB/s|it's|$HOME `x`||");
    }

    #[test]
    fn a_program_for_another_machine_is_refused() {
        let own = std::env::current_exe().unwrap();
        let refused = Program::read(&own, Machine::Arm64).unwrap_err();
        assert!(format!("{refused:#}").contains("not a program for arm64"), "{refused:#}");
        assert!(Program::read(&own, Machine::Svm).unwrap().files.iter().all(|(path, _)| path.starts_with('/')));
        assert!(Program::read(Path::new("/etc/passwd"), Machine::Svm).is_err());
    }
}
