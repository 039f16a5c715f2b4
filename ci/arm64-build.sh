#!/usr/bin/env bash
# Builds the harness for 64-bit Arm, where `dirtylimit-bench lab arm64` finds it; or what other arguments of cargo's say, as in
# arm64-build.sh test --no-run -p dirtylimit-kvm --test kvm
#
# All that it takes comes from Debian's packages and stays below target/: Rust as ci/debian-cargo.sh gets it, whose standard
# library is built from its sources, and the C library. The programs are static and run in the lab's machine as they are.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
target=${CARGO_TARGET_DIR:-$root/target}
libc=$target/arm64-libc

"$root/ci/debian-cargo.sh" --version >/dev/null
if [[ ! -d $libc ]]; then
    echo "arm64-build: fetching the C library for arm64" >&2
    rm -rf "$libc.new"
    mkdir -p "$libc.new/packages"
    (cd "$libc.new/packages" && apt-get download -qq -o APT::Sandbox::User=root \
        libc6-dev-arm64-cross libgcc-12-dev-arm64-cross)
    for package in "$libc.new"/packages/*.deb; do dpkg -x "$package" "$libc.new"; done
    rm -r "$libc.new/packages"
    mv "$libc.new" "$libc"
fi
lib=$(realpath "$libc/usr/aarch64-linux-gnu/lib") gcc=$(realpath "$libc/usr/lib/gcc-cross/aarch64-linux-gnu/12")
version=$(sed -n 's/^rust-version = "\(.*\)"$/\1/p' "$root/Cargo.toml")
lld=$(realpath -s "$target/debian-rust-$version/usr/bin/rust-lld")

# What a C compiler would tell the linker of a static program.
flags=(-Ctarget-feature=+crt-static -Crelocation-model=static "-Clinker=$lld" -Clinker-flavor=ld.lld)
flags+=("-Zpre-link-args=$lib/crt1.o" "-Zpre-link-args=$lib/crti.o" "-Zpre-link-args=$gcc/crtbeginT.o")
flags+=("-Clink-arg=-L$lib" "-Clink-arg=-L$gcc" -Clink-arg=--start-group)
flags+=(-Clink-arg=-lgcc -Clink-arg=-lgcc_eh -Clink-arg=-lc -Clink-arg=--end-group)
flags+=("-Clink-arg=$gcc/crtend.o" "-Clink-arg=$lib/crtn.o")
# These flags stand in the place of those in .cargo/config.toml.
flags+=(--cfg dirtylimit_planted)
export RUSTC_BOOTSTRAP=1 CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUSTFLAGS="${flags[*]}"

(($#)) || set -- build -p dirtylimit-bench
command=$1
shift
exec "$root/ci/debian-cargo.sh" "$command" --locked -Zbuild-std --target aarch64-unknown-linux-gnu "$@"
