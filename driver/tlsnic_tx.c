// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Packets to the device: the tx rings.
 *
 * What is to become of a packet of an offloaded socket is decided in
 * tlsnic_tx_tls.c. skbs stay owned by their socket until the device returns
 * them: the kernel deletes a context once the socket has none in flight.
 */
#include "tlsnic.h"

/* Marks a struct tlsnic_rebuild among the tokens of a tx ring; see tlsnic_cmd.c */
#define TLSNIC_TOKEN_REBUILD	BIT(1)

static_assert(sizeof(struct tlsnic_tx_header) <=
	      sizeof_field(struct sk_buff, cb));

/* The skb of a token that is no command; frees what went with it */
static struct sk_buff *tlsnic_token_skb(void *token)
{
	unsigned long value = (unsigned long)token;
	struct tlsnic_rebuild *rebuild;
	struct sk_buff *skb;

	if (!(value & TLSNIC_TOKEN_REBUILD))
		return token;
	rebuild = (struct tlsnic_rebuild *)(value & ~TLSNIC_TOKEN_REBUILD);
	skb = rebuild->skb;
	kfree(rebuild);
	return skb;
}

/*
 * Post @skb behind its headers. These lie in @rebuild, if there is one, else
 * before the frame if it has the room, else in skb->cb. On error skb and
 * @rebuild are still the caller's.
 */
int tlsnic_tx_post(struct tlsnic_txq *q, struct sk_buff *skb,
		   const struct tlsnic_tx_tls *tls,
		   struct tlsnic_rebuild *rebuild)
{
	size_t size = sizeof(struct virtio_net_hdr_v1) +
		      (tls ? sizeof(*tls) : 0);
	bool push = !rebuild && !skb_header_cloned(skb) &&
		    skb_headroom(skb) >= size &&
		    IS_ALIGNED((unsigned long)skb->data, 2);
	struct tlsnic_tx_header *h;
	void *token = skb;
	int n, err;

	h = push ? (void *)(skb->data - size) : (void *)skb->cb;
	if (rebuild) {
		h = &rebuild->header;
		size += rebuild->prefix_len;
		rebuild->skb = skb;
		token = (void *)((unsigned long)rebuild | TLSNIC_TOKEN_REBUILD);
	}
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
	err = virtqueue_add_outbuf(q->vq, q->sg, n, token, GFP_ATOMIC);
	if (!err)
		WRITE_ONCE(q->posted, q->posted + 1);
	return err;
}

void tlsnic_tx_drop(struct tlsnic_txq *q, struct sk_buff *skb)
{
	tlsnic_inc(q->priv, tx_drop);
	dev_kfree_skb_any(skb);
}

void tlsnic_tx_plain(struct tlsnic_txq *q, struct sk_buff *skb)
{
	if (unlikely(tlsnic_tx_post(q, skb, NULL, NULL)))
		tlsnic_tx_drop(q, skb);
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
	case TLSNIC_TX_SETTLED:
		tlsnic_tx_settled(q, skb);
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
	struct sk_buff *skb;
	unsigned int len;
	void *token;

	while ((token = virtqueue_get_buf(q->vq, &len))) {
		WRITE_ONCE(q->completed, q->completed + 1);
		cmd = tlsnic_token_cmd(token);
		if (cmd) {
			tlsnic_cmd_returned(q->priv, cmd, 0, len);
			continue;
		}
		skb = tlsnic_token_skb(token);
		packets++;
		bytes += skb->len;
		napi_consume_skb(skb, budget);
	}
	if (packets)
		tlsnic_queue_count(&q->stats, packets, bytes);
}

/* Go on with what now has room; the tx queue is locked */
static void tlsnic_tx_clean(struct tlsnic_txq *q, int budget)
{
	struct net_device *dev = q->priv->dev;
	struct netdev_queue *nq = netdev_get_tx_queue(dev, q->index);

	tlsnic_tx_reap(q, budget);
	if (tlsnic_cmd_flush(q))
		virtqueue_kick(q->vq);
	if (q->vq->num_free >= TLSNIC_TX_ROOM && netif_running(dev) &&
	    netif_tx_queue_stopped(nq))
		netif_tx_wake_queue(nq);
}

int tlsnic_tx_poll(struct napi_struct *napi, int budget)
{
	struct tlsnic_txq *q = container_of(napi, struct tlsnic_txq, napi);
	struct netdev_queue *nq = netdev_get_tx_queue(q->priv->dev, q->index);
	bool done, again = false;
	unsigned int opaque;

	__netif_tx_lock(nq, smp_processor_id());
	virtqueue_disable_cb(q->vq);
	tlsnic_tx_clean(q, budget);
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

/*
 * Do the NAPI's work now, for somebody who waits for a command; with softirqs
 * disabled. @more: there will be another look at once, so an interrupt has
 * nothing to tell.
 */
void tlsnic_tx_look(struct tlsnic_txq *q, bool more)
{
	struct tlsnic_priv *priv = q->priv;
	struct netdev_queue *nq = netdev_get_tx_queue(priv->dev, q->index);

	__netif_tx_lock(nq, smp_processor_id());
	if (READ_ONCE(priv->running)) {
		virtqueue_disable_cb(q->vq);
		tlsnic_tx_clean(q, 0);
		if (!more && !virtqueue_enable_cb(q->vq))
			tlsnic_tx_done(q->vq);
	}
	__netif_tx_unlock(nq);
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
			dev_kfree_skb_any(tlsnic_token_skb(token));
	}
	list_for_each_entry_safe(cmd, next, &q->waiting, list) {
		list_del_init(&cmd->list);
		tlsnic_cmd_returned(q->priv, cmd, -ENETDOWN, 0);
	}
	WRITE_ONCE(q->completed, q->posted);
}
