/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The counters of `ethtool -S`, in the order of their names there. The first
 * eighteen are those of the kernel's Documentation/networking/tls-offload.rst.
 * No guard: whoever includes this says what TLSNIC_COUNTER() makes of a name.
 */
TLSNIC_COUNTER(rx_tls_decrypted_packets),
TLSNIC_COUNTER(rx_tls_decrypted_bytes),		/* TLS payload */
TLSNIC_COUNTER(rx_tls_ctx),
TLSNIC_COUNTER(rx_tls_del),
TLSNIC_COUNTER(rx_tls_resync_req_pkt),
TLSNIC_COUNTER(rx_tls_resync_req_start),
TLSNIC_COUNTER(rx_tls_resync_req_end),
TLSNIC_COUNTER(rx_tls_resync_req_skip),
TLSNIC_COUNTER(rx_tls_resync_res_ok),
TLSNIC_COUNTER(rx_tls_resync_res_skip),
TLSNIC_COUNTER(rx_tls_err),
TLSNIC_COUNTER(tx_tls_encrypted_packets),	/* on the wire */
TLSNIC_COUNTER(tx_tls_encrypted_bytes),		/* TCP payload */
TLSNIC_COUNTER(tx_tls_ctx),
TLSNIC_COUNTER(tx_tls_ooo),
TLSNIC_COUNTER(tx_tls_skip_no_sync_data),
TLSNIC_COUNTER(tx_tls_drop_no_sync_data),
TLSNIC_COUNTER(tx_tls_drop_bypass_req),
TLSNIC_COUNTER(tx_tls_del),
TLSNIC_COUNTER(tx_tls_fallback),		/* skbs encrypted in software */
TLSNIC_COUNTER(tx_tls_resync_req),		/* asked of the stack */
TLSNIC_COUNTER(tx_tls_resync),			/* packets posted with a resync */
TLSNIC_COUNTER(tx_tls_resync_bytes),		/* of record prefixes with them */
TLSNIC_COUNTER(tx_tls_refilled),		/* linear: plaintext restored */
TLSNIC_COUNTER(tx_tls_in_clear),		/* not encrypted by who should have */
TLSNIC_COUNTER(tx_tls_device_drop),		/* events that tell of one */
TLSNIC_COUNTER(tls_add_unsupported),
TLSNIC_COUNTER(tls_add_failed),
TLSNIC_COUNTER(tls_add_posted),			/* no reply is waited for */
TLSNIC_COUNTER(tls_add_refused),		/* of those, by an event */
TLSNIC_COUNTER(tls_recreated),
TLSNIC_COUNTER(tls_recreate_failed),
TLSNIC_COUNTER(hello),
TLSNIC_COUNTER(hello_timeout),
TLSNIC_COUNTER(cmd_deferred),			/* waited for ring space */
TLSNIC_COUNTER(cmd_failed),			/* status other than OK */
TLSNIC_COUNTER(cmd_timeout),
TLSNIC_COUNTER(events),
TLSNIC_COUNTER(events_stale),			/* about no live context */
TLSNIC_COUNTER(tx_drop),
TLSNIC_COUNTER(tx_busy),
TLSNIC_COUNTER(tx_timeout),
TLSNIC_COUNTER(rx_drop_down),			/* interface is down */
TLSNIC_COUNTER(rx_drop_length),			/* impossible used length */
TLSNIC_COUNTER(rx_drop_buffers),		/* impossible buffer count */
TLSNIC_COUNTER(rx_drop_ext),			/* malformed, unknown extension */
TLSNIC_COUNTER(rx_drop_verdict),		/* decrypted, no such context */
TLSNIC_COUNTER(rx_drop_header),			/* impossible virtio_net_hdr */
TLSNIC_COUNTER(rx_drop_nomem),
TLSNIC_COUNTER(rx_refill_failed),
TLSNIC_COUNTER(rx_pages_reused),		/* instead of new, cleared ones */
