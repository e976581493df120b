// Keeps many small blocks alive in one long list: `objects` of them, of four sizes.
#include <linux/module.h>
#include <linux/sched.h>
#include <linux/slab.h>

static unsigned int objects = 2000000;
module_param(objects, uint, 0444);

struct node {
	struct node *next;
};

static struct node *first;
static const size_t sizes[] = { 64, 96, 192, 512 };

static void free_all(void)
{
	struct node *node;

	while ((node = first)) {
		first = node->next;
		kfree(node);
		cond_resched();
	}
}

static int __init many_objects_init(void)
{
	struct node *node;
	unsigned int i;

	for (i = 0; i < objects; i++) {
		node = kzalloc(sizes[i % ARRAY_SIZE(sizes)], GFP_KERNEL);
		if (!node) {
			free_all();
			return -ENOMEM;
		}
		node->next = first;
		first = node;
		cond_resched();
	}
	return 0;
}

module_init(many_objects_init);
module_exit(free_all);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("keeps many small blocks alive");
