#!/usr/bin/env bash
# Checks that the tests on real KVM ran, where /dev/kvm can be used: a skipped test passes, so its result does not tell.
#
# Such a test begins with a call of kvm_or_skip(), which appends "test name (file:line)" of that call to the file named
# by DIRTYLIMIT_KVM_TESTS_RAN. Every call found in the sources must be there; no list is kept by hand. Called by
# ci/tests.sh; by hand: run the tests with that variable set, then this.
set -euo pipefail
cd "$(dirname "$0")/.."

ran=${DIRTYLIMIT_KVM_TESTS_RAN:?the file in which the tests left their names}
if ! (exec 3<>/dev/kvm) 2>/dev/null; then
    echo "kvm-ran: ############ /dev/kvm cannot be opened here, so NOTHING RAN ON REAL KVM ############"
    exit 0
fi

# file:line of every call, neither in a comment nor the helper's own definition, nor for another architecture (ci/arm.sh).
mapfile -t calls < <(git grep --untracked -n 'kvm_or_skip()' -- '*.rs' ':!*/tests/kvm/outside.rs' |
    grep -vE '^[^:]*:[0-9]+:[[:space:]]*//|fn kvm_or_skip' | cut -d: -f1,2)
((${#calls[@]})) || { echo "kvm-ran: found no call of kvm_or_skip() in the sources: has it been renamed?" >&2; exit 1; }

missing=0
for call in "${calls[@]}"; do
    if ! grep -qF "($call)" "$ran"; then
        echo "kvm-ran: did not run: the test at $call" >&2
        missing=$((missing + 1))
    fi
done
echo "kvm-ran: $((${#calls[@]} - missing)) of ${#calls[@]} tests on real KVM ran"
((missing == 0))
