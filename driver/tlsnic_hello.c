// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Finding out what the device is, now and again.
 *
 * HELLO is said at probe, when the link or the configuration changes, and when
 * the device reports a context that it does not know. The answer tells whether
 * the device lost its contexts meanwhile. All but the first are said by one
 * work item, so there is never more than one under way.
 */
#include <linux/random.h>
#include <linux/slab.h>

#include "tlsnic.h"

/* A HELLO_REPLY came in (NAPI of rx queue 0); late answers have an old nonce */
void tlsnic_hello_received(struct tlsnic_priv *priv,
			   const struct tlsnic_hello_reply *reply)
{
	u64 nonce = READ_ONCE(priv->hello_nonce);

	if (!nonce || le64_to_cpu(reply->nonce) != nonce)
		return;
	priv->hello_reply = *reply;
	WRITE_ONCE(priv->hello_nonce, 0);
	complete(&priv->hello_done);
}

static void tlsnic_hello_apply(struct tlsnic_priv *priv)
{
	const struct tlsnic_hello_reply *reply = &priv->hello_reply;

	priv->boot_id = le64_to_cpu(reply->boot_id);
	priv->caps = le32_to_cpu(reply->caps);
	priv->ciphers = le32_to_cpu(reply->ciphers);
	priv->max_contexts = min(le32_to_cpu(reply->max_contexts),
				 TLSNIC_MAX_CONTEXTS);
	WRITE_ONCE(priv->posts_adds, priv->caps & TLSNIC_CAP_POSTED_ADD);
	WRITE_ONCE(priv->tx_personality, reply->tx_personality);
	WRITE_ONCE(priv->rx_personality, reply->rx_personality);
	memcpy(priv->device_version, reply->device_version,
	       sizeof(reply->device_version));
}

/*
 * Say HELLO and wait for the answer. Returns 1 if the device is not the one we
 * knew (its boot_id differs), 0 if it is, or -ETIMEDOUT, -ENOMEM, -EPROTO.
 */
int tlsnic_hello(struct tlsnic_priv *priv, u32 flags)
{
	u64 boot_id = priv->boot_id;
	struct tlsnic_hello *hello;
	struct tlsnic_cmd *cmd;
	u64 nonce;

	cmd = tlsnic_cmd_alloc(sizeof(*hello), 0, GFP_KERNEL);
	if (!cmd)
		return -ENOMEM;
	do {
		nonce = get_random_u64();
	} while (!nonce);

	hello = tlsnic_cmd_ext(cmd);
	ether_addr_copy(hello->dst, eth_reserved_addr_base);
	hello->dst[5] = 0x0e;
	ether_addr_copy(hello->src, priv->dev->dev_addr);
	hello->ethertype_be = htons(TLSNIC_HELLO_ETHERTYPE);
	hello->version = cpu_to_le16(TLSNIC_ABI_VERSION);
	memcpy(hello->magic, TLSNIC_HELLO_MAGIC, sizeof(hello->magic));
	hello->nonce = cpu_to_le64(nonce);
	hello->flags = cpu_to_le32(flags);

	reinit_completion(&priv->hello_done);
	WRITE_ONCE(priv->hello_nonce, nonce);
	/* until the device allows it anew, whoever adds a context waits */
	WRITE_ONCE(priv->posts_adds, false);
	tlsnic_cmd_post(&priv->txq[0], cmd);
	tlsnic_inc(priv, hello);
	if (!wait_for_completion_timeout(&priv->hello_done,
					 TLSNIC_HELLO_TIMEOUT)) {
		WRITE_ONCE(priv->hello_nonce, 0);
		tlsnic_inc(priv, hello_timeout);
		return -ETIMEDOUT;
	}
	if (le16_to_cpu(priv->hello_reply.version) != TLSNIC_ABI_VERSION)
		return -EPROTO;
	tlsnic_hello_apply(priv);
	return priv->boot_id != boot_id;
}

bool tlsnic_link_up(struct tlsnic_priv *priv)
{
	u16 status;

	if (!virtio_has_feature(priv->vdev, VIRTIO_NET_F_STATUS))
		return true;
	virtio_cread(priv->vdev, struct virtio_net_config, status, &status);
	return status & VIRTIO_NET_S_LINK_UP;
}

