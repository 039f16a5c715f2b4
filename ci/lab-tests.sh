#!/usr/bin/env bash
# Runs the tests on real KVM in the lab's machines (docs/LAB.md), which have one whether or not this host has:
# lab-tests.sh [MACHINE[/KERNEL]…] [-- FILTER…]; a kernel is 6.1, 6.12 or newest. All tests unless told, but without any
# argument, as CI calls it, those of svm/6.12 that end within a few minutes: a second of a busy machine takes 10 of a host's.
#
# Prints each test's result, and fails where one fails, hangs, skips itself, or has no result; lab-tests.txt has those that a
# machine does not run, each with its reason. Storms blow for a second of the machine's time and a soak for two, unless
# DIRTYLIMIT_STORM_SECONDS and DIRTYLIMIT_SOAK_SECONDS say otherwise.
set -euo pipefail
cd "$(dirname "$0")/.."

machines=() filters=()
while (($#)); do
    if [[ $1 == -- ]]; then shift && filters=("$@") && break; fi
    machines+=("$1") && shift
done
((${#machines[@]} + ${#filters[@]})) || filters=(held:: kicks:: machines:: manual:: overrun:: rounds:: steal::)
((${#machines[@]})) || machines=(svm/6.12)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The programs that have such tests, and by a test of its own the harness; as ci/tests.sh has built them.
cargo test --quiet --workspace --locked --no-run --lib --test kvm --test output --message-format=json >"$work/built"
bench=${CARGO_TARGET_DIR:-target}/debug/dirtylimit-bench
# A crate's target, and where its tests on KVM are.
programs=("kvm" "dirtylimit_test_vm tests::" "dirtylimit_bench guest::kvm:: probe::" "dirtylimit_kvm tests::enabling::")

# Freezers of both versions, for the tests that freeze a process.
prepare="export DIRTYLIMIT_STORM_SECONDS=${DIRTYLIMIT_STORM_SECONDS:-1} DIRTYLIMIT_SOAK_SECONDS=${DIRTYLIMIT_SOAK_SECONDS:-2}
busybox mount -t cgroup2 cgroup2 /sys/fs/cgroup
busybox mkdir /freezer && busybox mount -t cgroup -o freezer freezer /freezer"

bad=0
complain() { echo "lab-tests: $*" >&2; bad=$((bad + 1)); }

run() { # MACHINE KERNEL TARGET [WHERE…]
    local machine=$1 kernel=$2 target=$3 program not=() tests where test reason status=0 cpus
    shift 3
    program=$(python3 -c 'import json, sys
for built in map(json.loads, open(sys.argv[1])):
    if built.get("executable") and built["target"]["name"] == sys.argv[2] and built["profile"]["test"]:
        print(built["executable"])' "$work/built" "$target")
    while read -r where test reason; do
        # shellcheck disable=SC2053 # the table's is a pattern
        if [[ $machine/$kernel == $where ]]; then not+=("$test"); fi
    done < <(grep -v '^#' ci/lab-tests.txt)
    "$program" --list --format terse "${@:-}" | sed -n 's/: test$//p' | sort >"$work/all"
    if ((${#filters[@]})); then
        "$program" --list --format terse "${filters[@]}" | sed -n 's/: test$//p' | sort | comm -12 - "$work/all" >"$work/some"
        mv "$work/some" "$work/all"
    fi
    for test in "${not[@]}"; do
        if grep -qxF "$test" "$work/all"; then
            echo "lab-tests: $machine/$kernel: not run: $(grep -F " $test " ci/lab-tests.txt | cut -d' ' -f2-)"
            sed -i "\\|^$test\$|d" "$work/all"
        fi
    done
    [[ -s $work/all ]] || return 0
    mapfile -t tests <"$work/all"
    cpus=2 && [[ $machine != vmx ]] || cpus=1
    "$bench" lab "$machine" --kernel "$kernel" --cpus "$cpus" --silence 900s --prepare "$prepare" \
        --program "$program" -- --test-threads 1 --nocapture --exact "${tests[@]}" 2>&1 >"$work/log" |
        tee "$work/err" >&2 || status=$?
    sed -n 's/^test \(.*\) \.\.\. \(ok\|FAILED\|ignored.*\)$/\2 \1/p' "$work/log" | sed "s|^|lab-tests: $machine/$kernel: |"
    ((status == 0)) || { cat "$work/log" >&2; complain "$machine/$kernel: $target: status $status"; }
    if grep -q SKIPPED "$work/err"; then complain "$machine/$kernel: a test skipped itself or a part"; fi
    while read -r test; do
        grep -qF "test $test ... ok" "$work/log" || complain "$machine/$kernel: did not pass: $test"
    done <"$work/all"
}

for machine in "${machines[@]}"; do
    kernel=6.12
    if [[ $machine == */* ]]; then kernel=${machine#*/} machine=${machine%/*}; fi
    if ! "$bench" lab setup "$machine" --kernel "$kernel"; then
        echo "lab-tests: ############ the packages of $machine cannot be had here, so NOTHING WAS TESTED IN IT ############"
        continue
    fi
    for program in "${programs[@]}"; do
        # shellcheck disable=SC2086 # words
        run "$machine" "$kernel" $program
    done
done
((bad == 0))
