// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * The slots of the table of contexts: which are free, and waiting for one.
 *
 * A slot is used again, with the next generation, when the device has returned
 * the CTX_DEL of its former context: sooner, another queue might bring the
 * CTX_ADD of the next one first.
 *
 * Where the device holds a context that it was not told to hold any more, or
 * that it could not be told to let go, it refuses every other one in that slot,
 * and all that were to come. The slot is blocked until the device has lost its
 * contexts, and the others go on.
 */
#include <linux/slab.h>

#include "tlsnic.h"

int tlsnic_slots_init(struct tlsnic_priv *priv)
{
	struct tlsnic_slot *slots;

	priv->slot_count = priv->max_contexts;
	if (!priv->slot_count)
		return 0;
	slots = kvcalloc(priv->slot_count, sizeof(*slots), GFP_KERNEL);
	if (!slots)
		return -ENOMEM;
	/* frames come in already: pairs with tlsnic_ctx_lookup() */
	smp_store_release(&priv->slots, slots);
	return 0;
}

void tlsnic_slots_destroy(struct tlsnic_priv *priv)
{
	kvfree(priv->slots);
	ida_destroy(&priv->slot_ida);
}

/* A free slot, or -ENOSPC. Under ctx_mutex. */
int tlsnic_slot_take(struct tlsnic_priv *priv)
{
	u32 limit = min(priv->slot_count, priv->max_contexts);
	int id;

	if (!limit)
		return -ENOSPC;
	id = ida_alloc_max(&priv->slot_ida, limit - 1, GFP_KERNEL);
	if (id >= 0) {
		spin_lock_bh(&priv->slot_lock);
		priv->slots[id].used = true;
		spin_unlock_bh(&priv->slot_lock);
	}
	return id;
}

/* Nobody uses the slot any more, the device neither; any context */
void tlsnic_slot_free(struct tlsnic_priv *priv, u32 slot)
{
	spin_lock_bh(&priv->slot_lock);
	priv->slots[slot].used = false;
	if (!priv->slots[slot].blocked) {
		ida_free(&priv->slot_ida, slot);
		priv->slots_freed++;
	}
	spin_unlock_bh(&priv->slot_lock);
	wake_up(&priv->slot_freed);
}

/* The device holds something in a slot that was taken; any context */
void tlsnic_slot_block(struct tlsnic_priv *priv, u32 slot)
{
	spin_lock_bh(&priv->slot_lock);
	if (priv->slots[slot].used)
		priv->slots[slot].blocked = true;
	spin_unlock_bh(&priv->slot_lock);
}

/* The device holds nothing any more. Under ctx_mutex. */
void tlsnic_slots_unblock(struct tlsnic_priv *priv)
{
	struct tlsnic_slot *slot;
	u32 i;

	for (i = 0; i < priv->slot_count; i++) {
		slot = &priv->slots[i];
		spin_lock_bh(&priv->slot_lock);
		if (slot->blocked && !slot->used) {
			ida_free(&priv->slot_ida, i);
			priv->slots_freed++;
		}
		slot->blocked = false;
		spin_unlock_bh(&priv->slot_lock);
	}
	wake_up(&priv->slot_freed);
}

/* A CTX_DEL is about to be posted, with tlsnic_slot_deleted() at its end */
void tlsnic_slot_deleting(struct tlsnic_priv *priv)
{
	spin_lock_bh(&priv->slot_lock);
	priv->deletes++;
	spin_unlock_bh(&priv->slot_lock);
}

/*
 * A CTX_DEL has come back; with softirqs disabled. One that did not reach the
 * device (no memory to map it, a broken ring) leaves the context there, unless
 * the device was reset.
 */
void tlsnic_slot_deleted(struct tlsnic_priv *priv, const struct tlsnic_cmd *cmd)
{
	if (cmd->status && cmd->status != -ENETDOWN)
		tlsnic_slot_block(priv, cmd->slot);
	tlsnic_slot_free(priv, cmd->slot);
	spin_lock_bh(&priv->slot_lock);
	priv->deletes--;
	spin_unlock_bh(&priv->slot_lock);
	wake_up(&priv->slot_freed);
}

/* How often one was freed: what was free before is for who asks afterwards */
unsigned int tlsnic_slots_freed(struct tlsnic_priv *priv)
{
	unsigned int freed;

	spin_lock_bh(&priv->slot_lock);
	freed = priv->slots_freed;
	spin_unlock_bh(&priv->slot_lock);
	return freed;
}

/* Is there something new to find, or nothing to wait for? */
static bool tlsnic_slots_changed(struct tlsnic_priv *priv, unsigned int freed)
{
	bool changed;

	spin_lock_bh(&priv->slot_lock);
	changed = priv->slots_freed != freed || !priv->deletes;
	spin_unlock_bh(&priv->slot_lock);
	return changed;
}

/*
 * None was free after @freed were freed: wait until @deadline for one whose
 * CTX_DEL is under way. Is it worth another look? A device that let somebody
 * wait in vain is not waited for again until it frees one. Sleeps.
 */
bool tlsnic_slots_await(struct tlsnic_priv *priv, unsigned int freed,
			unsigned long deadline)
{
	long left = deadline - jiffies;
	unsigned int i;

	if (left <= 0 || READ_ONCE(priv->slots_overdue) == freed + 1)
		return false;
	for (i = 0; i < priv->max_pairs && !tlsnic_slots_changed(priv, freed); i++)
		tlsnic_cmd_kick(&priv->txq[i]);
	if (!wait_event_timeout(priv->slot_freed,
				tlsnic_slots_changed(priv, freed), left)) {
		WRITE_ONCE(priv->slots_overdue, freed + 1);
		return false;
	}
	return tlsnic_slots_freed(priv) != freed;
}
