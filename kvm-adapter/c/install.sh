#!/usr/bin/env bash
# Builds the libraries and installs them, the header and dirtylimit.pc: PREFIX (/usr/local), LIBDIR (PREFIX/lib) and DESTDIR as
# usual. Needs cargo and a C toolchain.
set -euo pipefail
here=$(realpath "$(dirname "$0")")
prefix=${PREFIX:-/usr/local}
libdir=${LIBDIR:-$prefix/lib}
to=${DESTDIR:-}

# Not with what this repository's .cargo/config.toml plants for its tests.
export RUSTFLAGS=${RUSTFLAGS:-}
# What a program needs beside the static library, as rustc says.
said=$(cargo rustc --release --lib --manifest-path "$here/Cargo.toml" --crate-type staticlib,cdylib -- --print native-static-libs 2>&1) ||
    { printf '%s\n' "$said" >&2; exit 1; }
private=$(sed -n 's/^note: native-static-libs: //p' <<<"$said")
[[ -n $private ]] || { echo "install: rustc names no libraries for the static one" >&2; exit 1; }
target=$(cargo metadata --no-deps --format-version 1 --manifest-path "$here/Cargo.toml" |
    sed -n 's/.*"target_directory":"\([^"]*\)".*/\1/p')
version=$(cargo pkgid --manifest-path "$here/Cargo.toml")
version=${version##*[@#]}
library=$target/release/libdirtylimit
soname=$(readelf -d "$library.so" | sed -n 's/.*SONAME.*\[\(.*\)\].*/\1/p')

install -D -m 644 "$here/include/dirtylimit.h" "$to$prefix/include/dirtylimit.h"
install -D -m 644 "$library.a" "$to$libdir/libdirtylimit.a"
strip --strip-debug "$to$libdir/libdirtylimit.a"
install -D -m 755 -s "$library.so" "$to$libdir/libdirtylimit.so.$version"
[[ $soname == "libdirtylimit.so.$version" ]] || ln -sf "libdirtylimit.so.$version" "$to$libdir/$soname"
ln -sf "$soname" "$to$libdir/libdirtylimit.so"
install -d "$to$libdir/pkgconfig"
sed -e "s|@prefix@|$prefix|; s|@libdir@|$libdir|; s|@version@|$version|; s|@private@|$private|" \
    "$here/dirtylimit.pc.in" >"$to$libdir/pkgconfig/dirtylimit.pc"
echo "install: dirtylimit $version is in $to$prefix"
