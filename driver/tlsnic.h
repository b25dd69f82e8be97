/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * tlsnic: driver for a virtio network device with inline TLS.
 * docs/driver.md tells how the parts work together and which lock guards what.
 */
#ifndef TLSNIC_H
#define TLSNIC_H

#include <linux/average.h>
#include <linux/completion.h>
#include <linux/etherdevice.h>
#include <linux/ethtool.h>
#include <linux/idr.h>
#include <linux/mutex.h>
#include <linux/netdevice.h>
#include <linux/refcount.h>
#include <linux/u64_stats_sync.h>
#include <linux/virtio.h>
#include <linux/virtio_net.h>
#include <linux/workqueue.h>

#include "tlsnic_abi.h"
#include "tlsnic_compat.h"

#define TLSNIC_DRIVER_VERSION	"0.1.0"

/*
 * Free descriptors below which a tx queue stops: one packet of any shape, which
 * is one for headers (and record prefix, if any), one for the linear part, and
 * the fragments; and one for the CTX_ADD before it.
 */
#define TLSNIC_TX_ROOM		(MAX_SKB_FRAGS + 3)
/*
 * Rx buffers are as large as the frames want them: 64 KiB in the smallest need
 * 17, what an skb can hold everywhere; the largest is all of a page fragment.
 */
#define TLSNIC_RX_BUF_MIN	4096U
#define TLSNIC_RX_BUF_MAX	32768U
/* Pages to be used again, per queue: as many as a ring has buffers, and some */
#define TLSNIC_PAGES_KEPT	1280U
#define TLSNIC_PAGES_QUEUED	256U
/* A frame of less than this part of its buffer is copied */
#define TLSNIC_RX_WASTE		16
/* Bytes of a frame in which its headers are looked for */
#define TLSNIC_RX_HEAD		256U

#define TLSNIC_CMD_TIMEOUT	(2 * HZ)
#define TLSNIC_CMD_LOOK		(200 * NSEC_PER_USEC)
/* Within which the device hears of what nobody waits for */
#define TLSNIC_CMD_LATE		msecs_to_jiffies(25)
#define TLSNIC_HELLO_TIMEOUT	(1 * HZ)
#define TLSNIC_HELLO_ATTEMPTS	3

/* What a device may make us allocate */
#define TLSNIC_MAX_CONTEXTS	0x100000U
#define TLSNIC_MAX_DEV_STATS	1024
#define TLSNIC_MAX_PAIRS	256

#define TLSNIC_RX_F_QUESTION	(TLSNIC_RX_F_RESYNC_REQ | \
				 TLSNIC_RX_F_RESYNC_START | \
				 TLSNIC_RX_F_RESYNC_END | \
				 TLSNIC_RX_F_RESYNC_CANCEL)

/* Indices into the counters, of `ethtool -S` too */
enum tlsnic_counter {
#define TLSNIC_COUNTER(name)	TLSNIC_COUNTER_ ## name
#include "tlsnic_counters.h"
#undef TLSNIC_COUNTER
	TLSNIC_COUNTERS
};

struct tlsnic_queue_stats {
	struct u64_stats_sync syncp;
	u64_stats_t packets;
	u64_stats_t bytes;
};

/* Guarded by the netdev tx queue's lock, but for what READ_ONCE may see */
struct tlsnic_txq {
	struct tlsnic_priv *priv;
	struct virtqueue *vq;
	struct napi_struct napi;
	struct list_head waiting;	/* commands the ring had no room for */
	struct delayed_work late;	/* kicks for what was posted without */
	unsigned long posted;		/* chains ever posted */
	unsigned long completed;	/* of those, returned */
	struct tlsnic_queue_stats stats;
	struct scatterlist sg[TLSNIC_TX_ROOM];
	unsigned int index;
	char name[16];
} ____cacheline_aligned_in_smp;

/* Bytes of the frames of late */
DECLARE_EWMA(tlsnic_frame, 0, 64)

