# shellcheck shell=bash
# Sets up what the project needs and names the interpreter to use:
#
#     . tools/setup_env.sh        then run "$PYTHON" ...
#
# A virtual environment .venv with the requirements, and the extensions cc_attention._C and fused._C built in place. Whatever is
# complete is stamped: the next run reuses it, and repairs what an interrupted one left.
#
#   CCNET_PYTHON=/path/to/python   a complete environment to use instead; nothing is installed into it
#   CCNET_DEV=1                    the requirements of the tests as well
#   CCNET_CUDA=0                   builds the extensions for the CPU alone
#   CCNET_EXTENSION=0              builds none

ccnet_say() { echo "setup: $*" >&2; }

ccnet_fail() { # exit status, message
    local status=$1
    shift
    ccnet_say "$@"
    exit "$status"
}

# True if the command is a Python of a version that the project supports.
ccnet_supported() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1
}

# Digest of standard input.
ccnet_digest() {
    "$PYTHON" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
}

# Creates .venv where it is missing, or damaged, or where an installation into it was interrupted: pip takes a package
# of which half the files are there for installed.
ccnet_make_venv() {
    if [ ! -e .venv/ccnet-installing ] && ccnet_supported .venv/bin/python &&
        { [ -e .venv/ccnet-run ] || .venv/bin/python -m pip --version >/dev/null 2>&1; }; then
        return
    fi
    local base="" candidate
    for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
        if ccnet_supported "$candidate"; then
            base=$candidate
            break
        fi
    done
    [ -n "$base" ] || ccnet_fail 1 "no Python >= 3.10 found (tried python3 and python3.13 to python3.10): install one," \
        "or name one with CCNET_PYTHON=/path/to/python"
    "$base" -c 'import ensurepip, venv' >/dev/null 2>&1 ||
        ccnet_fail 1 "$base cannot create virtual environments: install its venv package (Debian and Ubuntu:" \
            "apt install python3-venv) and run this again"
    ccnet_say "creating .venv with $("$base" --version); downloading PyTorch then takes minutes"
    "$base" -m venv --clear .venv || ccnet_fail 1 "$base could not create .venv (above)"
}

# pip install into .venv.
ccnet_pip() {
    local status=0
    touch .venv/ccnet-installing
    .venv/bin/python -m pip --disable-pip-version-check install --quiet "$@" || status=$?
    rm .venv/ccnet-installing
    return $status
}

# Installs requirements into .venv, unless the stamp of that name says that they are there.
ccnet_install() { # name of the stamp, pip's arguments
    local stamp=.venv/ccnet-$1 digest
    shift
    digest=$(cat requirements*.txt constraints.txt | ccnet_digest)
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$digest" ]; then return; fi
    ccnet_say "installing $*"
    if ! ccnet_pip "$@" -c constraints.txt; then
        ccnet_say "the versions last tested cannot be had here: taking what the floors allow"
        ccnet_pip "$@" || ccnet_fail 1 "pip could not install $* (above)"
    fi
    echo "$digest" >"$stamp"
}

# Installs the optional decoder of PNG files, once; OpenCV's serves where there is none for this machine.
ccnet_install_decoder() {
    if [ -e .venv/ccnet-decoder ]; then return; fi
    if ccnet_pip --only-binary :all: -c constraints.txt pyspng 2>/dev/null; then
        touch .venv/ccnet-decoder
    else
        ccnet_say "pyspng can't be had: OpenCV decodes the pictures, a little slower (tried again next time)"
    fi
}

