#!/usr/bin/env bash
# Checks every dependency of the workspace, of fuzz/ and of the firmware against deny.toml: its licence, that it comes from a
# registry, and that there is one version of it. cargo-deny, which deny.toml is for, checks more, but takes minutes to install.
set -euo pipefail
cd "$(dirname "$0")/.."

bad=0
for manifest in Cargo.toml fuzz/Cargo.toml core-nostd/firmware/Cargo.toml; do
    cargo tree --locked --workspace --all-features --target all --prefix none --format '{p}|{l}' --manifest-path "$manifest" |
        python3 ci/licences.py "$manifest" || bad=1
done
exit "$bad"
