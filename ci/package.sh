#!/usr/bin/env bash
# Checks that cargo can package the two libraries and build them from their packages, the adapter against the packaged
# core.
set -euo pipefail
cd "$(dirname "$0")/.."

# A person may have uncommitted work; CI may not.
allow=()
[[ ${CI:-} == true ]] || allow=(--allow-dirty)
# cargo keeps the packaged core unpacked, and never looks whether one of the same version has changed since.
rm -rf "${CARGO_HOME:-$HOME/.cargo}"/registry/{src,cache}/-*/dirtylimit-*
echo "package: dirtylimit-core and dirtylimit-kvm"
cargo package --locked "${allow[@]}" -p dirtylimit-core -p dirtylimit-kvm
