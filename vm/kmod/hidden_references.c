// Keeps blocks in places that a scan may overlook; each is told in the log: `kept: KIND ADDRESS`.
#include <linux/completion.h>
#include <linux/kthread.h>
#include <linux/mempool.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/rcupdate.h>
#include <linux/slab.h>
#include <linux/xarray.h>

struct pending {
	char text[72];
	struct rcu_head rcu;
};

static mempool_t *pool;
static struct page *page_only;
static unsigned long __percpu *per_cpu_only;
static DEFINE_XARRAY(xarray);
static struct task_struct *sleeper, *spinner;
static DECLARE_COMPLETION(sleeps);
static DECLARE_COMPLETION(spins);
static int stop;

static void kept(const char *kind, const void *address)
{
	pr_info("kept: %s %px\n", kind, address);
}

/* The only pointer is in the frame of a thread that sleeps. */
static int sleep_with_pointer(void *unused)
{
	void *volatile block = kzalloc(300, GFP_KERNEL);

	kept("stack", block);
	complete(&sleeps);
	while (!kthread_should_stop()) {
		set_current_state(TASK_INTERRUPTIBLE);
		if (!kthread_should_stop())
			schedule();
		__set_current_state(TASK_RUNNING);
	}
	kfree(block);
	return 0;
}

/* The only pointer is in a register; no grace period ends meanwhile. */
static int spin_with_pointer(void *unused)
{
	void *block = kzalloc(300, GFP_KERNEL);
	struct pending *pending = kzalloc(sizeof(*pending), GFP_KERNEL);

	kept("register", block);
	kept("kfree_rcu", pending);
	preempt_disable();
	rcu_read_lock();
	kfree_rcu(pending, rcu);
	pending = NULL;
	complete(&spins);
	asm volatile("1: pause\n\t"
		     "cmpl $0, %1\n\t"
		     "je 1b"
		     : "+r" (block) : "m" (stop) : "memory", "cc");
	rcu_read_unlock();
	preempt_enable();
	kfree(block);
	while (!kthread_should_stop())
		schedule_timeout_interruptible(1);
	return 0;
}

static int __init hidden_references_init(void)
{
	void *block;
	int i;

	pool = mempool_create_kmalloc_pool(4, 256);
	page_only = alloc_pages(GFP_KERNEL | __GFP_ZERO, 1);
	per_cpu_only = alloc_percpu(unsigned long);
	if (!pool || !page_only || !per_cpu_only)
		return -ENOMEM;
	for (i = 0; i < pool->curr_nr; i++)
		kept("mempool", pool->elements[i]);
	kept("struct_page", page_address(page_only));
	kept("percpu", (void __force *)per_cpu_only);
	block = kzalloc(300, GFP_KERNEL);
	kept("xarray", block);
	xa_store(&xarray, 1000003, block, GFP_KERNEL);
	block = kzalloc(300, GFP_KERNEL);
	kept("in_percpu", block);
	*per_cpu_ptr(per_cpu_only, 0) = (unsigned long)block;
	block = NULL;
	sleeper = kthread_run(sleep_with_pointer, NULL, "sleeper");
	spinner = kthread_run(spin_with_pointer, NULL, "spinner");
	wait_for_completion(&sleeps);
	wait_for_completion(&spins);
	return 0;
}

static void __exit hidden_references_exit(void)
{
	WRITE_ONCE(stop, 1);
	kthread_stop(spinner);
	kthread_stop(sleeper);
	kfree(xa_erase(&xarray, 1000003));
	kfree((void *)*per_cpu_ptr(per_cpu_only, 0));
	free_percpu(per_cpu_only);
	__free_pages(page_only, 1);
	mempool_destroy(pool);
}

module_init(hidden_references_init);
module_exit(hidden_references_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("keeps blocks in places that a scan may overlook");
