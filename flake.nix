{
  description = "Blixard VM Management: runs jobs in microVMs";

  inputs = {
    nixpkgs.url = "github:NixOS/nixpkgs/nixos-unstable";
    microvm = {
      url = "github:microvm-nix/microvm.nix";
      inputs.nixpkgs.follows = "nixpkgs";
    };
  };

  outputs = { self, nixpkgs, microvm }:
    let
      system = "x86_64-linux";
      pkgs = nixpkgs.legacyPackages.${system};
      programs = import ./nix/packages.nix { inherit pkgs; src = self; };
      guests = (import ./microvms/flake.nix).outputs { self = guests; inherit nixpkgs microvm; };
      module = import ./nix/module.nix self.packages;
      machine = blixard: (nixpkgs.lib.nixosSystem {
        inherit system;
        modules = [
          module
          {
            services = { inherit blixard; };
            networking.hostName = "check";
            boot.isContainer = true;
            system.stateVersion = "26.05";
          }
        ];
      }).config.system.build.toplevel;
    in
    {
      packages.${system} = programs // {
        default = programs.mvm-ci;
        inherit (guests.packages.${system}) guest-image;
      };

      apps.${system}.default = { type = "app"; program = "${programs.mvm-ci}/bin/mvm-ci"; };

      nixosModules = { blixard = module; default = module; };

      devShells.${system}.default = pkgs.mkShell {
        # What `make test` and `make guest-image` use; cargo brings the rest (scripts/setup.sh).
        packages = [
          pkgs.cargo
          pkgs.rustc
          pkgs.rustfmt
          pkgs.clippy
          pkgs.buf
          pkgs.busybox
          pkgs.cargo-deny
          pkgs.cloud-hypervisor
          pkgs.cpio
          pkgs.dpkg
          pkgs.erofs-utils
          pkgs.grpcurl
          pkgs.iproute2
          pkgs.lz4
          pkgs.qemu_kvm
          pkgs.sqlite
          pkgs.typos
          pkgs.zstd
        ];
      };

      # Everything builds, and machines with the module on them evaluate: all in one, and each part as a service.
      checks.${system} = programs // {
        machine = machine { enable = true; };
        parts = machine { registry.enable = true; scheduler.enable = true; vmhost.enable = true; };
      };
    };
}
