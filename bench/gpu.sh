#!/usr/bin/env bash
# Everything that wants a GPU, within a time limit and without a network: the gpu tests, random configurations,
# compute-sanitizer, the benchmark and its plot. `bench/gpu.sh SECONDS [arguments of python -m bench..]`, for instance
#   bench/gpu.sh 900 --shape gemma2 llama3 gpt2
# A library that is there already (cce_ext/_C.abi3.so) is used, else it is built with CMake. Logs and results go to
# $OUT, or to bench/results; PYTHON names the interpreter, COMPUTE_SANITIZER the tool where it is not on the PATH, COMMIT
# the commit where there is no git to ask. FUZZ_SECONDS (60) is how long random configurations are tried, at most half of
# the time that is left.
# PROBLEM_DATA names a folder of tokens that research/study.py prepare has written: then a model is trained on them, and
# the benchmark has its held-out problem besides the lm inputs (--data lm saved:FILE). PROBLEM_FILE (runs/problem.pt) is
# where that is kept, PROBLEM_SET what the training has of other settings than the ones below, PROBLEM_SECONDS (240) its
# time, at most half of what is left. PROBLEM_TOKENS (8192) is how many tokens the problem has.
# REGIME_SECONDS (0: none of it) is the time for what is not pretraining, at most half of what is left before the
# benchmark: three quarters of the tokens ignored in spans at Llama 3's shape, nine tenths at random at one with more
# tokens, a frozen classifier, 64 to 16384 tokens, and the host's time of a call. Each has a results file.
# REGIME_METHODS ("cce cce_exact baseline") are measured beside the product, but for the last. They are planned for 300
# seconds; what does not fit says so.
# LOGPROBS_SECONDS (0: none of it) is the time for the tasks of post-training, at most half of what is left before the
# benchmark: log-probabilities with entropies (logprobs) and soft targets (distill) at LOGPROBS_SHAPES ("trl"), and at
# the first of these how true log-probabilities are (accuracy), on the lm inputs and on the problem that was trained, if
# one was. Each has a results file. What does not fit says so. Other packages may lie in folders on PYTHONPATH.
# A part that fails does not stop the next. The exit status is 1 if one failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

if [[ ! "${1-}" =~ ^[1-9][0-9]*$ ]]; then
  printf 'usage: bench/gpu.sh SECONDS [arguments of python -m bench..]\n' >&2
  exit 2
fi
readonly limit=$1
shift
readonly out=${OUT:-bench/results}
readonly python=${PYTHON:-python3}
mkdir -p "$out"
SECONDS=0
table=""
failed=0

left() { echo $((limit - SECONDS)); }

# row NAME STATUS DETAIL: a line of the final table.
row() { table+=$(printf '%-14s %-8s %s' "$1" "$2" "$3")$'\n'; }

# part NAME SHARE COMMAND..: runs the command for at most SHARE percent of the time left; its output is also in a log.
part() {
  local name=$1 share=$2
  shift 2
  timed "$name" $(($(left) * share / 100)) "$@"
}

# timed NAME LIMIT COMMAND..: the same for at most LIMIT seconds.
timed() {
  local name=$1 seconds=$2 begin=$SECONDS code=0
  shift 2
  if ((seconds < 1)); then
    failed=1
    row "$name" "FAILED" "no time left"
    return
  fi
  printf '\n=== %s (at most %d s)\n' "$name" "$seconds"
  timeout --kill-after=10 "$seconds" "$@" 2>&1 | tee "$out/$name.log" || code=$?
  if ((code == 0)); then
    row "$name" "ok" "$((SECONDS - begin)) s: $(summary "$out/$name.log")"
  else
    failed=1
    ((code == 124 || code == 137)) && row "$name" "FAILED" "the time limit, after $((SECONDS - begin)) s" && return
    row "$name" "FAILED" "$((SECONDS - begin)) s, exit code $code: $(summary "$out/$name.log")"
  fi
}

# summary LOG: the last line that says something.
summary() { tr '\r' '\n' <"$1" | grep -v '^[[:space:]]*$' | tail -n 1 | cut -c 1-100; }

if [[ -e cce_ext/_C.abi3.so ]]; then
  row "build" "ok" "carried: cce_ext/_C.abi3.so"
else
  part "build" 50 bash -c "cmake -S . -B build/gpu -DCCE_CUDA=ON && cmake --build build/gpu --parallel"
fi
part "tests" 35 "$python" -m pytest -m gpu -q
fuzz_seconds=$((${FUZZ_SECONDS:-60} < $(left) / 2 ? ${FUZZ_SECONDS:-60} : $(left) / 2))
part "fuzz" 65 "$python" -m bench.checks.fuzz --device cuda --seconds "$fuzz_seconds"

sanitizer=${COMPUTE_SANITIZER:-$(command -v compute-sanitizer || true)}
if [[ -z "$sanitizer" && -x /usr/local/cuda/bin/compute-sanitizer ]]; then
  sanitizer=/usr/local/cuda/bin/compute-sanitizer
fi
if [[ -n "$sanitizer" ]]; then
  # Every allocation by itself, so that memcheck sees where a tensor ends.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  # PyTorch's own calls of the CUDA API fail on purpose now and then, to ask what there is.
  part "memcheck" 15 "$sanitizer" --tool memcheck --report-api-errors no --error-exitcode 1 \
    "$python" -m bench.checks.sanitize
  # Shared memory that is raced for: in our kernels (by namespace), others' are theirs to check. No cuBLAS: racecheck
  # fails where a kernel that uses the copy engine is left out.
  part "racecheck" 15 "$sanitizer" --tool racecheck --kernel-name kns=_ZN3cce --error-exitcode 1 \
    "$python" -m bench.checks.sanitize --without-cublas
  # All kernels: what one writes another may read. It does not see what cuBLAS writes.
  part "initcheck" 15 "$sanitizer" --tool initcheck --error-exitcode 1 "$python" -m bench.checks.sanitize --without-cublas
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
else
  row "sanitizer" "skipped" "there is no compute-sanitizer"
