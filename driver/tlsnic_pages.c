// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * The memory that receive buffers are cut from.
 *
 * A page that is cut up is not given back but kept, with the reference that is
 * ours, and is the next page again when it is the oldest of those kept and all
 * frames in it are gone: then ours is the only reference. The kernel clears
 * what it gives out (init_on_alloc), which took a sixth of the processor time
 * of a bulk transfer. An skb shows only what the device says it wrote; one that
 * says too much shows what it has delivered before.
 *
 * A large transfer has a page for each buffer in the ring, and in the socket's
 * queue some more (8 MiB): so many are kept, or the oldest were never free.
 */
#include <linux/mm.h>
#include <linux/skbuff.h>

#include "tlsnic.h"

/* See that there is a page to cut from; false if there is no memory */
bool tlsnic_pages_refill(struct tlsnic_rxq *q, gfp_t gfp)
{
	struct tlsnic_pages *pages = &q->pages;
	struct page_frag *frag = &pages->frag;
	unsigned int ring;

	if (frag->page && frag->offset + TLSNIC_RX_BUF_MIN <= frag->size)
		return true;
	if (frag->page && !page_is_pfmemalloc(frag->page)) {
		ring = virtqueue_get_vring_size(q->vq);
		swap(frag->page, pages->kept[pages->oldest]);
		pages->oldest++;
		pages->oldest %= min(ring + TLSNIC_PAGES_QUEUED,
				     TLSNIC_PAGES_KEPT);
		frag->size = frag->page ? page_size(frag->page) : 0;
		frag->offset = frag->size;
		if (frag->page && page_ref_count(frag->page) == 1)
			tlsnic_inc(q->priv, rx_pages_reused);
	}
	/* begins the page anew if it is ours alone, else lets it go */
	return skb_page_frag_refill(TLSNIC_RX_BUF_MIN, frag, gfp);
}

/* No buffers are cut any more: let go of all pages, whoever else has them */
void tlsnic_pages_free(struct tlsnic_pages *pages)
{
	unsigned int i;

	if (pages->frag.page)
		put_page(pages->frag.page);
	for (i = 0; i < TLSNIC_PAGES_KEPT; i++)
		if (pages->kept[i])
			put_page(pages->kept[i]);
	memset(pages, 0, sizeof(*pages));
}
