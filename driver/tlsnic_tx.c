// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Packets to the device.
 *
 * A packet of an offloaded socket goes out with a TX_TLS extension if its TCP
 * sequence number is the one the device expects; any other is encrypted by the
 * kernel (tls_encrypt_skb) and goes out as an ordinary packet. Nothing with
 * plaintext records is ever posted without the extension.
 *
 * The context is judged, the packet posted and expected_seq moved in one piece
 * under ctx->lock, so neither another queue nor a failed post can make driver
 * and device disagree. Queues are not ordered among one another: a context
 * moves to another only when its last packet has surely left the former one.
 *
 * skbs stay owned by their socket until the device returns them: the kernel
 * deletes a context once the socket has none in flight.
 *
 * A packet that comes by way of another device was encrypted there, by the
 * kernel, and still belongs to its socket. It must not be encrypted again: with
 * AES-GCM that is decrypting. See tlsnic_tx_judge().
 */
#include <linux/tcp.h>
#include <net/dst.h>
#include <net/ipv6.h>

#include "tlsnic.h"

struct tlsnic_tx_header {
	struct virtio_net_hdr_v1 hdr;
	struct tlsnic_tx_tls tls;
} __packed;

static_assert(sizeof(struct tlsnic_tx_header) <=
	      sizeof_field(struct sk_buff, cb));

/* Where a packet's data lies relative to the offloaded part of its stream */
enum tlsnic_tx_place {
	TLSNIC_PLACE_RECORDS,
	TLSNIC_PLACE_BEFORE,
	TLSNIC_PLACE_STRADDLES,
};

/*
 * Post @skb behind its headers, which lie before the frame if it has the room
 * and in skb->cb otherwise. On error the skb is still the caller's.
 */
static int tlsnic_tx_post(struct tlsnic_txq *q, struct sk_buff *skb,
			  const struct tlsnic_tx_tls *tls)
{
	size_t size = sizeof(struct virtio_net_hdr_v1) +
		      (tls ? sizeof(*tls) : 0);
	bool push = !skb_header_cloned(skb) && skb_headroom(skb) >= size &&
		    IS_ALIGNED((unsigned long)skb->data, 2);
	struct tlsnic_tx_header *h;
	int n, err;

	h = push ? (void *)(skb->data - size) : (void *)skb->cb;
	if (virtio_net_hdr_from_skb(skb, (struct virtio_net_hdr *)&h->hdr,
				    true, false, 0))
		return -EPROTO;
	h->hdr.num_buffers = 0;
	if (tls) {
		h->hdr.flags |= TLSNIC_HDR_F_EXT;
		h->tls = *tls;
	}
	sg_init_table(q->sg, skb_shinfo(skb)->nr_frags + (push ? 1 : 2));
	if (push) {
		__skb_push(skb, size);
		n = skb_to_sgvec(skb, q->sg, 0, skb->len);
		__skb_pull(skb, size);
	} else {
		sg_set_buf(q->sg, h, size);
		n = skb_to_sgvec(skb, q->sg + 1, 0, skb->len);
		n = n < 0 ? n : n + 1;
	}
	if (n < 0)
		return n;
	err = virtqueue_add_outbuf(q->vq, q->sg, n, skb, GFP_ATOMIC);
	if (!err)
		WRITE_ONCE(q->posted, q->posted + 1);
	return err;
}

static void tlsnic_tx_drop(struct tlsnic_txq *q, struct sk_buff *skb)
{
	tlsnic_inc(q->priv, tx_drop);
	dev_kfree_skb_any(skb);
}

static void tlsnic_tx_plain(struct tlsnic_txq *q, struct sk_buff *skb)
{
	if (unlikely(tlsnic_tx_post(q, skb, NULL)))
		tlsnic_tx_drop(q, skb);
}