struct tlsnic_pages {
	struct page_frag frag;		/* what buffers are cut from */
	struct page *kept[TLSNIC_PAGES_KEPT];	/* a ring of those cut up */
	unsigned int oldest;		/* of them */
};

/* Belongs to its NAPI */
struct tlsnic_rxq {
	struct tlsnic_priv *priv;
	struct virtqueue *vq;
	struct napi_struct napi;
	struct tlsnic_pages pages;
	struct ewma_tlsnic_frame frames;
	struct tlsnic_queue_stats stats;
	unsigned int index;
	char name[16];
} ____cacheline_aligned_in_smp;

/*
 * One chain on a tx queue that is not a packet. The ring holds a reference
 * until the chain comes back, a sleeper another: whoever lets go last frees,
 * so a device that answers late, or never, writes into memory that is ours.
 */
struct tlsnic_cmd {
	struct list_head list;
	refcount_t ref;
	struct completion done;
	/* with softirqs disabled, under the tx lock; may be NULL */
	void (*complete)(struct tlsnic_priv *priv, const struct tlsnic_cmd *cmd);
	int status;			/* 0 or -errno, valid after done */
	u32 reply_len;			/* bytes of reply data, likewise */
	u32 slot;			/* to be free after a CTX_DEL */
	u32 request_size;
	u32 reply_size;			/* with struct tlsnic_reply; 0: none */
	struct tlsnic_reply *reply;
	u8 request[];			/* virtio_net_hdr_v1, extension, body */
};

/*
 * One direction of one connection. Reached through the kernel's driver_state
 * and, from the device's side, through the slot table under RCU.
 */
struct tlsnic_ctx {
	struct tlsnic_priv *priv;
	struct rcu_head rcu;
	struct tlsnic_cmd *del;		/* made ahead, so that del cannot fail */
	u32 slot;
	enum tlsnic_dir dir;
	bool readded;			/* to the device of now; ctx_mutex */

	spinlock_t lock;		/* guards the fields up to @add */
	u32 generation;
	bool on_device;			/* the device holds this generation */
	bool refused;			/* by an event: software for good */
	struct tlsnic_txq *add_queue;	/* where its CTX_ADD went, if it did */
	int home;			/* its socket's tx queue, or -1 */
	/* tx only */
	struct tlsnic_cmd *prepared;	/* CTX_ADD, for its first packet */
	bool in_sync;			/* expected_seq is meaningful */
	bool resync;			/* the packet there has to say so */
	u32 expected_seq;
	u64 resync_rcd_sn;
	u32 sent_seq;			/* where what was posted so far ends */
	struct tlsnic_txq *last_queue;	/* where the last packet went, */
	unsigned long last_pos;		/* and q->posted just after it */
	unsigned long repeat_pos;	/* same, of the last retransmission */
	/* rx only */
	struct sock *sk;		/* until tls_dev_del; to ask the stack */
	bool attempt;			/* @async is open, and without a guess */
	struct delayed_work attempt_look;
	unsigned int attempt_wait;	/* jiffies between two looks */
	u16 attempt_records;		/* decrypted since it was opened */
	enum tls_offload_sync_type sync_type;	/* rx only, set once */
	struct tls_offload_resync_async async;	/* the stack's, for that type */

	struct tlsnic_ctx_add add;	/* as first sent, with the keys */
};

/* Before a TX_TLS packet, in skb->data, skb->cb or struct tlsnic_rebuild */
struct tlsnic_tx_header {
	struct virtio_net_hdr_v1 hdr;
	struct tlsnic_tx_tls tls;
} __packed;

/*
 * What puts a device to the place of one packet, and, once it is posted, the
 * packet. The ring reads @header and @prefix in one piece.
 */
struct tlsnic_rebuild {
	struct sk_buff *skb;
	u64 rcd_sn;			/* of the record @skb begins in, */
	u32 record_seq;			/* which starts there */
	u32 prefix_len;
	struct tlsnic_tx_header header;
	u8 prefix[];			/* from there up to the packet */
};

