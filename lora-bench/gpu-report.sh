#!/usr/bin/env bash
# Everything that needs a CUDA device, in under 8 minutes and on a machine without Rust.
#
#   lora-bench/gpu-report.sh build FOLDER       here: executables, goldens and a copy of this script, under 60 MiB
#   FOLDER/gpu-report.sh run FOLDER OUT         there: checks, compute-sanitizer, the report, the peer; results into OUT
#   ... build FOLDER --dry-run                  says what would be built
#
# build takes the peer's training script and its data from where the variables PEER, DATA (lines context||reference) and
# TOKENIZER (a folder) say; without them the report says that there is no peer.
#
# run needs the NVIDIA driver (580 or later); it uses NVRTC, cuBLASLt, compute-sanitizer and a python3 with torch,
# transformers and peft where they are. No step can hang, and one that fails does not stop the others. Its status is 0 when
# all steps passed, 1 when one failed, 77 when there is no CUDA device, 2 for wrong arguments.
set -uo pipefail

usage() { sed -n '4,6s/^# *//p' "$0" >&2; exit 2; }

# ---- build ----------------------------------------------------------------------------------------------------------

# executable NAME test|bin: the file of that target, from cargo's messages on standard input.
executable() {
  python3 -c '
import json, sys
found = [m["executable"] for m in map(json.loads, sys.stdin) if m.get("reason") == "compiler-artifact" and m.get("executable")
         and m["target"]["name"].replace("-", "_") == sys.argv[1] and m["profile"]["test"] == (sys.argv[2] == "test")]
print(found[-1])' "$@"
}

build() {
  local folder=$1 dry=${2:-} root name
  root=$(cd "$(dirname "$0")/.." && pwd) || exit 1
  # name of the file, package, target as cargo and its messages call it
  local targets=(
    "kernels lora-kernels --lib lora_kernels"
    "model lora-model --test=it it"
    "train lora-train --test=it it"
  )
  local peer=${PEER:-} data=${DATA:-} tokenizer=${TOKENIZER:-}
  set -e
  if [ "$dry" = --dry-run ]; then
    for target in "${targets[@]}"; do
      read -r name package which _ <<<"$target"
      echo "cargo test --release --no-run -p $package --features cuda $which -> $folder/$name"
    done
    echo "cargo build --release -p lora-bench --features cuda --bin gpu -> $folder/gpu"
    for file in "$peer" "$data" "$tokenizer"; do
      [ -e "$file" ] && echo "takes $file" || echo "no peer: there is no '$file'"
    done
    return
  fi
  mkdir -p "$folder"
  folder=$(cd "$folder" && pwd)
  cd "$root"
  for target in "${targets[@]}"; do
    read -r name package which cargo_name <<<"$target"
    file=$(cargo test --release --no-run --message-format json -p "$package" --features cuda "$which" | executable "$cargo_name" test)
    install -m 755 "$file" "$folder/$name"
  done
  file=$(cargo build --release --message-format json -p lora-bench --features cuda --bin gpu | executable gpu bin)
  install -m 755 "$file" "$folder/gpu"
  for name in kernels model train gpu; do
    strip "$folder/$name"
    gzip -9 --force "$folder/$name"
  done
  # Tests look for their goldens in the package that CARGO_MANIFEST_DIR names when they run.
  mkdir -p "$folder/lora-model/tests"
  rm -rf "$folder/lora-model/tests/golden"
  cp -R lora-model/tests/golden "$folder/lora-model/tests/golden"
  install -m 755 "$0" "$folder/gpu-report.sh"
  rm -rf "$folder/peer"
  if [ -f "$peer" ] && [ -f "$data" ] && [ -f "$tokenizer/tokenizer.json" ]; then
    mkdir -p "$folder/peer/tokenizer"
    cp "$peer" "$folder/peer/peer.py"
    head -n 400 "$data" >"$folder/peer/lines.txt"
    for file in tokenizer.json vocab.json merges.txt; do
      [ ! -f "$tokenizer/$file" ] || cp "$tokenizer/$file" "$folder/peer/tokenizer/"
    done
  fi
  du -sh "$folder"
  if [ "$(du -sm "$folder" | cut -f1)" -ge 60 ]; then
    echo "more than 60 MiB" >&2
    exit 1
  fi
}

