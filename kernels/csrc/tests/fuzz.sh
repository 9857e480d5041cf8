#!/usr/bin/env bash
# fuzz.sh BUILD SECONDS: each fuzz target for SECONDS, its corpus and findings below BUILD. Ends badly at the first finding.
set -euo pipefail
build=$1 seconds=$2
for name in manifest volume; do
  corpus=$build/corpus/$name
  mkdir -p "$corpus"
  for flags in $(seq 0 127); do  # seeds: every combination of checksums put right and ways to open, no edit
    printf "\\x$(printf %x "$flags")" >"$corpus/seed_$flags"
  done
  echo "== fuzz_$name, $seconds s"
  "$build/tests/fuzz_$name" -max_total_time="$seconds" -max_len=400 -len_control=0 -timeout=20 -rss_limit_mb=3000 -detect_leaks=0 -print_final_stats=1 \
    -artifact_prefix="$build/" "$corpus" 2>"$build/fuzz_$name.log" || { tail -n 60 "$build/fuzz_$name.log"; exit 1; }
  grep -E "DONE|BINGO|number_of_executed|average_exec|peak_rss" "$build/fuzz_$name.log"
done
