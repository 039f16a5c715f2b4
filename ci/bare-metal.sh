#!/usr/bin/env bash
# Builds the core for machines without an operating system. Only the crate `core` is built for them, so this also proves
# that dirtylimit-core needs neither std nor alloc.
set -euo pipefail
cd "$(dirname "$0")/.."

# -Zbuild-std is a nightly option.
export RUSTC_BOOTSTRAP=1
for target in thumbv7em-none-eabi riscv32imac-unknown-none-elf aarch64-unknown-none; do
    echo "bare-metal: building dirtylimit-core for $target"
    ci/debian-cargo.sh build --locked -Zbuild-std=core --target "$target" -p dirtylimit-core
done