fi

data=()
if [[ -n "${PROBLEM_DATA:-}" ]]; then
  problem=${PROBLEM_FILE:-runs/problem.pt}
  # Both are made anew: a run that the results file holds already is not run again.
  rm -f "$problem" "$out/study_problem.json"
  share=$((100 * ${PROBLEM_SECONDS:-240} / ($(left) > 0 ? $(left) : 1)))
  # shellcheck disable=SC2086 # PROBLEM_SET is words
  part "problem" "$((share < 50 ? share : 50))" \
    env PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" "$python" research/study.py run --data "$PROBLEM_DATA" \
    --phases pretrain --impls cce --seeds 0 --out "$out/study_problem.json" \
    --save-problem "$problem" --problem-tokens "${PROBLEM_TOKENS:-8192}" ${COMMIT:+--commit "$COMMIT"} \
    --set layers=8 width=1024 heads=16 pretrain.batch=32 pretrain.steps=650 pretrain.lr=1.5e-3 \
    final_eval_tokens=16384 ${PROBLEM_SET:-}
  [[ -e "$problem" ]] && data=(--data lm "saved:$problem")
fi

regime_seconds=$((${REGIME_SECONDS:-0} < $(left) / 2 ? ${REGIME_SECONDS:-0} : $(left) / 2))
# regime NAME PERCENT ARGUMENTS..: the benchmark with these, for so much of regime_seconds. It keeps within its limit by
# itself; eight seconds are for its start and its last file.
regime() {
  local name=$1 seconds=$((regime_seconds * $2 / 100))
  shift 2
  rm -f "$out/$name.json" "$out/$name.png"
  timed "$name" "$seconds" "$python" -m bench --out "$out/$name.json" --time-limit $((seconds > 9 ? seconds - 8 : 1)) \
    ${COMMIT:+--commit "$COMMIT"} "$@"
}
if ((regime_seconds > 0)); then
  read -ra methods <<<"${REGIME_METHODS:-cce cce_exact baseline}"
  regime "ignored_spans" 20 --shape llama3 --ignored 0.75 --spans --methods "${methods[@]}"
  regime "ignored_random" 20 --shape 16384,1024,151936 --ignored 0.9 --methods "${methods[@]}"
  regime "frozen" 13 --shape llama3 --frozen c --methods "${methods[@]}"
  regime "tokens" 34 --shape 8192,1024,151936 --tokens 64..16384 --host --methods "${methods[@]}"
  regime "host" 13 --shape 8,64,512 --host --repeats 50 --methods cce cce_exact cce_compiled baseline compiled_baseline
  [[ -e "$out/tokens.json" ]] && part "tokens_plot" 20 "$python" -m bench plot "$out/tokens.json"
fi

logprobs_seconds=$((${LOGPROBS_SECONDS:-0} < $(left) / 2 ? ${LOGPROBS_SECONDS:-0} : $(left) / 2))
# task NAME PERCENT: the benchmark of one, for so much of logprobs_seconds, as regime has it.
task() {
  local name=$1 seconds=$((logprobs_seconds * $2 / 100))
  rm -f "$out/$name.json" "$out/$name.png"
  timed "$name" "$seconds" "$python" -m bench --task "$name" --shape "${shapes[@]}" --out "$out/$name.json" \
    --time-limit $((seconds > 9 ? seconds - 8 : 1)) ${COMMIT:+--commit "$COMMIT"}
}
if ((logprobs_seconds > 0)); then
  read -ra shapes <<<"${LOGPROBS_SHAPES:-trl}"
  task logprobs 50
  task distill 30
  rm -f "$out/accuracy.json" "$out/accuracy.png"
  timed "accuracy" $((logprobs_seconds * 20 / 100)) "$python" -m bench.studies.accuracy --shape "${shapes[0]}" \
    ${data[@]+"${data[@]}"} --out "$out/accuracy.json" ${COMMIT:+--commit "$COMMIT"}
fi

# The benchmark keeps within its limit by itself; the rest is for its last file and the plot.
seconds=$(($(left) * 95 / 100 - 15))
if ((seconds > 0)); then
  rm -f "$out/bench.json" "$out/bench.png"
  part "bench" 98 "$python" -m bench --out "$out/bench.json" --time-limit "$seconds" ${COMMIT:+--commit "$COMMIT"} \
    ${data[@]+"${data[@]}"} "$@"
  [[ -e "$out/bench.json" ]] && part "plot" 100 "$python" -m bench plot "$out/bench.json" --out "$out/bench.png"
else
  failed=1
  row "bench" "FAILED" "no time left"
fi

printf '\n%s\n' "=== bench/gpu.sh: $SECONDS of $limit s"
printf '%s' "$table"
names=(bench)
((regime_seconds > 0)) && names+=(ignored_spans ignored_random frozen tokens host)
((logprobs_seconds > 0)) && names+=(logprobs distill)
for name in "${names[@]}"; do
  [[ -e "$out/$name.json" ]] || continue
  printf '\n'
  "$python" -c 'import json, sys; from bench.report.tables import short_table; print(short_table(json.load(open(sys.argv[1]))["rows"]))' \
    "$out/$name.json"
done
exit "$failed"
