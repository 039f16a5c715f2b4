//! C programs against the static library of this build: what mistakes are answered, and a VMM on KVM.
#![cfg(target_arch = "x86_64")]

use std::path::{Path, PathBuf};
use std::process::Command;

use dirtylimit_test_vm::kvm_or_skip;

/// Compiles a file of this package, and runs it.
fn run(source: &str) {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let deps = std::env::current_exe().unwrap().parent().unwrap().to_owned();
    let program: PathBuf = Path::new(env!("CARGO_TARGET_TMPDIR")).join(source.replace('/', "-"));
    let compiled = Command::new("cc")
        .args(["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-O1", "-I"])
        .arg(package.join("include"))
        .arg("-o")
        .args([&program, &package.join(source), &deps.join("libdirtylimit.a")])
        .args(["-lgcc_s", "-lutil", "-lrt", "-lpthread", "-lm", "-ldl"])
        .status();
    assert!(compiled.unwrap().success(), "{source} does not compile");
    let ran = Command::new(program).status().unwrap();
    assert!(ran.success(), "{source}: {ran}");
}

#[test]
fn mistakes_are_answered() {
    run("tests/errors.c");
}

#[test]
fn a_vmm_in_c_holds_a_limit_pauses_in_its_handler_and_loses_nothing() {
    if kvm_or_skip() {
        run("examples/vmm.c");
    }
}
