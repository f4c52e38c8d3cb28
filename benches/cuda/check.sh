#!/bin/sh
# Without a GPU: compiles every kernel that the selftest and a small distillation step launch, through NVRTC.
#   check.sh            with CUDA_PATH, a folder of CUDA's headers and NVRTC, where they need not be fetched
set -eu
cd "$(dirname "$0")/../.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if [ -z "${CUDA_PATH:-}" ]; then
    python3 -m pip install --quiet --target "$work/python" --only-binary=:all: \
        'nvidia-cuda-nvrtc==13.0.*' 'nvidia-cuda-runtime==13.0.*' 'nvidia-cuda-crt==13.0.*' 'nvidia-cuda-cccl==13.0.*'
    export CUDA_PATH="$work/python/nvidia/cu13"
fi
cargo build -p fewstep-null-cuda
cargo build -p fewstep --features cuda
cargo build -p fewstep --features cuda --example distillation_step
target=$(cargo metadata --format-version 1 --no-deps | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')/debug
mkdir "$work/driver"
cp "$target/libnull_cuda.so" "$work/driver/libcuda.so"
export LD_LIBRARY_PATH="$work/driver"

# The selftest finds that no number is right (exit code 1) and says so of each check; an error, a panic (101) or a signal is
# not that.
counted() {
    report=$work/$1.json
    shift
    code=0
    NULL_CUDA_REPORT=$report "$@" >"$work/said" 2>&1 || code=$?
    if [ "$code" -gt 1 ] || ! [ -s "$report" ] || grep -q '^error: ' "$work/said"; then
        cat "$work/said"
        echo "exit code $code of: $*"
        exit 1
    fi
    echo "$*"
    cat "$report"
}
counted selftest "$target/fewstep" selftest --device cuda:0 --runs 1 --json
counted step "$target/examples/distillation_step" --model goldens/qwen_image/model --side 64 --lora-rank 4 --text-tokens 16
