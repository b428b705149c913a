"""NBD, the network block device protocol: how qcow2, vmdk, rbd and all that qemu-nbd or nbdkit serve is reached."""
