// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * What the kernel's TLS asks of a driver: struct tlsdev_ops.
 *
 * add and tx resync run in process context under the socket's lock; rx resync
 * may run in softirq and must not sleep; del runs under RTNL when the interface
 * goes down, and after the socket was freed when it was closed. None of them
 * takes RTNL or waits for one who does. driver_state holds a pointer to our
 * struct tlsnic_ctx. A tx context outlives its socket and does not know it; an
 * rx context ends before it (tlsnic_resync.c).
 */
#include <linux/slab.h>
#include <net/inet_sock.h>
#include <net/ipv6.h>

#include "tlsnic.h"

static struct tlsnic_ctx **tlsnic_state(struct tls_context *tls_ctx,
					enum tls_offload_ctx_dir direction)
{
	BUILD_BUG_ON(sizeof(struct tlsnic_ctx *) > TLS_DRIVER_STATE_SIZE_TX);
	BUILD_BUG_ON(sizeof(struct tlsnic_ctx *) > TLS_DRIVER_STATE_SIZE_RX);
	BUILD_BUG_ON((int)TLSNIC_DIR_RX != (int)TLS_OFFLOAD_CTX_DIR_RX);
	BUILD_BUG_ON((int)TLSNIC_DIR_TX != (int)TLS_OFFLOAD_CTX_DIR_TX);
	return __tls_driver_ctx(tls_ctx, direction);
}

/*
 * The tx context of a socket if it is one of this device, else NULL (another
 * port of a bond, device going down). Called from ndo_start_xmit.
 */
struct tlsnic_ctx *tlsnic_tx_ctx(struct tlsnic_priv *priv, struct sock *sk)
{
	struct tls_context *tls_ctx = tls_get_ctx(sk);

	if (rcu_dereference_bh(tls_ctx->netdev) != priv->dev)
		return NULL;
	return READ_ONCE(*tlsnic_state(tls_ctx, TLS_OFFLOAD_CTX_DIR_TX));
}

/* The two AES-GCM ciphers differ in the key's size only */
static void tlsnic_fill_gcm(struct tlsnic_ctx_add *add, const u8 *key,
			    u8 key_len, const u8 *iv, const u8 *salt,
			    const u8 *rec_seq)
{
	BUILD_BUG_ON(sizeof(add->key) < TLS_CIPHER_AES_GCM_256_KEY_SIZE);
	BUILD_BUG_ON(sizeof(add->iv) < TLS_CIPHER_AES_GCM_128_IV_SIZE);
	BUILD_BUG_ON(sizeof(add->salt) < TLS_CIPHER_AES_GCM_128_SALT_SIZE);
	BUILD_BUG_ON(sizeof(add->rec_seq) <
		     TLS_CIPHER_AES_GCM_128_REC_SEQ_SIZE);

	add->key_len = key_len;
	add->iv_len = TLS_CIPHER_AES_GCM_128_IV_SIZE;
	add->salt_len = TLS_CIPHER_AES_GCM_128_SALT_SIZE;
	add->rec_seq_len = TLS_CIPHER_AES_GCM_128_REC_SEQ_SIZE;
	memcpy(add->key, key, add->key_len);
	memcpy(add->iv, iv, add->iv_len);
	memcpy(add->salt, salt, add->salt_len);
	memcpy(add->rec_seq, rec_seq, add->rec_seq_len);
}

