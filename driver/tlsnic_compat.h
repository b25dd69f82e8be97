/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What differs between the kernels from 6.1 to 7.2. Kbuild probes the headers
 * and defines TLSNIC_HAVE_*; the rest of the driver is written for the newest.
 */
#ifndef TLSNIC_COMPAT_H
#define TLSNIC_COMPAT_H

#include <linux/ethtool.h>
#include <linux/slab.h>
#include <linux/virtio_config.h>
#include <net/tls.h>

#if !IS_ENABLED(CONFIG_TLS_DEVICE)
#error "tlsnic needs a kernel with CONFIG_TLS_DEVICE"
#endif

#ifndef TLSNIC_HAVE_TLS_IS_SKB
static inline bool tls_is_skb_tx_device_offloaded(const struct sk_buff *skb)
{
	return skb->sk && tls_is_sk_tx_device_offloaded(skb->sk);
}
#endif

/* Stable trees changed what these take; @async is the one set for @sk */
static inline void tlsnic_resync_start(struct sock *sk,
				       struct tls_offload_resync_async *async,
				       __be32 seq, u16 len)
{
#ifdef TLSNIC_HAVE_RESYNC_BY_SOCK
	tls_offload_rx_resync_async_request_start(sk, seq, len);
#else
	tls_offload_rx_resync_async_request_start(async, seq, len);
#endif
}

static inline void tlsnic_resync_end(struct sock *sk,
				     struct tls_offload_resync_async *async,
				     __be32 seq)
{
#ifdef TLSNIC_HAVE_RESYNC_BY_SOCK
	tls_offload_rx_resync_async_request_end(sk, seq);
#else
	tls_offload_rx_resync_async_request_end(async, seq);
#endif
}

#ifndef TLSNIC_HAVE_ETHTOOL_PUTS
/* ethtool's buffers are zeroed beforehand */
static inline void ethtool_puts(u8 **data, const char *string)
{
	strscpy(*data, string, ETH_GSTRING_LEN);
	*data += ETH_GSTRING_LEN;
}
#endif

#ifdef TLSNIC_HAVE_VIRTQUEUE_INFO
#define tlsnic_find_vqs(vdev, n, vqs, info) \
	virtio_find_vqs(vdev, n, vqs, info, NULL)
#else
struct virtqueue_info {
	const char *name;
	vq_callback_t *callback;
};

static inline int tlsnic_find_vqs(struct virtio_device *vdev, unsigned int n,
				  struct virtqueue *vqs[],
				  struct virtqueue_info info[])
{
	vq_callback_t **callbacks;
	const char **names;
	int err = -ENOMEM;
	unsigned int i;

	callbacks = kcalloc(n, sizeof(*callbacks), GFP_KERNEL);
	names = kcalloc(n, sizeof(*names), GFP_KERNEL);
	if (callbacks && names) {
		for (i = 0; i < n; i++) {
			callbacks[i] = info[i].callback;
			names[i] = info[i].name;
		}
		err = virtio_find_vqs(vdev, n, vqs, callbacks, names, NULL);
	}
	kfree(callbacks);
	kfree(names);
	return err;
}
#endif

#endif /* TLSNIC_COMPAT_H */
