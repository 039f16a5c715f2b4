#!/usr/bin/env bash
# Checks the table of loom-tests/README.md: every public function that threads may call side by side has a row, every
# row's function exists, and so does the model that it names.
set -euo pipefail
cd "$(dirname "$0")/.."

table=loom-tests/README.md

# The public functions of crate $1's types (a regular expression).
functions() {
    ci/public-functions.sh "$1" | grep -E "^($2)::"
}

wanted=$(
    functions core 'PenaltyCell|VmCell|Counters|RateEstimator|Entry|Ring|Pacer|VcpuCell|Request|VcpuRing|Machine|Limiter'
    functions kvm 'Interrupter|Vcpu|DirtyLimit|WeakDirtyLimit|Round'
)
rows=$(sed -nE 's/^\| `([A-Za-z]+::[a-z_]+)`.*/\1/p' "$table")
bad=0
for name in $wanted; do
    grep -qxF -- "$name" <<<"$rows" || { echo "loom-gaps: $name has no row in $table" >&2; bad=1; }
done
for name in $rows; do
    grep -qxF -- "$name" <<<"$wanted" || { echo "loom-gaps: $table has a row for $name, which is not there" >&2; bad=1; }
done
for model in $(awk -F'|' '/^\| `/ { print $3 }' "$table" | tr -cs 'a-z_' '\n' | grep _ | sort -u); do
    grep -rqE "^fn $model\(\)" loom-tests/tests || { echo "loom-gaps: $table names $model, which is no model" >&2; bad=1; }
done
echo "loom-gaps: $(wc -w <<<"$wanted") public functions, $(wc -w <<<"$rows") rows"
exit "$bad"
