#!/usr/bin/env bash
# Checks that clippy has no warning about any target of the workspace, tests, examples and benches included, nor of fuzz/.
set -euo pipefail
cd "$(dirname "$0")/.."

echo "clippy: the workspace, all targets, warnings denied"
cargo clippy --locked --workspace --all-targets -- -D warnings
echo "clippy: fuzz/"
cargo clippy --locked --manifest-path fuzz/Cargo.toml --target-dir "${CARGO_TARGET_DIR:-target}" -- -D warnings
