// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Probe and remove.
 *
 * Every virtio network device may be ours; only its answer to HELLO tells. A
 * device that does not answer is reset, left, and refused with -ENODEV, so the
 * driver core offers it to virtio_net.
 *
 * A device without link cannot answer: its backend may be away. It is kept, and
 * asked when the link comes up. If it is not ours then, it is let go: the driver
 * core detaches it and offers it around again, to this driver as well. That is
 * work of its own: it waits for the device's lock, and whoever removes the
 * device holds the lock while waiting for our other work.
 */
#include <linux/delay.h>
#include <linux/module.h>
#include <linux/slab.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ids.h>

#include "tlsnic.h"

static struct workqueue_struct *tlsnic_wq;

struct tlsnic_release {
	struct work_struct work;
	struct device *dev;
};

/* Interrupts that came before were for nobody: look what there is */
static void tlsnic_napi_enable(struct tlsnic_priv *priv)
{
	unsigned int i;

	for (i = 0; i < priv->max_pairs; i++) {
		napi_enable(&priv->rxq[i].napi);
		napi_enable(&priv->txq[i].napi);
		local_bh_disable();
		napi_schedule(&priv->rxq[i].napi);
		napi_schedule(&priv->txq[i].napi);
		local_bh_enable();
	}
}

static void tlsnic_napi_disable(struct tlsnic_priv *priv)
{
	unsigned int i;

	for (i = 0; i < priv->max_pairs; i++) {
		napi_disable(&priv->rxq[i].napi);
		napi_disable(&priv->txq[i].napi);
	}
}

/* Find the queues: rx0 tx0 rx1 tx1 ... and, if offered, control */
static int tlsnic_find_queues(struct tlsnic_priv *priv)
{
	bool ctrl = virtio_has_feature(priv->vdev, VIRTIO_NET_F_CTRL_VQ);
	unsigned int i, n = priv->max_pairs * 2 + ctrl;
	struct virtqueue_info *info;
	struct virtqueue **vqs;
	int err = -ENOMEM;

	info = kcalloc(n, sizeof(*info), GFP_KERNEL);
	vqs = kcalloc(n, sizeof(*vqs), GFP_KERNEL);
	if (!info || !vqs)
		goto free;
	for (i = 0; i < priv->max_pairs; i++) {
		info[2 * i].name = priv->rxq[i].name;
		info[2 * i].callback = tlsnic_rx_done;
		info[2 * i + 1].name = priv->txq[i].name;
		info[2 * i + 1].callback = tlsnic_tx_done;
	}
	if (ctrl)
		info[n - 1].name = "control";
	err = tlsnic_find_vqs(priv->vdev, n, vqs, info);
	if (err)
		goto free;
	for (i = 0; i < priv->max_pairs; i++) {
		priv->rxq[i].vq = vqs[2 * i];
		priv->txq[i].vq = vqs[2 * i + 1];
	}
	priv->cvq = ctrl ? vqs[n - 1] : NULL;
	priv->rx_ring_size = virtqueue_get_vring_size(vqs[0]);
	priv->tx_ring_size = virtqueue_get_vring_size(vqs[1]);
	if (priv->tx_ring_size < TLSNIC_TX_ROOM) {
		priv->vdev->config->del_vqs(priv->vdev);
		err = -EINVAL;
	}
free:
	kfree(info);
	kfree(vqs);
	return err;
}

/*
 * Stop the device and take everything back; remove and freeze. May find it
 * stopped, after a restore that failed.
 */
static void tlsnic_rings_stop(struct tlsnic_priv *priv)
{
	struct netdev_queue *nq = netdev_get_tx_queue(priv->dev, 0);
	unsigned int i;

	if (!priv->running)
		return;
	__netif_tx_lock_bh(nq);
	WRITE_ONCE(priv->running, false);
	__netif_tx_unlock_bh(nq);
	tlsnic_napi_disable(priv);
	/*
	 * The NAPI may have woken a queue that freezing had stopped. And who
	 * posts looks at @running under the lock of a queue, each of which this
	 * takes: nobody is left who saw it set.
	 */
	netif_tx_disable(priv->dev);
	virtio_reset_device(priv->vdev);
	for (i = 0; i < priv->max_pairs; i++) {
		cancel_delayed_work_sync(&priv->txq[i].late);
		tlsnic_tx_free(&priv->txq[i]);
		tlsnic_rx_free(&priv->rxq[i]);
	}
	priv->cvq = NULL;
	tlsnic_unspread(priv);
	priv->vdev->config->del_vqs(priv->vdev);
}

