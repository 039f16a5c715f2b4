#!/usr/bin/env bash
# Checks that every Rust file is formatted as rustfmt.toml says.
set -euo pipefail
cd "$(dirname "$0")/.."

echo "format: the workspace, fuzz/ and core-nostd/firmware/"
cargo fmt --all --check
cargo fmt --manifest-path fuzz/Cargo.toml --check
cargo fmt --manifest-path core-nostd/firmware/Cargo.toml --check
