// Loses one block of each kind, and tells in the log where it is: `lost: KIND ADDRESS`.
// Blocks that it keeps in ways that are hard to see are told as `kept: KIND ADDRESS`.
#include <linux/kref.h>
#include <linux/list.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/percpu.h>
#include <linux/slab.h>
#include <linux/vmalloc.h>

struct planted {
	struct kref kref;
	struct list_head link;
	struct planted *other;
	char text[64];
};

static struct kmem_cache *own_cache;
static struct kmem_cache *merged_cache;
static void *interior;
static LIST_HEAD(planted_list);
static void *fillers[4][500];
static void *merged_fillers[500];
static const size_t filler_sizes[] = { 32, sizeof(struct planted), 192, 200 };

static void lost(const char *kind, const void *address)
{
	pr_info("lost: %s %px\n", kind, address);
}

static void kept(const char *kind, const void *address)
{
	pr_info("kept: %s %px\n", kind, address);
}

static void never_called(struct kref *kref)
{
	kfree(container_of(kref, struct planted, kref));
}

/*
 * Use up the slots that other objects were in before: old pointers to those may be anywhere, and
 * a scan could take one for a pointer to what is planted here.
 */
static int fill(void)
{
	int i, j;

	for (i = 0; i < ARRAY_SIZE(fillers); i++) {
		for (j = 0; j < ARRAY_SIZE(fillers[i]); j++) {
			fillers[i][j] = kzalloc(filler_sizes[i], GFP_KERNEL);
			if (!fillers[i][j])
				return -ENOMEM;
		}
	}
	return 0;
}

/* With a constructor a cache is not merged with another one. */
static void construct(void *object)
{
	memset(object, 0, 120);
}

static struct planted *new_planted(void)
{
	struct planted *planted = kzalloc(sizeof(*planted), GFP_KERNEL | __GFP_NOFAIL);

	kref_init(&planted->kref);
	INIT_LIST_HEAD(&planted->link);
	return planted;
}

static noinline void lose_in_lists(void)
{
	struct planted *a = new_planted(), *b = new_planted();

	list_add(&a->link, &planted_list);
	list_add(&b->link, &planted_list);
	list_del(&a->link);
	lost("list", a);
	kept("list", b);

	a = new_planted();
	b = new_planted();
	a->other = b;
	b->other = a;
	lost("cycle", a);
	lost("cycle", b);

	a = new_planted();
	kref_get(&a->kref);
	kref_put(&a->kref, never_called);
	lost("kref", a);

	a = new_planted();
	interior = a->text + 8;
	kept("interior", a);
}

static int __init planted_leaks_init(void)
{
	void __percpu *percpu;
	int i;

	if (fill())
		return -ENOMEM;
	lost("kmalloc", kzalloc(200, GFP_KERNEL));
	lost("large", kzalloc(20000, GFP_KERNEL));
	own_cache = kmem_cache_create("planted_own", 120, 0, 0, construct);
	merged_cache = kmem_cache_create("planted_merged", 192, 0, 0, NULL);
	if (!own_cache || !merged_cache)
		return -ENOMEM;
	/* Whom it is merged with may have a cache of its own, and not kmalloc()'s. */
	for (i = 0; i < ARRAY_SIZE(merged_fillers); i++)
		merged_fillers[i] = kmem_cache_zalloc(merged_cache, GFP_KERNEL | __GFP_NOFAIL);
	lost("own_cache", kmem_cache_alloc(own_cache, GFP_KERNEL));
	lost("merged_cache", kmem_cache_zalloc(merged_cache, GFP_KERNEL));
	lost("page", (void *)get_zeroed_page(GFP_KERNEL));
	lost("pages", (void *)__get_free_pages(GFP_KERNEL | __GFP_ZERO, 2));
	lost("vmalloc", vzalloc(3 * PAGE_SIZE));
	percpu = __alloc_percpu(72, 8);
	lost("percpu", (void __force *)percpu);
	lost("name", kstrdup("a name that nobody frees", GFP_KERNEL));
	lose_in_lists();
	return 0;
}

static void __exit planted_leaks_exit(void)
{
	struct planted *planted, *next;
	int i, j;

	for (i = 0; i < ARRAY_SIZE(fillers); i++)
		for (j = 0; j < ARRAY_SIZE(fillers[i]); j++)
			kfree(fillers[i][j]);
	for (i = 0; i < ARRAY_SIZE(merged_fillers); i++)
		kmem_cache_free(merged_cache, merged_fillers[i]);
	/* Both caches have lost objects: they cannot be destroyed without a warning. */
	list_for_each_entry_safe(planted, next, &planted_list, link)
		kfree(planted);
	kfree(interior - offsetof(struct planted, text) - 8);
}

module_init(planted_leaks_init);
module_exit(planted_leaks_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("loses one block of each kind");
