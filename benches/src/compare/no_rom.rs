//! In the place of the ROM on an architecture that has none.

use anyhow::{Result, bail};

use dirtylimit_test_vm::payload::Parameters;

/// # Errors
/// Always.
pub(super) fn image(_: &[Parameters], _: u64, _: &[u8]) -> Result<Vec<u8>> {
    bail!("compare needs a host with x86-64: its ROM, which brings QEMU's vCPUs to the guest, is for that alone")
}