/* May the device encrypt the packet at @seq, posted to @q now? Under lock. */
static bool tlsnic_tx_in_order(const struct tlsnic_ctx *ctx,
			       const struct tlsnic_txq *q, struct sock *sk,
			       u32 seq)
{
	const struct tlsnic_txq *last = ctx->last_queue;

	if (!ctx->on_device || !ctx->in_sync || seq != ctx->expected_seq)
		return false;
	if (tls_offload_tx_resync_pending(sk))
		return false;
	if (last == q || !last ||
	    (long)(READ_ONCE(last->completed) - ctx->last_pos) >= 0)
		return true;
	/* returned or not: what the peer has acknowledged, the device has sent */
	return !before(READ_ONCE(tcp_sk(sk)->snd_una), seq);
}

/* Post an in-order packet and move the context past it. Under lock. */
static int tlsnic_tx_offload(struct tlsnic_ctx *ctx, struct tlsnic_txq *q,
			     struct sk_buff *skb, u32 payload)
{
	struct tlsnic_priv *priv = q->priv;
	struct tlsnic_tx_tls tls = {
		.type = TLSNIC_EXT_TX_TLS,
		.len = cpu_to_le16(sizeof(tls)),
		.slot = cpu_to_le32(ctx->slot),
		.generation = cpu_to_le32(ctx->generation),
	};
	int err;

	if (ctx->resync) {
		tls.flags = TLSNIC_TX_F_RESYNC;
		tls.resync_seq = cpu_to_le32(ctx->expected_seq);
		tls.resync_rcd_sn = cpu_to_le64(ctx->resync_rcd_sn);
	}
	err = tlsnic_tx_post(q, skb, &tls);
	if (err)
		return err;

	if (ctx->resync)
		tlsnic_inc(priv, tx_tls_resync);
	ctx->resync = false;
	ctx->expected_seq += payload;
	ctx->last_queue = q;
	ctx->last_pos = q->posted;
	tlsnic_add(priv, tx_tls_encrypted_packets,
		   max_t(u16, skb_shinfo(skb)->gso_segs, 1));
	tlsnic_add(priv, tx_tls_encrypted_bytes, payload);
	return 0;
}

/*
 * A packet is out of order. A retransmission leaves the device where it is;
 * behind a gap (or where the device lost its place) the stack is asked to
 * agree on a record to go on with. Under lock.
 */
static void tlsnic_tx_note_disorder(struct tlsnic_ctx *ctx, struct sock *sk,
				    u32 seq)
{
	if (!ctx->on_device)
		return;
	tlsnic_inc(ctx->priv, tx_tls_ooo);
	if (ctx->in_sync && !after(seq, ctx->expected_seq))
		return;
	if (tls_offload_tx_resync_pending(sk))
		return;
	tlsnic_inc(ctx->priv, tx_tls_resync_req);
	tls_offload_tx_resync_request(sk, seq, ctx->expected_seq);
}

static enum tlsnic_tx_place tlsnic_tx_place(struct sock *sk, u32 seq,
					    u32 payload)
{
	struct tls_offload_context_tx *tx = tls_offload_ctx_tx(tls_get_ctx(sk));
	enum tlsnic_tx_place place = TLSNIC_PLACE_RECORDS;
	struct tls_record_info *record;
	unsigned long flags;
	u64 rcd_sn;

	spin_lock_irqsave(&tx->lock, flags);
	record = tls_get_record(tx, seq, &rcd_sn);
	if (record && tls_record_is_start_marker(record))
		place = after(seq + payload, record->end_seq) ?
			TLSNIC_PLACE_STRADDLES : TLSNIC_PLACE_BEFORE;
	spin_unlock_irqrestore(&tx->lock, flags);
	return place;
}

/*
 * The one place that decides what becomes of a packet the device cannot take
 * as it is: here, the software encrypts it, whatever the tx personality.
 */
static void tlsnic_tx_out_of_order(struct tlsnic_txq *q, struct sk_buff *skb,
				   u32 seq, u32 payload)
{
	enum tlsnic_tx_place place = tlsnic_tx_place(skb->sk, seq, payload);
	struct tlsnic_priv *priv = q->priv;

	skb = tls_encrypt_skb(skb);
	if (!skb) {
		if (place == TLSNIC_PLACE_STRADDLES)
			tlsnic_inc(priv, tx_tls_drop_bypass_req);
		else
			tlsnic_inc(priv, tx_tls_drop_no_sync_data);
		return;
	}
	if (place == TLSNIC_PLACE_BEFORE)
		tlsnic_inc(priv, tx_tls_skip_no_sync_data);
	else
		tlsnic_inc(priv, tx_tls_fallback);
	tlsnic_tx_plain(q, skb);
}