/* Say HELLO again if asked to; mark the contexts of a device that is new */
static void tlsnic_hello_again(struct tlsnic_priv *priv)
{
	int ret;

	if (!test_and_clear_bit(TLSNIC_F_HELLO_WANTED, &priv->flags))
		return;
	ret = tlsnic_hello(priv, 0);
	if (ret > 0)
		tlsnic_ctx_all_lost(priv);
	if (ret >= 0) {
		priv->hello_attempts = 0;
	} else if (++priv->hello_attempts < TLSNIC_HELLO_ATTEMPTS) {
		tlsnic_kick_work(priv, true);
	} else {
		priv->hello_attempts = 0;
		netdev_warn(priv->dev, "the device does not answer\n");
	}
}

/*
 * Follow the link, and keep the device's contexts equal to ours. The contexts
 * of a lost device are marked before the carrier is announced, so the stack's
 * first packets already go the software way.
 */
void tlsnic_work(struct work_struct *work)
{
	struct tlsnic_priv *priv = container_of(to_delayed_work(work),
						struct tlsnic_priv, work);

	if (test_bit(TLSNIC_F_NO_WORK, &priv->flags))
		return;
	if (!tlsnic_link_up(priv)) {
		netif_carrier_off(priv->dev);
		return;
	}
	tlsnic_hello_again(priv);
	netif_carrier_on(priv->dev);
	tlsnic_ctx_recreate(priv);
}

/* Any context. @hello: the device may have changed, not only the link */
void tlsnic_kick_work(struct tlsnic_priv *priv, bool hello)
{
	if (hello)
		set_bit(TLSNIC_F_HELLO_WANTED, &priv->flags);
	if (!test_bit(TLSNIC_F_NO_WORK, &priv->flags))
		schedule_delayed_work(&priv->work, 0);
}

/*
 * Ask for the names of the device's counters. Done once: `ethtool -S` sizes
 * its buffer by them, so their number must not change under it.
 */
int tlsnic_stat_names(struct tlsnic_priv *priv)
{
	unsigned int count = min_t(unsigned int, TLSNIC_MAX_DEV_STATS,
				   le16_to_cpu(priv->hello_reply.stat_count));
	struct tlsnic_cmd *cmd;
	unsigned int i;

	if (!count)
		return 0;
	cmd = tlsnic_command(TLSNIC_OP_GET_STAT_NAMES, NULL, 0,
			     sizeof(*cmd->reply) + count * TLSNIC_STAT_NAME_LEN,
			     GFP_KERNEL);
	priv->dev_stats = kcalloc(count, sizeof(u64), GFP_KERNEL);
	priv->dev_stat_names = kcalloc(count, TLSNIC_STAT_NAME_LEN,
				       GFP_KERNEL);
	if (!cmd || !priv->dev_stats || !priv->dev_stat_names) {
		tlsnic_cmd_put(cmd);
		return -ENOMEM;
	}
	if (!tlsnic_cmd_exec(&priv->txq[0], cmd)) {
		count = min_t(unsigned int, count,
			      cmd->reply_len / TLSNIC_STAT_NAME_LEN);
		memcpy(priv->dev_stat_names, cmd->reply + 1,
		       count * TLSNIC_STAT_NAME_LEN);
		for (i = 0; i < count; i++)
			priv->dev_stat_names[i][TLSNIC_STAT_NAME_LEN - 1] = 0;
		priv->dev_stat_count = count;
	}
	tlsnic_cmd_put(cmd);
	return 0;
}

/* Refresh priv->dev_stats; a device that is away leaves the old values */
void tlsnic_stat_values(struct tlsnic_priv *priv)
{
	struct tlsnic_cmd *cmd;
	unsigned int i, count;
	__le64 *values;

	if (!priv->dev_stat_count || !netif_carrier_ok(priv->dev))
		return;
	cmd = tlsnic_command(TLSNIC_OP_GET_STATS, NULL, 0,
			     sizeof(*cmd->reply) +
			     priv->dev_stat_count * sizeof(u64), GFP_KERNEL);
	if (!cmd)
		return;
	if (!tlsnic_cmd_exec(&priv->txq[0], cmd)) {
		values = (__le64 *)(cmd->reply + 1);
		count = min_t(unsigned int, priv->dev_stat_count,
			      cmd->reply_len / sizeof(u64));
		for (i = 0; i < count; i++)
			priv->dev_stats[i] = le64_to_cpu(values[i]);
	}
	tlsnic_cmd_put(cmd);
}
