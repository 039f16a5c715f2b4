#!/usr/bin/env bash
# Runs the harness in the lab's svm machine (docs/LAB.md): a probe, one limited run twice, which must hold its limit, lose
# no page and give the same JSON to the byte, and a migration, whose guest must see as long a downtime as its source: the TSC of that KVM
# is the guest's own, and goes on by just the time that passed.
#
# The machine is made of Debian's packages, some 75 MB, which are fetched into the user's cache at the first use. Where they are
# not to be had it is said that NOTHING was checked.
set -euo pipefail
cd "$(dirname "$0")/.."

cargo build --quiet --locked -p dirtylimit-bench
bench=${CARGO_TARGET_DIR:-target}/debug/dirtylimit-bench
if ! "$bench" lab setup svm --kernel 6.12; then
    echo "lab: ############ the lab's packages cannot be had here, so NOTHING WAS CHECKED IN IT ############"
    exit 0
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
limited() { # FILE
    "$bench" lab svm -- run --guest kvm --workload write:32MiB --ring 1024 --limit 20MiB/s --free-seconds 0.3 --seconds 2 \
        --json - >"$work/$1" 2>"$work/$1.log" || { cat "$work/$1.log" >&2; return 1; }
}
# Two machines at a time, each on a thread of its own: they must not notice.
limited one & first=$!
limited two & second=$!
"$bench" lab svm --cpus 2 -- migrate --workload write:8MiB --memory 48MiB --bandwidth 20MiB/s --free-seconds 0.3 --json - \
    >"$work/migrated" 2>"$work/migrated.log" || { cat "$work/migrated.log" >&2; exit 1; }
wait "$first"
wait "$second"
"$bench" lab svm -- probe 2>"$work/log" | tee "$work/probe" || { cat "$work/log" >&2; exit 1; }

grep -q 'dirty ring *65536 entries' "$work/probe" || { echo "lab: that KVM has no dirty ring" >&2; exit 1; }
cmp "$work/one" "$work/two" || { echo "lab: two runs differ: something in the machine is not in virtual time" >&2; exit 1; }
python3 - "$work/one" <<'PYTHON'
import json, sys
run = json.load(open(sys.argv[1]))
vcpu = run["vcpus"][0]
print(f"lab: two runs alike; on {run['host']['kernel']}: error {vcpu['error_pct']:+.2f} %, settled in {vcpu['settle_ms']} ms, "
      f"windows {vcpu['worst_window_error_pct']} %, longest stall {vcpu['stall_max_ms']} ms, {run['lost_pages']} pages lost")
assert run["guest"] == "kvm" and run["lost_pages"] == 0 and abs(vcpu["error_pct"]) <= 1, "the limit was not held"
PYTHON
python3 - "$work/migrated" <<'PYTHON'
import json, sys
told = json.load(open(sys.argv[1]))
source, guest = 1e3 * told["rounds"][-1]["length_s"], told["guest_downtime_ms"]
print(f"lab: migrated in {told['total_s']} s, downtime {source:.1f} ms, {guest} by the guest's clock")
assert told["memory_equal"] and told["counters_go_on"] and 0.8 * source <= guest <= 1.2 * source + 10, told["reason"]
PYTHON
