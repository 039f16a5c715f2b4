#!/usr/bin/env bash
# Checks that the libraries build with the Rust that Cargo.toml declares (rust-version), dependencies included.
set -euo pipefail
cd "$(dirname "$0")/.."

echo "msrv: cargo check of the libraries with the declared $(grep '^rust-version' Cargo.toml)"
ci/debian-cargo.sh check --locked -p dirtylimit-core -p dirtylimit-kvm -p dirtylimit-c
ci/debian-cargo.sh check --locked -p dirtylimit-kvm --all-features
ci/debian-cargo.sh check --locked -p dirtylimit-qmp -p dirtylimit-metrics