/* Ethernet, IP and TCP, with nothing between: else skb->transport_header lies */
static bool tlsnic_tx_is_tcp(const struct sk_buff *skb)
{
	int offset = skb_network_offset(skb);
	__be16 frag_off;
	u8 protocol;

	switch (skb->protocol) {
	case htons(ETH_P_IP):
		protocol = ip_hdr(skb)->protocol;
		offset += ip_hdrlen(skb);
		break;
	case htons(ETH_P_IPV6):
		protocol = ipv6_hdr(skb)->nexthdr;
		offset = ipv6_skip_exthdr(skb, offset + sizeof(struct ipv6hdr),
					  &protocol, &frag_off);
		break;
	default:
		return false;
	}
	return protocol == IPPROTO_TCP && offset == skb_transport_offset(skb);
}

enum tlsnic_tx_state {
	TLSNIC_TX_PLAIN,	/* nothing in it is to be encrypted (any more) */
	TLSNIC_TX_RECORDS,	/* plaintext records */
	TLSNIC_TX_UNKNOWN,
};

/*
 * What an offloaded socket's packet holds. The core (tls_validate_xmit_skb)
 * encrypts for any device but the socket's own, and a bond above it, into an
 * skb without fragments; plaintext comes in fragments. The route names the
 * device that was first to see the packet. What changed packets on the way
 * (tunnels, tags, xfrm) did not ask whether they were encrypted. The core never
 * clears skb->decrypted on tx: set, it only says that it held records.
 */
static enum tlsnic_tx_state tlsnic_tx_judge(const struct tlsnic_priv *priv,
					    const struct sk_buff *skb)
{
	struct net_device *own, *first;

	if (!tls_is_skb_tx_device_offloaded(skb))
		return TLSNIC_TX_PLAIN;
	own = rcu_dereference_bh(tls_get_ctx(skb->sk)->netdev);
	if (own && own != priv->dev)
		return TLSNIC_TX_PLAIN;
	if (!own || !skb_dst(skb) || !tlsnic_tx_is_tcp(skb))
		return skb->decrypted ? TLSNIC_TX_UNKNOWN : TLSNIC_TX_PLAIN;
	if (skb->len == skb_tcp_all_headers(skb))
		return TLSNIC_TX_PLAIN;
	first = skb_dst(skb)->dev;
	if (first != priv->dev && !netif_is_bond_master(first) &&
	    skb_headlen(skb) > skb_tcp_all_headers(skb))
		return TLSNIC_TX_PLAIN;
	return TLSNIC_TX_RECORDS;
}

/* A packet with @payload bytes of an offloaded socket's stream */
static void tlsnic_tx_tls(struct tlsnic_txq *q, struct sk_buff *skb,
			  u32 payload)
{
	struct tlsnic_ctx *ctx = tlsnic_tx_ctx(q->priv, skb->sk);
	u32 seq = ntohl(tcp_hdr(skb)->seq);
	int err;

	if (likely(ctx)) {
		spin_lock(&ctx->lock);
		if (likely(tlsnic_tx_in_order(ctx, q, skb->sk, seq))) {
			err = tlsnic_tx_offload(ctx, q, skb, payload);
			spin_unlock(&ctx->lock);
			if (unlikely(err))
				tlsnic_tx_drop(q, skb);
			return;
		}
		tlsnic_tx_note_disorder(ctx, skb->sk, seq);
		spin_unlock(&ctx->lock);
	}
	tlsnic_tx_out_of_order(q, skb, seq, payload);
}