static_assert(offsetof(struct tlsnic_rebuild, prefix) ==
	      offsetofend(struct tlsnic_rebuild, header));

/* Where a packet's data lies relative to what the kernel has records of */
enum tlsnic_place {
	TLSNIC_PLACE_RECORDS,
	TLSNIC_PLACE_BEFORE,		/* the offload had not begun */
	TLSNIC_PLACE_STRADDLES,		/* its beginning */
	TLSNIC_PLACE_GONE,		/* acknowledged */
};

/* What a packet is to the device */
enum tlsnic_tx_state {
	TLSNIC_TX_PLAIN,	/* nothing in it is to be encrypted */
	TLSNIC_TX_RECORDS,	/* for the device */
	TLSNIC_TX_SETTLED,	/* records that the core should have encrypted */
	TLSNIC_TX_UNKNOWN,
};

struct tlsnic_slot {
	struct tlsnic_ctx __rcu *ctx;
	u32 generation;			/* the last one used */
	bool used;			/* or its CTX_DEL is under way */
	bool blocked;			/* by what the device holds */
};

struct tlsnic_ctrl {
	struct virtio_net_ctrl_hdr hdr;
	u8 data[ETH_ALEN];
	u8 status ____cacheline_aligned;
};

enum tlsnic_flag {
	TLSNIC_F_HELLO_WANTED,
	TLSNIC_F_NO_WORK,		/* not yet, or no more */
};

struct tlsnic_priv {
	struct virtio_device *vdev;
	struct net_device *dev;
	struct tlsnic_txq *txq;
	struct tlsnic_rxq *rxq;
	unsigned int max_pairs;
	unsigned int pairs;
	unsigned int tx_ring_size;
	unsigned int rx_ring_size;
	bool running;			/* the rings work; any tx queue's lock */
	atomic_t commands;		/* posted or waiting */

	struct virtqueue *cvq;
	struct tlsnic_ctrl *ctrl;
	struct mutex ctrl_mutex;	/* one request on the control queue */

	struct work_struct adopt;	/* asks who the device is, at last */
	bool adopted;			/* it is ours: the netdev exists */
	struct delayed_work work;	/* link, HELLO, re-creation */
	unsigned long flags;		/* enum tlsnic_flag */
	unsigned int hello_attempts;

	u64 hello_nonce;		/* of the HELLO under way, or 0 */
	struct tlsnic_hello_reply hello_reply;
	struct completion hello_done;
	/* from the last HELLO_REPLY */
	u64 boot_id;
	u32 caps;
	u32 ciphers;
	u32 max_contexts;
	bool posts_adds;		/* CTX_ADD needs no reply */
	u8 tx_personality;
	u8 rx_personality;
	char device_version[17];

	struct mutex ctx_mutex;		/* slot table's writers, re-creation */
	struct tlsnic_slot *slots;
	u32 slot_count;
	struct ida slot_ida;		/* those used or blocked */
	spinlock_t slot_lock;		/* whether they are, and what follows */
	unsigned int cmd_queues;	/* that contexts' commands may use */
	unsigned int deletes;		/* under way, each holds its slot */
	unsigned int slots_freed;	/* ever */
	unsigned int slots_overdue;	/* that, and 1, after a wait in vain */
	wait_queue_head_t slot_freed;

	unsigned int dev_stat_count;
	u8 (*dev_stat_names)[TLSNIC_STAT_NAME_LEN];
	u64 *dev_stats;			/* RTNL */

	u32 speed;
	u8 duplex;
	atomic64_t counters[TLSNIC_COUNTERS];
};

#define tlsnic_counter(priv, name) (&(priv)->counters[TLSNIC_COUNTER_ ## name])
#define tlsnic_count(priv, name) atomic64_read(tlsnic_counter(priv, name))
#define tlsnic_add(priv, name, n) atomic64_add(n, tlsnic_counter(priv, name))
#define tlsnic_inc(priv, name) tlsnic_add(priv, name, 1)

