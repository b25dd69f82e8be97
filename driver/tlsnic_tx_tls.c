// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Packets of offloaded sockets.
 *
 * One goes out with a TX_TLS extension if its TCP sequence number is the one
 * the device expects. For any other, the device is told where it has to begin
 * (personality rebuild), or the kernel encrypts it (tls_encrypt_skb) and it
 * goes out as an ordinary packet. Nothing with plaintext records is ever posted
 * without the extension.
 *
 * A packet is posted and expected_seq moved in one piece under ctx->lock, so
 * neither another queue nor a failed post can make driver and device disagree.
 * Queues are not ordered among one another: a context moves to another only
 * when its last packet has surely left the former one.
 *
 * A packet that comes by way of another device was encrypted there, by the
 * kernel, and still belongs to its socket. It must not be encrypted again: with
 * AES-GCM that is decrypting. See tlsnic_tx_judge() and tlsnic_tx_tls().
 */
#include <linux/if_vlan.h>
#include <linux/slab.h>
#include <linux/tcp.h>
#include <net/ipv6.h>

#include "tlsnic.h"

static bool tlsnic_tx_rebuilds(const struct tlsnic_priv *priv)
{
	return READ_ONCE(priv->tx_personality) == TLSNIC_TX_REBUILD;
}

/*
 * Has the device taken all it got of this context in other queues than @q? It
 * has if all of that was returned, or acknowledged: but the peer may have
 * acknowledged an earlier copy of a retransmission. Under lock.
 */
static bool tlsnic_tx_queue_free(const struct tlsnic_ctx *ctx,
				 const struct tlsnic_txq *q, struct sock *sk)
{
	const struct tlsnic_txq *last = ctx->last_queue;
	unsigned long completed;

	if (last == q || !last)
		return true;
	completed = READ_ONCE(last->completed);
	if ((long)(completed - ctx->last_pos) >= 0)
		return true;
	return (long)(completed - ctx->repeat_pos) >= 0 &&
	       !before(READ_ONCE(tcp_sk(sk)->snd_una), ctx->sent_seq);
}

/* May the device encrypt the packet at @seq, posted to @q now? Under lock. */
static bool tlsnic_tx_in_order(const struct tlsnic_ctx *ctx,
			       const struct tlsnic_txq *q, struct sock *sk,
			       u32 seq)
{
	if (!ctx->on_device || !ctx->in_sync || seq != ctx->expected_seq)
		return false;
	if (tls_offload_tx_resync_pending(sk) && !tlsnic_tx_rebuilds(ctx->priv))
		return false;
	return tlsnic_tx_queue_free(ctx, q, sk);
}

/* The packet at @seq is posted: move the context past it. Under lock. */
static void tlsnic_tx_advance(struct tlsnic_ctx *ctx, struct tlsnic_txq *q,
			      u32 seq, u32 payload)
{
	bool repeat = before(seq, ctx->sent_seq);

	ctx->in_sync = true;
	ctx->resync = false;
	ctx->expected_seq = seq + payload;
	if (after(ctx->expected_seq, ctx->sent_seq))
		ctx->sent_seq = ctx->expected_seq;
	ctx->last_pos = q->posted;
	if (repeat)
		ctx->repeat_pos = q->posted;
	else if (q != ctx->last_queue)
		ctx->repeat_pos = READ_ONCE(q->completed);
	ctx->last_queue = q;
}

/*
 * Directly before its first packet the device gets the context. What is said of
 * the place of its last packet holds for this, too. Under lock.
 */
static int tlsnic_tx_add_context(struct tlsnic_ctx *ctx, struct tlsnic_txq *q)
{
	int err;

	err = tlsnic_cmd_post_locked(q, ctx->prepared);
	if (err)
		return err;
	ctx->prepared = NULL;
	ctx->add_queue = q;
	ctx->last_queue = q;
	ctx->last_pos = q->posted;
	ctx->repeat_pos = q->posted;
	return 0;
}

/*
 * Post a packet for the device to encrypt: where it expects one, or, with
 * @rebuild, anywhere. Under lock. On error both are the caller's.
 */
static int tlsnic_tx_offload(struct tlsnic_ctx *ctx, struct tlsnic_txq *q,
			     struct sk_buff *skb, u32 seq, u32 payload,
			     struct tlsnic_rebuild *rebuild)
{
	struct tlsnic_priv *priv = q->priv;
	struct tlsnic_tx_tls tls = {
		.type = TLSNIC_EXT_TX_TLS,
		.len = cpu_to_le16(sizeof(tls)),
		.slot = cpu_to_le32(ctx->slot),
		.generation = cpu_to_le32(ctx->generation),
	};
	u32 prefix_len = rebuild ? rebuild->prefix_len : 0;
	int err;

