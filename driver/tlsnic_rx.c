// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Frames from the device.
 *
 * The receive ring holds buffers cut from larger pages. How large they are
 * follows the frames: for the small ones a whole page would be wasted memory,
 * which the socket is charged for, and of 64 KiB in small buffers each one
 * costs device and driver time. Headers of a frame are copied into the skb, the
 * rest is attached, so payload is not copied and neighbouring buffers become
 * one fragment; a frame that would leave most of its buffer empty is copied.
 *
 * The device is not trusted: lengths, counts, extensions and verdicts are
 * checked, and looked at once, in a copy. Whatever is wrong is counted under
 * its name and dropped.
 */
#include <linux/skbuff.h>

#include "tlsnic.h"

struct tlsnic_rx_head {
	struct virtio_net_hdr_v1 hdr;
	union {
		struct {
			u8 type;
			u8 flags;
			__le16 len;
		} __packed any;
		struct tlsnic_hello_reply hello_reply;
		struct tlsnic_rx_tls tls;
		struct tlsnic_event event;
	} ext;
} __packed;

/* Of the largest frame: no skb holds more fragments everywhere */
#define TLSNIC_RX_MAX_BUFS	17

/* One buffer that the device has filled */
struct tlsnic_rx_buf {
	void *data;
	unsigned int size;
	unsigned int len;	/* bytes of it that the device wrote */
};

static void tlsnic_rx_put(void *data)
{
	put_page(virt_to_head_page(data));
}

/*
 * What the ring remembers of a buffer: where it is, and in the low bits, which
 * its alignment leaves free, its size.
 */
static void *tlsnic_rx_token(void *data, unsigned int size)
{
	return (void *)((unsigned long)data | size / TLSNIC_RX_BUF_MIN);
}

static void tlsnic_rx_untoken(void *token, struct tlsnic_rx_buf *buf)
{
	unsigned long low = (unsigned long)token & (TLSNIC_RX_BUF_MIN - 1);

	buf->data = token - low;
	buf->size = low * TLSNIC_RX_BUF_MIN;
}

/* The size of a buffer to post: half of the usual frame's, or more */
static unsigned int tlsnic_rx_buf_size(struct tlsnic_rxq *q)
{
	return rounddown_pow_of_two(clamp_t(unsigned long,
					    ewma_tlsnic_frame_read(&q->frames),
					    TLSNIC_RX_BUF_MIN,
					    TLSNIC_RX_BUF_MAX));
}

/* Post free buffers; false if there is no memory and not one is posted */
bool tlsnic_rx_fill(struct tlsnic_rxq *q, gfp_t gfp)
{
	unsigned int ring = virtqueue_get_vring_size(q->vq);
	unsigned int want = tlsnic_rx_buf_size(q), size;
	struct page_frag *frag = &q->pages.frag;
	bool kick = false, starved = false;
	struct scatterlist sg;
	void *data;

	while (q->vq->num_free) {
		if (!tlsnic_pages_refill(q, gfp)) {
			tlsnic_inc(q->priv, rx_refill_failed);
			starved = true;
			break;
		}
		size = min_t(unsigned int, want, frag->size - frag->offset);
		data = page_address(frag->page) + frag->offset;
		sg_init_one(&sg, data, size);
		if (virtqueue_add_inbuf(q->vq, &sg, 1,
					tlsnic_rx_token(data, size), gfp))
			break;
		get_page(frag->page);
		frag->offset += size;
		kick = true;
	}
	if (kick)
		virtqueue_kick(q->vq);
	return !starved || q->vq->num_free < ring;
}

/* Take a buffer from the ring; false if there is none */
static bool tlsnic_rx_get(struct tlsnic_rxq *q, struct tlsnic_rx_buf *buf)
{
	void *token = virtqueue_get_buf(q->vq, &buf->len);

	if (token)
		tlsnic_rx_untoken(token, buf);
	return token;
}

