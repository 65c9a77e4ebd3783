#!/bin/sh
# Measures a part of benchmark/results again on an NVIDIA GPU, and prints which times moved by more than 2%.
#
#     sh benchmark/remeasure.sh --list              the parts; each takes less than ten minutes on an H200 with 16 cores
#     sh benchmark/remeasure.sh matmul              writes to remeasured/, or to the folder OUT names
#     SEEDS="21 22" COUNT=30 sh benchmark/remeasure.sh grid   30 sizes of each seed, each on a GPU of its own where there are two
#     FAST=1 ...                                    ours without those that no target is about: grid without exact rows
#
# Peers take part where they can be imported: see the files of results. Files of results are not touched: copy what is to stand.
# Status 1 if a time of ours is slower by more than 2%, also beside its peers; 2 for a part that does not exist.
set -u
PARTS="scaled_mm grid matmul mxfp4_moe mxfp4_moe_grid intrinsics gated_delta attention host"
cd "$(dirname "$0")/.." || exit 2
PYTHON=${PYTHON:-python3}
OUT=${OUT:-remeasured}
LIBRARY=${LIBRARY:-}  # of vLLM's operators
PEERS=${PEERS:-}      # folders to import peers of mxfp4_moe from
VLLM=${VLLM:-}        # a folder in which its wheel is unpacked
SEEDS=${SEEDS:-7 11}
COUNT=${COUNT:-60}      # sizes of a seed; matmul draws 40 of the first seed
SIZES="8 32 48 96 200 384 768"
status=0

bench() { # file, arguments
  file=$1
  shift
  "$PYTHON" "benchmark/$file" "$@" || { echo "remeasure: $file $* failed" >&2; status=1; }
}

compare() { # file of results, new files
  committed=benchmark/results/$1
  shift
  "$PYTHON" benchmark/compare_results.py "$committed" "$@" || status=1
}

part=${1:-}
case $part in
  --list) echo "$PARTS" | tr ' ' '\n'; exit 0 ;;
esac
mkdir -p "$OUT"
case $part in
  scaled_mm)
    bench bench_scaled_matmul.py --target cuda ${LIBRARY:+--library "$LIBRARY"} --csv "$OUT/scaled_matmul.csv"
    compare scaled_matmul_h200.csv "$OUT/scaled_matmul.csv"
    ;;
  grid)
    gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
    number=0 files=""
    for seed in $SEEDS; do
      gpu=$((number % (gpus > 0 ? gpus : 1))) number=$((number + 1)) files="$files $OUT/seed$seed.csv"
      CUDA_VISIBLE_DEVICES=$gpu "$PYTHON" benchmark/bench_grid.py --op scaled_mm --seed "$seed" --count "$COUNT" ${FAST:+--without-exact} \
        --processes $(($(nproc) / (gpus > 0 ? gpus : 1))) --csv "$OUT/seed$seed.csv" >"$OUT/seed$seed.txt" 2>&1 &
      [ $((number % (gpus > 0 ? gpus : 1))) -ne 0 ] || wait
    done
    wait
    for seed in $SEEDS; do tail -n 5 "$OUT/seed$seed.txt"; done
    sizes=$(for M in $SIZES; do echo "${M}x27648x5120 ${M}x10240x8192"; done)
    # shellcheck disable=SC2086
    bench bench_grid.py --op scaled_mm ${FAST:+--without-exact} --csv "$OUT/listed.csv" --sizes $sizes
    # shellcheck disable=SC2086
    compare grid_h200.csv $files "$OUT/listed.csv"
    ;;
  matmul)
    bench bench_matmul.py --target cuda --dtype bfloat16 --providers ours plain torch --csv "$OUT/matmul_bfloat16.csv" \
      --plot "$OUT/matmul_bfloat16.png"
    bench bench_matmul.py --target cuda --dtype float16 --providers ours torch --csv "$OUT/matmul_float16.csv"
    bench bench_matmul.py --target cuda --providers ours torch --random 40 --seed "${SEEDS%% *}" --csv "$OUT/matmul_random40.csv"
    compare matmul_h200_bfloat16.csv "$OUT/matmul_bfloat16.csv"
    compare matmul_h200_float16.csv "$OUT/matmul_float16.csv"
    compare matmul_h200_random40.csv "$OUT/matmul_random40.csv"
    ;;
  mxfp4_moe)
    bench bench_mxfp4_moe.py --target cuda --a-dtype fp8 bf16 --csv "$OUT/mxfp4_moe.csv" --plot "$OUT/mxfp4_moe.png"
    compare mxfp4_moe_h200.csv "$OUT/mxfp4_moe.csv"
    ;;
  mxfp4_moe_grid)
    for seed in $SEEDS; do
      # shellcheck disable=SC2086
      bench bench_grid.py --op mxfp4_moe --seed "$seed" --count "$COUNT" ${PEERS:+--path $PEERS} --csv "$OUT/mxfp4_moe_seed$seed.csv"
      compare grid_mxfp4_moe_h200.csv "$OUT/mxfp4_moe_seed$seed.csv"
    done
    ;;
  intrinsics)
    bench bench_fp8_intrinsic.py --csv "$OUT/fp8_intrinsic.csv"
    bench bench_mxfp4_intrinsic.py --n 4096 --k 4096 --m 4096 --csv "$OUT/mxfp4_intrinsic.csv"
    compare fp8_intrinsic_h200.csv "$OUT/fp8_intrinsic.csv"
    compare mxfp4_intrinsic_h200.csv "$OUT/mxfp4_intrinsic.csv"
    ;;
  gated_delta)
    bench bench_gated_delta.py ${VLLM:+--vllm "$VLLM"} --csv "$OUT/gated_delta.csv"
    compare gated_delta_h200.csv "$OUT/gated_delta.csv"
    bench bench_gated_delta_prefill.py --heads 16/16 32/32 --csv "$OUT/gated_delta_prefill.csv"
    compare gated_delta_prefill_h200.csv "$OUT/gated_delta_prefill.csv"
    ;;
  attention)
    bench bench_attention.py --csv "$OUT/attention.csv"
    compare attention_h200.csv "$OUT/attention.csv"
    ;;
  host)
    bench bench_host.py ${PEERS:+--path "$PEERS"} --csv "$OUT/host.csv"
    compare host_h200.csv "$OUT/host.csv"
    ;;
  *)
    echo "remeasure: the part must be among $PARTS; got ${part:-nothing}; --list prints them" >&2
    exit 2
    ;;
esac
exit $status
