"""tlsnic: a TLS-offload NIC that exists only in software (see README.md for the order in which to read)."""

__version__ = "0.1.0"
