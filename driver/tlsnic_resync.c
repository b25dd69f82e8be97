// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * How an rx context finds its place again: the device's questions to the stack,
 * the stack's answers to the device.
 *
 * The stack knows three ways. The device's rx personality when the context was
 * made names one; CTX_ADD says which, so that both sides keep to it:
 *
 * DRIVER_REQ           the device asks about one record start. Question and
 *                      answer name the last byte of the header.
 * DRIVER_REQ_ASYNC     the device opens an attempt before it knows which record
 *                      start it means; the stack notes those it meets. Later
 *                      the device submits one of them, or gives up.
 * CORE_NEXT_HINT       the device is silent; the stack tells of the next record
 *                      when it had to decrypt some itself.
 *
 * Questions come with a frame and are passed on before the frame is, so that
 * the stack meets them first. They need the socket, which is there from
 * tls_dev_add until tls_dev_del, and ctx->lock, since NAPI may be at it then.
 */
#include <linux/tcp.h>

#include "tlsnic.h"

/*
 * The stack counts the records of an open attempt in 16 bits and complains when
 * they are used up. A device that does not end an attempt by then forgot about
 * it. Whether it still speaks of the context does not matter, so we look at the
 * count from time to time, less often while nothing comes: no processor
 * decrypts half of these records before the next look.
 */
#define TLSNIC_ATTEMPT_RECORDS	(U16_MAX / 2)
#define TLSNIC_ATTEMPT_LOOK	(HZ / 50)
#define TLSNIC_ATTEMPT_LOOK_MAX	(HZ / 4)

static enum tls_offload_sync_type
tlsnic_sync_type(const struct tlsnic_ctx *ctx)
{
	switch (ctx->add.rx_personality) {
	case TLSNIC_RX_DRIVER_REQ:
	case TLSNIC_RX_IDEAL:
		return TLS_OFFLOAD_SYNC_TYPE_DRIVER_REQ;
	case TLSNIC_RX_DRIVER_REQ_ASYNC:
		return TLS_OFFLOAD_SYNC_TYPE_DRIVER_REQ_ASYNC;
	default:
		return TLS_OFFLOAD_SYNC_TYPE_CORE_NEXT_HINT;
	}
}

/* An attempt ends without a guess. Under lock. */
static void tlsnic_attempt_cancel(struct tlsnic_ctx *ctx)
{
	if (!ctx->attempt)
		return;
	ctx->attempt = false;
	tls_offload_rx_resync_async_request_cancel(&ctx->async);
	tlsnic_inc(ctx->priv, rx_tls_resync_req_skip);
}

/* How far has the stack come with the attempt that is open, if one is? */
static void tlsnic_attempt_look(struct work_struct *work)
{
	struct tlsnic_ctx *ctx = container_of(to_delayed_work(work),
					      struct tlsnic_ctx, attempt_look);
	unsigned int idle;
	u16 records;

	spin_lock_bh(&ctx->lock);
	records = READ_ONCE(ctx->async.rcd_delta);
	idle = records == ctx->attempt_records ?
	       min(2 * ctx->attempt_wait, TLSNIC_ATTEMPT_LOOK_MAX) : 0;
	ctx->attempt_records = records;
	ctx->attempt_wait = max(idle, TLSNIC_ATTEMPT_LOOK);
	if (records > TLSNIC_ATTEMPT_RECORDS)
		tlsnic_attempt_cancel(ctx);
	if (ctx->attempt)
		schedule_delayed_work(&ctx->attempt_look, ctx->attempt_wait);
	spin_unlock_bh(&ctx->lock);
}

/* A new rx context; from here on the device may ask */
void tlsnic_resync_init(struct tlsnic_ctx *ctx, struct sock *sk)
{
	INIT_DELAYED_WORK(&ctx->attempt_look, tlsnic_attempt_look);
	ctx->sync_type = tlsnic_sync_type(ctx);
	/* for that type alone: the field shares its place with the others' */
	if (ctx->sync_type == TLS_OFFLOAD_SYNC_TYPE_DRIVER_REQ_ASYNC)
		tls_offload_ctx_rx(tls_get_ctx(sk))->resync_async = &ctx->async;
	tls_offload_rx_resync_set_type(sk, ctx->sync_type);
	spin_lock_bh(&ctx->lock);
	ctx->sk = sk;
	spin_unlock_bh(&ctx->lock);
}

/* The device forgot what it asked; any context */
void tlsnic_resync_cancel(struct tlsnic_ctx *ctx)
{
	spin_lock_bh(&ctx->lock);
	tlsnic_attempt_cancel(ctx);
	spin_unlock_bh(&ctx->lock);
}

/* The socket goes: no question reaches it any more; sleeps */
void tlsnic_resync_stop(struct tlsnic_ctx *ctx)
{
	spin_lock_bh(&ctx->lock);
	tlsnic_attempt_cancel(ctx);
	ctx->sk = NULL;
	spin_unlock_bh(&ctx->lock);
	/* the others have no attempts */
	if (ctx->sync_type == TLS_OFFLOAD_SYNC_TYPE_DRIVER_REQ_ASYNC)
		cancel_delayed_work_sync(&ctx->attempt_look);
}

