#!/usr/bin/env bash
# Runs the loom models in full: larger, optimised, with debug assertions. Takes minutes; `cargo test` runs them small.
# Arguments go to the tests: ci/loom.sh no_page_is_lost
set -euo pipefail
cd "$(dirname "$0")/.."

ci/loom-gaps.sh
# A build directory of its own: the flag would rebuild everything else.
export RUSTFLAGS="${RUSTFLAGS:-} --cfg dirtylimit_loom" CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-target}/loom"
cargo test --locked --profile loom -p dirtylimit-loom -- --nocapture "$@"
