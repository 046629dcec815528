# The default guest image, ./images/default: kernel and initramfs from Debian's packages, busybox and our agent.
.PHONY: guest-image
guest-image: tools
	microvms/guest-image.sh images
