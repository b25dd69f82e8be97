/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The interface between guest driver and device; twin of nicdev/abi.py (a
 * test compares every size, offset and constant). Prose: docs/device.md.
 */
#ifndef TLSNIC_ABI_H
#define TLSNIC_ABI_H

#include <linux/types.h>

#define TLSNIC_ABI_VERSION		2
#define TLSNIC_HDR_F_EXT		0x80	/* in virtio_net_hdr.flags */
#define TLSNIC_HELLO_ETHERTYPE		0x88B5
#define TLSNIC_HELLO_MAGIC		"TLSNICEX"
#define TLSNIC_MAX_RECORD_PREFIX	(5 + 8 + 16384 + 256 + 16)
#define TLSNIC_STAT_NAME_LEN		32

enum tlsnic_ext_type {
	TLSNIC_EXT_HELLO		= 0x01,
	TLSNIC_EXT_TX_TLS		= 0x02,
	TLSNIC_EXT_COMMAND		= 0x03,
	TLSNIC_EXT_HELLO_REPLY		= 0x81,
	TLSNIC_EXT_RX_TLS		= 0x82,
	TLSNIC_EXT_EVENT		= 0x83,
};

enum tlsnic_opcode {
	TLSNIC_OP_CTX_ADD		= 1,
	TLSNIC_OP_CTX_DEL		= 2,
	TLSNIC_OP_RX_RESYNC		= 3,
	TLSNIC_OP_GET_STATS		= 4,
	TLSNIC_OP_GET_STAT_NAMES	= 5,
};

enum tlsnic_status {
	TLSNIC_STATUS_OK		= 0,
	TLSNIC_STATUS_TABLE_FULL	= 1,
	TLSNIC_STATUS_BAD_REQUEST	= 2,
	TLSNIC_STATUS_UNSUPPORTED	= 3,
	TLSNIC_STATUS_EXISTS		= 4,
	TLSNIC_STATUS_STALE		= 5,
	TLSNIC_STATUS_REFUSED		= 6,
};

enum tlsnic_event_code {
	TLSNIC_EVENT_TX_DROPPED		= 1,
	TLSNIC_EVENT_UNKNOWN_CONTEXT	= 2,
	TLSNIC_EVENT_CONFIG_CHANGED	= 3,
	TLSNIC_EVENT_ADD_REFUSED	= 4,
};

enum tlsnic_dir {
	TLSNIC_DIR_RX			= 0,
	TLSNIC_DIR_TX			= 1,
};

/* hello_reply.ciphers */
#define TLSNIC_CIPHER_TLS_1_2_AES_GCM_128	0x01
#define TLSNIC_CIPHER_TLS_1_2_AES_GCM_256	0x02
#define TLSNIC_CIPHER_TLS_1_2_CHACHA20_POLY1305	0x04
#define TLSNIC_CIPHER_TLS_1_3_AES_GCM_128	0x08
#define TLSNIC_CIPHER_TLS_1_3_AES_GCM_256	0x10
#define TLSNIC_CIPHER_TLS_1_3_CHACHA20_POLY1305	0x20

/* hello_reply.caps */
#define TLSNIC_CAP_TX			0x01
#define TLSNIC_CAP_RX			0x02
#define TLSNIC_CAP_POSTED_ADD		0x04	/* CTX_ADD without a reply */

enum tlsnic_tx_personality {
	TLSNIC_TX_REBUILD		= 1,
	TLSNIC_TX_NEXT_RECORD		= 2,
};

enum tlsnic_rx_personality {
	TLSNIC_RX_DRIVER_REQ		= 1,
	TLSNIC_RX_DRIVER_REQ_ASYNC	= 2,
	TLSNIC_RX_CORE_NEXT_HINT	= 3,
	TLSNIC_RX_IDEAL			= 4,
};

#define TLSNIC_HELLO_F_RESET		0x01	/* hello.flags */
#define TLSNIC_TX_F_RESYNC		0x01	/* tx_tls.flags */
#define TLSNIC_ADD_F_NO_SYNC		0x01	/* ctx_add.add_flags */

/* rx_tls.flags */
#define TLSNIC_RX_F_DECRYPTED		0x01
#define TLSNIC_RX_F_RESYNC_REQ		0x02
#define TLSNIC_RX_F_RESYNC_START	0x04
#define TLSNIC_RX_F_RESYNC_END		0x08
#define TLSNIC_RX_F_RESYNC_CANCEL	0x10
#define TLSNIC_RX_F_ERROR		0x20

struct tlsnic_hello {
	__u8	dst[6];
	__u8	src[6];
	__be16	ethertype_be;
	__le16	version;
	__u8	magic[8];
	__le64	nonce;
	__le32	flags;
	__u8	reserved[24];
} __packed;

struct tlsnic_hello_reply {
	__u8	type;
	__u8	flags;
	__le16	len;
	__le16	version;
	__le16	reserved0;
	__le64	nonce;
	__le64	boot_id;
	__le32	caps;
	__le32	ciphers;
	__le32	max_contexts;
	__le16	stat_count;
	__u8	tx_personality;
	__u8	rx_personality;
	__u8	device_version[16];	/* ASCII, NUL-padded */
	__u8	reserved1[8];
} __packed;

struct tlsnic_tx_tls {
	__u8	type;
	__u8	flags;
	__le16	len;
	__le32	slot;
	__le32	generation;
	__le32	prefix_len;
	__le32	resync_seq;
	__le32	reserved;
	__le64	resync_rcd_sn;
} __packed;

struct tlsnic_command {
	__u8	type;
	__u8	opcode;
	__le16	len;
	__le32	slot;
	__le32	generation;
	__le32	reserved;
} __packed;

/* Body of CTX_ADD; "local" is the guest */
struct tlsnic_ctx_add {
	__u8	dir;
	__u8	family;			/* 4 or 6 */
	__le16	tls_version;
	__le16	cipher;			/* TLS_CIPHER_* of uapi/linux/tls.h */
	__u8	add_flags;
	__u8	rx_personality;		/* rx: the one the driver goes by */
	__le32	start_seq;
	__u8	key_len;
	__u8	iv_len;
	__u8	salt_len;
	__u8	rec_seq_len;
	__u8	rec_seq[8];		/* as in struct tls_crypto_info */
	__u8	salt[4];
	__u8	iv[12];
	__u8	key[32];
	__le16	local_port;
	__le16	remote_port;
	__le32	reserved0;
	__u8	local_addr[16];		/* IPv4: first 4 bytes */
	__u8	remote_addr[16];
} __packed;

/* Body of RX_RESYNC: the record that starts at tcp_seq has number rcd_sn */
struct tlsnic_rx_resync {
	__le32	tcp_seq;
	__le32	reserved;
	__le64	rcd_sn;
} __packed;

struct tlsnic_reply {
	__le32	status;
	__le32	len;			/* of this header and what follows */
} __packed;

struct tlsnic_rx_tls {
	__u8	type;
	__u8	flags;
	__le16	len;
	__le32	slot;
	__le32	generation;
	__le32	resync_seq;
	__le32	resync_len;
	__le16	records;
	__le16	reserved0;
	__le32	payload;
	__le32	reserved1;
} __packed;

struct tlsnic_event {
	__u8	type;
	__u8	code;
	__le16	len;
	__le32	slot;
	__le32	generation;
	__le32	reason;
	__le64	value;
	__u8	reserved[8];
} __packed;

#endif /* TLSNIC_ABI_H */
