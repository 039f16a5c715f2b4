#!/usr/bin/env bash
# By hand: runs the tests again and again while every CPU is kept busy by a niced loop, as beside other work in CI:
# busy.sh [--times N] [ARGUMENTS…]; 20 times unless told, and all of `cargo test --workspace` unless ARGUMENTS say which
# (`-p dirtylimit-kvm --test kvm`). Goes on after a failure; prints each run's result and what failed in it.
set -euo pipefail
cd "$(dirname "$0")/.."

times=20
if [[ ${1:-} == --times ]]; then times=${2:?--times takes a number} && shift 2; fi
(($#)) || set -- --workspace
logs=$(realpath -m "${CARGO_TARGET_DIR:-target}/busy")
mkdir -p "$logs"

cargo test --locked --no-run "$@"
loops=()
# Only these: each by its number.
trap '((${#loops[@]} == 0)) || kill "${loops[@]}"' EXIT
for ((cpu = 0; cpu < $(nproc); cpu++)); do
    nice -n 10 bash -c 'while :; do :; done' &
    loops+=($!)
done

failed=0
for ((run = 1; run <= times; run++)); do
    start=$SECONDS
    if RUST_BACKTRACE=0 cargo test --locked --no-fail-fast "$@" >"$logs/$run.log" 2>&1; then verdict=ok; else verdict=FAILED; fi
    echo "busy: run $run of $times: $verdict, $((SECONDS - start)) s"
    if [[ $verdict == FAILED ]]; then
        failed=$((failed + 1))
        grep -hE '^test .*FAILED$|HANGS|process didn.t exit|^error' "$logs/$run.log" | sed 's/^/busy:   /' || true
    fi
done
echo "busy: $failed of $times runs failed; their output is in $logs"
((failed == 0))
