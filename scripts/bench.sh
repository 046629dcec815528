#!/usr/bin/env bash
# Measures against baselines, prints tables, writes target/bench/*.json. Extra words choose: latency jobs control logs boot
# idle registry.
set -euo pipefail
cd "$(dirname "$0")/.."
chosen=("$@")
[ ${#chosen[@]} -gt 0 ] || chosen=(latency jobs control logs boot idle registry)
scheduler=() end_to_end=()
for name in "${chosen[@]}"; do
    case $name in
        latency | jobs | control) scheduler+=("$name") ;;
        logs | boot | idle) end_to_end+=("$name") ;;
        registry) ;;
        *) echo "bench: no such thing: $name" >&2; exit 2 ;;
    esac
done
echo "load average before: $(cut -d' ' -f1-3 /proc/loadavg)"
if [ ${#scheduler[@]} -gt 0 ]; then
    scripts/setup.sh bench
    # With mvm-ci's benches: so everything is built once, with the same features.
    cargo build --quiet --release -p mvm-ci -p blixard-registry -p blixard-scheduler --bins --bench scheduler
    cargo bench --quiet -p mvm-ci --bench scheduler -- "${scheduler[@]}"
fi
if [ ${#end_to_end[@]} -gt 0 ]; then
    cargo bench --quiet -p mvm-ci --bench end_to_end -- "${end_to_end[@]}"
fi
if [[ " ${chosen[*]} " == *" registry "* ]]; then
    scripts/setup.sh bench
    cargo build --quiet --release -p blixard-registry --bin registry --example bench_registry
    target/release/examples/bench_registry
fi
