#!/usr/bin/env bash
# cargo of the oldest Rust that the workspace declares (rust-version), as Debian packages it: debian-cargo.sh ARGUMENTS…
#
# On first use the packages, the standard library's sources included, are fetched by apt and unpacked below target/.
# Nothing is installed, so no root is needed and the machine's own Rust stays as it is. The sources are what lets cargo's
# -Zbuild-std build for targets that no package has a standard library for.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

version=$(sed -n 's/^rust-version = "\(.*\)"$/\1/p' "$root/Cargo.toml")
home=${CARGO_TARGET_DIR:-$root/target}/debian-rust-$version
lib=$home/usr/lib/x86_64-linux-gnu

fetch() {
    local new=$home.new full
    rm -rf "$new"
    mkdir -p "$new/packages"
    # Debian's newer point releases carry newer Rust; the first one's is kept beside them.
    full=$(apt-cache madison rustc-web | awk -F' *[|] *' -v v="$version." 'index($2, v) == 1 && !n++ { print $2 }')
    if [[ -z $full ]]; then
        echo "debian-cargo: apt offers no rustc-web $version; run apt-get update (as root), on Debian 12" >&2
        exit 1
    fi
    echo "debian-cargo: fetching Rust $full" >&2
    # lld links for machines that the host's linker does not know; the last three are the libraries that rustc and cargo
    # need and a fresh machine lacks.
    (cd "$new/packages" && apt-get download -qq -o APT::Sandbox::User=root \
        "rustc-web=$full" "cargo-web=$full" "libstd-rust-web-dev=$full" "libstd-rust-web-$version=$full" \
        "rust-web-src=$full" lld-19 libllvm19 libpcre3 libhttp-parser2.9)
    for package in "$new"/packages/*.deb; do dpkg -x "$package" "$new"; done
    rm -r "$new/packages"
    ln -s ../lib/llvm-19/bin/lld "$new/usr/bin/rust-lld" # the name that rustc calls it by
    rm -rf "$home"
    mv "$new" "$home"
}

[[ -x $home/usr/bin/rust-lld ]] || fetch
export PATH=$PATH:$home/usr/bin LD_LIBRARY_PATH=$lib:$home/lib/x86_64-linux-gnu RUSTC=$home/usr/bin/rustc
# The rustup proxies, where there are any, must not put their own choice in.
unset RUSTUP_TOOLCHAIN
exec "$home/usr/bin/cargo" "$@"
