#!/bin/sh
# Everything that a session on a GPU has to show. Builds nothing.
#   run.sh [OUTPUT]     with BIN, the folder of the programs (target/release), and MINUTES for the large step (6)
set -u
cd "$(dirname "$0")/../.."
bin=${BIN:-target/release}
out=${1:-runs/cuda}
mkdir -p "$out"
step=$bin/distillation_step
[ -x "$step" ] || step=$bin/examples/distillation_step

# Without a toolkit: its packages for Python have compiler and headers.
if [ -z "${CUDA_PATH:-}" ] && [ ! -e /usr/local/cuda/include/cuda_runtime.h ]; then
    CUDA_PATH=$(python3 -c 'import nvidia, os; print(next(p for r in nvidia.__path__ for p in [os.path.join(r, "cu13")] if os.path.isdir(p)))') &&
        export CUDA_PATH
fi

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$out/card.csv"

# So many seconds at most, with what is printed and the memory of the card kept beside.
timed() {
    name=$1 secs=$2
    shift 2
    echo "== $name: $*"
    nvidia-smi --query-gpu=memory.used,utilization.gpu --format=csv,noheader,nounits -lms 250 >"$out/$name.memory" 2>/dev/null &
    watcher=$!
    timeout "$secs" "$@" >"$out/$name.txt" 2>&1
    echo "exit code $?" | tee -a "$out/$name.txt"
    kill "$watcher"
    tail -n 15 "$out/$name.txt"
    echo "most memory of the card, MiB: $(cut -d, -f1 "$out/$name.memory" | sort -n | tail -1)"
}

timed selftest 180 "$bin/fewstep" selftest --device cuda:0 --runs 3
timed small_step 60 "$step" --model goldens/qwen_image/model --side 64 --lora-rank 4 --text-tokens 16
timed large_step $((60 * ${MINUTES:-6})) "$step" --steps 3
timed demo 180 "$bin/fewstep" demo --quick --device cuda:0 --output "$out/demo"