static inline void tlsnic_queue_count(struct tlsnic_queue_stats *stats,
				      u64 packets, u64 bytes)
{
	u64_stats_update_begin(&stats->syncp);
	u64_stats_add(&stats->packets, packets);
	u64_stats_add(&stats->bytes, bytes);
	u64_stats_update_end(&stats->syncp);
}

/* tlsnic_ctrl.c */
int tlsnic_ctrl(struct tlsnic_priv *priv, u8 class, u8 cmd, const void *data,
		size_t size);
int tlsnic_set_pairs(struct tlsnic_priv *priv, unsigned int pairs);
int tlsnic_change_pairs(struct tlsnic_priv *priv, unsigned int pairs);
void tlsnic_spread(struct tlsnic_priv *priv);
void tlsnic_unspread(struct tlsnic_priv *priv);

/* tlsnic_netdev.c */
struct tlsnic_priv *tlsnic_alloc(struct virtio_device *vdev,
				 unsigned int pairs);
void tlsnic_free(struct tlsnic_priv *priv);
void tlsnic_queue_stats_read(const struct tlsnic_queue_stats *stats,
			     u64 *packets, u64 *bytes);

/* tlsnic_tx.c */
int tlsnic_tx_post(struct tlsnic_txq *q, struct sk_buff *skb,
		   const struct tlsnic_tx_tls *tls,
		   struct tlsnic_rebuild *rebuild);
void tlsnic_tx_drop(struct tlsnic_txq *q, struct sk_buff *skb);
void tlsnic_tx_plain(struct tlsnic_txq *q, struct sk_buff *skb);
netdev_tx_t tlsnic_start_xmit(struct sk_buff *skb, struct net_device *dev);
int tlsnic_tx_poll(struct napi_struct *napi, int budget);
void tlsnic_tx_look(struct tlsnic_txq *q, bool more);
void tlsnic_tx_done(struct virtqueue *vq);
void tlsnic_tx_free(struct tlsnic_txq *q);

/* tlsnic_tx_tls.c */
enum tlsnic_tx_state tlsnic_tx_judge(const struct tlsnic_priv *priv,
				     const struct sk_buff *skb);
void tlsnic_tx_tls(struct tlsnic_txq *q, struct sk_buff *skb, u32 payload);
void tlsnic_tx_settled(struct tlsnic_txq *q, struct sk_buff *skb);

/* tlsnic_records.c */
enum tlsnic_place tlsnic_records_place(struct sock *sk, u32 seq, u32 payload,
				       struct tlsnic_rebuild **rebuild);
bool tlsnic_records_refill(struct sk_buff *skb, u32 seq);
int tlsnic_records_in_clear(const struct sk_buff *skb);

/* tlsnic_pages.c */
bool tlsnic_pages_refill(struct tlsnic_rxq *q, gfp_t gfp);
void tlsnic_pages_free(struct tlsnic_pages *pages);

/* tlsnic_rx.c */
int tlsnic_rx_poll(struct napi_struct *napi, int budget);
void tlsnic_rx_done(struct virtqueue *vq);
bool tlsnic_rx_fill(struct tlsnic_rxq *q, gfp_t gfp);
void tlsnic_rx_free(struct tlsnic_rxq *q);

/* tlsnic_cmd.c */
struct tlsnic_cmd *tlsnic_cmd_alloc(size_t ext_size, size_t reply_size,
				    gfp_t gfp);
struct tlsnic_cmd *tlsnic_command(enum tlsnic_opcode opcode, const void *body,
				  size_t body_size, size_t reply_size,
				  gfp_t gfp);
