#!/usr/bin/env bash
# Evaluates our flakes without a network: nixpkgs and microvm.nix are replaced by small stand-ins (tests/nix, which say what that
# proves and what not). Where there is a network, `nix flake check` in the root and in microvms/ does the real thing.
#
# usage: scripts/check-nix.sh
#   BLIXARD_REQUIRE_NIX=1   no Nix is a failure, not a skip
set -euo pipefail
cd "$(dirname "$0")/.."

if ! command -v nix > /dev/null; then
    echo "SKIPPED: no check of the flakes without nix (apt-get install nix-bin)" >&2
    [ "${BLIXARD_REQUIRE_NIX:-0}" != 1 ] || { echo "check-nix: BLIXARD_REQUIRE_NIX=1, and there is no nix" >&2; exit 1; }
    exit 0
fi

work=$(mktemp -d "${TMPDIR:-/tmp}/check-nix.XXXXXX")
# What is in a Nix store is read-only, directories too.
trap 'chmod -R u+w "$work"; rm -rf "$work"' EXIT
# What a git checkout would have: the sources, and not target/.
mkdir "$work/source"
command git ls-files -z --cached --others --exclude-standard | while IFS= read -rd '' file; do
    [ ! -e "$file" ] || printf '%s\0' "$file"
done | tar --create --null --files-from=- | tar --extract --directory "$work/source"
# A flake below the root sees what is above it in a git repository only.
git() { command git -C "$work/source" -c user.name=check -c user.email=check@localhost -c commit.gpgsign=false "$@"; }

# From here on nothing of the caller's counts, such as the variables of a git hook.
unset GIT_DIR GIT_WORK_TREE GIT_INDEX_FILE
export HOME=$work/home XDG_CACHE_HOME=$work/home NIX_CONF_DIR=$work
git init --quiet
git add --all
git commit --quiet --no-verify --message check
cat > "$work/nix.conf" << 'CONF'
experimental-features = nix-command flakes
build-users-group =
substituters =
flake-registry =
CONF
nix() {
    command nix "$@" --store "local?root=$work/root" --offline --no-write-lock-file --no-update-lock-file \
        --override-input nixpkgs "path:$work/source/tests/nix/nixpkgs" \
        --override-input microvm "path:$work/source/tests/nix/microvm" \
        --override-input microvm/nixpkgs "path:$work/source/tests/nix/nixpkgs"
}

find "$work/source" -name '*.nix' -print0 | xargs -0 -n 1 nix-instantiate --parse > /dev/null

# check FLAKE OUTPUT NAME…: these are there and can be evaluated to the last detail.
check() {
    local flake=$1 output=$2 evaluated name
    shift 2
    evaluated=$(nix eval --json "git+file://$work/source$flake#$output" --apply 'builtins.mapAttrs (_: it: it.drvPath or it.program)' \
        2> "$work/errors") || { cat "$work/errors" >&2; echo "check-nix: $flake#$output can't be evaluated" >&2; exit 1; }
    for name in "$@"; do
        [[ $evaluated == *"\"$name\":\"/nix/store/"* ]] || {
            echo "check-nix: $flake#$output has no $name: $evaluated" >&2
            exit 1
        }
    done
}

system=x86_64-linux
check '' packages.$system default mvm-ci registry scheduler vmhost guest-agent guest-image
check '' checks.$system mvm-ci machine parts
check '' apps.$system default
check '' devShells.$system default
check '?dir=microvms' packages.$system default guest-image run-service-vm run-ephemeral-vm runner
check '?dir=microvms' apps.$system run-service-vm run-ephemeral-vm
nix eval "git+file://$work/source?dir=microvms#nixosConfigurations.guest.config.system.build.toplevel.drvPath" > /dev/null 2> "$work/errors" || {
    cat "$work/errors" >&2
    exit 1
}
echo "check-nix: the flakes evaluate (with stand-ins for nixpkgs and microvm.nix)"
