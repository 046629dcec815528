# Our programs, from the sources in `src`. `pkgs` builds them; `pkgsStatic` the guest agent, which is /init of an initramfs.
{ pkgs, src }:
let
  cargo = builtins.fromTOML (builtins.readFile (src + "/Cargo.toml"));
  program = { rustPlatform, package, bin, description }: rustPlatform.buildRustPackage {
    pname = bin;
    version = cargo.workspace.package.version;
    inherit src;
    cargoLock.lockFile = src + "/Cargo.lock";
    cargoBuildFlags = [ "--package" package "--bin" bin ];
    # The tests want a network namespace and a built guest image; `make test` runs them.
    doCheck = false;
    meta = {
      inherit description;
      mainProgram = bin;
      platforms = [ "x86_64-linux" ];
    };
  };
  native = package: bin: description: program { inherit (pkgs) rustPlatform; inherit package bin description; };
in
{
  mvm-ci = native "mvm-ci" "mvm-ci" "The all-in-one control plane and the command line";
  registry = native "blixard-registry" "registry" "Keeps what there is, replicated";
  scheduler = native "blixard-scheduler" "scheduler" "Decides which VM runs which job";
  vmhost = native "blixard-vmhost" "vmhost" "Owns the microVMs of one node";
  guest-agent = program {
    inherit (pkgs.pkgsStatic) rustPlatform;
    package = "blixard-guest-agent";
    bin = "blixard-guest-agent";
    description = "Runs jobs in a guest";
  };
}
