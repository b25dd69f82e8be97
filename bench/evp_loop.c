// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * AES-128-GCM through a given libcrypto, as fast as a C program can ask for it. The functions are handed in, since the
 * library is inside of a Python module that exports none of them.
 */
struct evp {
	void *(*ctx_new)(void);
	void (*ctx_free)(void *ctx);
	const void *(*aes_128_gcm)(void);
	int (*init)(void *ctx, const void *cipher, void *engine,
		    const unsigned char *key, const unsigned char *iv);
	int (*update)(void *ctx, unsigned char *out, int *out_len,
		      const unsigned char *in, int in_len);
	int (*final)(void *ctx, unsigned char *out, int *out_len);
	int (*ctrl)(void *ctx, int type, int arg, void *ptr);
};

enum { GET_TAG = 0x10 };	/* EVP_CTRL_AEAD_GET_TAG */

/*
 * Encrypt @size bytes @count times in place. With @records each time as a record: a nonce, 13 bytes of associated data,
 * the text, the tag, which is left in @tag; else as one long message, which is what "openssl speed -evp" does.
 * Returns how many times it succeeded.
 */
int encrypt(const struct evp *evp, const unsigned char *key,
	    unsigned char *iv, unsigned char *text, int size, int count,
	    int records, unsigned char *tag)
{
	static const unsigned char aad[13];
	void *ctx = evp->ctx_new();
	int done = 0, n;

	if (!ctx || evp->init(ctx, evp->aes_128_gcm(), 0, key, iv) != 1)
		goto out;
	for (; done < count; done++) {
		if (records) {
			iv[11]++;
			if (evp->init(ctx, 0, 0, 0, iv) != 1 ||
			    evp->update(ctx, 0, &n, aad, sizeof(aad)) != 1)
				break;
		}
		if (evp->update(ctx, text, &n, text, size) != 1)
			break;
		if (records && (evp->final(ctx, tag, &n) != 1 ||
				evp->ctrl(ctx, GET_TAG, 16, tag) != 1))
			break;
	}
out:
	if (ctx)
		evp->ctx_free(ctx);
	return done;
}
