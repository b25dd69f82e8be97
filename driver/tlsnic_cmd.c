// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Commands to the device.
 *
 * A command is a chain on a tx queue, between the packets. Posting never
 * sleeps: where the ring is full, the command waits in a list that the tx NAPI
 * empties in order. Commands of one queue take effect in the order they were
 * posted; a delete, for one, may be posted and forgotten. All use queue 0, but
 * a context's, which follow its CTX_ADD (tlsnic_ctx.c).
 */
#include <linux/sched/clock.h>
#include <linux/slab.h>

#include "tlsnic.h"

/* Marks a command among the tokens of a tx ring; the others are skbs */
#define TLSNIC_TOKEN_CMD	BIT(0)

/* What precedes a command's body in tlsnic_cmd.request */
struct tlsnic_request {
	struct virtio_net_hdr_v1 hdr;
	u8 ext[];
};

struct tlsnic_cmd *tlsnic_token_cmd(void *token)
{
	unsigned long value = (unsigned long)token;

	if (!(value & TLSNIC_TOKEN_CMD))
		return NULL;
	return (struct tlsnic_cmd *)(value & ~TLSNIC_TOKEN_CMD);
}

/*
 * A chain with an extension of @ext_size bytes, zero but for the header, and,
 * if @reply_size, as many bytes for the device to write. One reference.
 */
struct tlsnic_cmd *tlsnic_cmd_alloc(size_t ext_size, size_t reply_size,
				    gfp_t gfp)
{
	size_t request_size = sizeof(struct tlsnic_request) + ext_size;
	/* the device's part keeps off cache lines that the CPU writes */
	size_t reply_at = L1_CACHE_ALIGN(sizeof(struct tlsnic_cmd) +
					 request_size);
	struct tlsnic_request *request;
	struct tlsnic_cmd *cmd;

	cmd = kzalloc(reply_at + reply_size, gfp);
	if (!cmd)
		return NULL;
	INIT_LIST_HEAD(&cmd->list);
	refcount_set(&cmd->ref, 1);
	init_completion(&cmd->done);
	cmd->request_size = request_size;
	cmd->reply_size = reply_size;
	cmd->reply = (void *)cmd + reply_at;
	request = (struct tlsnic_request *)cmd->request;
	request->hdr.flags = TLSNIC_HDR_F_EXT;
	return cmd;
}

void *tlsnic_cmd_ext(struct tlsnic_cmd *cmd)
{
	return ((struct tlsnic_request *)cmd->request)->ext;
}

/*
 * A struct tlsnic_command with @body, and room for @reply_size bytes, of which
 * the first are a struct tlsnic_reply. 0: whatever became of it, nobody asks.
 */
struct tlsnic_cmd *tlsnic_command(enum tlsnic_opcode opcode, const void *body,
				  size_t body_size, size_t reply_size,
				  gfp_t gfp)
{
	size_t len = sizeof(struct tlsnic_command) + body_size;
	struct tlsnic_command *command;
	struct tlsnic_cmd *cmd;

	cmd = tlsnic_cmd_alloc(len, reply_size, gfp);
	if (!cmd)
		return NULL;
	command = tlsnic_cmd_ext(cmd);
	command->type = TLSNIC_EXT_COMMAND;
	command->opcode = opcode;
	command->len = cpu_to_le16(len);
	if (body_size)
		memcpy(command + 1, body, body_size);
	return cmd;
}

void tlsnic_command_handle(struct tlsnic_cmd *cmd, u32 slot, u32 generation)
{
	struct tlsnic_command *command = tlsnic_cmd_ext(cmd);

	command->slot = cpu_to_le32(slot);
	command->generation = cpu_to_le32(generation);
}

/* Let go of a command; the last one wipes it, since it may hold keys */
void tlsnic_cmd_put(struct tlsnic_cmd *cmd)
{
	if (cmd && refcount_dec_and_test(&cmd->ref))
		kfree_sensitive(cmd);
}

