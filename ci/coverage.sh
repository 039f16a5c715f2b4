#!/usr/bin/env bash
# Line coverage of the core by its own tests: at least 95 %, or it fails and lists the lines that no test reaches.
#
# Of Debian's LLVM it takes the tools of the version that rustc was built with: rustup's own are not in every toolchain. A
# machine that cannot have them, or cargo-llvm-cov, skips this, loudly.
set -euo pipefail
cd "$(dirname "$0")/.."

skip() {
    echo "coverage: ############ SKIPPED: $1, so NOTHING WAS MEASURED ############"
    exit 0
}

version=$(rustc -vV | sed -n 's/^LLVM version: \([0-9]*\).*/\1/p')
if ! command -v "llvm-cov-$version" >/dev/null; then
    [[ $EUID -eq 0 ]] || skip "there is no llvm-cov-$version (apt-get install llvm-$version)"
    echo "coverage: installing llvm-$version"
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "llvm-$version" ||
        skip "Debian has no llvm-$version for this rustc"
fi
LLVM_COV=$(command -v "llvm-cov-$version")
LLVM_PROFDATA=$(command -v "llvm-profdata-$version")
export LLVM_COV LLVM_PROFDATA

tools=$(realpath -m "${CARGO_TARGET_DIR:-target}/tools")
PATH=$PATH:$tools/bin
if ! command -v cargo-llvm-cov >/dev/null; then
    echo "coverage: installing cargo-llvm-cov below target/"
    cargo install --quiet --locked --root "$tools" cargo-llvm-cov || skip "cargo-llvm-cov cannot be installed"
fi

cargo llvm-cov --locked --quiet -p dirtylimit-core --fail-under-lines 95 --show-missing-lines
