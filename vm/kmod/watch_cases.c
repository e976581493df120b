// Allocates and frees in the way that its parameter says; what it loses is said at each case.
#include <linux/delay.h>
#include <linux/gfp.h>
#include <linux/hrtimer.h>
#include <linux/interrupt.h>
#include <linux/io.h>
#include <linux/kthread.h>
#include <linux/mempool.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/percpu.h>
#include <linux/rcupdate.h>
#include <linux/slab.h>
#include <linux/smp.h>
#include <linux/string.h>
#include <linux/version.h>
#include <linux/vmalloc.h>

#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 10, 0)
#define ALLOCATE __kmalloc_noprof
#else
#define ALLOCATE __kmalloc
#endif

static char *mode = "none";
module_param(mode, charp, 0444);
static int times = 2;
module_param(times, int, 0444);
static int done; // allocations that succeeded
module_param(done, int, 0444);

struct item {
	struct rcu_head rcu;
	char text[40];
};

static void *kept[64];

static void free_item(struct rcu_head *rcu)
{
	kfree(container_of(rcu, struct item, rcu));
}

// 2 allocations, nothing lost
static int rcu(void)
{
	struct item *one = kmalloc(sizeof(*one), GFP_KERNEL);
	struct item *two = kmalloc(sizeof(*two), GFP_KERNEL);

	kfree_rcu(one, rcu);
	call_rcu(&two->rcu, free_item);
	return 0;
}

static __printf(1, 2) char *printed(const char *format, ...)
{
	va_list args;
	char *text;

	va_start(args, format);
	text = kvasprintf(GFP_KERNEL, format, args);
	va_end(args);
	return text;
}

// 4 allocations, nothing lost
static int texts(void)
{
	kept[0] = kasprintf(GFP_KERNEL, "%s %d", "a text of some length", 29);
	kept[1] = printed("%s %d", "another one", 31);
	kept[2] = kmalloc(37, GFP_KERNEL);
	kept[3] = kmalloc(41, GFP_KERNEL);
	return 0;
}

static void take(void *block)
{
	done += !!block;
	kfree(block);
}

#define TAKE(size) take(kmalloc(size, GFP_KERNEL))

// kmalloc() of constant sizes and others, and pages of every order; nothing lost
static int sizes(void)
{
	size_t size;
	int order;

	TAKE(1); TAKE(8); TAKE(9); TAKE(16); TAKE(32); TAKE(64); TAKE(96); TAKE(128); TAKE(192);
	TAKE(256); TAKE(512); TAKE(1024); TAKE(2048); TAKE(4096); TAKE(8192); TAKE(8193);
	TAKE(16384); TAKE(32768); TAKE(65536); TAKE(131072);
	for (size = 1; size <= 131072; size += size / 8 + 1) {
		take(kmalloc(size, GFP_KERNEL));
		take(kmalloc_node(size, GFP_KERNEL, numa_node_id()));
	}
	for (order = 0; order < 10; order++) {
		struct page *page = alloc_pages(GFP_KERNEL | __GFP_NOWARN, order);

		done += !!page;
		if (page)
			__free_pages(page, order);
	}
	take(NULL);
	take(kmalloc(0, GFP_KERNEL));
	done--; // ZERO_SIZE_PTR is no memory
	return 0;
}

// Two allocations at one place, or as many as `times` says, all lost
static noinline void *open_one(void)
{
	return kmalloc(100, GFP_KERNEL);
}

static int same(void)
{
	int i;

	for (i = 0; i < times; i++)
		kept[32 + i % 32] = open_one();
	return 0;
}

// 4 allocations as the slab sees it: one from NULL, one that moves, one more, and one of 40 bytes
// that grows to 61 where it is, and then cannot grow: it alone is lost
static int realloc(void)
{
	void *block = krealloc(NULL, 40, GFP_KERNEL);
	void *moved = krealloc(block, 400, GFP_KERNEL), *failed;

	moved = krealloc(moved, 390, GFP_KERNEL);
	failed = krealloc(moved, KMALLOC_MAX_SIZE + 1, GFP_KERNEL | __GFP_NOWARN);
	if (failed)
		return -EINVAL;
	moved = krealloc(moved, 0, GFP_KERNEL);
	if (moved != ZERO_SIZE_PTR)
		return -EINVAL;
	kept[0] = kmalloc(40, GFP_KERNEL);
	kept[32] = krealloc(kmalloc(40, GFP_KERNEL), 61, GFP_KERNEL);
	if (krealloc(kept[32], KMALLOC_MAX_SIZE + 1, GFP_KERNEL | __GFP_NOWARN))
		return -EINVAL;
	return 0;
}

