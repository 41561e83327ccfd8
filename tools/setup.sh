#!/bin/sh
# Makes a virtual environment with alaya_tiers in it; does nothing when it is already up to date.
#
#   sh tools/setup.sh          what running needs
#   sh tools/setup.sh dev      and what tools/check needs
#
# PYTHON       the interpreter to start from (default: the first complete one of python3.13, 3.12, 3.11, python3)
# ALAYA_VENV   where the environment is (default: .venv beside pyproject.toml)
# CC, CXX      the compilers (default: what Python itself was built with, else cc or gcc, c++ or g++)
#
# Talks to the package index pip is configured for and to nothing else. All messages go to standard error.
set -eu
exec 1>&2
case ${ALAYA_VENV:=} in "" | /*) ;; *) ALAYA_VENV=$PWD/$ALAYA_VENV ;; esac
cd "$(dirname "$0")/.."
venv=${ALAYA_VENV:-$PWD/.venv}
want=${1:-run}
case $want in run | dev) ;; *) echo "setup: say nothing, or dev; not: $want"; exit 2 ;; esac

fail() {
    echo "setup: $1"
    shift
    for line in "$@"; do echo "  $line"; done
    exit 1
}

# --- nothing to do? ---------------------------------------------------------------------------------------------------
# The stamp names this tree and all that decides what gets installed; dev includes run.
sum=$(cat pyproject.toml constraints.txt tools/setup.sh alaya_tiers/*.[ch] | cksum)
fresh() { [ -x "$venv/bin/python" ] && [ "$(cat "$venv/.alaya-$1" 2>/dev/null)" = "$PWD $sum" ]; }
if fresh dev || { [ "$want" = run ] && fresh run; }; then exit 0; fi

# --- Python -----------------------------------------------------------------------------------------------------------
# Prints nothing when this Python can do the job, else what it lacks. A name that does not run at all is not a candidate.
lacks='
import importlib.util, os, sys, sysconfig
if sys.version_info < (3, 11):
    print("is Python %d.%d; 3.11 or later is needed" % sys.version_info[:2])
elif not (importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")):
    print("has no venv module (Debian, Ubuntu: apt-get install python3-venv)")
elif not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    print("has no C headers, Python.h (Debian, Ubuntu: apt-get install python3-dev; Fedora: dnf install python3-devel)")
'
if "$venv/bin/python" -c 'import pip' 2>/dev/null; then
    python=$venv/bin/python
    why=$("$python" -c "$lacks")
    [ -z "$why" ] || fail "the Python of $venv $why" "Remove $venv, or name another place with ALAYA_VENV."
else
    python='' tried=''
    if [ -n "${PYTHON:-}" ]; then set -- "$PYTHON"; else set -- python3.13 python3.12 python3.11 python3; fi
    for name; do
        why=$("$name" -c "$lacks" 2>/dev/null) || continue
        if [ -z "$why" ]; then python=$name; break; fi
        tried="$tried$name $why; "
    done
    [ -n "$python" ] || fail "no complete Python 3.11 or later found" \
        "${tried:-None of these runs: $*}" \
        "Install one (Debian, Ubuntu: apt-get install python3 python3-dev python3-venv) or name it: PYTHON=/path/to/python sh tools/setup.sh"
fi

# --- compilers: our kernel is C, hnswlib is C++ and comes as source -----------------------------------------------------
# The first of the given commands that exists; of "gcc -pthread" the first word counts.
pick() { for tool; do tool=${tool%% *}; if command -v "$tool" >/dev/null 2>&1; then echo "$tool"; return; fi; done; }
cfg() { "$python" -c "import sysconfig; print(sysconfig.get_config_var('$1') or '')"; }
compiles() { printf '%s\n' "$2" | ${1:-false} -I"$(cfg INCLUDEPY)" -fsyntax-only -x "$3" - ; }
missing=''
CC=${CC:-$(pick "$(cfg CC)" cc gcc)} CXX=${CXX:-$(pick "$(cfg CXX)" c++ g++)}
out=$(compiles "$CC" '#include <Python.h>
#include <stdatomic.h>' c 2>&1) || missing="a C compiler (tried: ${CC:-cc, gcc})"
out2=$(compiles "$CXX" '#include <Python.h>
#include <vector>' c++ 2>&1) || missing="${missing:+$missing and }a C++ compiler (tried: ${CXX:-c++, g++})"
[ -z "$missing" ] || fail "this machine lacks $missing" \
    "Debian, Ubuntu:  apt-get install gcc g++ python3-dev" \
    "Fedora, RHEL:    dnf install gcc gcc-c++ python3-devel" \
    "Other:           install GCC, or name the compilers: CC=... CXX=... sh tools/setup.sh" \
    "${out:-$out2}"
export CC CXX

# --- install ----------------------------------------------------------------------------------------------------------
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --no-input "$@"; }
if [ "$python" != "$venv/bin/python" ]; then
    echo "setup: making $venv with $("$python" --version)"
    "$python" -m venv "$venv"
fi
# torch alone and first: asked for together with the rest, some indexes answer with gigabytes of CUDA packages.
torch=$(grep '^torch==' constraints.txt)
echo "setup: installing $torch (the largest part; a few minutes the first time)"
pip install --quiet "$torch"
[ "$want" = dev ] && extra='[dev]' || extra=''
echo "setup: installing alaya-tiers$extra and what it needs; compiling the kernel"
pip install --quiet -c constraints.txt -e ".$extra"
echo "$PWD $sum" >"$venv/.alaya-$want"
echo "setup: done"
