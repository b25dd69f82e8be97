// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * The table of contexts: which handle (slot, generation) is whose.
 *
 * ctx_mutex serialises the table's writers and re-creation; readers (rx
 * verdicts, events) use RCU. Nobody waits for RTNL, a socket or the kernel's
 * device_offload_lock under the mutex, and nobody waits there longer than one
 * command may take, or queues that go to be empty.
 *
 * A device that takes posted adds (TLSNIC_CAP_POSTED_ADD) is not waited for. An
 * rx context is posted at once, but without a kick: the device looks before it
 * takes a frame. A tx context is prepared, and goes through the ring of its
 * first packet, directly before it. Queues are not ordered among one another,
 * so a context's later commands take the queue of its CTX_ADD.
 */
#include <linux/slab.h>

#include "tlsnic.h"

/*
 * Contexts' commands go through the first @queues from here on; what was posted
 * to others is their owner's to drain.
 */
void tlsnic_ctx_use_queues(struct tlsnic_priv *priv, unsigned int queues)
{
	mutex_lock(&priv->ctx_mutex);
	WRITE_ONCE(priv->cmd_queues, queues);
	mutex_unlock(&priv->ctx_mutex);
}

/*
 * The queue for what follows the context's CTX_ADD, or NULL if none was sent.
 * One that was taken out of use is drained, so any will do. Under ctx_mutex,
 * held until it is posted; else it may end in a queue that is just going.
 */
struct tlsnic_txq *tlsnic_ctx_queue(struct tlsnic_ctx *ctx)
{
	struct tlsnic_txq *q;

	spin_lock_bh(&ctx->lock);
	q = ctx->add_queue;
	spin_unlock_bh(&ctx->lock);
	if (q && q->index >= READ_ONCE(ctx->priv->cmd_queues))
		return &ctx->priv->txq[0];
	return q;
}

/*
 * The queue for a new context's commands: that of its socket's packets, which
 * bring the kick and take back what is done. Under ctx_mutex.
 */
static struct tlsnic_txq *tlsnic_ctx_home(const struct tlsnic_ctx *ctx)
{
	struct tlsnic_priv *priv = ctx->priv;
	bool known = ctx->home >= 0 && ctx->home < priv->cmd_queues;

	return &priv->txq[known ? ctx->home : 0];
}

/*
 * From here on the software encrypts; tlsnic_ctx_recreate() ends that, but for
 * what was @refused. What was prepared for the device as it was is of no use any
 * more. It is about @generation: there may be another by now.
 */
static void tlsnic_ctx_lost(struct tlsnic_ctx *ctx, u32 generation,
			    bool refused)
{
	struct tlsnic_cmd *prepared;

	spin_lock_bh(&ctx->lock);
	if (ctx->generation != generation) {
		spin_unlock_bh(&ctx->lock);
		return;
	}
	if (refused && !ctx->refused) {
		tlsnic_inc(ctx->priv, tls_add_refused);
		WRITE_ONCE(ctx->refused, true);
	}
	ctx->on_device = false;
	ctx->in_sync = false;
	ctx->resync = false;
	prepared = ctx->prepared;
	ctx->prepared = NULL;
	spin_unlock_bh(&ctx->lock);
	tlsnic_cmd_put(prepared);
	tlsnic_resync_cancel(ctx);
}

/* Only for a context that is not, or no longer, in the table */
void tlsnic_ctx_free(struct tlsnic_ctx *ctx)
{
	memzero_explicit(&ctx->add, sizeof(ctx->add));
	tlsnic_cmd_put(ctx->prepared);
	tlsnic_cmd_put(ctx->del);
	kfree_rcu(ctx, rcu);
}

/* Without @posts it gets a reply, which somebody has to wait for */
static struct tlsnic_cmd *tlsnic_ctx_add_command(const struct tlsnic_ctx *ctx,
						 bool posts)
{
	return tlsnic_command(TLSNIC_OP_CTX_ADD, &ctx->add, sizeof(ctx->add),
			      posts ? 0 : sizeof(struct tlsnic_reply),
			      GFP_KERNEL);
}

