#!/bin/sh
# has_clang.sh: succeeds when PATH holds a clang >= 16, which the simulator then uses (Apple's count is one lower).
for name in clang++ $(seq -f 'clang++-%g' 30 -1 16); do
  version=$("$name" --version 2>/dev/null | sed -n '1s/.*version \([0-9]*\).*/\1/p')
  least=16
  "$name" --version 2>/dev/null | grep -q Apple && least=15
  [ "${version:-0}" -ge "$least" ] && exit 0
done
exit 1
