#!/bin/sh
# install_torch.sh PYTHON: install the pinned torch, and nothing of CUDA where there is no NVIDIA GPU.
set -eu
python=$1
cd "$(dirname "$0")"
torch=$(cat torch.txt)

if [ "$(uname -s)" != Linux ] || nvidia-smi -L >/dev/null 2>&1; then
  ./install.sh "$python" "$torch"
  exit
fi
# PyPI's Linux wheel brings gigabytes of CUDA and does not import without them, so the CPU build is asked for by name:
# first from whatever indexes pip is configured with, else through uv, which knows the index where PyTorch keeps it.
if ! ./install.sh "$python" "$torch+cpu" 2>/dev/null; then
  "$python" -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
  "$python" -m uv pip install --quiet --python "$python" --torch-backend cpu -c constraints.txt "$torch" || {
    echo "torch: needs the CPU build $torch+cpu; got no index that has it; point PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL to one" >&2
    exit 1
  }
fi
