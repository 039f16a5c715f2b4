#!/usr/bin/env bash
# Checks that cargo can package the libraries and build them from their packages, each against the packages before it, and that
# the tests that are in the packages pass where they were unpacked.
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(dirtylimit-core dirtylimit-kvm dirtylimit-qmp dirtylimit-metrics dirtylimit-c)
# Those of which the packages have tests.
tested=(dirtylimit-core dirtylimit-kvm dirtylimit-c)
# A person may have uncommitted work; CI may not.
allow=()
[[ ${CI:-} == true ]] || allow=(--allow-dirty)
# A VMM takes all of it in: a line more is a decision.
most=20
lines=$(cargo tree --locked -p dirtylimit-kvm -e normal | wc -l)
echo "package: the dependency tree of dirtylimit-kvm has $lines lines"
((lines <= most)) || { echo "package: more than $most" >&2; exit 1; }
# cargo keeps the packaged core unpacked, and never looks whether one of the same version has changed since.
rm -rf "${CARGO_HOME:-$HOME/.cargo}"/registry/{src,cache}/-*/dirtylimit-*
echo "package: ${packages[*]}"
# As a VMM builds them: without --cfg dirtylimit_planted.
export RUSTFLAGS=
cargo package --locked "${allow[@]}" "${packages[@]/#/-p}"

target=$(realpath -m "${CARGO_TARGET_DIR:-target}")
version=$(sed -n '/^\[workspace.package\]/,/^$/s/^version = "\(.*\)"$/\1/p' Cargo.toml)
unpacked=$(mktemp -d)
# Its sources lie elsewhere in each run, which cargo does not see.
rm -rf "$target/unpacked"
trap 'rm -rf "$unpacked"' EXIT
patches=()
for package in "${tested[@]}"; do
    tar -xf "$target/package/$package-$version.crate" -C "$unpacked"
    echo "package: the tests in $package"
    # The property tests take minutes where they are not optimised, as the workspace has them. Lints are the workspace's too: some
    # of what the left-out tests use is used by nothing else.
    (cd "$unpacked/$package-$version" && CARGO_TARGET_DIR=$target/unpacked CARGO_PROFILE_TEST_OPT_LEVEL=2 \
        RUSTFLAGS="--cap-lints=allow" cargo test --quiet "${patches[@]}")
    patches+=(--config "patch.crates-io.$package.path='$unpacked/$package-$version'")
done
