#!/usr/bin/env bash
# The main job, end to end: start the control plane, run a command in a real microVM, look at what was recorded.
set -euo pipefail
cd "$(dirname "$0")/.."
mvm_ci=target/debug/mvm-ci
log=$(mktemp)

say() { printf '\n\033[1m$ %s\033[0m\n' "$*"; }

say cargo run --bin mvm-ci
"$mvm_ci" --listen 127.0.0.1:0 2>"$log" &
control_plane=$!
finish() {
    kill "$control_plane" 2>/dev/null || true
    wait "$control_plane" 2>/dev/null || true
    rm -f "$log"
}
trap finish EXIT
for _ in $(seq 600); do
    grep -q 'Control plane ready' "$log" && break
    kill -0 "$control_plane" 2>/dev/null || { cat "$log" >&2; exit 1; }
    sleep 0.05
done
cat "$log"
BLIXARD_ENDPOINT=http://$(sed -n 's/.*Control plane ready listen=\([^ ]*\).*/\1/p' "$log" | head -n 1)
export BLIXARD_ENDPOINT

command='echo "hello from $(hostname), kernel $(uname -r)"; grep -c ^processor /proc/cpuinfo | sed "s/$/ CPU(s)/"'
say "mvm-ci run --ephemeral -- sh -c '$command'"
guest=$("$mvm_ci" run --ephemeral -- sh -c "$command" | tee /dev/stderr)
host=$(uname -r)
if [ "${guest#*kernel "$host"}" != "$guest" ]; then
    echo "demo: the job saw the host's kernel: that was no VM" >&2
    exit 1
fi
echo "(the host's kernel is $host)"

vm_id=$("$mvm_ci" --output json vm list --all | sed -n 's/.*"id": *"\([^"]*\)".*/\1/p' | head -n 1)
say mvm-ci vm events "$vm_id"
"$mvm_ci" vm events "$vm_id"

query='SELECT id, state, node_id, created_at FROM vms;'
say "sqlite3 ./data/hiqlite/hiqlite.db \"$query\""
sqlite3 ./data/hiqlite/hiqlite.db "$query"