# Takes the CUDA toolkit from the package index where PyTorch is a CUDA build and no nvcc fits it. (Before CUDA 13 the
# packages did not make up a whole toolkit.) Returns 1 if it cannot be had.
ccnet_get_toolkit() {
    local cuda log=build/toolkit.log
    if [ "${CCNET_CUDA:-}" = 0 ] || [ "${USE_CUDA:-}" = 0 ]; then return 0; fi
    cuda=$("$PYTHON" -c '
import setup, torch
needless = not setup.find_compiler()[0] or setup.find_toolkit()[0]
print("" if needless else torch.version.cuda or "")') || return 0
    if [ -z "$cuda" ] || [ "${cuda%%.*}" -lt 13 ]; then return 0; fi
    local package="cuda-toolkit[nvcc,cccl]==$cuda.*"
    if [ -z "${CCNET_PYTHON:-}" ]; then
        ccnet_say "no nvcc for PyTorch's CUDA $cuda: installing $package"
        if ccnet_pip "$package" >"$log" 2>&1; then return 0; fi
    else
        export CUDA_HOME="$PWD/.cuda/nvidia/cu${cuda%%.*}"
        if [ -f .cuda/complete ] && [ "$(cat .cuda/complete)" = "$cuda" ]; then return 0; fi
        rm -rf .cuda
        ccnet_say "no nvcc for PyTorch's CUDA $cuda: taking $package into .cuda"
        if "$PYTHON" -m pip --disable-pip-version-check install --quiet --target .cuda "$package" >"$log" 2>&1; then
            echo "$cuda" >.cuda/complete
            return 0
        fi
    fi
    tail -n 5 "$log" >&2
    ccnet_say "no toolkit (log: $log): building for the CPU alone, to be tried again next time (CCNET_CUDA=0 does not try)"
    return 1
}

# Prints what the built extensions depend on: sources, interpreter, PyTorch (read without importing it), settings; and
# the libraries themselves, in case somebody built another by hand.
ccnet_build_key() {
    local torch
    torch=$("$PYTHON" -c '
import importlib.util, pathlib, platform, runpy, sys
torch = importlib.util.find_spec("torch") or sys.exit(1)
version = runpy.run_path(str(pathlib.Path(torch.origin).parent / "version.py"))
print(sys.executable, sys.version, platform.machine(), torch.origin, version["__version__"], version["cuda"])') ||
        return 1
    {
        echo "$torch ${CXX:-} ${CCNET_EXTENSION:-} ${CCNET_CUDA:-} ${USE_CUDA:-} ${ccnet_cuda_home:-} ${TORCH_CUDA_ARCH_LIST:-}"
        find {cc_attention,fused}/csrc setup.py {cc_attention,fused}/_C*.so -type f -print -exec cat {} + 2>/dev/null || true
    } | ccnet_digest
}

ccnet_is_built() { compgen -G 'cc_attention/_C*.so' >/dev/null && compgen -G 'fused/_C*.so' >/dev/null; }

# Builds the extensions in place. A failure is no error: the reference implementation takes over.
ccnet_build() {
    local key stamp=build/ccnet-extension log=build/build.log toolkit=0
    local ccnet_cuda_home=${CUDA_HOME:-} # the caller's, before ccnet_get_toolkit names another
    key=$(ccnet_build_key) || ccnet_fail 2 "$PYTHON has no PyTorch: install it there, or unset CCNET_PYTHON"
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$key" ]; then return; fi
    mkdir -p build
    # The library may be of another PyTorch, where it would not load; the objects, newer than the sources they are not of.
    rm -rf "$stamp" {cc_attention,fused}/_C*.so build/temp.* build/lib.*
    ccnet_get_toolkit || toolkit=$?
    ccnet_say "building the extensions (log: $log)"
    if (
        PATH=$(dirname "$PYTHON"):$PATH # for ninja
        # The tests read registers and spills of the kernels from the log.
        if [ "${CCNET_DEV:-0}" = 1 ]; then export NVCC_APPEND_FLAGS="${NVCC_APPEND_FLAGS:-} -Xptxas -v"; fi
        "$PYTHON" setup.py build_ext --inplace || exit 1
        if ccnet_is_built; then "$PYTHON" -W error -c 'import cc_attention, fused'; fi
    ) >"$log" 2>&1; then
        grep '^cc_attention: ' "$log" >&2 || true
    else
        rm -f {cc_attention,fused}/_C*.so
        tail -n 15 "$log" >&2
    fi
    if ! ccnet_is_built; then
        ccnet_say "the extensions were not built (log: $log): the reference implementation will be used"
    elif [ $toolkit = 0 ]; then
        ccnet_build_key >"$stamp"
    fi
}

ccnet_setup() {
    set -euo pipefail
    cd "$ccnet_root"
    if [ -n "${CCNET_PYTHON:-}" ]; then
        ccnet_supported "$PYTHON" || ccnet_fail 2 "CCNET_PYTHON=$CCNET_PYTHON is not a Python >= 3.10"
    else
        ccnet_make_venv
        ccnet_install run -r requirements.txt
        ccnet_install_decoder
        if [ "${CCNET_DEV:-0}" = 1 ]; then
            ccnet_install dev -r requirements.txt -r requirements-dev.txt
            ccnet_install scores --no-deps cityscapesscripts labelme
        fi
    fi
    ccnet_build
}

ccnet_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=$ccnet_root/.venv/bin/python
if [ -n "${CCNET_PYTHON:-}" ]; then
    PYTHON=$(command -v "$CCNET_PYTHON") || PYTHON=$CCNET_PYTHON
    case $PYTHON in /*) ;; *) PYTHON=$PWD/$PYTHON ;; esac
fi
export PYTHON

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    ccnet_setup
else
    # In a process of its own, which neither the caller's options nor its way of calling this can change.
    bash "$ccnet_root/tools/setup_env.sh" || return $?
fi
