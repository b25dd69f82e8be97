"""The network on the other side of the NIC: its namespace, captures of it, and a decoder that trusts nobody."""