/*
 * One attempt at a time: every start is followed by an end or a skip. Under
 * lock.
 */
static void tlsnic_attempt(struct tlsnic_ctx *ctx, u8 flags, u32 seq, u32 len)
{
	struct tlsnic_priv *priv = ctx->priv;

	if (flags & (TLSNIC_RX_F_RESYNC_START | TLSNIC_RX_F_RESYNC_CANCEL))
		tlsnic_attempt_cancel(ctx);
	if (flags & TLSNIC_RX_F_RESYNC_START) {
		ctx->attempt = true;
		ctx->attempt_wait = TLSNIC_ATTEMPT_LOOK;
		schedule_delayed_work(&ctx->attempt_look, ctx->attempt_wait);
		tlsnic_resync_start(ctx->sk, &ctx->async, cpu_to_be32(seq),
				    min_t(u32, len, U16_MAX));
		tlsnic_inc(priv, rx_tls_resync_req_start);
	} else if (flags & TLSNIC_RX_F_RESYNC_END && ctx->attempt) {
		ctx->attempt = false;
		tlsnic_resync_end(ctx->sk, &ctx->async, cpu_to_be32(seq));
		tlsnic_inc(priv, rx_tls_resync_req_end);
	}
}

/* What the device asks about a context, with a frame. NAPI. */
void tlsnic_resync_question(struct tlsnic_ctx *ctx,
			    const struct tlsnic_rx_tls *tls)
{
	u32 seq = le32_to_cpu(tls->resync_seq);

	if (tls->flags & (TLSNIC_RX_F_RESYNC_REQ | TLSNIC_RX_F_RESYNC_START))
		tlsnic_inc(ctx->priv, rx_tls_resync_req_pkt);
	spin_lock(&ctx->lock);
	if (!ctx->sk)
		goto unlock;
	if (ctx->sync_type == TLS_OFFLOAD_SYNC_TYPE_DRIVER_REQ &&
	    tls->flags & TLSNIC_RX_F_RESYNC_REQ)
		tls_offload_rx_resync_request(ctx->sk,
					      cpu_to_be32(seq + TLS_HEADER_SIZE - 1));
	else if (ctx->sync_type == TLS_OFFLOAD_SYNC_TYPE_DRIVER_REQ_ASYNC)
		tlsnic_attempt(ctx, tls->flags, seq,
			       le32_to_cpu(tls->resync_len));
unlock:
	spin_unlock(&ctx->lock);
}

/* The device's reply to RX_RESYNC; with softirqs disabled */
static void tlsnic_resync_done(struct tlsnic_priv *priv,
			       const struct tlsnic_cmd *cmd)
{
	if (cmd->status)
		tlsnic_inc(priv, rx_tls_resync_res_skip);
	else
		tlsnic_inc(priv, rx_tls_resync_res_ok);
}

/*
 * Where the record starts that the stack hints at, @seq by its own account.
 * The stack hints when it has read a record and finds either more data behind
 * it, or none (tls_device_core_ctrl_rx_resync()). In the latter case it takes
 * copied_seq for the end of that record, which since Linux 6.0 it is only if
 * the parser had to copy the record. Else it is its start.
 */
static u32 tlsnic_hinted_seq(struct sock *sk, u32 seq)
{
	const struct tls_strparser *strp = &tls_sw_ctx_rx(tls_get_ctx(sk))->strp;

	if (seq == tcp_sk(sk)->copied_seq && !strp->copy_mode)
		seq += strp->stm.full_len;
	return seq;
}

/* Record @rcd_sn starts at @seq; tell the device without sleeping */
int tlsnic_resync_answer(struct tlsnic_ctx *ctx, struct sock *sk, u32 seq,
			 u64 rcd_sn)
{
	struct tlsnic_rx_resync body = { .rcd_sn = cpu_to_le64(rcd_sn) };
	/* may not sleep for ctx_mutex; see there */
	struct tlsnic_txq *q = tlsnic_ctx_queue(ctx);
	struct tlsnic_cmd *cmd;

	if (READ_ONCE(ctx->refused))
		return -ENOENT;
	if (ctx->sync_type == TLS_OFFLOAD_SYNC_TYPE_DRIVER_REQ)
		seq -= TLS_HEADER_SIZE - 1;
	else if (ctx->sync_type == TLS_OFFLOAD_SYNC_TYPE_CORE_NEXT_HINT)
		seq = tlsnic_hinted_seq(sk, seq);
	body.tcp_seq = cpu_to_le32(seq);
	cmd = tlsnic_command(TLSNIC_OP_RX_RESYNC, &body, sizeof(body),
			     sizeof(struct tlsnic_reply), GFP_ATOMIC);
	if (!cmd) {
		tlsnic_inc(ctx->priv, rx_tls_resync_res_skip);
		return -ENOMEM;
	}
	tlsnic_command_handle(cmd, ctx->slot, READ_ONCE(ctx->generation));
	cmd->complete = tlsnic_resync_done;
	tlsnic_cmd_post(q ?: &ctx->priv->txq[0], cmd);
	return 0;
}