/* The next buffer of a frame, or false; its length is honest afterwards */
static bool tlsnic_rx_next(struct tlsnic_rxq *q, struct tlsnic_rx_buf *buf)
{
	if (!tlsnic_rx_get(q, buf)) {
		tlsnic_inc(q->priv, rx_drop_buffers);
		return false;
	}
	if (!buf->len || buf->len > buf->size) {
		tlsnic_inc(q->priv, rx_drop_length);
		tlsnic_rx_put(buf->data);
		return false;
	}
	return true;
}

/* Drop the @count buffers that remain of a frame */
static void tlsnic_rx_skip(struct tlsnic_rxq *q, unsigned int count)
{
	struct tlsnic_rx_buf buf;

	while (count-- && tlsnic_rx_get(q, &buf))
		tlsnic_rx_put(buf.data);
}

/*
 * Attach what @buf holds from @skip on; the skb takes over its page reference.
 * The caller sees to it that there is room for another fragment.
 */
static void tlsnic_rx_attach(struct sk_buff *skb,
			     const struct tlsnic_rx_buf *buf, unsigned int skip)
{
	int i = skb_shinfo(skb)->nr_frags;
	struct page *page = virt_to_head_page(buf->data);
	unsigned int offset = buf->data + skip - page_address(page);
	unsigned int len = buf->len - skip;

	if (skb_can_coalesce(skb, i, page, offset)) {
		put_page(page);
		skb_coalesce_rx_frag(skb, i - 1, len, buf->size);
	} else {
		skb_add_rx_frag(skb, i, page, offset, len, buf->size);
	}
}

/*
 * An skb with what @buf holds of a frame, from @skip on; takes over its page.
 * A small one is copied whole.
 */
static struct sk_buff *tlsnic_rx_build(struct tlsnic_rxq *q,
				       const struct tlsnic_rx_buf *buf,
				       unsigned int skip, bool last)
{
	void *frame = buf->data + skip;
	unsigned int len = buf->len - skip;
	bool copy = last && len <= buf->size / TLSNIC_RX_WASTE;
	struct sk_buff *skb;
	unsigned int head;

	skb = napi_alloc_skb(&q->napi, max(copy ? len : 0U, TLSNIC_RX_HEAD));
	if (unlikely(!skb)) {
		tlsnic_inc(q->priv, rx_drop_nomem);
		tlsnic_rx_put(buf->data);
		return NULL;
	}
	head = copy ? len : eth_get_headlen(q->priv->dev, frame,
					    min(len, TLSNIC_RX_HEAD));
	skb_put_data(skb, frame, head);
	if (len > head)
		tlsnic_rx_attach(skb, buf, skip + head);
	else
		tlsnic_rx_put(buf->data);
	return skb;
}

/* Collect the other @count buffers of a frame; frees @skb on failure */
static struct sk_buff *tlsnic_rx_collect(struct tlsnic_rxq *q,
					 struct sk_buff *skb,
					 unsigned int count)
{
	struct tlsnic_rx_buf buf;

	for (; count; count--) {
		if (unlikely(!tlsnic_rx_next(q, &buf))) {
			tlsnic_rx_skip(q, count - 1);
			kfree_skb(skb);
			return NULL;
		}
		tlsnic_rx_attach(skb, &buf, 0);
	}
	return skb;
}

/*
 * Bytes of header and extension before the frame, or 0 if they make no sense.
 * @len is what the first buffer holds.
 */
