#!/usr/bin/env bash
# Install mmsegmentation's CCNet into a new folder, for python -m benchmarks.step --variant mmseg --peer-site DIR.
#
#     benchmarks/get_peers.sh DIR
#
# Nothing is compiled, and the Python environment is not changed. PYTHON names another interpreter than python.
# The packages come from the package index that pip is configured for. PyTorch, NumPy and OpenCV must be installed.
set -euo pipefail

if [ $# -ne 1 ] || [ -e "$1" ]; then
    echo "usage: benchmarks/get_peers.sh DIR, where DIR does not exist" >&2
    exit 2
fi
python=${PYTHON:-python}
folder=${1%/}

# The folder gets its name when it is complete, so that an interrupted installation can be started again.
mkdir -p "$(dirname "$folder")"
unfinished=$(mktemp -d "$folder.XXXXXX")
trap 'rm -rf "$unfinished"' EXIT
"$python" -m pip install --quiet --no-deps --target "$unfinished" \
    mmcv-lite==2.2.0 mmengine==0.10.7 onedl-mmsegmentation==1.4.2 \
    addict ftfy packaging platformdirs prettytable pygments pyyaml regex rich scipy termcolor tqdm wcwidth yapf

# mmcv-lite has the sources of mmcv's operators, but not their compiled part. CCNet needs only its attention, which is
# written in PyTorch. The other names are imported by networks that are not used here.
cat > "$unfinished/mmcv/ops/__init__.py" <<'PYTHON'
"""mmcv's criss-cross attention; every other operator is an empty module."""
import torch

from mmcv.ops.cc_attention import CrissCrossAttention


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (torch.nn.Module,), {})
PYTHON
chmod 755 "$unfinished"
mv "$unfinished" "$folder"
echo "installed; run: $python -m benchmarks.step --variant mmseg --peer-site $folder"
