// Loses fragments of blocks of pages that several share, as heads of network packets do. Told in
// the log: `lost: KIND ADDRESS`, and what somebody still points to: `kept: KIND ADDRESS`.
#include <linux/gfp.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/skbuff.h>
#include <linux/string.h>

#define BYTES 1500

static struct page_frag_cache held_cache;
static void *held;
static struct sk_buff *fillers[300];

static void told(const char *verdict, const char *kind, const void *address)
{
	pr_info("%s: %s %px\n", verdict, kind, address);
}

static void *block_of(const void *fragment)
{
	return page_address(compound_head(virt_to_page(fragment)));
}

static int __init lost_fragments_init(void)
{
	struct page_frag_cache lost_cache = {};
	struct sk_buff *packet;
	void *fragment;
	int i;

	/* One fragment is lost, and one is not: nothing tells them apart from outside. */
	fragment = page_frag_alloc(&held_cache, BYTES, GFP_KERNEL);
	held = page_frag_alloc(&held_cache, BYTES, GFP_KERNEL);
	if (!fragment || !held)
		return -ENOMEM;
	told("kept", "shared_block", block_of(fragment));
	/* All fragments of a block, and the cache that it came from. */
	fragment = page_frag_alloc(&lost_cache, BYTES, GFP_KERNEL);
	if (!fragment)
		return -ENOMEM;
	told("lost", "block", block_of(fragment));
	memzero_explicit(&lost_cache, sizeof(lost_cache));
	/* A packet with a head of its own, where none was before: NAPI's caches keep old pointers. */
	for (i = 0; i < ARRAY_SIZE(fillers); i++) {
		fillers[i] = alloc_skb(BYTES, GFP_KERNEL);
		if (!fillers[i])
			return -ENOMEM;
	}
	packet = alloc_skb(BYTES, GFP_KERNEL);
	if (!packet)
		return -ENOMEM;
	told("lost", "packet", packet);
	told("lost", "head", packet->head);
	/* A fragment of the CPU's own block. */
	fragment = netdev_alloc_frag(BYTES);
	if (!fragment)
		return -ENOMEM;
	told("kept", "block_of_cpu", block_of(fragment));
	return 0;
}

static void __exit lost_fragments_exit(void)
{
}

module_init(lost_fragments_init);
module_exit(lost_fragments_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("loses fragments of blocks of pages");
