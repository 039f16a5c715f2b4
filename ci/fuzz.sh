#!/usr/bin/env bash
# Runs every fuzz target for a while: fuzz.sh [SECONDS [TARGET…]], 20 seconds and all targets unless told.
#
# No nightly is needed: the core has no unsafe code, so the sanitizers are left out. A machine that cannot have
# cargo-fuzz skips this, loudly.
set -euo pipefail
cd "$(dirname "$0")/.."

seconds=${1:-20}
targets=("${@:2}")

tools=$(realpath -m "${CARGO_TARGET_DIR:-target}/tools")
PATH=$PATH:$tools/bin
if ! command -v cargo-fuzz >/dev/null; then
    echo "fuzz: installing cargo-fuzz below target/"
    if ! cargo install --quiet --locked --root "$tools" cargo-fuzz; then
        echo "fuzz: ############ SKIPPED: cargo-fuzz cannot be installed, so NOTHING WAS FUZZED ############"
        exit 0
    fi
fi

((${#targets[@]})) || mapfile -t targets < <(cargo fuzz list)
((${#targets[@]})) || { echo "fuzz: fuzz/ has no target" >&2; exit 1; }
for target in "${targets[@]}"; do
    echo "fuzz: $target, $seconds s"
    # libFuzzer's dictionary fills screens and says nothing.
    cargo fuzz run --sanitizer none "$target" -- "-max_total_time=$seconds" -print_final_stats=1 -verbosity=0 -print_funcs=0 2>&1 |
        sed '/^###### Recommended/,/^###### End/d'
done
