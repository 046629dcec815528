# `nix run .#run-service-vm` and `.#run-ephemeral-vm`: a VM of the NixOS image, under the control plane that runs
# (BLIXARD_ENDPOINT; default: this machine's), so that Hiqlite knows it. The image is imported first if it is another one than
# the directory of images has (BLIXARD_IMAGE_DIR; default: ./images beside or above).
{ pkgs, mvm-ci, guest-image, kind }:
pkgs.writeShellApplication {
  name = "run-${kind}-vm";
  runtimeInputs = [ mvm-ci pkgs.jq ];
  text = ''
    if [ -z "''${BLIXARD_IMAGE_DIR:-}" ]; then
      # The usage guide runs this in microvms/; the control plane runs above it.
      [ ! -d ../images ] || cd ..
      export BLIXARD_IMAGE_DIR=$PWD/images
    fi
    have=$(mvm-ci --output json image list | jq -r '.[] | select(.name == "nixos") | .source')
    if [ "$have" != ${guest-image} ]; then
      mvm-ci image import --replace nixos ${guest-image}
    fi
    # A node that runs learns of a new image within seconds.
    for _ in $(seq 30); do
      mvm-ci --output json node list | jq -e 'any(.[]; .images | index("nixos"))' > /dev/null && break
      sleep 1
    done
    exec mvm-ci vm create --${kind} --image nixos --wait "$@"
  '';
}
