#!/usr/bin/env bash
# Runs fuzz targets, two at a time, from the corpora in fuzz/corpus: fuzz.sh [--seconds N] [--keep] [TARGET…]; 60 seconds
# for each target, and all of them, unless told. `--seconds 600` is the long run by hand; `--keep` replaces the corpora by
# what covers as much, the longest 150 inputs of each.
#
# No nightly is needed: the core has no unsafe code, so the sanitizers are left out. A machine that cannot have
# cargo-fuzz skips this, loudly.
set -euo pipefail
cd "$(dirname "$0")/.."

seconds=60 keep= targets=()
while (($#)); do
    case $1 in
    --seconds) seconds=${2:?--seconds takes a number} && shift ;;
    --keep) keep=1 ;;
    *) targets+=("$1") ;;
    esac
    shift
done

home=$(realpath -m "${CARGO_TARGET_DIR:-target}")
PATH=$PATH:$home/tools/bin
if ! command -v cargo-fuzz >/dev/null; then
    echo "fuzz: installing cargo-fuzz below target/"
    if ! cargo install --quiet --locked --root "$home/tools" cargo-fuzz; then
        echo "fuzz: ############ SKIPPED: cargo-fuzz cannot be installed, so NOTHING WAS FUZZED ############"
        exit 0
    fi
fi

((${#targets[@]})) || mapfile -t targets < <(cargo fuzz list)
((${#targets[@]})) || { echo "fuzz: fuzz/ has no target" >&2; exit 1; }
# cargo-fuzz adds these to its own flags, which stand in the place of those in .cargo/config.toml.
export RUSTFLAGS="${RUSTFLAGS:-} --cfg dirtylimit_planted"
cargo fuzz build --sanitizer none

# What is found goes to a copy, so that a checkout stays as it is.
corpora=$(mktemp -d)
trap 'rm -rf "$corpora"' EXIT
fuzz() {
    local target=$1 corpus=$corpora/$1
    mkdir -p "$corpus" "fuzz/corpus/$target"
    cp -r "fuzz/corpus/$target/." "$corpus"
    # libFuzzer's dictionary fills screens and says nothing.
    if ! cargo fuzz run --sanitizer none "$target" "$corpus" -- "-max_total_time=$seconds" -print_final_stats=1 \
        -verbosity=0 -print_funcs=0 >"$corpora/$target.log" 2>&1; then
        cat "$corpora/$target.log"
        echo "fuzz: $target FAILED"
        return 1
    fi
    echo "fuzz: $target, $seconds s: $(sed -n 's/stat::number_of_executed_units: *\(.*\)/\1 runs/p' "$corpora/$target.log")"
    if [[ -n $keep ]]; then
        cargo fuzz cmin --sanitizer none "$target" "$corpus" >/dev/null 2>&1
        (cd "$corpus" && ls -S | tail -n +151 | xargs -r rm)
        rm -r "fuzz/corpus/$target"
        cp -r "$corpus" "fuzz/corpus/$target"
    fi
}

failed=0 running=()
for target in "${targets[@]}"; do
    fuzz "$target" &
    running+=($!)
    if ((${#running[@]} == 2)); then
        wait "${running[0]}" || failed=1
        running=("${running[1]}")
    fi
done
for each in "${running[@]}"; do wait "$each" || failed=1; done
exit "$failed"
