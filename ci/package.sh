#!/usr/bin/env bash
# Checks that cargo can package the four libraries and build them from their packages, each against the packaged others, as
# a VMM builds them: without --cfg dirtylimit_planted.
set -euo pipefail
cd "$(dirname "$0")/.."

# A person may have uncommitted work; CI may not.
allow=()
[[ ${CI:-} == true ]] || allow=(--allow-dirty)
# cargo keeps the packaged core unpacked, and never looks whether one of the same version has changed since.
rm -rf "${CARGO_HOME:-$HOME/.cargo}"/registry/{src,cache}/-*/dirtylimit-*
packages=(dirtylimit-core dirtylimit-kvm dirtylimit-qmp dirtylimit-metrics)
echo "package: ${packages[*]}"
RUSTFLAGS="" cargo package --locked "${allow[@]}" "${packages[@]/#/-p}"
