// In its init each CPU allocates, and frees what the others allocated; `lose` blocks stay.
#include <linux/atomic.h>
#include <linux/cpumask.h>
#include <linux/gfp.h>
#include <linux/module.h>
#include <linux/percpu.h>
#include <linux/slab.h>
#include <linux/vmalloc.h>
#include <linux/workqueue.h>

#define BLOCKS 64

static int times = 500;
module_param(times, int, 0444);
static int lose = 1;
module_param(lose, int, 0444);
static bool fail;
module_param(fail, bool, 0444);

static void *blocks[BLOCKS], *pages[BLOCKS];
static atomic_t done;
static DEFINE_PER_CPU(struct work_struct, works);

static noinline void free_block(void *block)
{
	kvfree(block);
}

static noinline void *new_block(int i)
{
	return i % 50 ? kmalloc(8 + i * 7 % 3000, GFP_KERNEL) : vmalloc(5000);
}

static void work(struct work_struct *unused)
{
	int i;

	for (i = 0; i < times; i++) {
		void *block = new_block(i);

		atomic_add(!!block, &done);
		free_block(xchg(&blocks[i % BLOCKS], block));
		if (i % 7 == 0) {
			block = (void *)__get_free_pages(GFP_KERNEL, i & 1);
			atomic_add(!!block, &done);
			/* Of one order at each place: i and i % BLOCKS are odd together. */
			free_pages((unsigned long)xchg(&pages[i % BLOCKS], block), i & 1);
		}
	}
}

static int __init watch_busy_init(void)
{
	int cpu, i;

	for_each_online_cpu(cpu) {
		INIT_WORK(per_cpu_ptr(&works, cpu), work);
		schedule_work_on(cpu, per_cpu_ptr(&works, cpu));
	}
	for_each_online_cpu(cpu)
		flush_work(per_cpu_ptr(&works, cpu));
	for (i = lose; i < BLOCKS; i++)
		free_block(blocks[i]);
	for (i = 0; i < BLOCKS; i++)
		free_pages((unsigned long)pages[i], i & 1);
	pr_info("watch_busy: %d\n", atomic_read(&done));
	return fail ? -ENODEV : 0;
}

static void __exit watch_busy_exit(void)
{
}

module_init(watch_busy_init);
module_exit(watch_busy_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("allocates and frees on all CPUs at once");
