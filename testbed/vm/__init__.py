"""A guest and the ways into it: QEMU, its accelerator, the agent inside, a terminal."""
