#!/usr/bin/env bash
# Checks that rustdoc has no warning (broken links above all). The docs end up in target/doc.
set -euo pipefail
cd "$(dirname "$0")/.."

echo "docs: the workspace, warnings denied"
RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace --no-deps
