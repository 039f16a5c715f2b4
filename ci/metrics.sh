#!/usr/bin/env bash
# Checks what a run on real KVM tells Prometheus: the text over HTTP in both formats, and the file, by Prometheus' own parsers
# (prometheus_client from PyPI; promtool too, where it is installed). About 10 s.
#
# A machine without a usable /dev/kvm, or without Python's venv or PyPI, skips this, loudly.
set -euo pipefail
cd "$(dirname "$0")/.."

skip() {
    echo "metrics: ############ SKIPPED: $1, so NOTHING WAS SCRAPED ############"
    exit 0
}
(exec 3<>/dev/kvm) 2>/dev/null || skip "/dev/kvm cannot be opened here"

target=$(realpath -m "${CARGO_TARGET_DIR:-target}")
venv=$target/tools/prometheus
if ! "$venv/bin/python" -c 'import prometheus_client' 2>/dev/null; then
    echo "metrics: installing prometheus_client below target/"
    { python3 -m venv "$venv" && "$venv/bin/pip" install --quiet prometheus_client; } ||
        skip "prometheus_client cannot be installed"
fi
cargo build --quiet --locked -p dirtylimit-bench

work=$(mktemp -d)
run=
trap '[[ -z $run ]] || kill "$run" 2>/dev/null || true; rm -rf "$work"' EXIT
bench=("$target/debug/dirtylimit-bench" run --guest kvm
    --workload write:32MiB,idle --limit 10MiB/s,none --vm-limit 40MiB/s)
: >"$work/log" # read at once
"${bench[@]}" --free-seconds 0.2 --seconds 60 --metrics 127.0.0.1:0 2>"$work/log" >/dev/null &
run=$!
for _ in {1..100}; do
    url=$(sed -n 's/^Metrics are at \(.*\)\.$/\1/p' "$work/log")
    [[ -z $url ]] || break
    kill -0 "$run" 2>/dev/null || { cat "$work/log" >&2; exit 1; }
    sleep 0.1
done
sleep 2 # until there is something to count
"$venv/bin/python" ci/metrics.py "$url"
kill "$run"
wait "$run" || { cat "$work/log" >&2; exit 1; }

"${bench[@]}" --free-seconds 0 --seconds 1 --metrics "$work/vm.prom" >/dev/null 2>&1
"$venv/bin/python" ci/metrics.py "$work/vm.prom"
if command -v promtool >/dev/null; then
    promtool check metrics <"$work/vm.prom"
    promtool check rules docs/prometheus-rules.yml
fi
