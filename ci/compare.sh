#!/usr/bin/env bash
# Compares with a real QEMU: runs the tests of `dirtylimit-bench compare` where there is one, a small case among them.
#
# QEMU is a peer, not a dependency. As root it is installed where it is missing (from Debian's backports if they are
# configured, else the release's); where it cannot be had, or there is no KVM, this is skipped, loudly.
set -euo pipefail
cd "$(dirname "$0")/.."

skip() {
    echo "compare: ############ SKIPPED: $1, so NOTHING WAS COMPARED WITH QEMU ############"
    exit 0
}

(exec 3<>/dev/kvm) 2>/dev/null || skip "/dev/kvm cannot be opened"
if ! command -v qemu-system-x86_64 >/dev/null; then
    [[ $EUID -eq 0 ]] || skip "there is no qemu-system-x86_64, and only root can install it"
    echo "compare: installing QEMU"
    from=()
    backports=$(. /etc/os-release && echo "$VERSION_CODENAME-backports")
    if apt-cache policy 2>/dev/null | grep -q "n=$backports"; then from=(-t "$backports"); fi
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${from[@]}" qemu-system-x86 >/dev/null ||
        skip "QEMU cannot be installed"
fi
qemu-system-x86_64 --version | head -1

cargo test --quiet --locked -p dirtylimit-bench --test compare