	if (unlikely(ctx->prepared)) {
		err = tlsnic_tx_add_context(ctx, q);
		if (err)
			return err;
	}
	if (rebuild) {
		tls.resync_seq = cpu_to_le32(rebuild->record_seq);
		tls.resync_rcd_sn = cpu_to_le64(rebuild->rcd_sn);
		tls.prefix_len = cpu_to_le32(prefix_len);
	} else if (ctx->resync) {
		tls.resync_seq = cpu_to_le32(ctx->expected_seq);
		tls.resync_rcd_sn = cpu_to_le64(ctx->resync_rcd_sn);
	}
	if (rebuild || ctx->resync)
		tls.flags = TLSNIC_TX_F_RESYNC;
	err = tlsnic_tx_post(q, skb, &tls, rebuild);
	if (err)
		return err;

	tlsnic_tx_advance(ctx, q, seq, payload);
	if (tls.flags)
		tlsnic_inc(priv, tx_tls_resync);
	tlsnic_add(priv, tx_tls_resync_bytes, prefix_len);
	tlsnic_add(priv, tx_tls_encrypted_packets,
		   max_t(u16, skb_shinfo(skb)->gso_segs, 1));
	tlsnic_add(priv, tx_tls_encrypted_bytes, payload);
	return 0;
}

/*
 * A packet is out of order. Without rebuild, a retransmission leaves the device
 * where it is; behind a gap (or where the device lost its place) the stack is
 * asked to agree on a record to go on with. Under lock.
 */
static void tlsnic_tx_note_disorder(struct tlsnic_ctx *ctx, struct sock *sk,
				    u32 seq)
{
	if (!ctx->on_device)
		return;
	tlsnic_inc(ctx->priv, tx_tls_ooo);
	if (tlsnic_tx_rebuilds(ctx->priv))
		return;
	if (ctx->in_sync && !after(seq, ctx->expected_seq))
		return;
	if (tls_offload_tx_resync_pending(sk))
		return;
	tlsnic_inc(ctx->priv, tx_tls_resync_req);
	tls_offload_tx_resync_request(sk, seq, ctx->expected_seq);
}

/* Post @skb with all the device needs to encrypt it, and frees @rebuild if not */
static bool tlsnic_tx_rebuild(struct tlsnic_ctx *ctx, struct tlsnic_txq *q,
			      struct sk_buff *skb, u32 seq, u32 payload,
			      struct tlsnic_rebuild *rebuild)
{
	bool posted;

	spin_lock(&ctx->lock);
	posted = ctx->on_device && tlsnic_tx_queue_free(ctx, q, skb->sk) &&
		 !tlsnic_tx_offload(ctx, q, skb, seq, payload, rebuild);
	spin_unlock(&ctx->lock);
	if (!posted)
		kfree(rebuild);
	return posted;
}

/* The kernel encrypts records that the device cannot take now */
static void tlsnic_tx_software(struct tlsnic_txq *q, struct sk_buff *skb)
{
	skb = tls_encrypt_skb(skb);
	if (!skb) {
		tlsnic_inc(q->priv, tx_tls_drop_no_sync_data);
		return;
	}
	tlsnic_inc(q->priv, tx_tls_fallback);
	tlsnic_tx_plain(q, skb);
}

/*
 * The one place that decides what becomes of a packet the device cannot take
 * as it is. @ctx may be NULL.
 */
static void tlsnic_tx_out_of_order(struct tlsnic_ctx *ctx, struct tlsnic_txq *q,
				   struct sk_buff *skb, u32 seq, u32 payload)
{
	bool wanted = ctx && READ_ONCE(ctx->on_device) &&
		      tlsnic_tx_rebuilds(q->priv);
	struct tlsnic_rebuild *rebuild = NULL;
	struct tlsnic_priv *priv = q->priv;

	switch (tlsnic_records_place(skb->sk, seq, payload,
				     wanted ? &rebuild : NULL)) {
	case TLSNIC_PLACE_RECORDS:
		if (!rebuild || !tlsnic_tx_rebuild(ctx, q, skb, seq, payload,
						   rebuild))
			tlsnic_tx_software(q, skb);
		return;
	case TLSNIC_PLACE_BEFORE:
		if (unlikely(skb->decrypted))
			break;
		tlsnic_inc(priv, tx_tls_skip_no_sync_data);
		tlsnic_tx_plain(q, skb);
		return;
	case TLSNIC_PLACE_STRADDLES:
		break;
	case TLSNIC_PLACE_GONE:
		tlsnic_inc(priv, tx_tls_drop_no_sync_data);
		dev_kfree_skb_any(skb);
		return;
	}
	tlsnic_inc(priv, tx_tls_drop_bypass_req);
	dev_kfree_skb_any(skb);
}