static unsigned int tlsnic_rx_parse(const struct tlsnic_rx_head *head,
				    unsigned int len)
{
	unsigned int need, ext_len;

	if (!(head->hdr.flags & TLSNIC_HDR_F_EXT))
		return sizeof(head->hdr);
	if (len < sizeof(head->hdr) + sizeof(head->ext.any))
		return 0;
	switch (head->ext.any.type) {
	case TLSNIC_EXT_HELLO_REPLY:
		need = sizeof(head->ext.hello_reply);
		break;
	case TLSNIC_EXT_RX_TLS:
		need = sizeof(head->ext.tls);
		break;
	case TLSNIC_EXT_EVENT:
		need = sizeof(head->ext.event);
		break;
	default:
		return 0;
	}
	ext_len = le16_to_cpu(head->ext.any.len);
	if (ext_len < need || ext_len > len - sizeof(head->hdr))
		return 0;
	return sizeof(head->hdr) + ext_len;
}

/*
 * Apply the device's verdict. Its payload is plaintext if it says so: without
 * a context of ours that explains it, the frame must not go up. The wire's
 * checksum was verified and does not fit the plaintext, so it is reported as
 * verified whatever the interface's settings are.
 */
static bool tlsnic_rx_verdict(struct tlsnic_priv *priv, struct sk_buff *skb,
			      const struct tlsnic_rx_tls *tls)
{
	struct tlsnic_ctx *ctx;

	if (tls->flags & TLSNIC_RX_F_ERROR)
		tlsnic_inc(priv, rx_tls_err);
	rcu_read_lock();
	ctx = tlsnic_ctx_lookup(priv, le32_to_cpu(tls->slot),
				le32_to_cpu(tls->generation), TLSNIC_DIR_RX);
	if (ctx && tls->flags & TLSNIC_RX_F_QUESTION)
		tlsnic_resync_question(ctx, tls);
	rcu_read_unlock();
	if (!(tls->flags & TLSNIC_RX_F_DECRYPTED))
		return true;
	if (unlikely(!ctx)) {
		tlsnic_inc(priv, rx_drop_verdict);
		return false;
	}
	skb->decrypted = 1;
	skb->ip_summed = CHECKSUM_UNNECESSARY;
	skb->csum_level = 0;
	tlsnic_inc(priv, rx_tls_decrypted_packets);
	tlsnic_add(priv, rx_tls_decrypted_bytes, le32_to_cpu(tls->payload));
	return true;
}

/* Fill in what the header and the extension say, and hand the skb up */
static void tlsnic_rx_deliver(struct tlsnic_rxq *q, struct sk_buff *skb,
			      const struct tlsnic_rx_head *head)
{
	struct net_device *dev = q->priv->dev;

	if (unlikely(virtio_net_hdr_to_skb(skb, (const struct virtio_net_hdr *)
					   &head->hdr, true))) {
		tlsnic_inc(q->priv, rx_drop_header);
		goto drop;
	}
	if (head->hdr.flags & VIRTIO_NET_HDR_F_DATA_VALID &&
	    dev->features & NETIF_F_RXCSUM)
		skb->ip_summed = CHECKSUM_UNNECESSARY;
	if (head->hdr.flags & TLSNIC_HDR_F_EXT &&
	    !tlsnic_rx_verdict(q->priv, skb, &head->ext.tls))
		goto drop;
	tlsnic_queue_count(&q->stats, 1, skb->len);
	skb_record_rx_queue(skb, q->index);
	skb->protocol = eth_type_trans(skb, dev);
	napi_gro_receive(&q->napi, skb);
	return;

drop:
	kfree_skb(skb);
}

/* Replies and events end here; true if @head announces a frame */
static bool tlsnic_rx_is_frame(struct tlsnic_rxq *q,
			       const struct tlsnic_rx_head *head)
{
	if (!(head->hdr.flags & TLSNIC_HDR_F_EXT))
		return true;
	switch (head->ext.any.type) {
	case TLSNIC_EXT_HELLO_REPLY:
		if (!q->index)
			tlsnic_hello_received(q->priv, &head->ext.hello_reply);
		return false;
	case TLSNIC_EXT_EVENT:
		tlsnic_ctx_event(q->priv, &head->ext.event);
		return false;
	default:
		return true;
	}
}

