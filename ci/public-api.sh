#!/usr/bin/env bash
# Checks that the libraries' public interface is the one recorded in ci/public-api/, so that it changes only where that is
# meant (the C interface's record is kvm-adapter/c/include/dirtylimit.h). Rustdoc's JSON has no promised form: a newer Rust
# may need public-api.py changed.
#
# UPDATE=1 ci/public-api.sh records what is there. CONTRIBUTING.md says what a change means for the version.
set -euo pipefail
cd "$(dirname "$0")/.."

target=$(realpath -m "${CARGO_TARGET_DIR:-target}")
# JSON is a nightly option. Without --cfg dirtylimit_planted, as a VMM builds them.
export RUSTC_BOOTSTRAP=1 RUSTFLAGS= RUSTDOCFLAGS=
bad=0
for crate in dirtylimit-{core,kvm,qmp,metrics}; do
    record=ci/public-api/$crate.txt
    cargo rustdoc --quiet --locked -p "$crate" --lib --all-features -- -Zunstable-options --output-format json
    interface=$(python3 ci/public-api.py "$target/doc/${crate//-/_}.json")
    if [[ ${UPDATE:-} == 1 ]]; then
        echo "$interface" >"$record"
    elif ! diff "$record" - <<<"$interface"; then
        echo "public-api: $crate: > is not as < in $record; if that is meant to be: UPDATE=1 ci/public-api.sh" >&2
        bad=1
    fi
    echo "public-api: $crate: $(wc -l <<<"$interface") items"
done
exit "$bad"
