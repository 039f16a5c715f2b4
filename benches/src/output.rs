//! The one place that writes: to people, to standard output, and to files. Nothing else in the harness prints, which clippy
//! checks (`print_stdout`, `print_stderr`): the print macros panic when nobody takes what they print.
//!
//! Only a regular file is ever replaced, at the end, and by a whole one: a run that fails leaves it as it was.

use std::fmt::Display;
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use anyhow::{Context, Result, ensure};
use dirtylimit_metrics::file::Target;

/// Set where `--quiet` is.
static QUIET: OnceLock<()> = OnceLock::new();

/// From now on nothing goes to stderr but errors.
pub fn be_quiet() {
    // An error would say that it was set before.
    let _ = QUIET.set(());
}

/// Whether nothing goes to stderr but errors.
pub fn is_quiet() -> bool {
    QUIET.get().is_some()
}

/// Says how it goes on, or what a person should know: a line to stderr, unless that is to be quiet.
pub fn say(line: impl Display) {
    if !is_quiet() {
        tell(line);
    }
}

/// Writes a line to stderr. Whether anybody reads it changes nothing.
pub fn tell(line: impl Display) {
    // One write, so that lines of several processes do not mix.
    let _ = io::stderr().lock().write_all(format!("{line}\n").as_bytes());
}

/// Writes to standard output, ending with a newline. A reader that has gone away has had enough, which is no error.
///
/// # Errors
/// Standard output does not take it.
pub fn print(text: impl Display) -> Result<()> {
    let text = format!("{}\n", text.to_string().trim_end());
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        result => result.context("cannot write to standard output"),
    }
}

/// Where something goes that an option asked for.
#[derive(Debug)]
pub struct Output {
    option: &'static str,
    path: PathBuf,
    /// `None` is standard output.
    target: Option<Target>,
}

impl Output {
    /// Makes sure, before a long run, that `path` can be written. A file is not touched yet; all else is opened.
    ///
    /// # Errors
    /// What cannot be written; the message names the option, the path and what is allowed.
    pub fn prepare(option: &'static str, path: &Path) -> Result<Self> {
        let found = Target::of(path).and_then(|target| target.check().map(|()| target));
        let allowed = "it must be a file that can be replaced, or a device, pipe or socket that can be written";
        let target = found.with_context(|| format!("{option}: cannot write {}: {allowed}", path.display()))?;
        Ok(Self { option, path: path.to_owned(), target: Some(target) })
    }

    /// As [`prepare`](Self::prepare); `-` is standard output.
    ///
    /// # Errors
    /// As [`prepare`](Self::prepare).
    pub fn document(option: &'static str, path: &Path) -> Result<Self> {
        if path == Path::new("-") {
            return Ok(Self { option, path: path.to_owned(), target: None });
        }
        Self::prepare(option, path)
    }

    /// Whether it goes to standard output, where nothing else may go then.
    pub const fn is_stdout(&self) -> bool {
        self.target.is_none()
    }

    /// The path that was asked for.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Replaces the file by `content`, or writes it to what is no file.
    ///
    /// # Errors
    /// What the system answers. A file is as it was then.
    pub fn write(&mut self, content: impl AsRef<[u8]>) -> Result<()> {
        match &mut self.target {
            Some(target) => target
                .write(content.as_ref())
                .with_context(|| format!("{}: cannot write {}", self.option, self.path.display())),
            None => print(String::from_utf8_lossy(content.as_ref())),
        }
    }

    /// What only one can have: a file, or standard output, by its `-`.
    fn place(&self) -> Option<&Path> {
        match &self.target {
            Some(Target::File(at)) => Some(at),
            Some(Target::Stream(_)) => None,
            None => Some(&self.path),
        }
    }
}

/// Makes sure that no two of them replace the same file, or go to standard output.
///
/// # Errors
/// Two that do; the message names both options.
pub fn distinct(outputs: &[Option<&Output>]) -> Result<()> {
    let files: Vec<_> = outputs.iter().flatten().filter_map(|output| Some((output, output.place()?))).collect();
    for (number, (one, file)) in files.iter().enumerate() {
        if let Some((other, _)) = files[..number].iter().find(|(_, other)| other == file) {
            let (one, other) = (one.option, other.option);
            ensure!(one == other, "{other} and {one} name the same file, {}: each needs its own", file.display());
        }
    }
    Ok(())
}
