#!/usr/bin/env bash
# Builds the harness, and with it the libraries, for 64-bit Arm, and runs it in the lab's arm64 machine (docs/LAB.md): a probe,
# and a limited run, which must hold its limit and lose no page. By hand, with --tests: also the test of pages that KVM writes
# outside any vCPU, which takes another build of the harness.
#
# The machine is made of Debian's packages, some 70 MB, which are fetched into the user's cache at the first use. Where they are
# not to be had it is said that NOTHING was run.
set -euo pipefail
cd "$(dirname "$0")/.."

target=${CARGO_TARGET_DIR:-target}
echo "arm: building for aarch64-unknown-linux-gnu"
ci/arm64-build.sh build --quiet -p dirtylimit-bench
cargo build --quiet --locked -p dirtylimit-bench
bench=$target/debug/dirtylimit-bench
if ! "$bench" lab setup arm64 --kernel 6.12; then
    echo "arm: ############ the lab's packages cannot be had here, so NOTHING WAS RUN ############"
    exit 0
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
lab() { # FILE [OPTION…] -- ARGUMENTS
    local file=$work/$1
    shift
    "$bench" lab arm64 "$@" >"$file" 2>"$file.log" || { cat "$file" "$file.log" >&2; return 1; }
}
# Two machines at a time, each on a thread of its own.
lab run -- run --guest kvm --workload steady:32MiB --ring 1024 --limit 20MiB/s --free-seconds 0.3 --seconds 2 --json - & run=$!
lab probe -- probe
wait "$run"
cat "$work/probe"

grep -q 'backup bitmap *yes' "$work/probe" || { echo "arm: that KVM has no bitmap beside its ring" >&2; exit 1; }
if [[ ${1:-} == --tests ]]; then
    ci/arm64-build.sh test --quiet --no-run -p dirtylimit-kvm --test kvm
    tests=$(ls -t "$target"/aarch64-unknown-linux-gnu/debug/deps/kvm-* | grep -v '\.d$' | head -n 1)
    lab outside --program "$tests" -- --test-threads 1 outside::
    grep -q '1 passed; 0 failed' "$work/outside" || { cat "$work/outside" >&2; exit 1; }
fi
python3 - "$work/run" <<'PYTHON'
import json, sys
run = json.load(open(sys.argv[1]))
vcpu = run["vcpus"][0]
print(f"arm: on {run['host']['kernel']}: error {vcpu['error_pct']:+.2f} %, settled in {vcpu['settle_ms']} ms, windows "
      f"{vcpu['worst_window_error_pct']} %, longest stall {vcpu['stall_max_ms']} ms, {run['lost_pages']} pages lost")
assert run["guest"] == "kvm" and run["lost_pages"] == 0 and abs(vcpu["error_pct"]) <= 0.3, "the limit was not held"
PYTHON