/* Start the device's queues; commands work from here on */
static int tlsnic_rings_start(struct tlsnic_priv *priv)
{
	unsigned int i;
	int err;

	err = tlsnic_find_queues(priv);
	if (err)
		return err;
	virtio_device_ready(priv->vdev);
	priv->running = true;
	/* before NAPI, which fills too: frames may come with the first buffer */
	for (i = 0; i < priv->max_pairs && !err; i++)
		if (!tlsnic_rx_fill(&priv->rxq[i], GFP_KERNEL))
			err = -ENOMEM;
	tlsnic_napi_enable(priv);
	if (err)
		tlsnic_rings_stop(priv);
	return err;
}

static unsigned int tlsnic_max_pairs(struct virtio_device *vdev)
{
	u16 pairs;

	if (!virtio_has_feature(vdev, VIRTIO_NET_F_MQ) ||
	    !virtio_has_feature(vdev, VIRTIO_NET_F_CTRL_VQ))
		return 1;
	virtio_cread(vdev, struct virtio_net_config, max_virtqueue_pairs,
		     &pairs);
	return pairs;
}

/* Ask who the device is, and take what it tells */
static int tlsnic_discover(struct tlsnic_priv *priv)
{
	unsigned int pairs = min(priv->max_pairs, num_online_cpus());
	int err;

	err = tlsnic_hello(priv, TLSNIC_HELLO_F_RESET);
	if (err == -ETIMEDOUT || err == -EPROTO) {
		dev_info(&priv->vdev->dev,
			 "not a tlsnic, leaving it to another driver\n");
		return -ENODEV;
	}
	if (err < 0)
		return err;
	err = tlsnic_slots_init(priv);
	if (err)
		return err;
	err = tlsnic_stat_names(priv);
	if (err)
		return err;
	if (tlsnic_set_pairs(priv, pairs)) {
		dev_warn(&priv->vdev->dev, "cannot use %u queues\n", pairs);
		priv->pairs = 1;
	}
	return netif_set_real_num_queues(priv->dev, priv->pairs, priv->pairs);
}

static int tlsnic_adopt(struct tlsnic_priv *priv)
{
	int err;

	err = tlsnic_discover(priv);
	if (err)
		return err;
	tlsnic_ktls_init(priv);
	netif_carrier_off(priv->dev);
	tlsnic_spread(priv);
	err = register_netdev(priv->dev);
	if (err)
		return err;
	priv->adopted = true;
	clear_bit(TLSNIC_F_NO_WORK, &priv->flags);
	tlsnic_kick_work(priv, false);
	return 0;
}

static void tlsnic_release_work(struct work_struct *work)
{
	struct tlsnic_release *release = container_of(work, typeof(*release),
						      work);

	if (device_reprobe(release->dev))
		dev_warn(release->dev, "no driver wants it\n");
	put_device(release->dev);
	kfree(release);
}

/* What was kept without knowing it turned out not to be ours */
static void tlsnic_let_go(struct tlsnic_priv *priv)
{
	struct tlsnic_release *release = kmalloc(sizeof(*release), GFP_KERNEL);

	if (!release)
		return;
	INIT_WORK(&release->work, tlsnic_release_work);
	release->dev = get_device(&priv->vdev->dev);
	queue_work(tlsnic_wq, &release->work);
}

/* The link of a device that could not be asked has changed */
static void tlsnic_adopt_work(struct work_struct *work)
{
	struct tlsnic_priv *priv = container_of(work, struct tlsnic_priv,
						adopt);
	int err;

	if (priv->adopted || !tlsnic_link_up(priv))
		return;
	err = tlsnic_adopt(priv);
	/* without an answer since it is away again: wait on */
	if (err == -ENODEV && !tlsnic_link_up(priv))
		return;
	if (err)
		tlsnic_let_go(priv);
}

static int tlsnic_probe(struct virtio_device *vdev)
{
	unsigned int pairs;
	struct tlsnic_priv *priv;
	int err;

	if (!virtio_has_feature(vdev, VIRTIO_F_VERSION_1) ||
	    !virtio_has_feature(vdev, VIRTIO_NET_F_MRG_RXBUF))
		return -ENODEV;
	pairs = tlsnic_max_pairs(vdev);
	if (!pairs || pairs > TLSNIC_MAX_PAIRS)
		return -ENODEV;
	priv = tlsnic_alloc(vdev, pairs);
	if (!priv)
		return -ENOMEM;
	vdev->priv = priv;
	INIT_WORK(&priv->adopt, tlsnic_adopt_work);
	err = tlsnic_rings_start(priv);
	if (err)
		goto free;
	if (!tlsnic_link_up(priv)) {
		dev_info(&vdev->dev, "no link, waiting for one\n");
		return 0;
	}
	err = tlsnic_adopt(priv);
	if (!err)
		return 0;
	tlsnic_rings_stop(priv);
free:
	tlsnic_free(priv);
	return err;
}

