//! The QEMU that `compare` runs beside ours, as files of a machine: the one that emulates `svm`, with its libraries.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use super::elf::Elf;
use super::initramfs::libraries;
use super::packages::output;

/// What `compare` looks for in the machine's PATH: it starts QEMU by QEMU's own loader, for the machine's libraries are those
/// of the harness.
const START: &str =
    "#!/bin/busybox sh\nexec /peer/ld-linux-x86-64.so.2 --library-path /peer /peer/qemu -L /peer \"$@\"\n";

/// Path in the machine and content of each file of the QEMU below `root`.
///
/// # Errors
/// A file is missing or cannot be read.
pub(crate) fn files(root: &Path) -> Result<Vec<(String, Vec<u8>)>> {
    let below = root.join("usr/lib/x86_64-linux-gnu");
    let (loader, program) = (below.join("ld-linux-x86-64.so.2"), root.join("usr/bin/qemu-system-x86_64"));
    let listed = output(Command::new(&loader).arg("--library-path").arg(&below).arg("--list").arg(&program))
        .context("cannot list the libraries of QEMU")?;
    let read = |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    let stripped = |path: &Path| Elf::new(&read(path)?)?.stripped();
    let mut files = vec![
        ("bin/qemu-system-x86_64".to_owned(), START.into()),
        ("peer/qemu".to_owned(), stripped(&program)?),
        // The only firmware that QEMU loads beside the ROM with the guest.
        ("peer/kvmvapic.bin".to_owned(), read(&root.join("usr/share/qemu/kvmvapic.bin"))?),
    ];
    for path in libraries(&listed)?.iter().map(Path::new).chain([loader.as_path()]) {
        let name = path.file_name().and_then(|name| name.to_str()).context("a library's name is not UTF-8")?;
        let name = format!("peer/{name}");
        if files.iter().all(|(known, _)| *known != name) {
            files.push((name, stripped(path)?));
        }
    }
    Ok(files)
}
