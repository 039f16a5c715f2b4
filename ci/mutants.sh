#!/usr/bin/env bash
# Plants every bug that cargo-mutants knows in the core, one after the other, and demands that a test sees it; with `adapter`
# first, in the adapter's files that decide, whose tests run on a kernel that is none. By hand, not in CI: each of some 1140
# (of the adapter 580) takes seconds. Further arguments are cargo-mutants' own: mutants.sh --file core-nostd/src/ring/consumer.rs, or
# mutants.sh adapter --shard 0/8.
#
# A survivor fails this, but for those that .cargo/mutants.toml explains. What was found is below target/mutants.out.
set -euo pipefail
cd "$(dirname "$0")/.."

target=$(realpath -m "${CARGO_TARGET_DIR:-target}")
PATH=$PATH:$target/tools/bin
if ! command -v cargo-mutants >/dev/null; then
    echo "mutants: installing cargo-mutants below target/"
    cargo install --quiet --locked --root "$target/tools" cargo-mutants
fi

# A copy of the tree, so that nobody edits or builds this one with a bug in it; its own target, so that what the tests
# depend on is built once. Fewer random cases than usual: a bug that only one case in hundreds sees is not well tested.
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
git ls-files -z | xargs -0 cp --parents -t "$copy"
cd "$copy"

what=(-p dirtylimit-core --timeout 20) tests=(--lib --tests) slow=() again=()
if [[ ${1:-} == adapter ]]; then
    shift
    what=(-p dirtylimit-kvm --features log --timeout 60) tests=(--lib)
    for file in batch caps coalesce dirty_log events harvest kick limit shared slots snapshot told vcpu vm sys/guarded sys/interrupts sys/kick sys/signals; do
        what+=(--file "kvm-adapter/src/$file.rs")
    done
    # Those that take seconds are for the survivors of the others. And what is built for each is built quickly.
    slow=(--)
    for test in vcpus_that_fill_their interrupted_at_random a_disturbed_reset_is lumps_are_paid pages_of_kvms_own \
        a_handler_never_finds a_ring_that_a_copier resets_of_a_third_party kvm_cannot_write_past no_signal_comes_between \
        gathered_is_never_outside a_pause_is_no_longer a_place_is_given_back resets_that_go_on; do
        slow+=(--skip "$test")
    done
    again=(--iterate)
    sed -i 's/^dirtylimit-kvm = { opt-level = 1 }/dirtylimit-kvm = { opt-level = 0 }/' Cargo.toml
    export CARGO_PROFILE_DEV_DEBUG=0 CARGO_PROFILE_TEST_DEBUG=0 CARGO_INCREMENTAL=1
    # The library's own tests alone.
    sed -i '/^members = \[/,/^\]/c members = ["core-nostd", "kvm-adapter", "kvm-adapter/test-vm"]' Cargo.toml
    sed -i '/^dirtylimit-kvm = /d; /^\[\[test\]\]/,/^test = /d' kvm-adapter/Cargo.toml
    rm -r benches kvm-adapter/{tests,examples,c,metrics,qmp}
fi
export CARGO_TARGET_DIR=$target/mutants PROPTEST_CASES=64
mutants() { cargo mutants --in-place "${what[@]}" -o "$target" "$@"; }
# A bug that makes a test run for ever (3) is one that was seen.
if ((${#slow[@]})); then mutants "$@" -- "${tests[@]}" "${slow[@]}" || [[ $? -eq 2 || $? -eq 3 ]]; fi
mutants "${again[@]}" "$@" -- "${tests[@]}" || [[ $? -eq 3 ]]
