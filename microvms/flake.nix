{
  description = "Blixard's guests: NixOS microVMs for Cloud Hypervisor, and images made of them";

  inputs = {
    nixpkgs.url = "github:NixOS/nixpkgs/nixos-unstable";
    microvm = {
      url = "github:microvm-nix/microvm.nix";
      inputs.nixpkgs.follows = "nixpkgs";
    };
  };

  # The sources are those around this directory, so no input: in a git checkout a flake sees all of it.
  outputs = { self, nixpkgs, microvm }:
    let
      system = "x86_64-linux";
      pkgs = nixpkgs.legacyPackages.${system};
      programs = import ../nix/packages.nix { inherit pkgs; src = ../.; };
      guest = nixpkgs.lib.nixosSystem {
        inherit system;
        modules = [ microvm.nixosModules.microvm (import ../nix/guest.nix programs.guest-agent) ];
      };
      guest-image = import ../nix/guest-image.nix { inherit pkgs guest; };
      run = kind: import ../nix/run-vm.nix { inherit pkgs guest-image kind; inherit (programs) mvm-ci; };
      app = program: { type = "app"; program = "${program}/bin/${program.name}"; };
    in
    {
      nixosConfigurations.guest = guest;
      packages.${system} = {
        inherit guest-image;
        run-service-vm = run "service";
        run-ephemeral-vm = run "ephemeral";
        # The same guest without Blixard: Cloud Hypervisor in the foreground.
        runner = guest.config.microvm.declaredRunner;
        default = guest-image;
      };
      apps.${system} = {
        run-service-vm = app (run "service");
        run-ephemeral-vm = app (run "ephemeral");
      };
    };
}
