// Goes away and leaves pointers to itself: a notifier, a list entry, a timer, an allocated block.
// Told in the log: `left: KIND ADDRESS`, the address of the word that holds the pointer.
// With fail=1 it leaves them when its init fails.
#include <linux/list.h>
#include <linux/module.h>
#include <linux/reboot.h>
#include <linux/slab.h>
#include <linux/timer.h>

struct left {
	char name[40];
	void (*callback)(struct left *left);
	struct notifier_block notifier;
	struct timer_list timer;
	struct left *next;
};

static bool fail;
module_param(fail, bool, 0444);

static void called_back(struct left *left)
{
	pr_info("called %s\n", left->name);
}

static int notified(struct notifier_block *block, unsigned long event, void *data)
{
	return NOTIFY_DONE;
}

static void timed_out(struct timer_list *timer)
{
}

static struct notifier_block static_notifier = { .notifier_call = notified };

static int __init left_behind_init(void)
{
	struct left *left = kzalloc(sizeof(*left), GFP_KERNEL);
	struct left *freed = kzalloc(sizeof(*freed), GFP_KERNEL);
	int error;

	if (!left || !freed)
		return -ENOMEM;
	left->callback = called_back;
	left->notifier.notifier_call = notified;
	timer_setup(&left->timer, timed_out, 0);
	/* Two hours: it will not run in a test. */
	mod_timer(&left->timer, jiffies + 7200 * HZ);
	error = register_reboot_notifier(&left->notifier);
	/* It is in the chain after this module's first init, and there is no second place for it. */
	if (!error && !fail)
		error = register_reboot_notifier(&static_notifier);
	if (error)
		return error;
	pr_info("left: callback %px\n", &left->callback);
	pr_info("left: notifier %px\n", &left->notifier.notifier_call);
	pr_info("left: timer %px\n", &left->timer.function);
	/* What is left in a free object does not count. */
	freed->callback = called_back;
	pr_info("freed: object %px\n", &freed->callback);
	kfree(freed);
	return fail ? -EBUSY : 0;
}

static void __exit left_behind_exit(void)
{
	/* Nothing is taken back: that is what this module is for. */
}

module_init(left_behind_init);
module_exit(left_behind_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("goes away and leaves pointers to itself");
