# An image for `mvm-ci image import`: the parts of a microVM of microvm.nix, with our manifest. `guest` is its NixOS.
{ pkgs, guest }:
let
  inherit (guest.config) microvm;
  manifest = {
    kernel = "vmlinux";
    initramfs = "initramfs";
    # NixOS mounts the disk as its store, and finds its root itself: what `root=fstab` says.
    cmdline = toString ([ "console=ttyS0" "reboot=t" "panic=-1" "root=fstab" ]
      ++ builtins.filter (parameter: builtins.match "root=.*" parameter == null) microvm.kernelParams);
    root_filesystems = [ "erofs" ];
    root_disk = { file = "store.erofs"; filesystem = "erofs"; };
    kernel_release = microvm.kernel.modDirVersion or microvm.kernel.version;
  };
in
pkgs.runCommand "blixard-guest-image" { nativeBuildInputs = [ pkgs.jq ]; manifest = builtins.toJSON manifest; } ''
  mkdir $out
  cp ${microvm.kernel.dev}/vmlinux $out/vmlinux
  cp ${microvm.initrdPath} $out/initramfs
  cp ${microvm.storeDisk} $out/store.erofs
  digest() { sha256sum "$out/$1" | cut -d ' ' -f 1; }
  jq --arg vmlinux "$(digest vmlinux)" --arg initramfs "$(digest initramfs)" --arg store "$(digest store.erofs)" \
    '.sha256 = { "vmlinux": $vmlinux, "initramfs": $initramfs, "store.erofs": $store }' <<< "$manifest" > $out/manifest.json
''
