// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * The net device's operations outside the data path, and the control queue.
 *
 * The rings and their NAPI work from probe to remove, up or down: commands and
 * events need them. Up and down only start and stop the stack's side.
 */
#include <linux/delay.h>

#include "tlsnic.h"

/*
 * Send a request to the control queue. QEMU answers it while it is notified,
 * so the queue has no interrupt and we look for the answer. Has its own mutex:
 * RTNL is not for us to rely on.
 */
static int tlsnic_ctrl(struct tlsnic_priv *priv, u8 class, u8 cmd,
		       const void *data, size_t size)
{
	struct tlsnic_ctrl *ctrl = priv->ctrl;
	struct scatterlist hdr, out, status, *sgs[] = { &hdr, &out, &status };
	unsigned long deadline;
	unsigned int len;
	int err;

	if (WARN_ON_ONCE(size > sizeof(ctrl->data)))
		return -EINVAL;
	mutex_lock(&priv->ctrl_mutex);
	err = -ENODEV;
	if (!priv->cvq)
		goto unlock;
	ctrl->hdr.class = class;
	ctrl->hdr.cmd = cmd;
	memcpy(ctrl->data, data, size);
	ctrl->status = VIRTIO_NET_ERR;
	sg_init_one(&hdr, &ctrl->hdr, sizeof(ctrl->hdr));
	sg_init_one(&out, ctrl->data, size);
	sg_init_one(&status, &ctrl->status, sizeof(ctrl->status));
	err = virtqueue_add_sgs(priv->cvq, sgs, 2, 1, ctrl, GFP_KERNEL);
	if (err)
		goto unlock;
	virtqueue_kick(priv->cvq);

	deadline = jiffies + TLSNIC_CMD_TIMEOUT;
	while (!virtqueue_get_buf(priv->cvq, &len)) {
		if (time_after(jiffies, deadline) ||
		    virtqueue_is_broken(priv->cvq)) {
			/* the device still owns *ctrl: never use it again */
			priv->cvq = NULL;
			err = -ETIMEDOUT;
			goto unlock;
		}
		usleep_range(20, 100);
	}
	err = ctrl->status == VIRTIO_NET_OK ? 0 : -EIO;
unlock:
	mutex_unlock(&priv->ctrl_mutex);
	return err;
}

/* Tell the device how many queue pairs to use */
int tlsnic_set_pairs(struct tlsnic_priv *priv, unsigned int pairs)
{
	struct virtio_net_ctrl_mq mq = {
		.virtqueue_pairs = cpu_to_virtio16(priv->vdev, pairs),
	};
	int err;

	if (virtio_has_feature(priv->vdev, VIRTIO_NET_F_MQ)) {
		err = tlsnic_ctrl(priv, VIRTIO_NET_CTRL_MQ,
				  VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, &mq,
				  sizeof(mq));
		if (err)
			return err;
	} else if (pairs != 1) {
		return -EOPNOTSUPP;
	}
	priv->pairs = pairs;
	return 0;
}

/* Wait until no packet is left in the tx queues from @first on */
static int tlsnic_drain(struct tlsnic_priv *priv, unsigned int first)
{
	unsigned long deadline = jiffies + HZ;
	struct tlsnic_txq *q;
	unsigned int i;

	for (i = first; i < priv->pairs; i++) {
		q = &priv->txq[i];
		while (READ_ONCE(q->posted) != READ_ONCE(q->completed)) {
			if (time_after(jiffies, deadline))
				return -EBUSY;
			usleep_range(500, 1000);
		}
	}
	return 0;
}

/*
 * Change the number of queue pairs of a registered device; under RTNL. Queues
 * that go are emptied first: what is in a ring the device no longer serves
 * would keep its socket's context alive.
 */
int tlsnic_change_pairs(struct tlsnic_priv *priv, unsigned int pairs)
{
	struct net_device *dev = priv->dev;
	unsigned int old = priv->pairs;
	int err;

	if (pairs > old) {
		err = tlsnic_set_pairs(priv, pairs);
		if (err)
			return err;
		return netif_set_real_num_queues(dev, pairs, pairs);
	}
	err = netif_set_real_num_queues(dev, pairs, pairs);
	if (err)
		return err;
	err = tlsnic_drain(priv, pairs);
	if (!err)
		err = tlsnic_set_pairs(priv, pairs);
	if (err)
		netif_set_real_num_queues(dev, old, old);
	return err;
}