/* What does the device say to a CTX_ADD that was posted to @q? Sleeps. */
static int tlsnic_ctx_await_add(struct tlsnic_ctx *ctx, struct tlsnic_txq *q,
				struct tlsnic_cmd *add)
{
	int err = tlsnic_cmd_await(q, add);

	if (err == -EEXIST)
		tlsnic_slot_block(ctx->priv, ctx->slot);
	return err;
}

/*
 * Choose a handle and give the device the keys with @add, now or with the first
 * packet. Events and re-creation know the context from here on, so where it
 * stands is settled before, and a CTX_ADD is in its ring before the mutex is
 * free: what they post comes behind it. -EAGAIN: the device takes no posted add
 * any more.
 */
static int tlsnic_ctx_take_slot(struct tlsnic_priv *priv,
				struct tlsnic_ctx *ctx, struct tlsnic_cmd *add,
				bool posts)
{
	bool later = posts && ctx->dir == TLSNIC_DIR_TX;
	struct tlsnic_slot *slot;
	int id = -EAGAIN;

	mutex_lock(&priv->ctx_mutex);
	if (!posts || READ_ONCE(priv->posts_adds))
		id = tlsnic_slot_take(priv);
	if (id < 0)
		goto unlock;
	slot = &priv->slots[id];
	ctx->slot = id;
	ctx->generation = ++slot->generation;
	tlsnic_command_handle(add, ctx->slot, ctx->generation);
	refcount_inc(&add->ref);
	if (later)
		ctx->prepared = add;
	else
		ctx->add_queue = tlsnic_ctx_home(ctx);
	rcu_assign_pointer(slot->ctx, ctx);
	if (!posts)
		tlsnic_cmd_post(ctx->add_queue, add);
	else if (!later)
		tlsnic_cmd_post_late(ctx->add_queue, add);
	if (posts)
		tlsnic_inc(priv, tls_add_posted);
unlock:
	mutex_unlock(&priv->ctx_mutex);
	return min(id, 0);
}

/* Post the context's CTX_DEL, which frees its slot. Under ctx_mutex. */
static void tlsnic_ctx_post_del(struct tlsnic_ctx *ctx, struct tlsnic_txq *q)
{
	struct tlsnic_cmd *del = ctx->del;

	ctx->del = NULL;
	tlsnic_command_handle(del, ctx->slot, ctx->generation);
	del->slot = ctx->slot;
	del->complete = tlsnic_slot_deleted;
	tlsnic_slot_deleting(ctx->priv);
	tlsnic_cmd_post_late(q, del);
}

/*
 * Take the context out of the table and of the device, if that has heard of it.
 * Posts the delete and does not wait for it, so it works with the interface
 * down, under RTNL, for thousands of contexts.
 */
static void tlsnic_ctx_withdraw(struct tlsnic_ctx *ctx)
{
	struct tlsnic_priv *priv = ctx->priv;
	struct tlsnic_txq *q;

	mutex_lock(&priv->ctx_mutex);
	RCU_INIT_POINTER(priv->slots[ctx->slot].ctx, NULL);
	tlsnic_ctx_lost(ctx, ctx->generation, false);
	q = tlsnic_ctx_queue(ctx);
	/* before the slot is free, or the next ADD could overtake it */
	if (q)
		tlsnic_ctx_post_del(ctx, q);
	else
		tlsnic_slot_free(priv, ctx->slot);
	mutex_unlock(&priv->ctx_mutex);
}

void tlsnic_ctx_remove(struct tlsnic_ctx *ctx)
{
	tlsnic_ctx_withdraw(ctx);
	tlsnic_ctx_free(ctx);
}

/*
 * As tlsnic_ctx_take_slot(), but where all are taken until one is free, and with
 * the reply if there is one; sleeps.
 */
static int tlsnic_ctx_publish(struct tlsnic_priv *priv, struct tlsnic_ctx *ctx,
			      bool posts, unsigned long deadline)
{
	struct tlsnic_cmd *add = tlsnic_ctx_add_command(ctx, posts);
	unsigned int freed;
	int err;

	if (!add)
		return -ENOMEM;
	do {
		freed = tlsnic_slots_freed(priv);
		err = tlsnic_ctx_take_slot(priv, ctx, add, posts);
	} while (err == -ENOSPC && tlsnic_slots_await(priv, freed, deadline));
	if (!err && !posts) {
		err = tlsnic_ctx_await_add(ctx, ctx->add_queue, add);
		if (err)
			tlsnic_ctx_withdraw(ctx);
	}
	tlsnic_cmd_put(add);
	return err;
}

