#!/usr/bin/env bash
# A VM from its start to its end, seen in Hiqlite all the while: the "Programmatic Test" of the usage guide.
#
#   1. the control plane starts, in a directory of its own
#   2. a service VM starts, and is in the table vms: Starting, Ready
#   3. a job runs in it: Busy, then Idle; another one's output and exit code are right
#   4. it is stopped: Draining, Terminated
#   5. the table vm_events has all of that, in this order
#
# usage: ./test-vm-hiqlite.sh [auto|qemu|cloud-hypervisor|process]      (or BLIXARD_DRIVER=…; default: auto)
#   MVM_CI=PATH              take this program instead of building it
#   BLIXARD_IMAGE_DIR=PATH   the images (default: ./images)
# Exit code: 0 PASS, 1 FAIL. Needs sqlite3. Leaves nothing behind.
set -euo pipefail
root=$(realpath "$(dirname "$0")")

case "${1:-}" in
    -h | --help)
        sed -n '2,/^set /{s/^# \{0,1\}//;/^set /d;p}' "$0"
        exit
        ;;
esac
driver=${1:-${BLIXARD_DRIVER:-auto}}
images=$(realpath -m "${BLIXARD_IMAGE_DIR:-$root/images}")
unset BLIXARD_DRIVER BLIXARD_IMAGE_DIR
# A VM comes up in seconds, under emulation and load in a minute.
patience=180

work=$(mktemp -d "${TMPDIR:-/tmp}/test-vm-hiqlite.XXXXXX")
control_plane=
passed=

# Whatever happened: nothing of ours goes on.
finish() {
    local status=$?
    trap - EXIT
    if [ -n "$control_plane" ] && kill -0 "$control_plane" 2> /dev/null; then
        mvm_ci vm stop --all --force --wait > /dev/null 2>> "$work/log" || true
        kill "$control_plane" 2> /dev/null || true
        wait "$control_plane" 2> /dev/null || true
    fi
    if [ -n "$passed" ]; then
        rm -rf "$work"
        echo "PASS: a VM went through its states on \"$driver\", and Hiqlite knows all of them"
        exit 0
    fi
    echo "--- log of the control plane" >&2
    cat "$work/log" >&2 || true
    rm -rf "$work"
    echo "FAIL (driver \"$driver\")" >&2
    exit $((status == 0 ? 1 : status))
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

fail() {
    echo "test-vm-hiqlite: $*" >&2
    exit 1
}

step() { printf '== %s\n' "$*"; }

mvm_ci() { "$program" "$@"; }

# Asks the database file itself, beside the running control plane.
sql() { sqlite3 -batch -noheader -cmd '.timeout 5000' "file:$database?mode=ro" "$1"; }

# wait_for WHAT COMMAND…: until the command succeeds.
wait_for() {
    local what=$1 deadline=$((SECONDS + patience))
    shift
    until "$@"; do
        kill -0 "$control_plane" 2> /dev/null || fail "the control plane has ended while we waited for $what"
        [ $SECONDS -lt $deadline ] || fail "waited ${patience}s for $what; vms: $(sql 'SELECT id, state, reason FROM vms;' 2>&1)"
        sleep 0.1
    done
}

vm_is() { [ "$(sql "SELECT state FROM vms WHERE id = '$vm';")" = "$1" ]; }

command -v sqlite3 > /dev/null || fail "sqlite3 is missing. Install it with:  sudo apt-get install -y sqlite3"
touch "$work/log"
if [ -z "${MVM_CI:-}" ]; then
    (cd "$root" && cargo build --quiet -p mvm-ci)
    MVM_CI=${CARGO_TARGET_DIR:-$root/target}/debug/mvm-ci
fi
program=$(realpath "$MVM_CI")
database=$work/data/hiqlite/hiqlite.db

step "start the control plane (driver: $driver)"
# Where it starts is where its data goes, and there is no configuration there.
(cd "$work" && exec "$program" --listen 127.0.0.1:0 --driver "$driver" --image-dir "$images" --default-memory-mb 256) 2> "$work/log" &
control_plane=$!
wait_for 'the control plane' grep -q 'Control plane ready' "$work/log"
grep -o 'VM driver chosen.*' "$work/log" || true
BLIXARD_ENDPOINT=http://$(sed -n 's/.*Control plane ready listen=\([^ ]*\).*/\1/p' "$work/log" | head -n 1)
export BLIXARD_ENDPOINT

step 'start a VM, and see it in Hiqlite'
vm=$(mvm_ci vm create --service)
[ "$(sql "SELECT COUNT(*) FROM vms WHERE id = '$vm';")" = 1 ] || fail "the table vms has no $vm"
wait_for 'the VM to be Ready' vm_is Ready
sql "SELECT id, state, node_id, created_at FROM vms WHERE id = '$vm';"

step 'run a job in it: Busy'
job=$(mvm_ci run --vm "$vm" --detach -- sleep 600)
wait_for 'the VM to be Busy' vm_is Busy
[ "$(sql "SELECT job_id FROM vms WHERE id = '$vm';")" = "$job" ] || fail "the VM is Busy, but not with job $job"

step 'end the job: Idle'
mvm_ci job cancel "$job" > /dev/null
wait_for 'the VM to be Idle' vm_is Idle
[ "$(sql "SELECT state FROM jobs WHERE id = '$job';")" = Cancelled ] || fail "job $job is not Cancelled"

step "a job's output and exit code"
status=0
output=$(mvm_ci run --vm "$vm" -- sh -c 'echo "hello from Hiqlite test"; exit 7') || status=$?
[ "$output" = 'hello from Hiqlite test' ] || fail "the job's output was: $output"
[ "$status" = 7 ] || fail "the job's exit code was $status instead of 7"
[ "$(sql "SELECT COUNT(*) FROM jobs WHERE vm_id = '$vm' AND exit_code = 7;")" = 1 ] || fail 'Hiqlite does not have the exit code'

step 'stop the VM: Terminated'
mvm_ci vm stop "$vm" --wait > /dev/null
vm_is Terminated || fail "the VM is $(sql "SELECT state FROM vms WHERE id = '$vm';") after it was stopped"
[ "$(sql "SELECT COUNT(*) FROM vms WHERE state NOT IN ('Terminated', 'Failed');")" = 0 ] || fail 'a VM is left'

step 'find its events'
sql "SELECT timestamp, from_state, to_state, reason FROM vm_events WHERE vm_id = '$vm' ORDER BY revision;"
states=$(sql "SELECT to_state FROM vm_events WHERE vm_id = '$vm' ORDER BY revision;" | tr '\n' ' ')
[ "$states" = 'Starting Ready Busy Idle Busy Idle Draining Terminated ' ] || fail "its events say: $states"
passed=1
