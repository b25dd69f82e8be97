// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * What the kernel remembers of the records that were sent and not acknowledged.
 *
 * net/tls keeps the plaintext of every such record, for whoever has to encrypt
 * it again. Here a packet's place among them is found, what precedes it in its
 * record is copied for a device that rebuilds its state, and a packet whose
 * payload may be encrypted already gets its plaintext back.
 *
 * The list is guarded by the kernel's tx->lock; nothing of it is kept.
 */
#include <linux/highmem.h>
#include <linux/slab.h>
#include <linux/tcp.h>

#include "tlsnic.h"

/* So many bytes that equal their plaintext do so because they are plaintext */
#define TLSNIC_SAMPLE	64

/* Copy @len bytes of the record, from offset @from on; false if it is shorter */
static bool tlsnic_record_copy(const struct tls_record_info *record, u32 from,
			       u8 *to, u32 len)
{
	u32 size, part, p_off, p_len, copied;
	const skb_frag_t *frag;
	struct page *p;
	int i;

	for (i = 0; len && i < record->num_frags; i++) {
		frag = &record->frags[i];
		size = skb_frag_size(frag);
		if (from >= size) {
			from -= size;
			continue;
		}
		part = min(len, size - from);
		skb_frag_foreach_page(frag, skb_frag_off(frag) + from, part, p,
				      p_off, p_len, copied)
			memcpy_from_page(to + copied, p, p_off, p_len);
		to += part;
		len -= part;
		from = 0;
	}
	return !len;
}

/* A resync to the record's start with its first @len bytes, or NULL */
static struct tlsnic_rebuild *
tlsnic_rebuild_make(struct tls_record_info *record, u64 rcd_sn, u32 len)
{
	struct tlsnic_rebuild *rebuild;

	if (len > TLSNIC_MAX_RECORD_PREFIX)
		return NULL;
	rebuild = kmalloc(struct_size(rebuild, prefix, len),
			  GFP_ATOMIC | __GFP_NOWARN);
	if (!rebuild)
		return NULL;
	rebuild->skb = NULL;
	rebuild->prefix_len = len;
	rebuild->record_seq = tls_record_start_seq(record);
	rebuild->rcd_sn = rcd_sn;
	if (!tlsnic_record_copy(record, 0, rebuild->prefix, len)) {
		kfree(rebuild);
		return NULL;
	}
	return rebuild;
}

/*
 * Where the @payload bytes at @seq lie. If they are records, and @rebuild is
 * not NULL, *@rebuild is what a device needs to encrypt them whatever it did
 * before, to be freed by the caller; NULL where memory is short.
 */
enum tlsnic_place tlsnic_records_place(struct sock *sk, u32 seq, u32 payload,
				       struct tlsnic_rebuild **rebuild)
{
	struct tls_offload_context_tx *tx = tls_offload_ctx_tx(tls_get_ctx(sk));
	enum tlsnic_place place = TLSNIC_PLACE_RECORDS;
	struct tls_record_info *record;
	unsigned long flags;
	u64 rcd_sn;

	spin_lock_irqsave(&tx->lock, flags);
	record = tls_get_record(tx, seq, &rcd_sn);
	if (!record) {
		place = TLSNIC_PLACE_GONE;
	} else if (tls_record_is_start_marker(record)) {
		place = after(seq + payload, record->end_seq) ?
			TLSNIC_PLACE_STRADDLES : TLSNIC_PLACE_BEFORE;
	} else if (before(seq, tls_record_start_seq(record))) {
		place = TLSNIC_PLACE_GONE;
	} else if (rebuild) {
		*rebuild = tlsnic_rebuild_make(record, rcd_sn, seq -
					       tls_record_start_seq(record));
	}
	spin_unlock_irqrestore(&tx->lock, flags);
	return place;
}

/*
 * Make the linear part of the payload at @seq what the records say: plaintext.
 * The kernel hands records down in fragments, so what is linear may be what
 * the core encrypted for another device that then handed it to this one, or
 * a copy of plaintext. Either way this makes it right. false: drop it.
 */
bool tlsnic_records_refill(struct sk_buff *skb, u32 seq)
{
	struct tls_offload_context_tx *tx;
	u32 offset = skb_tcp_all_headers(skb);
	u32 end = skb_headlen(skb), part, start;
	struct tls_record_info *record;
	unsigned long flags;
	u64 rcd_sn;

	if (skb_ensure_writable(skb, end))
		return false;
	tx = tls_offload_ctx_tx(tls_get_ctx(skb->sk));
	spin_lock_irqsave(&tx->lock, flags);
	while (offset < end) {
		record = tls_get_record(tx, seq, &rcd_sn);
		if (!record)
			break;
		/* what is not of a record is judged later, as a whole */
		if (tls_record_is_start_marker(record)) {
			offset = end;
			break;
		}
		start = tls_record_start_seq(record);
		part = min(end - offset, record->end_seq - seq);
		if (before(seq, start) ||
		    !tlsnic_record_copy(record, seq - start,
					skb->data + offset, part))
			break;
		seq += part;
		offset += part;
	}
	spin_unlock_irqrestore(&tx->lock, flags);
	return offset == end;
}

/*
 * Compare up to @left bytes of data at @offset of @skb with the @record, at
 * @from of which they lie. Returns how many were compared, or 0 if they differ.
 */
static u32 tlsnic_record_compare(const struct tls_record_info *record, u32 from,
				 const struct sk_buff *skb, u32 offset,
				 u32 left)
{
	u8 plain[TLSNIC_SAMPLE], sent[TLSNIC_SAMPLE];

	if (skb_copy_bits(skb, offset, sent, left) ||
	    !tlsnic_record_copy(record, from, plain, left) ||
	    memcmp(plain, sent, left))
		return 0;
	return left;
}

/*
 * Whether the payload of @skb, a TCP segment of records, is still or again what
 * the records say: plaintext; -ENOENT if they are gone. Header, nonce and tag
 * tell nothing. A few bytes of ciphertext may equal their plaintext by chance;
 * encrypting them once more then changes nothing: their keystream is zero.
 */
int tlsnic_records_in_clear(const struct sk_buff *skb)
{
	struct tls_context *tls = tls_get_ctx(skb->sk);
	struct tls_offload_context_tx *tx = tls_offload_ctx_tx(tls);
	u32 offset = skb_tcp_all_headers(skb), left = TLSNIC_SAMPLE;
	u32 seq = ntohl(tcp_hdr(skb)->seq), begin, end, from, part;
	struct tls_record_info *record;
	unsigned long flags;
	int clear = 1;
	u64 rcd_sn;

	spin_lock_irqsave(&tx->lock, flags);
	while (left && offset < skb->len) {
		record = tls_get_record(tx, seq, &rcd_sn);
		if (!record || tls_record_is_start_marker(record) ||
		    before(seq, tls_record_start_seq(record))) {
			clear = -ENOENT;
			break;
		}
		from = seq - tls_record_start_seq(record);
		begin = tls->prot_info.prepend_size;
		end = record->len - tls->prot_info.tag_size;
		part = min(record->len - from, skb->len - offset);
		if (from < begin) {
			part = min(begin - from, part);
		} else if (from < end) {
			part = min3(end - from, part, left);
			if (!tlsnic_record_compare(record, from, skb, offset,
						   part)) {
				clear = 0;
				break;
			}
			left -= part;
		}
		seq += part;
		offset += part;
	}
	spin_unlock_irqrestore(&tx->lock, flags);
	return clear;
}
