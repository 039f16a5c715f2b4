//! As much of ELF as it takes to bring a program into a machine: for which one it is, its interpreter, and the program
//! without what only a debugger reads.

use anyhow::{Context, Result, ensure};

const LOAD: u32 = 1;
const INTERPRETER: u32 = 3;

/// A 64-bit little-endian program or library.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Elf<'a> {
    bytes: &'a [u8],
}

impl<'a> Elf<'a> {
    /// Looks at `bytes`.
    ///
    /// # Errors
    /// It is no such file.
    pub(crate) fn new(bytes: &'a [u8]) -> Result<Self> {
        ensure!(bytes.len() >= 64 && bytes.starts_with(b"\x7fELF\x02\x01"), "not a program (64-bit little-endian ELF)");
        Ok(Self { bytes })
    }

    /// The machine that it is for: 62 is x86-64, 183 is AArch64.
    pub(crate) fn machine(&self) -> u16 {
        u16::from_le_bytes([self.bytes[18], self.bytes[19]])
    }

    /// The path of the program that loads it; `None` where it needs none.
    ///
    /// # Errors
    /// The file is cut short.
    pub(crate) fn interpreter(&self) -> Result<Option<&'a str>> {
        let Some((_, offset, size)) = self.segments()?.into_iter().find(|&(kind, ..)| kind == INTERPRETER) else {
            return Ok(None);
        };
        let path = self.bytes.get(offset..offset + size).context("the ELF file is cut short")?;
        Ok(Some(std::str::from_utf8(path)?.trim_end_matches('\0')))
    }

    /// The file without what lies behind all that is loaded: symbols, debug information, the table of sections.
    ///
    /// # Errors
    /// The file is cut short.
    pub(crate) fn stripped(&self) -> Result<Vec<u8>> {
        let end =
            self.segments()?.iter().filter(|&&(kind, ..)| kind == LOAD).map(|&(_, offset, size)| offset + size).max();
        let mut kept =
            self.bytes.get(..end.context("nothing in it is loaded")?).context("the ELF file is cut short")?.to_vec();
        kept[40..48].fill(0); // e_shoff
        kept[58..64].fill(0); // e_shentsize, e_shnum, e_shstrndx
        Ok(kept)
    }

    /// Kind, offset and size in the file of each segment.
    fn segments(&self) -> Result<Vec<(u32, usize, usize)>> {
        let (start, count) = (self.word(32)?, usize::from(self.bytes[56]) | usize::from(self.bytes[57]) << 8);
        (0..count)
            .map(|n| {
                let header = start + 56 * n;
                let kind = self.bytes.get(header..header + 4).context("the ELF file is cut short")?;
                let kind = u32::from_le_bytes(kind.try_into().expect("it has four bytes"));
                Ok((kind, self.word(header + 8)?, self.word(header + 32)?))
            })
            .collect()
    }

    fn word(&self, at: usize) -> Result<usize> {
        let bytes = self.bytes.get(at..at + 8).context("the ELF file is cut short")?;
        let value = u64::from_le_bytes(bytes.try_into().expect("it has eight bytes"));
        // Half of the address space: sums of two stay in it.
        usize::try_from(value)
            .ok()
            .filter(|&value| value < usize::MAX / 4)
            .context("an offset of the ELF file is absurd")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::process::Command;

    #[test]
    fn a_program_still_runs_without_what_only_a_debugger_reads() {
        let whole = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        let elf = Elf::new(&whole).unwrap();
        assert!(elf.interpreter().unwrap().is_none_or(|path| path.starts_with('/')));
        let stripped = elf.stripped().unwrap();
        assert!(stripped.len() < whole.len() / 2, "{} of {} bytes are left", stripped.len(), whole.len());
        let path = std::env::temp_dir().join(format!("dirtylimit-lab-elf-{}", std::process::id()));
        std::fs::write(&path, stripped).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700)).unwrap();
        // A file that this process has open for writing while another test forks cannot be executed (ETXTBSY).
        let copy = path.with_extension("copy");
        assert!(Command::new("cp").arg(&path).arg(&copy).status().unwrap().success());
        let listed = Command::new(&copy).arg("--list").output();
        std::fs::remove_file(&path).unwrap();
        std::fs::remove_file(&copy).unwrap();
        assert!(String::from_utf8_lossy(&listed.unwrap().stdout).contains("lab::elf::tests::"));
    }

    #[test]
    fn what_is_no_program_or_cut_short_is_refused() {
        assert!(Elf::new(b"#!/bin/sh").is_err());
        let whole = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        for length in [64, 100, 600, Elf::new(&whole).unwrap().stripped().unwrap().len() - 1] {
            let elf = Elf::new(&whole[..length]).unwrap();
            assert!(elf.stripped().is_err(), "{length} bytes");
        }
    }
}