static int tlsnic_status_errno(u32 status)
{
	switch (status) {
	case TLSNIC_STATUS_OK:
		return 0;
	case TLSNIC_STATUS_TABLE_FULL:
		return -ENOSPC;
	case TLSNIC_STATUS_BAD_REQUEST:
		return -EINVAL;
	case TLSNIC_STATUS_UNSUPPORTED:
		return -EOPNOTSUPP;
	case TLSNIC_STATUS_EXISTS:
		return -EEXIST;
	case TLSNIC_STATUS_STALE:
		return -ENOENT;
	case TLSNIC_STATUS_REFUSED:
		return -EPERM;
	default:
		return -EIO;
	}
}

/* Judge a reply of which the device claims to have written @used bytes */
static int tlsnic_reply_status(struct tlsnic_cmd *cmd, u32 used)
{
	u32 len;

	if (!cmd->reply_size)
		return 0;
	if (used < sizeof(*cmd->reply) || used > cmd->reply_size)
		return -EIO;
	len = min(le32_to_cpu(cmd->reply->len), used);
	if (len < sizeof(*cmd->reply))
		return -EIO;
	cmd->reply_len = len - sizeof(*cmd->reply);
	return tlsnic_status_errno(le32_to_cpu(cmd->reply->status));
}

/* The ring gives a command back (or never took it: @err) */
void tlsnic_cmd_returned(struct tlsnic_priv *priv, struct tlsnic_cmd *cmd,
			 int err, u32 used)
{
	cmd->status = err ?: tlsnic_reply_status(cmd, used);
	if (cmd->status)
		tlsnic_inc(priv, cmd_failed);
	if (cmd->complete)
		cmd->complete(priv, cmd);
	complete(&cmd->done);
	tlsnic_cmd_put(cmd);
	atomic_dec(&priv->commands);
}

/* Put a command into the ring; the tx queue is locked */
static int tlsnic_cmd_add(struct tlsnic_txq *q, struct tlsnic_cmd *cmd)
{
	struct scatterlist request, reply, *sgs[] = { &request, &reply };
	int err;

	sg_init_one(&request, cmd->request, cmd->request_size);
	if (cmd->reply_size)
		sg_init_one(&reply, cmd->reply, cmd->reply_size);
	err = virtqueue_add_sgs(q->vq, sgs, 1, !!cmd->reply_size,
				(void *)((unsigned long)cmd |
					 TLSNIC_TOKEN_CMD), GFP_ATOMIC);
	if (!err)
		WRITE_ONCE(q->posted, q->posted + 1);
	return err;
}

/*
 * Put a command into the ring, before what is posted next, or fail: without a
 * kick, which what is posted next brings. The tx queue is locked. The caller's
 * reference goes to the ring if that took it.
 */
int tlsnic_cmd_post_locked(struct tlsnic_txq *q, struct tlsnic_cmd *cmd)
{
	int err = tlsnic_cmd_add(q, cmd);

	if (!err)
		atomic_inc(&q->priv->commands);
	return err;
}

/* Move waiting commands into the ring: did one go? The tx queue is locked */
bool tlsnic_cmd_flush(struct tlsnic_txq *q)
{
	struct tlsnic_cmd *cmd, *next;
	bool moved = false;
	int err;

	list_for_each_entry_safe(cmd, next, &q->waiting, list) {
		err = tlsnic_cmd_add(q, cmd);
		if (err == -ENOSPC)
			break;
		list_del_init(&cmd->list);
		if (err)
			tlsnic_cmd_returned(q->priv, cmd, err, 0);
		else
			moved = true;
	}
	return moved;
}

/* Tell the device of what was posted, if it wants to be told; not from xmit */
void tlsnic_cmd_kick(struct tlsnic_txq *q)
{
	struct netdev_queue *nq = netdev_get_tx_queue(q->priv->dev, q->index);

	__netif_tx_lock_bh(nq);
	if (READ_ONCE(q->priv->running))
		virtqueue_kick(q->vq);
	__netif_tx_unlock_bh(nq);
}