static int tlsnic_open(struct net_device *dev)
{
	netif_tx_start_all_queues(dev);
	return 0;
}

/* Contexts are deleted after this, so the rings go on */
static int tlsnic_stop(struct net_device *dev)
{
	netif_tx_disable(dev);
	return 0;
}

static int tlsnic_set_mac(struct net_device *dev, void *p)
{
	struct tlsnic_priv *priv = netdev_priv(dev);
	const struct sockaddr *addr = p;
	int err;

	err = eth_prepare_mac_addr_change(dev, p);
	if (err)
		return err;
	if (virtio_has_feature(priv->vdev, VIRTIO_NET_F_CTRL_MAC_ADDR)) {
		err = tlsnic_ctrl(priv, VIRTIO_NET_CTRL_MAC,
				  VIRTIO_NET_CTRL_MAC_ADDR_SET, addr->sa_data,
				  ETH_ALEN);
		if (err)
			return err;
	}
	eth_commit_mac_addr_change(dev, p);
	return 0;
}

void tlsnic_queue_stats_read(const struct tlsnic_queue_stats *stats,
			     u64 *packets, u64 *bytes)
{
	unsigned int start;

	do {
		start = u64_stats_fetch_begin(&stats->syncp);
		*packets = u64_stats_read(&stats->packets);
		*bytes = u64_stats_read(&stats->bytes);
	} while (u64_stats_fetch_retry(&stats->syncp, start));
}

static u64 tlsnic_sum(const struct tlsnic_priv *priv,
		      enum tlsnic_counter first, enum tlsnic_counter last)
{
	u64 sum = 0;

	for (; first <= last; first++)
		sum += atomic64_read(&priv->counters[first]);
	return sum;
}

static void tlsnic_get_stats64(struct net_device *dev,
			       struct rtnl_link_stats64 *total)
{
	struct tlsnic_priv *priv = netdev_priv(dev);
	u64 packets, bytes;
	unsigned int i;

	for (i = 0; i < priv->max_pairs; i++) {
		tlsnic_queue_stats_read(&priv->txq[i].stats, &packets, &bytes);
		total->tx_packets += packets;
		total->tx_bytes += bytes;
		tlsnic_queue_stats_read(&priv->rxq[i].stats, &packets, &bytes);
		total->rx_packets += packets;
		total->rx_bytes += bytes;
	}
	total->tx_dropped = tlsnic_sum(priv, TLSNIC_CNT_tx_drop,
				       TLSNIC_CNT_tx_drop) +
			    tlsnic_sum(priv,
				       TLSNIC_CNT_tx_tls_drop_no_sync_data,
				       TLSNIC_CNT_tx_tls_drop_bypass_req);
	total->rx_dropped = tlsnic_sum(priv, TLSNIC_CNT_rx_drop_nomem,
				       TLSNIC_CNT_rx_drop_nomem);
	total->rx_length_errors = tlsnic_sum(priv, TLSNIC_CNT_rx_drop_length,
					     TLSNIC_CNT_rx_drop_buffers);
	total->rx_frame_errors = tlsnic_sum(priv, TLSNIC_CNT_rx_drop_ext,
					    TLSNIC_CNT_rx_drop_header);
	total->rx_errors = total->rx_length_errors + total->rx_frame_errors;
}

static void tlsnic_tx_timeout(struct net_device *dev, unsigned int queue)
{
	struct tlsnic_priv *priv = netdev_priv(dev);
	struct tlsnic_txq *q = &priv->txq[queue];

	tlsnic_inc(priv, tx_timeout);
	netdev_err(dev, "tx queue %u: %lu chains with the device for %u ms\n",
		   queue, READ_ONCE(q->posted) - READ_ONCE(q->completed),
		   jiffies_to_msecs(jiffies - READ_ONCE(netdev_get_tx_queue(dev,
							queue)->trans_start)));
	/* in case an interrupt was lost */
	napi_schedule(&q->napi);
}

const struct net_device_ops tlsnic_netdev_ops = {
	.ndo_open = tlsnic_open,
	.ndo_stop = tlsnic_stop,
	.ndo_start_xmit = tlsnic_start_xmit,
	.ndo_validate_addr = eth_validate_addr,
	.ndo_set_mac_address = tlsnic_set_mac,
	.ndo_get_stats64 = tlsnic_get_stats64,
	.ndo_tx_timeout = tlsnic_tx_timeout,
	.ndo_features_check = passthru_features_check,
};
