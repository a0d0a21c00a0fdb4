#!/usr/bin/env bash
# Sets up, checks style and types, and runs the tests. With --fast as first argument, it runs only tests that start
# no processes and compile nothing (two minutes instead of twenty). Other arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
if [ "${1:-}" = --fast ]; then
    shift
    set -- -m "not slow and not build and not gpu" "$@"
fi
export CCNET_DEV=1
. tools/setup_env.sh

for check in "ruff check ." "ruff format --check ." "codespell_lib" "mypy"; do
    # An environment of CCNET_PYTHON need not have them.
    if "$PYTHON" -m "${check%% *}" --version >/dev/null 2>&1; then
        # shellcheck disable=SC2086  # a module and its arguments
        "$PYTHON" -m $check
    else
        echo "run_tests.sh: ${check%% *} is not installed: skipped" >&2
    fi
done
clang_format=$(dirname "$PYTHON")/clang-format
if [ -x "$clang_format" ]; then
    find cc_attention/csrc fused/csrc tests/kernels/emulator -name '*.cpp' -o -name '*.cu' -o -name '*.h' | xargs "$clang_format" --dry-run -Werror
else
    echo "run_tests.sh: clang-format is not installed: skipped" >&2
fi
workers=()
if "$PYTHON" -c 'import xdist' 2>/dev/null; then
    # In the order of the folders, because the longest tests are in the first one, tests/integration.
    workers=(-n auto --maxprocesses 4 --dist loadscope --no-loadscope-reorder)
fi
"$PYTHON" -m pytest -q --durations=25 --durations-min=5 "${workers[@]}" "$@"
