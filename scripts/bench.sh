#!/usr/bin/env bash
# Measures against baselines, prints tables, writes target/bench/*.json. Extra words choose: latency jobs logs boot registry.
set -euo pipefail
cd "$(dirname "$0")/.."
chosen=("$@")
[ ${#chosen[@]} -gt 0 ] || chosen=(latency jobs logs boot registry)
end_to_end=()
for name in "${chosen[@]}"; do
    [ "$name" = registry ] || end_to_end+=("$name")
done
echo "load average before: $(cut -d' ' -f1-3 /proc/loadavg)"
if [ ${#end_to_end[@]} -gt 0 ]; then
    cargo bench --quiet -p mvm-ci --bench end_to_end -- "${end_to_end[@]}"
fi
if [[ " ${chosen[*]} " == *" registry "* ]]; then
    scripts/setup.sh bench
    cargo build --quiet --release -p blixard-registry --bin registry --example bench_registry
    target/release/examples/bench_registry
fi
