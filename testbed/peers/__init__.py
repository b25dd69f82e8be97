"""Who the guest talks to: TLS peers in user space, their keys and the streams they send."""
