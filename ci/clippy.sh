#!/usr/bin/env bash
# Checks that clippy has no warning about any target of the workspace, tests, examples and benches included, nor of fuzz/
# and core-nostd/firmware/. The harness denies print macros itself (benches/src/lib.rs, main.rs): they panic when nobody reads.
set -euo pipefail
cd "$(dirname "$0")/.."

echo "clippy: the workspace, all targets, warnings denied"
cargo clippy --locked --workspace --all-targets -- -D warnings
for package in fuzz core-nostd/firmware; do
    echo "clippy: $package/"
    cargo clippy --locked --manifest-path "$package/Cargo.toml" --target-dir "${CARGO_TARGET_DIR:-target}" -- -D warnings
done
