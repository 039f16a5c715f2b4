#!/usr/bin/env bash
# Runs the tests of the adapter, those on real KVM included, of its control socket and its metrics, under ThreadSanitizer and AddressSanitizer.
#
# sanitizers.sh [thread|address]: both unless told. For ThreadSanitizer the standard library is built with it too
# (debian-cargo.sh has its sources), or its locks would be unknown; the sanitizers' runtime is Debian's clang's, unpacked
# below target/. What the guest writes is not seen by them: it runs no instrumented code.
#
# Each first runs a planted bug, which it must find, so that a pass means something.
set -euo pipefail
cd "$(dirname "$0")/.."

kinds=("$@")
(($#)) || kinds=(thread address)
CARGO_TARGET_DIR=$(realpath -m "${CARGO_TARGET_DIR:-target}")
export CARGO_TARGET_DIR RUSTC_BOOTSTRAP=1 CARGO_PROFILE_DEV_DEBUG=line-tables-only DIRTYLIMIT_SANITIZED=1
# The LLVM that debian-cargo.sh's Rust is built with.
llvm=19
runtime=$CARGO_TARGET_DIR/clang-rt-$llvm
archives=$runtime/usr/lib/llvm-$llvm/lib/clang/$llvm/lib/linux

if [[ ! -d $archives ]]; then
    echo "sanitizers: fetching the runtime of clang $llvm"
    rm -rf "$runtime"
    mkdir -p "$runtime"
    (cd "$runtime" && apt-get download -qq -o APT::Sandbox::User=root "libclang-rt-$llvm-dev" && dpkg -x ./*.deb . && rm ./*.deb)
fi

# Not these: they are slow, and run no code that the others do not run.
tests=(--skip soak:: --skip storms:: --skip disturbed:: --skip garbage_is_answered)

for kind in "${kinds[@]}"; do
    case $kind in
        thread)
            archive=tsan flags=(-Zbuild-std) bug=race finds="ThreadSanitizer: data race"
            # It holds signals back until their thread makes a call that it knows, so the handler runs too late.
            only=(--skip a_handle_may_be_used_first_inside_a_signal_handler) ;;
        address) only=() archive=asan flags=() bug=freed finds="AddressSanitizer: heap-use-after-free" ;;
        *) echo "sanitizers: $kind: thread and address are what there is" >&2; exit 2 ;;
    esac
    # As clang links it: before all else, or GNU ld finds some of its references only half resolved.
    export RUSTFLAGS="--cfg dirtylimit_planted -Zsanitizer=$kind -Zexternal-clangrt -Zpre-link-args=-Wl,--whole-archive,$archives/libclang_rt.$archive-x86_64.a,--no-whole-archive,--export-dynamic"
    sanitized() { ci/debian-cargo.sh test --quiet --locked "${flags[@]}" --target x86_64-unknown-linux-gnu "$@"; }

    echo "sanitizers: $kind: the planted bug"
    found=$(sanitized -p dirtylimit-kvm --test sanitized -- "$bug" 2>&1) && { echo "sanitizers: it passed" >&2; exit 1; }
    grep -qF "$finds" <<<"$found" || { printf '%s\nsanitizers: not found: %s\n' "$found" "$finds" >&2; exit 1; }
    echo "sanitizers: $kind: the adapter's tests"
    sanitized -p dirtylimit-kvm --lib --test kvm -- "${tests[@]}" "${only[@]}"
    sanitized -p dirtylimit-qmp -p dirtylimit-metrics --tests -- "${tests[@]}"
done
