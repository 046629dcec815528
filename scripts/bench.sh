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
    command -v etcd >/dev/null || echo "bench: etcd is not installed (apt-get install etcd-server): its column stays empty"
    cargo run --quiet --release -p blixard-registry --example registry_writes
fi
