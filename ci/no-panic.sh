#!/usr/bin/env bash
# Links everything public of the core with a panic handler that cannot be linked (core-nostd/firmware/src/no_panic.rs),
# for two machines, optimised for speed and for size: no call can panic, whatever it is given. The same with a planted
# panic must not link. Then runs the core as firmware of a Cortex-M4 in QEMU.
set -euo pipefail
cd "$(dirname "$0")/.."

source=core-nostd/firmware/src/no_panic.rs
functions=$(ci/public-functions.sh core)
bad=0
for function in $functions; do
    grep -qE "(^|[^A-Za-z0-9_:])$function\(" "$source" || { echo "no-panic: $source does not call $function" >&2; bad=1; }
done
((bad == 0))
echo "no-panic: $(wc -w <<<"$functions") public functions"

# -Zbuild-std is a nightly option.
export RUSTC_BOOTSTRAP=1
out=$(realpath -m "${CARGO_TARGET_DIR:-target}/firmware")
mkdir -p "$out"
build() { # TARGET BINARY ARGUMENTS…
    ci/debian-cargo.sh rustc --quiet --locked --manifest-path core-nostd/firmware/Cargo.toml --target-dir "$out" \
        -Zbuild-std=core --release --target "$1" --bin "$2" "${@:3}"
}

for target in x86_64-unknown-none thumbv7em-none-eabi; do
    for level in 3 s; do
        export CARGO_PROFILE_RELEASE_OPT_LEVEL=$level
        build "$target" no_panic
        if build "$target" no_panic --features planted 2>"$out/planted"; then
            echo "no-panic: $target: a planted unwrap links: this check proves nothing" >&2
            exit 1
        fi
        grep -q 'undefined symbol: the_core_can_panic' "$out/planted" || { cat "$out/planted"; exit 1; }
        echo "no-panic: $target, optimisation $level: links without a panic; with a planted one it does not"
    done
done

export CARGO_PROFILE_RELEASE_OPT_LEVEL=3
build thumbv7em-none-eabi demo --features cortex-m -- -C link-arg=-Tlink.x -L core-nostd/firmware
timeout 60 qemu-system-arm -machine mps2-an386 -nographic -semihosting-config enable=on,target=native \
    -kernel "$out/thumbv7em-none-eabi/release/demo" | tee "$out/printed"
grep -q 'PASS$' "$out/printed"
