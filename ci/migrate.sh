#!/usr/bin/env bash
# Migrates a guest on real KVM by one command, and by two halves over TCP: the memory is equal, the guest's counters go on,
# and the JSON and the picture are written (about 10 s; the tests have what can go wrong).
#
# A machine without a usable /dev/kvm skips this, loudly.
set -euo pipefail
cd "$(dirname "$0")/.."

(exec 3<>/dev/kvm) 2>/dev/null || {
    echo "migrate: ############ SKIPPED: /dev/kvm cannot be opened here, so NO GUEST WAS MIGRATED ############"
    exit 0
}
cargo build --quiet --locked -p dirtylimit-bench
bench=${CARGO_TARGET_DIR:-target}/debug/dirtylimit-bench
scratch=$(mktemp -d)
listening=
trap '[[ -z $listening ]] || kill "$listening" 2>/dev/null || true; rm -rf "$scratch"' EXIT

check() {
    python3 - "$1" <<'PY'
import json, sys
told = json.load(open(sys.argv[1]))
wrong = {name: told[name] for name in ("verdict", "memory_equal", "counters_go_on") if told[name] not in ("done", True)}
assert not wrong, f"{wrong}: {told['reason']}"
assert told["rounds"] and told["sent_mib"] > 32 and told["downtime_ms"] > 0, told
print(f"migrate: done in {told['total_s']} s, downtime {told['downtime_ms']} ms, {told['sent_mib']} MiB sent")
PY
}

guest=(--workload write:32MiB --memory 128MiB --free-seconds 0.5)
timeout 60 "$bench" migrate "${guest[@]}" --json "$scratch/one.json" --svg "$scratch/one.svg" >/dev/null 2>&1
check "$scratch/one.json"
grep -q '^<svg' "$scratch/one.svg"

: >"$scratch/listening" # read at once
"$bench" migrate --listen 127.0.0.1:0 2>"$scratch/listening" &
listening=$!
for ((tries = 0; tries < 100; tries++)); do
    address=$(sed -n 's/^Waiting for a guest at \(.*\)\.$/\1/p' "$scratch/listening")
    [[ -z $address ]] || break
    sleep 0.1
done
timeout 60 "$bench" migrate "${guest[@]}" --connect "$address" --json "$scratch/two.json" >/dev/null 2>&1
check "$scratch/two.json"
wait "$listening"
listening=
