#!/usr/bin/env bash
# Everything at once, at random, on real KVM: soak.sh [--seconds N] [--seed S], 20 seconds and a seed of its own unless told.
#
# Guests, configurations, limits and faults (signals, stops, tracers, freezers, no CPU, slots and vCPUs that come and go)
# follow from the seed, which is printed; a round that loses a page, fails or hangs prints its own, and what it did.
set -euo pipefail
cd "$(dirname "$0")/.."

export DIRTYLIMIT_SOAK_SECONDS=20
while (($#)); do
    case $1 in
        --seconds) DIRTYLIMIT_SOAK_SECONDS=${2:?how many} ;;
        --seed) export DIRTYLIMIT_SOAK_SEED=${2:?a number} ;;
        *) echo "soak: $1: --seconds N and --seed S are what there is" >&2; exit 2 ;;
    esac
    shift 2
done

if ! (exec 3<>/dev/kvm) 2>/dev/null; then
    echo "soak: ############ SKIPPED: /dev/kvm cannot be opened here, so NOTHING WAS SOAKED ############"
    exit 0
fi
cargo test --quiet --locked -p dirtylimit-kvm --test kvm -- --exact soak::everything_at_once_loses_nothing --nocapture
