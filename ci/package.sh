#!/usr/bin/env bash
# Checks that cargo can package the two libraries and build them from their packages, the adapter against the packaged
# core.
set -euo pipefail
cd "$(dirname "$0")/.."

# A person may have uncommitted work; CI may not.
allow=()
[[ ${CI:-} == true ]] || allow=(--allow-dirty)
echo "package: dirtylimit-core and dirtylimit-kvm"
cargo package --locked "${allow[@]}" -p dirtylimit-core -p dirtylimit-kvm
