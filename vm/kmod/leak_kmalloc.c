// Loses kmalloc()ed blocks: `blocks` of `size` bytes, and keeps as many.
#include <linux/module.h>
#include <linux/slab.h>

static unsigned int blocks = 3;
module_param(blocks, uint, 0444);
static unsigned int size = 200;
module_param(size, uint, 0444);

static void **kept;

static int __init leak_kmalloc_init(void)
{
	unsigned int i;
	void *volatile lost;

	kept = kcalloc(blocks, sizeof(*kept), GFP_KERNEL);
	if (!kept)
		return -ENOMEM;
	for (i = 0; i < blocks; i++) {
		lost = kmalloc(size, GFP_KERNEL | __GFP_ZERO);
		kept[i] = kmalloc(size, GFP_KERNEL | __GFP_ZERO);
	}
	lost = NULL;
	return 0;
}

static void __exit leak_kmalloc_exit(void)
{
	unsigned int i;

	for (i = 0; i < blocks; i++)
		kfree(kept[i]);
	kfree(kept);
}

module_init(leak_kmalloc_init);
module_exit(leak_kmalloc_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("loses kmalloc()ed blocks");
