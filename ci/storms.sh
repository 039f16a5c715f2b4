#!/usr/bin/env bash
# Storms on real KVM, one after the other: storms.sh [--seconds N], a minute each unless told. By hand: they take long.
#
# Signals of all 64 numbers, stops, stops of microseconds, tracers, freezers (of each version that there is), slots and vCPUs
# that come and go; the log is taken in a loop. None may lose a page, fail, or leave a page suspect when the slot was armed
# again; those that halt the process must have cut a reset, or they show nothing. ci/tests.sh runs them for 3 s each.
set -euo pipefail
cd "$(dirname "$0")/.."

export DIRTYLIMIT_STORM_SECONDS=60
while (($#)); do
    case $1 in
        --seconds) DIRTYLIMIT_STORM_SECONDS=${2:?how many} ;;
        *) echo "storms: $1: --seconds N is what there is" >&2; exit 2 ;;
    esac
    shift 2
done

if ! (exec 3<>/dev/kvm) 2>/dev/null; then
    echo "storms: ############ SKIPPED: /dev/kvm cannot be opened here, so there was NO STORM ############"
    exit 0
fi
cargo test --quiet --locked -p dirtylimit-kvm --test kvm -- storms:: --nocapture --test-threads=1