/*
 * Choose a handle and add the context to the device, or see to it that it is
 * added. The table knows the handle first: the device's verdicts may be here
 * before its reply. On error nothing remains and the caller frees @ctx. Whatever
 * the error, a DEL follows an ADD: the device may have the context all the same,
 * now or later, and what it holds would block the slot.
 */
int tlsnic_ctx_install(struct tlsnic_priv *priv, struct tlsnic_ctx *ctx)
{
	unsigned long deadline = jiffies + TLSNIC_CMD_TIMEOUT;
	int err;

	ctx->priv = priv;
	spin_lock_init(&ctx->lock);
	ctx->on_device = true;
	ctx->in_sync = true;
	ctx->expected_seq = le32_to_cpu(ctx->add.start_seq);
	ctx->sent_seq = ctx->expected_seq;
	ctx->del = tlsnic_command(TLSNIC_OP_CTX_DEL, NULL, 0, 0, GFP_KERNEL);
	if (!ctx->del)
		return -ENOMEM;
	err = tlsnic_ctx_publish(priv, ctx, READ_ONCE(priv->posts_adds),
				 deadline);
	/* the wait for a slot may have been long */
	if (err == -EAGAIN)
		err = tlsnic_ctx_publish(priv, ctx, false, deadline);
	return err;
}

/* A live context by its handle, or NULL; under RCU. Any handle may be asked. */
struct tlsnic_ctx *tlsnic_ctx_lookup(struct tlsnic_priv *priv, u32 slot,
				     u32 generation, enum tlsnic_dir dir)
{
	struct tlsnic_slot *slots;
	struct tlsnic_ctx *ctx;

	/* pairs with tlsnic_slots_init() */
	slots = smp_load_acquire(&priv->slots);
	if (!slots || slot >= priv->slot_count)
		return NULL;
	ctx = rcu_dereference(slots[slot].ctx);
	if (!ctx || ctx->dir != dir ||
	    READ_ONCE(ctx->generation) != generation)
		return NULL;
	return ctx;
}

/* The device that knew our contexts is gone, or says so */
void tlsnic_ctx_all_lost(struct tlsnic_priv *priv)
{
	struct tlsnic_ctx *ctx;
	u32 i;

	mutex_lock(&priv->ctx_mutex);
	for (i = 0; i < priv->slot_count; i++) {
		ctx = rcu_dereference_protected(priv->slots[i].ctx, true);
		if (!ctx)
			continue;
		ctx->readded = false;
		tlsnic_ctx_lost(ctx, ctx->generation, false);
	}
	tlsnic_slots_unblock(priv);
	mutex_unlock(&priv->ctx_mutex);
}

/*
 * What the device says of the former generation is of no interest any more. But
 * was that refused meanwhile?
 */
static bool tlsnic_ctx_renew(struct tlsnic_slot *slot, struct tlsnic_ctx *ctx,
			     struct tlsnic_txq *q)
{
	bool wanted;

	spin_lock_bh(&ctx->lock);
	wanted = !ctx->refused;
	if (wanted) {
		WRITE_ONCE(ctx->generation, ++slot->generation);
		ctx->add_queue = q;
	}
	spin_unlock_bh(&ctx->lock);
	return wanted;
}

/*
 * Add a lost context again, without a position: a tx context gets one from
 * the stack at the next record, an rx context by asking, or by a hint. The
 * device says that it does not know it, and may be wrong, or an ADD is still in
 * the ring: what it holds would block the slot, so that is deleted first.
 */