// Its init fails, and 1 block is lost
static int fail(void)
{
	kept[32] = kmalloc(50, GFP_KERNEL);
	return -ENODEV;
}

static struct hrtimer timer;
static int rung;

static enum hrtimer_restart ring(struct hrtimer *unused)
{
	kept[32] = kmalloc(60, GFP_ATOMIC);
	WRITE_ONCE(rung, 1);
	return HRTIMER_NORESTART;
}

static void in_tasklet(unsigned long unused)
{
	kept[33] = kmalloc(70, GFP_ATOMIC);
}

static DECLARE_TASKLET_OLD(tasklet, in_tasklet);

// A block in a hard interrupt and one in a soft one, both lost
static int interrupts(void)
{
	hrtimer_init(&timer, CLOCK_MONOTONIC, HRTIMER_MODE_REL_HARD);
	timer.function = ring;
	hrtimer_start(&timer, ms_to_ktime(1), HRTIMER_MODE_REL_HARD);
	while (!READ_ONCE(rung))
		msleep(1);
	tasklet_schedule(&tasklet);
	tasklet_kill(&tasklet);
	return 0;
}

static noinline void let_go(void *block)
{
	barrier();
	kfree(block); // jmp kfree
}

static void *(*volatile allocate)(size_t size, gfp_t flags) = ALLOCATE;

// Freed by a tail call, and allocated through a pointer; nothing lost
static int calls(void)
{
	kept[0] = allocate(80, GFP_KERNEL);
	let_go(kmalloc(90, GFP_KERNEL));
	return 0;
}

static int free_elsewhere(void *block)
{
	kfree(block);
	return 0;
}

// 50 blocks allocated on one CPU and freed at once on the other, addresses used again
static int processors(void)
{
	int i;

	for (i = 0; i < 50; i++) {
		void *block = kmalloc(i + 1, GFP_KERNEL);

		smp_call_function_single(i & 1, (smp_call_func_t)free_elsewhere, block, 1);
	}
	return 0;
}

static struct kmem_cache *cache;
static mempool_t *pool;
static void __percpu *each;

// 19 allocations, of every kind; nothing lost
static int every(void)
{
	void *bulk[5];
	struct page *page = alloc_page(GFP_KERNEL);

	cache = kmem_cache_create("watch_cases", 112, 0, SLAB_POISON, NULL);
	kept[0] = kmem_cache_alloc(cache, GFP_KERNEL);
	kmem_cache_free(cache, kept[0]);
	kept[0] = NULL;
	kmem_cache_free_bulk(cache, kmem_cache_alloc_bulk(cache, GFP_KERNEL, 5, bulk), bulk);
	pool = mempool_create_kmalloc_pool(3, 128);
	mempool_free(mempool_alloc(pool, GFP_KERNEL), pool);
	mempool_destroy(pool);
	kmem_cache_destroy(cache);
	each = alloc_percpu(int);
	free_percpu(each);
	kvfree(kvmalloc(3 << 20, GFP_KERNEL));
	vfree(vmalloc(10000));
	vunmap(vmap(&page, 1, VM_MAP, PAGE_KERNEL));
	__free_page(page);
	free_page(get_zeroed_page(GFP_KERNEL));
	free_pages_exact(alloc_pages_exact(3 * PAGE_SIZE, GFP_KERNEL), 3 * PAGE_SIZE);
	kfree(kstrdup("a text", GFP_KERNEL));
	kfree_sensitive(kzalloc(200, GFP_KERNEL));
	iounmap(ioremap(0xfed00000, 1024)); // the HPET
	return 0;
}

static const struct {
	const char *name;
	int (*run)(void);
} cases[] = {
	{ "rcu", rcu },		{ "texts", texts },	      { "sizes", sizes },
	{ "same", same },	{ "realloc", realloc },	      { "fail", fail },
	{ "calls", calls },	{ "interrupts", interrupts }, { "processors", processors },
	{ "every", every },
};

static int __init watch_cases_init(void)
{
	int i;

	for (i = 0; i < ARRAY_SIZE(cases); i++)
		if (!strcmp(mode, cases[i].name))
			return cases[i].run();
	return -EINVAL;
}

// The first half of what is kept is freed, the second is lost.
static void __exit watch_cases_exit(void)
{
	int i;

	rcu_barrier();
	for (i = 0; i < 32; i++)
		kfree(kept[i]);
}

module_init(watch_cases_init);
module_exit(watch_cases_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("allocates and frees in many ways");
