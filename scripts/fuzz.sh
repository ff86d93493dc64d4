#!/usr/bin/env bash
# Builds every fuzz target and runs each for SECONDS (default 20), two at a time. Fails on a crash, a hang or a leak of
# memory, and names the input that caused it. Needs only the project's stable toolchain and a C++ compiler: coverage
# comes from LLVM's own pass, and the parsers are safe code, so no sanitizer runtime is needed.
#
#   scripts/fuzz.sh [SECONDS] [TARGET…]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

seconds=${1:-20}
[[ $seconds =~ ^[0-9]+$ ]] || { echo "usage: scripts/fuzz.sh [SECONDS] [TARGET…]" >&2; exit 2; }
shift || true

folder=tests/fuzz
host=$(rustc -vV | sed -n 's/^host: //p')
if [ $# -gt 0 ]; then
    targets=("$@")
else
    mapfile -t targets < <(cd "$folder/targets" && printf '%s\n' *.rs | sed 's/\.rs$//')
fi

echo "fuzz: building ${#targets[@]} targets"
# With --target the flags reach the parsers and not the build scripts.
export RUSTFLAGS="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares --cfg fuzzing"
export CARGO_TARGET_DIR="$PWD/$folder/target"
build=(cargo build --quiet --locked --release --target "$host" --manifest-path "$folder/Cargo.toml")
for target in "${targets[@]}"; do build+=(--bin "$target"); done
"${build[@]}"

run_one() {
    local target=$1 log="$folder/artifacts/$1/log"
    mkdir -p "$folder/corpus/$target" "$folder/artifacts/$target"
    if "$CARGO_TARGET_DIR/$host/release/$target" "$folder/corpus/$target" "$folder/seeds/$target" \
        -max_total_time="$seconds" -timeout=10 -rss_limit_mb=1024 -max_len=8192 -print_final_stats=1 \
        -artifact_prefix="$folder/artifacts/$target/" >"$log" 2>&1; then
        runs=$(sed -n 's/^stat::number_of_executed_units: //p' "$log")
        coverage=$(sed -n 's/.* cov: \([0-9]*\) .*/\1/p' "$log" | tail -n 1)
        echo "fuzz: $target passed: ${runs// /} runs, coverage ${coverage:-0}"
    else
        echo "fuzz: $target FAILED; the input is in $folder/artifacts/$target; end of its log:"
        tail -n 15 "$log"
        return 1
    fi
}

failed=0
running=0
for target in "${targets[@]}"; do
    if [ "$running" -ge 2 ]; then
        wait -n || failed=$((failed + 1))
        running=$((running - 1))
    fi
    run_one "$target" &
    running=$((running + 1))
done
while [ "$running" -gt 0 ]; do
    wait -n || failed=$((failed + 1))
    running=$((running - 1))
done

echo "fuzz: $((${#targets[@]} - failed)) passed, $failed failed"
[ "$failed" -eq 0 ]
