/*
 * ^C, counted on its way to gdb's own handler.
 *
 * gdb sends it on to the stub, and the stub drops what comes while the kernel stands, as it does at
 * each hit of a breakpoint: somebody has to remember it.
 */
#include <errno.h>
#include <signal.h>
#include <stddef.h>

static void (*gdbs_handler)(int);
static volatile sig_atomic_t count;

static void on_sigint(int number)
{
	int before = errno;

	count++;
	gdbs_handler(number);
	signal(number, on_sigint);	/* gdb's handler has put itself back */
	errno = before;
}

/* Comes before the handler that was there the first time, if there was one. */
void count_sigint(void)
{
	struct sigaction now;

	if (sigaction(SIGINT, NULL, &now) == 0 && !gdbs_handler && now.sa_handler != SIG_IGN &&
	    now.sa_handler != SIG_DFL)
		gdbs_handler = now.sa_handler;
	if (gdbs_handler)
		signal(SIGINT, on_sigint);
}

int sigint_count(void)
{
	return count;
}
