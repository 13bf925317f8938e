#!/bin/sh
# Prints, as shell settings, what the native build needs beyond the machine: a C++ compiler (else clang from the
# ziglang package) and Python's headers (else unpacked from the distribution's package; no root needed).
# usage: toolchain.sh VENV > settings; then `. settings` before pip install
set -eu
venv=$(cd "$1" && pwd)
python=$venv/bin/python

cmake_args=

say() { echo "$@" >&2; }

headers_from_distribution() {
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    mkdir -p "$venv/headers/lists/partial" "$venv/headers/cache/archives/partial"
    cd "$venv/headers"
    apt="apt-get -qq -o Dir::State::Lists=$PWD/lists -o Dir::Cache=$PWD/cache"
    $apt update && $apt download "libpython$version-dev" && dpkg -x libpython3*.deb .
    rm -rf lists cache ./*.deb
    test -e "usr/include/python$version/Python.h"
}

if ! command -v c++ >/dev/null; then
    say "no C++ compiler here: using clang from the ziglang package"
    "$python" -m pip install --quiet ziglang >&2
    zig=$("$python" -c 'import os, ziglang; print(os.path.dirname(ziglang.__file__))')/zig
    mkdir -p "$venv/zig" # CMake takes programs, not commands with arguments
    for tool in cc c++ ar ranlib; do
        printf '#!/bin/sh\nexec "%s" %s "$@"\n' "$zig" "$tool" >"$venv/zig/$tool"
        chmod +x "$venv/zig/$tool"
    done
    echo "export CC='$venv/zig/cc' CXX='$venv/zig/c++'"
    cmake_args="-DCMAKE_AR=$venv/zig/ar -DCMAKE_RANLIB=$venv/zig/ranlib"
fi

include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
if ! test -e "$include/Python.h"; then
    say "no Python headers here: unpacking them from the distribution's package"
    if ! (headers_from_distribution) >&2; then
        say "error: Python's headers are missing and could not be fetched; on Debian and Ubuntu: apt install python3-dev"
        exit 1
    fi
    echo "export CXXFLAGS='-I$venv/headers/usr/include'"
    cmake_args="$cmake_args -DPython_INCLUDE_DIR=$venv/headers$include"
fi

if test -n "$cmake_args"; then
    echo "export CMAKE_ARGS='$cmake_args'"
fi