/* IP and TCP, with nothing between: else skb->transport_header lies */
static bool tlsnic_tx_is_tcp(const struct sk_buff *skb)
{
	int offset = skb_network_offset(skb);
	__be16 frag_off;
	u8 protocol;

	switch (vlan_get_protocol(skb)) {
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

/* Does @sk have records? After its device went down, too (tls_device_down) */
static bool tlsnic_tx_is_tls(const struct sock *sk)
{
	const struct tcp_ulp_ops *ulp;

	if (!sk || !sk_fullsock(sk) || !sk->sk_validate_xmit_skb)
		return false;
	ulp = READ_ONCE(inet_csk(sk)->icsk_ulp_ops);
	return sk->sk_protocol == IPPROTO_TCP && ulp &&
	       !strcmp(ulp->name, "tls");
}

/*
 * What a packet holds. Records of a socket that this device offloads are its
 * business. For any other device, and after the socket's own went down, the
 * core encrypts (tls_validate_xmit_skb and _sw), but for each device on the way
 * anew: what comes by way of a bond or a macvlan may have been encrypted twice,
 * which with AES-GCM is not at all. Something else may have changed packets
 * without asking whether they were encrypted (tunnels, tags, xfrm), or have
 * turned one around that was received and decrypted (XDP_TX, past the core's
 * sk_validate_xmit_skb).
 *
 * The core never clears skb->decrypted on tx: set, it says that there are
 * records, no more.
 */
enum tlsnic_tx_state tlsnic_tx_judge(const struct tlsnic_priv *priv,
				     const struct sk_buff *skb)
{
	struct net_device *own = NULL;

	if (tls_is_skb_tx_device_offloaded(skb))
		own = rcu_dereference_bh(tls_get_ctx(skb->sk)->netdev);
	if (own == priv->dev && !eth_type_vlan(skb->protocol) &&
	    tlsnic_tx_is_tcp(skb))
		return skb->len == skb_tcp_all_headers(skb) ?
			TLSNIC_TX_PLAIN : TLSNIC_TX_RECORDS;
	if (likely(!skb->decrypted))
		return TLSNIC_TX_PLAIN;
	if (tlsnic_tx_is_tls(skb->sk) && tlsnic_tx_is_tcp(skb))
		return TLSNIC_TX_SETTLED;
	return TLSNIC_TX_UNKNOWN;
}

/* Records that are not for the device: see to it that they are encrypted */
void tlsnic_tx_settled(struct tlsnic_txq *q, struct sk_buff *skb)
{
	int clear = tlsnic_records_in_clear(skb);

	if (unlikely(clear < 0)) {
		tlsnic_inc(q->priv, tx_tls_drop_no_sync_data);
		dev_kfree_skb_any(skb);
	} else if (unlikely(clear)) {
		tlsnic_inc(q->priv, tx_tls_in_clear);
		tlsnic_tx_software(q, skb);
	} else {
		tlsnic_tx_plain(q, skb);
	}
}

/* The device does not follow source routes; one may be set at any time */
static bool tlsnic_tx_source_routed(const struct sk_buff *skb)
{
	unsigned int offset = 0;

	return skb->protocol == htons(ETH_P_IPV6) &&
	       ipv6_hdr(skb)->nexthdr != NEXTHDR_TCP &&
	       ipv6_find_hdr(skb, &offset, NEXTHDR_ROUTING, NULL, NULL) >= 0;
}

/*
 * A packet with @payload bytes of an offloaded socket's stream. It may be here
 * for the second time, or have come by way of another device, and the core may
 * have encrypted it there: into an skb without fragments, so what is linear is
 * made plaintext first.
 */
void tlsnic_tx_tls(struct tlsnic_txq *q, struct sk_buff *skb, u32 payload)
{
	struct tlsnic_ctx *ctx = tlsnic_tx_ctx(q->priv, skb->sk);
	u32 seq = ntohl(tcp_hdr(skb)->seq);
	int err;

	if (unlikely(skb_headlen(skb) > skb_tcp_all_headers(skb))) {
		if (!tlsnic_records_refill(skb, seq)) {
			tlsnic_inc(q->priv, tx_tls_drop_no_sync_data);
			dev_kfree_skb_any(skb);
			return;
		}
		tlsnic_inc(q->priv, tx_tls_refilled);
	}
	if (unlikely(tlsnic_tx_source_routed(skb)))
		ctx = NULL;
	if (likely(ctx)) {
		spin_lock(&ctx->lock);
		if (likely(tlsnic_tx_in_order(ctx, q, skb->sk, seq))) {
			err = tlsnic_tx_offload(ctx, q, skb, seq, payload,
						NULL);
			spin_unlock(&ctx->lock);
			if (unlikely(err))
				tlsnic_tx_drop(q, skb);
			return;
		}
		tlsnic_tx_note_disorder(ctx, skb->sk, seq);
		spin_unlock(&ctx->lock);
	}
	tlsnic_tx_out_of_order(ctx, q, skb, seq, payload);
}
