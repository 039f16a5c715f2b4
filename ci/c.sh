#!/usr/bin/env bash
# Checks the C interface as it is installed: libraries, header and dirtylimit.pc into a scratch directory, then C programs by
# pkg-config against the shared and the static library: a VMM on real KVM, which holds a limit and loses no page, and what
# mistakes are answered; both under AddressSanitizer and valgrind too. The shared library gives out what the
# header names and nothing else, and is under 2 MiB. About 40 s.
#
# A machine without a usable /dev/kvm, or without valgrind and apt, skips that part, loudly.
set -euo pipefail
cd "$(dirname "$0")/.."

package=kvm-adapter/c
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

echo "c: installing into a scratch directory"
PREFIX=$work/usr "$package/install.sh"
export PKG_CONFIG_PATH=$work/usr/lib/pkgconfig
library=$work/usr/lib/libdirtylimit.so

nm -D --defined-only "$library" | awk '{ print $3 }' | sort >"$work/given"
grep -oE '\bdirtylimit_[a-z_]+\(' "$work/usr/include/dirtylimit.h" | tr -d '(' | sort -u >"$work/named"
diff "$work/named" "$work/given" || { echo "c: < in the header alone, > in the library alone" >&2; exit 1; }
bytes=$(stat -L -c %s "$library")
echo "c: $(wc -l <"$work/given") functions, $bytes bytes of $(basename "$(realpath "$library")")"
((bytes < 2 << 20)) || { echo "c: the shared library is not under 2 MiB" >&2; exit 1; }

strict=(-Wall -Wextra -Wpedantic -Werror)
build() { # PROGRAM SOURCE OPTIONS…
    cc -std=c11 "${strict[@]}" -O2 -g -o "$work/$1" "$2" "${@:3}" -lpthread
}
read -ra cflags < <(pkg-config --cflags dirtylimit)
read -ra shared < <(pkg-config --libs dirtylimit)
shared+=("-Wl,-rpath,$work/usr/lib")
read -ra static < <(pkg-config --static --libs-only-l dirtylimit | sed "s|-ldirtylimit|$work/usr/lib/libdirtylimit.a|")
echo '#include <dirtylimit.h>' | c++ -std=c++11 "${strict[@]}" "${cflags[@]}" -x c++ -fsyntax-only -
for name in errors:tests vmm:examples; do
    source=$package/${name#*:}/${name%:*}.c name=${name%:*}
    build "$name.shared" "$source" "${cflags[@]}" "${shared[@]}"
    build "$name.static" "$source" "${cflags[@]}" "${static[@]}"
    build "$name.asan" "$source" "${cflags[@]}" -fsanitize=address,undefined -fno-sanitize-recover=all "${static[@]}"
done
readelf -d "$work/errors.shared" | grep -q 'NEEDED.*libdirtylimit\.so\.[0-9]' || { echo "c: no SONAME" >&2; exit 1; }

for kind in shared static asan; do "$work/errors.$kind"; done
echo "c: mistakes are answered, by the shared and the static library, under AddressSanitizer too"
has_valgrind() { command -v valgrind >/dev/null; }
if ! has_valgrind && [[ $EUID -eq 0 ]]; then
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends valgrind >/dev/null 2>&1 || true
fi
memcheck() { valgrind --quiet --error-exitcode=9 --leak-check=full --show-leak-kinds=definite,indirect,possible "$@"; }
if has_valgrind; then
    memcheck "$work/errors.static"
    echo "c: and under valgrind"
else
    echo "c: ############ SKIPPED: valgrind is not installed, so NOTHING RAN UNDER IT ############"
fi

if ! (exec 3<>/dev/kvm) 2>/dev/null; then
    echo "c: ############ SKIPPED: /dev/kvm cannot be opened here, so the VMM WAS ONLY COMPILED ############"
    exit 0
fi
for kind in shared asan; do
    echo "c: the VMM, $kind"
    "$work/vmm.$kind"
done
if has_valgrind; then
    echo "c: the VMM under valgrind, with the static library; it is slow, so that the limit may be more than the guest reaches"
    # It has no description of KVM_RESET_DIRTY_RINGS, which reads and writes no memory of the program.
    memcheck --sim-hints=lax-ioctls "$work/vmm.static"
fi
