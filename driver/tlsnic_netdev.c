// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * The net device: made and freed here, with its operations outside the data
 * path.
 *
 * The rings and their NAPI work from probe to remove, up or down: commands and
 * events need them. Up and down only start and stop the stack's side.
 */
#include <linux/slab.h>

#include "tlsnic.h"

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
	total->tx_dropped = tlsnic_count(priv, tx_drop) +
			    tlsnic_count(priv, tx_tls_drop_no_sync_data) +
			    tlsnic_count(priv, tx_tls_drop_bypass_req);
	total->rx_dropped = tlsnic_count(priv, rx_drop_nomem);
	total->rx_length_errors = tlsnic_count(priv, rx_drop_length) +
				  tlsnic_count(priv, rx_drop_buffers);
	total->rx_frame_errors = tlsnic_count(priv, rx_drop_ext) +
				 tlsnic_count(priv, rx_drop_verdict) +
				 tlsnic_count(priv, rx_drop_header);
	total->rx_errors = total->rx_length_errors + total->rx_frame_errors;
}

static void tlsnic_tx_timeout(struct net_device *dev, unsigned int queue)
{
	struct netdev_queue *nq = netdev_get_tx_queue(dev, queue);
	struct tlsnic_priv *priv = netdev_priv(dev);
	struct tlsnic_txq *q = &priv->txq[queue];
	unsigned long idle = jiffies - READ_ONCE(nq->trans_start);

	tlsnic_inc(priv, tx_timeout);
	netdev_err(dev, "tx queue %u: %lu chains with the device for %u ms\n",
		   queue, READ_ONCE(q->posted) - READ_ONCE(q->completed),
		   jiffies_to_msecs(idle));
	/* in case an interrupt was lost */
	napi_schedule(&q->napi);
}

static const struct net_device_ops tlsnic_netdev_ops = {
	.ndo_open = tlsnic_open,
	.ndo_stop = tlsnic_stop,
	.ndo_start_xmit = tlsnic_start_xmit,
	.ndo_validate_addr = eth_validate_addr,
	.ndo_set_mac_address = tlsnic_set_mac,
	.ndo_get_stats64 = tlsnic_get_stats64,
	.ndo_tx_timeout = tlsnic_tx_timeout,
};

static void tlsnic_queues_init(struct tlsnic_priv *priv)
{
	struct tlsnic_txq *tx;
	struct tlsnic_rxq *rx;
	unsigned int i;

	for (i = 0; i < priv->max_pairs; i++) {
		tx = &priv->txq[i];
		tx->priv = priv;
		tx->index = i;
		INIT_LIST_HEAD(&tx->waiting);
		INIT_DELAYED_WORK(&tx->late, tlsnic_cmd_late);
		u64_stats_init(&tx->stats.syncp);
		snprintf(tx->name, sizeof(tx->name), "tx%u", i);
		netif_napi_add_tx(priv->dev, &tx->napi, tlsnic_tx_poll);

		rx = &priv->rxq[i];
		rx->priv = priv;
		rx->index = i;
		u64_stats_init(&rx->stats.syncp);
		ewma_tlsnic_frame_init(&rx->frames);
		snprintf(rx->name, sizeof(rx->name), "rx%u", i);
		netif_napi_add(priv->dev, &rx->napi, tlsnic_rx_poll);
	}
}

static void tlsnic_features_init(struct tlsnic_priv *priv)
{
	struct virtio_device *vdev = priv->vdev;
	struct net_device *dev = priv->dev;

	dev->hw_features = NETIF_F_SG;
	if (virtio_has_feature(vdev, VIRTIO_NET_F_CSUM)) {
		dev->hw_features |= NETIF_F_HW_CSUM;
		if (virtio_has_feature(vdev, VIRTIO_NET_F_HOST_TSO4))
			dev->hw_features |= NETIF_F_TSO;
		if (virtio_has_feature(vdev, VIRTIO_NET_F_HOST_TSO6))
			dev->hw_features |= NETIF_F_TSO6;
		if (virtio_has_feature(vdev, VIRTIO_NET_F_HOST_ECN))
			dev->hw_features |= NETIF_F_TSO_ECN;
	}
	if (virtio_has_feature(vdev, VIRTIO_NET_F_GUEST_CSUM))
		dev->hw_features |= NETIF_F_RXCSUM;
	dev->features = dev->hw_features | NETIF_F_HIGHDMA;
	/* without TLS: a VLAN has no tlsdev_ops */
	dev->vlan_features = dev->features;
}

