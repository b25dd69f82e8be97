// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* The control queue, and the number of queue pairs, which needs it */
#include <linux/cpumask.h>
#include <linux/delay.h>
#include <linux/virtio_config.h>

#include "tlsnic.h"

/*
 * Send a request to the control queue. QEMU answers it while it is notified,
 * so the queue has no interrupt and we look for the answer. Has its own mutex:
 * RTNL is not for us to rely on.
 */
int tlsnic_ctrl(struct tlsnic_priv *priv, u8 class, u8 cmd, const void *data,
		size_t size)
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
	tlsnic_ctx_use_queues(priv, pairs);
	return 0;
}

/*
 * Every pair interrupts processors of its own. No XPS: TCP would take a flow to
 * another queue with its sender, acknowledgements even back and forth, and the
 * device, which answers where a flow sends, would change the order of frames.
 * Under RTNL once the interface is registered.
 */
void tlsnic_spread(struct tlsnic_priv *priv)
{
	unsigned int i, cpu;
	cpumask_var_t cpus;

	if (!zalloc_cpumask_var(&cpus, GFP_KERNEL))
		return;
	for (i = 0; i < min(priv->pairs, nr_cpu_ids); i++) {
		cpumask_clear(cpus);
		for_each_possible_cpu(cpu)
			if (cpu % priv->pairs == i)
				cpumask_set_cpu(cpu, cpus);
		virtqueue_set_affinity(priv->rxq[i].vq, cpus);
		virtqueue_set_affinity(priv->txq[i].vq, cpus);
	}
	free_cpumask_var(cpus);
}

/* What the interrupts are told must be taken back before they go */
void tlsnic_unspread(struct tlsnic_priv *priv)
{
	unsigned int i;

	for (i = 0; i < priv->max_pairs; i++) {
		virtqueue_set_affinity(priv->rxq[i].vq, NULL);
		virtqueue_set_affinity(priv->txq[i].vq, NULL);
	}
}

/* Wait until no packet or command is left in the tx queues from @first on */
static int tlsnic_drain(struct tlsnic_priv *priv, unsigned int first)
{
	unsigned long deadline = jiffies + HZ;
	struct tlsnic_txq *q;
	unsigned int i;

	for (i = first; i < priv->pairs; i++) {
		q = &priv->txq[i];
		while (READ_ONCE(q->posted) != READ_ONCE(q->completed) ||
		       !list_empty_careful(&q->waiting)) {
			if (time_after(jiffies, deadline))
				return -EBUSY;
			usleep_range(500, 1000);
		}
	}
	return 0;
}

/*
 * Contexts' commands go to the first @pairs queues, when the others are empty:
 * a CTX_ADD that is still in one of them must not be overtaken by its CTX_DEL.
 * Nobody else posts to these any more.
 */
static int tlsnic_leave_queues(struct tlsnic_priv *priv, unsigned int pairs)
{
	int err;

	mutex_lock(&priv->ctx_mutex);
	err = tlsnic_drain(priv, pairs);
	if (!err)
		WRITE_ONCE(priv->cmd_queues, pairs);
	mutex_unlock(&priv->ctx_mutex);
	return err;
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
		err = netif_set_real_num_queues(dev, pairs, pairs);
		if (err)
			tlsnic_set_pairs(priv, old);
		tlsnic_spread(priv);
		return err;
	}
	err = netif_set_real_num_queues(dev, pairs, pairs);
	if (err)
		return err;
	err = tlsnic_leave_queues(priv, pairs);
	if (!err)
		err = tlsnic_set_pairs(priv, pairs);
	if (err) {
		tlsnic_ctx_use_queues(priv, old);
		netif_set_real_num_queues(dev, old, old);
	}
	tlsnic_spread(priv);
	return err;
}