void tlsnic_command_handle(struct tlsnic_cmd *cmd, u32 slot, u32 generation);
void *tlsnic_cmd_ext(struct tlsnic_cmd *cmd);
void tlsnic_cmd_put(struct tlsnic_cmd *cmd);
void tlsnic_cmd_post(struct tlsnic_txq *q, struct tlsnic_cmd *cmd);
void tlsnic_cmd_post_late(struct tlsnic_txq *q, struct tlsnic_cmd *cmd);
int tlsnic_cmd_post_locked(struct tlsnic_txq *q, struct tlsnic_cmd *cmd);
int tlsnic_cmd_await(struct tlsnic_txq *q, struct tlsnic_cmd *cmd);
int tlsnic_cmd_exec(struct tlsnic_txq *q, struct tlsnic_cmd *cmd);
bool tlsnic_cmd_flush(struct tlsnic_txq *q);
void tlsnic_cmd_kick(struct tlsnic_txq *q);
void tlsnic_cmd_late(struct work_struct *work);
struct tlsnic_cmd *tlsnic_token_cmd(void *token);
void tlsnic_cmd_returned(struct tlsnic_priv *priv, struct tlsnic_cmd *cmd,
			 int err, u32 used);

/* tlsnic_hello.c */
int tlsnic_hello(struct tlsnic_priv *priv, u32 flags);
bool tlsnic_link_up(struct tlsnic_priv *priv);
void tlsnic_hello_received(struct tlsnic_priv *priv,
			   const struct tlsnic_hello_reply *reply);
void tlsnic_work(struct work_struct *work);
void tlsnic_kick_work(struct tlsnic_priv *priv, bool hello);
int tlsnic_stat_names(struct tlsnic_priv *priv);
void tlsnic_stat_values(struct tlsnic_priv *priv);

/* tlsnic_slots.c */
int tlsnic_slots_init(struct tlsnic_priv *priv);
void tlsnic_slots_destroy(struct tlsnic_priv *priv);
int tlsnic_slot_take(struct tlsnic_priv *priv);
void tlsnic_slot_free(struct tlsnic_priv *priv, u32 slot);
void tlsnic_slot_block(struct tlsnic_priv *priv, u32 slot);
void tlsnic_slots_unblock(struct tlsnic_priv *priv);
void tlsnic_slot_deleting(struct tlsnic_priv *priv);
void tlsnic_slot_deleted(struct tlsnic_priv *priv, const struct tlsnic_cmd *cmd);
unsigned int tlsnic_slots_freed(struct tlsnic_priv *priv);
bool tlsnic_slots_await(struct tlsnic_priv *priv, unsigned int freed,
			unsigned long deadline);

/* tlsnic_ctx.c */
struct tlsnic_txq *tlsnic_ctx_queue(struct tlsnic_ctx *ctx);
void tlsnic_ctx_use_queues(struct tlsnic_priv *priv, unsigned int queues);
int tlsnic_ctx_install(struct tlsnic_priv *priv, struct tlsnic_ctx *ctx);
void tlsnic_ctx_remove(struct tlsnic_ctx *ctx);
void tlsnic_ctx_free(struct tlsnic_ctx *ctx);
struct tlsnic_ctx *tlsnic_ctx_lookup(struct tlsnic_priv *priv, u32 slot,
				     u32 generation, enum tlsnic_dir dir);
void tlsnic_ctx_all_lost(struct tlsnic_priv *priv);
void tlsnic_ctx_recreate(struct tlsnic_priv *priv);
void tlsnic_ctx_event(struct tlsnic_priv *priv, const struct tlsnic_event *ev);

/* tlsnic_ktls.c */
void tlsnic_ktls_init(struct tlsnic_priv *priv);
struct tlsnic_ctx *tlsnic_tx_ctx(struct tlsnic_priv *priv, struct sock *sk);

/* tlsnic_resync.c */
void tlsnic_resync_init(struct tlsnic_ctx *ctx, struct sock *sk);
void tlsnic_resync_stop(struct tlsnic_ctx *ctx);
void tlsnic_resync_cancel(struct tlsnic_ctx *ctx);
void tlsnic_resync_question(struct tlsnic_ctx *ctx,
			    const struct tlsnic_rx_tls *tls);
int tlsnic_resync_answer(struct tlsnic_ctx *ctx, struct sock *sk, u32 seq,
			 u64 rcd_sn);

/* tlsnic_ethtool.c */
extern const struct ethtool_ops tlsnic_ethtool_ops;

#endif /* TLSNIC_H */
