#!/usr/bin/env bash
# Everything that needs a GPU, in pieces of at most nine minutes, the most important first:
#   benchmarks/gpu.sh 1      correctness; nothing else counts unless it passes
#   benchmarks/gpu.sh 2      ... and so on, or `benchmarks/gpu.sh all`
# Results go to $OUT, or to benchmarks/results. Nothing is fetched: what is not installed becomes a row that says so.
# Wheels of peers (recurrentgemma, fla-core, accelerated-scan, einops) lying in benchmarks/wheels are installed first.
set -u
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3}
export BENCHMARK_RESULTS=${OUT:-$PWD/benchmarks/results}
export PYTHONPATH=$PWD/src:$PWD:${PYTHONPATH:-} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
mkdir -p "$BENCHMARK_RESULTS"

if ls benchmarks/wheels/*.whl >/dev/null 2>&1; then
  for wheel in benchmarks/wheels/*.whl; do
    "$PYTHON" -m pip install --quiet --no-index --no-deps "$wheel" || echo "not installed: $wheel"
  done
fi

# at SECONDS SCRIPT ARGUMENTS: runs one script within its share of the piece; the rows it had until then are kept.
at() {
  local limit=$1 script=$2
  shift 2
  echo "== $script $*"
  timeout --signal=INT --kill-after=15 "$limit" "$PYTHON" "benchmarks/$script" --device cuda "$@" \
    || echo "-- $script ended with $? (124: its time was up)"
}

piece() {
  case $1 in
    1)
      at 260 correct.py
      local workers=(-n 8)
      "$PYTHON" -c "import xdist" 2>/dev/null || workers=()
      timeout 260 "$PYTHON" -m pytest -q -p no:cacheprovider ${workers[@]+"${workers[@]}"} tests/test_scan*.py \
        tests/test_kernels.py tests/test_cache.py tests/test_modeling.py tests/test_dtypes_and_devices.py \
        tests/test_heads.py tests/test_initial_values.py tests/test_against_official.py \
        2>&1 | tee "$BENCHMARK_RESULTS/pytest.txt" | tail -25
      ;;
    2) at 250 scan.py && at 280 block.py --shapes 1x8192 8x8192 ;;
    3) at 530 decode.py --contexts 1000 1000000 --peers "ours" "ours, compiled" "gemma" "in-tree" "official jax" ;;
    4) at 530 prefill.py --lengths 8192 65536 --peers "ours" "gemma" "gemma, flash" "official jax" "in-tree" ;;
    5) at 530 train.py --lengths 8192 --checkpoint --peers "ours" "gemma" "gemma, flash" "official jax" ;;
    6) at 530 throughput.py --peers "ours" "gemma" "ours, compiled" "in-tree" ;;
    7) at 530 train.py --lengths 2048 8192 --tag plain --peers "ours" "ours, compiled" "gemma" ;;
    8) at 530 prefill.py --lengths 2048 32768 --tag more --peers "ours" "ours, compiled" "gemma" "official torch" ;;
    9) at 530 decode.py --contexts 8192 32768 --batch 16 --tag batch --peers "ours" "ours, compiled" "gemma" "official torch" ;;
    10) at 270 scan.py --dtype float32 --tag precise && at 260 block.py --shapes 1x65536 --lru-widths 2560 3840 --tag long ;;
    11) at 530 train.py --lengths 2048 --tag slow --checkpoint --peers "in-tree" "official torch" --slow-peers-up-to 2048 ;;
    *) echo "gpu.sh: no piece $1; there are 1 to 11, and all" >&2; return 2 ;;
  esac
}

if [ $# -eq 0 ]; then
  sed -n '2,7s/^# \{0,1\}//p' "$0"
  exit 2
fi
if [ "$1" = all ]; then
  for number in $(seq 1 11); do piece "$number"; done
else
  for number in "$@"; do piece "$number" || exit; done
fi