# ---- run ------------------------------------------------------------------------------------------------------------

# Seconds for all steps together.
LIMIT=470

# step NAME SECONDS COMMAND...: runs a command with a limit, its output into the log, and notes how it went.
step() {
  local name=$1 seconds=$2 left start status verdict
  shift 2
  left=$((LIMIT - SECONDS))
  if [ "$seconds" -gt "$left" ]; then seconds=$left; fi
  if [ "$device" = no ]; then
    verdict="skipped: no CUDA device"
  elif [ "$seconds" -lt 3 ]; then
    verdict="skipped: the time is up"
    failed=1
  else
    start=$SECONDS
    printf '\n==== %s\n' "$name" >>"$log"
    timeout --kill-after=5 "$seconds" "$@" >>"$log" 2>&1 </dev/null
    status=$?
    case $status in
      0) verdict=passed ;;
      124 | 137) verdict="TIMED OUT after $seconds s" ;;
      *) verdict="FAILED with status $status" ;;
    esac
    [ "$status" -eq 0 ] || failed=1
    verdict="$verdict ($((SECONDS - start)) s)"
    printf -- '---- %s: %s\n' "$name" "$verdict" >>"$log"
  fi
  printf '%-44s %s\n' "$name" "$verdict" | tee -a "$summary"
}

# skip NAME WHY
skip() { printf '%-44s skipped: %s\n' "$1" "$2" | tee -a "$summary"; }

# Folders of CUDA's libraries that the loader does not know by itself: those of a toolkit and of Python packages.
libraries() {
  local folder
  for folder in /usr/local/cuda/lib64 /usr/local/cuda/targets/x86_64-linux/lib; do
    [ ! -d "$folder" ] || printf '%s:' "$folder"
  done
  timeout 20 python3 -c '
import glob, site, sys
roots = {p for p in [*sys.path, *site.getsitepackages()] if p}
print(":".join(sorted({d for r in roots for d in glob.glob(r + "/nvidia/*/lib")})))' 2>/dev/null
}

