# The guest: NixOS as a microVM for Cloud Hypervisor (microvm.nix), with our agent as a service. Its Nix store is a read-only
# EROFS disk that all VMs share; everything else is in memory and goes with the VM.
agent:
{ lib, pkgs, ... }:
{
  microvm = {
    hypervisor = "cloud-hypervisor";
    # vmhost says how much a VM gets; these are for microvm.nix's own runner.
    vcpu = 2;
    mem = 512;
    storeOnDisk = true;
    storeDiskType = "erofs";
  };
  networking.hostName = "blixard";
  # vmhost's agent says who the guest is; nothing logs in.
  networking.useDHCP = false;
  services.getty.autologinUser = null;
  documentation.enable = false;
  system.stateVersion = "26.05";

  boot.initrd.availableKernelModules = [ "virtio_pci" "virtio_mmio" "virtio_blk" "erofs" ];
  boot.kernelModules = [ "vmw_vsock_virtio_transport" ];
  # The console shows a panic and what the agent says.
  boot.consoleLogLevel = 1;

  # What jobs find. Their PATH is the agent's.
  environment.systemPackages = [ pkgs.bash pkgs.coreutils pkgs.git pkgs.gnugrep pkgs.gnused pkgs.gnutar pkgs.gzip ];

  systemd.services.blixard-guest-agent = {
    description = "Runs Blixard's jobs";
    wantedBy = [ "multi-user.target" ];
    after = [ "systemd-modules-load.service" ];
    serviceConfig = {
      # The port that vmhost connects to.
      ExecStart = "${lib.getExe agent} --listen vsock:1024";
      Environment = "PATH=/run/current-system/sw/bin HOME=/root";
      StandardOutput = "journal+console";
      StandardError = "journal+console";
      # Jobs are below it, and may be anything.
      Delegate = true;
      LimitNOFILE = 524288;
    };
    # It ends when vmhost says so, and the VM with it.
    unitConfig = {
      SuccessAction = "poweroff-force";
      FailureAction = "poweroff-force";
    };
  };
}
