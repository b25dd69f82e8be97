// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* ethtool: who we are, queues, rings, link settings and counters */
#include "tlsnic.h"

static const char * const tlsnic_counter_names[] = {
#define TLSNIC_COUNTER(name)	#name
#include "tlsnic_counters.h"
#undef TLSNIC_COUNTER
};

static const char * const tlsnic_queue_names[] = {
	"rx%u_packets", "rx%u_bytes", "tx%u_packets", "tx%u_bytes",
};

static void tlsnic_get_drvinfo(struct net_device *dev,
			       struct ethtool_drvinfo *info)
{
	struct tlsnic_priv *priv = netdev_priv(dev);

	strscpy(info->driver, KBUILD_MODNAME, sizeof(info->driver));
	strscpy(info->version, TLSNIC_DRIVER_VERSION, sizeof(info->version));
	strscpy(info->fw_version, priv->device_version,
		sizeof(info->fw_version));
	strscpy(info->bus_info, virtio_bus_name(priv->vdev),
		sizeof(info->bus_info));
}

static void tlsnic_get_ringparam(struct net_device *dev,
				 struct ethtool_ringparam *ring,
				 struct kernel_ethtool_ringparam *kernel_ring,
				 struct netlink_ext_ack *extack)
{
	struct tlsnic_priv *priv = netdev_priv(dev);

	ring->rx_max_pending = priv->rx_ring_size;
	ring->tx_max_pending = priv->tx_ring_size;
	ring->rx_pending = priv->rx_ring_size;
	ring->tx_pending = priv->tx_ring_size;
}

static void tlsnic_get_channels(struct net_device *dev,
				struct ethtool_channels *channels)
{
	struct tlsnic_priv *priv = netdev_priv(dev);

	channels->max_combined = priv->max_pairs;
	channels->combined_count = priv->pairs;
}

static int tlsnic_set_channels(struct net_device *dev,
			       struct ethtool_channels *channels)
{
	if (channels->rx_count || channels->tx_count || channels->other_count)
		return -EINVAL;
	return tlsnic_change_pairs(netdev_priv(dev), channels->combined_count);
}

static int tlsnic_get_link_ksettings(struct net_device *dev,
				     struct ethtool_link_ksettings *cmd)
{
	struct tlsnic_priv *priv = netdev_priv(dev);

	cmd->base.speed = priv->speed;
	cmd->base.duplex = priv->duplex;
	cmd->base.port = PORT_OTHER;
	return 0;
}

static int tlsnic_set_link_ksettings(struct net_device *dev,
				     const struct ethtool_link_ksettings *cmd)
{
	struct tlsnic_priv *priv = netdev_priv(dev);

	return ethtool_virtdev_set_link_ksettings(dev, cmd, &priv->speed,
						  &priv->duplex);
}

static int tlsnic_get_sset_count(struct net_device *dev, int sset)
{
	struct tlsnic_priv *priv = netdev_priv(dev);

	if (sset != ETH_SS_STATS)
		return -EOPNOTSUPP;
	return ARRAY_SIZE(tlsnic_counter_names) +
	       priv->max_pairs * ARRAY_SIZE(tlsnic_queue_names) +
	       priv->dev_stat_count;
}

static void tlsnic_get_strings(struct net_device *dev, u32 sset, u8 *data)
{
	struct tlsnic_priv *priv = netdev_priv(dev);
	unsigned int i, j;

	if (sset != ETH_SS_STATS)
		return;
	for (i = 0; i < ARRAY_SIZE(tlsnic_counter_names); i++)
		ethtool_puts(&data, tlsnic_counter_names[i]);
	for (i = 0; i < priv->max_pairs; i++)
		for (j = 0; j < ARRAY_SIZE(tlsnic_queue_names); j++)
			ethtool_sprintf(&data, tlsnic_queue_names[j], i);
	for (i = 0; i < priv->dev_stat_count; i++)
		ethtool_sprintf(&data, "dev_%s", priv->dev_stat_names[i]);
}

static void tlsnic_get_ethtool_stats(struct net_device *dev,
				     struct ethtool_stats *stats, u64 *data)
{
	struct tlsnic_priv *priv = netdev_priv(dev);
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(tlsnic_counter_names); i++)
		*data++ = atomic64_read(&priv->counters[i]);
	for (i = 0; i < priv->max_pairs; i++) {
		tlsnic_queue_stats_read(&priv->rxq[i].stats, data, data + 1);
		tlsnic_queue_stats_read(&priv->txq[i].stats, data + 2,
					data + 3);
		data += ARRAY_SIZE(tlsnic_queue_names);
	}
	tlsnic_stat_values(priv);
	memcpy(data, priv->dev_stats, priv->dev_stat_count * sizeof(*data));
}

const struct ethtool_ops tlsnic_ethtool_ops = {
	.get_drvinfo = tlsnic_get_drvinfo,
	.get_link = ethtool_op_get_link,
	.get_ringparam = tlsnic_get_ringparam,
	.get_channels = tlsnic_get_channels,
	.set_channels = tlsnic_set_channels,
	.get_link_ksettings = tlsnic_get_link_ksettings,
	.set_link_ksettings = tlsnic_set_link_ksettings,
	.get_sset_count = tlsnic_get_sset_count,
	.get_strings = tlsnic_get_strings,
	.get_ethtool_stats = tlsnic_get_ethtool_stats,
	.get_ts_info = ethtool_op_get_ts_info,
};
