#!/usr/bin/env bash
# Checks the control socket of a run on real KVM by QEMU's own clients: qmp-shell sets, asks and ends the run, and QEMU's
# test of its dirty limit passes, as it does against QEMU itself where qemu-system-x86_64 is installed (about 25 s each).
#
# A machine without a usable /dev/kvm, or without Python's venv or PyPI, skips this, loudly.
set -euo pipefail
cd "$(dirname "$0")/.."

skip() {
    echo "qmp: ############ SKIPPED: $1, so NO CLIENT OF QEMU'S WAS TRIED ############"
    exit 0
}
(exec 3<>/dev/kvm) 2>/dev/null || skip "/dev/kvm cannot be opened here"

target=${CARGO_TARGET_DIR:-target}
venv=$(realpath -m "$target/tools/qmp")
if ! [[ -x $venv/bin/qmp-shell ]]; then
    echo "qmp: installing qemu.qmp below target/"
    { python3 -m venv "$venv" && "$venv/bin/pip" install --quiet qemu.qmp==0.0.6; } ||
        skip "qemu.qmp cannot be installed"
fi
cargo build --quiet --locked -p dirtylimit-bench

scratch=$(mktemp -d)
server=
trap '[[ -z $server ]] || kill "$server" 2>/dev/null || true; rm -rf "$scratch"' EXIT
socket=$scratch/socket

# Starts a server, and waits for its socket.
start() {
    "$@" &
    server=$!
    for ((i = 0; i < 600; i++)); do
        [[ -S $socket ]] && return
        kill -0 "$server" || break
        sleep 0.1
    done
    echo "qmp: no socket from: $*" >&2
    exit 1
}
sequence() { "$venv/bin/python" kvm-adapter/qmp/tests/vcpu_dirty_limit.py "$socket"; }
# Ends with an error when `quit` hangs up on it before it has hung up, as QEMU's does; what it showed and how the server
# ended tell more.
shell() { "$venv/bin/qmp-shell" "$socket" 2>/dev/null || true; }
said() { grep -qF -- "$1" "$scratch/said" || { echo "qmp: qmp-shell did not show: $1" >&2; cat "$scratch/said" >&2; exit 1; }; }

echo "qmp: QEMU's test of its dirty limit, on ours"
start "$target/debug/dirtylimit-bench" run --guest kvm --limit none --seconds 600 --qmp "$socket" >"$scratch/summary" 2>/dev/null
sequence

echo "qmp: qmp-shell"
shell >"$scratch/said" <<END
set-vcpu-dirty-limit cpu-index=0 dirty-rate=20
query-vcpu-dirty-limit
set-vcpu-dirty-limit cpu-index=9 dirty-rate=20
x-set-vm-dirty-limit dirty-rate=7
x-query-dirty-limit
quit
END
said '"limit-rate": 20'
said 'incorrect cpu index specified'
said '"effective-rate": 7.0'
wait "$server" || { echo "qmp: the run failed: $?" >&2; exit 1; }
server=
grep 'lost pages: 0' "$scratch/summary"
[[ ! -e $socket ]] || { echo "qmp: the socket is left behind" >&2; exit 1; }

if ! command -v qemu-system-x86_64 >/dev/null; then
    echo "qmp: ############ qemu-system-x86_64 is not installed, so QEMU itself WAS NOT TRIED ############"
    exit 0
fi
echo "qmp: the same test on QEMU"
python3 kvm-adapter/qmp/tests/boot_rom.py "$scratch/rom"
start qemu-system-x86_64 -accel kvm,dirty-ring-size=4096 -cpu qemu64 -m 160M -bios "$scratch/rom" -nodefaults \
    -display none -qmp "unix:$socket,server=on,wait=off" 2>"$scratch/qemu"
sequence || { cat "$scratch/qemu" >&2; exit 1; }
echo quit | shell >/dev/null
wait "$server"
server=