/* Copy the crypto parameters; -EOPNOTSUPP if the device lacks the cipher */
static int tlsnic_fill_crypto(u32 ciphers, struct tlsnic_ctx_add *add,
			      const struct tls_crypto_info *info)
{
	const struct tls12_crypto_info_aes_gcm_128 *gcm_128;
	const struct tls12_crypto_info_aes_gcm_256 *gcm_256;

	if (info->version != TLS_1_2_VERSION)
		return -EOPNOTSUPP;
	switch (info->cipher_type) {
	case TLS_CIPHER_AES_GCM_128:
		if (!(ciphers & TLSNIC_CIPHER_TLS_1_2_AES_GCM_128))
			return -EOPNOTSUPP;
		gcm_128 = container_of(info, typeof(*gcm_128), info);
		tlsnic_fill_gcm(add, gcm_128->key, sizeof(gcm_128->key),
				gcm_128->iv, gcm_128->salt, gcm_128->rec_seq);
		break;
	case TLS_CIPHER_AES_GCM_256:
		if (!(ciphers & TLSNIC_CIPHER_TLS_1_2_AES_GCM_256))
			return -EOPNOTSUPP;
		gcm_256 = container_of(info, typeof(*gcm_256), info);
		tlsnic_fill_gcm(add, gcm_256->key, sizeof(gcm_256->key),
				gcm_256->iv, gcm_256->salt, gcm_256->rec_seq);
		break;
	default:
		return -EOPNOTSUPP;
	}
	add->tls_version = cpu_to_le16(info->version);
	add->cipher = cpu_to_le16(info->cipher_type);
	return 0;
}

/* The connection as it is on the wire: a v4-mapped socket speaks IPv4 */
static void tlsnic_fill_tuple(struct tlsnic_ctx_add *add, const struct sock *sk)
{
	const struct inet_sock *inet = inet_sk(sk);

	add->local_port = cpu_to_le16(ntohs(inet->inet_sport));
	add->remote_port = cpu_to_le16(ntohs(inet->inet_dport));
#if IS_ENABLED(CONFIG_IPV6)
	if (sk->sk_family == AF_INET6 &&
	    !ipv6_addr_v4mapped(&sk->sk_v6_daddr)) {
		add->family = 6;
		memcpy(add->local_addr, &inet6_sk(sk)->saddr, 16);
		memcpy(add->remote_addr, &sk->sk_v6_daddr, 16);
		return;
	}
#endif
	add->family = 4;
	memcpy(add->local_addr, &inet->inet_saddr, 4);
	memcpy(add->remote_addr, &inet->inet_daddr, 4);
}

/*
 * The device does not follow source routes: on their way the addresses are not
 * those of the socket.
 */
static bool tlsnic_source_routed(const struct sock *sk)
{
	struct ip_options_rcu *opt4;
#if IS_ENABLED(CONFIG_IPV6)
	struct ipv6_txoptions *opt6;

	if (sk->sk_family == AF_INET6) {
		opt6 = rcu_dereference_protected(inet6_sk(sk)->opt,
						 lockdep_sock_is_held(sk));
		if (opt6 && opt6->srcrt)
			return true;
	}
#endif
	opt4 = rcu_dereference_protected(inet_sk(sk)->inet_opt,
					 lockdep_sock_is_held(sk));
	return opt4 && opt4->opt.srr;
}

static int tlsnic_prepare(struct tlsnic_priv *priv, struct tlsnic_ctx *ctx,
			  struct sock *sk, enum tls_offload_ctx_dir direction,
			  const struct tls_crypto_info *info, u32 start_seq)
{
	ctx->dir = (enum tlsnic_dir)direction;
	ctx->add.dir = ctx->dir;
	ctx->add.start_seq = cpu_to_le32(start_seq);
	ctx->home = sk_tx_queue_get(sk);
	/* the device may have another by now: let both go by this one */
	if (ctx->dir == TLSNIC_DIR_RX)
		ctx->add.rx_personality = READ_ONCE(priv->rx_personality);
	if (tlsnic_source_routed(sk))
		return -EOPNOTSUPP;
	tlsnic_fill_tuple(&ctx->add, sk);
	return tlsnic_fill_crypto(priv->ciphers, &ctx->add, info);
}

static int tlsnic_tls_add(struct net_device *dev, struct sock *sk,
			  enum tls_offload_ctx_dir direction,
			  struct tls_crypto_info *info, u32 start_seq)
{
	struct tlsnic_priv *priv = netdev_priv(dev);
	bool tx = direction == TLS_OFFLOAD_CTX_DIR_TX;
	struct tlsnic_ctx *ctx;
	int err;