/* Nothing else was posted that brought a kick */
void tlsnic_cmd_late(struct work_struct *work)
{
	tlsnic_cmd_kick(container_of(to_delayed_work(work), struct tlsnic_txq,
				     late));
}

static void tlsnic_cmd_submit(struct tlsnic_txq *q, struct tlsnic_cmd *cmd,
			      bool late)
{
	struct tlsnic_priv *priv = q->priv;
	struct netdev_queue *nq = netdev_get_tx_queue(priv->dev, q->index);

	atomic_inc(&priv->commands);
	__netif_tx_lock_bh(nq);
	if (READ_ONCE(priv->running)) {
		list_add_tail(&cmd->list, &q->waiting);
		tlsnic_cmd_flush(q);
		if (!list_empty(&q->waiting))
			tlsnic_inc(priv, cmd_deferred);
		/* a packet that finds no room relies on the device to make it */
		if (late && q->vq->num_free >= TLSNIC_TX_ROOM)
			schedule_delayed_work(&q->late, TLSNIC_CMD_LATE);
		else
			virtqueue_kick(q->vq);
	} else {
		tlsnic_cmd_returned(priv, cmd, -ENETDOWN, 0);
	}
	__netif_tx_unlock_bh(nq);
}

/* Post a command; the caller's reference goes to the ring. Never sleeps. */
void tlsnic_cmd_post(struct tlsnic_txq *q, struct tlsnic_cmd *cmd)
{
	tlsnic_cmd_submit(q, cmd, false);
}

/*
 * As tlsnic_cmd_post(), for what nobody waits for: a kick is an exit to the
 * hypervisor. The next one of this queue, for a packet mostly, will do, and the
 * device looks into the ring before it takes frames from the wire.
 */
void tlsnic_cmd_post_late(struct tlsnic_txq *q, struct tlsnic_cmd *cmd)
{
	tlsnic_cmd_submit(q, cmd, true);
}

/*
 * The reply is usually here before an interrupt and two switches of tasks
 * could tell of it, and an application waits: look for a while, and sleep only
 * then, or when the processor has something better to do. Not to be preempted,
 * as it is under PREEMPT_RT: the queue has no interrupt meanwhile.
 */
static void tlsnic_cmd_look(struct tlsnic_txq *q, struct tlsnic_cmd *cmd)
{
	u64 end = local_clock() + TLSNIC_CMD_LOOK;
	bool more;

	if (IS_ENABLED(CONFIG_PREEMPT_RT))
		return;
	local_bh_disable();
	do {
		cpu_relax();
		more = !completion_done(&cmd->done) && !need_resched() &&
		       local_clock() < end;
		tlsnic_tx_look(q, more);
	} while (more);
	local_bh_enable();
}

/*
 * Wait for the reply to a command that was posted with another reference than
 * the caller's, who may look at the reply after a return of 0. -ETIMEDOUT says
 * that the command is still in the ring: it may take effect later.
 */
int tlsnic_cmd_await(struct tlsnic_txq *q, struct tlsnic_cmd *cmd)
{
	tlsnic_cmd_look(q, cmd);
	if (!wait_for_completion_timeout(&cmd->done, TLSNIC_CMD_TIMEOUT)) {
		tlsnic_inc(q->priv, cmd_timeout);
		return -ETIMEDOUT;
	}
	return cmd->status;
}

/* Post a command and wait for its reply. The caller keeps its reference. */
int tlsnic_cmd_exec(struct tlsnic_txq *q, struct tlsnic_cmd *cmd)
{
	refcount_inc(&cmd->ref);
	tlsnic_cmd_post(q, cmd);
	return tlsnic_cmd_await(q, cmd);
}
