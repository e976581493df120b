/*
 * opener [-m] THREADS CALLS [PATH]: open PATH exactly CALLS times in all, with openat().
 *
 * The calls are dealt out evenly over THREADS threads, which are named opener-0, opener-1 and so
 * on. With -m each thread hops to the next CPU after every call. A PATH that does not exist counts
 * as a call too. Prints how many calls succeeded.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

struct share {
	pthread_t thread;
	int number;
	long calls;
	long succeeded;
};

static const char *path = "/etc/hostname";
static int migrate;
static long cpus;

static void *open_share(void *data)
{
	struct share *share = data;
	char name[16];

	snprintf(name, sizeof(name), "opener-%d", share->number);
	prctl(PR_SET_NAME, name);
	for (long i = 0; i < share->calls; i++) {
		/* Not open(): the C library may choose another system call for it. */
		long fd = syscall(SYS_openat, AT_FDCWD, path, O_RDONLY);

		if (fd >= 0) {
			share->succeeded++;
			close(fd);
		}
		if (migrate) {
			cpu_set_t set;

			CPU_ZERO(&set);
			CPU_SET((share->number + i + 1) % cpus, &set);
			sched_setaffinity(0, sizeof(set), &set);
		} else {
			sched_yield();
		}
	}
	return NULL;
}

int main(int argc, char **argv)
{
	long threads, calls, succeeded = 0;
	struct share *shares;
	cpu_set_t set;

	if (argc > 1 && !strcmp(argv[1], "-m")) {
		migrate = 1;
		argc--;
		argv++;
	}
	threads = argc > 2 ? atol(argv[1]) : 0;
	calls = argc > 2 ? atol(argv[2]) : 0;
	if (argc > 3)
		path = argv[3];
	if (threads < 1 || calls < 0) {
		fprintf(stderr, "usage: opener [-m] THREADS CALLS [PATH]\n");
		return 2;
	}
	/* Not sysconf(), which may open a file under /sys. */
	sched_getaffinity(0, sizeof(set), &set);
	cpus = CPU_COUNT(&set);
	shares = calloc(threads, sizeof(*shares));
	for (long i = 0; i < threads; i++) {
		shares[i].number = i;
		shares[i].calls = calls / threads + (i < calls % threads);
		if (pthread_create(&shares[i].thread, NULL, open_share, &shares[i])) {
			perror("pthread_create");
			return 1;
		}
	}
	for (long i = 0; i < threads; i++) {
		pthread_join(shares[i].thread, NULL);
		succeeded += shares[i].succeeded;
	}
	printf("%ld\n", succeeded);
	return 0;
}
