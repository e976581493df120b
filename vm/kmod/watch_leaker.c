// Loses four blocks in its init, of four kinds; their addresses are in a parameter.
#include <linux/gfp.h>
#include <linux/module.h>
#include <linux/slab.h>
#include <linux/string.h>
#include <linux/vmalloc.h>

#define BLOCKS 13

static unsigned long lost[4];
static int losses;
module_param_array(lost, ulong, &losses, 0444);

static int __init watch_leaker_init(void)
{
	static const char text[40] = "of the module";
	void *blocks[BLOCKS];
	int i;

	for (i = 0; i < BLOCKS; i++)
		blocks[i] = kmalloc(40, GFP_KERNEL);
	for (i = 0; i < BLOCKS - 1; i++)
		kfree(blocks[i]);
	lost[0] = (unsigned long)blocks[BLOCKS - 1];
	lost[1] = __get_free_pages(GFP_KERNEL, 3);
	lost[2] = (unsigned long)vmalloc(40);
	lost[3] = (unsigned long)kmemdup(text, sizeof(text), GFP_KERNEL);
	losses = 4;
	return 0;
}

static void __exit watch_leaker_exit(void)
{
}

module_init(watch_leaker_init);
module_exit(watch_leaker_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("loses four blocks");
