#!/usr/bin/env bash
# Prints the public functions of crate dirtylimit-$1, as ci/public-api/ has them, as Type::function or function.
set -euo pipefail
cd "$(dirname "$0")/.."
sed -nE 's/^dirtylimit_[a-z]+::([a-z]+::)*(([A-Z][A-Za-z]*::)?[a-z_]+): pub .*\<fn .*/\2/p' "ci/public-api/dirtylimit-$1.txt"