run() {
  local folder out original bin tests peer python_peer
  folder=$(cd "$1" && pwd) || exit 2
  mkdir -p "$2" && out=$(cd "$2" && pwd) || exit 2
  summary=$out/summary.txt log=$out/steps.log failed=0 device=yes
  : >"$summary"
  : >"$log"
  work=$(mktemp -d) || exit 1
  trap 'rm -rf "$work"' EXIT
  for bin in gpu kernels model train; do
    if ! gunzip -c "$folder/$bin.gz" >"$work/$bin" || ! chmod +x "$work/$bin"; then
      echo "there is no whole $folder/$bin.gz: run 'gpu-report.sh build' first" >&2
      exit 2
    fi
  done
  original=${LD_LIBRARY_PATH:-}
  LD_LIBRARY_PATH="$(libraries)${original:+:$original}"
  # A test that finds no device fails here, rather than passing for want of work.
  export LD_LIBRARY_PATH CARGO_MANIFEST_DIR="$folder/lora-model" LORA_GATES=required
  # Kernels compiled for this report stay out of the user's cache.
  export XDG_CACHE_HOME="$work/cache"
  mkdir -p "$XDG_CACHE_HOME"

  probe=$(timeout --kill-after=5 60 "$work/gpu" --only lora --seconds 0 2>&1 </dev/null)
  printf '%s\n' "$probe" >>"$log"
  case $probe in
    *"skipped: no CUDA device"*)
      device=no
      printf '%s\n' "$probe" | grep 'skipped: no CUDA device' | head -n 1 | tee -a "$summary"
      ;;
  esac

  step "facts" 20 sh -c 'nvidia-smi; uname -a; command -v nvcc compute-sanitizer python3; echo "$LD_LIBRARY_PATH"'

  # Parity. Each kernel for Hopper by itself and first: they have run nowhere else, and one that hangs stops only itself.
  for variant in 128x1 128x2 192x2 256x1 256x2; do
    step "parity: wgmma $variant" 25 "$work/kernels" "engines::tests::wgmma_$variant" --nocapture
  done
  tests=(cuda:: engines:: --skip cuda::module --skip engines::tests::wgmma --skip lora::)
  step "parity: kernels" 75 "$work/kernels" "${tests[@]}" --test-threads 4
  step "parity: LoRA" 40 "$work/kernels" lora::cuda --test-threads 4
  step "parity: models and gradients" 60 "$work/model" golden:: --test-threads 2
  step "parity: generation" 30 "$work/model" generate:: --test-threads 2
  step "parity: training" 40 "$work/train" device:: --skip task_device:: --test-threads 2

  # The sanitizer makes kernels many times slower: a few tests, one at a time.
  tests=(norm::cuda activation::cuda elementwise::cuda gather::cuda loss::cuda engines::tests::base_in_bf16
    engines::tests::wgmma_256x2 attention::cuda::tests::forward lora::cuda::tests::projections_with_their_terms_equal_the_reference
    --test-threads 1)
  for tool in memcheck racecheck; do
    if command -v compute-sanitizer >/dev/null; then
      step "compute-sanitizer $tool" 45 compute-sanitizer --tool "$tool" --error-exitcode 9 "$work/kernels" "${tests[@]}"
    else
      skip "compute-sanitizer $tool" "there is no compute-sanitizer"
    fi
  done

  step "report: kernels" 140 "$work/gpu" --only gemm,lora,memory,attention --seconds 110 \
    --json "$out/report.json" --markdown "$out/report.md"

  # The peer finds its libraries as it always does.
  python_peer=no
  if [ "$device" = yes ] && [ -d "$folder/peer" ]; then
    LD_LIBRARY_PATH=$original timeout --kill-after=5 60 python3 -c \
      'import torch, transformers, tokenizers, peft; assert torch.cuda.is_available(); print(torch.__version__, transformers.__version__, peft.__version__)' \
      >>"$log" 2>&1 </dev/null && python_peer=yes
  fi
  peer="env LD_LIBRARY_PATH='$original' python3 '$folder/peer/peer.py' --device cuda --arch gpt2-medium --bf16 --batch 8 --steps 50"
  peer="$peer --data '$folder/peer/lines.txt' --tokenizer '$folder/peer/tokenizer'"
  local own=(--model "$work/model")
  [ ! -d "$folder/peer" ] || own+=(--data "$folder/peer/lines.txt" --tokenizer "$folder/peer/tokenizer")
  if [ "$python_peer" = yes ]; then
    step "report: decoding, training against PyTorch" 100 "$work/gpu" --only decode,train "${own[@]}" \
      --peer "$peer" --peer-rounds 2 --json "$out/train.json" --markdown "$out/train.md"
    step "report: training against torch.compile" 100 "$work/gpu" --only train "${own[@]}" \
      --peer "$peer --compile" --peer-rounds 1 --json "$out/train-compiled.json" --markdown "$out/train-compiled.md"
  else
    step "report: decoding, training" 60 "$work/gpu" --only decode,train "${own[@]}" \
      --json "$out/train.json" --markdown "$out/train.md"
    skip "report: training against PyTorch" "peer not available"
  fi

  {
    echo
    for part in report train train-compiled; do
      [ ! -f "$out/$part.md" ] || { echo "## $part"; cat "$out/$part.md"; echo; }
    done
    echo "$SECONDS s in all"
  } >>"$summary"
  echo
  sed -n '/^$/,$p' "$summary"
  if [ "$device" = no ]; then exit 77; fi
  exit "$failed"
}

case ${1:-} in
  build) [ $# -ge 2 ] && [ $# -le 3 ] || usage; build "$2" "${3:-}" ;;
  run) [ $# -eq 3 ] || usage; run "$2" "$3" ;;
  *) usage ;;
esac
