#!/bin/sh
# install.sh PYTHON ARGUMENT...: what `pip install ARGUMENT...` in this folder installs, pinned by constraints.txt. By uv, which
# unpacks a package once for all environments and links it into each, in a third of pip's CPU time; by pip where uv fails,
# as where only pip's own configuration names an index.
set -eu
python=$1
shift
cd "$(dirname "$0")"

by_uv() {
  "$python" -m pip install --quiet --disable-pip-version-check -c constraints.txt uv &&
    UV_FIND_LINKS=$(echo "${PIP_FIND_LINKS-}" | tr ' ' ,) \
      "$python" -m uv pip install --quiet --python "$python" -c constraints.txt "$@"
}

by_uv "$@" 2>/dev/null || "$python" -m pip install --quiet --disable-pip-version-check -c constraints.txt "$@"