	/* without a link nobody answers: do not make the application wait */
	if (!netif_carrier_ok(dev)) {
		tlsnic_inc(priv, tls_add_failed);
		return -ENETDOWN;
	}
	ctx = kzalloc(sizeof(*ctx), GFP_KERNEL);
	if (!ctx)
		return -ENOMEM;
	err = tlsnic_prepare(priv, ctx, sk, direction, info, start_seq);
	if (err) {
		tlsnic_inc(priv, tls_add_unsupported);
		goto free;
	}
	err = tlsnic_ctx_install(priv, ctx);
	if (err) {
		tlsnic_inc(priv, tls_add_failed);
		goto free;
	}

	if (tx) {
		tlsnic_inc(priv, tx_tls_ctx);
	} else {
		tlsnic_inc(priv, rx_tls_ctx);
		tlsnic_resync_init(ctx, sk);
	}
	WRITE_ONCE(*tlsnic_state(tls_get_ctx(sk), direction), ctx);
	return 0;

free:
	tlsnic_ctx_free(ctx);
	return err;
}

static void tlsnic_tls_del(struct net_device *dev, struct tls_context *tls_ctx,
			   enum tls_offload_ctx_dir direction)
{
	struct tlsnic_ctx **state = tlsnic_state(tls_ctx, direction);
	struct tlsnic_ctx *ctx = *state;
	/* not @dev: of two legs of a bond the stack may name the other one */
	struct tlsnic_priv *priv = ctx->priv;

	WRITE_ONCE(*state, NULL);
	if (direction == TLS_OFFLOAD_CTX_DIR_TX) {
		tlsnic_inc(priv, tx_tls_del);
	} else {
		tlsnic_inc(priv, rx_tls_del);
		/* the stack's rx state goes when we return */
		tlsnic_resync_stop(ctx);
	}
	tlsnic_ctx_remove(ctx);
}

/*
 * The stack will send record @rcd_sn at @seq; its first packet says so. While
 * the device is without the context the stack is to try again with the next
 * record, at the price of two locks for each; not where that is for good.
 */
static int tlsnic_tx_resync(struct tlsnic_ctx *ctx, u32 seq, u64 rcd_sn)
{
	int err;

	spin_lock_bh(&ctx->lock);
	err = ctx->refused ? 0 : -EAGAIN;
	if (ctx->on_device) {
		ctx->in_sync = true;
		ctx->resync = true;
		ctx->expected_seq = seq;
		ctx->resync_rcd_sn = rcd_sn;
		err = 0;
	}
	spin_unlock_bh(&ctx->lock);
	return err;
}

static int tlsnic_tls_resync(struct net_device *dev, struct sock *sk, u32 seq,
			     u8 *rcd_sn_be, enum tls_offload_ctx_dir direction)
{
	struct tlsnic_ctx *ctx;
	__be64 rcd_sn;

	ctx = READ_ONCE(*tlsnic_state(tls_get_ctx(sk), direction));
	if (!ctx)
		return -ENOENT;
	memcpy(&rcd_sn, rcd_sn_be, sizeof(rcd_sn));
	if (direction == TLS_OFFLOAD_CTX_DIR_TX)
		return tlsnic_tx_resync(ctx, seq, be64_to_cpu(rcd_sn));
	return tlsnic_resync_answer(ctx, sk, seq, be64_to_cpu(rcd_sn));
}

static const struct tlsdev_ops tlsnic_tlsdev_ops = {
	.tls_dev_add = tlsnic_tls_add,
	.tls_dev_del = tlsnic_tls_del,
	.tls_dev_resync = tlsnic_tls_resync,
};

/* Before register_netdev(): the kernel looks at the ops when it sees the bits */
void tlsnic_ktls_init(struct tlsnic_priv *priv)
{
	struct net_device *dev = priv->dev;

	dev->tlsdev_ops = &tlsnic_tlsdev_ops;
	if (priv->caps & TLSNIC_CAP_TX)
		dev->hw_features |= NETIF_F_HW_TLS_TX;
	if (priv->caps & TLSNIC_CAP_RX)
		dev->hw_features |= NETIF_F_HW_TLS_RX;
	dev->features |= dev->hw_features &
			 (NETIF_F_HW_TLS_TX | NETIF_F_HW_TLS_RX);
}
