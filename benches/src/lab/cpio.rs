//! An initramfs: the cpio format "newc" (kernel: Documentation/driver-api/early-userspace/buffer-format.rst), made in
//! memory. Nothing in it depends on the day, so that two runs boot the same bytes.

use std::collections::BTreeSet;
use std::path::Path;

const DIRECTORY: u32 = 0o040_755;
const EXECUTABLE: u32 = 0o100_755;
const CONSOLE: u32 = 0o020_600;

/// An archive that grows.
#[derive(Debug, Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    directories: BTreeSet<String>,
    entries: u32,
}

impl Archive {
    /// Adds an executable file, and the directories above it. `path` may begin with a slash.
    pub(crate) fn file(&mut self, path: &str, content: &[u8]) {
        self.parents(path);
        self.entry(path, EXECUTABLE, (0, 0), content);
    }

    /// Adds an empty directory, and those above it, unless it is there.
    pub(crate) fn directory(&mut self, path: &str) {
        self.parents(&format!("{path}/x"));
    }

    /// Adds `/dev/console`, which the kernel opens for the first process.
    pub(crate) fn console(&mut self) {
        self.parents("dev/console");
        self.entry("dev/console", CONSOLE, (5, 1), &[]);
    }

    /// The archive, with its trailer.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn parents(&mut self, path: &str) {
        let above: Vec<_> = Path::new(path.trim_start_matches('/')).ancestors().skip(1).collect();
        for directory in above.into_iter().rev().filter_map(Path::to_str).filter(|name| !name.is_empty()) {
            if self.directories.insert(directory.to_owned()) {
                self.entry(directory, DIRECTORY, (0, 0), &[]);
            }
        }
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        let path = path.trim_start_matches('/');
        let count = |length: usize| u32::try_from(length).expect("a file of an initramfs is below 4 GiB");
        self.entries += 1;
        self.bytes.extend_from_slice(b"070701");
        // Inode, mode, owner, group, links, time, size, device of the file, device that it is, length of the name, checksum.
        for field in
            [self.entries, mode, 0, 0, 1, 0, count(content.len()), 0, 0, device.0, device.1, count(path.len() + 1), 0]
        {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Name, mode and content of each entry, read back as the kernel does.
    fn entries(mut archive: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut all = Vec::new();
        while !archive.is_empty() {
            assert_eq!(&archive[..6], b"070701");
            let field =
                |n: usize| u32::from_str_radix(std::str::from_utf8(&archive[6 + 8 * n..][..8]).unwrap(), 16).unwrap();
            let (mode, size, name) = (field(1), field(6) as usize, field(11) as usize);
            assert_eq!(archive[110 + name - 1], 0, "a name ends with a zero byte, which its length counts");
            let text = String::from_utf8(archive[110..110 + name - 1].to_vec()).unwrap();
            let content = (110 + name).next_multiple_of(4);
            all.push((text, mode, archive[content..content + size].to_vec()));
            archive = &archive[(content + size).next_multiple_of(4)..];
        }
        all
    }

    #[test]
    fn files_come_after_their_directories_each_once() {
        let mut archive = Archive::default();
        archive.console();
        archive.directory("/proc");
        archive.file("/lib/x/one", b"12345");
        archive.file("/lib/x/two", b"");
        archive.directory("proc");
        let all = entries(&archive.finish());
        let names: Vec<_> = all.iter().map(|(name, ..)| name.as_str()).collect();
        assert_eq!(names, ["dev", "dev/console", "proc", "lib", "lib/x", "lib/x/one", "lib/x/two", "TRAILER!!!"]);
        assert_eq!(all[5], ("lib/x/one".into(), EXECUTABLE, b"12345".to_vec()));
        assert_eq!((all[0].1, all[1].1), (DIRECTORY, CONSOLE));
    }
}
