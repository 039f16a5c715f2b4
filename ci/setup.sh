#!/usr/bin/env bash
# Installs what a fresh Debian machine lacks for the checks beside this one. What is there is left alone.
#
# A Rust toolchain (rustup's or Debian's, with clippy and rustfmt) is taken as given. The toolchain for the declared
# minimum version is fetched by debian-cargo.sh.
set -euo pipefail

# A C compiler links everything; libFuzzer is built from C++; git is for cargo package; Python reads JSON and TOML; QEMU runs the
# firmware.
packages=()
command -v cc >/dev/null || packages+=(gcc libc6-dev)
command -v c++ >/dev/null || packages+=(g++)
command -v git >/dev/null || packages+=(git)
command -v python3 >/dev/null || packages+=(python3)
command -v qemu-system-arm >/dev/null || packages+=(qemu-system-arm)

if [[ $EUID -ne 0 ]]; then
    if ((${#packages[@]})); then
        echo "setup: missing: ${packages[*]}; run this as root, or: apt-get install ${packages[*]}" >&2
        exit 1
    fi
    echo "setup: not root, so the package lists are not brought up to date; nothing is missing"
    exit 0
fi

echo "setup: bringing the package lists up to date"
apt-get update -qq
if ((${#packages[@]})); then
    echo "setup: installing ${packages[*]}"
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}"
else
    echo "setup: nothing is missing"
fi
