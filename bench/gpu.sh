#!/usr/bin/env bash
# Everything that wants a GPU, within a time limit and without a network: the gpu tests, random configurations,
# compute-sanitizer, the benchmark and its plot. `bench/gpu.sh SECONDS [arguments of python -m bench..]`, for instance
#   bench/gpu.sh 900 --shape gemma2 llama3 gpt2
# A library that is there already (cce_ext/_C.abi3.so) is used, else it is built with CMake. Logs and results go to
# $OUT, or to bench/results; PYTHON names the interpreter, COMPUTE_SANITIZER the tool where it is not on the PATH, COMMIT
# the commit where there is no git to ask. FUZZ_SECONDS (60) is how long random configurations are tried, at most half of
# the time that is left.
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
row() { table+=$(printf '%-12s %-8s %s' "$1" "$2" "$3")$'\n'; }

# part NAME SHARE COMMAND..: runs the command for at most SHARE percent of the time left; its output is also in a log.
part() {
  local name=$1 share=$2 begin=$SECONDS code=0 seconds
  shift 2
  seconds=$(($(left) * share / 100))
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

# The benchmark keeps within its limit by itself; the rest is for its last file and the plot.
seconds=$(($(left) * 95 / 100 - 15))
if ((seconds > 0)); then
  rm -f "$out/bench.json" "$out/bench.png"
  part "bench" 98 "$python" -m bench --out "$out/bench.json" --time-limit "$seconds" ${COMMIT:+--commit "$COMMIT"} "$@"
  [[ -e "$out/bench.json" ]] && part "plot" 100 "$python" -m bench plot "$out/bench.json" --out "$out/bench.png"
else
  failed=1
  row "bench" "FAILED" "no time left"
fi

printf '\n%s\n' "=== bench/gpu.sh: $SECONDS of $limit s"
printf '%s' "$table"
if [[ -e "$out/bench.json" ]]; then
  printf '\n'
  "$python" -c 'import json, sys; from bench.report.tables import short_table; print(short_table(json.load(open(sys.argv[1]))["rows"]))' \
    "$out/bench.json"
fi
exit "$failed"
