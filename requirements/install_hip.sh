#!/bin/sh
# install_hip.sh PYTHON: what compiles for AMD GPUs where ROCm is not installed: Debian's clang 22 with its linker, and HIP's
# headers and device libraries out of the triton wheel. Does nothing that is done already.
set -eu
python=$1
cd "$(dirname "$0")"

has_clang() {
  for name in $(seq -f 'clang++-%g' 30 -1 20) clang++; do
    version=$("$name" --version 2>/dev/null | sed -n '1s/.*version \([0-9]*\).*/\1/p')
    [ "${version:-0}" -ge 20 ] && command -v "$("$name" -print-prog-name=ld.lld)" >/dev/null && return
  done
  return 1
}

if command -v hipcc >/dev/null || [ -x /opt/rocm/bin/hipcc ]; then
  exit
fi
"$python" unpack_hip.py
has_clang && exit
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends clang-22 lld-22 >/dev/null
fi
has_clang || {
  echo "hip: needs clang >= 20 with its ld.lld; got none; run \`apt-get install clang-22 lld-22\` as root (Debian)" >&2
  exit 1
}