static void tlsnic_config_init(struct tlsnic_priv *priv)
{
	struct virtio_device *vdev = priv->vdev;
	struct net_device *dev = priv->dev;
	u8 mac[ETH_ALEN] = {};
	u16 mtu;

	if (virtio_has_feature(vdev, VIRTIO_NET_F_MAC))
		virtio_cread_bytes(vdev, offsetof(struct virtio_net_config,
						  mac), mac, ETH_ALEN);
	if (is_valid_ether_addr(mac))
		eth_hw_addr_set(dev, mac);
	else
		eth_hw_addr_random(dev);
	dev->min_mtu = ETH_MIN_MTU;
	dev->max_mtu = ETH_MAX_MTU;
	if (virtio_has_feature(vdev, VIRTIO_NET_F_MTU)) {
		virtio_cread(vdev, struct virtio_net_config, mtu, &mtu);
		if (mtu >= ETH_MIN_MTU) {
			dev->mtu = mtu;
			dev->max_mtu = mtu;
		}
	}
	priv->speed = SPEED_UNKNOWN;
	priv->duplex = DUPLEX_UNKNOWN;
}

void tlsnic_free(struct tlsnic_priv *priv)
{
	/* the pointers of free_netdev() lie in what it frees */
	struct net_device *dev = priv->dev;
	struct tlsnic_txq *txq = priv->txq;
	struct tlsnic_rxq *rxq = priv->rxq;

	tlsnic_slots_destroy(priv);
	kfree(priv->dev_stats);
	kfree(priv->dev_stat_names);
	kfree(priv->ctrl);
	free_netdev(dev);
	kvfree(txq);
	kvfree(rxq);
}

/* Everything that needs no word with the device */
struct tlsnic_priv *tlsnic_alloc(struct virtio_device *vdev, unsigned int pairs)
{
	struct tlsnic_priv *priv;
	struct net_device *dev;

	dev = alloc_etherdev_mqs(sizeof(*priv), pairs, pairs);
	if (!dev)
		return NULL;
	SET_NETDEV_DEV(dev, &vdev->dev);
	dev->netdev_ops = &tlsnic_netdev_ops;
	dev->ethtool_ops = &tlsnic_ethtool_ops;
	dev->needed_headroom = sizeof(struct virtio_net_hdr_v1) +
			       sizeof(struct tlsnic_tx_tls);
	dev->watchdog_timeo = 10 * HZ;
	/* the device takes frames for any address */
	dev->priv_flags |= IFF_LIVE_ADDR_CHANGE;

	priv = netdev_priv(dev);
	priv->vdev = vdev;
	priv->dev = dev;
	priv->max_pairs = pairs;
	set_bit(TLSNIC_F_NO_WORK, &priv->flags);
	mutex_init(&priv->ctrl_mutex);
	mutex_init(&priv->ctx_mutex);
	ida_init(&priv->slot_ida);
	spin_lock_init(&priv->slot_lock);
	init_waitqueue_head(&priv->slot_freed);
	priv->cmd_queues = 1;
	init_completion(&priv->hello_done);
	INIT_DELAYED_WORK(&priv->work, tlsnic_work);
	priv->txq = kvcalloc(pairs, sizeof(*priv->txq), GFP_KERNEL);
	priv->rxq = kvcalloc(pairs, sizeof(*priv->rxq), GFP_KERNEL);
	priv->ctrl = kzalloc(sizeof(*priv->ctrl), GFP_KERNEL);
	if (!priv->txq || !priv->rxq || !priv->ctrl) {
		tlsnic_free(priv);
		return NULL;
	}
	tlsnic_queues_init(priv);
	tlsnic_features_init(priv);
	tlsnic_config_init(priv);
	return priv;
}