/* One frame, reply or event, that begins in @buf */
static void tlsnic_rx_one(struct tlsnic_rxq *q, const struct tlsnic_rx_buf *buf)
{
	struct tlsnic_rx_head head;
	unsigned int buffers, skip;
	struct sk_buff *skb;

	if (unlikely(buf->len < sizeof(head.hdr) || buf->len > buf->size)) {
		tlsnic_inc(q->priv, rx_drop_length);
		tlsnic_rx_put(buf->data);
		return;
	}
	memcpy(&head, buf->data, min_t(size_t, buf->len, sizeof(head)));
	buffers = __virtio16_to_cpu(true, head.hdr.num_buffers);
	if (unlikely(!buffers || buffers > TLSNIC_RX_MAX_BUFS)) {
		tlsnic_inc(q->priv, rx_drop_buffers);
		buffers = buffers ?: 1;
		goto drop;
	}
	skip = tlsnic_rx_parse(&head, buf->len);
	if (unlikely(!skip)) {
		tlsnic_inc(q->priv, rx_drop_ext);
		goto drop;
	}
	if (!tlsnic_rx_is_frame(q, &head))
		goto drop;
	if (unlikely(!netif_running(q->priv->dev))) {
		tlsnic_inc(q->priv, rx_drop_down);
		goto drop;
	}
	if (unlikely(buf->len - skip < ETH_HLEN)) {
		tlsnic_inc(q->priv, rx_drop_length);
		goto drop;
	}
	skb = tlsnic_rx_build(q, buf, skip, buffers == 1);
	if (unlikely(!skb)) {
		tlsnic_rx_skip(q, buffers - 1);
		return;
	}
	skb = tlsnic_rx_collect(q, skb, buffers - 1);
	if (unlikely(!skb))
		return;
	ewma_tlsnic_frame_add(&q->frames, skb->len);
	tlsnic_rx_deliver(q, skb, &head);
	return;

drop:
	tlsnic_rx_put(buf->data);
	tlsnic_rx_skip(q, buffers - 1);
}

int tlsnic_rx_poll(struct napi_struct *napi, int budget)
{
	struct tlsnic_rxq *q = container_of(napi, struct tlsnic_rxq, napi);
	struct tlsnic_rx_buf buf;
	unsigned int opaque;
	int done = 0;

	while (done < budget && tlsnic_rx_get(q, &buf)) {
		tlsnic_rx_one(q, &buf);
		done++;
		/* a ring holds few large frames: let the device go on meanwhile */
		if (q->vq->num_free > virtqueue_get_vring_size(q->vq) / 4)
			tlsnic_rx_fill(q, GFP_ATOMIC);
	}
	/* nothing would wake us for an empty ring: come again instead */
	if (!tlsnic_rx_fill(q, GFP_ATOMIC) || done == budget)
		return budget;

	opaque = virtqueue_enable_cb_prepare(q->vq);
	if (!napi_complete_done(napi, done))
		virtqueue_disable_cb(q->vq);
	else if (virtqueue_poll(q->vq, opaque))
		tlsnic_rx_done(q->vq);
	return done;
}

/* Interrupt: frames came in */
void tlsnic_rx_done(struct virtqueue *vq)
{
	struct tlsnic_priv *priv = vq->vdev->priv;
	struct tlsnic_rxq *q = &priv->rxq[vq->index / 2];

	if (napi_schedule_prep(&q->napi)) {
		virtqueue_disable_cb(vq);
		__napi_schedule(&q->napi);
	}
}

/* The device is stopped: take the buffers back */
void tlsnic_rx_free(struct tlsnic_rxq *q)
{
	struct tlsnic_rx_buf buf;
	void *token;

	while ((token = virtqueue_detach_unused_buf(q->vq))) {
		tlsnic_rx_untoken(token, &buf);
		tlsnic_rx_put(buf.data);
	}
	tlsnic_pages_free(&q->pages);
}