netdev_tx_t tlsnic_start_xmit(struct sk_buff *skb, struct net_device *dev)
{
	struct tlsnic_priv *priv = netdev_priv(dev);
	struct tlsnic_txq *q = &priv->txq[skb_get_queue_mapping(skb)];
	struct netdev_queue *nq = netdev_get_tx_queue(dev, q->index);

	/* before anything else: afterwards the TLS state has moved */
	if (unlikely(q->vq->num_free < TLSNIC_TX_ROOM)) {
		tlsnic_inc(priv, tx_busy);
		netif_tx_stop_queue(nq);
		return NETDEV_TX_BUSY;
	}
	skb_tx_timestamp(skb);
	switch (tlsnic_tx_judge(priv, skb)) {
	case TLSNIC_TX_PLAIN:
		tlsnic_tx_plain(q, skb);
		break;
	case TLSNIC_TX_RECORDS:
		tlsnic_tx_tls(q, skb, skb->len - skb_tcp_all_headers(skb));
		break;
	case TLSNIC_TX_UNKNOWN:
		tlsnic_tx_drop(q, skb);
		break;
	}

	/* the NAPI wakes it under the same lock, so no wake-up is missed */
	if (q->vq->num_free < TLSNIC_TX_ROOM)
		netif_tx_stop_queue(nq);
	if (!netdev_xmit_more() || netif_xmit_stopped(nq))
		virtqueue_kick(q->vq);
	return NETDEV_TX_OK;
}

/* Take back what the device has done with; the tx queue is locked */
static void tlsnic_tx_reap(struct tlsnic_txq *q, int budget)
{
	u64 packets = 0, bytes = 0;
	struct tlsnic_cmd *cmd;
	unsigned int len;
	void *token;

	while ((token = virtqueue_get_buf(q->vq, &len))) {
		WRITE_ONCE(q->completed, q->completed + 1);
		cmd = tlsnic_token_cmd(token);
		if (cmd) {
			tlsnic_cmd_returned(q->priv, cmd, 0, len);
			continue;
		}
		packets++;
		bytes += ((struct sk_buff *)token)->len;
		napi_consume_skb(token, budget);
	}
	if (packets)
		tlsnic_queue_count(&q->stats, packets, bytes);
}

int tlsnic_tx_poll(struct napi_struct *napi, int budget)
{
	struct tlsnic_txq *q = container_of(napi, struct tlsnic_txq, napi);
	struct net_device *dev = q->priv->dev;
	struct netdev_queue *nq = netdev_get_tx_queue(dev, q->index);
	bool done, again = false;
	unsigned int opaque;

	__netif_tx_lock(nq, smp_processor_id());
	virtqueue_disable_cb(q->vq);
	tlsnic_tx_reap(q, budget);
	tlsnic_cmd_flush(q);
	if (q->vq->num_free >= TLSNIC_TX_ROOM && netif_running(dev) &&
	    netif_tx_queue_stopped(nq))
		netif_tx_wake_queue(nq);
	opaque = virtqueue_enable_cb_prepare(q->vq);
	done = napi_complete_done(napi, 0);
	if (!done)
		virtqueue_disable_cb(q->vq);
	else
		again = virtqueue_poll(q->vq, opaque);
	__netif_tx_unlock(nq);

	if (again)
		tlsnic_tx_done(q->vq);
	return 0;
}

/* Interrupt: the device returned chains of this queue */
void tlsnic_tx_done(struct virtqueue *vq)
{
	struct tlsnic_priv *priv = vq->vdev->priv;
	struct tlsnic_txq *q = &priv->txq[vq->index / 2];

	if (napi_schedule_prep(&q->napi)) {
		virtqueue_disable_cb(vq);
		__napi_schedule(&q->napi);
	}
}

/* The device is stopped: give everything back, successful or not */
void tlsnic_tx_free(struct tlsnic_txq *q)
{
	struct tlsnic_cmd *cmd, *next;
	void *token;

	while ((token = virtqueue_detach_unused_buf(q->vq))) {
		cmd = tlsnic_token_cmd(token);
		if (cmd)
			tlsnic_cmd_returned(q->priv, cmd, -ENETDOWN, 0);
		else
			dev_kfree_skb_any(token);
	}
	list_for_each_entry_safe(cmd, next, &q->waiting, list) {
		list_del_init(&cmd->list);
		tlsnic_cmd_returned(q->priv, cmd, -ENETDOWN, 0);
	}
	WRITE_ONCE(q->completed, q->posted);
}
