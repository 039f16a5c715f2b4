#!/usr/bin/env bash
# Runs the tests by the README's own command, then checks that those on real KVM ran where they could.
set -euo pipefail
cd "$(dirname "$0")/.."

DIRTYLIMIT_KVM_TESTS_RAN=$(mktemp)
export DIRTYLIMIT_KVM_TESTS_RAN
trap 'rm -f "$DIRTYLIMIT_KVM_TESTS_RAN"' EXIT

echo "tests: the README's command"
ci/readme.sh test
ci/kvm-ran.sh
