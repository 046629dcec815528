# A stand-in for microvm.nix: the options of it that our guest and our image read, with nothing in them.
{
  inputs.nixpkgs.url = "path:../nixpkgs";
  outputs = { self, nixpkgs }: {
    nixosModules.microvm = { config, pkgs, ... }: {
      microvm = {
        kernel = derivation {
          name = "linux-6.1";
          system = "x86_64-linux";
          builder = "/bin/false";
          outputs = [ "out" "dev" ];
        } // { modDirVersion = "6.1.0"; };
        initrdPath = "${pkgs.bash}/initrd";
        storeDisk = pkgs.runCommand "store-disk.erofs" { } (builtins.toJSON config.systemd.services);
        kernelParams = [ "root=fstab" "init=/nix/store/none/init" ];
        declaredRunner = pkgs.runCommand "microvm-${config.networking.hostName}" { } config.microvm.hypervisor;
      };
    };
  };
}
