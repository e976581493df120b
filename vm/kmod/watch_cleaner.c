// Frees what watch_leaker has lost: kmalloc()ed, pages, vmalloc()ed, kmemdup()ed.
#include <linux/gfp.h>
#include <linux/module.h>
#include <linux/slab.h>
#include <linux/vmalloc.h>

static unsigned long blocks[4];
static int count;
module_param_array(blocks, ulong, &count, 0444);

static int __init watch_cleaner_init(void)
{
	if (count != 4)
		return -EINVAL;
	kfree((void *)blocks[0]);
	free_pages(blocks[1], 3);
	vfree((void *)blocks[2]);
	kfree((void *)blocks[3]);
	return 0;
}

static void __exit watch_cleaner_exit(void)
{
}

module_init(watch_cleaner_init);
module_exit(watch_cleaner_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("frees what another module has lost");