/* Give the device a moment to take the deletes that nobody waited for */
static void tlsnic_settle(struct tlsnic_priv *priv)
{
	unsigned long deadline = jiffies + HZ;

	while (atomic_read(&priv->commands) && netif_carrier_ok(priv->dev) &&
	       time_before(jiffies, deadline))
		usleep_range(500, 1000);
}

/*
 * The carrier of an unregistered device must not change, so the work has
 * nothing to do any more before that. Unregistering deletes the contexts, so
 * the rings stop after it. Interrupt or NAPI may have asked for the work in
 * vain meanwhile, hence it is cancelled again.
 */
static void tlsnic_remove(struct virtio_device *vdev)
{
	struct tlsnic_priv *priv = vdev->priv;

	cancel_work_sync(&priv->adopt);
	set_bit(TLSNIC_F_NO_WORK, &priv->flags);
	cancel_delayed_work_sync(&priv->work);
	if (priv->adopted) {
		unregister_netdev(priv->dev);
		tlsnic_settle(priv);
	}
	tlsnic_rings_stop(priv);
	cancel_delayed_work_sync(&priv->work);
	tlsnic_free(priv);
}

static void tlsnic_config_changed(struct virtio_device *vdev)
{
	struct tlsnic_priv *priv = vdev->priv;

	tlsnic_kick_work(priv, true);
	queue_work(tlsnic_wq, &priv->adopt);
}

#ifdef CONFIG_PM_SLEEP
static int tlsnic_freeze(struct virtio_device *vdev)
{
	struct tlsnic_priv *priv = vdev->priv;

	cancel_work_sync(&priv->adopt);
	set_bit(TLSNIC_F_NO_WORK, &priv->flags);
	netif_tx_lock_bh(priv->dev);
	netif_device_detach(priv->dev);
	netif_tx_unlock_bh(priv->dev);
	tlsnic_rings_stop(priv);
	cancel_delayed_work_sync(&priv->work);
	return 0;
}

/* The device forgot everything; the work re-creates the contexts */
static int tlsnic_restore(struct virtio_device *vdev)
{
	struct tlsnic_priv *priv = vdev->priv;
	int err;

	err = tlsnic_rings_start(priv);
	if (err)
		return err;
	if (!priv->adopted) {
		queue_work(tlsnic_wq, &priv->adopt);
		return 0;
	}
	err = tlsnic_hello(priv, TLSNIC_HELLO_F_RESET);
	if (err < 0)
		netdev_warn(priv->dev, "the device does not answer\n");
	tlsnic_ctx_all_lost(priv);
	if (tlsnic_set_pairs(priv, priv->pairs))
		netdev_warn(priv->dev, "cannot use %u queues\n", priv->pairs);
	rtnl_lock();
	tlsnic_spread(priv);
	rtnl_unlock();
	netif_device_attach(priv->dev);
	clear_bit(TLSNIC_F_NO_WORK, &priv->flags);
	tlsnic_kick_work(priv, err < 0);
	return 0;
}
#endif

static const struct virtio_device_id tlsnic_ids[] = {
	{ VIRTIO_ID_NET, VIRTIO_DEV_ANY_ID },
	{ 0 },
};

static const unsigned int tlsnic_features[] = {
	VIRTIO_F_VERSION_1,
	VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_MTU,
	VIRTIO_NET_F_MAC, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
	VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_HOST_TSO4,
	VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_ECN,
	VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_STATUS, VIRTIO_NET_F_CTRL_VQ,
	VIRTIO_NET_F_MQ, VIRTIO_NET_F_CTRL_MAC_ADDR,
};

static struct virtio_driver tlsnic_driver = {
	.driver.name = KBUILD_MODNAME,
	.feature_table = tlsnic_features,
	.feature_table_size = ARRAY_SIZE(tlsnic_features),
	.id_table = tlsnic_ids,
	.probe = tlsnic_probe,
	.remove = tlsnic_remove,
	.config_changed = tlsnic_config_changed,
#ifdef CONFIG_PM_SLEEP
	.freeze = tlsnic_freeze,
	.restore = tlsnic_restore,
#endif
};

static int __init tlsnic_init(void)
{
	int err;

	tlsnic_wq = alloc_workqueue("tlsnic", WQ_UNBOUND, 0);
	if (!tlsnic_wq)
		return -ENOMEM;
	err = register_virtio_driver(&tlsnic_driver);
	if (err)
		destroy_workqueue(tlsnic_wq);
	return err;
}
module_init(tlsnic_init);

static void __exit tlsnic_exit(void)
{
	unregister_virtio_driver(&tlsnic_driver);
	destroy_workqueue(tlsnic_wq);
}
module_exit(tlsnic_exit);

MODULE_DEVICE_TABLE(virtio, tlsnic_ids);
MODULE_DESCRIPTION("Virtio network device with inline TLS");
MODULE_VERSION(TLSNIC_DRIVER_VERSION);
MODULE_LICENSE("Dual BSD/GPL");
