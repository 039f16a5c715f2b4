#!/usr/bin/env bash
# Type-checks the KVM adapter for 64-bit Arm, where KVM has a dirty ring too.
set -euo pipefail
cd "$(dirname "$0")/.."

echo "arm: checking dirtylimit-kvm for aarch64-unknown-linux-gnu"
RUSTC_BOOTSTRAP=1 ci/debian-cargo.sh check --locked -Zbuild-std=std,panic_abort --target aarch64-unknown-linux-gnu \
    -p dirtylimit-kvm
