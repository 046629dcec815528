# A stand-in for nixpkgs where there is no network: enough to *evaluate* our flakes (scripts/check-nix.sh), nothing to build
# them. What it proves: the files parse, every name in them is bound, derivations and services come out whole. What it can't: that
# nixpkgs has these packages and options, that types fit, that anything builds.
{
  outputs = { self }:
    let
      system = "x86_64-linux";
      make = name: outputs: attributes: derivation ({ inherit name system outputs; builder = "/bin/false"; } // attributes);
      package = name: make name [ "out" ] { } // { inherit name; };
      # As in nixpkgs: functions of attributes to derivations. What has no place in an environment is left out.
      buildRustPackage = { pname, version, src, cargoLock, cargoBuildFlags, doCheck, meta }:
        make "${pname}-${version}" [ "out" ]
          { inherit src cargoBuildFlags doCheck; lock = builtins.hashString "sha256" (builtins.readFile cargoLock.lockFile); }
        // { inherit meta; };
      names = [
        "bash" "buf" "busybox" "cargo" "cargo-deny" "clippy" "cloud-hypervisor" "coreutils" "cpio" "dpkg" "erofs-utils" "git"
        "gnugrep" "gnused" "gnutar" "grpcurl" "gzip" "iproute2" "jq" "lz4" "qemu_kvm" "rustc" "rustfmt" "sqlite" "typos" "zstd"
      ];
      pkgs = builtins.listToAttrs (map (name: { inherit name; value = package name; }) names) // {
        stdenv.hostPlatform = { inherit system; };
        rustPlatform = { inherit buildRustPackage; };
        pkgsStatic.rustPlatform = { inherit buildRustPackage; };
        runCommand = name: attributes: script: make name [ "out" ] (attributes // { inherit script; });
        writeShellApplication = { name, runtimeInputs, text }: make name [ "out" ] { inherit runtimeInputs text; };
        mkShell = { packages }: make "shell" [ "out" ] { inherit packages; };
      };
      lib = import ./modules.nix { inherit pkgs make; };
    in
    { inherit lib; legacyPackages.${system} = pkgs; };
}
