# NixOS: the control plane as one service (`mvm-ci`), or its parts as services of their own.
#
#   services.blixard = { enable = true; driver = "auto"; };                       # all in one
#   services.blixard = { registry.enable = true; scheduler.enable = true; };      # one machine of several
#   services.blixard.vmhost = { enable = true; registry = "http://10.0.0.1:50052"; };
packages:
{ config, lib, pkgs, ... }:
let
  cfg = config.services.blixard;
  ours = packages.${pkgs.stdenv.hostPlatform.system};
  inherit (lib) mkEnableOption mkIf mkMerge mkOption types;
  option = type: default: description: mkOption { inherit type default description; };
  # Settings that every program knows by the same names (docs/CONFIGURATION.md), as its environment.
  service = description: environment: serviceConfig: {
    inherit description;
    wantedBy = [ "multi-user.target" ];
    wants = [ "network-online.target" ];
    after = [ "network-online.target" ];
    # QEMU is for machines without hardware virtualization: name it and vhost-device-vsock in `settings`.
    path = [ pkgs.cloud-hypervisor ];
    environment = {
      BLIXARD_DATA_DIR = "/var/lib/blixard";
      VM_STATE_DIR = "/var/lib/blixard/vm-state";
      BLIXARD_IMAGE_DIR = toString cfg.imageDir;
      BLIXARD_SECRET_KEY_FILE = "/var/lib/blixard/secrets.key";
    } // environment // cfg.settings;
    serviceConfig = {
      User = "blixard";
      Group = "blixard";
      StateDirectory = "blixard";
      StateDirectoryMode = "0700";
      WorkingDirectory = "/var/lib/blixard";
      Restart = "on-failure";
      RestartSec = "1s";
      # VMs outlive their vmhost (docs/adr/0002): only the main process is ended, and the next start adopts the rest.
      KillMode = "process";
      NoNewPrivileges = true;
      ProtectHome = true;
      ProtectSystem = "strict";
      ReadWritePaths = [ cfg.imageDir ];
    } // serviceConfig;
  };
  # What it takes to give each VM a user and a cgroup of its own (docs/OPERATIONS.md, "Containment").
  rights = [ "CAP_SETUID" "CAP_SETGID" "CAP_CHOWN" "CAP_KILL" "CAP_DAC_OVERRIDE" "CAP_SYS_PTRACE" "CAP_SETPCAP" ];
  runsVms = {
    AmbientCapabilities = rights;
    CapabilityBoundingSet = rights;
    Delegate = "cpu memory pids io";
    # Where the kernel wants vmhost: beside the cgroups of VMs, not above them.
    DelegateSubgroup = "blixard-vmhost";
    TasksMax = "infinity";
  };
in
{
  options.services.blixard = {
    enable = mkEnableOption "Blixard's control plane, all of it in one process";
    package = option types.package ours.mvm-ci "What the all-in-one service runs, and what is on the PATH.";
    listen = option types.str "127.0.0.1:50051" "Where the all-in-one control plane, or the scheduler, answers.";
    driver = option (types.enum [ "auto" "cloud-hypervisor" "qemu" ]) "auto" "Which hypervisor runs the VMs.";
    imageDir = option types.path "/var/lib/blixard-images" "Where images are; `mvm-ci image` makes them. The users that VMs run as must be able to read them.";
    settings = option (types.attrsOf types.str) { } "Further settings, by the names of their environment variables (docs/CONFIGURATION.md).";
    registry.enable = mkEnableOption "the registry as a service of its own";
    registry.listen = option types.str "127.0.0.1:50052" "Where it answers.";
    scheduler.enable = mkEnableOption "the scheduler as a service of its own";
    scheduler.registry = option types.str "http://127.0.0.1:50052" "The registry's address; of several, with commas between them.";
    vmhost.enable = mkEnableOption "a node that runs VMs, as a service of its own";
    vmhost.listen = option types.str "127.0.0.1:50053" "Where it answers; other machines must reach it there.";
    vmhost.registry = option types.str "http://127.0.0.1:50052" "The registry's address; of several, with commas between them.";
    vmhost.nodeId = option types.str config.networking.hostName "This node's name.";
  };

  config = mkMerge [
    (mkIf (cfg.enable || cfg.registry.enable || cfg.scheduler.enable || cfg.vmhost.enable) {
      assertions = [
        {
          assertion = !(cfg.enable && (cfg.registry.enable || cfg.scheduler.enable || cfg.vmhost.enable));
          message = "services.blixard.enable is all of registry, scheduler and vmhost: enable it, or some of them";
        }
      ];
      users.groups.blixard = { };
      users.users.blixard = {
        isSystemUser = true;
        group = "blixard";
        # /dev/kvm.
        extraGroups = [ "kvm" ];
        home = "/var/lib/blixard";
      };
      environment.systemPackages = [ cfg.package ];
      systemd.tmpfiles.rules = [ "d ${toString cfg.imageDir} 0755 blixard blixard -" ];
    })
    (mkIf cfg.enable {
      systemd.services.blixard = service "Blixard VM Management"
        { BLIXARD_LISTEN = cfg.listen; BLIXARD_DRIVER = cfg.driver; }
        ({ ExecStart = lib.getExe cfg.package; } // runsVms);
    })
    (mkIf cfg.registry.enable {
      systemd.services.blixard-registry = service "Blixard registry"
        { BLIXARD_LISTEN = cfg.registry.listen; }
        { ExecStart = lib.getExe ours.registry; };
    })
    (mkIf cfg.scheduler.enable {
      systemd.services.blixard-scheduler = service "Blixard scheduler"
        { BLIXARD_LISTEN = cfg.listen; }
        { ExecStart = "${lib.getExe ours.scheduler} --registry ${cfg.scheduler.registry}"; };
    })
    (mkIf cfg.vmhost.enable {
      systemd.services.blixard-vmhost = service "Blixard vmhost"
        { BLIXARD_LISTEN = cfg.vmhost.listen; BLIXARD_DRIVER = cfg.driver; BLIXARD_NODE_ID = cfg.vmhost.nodeId; }
        ({ ExecStart = "${lib.getExe ours.vmhost} --registry ${cfg.vmhost.registry}"; } // runsVms);
    })
  ];
}