static int tlsnic_ctx_readd(struct tlsnic_slot *slot, struct tlsnic_ctx *ctx)
{
	struct tlsnic_txq *q = tlsnic_ctx_queue(ctx);
	struct tlsnic_cmd *add, *del = NULL;
	int err = -ENOMEM;

	ctx->add.add_flags |= TLSNIC_ADD_F_NO_SYNC;
	add = tlsnic_ctx_add_command(ctx, false);
	if (q)
		del = tlsnic_command(TLSNIC_OP_CTX_DEL, NULL, 0, 0, GFP_KERNEL);
	if (!add || (q && !del))
		goto put;
	if (del)
		tlsnic_command_handle(del, ctx->slot, ctx->generation);
	q = q ?: &ctx->priv->txq[0];
	err = 0;
	if (!tlsnic_ctx_renew(slot, ctx, q))
		goto put;
	if (del)
		tlsnic_cmd_post(q, del);
	del = NULL;
	tlsnic_command_handle(add, ctx->slot, ctx->generation);
	refcount_inc(&add->ref);
	tlsnic_cmd_post(q, add);
	err = tlsnic_ctx_await_add(ctx, q, add);
	if (!err) {
		tlsnic_inc(ctx->priv, tls_recreated);
		ctx->readded = true;
		spin_lock_bh(&ctx->lock);
		ctx->on_device = true;
		spin_unlock_bh(&ctx->lock);
	}
put:
	if (err)
		tlsnic_inc(ctx->priv, tls_recreate_failed);
	tlsnic_cmd_put(del);
	tlsnic_cmd_put(add);
	return err;
}

/*
 * Re-create what the device lost, one by one, so that others get their turn.
 * A device that stops answering ends it: its contexts stay with the software
 * until it shows up with another HELLO. So does a context that is unknown a
 * second time to one and the same device: it would never pass a packet. One that
 * was refused stays there for good.
 */
void tlsnic_ctx_recreate(struct tlsnic_priv *priv)
{
	struct tlsnic_ctx *ctx;
	int err = 0;
	u32 i;

	for (i = 0; i < priv->slot_count && err != -ETIMEDOUT; i++) {
		mutex_lock(&priv->ctx_mutex);
		ctx = rcu_dereference_protected(priv->slots[i].ctx, true);
		if (ctx && !READ_ONCE(ctx->on_device) && !ctx->readded)
			err = tlsnic_ctx_readd(&priv->slots[i], ctx);
		mutex_unlock(&priv->ctx_mutex);
	}
}

/* The device tells something (NAPI). Its words are believed only so far. */
void tlsnic_ctx_event(struct tlsnic_priv *priv, const struct tlsnic_event *ev)
{
	u32 generation = le32_to_cpu(ev->generation);
	u32 slot = le32_to_cpu(ev->slot);
	struct tlsnic_ctx *ctx;

	tlsnic_inc(priv, events);
	if (ev->code == TLSNIC_EVENT_CONFIG_CHANGED) {
		tlsnic_kick_work(priv, true);
		return;
	}
	if (ev->code == TLSNIC_EVENT_TX_DROPPED)
		tlsnic_inc(priv, tx_tls_device_drop);

	rcu_read_lock();
	ctx = tlsnic_ctx_lookup(priv, slot, generation, TLSNIC_DIR_TX);
	if (!ctx && (ev->code == TLSNIC_EVENT_UNKNOWN_CONTEXT ||
		     ev->code == TLSNIC_EVENT_ADD_REFUSED))
		ctx = tlsnic_ctx_lookup(priv, slot, generation, TLSNIC_DIR_RX);
	if (!ctx) {
		tlsnic_inc(priv, events_stale);
	} else if (ev->code == TLSNIC_EVENT_UNKNOWN_CONTEXT) {
		tlsnic_ctx_lost(ctx, generation, false);
		tlsnic_kick_work(priv, true);
	} else if (ev->code == TLSNIC_EVENT_ADD_REFUSED) {
		/* what was posted: no device is asked again */
		if (le32_to_cpu(ev->reason) == TLSNIC_STATUS_EXISTS)
			tlsnic_slot_block(priv, slot);
		tlsnic_ctx_lost(ctx, generation, true);
	} else if (ev->code == TLSNIC_EVENT_TX_DROPPED) {
		spin_lock(&ctx->lock);
		if (ctx->generation == generation) {
			ctx->in_sync = false;
			ctx->resync = false;
		}
		spin_unlock(&ctx->lock);
	}
	rcu_read_unlock();
}
